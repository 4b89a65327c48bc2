"""Who holds which page of the pool, and which full pages can be found again by their content.

A page is free, held by one or more sequences, or idle: nobody holds it, but it is full and known
by its key, so that a later prompt with the same beginning takes it as it is. Idle pages are given
away last, the least recently used first. A key stands for a page's tokens and all tokens before
them, since keys and values depend on both.

Plain Python, no device: what is in the pages is the engine's affair.
"""

from __future__ import annotations

import array
import collections
import hashlib
from collections.abc import Iterable, Sequence


def page_keys(tokens: Sequence[int], page_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """The keys of the full pages of a sequence.

    Args:
      tokens: the sequence.
      page_size: tokens in a page.
      known: keys of its first pages, if they were made before.
    """
    keys = list(known)
    for end in range((len(keys) + 1) * page_size, len(tokens) + 1, page_size):
        content = array.array("q", tokens[end - page_size : end]).tobytes()
        keys.append(hashlib.blake2b((keys[-1] if keys else b"") + content).digest())
    return keys


class PagePool:
    """The pages 0 .. num_pages - 1 and how many sequences hold each."""

    def __init__(self, num_pages: int):
        self.holders = [0] * num_pages
        self._free = list(reversed(range(num_pages)))
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # oldest first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that nobody holds and that can be found again."""
        return len(self._idle)

    @property
    def held(self) -> int:
        """Pages that some sequence holds."""
        return len(self.holders) - self.available

    def take(self, count: int) -> list[int]:
        """Pages with nothing in them that is still wanted, held once.

        Raises:
          ValueError: there are not so many; none has been taken.
        """
        if not 0 <= count <= self.available:
            raise ValueError(f"Expected {count=} to be within {self.available=}")
        pages = [self._free.pop() if self._free else self._forget() for _ in range(count)]
        for page in pages:
            self.holders[page] = 1
        return pages

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest beginning of `keys` that is in the pool; holds nothing yet."""
        pages = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            pages.append(page)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for pages that `find` returned."""
        for page in pages:
            self.holders[page] += 1
            self._idle.pop(page, None)

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def publish(self, page: int, key: bytes) -> None:
        """Makes a full page findable; its content must not change as long as it is held.

        Where another page has the key already, this one stays its holder's own.
        """
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Gives up a sequence's pages, in its order.

        The last page becomes idle first, and so is given away first: without the pages before it
        no page can be found.
        """
        for page in reversed(pages):
            self.holders[page] -= 1
            if self.holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def _forget(self) -> int:
        """The least recently used idle page, no longer findable."""
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page
