"""Graphs of torch_xla that are traced once and run by their hash from then on.

torch_xla records a pass in Python, operation by operation, before it finds that it has compiled the same graph before.
For a large model on Trainium that takes longer than the pass itself. But it keeps compiled graphs by a hash, and its
bridge for torch.compile runs them so (torch_xla 2.8, `_dynamo/dynamo_bridge.py`). `GraphRunner` makes the same calls
for any function, so the loop and the models need no change.

Nothing that the function does on the host happens again. Whatever changes between two runs must therefore be a tensor
that is known by name: the batch, weights, gradients, moments, the learning rate. A tensor that was there before and is
not named is refused, because the graph would go on with its old value in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from esm_neuron.backends.base import Named, Pass
from esm_neuron.config import Tracing
from esm_neuron.data.dataset import Batch
from esm_neuron.errors import TrainingError

logger = logging.getLogger(__name__)

NOT_CACHED = "Check failed: cachedComputation"
"""In torch_xla's error for a hash that it has no graph for."""
COMPARED = 3
"""Runs of a graph that `loop.tracing: compare` makes both ways."""
SEED_ADDED, SEED_TIMES, SEED_SIZE = 1012031, 7012063, 1 << 64
"""How torch_xla moves its seed from one graph to the next (2.8, `xla_graph_executor.cpp`, `MarkStep`)."""


class GraphRunner:
    """Runs a function on a torch_xla device: one graph for each shape of batch.

    `named` returns all tensors that the function may read or change, in the same order each time.
    """

    def __init__(
        self,
        torch_xla: Any,
        device: torch.device,
        fn: Pass,
        named: Callable[[], Named],
        how: Tracing,
        again: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Within `again()` a graph is compiled again that torch_xla may have dropped: it keeps 1,024."""
        self._torch_xla, self._device, self._fn, self._named, self._how = torch_xla, device, fn, named, how
        self._again = again
        self._graphs: dict[str, TracedGraph] = {}
        self._lazily: set[str] = set()  # shapes whose two ways were found to differ

    def __call__(self, *batch: Batch) -> tuple[Tensor, ...]:
        """Run the function once; returned tensors are new ones, computed or about to be."""
        shape = str([b.signature() for b in batch])
        if self._how == "always" or shape in self._lazily:
            return self._trace_and_run(*batch)
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._traced(*batch)
        if self._how == "compare" and graph.runs < COMPARED:
            with self._again() if graph.runs else nullcontext():
                return self._run_both(shape, graph, *batch)
        return self._run(graph, *batch)

    def _trace_and_run(self, *batch: Batch) -> tuple[Tensor, ...]:
        results = self._fn(*batch)
        self._torch_xla.sync()
        return results

    def _run(self, graph: TracedGraph, *batch: Batch) -> tuple[Tensor, ...]:
        try:
            return graph.run(_tensors(batch))
        except RuntimeError as error:
            if NOT_CACHED not in str(error):
                raise
        with self._again():
            graph.trace(self._fn, self._all(batch), batch)
        return graph.run(_tensors(batch))

    def _traced(self, *batch: Batch) -> TracedGraph:
        graph = TracedGraph(self._torch_xla, self._device)
        graph.trace(self._fn, self._all(batch), batch)
        return graph

    def _all(self, batch: Sequence[Batch]) -> dict[str, Tensor]:
        return dict(self._named()) | _tensors(batch)

    def _run_both(self, shape: str, graph: TracedGraph, *batch: Batch) -> tuple[Tensor, ...]:
        """Run by hash, put everything back, run by tracing, and compare the two to the bit."""
        before = {name: self._copy(tensor) for name, tensor in graph.changed.items()}
        seed = self._torch_xla._XLAC._xla_get_rng_seed()
        self._torch_xla.sync()
        self._torch_xla.core.xla_model.set_rng_state(seed, str(self._device))
        self._torch_xla.core.xla_model.wait_device_ops()
        by_hash = self._values(graph.changed, self._run(graph, *batch))
        for name, tensor in graph.changed.items():
            tensor.data = before[name]
        self._torch_xla.core.xla_model.set_rng_state(seed, str(self._device))
        results = self._trace_and_run(*batch)
        traced = self._values(graph.changed, results)
        different = [name for name in traced if not torch.equal(traced[name], by_hash[name])]
        if different:
            self._lazily.add(shape)
            logger.warning(
                "the graph of %s gives other bits when it is run by its hash than when it is traced: %d of %d tensors "
                "differ, the first is %s; from here on it is traced at each pass, as with loop.tracing=always",
                self._fn.__name__, len(different), len(traced), different[0],
            )  # fmt: skip
        return results

    def _values(self, changed: Mapping[str, Tensor], results: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the bits, on the host, of what a graph changed and returned."""
        named = {**changed, **{f"result {number}": tensor for number, tensor in enumerate(results)}}
        if not self._torch_xla.runtime.is_spmd():
            return {name: _bits(tensor.cpu()) for name, tensor in named.items()}
        # each device's part as it is: joining the parts would compile a graph for each tensor
        self._torch_xla.core.xla_model.wait_device_ops()
        parts = self._torch_xla._XLAC._get_local_shards([tensor.detach() for tensor in named.values()])
        found = zip(named, parts, strict=True)
        return {name: torch.cat([_bits(part) for part, _ in shards]) for name, shards in found}

    def _copy(self, tensor: Tensor) -> Tensor:
        copy, marks = tensor.detach().clone(), self._torch_xla._XLAC._get_xla_op_sharding(tensor)
        if marks is not None:
            self._torch_xla._XLAC._xla_mark_sharding(copy, marks)
        return copy


class TracedGraph:
    """One graph as torch_xla keeps it: its hash, what it reads and what it changes."""

    def __init__(self, torch_xla: Any, device: torch.device) -> None:
        self._torch_xla, self._xlac, self._device = torch_xla, torch_xla._XLAC, device
        self.runs = 0
        self.changed: dict[str, Tensor] = {}
        """Named tensors that the graph changes in place."""
        self._hash: Any = None
        self._inputs: list[Tensor] = []
        self._batch: list[tuple[int, str]] = []  # place among the inputs, field of the batch
        self._seeds: list[int] = []
        self._order: list[int] = []  # place in (changed, returned) of each output

    def trace(self, fn: Pass, named: Mapping[str, Tensor], batch: Sequence[Batch]) -> None:
        """Trace `fn` on `batch` and compile its graph, without running it. Every named tensor keeps its value."""
        xlac, xm, tensors = self._xlac, self._torch_xla.core.xla_model, list(named.values())
        drawn_from = xlac._xla_get_rng_seed()
        self._torch_xla.sync()
        xm.wait_device_ops()
        names = _by_buffer(xlac, named)
        first_new = xlac._xla_get_tensor_id(torch.empty(1, device=self._device))
        results = [self._computed(result) for result in fn(*batch)]
        changes = xlac._check_tensor_need_materialization(tensors)
        self.changed = {name: t for (name, t), change in zip(named.items(), changes, strict=True) if change}
        # In the order in which a sync collects them, so that the graph is the one that it compiles.
        outputs = [*self.changed.values(), *results]
        self._order = sorted(range(len(outputs)), key=lambda place: xlac._xla_get_tensor_id(outputs[place]))
        outputs = [outputs[place] for place in self._order]
        found, values = xlac._get_tensors_xla_device_data_node(outputs)
        seed = xlac._get_seed_info_id()
        # by buffer, since an output of a graph over several devices has lost its tensor's number
        known = [names.get(handle) for handle in xlac._get_tensors_handle(values)]
        unnamed = [(i, v) for i, v, name in zip(found, values, known, strict=True) if not name and i != seed]
        _check_constant(unnamed, first_new)
        if unread := set(self.changed) - set(known):
            raise RuntimeError(f"a graph overwrites {min(unread)} without reading it, so its value cannot be put back")
        self._inputs = [named[name] if name else value for name, value in zip(known, values, strict=True)]
        fields = _tensors(batch)
        self._batch = [(place, name) for place, name in enumerate(known) if name in fields]
        self._seeds = [place for place, number in enumerate(found) if number == seed]
        self._compile(outputs, [value for name, value in zip(known, values, strict=True) if name in self.changed])
        xm.set_rng_state(drawn_from, str(self._device))
        # The trace has changed them in place: put their values back.
        for name, value in zip(known, values, strict=True):
            if name in self.changed:
                named[name].data = value

    def _computed(self, result: Tensor) -> Tensor:
        # Without functionalization a clone is the tensor's own buffer, which the graph may overwrite.
        return result if self._xlac._check_tensor_need_materialization([result])[0] else result * 1

    def _compile(self, outputs: list[Tensor], changed: list[Tensor]) -> None:
        xlac = self._xlac
        donates = xlac._xla_get_enable_alias_with_buffer_donor_config()
        for value in changed:  # their memory becomes the results'
            xlac._set_buffer_donation(value, True)
        xlac._xla_set_enable_alias_with_buffer_donor_config(True)
        try:
            self._hash = xlac._get_graph_hash(outputs)
            xlac._xla_warm_up_cache(outputs, [])
        finally:
            xlac._xla_set_enable_alias_with_buffer_donor_config(donates)
            for value in changed:  # other graphs may read them
                xlac._set_buffer_donation(value, False)
            xlac._clear_pending_irs(str(self._device))
            # a collective of this trace is no part of the next, which would wait for it forever
            xlac._set_all_reduce_token(str(self._device), None)

    def run(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Run the graph; return what the function returns."""
        for place, name in self._batch:
            self._inputs[place] = batch[name]
        for place in self._seeds:
            self._inputs[place] = self._xlac._get_base_seed_as_tensor(str(self._device))
        self.runs += 1
        outputs = self._xlac._run_cached_graph(self._hash, self._inputs)
        if self._seeds:
            seed = (SEED_ADDED + self._xlac._xla_get_rng_seed() * SEED_TIMES) % SEED_SIZE
            self._torch_xla.core.xla_model.set_rng_state(seed, str(self._device))
        values = [value for _, value in sorted(zip(self._order, outputs, strict=True), key=lambda pair: pair[0])]
        for tensor, value in zip(self.changed.values(), values, strict=False):
            tensor.data = value
        return tuple(values[len(self.changed) :])


def _tensors(batch: Sequence[Batch]) -> dict[str, Tensor]:
    return {f"batch.{name}": tensor for b in batch for name, tensor in b.tensors().items()}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)  # by value, NaN would differ from itself


def _by_buffer(xlac: Any, named: Mapping[str, Tensor]) -> dict[int, str]:
    """Return the name of the tensor that owns each buffer.

    Raise where two tensors are one buffer: a graph has it as one input, and would go on with the value of one of them.
    """
    owners: dict[int, str] = {}
    for (name, tensor), handle in zip(named.items(), xlac._get_tensors_handle(list(named.values())), strict=True):
        if owners.setdefault(handle, name) != name:
            raise RuntimeError(f"{name} and {owners[handle]} are one buffer ({list(tensor.shape)}) on the device")
    return owners


def _check_constant(unnamed: Iterable[tuple[int, Tensor]], first_new: int) -> None:
    """Raise TrainingError for an input, (tensor number, value), that was there before the trace.

    Those that the trace itself made come from Python, whose values are constant in a traced function, as are the
    numbers that torch_xla keeps on the device, which have no tensor (-1). What a graph over several devices has
    computed has lost its tensor too, and is known by its dimensions.
    """
    for number, value in unnamed:
        has_tensor = number >= 0
        if (has_tensor and number < first_new) or (not has_tensor and value.ndim > 0):
            raise TrainingError(
                f"a graph reads a tensor ({value.dtype} {list(value.shape)}) that is neither of the batch nor of the "
                "model or its optimizer: its value would never change again; make it a buffer of the model, or use "
                "--loop.tracing always"
            )
