/*
 * The shape of the relay that is measured, in C: a thread for each direction, blocking recv and send through a buffer of
 * 256 KiB. What it costs more than this is Python; what this costs more than an event loop is the shape.
 *
 *   relay PORT        a transparent listener on all addresses, IPv4 and IPv6
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define BUFFER (256 * 1024)
#define STACK (64 * 1024)

struct pair {
    int fd[2];
    atomic_int left;
};

struct way {
    struct pair *pair;
    int from;
};

static pthread_attr_t small;

static void pump(struct pair *pair, int from)
{
    char *buffer = malloc(BUFFER); /* its pages are touched as far as they are used */
    int in = pair->fd[from], out = pair->fd[!from];
    ssize_t got;
    while (buffer && (got = recv(in, buffer, BUFFER, 0)) > 0)
        for (ssize_t sent = 0, n; sent < got; sent += n)
            if ((n = send(out, buffer + sent, got - sent, MSG_NOSIGNAL)) < 0)
                goto broken;
broken:
    free(buffer);
    shutdown(out, SHUT_WR);
    if (atomic_fetch_sub(&pair->left, 1) == 1) {
        close(pair->fd[0]);
        close(pair->fd[1]);
        free(pair);
    }
}

static void *down(void *argument)
{
    struct pair *pair = argument;
    pump(pair, 1);
    return NULL;
}

static void *up(void *argument)
{
    struct pair *pair = argument;
    struct sockaddr_storage destination;
    socklen_t length = sizeof destination;
    pthread_t other;
    int one = 1;
    getsockname(pair->fd[0], (struct sockaddr *)&destination, &length);
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&destination;
    if (IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr)) {
        struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = v6->sin6_port};
        v4.sin_addr.s_addr = v6->sin6_addr.s6_addr32[3];
        *(struct sockaddr_in *)&destination = v4;
        length = sizeof v4;
    }
    pair->fd[1] = socket(destination.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(pair->fd[0], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(pair->fd[1], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(pair->fd[1], (struct sockaddr *)&destination, length) || pthread_create(&other, &small, down, pair)) {
        close(pair->fd[0]);
        close(pair->fd[1]);
        free(pair);
        return NULL;
    }
    pthread_detach(other);
    pump(pair, 0);
    return NULL;
}

int main(int argc, char **argv)
{
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(argc > 1 ? atoi(argv[1]) : 0)};
    struct rlimit files;
    int one = 1, listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    signal(SIGPIPE, SIG_IGN);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (setsockopt(listener, SOL_IPV6, IPV6_TRANSPARENT, &one, sizeof one)
        || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) {
        perror("relay");
        return 1;
    }
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, STACK);
    printf("up\n");
    fflush(stdout);
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        struct pair *pair = fd < 0 ? NULL : malloc(sizeof *pair);
        pthread_t thread;
        if (!pair)
            continue;
        pair->fd[0] = fd;
        pair->fd[1] = -1;
        pair->left = 2;
        if (pthread_create(&thread, &small, up, pair)) {
            close(fd);
            free(pair);
        } else {
            pthread_detach(thread);
        }
    }
}
