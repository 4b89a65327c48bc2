"""Block sizes of the kernels: one JSON file for a device kind, `default.json` for the rest."""

from __future__ import annotations

import functools
import json
import pathlib

import jax


def blocks(op: str, device_kind: str | None = None) -> dict[str, int]:
    """The block sizes of an operation on a device.

    Args:
      op: a key of the files: `decode_attention` and `prefill_attention`, each
        also with `_bf16`, `write_kv` and `write_kv_many`.
      device_kind: as `jax.Device.device_kind` says, such as "NVIDIA H200"; `None`: the default
        device's.
    """
    if device_kind is None:
        device_kind = jax.devices()[0].device_kind
    return _load(device_kind)[op]


@functools.cache
def _load(device_kind: str) -> dict[str, dict[str, int]]:
    folder = pathlib.Path(__file__).parent
    words = device_kind.lower().split()
    files = [path for path in sorted(folder.glob("*.json")) if path.stem in words]
    return json.loads((files or [folder / "default.json"])[0].read_text())
