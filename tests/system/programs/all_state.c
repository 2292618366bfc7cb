/* A process with three threads that has some state of every kind, and waits. argv[1]: whose credentials it ends with. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
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

enum { NET_RAW = 13, NET_BIND = 10, SETPCAP = 8 };
static const char *variant;
static pthread_barrier_t made, settled;
static pid_t tids[2];

static void handler(int signal) { (void)signal; }

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);
	CHECK(fd);
	CHECK(write(fd, text, strlen(text)));
	CHECK(close(fd));
}

static void install_filter(unsigned number, unsigned error, unsigned flags)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof code / sizeof *code, code };
	CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program));
}

static void set_caps(uint64_t effective, uint64_t permitted, uint64_t inheritable)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2] = {
		{ effective, permitted, inheritable },
		{ effective >> 32, permitted >> 32, inheritable >> 32 },
	};
	CHECK(syscall(SYS_capset, &head, data));
}

/* Raw calls: each thread has credentials of its own. */
static void become_user(unsigned base)
{
	gid_t groups[] = { base + 20, base + 21 };
	uint64_t keep = 1ull << NET_RAW | 1ull << NET_BIND;
	CHECK(prctl(PR_SET_SECUREBITS, 0x10 | 0x4)); /* keep capabilities over setresuid */
	CHECK(syscall(SYS_setgroups, 2, groups));
	CHECK(syscall(SYS_setresgid, base + 1, base + 2, base + 3));
	CHECK(syscall(SYS_setresuid, base + 11, base + 12, base + 13));
	syscall(SYS_setfsuid, base + 14);
	syscall(SYS_setfsgid, base + 4);
	set_caps(keep | 1ull << SETPCAP, keep | 1ull << SETPCAP, keep);
	CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, NET_RAW, 0, 0));
	for (int bit = 20; bit < 30; bit++)
		CHECK(prctl(PR_CAPBSET_DROP, bit));
	CHECK(prctl(PR_SET_SECUREBITS, 0x4 | 0x8 | 0x40));
	set_caps(1ull << NET_BIND, keep, keep);
}

static void thread_state(int number)
{
	static char stacks[3][65536];
	char name[16];
	cpu_set_t cpus;
	stack_t stack = { .ss_sp = stacks[number], .ss_size = sizeof stacks[number] - 4096 * number };
	sigset_t mask;

	snprintf(name, sizeof name, "state %d \xff", number);
	CHECK(prctl(PR_SET_NAME, name));
	if (number != 1)
		CHECK(sigaltstack(&stack, NULL));
	CHECK(prctl(PR_SET_TIMERSLACK, 50001 + number));
	CHECK(setpriority(PRIO_PROCESS, 0, 3 + number));
	CHECK(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | (2 + number)));
	if (number == 1) {
		CPU_ZERO(&cpus);
		CPU_SET(0, &cpus);
		CHECK(sched_setaffinity(0, sizeof cpus, &cpus));
		CHECK(sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){ 0 }));
	}
	if (number == 2)
		CHECK(sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &(struct sched_param){ 7 }));
	CHECK(syscall(SYS_set_mempolicy, 1 + number % 2, &(unsigned long){ 1 }, 65));
	CHECK(prctl(PR_MCE_KILL, PR_MCE_KILL_SET, number, 0, 0));
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR1);
	sigaddset(&mask, SIGUSR2);
	sigaddset(&mask, SIGURG);
	sigaddset(&mask, SIGRTMIN + 5);
	sigaddset(&mask, SIGRTMIN + number);
	CHECK(pthread_sigmask(SIG_BLOCK, &mask, NULL));
	if (number == 2)
		CHECK(personality(ADDR_NO_RANDOMIZE));
}

static void last_state(int number)
{
	if (!strcmp(variant, "user")) {
		become_user(1000 * (number + 1));
		CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
		install_filter(SYS_getcwd, 13, 0);
		install_filter(SYS_uname, 14 + number, SECCOMP_FILTER_FLAG_LOG);
		if (number == 1)
			install_filter(SYS_sysinfo, 15, 0);
	} else if (!strcmp(variant, "container")) {
		if (number == 0) {
			install_filter(SYS_getcwd, 13, SECCOMP_FILTER_FLAG_TSYNC);
			install_filter(SYS_getppid, 1, SECCOMP_FILTER_FLAG_TSYNC);
		}
		pthread_barrier_wait(&settled);
		become_user(5000);
	}
	CHECK(prctl(PR_SET_DUMPABLE, 1));
	if (number == 1)
		CHECK(prctl(PR_SET_PDEATHSIG, 0));
}

static void *thread(void *arg)
{
	int number = (int)(intptr_t)arg;
	thread_state(number);
	tids[number - 1] = syscall(SYS_gettid);
	pthread_barrier_wait(&made);
	pthread_barrier_wait(&settled);
	last_state(number);
	pthread_barrier_wait(&settled);
	for (;;)
		syscall(SYS_ppoll, NULL, 0, NULL, NULL, 0);
	return NULL;
}

static void process_state(const char *directory)
{
	struct sigaction action = { .sa_handler = handler, .sa_flags = SA_RESTART | SA_ONSTACK };
	struct itimerval real = { { 0, 0 }, { 5000, 0 } }, prof = { { 7, 0 }, { 6000, 0 } };
	struct rlimit files = { 55, 66 }, core = { 0, 0 };

	CHECK(chdir(directory));
	umask(0123);
	CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1));
	CHECK(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	CHECK(syscall(SYS_membarrier, 16, 0, 0));
	sigaddset(&action.sa_mask, SIGTERM);
	CHECK(sigaction(SIGUSR1, &action, NULL));
	CHECK(sigaction(SIGRTMAX, &action, NULL));
	CHECK(signal(SIGHUP, SIG_IGN) == SIG_ERR ? -1 : 0);
	CHECK(setitimer(ITIMER_REAL, &real, NULL));
	CHECK(setitimer(ITIMER_PROF, &prof, NULL));
	write_file("/proc/self/oom_score_adj", "321");
	write_file("/proc/self/coredump_filter", "0x13");
	CHECK(setrlimit(RLIMIT_NOFILE, &files));
	CHECK(setrlimit(RLIMIT_CORE, &core));
}

static void timers(void)
{
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 9, .sigev_value.sival_ptr = &event };
	struct itimerspec spec = { { 11, 500 }, { 3000, 0 } };
	int id;

	CHECK(syscall(SYS_timer_create, CLOCK_MONOTONIC, &event, &id));
	CHECK(syscall(SYS_timer_delete, id));
	CHECK(syscall(SYS_timer_create, CLOCK_MONOTONIC, &event, &id));
	CHECK(syscall(SYS_timer_settime, id, 0, &spec, NULL));
	event.sigev_notify = SIGEV_THREAD_ID;
	event._sigev_un._tid = tids[1];
	CHECK(syscall(SYS_timer_create, CLOCK_BOOTTIME, &event, &id));
	event.sigev_notify = SIGEV_NONE;
	CHECK(syscall(SYS_timer_create, CLOCK_PROCESS_CPUTIME_ID, &event, &id));
	spec.it_interval = (struct timespec){ 0, 0 };
	CHECK(syscall(SYS_timer_settime, id, 0, &spec, NULL));
}

static void signals(void)
{
	union sigval value = { .sival_ptr = (void *)0x123456789abcdef };
	CHECK(sigqueue(getpid(), SIGRTMIN + 5, value));
	value.sival_int = 2;
	CHECK(sigqueue(getpid(), SIGRTMIN + 5, value));
	CHECK(kill(getpid(), SIGUSR2));
	CHECK(kill(getpid(), SIGURG));
	CHECK(syscall(SYS_tgkill, getpid(), tids[0], SIGUSR1));
	CHECK(syscall(SYS_tgkill, getpid(), tids[1], SIGUSR2));
}

int main(int argc, char **argv)
{
	pthread_t handle;
	if (argc != 3)
		return 2;
	variant = argv[1];
	pthread_barrier_init(&made, NULL, 3);
	pthread_barrier_init(&settled, NULL, 3);
	process_state(argv[2]);
	thread_state(0);
	for (intptr_t number = 1; number <= 2; number++)
		CHECK(pthread_create(&handle, NULL, thread, (void *)number) ? -1 : 0);
	pthread_barrier_wait(&made);
	timers();
	signals();
	pthread_barrier_wait(&settled);
	last_state(0);
	pthread_barrier_wait(&settled);
	CHECK(write(1, "ready\n", 6));
	for (;;)
		syscall(SYS_ppoll, NULL, 0, NULL, NULL, 0);
}
