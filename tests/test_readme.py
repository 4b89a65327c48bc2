"""The README: its examples run, its commands exist, its tables match the results files."""

import pathlib
import re

import pytest

from benchmarks import tables

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_examples_run_in_order(capsys):
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert examples
    namespace: dict = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)


def test_tables_are_those_of_the_results_files():
    assert tables.render(README) == README


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_is_shown(name):
    assert f"<!-- table: {name} -->" in README


def test_files_named_in_the_readme_exist():
    paths = re.findall(r"`((?:saw_int4_jax|pallas_kernels|benchmarks|tests|\.ci)/[^`* ]*)`", README)
    paths += re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
