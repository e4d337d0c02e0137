"""The program examples/datasets/get.py as a module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_PATH = Path(__file__).parents[2] / "examples" / "datasets" / "get.py"
_SPEC = importlib.util.spec_from_file_location("datasets_get", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
download = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = download  # dataclasses look their module up
_SPEC.loader.exec_module(download)
