"""README and docs: examples run, commands and files exist, tables match the results files."""

import doctest
import pathlib
import re
import tomllib

import pytest

import saw_int4_jax
from benchmarks import tables

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: pathlib.Path, language: str) -> list[str]:
    """Code blocks of a page. One with a title says why it is not run."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run(page: pathlib.Path) -> None:
    namespace: dict = {}
    for example in blocks(page, "python"):
        exec(compile(example, str(page), "exec"), namespace)


def test_the_readmes_examples_run_in_order():
    assert len(blocks(README, "python")) >= 4
    run(README)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES[1:] if blocks(p, "python")], ids=lambda page: page.stem
)
def test_the_pages_examples_run_in_order(page):
    run(page)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "pycon")], ids=lambda p: p.stem)
def test_sessions_print_what_they_show(page):
    session = "\n".join(blocks(page, "pycon"))
    test = doctest.DocTestParser().get_doctest(session, {}, page.name, str(page), 0)
    said: list[str] = []
    doctest.DocTestRunner().run(test, out=said.append)
    assert test.examples
    assert said == []


def test_tables_are_those_of_the_results_files():
    stale = [page.name for page in tables.pages() if tables.render(page) != page.read_text()]
    assert stale == []


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_is_shown(name):
    assert any(f"<!-- table: {name} -->" in page.read_text() for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_named_exist(page):
    text = page.read_text()
    folders = "saw_int4_jax|pallas_kernels|benchmarks|tests|colab|docs|.ci"
    paths = [ROOT / path for path in re.findall(rf"`((?:{folders})/[^`*< ]*)`", text)]
    links = re.findall(r"\]\(([^)#\s]+)", text)
    paths += [page.parent / link for link in links if not link.startswith("http")]
    assert [str(path) for path in paths if not path.exists()] == []


def test_extras_named_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = "\n".join(page.read_text() for page in PAGES)
    named = {name for found in re.findall(r"'\.\[([\w,]+)\]'", text) for name in found.split(",")}
    assert named
    assert named - extras["optional-dependencies"].keys() == set()


def test_the_changelog_tells_of_this_version():
    assert f"\n## {saw_int4_jax.__version__} " in (ROOT / "CHANGELOG.md").read_text()
