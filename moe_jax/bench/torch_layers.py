"""Peers that run under torch, with plain weights. Each gets the torch module and the config, and makes a layer of the weights.

``w13`` is ``[E, 2I, H]``, gate rows first, ``w2`` is ``[E, H, I]``: all three take them as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from moe_jax.config import MoEConfig


class TorchLayer(NamedTuple):
    """A layer of torch tensors.

    Attributes:
        function: ``(x, logits) -> output``.
        what: how it runs.
        reads_back: the host waits for values of the device, so that no CUDA graph can hold it.
    """

    function: Callable[[Any, Any], Any]
    what: str
    reads_back: bool = False


Place = Callable[[Any, Any], TorchLayer]  # of w13 and w2
TRITON, NOT_TUNED = "vLLM fused_experts, Triton", "ships no tuning for this shape"


class PeerUnavailable(Exception):
    """A peer cannot run here; the message says why."""


def torch_grouped_mm(torch: Any, config: MoEConfig) -> Place:
    """torch's grouped matmul with torch operations around it; without one, a loop over the experts."""
    return lambda w13, w2: _torch_layer(torch, config, w13, w2)


class Routed:
    """Router logits as torch operations make groups of them.

    Args:
        torch: the module.
        config: the layer.
        logits: ``[T, E]``.

    Attributes:
        ids: of experts, ``[T, k]``.
        weight: of the slots, ``[T, k]``.
    """

    def __init__(self, torch: Any, config: MoEConfig, logits: Any):
        self._torch, self._config = torch, config
        chosen, self.ids = torch.topk(logits, config.top_k)
        self.weight = torch.softmax(chosen, dim=-1)

    def group(self) -> tuple[Any, Any]:
        """The token of each row, grouped by expert, and where the groups end."""
        torch, experts = self._torch, self._config.num_experts
        sorted_ids, self._order = torch.sort(self.ids.reshape(-1), stable=True)
        ends = torch.searchsorted(sorted_ids, torch.arange(experts, device=self.ids.device), right=True).int()
        return self._order // self._config.top_k, ends

    def combine(self, rows: Any) -> Any:
        """The weighted sum of each token's rows, from grouped ones."""
        pairs = self._torch.empty_like(rows).index_copy_(0, self._order, rows)
        pairs = pairs.view(*self.ids.shape, -1)
        return (pairs.float() * self.weight[:, :, None]).sum(1).to(rows.dtype)


def _torch_layer(torch: Any, config: MoEConfig, w13: Any, w2: Any) -> TorchLayer:
    def expert(rows, local):
        gate, up = torch.nn.functional.linear(rows, w13[local]).chunk(2, dim=-1)
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, w2[local])

    def loop_layer(x, logits):
        routed = Routed(torch, config, logits)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for local in range(config.num_experts):
            token, slot = torch.nonzero(routed.ids == local, as_tuple=True)
            if token.numel():
                out.index_add_(0, token, expert(x[token], local).float() * routed.weight[token, slot, None])
        return out.to(x.dtype)

    def grouped_layer(x, logits):
        routed = Routed(torch, config, logits)
        token, ends = routed.group()
        rows = x.index_select(0, token)
        gate, up = torch._grouped_mm(rows, w13.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return routed.combine(torch._grouped_mm(torch.nn.functional.silu(gate) * up, w2.transpose(1, 2), offs=ends))

    if takes_grouped_mm(torch, w13):
        return TorchLayer(grouped_layer, "torch._grouped_mm")
    return TorchLayer(loop_layer, "loop over experts, torch.nn.functional", reads_back=True)


def takes_grouped_mm(torch: Any, w13: Any) -> bool:
    """Whether torch has a grouped matmul for these weights."""
    return w13.is_cuda and w13.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm")


def import_vllm(torch: Any) -> None:
    """Imports vLLM, quietly, so that its kernels are loaded.

    Raises:
        ImportError: vLLM, or something that it imports, is not installed.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Read when it first quantizes: otherwise it rounds float32 scales of activations to powers of two, which is another format.
    os.environ.setdefault("VLLM_USE_DEEP_GEMM_E8M0", "0")
    import vllm.platforms

    if torch.cuda.is_available() and not vllm.platforms.current_platform.is_cuda():
        # Where NVML does not answer vLLM finds no platform, and loads no kernels, though torch sees the GPU.
        from vllm.platforms.cuda import NonNvmlCudaPlatform

        vllm.platforms._current_platform = NonNvmlCudaPlatform()


def vllm(torch: Any, config: MoEConfig) -> Place:
    """vLLM's Triton experts behind its own fused top-k kernel, softmax renormalised over the chosen.

    Raises:
        ImportError: vLLM, or something that it imports, is not installed.
    """
    import_vllm(torch)
    from vllm.model_executor.layers.fused_moe import fused_experts, fused_topk
    from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs

    tuned = get_moe_configs(config.num_experts, config.intermediate_size, None, 0, 0)
    what = TRITON if tuned is not None else f"{TRITON}, {NOT_TUNED}"

    def place(w13, w2):
        def layer(x, logits):
            weight, ids, *_ = fused_topk(x, logits, config.top_k, True)
            return fused_experts(x, w13, w2, weight, ids)

        return TorchLayer(layer, what)

    return place


def sonicmoe(torch: Any, config: MoEConfig) -> Place:
    """SonicMoE's inference path, from logits on. It tunes itself at the first call of a shape, which can take minutes.

    Its public ``moe_TC_softmax_topk_layer`` computes the logits itself; this is the rest of that function, step by step.

    Raises:
        ImportError: SonicMoE, or something that it imports, is not installed.
    """
    from sonicmoe import functional
    from sonicmoe.enums import ActivationType

    experts, top_k = config.num_experts, config.top_k
    route, up, down = (
        function.apply
        for function in (
            functional.TC_Softmax_Topk_Router_Function,
            functional._UpProjection,
            functional._DownProjection,
        )
    )
    swiglu, concatenated, inference, ragged = ActivationType("swiglu"), True, True, False

    def place(w13, w2):
        w1, w2 = w13.permute(1, 2, 0), w2.permute(1, 2, 0)

        def layer(x, logits):
            tokens = x.shape[0]
            rows = tokens * top_k

            def empty(size):
                return torch.empty(size, dtype=torch.int32, device=x.device)

            scores, ids = route(logits, experts, top_k, True, False)
            offsets, gather, scatter, reverse = empty(experts + 1), empty(rows), empty(rows), empty(rows)
            functional.TC_topk_router_metadata_triton(ids, experts, empty(experts), offsets, gather, scatter, reverse)
            places = gather, scatter, reverse, None, ragged
            act, pre = up(x, w1, None, offsets, rows, top_k, *places, swiglu, inference, concatenated)
            return down(act, pre, w2, None, scores, offsets, tokens, top_k, *places, swiglu)

        return TorchLayer(layer, "SonicMoE from logits on, tuned by itself")

    return place


TORCH_LAYERS: dict[str, Callable[[Any, MoEConfig], Place]] = {
    "torch": torch_grouped_mm,
    "vllm": vllm,
    "sonicmoe": sonicmoe,
}
# Kernels compiled at the first call. SonicMoE's are too, and timed against each other: that needs the device to itself.
COMPILED_AT_CALL = ("vllm", "deepgemm")
