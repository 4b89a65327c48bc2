"""OpenAI's bodies to requests and back, without a server."""

import dataclasses

import pytest

from saw_int4_jax.models.tokenizer import Tokenizer
from saw_int4_jax.serving import Request, Response
from saw_int4_jax.serving.protocol import Refused, Served, answer, last_piece, parse, piece
from tests.checkpoints import byte_level

TOKENIZER = Tokenizer(byte_level())


def render(messages):
    if messages[0]["role"] == "nobody":
        raise ValueError("Expected somebody")
    return "".join(f"[{message['role']}]{message['content']}" for message in messages)


SERVED = Served("tiny", TOKENIZER, 272, 64, render)
HELLO = TOKENIZER.encode("hello")
MESSAGES = [{"role": "user", "content": "hi"}]


def completion(**fields):
    return parse({"model": "tiny", "prompt": "hello"} | fields, SERVED, chat=False)


def chat(**fields):
    return parse({"model": "tiny", "messages": MESSAGES} | fields, SERVED, chat=True)


def test_defaults_are_those_of_openai():
    ask = completion()
    (request,) = ask.requests
    assert request == Request(HELLO, 16, temperature=1.0)
    assert not ask.stream
    (request,) = chat().requests
    assert TOKENIZER.decode(request.prompt) == "[user]hi"
    assert request.prompt[0] != 0  # special tokens are the template's affair
    assert request.max_new_tokens == 64 - len(request.prompt)


def test_answers_end_in_time():
    served = dataclasses.replace(SERVED, timeout_s=30.0)
    (request,) = parse({"model": "tiny", "prompt": "hello"}, served, chat=False).requests
    assert request.timeout_s == 30.0


def test_options():
    options = dict(temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=7, stop="x", max_tokens=5)
    (request,) = completion(**options).requests
    expected = dict(top_p=0.5, top_k=3, min_p=0.1, seed=7, stop=("x",), max_new_tokens=5)
    assert request == Request(HELLO, temperature=0.0, **expected)
    assert chat(max_completion_tokens=9, max_tokens=4).requests[0].max_new_tokens == 9
    assert chat(max_tokens=4).requests[0].max_new_tokens == 4
    ask = chat(stream=True, stream_options={"include_usage": True}, stop=["a", "b"])
    assert ask.stream
    assert ask.usage
    assert ask.requests[0].stop == ("a", "b")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([5, 6], [[5, 6]]),
        (["hello", "hello"], [HELLO, HELLO]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_prompts(prompt, expected):
    assert [request.prompt for request in completion(prompt=prompt).requests] == expected


def test_choices_have_seeds_of_their_own():
    requests = completion(prompt=["a", "b"], n=2, seed=2**31 - 1).requests
    assert [request.seed for request in requests] == [2**31 - 1, 0, 2**31 - 1, 0]
    assert [request.prompt for request in requests[:2]] == [TOKENIZER.encode("a")] * 2


def test_what_asks_for_nothing_is_taken():
    nothing = dict(logprobs=None, logit_bias={}, presence_penalty=0, user="me", best_of=1)
    completion(**nothing, echo=False, suffix=None)
    chat(tools=[], response_format={"type": "text"}, logprobs=False, metadata={"a": "b"})


@pytest.mark.parametrize(
    ("fields", "field", "status"),
    [
        (dict(model="other"), "model", 404),
        (dict(model=None), "model", 400),
        (dict(prompt=None), "prompt", 400),
        (dict(prompt=[]), "prompt", 400),
        (dict(prompt=[[]]), "prompt", 400),
        (dict(prompt=[300]), "prompt", 400),
        (dict(prompt=[-1]), "prompt", 400),
        (dict(prompt=["a", 5]), "prompt", 400),
        (dict(prompt=[True]), "prompt", 400),
        (dict(prompt="a" * 64), "max_tokens", 400),
        (dict(max_tokens=100), "max_tokens", 400),
        (dict(max_tokens="5"), "max_tokens", 400),
        (dict(temperature=-1), "temperature", 400),
        (dict(temperature=float("nan")), "temperature", 400),
        (dict(temperature="hot"), "temperature", 400),
        (dict(n=0), "n", 400),
        (dict(n=1000), "n", 400),
        (dict(stop=""), "stop", 400),
        (dict(stop=[5]), "stop", 400),
        (dict(stop=["a"] * 17), "stop", 400),
        (dict(logprobs=5), "logprobs", 400),
        (dict(best_of=4), "best_of", 400),
        (dict(presence_penalty=0.5), "presence_penalty", 400),
        (dict(surprise=1), "surprise", 400),
    ],
)
def test_bad_completions_are_refused(fields, field, status):
    with pytest.raises(Refused, match="Expected") as error:
        completion(**fields)
    assert (error.value.field, error.value.status) == (field, status)
    assert error.value.body()["error"]["param"] == field


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["hi"],
        [{"role": "user"}],
        [{"content": "hi"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "nobody", "content": "hi"}],
    ],
)
def test_bad_messages_are_refused(messages):
    with pytest.raises(Refused, match="Expected") as error:
        chat(messages=messages)
    assert error.value.field == "messages"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    (request,) = chat(messages=[{"role": "user", "content": parts}]).requests
    assert request == chat().requests[0]


def test_tools_and_a_missing_template_are_refused():
    with pytest.raises(Refused, match="tools"):
        chat(tools=[{"type": "function"}])
    with pytest.raises(Refused, match="template"):
        parse({"model": "tiny", "messages": MESSAGES}, Served("tiny", TOKENIZER, 9, 9), chat=True)


@pytest.mark.parametrize("body", [None, [], "text", 3])
def test_bodies_must_be_objects(body):
    with pytest.raises(Refused, match="object"):
        parse(body, SERVED, chat=False)


def test_answers():
    ask = completion(n=2)
    responses = [
        Response(ask.requests[0], 0, [5, 6], "ab", "stop", reused_tokens=4),
        Response(ask.requests[1], 1, [7], "c", "deadline"),
    ]
    whole = answer(ask, SERVED, responses)
    assert whole["object"] == "text_completion"
    assert [choice["text"] for choice in whole["choices"]] == ["ab", "c"]
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["stop", "length"]
    expected = dict(prompt_tokens=12, completion_tokens=3, total_tokens=15)
    assert whole["usage"] == expected | {"prompt_tokens_details": {"cached_tokens": 4}}
    assert piece(ask, SERVED, 1, "x")["choices"][0]["text"] == "x"
    assert last_piece(ask, SERVED, responses)["usage"] == whole["usage"]

    ask = chat()
    whole = answer(ask, SERVED, responses[:1])
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "ab"}
    first = piece(ask, SERVED, 0, "", role=True)["choices"][0]
    assert first["delta"] == {"role": "assistant", "content": ""}
    last = piece(ask, SERVED, 0, "", finish="stop")["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
