"""The collector of cyclic garbage, which waits while processes stand still: a collection takes milliseconds."""

from __future__ import annotations

import gc

__all__ = ["CollectorPause"]


class CollectorPause:
    """From :meth:`begin` to :meth:`end`; both may be repeated."""

    def __init__(self) -> None:
        self._collects = False

    def begin(self) -> None:
        """No collections from now on."""
        self._collects = self._collects or gc.isenabled()
        gc.disable()

    def end(self) -> None:
        """As it was before."""
        if self._collects:
            self._collects = False
            gc.enable()
