"""`fused_experts` with quantized weights, against the same codes and scales in JAX."""

import copy
import warnings

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")

from moe_jax import ExpertWeights, MoEConfig, TopK, apply_experts, quantize_experts  # noqa: E402
from moe_jax.quantization import quant_format  # noqa: E402
from moe_jax_torch import FusedMoE, QuantConfig, fused_experts, to_jax, to_torch  # noqa: E402
from tests.interop.torch_layers import layer_of  # noqa: E402
from tests.util import assert_discriminates, check_close  # noqa: E402

SIZES = {"tokens": 8, "hidden": 64, "intermediate": 32}


def quantized(layer, name):
    """Our weights in JAX, and the same as torch takes them."""
    w13, w2 = to_jax(layer.w1), to_jax(layer.w2)
    static = {}
    if quant_format(name).activations is not None and quant_format(name).activations.static:
        static = {key: jnp.full(6, 0.05) for key in ("w13_input_scale", "w2_input_scale")}
    biases = {
        f"w{ours}_bias": to_jax(layer.kwargs[f"w{theirs}_bias"])
        for ours, theirs in ((13, 1), (2, 2))
        if "w1_bias" in layer.kwargs
    }
    experts = quantize_experts(ExpertWeights(w13, w2, **biases, **static), name)
    parts = (experts.w13, experts.w2)
    arrays = [part.scales for part in parts] + [part.zero_points for part in parts]
    arrays += [experts.w13_input_scale, experts.w2_input_scale, *(part.global_scale for part in parts)]
    config = QuantConfig(name, *(None if array is None else to_torch(array) for array in arrays))
    return experts, layer._replace(w1=to_torch(experts.w13.values), w2=to_torch(experts.w2.values)), config


def run(layer, config, **more):
    return fused_experts(*layer[:5], **layer.kwargs, quant_config=config, **more)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fp8_block", {}),
        ("fp8_channel", {"bias": True}),
        ("int8_weight", {"activation": "relu2_no_mul"}),
        ("int8_channel_static", {}),
        ("int4_group32_zp", {}),
        ("nvfp4", {"bias": True}),
        ("nvfp4_w4a4_static", {"activation": "relu2_no_mul"}),
        ("mxfp4", {}),
        ("mxfp8", {}),
    ],
)
def test_equals_the_layer_in_jax(name, options):
    plain = layer_of(dtype=torch.bfloat16, **SIZES, **options)
    experts, layer, config = quantized(plain, name)
    layer_config = MoEConfig(
        6, 3, 64, 32, layer.kwargs["activation"], has_bias="w1_bias" in layer.kwargs, quantization=name
    )
    topk = TopK(to_jax(layer.ids), to_jax(layer.weights))
    expected = jax.jit(apply_experts, static_argnames=("config", "implementation"))(
        to_jax(layer.x), experts, topk, layer_config, implementation="xla"
    )
    out = run(layer, config)
    check_close(to_torch(expected).float(), out.float(), 4e-3)
    assert_discriminates(lambda out: check_close(out, plain.loop(), 0.3), out.float().numpy())
    gaps = torch.zeros(8, 64, 2, dtype=torch.bfloat16)
    assert torch.equal(run(layer, config, out=gaps[..., 1]), out) and (gaps[..., 0] == 0).all()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_the_same_bytes_under_other_names_and_strides(name):
    """float4_e2m1fn_x2 and uint8 codes, scales as bytes, tensors with gaps between their rows; sizes all differ."""
    _, layer, config = quantized(layer_of(dtype=torch.bfloat16, tokens=5, hidden=96, intermediate=32), name)
    out = run(layer, config)
    assert layer.w1.dtype == torch.uint8 and config.w1_scale.dtype != torch.uint8
    fp4 = layer._replace(w1=layer.w1.view(torch.float4_e2m1fn_x2), w2=layer.w2.view(torch.float4_e2m1fn_x2))
    as_bytes = config._replace(w1_scale=config.w1_scale.view(torch.uint8), w2_scale=config.w2_scale.view(torch.uint8))
    for other in (fp4, layer):
        for scales in (config, as_bytes):
            assert torch.equal(run(other, scales), out)

    def apart(tensor):
        """The same values, every other column and row of a larger tensor."""
        raw = tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint8)
        larger = torch.full([2 * n for n in raw.shape], 7, dtype=raw.dtype)
        view = larger[tuple(slice(None, None, 2) for _ in raw.shape)]
        view.copy_(raw)
        assert not view.is_contiguous()
        return view.view(tensor.dtype)

    gaps = fp4._replace(**{key: apart(getattr(fp4, key)) for key in ("w1", "w2")})
    scattered = config._replace(**{k: apart(v) for k, v in config._asdict().items() if isinstance(v, torch.Tensor)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is copied
        assert torch.equal(run(gaps, scattered), out)
    swapped = layer._replace(w1=(layer.w1 >> 4) | (layer.w1 << 4))
    assert not torch.allclose(run(swapped, config).float(), out.float(), rtol=0.1, atol=0.05)


def test_edges_compiler_and_opcheck():
    _, layer, config = quantized(layer_of(dtype=torch.bfloat16, **SIZES), "fp8_channel")
    out = run(layer, config)
    dropped = layer._replace(ids=layer.ids.clone())
    dropped.ids[1] = -1
    assert (run(dropped, config)[1] == 0).all() and torch.equal(run(dropped, config)[2:], out[2:])
    three = layer._replace(x=layer.x[:3], ids=layer.ids[:3], weights=layer.weights[:3])
    assert torch.equal(run(three, config), out[:3])
    none = layer._replace(x=layer.x[:0], ids=layer.ids[:0], weights=layer.weights[:0])
    assert run(none, config).shape == (0, 64)
    compiled = torch.compile(lambda layer: run(layer, config) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(layer), out + 1)
    _, layer, config = quantized(layer_of(dtype=torch.bfloat16, **SIZES), "int8_weight")  # opcheck cannot compare FP8
    arguments = (*layer[:5], None, None, None, *config[1:], "int8_weight", "silu", False, 6, None, None, None)
    torch.library.opcheck(torch.ops.moe_jax.quantized_experts.default, arguments)


def test_what_is_refused():
    _, layer, config = quantized(layer_of(dtype=torch.bfloat16, **SIZES), "fp8_channel")
    with pytest.raises(RuntimeError, match="quantized as 'fp8_channel' have no gradient"):
        run(layer._replace(x=layer.x.clone().requires_grad_()), config)
    swiglu = layer._replace(kwargs={"activation": "swigluoai"})
    with pytest.raises(ValueError, match="use 'swigluoai_uninterleave'"):
        run(swiglu, config)
    with pytest.raises(ValueError, match="format 'fp7' is not one of"):
        run(layer, config._replace(format="fp7"))
    with pytest.raises(ValueError, match="both be given"):
        run(layer, config, w1_bias=torch.zeros(6, 64))
    with pytest.raises((ValueError, TypeError), match="w13"):
        run(layer, config._replace(w1_scale=torch.ones(6, 3)))


def whole_scale(tensor, half):
    """The gate or the up part of one expert's array of `w13`."""
    if tensor.dim() == 0:
        return tensor
    middle = tensor.shape[0] // 2
    return tensor[:middle] if half == "w1" else tensor[middle:]


def arrays_of(layer, config):
    """What a module holds, by its name there, of all experts and ranks."""
    suffix = "weight_scale_inv" if config.format == "fp8_block" else "weight_scale"
    kinds = {suffix: "scale", "weight_zero_point": "zp", "weight_scale_2": "global_scale"}
    arrays = {"w13_weight": layer.w1, "w2_weight": layer.w2}
    for mine, theirs in (("w13", "w1"), ("w2", "w2")):
        arrays |= {f"{mine}_{kind}": getattr(config, f"{theirs}_{name}") for kind, name in kinds.items()}
    arrays |= {"w13_input_scale": config.a1_scale, "w2_input_scale": config.a2_scale}
    return {name: array for name, array in arrays.items() if array is not None}


def load(module, arrays, here):
    """Every shard of every expert; `here` says of an expert whether the module has it."""
    assert set(module.state_dict()) == set(arrays)
    for key, array in arrays.items():
        for expert in range(6):
            for shard in ("w2",) if key.startswith("w2") else ("w1", "w3"):
                part = array[expert] if shard == "w2" else whole_scale(array[expert], shard)
                if module.quant_config == "nvfp4" and part.element_size() == 1:  # as the bytes that they are
                    part = part.view(torch.float4_e2m1fn_x2 if key.endswith("weight") else torch.uint8)
                part = part[:, None] if key.endswith("weight_scale") and part.dim() == 1 and len(part) > 1 else part
                assert module.weight_loader(getattr(module, key), part, key, shard, expert) == here(expert)


def routed(layer, config):
    """The whole layer's output for some logits, and the logits."""
    logits = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    chosen, ids = logits.topk(3, dim=1)
    return fused_experts(layer.x, layer.w1, layer.w2, chosen.softmax(1), ids, quant_config=config).float(), logits


@pytest.mark.parametrize(
    "name", ["fp8_block", "fp8_channel", "int8_weight", "fp8_weight_tensor", "int8_channel_static", "nvfp4", "mxfp4"]
)
def test_module_loaded_shard_by_shard(name):
    _, layer, config = quantized(layer_of(dtype=torch.bfloat16, **SIZES), name)
    expected, logits = routed(layer, config)
    parts = [FusedMoE(6, 3, 64, 32, quant_config=name, ep_size=2, ep_rank=rank) for rank in range(2)]
    for rank, module in enumerate(parts):
        load(module, arrays_of(layer, config), lambda expert, rank=rank: expert // 3 == rank)
    total = sum(module(layer.x, logits).float() for module in parts)
    assert_discriminates(lambda out: check_close(out, expected, 1e-2), total)
    twin = FusedMoE(6, 3, 64, 32, quant_config=name, ep_size=2)
    twin.load_state_dict(parts[0].state_dict())
    moved = copy.deepcopy(parts[0]).to(torch.float16).half()
    for other in (twin, moved):
        assert torch.equal(other(layer.x, logits), parts[0](layer.x, logits))
    with torch.no_grad():
        assert torch.equal(twin(layer.x, logits), parts[0](layer.x, logits))


@pytest.mark.parametrize(
    ("name", "intermediate", "tolerance"),
    [
        ("fp8_block", 256, 1e-2),
        ("fp8_channel", 64, 3e-2),  # each rank scales its part of a row by itself
        ("fp8_weight_tensor", 64, 1e-2),
        ("int8_channel_static", 64, 1e-2),
        ("int4_group32_zp", 64, 1e-2),
        ("nvfp4", 64, 1e-2),
    ],
)
def test_ranks_share_out_the_intermediate_size(name, intermediate, tolerance):
    sizes = SIZES | {"intermediate": intermediate}
    _, layer, config = quantized(layer_of(dtype=torch.bfloat16, **sizes), name)
    expected, logits = routed(layer, config)
    parts = [FusedMoE(6, 3, 64, intermediate, quant_config=name, tp_size=2, tp_rank=rank) for rank in range(2)]
    for module in parts:
        load(module, arrays_of(layer, config), lambda expert: True)
    first, second = (module(layer.x, logits).float() for module in parts)
    assert_discriminates(lambda out: check_close(out, expected, tolerance), first + second)
    with pytest.raises(ValueError, match=f"here {intermediate}, of which this rank takes {intermediate // 2}"):
        short = layer.w1[0, : intermediate - 2]
        parts[0].weight_loader(parts[0].w13_weight, short, "some.name", "w1", 0)


def test_what_a_quantized_module_refuses():
    module = FusedMoE(6, 3, 64, 32, quant_config="fp8_channel")
    with pytest.raises(ValueError, match=r"some.name is torch.bfloat16 .*here is torch.float8_e4m3fn \(32, 64\)"):
        module.weight_loader(module.w13_weight, torch.ones(32, 64, dtype=torch.bfloat16), "some.name", "w1", 0)
    with pytest.raises(ValueError, match="does not belong"):
        module.weight_loader(module.w2_weight_scale, torch.ones(32), "some.name", "w1", 0)
    with pytest.raises(ValueError, match="does not take alternating rows"):
        FusedMoE(6, 3, 64, 32, quant_config="fp8_channel", activation="swigluoai")
    with pytest.raises(ValueError, match="is 64 on each, but 'fp8_block' has a scale for 128 of it.*ep_size=2"):
        FusedMoE(6, 3, 64, 128, quant_config="fp8_block", tp_size=2)
    with pytest.raises(ValueError, match="format 'fp7' is not one of"):
        FusedMoE(6, 3, 64, 32, quant_config="fp7")
    with pytest.raises(RuntimeError, match="have no gradient"):
        module(torch.ones(2, 64, requires_grad=True), torch.ones(2, 6))
