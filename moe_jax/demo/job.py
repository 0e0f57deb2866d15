"""The demo itself: checkpoint -> layers -> outputs -> numbers. No printing here, no torch."""

import contextlib
import dataclasses
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoints import load_layer, sparse_layers
from moe_jax.config import MoEConfig
from moe_jax.demo import transformers_side
from moe_jax.demo.errors import DemoError
from moe_jax.demo.timing import median_seconds
from moe_jax.explanation import Explanation, explain
from moe_jax.moe import moe_block
from moe_jax.routing import route
from moe_jax.types import MoELayerWeights

# Relative error of a layer that still counts as equal: rounding of the compute dtype, nothing more.
TOLERANCES = {"float32": 2e-6, "float16": 5e-3, "bfloat16": 2e-2}
# Two correct programs may order nearly equal router scores differently. More tokens than this is no coincidence.
MAX_TIED_FRACTION = 1e-3
# Enough text for any tokenizer to make the tokens that are kept, without reading a whole library.
MAX_BYTES_PER_TOKEN = 64


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """What the demo is asked to do; see `moe-jax demo --help`."""

    checkpoint: Path | None = None
    text: Path | None = None
    max_tokens: int = 1024
    layers: int = 4
    ranks: int = 4
    dtype: str | None = None
    implementation: str = "auto"
    tolerance: float | None = None
    repeats: int = 5


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """What one layer showed.

    Attributes:
        index: of the decoder layer in the checkpoint.
        error: relative error of the layer run whole, against transformers: ``|ours - theirs| / |theirs|`` over all
            tokens that both sent to the same experts.
        error_parallel: the same for the sum over the expert-parallel ranks.
        tied: tokens that the two sent to different experts.
        seconds: median time of moe_jax, run whole.
        transformers_seconds: median time of transformers' block.
        tokens_per_expert: ``[E]``.
        ranks: ``[E]``, the rank that owns each expert.
    """

    index: int
    error: float
    error_parallel: float
    tied: int
    seconds: float
    transformers_seconds: float
    tokens_per_expert: np.ndarray
    ranks: np.ndarray


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """The whole demo: its layers, what ran, and the failures, each a sentence."""

    layers: list[LayerResult]
    config: MoEConfig
    model: str
    tokenizer: str
    num_tokens: int
    device: str
    transformers_device: str
    tolerance: float
    implementation: str
    explanations: list[Explanation]
    failures: list[str]


def run_demo(options: DemoOptions, progress: Callable[[str], None] = lambda message: None) -> DemoResult:
    """Runs the demo. Everything that can be wrong with its input raises `DemoError`."""
    platform = jax.default_backend()
    dtype = options.dtype or ("bfloat16" if platform == "gpu" else "float32")
    if dtype not in TOLERANCES:
        raise DemoError(f"--dtype {dtype} must be one of {', '.join(TOLERANCES)}")
    text = read_text(options.text, MAX_BYTES_PER_TOKEN * options.max_tokens)
    transformers_side.import_torch()
    with _checkpoint(options, dtype, progress) as folder:
        hf_config = transformers_side.read_config(folder)
        with _as_demo_error(f"{folder} is not a checkpoint that moe_jax can load"):
            config = MoEConfig.from_hf(hf_config, dtype=dtype)
            sparse = sparse_layers(hf_config)[: options.layers]
        if not sparse:
            raise DemoError(f"this {hf_config.model_type} model has no MoE layer; give a Mixture-of-Experts checkpoint")
        ids, tokenizer = transformers_side.token_ids(text, folder, hf_config.vocab_size, options.max_tokens)
        progress(f"running transformers' {hf_config.model_type} on {ids.size} tokens")
        hf_config = transformers_side.first_layers(hf_config, sparse[-1] + 1)
        captured = transformers_side.capture_layers(folder, hf_config, ids, dtype, options.repeats)
        tolerance = TOLERANCES[dtype] if options.tolerance is None else options.tolerance
        # float32 means float32: without this a GPU multiplies float32 matrices in TensorFloat-32.
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            # One function for all layers: they have the same shapes, so it compiles once for each split.
            block = jax.jit(partial(moe_block, config=config, implementation=options.implementation))
            layers = []
            for one in captured:
                progress(f"running moe_jax on layer {one.index}")
                layers.append(_run_layer(folder, config, one, options, block))
    return DemoResult(
        layers=layers,
        config=config,
        model=f"{hf_config.model_type} from {options.checkpoint}"
        if options.checkpoint
        else "qwen3_moe, random weights",
        tokenizer=tokenizer,
        num_tokens=int(ids.size),
        device=f"{jax.devices()[0].device_kind} ({platform})",
        transformers_device=transformers_side.timing_device(),
        tolerance=tolerance,
        implementation=options.implementation,
        explanations=explain(config, int(ids.size)),
        failures=[failure for layer in layers for failure in layer_failures(layer, int(ids.size), tolerance)],
    )


def read_text(path: Path | None, limit: int) -> bytes:
    """The file's first ``limit`` bytes; by default the README, from the source tree or from the installed package."""
    if path is None:
        readme = Path(__file__).parents[2] / "README.md"
        if readme.is_file() and (readme.parent / "pyproject.toml").is_file():
            path = readme
        else:
            return (importlib.metadata.metadata("moe_jax").get_payload() or "").encode()[:limit]
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as error:
        raise DemoError(f"cannot read --text {path}: {error.strerror or error}") from error


def expert_maps(num_experts: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring experts to neighbouring ranks, as even as the numbers allow.

    Returns:
        int32 ``[ranks, E]``, each rank's map from global to local expert id or -1; int32 ``[E]``, each expert's rank.

    Example:
        >>> maps, owner = expert_maps(5, 2)
        >>> maps.tolist(), owner.tolist()
        ([[0, 1, 2, -1, -1], [-1, -1, -1, 0, 1]], [0, 0, 0, 1, 1])
    """
    maps = np.full((ranks, num_experts), -1, np.int32)
    owner = np.empty(num_experts, np.int32)
    for rank, experts in enumerate(np.array_split(np.arange(num_experts), ranks)):
        maps[rank, experts] = np.arange(experts.size)
        owner[experts] = rank
    return maps, owner


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """``|ours - theirs| / |theirs|`` in float64; NaN if either holds one.

    Example:
        >>> relative_error(np.array([3.0, 4.0]), np.array([3.0, 4.0])), relative_error(np.array([2.0]), np.array([1.0]))
        (0.0, 1.0)
    """
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), np.finfo(np.float32).tiny))


def layer_failures(layer: LayerResult, num_tokens: int, tolerance: float) -> list[str]:
    """What of a layer is not as it must be, each a sentence. A NaN is a failure too."""
    failures = []
    for name, error in (("whole", layer.error), ("split over ranks", layer.error_parallel)):
        if not error <= tolerance:
            failures.append(
                f"layer {layer.index} {name}: relative error {error:.3g} against transformers exceeds {tolerance:.3g}"
            )
    if layer.tied > max(1, MAX_TIED_FRACTION * num_tokens):
        failures.append(
            f"layer {layer.index}: {layer.tied} of {num_tokens} tokens went to other experts than in transformers"
        )
    return failures


def _run_layer(
    folder: Path,
    config: MoEConfig,
    captured: transformers_side.CapturedLayer,
    options: DemoOptions,
    block: Callable[..., jax.Array],
) -> LayerResult:
    x = jnp.asarray(captured.hidden_states, config.dtype)
    ranks = min(options.ranks, config.num_experts)
    maps, owner = expert_maps(config.num_experts, ranks)
    with _as_demo_error(f"layer {captured.index}"):
        layer = load_layer(folder, captured.index, config)
        whole = np.asarray(block(x, layer), np.float32)
        seconds = median_seconds(lambda: jax.block_until_ready(block(x, layer)), options.repeats)
        total = np.zeros_like(whole)
        for rank, expert_map in enumerate(maps):
            placement = jnp.asarray(expert_map)
            part = load_layer(folder, captured.index, config, expert_map=placement)
            if rank > 0:  # shared experts are no rank's own: one rank adds them
                part = dataclasses.replace(part, shared=None)
            total += np.asarray(block(x, part, expert_map=placement), np.float32)
        topk_ids = np.asarray(_topk_ids(x, layer, config))
    same = _same_experts(topk_ids, captured.topk_ids)
    return LayerResult(
        index=captured.index,
        error=relative_error(whole[same], captured.output[same]),
        error_parallel=relative_error(total[same], captured.output[same]),
        tied=int((~same).sum()),
        seconds=seconds,
        transformers_seconds=captured.seconds,
        tokens_per_expert=np.bincount(topk_ids[topk_ids >= 0].ravel(), minlength=config.num_experts),
        ranks=owner,
    )


def _topk_ids(x: jax.Array, layer: MoELayerWeights, config: MoEConfig) -> jax.Array:
    logits = jnp.matmul(x.astype(jnp.float32), layer.router.astype(jnp.float32).T, precision="highest")
    if layer.router_bias is not None:
        logits = logits + layer.router_bias.astype(jnp.float32)[None]
    return route(logits, config, correction_bias=layer.correction_bias).ids


def _same_experts(ours: np.ndarray, theirs: np.ndarray | None) -> np.ndarray:
    """bool ``[T]``: the two chose the same set of experts. True where transformers' choice is not known."""
    if theirs is None:
        return np.ones(ours.shape[0], bool)
    return (np.sort(ours, axis=1) == np.sort(theirs, axis=1)).all(axis=1)


@contextlib.contextmanager
def _checkpoint(options: DemoOptions, dtype: str, progress: Callable[[str], None]) -> Iterator[Path]:
    """The folder of the checkpoint: the one that was named, or a new one that lives as long as the demo."""
    if options.checkpoint is not None:
        if not options.checkpoint.is_dir():
            raise DemoError(
                f"--checkpoint {options.checkpoint} is not a folder; nothing is downloaded, give a local one"
            )
        yield options.checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="moe_jax_demo_") as folder:
        progress("making a small Qwen3-MoE checkpoint with random weights")
        transformers_side.make_checkpoint(Path(folder), dtype)
        yield Path(folder)


@contextlib.contextmanager
def _as_demo_error(context: str) -> Iterator[None]:
    """Turns what moe_jax says about bad input into the demo's own error; a bug in it keeps its traceback."""
    try:
        yield
    except (ValueError, NotImplementedError, LookupError, OSError) as error:
        raise DemoError(f"{context}: {error}") from error
