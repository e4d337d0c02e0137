"""What the training loop asks of a device. The loop knows this protocol and nothing of any vendor package."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from esm_neuron.backends.topology import Topology
from esm_neuron.config import OptimConfig, TrainConfig
from esm_neuron.errors import CheckpointError, TrainingError
from esm_neuron.models.tensor_parallel import Shard

T = TypeVar("T")


class Backend(Protocol):
    """One process's view of its device and of its peers.

    Call order: `shard` (model on meta), weights, adapters, `prepare`, `optimizer`, then for every optimizer step one
    `seed` a pass, forward and backward, `sync`, and one `step`, `sync`.
    """

    name: str
    device: torch.device
    topology: Topology
    """Where this process is among the processes."""
    local_dp: int
    """Data-parallel devices that this process drives as one: 1, but the mesh's degree under SPMD. A pass of the process
    holds `loop.packs_per_device` times as many rows; the process reads them all, so the topology knows nothing of it."""
    static_shapes: bool
    """True where a new shape means a new compiled program."""
    attention: str
    """Which of `attention.ATTENTIONS` fits the device: "segments", "varlen" (on cuda with torch.compile
    "varlen_uncompiled") or "masked"."""

    lora_modules: Mapping[type, type]
    """Linear class -> LoRA layer class, for linears that PEFT does not know."""

    def shard(self, model: nn.Module) -> None:
        """Swap or mark the linears of the tensor-parallel plan, before weights and adapters come."""
        ...

    def part(self, name: str, shape: tuple[int, ...]) -> Shard | None:
        """What this rank holds of the whole parameter `name` of `shape`; None for all of it."""
        ...

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move to the device, in the precision of the run; answers need no more than this."""
        ...

    def spread(self, tensors: Iterable[torch.Tensor]) -> None:
        """Lay the rows (dimension 0) of a batch's tensors, already on the device, over the `local_dp` devices."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass: mixed precision, or nothing."""
        ...

    def checkpoint_fn(self) -> Callable[..., Any]:
        """The function that recomputes a block in the backward pass (torch's, or a device's own)."""
        ...

    def optimizer(self, groups: Sequence[Mapping[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
        """AdamW over `groups`: its state and zeroed gradient buffers already made, its learning rate a tensor there."""
        ...

    def set_lr(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Write a new learning rate into the tensor that the update graph reads."""
        ...

    def seed(self, *numbers: int) -> None:
        """Seed the device's generator from (run seed, step, pass): equal on TP ranks, different on DP ranks."""
        ...

    def step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, totals: torch.Tensor, max_norm: float
    ) -> torch.Tensor:
        """Sum gradients over data-parallel ranks, divide by the global weight, clip, update, zero the gradients.

        Where the loss or the norm is not finite, weights, moments and their count of steps stay as they are.

        Args:
            totals: [2] on the device: this rank's loss sum and weight since the last step; becomes all ranks' sums.
            max_norm: clip to this norm of the normalised gradient; 0 for no clipping.

        Returns:
            The norm before clipping, a scalar on the device, the same on every rank; not finite where nothing moved.
        """
        ...

    def sync(self) -> None:
        """End of a graph: run what has been recorded (nothing to do on eager devices)."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over data-parallel ranks, on the device."""
        ...

    def on_host(self, fn: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Run `fn` with the tensors' values once they are there; never blocks the graph."""
        ...

    def gather_host(self, value: T) -> list[T]:
        """One value of every rank, in rank order, on every rank; over the host, not the device."""
        ...

    def broadcast_host(self, value: T) -> T:
        """Rank 0's value, on every rank; over the host, not the device."""
        ...

    def gather_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Whole tensors on the host, by parameter name: trained parameters, and optimizer state (`name/exp_avg`...).

        Called by all ranks; complete on rank 0.
        """
        ...

    def load_state(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        weights: Mapping[str, torch.Tensor],
        moments: Mapping[str, torch.Tensor],
    ) -> None:
        """The inverse of `gather_state`, from whole tensors at any world size.

        Raises:
            CheckpointError: names or shapes differ from the model's.
        """
        ...

    def load_weights(self, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        """The trained parameters alone, as `load_state` does."""
        ...

    def graphs(self) -> int:
        """Programs compiled so far; 0 on eager devices."""
        ...

    def peak_memory(self) -> int | None:
        """Most bytes of tensors that the device has held so far; None where it does not say."""
        ...

    def close(self, wait: bool = True) -> None:
        """Leave the process group; with `wait`, once the device has done all it was told."""
        ...


LARGEST = 3e38
"""A loss or norm from here on is infinite: Neuron's compiler writes infinity as float32's largest number, 3.4e38."""
PEER_LOST = re.compile(r"gloo|connection|broken pipe|socket|timed?[ _]?out", re.IGNORECASE)
"""In what torch.distributed, its stores and device runtimes say of a collective that a peer has left."""

Place = Callable[[Tensor, Tensor], Tensor]
"""(whole tensor, target) -> the tensor where and as the target is."""


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, the same memory; the tensor itself where it is not cut."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def make_gradient_buffers(groups: Iterable[Mapping[str, Any]]) -> None:
    """Give every parameter of `groups` a zero gradient that stays, so that the first pass traces like all others."""
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)


def move_keeping_ties(model: nn.Module, device: torch.device) -> None:
    """Move `model`; a parameter in several places stays one. On XLA `.to` makes a new one in each place, and the
    embedding and the LM head's decoder, one tensor in ESM-2, would be trained apart."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    model.to(device)
    for (module, name), *others in places.values():
        for owner, leaf in others:
            setattr(owner, leaf, getattr(module, name))


def adamw(
    groups: Sequence[Mapping[str, Any]], cfg: OptimConfig, device: torch.device, **kind: bool
) -> torch.optim.AdamW:
    """AdamW with gradients and state made before the first step and its learning rate a tensor: no other graphs."""
    make_gradient_buffers(groups)
    named = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
    # AdamW compares its rate with 0: given a tensor of a lazy device, it would read that device (and ahead-of-time
    # compilation answers every read with 0)
    optimizer = torch.optim.AdamW(named, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, **kind)
    lr = torch.tensor(cfg.lr, dtype=torch.float32, device=device)
    for group in optimizer.param_groups:
        group["lr"] = lr
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
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

    A loss or a norm that is not finite updates nothing: weights, moments and their count of steps stay as they are.

    Args:
        parameters: whose `grad` holds the gradient of the loss summed over the whole step.
        totals: [2], the step's loss sum and its weight over all ranks; a weight of 0 leaves zero gradients.
        max_norm: as in `Backend.step`.
        total_norm: of this rank's gradients, over all ranks.
        lazy: True where looking at a value would break a compiled program: the update is made and undone there.

    Returns:
        The norm of the mean's gradient before clipping, a scalar; not finite where nothing was updated.
    """
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
        grad.zero_()
    return norm


def patience(cfg: TrainConfig) -> timedelta:
    """How long ranks wait for each other: half an hour, or what the watchdog allows the slowest part of a run."""
    return timedelta(seconds=max(1800, cfg.loop.watchdog + cfg.loop.watchdog_slow))


def mean_scale(totals: Tensor) -> Tensor:
    """What turns summed gradients into the mean's: 1 / weight, or NaN where the loss is not finite.

    NaN because it then reaches every gradient, and by their norm every rank: all leave the same steps out.
    """
    loss, weight = totals[0], totals[1]
    scale = 1.0 / torch.where(weight > 0, weight, torch.ones_like(weight))
    return torch.where(is_number(loss), scale, torch.full_like(scale, float("nan")))


def is_number(value: Tensor) -> Tensor:
    """Whether a loss or a norm is neither NaN nor infinite, nor what Neuron's compiler makes of infinity."""
    return value.abs() < LARGEST


def undoable(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    """Call before an update, and the result after it: it puts all back, on the device, if the norm is not finite.

    By a selection that XLA fuses into the update, so no second copy is kept. Under ZeRO-1 it covers the shards too.
    """
    inner: torch.optim.Optimizer = getattr(optimizer, "base_optimizer", optimizer)
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
    """Around collectives: a failure that is a peer's in one line of this rank; any other goes up as it is.

    Raises:
        TrainingError: a peer has ended, or has not answered within the process group's time.
    """
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
    """One 63-bit seed from several numbers; unlike a sum, no two lists of numbers are alike."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy of its own on the host, contiguous."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def gather_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, fetch: Callable[[Tensor], Tensor] = copy_to_host
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trained parameters and optimizer state as copies on the host, named as in `checkpoint.Snapshot`."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weights[name] = fetch(parameter)
            for kind, value in optimizer.state[parameter].items():
                moments[f"{name}/{kind}"] = fetch(torch.as_tensor(value))
    return weights, moments


def load_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    place: Place | None = None,
) -> None:
    """Put what `gather_state` gave back into place, without making new tensors; `place` as in `load_weights`.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    load_weights(model, weights, place)
    place = place or (lambda whole, target: upload(whole, target.device))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for kind, value in optimizer.state[parameter].items():
                saved = moments.get(f"{name}/{kind}")
                if saved is None or saved.shape != torch.as_tensor(value).shape:
                    raise CheckpointError(
                        f"the saved optimizer state has no {kind} of {name} that fits; delete the checkpoint's folder"
                    )
                if isinstance(value, Tensor):
                    value.copy_(place(saved, value))
                else:  # a count of steps
                    optimizer.state[parameter][kind] = type(value)(saved.item())


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. As a vector: torch_xla gives equal scalars one buffer, which makes another program."""
    return tensor.contiguous().view(-1).to(device).view(tensor.shape)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], place: Place | None = None) -> None:
    """Copy trained parameters by name; `place` lays a whole tensor like its target, None: they are laid alike.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
    different = sorted(set(mine) ^ set(weights)) or [n for n, p in mine.items() if p.shape != weights[n].shape]
    if different:
        raise CheckpointError(
            f"the saved weights do not fit the model: {len(different)} parameters differ, the first is {different[0]}; "
            "use the configuration they were trained with"
        )
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(weights[name] if place is None else place(weights[name], parameter))
