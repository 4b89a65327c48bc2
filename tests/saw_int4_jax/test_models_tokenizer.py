"""Streamed text: complete characters, and together the text of all tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saw_int4_jax.models import Tokenizer, llama2c
from tests import checkpoints

quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)

TOKENIZERS = {
    "byte_level": Tokenizer(checkpoints.byte_level()),
    "sentencepiece": Tokenizer(checkpoints.sentencepiece_like()),
    "metaspace": Tokenizer(checkpoints.sentencepiece_like(metaspace=True)),
    "llama2c": Tokenizer(
        llama2c.to_tokenizers(
            [piece.strip("\n") for piece in checkpoints.LLAMA2C_PIECES],
            list(checkpoints.LLAMA2C_SCORES),
        )
    ),
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
texts = st.text(st.sampled_from("the once  \n\té🙂漢�▁"), max_size=30)


def cut(ids, sizes):
    """The ids in runs of the given sizes, over and over."""
    start, runs = 0, []
    while start < len(ids):
        size = sizes[len(runs) % len(sizes)]
        runs.append(ids[start : start + size])
        start += size
    return runs


@every_tokenizer
@quick
@given(prompt=texts, text=texts, sizes=st.lists(st.integers(1, 4), min_size=1))
def test_the_stream_continues_the_prompt(tokenizer, prompt, text, sizes):
    prompt_ids = tokenizer.encode(prompt)
    new = tokenizer.encode(prompt + text + "a")[1:]  # splits differ from the prompt's
    stream = tokenizer.stream(prompt_ids)
    streamed = "".join(stream.push(run) for run in cut(new, sizes)) + stream.flush()
    assert tokenizer.decode(prompt_ids) + streamed == tokenizer.decode(prompt_ids + new)


@every_tokenizer
@quick
@given(text=texts, sizes=st.lists(st.integers(1, 4), min_size=1))
def test_nothing_but_whole_characters_comes_out(tokenizer, text, sizes):
    ids, text = tokenizer.encode(text), tokenizer.decode(tokenizer.encode(text))
    stream, streamed = tokenizer.stream(), ""
    for run in cut(ids, sizes):
        streamed += stream.push(run)
        assert text.startswith(streamed)
    assert streamed + stream.flush() == text


@every_tokenizer
def test_text_comes_out_as_soon_as_it_is_complete(tokenizer):
    stream = tokenizer.stream(tokenizer.encode("a"))
    ids = tokenizer.encode("a🙂b")[len(tokenizer.encode("a")) :]
    assert [stream.push([i]) for i in ids] == ["", "", "", "🙂", "b"]
    assert stream.flush() == ""


@every_tokenizer
def test_broken_bytes_become_replacement_characters(tokenizer):
    ids = tokenizer.encode("a🙂")
    stream = tokenizer.stream(tokenizer.encode("a"))
    assert stream.push(ids[-4:-2]) == ""
    assert set(stream.flush()) == {"\N{REPLACEMENT CHARACTER}"}
    assert stream.push(tokenizer.encode("a🙂")[-4:]) == "🙂"


@every_tokenizer
def test_special_tokens_have_no_text(tokenizer):
    bos = tokenizer.bos_id
    stream = tokenizer.stream()
    texts = [stream.push([i]) for i in (bos, *tokenizer.encode("the")[1:], bos)]
    assert "".join(texts) == "the" == tokenizer.decode([bos, *tokenizer.encode("the"), bos])


def test_bos_is_what_the_tokenizer_puts_first():
    assert TOKENIZERS["byte_level"].bos_id == 0
    assert TOKENIZERS["llama2c"].bos_id == 1
    without = checkpoints.byte_level()
    without.post_processor = None
    assert Tokenizer(without).bos_id is None
