"""The reference model's script: what it reads, an interrupted training, what it exports."""

import email.message
import json
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import corpus, export_reference, train_reference
from benchmarks.corpus import BOS, Document
from saw_int4_jax.models import Llama, LlamaConfig, load_model

TOY = LlamaConfig(
    vocab_size=257,
    embed_dim=16,
    mlp_dim=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_length=16,
    norm_eps=1e-6,
    tie_embeddings=True,
)
RECIPE = train_reference.Recipe(steps=8, batch=2, warmup=2, scan=2)


@pytest.fixture(scope="module")
def toy_corpus():
    draw = np.random.default_rng(0)
    text = {kind: draw.integers(0, 257, 500).astype(np.uint16) for kind in ("a", "b")}
    return corpus.Corpus(text, {"a": text["a"][:100]}, {"a": 0.3, "b": 0.7})


# --- Corpus -------------------------------------------------------------------------------------


def own_source() -> str:
    return pathlib.Path(corpus.__file__).read_text()


def heldout_lines(count: int) -> list[str]:
    return (corpus.HELDOUT / "python.txt").read_text().splitlines()[40 : 40 + count]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("pkg/module.py", own_source(), False),
        ("vendored/_graphlib.py", (corpus.HELDOUT / "python.txt").read_text(), True),
        ("pkg/graphlib.py", own_source(), True),
        ("pydoc_data/topics.py", own_source(), True),
        ("pkg/copied.py", own_source() + "\n".join(heldout_lines(30)) + own_source(), True),
        ("pkg/class.py", "\n".join("        " + line for line in heldout_lines(30)), True),
        ("pkg/quotes.py", own_source() + "\n".join(heldout_lines(5)), False),
        ("guide.md", (corpus.HELDOUT / "prose.txt").read_text()[5000:8000], True),
    ],
)
def test_held_out_text_is_recognized(name, text, expected):
    assert corpus.is_held_out(Document(name, text), corpus.heldout_passages()) is expected


def test_corpus_leaves_out_what_ships(tmp_path):
    for i in range(40):
        (tmp_path / "prose").mkdir(exist_ok=True)
        (tmp_path / "prose" / f"{i}.txt").write_text(f"line {i}\n" * 50)
    planted = (corpus.HELDOUT / "prose.txt").read_text()
    (tmp_path / "prose" / "planted.txt").write_text(planted)
    loaded = corpus.load_corpus(tmp_path, python=False, text_share=1.0, megabytes=1)
    tokens = np.concatenate([loaded.train["prose"], loaded.held_out["prose"]])
    assert (tokens == BOS).sum() == 40
    assert len(loaded.held_out["prose"]) > 0
    assert loaded.share == {"prose": 1.0}
    assert set(loaded.excluded) == {"planted.txt/0", "planted.txt/1"}


def test_folder_of_all_formats(tmp_path):
    (tmp_path / "sums").mkdir()
    row = {"question": "1 + 1?", "answer": "<<1+1=2>>2", "id": 7}
    (tmp_path / "sums" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "long.txt").write_text("ten bytes\n\n" * 4000)
    with zipfile.ZipFile(tmp_path / "books" / "more.zip", "w") as archive:
        archive.writestr("b.txt", "Zürich".encode("latin-1"))
        archive.writestr("README", "no text of the corpus")
    kinds = corpus.read_folder(tmp_path)
    assert [d.text for d in kinds["sums"]] == ["Question: 1 + 1?\nAnswer: 2\n"]
    assert kinds["books"][-1].text == "Zürich"
    long = [d.text for d in kinds["books"][:-1]]
    assert len(long) == 3
    assert "".join(long).strip() == ("ten bytes\n\n" * 4000).strip()


@pytest.mark.parametrize(
    ("expression", "permissive"),
    [
        ("MIT", True),
        ("BSD-3-Clause AND Zlib", True),
        ("GPL-3.0-or-later", False),
        ("LicenseRef-Proprietary", False),
        ("", False),
    ],
)
def test_only_permissive_packages_are_read(expression, permissive):
    metadata = email.message.Message()
    metadata["License-Expression"] = expression
    assert (corpus.permissive_licence(metadata) is not None) is permissive


# --- Training -----------------------------------------------------------------------------------


def test_training_forward_is_the_models(toy_corpus):
    """One-hot products are the embedding and its transpose."""
    params = train_reference.init_params(TOY, seed=0)
    tokens = jnp.asarray(toy_corpus.train["a"][:34].reshape(2, 17).astype(np.int32))
    model = Llama(TOY, dtype=jnp.bfloat16)
    logits, _ = jax.jit(model.apply)({"params": params}, tokens[:, :-1])
    log_p = jax.nn.log_softmax(logits)
    expected = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(train_reference.token_nats(TOY, params, tokens), expected, rtol=2e-2)


def test_resumed_training_equals_uninterrupted(toy_corpus, tmp_path):
    whole, rows = train_reference.train(TOY, RECIPE, toy_corpus)
    train_reference.train(TOY, RECIPE, toy_corpus, checkpoint=tmp_path, stop=4)
    resumed, resumed_rows = train_reference.train(
        TOY, RECIPE, toy_corpus, checkpoint=tmp_path, resume=True
    )
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    drop_time = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in resumed_rows] == drop_time
    initial = train_reference.init_params(TOY, RECIPE.seed)
    assert not np.array_equal(whole["norm"]["scale"], initial["norm"]["scale"])


def test_resume_refuses_another_training(toy_corpus, tmp_path):
    with pytest.raises(ValueError, match="to hold a checkpoint"):
        train_reference.train(TOY, RECIPE, toy_corpus, checkpoint=tmp_path, resume=True)
    train_reference.train(TOY, RECIPE, toy_corpus, checkpoint=tmp_path, stop=2)
    other = train_reference.Recipe(steps=8, batch=2, warmup=2, scan=2, seed=1)
    with pytest.raises(ValueError, match="Expected the checkpoint's"):
        train_reference.train(TOY, other, toy_corpus, checkpoint=tmp_path, resume=True)


def test_text_shorter_than_the_context_is_refused():
    short = {"a": np.zeros(16, np.uint16)}
    with pytest.raises(ValueError, match="exceed the context"):
        train_reference.train(TOY, RECIPE, corpus.Corpus(short, {}, {"a": 1.0}))


@pytest.mark.parametrize("recipe", [dict(steps=125), dict(steps=300)])
def test_recipe_checks(recipe):
    with pytest.raises(ValueError, match="Expected self"):
        train_reference.Recipe(**recipe)


# --- Export -------------------------------------------------------------------------------------


def toy_rows():
    accuracy = {"bits_per_byte": 1.5, "kl": 0.01, "top1": 0.9, "rotate_v": False}
    return [
        {"op": "train", "step": 2, "bits_per_byte": 2.0, "seconds": 1.0},
        {"op": "evaluate", "step": 2, "text": "a", "bits_per_byte": 2.0},
        {"op": "final", "text": "a", "bits_per_byte": 1.9},
        {"op": "final", "text": "heldout/prose", "bits_per_byte": 1.87},
        {"op": "run", "steps": 2, "tokens": 64, "seconds": 1.0},
        {"op": "corpus", "text": "a", "train_bytes": 500, "share": 1.0, "epochs": 0.1},
        {"op": "packages", "names": "numpy 2 (BSD-3-Clause)", "excluded": "topics.py"},
        {"op": "accuracy", "text": "heldout/prose", "method": "bdr", "order": 8, **accuracy},
        {"op": "sample", "prompt": "def ", "continuation": "f(x): pass"},
    ]


def test_exported_directory_tells_what_it_holds(tmp_path):
    pytest.importorskip("matplotlib")
    params = train_reference.init_params(TOY, seed=0)
    exported = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    export_reference.export(tmp_path, TOY, exported, toy_rows())
    card = (tmp_path / "README.md").read_text()
    for part in ("1.900", "1.870 (prose)", "BDR 8, K", "numpy 2 (BSD-3-Clause)", "def f(x): pass"):
        assert part in card
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    model = load_model(tmp_path, jnp.bfloat16)
    assert model.config == TOY
    jax.tree.map(np.testing.assert_array_equal, model.params, exported)
    assert model.tokenizer.bos_id == BOS
    assert model.tokenizer.eos_ids == (BOS,)


def test_weights_have_hugging_face_names_and_shapes():
    params = train_reference.init_params(TOY, seed=0)
    weights = export_reference.hugging_face_weights(params)
    assert len(weights) == len(jax.tree.leaves(params)) == 2 + 9 * TOY.num_layers
    layer = params["layers_0"]
    expected = {
        "model.embed_tokens.weight": params["embed_tokens"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
        "model.layers.0.input_layernorm.weight": layer["input_layernorm"]["scale"],
        "model.layers.0.self_attn.k_proj.weight": layer["self_attn"]["k_proj"]["kernel"].T,
        "model.layers.0.mlp.down_proj.weight": layer["mlp"]["down_proj"]["kernel"].T,
    }
    for name, x in expected.items():
        np.testing.assert_array_equal(weights[name], x)


def test_tokenizer_ids_are_bytes():
    tokenizer = export_reference.byte_tokenizer()
    text = "".join(map(chr, range(0x250))) + " \r\n\tnaïve 数 🙂  x"
    ids = tokenizer.encode(text).ids
    assert ids == [BOS, *text.encode()]
    assert tokenizer.decode(ids) == text
    long = (corpus.HELDOUT / "prose.txt").read_text() * 4
    assert tokenizer.decode(tokenizer.encode(long).ids) == long


def test_shipped_model_is_this_scripts():
    directory = corpus.HELDOUT.parent / "reference"
    model = load_model(directory)
    assert model.config == train_reference.CONFIG
    assert (directory / "model.safetensors").stat().st_size < 12e6
    log = json.loads((directory / "training.json").read_text())
    final = {row["text"]: row["bits_per_byte"] for row in log["rows"] if row["op"] == "final"}
    assert final["heldout/prose"] < 1.4
    prose = (corpus.HELDOUT / "prose.txt").read_bytes()[:512]
    tokens = jnp.asarray([[BOS, *prose]])
    nats = jax.jit(train_reference.token_nats, static_argnums=0)(model.config, model.params, tokens)
    assert float(nats.mean()) / np.log(2) < 2.0  # 8 is chance
