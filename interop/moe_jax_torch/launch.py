"""Kernels launched on torch's current stream, into memory that torch allocated: no XLA, no waiting, and CUDA graphs record it.

It is the same code as in JAX: a compiled function of `moe_jax_torch.calls` is lowered, and the Mosaic kernels that it consists of
are launched in their order. A function that XLA has a part in cannot be launched so, and crosses the bridge instead.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import torch

from moe_jax import _compat
from moe_jax_torch.bridge import DTYPES, TORCH_DTYPES, array_dtype, keeping_device
from moe_jax_torch.program import NotLaunchable, Program
from moe_jax_torch.workspace import ALIGNMENT

MODES = ("auto", "never", "always")
_mode = "auto"


def set_launch(mode: str) -> str:
    """How layers run on a GPU, in the whole process.

    Args:
        mode: ``auto``: kernels are launched on torch's current stream where a layer is Mosaic kernels alone, else JAX runs it and
            results cross the bridge. ``never``: always the latter; no CUDA graph can be captured. ``always``: a layer that cannot
            be launched raises, with the reason; to find out before anything depends on it.

    Returns:
        The mode before.

    Raises:
        ValueError: another mode.

    Example:
        >>> before = set_launch("never")
        >>> set_launch(before)
        'never'
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}")
    before, _mode = _mode, mode
    return before


def launch(
    function: Any,
    operands: Any,
    static: dict[str, Any],
    *,
    check: Callable[[], None],
    own: Callable[[], Any],
    again: Any = None,
) -> list[torch.Tensor] | None:
    """The leaves of what a function of `moe_jax_torch.calls` returns, in memory of their own; None where JAX has to run it.

    The first call with new shapes lowers the function and compiles its kernels, which takes seconds. It cannot be done while a
    graph is captured: make one call before, as one does to warm up.

    Args:
        function: jitted.
        operands: its positional arguments, with tensors in the place of arrays.
        static: its static arguments.
        check: raises for operands that do not fit; not called again for shapes and dtypes that did.
        own: makes the operands that kernels can take, where these are not such: contiguous, at multiples of 256 bytes, not int64.
        again: from `key_of`, for `relaunch`.

    Raises:
        RuntimeError: a CUDA graph is being captured and there is nothing compiled to be launched; the mode is ``always`` and the
            function is not Mosaic kernels alone.
        TypeError: a dtype that JAX does not have.
    """
    leaves, tree = jax.tree.flatten(operands)
    if _mode == "never" or not _on_gpu(leaves[0]):
        check()
        return None
    key = (function, tree, *static.values(), *[(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves])
    found = _found.get(key)
    if found is None:
        check()
        found = _find(key, function, operands, static)
    if isinstance(found, Launcher):
        if again is not None:
            _again[again] = found
        return found(leaves, own)
    if _mode == "always":
        raise RuntimeError(f"set_launch('always'), but {found}; use a dtype and sizes that have kernels, or set 'auto'")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph is being captured, but JAX has to run this layer, on streams that the graph does not record: {found}. "
            "Use a dtype and sizes that have kernels, or leave the call out of the graph"
        )
    return None


def key_of(name: str, static: tuple[Any, ...], tensors: tuple[torch.Tensor | None, ...]) -> tuple[Any, ...]:
    """What tells the programs of an operator apart: made of its arguments as they come, for a host in a hurry.

    Example:
        >>> key_of("route", (2,), (torch.ones(3), None))
        ('route', (2,), torch.Size([3]), torch.float32, device(type='cpu'), None)
    """
    key: list[Any] = [name, static]
    for tensor in tensors:
        key += (None,) if tensor is None else (tensor.shape, tensor.dtype, tensor.device)
    return tuple(key)


def relaunch(key: tuple[Any, ...], tensors: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor] | None:
    """What `launch` gave for this key is run on tensors that kernels can take as they are; None where it has to be asked.

    Args:
        key: from `key_of`.
        tensors: what that was made of, in the order of the operands of `launch`.
    """
    found = None if _mode == "never" else _again.get(key)
    return None if found is None else found.run([tensor for tensor in tensors if tensor is not None])


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def _current_stream(device: int) -> int:
    """The handle of torch's current stream; private, because the public way makes an object of it at every call."""
    return torch._C._cuda_getCurrentRawStream(device)


_found: dict[Any, Launcher | str] = {}  # or the reason why there is none
_again: dict[Any, Launcher] = {}  # the same, by `key_of`
_building = threading.Lock()


def _find(key: Any, function: Any, operands: Any, static: dict[str, Any]) -> Launcher | str:
    if torch.cuda.is_current_stream_capturing():
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in jax.tree.leaves(operands))
        raise RuntimeError(
            f"a CUDA graph is being captured, but nothing is compiled yet for tensors of {shapes}: make one call with as many "
            "tokens, or with another count up to the same power of two, before the capture"
        )
    with _building:
        if key not in _found:
            structs = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, array_dtype(t.dtype)), operands)
            try:
                with keeping_device():
                    program = Program.of(function.trace(*structs, **static).lower(lowering_platforms=("cuda",)))
                _found[key] = Launcher(program, jax.tree.leaves(operands)[0].device)
            except NotLaunchable as error:
                _found[key] = str(error)
        return _found[key]


class Launcher:
    """A program whose kernels are loaded on a device. Any thread may call it, several at a time: what calls share never changes.

    The workspace is allocated at each call, by torch's allocator, which knows streams and graphs.

    Args:
        program: to be launched.
        device: a GPU.
    """

    def __init__(self, program: Program, device: torch.device):
        self._device, self._context = device, _Context(device.index)
        # Of one element each: making a tensor like another is quicker than saying what it should be.
        outputs = [(shape, TORCH_DTYPES[dtype]) for shape, dtype in program.outputs]
        patterns = [*outputs, ((program.workspace_bytes,), torch.uint8)]
        self._patterns = [torch.empty((), dtype=dtype, device=device).expand(shape) for shape, dtype in patterns]
        self._constants = [
            torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8).to(device) for array in program.constants
        ]
        torch.cuda.current_stream(device).synchronize()  # calls may come on any stream
        # A base is the address of an argument, an output, the workspace or a constant, in this order.
        outputs = len(program.arguments)
        workspace = outputs + len(program.outputs)
        first = {"argument": 0, "output": outputs, "workspace": workspace, "constant": workspace + 1}
        places = [place for step in program.launches for place in step.buffers]
        self._slots = [(first[place.space] + place.index, place.offset) for place in places]
        self._array_type = ctypes.c_uint64 * len(places)
        self._arrays: dict[tuple[int, ...], ctypes.Array] = {}
        kernels = _load(program, self._context, device.index)
        self._launches, start = [], 0
        for step in program.launches:
            self._launches.append((kernels[step.kernel], start * ctypes.sizeof(ctypes.c_uint64)))
            start += len(step.buffers)

    def __call__(self, tensors: list[torch.Tensor], own: Callable[[], Any]) -> list[torch.Tensor]:
        """Launches the kernels on the current stream.

        Args:
            tensors: the leaves of the operands, on the device.
            own: gives the operands that are used instead, if kernels cannot take these.

        Returns:
            The leaves of what the function returns.
        """
        outputs = self.run(tensors)
        if outputs is None:
            tensors = jax.tree.leaves(own())  # which live until the kernels are queued
            outputs = self._queue([tensor.data_ptr() for tensor in tensors])
        return outputs

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """The same; None where kernels cannot take the tensors."""
        bases = []
        for tensor in tensors:
            address = tensor.data_ptr()
            if address % ALIGNMENT or not tensor.is_contiguous() or tensor.dtype not in DTYPES:
                return None
            bases.append(address)
        return self._queue(bases)

    def _queue(self, bases: list[int]) -> list[torch.Tensor]:
        """Launches the kernels on operands at these addresses."""
        made = [torch.empty_like(pattern) for pattern in self._patterns]
        bases += [tensor.data_ptr() for tensor in made]
        address, stream = ctypes.addressof(self._buffers(tuple(bases))), _current_stream(self._device.index)
        with self._context:
            for kernel, start in self._launches:
                kernel(stream, address + start)
        return made[:-1]  # the workspace may be used again by what comes after on this stream

    def _buffers(self, bases: tuple[int, ...]) -> ctypes.Array:
        """The addresses of the buffers of all launches. A layer mostly finds its tensors where they were before."""
        found = self._arrays.get(bases)
        if found is None:
            all_bases = (*bases, *(constant.data_ptr() for constant in self._constants))
            found = self._array_type(*[all_bases[base] + offset for base, offset in self._slots])
            if len(self._arrays) >= _MAX_ARRAYS:
                self._arrays.clear()
            self._arrays[bases] = found
        return found


_MAX_ARRAYS = 1024
_kernels: dict[tuple[bytes, int], Callable[[int, int], None]] = {}  # by hash and device


def _load(program: Program, context: _Context, device: int) -> dict[bytes, Callable[[int, int], None]]:
    """The kernels of a program by hash, compiled side by side where they are not loaded yet."""

    def load(item: tuple[bytes, bytes]) -> None:
        name, module = item
        with context:
            _kernels[name, device] = _compat.load_mosaic(module)

    modules = {step.kernel: step.module for step in program.launches}
    missing = [item for item in modules.items() if (item[0], device) not in _kernels]
    with ThreadPoolExecutor(max(1, len(missing))) as pool:
        list(pool.map(load, missing))
    return {name: _kernels[name, device] for name in modules}


class _Context:
    """The CUDA context in which torch works on a device, current within a ``with``, also on a thread that is new to CUDA."""

    def __init__(self, device: int):
        driver, number, self._handle = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
        self._push, self._pop = driver.cuCtxPushCurrent_v2, driver.cuCtxPopCurrent_v2
        results = (
            driver.cuDeviceGet(ctypes.byref(number), device),
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._handle), number),
        )
        if any(results):
            raise RuntimeError(f"the CUDA driver gives no context on device {device}: errors {results}")

    def __enter__(self) -> None:
        if error := self._push(self._handle):
            raise RuntimeError(f"the CUDA driver cannot enter a context: error {error}")

    def __exit__(self, *_: object) -> None:
        self._pop(ctypes.byref(ctypes.c_void_p()))
