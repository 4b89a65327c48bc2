"""Prefill, the compiled decode loop and whole generations, with a small random Llama."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from saw_int4_jax import (
    CacheSpec,
    attend,
    decode,
    extend,
    generate,
    init_cache,
    make_sampling,
    prefill,
    share,
    step,
    stream,
    truncate,
)
from saw_int4_jax.generate import RUNNING, DecodeState, _step, begin
from saw_int4_jax.models.llama import Llama, LlamaConfig
from tests.hlo import assert_in_place, copied_sizes
from tests.saw_int4_jax.allocator_model import AllocatorModel

CONFIG = LlamaConfig(
    vocab_size=67,
    embed_dim=32,
    mlp_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_length=64,
)
FORWARD = Llama(CONFIG).apply
METHODS = {"bf16": dict(dtype="bf16"), "int4": dict(order=1), "bdr": dict()}
BATCH, NUM_PAGES, PAGE_SIZE, MAX_PAGES = 3, 24, 4, 10
MAX_LENGTH = MAX_PAGES * PAGE_SIZE
NO_EOS = -1

every_method = pytest.mark.parametrize("method", ["bf16", "bdr"])  # INT4 is BDR of order one


@functools.cache
def variables():
    """Random, and larger than at initialization: tokens then depend on all that came before."""

    @jax.jit
    def double(key):
        return jax.tree.map(lambda x: 2 * x, Llama(CONFIG).init(key, jnp.zeros((1, 1), jnp.int32)))

    with jax.ensure_compile_time_eval():  # the first call may be in a function that is traced
        return double(jax.random.key(0))


def empty_cache(method="bdr", batch=BATCH):
    spec = CONFIG.cache_spec(NUM_PAGES, page_size=PAGE_SIZE, **METHODS[method])
    return init_cache(spec, batch, MAX_LENGTH)


def run(prompts, cache=None, *, max_new_tokens=12, **options):
    """`generate` with options that most tests have in common, so that they compile once."""
    options = dict(chunk=8, every=8, eos=[NO_EOS]) | options
    cache = empty_cache() if cache is None else cache
    return generate(FORWARD, variables(), prompts, cache, max_new_tokens=max_new_tokens, **options)


def random_prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in lengths]


PROMPTS = random_prompts(11, 1, 6)


@jax.jit
def whole_logits(tokens, cache):
    """Logits of whole sequences in one call."""
    cache, ok = extend(cache, jnp.full(len(tokens), tokens.shape[1]))
    return FORWARD(variables(), tokens, cache)[0], ok


def assert_likeliest(prompts, result, method):
    """Every new token is the likeliest after all tokens before it."""
    sequences = [prompt + new[:-1] for prompt, new in zip(prompts, result.tokens)]
    for row in range(0, len(sequences), 2):  # two fit the pool
        tokens = np.zeros((2, MAX_LENGTH), np.int32)
        for padded, sequence in zip(tokens, sequences[row : row + 2]):
            padded[: len(sequence)] = sequence
        logits, ok = whole_logits(tokens, empty_cache(method, batch=2))
        assert ok.all()
        likeliest = np.asarray(logits.argmax(-1))
        for i in range(row, min(row + 2, len(sequences))):
            first = len(prompts[i]) - 1
            expected = likeliest[i - row, first : first + len(result.tokens[i])]
            assert result.tokens[i] == expected.tolist()


# --- Whole generations ----------------------------------------------------------------------


@every_method
def test_greedy_tokens_are_the_likeliest(method):
    """Pages are taken as the loop crosses their borders; each sequence has its own limit."""
    limits = [25, 17, 30]
    result = run(PROMPTS, empty_cache(method), max_new_tokens=limits)
    assert [len(new) for new in result.tokens] == limits
    assert result.finish == ["length"] * 3
    assert result.cache.lengths.tolist() == [35, 17, 35]  # all but the newest token
    assert_likeliest(PROMPTS, result, method)
    assert all(len(set(new)) > 5 for new in result.tokens)  # the model reacts to its input


def test_generation_without_eos_and_options():
    expected = run(PROMPTS).tokens
    assert (
        generate(FORWARD, variables(), PROMPTS, empty_cache(), max_new_tokens=12).tokens == expected
    )


@pytest.mark.parametrize("limits", [1, [1, 1, 1], [1, 2, 9]])
def test_limits(limits):
    expected = run(PROMPTS).tokens
    result = run(PROMPTS, max_new_tokens=limits)
    each = [limits] * 3 if isinstance(limits, int) else limits
    assert result.tokens == [new[:limit] for new, limit in zip(expected, each)]
    assert result.finish == ["length"] * 3
    prompted = [len(prompt) for prompt in PROMPTS]
    assert result.cache.lengths.tolist() == [n + limit - 1 for n, limit in zip(prompted, each)]


def test_eos_ends_its_own_sequence():
    expected = run(PROMPTS, max_new_tokens=20).tokens
    for row in range(BATCH):
        for eos in (expected[row][0], expected[row][7], expected[row][19]):
            result = run(PROMPTS, max_new_tokens=20, eos=[eos])
            for new, finish, all_new in zip(result.tokens, result.finish, expected):
                if eos in all_new:
                    assert (new, finish) == (all_new[: all_new.index(eos) + 1], "stop")
                else:
                    assert (new, finish) == (all_new, "length")


def test_any_of_several_eos_tokens():
    expected = run(PROMPTS, max_new_tokens=20).tokens[0]
    eos = [expected[9], NO_EOS, expected[4]]
    new = run(PROMPTS, max_new_tokens=20, eos=eos).tokens[0]
    assert new == expected[: min(expected.index(token) for token in eos if token >= 0) + 1]


def test_pieces_of_a_stream_are_the_generation():
    options = dict(max_new_tokens=[20, 7, 1], eos=[NO_EOS], chunk=8)
    pieces = []
    for new, state in stream(FORWARD, variables(), PROMPTS, empty_cache(), every=3, **options):
        assert new.shape == (BATCH, 3 if pieces else 1)
        pieces.append(new)
    joined = [row[row >= 0].tolist() for row in np.concatenate(pieces, axis=1)]
    expected = run(PROMPTS, **options)
    assert joined == expected.tokens
    assert len(pieces) == 1 + -(-19 // 3)
    assert state.tokens.tolist() == [new[-1] for new in joined]  # also where long finished
    jax.tree.map(np.testing.assert_array_equal, state.cache, expected.cache)


@every_method
def test_the_next_turn_goes_on_from_the_cache(method):
    """What the cache lacks of the first turn is its newest token."""
    first = run(PROMPTS, empty_cache(method), max_new_tokens=[6, 9, 1])
    more = random_prompts(3, 9, 5, seed=1)
    second = run(
        [[*new[-1:], *prompt] for new, prompt in zip(first.tokens, more)],
        first.cache,
        max_new_tokens=7,
    )
    history = [
        [*prompt, *new, *prompt_2] for prompt, new, prompt_2 in zip(PROMPTS, first.tokens, more)
    ]
    assert second.tokens == run(history, empty_cache(method), max_new_tokens=7).tokens


def test_sampled_tokens_do_not_depend_on_the_batch():
    """Nor on how many steps a loop has: seeds and positions alone decide."""
    options = dict(
        temperature=[1.0, 0.7, 2.0], top_k=[0, 20, 0], top_p=[0.9, 1.0, 1.0], seed=[3, 4, 3]
    )
    result = run(PROMPTS, sampling=make_sampling(3, **options))
    turned = {name: values[1:] + values[:1] for name, values in options.items()}
    again = run(PROMPTS[1:] + PROMPTS[:1], sampling=make_sampling(3, **turned))
    assert again.tokens == result.tokens[1:] + result.tokens[:1]
    assert run(PROMPTS, sampling=make_sampling(3, **options | dict(seed=5))).tokens != result.tokens
    greedy = make_sampling(3, temperature=[0.0, 1.0, 2.0], top_k=[0, 1, 1])
    assert run(PROMPTS, sampling=greedy).tokens == run(PROMPTS).tokens


def test_a_sequence_does_not_depend_on_the_batch():
    result = run(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        prompts = random_prompts(1, 13, 2, seed=2)
        prompts[(row + 1) % BATCH] = prompt
        limits = [1, 20, 3]
        limits[(row + 1) % BATCH] = 12
        assert run(prompts, max_new_tokens=limits).tokens[(row + 1) % BATCH] == result.tokens[row]
    alone = run(PROMPTS[:1], empty_cache(batch=1))
    assert alone.tokens == result.tokens[:1]


# --- Running out of pages -------------------------------------------------------------------


def test_out_of_pages_ends_a_sequence_and_leaves_the_others():
    """Which and when is what the allocator's model says, a token at a time."""
    prompts = random_prompts(30, 31, 21, seed=3)
    limits = [6, 20, 20]
    model = AllocatorModel(BATCH, NUM_PAGES, PAGE_SIZE, MAX_PAGES)
    assert all(model.extend(prompts, [30, 31, 21], 40))
    produced, out_of_pages = [1] * BATCH, [False] * BATCH
    while True:
        running = [
            made < limit and not out for made, limit, out in zip(produced, limits, out_of_pages)
        ]
        if not any(running):
            break
        for row, ok in enumerate(model.extend([[0]] * BATCH, [int(x) for x in running], 1)):
            produced[row] += running[row] and ok
            out_of_pages[row] |= not ok

    result = run(prompts, max_new_tokens=limits)
    assert [len(new) for new in result.tokens] == produced
    assert result.finish == ["out of pages" if out else "length" for out in out_of_pages]
    assert result.finish == ["length", "out of pages", "out of pages"]
    for row, prompt in enumerate(prompts):  # with the pool to itself
        alone, limit = [[0], [0], [0]], [1, 1, 1]
        alone[row], limit[row] = prompt, produced[row]
        assert run(alone, max_new_tokens=limit).tokens[row] == result.tokens[row]


def test_the_end_of_the_page_table_ends_a_sequence():
    prompts = random_prompts(30, 2, 2, seed=4)
    result = run(prompts, max_new_tokens=20)
    assert result.finish == ["out of pages", "length", "length"]
    assert [len(new) for new in result.tokens] == [1 + MAX_LENGTH - 30, 20, 20]
    assert result.cache.lengths.tolist() == [MAX_LENGTH, 21, 21]
    assert_likeliest(prompts[:1], result, "bdr")


# --- Prefill --------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "chunk"), [("bf16", 40), ("int4", 3), ("bdr", 3), ("bdr", 40)])
def test_prefill_in_chunks_of_any_size(method, chunk):
    expected, expected_cache = prefill(FORWARD, variables(), PROMPTS, empty_cache(method), chunk=8)
    calls = []
    logits, cache = prefill(
        FORWARD,
        variables(),
        PROMPTS,
        empty_cache(method),
        chunk=chunk,
        progress=lambda *done: calls.append(done),
    )
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    np.testing.assert_array_equal(cache.lengths, expected_cache.lengths)
    assert len(calls) == -(-11 // chunk)
    assert calls[-1] == (18, 18)


@every_method
def test_prefill_one_sequence_after_another(method):
    expected, expected_cache = prefill(FORWARD, variables(), PROMPTS, empty_cache(method), chunk=8)
    cache = empty_cache(method)
    for row, prompt in enumerate(PROMPTS):
        here = [prompt if other == row else [] for other in range(BATCH)]
        logits, cache = prefill(FORWARD, variables(), here, cache, chunk=8)
        np.testing.assert_allclose(logits[row], expected[row], atol=1e-3)
    np.testing.assert_array_equal(cache.lengths, expected_cache.lengths)


def test_a_model_may_return_the_last_logits_alone():
    expected, _ = prefill(FORWARD, variables(), PROMPTS, empty_cache(), chunk=8)
    last_only = Llama(CONFIG, last_only=True).apply
    logits, _ = prefill(last_only, variables(), PROMPTS, empty_cache(), chunk=8)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@every_method
@pytest.mark.parametrize("length", [8, 11])
def test_a_shared_prefix_continues_as_its_copy_would(method, length):
    """Whole pages alone, and with a partly filled one; the sequences then diverge."""
    prefix = random_prompts(11, seed=5)[0]
    suffixes = random_prompts(3, 6, 1, seed=6)
    expected = run(
        [prefix + suffixes[0], *(prefix[:length] + suffix for suffix in suffixes[1:])],
        empty_cache(method),
    )
    _, cache = prefill(FORWARD, variables(), [prefix, [], []], empty_cache(method), chunk=8)
    for target in (1, 2):
        cache, ok = jitted_share(cache, 0, target, length)
        assert ok
    assert run(suffixes, cache).tokens == expected.tokens


jitted_share = jax.jit(share, donate_argnums=0)
jitted_truncate = jax.jit(truncate, donate_argnums=0)
jitted_step = jax.jit(step, static_argnums=0)

# Shared pages are counted once: the pool holds what the same prompts would overflow.
LONG = random_prompts(32, seed=7)[0]


def test_prefill_counts_pages_as_the_pool_does():
    _, cache = prefill(FORWARD, variables(), [LONG, [], []], empty_cache(), chunk=8)
    for target in (1, 2):
        cache, ok = jitted_share(cache, 0, target, 32)
        assert ok
    assert int(cache.num_free) == NUM_PAGES - 8
    result = run([[1], [2], [3]], cache, max_new_tokens=8)
    assert result.finish == ["length"] * 3
    assert int(result.cache.num_free) == NUM_PAGES - 8 - 3 * 2


# --- Errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompts=PROMPTS[:2]), "one prompt for each of 3"),
        (dict(prompts=[*PROMPTS, [1]]), "one prompt for each of 3"),
        (dict(prompts=[[1], [], [2]]), "every prompt to hold at least one token"),
        (dict(prompts=[[1] * 41, [1], [1]]), "prompt of 41 tokens to fit .*=40"),
        (dict(prompts=[[1] * 40, [1] * 40, [1] * 17]), "need 25 pages, 24 are free"),
        (dict(max_new_tokens=0), "max_new_tokens=0 to be positive"),
        (dict(max_new_tokens=[3, 2, -1]), r"max_new_tokens=\[3, 2, -1\] to be positive"),
        (dict(max_new_tokens=[3, 2]), "one or 3 values"),
        (dict(every=0), "every=0 to be positive"),
        (dict(chunk=0), "chunk=0 to be positive"),
        (dict(sampling=make_sampling(2)), "sampling.* of 3 sequences"),
    ],
)
def test_errors_come_before_anything_is_written(options, message):
    cache = empty_cache()
    before = jax.tree.map(np.array, cache)
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        run(**dict(prompts=PROMPTS, cache=cache) | options)
    jax.tree.map(np.testing.assert_array_equal, cache, before)


def test_prefill_errors_count_what_the_cache_holds():
    _, cache = prefill(FORWARD, variables(), [LONG, LONG, LONG[:20]], empty_cache(), chunk=8)
    with pytest.raises(ValueError, match=r"^Expected a prompt of 41 tokens to fit .*=40"):
        prefill(FORWARD, variables(), [[], [1] * 9, []], cache, chunk=8)
    with pytest.raises(ValueError, match=r"^Expected prompts of 16 tokens .* 5 pages, 3 are free"):
        prefill(FORWARD, variables(), [[1] * 7, [], [1] * 9], cache, chunk=8)
    assert cache.lengths.tolist() == [32, 32, 20]


# --- Steps of several tokens ----------------------------------------------------------------


def test_drafts_are_verified_in_one_step_and_rolled_back():
    """Four tokens in one step give the logits of four single steps; `truncate` undoes them."""
    drafts = jnp.asarray(random_prompts(4, 4, 4, seed=8))
    _, cache = prefill(FORWARD, variables(), PROMPTS, empty_cache(), chunk=8)
    one = jnp.ones(BATCH, jnp.int32)
    singles, alone = [], cache
    for t in range(4):
        logits, alone, ok = jitted_step(FORWARD, variables(), drafts[:, t : t + 1], one, alone)
        assert ok.all()
        singles.append(logits)

    for counts in ([4, 4, 4], [2, 4, 0]):
        logits, together, ok = jitted_step(FORWARD, variables(), drafts, jnp.asarray(counts), cache)
        assert ok.all()
        for row, count in enumerate(counts):
            if count:
                expected = singles[count - 1][row]
                np.testing.assert_allclose(logits[row], expected, atol=1e-3)
                assert logits[row].argmax() == expected.argmax()
        back, ok = jitted_truncate(together, cache.lengths)
        assert ok.all()
        assert int(back.num_free) == int(cache.num_free)
        assert (
            run([[1], [2], [3]], back).tokens
            == run([[1], [2], [3]], jax.tree.map(jnp.copy, cache)).tokens
        )


def test_long_decode_does_not_drift_from_prefill():
    """The same tokens one by one and in chunks: the same codes, the same logits."""
    length, chunk = 320, 80
    spec = CONFIG.cache_spec(2 * length // 16, page_size=16)
    tokens = jnp.asarray(random_prompts(length, length, seed=9))

    @functools.partial(jax.jit, static_argnames="width")
    def teacher_forced(tokens, width):
        def body(cache, tokens):
            cache, _ = extend(cache, jnp.full(2, width), max_count=width)
            logits, cache = FORWARD(variables(), tokens, cache)
            return cache, logits

        parts = tokens.reshape(2, length // width, width).swapaxes(0, 1)
        cache, logits = lax.scan(body, init_cache(spec, 2), parts)
        return logits.swapaxes(0, 1).reshape(2, length, -1), cache

    decoded, decode_cache = teacher_forced(tokens, 1)
    prefilled, prefill_cache = teacher_forced(tokens, chunk)
    for name, part in (("data", 1e-4), ("scales", 1e-3)):
        stored = [
            np.asarray(getattr(cache.pages, name)[:, cache.page_table])
            for cache in (decode_cache, prefill_cache)
        ]
        # The last bit of a key may decide where a tie rounds.
        assert (stored[0] != stored[1]).mean() <= part
    np.testing.assert_allclose(decoded, prefilled, atol=0.01 * float(jnp.abs(prefilled).max()))
    errors = np.abs(np.asarray(decoded - prefilled))
    assert np.median(errors[:, -40:]) < 1e-4


# --- Layers under scan ----------------------------------------------------------------------

LAYERS, WIDTH = 3, 32


def stacked_weights():
    keys = jax.random.split(jax.random.key(0), 4)
    names = dict(q=(WIDTH, 64), k=(WIDTH, 32), v=(WIDTH, 32), o=(64, WIDTH))
    return {
        name: jax.random.normal(key, (LAYERS, *shape)) / 8
        for key, (name, shape) in zip(keys, names.items())
    }


def block(x, cache, layer, weights):
    batch, num_tokens, _ = x.shape
    q, k, v = ((x @ weights[name]).reshape(batch, num_tokens, -1, 16) for name in ("q", "k", "v"))
    out, cache = attend(cache, layer, q, k, v)
    return x + out.reshape(batch, num_tokens, -1) @ weights["o"], cache


def unrolled(x, cache, weights):
    for layer in range(LAYERS):
        x, cache = block(x, cache, layer, jax.tree.map(lambda w: w[layer], weights))  # noqa: B023
    return x, cache


def scanned(x, cache, weights):
    def body(carry, inputs):
        return block(*carry, *inputs), None

    return lax.scan(body, (x, cache), (jnp.arange(LAYERS), weights))[0]


def test_scan_over_layers_equals_unrolled():
    weights = jax.jit(stacked_weights)()
    x = np.random.default_rng(0).normal(size=(2, 2, 4, WIDTH)).astype(np.float32)
    results = []
    for layers in (unrolled, scanned):

        @jax.jit
        def one_step(x, counts, cache, weights, layers=layers):
            cache, _ = extend(cache, counts)
            return layers(x, cache, weights)

        cache = init_cache(CacheSpec(LAYERS, 2, 16, 8, page_size=4), 2)
        first, cache = one_step(x[0], jnp.array([4, 3]), cache, weights)
        second, cache = one_step(x[1], jnp.array([1, 4]), cache, weights)
        results.append(((first, second), cache))
    (expected, expected_cache), (actual, actual_cache) = results
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), actual, expected)
    jax.tree.map(np.testing.assert_array_equal, actual_cache, expected_cache)
    assert np.asarray(actual_cache.pages.data).reshape(LAYERS, -1).any(1).all()


@every_method
def test_scan_over_layers_copies_no_pages(method):
    spec = CacheSpec(LAYERS, 2, 16, 2**17, page_size=16, **METHODS[method])
    cache = jax.eval_shape(lambda: init_cache(spec, 2, 512))
    weights = jax.eval_shape(stacked_weights)

    @functools.partial(jax.jit, donate_argnums=0)
    def one_step(cache, x, weights):
        cache, _ = extend(cache, jnp.ones(2, jnp.int32), max_count=1)
        return scanned(x, cache, weights)

    x = jax.ShapeDtypeStruct((2, 1, WIDTH), jnp.float32)
    assert_in_place(one_step.lower(cache, x, weights).compile(), cache.pages)


# --- The compiled loop ----------------------------------------------------------------------


def compiled_decode(method, *, forward=FORWARD, loop=decode):
    """The loop for a pool far larger than a step's activations, and its state's shapes."""
    spec = CONFIG.cache_spec(2**17, page_size=16, **METHODS[method])

    def initial():
        row = jnp.zeros(2, jnp.int32)
        return DecodeState(init_cache(spec, 2, 512), row, row + 8, row + RUNNING)

    state, params = jax.eval_shape(initial), jax.eval_shape(variables)
    eos = jax.ShapeDtypeStruct((1,), jnp.int32)
    return loop.lower(forward, params, state, num_steps=8, eos=eos).compile(), state


@every_method
def test_decode_copies_no_pages(method):
    compiled, state = compiled_decode(method)
    assert_in_place(compiled, state.cache.pages)
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == state_bytes


def test_the_first_token_copies_no_pages():
    cache = jax.eval_shape(lambda: init_cache(CONFIG.cache_spec(2**17, page_size=16), 2, 512))
    logits = jax.ShapeDtypeStruct((2, CONFIG.vocab_size), jnp.float32)
    limits, eos = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (2, 1))
    assert_in_place(begin.lower(logits, cache, limits, eos).compile(), cache.pages)


def test_a_loop_that_copies_pages_is_caught():
    """Each of the three checks can fail."""
    not_donated = jax.jit(decode.__wrapped__, static_argnames=("forward", "num_steps"))
    compiled, state = compiled_decode("bdr", loop=not_donated)
    assert compiled.memory_analysis().alias_size_in_bytes == 0
    with pytest.raises(AssertionError):
        assert_in_place(compiled, state.cache.pages)

    def reads_old_pages_after_writing(variables, tokens, cache):
        logits, new = FORWARD(variables, tokens, cache)
        old = cache.pages.data[0, logits[:, 0].argmax(-1)]
        return logits + old.astype(jnp.float32).mean(), new

    compiled, state = compiled_decode("bdr", forward=reads_old_pages_after_writing)
    data = state.cache.pages.data
    assert compiled.memory_analysis().alias_size_in_bytes >= data.size
    assert compiled.memory_analysis().temp_size_in_bytes >= data.size
    assert max(copied_sizes(compiled)) >= data.size
    with pytest.raises(AssertionError):
        assert_in_place(compiled, state.cache.pages)


def test_one_compilation_serves_all_lengths():
    """Of prompts, generations, shared or continued sequences; and no buffer fails to be donated."""
    first = run(PROMPTS)
    compiled = decode._cache_size()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = run([new[-1:] for new in first.tokens], first.cache, max_new_tokens=[3, 17, 9])
        run(random_prompts(1, 30, 2), max_new_tokens=[1, 10, 33], eos=[5])
        run(random_prompts(2, 3, 4), truncate(second.cache, jnp.zeros(3, jnp.int32))[0])
    assert decode._cache_size() == compiled
    run(PROMPTS, every=2)
    assert decode._cache_size() == compiled + 1  # another width is another program


def test_parameters_committed_to_a_device_compile_as_often():
    """As loaded by `jax.device_put` or Orbax: the empty cache is not, what a step returns is."""
    committed = jax.device_put(variables(), jax.devices()[0])
    programs = (_step, begin, decode)
    compiled = [program._cache_size() for program in programs]
    cache = empty_cache()
    for prompts in (PROMPTS, [[1], [2], [3]]):
        cache = generate(
            FORWARD, committed, prompts, cache, max_new_tokens=12, chunk=5, every=5, eos=[NO_EOS]
        ).cache
    assert [program._cache_size() for program in programs] == [n + 1 for n in compiled]
