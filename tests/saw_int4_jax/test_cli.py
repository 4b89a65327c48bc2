"""The command line: output, results files, and one line with exit code 2 for bad input."""

import io
import json

import pytest

from saw_int4_jax.cli import main, parser, read_prompt
from saw_int4_jax.models.llama import LlamaConfig
from tests.checkpoints import SIZES, config_json, random_params, tensors, write_hugging_face

CONFIG = LlamaConfig(**SIZES)
WEIGHTS = tensors(CONFIG, random_params(CONFIG))
PROMPT = ["--prompt", "hello", "--max-new-tokens", "20"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    return str(write_hugging_face(directory, config_json(CONFIG), WEIGHTS))


def generated(capsys, *arguments) -> str:
    assert main(["generate", *arguments]) == 0
    return capsys.readouterr().out


def test_generate_prints_prompt_and_continuation(model, capsys, tmp_path):
    path = tmp_path / "out.json"
    out = generated(capsys, "--model", model, *PROMPT, "--json", str(path))
    (row,) = json.loads(path.read_text())["rows"]
    assert out == f"hello{row['text']}\n"
    assert row["method"] == "bdr"
    assert row["order"] == 16
    assert row["finish"] in ("length", "stop")
    assert row["tokens"] == 20 or row["finish"] == "stop"
    assert row["cache_bytes_per_token"] == 2 * 2 * (16 + 8)


def test_prompt_from_file_and_standard_input(tmp_path, monkeypatch):
    def prompt(*arguments):
        return read_prompt(parser().parse_args(["generate", "--model", "any", *arguments]))

    file = tmp_path / "prompt.txt"
    file.write_text("hello")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello from elsewhere"))
    assert prompt(*PROMPT) == prompt("--prompt-file", str(file)) == "hello"
    assert prompt("--prompt-file", "-") == "hello from elsewhere"
    assert prompt() == ""


@pytest.mark.parametrize("method", ["bf16", "int4"])
def test_methods(model, capsys, method, tmp_path):
    path = tmp_path / "out.json"
    options = ["--method", method, "--max-new-tokens", "1", "--json", str(path)]
    generated(capsys, "--model", model, "--prompt", "hello", *options)
    assert json.loads(path.read_text())["rows"][0]["method"] == method


def test_sampling_goes_by_the_seed(model, capsys):
    hot = ["--model", model, *PROMPT, "--temperature", "1.5", "--top-k", "50", "--seed"]
    assert generated(capsys, *hot, "1") != generated(capsys, *hot, "2")


def test_a_full_pool_stops_and_says_so(model, capsys):
    options = ["--page-size", "8", "--pool-tokens", "16"]
    assert main(["generate", "--model", model, *PROMPT, *options]) == 0
    assert "out of pages" in capsys.readouterr().err


def test_info_tells_bytes_and_bits(model, capsys):
    assert main(["info", "--model", model]) == 0
    out = capsys.readouterr().out
    assert "BDR" in out
    assert "6.00" in out  # 4 + 32 / 16 bits a value


BAD_INPUT = {
    "no such model": (["--model", "/nonexistent"], "/nonexistent"),
    "no prompt": (["--prompt", ""], "a prompt"),
    "order no power of two": (["--order", "12"], "order=12"),
    "order does not divide": (["--order", "32"], "order=32"),
    "rotated bf16": (["--method", "bf16", "--order", "4"], "no rotation"),
    "nothing to rotate": (["--method", "int4", "--rotate-v"], "method='int4'"),
    "page size": (["--page-size", "0"], "page_size=0"),
    "pool too small": (["--page-size", "4", "--pool-tokens", "4"], "a prompt of 6 tokens to fit"),
    "no new tokens": (["--max-new-tokens", "0"], "max_new_tokens=0"),
    "temperature": (["--temperature", "-1"], "temperature=-1.0"),
    "top-p": (["--top-p", "1.5"], "top_p=1.5"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(name, model, capsys):
    arguments, message = BAD_INPUT[name]
    assert main(["generate", "--model", model, *PROMPT, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("saw-int4: error: Expected")
    assert message in err
    assert err.count("\n") == 1


def test_non_finite_weights_are_refused(tmp_path, capsys):
    weights = {name: tensor.copy() for name, tensor in WEIGHTS.items()}
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    directory = write_hugging_face(tmp_path, config_json(CONFIG), weights)
    assert main(["generate", "--model", str(directory), *PROMPT]) == 2
    assert "finite" in capsys.readouterr().err


def test_unsupported_architecture_is_refused(tmp_path, capsys):
    raw = config_json(CONFIG) | {"model_type": "gpt2"}
    directory = write_hugging_face(tmp_path, raw, WEIGHTS)
    assert main(["generate", "--model", str(directory), *PROMPT]) == 2
    assert "gpt2" in capsys.readouterr().err


def test_unknown_options_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--nonsense"])
    assert stopped.value.code == 2
