"""Four-bit codes in larger words: our own bytes, and the 32-bit words that checkpoints hold."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Integer, UInt8

CODES_PER_WORD = 8
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


@jax.jit
def pack_int4(codes: Integer[Array | np.ndarray, "*B K"]) -> UInt8[Array, "*B packed"]:
    """Codes 0 to 15, two a byte along the last axis, the even one in the low nibble; an odd K gets a code 0 more.

    Example:
        >>> pack_int4(jnp.array([1, 2, 3])).tolist()
        [33, 3]
    """
    codes = jnp.asarray(codes).astype(jnp.uint8)
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


@functools.partial(jax.jit, static_argnames="columns")
def unpack_int4(packed: UInt8[Array | np.ndarray, "*B packed"], columns: int | None = None) -> UInt8[Array, "*B K"]:
    """The codes, 0 to 15, that `pack_int4` packed.

    Args:
        packed: uint8, two codes a byte.
        columns: K, at most twice the bytes; all of them by default.

    Example:
        >>> unpack_int4(jnp.array([33, 3], jnp.uint8), columns=3).tolist()
        [1, 2, 3]
    """
    packed = jnp.asarray(packed)
    codes = jnp.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])
    return codes if columns is None else codes[..., :columns]


@functools.partial(jax.jit, static_argnames=("axis", "order"))
def pack_words(
    codes: Integer[Array | np.ndarray, "*S"], axis: int, order: tuple[int, ...] = IN_ORDER
) -> Int32[Array, "*P"]:
    """Codes 0 to 15, eight an int32 along `axis`, which is filled up with zeros to a multiple of eight.

    Args:
        codes: any integers.
        axis: which axis shrinks to an eighth, negative from the end.
        order: nibble ``n`` of a word, counted from the lowest, holds code ``order[n]`` of its eight.

    Example:
        >>> pack_words(jnp.arange(8), axis=0).tolist() == [0x76543210]
        True
    """
    codes = jnp.moveaxis(jnp.asarray(codes), axis, -1).astype(jnp.uint32)
    missing = -codes.shape[-1] % CODES_PER_WORD
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // CODES_PER_WORD, CODES_PER_WORD)
    words = jnp.zeros(codes.shape[:-1], jnp.uint32)
    for nibble, source in enumerate(order):
        words = words | (codes[..., source] << (4 * nibble))
    return jnp.moveaxis(words.view(jnp.int32), -1, axis)


@functools.partial(jax.jit, static_argnames=("axis", "order", "size"))
def unpack_words(
    words: Integer[Array | np.ndarray, "*P"], axis: int, order: tuple[int, ...] = IN_ORDER, size: int | None = None
) -> UInt8[Array, "*S"]:
    """The codes, 0 to 15, that `pack_words` packed.

    Args:
        words: int32, eight codes each.
        axis: which axis grows eightfold, negative from the end.
        order: as in `pack_words`.
        size: of that axis, without what was filled up; all of it by default.

    Example:
        >>> unpack_words(jnp.array([0x76543210]), axis=0).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    words = jnp.moveaxis(jnp.asarray(words).astype(jnp.int32), axis, -1).view(jnp.uint32)
    nibble_of = np.argsort(order)
    codes = jnp.stack([(words >> int(4 * nibble_of[i])) & 0xF for i in range(CODES_PER_WORD)], axis=-1)
    codes = codes.reshape(*words.shape[:-1], words.shape[-1] * CODES_PER_WORD)[..., :size]
    return jnp.moveaxis(codes.astype(jnp.uint8), -1, axis)
