/* Floating point, vector and general registers, counted with in a loop that a cycle interrupts anywhere. */
#include "case.h"

int main(int argc, char **argv)
{
	(void)argc;
	case_begin(argv);
	case_say(CASE_READY);
	double x = 1.0;
	uint64_t a = 1, b = 2, c = 3, steps = 0;
	while (!*case_order) {
		double y = 1.0;
		uint64_t hash = 14695981039346656037ull;
		for (int i = 1; i < 2000; i++) {
			y += 1.0 / (i * (double)i);
			hash = (hash ^ (uint64_t)i) * 1099511628211ull;
		}
		if (steps++ == 0)
			x = y, a = hash;
		CHECK(x == y && a == hash && b == 2 && c == 3);
	}
	CHECK(steps > 1);
	case_pass();
}
