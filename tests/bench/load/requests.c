/* Requests and responses on connections that stay. */
#include "load.h"
#include <sys/timerfd.h>

static struct conn *all;
static int count, under_way;
static double gap; /* between two requests of one connection; 0: the next comes when the last is answered */

static void send_one(struct conn *c, double time)
{
    c->began = time;
    under_way++;
    if (!ask(c)) {
        fail("request", 1);
        under_way--;
        c->state = 0;
    }
}

static void hear_one(struct conn *c, double end)
{
    int heard = hear(c);
    if (!heard)
        return;
    under_way -= c->state == 'r';
    if (heard < 0 || c->state != 'r') { /* nobody has asked it: this is its end */
        fail("response", 1);
        c->state = 0;
        epoll_ctl(poll_fd, EPOLL_CTL_DEL, c->fd, NULL);
        return;
    }
    c->state = 'w';
    double time = now();
    note(time - c->due);
    c->due = gap ? c->due + gap : time;
    if (c->due <= time && c->due < end)
        send_one(c, time);
}

/* All that is due, in its order: connection after connection. What finds its connection busy follows when
 * that is not. Returns the next one's number. */
static uint64_t send_due(uint64_t number, double start, double rate, double end)
{
    double time = now();
    for (; start + number / rate <= time && start + number / rate < end; number++) {
        struct conn *c = &all[number % count];
        if (c->state == 'w' && c->due <= time)
            send_one(c, time);
    }
    return number;
}

/* When the next one is due. Not by epoll_wait's timeout: it counts in milliseconds. */
static void set_timer(int timer, double due)
{
    struct itimerspec at = {.it_value = {.tv_sec = (time_t)due, .tv_nsec = (long)((due - (time_t)due) * 1e9)}};
    if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL))
        die("timerfd_settime");
}

/* Those that are not answered now have taken so long at least. One that was sent long ago never will be. */
static void give_up(double end)
{
    double time = now();
    for (int i = 0; i < count; i++) {
        errno = ETIMEDOUT;
        fail("response", all[i].state == 'r' && time - all[i].began > PATIENCE);
        for (double due = all[i].due; gap && all[i].state && due < end; due += gap)
            note(time - due);
    }
}

void requests(double seconds, int connections, uint32_t request, uint32_t response, double rate)
{
    struct epoll_event events[EVENTS];
    struct conn timer = {.fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)};
    uint64_t number = 0, answered = 0;
    count = connections;
    all = make(count, (struct greeting){.kind = 'r', .closer = '-', .request = request, .response = response});
    open_all(all, count, 64);
    watch(EPOLL_CTL_ADD, &timer, EPOLLIN);
    forget();
    double start = now(), warm = start + WARM_UP(seconds), end = warm + seconds, time = start;
    gap = rate ? count / rate : 0;
    for (int i = 0; i < count; i++) {
        all[i].due = start + (rate ? i / rate : 0);
        if (!rate)
            send_one(&all[i], start);
    }
    enum { COLD, MEASURED, OVER } phase = COLD;
    while (phase != OVER || (under_way && time < end + PATIENCE)) {
        if (rate && phase != OVER) {
            number = send_due(number, start, rate, end);
            set_timer(timer.fd, start + number / rate);
        }
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
            epoll_ctl(poll_fd, EPOLL_CTL_DEL, timer.fd, NULL);
        }
        for (int i = 0; i < n; i++)
            if (events[i].data.ptr != &timer)
                hear_one(events[i].data.ptr, end);
    }
    give_up(end);
    print_result(end - warm, answered);
}
