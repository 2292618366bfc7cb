/* The system calls of a move as tcpstate makes them, and nothing else: what tests/bench/bench_connections.py compares.
   The numbers of levels and options are those of the uapi headers. */
#include <arpa/inet.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

static int set(int fd, int level, int option, int value) {
    return setsockopt(fd, level, option, &value, 4);
}
static int get(int fd, int level, int option) {
    int value = 0; socklen_t size = 4;
    getsockopt(fd, level, option, &value, &size);
    return value;
}
static void numbers(int f, int *n) {
    char value[160]; socklen_t size; struct sockaddr_in6 a;
    size = 152; getsockopt(f, 6, 11, value, &size);
    get(f, 6, 2); get(f, 6, 24);
    size = 20; getsockopt(f, 6, 29, value, &size);
    size = 16; getsockopt(f, 6, 13, value, &size);
    get(f, 1, 7); get(f, 1, 8); get(f, 1, 72);
    ioctl(f, 0x8905, n); ioctl(f, 0x5411, n); ioctl(f, 0x894b, n); ioctl(f, 0x541b, n);
    set(f, 6, 20, 2); get(f, 6, 21); set(f, 6, 20, 1); get(f, 6, 21); set(f, 6, 20, 0);
    size = sizeof a; getsockname(f, (void *)&a, &size);
    size = sizeof a; getpeername(f, (void *)&a, &size);
}
void options(int *fd, int count, int *table, int rows) {
    char value[256];
    for (int i = 0; i < count; i++)
        for (int k = 0; k < rows; k++) {
            socklen_t size = table[3 * k + 2];
            getsockopt(fd[i], table[3 * k], table[3 * k + 1], value, &size);
        }
}
void quiet(int *fd, int count, int program, int mark) {
    static const int own[][2] = {{1, 44}, {1, 36}, {6, 18}, {1, 9}, {1, 2}, {0, 21}, {41, 73}};
    for (int i = 0; i < count; i++) {
        socklen_t none = 0;
        getsockopt(fd[i], 1, 26, 0, &none);
        for (int k = 0; k < 7; k++) get(fd[i], own[k][0], own[k][1]);
        set(fd[i], 1, 50, program); set(fd[i], 1, 36, mark); set(fd[i], 6, 18, 0x7fffffff); set(fd[i], 1, 9, 0);
    }
}
/* data: room for all that was not read; returns how much that was */
long export(int *fd, int count, int v6, char *data) {
    long total = 0;
    for (int i = 0; i < count; i++) {
        char value[160];
        int f = fd[i], n = 0, unread; socklen_t size;
        /* options that the kernel changes by itself are read again */
        get(f, 6, 12); get(f, 6, 10); get(f, 0, 1); if (v6) get(f, 41, 67);
        get(f, 6, 19); ioctl(f, 0x894b, &n); set(f, 6, 19, 1);
        numbers(f, &n); ioctl(f, 0x541b, &unread);
        if (unread) {
            set(f, 1, 10, 0); ioctl(f, 0x541b, &n); set(f, 1, 10, 1); ioctl(f, 0x541b, &n);
            set(f, 6, 20, 1);
            n = recv(f, data + total, unread, MSG_PEEK | MSG_DONTWAIT);
            if (n > 0) total += n;
            set(f, 6, 20, 0); set(f, 1, 10, 0);
        }
        size = 148; getsockopt(f, 6, 11, value, &size);
    }
    return total;
}
/* one connection: its ends (of size bytes), sequence numbers, windows, what it has not read; the acknowledgement that
   teaches it a round-trip time */
struct one {
    char local[28], peer[28], loopback[28], packet[72];
    unsigned size, v6, send, receive, window[5], unread, packet_size, taught;
    const char *data;
};
void rebuild(int *fd, int count, struct one *c, int program, int mark, int raw, const char *windows, int first) {
    static const int agreed[] = {4, 0, 3, 7 | 7 << 16, 8, 0, 2, 1460};
    for (int i = 0; i < count; i++, c++) {
        int f = fd[i], n;
        set(f, 6, 19, 1);
        if (c->v6) set(f, 41, 75, 1); else set(f, 0, 19, 1);
        set(f, 1, 32, 1 << 18); set(f, 1, 33, 1 << 18); set(f, 1, 50, program);
        set(f, 6, 20, 2); set(f, 6, 21, c->send - c->taught); set(f, 6, 20, 1); set(f, 6, 21, c->receive); set(f, 6, 20, 0);
        bind(f, (void *)c->local, c->size);
        connect(f, (void *)c->peer, c->size);
        setsockopt(f, 6, 22, agreed, sizeof agreed);
        setsockopt(f, 0, 4, 0, 0);
        if (c->v6) setsockopt(f, 41, 59, 0, 0);
        set(f, 1, 36, mark); set(f, 6, 18, 0x7fffffff);
        if (c->taught) {
            set(f, 6, 20, 2); send(f, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL); set(f, 6, 20, 0);
            set(f, 6, 24, 0x40000001);
            sendto(raw, c->packet, c->packet_size, 0, (void *)c->loopback, c->size);
            ioctl(f, 0x5411, &n);
        }
        if (windows) { set(f, 1, 12, first + i); setsockopt(f, 6, 13, windows, strlen(windows)); set(f, 1, 12, 0); }
        if (c->unread) {
            set(f, 6, 20, 1);
            send(f, c->data, c->unread, MSG_DONTWAIT | MSG_NOSIGNAL);
            set(f, 6, 20, 0);
        }
        set(f, 1, 33, 1 << 17);
        setsockopt(f, 6, 29, c->window, 20);
        setsockopt(f, 6, 13, "cubic", 5);
        set(f, 6, 24, 1000);
        set(f, 6, 1, 1); set(f, 6, 10, c->window[3]);
    }
}
void compare(int *fd, int count, char *data) {
    int n, unread;
    for (int i = 0; i < count; i++) {
        int f = fd[i];
        numbers(f, &n); get(f, 6, 1); get(f, 6, 10); ioctl(f, 0x541b, &unread);
        if (unread) {
            set(f, 6, 20, 1);
            n = recv(f, data, unread, MSG_PEEK | MSG_DONTWAIT);
            if (n > 0) data += n;
            set(f, 6, 20, 0);
        }
    }
}
void release(int *fd, int count) {
    for (int i = 0; i < count; i++) {
        int f = fd[i];
        set(f, 6, 20, 2); get(f, 6, 21); set(f, 6, 20, 0);
        set(f, 6, 1, 1); set(f, 1, 27, 0); set(f, 1, 36, 0); set(f, 6, 19, 0);
        set(f, 1, 2, 1); set(f, 1, 32, 1 << 17); set(f, 1, 72, 0); set(f, 0, 19, 0); set(f, 41, 75, 0);
        set(f, 6, 1, 1); set(f, 6, 18, 0); set(f, 6, 12, 1);
    }
}
void discard(int *fd, int count) {
    char none[16] = {0};
    for (int i = 0; i < count; i++) { set(fd[i], 6, 19, 1); connect(fd[i], (void *)none, 16); }
}
