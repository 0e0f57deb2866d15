"""Tuned plans of the machine that runs the tests have no say: every test has folders of its own."""

import pytest

from moe_jax.tuning import cache


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """The three folders, in the order in which they are looked through; none exists yet."""
    found = tmp_path / "named", tmp_path / "home" / "moe_jax", tmp_path / "shipped"
    monkeypatch.setenv("MOE_JAX_TUNED_DIR", str(found[0]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache, "SHIPPED", found[2])
    cache.forget()
    yield found
    cache.forget()
