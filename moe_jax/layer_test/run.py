"""One config of the layer suite: the layer over a mesh, the reference, and how far apart they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh
from jaxtyping import Array

from moe_jax.layer_test.baseline import baseline
from moe_jax.layer_test.compare import broken_outputs, worst_error, worst_token_error
from moe_jax.layer_test.config import MoETestConfig
from moe_jax.layer_test.data import MoETestData, setup_moe_test_data
from moe_jax.layer_test.quick import quick_jit
from moe_jax.layer_test.support import exchange_of, is_valid_config
from moe_jax.moe import shared_expert
from moe_jax.parallel import moe_sharded, place_experts, place_shared

# Largest relative error of the tokens of a shard that is rounding. Partial sums of ranks are rounded before they are added up.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
# With quantized activations, in any dtype: a sum that is a little off may fall to the next code of a hidden row.
QUANTIZED_TOLERANCE = 1e-2
# On a GPU more sums are a little off: tensor cores add up products of 8 bits with fewer bits than float32 has.
QUANTIZED_ON_GPU = 2e-2
# FP8 products over many columns are further off: their sums have fewer bits than float32.
LARGE_K, LARGE_K_TOLERANCE = 2048, 3e-2
# One token may be that much further off than the tokens of a shard together.
ONE_TOKEN = 4


@dataclass(frozen=True)
class LayerTestResult:
    """How a run ended.

    Attributes:
        config: what was run.
        error: the largest relative Frobenius error of a shard's tokens.
        token_error: the largest relative error of a token.
        tolerance: up to which it is rounding.
        rms: of the reference's outputs.
        seconds: compiling and running the layer.
        failures: what was wrong, in words; empty if nothing was.
    """

    config: MoETestConfig
    error: float
    token_error: float
    tolerance: float
    rms: float
    seconds: float
    failures: tuple[str, ...]


def run_one_config(
    config: MoETestConfig, devices: Sequence[jax.Device] | None = None, *, implementation: str = "auto"
) -> LayerTestResult:
    """Runs the layer of a config and compares it, shard by shard, with the reference.

    It also shows that the comparison means something: outputs that are zero, scaled, or have tokens or columns in other places
    must not pass, and outputs must be of the size of the inputs. Rows that are no tokens hold NaN, and must come out zero.

    Args:
        config: valid, see `is_valid_config`.
        devices: at least as many as there are ranks; those of JAX by default.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Raises:
        ValueError: a config that is not valid, or too few devices.
        NotImplementedError: a config with `enable_eplb`.

    Example:
        >>> config = MoETestConfig(4, 32, 64, 4, 2, "float32", None, True, False, False)
        >>> run_one_config(config).failures
        ()
    """
    valid, reason = is_valid_config(config)
    if not valid:
        raise ValueError(f"{config.id()}: {reason}")
    if config.enable_eplb:
        raise NotImplementedError(
            f"{config.id()}: enable_eplb=True, but balancing the load of experts over ranks is not there yet; leave it False"
        )
    mesh = make_mesh(config, jax.devices() if devices is None else devices)
    if implementation == "auto" and mesh.devices.flat[0].platform == "cpu":
        implementation = "xla"  # beside GPUs, too, which auto would choose kernels for
    data = setup_moe_test_data(config)
    expected = baseline(config, data)
    start = time.perf_counter()
    out = np.asarray(make_moe_layer(config, data, mesh, implementation)()).astype(np.float32)
    seconds = time.perf_counter() - start
    return judge(config, data, out, expected, seconds, on_gpu=mesh.devices.flat[0].platform != "cpu")


def judge(
    config: MoETestConfig,
    data: MoETestData,
    out: np.ndarray,
    expected: np.ndarray,
    seconds: float = 0.0,
    *,
    on_gpu: bool = False,
) -> LayerTestResult:
    """What is wrong with an output ``[shards * m, k]``, if anything is."""
    tolerance, counts = tolerance_of(config, on_gpu), np.asarray(data.num_tokens).tolist()
    failures = []
    if out[~data.is_token].any() or np.isnan(out[~data.is_token]).any():
        failures.append("rows that are no tokens are not zero")
    out = out[data.is_token]
    error, token_error = worst_error(out, expected, counts), worst_token_error(out, expected)
    if not error <= tolerance:
        failures.append(f"relative error {error:.2e} of a shard exceeds {tolerance:.0e}")
    if not token_error <= ONE_TOKEN * tolerance:
        failures.append(f"relative error {token_error:.2e} of a token exceeds {ONE_TOKEN * tolerance:.0e}")
    rms = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    if not 0.3 < rms < 3.0:
        failures.append(f"the reference has RMS {rms:.2g}, far from that of the inputs: a comparison says little")
    for name, wrong in broken_outputs(expected).items():
        if (
            worst_error(wrong, expected, counts) <= tolerance
            and worst_token_error(wrong, expected) <= ONE_TOKEN * tolerance
        ):
            failures.append(f"the comparison would accept an output that is {name}")
    return LayerTestResult(config, error, token_error, tolerance, rms, seconds, tuple(failures))


def tolerance_of(config: MoETestConfig, on_gpu: bool = False) -> float:
    """What rounding may cost."""
    form = config.moe_config.quantization
    if form is None or form.activations is None:
        return TOLERANCE[config.in_dtype]
    if config.k >= LARGE_K:
        return LARGE_K_TOLERANCE
    return QUANTIZED_ON_GPU if on_gpu else QUANTIZED_TOLERANCE


def make_mesh(config: MoETestConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The ranks, data parallelism the slower axis.

    Raises:
        ValueError: too few devices.
    """
    if len(devices) < config.world_size:
        raise ValueError(
            f"{config.id()} needs {config.world_size} devices, but there are {len(devices)}; on a CPU set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 before JAX starts"
        )
    grid = np.asarray(devices[: config.world_size]).reshape(config.dp_size, config.tp_size)
    return Mesh(grid, ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)


def make_moe_layer(
    config: MoETestConfig, data: MoETestData, mesh: Mesh, implementation: str = "auto"
) -> Callable[[], Array]:
    """The layer as a model has it, compiled: transform, gate, experts over the mesh, transform, shared expert."""
    moe_config, parallel = config.moe_config, config.parallel
    options = {
        "parallel": parallel,
        "mesh": mesh,
        "exchange": exchange_of(config, implementation),
        "placement": data.placement,
        "num_tokens": data.num_tokens,
        "implementation": implementation,
    }

    def layer(x, experts, logits, gate, shared, transform):
        experts = place_experts(experts, moe_config, parallel, data.placement)
        routed = x if transform is None else _project(x, transform[0]).astype(x.dtype)
        if logits is None:
            logits = _project(routed, gate.T)
        inner = place_shared(shared, moe_config, parallel) if shared is not None and transform is None else None
        out = moe_sharded(routed, experts, logits, moe_config, shared=inner, **options)
        if transform is None:
            return out
        out = _project(out, transform[1])
        if shared is not None:
            out = out + shared_expert(x, shared, moe_config)
        return jnp.where(jnp.asarray(data.is_token)[:, None], out, 0).astype(x.dtype)

    operands = data.x, data.experts, data.logits, data.gate, data.shared, data.transform
    run = quick_jit(layer, platform=mesh.devices.flat[0].platform)
    return lambda: run(*operands)


def _project(a: Array, b: Array) -> Array:
    return jnp.matmul(
        a.astype(jnp.float32),
        b.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
