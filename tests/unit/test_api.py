"""The Python API: what `import esm_neuron` offers, and that it costs nothing before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import esm_neuron


def test_every_public_name_is_found() -> None:
    for name in esm_neuron.__all__:
        assert getattr(esm_neuron, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'tran'"):
        esm_neuron.tran  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, esm_neuron; esm_neuron.TrainConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
