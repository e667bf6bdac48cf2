"""The process that a network namespace lives with: it opens sockets there for its maker, and does nothing else.

namespace.py runs this file as a script, in a namespace that was made for it, with descriptor numbers as its arguments:
the control socket, and perhaps the presence pipe. It imports nothing of the package, to start fast.

A socket belongs to the namespace of the process that created it, for ever and whoever holds the descriptor. So the
maker asks here for a socket, gets the descriptor by SCM_RIGHTS, and uses it at home.

A request is one message, a JSON list `[verb, argument...]`; so is the answer, a JSON object. When the control socket is
at its end the maker is gone, however it died, and with the last process in it the kernel removes the namespace, its
links and its rules.

With a presence pipe, whatever still runs in the namespace is killed then. A program on its way here (forked, but not
yet in the namespace) is not to be seen, and would arrive after the last scan. So every program that such a maker starts
inherits the write end of the pipe: nobody is on the way when the pipe has no writer. Without such a pipe nothing is
killed: a namespace that turned out to be the host's own would be a bad place for that.
"""

import json
import os
import signal
import socket
import sys
import time
from typing import Any

MESSAGE_LIMIT = 65536
"""Bytes; requests and answers are far smaller."""
SWEEPS = 500
SWEEP_PAUSE = 0.01
"""Seconds between two scans for who is left: a killed process needs a moment to go."""


def main() -> None:
    """Serve until the maker is gone; with a presence pipe, leave nobody behind then."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    try:
        serve(control)
    except OSError:
        pass  # the maker vanished between a request and its answer
    for presence in map(int, sys.argv[2:]):
        empty_namespace(presence)


def serve(control: socket.socket) -> None:
    """Answer requests, one after the other, until the control socket ends."""
    control.send(json.dumps({"pid": os.getpid()}).encode())
    while request := control.recv(MESSAGE_LIMIT):
        verb, *arguments = json.loads(request)
        try:
            answer(control, verb, arguments)
        except OSError as error:
            control.send(json.dumps({"errno": error.errno, "error": error.strerror}).encode())


def answer(control: socket.socket, verb: str, arguments: list[Any]) -> None:
    """Do what was asked; an OSError of it goes to the maker."""
    if verb == "socket":
        with socket.socket(*arguments) as made:
            socket.send_fds(control, [b"{}"], [made.fileno()])
    elif verb == "read":
        # /proc/sys/net shows the namespace of whoever opens the file.
        with open(arguments[0], encoding="ascii") as file:
            text = file.read()
        control.send(json.dumps({"text": text}).encode())
    elif verb == "write":
        with open(arguments[0], "w", encoding="ascii") as file:
            file.write(arguments[1])
        control.send(b"{}")


def empty_namespace(presence: int) -> None:
    """Kill every other process in this namespace, again and again until none is here or on its way."""
    os.set_blocking(presence, False)
    for _ in range(SWEEPS):
        nobody_comes = at_end(presence)  # asked first: who arrives in between is seen below
        others = inhabitants()
        if nobody_comes and not others:
            return
        for pid in others:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(SWEEP_PAUSE)


def at_end(presence: int) -> bool:
    """True if nobody holds the write end of the pipe."""
    try:
        return os.read(presence, 1) == b""
    except BlockingIOError:
        return False


def inhabitants() -> list[int]:
    """The pids of the others in this network namespace. A zombie is in none."""
    here = os.stat("/proc/self/ns/net")
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid in pids if pid != os.getpid() and lives_in(pid, here)]


def lives_in(pid: int, namespace: os.stat_result) -> bool:
    """False also for processes that are gone by now or that we may not look at: those are not the maker's."""
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), namespace)
    except OSError:
        return False


if __name__ == "__main__":
    main()
