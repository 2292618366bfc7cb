"""``tcpmig inspect``: what an image holds."""

from __future__ import annotations

import click

from checkpoint.image.inspect import SECTIONS, describe
from checkpoint.image.reader import open_image
from cli.command import command
from cli.outline import outline
from cli.session import Result, Session

__all__ = ["inspect"]


@command("inspect")
@click.argument("file", type=click.Path())
@click.argument("section", required=False, type=click.Choice(SECTIONS))
def inspect(session: Session, file: str, section: str | None) -> Result:
    """Show what the image FILE holds: all of it, or one section.

    The image is verified whole first; a damaged one shows nothing.
    """
    with open_image(file, known=None) as image:
        found = describe(image)
    shown = found if section is None else {section: found[section]}
    return Result(data=shown, body=list(outline(shown)))
