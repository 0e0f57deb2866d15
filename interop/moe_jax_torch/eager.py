"""Whether a call of an operator is nothing but its kernel: then torch's dispatcher, which costs the host more, is passed by."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether no gradient, compiler, transform, mode or subclass could have a part in a call with these tensors.

    Example:
        >>> with torch.no_grad():
        ...     is_plain(torch.ones(2), None), is_plain(torch.ones(2, requires_grad=True))
        (True, True)
        >>> is_plain(torch.ones(2))  # autograd looks on
        False
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    return all(tensor is None or type(tensor) in _PLAIN for tensor in tensors)
