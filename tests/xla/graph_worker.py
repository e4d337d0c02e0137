"""Counts the graph of a training pass as torch-neuronx sets torch_xla up: graph_worker.py FOLDER; prints JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(PJRT_DEVICE="CPU", USE_TORCH_XLA="0", XLA_DISABLE_FUNCTIONALIZATION="1")
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # what is compiled only sets the models up
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.graph_size import counted

if __name__ == "__main__":
    print(json.dumps(counted(Path(sys.argv[1]), "xla")))
