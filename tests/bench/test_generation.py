"""The script that times how a model writes text, as far as it goes without a GPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import typer

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "generation.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("generation_script", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_at_a_time_writes_what_transformers_writes(script):
    model = script.make_model(2, script.TOY, "cpu", torch.float32)
    prompt = torch.randint(0, 64, (3, script.PROMPT), generator=torch.Generator().manual_seed(0))
    for implementation in ("eager", "moe_jax"):
        model.set_experts_implementation(implementation)
        found = script.write(model, prompt, 6, "eager", rounds=2)
        whole = torch.ones_like(prompt)  # no id means padding
        right = model.generate(prompt, attention_mask=whole, max_new_tokens=7, do_sample=False, pad_token_id=0)
        assert torch.equal(found["tokens"], right[:, script.PROMPT :])
        assert found["seconds"] > 0 and found["logits"].shape == (3, 64)


def test_rows_say_how_fast_and_how_alike(script, tmp_path, capsys):
    output = tmp_path / "rows.json"
    options = dict(batch="1,2", new_tokens=4, layers=1, mode="eager", toy=True, output=output)
    script.main(implementation="moe_jax,grouped_mm,no_such", **options)
    rows = json.loads(output.read_text())["rows"]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows and len(rows) == 6
    for ours, theirs, broken in (rows[:3], rows[3:]):
        assert (ours["agree"], ours["logits_error"], theirs["agree"]) == (1, 0, 1)
        assert 0 <= theirs["logits_error"] < 1e-5 and theirs["tokens_a_second"] > 0
        assert "no_such" in broken["reason"]


def test_what_it_needs(script):
    with pytest.raises(typer.BadParameter, match="'fast' must be one of graph, compile, eager"):
        script.main(mode="fast")
    if not torch.cuda.is_available():
        with pytest.raises(typer.BadParameter, match="no CUDA device"):
            script.main(toy=True, mode="graph")
