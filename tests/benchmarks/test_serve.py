"""The serving benchmark: what its words mean, and what the pool knows before a job."""

import types

import pytest

from benchmarks.serve import METHODS, Job, keep, parse_jobs
from saw_int4_jax.serving import Limits, Scheduler


def test_jobs():
    assert parse_jobs(["256x1024@32,64", "128+16x8@4/9:bf16,bdr"]) == [
        Job(0, 256, 1024, 32),
        Job(0, 256, 1024, 64),
        Job(128, 144, 8, 4, 9, ("bf16", "bdr")),
    ]
    assert parse_jobs(["1x1@1"])[0].methods == METHODS


@pytest.mark.parametrize("text", ["256x1024", "x1024@32", "256x1024@32/", "256x1024@32:fp8"])
def test_words_that_are_no_jobs(text):
    with pytest.raises(ValueError, match="Expected"):
        parse_jobs([text])


def test_the_pool_knows_as_many_prompts_as_it_holds():
    limits = Limits(num_pages=10, page_size=4, max_pages=5, rows=4)
    scheduler = Scheduler(limits)
    prompts = [[start + i for i in range(17)] for start in (0, 100, 200)]
    keep(types.SimpleNamespace(scheduler=scheduler, limits=limits), prompts, found=16)
    assert (scheduler.pool.idle, scheduler.pool.held) == (8, 0)
    jobs = [scheduler.add(prompt, 2) for prompt in prompts]
    scheduler.plan()
    assert [job.reused for job in jobs] == [16, 16, 0]
