"""The flags and the help of a command, made from its function: parameters are flags, annotated with type and help.

Help is a screen: what the command does, its flags by groups, and the examples of its docstring. `--help all` adds every
setting that it takes.
"""

from __future__ import annotations

import difflib
import inspect
import re
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from textwrap import fill, wrap
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from esm_neuron.config import TrainConfig, settings
from esm_neuron.errors import ConfigError

RENAMED = {"data get": "python examples/datasets/get.py", "--relatives": "--homologs"}
"""Earlier name of a command or of a flag -> its name today."""
FIRST = {
    "data": {
        "data.train": ("FILE", "proteins: CSV, TSV, FASTA, JSONL, Parquet, a folder, hf://owner/name"),
        "data.label_column": ("COLUMN", "column with the label"),
        "data.split_column": ("COLUMN", "column that says train, valid or test; none: proteins are sampled"),
        "data.test_fraction": ("SHARE", "share of the proteins that is sampled for the test"),
    },
    "model": {
        "model.name": ("NAME", "hub id or folder of an ESM-2; mini: a small one in this package"),
        "adapter.kind": ("KIND", "what is trained: probe (of a file alone), lora, qlora, head, none (all weights)"),
        "task.name": ("NAME", "what is learned: multi_label, regression, residue_classification, masked_lm"),
    },
    "training": {
        "loop.epochs": ("NUMBER", "passes over the training proteins"),
        "loop.budget": ("TIME", "time for training in place of passes, such as 30m"),
        "optim.lr": ("NUMBER", "peak learning rate"),
        "checkpoint.resume": ("WORD", "auto: go on with the run that is in --output"),
    },
    "where": {
        "backend": ("NAME", "cpu, cuda (NVIDIA), xla (TPU) or neuron (trn1)"),
        "output": ("FOLDER", "folder for all that the run writes"),
    },
}
"""Group of the help of `train` -> the settings that most runs need, with their value in a word and what they mean."""
TRAIN_ALONE = ("loop.budget",)
"""Those of them that other commands with the settings of a run have no use for."""
WIDTH = 100
"""Columns of a line of help."""


def instead(unknown: str, known: Iterable[str]) -> str:
    """Return what an error about an unknown word suggests: its new name, or the nearest known one."""
    if unknown in RENAMED:
        return f"its name is {RENAMED[unknown]} now; "
    near = difflib.get_close_matches(unknown, known, n=1)
    return f"did you mean {near[0]}? " if near else ""


class CommandParser(ArgumentParser):
    """A parser that raises what argparse would print and exit with."""

    def error(self, message: str) -> NoReturn:
        if stray := re.match(r"unrecognized arguments: (?!-)(\S+)", message):
            raise ConfigError(f"{settings.stray_word(stray[1])}; see {self.prog} --help")
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        hint = instead(unknown[1], self._option_string_actions) if unknown else ""
        raise ConfigError(f"{message}; {hint}see {self.prog} --help")


def usage(commands: Mapping[str, Callable[..., int]]) -> str:
    """Return what `esm-neuron --help` shows: the commands, each in a line."""
    width = max(map(len, commands))
    told = {name: (command.__doc__ or "").partition("\n")[0] for name, command in commands.items()}  # `-OO` has none
    lines = [f"  {name:<{width}}  {text}" for name, text in told.items()]
    return "\n".join(["usage: esm-neuron COMMAND ...", "", *lines, "", "esm-neuron COMMAND --help tells more."])


class _Formatter(RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(text, width, break_on_hyphens=False)  # pseudo-perplexity is a word to type


def _formatter(prog: str) -> RawDescriptionHelpFormatter:
    return _Formatter(prog, max_help_position=28, width=WIDTH)


def command_parser(name: str, command: Callable[..., int], documented: bool = False) -> CommandParser:
    """Return the parser of a command, with an argument for each parameter of its function.

    A `documented` one also has the settings of a run that are needed most, for its help.
    """
    parameters, hints = inspect.signature(command).parameters, get_type_hints(command, include_extras=True)
    about, _, examples = (inspect.getdoc(command) or "").partition("\n\nExamples:\n")
    parser = CommandParser(
        prog=f"esm-neuron {name}",
        usage=_usage(name, parameters),
        description=fill(" ".join(about.split()), WIDTH),
        epilog=f"examples:\n{examples}\n\n{_about_settings(name, parameters)}".strip(),
        allow_abbrev=False,
        add_help=False,
        formatter_class=_formatter,
    )
    groups = {False: parser.add_argument_group("needed"), True: parser.add_argument_group("options")}
    if documented and "settings" in parameters and "file" not in parameters:
        _add_first(parser, () if name == "train" else TRAIN_ALONE)
    for key, parameter in parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        hint = hints[key]
        if get_origin(hint) is not Annotated:  # Python 3.10 adds `| None` where that is the default
            hint = get_args(hint)[0]
        kind, told = get_args(hint)
        kind = get_args(kind)[0] if get_origin(kind) in (Union, UnionType) else kind  # of `KIND | None`
        options: dict[str, Any] = {"help": told}
        if kind is bool:
            options["action"] = "store_true"
        elif get_origin(kind) is Literal:
            options |= {"choices": get_args(kind), "help": f"{', '.join(get_args(kind))}: {told}", "metavar": "WORD"}
        else:
            options |= {"type": kind, "metavar": _value(kind, told)}
        if get_origin(kind) is list:
            options |= {"type": get_args(kind)[0], "nargs": "+"}
        if parameter.kind is not parameter.KEYWORD_ONLY:
            groups[False].add_argument(key, **options | {"metavar": key.upper()})
            continue
        needed = parameter.default is parameter.empty
        if needed:
            options["required"] = True
        elif parameter.default not in (None, False):
            options |= {"default": parameter.default, "help": f"{options['help']}; default: %(default)s"}
        flag = f"--{key.rstrip('_')}"
        own = groups[not needed].add_argument(flag, dest=key, **options)
        if (hyphened := flag.replace("_", "-")) != flag:  # both are read, one is shown
            parser._option_string_actions[hyphened] = own
    return parser


def _value(kind: type, told: str) -> str:
    """Return the word for what a flag takes, by its type and the first word of its meaning."""
    named = {"folder": "FOLDER", "time": "TIME"}.get(told.split()[0])
    return named or {Path: "FILE", int: "N", float: "NUMBER"}.get(kind, "NAME")


def _usage(name: str, parameters: Any) -> str:
    needed = [
        f"--{key} ..." if each.kind is each.KEYWORD_ONLY else key.upper()
        for key, each in parameters.items()
        if each.default is each.empty and each.kind is not each.VAR_POSITIONAL
    ]
    run = ["[FILE]", "[--config FILE]"] if "settings" in parameters and "file" not in parameters else []
    free = any(each.kind is each.KEYWORD_ONLY and each.default is not each.empty for each in parameters.values())
    more = ["[--SETTING VALUE ...]"] if {"settings", "overrides"} & set(parameters) else []
    return " ".join([f"esm-neuron {name}", *run, *needed, *(["[options]"] if free and not run else []), *more])


def _about_settings(name: str, parameters: Any) -> str:
    """Return where the help leads on."""
    if not {"settings", "overrides"} & set(parameters):
        return ""
    text = "A setting is a flag by its whole name (--optim.lr) or by its last part (--lr)."
    return f"{text}\nAll of them: esm-neuron {name} --help all"


def _add_first(parser: CommandParser, without: Sequence[str]) -> None:
    """Add the settings that most runs need, `without` some."""
    lasts = Counter(name.rpartition(".")[2] for name in settings.known_keys())
    short = {whole: name for name, whole in settings.SHORT.items()}
    for title, rows in FIRST.items():
        group = parser.add_argument_group(title)
        for name, (value, told) in ((name, row) for name, row in rows.items() if name not in without):
            last = name.rpartition(".")[2]
            flag = short.get(name, last if lasts[last] == 1 else name)
            default = attrgetter(name)(TrainConfig())
            told = told if default is None else f"{told}; default: {default}"
            group.add_argument(f"--{flag}", metavar=value, help=told)


def help_of(
    name: str, command: Callable[..., int], words: Sequence[str], taken: Callable[[], Sequence[str]]
) -> str | None:
    """Return the help that the words after a command ask for, None where they do not.

    `taken` returns the settings that a command for trained models takes, see `settings.override`.
    """
    asked = next((place for place, word in enumerate(words) if word in ("-h", "--help")), None)
    if asked is None:
        return None
    parser, parameters = command_parser(name, command, documented=True), inspect.signature(command).parameters
    if list(words[asked + 1 : asked + 2]) != ["all"] or not {"settings", "overrides"} & set(parameters):
        return parser.format_help()
    whole = settings.make_parser()
    whole.prog, whole.usage = f"esm-neuron {name}", SUPPRESS
    if "settings" in parameters and "file" not in parameters:
        return f"{parser.format_help()}\nall settings:\n{whole.format_help()}"
    allowed, known = taken(), {action.dest: " ".join(str(action.help).split()) for action in whole._actions}
    names = [key for key in settings.known_keys() if {key, f"{key.partition('.')[0]}."} & set(allowed)]
    rows = [fill(f"--{key}: {known[key]}", WIDTH, initial_indent="  ", subsequent_indent="      ") for key in names]
    return "\n".join([parser.format_help(), "settings:", *rows]) + "\n"
