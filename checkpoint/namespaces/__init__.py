"""Namespaces of a process tree: what is its own, captured and made again. :mod:`checkpoint.namespaces.spaces`."""
