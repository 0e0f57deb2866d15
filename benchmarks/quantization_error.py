"""The error of each number format: of weights and of activations alone, and of a whole small layer.

python benchmarks/quantization_error.py [RESULT.json]

Errors are relative, in the Frobenius norm, against the same thing not quantized, in float32. Data are normal, or heavy-tailed
(Student's t with 4 degrees of freedom), of unit RMS; or of a small layer that was trained on text, with hidden states of text
that it has not seen (`text_layer`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import ExpertWeights, MoEConfig, TopK, reference
from moe_jax.bench.environment import describe
from moe_jax.quantization import FORMATS, QuantFormat, fake_quantize_activations, fp8_blocks, quantize, quantize_experts
from moe_jax.quantization.reference import apply_experts

if TYPE_CHECKING:
    from text_layer import TextLayer

# Enough rows and experts for two significant digits.
CONFIG = MoEConfig(num_experts=4, top_k=2, hidden_size=1024, intermediate_size=512)
WEIGHTS = (512, 4096)
TOKENS = 64
TAILS = ("normal", "heavy")
TEXT = "text"
PARTS = ("weights", "activations", "layer")


def draw(seed: list[int], *shape: int, tail: str = "normal") -> np.ndarray:
    """float32 of unit RMS."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape) if tail == "normal" else random.standard_t(4, shape)
    return (x / np.sqrt(np.mean(x**2))).astype(np.float32)


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def weights_error(fmt: QuantFormat, weights: np.ndarray) -> tuple[float, float]:
    """(relative error of a matrix, bits a weight with scales and zero points)."""
    array = quantize(weights, fmt.weights)
    stands_for = fp8_blocks(array) if fmt.becomes_fp8 else array
    return relative_error(stands_for.dequantize(), weights), 8 * array.nbytes / weights.size


class Layer:
    """A layer, and what it gives in float32."""

    def __init__(self, config: MoEConfig, x: jax.Array, experts: ExpertWeights, topk: TopK):
        self.config, self.x, self.experts, self.topk = config, x, experts, topk
        self.expected = reference.apply_experts(x, experts, topk, config)

    @classmethod
    def random(cls, config: MoEConfig = CONFIG, tokens: int = TOKENS, tail: str = "normal") -> Layer:
        """With unit-RMS input and an output of about unit RMS."""
        hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
        weights = ExpertWeights(
            w13=jnp.asarray(draw([2], experts, 2 * inner, hidden, tail=tail) * hidden**-0.5, config.dtype),
            w2=jnp.asarray(draw([3], experts, hidden, inner, tail=tail) * 2.5 * inner**-0.5, config.dtype),
        )
        ids = np.argsort(np.random.default_rng(4).random((tokens, experts)))[:, : config.top_k]
        shares = np.full(ids.shape, 1 / config.top_k, np.float32)
        x = jnp.asarray(draw([1], tokens, hidden, tail=tail), config.dtype)
        return cls(config, x, weights, TopK(jnp.asarray(ids, jnp.int32), jnp.asarray(shares)))

    def static_scales(self, reach: int) -> tuple[float, float]:
        """What calibration on these very rows would find: the largest magnitude of the input and of the hidden rows."""
        w13 = self.experts.w13.astype(jnp.float32)
        rows = jnp.einsum("th,enh->etn", self.x.astype(jnp.float32), w13, precision="highest")
        hidden = reference.activation(rows, self.config)
        return tuple(float(jnp.max(jnp.abs(rows))) / reach for rows in (self.x.astype(jnp.float32), hidden))

    def activations_error(self, fmt: QuantFormat) -> float | None:
        """Of what enters the layer; None for a format that leaves it alone."""
        spec = fmt.activations
        if spec is None:
            return None
        x = self.x.astype(jnp.float32)
        scale = self.static_scales(spec.reach)[0] if spec.static else None
        return relative_error(fake_quantize_activations(x, spec, scales=scale), x)

    def error(self, fmt: QuantFormat) -> float:
        spec = fmt.activations
        scales = self.static_scales(spec.reach) if spec is not None and spec.static else None
        quantized = quantize_experts(self.experts, fmt)
        out = apply_experts(self.x, quantized, self.topk, self.config, fmt, input_scales=scales)
        return relative_error(out, self.expected)


def measure(
    names: list[str],
    shape: tuple[int, int] = WEIGHTS,
    config: MoEConfig = CONFIG,
    tokens: int = TOKENS,
    tails: tuple[str, ...] = TAILS,
    trained: TextLayer | None = None,
) -> dict:
    layers = {tail: Layer.random(config, tokens, tail) for tail in tails}
    weights = {tail: draw([0], *shape, tail=tail) for tail in tails}
    if trained is not None:
        layers[TEXT] = Layer(trained.config, trained.x, trained.experts, trained.topk)
        weights[TEXT] = np.asarray(trained.experts.w13, np.float32).reshape(-1, trained.config.hidden_size)
    rows = []
    for name in names:
        fmt, row = FORMATS[name], {"format": name}
        for data, layer in layers.items():
            row[f"weights_{data}"], bits = weights_error(fmt, weights[data])
            row.setdefault("bits_per_weight", round(bits, 3))
            row[f"activations_{data}"] = layer.activations_error(fmt)
            row[f"layer_{data}"] = layer.error(fmt)
        rows.append(row)
    sizes = {"weights": list(shape), "hidden": config.hidden_size, "intermediate": config.intermediate_size}
    sizes |= {"num_experts": config.num_experts, "top_k": config.top_k, "tokens": tokens}
    if trained is not None:
        of = trained.config
        sizes["text"] = {"hidden": of.hidden_size, "intermediate": of.intermediate_size, "num_experts": of.num_experts}
        sizes["text"] |= {"top_k": of.top_k, "tokens": len(trained.x), "bits_a_byte": round(trained.bits_a_byte, 3)}
    return describe(None, ()) | {"dtype": config.dtype, **sizes, "rows": rows}


def table(result: dict) -> str:
    """Markdown."""
    measured = [(what, data) for what in PARTS for data in (*TAILS, TEXT) if f"{what}_{data}" in result["rows"][0]]
    heads = ["format", "bits a weight", *(f"{what}, {data}" for what, data in measured)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in result["rows"]:
        found = [row[f"{what}_{data}"] for what, data in measured]
        errors = ["" if error is None else f"{error:.2e}" for error in found]
        lines.append("| " + " | ".join([row["format"], f"{row['bits_per_weight']:.2f}", *errors]) + " |")
    return "\n".join(lines)


def main(out: Path | None) -> None:
    from text_layer import train  # beside this file

    result = measure(list(FORMATS), trained=train())
    print(table(result))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
