/* Waits inside a signal handler, on the alternate stack; what the handler interrupted goes on afterwards. */
#define _GNU_SOURCE
#include "case.h"
#include <signal.h>

static volatile sig_atomic_t been_there;
static char stack[65536];

static void handler(int number, siginfo_t *info, void *context)
{
	(void)context;
	char here;
	CHECK(number == SIGUSR1 && info->si_value.sival_int == 77);
	CHECK(&here >= stack && &here < stack + sizeof stack);
	stack_t alternate;
	if (!been_there)
		case_ready();
	CHECK(&here >= stack && &here < stack + sizeof stack);
	CHECK(!sigaltstack(NULL, &alternate) && alternate.ss_sp == stack && alternate.ss_flags & SS_ONSTACK);
	been_there++;
}

int main(int argc, char **argv)
{
	(void)argc;
	case_begin(argv);
	stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
	struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK};
	CHECK(!sigaltstack(&alternate, NULL));
	CHECK(!sigaction(SIGUSR1, &action, NULL));
	double before = 1.0 / 3;
	union sigval value = {.sival_int = 77};
	CHECK(!sigqueue(getpid(), SIGUSR1, value));
	CHECK(been_there == 1 && before == 1.0 / 3);
	sigset_t now;
	CHECK(!sigprocmask(SIG_BLOCK, NULL, &now) && !sigismember(&now, SIGUSR1));
	/* the handler is the process's, not only the frame that the cycles found */
	CHECK(!sigqueue(getpid(), SIGUSR1, value) && been_there == 2);
	case_pass();
}
