"""What the neuron backend checks and sets before it touches a device; no Neuron package is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from esm_neuron.backends import neuron_env
from esm_neuron.backends.neuron import NeuronBackend
from esm_neuron.backends.neuron_env import (
    CACHE,
    SETTINGS,
    apply_settings,
    cache_trouble,
    check_packages,
    neuron_cores,
)
from esm_neuron.backends.survey import Lack
from esm_neuron.config import AdapterConfig, LoopConfig, ParallelConfig, TrainConfig
from esm_neuron.errors import ConfigError
from esm_neuron.planning.doctor import lacks

FP32 = TrainConfig()
BF16 = replace(FP32, loop=LoopConfig(precision="bf16"))
BF16_PLAIN = replace(BF16, parallel=ParallelConfig(zero1=False), adapter=AdapterConfig(kind="none"))


@pytest.mark.parametrize("version", ["0.1", "1.0"])
def test_placeholder_packages_are_named_with_the_cure(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    found = {"torch-neuronx": version, "neuronx-cc": "2.21.33363.0", "neuronx-distributed": version}
    monkeypatch.setattr(neuron_env, "installed_version", found.get)
    with pytest.raises(ConfigError) as error:
        check_packages()
    assert str(error.value) == (
        f"torch-neuronx {version}, neuronx-distributed {version}: empty placeholder of the general package index; "
        "install the Neuron SDK's wheels: pip install --extra-index-url https://pip.repos.neuron.amazonaws.com "
        "-c constraints/neuron.txt -e '.[neuron]'"
    )


def test_real_or_missing_packages_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_env, "installed_version", {"neuronx-cc": "2.21.33363.0"}.get)
    check_packages()


def test_stochastic_rounding_is_for_bf16_without_masters() -> None:
    names = {"NEURON_RT_STOCHASTIC_ROUNDING_EN", "NEURON_RT_STOCHASTIC_ROUNDING_SEED"}
    assert not names & set(apply_settings(FP32, nodes=False, env={}))
    assert not names & set(apply_settings(BF16, nodes=False, env={}))
    written = apply_settings(BF16_PLAIN, nodes=False, env={})
    assert {name: written[name] for name in names} == {
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": "1",
        "NEURON_RT_STOCHASTIC_ROUNDING_SEED": str(BF16_PLAIN.seed),
    }


def test_the_network_is_set_for_several_nodes_only() -> None:
    assert "FI_PROVIDER" not in apply_settings(FP32, nodes=False, env={})
    assert apply_settings(FP32, nodes=True, env={})["FI_PROVIDER"] == "efa"


def test_the_users_settings_win() -> None:
    env = {"NEURON_FUSE_SOFTMAX": "0", "NEURON_CC_FLAGS": "--auto-cast=all --verbose=info"}
    written = apply_settings(FP32, nodes=False, env=env)
    assert env["NEURON_FUSE_SOFTMAX"] == "0" and "NEURON_FUSE_SOFTMAX" not in written
    assert env["NEURON_CC_FLAGS"] == (
        "--auto-cast=all --verbose=info --model-type=transformer --enable-saturate-infinity --retry_failed_compilation"
    )
    assert apply_settings(FP32, nodes=False, env=env) == {}


def test_a_compilers_own_cache_folder_beside_the_cache_url_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler would follow the flag without a word, and a node would compile again what S3 already holds."""
    env = {"NEURON_CC_FLAGS": "-O1 --cache_dir=/scratch --verbose=info", CACHE: "s3://bucket/cache"}
    expected = (
        "NEURON_CC_FLAGS has --cache_dir /scratch, which the compiler would use in place of "
        "NEURON_COMPILE_CACHE_URL=s3://bucket/cache; remove one of the two"
    )
    assert cache_trouble(env) == expected
    assert cache_trouble({**env, "NEURON_CC_FLAGS": "--cache_dir /scratch"}) == expected
    assert cache_trouble({CACHE: env[CACHE]}) is None and cache_trouble({"NEURON_CC_FLAGS": "--cache_dir=/x"}) is None
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="remove one of the two"):
        NeuronBackend(FP32)
    assert Lack(expected.rpartition("; ")[0], "remove one of the two") in lacks("neuron")


def test_a_cache_on_nfs_or_lustre_is_refused(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    rows = [
        f"fs-1:/ {tmp_path}/efs nfs4 rw 0 0",
        f"fs-2@tcp:/x {tmp_path}/fsx lustre rw 0 0",
        "/dev/nvme0n1p1 / ext4 rw 0 0",
    ]
    mounts.write_text("\n".join(rows) + "\n")
    for folder, kind in (("efs", "nfs4"), ("fsx", "lustre")):
        assert cache_trouble({CACHE: f"{tmp_path}/{folder}/cache"}, mounts) == (
            f"NEURON_COMPILE_CACHE_URL={tmp_path}/{folder}/cache is on {kind}, where the compiler's locks break; use a "
            "local folder or an S3 prefix"
        )
    for fine in (f"{tmp_path}/cache", "s3://bucket/efs"):
        assert cache_trouble({CACHE: fine}, mounts) is None
    assert cache_trouble({CACHE: str(tmp_path)}, tmp_path / "no such file") is None


def test_every_setting_says_what_it_is_for() -> None:
    assert all(setting.meaning.endswith(".") for setting in SETTINGS)


def test_cores_are_counted_by_device(tmp_path: Path) -> None:
    for name in ("neuron0", "neuron1", "neuron15", "neuron_shm", "null"):
        (tmp_path / name).touch()
    assert neuron_cores(tmp_path) == 6
