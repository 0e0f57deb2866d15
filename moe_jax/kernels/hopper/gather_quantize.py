"""Rows of hidden states quantized on the way to their groups on Hopper: a token is read and quantized once, written k times.

As in `gather`, a bulk copy brings a token's row into shared memory. A warpgroup turns it into codes there, and k bulk copies
write these to the rows that the token's slots were given.

Scales are stored transposed, a line for each group of columns, because a matmul reads those of a run of rows at once: single
words, 4 * R bytes apart, for which a copy from shared memory would be too small. The threads that share a group store its scale,
each for one of the token's slots.

Learned on an H100 (benchmarks/results/2026-11-26-h100-quantize.txt): 16384 rows of 7168 bfloat16 take 130 us with FP8 groups of
128, 125 us with a scale a row, 2.7 to 2.8 TB/s read and written; 4096 tokens of 2048, 8 places each, 34 us with groups and 32 us
with a scale a row. 1 to 128 tokens: about 2 us. The scales of groups are single words, far apart: with 16384 tokens of 2048, 8
places each, 159 us instead of 128 us, and 193 us where L2 is not told to keep them (2026-11-26-h100-fp8-paired.txt).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from moe_jax import _compat
from moe_jax.kernels.hopper import row_stream
from moe_jax.kernels.hopper.scaling import Scaling
from moe_jax.quantization.formats import Spec

SPARE_ROWS = 192  # of the scales: a matmul's run of rows may begin at the last one
_MAX_SLOTS = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """Rows in shared memory, and what a multiprocessor does at a time.

    Attributes:
        ahead: rows on their way in while one is quantized; None for some KiB.
        leaving: rows of codes, all but one on their way out.
        tiles: of a row that are in registers at a time.
        ctas_per_sm: at most; None for what registers leave room for.
    """

    ahead: int | None = None
    leaving: int = 2
    tiles: int = 4
    ctas_per_sm: int | None = None


def scales_shape(rows: int, columns: int, spec: Spec) -> tuple[int, int]:
    """``[G, Rp]``: groups of columns of a row, and rows with some to spare, rounded up to 16 bytes.

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
    if spec.granularity == "group" and spec.block[1] not in row_stream.BLOCKS:
        return f"block={spec.block} must be (1, 32), (1, 64) or (1, 128): a group lies within a warp"
    if hidden % 16:
        return (
            f"hidden_size={hidden} must be a multiple of 16 (a bulk copy moves 16 bytes of codes); pad it, "
            "or use implementation='xla'"
        )
    if not row_stream.fits(x, Config.leaving):
        return f"hidden_size={hidden} of {x.dtype}: two rows and their codes must fit in shared memory"
    if top_k > _MAX_SLOTS:
        return f"top_k={top_k} must be at most {_MAX_SLOTS}"
    if 0 in x.shape or top_k == 0:
        return f"an empty operand (x {x.shape}, top_k={top_k}) needs no kernel"
    return None


def gather_quantize(
    x: Float[Array, "T H"],
    positions: Int[Array, "T k"] | None,
    spec: Spec,
    *,
    scales: Float[Array, " one_or_T"] | None = None,
    amax: Float[Array, " W"] | None = None,
    weights: Float[Array, "T 1"] | None = None,
    num_rows: Int[Array, "1"] | None = None,
    total_rows: int | None = None,
    config: Config = Config(),
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> tuple[Shaped[Array, "R H"], Float[Array, "G Rp"]]:
    """Codes of `x[t]` in row `positions[t, j]`, or t without positions, and scales; other rows of both are undefined.

    Args:
        x: hidden states.
        positions: rows of each token, -1 for none.
        spec: see `supports`.
        scales: float32, given, one for all or one a token; None if they are taken from x.
        amax: where one scale for all is taken from x: what `row_amax` found.
        weights: float32, a factor of each token, before quantizing.
        num_rows: without positions, the rows that count: none after them is written.
        total_rows: R; T * k by default.
        config: what is in shared memory.
        interpret: how the kernel is interpreted, None on a GPU.
        multiprocessors: to be used; those of the GPU by default.
    """
    tokens, hidden = x.shape
    top_k = 1 if positions is None else positions.shape[1]
    grouped = spec.granularity == "group"
    interpreted = interpret is not None
    tile = row_stream.Tile(spec.block[1] if grouped else row_stream.BLOCKS[-1], x.dtype, interpreted)
    a_scale = tile.layout.reduce(1)
    total_rows = tokens * top_k if total_rows is None else total_rows
    shape_of_scales = scales_shape(total_rows, hidden, spec)
    sms = multiprocessors or _compat.num_multiprocessors()
    plan = row_stream.Plan.of(x, tile, sms, config.ctas_per_sm, config.leaving, config.ahead)
    scaling = Scaling(spec, given=scales is not None, interpret=interpreted)
    operands = {"positions": positions, "scales": scales, "amax": amax, "weights": weights, "num_rows": num_rows}
    operands = {name: operand for name, operand in operands.items() if operand is not None}

    def quantize_rows(x_g, *refs):
        given = dict(zip(operands, refs, strict=False))
        out_g, scales_g, rows_s, full, codes_s = refs[len(operands) :]
        stream = row_stream.Stream(plan, x_g, rows_s, full, given["num_rows"][0] if "num_rows" in given else None)
        common = None
        if amax is not None:
            common = scaling.scale(jnp.max(plgpu.load(given["amax"], layout=plgpu.Layout.WG_STRIDED(amax.shape, 1))))

        def scale_of_row(token, elements):
            """The one scale of a row."""
            if scales is not None:
                return scaling.stored(given["scales"][0 if scales.shape[0] == 1 else token])
            if amax is not None:
                return common
            order = scaling.order(elements(0))
            for part in range(1, plan.tiles):
                order = jnp.maximum(order, scaling.order(elements(part)))
            return scaling.scale(scaling.amax(jnp.max(jnp.max(order, axis=1), axis=0)))

        def store_scales(found, part, rows):
            _store_scales(scales_g, found, part * tile.groups, rows, a_scale, interpreted)

        @pl.loop(0, stream.size)
        def _row(i):
            token = stream.token(i)
            rows = [token] if positions is None else [given["positions"][token, j] for j in range(top_k)]
            weight = given["weights"][token, 0] if weights is not None else None
            row, codes = stream.wait(i), codes_s.at[lax.rem(i, config.leaving)]

            def elements(part):
                x = tile.load(row, part)
                return x.astype(jnp.float32) if weight is None else scaling.weigh(x, weight)

            if not grouped:
                scale = tile.a_group(scale_of_row(token, elements))
                factor = scaling.reciprocal(scale, a_scale)
                store_scales(scale, 0, rows)
            plgpu.wait_smem_to_gmem(config.leaving - 1, wait_read_only=True)
            for start in range(0, plan.tiles, config.tiles):
                # Step by step for all tiles that are held, so that their latencies overlap: the compiler moves neither loads
                # past stores of codes nor anything past a reciprocal, which branches.
                parts = range(start, min(start + config.tiles, plan.tiles))
                held = [elements(part) for part in parts]
                if not grouped:
                    factors = [factor] * len(held)
                else:
                    found = [scaling.scale(scaling.amax(jnp.max(scaling.order(x), axis=1))) for x in held]
                    factors = [scaling.reciprocal(scale, a_scale) for scale in found]
                    for part, scale in zip(parts, found, strict=True):
                        store_scales(scale, part, rows)
                for part, x, inverse in zip(parts, held, factors, strict=True):
                    tile.store(codes, part, scaling.encode(x, tile.spread(inverse)))
            plgpu.commit_smem()  # also: every thread is done with the row
            for target in rows:

                @pl.when(target >= 0)
                def _(target=target):
                    plgpu.copy_smem_to_gmem(codes.at[pl.ds(0, hidden)], out_g.at[target], commit_group=False)

            plgpu.commit_smem_to_gmem_group()

        plgpu.wait_smem_to_gmem(0)

    codes_and_scales = _compat.kernel(
        quantize_rows,
        out_type=[
            jax.ShapeDtypeStruct((total_rows, hidden), spec.storage_dtype),
            jax.ShapeDtypeStruct(shape_of_scales, jnp.float32),
        ],
        grid=(plan.workers,),
        grid_names=("sm",),
        scratch_types=[*plan.scratch, plgpu.SMEM((config.leaving, plan.padded_columns), spec.storage_dtype)],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(x, *operands.values())
    return tuple(codes_and_scales)


def _store_scales(target: Any, found: Any, first: int, rows: list[Any], layout: Any, interpreted: bool) -> None:
    """Scales of the groups from `first` on to the columns `rows` of ``[G, Rp]``; those past the last group to nowhere."""
    if interpreted:
        count = min(found.shape[0], target.shape[0] - first)
        for row in rows:

            @pl.when(row >= 0)
            def _(row=row):
                target[pl.ds(first, count), row] = found[:count]

        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, *[plgpu.Layout.WG_SPLAT] * len(rows)))
    def store(ctx, target, values, *columns):
        del ctx
        _compat.store_columns(target, values, first, columns)

    store(target, found, *rows)
