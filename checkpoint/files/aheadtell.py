"""What is told of the files of a tree before the stop, while its processes run: idle connections, plain files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence

from checkpoint.files.ahead import Ahead
from checkpoint.files.aheadplain import AheadPlain
from checkpoint.files.identity import Evidence
from checkpoint.files.policy import Policy
from checkpoint.files.treefiles import AheadFiles
from checkpoint.namespaces.numbers import Numbers
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.route import local_addresses

__all__ = ["tell"]

_log = logging.getLogger(__name__)


def tell(
    pids: Sequence[int],
    moved: Collection[str],
    policy: Policy,
    *,
    retold: bool = False,
    evidence: Mapping[tuple[str, int, int, int], Evidence] | None = None,
) -> tuple[Ahead, AheadFiles] | tuple[None, None]:
    """What is looked at from now on, and what the target is to know; nothing if there is nothing to tell, if this
    kernel cannot tell whether it changes, or if the policy makes something else of files.

    moved, retold  as :class:`~checkpoint.files.ahead.Ahead` wants them
    evidence       what is known of files' contents; None: the target does not know of plain files
    """
    # in a PID namespace of their own they have other numbers in records
    if policy.external or policy.cuts or not Numbers(pids).same:
        return None, None
    ahead, told = _connections(pids, moved, retold)
    try:
        if evidence is not None:
            plain = AheadPlain(policy, evidence, ahead.connections)
            plain.read(pids)
            places = ahead.add_plain(plain)
            told = dataclasses.replace(told, files=list(ahead.files), places=[*told.places, *places])
        ahead.make_ready()
    except (KernelFeatureMissing, OSError) as error:
        _log.info("no files are told ahead of the stop: %s", error)
        ahead.close()
        return None, None
    if not told.files:
        ahead.close()
        return None, None
    return ahead, told


def _connections(pids: Sequence[int], moved: Collection[str], retold: bool) -> tuple[Ahead, AheadFiles]:
    ahead = Ahead(moved, retold=retold)
    try:
        return ahead, ahead.read(pids, local_addresses())
    except (KernelFeatureMissing, OSError) as error:
        _log.info("connections are not built ahead of the stop: %s", error)
        ahead.close()
        return Ahead(moved, retold=retold), AheadFiles(files=[], places=[], read_at=0)
