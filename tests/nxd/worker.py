"""One rank of a torchrun world: the real neuronx_distributed and optimum-neuron on gloo, driven through our backend.

Without NXD_CPU_MODE it is a world of one on XLA:CPU: nothing of torch_xla is replaced, so that graphs can be counted.

torchrun starts it with a file of cases; every case is a function of `cases.py`, `command_cases.py`, `memory_cases.py`
or `vendor_cases.py` and its arguments. All cases share one process, because importing NxD takes longer than training a
tiny model, and each has process groups of its own.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).resolve().parent
IMPORTS = timedelta(minutes=15)
"""How much later than its peers a rank may have imported everything."""
PEER_TIMEOUT = timedelta(seconds=60)
"""A rank that waits longer for a peer gives up: the peer has failed."""


def main(cases_file: str) -> None:
    """Run the cases in order; each leaves its results in the folder that it names."""
    warnings.filterwarnings("ignore")
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
    from standins import vendor

    vendor.install()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    import cases
    import command_cases
    import memory_cases
    import vendor_cases
    from standins import collectives

    eager = "NXD_CPU_MODE" in os.environ
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # torchrun's own store; a second process group over the same keys would find the addresses of the first
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    # On a busy machine one rank may import for minutes longer than another; that is no peer's failure.
    store.set(f"rank {rank}", "has imported")
    store.wait([f"rank {peer}" for peer in range(world)], IMPORTS)
    for number, case in enumerate(json.loads(Path(cases_file).read_text(encoding="utf-8"))):
        print(f"case {number}: {case}", flush=True)
        if eager:
            own = dist.PrefixStore(f"case {number}", store)
            dist.init_process_group("gloo", store=own, rank=rank, world_size=world, timeout=PEER_TIMEOUT)
            dist.barrier()  # a case may leave at once, and peers that still connect would find nobody
            if number == 0:
                collectives.install()
            collectives.forget_groups()
        module = next(m for m in (cases, command_cases, memory_cases, vendor_cases) if hasattr(m, case["run"]))
        getattr(module, case["run"])(**case["with"])


if __name__ == "__main__":
    main(sys.argv[1])
