"""The notebook runs from top to bottom, shows its figures, and is kept without outputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbclient (extra test)")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient (extra test)")
pytest.importorskip("ipykernel", reason="needs ipykernel (extra test)")
pytest.importorskip("sklearn", reason="the digits need scikit-learn (extra cli)")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "first_ten_minutes.ipynb"


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not outputs_of(notebook)
    assert all(cell.get("execution_count") is None for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of Jupyter's own clients
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    outputs = outputs_of(notebook)
    shown = "".join(output.get("text", "") for output in outputs)
    errors = [output for output in outputs if output.get("name") == "stderr"]
    assert not errors, errors
    assert "test accuracy" in shown
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    bars = [output.data["text/plain"] for output in outputs if "█" in output.get("data", {}).get("text/plain", "")]
    assert len(bars) == 1
    assert "examples/s" in bars[0]
    assert (tmp_path / "runs" / "report.html").stat().st_size > 50_000
