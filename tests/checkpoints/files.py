"""Small checkpoints in every layout, with known contents."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from moe_jax.config import MoEConfig, RoutingConfig

E, H, I = 6, 16, 12  # noqa: E741 - the field's names
SHARED = 20
CONFIG = MoEConfig(num_experts=E, top_k=2, hidden_size=H, intermediate_size=I, dtype="float32")
BIASED = RoutingConfig("deepseek_v3")


def random(shape: tuple[int, ...], seed: int, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def expert_arrays(dtype=np.float32) -> dict[str, np.ndarray]:
    """Gate, up and down of every expert, and the biases."""
    return {
        "gate": random((E, I, H), 1, dtype),
        "up": random((E, I, H), 2, dtype),
        "down": random((E, H, I), 3, dtype),
        "gate_bias": random((E, I), 4, dtype),
        "up_bias": random((E, I), 5, dtype),
        "down_bias": random((E, H), 6, dtype),
        "router": random((E, H), 7, dtype),
        "router_bias": random((E,), 8, dtype),
        "correction_bias": random((E,), 9, dtype),
        "shared_gate_proj": random((SHARED, H), 10, dtype),
        "shared_up_proj": random((SHARED, H), 11, dtype),
        "shared_down_proj": random((H, SHARED), 12, dtype),
        "shared_gate": random((1, H), 13, dtype),
    }


def w13(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays["gate"], arrays["up"]], axis=1)


def per_expert(arrays, prefix: str, gate: str, up: str, down: str) -> dict[str, np.ndarray]:
    return {
        f"{prefix}experts.{expert}.{name}.weight": arrays[part][expert]
        for expert in range(E)
        for part, name in (("gate", gate), ("up", up), ("down", down))
    }


def shared(arrays, module: str) -> dict[str, np.ndarray]:
    return {f"{module}.{part}.weight": arrays[f"shared_{part}"] for part in ("gate_proj", "up_proj", "down_proj")}


def mixtral(arrays, layer: int = 0, root: str = "model.") -> dict[str, np.ndarray]:
    prefix = f"{root}layers.{layer}.block_sparse_moe."
    return per_expert(arrays, prefix, "w1", "w3", "w2") | {prefix + "gate.weight": arrays["router"]}


def qwen3(arrays, layer: int = 0, root: str = "model.") -> dict[str, np.ndarray]:
    prefix = f"{root}layers.{layer}.mlp."
    experts = per_expert(arrays, prefix, "gate_proj", "up_proj", "down_proj")
    return experts | {prefix + "gate.weight": arrays["router"]}


def qwen2(arrays, layer: int = 0) -> dict[str, np.ndarray]:
    prefix = f"model.layers.{layer}.mlp."
    gate = {prefix + "shared_expert_gate.weight": arrays["shared_gate"]}
    return qwen3(arrays, layer) | shared(arrays, prefix + "shared_expert") | gate


def deepseek_v3(arrays, layer: int = 0) -> dict[str, np.ndarray]:
    prefix = f"model.layers.{layer}.mlp."
    bias = {prefix + "gate.e_score_correction_bias": arrays["correction_bias"]}
    return qwen3(arrays, layer) | shared(arrays, prefix + "shared_experts") | bias


def minimax_m2(arrays, layer: int = 0) -> dict[str, np.ndarray]:
    bias = {f"model.layers.{layer}.block_sparse_moe.e_score_correction_bias": arrays["correction_bias"]}
    return mixtral(arrays, layer) | bias


def llama4(arrays, layer: int = 0) -> dict[str, np.ndarray]:
    prefix = f"language_model.model.layers.{layer}.feed_forward."
    return shared(arrays, prefix + "shared_expert") | {
        prefix + "experts.gate_up_proj": np.ascontiguousarray(w13(arrays).swapaxes(1, 2)),
        prefix + "experts.down_proj": np.ascontiguousarray(arrays["down"].swapaxes(1, 2)),
        prefix + "router.weight": arrays["router"],
        "vision_model.model.layers.0.mlp.fc1.weight": arrays["router"],
    }


def gpt_oss(arrays, layer: int = 0) -> dict[str, np.ndarray]:
    prefix = f"model.layers.{layer}.mlp."
    interleaved = np.stack([arrays["gate"], arrays["up"]], axis=2).reshape(E, 2 * I, H)
    biases = np.stack([arrays["gate_bias"], arrays["up_bias"]], axis=2).reshape(E, 2 * I)
    return {
        prefix + "experts.gate_up_proj": np.ascontiguousarray(interleaved.swapaxes(1, 2)),
        prefix + "experts.gate_up_proj_bias": biases,
        prefix + "experts.down_proj": np.ascontiguousarray(arrays["down"].swapaxes(1, 2)),
        prefix + "experts.down_proj_bias": arrays["down_bias"],
        prefix + "router.weight": arrays["router"],
        prefix + "router.bias": arrays["router_bias"],
    }


def fused(arrays, layer: int = 0) -> dict[str, np.ndarray]:
    prefix = f"model.layers.{layer}.mlp."
    return {
        prefix + "experts.gate_up_proj": w13(arrays),
        prefix + "experts.down_proj": arrays["down"],
        prefix + "gate.weight": arrays["router"],
    }


def has(**values) -> MoEConfig:
    """CONFIG with other values."""
    return replace(CONFIG, **values)


SHARED_EXPERT = {"num_shared_experts": 2, "shared_intermediate_size": SHARED}

# name: (tensors, config)
LAYOUTS = {
    "mixtral": (mixtral, CONFIG),
    "qwen2": (qwen2, has(**SHARED_EXPERT, shared_expert_gate=True)),
    "qwen3": (qwen3, CONFIG),
    "deepseek_v3": (deepseek_v3, has(**SHARED_EXPERT, routing=BIASED, has_correction_bias=True)),
    "minimax_m2": (minimax_m2, has(routing=RoutingConfig("minimax2"), has_correction_bias=True)),
    "llama4": (llama4, has(**SHARED_EXPERT)),
    "gpt_oss": (gpt_oss, has(has_bias=True, has_router_bias=True, activation="swigluoai")),
    "fused": (fused, CONFIG),
}


def save(tensors: dict[str, np.ndarray], folder: Path) -> Path:
    """One file, as small models have it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def save_sharded(tensors: dict[str, np.ndarray], folder: Path, shards: int) -> Path:
    """Tensors dealt to shards in runs of neighbours, with an index, as large models have it."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for shard, names in enumerate(np.array_split(np.array(list(tensors)), shards)):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({str(name): tensors[str(name)] for name in names}, folder / file)
        weight_map |= dict.fromkeys(map(str, names), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


BFLOAT16 = ml_dtypes.bfloat16
