"""System V semaphores and message queues: what processes share and none has open. See checkpoint.ipc.table."""
