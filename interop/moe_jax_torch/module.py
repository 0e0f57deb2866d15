"""The layer as a module: parameters named and laid out as serving engines have them, loaded expert by expert."""

from __future__ import annotations

import math
from typing import Any

import torch

from moe_jax.parallel import determine_expert_map
from moe_jax_torch.checks import check_activation, check_devices, refuse_forward_mode
from moe_jax_torch.eager import is_plain
from moe_jax_torch.functional import fused_experts, fused_topk, grouped_topk
from moe_jax_torch.ops import moe
from moe_jax_torch.parallel import Ranks, checked_map
from moe_jax_torch.quantized import QuantConfig, as_stored, check_part, parameters_of, scale_name, scales_matrices


class FusedMoE(torch.nn.Module):
    """Routed experts behind router logits. The result of a rank that holds a part of the layer is its part of the sum.

    Without gradients (`torch.no_grad`, `torch.inference_mode`) routing and experts are one operator, of fewer kernels on a GPU.
    Under autocast the experts run in its dtype; routing is float32 in any case. A batch of tokens is what `fused_experts` takes,
    with the same rules.

    Args:
        num_experts: E, over all ranks.
        top_k: k.
        hidden_size: H.
        intermediate_size: I of the whole layer.
        renormalize: divide the weights of a token by their sum.
        scoring_func: ``softmax`` or ``sigmoid``.
        num_expert_group, topk_group: groups of experts, see `grouped_topk`; 1 and 1 are none.
        routed_scaling_factor: multiplies the weights in the end.
        has_correction_bias: a buffer ``e_score_correction_bias``, for selection only.
        activation: as in `fused_experts`.
        swiglu_alpha, swiglu_beta, swiglu_limit: as in `fused_experts`.
        apply_router_weight_on_input: as in `fused_experts`.
        has_bias: parameters ``w13_bias`` and ``w2_bias``.
        expert_map: integers ``[E]``, global id to local id or -1; None: given by `ep_size`.
        ep_size, ep_rank: expert parallelism: each rank holds a run of neighbouring experts, the first ones one more if need be.
        tp_size, tp_rank: tensor parallelism: each rank holds an equal part of I.
        dp_size, dp_rank: data parallelism: ranks with tokens of their own that hold one layer together. They count into tp, or
            with `enable_expert_parallel` into ep, as tp then does: see `moe_jax_torch.parallel.Ranks.of`. Gathering the tokens
            before the layer, and reducing after it, is the caller's.
        enable_expert_parallel: split experts, not their intermediate size, over the ranks of dp and tp.
        quant_config: the name of a number format, such as ``fp8_block``, ``fp8_channel`` or ``int8_weight``: the layer then holds
            codes and scales, to be loaded, and has no gradient. Ranks' parts of I must be whole blocks.
        device, dtype: of the parameters; the dtypes of codes and scales are the format's, also after `to`.

    Attributes:
        w13_weight: ``[E_local, 2I, H]``, gate rows first (alternating with up rows for ``swigluoai``), or ``[E_local, I, H]``,
            with the I of this rank.
        w2_weight: ``[E_local, H, I]``.
        w13_bias: ``[E_local, 2I]`` or ``[E_local, I]``, or None.
        w2_bias: ``[E_local, H]``, or None.
        expert_map: int32 ``[E]``, or None where all experts are here. Not in the state dict: it says what this rank is, for good.

    Raises:
        ValueError: sizes, ranks or a map that do not fit.

    Example:
        >>> layer = FusedMoE(num_experts=4, top_k=2, hidden_size=8, intermediate_size=16)
        >>> layer(torch.ones(2, 3, 8), torch.zeros(2, 3, 4)).shape
        torch.Size([2, 3, 8])
        >>> FusedMoE(num_experts=5, top_k=2, hidden_size=8, intermediate_size=16, ep_size=2, ep_rank=1).expert_map.tolist()
        [-1, -1, -1, 0, 1]
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        renormalize: bool = True,
        scoring_func: str = "softmax",
        num_expert_group: int = 1,
        topk_group: int = 1,
        routed_scaling_factor: float = 1.0,
        has_correction_bias: bool = False,
        activation: str = "silu",
        swiglu_alpha: float | None = None,
        swiglu_beta: float | None = None,
        swiglu_limit: float | None = None,
        apply_router_weight_on_input: bool = False,
        has_bias: bool = False,
        expert_map: torch.Tensor | None = None,
        ep_size: int = 1,
        ep_rank: int = 0,
        tp_size: int = 1,
        tp_rank: int = 0,
        dp_size: int = 1,
        dp_rank: int = 0,
        enable_expert_parallel: bool = False,
        quant_config: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ep_size, ep_rank, tp_size, tp_rank = Ranks.of(
            tp_size=tp_size,
            tp_rank=tp_rank,
            ep_size=ep_size,
            ep_rank=ep_rank,
            dp_size=dp_size,
            dp_rank=dp_rank,
            enable_expert_parallel=enable_expert_parallel,
        )
        check_activation(activation, swiglu_alpha, swiglu_beta, swiglu_limit)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must lie in [1, num_experts={num_experts}]")
        if intermediate_size % tp_size:
            raise ValueError(f"intermediate_size={intermediate_size} must be a multiple of tp_size={tp_size}")
        if expert_map is not None and ep_size > 1:
            raise ValueError(f"ep_size={ep_size} makes an expert_map, but one is given too; give one of them")
        if expert_map is None and ep_size > 1:
            expert_map = torch.from_numpy(determine_expert_map(ep_size, ep_rank, num_experts)[1])
        # The truth about the map, in Python: a loader that asks for every expert must not wait for a GPU each time.
        self._local_ids = (
            list(range(num_experts)) if expert_map is None else checked_map(expert_map.tolist(), num_experts)
        )

        self.num_experts, self.top_k = num_experts, top_k
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.renormalize, self.scoring_func = renormalize, scoring_func
        self.num_expert_group, self.topk_group = num_expert_group, topk_group
        self.routed_scaling_factor = routed_scaling_factor
        self.activation, self.apply_router_weight_on_input = activation, apply_router_weight_on_input
        self._swiglu = (swiglu_alpha, swiglu_beta, swiglu_limit)
        self.tp_size, self.tp_rank = tp_size, tp_rank
        self.is_gated = not activation.endswith("_no_mul")
        self.num_local_experts = sum(local >= 0 for local in self._local_ids)
        if expert_map is not None:
            expert_map = torch.tensor(self._local_ids, dtype=torch.int32, device=device)
        self.register_buffer("expert_map", expert_map, persistent=False)

        part = intermediate_size // tp_size
        rows = 2 * part if self.is_gated else part

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(self.num_local_experts, *shape, device=device, dtype=dtype))

        self.quant_config, self._quantized = quant_config, {}
        if quant_config is None:
            self.w13_weight = parameter(rows, hidden_size)
            self.w2_weight = parameter(hidden_size, part)
        else:
            if activation == "swigluoai":
                raise ValueError(
                    f"quant_config={quant_config!r} does not take alternating rows (activation={activation!r}), use "
                    "'swigluoai_uninterleave'"
                )
            check_part(quant_config, intermediate_size, tp_size)
            self._quantized = parameters_of(quant_config, self.num_local_experts, rows, hidden_size, part)
            for name, (shape, code) in self._quantized.items():
                empty = torch.empty(shape, dtype=code, device=device)
                self.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))
        self.register_parameter("w13_bias", parameter(rows) if has_bias else None)
        self.register_parameter("w2_bias", parameter(hidden_size) if has_bias else None)
        bias = torch.zeros(num_experts, device=device, dtype=torch.float32) if has_correction_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of deviation 1 / sqrt(what they sum over), biases of 0; codes of 0, scales of 1.

        Example:
            >>> FusedMoE(4, 2, 8, 16, has_bias=True).w2_bias.abs().sum().item()
            0.0
        """
        if self._quantized:
            for name in self._quantized:
                self.get_parameter(name).data.fill_(1 if "weight_scale" in name else 0)
        else:
            torch.nn.init.normal_(self.w13_weight, std=self.hidden_size**-0.5)
            torch.nn.init.normal_(self.w2_weight, std=self.intermediate_size**-0.5)
        for bias in (self.w13_bias, self.w2_bias):
            if bias is not None:
                torch.nn.init.zeros_(bias)

    def select_experts(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of every token.

        Args:
            hidden_states: ``[T, H]``.
            router_logits: ``[T, E]``.

        Returns:
            (weights, ids): float32 and int32 ``[T, k]``, global ids.

        Example:
            >>> layer = FusedMoE(num_experts=4, top_k=1, hidden_size=8, intermediate_size=16)
            >>> layer.select_experts(torch.ones(1, 8), torch.tensor([[0.0, 0.0, 5.0, 0.0]]))[1].tolist()
            [[2]]
        """
        arguments = (hidden_states, router_logits, self.top_k, self.renormalize)
        if self.e_score_correction_bias is None and self.num_expert_group == 1:
            weights, ids = fused_topk(*arguments, scoring_func=self.scoring_func)
            return weights * self.routed_scaling_factor, ids
        return grouped_topk(
            *arguments,
            self.num_expert_group,
            self.topk_group,
            scoring_func=self.scoring_func,
            routed_scaling_factor=self.routed_scaling_factor,
            e_score_correction_bias=self.e_score_correction_bias,
        )

    def forward(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """The layer.

        Args:
            hidden_states: ``[..., H]``, of the dtype of the parameters, or any floating dtype under autocast.
            router_logits: ``[..., E]``.

        Returns:
            ``[..., H]``. With expert or tensor parallelism the layer is the sum over the ranks, which is the caller's to take.

        Raises:
            ValueError, TypeError: what `fused_experts` refuses.
        """
        x, logits = hidden_states, router_logits
        if x.dim() != 2 or logits.dim() != 2:
            x, logits = x.reshape(-1, self.hidden_size), logits.reshape(-1, self.num_experts)
        w13, w2 = self.w13_weight, self.w2_weight
        whole = None if torch.is_grad_enabled() or self._quantized else self._routing()
        weights, ids = (None, None) if whole else self.select_experts(x, logits)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            w13, w2 = (w13, w2) if self._quantized else (w13.to(dtype), w2.to(dtype))
        if whole:
            out = self._whole(x, w13, w2, logits, whole)
            return out if x is hidden_states else out.reshape(hidden_states.shape)
        out = fused_experts(
            x,
            w13,
            w2,
            weights,
            ids,
            activation=self.activation,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
            global_num_experts=self.num_experts,
            expert_map=self.expert_map,
            w1_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            swiglu_alpha=self._swiglu[0],
            swiglu_beta=self._swiglu[1],
            swiglu_limit=self._swiglu[2],
            quant_config=self._scales(),
        )
        return out.reshape(hidden_states.shape)

    def _scales(self) -> QuantConfig | None:
        if not self._quantized:
            return None
        kinds = (scale_name(self.quant_config), "weight_zero_point", "input_scale", "weight_scale_2")
        return QuantConfig(
            self.quant_config, *(self._parameters.get(f"{w}_{kind}") for kind in kinds for w in ("w13", "w2"))
        )

    def _routing(self) -> tuple[Any, ...] | None:
        """The routing as `moe_jax.RoutingConfig` takes it; None for one that it has no method for."""
        grouped, biased = self.num_expert_group > 1, self.e_score_correction_bias is not None
        names = {
            ("softmax", False): "deepseek_v2" if grouped else "renormalize" if self.renormalize else "default",
            ("sigmoid", False): None if grouped else "sigmoid_renorm" if self.renormalize else "sigmoid",
            ("sigmoid", True): "deepseek_v3",
        }
        method = names.get((self.scoring_func, biased))
        if method is None or not 0 < self.routed_scaling_factor < math.inf:
            return None
        renormalize = self.renormalize if method.startswith("deepseek") else None
        return method, renormalize, self.num_expert_group, self.topk_group, float(self.routed_scaling_factor)

    def _whole(
        self, x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, logits: torch.Tensor, routing: tuple[Any, ...]
    ) -> torch.Tensor:
        """Routing and experts as one: on a GPU fewer kernels than one after the other. It has no gradient."""
        held, buffers = self._parameters, self._buffers
        maps = buffers["e_score_correction_bias"], buffers["expert_map"]
        tensors = (x, w13, w2, logits, *maps, held["w13_bias"], held["w2_bias"])
        static = (self.activation, self.apply_router_weight_on_input, *self._swiglu, self.top_k, *routing)
        if x.is_cuda and is_plain(*tensors):
            return moe(*tensors, *static)
        check_devices(tensors)
        refuse_forward_mode(tensors)
        return torch.ops.moe_jax.moe.default(*tensors, *static)

    @torch.no_grad()
    def weight_loader(
        self, param: torch.Tensor, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int
    ) -> bool:
        """Copies a tensor of a checkpoint to its place, if its expert lives here: this rank's part of it.

        Args:
            param: a parameter of this module.
            loaded_weight: of one expert, whole: ``w1`` (gate) and ``w3`` (up) ``[I, H]``, ``w2`` (down) ``[H, I]``; biases
                ``[I]``, ``[I]``, ``[H]``; scales as the format has them, of channels also ``[I, 1]``. An un-gated layer has no
                ``w3``. The dtype is converted, but not that of codes; those of four bits, and scales of eight, may come as
                other names of the same bytes (uint8, float4_e2m1fn_x2). Gate and up share an input scale, the larger one.
            weight_name: its name in the checkpoint, for messages.
            shard_id: ``w1``, ``w2`` or ``w3``.
            expert_id: global.

        Returns:
            Whether the expert lives here.

        Raises:
            ValueError: an expert, shard or shape that the layer does not have.

        Example:
            >>> layer = FusedMoE(num_experts=4, top_k=2, hidden_size=8, intermediate_size=16, ep_size=2)
            >>> layer.weight_loader(layer.w13_weight, torch.ones(16, 8), "experts.1.up_proj.weight", "w3", 1)
            True
            >>> layer.w13_weight[1].sum(dim=1).tolist() [16:18]
            [8.0, 8.0]
        """
        if not 0 <= expert_id < self.num_experts:
            raise ValueError(f"{weight_name}: expert_id={expert_id} must lie in [0, num_experts={self.num_experts})")
        target, split = self._place(param, weight_name, shard_id)
        if self._local_ids[expert_id] < 0:
            return False
        target = target[self._local_ids[expert_id]]
        if split is None and param is self.w2_bias and self.tp_rank > 0:
            target.zero_()  # the sum over the ranks has the bias once
            return True
        if split is not None and self.tp_size > 1:
            part = target.shape[split]  # of I, or of its scales or bytes
            if loaded_weight.dim() <= split or loaded_weight.shape[split] != part * self.tp_size:
                raise ValueError(
                    f"{weight_name} is {tuple(loaded_weight.shape)}, but axis {split} must be the whole intermediate_size="
                    f"{self.intermediate_size}, here {part * self.tp_size}, of which this rank takes {part}"
                )
            loaded_weight = loaded_weight.narrow(split, self.tp_rank * part, part)
        if loaded_weight.squeeze().shape == target.squeeze().shape:
            loaded_weight = loaded_weight.reshape(target.shape)
        loaded_weight = as_stored(loaded_weight, param.dtype)
        is_code = param.dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8)
        if loaded_weight.shape != target.shape or (is_code and loaded_weight.dtype != param.dtype):
            raise ValueError(
                f"{weight_name} is {loaded_weight.dtype} {tuple(loaded_weight.shape)}, but shard {shard_id!r} of an expert "
                f"here is {param.dtype} {tuple(target.shape)}"
            )
        if any(param is self._parameters.get(f"{w}_input_scale") for w in ("w13", "w2")):
            loaded_weight = torch.maximum(target, loaded_weight.to(target))
        target.copy_(loaded_weight)
        return True

    def _place(self, param: torch.Tensor, weight_name: str, shard_id: str) -> tuple[torch.Tensor, int | None]:
        """The rows of all local experts that the shard fills, and the axis of one expert's tensor that ranks share out."""
        if shard_id not in ("w1", "w2", "w3") or (shard_id == "w3" and not self.is_gated):
            shards = "w1, w2, w3" if self.is_gated else "w1, w2"
            raise ValueError(
                f"{weight_name}: shard_id={shard_id!r} is not one of {shards}, activation={self.activation!r}"
            )
        name = next((name for name, mine in self._parameters.items() if mine is param and mine is not None), "")
        if not name.startswith("w2_" if shard_id == "w2" else "w13_"):
            raise ValueError(f"{weight_name}: shard {shard_id!r} does not belong into the parameter that was given")
        if shard_id == "w2":  # of scales those that change along I
            return param, 1 if param.dim() == 3 else None
        if param.dim() == 1:  # a scale for gate and up together
            return param, None
        split = None if self._quantized and scales_matrices(self.quant_config, name) else 0
        if not self.is_gated:
            return param, split
        if self.activation == "swigluoai":
            return param[:, 0 if shard_id == "w1" else 1 :: 2], 0
        half = param.shape[1] // 2
        return (param[:, :half] if shard_id == "w1" else param[:, half:]), split

    def _apply(self, fn: Any, recurse: bool = True) -> FusedMoE:
        """`to`, `half`, `to_empty` and their like: the map keeps its values, codes, scales and correction bias their dtype."""
        bias, codes = self.e_score_correction_bias, {name: self.get_parameter(name).data for name in self._quantized}
        super()._apply(fn, recurse)
        for name, before in codes.items():
            if (now := self.get_parameter(name)).dtype != before.dtype:
                now.data = before.to(now.device)
        if self.expert_map is not None:
            self.expert_map = torch.tensor(self._local_ids, dtype=torch.int32, device=self.expert_map.device)
        if bias is not None and self.e_score_correction_bias.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def extra_repr(self) -> str:
        """The sizes, for `print`.

        Example:
            >>> FusedMoE(num_experts=4, top_k=2, hidden_size=8, intermediate_size=16)
            FusedMoE(num_experts=4, top_k=2, hidden_size=8, intermediate_size=16, num_local_experts=4, activation='silu')
        """
        names = ("num_experts", "top_k", "hidden_size", "intermediate_size", "num_local_experts", "activation")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
