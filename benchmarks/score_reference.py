"""What the reference model makes of text it has not seen, through BF16, INT4 and BDR caches."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from benchmarks.corpus import BOS, HELDOUT, Corpus
from saw_int4_jax import generate, init_cache, make_sampling
from saw_int4_jax.evaluate import evaluate, windows
from saw_int4_jax.models.llama import Llama, LlamaConfig

CACHES: tuple[dict[str, Any], ...] = (  # the model is scored through these
    dict(dtype="bf16"),
    dict(order=1),
    dict(order=16),
    dict(order=128),
    dict(order=128, rotate_v=True),
)
PROMPTS = (
    "def ",
    'import numpy as np\n\ndef softmax(x, axis=-1):\n    """',
    "Question: A baker makes 24 loaves of bread every day. ",
    "My fellow Americans, ",
    "KING HENRY:\n",
)


def heldout_text() -> dict[str, Int[np.ndarray, "n"]]:
    """The shipped held-out text by kind, as token ids without BOS."""
    return {
        f"heldout/{path.stem}": np.frombuffer(path.read_bytes(), np.uint8).astype(np.int32)
        for path in sorted(HELDOUT.glob("*.txt"))
    }


def cache_quality(config: LlamaConfig, params: Any) -> list[dict[str, Any]]:
    """Rows of what each cache does to the shipped held-out text, in float32 arithmetic."""
    specs = [config.cache_spec(1, **options) for options in CACHES]
    forward, rows = Llama(config).apply, []
    for kind, tokens in heldout_text().items():
        text = windows(tokens, config.max_length, BOS)
        with jax.default_matmul_precision("highest"):
            scores = evaluate(forward, {"params": params}, text, specs)
        for spec, score in zip(specs, scores, strict=True):
            rows.append(
                {
                    "op": "accuracy",
                    "text": kind,
                    "method": spec.method,
                    "order": spec.format.order,
                    "rotate_v": spec.rotate_v,
                    "tokens": score.tokens,
                    "bits_per_byte": score.bits_per_byte(score.tokens),
                    "kl": score.kl,
                    "top1": score.top1,
                }
            )
    return rows


def samples(config: LlamaConfig, params: Any, length: int = 320) -> list[dict[str, Any]]:
    """Rows of text that continues `PROMPTS`, drawn through a BDR cache."""
    prompts = [[BOS, *prompt.encode()] for prompt in PROMPTS]
    longest = max(map(len, prompts)) + length
    spec = config.cache_spec(len(prompts) * -(-longest // CacheSpec.page_size))
    sampling = make_sampling(len(prompts), temperature=0.7, top_p=0.95)
    result = generate(
        Llama(config, last_only=True).apply,
        {"params": params},
        prompts,
        init_cache(spec, len(prompts), longest),
        max_new_tokens=length,
        eos=[BOS],
        sampling=sampling,
        chunk=64,
    )
    texts = [
        bytes(t for t in tokens if t != BOS).decode(errors="replace") for tokens in result.tokens
    ]
    return [
        {"op": "sample", "prompt": p, "continuation": t}
        for p, t in zip(PROMPTS, texts, strict=True)
    ]


def corpus_rows(corpus: Corpus, tokens: int) -> list[dict[str, Any]]:
    """Rows of what a training of so many tokens read, how often, and from which packages."""
    kinds = [
        {
            "op": "corpus",
            "text": kind,
            "train_bytes": len(text),
            "held_out_bytes": len(corpus.held_out.get(kind, ())),
            "share": corpus.share[kind],
            "epochs": tokens * corpus.share[kind] / len(text),
        }
        for kind, text in corpus.train.items()
    ]
    packages = {
        "op": "packages",
        "names": "; ".join(corpus.packages),
        "excluded": "; ".join(corpus.excluded),
    }
    return [*kinds, packages]
