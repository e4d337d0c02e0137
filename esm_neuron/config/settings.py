"""Read settings from YAML files and flags into a `TrainConfig`, and write them back as YAML.

jsonargparse makes the parser from the classes of the package and checks the types. Files and the values of flags are
decoded by one strict YAML loader; an unknown setting gets the nearest known one suggested.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_loader, set_parsing_settings

from esm_neuron.config import TrainConfig, require
from esm_neuron.config.rules import check_values
from esm_neuron.errors import ConfigError, one_line
from esm_neuron.redact import redact

T = TypeVar("T")

SIZE_LIMIT = 1 << 22
"""Largest YAML file in bytes: the names of 30,000 classes with 100 characters each are less."""
DEPTH_LIMIT = 20
"""How deep lists and mappings may nest; those of settings are three deep."""

RENAMED = {
    "data.row_tokens": "data.pack_tokens",
    "data.relatives": "data.homologs",
    "loop.rows_per_step": "loop.packs_per_step",
    "loop.rows_per_device": "loop.packs_per_device",
    "loop.eval_rows_per_device": "loop.eval_packs_per_device",
    "log.answers": "log.predictions",
}
"""Earlier name of a setting -> its name today."""
REMOVED = {
    "data.max_buckets": "leave it out, since every pack has data.pack_tokens tokens",
    "data.sample=rows": "use data.sample=proteins",
    "loop.on_nonfinite=rollback": "use loop.on_nonfinite=skip",
}
"""Setting, or value of one, that is gone -> what to do instead."""
_ELSEWHERE = {
    **dict.fromkeys(("learning_rate", "initial_lr"), "optim.lr"),
    **dict.fromkeys(("batch_size", "train_batch_size", "auto_find_batch_size"), "loop.packs_per_step"),
    **dict.fromkeys(("per_device_train_batch_size", "per_gpu_train_batch_size"), "loop.packs_per_device"),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), "loop.eval_packs_per_device"),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), "loop.epochs"),
    **dict.fromkeys(("steps", "num_steps"), "loop.max_steps"),
    **dict.fromkeys(("max_length", "max_seq_length", "model_max_length"), "data.max_residues"),
    **dict.fromkeys(("model_id", "model_name_or_path", "pretrained_model_name_or_path", "model_name"), "model.name"),
    **dict.fromkeys(("lora_r", "rank"), "adapter.r"),
    **dict.fromkeys(("lora", "use_lora", "peft", "use_peft"), "adapter.kind"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantize"), "adapter.quantization"),
    **dict.fromkeys(("eval_steps", "eval_strategy", "evaluation_strategy"), "loop.eval_every"),
    **dict.fromkeys(("save_steps", "save_strategy"), "checkpoint.every"),
    **dict.fromkeys(("bf16", "half_precision_backend", "torch_dtype"), "loop.precision"),
    "num_warmup_steps": "optim.warmup_steps",
    **dict.fromkeys(("output_dir", "model_dir", "output_data_dir"), "output"),
    **dict.fromkeys(("train_file", "training_dir", "train_dir", "dataset_name"), "data.train"),
    **dict.fromkeys(("validation_file", "eval_dir", "validation_dir"), "data.valid"),
    **dict.fromkeys(("test_file", "test_dir"), "data.test"),
    **dict.fromkeys(("text_column", "text_column_name", "sequence_column_name"), "data.sequence_column"),
    **dict.fromkeys(("label_column_name", "target_column"), "data.label_column"),
    **dict.fromkeys(("max_train_samples", "max_samples"), "data.max_rows"),
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "use_gradient_checkpointing": "model.gradient_checkpointing",
    "lr_scheduler_type": "optim.schedule",
    "optim": "optim.kind",
    "adam_epsilon": "optim.eps",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "logging_steps": "log.every",
    "save_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "checkpoint.resume",
    "early_stopping_patience": "loop.patience",
    "label_smoothing_factor": "task.label_smoothing",
    "mlm_probability": "task.mask_probability",
    "fsdp": "parallel.fsdp",
    "tensor_parallel_size": "parallel.tp",
}
"""What Hugging Face's TrainingArguments, PEFT and AWS's sample call a setting -> its name here."""
_NOT_HERE = {
    "fp16": "mixed precision here is bf16: loop.precision=bf16 (or fp32)",
    "gradient_accumulation_steps": "it follows from loop.packs_per_step (over all devices) and loop.packs_per_device",
    "num_labels": "classes are counted in the training data",
    "group_by_length": "proteins are packed: data.packing",
    "dataloader_": "packs are made in one thread ahead of the device, and there is nothing to set",
    "metric_for_best_model": "each task has its metric: docs/tuning.md",
    "load_best_model_at_end": "the best step's weights are exported; loop.eval_every says how often to look",
    "deepspeed": "ZeRO is parallel.zero1 on trn1 and parallel.fsdp on GPUs",
    "report_to": "each has a setting: log.tensorboard=true, log.wandb=PROJECT, log.mlflow=EXPERIMENT",
    **dict.fromkeys(
        ("push_to_hub", "hub_"), "upload the run when it is done: esm-neuron export --push-to-hub OWNER/NAME"
    ),
    "do_train": "training, evaluation and prediction are commands: esm-neuron train, evaluate, predict",
    "ddp_": "torchrun starts the ranks, and the backend chooses how they talk",
}
"""Name of another trainer that no setting has, or how such names begin (`hub_`) -> what there is instead."""

SECTIONS = {f.name for f in fields(TrainConfig) if isinstance(f.default_factory, type)}
SHORT = {
    "model": "model.name",
    "task": "task.name",
    "adapter": "adapter.kind",
    "data": "data.train",
    "label": "data.label_column",
}
"""Short name of a setting -> its name. Short is also the last part of a name that no other setting ends with: `lr`."""

# PyYAML raises, besides its own error, whatever int, float and dict raise at values such as `!!int x`.
_NOT_YAML = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError)


class _StrictLoader(yaml.SafeLoader):
    """Refuse the YAML that loses a setting silently or fills the memory, and read `3e-4` as a number.

    A repeated key would drop the first of two `lr` lines. Ten lines of aliases can make a billion values. Deep nesting
    ends in Python's recursion limit.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        where = f"{self.name}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) and event.anchor in self.anchors:
            raise ConfigError(f"{where}: an alias, *{event.anchor}; write out the value that it stands for")
        if self._depth == DEPTH_LIMIT:
            raise ConfigError(f"{where}: nested more than {DEPTH_LIMIT} deep; no setting is, so take levels out")
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            where = f"{self.name}:{key.start_mark.line + 1}"
            require(isinstance(key, yaml.ScalarNode), f"{where}: a key that is not text; write NAME: VALUE")
            require(key.value not in seen, f"{where}: key {key.value!r} comes twice; keep one of them")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1: it needs a point in `3.0e-4`, and makes dates, which no setting is.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":float", ":timestamp"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = r"""(?x) [-+]? (?: [0-9][0-9_]* (?:\.[0-9_]*)? | \.[0-9][0-9_]* ) (?: [eE][-+]?[0-9]+ )? \Z
    | [-+]? \.(?:inf|Inf|INF) \Z | \.(?:nan|NaN|NAN) \Z"""
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def _load(text: str, name: str) -> Any:
    """Decode a YAML text."""
    loader = _StrictLoader(text)
    loader.name = name
    return loader.get_single_data()


# What is not YAML is plain text to jsonargparse; a ConfigError passes through it.
set_loader("strict_yaml", lambda text: _load(text, f"the value {redact(text)[:40]!r}"), exceptions=_NOT_YAML)
# A value may name no class or function: jsonargparse would import it, and an import runs what it finds.
set_parsing_settings(import_path_denylist=["*"])


def read_yaml(path: Path, option: str, cure: str) -> dict[Any, Any]:
    """Return the mapping in a YAML file, or raise ConfigError: it names the flag `option` and where to look, `cure`."""
    named = f"{option} {path if str(path).isprintable() else ascii(str(path))}"
    try:
        require(not path.exists() or path.is_file(), f"{named}: not a regular file; check the path")
        with path.open("rb") as file:
            content = file.read(SIZE_LIMIT + 1)
        require(len(content) <= SIZE_LIMIT, f"{named}: more than {SIZE_LIMIT} bytes; is this the right file?")
        value = _load(content.decode("utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{named}: cannot be read ({error.strerror}); check the path") from error
    except _NOT_YAML as error:
        raise ConfigError(f"{named}: not valid YAML: {one_line(error)}") from error
    if not isinstance(value, dict):
        held = "nothing" if value is None else type(value).__name__
        raise ConfigError(f"{named}: holds {held}, must be sections of NAME: VALUE; see {cure}")
    return value


class _ConfigFile(ActionConfigFile):
    """Apply a file of settings where `--config` stands, so that flags after it overrule it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        settings = read_yaml(Path(values), "--config", "--help")
        for key, value in settings.items():
            require(
                key != "config",
                f"{values}: config: a configuration cannot name another; give both as --config, the later one rules",
            )
            _check_section(f"{values}: {key}", key, value)
        cfg.update(parser.parse_object(settings, namespace=cfg, defaults=False))


@cache
def make_parser(documented: bool = True) -> ArgumentParser:
    """Return the parser of `--config FILE` and of a `--section.field VALUE` flag for every field of `TrainConfig`.

    Only a `documented` one has texts for its help, for which the source of the classes is read.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=documented)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, parser_mode="strict_yaml")
    parser.add_argument("--config", action=_ConfigFile, help="YAML file; flags after it overrule it.")
    parser.add_class_arguments(TrainConfig)
    return parser


def typed(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return `cls(**values)` with types checked and numbers converted. Raise ConfigError where a field is wrong."""
    parser = ArgumentParser(exit_on_error=False, parser_mode="strict_yaml")
    parser.add_class_arguments(cls)
    try:
        return cls(**vars(parser.instantiate(parser.parse_object(dict(values)))))
    except (argparse.ArgumentError, *_NOT_YAML) as error:
        raise ConfigError(one_line(error)) from error


def parse(argv: Sequence[str], command: str = "train") -> TrainConfig:
    """Return the configuration that `argv` describes, or raise ConfigError.

    A first word that is no flag is `data.train`; a flag may have a short name, see `full_name`.
    """
    return _parsed(whole_words(argv), command)


def whole_words(argv: Sequence[str]) -> list[str]:
    """Return the words of `train` with all flags, by their whole names."""
    return in_full(["--data.train", *argv] if argv and not argv[0].startswith("-") else argv)


def to_words(values: Mapping[str, Any], section: str = "") -> list[str]:
    """Return settings, by names or by sections, as words of a command line; None leaves one out."""
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and name in SECTIONS:
            words += to_words(value, f"{name}.")
        elif value is not None:
            value = value.item() if hasattr(value, "item") else value  # a number of numpy
            words.append(f"--{section}{name}={value if isinstance(value, (str, Path)) else json.dumps(plain(value))}")
    return words


def in_full(words: Sequence[str]) -> list[str]:
    """Return words of a command line with the flags of settings by their whole names."""
    parts = [word.partition("=") for word in words]
    return [
        f"--{full_name(flag[2:])}{equals}{value}" if flag.startswith("--") else word
        for word, (flag, equals, value) in zip(words, parts, strict=True)
    ]


def full_name(name: str) -> str:
    """Return the whole name of a setting, `optim.lr`, that is called `lr`, `optim_lr` or `optim-lr`.

    Raise ConfigError where several settings have the short name; a name that none has is returned as it is.
    """
    plain, known = name.replace("-", "_"), list(known_keys())
    if plain in known:
        return plain
    ends = [SHORT[plain]] if plain in SHORT else [
        key for key in known if plain in (key.rpartition(".")[2], key.replace(".", "_"))
    ]  # fmt: skip
    require(len(ends) < 2, f"{name} may be {' or '.join(ends)}; write which one")
    return ends[0] if ends else name


FIRST_STEP = {"adapter.kind": "probe", "model.layers": "auto", "data.test_fraction": "0.1",
              "data.sample": "clusters"}  # fmt: skip
"""Settings of `train` where only WHAT is given, and no file of settings: a probe."""
FIRST_STEP_POOLED = {"model.pooling": "mean+termini"}
"""Those for tasks with one vector per protein."""


WHAT = ("--data.", "--task.", "--log.", "--checkpoint.", "--output", "--backend", "--seed",
        "--model.name", "--model.base", "--model.revision", "--model.sha256")  # fmt: skip
"""Settings that say what is learned, with which weights and where, and nothing of how."""


def says_how(words: Sequence[str]) -> list[str]:
    """Return the flags of `whole_words` that name a way of training."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [flag for flag in flags if not flag.startswith(WHAT) or flag == "--seeds"]


def first_step(words: Sequence[str], pools: bool) -> list[str]:
    """Return `whole_words` with those of FIRST_STEP before them, which they overrule."""
    given = {**FIRST_STEP, **(FIRST_STEP_POOLED if pools else {})}
    return [*(f"--{name}={value}" for name, value in given.items()), *words]


def read_config(path: Path) -> TrainConfig:
    """Return the configuration saved in a YAML file. Raise ConfigError as `parse` does."""
    return parse(["--config", str(path)])


def override(cfg: TrainConfig, argv: Sequence[str], allowed: Sequence[str], command: str) -> TrainConfig:
    """Return `cfg` with the settings of `argv`, each of which `allowed` names; else raise ConfigError.

    A name that ends with a point stands for a section. A file of settings (--config) may change others only where
    `allowed` has `config`: they are for other commands.
    """
    shown = ", ".join(f"{name}*" if name.endswith(".") else name for name in allowed if name != "config")

    def may(name: str) -> bool:
        return name in allowed or f"{name.partition('.')[0]}." in allowed

    def refuse(name: str) -> NoReturn:
        raise ConfigError(f"{name}: `{command}` has no use for this setting, only for {shown}")

    words = in_full(argv)
    for word in words:
        name = word[2:].partition("=")[0]
        if word.startswith("--") and name in set(known_keys()) and not may(name):
            refuse(word)
    changed = _parsed(words, command, cfg) if words else cfg
    for name in known_keys():
        if not may(name) and "config" not in allowed and attrgetter(name)(changed) != attrgetter(name)(cfg):
            refuse(f"--config: {name}")
    check_values(changed)
    return changed


def _parsed(words: list[str], command: str, start: TrainConfig | None = None) -> TrainConfig:
    """Return `start`, or the defaults, with the settings that `words` name."""
    for word in words:
        name, _, text = word.partition("=")
        _check_section(name, name.removeprefix("--") if word.startswith("--") else None, text)
    parser = make_parser(documented=not {"-h", "--help"}.isdisjoint(words))
    parser.prog, parser.usage = f"esm-neuron {command}", "%(prog)s [--config FILE] [--SETTING VALUE ...]"
    try:
        namespace = None if start is None else parser.parse_object(plain(start))
        values = parser.instantiate(parser.parse_args(words, namespace=namespace))
    except (argparse.ArgumentError, *_NOT_YAML) as error:
        raise ConfigError(_explain(one_line(error))) from error
    cfg = TrainConfig(**{f.name: values[f.name] for f in fields(TrainConfig)})
    for name in _nothing("", plain(cfg), plain(TrainConfig())):
        raise ConfigError(f"{name} has no value; give one, or leave it out for the default")
    # as `model.name`, in a file as in a flag: a folder of the name `~` is never meant
    places = ("train", "valid", "test", "cache")
    home: dict[str, Any] = {name: os.path.expanduser(getattr(cfg.data, name) or "") or None for name in places}
    cfg = replace(cfg, output=os.path.expanduser(cfg.output), data=replace(cfg.data, **home))
    if cfg.adapter.init_from is not None:
        cfg = replace(cfg, adapter=replace(cfg.adapter, init_from=os.path.expanduser(cfg.adapter.init_from)))
    return cfg


def _check_section(name: str, key: object, value: object) -> None:
    """Refuse a file named where a section belongs: jsonargparse would read it, without the care of `read_yaml`."""
    require(
        key not in SECTIONS or isinstance(value, dict),
        f"{name} is a section: give its settings by name, as --{key}.NAME VALUE or NAME: VALUE under it",
    )


def _nothing(name: str, value: Any, default: Any) -> Iterator[str]:
    """Yield the settings that are null although their default is not: jsonargparse takes null for any type."""
    if value is None and default is not None:
        yield name
    elif isinstance(value, dict):
        known = default if isinstance(default, dict) else {}
        for key, item in value.items():
            yield from _nothing(f"{name}.{key}".lstrip("."), item, known.get(key, ""))
    elif isinstance(value, list):
        for item in value:
            yield from _nothing(name, item, "")


_UNKNOWN = (
    re.compile(r"unrecognized arguments: -*(?P<option>[^\s=]+)", re.IGNORECASE),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<option>[^']+)'"),
    re.compile(r"Option '(?P<option>[^']+)' is not accepted"),
)
"""How jsonargparse says that it does not know a setting."""
_MISFIT = re.compile(
    r"(?P<name>[\w.]+): (?:.*Subtypes: \[(?P<kinds>.*)\] Errors: .* Given|Expected an? (?P<kind>.*)\. Got) value: "
    "(?P<value>.*)"
)
"""How it says that a value is of no kind that its setting has."""
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "tuple": "a list",
          "dict": "NAME: VALUE of each"}  # fmt: skip
"""What it calls a kind of value -> what a person does."""


def _explain(message: str) -> str:
    """Return jsonargparse's message in our words, with the nearest known setting where one is unknown."""
    if denied := re.search(r"Importing '(.+?)' is not allowed", message):
        return f"a setting names a module, {denied[1]!r}; none is imported: write out the settings, NAME: VALUE"
    found = next(filter(None, (pattern.search(message) for pattern in _UNKNOWN)), None)
    if found is not None:
        unknown = ".".join(filter(None, (found.groupdict().get("group"), found["option"])))
        stray = re.match(r"unrecognized arguments: (?!-)(\S+)", message, re.IGNORECASE)
        return stray_word(stray[1]) if stray else f"unknown setting {unknown}; {_suggest(unknown)}"
    message = re.sub(r"Parser key \"([\w.]+)\"", r"\1", message)
    for name, cure in REMOVED.items():
        setting, _, value = name.partition("=")
        if value and message.startswith(setting) and message.endswith(f" {value}"):
            return f"{name} is gone; {cure}"
    message = re.sub(r"<class '(\w+)'>|typing\.(?=Literal)", r"\1", message)
    if misfit := _MISFIT.fullmatch(message):
        kinds, value = misfit["kinds"] or misfit["kind"], misfit["value"]
        choices = [", ".join(re.findall(r"'([^']*)'", kinds))] if "Literal" in kinds else []
        plain = re.sub(r"(Literal)?\[([^][]|\[[^][]*\])*\]|NoneType", "", kinds)
        near = difflib.get_close_matches(value, choices[0].split(", "), n=1) if choices else []
        choices += [_KINDS.get(kind, kind) for kind in filter(None, plain.split(", "))]
        return f"{misfit['name']}={value}: must be {' or '.join(choices)}" + (
            f"; did you mean {near[0]}?" if near else ""
        )
    return message


def stray_word(word: str) -> str:
    """Return what is wrong with a word that no flag takes."""
    files = f"several files are one value, '[FILE, {word}]', or '{{CLASS: FILE, CLASS: {word}}}' with a class each"
    return f"{word} belongs to no flag; {files if '.' in word else 'a setting is --NAME VALUE'}"


def _suggest(unknown: str) -> str:
    """Return what to write instead of a setting that is not known."""
    if unknown in REMOVED:
        return f"it is gone; {REMOVED[unknown]}"
    if unknown in RENAMED:
        return f"its name is {RENAMED[unknown]} now"
    last, keys = unknown.rpartition(".")[2], list(known_keys())
    start = last.partition("_")[0] + "_"
    if last in _NOT_HERE or (start in _NOT_HERE and last not in _ELSEWHERE):
        return _NOT_HERE.get(last, _NOT_HERE.get(start, ""))
    renamed = {old.rpartition(".")[2]: new for old, new in RENAMED.items()}
    near = [table[last] for table in (renamed, _ELSEWHERE) if last in table]
    lasts = {key.rpartition(".")[2]: key for key in keys} | ({} if "." in unknown else SHORT)
    near += [lasts[each] for each in difflib.get_close_matches(unknown, lasts, n=1)]  # of a short name
    near += difflib.get_close_matches(unknown, keys, n=1, cutoff=0.5)
    near += [key for key in keys if key.rpartition(".")[2] == last]
    return f"did you mean {near[0]}?" if near else "see esm-neuron train --help"


def known_keys(cls: type = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields, such as `optim.lr`."""
    for f in fields(cls):
        section = f.default_factory if isinstance(f.default_factory, type) else None
        if section is not None and is_dataclass(section):
            yield from known_keys(section, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


class _QuotingDumper(yaml.SafeDumper):
    """Quote text that begins like a number: PyYAML writes the label 1e3 bare, which would be read back as 1000.0."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    numeric = text[:1] in set("+-.0123456789")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if numeric else None)


_QuotingDumper.add_representer(str, _represent_text)


def dump(cfg: TrainConfig) -> str:
    """Return `cfg` as YAML with every field, in the order of the classes."""
    return yaml.dump(plain(cfg), Dumper=_QuotingDumper, sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """Return a configuration, a section or a value of one in the types of YAML and JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
