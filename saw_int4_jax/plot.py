"""A picture of what `saw-int4 evaluate` found; needs matplotlib."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any


def plot_comparison(rows: Sequence[dict[str, Any]], path: str | pathlib.Path) -> None:
    """Draws KL by method and outlier scale, and how uneven key channels are in each layer.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("Expected matplotlib to be installed for a plot") from error
    figure = Figure(figsize=(13, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    accuracy = [row for row in rows if row["op"] == "accuracy" and row["kl"] > 0]
    names = list(dict.fromkeys(row["method"] for row in accuracy))
    for scale in sorted({row["outlier_scale"] for row in accuracy}):
        here = [row for row in accuracy if row["outlier_scale"] == scale]
        label = "as trained" if scale == 1 else f"injected outliers, s = {scale}"
        places = [names.index(row["method"]) for row in here]
        errors = [row["kl_se"] or 0 for row in here]
        left.errorbar([row["kl"] for row in here], places, xerr=errors, fmt="o", label=label)
    left.set(xscale="log", yticks=range(len(names)), yticklabels=names, xlabel="KL to BF16, nats")
    left.invert_yaxis()
    left.grid(alpha=0.3)
    left.legend()

    outliers = [row for row in rows if row["op"] == "key_outliers"]
    orders = sorted({row["order"] for row in outliers})
    for scale in sorted({row["outlier_scale"] for row in outliers}):
        for order in dict.fromkeys((orders[0], orders[-1])):
            here = [r for r in outliers if (r["outlier_scale"], r["order"]) == (scale, order)]
            name = "as trained" if scale == 1 else f"s = {scale}"
            name += ", rotated" if order > 1 else ""
            style = "-" if order > 1 else "--"
            x, y = [r["layer"] for r in here], [r["channel_ratio"] for r in here]
            right.plot(x, y, style, marker="o", label=name)
    right.set(
        yscale="log", xlabel="layer", ylabel="keys: RMS of the largest channel / the median one"
    )
    right.grid(alpha=0.3)
    right.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)
