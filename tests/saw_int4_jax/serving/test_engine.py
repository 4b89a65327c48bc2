"""The engine: every request gets the tokens that it would get alone, whatever else happens."""

import functools
import itertools
import os
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saw_int4_jax import generate, init_cache, make_sampling, serving
from saw_int4_jax.models.llama import Llama, LlamaConfig
from saw_int4_jax.models.tokenizer import Tokenizer
from saw_int4_jax.serving import Engine, Overloaded, Request
from saw_int4_jax.serving.programs import State, decode_rows, prefill_rows
from saw_int4_jax.sharding import make_mesh, shard_params
from tests.checkpoints import byte_level
from tests.hlo import assert_in_place

CONFIG = LlamaConfig(
    vocab_size=272,
    embed_dim=32,
    mlp_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_length=64,
)
FORWARD = Llama(CONFIG, last_only=True).apply
TOKENIZER = Tokenizer(byte_level())
NUM_PAGES, PAGE_SIZE, MAX_LENGTH, ROWS = 24, 4, 40, 4


@functools.cache
def variables():
    """Random, and larger than at initialization: tokens then depend on all that came before."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(lambda key: jax.tree.map(lambda x: 2 * x, Llama(CONFIG).init(key, tokens)))(
        jax.random.key(0)
    )


def make_engine(method="bdr", **options) -> Engine:
    """Always of the same shapes, so that all tests share two compiled programs of each kind."""
    methods = {"bf16": dict(dtype="bf16"), "int4": dict(order=1), "bdr": dict()}
    spec = CONFIG.cache_spec(NUM_PAGES, page_size=PAGE_SIZE, **methods[method])
    cache = init_cache(spec, ROWS, MAX_LENGTH)
    options = dict(piece=4, pieces=3, steps=5, mixed_steps=2, batches=[4]) | options
    return Engine(FORWARD, variables(), cache, **options)


def text(start: int, length: int) -> list[int]:
    """Texts with the same start have their beginnings in common."""
    return np.random.default_rng(start).integers(0, 256, 64)[:length].tolist()


@functools.cache
def alone(prompt: tuple[int, ...], **sampling) -> list[int]:
    """What follows a prompt: 24 tokens, by `generate`, with nothing beside it."""
    spec = CONFIG.cache_spec(NUM_PAGES, page_size=PAGE_SIZE)
    result = generate(
        FORWARD,
        variables(),
        [list(prompt)],
        init_cache(spec, 1, 64),
        max_new_tokens=24,
        sampling=make_sampling(1, **sampling) if sampling else None,
        chunk=32,
        every=8,
    )
    return result.tokens[0]


def expected(prompt, count, **sampling) -> list[int]:
    return alone(tuple(prompt), **sampling)[:count]


@pytest.mark.slow
def test_the_example_runs(capsys):
    example = textwrap.dedent(serving.__doc__.partition("model:\n")[2].partition("`server`")[0])
    exec(example, {})
    assert "'finished': {'length'" in capsys.readouterr().out


# --- Tokens do not depend on what else runs ---------------------------------------------------


def test_many_requests_at_once():
    engine = make_engine()
    prompts = [text(i % 3, 1 + 3 * i) for i in range(9)]
    limits = [1 + (5 * i) % 14 for i in range(9)]
    responses = engine.generate([Request(p, n) for p, n in zip(prompts, limits)])
    for prompt, limit, response in zip(prompts, limits, responses):
        assert response.tokens == expected(prompt, limit)
        assert response.finish == "length"
    assert any(response.reused_tokens for response in responses)
    assert engine.scheduler.pool.available == NUM_PAGES


def test_an_unquantized_cache():
    """With itself alone, since `alone` uses BDR."""
    prompts, shapes = [text(0, 17), text(0, 9), text(1, 14)], dict(pieces=1)
    together = make_engine("bf16", **shapes).generate([Request(p, 12) for p in prompts])
    for prompt, response in zip(prompts, together):
        engine = make_engine("bf16", reuse=False, **shapes)
        (single,) = engine.generate([Request(prompt, 12)])
        assert response.tokens == single.tokens


def test_after_preemption():
    engine = make_engine(reserve=0.0, reuse=False)
    engine.scheduler.pool.take(NUM_PAGES - 10)  # all that four requests share
    prompts = [text(i, 6) for i in range(4)]
    responses = engine.generate([Request(prompt, 20) for prompt in prompts])
    assert engine.scheduler.preemptions > 0
    assert responses[0].preemptions == 0
    assert [x.tokens for x in responses] == [expected(prompt, 20) for prompt in prompts]


def test_after_a_prefix_hit():
    engine = make_engine()
    (first,) = engine.generate([Request(text(0, 20), 9)])
    continued = [*first.request.prompt, *first.tokens[:-1]]
    again, more = engine.generate([Request(text(0, 20), 9), Request(continued, 5)])
    assert again.reused_tokens == 16
    assert more.reused_tokens == 24
    assert again.tokens == first.tokens == expected(text(0, 20), 9)
    assert more.tokens == expected(text(0, 20), 13)[8:]


def test_sampled_tokens_depend_on_the_seed_alone():
    sampling = [dict(temperature=1.5, seed=i, top_k=20, top_p=0.9, min_p=0.01) for i in range(4)]
    prompt = text(0, 7)
    engine = make_engine()
    requests = [Request(prompt, 10, **options) for options in sampling]
    responses = engine.generate([*requests, Request(prompt, 10)])
    for options, response in zip(sampling, responses):
        assert response.tokens == expected(prompt, 10, **options)
    assert responses[-1].tokens == expected(prompt, 10)
    assert len({tuple(response.tokens) for response in responses}) == 5


def test_requests_without_a_seed_differ():
    prompt = text(0, 7)
    responses = make_engine().generate([Request(prompt, 10, temperature=1.5) for _ in range(3)])
    assert len({tuple(response.tokens) for response in responses}) == 3


arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # iteration
        st.integers(0, 2),  # text
        st.integers(1, 20),  # prompt tokens
        st.integers(1, 16),  # new tokens
        st.none() | st.integers(0, 6),  # cancelled so many iterations later
    ),
    min_size=1,
    max_size=10,
)
options = st.fixed_dictionaries(
    dict(
        mixed_steps=st.sampled_from([2, 5]),
        budget=st.none() | st.integers(1, 20),
        reserve=st.sampled_from([0.0, 0.25, 1.0]),
        reuse=st.booleans(),
    )
)


def check_random_traffic(arrivals, pool, options):
    engine = make_engine(**options)
    kept = engine.scheduler.pool.take(NUM_PAGES - pool)
    responses, cancels = [], []
    for iteration in range(500):
        for start, which, length, new, cancel in arrivals:
            if start == iteration:
                responses.append(engine.submit(Request(text(which, length), new)))
                if cancel is not None:
                    cancels.append((iteration + cancel, responses[-1]))
        for when, response in cancels:
            if when == iteration:
                engine.cancel(response)
        if not engine.step() and iteration > 12:
            break
    engine.scheduler.pool.release(kept)
    assert engine.scheduler.pool.available == NUM_PAGES
    assert len(responses) == len(arrivals)
    cancelled = [response for _, response in cancels]
    for response in responses:
        request = response.request
        assert response.tokens == expected(request.prompt, len(response.tokens))
        if response not in cancelled:
            assert response.finish == "length"
        if response.finish == "length":
            assert len(response.tokens) == request.max_new_tokens
        assert response.finish in ("length", "cancelled")
    return engine


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(arrivals, st.integers(9, NUM_PAGES), options)
def test_random_traffic(arrivals, pool, options):
    check_random_traffic(arrivals, pool, options)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(arrivals, st.integers(9, NUM_PAGES), options)
def test_much_random_traffic(arrivals, pool, options):
    check_random_traffic(arrivals, pool, options)


# --- Ends -----------------------------------------------------------------------------------------


def test_stop_tokens():
    prompt = text(0, 7)
    tokens = expected(prompt, 24)
    engine = make_engine(eos=[tokens[10]])
    stopped, ignoring, own = engine.generate(
        [
            Request(prompt, 20),
            Request(prompt, 20, ignore_eos=True),
            Request(prompt, 20, stop_tokens=[tokens[3]]),
        ]
    )
    assert stopped.tokens == tokens[: tokens.index(tokens[10]) + 1]
    assert ignoring.tokens == tokens[:20]
    assert own.tokens == tokens[: tokens.index(tokens[3]) + 1]
    assert [x.finish for x in (stopped, ignoring, own)] == ["stop", "length", "stop"]


def test_stop_strings_and_streams():
    prompt = text(0, 7)
    engine = make_engine(tokenizer=TOKENIZER)
    (whole,) = engine.generate([Request(prompt, 20)])
    stop = whole.text[8:11]
    seen = []
    response = engine.submit(
        Request(prompt, 20, stop=[stop, "never"]),
        lambda response, tokens, text: seen.append((tokens, text, response.finish)),
    )
    pieces = list(engine.stream(response))
    assert response.finish == "stop"
    assert response.text == whole.text[: whole.text.index(stop)]
    assert "".join(pieces) == "".join(text for _, text, _ in seen) == response.text
    assert list(itertools.chain(*(tokens for tokens, _, _ in seen))) == response.tokens
    assert response.tokens == whole.tokens[: len(response.tokens)]
    assert [finish for *_, finish in seen][-1] == "stop"
    assert engine.scheduler.pool.available == NUM_PAGES


def test_streams_without_a_tokenizer_yield_tokens():
    engine = make_engine()
    beside = engine.submit(Request(text(1, 9), 3))
    parts = list(engine.stream(engine.submit(Request(text(0, 5), 11))))
    assert list(itertools.chain(*parts)) == expected(text(0, 5), 11)
    assert len(parts) > 2
    assert beside.finish == "length"


def test_cancel_frees_pages_at_once():
    engine = make_engine()
    running, waiting = (engine.submit(Request(text(0, 8), 20)) for _ in range(2))
    seen = []
    other = engine.submit(Request(text(1, 8), 9), lambda *news: seen.append(news))
    for _ in range(3):
        engine.step()
    for response in (running, waiting, running):
        engine.cancel(response)
        assert response.finish == "cancelled"
    assert engine.status()["pages_held"] == len(engine.scheduler.active[0].pages)
    engine.run()
    assert other.tokens == expected(text(1, 8), 9)
    assert running.tokens == expected(text(0, 8), len(running.tokens))


def test_deadlines():
    now = [0.0]
    engine = make_engine(clock=lambda: now[0])
    late = engine.submit(Request(text(0, 8), 20, timeout_s=5))
    other = engine.submit(Request(text(1, 8), 20, timeout_s=500))
    for _ in range(3):
        engine.step()
    now[0] = 6.0
    engine.run()
    assert late.finish == "deadline"
    assert late.tokens == expected(text(0, 8), len(late.tokens))
    assert other.finish == "length"
    assert late.timing.e2e_s == 6.0
    assert late.timing.ttft_s == 0.0


def test_requests_from_other_threads():
    engine = make_engine()
    done, responses = threading.Event(), []

    def serve():
        while not done.is_set():
            if not engine.step():
                engine.wait(0.01)

    server = threading.Thread(target=serve)
    server.start()

    def ask(which):
        finished = threading.Event()
        response = engine.submit(
            Request(text(which, 6), 7),
            lambda response, *_: finished.set() if response.finish else None,
        )
        assert finished.wait(60)
        responses.append(response)

    clients = [threading.Thread(target=ask, args=(which,)) for which in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    done.set()
    server.join()
    assert len(responses) == 6
    assert all(x.tokens == expected(x.request.prompt, 7) for x in responses)


# --- Programs -------------------------------------------------------------------------------------


def test_a_few_programs_serve_all():
    """Prefill of one piece and of three, few or more decode steps of two rows and of four.

    Those for sampled requests beside them: `test_nothing_is_compiled_as_requests_come_and_go`.
    """
    engine = make_engine(batches=[2, 4])
    engine.generate([Request(text(i, 1 + 3 * i), 1 + 3 * i) for i in range(7)])
    engine.generate([Request(text(9, 3), 2)])
    calls = [("prefill", 1, 4), ("prefill", 3, 4)]
    calls += [("decode", batch, steps) for batch in (2, 4) for steps in (2, 5)]
    assert engine.programs == {(*call, False) for call in calls}


def test_nothing_is_compiled_as_requests_come_and_go():
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    engine = make_engine()
    engine.warm_up()
    jax.jit(lambda x: x + len(compiled))(1)
    after_warm_up = len(compiled)
    assert after_warm_up > 0  # so it is counted
    engine.generate([Request(text(i, 1 + 3 * i), 1 + 3 * i) for i in range(7)])
    engine.cancel(engine.submit(Request(text(0, 9), 9)))
    engine.generate([Request(text(0, 9), 9, temperature=1.0, stop_tokens=[3])])
    assert len(compiled) == after_warm_up


def test_programs_update_the_pool_in_place():
    engine = make_engine()
    spec = CONFIG.cache_spec(1 << 17, page_size=PAGE_SIZE)
    cache = jax.eval_shape(lambda: init_cache(spec, ROWS, MAX_LENGTH))
    for program, rows, options in (
        (prefill_rows, engine._rows(3, 4, []), {}),
        (decode_rows, engine._rows(ROWS, 0, []), dict(num_steps=5)),
    ):
        state = State(cache, cache.lengths)
        lowered = program.lower(FORWARD, variables(), state, rows, **options)
        assert_in_place(lowered.compile(), cache.pages, temp_fraction=0.1)


def check_sharded_engine():
    spec = CONFIG.cache_spec(NUM_PAGES, page_size=PAGE_SIZE)
    two_pools = init_cache(spec, ROWS, MAX_LENGTH, mesh=make_mesh(kv_heads=1, data=2))
    with pytest.raises(ValueError, match="one pool"):
        Engine(FORWARD, variables(), two_pools)
    mesh = make_mesh(kv_heads=2)
    cache = init_cache(spec, ROWS, MAX_LENGTH, mesh=mesh)
    shapes = dict(piece=4, pieces=3, steps=5, batches=[4])
    engine = Engine(FORWARD, shard_params(variables(), mesh), cache, **shapes)
    engine.warm_up()
    programs = prefill_rows._cache_size(), decode_rows._cache_size()
    prompts = [text(i % 3, 1 + 3 * i) for i in range(6)]
    responses = engine.generate([Request(prompt, 9) for prompt in prompts])
    assert (prefill_rows._cache_size(), decode_rows._cache_size()) == programs
    assert [x.tokens for x in responses] == [expected(prompt, 9) for prompt in prompts]


@pytest.mark.slow
def test_a_cache_on_two_devices():
    code = "from tests.saw_int4_jax.serving.test_engine import check_sharded_engine as f; f()"
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# --- Bad input, and figures -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        dict(prompt=[]),
        dict(prompt=[-1]),
        dict(max_new_tokens=0),
        dict(max_new_tokens=MAX_LENGTH),
        dict(temperature=-1.0),
        dict(top_p=0.0),
        dict(seed=2**40),
        dict(stop=["x"]),
        dict(stop_tokens=range(17)),
    ],
)
def test_bad_requests_are_refused(bad):
    engine = make_engine()
    with pytest.raises(ValueError, match="Expected"):
        engine.submit(Request(**dict(prompt=[1, 2]) | bad))
    assert not engine.step()


def test_empty_stop_strings_are_refused():
    with pytest.raises(ValueError, match="stop"):
        make_engine(tokenizer=TOKENIZER).submit(Request([1], stop=[""]))


@pytest.mark.parametrize("bad", [dict(batches=[2]), dict(batches=[0, 4]), dict(steps=0)])
def test_bad_engines_are_refused(bad):
    with pytest.raises(ValueError, match="Expected"):
        make_engine(**bad)


def test_only_so_many_may_wait():
    engine = make_engine(max_waiting=2)
    for _ in range(2):
        engine.submit(Request([1], 1))
    with pytest.raises(Overloaded):
        engine.submit(Request([1], 1))


def test_status_counts():
    engine = make_engine()
    engine.generate([Request(text(i, 9), 6) for i in range(3)])
    (again,) = engine.generate([Request(text(0, 9), 6)])
    status = engine.status()
    assert status["finished"] == {"length": 4}
    assert status["new_tokens"] == 24
    assert status["prompt_tokens"] == 36
    assert status["reused_tokens"] == again.reused_tokens == 8
    assert status["waiting"] == status["running"] == status["pages_held"] == 0
    assert status["pages_idle"] > 0
    assert 0 < status["ttft_s_p50"] <= status["e2e_s_p50"] <= status["e2e_s_p90"]
    assert status["tokens_per_s"] > 0
