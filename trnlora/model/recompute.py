"""Less memory for a training step: cheap results that are computed again in the backward pass instead of being kept."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def not_kept(
    x: Tensor, function: Callable[..., Tensor], *inputs: Tensor, when: bool
) -> contextlib.AbstractContextManager[Any]:
    """A context in which autograd keeps `inputs` instead of x = function(*inputs), if `when`.

    For inputs that are kept anyway. x must live until the context ends.
    """
    if not when:
        return contextlib.nullcontext()
    inputs = tuple(tensor.detach() for tensor in inputs)
    of_x = _identity(x)  # what autograd keeps would keep `pack`, which must not keep x

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if _identity(saved) == of_x else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return function(*inputs).view(packed) if isinstance(packed, torch.Size) else packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _identity(x: Tensor) -> tuple[int, int, torch.dtype]:
    return x.data_ptr(), x.numel(), x.dtype
