"""All methods of storing keys and values, on models with and without outlier channels.

    python -m benchmarks.accuracy --workers 8                  # the bundled model
    python -m benchmarks.accuracy --model stories260K.bin --text stories.txt --name stories260k

Writes benchmarks/results/accuracy/NAME.json and .png, the first after every method, and goes on
from there when run again. Outliers are injected: an exact re-parameterization of the model that
makes a RoPE pair of every key s times larger.
"""

from __future__ import annotations

import argparse
import pathlib

import jax
from rich.progress import Progress

from saw_int4_jax import demo
from saw_int4_jax.comparison import evaluate_model
from saw_int4_jax.models import load_model
from saw_int4_jax.plot import plot_comparison
from saw_int4_jax.results import write_results

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
    with jax.default_matmul_precision("highest"), Progress() as bar:
        task = bar.add_task(arguments.name, total=None)
        for rows in evaluate_model(
            load_model(arguments.model),
            arguments.text or sorted(demo.HELDOUT.glob("*.txt")),
            name=arguments.name,
            methods=arguments.methods.split(",") if arguments.methods else None,
            scales=arguments.scales,
            outlier_pair=demo.OUTLIER_PAIR,
            context=arguments.context,
            limit=arguments.windows,
            rows=arguments.rows,
            path=path,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            batch=arguments.batch,
            seeds=arguments.seeds,
            decode_tokens=arguments.decode_tokens,
            workers=arguments.workers,
        ):
            write_results(path, rows)
        plot_comparison(rows, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
