"""The scheduler alone, against a pool that only remembers which prefix each slot stands for."""

import collections
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saw_int4_jax.serving.prefix_cache import page_keys
from saw_int4_jax.serving.scheduler import Limits, Overloaded, Scheduler

STOP = 0


def next_token(tokens) -> int:
    """What the model says after some tokens: 1 in 12 a stop token."""
    return hash(tuple(tokens)) % 12


def alone(prompt, limit) -> list[int]:
    """A job's new tokens when nothing else runs."""
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(next_token(tokens))
        if tokens[-1] == STOP:
            break
    return tokens[len(prompt) :]


class Device:
    """Runs plans; a slot holds the hash of the tokens up to it, as keys and values depend on them.

    Reading anything but the sequence's own past is an error.
    """

    def __init__(self, scheduler: Scheduler):
        self.scheduler, self.size = scheduler, scheduler.limits.page_size
        self.slots: dict[tuple[int, int], int] = {}
        self.seats: dict[int, list[int]] = {}

    def write(self, job, pages, tokens, position):
        slot = (pages[position // self.size], position % self.size)
        self.slots[slot] = hash(tuple(tokens[: position + 1]))

    def check(self, pages, tokens, length):
        for position in range(length):
            slot = (pages[position // self.size], position % self.size)
            assert self.slots[slot] == hash(tuple(tokens[: position + 1]))

    def run(self, plan):
        """Returns what the two kinds of calls return; nothing of it is told to the scheduler."""
        firsts, turns = [], []
        for piece in plan.pieces:
            job, end = piece.job, piece.start + piece.count
            for position in range(piece.start, end):
                self.write(job, job.pages, job.tokens, position)
        for piece in plan.pieces:
            job, end = piece.job, piece.start + piece.count
            self.check(job.pages, job.tokens, end)
            firsts.append(next_token(job.tokens[:end]))
            if piece.last:
                self.seats[job.seat] = [*job.tokens, firsts[-1]]
        for turn in plan.turns:
            job, tokens = turn.job, self.seats[turn.job.seat]
            before = len(tokens)
            for _ in range(turn.steps):
                if tokens[-1] in job.stop_tokens:
                    break
                assert len(tokens) - 1 == turn.start + len(tokens) - before
                self.write(job, job.pages, tokens, len(tokens) - 1)
                self.check(job.pages, tokens, len(tokens))
                tokens.append(next_token(tokens))
            turns.append(tokens[before:])
        return firsts, turns

    def tell(self, plan, results):
        for piece, token in zip(plan.pieces, results[0]):
            self.scheduler.prefilled(piece, token)
        for turn, tokens in zip(plan.turns, results[1]):
            self.scheduler.decoded(turn, tokens)

    def run_all(self, ahead: int = 1):
        """With so many plans made before the results of one are told."""
        under_way = collections.deque()
        while (plan := self.scheduler.plan()) or under_way:
            check_invariants(self.scheduler)
            if plan:
                under_way.append((plan, self.run(plan)))
            if len(under_way) > (ahead if plan else 0):
                self.tell(*under_way.popleft())


def check_invariants(scheduler: Scheduler) -> None:
    limits, pool = scheduler.limits, scheduler.pool
    jobs = scheduler.active
    held = list(itertools.chain(*(job.pages for job in jobs)))
    assert pool.holders == [held.count(page) for page in range(limits.num_pages)]
    assert sorted(pool._free + list(pool._idle) + sorted(set(held))) == list(
        range(len(pool.holders))
    )
    assert {page: key for key, page in pool._page_of.items()} == pool._key_of
    assert pool.held == len(set(held))
    for job in jobs:  # only full pages, before the one that is written next, have other holders
        assert len(set(job.pages)) == len(job.pages)
        assert len(job.pages) <= min(limits.max_pages, limits.pages(job.limit))
        for page in job.pages[job.computed // limits.page_size :]:
            assert pool.holders[page] == 1
            assert page not in pool._key_of
    for group in (scheduler.waiting, jobs):
        assert [job.number for job in group] == sorted({job.number for job in group})
    assert len(jobs) <= limits.rows
    assert all(not job.pages and job.computed == 0 for job in scheduler.waiting)


def check_plan(scheduler: Scheduler, plan, before: dict) -> None:
    """Who runs and who was preempted. `before` counts the preemptions of jobs that were active."""
    limits = scheduler.limits
    assert len(plan.pieces) <= limits.pieces
    assert all(turn.steps <= limits.steps for turn in plan.turns)
    if limits.budget is not None and len(plan.pieces) > 1:
        used = len(plan.pieces) * limits.piece + sum(turn.steps for turn in plan.turns)
        assert used <= limits.budget
    victims = [job for job, count in before.items() if job.preemptions > count]
    kept = [job for job in before if job not in victims and job.state != "finished"]
    if victims:  # the youngest, and only for an older one that is left
        assert kept
        assert max(job.number for job in kept) < min(job.number for job in victims)
        assert all(job.state == "waiting" for job in victims)  # and not admitted at once
    oldest = min(scheduler.active, key=lambda job: job.number, default=None)
    if oldest is not None and oldest in before:  # the oldest goes on
        running = [x.job for x in (*plan.turns, *plan.pieces)]
        assert oldest in running or len(oldest.tokens) + oldest.coming == oldest.limit


limits_strategy = st.builds(
    Limits,
    num_pages=st.integers(3, 12),
    page_size=st.integers(1, 4),
    max_pages=st.integers(3, 12),
    rows=st.integers(1, 5),
    piece=st.integers(1, 6),
    pieces=st.integers(1, 4),
    steps=st.integers(1, 7),
    mixed_steps=st.integers(1, 3),
    budget=st.none() | st.integers(1, 40),
    reserve=st.sampled_from([0.0, 0.3, 1.0]),
    reuse=st.booleans(),
)
arrival = st.tuples(
    st.integers(0, 20),  # iteration
    st.integers(0, 2),  # which text it begins with
    st.integers(1, 14),  # length
    st.integers(1, 12),  # new tokens
    st.none() | st.integers(0, 15),  # cancelled so many iterations later
    st.booleans(),  # before the results come in, or after
    st.none() | st.integers(1, 30),  # deadline
)


@settings(max_examples=300, deadline=None)
@given(limits_strategy, st.lists(arrival, max_size=14), st.integers(0, 2))
def test_every_job_ends_with_its_own_tokens_and_no_page_is_lost(limits, arrivals, ahead):
    scheduler = Scheduler(limits)
    device = Device(scheduler)
    under_way = collections.deque()  # so many plans made before the results of one are told
    jobs, cancels, admitted = [], [], []
    for iteration in range(3000):
        for start, text, length, new, cancel, early, deadline in arrivals:
            if start != iteration:
                continue
            prompt = [(text * 7 + i * (i + text)) % 11 + 1 for i in range(length)]
            try:
                job = scheduler.add(
                    prompt,
                    new,
                    stop_tokens=[STOP],
                    deadline=math.inf if deadline is None else iteration + deadline,
                )
            except ValueError:
                capacity = min(limits.max_pages, limits.num_pages) * limits.page_size
                assert length + new > capacity
                continue
            jobs.append(job)
            if cancel is not None:
                cancels.append((iteration + cancel, early, job))
        before = {job: job.preemptions for job in scheduler.active}
        waiting = list(scheduler.waiting)
        plan = scheduler.plan(float(iteration))
        check_invariants(scheduler)
        check_plan(scheduler, plan, before)
        new = [job for job in waiting if job in scheduler.active]
        assert new == [job for job in waiting if job.state != "finished"][: len(new)]  # in order
        admitted += [job for job in new if job not in admitted]
        under_way.append((plan, device.run(plan)))
        due = [(early, job) for when, early, job in cancels if when == iteration]
        for early, job in due:
            if early:
                scheduler.end(job, "cancelled")
        check_invariants(scheduler)
        told = len(under_way) > (ahead if plan else 0)
        if told:
            device.tell(*under_way.popleft())
        for _, job in due:
            scheduler.end(job, "cancelled")
        check_invariants(scheduler)
        if iteration > 20 and not (scheduler.waiting or scheduler.active):
            break
        assert plan or told or iteration <= 20
    else:
        pytest.fail("jobs never ended")
    assert admitted == sorted(admitted, key=lambda job: job.number)
    assert scheduler.pool.available == limits.num_pages
    for job in jobs:
        expected = alone(job.tokens[: job.prompt_length], job.limit)
        if job.finish in ("stop", "length"):
            assert job.new_tokens == expected
            assert job.finish == ("stop" if expected[-1] == STOP else "length")
        else:
            assert job.finish in ("cancelled", "deadline")
            assert job.new_tokens == expected[: len(job.new_tokens)]
    if limits.reserve == 1 and not any(job.reused for job in jobs):
        assert scheduler.preemptions == 0


LIMITS = dict(num_pages=8, page_size=4, max_pages=8, rows=4, piece=4, pieces=2, steps=4)


def test_a_long_prompt_fills_the_rows_of_one_call():
    scheduler = Scheduler(Limits(**LIMITS))
    job = scheduler.add(range(1, 11), 2)
    plan = scheduler.plan()
    assert [(piece.start, piece.count) for piece in plan.pieces] == [(0, 4), (4, 4)]
    assert not any(piece.last for piece in plan.pieces)
    scheduler.prefilled(plan.pieces[0], -1)
    scheduler.prefilled(plan.pieces[1], -1)
    assert job.new_tokens == []
    (piece,) = scheduler.plan().pieces
    assert piece.last
    scheduler.prefilled(piece, 7)
    assert job.new_tokens == [7]


def test_the_youngest_gives_way_and_loses_nothing():
    scheduler = Scheduler(Limits(**LIMITS, reserve=0.0))
    device = Device(scheduler)
    prompts = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 1]]
    jobs = [scheduler.add(prompt, 20, stop_tokens=[]) for prompt in prompts]
    device.run_all()
    assert jobs[0].preemptions == 0
    assert sum(job.preemptions for job in jobs[1:]) == scheduler.preemptions > 0
    for job, prompt in zip(jobs, prompts):
        tokens = list(prompt)
        while len(tokens) < 24:
            tokens.append(next_token(tokens))
        assert job.tokens == tokens


def test_full_reserve_never_preempts():
    scheduler = Scheduler(Limits(**LIMITS, reserve=1.0))
    device = Device(scheduler)
    for prompt in ([1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 1]):
        scheduler.add(prompt, 20)
    device.run_all()
    assert scheduler.preemptions == 0


def test_a_prompt_is_found_again_after_its_job_ended():
    scheduler = Scheduler(Limits(**LIMITS))
    device = Device(scheduler)
    first = scheduler.add(range(1, 13), 1)
    device.run_all()
    assert (first.reused, scheduler.pool.idle) == (0, 3)
    again = scheduler.add(range(1, 13), 1)  # its last token has to be computed
    longer = scheduler.add(range(1, 15), 1)
    other = scheduler.add([*range(1, 8), 1, 9, 10], 1)
    device.run_all()
    assert [job.reused for job in (again, longer, other)] == [8, 12, 4]


def test_prompts_that_come_together_share_their_beginning():
    scheduler = Scheduler(Limits(**LIMITS | dict(num_pages=12)))
    device = Device(scheduler)
    jobs = [scheduler.add([*range(1, 13), last], 2) for last in (20, 21, 22)]
    device.run_all()
    assert [job.reused for job in jobs] == [0, 12, 12]


def test_the_next_plan_needs_no_results():
    scheduler = Scheduler(Limits(**LIMITS, mixed_steps=2))
    job = scheduler.add([1, 2, 3], 8)
    plans = [scheduler.plan() for _ in range(5)]
    turns = [turn for plan in plans for turn in plan.turns]
    assert [(turn.start, turn.steps) for turn in turns] == [(3, 2), (5, 4), (9, 1)]
    assert not plans[4]
    assert (job.computed, job.coming, len(job.tokens)) == (10, 8, 3)


def test_generated_pages_are_found_too():
    scheduler = Scheduler(Limits(**LIMITS))
    device = Device(scheduler)
    first = scheduler.add([1, 2, 3], 8)
    device.run_all()
    second = scheduler.add([*first.tokens, 3, 3], 2)
    device.run_all()
    assert second.reused == len(first.tokens[:-1]) // 4 * 4 > 0


def test_idle_pages_are_given_away_least_recently_used_first():
    scheduler = Scheduler(Limits(**LIMITS))
    device = Device(scheduler)
    texts = [[first + i for i in range(8)] for first in (1, 20, 40)]
    for text in texts:
        scheduler.add(text, 1)
        device.run_all()
    assert (scheduler.pool.idle, scheduler.pool.available) == (6, 8)
    scheduler.add([*texts[0], 99], 1)  # uses the first again
    device.run_all()
    scheduler.add(range(60, 72), 1)  # takes two free pages and one of the second text
    device.run_all()
    found = [len(scheduler.pool.find(page_keys(text, 4))) for text in texts]
    assert found == [2, 1, 2]


def test_budget_leaves_room_for_one_piece():
    scheduler = Scheduler(Limits(**LIMITS, budget=1))
    scheduler.add(range(1, 9), 2)
    assert len(scheduler.plan().pieces) == 1


@pytest.mark.parametrize(("prompt", "new"), [([], 1), ([1], 0), ([1] * 30, 3)])
def test_impossible_jobs_are_refused(prompt, new):
    with pytest.raises(ValueError, match="Expected"):
        Scheduler(Limits(**LIMITS)).add(prompt, new)


def test_only_so_many_may_wait():
    scheduler = Scheduler(Limits(**LIMITS, max_waiting=2))
    scheduler.add([1], 1)
    scheduler.add([1], 1)
    with pytest.raises(Overloaded):
        scheduler.add([1], 1)
    scheduler.plan()
    scheduler.add([1], 1)


@pytest.mark.parametrize("bad", [dict(rows=0), dict(reserve=1.5), dict(budget=0)])
def test_limits_are_checked(bad):
    with pytest.raises(ValueError, match="Expected"):
        Limits(**LIMITS | bad)
