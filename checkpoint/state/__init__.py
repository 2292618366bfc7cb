"""The state that the kernel keeps for a process or thread, apart from its memory and its open files.

One module per kind, each with a frozen dataclass that has ``capture`` and ``rebuild`` side by side; ``table`` lists
them in the order in which they are rebuilt.  See ``base`` for the contract.
"""
