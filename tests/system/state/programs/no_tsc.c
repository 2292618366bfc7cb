/* Reading the time stamp counter faults. */
#include "case.h"
#include <setjmp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <x86intrin.h>

static sigjmp_buf back;

static void handler(int number)
{
	(void)number;
	siglongjmp(back, 1);
}

int main(int argc, char **argv)
{
	(void)argc;
	int mode = 0;
	case_begin(argv);
	signal(SIGSEGV, handler);
	CHECK(!prctl(PR_SET_TSC, PR_TSC_SIGSEGV));
	case_ready();
	CHECK(!prctl(PR_GET_TSC, &mode) && mode == PR_TSC_SIGSEGV);
	if (!sigsetjmp(back, 1)) {
		__rdtsc();
		CHECK(!"rdtsc did not fault");
	}
	case_pass();
}
