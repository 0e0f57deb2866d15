"""What is measured: layer shapes of released models by name, or any shape as ``E,k,H,I``."""

from __future__ import annotations

import dataclasses

from moe_jax.config import MoEConfig
from moe_jax.quantization import FORMATS


@dataclasses.dataclass(frozen=True)
class Case:
    """The shape of a layer: gated SiLU experts, softmax over the k chosen logits.

    Attributes:
        name: of the model, or made of the sizes.
        num_experts: E.
        top_k: k.
        hidden_size: H.
        intermediate_size: I, of one expert.
    """

    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int

    def config(self, dtype: str, quantization: str | None = None) -> MoEConfig:
        """The layer of this shape in a compute dtype, its experts in a number format."""
        sizes = self.num_experts, self.top_k, self.hidden_size, self.intermediate_size
        return MoEConfig(*sizes, dtype=dtype, quantization=quantization)


CASES = {
    case.name: case
    for case in (
        Case("mixtral-8x7b", 8, 2, 4096, 14336),
        Case("qwen3-30b-a3b", 128, 8, 2048, 768),
        Case("qwen3-235b", 128, 8, 4096, 1536),
        # One of 8 expert-parallel ranks of DeepSeek-V3: one local expert a token on average.
        Case("dsv3-ep8", 32, 1, 7168, 2048),
        Case("gpt-oss-120b", 128, 4, 2880, 2880),
        Case("odd-sizes", 16, 4, 1040, 528),  # multiples of 16 only
    )
}
GPU_TOKENS = (0, 1, 16, 128, 1024, 4096, 16384)

# Without a GPU: something that ends within seconds.
CPU_CASES = (Case("small", 8, 2, 256, 128),)
CPU_TOKENS = (1, 16, 128)


def parse_case(text: str) -> Case:
    """The case of a name, or of four sizes ``E,k,H,I``.

    Raises:
        ValueError: no such name; not four whole numbers; sizes that make no layer.

    Example:
        >>> parse_case("qwen3-30b-a3b").top_k
        8
        >>> parse_case("8,2,256,128").name
        'E8-k2-H256-I128'
    """
    known = CASES | {case.name: case for case in CPU_CASES}
    if text in known:
        return known[text]
    if "," not in text:
        raise ValueError(f"--case {text}: no such case; give E,k,H,I, or one of {', '.join(known)}")
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--case {text}: E,k,H,I are four whole numbers, such as 8,2,256,128") from None
    if len(sizes) != 4:
        raise ValueError(f"--case {text}: {len(sizes)} numbers; E,k,H,I are four, such as 8,2,256,128")
    experts, top_k, hidden, intermediate = sizes
    case = Case(f"E{experts}-k{top_k}-H{hidden}-I{intermediate}", experts, top_k, hidden, intermediate)
    try:
        case.config("bfloat16")
    except ValueError as error:
        raise ValueError(f"--case {text}: {error}") from error
    return case


def parse_format(text: str | None) -> str | None:
    """The name of a number format of experts; None for experts that are not quantized.

    Raises:
        ValueError: no such format.

    Example:
        >>> parse_format("fp8_block")
        'fp8_block'
    """
    if text is not None and text not in FORMATS:
        raise ValueError(f"--quantization {text}: no such number format; give one of {', '.join(FORMATS)}, or none")
    return text


def parse_tokens(text: str) -> tuple[int, ...]:
    """Numbers of tokens, ascending, each once.

    Raises:
        ValueError: something that is not a whole number from 0.

    Example:
        >>> parse_tokens("16,1,16")
        (1, 16)
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise ValueError(f"--tokens {text}: {wrong[0]!r} is not a whole number from 0; give them as 1,16,128")
    return tuple(sorted({int(part) for part in parts}))
