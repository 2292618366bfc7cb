"""The Linux side of tcpstate: ABI constants and structs, batches of system calls, machine code."""
