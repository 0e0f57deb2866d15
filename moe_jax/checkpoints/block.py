"""Finds the MoE block of a layer in a checkpoint, and checks what is there before anything is read."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from moe_jax.checkpoints.families import LAYOUTS, QUANTIZED_SUFFIXES, Layout
from moe_jax.checkpoints.reader import Checkpoint, listed

Shapes = Mapping[str, Mapping[str, int]]  # tensor name -> its axes in order, each with the name that explains its size

FLOAT_DTYPES = ("BF16", "F16", "F32")

_LAYER = re.compile(r"(?P<root>(?:.*?\.)?)layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_LANGUAGE_MODELS = ("model.", "", "language_model.model.", "model.language_model.")


class Block(NamedTuple):
    """The MoE block of one layer: where it is, how it is laid out and what it holds.

    Attributes:
        checkpoint: the open checkpoint.
        prefix: what comes before every name of the block, e.g. ``model.layers.3.mlp.``.
        layout: the `Layout` that the names follow.
        names: the names of the block's tensors, without the prefix.
    """

    checkpoint: Checkpoint
    prefix: str
    layout: Layout
    names: frozenset[str]

    def first(self, spellings: Iterable[str]) -> str | None:
        """The first of several names that the block has, or None."""
        return next((name for name in spellings if name in self.names), None)

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """The tensor ``name``, or only its entry ``index`` along the first axis."""
        return self.checkpoint.read(self.prefix + name, index)


def find_block(checkpoint: Checkpoint, layer: int) -> Block:
    """The MoE block of decoder layer ``layer``.

    Raises:
        IndexError: the checkpoint has no such layer.
        ValueError: the layer is dense, or its tensors follow no known layout.
        NotImplementedError: the block is quantized.

    Example:
        >>> import tempfile, numpy as np
        >>> from safetensors.numpy import save_file
        >>> file = tempfile.mkdtemp() + "/model.safetensors"
        >>> save_file({"model.layers.0.mlp.experts.0.up_proj.weight": np.zeros((2, 2), np.float32)}, file)
        >>> find_block(Checkpoint(file), 0).prefix
        'model.layers.0.mlp.'
    """
    marker = f"layers.{layer}."
    found = {
        (match["root"], layout)
        for match in (_LAYER.fullmatch(name) for name in checkpoint.names if marker in name)
        if match and int(match["layer"]) == layer and (layout := _layout_of(match["rest"]))
    }
    if not found:
        raise _no_block(checkpoint, layer)
    root, layout = min(found, key=_preference)
    prefix = f"{root}layers.{layer}.{layout.block}."
    names = frozenset(name.removeprefix(prefix) for name in checkpoint.names if name.startswith(prefix))
    block = Block(checkpoint, prefix, layout, names)
    quantized = sorted(name for name in names if name.endswith(QUANTIZED_SUFFIXES))
    if quantized:
        raise _quantized(block, quantized[0])
    return block


def check_tensors(block: Block, expected: Shapes) -> None:
    """Checks that the block has the tensors ``expected``, in these shapes and in a plain floating-point dtype.

    Raises:
        ValueError: tensors are missing or have other shapes; the message lists them.
        NotImplementedError: a tensor is stored in a quantized dtype.
    """
    missing = [block.prefix + name for name in expected if name not in block.names]
    if missing:
        raise ValueError(
            f"{block.checkpoint.path} lacks {len(missing)} of the {len(expected)} tensors needed: {listed(missing)}; "
            "download the checkpoint again, or check that config is this model's (MoEConfig.from_hf)"
        )
    wrong = []
    for name, axes in expected.items():
        info = block.checkpoint.info(block.prefix + name)
        if info.dtype not in FLOAT_DTYPES:
            raise _quantized(block, name, f" is stored as {info.dtype}, not as {', '.join(FLOAT_DTYPES)}")
        if info.shape != tuple(axes.values()):
            wanted = ", ".join(f"{axis}={size}" for axis, size in axes.items())
            wrong.append(f"{block.prefix}{name} is {list(info.shape)}, expected [{wanted}]")
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(expected)} tensors in {block.checkpoint.path} have not the shape that config asks "
            f"for: {listed(wrong)}; make the config from this checkpoint's config.json (MoEConfig.from_hf)"
        )


def check_nothing_unknown(block: Block, names: Iterable[str], known: Collection[str]) -> None:
    """Checks that each of ``names``, tensors that the block has, is ``known``: nothing of the model is left out.

    Raises:
        ValueError: there are tensors that the layout, or the config, does not account for.
    """
    unknown = sorted(block.prefix + name for name in names if name not in known)
    if unknown:
        raise ValueError(
            f"{block.checkpoint.path} has tensors that {block.layout.name} with this config does not use: "
            f"{listed(unknown)}; make the config from this checkpoint's config.json (MoEConfig.from_hf), or set what "
            "it has: has_bias, has_router_bias, has_correction_bias, num_shared_experts, shared_expert_gate"
        )


def _layout_of(rest: str) -> Layout | None:
    """The layout that the name of a tensor, from below its layer, marks."""
    for layout in LAYOUTS:
        if rest.startswith(layout.block + ".") and re.match(layout.pattern, rest[len(layout.block) + 1 :]):
            return layout
    return None


def _preference(found: tuple[str, Layout]) -> tuple[int, str, int]:
    """Language models come before other towers, and the more specific layout of a block before the more general one."""
    root, layout = found
    rank = _LANGUAGE_MODELS.index(root) if root in _LANGUAGE_MODELS else len(_LANGUAGE_MODELS)
    return rank, root, LAYOUTS.index(layout)


def _no_block(checkpoint: Checkpoint, layer: int) -> Exception:
    """Why ``layer`` has no MoE block: out of range, dense, or unlike anything that is known."""
    layers, sparse = set(), set()
    for name in checkpoint.names:
        match = _LAYER.fullmatch(name)
        if match:
            layers.add(int(match["layer"]))
            if _layout_of(match["rest"]):
                sparse.add(int(match["layer"]))
    known = "; ".join(layout.name for layout in LAYOUTS)
    if not sparse:
        return ValueError(
            f"{checkpoint.path} has no MoE block in a known layout ({known}); its tensors are "
            f"{listed(checkpoint.names) or 'none'}"
        )
    if layer not in layers:
        return IndexError(
            f"layer={layer} is not in {checkpoint.path}, which has layers {_ranges(layers)}; "
            f"those with an MoE block are {_ranges(sparse)}"
        )
    inside = f"layers.{layer}."
    strange = [name for name in checkpoint.names if inside in name and ".experts." in name]
    if strange:
        return ValueError(
            f"layer={layer} of {checkpoint.path} has experts in no known layout ({known}); its tensors are "
            f"{listed(strange)}"
        )
    return ValueError(
        f"layer={layer} of {checkpoint.path} is dense: it has no experts; the layers with an MoE block are "
        f"{_ranges(sparse)}"
    )


def _ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers with runs shortened: ``0, 2-5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _quantized(block: Block, name: str, what: str = "") -> NotImplementedError:
    return NotImplementedError(
        f"{block.prefix}{name} in {block.checkpoint.path}{what}: quantized checkpoints are not supported yet; use the "
        "model's bfloat16 release, or dequantize it to bfloat16 first"
    )
