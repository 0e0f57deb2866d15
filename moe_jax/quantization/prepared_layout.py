"""Where a four-bit code and its scale lie in a block that a kernel decodes: `prepared` says why, and makes such blocks."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.quantization.formats import Spec

SIDE = 64  # rows and columns of a block
LANES = 32  # words of a line of a block
CODE_LINES = 16  # lines of codes in a block; those of scales follow
FP8 = "float8_e4m3fn"
_DTYPES = ("bfloat16", "float16")


class Term(NamedTuple):
    """Bits of a pair of codes: those under `mask` in each half of a word that was rotated to the left by `left` bits."""

    mask: int
    left: int


def adds_up(terms: tuple[Term, ...]) -> bool:
    """Whether one product rotates all terms at once: the bits of a word, moved by each of them, meet nowhere.

    Example:
        >>> adds_up((Term(0x00C0, 3), Term(0x8000, 14))), adds_up((Term(0x00C0, 3), Term(0x0200, 2)))
        (True, False)
    """
    if any(term.left > 15 or term.mask & ((1 << term.left) - 1) for term in terms):
        return False
    word = sum(term.mask >> term.left for term in terms) * 0x10001
    moved = [word << term.left & 0xFFFFFFFF for term in terms]
    return sum(moved) == functools.reduce(operator.or_, moved)


@dataclass(frozen=True)
class Layout:
    """How blocks are laid out, for a number format and the dtype of the rows that they are multiplied with.

    Attributes:
        spec: the format, int4 or float4_e2m1fn.
        dtype: ``bfloat16`` or ``float16``.

    Raises:
        ValueError: what no block can hold.

    Example:
        >>> Layout(Spec("float4_e2m1fn", "group", 16, "float8_e4m3fn"), "bfloat16").shape
        (18, 32)
    """

    spec: Spec
    dtype: str

    def __post_init__(self) -> None:
        reason = unprepared(self.spec, self.dtype)
        if reason is not None:
            raise ValueError(reason)

    @property
    def is_float(self) -> bool:
        """Codes are float4_e2m1fn."""
        return self.spec.dtype == "float4_e2m1fn"

    @property
    def scale_columns(self) -> int:
        """Columns that share a scale within a block."""
        return min(self.spec.block[1], SIDE)

    @property
    def scale_bits(self) -> int:
        """Of a scale in a block."""
        return 8 if self.is_float else 16

    @property
    def scale_words(self) -> int:
        """Words of scales that a thread has for its two rows, without zero points."""
        return 2 * (SIDE // self.scale_columns) * self.scale_bits // 32

    @property
    def shape(self) -> tuple[int, int]:
        """Of a block, in words of 32 bits."""
        return CODE_LINES + self.scale_words * (2 if self.spec.asymmetric else 1), LANES

    @property
    def places(self) -> tuple[tuple[Term, ...], ...]:
        """Where the four pairs of a word are: what `pattern` says of a code is the sum of its terms."""
        if not self.is_float:
            return tuple((Term(0x000F, -4 * pair % 32),) for pair in range(4))
        if self.dtype == "bfloat16":
            first = ((Term(0x81C0, 0),), (Term(0x81C0, 10),), (Term(0x81C0, 13),))
            return (*first, (Term(0x00C0, 3), Term(0x0100, 8), Term(0x8000, 14)))
        return tuple((Term(0x8000, 12 - 4 * pair), Term(0x0E00, (9 - 4 * pair) % 32)) for pair in range(4))

    @property
    def fraction_bits(self) -> int:
        """Of a float of `dtype`."""
        return 7 if self.dtype == "bfloat16" else 10

    @property
    def scale_left(self) -> int:
        """Bits by which a word of scales is rotated to the left: its first and third byte are then at their place in a float."""
        if not self.is_float:
            return 0
        return self.fraction_bits - (3 if self.spec.has_global_scale else 0)

    @property
    def scale_mask(self) -> int:
        """Where a scale of a byte is in a float of `dtype`."""
        return (0xFF << self.scale_left) & 0x7FFF

    @property
    def scale_more(self) -> int:
        """What is added to it there: a power of two."""
        return 0x7000 if self.spec.has_global_scale and self.dtype == "bfloat16" else 0

    def pattern(self, codes: Any) -> Any:
        """The 16 bits that `places` keep of a code: of float4_e2m1fn a float of `dtype`, the value times 2**-126 or 2**-14."""
        if not self.is_float:
            return codes
        return (codes >> 3 << 15) | ((codes & 7) << (self.fraction_bits - 1))


def unprepared(spec: Spec, dtype: DTypeLike) -> str | None:
    """Why weights of that format cannot be prepared for rows of that dtype; None if they can.

    Example:
        >>> unprepared(Spec("int4", "group", 48), "bfloat16")
        'int4 with a scale for (1, 48): it must be for 32 columns, or a multiple of 64'
    """
    if spec.dtype not in ("int4", "float4_e2m1fn") or spec.granularity != "group":
        return f"{spec.dtype} with granularity={spec.granularity!r}; it must be int4 or float4_e2m1fn, in groups"
    if jnp.dtype(dtype).name not in _DTYPES and (spec.dtype, jnp.dtype(dtype).name) != ("float4_e2m1fn", FP8):
        more = f" or {FP8}" if spec.dtype == "float4_e2m1fn" else ""
        return f"rows of {jnp.dtype(dtype).name}; they must be one of {', '.join(_DTYPES)}{more}"
    size = spec.block[1]
    if spec.dtype == "int4" and size != 32 and size % SIDE:
        return f"int4 with a scale for {spec.block}: it must be for 32 columns, or a multiple of 64"
    wanted = 16 if spec.has_global_scale else 32
    if spec.dtype == "float4_e2m1fn" and size != wanted:
        return f"{spec.scale_dtype} scales for {spec.block}: they must be for {wanted} columns"
    return None
