/* Five threads that sit in system calls and check how these end: no EINTR that no signal has caused, no sleep that
   is too short, no time-out that is too early. 
   argv[1]: a file of two 64-bit words: calls that ended well, number of the check that failed.
   argv[2], if any: the EINTR of which signal(7) warns is no failure.  */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { WAIT_MS = 60 };
static volatile long *words;
static int eintr_allowed;

static void fail(int number)
{
	words[1] = number * 1000 + errno;
	abort();
}

static void well(void)
{
	__atomic_add_fetch(&words[0], 1, __ATOMIC_SEQ_CST);
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

static void *sleeps(void *unused)
{
	for (;;) {
		double start = now();
		struct timespec t = {0, WAIT_MS * 1000000L};
		if (nanosleep(&t, 0))
			fail(1);
		double took = now() - start;
		if (took < WAIT_MS)
			fail(2);
		if (took > WAIT_MS + 3000)
			fail(3);
		well();
		if (clock_nanosleep(CLOCK_MONOTONIC, 0, &t, &t))
			fail(4);
		well();
	}
}

static void *polls(void *unused)
{
	int p[2];
	if (pipe(p))
		fail(10);
	int epoll = epoll_create1(0);
	struct epoll_event event = {.events = EPOLLIN};
	epoll_ctl(epoll, EPOLL_CTL_ADD, p[0], &event);
	for (;;) {
		struct pollfd one = {p[0], POLLIN, 0};
		double start = now();
		if (poll(&one, 1, WAIT_MS) != 0)
			fail(11);
		if (now() - start < WAIT_MS - 1)
			fail(12);
		well();
		if (epoll_wait(epoll, &event, 1, WAIT_MS) != 0 && !(eintr_allowed && errno == EINTR))
			fail(13);
		well();
		struct timespec t = {0, WAIT_MS * 1000000L};
		sigset_t none;
		sigfillset(&none);
		if (ppoll(&one, 1, &t, &none) != 0)
			fail(14);
		well();
		fd_set set;
		FD_ZERO(&set);
		FD_SET(p[0], &set);
		struct timeval v = {0, WAIT_MS * 1000L};
		if (select(p[0] + 1, &set, 0, 0, &v) != 0)
			fail(15);
		well();
	}
}

static void *receives(void *unused)
{
	int p[2];
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, p))
		fail(20);
	struct timeval v = {0, WAIT_MS * 1000L};
	setsockopt(p[0], SOL_SOCKET, SO_RCVTIMEO, &v, sizeof v);
	for (;;) {
		char c;
		if (recv(p[0], &c, 1, 0) != -1 || (errno != EAGAIN && !(eintr_allowed && errno == EINTR)))
			fail(21);
		well();
	}
}

static void *signals(void *unused)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	for (;;) {
		struct timespec t = {0, WAIT_MS * 1000000L};
		if (sigtimedwait(&set, 0, &t) != -1 || (errno != EAGAIN && !(eintr_allowed && errno == EINTR)))
			fail(30);
		well();
	}
}

static void *futexes(void *unused)
{
	static int word;
	for (;;) {
		struct timespec t = {0, WAIT_MS * 1000000L};
		double start = now();
		if (syscall(SYS_futex, &word, FUTEX_WAIT, 0, &t, 0, 0) != -1 || errno != ETIMEDOUT)
			fail(40);
		if (now() - start < WAIT_MS)
			fail(41);
		well();
	}
}

int main(int argc, char **argv)
{
	int fd = open(argv[1], O_RDWR | O_CREAT, 0600);
	eintr_allowed = argc > 2;
	if (fd < 0 || ftruncate(fd, 4096))
		return 1;
	words = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	sigprocmask(SIG_SETMASK, &set, 0);
	void *(*work[])(void *) = {sleeps, polls, receives, signals, futexes};
	pthread_t thread;
	for (int i = 0; i < 5; i++)
		pthread_create(&thread, 0, work[i], 0);
	for (;;) {
		if (pause() != -1 || errno != EINTR)
			fail(50);
		fail(51);
	}
}
