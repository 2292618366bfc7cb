/* handler FILE asks|counts: asks for the time without end, or only counts; on SIGUSR1 a handler runs that stays until
 * SIGUSR2. */
#include <err.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *words; /* progress, and how often a handler has begun */

static void stay(int number)
{
    sigset_t until;

    (void)number;
    words[1]++;
    sigfillset(&until);
    sigdelset(&until, SIGUSR2);
    sigsuspend(&until);
}

static void leave(int number)
{
    (void)number;
}

int main(int argc, char **argv)
{
    struct timespec now;
    int fd = open(argv[1], O_RDWR | O_CREAT, 0600);

    if (argc < 3 || fd < 0 || ftruncate(fd, 4096))
        err(1, "%s", argv[1]);
    words = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (words == MAP_FAILED || signal(SIGUSR1, stay) == SIG_ERR || signal(SIGUSR2, leave) == SIG_ERR)
        err(1, "starting");
    for (;;) {
        if (argv[2][0] == 'a')
            clock_gettime(CLOCK_MONOTONIC, &now);
        words[0]++;
    }
}
