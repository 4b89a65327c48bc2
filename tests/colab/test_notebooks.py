"""The notebooks run from top to bottom, and each is the same thing as its plain Python."""

import os
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "colab").glob("*.py"))
IDS = [script.stem for script in SCRIPTS]


def test_there_are_five():
    assert IDS == [
        "benchmark_your_chip",
        "how_it_works",
        "hugging_face_model",
        "quickstart",
        "your_flax_model",
    ]


def test_all_begin_alike():
    """The cells that install and set up are the same, so that one reading is enough."""
    setups = {
        re.search(r"# Installs .*?\n# %% \[markdown\]", s.read_text(), re.S)[0] for s in SCRIPTS
    }
    assert len(setups) == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=IDS)
def test_pairs_hold_the_same_cells_and_no_output(script):
    jupytext = pytest.importorskip("jupytext")
    plain, notebook = jupytext.read(script), jupytext.read(script.with_suffix(".ipynb"))
    assert [(c.cell_type, c.source) for c in plain.cells] == [
        (c.cell_type, c.source) for c in notebook.cells
    ], "python -m jupytext --sync colab/*.py"
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=IDS)
def test_runs_on_a_fresh_kernel_and_ends_with_a_picture(script, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("SAW_INT4_QUICK", "1")
    monkeypatch.setenv("SAW_INT4_SOURCE", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    # A download that fails is one line, and the notebook goes on with the bundled model.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SAW_INT4_DOWNLOAD", "Qwen/Qwen3-0.6B")
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=400, resources=where).execute()
    said = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ()))
    assert ("could not be downloaded" in said) == (script.stem == "hugging_face_model")
    data = [output.get("data", {}) for output in notebook.cells[-1].outputs]
    assert any("image/png" in kinds for kinds in data)
    assert (tmp_path / f"{script.stem}.png").exists()
