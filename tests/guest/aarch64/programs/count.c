/* A static program that writes a number and a sum of floating point, line after line; status 2 if a sleep ends early. */
#include <stdio.h>
#include <time.h>
#include <unistd.h>

int main(void) {
    double sum = 0.5;
    for (unsigned long i = 0;; i++) {
        char line[64];
        struct timespec pause = {0, 50000000};
        int size = snprintf(line, sizeof line, "%lu %a\n", i, sum);
        if (write(1, line, size) != size) return 1;
        if (nanosleep(&pause, NULL)) return 2;
        sum = sum * 1.0000001 + 1e-9;
    }
}
