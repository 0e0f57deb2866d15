"""A layer on this GPU that can be built, run and timed under any plan."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.bench.compiling import Layer, layers_a_call, stack_logits
from moe_jax.bench.inputs import in_format, make_weights, weights_shape
from moe_jax.bench.timing import call_time, kernel_times
from moe_jax.config import MoEConfig
from moe_jax.moe import moe
from moe_jax.tuning.plan import LayerPlan
from moe_jax.types import ExpertWeights


class TimedLayer:
    """`moe` on random operands: any expert is as likely as another.

    Args:
        config: the layer.
        num_tokens: T, at least 1.
    """

    def __init__(self, config: MoEConfig, num_tokens: int):
        self._config, self._tokens = config, num_tokens
        self._built: dict[LayerPlan, Layer] = {}

    @functools.cached_property
    def _operands(self) -> tuple[jax.Array, ExpertWeights, jax.Array]:
        config, tokens = self._config, self._tokens
        x = jax.random.normal(jax.random.key(tokens), (tokens, config.hidden_size), config.dtype)
        logits = np.random.default_rng(tokens).standard_normal((tokens, config.num_experts), np.float32)
        return jax.block_until_ready((x, _weights(config), jnp.asarray(logits)))

    def build(self, plans: Sequence[LayerPlan], stacks: bool = False) -> dict[LayerPlan, str]:
        """Compiles the layer under each plan, from shapes alone; gives those that cannot be compiled, with the reason.

        Args:
            plans: what to compile; not again what is there already.
            stacks: also the stack that `layer_us` runs.
        """
        config, tokens = self._config, self._tokens
        x = jax.ShapeDtypeStruct((tokens, config.hidden_size), config.dtype)
        logits = jax.ShapeDtypeStruct((tokens, config.num_experts), jnp.float32)
        operands = x, weights_shape(config), logits

        def compile_one(plan: LayerPlan) -> str | None:
            built = self._built.get(plan) or Layer(functools.partial(moe, config=config, plan=plan))
            try:
                if tokens not in built.compiled:
                    built.compiled[tokens] = built.jitted.lower(*operands).compile()
                if stacks and tokens not in built.compiled_stacks:
                    stacked = built.stacked.lower(*operands[:2], stack_logits(operands[2]))
                    built.compiled_stacks[tokens] = stacked.compile()
                self._built[plan] = built
            except Exception as error:  # a configuration that the compiler refuses is not the end of a search
                return f"cannot be built: {type(error).__name__}: {error}"[:300]
            return None

        reasons = {plan: compile_one(plan) for plan in dict.fromkeys(plans)}
        return {plan: reason for plan, reason in reasons.items() if reason is not None}

    def fingerprint(self, plan: LayerPlan) -> str:
        """Of the bits of the output ``[T, H]``, under a plan that was built."""
        output = self._built[plan].at(self._tokens)(*self._operands)
        return hashlib.sha256(np.ascontiguousarray(output).view(np.uint8)).hexdigest()

    def kernel_us(self, plan: LayerPlan) -> tuple[float, float]:
        """Microseconds of the up- and of the down-projection's kernel, which may also be that of the sum.

        To the up-projection belongs what quantizes its rows for the down-projection: that may be the same kernel.
        """
        times = kernel_times(self._built[plan].at(self._tokens), *self._operands)
        down = "down_combine" if "down_combine" in times else "grouped_matmul_down"
        try:
            return times["grouped_matmul_up"] + times.get("quantize_rows#2", 0.0), times[down]
        except KeyError as error:
            raise RuntimeError(f"no kernel {error} among those of the layer: {', '.join(times)}") from error

    def layer_us(self, plan: LayerPlan) -> float:
        """Microseconds of the layer, as one of a stack."""
        stack = self._built[plan].stack_at(self._tokens)
        x, weights, logits = self._operands
        return call_time(lambda: stack(x, weights, stack_logits(logits))) / layers_a_call(self._tokens)


@functools.lru_cache(maxsize=1)
def _weights(config: MoEConfig) -> ExpertWeights:
    """One set at a time: the numbers of tokens of a case come one after the other."""
    return in_format(make_weights(config, jax.random.key(0)), config)
