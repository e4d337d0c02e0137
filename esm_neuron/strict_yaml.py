"""YAML that comes from elsewhere: no key twice, no aliases, no depth or size that would fill the memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from esm_neuron.config import require
from esm_neuron.errors import ConfigError
from esm_neuron.redact import redact

SIZE_LIMIT = 1 << 22
"""Most bytes of a YAML file: the names of 30,000 classes with 100 characters each are less."""
DEPTH_LIMIT = 20
"""How deep lists and mappings may nest; those of settings are three deep."""
_NESTING = "[{-?:"
"""Characters of which YAML needs one a level."""


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key twice is an error: otherwise the first of two `lr` lines would be lost without a word.

    Without aliases, of which ten lines can make a billion values, and without depths that end in Python's stack.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        where = f"{self.name}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) and event.anchor in self.anchors:
            raise ConfigError(f"{where}: an alias, *{event.anchor}; write out the value that it stands for")
        if self._depth == DEPTH_LIMIT:
            raise ConfigError(f"{where}: nested more than {DEPTH_LIMIT} deep; nothing of ours is; take levels out")
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{self.name}:{key.start_mark.line + 1}: a key that is no text; write NAME: VALUE")
            if key.value in seen:
                raise ConfigError(
                    f"{self.name}:{key.start_mark.line + 1}: key {key.value!r} comes twice; keep one of them"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, option: str, cure: str) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file, at most `SIZE_LIMIT` bytes.
        option: the flag that named it, for errors.
        cure: where to see what it should hold, for the error that it holds none.

    Raises:
        ConfigError: it cannot be read, is no YAML or no mapping, or has what `_StrictLoader` refuses.
    """
    named = f"{option} {path if str(path).isprintable() else ascii(str(path))}"
    try:
        require(not path.exists() or path.is_file(), f"{named}: no regular file; check the path")
        with path.open("rb") as file:
            content = file.read(SIZE_LIMIT + 1)
        require(len(content) <= SIZE_LIMIT, f"{named}: more than {SIZE_LIMIT} bytes; is this the right file?")
        loader = _StrictLoader(content.decode("utf-8"))
        loader.name = str(path)
        value = loader.get_single_data()
    except OSError as error:
        raise ConfigError(f"{named}: cannot be read ({error.strerror}); check the path") from error
    # beside its own kind, yaml raises whatever int, float, date and a dictionary raise at `!!int x` and the like
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{named}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        held = "nothing" if value is None else type(value).__name__
        raise ConfigError(f"{named}: holds {held}, must be sections of NAME: VALUE; see {cure}")
    for text in _texts(value):  # jsonargparse reads each as YAML once more
        check_text(f"{named}: the text {redact(text)[:40]!r}", text)
    return value


def check_text(name: str, text: str, level: int = 0) -> None:
    """Refuse a text that would fill the memory if it were read as YAML, and texts within it that would.

    Args:
        name: what errors call it.
        text: any text; what is no YAML passes, as plain text.
        level: how many texts it is within.

    Raises:
        ConfigError: it has aliases, or is nested too deeply.
    """
    if not ("&" in text and "*" in text) and sum(map(text.count, _NESTING)) <= DEPTH_LIMIT:
        return
    require(level < DEPTH_LIMIT, f"{name}: texts within texts, more than {DEPTH_LIMIT} deep; nothing of ours is")
    value = None
    with suppress(yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError):
        loader = _StrictLoader(text)  # which already refuses what cannot be printed
        loader.name = name
        value = loader.get_single_data()
    for inner in _texts(value):
        if inner != text:
            check_text(name, inner, level + 1)


def _texts(value: Any) -> Iterator[str]:
    """The texts of a value without aliases, of at most `DEPTH_LIMIT` levels."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            for item in pair:
                yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
