"""OpenAI's completions and chat completions: JSON bodies to requests, responses to JSON.

Plain Python, no server. What is not supported is refused with a reason, not passed over: an
answer to another question is worse than none.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saw_int4_jax.models.tokenizer import Tokenizer
from saw_int4_jax.serving.request import Request, Response

MAX_CHOICES = 128

# Fields without influence on the answer.
IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key"}
# Fields that are taken with these values alone, which ask for nothing.
INACTIVE: dict[str, tuple] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
}


class Refused(ValueError):
    """A request that cannot be answered: the HTTP status, and the field that is to blame."""

    def __init__(self, message: str, *, field: str | None = None, status: int = 400):
        super().__init__(message)
        self.field, self.status = field, status

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {"message": str(self), "type": kind, "param": self.field, "code": self.status}
        }


@dataclasses.dataclass(frozen=True)
class Served:
    """The model behind the interface.

    Attributes:
      name: what clients call it.
      tokenizer: between its text and tokens.
      vocab_size: tokens known.
      max_length: the most tokens of a prompt and its answer.
      render_chat: messages to text; `None`: it has no chat template.
      timeout_s: seconds after which an answer ends where it is; `None`: never.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    max_length: int
    render_chat: Callable[[Sequence[Mapping[str, Any]]], str] | None = None
    timeout_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Ask:
    """A parsed body.

    Attributes:
      chat: whether it asks for a chat completion.
      requests: one for each choice, in order.
      stream: whether to answer piece by piece.
      usage: whether a stream ends with its token counts.
      id: of the answer.
      created: when, in seconds since 1970.
    """

    chat: bool
    requests: list[Request]
    stream: bool
    usage: bool
    id: str
    created: int


def parse(body: Any, served: Served, *, chat: bool) -> Ask:
    """What a body asks for.

    Raises:
      Refused: it is malformed, or asks for what is not supported.
    """
    if not isinstance(body, dict):
        raise Refused("Expected the body to be a JSON object")
    fields = _Fields(body)
    model = fields.take("model", str, default=None)
    if model is None:
        raise Refused("Expected the field model", field="model")
    if model != served.name:
        raise Refused(f"Expected {model=} to be {served.name!r}", field="model", status=404)
    prompts = _chat_prompt(fields, served) if chat else _prompts(fields, served)
    limit = fields.take("max_tokens", int, default=None)
    if chat:
        limit = fields.take("max_completion_tokens", int, default=limit)
    elif limit is None:
        limit = 16  # OpenAI's
    options = dict(
        temperature=fields.take("temperature", float, default=1.0, low=0, high=2),
        top_p=fields.take("top_p", float, default=1.0, low=0, high=1),
        top_k=fields.take("top_k", int, default=0, low=0),
        min_p=fields.take("min_p", float, default=0.0, low=0, high=1),
        stop=_stops(fields),
        ignore_eos=fields.take("ignore_eos", bool, default=False),
        timeout_s=served.timeout_s,
    )
    seed = fields.take("seed", int, default=None)
    count = fields.take("n", int, default=1, low=1)
    stream = fields.take("stream", bool, default=False)
    usage = bool((fields.take("stream_options", dict, default=None) or {}).get("include_usage"))
    fields.refuse_the_rest()
    if len(prompts) * count > MAX_CHOICES:
        raise Refused(f"Expected at most {MAX_CHOICES} choices", field="n")
    requests = []
    for prompt in prompts:
        room = served.max_length - len(prompt)
        if room < 1 or (limit is not None and limit > room):
            raise Refused(
                f"Expected {len(prompt)} prompt tokens and max_tokens={limit} to be at most "
                f"{served.max_length} together",
                field="max_tokens",
            )
        for choice in range(count):
            # A seed may be of any size; a choice has its own.
            own = None if seed is None else (seed + choice) % 2**31
            new = room if limit is None else limit
            requests.append(Request(prompt, new, seed=own, **options))
    kind = "chatcmpl" if chat else "cmpl"
    return Ask(chat, requests, stream, usage, f"{kind}-{uuid.uuid4().hex}", int(time.time()))


class _Fields:
    """The fields of a body, taken one after the other."""

    def __init__(self, body: dict[str, Any]):
        self._left = dict(body)

    def take(
        self,
        name: str,
        kind: Any,
        *,
        default: Any,
        low: float | None = None,
        high: float | None = None,
    ) -> Any:
        """A field's value, `default` where it is missing or null."""
        value: Any = self._left.pop(name, None)
        if value is None:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:  # a bool is no int
            raise Refused(f"Expected {name} to be of type {kind.__name__}", field=name)
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            bounds = f"at least {low}" if high is None else f"within {low} .. {high}"
            raise Refused(f"Expected {name}={value} to be {bounds}", field=name)
        return value

    def any(self, name: str) -> Any:
        return self._left.pop(name, None)

    def refuse_the_rest(self) -> None:
        for name, value in self._left.items():
            if name in IGNORED or value is None or value in INACTIVE.get(name, ()):
                continue
            known = "this value of " if name in INACTIVE else ""
            raise Refused(f"Expected no {name}: {known}it is not supported", field=name)


def _prompts(fields: _Fields, served: Served) -> list[list[int]]:
    """A text, several, token ids, or several of these."""
    prompt = fields.any("prompt")
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    elif isinstance(prompt, list) and prompt and all(type(x) is int for x in prompt):
        prompts = [prompt]
    elif isinstance(prompt, list) and prompt:
        prompts = prompt
    else:
        raise Refused("Expected prompt to be text, token ids, or a list of these", field="prompt")
    found = []
    for text in prompts:
        ids = served.tokenizer.encode(text) if isinstance(text, str) else text
        if not isinstance(ids, list) or not all(type(x) is int for x in ids):
            raise Refused("Expected every prompt to be text or token ids", field="prompt")
        if not ids:
            raise Refused("Expected every prompt to hold at least one token", field="prompt")
        if min(ids) < 0 or max(ids) >= served.vocab_size:
            raise Refused(f"Expected token ids within {served.vocab_size=}", field="prompt")
        found.append(ids)
    return found


def _chat_prompt(fields: _Fields, served: Served) -> list[list[int]]:
    messages = fields.take("messages", list, default=[])
    if served.render_chat is None:
        raise Refused(f"Expected a model with a chat template: {served.name} has none", status=400)
    if not messages:
        raise Refused("Expected at least one message", field="messages")
    plain = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
            for part in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise Refused("Expected every message to have a role and text", field="messages")
        plain.append({**message, "content": content})
    try:
        text = served.render_chat(plain)
    except ValueError as error:
        raise Refused(str(error), field="messages") from error
    # The template has written the special tokens.
    ids = served.tokenizer.backend.encode(text, add_special_tokens=False).ids
    if not ids:
        raise Refused("Expected the chat template to make a text", field="messages")
    return [ids]


def _stops(fields: _Fields) -> tuple[str, ...]:
    stop = fields.any("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(x, str) and x for x in stops):
        raise Refused("Expected stop to be a text or a list of texts, none empty", field="stop")
    if len(stops) > 16:
        raise Refused(f"Expected {len(stops)} stop texts to be at most 16", field="stop")
    return tuple(stops)


# --- Answers ----------------------------------------------------------------------------------


def finish_reason(finish: str | None) -> str | None:
    """In OpenAI's words, which know no deadline."""
    return {None: None, "stop": "stop"}.get(finish, "length")


def answer(ask: Ask, served: Served, responses: Sequence[Response]) -> dict[str, Any]:
    """The whole answer."""
    choices = []
    for index, response in enumerate(responses):
        choice: dict[str, Any] = {"index": index, "logprobs": None}
        choice["finish_reason"] = finish_reason(response.finish)
        if ask.chat:
            choice["message"] = {"role": "assistant", "content": response.text}
        else:
            choice["text"] = response.text
        choices.append(choice)
    kind = "chat.completion" if ask.chat else "text_completion"
    return {**_head(ask, served, kind), "choices": choices, "usage": usage(responses)}


def piece(
    ask: Ask,
    served: Served,
    index: int,
    text: str,
    *,
    finish: str | None = None,
    role: bool = False,
) -> dict[str, Any]:
    """A part of a streamed answer: new text of one choice."""
    choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": finish}
    if ask.chat:
        choice["delta"] = ({"role": "assistant"} if role else {}) | (
            {"content": text} if text or role else {}
        )
    else:
        choice["text"] = text
    kind = "chat.completion.chunk" if ask.chat else "text_completion"
    return {**_head(ask, served, kind), "choices": [choice]}


def last_piece(ask: Ask, served: Served, responses: Sequence[Response]) -> dict[str, Any]:
    """What ends a stream that was asked for its token counts."""
    kind = "chat.completion.chunk" if ask.chat else "text_completion"
    return {**_head(ask, served, kind), "choices": [], "usage": usage(responses)}


def usage(responses: Sequence[Response]) -> dict[str, Any]:
    prompt = sum(len(response.request.prompt) for response in responses)
    new = sum(len(response.tokens) for response in responses)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(x.reused_tokens for x in responses)},
    }


def _head(ask: Ask, served: Served, kind: str) -> dict[str, Any]:
    return {"id": ask.id, "object": kind, "created": ask.created, "model": served.name}
