"""ESM-2 as transformers has it, with the few classes swapped that packs and compilers need.

Swapped: the embeddings (transformers 4.57.6 takes the token-dropout ratio over the padded length; here it is each
sequence's own), the rotary tables (float32, made once), attention (over packs) and the activation (one fused kernel of
the same erf formula). Parameter names do not change, so every Hugging Face checkpoint and PEFT adapter fits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from esm_neuron.compat import (
    EsmClassificationHead,
    EsmConfig,
    EsmEmbeddings,
    EsmForMaskedLM,
    EsmForTokenClassification,
    EsmIntermediate,
    EsmLMHead,
    EsmModel,
    EsmPreTrainedModel,
    EsmSelfAttention,
    ForSequenceClassificationLoss,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from esm_neuron.config.deferred import when_imported
from esm_neuron.data.tokenizer import AMINO_ACIDS
from esm_neuron.models.attention import Pack, RotaryTable, pooled, rotate
from esm_neuron.models.shapes import read_width

MASK_RATIO_TRAIN = 0.15 * 0.8
"""Share of <mask> tokens in ESM-2's pretraining; embeddings are rescaled to it (fair-esm 2.0.0, `ESM2.forward`)."""


class PackedEmbeddings(EsmEmbeddings):
    """Word embeddings with ESM-2's token dropout, its ratio taken per segment."""

    def forward(self, input_ids: Tensor, pack: Pack) -> Tensor:  # type: ignore[override]
        """Return embeddings [R, L, H] of `input_ids` int64 [R, L]; padding is 0."""
        x = self.word_embeddings(input_ids)
        scale = pack.membership.sum(1)
        if self.token_dropout:
            masked = input_ids == self.mask_token_id
            length = pack.membership.sum(-1).clamp_min(1.0)
            ratio = (pack.membership * masked.unsqueeze(1)).sum(-1) / length
            per_segment = (1 - MASK_RATIO_TRAIN) / (1 - ratio)
            scale = (pack.membership * per_segment.unsqueeze(-1)).sum(1) * ~masked
        return (x * scale.unsqueeze(-1)).to(x.dtype)


class PackedSelfAttention(EsmSelfAttention):
    """Self-attention whose positions and neighbours come from the pack."""

    qkv: nn.Module | None
    """Queries, keys and values [3, R L, H] by one product (`lora.join_qkv`), where there is one."""

    def forward(self, hidden_states: Tensor, *, pack: Pack, **_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """Attend, [R L, H] in and out; the heads are counted from the data, so a shard of them works as well."""
        dropout = self.dropout if self.training else 0.0
        if self.qkv is not None:
            attended = pack.attend_joined(self.qkv(hidden_states), dropout)
        else:
            heads = (*pack.shape, -1, self.attention_head_size)
            query = rotate(self.query(hidden_states).view(heads), pack.query_angle)
            key = rotate(self.key(hidden_states).view(heads), pack.key_angle)
            attended = pack.attend(query, key, self.value(hidden_states).view(heads), dropout)
        return attended.reshape(len(hidden_states), -1), None


class _FrozenNorm(torch.autograd.Function):
    """A layer norm in float32 whose weight and bias are frozen, as torch_xla computes it: a batch norm of tokens.

    Called through `layer_norm`, the same numbers take half as many operations again: sums of a running mean that nobody
    reads, constants made anew, factors of one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        tokens = x.flatten(0, -2) if x.ndim > 2 else x
        tokens = tokens.float().unsqueeze(0)
        one, zero = (torch.full(tokens.shape[1:2], value, device=x.device) for value in (1.0, 0.0))
        normed, mean, inverse = torch.native_batch_norm(tokens, one, zero, zero, zero, True, 0.0, eps)
        ctx.save_for_backward(tokens, one, mean, inverse, weight)
        ctx.shape, ctx.dtype, ctx.eps = x.shape, x.dtype, eps
        out = (normed.squeeze(0) * weight + bias).to(x.dtype)
        return out.view(x.shape) if x.ndim > 2 else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        tokens, one, mean, inverse, weight = ctx.saved_tensors
        of_normed = (grad * weight).view(tokens.shape)
        mask = (True, False, False)
        of_x, _, _ = torch.ops.aten.native_batch_norm_backward(
            of_normed, tokens, one, None, None, mean, inverse, True, ctx.eps, mask
        )
        return of_x.view(ctx.shape).to(ctx.dtype), None, None, None


class FrozenLayerNorm(nn.LayerNorm):
    """A norm that is not trained, on a device that compiles; in float32 whatever the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = _FrozenNorm.apply(x, self.weight, self.bias, self.eps)
        return normed


def freeze_norms(model: nn.Module) -> None:
    """Give norms without a trained parameter the class for them, in place."""
    for module in model.modules():
        if type(module) is nn.LayerNorm and not any(p.requires_grad for p in module.parameters()):
            module.__class__ = FrozenLayerNorm


class FusedIntermediate(EsmIntermediate):
    """The feed-forward's first half with torch's fused GELU (the exact erf form that transformers spells out)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.gelu(self.dense(hidden_states))


class FusedLMHead(EsmLMHead):
    """The LM head with torch's fused GELU."""

    def forward(self, features: Tensor, **_: Any) -> Tensor:
        x = self.layer_norm(F.gelu(self.dense(features)))
        return self.decoder(x) + self.bias


class PackedEsmModel(EsmModel):
    """The encoder over packs."""

    rotary: RotaryTable
    attention: str

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize what a loaded folder lacks; transformers 5 asks this also for buffers that no folder holds."""
        super()._init_weights(module)
        if isinstance(module, RotaryTable):
            module.fill()

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        max_segments: int = 1,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Pack]:
        """Return hidden states [R, L, H] and the pack they were computed with.

        Ids and positions (from 0 within each segment) are int64 [R, L]; `max_segments` is S. Without `segment_ids`
        there is one sequence per pack, and `attention_mask` [R, L] is 1 for tokens and 0 for padding.
        """
        embedded, pack = self.embed(input_ids, segment_ids, positions, max_segments, attention_mask)
        hidden: Tensor = self.encoder(embedded, pack=pack).last_hidden_state
        return hidden.unflatten(0, input_ids.shape), pack

    def layers(self, embedded: Tensor, pack: Pack) -> Iterator[Tensor]:
        """Yield the states [R, L, H] of every layer, the embedding first, of what `embed` returned.

        Each has passed the final norm, as it would in a model that is cut off there.
        """
        norm, hidden = self.encoder.emb_layer_norm_after, embedded
        yield norm(hidden).unflatten(0, pack.shape)
        for block in self.encoder.layer:
            hidden = block(hidden, pack=pack)
            yield norm(hidden).unflatten(0, pack.shape)

    def embed(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        max_segments: int = 1,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Pack]:
        """Return what the first block sees, [R L, H], and the pack; arguments as for a forward pass."""
        attention = self.attention
        if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
            attention = "masked"  # the others read the mask on the host, and would keep that of the example
        if segment_ids is None or positions is None:
            used = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
            segment_ids, positions = self._one_segment(used)
            if attention != "masked" and _has_hole(used):
                attention = "masked"  # the others take what lies on the two sides of a hole for two segments
        pack = Pack.of(input_ids, segment_ids, positions, max_segments, self.rotary, attention)
        # The blocks see tokens end to end: reshaping for each linear makes half as many operations again on XLA.
        return self.embeddings(input_ids=input_ids, pack=pack).flatten(0, 1), pack

    def _one_segment(self, used: Tensor) -> tuple[Tensor, Tensor]:
        """Return segments and positions of sequences of their own, of a mask int64 [R, L]."""
        length, most = used.shape[1], self.rotary.table.shape[0]
        if length > most:
            raise ValueError(
                f"sequences of {length} tokens, and this model takes {most} (max_position_embeddings); cut them"
            )
        places = torch.arange(length, device=used.device).expand_as(used)
        # Padding may come first: a sequence begins at its first token, which <cls> pooling reads.
        first = used.argmax(1, keepdim=True)
        # Tokens become segment 0, and padding -1, which is `PAD_SEGMENT`.
        return used - 1, (places - first) * used


def _has_hole(used: Tensor) -> bool:
    """Return whether a mask int64 [R, L] leaves out tokens between others."""
    begins = (used[:, 1:] > used[:, :-1]).sum(1) + used[:, 0]
    return bool((begins > 1).any())


_PACKED: dict[type[nn.Module], type[nn.Module]] = {
    EsmModel: PackedEsmModel,
    EsmEmbeddings: PackedEmbeddings,
    EsmSelfAttention: PackedSelfAttention,
    EsmIntermediate: FusedIntermediate,
    EsmLMHead: FusedLMHead,
}


def pack_modules(model: EsmPreTrainedModel) -> None:
    """Give the modules of a transformers ESM-2 their packed classes, in place; parameters stay as they are."""
    for module in list(model.modules()):
        packed = _PACKED.get(type(module))
        if packed is not None:
            # Only the class changes: parameters and their names stay, so transformers' checkpoints fit.
            module.__class__ = packed
        if hasattr(module, "rotary_embeddings"):  # in each block, or with transformers 5 in the encoder
            module.register_module("rotary_embeddings", None)  # its inverse frequencies live in the one table
        if isinstance(module, EsmSelfAttention):
            module.register_module("qkv", None)
        if isinstance(module, PackedEsmModel):
            set_attention(module, module.config.max_position_embeddings, "segments")


def set_attention(encoder: PackedEsmModel, max_positions: int, attention: str) -> None:
    """Choose the attention (a name of `attention.ATTENTIONS`) and the longest sequence, in tokens with its specials."""
    cfg = encoder.config
    encoder.rotary = RotaryTable(cfg.hidden_size // cfg.num_attention_heads, max_positions)
    encoder.attention = attention


class PooledEsmConfig(EsmConfig):
    """Configuration of a classifier whose pooling transformers does not have.

    It has its own model type, so that plain transformers refuses it instead of predicting from the <cls> token. A
    regression of standardized values has it too: transformers would leave its predictions so.
    """

    model_type = "esm_neuron"


def head_name(config: EsmConfig) -> str:
    """Return the attribute of the head: transformers' own name only where transformers would compute the same."""
    if not isinstance(config, PooledEsmConfig):
        return "classifier"
    kind = "regressor" if config.problem_type == "regression" else "classifier"
    every_layer = () if reads(config) == "last" else (reads(config),)
    return "_".join((config.pooling.replace("+", "_"), *every_layer, kind))


def head_names(config: EsmConfig) -> tuple[str, ...]:
    """Return the attributes of everything that is new above the encoder."""
    pooling = ("attention_pooling",) if config.pooling == "attention" else ()
    return (head_name(config), *pooling, *(("layer_mix",) if reads(config) == "mix" else ()))


def reads(config: EsmConfig) -> str:
    """Return which layers a head reads: the `last`, or all by `concat` or `mix`."""
    return str(getattr(config, "read_layers", "last"))


class AttentionPooling(nn.Module):
    """A mean over residues with learnt weights: the softmax, within a segment, of a linear score of each residue."""

    def __init__(self, config: EsmConfig) -> None:
        super().__init__()
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor, residues: Tensor) -> Tensor:
        """Return float32 [R, S, H] of `hidden` [R, L, H] and `Pack.residues` [R, S, L]; 0 for an empty segment."""
        with torch.autocast(hidden.device.type, enabled=False):
            scores = hidden.float() @ self.score.weight.float().view(-1)
            outside = torch.finfo(torch.float32).min
            # An empty segment has an even softmax over `outside`; the factor makes that 0 and not NaN.
            weights = torch.where(residues > 0, scores.unsqueeze(1), outside).softmax(-1) * residues
            return weights @ hidden.float()


class LayerMix(nn.Module):
    """A mean over layers with learnt weights, the softmax of one number per layer."""

    def __init__(self, config: EsmConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))

    def forward(self, pooled_layers: Iterable[Tensor]) -> Tensor:
        """Return float32 [R, S, F] of the pooled states of each layer, [R, S, F], which are summed as they come."""
        weights = self.weight.float().softmax(0).unbind()
        return functools.reduce(torch.add, (w * states for w, states in zip(weights, pooled_layers, strict=True)))


class LinearHead(nn.Linear):
    """A linear layer in the place of transformers' head; it takes [n, 1, F] as that does."""

    def __init__(self, config: EsmConfig) -> None:
        super().__init__(vector_width(config), int(config.num_labels or 0))
        self.dropout = float(config.hidden_dropout_prob or 0.0)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.dropout(features[:, 0], self.dropout, self.training))


def _head(config: EsmConfig) -> nn.Module:
    if getattr(config, "linear_head", False):
        return LinearHead(config)
    head, width = EsmClassificationHead(config), vector_width(config)
    if width != config.hidden_size:
        head.dense = nn.Linear(width, config.hidden_size)
    return head


def vector_width(config: EsmConfig) -> int:
    """Return the numbers that the head gets per segment, see `model.layers`, `pooling` and `composition`."""
    layers = config.num_hidden_layers + 1 if reads(config) == "concat" else 1
    with_shares = bool(getattr(config, "composition", False))
    return read_width(config.pooling, config.hidden_size, layers, with_shares)


def composition(pooling: str, pack: Pack, input_ids: Tensor) -> Tensor:
    """Return float32 [R, S, 20 P + 1]: shares of amino acids, see `attention.pooled`, and the log of the residues."""
    amino_acids = torch.tensor(AMINO_ACIDS.tolist(), device=input_ids.device)
    one_hot = (input_ids.unsqueeze(-1) == amino_acids).float()
    residues = pack.residues.sum(-1, keepdim=True).clamp_min(1.0)
    return torch.cat((pooled("mean" if pooling == "cls" else pooling, pack, one_hot), residues.log()), dim=-1)


class PackedForSequenceClassification(EsmPreTrainedModel):
    """One prediction per segment: the encoder, a pooling, and transformers' classification head or a linear one.

    A regression's predictions are in units of `target_sd` from `target_mean`, two numbers of its configuration, where
    there are segments: float32 has no digits left for values whose mean is a million times their spread. Without
    segments, as transformers calls it, they are in the values' own unit.
    """

    def __init__(self, config: EsmConfig) -> None:
        super().__init__(config)
        self.esm = EsmModel(config, add_pooling_layer=False)
        if config.pooling == "attention":
            self.attention_pooling = AttentionPooling(config)
        if reads(config) == "mix":
            self.layer_mix = LayerMix(config)
        setattr(self, head_name(config), _head(config))
        self.post_init()
        pack_modules(self)

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **pack_args: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Return logits [R, S, classes], or [R, classes] without `segment_ids`; arguments as in `PackedEsmModel`.

        `labels`, without `segment_ids`, gives the loss that transformers takes for the configuration's problem type.
        Raise ValueError for what transformers' own models take and this one does not.
        """
        for name in ("inputs_embeds", "output_attentions", "output_hidden_states"):
            if pack_args.pop(name, None) not in (None, False):
                raise ValueError(f"{type(self).__name__} takes no {name}; give input_ids, and read logits alone")
        vectors = self._vectors(input_ids, segment_ids, **pack_args)
        head = getattr(self, head_name(self.config))
        # transformers' head reads position 0 of a sequence, so each segment becomes a sequence of one position.
        sequences = vectors.flatten(0, 1).unsqueeze(1).to(getattr(head, "dense", head).weight.dtype)
        logits = head(sequences)
        if segment_ids is not None:
            return SequenceClassifierOutput(logits=logits.view(*vectors.shape[:2], -1))
        if self.config.problem_type == "regression":
            logits = logits.float() * self.config.target_sd + self.config.target_mean
        loss: Any = None if labels is None else ForSequenceClassificationLoss(labels, logits, self.config)
        found = SequenceClassifierOutput(loss=loss, logits=logits)
        return found if return_dict in (None, True) else found.to_tuple()

    def _vectors(self, input_ids: Tensor, segment_ids: Tensor | None, **pack_args: Any) -> Tensor:
        """Return what the head predicts from, float32 [R, S, F]."""
        pooling, layers, encoder = self.config.pooling, reads(self.config), cast(PackedEsmModel, self.esm)
        if layers == "last":
            hidden, pack = encoder(input_ids, segment_ids, **pack_args)
            attends = pooling == "attention"
            vectors = self.attention_pooling(hidden, pack.residues) if attends else pooled(pooling, pack, hidden)
        else:
            embedded, pack = encoder.embed(input_ids, segment_ids, **pack_args)
            of_layers = (pooled(pooling, pack, hidden) for hidden in encoder.layers(embedded, pack))
            vectors = self.layer_mix(of_layers) if layers == "mix" else torch.cat(list(of_layers), dim=-1)
        if getattr(self.config, "composition", False):
            vectors = torch.cat((vectors, composition(pooling, pack, input_ids)), dim=-1)
        return vectors


class PackedForPooledClassification(PackedForSequenceClassification):
    """The same for the poolings of this package; what `AutoModelForSequenceClassification` makes of such a folder."""

    config_class = PooledEsmConfig


class PackedEncoder(EsmPreTrainedModel):
    """The encoder under the name that a task's model gives it, without a head."""

    def __init__(self, config: EsmConfig) -> None:
        super().__init__(config)
        self.esm = EsmModel(config, add_pooling_layer=False)
        self.post_init()
        pack_modules(self)


class Embedder(nn.Module):
    """Embed packs with the encoder of any task's model."""

    def __init__(self, model: nn.Module, pooling: str, every_layer: bool = False) -> None:
        """Pool as `model.pooling` says, or not at all (`residue`): the last layer's states, or `every_layer`'s."""
        super().__init__()
        self.encoder = encoder_of(model)
        self.pooling, self.every_layer = pooling, every_layer

    def forward(self, **pack_args: Any) -> SimpleNamespace:
        """Return `logits`, float32: [R, S, F] per segment or [R, L, H] per token; arguments as in `PackedEsmModel`.

        With `every_layer` they are [R, S, layers, F], or [R, L, layers, H], the embedding's first.
        """
        if not self.every_layer:
            return SimpleNamespace(logits=self._pool(*self.encoder(**pack_args)))
        embedded, pack = self.encoder.embed(**pack_args)
        states = [self._pool(hidden, pack) for hidden in self.encoder.layers(embedded, pack)]
        return SimpleNamespace(logits=torch.stack(states, dim=2))

    def _pool(self, hidden: Tensor, pack: Pack) -> Tensor:
        return hidden.float() if self.pooling == "residue" else pooled(self.pooling, pack, hidden)


class PackedForMaskedLM(EsmForMaskedLM):
    """One distribution over the 33 tokens per position."""

    def __init__(self, config: EsmConfig) -> None:
        super().__init__(config)
        pack_modules(self)

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, **pack_args: Any) -> MaskedLMOutput:
        """Return logits [R, L, 33]; arguments as in `PackedEsmModel`."""
        hidden, _ = self.esm(input_ids, segment_ids, **pack_args)
        return MaskedLMOutput(logits=self.lm_head(hidden))


class PackedForTokenClassification(EsmForTokenClassification):
    """One prediction per token, by transformers' own head."""

    def __init__(self, config: EsmConfig) -> None:
        super().__init__(config)
        pack_modules(self)

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, **pack_args: Any) -> TokenClassifierOutput:
        """Return logits [R, L, classes]; arguments as in `PackedEsmModel`."""
        hidden, _ = self.esm(input_ids, segment_ids, **pack_args)
        # float32, as pooled states are: on `neuron` the encoder may be in bfloat16, and a head never is
        states = self.dropout(hidden.to(self.classifier.weight.dtype))
        return TokenClassifierOutput(logits=self.classifier(states))


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(PooledEsmConfig.model_type, PooledEsmConfig)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.register(PooledEsmConfig, PackedForPooledClassification)


# transformers' auto classes load our folders; nothing here needs them, and they take seconds to import
when_imported("transformers.models.auto.configuration_auto", _register_config)
when_imported("transformers.models.auto.modeling_auto", _register_model)


def encoder_of(model: nn.Module) -> PackedEsmModel:
    """Return the one encoder within a task's model, whatever wraps it."""
    return next(module for module in model.modules() if isinstance(module, PackedEsmModel))


def parameter_count(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameters; a weight of 4 bits counts as many as it stands for."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    linears = (m for m in model.modules() if isinstance(m, nn.Linear) and m.weight is not None)
    packed = sum(m.in_features * m.out_features - m.weight.numel() for m in linears)
    return sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes) + packed
