"""What the user says about files and interfaces at the target: ``--map``, ``--ship``, ``--overwrite``, ``--map-dev``.

It travels in the options of the message Check, as texts by name: a target that does not know one ignores it, and
refuses the file that it was about.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field

from checkpoint.files.pathmap import PathMap
from checkpoint.files.policy import External
from checkpoint.files.verdicts import SHIPPED
from checkpoint.verdict import Verdict
from tcpstate.slotted import dataclass

__all__ = ["FileOptions", "device_texts", "devices_told", "shared_and_apart"]

_MAP = "map:"
_DEVICE = "device:"
_BRIDGE = "bridge:"
_SHIP = "ship"
_OVERWRITE = "overwrite"
_YES = "yes"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """Decisions about files at the target.

    path       paths of the source that are others there
    ship       files that are open for writing travel along where they are not shared
    overwrite  also where another file is at their place
    external   restore: what is put in the place of files that did not follow
    bridges    ``--veth``: links of the tree's network namespace to bridges there
    devices    ``--map-dev``: interface names of the source to those there; they travel apart (:func:`device_texts`)
    """

    path: PathMap = field(default_factory=PathMap)
    ship: bool = False
    overwrite: bool = False
    external: tuple[External, ...] = ()
    bridges: dict[str, str] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)

    def texts(self) -> dict[str, str]:
        """For the message."""
        found = {f"{_MAP}{old}": new for old, new in self.path.pairs.items()}
        found |= {f"{_BRIDGE}{link}": bridge for link, bridge in self.bridges.items()}
        found |= {_SHIP: _YES} if self.ship else {}
        return found | ({_OVERWRITE: _YES} if self.overwrite else {})

    @classmethod
    def told(cls, texts: Mapping[str, str]) -> FileOptions:
        """Of the message. BadPathMap."""
        pairs = [(name.removeprefix(_MAP), value) for name, value in texts.items() if name.startswith(_MAP)]
        return cls(
            path=PathMap(pairs),
            ship=texts.get(_SHIP) == _YES,
            overwrite=texts.get(_OVERWRITE) == _YES,
            bridges={name.removeprefix(_BRIDGE): to for name, to in texts.items() if name.startswith(_BRIDGE)},
        )


def device_texts(map_dev: Mapping[str, str]) -> dict[str, str]:
    """``--map-dev`` as such texts: sockets that are bound to an interface, or link-local, need it."""
    return {f"{_DEVICE}{old}": new for old, new in map_dev.items()}


def devices_told(texts: Mapping[str, str]) -> dict[str, str]:
    """Of :func:`device_texts`."""
    return {name.removeprefix(_DEVICE): new for name, new in texts.items() if name.startswith(_DEVICE)}


def shared_and_apart(written: Sequence[str], answer: Iterable[Verdict]) -> tuple[list[str], list[str]]:
    """What the target's verdicts say of the files that are open for writing: the directories that it shares, and the
    files that it does not have."""
    apart = {verdict.subject for verdict in answer if verdict.kind == SHIPPED}
    return sorted({os.path.dirname(path) for path in written if path not in apart}), sorted(apart)
