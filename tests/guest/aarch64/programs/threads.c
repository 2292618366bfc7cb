/* Threads, each in another kind of state of an aarch64 thread, each of which looks whether it still has all of its own.

   A line on stdout for each round of the main thread: how often each of them found all well.  "BAD what", and status 1,
   as soon as one did not.  "sve" is among the names only where the CPU has it, and no argument was given. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { SIMD, SVE, SIGNED, SLEEP, EPOLL, FUTEX, SUSPEND, PIPE, KINDS };
static const char *names[] = {"simd", "sve", "signed", "sleep", "epoll", "futex", "suspend", "pipe"};
static volatile unsigned long rounds[KINDS];
static _Thread_local unsigned long own; /* found by the TLS pointer */

static void bad(const char *what, long value) {
    printf("BAD %s %ld errno %d\n", what, value, errno);
    fflush(stdout);
    _exit(1);
}

static void done(int kind) {
    if (own != rounds[kind]) bad("thread-local", kind);
    own = ++rounds[kind];
}

static void in_background(void) { setpriority(PRIO_PROCESS, syscall(SYS_gettid), 19); }

#define ALL(X) \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) \
    X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31)
#define LOW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define CLOBBER_V(n) "v" #n,

static void pattern(unsigned char *where, size_t size, unsigned long seed) {
    for (size_t i = 0; i < size; i++) where[i] = (unsigned char)((i * 167 + seed * 31 + (i >> 7)) | 1);
}

static void *simd(void *unused) {
    static unsigned char in[512], out[512];
    in_background();
    for (;;) {
        unsigned long spins = 400000, control = 3UL << 22, was; /* round towards zero */
        pattern(in, sizeof in, rounds[SIMD]);
        __asm__ volatile("msr fpcr, %[control]\n"
#define LOAD(n) "ldr q" #n ", [%[in], 16 * " #n "]\n"
                         ALL(LOAD) "1: subs %[spins], %[spins], 1\n b.ne 1b\n"
#define STORE(n) "str q" #n ", [%[out], 16 * " #n "]\n"
                         ALL(STORE) "mrs %[was], fpcr\n msr fpcr, xzr\n"
                         : [spins] "+r"(spins), [was] "=&r"(was)
                         : [in] "r"(in), [out] "r"(out), [control] "r"(control)
                         : ALL(CLOBBER_V) "memory", "cc");
        if (memcmp(in, out, sizeof in) || was != control) bad("simd", was);
        done(SIMD);
    }
    return unused;
}

__attribute__((target("+sve"))) static void *sve(void *unused) {
    static unsigned char in[32 * 256], out[32 * 256], pin[17 * 32], pout[17 * 32];
    in_background();
    for (;;) {
        unsigned long spins = 400000, length;
        pattern(in, sizeof in, rounds[SVE]);
        pattern(pin, sizeof pin, rounds[SVE] + 1);
        __asm__ volatile("rdvl %0, 1" : "=r"(length));
        memset(pin + 16 * length / 8, 0x0f, length / 8); /* FFR has ones, then zeros */
        memset(pin + 16 * length / 8 + 1, 0, length / 8 - 1);
        __asm__ volatile("ldr p0, [%[pin], 16, mul vl]\n wrffr p0.b\n"
#define LOADZ(n) "ldr z" #n ", [%[in], " #n ", mul vl]\n"
#define LOADP(n) "ldr p" #n ", [%[pin], " #n ", mul vl]\n"
                         ALL(LOADZ) LOW(LOADP) "1: subs %[spins], %[spins], 1\n b.ne 1b\n"
#define STOREZ(n) "str z" #n ", [%[out], " #n ", mul vl]\n"
#define STOREP(n) "str p" #n ", [%[pout], " #n ", mul vl]\n"
                         ALL(STOREZ) LOW(STOREP) "rdffr p0.b\n str p0, [%[pout], 16, mul vl]\n"
                         : [spins] "+r"(spins)
                         : [in] "r"(in), [out] "r"(out), [pin] "r"(pin), [pout] "r"(pout)
                         : ALL(CLOBBER_V) "memory", "cc");
        if (memcmp(in, out, 32 * length)) bad("sve z", length);
        if (memcmp(pin, pout, 17 * length / 8)) bad("sve p", length);
        done(SVE);
    }
    return unused;
}

/* return addresses on the stack are signed with the process's keys */
__attribute__((noinline, target("branch-protection=pac-ret+leaf"))) static unsigned long deep(unsigned long level) {
    if (!level) {
        unsigned long spins = 400000;
        __asm__ volatile("1: subs %0, %0, 1\n b.ne 1b" : "+r"(spins) : : "cc");
        return 0;
    }
    return deep(level - 1) + level;
}

static void *signing(void *unused) {
    in_background();
    for (;;) {
        unsigned long sum = deep(60);
        if (sum != 60 * 61 / 2) bad("signed", sum);
        done(SIGNED);
    }
    return unused;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void *sleeping(void *unused) {
    for (;;) {
        struct timespec half = {0, 500000000};
        double from = now();
        if (nanosleep(&half, NULL)) bad("nanosleep", 0);
        if (now() - from < 0.5) bad("nanosleep too short", (now() - from) * 1e6);
        done(SLEEP);
    }
    return unused;
}

static void *polling(void *unused) {
    int set = epoll_create1(0), ends[2];
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0x1234567890abcdef}, got;
    if (pipe(ends) || epoll_ctl(set, EPOLL_CTL_ADD, ends[0], &event)) bad("epoll_ctl", 0);
    for (;;) {
        int found = epoll_wait(set, &got, 1, 700);
        if (found) bad("epoll_wait", found);
        if (write(ends[1], "x", 1) != 1) bad("write", 0);
        found = epoll_wait(set, &got, 1, -1);
        if (found != 1 || got.data.u64 != event.data.u64) bad("epoll_wait", found);
        char c;
        if (read(ends[0], &c, 1) != 1 || c != 'x') bad("read", c);
        done(EPOLL);
    }
    return unused;
}

static void *waiting(void *unused) {
    static uint32_t word = 7;
    for (;;) {
        struct timespec time = {0, 600000000};
        double from = now();
        long found = syscall(SYS_futex, &word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, 7, &time, NULL, 0);
        if (found != -1 || errno != ETIMEDOUT) bad("futex", found);
        if (now() - from < 0.6) bad("futex too short", (now() - from) * 1e6);
        done(FUTEX);
    }
    return unused;
}

static void handler(int number) { (void)number; }

static void *suspending(void *unused) {
    sigset_t open;
    sigfillset(&open);
    sigdelset(&open, SIGALRM);
    for (;;) {
        /* one shot: if its handler ran and the call went on all the same, it would wait for ever */
        struct itimerval once = {.it_value = {0, 150000}};
        if (setitimer(ITIMER_REAL, &once, NULL)) bad("setitimer", 0);
        if (sigsuspend(&open) != -1 || errno != EINTR) bad("sigsuspend", errno);
        done(SUSPEND);
    }
    return unused;
}

static int ends[2];

static void *reading(void *unused) {
    for (unsigned long wanted = 0;; wanted++) {
        unsigned long number;
        if (read(ends[0], &number, sizeof number) != sizeof number || number != wanted) bad("pipe", number);
        done(PIPE);
    }
    return unused;
}

int main(int argc, char **argv) {
    void *(*kinds[])(void *) = {simd, sve, signing, sleeping, polling, waiting, suspending, reading};
    int has_sve = argc < 2 && (getauxval(AT_HWCAP) >> 22) & 1;
    (void)argv;
    sigset_t alarm;
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    if (pthread_sigmask(SIG_BLOCK, &alarm, NULL) || pipe(ends)) bad("setup", 0);
    struct sigaction action = {.sa_handler = handler};
    sigaction(SIGALRM, &action, NULL);
    pthread_attr_t small; /* an emulated machine looks through all of it, page by page */
    if (pthread_attr_init(&small) || pthread_attr_setstacksize(&small, 128 << 10)) bad("setup", 1);
    for (int kind = 0; kind < KINDS; kind++) {
        pthread_t thread;
        if ((kind != SVE || has_sve) && pthread_create(&thread, &small, kinds[kind], NULL)) bad("thread", kind);
    }
    for (unsigned long n = 0;; n++) {
        struct timespec pause = {0, 200000000};
        if (write(ends[1], &n, sizeof n) != sizeof n) bad("write", 0);
        if (clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL)) bad("clock_nanosleep", 0);
        printf("round %lu", n);
        for (int kind = 0; kind < KINDS; kind++)
            if (kind != SVE || has_sve) printf(" %s %lu", names[kind], rounds[kind]);
        printf("\n");
        fflush(stdout);
    }
}
