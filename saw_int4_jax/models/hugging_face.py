"""Hugging Face directories: `config.json`, safetensors and `tokenizer.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import tokenizers
from flax import traverse_util

from saw_int4_jax.models.llama import Llama, LlamaConfig
from saw_int4_jax.models.tokenizer import Tokenizer
from saw_int4_jax.rope import Rope, RopeScaling

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Our parameter and the checkpoint's tensor; the first pattern that fits counts.
NAMES = (
    (r"layers_(\d+)\.(.+)\.(?:kernel|scale)", r"model.layers.\1.\2.weight"),
    (r"layers_(\d+)\.(.+)\.bias", r"model.layers.\1.\2.bias"),
    (r"(embed_tokens|norm)\.(?:embedding|scale)", r"model.\1.weight"),
    (r"lm_head\.kernel", r"lm_head.weight"),
)
# Buffers that some checkpoints hold and no model needs.
IGNORED = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"

# Keys of config.json that this supports with one value alone.
FIXED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


# --- Config ---------------------------------------------------------------------------------


def read_config(directory: pathlib.Path) -> LlamaConfig:
    """The config in `config.json`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged or describes a model that this does not support.
    """
    return parse_config(_read_json(directory / "config.json"))


def parse_config(raw: dict[str, Any]) -> LlamaConfig:
    """The config that the fields of a `config.json` describe.

    Raises:
      ValueError: a field is missing or has a value that this does not support.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"Expected {model_type=} to be one of {', '.join(MODEL_TYPES)}")
    for key, only in FIXED.items():
        if (value := raw.get(key)) is not None and value != only:
            raise ValueError(f"Expected {key}={value!r} in config.json to be {only!r}")

    def size(key: str, default: int | None = None) -> int:
        value = default if raw.get(key) is None else raw[key]
        if type(value) is not int:
            raise ValueError(f"Expected {key}={value!r} in config.json to be an integer")
        return value

    layers, heads, width = map(size, ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    window, full_layers = parse_window(raw, layers)
    attention_bias = model_type in ("llama", "qwen3") and bool(raw.get("attention_bias"))
    return LlamaConfig(
        vocab_size=size("vocab_size"),
        embed_dim=width,
        mlp_dim=size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", 128 if model_type == "qwen3" else width // max(heads, 1)),
        max_length=size("max_position_embeddings"),
        rope=parse_rope(raw),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        qkv_bias=model_type == "qwen2" or attention_bias,
        o_bias=attention_bias,
        qk_norm=model_type == "qwen3",
        window=window,
        full_layers=full_layers,
        tie_embeddings=bool(raw.get("tie_word_embeddings")),
    )


def parse_window(raw: dict[str, Any], layers: int) -> tuple[int | None, int]:
    """(sliding window in tokens, how many of the first layers ignore it).

    Raises:
      ValueError: layers with and without a window alternate.
    """
    model_type = raw["model_type"]
    window = raw.get("sliding_window", 4096)  # transformers' default; null is no window
    used = model_type == "mistral" or (
        model_type in ("qwen2", "qwen3") and raw.get("use_sliding_window", False)
    )
    if not used or window is None:
        return None, 0
    if model_type == "mistral":
        return window, 0
    types = raw.get("layer_types")
    if types is None:
        full = min(raw.get("max_window_layers", 28), layers)
    else:
        full = types.count("full_attention")
        if types != ["full_attention"] * full + ["sliding_attention"] * (layers - full):
            raise ValueError(
                "Expected layer_types in config.json to be full_attention in the first layers and "
                f"sliding_attention in the rest, got {types}"
            )
    return (None, 0) if full == layers else (window, full)


def parse_rope(raw: dict[str, Any]) -> Rope:
    """The position embedding, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    Raises:
      ValueError: its type is neither `default` nor `llama3`.
    """
    fields = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in ("default", "llama3") or any(isinstance(x, dict) for x in fields.values()):
        raise ValueError(f"Expected RoPE of type default or llama3 in config.json, got {fields}")
    if fields.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"Expected RoPE of all channels in config.json, got {fields}")
    theta = float(fields.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    if kind == "default":
        return Rope(theta)
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    if missing := [name for name in names if name not in fields]:
        raise ValueError(f"Expected {', '.join(missing)} in config.json's RoPE of type llama3")
    return Rope(theta, RopeScaling(**{name: fields[name] for name in names}))


# --- Weights --------------------------------------------------------------------------------


def read_tensors(directory: pathlib.Path, config: LlamaConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters, named as in the flattened tree, and their tensors; kernels are [out, in].

    Names and shapes are all checked before the first tensor is read.

    Raises:
      FileNotFoundError: there are no safetensors, or a shard is missing.
      ValueError: tensors are missing, unexpected or of another shape.
    """
    shapes = parameter_shapes(config)
    with contextlib.ExitStack() as stack:
        handles: dict[str, Any] = {}
        for file in _weight_files(directory):
            try:
                handle = stack.enter_context(safetensors.safe_open(file, framework="np"))
            except safetensors.SafetensorError as error:
                raise ValueError(f"Expected {file} to be a safetensors file: {error}") from error
            handles |= {name: handle for name in handle.keys()}  # noqa: SIM118
        _check_names(set(handles), {tensor_name(name) for name in shapes}, config, directory)
        _check_shapes(handles, shapes)
        for parameter in shapes:
            name = tensor_name(parameter)
            yield parameter, handles[name].get_tensor(name)


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by their path, joined with dots; kernels [in, out]."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)
    params = traverse_util.flatten_dict(variables["params"], sep=".")
    return {name: leaf.shape for name, leaf in params.items()}


def tensor_name(parameter: str) -> str:
    """The name of a parameter's tensor in Hugging Face checkpoints."""
    for pattern, name in NAMES:
        if match := re.fullmatch(pattern, parameter):
            return match.expand(name)
    raise ValueError(f"Expected {parameter=} to be one of Llama's")


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"Expected {single.name} or {index.name} in {directory}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"Expected a weight_map in {index}")
    files = [directory / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"Expected {', '.join(missing)} in {directory}, as {index.name} says"
        )
    return files


def _check_names(
    found: set[str], expected: set[str], config: LlamaConfig, directory: pathlib.Path
) -> None:
    ignored = {name for name in found if re.fullmatch(IGNORED, name)}
    if config.tie_embeddings:
        ignored.add("lm_head.weight")  # some checkpoints repeat the embedding
    missing, unexpected = sorted(expected - found), sorted(found - expected - ignored)
    problems = [
        f"{problem} {', '.join(names)}"
        for problem, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ValueError(
            f"Expected the tensors of config.json in {directory}: " + "; ".join(problems)
        )


def _check_shapes(handles: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    problems = []
    for parameter, shape in shapes.items():
        name = tensor_name(parameter)
        expected = shape[::-1] if parameter.endswith(".kernel") else shape
        found = tuple(handles[name].get_slice(name).get_shape())
        if found != expected:
            problems.append(f"{name} {expected}, got {found}")
    if problems:
        raise ValueError("Expected the shapes of config.json: " + "; ".join(problems))


# --- Tokenizer ------------------------------------------------------------------------------


def read_tokenizer(
    directory: pathlib.Path, config: LlamaConfig, file: pathlib.Path | None = None
) -> Tokenizer:
    """The tokenizer in `tokenizer.json`; a BOS token is added to texts as that file says.

    EOS tokens are those of `generation_config.json`, `config.json` or `tokenizer_config.json`: of
    the first that names any.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: it is damaged.
    """
    file = file or directory / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"Expected a tokenizer in {file}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"Expected {file} to be a tokenizer.json: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, _eos_ids(directory, backend))


def _eos_ids(directory: pathlib.Path, backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            ids = _read_json(directory / name).get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
    if (directory / "tokenizer_config.json").is_file():
        token = _read_json(directory / "tokenizer_config.json").get("eos_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is not None and (index := backend.token_to_id(token)) is not None:
            return (index,)
    return ()


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"Expected {file.name} in {file.parent}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected {file} to be JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected {file} to be a JSON object")
    return content
