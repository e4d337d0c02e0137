"""Predict the memory of a training run on each device: arithmetic over the model's shape, no torch.

The prediction counts the tensors that are alive at the peak of a step. What an allocator keeps beyond them (fragments,
the workspace of the matrix library, about 0.5 GB of a CUDA context) comes on top. The activations are those that
autograd keeps of a block in `models/esm2.py`; on compiling backends (xla, neuron) the compiler decides, and the number
is a guide.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from esm_neuron.config import TrainConfig
from esm_neuron.config.backends import BACKENDS
from esm_neuron.models.shapes import EsmShape
from esm_neuron.models.tensor_parallel import HEADED, PLAN, in_block, padded_heads
from esm_neuron.tasks import task_class

Shape = tuple[int, ...]

FLOAT32, BFLOAT16 = 4, 2
"""Bytes of a number."""
_BYTES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "nf4": 0.5 + 1 / 64 + FLOAT32 / (64 * 256), "int8": 1}
"""Storage type -> bytes per weight. NF4 includes its scales: 8 bits per 64 weights, and a float per 256 scales."""
HEADS = ("head", "probe")
"""Kinds of adapter with which nothing of ESM-2 is trained, so that there is no backward pass through it."""
MOMENTS = 2 * FLOAT32
"""Bytes of AdamW's state per parameter."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak of a training step."""

    weights: Mapping[str, int]
    """Storage type -> bytes of the model's own parameters kept in it."""
    adapters: int
    """LoRA matrices and the task's head, float32."""
    gradients: int
    """One number per trained parameter."""
    optimizer: int
    """AdamW's state of the trained parameters."""
    activations: int
    """What autograd keeps of a forward pass, bfloat16 copies of trained weights included."""
    logits: int
    """Activations and outputs of the task's head or the LM head, and the loss."""
    working: int
    """What lives only while a block computes: gradients of activations, and what is recomputed."""

    @property
    def state(self) -> int:
        """Return the bytes that a run holds between two steps."""
        return sum(self.weights.values()) + self.adapters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Return the bytes at the peak: at the outputs, or later in the widest block."""
        return self.state + self.activations + max(self.logits, self.working)


def predict_memory(
    cfg: TrainConfig, shape: EsmShape, dp: int = 1, outputs: int = 2, checkpointing: bool | None = None
) -> Memory:
    """Predict the memory of a training run on one of `dp` data-parallel devices.

    `outputs` are those of the task's head, such as classes; `checkpointing` replaces `model.gradient_checkpointing`.
    """
    again = cfg.model.gradient_checkpointing if checkpointing is None else checkpointing
    head = task_class(cfg.task.name).head_sizes(cfg.model, shape, outputs)
    lora = _lora(cfg, shape)
    weights, trained = _weights(cfg, shape, sum(head))
    added = head + lora
    number = BFLOAT16 if _trunk_in_bfloat16(cfg) else FLOAT32
    tokens = cfg.loop.packs_per_device * cfg.data.pack_tokens
    flows = cfg.adapter.kind not in HEADS
    block = _block(cfg, shape) * tokens if flows else 0
    kept = shape.layers * (FLOAT32 * shape.hidden * tokens if again else block) if flows else 0
    moment, copies = _moment(cfg, shape) * tokens + _restored(cfg, shape), _copies(cfg, shape)
    # With checkpointing only each block's input is kept; one block at a time, with its copies, is there while it is
    # computed again.
    if again:
        moment, copies = moment + block + copies // shape.layers, 0
    ranks = dp if cfg.parallel.fsdp else 1
    if cfg.parallel.fsdp:  # two blocks are whole at a time: the one at work and the next
        moment += 2 * sum(weights.values()) // shape.layers
    return Memory(
        weights={kind: math.ceil(size / ranks) for kind, size in weights.items()},
        adapters=math.ceil(FLOAT32 * sum(added) / ranks),
        gradients=math.ceil((number * sum(trained) + FLOAT32 * sum(added)) / ranks),
        optimizer=_optimizer(cfg, sum(trained), sum(added), dp),
        activations=kept + _pack(cfg, shape) * tokens + copies,
        logits=_logits(cfg, shape, outputs),
        working=moment,
    )


def _weights(cfg: TrainConfig, shape: EsmShape, head: int) -> tuple[dict[str, int], list[int]]:
    """Return the bytes of the model's own parameters by storage type, and the sizes of those that are trained."""
    held: Counter[str] = Counter()
    if _is_lora(cfg):  # PEFT keeps the head as it was before training
        kind = _storage(cfg, "dense", learns=False)
        held[kind] += int(head * _BYTES[kind])
    trained = []
    for name, size in _parameters(cfg, shape).items():
        learns = cfg.adapter.kind == "none" and "contact_head" not in name
        number = _share(cfg, shape, name, size)
        kind = _storage(cfg, name, learns)
        held[kind] += math.ceil(number * _BYTES[kind]) + (FLOAT32 * size[0] if kind == "int8" else 0)
        if learns:
            trained.append(number)
    return dict(held), trained


def _parameters(cfg: TrainConfig, shape: EsmShape) -> dict[str, Shape]:
    """Return the parameters of the task's model that a pretrained ESM-2 has."""
    keeps = task_class(cfg.task.name).keeps_lm_head
    return {n: s for n, s in shape.parameters().items() if keeps or not n.startswith("lm_head.")}


def _storage(cfg: TrainConfig, name: str, learns: bool) -> str:
    linear, leaf = (in_block(name) or "").rpartition(".")[::2]
    if cfg.adapter.kind == "qlora" and linear in PLAN:
        return cfg.adapter.quantization if leaf == "weight" else "float32"
    if cfg.loop.precision != "bf16":
        return "float32"
    frozen_linear = not learns and ("dense" in name or "self" in name or "regression" in name)
    return "bfloat16" if frozen_linear or _trunk_in_bfloat16(cfg) else "float32"


def _trunk_in_bfloat16(cfg: TrainConfig) -> bool:
    """Return whether the trained parameters of ESM-2 itself are stored in bfloat16."""
    return BACKENDS[cfg.backend].bf16_weights and cfg.loop.precision == "bf16"


def _share(cfg: TrainConfig, shape: EsmShape, name: str, size: Shape) -> int:
    """Return the size of a parameter on one device under tensor parallelism, zero heads included."""
    linear, leaf = (in_block(name) or "").rpartition(".")[::2]
    style = PLAN.get(linear)
    if style is None or (style == "row" and leaf == "bias"):
        return math.prod(size)
    tp = cfg.parallel.tp
    padded = padded_heads(shape.heads, tp) / shape.heads if linear in HEADED else 1
    return math.ceil(math.prod(size) * padded / tp)


def _is_lora(cfg: TrainConfig) -> bool:
    return cfg.adapter.kind not in ("none", *HEADS)


def _lora(cfg: TrainConfig, shape: EsmShape) -> list[int]:
    """Return the sizes of the LoRA matrices on one device."""
    if not _is_lora(cfg):
        return []
    sizes, tp = [], cfg.parallel.tp
    for target in cfg.adapter.targets:
        wide, deep = _sides(shape, target)
        # the matrix at the cut side of the linear is cut with it
        wide, deep = (wide // tp, deep) if PLAN[target] == "row" else (wide, deep // tp)
        sizes += [cfg.adapter.r * wide, cfg.adapter.r * deep]
    return sizes * shape.layers


def _sides(shape: EsmShape, target: str) -> tuple[int, int]:  # inputs and outputs of a linear of a block
    inputs = shape.intermediate if target == "output.dense" else shape.hidden
    return inputs, shape.intermediate if target == "intermediate.dense" else shape.hidden


def _optimizer(cfg: TrainConfig, trained: int, added: int, dp: int) -> int:
    if cfg.optim.kind == "adamw8bit":  # two bytes, and two floats for 256 of each
        return math.ceil((2 + 2 * FLOAT32 / 256) * (trained + added))
    if BACKENDS[cfg.backend].compiles and cfg.adapter.kind != "none":
        # one vector on each rank; a pass copies its slices, and has a gradient of each
        return (MOMENTS + 2 * FLOAT32) * (trained + added)
    if not BACKENDS[cfg.backend].zero1:
        return math.ceil(MOMENTS * (trained + added) / (dp if cfg.parallel.fsdp else 1))
    if cfg.parallel.zero1:  # and a float32 copy of each weight
        return math.ceil((MOMENTS + FLOAT32) * (trained + added) / dp)
    return (MOMENTS // 2 if _trunk_in_bfloat16(cfg) else MOMENTS) * trained + MOMENTS * added


def _number(cfg: TrainConfig) -> int:  # bytes of one in matrix products
    return BFLOAT16 if cfg.loop.precision == "bf16" else FLOAT32


def _block(cfg: TrainConfig, shape: EsmShape) -> int:
    """Return the bytes per token that autograd keeps of one block."""
    number, tp = _number(cfg), cfg.parallel.tp
    hidden, wide = shape.hidden // tp, shape.intermediate // tp
    norms = 2 * (FLOAT32 * shape.hidden + 2 * FLOAT32)  # inputs, means and deviations
    attention = 4 * number * hidden + _scores(cfg, shape)  # query and key rotated, value, sum
    gelu = number * wide
    return norms + attention + gelu + _linear_inputs(cfg, shape) + _dropout(cfg, shape)


def _linear_inputs(cfg: TrainConfig, shape: EsmShape) -> int:
    """Return the bytes per token of the linears' inputs, kept for the gradients of weights or of LoRA matrices."""
    number, tp = _number(cfg), cfg.parallel.tp
    full = cfg.adapter.kind == "none"
    targets = set(PLAN) if full else set(cfg.adapter.targets)
    first = targets & {"attention.self.query", "attention.self.key", "attention.self.value"}
    # under autocast each of the three makes its own copy of their common input, which a compiler makes one
    copies = len(first) if cfg.loop.precision == "bf16" and not BACKENDS[cfg.backend].compiles else min(len(first), 1)
    inputs = {"attention.output.dense": shape.hidden // tp, "intermediate.dense": shape.hidden}
    inputs["output.dense"] = shape.intermediate // tp
    numbers = copies * shape.hidden + sum(size for linear, size in inputs.items() if linear in targets)
    return number * (numbers + (0 if full else cfg.adapter.r * len(targets)))


def _scores(cfg: TrainConfig, shape: EsmShape) -> int:
    """Return the bytes per token that attention keeps besides its inputs and its sum."""
    heads = padded_heads(shape.heads, cfg.parallel.tp) // cfg.parallel.tp
    if not BACKENDS[cfg.backend].compiles:  # fused attention keeps one number per head
        return FLOAT32 * heads
    each = FLOAT32 + (BFLOAT16 if cfg.loop.precision == "bf16" else 0)  # softmax, and its copy for the product
    return heads * cfg.data.pack_tokens * each


def _dropout(cfg: TrainConfig, shape: EsmShape) -> int:
    """Return the bytes per token of dropout masks (and of LoRA's dropped inputs)."""
    hidden = 2 * shape.hidden if cfg.model.dropout else 0
    if not _is_lora(cfg) or not cfg.adapter.dropout:
        return hidden
    return hidden + (1 + _number(cfg)) * sum(_sides(shape, target)[0] for target in cfg.adapter.targets)


def _pack(cfg: TrainConfig, shape: EsmShape) -> int:
    """Return the bytes per token that all blocks share: ids, members of segments, angles, the final norm's input."""
    segments = cfg.data.max_segments if cfg.data.packing else 1
    angles = 4 * FLOAT32 * shape.hidden // shape.heads // 2
    return 5 * 8 + 3 * FLOAT32 * segments + angles + FLOAT32 * shape.hidden


def _logits(cfg: TrainConfig, shape: EsmShape, outputs: int) -> int:
    task = task_class(cfg.task.name)
    segments = cfg.data.max_segments if cfg.data.packing else 1
    places = cfg.data.pack_tokens if task.per_token else segments
    return cfg.loop.packs_per_device * places * task.head_bytes(shape.hidden, outputs, _number(cfg))


def _moment(cfg: TrainConfig, shape: EsmShape) -> int:
    """Return the bytes per token that live for a moment where a block is widest, in the feed-forward's activation."""
    wide = shape.intermediate // cfg.parallel.tp
    if cfg.adapter.kind in HEADS:  # only a forward pass: its widest activations, and vectors that come and go
        return 2 * _number(cfg) * wide + 4 * FLOAT32 * shape.hidden
    if _is_lora(cfg):  # PEFT casts the input of a LoRA matrix to the matrix's type, our fused LoRA does not
        return 2 * (_number(cfg) if cfg.adapter.kind == "lora" else FLOAT32) * wide
    return _number(cfg) * wide + FLOAT32 * shape.hidden


def _restored(cfg: TrainConfig, shape: EsmShape) -> int:
    """Return the bytes of the largest quantized weight while it is dequantized."""
    if cfg.adapter.kind != "qlora":
        return 0
    return shape.hidden * shape.intermediate * (_number(cfg) + (FLOAT32 if cfg.adapter.quantization == "int8" else 0))


def _copies(cfg: TrainConfig, shape: EsmShape) -> int:
    """Return the bytes of the bfloat16 copies of trained linears that autocast keeps until the backward pass."""
    if cfg.loop.precision != "bf16" or cfg.adapter.kind != "none" or BACKENDS[cfg.backend].bf16_weights:
        return 0
    sizes = _parameters(cfg, shape).items()
    return BFLOAT16 * sum(_share(cfg, shape, n, s) for n, s in sizes if "dense" in n or "self" in n)


def render(as_set: Memory, turned: Memory) -> list[str]:
    """Return a line for the run as configured, and one with gradient checkpointing switched."""
    weights = ", ".join(f"{kind} {_gb(size)}" for kind, size in as_set.weights.items())
    parts = ("adapters", "gradients", "optimizer", "activations", "logits", "working")
    rest = ", ".join(f"{name} {_gb(getattr(as_set, name))}" for name in parts)
    return [
        f"memory of a device: {_gb(as_set.total)} GB = weights {_gb(sum(as_set.weights.values()))} ({weights}), {rest}",
        f"  {_gb(turned.total)} GB with model.gradient_checkpointing switched; what the allocator keeps comes on top",
    ]


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
