"""`moe-jax tune` as a user meets it, without a GPU and with one that is made up."""

import jax
import pytest
from typer.testing import CliRunner

from moe_jax.cli import app
from moe_jax.ops import implementation
from moe_jax.tuning import cache, processes, timed_layer
from tests.tuning.fake_layer import FakeLayer


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: CliRunner().invoke(app, ["tune", *(str(argument) for argument in arguments)])


@pytest.fixture
def hopper(monkeypatch):
    """A GPU whose kernels like bands of 4."""
    made = []

    def layer(config, num_tokens):
        made.append(num_tokens)
        if num_tokens == 13:
            raise MemoryError("no room for the weights")
        return FakeLayer(lambda c: 40.0 if c.band == 4 else 45.0, lambda c: 45.0)

    monkeypatch.setattr(implementation, "platform_reason", lambda platform=None: None)
    monkeypatch.setattr(cache, "device_kind", lambda: "NVIDIA H200")
    monkeypatch.setattr(timed_layer, "TimedLayer", layer)
    monkeypatch.setattr(processes, "default_processes", lambda: 1)  # what is made up is not in other processes
    return made


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the message is that of a CPU")
def test_without_a_hopper_gpu_there_is_nothing_to_tune(run, folders):
    result = run()
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    for word in ("nothing to tune", "platform cpu", "H100", "xla"):
        assert word in result.stderr
    assert not folders[0].exists()


def test_end_to_end(run, hopper, folders):
    result = run("--case", "qwen3-30b-a3b", "--tokens", "16,4096")
    assert result.exit_code == 0, result.output
    assert hopper == [16, 4096]
    rows = [line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["qwen3-30b-a3b"]]
    assert rows[0][:5] == ["qwen3-30b-a3b", "16", "100.0", "100.0", "0.0%"]
    assert rows[1][:5] == ["qwen3-30b-a3b", "4096", "100.0", "95.0", "5.0%"]
    assert "as the rule" in " ".join(rows[0]) and "band=4" in " ".join(rows[1])
    assert str(folders[0] / "nvidia_h200.json") in result.stdout
    assert "MOE_JAX_TUNED_DIR" not in result.stdout, "it is looked for there anyway"
    again = run("--case", "qwen3-30b-a3b", "--tokens", "16,4096,64")
    assert hopper == [16, 4096, 64]
    assert again.stdout.count("was there already") == 2


def test_another_folder_is_named_with_the_way_to_use_it(run, hopper, folders, tmp_path):
    result = run("--case", "8,2,256,128", "--tokens", 4096, "--out", tmp_path / "mine", "--activation", "relu2_no_mul")
    assert result.exit_code == 0, result.output
    assert f"MOE_JAX_TUNED_DIR={tmp_path / 'mine'}" in result.stdout
    (entry,) = cache.read(tmp_path / "mine" / "nvidia_h200.json")
    assert not entry.shape.gated and entry.shape.num_pairs == 8192


def test_a_number_format_has_plans_of_its_own(run, hopper, folders):
    plain = run("--case", "qwen3-30b-a3b", "--tokens", 4096)
    result = run("--case", "qwen3-30b-a3b", "--tokens", 4096, "--quantization", "fp8_block")
    assert (plain.exit_code, result.exit_code) == (0, 0), result.output
    assert hopper == [4096, 4096]
    assert "layer times, microseconds, fp8_block" in result.stdout and "fp8_block" not in plain.stdout
    entries = cache.read(folders[0] / "nvidia_h200.json")
    assert [entry.shape.codes for entry in entries] == ["", "float8_e4m3fn block"]
    assert entries[1].plan.tile_rows <= 128


def test_a_failure_is_told_and_the_rest_goes_on(run, hopper):
    result = run("--case", "8,2,256,128", "--tokens", "13,64")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout and "no room" in result.stderr
    assert hopper == [13, 64]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "qwen9"], ["qwen9", "qwen3-30b-a3b"]),
        (["--tokens", "0,4"], ["0,4", "from 1"]),
        (["--tokens", "few"], ["few"]),
        (["--activation", "swish2"], ["swish2"]),
        (["--quantization", "fp9"], ["--quantization fp9", "fp8_block"]),
        (["--out", "/dev/null/plans"], ["/dev/null/plans", "another"]),
    ],
    ids=str,
)
def test_options_are_checked_before_the_work(run, hopper, arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert all(word in result.stderr for word in words), result.stderr
    assert hopper == []


def test_a_broken_file_is_met_before_the_work(run, hopper, folders):
    folders[0].mkdir(parents=True)
    (folders[0] / "nvidia_h200.json").write_text("{")
    result = run()
    assert result.exit_code == 2
    assert "nvidia_h200.json" in result.stderr and "not JSON" in result.stderr
    assert hopper == []
