"""A lowered function as Mosaic kernels in order, and the memory that each reads and writes: all that it takes to launch it.

Only reading is done here, on any machine: no device, no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax_torch.workspace import Span, arrange

_KERNEL = "mosaic_gpu_v2"  # the custom call of a Mosaic kernel
# Element types of MLIR, as JAX names them. Those of less than a byte are not here: a pointer could not point at one.
_DTYPES = {
    "i1": "bool",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "ui8": "uint8",
    "ui16": "uint16",
    "ui32": "uint32",
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f8E4M3FN": "float8_e4m3fn",
    "f8E5M2": "float8_e5m2",
    "f8E8M0FNU": "float8_e8m0fnu",
}


class NotLaunchable(Exception):
    """A function is not Mosaic kernels alone, so that only XLA can run it; the message names what else there is."""


class TensorType(NamedTuple):
    """Shape and dtype.

    Example:
        >>> TensorType((2, 3), "bfloat16").num_bytes
        12
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of a row-major tensor."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class Place(NamedTuple):
    """Where a buffer begins.

    Attributes:
        space: ``argument``, ``constant``, ``output`` or ``workspace``.
        index: which argument, constant or output; 0 for the workspace.
        offset: bytes from there.
    """

    space: str
    index: int
    offset: int = 0


class Launch(NamedTuple):
    """A kernel and what it is given.

    Attributes:
        kernel: the hash of its module.
        module: MLIR as bytes, for the compiler of Mosaic kernels.
        buffers: operands, then results.
    """

    kernel: bytes
    module: bytes
    buffers: tuple[Place, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """Kernels to be launched one after the other on one stream.

    Attributes:
        arguments: what the function takes, row-major.
        outputs: what it gives, row-major, each in memory of its own.
        constants: arrays that kernels read.
        launches: in order.
        workspace_bytes: memory for what kernels pass on, aligned to 256 bytes. Nothing in it needs to be zero.

    Example:
        >>> lowered = jax.jit(lambda x: x + 1).trace(jnp.ones(3)).lower(lowering_platforms=("cuda",))
        >>> Program.of(lowered)
        Traceback (most recent call last):
        ...
        moe_jax_torch.program.NotLaunchable: stablehlo.add of 3xf32, 3xf32 is no Mosaic kernel
    """

    arguments: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    constants: tuple[np.ndarray, ...]
    launches: tuple[Launch, ...]
    workspace_bytes: int

    @classmethod
    def of(cls, lowered: jax.stages.Lowered) -> Program:
        """The program of a function that was lowered for CUDA.

        Reshapes move nothing, and what is made of constants alone is computed here. Results that nobody reads get memory too,
        because their kernel writes them.

        Raises:
            NotLaunchable: another operation than these; an output that no kernel writes; an argument that no kernel reads.
        """
        program = _Reader(lowered.compiler_ir("stablehlo")).program()
        given = lowered.in_tree.num_leaves
        if given != len(program.arguments):  # JAX drops them, and does not say which
            raise NotLaunchable(f"of {given} arguments {len(program.arguments)} are used")
        return program


@dataclasses.dataclass(eq=False)  # each is itself
class _Buffer:
    """Memory of an argument or of a kernel's result, which has no place until all is read."""

    type: TensorType
    place: Place | None = None
    first: int = 0
    last: int = 0


class _Call(NamedTuple):
    config: Any
    buffers: list[_Buffer]


_Value = _Buffer | np.ndarray  # constants are arrays until a kernel reads them


class _Reader:
    """Reads the operations of a module once, in order."""

    def __init__(self, module: Any):
        self._functions = {operation.name.value: operation for operation in module.body.operations}
        self._calls: list[_Call] = []
        self._constants: list[np.ndarray] = []

    def program(self) -> Program:
        (block,) = self._functions["main"].body.blocks
        types = tuple(_type(argument) for argument in block.arguments)
        arguments = [_Buffer(type_, Place("argument", i)) for i, type_ in enumerate(types)]
        returned = self._read(block, arguments)
        output_types = tuple(_type(value) for value in block.operations[len(block.operations) - 1].operands)
        for i, value in enumerate(returned):
            if not isinstance(value, _Buffer) or value.place is not None:
                again = isinstance(value, _Buffer) and value.place.space == "output"
                reason = f"is output {value.place.index} again" if again else "is written by no kernel"
                raise NotLaunchable(f"output {i}, {_text(output_types[i])}, {reason}")
            value.place = Place("output", i)
        workspace_bytes = self._place_the_rest()
        launches = tuple(
            Launch(
                call.config["kernel_hash"].value_bytes,
                call.config["module"].value_bytes,
                tuple(buffer.place for buffer in call.buffers),
            )
            for call in self._calls
        )
        return Program(types, output_types, tuple(self._constants), launches, workspace_bytes)

    def _place_the_rest(self) -> int:
        rest = {id(b): b for call in self._calls for b in call.buffers if b.place is None}.values()
        offsets, size = arrange([Span(buffer.type.num_bytes, buffer.first, buffer.last) for buffer in rest])
        for buffer, offset in zip(rest, offsets, strict=True):
            buffer.place = Place("workspace", 0, offset)
        return size

    def _read(self, block: Any, arguments: Iterable[_Value]) -> list[_Value]:
        values: dict[Any, _Value] = dict(zip(block.arguments, arguments, strict=True))
        for operation in block.operations:
            operands = [values[operand] for operand in operation.operands]
            name = operation.operation.name
            if name.endswith(".return"):
                return operands
            if name == "func.call":
                (inner,) = self._functions[operation.attributes["callee"].value].body.blocks
                results = self._read(inner, operands)
            elif name == "stablehlo.custom_call":
                results = self._call(operation, operands)
            else:
                results = [_without_kernel(name, operation, operands)]
            values.update(zip(operation.results, results, strict=True))
        raise AssertionError("a block without a return")

    def _call(self, operation: Any, operands: list[_Value]) -> list[_Value]:
        target = operation.attributes["call_target_name"].value
        if target != _KERNEL:
            raise NotLaunchable(f"the custom call {target} is no Mosaic kernel")
        attributes = operation.attributes
        if "output_operand_aliases" in attributes and len(attributes["output_operand_aliases"]):
            raise NotLaunchable("a Mosaic kernel writes a result over one of its operands")
        config = attributes["mhlo.backend_config"]
        if config["uses_xla_collective_metadata"].value or "xla_replica_ids" in config:
            raise NotLaunchable("a Mosaic kernel talks to other devices, for which XLA prepares it")
        step = len(self._calls)
        results = [_Buffer(_type(result), None, step, step) for result in operation.results]
        buffers = [*(self._buffer(value) for value in operands), *results]
        for buffer in buffers:
            buffer.last = step
        self._calls.append(_Call(config, buffers))
        return results

    def _buffer(self, value: _Value) -> _Buffer:
        if isinstance(value, _Buffer):
            return value
        self._constants.append(value)
        return _Buffer(TensorType(value.shape, value.dtype.name), Place("constant", len(self._constants) - 1))


def _without_kernel(name: str, operation: Any, operands: list[_Value]) -> _Value:
    """The value of an operation that costs nothing."""
    type_ = _type(operation.results[0])
    attributes = operation.attributes
    if name == "stablehlo.constant":
        return _array(attributes["value"], type_)
    if name == "stablehlo.iota":
        axis = attributes["iota_dimension"].value
        along = np.arange(type_.shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(type_.shape))])
        return np.broadcast_to(along, type_.shape).astype(jnp.dtype(type_.dtype))
    if name == "stablehlo.reshape":
        (value,) = operands
        return value.reshape(type_.shape) if isinstance(value, np.ndarray) else value
    if name == "stablehlo.broadcast_in_dim":
        (value,) = operands
        axes = list(attributes["broadcast_dimensions"])
        if isinstance(value, np.ndarray):
            shape = [1] * len(type_.shape)
            for axis, size in zip(axes, value.shape, strict=True):
                shape[axis] = size
            return np.broadcast_to(value.reshape(shape), type_.shape)
        if axes == sorted(axes) and math.prod(type_.shape) == math.prod(_type(operation.operands[0]).shape):
            return value  # a reshape by another name
    raise NotLaunchable(
        f"{name} of {', '.join(_text(_type(operand)) for operand in operation.operands)} is no Mosaic kernel"
    )


def _array(value: Any, type_: TensorType) -> np.ndarray:
    dtype = jnp.dtype(type_.dtype)
    if value.is_splat:
        return np.full(type_.shape, value.get_splat_value().value, dtype)
    try:
        return np.array(value).astype(dtype).reshape(type_.shape)
    except (BufferError, TypeError, ValueError) as error:
        raise NotLaunchable(f"a constant {_text(type_)} cannot be read: {error}") from error


def _type(value: Any) -> TensorType:
    element = str(value.type.element_type)
    if element not in _DTYPES:
        raise NotLaunchable(f"a tensor of {element} has no dtype that a kernel could be given")
    return TensorType(tuple(value.type.shape), _DTYPES[element])


def _text(type_: TensorType) -> str:
    names = {dtype: element for element, dtype in _DTYPES.items()}
    return "x".join([*map(str, type_.shape), names[type_.dtype]])
