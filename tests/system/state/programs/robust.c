/* A thread ends with a robust mutex locked: the kernel, which knows its robust list, tells the next owner. */
#define _GNU_SOURCE
#include "case.h"
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>

static pthread_mutex_t mutex;
static volatile int go;

static void *owner(void *unused)
{
	CHECK(!pthread_mutex_lock(&mutex));
	go = 1;
	while (go == 1)
		case_pause();
	return unused;
}

int main(int argc, char **argv)
{
	(void)argc;
	pthread_mutexattr_t kind;
	pthread_t thread;
	case_begin(argv);
	pthread_mutexattr_init(&kind);
	pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
	CHECK(!pthread_mutex_init(&mutex, &kind));
	CHECK(!pthread_create(&thread, NULL, owner, NULL));
	while (!go)
		case_pause();
	case_ready();
	go = 2;
	CHECK(!pthread_join(thread, NULL));
	CHECK(pthread_mutex_lock(&mutex) == EOWNERDEAD);
	case_pass();
}
