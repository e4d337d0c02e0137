"""Devices behind one protocol (`base.Backend`). A backend is a file here and a row in `_BACKENDS`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from esm_neuron.backends.base import Backend, from_peers
from esm_neuron.config import TrainConfig
from esm_neuron.config.rules import check_backend

logger = logging.getLogger(__name__)

_BACKENDS = {
    "cpu": ("esm_neuron.backends.cpu", "CpuBackend"),
    "cuda": ("esm_neuron.backends.cuda", "CudaBackend"),
    "xla": ("esm_neuron.backends.spmd", "create"),
    "neuron": ("esm_neuron.backends.neuron", "NeuronBackend"),
}


def create_backend(cfg: TrainConfig) -> Backend:
    """The backend that `cfg.backend` names; its vendor packages are imported only now.

    Raises:
        ConfigError: a package or device it needs is missing, or the world or the settings do not fit it.
    """
    check_backend(cfg)
    module, name = _BACKENDS[cfg.backend]
    backend: Backend = getattr(import_module(module), name)(cfg)
    return backend


@contextmanager
def opened_backend(cfg: TrainConfig) -> Iterator[Backend]:
    """`create_backend`, and its `close` at the end; after an error without waiting for peers, who may be gone.

    Raises:
        ConfigError: as `create_backend`.
        TrainingError: a collective within the block failed because a peer is gone or does not answer.
    """
    backend = create_backend(cfg)
    try:
        with from_peers(backend.topology):
            yield backend
    except BaseException:
        try:
            backend.close(wait=False)
        except RuntimeError as error:  # of groups whose peers are gone; the first error is the one to be read
            logger.warning("leaving the process group failed too: %s", error)
        raise
    backend.close()
