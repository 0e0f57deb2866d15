"""``experts_implementation="moe_jax"``: the experts of Hugging Face models, run by our kernels."""

from __future__ import annotations

import torch

from moe_jax_torch.bridge import shares_memory
from moe_jax_torch.functional import fused_experts
from moe_jax_torch.linear import expert_linear

NAME = "moe_jax"
OLDEST = (5, 7)  # of transformers: earlier ones refuse names that they do not know

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def register() -> None:
    """Makes ``experts_implementation="moe_jax"`` known to transformers, in this process. Again is harmless.

    Call it before a model is made. Then ``from_pretrained(..., experts_implementation="moe_jax")``, ``from_config`` and
    ``model.set_experts_implementation("moe_jax")`` take it, for every model whose experts go through transformers' experts
    interface. Of the others (Llama 4, DBRX, JetMoE, ...) transformers says nothing and runs their own code.

    Raises:
        ImportError: transformers is not installed, or too old.

    Source: transformers, ``integrations/moe.py``.

    Example:
        >>> import transformers
        >>> register()
        >>> config = transformers.MixtralConfig(
        ...     vocab_size=16, hidden_size=8, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=2, num_local_experts=4
        ... )
        >>> model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moe_jax")
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 16])
    """
    _check_transformers()
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, _refuse_fp8)


def _check_transformers() -> None:
    way_out = f"install transformers {'.'.join(map(str, OLDEST))} or newer: pip install 'moe_jax[torch]'"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"moe_jax_torch.transformers needs transformers, which is not installed; {way_out}"
        ) from error
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < OLDEST:
        raise ImportError(
            f"transformers {transformers.__version__} takes no experts implementation but its own; {way_out}"
        )


def _refuse_fp8(experts: torch.nn.Module, *_: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError(
        f"{type(experts).__name__} holds weights that transformers quantized ({experts.down_proj.dtype}), but {NAME!r} takes "
        "bfloat16, float16 and float32 here: load the model with FineGrainedFP8Config(dequantize=True), or use "
        "experts_implementation='grouped_mm'"
    )


def experts_forward(
    experts: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls in the place of the experts' own forward.

    A gate that is one of our activations (`moe_jax_torch.gates.recognise`) runs in `moe_jax_torch.fused_experts`. Any other, and
    a norm after the experts, takes three stages: a linear layer for each expert, the module's own gate in torch, a second
    linear layer. Ids equal to ``num_experts`` are experts of other ranks and contribute nothing.

    Matmuls run in the dtype of the weights, under autocast in its dtype; sums over the slots in float32.

    Args:
        experts: the module with the weights, of a class that ``use_experts_implementation`` decorated.
        hidden_states: ``[T, H]``.
        top_k_index: int64 or int32 ``[T, k]``.
        top_k_weights: floating ``[T, k]``.

    Returns:
        ``[T, H]``, of the dtype of `hidden_states`.

    Raises:
        ValueError, TypeError: weights that are missing, quantized or of another shape than the module says.

    Example:
        >>> from transformers import OlmoeConfig
        >>> from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
        >>> experts = OlmoeExperts(OlmoeConfig(hidden_size=8, intermediate_size=4, num_experts=2))
        >>> for parameter in experts.parameters():
        ...     _ = torch.nn.init.ones_(parameter)
        >>> y = experts_forward(experts, torch.ones(2, 8), torch.tensor([[0], [2]]), torch.ones(2, 1))
        >>> bool((y[0] != 0).all()), bool((y[1] == 0).all())
        (True, True)
    """
    from moe_jax_torch.gates import recognise

    up, up_bias, down, down_bias = _weights(experts)
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else up.dtype
    x, up, down = hidden_states.to(dtype), up.to(dtype), down.to(dtype)
    ids = top_k_index.masked_fill(top_k_index == experts.num_experts, -1)
    has_norm = getattr(experts, "has_post_expert_norm", False)
    gate = None if has_norm else recognise(experts)
    if gate is not None:
        out = fused_experts(
            x,
            up,
            down,
            top_k_weights,
            ids,
            activation=gate.activation,
            expert_map=_padded_map(experts.num_experts, ids),
            w1_bias=up_bias,
            w2_bias=down_bias,
            swiglu_alpha=gate.swiglu_alpha,
            swiglu_limit=gate.swiglu_limit,
        )
        return out.to(hidden_states.dtype)
    rows = expert_linear(x, up, ids, up_bias)
    rows = experts._apply_gate(rows) if getattr(experts, "has_gate", True) else experts.act_fn(rows)
    rows = expert_linear(rows.to(dtype), down, ids.reshape(-1, 1), down_bias)
    rows = experts.post_expert_norm(rows) if has_norm else rows
    weights = top_k_weights.float().masked_fill(ids < 0, 0)
    out = (rows.float().unflatten(0, ids.shape) * weights[:, :, None]).sum(dim=1)
    return out.to(hidden_states.dtype)


def own_weights(model: torch.nn.Module) -> list[str]:
    """Gives expert weights that would be copied at every call memory that JAX can share, once.

    These are weights whose contracted axis is not the last in memory (gpt-oss, Aria), and on a CPU those that do not begin at a
    multiple of 64 bytes, as memory-mapped files have them. Values, shapes and names stay, strides may not; the old memory is
    freed, one weight after the other. Gradients, optimizers and state dicts do not notice. Call it where weights get their
    memory for good: after loading and after ``model.to``.

    Args:
        model: any module; its experts are those that transformers' interface decorated.

    Returns:
        The names of the parameters that were moved.

    Example:
        >>> from transformers import GptOssConfig
        >>> from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
        >>> experts = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=4, num_local_experts=2))
        >>> own_weights(experts)
        ['gate_up_proj', 'down_proj']
        >>> own_weights(experts), experts.gate_up_proj.shape
        ([], torch.Size([2, 8, 8]))
    """
    moved = []
    for prefix, module in model.named_modules():
        if not hasattr(module, "is_transposed"):  # what transformers' decorator sets
            continue
        for name, parameter in module.named_parameters(recurse=False):
            swap = module.is_transposed and parameter.dim() == 3
            rows = parameter.data.transpose(1, 2) if swap else parameter.data
            if not shares_memory(rows):
                rows = rows.clone(memory_format=torch.contiguous_format)
                parameter.data = rows.transpose(1, 2) if swap else rows
                moved.append(f"{prefix}.{name}".removeprefix("."))
    return moved


def _weights(
    experts: torch.nn.Module,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Up-projection ``[E, 2I or I, H]`` and down-projection ``[E, H, I]`` with their biases, as the module's flags name them."""
    kind = type(experts).__name__
    has_bias, is_transposed = getattr(experts, "has_bias", False), getattr(experts, "is_transposed", False)
    first = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    found = []
    for name in (first, "down_proj"):
        weight, bias = getattr(experts, name, None), getattr(experts, f"{name}_bias", None) if has_bias else None
        if weight is None or (has_bias and bias is None):
            raise ValueError(
                f"{kind} has has_gate={first == 'gate_up_proj'} and has_bias={has_bias}, but no {name} or no bias of it; "
                f"use experts_implementation='eager', or name the parameters as transformers' interface does"
            )
        if weight.dtype not in _FLOATS:
            raise TypeError(
                f"{kind}.{name} is {weight.dtype}, but {NAME} takes bfloat16, float16 and float32: cast the model, load it "
                "with its weights dequantized, or use experts_implementation='eager'"
            )
        if weight.dim() != 3 or weight.shape[0] != experts.num_experts:
            raise ValueError(
                f"{kind}.{name} is {tuple(weight.shape)}, but must be a matrix for each of num_experts="
                f"{experts.num_experts}; use experts_implementation='eager'"
            )
        found += [weight.transpose(1, 2) if is_transposed else weight, bias]
    return tuple(found)


def _padded_map(num_experts: int, ids: torch.Tensor) -> torch.Tensor | None:
    """None, or where a rank has fewer experts than a token has slots, a map with experts that are nowhere."""
    missing = ids.shape[1] - num_experts
    if missing <= 0:
        return None
    return torch.nn.functional.pad(torch.arange(num_experts, device=ids.device), (0, missing), value=-1)
