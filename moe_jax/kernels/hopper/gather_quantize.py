"""Rows of hidden states quantized on the way to their groups on Hopper: a token is read and quantized once, written k times.

As in `gather`, a bulk copy brings a token's row into shared memory. A warpgroup turns it into codes there, and k bulk copies
write these to the rows that the token's slots were given. Eight neighbouring elements are a thread's, a group of 128 columns is
half a warp's, so that a group's scale takes four shuffles and no shared memory. The elements in registers are few at a time.

Scales are stored transposed, a line for each group of columns, because a matmul reads those of a run of rows at once: single
words, 4 * R bytes apart, for which a copy from shared memory would be too small. The threads that share a group store its scale,
each for one of the token's slots.

Not timed yet. 16384 rows of 7168 bf16 elements to fp8 are 352 MB: 82 us at the speed of an H200's memory.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from moe_jax import _compat
from moe_jax.kernels.hopper import tiles
from moe_jax.kernels.hopper.scaling import Scaling
from moe_jax.quantization.formats import Spec

TILE = 1024  # columns that a warpgroup holds as one: eight a thread
SPARE_ROWS = 192  # of the scales: a matmul's run of rows may begin at the last one
_BLOCKS = (32, 64, 128)  # columns of a group
_MAX_SLOTS = 64
_BUFFER_BYTES = 200 * 1024  # shared memory of all CTAs of a multiprocessor
_IN_FLIGHT = 12 * 1024  # bytes on their way into a CTA that are enough


@dataclasses.dataclass(frozen=True)
class Config:
    """Rows in shared memory, and what a multiprocessor does at a time.

    Attributes:
        ahead: rows on their way in while one is quantized.
        leaving: rows of codes, all but one on their way out.
        tiles: of 1024 columns that are in registers at a time.
        ctas_per_sm: at most.
    """

    ahead: int
    leaving: int = 2
    tiles: int = 4
    ctas_per_sm: int = 8

    @classmethod
    def of(cls, row_bytes: int) -> Config:
        """For rows of that size."""
        return cls(ahead=min(4, max(1, _IN_FLIGHT // row_bytes)))


def scales_shape(rows: int, columns: int, spec: Spec) -> tuple[int, int]:
    """``[G, Rp]``: groups of columns of a row, and rows rounded up with some to spare.

    Example:
        >>> scales_shape(10, 200, Spec("int8", "group", 128))
        (2, 204)
    """
    groups = pl.cdiv(columns, spec.block[1]) if spec.granularity == "group" else 1
    return groups, pl.cdiv(rows + SPARE_ROWS, 4) * 4


def supports(x: Any, spec: Spec, top_k: int = 1) -> str | None:
    """Why this kernel cannot quantize rows of `x` [T, H] for `top_k` slots; None if it can."""
    hidden = x.shape[1]
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"dtype {x.dtype} must be bfloat16, float16 or float32"
    if spec.dtype not in ("float8_e4m3fn", "int8"):
        return f"dtype={spec.dtype!r} of {spec} must be float8_e4m3fn or int8: activations have no other codes"
    if spec.granularity not in ("tensor", "token", "group"):
        return f"granularity={spec.granularity!r} must be tensor, token or group, as that of activations is"
    if spec.granularity == "group" and spec.block[1] not in _BLOCKS:
        return f"block={spec.block} must be (1, 32), (1, 64) or (1, 128): a group lies within a warp"
    if hidden % 16:
        return f"hidden_size={hidden} must be a multiple of 16 (a bulk copy of codes moves 16 bytes); pad it, or use implementation='xla'"
    if pl.cdiv(hidden, TILE) * TILE * (2 * x.dtype.itemsize + 2) > _BUFFER_BYTES:
        return f"hidden_size={hidden} of {x.dtype}: two rows and their codes must fit in shared memory"
    if top_k > _MAX_SLOTS:
        return f"top_k={top_k} must be at most {_MAX_SLOTS}"
    if 0 in x.shape or top_k == 0:
        return f"an empty operand (x {x.shape}, top_k={top_k}) needs no kernel"
    return None


class Row:
    """A row in shared memory, seen as tiles of ``[groups, columns of a group]``.

    The interpreter knows no reshaped references: there the values are reshaped.
    """

    def __init__(self, ref: Any, block: int, interpret: bool):
        self._ref, self._shape, self._interpret = ref, (TILE // block, block), interpret

    def load(self, tile: int) -> Any:
        """A tile in registers."""
        part = self._ref.at[pl.ds(tile * TILE, TILE)]
        if self._interpret:
            return part[...].reshape(self._shape)
        return plgpu.load(part.reshape(self._shape), layout=layout(self._shape[1]))

    def store(self, tile: int, values: Any) -> None:
        """A tile from registers."""
        part = self._ref.at[pl.ds(tile * TILE, TILE)]
        if self._interpret:
            part[...] = values.reshape(TILE)
        else:
            part.reshape(self._shape)[...] = values


@functools.cache
def layout(block: int) -> Any:
    """Groups of a tile in registers: eight neighbouring columns a thread, the threads of a group side by side."""
    a_warp = 256 // block  # groups
    return _compat.tiled_layout(
        ((4 * a_warp, block), (a_warp, block), (8,)), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    )


def spread(values: Any, block: int) -> Any:
    """A value a group, repeated over its columns; one for all of a row stays as it is."""
    if values.ndim == 0:
        return values
    return plgpu.layout_cast(lax.broadcast_in_dim(values, (TILE // block, block), [0]), layout(block))


def gather_quantize(
    x: Float[Array, "T H"],
    positions: Int[Array, "T k"] | None,
    spec: Spec,
    *,
    scales: Float[Array, " one_or_T"] | None = None,
    amax: Float[Array, " W"] | None = None,
    weights: Float[Array, "T 1"] | None = None,
    num_rows: Int[Array, "1"] | None = None,
    config: Config | None = None,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> tuple[Shaped[Array, "R H"], Float[Array, "G Rp"]]:
    """Codes of `x[t]` in row `positions[t, j]`, or t without positions, and scales; other rows of both are undefined.

    Args:
        x: hidden states.
        positions: rows of each token, -1 for none.
        spec: see `supports`.
        scales: given, one for all or one a token; None if they are taken from x.
        amax: for one scale for all that is taken from x: from `row_amax`, magnitudes whose maximum counts.
        weights: float32, a factor of each token, before quantizing.
        num_rows: without positions, the rows that count: none after them is written.
        config: `Config.of` by default.
        interpret: how the kernel is interpreted, None on a GPU.
        multiprocessors: to be used; those of the GPU by default.
    """
    tokens, hidden = x.shape
    top_k = 1 if positions is None else positions.shape[1]
    grouped = spec.granularity == "group"
    block = spec.block[1] if grouped else 128
    groups, padded_rows = scales_shape(tokens * top_k, hidden, spec)
    row_tiles = pl.cdiv(hidden, TILE)
    config = config or Config.of(hidden * x.dtype.itemsize)
    stages, leaving = config.ahead + 1, config.leaving
    buffer_bytes = row_tiles * TILE * (stages * x.dtype.itemsize + leaving)
    ctas = max(1, min(config.ctas_per_sm, _BUFFER_BYTES // buffer_bytes))
    workers = min((multiprocessors or _compat.num_multiprocessors()) * ctas, tokens)
    scaling = Scaling(spec, given=scales is not None, interpret=interpret is not None)
    operands = {"positions": positions, "scales": scales, "amax": amax, "weights": weights, "num_rows": num_rows}
    operands = {name: operand for name, operand in operands.items() if operand is not None}

    def quantize_rows(x_g, *refs):
        given = dict(zip(operands, refs, strict=False))
        out_g, scales_g, rows_s, codes_s, full = refs[len(operands) :]
        worker = lax.axis_index("sm")
        counted = jnp.clip(given["num_rows"][0], 0, tokens) if "num_rows" in given else tokens
        mine = tiles.share(counted, worker, workers)

        def fetch(i):
            source, slot = x_g.at[worker + i * workers], lax.rem(i, stages)
            target = rows_s.at[slot, pl.ds(0, hidden)]
            plgpu.copy_gmem_to_smem(source, target, full.at[slot], oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

        def store_scales(found, first, rows):
            if interpret is not None:
                count = min(found.shape[0], groups - first)
                for row in rows:

                    @pl.when(row >= 0)
                    def _(row=row):
                        scales_g[pl.ds(first, count), row] = found[:count]

                return
            splats = [plgpu.Layout.WG_SPLAT] * len(rows)

            @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout(block).reduce(1), *splats))
            def store(ctx, target, values, *columns):
                del ctx
                _compat.store_columns(target, values, first, columns)

            store(scales_g, found, *rows)

        # What lies behind a row in shared memory counts as zero.
        if hidden % TILE:
            for slot in range(stages):
                rows_s[slot, pl.ds((row_tiles - 1) * TILE, TILE)] = jnp.zeros((TILE,), x.dtype)
            plgpu.commit_smem()
        pl.loop(0, jnp.minimum(config.ahead, mine))(fetch)
        if amax is not None:
            common = scaling.scale(jnp.max(plgpu.load(given["amax"], layout=plgpu.Layout.WG_STRIDED(amax.shape, 1))))

        @pl.loop(0, mine)
        def _row(i):
            slot, token = lax.rem(i, stages), worker + i * workers
            rows = [token] if positions is None else [given["positions"][token, j] for j in range(top_k)]
            weight = given["weights"][token, 0] if weights is not None else None
            scale = None
            if scales is not None:
                scale = scaling.stored(given["scales"][0 if scales.shape[0] == 1 else token])
            elif amax is not None:
                scale = common

            @pl.when(i + config.ahead < mine)
            def _():
                fetch(i + config.ahead)  # into the buffer that was read before the last `commit_smem`

            plgpu.barrier_wait(full.at[slot])
            row = Row(rows_s.at[slot], block, interpret is not None)
            codes = Row(codes_s.at[lax.rem(i, leaving)], block, interpret is not None)

            def load(tile):
                x = row.load(tile)
                return x.astype(jnp.float32) if weight is None else scaling.weigh(x, weight)

            if scale is None and not grouped:
                order = scaling.order(load(0))
                for tile in range(1, row_tiles):
                    order = jnp.maximum(order, scaling.order(load(tile)))
                scale = scaling.scale(scaling.amax(jnp.max(jnp.max(order, axis=1), axis=0)))
            plgpu.wait_smem_to_gmem(leaving - 1, wait_read_only=True)
            for start in range(0, row_tiles, config.tiles):
                held = {tile: load(tile) for tile in range(start, min(start + config.tiles, row_tiles))}
                for tile, elements in held.items():
                    its_scale = scale
                    if grouped:
                        its_scale = scaling.scale(scaling.amax(jnp.max(scaling.order(elements), axis=1)))
                        store_scales(its_scale, tile * (TILE // block), rows)
                    codes.store(tile, scaling.encode(elements, spread(scaling.reciprocal(its_scale), block)))
            if not grouped:
                everywhere = jnp.full((TILE // block,), scale)
                store_scales(plgpu.layout_cast(everywhere, layout(block).reduce(1)), 0, rows)
            plgpu.commit_smem()  # also: every thread is done with the row
            for target in rows:

                @pl.when(target >= 0)
                def _(target=target):
                    source = codes_s.at[lax.rem(i, leaving), pl.ds(0, hidden)]
                    plgpu.copy_smem_to_gmem(source, out_g.at[target], commit_group=False)

            plgpu.commit_smem_to_gmem_group()

        plgpu.wait_smem_to_gmem(0)

    return _compat.kernel(
        quantize_rows,
        out_type=[
            jax.ShapeDtypeStruct((tokens * top_k, hidden), spec.storage_dtype),
            jax.ShapeDtypeStruct((groups, padded_rows), jnp.float32),
        ],
        grid=(workers,),
        grid_names=("sm",),
        scratch_types=[
            plgpu.SMEM((stages, row_tiles * TILE), x.dtype),
            plgpu.SMEM((leaving, row_tiles * TILE), spec.storage_dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(x, *operands.values())
