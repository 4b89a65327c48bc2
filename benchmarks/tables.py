"""Writes the README's tables from the committed results files.

    python benchmarks/tables.py           # rewrite README.md
    python benchmarks/tables.py --check   # exit 1 if it would change

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function below.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
METHODS = {"bf16": "BF16", "int4": "INT4", "bdr": "BDR"}
TPU_FOLDERS = ("tpu_v5e", "tpu_v6e", "tpu7x")


def demo() -> str:
    """Quality and size of the bundled model's cache."""
    results = load("cpu/demo.json")
    rows = [
        [
            "as trained" if row["outlier_scale"] == 1 else f"injected, s = {row['outlier_scale']}",
            METHODS[row["method"]],
            f"{row['bits_per_byte']:.4f}",
            f"{row['kl']:.4f}" if row["method"] != "bf16" else "",
            f"{row['top1']:.1%}" if row["method"] != "bf16" else "",
            f"{row['cache_bytes_per_token']:,}",
            f"{row['tokens_per_s']:.0f}",
        ]
        for row in results["rows"]
    ]
    head = ["outlier channels", "cache", "bits/byte", "KL to BF16", "top-1", "bytes/token", "tok/s"]
    return markdown(head, rows) + caption(results, "cpu/demo.json")


def decode_step() -> str:
    """Decode step on CPU over batch and context."""
    results = load("cpu/decode_step.json")
    cells: dict[tuple, dict[str, dict]] = {}
    for row in results["rows"]:
        key = (row["batch"], row["context"], row["pool_factor"])
        cells.setdefault(key, {})[row["method"]] = row
    rows = [
        [
            str(batch),
            f"{context:,}" + (f" (pool {factor}x)" if factor > 1 else ""),
            *(f"{methods[m]['median_us'] / 1e3:.1f}" for m in METHODS),
            *(f"{methods[m]['compile_s']:.1f}" for m in METHODS),
            f"{max(r['temp_bytes'] for r in methods.values()) / 1e6:.1f}",
            f"{methods['bdr']['pool_bytes'] / 1e6:.0f}",
        ]
        for (batch, context, factor), methods in cells.items()
    ]
    head = ["batch", "context", *(f"{name} ms" for name in METHODS.values())]
    head += [*(f"compile {name} s" for name in METHODS.values()), "temp MB", "BDR pool MB"]
    return markdown(head, rows) + caption(results, "cpu/decode_step.json")


def decode_attention() -> str:
    """Decode attention on an H200 over shapes, all in one run."""
    results = load("h200/decode_attention.json")
    cells: dict[tuple[int, int], dict[str, dict]] = {}
    for row in results["rows"]:
        key = (row["batch"], row["context"])
        cells.setdefault(key, {})["peer" if row["peer"] else row["method"]] = row
    rows = [
        [
            str(batch),
            f"{context:,}",
            *(f"{shape[name]['median_us']:.1f}" for name in ("peer", *METHODS)),
            f"{shape['bdr']['fraction_of_ceiling']:.0%}",
            f"{shape['peer']['median_us'] / shape['bdr']['median_us']:.1f}x",
        ]
        for (batch, context), shape in cells.items()
    ]
    head = ["batch", "context", "cuDNN dense BF16 µs", *(f"{name} µs" for name in METHODS.values())]
    head += ["BDR of read ceiling", "against cuDNN"]
    return markdown(head, rows) + caption(results, "h200/decode_attention.json")


def write_kv() -> str:
    """Writing new tokens on an H200."""
    results = load("h200/write_kv.json")
    cells: dict[int, dict[str, dict]] = {}
    for row in results["rows"]:
        name = "bdr_kv" if row.get("rotate_v") else row["method"]
        cells.setdefault(row["tokens"], {})[name] = row
    names = {**METHODS, "bdr_kv": "BDR, K and V"}
    rows = [
        [f"{tokens:,}", *(f"{methods[name]['median_us']:.1f}" for name in names)]
        for tokens, methods in cells.items()
    ]
    return markdown(["tokens", *(f"{name} µs" for name in names.values())], rows) + caption(
        results, "h200/write_kv.json"
    )


def tpu_static() -> str:
    """The TPU compiler's estimate of decode attention, batch 8, context 8k, and JAX's kernels."""
    peers = {
        "jax_paged_attention_int8": "JAX `paged_attention`, int8",
        "jax_ragged_paged_attention_bf16": "JAX `ragged_paged_attention`, BF16",
    }
    rows = []
    for folder in TPU_FOLDERS:
        results = load(f"{folder}/static.json")
        for row in results["rows"]:
            kind = (row["kernel"], row["batch"], row["context"])
            if row["rotate_v"] or kind != ("decode_attention", 8, 8192):
                continue
            figures = ["", "", ""]
            if not row["peer"]:
                figures = [
                    f"{row['bundles']:,}",
                    f"{row['memory_cycles']:,}",
                    f"{row['margin']:.2f}",
                ]
            memory = [f"{row[name] / 1e6:.1f}" for name in ("vmem_bytes", "temp_bytes")]
            name = peers[row["method"]] if row["peer"] else METHODS[row["method"]]
            rows.append([row["chip"], name, *figures, *memory])
    head = ["chip", "cache", "instruction bundles", "memory cycles", "memory / instructions"]
    head += ["VMEM MB", "temporary MB"]
    return markdown(head, rows) + caption(results, "tpu7x/static.json")


def tpu_rotation() -> str:
    """What the rotation adds to a TPU kernel's instructions: BDR over INT4."""
    cells: dict[tuple, dict[str, dict[str, int]]] = {}
    for folder in TPU_FOLDERS:
        results = load(f"{folder}/static.json")
        for row in results["rows"]:
            if row["peer"] or row["rotate_v"]:
                continue
            key = (row["kernel"], row["batch"], row["context"], row["tokens"])
            cells.setdefault(key, {}).setdefault(folder, {})[row["method"]] = row["bundles"]
    rows = [
        [
            kernel,
            str(batch),
            f"{context:,}" if context else "",
            str(tokens),
            *(f"{chips[f]['bdr'] / chips[f]['int4'] - 1:+.1%}" for f in TPU_FOLDERS),
        ]
        for (kernel, batch, context, tokens), chips in cells.items()
    ]
    head = ["kernel", "batch", "context", "new tokens", "v5e", "v6e", "tpu7x"]
    return markdown(head, rows) + caption(results, "tpu7x/static.json")


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "decode_attention": decode_attention,
    "write_kv": write_kv,
    "tpu_static": tpu_static,
    "tpu_rotation": tpu_rotation,
    "decode_step": decode_step,
}


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def caption(results: dict, name: str) -> str:
    meta = results["meta"]
    return (
        f"\n`{meta['command']}`, {meta['device']}, Python {meta['python']}, jax {meta['jax']}, "
        f"{meta['date'][:10]}; [raw](benchmarks/results/{name}).\n"
    )


def render(text: str) -> str:
    """README text with every table made anew."""

    def table(match: re.Match) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    check = arguments.parse_args().check
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = render(old)
    if check:
        sys.exit(0 if new == old else "README.md is stale: run python benchmarks/tables.py")
    readme.write_text(new)


if __name__ == "__main__":
    main()
