"""``--map OLD=NEW``: paths of the source that are others at the target."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable

from checkpoint.errors import BadPathMap

__all__ = ["PathMap"]


class PathMap:
    """Maps absolute paths by their beginnings; the longest that fits decides, at the border of a name.

    pairs  (old, new), absolute. BadPathMap if one is not, or an old one comes twice
    """

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self._pairs: dict[str, str] = {}
        for old, new in pairs:
            for path in (old, new):
                if not path.startswith("/") or "\0" in path:
                    raise BadPathMap("both paths of --map must be absolute", object=f"{old}={new}")
            old, new = _plain(old), _plain(new)
            if self._pairs.setdefault(old, new) != new:
                raise BadPathMap("it is mapped to two places", object=old)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> PathMap:
        """Of ``OLD=NEW`` texts; the first ``=`` divides. BadPathMap."""
        pairs = []
        for text in texts:
            old, equals, new = text.partition("=")
            if not equals:
                raise BadPathMap("--map wants OLD=NEW", object=text)
            pairs.append((old, new))
        return cls(pairs)

    @property
    def pairs(self) -> dict[str, str]:
        """Old to new."""
        return dict(self._pairs)

    def __call__(self, path: str) -> str:
        """Where ``path`` of the source is here."""
        at = path
        while True:
            new = self._pairs.get(at)
            if new is not None:
                return _plain(f"{new}/{path[len(at) :]}")
            if at in ("/", ""):
                return path
            at = at.rpartition("/")[0] or "/"


def _plain(path: str) -> str:
    # (two slashes at the beginning are special to POSIX, and so to normpath)
    return posixpath.normpath("/" + path.strip("/"))
