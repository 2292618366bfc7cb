"""``tcpmig release``: a hold ends."""

from __future__ import annotations

import click

from cli.command import command
from cli.session import Result, Session
from migrate import forwardstore, holdstore
from migrate.forwarding import release as end_forward
from migrate.hold import release as end
from tcpstate.kernel.bpf.steer import Role

__all__ = ["release"]


@command("release")
@click.argument("hold", metavar="ID")
@click.option("--reset/--silent", default=True, help="Tell the peers at once, by a reset, or say nothing.  [reset]")
def release(session: Session, hold: str, reset: bool) -> Result:
    """End the hold or the forwarding ID (its beginning will do): its connections are given up.

    The image of a hold stays. With --silent each peer finds out when it next sends something: this host then answers
    with a reset; so it is with a forwarding in any case.
    """
    forward = forwardstore.named(hold)
    if forward is not None:
        end_forward(forward)
        body = [f"forwarding {forward.forward} has ended: this host answers for {' '.join(forward.addresses)}"]
        if forward.role is Role.AWAY:
            body = [f"forwarding {forward.forward} has ended here: {' '.join(forward.addresses)} left this host"]
        return Result(data={"forward": forward.forward, "role": forward.role.value}, body=body)
    record = holdstore.named(hold)
    end(record, reset=reset)
    how = "reset" if reset else "given up silently"
    data = {"hold": record.hold, "connections": record.connections, "reset": reset}
    return Result(data=data, body=[f"hold {record.hold} has ended: {record.connections} connections {how}"])
