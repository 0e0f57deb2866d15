"""How the grouped matmul is tiled, and the rule that chooses a tiling; from measurements on an H200 (benchmarks/results)."""

from __future__ import annotations

import dataclasses

from jax.experimental import pallas as pl

from moe_jax import _compat

WGMMA_ROWS = 64  # rows of weights that one wgmma takes
_FEW = (8, 16, 24, 32, 40, 48, 64)
FEW_ROWS = _FEW[-1]
_ABOUT_64 = (16, 48, 64, 80)  # nearly all experts of 64 rows have one tile
_SOME = (16, 32, 48, 64, 80, 96, 112, 128)
_MANY = (16, 32, 64, 96, 112, 120, 128, 136, 144, 152, 160)
# As many as the registers hold; three stages, two blocks together.
_MOST = (16, 32, 64, 96, 112, 128, 144, 160, 176, 192)
MOST_ROWS = _MOST[-1]
_COARSE = (8, 16, 32, 64, 96, 128)  # row counts where each costs a long loop
_MANY_EIGHT_BIT = 192  # rows an expert, of operands of one byte, from which on products bind and not memory
_MOST_EIGHT_BIT = 160  # rows of a tile, of operands of one byte
_PROMOTED = 96  # with scales of blocks: `matmul_fp8` says why
_ROWS_FIRST = 128  # and with rows on the M side: `matmul_rows_first`
MANY_PROMOTED = 256  # rows an expert from which on those are faster
MOST_DECODED = 160  # rows of a tile, of weights that are decoded: two blocks of them stand in registers beside the sums
MOST_FETCHED_DECODED = 144  # where the rows are fetched by their tokens, which takes registers from the consumers
MOST_CONSUMERS = 4  # that decode weights, for few rows
MANY_FETCHED_FOUR_BIT = 192  # rows an expert from which on that was measured to pay
PRODUCER_REGISTERS, _REGISTERS = 24, 64 * 1024  # of a producer's thread; of a multiprocessor
WIDE_DECODED = _SOME[-1]  # beyond it the machine code allows two row counts: `decoding_config.four_bit`
FEW_DECODED = (8, 16, 24, 32, 40, 48)  # row counts of few rows where several consumers decode
_BETWEEN = 8  # columns that a multiprocessor could make in the time from one tile to the next, with one token


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile of the kernel: `consumers` x `halves` x 64 rows of weights, up to `row_counts[-1]` rows of a group."""

    row_counts: tuple[int, ...] = _MANY  # the last is the row tile of `group_tokens`
    consumers: int = 2
    halves: int = (
        2  # blocks of 64 weight rows per consumer: gate and up, or two neighbours; 1 without a gate, or `paired`
    )
    tile_k: int = 64
    stages: int = 3
    band: int = 8  # row tiles of an expert, at most, walked together before the next weight columns: `tiles.visit`
    cluster: int = 1  # neighbouring blocks of weight columns that fetch their rows once and together
    columns: int = 64  # of the output that a block of 64 weight rows makes: 64, 32 or 16
    gather: bool = False  # rows of an up-projection are fetched by their tokens from the hidden states: `rows_by_token`
    quantizes: bool = False  # rows of an up-projection are quantized as they leave it: `quantized_store`
    rows_first: bool = False  # 8-bit rows on the M side of wgmma, 64 a consumer, by 128 of weights: `matmul_rows_first`
    overlap: bool = True  # products of a step run while the next are issued; its stage is handed back after that
    paired: bool = False  # gate and up of a tile are those of two consumers with a half each: `pairs`
    interleaved: bool = False  # gate and up rows of a consumer by eights, 32 columns of the output: `interleaved`
    teams: int = 1  # of so many consumers and stages, with tiles of their own: one decodes while the other stores
    codes_stages: int = 0  # of the ring of four-bit codes that become FP8 weights (`fp8_from_four`); 0 without

    @property
    def depth(self) -> int:
        """Pieces of K that a stage holds side by side."""
        return 1 if self.interleaved else WGMMA_ROWS // self.columns

    @property
    def whole(self) -> Config:
        """With both halves of a tile in the place of each pair of consumers.

        Example:
            >>> whole = Config(consumers=4, halves=1, paired=True).whole
            >>> whole.consumers, whole.halves
            (2, 2)
        """
        return dataclasses.replace(self, consumers=self.consumers // 2, halves=2, paired=False) if self.paired else self

    @property
    def everyone(self) -> Config:
        """All teams as one: what they take of a multiprocessor.

        Example:
            >>> everyone = Config(consumers=2, stages=3, teams=2).everyone
            >>> everyone.consumers, everyone.stages
            (4, 6)
        """
        return dataclasses.replace(
            self, consumers=self.consumers * self.teams, stages=self.stages * self.teams, teams=1
        )

    @property
    def stage_rows(self) -> int:
        """Rows of weights that a stage holds: wgmma reads 64 from any block on."""
        beyond = 0 if self.interleaved else WGMMA_ROWS - self.columns
        return self.consumers * self.halves * WGMMA_ROWS + beyond

    @property
    def stage_size(self) -> int:
        """Elements of a stage, weights and rows."""
        return self.stage_rows * self.tile_k // self.depth + self.tile_rows * self.tile_k

    @property
    def tile_rows(self) -> int:
        """Rows that a tile can hold."""
        return self.row_counts[-1]


def tile_rows_for(mean_rows: float, num_pairs: int, gather: bool = False, *, coded: bool = True) -> int:
    """The row tile for a mean number of rows per expert, of so many in all; `gather` as in `Config`, `coded`: weights are codes.

    Example:
        >>> [tile_rows_for(mean, 8192) for mean in (8.0, 64.0, 256.0)], tile_rows_for(64.0, 8192, coded=False)
        ([64, 128, 160], 80)
    """
    if num_pairs <= 8:
        return 8
    if mean_rows <= 48:
        return FEW_ROWS
    if mean_rows <= 96:
        return _SOME[-1] if coded or mean_rows > 64 else _ABOUT_64[-1]
    return _MANY[-1] if gather or mean_rows < 512 else _MOST[-1]


def fetches_by_token(mean_rows: float, hidden_size: int, intermediate_size: int) -> bool:
    """Whether the up-projection of a layer fetches its rows by their tokens, instead of a kernel before it.

    What that saves, writing and reading all rows once, is the smaller a part of the layer the larger I is. A wide tile of three
    stages has none to spare for rows that are handed over late, and 16 to 96 rows an expert, where each step waits for memory,
    none at all: layers took 0.5 to 2 % longer (2026-11-25-h200-variants.txt).

    Example:
        >>> [fetches_by_token(mean, 2048, 768) for mean in (8.0, 32.0, 256.0, 512.0, 1024.0)]
        [True, False, True, False, True]
    """
    if hidden_size % 64 or intermediate_size > 2048:
        return False
    return mean_rows <= 16 or 48 < mean_rows < 512 or mean_rows >= 768


def default_config(tile_rows: int, gated: bool, n_out: int, likely_tiles: int) -> Config:
    """The configuration for a row tile, from measurements on an H200 (benchmarks/results).

    Args:
        tile_rows: of `group_tokens`.
        gated: whether the activation takes gate and up.
        n_out: columns of the output.
        likely_tiles: row tiles that a spread-out routing makes.

    With few rows the stream of weights is all that counts: narrow tiles keep every multiprocessor busy, 128 elements of K a
    stage read memory in longer runs. So it is with 64 rows an expert, in tiles of 80 that hold nearly all of them: a layer of
    qwen3-235b and 1024 tokens 1827 us, 1872 with 64 of K and twice the weights a tile (2026-11-27-h100-variants.txt).
    """

    def up_to(counts):
        return tuple(c for c in counts if c < tile_rows) + (tile_rows,)

    if tile_rows > _MANY[-1]:
        return Config(up_to(_MOST), stages=3, cluster=2 if tile_rows % 16 == 0 else 1)
    if tile_rows > _SOME[-1]:
        return Config(up_to(_MANY), stages=4)
    # Where steps wait for memory, a stage that is handed back only when the next has come is one less on its way: 0.2 to 1 %
    # of a layer of 128 or 1024 tokens (2026-11-25-h200-variants.txt). With a handful of rows it is the other way round.
    if tile_rows > _ABOUT_64[-1]:
        return Config(up_to(_SOME), stages=4, overlap=False)
    counts = up_to(_FEW if tile_rows <= FEW_ROWS else _ABOUT_64)
    few = Config(counts, consumers=1, halves=2, tile_k=128, stages=4, overlap=tile_rows <= 16)
    if tile_rows > FEW_ROWS:
        return few
    multiprocessors = _compat.num_multiprocessors()
    if not gated and likely_tiles * pl.cdiv(n_out, 2 * WGMMA_ROWS) < multiprocessors:
        few = dataclasses.replace(few, halves=1, stages=6)
    if tile_rows > 8:
        return few

    if not gated and few.halves == 2:
        return few

    def narrow(columns):
        stages = 5 if gated and columns == WGMMA_ROWS else few.stages
        return dataclasses.replace(few, columns=columns, tile_k=128 * WGMMA_ROWS // columns, stages=stages)

    columns = min((64, 32, 16), key=lambda columns: work_of(columns, n_out, likely_tiles))  # the widest of equal ones
    return narrow(columns)


def work_of(columns: int, n_out: int, likely_tiles: int) -> int:
    """Of the busiest multiprocessor, with tiles of one token and so many columns."""
    return rounds(columns, n_out, likely_tiles) * (columns + _BETWEEN)


def rounds(columns: int, n_out: int, likely_tiles: int) -> int:
    """Tiles of so many columns that the busiest multiprocessor has."""
    return pl.cdiv(likely_tiles * pl.cdiv(n_out, columns), _compat.num_multiprocessors())


def registers(consumers: int, producer: int = PRODUCER_REGISTERS) -> int:
    """Registers of a consumer's thread: what the launch gave all threads of a block, less those of the producer.

    With more a kernel waits for them for ever.

    Example:
        >>> registers(2), registers(2, 56), registers(4)
        (240, 224, 112)
    """
    warpgroups = consumers + 1
    at_launch = _REGISTERS // (128 * warpgroups) // 8 * 8
    return min(240, (at_launch * warpgroups - producer) // consumers // 8 * 8)


def in_whole_steps(config: Config, k: int) -> Config:
    """Steps of 192 of K in the place of 128 where the last would be half empty, for few rows; of 64 where 192 do not divide it.

    gpt-oss-120b, K = 2880, H100, layers of 16, 128 and 1024 tokens with steps of 64 and of 192 (2026-11-28-h100-variants.txt):
    bfloat16 884 and 877 us, 2095 and 2073, 2353 and 2321, of which handing stages back a step late is 0, 5 and 18 us. int8,
    16 and 128 tokens, steps of 128 and 192: 513 and 507, 1184 and 1154. MXFP4, four consumers, 128 and 1024 tokens: 600 and 597,
    764 and 756 (2026-11-27-h100-variants.txt). Where 128 divides K both take up to 4 % longer.

    Consumers of decoded weights take 256 of K a step, of which 2880 has no whole number either: 320, if that leaves three stages,
    or 192. MXFP4, 16 tokens, on an H200: 191 and 203 us (2026-11-28-h200-four-bits-variants.txt).

    Example:
        >>> few = Config((64,), consumers=1, tile_k=128, stages=4)
        >>> [in_whole_steps(few, k).tile_k for k in (2048, 2880, 832)]
        [128, 192, 64]
        >>> teams = Config((16,), halves=1, tile_k=256, stages=4, teams=2)
        >>> [in_whole_steps(teams, k).tile_k for k in (2048, 2880, 576)]
        [256, 320, 192]
    """
    long = config.everyone.consumers == 4 or config.interleaved
    if config.halves == 1 and config.tile_k == 256 and k % 256 and (long or config.tile_rows > 8):
        steps = (320, 192) if long and config.stages > 3 else (192,)
        tile_k = next((step for step in steps if k % step == 0), 128)
        return dataclasses.replace(config, tile_k=tile_k, stages=config.stages * 256 // tile_k)
    if config.tile_k != 128 or config.tile_rows <= 8 or config.columns < WGMMA_ROWS or not 0 < k % 128 <= 64:
        return config
    if k % 192 == 0 and (config.consumers != 2 or config.halves == 1 or config.teams > 1):
        overlap = config.overlap or config.consumers == 1
        return dataclasses.replace(config, tile_k=192, stages=pl.cdiv(config.stages * 2, 3), overlap=overlap)
    if config.consumers == 1:
        return dataclasses.replace(config, tile_k=64, stages=config.stages * 3 // 2)
    return config


def few_counts(config: Config) -> Config:
    """With fewer row counts, for kernels whose loops are long: each count has a copy of them.

    Example:
        >>> few_counts(Config(row_counts=(8, 24, 64, 120, 128))).row_counts
        (8, 64, 128)
    """
    counts = tuple(c for c in config.row_counts if c in _COARSE or c == config.tile_rows)
    return dataclasses.replace(config, row_counts=counts)


def eight_bit_tile_rows(mean_rows: float, num_pairs: int, promoted: bool = False) -> int:
    """The row tile of operands of one byte: `eight_bit` says why. `promoted`: with scales of blocks.

    Example:
        >>> [eight_bit_tile_rows(mean, 10000) for mean in (8.0, 96.0, 128.0, 256.0)]
        [64, 128, 160, 144]
        >>> [eight_bit_tile_rows(mean, 10000, promoted=True) for mean in (8.0, 96.0, 2048.0)]
        [64, 96, 96]
    """
    rows = tile_rows_for(mean_rows, num_pairs)
    if promoted and rows > FEW_ROWS:
        return _PROMOTED
    if rows <= _SOME[-1]:
        return rows
    return 160 if mean_rows < _MANY_EIGHT_BIT else 144


def most_rows(promoted: bool, rows_first: bool) -> int:
    """The largest row tile of operands of one byte, for the registers; `promoted`: with scales of blocks.

    Example:
        >>> most_rows(False, False), most_rows(True, False), most_rows(True, True)
        (160, 96, 128)
    """
    if not promoted:
        return _MOST_EIGHT_BIT
    return _ROWS_FIRST if rows_first else _PROMOTED


def from_four_bits(config: Config) -> Config:
    """The tiles of FP8 operands for weights of four bits that become FP8 on their way: see `fp8_from_four`.

    Codes have a ring of their own, and stages take what it leaves: two or three are enough, for the codes of more are on their
    way. In tiles of many rows two stages of codes are better than three: qwen3-30b-a3b on an H100, kernels of a layer of 4096
    tokens 542.8 us instead of 552.5, of 16384 tokens 1860.7 instead of 1898.9 (2026-11-27-h100-variants.txt). What they leave is
    no room for a fourth stage beside them. A block of codes has 64 rows: no narrow tiles. What is best for few rows has not been
    measured.

    Example:
        >>> config = from_four_bits(Config((64, 96), tile_k=128, stages=4))
        >>> config.stages, config.codes_stages
        (3, 2)
        >>> from_four_bits(Config((8,), consumers=1, columns=16, tile_k=1024)).tile_k
        256
    """
    if config.consumers == 2:
        return dataclasses.replace(config, stages=3, codes_stages=2, columns=WGMMA_ROWS)
    return dataclasses.replace(config, stages=2, codes_stages=6, columns=WGMMA_ROWS, tile_k=256)


def pays_to_quantize(config: Config, mean_rows: float) -> bool:
    """Whether an up-projection with scales of blocks should quantize its rows as they leave it: `quantized_store` says why."""
    return config.tile_rows > FEW_ROWS and mean_rows >= _MANY_EIGHT_BIT


def rows_first(config: Config) -> Config:
    """The tiles of `matmul_rows_first` in the place of those of `eight_bit`, for operands with scales of blocks.

    With 256 rows an expert both take about as long; quantizing rows as they leave costs these 1 to 2 % and those 4 to 6 %. With
    512 rows and more these are faster, by 6 to 18 %. With 128 rows an expert they take 15 % longer: most tiles of 128 rows have a
    consumer that is nearly idle (benchmarks/results/2026-11-27-h100-fp8-rows-first.txt).

    Example:
        >>> rows_first(Config((64, 96), tile_k=128)).row_counts
        (64, 128)
    """
    return dataclasses.replace(config, row_counts=(FEW_ROWS, _ROWS_FIRST), rows_first=True)


def eight_bit(config: Config, mean_rows: float = _MANY_EIGHT_BIT) -> Config:
    """The same tiles for operands of one byte: twice as much of K in the same shared memory; no clusters, no rows by token.

    Measured on an H100 (benchmarks/results/2026-11-26-h100-fp8-variants.txt), up-projections:

    - Two tiles of an expert that are not equally fast read its weights from memory twice. Below 192 rows an expert that is what
      counts: one tile for nearly all experts, or tiles that all take the same time (dsv3-ep8, 4096 tokens, scales of channels:
      371 us with up to 160 rows, 419 us with up to 128).
    - With more rows products bind: counts near the mean share of a tile (qwen3-30b-a3b, 4096 tokens, scales of channels: 219 us
      with 128 and 144 rows, 229 us with up to 128).
    - With scales of blocks two products of a tile of up to 96 rows are under way (2026-11-26-h100-fp8-paired.txt). With up to 96
      and up to 128 rows: qwen3-235b, 4096 tokens, 906 and 1006 us, the down-projection 488 and 494; dsv3-ep8, 4096 tokens, 367
      and 399, 197 and 229; qwen3-30b-a3b, 16384 tokens, 821 and 814, 469 and 489. The wider tile, better with 2048 rows an
      expert, gave way to `rows_first`.
    - With 120 among the row counts 13 % longer than without (2026-11-26-h100-fp8-products.txt).

    Example:
        >>> eight_bit(Config(tile_k=64, cluster=2)).tile_k
        128
    """
    counts = few_counts(config).row_counts
    if config.tile_rows > FEW_ROWS:
        if config.tile_rows <= _PROMOTED:
            counts = (FEW_ROWS, config.tile_rows)
        elif mean_rows < _MANY_EIGHT_BIT:
            few = 96 if config.tile_rows > 128 else 64 if mean_rows <= 96 else config.tile_rows
            counts = tuple(sorted({few, config.tile_rows}))
        else:
            wanted = (64, 128) if config.tile_rows > 128 else (64, 96)
            counts = (*(c for c in wanted if c < config.tile_rows), config.tile_rows)
    overlap = config.overlap and config.tile_rows <= FEW_ROWS
    return dataclasses.replace(
        config, row_counts=counts, tile_k=2 * config.tile_k, cluster=1, gather=False, overlap=overlap
    )
