"""One rank of two on gloo, which torchrun starts: trainings and evaluations in a row, in one process.

python two_ranks.py '[["train", "CONFIG.yaml"], ["evaluate", "RUN", "FILE", "TARGET.json"], ...]'

Starting a process takes longer than training a toy, so that all cases of a test file share two of them. Rank 0 prints
what the jobs have to say.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from esm_neuron.config import settings
from esm_neuron.inference.evaluate import evaluate
from esm_neuron.training import run


def main(jobs: list[list[str]]) -> None:
    """Do the jobs in order."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for number, (command, *words) in enumerate(jobs):
        # A group with keys of its own: over the same keys a second group would find the addresses of the first.
        dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=rank, world_size=world)
        if command == "train":
            run.train(settings.read_config(Path(words[0])), print)
        else:
            model, file, target = map(Path, words)
            evaluate(model, file, target, log=print)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
