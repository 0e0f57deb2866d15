"""Weights cross the bridge once, not at every call."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from moe_jax_torch.bridge import as_jax_dtype, own_memory, shares_memory, to_jax


class _Entry(NamedTuple):
    key: tuple[Any, ...]
    array: jax.Array


class WeightCache:
    """Arrays of the tensors that were seen, kept as long as the tensor object lives and has the same memory.

    An array shares the tensor's memory, so values that are written in place (an optimizer's step, `copy_`) need no new import.
    Another storage, shape, stride, dtype or device does: ``p.data = ...``, `module.to`, ``load_state_dict(assign=True)``.

    A tensor that `to_jax` has to copy (not contiguous, not aligned) is never kept, because the copy would not see later writes;
    it is copied at every call, and a warning says so once.

    On a GPU an array waits for what torch had queued when it was made. Writes to the weights after that are waited for through
    any other tensor of the same call, which is imported anew: pass at least one.

    Example:
        >>> cache, weight = WeightCache(), torch.ones(4, 4)
        >>> array = cache(weight)
        >>> _ = weight.mul_(2)
        >>> cache(weight) is array, float(array.sum())
        (True, 32.0)
        >>> weight.data = torch.zeros(4, 4)
        >>> cache(weight) is array
        False
    """

    def __init__(self) -> None:
        self._entries = WeakTensorKeyDictionary()
        self._warned = False

    def __len__(self) -> int:
        return len(self._entries)

    def __call__(self, tensor: torch.Tensor) -> jax.Array:
        """The tensor as an array; gradients are the caller's business.

        Raises:
            TypeError, RuntimeError: what `to_jax` refuses.
        """
        entry = self._entries.get(tensor)
        if entry is not None and entry.key == _key(tensor):
            return entry.array
        array = to_jax(tensor, detach=True)
        if shares_memory(tensor):
            self._entries[tensor] = _Entry(_key(tensor), array)
        else:
            self._entries.pop(tensor, None)
            self._warn(tensor)
        return array

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as kernels take it where it is, or a copy, with the same warning."""
        if shares_memory(tensor):
            return tensor
        self._warn(tensor)
        return own_memory(as_jax_dtype(tensor))

    def _warn(self, tensor: torch.Tensor) -> None:
        if self._warned or tensor.numel() == 0:
            return
        self._warned = True
        warnings.warn(
            f"weights of shape {tuple(tensor.shape)}, strides {tensor.stride()} at an address of {tensor.data_ptr() % 256} "
            "modulo 256 are copied at every call, because no kernel can read them there; give them memory of their own "
            "once, with p.data = p.data.clone(memory_format=torch.contiguous_format), or in a model of transformers with "
            "moe_jax_torch.transformers.own_weights(model)",
            stacklevel=2,
        )


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
