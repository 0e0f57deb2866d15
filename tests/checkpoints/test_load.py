"""`load_layer` and `load_experts`: right values in every layout, and only what a rank needs is read."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax.checkpoints import Checkpoint, load_experts, load_layer
from moe_jax.checkpoints.experts import local_experts
from tests.checkpoints import files
from tests.checkpoints.files import BFLOAT16, CONFIG, LAYOUTS, E, H, I

ARRAYS = files.expert_arrays()
EXPERT_MAP = jnp.array([-1, 2, -1, 0, -1, 1], jnp.int32)  # local experts 0, 1, 2 are 3, 5, 1
HERE = [3, 5, 1]


@pytest.fixture(params=LAYOUTS)
def layout(request):
    make, config = LAYOUTS[request.param]
    return make(ARRAYS), config


def expected_layer(config, here, arrays=ARRAYS) -> dict[str, np.ndarray]:
    """What must come out, by path in the pytree."""
    expected = {
        "experts.w13": files.w13(arrays)[here],
        "experts.w2": arrays["down"][here],
        "router": arrays["router"],
    }
    if config.has_bias:
        expected["experts.w13_bias"] = np.concatenate([arrays["gate_bias"], arrays["up_bias"]], axis=1)[here]
        expected["experts.w2_bias"] = arrays["down_bias"][here]
    if config.has_router_bias:
        expected["router_bias"] = arrays["router_bias"]
    if config.has_correction_bias:
        expected["correction_bias"] = arrays["correction_bias"]
    if config.num_shared_experts:
        expected["shared.w13"] = np.concatenate([arrays["shared_gate_proj"], arrays["shared_up_proj"]])
        expected["shared.w2"] = arrays["shared_down_proj"]
    if config.shared_expert_gate:
        expected["shared.gate"] = arrays["shared_gate"]
    return expected


def assert_layer(layer, expected: dict[str, np.ndarray]) -> None:
    """Bit for bit, and nothing more than expected."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(layer)
    }
    assert leaves.keys() == expected.keys()
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(np.asarray(leaf), expected[name], err_msg=name)


def test_whole_layer(layout, tmp_path):
    tensors, config = layout
    layer = load_layer(files.save(tensors, tmp_path), 0, config)
    assert_layer(layer, expected_layer(config, list(range(E))))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(layer))


def test_local_experts_in_the_order_of_the_map(layout, tmp_path):
    tensors, config = layout
    path = files.save_sharded(tensors, tmp_path, 4)
    assert_layer(load_layer(path, 0, config, EXPERT_MAP), expected_layer(config, HERE))
    experts = load_experts(path, 0, config, np.asarray(EXPERT_MAP))
    np.testing.assert_array_equal(experts.w13, files.w13(ARRAYS)[HERE])


def test_a_rank_without_experts(layout, tmp_path):
    tensors, config = layout
    experts = load_experts(files.save(tensors, tmp_path), 0, config, jnp.full(E, -1))
    assert experts.w13.shape == (0, 2 * I, H)
    assert experts.w2.shape == (0, H, I)


def test_only_local_experts_are_read(layout, tmp_path, monkeypatch):
    tensors, config = layout
    path = files.save(tensors, tmp_path)
    reads = []
    read = Checkpoint.read

    def recording(self, name, index=None):
        reads.append((name, index))
        return read(self, name, index)

    monkeypatch.setattr(Checkpoint, "read", recording)
    load_experts(path, 0, config, EXPERT_MAP)
    stacked = any(name.endswith("experts.down_proj") for name in tensors)
    if stacked:
        assert all(index in HERE for _, index in reads)
    else:
        assert {int(name.split("experts.")[1].split(".")[0]) for name, _ in reads} == set(HERE)
    per_expert = 4 if config.has_bias else 2 if stacked else 3
    assert len(reads) == len(set(reads)) == per_expert * len(HERE)


def test_shards_of_other_experts_are_not_even_opened(tmp_path):
    """With one expert per shard a rank loads its experts though every other shard is missing, or is garbage."""
    tensors = {name: tensor for name, tensor in files.qwen3(ARRAYS).items() if "gate.weight" not in name}
    path = files.save_sharded(tensors, tmp_path, E)
    for expert in set(range(E)) - set(HERE):
        (path / f"model-{expert + 1:05d}-of-{E:05d}.safetensors").unlink()
    (path / f"model-00001-of-{E:05d}.safetensors").write_bytes(b"garbage")
    experts = load_experts(path, 0, CONFIG, EXPERT_MAP)
    np.testing.assert_array_equal(experts.w2, ARRAYS["down"][HERE])
    with pytest.raises(FileNotFoundError, match=r"2 of 6 shards are missing: model-00003-of-00006"):
        load_experts(path, 0, CONFIG, jnp.array([-1, 0, 1, 2, -1, 3]))


@pytest.mark.parametrize("name", ["gate_up_proj", "0.gate_proj.weight"])
def test_memory_is_that_of_the_local_experts(name, tmp_path):
    """Peak host memory of a rank with 2 of 16 experts: a few matrices above its result, far below the layer."""
    count, size = 16, 128
    config = files.has(num_experts=count, hidden_size=size, intermediate_size=size)
    stacked = np.zeros((count, 2 * size, size), np.float32)
    tensors = {"experts.gate_up_proj": stacked, "experts.down_proj": stacked[:, :size].copy()}
    if name == "0.gate_proj.weight":
        parts = {"gate": stacked[0, :size], "up": stacked[0, :size], "down": stacked[0, :size]}
        tensors = {f"experts.{e}.{part}_proj.weight": x.copy() for e in range(count) for part, x in parts.items()}
    assert "experts." + name in tensors
    save_file({"model.layers.0.mlp." + key: x for key, x in tensors.items()}, tmp_path / "m")
    expert_map = np.full(count, -1)
    expert_map[:2] = 0, 1
    load_experts(tmp_path / "m", 0, config, expert_map)  # once for what is cached
    tracemalloc.start()
    try:
        experts = load_experts(tmp_path / "m", 0, config, expert_map)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    local = experts.w13.nbytes + experts.w2.nbytes
    assert local / 2 < peak < 2 * local
    assert peak < stacked.nbytes / 2


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "fused"])
def test_bfloat16_is_kept_bit_for_bit(name, tmp_path):
    make, config = LAYOUTS[name]
    arrays = files.expert_arrays(BFLOAT16)
    path = files.save(make(arrays), tmp_path)
    config = dataclasses.replace(config, dtype="bfloat16")
    layer = load_layer(path, 0, config, EXPERT_MAP)
    assert_layer(layer, expected_layer(config, HERE, arrays))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(layer))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_dtypes(stored, wanted, tmp_path):
    """Experts in the wanted dtype, the router as stored, the correction bias in float32."""
    make, config = LAYOUTS["deepseek_v3"]
    arrays = files.expert_arrays(np.dtype(BFLOAT16) if stored == "bfloat16" else np.dtype(stored))
    path = files.save(make(arrays), tmp_path)
    layer = load_layer(path, 0, dataclasses.replace(config, dtype="bfloat16"), dtype=wanted)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((layer.experts, layer.shared))} == {wanted}
    assert (layer.router.dtype.name, layer.correction_bias.dtype.name) == (stored, "float32")
    np.testing.assert_array_equal(np.asarray(layer.experts.w2), arrays["down"].astype(jnp.dtype(wanted)))
    assert load_experts(path, 0, dataclasses.replace(config, dtype=wanted)).w13.dtype.name == wanted


def test_float16_overflow_is_an_error_and_infinity_is_not(tmp_path):
    arrays = files.expert_arrays(BFLOAT16)
    arrays["down"][4, 0, 0] = np.inf
    load_experts(files.save(files.qwen3(arrays), tmp_path), 0, CONFIG, dtype="float16")
    arrays["down"][4, 0, 1] = 1e5
    path = files.save(files.qwen3(arrays), tmp_path)
    with pytest.raises(ValueError, match=r"experts\.4\.down_proj\.weight holds 99840, too large for float16 \(65504\)"):
        load_experts(path, 0, CONFIG, dtype="float16")
    load_experts(path, 0, CONFIG, jnp.array([0, 1, 2, 3, -1, 4]), dtype="float16")  # not this rank's expert


def test_path_forms(tmp_path):
    """A directory, a file in it, the index itself, as string or Path."""
    tensors = files.mixtral(ARRAYS)
    single, sharded = files.save(tensors, tmp_path / "a"), files.save_sharded(tensors, tmp_path / "b", 3)
    index = sharded / "model.safetensors.index.json"
    for path in (single, str(single), single / "model.safetensors", sharded, index):
        np.testing.assert_array_equal(load_experts(path, 0, CONFIG).w2, ARRAYS["down"])


def test_layers_are_told_apart(tmp_path):
    """Layer 1 of 12: neither layer 11 nor a layer 1 of another tower is taken for it."""
    others = [files.expert_arrays() for _ in range(3)]
    for offset, arrays in enumerate(others):
        arrays["down"] = arrays["down"] + offset
    tensors = files.qwen3(others[0], 11) | files.qwen3(others[1], 1) | files.qwen3(others[2], 1, "audio_tower.model.")
    path = files.save(tensors, tmp_path)
    np.testing.assert_array_equal(load_experts(path, 1, CONFIG).w2, others[1]["down"])
    np.testing.assert_array_equal(load_experts(path, 11, CONFIG).w2, others[0]["down"])


@pytest.mark.parametrize("root", ["", "model.", "language_model.model.", "model.language_model.", "thinker.model."])
def test_roots(root, tmp_path):
    path = files.save(files.qwen3(ARRAYS, 2, root), tmp_path)
    np.testing.assert_array_equal(load_layer(path, 2, CONFIG).router, ARRAYS["router"])


def test_local_experts():
    assert local_experts(None, 3) == [0, 1, 2]
    assert local_experts(EXPERT_MAP, E) == HERE
    assert local_experts(np.array([-1, -1]), 2) == []
    with pytest.raises(ValueError, match=r"expert_map has shape \[3\], it must be \[num_experts=4\]"):
        local_experts(np.array([0, 1, 2]), 4)
    with pytest.raises(ValueError, match=r"places 2 experts here, as local ids \[1, 2\]; they must be 0 to 1"):
        local_experts(np.array([1, 2, -1]), 3)
    with pytest.raises(ValueError, match=r"as local ids \[0, 0\]"):
        local_experts(np.array([0, 0, -1]), 3)
    with pytest.raises(ValueError, match=r"as local ids \[-2, 0\]"):
        local_experts(np.array([0, -2, -1]), 3)
    with pytest.raises(TypeError, match="expert_map has dtype float32, it must hold integers"):
        local_experts(np.zeros(3, np.float32), 3)
