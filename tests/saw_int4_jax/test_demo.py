"""The demonstration, on the bundled model and text."""

import json

import pytest

from saw_int4_jax import demo
from saw_int4_jax.cli import main
from saw_int4_jax.models import load_model


def test_bundled_model_loads_and_knows_its_text():
    model = load_model(demo.REFERENCE_MODEL)
    text = demo.heldout_windows(model)
    assert text.shape[1] == demo.WINDOW + 1 <= model.config.max_length + 1
    assert (text[:, 0] == model.tokenizer.bos_id).all()
    assert text.size > 20_000


@pytest.mark.slow
def test_demo_prints_text_and_a_table_that_shows_what_rotation_does(capsys, tmp_path, monkeypatch):
    some = demo.heldout_windows(load_model(demo.REFERENCE_MODEL))[::5]
    monkeypatch.setattr(demo, "heldout_windows", lambda model: some)
    path = tmp_path / "demo.json"
    assert main(["demo", "--max-new-tokens", "40", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(demo.PROMPT)
    assert "BDR" in out
    assert err == ""  # no progress bars where there is no terminal
    rows = {
        (row["outlier_scale"], row["method"]): row for row in json.loads(path.read_text())["rows"]
    }
    assert set(rows) == {(s, m) for s in demo.OUTLIER_SCALES for m in demo.METHODS}
    for scale in demo.OUTLIER_SCALES:
        bf16, int4, bdr = (rows[scale, method] for method in demo.METHODS)
        assert bf16["kl"] == 0
        assert bf16["bits_per_byte"] < bdr["bits_per_byte"] < int4["bits_per_byte"]
        assert bdr["kl"] < 0.7 * int4["kl"]
        assert bdr["top1"] > int4["top1"]
        assert bf16["cache_bytes_per_token"] / bdr["cache_bytes_per_token"] > 3.76
    assert rows[16, "bf16"]["bits_per_byte"] == pytest.approx(
        rows[1, "bf16"]["bits_per_byte"], abs=1e-3
    )
