"""The PyTorch side of moe_jax.

It ships in the same wheel as `moe_jax`, imports it, and is never imported by it. Nothing is public yet: version 0.1.0
holds the JAX layer alone.
"""

__all__: list[str] = []
