"""Number formats of experts and activations: what a format is, arrays in it, and the way there and back."""

from moe_jax.quantization.array import QuantizedArray as QuantizedArray
from moe_jax.quantization.checkpoint_int4 import from_awq as from_awq
from moe_jax.quantization.checkpoint_int4 import from_compressed_tensors as from_compressed_tensors
from moe_jax.quantization.checkpoint_int4 import from_gptq as from_gptq
from moe_jax.quantization.checkpoint_int4 import to_awq as to_awq
from moe_jax.quantization.checkpoint_int4 import to_compressed_tensors as to_compressed_tensors
from moe_jax.quantization.checkpoint_int4 import to_gptq as to_gptq
from moe_jax.quantization.experts import dequantize_experts as dequantize_experts
from moe_jax.quantization.experts import quantize_experts as quantize_experts
from moe_jax.quantization.formats import FORMATS as FORMATS
from moe_jax.quantization.formats import QuantFormat as QuantFormat
from moe_jax.quantization.formats import Spec as Spec
from moe_jax.quantization.formats import quant_format as quant_format
from moe_jax.quantization.quantize import dequantize as dequantize
from moe_jax.quantization.quantize import fake_quantize_activations as fake_quantize_activations
from moe_jax.quantization.quantize import merge_half_scales as merge_half_scales
from moe_jax.quantization.quantize import quantize as quantize
from moe_jax.quantization.slicing import join_halves as join_halves
from moe_jax.quantization.slicing import pad_columns as pad_columns
from moe_jax.quantization.slicing import refine_blocks as refine_blocks
from moe_jax.quantization.slicing import slice_columns as slice_columns
from moe_jax.quantization.slicing import slice_rows as slice_rows
from moe_jax.quantization.slicing import split_columns as split_columns
from moe_jax.quantization.slicing import split_rows as split_rows
