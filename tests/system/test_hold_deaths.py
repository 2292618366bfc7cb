"""The tool killed in the midst of a hold: `tcpmig recover` finds it, and the clients notice nothing but the time."""

from __future__ import annotations

import signal
import sys

import pytest

from tests.hosts import warm
from tests.hosts.tcpmig import from_host
from tests.hosts.warm import tcpmig
from tests.system.test_hold import Service, at_home, hosts, service

__all__ = ["at_home", "hosts", "service"]

KILLED_IN = [sys.executable, "-m", "tests.workloads.killed_in"]


def killed(service: Service, function: str, *arguments: object) -> None:
    """Run tcpmig until it is about to do ``function``; there it dies."""
    status, _, err = warm.run(service.source, KILLED_IN[-1], function, *arguments)
    assert status == -signal.SIGKILL, err


def recovered(service: Service, state: str) -> None:
    status, told, said = tcpmig(service.source, "recover")
    assert status == 0, (told, said)
    (item,) = told["items"]
    assert (item["state"], item["settled"]) == (state, True), item


@pytest.mark.parametrize("function", ["migrate.hold:NewHold.seal", "checkpoint.dump:Dump.delta"])
def test_a_checkpoint_that_dies_before_its_hold_stands(service: Service, function: str) -> None:
    """The processes go on, with their sockets."""
    killed(service, function, "checkpoint", service.pid, "-o", service.image)
    service.send()
    service.assert_silent(0.3)
    recovered(service, "here")
    service.hear()
    assert service.holds() == []
    assert service.resets() == 0


def test_a_checkpoint_that_dies_when_its_hold_stands(service: Service) -> None:
    """The processes end, the hold stays."""
    killed(service, "checkpoint.dump:Dump.end", "checkpoint", service.pid, "-o", service.image)
    service.send()
    recovered(service, "gone")
    service.source.wait_until_gone(service.pid)
    (hold,) = service.holds()
    assert hold["state"] == "held"
    service.made.append(hold["hold"])
    service.assert_silent(0.3)
    assert service.restore()["held"] == 3
    service.hear()
    assert service.resets() == 0
    service.source.kill(service.pid, signal.SIGKILL)


@pytest.mark.parametrize("function", ["migrate.hold:TakenHold.lift", "checkpoint.restore:Restore.release"])
def test_a_restore_that_dies_with_the_sockets(service: Service, function: str) -> None:
    """It has them, and so does the holder: recover lets them live."""
    service.hold()
    service.send()
    killed(service, function, "restore", service.image)
    service.assert_silent(0.3)
    recovered(service, "arrived")
    service.hear()
    assert service.holds() == []
    assert service.resets() == 0
    service.source.kill(service.pid, signal.SIGKILL)


def test_a_handover_that_dies(service: Service) -> None:
    """Its journal says what was to go; the restore, run again, goes on."""
    service.hold()
    service.send()
    target = service.hosts.target
    options = from_host(service.source)
    options[-1] = " ".join([*KILLED_IN, "migrate.hold:TakenHold.finish", "handover"])
    status, told, _ = tcpmig(target, "restore", service.image, *options)
    assert (status, told["code"]) == (1, "TM-0628")
    recovered(service, "gone")
    assert service.holds() == []
    service.restore(target, *from_host(service.source))
    service.hear()
    assert service.resets() == 0
    target.kill(service.pid, signal.SIGKILL)
