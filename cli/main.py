"""``tcpmig``: the command line. A command's module is imported when the command runs, not before."""

from __future__ import annotations

import gc
import importlib
import io
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import click

from cli.errors import Interrupted, UsageMistake
from cli.session import Session
from tcpstate.version import VERSION

__all__ = ["COMMANDS", "main", "tcpmig"]

# name: what the list of commands says of it. The module is cli.commands.NAME, the command in it is called NAME too.
COMMANDS = {
    "check": "Can it be done? A verdict on each part; nothing is stopped or changed.",
    "checkpoint": "Process trees, with their connections, into a file.",
    "restore": "The processes of an image run again.",
    "holds": "What checkpoints hold on this host, and all else of ours that stands.",
    "release": "End a hold: its connections are given up.",
    "handover": "The holding host's half of restore --from; started by restore.",
    "migrate": "Move running process trees to another host, with their connections.",
    "drain": "All that serves here moves to another host, and back.",
    "receive": "The target's half of a migration; started by migrate.",
    "recover": "Finish or undo what a crash interrupted.",
    "conns": "Connections: who has them, what is queued in them.",
    "get": "The state of one connection, item by item.",
    "set": "Write items of a connection's state.",
    "freeze": "Silence one connection until it is resumed.",
    "resume": "Let a frozen connection flow again.",
    "chaperone": "Serve unprivileged processes that move their own connections.",
    "inspect": "What an image holds.",
    "verify": "Is an image whole? Checks every digest.",
    "explain": "What an error code means, why it happens, what to do.",
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found = getattr(_imported(f"cli.commands.{cmd_name}"), cmd_name)
        return found if isinstance(found, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own would import every command to ask for its summary
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Run the command line and exit with a status of :class:`tcpstate.errors.Outcome`."""
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        session = Session.of(arguments)
        # A file name may hold any byte; a name that cannot be shown must not break the result.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        extra.update(standalone_mode=False, obj=session)
        try:
            status = super().main(arguments, prog_name or "tcpmig", **extra)
        except click.ClickException as error:
            status = session.fail(_usage_mistake(error))
        except click.Abort:
            status = session.fail(Interrupted("ended by Ctrl-C"))
        except Exception as error:  # what a command raises, it tells itself: this is one that cannot be imported
            status = session.fail(error)
        sys.exit(status or 0)


def _imported(name: str) -> ModuleType:
    """The module. What is imported is no garbage: to look for some meanwhile, and in it later, would be a tenth of the
    time of a short command."""
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _usage_mistake(error: click.ClickException) -> UsageMistake:
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    fix = f"See `{context.command_path} --help`." if context is not None else None
    return UsageMistake(message[:1].lower() + message[1:], fix=fix)


def _print_version(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"tcpmig {VERSION}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="The version."
)
def tcpmig() -> None:
    """Move running processes, with their live TCP connections, between hosts; checkpoint and restore them.

    Exit status: 0 done, 1 failed and nothing lost, 2 usage, 3 refused before anything was stopped, 4 done but some
    connections were lost, 5 outcome unknown. `tcpmig explain CODE` tells more about an error.
    """


def main() -> NoReturn:
    """Entry point of the console script."""
    tcpmig.main()


if __name__ == "__main__":
    main()
