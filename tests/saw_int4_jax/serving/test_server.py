"""The server on a loopback port, driven by OpenAI's own client."""

import contextlib
import json
import threading
import time

import pytest

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from saw_int4_jax import cli, init_cache  # noqa: E402
from saw_int4_jax.models import load_model  # noqa: E402
from saw_int4_jax.models.llama import LlamaConfig, one_layer_forward  # noqa: E402
from saw_int4_jax.serving import Engine, Request  # noqa: E402
from saw_int4_jax.serving import command as serve_command  # noqa: E402
from saw_int4_jax.serving.chat import ChatTemplate, load_chat_template  # noqa: E402
from saw_int4_jax.serving.protocol import Served  # noqa: E402
from saw_int4_jax.serving.server import create_app  # noqa: E402
from tests.checkpoints import (  # noqa: E402
    SIZES,
    config_json,
    random_params,
    tensors,
    write_hugging_face,
)

pytestmark = pytest.mark.slow

CONFIG = LlamaConfig(**SIZES | dict(max_length=512))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
KEY = "secret"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_hugging_face(path, config_json(CONFIG), tensors(CONFIG, random_params(CONFIG)))
    tokens = dict(bos_token={"content": "<bos>"}, eos_token="<eos>")
    (path / "tokenizer_config.json").write_text(json.dumps(tokens | {"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory)


def make_engine(model, **options) -> Engine:
    spec = model.config.cache_spec(48, page_size=16)
    options = dict(piece=16, pieces=2, steps=4, batches=[4]) | options
    cache = init_cache(spec, 4, 512)
    forward = one_layer_forward(model.config)
    return Engine(forward, model.variables, cache, tokenizer=model.tokenizer, **options)


@contextlib.contextmanager
def serving(app):
    """Runs an application in a thread; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def make_app(engine, model, directory, **options):
    template = load_chat_template(directory)
    served = Served("tiny", model.tokenizer, 272, engine.max_length, template.render)
    return create_app(engine, served, api_key=KEY, **options)


@pytest.fixture(scope="module")
def engine(model):
    return make_engine(model)


@pytest.fixture(scope="module")
def address(engine, model, directory):
    with serving(make_app(engine, model, directory, max_body_bytes=10_000)) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def expected(model, prompt, count, **options):
    """What an engine of its own says."""
    (response,) = make_engine(model).generate([Request(prompt, count, **options)])
    return response


def test_completion(client, model):
    prompt = "hello"
    want = expected(model, model.tokenizer.encode(prompt), 20)
    got = client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0)
    assert got.choices[0].text == want.text
    assert got.choices[0].finish_reason == want.finish
    assert got.usage.completion_tokens == len(want.tokens)
    assert got.usage.prompt_tokens == 6


def test_streams_say_the_same(client, model):
    options = dict(model="tiny", prompt=["hello", "abc"], max_tokens=30, temperature=0, n=2)
    whole = client.completions.create(**options)
    texts, reasons, usage = [""] * 4, [None] * 4, None
    options |= dict(stream=True, stream_options={"include_usage": True})
    for part in client.completions.create(**options):
        for choice in part.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = part.usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_chat(client, model):
    messages = [{"role": "user", "content": "hi"}]
    ids = model.tokenizer.backend.encode("<bos>[user]hi[assistant]", add_special_tokens=False).ids
    assert ids[0] == 0
    assert ids[1] != 0
    want = expected(model, ids, 24, temperature=0.8, seed=5)
    options = dict(model="tiny", messages=messages, max_tokens=24, temperature=0.8, seed=5)
    got = client.chat.completions.create(**options)
    assert got.choices[0].message.content == want.text
    assert got.choices[0].message.role == "assistant"
    parts = list(client.chat.completions.create(**options, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == want.text
    assert parts[-1].choices[0].finish_reason == want.finish


def test_stop_strings(client, model):
    whole = expected(model, model.tokenizer.encode("hello"), 40).text
    stop = whole[5:7]
    got = client.completions.create(
        model="tiny", prompt="hello", max_tokens=40, temperature=0, stop=[stop]
    )
    assert got.choices[0].text == whole[: whole.index(stop)]
    assert got.choices[0].finish_reason == "stop"


def test_models_health_and_metrics(client, address):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    client.completions.create(model="tiny", prompt="hello", max_tokens=3)
    text = httpx.get(f"{address}/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(figures["saw_new_tokens_total"]) >= 3
    assert float(figures['saw_requests_total{finish="length"}']) >= 1
    assert float(figures["saw_ttft_seconds_count"]) >= 1
    pages = [float(figures[f'saw_pages{{state="{s}"}}']) for s in ("held", "idle", "free")]
    assert sum(pages) == 48


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (dict(model="other"), openai.NotFoundError),
        (dict(max_tokens=1000), openai.BadRequestError),
        (dict(temperature=-1), openai.BadRequestError),
        (dict(top_p=0), openai.BadRequestError),
        (dict(logprobs=3), openai.BadRequestError),
    ],
)
def test_bad_requests_are_refused_with_a_reason(client, fields, error):
    with pytest.raises(error, match="Expected"):
        client.completions.create(**dict(model="tiny", prompt="hello") | fields)


def test_bodies_that_are_too_large_or_no_json(address):
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{address}/v1/completions"
    assert httpx.post(url, content=b"{", headers=headers).status_code == 400
    answer = httpx.post(url, content=b" " * 10_001, headers=headers)
    assert answer.status_code == 413
    assert "10000" in answer.json()["error"]["message"]


@pytest.mark.parametrize("key", ["wrong", "sécret"])
def test_the_key_is_asked_for(address, key):
    url = f"{address}/v1/models"
    headers = [(b"authorization", f"Bearer {key}".encode())]
    for wrong in ({}, headers):
        assert httpx.get(url, headers=wrong).status_code == 401


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_pages(engine, address, stream):
    before = engine.status()["finished"].get("cancelled", 0)
    body = dict(model="tiny", prompt="hello", max_tokens=450, ignore_eos=True, stream=stream)
    headers = {"Authorization": f"Bearer {KEY}"}
    post = httpx.stream(
        "POST", f"{address}/v1/completions", json=body, headers=headers, timeout=0.3
    )
    with contextlib.suppress(httpx.ReadTimeout), post as answer:
        for _ in answer.iter_bytes():
            break
    until(lambda: engine.status()["finished"].get("cancelled", 0) == before + 1)
    until(lambda: engine.status()["pages_held"] == 0)


def test_overload_is_refused(model, directory):
    engine = make_engine(model, max_waiting=1)
    app = make_app(engine, model, directory)
    with (
        serving(app) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client,
    ):
        with pytest.raises(openai.RateLimitError, match="try again"):
            client.completions.create(model="tiny", prompt=["hello"] * 100, max_tokens=50)
        assert engine.status()["running"] <= 4  # those that had been taken were cancelled
        until(lambda: engine.status()["pages_held"] == 0)
        assert client.completions.create(model="tiny", prompt="hello", max_tokens=2).choices


def test_a_dead_engine_is_unavailable(model, directory):
    engine = make_engine(model)
    app = make_app(engine, model, directory)
    with (
        serving(app) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client,
    ):
        engine._call = None  # whatever may go wrong
        with pytest.raises(openai.InternalServerError, match="engine"):
            client.completions.create(model="tiny", prompt="hello", max_tokens=20)
        with pytest.raises(openai.InternalServerError, match="engine"):
            client.completions.create(model="tiny", prompt="hello", max_tokens=20)
        assert httpx.get(f"{address}/health").status_code == 503


def test_templates_refuse_and_are_checked():
    with pytest.raises(ValueError, match="roles"):
        ChatTemplate("{{ raise_exception('roles') }}", {}).render([])
    with pytest.raises(ValueError, match="template"):
        ChatTemplate("{% for", {})
    with pytest.raises(ValueError, match="template"):  # sandboxed
        ChatTemplate("{{ ''.__class__.__mro__ }}", {}).render([])


def test_the_command_serves(directory, monkeypatch):
    seen = {}

    def run(app, **options):
        seen.update(options, app=app)

    monkeypatch.setattr(uvicorn, "run", run)
    small = ["--rows", "1", "--page-size", "16", "--piece", "16", "--pieces", "1"]
    assert cli.main(["serve", "--model", str(directory), *small, "--max-length", "64"]) == 0
    assert seen["host"] == "127.0.0.1"
    with serving(seen["app"]) as address:
        (model,) = httpx.get(f"{address}/v1/models").json()["data"]
        assert (model["id"], model["max_model_len"]) == ("tiny", 64)


@pytest.mark.parametrize(
    "options", [["--pool-gb", "0"], ["--method", "int4", "--rotate-v"], ["--order", "3"]]
)
def test_bad_options_are_one_line(directory, capsys, options):
    assert cli.main(["serve", "--model", str(directory), *options]) == 2
    assert "Expected" in capsys.readouterr().err


def test_loopback():
    loopback = [serve_command.is_loopback(x) for x in ("127.0.0.1", "::1", "localhost")]
    assert loopback == [True] * 3
    assert not serve_command.is_loopback("0.0.0.0")
