/* Five threads, computing and handing a turn around by a condition variable; each checks its own computation and its
   thread-local storage.  argv[1]: a file of two 64-bit words: turns taken, number of the check that failed.  */
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { THREADS = 5 };
static volatile long *words;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static long turn;
static __thread long mine;

static void fail(int number)
{
	words[1] = number;
	abort();
}

static void *work(void *argument)
{
	long id = (long)argument;
	double first = 0;
	mine = id << 32;
	for (long n = 1;; n++) {
		double sum = 0;
		for (int i = 1; i < 4000; i++)
			sum += sin(id + 0.5 + i) / i;
		if (n == 1)
			first = sum;
		else if (sum != first)
			fail(1);
		if (++mine != (id << 32) + n)
			fail(2);
		pthread_mutex_lock(&lock);
		while (turn % THREADS != id)
			pthread_cond_wait(&changed, &lock);
		words[0] = ++turn;
		pthread_cond_broadcast(&changed);
		pthread_mutex_unlock(&lock);
	}
}

int main(int argc, char **argv)
{
	int fd = open(argv[1], O_RDWR | O_CREAT, 0600);
	if (argc != 2 || fd < 0 || ftruncate(fd, 4096))
		return 1;
	words = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	pthread_t threads[THREADS];
	for (long i = 1; i < THREADS; i++)
		pthread_create(&threads[i], 0, work, (void *)i);
	work(0);
}
