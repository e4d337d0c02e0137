"""The Python API, with strings, lists and data frames in and data frames out:

    import esm_neuron as en

    run = en.train("my.csv", label="location")
    run.metrics
    run.predict(["MKTAYIAKQRQISFVKSHFSRQ"])
    en.embed(["MKTAYIAKQRQISFVKSHFSRQ"], model="facebook/esm2_t6_8M_UR50D")

Settings are keywords, by their whole name with `_` for the point or by a short one: `optim_lr=3e-4`, `lr=3e-4`. What is
wrong with a setting or a file is an `EsmNeuronError` of one line.

Proteins are given as a path or an address, a data frame with the columns of a file (its index names the proteins where
it has no id column), a list or a series of sequences, a mapping from names to sequences, or one sequence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeGuard, TypeVar, Union

import pyarrow as pa

from esm_neuron.config import DataConfig, TrainConfig, require, settings
from esm_neuron.config.deferred import module
from esm_neuron.config.threads import prepare
from esm_neuron.data.parquet import read_table, write_table
from esm_neuron.distributed import log_nothing
from esm_neuron.errors import ConfigError, EsmNeuronError
from esm_neuron.files import note, remove
from esm_neuron.redact import shown
from esm_neuron.run_dir import (
    CONFIG,
    FOLDS,
    METRICS,
    RESULT,
    load_predictions,
    predictions_name,
    read_log,
    read_result,
)
from esm_neuron.tasks import training_config

if TYPE_CHECKING:
    import pandas as pd

    from esm_neuron.inference.serving import Predictor
else:
    pd = module("pandas")

P = ParamSpec("P")
T = TypeVar("T")
Proteins = Union[str, Path, Sequence[str], Mapping[str, str], "pd.DataFrame", "pd.Series[str]"]
Data = Union[str, Path, Sequence["str | Path"], Mapping[str, "str | Path"], "pd.DataFrame"]
"""What is trained on: a path, several read as one, one per class, or a data frame."""
Log = Callable[[str], None]


def _public(function: Callable[P, T]) -> Callable[P, T]:
    """Let an error that a user can meet come from the user's own line, without the frames of this package."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        prepare()
        try:
            return function(*args, **kwargs)
        except EsmNeuronError as error:
            raise error.with_traceback(None) from None

    return call


def tell(line: str) -> None:
    """Print a line of progress."""
    print(shown(line), flush=True)


@_public
def train(
    data: Data | None = None,
    *,
    valid: Data | None = None,
    test: Data | None = None,
    config: str | Path | Mapping[str, Any] | TrainConfig | None = None,
    output: str | Path | None = None,
    log: Log = tell,
    **values: Any,
) -> Run:
    """Train an ESM-2 on proteins with labels, as `esm-neuron train` does: told of nothing but these, fit a probe.

    Args:
        data: training proteins: a path, a list of paths read as one, a path per class, or a data frame, which is kept
            in the output.
        valid: validation proteins; None: those of a split column, or sampled from the training proteins.
        test: test proteins; None: those of a split column, or sampled if `test_fraction` says so.
        config: YAML file, mapping of sections, or TrainConfig to begin with; the other arguments overrule it.
        output: folder to write; None: that of `config`, else a new one in `runs/`, named after the data.
        log: called with each line of progress.
        **values: settings, such as `label="location"`, `model="facebook/esm2_t12_35M_UR50D"`, `lr=3e-4`.
    """
    words = _config_words(config)
    given = any(word.startswith("--output=") for word in words) or isinstance(config, (str, Path))
    name = Path(data).stem if isinstance(data, (str, Path)) else "proteins"
    folder = Path(output) if output is not None else None if given else _new_folder(name)
    words += settings.to_words(values) + ([] if folder is None else [f"--output={folder}"])
    cfg = settings.parse(words)
    sources = {"train": data, "valid": valid, "test": test}
    frames = {key: _frame_table(value, cfg.data.id_column) for key, value in sources.items() if _is_frame(value)}
    if frames:
        out = Path(cfg.output)
        require(
            not (out / CONFIG).exists() or cfg.checkpoint.resume == "auto",
            f"output={out} already holds a run; go on with resume='auto', or name another output",
        )
        new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        note(out, [f"{key}.parquet" for key in frames])
        for key, table in frames.items():
            write_table(out / f"{key}.parquet", table)
            sources[key] = str(out / f"{key}.parquet")
    named = {f"data.{key}": _source(value) for key, value in sources.items() if value is not None}
    try:
        cfg = training_config(words + settings.to_words(named), log)

        from esm_neuron.training.run import train as run_training

        outcome = run_training(cfg, log)
    except EsmNeuronError as error:
        if frames and not (out / CONFIG).exists():  # it did not begin: nothing of it is left, and no path to tell
            text = str(error)
            for key in frames:
                text = text.replace(str(out / f"{key}.parquet"), f"the data frame of {key}")
                remove(out / f"{key}.parquet")
            error.args = (text, *error.args[1:])
            if new:
                remove(out)
        raise
    if outcome.stopped_by:
        log(f"stopped by {outcome.stopped_by}; the state is saved, go on with resume='auto', output={cfg.output!r}")
    return Run(cfg.output)


@_public
def load(run: str | Path, *, backend: str | None = None, **values: Any) -> Run:
    """Return a trained model, which is read when it first predicts.

    Args:
        run: output folder of a training run, or a folder with a trained model by transformers or PEFT.
        backend: where it predicts; None: where it was trained.
        **values: settings that a trained model may change, such as `sequence_column="seq"`.
    """
    found = Run(run, backend=backend, **values)
    found.check()
    return found


@_public
def embed(
    proteins: Proteins,
    model: str | Path,
    *,
    pooling: Literal["mean", "cls", "residue"] = "mean",
    backend: str | None = None,
    log: Log = log_nothing,
    **values: Any,
) -> pd.DataFrame:
    """Return one row of numbers per protein, named by its id; or per residue, named by id and number from 1.

    Args:
        proteins: see above.
        model: output folder of a training run, a Hugging Face folder of ESM-2, or a hub id.
        pooling: `mean` over the residues, the state of `cls`, or each `residue` (NaN for those that were cut off).
        backend: where to run.
        log: called with lines about what was read, left out or cut.
        **values: settings, such as `max_residues=2000`.
    """
    from esm_neuron.inference.embed import embedding
    from esm_neuron.inference.predict import predict_file

    work = embedding(str(model), pooling, backend, settings.to_words(values))
    with _as_file(proteins, work.cfg.data) as source, tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "embeddings.parquet"
        predict_file(work, source, target, False, log)
        table = read_table(target)
    ids, vectors = table["id"].to_pylist(), table["embedding"].combine_chunks()
    if pooling != "residue":
        return pd.DataFrame(list(vectors.to_numpy(zero_copy_only=False)), index=pd.Index(ids, name="id"))
    lengths = vectors.value_lengths().to_pylist()
    rows = [(name, number) for name, length in zip(ids, lengths, strict=True) for number in range(1, length + 1)]
    index = pd.MultiIndex.from_tuples(rows, names=["id", "residue"])
    return pd.DataFrame(list(vectors.flatten().to_numpy(zero_copy_only=False)), index=index)


@_public
def score(
    variants: Proteins,
    model: str | Path,
    *,
    wild_type: Proteins | None = None,
    method: Literal["wild-type-marginal", "masked-marginal", "single-site-marginal", "pseudo-perplexity"] = (
        "masked-marginal"
    ),
    first_residue: int = 1,
    sequence_column: str | None = None,
    backend: str | None = None,
    **values: Any,
) -> pd.DataFrame:
    """Return the table of variants with a score for each, by the language-model head and without training.

    Args:
        variants: substitutions such as `A42G:L50P` as a list, or a file or data frame with the column `variant`.
        model: as for `embed`.
        wild_type: the protein that variants are named after.
        method: see `esm-neuron score --help`.
        first_residue: number of the wild type's first residue.
        sequence_column: column of whole sequences, read instead of `variant`.
        backend: where to run.
        **values: settings, as for `embed`.
    """
    from esm_neuron.inference.load import find_model
    from esm_neuron.inference.score import score as run_scoring
    from esm_neuron.inference.variants import VariantColumns

    words = settings.to_words(values)
    given, data = DataConfig(sequence_column="variant"), find_model(str(model), backend, words, "score").cfg.data
    with (
        _as_file(variants, given) as source,
        _as_file(wild_type, data) as wild,
        tempfile.TemporaryDirectory() as folder,
    ):
        target = Path(folder) / "scores.parquet"
        run_scoring(
            str(model), source, target, method, wild_type=wild if wild_type is not None else None,
            columns=VariantColumns("variant", sequence_column, None), first_residue=first_residue, backend=backend,
            settings=words,
        )  # fmt: skip
        return pd.DataFrame(read_table(target).to_pandas())


class Run:
    """A trained model, and what its training run has left: `train` and `load` return one."""

    def __init__(self, folder: str | Path, *, backend: str | None = None, **values: Any) -> None:
        self.folder = Path(folder).expanduser()
        self._backend, self._words = backend, settings.to_words(values)

    def __repr__(self) -> str:
        if not (self.folder / RESULT).is_file():
            return f"Run({str(self.folder)!r})"
        split = next((name for name in ("test", "valid") if self.result.get(name)), None)
        metric = self.result["metric"]
        value = self.result[split].get(metric) if split else None
        said = "" if value is None else f", {split} {metric} {value:.3f}"
        return f"Run({str(self.folder)!r}: {self.result['task']} by {self.result['model']}{said})"

    def check(self) -> None:
        """Raise EsmNeuronError where there is no model that predicts."""
        from esm_neuron.inference.load import find_members

        find_members(self.folder, self._backend, self._words, "load")

    @cached_property
    def result(self) -> dict[str, Any]:
        """What result.json holds: every metric with its interval, baselines, verdicts, calibration."""
        cure = "its training has not finished (go on with resume='auto'), or it was trained elsewhere"
        if (self.folder / FOLDS).is_file():
            cure = f"it is a cross-validation, whose means are in {FOLDS}; load a fold, {self.folder / 'fold-1'}"
        require((self.folder / RESULT).is_file(), f"{self.folder}: no {RESULT} there; {cure}")
        return read_result(self.folder)

    @property
    def config(self) -> TrainConfig:
        """The settings of the run."""
        return settings.read_config(self.folder / CONFIG)

    @property
    def metrics(self) -> pd.DataFrame:
        """The metrics of the test and validation proteins: a row for the model and for each baseline, `_low` and
        `_high` for 95 % intervals."""
        rows: dict[tuple[str, str], dict[str, float]] = {}
        for split in ("test", "valid"):
            if self.result.get(split):
                beside = (self.result.get("baselines") or {}).get(split, {})
                for name, scores in {"this model": self.result[split], **beside}.items():
                    rows[split, name] = dict(_numbers(scores))
        index = pd.MultiIndex.from_tuples(list(rows), names=["split", "model"])
        return pd.DataFrame(list(rows.values()), index=index)

    @property
    def verdict(self) -> str:
        """The model beside its best baseline on the test (else validation) proteins, in a sentence; "" without any."""
        found = self.result.get("verdicts") or {}
        return next((str(found[split]["text"]) for split in ("test", "valid") if split in found), "")

    @property
    def log(self) -> pd.DataFrame:
        """The loss and more of each logged step, and the metrics of each validation (`split` is `valid`)."""
        require((self.folder / METRICS).is_file(), f"{self.folder}: no {METRICS} there; it is no training run's folder")
        return pd.DataFrame(read_log(self.folder))

    def held_out(self, split: Literal["test", "valid"] = "test") -> pd.DataFrame:
        """Return the predictions that the run has kept for its held-out proteins, beside their targets."""
        table = load_predictions(self.folder / predictions_name(split))
        if table is None:
            raise ConfigError(f"{self.folder}: no {predictions_name(split)} there; train with log.predictions=true")
        return pd.DataFrame(table.to_pandas())

    @_public
    def predict(self, proteins: Proteins, *, coverage: float | None = None) -> pd.DataFrame:
        """Return what `esm-neuron predict` writes: a row per protein, `id` first.

        With `coverage`, such as 0.9, also the classes or the range that hold the truth that often.
        """
        with _as_file(proteins, self._predictor.cfg.data) as source:
            return pd.DataFrame(self._predictor.table(source, coverage).to_pandas())

    @_public
    def embed(self, proteins: Proteins, **options: Any) -> pd.DataFrame:
        """Return embeddings by the trained encoder, see `embed`."""
        given = self._given("data.", "loop.", "model.", "parallel.")
        return embed(proteins, self.folder, backend=self._backend, **{**given, **options})

    @_public
    def evaluate(self, proteins: Proteins, **values: Any) -> dict[str, Any]:
        """Return the metrics of proteins with labels, with 95 % intervals; `values` are settings such as `label`."""
        from esm_neuron.inference.evaluate import evaluate
        from esm_neuron.inference.load import find_members

        words = [*self._words, *settings.to_words(values)]
        [first, *_], _ = find_members(self.folder, self._backend, words, "evaluate")
        with _as_file(proteins, first.cfg.data) as source:
            return evaluate(self.folder, source, None, self._backend, log_nothing, words)

    @_public
    def export(
        self, target: str | Path, *, push_to_hub: str | None = None, public: bool = False, **values: Any
    ) -> Path:
        """Write a plain Hugging Face folder with the adapter merged into its base; return it.

        `push_to_hub` names a repository to upload it to, OWNER/NAME, private where it is new unless `public`. `values`
        are settings of a model that another program trained, such as `base`, of an adapter by PEFT.
        """
        from esm_neuron.inference.export import export

        words = settings.to_words({**self._given("model.", "task."), **values})
        export(self.folder, Path(target), words, push_to_hub, public)
        return Path(target)

    @_public
    def report(self) -> Path:
        """Write the run as one HTML page; return it."""
        from esm_neuron.reports import write_report

        return write_report(self.folder)

    def _given(self, *sections: str) -> dict[str, str]:
        """Return the settings of these sections that `load` was given, by their whole names."""
        named = (word[2:].partition("=") for word in settings.in_full(self._words))
        return {name: value for name, _, value in named if name.startswith(sections)}

    @cached_property
    def _predictor(self) -> Predictor:
        from esm_neuron.inference.serving import load

        return load(self.folder, self._backend, self._words)


@_public
def predict(proteins: Proteins, model: str | Path, *, coverage: float | None = None, **values: Any) -> pd.DataFrame:
    """Return the predictions of a trained model, see `Run.predict`; `load` it once where you predict often."""
    return load(model, **values).predict(proteins, coverage=coverage)


@_public
def evaluate(proteins: Proteins, model: str | Path, *, backend: str | None = None, **values: Any) -> dict[str, Any]:
    """Return the metrics of a trained model on proteins with labels, see `Run.evaluate`."""
    return Run(model, backend=backend).evaluate(proteins, **values)


@_public
def export(model: str | Path, target: str | Path, **values: Any) -> Path:
    """Write a trained model as a plain Hugging Face folder, see `Run.export`."""
    return Run(model).export(target, **values)


def _numbers(scores: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the metrics of an evaluation, and the ends of their intervals."""
    for name, value in scores.items():
        if isinstance(value, (int, float)):
            yield name, value
        elif name.endswith("_ci") and value is not None:
            yield f"{name[:-3]}_low", value[0]
            yield f"{name[:-3]}_high", value[1]


def _config_words(config: str | Path | Mapping[str, Any] | TrainConfig | None) -> list[str]:
    if config is None:
        return []
    if isinstance(config, (str, Path)):
        return [f"--config={config}"]
    return settings.to_words(settings.plain(config))


def _new_folder(name: str) -> Path:
    """Return a folder in `runs/` that is not there yet."""
    numbers = iter(range(2, 1_000_000))
    folder = Path("runs") / name
    while folder.exists():
        folder = Path("runs") / f"{name}-{next(numbers)}"
    return folder


def _source(value: Any) -> str:
    """Return paths as `data.train` has them: one, a list, or one per class."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {path}' for name, path in value.items())}}}"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)


def _is_frame(value: Any) -> TypeGuard[pd.DataFrame]:
    return hasattr(value, "columns") and hasattr(value, "to_dict")


def _frame_table(frame: pd.DataFrame, name: str) -> pa.Table:
    """Return a data frame as a table; its index becomes the column of ids where that is missing and it is no count."""
    if name not in frame.columns and not isinstance(frame.index, pd.RangeIndex):
        frame = frame.rename_axis(name).reset_index()
    return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata()


def _in_memory(proteins: Proteins | None, data: DataConfig) -> pa.Table | None:
    """Return proteins that are no file as a table with the columns that `data` names; None for a path."""
    if isinstance(proteins, Path) or proteins is None:
        return None
    if isinstance(proteins, str):
        if not proteins.removesuffix("*").isalpha() or Path(proteins).exists():
            return None
        proteins = [proteins]
    if _is_frame(proteins):
        return _frame_table(proteins, data.id_column)
    named = hasattr(proteins, "items")  # a mapping or a series
    rows = list(proteins.items()) if named else list(enumerate(proteins))  # type: ignore[union-attr]
    require(bool(rows), "no proteins were given; give at least one")
    wrong = next((value for _, value in rows if not isinstance(value, str)), None)
    require(wrong is None, f"a sequence is {wrong!r:.60}, a {type(wrong).__name__}; give text, such as 'MKTAYIAK'")
    ids, sequences = [str(key) for key, _ in rows], [value for _, value in rows]
    return pa.table({data.id_column: ids, data.sequence_column: sequences})


@contextmanager
def _as_file(proteins: Proteins | None, data: DataConfig) -> Iterator[Path]:
    """Yield a file with proteins; where it is one of ours, errors call it `the input`."""
    table = _in_memory(proteins, data)
    if table is None:
        yield Path(str(proteins)).expanduser() if "://" not in str(proteins) else Path(str(proteins))
        return
    with tempfile.TemporaryDirectory(prefix="esm-neuron-") as folder:
        path = Path(folder) / "input.parquet"
        write_table(path, table)
        try:
            yield path
        except EsmNeuronError as error:
            error.args = (str(error).replace(str(path), "the input"), *error.args[1:])
            raise
