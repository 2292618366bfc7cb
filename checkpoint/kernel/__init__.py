"""Kernel ABI of the process engine: one module per subsystem, constants and structures beside the calls."""
