"""``tcpmig verify``: is an image whole?"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import click

from checkpoint.image.chain import open_chain
from checkpoint.image.reader import open_image
from cli.command import command
from cli.session import Result, Session

__all__ = ["verify"]


@command("verify")
@click.argument("file", type=click.Path())
def verify(session: Session, file: str) -> Result:
    """Check every digest of the image FILE, and of those that it builds on; and that this version can read it."""
    with ThreadPoolExecutor(os.cpu_count()) as executor, open_image(file, executor=executor) as image:
        chain = open_chain(image, executor=executor)
        data = {
            "file": file,
            "size": image.size,
            "frames": len(image.frames),
            "root": image.end.root.hex(),
            "signed": image.end.signature is not None,
        }
        parents = [parent.path for parent in chain.parents]
        # all that it takes from them is there
        for _ in chain.frames():
            continue
        chain.close()
    line = f"{file}: whole, {data['size']} bytes, {data['frames']} frames, root digest {data['root']}"
    return Result(data=data | {"parents": parents}, body=[line, *(f"builds on {path}" for path in parents)])
