"""Number formats of experts and activations: what a format is, arrays in it, and the way there and back."""

from moe_jax.quantization.array import QuantizedArray as QuantizedArray
from moe_jax.quantization.formats import FORMATS as FORMATS
from moe_jax.quantization.formats import QuantFormat as QuantFormat
from moe_jax.quantization.formats import Spec as Spec
from moe_jax.quantization.formats import quant_format as quant_format
from moe_jax.quantization.quantize import dequantize as dequantize
from moe_jax.quantization.quantize import fake_quantize_activations as fake_quantize_activations
from moe_jax.quantization.quantize import merge_half_scales as merge_half_scales
from moe_jax.quantization.quantize import quantize as quantize
