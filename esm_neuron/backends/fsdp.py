"""FSDP2 of torch: every parameter cut over all ranks along dimension 0, blocks put together while they compute."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from esm_neuron.backends.common import copy_to_host, upload
from esm_neuron.model import encoder_of


def shard_fully(model: nn.Module, device: str, ranks: int) -> None:
    """Cut `model` over `ranks` in place, moving it to the device a block at a time; gradients will be sums.

    Parameters travel in the type that they are stored in: a frozen linear in bfloat16, a trained one in float32, so
    that the numbers are those of one device.
    """
    mesh = init_device_mesh(device, (ranks,))
    for module in (*encoder_of(model).encoder.layer, model):
        # Also the root, which FSDP2 would leave whole after a forward pass, for the backward pass to come. After a
        # validation none comes, and a checkpoint would look for moments by parameters that the optimizer does not have.
        cut = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        cut.set_gradient_divide_factor(1.0)
        cut.set_force_sum_reduction_for_comms(True)  # else a factor of 1 asks for an operation that only NCCL has


def fetch(tensor: Tensor) -> Tensor:
    """The whole tensor on the host; where it is cut, a collective that leaves it on rank 0 and nothing elsewhere: a
    host has a rank a GPU, and not the memory for as many copies of a model and its moments."""
    if not isinstance(tensor, DTensor):
        return copy_to_host(tensor)
    whole = tensor.full_tensor()
    return copy_to_host(whole if dist.get_rank() == 0 else whole.new_empty(0))


def place(whole: Tensor, target: Tensor) -> Tensor:
    """`whole`, which every rank has, laid like `target`; no rank sends anything."""
    if not isinstance(target, DTensor):
        return upload(whole, target.device)
    moved = whole.to(target.device)
    return distribute_tensor(moved, target.device_mesh, target.placements, src_data_rank=None)
