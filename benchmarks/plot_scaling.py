"""A picture of a decode step on several devices: where its time goes, by how it is spread.

    python benchmarks/plot_scaling.py benchmarks/results/h200-x2/parallel_decode.json

writes the PNG beside the file. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from matplotlib.figure import Figure

METHODS = {"bf16": "BF16", "int4": "INT4", "bdr": "BDR"}
PIECES = "attention", "matmuls", "collectives"


def plot(results: dict[str, Any]) -> Figure:
    """A panel for each batch and context; a bar for each cache and spread, in milliseconds."""
    rows = results["rows"]
    panels = sorted({(r["batch"], r["context"]) for r in rows if r["devices"] > 1})
    figure = Figure(figsize=(4 * len(panels), 4.5), layout="constrained")
    for axes, (batch, context) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        here = [r for r in rows if (r["batch"], r["context"]) == (batch, context)]
        here.sort(key=lambda r: (list(METHODS).index(r["method"]), r["devices"], r["parallel"]))
        for place, row in enumerate(here):
            bottom = 0.0
            for color, piece in zip(("C0", "C7", "C3"), PIECES):
                part = row[f"{piece}_us"] / 1e3
                axes.bar(place, part, bottom=bottom, color=color)
                bottom += part
            axes.text(
                place, bottom, f"{row['tokens_per_s']:,.0f}", ha="center", va="bottom", size=6
            )
        spread = [
            f"{METHODS[r['method']]} {r['devices']} {r['parallel']}"
            if r["devices"] > 1
            else f"{METHODS[r['method']]} 1"
            for r in here
        ]
        axes.margins(y=0.1)
        axes.set_xticks(range(len(here)), spread, rotation=90)
        axes.set(title=f"batch {batch}, context {context:,}", ylabel="ms a step; tokens/s above")
    for color, piece in zip(("C0", "C7", "C3"), PIECES):
        axes.bar(0, 0, color=color, label=piece)
    axes.legend()
    meta = results["meta"]
    figure.suptitle(f"decode step, {rows[0]['model']}, {meta['device']}, jax {meta['jax']}")
    return figure


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("results", type=pathlib.Path)
    path = arguments.parse_args().results
    plot(json.loads(path.read_text())).savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
