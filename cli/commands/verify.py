"""``tcpmig verify``: is an image whole?"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import click

from checkpoint.image.reader import open_image
from cli.command import command
from cli.session import Result, Session

__all__ = ["verify"]


@command("verify")
@click.argument("file", type=click.Path())
def verify(session: Session, file: str) -> Result:
    """Check every digest of the image FILE, and that this version can read all of it."""
    with ThreadPoolExecutor(os.cpu_count()) as executor, open_image(file, executor=executor) as image:
        data = {
            "file": file,
            "size": image.size,
            "frames": len(image.frames),
            "root": image.end.root.hex(),
            "signed": image.end.signature is not None,
        }
    line = f"{file}: whole, {data['size']} bytes, {data['frames']} frames, root digest {data['root']}"
    return Result(data=data, body=[line])
