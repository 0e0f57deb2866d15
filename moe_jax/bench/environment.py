"""Where a measurement was taken: device, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from moe_jax import _compat


def has_gpu() -> bool:
    """Whether a jit call runs on a GPU."""
    return _compat.default_device().platform in ("gpu", "cuda")


def source_commit() -> str | None:
    """Short hash of the checkout that moe_jax runs from, ``+changes`` if its files differ; None if it is no checkout."""
    package = Path(__file__).parents[1]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True)
        except OSError:  # no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie in a virtual environment inside of some other checkout.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--", ".") else commit


def describe(commit: str | None, packages: Iterable[str]) -> dict[str, Any]:
    """The head of a result file.

    Args:
        commit: of the source; None asks git.
        packages: what the peers need, as pip calls it.
    """
    device = _compat.default_device()
    versions: dict[str, str | None] = {}
    for package in ("moe_jax", "jax", "jaxlib", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # the peer's row says so
            versions[package] = None
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "commit": commit or source_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "host": {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "platform": " ".join(device.client.platform_version.split()),
        "versions": versions,
    }
