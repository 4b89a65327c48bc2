"""Results files: one shape, readable back."""

import json

from saw_int4_jax.results import write_results


def test_written_rows_and_meta_come_back(tmp_path):
    rows = [{"op": "demo", "kl": 0.5}, {"op": "demo", "kl": None}]
    path = tmp_path / "cpu" / "demo.json"
    write_results(path, rows)
    results = json.loads(path.read_text())
    assert results["rows"] == rows
    assert set(results["meta"]) == {
        "command",
        "date",
        "device",
        "python",
        "jax",
        "jaxlib",
        "commit",
    }
    assert "cpu" in results["meta"]["device"].lower()
