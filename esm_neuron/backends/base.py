"""The base class of all backends: one process with one CPU-like device. A backend overrides what differs there.

The training loop knows this class and nothing of any vendor package. The arithmetic of an optimizer step that all
backends share is below the class.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esm_neuron.backends.topology import Topology
from esm_neuron.compat import DTensor
from esm_neuron.config import OptimConfig, TrainConfig
from esm_neuron.config.backends import BACKENDS
from esm_neuron.data.dataset import Batch
from esm_neuron.errors import CheckpointError, TrainingError
from esm_neuron.models.lora import store_frozen_linears
from esm_neuron.models.tensor_parallel import Shard

T = TypeVar("T")
Pass = Callable[..., tuple[Tensor, ...]]
"""What runs as one graph: takes nothing or a batch, changes tensors in place, returns new ones."""
Named = Iterable[tuple[str, Tensor]]

BUCKET = 64 << 20
"""Bytes of gradients that are summed over the ranks at a time."""
LARGEST = 3e38
"""A loss or norm from here on is infinite: Neuron's compiler writes infinity as float32's largest number, 3.4e38."""
PEER_LOST = re.compile(r"gloo|connection|broken pipe|socket|timed?[ _]?out", re.IGNORECASE)
"""In what torch.distributed, its stores and device runtimes say of a collective that a peer has left."""


@dataclass(frozen=True)
class Trained:
    """One trained parameter and what the optimizer of this process keeps of it."""

    name: str
    parameter: Tensor
    master: Tensor
    """What the optimizer updates: the parameter itself, or a copy of some of its rows (ZeRO-1)."""
    state: dict[str, Any]
    """The optimizer's state of `master`: tensors of its shape, scalars, or a plain count of steps."""


class Backend:
    """One process's view of its device and of its peers.

    Call order: `shard` (model on meta), weights, adapters, `prepare`, `optimizer`. Then for every optimizer step, per
    pass `seed` and a function made by `graph` that calls `backward`, and one made by `graph` that calls `step`.
    """

    local_dp: int = 1
    """Data-parallel devices that this process drives as one: 1, but the mesh's degree under SPMD. A pass of the process
    holds that many times `loop.packs_per_device` packs; it reads them all, so the topology counts them as one."""
    attention: str = "segments"
    """Which of `attention.ATTENTIONS` fits the device."""
    lora_modules: Mapping[type, type] = {}
    """Linear class -> LoRA layer class, for linears that PEFT does not know."""
    host_group: dist.ProcessGroup | None = None
    """Processes that exchange values over the host; None: the default group."""

    def __init__(self, cfg: TrainConfig, device: torch.device | None = None, topology: Topology | None = None) -> None:
        """Set up a single process on the CPU, unless a device and the place of this process are given."""
        self.device = device or torch.device("cpu")
        self.topology = topology or Topology()
        self.static_shapes = BACKENDS[cfg.backend].compiles  # a new shape means a new graph
        self._bf16 = cfg.loop.precision == "bf16"

    # The model ------------------------------------------------------------------------------------------------------

    def shard(self, model: nn.Module) -> None:
        """Swap or mark the linears of the tensor-parallel plan, before weights and adapters come."""

    def part(self, name: str, shape: tuple[int, ...]) -> Shard | None:
        """Return what this rank holds of the whole parameter `name` of `shape`; None for all of it."""
        return None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Store the model in the precision of the run and move it to the device; inference needs no more than this."""
        if self._bf16:
            store_frozen_linears(model, torch.bfloat16)
        self.move(model)
        self.sync()
        return model

    def move(self, model: nn.Module) -> None:
        """Move the model to the device, in place."""
        model.to(self.device)

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Lay the packs (dimension 0) of a batch's tensors, already on the device, over the `local_dp` devices."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass: mixed precision, or nothing."""
        return nullcontext()

    def checkpoint_fn(self) -> Callable[..., Any]:
        """Return the function that computes a block again in the backward pass (torch's, or a device's own)."""

        def recompute(fn: Callable[..., Any], *args: Any) -> Any:
            return checkpoint(fn, *args, use_reentrant=False)

        return recompute

    # An optimizer step ----------------------------------------------------------------------------------------------

    def optimizer(
        self, model: nn.Module, groups: Sequence[Mapping[str, Any]], cfg: OptimConfig
    ) -> torch.optim.Optimizer:
        """Return AdamW over `groups`, parameters of `model`, with its state and zeroed gradient buffers made."""
        rate = torch.tensor(cfg.lr, dtype=torch.float32, device=self.device)
        return adamw(groups, cfg, rate, fused=True)

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """Add the gradients of `loss` to those of the trained parameters."""
        loss.backward()

    def set_lr(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Set the learning rate of the next update."""
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def seed(self, *numbers: int) -> None:
        """Seed the device's generator from (run seed, step, pass): equal on TP ranks, different on DP ranks."""
        torch.manual_seed(mix_seed(*numbers, self.topology.dp_rank))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, totals: Tensor, max_norm: float) -> Tensor:
        """Sum gradients over data-parallel ranks, divide by the global weight, clip, update, zero the gradients.

        `totals`, [2] on the device, is this rank's loss sum and weight since the last step; it becomes all ranks' sums.
        A `max_norm` of 0 is no clipping. Return the norm before clipping, a scalar on the device, the same on every
        rank; where it or the loss is not finite, weights, moments and their count of steps stay as they are.
        """
        totals = self.all_reduce(totals)
        return normalise_clip_update(trainable(model), optimizer, totals, max_norm, lazy=self.static_shapes)

    def graph(self, fn: Pass, named: Callable[[], Named]) -> Pass:
        """Return `fn`, which takes nothing or a batch on the device, as a function that runs as one graph.

        `named` yields every tensor, with its name, that `fn` may read or change beside the batch.
        """

        def run(*batch: Batch) -> tuple[Tensor, ...]:
            results = fn(*batch)
            self.sync()
            return results

        return run

    def sync(self) -> None:
        """End a graph: run what has been recorded (eager devices have already run it)."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over data-parallel ranks, on the device."""
        return tensor

    def sum_over_ranks(self, tensors: Sequence[Tensor], most: int = BUCKET) -> None:
        """Replace each tensor by its sum over data-parallel ranks, up to `most` bytes of them at a time."""
        # One collective per bucket and not per tensor; the bucket's size bounds the flat copy.
        for bucket in buckets(tensors, most):
            flat = self.all_reduce(torch.cat([tensor.flatten() for tensor in bucket]))
            for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    # The host -------------------------------------------------------------------------------------------------------

    def on_host(self, fn: Callable[..., None], *tensors: Tensor) -> None:
        """Run `fn` with the tensors' values once they are there; never blocks a graph."""
        fn(*(tensor.cpu() for tensor in tensors))

    def gather_host(self, value: T) -> list[T]:
        """Return one value of every rank, in rank order, on every rank; over the host, not the device."""
        if self.topology.world == 1:
            return [value]
        values: list[Any] = [None] * self.topology.world
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def broadcast_host(self, value: T) -> T:
        """Return rank 0's value on every rank; over the host, not the device."""
        values = [value]
        if self.topology.world > 1:
            dist.broadcast_object_list(values, group=self.host_group)
        return values[0]

    # Weights and optimizer state ------------------------------------------------------------------------------------

    def fetch(self, item: Trained, tensor: Tensor) -> Tensor:
        """Return the whole of a tensor of `item` on the host, contiguous; called by all ranks, complete on rank 0."""
        return copy_to_host(tensor)

    def place(self, item: Trained, whole: Tensor, target: Tensor) -> Tensor:
        """Return what is to be copied into `target`, a tensor of `item`, of the whole tensor on the host."""
        return whole

    def whole_shape(self, item: Trained, tensor: Tensor) -> tuple[int, ...]:
        """Return the shape that `fetch` gives a tensor of `item`."""
        return tuple(tensor.shape)

    def trained(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Trained]:
        """Return every trained parameter by name, with what `optimizer` keeps of it."""
        return list(trained(model, optimizer))

    def written(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, items: Sequence[Trained]) -> None:
        """Hand back `items` of `trained` whose values were written in place."""

    def gather_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return whole parameters and optimizer state (`name/exp_avg`...) on rank 0's host; called by all ranks."""
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for item in self.trained(model, optimizer):
            # Every rank calls `fetch`, which may gather over ranks; the results are kept on rank 0 alone.
            whole = self.fetch(item, item.master)
            state = {f"{item.name}/{kind}": self.fetch(item, torch.as_tensor(v)) for kind, v in item.state.items()}
            if self.topology.is_main:
                weights[item.name] = whole
                moments |= state
        return weights, moments

    def load_state(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
    ) -> None:
        """Put back what `gather_state` returned, at any world size, without making new tensors."""
        items = self.trained(model, optimizer)
        self._load_weights(items, weights)
        for item in items:
            # The optimizer updates its master copies: left as they were, they would undo the restored weights at the
            # next step.
            if item.master is not item.parameter:
                self._copy(item, weights[item.name], item.master)
            for kind, value in item.state.items():
                saved = moments.get(f"{item.name}/{kind}")
                if saved is None or tuple(saved.shape) != self.whole_shape(item, torch.as_tensor(value)):
                    raise CheckpointError(
                        f"the saved optimizer state has no {kind} of {item.name} that fits; delete the checkpoint's "
                        "folder"
                    )
                if isinstance(value, Tensor):
                    self._copy(item, saved, value)
                else:  # a plain count of steps
                    item.state[kind] = type(value)(saved.item())
        self.written(model, optimizer, items)
        self.sync()

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Put back the trained parameters alone, as `load_state` does."""
        items = self.trained(model)
        self._load_weights(items, weights)
        self.written(model, None, items)
        self.sync()

    def _load_weights(self, items: Sequence[Trained], weights: Mapping[str, Tensor]) -> None:
        mine = {item.name: item for item in items}
        different = sorted(set(mine) ^ set(weights)) or [
            name for name, item in mine.items() if self.whole_shape(item, item.parameter) != tuple(weights[name].shape)
        ]
        if different:
            raise CheckpointError(
                f"the saved weights do not fit the model: {len(different)} parameters differ, the first is "
                f"{different[0]}; use the configuration they were trained with"
            )
        for name, item in mine.items():
            self._copy(item, weights[name], item.parameter)

    def _copy(self, item: Trained, whole: Tensor, target: Tensor) -> None:
        with torch.no_grad():
            target.copy_(self.place(item, whole, target))

    # The run --------------------------------------------------------------------------------------------------------

    def notes(self) -> Iterator[str]:
        """Yield settings that are legal and rarely meant on this machine."""
        yield from ()

    def compile_note(self) -> str | None:
        """Return how graphs are compiled faster than by `esm-neuron compile` as it was started; None: in no way."""
        return None

    def graphs(self) -> int:
        """Return how many graphs have been compiled so far; 0 on eager devices."""
        return 0

    def peak_memory(self) -> int | None:
        """Return the most bytes of tensors that the device has held so far; None where it does not say."""
        return None

    def close(self, wait: bool = True) -> None:
        """Leave the process group; with `wait`, once the device has done all it was told."""


def trained(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Trained]:
    """Yield every trained parameter of `model`, in its order, with its optimizer state."""
    # torch_xla's ZeRO-1 holds an optimizer of its own, over this rank's rows of each parameter
    inner: torch.optim.Optimizer | None = getattr(optimizer, "base_optimizer", optimizer)
    masters: dict[int, Tensor] = {}
    if optimizer is not None and inner is not None:
        for outside, inside in zip(optimizer.param_groups, inner.param_groups, strict=True):
            masters |= {id(p): master for p, master in zip(outside["params"], inside["params"], strict=True)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            master = masters.get(id(parameter), parameter)
            yield Trained(name, parameter, master, {} if inner is None else inner.state[master])


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield by name every tensor that a pass or an update may read or change: weights, buffers, gradients, moments."""
    yield from model.named_buffers()
    for name, parameter in model.named_parameters():
        yield name, parameter
        if parameter.grad is not None:
            yield f"{name}/grad", parameter.grad
    for item in trained(model, optimizer):
        if item.master is not item.parameter:
            yield f"{item.name}/master", item.master
        yield from ((f"{item.name}/{kind}", value) for kind, value in item.state.items() if isinstance(value, Tensor))
    if optimizer is not None and isinstance(
        rate := optimizer.param_groups[0]["lr"], Tensor
    ):  # one tensor for all groups
        yield "lr", rate


def buckets(tensors: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Yield the tensors in order, in lists of at most `most` bytes; one that is larger comes alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > most:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, the same memory; the tensor itself where it is not cut."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def startable(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give every parameter of `groups` a zero gradient that stays; return the groups as torch's optimizers take them.

    With gradients and state made before the first pass, that one traces like all others.
    """
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    return [{key: group[key] for key in ("params", "weight_decay")} for group in groups]


def make_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def move_keeping_ties(model: nn.Module, device: torch.device) -> None:
    """Move `model`; a parameter in several places stays one.

    On XLA `.to` makes a new one in each place, and the embedding and the LM head's decoder, one tensor in ESM-2, would
    be trained apart.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    model.to(device)
    for (module, name), *others in places.values():
        for owner, leaf in others:
            setattr(owner, leaf, getattr(module, name))


def adamw(groups: Sequence[Mapping[str, Any]], cfg: OptimConfig, rate: Tensor, **kind: bool) -> torch.optim.AdamW:
    """Return AdamW that is ready to trace; its groups share `rate`, the learning rate on the device."""
    # AdamW compares its rate with 0: given a tensor of a lazy device, it would read that device (and ahead-of-time
    # compilation answers every read with 0)
    optimizer = torch.optim.AdamW(startable(groups), lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, **kind)
    for group in optimizer.param_groups:
        group["lr"] = rate
    make_state(optimizer, rate.device)
    return optimizer


def normalise_clip_update(
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    totals: Tensor,
    max_norm: float,
    total_norm: Callable[[list[Tensor]], Tensor] = torch.nn.utils.get_total_norm,
    lazy: bool = False,
) -> Tensor:
    """Turn summed gradients into the mean's, clip them, update, and zero the buffers in place.

    `totals`, [2], is the step's loss sum and weight over all ranks; a weight of 0 leaves zero gradients. `total_norm`
    takes the norm over all ranks. With `lazy`, where reading a value would break a compiled graph, an update by a norm
    that is not finite is made and undone on the device. Otherwise as `Backend.step`.
    """
    # Mean and clipping are one factor, so that each gradient is scaled in one go.
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    scale = mean_scale(totals)
    norm = total_norm(grads) * scale
    if max_norm > 0:
        scale = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale)
    if lazy:
        undo = undoable(optimizer)
        optimizer.step()
        undo(norm)
    elif is_number(norm):
        optimizer.step()
    for grad in grads:
        # Zeroed and not dropped: the next step must find the same buffers (see `startable`).
        grad.zero_()
    return norm


def patience(cfg: TrainConfig) -> timedelta:
    """Return how long ranks wait for each other: half an hour, or what the watchdog allows the slowest part."""
    return timedelta(seconds=max(1800, cfg.loop.watchdog + cfg.loop.watchdog_slow))


def mean_scale(totals: Tensor) -> Tensor:
    """Return the factor from summed gradients to the mean's: 1 / weight, or NaN where the loss is not finite.

    A NaN reaches every gradient, and through their norm every rank, so that all ranks leave the same steps out.
    """
    loss, weight = totals[0], totals[1]
    scale = 1.0 / torch.where(weight > 0, weight, torch.ones_like(weight))
    return torch.where(is_number(loss), scale, torch.full_like(scale, float("nan")))


def is_number(value: Tensor) -> Tensor:
    """Return whether a loss or a norm is neither NaN nor infinite, nor what Neuron's compiler makes of infinity."""
    return value.abs() < LARGEST


def undoable(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    """Return a function to call after the update: it puts everything back, on the device, if the norm is not finite.

    It does so by a selection that XLA fuses into the update, so no second copy is kept. Under ZeRO-1 it covers the
    shards too.
    """
    inner: torch.optim.Optimizer = getattr(optimizer, "base_optimizer", optimizer)
    # By identity: without ZeRO-1 both optimizers are one, and each parameter would be there twice.
    held = {
        id(tensor): tensor
        for group in (*optimizer.param_groups, *inner.param_groups)
        for parameter in group["params"]
        for tensor in (parameter, *inner.state.get(parameter, {}).values())
    }
    before = {key: tensor.detach().clone() for key, tensor in held.items()}

    def undo(norm: Tensor) -> None:
        sound = is_number(norm)
        with torch.no_grad():
            for key, tensor in held.items():
                tensor.copy_(torch.where(sound, tensor, before[key]))

    return undo


@contextmanager
def from_peers(topology: Topology) -> Iterator[None]:
    """Turn a lost peer's failure within the block into a TrainingError of one line; any other goes up as it is."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or PEER_LOST.search(str(error))
        if topology.world == 1 or not lost:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(
            f"rank {topology.rank}: a peer has failed or does not answer ({reason}); nothing is saved from here on. "
            "Look for the first error among the ranks, then go on with --checkpoint.resume auto"
        ) from error


def mix_seed(*numbers: int) -> int:
    """Return one 63-bit seed for several numbers; unlike a sum, it differs for any two lists of numbers."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def copy_to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy `tensor` to `device`, as a vector: torch_xla gives equal scalars one buffer, which makes another graph."""
    return tensor.contiguous().view(-1).to(device).view(tensor.shape)
