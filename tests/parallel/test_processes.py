"""Nothing assumes one process: two of them, with four devices each, hold a layer together."""

import os
import pathlib

import pytest

from tests.parallel.process import run_both

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.once
def test_two_processes():
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "interop")]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    run_both("cpu", env, str(ROOT))
