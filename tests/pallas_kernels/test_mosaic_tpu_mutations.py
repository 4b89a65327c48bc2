"""The tests of the TPU kernels fail when the kernels are broken on purpose.

Each mutation replaces one piece of a kernel's source. A mutation whose piece is no longer there
fails too: it must follow the source.
"""

import pathlib
import types

import pytest

from pallas_kernels.mosaic_tpu import attention, write
from tests import cases
from tests.pallas_kernels import test_mosaic_tpu

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

DECODE = cases.AttentionCase("decode", order=64, lengths=(300, 0, 130), sinks=True)
CHUNK = cases.AttentionCase("chunk", order=64, queries=4, lengths=(33, 4, 200), window=20)
ROTATED = cases.AttentionCase("rotated", order=64, rotate_v=True, lengths=(40,))
SMALL_PAGES = cases.AttentionCase(
    "small", q_heads=16, kv_heads=16, head_dim=128, page_size=32, lengths=(70, 33)
)
BF16 = cases.AttentionCase("bf16", "bf16", order=1, lengths=(300, 33))

ATTENTION_MUTATIONS = {
    "no_wait": ("wait(item, block, slot)", "pass", DECODE),
    "nibbles_swapped": (
        "pltpu.bitcast(nibbles[0], dtype), pltpu.bitcast(nibbles[1], dtype)",
        "pltpu.bitcast(nibbles[1], dtype), pltpu.bitcast(nibbles[0], dtype)",
        DECODE,
    ),
    "no_mask": ("jnp.where(seen, scores, MASKED)", "scores", DECODE),
    "mask_off_by_one": ("tokens <= row_last", "tokens < row_last", DECODE),
    "not_causal": ("row_position if causal else", "row_position + 1 if causal else", CHUNK),
    "window_off_by_one": (
        "tokens > row_position - window",
        "tokens >= row_position - window",
        CHUNK,
    ),
    "no_key_minimum": (" + q_sum * per_row(k_minimum)", "", DECODE),
    "no_value_minimum": ("acc += (weights * per_row(v_minimum)).sum", "(weights).sum", DECODE),
    "unwritten_scales_leak": ("jnp.where(tokens < limit, words, np.uint32(0))", "words", DECODE),
    "unwritten_values_leak": (
        "tuple(_zero_from(v, tokens, limit, tokens_last) for v",
        "tuple(v for v",
        BF16,
    ),
    "no_second_limb": ("(high << 8) + low", "high << 8", DECODE),
    "no_decay": ("total = total * decay +", "total = total +", DECODE),
    "no_sinks": ("total = jnp.exp2(sinks - running_max)", "pass", DECODE),
    "heads_mixed": ("(row >= h * head_rows) & (row < (h + 1) * head_rows)", "row >= 0", DECODE),
    "heads_of_scales_mixed": ("first = g * share //", "first = 0 * share //", SMALL_PAGES),
    "folded_scales_mixed": ("(kind * share + i) * page_size", "i * page_size", SMALL_PAGES),
    "folded_heads_mixed": ("runs[h % share]", "runs[0]", SMALL_PAGES),
    "no_query_rotation": ("if signs_ref is not None:", "if False:", DECODE),
    "no_output_rotation": ("if format.value_order > 1 and", "if False and", ROTATED),
    "first_layer": ("layer_start + table_ref", "table_ref", DECODE),
}

SCATTERED, RUN = (
    next(case for case in test_mosaic_tpu.RUNS if case.name == name)
    for name in ("scattered", "run")
)
LAYER = cases.WriteCase("layer", layers=2, layer=1, page_size=32, slots=(3, -1, 70))
FOLDED = cases.WriteCase("folded", page_size=32, kv_heads=4, slots=(3, -1, 70))

WRITE_MUTATIONS = {
    "no_wait_for_the_read": ("copy(i, 0).wait()", "pass", LAYER),
    "no_wait_for_the_write": ("copy(i - IN_FLIGHT, 1).wait()", "pass", SCATTERED),
    "nothing_read": ("] < size", "] < 0", LAYER),
    "nibbles_swapped": ("k_codes + 16 * v_codes", "v_codes + 16 * k_codes", LAYER),
    "no_rotation": ("if signs is None or order == 1:", "if True:", LAYER),
    "old_rows_lost": ("jnp.where(new, part(0, h), old)", "part(0, h)", LAYER),
    "old_words_lost": ("jnp.where(new, part, ref[kind])", "part", SCATTERED),
    "old_folded_words_lost": ("mine = new & (run", "mine = (run", FOLDED),
    "folded_words_mixed": ("run == i * chunk", "run >= 0", FOLDED),
    "folded_heads_mixed": ("h % share * (kv_heads // share) + h // share", "h", FOLDED),
    "second_block_lost": ("slots_ref[first_token + i]", "slots_ref[i]", RUN),
    "first_layer": ("array.at[(layer_ref[0], page,", "array.at[(0, page,", LAYER),
}


def mutated(module, old, new):
    """The module with one piece of its source replaced."""
    path = pathlib.Path(module.__file__)
    source = path.read_text()
    assert source.count(old) >= 1, f"Expected {old=} in {path.name}"
    broken = types.ModuleType(module.__name__)
    exec(compile(source.replace(old, new), path, "exec"), broken.__dict__)
    return broken


@pytest.mark.parametrize("mutation", ATTENTION_MUTATIONS)
def test_broken_attention_is_caught(mutation):
    old, new, case = ATTENTION_MUTATIONS[mutation]
    broken = mutated(attention, old, new)
    broken.BLOCK_TOKENS = 128
    with pytest.raises(AssertionError):
        test_mosaic_tpu.check_attention(case, test_mosaic_tpu.INTERPRET, broken)


@pytest.mark.parametrize("mutation", WRITE_MUTATIONS)
def test_broken_write_is_caught(mutation):
    old, new, case = WRITE_MUTATIONS[mutation]
    with pytest.raises(AssertionError):
        test_mosaic_tpu.check_write(case, test_mosaic_tpu.INTERPRET, mutated(write, old, new))


@pytest.mark.parametrize(
    "case", [DECODE, CHUNK, ROTATED, BF16, SMALL_PAGES], ids=lambda case: case.name
)
def test_whole_attention_passes(case, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_TOKENS", 128)
    test_mosaic_tpu.check_attention(case, test_mosaic_tpu.INTERPRET)


@pytest.mark.parametrize("case", [LAYER, SCATTERED, RUN, FOLDED], ids=lambda case: case.name)
def test_whole_write_passes(case):
    test_mosaic_tpu.check_write(case, test_mosaic_tpu.INTERPRET)
