"""Variants of plans: what the command line means, and that each of them is lowered."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from moe_jax.tuning.plan import LayerShape, default_plan
from tests.lowering import an_h200

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "variants.py"


@pytest.fixture(scope="module")
def variants():
    spec = importlib.util.spec_from_file_location("variants", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cells(variants):
    cell = variants.parse_cell("qwen3-30b-a3b:4096:uniform,half", "fp8_block")
    assert (cell.tokens, cell.routings, cell.config.quantization.name) == (4096, ("uniform", "half"), "fp8_block")
    assert variants.parse_cell("8,2,256,128:7").routings == ("uniform",)
    with pytest.raises(ValueError, match="twice"):
        variants.parse_cell("qwen3-30b-a3b:4096:twice")


def test_changes(variants):
    rule = default_plan(LayerShape(128, 32768, 2048, 768, gated=True, dtype="bfloat16"))
    assert variants.changed(rule, "rule") == rule
    found = variants.changed(rule, "up.gather=0,both.band=4")
    assert found.up == dataclasses.replace(rule.up, gather=False, band=4)
    assert found.down == dataclasses.replace(rule.down, band=4)
    found = variants.changed(rule, "both.row_counts=64/128,up.stages=3")
    assert (found.tile_rows, found.up.stages) == (128, 3)
    assert found.up.row_counts == found.down.row_counts == (64, 128)


def test_it_lowers_each_variant(variants, capsys):
    with an_h200():
        variants.main(["16,2,256,128:100"], ["up.stages=3", "down.band=2"], turns=1, dry=True)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "stages=3" in printed[1] and "band=2" in printed[2]


def test_tiles_of_8_bit_rows_fit_into_shared_memory(variants, capsys):
    """Many rows, a scale for each row and channel: what takes most of it."""
    change = "both.row_counts=128/160,both.stages=3"
    variants.main(["16,2,256,128:2000"], [change], "fp8_channel", turns=1, dry=True)
    assert "tile_rows=160" in capsys.readouterr().out
