/* A case in C: maps the control file and speaks as tests/system/state/control.py says.
 *
 *     int main(int argc, char **argv) { case_begin(argv); ...set up...; case_ready(); ...verify...; case_pass(); }
 *
 * argv: the control file, the number of the slot, an empty directory; then what the case gives besides. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CASE_SLOT = 16 << 10, CASE_GO = 1, CASE_QUIT = 2, CASE_READY = 1, CASE_PASSED = 2, CASE_FAILED = 3 };

static volatile uint32_t *case_order, *case_slot;

static inline void case_pause(void) { usleep(2000); }

static inline void case_begin(char **argv)
{
	int fd = open(argv[1], O_RDWR | O_CLOEXEC);
	struct stat st;
	if (fd < 0 || fstat(fd, &st))
		_exit(101);
	char *map = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		_exit(102);
	close(fd);
	case_order = (volatile uint32_t *)map;
	case_slot = (volatile uint32_t *)(map + (atoi(argv[2]) + 1) * CASE_SLOT);
}

static inline void case_say(uint32_t state)
{
	__sync_synchronize();
	case_slot[0] = state;
}

/* Keep everything as it is until the test is over. */
static inline void case_stay(void)
{
	while (*case_order != CASE_QUIT)
		case_pause();
	_exit(0);
}

static inline void case_fail(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	int length = vsnprintf((char *)(case_slot + 2), CASE_SLOT - 16, format, args);
	va_end(args);
	case_slot[1] = length < CASE_SLOT - 16 ? length : CASE_SLOT - 16;
	case_say(CASE_FAILED);
	case_stay();
}

/* Set up: wait, through the cycles, for the order to verify. */
static inline void case_ready(void)
{
	case_say(CASE_READY);
	while (!*case_order)
		case_pause();
	if (*case_order == CASE_QUIT)
		_exit(0);
}

static inline void case_pass(void)
{
	case_say(CASE_PASSED);
	case_stay();
}

#define CHECK(what) ((what) ? (void)0 : case_fail("%s:%d: %s (errno %d)", __FILE__, __LINE__, #what, errno))
