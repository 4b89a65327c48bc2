"""MkDocs hook: pages may link to files of the repository, as they do when read on a forge.

A link `../FILE` on a page of docs/ leaves the site's folder. FILE is taken into the site under its
path in the repository, and the link turned to it.
"""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
LINK = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_files(files, config):
    for page in pathlib.Path(config.docs_dir).glob("*.md"):
        for name in LINK.findall(page.read_text(encoding="utf-8")):
            if (ROOT / name).is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, **_):
    return LINK.sub(r"](\1", markdown) if "/" not in page.file.src_uri else markdown
