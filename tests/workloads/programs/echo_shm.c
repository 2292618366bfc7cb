/* Sends back what it gets; every message goes to a process of its own and back through System V shared memory.
 *
 * echo_shm PORT ADDRESS...
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MOST = 64, SIZE = 65536 };

struct desk {
    sem_t given, done;
    ssize_t length;
    char in[SIZE], out[SIZE];
};

static void work(struct desk *desk)
{
    for (;;) {
        while (sem_wait(&desk->given))
            ;
        memcpy(desk->out, desk->in, desk->length);
        memset(desk->in, 0, desk->length);
        sem_post(&desk->done);
    }
}

static int listening(const char *address, int port)
{
    int six = strchr(address, ':') != NULL, one = 1;
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    int fd = socket(six ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || inet_pton(six ? AF_INET6 : AF_INET, address, six ? (void *)&v6.sin6_addr : (void *)&v4.sin_addr) != 1)
        err(1, "socket for %s", address);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, six ? (void *)&v6 : (void *)&v4, six ? sizeof v6 : sizeof v4) || listen(fd, 128))
        err(1, "listen on %s", address);
    return fd;
}

int main(int argc, char **argv)
{
    int one = 1, count = argc - 2, listeners = argc - 2;
    struct pollfd wanted[MOST];
    int segment = shmget(ftok(argv[0], 'e'), sizeof(struct desk), IPC_CREAT | IPC_EXCL | 0600);
    struct desk *desk = segment < 0 ? (void *)-1 : shmat(segment, NULL, 0);
    if (desk == (void *)-1)
        err(1, "shared memory");
    if (sem_init(&desk->given, 1, 0) || sem_init(&desk->done, 1, 0))
        err(1, "semaphores");
    switch (fork()) {
    case -1:
        err(1, "fork");
    case 0:
        prctl(PR_SET_PDEATHSIG, 9);
        work(desk);
    }
    for (int i = 0; i < listeners; i++)
        wanted[i] = (struct pollfd){.fd = listening(argv[i + 2], atoi(argv[1])), .events = POLLIN};
    for (;;) {
        if (poll(wanted, count, -1) < 0)
            err(1, "poll");
        for (int i = 0; i < count; i++) {
            if (!wanted[i].revents)
                continue;
            if (i < listeners) {
                int peer = accept(wanted[i].fd, NULL, NULL);
                if (peer < 0 || count == MOST)
                    err(1, "accept");
                setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                wanted[count++] = (struct pollfd){.fd = peer, .events = POLLIN};
                continue;
            }
            desk->length = recv(wanted[i].fd, desk->in, SIZE, 0);
            if (desk->length > 0) {
                sem_post(&desk->given);
                while (sem_wait(&desk->done))
                    ;
                if (send(wanted[i].fd, desk->out, desk->length, MSG_NOSIGNAL) == desk->length)
                    continue;
            }
            close(wanted[i].fd);
            wanted[i] = wanted[--count];
            break;
        }
    }
}
