/* What all modes of the client need: connections, and one request and its response. */
#include "load.h"
#include <arpa/inet.h>
#include <netinet/in.h>

static struct sockaddr_storage target;
static socklen_t target_length;

void aim(const char *host, const char *port)
{
    struct sockaddr_in *v4 = (struct sockaddr_in *)&target;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&target;
    if (inet_pton(AF_INET, host, &v4->sin_addr) == 1) {
        v4->sin_family = AF_INET;
        v4->sin_port = htons(atoi(port));
        target_length = sizeof *v4;
    } else if (inet_pton(AF_INET6, host, &v6->sin6_addr) == 1) {
        v6->sin6_family = AF_INET6;
        v6->sin6_port = htons(atoi(port));
        target_length = sizeof *v6;
    } else {
        errno = EINVAL;
        die(host);
    }
}

struct conn *make(int count, struct greeting what)
{
    struct conn *all = calloc(count, sizeof *all);
    if (!all)
        die("calloc");
    for (int i = 0; i < count; i++)
        all[i].what = what;
    return all;
}

void begin(struct conn *c)
{
    c->began = now();
    c->fd = socket(target.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        die("socket");
    no_delay(c->fd);
    c->state = 'c';
    if (connect(c->fd, (struct sockaddr *)&target, target_length) && errno != EINPROGRESS)
        die("connect");
    watch(EPOLL_CTL_ADD, c, EPOLLOUT);
}

int connected(struct conn *c)
{
    int error = 0;
    socklen_t length = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
    errno = error;
    return !error;
}

/* 0 if it could not be sent. */
int ask(struct conn *c)
{
    memcpy(block, &c->what, sizeof c->what);
    c->left = c->what.response;
    c->state = 'r';
    return send(c->fd, block, c->what.request, MSG_DONTWAIT) == (ssize_t)c->what.request;
}

/* 1 if the response is whole, 0 if not yet, -1 at an error */
int hear(struct conn *c)
{
    static char heard[CHUNK];
    while (c->left) {
        ssize_t n = recv(c->fd, heard, CHUNK, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN)
            return 0;
        if (n >= 0)
            errno = 0;
        if (n <= 0 || (uint64_t)n > c->left)
            return -1;
        c->left -= n;
    }
    return 1;
}

/* Open them, so many at a time, with one exchange in each: the time of each, from the connect on, is noted. */
void open_all(struct conn *all, int count, int at_once)
{
    struct epoll_event events[EVENTS];
    int begun = 0, open = 0;
    double deadline = now() + 60;
    while (begun < count && begun < at_once)
        begin(&all[begun++]);
    while (open < count) {
        int n = epoll_wait(poll_fd, events, EVENTS, 10000);
        if (n == 0 || now() > deadline) {
            fprintf(stderr, "load: %d of %d connections were opened, and then no more\n", open, count);
            exit(1);
        }
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            int heard = 0;
            if (c->state == 'c') {
                if (!connected(c) || !ask(c))
                    die("opening a connection");
                watch(EPOLL_CTL_MOD, c, EPOLLIN);
            } else if ((heard = hear(c)) < 0) {
                fprintf(stderr, "load: connection %d of %d ended at once\n", open + 1, count);
                exit(1);
            }
            if (heard) {
                note(now() - c->began);
                c->state = 'w';
                open++;
                if (begun < count)
                    begin(&all[begun++]);
            }
        }
    }
}

void say(const char *word)
{
    puts(word);
    fflush(stdout);
}

void print_result(double seconds, uint64_t answered)
{
    printf("{\"seconds\": %.6f, \"answered\": %lu, ", seconds, answered);
    print_latencies();
    printf(", ");
    print_errors();
    say("}");
}
