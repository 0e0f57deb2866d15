"""How the block-scaled grouped matmul of Blackwell GPUs tiles its work."""

from __future__ import annotations

import dataclasses

TILE_ROWS = 128  # rows of a tile: the M side of tcgen05's instructions, a lane of tensor memory each
BLOCK = 128  # rows of weights that one instruction takes, and that a tile of scales has
LINE = 128  # bytes of a row in shared memory: the widest swizzle
TMEM_COLUMNS = 256  # of the sums; the scales of all stages take at most 160 of the 256 that are left
SHARED_BYTES = 232448  # that a block of threads can have


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile of the kernel: 128 rows of a group by one or two blocks of 128 rows of weights."""

    halves: int = 1  # blocks of weights a tile: gate and up, or one
    stages: int = 4  # of the ring between TMA and the tensor cores
    band: int = 8  # row tiles walked together before the next weight columns: what L2 holds at a time

    @property
    def buffers(self) -> int:
        """Tiles whose sums tensor memory holds: with two, one is stored while the next is multiplied."""
        return TMEM_COLUMNS // (self.halves * BLOCK)


def columns_of_step(bits: int) -> int:
    """Columns of K in a stage, of codes of so many bits: a line.

    A narrower swizzle would do for the tensor cores, but a row that is fetched by itself has to bring 128 bytes.

    Example:
        >>> columns_of_step(4), columns_of_step(8)
        (256, 128)
    """
    return 8 * LINE // bits


def stage_bytes(halves: int, bits: int, group: int) -> int:
    """Shared memory of a stage: codes of the rows and of the weights, and the scales of both.

    Example:
        >>> stage_bytes(2, 4, 16) == 3 * (128 * 128 + 128 * 16)
        True
    """
    return (1 + halves) * TILE_ROWS * (LINE + columns_of_step(bits) // group)


def default_config(gated: bool, bits: int, group: int) -> Config:
    """As many stages as shared memory holds beside what the epilogue stages. Not measured: there was no GPU to do it on.

    Args:
        gated: whether the activation takes gate and up.
        bits: of a code.
        group: columns that share a scale.

    Example:
        >>> default_config(True, 4, 16), default_config(False, 8, 32)
        (Config(halves=2, stages=3, band=8), Config(halves=1, stages=5, band=8))
    """
    halves = 2 if gated else 1
    left = SHARED_BYTES - 2 * TILE_ROWS * LINE - 4096  # barriers, and filling before tiles
    return Config(halves=halves, stages=min(8, left // stage_bytes(halves, bits, group)))
