/* In strict seccomp mode, where only read, write and exit are allowed: it spins on the control file. */
#include "case.h"
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

int main(int argc, char **argv)
{
	(void)argc;
	case_begin(argv);
	int null = open("/dev/null", O_WRONLY);
	CHECK(null >= 0);
	CHECK(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT));
	case_say(CASE_READY);
	while (!*case_order)
		;
	CHECK(syscall(SYS_write, null, "x", 1) == 1);
	case_say(CASE_PASSED);
	while (*case_order != CASE_QUIT)
		;
	syscall(SYS_exit, 0);
}
