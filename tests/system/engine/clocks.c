/* Asks for the time without end, by the functions of the vdso; never backwards. Each thread is one more. */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *words; /* progress, and the number of the check that failed */

static void *ask(void *unused)
{
    struct timespec last = {0}, now;
    struct timeval day;
    unsigned cpu, node;

    (void)unused;
    for (;;) {
        if (clock_gettime(CLOCK_MONOTONIC, &now))
            words[1] = 1;
        if (now.tv_sec < last.tv_sec || (now.tv_sec == last.tv_sec && now.tv_nsec < last.tv_nsec))
            words[1] = 2;
        last = now;
        if (gettimeofday(&day, NULL) || time(NULL) + 1 < day.tv_sec) /* it may be stopped in between */
            words[1] = 3;
        if (getcpu(&cpu, &node) || cpu > 4096)
            words[1] = 4;
        __atomic_add_fetch(&words[0], 1, __ATOMIC_RELAXED);
    }
}

int main(int argc, char **argv)
{
    pthread_t thread;
    int fd = open(argv[1], O_RDWR | O_CREAT, 0600);

    if (argc < 2 || fd < 0 || ftruncate(fd, 4096))
        err(1, "%s", argv[1]);
    words = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (words == MAP_FAILED || pthread_create(&thread, NULL, ask, NULL))
        err(1, "starting");
    ask(NULL);
}
