"""The token cache: equal tables, made once by many processes, proven when opened, and no more memory for more rows."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from esm_neuron.config import DataConfig, TrainConfig
from esm_neuron.data import parts, sources
from esm_neuron.data import splits as splits_module
from esm_neuron.data.cache import cached
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.labels import Labels
from esm_neuron.data.splits import Splits, load_splits
from esm_neuron.errors import ConfigError


def anonymous() -> int:
    """Bytes of this process's memory that are no files."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024


def load_and_measure(source: Path, cache: Path) -> tuple[str, int, int]:
    """The fingerprint of a file's splits through a cache, training rows, and most bytes of memory above the start."""
    cfg = TrainConfig(data=DataConfig(train=str(source), cache=str(cache), max_residues=400))
    before, seen, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    splits = load_splits(cfg, None)
    done.set()
    watcher.join()
    return splits.fingerprint, len(splits.train.ids), max(seen) - before


def equal(a: Splits, b: Splits) -> bool:
    def same(x: ExampleTable | None, y: ExampleTable | None) -> bool:
        if x is None or y is None:
            return x is y
        arrays = ("tokens", "offsets", "record", "weight", "labels", "starts", "residues")
        kinds = all(getattr(x, name).dtype == getattr(y, name).dtype for name in arrays)
        return (
            kinds
            and all(np.array_equal(getattr(x, name), getattr(y, name)) for name in arrays)
            and list(x.ids) == list(y.ids)
        )

    tables = all(same(getattr(a, name), getattr(b, name)) for name in ("train", "valid", "test"))
    others = ("labels", "reports", "fingerprint", "sampled", "task")
    return tables and list(a.rejected) == list(b.rejected) and all(getattr(a, n) == getattr(b, n) for n in others)


@pytest.fixture
def cfg(proteins: Callable[..., Path]) -> TrainConfig:
    source = proteins("x.csv", 200)
    with source.open("a") as file:
        file.write("odd,MK*V,alpha\ngood,MKV,alpha\n")
    data = DataConfig(
        train=str(source),
        test_fraction=0.2,
        on_bad_residue="skip",
        max_residues=30,
        long_sequences="window",
        window_overlap=5,
        pack_tokens=64,
    )
    return TrainConfig(data=data)


def through(cfg: TrainConfig, **changes: object) -> Splits:
    return load_splits(replace(cfg, data=replace(cfg.data, **changes)), Labels)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(splits_module, "_make", made)


def test_tables_are_the_same_with_and_without(
    cfg: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = through(cfg)
    assert [len(t.ids) for t in (plain.train, plain.valid, plain.test) if t is not None] == [145, 20, 36]
    cache = str(tmp_path / "cache")
    assert equal(through(cfg, cache=cache), plain)
    forbid(monkeypatch)
    again = through(cfg, cache=cache)
    assert equal(again, plain)
    assert isinstance(again.train.tokens.base, np.memmap) or isinstance(again.train.tokens, np.memmap)
    assert again.train.ids[3] == plain.train.ids[3]
    assert again.train.ids[1:3] == list(plain.train.ids[1:3])
    assert through(cfg, cache=cache, pack_tokens=128, packing=False).fingerprint == plain.fingerprint


@pytest.mark.parametrize("change", [{"max_residues": 31}, {"test_fraction": 0.1}, {"on_bad_residue": "replace"}])
def test_other_settings_and_another_content_are_another_entry(cfg: TrainConfig, tmp_path: Path, change: dict) -> None:
    cache = str(tmp_path / "cache")
    first = through(cfg, cache=cache).fingerprint
    assert through(cfg, cache=cache, **change).fingerprint == through(cfg, **change).fingerprint != first
    source = Path(str(cfg.data.train))
    source.write_text(source.read_text().replace("alpha", "beta", 1))
    assert through(cfg, cache=cache).fingerprint == through(cfg).fingerprint != first


def test_a_copy_elsewhere_has_the_same_entry_and_is_called_by_its_own_name(
    cfg: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, copy = str(tmp_path / "cache"), tmp_path / "other" / "y.csv"
    copy.parent.mkdir()
    copy.write_bytes(Path(str(cfg.data.train)).read_bytes())
    through(cfg, cache=cache)
    plain = through(cfg, train=str(copy))
    assert plain.rejected and {row.file for row in plain.rejected} == {plain.reports[0].name} == {str(copy)}
    forbid(monkeypatch)
    assert equal(through(cfg, cache=cache, train=str(copy)), plain)
    with pytest.raises(AssertionError, match="tokenized again"):
        through(cfg, cache=cache, train=str(copy.rename(copy.with_suffix(".tsv"))))


@pytest.mark.parametrize("harm", ["change", "cut", "remove", "manifest"])
def test_a_damaged_entry_is_made_again_with_a_warning(
    cfg: TrainConfig, tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    plain = through(cfg, cache=str(cache))
    (file,) = cache.glob("*/manifest.json" if harm == "manifest" else "*/train.tokens")
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.unlink()
    if harm != "remove":
        file.write_bytes(data[:-1] if harm == "cut" else data)
    assert equal(through(cfg, cache=str(cache)), plain)
    (warning,) = caplog.messages
    assert "the cached data are made again" in warning
    caplog.clear()
    assert equal(through(cfg, cache=str(cache)), plain)
    assert not caplog.messages


def test_an_error_leaves_nothing(cfg: TrainConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(Exception, match="stop codon"):
        through(cfg, cache=str(cache), on_bad_residue="strict")
    assert [path.name[-5:] for path in cache.iterdir()] == [".lock"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache=.*/file/x cannot be written \(Not a directory\)"):
        through(cfg, cache=str(tmp_path / "file" / "x"))
    with pytest.raises(ConfigError, match="data.cache needs a revision that is a commit hash"):
        through(cfg, cache=str(cache), train="hf://owner/name@main/train")


def write_fasta(path: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    residues = rng.choice(np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8), (count, 400))
    with path.open("wb") as file:
        for number, row in enumerate(residues):
            file.write(b">p%0100d\n%s\n" % (number, row.tobytes()))
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure memory in; on Linux: make test")
def test_processes_share_one_entry_and_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sources, parts):  # small chunks, so that what they leave unfreed is small as well
        monkeypatch.setattr(module, "CHUNK_ROWS", 2048)
    small, large = write_fasta(tmp_path / "s.fasta", 30_000), write_fasta(tmp_path / "l.fasta", 150_000)
    cache = tmp_path / "large"
    with ProcessPoolExecutor(2, get_context("fork")) as pool:  # spawned ones would import torch for half a minute
        _, _, memory = pool.submit(load_and_measure, small, tmp_path / "small").result(timeout=120)
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        waiting = [pool.submit(load_and_measure, large, cache) for _ in range(2)]
        predictions = [future.result(timeout=120) for future in waiting]
    assert len({fingerprint for fingerprint, _, _ in predictions}) == 1
    assert [rows for _, rows, _ in predictions] == [135_000, 135_000]
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    grown = max(memory for _, _, memory in predictions) - memory
    # Of 120,000 records more, each with an id of 101 characters, half their 400 residues: no tokens and no texts are
    # held, not even the ids of which one might occur twice.
    assert grown < 120_000 * 200


def test_another_seed_is_another_entry_only_where_rows_are_sampled(
    cfg: TrainConfig, proteins: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    reseeded = replace(cfg, seed=cfg.seed + 1)
    assert through(cfg, cache=cache).fingerprint != through(reseeded, cache=cache).fingerprint
    own = {"cache": cache, "valid": str(proteins("v.csv", 20, seed=1)), "test_fraction": 0.0}
    first = through(cfg, **own)
    forbid(monkeypatch)
    assert equal(through(reseeded, **own), first)


def test_a_whole_entry_is_proven_by_several_at_once(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "x").write_text("x")

    path = cached(tmp_path, "k", make)
    with (tmp_path / ".k.lock").open("w+") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # another process that reads it
        reader = threading.Thread(target=cached, args=(tmp_path, "k", make), daemon=True)
        reader.start()
        reader.join(30)
        assert not reader.is_alive()
    assert path == tmp_path / "k"
