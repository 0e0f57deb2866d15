"""The interpreter that the other tests of this folder trust: it sees races, and what a kernel did not write is NaN."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat


def copy_through_shared_memory(x, *, with_barrier):
    """One warpgroup stores to shared memory what another one loads."""

    def body(x_g, out_g, shared, stored):
        warpgroup = jax.lax.axis_index("wg")

        @pl.when(warpgroup == 0)
        def _():
            shared[...] = x_g[...]

        if with_barrier:
            plgpu.barrier_arrive(stored)
            plgpu.barrier_wait(stored)

        @pl.when(warpgroup == 1)
        def _():
            out_g[...] = shared[...]

    return _compat.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(1,),
        grid_names=("sm",),
        num_threads=2,
        thread_name="wg",
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier(num_arrivals=2)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=_compat.LANE),
        interpret=_compat.interpret_params(),
    )(x)


def test_a_race_is_seen(capsys):
    x = jnp.arange(128, dtype=jnp.float32)
    raised = ""
    try:
        jax.block_until_ready(copy_through_shared_memory(x, with_barrier=False))
    except jax.errors.JaxRuntimeError as error:  # from jax 0.12 on a race is an error, before it is printed
        raised = str(error)
        _compat.reset_interpreter()
    assert "RACE DETECTED" in capsys.readouterr().out + raised


def test_no_race_is_seen_where_there_is_none(capsys):
    x = jnp.arange(128, dtype=jnp.float32)
    np.testing.assert_array_equal(copy_through_shared_memory(x, with_barrier=True), x)
    assert "RACE DETECTED" not in capsys.readouterr().out


def test_what_is_not_written_is_nan():
    def body(out_g):
        out_g[pl.ds(0, 128)] = jnp.zeros(128, jnp.float32)

    out = _compat.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((256,), jnp.float32),
        grid=(1,),
        grid_names=("sm",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=_compat.LANE),
        interpret=_compat.interpret_params(),
    )()
    assert np.isnan(np.asarray(out)[128:]).all() and not np.asarray(out)[:128].any()
