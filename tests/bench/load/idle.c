/* Many connections that do nothing, until they are asked. */
#include "load.h"

/* One exchange in each; those that do not end are errors. */
static void ask_all(struct conn *all, int count, int at_once)
{
    struct epoll_event events[EVENTS];
    int begun = 0, done = 0;
    while (done < count) {
        for (; begun < count && begun - done < at_once; begun++) {
            all[begun].began = now();
            if (all[begun].state && !ask(&all[begun]))
                all[begun].state = 0;
            if (!all[begun].state) {
                fail("request", 1);
                done++;
            }
        }
        int n = epoll_wait(poll_fd, events, EVENTS, 1000 * PATIENCE);
        if (n == 0) {
            errno = ETIMEDOUT;
            fail("response", count - done);
            return;
        }
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            int heard = hear(c);
            if (!heard)
                continue;
            if (heard < 0 || c->state != 'r') { /* it was not asked, and has ended */
                fail("response", 1);
                epoll_ctl(poll_fd, EPOLL_CTL_DEL, c->fd, NULL);
                done += c->state == 'r';
                c->state = 0;
                continue;
            }
            note(now() - c->began);
            c->state = 'w';
            done++;
        }
    }
}

void idle(int count, int at_once)
{
    char line[32];
    struct conn *all = make(count, (struct greeting){.kind = 'r', .closer = '-', .request = 128, .response = 128});
    double start = now();
    open_all(all, count, at_once);
    print_result(now() - start, noted());
    while (fgets(line, sizeof line, stdin)) {
        for (int i = 0; i < count; i++)
            all[i].what.response = atoi(line);
        forget();
        start = now();
        ask_all(all, count, at_once);
        print_result(now() - start, noted());
    }
}
