"""Tests that every notebook runs from the first cell to the last at a reduced size."""

from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from traitlets import default

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


class ThisInterpreter(AsyncKernelManager):
    """A kernel manager that runs kernels by the interpreter of the tests.

    An installed kernel named python3 may belong to another environment; if no folder of
    kernels is searched, only the native kernel remains.
    """

    @default("kernel_spec_manager")
    def _search_no_folder(self):
        return KernelSpecManager(parent=self, kernel_dirs=[])


def test_the_folder_holds_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("KRONJAX_NOTEBOOK_QUICK", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    # Figures are drawn into the notebook, as for a reader.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    working = tmp_path / "work"
    working.mkdir()
    client = NotebookClient(
        nbformat.read(path, as_version=4),
        kernel_name="python3",
        kernel_manager_class=ThisInterpreter,
        timeout=600,
        resources={"metadata": {"path": str(working)}},
    )
    executed = client.execute()
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
