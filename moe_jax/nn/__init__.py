"""Layers for flax: `MoE` for nnx here, the same for linen in `moe_jax.nn.linen`. Needs the extra ``flax``."""

from moe_jax.nn.nnx import CorrectionBias as CorrectionBias
from moe_jax.nn.nnx import MoE as MoE
from moe_jax.nn.nnx import balance as balance
from moe_jax.nn.settings import LOGICAL_AXES as LOGICAL_AXES
from moe_jax.nn.settings import Settings as Settings
from moe_jax.nn.sown import sown as sown
from moe_jax.nn.sown import sown_sum as sown_sum
from moe_jax.nn.weights import named_weights as named_weights
from moe_jax.nn.weights import weights_of_named as weights_of_named
