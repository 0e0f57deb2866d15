"""The PyTorch side of moe_jax: the same layers on tensors, differentiable, known to torch's compiler.

It ships in the same wheel as `moe_jax`, imports it, and is never imported by it. Importing it starts no JAX backend.
"""

from moe_jax_torch.bridge import to_jax as to_jax
from moe_jax_torch.bridge import to_torch as to_torch
from moe_jax_torch.functional import fused_experts as fused_experts
from moe_jax_torch.functional import fused_topk as fused_topk
from moe_jax_torch.functional import grouped_topk as grouped_topk
from moe_jax_torch.launch import set_launch as set_launch
from moe_jax_torch.module import FusedMoE as FusedMoE
from moe_jax_torch.quantized import QuantConfig as QuantConfig
from moe_jax_torch.weight_cache import WeightCache as WeightCache
