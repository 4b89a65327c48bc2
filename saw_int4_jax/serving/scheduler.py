"""What runs next: which prompts are read, which sequences decode, who gets pages, who waits.

Plain Python, no device. One iteration of an engine is

    plan = scheduler.plan(now)         # pages are assigned here, and nowhere else
    …run plan.pieces and plan.turns…
    scheduler.prefilled(piece, token)  # for each piece; the token after its last one
    scheduler.decoded(turn, tokens)    # for each turn

A plan needs no token of the one before: the next may be made, and be on its way to the device,
while the results of the last are awaited. What a plan runs counts as done once it is made. It has
to run, in order; a job that meets a stop token takes no more steps in a plan that did not know.

Rules, in the order in which they count: the oldest job goes on, whatever it takes; a job that
needs a page where there is none takes it from the youngest, which later computes everything again
(or finds it in the pool); jobs are admitted in order of arrival, and only while nobody is short of
pages. So the oldest job always makes progress and every job ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

from saw_int4_jax.serving.prefix_cache import PagePool, page_keys

Finish = Literal["stop", "length", "cancelled", "deadline"]
State = Literal["waiting", "prefill", "decode", "finished"]


class Overloaded(RuntimeError):
    """As many jobs are waiting as may wait."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What fits, and how the work is cut.

    Attributes:
      num_pages: pages of the pool.
      page_size: tokens in a page.
      max_pages: the most pages one sequence may hold.
      rows: the most jobs that hold pages at a time.
      piece: prompt tokens in one row of a prefill call.
      pieces: rows of a prefill call, which has one or all of them.
      steps: decode steps of an iteration.
      mixed_steps: the same while prompts are being read: the fewer, the sooner those are read and
        the longer a token takes meanwhile.
      budget: tokens of one iteration, prefill and decode; decode comes first, but one piece is
        always read. `None`: what fits.
      reserve: share of the tokens still to come of admitted jobs for which admission keeps pages
        back. 0 fills the pool and preempts when it runs out; 1 never preempts.
      max_waiting: the most jobs that wait for admission.
      reuse: whether full pages are found again by their content.
    """

    num_pages: int
    page_size: int
    max_pages: int
    rows: int
    piece: int = 256
    pieces: int = 4
    steps: int = 4
    mixed_steps: int = 4
    budget: int | None = None
    reserve: float = 0.25
    max_waiting: int = 1024
    reuse: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if str(field.type).startswith("int") and value is not None and value < 1:
                raise ValueError(f"Expected {field.name}={value} to be positive")
        if not 0 <= self.reserve <= 1:
            raise ValueError(f"Expected {self.reserve=} to be within 0 .. 1")

    def pages(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page_size)


@dataclasses.dataclass(eq=False)
class Job:
    """A request as the scheduler sees it. Only the scheduler changes it.

    Attributes:
      number: order of arrival.
      tokens: the prompt and what is known to come after it.
      prompt_length: tokens of the prompt.
      limit: the most tokens in all.
      stop_tokens: tokens that end it.
      deadline: when it ends in any case, on the caller's clock.
      pages: those it holds, in order.
      seat: which of the `rows` is its own while it holds pages.
      computed: tokens whose keys and values the plans so far put into the pages. While decoding
        all but the newest.
      coming: tokens that the plans so far add, and that are not known yet.
      finish: why it ended; `None` before.
      keys: of the full pages of `tokens`, as far as they were needed.
      published: how many of its pages can be found by their key.
      reused: tokens that admissions found in the pool.
      preemptions: how often it lost its pages.
    """

    number: int
    tokens: list[int]
    prompt_length: int
    limit: int
    stop_tokens: frozenset[int] = frozenset()
    deadline: float = math.inf
    pages: list[int] = dataclasses.field(default_factory=list)
    seat: int = -1
    computed: int = 0
    coming: int = 0
    state: State = "waiting"
    finish: Finish | None = None
    keys: list[bytes] = dataclasses.field(default_factory=list)
    published: int = 0
    reused: int = 0
    preemptions: int = 0

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a prompt, one row of a prefill call.

    Attributes:
      job: whose prompt.
      start: tokens in its pages before.
      count: tokens to read.
      last: whether the token after them is the job's next.
    """

    job: Job
    start: int
    count: int
    last: bool


@dataclasses.dataclass(frozen=True)
class Turn:
    """A job's decode steps in this iteration, at most; it has the pages for them.

    Attributes:
      job: who decodes.
      start: tokens in its pages before.
      steps: tokens to come.
    """

    job: Job
    start: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One iteration. Pieces of one prompt may stand in one call, in order.

    Attributes:
      pieces: prompt parts to read, by age of their jobs.
      turns: sequences to decode, by age.
      expired: jobs whose deadline has passed.
    """

    pieces: list[Piece]
    turns: list[Turn]
    expired: list[Job]

    def __bool__(self) -> bool:
        return bool(self.pieces or self.turns)


class Scheduler:
    """Jobs that wait, jobs that hold pages, and the pool.

    Attributes:
      waiting: jobs without pages, the oldest first.
      active: jobs that hold pages, the oldest first; older than those that wait.
      preemptions: how many there have been.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.pool = PagePool(limits.num_pages)
        self.waiting: list[Job] = []
        self.active: list[Job] = []
        self.preemptions = 0
        self._reading = False  # whether the newest plan does
        self._seats = list(reversed(range(limits.rows)))
        self._numbers = itertools.count()

    def add(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        stop_tokens: Sequence[int] = (),
        deadline: float = math.inf,
    ) -> Job:
        """Queues a job.

        Raises:
          ValueError: the prompt is empty, or the pool could not hold the job even alone.
          Overloaded: too many are waiting.
        """
        limit = len(prompt) + max_new_tokens
        capacity = min(self.limits.max_pages, self.limits.num_pages)
        if not prompt or max_new_tokens < 1:
            raise ValueError(
                f"Expected {len(prompt)=} and {max_new_tokens=} to be at least one token"
            )
        if self.limits.pages(limit) > capacity:
            raise ValueError(
                f"Expected {len(prompt)} prompt tokens and {max_new_tokens=} to be at most "
                f"{capacity * self.limits.page_size} together"
            )
        if len(self.waiting) >= self.limits.max_waiting:
            raise Overloaded(f"Expected fewer than {self.limits.max_waiting} requests waiting")
        job = Job(
            next(self._numbers),
            list(prompt),
            len(prompt),
            limit,
            frozenset(stop_tokens),
            deadline,
        )
        self.waiting.append(job)
        return job

    def end(self, job: Job, finish: Finish) -> None:
        """Ends a job and releases its pages; one that has ended stays as it is.

        Also between `plan` and what follows it: a page is taken anew in the next plan at the
        earliest, and the device does its work in order.
        """
        if job.state == "finished":
            return
        (self.waiting if job.state == "waiting" else self.active).remove(job)
        self._drop_pages(job)
        job.state, job.finish = "finished", finish

    def plan(self, now: float = 0.0) -> Plan:
        """Assigns pages, says what to run: nothing if there are no jobs or all await results."""
        expired = [job for job in self.waiting + self.active if job.deadline <= now]
        for job in expired:
            self.end(job, "deadline")
        steps = self.limits.steps
        turns, short = self._grow(min(steps, self.limits.mixed_steps) if self._reading else steps)
        pieces = self._read(sum(turn.steps for turn in turns), admit=not short)
        self._reading = bool(pieces)
        return Plan(pieces, turns, expired)

    def prefilled(self, piece: Piece, token: int) -> None:
        """Takes in a piece that has run; `token` counts if it was the last of its prompt."""
        if piece.last:
            self._append(piece.job, [token], 1)

    def decoded(self, turn: Turn, tokens: Sequence[int]) -> None:
        """Takes in a turn's tokens: as many as its steps, or fewer after a stop token."""
        self._append(turn.job, tokens, turn.steps)

    # --- Parts of a plan ------------------------------------------------------------------------

    def _grow(self, steps: int) -> tuple[list[Turn], bool]:
        """The decoding jobs' turns, and whether one of them is short of pages."""
        size, turns, short = self.limits.page_size, [], False
        for job in list(self.active):
            if job.state != "decode":  # not yet, or preempted by an older one just now
                continue
            wanted = min(steps, job.limit - len(job.tokens) - job.coming)
            missing = self.limits.pages(job.computed + wanted) - len(job.pages)
            full = wanted > 0 and len(job.pages) * size == job.computed
            while full and not self.pool.available and self.active[-1] is not job:
                self._preempt(self.active[-1])
                short = True
            if missing > 0:
                job.pages += self.pool.take(min(missing, self.pool.available))
            granted = min(wanted, len(job.pages) * size - job.computed)
            short |= granted < wanted
            if granted > 0:
                turns.append(Turn(job, job.computed, granted))
                job.computed += granted
                job.coming += granted
        return turns, short

    def _read(self, decoded: int, *, admit: bool) -> list[Piece]:
        """The next pieces of the prompts, the oldest first; jobs are admitted as their turn comes.

        So a prompt finds the beginning that it shares with one that came at the same time.
        """
        count = self.limits.pieces
        if self.limits.budget is not None:
            count = max(1, min(count, (self.limits.budget - decoded) // self.limits.piece))
        pieces: list[Piece] = []
        for job in self.active:
            self._cut(job, count, pieces)
        while admit and len(pieces) < count and self._admit():
            self._cut(self.active[-1], count, pieces)
        return pieces

    def _cut(self, job: Job, count: int, pieces: list[Piece]) -> None:
        """Adds pieces of a job's prompt, as long as there are fewer than `count` in all."""
        while job.state == "prefill" and len(pieces) < count:
            tokens = min(self.limits.piece, len(job.tokens) - job.computed)
            piece = Piece(job, job.computed, tokens, job.computed + tokens == len(job.tokens))
            pieces.append(piece)
            job.computed += tokens
            if piece.last:
                job.state = "decode"
                job.coming = 1
        self._publish(job)

    def _admit(self) -> bool:
        """Gives the oldest waiting job a seat, and pages for its tokens, if it need not wait."""
        size = self.limits.page_size
        if not self.waiting or not self._seats or self.waiting[0].coming:
            return False
        job = self.waiting[0]
        found: list[int] = []
        if self.limits.reuse:
            job.keys = page_keys(job.tokens, size, job.keys)
            # The last token is computed in any case: its logits are wanted.
            found = self.pool.find(job.keys[: (len(job.tokens) - 1) // size])
        needed = self.limits.pages(len(job.tokens)) - len(found)
        available = self.pool.available - sum(map(self.pool.is_idle, found))
        to_come = self.limits.pages(job.limit) - self.limits.pages(len(job.tokens))
        to_come += sum(self.limits.pages(x.limit) - len(x.pages) for x in self.active)
        if needed + math.ceil(self.limits.reserve * to_come) > available:
            return False
        self.pool.hold(found)
        job.pages = found + self.pool.take(needed)
        job.computed, job.published = len(found) * size, len(found)
        job.reused += job.computed
        job.state = "prefill"
        job.seat = self._seats.pop()
        self.active.append(self.waiting.pop(0))
        return True

    def _preempt(self, job: Job) -> None:
        self.active.remove(job)
        self._drop_pages(job)
        job.state = "waiting"
        job.preemptions += 1
        self.preemptions += 1
        self.waiting.insert(0, job)

    # --- Parts of taking in results -------------------------------------------------------------

    def _append(self, job: Job, tokens: Sequence[int], expected: int) -> None:
        job.coming -= expected
        for token in tokens:
            if job.state == "finished":
                return
            job.tokens.append(token)
            if token in job.stop_tokens:
                self.end(job, "stop")
            elif len(job.tokens) >= job.limit:
                self.end(job, "length")
        self._publish(job)

    def _publish(self, job: Job) -> None:
        """Makes the job's full pages findable, as far as it is known what they hold."""
        full = min(job.computed, len(job.tokens) - 1) // self.limits.page_size
        if not self.limits.reuse or full <= job.published:
            return
        job.keys = page_keys(job.tokens, self.limits.page_size, job.keys)
        for index in range(job.published, full):
            self.pool.publish(job.pages[index], job.keys[index])
        job.published = full

    def _drop_pages(self, job: Job) -> None:
        if job.pages:
            self._publish(job)
            self._seats.append(job.seat)
        self.pool.release(job.pages)
        job.pages, job.computed, job.published = [], 0, 0
