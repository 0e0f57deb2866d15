"""`quant_format_from_hf`: what quantization configs say, of which modules, and what is said about those that cannot be read."""

import re
import types

import pytest

from moe_jax.checkpoints import quant_format_from_hf
from moe_jax.checkpoints.module_patterns import first_match
from moe_jax.quantization import FORMATS, Spec
from tests.checkpoints.quantized_files import AWQ, DEEPSEEK, FP8, GPTQ, MODELOPT, SCHEMES, STATIC, TOKEN, compressed

LAYER = "model.layers.3.mlp."
EXPERT = LAYER + "experts.7.up_proj"


@pytest.mark.parametrize("name", SCHEMES)
def test_where_the_config_may_be(name):
    scheme = SCHEMES[name]
    wanted = quant_format_from_hf(scheme.config)
    assert wanted.name == scheme.format
    if wanted.name in FORMATS:
        assert wanted == FORMATS[wanted.name]
    if "quantization" in scheme.config:
        return
    for config in (
        {"model_type": "mixtral", "quantization_config": scheme.config},
        {"model_type": "llama4", "text_config": {"quantization_config": scheme.config}},
        {"compression_config": scheme.config},
        types.SimpleNamespace(quantization_config=types.SimpleNamespace(to_dict=lambda: scheme.config)),
    ):
        assert quant_format_from_hf(config) == wanted


def test_no_quantization():
    assert quant_format_from_hf({"model_type": "mixtral"}) is None
    assert quant_format_from_hf({"model_type": "llama4", "text_config": {"hidden_size": 1}}) is None
    assert quant_format_from_hf(types.SimpleNamespace(model_type="mixtral")) is None


def test_transformers_configs():
    transformers = pytest.importorskip("transformers")
    config = transformers.FineGrainedFP8Config(modules_to_not_convert=["lm_head"])
    assert quant_format_from_hf(types.SimpleNamespace(quantization_config=config)).name == "fp8_block"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (FP8 | {"weight_block_size": [64, 32]}, "fp8_block64x32_x_fp8_group32"),
        ({"quant_method": "fp8", "fmt": "float8_e4m3fn", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8_tensor_static"),
        ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "fp8_channel"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "fp8_weight_block"),
        (GPTQ | {"group_size": -1}, "int4_channel"),
        (GPTQ | {"group_size": 128, "sym": False}, "int4_group128_zp"),
        (AWQ | {"group_size": 64, "version": "GEMM"}, "int4_group64_zp"),
        (compressed(8, "channel", inputs=STATIC), "fp8_channel_x_fp8_tensor_static"),
        (compressed(8, "tensor", inputs={"strategy": "tensor", "dynamic": True}), "fp8_tensor"),
        (compressed(8, "channel") | {"format": "naive-quantized"}, "fp8_weight_channel"),
        (compressed(8, "block", block_structure="128x128") | {"format": "float-quantized"}, "fp8_weight_block"),
        (compressed(8, None, "int", group_size=-1), "int8_weight"),
        (compressed(8, "group", "int", group_size=64), "int8_group64"),
        (compressed(4, "group", "int", group_size=128) | {"format": "mixed-precision"}, "int4_group128"),
        (compressed(4, "channel", "int", symmetric=False), "int4_channel_zp"),
    ],
)
def test_formats(config, name):
    assert quant_format_from_hf(config).name == name


def test_a_format_of_its_own():
    found = quant_format_from_hf(compressed(8, "channel", inputs=STATIC))
    assert found.weights == Spec("float8_e4m3fn", "channel")
    assert found.activations == Spec("float8_e4m3fn", "tensor", static=True)


@pytest.mark.parametrize(
    ("patterns", "matches", "others"),
    [
        (["gate"], ["mlp.gate", "gate", "model.gate.weight"], ["mlp.gate_proj", "mlp.shared_expert_gate"]),
        (["mlp.gate."], ["model.layers.0.mlp.gate"], ["model.layers.0.mlp.gate_up"]),
        (["model.layers.1"], ["model.layers.1.mlp.gate"], ["model.layers.11.mlp.gate"]),
        (["re:.*mlp.gate$"], ["model.layers.0.mlp.gate"], ["model.layers.0.mlp.gate_proj"]),
        (["re:mlp"], ["mlp.gate"], ["model.mlp.gate"]),
        (["model.layers.0*"], ["model.layers.0.mlp.gate"], ["model.layers.1.mlp.gate"]),
        (["*.shared_experts"], ["model.layers.0.mlp.shared_experts.up_proj"], ["model.layers.0.mlp.experts.1.up_proj"]),
        (["", "."], [], ["mlp", "mlp.gate"]),
    ],
)
def test_lists_of_modules(patterns, matches, others):
    assert all(first_match(name, patterns) == patterns[0] for name in matches)
    assert not any(first_match(name, patterns) for name in others)


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"])
def test_modules_left_out(key):
    config = DEEPSEEK | {key: ["lm_head", LAYER + "gate"]}
    assert quant_format_from_hf(config, LAYER + "gate") is None
    assert quant_format_from_hf(config, EXPERT).name == quant_format_from_hf(config).name == "fp8_block"


def test_modelopt_leaves_out_by_wildcard():
    assert quant_format_from_hf(MODELOPT, LAYER + "gate") is None
    assert quant_format_from_hf(MODELOPT, EXPERT).name == "fp8_tensor_static"


def test_config_groups_have_targets():
    first = compressed(8, "channel", inputs=TOKEN)
    second = compressed(4, "group", "int", group_size=128)["config_groups"]["group_0"]
    experts = second | {"targets": ["re:.*mlp.experts.*"], "format": "pack-quantized"}
    attention = first["config_groups"]["group_0"] | {"targets": ["re:.*self_attn.*"]}
    both = first | {"config_groups": {"group_0": first["config_groups"]["group_0"], "group_1": experts}}
    assert quant_format_from_hf(both, EXPERT).name == "int4_group128"
    assert quant_format_from_hf(both, LAYER + "shared_expert.up_proj").name == "fp8_channel"
    with pytest.raises(ValueError, match="group_0, group_1 differ in format; say which module.*module="):
        quant_format_from_hf(both)
    neither = first | {"config_groups": {"group_0": attention, "group_1": experts}}
    assert quant_format_from_hf(neither, LAYER + "gate_proj") is None


def test_rules_of_gptq():
    config = GPTQ | {
        "dynamic": {r"-:.*mlp\.gate$": {}, r"+:.*experts\.7\.": {"bits": 8}, r".*down_proj": {"sym": False}}
    }
    assert quant_format_from_hf(config, LAYER + "gate") is None
    assert quant_format_from_hf(config, EXPERT).name == "int8_group32"
    assert quant_format_from_hf(config, LAYER + "experts.1.down_proj").name == "int4_group32_zp"
    assert (
        quant_format_from_hf(config, LAYER + "experts.1.up_proj").name
        == quant_format_from_hf(config).name
        == "int4_group32"
    )


BLOCKS = {"strategy": "group", "group_size": 128, "dynamic": True}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fbgemm_fp8"}, "quant_method='fbgemm_fp8' is not supported: known are fp8, compressed-tensors,"),
        (FP8 | {"fmt": "e5m2"}, "fmt='e5m2' of quant_method='fp8' is not supported: only 'e4m3', 'float8_e4m3fn'"),
        (DEEPSEEK | {"activation_scheme": "static"}, "activation_scheme='static' with weight_block_size=[128, 128]"),
        (DEEPSEEK | {"expert_dtype": "fp4"}, "expert_dtype='fp4'"),
        (DEEPSEEK | {"scale_fmt": "e5m2"}, "scale_fmt='e5m2'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "quant_algo='NVFP4' with group_size=32 is not"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ' of ModelOpt is not supported: only FP8,"),
        ({"quant_method": "mxfp8", "weight_block_size": [128, 128]}, "weight_block_size=[128, 128] of quant_method='mxfp8'"),
        (compressed(4, "tensor_group", group_size=32), "strategy='tensor_group', group_size=32; only tensor_group of 16 (NVFP4)"),
        (compressed(4, "group", group_size=32) | {"format": "pack-quantized"}, "only mxfp4-pack-quantized can be read"),
        (
            compressed(4, "tensor_group", group_size=16, inputs={"strategy": "tensor_group", "group_size": 16, "dynamic": False}),
            "float4_e2m1fn in groups of 16 with dynamic=False",
        ),
        (GPTQ | {"bits": 3}, "bits=3 of quant_method='gptq' is not supported: only 4, 8"),
        (GPTQ | {"bits": 8, "sym": False}, "GPTQ with bits=8, sym=False is not supported: only int4 has zero points"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format=True"),
        (AWQ | {"version": "gemv"}, "version='gemv'"),
        (AWQ | {"zero_point": False}, "zero_point=False"),
        (AWQ | {"bits": 8}, "AWQ with bits=8"),
        (compressed(8, "channel", "int", symmetric=False), "symmetric=False: only int4 has zero points, not int8"),
        (compressed(2, "group"), "type='float' of num_bits=2; only float and int of 8 and 4"),
        (compressed(4, "tensor", "int"), "int4 weights with strategy='tensor'; only group and channel"),
        (compressed(8, "attn_head"), "weights with strategy='attn_head'; only tensor, channel, group, block"),
        (compressed(8, "channel", dynamic=True), "weights with dynamic scales have none in the checkpoint"),
        (compressed(8, "block"), "granularity='block' (one scale a (bn, bk) piece of the matrix) needs block=(rows, columns)"),
        (compressed(8, "channel", inputs=TOKEN | {"symmetric": False}), "activations have no zero points"),
        (compressed(8, "channel", inputs=TOKEN | {"dynamic": "local"}), "input_activations with dynamic='local'"),
        (compressed(8, "channel", inputs=TOKEN | {"dynamic": False}), "strategy='token' and dynamic=False; only tensor"),
        (compressed(8, "channel", inputs={"strategy": "channel", "dynamic": True}), "strategy='channel'; only tensor, token"),
        (compressed(4, "group", "int", group_size=128, inputs={"num_bits": 8, **TOKEN}), "cannot be multiplied with int4"),
        (compressed(8, "channel") | {"format": "marlin-24"}, "format 'marlin-24' is not supported: only pack-quantized"),
        (compressed(4, "channel", "int") | {"format": "int-quantized"}, "int4 in compressed-tensors format 'int-quantized'"),
        (compressed(8, "channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(config, message):
    with pytest.raises(NotImplementedError, match=re.escape(message)) as error:
        quant_format_from_hf(config)
    assert "use another release" in str(error.value) and "quantize_experts" in str(error.value)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ({"quant_method": "gptq"}, "bits"),
        ({"quant_method": "modelopt"}, "quant_algo"),
    ],
)
def test_a_missing_field_is_named(config, field):
    with pytest.raises(
        ValueError, match=f"the quantization_config of method '{config['quant_method']}' has no {field}; add"
    ):
        quant_format_from_hf(config)


def test_groups_of_outputs_and_of_nothing():
    config = compressed(8, "channel", inputs=TOKEN)
    group = config["config_groups"]["group_0"]
    for changes, message in (
        ({"output_activations": BLOCKS}, "output_activations"),
        ({"weights": None}, "without weights"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            quant_format_from_hf(config | {"config_groups": {"group_0": group | changes}})
