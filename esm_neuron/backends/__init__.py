"""Devices behind one base class (`base.Backend`). Each backend has its code here and a row in `config/backends.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from esm_neuron.config import TrainConfig
from esm_neuron.config.backends import BACKENDS
from esm_neuron.config.deferred import uncollected
from esm_neuron.config.rules import check_backend

if TYPE_CHECKING:
    from esm_neuron.backends.base import Backend

logger = logging.getLogger(__name__)


def import_object(name: str) -> Any:
    """Import what a row of the table of backends names as `module:name`."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def create_backend(cfg: TrainConfig) -> Backend:
    """Return the backend that `cfg.backend` names, importing its vendor packages; raise ConfigError where one lacks."""
    check_backend(cfg)
    backend: Backend = import_object(BACKENDS[cfg.backend].make)(cfg)
    return backend


@contextmanager
def opened_backend(cfg: TrainConfig) -> Iterator[Backend]:
    """Create the backend and close it at the end; after an error without waiting for peers, which may be gone."""
    with uncollected():
        backend = create_backend(cfg)
        from esm_neuron.backends.base import from_peers
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
