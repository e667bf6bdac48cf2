"""The process of the doctor for a running relay, for one look. The relay starts it; by hand it is of no use.

What it finds: at standard input one JSON object, the order, and then nothing until its end, which is the relay's: then
it ends at once, and the kernel takes away what it has made for the moment. It answers in lines of JSON.
"""

import contextlib
import json
import os
import signal
import sys
import threading

from tproxy_relay.check import background

NICENESS = 10
"""nice(2): the connections come first."""


def main() -> int:
    """Carry out the order. Returns the exit code: 2 if there is none."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OSError):  # kept from us by a service manager
        os.nice(NICENESS)
    try:
        order = background.order_of(json.loads(sys.stdin.readline()))
    except (ValueError, KeyError, TypeError):
        print("started by `tproxy-relay run`, for itself; for people there is `tproxy-relay check`", file=sys.stderr)
        return 2
    threading.Thread(target=_end_with_the_relay, name="relay", daemon=True).start()
    for line in background.carry_out(order):
        print(json.dumps(line), flush=True)
    os._exit(0)  # nothing is left to do, and to do that properly takes a tenth of the time


def _end_with_the_relay() -> None:
    while os.read(0, 4096):
        continue
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
