"""Hugging Face checkpoints: their configs and the weights of their MoE layers."""

from moe_jax.checkpoints.hf_config import config_from_hf, sparse_layers
from moe_jax.checkpoints.load import load_experts, load_layer
from moe_jax.checkpoints.quant_config import quant_format_from_hf
from moe_jax.checkpoints.reader import Checkpoint

__all__ = ["Checkpoint", "config_from_hf", "load_experts", "load_layer", "quant_format_from_hf", "sparse_layers"]
