"""Which exchange the ranks of a mesh use, and why no better one."""

from __future__ import annotations

import functools
import math
import warnings
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from moe_jax import _compat
from moe_jax.config import MoEConfig
from moe_jax.ops.implementation import SlowPathWarning, platform_reason
from moe_jax.parallel.all_to_all import AllToAll
from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.exchange import Exchange
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.no_exchange import NoExchange
from moe_jax.parallel.peer import PeerExchange

CANDIDATES = (NoExchange(), PeerExchange(), AllToAll(), AllGatherReduceScatter())


class Candidate(NamedTuple):
    """An exchange, and the reason against it; None if there is none."""

    exchange: Exchange
    reason: str | None


class Choice(NamedTuple):
    """An exchange, and the reasons against those that would have come first."""

    exchange: Exchange
    reason: str


def explain_exchanges(
    parallel: ParallelConfig,
    mesh: Mesh | AbstractMesh | None = None,
    config: MoEConfig | None = None,
    implementation: str = "auto",
) -> list[Candidate]:
    """All exchanges in the order in which they are tried, with the reason against each.

    Args:
        parallel: the ranks.
        mesh: with devices, if these are known; otherwise all that JAX sees are meant.
        config: the layer, whose hidden size a kernel may not support.
        implementation: of the layer; with ``xla`` no kernel of ours is used.

    Example:
        >>> parallel = ParallelConfig(dp_size=2, enable_expert_parallel=True)
        >>> for exchange, reason in explain_exchanges(parallel, implementation="xla"):
        ...     print(type(exchange).__name__, "can be used" if reason is None else reason[:44])
        NoExchange tokens are split over the axes ('dp',), and
        PeerExchange implementation='xla' asks for no kernels
        AllToAll can be used
        AllGatherReduceScatter can be used
    """
    found = []
    for exchange in CANDIDATES:
        reason = exchange.reason_against(parallel)
        if reason is None and isinstance(exchange, PeerExchange):
            reason = _peer_reason(parallel, mesh, config, implementation)
        elif reason is None and isinstance(exchange, AllToAll):
            reason = _ragged_reason(parallel, mesh)
        found.append(Candidate(exchange, reason))
    return found


def choose_exchange(
    parallel: ParallelConfig,
    mesh: Mesh | AbstractMesh | None = None,
    config: MoEConfig | None = None,
    implementation: str = "auto",
) -> Choice:
    """The first exchange without a reason against it; arguments as in `explain_exchanges`.

    GPUs that could have our kernels but do not reach each other warn once.

    Example:
        >>> choose_exchange(ParallelConfig(tp_size=2)).exchange
        NoExchange(quantize_before=False)
    """
    candidates = explain_exchanges(parallel, mesh, config, implementation)
    first = next(i for i, candidate in enumerate(candidates) if candidate.reason is None)
    against = {type(exchange).__name__: reason for exchange, reason in candidates[:first]}
    chosen = candidates[first].exchange
    if (
        isinstance(chosen, AllToAll)
        and implementation != "xla"
        and _platform(mesh) is None
        and "PeerExchange" in against
    ):
        _warn_once(against["PeerExchange"])
    return Choice(chosen, "; ".join(f"not {name}: {reason}" for name, reason in against.items()) or "the first choice")


@functools.cache
def _warn_once(reason: str) -> None:
    message = f"tokens are exchanged by XLA's collectives, which are slow, not by PeerExchange: {reason}"
    warnings.warn(message, SlowPathWarning, stacklevel=4)


def _peer_reason(
    parallel: ParallelConfig, mesh: Mesh | AbstractMesh | None, config: MoEConfig | None, implementation: str
) -> str | None:
    from moe_jax.kernels.hopper import send_rows

    if implementation == "xla":
        return "implementation='xla' asks for no kernels"
    reason = _platform(mesh) or _reach(parallel, mesh)
    if reason is None and config is not None:
        row = -(-config.hidden_size // send_rows.BULK) * send_rows.BULK
        reason = send_rows.supports([jax.ShapeDtypeStruct((1, row), config.dtype)])
    return reason


def _ragged_reason(parallel: ParallelConfig, mesh: Mesh | AbstractMesh | None) -> str | None:
    """Why XLA does not run its ragged all-to-all; None if it does."""
    if _platform(mesh) is not None or _reach(parallel, mesh) is None or _compat.ragged_all_to_all_between_processes():
        return None
    return (
        "XLA refuses jax.lax.ragged_all_to_all between GPUs of several processes; start them with "
        f"XLA_FLAGS={_compat.RAGGED_FLAG}=true, or use AllGatherReduceScatter()"
    )


def _platform(mesh: Mesh | AbstractMesh | None) -> str | None:
    """Why our kernels cannot run on the devices; None if they can."""
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else _compat.default_device().platform
    return platform_reason(None if platform in ("gpu", "cuda") else platform)


def _reach(parallel: ParallelConfig, mesh: Mesh | AbstractMesh | None) -> str | None:
    """Why ranks that exchange tokens cannot write into each other's memory; None if they can."""
    if isinstance(mesh, Mesh):
        process_of = _processes(mesh)
        axes = [mesh.axis_names.index(axis) for axis in parallel.token_axes]
        groups = np.moveaxis(process_of, axes, range(len(axes)))
        groups = groups.reshape(math.prod(groups.shape[: len(axes)]), -1)
        if (groups == groups[:1]).all():
            return None
        processes = sorted(set(groups[:, 0].tolist()))
    else:
        processes = list(range(jax.process_count()))
        if len(processes) == 1:
            return None
    return (
        f"ranks along {parallel.token_axes} belong to the processes {processes}, but only GPUs of one process can write into "
        "each other's memory; let the axes of tokens stay within a process"
    )


def _processes(mesh: Mesh) -> np.ndarray:
    """The process of each device."""
    return np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
