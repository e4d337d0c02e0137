"""Score variants without training, by the likelihoods that the language model gives to residues.

Formulas: Meier et al. 2021, "Language models enable zero-shot prediction of the effects of mutations on protein
function" (bioRxiv 2021.07.09.450648), with natural logarithms of a softmax over the 33 tokens. M are the substituted
residues of a variant, x is the wild type:

    wild-type-marginal   sum over i in M of log p(x_i = mutant | x) - log p(x_i = wild | x)
    masked-marginal      the same given x without M: all of M masked together
    single-site-marginal the same given x without i alone, for each i of M: as ProteinGym scores ESM
    pseudo-perplexity    exp(-1/L sum over all i of log p(y_i | y without i)) of the variant's own sequence y, of L
                         residues (Salazar et al. 2020, arXiv:1910.14659); low means likely
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from esm_neuron.backends import opened_backend
from esm_neuron.config import BackendName, TaskConfig, TrainConfig, require
from esm_neuron.config.deferred import module
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.families import enough
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.tokenizer import MASK, decode, encode_many
from esm_neuron.distributed import is_alone, log_nothing, raise_on_any_rank
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.inference.folders import LANGUAGE, find_head
from esm_neuron.inference.load import ModelSpec, find_model
from esm_neuron.inference.predict import piece_tokens, predict_table, write_rejected
from esm_neuron.inference.spool import stamp_of
from esm_neuron.inference.stream import JOIN, Advance, Predictions, check_target, read_back, spooled, stream
from esm_neuron.inference.variants import Row, Variant, VariantColumns, VariantTable
from esm_neuron.metrics.regression import rank_correlation
from esm_neuron.models.adapter_folder import is_adapter
from esm_neuron.tasks.masked_lm import MaskedLM

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import functional as F

    from esm_neuron.backends.base import Backend
    from esm_neuron.training import evaluation
    from esm_neuron.training.evaluation import Evaluator
else:
    F, evaluation = module("torch.nn.functional"), module("esm_neuron.training.evaluation")

Method = Literal["wild-type-marginal", "masked-marginal", "single-site-marginal", "pseudo-perplexity"]

MOST_SETS = 200_000
"""Sets of sites whose log probabilities are kept for later pieces: about 100 MB."""

logger = logging.getLogger(__name__)


class Likelihood(MaskedLM):
    """The language model without training: inputs as they are given, log probabilities as predictions."""

    predictions_per_token = True

    def evaluation_target(self, table: ExampleTable, example: int) -> Target:
        """Return the sequence as it is, masks included."""
        tokens = table.sequence(example)
        return Target(tokens, tokens.astype(np.int64), np.zeros(len(tokens), np.float32))

    def predictions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Return log probabilities [R, L, 33], in nats."""
        return (F.log_softmax(logits.float(), dim=-1),)


@dataclass(frozen=True)
class Query:
    """A sequence with masks, and the residues whose likelihoods are wanted."""

    tokens: np.ndarray
    """uint8 [residues + 2]."""
    sites: np.ndarray
    """int64 [sites], residues from 0."""


RunModel = Callable[[Sequence[Query]], list[np.ndarray]]
"""Returns the log probabilities [sites, 33] for each query."""


def masked(tokens: np.ndarray, sites: Sequence[int]) -> Query:
    """Return a query for the residues `sites` of a protein, all masked together."""
    shown, places = tokens.copy(), np.asarray(sites, np.int64)
    # Sites count residues; position 0 is <cls>.
    shown[places + 1] = MASK
    return Query(shown, places)


def query_table(queries: Sequence[Query]) -> ExampleTable:
    """Return the queries as examples, one per record."""
    offsets = np.cumsum([0, *(len(query.tokens) for query in queries)])
    ids = [f"query {number}" for number in range(len(queries))]
    return ExampleTable.of(np.concatenate([query.tokens for query in queries]), offsets, ids)


def marginal(variant: Variant, log_p: np.ndarray) -> float:
    """Return the sum of log p(mutant) - log p(wild) over the substitutions, given [substitutions, 33]."""
    rows = np.arange(len(variant))
    mutant, wild = (
        encode_many(["".join(side)])[0][1:-1] for side in ([v.mutant for v in variant], [v.wild for v in variant])
    )
    return float((log_p[rows, mutant].astype(np.float64) - log_p[rows, wild]).sum())


class Scorer:
    """Score the rows of a table by one method."""

    def __init__(self, method: Method, wild_type: str | None) -> None:
        self.method = method
        self._wild = encode_many([wild_type or ""])[0]
        self._known: np.ndarray | None = None
        self._sites: dict[int, np.ndarray] = {}
        # Sites of the variants so far -> log probabilities: later pieces may have them too, and are not to ask again.
        self._sets: dict[tuple[int, ...], np.ndarray] = {}

    def __call__(self, rows: Sequence[Row], run_model: RunModel) -> list[float]:
        """Return one value per row."""
        if self.method == "pseudo-perplexity":
            return self._perplexities([row.sequence for row in rows], run_model)
        variants = [row.variant for row in rows]
        find = {"wild-type-marginal": self._by_wild_type, "single-site-marginal": self._by_site}
        log_p = find.get(self.method, self._by_masked)(variants, run_model)
        return [marginal(v, log_p[sites_of(v)]) if v else 0.0 for v in variants]

    def _by_wild_type(self, variants: Sequence[Variant], run_model: RunModel) -> dict[tuple[int, ...], np.ndarray]:
        if self._known is None:
            (self._known,) = run_model([Query(self._wild, np.arange(len(self._wild) - 2))])
        return {sites: self._known[list(sites)] for sites in map(sites_of, variants)}

    def _by_masked(self, variants: Sequence[Variant], run_model: RunModel) -> dict[tuple[int, ...], np.ndarray]:
        wanted = [sites for sites in dict.fromkeys(map(sites_of, variants)) if sites and sites not in self._sets]
        predictions = run_model([masked(self._wild, sites) for sites in wanted]) if wanted else []
        self._sets.update(zip(wanted, predictions, strict=True))
        needed = {sites: self._sets[sites] for sites in map(sites_of, variants) if sites}
        while len(self._sets) > MOST_SETS:
            self._sets.pop(next(iter(self._sets)))
        return needed

    def _by_site(self, variants: Sequence[Variant], run_model: RunModel) -> dict[tuple[int, ...], np.ndarray]:
        wanted = dict.fromkeys(site for variant in variants for site in sites_of(variant) if site not in self._sites)
        found = run_model([masked(self._wild, [site]) for site in wanted]) if wanted else []
        self._sites.update({site: log_p[0] for site, log_p in zip(wanted, found, strict=True)})
        return {sites: np.stack([self._sites[site] for site in sites]) for sites in map(sites_of, variants) if sites}

    def _perplexities(self, sequences: Sequence[str], run_model: RunModel) -> list[float]:
        tokens = [encode_many([sequence])[0] for sequence in sequences]
        predictions = iter(run_model([masked(each, [site]) for each in tokens for site in range(len(each) - 2)]))
        found = []
        for each in tokens:
            log_p = [float(next(predictions)[0, token]) for token in each[1:-1]]
            found.append(float(np.exp(-np.mean(log_p))))
        return found

    def cost(self, row: Row, seen: set[tuple[int, ...]]) -> int:
        """Return how many tokens the model gets for a row, given the sites of all earlier rows."""
        length = len(row.sequence)
        if self.method == "pseudo-perplexity":
            return length * (length + 2)
        known = self.method == "wild-type-marginal" or not row.variant or sites_of(row.variant) in seen
        passes = len(row.variant) if self.method == "single-site-marginal" else 1
        return 0 if known else passes * (length + 2)


def sites_of(variant: Variant) -> tuple[int, ...]:
    """Return the substituted residues, counted from 0."""
    return tuple(each.index for each in variant)


def score(
    model: str,
    source: Path,
    target: Path,
    method: Method = "masked-marginal",
    *,
    wild_type: Path | None = None,
    columns: VariantColumns | None = None,
    first_residue: int = 1,
    backend: BackendName | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    log: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Score every variant of a table, in its order, with the language-model head. Otherwise as `predict`.

    Args:
        model: output folder of a masked_lm run, a Hugging Face folder of ESM-2 with its LM head, or a hub id.
        target: CSV, TSV, JSONL or Parquet: `variant` or `sequence`, `measured` where a score column is named, and the
            method's value under its name with `_` for `-`.
        wild_type: file with the one protein that variants are named after.
        first_residue: number that the table gives to its first residue.

    Returns:
        `method`, `rows`, `left_out` where some rows cannot be scored, and where a score column is named `n` (rows with
        a value), `spearman` and `spearman_ci` between it and the method's value, the pseudo-perplexity negated.
    """
    check_target(target, JOIN, model, {"--input": source, "--wild-type": wild_type}, settings)
    columns = columns or VariantColumns()
    work = Scoring.of(model, method, wild_type, columns, first_residue, backend, settings)
    if is_alone():
        columns.check(source)
    if is_alone() and wild_type is not None:
        InputChunks(wild_type, work.cfg.data).check()
    with opened_backend(work.cfg) as backend_:
        work = raise_on_any_rank(backend_, lambda: work.read_wild_type(backend_.local_dp))
        log = log if backend_.topology.is_main else log_nothing
        stamp = stamp_of(str(source), [asdict(work.cfg.data), asdict(columns), work.options])
        with spooled(backend_, target, work.source(source), stamp, resume) as spool:
            rejected = spool.scanned.rejected
            log(spool.scanned.summary)
            loaded = work.load(backend_)
            rows = stream(backend_, target, spool, loaded.identity, loaded, log)
            write_rejected(backend_, target, rejected, log)
    compared = _correlation(target, method, columns) if columns.score and backend_.topology.is_main else {}
    return {"method": method, "rows": rows, **({"left_out": len(rejected)} if rejected else {}), **compared}


@dataclass(frozen=True)
class Scoring:
    """What `score` makes of each row: a language model that was found and not yet read, and how it scores."""

    spec: ModelSpec
    method: Method
    wild_type: Path | None
    columns: VariantColumns
    first_residue: int
    protein: str | None = None
    """The wild type, once `read_wild_type` has read it."""
    tokens: int = 0
    """Most tokens in a piece, once it is known."""

    @classmethod
    def of(
        cls,
        model: str,
        method: Method,
        wild_type: Path | None,
        columns: VariantColumns,
        first_residue: int = 1,
        backend: BackendName | None = None,
        settings: Sequence[str] = (),
    ) -> Scoring:
        """Find the model. Raise ConfigError where it has no language-model head, or the method needs a wild type."""
        spec = _language_model(model, backend, settings)
        if wild_type is None and (method != "pseudo-perplexity" or columns.sequence is None):
            raise ConfigError(f"--method {method} of variants needs the wild type; give --wild-type FILE")
        data = spec.cfg.data
        require(
            len(data.sequence_columns) == 1,
            f"score is for single chains, and data.sequence_column={data.sequence_column} joins several; give "
            "--data.sequence_column sequence",
        )
        return cls(spec, method, wild_type, columns, first_residue)

    @property
    def cfg(self) -> TrainConfig:
        return self.spec.cfg

    def read_wild_type(self, local_dp: int = 1) -> Scoring:
        """Return this with its protein, and pieces for a process with `local_dp` devices."""
        protein = None if self.wild_type is None else _protein(self.wild_type, self.cfg)
        tokens = piece_tokens(self.cfg, local_dp)
        if protein is not None and self.method in ("masked-marginal", "single-site-marginal"):
            # Room for every site of the protein once: all its single substitutions are then scored in one piece.
            tokens = max(tokens, len(protein) * (len(protein) + 2))
        return replace(self, protein=protein, tokens=tokens)

    @property
    def options(self) -> dict[str, Any]:
        """Return what decides the scores besides model and settings, in JSON's types."""
        method = {"method": self.method, "wild_type": self.protein, "first_residue": self.first_residue}
        return {**method, "piece_tokens": self.tokens}

    def source(self, path: Path) -> VariantTable:
        """Return the rows of a table in pieces."""
        compare, cost = self.method != "pseudo-perplexity", Scorer(self.method, self.protein).cost
        data = self.cfg.data
        return VariantTable(path, self.columns, data, self.protein, self.first_residue, compare, self.tokens, cost)

    def load(self, backend: Backend) -> LoadedScorer:
        """Read the model; an error of any rank is raised on all."""
        return LoadedScorer(self, backend)


class LoadedScorer:
    """The model of a `Scoring` in memory."""

    def __init__(self, work: Scoring, backend: Backend) -> None:
        task = Likelihood(TaskConfig(name="masked_lm"))
        built = raise_on_any_rank(backend, lambda: work.spec.load(task, backend))
        self._work, self._scorer = work, Scorer(work.method, work.protein)
        self._evaluator = evaluation.Evaluator(built.model, task, backend)
        self.identity = work.spec.identity(built, command="score", **work.options)
        """What decides the scores besides the input."""

    def __call__(self, rows: list[Row], advance: Advance = lambda tokens: None) -> Predictions:
        """Return the rows of a piece with their scores."""
        work = self._work
        ask = partial(_log_probabilities, self._evaluator, work.cfg, work.tokens, advance=advance)
        return _rows(work.columns, work.method, rows, self._scorer(rows, ask))


def _language_model(model: str, backend: BackendName | None, settings: Sequence[str]) -> ModelSpec:
    """Find the model; raise ConfigError where it has lost its language-model head."""
    spec = find_model(model, backend, settings, "score")
    other = spec.cfg.task.name if spec.task is not None and not spec.task.keeps_lm_head else None
    if is_adapter(Path(model)):  # its base may have the language model's head still, and it another encoder
        other = None if find_head(spec.cfg.model).auto_class == LANGUAGE else "another task"
    if other is not None:
        raise ConfigError(
            f"--model {model}: was trained for {other} and has no language-model head; "
            "name a masked_lm run, or the pretrained ESM-2"
        )
    return spec


def _log_probabilities(
    evaluator: Evaluator, cfg: TrainConfig, tokens: int, queries: Sequence[Query], *, advance: Advance
) -> list[np.ndarray]:
    """Return [sites, 33] per query: the log probability of each token at the sites that it asks about.

    The model gets as many queries at once as have `tokens` tokens, or one: a resumed file may ask for the sites of
    many pieces in its first one.
    """
    found: list[np.ndarray] = []
    ends = np.cumsum([len(query.tokens) for query in queries])
    while len(found) < len(queries):
        done = ends[len(found) - 1] if found else 0
        some = queries[len(found) : max(len(found) + 1, int(np.searchsorted(ends, done + tokens, side="right")))]
        table = query_table(some)
        (log_p,) = predict_table(evaluator, cfg, table, advance)
        starts = table.offsets[:-1] + 1  # after <cls>
        found += [log_p[start + query.sites] for start, query in zip(starts, some, strict=True)]
    return found


def _protein(path: Path, cfg: TrainConfig) -> str:
    """Return the one sequence of a file."""
    own = replace(cfg.data, long_sequences="crop", max_residues=1 << 30, on_bad_residue="strict", on_missing="strict")
    try:
        tables = list(InputChunks(path, own))
    except DataError as error:  # the one protein cannot be left out, nor its residues be replaced
        raise DataError(str(error).partition(", or use data.on_bad_residue")[0]) from None
    count = sum(len(table.ids) for table in tables)
    if count != 1:
        raise DataError(
            f"--wild-type {path}: holds {count} proteins; give a file with the one that variants are named after"
        )
    sequence = decode(tables[0].tokens[1:-1])
    limit = cfg.data.max_residues
    if len(sequence) > limit:
        raise DataError(
            f"--wild-type {path}: {len(sequence)} residues, more than data.max_residues={limit}; give "
            f"--data.max_residues {len(sequence)} --data.pack_tokens {len(sequence) + 2}"
        )
    return sequence


def _rows(columns: VariantColumns, method: Method, rows: Sequence[Row], values: Sequence[float]) -> pa.Table:
    made = {columns.what: pa.array([row.text for row in rows], pa.string())}
    if columns.score:
        made["measured"] = pa.array([row.measured for row in rows], pa.float64(), from_pandas=True)
    return pa.table({**made, _column(method): pa.array(values, pa.float64())})


def _column(method: Method) -> str:
    return method.replace("-", "_")


def _correlation(target: Path, method: Method, columns: VariantColumns) -> dict[str, Any]:
    """Return the rank correlation of what was written with what was measured, over the rows that have both.

    Its interval draws the first positions of named variants, whose effects are alike.
    """
    numbers = ["measured", _column(method)]
    frame = read_back(target, [columns.what, *numbers]).dropna(subset=numbers)
    sign = -1.0 if method == "pseudo-perplexity" else 1.0
    units = None
    if columns.what == "variant":
        units = enough(np.array([int((re.findall(r"\d+", name) or ["0"])[0]) for name in frame["variant"].astype(str)]))
    return rank_correlation(sign * frame[_column(method)].to_numpy(), frame["measured"].to_numpy(), units)
