"""The layer as a loop over experts in plain torch, float32: what the bridge's layers are compared with."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


class Layer(NamedTuple):
    """Arguments of `fused_experts`, in its order, and its keywords."""

    x: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    kwargs: dict

    def loop(self) -> torch.Tensor:
        return expert_loop(*self[:5], **self.kwargs)


def activate(h: torch.Tensor, activation: str, alpha=None, beta=None, limit=None) -> torch.Tensor:
    """Written again from the formulas, not from moe_jax."""
    if activation.endswith("_no_mul"):
        x, up = h, 1.0
    elif activation == "swigluoai":
        x, up = h[:, ::2], h[:, 1::2]
    else:
        x, up = h.chunk(2, dim=1)
    if activation.startswith("swigluoai"):
        alpha, beta, limit = alpha or 1.702, 1 if beta is None else beta, limit or 7
        x, up = x.clamp(max=limit), up.clamp(-limit, limit)
        return (up + beta) * x * torch.sigmoid(alpha * x)
    if activation.startswith("relu2"):
        return F.relu(x) ** 2 * up
    if activation.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if "tanh" in activation else "none") * up
    if limit is not None:
        x, up = x.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(x) * up


def expert_loop(
    x,
    w1,
    w2,
    weights,
    ids,
    *,
    activation="silu",
    apply_router_weight_on_input=False,
    expert_map=None,
    w1_bias=None,
    w2_bias=None,
    global_num_experts=-1,
    swiglu_alpha=None,
    swiglu_beta=None,
    swiglu_limit=None,
):
    """Differentiable; everything in float32, the result too."""
    x, w1, w2, weights = (tensor.float() for tensor in (x, w1, w2, weights))
    out = 0 * x  # keeps a graph where no expert runs
    local = range(w1.shape[0]) if expert_map is None else expert_map.tolist()
    for expert, place in enumerate(local):
        token, slot = torch.where(ids == expert)
        if place < 0 or token.numel() == 0:
            continue
        weight = weights[token, slot, None]
        rows = x[token] * weight if apply_router_weight_on_input else x[token]
        h = rows @ w1[place].T
        h = h if w1_bias is None else h + w1_bias[place].float()
        y = activate(h, activation, swiglu_alpha, swiglu_beta, swiglu_limit) @ w2[place].T
        y = y if w2_bias is None else y + w2_bias[place].float()
        out = out.index_add(0, token, y if apply_router_weight_on_input else y * weight)
    return out


def layer_of(
    seed=0,
    *,
    tokens=11,
    hidden=20,
    intermediate=12,
    experts=6,
    top_k=3,
    dtype=torch.float32,
    activation="silu",
    bias=False,
    local=None,
    **kwargs,
) -> Layer:
    """Random, with outputs of order one; `local` lists the experts that live here."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    rows = intermediate * (1 if activation.endswith("_no_mul") else 2)
    here = experts if local is None else len(local)
    ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].to(torch.int32)
    kwargs["activation"] = activation
    if bias:
        kwargs |= {
            "w1_bias": normal(here, rows, scale=0.5).to(dtype),
            "w2_bias": normal(here, hidden, scale=0.5).to(dtype),
        }
    if local is not None:
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        expert_map[local] = torch.arange(len(local), dtype=torch.int32)
        kwargs["expert_map"] = expert_map
    return Layer(
        normal(tokens, hidden).to(dtype),
        normal(here, rows, hidden, scale=hidden**-0.5).to(dtype),
        normal(here, hidden, intermediate, scale=2 * intermediate**-0.5).to(dtype),
        torch.rand(tokens, top_k, generator=generator) + 0.2,
        ids,
        kwargs,
    )
