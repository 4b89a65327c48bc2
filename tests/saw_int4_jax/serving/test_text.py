"""Stop strings in text that comes piece by piece."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw_int4_jax.models.tokenizer import Tokenizer
from saw_int4_jax.serving.text import StoppableText
from tests.checkpoints import byte_level

TOKENIZER = Tokenizer(byte_level())


def pieces(text: str, stops: list[str]) -> tuple[list[str], bool]:
    ids = TOKENIZER.backend.encode(text, add_special_tokens=False).ids
    stoppable = StoppableText(TOKENIZER, TOKENIZER.encode("x"), stops)
    found = []
    for token in ids:
        found.append(stoppable.push(token))
        if stoppable.stopped:
            return found, True
    found.append(stoppable.flush())
    return found, stoppable.stopped


@given(st.text("ab é", max_size=12), st.lists(st.text("ab é", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stops):
    found, stopped = pieces(text, stops)
    ends = [text.index(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    # Of several the one that is complete first counts; it ends where no other is within it.
    whole = "".join(found)
    assert text.startswith(whole)
    if not ends:
        assert whole == text
    else:
        assert all(stop not in whole for stop in stops)
        assert any(text[len(whole) :].startswith(stop) for stop in stops)


def test_what_cannot_be_a_stop_string_comes_at_once():
    found, _ = pieces("abcabd", ["abd"])
    assert found == ["", "", "abc", "", "", ""]
    found, _ = pieces("xyz", ["abd"])
    assert found == ["x", "y", "z", ""]


@pytest.mark.parametrize("stops", [[], ["z"]])
def test_a_character_of_several_tokens_comes_whole(stops):
    found, _ = pieces("aé", stops)
    assert found == ["a", "", "é", ""]
