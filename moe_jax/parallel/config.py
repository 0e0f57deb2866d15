"""How many ranks hold a layer together, which axes of a mesh they are, and whether they split experts or share each one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int

from moe_jax.fields import check_bool, check_int, set_field

Axes = str | tuple[str, ...]

KINDS = ("dp", "pcp", "tp")  # from the slowest to the fastest in the order of ranks


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of data, prefill-context and tensor parallelism together hold one Mixture-of-Experts layer.

    With expert parallelism all of them, ``dp * pcp * tp`` ranks, share the experts out, and each expert is whole on its rank.
    Without it all of them share the intermediate size of every expert: tensor parallelism spans the ranks of data parallelism.
    Rank ``(dp_rank * pcp_size + pcp_rank) * tp_size + tp_rank`` is the place among them, in both cases.

    Attributes:
        tp_size: ranks of tensor parallelism. They hold the same tokens, unless `sequence_parallel`.
        pcp_size: ranks of prefill-context parallelism, each with a part of the sequences.
        dp_size: ranks of data parallelism, each with a batch of its own.
        enable_expert_parallel: split the experts, not their intermediate size.
        sequence_parallel: the ranks of tensor parallelism hold a part of the tokens each.
        tp_axis, pcp_axis, dp_axis: the axis of the mesh, or several, the slowest first. None: not on the mesh, the size is 1. An
            axis of size 1 may be missing on the mesh.

    Raises:
        ValueError, TypeError: sizes below 1, an axis named twice or missing, `sequence_parallel` without its conditions.

    Source: vLLM's ``FusedMoEParallelConfig.make``.

    Example:
        >>> parallel = ParallelConfig(tp_size=2, dp_size=2, enable_expert_parallel=True)
        >>> parallel.ep_size, parallel.experts_tp_size, parallel.expert_axes
        (4, 1, ('dp', 'tp'))
        >>> ParallelConfig(tp_size=2, dp_size=2).experts_tp_size
        4
    """

    tp_size: int = 1
    pcp_size: int = 1
    dp_size: int = 1
    enable_expert_parallel: bool = False
    sequence_parallel: bool = False
    tp_axis: Axes | None = "tp"
    pcp_axis: Axes | None = "pcp"
    dp_axis: Axes | None = "dp"

    def __post_init__(self) -> None:
        for kind in KINDS:
            check_int(self, f"{kind}_size", 1)
            self._check_axis(kind)
        for name in ("enable_expert_parallel", "sequence_parallel"):
            check_bool(self, name)
        axes = self.expert_axes
        if len(set(axes)) < len(axes):
            raise ValueError(f"the axes {axes} name one twice; every kind of parallelism has axes of its own")
        if self.sequence_parallel and not (self.enable_expert_parallel and self.tp_size > 1):
            raise ValueError(
                f"sequence_parallel=True needs enable_expert_parallel=True and tp_size > 1, got "
                f"enable_expert_parallel={self.enable_expert_parallel} and tp_size={self.tp_size}: it shares the tokens of "
                "a replica out over the ranks of tensor parallelism, each of which holds whole experts"
            )

    def _check_axis(self, kind: str) -> None:
        name, size = f"{kind}_axis", getattr(self, f"{kind}_size")
        axis = getattr(self, name)
        if isinstance(axis, list):
            axis = tuple(axis)
            set_field(self, name, axis)
        names = axis if isinstance(axis, tuple) else (axis,)
        if axis is not None and not (names and all(isinstance(one, str) and one for one in names)):
            raise TypeError(f"{name}={axis!r} must be the name of a mesh axis, a tuple of names, or None")
        if axis is None and size > 1:
            raise ValueError(f"{name}=None says that the mesh has no such axis, but {kind}_size={size}; name the axis")

    @classmethod
    def of_mesh(
        cls,
        mesh: Mesh | AbstractMesh,
        *,
        enable_expert_parallel: bool = False,
        sequence_parallel: bool = False,
        tp_axis: Axes | None = None,
        pcp_axis: Axes | None = None,
        dp_axis: Axes | None = None,
    ) -> ParallelConfig:
        """The sizes that the axes of a mesh have.

        Args:
            mesh: concrete or abstract. Axes that are not named here are left alone.
            enable_expert_parallel, sequence_parallel: as in `ParallelConfig`.
            tp_axis, pcp_axis, dp_axis: None is the axis ``tp``, ``pcp`` or ``dp`` of the mesh, or size 1 if it has none.

        Raises:
            ValueError: an axis that the mesh does not have, or none at all.

        Example:
            >>> from jax.sharding import AbstractMesh
            >>> parallel = ParallelConfig.of_mesh(AbstractMesh((2, 4), ("data", "tp")), dp_axis="data")
            >>> parallel.dp_size, parallel.tp_size, parallel.expert_axes
            (2, 4, ('data', 'tp'))
        """
        found: dict[str, Any] = {}
        for kind, axis in zip(KINDS, (dp_axis, pcp_axis, tp_axis), strict=True):
            if axis is None and kind in mesh.shape:
                axis = kind
            found[f"{kind}_axis"] = axis
            found[f"{kind}_size"] = math.prod(_size(mesh, one, f"{kind}_axis={axis!r}") for one in _names(axis))
        if all(found[f"{kind}_axis"] is None for kind in KINDS):
            raise ValueError(f"the mesh has the axes {dict(mesh.shape)}, none of them {KINDS}; name them, tp_axis=...")
        return cls(enable_expert_parallel=enable_expert_parallel, sequence_parallel=sequence_parallel, **found)

    @property
    def flattened_size(self) -> int:
        """Ranks that hold the layer together."""
        return self.dp_size * self.pcp_size * self.tp_size

    @property
    def use_ep(self) -> bool:
        """Whether the ranks split the experts."""
        return self.enable_expert_parallel and self.flattened_size > 1

    @property
    def ep_size(self) -> int:
        """Parts that the experts are split into."""
        return self.flattened_size if self.use_ep else 1

    @property
    def experts_tp_size(self) -> int:
        """Parts that the intermediate size of each expert is split into."""
        return 1 if self.use_ep else self.flattened_size

    @property
    def uses_exchange(self) -> bool:
        """Whether ranks with tokens of their own have experts for the tokens of others."""
        return self.use_ep and self.num_token_shards > 1

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """Axes of the mesh over which the weights are split, in the order of ranks; those of size 1 left out."""
        return tuple(self._axes(*KINDS))

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Axes of the mesh over which the tokens are split, in the order of ranks; those of size 1 left out."""
        return tuple(self._axes("dp", "pcp", *(("tp",) if self.sequence_parallel else ())))

    @property
    def num_token_shards(self) -> int:
        """Ranks, or groups of ranks, that hold tokens of their own."""
        return self.dp_size * self.pcp_size * (self.tp_size if self.sequence_parallel else 1)

    def _axes(self, *kinds: str) -> Iterator[str]:
        for kind in kinds:
            if getattr(self, f"{kind}_size") > 1:
                yield from _names(getattr(self, f"{kind}_axis"))

    def rank(self) -> Int[Array, ""]:
        """The rank that runs this, inside `jax.shard_map`: that of its experts, or of its part of every expert.

        Example:
            >>> int(ParallelConfig().rank())
            0
        """
        return lax.axis_index(self.expert_axes) if self.expert_axes else jnp.int32(0)

    def rank_of(self, *, dp_rank: int = 0, pcp_rank: int = 0, tp_rank: int = 0) -> int:
        """The rank with these ranks of data, prefill-context and tensor parallelism.

        Raises:
            ValueError: a rank outside its size.

        Example:
            >>> ParallelConfig(tp_size=2, dp_size=3).rank_of(dp_rank=2, tp_rank=1)
            5
        """
        rank = 0
        for kind, value in zip(KINDS, (dp_rank, pcp_rank, tp_rank), strict=True):
            size = getattr(self, f"{kind}_size")
            if not 0 <= value < size:
                raise ValueError(f"{kind}_rank={value} must lie in [0, {kind}_size={size})")
            rank = rank * size + value
        return rank

    def check_mesh(self, mesh: Mesh | AbstractMesh) -> None:
        """Refuses a mesh that lacks an axis, or has another size along it.

        Raises:
            ValueError: names the axis and both sizes.

        Example:
            >>> from jax.sharding import AbstractMesh
            >>> ParallelConfig(tp_size=2).check_mesh(AbstractMesh((2,), ("tp",)))
        """
        for kind in KINDS:
            size, axis = getattr(self, f"{kind}_size"), getattr(self, f"{kind}_axis")
            if size == 1 and not set(_names(axis)) <= set(mesh.shape):
                continue
            sizes = [_size(mesh, one, f"{kind}_axis={axis!r} of {kind}_size={size}") for one in _names(axis)]
            if math.prod(sizes) != size:
                raise ValueError(
                    f"{kind}_size={size}, but the mesh has size {' * '.join(map(str, sizes))} along {kind}_axis={axis!r}; "
                    "make them agree, or take ParallelConfig.of_mesh(mesh)"
                )


def _names(axis: Axes | None) -> tuple[str, ...]:
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else axis


def _size(mesh: Mesh | AbstractMesh, axis: str, what: str) -> int:
    if axis not in mesh.shape:
        raise ValueError(f"{what} is not on the mesh, whose axes are {dict(mesh.shape)}; name one of these")
    return mesh.shape[axis]
