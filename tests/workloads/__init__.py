"""Verifying clients, and the small servers that go with them; each a program of its own, run in a test host.

A client checks every byte or value that it gets, logs the largest gap between successive replies, and obeys lines on
its standard input (see `tests.workloads.control`).
"""
