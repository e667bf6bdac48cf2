/* What both ends of the traffic have in common. main.c tells what there is. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK (128 * 1024) /* of one send or recv; iperf3 has the same */
#define EVENTS 512
#define WARM_UP(seconds) ((seconds) < 5 ? 0.1 * (seconds) : 0.5) /* before the measured time */
#define PATIENCE 5.0 /* seconds for an answer that is still missing at the end; then it is an error */

/* The beginning of each request, and of each stream: what the client wants. */
struct greeting {
    char kind; /* 'r' a request, 'u' a stream up, 'd' a stream down */
    char closer; /* 's': the server closes after its response */
    uint16_t unused;
    uint32_t request, response; /* bytes; the greeting is a part of the request */
};

/* One connection, at either end. */
struct conn {
    int fd;
    char state; /* 'c' connecting, 'w' waits for its turn or its end, 'r' awaits a response, 'u', 'd', 0 done */
    struct greeting what;
    uint64_t got; /* bytes of this request, or of this stream */
    uint32_t left; /* bytes to be sent by the server, or to be heard by the client */
    double began, due; /* when it was opened or asked, and when it should have been asked */
    void *owner; /* server: its listener */
    struct conn *next;
};

extern int poll_fd;
extern char block[CHUNK];
extern uint64_t errors;

/* common.c */
void die(const char *what) __attribute__((noreturn));
void fail(const char *what, int64_t count);
double now(void);
void watch(int op, struct conn *c, uint32_t events);
void no_delay(int fd);
void prepare(void);

/* latency.c */
void note(double seconds);
void forget(void);
uint64_t noted(void);
void print_latencies(void);

/* client.c */
void aim(const char *host, const char *port);
struct conn *make(int count, struct greeting what);
void begin(struct conn *c);
int connected(struct conn *c);
int ask(struct conn *c);
int hear(struct conn *c);
void open_all(struct conn *all, int count, int at_once);
void say(const char *word);
void print_errors(void);
void print_result(double seconds, uint64_t answered);

/* the modes, each in the file of its name */
void server(int count, char **ports);
void requests(double seconds, int count, uint32_t request, uint32_t response, double rate);
void connects(double seconds, int count, char closer);
void bulk(double seconds, int count, const char *direction);
void idle(int count, int at_once);
