"""What a rank does with what its peers say, or no longer say; no second process is needed for it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from esm_neuron.backends import opened_backend
from esm_neuron.backends.base import from_peers
from esm_neuron.backends.cpu import CpuBackend
from esm_neuron.backends.topology import Topology
from esm_neuron.config import TrainConfig
from esm_neuron.distributed import from_main_rank, main_rank_only, raise_on_any_rank
from esm_neuron.errors import CheckpointError, ConfigError, TrainingError
from esm_neuron.files import sha256
from esm_neuron.training import checkpoint
from esm_neuron.training.checkpoint import CheckpointManager, Snapshot, TrainState


class Peer:
    """A rank of two, for what needs no second process: its peer has this to say."""

    def __init__(self, rank: int, theirs: Any) -> None:
        self.topology, self.theirs = Topology(rank=rank, local_rank=rank, world=2), theirs

    def gather_host(self, value: Any) -> list[Any]:
        return [value, self.theirs] if self.topology.rank == 0 else [self.theirs, value]


def test_what_fails_on_one_rank_fails_on_both_with_one_error() -> None:
    def fail() -> None:
        raise ConfigError("the output is in use")

    failed = ConfigError("the output is in use")
    with pytest.raises(ConfigError, match="^the output is in use$"):
        main_rank_only(Peer(0, None), fail)
    with pytest.raises(ConfigError, match="^rank 0: the output is in use$"):
        main_rank_only(Peer(1, failed), fail)
    with pytest.raises(ConfigError, match="^rank 1: the output is in use$"):
        raise_on_any_rank(Peer(0, failed), lambda: 5)
    assert raise_on_any_rank(Peer(0, None), lambda: 5) == 5
    assert main_rank_only(Peer(1, None), fail) is None, "only the main rank acts"


def test_what_only_the_main_rank_can_read_reaches_all() -> None:
    class Broadcasting(Peer):
        def broadcast_host(self, value: Any) -> Any:
            return value if self.topology.is_main else "read by rank 0"

    def unreadable() -> str:
        raise OSError("only on the first node")

    assert from_main_rank(Broadcasting(0, None), lambda: "mine") == "mine"
    assert from_main_rank(Broadcasting(1, None), unreadable) == "read by rank 0"
    with pytest.raises(OSError, match="rank 0: only on the first node"):
        from_main_rank(Broadcasting(1, OSError("only on the first node")), unreadable)


@pytest.mark.parametrize(
    "lost",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"),
        RuntimeError("Application timeout caused pair closure"),
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0"),
        RuntimeError("nrt_execute status=5: NRT_TIMEOUT"),  # a status of Neuron's runtime; the words around are ours
    ],
)
def test_a_lost_peer_is_one_line_and_any_other_failure_stays_itself(lost: RuntimeError) -> None:
    line = "^rank 3: a peer has failed or does not answer .*; nothing is saved"
    with pytest.raises(TrainingError, match=line), from_peers(Topology(3, 3, 4)):
        raise lost
    with pytest.raises(RuntimeError, match="^the size of tensor a must match"), from_peers(Topology(3, 3, 4)):
        raise RuntimeError("the size of tensor a must match")
    with pytest.raises(type(lost)), from_peers(Topology()):  # nobody to lose
        raise lost


@pytest.mark.parametrize(("failure", "waits"), [(None, True), (TrainingError("a peer has failed"), False)])
def test_a_backend_waits_for_its_device_unless_the_run_has_failed(
    monkeypatch: pytest.MonkeyPatch, failure: TrainingError | None, waits: bool
) -> None:
    """What is still to be done on the device may wait for a peer that is gone."""
    closed: list[bool] = []
    monkeypatch.setattr(CpuBackend, "close", lambda self, wait=True: closed.append(wait))
    with pytest.raises(TrainingError) if failure else nullcontext(), opened_backend(TrainConfig()):
        if failure:
            raise failure
    assert closed == [waits]


def test_a_group_that_cannot_be_left_does_not_hide_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: CpuBackend, wait: bool = True) -> None:
        raise RuntimeError("the group is gone")

    monkeypatch.setattr(CpuBackend, "close", fail)
    with pytest.raises(TrainingError, match="a peer has failed"), opened_backend(TrainConfig()):
        raise TrainingError("a peer has failed")
    with pytest.raises(RuntimeError, match="the group is gone"), opened_backend(TrainConfig()):
        """Nothing has failed before."""


@pytest.mark.parametrize("theirs", ["same", None, "older"])
def test_each_rank_reads_a_checkpoint_that_all_see_and_the_main_one_sends_what_it_alone_has(
    tmp_path: Path, theirs: str | None
) -> None:
    whole = Snapshot(TrainState(step=3), {"w": torch.ones(2)}, {})
    mine = sha256(checkpoint.save(tmp_path / "checkpoints", whole) / "manifest.json")
    sent: list[Any] = []

    class Sending(Peer):
        def gather_host(self, value: Any) -> list[Any]:
            return [value, mine if theirs == "same" else theirs] if value == mine else [value, None]

        def broadcast_host(self, value: Any) -> Any:
            sent.append(value)
            return value

    linear = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(linear.parameters())
    manager = CheckpointManager(TrainConfig(output=str(tmp_path)), Sending(0, None), linear, optimizer)
    loaded = manager.read_weights(3)
    assert torch.equal(loaded["w"], torch.ones(2))
    assert [list(value) for value in sent] == ([] if theirs == "same" else [["w"]]), "moments stay here"
    with pytest.raises(CheckpointError, match="manifest.json"):
        manager.read_weights(4)
