/* Everything at once, all of it checked: threads that begin and end, memory that comes and goes, children, signals of
 * which none may be lost, timers, a pipe, condition variables. The cycles come at any moment of it. */
#define _GNU_SOURCE
#include "case.h"
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

enum { WORKERS = 3, NUMBER = 36 /* SIGRTMIN + 2 */, TICK = 38 };

static volatile int over;
static volatile unsigned long sent, taken, ticks, born, forked, mapped, passed, handed;
static __thread unsigned long own; /* thread-local */
static int ends[2];
static pthread_t receiver;
static sem_t room;

static void on_number(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	/* in their order, none twice, none missing */
	if (info->si_code == SI_QUEUE && (unsigned long)info->si_value.sival_ptr != taken)
		case_fail("signal %lu came as number %lu", (unsigned long)info->si_value.sival_ptr, taken);
	taken++;
	sem_post(&room);
}

static void on_tick(int number)
{
	(void)number;
	ticks++;
}

static void nap(long microseconds)
{
	struct timespec time = {0, microseconds * 1000};
	/* only where no handler runs: then nothing may interrupt it */
	CHECK(!nanosleep(&time, NULL));
}

static void *short_life(void *argument)
{
	CHECK(own == 0);
	own = (unsigned long)argument;
	double sum = 0;
	for (unsigned long i = 1; i <= 500; i++)
		sum += (double)(own % i);
	double again = 0;
	for (unsigned long i = 1; i <= 500; i++)
		again += (double)(own % i);
	CHECK(sum == again && own == (unsigned long)argument);
	return argument;
}

static void *bear(void *unused)
{
	pthread_attr_t detached;
	pthread_attr_init(&detached);
	pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
	while (!over) {
		pthread_t thread;
		void *said;
		unsigned long number = born + 1;
		CHECK(!pthread_create(&thread, NULL, short_life, (void *)number));
		CHECK(!pthread_join(thread, &said) && said == (void *)number);
		CHECK(!pthread_create(&thread, &detached, short_life, (void *)number));
		born++;
		nap(300);
	}
	return unused;
}

static void *map(void *unused)
{
	unsigned seed = 1;
	while (!over) {
		size_t size = 4096 * (1 + rand_r(&seed) % 64);
		unsigned long *area = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(area != MAP_FAILED);
		for (size_t i = 0; i < size / sizeof *area; i += 64)
			area[i] = i ^ mapped;
		nap(100);
		CHECK(!mprotect(area, 4096, PROT_READ));
		CHECK(!mprotect(area, 4096, PROT_READ | PROT_WRITE));
		area = mremap(area, size, 2 * size, MREMAP_MAYMOVE);
		CHECK(area != MAP_FAILED && !munmap((char *)area + size, size));
		for (size_t i = 0; i < size / sizeof *area; i += 64)
			CHECK(area[i] == (i ^ mapped));
		CHECK(!munmap(area, size));
		mapped++;
	}
	return unused;
}

static void *fork_on(void *unused)
{
	while (!over) {
		unsigned long number = forked;
		pid_t child = fork();
		CHECK(child >= 0);
		if (!child) {
			struct timespec time = {0, 500000};
			_exit(nanosleep(&time, NULL) || forked != number ? 99 : (int)(number % 50));
		}
		int status;
		CHECK(waitpid(child, &status, 0) == child);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == (int)(number % 50));
		forked++;
	}
	return unused;
}

static void *receive(void *unused)
{
	sigset_t wanted;
	sigemptyset(&wanted);
	sigaddset(&wanted, NUMBER);
	pthread_sigmask(SIG_UNBLOCK, &wanted, NULL);
	while (!over)
		case_pause();
	return unused;
}

static void *send_on(void *unused)
{
	while (!over) {
		while (sem_wait(&room))
			;
		CHECK(!pthread_sigqueue(receiver, NUMBER, (union sigval){.sival_ptr = (void *)sent}));
		sent++;
		if (sent % 8 == 0)
			nap(200);
	}
	return unused;
}

static void *pass(void *unused)
{
	unsigned long number;
	for (unsigned long wanted = 0; !over || passed > wanted; wanted++) {
		CHECK(read(ends[0], &number, sizeof number) == sizeof number);
		if (number == ~0ul)
			break;
		CHECK(number == wanted);
	}
	return unused;
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int turn;

static void *hand(void *argument)
{
	int mine = (int)(long)argument;
	pthread_mutex_lock(&lock);
	while (!over) {
		struct timespec limit;
		clock_gettime(CLOCK_REALTIME, &limit);
		limit.tv_sec += 1000;
		while (turn != mine && !over)
			CHECK(!pthread_cond_timedwait(&changed, &lock, &limit));
		turn = (mine + 1) % WORKERS;
		handed++;
		pthread_cond_broadcast(&changed);
	}
	pthread_mutex_unlock(&lock);
	return NULL;
}

int main(int argc, char **argv)
{
	(void)argc;
	sigset_t all;
	pthread_t threads[16];
	int count = 0;
	struct sigaction number = {.sa_sigaction = on_number, .sa_flags = SA_SIGINFO | SA_RESTART};
	struct sigaction tick = {.sa_handler = on_tick, .sa_flags = SA_RESTART};
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = TICK};
	struct itimerspec every = {.it_value.tv_nsec = 1000000, .it_interval.tv_nsec = 1000000};
	timer_t timer;
	case_begin(argv);
	CHECK(!pipe(ends) && !sem_init(&room, 0, 32) && !sigaction(NUMBER, &number, NULL) && !sigaction(TICK, &tick, NULL));
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	CHECK(!pthread_create(&receiver, NULL, receive, NULL));
	CHECK(!pthread_create(&threads[count++], NULL, send_on, NULL));
	CHECK(!pthread_create(&threads[count++], NULL, bear, NULL));
	CHECK(!pthread_create(&threads[count++], NULL, map, NULL));
	CHECK(!pthread_create(&threads[count++], NULL, fork_on, NULL));
	CHECK(!pthread_create(&threads[count++], NULL, pass, NULL));
	for (long i = 0; i < WORKERS; i++)
		CHECK(!pthread_create(&threads[count++], NULL, hand, (void *)i));
	sigdelset(&all, TICK);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	CHECK(!timer_create(CLOCK_MONOTONIC, &event, &timer) && !timer_settime(timer, 0, &every, NULL));
	case_say(CASE_READY);
	while (!*case_order) {
		unsigned long now = passed;
		CHECK(write(ends[1], &now, sizeof now) == sizeof now);
		passed++;
		case_pause();
	}
	if (*case_order == CASE_QUIT)
		_exit(0);
	/* all of it goes on */
	unsigned long before[] = {sent, ticks, born, forked, mapped, handed};
	while (sent == before[0] || ticks == before[1] || born == before[2] || forked == before[3] || mapped == before[4] || handed == before[5])
		case_pause();
	over = 1;
	CHECK(write(ends[1], &(unsigned long){~0ul}, sizeof passed) == sizeof passed);
	pthread_mutex_lock(&lock);
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	for (int i = 0; i < count; i++)
		CHECK(!pthread_join(threads[i], NULL));
	CHECK(!pthread_join(receiver, NULL));
	CHECK(sent == taken);
	case_pass();
}
