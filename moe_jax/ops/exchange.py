"""Exchange: rows of one rank into the rows of others, over a mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from moe_jax.ops import implementation as impl


def send_rows(
    arrays: Sequence[Shaped[Array, "T _"]],
    destinations: Int[Array, "T K"],
    *,
    num_rows: int,
    axis_names: tuple[str, ...],
    notes: Shaped[Array, "T V"] | None = None,
    implementation: str = "auto",
) -> tuple[list[Shaped[Array, "N _"]], Shaped[Array, "ranks T V"] | None]:
    """Each row of this rank to up to K places, of any ranks. Inside `shard_map`; every rank of the axes takes part.

    It serves both ways of expert parallelism: tokens to the ranks of their experts, and results back. The kernel writes straight
    into the memory of the other GPUs, which therefore must be reachable by NVLink or PCIe from each other.

    Args:
        arrays: what a row consists of, all with the same T.
        destinations: int32 ``[T, K]``, each ``rank * num_rows + row there``, or -1. No place may be named twice, by any rank.
        num_rows: N, the rows that a rank can be sent.
        axis_names: of the mesh: ranks count along them, the last one fastest. None of them: this rank alone.
        notes: ``[T, V]`` of 4 bytes each, what goes to every rank, whatever the destinations.
        implementation: ``auto``, ``xla`` (which gathers everything everywhere), ``mosaic``, or ``mosaic_interpret`` without axes.

    Returns:
        The rows that were sent here, ``[N, W]`` each, and the notes of all ranks. Rows that nobody sent are undefined.

    Example:
        >>> x = jnp.array([[1.0], [2.0]])
        >>> (rows,), notes = send_rows([x], jnp.array([[2], [0]]), num_rows=3, axis_names=(), notes=jnp.array([[7], [8]]))
        >>> rows.tolist(), notes.tolist()
        ([[2.0], [0.0], [1.0]], [[[7], [8]]])
    """
    from moe_jax.kernels.hopper import send_rows as kernel

    impl.check_name(implementation)
    arrays, tokens = list(arrays), destinations.shape[0]
    ranks = math.prod(lax.axis_size(name) for name in axis_names)
    if tokens == 0 or destinations.shape[1] == 0:
        rows = [jnp.zeros((num_rows, array.shape[1]), array.dtype) for array in arrays]
        return rows, None if notes is None else jnp.zeros((ranks, *notes.shape), notes.dtype)

    def plain(arrays, destinations, notes):
        me = lax.axis_index(axis_names) if axis_names else 0

        def of_all(array):
            return lax.all_gather(array, axis_names) if axis_names else array[None]

        places = of_all(destinations).reshape(-1) - me * num_rows
        places = jnp.where((places >= 0) & (places < num_rows), places, num_rows)

        def place(array):
            rows = jnp.repeat(of_all(array).reshape(-1, array.shape[1]), destinations.shape[1], axis=0)
            return jnp.zeros((num_rows, array.shape[1]), array.dtype).at[places].set(rows, mode="drop")

        return [place(array) for array in arrays], None if notes is None else of_all(notes)

    widths = [array.shape[1] for array in arrays]
    padded = [_padded(array, kernel.BULK) for array in arrays]
    chosen = impl.choose("send_rows", implementation, kernel.supports(padded))
    if chosen == "xla":
        return plain(arrays, destinations, notes)

    def run(arrays, destinations, notes):
        arrays = [_padded(array, kernel.BULK) for array in arrays]
        options = {"num_rows": num_rows, "axis_names": axis_names, "interpret": impl.interpret_params(chosen)}
        rows, found = kernel.send_rows(arrays, destinations, notes, **options)
        return [row[:, :width] for row, width in zip(rows, widths, strict=True)], found

    return impl.with_plain_gradient(run, plain)(arrays, destinations, notes)


def _padded(array: Array, multiple: int) -> Array:
    """With columns of 0 up to a row of a multiple of so many bytes."""
    return jnp.pad(array, [(0, 0), (0, -array.shape[1] % (multiple // array.dtype.itemsize))])
