/*
 * Both ends of the traffic that the bench measures: an epoll loop each, so that they take as little as can be of the
 * processors that they share with the relays.
 *
 *   load server PORT...
 *       Listens on each port, IPv4 and IPv6; prints "up". A line on standard input is answered with what has come so
 *       far: bytes and connections of each port, and from whom. Serves until its input ends.
 *   load requests HOST PORT SECONDS CONNECTIONS REQUEST RESPONSE [RATE]
 *       Connections that stay, one request of so many bytes on its way in each, then its response. With RATE so many
 *       requests a second in all, at even distances: one that had to wait for the one before it counts from when it was
 *       due, so that a stall shows in every request that it has delayed.
 *   load connects HOST PORT SECONDS AT_ONCE server|client|reset
 *       So many at once: connect, 128 bytes there and back, close. Who closes first, or that the client resets.
 *   load bulk HOST PORT SECONDS STREAMS up|down|both
 *       As fast as it goes, until the time is over or SIGTERM comes. Bytes count where they arrive: those that go up
 *       are in what the server says.
 *   load idle HOST PORT CONNECTIONS AT_ONCE
 *       Open so many, AT_ONCE of them under way at a time, one exchange in each; a line of JSON. After each line on
 *       standard input, which says how many bytes are to come back, one more exchange in all of them; until it ends.
 *
 * The first three say "go" when the measurement begins, with all connections there and warm, "end" when it is over, and
 * then one line of JSON: whoever counts processor time counts it between the two. Times are seconds of CLOCK_MONOTONIC.
 */
#include "load.h"

int main(int argc, char **argv)
{
    prepare();
    if (argc > 2 && !strcmp(argv[1], "server")) {
        server(argc - 2, argv + 2);
        return 0;
    }
    if (argc > 3)
        aim(argv[2], argv[3]);
    if (argc > 7 && !strcmp(argv[1], "requests")) {
        alarm(atof(argv[4]) + 60); /* nobody waits for ever, whatever a relay does */
        requests(atof(argv[4]), atoi(argv[5]), atoi(argv[6]), atoi(argv[7]), argc > 8 ? atof(argv[8]) : 0);
    } else if (argc > 6 && !strcmp(argv[1], "connects")) {
        alarm(atof(argv[4]) + 60);
        connects(atof(argv[4]), atoi(argv[5]), argv[6][0]);
    } else if (argc > 6 && !strcmp(argv[1], "bulk")) {
        alarm(atof(argv[4]) + 60);
        bulk(atof(argv[4]), atoi(argv[5]), argv[6]);
    } else if (argc > 5 && !strcmp(argv[1], "idle")) {
        alarm(300);
        idle(atoi(argv[4]), atoi(argv[5]));
    } else {
        fprintf(stderr, "load: see the comment in main.c\n");
        return 2;
    }
    return 0;
}
