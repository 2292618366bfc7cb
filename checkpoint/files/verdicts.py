"""What will become of each open file of some processes, told before anything is stopped.

Every descriptor of every process gets a verdict. Descriptors are looked at through duplicates that are closed again
at once; nothing is read from them, no state is changed. What only shows in the stop (messages in flight, the queue of
a listener) is refused there.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Mapping, Sequence

from checkpoint.errors import BadExternal, FileCaptureFailed
from checkpoint.files.base import FdView, OpenFile, kind_name
from checkpoint.files.kinds import kind_for
from checkpoint.files.policy import NO_POLICY, Policy, rule_for
from checkpoint.files.rebuild import Rebuilder
from checkpoint.files.regular import RegularFile
from checkpoint.files.table import FileTable, TreeFiles
from checkpoint.files.treefiles import Numbered
from checkpoint.memory.vma import Vma, read_maps
from checkpoint.verdict import Status, Verdict
from tcpstate.errors import TcpmigError

__all__ = ["SHIPPED", "foretell", "judge_here", "verdicts"]

#: kind of the verdicts on files that will travel along
SHIPPED = "shipped file"

#: what looking at something that has just gone gives
_GONE = (errno.ENOENT, errno.ESRCH, errno.EBADF)


def verdicts(pids: Sequence[int], policy: Policy = NO_POLICY) -> list[Verdict]:
    """One verdict per descriptor of each process, and one for a table that cannot be rebuilt. Processes that end
    meanwhile are left out."""
    found: list[Verdict] = []
    with FileTable(live=True, policy=policy) as table:
        for pid in pids:
            try:
                table.add_process(Numbered(pid))
            except (FileNotFoundError, ProcessLookupError):
                continue
            except TcpmigError as error:
                found.append(Verdict.refuse(error, "descriptor table"))
        for view in table.entries:
            found += _judge(view)
        found += _judge_rules(policy, table)
    return found


def _judge_rules(policy: Policy, table: FileTable) -> list[Verdict]:
    """On descriptors that are given up, and on rules about descriptors that nobody has."""
    found = [
        Verdict(
            subject=f"pid {pid} fd {fd}", kind="external", status=Status.WARN, text="it is closed, as --external says"
        )
        for pid, fd in sorted(table.closed)
    ]
    places = [place for view in table.entries for place in view.places] + list(table.closed)
    for rule in policy.external:
        if rule_for([rule], places) is None:
            found.append(Verdict.refuse(BadExternal("no process has such a descriptor", object=str(rule)), "external"))
    return found


def _judge(view: FdView) -> list[Verdict]:
    """The verdicts on one description: one per descriptor that leads to it."""
    kind = "open file"
    try:
        cls = kind_for(view)
        kind = kind_name(cls)
        warning = cls.examine(view)
    except TcpmigError as error:
        one = Verdict.refuse(error, kind)
    except OSError as error:
        # closed, or its process ended, while we looked
        if error.errno in _GONE:
            return []
        failed = FileCaptureFailed(f"it cannot be looked at: {error}", object=view.object)
        one = Verdict.refuse(failed, kind)
    else:
        one = Verdict(
            subject=view.object, kind=kind, status=Status.WARN if warning else Status.OK, text=warning or view.link
        )
    return [dataclasses.replace(one, subject=f"pid {pid} fd {fd}") for pid, fd in view.places]


def foretell(pids: Sequence[int], policy: Policy = NO_POLICY) -> list[OpenFile]:
    """Records of what another host must have for these processes, read while they run: files with a path, also those
    that are only mapped, and addresses that listeners and UDP sockets are bound to. Each differs from the later capture
    in what goes on meanwhile (sizes, positions)."""
    found: list[OpenFile] = []
    with FileTable(live=True, policy=policy) as table:
        for pid in pids:
            try:
                table.add_process(Numbered(pid))
                for vma in read_maps(pid):
                    if vma.name.startswith("/"):
                        _add_mapped(table, pid, vma)
            except (OSError, TcpmigError):
                # it ended meanwhile, or verdicts() refuses it
                continue
        for view in table.entries:
            try:
                kind = kind_for(view)
                if kind.foreseeable:
                    record = kind.capture(view)
                    found.append(record.prove(view) if isinstance(record, RegularFile) else record)
            except (OSError, TcpmigError):
                continue
    return found


def _add_mapped(table: FileTable, pid: int, vma: Vma) -> None:
    try:
        table.add_mapped(Numbered(pid), vma)
    except (OSError, TcpmigError):
        # unmapped meanwhile, or judged by verdicts(): nothing that another host could provide
        return


def judge_here(
    files: Sequence[OpenFile],
    *,
    path: Callable[[str], str] = lambda path: path,
    beacons: Mapping[str, str] | None = None,
    ship: bool = False,
    overwrite: bool = False,
    devices: Mapping[str, str] | None = None,
) -> list[Verdict]:
    """At the target: what would stand in the way of making these files here.

    path       maps paths of the source; the :class:`Ways` of a tree with mounts of its own
    beacons    by what the source's directories are known (files/identity.py)
    ship       files that are open for writing, and not the same here, travel along: their verdicts are of the kind
               SHIPPED, and their subjects the paths of the source
    overwrite  also where another file is at their place
    devices    interface names of the source to those here
    """
    records = TreeFiles(files=list(files), contents=[], tables={})
    host = Rebuilder(records, path=path, beacons=beacons, ship=ship, overwrite=overwrite, devices=devices)
    found = []
    for record in host.files:
        kind = kind_name(type(record))
        name = str(getattr(record, "path", "") or getattr(record, "name", "") or kind)
        try:
            warning = "" if host.path.carried_file(record) else record.check(host)
        except TcpmigError as error:
            found.append(Verdict.refuse(error, kind))
        else:
            status = Status.WARN if warning else Status.OK
            if name in host.travelling:
                kind, warning = SHIPPED, warning or f"travels along, to {path(name)}"
            found.append(Verdict(subject=name, kind=kind, status=status, text=warning))
    return found
