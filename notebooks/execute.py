"""Runs the notebooks from top to bottom and keeps their outputs: ``python notebooks/execute.py [NOTEBOOK ...]``.

`jupyter execute` would also write when each cell ran and which Python ran it, so that the files differ after every run.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
INLINE = "module://matplotlib_inline.backend_inline"  # pictures go into the notebook, whatever MPLBACKEND says outside


def execute(notebook: nbformat.NotebookNode, timeout: int = 300) -> nbformat.NotebookNode:
    """Fills in the outputs of `notebook`, on a CPU, in a fresh kernel of this Python.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; its traceback is in the message.
    """
    path = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "MPLBACKEND": INLINE})
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(FOLDER.glob("*.ipynb")):
        print(f"executing {name}")
        nbformat.write(execute(nbformat.read(name, as_version=4)), name)
