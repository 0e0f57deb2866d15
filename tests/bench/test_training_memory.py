"""The script that says what a layer keeps for its gradient."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from moe_jax import MoEConfig

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "training_memory.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("training_memory_script", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("activation", ["silu", "relu2_no_mul"])
def test_only_hidden_states_pre_activations_and_routing_are_kept(script, activation):
    config = MoEConfig(8, 2, 128, 64, activation=activation, dtype="bfloat16")
    kept = script.kept_bytes(config, 512)
    assert kept["x"] == 2 * 128 and kept["pre_activation"] == 2 * 2 * config.w13_rows and kept["other"] == 0
    # Logits; three numbers of 32 bits a pair; tiles.
    assert 4 * 8 < kept["routing"] < 4 * 8 + 4 * 2 * 5


def test_what_is_kept_besides_is_seen(script, monkeypatch):
    """A layer that keeps the rows of its experts."""

    def moe(x, experts, logits, *, config, implementation):
        return jnp.sum(jnp.sin(jnp.repeat(x, config.top_k, axis=0)).reshape(x.shape[0], -1), axis=1)

    monkeypatch.setattr(script, "moe", moe)
    assert script.kept_bytes(MoEConfig(8, 2, 256, 64, dtype="bfloat16"), 512)["other"] == 2 * 2 * 256


def test_it_writes_a_table(script, tmp_path, capsys):
    script.main(["8,2,128,64"], tokens=512, output=tmp_path / "memory.json", commit="abc")
    assert "| 8,2,128,64 | 256 | 512 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "memory.json").read_text())
    assert written["rows"][0]["bytes_per_token"]["x"] == 256 and written["commit"] == "abc"
