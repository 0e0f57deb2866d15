"""The error of each number format on random data of unit RMS: of weights alone, and of a whole small layer.

python benchmarks/quantization_error.py [RESULT.json]

Errors are relative, in the Frobenius norm, against the same thing not quantized, in float32. Data are normal, or heavy-tailed
(Student's t with 4 degrees of freedom), as those of trained models are somewhere between.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import ExpertWeights, MoEConfig, TopK, reference
from moe_jax.bench.environment import describe
from moe_jax.quantization import FORMATS, QuantFormat, quantize, quantize_experts
from moe_jax.quantization.reference import apply_experts

# Enough rows and experts for two significant digits.
CONFIG = MoEConfig(num_experts=4, top_k=2, hidden_size=1024, intermediate_size=512)
WEIGHTS = (512, 4096)
TOKENS = 64
TAILS = ("normal", "heavy")


def draw(seed: list[int], *shape: int, tail: str = "normal") -> np.ndarray:
    """float32 of unit RMS."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape) if tail == "normal" else random.standard_t(4, shape)
    return (x / np.sqrt(np.mean(x**2))).astype(np.float32)


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def weights_error(fmt: QuantFormat, shape: tuple[int, int] = WEIGHTS, tail: str = "normal") -> tuple[float, float]:
    """(relative error of a matrix, bits a weight with scales and zero points)."""
    weights = draw([0], *shape, tail=tail)
    array = quantize(weights, fmt.weights)
    return relative_error(array.dequantize(), weights), 8 * array.nbytes / weights.size


class Layer:
    """A layer with unit-RMS input and an output of about unit RMS, and what it gives in float32."""

    def __init__(self, config: MoEConfig = CONFIG, tokens: int = TOKENS, tail: str = "normal"):
        hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
        self.config, self.x = config, jnp.asarray(draw([1], tokens, hidden, tail=tail), config.dtype)
        self.experts = ExpertWeights(
            w13=jnp.asarray(draw([2], experts, 2 * inner, hidden, tail=tail) * hidden**-0.5, config.dtype),
            w2=jnp.asarray(draw([3], experts, hidden, inner, tail=tail) * 2.5 * inner**-0.5, config.dtype),
        )
        ids = np.argsort(np.random.default_rng(4).random((tokens, experts)))[:, : config.top_k]
        weights = np.full(ids.shape, 1 / config.top_k, np.float32)
        self.topk = TopK(jnp.asarray(ids, jnp.int32), jnp.asarray(weights))
        self.expected = reference.apply_experts(self.x, self.experts, self.topk, config)

    def static_scales(self, largest: int) -> tuple[float, float]:
        """What calibration on these very rows would find: the largest magnitude of the input and of the hidden rows."""
        w13 = self.experts.w13.astype(jnp.float32)
        rows = jnp.einsum("th,enh->etn", self.x.astype(jnp.float32), w13, precision="highest")
        hidden = reference.activation(rows, self.config)
        return tuple(float(jnp.max(jnp.abs(rows))) / largest for rows in (self.x.astype(jnp.float32), hidden))

    def error(self, fmt: QuantFormat) -> float:
        spec = fmt.activations
        scales = self.static_scales(spec.largest) if spec is not None and spec.static else None
        quantized = quantize_experts(self.experts, fmt)
        out = apply_experts(self.x, quantized, self.topk, self.config, fmt, input_scales=scales)
        return relative_error(out, self.expected)


def measure(
    names: list[str],
    shape: tuple[int, int] = WEIGHTS,
    config: MoEConfig = CONFIG,
    tokens: int = TOKENS,
    tails: tuple[str, ...] = TAILS,
) -> dict:
    layers = {tail: Layer(config, tokens, tail) for tail in tails}
    rows = []
    for name in names:
        row = {"format": name, "bits_per_weight": round(weights_error(FORMATS[name], shape)[1], 3)}
        for tail in tails:
            row[f"weights_{tail}"] = weights_error(FORMATS[name], shape, tail)[0]
            row[f"layer_{tail}"] = layers[tail].error(FORMATS[name])
        rows.append(row)
    sizes = {"weights": list(shape), "hidden": config.hidden_size, "intermediate": config.intermediate_size}
    sizes |= {"num_experts": config.num_experts, "top_k": config.top_k, "tokens": tokens}
    return describe(None, ()) | {"dtype": config.dtype, **sizes, "rows": rows}


def table(result: dict) -> str:
    """Markdown."""
    measured = [
        (what, tail) for what in ("weights", "layer") for tail in TAILS if f"{what}_{tail}" in result["rows"][0]
    ]
    heads = ["format", "bits a weight", *(f"{what}, {tail}" for what, tail in measured)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in result["rows"]:
        errors = [f"{row[f'{what}_{tail}']:.2e}" for what, tail in measured]
        lines.append("| " + " | ".join([row["format"], f"{row['bits_per_weight']:.2f}", *errors]) + " |")
    return "\n".join(lines)


def main(out: Path | None) -> None:
    result = measure(list(FORMATS))
    print(table(result))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
