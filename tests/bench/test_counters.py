"""Hardware counters: what Nsight Compute writes, and what becomes of it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import typer

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "counters.py"
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
NAMES = ["ID", "Kernel Name", "gpu__time_duration.sum", "dram__bytes.sum.per_second"]
NAMES += [STALLED.format(name) for name in ("wait", "selected", "barrier")]
UNITS = ["", "", "ns", "byte/s", "inst", "inst", "inst"]
ROWS = [
    ["0", "route_topk_mosaic_gpu_kernel", "3,712", "3,793,103.5", "1.25", "1.00", ""],
    ["1", "grouped_matmul_up_mosaic_gpu_kernel", "1,525,632", "2,931,237,855,524.79", "1.12", "1.00", "2.04"],
]


def page(*rows):
    lines = ["==PROF== Connected to process 1 (/usr/bin/python3)"]
    return [*lines, *(",".join(f'"{cell}"' for cell in row) for row in rows)]


@pytest.fixture(scope="module")
def counters():
    spec = importlib.util.spec_from_file_location("counters", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["counters"] = module
    spec.loader.exec_module(module)
    return module


def test_what_is_read(counters):
    first, second = counters.parse(page(NAMES, UNITS, *ROWS))
    assert (first.name, second.name) == ("route_topk", "grouped_matmul_up")
    assert first.counters == pytest.approx({"us": 3.712, "memory GB/s": 0.0037931035})
    assert second.counters == pytest.approx({"us": 1525.632, "memory GB/s": 2931.2378555})
    assert (first.stalls, list(second.stalls)) == ({"wait": 1.25}, ["barrier", "wait"]), "the largest first, no issue"
    assert counters.line(second, 1) == "grouped_matmul_up: us 1526, memory GB/s 2931; barrier 2.04"


@pytest.mark.parametrize("lines", [[], page(), page(NAMES, UNITS), ["==ERROR== ERR_NVGPUCTRPERM"]])
def test_no_counters(counters, lines):
    with pytest.raises(ValueError, match="wrote no counters of a kernel"):
        counters.parse(lines)


def test_command(counters, tmp_path, capsys):
    path = tmp_path / "layer.csv"
    path.write_text("\n".join(page(NAMES, UNITS, *ROWS)))
    counters.main(recorded=[path])
    text = capsys.readouterr().out.splitlines()
    assert text[0].split() == ["layer"] and text[1].startswith("  route_topk: us 3.712")
    with pytest.raises(typer.BadParameter, match="name a --cell"):
        counters.main()
    with pytest.raises(typer.BadParameter, match="no such tool"):
        counters.main(cell=["8,2,64,64:4"], ncu=str(tmp_path / "no such tool"))


def test_what_is_asked_for(counters, tmp_path):
    """A stand-in for the tool: runs nothing, writes a page where it is told to."""
    tool = tmp_path / "ncu"
    text = "\n".join(page(NAMES, UNITS, *ROWS)).replace("'", "")
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nwords = sys.argv\n"
        "assert '--watched' in words and words[-2:] == ['--quantization', 'nvfp4']\n"
        f"open(words[words.index('--log-file') + 1], 'w').write('''{text}''')\n"
    )
    tool.chmod(0o755)
    assert [kernel.name for kernel in counters.measure("8,2,64,64:4", "nvfp4", str(tool))][1] == "grouped_matmul_up"
    tool.write_text(f"#!{sys.executable}\nraise SystemExit('may not be read')")
    with pytest.raises(RuntimeError, match="8,2,64,64:4: may not be read"):
        counters.measure("8,2,64,64:4", None, str(tool))
