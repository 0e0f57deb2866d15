"""What else can run the layer here: the same inputs and weights, in the form that each peer likes best.

A peer prepares its weights once (a transposed copy, a tensor on the same memory) and that is not timed. What runs under torch
is recorded as a CUDA graph of `layers_a_call` layers, one behind the other, and replayed; JAX layers, ours too, are as many in
one jit. Every layer reads the same inputs and weights. Nothing is rotated through memory: what fits into the L2 cache is found
there, by every layer alike. The only file of the benchmark with torch.

What a peer raises ends up in its row. An illegal address in its kernel cannot be caught: it breaks the CUDA context of the
process, which is that of one case (`moe_jax.bench.processes`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.bench.compiling import Layer, layers_a_call, stack_logits
from moe_jax.bench.inputs import weights_shape
from moe_jax.bench.jax_layers import JAX_LAYERS
from moe_jax.bench.quantized_layers import QUANTIZED_LAYERS, Coded, torch_layer
from moe_jax.bench.torch_layers import COMPILED_AT_CALL, TORCH_LAYERS, PeerUnavailable
from moe_jax.config import MoEConfig
from moe_jax.quantization import QuantizedArray
from moe_jax.types import ExpertWeights

TORCH_PEERS = tuple(dict.fromkeys((*TORCH_LAYERS, *QUANTIZED_LAYERS)))
PEERS = (*TORCH_PEERS, *JAX_LAYERS)
# As pip calls them.
PACKAGES = {
    "torch": "torch",
    "vllm": "vllm",
    "cutlass": "vllm",
    "deepgemm": "vllm",
    "sonicmoe": "sonic-moe",
    "tokamax": "tokamax",
}
OURS = "xla"  # the one JAX peer that takes quantized weights
TORCH_BYTES = 8 * 2**30  # that torch needs for activations at the largest sizes


@dataclasses.dataclass(frozen=True)
class Bound:
    """A peer's layer with its operands.

    Attributes:
        call: starts `layers` runs of the layer.
        wait: given what `call` returned, returns it when the work is done.
        rows: given what `call` returned and row numbers, those rows of the output as a JAX array.
        what: how the peer runs it.
        layers: of one `call`.
        jitted: function and operands, for the kernel times; None where JAX does not launch the kernels.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    rows: Callable[[Any, np.ndarray], jax.Array]
    what: str
    layers: int = 1
    jitted: tuple[Any, ...] | None = None


Prepared = Callable[[jax.Array, jax.Array], Bound]  # of hidden states and router logits


class JaxPeer:
    """A peer under jit, for one config. With `ahead` its `layer` is to be compiled ahead, for weights as `weights_shape` says."""

    def __init__(self, name: str, config: MoEConfig):
        if config.quantization is not None and name != OURS:
            raise PeerUnavailable("takes no quantized weights")
        function, self.to_weights, self.what, self.ahead = JAX_LAYERS[name](config)
        self.layer = Layer(function)

    def weights_shape(self, weights: Any) -> Any:
        """Shapes of the weights that the layer takes, from those of ours."""
        return jax.eval_shape(self.to_weights, weights)

    def prepare(self, weights: ExpertWeights) -> Prepared:
        """Puts the weights in place."""
        own = jax.block_until_ready(self.to_weights(weights))

        def bind(x: jax.Array, logits: jax.Array) -> Bound:
            jitted = self.layer.stack_at(x.shape[0]), x, own, stack_logits(logits)
            call = functools.partial(*jitted)
            layers = layers_a_call(x.shape[0])
            return Bound(call, jax.block_until_ready, _rows, self.what, layers=layers, jitted=jitted)

        return bind


def _rows(outputs: tuple[jax.Array, jax.Array], rows: np.ndarray) -> jax.Array:
    return outputs[0][rows]


class TorchPeer:
    """A peer under torch, for one config."""

    def __init__(self, name: str, config: MoEConfig):
        make = torch_layer(name, config)
        import torch

        self.torch, self.config = torch, config
        self.place = make(torch, config)
        self.compiled_at_call = name in COMPILED_AT_CALL

    def warm(self, counts: Iterable[int]) -> None:
        """Runs it for some numbers of tokens, on zeros, if that is when its kernels are compiled. Needs a GPU."""
        if self.compiled_at_call:
            with contextlib.suppress(Exception), self.torch.no_grad():  # it comes again, and is reported, when measured
                self._run_on_zeros(counts)
            free_memory()

    def _run_on_zeros(self, counts: Iterable[int]) -> None:
        config, torch = self.config, self.torch

        def zeros(*shape, dtype=config.dtype):
            if dtype == "float8_e4m3fn":  # which torch does not fill everywhere
                return zeros(*shape, dtype="uint8").view(torch.float8_e4m3fn)
            return torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda")

        shapes = weights_shape(config)
        tensors = (_tensors(w, lambda leaf: zeros(*leaf.shape, dtype=leaf.dtype.name)) for w in (shapes.w13, shapes.w2))
        layer = self.place(*tensors)
        for count in counts:
            layer.function(zeros(count, config.hidden_size), zeros(count, config.num_experts, dtype="float32"))
        torch.cuda.synchronize()

    def prepare(self, weights: ExpertWeights) -> Prepared:
        """Puts the weights in place.

        Raises:
            PeerUnavailable: torch cannot use the device, or JAX has left it no memory.
        """
        torch = self.torch
        if jax.tree.leaves(weights.w13)[0].device.platform in ("gpu", "cuda"):
            _check_device(torch)
        # Tensors on JAX's memory: `weights` outlives them, and each side waits for its work before the other starts.
        layer = self.place(*(_tensors(w, torch.from_dlpack) for w in (weights.w13, weights.w2)))

        def wait(output):
            if output.is_cuda:
                torch.cuda.synchronize()
            return output

        def rows(output, numbers):
            picked = output[torch.as_tensor(numbers, device=output.device)]
            return jnp.asarray(picked.float().cpu().numpy())

        def bind(x: jax.Array, logits: jax.Array) -> Bound:
            operands = torch.from_dlpack(x), torch.from_dlpack(logits)
            call = functools.partial(torch.no_grad()(layer.function), *operands)
            if not operands[0].is_cuda or layer.reads_back:
                return Bound(call, wait, rows, layer.what)
            return _in_cuda_graph(torch, Bound(call, wait, rows, layer.what), layers_a_call(x.shape[0]))

        return bind


def _tensors(weights: Any, make: Callable[[Any], Any]) -> Any:
    """What a torch layer takes in the place of one matrix of all experts; `make` gives the tensor of an array."""
    if isinstance(weights, QuantizedArray):
        return Coded(make(weights.values), make(weights.scales))
    return make(weights)


def _check_device(torch: Any) -> None:
    if not torch.cuda.is_available():
        raise PeerUnavailable(f"torch {torch.__version__} sees no CUDA device; install a build of torch with CUDA")
    free, _ = torch.cuda.mem_get_info()
    if free < TORCH_BYTES:
        raise PeerUnavailable(
            f"{free / 2**30:.1f} GiB of GPU memory are free and torch is given at least {TORCH_BYTES / 2**30:.0f}; JAX has "
            "reserved the rest: set XLA_PYTHON_CLIENT_PREALLOCATE=false before JAX starts"
        )


def _in_cuda_graph(torch: Any, eager: Bound, layers: int) -> Bound:
    """The same as the replay of a CUDA graph of so many layers; as it is, with the reason, where that fails."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries allocate, tune and load their kernels, which a capture does not allow
                eager.call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(layers):  # the next one takes over the memory of the last
                output = eager.call()
    except RuntimeError as error:
        return dataclasses.replace(eager, what=f"{eager.what}, no CUDA graph ({short(error)})")

    def replay():
        graph.replay()
        return output

    return dataclasses.replace(eager, call=replay, what=f"{eager.what}, in a CUDA graph", layers=layers)


def parse_peers(text: str) -> tuple[str, ...]:
    """Names of peers, in the order given.

    Raises:
        ValueError: no such peer.

    Example:
        >>> parse_peers("torch,xla")
        ('torch', 'xla')
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ValueError(f"--compare {unknown[0]}: this command compares with {', '.join(PEERS)}")
    return names


def runs_under_torch(name: str) -> bool:
    """Whether the peer shares the GPU through torch."""
    return name in TORCH_PEERS


def find_peer(name: str, config: MoEConfig) -> JaxPeer | TorchPeer | str:
    """The peer, or why it cannot run here."""
    return _or_reason(name, lambda: (TorchPeer if runs_under_torch(name) else JaxPeer)(name, config))


def prepare(name: str, peer: JaxPeer | TorchPeer | str, weights: ExpertWeights) -> Prepared | str:
    """The peer with its weights in place, or why it cannot run here."""
    return peer if isinstance(peer, str) else _or_reason(name, lambda: peer.prepare(weights))


def _or_reason(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except PeerUnavailable as reason:
        return str(reason)
    except ImportError as error:
        install = "'moe_jax[torch]'" if name == "torch" else PACKAGES[name]
        return f"{name} cannot be imported ({error}); pip install {install}"
    except Exception as failure:  # a peer must not take the measurement of the layer with it
        return short(failure)


def short(failure: Exception) -> str:
    """Kind and first line of an error, for a row."""
    return f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"[:300]


def free_memory() -> None:
    """Gives the memory of dropped peers back to the device: torch keeps what it has once had, and JAX may need it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
