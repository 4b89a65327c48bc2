"""The engine: requests in, token streams out, any number at a time over one pool of pages.

    cache = init_cache(spec, batch=32, max_length=4096)  # at most 32 requests at a time
    engine = Engine(Llama(config, last_only=True).apply, variables, cache, tokenizer=tokenizer)
    response = engine.submit(Request(tokenizer.encode("Once"), max_new_tokens=100))
    for piece in engine.stream(response):
        print(piece, end="")

A request's tokens do not depend on what else runs: not on its neighbours, not on how its prompt
was cut, not on being preempted, not on finding its prefix in the pool. (In exact arithmetic: a
program for other shapes may round differently.)
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saw_int4_jax.cache import DATA, Cache
from saw_int4_jax.generate import Forward, Sampling, _on_the_device_of, make_sampling
from saw_int4_jax.models.tokenizer import Tokenizer
from saw_int4_jax.serving.metrics import Metrics, Timing
from saw_int4_jax.serving.programs import (
    MAX_STOP_TOKENS,
    NO_SEAT,
    Rows,
    State,
    decode_rows,
    idle_rows,
    prefill_rows,
)
from saw_int4_jax.serving.request import Request, Response
from saw_int4_jax.serving.scheduler import Job, Limits, Piece, Plan, Scheduler, Turn
from saw_int4_jax.serving.text import StoppableText

# A response, and the tokens and the text that are new; both may be empty, at the end.
Listener = Callable[[Response, list[int], str], None]


@dataclasses.dataclass(eq=False)
class _Entry:
    """What the engine knows of a request that goes on."""

    response: Response
    job: Job
    stop_tokens: tuple[int, ...]
    arrival: float
    listener: Listener | None
    text: StoppableText | None
    first: float | None = None


# A plan that the device works on, and what its two calls will bring.
_Flight = tuple[Plan, jax.Array | None, jax.Array | None]


class Engine:
    """Serves requests. One thread steps; any may submit and cancel.

    Attributes:
      scheduler: who waits and who runs; for reading.
      metrics: counts and times.
      steps: iterations so far.
      programs: what has run, each one compilation: `("prefill", rows, tokens of each, sampled)`
        and `("decode", rows, steps, sampled)`.
    """

    def __init__(
        self,
        forward: Forward,
        variables: Any,
        cache: Cache,
        *,
        tokenizer: Tokenizer | None = None,
        eos: Sequence[int] | None = None,
        batches: Sequence[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        **limits: Any,
    ):
        """An engine over a cache's pool; nothing is compiled yet.

        Args:
          forward: the model, as in `generate`.
          variables: its parameters.
          cache: empty and consumed. Its batch is the most requests that run at a time, its
            `max_length` bounds each. It may be spread over a mesh of one pool; pools exchange
            nothing: give each an engine of its own.
          tokenizer: for text and stop strings.
          eos: tokens that end every request. `None`: the tokenizer's.
          batches: sizes of the decode step; the smallest that fits the running requests is used.
            `None`: the cache's batch, a quarter of it, and so on. Each is a compiled program for
            `steps` and one for `mixed_steps`, and all programs exist for greedy requests alone and
            for any.
          clock: seconds, for deadlines and timings.
          **limits: `piece`, `pieces`, `steps`, `mixed_steps`, `budget`, `reserve`, `max_waiting`,
            `reuse` of `scheduler.Limits`.

        Raises:
          ValueError: a limit is out of range, the largest of `batches` is not the cache's, or it
            has several pools.
        """
        if cache.mesh is not None and cache.mesh.shape[DATA] > 1:
            raise ValueError(f"Expected {cache.mesh=} to have one pool; let an engine serve each")
        rows = cache.batch
        if batches is None:
            batches = [rows >> shift for shift in range(0, rows.bit_length(), 2)]
        self.batches = sorted(batches)
        if self.batches[0] < 1 or self.batches[-1] != rows:
            raise ValueError(f"Expected {batches=} to be positive, the largest {rows}")
        max_pages = cache.page_table.shape[1]
        self.limits = Limits(
            cache.pages.num_pages, cache.pages.page_size, max_pages, rows, **limits
        )
        self._step_counts = sorted(
            {self.limits.steps, min(self.limits.steps, self.limits.mixed_steps)}
        )
        self.scheduler = Scheduler(self.limits)
        self.metrics = Metrics()
        self.tokenizer = tokenizer
        self.steps = 0
        self.programs: set[tuple[str, int, int, bool]] = set()
        self._eos = tuple(tokenizer.eos_ids if eos is None and tokenizer else eos or ())
        self._forward = forward
        self._variables = variables
        cache = _on_the_device_of(variables, cache)
        self._state = State(cache, jnp.copy(cache.lengths))
        self._under_way: collections.deque[_Flight] = collections.deque()
        self._clock = clock
        self._lock = threading.RLock()
        self._entries: dict[int, _Entry] = {}
        self._work = threading.Event()

    @property
    def max_length(self) -> int:
        """The most tokens of a prompt and what comes after it."""
        return min(self.limits.max_pages, self.limits.num_pages) * self.limits.page_size

    # --- For callers ----------------------------------------------------------------------------

    def submit(self, request: Request, listener: Listener | None = None) -> Response:
        """Queues a request.

        Args:
          request: what is wanted.
          listener: called by the thread that steps, whenever there are new tokens and at the end.

        Raises:
          ValueError: it asks for what cannot be; the message says what.
          Overloaded: too many are waiting.
        """
        stop_tokens = tuple(request.stop_tokens)
        if not request.ignore_eos:
            stop_tokens += self._eos
        if len(stop_tokens) > MAX_STOP_TOKENS:
            raise ValueError(f"Expected {len(stop_tokens)=} to be at most {MAX_STOP_TOKENS}")
        if min(request.prompt, default=0) < 0:
            raise ValueError("Expected the prompt's token ids not to be negative")
        if request.stop and self.tokenizer is None:
            raise ValueError("Expected the engine to have a tokenizer for stop strings")
        if not all(request.stop):
            raise ValueError("Expected stop strings not to be empty")
        make_sampling(  # raises for what is out of range
            1,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            seed=request.seed or 0,
        )
        now = self._clock()
        deadline = np.inf if request.timeout_s is None else now + request.timeout_s
        text = None
        if self.tokenizer is not None:
            text = StoppableText(self.tokenizer, request.prompt, request.stop)
        with self._lock:
            job = self.scheduler.add(
                request.prompt,
                request.max_new_tokens,
                stop_tokens=stop_tokens,
                deadline=deadline,
            )
            response = Response(request, job.number)
            self._entries[job.number] = _Entry(response, job, stop_tokens, now, listener, text)
        self._work.set()
        return response

    def cancel(self, response: Response) -> None:
        """Ends a request now and frees its pages; one that has ended stays as it is."""
        with self._lock:
            entry = self._entries.get(response.number)
            if entry is None:
                return
            self.scheduler.end(entry.job, "cancelled")
            news = self._take(entry)
        _tell([news])

    def stream(self, response: Response) -> Iterator[Any]:
        """Steps until a request ends and yields what comes of it, other requests beside it.

        Closing the iterator does not cancel.

        Yields:
          Pieces of its text; without a tokenizer lists of its tokens.
        """
        text = self.tokenizer is not None
        seen = 0
        while True:
            have = response.text if text else response.tokens
            if len(have) > seen:
                yield have[seen:]
                seen = len(have)
            elif response.finish is not None:
                return
            else:
                self.step()

    def run(self) -> None:
        """Steps until no request is left."""
        while self.step():
            pass

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """Serves requests to their end."""
        responses = [self.submit(request) for request in requests]
        self.run()
        return responses

    def wait(self, timeout_s: float) -> None:
        """Returns when there may be something to do: for a thread that does nothing but step."""
        self._work.wait(timeout_s)

    def warm_up(self, *, sampled: bool = True) -> None:
        """Compiles every program, many at a time, so that the first requests do not wait for it.

        Args:
          sampled: those for requests that are not greedy too.
        """
        limits = self.limits
        calls = [idle_rows(pieces, limits.piece, limits.max_pages) for pieces in {1, limits.pieces}]
        for batch, steps in itertools.product(self.batches, self._step_counts):
            rows = idle_rows(batch, 0, limits.max_pages)
            rows.counts[:] = steps  # of nobody: without a seat nothing is done
            calls.append(rows)
        if sampled:
            calls += [
                dataclasses.replace(rows, sampling=make_sampling(len(rows.counts)))
                for rows in calls
            ]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(self._compile, calls))
        for rows in calls * 2:  # a sharded cache comes back by another name of its layout
            self._call(rows)
        jax.block_until_ready(self._state)

    def status(self) -> dict[str, Any]:
        """What is going on: requests, pages, and the summary of `metrics`."""
        with self._lock:
            pool = self.scheduler.pool
            return {
                "waiting": len(self.scheduler.waiting),
                "running": len(self.scheduler.active),
                "pages": self.limits.num_pages,
                "pages_held": pool.held,
                "pages_idle": pool.idle,
                "preemptions": self.scheduler.preemptions,
                "steps": self.steps,
                **self.metrics.summary(),
            }

    # --- One iteration --------------------------------------------------------------------------

    def step(self) -> bool:
        """One iteration: sends a plan off, takes in what came of the one before.

        So the device has work while the host reads results, tells them, and plans.

        Returns:
          Whether there was anything to do.
        """
        with self._lock:
            self._work.clear()
            plan = self.scheduler.plan(self._clock())
            news = self._take_all(plan.expired)
            pieces = self._piece_rows(plan.pieces) if plan.pieces else None
            turns = self._turn_rows(plan.turns) if plan.turns else None
        if plan:
            firsts = None if pieces is None else self._call(pieces)
            decoded = None if turns is None else self._call(turns)
            self._under_way.append((plan, firsts, decoded))
            self.steps += 1
        _tell(news)
        if len(self._under_way) > bool(plan):
            self._take_in(*self._under_way.popleft())
            return True
        return bool(plan)

    def _take_in(self, plan: Plan, firsts: jax.Array | None, decoded: jax.Array | None) -> None:
        """Waits for a plan's tokens, those of its prompts first."""
        if firsts is not None:
            tokens = np.asarray(firsts).tolist()
            with self._lock:
                for piece, token in zip(plan.pieces, tokens):
                    self.scheduler.prefilled(piece, token)
                news = self._take_all(piece.job for piece in plan.pieces)
            _tell(news)
        if decoded is not None:
            tokens = np.asarray(decoded)
            with self._lock:
                for turn, row in zip(plan.turns, tokens):
                    self.scheduler.decoded(turn, row[row >= 0].tolist())
                news = self._take_all(turn.job for turn in plan.turns)
            _tell(news)

    def _program(self, rows: Rows) -> tuple[Any, dict[str, int]]:
        """What a call runs, and its static arguments."""
        size, width = rows.tokens.shape
        if width:
            self.programs.add(("prefill", size, width, rows.sampling is not None))
            return prefill_rows, {}
        steps = min(count for count in self._step_counts if count >= rows.counts.max())
        self.programs.add(("decode", size, steps, rows.sampling is not None))
        return decode_rows, {"num_steps": steps}

    def _compile(self, rows: Rows) -> None:
        program, static = self._program(rows)
        program.lower(self._forward, self._variables, self._state, rows, **static).compile()

    def _call(self, rows: Rows) -> jax.Array:
        """Sends a call off; its tokens to come."""
        program, static = self._program(rows)
        tokens, self._state = program(self._forward, self._variables, self._state, rows, **static)
        tokens.copy_to_host_async()
        return tokens

    def _piece_rows(self, pieces: Sequence[Piece]) -> Rows:
        size = 1 if len(pieces) == 1 else self.limits.pieces
        return self._rows(
            size,
            self.limits.piece,
            [(x.job, x.start, x.count, x.job.seat if x.last else NO_SEAT) for x in pieces],
        )

    def _turn_rows(self, turns: Sequence[Turn]) -> Rows:
        batch = next(batch for batch in self.batches if batch >= len(turns))
        return self._rows(batch, 0, [(x.job, x.start, x.steps, x.job.seat) for x in turns])

    def _rows(self, size: int, width: int, sequences: Sequence[tuple[Job, int, int, int]]) -> Rows:
        """A call's arguments, from each row's job, length, count and seat; the rest are idle."""
        rows: Any = idle_rows(size, width, self.limits.max_pages)
        for row, (job, length, count, seat) in enumerate(sequences):
            entry = self._entries[job.number]
            rows.seats[row], rows.lengths[row], rows.counts[row] = seat, length, count
            if width:
                rows.tokens[row, :count] = job.tokens[length : length + count]
            rows.page_table[row, : len(job.pages)] = job.pages
            rows.stop_tokens[row, : len(entry.stop_tokens)] = entry.stop_tokens
        return dataclasses.replace(rows, sampling=self._sampling(size, [x[0] for x in sequences]))

    def _sampling(self, size: int, jobs: Sequence[Job]) -> Sampling | None:
        """How rows draw; `None` if all are greedy, like those that are idle."""
        requests = [self._entries[job.number].response.request for job in jobs]
        if not any(request.temperature > 0 for request in requests):
            return None
        seeds = [job.number if x.seed is None else x.seed for job, x in zip(jobs, requests)]
        idle: list[Any] = [0] * (size - len(jobs))
        return make_sampling(
            size,
            temperature=[*(x.temperature for x in requests), *idle],
            top_k=[x.top_k for x in requests] + idle,
            top_p=[x.top_p for x in requests] + [1.0] * len(idle),
            min_p=[*(x.min_p for x in requests), *idle],
            seed=seeds + idle,
        )

    # --- Taking in results ------------------------------------------------------------------------

    def _take_all(self, jobs: Iterable[Job]) -> list[_News]:
        """Each job's news, once; those cancelled in the meantime have none."""
        numbers = dict.fromkeys(job.number for job in jobs)
        return [self._take(self._entries[n]) for n in numbers if n in self._entries]

    def _take(self, entry: _Entry) -> _News:
        """Brings a response up to its job, and ends the job where its text does."""
        job, response, now = entry.job, entry.response, self._clock()
        new = job.tokens[job.prompt_length + len(response.tokens) :]
        text = ""
        if entry.text is not None:
            for index, token in enumerate(new):
                if token not in entry.stop_tokens:
                    text += entry.text.push(token)
                if entry.text.stopped:
                    new = new[: index + 1]
                    self.scheduler.end(job, "stop")
                    break
        if new and entry.first is None:
            entry.first = now
        response.tokens += new
        response.reused_tokens, response.preemptions = job.reused, job.preemptions
        self.metrics.new_tokens += len(new)
        if job.finish is not None:
            stopped = False
            if entry.text is not None:
                text += entry.text.flush()
                stopped = entry.text.stopped
            response.finish = "stop" if stopped else job.finish
            response.timing = Timing(entry.arrival, entry.first, now, len(response.tokens))
            self.metrics.prompt_tokens += job.prompt_length
            self.metrics.reused_tokens += job.reused
            self.metrics.record(response.timing, response.finish)
            del self._entries[job.number]
        response.text += text
        return entry.listener, response, new, text


_News = tuple[Listener | None, Response, list[int], str]


def _tell(news: Iterable[_News]) -> None:
    """Outside the lock: a listener may do as it likes."""
    for listener, response, tokens, text in news:
        if listener is not None and (tokens or text or response.finish is not None):
            listener(response, tokens, text)
