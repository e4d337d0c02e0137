"""The entry point without its container (test_container.py): variables and folders become flags of the run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import entry
import pytest

from esm_neuron.config import TrainConfig, settings
from esm_neuron.errors import ConfigError

Toy = Callable[..., TrainConfig]
Channels = Callable[..., dict[str, str]]


@pytest.fixture
def channels(tmp_path: Path) -> Channels:
    """Names of the files of each channel -> the variables of a container that has them."""

    def make(**files: list[str]) -> dict[str, str]:
        env = {"SAGEMAKER_BASE_DIR": str(tmp_path)}
        for channel, names in files.items():
            folder = tmp_path / "input" / "data" / channel
            folder.mkdir(parents=True)
            for name in names:
                (folder / name).touch()
            env[f"SM_CHANNEL_{channel.upper()}"] = str(folder)
        return env

    return make


@pytest.fixture
def argv(toy: Toy, tmp_path: Path) -> list[str]:
    """Flags of a job whose config names its files where the launcher was."""
    files = {"train": "mine/train.csv", "valid": "s3://bucket/valid.tsv", "test": None}
    path = tmp_path / "run.yaml"
    path.write_text(settings.dump(toy(data=files, model={"name": "facebook/esm2_t6_8M_UR50D", "init": "pretrained"})))
    return ["--config", str(path), "--log.tensorboard", "True"]


def test_every_channel_reaches_the_config(argv: list[str], channels: Channels, tmp_path: Path) -> None:
    env = channels(train=["other.csv", "train.csv"], valid=["renamed.tsv"], test=["test.csv"], model=["config.json"])
    cfg = settings.parse(entry.flags(argv, env))
    data = tmp_path / "input" / "data"
    assert cfg.data.train == str(data / "train" / "train.csv"), "the file that the config names"
    assert cfg.data.valid == str(data / "valid" / "renamed.tsv"), "the only one"
    assert cfg.data.test == str(data / "test" / "test.csv"), "one that the config did not ask for"
    assert cfg.model.name == str(data / "model")
    assert (cfg.output, cfg.checkpoint.resume) == (str(tmp_path / "checkpoints"), "auto")
    assert cfg.log.tensorboard is True, "as the container writes a boolean"


def test_what_the_tuner_adds_is_no_flag_of_ours() -> None:
    words = ["--optim.lr", "0.001", entry.TUNER_FLAG, "valid:mcc", "--seed", "1", f"{entry.TUNER_FLAG}=valid:mcc"]
    assert entry.own_flags(words) == ["--optim.lr", "0.001", "--seed", "1"]
    assert entry.own_flags(["--seed", "1"]) == ["--seed", "1"]


def test_the_model_folder_names_the_model_that_auto_was(toy: Toy, tmp_path: Path) -> None:
    cfg = toy()
    (tmp_path / "config.yaml").write_text(settings.dump(cfg))
    for submitted, named in (("auto", "tiny"), ("facebook/esm2_t6_8M_UR50D", "facebook/esm2_t6_8M_UR50D")):
        asked = replace(cfg, model=replace(cfg.model, name=submitted))
        entry.lay_out(tmp_path, tmp_path / submitted, asked)
        assert settings.read_config(tmp_path / submitted / "config.yaml").model.name == named


def test_without_channels_the_config_keeps_its_own(argv: list[str]) -> None:
    cfg = settings.parse(entry.flags(argv, {}))
    assert (cfg.data.train, cfg.data.valid, cfg.data.test) == ("mine/train.csv", "s3://bucket/valid.tsv", None)
    assert cfg.model.name == "facebook/esm2_t6_8M_UR50D" and cfg.output == "/opt/ml/checkpoints"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.doc", "b.doc"], "channel train holds a.doc, b.doc; put one file there, files of one kind, or a folder"),
        ([], "channel train holds nothing; put one file there"),
    ],
)
def test_a_channel_that_leaves_a_choice(argv: list[str], channels: Channels, files: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        entry.flags(argv, channels(train=files))


def test_the_first_reason_stays_short_and_without_secrets(tmp_path: Path) -> None:
    entry.write_failure(tmp_path, "esm-neuron: error: hf_" + "a" * 34 + " " + "x" * 2000)
    entry.write_failure(tmp_path, "a peer has failed")
    said = (tmp_path / "output" / "failure").read_text()
    assert said.startswith("esm-neuron: error: ") and "hf_a" not in said and len(said) == entry.SHOWN
