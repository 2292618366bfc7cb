"""`tcpmig handover` that dies when it is about to say a certain message: the line is cut at that moment.

python -m tests.system.cut_handover KIND
"""

from __future__ import annotations

import os
import sys

from migrate import handover
from migrate.messages import Message
from migrate.wire import Channel
from tcpstate.codec import members

SEND = Channel.send


def send(channel: Channel, *messages: Message) -> None:
    kind = members(Message)[sys.argv[1]]
    if any(isinstance(message, kind) for message in messages):
        os._exit(9)
    SEND(channel, *messages)


if __name__ == "__main__":
    Channel.send = send  # type: ignore[method-assign]
    handover.hand_over()
