"""Training text as bytes: a folder of English and the running interpreter's Python sources.

    python benchmarks/corpus.py --text DIR --python

prints what a corpus would hold. A *kind* is a subfolder of DIR, or `python` and `docs`: sources
and documentation of the standard library and of the installed packages whose metadata names a
permissive licence. Of every kind some documents are set apart for evaluation, and a document that
shares passages with the held-out text that ships with the package is not used at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import re
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt16
from rich.console import Console
from rich.table import Table

BOS = 256  # begins each document; the other token ids are bytes
HELDOUT = pathlib.Path(__file__).parents[1] / "saw_int4_jax" / "data" / "heldout"
# Where the held-out text is from; its content is looked for as well.
HELDOUT_MODULES = {"colorsys", "graphlib", "sched", "topics"}
PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|HPND|Zlib)\b", re.I
)
PASSAGE = 5  # lines


class Document(NamedTuple):
    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What to train on and what to evaluate on, by kind.

    Attributes:
      train: token ids of all documents, BOS before each.
      held_out: the same for the documents set apart.
      share: of the training tokens; sums to 1.
      packages: "name version (licence)" of the packages read.
      excluded: names of the documents left out because they hold the shipped held-out text.
    """

    train: dict[str, UInt16[np.ndarray, "n"]]
    held_out: dict[str, UInt16[np.ndarray, "n"]]
    share: dict[str, float]
    packages: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    def digest(self) -> str:
        """Tells corpora apart: one hexadecimal number for all training text."""
        digest = hashlib.sha256(json.dumps(self.share).encode())
        for tokens in self.train.values():
            digest.update(tokens.tobytes())
        return digest.hexdigest()[:16]


def load_corpus(
    text: pathlib.Path | None, python: bool, text_share: float, megabytes: int
) -> Corpus:
    """Reads both sources.

    Args:
      text: folder with one subfolder for each kind of English.
      python: whether to read the interpreter's library and packages too.
      text_share: of the training tokens for `text` if there are both. Within a source, kinds
        share by size.
      megabytes: of Python sources, at most.

    Raises:
      ValueError: there is nothing to read.
    """
    packages: list[str] = []
    sources = [
        read_folder(text) if text else {},
        read_python(megabytes, packages) if python else {},
    ]
    sources = [source for source in sources if source]
    if not sources:
        raise ValueError(f"Expected {text=} to hold text or {python=} to be set")
    weights = [1.0] if len(sources) == 1 else [text_share, 1 - text_share]
    passages = heldout_passages()
    train, held_out, share = {}, {}, {}
    excluded: list[str] = []
    for weight, source in zip(weights, sources, strict=True):
        for kind, documents in source.items():
            used = [d for d in documents if not is_held_out(d, passages)]
            excluded += sorted({d.name for d in documents} - {d.name for d in used})
            train_documents, held_out_documents = split(used)
            train[kind] = encode(train_documents)
            if held_out_documents:
                held_out[kind] = encode(held_out_documents)
        size = sum(len(train[kind]) for kind in source)
        share |= {kind: weight * len(train[kind]) / size for kind in source}
    return Corpus(train, held_out, share, tuple(sorted(packages)), tuple(excluded))


def encode(documents: Iterable[Document]) -> UInt16[np.ndarray, "n"]:
    """Bytes as token ids, BOS before each document."""
    parts = []
    for document in documents:
        parts += [[BOS], np.frombuffer(document.text.encode("utf-8", "replace"), np.uint8)]
    return np.concatenate(parts).astype(np.uint16)


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Sets a fifteenth apart, at most 400 kB: whole documents, by a hash of their names."""
    limit = min(sum(len(d.text) for d in documents) // 15, 400_000)
    train, held_out, size = [], [], 0
    for document in sorted(documents, key=lambda d: _hash(d.name)):
        chosen = size + len(document.text) <= limit
        size += len(document.text) * chosen
        (held_out if chosen else train).append(document)
    return train, held_out


# --- Keeping the shipped text out -------------------------------------------------------------


def passages(text: str) -> set[str]:
    """Every run of five lines, blank ones and the indentation left out."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    return {"\n".join(lines[i : i + PASSAGE]) for i in range(len(lines) - PASSAGE + 1)}


def heldout_passages() -> set[str]:
    """The passages of the text that ships with the package."""
    return set().union(*(passages(path.read_text()) for path in HELDOUT.glob("*.txt")))


def is_held_out(document: Document, held_out: set[str]) -> bool:
    """Whether a document is a held-out module, or shares more than two passages with them."""
    if pathlib.PurePath(document.name).stem in HELDOUT_MODULES:
        return True
    return len(passages(document.text) & held_out) > 2


# --- English -----------------------------------------------------------------------------------


def read_folder(folder: pathlib.Path) -> dict[str, list[Document]]:
    """Every .txt, .jsonl and .zip of .txt under `folder`, by subfolder."""
    kinds = {}
    for kind in sorted(path for path in folder.iterdir() if path.is_dir()):
        documents = [d for file in sorted(kind.rglob("*")) for d in read_file(file)]
        if documents:
            kinds[kind.name] = documents
    return kinds


def read_file(file: pathlib.Path) -> Iterator[Document]:
    """The documents of one file: a jsonl row each, a zip member each, pieces of a long text."""
    if file.suffix == ".txt":
        text = _decode(file.read_bytes())
        for i, piece in enumerate(articles(text) if " @-@ " in text else pieces(text)):
            yield Document(f"{file.name}/{i}", piece)
    elif file.suffix == ".jsonl":
        for i, line in enumerate(file.read_text().splitlines()):
            row = {key: value for key, value in json.loads(line).items() if isinstance(value, str)}
            text = "\n".join(f"{key.capitalize()}: {value}" for key, value in row.items())
            text = re.sub(r"<<.*?>>", "", text)  # GSM8K's calculator calls
            yield Document(f"{file.name}/{i}", text + "\n")
    elif file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".txt"):
                    yield Document(f"{file.name}/{name}", _decode(archive.read(name)))


def pieces(text: str, size: int = 20_000) -> Iterator[str]:
    """Cuts a long text at blank lines into pieces of about `size`."""
    piece = ""
    for paragraph in re.split(r"(?<=\n)\n", text):
        piece += paragraph + "\n"
        if len(piece) >= size:
            yield piece
            piece = ""
    if piece:
        yield piece


def articles(text: str) -> list[str]:
    """Articles of a WikiText file, with the spaces that its tokenizer put around marks undone."""
    text = re.sub(r" @(.)@ ", r"\1", text)
    text = re.sub(r" (?=[,.;:!?)]|'s\b|n't\b)", "", text).replace("( ", "(")
    return re.split(r"\n(?= = [^=].* = ?\n)", text)


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


# --- Python ------------------------------------------------------------------------------------


def read_python(megabytes: int, packages: list[str]) -> dict[str, list[Document]]:
    """Sources and documentation installed with this interpreter, in the order of a hash.

    Near-copies are left out: a file of which more than 35 % of the passages have been seen.

    Args:
      megabytes: of each kind, at most.
      packages: extended by the packages read.
    """
    kinds: dict[str, list[Document]] = {"python": [], "docs": []}
    sizes = dict.fromkeys(kinds, 0)
    seen: set[int] = set()
    for name, path in sorted(_python_files(packages), key=lambda item: _hash(item[0])):
        kind = "python" if path.suffix == ".py" else "docs"
        if sizes[kind] > megabytes * 1e6:
            continue
        text = _source(path)
        found = {hash(passage) for passage in passages(text)}
        if len(found) < 15 or len(found & seen) > 0.35 * len(found):
            continue
        seen |= found
        sizes[kind] += len(text)
        kinds[kind].append(Document(name, text))
    return {kind: documents for kind, documents in kinds.items() if documents}


def _python_files(packages: list[str]) -> Iterator[tuple[str, pathlib.Path]]:
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        if "site-packages" not in path.parts and "dist-packages" not in path.parts:
            yield f"stdlib/{path.relative_to(library)}", path
    for package in importlib.metadata.distributions():
        licence = permissive_licence(package.metadata)
        if licence is None:
            continue
        packages.append(f"{package.name} {package.version} ({licence})")
        for file in package.files or ():
            text = file.suffix in (".py", ".rst", ".md") or file.name == "METADATA"
            if text and "LICENSE" not in file.name.upper():
                yield f"{package.name}/{file}", pathlib.Path(str(package.locate_file(file)))


def permissive_licence(metadata) -> str | None:
    """The licence that a package's metadata names if it is a permissive one."""
    classifiers = [
        value.rpartition(" :: ")[2]
        for value in metadata.get_all("Classifier") or ()
        if value.startswith("License ::")
    ]
    stated = metadata.get("License-Expression") or ", ".join(classifiers) or metadata.get("License")
    stated = (stated or "").strip().split("\n")[0][:80]
    if (
        re.search("GPL|MPL", stated)
        or "propriet" in stated.lower()
        or not PERMISSIVE.search(stated)
    ):
        return None
    return stated


def _source(path: pathlib.Path) -> str:
    """A file's text without its licence header, or "" where it is unfit to learn from."""
    try:
        if not 1500 < path.stat().st_size < 250_000:
            return ""
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    if path.name == "METADATA":
        text = text.partition("\n\n")[2]
    if path.suffix == ".py":
        text = re.sub(r"\A(#.*\n|\s*\n)+", "", text)
    return "" if max(map(len, text.splitlines()), default=0) > 600 else text


def _hash(name: str) -> bytes:
    return hashlib.md5(name.encode()).digest()


# --- Command -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `load_corpus`."""
    parser.add_argument("--text", type=pathlib.Path, metavar="DIR", help="one subfolder per kind")
    parser.add_argument("--python", action="store_true", help="read the installed Python sources")
    parser.add_argument(
        "--text-share", type=float, default=0.25, help="of --text if both are given"
    )
    parser.add_argument("--megabytes", type=int, default=80, help="of Python sources, at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    corpus = load_corpus(**vars(parser.parse_args()))
    table = Table("kind", "train MB", "held out kB", "share", title=corpus.digest())
    for kind, tokens in corpus.train.items():
        held_out = len(corpus.held_out.get(kind, ()))
        table.add_row(
            kind, f"{len(tokens) / 1e6:.2f}", f"{held_out / 1e3:.0f}", f"{corpus.share[kind]:.3f}"
        )
    Console().print(table, "\n".join(corpus.packages), "\nLeft out:", *corpus.excluded)


if __name__ == "__main__":
    main()
