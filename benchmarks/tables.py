"""Writes the tables of README.md and docs/ from the committed results files.

    python benchmarks/tables.py           # rewrite the pages
    python benchmarks/tables.py --check   # exit 1 if one would change, and name it

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function below.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
METHODS = {"bf16": "BF16", "int4": "INT4", "bdr": "BDR"}
TPU_FOLDERS = ("tpu_v5e", "tpu_v6e", "tpu7x")
DECODE, MOSAIC = "h200/decode_attention.json", "h200/decode_attention_mosaic.json"


def summary() -> str:
    """What a stranger wants to know: size, quality and time of the three caches."""
    rows = [["bits a value (head dimension 128)", "16", "4.25", "4.25"]]
    scores = {(r["outlier_scale"], r["method"]): r for r in load("cpu/demo.json")["rows"]}
    for scale, keys in ((1, "as trained"), (16, "one key channel pair 16 times larger")):
        kl = [scores[scale, method]["kl"] for method in METHODS]
        rows.append([f"KL to BF16, bundled 6 M model, {keys}", *(f"{x:.4f}" for x in kl)])
    files = ["cpu/demo.json", DECODE, MOSAIC, "h200/write_kv.json", "h200/decode_step.json"]
    triton, mosaic, writing, steps = (load(name)["rows"] for name in files[1:])
    here = dict(batch=32, context=8192, q_heads=32, kv_heads=8, head_dim=128, ragged=False)
    rows.append(
        ["decode attention, H200, 32 sequences of 8k tokens, µs"]
        + [
            f"{fastest(rows, method=m, peer=False, **here):.0f}" if rows else "not timed"
            for m, rows in (("bf16", triton), ("int4", None), ("bdr", mosaic))
        ]
    )
    rows.append(
        ["writing 8192 tokens to one layer, H200, µs"]
        + [
            f"{fastest(writing, method=m, op='write_kv', tokens=8192, rotate_v=False):.1f}"
            for m in METHODS
        ]
    )
    rows.append(
        ["decode step of Qwen3-8B's shape, H200, 64 sequences of 4k tokens, ms"]
        + [f"{fastest(steps, method=m, batch=64, context=4096) / 1e3:.1f}" for m in METHODS]
    )
    raw = ", ".join(f"[{name}](benchmarks/results/{name})" for name in files)
    return markdown(["", *METHODS.values()], rows) + f"\nFrom {raw}.\n"


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


def decode_step_gpu() -> str:
    """Decode step of a whole model on an H200 over batch and context."""
    results = load("h200/decode_step.json")
    cells: dict[tuple[int, int], dict[str, dict]] = {}
    for row in results["rows"]:
        cells.setdefault((row["batch"], row["context"]), {})[row["method"]] = row
    rows = [
        [
            str(batch),
            f"{context:,}",
            *(f"{here[m]['median_us'] / 1e3:.2f}" if m in here else "no room" for m in METHODS),
            f"{here['bdr']['tokens_per_s']:,.0f}",
            f"{here['bdr']['median_us'] / here['int4']['median_us'] - 1:+.1%}",
            f"{here['bf16']['median_us'] / here['bdr']['median_us']:.2f}x"
            if "bf16" in here
            else "",
        ]
        for (batch, context), here in sorted(cells.items())
        if {"int4", "bdr"} <= here.keys()
    ]
    head = ["batch", "context", *(f"{name} ms" for name in METHODS.values())]
    head += ["BDR tokens/s", "BDR over INT4", "BF16 over BDR"]
    return markdown(head, rows) + caption(results, "h200/decode_step.json")


def decode_attention() -> str:
    """Decode attention on an H200 over shapes: Triton in one run, Mosaic GPU in another."""
    results, mosaic = load(DECODE), load(MOSAIC)
    default = {(row["batch"], row["context"]): row for row in mosaic["rows"]}
    cells: dict[tuple[int, int], dict[str, dict]] = {}
    for row in results["rows"]:
        key = (row["batch"], row["context"])
        name = row["implementation"] if row["peer"] else row["method"]
        cells.setdefault(key, {})[name] = row
    rows = [
        [
            str(batch),
            f"{context:,}",
            *(f"{shape[name]['median_us']:.1f}" for name in ("cudnn", *METHODS)),
            f"{shape['bdr']['fraction_of_ceiling']:.0%}",
            *(
                [
                    f"{best['median_us']:.1f}",
                    f"{best['fraction_of_ceiling']:.0%}",
                    f"{shape['cudnn']['median_us'] / best['median_us']:.1f}x",
                ]
                if (best := default.get((batch, context)))
                else ["", "", ""]
            ),
        ]
        for (batch, context), shape in cells.items()
    ]
    head = ["batch", "context", "cuDNN dense BF16 µs", *(f"{name} µs" for name in METHODS.values())]
    head += ["of ceiling", "BDR, Mosaic GPU µs", "of ceiling", "against cuDNN"]
    return markdown(head, rows) + caption(results, DECODE) + caption(mosaic, MOSAIC)


def decode_ragged() -> str:
    """Decode attention on an H200 where every second sequence has a tenth of the context."""
    results = load("h200/decode_attention_ragged.json")
    cells: dict[tuple[int, int], dict[str, dict]] = {}
    for row in results["rows"]:
        cells.setdefault((row["batch"], row["context"]), {})[row["method"]] = row
    rows = [
        [
            str(batch),
            f"{context:,}",
            *(f"{here[name]['median_us']:.1f}" for name in METHODS),
            f"{here['bdr']['fraction_of_ceiling']:.0%}",
        ]
        for (batch, context), here in cells.items()
    ]
    head = ["batch", "context", *(f"{name} µs" for name in METHODS.values()), "BDR of ceiling"]
    return markdown(head, rows) + caption(results, "h200/decode_attention_ragged.json")


def prefill() -> str:
    """Prefill over packed pages on an H200, beside cuDNN over dense keys and values."""
    results = load("h200/prefill.json")
    cells: dict[tuple[int, int], dict[str, float]] = {}
    for row in results["rows"]:
        name = row["method"] if row["implementation"] == "triton" else row["implementation"]
        shape = row["tokens"], row["context"] - row["tokens"]
        cells.setdefault(shape, {})[name] = row["median_us"]
    names = {
        "cudnn": "cuDNN dense BF16, the same mask, µs",
        "unmasked": "cuDNN without a mask µs",
        "bf16": "BF16 pages µs",
        "bdr": "BDR µs",
    }
    rows = [
        [f"{tokens:,}", f"{history:,}", *(f"{here[name]:,.0f}" for name in names)]
        for (tokens, history), here in cells.items()
    ]
    return markdown(["new tokens", "history", *names.values()], rows) + caption(
        results, "h200/prefill.json"
    )


def write_kv() -> str:
    """Writing new tokens on an H200."""
    results = load("h200/write_kv.json")
    cells: dict[int, dict[str, dict]] = {}
    for row in results["rows"]:
        name = "bdr_kv" if row.get("rotate_v") else row["method"]
        if row["op"] == "write_qkv":
            name = "fused" if row["implementation"] == "triton" else "unfused"
        cells.setdefault(row["tokens"], {})[name] = row
    names = {**METHODS, "bdr_kv": "BDR, K and V"}
    if any(row["op"] == "write_qkv" for row in results["rows"]):
        names |= {"fused": "BDR with QK-norm and RoPE", "unfused": "the same, these by XLA"}
    rows = [
        [
            f"{tokens:,}",
            *(f"{methods[name]['median_us']:.1f}" if name in methods else "" for name in names),
        ]
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
            if row["page_size"] != 128:
                name += f", pages of {row['page_size']}"
            if row["float8"]:
                name += ", codes as float8"
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
            if row["peer"] or row["rotate_v"] or row["float8"] or row["page_size"] != 128:
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


# --- Serving ----------------------------------------------------------------------------------


def serve(file: str = "h200/serve.json", pool: int = 0) -> str:
    """Jobs of one pool size over concurrency; `pool` counts from the largest."""
    results = load(file)
    found = [row for row in results["rows"] if row["op"] == "serve"]
    sizes = sorted({round(row["pool_bytes"] / 1e9) for row in found}, reverse=True)
    cells: dict[tuple, dict[str, dict]] = {}
    for row in found:
        if round(row["pool_bytes"] / 1e9) == sizes[pool]:
            key = (row["prompt_tokens"], row["new_tokens"], row["concurrency"], row["run"])
            cells.setdefault(key, {})[row["method"]] = row

    def each(methods: dict[str, dict], name: str, digits: int, scale: float = 1) -> str:
        values = (methods[method][name] / scale for method in METHODS if method in methods)
        return " / ".join(f"{value:,.{digits}f}" for value in values)

    rows = [
        [
            f"D({prompt:,}, {new:,})",
            str(concurrency),
            run,
            each(methods, "tokens_per_s", 0),
            *(
                f"{methods['bdr']['tokens_per_s'] / methods[other]['tokens_per_s']:.2f}x"
                for other in ("bf16", "int4")
            ),
            each(methods, "request_tokens_per_s", 1),
            each(methods, "ttft_ms", 1, 1e3),
            each(methods, "e2e_s", 1),
            each(methods, "e2e_s_p75", 1),
            each(methods, "e2e_s_p90", 1),
        ]
        for (prompt, new, concurrency, run), methods in sorted(cells.items())
        if len(methods) == len(METHODS)
    ]
    head = ["requests", "at once", "run", "tokens/s of the job", "BDR to BF16", "to INT4"]
    head += ["tokens/s of a request", "TTFT s", "E2E s", "p75", "p90"]
    words = f"Pools of {sizes[pool]} GB; figures are BF16 / INT4 / BDR.\n\n"
    return words + markdown(head, rows) + caption(results, file)


# --- Accuracy ---------------------------------------------------------------------------------

ACCURACY = "accuracy/reference.json"
OUTLIERS = "accuracy/reference_outliers.json"  # three methods on ten times the text
STORIES = "accuracy/stories260k.json"

Scores = dict[int, dict[str, dict]]  # by outlier scale and method


def accuracy_scores(results: dict) -> Scores:
    scores: Scores = {}
    for row in results["rows"]:
        if row["op"] == "accuracy":
            scores.setdefault(row["outlier_scale"], {})[row["method"]] = row
    return dict(sorted(scores.items()))


def removed(scores: Scores, method: str, scale: int) -> tuple[float, float] | None:
    """Share of the KL that outliers add to plain INT4 which they do not add to a method.

    With its standard error, bootstrapped over windows, which all methods share; `None` where what
    they add to INT4 is within two standard errors of nothing.
    """
    windows = {
        (name, s): np.array(scores[s][name]["kl_windows"])
        for name in ("int4", method)
        for s in (1, scale)
    }
    count = len(windows["int4", 1])
    draws = np.random.default_rng(0).integers(0, count, (1000, count))
    drawn = {key: x[draws].mean(1) for key, x in windows.items()}
    to_int4, to_method = (drawn[name, scale] - drawn[name, 1] for name in ("int4", method))
    if to_int4.mean() < 2 * to_int4.std():
        return None
    plain = {key: x.mean() for key, x in windows.items()}
    share = 1 - (plain[method, scale] - plain[method, 1]) / (
        plain["int4", scale] - plain["int4", 1]
    )
    return float(share), float((1 - to_method / to_int4).std())


def share_text(share: tuple[float, float] | None) -> str:
    return "INT4 loses nothing" if share is None else f"{share[0]:.0%} ± {100 * share[1]:.0f}"


def everywhere(scores: Scores) -> list[str]:
    """The methods measured with and without outliers, in order."""
    return [m for m in scores[1] if all(m in methods for methods in scores.values())]


def accuracy() -> str:
    """All methods on the bundled model, as it is and with outliers."""
    results = load(ACCURACY)
    scores = accuracy_scores(results)
    rows = []
    for name, row in scores[1].items():
        outlier = scores[16].get(name)
        rows.append(
            [
                f"`{name}`",
                row["about"],
                "kernels" if row["kernels"] else "simulated",
                f"{row['bits_per_value']:.2f}",
                f"{row['bits_per_value_32k']:.2f}",
                f"{row['bits_per_byte']:.4f}",
                f"{row['kl']:.5f} ± {row['kl_se']:.5f}",
                *(
                    (
                        f"{outlier['kl']:.5f} ± {outlier['kl_se']:.5f}",
                        f"{outlier['kl_p99']:.3f}",
                        f"{outlier['top1']:.1%}",
                        f"{outlier['recall']:.0%}",
                        f"{outlier['diverged_at']:.0f}",
                        f"{outlier['attention_error']:.3f}",
                    )
                    if outlier
                    else [""] * 6
                ),
            ]
        )
    head = ["method", "what", "run by", "bits/value", "at 32k", "bits/byte", "KL"]
    head += ["KL, s = 16", "p99", "top-1", "recall", "diverges at", "attention error"]
    return markdown(head, rows) + caption(results, ACCURACY)


def accuracy_serving() -> str:
    """What each method keeps of serving, and what its calibration takes."""
    results = load(ACCURACY)
    rows = [
        [
            f"`{name}`",
            row["paging"],
            row["regular"],
            row["fused"],
            f"{row['calibration_tokens']:,} tokens, {row['calibration_s']:.1f} s"
            if row["calibration_tokens"]
            else "none",
        ]
        for name, row in accuracy_scores(results)[1].items()
    ]
    head = ["method", "paging", "regular access", "fused attention", "calibration"]
    return markdown(head, rows) + caption(results, ACCURACY)


def accuracy_outliers() -> str:
    """KL by strength of the injected outliers, and what share of what they add is removed."""
    results = load(ACCURACY)
    scores = accuracy_scores(results)
    wanted = "int4", "bdr-16", "bdr-64", "bdr", "bdr-kv", "balanced", "balanced-kv"
    names = [name for name in wanted if name in everywhere(scores)]
    rows = [
        [
            "as trained" if scale == 1 else f"injected, s = {scale}",
            *(f"{methods[name]['kl']:.5f}" for name in names),
            *("" if scale == 1 else share_text(removed(scores, n, scale)) for n in names[1:]),
        ]
        for scale, methods in scores.items()
    ]
    head = ["key outliers", *(f"`{n}`" for n in names), *(f"removed by `{n}`" for n in names[1:])]
    return markdown(head, rows) + caption(results, ACCURACY)


def accuracy_context() -> str:
    """KL of the tokens in the second half of each context length, with outliers."""
    results = load(ACCURACY)
    cells: dict[str, dict[int, float]] = {}
    for row in results["rows"]:
        if row["op"] == "accuracy_by_context" and row["outlier_scale"] == 16:
            cells.setdefault(row["method"], {})[row["context"]] = row["kl"]
    names = [m for m in ("int4", "bdr-16", "bdr", "bdr-kv", "window", "kivi") if m in cells]
    contexts = sorted(cells[names[0]])
    rows = [[f"`{n}`", *(f"{cells[n][context]:.5f}" for context in contexts)] for n in names]
    return markdown(["method", *(f"{n} tokens" for n in contexts)], rows) + caption(
        results, ACCURACY
    )


def accuracy_stories() -> str:
    """The same on stories260K, a model with head dimension 8."""
    results = load(STORIES)
    scores = accuracy_scores(results)
    names = everywhere(scores)
    rows = [
        [
            "as trained" if scale == 1 else f"injected, s = {scale}",
            *(f"{methods[name]['kl']:.4f}" for name in names),
        ]
        for scale, methods in scores.items()
    ]
    return markdown(["key outliers", *(f"`{n}`" for n in names)], rows) + caption(results, STORIES)


def accuracy_words() -> str:
    """What the figures say."""
    scores = accuracy_scores(load(ACCURACY))
    plain, outlier = scores[1], scores[16]
    kl = {name: (plain[name]["kl"], outlier[name]["kl"]) for name in plain if name in outlier}
    longer = accuracy_scores(load(OUTLIERS))
    shares = {
        s: share
        for s, methods in longer.items()
        if s > 1 and "bdr" in methods and (share := removed(longer, "bdr", s))
    }
    listed = ", ".join(f"{share_text(share)} (s = {scale})" for scale, share in shares.items())
    least = min(share for share, _ in shares.values())
    verdict = "at every strength at least" if least >= 0.9 else "not at every strength"
    lines = [
        f"**How much of INT4's loss does BDR recover?** Of the KL that outliers add to plain INT4, "
        f"BDR removes {listed}, over {longer[1]['bdr']['tokens']:,} tokens in windows of "
        f"{longer[1]['bdr']['context']:,} ([raw](benchmarks/results/{OUTLIERS})): {verdict} the "
        f"90 % aimed at, and least where INT4 loses little. Of INT4's whole KL at s = 16, "
        f"{1 - kl['bdr'][1] / kl['int4'][1]:.0%}; of that without outliers, "
        f"{1 - kl['bdr'][0] / kl['int4'][0]:.0%}.",
        f"**Order.** With outliers, order 16 leaves {kl['bdr-16'][1] / kl['bdr'][1]:.1f} times the "
        f"KL of the full order, without them {kl['bdr-16'][0] / kl['bdr'][0]:.1f} times.",
        f"**Rotating values too** changes the KL by {kl['bdr-kv'][0] / kl['bdr'][0] - 1:+.0%} "
        f"without outliers, {kl['bdr-kv'][1] / kl['bdr'][1] - 1:+.0%} with; "
        f"**random signs** by {kl['signed'][0] / kl['bdr'][0] - 1:+.0%} and "
        f"{kl['signed'][1] / kl['bdr'][1] - 1:+.0%}; **32-bit scales** instead of 16, which cost "
        f"{32 / 128:.2f} bits a value, by {kl['bdr-fp32'][0] / kl['bdr'][0] - 1:+.0%} and "
        f"{kl['bdr-fp32'][1] / kl['bdr'][1] - 1:+.0%}.",
        "**What the complex methods add**, as KL over BDR's, without and with outliers: "
        + "; ".join(
            f"`{name}` {kl[name][0] / kl['bdr'][0]:.2f} and {kl[name][1] / kl['bdr'][1]:.2f}"
            for name in ("kmeans-bdr", "vq-bdr", "hessian-bdr", "gptq-bdr", "covariance")
            if name in kl
        )
        + '. In KL that is more than the paper\'s "only a little" where the figure is well below '
        "one; in bits per byte BDR loses "
        f"{plain['bdr']['bits_per_byte'] - plain['bf16']['bits_per_byte']:.4f} to BF16 to begin "
        "with, and that is all there is to gain.",
    ]
    if "balanced" in kl:
        left = {s: removed(scores, "balanced", s) for s in scores if s > 1}
        lines.append(
            "**What is free**: bringing the channels of queries and keys to one size from the "
            "weights alone, by powers of two, before BDR (`rotation.balance_keys`; `saw-int4 "
            "generate` and `serve` do it to every model). The logits keep every bit, nothing is "
            "calibrated, no kernel changes. Of what injected outliers add it removes "
            + ", ".join(f"{share_text(x)} (s = {s})" for s, x in left.items() if x)
            + ": such an outlier is a matter of units, which it puts right. Without outliers it "
            f"leaves {kl['balanced'][0] / kl['bdr'][0]:.2f} of BDR's KL here."
        )
    if "centered-bdr" in kl:
        lines.append(
            "**What is cheap and serves**: subtracting each channel's calibration mean before BDR "
            f"leaves {kl['centered-bdr'][0] / kl['bdr'][0]:.2f} and "
            f"{kl['centered-bdr'][1] / kl['bdr'][1]:.2f} of its KL, and nothing has to be read "
            "for it (the kernels do not take it yet)."
        )
    lines.append(
        "**Where BDR does not suffice**: it spreads an outlier over a vector, it does not remove "
        f"it. At s = {max(scores)} it leaves "
        f"{scores[max(scores)]['bdr']['kl'] / plain['bdr']['kl']:.1f} times its KL without "
        "outliers, and the Hessian's diagonal, which undoes such an outlier exactly, is better: an "
        "injected outlier is a diagonal, so this comparison flatters it."
    )
    return "\n\n".join(lines) + "\n"


def scaling_files() -> list[str]:
    """Measured decode steps on several devices, one file for each kind and number of them."""
    found = [
        path
        for name in ("parallel_decode.json", "parallel_decode_32b.json")
        for path in sorted(RESULTS.glob(f"*-x[0-9]*/{name}"))
    ]
    return [str(path.relative_to(RESULTS)) for path in found]


def scaling() -> str:
    """Decode step on several devices against one of the same machine."""
    tables = []
    for name in scaling_files():
        results = load(name)
        rows = [r for r in results["rows"] if "step_us" in r and "superseded" not in r]
        speed = {
            (r["parallel"], r["method"], r["batch"], r["context"]): r["tokens_per_s"] for r in rows
        }
        lines = []
        for row in rows:
            key = row["method"], row["batch"], row["context"]
            one = speed.get(("one", *key))
            several = row["devices"] > 1
            pieces = [row.get(f"{piece}_us") for piece in ("attention", "collectives")]
            # Both are the layers' alone; what is left has the embedding and the logits in it.
            layers = row["model_layers"] / row["layers"] / 1e3
            pieces = [None if piece is None else piece * layers for piece in pieces]
            lines.append(
                [
                    str(row["batch"]),
                    f"{row['context']:,}",
                    METHODS[row["method"]],
                    f"{row['devices']}, {row['parallel']}" if several else "1",
                    f"{row['step_us'] / 1e3:.2f}",
                    f"{row['tokens_per_s']:,.0f}",
                    efficiency(row, one) if several else "",
                    *("" if piece is None else f"{piece:.2f}" for piece in pieces),
                ]
            )
        lines.sort(key=lambda x: (int(x[0]), int(x[1].replace(",", "")), x[3], x[2]))
        head = ["batch", "context", "cache", "GPUs", "step ms", "tokens/s", "efficiency"]
        head += ["attention ms", "collectives ms"]
        row = rows[0]
        about = (
            f"{row['model']}, random weights; {row['layers']} of its {row['model_layers']} layers "
            "were timed, the step of all is extrapolated.\n\n"
        )
        tables.append(about + markdown(head, lines) + caption(results, name))
    return "\n".join(tables)


def efficiency(row: dict, tokens_per_s: float | None) -> str:
    """Speed over that of as many separate devices."""
    if tokens_per_s is None:
        return ""
    return f"{row['tokens_per_s'] / tokens_per_s / row['devices']:.0%}"


def plan() -> str:
    """Estimates for larger models on more devices."""
    results = load("plan/h200.json")
    cells: dict[tuple[str, int], dict[str, dict]] = {}
    for row in results["rows"]:
        cells.setdefault((row["model"], row["devices"]), {})[row["method"]] = row
    lines = []
    for (model, devices), methods in cells.items():
        fitting = [r for r in methods.values() if r["fits"]]
        splits = dict.fromkeys(f"{r['tensor']} x {r['data']}" for r in fitting)
        lines.append(
            [
                model,
                str(devices),
                " / ".join(splits),
                f"{methods['bdr']['weight_gb_per_device']:.0f}",
                *(f"{methods[m]['most_sequences']:,}" for m in ("bf16", "bdr")),
                *(
                    f"{r['step_us'] / 1e3:.1f} ({r['tokens_per_s']:,.0f})" if r["fits"] else "–"
                    for r in (methods[m] for m in METHODS)
                ),
            ]
        )
    head = ["model", "GPUs", "tensor x data", "weights GB/GPU", "BF16 sequences", "INT4 sequences"]
    head += [f"{name} ms (tokens/s)" for name in METHODS.values()]
    row = results["rows"][0]
    basis = (
        f"\n**Estimates, not measurements**: {row['batch']} sequences of {row['context']:,} tokens "
        f"for each GPU, {row['memory_gb']:.0f} GB a GPU. Weights at {row['weights_gb_per_s']:,.0f} "
        f"GB/s ({row['weights_from']}), attention as measured in "
        "[decode_attention.json](benchmarks/results/h200/decode_attention.json), an all-reduce "
        f"{row['latency_us']:.0f} µs and {row['link_gb_per_s']:.0f} GB/s ({row['link_from']}).\n"
    )
    return markdown(head, lines) + basis + caption(results, "plan/h200.json")


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "demo": demo,
    "decode_attention": decode_attention,
    "decode_ragged": decode_ragged,
    "prefill": prefill,
    "serve": serve,
    "write_kv": write_kv,
    "tpu_static": tpu_static,
    "tpu_rotation": tpu_rotation,
    "decode_step": decode_step,
    "decode_step_gpu": decode_step_gpu,
    "scaling": scaling,
    "plan": plan,
    "accuracy": accuracy,
    "accuracy_serving": accuracy_serving,
    "accuracy_outliers": accuracy_outliers,
    "accuracy_context": accuracy_context,
    "accuracy_words": accuracy_words,
    "accuracy_stories": accuracy_stories,
}


def fastest(rows: Sequence[dict], **having: object) -> float:
    """The least median of the rows that have these values, in µs."""
    return min(r["median_us"] for r in rows if all(r[key] == x for key, x in having.items()))


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


def pages() -> list[pathlib.Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(page: pathlib.Path) -> str:
    """A page's text with every table made anew."""
    up = "../" * len(page.relative_to(ROOT).parents[:-1])

    def table(match: re.Match) -> str:
        text = TABLES[match[2]]().replace("](benchmarks/", f"]({up}benchmarks/")
        return f"{match[1]}\n{text}{match[3]}"

    marked = r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)"
    return re.sub(marked, table, page.read_text(), flags=re.DOTALL)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    check = arguments.parse_args().check
    stale = {page: text for page in pages() if (text := render(page)) != page.read_text()}
    if check and stale:
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        sys.exit(f"Stale: {names}. Run python benchmarks/tables.py")
    for page, text in stale.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
