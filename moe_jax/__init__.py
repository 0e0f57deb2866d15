"""Mixture-of-Experts layers for JAX on NVIDIA GPUs."""

from moe_jax.capture import RoutedExperts as RoutedExperts
from moe_jax.capture import RoutedExpertsCapturer as RoutedExpertsCapturer
from moe_jax.capture import TokenShares as TokenShares
from moe_jax.config import MoEConfig as MoEConfig
from moe_jax.config import RoutingConfig as RoutingConfig
from moe_jax.explanation import Explanation as Explanation
from moe_jax.explanation import explain as explain
from moe_jax.moe import apply_experts as apply_experts
from moe_jax.moe import moe as moe
from moe_jax.moe import moe_block as moe_block
from moe_jax.parallel import ExpertPlacement as ExpertPlacement
from moe_jax.parallel import ParallelConfig as ParallelConfig
from moe_jax.parallel import determine_expert_map as determine_expert_map
from moe_jax.quantization import Fp8Training as Fp8Training
from moe_jax.quantization import QuantFormat as QuantFormat
from moe_jax.quantization import QuantizedArray as QuantizedArray
from moe_jax.quantization import dequantize_experts as dequantize_experts
from moe_jax.quantization import quant_format as quant_format
from moe_jax.quantization import quantize_experts as quantize_experts
from moe_jax.routing import route as route
from moe_jax.routing_methods import RoutingMethod as RoutingMethod
from moe_jax.types import ExpertWeights as ExpertWeights
from moe_jax.types import MoELayerWeights as MoELayerWeights
from moe_jax.types import SharedExpertWeights as SharedExpertWeights
from moe_jax.types import TopK as TopK
