"""Two nodes that are two network namespaces of this machine: real Open MPI, a slow line, and one that breaks.

Each node has its address as its name, so that what asks for a node's name finds the other's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from helpers.processes import wait_for
from helpers.runs import step_lines

from esm_neuron.config import TrainConfig, settings

pytestmark = [
    pytest.mark.launchers,
    pytest.mark.skipif(
        os.geteuid() != 0 or any(shutil.which(name) is None for name in ("ip", "unshare")),
        reason="needs root, ip and unshare; with them: make test-launchers",
    ),
]

ROOT = Path(__file__).parents[2]
LINE = Path(__file__).parent / "programs" / "line.py"
PATIENCE = 540
"""Seconds that a run of two processes may take on a busy machine."""
STEPS = 40
INSIDE = 'hostname "$0"; exec "$@"'

Toy = Callable[..., TrainConfig]


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Node:
    """A namespace with one address on the line to the other node."""

    name: str
    address: str
    device: str

    def words(self, *command: str) -> list[str]:
        """A command as it is run on this node."""
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", INSIDE, self.address, *command]

    def line(self, state: str) -> None:
        """Set the line up or down."""
        assert ip("ip", "netns", "exec", self.name, "ip", "link", "set", self.device, state).returncode == 0


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Two nodes with a line between them."""
    mark = os.getpid()
    both = [Node(f"esm-{mark}-{n}", f"10.97.0.{n}", f"e{n}-{mark}") for n in (1, 2)]
    made = [ip("ip", "netns", "add", node.name) for node in both]
    if any(one.returncode for one in made):
        pytest.skip(f"no network namespaces here: {made[0].stderr.strip()}; where they are: make test-launchers")
    try:
        one, other = both
        commands = [f"ip link add {one.device} type veth peer name {other.device}"]
        for node in both:
            inside = f"ip netns exec {node.name} ip"
            commands += [f"ip link set {node.device} netns {node.name}", f"{inside} link set lo up"]
            commands += [
                f"{inside} addr add {node.address}/24 dev {node.device}",
                f"{inside} link set {node.device} up",
            ]
        for command in commands:
            done = ip(*command.split())
            assert done.returncode == 0, f"{command}: {done.stderr}"
        yield both
    finally:
        for node in both:
            ip("ip", "netns", "del", node.name)


@pytest.fixture(scope="module")
def cfg(module_toy: Toy) -> TrainConfig:
    """A run over two nodes that gives up on a peer after a minute."""
    loop = {"max_steps": STEPS, "packs_per_step": 4, "packs_per_device": 1, "eval_every": STEPS, "watchdog": 60}
    return module_toy("lines", loop=loop, checkpoint={"every": 5}, log={"every": 1})


def start(nodes: list[Node], cfg: TrainConfig, folder: Path) -> list[subprocess.Popen[str]]:
    """torchrun.sh on both nodes."""
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(settings.dump(replace(cfg, output=str(folder / "out"))))
    started = []
    for rank, node in enumerate(nodes):
        by_hand = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": nodes[0].address, "MAX_RESTARTS": "0"}
        words = node.words(str(ROOT / "launchers" / "torchrun.sh"), "--config", str(folder / "run.yaml"))
        with (folder / f"node{rank}.log").open("a") as log:
            env = {**environment(), **by_hand}
            started.append(subprocess.Popen(words, cwd=folder, env=env, stdout=log, stderr=log, text=True))
    return started


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": "1", "PYTHONPATH": str(ROOT)}


def said(folder: Path) -> list[str]:
    return [(folder / f"node{rank}.log").read_text() for rank in range(2)]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "out" / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(nodes: list[Node], cfg: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of a run whose line holds."""
    folder = tmp_path_factory.mktemp("lines") / "whole"
    codes = [process.wait(PATIENCE) for process in start(nodes, cfg, folder)]
    assert codes == [0, 0], "\n".join(text[-3000:] for text in said(folder))
    return weights(folder)


def test_both_sides_of_a_broken_line_end_with_the_reason_and_the_resume_is_exact(
    nodes: list[Node], cfg: TrainConfig, whole: str, tmp_path: Path, shown: Callable[..., None]
) -> None:
    folder = tmp_path / "broken"
    out = replace(cfg, output=str(folder / "out"))
    processes = start(nodes, cfg, folder)
    wait_for(lambda: (folder / "out" / "metrics.jsonl").exists() and len(step_lines(out)) > 12, PATIENCE, processes)
    nodes[0].line("down")
    try:  # the workers; torchrun itself waits for its store, up to 600 s (launchers/torchrun.sh)
        late, lost = "has taken more than 60 s (loop.watchdog)", "a peer has failed or does not answer"
        wait_for(lambda: all(late in text or lost in text for text in said(folder)), PATIENCE)
    finally:
        nodes[0].line("up")
    assert 0 not in [process.wait(PATIENCE) for process in processes]
    codes = [process.wait(PATIENCE) for process in start(nodes, cfg, folder)]
    assert codes == [0, 0], "\n".join(text[-3000:] for text in said(folder))
    assert any("resumed after step " in text for text in said(folder))
    first, second = said(folder)
    shown({"whole": whole, "broken": weights(folder)}, first_node=first, second_node=second)
    assert weights(folder) == whole
    assert [line["step"] for line in step_lines(out)] == list(range(1, STEPS + 1))


def test_a_slow_line_that_loses_packets_changes_nothing(
    nodes: list[Node], cfg: TrainConfig, whole: str, tmp_path: Path, shown: Callable[..., None]
) -> None:
    """Each packet comes 5 ms late, one in a hundred not at all: those of gloo and of torchrun's store alike."""
    words = [sys.executable, str(LINE), *(node.name for node in nodes), "0.005", "0.01"]
    line = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert line.stdout is not None and line.stdout.readline() == "ready\n"
        slow = [replace(node, address=f"10.98.0.{n}", device="slow") for n, node in enumerate(nodes, 1)]
        for node in slow:
            inside = ("ip", "netns", "exec", node.name, "ip")
            assert ip(*inside, "addr", "add", f"{node.address}/24", "dev", node.device).returncode == 0
            node.line("up")
        codes = [process.wait(PATIENCE) for process in start(slow, cfg, tmp_path / "slow")]
    finally:
        line.terminate()
    carried, lost = map(int, line.communicate(timeout=30)[0].split())
    assert codes == [0, 0], "\n".join(text[-3000:] for text in said(tmp_path / "slow"))
    assert carried > 10 * STEPS and lost > carried / 200
    shown({"whole": whole, "slow": weights(tmp_path / "slow")}, line=f"packets: {carried} carried, {lost} lost")
    assert weights(tmp_path / "slow") == whole


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="apt-get install openmpi-bin, then make test-launchers")
def test_open_mpi_starts_a_node_each(
    nodes: list[Node], cfg: TrainConfig, whole: str, tmp_path: Path, shown: Callable[..., None]
) -> None:
    """mpirun on the first node reaches the second as it would by ssh."""
    (tmp_path / "run.yaml").write_text(settings.dump(replace(cfg, output=str(tmp_path / "out"))))
    agent = tmp_path / "agent"
    reach = f"ip netns exec {nodes[1].name} unshare --uts sh -c"
    agent.write_text(f'#!/bin/sh\nhost=$1; shift\nexec {reach} \'hostname "$0"; exec sh -c "$1"\' "$host" "$*"\n')
    agent.chmod(0o755)
    hosts = ",".join(f"{node.address}:1" for node in nodes)
    own = {**environment(), "MASTER_ADDR": nodes[0].address, "MAX_RESTARTS": "0"}
    passed = [word for name in own.keys() - os.environ.keys() | {"PYTHONPATH", "PATH"} for word in ("-x", name)]
    words = ["mpirun", "--allow-run-as-root", "--mca", "plm_rsh_agent", str(agent), "--host", hosts]
    words += ["--map-by", "ppr:1:node", *passed, str(ROOT / "launchers" / "torchrun.sh")]
    words = nodes[0].words(*words, "--config", str(tmp_path / "run.yaml"))
    done = subprocess.run(words, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    shown({"by hand": whole, "mpirun": weights(tmp_path)})
    assert weights(tmp_path) == whole
