"""How the kernels of this folder are interpreted on a CPU: on two multiprocessors, and with races detected.

The tests of this folder need neither torch nor transformers: they also run in an environment with the newest JAX alone.
"""

import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat
from moe_jax.kernels.hopper import matmul_config
from tests.lowering import FEW_ROW_COUNTS


def quick_callbacks(patch):
    """Lets an interpreted kernel call Python, which it does for each of its steps, with NumPy arrays.

    JAX would put every argument on a device, and the callback would take it off again: more than half of a step. A JAX that is
    made in another way runs as it does.
    """
    try:
        from jax._src import callback as jax_callback
        from jax._src.pallas.mosaic_gpu.interpret import shared_memory

        assert jax_callback.io_callback_impl
        to_int = shared_memory._to_int
    except (ImportError, AttributeError):
        return

    def io_callback_impl(*args, callback, **_):
        copies = (np.array(arg) for arg in args)  # the program may go on to overwrite what it passed
        return [np.asarray(out) for out in callback(*copies)]

    patch.setattr(jax_callback, "io_callback_impl", io_callback_impl)
    patch.setattr(shared_memory, "_to_int", lambda x: x.item() if isinstance(x, np.ndarray) else to_int(x))


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, capsys):
    """`implementation="mosaic_interpret"` with race detection; a race that the interpreter reports fails the test.

    Blocks of a grid are interpreted one after the other and every operation on a scalar is a call of Python: with the
    multiprocessors of a real GPU most of the time would go to blocks that have no work.
    """
    monkeypatch.setattr(_compat, "num_multiprocessors", lambda: 2)
    # Each row count of a tile is a copy of the kernel's loop to be traced and compiled: a few, but where all are the subject.
    for name, counts in FEW_ROW_COUNTS.items():
        monkeypatch.setattr(matmul_config, name, counts)
    quick_callbacks(monkeypatch)
    monkeypatch.setattr(_compat, "interpret_params", lambda: plgpu.InterpretGPUParams(detect_races=True))
    yield
    printed = capsys.readouterr().out
    _compat.reset_interpreter()  # an exception inside a kernel would be met again by the next one
    assert "RACE DETECTED" not in printed, printed
