"""Finds the MoE block of a layer in a checkpoint, and checks what is there before anything is read."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax.checkpoints.families import LAYOUTS, Layout
from moe_jax.checkpoints.reader import Checkpoint, listed

FLOAT_DTYPES = ("BF16", "F16", "F32")

_LAYER = re.compile(r"(?P<root>(?:.*?\.)?)layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_LANGUAGE_MODELS = ("model.", "", "language_model.model.", "model.language_model.")


class Wanted(NamedTuple):
    """What a tensor must be.

    Attributes:
        axes: its axes in order, each with the name that explains its size.
        dtypes: that it may be stored in, as safetensors spells them.
        ones_count: whether axes of size 1 do; a scale may be stored as ``[]`` or ``[1]``, ``[N]`` or ``[N, 1]``.
    """

    axes: Mapping[str, int]
    dtypes: tuple[str, ...] = FLOAT_DTYPES
    ones_count: bool = True

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of ``shape`` has the axes."""
        sizes = tuple(self.axes.values())
        if self.ones_count:
            return shape == sizes
        return [n for n in shape if n != 1] == [n for n in sizes if n != 1]


class Block(NamedTuple):
    """The MoE block of one layer: where it is, how it is laid out and what it holds.

    Attributes:
        checkpoint: the open checkpoint.
        prefix: what comes before every name of the block, e.g. ``model.layers.3.mlp.``.
        layout: the `Layout` that the names follow.
        names: the names of the block's tensors, without the prefix.
        quantization_config: what was passed instead of what the configs beside the checkpoint say, or None.
    """

    checkpoint: Checkpoint
    prefix: str
    layout: Layout
    names: frozenset[str]
    quantization_config: Mapping[str, Any] | None = None

    def first(self, spellings: Iterable[str]) -> str | None:
        """The first of several names that the block has, or None."""
        return next((name for name in spellings if name in self.names), None)

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """The tensor ``name``, or only its entry ``index`` along the first axis."""
        return self.checkpoint.read(self.prefix + name, index)


def find_block(checkpoint: Checkpoint, layer: int, quantization_config: Mapping[str, Any] | None = None) -> Block:
    """The MoE block of decoder layer ``layer``.

    Args:
        checkpoint: the open checkpoint.
        layer: from 0.
        quantization_config: taken instead of what the configs beside the checkpoint say.

    Raises:
        IndexError: the checkpoint has no such layer.
        ValueError: the layer is dense, or its tensors follow no known layout.

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
    return Block(checkpoint, prefix, layout, names, quantization_config)


def check_tensors(block: Block, expected: Mapping[str, Wanted]) -> None:
    """Checks that the block has the tensors ``expected``, in these shapes and dtypes.

    Raises:
        ValueError: tensors are missing or have other shapes; the message lists them.
        NotImplementedError: a tensor is stored in another dtype.
    """
    missing = [block.prefix + name for name in expected if name not in block.names]
    if missing:
        raise ValueError(
            f"{block.checkpoint.path} lacks {len(missing)} of the {len(expected)} tensors needed: {listed(missing)}; "
            "download the checkpoint again, or check that config is this model's (MoEConfig.from_hf)"
        )
    wrong = []
    for name, wanted in expected.items():
        info = block.checkpoint.info(block.prefix + name)
        if info.dtype not in wanted.dtypes:
            raise _other_dtype(block, name, info.dtype, wanted.dtypes)
        if not wanted.fits(info.shape):
            axes = ", ".join(f"{axis}={size}" for axis, size in wanted.axes.items())
            wrong.append(f"{block.prefix}{name} is {list(info.shape)}, expected [{axes}]")
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
            "it has: has_bias, has_router_bias, has_correction_bias, num_shared_experts, shared_expert_gate, or in its "
            "quantization_config what belongs to its number format"
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


def _other_dtype(block: Block, name: str, dtype: str, wanted: tuple[str, ...]) -> NotImplementedError:
    what = f"{block.prefix}{name} in {block.checkpoint.path} is stored as {dtype}, not as {', '.join(wanted)}"
    if wanted != FLOAT_DTYPES:
        return NotImplementedError(
            f"{what}: its quantization_config and its tensors disagree; download both again, or pass the quantization_config "
            "that was meant"
        )
    return NotImplementedError(
        f"{what}, and no scale is beside it: what it stands for is not known; download the checkpoint again, or use the model's "
        "bfloat16 release"
    )
