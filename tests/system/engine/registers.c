/* Holds known values in all general registers, the flags, the red zone and vector registers over a busy loop, and
   checks them, its signal mask and a computation again and again.  argv[1]: a file of two 64-bit words: rounds done,
   number of the check that failed (0: none).  */
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

long spin(long rounds);
__asm__(".globl spin\n"
	"spin:	push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
	"	mov %rdi, %rcx\n"
	"	mov $0x101, %rax; mov $0x202, %rbx; mov $0x303, %rdx; mov $0x404, %rsi; mov $0x505, %rdi; mov $0x606, %rbp\n"
	"	mov $0x808, %r8; mov $0x909, %r9; mov $0xa0a, %r10; mov $0xb0b, %r11; mov $0xc0c, %r12; mov $0xd0d, %r13\n"
	"	mov $0xe0e, %r14; mov $0xf0f, %r15\n"
	"	movq %r12, %xmm3; movq %r13, %xmm14; vpbroadcastq %xmm3, %ymm3\n"
	"	mov %rsp, -8(%rsp); mov %r14, -64(%rsp); mov %r15, -128(%rsp)\n"
	"1:	stc; dec %rcx; jz 2f; jnc 9f\n" /* dec keeps the carry flag */
	"	cmp $0x101, %rax; jne 9f; cmp $0x202, %rbx; jne 9f; cmp $0x303, %rdx; jne 9f; cmp $0x404, %rsi; jne 9f\n"
	"	cmp $0x505, %rdi; jne 9f; cmp $0x606, %rbp; jne 9f; cmp $0x808, %r8; jne 9f; cmp $0x909, %r9; jne 9f\n"
	"	cmp $0xa0a, %r10; jne 9f; cmp $0xb0b, %r11; jne 9f; cmp $0xc0c, %r12; jne 9f; cmp $0xd0d, %r13; jne 9f\n"
	"	cmp $0xe0e, %r14; jne 9f; cmp $0xf0f, %r15; jne 9f\n"
	"	cmp %rsp, -8(%rsp); jne 9f; cmp %r14, -64(%rsp); jne 9f; cmp %r15, -128(%rsp); jne 9f\n"
	"	jmp 1b\n"
	"2:	vextracti128 $1, %ymm3, %xmm5; movq %xmm5, %rax; cmp %rax, %r12; jne 9f\n"
	"	movq %xmm14, %rax; cmp %rax, %r13; jne 9f\n"
	"	xor %eax, %eax; jmp 3f\n"
	"9:	mov $1, %eax\n"
	"3:	vzeroupper; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n");

static volatile long *words;

static void fail(int number)
{
	words[1] = number;
	abort();
}

int main(int argc, char **argv)
{
	int fd = open(argv[1], O_RDWR | O_CREAT, 0600);
	if (argc != 2 || fd < 0 || ftruncate(fd, 4096))
		return 1;
	words = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	sigset_t set, now;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	sigprocmask(SIG_SETMASK, &set, 0);
	double first = 0;
	for (long n = 1;; n++) {
		if (spin(100000))
			fail(1);
		double sum = 0;
		for (int i = 1; i < 10000; i++)
			sum += sin(i) / i;
		if (n == 1)
			first = sum;
		else if (sum != first)
			fail(2);
		sigprocmask(SIG_BLOCK, 0, &now);
		if (memcmp(&now, &set, 8))
			fail(3);
		words[0] = n;
	}
}
