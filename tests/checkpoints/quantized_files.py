"""Small quantized checkpoints of every scheme, with known contents, and what must come out of them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import MoEConfig
from moe_jax.quantization import (
    QuantizedArray,
    Spec,
    quant_format,
    to_awq,
    to_compressed_tensors,
    to_compressed_tensors_nvfp4,
    to_gptq,
    to_modelopt_nvfp4,
)
from tests.checkpoints import files
from tests.quantization.cases import quantize

E, H, I = 4, 192, 160  # noqa: E741 - the field's names; blocks of 128 are cut short, groups of 32 are not
CONFIG = MoEConfig(num_experts=E, top_k=2, hidden_size=H, intermediate_size=I, dtype="float32")
MLP, MIXTRAL = "model.layers.0.mlp.", "model.layers.0.block_sparse_moe."
GATE, UP, DOWN = files.random((E, I, H), 1), 3 * files.random((E, I, H), 2), files.random((E, H, I), 3)
ROUTER = files.random((E, H), 4)

Tensors = dict[str, np.ndarray]


def values(matrix: QuantizedArray, scale: str = "weight_scale") -> Tensors:
    return {"weight": matrix.values, scale: matrix.scales}


def blocks(matrix: QuantizedArray) -> Tensors:
    return values(matrix, "weight_scale_inv")


def channels(matrix: QuantizedArray) -> Tensors:
    return {"weight": matrix.values, "weight_scale": matrix.scales[:, None]}


def words(codes: np.ndarray) -> np.ndarray:
    """int8 codes, 128 added, four an int32 along the last axis."""
    return (np.asarray(codes).astype(np.int32) + 128).astype(np.uint8).view("<i4")


def packed_int8(matrix: QuantizedArray) -> Tensors:
    return {
        "weight_packed": words(matrix.values),
        "weight_scale": matrix.scales.reshape(len(matrix.values), -1),
        "weight_shape": np.array(matrix.shape, np.int64),
    }


def gptq_int8(matrix: QuantizedArray) -> Tensors:
    rows, columns = matrix.shape
    group = matrix.spec.block[1]
    return {
        "qweight": np.ascontiguousarray(words(np.ascontiguousarray(np.asarray(matrix.values))).T),
        "qzeros": np.full((columns // group, rows // 4), 0x7F7F7F7F, np.int32),
        "scales": np.asarray(matrix.scales).T,
        "g_idx": (np.arange(columns) // group).astype(np.int32),
        "bias": np.zeros(rows, np.float16),
    }


def compressed(bits: int, strategy: str, kind: str = "float", *, inputs: dict | None = None, **weights) -> dict:
    """A quantization_config of compressed-tensors with one group."""
    packing = "pack-quantized" if inputs is None and kind == "int" else f"{kind}-quantized"
    args = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False} | weights
    if inputs is not None:
        inputs = {"num_bits": bits, "type": kind, "symmetric": True} | inputs
    group = {"targets": ["Linear"], "weights": args, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


def powers_as_bytes(matrix: QuantizedArray, scale: str = "weight_scale", weight: str = "weight") -> Tensors:
    """Scales that are powers of two as uint8 exponents, as most checkpoints have them."""
    return {weight: matrix.values, scale: np.asarray(matrix.scales).view(np.uint8)}


class Scheme(NamedTuple):
    """A quantization_config, the format that it stands for, and the tensors of one matrix in it."""

    config: dict
    format: str
    tensors: Callable[[QuantizedArray], Tensors]
    spec: Spec | None = None  # where the format is none of FORMATS

    @property
    def weights(self) -> Spec:
        return self.spec or quant_format(self.format).weights

    @property
    def is_static(self) -> bool:
        return self.format.endswith("_static")


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
DEEPSEEK = FP8 | {"weight_block_size": [128, 128]}
STATIC, TOKEN = {"strategy": "tensor", "dynamic": False}, {"strategy": "token", "dynamic": True}
GROUPS = {"strategy": "group", "group_size": 128, "dynamic": True}
MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["*.mlp.gate"]}}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


NVFP4 = {
    "quant_algo": "NVFP4",
    "group_size": 16,
    "kv_cache_quant_algo": "FP8",
    "exclude_modules": ["lm_head", "*.mlp.gate"],
}
LOCAL_DYNAMIC = {"strategy": "tensor_group", "group_size": 16, "dynamic": "local"}


def fp4(strategy: str, group_size: int, inputs: dict | None = None) -> dict:
    """A quantization_config of compressed-tensors with four-bit floats."""
    config = compressed(4, strategy, group_size=group_size, inputs=inputs)
    return config | {"format": f"{'nvfp4' if strategy == 'tensor_group' else 'mxfp4'}-pack-quantized"}


def gptq(matrix: QuantizedArray) -> Tensors:
    return to_gptq(matrix)


def gptq_v2(matrix: QuantizedArray) -> Tensors:
    return to_gptq(matrix, zeros_less_one=False)


def packed_int4(matrix: QuantizedArray) -> Tensors:
    return to_compressed_tensors(matrix)


def packed_int4_channels(matrix: QuantizedArray) -> Tensors:
    spec = Spec("int4", "group", matrix.shape[-1])
    return to_compressed_tensors(dataclasses.replace(matrix, scales=matrix.scales[:, None], spec=spec))


SCHEMES = {
    "fp8 blocks": Scheme(DEEPSEEK, "fp8_block", blocks),
    "fp8 ue8m0 blocks": Scheme(DEEPSEEK | {"scale_fmt": "ue8m0"}, "fp8_block_ue8m0", blocks),
    "fp8 tensor": Scheme(FP8, "fp8_tensor", values),
    "fp8 tensor static": Scheme(FP8 | {"activation_scheme": "static"}, "fp8_tensor_static", values),
    "modelopt": Scheme(MODELOPT, "fp8_tensor_static", values),
    "ct fp8 tensor static": Scheme(compressed(8, "tensor", inputs=STATIC), "fp8_tensor_static", values),
    "ct fp8 channel": Scheme(compressed(8, "channel", inputs=TOKEN), "fp8_channel", channels),
    "ct fp8 blocks": Scheme(compressed(8, "block", block_structure=[128, 128], inputs=GROUPS), "fp8_block", values),
    "ct int8": Scheme(compressed(8, "channel", "int", inputs=TOKEN), "int8_channel", channels),
    "ct int8 static": Scheme(compressed(8, "channel", "int", inputs=STATIC), "int8_channel_static", channels),
    "ct int8 weights": Scheme(compressed(8, "channel", "int"), "int8_weight", packed_int8),
    "ct int4": Scheme(compressed(4, "group", "int", group_size=32), "int4_group32", packed_int4),
    "ct int4 zp": Scheme(compressed(4, "group", "int", group_size=32, symmetric=False), "int4_group32_zp", packed_int4),
    "ct int4 channel": Scheme(
        compressed(4, "channel", "int"), "int4_channel", packed_int4_channels, Spec("int4", "channel")
    ),
    "gptq": Scheme(GPTQ, "int4_group32", gptq),
    "gptq zp": Scheme(GPTQ | {"sym": False}, "int4_group32_zp", gptq),
    "gptq v2": Scheme(GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, "int4_group32_zp", gptq_v2),
    "gptq int8": Scheme(GPTQ | {"bits": 8}, "int8_group32", gptq_int8, Spec("int8", "group", 32)),
    "modelopt nvfp4": Scheme({"quantization": NVFP4}, "nvfp4_w4a4_static", to_modelopt_nvfp4),
    "ct nvfp4": Scheme(fp4("tensor_group", 16, LOCAL_DYNAMIC), "nvfp4_w4a4_static", to_compressed_tensors_nvfp4),
    "ct nvfp4 weights": Scheme(fp4("tensor_group", 16), "nvfp4", to_compressed_tensors_nvfp4),
    "ct mxfp4 weights": Scheme(fp4("group", 32), "mxfp4", lambda m: powers_as_bytes(m, weight="weight_packed")),
    "mxfp8": Scheme(
        {"quant_method": "mxfp8", "weight_block_size": [1, 32]},
        "mxfp8",
        lambda m: powers_as_bytes(m, "weight_scale_inv"),
    ),
    "modelopt mxfp8": Scheme({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "mxfp8", powers_as_bytes),
    "awq": Scheme(AWQ | {"modules_to_not_convert": ["gate"]}, "int4_group32_zp", to_awq),
}


def expected(spec: Spec) -> tuple[QuantizedArray, QuantizedArray]:
    """``w13`` and ``w2`` of all experts, as `moe_jax.quantization.quantize` makes them; NumPy leaves."""
    if spec not in _EXPECTED:
        gate_up = np.concatenate([GATE, UP], axis=1)
        _EXPECTED[spec] = jax.tree.map(np.asarray, (quantize(gate_up, spec, halves=2), quantize(DOWN, spec)))
    return _EXPECTED[spec]


_EXPECTED: dict[Spec, tuple[QuantizedArray, QuantizedArray]] = {}


def halves_of(w13: QuantizedArray) -> list[QuantizedArray]:
    """Gate and up of one expert's ``w13``."""

    def part(index: int) -> QuantizedArray:
        leaves = {
            name: None if leaf is None else (leaf[index] if leaf.shape == (2,) else np.split(leaf, 2)[index])
            for name in ("values", "scales", "zero_points", "global_scale")
            for leaf in (getattr(w13, name),)
        }
        return dataclasses.replace(w13, halves=1, **leaves)

    return [part(0), part(1)]


def matrices(scheme: Scheme) -> dict[str, QuantizedArray]:
    """Each matrix of each expert, by its module."""
    w13, w2 = expected(scheme.weights)
    found = {}
    for expert in range(E):
        gate, up = halves_of(w13[expert])
        found |= {f"experts.{expert}.{part}_proj": m for part, m in (("gate", gate), ("up", up), ("down", w2[expert]))}
    return jax.tree.map(jnp.asarray, found)


def input_scale(module: str) -> np.ndarray:
    """Different for each matrix."""
    return np.float32(1 + sum(map(ord, module)) / 1000)


def tensors(scheme: Scheme, prefix: str = MLP, rename: dict[str, str] | None = None) -> Tensors:
    """The experts and the router of layer 0."""
    found = {prefix + "gate.weight": ROUTER}
    for module, matrix in matrices(scheme).items():
        parts = dict(scheme.tensors(matrix))
        if scheme.is_static:
            scale = input_scale(module)
            parts |= {"input_global_scale": 1 / scale} if "weight_packed" in parts else {"input_scale": scale}
        for old, new in (rename or {}).items():
            module = module.replace(old, new)
        found |= {
            f"{prefix}{module}.{part}": np.ascontiguousarray(array).reshape(np.shape(array))
            for part, array in parts.items()
        }
    return found


def save(tensors: Tensors, folder: Path, config: dict | None, shards: int = 0) -> Path:
    """The tensors with a config beside them: ``hf_quant_config.json`` if it looks like one."""
    path = files.save_sharded(tensors, folder, shards) if shards else files.save(tensors, folder)
    if config is not None and "quantization" in config:
        (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
        (path / "hf_quant_config.json").write_text(json.dumps(config))
    elif config is not None:
        (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "quantization_config": config}))
    return path
