"""Several processes that train one model: who they are, what they agree on, how the model is spread over them.

``torchrun`` starts them; a process on its own is the first of one, and everything here then costs nothing. What they
agree on goes by way of the CPU (gloo), so that no GPU has to wait for it.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vssm.data.sampling import ALONE, Share

# How long a process waits for one that is alive but silent: compiling kernels, or a slow disk, can take minutes.
# A process that has died is noticed at once, by its closed connections.
_TIMEOUT = timedelta(minutes=10)


def launched() -> bool:
    """Whether ``torchrun`` has started this process."""
    return dist.is_torchelastic_launched()


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return share().rank == 0 if dist.is_initialized() else int(os.environ.get("RANK", "0")) == 0 or not launched()


def share() -> Share:
    """This process and the number of all."""
    return Share(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Connects the processes that ``torchrun`` has started; yields the device of this one.

    Args:
        device: What was asked for; ``cuda`` becomes the GPU of this process.

    Raises:
        ConnectionError: Another process has ended before its time.
    """
    if not launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield device
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        raise ConnectionError(
            "train: another process has ended, its own message says why; --resume auto goes on from the last state"
        ) from error
    dist.destroy_process_group()  # not after a failure, where it could wait for those that are gone


def summed(*values: float) -> list[float]:
    """Sums of values over all processes."""
    if share().ranks == 1:
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(totals)
    return totals.tolist()


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    if share().ranks == 1:
        return [value]
    values = [None] * share().ranks
    dist.all_gather_object(values, value)
    return values


def shard(model: nn.Module) -> None:
    """Cuts every parameter of a model into as many parts as there are processes, by blocks (FSDP2).

    The modules of what is called ``blocks`` are gathered one after the other as the model runs, what is left together.
    """
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[0].rpartition(".")[2] == "blocks":
            fully_shard(module)
    fully_shard(model)


def replicated(model: nn.Module, device: torch.device) -> nn.Module:
    """The module to call in training: it averages the gradients over all processes, which hold the same model."""
    if share().ranks == 1 or isinstance(model, FSDPModule):
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


@contextmanager
def gradients_kept_apart(network: nn.Module, apart: bool) -> Iterator[None]:
    """Lets gradients add up in this process, for a part of a batch that is not the last."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(not apart)
    context: AbstractContextManager = nullcontext()
    if apart and isinstance(network, DistributedDataParallel):
        context = network.no_sync()
    with context:
        yield


def whole(values: Any) -> Any:
    """Tensors in dicts and lists as one process would have them, on the CPU; all processes must take part.

    Only the main process gets them, the others get None in their place.
    """
    if isinstance(values, dict):
        return {key: whole(value) for key, value in values.items()}
    if isinstance(values, list):
        return [whole(value) for value in values]
    if not isinstance(values, Tensor):
        return values
    tensor = full_tensor(values)
    return tensor.detach().cpu() if is_main() else None


def full_tensor(value: Tensor) -> Tensor:
    """A tensor as one process would have it, on its device; all processes must take part."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def cut_like(value: Any, own: Tensor) -> Any:
    """A whole tensor cut as a parameter of the same shape is; anything else as it is."""
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value
