"""Hugging Face directories: what is read, and what is said where something is wrong."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from saw_int4_jax import Rope, RopeScaling
from saw_int4_jax.models import LlamaConfig, load_model
from saw_int4_jax.models.hugging_face import parse_config, parse_rope
from tests import checkpoints

LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 32)
VARIANTS = {
    "llama": dict(),
    "llama_tied": dict(tie_embeddings=True, rope=Rope(5e5, LLAMA3)),
    "llama_biased": dict(qkv_bias=True, o_bias=True),
    "mistral": dict(window=7),
    "qwen2": dict(qkv_bias=True, rope=Rope(1e6), norm_eps=1e-6),
    "qwen2_window": dict(qkv_bias=True, window=7, full_layers=1),
    "qwen3": dict(qk_norm=True, tie_embeddings=True),
}


def variant(name, **changes):
    return LlamaConfig(**{**checkpoints.SIZES, **VARIANTS[name], **changes})


RAW = checkpoints.config_json(variant("llama"))
WEIGHTS = checkpoints.tensors(variant("llama"), checkpoints.random_params(variant("llama")))


# --- Weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_written_is_read(tmp_path, name, shards):
    config = variant(name)
    params = checkpoints.random_params(config)
    raw, weights = checkpoints.config_json(config), checkpoints.tensors(config, params)
    assert raw["model_type"] == name.split("_")[0]
    model = load_model(checkpoints.write_hugging_face(tmp_path, raw, weights, shards=shards))
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, model.params, params)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(tmp_path, stored, dtype):
    weights = {name: x.astype(stored) for name, x in WEIGHTS.items()}
    model = load_model(checkpoints.write_hugging_face(tmp_path, RAW, weights), dtype)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {dtype}
    kernel = model.params["layers_1"]["mlp"]["up_proj"]["kernel"]
    expected = weights["model.layers.1.mlp.up_proj.weight"].T.astype(dtype)
    np.testing.assert_array_equal(kernel, expected)


def test_superfluous_tensors_are_left_aside(tmp_path):
    config = variant("llama_tied")
    params = checkpoints.random_params(config)
    raw, weights = checkpoints.config_json(config), checkpoints.tensors(config, params)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    model = load_model(checkpoints.write_hugging_face(tmp_path, raw, weights))
    jax.tree.map(np.testing.assert_array_equal, model.params, params)


def test_all_missing_and_unexpected_tensors_are_named_at_once(tmp_path):
    weights = dict(WEIGHTS)
    missing = ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
    unexpected = ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight"]
    weights |= dict.fromkeys(unexpected, np.ones(32, np.float32))
    for name in missing:
        del weights[name]
    match = re.escape(f"missing {', '.join(missing)}; unexpected {', '.join(unexpected)}")
    with pytest.raises(ValueError, match=match):
        load_model(checkpoints.write_hugging_face(tmp_path, RAW, weights))


def test_wrong_shapes_are_named_with_both_shapes(tmp_path):
    raw = {**RAW, "num_key_value_heads": 4}
    with pytest.raises(
        ValueError, match=r"1\.self_attn\.v_proj\.weight \(64, 32\), got \(32, 32\)"
    ):
        load_model(checkpoints.write_hugging_face(tmp_path, raw, WEIGHTS))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_weights_are_named(tmp_path, value):
    weights = dict(WEIGHTS)
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name] = np.where(np.arange(64) == 3, value, weights[name]).astype(np.float32)
    with pytest.raises(
        ValueError, match=r"Expected layers_1\.self_attn\.o_proj\.kernel to be finite"
    ):
        load_model(checkpoints.write_hugging_face(tmp_path, RAW, weights))


def test_weights_too_large_for_the_dtype_are_named(tmp_path):
    weights = {**WEIGHTS, "model.norm.weight": np.full(32, 1e5, np.float32)}
    directory = checkpoints.write_hugging_face(tmp_path, RAW, weights)
    with pytest.raises(ValueError, match=r"norm\.scale to be finite in float16"):
        load_model(directory, "float16")


def test_integer_weights_are_refused(tmp_path):
    weights = {name: x.astype(np.int8) for name, x in WEIGHTS.items()}
    with pytest.raises(ValueError, match="to be floating-point"):
        load_model(checkpoints.write_hugging_face(tmp_path, RAW, weights))


# --- Files ----------------------------------------------------------------------------------

MISSING = {
    "config.json": "Expected config.json in",
    "tokenizer.json": "Expected a tokenizer in .*tokenizer.json",
    "model-00002-of-00003.safetensors": "Expected model-00002-of-00003.safetensors in",
    "model.safetensors.index.json": "Expected model.safetensors or model.safetensors.index.json",
}
DAMAGED = {
    "config.json": "config.json to be JSON",
    "tokenizer.json": "to be a tokenizer.json",
    "model-00002-of-00003.safetensors": "to be a safetensors file",
    "model.safetensors.index.json": "index.json to be JSON",
}


@pytest.mark.parametrize("file", MISSING)
def test_missing_files(tmp_path, file):
    checkpoints.write_hugging_face(tmp_path, RAW, WEIGHTS, shards=3)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=MISSING[file]) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", DAMAGED)
def test_damaged_files(tmp_path, file):
    checkpoints.write_hugging_face(tmp_path, RAW, WEIGHTS, shards=3)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=DAMAGED[file]) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_no_such_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"to be a Hugging Face directory or a llama2\.c"):
        load_model(tmp_path / "nowhere")


def test_dtype_must_be_floating(tmp_path):
    with pytest.raises(ValueError, match="to be a floating-point type"):
        load_model(tmp_path, "int8")


# --- config.json ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(model_type="gpt2"), "model_type='gpt2' to be one of llama, mistral, qwen2, qwen3"),
        (dict(model_type=None), "model_type=None to be one of llama"),
        (dict(hidden_act="gelu"), "hidden_act='gelu' in config.json to be 'silu'"),
        (dict(mlp_bias=True), "mlp_bias=True"),
        (dict(quantization_config={"bits": 4}), "quantization_config={'bits': 4}"),
        (dict(hidden_size=None), "hidden_size=None in config.json to be an integer"),
        (dict(num_hidden_layers="2"), "num_hidden_layers='2' in config.json to be an integer"),
        (dict(num_attention_heads=0), "num_heads=0"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "RoPE of type default or llama3"),
        (dict(rope_scaling={"rope_type": "yarn"}), "RoPE of type default or llama3"),
        (
            dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
            "low_freq_factor, high_freq_factor, original_max_position_embeddings in config.json",
        ),
        (dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}), "RoPE of type default"),
        (dict(rope_parameters={"partial_rotary_factor": 0.5}), "RoPE of all channels"),
        (
            dict(
                model_type="qwen3",
                use_sliding_window=True,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"],
            ),
            "Expected layer_types in config.json to be full_attention in the first layers",
        ),
    ],
)
def test_unsupported_configs(change, match):
    with pytest.raises(ValueError, match=match) as error:
        parse_config({**RAW, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "rope"),
    [
        ({}, Rope(10_000.0)),
        ({"rope_theta": 500000}, Rope(500_000.0)),
        ({"rope_theta": 1e6, "rope_scaling": None}, Rope(1e6)),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "default"}}, Rope(1e6)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **vars(LLAMA3)}},
            Rope(5e5, LLAMA3),
        ),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, Rope(1e6)),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **vars(LLAMA3)}},
            Rope(5e5, LLAMA3),
        ),
    ],
)
def test_rope_forms(raw, rope):
    assert parse_rope(raw) == rope


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("raw", "window", "full_layers"),
    [
        (dict(model_type="llama", sliding_window=8), None, 0),
        (dict(model_type="mistral", sliding_window=8), 8, 0),
        (dict(model_type="mistral", sliding_window=None), None, 0),
        (dict(model_type="qwen2", sliding_window=8), None, 0),
        (dict(model_type="qwen2", sliding_window=8, use_sliding_window=True), None, 0),
        (
            dict(
                model_type="qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=1
            ),
            *(8, 1),
        ),
        (
            dict(
                model_type="qwen3", sliding_window=8, use_sliding_window=True, max_window_layers=0
            ),
            *(8, 0),
        ),
        (
            dict(
                model_type="qwen3",
                sliding_window=8,
                use_sliding_window=True,
                layer_types=[FULL, SLIDING],
            ),
            *(8, 1),
        ),
        (
            dict(model_type="qwen3", sliding_window=None, layer_types=[FULL, FULL]),
            *(None, 0),
        ),
    ],
)
def test_sliding_windows(raw, window, full_layers):
    config = parse_config({**RAW, **raw})
    assert (config.window, config.full_layers) == (window, full_layers)


def test_defaults():
    raw = {
        key: RAW[key]
        for key in (
            *("model_type", "vocab_size", "hidden_size", "intermediate_size"),
            *("num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
        )
    }
    config = parse_config(raw)
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert (config.norm_eps, config.tie_embeddings) == (1e-6, False)
    assert parse_config({**raw, "model_type": "qwen3"}).head_dim == 128
    assert parse_config({**raw, "model_type": "mistral"}).window == 4096


# --- Tokenizer ------------------------------------------------------------------------------


def test_tokenizer(tmp_path):
    tokenizer = load_model(checkpoints.write_hugging_face(tmp_path, RAW, WEIGHTS)).tokenizer
    ids = tokenizer.encode("naïve 🙂")
    assert ids[0] == tokenizer.bos_id == 0
    assert len(ids) == 1 + len("naïve 🙂".encode())
    assert tokenizer.decode(ids) == "naïve 🙂"
    assert tokenizer.encode("") == [0]


def test_tokenizer_file_elsewhere(tmp_path):
    directory = checkpoints.write_hugging_face(tmp_path / "model", RAW, WEIGHTS)
    file = (directory / "tokenizer.json").rename(tmp_path / "other.json")
    assert load_model(directory, tokenizer=file).tokenizer.bos_id == 0


def test_truncation_stored_with_a_tokenizer_is_not_applied(tmp_path):
    directory = checkpoints.write_hugging_face(tmp_path, RAW, WEIGHTS)
    backend = checkpoints.byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(directory / "tokenizer.json"))
    assert len(load_model(directory).tokenizer.encode("a" * 20)) == 21


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({}, ()),
        ({"config": {"eos_token_id": 5}}, (5,)),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": [6, 7]}}, (6, 7)),
        ({"config": {"eos_token_id": 5}, "generation_config": {}}, (5,)),
        ({"tokenizer_config": {"eos_token": "<eos>"}}, (2,)),
        ({"tokenizer_config": {"eos_token": {"content": "<eos>"}}}, (2,)),
        ({"tokenizer_config": {"eos_token": None}}, ()),
        ({"tokenizer_config": {"eos_token": "<none>"}}, ()),
    ],
)
def test_eos_tokens(tmp_path, files, eos):
    raw = {**RAW, "eos_token_id": None, **files.get("config", {})}
    checkpoints.write_hugging_face(tmp_path, raw, WEIGHTS)
    for name in files.keys() - {"config"}:
        (tmp_path / f"{name}.json").write_text(json.dumps(files[name]))
    assert load_model(tmp_path).tokenizer.eos_ids == eos


def test_numpy_knows_bfloat16():
    """What reading bfloat16 safetensors without torch rests on."""
    assert np.dtype("bfloat16") == ml_dtypes.bfloat16
