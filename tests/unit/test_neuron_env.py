"""What the neuron backend checks and sets before it touches a device; no Neuron package is needed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.packs import LAYOUTS, build, gradients, predictions, proteins
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

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
from esm_neuron.backends.neuron_sdk import RUNTIME
from esm_neuron.backends.survey import Lack
from esm_neuron.config import AdapterConfig, LoopConfig, ParallelConfig, TrainConfig
from esm_neuron.errors import ConfigError
from esm_neuron.models import attention
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
        "--auto-cast=all --verbose=info --model-type=transformer --optlevel=2 --retry_failed_compilation"
    )
    assert apply_settings(FP32, nodes=False, env=env) == {}


def test_tf32_and_the_level_of_the_compiler_can_be_asked_for() -> None:
    asked = replace(FP32, loop=LoopConfig(tf32=True, optlevel=1))
    assert apply_settings(asked, nodes=False, env={})["NEURON_CC_FLAGS"] == (
        "--model-type=transformer --auto-cast=matmult --auto-cast-type=tf32 --optlevel=1 --retry_failed_compilation"
    )
    env = {"NEURON_CC_FLAGS": "-O3"}
    apply_settings(asked, nodes=False, env=env)
    assert env["NEURON_CC_FLAGS"].startswith("-O3 ") and "--optlevel" not in env["NEURON_CC_FLAGS"]


@pytest.mark.parametrize(
    ("runtime", "value"), [(None, "3"), ("2.28.23.0", "3"), ("2.32.31.0", "3"), ("2.33.10.0", None)]
)
def test_asynchronous_requests_are_for_the_runtimes_that_have_them(
    monkeypatch: pytest.MonkeyPatch, runtime: str | None, value: str | None
) -> None:
    monkeypatch.setattr(neuron_env, "host_versions", lambda: {RUNTIME: runtime})
    written = apply_settings(FP32, nodes=False, env={})
    assert written.get("NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS") == value


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
    assert all(setting.meaning.endswith(".") and setting.source for setting in SETTINGS)


def test_cores_are_counted_by_device(tmp_path: Path) -> None:
    for name in ("neuron0", "neuron1", "neuron15", "neuron_shm", "null"):
        (tmp_path / name).touch()
    assert neuron_cores(tmp_path) == 6


class Infinite(TorchDispatchMode):
    """Collects the operations that give an infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [t for t in pytree.tree_leaves(made) if isinstance(t, Tensor) and t.is_floating_point()]
        if any(t.isinf().any() for t in tensors):
            self.operations.add(str(func))
        return made


@pytest.mark.parametrize("kind", ["mean", "attention", "masked_lm"])
def test_nothing_infinite_is_computed_in_bfloat16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So `--enable-saturate-infinity` is not among the flags: trn1 transposes by products with 0 and 1, and would make
    NaN of an infinity."""
    model = build(kind, "masked")

    def found() -> set[str]:
        with Infinite() as infinite, torch.autocast("cpu", torch.bfloat16):
            gradients(model, predictions(model, proteins(masked=True), *LAYOUTS["packed otherwise, a filler pack"]))
        return infinite.operations

    assert found() == set()
    monkeypatch.setattr(attention, "APART", -math.inf)
    assert found(), "a mask of infinity is seen"
