"""Fuzzing: whatever comes from a file or a wire gives a value or the one documented error.

``make fuzz`` (or ``python -m tests.fuzz``): a million mutated inputs over all targets, resumable and seeded; with
atheris installed (``pip install .[fuzz]``) as many again, guided by coverage.
"""
