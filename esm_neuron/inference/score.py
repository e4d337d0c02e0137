"""Zero-shot effects of variants, from the likelihoods that a language model gives to residues.

Formulas: Meier et al. 2021, "Language models enable zero-shot prediction of the effects of mutations on protein
function" (bioRxiv 2021.07.09.450648), with natural logarithms of a softmax over the 33 tokens. M are the exchanged
residues of a variant, x the wild type:

    wild-type-marginal   sum over i in M of log p(x_i = mutant | x) - log p(x_i = wild | x)
    masked-marginal      the same given x without M: all of M masked together
    pseudo-perplexity    exp(-1/L sum over all i of log p(y_i | y without i)) of the variant's own sequence y, of L
                         residues (Salazar et al. 2020, arXiv:1910.14659); low is likely
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from torch import Tensor
from torch.nn import functional as F

from esm_neuron.backends import opened_backend
from esm_neuron.config import BackendName, TaskConfig, TrainConfig, require
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.splits import InputChunks
from esm_neuron.data.tokenizer import MASK, decode, encode_many
from esm_neuron.distributed import log_nothing, raise_on_any_rank
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.inference.load import open_model
from esm_neuron.inference.predict import answer_table, piece_tokens, write_rejected
from esm_neuron.inference.stream import JOIN, Advance, Predictions, check_target, read_back, read_once, stream
from esm_neuron.inference.variants import Row, Variant, VariantColumns, VariantTable
from esm_neuron.metrics.regression import rank_correlation
from esm_neuron.tasks.masked_lm import MaskedLM

Method = Literal["wild-type-marginal", "masked-marginal", "pseudo-perplexity"]

logger = logging.getLogger(__name__)


class Likelihood(MaskedLM):
    """Masked language modelling that is asked and not trained: inputs are as given, answers are log probabilities."""

    predictions_per_token = True

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """The sequence as it is, masks included."""
        tokens = table.sequence(example)
        return Target(tokens, tokens.astype(np.int64), np.zeros(len(tokens), np.float32))

    def predictions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Log probabilities [R, L, 33], nats."""
        return (F.log_softmax(logits.float(), dim=-1),)


@dataclass(frozen=True)
class Question:
    """A sequence with masks, and the residues whose likelihoods are wanted."""

    tokens: np.ndarray
    """uint8 [residues + 2]."""
    sites: np.ndarray
    """int64 [sites], residues from 0."""


Ask = Callable[[Sequence[Question]], list[np.ndarray]]
"""Log probabilities [sites, 33] for each question."""


def masked(tokens: np.ndarray, sites: Sequence[int]) -> Question:
    """A question for the residues `sites` of a protein, all masked together."""
    shown, places = tokens.copy(), np.asarray(sites, np.int64)
    shown[places + 1] = MASK
    return Question(shown, places)


def question_table(questions: Sequence[Question]) -> ExampleTable:
    """The questions as examples, one a record."""
    offsets = np.cumsum([0, *(len(question.tokens) for question in questions)])
    count = len(questions)
    return ExampleTable(
        tokens=np.concatenate([question.tokens for question in questions]),
        offsets=offsets,
        record=np.arange(count),
        weight=np.ones(count, np.float32),
        labels=np.empty(0, np.int64),
        ids=[f"question {number}" for number in range(count)],
    )


def marginal(variant: Variant, log_p: np.ndarray) -> float:
    """Sum of log p(mutant) - log p(wild) over the substitutions, given [substitutions, 33]."""
    rows = np.arange(len(variant))
    mutant, wild = (
        encode_many(["".join(side)])[0][1:-1] for side in ([v.mutant for v in variant], [v.wild for v in variant])
    )
    return float((log_p[rows, mutant].astype(np.float64) - log_p[rows, wild]).sum())


class Scorer:
    """Scores the rows of a table by one method; `ask` runs the model."""

    def __init__(self, method: Method, wild_type: str | None) -> None:
        self.method = method
        self._wild = None if wild_type is None else encode_many([wild_type])[0]
        self._known: np.ndarray | None = None

    def __call__(self, rows: Sequence[Row], ask: Ask) -> list[float]:
        """One value a row."""
        if self.method == "pseudo-perplexity":
            return self._perplexities([row.sequence for row in rows], ask)
        variants = [row.variant for row in rows]
        find = self._given_wild_type if self.method == "wild-type-marginal" else self._given_the_rest
        log_p = find(variants, ask)
        return [marginal(v, log_p[sites_of(v)]) if v else 0.0 for v in variants]

    def _given_wild_type(self, variants: Sequence[Variant], ask: Ask) -> dict[tuple[int, ...], np.ndarray]:
        if self._known is None:
            (self._known,) = ask([Question(self._tokens(), np.arange(len(self._tokens()) - 2))])
        return {sites: self._known[list(sites)] for sites in map(sites_of, variants)}

    def _given_the_rest(self, variants: Sequence[Variant], ask: Ask) -> dict[tuple[int, ...], np.ndarray]:
        wanted = [sites for sites in dict.fromkeys(map(sites_of, variants)) if sites]
        predictions = ask([masked(self._tokens(), sites) for sites in wanted]) if wanted else []
        return dict(zip(wanted, predictions, strict=True))

    def _perplexities(self, sequences: Sequence[str], ask: Ask) -> list[float]:
        tokens = [encode_many([sequence])[0] for sequence in sequences]
        predictions = iter(ask([masked(each, [site]) for each in tokens for site in range(len(each) - 2)]))
        found = []
        for each in tokens:
            log_p = [float(next(predictions)[0, token]) for token in each[1:-1]]
            found.append(float(np.exp(-np.mean(log_p))))
        return found

    def _tokens(self) -> np.ndarray:
        if self._wild is None:
            raise ConfigError(f"--method {self.method} compares with a wild type; give --wild-type FILE")
        return self._wild


def sites_of(variant: Variant) -> tuple[int, ...]:
    """The exchanged residues, from 0."""
    return tuple(each.index for each in variant)


def tokens_of(method: Method) -> Callable[[Row, set[tuple[int, ...]]], int]:
    """How many tokens the model is given for a row, when the sites of earlier rows of its piece are known."""

    def cost(row: Row, seen: set[tuple[int, ...]]) -> int:
        length = len(row.sequence)
        if method == "pseudo-perplexity":
            return length * (length + 2)
        known = method == "wild-type-marginal" or not row.variant or sites_of(row.variant) in seen
        return 0 if known else length + 2

    return cost


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
    """Score every variant of a table, in its order, with the language model's head.

    Args:
        model: output folder of a masked_lm run, a Hugging Face folder of ESM-2 with its LM head, or a hub id.
        source: CSV, TSV, JSONL or Parquet with a row a variant.
        target: CSV, TSV, JSONL or Parquet: `variant` or `sequence`, `measured` where a score column is named, and the
            method's value under its name with `_` for `-`.
        wild_type: file with the one protein that variants are named after.
        columns: which columns are read.
        first_residue: number that the table gives to its first residue.
        backend, settings, resume, say: as for `predict`.

    Returns:
        `method`, `rows`, and where a score column is named `n` (rows with a value), `spearman` and `spearman_ci`
        between it and the method's value, the pseudo-perplexity negated.

    Raises:
        EsmNeuronError: the model, the wild type or a row cannot be used; `target` is then as it was.
    """
    check_target(target, tuple(JOIN))
    opened, columns = open_model(model, backend, settings, "score"), columns or VariantColumns()
    if opened.trained is not None and not isinstance(opened.trained, MaskedLM):
        raise ConfigError(
            f"--model {model}: was trained for {opened.cfg.task.name} and has no language model's head; "
            "name a masked_lm run, or the pretrained ESM-2"
        )
    compare = method != "pseudo-perplexity"
    needs = compare or columns.sequence is None
    require(
        not needs or wild_type is not None, f"--method {method} of variants needs the wild type; give --wild-type FILE"
    )
    cfg = opened.cfg
    with opened_backend(cfg) as backend_:
        main = backend_.topology.is_main
        protein = raise_on_any_rank(backend_, lambda: _protein(wild_type, cfg)) if wild_type is not None else None
        tokens = piece_tokens(cfg, backend_)
        if protein is not None and method == "masked-marginal":
            tokens = max(tokens, len(protein) * (len(protein) + 2))  # all single substitutions need no site twice
        table = VariantTable(source, columns, cfg.data, protein, first_residue, compare, tokens, tokens_of(method))
        survey = read_once(backend_, table)
        log = log if main else log_nothing
        log(table.summary())
        rejected = tuple(table.rejected)
        task, scorer = Likelihood(TaskConfig(name="masked_lm"), ()), Scorer(method, protein)
        built = raise_on_any_rank(backend_, lambda: opened.build(task, backend_))

        def answer(rows: list[Row], advance: Advance) -> Predictions:
            def ask(questions: Sequence[Question]) -> list[np.ndarray]:
                asked = question_table(questions)
                (log_p,) = answer_table(built.model, task, backend_, cfg, asked, advance)
                starts = asked.offsets[:-1] + 1
                return [log_p[start + question.sites] for start, question in zip(starts, questions, strict=True)]

            return _rows(columns, method, rows, scorer(rows, ask))

        identity = opened.identity(
            built, command="score", method=method, wild_type=protein, first_residue=first_residue, piece_tokens=tokens
        )
        rows = stream(backend_, target, survey, identity, table, answer, resume, log)
        write_rejected(backend_, target, rejected, log)
    found: dict[str, Any] = {"method": method, "rows": rows}
    return {**found, **_agreement(target, method)} if columns.score and main else found


def _protein(path: Path, cfg: TrainConfig) -> str:
    """The one sequence of a file."""
    tables = list(InputChunks(path, replace(cfg.data, long_sequences="crop", max_residues=1 << 30)))
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


def _agreement(target: Path, method: Method) -> dict[str, Any]:
    """Rank correlation of what was written with what was measured, over the rows that have both."""
    frame = read_back(target, ["measured", _column(method)]).dropna()
    sign = -1.0 if method == "pseudo-perplexity" else 1.0
    return rank_correlation(sign * frame[_column(method)].to_numpy(), frame["measured"].to_numpy())
