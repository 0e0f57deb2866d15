"""What the fields of quantization configs mean as `Spec` and `QuantFormat`, and `Quantization`: a format and how it is packed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moe_jax.quantization.formats import FORMATS, QuantFormat, Spec


@dataclass(frozen=True)
class Quantization:
    """How the tensors of a quantized linear layer hold its matrix.

    Attributes:
        format: its number format.
        packing: what the tensors are: ``values`` (codes one by one, in ``weight``), ``compressed-tensors``, ``gptq``, ``awq``; of
            four-bit floats ``modelopt-nvfp4``, ``nvfp4-pack-quantized``, ``mxfp4-pack-quantized`` or gpt-oss' ``mxfp4-blocks``.
        scale: how the scales of ``values`` are called, if a checkpoint has none under any of the names known.
        zeros_less_one: ``gptq``: zero points are stored less one.
    """

    format: QuantFormat
    packing: str = "values"
    scale: str = "weight_scale"
    zeros_less_one: bool = True


def named_format(weights: Spec, activations: Spec | None) -> QuantFormat:
    """The format of `FORMATS` with these specs, or a new one.

    Raises:
        ValueError: weights and activations that cannot be multiplied.

    Example:
        >>> named_format(Spec("int8", "channel"), Spec("int8", "token")).name
        'int8_channel'
        >>> named_format(Spec("int4", "channel"), None).name
        'int4_channel'
    """
    for known in FORMATS.values():
        if (known.weights, known.activations) == (weights, activations):
            return known
    name = _words(weights) if activations is None else f"{_words(weights)}_x_{_words(activations)}"
    return QuantFormat(name, weights, activations)


def _words(spec: Spec) -> str:
    size = "" if spec.block is None else "x".join(map(str, spec.block[spec.granularity == "group" :]))
    dtype = {"float8_e4m3fn": "fp8", "float4_e2m1fn": "fp4"}.get(spec.dtype, spec.dtype)
    ending = (
        ("_ue8m0", spec.scale_dtype == "float8_e8m0fnu"),
        ("_e4m3", spec.scale_dtype == "float8_e4m3fn"),
        ("_static", spec.static),
        ("_zp", spec.asymmetric),
    )
    return f"{dtype}_{spec.granularity}{size}" + "".join(word for word, said in ending if said)


def group_spec(dtype: str, group: int, asymmetric: bool) -> Spec:
    """Groups of so many columns; -1 is one group, a channel."""
    if group == -1:
        return Spec(dtype, "channel", asymmetric=asymmetric)
    return Spec(dtype, "group", group, asymmetric=asymmetric)


def weight_spec(args: Mapping[str, Any]) -> Spec:
    """The `Spec` of the ``weights`` of a config group of compressed-tensors.

    Raises:
        NotImplementedError, ValueError: what cannot be read, and why.

    Example:
        >>> weight_spec({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False})
        Spec(dtype='int4', granularity='group', block=(1, 64), scale_dtype='float32', static=False, asymmetric=True)
    """
    dtype, strategy, group = _dtype(args), _strategy(args), args.get("group_size")
    asymmetric = not args.get("symmetric", True)
    micro = _microscaling(dtype, strategy, args)
    if micro is not None and not args.get("dynamic"):
        return micro
    if args.get("dynamic"):
        raise NotImplementedError("weights with dynamic scales have none in the checkpoint")
    if asymmetric and dtype != "int4":
        raise NotImplementedError(f"symmetric=False: only int4 has zero points, not {dtype}")
    if strategy == "group":
        return group_spec(dtype, group, asymmetric)
    if dtype == "int4" and strategy != "channel":
        raise NotImplementedError(f"int4 weights with strategy={strategy!r}; only group and channel")
    if strategy == "block":
        return Spec(dtype, "block", _block(args.get("block_structure")))
    if strategy not in ("tensor", "channel"):
        raise NotImplementedError(f"weights with strategy={strategy!r}; only tensor, channel, group, block")
    return Spec(dtype, strategy, asymmetric=asymmetric)


def activation_spec(args: Mapping[str, Any]) -> Spec:
    """The `Spec` of the ``input_activations`` of a config group of compressed-tensors.

    Raises:
        NotImplementedError, ValueError: what cannot be read, and why.

    Example:
        >>> activation_spec({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}).static
        True
    """
    dtype, strategy, dynamic = _dtype(args), _strategy(args), args.get("dynamic", False)
    micro = _microscaling(dtype, strategy, args)
    if micro is not None:
        return _microscaled_activations(micro, dynamic)
    if not args.get("symmetric", True):
        raise NotImplementedError("input_activations with symmetric=False: activations have no zero points")
    if not isinstance(dynamic, bool):
        raise NotImplementedError(f"input_activations with dynamic={dynamic!r}")
    if not dynamic and strategy != "tensor":
        raise NotImplementedError(
            f"input_activations with strategy={strategy!r} and dynamic=False; only tensor is static"
        )
    if strategy == "group":
        return Spec(dtype, "group", args.get("group_size"))
    if strategy not in ("tensor", "token"):
        raise NotImplementedError(f"input_activations with strategy={strategy!r}; only tensor, token, group")
    return Spec(dtype, strategy, static=not dynamic)


def _dtype(args: Mapping[str, Any]) -> str:
    kind = args.get("type", "int"), args.get("num_bits", 8)
    names = {("float", 8): "float8_e4m3fn", ("int", 8): "int8", ("int", 4): "int4", ("float", 4): "float4_e2m1fn"}
    if kind not in names:
        raise NotImplementedError(f"type={kind[0]!r} of num_bits={kind[1]}; only float and int of 8 and 4")
    return names[kind]


def _microscaling(dtype: str, strategy: str, args: Mapping[str, Any]) -> Spec | None:
    """NVFP4, MXFP4 and MXFP8, by what scales them: e4m3 beneath a scale of the tensor, or powers of two; None for others."""
    group, stored = args.get("group_size"), str(args.get("scale_dtype")).removeprefix("torch.")
    if dtype == "float4_e2m1fn":
        found = {("tensor_group", 16): "nvfp4", ("group", 32): "mxfp4"}.get((strategy, group))
        if found is None:
            raise NotImplementedError(
                f"float of 4 bits with strategy={strategy!r}, group_size={group}; only tensor_group of 16 (NVFP4) and group of "
                "32 (MXFP4)"
            )
        return FORMATS[found].weights
    if dtype == "float8_e4m3fn" and strategy == "group" and stored in ("uint8", "float8_e8m0fnu"):
        return Spec(dtype, "group", group, "float8_e8m0fnu")
    return None


def _microscaled_activations(spec: Spec, dynamic: Any) -> Spec:
    """Scales of groups are taken from the activations; ``local``: a global one is given."""
    if spec.has_global_scale and dynamic == "local":
        return replace(spec, static=True)
    if dynamic is not True:
        raise NotImplementedError(
            f"input_activations of {spec.dtype} in groups of {spec.block[1]} with dynamic={dynamic!r}"
        )
    return spec


def _strategy(args: Mapping[str, Any]) -> str:
    """``strategy``; where it is not said the group size tells."""
    if args.get("strategy") is not None:
        return str(args["strategy"])
    group = args.get("group_size")
    return "tensor" if group is None else "channel" if group == -1 else "group"


def _block(structure: Any) -> tuple[int, ...]:
    """``[128, 128]``, or ``"128x128"`` as older files have it."""
    return tuple(map(int, structure.split("x"))) if isinstance(structure, str) else tuple(structure or ())
