"""Tensors to arrays and back: without a copy where that is safe, with one where it is not, refused where neither is right."""

from __future__ import annotations

import collections
import contextlib
import os
import threading

import jax
import torch
from torch._C._functorch import is_functorch_wrapped_tensor  # private: torch has no public way to ask

# JAX would take most of a GPU when it starts, and torch has an allocator of its own. Read when JAX's GPU backend starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# What both sides have. float4_e2m1fn_x2, two codes a byte, is known to torch alone and travels as its bytes.
DTYPES: dict[torch.dtype, str] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.int32: "int32",
    torch.bool: "bool",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
    torch.float8_e8m0fnu: "float8_e8m0fnu",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

# XLA copies a CPU buffer at every call unless it starts at such an address; on a GPU the kernels are compiled for theirs.
ALIGNMENT = {"cpu": 64, "cuda": 256}

_INT32 = torch.iinfo(torch.int32)


def to_jax(tensor: torch.Tensor, *, detach: bool = False) -> jax.Array:
    """The tensor as a JAX array on the same device: its own memory where it can be, a copy where it cannot.

    An array that shares memory sees what torch writes later. On a CPU too JAX computes after the call has returned, so do not
    write to the tensor before `to_torch` has returned every result of the computation.

    A copy is made, on the tensor's device, of

    - a tensor that is not contiguous: transposed, sliced with gaps, expanded. An array never has another than the default layout;
    - a tensor that does not start at a multiple of 64 bytes on a CPU, of 256 bytes on a GPU: slices, memory-mapped files;
    - int64, which becomes int32. On a CPU a value outside int32 raises. On a GPU, where looking would make the host wait, it
      becomes the nearest int32: an id that names no expert still names none.

    Args:
        tensor: any shape, none of its sizes need be positive; bfloat16, float16, float32, int8, uint8, int32, int64, bool,
            float8_e4m3fn, float8_e5m2, float8_e8m0fnu, or float4_e2m1fn_x2, which becomes uint8 with two codes a byte.
        detach: allow a tensor that requires a gradient. The array knows nothing of it.

    Returns:
        An array of the tensor's shape.

    Raises:
        TypeError: not a plain tensor with memory of its own (FakeTensor, vmap, meta, sparse, a subclass), or of another dtype.
        ValueError: it requires a gradient and `detach` is False; an int64 outside int32, on a CPU.
        RuntimeError: JAX has no such device, or a CUDA graph is being captured.

    Source: the DLPack protocol, through `jax.dlpack`.

    Example:
        >>> to_jax(torch.arange(6).reshape(2, 3).t()).tolist()
        [[0, 3], [1, 4], [2, 5]]
    """
    check_plain(tensor)
    if tensor.requires_grad and not detach:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} requires a gradient, which an array cannot carry: use "
            "moe_jax_torch's functions, which are differentiable, or pass detach=True to go without"
        )
    check_device(tensor.device)
    tensor = own_memory(as_jax_dtype(tensor.detach()))
    with torch.cuda.device_of(tensor):  # the export refuses a tensor of another than the current device
        return jax.dlpack.from_dlpack(tensor)


def to_torch(array: jax.Array, *, out: torch.Tensor | None = None, rows: int | None = None) -> torch.Tensor:
    """A copy of the array in memory that torch owns.

    It is a copy on purpose. A tensor that shares an array's memory keeps it only until torch drops the tensor, which on a GPU
    is when its last kernel is queued, not when it has run: JAX would give the memory to the next computation while torch still
    reads it. Here the array is kept until the copy has happened. On a CPU this waits for the computation; on a GPU torch's
    current stream does, and the host goes on.

    Args:
        array: on one device, of a dtype that `to_jax` gives.
        out: where to write, of the array's shape, dtype and device, with any strides; new contiguous memory by default.
        rows: only the first so many, along the first axis; all by default.

    Returns:
        `out`, or the new tensor.

    Raises:
        TypeError: not an array (a tracer of `jax.jit`, say), or of a dtype that torch does not have.
        ValueError: `out` does not fit, or the array is deleted or spread over several devices.
        RuntimeError: a CUDA graph is being captured.

    Example:
        >>> import jax.numpy as jnp
        >>> out = torch.zeros(2, 4)
        >>> _ = to_torch(jnp.ones((2, 2)), out=out[:, ::2])
        >>> out.tolist()
        [[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]]
    """
    _check_array(array)
    shape = array.shape if rows is None else (rows, *array.shape[1:])
    device = _torch_device(array)
    check_device(device)
    if out is None:
        out = torch.empty(shape, dtype=TORCH_DTYPES[array.dtype.name], device=device)
    _check_out(out, shape, array.dtype.name, device)
    if out.numel() == 0:
        return out
    with torch.no_grad(), torch.cuda.device_of(out):
        shared = torch.from_dlpack(array)
        out.copy_(shared if rows is None else shared[:rows])
        if device.type == "cuda":
            _hold_until_copied(array)
    return out


def check_plain(tensor: torch.Tensor) -> None:
    """Refuses what is not a plain strided tensor with memory of its own, by name.

    Raises:
        TypeError: as said; the message has the way out.

    Example:
        >>> check_plain(torch.empty(2, device="meta"))
        Traceback (most recent call last):
        ...
        TypeError: a meta tensor has a shape but no memory; ...
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"got {type(tensor).__name__}, but only a torch.Tensor crosses; use torch.as_tensor first")
    if is_functorch_wrapped_tensor(tensor):
        raise TypeError(
            "a tensor of a function that torch.vmap or torch.func transforms has no memory of its own; call "
            "moe_jax_torch's functions there, which torch can transform, not the bridge"
        )
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"{type(tensor).__name__} is not a plain tensor: a FakeTensor has no values (in torch.compile call "
            "moe_jax_torch's functions, not the bridge), of a DTensor pass to_local(), of others the tensor inside"
        )
    if tensor.device.type == "meta":
        raise TypeError("a meta tensor has a shape but no memory; use to_empty(device=...) and load its values first")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"a tensor of layout {kind} is not strided; use to_dense(), or to_padded_tensor() if nested")
    if tensor.is_conj() or tensor.is_neg():
        raise TypeError("a conjugated or negated view is not what its memory says; use resolve_conj() or resolve_neg()")


def check_device(device: torch.device) -> None:
    """Refuses a device that JAX does not have, and one on which a CUDA graph is being captured.

    Raises:
        RuntimeError: as said; the message has the way out.

    Example:
        >>> check_device(torch.device("cpu"))
    """
    if device.type not in ALIGNMENT:
        raise RuntimeError(f"JAX shares no memory with torch on {device}; move the tensor to 'cpu' or 'cuda'")
    if device.type == "cuda":
        check_capture()
    try:
        with keeping_device():
            devices = jax.local_devices(backend=device.type)
    except RuntimeError as error:
        way_out = "install moe_jax[cuda13], or move the tensor to the CPU" if device.type == "cuda" else "name cpu too"
        raise RuntimeError(
            f"the tensor is on {device}, but JAX has no {device.type} backend here (JAX_PLATFORMS is "
            f"{os.environ.get('JAX_PLATFORMS') or 'not set'}): {way_out}"
        ) from error
    if device.index is not None and device.type == "cuda":
        known = [other.local_hardware_id for other in devices]
        if device.index not in known:
            raise RuntimeError(
                f"the tensor is on {device}, but JAX sees the GPUs {known} only; let both see the same ones, with "
                "CUDA_VISIBLE_DEVICES alone"
            )


def keeping_device() -> contextlib.AbstractContextManager[object]:
    """Within it JAX may start: its GPU backend leaves the last GPU current, where torch would then make its tensors.

    Example:
        >>> with keeping_device():
        ...     devices = jax.local_devices()
    """
    return torch.cuda.device(torch.cuda.current_device()) if torch.cuda.is_initialized() else contextlib.nullcontext()


def check_capture() -> None:
    """Refuses while torch captures a CUDA graph on the current stream.

    Raises:
        RuntimeError: JAX runs on streams of its own, which a capture does not record: a replay would return stale values.

    Example:
        >>> check_capture()  # doctest: +SKIP
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, but JAX runs on streams of its own, which the graph would not record: a "
            "replay would return stale values. Leave this call out of the graph"
        )


def own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it if JAX could not share its memory: not contiguous, or not aligned.

    Example:
        >>> aligned = torch.zeros(64)
        >>> own_memory(aligned) is aligned, own_memory(aligned[1:]) is aligned[1:]
        (True, False)
    """
    if shares_memory(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def shares_memory(tensor: torch.Tensor) -> bool:
    """Whether `to_jax` shares the tensor's memory, with no copy.

    Example:
        >>> shares_memory(torch.zeros(4, 2)), shares_memory(torch.zeros(4, 2).t()), shares_memory(torch.zeros(2).long())
        (True, False, False)
    """
    if tensor.dtype == torch.int64 or not tensor.is_contiguous():
        return False
    return tensor.data_ptr() % ALIGNMENT["cuda" if tensor.is_cuda else "cpu"] == 0


def array_dtype(dtype: torch.dtype) -> str:
    """The dtype of the array that `to_jax` makes of a tensor.

    Raises:
        TypeError: JAX has no such dtype.

    Example:
        >>> array_dtype(torch.int64)
        'int32'
    """
    known = DTYPES | {torch.int64: "int32", torch.float4_e2m1fn_x2: "uint8"}
    if dtype not in known:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{dtype} does not cross; cast it to one of {names}")
    return known[dtype]


def as_jax_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype that its array has, see `to_jax`.

    Raises:
        TypeError, ValueError: what `to_jax` refuses.

    Example:
        >>> as_jax_dtype(torch.tensor([3])).dtype
        torch.int32
    """
    if tensor.dtype in DTYPES:
        return tensor
    array_dtype(tensor.dtype)
    if tensor.dtype == torch.float4_e2m1fn_x2:
        return tensor.view(torch.uint8)
    if tensor.device.type == "cpu" and tensor.numel():
        low, high = (int(bound) for bound in torch.aminmax(tensor))
        if low < _INT32.min or high > _INT32.max:
            raise ValueError(
                f"an int64 tensor ranges from {low} to {high}, but crosses as int32, [{_INT32.min}, {_INT32.max}]; "
                "ids and sizes must fit"
            )
    return tensor.clamp(_INT32.min, _INT32.max).to(torch.int32)


def _check_array(array: jax.Array) -> None:
    if isinstance(array, jax.core.Tracer):
        raise TypeError("a tracer has no values: call to_torch outside of the function that JAX transforms")
    if not isinstance(array, jax.Array):
        raise TypeError(f"got {type(array).__name__}, but only a jax.Array crosses; use jnp.asarray first")
    if array.dtype.name not in TORCH_DTYPES:
        raise TypeError(
            f"torch has no {array.dtype} that JAX could hand over; cast the array to one of "
            f"{', '.join(TORCH_DTYPES)}, or bitcast 4-bit codes to uint8 (lax.bitcast_convert_type)"
        )
    if array.is_deleted():
        raise ValueError("the array is deleted: it was donated to a computation, or delete() was called")
    if len(array.devices()) != 1:
        raise ValueError(
            f"the array is spread over {len(array.devices())} devices; pass one of its addressable_shards, or gather "
            "it with jax.device_put"
        )


def _torch_device(array: jax.Array) -> torch.device:
    (device,) = array.devices()
    return torch.device("cpu") if device.platform == "cpu" else torch.device("cuda", device.local_hardware_id)


def _check_out(out: torch.Tensor, shape: tuple[int, ...], dtype: str, device: torch.device) -> None:
    check_plain(out)
    given = (tuple(out.shape), DTYPES.get(out.dtype, out.dtype), out.device)
    if given != (tuple(shape), dtype, device):
        raise ValueError(
            f"out is {given[0]}, {given[1]} on {given[2]}, but the result is {tuple(shape)}, {dtype} on {device}; "
            "allocate it like that, with any strides"
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires a gradient, which writing into it would break; pass out.detach(), or no out")


# Arrays that torch's streams are still copying from: (event after the copy, array), the oldest first.
_held: collections.deque[tuple[torch.cuda.Event, jax.Array]] = collections.deque()
_held_lock = threading.Lock()


def _hold_until_copied(array: jax.Array) -> None:
    """Keeps the array until the copy that is queued on the current stream has run; lets go of those whose copy has."""
    copied = torch.cuda.Event()
    copied.record()
    with _held_lock:
        _held.append((copied, array))
        while _held and _held[0][0].query():
            _held.popleft()
