"""One target with atheris (libFuzzer): ``python -m tests.fuzz.guided TARGET CORPUS [-runs=N] [-seed=N]``.

The corpus is a directory: what was found to reach new code stays in it, and the next run goes on from there.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["tcpstate", "checkpoint", "migrate"]):
        from tests.fuzz.targets import TARGETS
    name, corpus, *options = sys.argv[1:]
    target = TARGETS[name]
    directory = Path(corpus)
    directory.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds:
        (directory / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)

    def one(data: bytes) -> None:
        target.run(target.refit(data) if target.refit is not None else data)

    atheris.Setup([sys.argv[0], str(directory), *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
