"""What a compiled program does with the cache: read from its HLO and its memory analysis."""

from __future__ import annotations

import math
import re

import jax


def assert_in_place(compiled, pages, *, temp_fraction: float = 0.01) -> None:
    """Every page array is aliased to its donated input, and no copy is as large as one layer's.

    Args:
      compiled: a `jax.stages.Compiled`, of a pool far larger than a step's activations.
      pages: its page arrays, or their shapes, [L, P, ...].
      temp_fraction: the most temporary memory, over that of the pages.
    """
    leaves = jax.tree.leaves(pages)
    pool_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < temp_fraction * pool_bytes
    one_layer = min(leaf.size // leaf.shape[0] for leaf in leaves)
    assert max(copied_sizes(compiled), default=0) < one_layer


def copied_sizes(compiled, dtypes: str = r"\w+") -> list[int]:
    """Elements of each array that the program copies, inside fusions and loops too.

    `dtypes` is a regular expression for the HLO names of those that count.
    """
    copy = rf"= \(?(?:{dtypes})\[([\d,]*)\][^=\n]*? copy(?:-start)?\("  # -start makes a tuple
    shapes = re.findall(copy, compiled.as_text())
    return [math.prod(map(int, dims.split(","))) for dims in shapes if dims]
