/* Sends back what it gets: a thread for each connection, which hands every message to a worker by a condition variable
 * and waits for a sleep and for the tick of a POSIX timer before it answers.
 *
 * echo_c PORT ADDRESS...
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct job {
    char data[65536];
    ssize_t length;
    int state; /* 0: none, 1: given, 2: done */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct job *volatile waiting;
static volatile unsigned ticks;

static void on_tick(int number)
{
    (void)number;
    ticks++;
}

static void *work(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!waiting || waiting->state != 1)
            pthread_cond_wait(&changed, &lock);
        double sum = 0; /* floating point in flight */
        for (ssize_t i = 0; i < waiting->length; i++)
            sum += (unsigned char)waiting->data[i] * 0.5;
        double again = 0;
        for (ssize_t i = 0; i < waiting->length; i++)
            again += (unsigned char)waiting->data[i] * 0.5;
        if (sum != again)
            errx(1, "floating point");
        waiting->state = 2;
        pthread_cond_broadcast(&changed);
    }
    return NULL;
}

static void hand_over(struct job *job)
{
    pthread_mutex_lock(&lock);
    while (waiting)
        pthread_cond_wait(&changed, &lock);
    job->state = 1;
    waiting = job;
    pthread_cond_broadcast(&changed);
    while (job->state != 2)
        pthread_cond_wait(&changed, &lock);
    waiting = NULL;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void *serve(void *argument)
{
    int peer = (int)(long)argument, one = 1;
    static __thread struct job job;
    setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    for (;;) {
        struct pollfd wanted = {.fd = peer, .events = POLLIN};
        int ready = poll(&wanted, 1, 60000);
        if (ready < 0 && errno == EINTR)
            errx(1, "poll was interrupted, though this thread blocks all signals");
        job.length = recv(peer, job.data, sizeof job.data, 0);
        if (job.length <= 0)
            break;
        hand_over(&job);
        struct timespec nap = {.tv_nsec = 300000};
        if (nanosleep(&nap, NULL))
            err(1, "nanosleep");
        for (unsigned now = ticks; now == ticks;)
            sched_yield();
        if (send(peer, job.data, job.length, MSG_NOSIGNAL) != job.length)
            break;
    }
    close(peer);
    return NULL;
}

static void *accept_all(void *argument)
{
    int listener = (int)(long)argument;
    for (;;) {
        int peer = accept(listener, NULL, NULL);
        pthread_t thread;
        if (peer < 0)
            err(1, "accept");
        if ((errno = pthread_create(&thread, NULL, serve, (void *)(long)peer)))
            err(1, "pthread_create");
        pthread_detach(thread);
    }
    return NULL;
}

static int listening(const char *address, int port)
{
    int six = strchr(address, ':') != NULL, one = 1;
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    int fd = socket(six ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || inet_pton(six ? AF_INET6 : AF_INET, address, six ? (void *)&v6.sin6_addr : (void *)&v4.sin_addr) != 1)
        err(1, "socket for %s", address);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, six ? (void *)&v6 : (void *)&v4, six ? sizeof v6 : sizeof v4) || listen(fd, 128))
        err(1, "listen on %s", address);
    return fd;
}

int main(int argc, char **argv)
{
    pthread_t thread;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL); /* of the other threads */
    pthread_create(&thread, NULL, work, NULL);
    for (int i = 2; i < argc; i++)
        pthread_create(&thread, NULL, accept_all, (void *)(long)listening(argv[i], atoi(argv[1])));
    signal(SIGRTMIN, on_tick);
    sigemptyset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN};
    struct itimerspec every = {.it_value.tv_nsec = 500000, .it_interval.tv_nsec = 500000};
    if (timer_create(CLOCK_MONOTONIC, &event, &timer) || timer_settime(timer, 0, &every, NULL))
        err(1, "timer");
    for (;;)
        pause();
}
