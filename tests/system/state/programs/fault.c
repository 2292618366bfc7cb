/* A handler mends the page that was touched, and the program goes on: what a garbage collector's barrier does. */
#define _GNU_SOURCE
#include "case.h"
#include <signal.h>

static char *area;
static volatile int faults;

static void handler(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	char *page = (char *)((uintptr_t)info->si_addr & ~4095ul);
	if (page < area || page >= area + 8 * 4096)
		_exit(103);
	faults++;
	mprotect(page, 4096, PROT_READ | PROT_WRITE);
}

int main(int argc, char **argv)
{
	(void)argc;
	struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO};
	case_begin(argv);
	area = mmap(NULL, 8 * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(area != MAP_FAILED && !sigaction(SIGSEGV, &action, NULL));
	for (int i = 0; i < 4; i++)
		area[4096 * i] = i + 1;
	CHECK(faults == 4);
	case_ready();
	for (int i = 0; i < 8; i++)
		area[4096 * i] += 10;
	CHECK(faults == 8 && area[0] == 11 && area[3 * 4096] == 14 && area[7 * 4096] == 10);
	case_pass();
}
