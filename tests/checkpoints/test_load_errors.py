"""What is said about checkpoints that are broken, belong to another model, or are not supported."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax.checkpoints import Checkpoint, load_experts, load_layer
from tests.checkpoints import files
from tests.checkpoints.files import CONFIG, LAYOUTS, E, H, I, has

ARRAYS = files.expert_arrays()
PREFIX = "model.layers.0.mlp."


def raises(error: type[Exception], *parts: str):
    """Expects an error whose message has all parts, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


def test_path_does_not_exist(tmp_path):
    with raises(FileNotFoundError, "checkpoint path", "/missing' does not exist; pass a directory with"):
        load_layer(tmp_path / "missing", 0, CONFIG)


def test_a_repo_id_is_not_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises(FileNotFoundError, "download it first", "huggingface_hub.snapshot_download('Qwen/Qwen3-30B-A3B')"):
        load_layer("Qwen/Qwen3-30B-A3B", 0, CONFIG)


def test_directory_without_safetensors(tmp_path):
    with raises(FileNotFoundError, "has neither model.safetensors nor model.safetensors.index.json (it has: nothing)"):
        load_layer(tmp_path, 0, CONFIG)
    (tmp_path / "pytorch_model.bin").touch()
    with raises(FileNotFoundError, "it has: pytorch_model.bin", "PyTorch pickles", "save_pretrained"):
        load_layer(tmp_path, 0, CONFIG)


@pytest.mark.parametrize("keep", [5, 200, -10])
def test_truncated_file(keep, tmp_path):
    file = files.save(files.qwen3(ARRAYS), tmp_path) / "model.safetensors"
    content = file.read_bytes()[:keep]
    file.write_bytes(content)
    with raises(ValueError, f"model.safetensors ({len(content)} bytes) is truncated or is not", "download it again"):
        load_layer(tmp_path, 0, CONFIG)


def test_truncated_shard(tmp_path):
    path = files.save_sharded(files.qwen3(ARRAYS), tmp_path, 2)
    shard = path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with raises(ValueError, "model-00002-of-00002.safetensors", "is truncated"):
        load_layer(path, 0, CONFIG)


def test_git_lfs_pointer(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with raises(ValueError, "is a Git LFS pointer", "git lfs pull"):
        load_layer(tmp_path, 0, CONFIG)


def test_index_names_a_missing_shard(tmp_path):
    path = files.save_sharded(files.qwen3(ARRAYS), tmp_path, 3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with raises(FileNotFoundError, "shard model-00002-of-00003.safetensors", "1 of 3 shards are missing", "download"):
        load_layer(path, 0, CONFIG)


def test_index_and_shards_disagree(tmp_path):
    path = files.save_sharded(files.qwen3(ARRAYS), tmp_path, 2)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = PREFIX + "experts.0.up_proj.weight"
    content["weight_map"][name] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with raises(
        ValueError, f"the index says that {name} is in model-00002-of-00002.safetensors, which does not hold it"
    ):
        load_layer(path, 0, CONFIG)


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_index_is_not_an_index(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with raises(ValueError, "model.safetensors.index.json is not a safetensors index", "weight_map"):
        load_layer(tmp_path, 0, CONFIG)


def test_unknown_tensor_name(tmp_path):
    with (
        Checkpoint(files.save(files.qwen3(ARRAYS), tmp_path)) as checkpoint,
        raises(ValueError, "tensor nothing is not"),
    ):
        checkpoint.read("nothing")


def test_layer_out_of_range(tmp_path):
    tensors = files.qwen3(ARRAYS, 1) | files.qwen3(ARRAYS, 2) | files.qwen3(ARRAYS, 4)
    tensors["model.layers.0.mlp.gate_proj.weight"] = np.zeros((2, 2), np.float32)
    path = files.save(tensors, tmp_path)
    for layer in (3, 5, -1):
        with raises(IndexError, f"layer={layer} is not in", "layers 0-2, 4; those with an MoE block are 1-2, 4"):
            load_layer(path, layer, CONFIG)
    with pytest.raises(TypeError):
        load_layer(path, 1.0, CONFIG)


def test_dense_layer(tmp_path):
    tensors = files.qwen3(ARRAYS, 1) | {"model.layers.0.mlp.gate_proj.weight": np.zeros((2, 2), np.float32)}
    with raises(ValueError, "layer=0 of", "is dense: it has no experts; the layers with an MoE block are 1"):
        load_layer(files.save(tensors, tmp_path), 0, CONFIG)


def test_no_known_layout(tmp_path):
    tensors = {"h.0.ffn.experts.0.wi": np.zeros((2, 2), np.float32)}
    with raises(ValueError, "has no MoE block in a known layout (Mixtral", "its tensors are h.0.ffn.experts.0.wi"):
        load_layer(files.save(tensors, tmp_path), 0, CONFIG)
    tensors = files.qwen3(ARRAYS, 1) | {"model.layers.0.ffn.experts.0.wi": np.zeros((2, 2), np.float32)}
    with raises(ValueError, "layer=0", "has experts in no known layout", "model.layers.0.ffn.experts.0.wi"):
        load_layer(files.save(tensors, tmp_path), 0, CONFIG)


def test_missing_tensors_are_listed(tmp_path):
    tensors = files.qwen3(ARRAYS)
    lost = [PREFIX + f"experts.{expert}.up_proj.weight" for expert in range(E)] + [
        PREFIX + "experts.2.gate_proj.weight"
    ]
    for name in lost:
        del tensors[name]
    path = files.save(tensors, tmp_path)
    with raises(ValueError, "lacks 7 of the 18 tensors needed", lost[0], lost[1], "and 2 more"):
        load_experts(path, 0, CONFIG)
    with raises(ValueError, f"lacks 2 of the 3 tensors needed: {lost[6]}, {lost[2]};"):
        load_experts(path, 0, CONFIG, np.array([-1, -1, 0, -1, -1, -1]))


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
        ("qwen2", PREFIX + "shared_expert_gate.weight"),
        ("qwen2", PREFIX + "shared_expert.down_proj.weight"),
        ("deepseek_v3", PREFIX + "gate.e_score_correction_bias"),
        ("deepseek_v3", PREFIX + "shared_experts.gate_proj.weight"),
        ("minimax_m2", "model.layers.0.block_sparse_moe.e_score_correction_bias"),
        ("llama4", "language_model.model.layers.0.feed_forward.experts.down_proj"),
        ("gpt_oss", PREFIX + "router.bias"),
        ("gpt_oss", PREFIX + "experts.gate_up_proj_bias"),
        ("fused", PREFIX + "experts.gate_up_proj"),
    ],
)
def test_each_missing_tensor_is_named(layout, name, tmp_path):
    make, config = LAYOUTS[layout]
    tensors = make(ARRAYS)
    del tensors[name]
    module = name.rsplit(".", 2)[0] if "shared_experts" in name else name  # without its gate the module is not found
    with raises(ValueError, "lacks 1 of the", module):
        load_layer(files.save(tensors, tmp_path), 0, config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size"])
def test_wrong_sizes(layout, field, tmp_path):
    make, config = LAYOUTS[layout]
    wrong = has(**{**vars(config), field: 24})
    with raises(ValueError, "have not the shape that config asks for", f"{field}=24", "MoEConfig.from_hf"):
        load_layer(files.save(make(ARRAYS), tmp_path), 0, wrong)


def test_wrong_shapes_are_shown(tmp_path):
    tensors = files.qwen3(ARRAYS)
    name = PREFIX + "experts.3.down_proj.weight"
    tensors[name] = np.zeros((I, H), np.float32)
    path = files.save(tensors, tmp_path)
    with raises(ValueError, "1 of 18 tensors", f"{name} is [12, 16], expected [hidden_size=16, intermediate_size=12]"):
        load_experts(path, 0, CONFIG)


@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_number_of_experts(layout, count, tmp_path):
    make, config = LAYOUTS[layout]
    path = files.save(make(ARRAYS), tmp_path)
    wrong = has(**{**vars(config), "num_experts": count})
    with raises(ValueError, "num_experts=" + str(count)):
        load_experts(path, 0, wrong)
    with raises(ValueError, "num_experts=" + str(count)):
        load_layer(path, 0, wrong)


@pytest.mark.parametrize(
    ("layout", "changes", "found"),
    [
        (
            "qwen2",
            {"num_shared_experts": 0, "shared_intermediate_size": 0, "shared_expert_gate": False},
            "shared_expert.",
        ),
        ("qwen2", {"shared_expert_gate": False}, "shared_expert_gate.weight"),
        ("deepseek_v3", {"has_correction_bias": False}, "gate.e_score_correction_bias"),
        ("gpt_oss", {"has_router_bias": False}, "router.bias"),
        ("gpt_oss", {"has_bias": False}, "experts.down_proj_bias"),
    ],
)
def test_tensors_that_the_config_ignores_are_refused(layout, changes, found, tmp_path):
    make, config = LAYOUTS[layout]
    path = files.save(make(ARRAYS), tmp_path)
    with raises(ValueError, "with this config does not use", PREFIX + found, "has_bias, has_router_bias"):
        load_layer(path, 0, has(**{**vars(config), **changes}))


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("qwen3", {"has_bias": True}, "has_bias=True, but the layout of Qwen-MoE"),
        ("qwen3", {"has_router_bias": True}, "config has has_router_bias=True, but the layout of Qwen-MoE"),
        ("gpt_oss", files.SHARED_EXPERT, "config has num_shared_experts=2, but the layout of gpt-oss"),
        ("llama4", {"shared_expert_gate": True}, "config has shared_expert_gate=True, but the layout of Llama 4"),
        ("qwen3", {"activation": "silu_no_mul"}, "activation='silu_no_mul' has no gate, but Qwen-MoE"),
    ],
)
def test_what_the_layout_cannot_have_is_refused(layout, changes, message, tmp_path):
    make, config = LAYOUTS[layout]
    with raises(ValueError, message):
        load_layer(files.save(make(ARRAYS), tmp_path), 0, has(**{**vars(config), **changes}))


def test_an_unaccounted_tensor_of_an_expert_is_refused(tmp_path):
    tensors = files.mixtral(ARRAYS) | {"model.layers.0.block_sparse_moe.experts.1.w1.bias": np.zeros(I, np.float32)}
    with raises(ValueError, "does not use: model.layers.0.block_sparse_moe.experts.1.w1.bias"):
        load_experts(files.save(tensors, tmp_path), 0, CONFIG)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.uint8, np.int8, np.float64])
def test_dtypes_that_are_no_plain_weights(dtype, tmp_path):
    name = PREFIX + "experts.2.down_proj.weight"
    tensors = files.qwen3(ARRAYS) | {name: np.ones((H, I)).astype(dtype)}
    with raises(NotImplementedError, name, "is stored as", "not as BF16, F16, F32", "no scale is beside it"):
        load_layer(files.save(tensors, tmp_path), 0, CONFIG)


def test_dtype_argument(tmp_path):
    path = files.save(files.qwen3(ARRAYS), tmp_path)
    with raises(ValueError, "dtype=float64 must be one of bfloat16, float16, float32"):
        load_layer(path, 0, CONFIG, dtype="float64")


def test_a_file_that_is_no_safetensors(tmp_path):
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with raises(ValueError, "config.json (2 bytes) is truncated or is not a safetensors file"):
        load_layer(tmp_path / "config.json", 0, CONFIG)
