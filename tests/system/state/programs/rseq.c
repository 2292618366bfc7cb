/* The kernel writes the number of the CPU into each thread's rseq area: it must go on doing so. */
#define _GNU_SOURCE
#include "case.h"
#include <pthread.h>
#include <sched.h>
#include <sys/rseq.h>

static volatile int go;

static void look(void)
{
	struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
	for (int cpu = 0; cpu < 2; cpu++) {
		cpu_set_t one;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		if (sched_setaffinity(0, sizeof one, &one))
			continue; /* a machine with one CPU */
		*(volatile uint32_t *)&area->cpu_id = 4711;
		sched_yield();
		usleep(1000);
		CHECK(*(volatile uint32_t *)&area->cpu_id == (uint32_t)cpu);
	}
}

static void *thread(void *unused)
{
	while (!go)
		case_pause();
	look();
	return unused;
}

int main(int argc, char **argv)
{
	(void)argc;
	pthread_t others[3];
	case_begin(argv);
	CHECK(__rseq_size);
	for (int i = 0; i < 3; i++)
		CHECK(!pthread_create(&others[i], NULL, thread, NULL));
	case_ready();
	go = 1;
	look();
	for (int i = 0; i < 3; i++)
		CHECK(!pthread_join(others[i], NULL));
	case_pass();
}
