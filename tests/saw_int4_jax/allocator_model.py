"""The page allocator a second time, as plain Python: sequences are lists of pages and of tokens.

Each operation takes what its counterpart in `saw_int4_jax.cache` takes and returns its ok flags.
"""

from __future__ import annotations

import collections
import itertools


class AllocatorModel:
    """B sequences over a pool. A page here is only a name; `pages[b]` lists those of sequence b."""

    def __init__(self, batch: int, num_pages: int, page_size: int, max_pages: int):
        self.num_free = num_pages
        self.page_size = page_size
        self.max_pages = max_pages
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.pages: list[list[int]] = [[] for _ in range(batch)]
        self._names = itertools.count()

    @property
    def references(self) -> collections.Counter:
        return collections.Counter(itertools.chain(*self.pages))

    def extend(self, new_tokens: list[list[int]], counts: list[int], max_count: int) -> list[bool]:
        """Appends the first counts[b] of new_tokens[b]."""
        available, oks = self.num_free, []
        for tokens, pages, new, count in zip(self.tokens, self.pages, new_tokens, counts):
            missing = self._num_pages(len(tokens) + count) - len(pages)
            ok = 0 <= count <= max_count and len(pages) + missing <= self.max_pages
            if ok and missing:
                available -= missing
                ok = available >= 0
            if ok:
                tokens.extend(new[:count])
                pages.extend(self._take() for _ in range(missing))
            oks.append(ok)
        return oks

    def truncate(self, lengths: list[int]) -> list[bool]:
        available, before, oks = self.num_free, self.references, []
        rows = range(len(lengths))
        for row, length in zip(rows, lengths):
            tokens, pages = self.tokens[row], self.pages[row]
            ok = 0 <= length <= len(tokens)
            copied = ok and length < len(tokens) and length % self.page_size != 0
            copied = copied and before[pages[length // self.page_size]] > 1
            if copied:
                available -= 1
                ok = available >= 0
            if ok and copied:
                pages[length // self.page_size] = self._take()
            oks.append(ok)
        for row, length, ok in zip(rows, lengths, oks):
            if ok:
                del self.tokens[row][length:], self.pages[row][self._num_pages(length) :]
        self.num_free += len(before.keys() - self.references.keys())
        return oks

    def free(self, rows: list[bool]) -> None:
        self.truncate([0 if row else len(tokens) for row, tokens in zip(rows, self.tokens)])

    def share(self, source: int, target: int, length: int) -> bool:
        rows = range(len(self.tokens))
        if source not in rows or target not in rows or self.tokens[target]:
            return False
        partial = length % self.page_size != 0
        if not 0 <= length <= len(self.tokens[source]) or partial > self.num_free:
            return False
        self.tokens[target] = self.tokens[source][:length]
        self.pages[target] = self.pages[source][: length // self.page_size]
        if partial:
            self.pages[target].append(self._take())
        return True

    def _num_pages(self, length: int) -> int:
        return -(-length // self.page_size)

    def _take(self) -> int:
        self.num_free -= 1
        return next(self._names)
