"""Losses of single predictions, unreduced; all of them have smoothed targets and focal factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esm_neuron.config.deferred import module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:
    torch, F = module("torch"), module("torch.nn.functional")

LEAST = 1e-6  # least probability of being wrong in a focal factor: a power below 1 has no gradient at 0


def softmax_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0, gamma: float = 0.0) -> Tensor:
    """Return float32 [...]: - sum over classes c of q_c (1 - p_c)^gamma log p_c, in nats.

    p is the softmax of `logits` [..., C]; q is 1 at the label, int64 [...], mixed with the even distribution by
    `smoothing`. gamma 0 is cross entropy; hard labels with gamma > 0 are the focal loss of Lin et al. 2017
    (arXiv:1708.02002, eq. 4).
    """
    classes = logits.shape[-1]
    flat = logits.float().reshape(-1, classes)
    if gamma == 0:
        losses = F.cross_entropy(flat, labels.flatten(), reduction="none", label_smoothing=smoothing)
        return losses.view(labels.shape)
    log_p = flat.log_softmax(-1)
    # Below, 1 - p is computed as -expm1(log p), which keeps its digits where p is close to 1.
    hard = (labels.reshape(-1, 1) == torch.arange(classes, device=labels.device)).float()
    q = hard * (1 - smoothing) + smoothing / classes
    return -(q * (-torch.expm1(log_p)).clamp_min(LEAST) ** gamma * log_p).sum(-1).view(labels.shape)


def sigmoid_losses(logits: Tensor, target: Tensor, smoothing: float = 0.0, gamma: float = 0.0) -> Tensor:
    """Return float32, shaped as `logits`: - q (1 - p)^gamma log p - (1 - q) p^gamma log (1 - p), in nats.

    q is `target` mixed with 1 / 2 by `smoothing`. gamma 0 is binary cross entropy; hard labels with gamma > 0 are
    torchvision's `sigmoid_focal_loss` without alpha.
    """
    # 1 - p is the sigmoid of -x, so neither logarithm loses digits where p is close to 0 or 1.
    log_p, log_not = F.logsigmoid(logits.float()), F.logsigmoid(-logits.float())
    q = target * (1 - smoothing) + smoothing / 2
    if gamma == 0:
        return -(q * log_p + (1 - q) * log_not)
    wrong, wrong_not = (log.exp().clamp_min(LEAST) ** gamma for log in (log_not, log_p))
    return -(q * wrong * log_p + (1 - q) * wrong_not * log_not)
