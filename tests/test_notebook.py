"""The notebook runs top to bottom, in a kernel of its own; here for few rounds on few examples."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_holds_no_output(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert str(ROOT) not in path.read_text()


def test_it_runs_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(ROOT / "notebooks" / "first_steps.ipynb", as_version=4)
    (chosen,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    few = ["data.test_fraction=0.7", "evaluate.examples=200", "evaluate.repeats=1", "evaluate.every=1", "device=cpu"]
    chosen.source += f"\nROUNDS = 2\nOPTIONS += {few}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's machinery, which is not ours
        client = nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
        client.execute()
        asyncio.set_event_loop(None)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in shown if "image/svg+xml" in output.get("data", {})]
    assert len(pictures) == 5
    said = "".join(output.text for output in shown if output.output_type == "stream")
    assert "fedema  Effective rank: " in said
    assert "is nearest to [" in said
    assert not [output for output in shown if output.get("name") == "stderr"], said
    assert len(list(tmp_path.glob("runs/*/report.html"))) == 2
