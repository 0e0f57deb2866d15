"""How each model family names and lays out the tensors of an MoE block on disk, as data.

A tensor's full name is ``<root>layers.<layer>.<block>.<name>``; the root (``model.``, ``language_model.model.`` ...) is
found in the checkpoint. Where a `Layout` lists several spellings of a name, the one that is there is read.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PerExpert:
    """Three matrices per expert, each K-major: gate and up ``[I, H]``, down ``[H, I]``. ``{}`` is the expert's id."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Stacked:
    """All experts of a layer in two 3-D tensors.

    Attributes:
        gate_up, down: tensor names.
        gate_up_bias, down_bias: ``[E, 2I]`` and ``[E, H]``, or None.
        transposed: the contracted axis comes first: ``[E, H, 2I]`` and ``[E, I, H]`` instead of ``[E, 2I, H]`` and
            ``[E, H, I]``.
        interleaved: gate and up alternate along the 2I axis, instead of gate first and up second.
    """

    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"
    gate_up_bias: str | None = None
    down_bias: str | None = None
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class Layout:
    """One way to store an MoE block.

    Attributes:
        name: how errors call it.
        block: the module that holds the block.
        pattern: a regular expression; a name below the block that matches from its start marks this layout.
        experts: how the routed experts are stored.
        router: spellings of the router weight, ``[E, H]``.
        router_bias: ``[E]``, or None.
        correction_bias: spellings of the correction bias, ``[E]``.
        shared: spellings of the module of the shared expert, with ``gate_proj``, ``up_proj`` and ``down_proj`` in it.
        shared_gate: the shared expert's sigmoid gate, ``[1, H]``, or None.
    """

    name: str
    block: str
    pattern: str
    experts: PerExpert | Stacked
    router: tuple[str, ...] = ("gate.weight",)
    router_bias: str | None = None
    correction_bias: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    shared_gate: str | None = None


# The first layout whose pattern matches is taken: what marks gpt-oss comes before the names that it shares with others.
LAYOUTS = (
    Layout(
        name="Mixtral, Phi-MoE, MiniMax-M2",
        block="block_sparse_moe",
        pattern=r"experts\.\d+\.w[123]\.",
        experts=PerExpert("experts.{}.w1.weight", "experts.{}.w3.weight", "experts.{}.w2.weight"),
        correction_bias=("e_score_correction_bias",),
    ),
    Layout(
        name="Qwen-MoE, DeepSeek, OLMoE, GLM-4-MoE",
        block="mlp",
        pattern=r"experts\.\d+\.(gate|up|down)_proj\.",
        experts=PerExpert("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight", "experts.{}.down_proj.weight"),
        correction_bias=("gate.e_score_correction_bias",),
        shared=("shared_experts", "shared_expert"),
        shared_gate="shared_expert_gate.weight",
    ),
    Layout(
        name="Llama 4",
        block="feed_forward",
        pattern=r"experts\.(gate_up|down)_proj",
        experts=Stacked(transposed=True),
        router=("router.weight",),
        shared=("shared_expert",),
    ),
    Layout(  # as quantization tools save it, which take the stacked tensors apart
        name="Llama 4, one expert a module",
        block="feed_forward",
        pattern=r"experts\.\d+\.(gate|up|down)_proj\.",
        experts=PerExpert("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight", "experts.{}.down_proj.weight"),
        router=("router.weight",),
        shared=("shared_expert",),
    ),
    Layout(
        name="gpt-oss",
        block="mlp",
        pattern=r"(experts\.(gate_up|down)_proj_(bias|blocks|scales)$|router\.bias$)",
        experts=Stacked(
            gate_up_bias="experts.gate_up_proj_bias",
            down_bias="experts.down_proj_bias",
            transposed=True,
            interleaved=True,
        ),
        router=("router.weight",),
        router_bias="router.bias",
    ),
    Layout(  # every family with per-expert tensors, saved by transformers 5 with save_original_format=False
        name="transformers 5 in-memory",
        block="mlp",
        pattern=r"experts\.(gate_up|down)_proj",
        experts=Stacked(),
        router=("gate.weight", "router.weight"),
        correction_bias=("gate.e_score_correction_bias", "e_score_correction_bias"),
        shared=("shared_experts", "shared_expert"),
        shared_gate="shared_expert_gate.weight",
    ),
)

# Suffixes that quantization schemes add beside, or put in place of, a weight: FP8 (weight_scale_inv, weight_scale, input_scale,
# activation_scale), MXFP4 (_blocks, _scales), ModelOpt and compressed-tensors, GPTQ and AWQ, bitsandbytes.
QUANTIZED_SUFFIXES = (
    "_scale",
    "_scale_inv",
    "_scale_2",
    "_blocks",
    "_scales",
    ".scales",
    ".weight_packed",
    "_zero_point",
    ".weight_shape",
    ".weight_g_idx",
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".weight.absmax",
)
