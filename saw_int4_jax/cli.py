"""The command line: `saw-int4 demo`, `generate`, `evaluate`, `serve`, `info`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import saw_int4_jax as saw
from saw_int4_jax import comparison, demo
from saw_int4_jax.cache import CacheSpec
from saw_int4_jax.generate import FINISH_REASONS
from saw_int4_jax.models import Model, load_model
from saw_int4_jax.models.llama import Llama
from saw_int4_jax.results import describe_device, write_results
from saw_int4_jax.rotation import balance_keys, fold_values
from saw_int4_jax.serving import command as serve


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 2 for bad input, with one line saying why."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"saw-int4: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="saw-int4", description="Paged INT4 KV cache with block-diagonal Hadamard rotation."
    )
    top.add_argument("--version", action="version", version=f"saw-int4-jax {saw.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    prompt = argparse.ArgumentParser(add_help=False)
    source = prompt.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--prompt-file", metavar="FILE", help="read the prompt here; - is stdin")
    prompt.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    prompt.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    prompt.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all")
    prompt.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 keeps all")
    prompt.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 keeps all")
    prompt.add_argument("--seed", type=int, default=0)
    prompt.add_argument("--json", metavar="FILE", help="write the results here too")

    command = commands.add_parser(
        "demo", parents=[prompt], help="continue a prompt, then compare BF16, INT4 and BDR"
    )
    command.set_defaults(run=run_demo)

    command = commands.add_parser("generate", parents=[prompt], help="continue a prompt")
    command.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="a Hugging Face directory (Llama, Mistral, Qwen2, Qwen3) or a llama2.c checkpoint",
    )
    command.add_argument(
        "--method",
        choices=demo.METHODS,
        default="bdr",
        help="the cache: BF16, INT4, or INT4 with block-diagonal rotation (default)",
    )
    command.add_argument("--order", type=int, metavar="N", help="rotation order of bdr")
    command.add_argument(
        "--rotate-v", action="store_true", help="rotate values too, in the weights"
    )
    command.add_argument("--page-size", type=int, default=128, metavar="S", help="tokens in a page")
    command.add_argument(
        "--pool-tokens",
        type=int,
        metavar="N",
        help="tokens the cache holds; default: what it takes",
    )
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights and arithmetic"
    )
    command.set_defaults(run=run_generate)

    command = commands.add_parser(
        "evaluate", help="what ways of storing keys and values cost in quality, on your model"
    )
    command.add_argument("--model", metavar="PATH", help="as for generate; default: the bundled")
    command.add_argument("--text", nargs="+", metavar="FILE", help="default: bundled held-out text")
    command.add_argument("--methods", metavar="NAMES", help="with commas; default: all")
    command.add_argument("--json", metavar="FILE", help="write rows here, and go on from them")
    command.add_argument("--plot", metavar="FILE", help="draw the results; needs matplotlib")
    command.add_argument("--context", type=int, metavar="N", help="tokens of a window")
    command.add_argument("--windows", type=int, metavar="N", help="the most windows to score")
    command.add_argument("--rows", type=int, default=8, help="windows of needles, of greedy text")
    command.add_argument("--batch", type=int, default=8, metavar="N", help="windows at a time")
    command.add_argument("--seeds", type=int, default=3, help="of methods with randomness")
    command.add_argument("--decode-tokens", type=int, default=64, metavar="N")
    command.add_argument("--workers", type=int, default=1, help="methods at a time")
    command.add_argument(
        "--outlier-scale",
        type=int,
        nargs="+",
        default=[1],
        metavar="S",
        help="inject an outlier pair this much larger into the keys, exactly; 1: none",
    )
    command.set_defaults(run=run_evaluate)

    command = commands.add_parser("serve", help="an OpenAI-compatible server; needs [serve]")
    serve.add_arguments(command)

    command = commands.add_parser("info", help="versions, devices, and what a model's cache takes")
    command.add_argument(
        "--model", metavar="PATH", help="as for generate; default: the bundled one"
    )
    command.set_defaults(run=run_info)
    return top


# --- Commands -------------------------------------------------------------------------------


def run_demo(arguments: argparse.Namespace) -> None:
    prompt = read_prompt(arguments) or demo.PROMPT
    with progress_bar("loading"):
        model = load_model(demo.REFERENCE_MODEL)
    continue_prompt(model, model.config.cache_spec(1), prompt, arguments)
    with progress_bar("scoring held-out text") as report:
        rows = demo.compare_methods(model, progress=report)
    Console().print(demo_table(rows))
    if arguments.json:
        write_results(arguments.json, rows)


def run_generate(arguments: argparse.Namespace) -> None:
    prompt = read_prompt(arguments)
    if not prompt:
        raise ValueError("Expected a prompt: --prompt TEXT or --prompt-file FILE (- is stdin)")
    if arguments.rotate_v and arguments.method != "bdr":
        method = arguments.method
        raise ValueError(f"Expected {method=} to be 'bdr' with --rotate-v: it rotates nothing")
    options = dict(demo.METHOD_OPTIONS[arguments.method], page_size=arguments.page_size)
    if arguments.order is not None:
        options["order"] = arguments.order
    with progress_bar("loading"):
        model = load_model(arguments.model, dtype=arguments.dtype or default_dtype())
    spec = model.config.cache_spec(1, **options)  # raises for an order that does not fit
    params = balance_keys(model.params, model.config)
    if arguments.rotate_v:
        params = fold_values(params, model.config, spec.format.order)
    model = dataclasses.replace(model, params=params)
    row = continue_prompt(model, spec, prompt, arguments, pool_tokens=arguments.pool_tokens)
    if arguments.json:
        write_results(arguments.json, [row])


def run_evaluate(arguments: argparse.Namespace) -> None:
    with progress_bar("loading"):
        model = load_model(arguments.model or demo.REFERENCE_MODEL)
    found: list[dict[str, Any]] = []
    with progress_bar("comparing") as report, jax.default_matmul_precision("highest"):
        for found in comparison.evaluate_model(
            model,
            [pathlib.Path(file) for file in arguments.text or sorted(demo.HELDOUT.glob("*.txt"))],
            name=pathlib.Path(arguments.model or demo.REFERENCE_MODEL).stem,
            methods=arguments.methods.split(",") if arguments.methods else None,
            scales=arguments.outlier_scale,
            outlier_pair=demo.OUTLIER_PAIR,
            context=arguments.context,
            limit=arguments.windows,
            rows=arguments.rows,
            path=arguments.json,
            progress=report,
            batch=arguments.batch,
            seeds=arguments.seeds,
            decode_tokens=arguments.decode_tokens,
            workers=arguments.workers,
        ):
            if arguments.json:
                write_results(arguments.json, found)
    Console().print(comparison_table(found))
    if arguments.plot:
        from saw_int4_jax.plot import plot_comparison

        plot_comparison(found, arguments.plot)


def run_info(arguments: argparse.Namespace) -> None:
    console = Console(highlight=False)
    console.print(f"saw-int4-jax {saw.__version__}, jax {jax.__version__} on {describe_device()}")
    model = load_model(arguments.model or demo.REFERENCE_MODEL)
    config = model.config
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    console.print(
        f"{arguments.model or 'bundled model'}: {size / 1e6:.1f} M parameters, "
        f"{config.num_layers} layers, {config.num_heads}/{config.num_kv_heads} heads of "
        f"{config.head_dim}, context {config.max_length}"
    )
    table = Table("cache", "rotation order", "bytes per token", "bits per value", "tokens per GB")
    for method, options in demo.METHOD_OPTIONS.items():
        spec = config.cache_spec(1, **options)
        values = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        table.add_row(
            method.upper(),
            str(spec.format.order),
            f"{spec.bytes_per_token:,}",
            f"{8 * spec.bytes_per_token / values:.2f}",
            f"{1e9 / spec.bytes_per_token:,.0f}",
        )
    console.print(table)


# --- Parts ----------------------------------------------------------------------------------


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt from its option, file or standard input; "" if none was given."""
    if arguments.prompt_file == "-":
        return sys.stdin.read()
    if arguments.prompt_file:
        return pathlib.Path(arguments.prompt_file).read_text()
    return arguments.prompt or ""


def continue_prompt(
    model: Model,
    spec: CacheSpec,
    prompt: str,
    arguments: argparse.Namespace,
    *,
    pool_tokens: int | None = None,
) -> dict[str, Any]:
    """Streams the prompt and its continuation to stdout; returns a results row."""
    tokens = model.tokenizer.encode(prompt)
    limit = arguments.max_new_tokens
    pool = pool_tokens or len(tokens) + limit
    spec = dataclasses.replace(spec, num_pages=max(1, -(-pool // spec.page_size)))
    sampling = saw.make_sampling(
        1,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
    )
    if (sequence := len(tokens) + limit) > model.config.max_length:
        print(
            f"saw-int4: warning: {sequence} tokens pass the model's context of "
            f"{model.config.max_length}",
            file=sys.stderr,
        )
    with progress_bar("reading the prompt") as report:
        parts = saw.stream(
            Llama(model.config, last_only=True).apply,
            {"params": model.params},
            [tokens],
            saw.init_cache(spec, 1),
            max_new_tokens=limit,
            eos=model.tokenizer.eos_ids,
            sampling=sampling if arguments.temperature > 0 else None,
            chunk=min(256, 1 << (len(tokens) - 1).bit_length()),
            every=16,
            progress=report,
        )
        first, state = next(parts)
    print(prompt, end="", flush=True)
    text = model.tokenizer.stream(tokens)
    new = first[0].tolist()
    print(text.push(new), end="", flush=True)
    start = None
    for part, state in parts:
        ids = part[0][part[0] >= 0].tolist()
        new += ids
        print(text.push(ids), end="", flush=True)
        start = start or (time.perf_counter(), len(new))  # the first part compiles
    print(text.flush())
    seconds, timed = (time.perf_counter() - start[0], len(new) - start[1]) if start else (0, 0)
    finish = FINISH_REASONS[int(state.finish[0])]
    if finish == "out of pages":
        print(f"saw-int4: warning: stopped after {len(new)} tokens: out of pages", file=sys.stderr)
    return {
        "op": "generate",
        "method": spec.method,
        "order": spec.format.order,
        "prompt": prompt,
        "text": model.tokenizer.decode(new),
        "prompt_tokens": len(tokens),
        "tokens": len(new),
        "finish": finish,
        "cache_bytes_per_token": spec.bytes_per_token,
        "tokens_per_s": timed / seconds if timed else None,
    }


def demo_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The demo's rows for a terminal."""
    table = Table(title="The same model and text through three caches")
    for name in ("K outliers", "cache", "bits/byte", "KL to BF16", "top-1", "bytes/token", "tok/s"):
        table.add_column(name, justify="left" if name in ("K outliers", "cache") else "right")
    for row in rows:
        scale, reference = row["outlier_scale"], row["method"] == "bf16"
        table.add_row(
            "as trained" if scale == 1 else f"injected, x{scale}",
            row["method"].upper(),
            f"{row['bits_per_byte']:.4f}",
            "" if reference else f"{row['kl']:.4f}",
            "" if reference else f"{row['top1']:.1%}",
            f"{row['cache_bytes_per_token']:,}",
            f"{row['tokens_per_s']:.0f}",
            end_section=row["method"] == "bdr",
        )
    return table


def comparison_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `evaluate` for a terminal."""
    table = Table(title="Teacher-forced through the cache, compared with BF16")
    names = "outliers", "method", "bits", "bits/byte", "KL", "p99", "top-1", "recall", "diverges at"
    for name in names:
        table.add_column(name, justify="left" if name in ("outliers", "method") else "right")
    for row in rows:
        if row["op"] != "accuracy":
            continue
        scale = row["outlier_scale"]
        table.add_row(
            "" if scale == 1 else f"injected, x{scale}",
            row["method"],
            f"{row['bits_per_value']:.2f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['kl']:.5f}",
            f"{row['kl_p99']:.4f}",
            f"{row['top1']:.1%}",
            f"{row['recall']:.1%}",
            f"{row['diverged_at']:.0f}",
        )
    return table


def default_dtype() -> str:
    """float32 where there is no bfloat16 arithmetic worth having."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for work that may take a while; quiet when it is not a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(description, total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield report


if __name__ == "__main__":
    sys.exit(main())
