"""What a way of storing keys and values is: one frozen dataclass, the same for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from saw_int4_jax.models.llama import LlamaConfig

# (x [B, S, K, D], what calibration found for this layer) -> what reading it back gives
Quantizer = Callable[[Float[Array, "B S K D"], Any], Float[Array, "B S K D"]]

# (position of the query [B, T, 1], position of the token [S]) -> whether it is still unquantized
Recent = Callable[[Int[Array, "B T 1"], Int[Array, "S"]], Bool[Array, "B T S"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerSample:
    """What one attention layer met on N tokens of calibration text.

    Attributes:
      q: queries after RoPE.
      k: keys after RoPE.
      v: values.
      output: W_o by query head: what the layer does with each head's output.
    """

    q: Float[Array, "N H D"]
    k: Float[Array, "N K D"]
    v: Float[Array, "N K D"]
    output: Float[Array, "H D E"]


def unchanged(x: Float[Array, "B S K D"], found: Any) -> Float[Array, "B S K D"]:
    """The quantizer that does nothing."""
    del found
    return x


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of storing keys and values.

    Either `paged` says which cache of the library it is, and it runs through that cache and its
    kernels; or `keys` and `values` quantize and dequantize what a dense cache holds before the
    same attention reads it. Hashable: two methods are two compiled programs.

    Attributes:
      name: as on the command line.
      about: one line.
      bits: (KV heads, head dim, context) -> bits a value, with scales, codebooks and windows.
      paged: options of `CacheSpec`; `None`: simulated.
      keys: what keys come back as.
      values: what values come back as.
      recent_keys: which keys a query still finds unquantized; `None`: none.
      recent_values: the same for values.
      calibrate: (one layer's sample, random key) -> what `keys` and `values` take, as a pair of
        pytrees of arrays. `None`: nothing.
      fold: (parameters, config, samples by layer, random key) -> parameters of the same function
        with other keys and values. `None`: as they are.
      uses_text: whether calibration reads text.
      random: whether it depends on a seed.
      paging: whether tokens lie in pages of one format, each written once: "yes", or "no: why".
      regular: whether memory is read in rows in a known order, without look-ups.
      fused: whether one pass of attention over the stored bytes does all.
    """

    name: str
    about: str
    bits: Callable[[int, int, int], float]
    paged: tuple[tuple[str, Any], ...] | None = None
    keys: Quantizer = unchanged
    values: Quantizer = unchanged
    recent_keys: Recent | None = None
    recent_values: Recent | None = None
    calibrate: Callable[[LayerSample, Array], tuple[Any, Any]] | None = None
    fold: Callable[[dict, LlamaConfig, list[LayerSample], Array], dict] | None = None
    uses_text: bool = False
    random: bool = False
    paging: str = "yes"
    regular: str = "yes"
    fused: str = "yes"

    @property
    def serves(self) -> bool:
        """Whether it keeps paging, regular access and fused attention."""
        return {self.paging, self.regular, self.fused} == {"yes"}


def through_the_cache(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Cache options as `Method.paged` holds them."""
    return tuple(sorted(options.items()))
