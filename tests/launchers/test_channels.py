"""Folders as channels: the launcher takes and refuses what the container does, and what is taken can be read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import entry
import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from job import Job

from esm_neuron.config import TrainConfig, settings
from esm_neuron.data.labels import Labels
from esm_neuron.data.splits import load_splits
from esm_neuron.errors import EsmNeuronError

Described = Callable[..., dict[str, Any]]
Toy = Callable[..., TrainConfig]
Fill = Callable[[Path, Path], object]
"""(empty folder, table of proteins) -> filled."""


def table(source: Path) -> Dataset:
    """The toy's proteins as a data set with class names."""
    rows = Dataset.from_csv(str(source))
    return rows.cast_column("label", ClassLabel(names=sorted(set(rows["label"]))))


def saved(folder: Path, source: Path) -> None:
    table(source).save_to_disk(folder)


def splits(folder: Path, source: Path) -> None:
    DatasetDict({"train": table(source), "validation": table(source)}).save_to_disk(folder)


def shards(folder: Path, source: Path, suffix: str = ".csv") -> None:
    head, *rows = source.read_text().splitlines()
    for number, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
        (folder / f"part-{number}{suffix}").write_text("\n".join([head, *part]) + "\n")


def names(*files: str) -> Fill:
    """Copies of the table by these names, folders made."""

    def fill(folder: Path, source: Path) -> None:
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)

    return fill


def parquet(folder: Path, source: Path) -> None:
    for number in range(2):
        rows = Dataset.from_csv(str(source)).shard(2, number)
        rows.to_parquet(folder / f"{number}.parquet")


def fasta(folder: Path, source: Path) -> None:
    (folder / "proteins.fasta").write_text(">a label=alpha\nMKTAYIAK\n>b label=beta\nMKLVFFAE\n")


FOLDERS: dict[str, tuple[Fill, str | None]] = {
    "one file": (names("other.csv"), None),
    "the file of the config's name among others": (names("a.csv", "b.csv", "train.csv"), None),
    "a file and a text": (names("other.csv", "README.md"), None),
    "hidden files beside it": (names("other.csv", ".gitkeep", ".cache/x.csv"), None),
    "Spark's mark of success": (names("part-0.csv", "_SUCCESS"), None),
    "shards": (shards, None),
    "shards of Parquet": (parquet, None),
    "FASTA": (fasta, None),
    "save_to_disk": (saved, None),
    "save_to_disk, one folder below": (lambda f, s: saved(f / "train", s), None),
    "save_to_disk, two folders below": (lambda f, s: saved(f / "my" / "data", s), None),
    "a DatasetDict": (splits, None),
    "a DatasetDict, one folder below": (lambda f, s: splits(f / "data", s), None),
    "one file, one folder below": (names("data/other.csv"), None),
    "shards, one folder below": (lambda f, s: ((f / "data").mkdir(), shards(f / "data", s)), None),
    "nothing": (lambda f, s: None, "channel train holds nothing; put one file there"),
    "an empty folder": (lambda f, s: (f / "data").mkdir(), "channel train holds nothing"),
    "files of two kinds": (names("a.csv", "b.tsv"), "the folder has files of .csv and .tsv; name one kind"),
    "files of two splits": (names("my_train.csv", "my_test.csv"), "of different splits; name each"),
    "files that nobody reads": (names("a.doc", "b.doc"), "channel train holds a.doc, b.doc; put one file there"),
    "two folders": (names("a/x.csv", "b/x.csv"), "channel train holds a, b; put one file there"),
}


def outcome(call: Callable[[], Any], folder: Path) -> str:
    """What a call returns or says, without the folder's name."""
    try:
        found = call()
    except EsmNeuronError as error:
        return str(error).replace(str(folder), "FOLDER")
    return str(found)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_launcher_and_the_container_agree(
    name: str, described: Described, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, refusal = FOLDERS[name]
    folder = tmp_path / "data"
    folder.mkdir()
    values = described()
    fill(folder, Path(str(settings.read_config(values["config"]).data.train)))
    channel = tmp_path / "container" / "input" / "data" / "train"
    shutil.copytree(folder, channel)  # as service.upload sends it: all files, in their folders
    env = {"SAGEMAKER_BASE_DIR": str(tmp_path / "container"), "SM_CHANNEL_TRAIN": str(channel)}
    argv = ["--config", str(values["config"])]
    here = outcome(lambda: Job(**{**values, "train": str(folder)}).name, folder)
    there = outcome(lambda: settings.parse(entry.flags(argv, env)).data.train, channel)
    if refusal is not None:
        assert refusal in there and here == there
        return
    assert here == "job-1" and there.startswith(str(channel))
    alone = ["--data.valid", "null", "--data.test", "null", "--data.valid_fraction", "0", "--backend", "cpu"]
    assert load_splits(settings.parse([*entry.flags(argv, env), *alone]), Labels).train.ids


def test_what_is_uploaded_of_a_folder(described: Described, tmp_path: Path) -> None:
    job = Job(**described(train="s3://bucket/data/train", valid="s3://bucket/valid.csv"))
    assert job.channels["train"] == "s3://bucket/data/train/" and job.channels["valid"] == "s3://bucket/valid.csv"


def test_data_of_the_hub_and_of_the_web_is_read_in_the_container(described: Described) -> None:
    hub = {"data": {"train": f"hf://owner/name@{'a' * 40}/train", "valid": "https://example.org/valid.csv"}}
    job = Job(**described(config=hub))
    assert set(job.inputs) == {"test"} and job.run.data.train == hub["data"]["train"]
    baked = {"image": "123456789012.dkr.ecr.us-west-2.amazonaws.com/esm:1", "baked": True, "network_isolation": True}
    hub["model"] = {"name": "tiny", "init": "random"}
    with pytest.raises(EsmNeuronError, match="network_isolation=true: data.train/valid cannot be fetched; give files"):
        Job(**described(config=hub, **baked))
