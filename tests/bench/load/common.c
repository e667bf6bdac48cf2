/* Clock, epoll, and the limits of the process. */
#include "load.h"
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/resource.h>
#include <time.h>

int poll_fd;
char block[CHUNK];
uint64_t errors;
static char first_error[200];

void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* What went wrong, so many times; the first is told with its errno, 0 for an end that came too early. */
void fail(const char *what, int64_t count)
{
    if (count > 0 && !errors)
        snprintf(first_error, sizeof first_error, "%s: %s", what, errno ? strerror(errno) : "ended");
    errors += count;
}

void print_errors(void)
{
    printf("\"errors\": %lu, \"first_error\": \"%s\"", errors, first_error);
}

double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

void watch(int op, struct conn *c, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(poll_fd, op, c->fd, &event))
        die("epoll_ctl");
}

void no_delay(int fd)
{
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

void prepare(void)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    for (size_t i = 0; i < sizeof block; i++)
        block[i] = (char)(i * 31);
    if ((poll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0)
        die("epoll_create1");
}
