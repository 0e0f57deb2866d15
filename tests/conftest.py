"""What every test runs under: checked shapes, full float32 products, no silent broadcasting."""

import functools
import importlib.util
import os

import pytest
from jaxtyping import install_import_hook

# XLA's CPU client makes a pool of this many threads when it starts. Interpreted GPU kernels wait for one another at
# barriers, each blocking a thread: with one thread a core they deadlock on a small machine.
os.environ.setdefault("NPROC", "64")

# Meshes of several devices on a CPU (GPUs are as many as there are). Devices that wait for one another in a collective abort
# the process after 40 seconds, which they may take on a machine whose few cores are all busy. Read once, when JAX starts.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
        " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
        " --xla_cpu_collective_timeout_seconds=600"
    )

# torch's threads spin while they wait for one another, which on a machine whose cores are all busy (several test
# workers) makes an operation up to a hundred times slower. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before the first import of moe_jax: from here on a call whose arrays do not have the annotated shapes raises.
HAS_BEARTYPE = importlib.util.find_spec("beartype") is not None
if HAS_BEARTYPE:
    install_import_hook("moe_jax", "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every run, and no deadline: the first call of a shape compiles.
hypothesis.settings.register_profile("moe_jax", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("moe_jax")


def pytest_report_header():
    return None if HAS_BEARTYPE else "annotated shapes are not checked: beartype is not installed"


@functools.cache
def has_cuda_device() -> bool:
    try:
        return len(jax.devices("cuda")) > 0
    except RuntimeError:
        return False


def pytest_addoption(parser):
    parser.addoption("--one-of-each", action="store_true", help="every test once, with the first of its parameters")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--one-of-each"):
        first = {item.nodeid.split("[")[0]: item for item in reversed(items)}.values()
        others = [item for item in items if item not in first]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not has_cuda_device():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="JAX sees no CUDA device"))


# Linux gives a process 65530 areas of memory (vm.max_map_count) and JAX keeps some ten for each program it compiled; LLVM
# aborts the process when it gets no more, which a worker that runs thousands of tests comes to.
MOST_MEMORY_AREAS = 30_000
TESTS_BETWEEN_CHECKS = 20  # a test adds some hundred areas, and counting them takes milliseconds
tests_done = 0


def memory_areas() -> int:
    try:
        with open("/proc/self/maps") as areas:
            return sum(1 for _ in areas)
    except OSError:  # no Linux, no such limit
        return 0


def trace_layers_anew(item):
    """Layers of one shape are traced once: a test that patches something has its own, and leaves none to others."""
    if "monkeypatch" in item.fixturenames:
        from moe_jax.moe import _run_experts

        _run_experts.clear_cache()


def pytest_runtest_setup(item):
    trace_layers_anew(item)


def pytest_runtest_teardown(item):
    global tests_done
    trace_layers_anew(item)
    tests_done += 1
    if tests_done % TESTS_BETWEEN_CHECKS == 0 and memory_areas() > MOST_MEMORY_AREAS:
        jax.clear_caches()
