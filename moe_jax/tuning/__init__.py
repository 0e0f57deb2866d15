"""Plans of the grouped matmuls: how a layer is tiled, by a rule, or by what `moe-jax tune` measured on this GPU."""

from moe_jax.tuning.cache import Tuned, TuningWarning, find_tuned, forget
from moe_jax.tuning.plan import LayerPlan, LayerShape, default_plan, plan_for

__all__ = [
    "LayerPlan",
    "LayerShape",
    "Tuned",
    "TuningWarning",
    "default_plan",
    "find_tuned",
    "forget",
    "plan_for",
]
