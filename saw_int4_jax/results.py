"""Results files: one JSON shape for everything measured.

`{"meta": {command, date, device, python, jax, jaxlib, commit}, "rows": [{…}, …]}`, rows flat.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib


def describe_device() -> str:
    """The default device's kind and how many there are."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if kind == "cpu":
        kind = f"{platform.processor() or platform.machine()} cpu"
    return kind if len(devices) == 1 else f"{len(devices)} x {kind}"


def meta() -> dict[str, str]:
    """Where and when a result was made."""
    return {
        "command": _command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": describe_device(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "commit": _commit(),
    }


def write_results(
    path: str | pathlib.Path, rows: Sequence[dict[str, Any]], made: dict[str, str] | None = None
) -> None:
    """Writes rows with their meta as JSON, a row a line; `made` is the meta of older rows."""
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = f'{{\n "meta": {json.dumps(made or meta(), indent=2)},\n "rows": [\n  {lines}\n ]\n}}\n'
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _command() -> str:
    """The command line, without what is private about it: where this program lies."""
    program = pathlib.Path(sys.argv[0])
    module = getattr(sys.modules["__main__"], "__spec__", None)  # as `python -m` has it
    if module is not None:
        words = ["python", "-m", module.name.removesuffix(".__main__")]
    elif program.suffix == ".py":
        words = ["python", f"{program.parent.name}/{program.name}"]
    else:
        words = [program.name]
    return shlex.join(words + sys.argv[1:])


def _commit() -> str:
    """The commit of the source tree, or "" where the package is installed without one."""
    root = pathlib.Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
