"""`comparison` and `saw-int4 evaluate`: what is measured, resuming, bad input."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from saw_int4_jax import comparison
from saw_int4_jax.cli import main
from saw_int4_jax.evaluate import compare_logits
from saw_int4_jax.models.llama import LlamaConfig
from tests.checkpoints import SIZES, config_json, random_params, tensors, write_hugging_face

CONFIG = LlamaConfig(**SIZES | dict(num_layers=1))
OPTIONS = ["--context", "64", "--rows", "2", "--batch", "4", "--seeds", "2"]
OPTIONS += ["--decode-tokens", "8", "--windows", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    weights = tensors(CONFIG, random_params(CONFIG))
    return str(write_hugging_face(tmp_path_factory.mktemp("m"), config_json(CONFIG), weights))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    letters = np.random.default_rng(0).choice(list("abcdefgh \n"), 600)
    path.write_text("".join(letters))
    return str(path)


def rows_of(path):
    return [row for row in json.loads(path.read_text())["rows"] if row["op"] == "accuracy"]


def test_evaluate_measures_and_goes_on_where_it_stopped(model, text, tmp_path, capsys):
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    command = ["evaluate", "--model", model, "--text", text, *OPTIONS, "--json", str(out)]
    assert main([*command, "--methods", "bf16,kmeans"]) == 0
    first = rows_of(out)
    bf16, kmeans = first
    assert (bf16["kl"], bf16["top1"], bf16["kl_p99"]) == (0, 1, 0)
    assert bf16["diverged_at"] == bf16["greedy_tokens"] + 1
    assert kmeans["seeds"] == 2
    assert kmeans["calibration_tokens"] > 0
    assert kmeans["kl_seed_std"] > 0
    assert "kmeans" in capsys.readouterr().out

    assert main([*command, "--methods", "kmeans,bdr", "--plot", str(plot)]) == 0
    *second, bdr = rows_of(out)
    assert second == first  # nothing was measured anew
    assert bdr["method"] == "bdr"
    assert bdr["kl"] > 1e-6
    assert bdr["decode_kl"] == pytest.approx(bdr["one_pass_kl"], rel=0.1)
    assert plot.stat().st_size > 0

    assert comparison.load_rows(out, "another set-up") == []


BAD_INPUT = {
    "method": (["--methods", "int5"], "int5"),
    "text too short": (["--context", "5000"], "to hold windows of 5000"),
    "no such text": (["--text", "/nonexistent"], "/nonexistent"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(name, model, text, capsys):
    arguments, message = BAD_INPUT[name]
    assert main(["evaluate", "--model", model, "--text", text, *OPTIONS, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("saw-int4: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_damaged_results_file_is_refused(model, text, tmp_path, capsys):
    path = tmp_path / "out.json"
    path.write_text("{")
    command = ["evaluate", "--model", model, "--text", text, *OPTIONS, "--json", str(path)]
    assert main([*command, "--methods", "bf16"]) == 2
    assert "results file" in capsys.readouterr().err
    assert path.read_text() == "{"


def test_calibration_windows_are_not_scored():
    text = np.arange(12)[:, None].repeat(3, 1)
    score, calibrate = comparison.split_windows(text)
    assert calibrate[:, 0].tolist() == [4, 9]
    assert sorted([*score[:, 0], *calibrate[:, 0]]) == list(range(12))
    assert [len(x) for x in comparison.split_windows(text[:2])] == [1, 1]


def test_needles_come_twice():
    haystack = np.random.default_rng(0).integers(0, 50, (4, 257))
    for row in comparison.make_needles(haystack, 8):
        needle, rest = row[-comparison.NEEDLE :].tolist(), row[: -comparison.NEEDLE].tolist()
        starts = range(len(rest) - len(needle) + 1)
        assert any(rest[i : i + len(needle)] == needle for i in starts)


def test_compared_logits_are_those_of_the_definitions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1, 3, 5))
    targets = np.array([[1, 2, 3]])
    nats, kl, agree, right = compare_logits(*map(jnp.asarray, (a, b, targets)))
    p, r = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    np.testing.assert_allclose(nats, -np.log(p[0, range(3), targets[0]])[None], rtol=1e-5)
    np.testing.assert_allclose(kl, (r * np.log(r / p)).sum(-1), rtol=1e-4)
    assert np.array_equal(agree, a.argmax(-1) == b.argmax(-1))
    assert np.array_equal(right, a.argmax(-1) == targets)
