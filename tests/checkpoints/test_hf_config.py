"""`config_from_hf`: what config.json files mean, and what is said about those that cannot be read."""

import pickle
import types

import pytest

from moe_jax.checkpoints import config_from_hf, sparse_layers
from moe_jax.config import MoEConfig
from tests.checkpoints.released import (
    ALL,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    EXPECTED,
    GLM4,
    GPT_OSS,
    LLAMA4,
    MINIMAX_M2,
    MIXTRAL,
    OLMOE,
    QWEN2,
    QWEN3,
)


def by_type(config):
    return config["model_type"]


@pytest.mark.parametrize("hf", ALL, ids=by_type)
def test_released_configs(hf):
    assert MoEConfig.from_hf(hf) == EXPECTED[hf["model_type"]]


@pytest.mark.parametrize("hf", ALL, ids=by_type)
def test_an_object_reads_like_its_dict(hf):
    nested = {key: types.SimpleNamespace(**value) if isinstance(value, dict) else value for key, value in hf.items()}
    assert config_from_hf(types.SimpleNamespace(**nested)) == config_from_hf(hf)


@pytest.mark.parametrize("hf", ALL, ids=by_type)
def test_configs_are_hashable_and_survive_pickling(hf):
    config = config_from_hf(hf)
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))
    assert pickle.loads(pickle.dumps(config)) == config


def test_overrides_replace_what_is_read():
    config = config_from_hf(QWEN3, dtype="float32", top_k=2)
    assert (config.dtype, config.top_k, config.num_experts) == ("float32", 2, 128)


def test_renormalisation_follows_norm_topk_prob():
    for hf in (QWEN2, QWEN3, OLMOE):
        assert config_from_hf(hf | {"norm_topk_prob": True}).routing.method.value == "renormalize"
        assert config_from_hf(hf | {"norm_topk_prob": False}).routing.method.value == "default"
    for hf in (DEEPSEEK_V2, DEEPSEEK_V3, GLM4):
        for flag in (True, False):
            assert config_from_hf(hf | {"norm_topk_prob": flag}).routing.renormalizes is flag


def test_deepseek_v2_lite_ignores_groups():
    """``greedy`` takes the best experts of all groups, whatever n_group and topk_group say."""
    lite = DEEPSEEK_V2 | {"topk_method": "greedy", "n_group": 8, "topk_group": 1, "routed_scaling_factor": 1.0}
    routing = config_from_hf(lite).routing
    assert (routing.num_expert_group, routing.topk_group) == (1, 1)


def test_no_shared_experts():
    for count in (0, None):
        config = config_from_hf(DEEPSEEK_V3 | {"n_shared_experts": count})
        assert (config.num_shared_experts, config.shared_intermediate_size) == (0, 0)


def test_both_spellings_of_the_number_of_experts():
    """transformers 5 writes num_local_experts for Qwen3-MoE, the released files have num_experts."""
    renamed = {key: value for key, value in QWEN3.items() if key != "num_experts"} | {"num_local_experts": 128}
    assert config_from_hf(renamed) == config_from_hf(QWEN3)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "float32"}, "float32"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "float16"),
        ({"torch_dtype": "auto"}, "bfloat16"),
        ({}, "bfloat16"),
    ],
)
def test_dtype(fields, dtype):
    bare = {key: value for key, value in MIXTRAL.items() if key != "torch_dtype"}
    assert config_from_hf(bare | fields).dtype == dtype


def test_torch_dtypes_are_read_as_names():
    torch = pytest.importorskip("torch")
    assert config_from_hf(MIXTRAL | {"dtype": torch.float16}).dtype == "float16"


def test_gpt_oss_parameters_are_read():
    config = config_from_hf(GPT_OSS | {"swiglu_alpha": 1.5, "swiglu_limit": 3.0})
    assert (config.act.alpha, config.act.beta, config.act.limit) == (1.5, 1.0, 3.0)


def test_activation_names_of_transformers():
    assert config_from_hf(MIXTRAL | {"hidden_act": "gelu_pytorch_tanh"}).activation == "gelu_tanh"
    with pytest.raises(ValueError, match="activation='quick_gelu' is not one of silu"):
        config_from_hf(MIXTRAL | {"hidden_act": "quick_gelu"})


def test_unknown_model_type_lists_the_known_ones():
    with pytest.raises(ValueError, match="model_type='llama' is not a known MoE family; known: mixtral, qwen2_moe"):
        config_from_hf({"model_type": "llama"})
    with pytest.raises(ValueError, match="model_type=None"):
        config_from_hf({"hidden_size": 64})
    with pytest.raises(ValueError, match="model_type='llama' is not"):
        config_from_hf({"model_type": "llava", "text_config": {"model_type": "llama"}})


NEEDED = {
    "mixtral": "num_local_experts num_experts_per_tok hidden_size intermediate_size",
    "qwen2_moe": "num_experts moe_intermediate_size norm_topk_prob shared_expert_intermediate_size",
    "qwen3_moe": "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob",
    "deepseek_v2": "n_routed_experts n_group topk_group routed_scaling_factor norm_topk_prob",
    "deepseek_v3": "n_routed_experts n_group topk_group routed_scaling_factor norm_topk_prob moe_intermediate_size",
    "olmoe": "num_experts intermediate_size norm_topk_prob",
    "glm4_moe": "n_routed_experts n_group topk_group routed_scaling_factor norm_topk_prob",
    "gpt_oss": "num_local_experts num_experts_per_tok",
    "phimoe": "num_local_experts router_jitter_noise",
    "minimax_m2": "num_local_experts intermediate_size",
}


@pytest.mark.parametrize(
    ("hf", "field"), [(hf, field) for hf in ALL for field in NEEDED.get(hf["model_type"], "").split()], ids=str
)
def test_a_missing_field_is_named(hf, field):
    broken = {key: value for key, value in hf.items() if key != field}
    with pytest.raises(ValueError, match=rf"the {hf['model_type']} config has no .*\b{field}\b"):
        config_from_hf(broken)


def test_a_missing_field_of_a_text_config_is_named():
    text = {key: value for key, value in LLAMA4["text_config"].items() if key != "num_local_experts"}
    with pytest.raises(ValueError, match="the llama4_text config has no num_local_experts or num_experts"):
        config_from_hf(LLAMA4 | {"text_config": text})


@pytest.mark.parametrize(
    ("hf", "field", "value"),
    [
        (DEEPSEEK_V3, "scoring_func", "softmax"),
        (DEEPSEEK_V3, "topk_method", "greedy"),
        (DEEPSEEK_V2, "scoring_func", "sigmoid"),
        (DEEPSEEK_V2, "topk_method", "noaux_tc"),
        (MINIMAX_M2, "scoring_func", "softmax"),
        (MINIMAX_M2, "use_routing_bias", False),
        (MINIMAX_M2, "shared_intermediate_size", 512),
    ],
    ids=str,
)
def test_what_the_layer_does_not_implement_is_refused(hf, field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} is not supported for {hf['model_type']}"):
        config_from_hf(hf | {field: value})


def test_llama4_with_two_experts_is_refused():
    with pytest.raises(ValueError, match="apply_router_weight_on_input needs top_k=1, got top_k=2"):
        config_from_hf(LLAMA4["text_config"] | {"num_experts_per_tok": 2})


@pytest.mark.parametrize(
    ("hf", "changes", "layers"),
    [
        (MIXTRAL, {}, list(range(32))),
        (QWEN2, {"num_hidden_layers": 6, "decoder_sparse_step": 2}, [1, 3, 5]),
        (QWEN3, {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
        (QWEN3, {"num_hidden_layers": 3, "mlp_only_layers": None}, [0, 1, 2]),
        (DEEPSEEK_V3, {}, list(range(3, 61))),
        (DEEPSEEK_V2, {"num_hidden_layers": 8, "first_k_dense_replace": 3, "moe_layer_freq": 2}, [4, 6]),
        (DEEPSEEK_V3, {"num_hidden_layers": 4, "first_k_dense_replace": 0, "moe_layer_freq": [0, 1, 0, 1]}, [1, 3]),
        (GLM4, {"num_hidden_layers": 3}, [1, 2]),
        (LLAMA4, {}, list(range(1, 48, 2))),
        (LLAMA4["text_config"], {"num_hidden_layers": 3, "interleave_moe_layer_step": 1}, [0, 1, 2]),
        (LLAMA4["text_config"], {"moe_layers": [7, 5]}, [5, 7]),
        (GPT_OSS, {"num_hidden_layers": 2}, [0, 1]),
        (MINIMAX_M2, {"num_hidden_layers": 2}, [0, 1]),
    ],
)
def test_sparse_layers(hf, changes, layers):
    assert sparse_layers(hf | changes) == layers


def test_sparse_layers_names_what_is_missing():
    with pytest.raises(ValueError, match="the gpt_oss config has no num_hidden_layers"):
        sparse_layers({"model_type": "gpt_oss"})
