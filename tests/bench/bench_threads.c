/* What the stop cannot do without for each thread, and nothing else: the floor of tests/bench/bench_threads.py.
   Milliseconds. The numbers of requests and register sets are those of the uapi headers. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}
/* Stop threads, read registers and masks, let them go. Negative: a call failed. */
double stops(int *tids, int count) {
    static char general[512], extended[65536];
    struct iovec small = {general, sizeof general}, large = {extended, sizeof extended};
    unsigned long mask;
    int failed = 0, status;
    double began = now();
    for (int i = 0; i < count; i++) {
        failed |= ptrace(PTRACE_SEIZE, tids[i], 0, 0) | ptrace(PTRACE_INTERRUPT, tids[i], 0, 0);
    }
    for (int i = 0; i < count; i++) {
        failed |= waitpid(tids[i], &status, __WALL) != tids[i];
        small.iov_len = sizeof general, large.iov_len = sizeof extended;
        failed |= ptrace(PTRACE_GETREGSET, tids[i], 1, &small) | ptrace(PTRACE_GETREGSET, tids[i], 2, &large);
        failed |= ptrace(PTRACE_GETSIGMASK, tids[i], 8, &mask);
    }
    for (int i = 0; i < count; i++) failed |= ptrace(PTRACE_DETACH, tids[i], 0, 0);
    return failed ? -1 : now() - began;
}
static void *nothing(void *unused) { return unused; }
/* As many threads are born. */
double clones(int count) {
    pthread_t threads[count];
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 1 << 16);
    double began = now();
    for (int i = 0; i < count; i++)
        if (pthread_create(&threads[i], &attributes, nothing, 0)) return -1;
    double took = now() - began;
    for (int i = 0; i < count; i++) pthread_join(threads[i], 0);
    return took;
}
