"""Writes the tables of README.md and docs/ from the committed results files.

    python benchmarks/tables.py           # rewrite the pages
    python benchmarks/tables.py --check   # exit 1 if one would change, and name it

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function below. A row of
one is a string with bars between its cells, as in Markdown.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import pathlib
import re
import sys
from collections.abc import Callable, Iterable

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
METHODS = {"bf16": "BF16", "int4": "INT4", "bdr": "BDR"}
TPU_FOLDERS = ("tpu_v5e", "tpu_v6e", "tpu7x")
DECODE = "h200/decode_attention.json"
ACCURACY = "accuracy/reference.json"
OUTLIERS = "accuracy/reference_outliers.json"  # three methods on ten times the text
STORIES = "accuracy/stories260k.json"


# --- Results files and Markdown ---------------------------------------------------------------


@functools.cache
def load(file: str) -> dict:
    return json.loads((RESULTS / file).read_text())


def rows_of(file: str, **having: object) -> list[dict]:
    """The rows of a file that have these values."""
    return [r for r in load(file)["rows"] if all(r.get(key) == x for key, x in having.items())]


def cells(rows: Iterable[dict], *keys: str, column: str | Callable[[dict], str] = "method") -> dict:
    """Rows by their values of `keys` (a tuple of them if there are several), then by `column`."""
    key = operator.itemgetter(*keys)
    name = column if callable(column) else operator.itemgetter(column)
    table: dict = {}
    for row in rows:
        table.setdefault(key(row), {})[name(row)] = row
    return table


def join(texts: Iterable[str]) -> str:
    return " | ".join(texts)


def each(words: str) -> str:
    """Headings of the three caches: `words` with their names for `{}`."""
    return join(words.format(name) for name in METHODS.values())


def medians(
    here: dict[str, dict], names: Iterable[str], form: str = ".1f", us: float = 1, none: str = ""
) -> str:
    """The median times of the named rows, in units of `us` microseconds."""
    return join(format(here[n]["median_us"] / us, form) if n in here else none for n in names)


def markdown(head: str, rows: Iterable[str], *files: str) -> str:
    """A table, and under it where each of the results files it is made from comes from."""
    lines = [head, join(["---"] * len(head.split(" | "))), *rows]
    return "".join(f"| {line} |\n" for line in lines) + "".join(map(caption, files))


def caption(file: str) -> str:
    meta = load(file)["meta"]
    return (
        f"\n`{meta['command']}`, {meta['device']}, Python {meta['python']}, jax {meta['jax']}, "
        f"{meta['date'][:10]}; [raw](benchmarks/results/{file}). {meta.get('note', '')}".rstrip()
        + "\n"
    )


# --- Overview ---------------------------------------------------------------------------------


def summary() -> str:
    """What a stranger wants to know: size, quality and time of the three caches."""
    demo, write, step = "cpu/demo.json", "h200/write_kv.json", "h200/decode_step.json"
    serve = "h200/serve.json"

    def fastest(file: str, method: str, form: str, us: float = 1, **having: object) -> str:
        rows = rows_of(file, method=method, **having)
        return format(min(row["median_us"] for row in rows) / us, form)

    def three(file: str, form: str, us: float = 1, **having: object) -> str:
        return join(fastest(file, method, form, us, **having) for method in METHODS)

    def kl(scale: int) -> str:
        scores = cells(rows_of(demo), "outlier_scale")[scale]
        return join(f"{scores[method]['kl']:.4f}" for method in METHODS)

    decoding = medians(
        decode_shapes("batch", "context", ragged=False)[32, 8192],
        ("triton bf16", "mosaic_gpu int4", "mosaic_gpu bdr"),
        ".0f",
    )
    jobs = rows_of(serve, prompt_tokens=256, new_tokens=1024, concurrency=256, layers=36)
    serving = join(f"{row['tokens_per_s']:,.0f}" for row in jobs)
    rows = [
        "bits a value (head dimension 128) | 16 | 4.25 | 4.25",
        f"KL to BF16, bundled 6 M model, as trained | {kl(1)}",
        f"KL to BF16, bundled 6 M model, one key channel pair 16 times larger | {kl(16)}",
        f"decode attention, H200, 32 sequences of 8k tokens, µs | {decoding}",
        "writing 8192 tokens to one layer, H200, µs | "
        + three(write, ".1f", op="write_kv", tokens=8192, rotate_v=False),
        "decode step of Qwen3-8B's shape, H200, 64 sequences of 4k tokens, ms | "
        + three(step, ".1f", us=1e3, batch=64, context=4096),
        f"serving it on an H200, 256 requests of 256 + 1024 tokens at once, tokens/s | {serving}",
    ]
    files = demo, DECODE, write, step, serve
    raw = ", ".join(f"[{file}](benchmarks/results/{file})" for file in files)
    return markdown(f" | {each('{}')}", rows) + f"\nFrom {raw}.\n"


def demo() -> str:
    """Quality and size of the bundled model's cache."""
    file = "cpu/demo.json"
    rows = [
        f"{injected(row['outlier_scale'])} | {METHODS[row['method']]} | {row['bits_per_byte']:.4f}"
        + (" |  | " if row["method"] == "bf16" else f" | {row['kl']:.4f} | {row['top1']:.1%}")
        + f" | {row['cache_bytes_per_token']:,} | {row['tokens_per_s']:.0f}"
        for row in rows_of(file)
    ]
    head = "outlier channels | cache | bits/byte | KL to BF16 | top-1 | bytes/token | tok/s"
    return markdown(head, rows, file)


def injected(scale: int) -> str:
    return "as trained" if scale == 1 else f"injected, s = {scale}"


# --- One device -------------------------------------------------------------------------------


def decode_step() -> str:
    """Decode step on CPU over batch and context."""
    file, rows = "cpu/decode_step.json", []
    shapes = cells(rows_of(file), "batch", "context", "pool_factor")
    for (batch, context, factor), here in shapes.items():
        pool = f" (pool {factor}x)" if factor > 1 else ""
        compiling = join(f"{here[method]['compile_s']:.1f}" for method in METHODS)
        temporary = max(row["temp_bytes"] for row in here.values())
        rows.append(
            f"{batch} | {context:,}{pool} | {medians(here, METHODS, us=1e3)} | {compiling}"
            f" | {temporary / 1e6:.1f} | {here['bdr']['pool_bytes'] / 1e6:.0f}"
        )
    head = f"batch | context | {each('{} ms')} | {each('compile {} s')} | temp MB | BDR pool MB"
    return markdown(head, rows, file)


def decode_step_gpu() -> str:
    """Decode step of a whole model on an H200 over batch and context."""
    file, rows = "h200/decode_step.json", []
    for (batch, context), here in sorted(cells(rows_of(file), "batch", "context").items()):
        us = {method: row["median_us"] for method, row in here.items()}
        if {"int4", "bdr"} <= us.keys():
            rows.append(
                f"{batch} | {context:,} | {medians(here, METHODS, '.2f', 1e3, none='no room')}"
                f" | {here['bdr']['tokens_per_s']:,.0f} | {us['bdr'] / us['int4'] - 1:+.1%} | "
                + (f"{us['bf16'] / us['bdr']:.2f}x" if "bf16" in us else "")
            )
    head = f"batch | context | {each('{} ms')} | BDR tokens/s | BDR over INT4 | BF16 over BDR"
    return markdown(head, rows, file)


def decode_shapes(*keys: str, file: str = DECODE, **having: object) -> dict[tuple, dict[str, dict]]:
    """Decode attention by `keys`, then by implementation and method."""

    def name(row: dict) -> str:
        return f"{row['implementation']} {row['method']}"

    return cells(rows_of(file, **having), *keys, column=name)


def share(here: dict[str, dict], name: str) -> str:
    return f"{here[name]['fraction_of_ceiling']:.0%}" if name in here else ""


def decode_attention(*, ragged: bool = False) -> str:
    """Decode attention on an H200 over shapes: by Triton, and by Mosaic GPU."""
    triton = [f"triton {method}" for method in METHODS]
    mosaic = ["mosaic_gpu int4", "mosaic_gpu bdr"]
    rows = []
    for (batch, context), here in decode_shapes("batch", "context", ragged=ragged).items():
        gain = here["cudnn bf16"]["median_us"] / min(
            here[n]["median_us"] for n in here if "bdr" in n
        )
        rows.append(
            f"{batch} | {context:,} | {medians(here, ['cudnn bf16', *triton])}"
            f" | {share(here, triton[-1])} | {medians(here, mosaic)} | {share(here, mosaic[-1])}"
            f" | {gain:.1f}x"
        )
    head = f"batch | context | cuDNN dense BF16 µs | {each('{} µs')} | of ceiling"
    head += " | INT4, Mosaic GPU µs | BDR, Mosaic GPU µs | of ceiling | BDR to cuDNN"
    return markdown(head, rows, DECODE)


def decode_ragged() -> str:
    """The same where every second sequence has a tenth of the context."""
    return decode_attention(ragged=True)


def decode_heads() -> str:
    """BDR over numbers of query and KV heads, by both."""
    file, names, rows = DECODE.replace(".", "_heads."), ["triton bdr", "mosaic_gpu bdr"], []
    for (q_heads, kv_heads), here in decode_shapes("q_heads", "kv_heads", file=file).items():
        times = join(f"{medians(here, [name])} | {share(here, name)}" for name in names)
        rows.append(f"{q_heads} | {kv_heads} | {times}")
    head = "query heads | KV heads | Triton µs | of ceiling | Mosaic GPU µs | of ceiling"
    return markdown(head, rows, file)


def prefill() -> str:
    """Prefill over packed pages on an H200, beside cuDNN over dense keys and values."""

    def name(row: dict) -> str:
        return row["method" if row["implementation"] == "triton" else "implementation"]

    file = "h200/prefill.json"
    names = {
        "cudnn": "cuDNN dense BF16, the same mask, µs",
        "unmasked": "cuDNN without a mask µs",
        "bf16": "BF16 pages µs",
        "int4": "INT4 µs",
        "bdr": "BDR µs",
    }
    table = cells(rows_of(file), "tokens", "context", column=name)
    rows = [
        f"{tokens:,} | {context - tokens:,} | {medians(here, names, ',.0f')}"
        for (tokens, context), here in table.items()
    ]
    return markdown(f"new tokens | history | {join(names.values())}", rows, file)


def write_kv() -> str:
    """Writing new tokens on an H200."""

    def name(row: dict) -> str:
        if row["op"] == "write_qkv":
            return "fused" if row["implementation"] == "triton" else "unfused"
        return "bdr_kv" if row.get("rotate_v") else row["method"]

    file = "h200/write_kv.json"
    names = {
        **METHODS,
        "bdr_kv": "BDR, K and V",
        "fused": "BDR with QK-norm and RoPE",
        "unfused": "the same, these by XLA",
    }
    table = cells(rows_of(file), "tokens", column=name)
    rows = [
        f"{tokens:,} | {medians(here, names, '.2f')} | {here['bdr']['over_int4']:+.0%}"
        for tokens, here in table.items()
    ]
    head = f"tokens | {join(f'{name} µs' for name in names.values())} | rotating adds"
    return markdown(head, rows, file)


def tpu_static() -> str:
    """The TPU compiler's estimate of decode attention, batch 8, context 8k, and JAX's kernels."""
    peers = {
        "jax_paged_attention_int8": "JAX `paged_attention`, int8",
        "jax_ragged_paged_attention_bf16": "JAX `ragged_paged_attention`, BF16",
    }
    here = dict(kernel="decode_attention", batch=8, context=8192, rotate_v=False)
    found = [r for f in TPU_FOLDERS for r in rows_of(f"{f}/static.json", **here)]
    rows = []
    for row in found:
        name, figures = peers.get(row["method"]), " |  | "
        if not row["peer"]:
            name = METHODS[row["method"]]
            figures = f"{row['bundles']:,} | {row['memory_cycles']:,} | {row['margin']:.2f}"
        if row["page_size"] != 128:
            name = f"{name}, pages of {row['page_size']}"
        if row["float8"]:
            name = f"{name}, codes as float8"
        memory = f"{row['vmem_bytes'] / 1e6:.1f} | {row['temp_bytes'] / 1e6:.1f}"
        rows.append(f"{row['chip']} | {name} | {figures} | {memory}")
    head = "chip | cache | instruction bundles | memory cycles | memory / instructions"
    return markdown(f"{head} | VMEM MB | temporary MB", rows, "tpu7x/static.json")


def tpu_rotation() -> str:
    """What the rotation adds to a TPU kernel's instructions: BDR over INT4."""
    here = dict(peer=False, rotate_v=False, float8=False, page_size=128)
    keys = "kernel", "batch", "context", "tokens"
    chips = [cells(rows_of(f"{f}/static.json", **here), *keys) for f in TPU_FOLDERS]

    def added(methods: dict[str, dict]) -> str:
        return f"{methods['bdr']['bundles'] / methods['int4']['bundles'] - 1:+.1%}"

    rows = []
    for case in chips[0]:
        kernel, batch, context, tokens = case
        history = f"{context:,}" if context else ""
        over = join(added(chip[case]) for chip in chips)
        rows.append(f"{kernel} | {batch} | {history} | {tokens} | {over}")
    head = "kernel | batch | context | new tokens | v5e | v6e | tpu7x"
    return markdown(head, rows, "tpu7x/static.json")


# --- Serving and several devices --------------------------------------------------------------


def serve() -> str:
    """Jobs over concurrency, those of one kind together."""

    def three(here: dict[str, dict], name: str, digits: int = 1) -> str:
        values = (here[m][name] if m in here else None for m in METHODS)
        return " / ".join("–" if value is None else f"{value:,.{digits}f}" for value in values)

    def gain(here: dict[str, dict], other: str) -> str:
        if not {"bdr", other} <= here.keys():
            return ""
        return f"{here['bdr']['tokens_per_s'] / here[other]['tokens_per_s']:.2f}x"

    file, rows = "h200/serve.json", []
    times = {"ttft_s": "TTFT", "e2e_s": "E2E", "e2e_s_p75": "p75", "e2e_s_p90": "p90"}
    times = {key: name for key, name in times.items() if key in rows_of(file)[0]}
    keys = "found_tokens", "layers", "prompt_tokens", "new_tokens", "concurrency"
    jobs = cells(rows_of(file, op="serve"), *keys)
    deepest = max(layers for _, layers, *_ in jobs)
    order = operator.itemgetter(0, 2, 3, 4)
    for key, here in sorted(jobs.items(), key=lambda item: (-item[0][1], *order(item[0]))):
        found, layers, prompt, new, concurrency = key
        kind = f"D({prompt:,}, {new:,})" + (f", {found:,} found" if found else "")
        kind += f", {layers} of {deepest} layers" if layers < deepest else ""
        rows.append(
            f"{kind} | {concurrency} | {three(here, 'tokens_per_s', 0)}"
            f" | {gain(here, 'bf16')} | {gain(here, 'int4')}"
            f" | {three(here, 'request_tokens_per_s')} | {join(three(here, key) for key in times)}"
        )
    head = "requests | at once | tokens/s of the job | BDR to BF16 | to INT4"
    head += f" | tokens/s of a request | {join(f'{name} s' for name in times.values())}"
    return "Figures are BF16 / INT4 / BDR.\n\n" + markdown(head, rows, file)


def scaling() -> str:
    """Decode step, and a job of requests, on several devices against one of the same machine."""
    tables = {
        "parallel_decode.json": scaling_table,
        "parallel_decode_32b.json": scaling_table,
        "parallel_serve.json": parallel_serve_table,
    }
    return "\n".join(
        table(str(path.relative_to(RESULTS)))
        for name, table in tables.items()
        for path in sorted(RESULTS.glob(f"*-x[0-9]*/{name}"))
    )


def scaling_table(file: str) -> str:
    """A table of one file: how the step divides over devices, and what it gains."""
    shape = operator.itemgetter("batch", "context", "method")
    alone = {shape(row): row for row in rows_of(file, parallel="one")}
    keys = operator.itemgetter("batch", "context", "devices", "parallel", "method")
    rows = [
        f"{row['batch']} | {row['context']:,} | {METHODS[row['method']]}"
        f"{' *' if row.get('pool_layers', row['layers']) < row['layers'] else ''} | {spread(row)}"
        f" | {row['median_us'] / 1e3:.2f} | {row['tokens_per_s']:,.0f}"
        f" | {efficiency(row, alone.get(shape(row)))} | "
        + join(f"{row[f'{piece}_us'] / 1e3:.2f}" for piece in ("attention", "collectives"))
        for row in sorted(rows_of(file), key=keys)
    ]
    head = "batch | context | cache | GPUs | step ms | tokens/s | efficiency"
    head += " | attention ms | collectives ms"
    first = rows_of(file)[0]
    about = f"{first['model']} on {load(file)['meta']['device']}, random weights; "
    if timed := first.get("timed_layers"):
        about += f"{timed} of its {first['layers']} layers timed, the rest extrapolated."
    else:
        about += "all layers timed; *: several share pages, those of all do not fit one GPU."
    return f"{about}\n\n" + markdown(head, rows, file)


def parallel_serve_table(file: str) -> str:
    """A table of one file: a job of requests, the last run of each spread."""
    last = {(row["method"], row["parallel"]): row for row in rows_of(file)}
    rows = [
        f"{METHODS[method]} | {spread(row)} | {row['tokens_per_s']:,.0f}"
        f" | {efficiency(row, last[method, 'one'])}"
        f" | {row['ttft_s']:.2f} | {row['e2e_s']:.2f}"
        for (method, _), row in last.items()
    ]
    about = (
        "{concurrency} requests at once, prompts of {prompt_tokens} tokens and answers "
        "of {new_tokens}, {model}, by the serving engine.\n\n"
    ).format(**rows_of(file)[0])
    head = "cache | GPUs | tokens/s | efficiency | TTFT s | E2E s"
    return about + markdown(head, rows, file)


def spread(row: dict) -> str:
    """How many devices, and what they share."""
    return "1" if row["devices"] == 1 else f"{row['devices']}, {row['parallel']}"


def efficiency(row: dict, alone: dict | None) -> str:
    """Speed over that of as many separate devices."""
    if row["devices"] == 1 or alone is None:
        return ""
    return f"{row['tokens_per_s'] / alone['tokens_per_s'] / row['devices']:.0%}"


def plan() -> str:
    """Estimates for larger models on more devices."""
    file, rows = "plan/h200.json", []
    for (model, devices), here in cells(rows_of(file), "model", "devices").items():
        fitting = [row for row in here.values() if row["fits"]]
        splits = dict.fromkeys(f"{row['tensor']} x {row['data']}" for row in fitting)
        steps = join(
            f"{here[m]['step_us'] / 1e3:.1f} ({here[m]['tokens_per_s']:,.0f})"
            if here[m]["fits"]
            else "–"
            for m in METHODS
        )
        rows.append(
            f"{model} | {devices} | {' / '.join(splits)}"
            f" | {here['bdr']['weight_gb_per_device']:.0f} | {here['bf16']['most_sequences']:,}"
            f" | {here['bdr']['most_sequences']:,} | {steps}"
        )
    head = "model | GPUs | tensor x data | weights GB/GPU | BF16 sequences | INT4 sequences"
    row = rows_of(file)[0]
    basis = (
        f"\n**Estimates, not measurements**: {row['batch']} sequences of {row['context']:,} tokens "
        f"for each GPU, {row['memory_gb']:.0f} GB a GPU. Weights at {row['weights_gb_per_s']:,.0f} "
        f"GB/s ({row['weights_from']}), attention as measured in "
        "[decode_attention.json](benchmarks/results/h200/decode_attention.json), an all-reduce "
        f"{row['latency_us']:.0f} µs and {row['link_gb_per_s']:.0f} GB/s ({row['link_from']}).\n"
    )
    return markdown(f"{head} | {each('{} ms (tokens/s)')}", rows) + basis + caption(file)


# --- Accuracy ---------------------------------------------------------------------------------

Scores = dict[int, dict[str, dict]]  # by outlier scale and method


def accuracy_scores(file: str) -> Scores:
    return dict(sorted(cells(rows_of(file, op="accuracy"), "outlier_scale").items()))


def removed(scores: Scores, method: str, scale: int) -> tuple[float, float] | None:
    """Share of the KL that outliers add to plain INT4 which they do not add to a method.

    With its standard error, bootstrapped over windows, which all methods share; `None` where what
    they add to INT4 is within two standard errors of nothing.
    """

    def added(name: str) -> np.ndarray:
        return np.subtract(*(scores[s][name]["kl_windows"] for s in (scale, 1)))

    to_int4, to_method = added("int4"), added(method)
    draws = np.random.default_rng(0).integers(0, len(to_int4), (1000, len(to_int4)))
    drawn_int4, drawn_method = to_int4[draws].mean(1), to_method[draws].mean(1)
    if drawn_int4.mean() < 2 * drawn_int4.std():
        return None
    share = 1 - to_method.mean() / to_int4.mean()
    return float(share), float((1 - drawn_method / drawn_int4).std())


def share_text(share: tuple[float, float] | None) -> str:
    return "INT4 loses nothing" if share is None else f"{share[0]:.0%} ± {100 * share[1]:.0f}"


def everywhere(scores: Scores) -> list[str]:
    """The methods measured with and without outliers, in order."""
    return [m for m in scores[1] if all(m in methods for methods in scores.values())]


def accuracy() -> str:
    """All methods on the bundled model, as it is and with outliers."""

    def kl(row: dict) -> str:
        return f"{row['kl']:.5f} ± {row['kl_se']:.5f}"

    scores, rows = accuracy_scores(ACCURACY), []
    for name, row in scores[1].items():
        run_by = "kernels" if row["kernels"] else "simulated"
        line = (
            f"`{name}` | {row['about']} | {run_by} | {row['bits_per_value']:.2f}"
            f" | {row['bits_per_value_32k']:.2f} | {row['bits_per_byte']:.4f} | {kl(row)} | "
        )
        if outlier := scores[16].get(name):
            line += (
                f"{kl(outlier)} | {outlier['kl_p99']:.3f} | {outlier['top1']:.1%}"
                f" | {outlier['recall']:.0%} | {outlier['diverged_at']:.0f}"
                f" | {outlier['attention_error']:.3f}"
            )
        rows.append(line if outlier else line + " |  |  |  |  | ")
    head = "method | what | run by | bits/value | at 32k | bits/byte | KL"
    head += " | KL, s = 16 | p99 | top-1 | recall | diverges at | attention error"
    return markdown(head, rows, ACCURACY)


def accuracy_serving() -> str:
    """What each method keeps of serving, and what its calibration takes."""
    rows = [
        f"`{name}` | {row['paging']} | {row['regular']} | {row['fused']} | "
        + (
            f"{row['calibration_tokens']:,} tokens, {row['calibration_s']:.1f} s"
            if row["calibration_tokens"]
            else "none"
        )
        for name, row in accuracy_scores(ACCURACY)[1].items()
    ]
    return markdown(
        "method | paging | regular access | fused attention | calibration", rows, ACCURACY
    )


def accuracy_outliers() -> str:
    """KL by strength of the injected outliers, and what share of what they add is removed."""
    scores, rows = accuracy_scores(ACCURACY), []
    wanted = "int4", "bdr-16", "bdr-64", "bdr", "bdr-kv", "balanced", "balanced-kv"
    names = [name for name in wanted if name in everywhere(scores)]
    for scale, methods in scores.items():
        kl = join(f"{methods[name]['kl']:.5f}" for name in names)
        shares = ("" if scale == 1 else share_text(removed(scores, n, scale)) for n in names[1:])
        rows.append(f"{injected(scale)} | {kl} | {join(shares)}")
    quoted = [f"`{name}`" for name in names]
    head = join(["key outliers", *quoted, *(f"removed by {name}" for name in quoted[1:])])
    return markdown(head, rows, ACCURACY)


def accuracy_context() -> str:
    """KL of the tokens in the second half of each context length, with outliers."""
    found = rows_of(ACCURACY, op="accuracy_by_context", outlier_scale=16)
    table = cells(found, "method", column="context")
    names = "int4", "bdr-16", "bdr", "bdr-kv", "window", "kivi"
    contexts = sorted(table["bdr"])
    rows = [join([f"`{n}`", *(f"{table[n][c]['kl']:.5f}" for c in contexts)]) for n in names]
    return markdown(join(["method", *(f"{c} tokens" for c in contexts)]), rows, ACCURACY)


def accuracy_stories() -> str:
    """The same on stories260K, a model with head dimension 8."""
    scores = accuracy_scores(STORIES)
    names = everywhere(scores)
    rows = [
        join([injected(scale), *(f"{methods[name]['kl']:.4f}" for name in names)])
        for scale, methods in scores.items()
    ]
    return markdown(join(["key outliers", *(f"`{n}`" for n in names)]), rows, STORIES)


def accuracy_words() -> str:
    """What the figures say."""
    scores, longer = accuracy_scores(ACCURACY), accuracy_scores(OUTLIERS)
    plain, outlier, strongest = scores[1], scores[16], max(scores)

    def over(method: str, other: str = "bdr") -> list[float]:
        """A method's KL over another's, without outliers and with."""
        return [found[method]["kl"] / found[other]["kl"] for found in (plain, outlier)]

    def change(method: str) -> list[str]:
        return [f"{ratio - 1:+.0%}" for ratio in over(method)]

    def left(method: str) -> str:
        return " and ".join(f"{ratio:.2f}" for ratio in over(method))

    def shares(scores: Scores, method: str) -> dict[int, tuple[float, float]]:
        return {s: share for s in scores if s > 1 and (share := removed(scores, method, s))}

    def listed(shares: dict[int, tuple[float, float]]) -> str:
        return ", ".join(f"{share_text(share)} (s = {scale})" for scale, share in shares.items())

    recovered = shares(longer, "bdr")
    least = min(share for share, _ in recovered.values())
    verdict = "at every strength at least" if least >= 0.9 else "not at every strength"
    complex_methods = "kmeans-bdr", "vq-bdr", "hessian-bdr", "gptq-bdr", "covariance"
    text = f"""
        **How much of INT4's loss does BDR recover?** Of the KL that outliers add to plain INT4,
        BDR removes {listed(recovered)}, over {longer[1]["bdr"]["tokens"]:,} tokens in windows of
        {longer[1]["bdr"]["context"]:,} ([raw](benchmarks/results/{OUTLIERS})): {verdict} the 90 %
        aimed at, and least where INT4 loses little. Of INT4's whole KL at s = 16,
        {1 - over("bdr", "int4")[1]:.0%}; of that without outliers,
        {1 - over("bdr", "int4")[0]:.0%}.

        **Order.** With outliers, order 16 leaves {over("bdr-16")[1]:.1f} times the KL of the full
        order, without them {over("bdr-16")[0]:.1f} times.

        **Rotating values too** changes the KL by {change("bdr-kv")[0]} without outliers,
        {change("bdr-kv")[1]} with; **random signs** by {" and ".join(change("signed"))}; **32-bit
        scales** instead of 16, which cost {32 / 128:.2f} bits a value, by
        {" and ".join(change("bdr-fp32"))}.

        **What the complex methods add**, as KL over BDR's, without and with outliers:
        {"; ".join(f"`{name}` {left(name)}" for name in complex_methods)}. In KL that is more than
        the paper's "only a little" where the figure is well below one; in bits per byte BDR loses
        {plain["bdr"]["bits_per_byte"] - plain["bf16"]["bits_per_byte"]:.4f} to BF16 to begin with,
        and that is all there is to gain.

        **What is free**: bringing the channels of queries and keys to one size from the weights
        alone, by powers of two, before BDR (`rotation.balance_keys`; `saw-int4 generate` and
        `serve` do it to every model). The logits keep every bit, nothing is calibrated, no kernel
        changes. Of what injected outliers add it removes {listed(shares(scores, "balanced"))}: such
        an outlier is a matter of units, which it puts right. Without outliers it leaves
        {over("balanced")[0]:.2f} of BDR's KL here.

        **What is cheap and serves**: subtracting each channel's calibration mean before BDR leaves
        {left("centered-bdr")} of its KL, and nothing has to be read for it (the kernels do not take
        it yet).

        **Where BDR does not suffice**: it spreads an outlier over a vector, it does not remove it.
        At s = {strongest} it leaves {scores[strongest]["bdr"]["kl"] / plain["bdr"]["kl"]:.1f} times
        its KL without outliers, and the Hessian's diagonal, which undoes such an outlier exactly,
        is better: an injected outlier is a diagonal, so this comparison flatters it.
        """
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n")) + "\n"


# --- Pages ------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        *(summary, demo, decode_attention, decode_ragged, decode_heads, prefill, write_kv),
        *(decode_step, decode_step_gpu, tpu_static, tpu_rotation, serve, scaling, plan, accuracy),
        *(accuracy_serving, accuracy_outliers, accuracy_context, accuracy_words, accuracy_stories),
    )
}


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
