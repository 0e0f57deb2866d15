"""What the layer suite varies, and which combinations there are."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_jax.layer_test.config import MoETestConfig
from moe_jax.parallel.all_to_all import AllToAll
from moe_jax.parallel.batched import Batched
from moe_jax.parallel.exchange import Exchange
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.no_exchange import NoExchange
from moe_jax.parallel.peer import PeerExchange
from moe_jax.quantization import FORMATS

SHAPE_COMBOS = ((1, 128, 256), (32, 512, 512), (222, 1024, 2048))  # m, n, k
NUM_EXPERTS = (8, 9, 64)
TOP_KS = (1, 2, 6)
# dp, tp, expert parallel
PARALLEL_COMBOS = (
    (1, 1, False),
    (1, 2, False),
    (1, 4, False),
    (2, 1, False),
    (2, 2, False),
    (1, 2, True),
    (2, 1, True),
    (4, 1, True),
    (2, 2, True),
    (4, 2, True),
)
PLAIN_BACKENDS: dict[str, Exchange] = {
    "no_exchange": NoExchange(),
    "allgather_reducescatter": AllGatherReduceScatter(),
    "all_to_all": AllToAll(),
    "peer": PeerExchange(),
}
# The same exchanges, whose tokens are then laid out for each local expert.
BATCHED_BACKENDS = tuple(f"batched_{name}" for name in PLAIN_BACKENDS)
BACKENDS: dict[str, Exchange] = PLAIN_BACKENDS | {
    name: Batched(inner) for name, inner in zip(BATCHED_BACKENDS, PLAIN_BACKENDS.values(), strict=True)
}
# Of the formats whose weights and rows go the same ways one is enough. ``nvfp4_w4a4`` has a global scale a row, which is another
# where ranks that split every expert see parts of rows.
_LIKE_OTHERS = ("nvfp4_w4a4", "mxfp4_fp8", "mxfp8_weight")
QUANT_METHODS: tuple[str | None, ...] = (None, *(name for name in FORMATS if name not in _LIKE_OTHERS))
# Between the rows of a batch are others: they have no scale in common.
BATCHED_QUANTS = tuple(name for name in QUANT_METHODS if name != "fp8_tensor")
BACKEND_SUPPORTED_QUANTS = {name: BATCHED_QUANTS if name in BATCHED_BACKENDS else QUANT_METHODS for name in BACKENDS}


def exchange_of(config: MoETestConfig, implementation: str = "auto") -> Exchange | None:
    """The exchange, None on one device: the layer then chooses it. A batch has room for any routing.

    Example:
        >>> config = MoETestConfig(5, 128, 256, 9, 2, "bfloat16", "fp8_block", False, False, False, dp_size=2, ep_size=2,
        ...                        backend="batched_all_to_all")
        >>> exchange_of(config).inner, exchange_of(config).max_tokens
        (AllToAll(quantize_before=False), 16)
    """
    if config.backend is None:
        return None
    exchange = BACKENDS[config.backend]
    is_batched = isinstance(exchange, Batched)
    plain = exchange.inner if is_batched else exchange
    changes: dict[str, Any] = {"quantize_before": config.quantize_before}
    if isinstance(plain, PeerExchange):
        changes["implementation"] = implementation
    plain = dataclasses.replace(plain, **changes)
    if not is_batched:
        return plain
    tokens = config.m * config.parallel.num_token_shards
    return dataclasses.replace(exchange, inner=plain, max_tokens=-(-tokens // 8) * 8)


def is_valid_config(config: MoETestConfig) -> tuple[bool, str | None]:
    """Whether there is such a layer, and if not, why.

    Example:
        >>> config = MoETestConfig(1, 128, 256, 8, 2, "bfloat16", None, False, False, False, tp_size=2)
        >>> is_valid_config(dataclasses.replace(config, backend="all_to_all"))
        (False, "backend='all_to_all': all ranks hold the same tokens; use NoExchange()")
    """
    reason = _reason_against(config)
    return reason is None, reason


def _reason_against(config: MoETestConfig) -> str | None:
    if config.use_routed_input_transform and config.k % 2:
        return f"a transformed input has half the hidden size, and k={config.k} is odd"
    if config.use_routed_input_transform and config.enable_eplb:
        return "enable_eplb does not go with use_routed_input_transform"
    if config.top_k > config.num_experts:
        return f"top_k={config.top_k} exceeds num_experts={config.num_experts}"
    if config.quantization not in QUANT_METHODS:
        return f"quantization={config.quantization!r} is not one of {', '.join(map(str, QUANT_METHODS))}"
    if config.ep_size not in (1, config.world_size):
        return (
            f"ep_size={config.ep_size} must be 1 or dp_size * tp_size={config.world_size}: all ranks split the experts"
        )
    if config.ep_size == 1 and config.n % config.world_size:
        return f"n={config.n} has no {config.world_size} equal parts"
    if config.is_sequence_parallel and not (config.ep_size > 1 and config.tp_size > 1):
        return "sequence_parallel needs ep_size > 1 and tp_size > 1"
    if config.enable_eplb and config.ep_size == 1:
        return "enable_eplb needs ep_size > 1: one rank has no load to balance"
    if config.enable_eplb and config.num_experts % config.ep_size:
        return f"enable_eplb needs ep_size={config.ep_size} to divide num_experts={config.num_experts}"
    if config.backend is None:
        if config.world_size > 1:
            return f"several ranks need a backend, one of {', '.join(BACKENDS)}"
        return "quantize_before is an exchange's business, and there is none" if config.quantize_before else None
    return _reason_against_backend(config)


def _reason_against_backend(config: MoETestConfig) -> str | None:
    if config.backend not in BACKENDS:
        return f"backend={config.backend!r} is not one of {', '.join(BACKENDS)}"
    if config.world_size == 1:
        return f"one rank has nothing to exchange; backend={config.backend!r} must be None"
    if config.quantization not in BACKEND_SUPPORTED_QUANTS[config.backend]:
        return f"backend={config.backend!r} does not take quantization={config.quantization!r}"
    form = FORMATS.get(config.quantization) if config.quantization else None
    if config.quantize_before and (form is None or form.row_spec is None):
        return f"quantize_before needs a format that quantizes activations, not {config.quantization!r}"
    reason = BACKENDS[config.backend].reason_against(config.parallel)
    return None if reason is None else f"backend={config.backend!r}: {reason}"
