/* A thread ends, and the kernel says so where the C library has told it to: pthread_join comes back. */
#define _GNU_SOURCE
#include "case.h"
#include <pthread.h>
#include <time.h>

static volatile int go;

static void *thread(void *argument)
{
	while (!go)
		case_pause();
	return argument;
}

int main(int argc, char **argv)
{
	(void)argc;
	pthread_t others[3];
	case_begin(argv);
	for (long i = 0; i < 3; i++)
		CHECK(!pthread_create(&others[i], NULL, thread, (void *)i));
	case_ready();
	go = 1;
	for (long i = 0; i < 3; i++) {
		void *said;
		struct timespec limit;
		clock_gettime(CLOCK_REALTIME, &limit);
		limit.tv_sec += 10;
		CHECK(!pthread_timedjoin_np(others[i], &said, &limit) && said == (void *)i);
	}
	case_pass();
}
