"""Which implementation runs: by name, by what the device is, and with a warning where a GPU has to go without a kernel."""

import types
import warnings

import jax
import jax.numpy as jnp
import pytest

from moe_jax import _compat
from moe_jax.config import RoutingConfig
from moe_jax.ops import implementation as impl
from moe_jax.ops.combine import combine
from moe_jax.ops.gather import gather
from moe_jax.ops.group_tokens import group_tokens
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.topk import topk

REASON = "hidden_size=7 must be a multiple of 8"


@pytest.fixture
def on(monkeypatch):
    """Pretends that jit calls run on a device of this platform and compute capability."""

    def pretend(platform, capability="9.0"):
        device = types.SimpleNamespace(platform=platform, compute_capability=capability)
        monkeypatch.setattr(_compat, "default_device", lambda: device)

    impl._warn_once.cache_clear()
    yield pretend
    impl._warn_once.cache_clear()


@pytest.mark.parametrize("reason", [None, REASON])
def test_xla_always_runs(reason, on):
    for platform in ("cpu", "gpu"):
        on(platform)
        assert impl.choose("combine", "xla", reason) == "xla"


@pytest.mark.parametrize("name", ["mosaic", "mosaic_interpret"])
def test_a_kernel_by_name_runs_or_says_why_not(name, on):
    on("cpu")  # where it can still be lowered for a GPU
    assert impl.choose("combine", name, None) == name
    with pytest.raises(ValueError, match=f"implementation='{name}' cannot run combine: {REASON}"):
        impl.choose("combine", name, REASON)


def test_auto_takes_the_kernel_on_a_hopper_gpu(on):
    on("gpu", "9.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert impl.choose("combine", "auto", None) == "mosaic"


@pytest.mark.parametrize("device", [("cpu", None), ("tpu", None), ("gpu", "8.0"), ("gpu", "10.0"), ("gpu", None)])
def test_auto_takes_plain_jax_elsewhere_in_silence(device, on):
    on(*device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert impl.choose("combine", "auto", None) == impl.choose("combine", "auto", REASON) == "xla"
    assert (device[1] or device[0]) in impl.platform_reason() or device == ("gpu", None)


def test_a_gpu_without_a_kernel_warns_once_with_the_reason(on):
    on("gpu")
    with pytest.warns(impl.SlowPathWarning, match=f"combine.*plain-JAX.*slow: {REASON}"):
        assert impl.choose("combine", "auto", REASON) == "xla"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert impl.choose("combine", "auto", REASON) == "xla"
    with pytest.warns(impl.SlowPathWarning, match="another reason"):
        impl.choose("combine", "auto", "another reason")
    with pytest.warns(impl.SlowPathWarning, match="gather"):
        impl.choose("gather", "auto", REASON)


def test_platforms_by_name():
    assert impl.platform_reason("gpu") is impl.platform_reason("cuda") is None
    assert "cpu" in impl.platform_reason("cpu")


def test_the_default_device_is_looked_at():
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        assert _compat.default_device() == cpu
        assert "cpu" in impl.platform_reason()


GROUPS = group_tokens(jnp.zeros((2, 1), jnp.int32), num_experts=4, tile_rows=64, implementation="xla")
CALLS = {
    "topk": lambda name: topk(jnp.zeros((2, 4)), 2, RoutingConfig("default").rule, implementation=name),
    "group_tokens": lambda name: group_tokens(jnp.zeros((2, 1), jnp.int32), num_experts=4, implementation=name),
    "gather": lambda name: gather(jnp.ones((2, 16), jnp.bfloat16), GROUPS, implementation=name),
    "grouped_matmul": lambda name: grouped_matmul(
        jnp.ones((GROUPS.num_rows, 16)), jnp.ones((4, 16, 16)), GROUPS, implementation=name
    ),
    "combine": lambda name: combine(jnp.ones((64, 16)), GROUPS.positions, None, implementation=name),
}


@pytest.mark.parametrize("op", CALLS)
def test_every_operation_refuses_unknown_names(op):
    CALLS[op]("xla")
    with pytest.raises(ValueError, match="implementation='triton' must be one of auto, xla, mosaic, mosaic_interpret"):
        CALLS[op]("triton")


NO_GROUPS = group_tokens(jnp.zeros((0, 1), jnp.int32), num_experts=4, implementation="xla")
EMPTY_CALLS = {
    "topk": lambda name: topk(jnp.zeros((0, 4)), 2, RoutingConfig("default").rule, implementation=name),
    "group_tokens": lambda name: group_tokens(jnp.zeros((0, 1), jnp.int32), num_experts=4, implementation=name),
    "gather": lambda name: gather(jnp.ones((0, 16)), NO_GROUPS, implementation=name),
    "grouped_matmul": lambda name: grouped_matmul(
        jnp.ones((0, 16)), jnp.ones((4, 16, 16)), NO_GROUPS, implementation=name
    ),
    "combine": lambda name: combine(jnp.ones((0, 16)), NO_GROUPS.positions, None, implementation=name),
}


@pytest.mark.parametrize("op", EMPTY_CALLS)
@pytest.mark.parametrize("name", impl.NAMES)
def test_every_implementation_takes_empty_operands(op, name):
    assert all(leaf.dtype in (jnp.int32, jnp.float32) for leaf in jax.tree.leaves(EMPTY_CALLS[op](name)))


@pytest.mark.parametrize("op", EMPTY_CALLS)
def test_unknown_names_are_refused_for_empty_operands_too(op):
    with pytest.raises(ValueError, match="implementation='triton' must be one of"):
        EMPTY_CALLS[op]("triton")


def test_the_gradient_of_a_kernel_is_that_of_the_plain_form():
    def kernel(x, scale, count):  # no derivative can be taken of this one
        return jax.pure_callback(lambda x, scale: x * scale, jax.ShapeDtypeStruct(x.shape, x.dtype), x, scale)

    def plain(x, scale, count):
        return x * scale

    both = impl.with_plain_gradient(kernel, plain)
    x, scale, count = jnp.arange(1.0, 4.0), jnp.float32(3), jnp.int32(7)
    assert both(x, scale, count).tolist() == [3.0, 6.0, 9.0]
    gradients = jax.grad(lambda x, scale: both(x, scale, count).sum(), argnums=(0, 1))(x, scale)
    assert gradients[0].tolist() == [3.0, 3.0, 3.0] and float(gradients[1]) == 6.0
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: both(x, scale, count), (x,), (x,))
