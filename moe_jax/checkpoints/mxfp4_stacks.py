"""Experts as gpt-oss stores them: all of a layer in blocks of 32 four-bit floats, with a power of two for each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoints.block import Block, Wanted, check_nothing_unknown, check_tensors
from moe_jax.config import MoEConfig
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.checkpoint_fp4 import MXFP4
from moe_jax.types import ExpertWeights

_GROUP = MXFP4.block[1]
_BYTES, _POWERS = ("U8",), ("U8", "F8_E8M0")


def read_mxfp4_stacks(block: Block, config: MoEConfig, here: list[int]) -> ExpertWeights:
    """The experts ``here``, without biases; rows of gate come first, whatever their order in the file.

    ``experts.gate_up_proj_blocks`` is uint8 ``[E, 2I, H / 32, 16]`` and ``_scales`` ``[E, 2I, H / 32]``; ``experts.down_proj_*``
    are ``[E, H, I / 32, ...]``. Here the contracted axis is last, unlike in the same model's bfloat16 files.

    Args:
        block: with its experts stacked.
        config: gives the sizes.
        here: global ids of the local experts, in their order.

    Raises:
        ValueError, NotImplementedError: as `moe_jax.checkpoints.load_layer`; sizes that are no whole blocks.
    """
    names = block.layout.experts
    hidden, size = ("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)
    for name, length in (hidden, size):
        if length % _GROUP:
            raise ValueError(
                f"{name}={length} must be a multiple of {_GROUP}, the columns of a block; make the config from config.json of "
                f"{block.checkpoint.path} (MoEConfig.from_hf)"
            )
    rows = ("2*intermediate_size", 2 * config.intermediate_size)
    count = {"num_experts": config.num_experts}
    matrices = ((names.gate_up, rows, hidden), (names.down, hidden, size))
    needed: dict[str, Wanted] = {}
    for name, n, k in matrices:
        axes = count | dict((n,)) | {f"{k[0]}/{_GROUP}": k[1] // _GROUP}
        needed[f"{name}_blocks"] = Wanted(axes | {"bytes": _GROUP // 2}, _BYTES)
        needed[f"{name}_scales"] = Wanted(axes, _POWERS)
    biases = {names.gate_up_bias, names.down_bias} if config.has_bias else set()
    check_nothing_unknown(block, [name for name in block.names if name.startswith("experts.")], {*needed, *biases})
    check_tensors(block, needed)
    w13, w2 = (_read(block, here, name, n[1], k[1], name == names.gate_up) for name, n, k in matrices)
    return ExpertWeights(w13=w13, w2=w2)


def _read(block: Block, here: list[int], name: str, rows: int, columns: int, gate_and_up: bool) -> QuantizedArray:
    values = np.empty((len(here), rows, columns // 2), np.uint8)
    scales = np.empty((len(here), rows, columns // _GROUP), np.uint8)
    order = np.arange(rows)
    if gate_and_up and block.layout.experts.interleaved:
        order = order.reshape(-1, 2).T.reshape(-1)
    for local, expert in enumerate(here):
        values[local] = block.read(f"{name}_blocks", expert).reshape(rows, -1)[order]
        scales[local] = block.read(f"{name}_scales", expert).view(np.uint8)[order]
    scales = scales.view(jnp.dtype(MXFP4.scale_dtype))
    array = QuantizedArray(values, scales, spec=MXFP4, halves=2 if gate_and_up else 1)
    return jax.tree.map(jnp.asarray, array).validate()
