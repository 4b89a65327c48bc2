"""A model from disk: a Hugging Face directory or a llama2.c checkpoint."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from saw_int4_jax.models import hugging_face, llama2c
from saw_int4_jax.models.llama import LlamaConfig
from saw_int4_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """What a checkpoint holds.

    Attributes:
      config: `Llama(config)` is the module.
      params: its parameters.
      tokenizer: between text and its token ids.
    """

    config: LlamaConfig
    params: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def variables(self) -> dict[str, Any]:
        """What `Llama(config).apply` takes."""
        return {"params": self.params}


def load_model(
    path: str | pathlib.Path,
    dtype: DTypeLike = jnp.float32,
    *,
    tokenizer: str | pathlib.Path | None = None,
) -> Model:
    """Loads a model, one tensor at a time, to the default device.

    Args:
      path: a Hugging Face directory of a Llama, Mistral, Qwen2 or Qwen3 (`config.json`,
        `tokenizer.json` and safetensors, in one file or sharded), or a llama2.c checkpoint.
      dtype: of the parameters.
      tokenizer: the tokenizer's file. `None`: `tokenizer.json` in the directory, or beside a
        llama2.c checkpoint `tok<vocab_size>.bin` or `tokenizer.bin`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or holds something that this does not support.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"Expected {path} to be a Hugging Face directory or a llama2.c checkpoint"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"Expected {dtype=} to be a floating-point type")
    if tokenizer is not None:
        tokenizer = pathlib.Path(tokenizer)
    source = hugging_face if path.is_dir() else llama2c
    config = source.read_config(path)
    text = source.read_tokenizer(path, config, tokenizer)
    params = {
        name: _to_device(name, tensor, dtype) for name, tensor in source.read_tensors(path, config)
    }
    return Model(config, traverse_util.unflatten_dict(params, sep="."), text)


def _to_device(name: str, tensor: np.ndarray, dtype: DTypeLike) -> jax.Array:
    """A checkpoint's tensor as a parameter: kernels turn from [out, in] to [in, out]."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"Expected {name} of {tensor.dtype=} to be floating-point")
    parameter = jnp.asarray(tensor).astype(dtype)
    if name.endswith(".kernel"):
        parameter = parameter.T
    if not jnp.isfinite(parameter).all():
        raise ValueError(f"Expected {name} to be finite in {jnp.dtype(dtype)}")
    return parameter
