"""States of a frozen encoder for a probe, kept on disk by content: no protein is run twice, whoever asks again.

The folder of some weights, pooling and precision holds shards. A shard has the states of some examples beside the
digests of their tokens, and is named by the SHA-256 of what is in it. It appears whole, as soon as its examples have
been run, so that a killed run goes on where it was, and several runs may write at once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from esm_neuron.config import TrainConfig
from esm_neuron.data.cache import content_key
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.loader import EvalLoader
from esm_neuron.data.progress import bar
from esm_neuron.distributed import from_main_rank, main_rank_only
from esm_neuron.files import read_bytes, write_bytes
from esm_neuron.training.callbacks import format_seconds
from esm_neuron.training.evaluation import Evaluator

logger = logging.getLogger(__name__)

VERSION = 1
"""Of what a shard holds; others are not looked at."""
BATCHES = 16
"""About how many batches of each device a shard is filled by: what a kill can lose."""
SHARD_BYTES = 1 << 32
QUIET = 15.0
"""Seconds between two lines about the progress."""


def folder_of(cfg: TrainConfig, weights: str, pooling: str) -> Path:
    """Return the folder of the states that weights of this SHA-256 give."""
    root = Path(cfg.output) if cfg.data.cache is None else Path(cfg.data.cache)
    return root / "features" / content_key([VERSION, weights, pooling, cfg.loop.precision])


def digests(table: ExampleTable) -> list[bytes]:
    """Return a digest of the tokens of each example."""
    return [hashlib.blake2b(table.sequence(i).tobytes(), digest_size=16).digest() for i in range(len(table))]


def load_shards(folder: Path, layers: Sequence[int], wanted: Container[bytes]) -> dict[bytes, np.ndarray]:
    """Return the states [rows, layers, F] of those `wanted` examples that are there, by their digests."""
    found: dict[bytes, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            content = read_bytes(path, SHARD_BYTES)
            if _name(content) != path.name:
                raise ValueError("its content is not what its name says")
            shard = load(content)
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("%s: left out (%s); its proteins are run again", path, error)
            continue
        if not all(f"layer.{layer}" in shard for layer in layers):
            continue
        ends = np.cumsum(shard["rows"])
        for digest, end, rows in zip(map(bytes, shard["digests"]), ends, shard["rows"], strict=True):
            if digest in wanted:
                found[digest] = np.stack([shard[f"layer.{layer}"][end - rows : end] for layer in layers], axis=1)
    return found


def save_shard(folder: Path, layers: Sequence[int], states: Mapping[bytes, np.ndarray]) -> None:
    """Write the states of some examples, [rows, layers, F] each."""
    joined = np.concatenate(list(states.values()))
    arrays = {f"layer.{layer}": np.ascontiguousarray(joined[:, place]) for place, layer in enumerate(layers)}
    arrays["digests"] = np.frombuffer(b"".join(states), np.uint8).reshape(len(states), -1)
    arrays["rows"] = np.array([len(own) for own in states.values()], np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    content = save(arrays)
    write_bytes(folder / _name(content), content)


def _name(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"


@dataclass
class FrozenEncoder:
    """Gives the states of a table's examples, running those that no shard has; its calls are made on every rank."""

    evaluator: Evaluator
    cfg: TrainConfig
    folder: Path
    layers: tuple[int, ...]
    """What the evaluator's predictions are of, [examples or tokens, layers, F]; one layer has no axis there."""
    log: Callable[[str], None]
    expect: Callable[[str, int], None]
    """Is told of so many passes to come (`Watchdog.expect`)."""
    passed: int = field(default=0, init=False)
    """Examples that were run."""
    found: int = field(default=0, init=False)
    """Examples whose states were there."""

    def states(self, table: ExampleTable) -> np.ndarray:
        """Return float32 [rows, layers, F] in the order of the table, on the main rank; a row per example or token."""
        backend, names = self.evaluator.backend, digests(table)
        have: dict[bytes, np.ndarray] = {}

        def missing() -> list[int]:
            have.update(load_shards(self.folder, self.layers, set(names)))
            first = {name: place for place, name in reversed(list(enumerate(names)))}  # equal sequences are run once
            return sorted(place for name, place in first.items() if name not in have)

        places = from_main_rank(backend, missing)
        self.passed, self.found = self.passed + len(places), self.found + len(have)
        begun = told = monotonic()
        done = 0
        for part in bar("encoder" if backend.topology.is_main else "", list(self._pieces(table, places))):
            made = dict(zip([names[place] for place in part], self._run(table, part), strict=True))

            def keep(made: dict[bytes, np.ndarray] = made) -> None:
                save_shard(self.folder, self.layers, made)
                have.update(made)

            main_rank_only(backend, keep)
            done += len(part)
            if monotonic() - told > QUIET and done < len(places):
                told = monotonic()
                left = format_seconds((told - begun) / done * (len(places) - done))
                self.log(f"{done:,} of {len(places):,} proteins read by the encoder, {left} left")
        return np.concatenate([have[name] for name in names]) if have else np.empty(0, np.float32)

    def _pieces(self, table: ExampleTable, places: Sequence[int]) -> Iterator[Sequence[int]]:
        if not places:
            return
        backend = self.evaluator.backend
        packs = self.cfg.loop.eval_packs_per_device * backend.local_dp * backend.topology.dp
        ends = np.cumsum(table.lengths[places]) // (BATCHES * packs * self.cfg.data.pack_tokens)
        yield from (part.tolist() for part in np.split(np.array(places, np.int64), np.flatnonzero(np.diff(ends)) + 1))

    def _run(self, table: ExampleTable, part: Sequence[int]) -> list[np.ndarray]:
        backend, task = self.evaluator.backend, self.evaluator.task
        sequences = [table.sequence(place) for place in part]
        offsets = np.cumsum([0, *map(len, sequences)])
        loader = EvalLoader(
            ExampleTable.of(np.concatenate(sequences), offsets, [table.ids[table.record[place]] for place in part]),
            task,
            self.cfg,
            backend.topology.dp,
            backend.topology.dp_rank,
            local_dp=backend.local_dp,
            static_shapes=backend.static_shapes,
        )
        self.expect("the pass of the frozen encoder", len(loader) + 1)
        (states,) = self.evaluator.collect(loader)
        states = states.reshape(len(states), len(self.layers), -1)
        return np.split(states, offsets[1:-1] if task.predictions_per_token else np.arange(1, len(part)))
