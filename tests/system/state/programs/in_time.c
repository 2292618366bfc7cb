/* A thread is in the system call that argv[4] names, which has a time-out, when the cycles come. It must not end before
 * its time, nor with anything but the time-out. */
#define _GNU_SOURCE
#include "case.h"
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>

enum { MILLISECONDS = 300, TICK = 10 /* of the coarse clock that time-outs of sockets and semaphores go by, twice */ };

static const char *name;
static int ends[2], pair[2], epoll_fd, listener, set;
static uint32_t word;
static volatile pid_t tid;
static volatile int returned;
static aio_context_t context;

static int is(const char *other) { return !strcmp(name, other); }

static long long now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000LL + time.tv_nsec / 1000000;
}

static void *in_call(void *unused)
{
	char byte[4096] = {0};
	long long begun = now(), least = MILLISECONDS;
	struct timespec span = {0, MILLISECONDS * 1000000L}, end, rest;
	struct timeval limit = {0, MILLISECONDS * 1000L};
	struct epoll_event event;
	struct pollfd wanted = {ends[0], POLLIN, 0};
	struct io_event finished;
	struct sembuf down = {0, -1, 0};
	fd_set ready;
	sigset_t usr1 = {{1 << (SIGUSR1 - 1)}};
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_nsec += span.tv_nsec;
	if (end.tv_nsec >= 1000000000) {
		end.tv_nsec -= 1000000000;
		end.tv_sec++;
	}
	FD_ZERO(&ready);
	FD_SET(ends[0], &ready);
	pthread_sigmask(SIG_BLOCK, &usr1, NULL);
	tid = syscall(SYS_gettid);
	if (is("nanosleep"))
		CHECK(!nanosleep(&span, NULL));
	else if (is("nanosleep with a rest"))
		CHECK(!nanosleep(&span, &rest));
	else if (is("clock_nanosleep"))
		CHECK(!clock_nanosleep(CLOCK_MONOTONIC, 0, &span, NULL));
	else if (is("clock_nanosleep of boottime"))
		CHECK(!clock_nanosleep(CLOCK_BOOTTIME, 0, &span, NULL));
	else if (is("clock_nanosleep until a time"))
		CHECK(!clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL));
	else if (is("poll"))
		CHECK(!poll(&wanted, 1, MILLISECONDS));
	else if (is("ppoll"))
		CHECK(!ppoll(&wanted, 1, &span, NULL));
	else if (is("select"))
		CHECK(!select(ends[0] + 1, &ready, NULL, NULL, &limit));
	else if (is("pselect"))
		CHECK(!pselect(ends[0] + 1, &ready, NULL, NULL, &span, NULL));
	else if (is("epoll_wait"))
		CHECK(!epoll_wait(epoll_fd, &event, 1, MILLISECONDS));
	else if (is("epoll_pwait"))
		CHECK(!epoll_pwait(epoll_fd, &event, 1, MILLISECONDS, &usr1));
	else if (is("epoll_pwait2"))
		CHECK(!syscall(SYS_epoll_pwait2, epoll_fd, &event, 1, &span, NULL, 8));
	else if (is("sigtimedwait"))
		CHECK(sigtimedwait(&usr1, NULL, &span) == -1 && errno == EAGAIN);
	else if (is("futex"))
		CHECK(syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &span) == -1 && errno == ETIMEDOUT);
	else if (is("futex until a time"))
		CHECK(syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 0, &end, 0, ~0u) == -1 && errno == ETIMEDOUT);
	else if (is("futex_waitv")) {
		struct futex_waitv waiter = {0, (uintptr_t)&word, FUTEX_32 | FUTEX_PRIVATE_FLAG, 0};
		CHECK(syscall(449, &waiter, 1, 0, &end, CLOCK_MONOTONIC) == -1 && errno == ETIMEDOUT);
	} else if (is("io_getevents"))
		CHECK(!syscall(SYS_io_getevents, context, 1, 1, &finished, &span));
	else {
		least -= TICK;
		if (is("semtimedop"))
			CHECK(semtimedop(set, &down, 1, &span) == -1 && errno == EAGAIN);
		else if (is("recv"))
			CHECK(!setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) && recv(pair[0], byte, 1, 0) == -1 && errno == EAGAIN);
		else if (is("accept"))
			CHECK(!setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) && accept(listener, NULL, NULL) == -1 && errno == EAGAIN);
		else if (is("send"))
			CHECK(!setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) && send(pair[0], byte, sizeof byte, 0) == -1 && errno == EAGAIN);
		else
			case_fail("no such call: %s", name);
	}
	if (now() - begun < least)
		case_fail("%s ended after %lld ms of %lld", name, now() - begun, least);
	returned = 1;
	return unused;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	struct epoll_event event = {EPOLLIN, {.u64 = 4711}};
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char byte[4096] = {0};
	CHECK(argc == 5);
	case_begin(argv);
	name = argv[4];
	CHECK(!pipe(ends) && !socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
	CHECK((epoll_fd = epoll_create1(0)) >= 0 && !epoll_ctl(epoll_fd, EPOLL_CTL_ADD, ends[0], &event));
	if (is("accept")) {
		listener = socket(AF_UNIX, SOCK_STREAM, 0);
		CHECK(!bind(listener, (struct sockaddr *)&address, sizeof(sa_family_t)) && !listen(listener, 5));
	}
	if (is("send"))
		while (send(pair[0], byte, 1, MSG_DONTWAIT) > 0)
			;
	if (is("semtimedop"))
		CHECK((set = semget(IPC_PRIVATE, 1, 0600)) >= 0 && !semop(set, (struct sembuf[]){{0, 1, 0}, {0, -1, 0}}, 2));
	if (is("io_getevents"))
		CHECK(!syscall(SYS_io_setup, 1, &context));
	CHECK(!pthread_create(&thread, NULL, in_call, NULL));
	while (!tid)
		case_pause();
	case_ready();
	CHECK(!pthread_join(thread, NULL) && returned);
	case_pass();
}
