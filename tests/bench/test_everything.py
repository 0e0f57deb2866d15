"""Benchmarks side by side: who has which GPU when, what is ended, what the commands are."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest
import typer

from moe_jax.cli import app

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
WRITES = (
    "import os, sys, time; print(os.environ['CUDA_VISIBLE_DEVICES'], time.time(), flush=True); "
    "time.sleep({}); print(time.time())"
)


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


everything = script("everything")
JOBS, Job, run_all = everything.JOBS, everything.Job, everything.run_all


def job(name, seconds, *, gpus=1, limit=60.0):
    return Job(name, ("-c", WRITES.replace("{}", str(seconds))), limit, gpus)


def intervals(folder, name):
    text = (folder / f"{name}.txt").read_text().split()
    return set(text[0].split(",")), float(text[1]), float(text[2])


def test_each_job_has_its_gpus_to_itself(tmp_path):
    jobs = [job("a", 1.0), job("b", 0.3), job("both", 0.3, gpus=2), job("c", 0.3)]
    lines = []
    assert run_all(jobs, 2, 60.0, tmp_path, lines.append) == dict.fromkeys(("a", "b", "both", "c"), 0)
    found = [intervals(tmp_path, one.name) for one in jobs]
    for i, (gpus, begin, end) in enumerate(found):
        for others, other_begin, other_end in found[:i]:
            assert not gpus & others or begin >= other_end or other_begin >= end
    assert found[0][0] != found[1][0] and found[2][0] == {"0", "1"}
    assert found[3][1] >= found[2][2], "c would hold back the job of two GPUs"
    assert len(lines) == 8


def runs(process):
    """Not one that has ended and is still listed."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_takes_too_long_is_ended_with_what_it_started(tmp_path):
    writes = "import os, time; open('child', 'w').write(str(os.getpid())); time.sleep(60)"
    child = (
        f"import os, subprocess, sys; os.chdir({str(tmp_path)!r}); subprocess.run([sys.executable, '-c', {writes!r}])"
    )
    slow = Job("slow", ("-c", child), 5.0)
    begun = time.monotonic()
    codes = run_all([slow, job("next", 0.1), job("failing", "no_number")], 1, 60.0, tmp_path, lambda line: None)
    assert codes["slow"] < 0 and codes["next"] == 0 and codes["failing"] > 0
    assert time.monotonic() - begun < 40
    assert not runs(int((tmp_path / "child").read_text()))


def test_the_end_of_all(tmp_path):
    codes = run_all([job("first", 30), job("second", 0)], 1, 0.5, tmp_path, lambda line: None)
    assert codes["first"] < 0 and codes["second"] is None


def test_results_go_where_they_are_looked_for(tmp_path):
    writes = Job("one", ("-c", "import sys; open(sys.argv[1], 'w').write('{}')", "{out}"), 20.0)
    assert run_all([writes], 1, 20.0, tmp_path, lambda line: None) == {"one": 0}
    assert (tmp_path / "one.json").read_text() == "{}"


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"job 'both' needs 2 GPUs, but there are 1; leave it out"):
        run_all([job("both", 0, gpus=2)], 1, 1.0, tmp_path)
    with pytest.raises(typer.BadParameter, match="job 'fast' must be one of bf16, sonicmoe, fp8_block"):
        everything.main(tmp_path, 1.0, ["fast"])
    monkeypatch.setattr(everything, "count_gpus", lambda: 0)
    with pytest.raises(typer.BadParameter, match="no GPU here"):
        everything.main(tmp_path, 1.0, None, None, False)


def test_commands_are_understood():
    """Every option is one of its script."""

    def of_script(path):
        alone = typer.Typer()
        alone.command()(script(Path(path).stem).main)
        return options_of(typer.main.get_command(alone))

    def options_of(command):
        return {option for parameter in command.params for option in parameter.opts}

    known = {"-c": options_of(typer.main.get_command(app).commands["bench"])}
    for job in JOBS.values():
        first = job.command[0]
        known[first] = known.get(first) or of_script(first)
        assert {word for word in job.command if word.startswith("--")} <= known[first], job.name
        assert job.command[-1] == "{out}"
