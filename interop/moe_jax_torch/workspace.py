"""Where the buffers between the kernels of a program lie in one piece of memory: those that live at the same time lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 256  # bytes: what Mosaic kernels are compiled for


class Span(NamedTuple):
    """A buffer and the steps at which it is in use.

    Attributes:
        size: bytes.
        first: the step that writes it.
        last: the last step that reads it; `first` where none does.

    Example:
        >>> Span(64, 0, 2).meets(Span(64, 2, 3)), Span(64, 0, 2).meets(Span(64, 3, 3))
        (True, False)
    """

    size: int
    first: int
    last: int

    def meets(self, other: Span) -> bool:
        """Whether both are in use at some step. A step that reads one writes the other while it still reads."""
        return self.first <= other.last and other.first <= self.last


def arrange(spans: Sequence[Span]) -> tuple[list[int], int]:
    """The offset of each buffer, a multiple of 256, and the bytes of all: large ones first, each as low as it can be.

    Example:
        >>> arrange([Span(1000, 0, 1), Span(300, 1, 2), Span(900, 2, 3)])
        ([0, 1024, 0], 1536)
    """
    offsets = [0] * len(spans)
    placed: list[int] = []
    for mine in sorted(range(len(spans)), key=lambda i: -spans[i].size):
        taken = sorted((offsets[i], _rounded(spans[i].size)) for i in placed if spans[i].meets(spans[mine]))
        offset, size = 0, _rounded(spans[mine].size)
        for start, length in taken:
            if offset + size <= start:
                break
            offset = max(offset, start + length)
        offsets[mine] = offset
        placed.append(mine)
    total = max((offset + _rounded(span.size) for offset, span in zip(offsets, spans, strict=True)), default=0)
    return offsets, total


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
