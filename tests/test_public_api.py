"""Public names and signatures change only on purpose, and all of them are in the API pages."""

import importlib
import inspect
import pathlib
import re

import pytest

import saw_int4_jax
from tests import public_api

API = pathlib.Path(__file__).parents[1] / "docs" / "api"


def test_the_public_api_is_the_one_on_record():
    recorded = public_api.SNAPSHOT.read_text()
    assert public_api.text() == recorded, (
        "The public API changed. If that is meant: python -m tests.public_api, and a line in "
        "CHANGELOG.md"
    )


def test_a_changed_signature_is_noticed(monkeypatch):
    def free(cache):
        return cache

    monkeypatch.setattr(saw_int4_jax, "free", free)
    assert public_api.text() != public_api.SNAPSHOT.read_text()


def test_a_name_less_is_noticed(monkeypatch):
    monkeypatch.setattr(saw_int4_jax, "__all__", saw_int4_jax.__all__[1:])
    assert public_api.text() != public_api.SNAPSHOT.read_text()


@pytest.mark.parametrize("module_name", public_api.MODULES)
def test_the_api_pages_show_it(module_name):
    shown = set()
    for page in API.glob("*.md"):
        shown |= set(re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE))
    module = importlib.import_module(module_name)
    missing = []
    for name in public_api.names(module, public_api.MODULES[module_name]):
        x = getattr(module, name)
        home = getattr(inspect.unwrap(x) if callable(x) else x, "__module__", None) or module_name
        if isinstance(x, dict):  # a constant: where it is defined cannot be asked
            continue
        if not {home, f"{home}.{name}"} & shown:
            missing.append(f"{home}.{name}")
    assert missing == []
