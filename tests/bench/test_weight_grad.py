"""The script that times weight gradients: its cells, its checks, and that each variant is lowered."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.hopper.weight_grad import Config
from tests.lowering import an_h200

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "weight_grad.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("weight_grad_script", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cells(script):
    up, down = script.parse_cell("qwen3-30b-a3b:4096:even,half")
    assert (up.m, up.n) == (1536, 2048) and (down.m, down.n) == (2048, 768)
    assert up.sizes("even").tolist() == [256] * 128
    half = up.sizes("half")
    assert half.sum() == 4096 * 8 and half.max() == 4096
    with pytest.raises(ValueError, match="twice"):
        script.parse_cell("qwen3-30b-a3b:4096:twice")


def test_changes(script):
    assert script.changed(Config(), "rule") == Config()
    assert script.changed(Config(), "overlap=0,stages=4") == Config(overlap=False, stages=4)


@pytest.mark.parametrize("accumulate", [False, True])
def test_outputs_are_checked(script, accumulate):
    product = script.parse_cell("4,2,64,32:21")[1]
    operands = script.operands_of(product, np.array([0, 30, 5, 2]), accumulate)
    left, right, starts, sizes, sums = operands
    assert left.shape == (48, 64) and jnp.isnan(left[37:]).all() and not jnp.isnan(left[:37]).any()
    spans = [slice(int(a), int(a + b)) for a, b in zip(starts, sizes, strict=True)]
    out = jnp.stack([left[s].astype(jnp.float32).T @ right[s].astype(jnp.float32) for s in spans])
    out = out if sums is None else out + sums
    assert script.error_of(out, operands) < 1e-6
    assert script.error_of(out.at[1].multiply(1.5), operands) > 0.1
    assert script.error_of(out.at[0].add(1.0), operands) > 0.01
    assert not script.error_of(out.at[0].set(jnp.nan), operands) < 0.1


def test_it_lowers_each_variant(script, capsys):
    changes = ["stages=2", "blocks=2", "blocks=2,tile_n=128"]
    with an_h200():
        script.main(["16,2,256,128:100"], changes, turns=1, dry=True, accumulate=True)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8 and "stages=2" in printed[1] and "at most 256" in printed[2]
