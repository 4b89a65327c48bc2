"""Logits against Hugging Face transformers, from checkpoints that it writes itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saw_int4_jax as saw
from saw_int4_jax.models import Llama, load_model
from tests import checkpoints

pytestmark = pytest.mark.slow

SIZES = dict(
    vocab_size=272,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
ARCHITECTURES = {
    "llama": ("llama", dict()),
    "llama_biased": ("llama", dict(attention_bias=True)),
    "llama3_untied": ("llama", dict(rope_theta=5e5, rope_scaling=LLAMA3, head_dim=32)),
    "llama3_tied": ("llama", dict(rope_theta=5e5, rope_scaling=LLAMA3, tie_word_embeddings=True)),
    "mistral": ("mistral", dict(sliding_window=16)),
    "mistral_no_window": ("mistral", dict(sliding_window=None, head_dim=32)),
    "qwen2": ("qwen2", dict(rope_theta=1e6)),
    "qwen2_window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=16, max_window_layers=1),
    ),
    "qwen2_tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(rope_theta=1e6, head_dim=32)),
    "qwen3_tied": ("qwen3", dict(head_dim=32, tie_word_embeddings=True)),
}
LENGTH, DECODED = 72, 8  # tokens of each sequence, and how many of them one by one
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, LENGTH))


def reference(name, directory):
    """Writes a random checkpoint to `directory`; returns transformers' logits for `TOKENS`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model_type, options = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(model_type, **SIZES, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 10
            parameter.add_(torch.randn_like(parameter) / fan_in**0.5)
        logits = model(torch.from_numpy(TOKENS)).logits.numpy()
    model.save_pretrained(directory, max_shard_size="100KB" if name == "qwen3" else "1GB")
    checkpoints.byte_level().save(str(directory / "tokenizer.json"))
    return logits


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request, tmp_path_factory):
    """transformers' logits, and the same checkpoint loaded."""
    directory = tmp_path_factory.mktemp(request.param)
    logits = reference(request.param, directory)
    return logits, load_model(directory)


def test_logits(pair):
    logits, model = pair
    assert np.abs(logits).max() > 1
    ours, _ = jax.jit(Llama(model.config).apply)(model.variables, jnp.asarray(TOKENS))
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-4)


def test_logits_through_the_cache(pair):
    """A chunk of prompt, then token by token; bfloat16 keys and values cost a little."""
    logits, model = pair
    spec = model.config.cache_spec(12, page_size=16, dtype="bf16")
    forward = Llama(model.config).apply

    @jax.jit
    def step(tokens, cache):
        cache, _ = saw.extend(cache, jnp.full(2, tokens.shape[1]))
        return forward(model.variables, tokens, cache)

    prompt = LENGTH - DECODED
    part, cache = step(jnp.asarray(TOKENS[:, :prompt]), saw.init_cache(spec, 2))
    parts = [part]
    for i in range(prompt, LENGTH):
        part, cache = step(jnp.asarray(TOKENS[:, i : i + 1]), cache)
        parts.append(part)
    error = np.abs(np.concatenate(parts, 1) - logits).max()
    assert error < 0.02 * np.abs(logits).max()
