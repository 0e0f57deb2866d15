"""Sets of configs: all valid combinations of some values, and a small set that has each value somewhere."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

from moe_jax.layer_test.config import MoETestConfig
from moe_jax.layer_test.support import (
    BACKENDS,
    BATCHED_BACKENDS,
    PARALLEL_COMBOS,
    PLAIN_BACKENDS,
    QUANT_METHODS,
    is_valid_config,
)

SEED, STRIDE = 0, 3  # of the values in `covering`
PLAIN = ((False, False, False),)
FEATURES = ((False, False, False), (True, False, False), (True, True, False), (True, False, True), (True, True, True))


def sweep(
    *,
    shapes: Sequence[tuple[int, int, int]],
    num_experts: Sequence[int] = (8,),
    top_ks: Sequence[int] = (2,),
    dtypes: Sequence[str] = ("bfloat16",),
    quantizations: Sequence[str | None] = (None,),
    features: Sequence[tuple[bool, bool, bool]] = PLAIN,
    ranks: Sequence[tuple[int, int, bool]] = PARALLEL_COMBOS,
    backends: Sequence[str] = tuple(BACKENDS),
    sequence_parallel: Sequence[bool | None] = (None,),
    quantize_before: Sequence[bool] = (False,),
    max_devices: int = 8,
) -> Iterator[MoETestConfig]:
    """The configs, those that are not valid left out.

    Args:
        shapes: (m, n, k).
        num_experts, top_ks, dtypes, quantizations, sequence_parallel, quantize_before: values of the fields of `MoETestConfig`.
        features: (shared experts, gate, transform of the routed input).
        ranks: (dp, tp, expert parallel).
        backends: of several ranks; one rank has none.
        max_devices: of the ranks.

    Example:
        >>> [config.backend for config in sweep(shapes=[(1, 128, 256)], ranks=[(2, 1, True)])]
        ['allgather_reducescatter', 'all_to_all', 'peer', 'batched_allgather_reducescatter', 'batched_all_to_all', 'batched_peer']
    """
    for shape, experts, top_k, dtype, quantization, feature, rank, backend, sequence, before in itertools.product(
        shapes,
        num_experts,
        top_ks,
        dtypes,
        quantizations,
        features,
        ranks,
        backends,
        sequence_parallel,
        quantize_before,
    ):
        dp, tp, is_ep = rank
        if dp * tp > max_devices or (dp * tp == 1 and backend != backends[0]):
            continue
        config = MoETestConfig(
            *shape,
            experts,
            top_k,
            dtype,
            quantization,
            *feature,
            backend=None if dp * tp == 1 else backend,
            ep_size=dp * tp if is_ep else 1,
            dp_size=dp,
            tp_size=tp,
            sequence_parallel=sequence,
            quantize_before=before,
        )
        if is_valid_config(config)[0]:
            yield config


def covering() -> list[MoETestConfig]:
    """Every exchange with every kind of ranks, some of them with batches, each with other values of the rest: every number format
    and feature is there, and few are together.

    Example:
        >>> {config.quantization for config in covering()} == set(QUANT_METHODS)
        True
    """
    shape, peer = (1, 128, 256), "peer"
    kinds = [ranks for ranks in PARALLEL_COMBOS if ranks not in ((1, 4, False), (4, 1, True))]  # more of a kind
    plain = tuple(name for name in PLAIN_BACKENDS if name != peer)
    whole = list(sweep(shapes=[shape], ranks=kinds, backends=plain))
    whole += sweep(shapes=[shape], ranks=kinds[-2:], backends=[peer])
    # Also ranks of tensor parallelism that hold the same tokens and other experts.
    whole += sweep(shapes=[shape], ranks=[(2, 2, True)], backends=["all_to_all", peer], sequence_parallel=[False])
    whole += list(sweep(shapes=[shape], ranks=kinds[1:], backends=BATCHED_BACKENDS))[::2]
    configs = []
    for number, config in enumerate(whole):
        chance = random.Random(SEED + number)
        shared, gate, transform = FEATURES[number % len(FEATURES)]
        varied = dataclasses.replace(
            config,
            m=chance.choice((1, 5, 33)),
            num_experts=chance.choice((5, 6)),
            top_k=chance.choice((1, 2, 4)),
            in_dtype=chance.choice(("bfloat16", "bfloat16", "float32")),
            quantization=QUANT_METHODS[STRIDE * number % len(QUANT_METHODS)],
            use_shared_experts=shared,
            use_gate=gate,
            use_routed_input_transform=transform,
        )
        if not is_valid_config(varied)[0]:
            varied = dataclasses.replace(varied, quantization=QUANT_METHODS[(STRIDE * number + 1) % len(QUANT_METHODS)])
        before = dataclasses.replace(varied, quantize_before=True)
        configs.append(before if chance.random() < 0.6 and is_valid_config(before)[0] else varied)
    return configs
