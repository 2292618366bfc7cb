/* Runs restartable sequences one after the other. A section notes an epoch at its begin and compares it at its end;
   the epoch is changed from outside while the program is stopped. A section that goes on after a stop has not been
   aborted, as it must be.
   argv[1]: a file of four 64-bit words: sections done, number of the check that failed, epoch, sections aborted.  */
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/rseq.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int fd = open(argv[1], O_RDWR | O_CREAT, 0600);
	if (argc != 2 || fd < 0 || ftruncate(fd, 4096) || !__rseq_size)
		return 1;
	volatile long *words = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
	for (;;) {
		long same = 0, aborted = 0;
		__asm__ volatile(".pushsection .data.rel.sections, \"aw\"\n"
				 "	.balign 32\n"
				 "3:	.long 0, 0\n"
				 "	.quad 1f, 2f - 1f, 4f\n"
				 "	.popsection\n"
				 "	lea 3b(%%rip), %%rax\n"
				 "	mov %%rax, %[pointer]\n"
				 "1:	mov %[epoch], %%rdx\n"
				 "	mov $30000, %%rcx\n"
				 "5:	dec %%rcx\n"
				 "	jnz 5b\n"
				 "	cmp %[epoch], %%rdx\n"
				 "	sete %b[same]\n"
				 "2:	jmp 6f\n"
				 "	.byte 0x0f, 0xb9, 0x3d\n"
				 "	.long 0x53053053\n" /* RSEQ_SIG */
				 "4:	mov $1, %[aborted]\n"
				 "6:\n"
				 : [same] "+q"(same), [aborted] "+r"(aborted), [pointer] "=m"(area->rseq_cs)
				 : [epoch] "m"(words[2])
				 : "rax", "rcx", "rdx", "cc", "memory");
		if (aborted)
			words[3]++;
		else if (!same) {
			words[1] = 1;
			abort();
		}
		words[0]++;
	}
}
