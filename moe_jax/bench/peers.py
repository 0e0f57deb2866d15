"""What else can run the layer here: the same inputs and weights, in the form that each peer likes best.

A peer prepares its weights once (a transposed copy, a tensor on the same memory) and that is not timed. The only file of the
benchmark with torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.config import MoEConfig
from moe_jax.moe import moe
from moe_jax.types import ExpertWeights


class PeerUnavailable(Exception):
    """A peer cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """A peer's layer with its operands.

    Attributes:
        call: starts the layer.
        wait: given what `call` returned, returns when it is done.
        to_array: given what `call` returned, the output as a JAX array ``[T, H]``.
        what: how the peer runs it.
        jitted: function and operands, for the kernel times; None where JAX does not launch the kernels.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    to_array: Callable[[Any], jax.Array]
    what: str
    jitted: tuple[Any, ...] | None = None


Prepared = Callable[[jax.Array, jax.Array], Bound]  # of hidden states and router logits


def _bind_jax(function: Callable[..., jax.Array], weights: Any, what: str) -> Prepared:
    jitted = jax.jit(function)

    def bind(x: jax.Array, logits: jax.Array) -> Bound:
        call = functools.partial(jitted, x, weights, logits)
        return Bound(call, jax.block_until_ready, lambda output: output, what, (jitted, x, weights, logits))

    return bind


def _xla(config: MoEConfig, weights: ExpertWeights) -> Prepared:
    return _bind_jax(functools.partial(moe, config=config, implementation="xla"), weights, "moe_jax in plain JAX")


def _ragged_dot(config: MoEConfig, weights: ExpertWeights) -> Prepared:
    precision = lax.Precision.HIGHEST if config.dtype == "float32" else None
    return _bind_ragged(functools.partial(lax.ragged_dot, precision=precision), config, weights, "jax.lax.ragged_dot")


def _tokamax(config: MoEConfig, weights: ExpertWeights) -> Prepared:
    try:
        import tokamax
    except ImportError as error:
        raise PeerUnavailable(f"tokamax cannot be imported ({error}); pip install tokamax") from error
    return _bind_ragged(tokamax.ragged_dot, config, weights, "tokamax.ragged_dot")


def _bind_ragged(dot: Callable[..., Any], config: MoEConfig, weights: ExpertWeights, what: str) -> Prepared:
    """A layer around a ragged matmul ``dot(rows [R, K], weights [E, K, N], group_sizes [E])``."""
    top_k, num_experts = config.top_k, config.num_experts

    def layer(x, weights, logits):
        w13, w2 = weights
        chosen, ids = lax.top_k(logits, top_k)
        order = jnp.argsort(ids.reshape(-1), stable=True)
        group_sizes = jnp.bincount(ids.reshape(-1), length=num_experts).astype(jnp.int32)
        gate, up = jnp.split(dot(x[order // top_k], w13, group_sizes), 2, axis=-1)
        rows = dot((jax.nn.silu(gate) * up).astype(x.dtype), w2, group_sizes)
        pairs = rows[jnp.argsort(order)].reshape(x.shape[0], top_k, -1).astype(jnp.float32)
        return (pairs * jax.nn.softmax(chosen)[:, :, None]).sum(1).astype(x.dtype)

    transposed = jax.block_until_ready(tuple(jnp.swapaxes(w, 1, 2).copy() for w in (weights.w13, weights.w2)))
    return _bind_jax(layer, transposed, what)


def _torch(config: MoEConfig, weights: ExpertWeights) -> Prepared:
    try:
        import torch
    except ImportError as error:
        raise PeerUnavailable(f"torch cannot be imported ({error}); pip install 'moe_jax[torch]'") from error
    on_gpu = weights.w13.device.platform in ("gpu", "cuda")
    if on_gpu and not torch.cuda.is_available():
        raise PeerUnavailable(f"torch {torch.__version__} sees no CUDA device; install a build of torch with CUDA")
    # Tensors on JAX's memory: `weights` outlives them, and each side waits for its work before the other starts.
    w13, w2 = torch.from_dlpack(weights.w13), torch.from_dlpack(weights.w2)
    grouped = _takes_grouped_mm(torch, on_gpu, config.dtype)

    def route(logits):
        chosen, ids = torch.topk(logits, config.top_k)
        return torch.softmax(chosen, dim=-1), ids

    def expert(rows, local):
        gate, up = torch.nn.functional.linear(rows, w13[local]).chunk(2, dim=-1)
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, w2[local])

    def loop_layer(x, logits):
        weight, ids = route(logits)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for local in range(config.num_experts):
            token, slot = torch.nonzero(ids == local, as_tuple=True)
            if token.numel():
                out.index_add_(0, token, expert(x[token], local).float() * weight[token, slot, None])
        return out.to(x.dtype)

    def grouped_layer(x, logits):
        weight, ids = route(logits)
        sorted_ids, order = torch.sort(ids.reshape(-1), stable=True)
        ends = torch.searchsorted(sorted_ids, torch.arange(config.num_experts, device=x.device), right=True).int()
        rows = x.index_select(0, order // config.top_k)
        gate, up = torch._grouped_mm(rows, w13.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        rows = torch._grouped_mm(torch.nn.functional.silu(gate) * up, w2.transpose(1, 2), offs=ends)
        pairs = torch.empty_like(rows).index_copy_(0, order, rows).view(x.shape[0], config.top_k, -1)
        return (pairs.float() * weight[:, :, None]).sum(1).to(x.dtype)

    def wait(output):
        if on_gpu:
            torch.cuda.synchronize()
        return output

    def to_array(output):
        return jnp.asarray(wait(output).float().cpu().numpy())

    def bind(x: jax.Array, logits: jax.Array) -> Bound:
        operands = torch.from_dlpack(x), torch.from_dlpack(logits)
        layer = torch.inference_mode()(grouped_layer if grouped else loop_layer)
        call, what = functools.partial(layer, *operands), "loop over experts, torch.nn.functional"
        if grouped:
            call, what = _in_cuda_graph(torch, call, "torch._grouped_mm")
        return Bound(call, wait, to_array, what)

    return bind


def _takes_grouped_mm(torch: Any, on_gpu: bool, dtype: str) -> bool:
    return on_gpu and dtype == "bfloat16" and hasattr(torch, "_grouped_mm")


def _in_cuda_graph(torch: Any, call: Callable[[], Any], what: str) -> tuple[Callable[[], Any], str]:
    """The call as the replay of a CUDA graph, without launch cost; as it is, with the reason, where that fails."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries allocate and load their kernels, which a capture does not allow
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = call()
    except RuntimeError as error:
        return call, f"{what}, no CUDA graph ({str(error).splitlines()[0]})"

    def replay():
        graph.replay()
        return output

    return replay, f"{what} in a CUDA graph"


PEERS: dict[str, Callable[[MoEConfig, ExpertWeights], Prepared]] = {
    "torch": _torch,
    "tokamax": _tokamax,
    "ragged_dot": _ragged_dot,
    "xla": _xla,
}


def parse_peers(text: str) -> tuple[str, ...]:
    """Names of peers, in the order given.

    Raises:
        ValueError: no such peer.

    Example:
        >>> parse_peers("torch,xla")
        ('torch', 'xla')
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ValueError(f"--compare {unknown[0]}: this command compares with {', '.join(PEERS)}")
    return names


def prepare(name: str, config: MoEConfig, weights: ExpertWeights) -> Prepared | str:
    """The peer with its weights in place, or why it cannot run here."""
    try:
        return PEERS[name](config, weights)
    except PeerUnavailable as reason:
        return str(reason)
    except Exception as failure:  # a peer must not take the measurement of the layer with it
        return short(failure)


def short(failure: Exception) -> str:
    """Kind and first line of an error, for a row."""
    return f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"[:300]
