"""Trainium by torch-neuronx: linears of neuronx_distributed (NxD) on every block, its ZeRO-1, optimum-neuron's LoRA.

NxD and torch_xla's ZeRO-1 each divide reduced gradients by the data-parallel degree; the loss is normalized by the
global weight instead, so `step` multiplies by that degree first. Sequence parallelism stays off: with LoRA it leaves
out an all-reduce of some gradients (optimum-neuron 0.4.5). The graphs of a run are those of `xla.py`.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from esm_neuron.backends.base import (
    Trained,
    make_state,
    mean_scale,
    mix_seed,
    normalise_clip_update,
    patience,
    startable,
    trainable,
    undoable,
)
from esm_neuron.backends.flat import FlatVector, flat_of
from esm_neuron.backends.neuron_env import CURE, apply_settings, cache_trouble, check_packages, neuron_cores
from esm_neuron.backends.neuron_state import ShardedState, host_groups
from esm_neuron.backends.topology import Topology
from esm_neuron.backends.xla import LazyBackend, import_torch_xla
from esm_neuron.compat import EsmSelfAttention
from esm_neuron.config import OptimConfig, TrainConfig, require
from esm_neuron.errors import ConfigError
from esm_neuron.models.esm2 import FrozenLayerNorm
from esm_neuron.models.lora import FusedLora, Sums
from esm_neuron.models.tensor_parallel import (
    HEADED,
    PLAN,
    Shard,
    Style,
    cut_of,
    in_block,
    padded_heads,
    shard_of,
    whole_shape,
)

TRUNK = re.compile(r"(?:.*\.)?(esm|lm_head)\.(?!.*\.lora_).*")
"""Parameters of ESM-2 itself: stored in bfloat16 under `loop.precision` bf16; LoRA matrices and task heads are not."""


BUCKET_MB = 130
"""Megabytes of a bucket of ZeRO-1, NxD's own limit: its trainers use it, and report NaN above 140."""
SUMMED = 512 << 20
"""Most bytes of gradients in one sum over the ranks, NxD's own limit: LoRA of the 15B at rank 16 has 270 MB."""


class FloatLayerNorm(nn.LayerNorm):
    """A norm of bfloat16 states in float32, as CPUs and GPUs compute it: XLA would sum in the states' own type."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)


class NeuronBackend(LazyBackend):
    """One NeuronCore of a world of dp x tp processes.

    There is no `autocast`: bf16 is in the weights. NxD's linears ask only CUDA's autocast, and their backward pass
    would mix dtypes.
    """

    def __init__(self, cfg: TrainConfig) -> None:
        topology = Topology.from_env(cfg.parallel.tp, neuron=True)
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if (trouble := cache_trouble(os.environ)) is not None:
            raise ConfigError(trouble)
        apply_settings(cfg, nodes=topology.world > local_world)
        check_packages()
        self._import_vendor(lora=cfg.adapter.kind == "lora")
        if not self._nxd.utils.cpu_mode():  # NXD_CPU_MODE: NxD's own switch, for machines without the chip
            topology.validate_neuron(neuron_cores(), local_world)
        super().__init__(cfg, topology=topology)
        self._parallel, self._model_name, self._patience = cfg.parallel, cfg.model.name, patience(cfg)
        self._join_world()
        self.device = self._torch_xla.device()
        self.host_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=self._patience))
        self._groups = host_groups(self.topology, self._patience)
        self._heads = 0

    def _import_vendor(self, lora: bool) -> None:
        try:
            import neuronx_distributed as nxd
            import neuronx_distributed.optimizer
            import neuronx_distributed.parallel_layers.grads
            import neuronx_distributed.utils.model_utils

            self._nxd, self._torch_xla = nxd, import_torch_xla()
            self._state = nxd.parallel_layers.parallel_state
            if lora:
                from optimum.neuron.peft.tuners.lora.layer import NEURON_LORA_MODULES

                self.lora_modules = self._fused_lora(NEURON_LORA_MODULES)
        except ImportError as error:
            raise ConfigError(f"backend neuron needs a package that is missing ({error}); {CURE}") from error

    def _fused_lora(self, theirs: Mapping[type, type]) -> dict[type, type]:
        """Return optimum-neuron's LoRA classes with the fused product where the linear is one of ours.

        Sums are in the type of the activations: a column layer of optimum-neuron's would sum a float32 copy of a
        bfloat16 gradient and drop it (see `_reduce_in_own_type`).
        """
        layers, mappings = self._nxd.parallel_layers.layers, self._nxd.parallel_layers.mappings
        reduce = mappings.reduce_from_tensor_model_parallel_region
        sums = {
            layers.ColumnParallelLinear: Sums(backward=lambda part: reduce(part)),
            layers.RowParallelLinear: Sums(forward=lambda part: reduce(part)),
        }
        fused = {
            linear: type("FusedParallelLora", (FusedLora, theirs[linear]), {"sums": sums[linear]}) for linear in sums
        }
        return {**theirs, **fused}

    def _join_world(self) -> None:
        if not dist.is_initialized():
            require(
                "RANK" in os.environ,
                "backend neuron runs one process per NeuronCore, under torchrun: launchers/torchrun.sh for training, "
                "torchrun --nproc_per_node=N -m esm_neuron.cli COMMAND for predictions, or predict with --backend cpu",
            )
            importlib.import_module("torch_xla.distributed.xla_backend")  # registers the process group's kind
            dist.init_process_group("xla", timeout=self._patience)
        self._check_world()
        self._state.initialize_model_parallel(tensor_model_parallel_size=self.topology.tp)
        # Checkpoints are cut and joined by our own topology, so NxD must place the ranks alike.
        theirs = self._state.get_data_parallel_rank(), self._state.get_tensor_model_parallel_rank()
        ours = self.topology.dp_rank, self.topology.tp_rank
        if theirs != ours:
            raise ConfigError(
                f"neuronx_distributed puts rank {self.topology.rank} at (dp, tp) {theirs}, not {ours}; {CURE}"
            )

    def _check_world(self) -> None:
        """Raise ConfigError where torch_xla sees another world: its collectives would then silently sum nothing."""
        runtime = self._torch_xla.runtime
        theirs = f"rank {runtime.global_ordinal()} of {runtime.world_size()}"
        ours = f"rank {self.topology.rank} of {self.topology.world}"
        require(theirs == ours, f"torch_xla is {theirs}, torchrun's is {ours}; {CURE}")

    def shard(self, model: nn.Module) -> None:
        config: Any = model.config
        self._heads = config.num_attention_heads
        tp, pad = self.topology.tp, self._parallel.pad_heads
        self.topology.validate(self._heads, config.hidden_size, config.intermediate_size, self._model_name, pad)
        for name, module in list(model.named_modules()):
            style = PLAN.get(in_block(name) or "")
            if style is not None and isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, self._parallel_linear(module, name, style))
            elif isinstance(module, EsmSelfAttention):
                # A rank computes its share of the heads, zero heads among them.
                module.num_attention_heads = padded_heads(self._heads, tp) // tp
                module.all_head_size = module.num_attention_heads * module.attention_head_size

    def _parallel_linear(self, linear: nn.Linear, name: str, style: Style) -> nn.Module:
        inputs, outputs = linear.in_features, linear.out_features
        common = {
            "bias": True,
            "sequence_parallel_enabled": False,
            "dtype": linear.weight.dtype,
            "device": torch.device("meta"),
        }
        layers = self._nxd.parallel_layers.layers
        padded = padded_heads(self._heads, self.topology.tp)
        if style == "column":
            if in_block(name) in HEADED:
                outputs = outputs // self._heads * padded
            column: nn.Module = layers.ColumnParallelLinear(inputs, outputs, gather_output=False, **common)
            return column
        if in_block(name) in HEADED:
            inputs = inputs // self._heads * padded
        row: nn.Module = layers.RowParallelLinear(inputs, outputs, input_is_parallel=True, **common)
        return row

    def part(self, name: str, shape: tuple[int, ...]) -> Shard:
        return shard_of(name, shape, self._heads, self.topology.tp, self.topology.tp_rank)

    def prepare(self, model: nn.Module) -> nn.Module:
        if self._bf16:
            norms = (m for m in model.modules() if isinstance(m, FrozenLayerNorm))
            kept = {id(p) for norm in norms for p in norm.parameters()}
            for name, parameter in model.named_parameters():
                if TRUNK.fullmatch(name) and id(parameter) not in kept:
                    parameter.data = parameter.data.to(torch.bfloat16)
            for module in model.modules():
                if type(module) is nn.LayerNorm:
                    module.__class__ = FloatLayerNorm
        self._mark_parallel(model)
        self._reduce_in_own_type(model)
        # NxD's own: a plain .to() makes new parameters on XLA, without the marks and with ties cut
        self._nxd.utils.model_utils.move_model_to_device(model, self.device)
        self.sync()
        return model

    def _mark_parallel(self, model: nn.Module) -> None:
        """Mark the cut parameters for NxD's gradient norm: loading by assignment may have made new ones."""
        layers = self._nxd.parallel_layers.layers
        for module in model.modules():
            if isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear):
                column = isinstance(module, layers.ColumnParallelLinear)
                cut = [module.weight, module.bias] if column else [module.weight]
                for parameter in (p for p in cut if p is not None and not hasattr(p, "tensor_model_parallel")):
                    self._nxd.parallel_layers.utils.set_tensor_model_parallel_attributes(
                        parameter, True, 0 if column else 1, 1, self.topology.tp
                    )

    def _reduce_in_own_type(self, model: nn.Module) -> None:
        """Have column layers, LoRA's too, sum their input's gradient over the tensor-parallel ranks in its own type.

        NxD casts the gradient to `reduce_dtype`, float32 by default, sums that copy and then drops it, so a bfloat16
        gradient was never summed (layers_utils._linear_autograd_bwd_grad_reduce, 0.15 to 0.18). Where the types are
        the same, the cast makes no copy.
        """
        for module in model.modules():
            if isinstance(module, self._nxd.parallel_layers.layers.ColumnParallelLinear):
                module.reduce_dtype = module.weight.dtype

    def is_shared(self, name: str, parameter: Tensor) -> bool:
        whole = whole_shape(name, parameter.shape, self._heads, self.topology.tp)
        return cut_of(name, whole, self._heads, self.topology.tp).dim is None

    def _adamw(self, groups: Sequence[Mapping[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
        named = startable(groups)
        # AdamW compares its rate with 0 and would read the device for it, which compiling ahead answers with 0
        options: dict[str, Any] = {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps, "foreach": False}
        options["capturable"] = self.device.type == "xla"
        if self._parallel.zero1 and not self._flattens:
            dp = self.topology.dp
            optimizer: torch.optim.Optimizer = self._nxd.optimizer.NeuronZero1Optimizer(
                named,
                torch.optim.AdamW,
                optimizer_dtype=torch.float32,
                pin_layout=False,
                save_master_weights=True,
                bucket_cap_mb_reduce_scatter=BUCKET_MB,
                bucket_cap_mb_all_gather=max(1, BUCKET_MB // dp),
                **options,
            )
        else:
            optimizer = torch.optim.AdamW(named, **options)
        make_state(getattr(optimizer, "base_optimizer", optimizer), self.device)
        rate = self._rate(cfg.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return optimizer

    def seed(self, *numbers: int) -> None:
        seed = mix_seed(*numbers, self.topology.dp_rank) >> 1
        self._torch_xla.core.xla_model.set_rng_state(seed, device=str(self.device))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, totals: Tensor, max_norm: float) -> Tensor:
        parameters = trainable(model)
        if (flat := flat_of(model)) is not None:
            self.sum_over_ranks([*map(_gradient, parameters), totals], SUMMED)
            return normalise_clip_update(
                parameters, optimizer, totals, max_norm, partial(self._norm_over_ranks, flat), lazy=True
            )
        # NxD and its ZeRO-1 divide the reduced gradients by dp; the factor dp makes sums of them again.
        scale = self.topology.dp * mean_scale(self.all_reduce(totals))
        for p in parameters:
            _gradient(p).mul_(scale)
        undo = undoable(optimizer)
        limit = max_norm if max_norm > 0 else float("inf")
        if self._parallel.zero1:
            zero: Any = optimizer
            zero.max_norm = limit
            zero.step()
            norm = zero.grad_norm
        else:
            grads = self._nxd.parallel_layers.grads
            grads.bucket_allreduce_gradients([_gradient(p) for p in parameters])
            norm = grads.clip_grad_norm(parameters, limit)
            optimizer.step()
        norm = norm.squeeze()
        undo(norm)
        for p in parameters:
            _gradient(p).zero_()
        return norm

    def _norm_over_ranks(self, flat: FlatVector, grads: list[Tensor]) -> Tensor:
        total = flat.squares(grads[0], self.topology.tp)
        if self.topology.tp > 1:
            dist.all_reduce(total, group=self._state.get_tensor_model_parallel_group())
        return total.sqrt()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self._state.get_data_parallel_group())
        return tensor

    def fetch(self, item: Trained, tensor: Tensor) -> Tensor:
        rows = None if item.master is item.parameter else item.parameter.shape[0]
        return self._sharded().whole(item.name, tensor.detach().cpu(), rows)

    def place(self, item: Trained, whole: Tensor, target: Tensor) -> Tensor:
        if whole.ndim == 0:
            return super().place(item, whole, target)
        part = self._sharded().part(item.name, whole)
        cut_by_rows = item.master is not item.parameter and target is not item.parameter
        return self._sharded().rows(part) if cut_by_rows else part

    def whole_shape(self, item: Trained, tensor: Tensor) -> tuple[int, ...]:
        return whole_shape(item.name, item.parameter.shape, self._heads, self.topology.tp) if tensor.ndim else ()

    def compile_note(self) -> str | None:
        if os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1":
            return None
        return "compiling one graph after the other; start as `neuron_parallel_compile torchrun ...` for all at once"

    def _sharded(self) -> ShardedState:
        return ShardedState(self.topology, self._heads, self._groups)

    def close(self, wait: bool = True) -> None:
        super().close(wait)
        self._state.destroy_model_parallel()
        dist.destroy_process_group()


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a trained parameter has no gradient buffer: NeuronBackend.optimizer was not called")
    return parameter.grad
