/* Streams, as fast as they go. */
#include "load.h"
#include <signal.h>

static volatile sig_atomic_t told;

static void on_term(int number)
{
    told = number;
}

/* 0 if the other end is gone, though it should not be */
static int move(struct conn *c)
{
    ssize_t n = 1;
    for (int i = 0; i < 4 && n > 0; i++) { /* then it is others' turn */
        if (c->state == 'u')
            n = send(c->fd, block, CHUNK, MSG_DONTWAIT);
        else if ((n = recv(c->fd, block, CHUNK, MSG_DONTWAIT)) > 0)
            c->got += n;
    }
    if (n == 0)
        errno = 0;
    return n > 0 || (n < 0 && errno == EAGAIN);
}

static uint64_t sum(struct conn *all, int count)
{
    uint64_t bytes = 0;
    for (int i = 0; i < count; i++)
        bytes += all[i].got;
    return bytes;
}

/* Our FIN for what goes up, a plain close for what comes down. Returns how many have yet to end. */
static int finish(struct conn *all, int count)
{
    int left = 0;
    for (int i = 0; i < count; i++)
        if (all[i].state == 'u') {
            shutdown(all[i].fd, SHUT_WR);
            all[i].state = 'w';
            watch(EPOLL_CTL_MOD, &all[i], EPOLLIN);
            left++;
        } else if (all[i].state) {
            all[i].state = 0;
            close(all[i].fd);
        }
    return left;
}

void bulk(double seconds, int count, const char *direction)
{
    struct epoll_event events[EVENTS];
    int total = direction[0] == 'b' ? 2 * count : count, left = total, open = 0;
    struct conn *all = make(total, (struct greeting){.kind = 'u', .request = 128});
    for (int i = direction[0] == 'd' ? 0 : count; i < total; i++)
        all[i].what.kind = 'd';
    for (int i = 0; i < total; i++)
        begin(&all[i]);
    signal(SIGTERM, on_term);
    double start = now(), warm = start + WARM_UP(seconds), end = warm + seconds, time = start;
    uint64_t before = 0, after = 0;
    enum { COLD, MEASURED, OVER } phase = COLD;
    while (left && time < end + 2 * PATIENCE) {
        int n = epoll_wait(poll_fd, events, EVENTS, 10);
        time = now();
        if (phase == COLD && time >= warm && open == total) {
            phase = MEASURED;
            before = sum(all, total);
            end = time + seconds;
            warm = time;
            say("go");
        }
        if (phase == MEASURED && (time >= end || told)) {
            phase = OVER;
            after = sum(all, total);
            end = time;
            say("end");
            left = finish(all, total);
        }
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            if (c->state == 'c') {
                if (!connected(c) || !ask(c))
                    die("opening a stream");
                c->state = c->what.kind;
                open++;
                watch(EPOLL_CTL_MOD, c, c->state == 'u' ? EPOLLOUT : EPOLLIN);
            } else if (c->state == 'w') { /* the server's FIN, after all that we have sent */
                ssize_t got = recv(c->fd, block, 1, MSG_DONTWAIT);
                if (got < 0 && errno == EAGAIN)
                    continue; /* an event from before the shutdown */
                fail("end of a stream", got != 0);
                left--;
                c->state = 0;
                close(c->fd);
            } else if (c->state && !move(c)) {
                fail("stream", 1);
                left--;
                c->state = 0;
                close(c->fd);
            }
        }
    }
    errno = ETIMEDOUT;
    fail("end of a stream", left);
    printf("{\"seconds\": %.6f, \"down\": %lu, ", end - warm, after - before);
    print_errors();
    say("}");
}
