/* Many kinds of mappings, filled with known noise; then rests. argv[1]: a directory for files. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096ul
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 0x08
#endif
#define MADV_GUARD_INSTALL 102

static uint64_t seed = 88172645463325252ull;

static void noise(char *at, size_t size)
{
    for (size_t i = 0; i + 8 <= size; i += 8) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        memcpy(at + i, &seed, 8);
    }
}

static void *need(void *p, const char *what)
{
    if (p == MAP_FAILED) {
        perror(what);
        exit(1);
    }
    return p;
}

static void check(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

static char *anonymous(size_t pages, int flags)
{
    return need(mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0), "anonymous");
}

/* a mapping with unmapped pages around it, so that the kernel cannot merge it with others */
static char *alone(size_t pages, int flags)
{
    char *at = anonymous(pages + 2, flags);
    check(munmap(at, PAGE), "munmap");
    check(munmap(at + (pages + 1) * PAGE, PAGE), "munmap");
    return at + PAGE;
}

static int file(const char *directory, const char *name, size_t size, int flags)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0755);
    check(fd, path);
    char *bytes = malloc(size + 8);
    noise(bytes, size + 8);
    check(write(fd, bytes, size) == (ssize_t)size ? 0 : -1, "write");
    free(bytes);
    if (flags != O_RDWR) {
        close(fd);
        fd = open(path, flags);
        check(fd, path);
    }
    return fd;
}

static void drop(const char *directory, const char *name)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    check(unlink(path), path);
}

int main(int argc, char **argv)
{
    const char *directory = argv[argc - 1];
    char *p;

    /* anonymous, private: sparse, of every protection */
    p = alone(64, 0);
    for (int i = 0; i < 64; i += 3)
        noise(p + i * PAGE, PAGE);
    for (int prot = 0; prot < 8; prot++) {
        p = alone(8, 0);
        noise(p, 5 * PAGE);
        check(mprotect(p, 8 * PAGE, prot), "mprotect");
    }
    p = alone(262144, MAP_NORESERVE); /* 1 GB, nearly empty */
    noise(p + 1000 * PAGE, 3 * PAGE);
    noise(p + 262143 * PAGE, PAGE);
    p = alone(2048, 0); /* one protection for each page: many mappings */
    noise(p, 2048 * PAGE);
    for (int i = 0; i < 2048; i += 2)
        check(mprotect(p + i * PAGE, PAGE, PROT_READ), "mprotect");
    p = alone(600, 0); /* more than one chunk of pages */
    noise(p, 600 * PAGE);

    /* advice and locks */
    int advice[] = {MADV_DONTFORK, MADV_DONTDUMP, MADV_WIPEONFORK, MADV_HUGEPAGE, MADV_NOHUGEPAGE,
                    MADV_MERGEABLE, MADV_SEQUENTIAL, MADV_RANDOM};
    for (size_t i = 0; i < sizeof advice / sizeof *advice; i++) {
        p = alone(8, 0);
        check(madvise(p, 8 * PAGE, advice[i]), "madvise");
        noise(p, 3 * PAGE);
    }
    p = anonymous(2048, 0); /* huge pages, some of them split */
    check(madvise(p, 2048 * PAGE, MADV_HUGEPAGE), "madvise");
    noise(p, 2048 * PAGE);
    check(madvise(p + 700 * PAGE, 5 * PAGE, MADV_DONTNEED), "madvise");
    p = alone(8, 0);
    noise(p, 2 * PAGE);
    check(mlock(p, 8 * PAGE), "mlock");
    p = alone(8, 0);
    noise(p, 2 * PAGE);
    check(mlock2(p, 8 * PAGE, MLOCK_ONFAULT), "mlock2");
    p = alone(16, 0);
    noise(p, 16 * PAGE);
    check(madvise(p + 4 * PAGE, 2 * PAGE, MADV_GUARD_INSTALL), "guard");
    p = need(mmap(0, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN, -1, 0), "down");
    noise(p + 60 * PAGE, 4 * PAGE);
    p = mmap(0, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_DROPPABLE | MAP_ANONYMOUS, -1, 0);
    if (p != MAP_FAILED)
        noise(p, 4 * PAGE);

    /* shared memory */
    p = need(mmap(0, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), "shared");
    noise(p + 8 * PAGE, 8 * PAGE);
    int fd = memfd_create("zoo", 0);
    check(ftruncate(fd, 32 * PAGE), "ftruncate");
    p = need(mmap(0, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), "memfd");
    noise(p, 9 * PAGE);
    p = need(mmap(0, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 4 * PAGE), "memfd private");
    noise(p + 2 * PAGE, PAGE);
    need(mmap(0, 8 * PAGE, PROT_READ, MAP_SHARED, fd, 0), "memfd read-only");
    close(fd);

    /* files */
    fd = file(directory, "private", 20 * PAGE + 100, O_RDONLY);
    p = need(mmap(0, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0), "private file"); /* beyond its end */
    noise(p + 3 * PAGE, PAGE);
    noise(p + 20 * PAGE, PAGE);
    p = need(mmap(0, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 5 * PAGE), "private file, again");
    noise(p + PAGE, PAGE);
    check(mprotect(p, 8 * PAGE, PROT_READ), "mprotect");
    p = need(mmap(0, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0), "private file, no access");
    noise(p + PAGE, PAGE);
    check(mprotect(p, 8 * PAGE, PROT_NONE), "mprotect");
    close(fd);
    fd = file(directory, "shared", 16 * PAGE, O_RDWR);
    p = need(mmap(0, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), "shared file");
    noise(p, 2 * PAGE);
    need(mmap(0, 4 * PAGE, PROT_READ, MAP_SHARED, fd, 0), "shared file, may be written");
    close(fd);
    fd = file(directory, "deleted", 16 * PAGE, O_RDWR);
    p = need(mmap(0, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), "deleted, shared");
    noise(p, PAGE);
    p = need(mmap(0, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0), "deleted, private");
    noise(p + PAGE, PAGE);
    close(fd);
    drop(directory, "deleted");

    /* the heap: an end that is no page boundary */
    noise(sbrk(100000), 90000);
    check(sbrk(1234) == (void *)-1 ? -1 : 0, "brk");
    noise((char *)malloc(1 << 22), 1 << 22);

    printf("%lx\n", (unsigned long)sbrk(0));
    fflush(stdout);
    for (;;)
        pause();
}
