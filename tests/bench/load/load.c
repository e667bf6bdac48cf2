/*
 * Both ends of the traffic that the bench measures: one epoll loop each, so that a generator costs as little of the
 * processors that it shares with the relays as can be.
 *
 *   load server PORT...
 *       Listens on each port, IPv4 and IPv6; prints "up", serves until its standard input ends.
 *   load rr     HOST PORT SECONDS CONNECTIONS REQUEST RESPONSE [RATE]
 *       Connections that stay, one request of so many bytes on its way in each, then its response. With RATE,
 *       so many requests a second in all, at even distances: a request that had to wait for the one before it counts
 *       from when it was due, so that a stall shows in every request that it delayed.
 *   load conn   HOST PORT SECONDS CONNECTIONS server|client|reset
 *       So many at once: connect, 128 bytes there and back, close. Who closes first.
 *   load bulk   HOST PORT SECONDS STREAMS up|down|both
 *       As fast as it goes. Bytes are counted where they arrive.
 *   load idle   HOST PORT CONNECTIONS AT_ONCE
 *       Open so many, AT_ONCE of them under way at a time, one exchange in each; prints a line, and after each
 *       line on standard input makes one more exchange in all of them; until the input ends.
 *
 * Each prints one line of JSON for a measurement. Times are in seconds of CLOCK_MONOTONIC.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHUNK (128 * 1024) /* as iperf3 */
#define EVENTS 512
#define WARM_UP 0.1 /* of the measured seconds: not counted */

/* What a connection is for: the first thing that the client sends. */
struct greeting {
    char kind; /* 'r' requests, 'u' bulk up, 'd' bulk down */
    char closer; /* 's' the server closes after its response */
    uint16_t unused;
    uint32_t request, response; /* bytes; both hold the greeting itself in the first request */
};

struct conn {
    int fd;
    char state; /* server: 'g' greeting. client: 'c' connecting. both: 'r', 'u', 'd', 'w' waits, 0 done */
    struct greeting what;
    uint32_t got, left; /* of this request or response */
    uint64_t bytes;
    double began, due;
    struct conn *next;
};

static char block[CHUNK];
static int epoll_fd;

static void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void watch(int op, struct conn *c, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(epoll_fd, op, c->fd, &event))
        die("epoll_ctl");
}

static void no_delay(int fd)
{
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static void lift_limits(void)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
}

/* --- latencies: 32 steps for each power of two, so that a figure is right to 3 % --- */

#define STEPS 32
static uint64_t counts[64 * STEPS], measured;
static double longest;

static void note(double seconds)
{
    uint64_t ns = seconds > 0 ? (uint64_t)(seconds * 1e9) : 0;
    int power = ns < STEPS ? 0 : 63 - __builtin_clzll(ns) - 4; /* ns >> (power - 1) is STEPS at least */
    counts[power ? power * STEPS + (ns >> (power - 1)) - STEPS : ns]++;
    measured++;
    if (seconds > longest)
        longest = seconds;
}

static double percentile(double part)
{
    uint64_t wanted = (uint64_t)(part * measured), seen = 0;
    for (int i = 0; i < 64 * STEPS; i++) {
        seen += counts[i];
        if (seen > wanted) {
            int power = i / STEPS;
            return (power ? ((uint64_t)(i % STEPS) + STEPS) << (power - 1) : (uint64_t)i) / 1e9;
        }
    }
    return longest;
}

static void print_latencies(void)
{
    printf("\"count\": %lu, \"p50\": %.9f, \"p90\": %.9f, \"p99\": %.9f, \"p999\": %.9f, \"max\": %.9f", measured,
        percentile(0.5), percentile(0.9), percentile(0.99), percentile(0.999), longest);
}

/* --- the server --- */

static struct conn *spare;

static struct conn *fresh(int fd)
{
    struct conn *c = spare;
    if (c)
        spare = c->next;
    else if (!(c = malloc(sizeof *c)))
        die("malloc");
    memset(c, 0, sizeof *c);
    c->fd = fd;
    return c;
}

static void drop(struct conn *c)
{
    close(c->fd);
    c->next = spare;
    spare = c;
}

static int send_rest(struct conn *c) /* 0 if the other end is gone */
{
    while (c->left) {
        ssize_t n = send(c->fd, block, c->left < CHUNK ? c->left : CHUNK, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN)
            return 1;
        if (n < 0)
            return 0;
        c->left -= n;
    }
    return 1;
}

static void serve(struct conn *c, uint32_t events)
{
    int reads = 0;
    if (events & EPOLLOUT) {
        if (c->state == 'd')
            c->left = 1u << 30;
        if (!send_rest(c)) {
            drop(c);
            return;
        }
        if (!c->left && c->state == 'r')
            watch(EPOLL_CTL_MOD, c, EPOLLIN);
    }
    while (events & (EPOLLIN | EPOLLHUP | EPOLLERR) && reads++ < 8) {
        ssize_t n = recv(c->fd, block, CHUNK, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0) {
            if (n == 0 && c->state == 'u') /* how much came */
                send(c->fd, &c->bytes, sizeof c->bytes, MSG_DONTWAIT);
            drop(c);
            return;
        }
        c->bytes += n;
        if (c->state == 'g') {
            memcpy((char *)&c->what + c->got, block, c->got + (size_t)n > sizeof c->what ? sizeof c->what - c->got : (size_t)n);
            c->got += n;
            if (c->got < sizeof c->what)
                continue;
            c->state = c->what.kind;
            n = 0;
            if (c->state == 'd')
                watch(EPOLL_CTL_MOD, c, EPOLLIN | EPOLLOUT);
        }
        if (c->state != 'r')
            continue;
        c->got += n;
        if (c->got < c->what.request)
            continue;
        c->got = 0;
        c->left = c->what.response;
        if (!send_rest(c) || (c->what.closer == 's' && !c->left)) {
            drop(c);
            return;
        }
        if (c->left)
            watch(EPOLL_CTL_MOD, c, EPOLLIN | EPOLLOUT);
        if (n < CHUNK)
            return;
    }
}

static void server(int count, char **ports)
{
    struct conn *first = calloc(count + 1, sizeof *first);
    struct epoll_event events[EVENTS];
    for (int i = 0; i < count; i++) {
        struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(ports[i]))};
        int one = 1, fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 65535))
            die("listen");
        first[i].fd = fd;
        watch(EPOLL_CTL_ADD, &first[i], EPOLLIN);
    }
    first[count].fd = 0;
    watch(EPOLL_CTL_ADD, &first[count], EPOLLIN);
    printf("up\n");
    fflush(stdout);
    for (;;) {
        int n = epoll_wait(epoll_fd, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            if (c == &first[count])
                exit(0);
            if (c < first || c > &first[count]) {
                serve(c, events[i].events);
                continue;
            }
            for (int batch = 0; batch < 64; batch++) {
                int fd = accept4(c->fd, NULL, NULL, SOCK_CLOEXEC);
                if (fd < 0)
                    break;
                no_delay(fd);
                struct conn *accepted = fresh(fd);
                accepted->state = 'g';
                watch(EPOLL_CTL_ADD, accepted, EPOLLIN);
            }
        }
    }
}

/* --- the client --- */

static struct sockaddr_storage target;
static socklen_t target_length;
static uint64_t errors;

static void aim(const char *host, const char *port)
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

static void begin(struct conn *c)
{
    c->began = now();
    c->fd = socket(target.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        die("socket");
    no_delay(c->fd);
    c->state = 'c';
    c->got = 0;
    if (connect(c->fd, (struct sockaddr *)&target, target_length) && errno != EINPROGRESS)
        die("connect");
    watch(EPOLL_CTL_ADD, c, EPOLLOUT);
}

/* The greeting is the beginning of the first request. */
static int ask(struct conn *c)
{
    memcpy(block, &c->what, sizeof c->what);
    c->left = c->what.response;
    return send(c->fd, block, c->what.request, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)c->what.request;
}

/* 1 if the response is whole, 0 if not yet, -1 at an error */
static int hear(struct conn *c)
{
    while (c->left) {
        ssize_t n = recv(c->fd, block, CHUNK, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN)
            return 0;
        if (n <= 0 || (uint32_t)n > c->left)
            return -1;
        c->left -= n;
    }
    return 1;
}

static int connected(struct conn *c)
{
    int error = 0;
    socklen_t length = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
    return !error;
}

static struct conn *make(int count, struct greeting what)
{
    struct conn *all = calloc(count, sizeof *all);
    for (int i = 0; i < count; i++)
        all[i].what = what;
    return all;
}

/* Open them, so many at a time, with one exchange in each. */
static void open_all(struct conn *all, int count, int at_once)
{
    struct epoll_event events[EVENTS];
    int begun = 0, open = 0, deadline = 0;
    while (begun < count && begun < at_once)
        begin(&all[begun++]);
    while (open < count) {
        int n = epoll_wait(epoll_fd, events, EVENTS, 1000);
        if (n == 0 && ++deadline == 60) {
            errno = ETIMEDOUT;
            die("opening connections");
        }
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            int heard = 0;
            if (c->state == 'c') {
                if (!connected(c) || !ask(c))
                    die("opening a connection");
                c->state = 'r';
                watch(EPOLL_CTL_MOD, c, EPOLLIN);
            } else if ((heard = hear(c)) < 0) {
                die("opening a connection");
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

static void forget(void)
{
    memset(counts, 0, sizeof counts);
    measured = 0;
    longest = 0;
}

static void rr(double seconds, int count, int request, int response, double rate)
{
    struct epoll_event events[EVENTS];
    struct greeting what = {.kind = 'r', .closer = '-', .request = request, .response = response};
    struct conn *all = make(count, what);
    open_all(all, count, 64);
    forget();
    double start = now(), warm = start + WARM_UP * seconds, end = start + seconds, gap = rate ? count / rate : 0;
    uint64_t before = 0;
    for (int i = 0; i < count; i++) {
        all[i].due = start + (rate ? i / rate : 0);
        if (!rate) {
            all[i].state = 'r';
            if (!ask(&all[i]))
                errors++;
        }
    }
    for (double time = start; time < end; time = now()) {
        int patience = 100;
        if (rate)
            for (int i = 0; i < count; i++) {
                struct conn *c = &all[i];
                if (c->state == 'w' && c->due <= time) {
                    c->state = 'r';
                    if (!ask(c))
                        errors++;
                }
            }
        if (rate)
            patience = count > 100 ? 0 : 1;
        int n = epoll_wait(epoll_fd, events, EVENTS, patience);
        time = now();
        if (!before && time >= warm) {
            before = 1;
            forget();
            warm = time;
        }
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            int heard = hear(c);
            if (heard == 0)
                continue;
            if (heard < 0) {
                errors++;
                epoll_ctl(epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
                c->state = 0;
                continue;
            }
            time = now();
            note(time - c->due);
            c->due = rate ? c->due + gap : time;
            c->state = 'w';
            if (c->due <= time) {
                c->state = 'r';
                if (!ask(c))
                    errors++;
            }
        }
    }
    printf("{\"seconds\": %.6f, \"errors\": %lu, ", now() - warm, errors);
    print_latencies();
    printf("}\n");
}

static void conn(double seconds, int count, const char *closer)
{
    struct epoll_event events[EVENTS];
    struct greeting what = {.kind = 'r', .closer = closer[0], .request = 128, .response = 128};
    struct conn *all = make(count, what);
    struct linger reset = {.l_onoff = 1, .l_linger = 0};
    double start = now(), warm = start + WARM_UP * seconds, end = start + seconds;
    int warmed = 0;
    for (int i = 0; i < count; i++)
        begin(&all[i]);
    while (now() < end) {
        int n = epoll_wait(epoll_fd, events, EVENTS, 100);
        if (!warmed && now() >= warm) {
            warmed = 1;
            forget();
            warm = now();
        }
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            int ended = 0;
            if (c->state == 'c') {
                if (connected(c) && ask(c)) {
                    c->state = 'r';
                    watch(EPOLL_CTL_MOD, c, EPOLLIN);
                } else {
                    ended = -1;
                }
            } else if (c->state == 'r') {
                ended = hear(c);
                if (ended == 1 && closer[0] == 's') { /* its FIN is still to come */
                    c->state = 'w';
                    ended = recv(c->fd, block, 1, MSG_DONTWAIT) == 0;
                }
            } else {
                ended = recv(c->fd, block, 1, MSG_DONTWAIT) == 0 ? 1 : -1;
            }
            if (!ended)
                continue;
            if (ended < 0)
                errors++;
            else
                note(now() - c->began);
            if (closer[0] == 'r')
                setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
            close(c->fd);
            begin(c);
        }
    }
    printf("{\"seconds\": %.6f, \"errors\": %lu, ", now() - warm, errors);
    print_latencies();
    printf("}\n");
}

static void bulk(double seconds, int count, const char *direction)
{
    struct epoll_event events[EVENTS];
    int both = direction[0] == 'b', total = both ? 2 * count : count, left = 0;
    struct conn *all = make(total, (struct greeting){.kind = 'u', .request = 128});
    uint64_t up = 0, down = 0;
    for (int i = 0; i < total; i++)
        if (direction[0] == 'd' || i >= count)
            all[i].what.kind = 'd';
    for (int i = 0; i < total; i++)
        begin(&all[i]);
    /* Downwards bytes count from the first to the last moment of the sending, upwards when the server has said how many
     * have come, at the end of it all: what is in buffers then is not on its way any more. */
    double start = now(), end = start + seconds, down_end = end, finish = start + seconds + 10;
    for (left = total; left;) {
        double time = now();
        if (time > finish) {
            errors += left;
            break;
        }
        int n = epoll_wait(epoll_fd, events, EVENTS, 10);
        time = now();
        if (time >= end)
            for (int i = 0; i < total; i++) {
                struct conn *c = &all[i];
                if (c->state == 'u') {
                    shutdown(c->fd, SHUT_WR);
                    c->state = 'w';
                    watch(EPOLL_CTL_MOD, c, EPOLLIN);
                } else if (c->state == 'd') {
                    down_end = time;
                    down += c->bytes;
                    c->state = 0;
                    left--;
                    close(c->fd);
                }
            }
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            ssize_t moved = 1;
            if (c->state == 'c') {
                if (!connected(c) || !ask(c))
                    die("opening a stream");
                c->state = c->what.kind;
                watch(EPOLL_CTL_MOD, c, c->state == 'u' ? EPOLLOUT : EPOLLIN);
            } else if (c->state == 'u') {
                for (int more = 0; more < 4 && moved > 0; more++)
                    moved = send(c->fd, block, CHUNK, MSG_DONTWAIT | MSG_NOSIGNAL);
            } else if (c->state == 'd') {
                for (int more = 0; more < 4 && moved > 0; more++)
                    if ((moved = recv(c->fd, block, CHUNK, MSG_DONTWAIT)) > 0)
                        c->bytes += moved;
            } else if (c->state == 'w') {
                uint64_t bytes;
                moved = recv(c->fd, &bytes, sizeof bytes, MSG_DONTWAIT);
                if (moved == sizeof bytes) {
                    up += bytes;
                    left--;
                    c->state = 0;
                    close(c->fd);
                }
            }
            if (moved == 0 || (moved < 0 && errno != EAGAIN)) {
                errors++;
                left--;
                c->state = 0;
                close(c->fd);
            }
        }
    }
    double up_seconds = now() - start, down_seconds = down_end - start;
    printf("{\"errors\": %lu, \"bytes\": %lu, \"bits_per_second\": %.0f}\n", errors, up + down,
        (up ? up / up_seconds : 0) * 8 + (down ? down / down_seconds : 0) * 8);
}

static void idle(int count, int at_once)
{
    char line[16];
    struct epoll_event events[EVENTS];
    struct conn *all = make(count, (struct greeting){.kind = 'r', .closer = '-', .request = 128, .response = 128});
    double start = now();
    open_all(all, count, at_once);
    for (;;) {
        printf("{\"seconds\": %.6f, \"errors\": %lu, ", now() - start, errors);
        print_latencies();
        printf("}\n");
        fflush(stdout);
        if (!fgets(line, sizeof line, stdin))
            return;
        forget();
        start = now();
        double deadline = start + 60;
        int begun = 0, done = 0, under_way = 0;
        while (done < count) {
            while (begun < count && under_way < at_once) {
                all[begun].began = now();
                if (!ask(&all[begun++]))
                    errors++;
                under_way++;
            }
            int n = epoll_wait(epoll_fd, events, EVENTS, 1000);
            if (now() > deadline) {
                errors += count - done;
                break;
            }
            for (int i = 0; i < n; i++) {
                struct conn *c = events[i].data.ptr;
                int heard = hear(c);
                if (!heard)
                    continue;
                if (heard < 0) {
                    errors++;
                    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
                } else {
                    note(now() - c->began);
                }
                done++;
                under_way--;
            }
        }
    }
}

int main(int argc, char **argv)
{
    lift_limits();
    for (size_t i = 0; i < sizeof block; i++)
        block[i] = (char)(i * 31);
    if (argc > 2 && !strcmp(argv[1], "server")) {
        server(argc - 2, argv + 2);
        return 0;
    }
    if (argc > 3)
        aim(argv[2], argv[3]);
    if (argc > 7 && !strcmp(argv[1], "rr"))
        rr(atof(argv[4]), atoi(argv[5]), atoi(argv[6]), atoi(argv[7]), argc > 8 ? atof(argv[8]) : 0);
    else if (argc > 6 && !strcmp(argv[1], "conn"))
        conn(atof(argv[4]), atoi(argv[5]), argv[6]);
    else if (argc > 6 && !strcmp(argv[1], "bulk"))
        bulk(atof(argv[4]), atoi(argv[5]), argv[6]);
    else if (argc > 5 && !strcmp(argv[1], "idle"))
        idle(atoi(argv[4]), atoi(argv[5]));
    else {
        fprintf(stderr, "load: see the comment in load.c\n");
        return 2;
    }
    return 0;
}
