"""torch_xla's process-level calls on gloo and eager CPU tensors: what a Neuron process group does on the device.

torch_xla on a CPU is a world of one process. These functions take the place of those of `torch_xla`, `xla_model` and
`runtime` that the engine, NxD and torch_xla's ZeRO-1 call in a world of several; every other public function of
the two modules raises, so that no call is served by a world of one without notice.
"""

from __future__ import annotations

import inspect
import textwrap
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Groups = Sequence[Sequence[int]] | dist.ProcessGroup | None

SERVED: list[str] = []
"""Functions of torch_xla that `install` has replaced."""
PATCHES: list[str] = []
"""What `install` changed in code that is not a stand-in, in words; docs/dev/parity.md lists them."""

_process_groups: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}
_closures: list[tuple[Callable[..., None], tuple[Any, ...]]] = []


def process_group(groups: Groups) -> dist.ProcessGroup | None:
    """The gloo group of this process among torch_xla's replica groups; made once, by all in the same order."""
    if groups is None or isinstance(groups, dist.ProcessGroup):
        return groups
    key = tuple(tuple(group) for group in groups)
    if key not in _process_groups:
        mine, _ = dist.new_subgroups_by_enumeration([list(group) for group in key])
        _process_groups[key] = mine
    return _process_groups[key]


def forget_groups() -> None:
    """Between two worlds in one process."""
    _process_groups.clear()


def all_reduce(
    reduce_type: str, inputs: Any, scale: float = 1.0, groups: Groups = None, pin_layout: bool = True
) -> Any:
    """In place for a list, as xm.all_reduce; a new tensor for a tensor."""
    group = process_group(groups)
    tensors = [inputs.clone()] if isinstance(inputs, Tensor) else inputs
    for tensor in tensors:
        dist.all_reduce(tensor.data, _operation(reduce_type), group=group)
        tensor.data.mul_(scale)
    return tensors[0] if isinstance(inputs, Tensor) else tensors


def all_gather(
    value: Tensor, dim: int = 0, groups: Groups = None, output: None = None, pin_layout: bool = True
) -> Tensor:
    """Concatenation over the group along `dim`."""
    group = process_group(groups)
    parts = [torch.empty_like(value).contiguous() for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts, dim)


def reduce_scatter(
    reduce_type: str,
    input: Tensor,
    scale: float,
    scatter_dim: int,
    shard_count: int,
    groups: Groups = None,
    output: None = None,
    pin_layout: bool = True,
) -> Tensor:
    """This process's chunk of the scaled sum."""
    group = process_group(groups)
    assert shard_count == dist.get_world_size(group)
    total = input.detach().clone().contiguous()
    dist.all_reduce(total, _operation(reduce_type), group=group)
    return total.chunk(shard_count, scatter_dim)[dist.get_rank(group)].contiguous() * scale


def all_gather_bucketized(input_list: Sequence[Tensor], bucket_cap_mb: int = 160, **kwargs: Any) -> list[Tensor]:
    """`all_gather` of each tensor."""
    return [all_gather(value, **kwargs) for value in input_list]


def reduce_scatter_bucketized(
    reduce_type: str, input_list: Sequence[Tensor], bucket_cap_mb: int = 160, **kwargs: Any
) -> list[Tensor]:
    """`reduce_scatter` of each tensor."""
    return [reduce_scatter(reduce_type, value, **kwargs) for value in input_list]


def add_step_closure(closure: Callable[..., None], args: tuple[Any, ...] = (), run_async: bool = False) -> None:
    """Kept until the end of the step, as on the device, with the values that the tensors have now."""
    _closures.append((closure, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)))


def end_step(*_: Any, **__: Any) -> None:
    """The end of a graph: run what waited for its values."""
    waiting, _closures[:] = list(_closures), []
    for closure, args in waiting:
        closure(*args)


def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """torch_xla's checkpoint adds a barrier that only XLA tensors have; torch's is the same but for it."""
    from torch.utils.checkpoint import checkpoint

    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def install() -> None:
    """Replace and close the calls described above; call after `dist.init_process_group("gloo")`."""
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.runtime as xr
    import torch_xla.utils.checkpoint

    world, rank = dist.get_world_size, dist.get_rank

    def nothing(*_: Any, **__: Any) -> None:
        """The device would wait or flush; eager torch already has."""

    served: dict[types.ModuleType, dict[str, Any]] = {
        xm: {
            "all_reduce": all_reduce,
            "all_gather": all_gather,
            "reduce_scatter": reduce_scatter,
            "all_gather_bucketized": all_gather_bucketized,
            "reduce_scatter_bucketized": reduce_scatter_bucketized,
            "add_step_closure": add_step_closure,
            "mark_step": end_step,
            "unlazy": nothing,
            "wait_device_ops": end_step,
            "set_rng_state": lambda seed, device=None: torch.manual_seed(seed),
        },
        xr: {
            "world_size": world,
            "global_device_count": world,
            "global_ordinal": rank,
            "device_type": lambda: "NEURON",
        },
    }
    for module, functions in served.items():
        _replace(module, functions)
        SERVED.extend(f"{module.__name__}.{name}" for name in functions)
    SERVED.extend(("torch_xla.device", "torch_xla.sync", "torch_xla.utils.checkpoint.checkpoint"))
    torch_xla.device = lambda *_: torch.device("cpu")
    torch_xla.sync = end_step
    torch_xla.utils.checkpoint.checkpoint = recompute
    _lift_zero1_device_check()
    _accept_replica_groups()


def _replace(module: types.ModuleType, served: dict[str, Any]) -> None:
    for name, value in list(vars(module).items()):
        if isinstance(value, types.FunctionType) and not name.startswith("_") and value.__module__ == module.__name__:
            setattr(module, name, served.get(name) or _closed(f"{module.__name__}.{name}"))


def _closed(name: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"{name} was called, and tests/nxd/standins/collectives.py does not serve it")

    return call


def _operation(reduce_type: str) -> Any:
    return {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[reduce_type]


def _lift_zero1_device_check() -> None:
    """torch_xla's ZeRO-1 asserts an XLA device, and its shard would share memory with the parameter on the CPU."""
    import torch_xla.distributed.zero_redundancy_optimizer as zero

    source = textwrap.dedent(inspect.getsource(zero.ZeroRedundancyOptimizer._shard_parameters))
    for old, new in (
        ("assert self.device.type == 'xla'", "pass"),
        ('param.data.to(device="cpu")', "param.data.clone()"),
    ):
        assert source.count(old) == 1, f"torch_xla's ZeRO-1 has changed: {old}"
        source = source.replace(old, new)
    namespace: dict[str, Any] = {}
    exec(compile(source, "_shard_parameters", "exec"), vars(zero), namespace)
    zero.ZeroRedundancyOptimizer._shard_parameters = namespace["_shard_parameters"]
    PATCHES.append("torch_xla ZeroRedundancyOptimizer._shard_parameters: no assertion of an XLA device, shards copied")


def _accept_replica_groups() -> None:
    """In NXD_CPU_MODE, NxD hands ZeRO-1's replica groups, lists of ranks, to torch.distributed, which takes groups."""
    import neuronx_distributed.parallel_layers.comm as comm
    import neuronx_distributed.parallel_layers.grads as grads

    original = comm.all_reduce

    def with_process_group(op_type: str, tensor_bucket: Any, groups: Groups, pin_layout: bool = True) -> Any:
        return original(op_type, tensor_bucket, groups=process_group(groups), pin_layout=pin_layout)

    grads.all_reduce = with_process_group
    PATCHES.append("neuronx_distributed.parallel_layers.grads.all_reduce: replica groups become process groups")
