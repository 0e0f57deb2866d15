"""Peers of quantized experts, by stand-ins that compute the same in torch: what they are called with, what becomes of it."""

import functools
import importlib.util
import sys
import types

import jax
import pytest

from moe_jax import MoEConfig
from moe_jax.bench import entrant, peers, quantized_layers
from moe_jax.bench.expected import Expected
from moe_jax.bench.inputs import in_format, make_inputs, make_weights
from moe_jax.bench.torch_layers import PeerUnavailable
from tests.bench import stand_ins

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not importlib.util.find_spec("torch"), reason="stand-ins on a CPU, in torch"
)
FUSED = "vllm.model_executor.layers.fused_moe"


def config_of(form, hidden=128, inner=128, dtype="float32"):
    return MoEConfig(4, 2, hidden, inner, dtype=dtype, quantization=form)


def spread(scales, shape):
    """Scales of rows, of groups of 128 or of blocks of 128 x 128 for each element."""
    for axis in range(-2, 0):
        if scales.shape[axis] not in (1, shape[axis]):
            scales = scales.repeat_interleave(128, axis)
    return scales


def decoded(codes, scales):
    return codes.float() * spread(scales, codes.shape)


def quantized(rows, group=None, dtype="float8_e4m3fn"):
    """Codes and scales: one scale a row, or one for each group of columns."""
    import torch

    largest = 448 if dtype == "float8_e4m3fn" else 127
    groups = rows.float().unflatten(1, (-1, group or rows.shape[1]))
    scales = groups.abs().amax(2, keepdim=True) / largest
    codes = (groups / scales).flatten(1)
    codes = codes.to(torch.float8_e4m3fn) if largest == 448 else codes.round().to(torch.int8)
    return codes, scales[:, :, 0]


def experts(rows, weights, topk, seen):
    """The experts on decoded operands; hidden rows are made what `seen` makes of them."""
    import torch

    (w13, w2), (weight, ids) = weights, topk
    out = torch.zeros(rows.shape)
    for token, slot in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])):
        gate, up = (w13[ids[token, slot]] @ rows[token]).chunk(2)
        hidden = seen((torch.nn.functional.silu(gate) * up)[None])
        out[token] += weight[token, slot] * (w2[ids[token, slot]] @ hidden[0])
    return out


class Quant(types.SimpleNamespace):
    """What vLLM's builders of descriptions are called with."""

    def config_name(self, dtype):
        return self.name

    def seen(self, rows):
        """Rows as a matmul of this kind sees them."""
        if self.name == "int8_w8a16":
            return rows
        block = getattr(self, "block_shape", None)
        assert (block is None) == getattr(self, "per_act_token_quant", False)
        return decoded(*quantized(rows, block and block[1], "int8" if self.name is None else "float8_e4m3fn"))

    def weights(self, w13, w2):
        scales = self.w1_scale, self.w2_scale
        scales = [s[..., None] if s.ndim == 2 else s for s in scales]
        return [decoded(w, s) for w, s in zip((w13, w2), scales, strict=True)]


class Experts:
    """Both of vLLM's classes of experts: they get quantized tokens, and memory to work in."""

    def __init__(self, sizes, quant):
        if sizes is not None:
            assert (sizes.num_local_experts, sizes.intermediate_size_per_partition, sizes.hidden_dim) == (4, 128, 128)
        self.quant = quant

    def workspace_shapes(self, tokens, width, hidden, top_k, experts, local, metadata, activation):
        assert (width, hidden, top_k, experts, local, activation) == (256, 128, 2, 4, 4, "silu")
        return (tokens, 2), (tokens, 3), (tokens, hidden)

    def apply(
        self, *, output, hidden_states, w1, w2, topk_weights, topk_ids, a1q_scale, workspace13, workspace2, **rest
    ):
        tokens = output.shape[0]
        assert (tuple(workspace13.shape), tuple(workspace2.shape)) == ((tokens, 2), (tokens, 3))
        assert rest.pop("activation") == "silu" and rest.pop("global_num_experts") == 4
        assert not any(rest.values())
        rows = decoded(hidden_states, a1q_scale)
        output.copy_(experts(rows, self.quant.weights(w1, w2), (topk_weights, topk_ids), self.quant.seen))


@pytest.fixture
def fake_vllm(monkeypatch):
    import torch

    module = functools.partial(stand_ins.module, monkeypatch)

    def fused_topk(x, logits, k, renormalize):
        chosen, ids = torch.topk(logits, k)
        return torch.softmax(chosen, -1), ids, None

    def fused_experts(x, w13, w2, weight, ids, *, quant_config):
        return experts(quant_config.seen(x), quant_config.weights(w13, w2), (weight, ids), quant_config.seen)

    def builder(name):
        return lambda **keywords: Quant(name=name, **keywords)

    def arranged(values, scales, *, quant_block_shape, use_e8m0):
        assert quant_block_shape == (128, 128) and not use_e8m0
        return values, scales

    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        module(name)
    module("vllm.platforms", current_platform=types.SimpleNamespace(is_cuda=lambda: True))
    module("vllm._custom_ops", scaled_fp8_quant=lambda x, scale, use_per_token_if_dynamic: quantized(x))
    module(FUSED, fused_topk=fused_topk, CutlassExpertsFp8=Experts, DeepGemmExperts=Experts)
    sys.modules[FUSED].fused_experts = fused_experts
    module(f"{FUSED}.activation", MoEActivation=types.SimpleNamespace(SILU="silu"))
    module(f"{FUSED}.fused_moe", get_moe_configs=lambda *words: {} if "int8_w8a16" in words else None)
    module(
        f"{FUSED}.config",
        fp8_w8a8_moe_quant_config=builder("fp8_w8a8"),
        int8_w8a8_moe_quant_config=builder(None),
        int8_w8a16_moe_quant_config=builder("int8_w8a16"),
    )
    quantization = "vllm.model_executor.layers.quantization"
    module(quantization)
    module(f"{quantization}.utils")
    module(
        f"{quantization}.utils.fp8_utils",
        deepgemm_post_process_fp8_weight_block=arranged,
        per_token_group_quant_fp8=quantized,
    )
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS", "VLLM_USE_DEEP_GEMM_E8M0"):
        monkeypatch.setenv(name, "0")  # set by the peer, and to be forgotten after the test


def row_of(name, config, spoil=lambda weights: weights):
    weights = in_format(make_weights(config, jax.random.key(0)), config)
    x, logits = make_inputs(config, 5)
    expected = Expected(config, weights, x, logits, make_weights(config, jax.random.key(0)))
    prepared = peers.prepare(name, peers.find_peer(name, config), spoil(weights))
    return entrant.measure_peer(prepared, config, x, logits, expected, 0.01, False)


@pytest.mark.parametrize(
    ("name", "form", "what"),
    [
        ("vllm", "fp8_block", "vLLM fused_experts, Triton, ships no tuning for this shape"),
        ("vllm", "fp8_channel", "vLLM fused_experts, Triton, ships no tuning for this shape"),
        ("vllm", "int8_channel", "vLLM fused_experts, Triton, ships no tuning for this shape"),
        ("vllm", "int8_weight", "vLLM fused_experts, Triton"),
        ("cutlass", "fp8_channel", "vLLM CutlassExpertsFp8"),
        ("deepgemm", "fp8_block", "vLLM DeepGemmExperts"),
    ],
)
def test_vllm_and_what_it_brings_agree(fake_vllm, name, form, what):
    row = row_of(name, config_of(form))
    assert row["implementation"] == what, row
    assert row["error"] < 1e-2
    assert row["layer_us"] > 0


def test_torch_agrees(monkeypatch):
    import torch

    def scaled_grouped_mm(rows, weights, row_scales, weight_scales, *, offs, out_dtype, use_fast_accum):
        assert (rows.dtype, weights.dtype) == (torch.float8_e4m3fn,) * 2
        wide = (rows.float() * row_scales[:, None]).tensor_split(offs[:-1].long())
        weights = weights.float() * weight_scales[:, None, :]
        return torch.cat([part @ of for part, of in zip(wide, weights, strict=True)]).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm, raising=False)
    monkeypatch.setattr(quantized_layers, "takes_scaled_grouped_mm", lambda *arguments: True)
    row = row_of("torch", config_of("fp8_channel", dtype="bfloat16"))
    assert "reason" not in row, row
    assert row["implementation"] == "torch._scaled_grouped_mm, quantized by torch operations"
    assert row["error"] < 0.035 and 0.03 < row["error_unquantized"] < 0.1


def test_another_scale_in_a_peer_is_seen(fake_vllm):
    def spoil(weights):
        w2 = weights.w2
        return type(weights)(weights.w13, type(w2)(w2.values, 1.1 * w2.scales, spec=w2.spec))

    row = row_of("vllm", config_of("fp8_block"), spoil)
    assert "wrong output" in row["reason"] and "0.04" in row["reason"]
    assert "layer_us" not in row


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("vllm", config_of("fp8_tensor"), "takes fp8_block, fp8_channel, int8_channel, int8_weight"),
        ("torch", config_of("fp8_block"), "takes fp8_channel of the quantized weights, not fp8_block"),
        ("cutlass", config_of(None), "give --quantization fp8_channel"),
        ("deepgemm", config_of(None), "give --quantization fp8_block"),
        ("deepgemm", config_of("fp8_block", inner=192), "intermediate_size=192: with scales of blocks"),
        ("vllm", config_of("fp8_block", hidden=64, inner=64), "hidden_size=64 and intermediate_size=64"),
        ("sonicmoe", config_of("fp8_block"), "takes no quantized weights"),
        ("tokamax", config_of("fp8_block"), "takes no quantized weights"),
        ("torch", config_of("fp8_channel"), "give --dtype bfloat16"),
        ("torch", config_of("fp8_channel", dtype="bfloat16"), "has no scaled grouped matmul for cpu"),
    ],
    ids=str,
)
def test_what_a_peer_cannot_do_is_its_reason(fake_vllm, name, config, words):
    found = peers.find_peer(name, config)
    if not isinstance(found, str):
        found = peers.prepare(name, found, in_format(make_weights(config, jax.random.key(0)), config))
    assert words in found


@pytest.mark.parametrize("name", ["vllm", "cutlass", "deepgemm"])
def test_what_is_not_installed_says_how_to_get_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "vllm", None)
    reason = peers.find_peer(name, config_of("fp8_channel" if name == "cutlass" else "fp8_block"))
    assert reason.startswith(f"{name} cannot be imported") and "pip install vllm" in reason


def test_what_is_compiled_at_its_call_runs_on_quantized_zeros(fake_vllm, monkeypatch):
    import torch

    calls, original = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda shape, dtype, device: original(shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("done"))

    def fused_experts(x, w13, w2, weight, ids, *, quant_config):
        assert (w13.dtype, quant_config.w1_scale.dtype) == (torch.float8_e4m3fn, torch.float32)
        assert (tuple(w13.shape), tuple(quant_config.w1_scale.shape)) == ((4, 256, 128), (4, 2, 1))
        calls.append(tuple(x.shape))

    monkeypatch.setattr(sys.modules[FUSED], "fused_experts", fused_experts)
    peers.find_peer("vllm", config_of("fp8_block")).warm([1, 16])
    assert calls == [(1, 128), (16, 128), "done"]
    assert peers.find_peer("deepgemm", config_of("fp8_block")).compiled_at_call


def test_reasons_are_not_failures():
    with pytest.raises(PeerUnavailable):
        quantized_layers.torch_layer("sonicmoe", config_of("int8_weight"))
    assert quantized_layers.torch_layer("sonicmoe", config_of(None)) is peers.TORCH_LAYERS["sonicmoe"]
