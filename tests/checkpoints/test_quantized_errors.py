"""What is said about quantized checkpoints that are broken, contradict their config, or cannot be read."""

import dataclasses
import json

import numpy as np
import pytest

from moe_jax.checkpoints import load_experts, load_layer
from tests.checkpoints import files
from tests.checkpoints import quantized_files as quantized
from tests.checkpoints.quantized_files import CONFIG, DEEPSEEK, MLP, SCHEMES, E, H, I
from tests.checkpoints.test_load_errors import raises

UP = MLP + "experts.2.up_proj."


def saved(scheme, tmp_path, changes=None, config=None, lost=()):
    """A checkpoint in which tensors were replaced or lost."""
    tensors = {name: x for name, x in quantized.tensors(SCHEMES[scheme]).items() if name not in lost}
    return quantized.save(tensors | (changes or {}), tmp_path, SCHEMES[scheme].config if config is None else config)


@pytest.mark.parametrize(
    ("scheme", "part"),
    [
        ("fp8 blocks", "weight_scale_inv"),
        ("fp8 tensor static", "weight_scale"),
        ("fp8 tensor static", "input_scale"),
        ("modelopt", "weight"),
        ("ct int4 zp", "weight_zero_point"),
        ("gptq", "qzeros"),
        ("awq", "scales"),
    ],
)
def test_a_missing_part_is_named(scheme, part, tmp_path):
    path = saved(scheme, tmp_path, lost=[UP + part])
    with raises(ValueError, "lacks 1 of the", UP + part):
        load_layer(path, 0, CONFIG)
    load_experts(path, 0, CONFIG, np.array([0, 1, -1, 2]))  # not this rank's expert


def test_without_any_scale(tmp_path):
    lost = [f"{MLP}experts.{e}.{part}_proj.weight_scale_inv" for e in range(E) for part in ("gate", "up", "down")]
    with raises(NotImplementedError, "is stored as F8_E4M3, not as BF16", "no scale is beside it", "bfloat16 release"):
        load_layer(saved("fp8 blocks", tmp_path, lost=lost), 0, CONFIG)


@pytest.mark.parametrize(
    ("scheme", "part", "array", "message"),
    [
        (
            "fp8 blocks",
            "weight_scale_inv",
            np.ones((2, 3)),
            "is [2, 3], expected [ceil(intermediate_size/128)=2, ceil(",
        ),
        ("fp8 tensor", "weight_scale", np.ones(2), "is [2], expected []"),
        ("ct fp8 channel", "weight_scale", np.ones((H, 1)), f"is [{H}, 1], expected [intermediate_size={I}]"),
        ("modelopt", "input_scale", np.ones((2, 1)), "is [2, 1], expected []"),
        ("ct int4", "weight_scale", np.ones((I, 5)), "expected [intermediate_size=160, ceil(hidden_size/32)=6]"),
    ],
)
def test_wrong_shapes(scheme, part, array, message, tmp_path):
    path = saved(scheme, tmp_path, {UP + part: array.astype(np.float32)})
    with raises(ValueError, "have not the shape", UP + part, message):
        load_layer(path, 0, CONFIG)


@pytest.mark.parametrize(
    ("scheme", "name", "dtype", "message"),
    [
        ("fp8 blocks", "weight", np.float32, "is stored as F32, not as F8_E4M3"),
        ("fp8 blocks", "weight_scale_inv", np.int32, "is stored as I32, not as BF16, F16, F32"),
        ("ct int8", "weight", np.uint8, "is stored as U8, not as I8: its quantization_config and its tensors disagree"),
        ("gptq", "qweight", np.int64, "is stored as I64, not as I32"),
    ],
)
def test_wrong_dtypes(scheme, name, dtype, message, tmp_path):
    tensors = quantized.tensors(SCHEMES[scheme])
    path = saved(scheme, tmp_path, {UP + name: np.asarray(tensors[UP + name]).astype(dtype)})
    with raises(NotImplementedError, UP + name, message):
        load_layer(path, 0, CONFIG)


def test_no_quantization_config(tmp_path):
    path = saved("fp8 blocks", tmp_path, config={})
    (path / "config.json").write_text("{}")
    with raises(
        ValueError, "weight_scale_inv in", "is part of a quantized weight, but there is no quantization_config"
    ):
        load_layer(path, 0, CONFIG)
    assert load_layer(path, 0, CONFIG, quantization_config=DEEPSEEK).experts.w13.shape == (E, 2 * I, H)
    assert load_experts(path, 0, CONFIG, quantization_config={"quantization_config": DEEPSEEK}).w2.shape == (E, H, I)
    (path / "config.json").unlink()
    with raises(ValueError, "there is no quantization_config in", "(config.json, hf_quant_config.json)"):
        load_layer(path, 0, CONFIG)
    (path / "config.json").write_text("{")
    with raises(ValueError, "config.json is not JSON", "download it again"):
        load_layer(path, 0, CONFIG)
    with raises(ValueError, "is part of a quantized weight, but nothing in quantization_config="):
        load_layer(path, 0, CONFIG, quantization_config={"model_type": "mixtral"})
    (path / "config.json").write_text("[]")
    with raises(ValueError, "config.json holds a list, not a JSON object"):
        load_layer(path, 0, CONFIG)


def test_a_config_that_contradicts_the_tensors(tmp_path):
    path = saved("fp8 blocks", tmp_path, config=DEEPSEEK | {"modules_to_not_convert": ["experts"]})
    with raises(ValueError, "says that", "experts.0.gate_proj is not quantized: 'experts' in modules_to_not_convert"):
        load_layer(path, 0, CONFIG)
    config = SCHEMES["ct fp8 channel"].config
    groups = {"group_0": config["config_groups"]["group_0"] | {"targets": ["re:.*self_attn.*"]}}
    path = saved("ct fp8 channel", tmp_path, config=config | {"config_groups": groups})
    with raises(ValueError, "is not quantized: no config group targets it"):
        load_layer(path, 0, CONFIG)


def test_a_layer_of_another_format(tmp_path):
    path = saved("fp8 blocks", tmp_path)
    for name in ("fp8_block", "fp8_weight_block"):  # the same weights
        load_layer(path, 0, dataclasses.replace(CONFIG, quantization=name))
    with raises(
        ValueError,
        "experts in",
        "are stored as fp8_block",
        "config has quantization='fp8_channel'",
        "quant_format_from_hf",
    ):
        load_layer(path, 0, dataclasses.replace(CONFIG, quantization="fp8_channel"))


def test_matrices_in_different_formats(tmp_path):
    group = SCHEMES["ct fp8 channel"].config["config_groups"]["group_0"]
    tensor = SCHEMES["ct fp8 tensor static"].config["config_groups"]["group_0"]
    groups = {"a": group, "b": tensor | {"targets": ["re:.*down_proj"]}}
    path = saved("ct fp8 channel", tmp_path, config=SCHEMES["ct fp8 channel"].config | {"config_groups": groups})
    with raises(
        NotImplementedError,
        "different formats",
        "up_proj: fp8_channel",
        "down_proj: fp8_tensor_static",
        "a layer has one",
    ):
        load_layer(path, 0, CONFIG)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "fbgemm_fp8"},
            "quant_method='fbgemm_fp8' is not supported: known are fp8, compressed-tensors",
        ),
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes' is not supported"),
    ],
)
def test_methods_that_cannot_be_read(config, message, tmp_path):
    with raises(NotImplementedError, message, "in bfloat16 or FP8", "quantize_experts"):
        load_layer(saved("fp8 blocks", tmp_path, config=config), 0, CONFIG)


def test_mxfp4_of_gpt_oss(tmp_path):
    """Sizes that are no whole blocks, a block missing, other bytes, and stacks that gpt-oss does not have."""
    config = dataclasses.replace(files.LAYOUTS["gpt_oss"][1], hidden_size=64, intermediate_size=32)
    tensors = files.LAYOUTS["gpt_oss"][0](files.expert_arrays())
    for name in ("gate_up_proj", "down_proj"):
        del tensors[MLP + "experts." + name]
        tensors[MLP + "experts." + name + "_blocks"] = np.zeros((6, 64, 2 if "gate" in name else 1, 16), np.uint8)
        tensors[MLP + "experts." + name + "_scales"] = np.zeros((6, 64, 2 if "gate" in name else 1), np.uint8)
    mxfp4 = {"quant_method": "mxfp4"}
    path = quantized.save(tensors, tmp_path / "sizes", mxfp4)
    with raises(ValueError, "intermediate_size=48 must be a multiple of 32"):
        load_experts(path, 0, dataclasses.replace(config, intermediate_size=48))
    with raises(ValueError, "down_proj_blocks is [6, 64, 1, 16], expected", "intermediate_size/32=2"):
        load_experts(path, 0, dataclasses.replace(config, intermediate_size=64))
    scales = MLP + "experts.down_proj_scales"
    path = quantized.save({name: x for name, x in tensors.items() if name != scales}, tmp_path / "missing", mxfp4)
    with raises(ValueError, "lacks 1 of the 4 tensors", "down_proj_scales"):
        load_experts(path, 0, config)
    path = quantized.save(tensors | {scales: tensors[scales].astype(np.float32)}, tmp_path / "floats", mxfp4)
    with raises(NotImplementedError, "down_proj_scales", "is stored as F32, not as U8"):
        load_experts(path, 0, config)
    path = quantized.save(tensors, tmp_path / "fp8", {"quant_method": "fp8"})
    with raises(ValueError, "tensors that gpt-oss with this config does not use", "down_proj_blocks"):
        load_experts(path, 0, config)


def test_columns_out_of_order(tmp_path):
    order = np.random.default_rng(0).permutation(H).astype(np.int32) // 32
    for scheme, part in (("gptq", "g_idx"), ("gptq int8", "g_idx"), ("ct int4", "weight_g_idx")):
        with raises(ValueError, MLP + "experts.2.up_proj in", f"{part} puts columns into groups out of order"):
            load_layer(saved(scheme, tmp_path, {UP + part: order}), 0, CONFIG)
    in_order = (np.arange(H) // 32).astype(np.int32)
    load_layer(saved("ct int4", tmp_path, {UP + "weight_g_idx": in_order}), 0, CONFIG)


def test_contents_that_contradict_the_config(tmp_path):
    path = saved("gptq zp", tmp_path, config=quantized.GPTQ)
    with raises(ValueError, "experts.0.gate_proj in", "qzeros holds other zero points than 8", "sym=True", "sym=False"):
        load_layer(path, 0, CONFIG)
    path = saved("gptq int8", tmp_path, {UP + "qzeros": np.zeros((6, I // 4), np.int32)})
    with raises(ValueError, "experts.2.up_proj in", "qzeros holds other zero points than 128"):
        load_layer(path, 0, CONFIG)
    with raises(ValueError, "experts.2.up_proj in", "bias is not zero"):
        load_layer(saved("gptq", tmp_path, {UP + "bias": np.ones(I, np.float16)}), 0, CONFIG)
    path = saved("ct int4", tmp_path, {UP + "weight_shape": np.array([I, H - 8], np.int64)})
    with raises(ValueError, "experts.2.up_proj in", "weight_shape holds [160, 184], but the matrix is [160, 192]"):
        load_layer(path, 0, CONFIG)


def test_parts_that_the_format_does_not_have(tmp_path):
    path = saved("fp8 tensor", tmp_path, {UP + "input_scale": np.ones((), np.float32)})
    with raises(ValueError, f"does not use: {UP}input_scale", "quantization_config"):
        load_layer(path, 0, CONFIG)


def test_a_quantized_router(tmp_path):
    path = saved("fp8 blocks", tmp_path, {MLP + "gate.weight_scale_inv": np.ones((1, 2), np.float32)})
    with raises(
        NotImplementedError, MLP + "gate.weight_scale_inv in", "the router", "is quantized", "modules_to_not_convert"
    ):
        load_layer(path, 0, CONFIG)
    load_experts(path, 0, CONFIG)  # reads no router


def test_stacks_that_cannot_be_read(tmp_path):
    tensors = {"gate.weight": np.ones((E, H), np.float32)}
    for name, shape in (("gate_up_proj", (E, 2 * I, H)), ("down_proj", (E, H, I))):
        tensors |= {f"experts.{name}": np.ones(shape, np.int8), f"experts.{name}_scale": np.ones(shape[:2], np.float32)}
    config = quantized.compressed(8, "group", "int", group_size=32) | {"format": "int-quantized"}
    path = quantized.save({MLP + name: x for name, x in tensors.items()}, tmp_path, config)
    with raises(
        NotImplementedError, "is stacked and quantized as int8_group32, packed as values", "one module for each"
    ):
        load_layer(path, 0, CONFIG)


def test_a_truncated_fp8_tensor(tmp_path):
    file = saved("fp8 blocks", tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with raises(ValueError, "is truncated or is not"):
        load_layer(tmp_path, 0, CONFIG)


def test_wrong_sizes_of_quantized_experts(tmp_path):
    path = saved("awq", tmp_path)
    for field in ("hidden_size", "intermediate_size"):
        with raises(ValueError, "have not the shape that config asks for", f"{field}", "MoEConfig.from_hf"):
            load_experts(path, 0, files.has(**{**vars(CONFIG), field: 256}))
    with raises(ValueError, "num_experts=8"):
        load_experts(path, 0, files.has(**{**vars(CONFIG), "num_experts": 8}))


def test_the_config_beside_a_single_file_is_read(tmp_path):
    path = saved("fp8 blocks", tmp_path)
    assert load_experts(path / "model.safetensors", 0, CONFIG).w13.dtype.name == "float8_e4m3fn"
    assert json.loads((path / "config.json").read_text())["quantization_config"] == DEEPSEEK
