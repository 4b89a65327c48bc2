"""The public names of both packages and how they are called, as text.

    python -m tests.public_api    # rewrites tests/public_api.txt

Run it when the API was meant to change, and say so in CHANGELOG.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import pathlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import flax.linen

from saw_int4_jax.cli import parser

SNAPSHOT = pathlib.Path(__file__).with_name("public_api.txt")

# Public modules. Their names are those of `__all__`, or all that they define without underscore;
# of a few, the names listed here alone.
MODULES: dict[str, tuple[str, ...] | None] = {
    "pallas_kernels": None,
    "pallas_kernels.page_format": None,
    "pallas_kernels.tuning": None,
    "saw_int4_jax": None,
    "saw_int4_jax.comparison": ("evaluate_model",),
    "saw_int4_jax.evaluate": None,
    "saw_int4_jax.generate": None,
    "saw_int4_jax.methods": None,
    "saw_int4_jax.models": None,
    "saw_int4_jax.nn.linen": None,
    "saw_int4_jax.nn.nnx": None,
    "saw_int4_jax.rotation": None,
    "saw_int4_jax.sharding": None,
}


def names(module: ModuleType, listed: tuple[str, ...] | None) -> list[str]:
    if listed is not None:
        return list(listed)
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, x in vars(module).items()
        if not name.startswith("_") and getattr(x, "__module__", None) == module.__name__
    )


def signature(function: Any) -> str:
    """Parameters and annotations as written, the same for every Python and jax."""

    def show(parameter: inspect.Parameter) -> str:
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        text = stars.get(parameter.kind, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {parameter.annotation}"
        if parameter.default is not parameter.empty:
            text += f" = {value(parameter.default)}"
        return text

    parameters = list(inspect.signature(function).parameters.values())
    shown = [show(parameter) for parameter in parameters]
    by_name = [i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY]
    if by_name and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        shown.insert(by_name[0], "*")
    returns = function.__annotations__.get("return")
    return f"({', '.join(shown)})" + (f" -> {returns}" if returns else "")


def value(x: Any) -> str:
    return x.__name__ if inspect.isfunction(x) else repr(x)


def members(cls: type) -> Iterator[str]:
    """Fields, properties and methods that a class itself defines."""
    linen = issubclass(cls, flax.linen.Module)
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    for field in fields:
        if linen and field.name in ("parent", "name"):
            continue
        default = "" if field.default is dataclasses.MISSING else f" = {value(field.default)}"
        kind = field.type if isinstance(field.type, str) else field.type.__name__
        yield f"  {field.name}: {kind}{default}"
    defaults = {field.name for field in fields}
    for name, x in vars(cls).items():
        x = inspect.unwrap(x) if inspect.isfunction(x) else x
        special = "__call__" if linen or fields else ("__init__", "__call__")
        if name in defaults or (name.startswith("_") and name not in special):
            continue
        if isinstance(x, (property, functools.cached_property)):
            yield f"  {name} (property)"
        elif inspect.isfunction(x):
            yield f"  {name}{signature(x)}"


def describe(name: str, x: Any) -> Iterator[str]:
    if inspect.isclass(x):
        yield f"class {name}"
        yield from sorted(members(x))
    elif callable(x) and hasattr(x, "__annotations__"):
        yield name + signature(inspect.unwrap(x))
    elif isinstance(x, dict):
        yield f"{name}: {', '.join(sorted(x))}"
    else:
        yield f"{name} = {x!r}"


def command_line() -> Iterator[str]:
    subcommands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in subcommands.choices.items():
        options = (s for a in command._actions for s in a.option_strings or [a.dest])
        yield f"saw-int4 {name} {' '.join(sorted(options))}"


def text() -> str:
    lines = []
    homes: dict[int, str] = {}
    for module_name, listed in MODULES.items():
        module = importlib.import_module(module_name)
        lines += ["", f"# {module_name}"]
        for name in names(module, listed):
            x = getattr(module, name)
            first = homes.setdefault(id(x), module_name)
            lines += describe(name, x) if first == module_name else [f"{name} of {first}"]
    lines += ["", "# command line", *command_line()]
    return "\n".join(lines[1:]) + "\n"


if __name__ == "__main__":
    SNAPSHOT.write_text(text())
