"""Quantization configs of Hugging Face checkpoints -> the number format of a module, and how its tensors are packed."""

import json
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.checkpoints.module_patterns import first_match
from moe_jax.checkpoints.quant_schemes import Quantization, activation_spec, group_spec, named_format, weight_spec
from moe_jax.quantization.formats import FORMATS, QuantFormat, Spec

_IGNORED = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
_WAY_OUT = (
    "use another release of the model, e.g. in bfloat16 or FP8, or dequantize it to bfloat16 first and quantize it with "
    "moe_jax.quantization.quantize_experts"
)


def quant_format_from_hf(config: Mapping[str, Any] | Any, module: str | None = None) -> QuantFormat | None:
    """The number format that a Hugging Face checkpoint's config says its linear layers are stored in.

    Args:
        config: the parsed ``config.json`` or a transformers config object, with or without a ``quantization_config``; a
            ``quantization_config`` itself; or the parsed ``hf_quant_config.json`` of ModelOpt.
        module: the full name of the module asked about, e.g. ``model.layers.3.mlp.experts.0.up_proj``. None asks about a module
            that no list of exceptions names.

    Returns:
        One of `moe_jax.quantization.FORMATS`, or a `QuantFormat` of its own where none of them is the same; None where the
        checkpoint, or the module, is not quantized.

    Raises:
        NotImplementedError: a method, a packing or a number format that cannot be read.
        ValueError: a config that lacks what it must say, or whose modules differ in format, if ``module`` is None.

    An NVFP4 checkpoint that says how activations are scaled is one of four-bit activations, ``nvfp4_w4a4_static``, which are
    emulated (see `moe_jax.quantization.QuantFormat`); its weights run alone with ``quantization="nvfp4"``.

    Source: the ``quantization_config`` of the methods ``fp8``, ``compressed-tensors``, ``modelopt``, ``mxfp4``, ``mxfp8``,
    ``gptq`` and ``awq``.

    Example:
        >>> fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        ...        "modules_to_not_convert": ["lm_head", "model.layers.3.mlp.gate"]}
        >>> quant_format_from_hf({"model_type": "qwen3_moe", "quantization_config": fp8}).name
        'fp8_block'
        >>> quant_format_from_hf(fp8, "model.layers.3.mlp.gate"), quant_format_from_hf({"model_type": "qwen3_moe"})
        (None, None)
    """
    section = quantization_section(config)
    if section is None or (module is not None and unquantized_by(section, module)):
        return None
    found = read_quantization(section, module)
    return None if found is None else found.format


def quantization_section(config: Mapping[str, Any] | Any) -> dict[str, Any] | None:
    """The part of a config that is about quantization, or None; see `quant_format_from_hf` for what a config may be."""
    section = _get(config, "quantization_config") or _get(config, "compression_config")
    if section is None and _get(config, "text_config") is not None:
        return quantization_section(_get(config, "text_config"))
    if section is None and isinstance(_get(config, "quantization"), Mapping):  # hf_quant_config.json
        section = {"quant_method": "modelopt", **_get(config, "quantization")}
    if section is None and (_get(config, "quant_method") or _get(config, "quant_algo")):
        section = config
    if section is None:
        return None
    fields = section if isinstance(section, Mapping) else section.to_dict()
    section = {name: value.value if isinstance(value, Enum) else value for name, value in fields.items()}
    if "quant_method" not in section and "quant_algo" in section:
        section["quant_method"] = "modelopt"
    return section


def read_section(folder: Path) -> dict[str, Any] | None:
    """The `quantization_section` of ``config.json`` or ``hf_quant_config.json`` in ``folder``; None if they have none.

    Raises:
        ValueError: one of them is not a JSON object.
    """
    for file in (folder / "config.json", folder / "hf_quant_config.json"):
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}; download it again") from error
        if not isinstance(config, dict):
            raise ValueError(f"{file} holds a {type(config).__name__}, not a JSON object; download it again")
        section = quantization_section(config)
        if section is not None:
            return section
    return None


def unquantized_by(section: Mapping[str, Any], module: str) -> str | None:
    """What in a quantization config says that ``module`` is not quantized, in words; None if nothing does."""
    for name in _IGNORED:
        pattern = first_match(module, section.get(name) or ())
        if pattern is not None:
            return f"{pattern!r} in {name}"
    for rule in section.get("dynamic") or () if section.get("quant_method") == "gptq" else ():
        if rule.startswith("-:") and first_match(module, ["re:" + rule[2:]]):
            return f"{rule!r} in dynamic"
    return None


def read_quantization(section: Mapping[str, Any], module: str | None) -> Quantization | None:
    """How the modules of a quantization config are stored, or ``module``, which no list of exceptions names.

    Raises:
        NotImplementedError, ValueError: as `quant_format_from_hf`.
    """
    method = str(section.get("quant_method"))
    if method not in _METHODS:
        raise _unsupported(f"quant_method={method!r}", f"known are {', '.join(_METHODS)}")
    return _METHODS[method](_Section(section), module)


class _Section(NamedTuple):
    """A quantization config, with errors that name what is missing or unknown."""

    values: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or `default` where it is absent or None."""
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        value = self.values.get(name)
        if value is None:
            raise ValueError(
                f"the quantization_config of method {self.get('quant_method')!r} has no {name}; add the field, as in the "
                "checkpoint's config.json"
            )
        return value

    def expect(self, name: str, *allowed: Any) -> Any:
        """The field, by default the first of ``allowed``, if it is one of them."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise _unsupported(
                f"{name}={value!r} of quant_method={self.get('quant_method')!r}", f"only {_listed(allowed)} can be read"
            )
        return value


def _fp8(section: _Section, module: str | None) -> Quantization:
    """FP8 as DeepSeek, Qwen and transformers write it: blocks, or one scale a tensor."""
    section.expect("fmt", "e4m3", "float8_e4m3fn")
    scheme = section.expect("activation_scheme", "dynamic", "static")
    section.expect("expert_dtype", "fp8")
    block = section.get("weight_block_size")
    if block is None:
        return Quantization(FORMATS["fp8_tensor" if scheme == "dynamic" else "fp8_tensor_static"])
    if scheme == "static":
        raise _unsupported(
            f"activation_scheme='static' with weight_block_size={block}",
            "scales of activations that go with blocks of weights are taken from the activations",
        )
    ue8m0 = section.expect("scale_fmt", "float", "ue8m0") == "ue8m0"
    scales = "float8_e8m0fnu" if ue8m0 else "float32"
    in_rows = block[0] == 1
    weights = Spec("float8_e4m3fn", "group" if in_rows else "block", tuple(block), scales)
    return Quantization(
        named_format(weights, Spec("float8_e4m3fn", "group", block[1], scales)), scale="weight_scale_inv"
    )


def _mxfp8(section: _Section, module: str | None) -> Quantization:
    """FP8 in groups of 32 columns, scaled by powers of two."""
    section.expect("weight_block_size", [1, 32], (1, 32), None)
    section.expect("activation_scheme", "dynamic")
    return Quantization(FORMATS["mxfp8"], scale="weight_scale_inv")


def _mxfp4(section: _Section, module: str | None) -> Quantization:
    """As gpt-oss has it: experts alone, stacked; activations stay as they are."""
    return Quantization(FORMATS["mxfp4"], packing="mxfp4-blocks")


def _compressed_tensors(section: _Section, module: str | None) -> Quantization | None:
    if section.get("sparsity_config", {}).get("format", "dense") != "dense":
        raise _unsupported(f"sparsity_config={section.get('sparsity_config')}", "sparse weights cannot be read")
    groups = section.need("config_groups")
    found = {_of_group(section, group) for group in _groups_of(groups, module)}
    if len(found) > 1:
        raise ValueError(
            f"the config_groups {', '.join(groups)} differ in format; say which module is asked about: "
            "quant_format_from_hf(config, module=...)"
        )
    return found.pop() if found else None


def _groups_of(groups: Mapping[str, Mapping[str, Any]], module: str | None) -> list[Mapping[str, Any]]:
    """The groups that ``module`` may be in: one that targets its name, otherwise one that targets linear layers."""
    if module is None:
        return list(groups.values())
    by_class = ("Linear",)
    for group in groups.values():
        if first_match(module, [target for target in group.get("targets", by_class) if target not in by_class]):
            return [group]
    return [group for group in groups.values() if set(by_class) & set(group.get("targets", by_class))][:1]


def _of_group(section: _Section, group: Mapping[str, Any]) -> Quantization:
    if group.get("output_activations"):
        raise _unsupported("a config group with output_activations", "outputs of experts are not quantized")
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not weights:
        raise _unsupported("a config group without weights", "formats of activations alone cannot be read")
    try:
        found = named_format(weight_spec(weights), activation_spec(inputs) if inputs else None)
    except (ValueError, NotImplementedError) as error:
        raise _unsupported(f"compressed-tensors weights={weights}, input_activations={inputs}", str(error)) from error
    packing = group.get("format") or section.get("format", "mixed-precision")
    if packing == "mixed-precision":  # each group has its own, but older files do not say which
        packing = "pack-quantized" if found.weights.dtype == "int4" else "naive-quantized"
    if found.weights.dtype == "float4_e2m1fn":
        expected = "nvfp4-pack-quantized" if found.weights.has_global_scale else "mxfp4-pack-quantized"
        if packing not in (expected, "naive-quantized"):
            raise _unsupported(f"compressed-tensors format {packing!r} of {found.name}", f"only {expected} can be read")
        return Quantization(found, packing=expected)
    values = ("float-quantized", "int-quantized", "naive-quantized", "mxfp8-quantized")
    if packing not in ("pack-quantized", *values):
        raise _unsupported(
            f"compressed-tensors format {packing!r}", f"only pack-quantized, {', '.join(values)} can be read"
        )
    if packing in values and found.weights.dtype == "int4":
        raise _unsupported(f"int4 in compressed-tensors format {packing!r}", "int4 is read from pack-quantized alone")
    return Quantization(found, packing="values" if packing in values else "compressed-tensors")


_MODELOPT = {
    "FP8": "fp8_tensor_static",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_channel",
    "FP8_PB_WO": "fp8_weight_block",
    "NVFP4": "nvfp4_w4a4_static",
    "MXFP8": "mxfp8",
}


def _modelopt(section: _Section, module: str | None) -> Quantization:
    nested = section.get("quantization", {})
    algorithm = nested.get("quant_algo") or section.need("quant_algo")
    if algorithm not in _MODELOPT:
        raise _unsupported(f"quant_algo={algorithm!r} of ModelOpt", f"only {', '.join(_MODELOPT)} can be read")
    found = FORMATS[_MODELOPT[algorithm]]
    group = nested.get("group_size") or section.get("group_size") or (found.weights.block or (0, 0))[1]
    if found.weights.granularity == "group" and group != found.weights.block[1]:
        raise _unsupported(
            f"quant_algo={algorithm!r} with group_size={group}", f"its groups are of {found.weights.block[1]}"
        )
    return Quantization(found, packing="modelopt-nvfp4" if found.weights.has_global_scale else "values")


def _gptq(section: _Section, module: str | None) -> Quantization:
    for rule, changes in section.get("dynamic", {}).items():
        pattern = rule.removeprefix("+:")
        if module is not None and not rule.startswith("-:") and first_match(module, ["re:" + pattern]):
            section = _Section({**section.values, **changes})
            break
    name = "checkpoint_format" if "checkpoint_format" in section.values else "format"
    stored = section.expect(name, "gptq", "gptq_v2")
    section.expect("is_marlin_format", False)
    section.need("bits")
    bits = section.expect("bits", 4, 8)
    symmetric = bool(section.get("sym", True))
    if bits == 8 and not symmetric:
        raise _unsupported("GPTQ with bits=8, sym=False", "only int4 has zero points")
    weights = group_spec(f"int{bits}", section.get("group_size", 128), asymmetric=not symmetric)
    return Quantization(named_format(weights, None), packing="gptq", zeros_less_one=stored == "gptq")


def _awq(section: _Section, module: str | None) -> Quantization:
    bits = section.get("bits", section.get("w_bit", 4))
    version = str(section.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm" or not section.get("zero_point", True):
        raise _unsupported(
            f"AWQ with bits={bits}, version={version!r}, zero_point={section.get('zero_point', True)}",
            "only bits=4, version='gemm', zero_point=True can be read",
        )
    weights = group_spec("int4", section.get("group_size", section.get("q_group_size", 128)), asymmetric=True)
    return Quantization(named_format(weights, None), packing="awq")


_METHODS: dict[str, Callable[[_Section, str | None], Quantization | None]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "mxfp4": _mxfp4,
    "mxfp8": _mxfp8,
    "gptq": _gptq,
    "awq": _awq,
}


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(repr, values))


def _unsupported(what: str, why: str) -> NotImplementedError:
    return NotImplementedError(f"{what} is not supported: {why}; {_WAY_OUT}")
