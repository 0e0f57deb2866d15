"""What a plan is, and which one a layer takes: the tuned one of its shape, else the default rule."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from moe_jax.config import MoEConfig
from moe_jax.kernels.hopper.decoding_config import Projection, few_tile_rows, four_bit, one_byte
from moe_jax.kernels.hopper.matmul_config import (
    MANY_FETCHED_FOUR_BIT,
    MANY_PROMOTED,
    MOST_DECODED,
    MOST_FETCHED_DECODED,
    Config,
    default_config,
    eight_bit,
    eight_bit_tile_rows,
    fetches_by_token,
    from_four_bits,
    in_whole_steps,
    most_rows,
    pays_to_quantize,
    rows_first,
    tile_rows_for,
)

WEIGHTS_ALONE = "weights"  # what `LayerShape.codes` of a weight-only format begins with

if TYPE_CHECKING:
    from moe_jax.quantization import Spec


class Codes(NamedTuple):
    """`LayerShape.codes` word by word.

    Attributes:
        dtype: of the codes; empty where nothing is quantized.
        granularity: what shares a scale of weights.
        weights_alone: rows are not quantized.

    Example:
        >>> Codes.of("weights int8 channel")
        Codes(dtype='int8', granularity='channel', weights_alone=True)
    """

    dtype: str = ""
    granularity: str = ""
    weights_alone: bool = False

    @classmethod
    def of(cls, text: str) -> Codes:
        """Raises ValueError for what no layer has."""
        words = text.split()
        alone = words[:1] == [WEIGHTS_ALONE]
        if len(words) - alone not in (0, 2) or (alone and len(words) == 1):
            raise ValueError(f"codes={text!r} must be a dtype and a granularity, after {WEIGHTS_ALONE!r} or alone")
        return cls(*words[alone:], weights_alone=alone)

    @property
    def both(self) -> bool:
        """Whether both operands of the matmuls are codes, of a byte each when they are multiplied."""
        return self.dtype != "" and not self.weights_alone

    @property
    def from_four_bits(self) -> bool:
        """Whether weights are of four bits and become FP8, as the rows are."""
        return self.both and self.dtype == "float4_e2m1fn"

    @property
    def promoted(self) -> bool:
        """Whether both operands have scales of blocks: sums of 128 columns are scaled."""
        return self.both and (self.granularity == "block" or self.from_four_bits)

    @property
    def four_bits(self) -> bool:
        """Whether weights are decoded from four bits."""
        return self.weights_alone and self.dtype in ("int4", "float4_e2m1fn")


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """All that the choice of a plan may depend on: shapes, never the routing.

    Attributes:
        num_local_experts: E_local, experts that live here.
        num_pairs: (token, slot) pairs whose expert lives here, when the routing is even.
        hidden_size: H.
        intermediate_size: I, of one expert.
        gated: the up-projection has a gate half and an up half.
        dtype: compute dtype.
        codes: what is quantized, dtype and what shares a scale: both operands of the matmuls, ``float8_e4m3fn block``, or the
            weights alone, ``weights float8_e4m3fn block``. Empty where nothing is. Each has plans of its own: what is decoded on
            its way takes other time and other memory than what is not.
    """

    num_local_experts: int
    num_pairs: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    dtype: str
    codes: str = ""

    @classmethod
    def of(cls, config: MoEConfig, num_tokens: int, num_local_experts: int | None = None) -> LayerShape:
        """The shape of a layer, or of a rank that holds some of its experts, with this many tokens.

        Args:
            config: the layer.
            num_tokens: T.
            num_local_experts: E_local of the rank, which then expects that share of the pairs; all experts by default.

        Example:
            >>> config = MoEConfig(num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048)
            >>> LayerShape.of(config, 4096, num_local_experts=32).num_pairs
            4096
        """
        local = config.num_experts if num_local_experts is None else num_local_experts
        pairs = -(-num_tokens * config.top_k * local // config.num_experts)
        form = config.quantization
        codes = "" if form is None else f"{form.weights.dtype} {form.weights.granularity}"
        codes = f"{WEIGHTS_ALONE} {codes}" if form is not None and not form.multiplies_codes else codes
        return cls(local, pairs, config.hidden_size, config.intermediate_size, config.act.is_gated, config.dtype, codes)

    @property
    def mean_rows(self) -> float:
        """Rows of a local expert, on average."""
        return self.num_pairs / max(1, self.num_local_experts)

    @property
    def problem(self) -> LayerShape:
        """The same problem whatever the number of pairs."""
        return dataclasses.replace(self, num_pairs=0)


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How the grouped matmuls of a layer are tiled. The result does not depend on it, bit for bit; the time does.

    Attributes:
        tile_rows: that `group_tokens` pads the groups to.
        up: configuration of the up-projection.
        down: configuration of the down-projection.

    Raises:
        ValueError: a configuration for another row tile.

    Example:
        >>> LayerPlan(64, Config((8, 64)), Config((8, 32)))
        Traceback (most recent call last):
        ...
        ValueError: down.tile_rows=32 must be the plan's tile_rows=64: both projections run on the same groups of rows
    """

    tile_rows: int
    up: Config
    down: Config

    def __post_init__(self) -> None:
        for name, config in (("up", self.up), ("down", self.down)):
            if config.tile_rows != self.tile_rows:
                raise ValueError(
                    f"{name}.tile_rows={config.tile_rows} must be the plan's tile_rows={self.tile_rows}: "
                    "both projections run on the same groups of rows"
                )

    def for_tile_rows(self, tile_rows: int) -> LayerPlan:
        """The same plan for smaller tiles: more stages in the same memory; no row counts and clusters that these cannot have.

        They hold all of a few tokens, which need not be fetched one by one, and hand their stages back late
        (`Config.overlap`): 1 us of a layer of one token, 0.5 % of 16.

        Example:
            >>> plan = LayerPlan(64, Config((8, 16, 64)), Config((16, 64), cluster=2))
            >>> small = plan.for_tile_rows(8)
            >>> small.up.row_counts, small.down.cluster
            ((8,), 1)
        """
        if tile_rows == self.tile_rows:
            return self

        def smaller(config: Config) -> Config:
            counts = (*(c for c in config.row_counts if c < tile_rows), tile_rows)
            cluster = config.cluster if splits(tile_rows, config) else 1
            late = config.overlap or config.everyone.consumers <= 2  # four have not the registers
            changes = {"row_counts": counts, "cluster": cluster, "overlap": late}
            changes |= {"gather": False, "quantizes": False, "rows_first": False}
            small = dataclasses.replace(config, **changes)
            return dataclasses.replace(small, stages=config.stages * config.stage_size // small.stage_size)

        return LayerPlan(tile_rows, smaller(self.up), smaller(self.down))


def splits(rows: int, config: Config) -> bool:
    """Whether a cluster can share the fetching of so many rows: each block takes whole swizzled tiles of 8 x 64 elements.

    Example:
        >>> splits(24, Config(cluster=2)), splits(24, Config(cluster=2, tile_k=128))
        (False, True)
    """
    return rows // 8 % config.cluster == 0 or config.tile_k // 64 % config.cluster == 0


def default_plan(shape: LayerShape, tile_rows: int | None = None) -> LayerPlan:
    """The plan of the rule: `tile_rows_for` the mean group, then `default_config` for each projection.

    Args:
        shape: of the layer.
        tile_rows: another row tile than the rule's.

    Example:
        >>> default_plan(LayerShape(128, 32768, 2048, 768, gated=True, dtype="bfloat16")).tile_rows
        160
    """
    from moe_jax.tuning.fit import quantizes_misfit, rows_first_misfit, within_memory

    tiles = min(shape.num_pairs, shape.num_local_experts)
    if Codes.of(shape.codes).both:
        promoted = Codes.of(shape.codes).promoted
        found = tile_rows or eight_bit_tile_rows(shape.mean_rows, shape.num_pairs, promoted)
        up = default_config(found, shape.gated, shape.intermediate_size, tiles)
        down = default_config(found, False, shape.hidden_size, tiles)
        up, down = (eight_bit(config, shape.mean_rows) for config in (up, down))
        if Codes.of(shape.codes).from_four_bits:
            up, down = from_four_bits(up), from_four_bits(down)
        first = {name: rows_first(config) for name, config in (("up", up), ("down", down))}
        many = shape.mean_rows >= MANY_PROMOTED if tile_rows is None else tile_rows == first["up"].tile_rows
        if promoted and many and not any(rows_first_misfit(name, config, shape) for name, config in first.items()):
            up, down = first.values()
        quantizes = promoted and pays_to_quantize(up, shape.mean_rows)
        up = dataclasses.replace(up, quantizes=quantizes and quantizes_misfit("up", up, shape) is None)
        return LayerPlan(up.tile_rows, *(within_memory(config, shape.dtype, shape.codes) for config in (up, down)))
    of, mean_rows = Codes.of(shape.codes), shape.mean_rows
    gather = fetches_by_token(mean_rows, shape.hidden_size, shape.intermediate_size)
    gather = gather and not (of.four_bits and mean_rows < MANY_FETCHED_FOUR_BIT)
    if tile_rows is None:
        tile_rows = tile_rows_for(mean_rows, shape.num_pairs, gather, coded=bool(shape.codes))
        tile_rows = min(tile_rows, MOST_FETCHED_DECODED) if of.weights_alone and gather else tile_rows
        tile_rows = (few_tile_rows(mean_rows, shape.num_pairs) if of.weights_alone else None) or tile_rows
    if of.weights_alone:  # `decoding_config.four_bit` says why
        tile_rows = min(tile_rows, MOST_DECODED)
        gather = gather and tile_rows <= MOST_FETCHED_DECODED

    def tiled(gated: bool, n_out: int, k: int) -> Config:
        config, projection = default_config(tile_rows, gated, n_out, tiles), Projection(gated, n_out, tiles, mean_rows)
        if of.four_bits:
            config = four_bit(config, projection)
        elif shape.codes:
            config = one_byte(config, projection, in_blocks=of.granularity == "block")
        return in_whole_steps(config, k)

    up = tiled(shape.gated, shape.intermediate_size, shape.hidden_size)
    up = dataclasses.replace(
        up, gather=gather and up.cluster == 1 and tile_rows % 16 == 0 and tile_rows > 16 and up.stages > 2
    )
    down = tiled(False, shape.hidden_size, shape.intermediate_size)
    return LayerPlan(tile_rows, *(within_memory(config, shape.dtype, shape.codes) for config in (up, down)))


def has_whole_blocks(*specs: Spec) -> bool:
    """Whether blocks of weights in these formats have 128 rows or a multiple, as tiles with rows first need them.

    Example:
        >>> from moe_jax.quantization import Spec
        >>> has_whole_blocks(Spec("int8", "channel")), has_whole_blocks(Spec("int8", "block", (64, 128)))
        (True, False)
    """
    return not any(spec.granularity == "block" and spec.block[0] % 128 for spec in specs)


def plan_for(shape: LayerShape, *, whole_blocks: bool = True) -> LayerPlan:
    """The tuned plan of the nearest size measured on this kind of device (`cache.find_tuned`), else `default_plan`.

    Under `jit` this is asked when a function is traced: what is compiled already keeps its plan.

    Args:
        shape: of the layer.
        whole_blocks: `has_whole_blocks` of the weights. A part of an expert that was cut within blocks has smaller ones.

    Example:
        >>> plan = plan_for(LayerShape(128, 32768, 2048, 768, gated=True, dtype="bfloat16"))
        >>> plan.up.tile_rows == plan.down.tile_rows == plan.tile_rows
        True
    """
    from moe_jax.tuning.cache import find_tuned

    tuned = find_tuned(shape)
    plan = default_plan(shape) if tuned is None else tuned.plan
    if not whole_blocks and (plan.up.rows_first or plan.down.rows_first):
        return default_plan(shape, most_rows(True, False))
    return plan


def training_plan(shape: LayerShape, scaling: str = "block") -> LayerPlan:
    """The plan of a layer some of whose products are FP8 (`moe_jax.Fp8Training`): tiles of rows that these can have too.

    It says how the projections are tiled where they are not quantized; the others follow from `LayerPlan.tile_rows`.

    Args:
        shape: of the layer, which is not quantized itself.
        scaling: `Fp8Training.scaling`; products with one scale are not promoted and have other tiles.

    Example:
        >>> shape = LayerShape(128, 131072, 2048, 768, gated=True, dtype="bfloat16")
        >>> training_plan(shape).tile_rows, training_plan(shape, "tensor").tile_rows, default_plan(shape).tile_rows
        (128, 144, 160)
    """
    quantized = default_plan(dataclasses.replace(shape, codes=f"float8_e4m3fn {scaling}"))
    plan = default_plan(shape, quantized.tile_rows)
    return dataclasses.replace(plan, up=dataclasses.replace(plan.up, gather=False))
