"""Open files: one module per kind of open file description, one table, three moments.

``table.FileTable`` looks at the descriptors of a tree (*capture*), ``rebuild.Rebuilder`` makes equal ones in this
process, ``install`` gives them to the new processes.  What changes while the processes are stopped (TCP, UDP) is
captured a second time at the very end (*late*) and takes effect when the addresses are here (*release*).
"""
