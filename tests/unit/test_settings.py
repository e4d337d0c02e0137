"""Settings: every field by file and by flag, back and forth, and errors that name the cure."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, Phase, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from esm_neuron.config import DataConfig, OptimConfig, TaskConfig, TrainConfig, settings
from esm_neuron.config.backends import BACKENDS
from esm_neuron.config.rules import PLACES, check_values, validate
from esm_neuron.config.settings import SHORT, dump, full_name, known_keys, make_parser, parse, read_config
from esm_neuron.errors import ConfigError
from esm_neuron.planning import instances
from esm_neuron.tasks import TASKS

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=12)
"""Any printable text: numbers, dates, quotes, colons and "null" are among what YAML could take for something else."""
TRICKY = st.sampled_from(["null", "true", "1e3", "0x1f", "2024-01-01", "a: b", "#x", "- y", "~", "''", "é ü", "no", ""])
NOTHING = re.compile(r"null|~|\s*(#.*)?", re.IGNORECASE)
"""Text that stands for None where a field may be None: no file can be called so."""


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if is_dataclass(kind):
        made = {name: values(hint) for name, hint in get_type_hints(kind).items()}
        if kind is TrainConfig:  # refuses a backend that is not in the table
            made["backend"] = st.sampled_from(list(BACKENDS))
        return st.builds(kind, **made)
    parts = get_args(kind)
    if kind is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if kind in (int, bool):
        return {int: st.integers(-(2**40), 2**40), bool: st.booleans()}[kind]
    if kind is str:
        return WORDS | TRICKY
    if kind is type(None):
        return st.none()
    if get_origin(kind) is dict:
        return st.dictionaries(WORDS, values(parts[1]), max_size=2)
    if get_origin(kind) is list or parts[-1:] == (...,):
        many = st.lists(values(parts[0]), max_size=3)
        return many.map(tuple) if get_origin(kind) is tuple else many
    if get_origin(kind) is tuple:
        return st.tuples(*map(values, parts))
    if all(isinstance(part, str) for part in parts):
        return st.sampled_from(parts)
    return st.one_of(*map(values, parts)).filter(lambda v: not isinstance(v, str) or not NOTHING.fullmatch(v))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings")


def written(folder: Path, text: str) -> str:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@hypothesis_settings(
    max_examples=12, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(cfg=values(TrainConfig))
def test_what_is_dumped_reads_back_as_itself(folder: Path, cfg: TrainConfig) -> None:
    assume(not any(str(attrgetter(place)(cfg)).startswith("~") for place in PLACES))  # read as the home folder
    assert read_config(Path(written(folder, dump(cfg)))) == cfg


def test_nothing_given_is_the_defaults() -> None:
    assert parse([]) == TrainConfig()


def test_flags_overrule_the_file_before_them(folder: Path) -> None:
    path = written(folder, "seed: 1\noptim: {lr: 0.5, betas: [0.8, 0.9]}\ntask: {labels: [x, y]}\n")
    expected = TrainConfig(seed=1, optim=OptimConfig(lr=0.25, betas=(0.8, 0.9)), task=TaskConfig(labels=("x", "y")))
    assert parse(["--config", path, "--optim.lr", "0.25"]) == expected
    assert parse([f"--config={path}", "--optim.lr=0.25"]) == expected


@pytest.mark.parametrize(("word", "value"), [("True", True), ("False", False), ("true", True), ("false", False)])
def test_booleans_as_sagemaker_writes_them(word: str, value: bool) -> None:
    assert parse(["--data.packing", word]).data.packing is value


def test_lists_and_mappings_as_flags() -> None:
    cfg = parse(["--task.labels", '["a","b"]', "--data.keep", '{"kingdom": ["Fungi"]}', "--optim.betas", "[0.8,0.9]"])
    assert cfg.task.labels == ("a", "b")
    assert cfg.data == replace(DataConfig(), keep={"kingdom": ["Fungi"]})
    assert cfg.optim.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("text", "unknown", "near"),
    [
        ("optim: {weight_deca: 1}", "optim.weight_deca", "optim.weight_decay"),
        ("adaptor: {r: 4}", "adaptor.r", "adapter.r"),
        ("sed: 4", "sed", "seed"),
    ],
)
def test_an_unknown_key_in_a_file_is_named_with_the_nearest(folder: Path, text: str, unknown: str, near: str) -> None:
    message = refusal("--config", written(folder, text))
    assert f"unknown setting {unknown};" in message
    assert f"did you mean {near}?" in message


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--optim.weight_deca", "optim.weight_decay"),
        ("--adapter.rank_", "adapter.r"),
        ("--lrr", "optim.lr"),
        ("--loop.epoch", "loop.epochs"),
        ("--max_residue", "data.max_residues"),
        ("--optim.learning_rate", "optim.lr"),
        ("--model_id", "model.name"),
        ("--lable", "data.label_column"),
        ("--steps", "loop.max_steps"),
        ("--per_device_eval_batch_size", "loop.eval_packs_per_device"),
        ("--batch_size", "loop.packs_per_step"),
    ],
)
def test_an_unknown_flag_is_named_with_the_nearest(flag: str, near: str) -> None:
    for argv in ([flag, "1"], [f"{flag}=1"]):
        message = refusal(*argv)
        assert f"unknown setting {flag.strip('-')};" in message
        assert f"did you mean {near}?" in message


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--fp16", "mixed precision here is bf16: loop.precision=bf16"),
        ("--gradient_accumulation_steps", "it follows from loop.packs_per_step"),
        ("--hub_strategy", "upload the run when it is done: esm-neuron export"),
        ("--dataloader_num_workers", "there is nothing to set"),
    ],
)
def test_names_of_other_trainers_that_no_setting_has_are_answered(flag: str, instead: str) -> None:
    assert f"unknown setting {flag.strip('-')}; " in refusal(flag, "1") and instead in refusal(flag, "1")


def test_every_name_of_another_trainer_points_to_a_setting() -> None:
    assert set(settings._ELSEWHERE.values()) <= set(settings.known_keys())


@pytest.mark.parametrize(
    ("old", "cure"),
    [
        ("data.row_tokens", "its name is data.pack_tokens now"),
        ("data.relatives", "its name is data.homologs now"),
        ("loop.rows_per_step", "its name is loop.packs_per_step now"),
        ("loop.rows_per_device", "its name is loop.packs_per_device now"),
        ("loop.eval_rows_per_device", "its name is loop.eval_packs_per_device now"),
        ("log.answers", "its name is log.predictions now"),
        ("row_tokens", "did you mean data.pack_tokens?"),
        ("train.relatives", "did you mean data.homologs?"),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(folder: Path, old: str, cure: str) -> None:
    section, _, name = old.rpartition(".")
    text = f"{section}: {{{name}: 1}}" if section else f"{name}: 1"
    assert refusal(f"--{old}=1") == f"unknown setting {old}; {cure}"
    said = refusal("--config", written(folder, text))
    assert said == f"unknown setting {old}; {cure}" or section == "train"


@pytest.mark.parametrize("old", settings.REMOVED)
def test_what_was_removed_says_what_to_do_instead(folder: Path, old: str) -> None:
    setting, _, value = old.partition("=")
    section, name = setting.split(".")
    for argv in ([f"--{setting}={value or 2}"], ["--config", written(folder, f"{section}: {{{name}: {value or 2}}}")]):
        assert refusal(*argv).endswith(settings.REMOVED[old])


@pytest.mark.parametrize("new", settings.RENAMED.values())
def test_new_names_are_settings(new: str) -> None:
    assert new in known_keys()


def test_a_key_that_comes_twice_is_named_with_its_line(folder: Path) -> None:
    path = written(folder, "optim:\n  lr: 1\n  eps: 1\n  lr: 2\n")
    message = refusal("--config", path)
    assert f"{path}:4" in message
    assert "'lr'" in message


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("--optim.lr", "fast"),
        ("--seed", "1.5"),
        ("--data.packing", "maybe"),
        ("--backend", "tpu"),
        ("--optim.betas", "[0.9]"),
        ("--data.keep", "[1]"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(folder: Path, flag: str, word: str) -> None:
    key = flag.strip("-")
    by_flag = refusal(flag, word)
    assert key in by_flag
    assert word.strip("[]") in by_flag
    section, _, leaf = key.rpartition(".")
    text = f"{section}: {{{leaf}: {word}}}" if section else f"{leaf}: {word}"
    by_file = refusal("--config", written(folder, text))
    assert leaf in by_file
    assert word.strip("[]") in by_file


def test_windows_must_overlap_by_less_than_their_length_and_other_cuts_need_no_overlap() -> None:
    short = DataConfig(max_residues=12, window_overlap=12)
    check_values(TrainConfig(data=short))
    with pytest.raises(ConfigError, match=r"data.window_overlap=12 must be 0 to 11 \(less than data.max_residues\)"):
        check_values(TrainConfig(data=replace(short, long_sequences="window")))


def test_a_number_too_large_for_a_float_is_refused(folder: Path) -> None:
    many = "1" + "0" * 400
    assert "too large" in refusal("--optim.lr", many)
    assert "too large" in refusal("--config", written(folder, f"optim: {{lr: {many}}}"))
    own = Path(instances.__file__).with_name("instances.yaml").read_text()
    prices = written(folder, own.replace("fp32: 23.75", f"fp32: {many}"))
    with pytest.raises(ConfigError, match="too large"):
        instances.read_prices(Path(prices))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("optim: {lr: [", "not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("- 1\n- 2", "holds list"),
        ("# nothing\n", "holds nothing"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(folder: Path, text: str, part: str) -> None:
    path = written(folder, text)
    message = refusal("--config", path)
    assert path in message
    assert part in message


def test_a_file_that_is_not_utf8_is_refused(folder: Path) -> None:
    path = folder / "latin.yaml"
    path.write_bytes(b"output: caf\xe9\n")
    assert str(path) in refusal("--config", str(path))


def test_a_missing_file_is_named(folder: Path) -> None:
    assert str(folder / "none.yaml") in refusal("--config", str(folder / "none.yaml"))
    assert refusal("--config", "\r").startswith("--config '\\r': cannot be read")


def test_a_number_like_label_stays_text(folder: Path) -> None:
    cfg = TrainConfig(task=TaskConfig(labels=("1e3", "3.10", "-2E5", "true", "null", "x")))
    assert read_config(Path(written(folder, dump(cfg)))) == cfg


def test_help_lists_every_field_with_its_meaning() -> None:
    text = " ".join(make_parser().format_help().split())
    for key in known_keys():
        assert re.search(rf"--{re.escape(key)}[ =]", text), key
        first = " ".join(docstring(key).split())[:40]
        assert first in text, key


def docstring(key: str) -> str:
    """The text under a field in config.py."""
    cls: Any = TrainConfig
    *sections, leaf = key.split(".")
    for section in sections:
        cls = get_type_hints(cls)[section]
    found = re.search(rf'\n    {leaf}: .*?\n    """(.*?)"""', inspect.getsource(cls), re.DOTALL)
    assert found is not None, key
    return found[1]


def test_known_keys_are_all_fields() -> None:
    keys = list(known_keys())
    sections = [f.name for f in fields(TrainConfig) if is_dataclass(get_type_hints(TrainConfig)[f.name])]
    counted = sum(len(fields(get_type_hints(TrainConfig)[name])) for name in sections)
    assert len(keys) == len(set(keys)) == counted + len(fields(TrainConfig)) - len(sections)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--resume auto", "checkpoint.resume", "auto"),
        ("--resume=auto", "checkpoint.resume", "auto"),
        ("--lr 3e-4", "optim.lr", 3e-4),
        ("--label loc", "data.label_column", "loc"),
        ("--label-column=loc", "data.label_column", "loc"),
        ("--data.label-column loc", "data.label_column", "loc"),
        ("--model mini", "model.name", "mini"),
        ("--adapter head", "adapter.kind", "head"),
        ("--adapter_kind head", "adapter.kind", "head"),
        ("--task regression", "task.name", "regression"),
        ("--data my.csv", "data.train", "my.csv"),
        ("my.csv --seed 3", "data.train", "my.csv"),
    ],
)
def test_a_setting_has_a_short_form(words: str, key: str, value: object) -> None:
    assert attrgetter(key)(parse(words.split())) == value


def test_short_names_that_several_settings_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^kind may be adapter.kind or optim.kind; write which one$"):
        parse(["--kind", "lora"])
    with pytest.raises(ConfigError, match=r"^unknown setting lrr; did you mean optim.lr\?$"):
        parse(["--lrr", "1"])


def test_every_short_name_leads_to_the_setting_that_ends_so() -> None:
    for key in known_keys():
        last = key.rpartition(".")[2]
        ends = [other for other in known_keys() if other.rpartition(".")[2] == last]
        assert full_name(key) == key and full_name(key.replace(".", "_")) == key
        if len(ends) == 1 and last not in SHORT:
            assert full_name(last) == key


def test_print_config_prints_a_file_that_reads_back(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--optim.lr", "0.25", "--task.class_weights", '{"a": 2.0, "b": 1.0}', "--print_config"])
    assert ended.value.code in (0, None)
    printed = capsys.readouterr().out
    expected = TrainConfig(optim=OptimConfig(lr=0.25), task=TaskConfig(class_weights={"a": 2.0, "b": 1.0}))
    assert read_config(Path(written(folder, printed))) == expected


CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_configuration_is_valid(path: Path) -> None:
    cfg = read_config(path)
    own = cfg.data.train is None  # for the user's file
    validate(replace(cfg, data=replace(cfg.data, train="my.csv")) if own else cfg)


def test_every_task_has_an_example_configuration() -> None:
    assert {read_config(path).task.name for path in CONFIGS} == set(TASKS)


def test_a_home_folder_is_meant_in_files_and_flags(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = "output: ~/run\ndata: {train: ~/x.csv, cache: ~/c, label_column: ~x}\nmodel: {name: ~/esm}\n"
    cfg = parse(["--config", written(folder, text), "--data.valid=~/v.csv"])
    assert (cfg.output, cfg.data.train, cfg.data.valid) == ("/home/me/run", "/home/me/x.csv", "/home/me/v.csv")
    assert (cfg.data.cache, cfg.data.test, cfg.data.label_column) == ("/home/me/c", None, "~x")


@pytest.mark.parametrize("name", ["output", "seed", "data", "optim", "optim.lr", "data.label_column"])
def test_a_setting_without_a_value_is_refused(tmp_path: Path, name: str) -> None:
    """A value that a cut file or an editor took away: jsonargparse takes null for any type."""
    section, _, key = name.rpartition(".")
    (tmp_path / "c.yaml").write_text(f"{section}:\n  {key}:\n" if section else f"{key}:\n")
    with pytest.raises(ConfigError, match=name):
        read_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapter", "lorra"], "adapter.kind=lorra: must be none, head, lora, qlora, probe; did you mean lora?"),
        (["--precision", "fp16"], "loop.precision=fp16: must be fp32, bf16"),
        (["--layers", "al"], "model.layers=al: must be all, mix, concat, auto or a whole number; did you mean all?"),
        (["--class_weights", "balancd"], "task.class_weights=balancd: must be none, balanced, auto or NAME: VALUE of"),
        (["--epochs", "many"], "loop.epochs=many: must be a number"),
        (["--max_steps", "few"], "loop.max_steps=few: must be a whole number"),
        (
            ["b.csv"],
            "b.csv belongs to no flag; several files are one value, '[FILE, b.csv]', or '{CLASS: FILE, CLASS: b",
        ),
        (["now"], "now belongs to no flag; a setting is --NAME VALUE"),
    ],
)
def test_a_wrong_value_is_told_in_plain_words(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["a.csv", *words])
    assert str(caught.value).startswith(said) and "Literal" not in str(caught.value)


def test_a_wrong_value_of_a_file_is_told_in_plain_words(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("adapter: {kind: lorra}\n")
    with pytest.raises(ConfigError, match=r"adapter.kind=lorra: must be none, .*; did you mean lora\?$"):
        parse(["--config", str(tmp_path / "a.yaml")])
