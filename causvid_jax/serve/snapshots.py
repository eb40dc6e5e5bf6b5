"""Copies of films that a session can continue. The engine's lock guards them."""

import collections
import secrets

from causvid_jax.config import require
from causvid_jax.serve.film import Film

PER_SESSION = 16


class Snapshots:
    """The newest copies: at most :data:`PER_SESSION` of each session, and ``most_bytes`` in all."""

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self._films: collections.OrderedDict[str, tuple[str, Film]] = collections.OrderedDict()

    def check(self, film: Film) -> None:
        """Refuse a film whose copy would not fit.

        Raises:
            ConfigError: its state has more than ``most_bytes``.
        """
        size = film.state_bytes
        require(size <= self.most_bytes, f"a snapshot takes {size >> 20} MiB, more than is allowed")

    def add(self, owner: str, film: Film) -> str:
        """Keep a copy that :meth:`check` accepts, remove those that are too old, and return its id."""
        mine = [key for key, (other, _) in self._films.items() if other == owner]
        for old in mine[: len(mine) - PER_SESSION + 1]:
            del self._films[old]
        key = secrets.token_urlsafe(16)
        self._films[key] = owner, film
        while len(self._films) * film.state_bytes > self.most_bytes:
            self._films.popitem(last=False)
        return key

    def get(self, key: str) -> Film:
        """Return the copy with the id ``key``.

        Raises:
            ConfigError: it is not kept, or never was.
        """
        require(key in self._films, "this snapshot is no longer kept")
        return self._films[key][1]
