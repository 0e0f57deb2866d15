"""The notebooks run without error, and the outputs in the files are what they give: complete, small and clean."""

import base64
import copy
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST_FILE = 1_000_000
LARGEST_PICTURE = 200_000
FOREIGN = re.compile(r"(?<![\w.])/(?:home|root|tmp|Users|usr|opt|mnt|private)/|\b[A-Z]:\\|site-packages", re.IGNORECASE)
RERUN = "run `make notebooks` and commit the result"

if not NOTEBOOKS:
    raise FileNotFoundError(f"no notebooks in {FOLDER}")


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    spec = importlib.util.spec_from_file_location("notebooks_execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute(copy.deepcopy(notebook))


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell: nbformat.NotebookNode) -> list[bytes]:
    return [
        base64.b64decode(output.data["image/png"]) for output in cell.outputs if "image/png" in output.get("data", {})
    ]


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell printed or showed as text, warnings aside."""
    found = [output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"]
    return found + [output.data["text/plain"] for output in cell.outputs if "text/plain" in output.get("data", {})]


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What is wrong with the outputs that a notebook holds."""
    found = []
    cells = code_cells(notebook)
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("the cells were not run once each, from top to bottom")
    if set(notebook.metadata) - {"kernelspec", "language_info"} or set(notebook.metadata.language_info) != {"name"}:
        found.append("the metadata says which machine ran the notebook")
    for cell in cells:
        if "execution" in cell.metadata:
            found.append(f"{cell.id}: has the time of its execution")
        if "plt.show()" in cell.source and not pictures(cell):
            found.append(f"{cell.id}: draws, but holds no picture")
        if re.search(r"^(print|check|show)\(", cell.source, re.MULTILINE) and not "".join(texts(cell)).strip():
            found.append(f"{cell.id}: prints, but holds no text")
        for png in pictures(cell):
            if not png.startswith(b"\x89PNG") or not 1_000 < len(png) <= LARGEST_PICTURE:
                found.append(f"{cell.id}: a picture of {len(png)} bytes is no PNG, empty or too large")
        for output in cell.outputs:
            if output.output_type == "error" or (output.output_type == "stream" and output.name != "stdout"):
                found.append(f"{cell.id}: holds an error or a warning")
        found += [f"{cell.id}: holds a path of a machine" for text in texts(cell) if FOREIGN.search(text)]
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_complete_small_and_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert problems(notebook) == [], RERUN
    assert any(pictures(cell) for cell in code_cells(notebook))
    assert path.stat().st_size <= LARGEST_FILE
    assert not FOREIGN.search("\n".join(cell.source for cell in notebook.cells))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_gives_the_outputs_in_the_file(path):
    committed = read(path)
    fresh = execute(committed)
    for now, before in zip(code_cells(fresh), code_cells(committed), strict=True):
        assert texts(now) == texts(before), f"{now.id}: the output in the file is stale; {RERUN}"
        assert len(pictures(now)) == len(pictures(before)), f"{now.id}: {RERUN}"
        warnings = [output.text for output in now.outputs if output.output_type == "stream" and output.name != "stdout"]
        assert not re.search("warning", "".join(warnings), re.IGNORECASE), (now.id, warnings)


def test_a_cell_that_raises_fails():
    cells = [nbformat.v4.new_code_cell("import moe_jax"), nbformat.v4.new_code_cell("assert moe_jax is None")]
    with pytest.raises(CellExecutionError, match="assert moe_jax is None"):
        execute(nbformat.v4.new_notebook(cells=cells))


def _stream(name, text):
    return lambda cell: cell.outputs.append(nbformat.v4.new_output("stream", name=name, text=text))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda cell: cell.outputs.clear(), "holds no"),
        (lambda cell: cell.update(execution_count=None), "from top to bottom"),
        (lambda cell: cell.metadata.update(execution={"iopub.execute_input": "now"}), "time of its execution"),
        (_stream("stderr", "UserWarning: slow"), "a warning"),
        (_stream("stdout", "wrote /home/someone/a.png"), "path"),
        (
            lambda cell: cell.outputs.append(nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])),
            "an error",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["picture", "text"])
def test_damaged_outputs_are_noticed(damage, complaint, kind):
    notebook = read(NOTEBOOKS[0])
    cell = next(
        cell for cell in code_cells(notebook) if (pictures(cell) if kind == "picture" else "".join(texts(cell)))
    )
    damage(cell)
    assert any(complaint in problem for problem in problems(notebook))
