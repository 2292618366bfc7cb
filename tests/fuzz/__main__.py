"""``python -m tests.fuzz``: all targets, one after the other; exit status 1 if anything was wrong."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys

from tests.fuzz.run import STATE, run
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz what reads files and wires.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"which ({', '.join(TARGETS)}; all)")
    parser.add_argument("--inputs", type=int, default=200_000, help="of each target (200000)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same inputs (1)")
    parser.add_argument("--guided", type=int, default=100_000, help="with atheris, if it is installed (100000)")
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    wrong = 0
    for name in names:
        state = run(name, inputs=options.inputs, seed=options.seed)
        for bad in state["bad"]:
            print(f"{name}: {bad['input']}\n{bad['error']}", file=sys.stderr)
        wrong += len(state["bad"])
    if options.guided and importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: nothing is guided by coverage (pip install .[fuzz])")
    elif options.guided:
        for name in names:
            command = [sys.executable, "-m", "tests.fuzz.guided", name, str(STATE / "corpus" / name)]
            done = subprocess.run(
                [*command, f"-runs={options.guided}", f"-seed={options.seed}", "-max_len=16384", "-rss_limit_mb=1024"],
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            last = [line for line in done.stderr.splitlines() if "cov:" in line or line.startswith("Done")][-2:]
            print(f"{name}, guided: {' / '.join(last)}, exit status {done.returncode}")
            if done.returncode:
                print(done.stderr[-6000:], file=sys.stderr)
                wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
