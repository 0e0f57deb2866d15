"""How tests compare: by relative Frobenius error, with comparisons that are shown to be able to fail."""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest


def relative_error(actual, expected) -> float:
    """``|actual - expected| / |expected|`` in the Frobenius norm, computed in float64.

    Anything that is not finite, or differs from an expected zero, is infinitely wrong.

    >>> relative_error([3.0, 4.0], [3.0, 4.5]) < 0.1
    True
    """
    actual, expected = (np.asarray(array).astype(np.float64) for array in (actual, expected))
    assert actual.shape == expected.shape, f"shape {actual.shape} is not {expected.shape}"
    if not np.all(np.isfinite(actual)):
        return float("inf")
    difference, size = np.linalg.norm(actual - expected), np.linalg.norm(expected)
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float(difference / size)


def check_close(actual, expected, tolerance: float) -> None:
    """Asserts that the relative error is at most ``tolerance``.

    >>> check_close([1.0], [1.0], 0.0)
    """
    assert np.all(np.isfinite(np.asarray(expected).astype(np.float64))), "the expected values are not finite"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.3e} exceeds {tolerance:.3e}"


def assert_discriminates(check: Callable, good) -> None:
    """Asserts that ``check`` passes ``good`` and fails what a broken layer would give.

    Broken are: zeros, the rows of ``good`` shifted by one, and ``good`` scaled by 1.5.

    >>> assert_discriminates(lambda out: check_close(out, [1.0, 2.0], 1e-6), np.array([1.0, 2.0]))
    """
    check(good)
    good = np.asarray(good).astype(np.float32)
    wrong = {"zero": np.zeros_like(good), "shifted by a row": np.roll(good, 1, axis=0), "scaled by 1.5": 1.5 * good}
    for name, output in wrong.items():
        with pytest.raises(AssertionError):
            check(output)
            pytest.fail(f"the check accepts an output that is {name}")


def without_type_checks(name: str) -> ModuleType:
    """A second copy of a module that the tests' shape checker has not wrapped: its own errors are those that users see.

    >>> without_type_checks("moe_jax.types").TopK.__name__
    'TopK'
    """
    spec = importlib.util.find_spec(name)
    # The import hook wraps by module name, so another name is enough; dataclasses look their module up in sys.modules.
    alias = "unchecked_" + name.replace(".", "_")
    copy_spec = importlib.util.spec_from_file_location(alias, spec.origin)
    module = importlib.util.module_from_spec(copy_spec)
    sys.modules[alias] = module
    copy_spec.loader.exec_module(module)
    return module
