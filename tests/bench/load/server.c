/* The server of all modes: it does what the greeting says, and remembers who came. */
#include "load.h"
#include <arpa/inet.h>
#include <netinet/in.h>

#define VISITORS 8

/* A port, and what came to it. One relay has one address; more than a few would be a mistake of the rules. */
struct listener {
    struct conn conn;
    int port, visitors;
    uint64_t bytes;
    struct {
        struct in6_addr address;
        uint64_t count;
    } from[VISITORS];
};

static struct conn *spare;

static struct conn *fresh(int fd, struct listener *owner)
{
    struct conn *c = spare;
    if (c)
        spare = c->next;
    else if (!(c = malloc(sizeof *c)))
        die("malloc");
    memset(c, 0, sizeof *c);
    c->fd = fd;
    c->owner = owner;
    return c;
}

static void drop(struct conn *c)
{
    close(c->fd);
    c->next = spare;
    spare = c;
}

/* 0 if the other end is gone */
static int send_rest(struct conn *c)
{
    while (c->left) {
        ssize_t n = send(c->fd, block, c->left < CHUNK ? c->left : CHUNK, MSG_DONTWAIT);
        if (n < 0)
            return errno == EAGAIN;
        c->left -= n;
    }
    return 1;
}

/* What came, in `block`; 0 if this connection is over. A client sends no request before it has its response. */
static int take(struct conn *c, size_t n)
{
    if (c->got < sizeof c->what) {
        size_t missing = sizeof c->what - c->got;
        memcpy((char *)&c->what + c->got, block, n < missing ? n : missing);
    }
    c->got += n;
    ((struct listener *)c->owner)->bytes += n;
    if (c->got < sizeof c->what || c->what.kind == 'u')
        return 1;
    if (c->what.kind == 'd') {
        watch(EPOLL_CTL_MOD, c, EPOLLIN | EPOLLOUT);
        return 1;
    }
    if (c->got < c->what.request)
        return 1;
    c->got = 0;
    c->left = c->what.response;
    if (!send_rest(c) || (c->what.closer == 's' && !c->left))
        return 0;
    if (c->left)
        watch(EPOLL_CTL_MOD, c, EPOLLIN | EPOLLOUT);
    return 1;
}

static void serve(struct conn *c, uint32_t events)
{
    if (events & EPOLLOUT) {
        if (c->what.kind == 'd')
            c->left = 1u << 30; /* for ever */
        if (!send_rest(c)) {
            drop(c);
            return;
        }
        if (!c->left && c->what.kind == 'r')
            watch(EPOLL_CTL_MOD, c, EPOLLIN);
    }
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        return;
    for (int reads = 0; reads < 8; reads++) { /* then it is others' turn */
        ssize_t n = recv(c->fd, block, CHUNK, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0 || !take(c, n)) {
            drop(c);
            return;
        }
        if (n < CHUNK)
            return;
    }
}

static void welcome(struct listener *listener)
{
    for (int batch = 0; batch < 64; batch++) {
        struct sockaddr_in6 who;
        socklen_t length = sizeof who;
        int fd = accept4(listener->conn.fd, (struct sockaddr *)&who, &length, SOCK_CLOEXEC), i = 0;
        if (fd < 0)
            return;
        while (i < listener->visitors && memcmp(&listener->from[i].address, &who.sin6_addr, sizeof who.sin6_addr))
            i++;
        if (i < VISITORS) {
            listener->from[i].address = who.sin6_addr;
            listener->from[i].count++;
            if (i == listener->visitors)
                listener->visitors++;
        }
        no_delay(fd);
        watch(EPOLL_CTL_ADD, fresh(fd, listener), EPOLLIN);
    }
}

static void report(struct listener *all, int count)
{
    printf("{\"time\": %.6f", now());
    for (int i = 0; i < count; i++) {
        if (!all[i].visitors)
            continue;
        printf(", \"%d\": {\"bytes\": %lu, \"from\": {", all[i].port, all[i].bytes);
        for (int j = 0; j < all[i].visitors; j++) {
            char text[INET6_ADDRSTRLEN];
            inet_ntop(AF_INET6, &all[i].from[j].address, text, sizeof text);
            printf("%s\"%s\": %lu", j ? ", " : "", text, all[i].from[j].count);
        }
        printf("}}");
    }
    printf("}\n");
    fflush(stdout);
}

static void listen_on(struct listener *listener, const char *port)
{
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(port))};
    int one = 1, fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 65535))
        die("listen");
    listener->port = atoi(port);
    listener->conn.fd = fd;
    watch(EPOLL_CTL_ADD, &listener->conn, EPOLLIN);
}

void server(int count, char **ports)
{
    struct listener *all = calloc(count + 1, sizeof *all), *last = &all[count];
    struct epoll_event events[EVENTS];
    char line[16];
    for (int i = 0; i < count; i++)
        listen_on(&all[i], ports[i]);
    watch(EPOLL_CTL_ADD, &last->conn, EPOLLIN); /* standard input: descriptor 0 */
    printf("up\n");
    fflush(stdout);
    for (;;) {
        int n = epoll_wait(poll_fd, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            void *who = events[i].data.ptr;
            if (who == last) {
                if (read(0, line, sizeof line) <= 0)
                    return;
                report(all, count);
            } else if (who >= (void *)all && who < (void *)last) {
                welcome(who);
            } else {
                serve(who, events[i].events);
            }
        }
    }
}
