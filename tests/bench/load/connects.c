/* Connections that come and go: connect, 128 bytes there and back, close. */
#include "load.h"

static char closer;

/* 0: goes on, 1: over as it should be, -1: failed */
static int step(struct conn *c)
{
    int heard = 1;
    if (c->state == 'c') {
        if (!connected(c) || !ask(c))
            return -1;
        watch(EPOLL_CTL_MOD, c, EPOLLIN);
        return 0;
    }
    if (c->state == 'r' && (heard = hear(c)) != 1)
        return heard;
    if (closer != 's')
        return 1;
    c->state = 'w'; /* the server's FIN may still have to come */
    ssize_t n = recv(c->fd, block, 1, MSG_DONTWAIT);
    errno = n > 0 ? EBADMSG : errno;
    return n == 0 ? 1 : n < 0 && errno == EAGAIN ? 0 : -1;
}

void connects(double seconds, int count, char who)
{
    struct epoll_event events[EVENTS];
    struct conn *all = make(count, (struct greeting){.kind = 'r', .closer = who, .request = 128, .response = 128});
    struct linger reset = {.l_onoff = 1, .l_linger = 0};
    double start = now(), warm = start + WARM_UP(seconds), end = warm + seconds, time = start;
    uint64_t answered = 0;
    int left = count;
    enum { COLD, MEASURED, OVER } phase = COLD;
    closer = who;
    for (int i = 0; i < count; i++)
        begin(&all[i]);
    while (left && time < end + PATIENCE) {
        int n = epoll_wait(poll_fd, events, EVENTS, 10);
        time = now();
        if (phase == COLD && time >= warm) {
            phase = MEASURED;
            forget();
            warm = time;
            say("go");
        }
        if (phase == MEASURED && time >= end) {
            phase = OVER;
            answered = noted();
            end = time;
            say("end");
        }
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            int ended = step(c);
            if (!ended)
                continue;
            if (ended < 0)
                fail(c->state == 'c' ? "connect" : c->state == 'r' ? "response" : "close", 1);
            else
                note(now() - c->began);
            if (who == 'r')
                setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
            close(c->fd);
            if (phase == OVER)
                left--;
            else
                begin(c);
        }
    }
    errno = ETIMEDOUT;
    fail("connection", left);
    print_result(end - warm, answered);
}
