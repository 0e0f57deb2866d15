"""The command as the tests of the benchmark call it."""

import json

import pytest
from typer.testing import CliRunner

from moe_jax.bench import run, timing
from moe_jax.bench.roofline import Ceilings
from moe_jax.cli import app


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the command on one tiny case, in quick rounds; gives its outcome and the result file."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # set by the command, and to be forgotten after the test
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(run, "measure_ceilings", lambda *arguments: Ceilings(0.1, 10.0, 20.0))
    out = tmp_path / "result.json"

    def call(*arguments):
        words = ["bench", "--out", out, "--case", "6,2,32,48", *arguments]
        outcome = CliRunner().invoke(app, [str(word) for word in words])
        return outcome, json.loads(out.read_text()) if out.exists() else None

    return call
