"""lm-evaluation-harness drives the bundled model through a cache, without a network."""

import json

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra evaluate")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from saw_int4_jax.demo import REFERENCE_MODEL  # noqa: E402
from saw_int4_jax.harness import CachedLM  # noqa: E402
from saw_int4_jax.models import load_model  # noqa: E402

QUESTIONS = [
    {"text": "import numpy as", "choices": [" np", " zz"], "answer": 0},
    {"text": "def __init__(", "choices": ["qqq", "self"], "answer": 1},
]
TASK = """task: copied_names
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def model():
    return load_model(REFERENCE_MODEL)


def requests(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)
        for i, args in enumerate(arguments)
    ]


@pytest.mark.slow
def test_a_local_task_runs_end_to_end(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    (tmp_path / "task.yaml").write_text(TASK % data)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=CachedLM(model, "bdr"),
        tasks=["copied_names"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    assert results["results"]["copied_names"]["acc,none"] == 1.0


@pytest.mark.parametrize("method", ["bdr", "kivi"])
def test_parts_of_a_text_add_up_to_the_whole(model, method):
    lm = CachedLM(model, method, batch_size=2)
    text = "def add(a, b):\n    return a + b\n"
    whole = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))[0]
    cuts = [("", text[:10]), (text[:10], text[10:])]
    parts = lm.loglikelihood(requests("loglikelihood", *cuts))
    assert sum(value for value, _ in parts) == pytest.approx(whole, abs=1e-3)
    assert np.isfinite(whole)
    assert whole < 0


@pytest.mark.parametrize("method", ["bdr", "window"])
def test_what_it_generates_is_what_it_calls_greedy(model, method):
    lm = CachedLM(model, method, batch_size=2)
    prompt = "import numpy as"
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    (text,) = lm.generate_until(requests("generate_until", (prompt, options)))
    assert text
    assert "\n" not in text
    ((_, greedy), (_, other)) = lm.loglikelihood(
        requests("loglikelihood", (prompt, text), (prompt, text[:-1] + "~"))
    )
    assert greedy
    assert not other


def test_a_method_that_needs_text_says_so(model):
    with pytest.raises(ValueError, match="Expected calibration text for gptq"):
        CachedLM(model, "gptq")


def test_sampling_is_refused(model):
    lm = CachedLM(model, "bdr")
    options = {"do_sample": True, "temperature": 0.7}
    with pytest.raises(ValueError, match="greedy"):
        lm.generate_until(requests("generate_until", ("x", options)))
