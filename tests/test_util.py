"""The comparisons of the other tests, compared."""

import numpy as np
import pytest

from tests.util import assert_discriminates, check_close, relative_error

GOOD = np.random.default_rng(0).standard_normal((5, 3))


def test_relative_error_is_relative():
    assert relative_error(GOOD * 1.01, GOOD) == pytest.approx(0.01)
    assert relative_error(1e6 * GOOD * 1.01, 1e6 * GOOD) == pytest.approx(0.01)


def test_what_is_not_finite_or_not_zero_is_infinitely_wrong():
    assert relative_error(np.where(GOOD > 0, np.nan, GOOD), GOOD) == np.inf
    assert relative_error(GOOD, np.zeros_like(GOOD)) == np.inf
    assert relative_error(np.zeros((0, 3)), np.zeros((0, 3))) == 0.0


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="shape"):
        check_close(GOOD, GOOD[:1], 1.0)


def test_a_nan_expectation_is_refused():
    with pytest.raises(AssertionError, match="not finite"):
        check_close(GOOD, np.full_like(GOOD, np.nan), 1.0)


@pytest.mark.parametrize("accepts", ["zero", "shifted", "scaled"])
def test_a_check_that_accepts_a_wrong_output_is_found_out(accepts):
    def too_lax(output):
        fooled_by = {
            "zero": not np.any(output),
            "shifted": np.allclose(output, np.roll(GOOD, 1, axis=0)),
            "scaled": np.allclose(output, 1.5 * GOOD),
        }
        if not fooled_by[accepts]:
            check_close(output, GOOD, 1e-6)

    with pytest.raises(pytest.fail.Exception, match="accepts an output"):
        assert_discriminates(too_lax, GOOD)


def test_a_strict_check_discriminates():
    assert_discriminates(lambda output: check_close(output, GOOD, 1e-6), GOOD)
