"""Layers loaded from checkpoints that transformers wrote, against transformers' own MoE blocks, in float32."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import reference
from moe_jax.checkpoints import load_layer, sparse_layers
from moe_jax.config import MoEConfig
from moe_jax.moe import moe_block
from moe_jax.routing import route
from moe_jax.types import MoELayerWeights, TopK
from tests.util import assert_discriminates, check_close, relative_error

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS, LAYER = 64, 32, 8, 50, 1
TOLERANCE = 2e-6

jitted_moe_block = jax.jit(moe_block, static_argnames=("config", "implementation"))

TINY = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TINY_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vision_output_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LOCAL = {"num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE}
QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE, "num_experts_per_tok": 3}
ROUTED = {"n_routed_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE, "num_experts_per_tok": 3}
GROUPED = {
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}

# name: (config class, its arguments besides TINY)
CASES = {
    "mixtral": ("MixtralConfig", LOCAL | {"num_experts_per_tok": 3}),
    "qwen2_moe": ("Qwen2MoeConfig", QWEN | {"shared_expert_intermediate_size": 48, "decoder_sparse_step": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", QWEN | {"norm_topk_prob": True, "head_dim": 16, "mlp_only_layers": [0]}),
    "qwen3_moe_unnormalised": ("Qwen3MoeConfig", QWEN | {"norm_topk_prob": False, "head_dim": 16}),
    "deepseek_v2": ("DeepseekV2Config", ROUTED | LATENT | GROUPED | {"topk_method": "group_limited_greedy"}),
    "deepseek_v2_lite": ("DeepseekV2Config", ROUTED | LATENT | {"topk_method": "greedy", "first_k_dense_replace": 1}),
    "deepseek_v3": ("DeepseekV3Config", ROUTED | LATENT | GROUPED),
    "olmoe": ("OlmoeConfig", {"num_experts": EXPERTS, "intermediate_size": INTERMEDIATE, "num_experts_per_tok": 3}),
    "glm4_moe": ("Glm4MoeConfig", ROUTED | {"head_dim": 16, "routed_scaling_factor": 2.5, "n_shared_experts": 1}),
    "gpt_oss": ("GptOssConfig", LOCAL | {"num_experts_per_tok": 3, "head_dim": 16}),
    "llama4_text": ("Llama4TextConfig", LOCAL | {"head_dim": 16, "intermediate_size_mlp": 48, "moe_layers": [1]}),
    "llama4": ("Llama4Config", {}),  # the composite one, with a vision tower
    "phimoe": ("PhimoeConfig", LOCAL | {"router_jitter_noise": 0.2}),
    "minimax_m2": ("MiniMaxM2Config", LOCAL | {"num_experts_per_tok": 3, "head_dim": 16}),
}


class Case(NamedTuple):
    """One model family: its checkpoints on disk, our config and what transformers computes."""

    path: Any  # as the family's models are published
    fused_path: Any  # with the names that transformers has in memory
    config: MoEConfig
    x: np.ndarray
    expected: np.ndarray


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    kind, arguments = CASES[request.param]
    torch.manual_seed(list(CASES).index(request.param))
    if kind == "Llama4Config":
        hf_config = transformers.Llama4Config(text_config=TINY | CASES["llama4_text"][1], vision_config=TINY_VISION)
        model = transformers.Llama4ForConditionalGeneration(hf_config).float().eval()
    else:
        hf_config = getattr(transformers, kind)(**TINY, **arguments)
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    blocks = (f"layers.{LAYER}.mlp", f"layers.{LAYER}.feed_forward")
    block = next(module for name, module in model.named_modules() if name.endswith(blocks))
    randomise(block)
    x = torch.randn(2, TOKENS // 2, HIDDEN)
    with torch.no_grad():
        expected = block(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path / "published")
    model.save_pretrained(path / "fused", save_original_format=False)
    experts = (re.search(r"layers\.(\d+)\.\w+\.experts$", name) for name, _ in model.named_modules())
    assert sparse_layers(hf_config) == [int(match[1]) for match in experts if match]
    return Case(
        path=path / "published",
        fused_path=path / "fused",
        config=MoEConfig.from_hf(hf_config),
        x=x.reshape(TOKENS, HIDDEN).numpy(),
        expected=expected.reshape(TOKENS, HIDDEN).numpy(),
    )


def randomise(block) -> None:
    """Weights that spread tokens over all experts, exceed gpt-oss's clamp now and then and give outputs of order 1."""
    deviations = {"router.weight": 0.25, "gate.weight": 0.25, "down_proj": 0.15, "correction_bias": 0.15}
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        deviation = next((value for part, value in deviations.items() if part in name), 0.3)
        tensor.data.normal_(0.0, deviation)


def reference_topk(x, layer: MoELayerWeights, config: MoEConfig) -> TopK:
    """Routing by the oracle; only a custom function is the library's own."""
    logits = jnp.asarray(x) @ layer.router.T
    if layer.router_bias is not None:
        logits = logits + layer.router_bias[None]
    if config.routing.custom_function is not None:
        return route(logits, config)
    return reference.route(logits, config, correction_bias=layer.correction_bias)


def by_reference(x, layer: MoELayerWeights, config: MoEConfig, expert_map=None):
    """The block from the pieces of the oracle."""
    x = jnp.asarray(x)
    topk = reference_topk(x, layer, config)
    out = reference.apply_experts(x, layer.experts, topk, config, expert_map=expert_map)
    return out if layer.shared is None else out + reference.shared_experts(x, layer.shared, config)


def by_moe_block(x, layer: MoELayerWeights, config: MoEConfig, expert_map=None):
    return jitted_moe_block(jnp.asarray(x), layer, config, expert_map=expert_map, implementation="xla")


@pytest.fixture(params=[by_reference, by_moe_block], ids=["reference", "xla"])
def run(request) -> Callable:
    return request.param


def test_config_is_float32_and_outputs_are_of_order_one(case):
    assert case.config.dtype == "float32"
    assert 0.2 < np.std(case.expected) < 10


def test_block_equals_transformers(case, run):
    layer = load_layer(case.path, LAYER, case.config)
    check_close(run(jnp.asarray(case.x), layer, case.config), case.expected, TOLERANCE)


def test_fused_names_hold_the_same_layer(case):
    published, fused = load_layer(case.path, LAYER, case.config), load_layer(case.fused_path, LAYER, case.config)
    assert jax.tree.structure(published) == jax.tree.structure(fused)
    for one, other in zip(jax.tree.leaves(published), jax.tree.leaves(fused), strict=True):
        np.testing.assert_array_equal(one, other)


def test_four_expert_parallel_ranks_add_up_to_transformers(case, run):
    # Local ids in another order than global ones; ranks of unequal size where that does not mean four compilations.
    ranks = [[5, 0], [3, 1], [7, 6], [2, 4]] if run is by_moe_block else [[5, 0, 3], [1, 7], [6], [2, 4]]
    total = np.zeros_like(case.expected)
    for rank, experts in enumerate(ranks):
        expert_map = np.full(EXPERTS, -1, np.int32)
        expert_map[experts] = np.arange(len(experts))
        layer = load_layer(case.path, LAYER, case.config, jnp.asarray(expert_map))
        assert layer.experts.num_local_experts == len(experts)
        if rank > 0:
            layer = dataclasses.replace(layer, shared=None)
        part = np.asarray(run(jnp.asarray(case.x), layer, case.config, jnp.asarray(expert_map)))
        assert relative_error(part, case.expected) > 0.1  # no rank alone has the whole
        total += part
    check_close(total, case.expected, TOLERANCE)


def test_every_expert_is_used_and_tokens_differ(case):
    layer = load_layer(case.path, LAYER, case.config)
    ids = np.asarray(reference_topk(case.x, layer, case.config).ids)
    assert set(ids.ravel().tolist()) == set(range(EXPERTS))
    assert len({tuple(sorted(row)) for row in ids.tolist()}) >= EXPERTS


def spoiled_outputs(expected: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "tokens reversed": expected[::-1],
        "features permuted": expected[:, ::-1],
        "scaled": expected * np.float32(1 + 1e-5),
        "one token lost": np.where(np.arange(TOKENS)[:, None] == 7, 0, expected),
    }


def spoiled_layers(layer: MoELayerWeights) -> dict[str, MoELayerWeights]:
    """The layer with one part of it wrong, for every part that it has."""
    experts = layer.experts
    swapped = jnp.concatenate([experts.w13[:, INTERMEDIATE:], experts.w13[:, :INTERMEDIATE]], axis=1)
    layers = {
        "gate and up swapped": dataclasses.replace(layer, experts=dataclasses.replace(experts, w13=swapped)),
        "experts rolled": dataclasses.replace(
            layer, experts=dataclasses.replace(experts, w2=jnp.roll(experts.w2, 1, axis=0))
        ),
        "router rolled": dataclasses.replace(layer, router=jnp.roll(layer.router, 1, axis=0)),
    }
    if experts.w13_bias is not None:
        for name in ("w13_bias", "w2_bias"):
            zero = dataclasses.replace(experts, **{name: jnp.zeros_like(getattr(experts, name))})
            layers["no " + name] = dataclasses.replace(layer, experts=zero)
    if layer.router_bias is not None:
        layers["no router bias"] = dataclasses.replace(layer, router_bias=None)
    if layer.correction_bias is not None:
        layers["no correction bias"] = dataclasses.replace(layer, correction_bias=jnp.zeros(EXPERTS))
    if layer.shared is not None:
        layers["no shared expert"] = dataclasses.replace(layer, shared=None)
        if layer.shared.gate is not None:
            layers["no shared gate"] = dataclasses.replace(layer, shared=dataclasses.replace(layer.shared, gate=None))
    return layers


def spoiled_configs(config: MoEConfig) -> dict[str, MoEConfig]:
    """The config with one thing about the family wrong, for each thing that it has."""

    def routing(**changes) -> MoEConfig:
        return dataclasses.replace(config, routing=dataclasses.replace(config.routing, **changes))

    configs = {"activation": dataclasses.replace(config, activation="gelu", swiglu_alpha=None, swiglu_limit=None)}
    if config.routing.routed_scaling_factor != 1:
        configs["no scaling"] = routing(routed_scaling_factor=1.0)
    if config.routing.num_expert_group > 1:
        configs["no groups"] = routing(num_expert_group=1, topk_group=1)
    if config.apply_router_weight_on_input:
        configs["weight on output"] = dataclasses.replace(config, apply_router_weight_on_input=False)
    if config.routing.method.value in ("renormalize", "default"):
        other = "default" if config.routing.method.value == "renormalize" else "renormalize"
        configs["renormalisation"] = routing(method=other)
    elif config.routing.method.value in ("deepseek_v2", "deepseek_v3", "minimax2", "custom"):
        configs["renormalisation"] = routing(renormalize=not config.routing.renormalizes)
    if config.swiglu_limit is not None:
        configs["no clamp"] = dataclasses.replace(config, swiglu_limit=1e9)
        configs["alpha"] = dataclasses.replace(config, swiglu_alpha=1.0)
    return configs


def test_the_check_fails_for_wrong_outputs_weights_and_configs(case):
    assert_discriminates(lambda output: check_close(output, case.expected, TOLERANCE), case.expected)
    for name, output in spoiled_outputs(case.expected).items():
        assert relative_error(output, case.expected) > TOLERANCE, name
    layer = load_layer(case.path, LAYER, case.config)
    for name, spoiled in spoiled_layers(layer).items():
        assert relative_error(by_reference(case.x, spoiled, case.config), case.expected) > 1e-3, name
    for name, config in spoiled_configs(case.config).items():
        assert relative_error(by_reference(case.x, layer, config), case.expected) > 1e-4, name
