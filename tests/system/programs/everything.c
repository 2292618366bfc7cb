/* A server that rests: threads, signals, timers and open files of many kinds, and one connection. argv: address port. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define CHECK(what)                                                                              \
	do {                                                                                     \
		errno = 0;                                                                       \
		if ((long)(what) == -1) {                                                        \
			fprintf(stderr, "line %d: %s: %s\n", __LINE__, #what, strerror(errno)); \
			_exit(1);                                                                \
		}                                                                                \
	} while (0)

static pthread_barrier_t ready;

static void handler(int signal) { (void)signal; }

static void *thread(void *number)
{
	sigset_t set;
	stack_t stack = { .ss_sp = malloc(65536), .ss_size = 65536 };
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + (int)(long)number);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	CHECK(sigaltstack(&stack, NULL));
	pthread_barrier_wait(&ready);
	for (;;)
		pause();
}

static void far_away(struct itimerspec *when)
{
	memset(when, 0, sizeof *when);
	when->it_value.tv_sec = when->it_interval.tv_sec = 86400;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = handler, .sa_flags = SA_RESTART | SA_ONSTACK };
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR2 };
	struct itimerval interval = { { 86400, 0 }, { 86400, 0 } };
	struct sockaddr_in name = { .sin_family = AF_INET, .sin_port = htons(atoi(argv[2])) };
	struct sockaddr_un local = { AF_UNIX, "local" };
	struct rlimit limit = { 123, 456 };
	struct itimerspec when;
	int pipes[2], pair[2], fd, poller, one = 1;
	pthread_t threads[2];
	sigset_t blocked;
	timer_t timer;
	char *memory;
	(void)argc;

	CHECK(sigaction(SIGUSR1, &action, NULL));
	CHECK(sigaction(SIGUSR2, &action, NULL));
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGHUP);
	CHECK(sigprocmask(SIG_BLOCK, &blocked, NULL));
	CHECK(kill(getpid(), SIGHUP)); /* stays pending */
	far_away(&when);
	CHECK(timer_create(CLOCK_MONOTONIC, &event, &timer));
	CHECK(timer_settime(timer, 0, &when, NULL));
	CHECK(setitimer(ITIMER_REAL, &interval, NULL));
	CHECK(setrlimit(RLIMIT_NOFILE, &limit));
	umask(027);

	CHECK(poller = epoll_create1(EPOLL_CLOEXEC));
	struct epoll_event watch = { EPOLLIN | EPOLLET, { .u64 = 0x1234567890abcdef } };
	CHECK(pipe2(pipes, O_NONBLOCK));
	CHECK(write(pipes[1], "in the pipe", 11));
	CHECK(epoll_ctl(poller, EPOLL_CTL_ADD, pipes[0], &watch));
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	CHECK(write(pair[0], "in the pair", 11));
	CHECK(fd = eventfd(7, EFD_NONBLOCK | EFD_CLOEXEC));
	CHECK(epoll_ctl(poller, EPOLL_CTL_ADD, fd, &watch));
	CHECK(fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC));
	CHECK(timerfd_settime(fd, 0, &when, NULL));
	CHECK(signalfd(-1, &blocked, SFD_NONBLOCK));
	CHECK(fd = memfd_create("everything", MFD_ALLOW_SEALING));
	CHECK(ftruncate(fd, 1 << 20));
	CHECK(pwrite(fd, "in the memfd", 12, 4096));
	CHECK((long)mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
	CHECK(fd = open("deleted", O_RDWR | O_CREAT | O_APPEND, 0600));
	CHECK(write(fd, "in a deleted file", 17));
	CHECK(unlink("deleted"));
	CHECK(fd = open("kept", O_RDWR | O_CREAT, 0600));
	CHECK(write(fd, "in a file", 9));
	CHECK(dup2(fd, 100));
	CHECK(fd = open("/dev/null", O_RDONLY | O_CLOEXEC));
	CHECK(open(".", O_RDONLY | O_DIRECTORY));
	CHECK(fd = socket(AF_UNIX, SOCK_SEQPACKET, 0));
	CHECK(bind(fd, (struct sockaddr *)&local, sizeof local));
	CHECK(listen(fd, 5));
	CHECK((long)(memory = mmap(NULL, 64 << 10, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)));
	strcpy(memory, "in shared memory");
	CHECK((long)(memory = mmap(NULL, 64 << 10, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
	strcpy(memory, "in private memory");
	CHECK(mprotect(memory, 4096, PROT_NONE));

	CHECK(fd = socket(AF_INET, SOCK_STREAM, 0));
	CHECK(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
	inet_pton(AF_INET, argv[1], &name.sin_addr);
	CHECK(bind(fd, (struct sockaddr *)&name, sizeof name));
	CHECK(listen(fd, 5));
	CHECK(epoll_ctl(poller, EPOLL_CTL_ADD, fd, &watch));
	puts("listening");
	fflush(stdout);
	CHECK(fd = accept(fd, NULL, NULL));
	CHECK(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one));
	CHECK(setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one));
	CHECK(epoll_ctl(poller, EPOLL_CTL_ADD, fd, &watch));

	pthread_barrier_init(&ready, NULL, 3);
	for (long i = 0; i < 2; i++)
		CHECK(-pthread_create(&threads[i], NULL, thread, (void *)i));
	pthread_barrier_wait(&ready);
	puts("ready");
	fflush(stdout);
	for (;;)
		pause();
}
