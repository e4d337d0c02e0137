"""From YAML and flags to a `TrainConfig` and back, by jsonargparse; an error names the nearest known setting."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from esm_neuron.config import TrainConfig, require
from esm_neuron.config.rules import check_values
from esm_neuron.errors import ConfigError
from esm_neuron.redact import redact

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# a value may name no class or function: jsonargparse would import it, and an import runs what it finds
set_parsing_settings(docstring_parse_attribute_docstrings=True, import_path_denylist=["*"])

_UNKNOWN = (
    re.compile(r"unrecognized arguments: -*(?P<option>[^\s=]+)", re.IGNORECASE),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<option>[^']+)'"),
    re.compile(r"Option '(?P<option>[^']+)' is not accepted"),
)

_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "batch_size": "loop.packs_per_step",
    "per_device_train_batch_size": "loop.packs_per_device",
    "num_train_epochs": "loop.epochs",
    "max_length": "data.max_residues",
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.alpha",
}
"""What other trainers call a setting -> its name here."""


@cache
def make_parser(command: str = "train") -> ArgumentParser:
    """The parser of `--section.field value` flags and `--config FILE` for every field of `TrainConfig`."""
    parser = ArgumentParser(prog=f"esm-neuron {command}", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; flags after it overrule it.")
    parser.add_class_arguments(TrainConfig)
    return parser


def parse(argv: Sequence[str], command: str = "train") -> TrainConfig:
    """The configuration that `argv` describes; `--resume` is short for `--checkpoint.resume`.

    Raises:
        ConfigError: an unknown or repeated key, a value of the wrong type, an unreadable file.
    """
    for path in _config_files(argv):
        for key, value in read_yaml(path, "--config", "--help").items():
            _check_holder(f"{path}: {key}", key, value)
    return _parsed([re.sub(r"^--resume(?==|$)", "--checkpoint.resume", word) for word in argv], command)


def read_config(path: Path) -> TrainConfig:
    """The configuration saved in a YAML file. Raises ConfigError as `parse` does."""
    return parse(["--config", str(path)])


def override(cfg: TrainConfig, argv: Sequence[str], allowed: Sequence[str], command: str) -> TrainConfig:
    """`cfg` with the settings of `argv` (`--section.field value`); only those that begin with a word of `allowed`.

    Raises:
        ConfigError: a setting that is unknown, of the wrong type, out of range, or not to be changed here.
    """
    for word in argv:
        name = word[2:].partition("=")[0]
        if word.startswith("--") and name in set(known_keys()) and not name.startswith(tuple(allowed)):
            shown = ", ".join(f"{each}*" if each.endswith(".") else each for each in allowed)
            raise ConfigError(f"{word}: `{command}` changes no such setting of a trained model, only {shown}")
    changed = _parsed(list(argv), command, cfg)
    check_values(changed)
    return changed


def _parsed(words: list[str], command: str, start: TrainConfig | None = None) -> TrainConfig:
    """What the words make of `start`, or of the defaults."""
    for word in words:
        name, _, text = word.partition("=")
        _check_holder(name, name.removeprefix("--") if word.startswith("--") else None, text)
        for part in (word, text):  # a value may be a word of its own, with a sign of equality in it
            check_text(redact(name)[:60], part)
    parser = make_parser(command)
    try:
        namespace = None if start is None else parser.parse_object(plain(start))
        values = parser.instantiate(parser.parse_args(words, namespace=namespace))
    # jsonargparse lets through what yaml raises at values such as `!!timestamp x`
    except (
        argparse.ArgumentError,
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
    ) as error:
        raise ConfigError(_explain(str(error))) from error
    cfg = TrainConfig(**{f.name: values[f.name] for f in fields(TrainConfig)})
    for name in _nothing("", plain(cfg), plain(TrainConfig())):
        raise ConfigError(f"{name} has no value; give one, or leave it out for the default")
    return cfg


def _check_holder(name: str, key: object, value: object) -> None:
    """Refuse a file named where settings belong: jsonargparse would read it, without the care of `read_yaml`.

    Args:
        name: what errors call it.
        key: a section, a setting or anything else.
        value: what it is to be.

    Raises:
        ConfigError: the section, or `config` within a file, is no mapping.
    """
    sections = {f.name for f in fields(TrainConfig) if isinstance(f.default_factory, type)}
    if key in sections and not isinstance(value, dict):
        raise ConfigError(
            f"{name} is a section: give its settings by name, as --{key}.NAME VALUE or NAME: VALUE under it"
        )
    if key == "config" and not name.startswith("--"):
        raise ConfigError(f"{name}: a configuration cannot name another; give both as --config, the later one rules")


def _nothing(name: str, value: Any, default: Any) -> Iterator[str]:
    """Settings that are null although their default is not: jsonargparse takes null for a value of any type."""
    if value is None and default is not None:
        yield name
    elif isinstance(value, dict):
        known = default if isinstance(default, dict) else {}
        for key, item in value.items():
            yield from _nothing(f"{name}.{key}".lstrip("."), item, known.get(key, ""))
    elif isinstance(value, list):
        for item in value:
            yield from _nothing(name, item, "")


def dump(cfg: TrainConfig) -> str:
    """`cfg` as YAML with every field, in the order of the classes."""
    return yaml.dump(plain(cfg), Dumper=_QuotingDumper, sort_keys=False, allow_unicode=True)


def known_keys(cls: type = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields, such as `optim.lr`."""
    for f in fields(cls):
        section = f.default_factory if isinstance(f.default_factory, type) else None
        if section is not None and is_dataclass(section):
            yield from known_keys(section, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def _config_files(argv: Sequence[str]) -> Iterator[Path]:
    for i, word in enumerate(argv):
        if word == "--config" and i + 1 < len(argv):
            yield Path(argv[i + 1])
        elif word.startswith("--config="):
            yield Path(word.partition("=")[2])


class _QuotingDumper(yaml.SafeDumper):
    """Quotes text that begins like a number: a bare 1e3, a fine label, is text to PyYAML and 1000.0 to jsonargparse."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    numeric = text[:1] in set("+-.0123456789")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if numeric else None)


_QuotingDumper.add_representer(str, _represent_text)


def _explain(message: str) -> str:
    """jsonargparse's message on one line, with the nearest known key where one is unknown."""
    message = " ".join(message.split())
    if denied := re.search(r"Importing '(.+?)' is not allowed", message):
        return f"a setting names a module, {denied[1]!r}; none is imported: write out the settings, NAME: VALUE"
    found = next(filter(None, (pattern.search(message) for pattern in _UNKNOWN)), None)
    if found is None:
        return re.sub(r"Parser key \"([\w.]+)\"", r"\1", re.sub(r"<class '(\w+)'>|typing\.(?=Literal)", r"\1", message))
    unknown = ".".join(filter(None, (found.groupdict().get("group"), found["option"])))
    last = unknown.rpartition(".")[2]
    near = [_ELSEWHERE[last]] if last in _ELSEWHERE else []
    near += difflib.get_close_matches(unknown, list(known_keys()), n=1, cutoff=0.5)
    near += [key for key in known_keys() if key.rpartition(".")[2] == last]
    hint = f"did you mean {near[0]}?" if near else "see esm-neuron train --help"
    return f"unknown setting {unknown}; {hint}"


def plain(section: DataclassInstance) -> dict[str, Any]:
    """A configuration, or a section of one, in the types of YAML and JSON."""
    values: dict[str, Any] = _plain(asdict(section))
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


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
