"""Trains the byte-level reference model that ships with the package.

    python -m benchmarks.train_reference --text DIR --python --export saw_int4_jax/data/reference

Six million parameters, 7000 steps in about 100 seconds on an H200. `--text` is a folder with
one subfolder for each kind of English, `--python` reads the sources installed with the interpreter;
see `benchmarks/corpus.py`, also for what keeps the held-out text out. With `--checkpoint DIR` the
state is saved as training goes, and `--resume` continues from the newest one as if there had been
no interruption. Afterwards the model is scored on text that it has not seen, through BF16, INT4 and
BDR caches, and exported as a Hugging Face directory with a model card.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import pathlib
import time
import unittest.mock
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Int
from rich.progress import Progress

from benchmarks.corpus import BOS, Corpus, add_arguments, load_corpus
from benchmarks.export_reference import export
from benchmarks.score_reference import cache_quality, corpus_rows, heldout_text, samples
from saw_int4_jax.evaluate import windows
from saw_int4_jax.models.llama import Llama, LlamaConfig
from saw_int4_jax.results import write_results
from saw_int4_jax.rope import Rope

CONFIG = LlamaConfig(
    vocab_size=257,
    embed_dim=256,
    mlp_dim=768,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    max_length=1024,
    rope=Rope(theta=10_000.0),
    norm_eps=1e-6,
    tie_embeddings=True,
)
EVALUATION_WINDOWS = 96  # of each kind, at most


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
      steps: in all; the learning rate falls to 2 % of its peak by then.
      batch: windows in a step, each as long as the model's context.
      peak: learning rate after `warmup` steps.
      scan: steps in one call of the compiled loop; divides `steps`.
      seed: of the initial weights and of what each step reads.
    """

    steps: int = 7000
    batch: int = 64
    peak: float = 3e-3
    warmup: int = 300
    scan: int = 50
    seed: int = 0

    def __post_init__(self):
        if self.steps % self.scan or self.warmup >= self.steps:
            raise ValueError(
                f"Expected {self.steps=} to be a multiple of {self.scan=} over {self.warmup=}"
            )

    def optimizer(self) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.peak, self.warmup, self.steps, end_value=0.02 * self.peak
        )

        def matrices(params):
            return jax.tree.map(lambda x: x.ndim > 1, params)

        adamw = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=matrices)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)


# --- Model --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def init_params(config: LlamaConfig, seed: int) -> Any:
    """Initial weights: Flax's, but what each layer adds to the residual stream starts small."""
    params = Llama(config).init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]

    def scale(path, x):
        if path[-2].key in ("o_proj", "down_proj"):
            return x * (2 * config.num_layers) ** -0.5
        return x * 0.02 * config.embed_dim**0.5 if path[-1].key == "embedding" else x

    return jax.tree_util.tree_map_with_path(scale, params)


def one_hot_embedding(call, arguments, keywords, context):
    """Replaces the embedding's gather by a product: the gradient of a gather is slow on GPU."""
    embed = context.module
    if not isinstance(embed, nn.Embed) or context.method_name not in ("__call__", "attend"):
        return call(*arguments, **keywords)
    rows = -embed.num_embeddings % 8  # keeps matrix units aligned
    table = jnp.pad(embed.embedding, ((0, rows), (0, 0))).astype(embed.dtype)
    if context.method_name == "attend":
        return (arguments[0] @ table.T)[..., : embed.num_embeddings]
    return jax.nn.one_hot(arguments[0], len(table), dtype=embed.dtype) @ table


def fused_attention() -> contextlib.AbstractContextManager:
    """On GPU, lets `Llama` train with cuDNN's attention: JAX's own choice is unfused."""
    if jax.default_backend() != "gpu":
        return contextlib.nullcontext()
    fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return unittest.mock.patch.object(jax.nn, "dot_product_attention", fused)


def token_nats(
    config: LlamaConfig, params: Any, tokens: Int[Array, "B T+1"]
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each token but the first, computed in bfloat16."""
    model = Llama(config, dtype=jnp.bfloat16)
    with nn.intercept_methods(one_hot_embedding), fused_attention():
        logits, _ = model.apply({"params": params}, tokens[:, :-1])
    target = jnp.arange(config.vocab_size) == tokens[:, 1:, None]  # not a gather here either
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(target, logits, 0).sum(-1)


# --- Training -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """A corpus on the device: all kinds in one array, and where each kind lies."""

    tokens: Array
    start: Array
    windows: Array
    log_share: Array

    @classmethod
    def of(cls, corpus: Corpus, length: int) -> TrainingData:
        sizes = np.array([len(tokens) for tokens in corpus.train.values()])
        share = np.array([corpus.share[kind] for kind in corpus.train])
        if sizes.min() <= length:
            raise ValueError(f"Expected {sizes=} of the kinds to exceed the context of {length=}")
        return cls(
            tokens=jnp.asarray(np.concatenate(list(corpus.train.values()))),
            start=jnp.asarray(np.cumsum(sizes) - sizes, jnp.int32),
            windows=jnp.asarray(sizes - length, jnp.int32),
            log_share=jnp.log(jnp.asarray(share, jnp.float32)),
        )

    def batch(self, key: Array, batch: int, length: int) -> Int[Array, "B length+1"]:
        """Windows from random places, each begun with BOS."""
        kind_key, place_key = jax.random.split(key)
        kind = jax.random.categorical(kind_key, self.log_share, shape=(batch,))
        place = self.start[kind] + jax.random.randint(place_key, (batch,), 0, self.windows[kind])
        text = self.tokens[place[:, None] + jnp.arange(length)].astype(jnp.int32)
        return jnp.pad(text, ((0, 0), (1, 0)), constant_values=BOS)


jax.tree_util.register_dataclass(TrainingData)


@functools.partial(jax.jit, static_argnames=("config", "recipe"), donate_argnames="state")
def train_steps(
    config: LlamaConfig,
    recipe: Recipe,
    state: dict[str, Any],
    first: Int[Array, ""],
    data: TrainingData,
) -> tuple[dict[str, Any], Float[Array, "scan"]]:
    """`recipe.scan` steps from step `first`. What a step reads depends on its number alone."""

    def step(state, number):
        key = jax.random.fold_in(jax.random.key(recipe.seed + 1), number)
        tokens = data.batch(key, recipe.batch, config.max_length)
        loss, gradient = jax.value_and_grad(
            lambda params: token_nats(config, params, tokens).mean()
        )(state["params"])
        update, optimizer = recipe.optimizer().update(gradient, state["optimizer"], state["params"])
        return {
            "params": optax.apply_updates(state["params"], update),
            "optimizer": optimizer,
        }, loss

    return jax.lax.scan(step, state, first + jnp.arange(recipe.scan))


def train(
    config: LlamaConfig,
    recipe: Recipe,
    corpus: Corpus,
    *,
    checkpoint: pathlib.Path | None = None,
    resume: bool = False,
    stop: int | None = None,
) -> tuple[Any, list[dict[str, Any]]]:
    """Trains, or goes on from the newest checkpoint with `resume`.

    Args:
      config: the model's shape.
      recipe: how to train.
      corpus: what to train on and evaluate with.
      checkpoint: folder for checkpoints, written ten times in a training and at the end.
      resume: whether to continue what is there.
      stop: the step to stop at, to be resumed later.

    Returns:
      float32 parameters, and results rows with the loss and with bits per byte of held-out text.

    Raises:
      ValueError: the checkpoint is of another recipe or corpus, or there is none to resume; or a
        kind of text is shorter than the model's context.
    """
    identity = {**dataclasses.asdict(recipe), "corpus": corpus.digest()}
    params = init_params(config, recipe.seed)
    state = {"params": params, "optimizer": recipe.optimizer().init(params)}
    state = jax.device_put(state, jax.devices()[0])  # as restored states are: one program for both
    data = TrainingData.of(corpus, config.max_length)
    step, rows = 0, []
    with contextlib.ExitStack() as stack:
        if checkpoint is not None:
            options = ocp.CheckpointManagerOptions(max_to_keep=2)
            manager = stack.enter_context(
                ocp.CheckpointManager(checkpoint.absolute(), options=options)
            )
        if resume:
            if checkpoint is None or manager.latest_step() is None:
                raise ValueError(f"Expected {checkpoint=} to hold a checkpoint to resume")
            step = manager.latest_step()
            log = manager.restore(step, args=ocp.args.Composite(log=ocp.args.JsonRestore()))["log"]
            if log["identity"] != identity:
                raise ValueError(f"Expected the checkpoint's {log['identity']} to be {identity}")
            rows = log["rows"]
            saved = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
            state = manager.restore(step, args=ocp.args.Composite(state=saved))["state"]

        progress = stack.enter_context(Progress())
        bar = progress.add_task("training", total=recipe.steps, completed=step)
        end = min(stop or recipe.steps, recipe.steps)
        every = recipe.scan * max(1, recipe.steps // recipe.scan // 10)
        start = time.perf_counter() - max((row.get("seconds", 0) for row in rows), default=0)
        while step < end:
            state, losses = train_steps(config, recipe, state, jnp.asarray(step), data)
            step += recipe.scan
            bits = float(losses.mean()) / math.log(2)
            seconds = time.perf_counter() - start
            rows.append({"op": "train", "step": step, "bits_per_byte": bits, "seconds": seconds})
            progress.update(bar, completed=step, description=f"{bits:.3f} bits/byte")
            if step % every == 0 or step >= end:
                scores = bits_per_byte(config, state["params"], corpus.held_out)
                rows += [{"op": "evaluate", "step": step, **score} for score in scores]
                if checkpoint is not None:
                    log = ocp.args.JsonSave({"identity": identity, "rows": rows})
                    saved = ocp.args.StandardSave(state)
                    manager.save(step, args=ocp.args.Composite(state=saved, log=log))
    return state["params"], rows


# --- Evaluation ---------------------------------------------------------------------------------


_token_nats = jax.jit(token_nats, static_argnums=0)


def bits_per_byte(
    config: LlamaConfig, params: Any, texts: dict[str, Int[np.ndarray, "n"]], batch: int = 32
) -> list[dict[str, Any]]:
    """A row for each text long enough: bits to encode its windows over their bytes."""
    rows = []
    for kind, tokens in texts.items():
        if len(tokens) < config.max_length:
            continue
        parts = windows(tokens, config.max_length, BOS)
        chosen = np.linspace(0, len(parts) - 1, min(len(parts), EVALUATION_WINDOWS)).astype(int)
        parts = parts[chosen]
        nats = 0.0
        for i in range(0, len(parts), batch):
            part = parts[i : i + batch]
            padded = np.pad(part, ((0, batch - len(part)), (0, 0)))
            nats += float(_token_nats(config, params, padded)[: len(part)].sum())
        size = int((parts[:, 1:] != BOS).sum())
        rows.append({"text": kind, "bytes": size, "bits_per_byte": nats / math.log(2) / size})
    return rows


# --- Command ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument(
        "--checkpoint", type=pathlib.Path, metavar="DIR", help="save the state here"
    )
    parser.add_argument("--resume", action="store_true", help="continue the newest checkpoint")
    parser.add_argument("--stop", type=int, metavar="STEP", help="stop early, to resume later")
    parser.add_argument("--export", type=pathlib.Path, metavar="DIR", help="write the model here")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    arguments = parser.parse_args()

    recipe = Recipe(
        arguments.steps,
        arguments.batch,
        warmup=min(Recipe.warmup, arguments.steps // 10),
        scan=math.gcd(Recipe.scan, arguments.steps),
        seed=arguments.seed,
    )
    corpus = load_corpus(
        arguments.text, arguments.python, arguments.text_share, arguments.megabytes
    )
    params, rows = train(
        CONFIG,
        recipe,
        corpus,
        checkpoint=arguments.checkpoint,
        resume=arguments.resume,
        stop=arguments.stop,
    )
    if not (arguments.json or arguments.export):
        return
    # Score what is exported: weights rounded to bfloat16.
    exported = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), exported)
    last = [row for row in rows if row["op"] == "train"][-1]
    tokens = last["step"] * recipe.batch * CONFIG.max_length
    run = {**dataclasses.asdict(recipe), "steps": last["step"], "seconds": last["seconds"]}
    rows += [{"op": "run", **run, "tokens": tokens}, *corpus_rows(corpus, tokens)]
    scores = bits_per_byte(CONFIG, params, corpus.held_out | heldout_text())
    rows += [{"op": "final", **score} for score in scores]
    rows += cache_quality(CONFIG, params) + samples(CONFIG, params)
    if arguments.json:
        write_results(arguments.json, rows)
    if arguments.export:
        export(arguments.export, CONFIG, exported, rows)


if __name__ == "__main__":
    main()
