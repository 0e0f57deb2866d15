"""`moe-jax demo`: layers of a Hugging Face checkpoint, run by moe_jax and by transformers, compared."""

from moe_jax.demo.errors import DemoError
from moe_jax.demo.job import DemoOptions, LayerResult, run_demo

__all__ = ["DemoError", "DemoOptions", "LayerResult", "run_demo"]
