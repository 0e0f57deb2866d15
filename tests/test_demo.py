"""The main job on small input: it passes on what is right, and notices what is wrong."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from moe_jax.cli import app
from moe_jax.demo import DemoError, DemoOptions, job, run_demo, transformers_side
from moe_jax.demo.report import histogram

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of two small layers with E=6, so that four ranks own different numbers of experts."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=48,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        mlp_only_layers=[0],
    )
    torch.manual_seed(1)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def demo(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    text = tmp_path / "text.txt"
    text.write_text("Nobody expects the grouped matmul. " * 3)
    out = tmp_path / "load.png"

    def call(*arguments):
        words = ["demo", "--text", text, "--out", out, "--repeats", 1, *arguments]
        return CliRunner().invoke(app, [str(word) for word in words])

    call.text, call.out = text, out
    return call


def test_made_checkpoint_agrees_with_transformers(demo):
    result = demo("--max-tokens", 40)
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^ +(\d) +(\S+e-\d+) +(\S+e-\d+) ", result.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    for _, whole, parallel in rows:
        assert 0 < float(whole) <= 2e-6
        assert 0 < float(parallel) <= 2e-6
    assert "xla" in result.stdout
    assert demo.out.read_bytes().startswith(b"\x89PNG")
    assert demo.out.stat().st_size > 10_000


def test_given_checkpoint_and_its_dense_layer(demo, checkpoint):
    result = demo("--checkpoint", checkpoint, "--layers", 1)
    assert result.exit_code == 0, result.output
    assert re.findall(r"^ +(\d) +\S+e-\d+ ", result.stdout, re.MULTILINE) == ["1"], "layer 0 is dense, layer 2 cut off"
    assert "EP-4" in result.stdout


def test_numbers_of_a_layer(checkpoint, demo):
    options = DemoOptions(checkpoint=checkpoint, text=demo.text, max_tokens=33, repeats=1)
    result = run_demo(options)
    assert [layer.index for layer in result.layers] == [1, 2]
    assert result.num_tokens == 33
    for layer in result.layers:
        assert layer.tokens_per_expert.shape == (6,)
        assert layer.tokens_per_expert.sum() == 33 * 2
        assert layer.ranks.tolist() == [0, 0, 1, 1, 2, 3]
        assert layer.seconds > 0
        assert layer.transformers_seconds > 0
    assert result.failures == []


@pytest.mark.parametrize("damage", ["zeros", "twice", "neighbour", "nan"])
def test_a_wrong_layer_fails_the_demo(demo, checkpoint, monkeypatch, damage):
    right = job.moe_block

    def wrong(*arguments, **keywords):
        y = right(*arguments, **keywords)
        return {"zeros": y * 0, "twice": y * 2, "neighbour": jnp.roll(y, 1, axis=0), "nan": y.at[0, 0].set(jnp.nan)}[
            damage
        ]

    monkeypatch.setattr(job, "moe_block", wrong)
    result = demo("--checkpoint", checkpoint)
    assert result.exit_code == 1
    assert "FAILED layer 1 whole: relative error" in result.stdout
    assert "FAILED layer 2 split over ranks: relative error" in result.stdout
    assert "passed" not in result.stdout


def test_a_wrong_split_fails_the_demo(demo, checkpoint, monkeypatch):
    right = job.expert_maps

    def overlapping(num_experts, ranks):
        maps, owner = right(num_experts, ranks)
        return np.concatenate([maps, maps[:1]]), owner  # the experts of rank 0 count twice

    monkeypatch.setattr(job, "expert_maps", overlapping)
    result = demo("--checkpoint", checkpoint)
    assert result.exit_code == 1
    assert "split over ranks: relative error" in result.stdout
    assert "whole: relative error" not in result.stdout


def test_other_experts_than_transformers_are_counted_and_too_many_fail():
    layer = job.LayerResult(0, 1e-7, 1e-7, 0, 1.0, 1.0, np.ones(4), np.zeros(4))
    assert job.layer_failures(dataclasses.replace(layer, tied=1), 100, 2e-6) == []
    assert "2 of 100 tokens" in job.layer_failures(dataclasses.replace(layer, tied=2), 100, 2e-6)[0]
    same = job._same_experts(np.array([[3, 1], [2, 0], [0, 1]]), np.array([[1, 3], [2, 3], [0, 1]]))
    assert same.tolist() == [True, False, True]


def test_bfloat16_layer_on_rounded_inputs(demo, checkpoint):
    result = demo("--checkpoint", checkpoint, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "2.0e-02" in result.stdout


def test_bad_input_ends_with_a_sentence(demo, checkpoint, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    all_dense = tmp_path / "all_dense"
    all_dense.mkdir()
    config = json.loads((checkpoint / "config.json").read_text()) | {"mlp_only_layers": [0, 1, 2]}
    (all_dense / "config.json").write_text(json.dumps(config))
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    (truncated / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (truncated / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:5000])
    cases = [
        (["--text", tmp_path / "missing.txt"], "missing.txt"),
        (["--text", tmp_path], str(tmp_path)),
        (["--checkpoint", checkpoint, "--text", empty], "the text is empty"),
        (["--checkpoint", tmp_path / "nowhere"], "is not a folder"),
        (["--checkpoint", tmp_path], "config.json"),
        (["--checkpoint", dense], "llama"),
        (["--checkpoint", unknown], "no_such_model"),
        (["--checkpoint", truncated], "truncated"),
        (["--checkpoint", all_dense], "no MoE layer"),
        (["--checkpoint", checkpoint, "--out", tmp_path / "no_folder" / "load.png"], "no_folder"),
        (["--checkpoint", checkpoint, "--out", tmp_path / "load.story"], "load.story"),
    ]
    for arguments, words in cases:
        result = demo(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert result.stderr.startswith("error:"), (arguments, result.stderr)
        assert words in result.stderr, (arguments, result.stderr)
        assert "Traceback" not in result.output


def test_without_torch_the_way_out_is_named(demo, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    result = demo()
    assert result.exit_code == 2
    assert "pip install 'moe_jax[demo]'" in result.stderr


def test_expert_maps_partition_the_experts():
    for num_experts, ranks in [(32, 4), (6, 4), (5, 5), (7, 1)]:
        maps, owner = job.expert_maps(num_experts, ranks)
        assert ((maps >= 0).sum(axis=0) == 1).all()
        for rank, expert_map in enumerate(maps):
            np.testing.assert_array_equal(np.flatnonzero(owner == rank), np.flatnonzero(expert_map >= 0))
            np.testing.assert_array_equal(expert_map[expert_map >= 0], np.arange((expert_map >= 0).sum()))


def test_first_layers_cuts_what_has_an_entry_per_layer():
    config = transformers.GptOssConfig(num_hidden_layers=4)
    cut = transformers_side.first_layers(config, 2)
    assert cut.num_hidden_layers == 2
    assert cut.layer_types == config.layer_types[:2]
    assert len(config.layer_types) == 4, "the config that was given stays as it was"


def test_text_is_the_readme_unless_another_is_named(tmp_path):
    assert job.read_text(None, 10) == b"# moe_jax\n"
    with pytest.raises(DemoError, match="missing"):
        job.read_text(tmp_path / "missing", 10)


def test_histogram_keeps_its_width():
    assert histogram(np.zeros(5, int)) == "     "
    assert len(histogram(np.arange(128))) == 32
    assert histogram(np.array([1, 1000]))[0] != " ", "an expert with any token at all is visible"
