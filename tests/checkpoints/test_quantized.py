"""Quantized checkpoints: codes and scales come out bit for bit, in every scheme, and only what a rank needs is read."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.checkpoints import Checkpoint, load_experts, load_layer, quant_format_from_hf
from moe_jax.quantization import QuantizedArray, Spec, dequantize, merge_half_scales, quant_format
from moe_jax.quantization.prepared import PreparedArray
from moe_jax.quantization.prepared_layout import unprepared
from moe_jax.types import ExpertWeights
from tests.checkpoints import files
from tests.checkpoints import quantized_files as quantized
from tests.checkpoints.quantized_files import CONFIG, DOWN, GATE, MIXTRAL, MLP, ROUTER, SCHEMES, UP, E, H, I
from tests.quantization.cases import quantize
from tests.util import check_close

EXPERT_MAP = np.array([-1, 1, -1, 0], np.int32)  # local experts 0, 1 are 3, 1
HERE = [3, 1]
BFLOAT16 = dataclasses.replace(CONFIG, dtype="bfloat16")


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return SCHEMES[request.param]


def assert_same(actual, wanted) -> None:
    """The same kind of array, bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_experts(experts: ExpertWeights, scheme, here) -> None:
    w13, w2 = quantized.expected(scheme.weights)
    if (
        scheme.config.get("format") == "nvfp4-pack-quantized"
    ):  # stored as reciprocals of float32, rounded there and back
        w13, w2 = (
            dataclasses.replace(w, global_scale=np.float32(1) / (np.float32(1) / w.global_scale)) for w in (w13, w2)
        )
    assert_same(experts.w13, w13[np.array(here)])
    assert_same(experts.w2, w2[np.array(here)])
    assert experts.w13_bias is None and experts.w2_bias is None
    if not scheme.is_static:
        assert experts.w13_input_scale is None and experts.w2_input_scale is None
        return
    scale = {part: [quantized.input_scale(f"experts.{e}.{part}_proj") for e in here] for part in ("gate", "up", "down")}
    # compressed-tensors stores reciprocals of NVFP4's.
    rtol = 2e-7 if scheme.config.get("format") == "nvfp4-pack-quantized" else 0
    np.testing.assert_allclose(experts.w13_input_scale, np.maximum(scale["gate"], scale["up"]), rtol=rtol)
    np.testing.assert_allclose(experts.w2_input_scale, scale["down"], rtol=rtol)
    assert experts.w13_input_scale.dtype == experts.w2_input_scale.dtype == jnp.float32


def test_every_scheme(scheme, tmp_path):
    path = quantized.save(quantized.tensors(scheme), tmp_path, scheme.config, shards=3)
    layer = load_layer(path, 0, CONFIG)
    assert_experts(layer.experts, scheme, range(E))
    np.testing.assert_array_equal(layer.router, ROUTER)
    assert_experts(load_experts(path, 0, CONFIG, EXPERT_MAP), scheme, HERE)
    found = quant_format_from_hf(scheme.config, MLP + "experts.0.up_proj")
    assert found.name == scheme.format and found.weights == layer.experts.w13.spec
    assert quant_format_from_hf(scheme.config) == found


def test_four_bits_are_prepared_where_that_is_asked_for(scheme, tmp_path):
    path = quantized.save(quantized.tensors(scheme), tmp_path, scheme.config)
    natural, prepared = load_experts(path, 0, BFLOAT16), load_layer(path, 0, BFLOAT16, prepare=True).experts
    if unprepared(natural.w13.spec, BFLOAT16.dtype) is not None:
        assert_same(prepared, natural)
        return
    for name in ("w13", "w2"):
        of_kernel, mine = getattr(prepared, name), getattr(natural, name)
        assert isinstance(of_kernel, PreparedArray) and of_kernel.shape == mine.shape
        check_close(of_kernel.dequantize(), mine.dequantize(), 2.5e-3)  # scales of int4 are rounded
    assert_same(load_experts(path, 0, BFLOAT16, prepare=True), prepared)
    assert_same(load_experts(path, 0, dataclasses.replace(CONFIG, dtype="float32"), prepare=True), natural)


def test_some_schemes_can_be_prepared():
    found = {scheme.format for scheme in SCHEMES.values() if not unprepared(scheme.weights, BFLOAT16.dtype)}
    assert found >= {"nvfp4", "mxfp4"}


def test_only_local_experts_are_read(scheme, tmp_path, monkeypatch):
    path = quantized.save(quantized.tensors(scheme), tmp_path, scheme.config)
    reads = []
    read = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, name, index=None: (reads.append(name), read(self, name, index))[1]
    )
    load_experts(path, 0, CONFIG, EXPERT_MAP)
    assert {int(name.split("experts.")[1].split(".")[0]) for name in reads} == set(HERE)
    assert len(reads) == len(set(reads))


def test_shards_of_other_experts_are_not_opened(tmp_path):
    scheme = SCHEMES["fp8 blocks"]
    tensors = {name: x for name, x in quantized.tensors(scheme).items() if "gate.weight" not in name}
    path = quantized.save(tensors, tmp_path, scheme.config, shards=E)
    for expert in set(range(E)) - set(HERE):
        (path / f"model-{expert + 1:05d}-of-{E:05d}.safetensors").unlink()
    assert_experts(load_experts(path, 0, CONFIG, EXPERT_MAP), scheme, HERE)


def test_a_rank_without_experts(tmp_path):
    for name in ("fp8 tensor static", "ct int4 zp"):
        scheme = SCHEMES[name]
        path = quantized.save(quantized.tensors(scheme), tmp_path / name, scheme.config)
        experts = load_experts(path, 0, CONFIG, np.full(E, -1))
        assert experts.w13.shape == (0, 2 * I, H) and experts.w2.shape == (0, H, I)
        assert [leaf.shape[0] for leaf in jax.tree.leaves(experts)] == [0] * len(jax.tree.leaves(experts))


def test_names_of_mixtral_and_llama4(tmp_path):
    scheme = SCHEMES["gptq"]
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    path = quantized.save(quantized.tensors(scheme, MIXTRAL, names), tmp_path / "mixtral", scheme.config)
    assert_experts(load_layer(path, 0, CONFIG).experts, scheme, range(E))
    scheme, prefix = SCHEMES["ct fp8 channel"], "language_model.model.layers.0.feed_forward."
    tensors = quantized.tensors(scheme, prefix)
    tensors[prefix + "router.weight"] = tensors.pop(prefix + "gate.weight")
    path = quantized.save(tensors, tmp_path / "llama4", scheme.config)
    assert_experts(load_layer(path, 0, CONFIG).experts, scheme, range(E))


def test_scales_in_other_dtypes_and_shapes(tmp_path):
    """A scale of bfloat16 becomes float32; a scalar may be [1], a scale of a channel [N]."""
    scheme = SCHEMES["ct fp8 tensor static"]
    tensors = {n: x.reshape(1) if x.ndim == 0 else x for n, x in quantized.tensors(scheme).items()}
    assert_experts(
        load_layer(quantized.save(tensors, tmp_path / "a", scheme.config), 0, CONFIG).experts, scheme, range(E)
    )
    scheme = SCHEMES["ct int8"]
    tensors = {
        name: x.reshape(-1).astype(ml_dtypes.bfloat16) if name.endswith("_scale") else x
        for name, x in quantized.tensors(scheme).items()
    }
    scales = load_layer(quantized.save(tensors, tmp_path / "b", scheme.config), 0, CONFIG).experts.w2.scales
    wanted = quantized.expected(scheme.weights)[1].scales.astype(ml_dtypes.bfloat16)
    assert scales.dtype == jnp.float32
    np.testing.assert_array_equal(scales, wanted.astype(np.float32))


def test_powers_of_two_stored_as_float32(tmp_path):
    """DeepSeek-V3.1 says ``scale_fmt: ue8m0`` and stores float32: the same powers of two in one byte each."""
    scheme = SCHEMES["fp8 ue8m0 blocks"]
    tensors = {n: x.astype(np.float32) if n.endswith("_inv") else x for n, x in quantized.tensors(scheme).items()}
    path = quantized.save(tensors, tmp_path, scheme.config)
    assert_experts(load_layer(path, 0, CONFIG).experts, scheme, range(E))
    name = MLP + "experts.2.up_proj.weight_scale_inv"
    tensors[name] = tensors[name] * 1.5
    path = quantized.save(tensors, tmp_path, scheme.config)
    with pytest.raises(ValueError, match=r"experts\.2\.up_proj in .*4 of 4 scales are no powers of two.*scale_fmt"):
        load_layer(path, 0, CONFIG)


def test_halves_keep_their_scales_and_can_be_merged(tmp_path):
    scheme = SCHEMES["fp8 tensor"]
    w13 = load_experts(quantized.save(quantized.tensors(scheme), tmp_path, scheme.config), 0, CONFIG).w13
    assert w13.halves == 2 and w13.scales.shape == (E, 2)
    assert (w13.scales[:, 1] > 1.5 * w13.scales[:, 0]).all()
    merged = merge_half_scales(w13)
    np.testing.assert_array_equal(merged.scales, w13.scales.max(axis=1))


def test_zero_points_in_the_padding_of_a_word_do_not_count(tmp_path):
    """Rows that are no multiple of eight: GPTQ's words of zero points are filled up."""
    config = dataclasses.replace(CONFIG, hidden_size=36, intermediate_size=64)
    tensors = {MLP + "gate.weight": files.random((E, 36), 1)}
    down = quantize(files.random((36, 64), 2), Spec("int4", "group", 32))
    up = quantize(files.random((64, 36), 3), Spec("int4", "group", 32))
    for expert in range(E):
        for part, matrix in (("gate", up), ("up", up), ("down", down)):
            parts = quantized.to_gptq(matrix)
            tensors |= {f"{MLP}experts.{expert}.{part}_proj.{key}": np.asarray(x) for key, x in parts.items()}
    experts = load_layer(quantized.save(tensors, tmp_path, quantized.GPTQ), 0, config).experts
    assert_same(experts.w2[2], jax.tree.map(np.asarray, down))


SHARED = {"num_shared_experts": 1, "shared_intermediate_size": 64}


def shared_tensors(scheme, spec) -> dict[str, np.ndarray]:
    found = {}
    for part, shape, seed in (("gate", (64, H), 5), ("up", (64, H), 6), ("down", (H, 64), 7)):
        matrix = quantize(files.random(shape, seed), spec)
        parts = scheme.tensors(jax.tree.map(np.asarray, matrix))
        if scheme.is_static:
            parts["input_scale"] = np.ones((), np.float32)
        found |= {f"{MLP}shared_experts.{part}_proj.{key}": np.asarray(x) for key, x in parts.items()}
    return found


@pytest.mark.parametrize("name", ["fp8 blocks", "modelopt", "gptq"])
def test_a_quantized_shared_expert_is_dequantized(name, tmp_path):
    scheme = SCHEMES[name]
    config = dataclasses.replace(CONFIG, **SHARED, dtype="bfloat16")
    path = quantized.save(quantized.tensors(scheme) | shared_tensors(scheme, scheme.weights), tmp_path, scheme.config)
    layer = load_layer(path, 0, config)
    assert_experts(layer.experts, scheme, range(E))
    gate, up, down = (
        dequantize(quantize(files.random(shape, seed), scheme.weights), "bfloat16")
        for shape, seed in (((64, H), 5), ((64, H), 6), ((H, 64), 7))
    )
    assert_same(layer.shared.w13, jnp.concatenate([gate, up]))
    assert_same(layer.shared.w2, down)


def test_modules_that_the_config_leaves_out_are_plain(tmp_path):
    """A shared expert of a list of exceptions, and a whole layer of it."""
    scheme, config = SCHEMES["fp8 blocks"], dataclasses.replace(CONFIG, **SHARED)
    shared = {
        f"{MLP}shared_experts.{part}_proj.weight": files.random(shape, 5)
        for part, shape in (("gate", (64, H)), ("up", (64, H)), ("down", (H, 64)))
    }
    listed = scheme.config | {"modules_to_not_convert": ["lm_head", MLP + "gate", MLP + "shared_experts"]}
    layer = load_layer(quantized.save(quantized.tensors(scheme) | shared, tmp_path / "a", listed), 0, config)
    np.testing.assert_array_equal(layer.shared.w2, files.random((H, 64), 5))
    assert_experts(layer.experts, scheme, range(E))

    plain = {
        f"{MLP}experts.{e}.{part}_proj.weight": x[e]
        for e in range(E)
        for part, x in (("gate", GATE), ("up", UP), ("down", DOWN))
    }
    listed = scheme.config | {"modules_to_not_convert": [MLP.removesuffix(".")]}
    experts = load_experts(quantized.save(plain, tmp_path / "b", listed), 0, CONFIG)
    np.testing.assert_array_equal(experts.w2, DOWN)


def stacked(scheme, transposed: bool, scale: str, input_scale: str | None) -> dict[str, np.ndarray]:
    """The same experts in 3-D tensors."""
    found = {}
    for name, array in zip(("gate_up_proj", "down_proj"), quantized.expected(scheme.weights), strict=True):
        scales = array.scales[:, :, None] if scheme.weights.granularity == "channel" else array.scales
        parts = {name: array.values, name + scale: scales}
        if transposed:
            parts = {key: np.ascontiguousarray(np.swapaxes(x, 1, 2)) if x.ndim == 3 else x for key, x in parts.items()}
        if input_scale is not None:
            parts[name + input_scale] = np.array(len(name), np.float32)
        found |= {"experts." + key: x for key, x in parts.items()}
    return found


@pytest.mark.parametrize("name", ["fp8 tensor", "modelopt", "ct fp8 channel", "ct int8"])
@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts(name, transposed, tmp_path):
    scheme = SCHEMES[name]
    prefix, router = ("model.layers.0.feed_forward.", "router.weight") if transposed else (MLP, "gate.weight")
    ending = "_weight_scale" if name == "modelopt" else "_scale"
    experts = stacked(scheme, transposed, ending, "_input_scale" if scheme.is_static else None)
    tensors = {prefix + router: ROUTER} | {prefix + key: x for key, x in experts.items()}
    path = quantized.save(tensors, tmp_path, scheme.config)
    layer = load_layer(path, 0, CONFIG, EXPERT_MAP)
    w13, w2 = (array[np.array(HERE)] for array in quantized.expected(scheme.weights))
    assert_same((layer.experts.w13, layer.experts.w2), (w13, w2))
    if scheme.is_static:
        assert layer.experts.w13_input_scale.tolist() == [12, 12] and layer.experts.w2_input_scale.tolist() == [9, 9]


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_blocks(transposed, tmp_path):
    """Whole blocks in each half, as stacking the scales of gate and up gives them."""
    config = dataclasses.replace(CONFIG, intermediate_size=128)
    w13 = jax.tree.map(np.asarray, quantize(files.random((E, 256, H), 1), quant_format("fp8_block").weights, halves=2))
    w2 = jax.tree.map(np.asarray, quantize(files.random((E, H, 128), 2), quant_format("fp8_block").weights))
    prefix, router = ("model.layers.0.feed_forward.", "router.weight") if transposed else (MLP, "gate.weight")
    tensors = {prefix + router: ROUTER}
    for name, array in (("gate_up_proj", w13), ("down_proj", w2)):
        for ending, leaf in (("", array.values), ("_scale_inv", array.scales)):
            tensors[f"{prefix}experts.{name}{ending}"] = (
                np.ascontiguousarray(leaf.swapaxes(1, 2)) if transposed else leaf
            )
    path = quantized.save(tensors, tmp_path, quantized.DEEPSEEK)
    experts = load_layer(path, 0, config).experts
    assert_same((experts.w13, experts.w2), (w13, w2))
    name = prefix + "experts.gate_up_proj"
    with pytest.raises(NotImplementedError, match=name + r" in .*gate and up rows share blocks.*=160 rows each"):
        load_layer(path, 0, CONFIG)


def test_one_scale_for_gate_and_up_stacked(tmp_path):
    spec = quant_format("fp8_tensor").weights
    w13 = jax.tree.map(np.asarray, quantize(np.concatenate([GATE, UP], axis=1), spec))
    w2 = quantized.expected(spec)[1]
    tensors = {
        "gate.weight": ROUTER,
        "experts.gate_up_proj": w13.values,
        "experts.gate_up_proj_scale_inv": w13.scales.reshape(E, 1, 1),
        "experts.down_proj": w2.values,
        "experts.down_proj_scale_inv": w2.scales.reshape(E, 1, 1),
    }
    path = quantized.save({MLP + name: x for name, x in tensors.items()}, tmp_path, quantized.FP8)
    assert_same(load_experts(path, 0, CONFIG, EXPERT_MAP).w13, w13[np.array(HERE)])


def test_interleaved_rows_with_biases(tmp_path):
    """gpt-oss: gate and up alternate, in values, scales and biases."""
    scheme = SCHEMES["ct fp8 channel"]
    config = dataclasses.replace(CONFIG, has_bias=True, has_router_bias=True, activation="swigluoai")
    tensors = stacked(scheme, True, "_scale", None)
    order = np.arange(2 * I).reshape(2, I).T.reshape(-1)
    for name in ("experts.gate_up_proj", "experts.gate_up_proj_scale"):
        tensors[name] = np.ascontiguousarray(tensors[name][..., order])
    bias = files.random((E, 2 * I), 8)
    tensors |= {"experts.gate_up_proj_bias": bias[:, order], "experts.down_proj_bias": files.random((E, H), 9)}
    tensors |= {"router.weight": ROUTER, "router.bias": np.zeros(E, np.float32)}
    path = quantized.save({MLP + name: np.ascontiguousarray(x) for name, x in tensors.items()}, tmp_path, scheme.config)
    experts = load_layer(path, 0, config).experts
    assert_same((experts.w13, experts.w2), quantized.expected(scheme.weights))
    np.testing.assert_array_equal(experts.w13_bias, bias)
    np.testing.assert_array_equal(experts.w2_bias, files.random((E, H), 9))


def test_what_is_loaded_is_a_pytree_of_experts(tmp_path):
    scheme = SCHEMES["modelopt"]
    experts = load_experts(quantized.save(quantized.tensors(scheme), tmp_path, scheme.config), 0, CONFIG)
    assert all(isinstance(leaf, jax.Array) and leaf.shape[0] == E for leaf in jax.tree.leaves(experts))
    mine = jax.tree.map(lambda leaf: leaf[jnp.array(HERE)], experts)
    assert isinstance(mine.w13, QuantizedArray) and mine.num_local_experts == 2
    assert_experts(mine, scheme, HERE)
