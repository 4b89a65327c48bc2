"""llama2.c checkpoints against a small second implementation of llama2.c."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saw_int4_jax.models import Llama, LlamaConfig, load_model
from tests import checkpoints
from tests.checkpoints import LLAMA2C_PIECES, LLAMA2C_SCORES

PIECES = len(LLAMA2C_PIECES)
CONFIGS = {
    tie: LlamaConfig(
        **{**checkpoints.SIZES, "vocab_size": PIECES, "head_dim": 8, "max_length": 24},
        tie_embeddings=tie,
    )
    for tie in (True, False)
}


@pytest.fixture
def written(tmp_path):
    """A checkpoint, its tokenizer beside it, and what they hold."""
    config = CONFIGS[True]
    params = checkpoints.random_params(config)
    (tmp_path / "model.bin").write_bytes(checkpoints.llama2c_bytes(config, params))
    (tmp_path / "tokenizer.bin").write_bytes(checkpoints.llama2c_tokenizer_bytes())
    return tmp_path / "model.bin", config, params


# --- Weights --------------------------------------------------------------------------------


def llama2c_logits(content: bytes, tokens: list[int]) -> np.ndarray:
    """Logits of all tokens, straight from a checkpoint's bytes, one token at a time."""
    dim, hidden, layers, heads, kv_heads, vocab, length = np.frombuffer(content, "<i4", 7).tolist()
    numbers = iter(np.frombuffer(content, "<f4", offset=28).astype(np.float64))
    size = dim // heads
    kv_dim = kv_heads * size

    def take(*shape):
        return np.fromiter(numbers, np.float64, int(np.prod(shape))).reshape(shape)

    embedding, rms_att = take(abs(vocab), dim), take(layers, dim)
    wq, wk, wv = (take(layers, width, dim) for width in (dim, kv_dim, kv_dim))
    wo, rms_ffn = take(layers, dim, dim), take(layers, dim)
    w1, w2, w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    rms_final, _ = take(dim), take(length * size)
    classifier = embedding if vocab > 0 else take(-vocab, dim)

    def norm(x, weight):
        return weight * x / np.sqrt((x * x).mean() + 1e-5)

    def turn(x, position):
        pairs = x.reshape(-1, size // 2, 2)
        turns = np.exp(1j * position * 10000.0 ** (-np.arange(0, size, 2) / size))
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turns
        return np.stack([turned.real, turned.imag], -1).reshape(-1, size)

    keys, values = ([[] for _ in range(layers)] for _ in range(2))
    logits = []
    for position, token in enumerate(tokens):
        x = embedding[token]
        for i in range(layers):
            y = norm(x, rms_att[i])
            q = turn(wq[i] @ y, position)
            keys[i].append(turn(wk[i] @ y, position))
            values[i].append((wv[i] @ y).reshape(-1, size))
            out = []
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                scores = np.array([k[kv_head] @ q[head] for k in keys[i]]) / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out.append(sum(w * v[kv_head] for w, v in zip(weights, values[i])))
            x = x + wo[i] @ np.concatenate(out)
            y = norm(x, rms_ffn[i])
            gate = w1[i] @ y
            x = x + w2[i] @ (gate / (1 + np.exp(-gate)) * (w3[i] @ y))
        logits.append(classifier @ norm(x, rms_final))
    return np.array(logits)


@pytest.mark.parametrize("tie", [True, False])
def test_logits_are_those_of_llama2c(tmp_path, tie):
    config = CONFIGS[tie]
    params = checkpoints.random_params(config)
    content = checkpoints.llama2c_bytes(config, params)
    (tmp_path / "model.bin").write_bytes(content)
    (tmp_path / f"tok{PIECES}.bin").write_bytes(checkpoints.llama2c_tokenizer_bytes())
    model = load_model(tmp_path / "model.bin")
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 24)
    logits, _ = jax.jit(Llama(config).apply)(model.variables, jnp.asarray(tokens)[None])
    np.testing.assert_allclose(logits[0], llama2c_logits(content, tokens), atol=2e-5)


def test_non_finite_weights_are_named(written):
    file, _, _ = written
    content = np.frombuffer(file.read_bytes(), "<f4").copy()
    content[7 + 3] = np.nan
    file.write_bytes(content.tobytes())
    with pytest.raises(ValueError, match=r"Expected embed_tokens\.embedding to be finite"):
        load_model(file)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda content: content[:20], "to hold a llama2.c header"),
        (lambda content: content[:-4], "bytes as its header says"),
        (lambda content: content + b"1234", "bytes as its header says"),
        (lambda content: b"24ka" + content[4:], "of version 0, not a later one"),
        (lambda content: b"GGUF" + bytes(100), "a size is not positive"),
        (lambda content: b"Once upon a time" * 99, "num_heads|head_dim|header says"),
        (
            lambda content: content[:12] + b"\x03\0\0\0" + content[16:],
            "num_heads=3 to be a multiple",
        ),
    ],
    ids=["header", "truncated", "longer", "version_1", "gguf", "text", "heads"],
)
def test_damaged_checkpoints(written, change, match):
    file, _, _ = written
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=match) as error:
        load_model(file)
    assert "\n" not in str(error.value)


# --- Tokenizer ------------------------------------------------------------------------------


def llama2c_encode(text: str, pieces, scores) -> list[int]:
    """llama2.c's `encode` with BOS: join the best pair until none is a piece."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokens = [1]
    for character in (" " + text) if text else "":
        known = [ids[character]] if character in ids else [3 + b for b in character.encode()]
        tokens += known
    while True:
        best, best_at = -1e10, None
        for i in range(len(tokens) - 1):
            joined = ids.get(pieces[tokens[i]] + pieces[tokens[i + 1]])
            if joined is not None and scores[joined] > best:
                best, best_at = scores[joined], i
        if best_at is None:
            return tokens
        joined = ids[pieces[tokens[best_at]] + pieces[tokens[best_at + 1]]]
        tokens[best_at : best_at + 2] = [joined]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama2c")
    config = CONFIGS[True]
    content = checkpoints.llama2c_bytes(config, checkpoints.random_params(config))
    (directory / "model.bin").write_bytes(content)
    (directory / "tokenizer.bin").write_bytes(checkpoints.llama2c_tokenizer_bytes())
    return load_model(directory / "model.bin").tokenizer


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(text=st.text(st.sampled_from("theoncap  \té🙂▁\n<>"), max_size=40))
def test_encodings_are_those_of_llama2c(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == llama2c_encode(text, LLAMA2C_PIECES, LLAMA2C_SCORES)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["", "<s>", "</s> the", "\n<s>\n", "<0x41>", "aaaa", "aaaaa"])
def test_encodings_of_awkward_texts(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == llama2c_encode(text, LLAMA2C_PIECES, LLAMA2C_SCORES)
    assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizer):
    assert tokenizer.bos_id == 1
    assert set(tokenizer.eos_ids) == {1, 2}


def test_the_tokenizer_of_the_vocabulary_size_comes_first(written):
    file, _, _ = written
    (file.parent / "tokenizer.bin").rename(file.parent / f"tok{PIECES}.bin")
    (file.parent / "tokenizer.bin").write_bytes(b"another model's")
    assert load_model(file).tokenizer.encode("the")


def test_the_tokenizer_may_lie_elsewhere(written, tmp_path):
    file, _, _ = written
    elsewhere = (file.parent / "tokenizer.bin").rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=f"tok{PIECES}.bin or .*tokenizer.bin"):
        load_model(file)
    assert load_model(file, tokenizer=elsewhere).tokenizer.encode("the")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (checkpoints.llama2c_tokenizer_bytes()[:-1], "to hold 281 tokens"),
        (checkpoints.llama2c_tokenizer_bytes()[:-10], "to be a llama2.c tokenizer"),
        (checkpoints.llama2c_tokenizer_bytes() + b"1", "to hold 281 tokens"),
        (checkpoints.llama2c_tokenizer_bytes((*LLAMA2C_PIECES[:-1], "t")), "distinct tokens"),
        (checkpoints.llama2c_tokenizer_bytes(LLAMA2C_PIECES[::-1]), "standing for bytes"),
    ],
    ids=["cut", "short", "long", "twice", "no_bytes"],
)
def test_damaged_tokenizers(written, content, match):
    file, _, _ = written
    (file.parent / "tokenizer.bin").write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        load_model(file)
    assert "\n" not in str(error.value)


# --- A published model ----------------------------------------------------------------------

# A directory with stories260K/{stories260K.bin, tok512.bin} (karpathy/tinyllamas) and
# text/tinystories_sample/tinystories_sample.txt.
DATA = os.environ.get("SAW_TEST_DATA")


@pytest.mark.skipif(not DATA, reason="the environment variable SAW_TEST_DATA names no directory")
def test_stories260k():
    data = pathlib.Path(DATA)
    text = data / "text/tinystories_sample/tinystories_sample.txt"
    checkpoint = data / "stories260K/stories260K.bin"
    if not (checkpoint.exists() and text.exists()):
        pytest.skip(f"no stories260K or no text in {data}")
    model = load_model(checkpoint)
    forward = jax.jit(Llama(model.config).apply)
    nats, count = 0.0, 0
    for story in text.read_text().split("<|endoftext|>"):
        ids = np.array(model.tokenizer.encode(story.strip()))
        assert model.tokenizer.decode(ids) == story.strip()
        if len(ids) < 2:
            continue
        log_p = jax.nn.log_softmax(forward(model.variables, ids[None, :-1])[0][0])
        nats -= np.take_along_axis(np.asarray(log_p), ids[1:, None], 1).sum()
        count += len(ids) - 1
    assert count == 1804
    assert abs(nats / count - 1.2664) < 1e-3
