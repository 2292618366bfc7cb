"""A thread that a timer signals all the time is stopped by PTRACE_INTERRUPT, each time.

dequeue_signal() lets go of the lock while it rearms a POSIX timer; an interrupt that comes just then is cleared by the
signal's own stop ("any trap clears pending STOP trap", kernel/signal.c, ptrace_stop), and has to be asked for again.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from checkpoint.tracee import Tree

PROGRAM = r"""
#include <signal.h>
#include <time.h>
#include <unistd.h>
static void tick(int number) { (void)number; }
int main(void)
{
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN};
    struct itimerspec every = {.it_value.tv_nsec = 20000, .it_interval.tv_nsec = 20000};
    signal(SIGRTMIN, tick);
    if (timer_create(CLOCK_MONOTONIC, &event, &timer) || timer_settime(timer, 0, &every, 0))
        return 1;
    write(1, "up\n", 3);
    for (;;)
        pause();
}
"""


def test_no_interrupt_is_lost(tmp_path: Path) -> None:
    (tmp_path / "ticks.c").write_text(PROGRAM)
    subprocess.run(["gcc", "-O1", "-o", tmp_path / "ticks", tmp_path / "ticks.c"], check=True)
    with subprocess.Popen([tmp_path / "ticks"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        try:
            for _ in range(2000):
                Tree.stop([process.pid]).resume()
        finally:
            process.kill()
