"""Prompt in, tokens out: prefill in chunks, then decode in one compiled loop.

Works with any model of the form `forward(variables, tokens [B, T], cache) -> (logits, cache)`,
for example a Linen module's `apply`. Logits are those of all T tokens, or of each sequence's
newest alone: [B, 1, vocab]. `forward` is a static argument: pass the same function, or the same
object's bound method, to compile once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from saw_int4_jax.cache import Cache, extend, last_token, on_host, split_rows

Forward = Callable[..., Any]

RUNNING, STOPPED, LENGTH, OUT_OF_PAGES = range(4)
FINISH_REASONS = ("running", "stop", "length", "out of pages")


# --- Sampling -------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each of B sequences picks its next token. Filters apply in the order listed.

    Attributes:
      temperature: `float32[B]`; 0 is greedy.
      top_k: `int32[B]`, keep the k most likely; 0 keeps all.
      top_p: `float32[B]`, keep the fewest that together reach p; 1 keeps all.
      min_p: `float32[B]`, keep those at least min_p times as likely as the likeliest; 0: all.
      seed: `int32[B]`. The draw depends on the seed and the token's position, on nothing else.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    seed: Int[Array, "B"]


def make_sampling(
    batch: int,
    *,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    seed: int | Sequence[int] = 0,
) -> Sampling:
    """Sampling for B sequences from numbers or one number each; a single seed is spread.

    Raises:
      ValueError: a parameter is out of range or has not B values.
    """

    def field(name: str, value: Any, dtype: Any, valid: Callable[[Any], Any], what: str) -> Any:
        values = np.asarray(value)
        if values.shape not in ((), (batch,)) or not np.all(valid(values)):
            raise ValueError(f"Expected {name}={value} to be {what}, one or {batch} of them")
        return np.broadcast_to(values, (batch,)).astype(dtype)  # a compiled call brings it over

    seeds = np.asarray(seed) + (np.arange(batch) if np.ndim(seed) == 0 else 0)
    at_least_zero = "finite and at least 0"
    return Sampling(
        field(
            "temperature", temperature, "float32", lambda x: (x >= 0) & (x < np.inf), at_least_zero
        ),
        field("top_k", top_k, "int32", lambda x: (x >= 0) & (x < 2**31), at_least_zero),
        field("top_p", top_p, "float32", lambda x: (x > 0) & (x <= 1), "above 0 and at most 1"),
        field("min_p", min_p, "float32", lambda x: (x >= 0) & (x <= 1), "within 0 .. 1"),
        field("seed", seeds, "int32", lambda x: abs(x) < 2**31, "a 32-bit integer"),
    )


def sample(
    logits: Float[Array, "B vocab"], position: Int[Array, "B"], sampling: Sampling | None
) -> Int[Array, "B"]:
    """The next token of each sequence; `sampling=None` is greedy for all."""
    greedy = jnp.argmax(logits, -1).astype(jnp.int32)
    if sampling is None:
        return greedy
    order = jnp.argsort(logits, axis=-1, descending=True)  # likeliest first
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
    scaled = jnp.take_along_axis(logits, order, axis=-1) / temperature
    rank = jnp.arange(logits.shape[-1])
    kept = (rank < sampling.top_k[:, None]) | (sampling.top_k[:, None] == 0)
    probs = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf))
    kept &= jnp.cumsum(probs, -1) - probs < sampling.top_p[:, None]
    kept &= probs >= sampling.min_p[:, None] * probs[:, :1]

    def draw(seed, position, logits):
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), logits)

    choice = jax.vmap(draw)(sampling.seed, position, jnp.where(kept, scaled, -jnp.inf))
    drawn = jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jnp.where(sampling.temperature > 0, drawn, greedy)


# --- Steps ----------------------------------------------------------------------------------


def step(
    forward: Forward,
    variables: Any,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    cache: Cache,
) -> tuple[Float[Array, "B vocab"], Cache, Bool[Array, "B"]]:
    """Appends `counts` of the T tokens to each sequence and runs the model on them.

    Decode (T = 1), a chunk of prefill and verification of drafts are this same step. Jittable.

    Returns:
      The logits after each sequence's newest token, the cache, and which sequences had room; one
      that had not, or whose count is 0, is left as it was and its logits mean nothing.
    """
    cache, ok = extend(cache, counts, max_count=tokens.shape[1])
    logits, cache = forward(variables, split_rows(tokens, cache), cache)
    if logits.shape[1] > 1:
        logits = last_token(logits, cache)
    return logits[:, 0], cache, ok


@functools.partial(jax.jit, static_argnames="forward", donate_argnames="cache")
def _step(forward, variables, tokens, counts, cache):
    return step(forward, variables, tokens, counts, cache)


def _on_the_device_of(variables: Any, cache: Cache) -> Cache:
    """Commits the cache to the parameters' device if they are committed to one.

    What a jitted function returns is committed if any argument was: an uncommitted cache would be
    uncommitted in the first call alone, and the step be compiled a second time for the others.
    """
    for leaf in jax.tree.leaves(variables):
        if isinstance(leaf, jax.Array) and leaf.committed and len(leaf.devices()) == 1:
            return cache if cache.lengths.committed else jax.device_put(cache, leaf.sharding)
    return cache


def prefill(
    forward: Forward,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    cache: Cache,
    *,
    chunk: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Float[Array, "B vocab"], Cache]:
    """Appends a prompt to each sequence, `chunk` tokens at a time: one compilation for any length.

    Args:
      forward: the model; see the module's text.
      variables: its parameters.
      prompts: token ids for each of the cache's B sequences; an empty one is left alone.
      cache: consumed.
      chunk: tokens of each sequence in one call.
      progress: called with the tokens done and their total.

    Returns:
      The logits after each prompt's last token, and the cache.

    Raises:
      ValueError: B prompts were expected, the pool or a page table cannot hold them, or `chunk`
        is not positive. Nothing has been written then.
    """
    if len(prompts) != cache.batch:
        raise ValueError(f"Expected {len(prompts)=} to be one prompt for each of {cache.batch}")
    if chunk < 1:
        raise ValueError(f"Expected {chunk=} to be positive")
    size = cache.pages.page_size
    lengths, num_free = on_host(cache.lengths), on_host(cache.num_free)
    counts = np.array([len(prompt) for prompt in prompts])
    longest = int((lengths + counts).max())
    if longest > cache.max_length:
        raise ValueError(f"Expected a prompt of {longest} tokens to fit {cache.max_length=}")
    pages = -(-(lengths + counts) // size) - -(-lengths // size)
    pages = pages.reshape(*num_free.shape, -1).sum(-1)  # of each pool
    if (pages > num_free).any():
        raise ValueError(
            f"Expected prompts of {counts.sum()} tokens to fit the pool: they need {pages} pages, "
            f"{num_free} are free"
        )
    padded = np.zeros((cache.batch, -(-counts.max(initial=1) // chunk) * chunk), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    cache = _on_the_device_of(variables, cache)
    logits: Array | None = None
    for start in range(0, padded.shape[1], chunk):
        here = np.clip(counts - start, 0, chunk)
        new, cache, _ = _step(forward, variables, padded[:, start : start + chunk], here, cache)
        logits = new if logits is None else jnp.where((here > 0)[:, None], new, logits)
        if progress is not None:
            progress(int(np.minimum(counts, start + chunk).sum()), int(counts.sum()))
    assert logits is not None  # there is at least one chunk
    return logits, cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where B sequences stand between decode steps.

    Attributes:
      cache: holds everything but the newest token of each sequence.
      tokens: `int32[B]`, that newest token.
      remaining: `int32[B]`, how many more tokens each may still produce.
      finish: `int32[B]`, an index into `FINISH_REASONS`.
    """

    cache: Cache
    tokens: Int[Array, "B"]
    remaining: Int[Array, "B"]
    finish: Int[Array, "B"]


@functools.partial(jax.jit, donate_argnames="cache")
def begin(
    logits: Float[Array, "B vocab"],
    cache: Cache,
    limits: Int[Array, "B"],
    eos: Int[Array, "E"],
    sampling: Sampling | None = None,
) -> DecodeState:
    """The state after each sequence's first token, from what `prefill` returned.

    Args:
      logits: those after each prompt's last token.
      cache: consumed.
      limits: how many tokens each sequence may produce, at least one.
      eos: token ids that end a sequence; may be empty.
      sampling: `None` is greedy.
    """
    tokens = sample(logits, cache.lengths, sampling)
    running = jnp.full(tokens.shape, RUNNING, jnp.int32)
    state = DecodeState(cache, tokens, limits, running)
    return advance(state, tokens, jnp.full(tokens.shape, True), jnp.isin(tokens, eos))


@functools.partial(jax.jit, static_argnames=("forward", "num_steps"), donate_argnames="state")
def decode(
    forward: Forward,
    variables: Any,
    state: DecodeState,
    *,
    num_steps: int,
    eos: Int[Array, "E"],
    sampling: Sampling | None = None,
) -> tuple[DecodeState, Int[Array, "B num_steps"]]:
    """Up to `num_steps` decode steps in one compiled loop; it ends early when all have finished.

    Pages are taken inside the loop as sequences grow. A sequence that meets an EOS token, its
    limit, an empty pool or the end of its page table stops there and the others go on.

    Args:
      forward: the model. Static.
      variables: its parameters.
      state: consumed.
      num_steps: static, the width of the output.
      eos: token ids that end a sequence; may be empty.
      sampling: `None` is greedy.

    Returns:
      The state, and the new tokens, -1 where a sequence had finished.
    """
    out = jnp.full((state.cache.batch, num_steps), -1, jnp.int32)

    def body(carry):
        index, state, out = carry
        running = state.finish == RUNNING
        logits, cache, ok = step(
            forward, variables, state.tokens[:, None], running.astype(jnp.int32), state.cache
        )
        tokens = sample(logits, cache.lengths, sampling)
        produced = running & ok
        state = advance(
            dataclasses.replace(state, cache=cache), tokens, produced, jnp.isin(tokens, eos)
        )
        state = dataclasses.replace(
            state, finish=jnp.where(running & ~ok, OUT_OF_PAGES, state.finish)
        )
        return index + 1, state, out.at[:, index].set(jnp.where(produced, tokens, -1))

    def going(carry):
        index, state, _ = carry
        return (index < num_steps) & (state.finish == RUNNING).any()

    _, state, out = lax.while_loop(going, body, (0, state, out))
    return state, out


def advance(
    state: DecodeState, tokens: Int[Array, "B"], produced: Bool[Array, "B"], stop: Bool[Array, "B"]
) -> DecodeState:
    """Takes in each sequence's next token and finishes those that reached an end."""
    remaining = state.remaining - produced
    finish = jnp.where(produced & (remaining <= 0), LENGTH, state.finish)
    finish = jnp.where(produced & stop, STOPPED, finish)
    tokens = jnp.where(produced, tokens, state.tokens)
    # Laid out alike after `begin` and after each loop, or the next would be compiled anew.
    tokens, remaining, finish = (split_rows(x, state.cache) for x in (tokens, remaining, finish))
    return dataclasses.replace(state, tokens=tokens, remaining=remaining, finish=finish)


# --- Whole generations ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: new token ids of each sequence, an EOS token included.
      finish: for each sequence `"stop"` (EOS), `"length"` or `"out of pages"`.
      cache: the cache after the last step; it lacks each sequence's newest token.
    """

    tokens: list[list[int]]
    finish: list[str]
    cache: Cache


def stream(
    forward: Forward,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    cache: Cache,
    *,
    max_new_tokens: int | Sequence[int],
    eos: Sequence[int] = (),
    sampling: Sampling | None = None,
    chunk: int = 256,
    every: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Int[np.ndarray, "B n"], DecodeState]]:
    """Generates, yielding the new tokens of each sequence every few steps.

    Args:
      forward: the model; see the module's text.
      variables: its parameters.
      prompts: token ids for each of the cache's B sequences, none empty.
      cache: consumed; what it already holds is the beginning of each sequence.
      max_new_tokens: for all sequences or each.
      eos: token ids that end a sequence.
      sampling: from `make_sampling`; `None` is greedy.
      chunk: prompt tokens of each sequence in one prefill call.
      every: decode steps between yields: one compiled loop of that many.
      progress: called during prefill with the tokens done and their total.

    Yields:
      New tokens, -1 where a sequence had finished, and the state, which the next step consumes.

    Raises:
      ValueError: an empty prompt, a limit below one, limits or `sampling` for another number of
        sequences, or as `prefill` does.
    """
    shape = (cache.batch,)
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("Expected every prompt to hold at least one token")
    limits = np.asarray(max_new_tokens, np.int32)
    if limits.shape not in ((), shape) or limits.min() < 1:
        raise ValueError(f"Expected {max_new_tokens=} to be positive, one or {cache.batch} values")
    if sampling is not None and sampling.seed.shape != shape:
        raise ValueError(f"Expected {sampling.seed.shape=} to be that of {cache.batch} sequences")
    if every < 1:
        raise ValueError(f"Expected {every=} to be positive")
    logits, cache = prefill(forward, variables, prompts, cache, chunk=chunk, progress=progress)
    ends = np.asarray(eos, np.int32)
    state = begin(logits, cache, np.broadcast_to(limits, shape), ends, sampling)
    yield on_host(state.tokens)[:, None], state
    while (on_host(state.finish) == RUNNING).any():
        state, new = decode(forward, variables, state, num_steps=every, eos=ends, sampling=sampling)
        yield on_host(new), state


def generate(
    forward: Forward,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    cache: Cache,
    **options,
) -> Generation:
    """Continues each prompt; arguments and errors are those of `stream`.

    A sequence's tokens do not depend on what else is in the batch.
    """
    parts = []
    for new, state in stream(forward, variables, prompts, cache, **options):
        parts.append(new)
    rows = np.concatenate(parts, axis=1)
    return Generation(
        tokens=[row[row >= 0].tolist() for row in rows],
        finish=[FINISH_REASONS[i] for i in on_host(state.finish)],
        cache=state.cache,
    )
