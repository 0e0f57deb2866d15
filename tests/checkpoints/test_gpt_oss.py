"""A gpt-oss block of transformers whose experts are written as MXFP4 and read back: the same weights, the same layer."""

import dataclasses
import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax import MoEConfig
from moe_jax.checkpoints import load_experts, load_layer, quant_format_from_hf
from moe_jax.moe import moe_block
from moe_jax.quantization import FORMATS, dequantize_experts, to_gpt_oss
from tests.quantization import oracle
from tests.quantization.cases import quantize
from tests.util import assert_discriminates, check_close, relative_error

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

H, I, E, TOKENS = 64, 96, 5, 33  # noqa: E741 - the field's names
MXFP4 = FORMATS["mxfp4"].weights
PREFIX = "model.layers.0.mlp."
SECTION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router", "lm_head"]}


class Saved(NamedTuple):
    block: torch.nn.Module  # in float32
    config: MoEConfig
    path: object
    tensors: dict[str, np.ndarray]
    x: torch.Tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Saved:
    """The block with weights of about unit gain, biases and all, and its experts in blocks of four bits."""
    from transformers.models.gpt_oss import modeling_gpt_oss as module

    hf = transformers.GptOssConfig(
        hidden_size=H,
        intermediate_size=I,
        num_local_experts=E,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=16,
    )
    block = module.GptOssMLP(hf).float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        fan = parameter.shape[-2] if parameter.ndim == 3 else H
        parameter.data = (
            torch.randn(parameter.shape, generator=generator) * (2 if parameter.ndim == 3 else 1) / fan**0.5
        )
    tensors = {}
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(block.experts, name).detach().numpy()  # contracted axis first
        parts = to_gpt_oss(quantize(np.ascontiguousarray(np.swapaxes(weight, 1, 2)), MXFP4))
        tensors |= {f"{PREFIX}experts.{name}_{part}": np.asarray(array) for part, array in parts.items()}
        tensors[f"{PREFIX}experts.{name}_bias"] = getattr(block.experts, f"{name}_bias").detach().numpy()
    tensors |= {f"{PREFIX}router.{part}": getattr(block.router, part).detach().numpy() for part in ("weight", "bias")}
    path = tmp_path_factory.mktemp("gpt-oss")
    save_file(tensors, path / "model.safetensors")
    fields = hf.to_dict() | {"quantization_config": SECTION, "dtype": "float32"}
    (path / "config.json").write_text(json.dumps(fields, default=str))
    config = MoEConfig.from_hf(fields, dtype="float32", quantization=quant_format_from_hf(fields))
    return Saved(block, config, path, tensors, torch.randn(1, TOKENS, H, generator=generator))


def by_transformers(saved: Saved, gate_up=None, down=None) -> np.ndarray:
    """Its own block; with other weights, contracted axis first, if they are given."""
    kept = saved.block.experts.gate_up_proj.data, saved.block.experts.down_proj.data
    if gate_up is not None:
        saved.block.experts.gate_up_proj.data, saved.block.experts.down_proj.data = gate_up, down
    with torch.no_grad():
        out = saved.block(saved.x)
    saved.block.experts.gate_up_proj.data, saved.block.experts.down_proj.data = kept
    return (out[0] if isinstance(out, tuple) else out).reshape(TOKENS, H).numpy()


def stands_for(saved: Saved, name: str) -> torch.Tensor:
    """What the file means, by transformers' own decoder of it; contracted axis first."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    parts = (torch.from_numpy(saved.tensors[f"{PREFIX}experts.{name}_{part}"].copy()) for part in ("blocks", "scales"))
    return convert_moe_packed_tensors(*parts, dtype=torch.float32)


def test_the_config_says_how(saved):
    assert saved.config.quantization is FORMATS["mxfp4"]
    assert (
        saved.config.activation == "swigluoai" and saved.config.swiglu_limit == 7 and saved.config.swiglu_alpha == 1.702
    )
    assert saved.config.has_bias and saved.config.has_router_bias


def test_weights_are_what_transformers_reads(saved):
    """Bit for bit, gate and up rows apart."""
    experts = dequantize_experts(load_experts(saved.path, 0, saved.config), "float32")
    gate_up = np.swapaxes(stands_for(saved, "gate_up_proj").numpy(), 1, 2)
    np.testing.assert_array_equal(experts.w13[:, :I], gate_up[:, 0::2])
    np.testing.assert_array_equal(experts.w13[:, I:], gate_up[:, 1::2])
    np.testing.assert_array_equal(experts.w2, np.swapaxes(stands_for(saved, "down_proj").numpy(), 1, 2))
    bias = saved.tensors[PREFIX + "experts.gate_up_proj_bias"]
    np.testing.assert_array_equal(experts.w13_bias, np.concatenate([bias[:, 0::2], bias[:, 1::2]], axis=1))


def test_only_this_rank_is_read(saved):
    whole = load_experts(saved.path, 0, saved.config)
    mine = load_experts(saved.path, 0, saved.config, np.array([-1, 1, -1, 0, -1], np.int32))
    for local, expert in enumerate((3, 1)):
        np.testing.assert_array_equal(mine.w13.values[local], whole.w13.values[expert])
        np.testing.assert_array_equal(
            oracle.bits(mine.w2.scales[local].view("uint8")), whole.w2.scales[expert].view("uint8")
        )
        np.testing.assert_array_equal(mine.w2_bias[local], whole.w2_bias[expert])
    assert load_experts(saved.path, 0, saved.config, np.full(E, -1)).w13.shape == (0, 2 * I, H)


@functools.partial(jax.jit, static_argnums=2)
def ours(x, layer, config):
    return moe_block(x, layer, config, implementation="xla")


def test_the_layer_is_that_of_transformers(saved):
    """With the weights of the file to the last bits; with those that were quantized as far off as four bits are."""
    layer = load_layer(saved.path, 0, saved.config)
    x = jnp.asarray(saved.x.numpy().reshape(TOKENS, H))
    out = ours(x, layer, saved.config)
    exact = by_transformers(saved, stands_for(saved, "gate_up_proj"), stands_for(saved, "down_proj"))
    check_close(out, exact, 2e-6)
    assert_discriminates(lambda y: check_close(y, exact, 2e-6), out)
    assert 0.03 < relative_error(out, by_transformers(saved)) < 0.25

    halves = layer.experts.w13
    damaged = {
        "interleaved rows": dataclasses.replace(halves, values=jnp.roll(halves.values, 1, axis=1)),
        "scales of other rows": dataclasses.replace(halves, scales=jnp.roll(halves.scales, 1, axis=1)),
        "nibbles": dataclasses.replace(halves, values=halves.values >> 4 | halves.values << 4),
    }
    for name, w13 in damaged.items():
        wrong = dataclasses.replace(layer, experts=dataclasses.replace(layer.experts, w13=w13))
        assert relative_error(ours(x, wrong, saved.config), exact) > 0.1, name
    assert relative_error(ours(x, layer, dataclasses.replace(saved.config, swiglu_limit=0.5)), exact) > 1e-2


def test_in_bfloat16(saved):
    config = dataclasses.replace(saved.config, dtype="bfloat16")
    layer = load_layer(saved.path, 0, config)
    x = jnp.asarray(saved.x.numpy().reshape(TOKENS, H), "bfloat16")
    whole = dataclasses.replace(layer, experts=dequantize_experts(layer.experts, "float32"))
    plain = dataclasses.replace(saved.config, quantization=None)
    check_close(ours(x, layer, config), ours(x.astype("float32"), whole, plain), 6e-3)
