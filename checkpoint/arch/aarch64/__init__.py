"""aarch64: see :mod:`checkpoint.arch` for what each name means."""
