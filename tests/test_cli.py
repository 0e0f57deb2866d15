"""The command line as a user meets it: what it prints and how it ends."""

import json

import pytest
from typer.testing import CliRunner

from moe_jax.cli import app
from moe_jax.explanation import explain

SHAPE = ["--num-experts", "8", "--top-k", "2", "--hidden-size", "64", "--intermediate-size", "32"]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # no wrapping inside the words that the tests look for
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_version(run):
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == "0.1.0"


def test_explain_prints_every_implementation_with_its_reason(run):
    from moe_jax import MoEConfig

    result = run("explain", *SHAPE, "--tokens", 16, "--platform", "cpu")
    assert result.exit_code == 0, result.output
    items = explain(MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32), 16, "cpu")
    assert {item.implementation for item in items} >= {"xla", "mosaic"}
    for item in items:
        assert item.op in result.stdout
        if item.reason is not None:
            assert item.reason in result.stdout


def test_explain_reads_a_hugging_face_config(run, tmp_path):
    config = {
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 64,
        "intermediate_size": 32,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    from_folder = run("explain", "--config", tmp_path, "--platform", "cpu")
    assert from_folder.exit_code == 0, from_folder.output
    assert from_folder.stdout == run("explain", *SHAPE, "--platform", "cpu").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-experts", 8, "--top-k", 2], ["--hidden-size", "--intermediate-size"]),
        ([*SHAPE, "--top-k", 9], ["top_k=9", "num_experts=8"]),
        ([*SHAPE, "--activation", "swish2"], ["swish2"]),
        ([*SHAPE, "--routing", "loudest"], ["loudest"]),
        (["--config", "/nonexistent/config.json"], ["/nonexistent/config.json"]),
    ],
)
def test_explain_says_what_is_wrong(run, arguments, words):
    result = run("explain", *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


def test_unknown_command_is_an_error(run):
    assert run("fly").exit_code == 2
