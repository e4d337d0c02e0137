"""docs/settings.md: every setting and its meaning, read from the fields of `esm_neuron/config/__init__.py`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SCHEMA = Path(__file__).resolve().parents[1] / "esm_neuron" / "config" / "__init__.py"
HEAD = """# Settings
Made from `esm_neuron/config/__init__.py` by `make pages`. Each setting is a key of the YAML file and a flag:
`--optim.lr 3e-4`, or `--lr 3e-4` where no other setting ends so. Shorter still are `--data` (`data.train`), `--model`
(`model.name`), `--task` (`task.name`), `--adapter` (`adapter.kind`) and `--label` (`data.label_column`).
`esm-neuron train --print_config` prints them all with their values.
"""


@dataclass(frozen=True)
class Setting:
    """One field of a section."""

    name: str
    kind: str
    default: str
    meaning: str


def classes() -> dict[str, ast.ClassDef]:
    """Return the dataclasses of the schema by name."""
    tree = ast.parse(SCHEMA.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def fields(section: ast.ClassDef) -> Iterator[Setting]:
    """Yield the fields of a class, each with the docstring that follows it."""
    for place, node in enumerate(section.body):
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            behind = section.body[place + 1] if place + 1 < len(section.body) else None
            told = isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant)
            meaning = str(behind.value.value) if told else ""  # type: ignore[union-attr]
            default = ast.unparse(node.value).replace("field(default_factory=dict)", "{}")
            yield Setting(ast.unparse(node.target), ast.unparse(node.annotation), default, meaning)


def page() -> str:
    """Return the whole page."""
    found, aliases = classes(), literals()
    top = list(fields(found["TrainConfig"]))
    lines = [HEAD, *table("", [setting for setting in top if setting.kind not in found], aliases)]
    for section in (setting for setting in top if setting.kind in found):
        about = ast.get_docstring(found[section.kind]) or ""
        rows = table(f"{section.name}.", list(fields(found[section.kind])), aliases)
        lines += [f"\n## {section.name}\n{about}\n", *rows]
    return "\n".join(lines) + "\n"


def literals() -> dict[str, str]:
    """Return the names that stand for one of several words, with these words."""
    tree = ast.parse(SCHEMA.read_text(encoding="utf-8"))
    return {
        ast.unparse(node.targets[0]): ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Literal[")
    }


def table(prefix: str, settings: list[Setting], aliases: dict[str, str]) -> list[str]:
    """Return the lines of a table, one per setting."""
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for each in settings:
        kind = each.kind
        for name, words in aliases.items():
            kind = re.sub(rf"\b{name}\b", words, kind)
        kind = re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace(", ", " or "), kind).replace(" | ", " or ")
        meaning = re.sub(r"(?<!`)<(\w+)>(?!`)", r"`<\1>`", " ".join(each.meaning.split()))
        lines.append(f"| `{prefix}{each.name}` | `{kind}` | `{each.default}` | {meaning} |")
    return lines
