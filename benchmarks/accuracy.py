"""All methods of storing keys and values, on models with and without outlier channels.

    python -m benchmarks.accuracy --workers 8                  # the bundled model
    python -m benchmarks.accuracy --model stories260K.bin --text tinystories.txt --name stories260k

Writes benchmarks/results/accuracy/NAME.json after every method and goes on from there when run
again. Outliers are injected: an exact re-parameterization of the model that makes a RoPE pair of
every key s times larger.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import jax
from rich.progress import Progress

from saw_int4_jax import comparison, demo
from saw_int4_jax.methods import default_methods
from saw_int4_jax.models import load_model
from saw_int4_jax.results import write_results
from saw_int4_jax.rotation import scale_key_channels

RESULTS = pathlib.Path(__file__).parent / "results" / "accuracy"
SCALES = (1, 4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=demo.REFERENCE_MODEL, help="default: the bundled one")
    parser.add_argument("--text", type=pathlib.Path, nargs="*", help="default: the held-out text")
    parser.add_argument("--name", default="reference", help="of the results file")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--methods", help="names, with commas; default: all")
    parser.add_argument("--scales", type=int, nargs="*", default=SCALES, metavar="S")
    parser.add_argument("--context", type=int, help="default: the model's")
    parser.add_argument("--windows", type=int, help="the most to score, spread over the text")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="windows of needles and greedy text")
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="methods at a time")
    arguments = parser.parse_args()
    path = arguments.out / f"{arguments.name}.json"
    with jax.default_matmul_precision("highest"):
        run(arguments, path)
    print(path)


def run(arguments: argparse.Namespace, path: pathlib.Path) -> None:
    model = load_model(arguments.model)
    config = model.config
    methods = default_methods(config.head_dim)
    if arguments.methods:
        methods = arguments.methods.split(",")
    files = arguments.text or sorted(demo.HELDOUT.glob("*.txt"))
    text, calibration, bytes_per_token = comparison.read_windows(
        model.tokenizer, files, arguments.context or config.max_length, arguments.windows
    )
    setup = comparison.fingerprint(
        model=arguments.name, text=text, calibration=calibration, seeds=arguments.seeds,
        rows=arguments.rows, decode_tokens=arguments.decode_tokens,
    )  # fmt: skip
    rows = comparison.load_rows(path, setup)
    material = comparison.make_material(
        config, model.params, text, calibration, rows=arguments.rows,
        bytes_per_token=bytes_per_token,
    )  # fmt: skip
    with Progress() as bar:
        task = bar.add_task(arguments.name, total=len(arguments.scales) * len(methods))
        for scale in arguments.scales:
            labels: dict[str, Any] = {
                "model": arguments.name,
                "setup": setup,
                "outlier_scale": scale,
            }
            params = scale_key_channels(
                model.params, config, demo.OUTLIER_PAIR % (config.head_dim // 2), scale
            )
            done = {
                row["method"]
                for row in rows
                if row["op"] == "accuracy" and row["outlier_scale"] == scale
            }
            if not done:
                rows += [
                    labels | row for row in comparison.key_outliers(config, params, text[:4, :-1])
                ]
            bar.advance(task, len(done & set(methods)))
            for found in comparison.compare(
                config,
                params,
                material,
                [name for name in methods if name not in done],
                batch=arguments.batch,
                seeds=arguments.seeds,
                decode_tokens=arguments.decode_tokens,
                workers=arguments.workers,
            ):
                rows += [labels | row for row in found]
                write_results(path, rows)
                bar.advance(task)


if __name__ == "__main__":
    main()
