/* A thread is in the system call that argv[4] names when the cycles come. It must not return EINTR, but what it waits
 * for, which comes afterwards. */
#define _GNU_SOURCE
#include "case.h"
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/sendfile.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

static const char *name;
static int ends[2], pair[2], full[2], epoll_fd, event_fd, locked, other_lock, child, listener, watch, set, queue;
static uint32_t word;
static char fifo[4096], folder[4096];
static aio_context_t context;
static struct sockaddr_un address = {.sun_family = AF_UNIX};
struct message {
	long type;
	char text[1];
};
static volatile pid_t tid;
static volatile int returned;
static sigset_t usr1;
static const struct timespec long_time = {1000, 0};

static int is(const char *other) { return !strcmp(name, other); }

/* Whether the signal is not blocked, but handled. */
static int handled(void) { return is("pause") || strstr(name, "and a signal") || strstr(name, "and another signal"); }

static struct timespec at_last(void)
{
	struct timespec end;
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += 1000;
	return end;
}

static void *in_call(void *unused)
{
	char byte = 0;
	struct epoll_event event;
	struct pollfd wanted = {ends[0], POLLIN, 0};
	struct timespec end = at_last(), rest = long_time;
	struct timeval limit = {1000, 0};
	fd_set wanted_set;
	struct message message;
	struct sembuf down = {0, -1, 0};
	struct io_event finished;
	struct mmsghdr several = {.msg_hdr = {.msg_iov = &(struct iovec){&byte, 1}, .msg_iovlen = 1}};
	struct signalfd_siginfo told;
	char room[4096];
	siginfo_t info;
	int status = 0;
	FD_ZERO(&wanted_set);
	FD_SET(ends[0], &wanted_set);
	tid = syscall(SYS_gettid);
	if (is("read"))
		CHECK(read(ends[0], &byte, 1) == 1 && byte == 'x');
	else if (is("readv"))
		CHECK(readv(ends[0], &(struct iovec){&byte, 1}, 1) == 1 && byte == 'x');
	else if (is("write"))
		CHECK(write(ends[1], "y", 1) == 1);
	else if (is("recv"))
		CHECK(recv(pair[0], &byte, 1, 0) == 1 && byte == 'x');
	else if (is("recvmsg"))
		CHECK(recvmsg(pair[0], &(struct msghdr){.msg_iov = &(struct iovec){&byte, 1}, .msg_iovlen = 1}, 0) == 1);
	else if (is("recv with a time-out"))
		CHECK(!setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) && recv(pair[0], &byte, 1, 0) == 1);
	else if (is("poll"))
		CHECK(poll(&wanted, 1, -1) == 1 && wanted.revents == POLLIN);
	else if (is("poll with a time-out"))
		CHECK(poll(&wanted, 1, 1000000) == 1 && wanted.revents == POLLIN);
	else if (is("ppoll"))
		CHECK(ppoll(&wanted, 1, &rest, &usr1) == 1 && wanted.revents == POLLIN);
	else if (is("select"))
		CHECK(select(ends[0] + 1, &wanted_set, NULL, NULL, &limit) == 1 && FD_ISSET(ends[0], &wanted_set) && limit.tv_sec < 1000);
	else if (is("pselect"))
		CHECK(pselect(ends[0] + 1, &wanted_set, NULL, NULL, &long_time, &usr1) == 1);
	else if (is("epoll_wait"))
		CHECK(epoll_wait(epoll_fd, &event, 1, -1) == 1 && event.data.u64 == 4711);
	else if (is("epoll_wait with a time-out"))
		CHECK(epoll_wait(epoll_fd, &event, 1, 1000000) == 1 && event.data.u64 == 4711);
	else if (is("epoll_pwait2"))
		CHECK(syscall(SYS_epoll_pwait2, epoll_fd, &event, 1, &long_time, &usr1, 8) == 1);
	else if (is("eventfd"))
		CHECK(read(event_fd, &event.data.u64, 8) == 8 && event.data.u64 == 1);
	else if (is("futex"))
		CHECK(!syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL) || errno == EAGAIN);
	else if (is("futex with a time-out"))
		CHECK(!syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &long_time) || errno == EAGAIN);
	else if (is("futex until a time"))
		CHECK(!syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 0, &end, 0, ~0u) || errno == EAGAIN);
	else if (is("waitpid"))
		CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 5);
	else if (is("waitid"))
		CHECK(!waitid(P_PID, child, &info, WEXITED) && info.si_status == 5);
	else if (is("flock"))
		CHECK(!flock(other_lock, LOCK_EX));
	else if (is("record lock"))
		CHECK(!fcntl(other_lock, F_OFD_SETLKW, &(struct flock){.l_type = F_WRLCK}));
	else if (is("sigwaitinfo"))
		CHECK(sigwaitinfo(&usr1, &info) == SIGUSR1 && info.si_pid == getpid());
	else if (is("sigtimedwait"))
		CHECK(sigtimedwait(&usr1, &info, &long_time) == SIGUSR1);
	else if (is("pause"))
		CHECK(pause() == -1 && errno == EINTR && returned == 1);
	else if (is("sigsuspend"))
		CHECK(sigsuspend(&(sigset_t){0}) == -1 && errno == EINTR && returned == 1);
	else if (is("nanosleep and a signal"))
		/* the kernel writes down what is left */
		CHECK(nanosleep(&long_time, &rest) == -1 && errno == EINTR && returned == 1 && rest.tv_sec < 1000 && rest.tv_sec > 800);
	else if (is("poll and a signal"))
		CHECK(poll(&wanted, 1, 1000000) == -1 && errno == EINTR && returned == 1);
	else if (is("read and a signal"))
		CHECK(read(ends[0], &byte, 1) == -1 && errno == EINTR && returned == 1);
	else if (is("clock_nanosleep and a signal"))
		CHECK(clock_nanosleep(CLOCK_MONOTONIC, 0, &long_time, &rest) == EINTR && returned == 1 && rest.tv_sec < 1000 && rest.tv_sec > 800);
	else if (is("clock_nanosleep until a time and a signal"))
		CHECK(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL) == EINTR && returned == 1);
	else if (is("epoll_wait and a signal"))
		CHECK(epoll_wait(epoll_fd, &event, 1, 1000000) == -1 && errno == EINTR && returned == 1);
	else if (is("sigtimedwait and another signal"))
		CHECK(sigtimedwait(&(sigset_t){{1 << (SIGUSR2 - 1)}}, &info, &long_time) == -1 && errno == EINTR && returned == 1);
	else if (is("recv with a time-out and a signal"))
		CHECK(!setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) && recv(pair[0], &byte, 1, 0) == -1 && errno == EINTR && returned == 1);
	else if (is("epoll_pwait"))
		CHECK(epoll_pwait(epoll_fd, &event, 1, 1000000, &usr1) == 1 && event.data.u64 == 4711);
	else if (is("accept"))
		CHECK(accept(listener, NULL, NULL) >= 0);
	else if (is("accept with a time-out"))
		CHECK(!setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) && accept4(listener, NULL, NULL, SOCK_CLOEXEC) >= 0);
	else if (is("send"))
		CHECK(send(full[1], room, sizeof room, 0) == sizeof room);
	else if (is("send with a time-out"))
		CHECK(!setsockopt(full[1], SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) && send(full[1], room, sizeof room, 0) == sizeof room);
	else if (is("sendfile with a time-out"))
		CHECK(!setsockopt(full[1], SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) && sendfile(full[1], locked, NULL, 1) == 1);
	else if (is("recvmmsg with a time-out"))
		CHECK(!setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) && recvmmsg(pair[0], &several, 1, 0, NULL) == 1);
	else if (is("splice"))
		CHECK(splice(ends[0], NULL, pair[1], NULL, 1, 0) == 1);
	else if (is("semop"))
		CHECK(!semop(set, &down, 1));
	else if (is("semtimedop"))
		CHECK(!semtimedop(set, &down, 1, &long_time));
	else if (is("msgrcv"))
		CHECK(msgrcv(queue, &message, 1, 7, 0) == 1 && message.text[0] == 'x');
	else if (is("io_getevents"))
		CHECK(syscall(SYS_io_getevents, context, 1, 1, &finished, NULL) == 1);
	else if (is("io_getevents with a time-out"))
		CHECK(syscall(SYS_io_getevents, context, 1, 1, &finished, &long_time) == 1);
	else if (is("inotify"))
		CHECK(read(watch, room, sizeof room) >= (ssize_t)sizeof(struct inotify_event));
	else if (is("signalfd"))
		CHECK(read(signalfd(-1, &usr1, 0), &told, sizeof told) == sizeof told && told.ssi_signo == SIGUSR1);
	else if (is("open of a fifo"))
		CHECK(open(fifo, O_RDONLY) >= 0);
	else if (is("futex of priority inheritance"))
		CHECK(!syscall(SYS_futex, &word, FUTEX_LOCK_PI_PRIVATE, 0, NULL) && (word & FUTEX_TID_MASK) == (uint32_t)tid);
	else if (is("futex_waitv"))
		CHECK(!syscall(449, &(struct futex_waitv){0, (uintptr_t)&word, FUTEX_32 | FUTEX_PRIVATE_FLAG, 0}, 1, 0, &end, CLOCK_MONOTONIC));
	else
		case_fail("no such call: %s", name);
	sigset_t now;
	CHECK(!pthread_sigmask(SIG_BLOCK, NULL, &now) && sigismember(&now, SIGUSR1) == !handled());
	returned = 2;
	return unused;
}

static void handler(int number)
{
	(void)number;
	returned = 1;
}

/* What the call waits for. */
static void let_go(pthread_t thread)
{
	char byte[1 << 16];
	struct message message = {7, "x"};
	struct iocb request = {.aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = open("/dev/null", O_RDONLY)}, *requests = &request;
	if (handled() || is("sigsuspend") || is("sigwaitinfo") || is("sigtimedwait") || is("signalfd"))
		CHECK(!pthread_kill(thread, SIGUSR1));
	else if (!strncmp(name, "accept", 6))
		CHECK(!connect(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&address, sizeof address));
	else if (!strncmp(name, "sem", 3))
		CHECK(!semop(set, &(struct sembuf){0, 1, 0}, 1));
	else if (is("msgrcv"))
		CHECK(!msgsnd(queue, &message, 1, 0));
	else if (!strncmp(name, "io_getevents", 12))
		CHECK(syscall(SYS_io_submit, context, 1, &requests) == 1);
	else if (is("inotify"))
		CHECK(!mkdir(strcat(folder, "/new"), 0700));
	else if (is("open of a fifo"))
		CHECK(open(fifo, O_WRONLY) >= 0);
	else if (!strncmp(name, "send", 4))
		while (!returned)
			recv(full[0], byte, sizeof byte, MSG_DONTWAIT);
	else if (is("futex of priority inheritance"))
		CHECK(!syscall(SYS_futex, &word, FUTEX_UNLOCK_PI_PRIVATE, 0, NULL));
	else if (is("futex_waitv") || is("futex") || is("futex with a time-out") || is("futex until a time")) {
		word = 1;
		syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1);
	} else if (is("write"))
		CHECK(read(ends[0], byte, sizeof byte) > 0);
	else if (is("flock"))
		CHECK(!flock(locked, LOCK_UN));
	else if (is("record lock"))
		CHECK(!fcntl(locked, F_OFD_SETLK, &(struct flock){.l_type = F_UNLCK}));
	else if (is("waitpid") || is("waitid"))
		CHECK(!kill(child, SIGUSR2));
	else if (is("eventfd"))
		CHECK(write(event_fd, &(uint64_t){1}, 8) == 8);
	else if (!strncmp(name, "recv", 4))
		CHECK(send(pair[1], "x", 1, 0) == 1);
	else
		CHECK(write(ends[1], "x", 1) == 1);
}

static int asleep(void)
{
	char path[64], line[512];
	snprintf(path, sizeof path, "/proc/self/task/%d/stat", tid);
	FILE *file = fopen(path, "r");
	CHECK(file && fgets(line, sizeof line, file));
	fclose(file);
	return strrchr(line, ')')[2] == 'S';
}

static void child_exits(int number)
{
	(void)number;
	_exit(5);
}

int main(int argc, char **argv)
{
	pthread_t thread;
	struct sigaction action = {.sa_handler = handler};
	struct epoll_event event = {EPOLLIN, {.u64 = 4711}};
	char path[4096];
	CHECK(argc == 5);
	case_begin(argv);
	name = argv[4];
	CHECK(!pipe(ends) && !socketpair(AF_UNIX, SOCK_STREAM, 0, pair) && (event_fd = eventfd(0, 0)) >= 0);
	CHECK((epoll_fd = epoll_create1(0)) >= 0 && !epoll_ctl(epoll_fd, EPOLL_CTL_ADD, ends[0], &event));
	snprintf(path, sizeof path, "%s/lock", argv[3]);
	CHECK((locked = open(path, O_RDWR | O_CREAT, 0600)) >= 0 && (other_lock = open(path, O_RDWR)) >= 0);
	snprintf(fifo, sizeof fifo, "%s/fifo", argv[3]);
	snprintf(folder, sizeof folder, "%s", argv[3]);
	CHECK(snprintf(address.sun_path, sizeof address.sun_path, "%s/socket", argv[3]) < (int)sizeof address.sun_path);
	CHECK(!mkfifo(fifo, 0600) && write(locked, "x", 1) == 1 && !lseek(locked, 0, SEEK_SET));
	if (!strncmp(name, "accept", 6)) {
		listener = socket(AF_UNIX, SOCK_STREAM, 0);
		CHECK(!bind(listener, (struct sockaddr *)&address, sizeof address) && !listen(listener, 5));
	}
	if (!strncmp(name, "send", 4)) {
		/* of datagrams so many wait, however long they are */
		CHECK(!socketpair(AF_UNIX, SOCK_DGRAM, 0, full));
		while (send(full[1], path, 1, MSG_DONTWAIT) > 0)
			;
	}
	/* used once, so that it is known whose it is */
	if (!strncmp(name, "sem", 3))
		CHECK((set = semget(IPC_PRIVATE, 1, 0600)) >= 0 && !semop(set, (struct sembuf[]){{0, 1, 0}, {0, -1, 0}}, 2));
	if (is("msgrcv"))
		CHECK((queue = msgget(IPC_PRIVATE, 0600)) >= 0 && !msgsnd(queue, &(struct message){1, "y"}, 1, 0));
	if (!strncmp(name, "io_getevents", 12))
		CHECK(!syscall(SYS_io_setup, 1, &context));
	if (is("inotify"))
		CHECK((watch = inotify_init()) >= 0 && inotify_add_watch(watch, argv[3], IN_CREATE) >= 0);
	if (is("futex of priority inheritance"))
		CHECK(!syscall(SYS_futex, &word, FUTEX_LOCK_PI_PRIVATE, 0, NULL));
	if (is("flock"))
		CHECK(!flock(locked, LOCK_EX));
	if (is("record lock"))
		CHECK(!fcntl(locked, F_OFD_SETLK, &(struct flock){.l_type = F_WRLCK}));
	if (is("write")) {
		CHECK(!fcntl(ends[1], F_SETFL, O_NONBLOCK));
		while (write(ends[1], path, sizeof path) > 0)
			;
		CHECK(!fcntl(ends[1], F_SETFL, 0));
	}
	if (is("waitpid") || is("waitid")) {
		signal(SIGUSR2, child_exits);
		if (!(child = fork()))
			for (;;)
				pause();
	}
	CHECK(!sigaction(SIGUSR1, &action, NULL));
	sigaddset(&usr1, SIGUSR1);
	if (!handled())
		pthread_sigmask(SIG_BLOCK, &usr1, NULL);
	CHECK(!pthread_create(&thread, NULL, in_call, NULL));
	while (!tid || !asleep())
		case_pause();
	case_ready();
	CHECK(!returned);
	let_go(thread);
	CHECK(!pthread_join(thread, NULL) && returned == 2);
	case_pass();
}
