"""Writes the reference model as a Hugging Face directory, with its card and loss curve.

    python -m benchmarks.export_reference saw_int4_jax/data/reference

renews the card and the picture from the directory's `training.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import safetensors
import safetensors.flax
from jaxtyping import Array
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from saw_int4_jax.models.llama import LlamaConfig
from saw_int4_jax.results import write_results

BOS_TOKEN = "<s>"
RESULTS = "training.json"
TEMPLATE = pathlib.Path(__file__).with_name("reference_card.md")
SOURCES = {
    "gsm8k": "GSM8K, training split, `openai/grade-school-math` (MIT)",
    "tinyshakespeare": "plays of Shakespeare (public domain)",
    "us_state_union": "State of the Union, inaugural addresses, `nltk/nltk_data` (public domain)",
    "wikitext2": "WikiText-2, validation split: Wikipedia articles (CC BY-SA 3.0)",
    "python": "sources of the Python library (PSF-2.0) and of the installed packages listed below",
    "docs": "documentation in those packages",
}


def export(
    directory: pathlib.Path, config: LlamaConfig, params: Any, rows: Sequence[dict[str, Any]]
) -> None:
    """Writes weights, config, tokenizer, training log, card and picture.

    Args:
      directory: made if need be.
      config: the model's shape; without biases, QK-norm or window.
      params: bfloat16 parameters of `Llama`.
      rows: the training's results.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = hugging_face_weights(params)
    safetensors.flax.save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer = byte_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in {
        "config.json": hugging_face_config(config, tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS_TOKEN,
            "eos_token": BOS_TOKEN,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
            "model_max_length": config.max_length,
        },
    }.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    write_results(directory / RESULTS, rows)
    write_card(directory)


def hugging_face_weights(params: Any) -> dict[str, Array]:
    """`layers_0/mlp/up_proj/kernel [in, out]` → `model.layers.0.mlp.up_proj.weight [out, in]`."""
    weights = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        *modules, leaf = (key.key for key in path)
        name = ".".join(["model", *modules, "weight"]).replace("layers_", "layers.")
        weights[name] = x.T if leaf == "kernel" else x
    return weights


def hugging_face_config(config: LlamaConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """`config.json`. A document ends where the next begins, so that BOS is EOS as well."""
    bos = tokenizer.token_to_id(BOS_TOKEN)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": bos,
        "eos_token_id": bos,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def byte_tokenizer() -> Tokenizer:
    """Byte-level: the id of a byte is its value, and BOS (256) is put before every text."""
    # The byte-level alphabet writes printable bytes as themselves, the others as U+0100 onwards.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}
    vocabulary = {chr(letters[byte]): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(BOS_TOKEN, normalized=False, special=True)])
    bos = (BOS_TOKEN, tokenizer.token_to_id(BOS_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B", special_tokens=[bos]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# --- Card ---------------------------------------------------------------------------------------


def write_card(directory: pathlib.Path) -> None:
    """Writes README.md and loss.png from the directory's other files."""
    results = json.loads((directory / RESULTS).read_text())
    config = json.loads((directory / "config.json").read_text())
    weights = directory / "model.safetensors"
    with safetensors.safe_open(weights, "numpy") as tensors:
        names = tensors.keys()
        parameters = sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        rows.setdefault(row["op"], []).append(row)
    plot_loss(directory / "loss.png", rows["train"], rows.get("evaluate", []))
    final = {row["text"]: row["bits_per_byte"] for row in rows["final"]}
    run, meta = rows["run"][0], results["meta"]
    card = TEMPLATE.read_text().format(
        parameters=parameters / 1e6,
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        mlp=config["intermediate_size"],
        theta=config["rope_theta"],
        context=config["max_position_embeddings"],
        megabytes=weights.stat().st_size / 1e6,
        command="python -m benchmarks." + meta["command"].replace(".py", "", 1),
        device=meta["device"],
        jax=meta["jax"],
        date=meta["date"][:10],
        steps=run["steps"],
        batch_tokens=run["tokens"] // run["steps"],
        tokens=run["tokens"] / 1e6,
        seconds=run["seconds"],
        corpus="\n".join(
            f"| {row['text']} | {SOURCES.get(row['text'], '')} | {row['train_bytes'] / 1e6:.1f} | "
            f"{row['epochs']:.1f} | {row['share']:.0%} | {final.get(row['text'], math.nan):.3f} |"
            for row in rows["corpus"]
        ),
        heldout=" and ".join(
            f"{bits:.3f} ({text.partition('/')[2]})"
            for text, bits in final.items()
            if text.startswith("heldout/")
        ),
        packages=rows["packages"][0]["names"] or "none",
        excluded=rows["packages"][0]["excluded"] or "none",
        quality="\n".join(
            f"| {row['text'].partition('/')[2]} | {cache_name(row)} | {row['bits_per_byte']:.4f} | "
            f"{row['kl']:.4f} | {row['top1']:.1%} |"
            for row in rows["accuracy"]
        ),
        samples="\n".join(
            f"~~~~text\n{row['prompt']}{row['continuation']}\n~~~~\n" for row in rows["sample"]
        ),
    )
    (directory / "README.md").write_text(card)


def cache_name(row: dict[str, Any]) -> str:
    """BF16, INT4 or BDR, the latter with its rotation order."""
    if row["method"] != "bdr":
        return row["method"].upper()
    return f"BDR {row['order']}, {'K and V' if row['rotate_v'] else 'K'}"


def plot_loss(
    path: pathlib.Path, train: Sequence[dict[str, Any]], evaluate: Sequence[dict[str, Any]]
) -> None:
    """Draws bits per byte over training steps, of training and of held-out text."""
    from matplotlib.figure import Figure  # nothing else here needs it

    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    lines = {"training": train}
    for row in evaluate:
        lines.setdefault(row["text"], []).append(row)
    for name, rows in lines.items():
        steps, bits = [row["step"] for row in rows], [row["bits_per_byte"] for row in rows]
        style = dict(color="lightgray", zorder=0) if name == "training" else dict(marker=".")
        axes.plot(steps, bits, label=name, **style)
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0.5, 3.5), title="Held out, by kind")
    axes.legend(ncols=2)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=pathlib.Path)
    write_card(parser.parse_args().directory)


if __name__ == "__main__":
    main()
