"""`moe-jax layer-test` as a user meets it."""

import dataclasses

import jax
import pytest
from typer.testing import CliRunner

from moe_jax.cli import app
from moe_jax.layer_test import MoETestConfig, command, run_one_config
from moe_jax.layer_test.support import BACKENDS, PARALLEL_COMBOS, QUANT_METHODS
from moe_jax.layer_test.sweep import FEATURES
from moe_jax.parallel.all_to_all import AllToAll


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: CliRunner().invoke(app, ["layer-test", "--cpu", *map(str, arguments)])


def test_a_table_of_results(run):
    result = run(
        "--dp", 2, "--ep", "--shape", "3,32,64", "--dtype", "float32", "--backend", "all_to_all,batched_all_to_all"
    )
    assert result.exit_code == 0, result.output
    for words in (
        "allgather_reducescatter",
        "all_to_all",
        "float32",
        "3, 32, 64",
        "shared",
        "batched_all_to_all",
        "all 4 agree",
    ):
        assert words in result.stdout


class Silent(AllToAll):
    """Brings nothing home."""

    def finalize(self, y, prepared):
        return 0 * super().finalize(y, prepared)


def test_a_wrong_layer_ends_the_command_with_its_name(run, monkeypatch):
    monkeypatch.setitem(BACKENDS, "all_to_all", Silent())
    config = MoETestConfig(3, 32, 64, 4, 2, "float32", None, False, False, False, False, "all_to_all", 2, 2, 1)
    result = run("--subtests", config.id())
    assert result.exit_code == 1
    assert "WRONG" in result.stdout and f"{config.id()}: relative error" in result.stdout
    assert "1 of 1 layers are wrong" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dp", 2, "--ep", "--eplb", "--num-experts", 8], "balancing the load of experts"),
        (["--tp", 2, "--backend", "all_to_all"], "there is no such layer: backend='all_to_all'"),
        (["--tp", 2, "--backend", "post"], "--backend post is not one of no_exchange"),
        (["--quant", "fp3"], "format 'fp3' is not one of"),
        (["--quant", "none", "--quantize-before", "--dp", 2], "needs a format that quantizes activations"),
        (["--shape", "1,2"], "--shape 1,2 must be three numbers"),
        (["--dp", 4, "--tp", 4, "--ep"], "needs 16 devices, but there are 8"),
        (["--subtests", "[1-2]"], "has 2 parts"),
    ],
    ids=str,
)
def test_it_says_what_is_wrong(run, arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert words in result.stderr


def chosen(sweep_all=False, formats=(None,), ranks=(2, 2, True), features=(False,) * 5):
    return command.chosen(
        [(1, 128, 256)], 9, 2, "bfloat16", formats, tuple(BACKENDS), command.Ranks(*ranks), command.Features(*features), sweep_all
    )  # fmt: skip


def test_options_choose_the_configs():
    one = MoETestConfig(1, 128, 256, 9, 2, "bfloat16", "fp8_block", True, True, False, ep_size=4, dp_size=2, tp_size=2)
    found = chosen(formats=("fp8_block",), features=(True, True, False, False, True))
    backends = [config.backend for config in found]
    assert backends == [
        f"{prefix}{name}" for prefix in ("", "batched_") for name in ("allgather_reducescatter", "all_to_all")
    ]
    assert found == [dataclasses.replace(one, backend=backend, quantize_before=True) for backend in backends]
    assert [config.backend for config in chosen(ranks=(1, 1, True))] == [None]


def test_a_sweep_has_everything():
    found = chosen(sweep_all=True, formats=(None, "fp8_block"))
    assert len(set(found)) == len(found)
    assert {config.quantization for config in found} == {None, "fp8_block"}
    assert command.formats_of("all") == QUANT_METHODS
    assert {(c.dp_size, c.tp_size, c.ep_size > 1) for c in found} == set(PARALLEL_COMBOS)
    assert {(c.use_shared_experts, c.use_gate, c.use_routed_input_transform) for c in found} == set(FEATURES)
    assert {config.quantize_before for config in found} == {True, False}


def test_gpus_run_it_if_there_are_enough(monkeypatch):
    cpus, gpus = jax.devices("cpu"), jax.devices("cpu")[:2]
    monkeypatch.setattr(jax, "devices", lambda kind=None: cpus if kind == "cpu" else gpus)
    assert command._devices(False, 2) is gpus
    assert command._devices(False, 3) is cpus
    assert command._devices(True, 1) is cpus
    config = MoETestConfig(3, 32, 64, 4, 2, "float32", None, False, False, False)
    assert run_one_config(config, gpus).failures == ()
