"""The Llama family: module, published shapes, and loading from disk."""

from saw_int4_jax.models.configs import CONFIGS
from saw_int4_jax.models.llama import Llama, LlamaConfig
from saw_int4_jax.models.load import Model, load_model
from saw_int4_jax.models.tokenizer import TextStream, Tokenizer

__all__ = ["CONFIGS", "Llama", "LlamaConfig", "Model", "TextStream", "Tokenizer", "load_model"]
