"""Two processes with a GPU each hold a layer together."""

import os
import pathlib

import jax
import pytest

from moe_jax import _compat
from tests.parallel.process import run_both

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.gpu
def test_two_processes():
    count = len(jax.devices("cuda"))
    if count < 2:
        pytest.skip(f"needs 2 GPUs, there are {count}")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "interop")]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_compat.RAGGED_FLAG}=true",
    }
    run_both("cuda", env, str(ROOT))
