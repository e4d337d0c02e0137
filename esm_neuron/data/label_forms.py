"""The forms in which people write labels, lists and class names."""

from __future__ import annotations

import ast
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from esm_neuron.data.looks import LOCATION
from esm_neuron.data.validation import quote

_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?")
_WHOLE = re.compile(r"-?[0-9]{1,15}(\.0+)?")
_MARK = re.compile(r"[01](\.0*)?|true|false")
_ARRAY = re.compile(r"(?:\w+\.)?(?:array|tensor)\(\s*(\[.*\])\s*(?:,\s*dtype=.*)?\)")
_KEY = r"""\s*(?:'(?P<one>[^']*)'|"(?P<two>[^"]*)"|(?P<bare>[^\s'":,{}][^'":,{}]*?))\s*:"""
_PAIR = re.compile(_KEY + r"""\s*(?P<value>[^\s,{}:'"]+)\s*(?:,|$)""")
_MAPPING = re.compile(r"""\{\s*(?:'[^']*'\s*:|"[^"]*"\s*:|[^\s'":,{}][^'":,{}]*:\s)""")


def listed(text: str) -> list[str] | None:
    """Return the entries of a label written as a list, `[0, 1]`, `['a', 'b']`, `array([0 1])`; None for other text."""
    array = _ARRAY.fullmatch(text)
    text = text if array is None else array[1]
    if len(text) < 2 or text[0] + text[-1] not in ("[]", "()", "{}"):
        return None
    inner = text[1:-1].strip()
    quoted = [match[0] for match in _QUOTED.finditer(inner)]
    if quoted and not _QUOTED.sub("", inner).strip(", \n"):
        return [_unquoted(entry) for entry in quoted]
    if set(inner) & set("()[]{}"):
        return None  # such as `(R)-lipoate;NAD(+)`
    bare = [part.strip() for part in inner.rstrip(",").split(",")] if "," in inner else inner.split()
    if all(map(_NUMBER.fullmatch, bare)):
        return bare
    if quoted and text[0] == "[":
        raise ValueError(f"{quote(text)} is a list with and without quotes; write all of its entries in them")
    return bare if text[0] == "[" and len(bare) > 1 else None  # [2Fe-2S] and (cell wall) are names


def _unquoted(entry: str) -> str:
    """Return what a string in quotes stands for, as Python and JSON write it."""
    try:
        return str(ast.literal_eval(entry))
    except (SyntaxError, ValueError):
        return entry[1:-1]


def locations(text: str) -> list[str] | None:
    """Return the locations in UniProt's free text, `SUBCELLULAR LOCATION: Nucleus {ECO:0000269}; ...`; else None.

    Evidence, isoforms, topologies (behind `;`) and notes are left out. https://www.uniprot.org/help/subcellular_location
    """
    if not text.startswith(LOCATION):
        return None
    found: dict[str, None] = {}
    for block in text.split(LOCATION)[1:]:
        plain = re.sub(r"\s*\{ECO:[^{}]*\}|\[[^\[\]]*\]:", "", block).partition("Note=")[0]
        found |= dict.fromkeys(place.partition(";")[0].strip() for place in re.split(r"\.(?:\s|$)", plain))
    found.pop("", None)
    if not found:
        raise ValueError(f"{quote(text)} names no location; remove the record")
    return list(found)


def marked(text: str) -> list[str] | None:
    """Return the labels with 1 or true in `{'a': 1, 'b': 0}`; None for other text. Raise ValueError on other values."""
    if not (text.startswith("{") and text.endswith("}") and ":" in text):
        return None
    pairs = list(_PAIR.finditer(text[1:-1]))
    values = [pair["value"].lower() for pair in pairs]
    if "".join(pair[0] for pair in pairs) == text[1:-1] and all(map(_MARK.fullmatch, values)):
        names = [pair["one"] or pair["two"] or pair["bare"] for pair in pairs]
        return [name for name, value in zip(names, values, strict=True) if value[0] in "1t"]
    if not _MAPPING.match(text):
        return None  # such as {ECO:0000269}
    raise ValueError(f"{quote(text)} is a mapping in braces; write 1 or 0 behind each label, or the list of its labels")


def vector(text: str, joiner: str = ",") -> list[str] | None:
    """Return 0 or 1 for each mark of a label of two or more, such as `0 1`, `[0. 1.]` or `True, False`, else None."""
    marks = listed(text)
    if marks is None:
        marks = [mark.strip() for mark in text.split(joiner)]
        marks = re.split(r"\s*,\s*|\s+", text.strip()) if len(marks) == 1 else marks
    if len(marks) < 2 or not all(_MARK.fullmatch(mark.lower()) for mark in marks):
        return None
    return ["1" if mark[0] in "1tT" else "0" for mark in marks]


def has_quoted(text: str) -> bool:
    """Return whether what stands in the brackets of a list are quoted names or numbers, not the name of one class."""
    names = listed(text) or []
    return bool(_QUOTED.search(text)) or all(map(_NUMBER.fullmatch, names))


def one_hot(marks: Sequence[str], labels: Sequence[str] | None) -> list[str] | None:
    """Return the labels marked by 1, where `marks` has 0 or 1 for each of the known labels; None where it has not."""
    if not labels or len(marks) != len(labels) or not set(marks) <= {"0", "1"} or {"0", "1"} & set(labels):
        return None
    return [label for label, mark in zip(labels, marks, strict=True) if mark == "1"]


def same(name: str) -> str | int:
    """Return what a class name says: True and true are one, 1 and 1.0, and what looks alike (blanks, accents)."""
    if not name.isascii():  # a letter and its accent, or characters of no width
        name = unicodedata.normalize("NFKC", "".join(c for c in name if unicodedata.category(c) != "Cf"))
    name = " ".join(name.split())
    if name.lower() in ("true", "false"):
        return name.lower()
    return int(float(name)) if _WHOLE.fullmatch(name) else name


def loosely(name: str) -> str:
    """Return what names have in common that a careless writer takes for one."""
    return re.sub(r"[\s_-]+", " ", name.lower()).strip(" .,;:")


def in_order(names: Iterable[str]) -> list[str]:
    """Return class names sorted: whole numbers by their values, all else as text."""
    given = sorted(names)
    return sorted(given, key=lambda name: int(float(name))) if all(map(_WHOLE.fullmatch, given)) else given


def other_separator(names: Sequence[str], own: str) -> str | None:
    """Return what separates labels besides `own`, judged by the names: their parts are, or are in, other names too."""
    for separator in (*",|;/&+\\", "||", "//", " and ", " or "):
        joined = [name for name in names if separator in name]
        if not joined or separator == own:
            continue
        parts = [[part.strip() for part in name.split(separator)] for name in names]
        times = Counter(part for of in parts for part in set(of))
        inner = [part for of in parts if len(of) > 1 for part in of]
        if 2 * sum(times[part] > 1 for part in inner) >= len(inner) and all(inner):
            return separator
    return None
