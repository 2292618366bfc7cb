"""What a change of credentials does to a thread, and in which order it can be done."""

from __future__ import annotations

import ctypes
import errno
import os

from kernel_child import in_child

from checkpoint import procfs
from checkpoint.state.credentials import Capabilities
from tcpstate.kernel import batch
from tcpstate.kernel.batch import libc, syscall
from tcpstate.kernel.calls import CallError, CallTable
from tcpstate.kernel.capability import Cap, capset_data, capset_header
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import Pr, Securebit

NOBODY = 65534


def _own() -> Capabilities:
    return Capabilities.of(procfs.read_status(os.getpid()))


def _capset(*, effective: int, permitted: int, inheritable: int) -> None:
    table = CallTable()
    data = table.put(capset_data(effective=effective, permitted=permitted, inheritable=inheritable))
    table.call(SYS.capset, table.put(capset_header()), data)
    batch.run(table)


def test_capabilities_survive_a_change_of_ids_under_two_securebits():
    def work() -> int:
        before = _own()
        libc.prctl(Pr.SET_SECUREBITS, Securebit.KEEP_CAPS | Securebit.NO_SETUID_FIXUP, 0, 0, 0)
        syscall(SYS.setresuid, NOBODY, NOBODY, NOBODY)
        return 0 if _own() == before and os.geteuid() == NOBODY else 1

    assert in_child(work) == 0


def test_a_change_of_ids_resets_the_parent_death_signal_and_dumpability():
    def work() -> int:
        libc.prctl(Pr.SET_PDEATHSIG, 15, 0, 0, 0)
        libc.prctl(Pr.SET_DUMPABLE, 1, 0, 0, 0)
        syscall(SYS.setresuid, NOBODY, NOBODY, NOBODY)
        value = ctypes.c_int()
        libc.prctl(Pr.GET_PDEATHSIG, ctypes.byref(value))
        with open("/proc/sys/fs/suid_dumpable", encoding="ascii") as file:
            expected = int(file.read())
        return 0 if value.value == 0 and libc.prctl(Pr.GET_DUMPABLE, 0, 0, 0, 0) == expected else 1

    assert in_child(work) == 0


def test_dumpable_2_cannot_be_set():
    assert in_child(lambda: libc.prctl(Pr.SET_DUMPABLE, 2, 0, 0, 0) != -1) == 0


def test_a_capability_can_become_inheritable_only_while_it_is_in_the_bounding_set():
    def work() -> int:
        here, bit = _own(), 1 << Cap.NET_RAW
        libc.prctl(Pr.CAPBSET_DROP, Cap.NET_RAW, 0, 0, 0)
        try:
            _capset(effective=here.permitted, permitted=here.permitted, inheritable=bit)
        except CallError as error:
            return 0 if error.errno == errno.EPERM else 2
        return 1

    def before() -> int:
        here, bit = _own(), 1 << Cap.NET_RAW
        _capset(effective=here.permitted, permitted=here.permitted, inheritable=bit)
        libc.prctl(Pr.CAPBSET_DROP, Cap.NET_RAW, 0, 0, 0)
        return 0 if _own().inheritable == bit else 1

    assert in_child(work) == 0
    assert in_child(before) == 0


def test_ambient_capabilities_survive_the_last_capset():
    def work() -> int:
        here, bit = _own(), 1 << Cap.NET_RAW
        _capset(effective=here.permitted, permitted=here.permitted, inheritable=bit)
        libc.prctl(Pr.CAP_AMBIENT, 2, Cap.NET_RAW, 0, 0)
        _capset(effective=0, permitted=bit, inheritable=bit)
        return 0 if _own().ambient == bit else 1

    assert in_child(work) == 0
