"""What training code says to JAX about a layer: which of its intermediates a remat policy may keep.

`SAVED_NAMES` are the names (`jax.ad_checkpoint.checkpoint_name`) of what the gradient of a layer needs: hidden states, the
pre-activations of all rows, and where they lie. `save_moe_residuals` is the policy that keeps these. Then the backward pass of a
checkpointed block computes no product of the layer again:

    block = jax.checkpoint(block, policy=moe_jax.training.save_moe_residuals)

>>> import jax, jax.numpy as jnp
>>> block = jax.checkpoint(lambda x: jnp.sin(x), policy=save_moe_residuals)
>>> float(jax.grad(block)(0.0))
1.0
"""

from __future__ import annotations

import jax

from moe_jax.expert_gradient import SAVED_NAMES as SAVED_NAMES

save_moe_residuals = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
