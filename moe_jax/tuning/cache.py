"""Where tuned plans are kept: one JSON file per kind of device, looked for in three folders, read once per process.

A file that cannot be read, or an entry that cannot be used, is said once in a warning and passed over.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_jax import _compat
from moe_jax.tuning import schema
from moe_jax.tuning.plan import LayerPlan, LayerShape
from moe_jax.tuning.schema import TunedEntry

NEAR = 2.0  # a plan serves up to this many times more, or fewer, pairs than it was measured with
SHIPPED = Path(__file__).parent / "configs"


class TuningWarning(UserWarning):
    """A file of tuned plans, or some of its entries, cannot be used; the default rule stands in."""


class Tuned(NamedTuple):
    """A tuned plan and where it comes from.

    Attributes:
        shape: what was measured; its `num_pairs` may differ from what was asked for.
        plan: the fastest.
        path: the file.
    """

    shape: LayerShape
    plan: LayerPlan
    path: Path


def folders() -> tuple[Path, ...]:
    """Where tuned plans are looked for, in this order: ``$MOE_JAX_TUNED_DIR``, the user's cache, what moe_jax ships."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    named = os.environ.get("MOE_JAX_TUNED_DIR")
    found = [Path(named).expanduser()] if named else []
    return (*found, Path(cache) / "moe_jax", SHIPPED)


def user_folder() -> Path:
    """Where `moe-jax tune` writes by default, the first of `folders`."""
    return folders()[0]


def device_kind() -> str:
    """The kind of device that a jit call runs on, as its maker calls it."""
    return _compat.default_device().device_kind


def file_name(kind: str) -> str:
    """The file of a kind of device.

    Example:
        >>> file_name("NVIDIA H100 80GB HBM3")
        'nvidia_h100_80gb_hbm3.json'
    """
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json"


def find_tuned(shape: LayerShape) -> Tuned | None:
    """The tuned plan for a shape on this kind of device: of the first folder that has one, the nearest measured size.

    Near is measured in ratios of `num_pairs`; what is further off than `NEAR` does not count.

    Example:
        >>> find_tuned(LayerShape(3, 0, 16, 16, gated=True, dtype="bfloat16")) is None
        True
    """
    if shape.num_pairs < 1:
        return None

    def distance(entry: TunedEntry) -> float:
        return abs(math.log(entry.shape.num_pairs / shape.num_pairs))

    name = file_name(device_kind())
    for folder in folders():
        entries = [e for e in read(folder / name) if e.shape.problem == shape.problem]
        nearest = min(entries, key=distance, default=None)
        if nearest is not None and distance(nearest) <= math.log(NEAR) + 1e-9:
            return Tuned(nearest.shape, nearest.plan, folder / name)
    return None


@functools.cache
def read(path: Path) -> tuple[TunedEntry, ...]:
    """The entries of a file, once per process; what cannot be used is left out with one `TuningWarning`.

    A file that does not exist has no entries.
    """
    try:
        entries, problems = _load(path)
    except ValueError as error:
        entries, problems = (), [str(error)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        warnings.warn(
            f"tuned plans in {path} are passed over, and the default rule stands in: {'; '.join(problems[:3])}{more}. "
            f"Delete the file, or measure again with `moe-jax tune --again --out {path.parent}`",
            TuningWarning,
            stacklevel=3,
        )
    return entries


def forget() -> None:
    """Makes this process read the files again.

    For those who change files under a running process. What jit has compiled keeps its plan: see `jax.clear_caches`.
    """
    read.cache_clear()


def _raw(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None if there is no file.

    Raises:
        ValueError: it cannot be read, or is of another version.
    """
    try:
        raw = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("entries"), list):
        raise ValueError("it is not an object with a list of entries")
    if raw.get("version") != schema.VERSION:
        raise ValueError(f"its version {raw.get('version')!r} is not {schema.VERSION}, which this moe_jax reads")
    return raw


def _load(path: Path) -> tuple[tuple[TunedEntry, ...], list[str]]:
    """(entries, why others cannot be used)."""
    entries, problems = [], []
    for index, raw in enumerate((_raw(path) or {"entries": []})["entries"]):
        try:
            entries.append(schema.decode(raw))
        except ValueError as error:
            problems.append(f"entry {index}: {error}")
    return tuple(entries), problems


def check_writable(folder: Path) -> None:
    """Raises ValueError if `save` could not add to this folder's file; makes the folder."""
    path = folder / file_name(device_kind())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder} ({error.strerror}); name another") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write to the folder {folder}; name another")
    try:
        _raw(path)
    except ValueError as error:
        raise ValueError(f"cannot add to {path}: {error}; move it away, or name another folder") from error


def save(folder: Path, entry: TunedEntry) -> Path:
    """Adds an entry to the file of this kind of device, in the place of one of the same shape.

    The file is replaced as a whole: a reader sees the old one or the new one. One writer at a time. Other entries stay as
    they are, also those that this version cannot use.

    Returns:
        The file.

    Raises:
        ValueError: the file that is there cannot be read.
        OSError: the folder cannot be written to.
    """
    kind = device_kind()
    path = folder / file_name(kind)
    new = schema.encode(entry)
    others = [e for e in (_raw(path) or {"entries": []})["entries"] if not _has_shape(e, new["shape"])]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    head = {"version": schema.VERSION, "device": kind, "jax": jax.__version__, "date": today}
    lines = ",\n".join(
        json.dumps(e) for e in [*others, new]
    )  # one entry a line: versions of the file are easy to compare
    text = json.dumps(head)[:-1] + ', "entries": [\n' + lines + "\n]}\n"
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    forget()
    return path


def _has_shape(raw: Any, shape: dict[str, Any]) -> bool:
    return isinstance(raw, dict) and raw.get("shape") == shape


def stored(folder: Path, shape: LayerShape) -> TunedEntry | None:
    """The entry of exactly this shape in a folder, for a search that goes on where another one stopped."""
    return next((e for e in read(folder / file_name(device_kind())) if e.shape == shape), None)
