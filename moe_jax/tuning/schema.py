"""Tuned plans as JSON: an object per entry, checked field by field when it is read."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.tuning.fit import misfit
from moe_jax.tuning.plan import LayerPlan, LayerShape

VERSION = 1


class TunedEntry(typing.NamedTuple):
    """A finished search.

    Attributes:
        shape: what was measured.
        plan: the fastest.
        default_us: microseconds of the layer under the default rule.
        tuned_us: microseconds of the layer under the plan.
    """

    shape: LayerShape
    plan: LayerPlan
    default_us: float
    tuned_us: float


def encode(entry: TunedEntry) -> dict[str, Any]:
    """The entry as a JSON object.

    Example:
        >>> from moe_jax.tuning.plan import default_plan
        >>> shape = LayerShape(8, 64, 256, 128, gated=True, dtype="bfloat16")
        >>> entry = TunedEntry(shape, default_plan(shape), 20.0, 20.0)
        >>> decode(encode(entry)) == entry
        True
    """
    times = {"default_us": round(entry.default_us, 2), "tuned_us": round(entry.tuned_us, 2)}
    return {"shape": dataclasses.asdict(entry.shape), "plan": dataclasses.asdict(entry.plan)} | times


def decode(raw: Any) -> TunedEntry:
    """The entry of a JSON object.

    Raises:
        ValueError: an object that lacks something, fields that this version does not know, a plan that does not fit its
            shape.
    """
    fields = _object(raw, "an entry", ("shape", "plan", "default_us", "tuned_us"))
    shape = _dataclass(LayerShape, fields["shape"])
    if min(shape.num_local_experts, shape.num_pairs) < 1:
        raise ValueError(f"{shape.num_pairs} pairs on {shape.num_local_experts} experts: there must be at least one")
    plan = _object(fields["plan"], "a plan", ("tile_rows", "up", "down"))
    tile_rows = _checked(int, plan["tile_rows"], "tile_rows")
    up, down = _dataclass(Config, plan["up"]), _dataclass(Config, plan["down"])
    if not (up.row_counts and down.row_counts):
        raise ValueError("row_counts are empty")
    plan = LayerPlan(tile_rows, up, down)
    reason = misfit(shape, plan)
    if reason:
        raise ValueError(reason)
    times = (float(_checked(float, fields[name], name)) for name in ("default_us", "tuned_us"))
    return TunedEntry(shape, plan, *times)


def _object(raw: Any, what: str, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"{what} is {raw!r:.80}, not an object")
    missing = [name for name in names if name not in raw]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    return raw


def _dataclass[T](cls: type[T], raw: Any) -> T:
    """Fields that were added later have a default and may be missing; fields that were not known are an error."""
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    needed = tuple(f.name for f in fields if f.default is dataclasses.MISSING)
    raw = _object(raw, cls.__name__, needed)
    unknown = sorted(raw.keys() - {f.name for f in fields})
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)} in this version of moe_jax")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _checked(hints[name], value, name) for name, value in raw.items()})


def _checked(hint: Any, value: Any, name: str) -> Any:
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_checked(typing.get_args(hint)[0], item, name) for item in value)
    accepted = (int, float) if hint is float else hint
    plain = isinstance(accepted, type | tuple) and typing.get_origin(hint) is None
    if not plain or not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{name}={value!r:.80} must be {getattr(hint, '__name__', hint)}")
    return value
