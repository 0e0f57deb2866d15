"""Which elements share a scale: every granularity as a grid of blocks over rows and columns."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from moe_jax.quantization.formats import Spec


@dataclass(frozen=True)
class Blocks:
    """A matrix cut into blocks that share a scale. Blocks at the lower and right edge may be cut short.

    Each half of the rows (gate and up of ``w13``) is a matrix of its own: its blocks begin anew, so that the grid does not
    depend on where the other half ends.

    Attributes:
        rows: of the whole matrix.
        columns: of the whole matrix.
        halves: 1 or 2.
        block_rows: rows that share a scale.
        block_columns: columns that share a scale.
        granularity: of the `Spec`, which says how scales are stored.
    """

    rows: int
    columns: int
    halves: int
    block_rows: int
    block_columns: int
    granularity: str

    @classmethod
    def of(cls, spec: Spec, rows: int, columns: int, halves: int = 1) -> Blocks:
        """The blocks of a matrix.

        Raises:
            ValueError: rows that cannot be halved.

        Example:
            >>> Blocks.of(Spec("int8", "block", (128, 128)), rows=400, columns=300, halves=2).scales_shape
            (4, 3)
        """
        if halves not in (1, 2):
            raise ValueError(f"halves={halves} must be 1, or 2 for the gate and up rows of w13")
        if rows % halves:
            raise ValueError(
                f"{rows} rows have no two equal halves; halves=2 is for w13 of a gated activation, 2I rows"
            )
        if spec.block is not None:
            sizes = spec.block
        elif spec.granularity == "tensor":
            sizes = (max(rows // halves, 1), max(columns, 1))  # an empty matrix has a scale too
        else:
            sizes = (1, max(columns, 1))
        return cls(rows, columns, halves, *sizes, spec.granularity)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Halves, block rows of a half, block columns."""
        if self.granularity == "tensor":
            return self.halves, 1, 1
        rows = -(-(self.rows // self.halves) // self.block_rows)
        return (
            self.halves,
            rows,
            1 if self.granularity in ("channel", "token") else -(-self.columns // self.block_columns),
        )

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """The shape of the stored scales, without leading axes.

        ``()`` or ``(halves,)`` for a tensor, ``(rows,)`` for channels and tokens, the grid for groups and blocks.
        """
        halves, rows, columns = self.grid
        if self.granularity == "tensor":
            return () if halves == 1 else (halves,)
        return (self.rows,) if self.granularity in ("channel", "token") else (halves * rows, columns)

    def cut(self, x: Shaped[Array, "*B rows columns"]) -> Shaped[Array, "*B halves grid_rows _ grid_columns _"]:
        """The matrix as blocks, filled up with zeros."""
        halves, rows, columns = self.grid
        batch, half = x.shape[:-2], self.rows // self.halves
        x = x.reshape(*batch, halves, half, self.columns)
        filled = (rows * self.block_rows - half, columns * self.block_columns - self.columns)
        if any(filled):
            x = jnp.pad(x, [(0, 0)] * (len(batch) + 1) + [(0, n) for n in filled])
        return x.reshape(*batch, halves, rows, self.block_rows, columns, self.block_columns)

    def join(self, blocks: Shaped[Array, "*B halves grid_rows _ grid_columns _"]) -> Shaped[Array, "*B rows columns"]:
        """The inverse of `cut`."""
        halves, rows, columns = self.grid
        batch, half = blocks.shape[:-5], self.rows // self.halves
        x = blocks.reshape(*batch, halves, rows * self.block_rows, columns * self.block_columns)
        return x[..., :half, : self.columns].reshape(*batch, self.rows, self.columns)

    def as_stored(self, per_block: Shaped[Array, "*B halves grid_rows grid_columns"]) -> Shaped[Array, "..."]:
        """Scales, one a block, in the shape that they are stored in."""
        return per_block.reshape(*per_block.shape[:-3], *self.scales_shape)

    def per_block(self, stored: Shaped[Array, "..."], batch: tuple[int, ...]) -> Shaped[Array, "*B h r _ c _"]:
        """Stored scales as one a block, to be multiplied with what `cut` gives."""
        return stored.reshape(*batch, *self.grid)[..., :, None, :, None]

    def per_half(self, stored: Shaped[Array, "..."], batch: tuple[int, ...]) -> Shaped[Array, "*B h _ _ _ _"]:
        """What is stored once a matrix, or once for each of two halves, to be multiplied with what `cut` gives."""
        return stored.reshape(*batch, self.halves, 1, 1, 1, 1)
