"""The process of the guard, from its first message to its exit code. The relay starts it.

What it finds: at descriptor 0 the channel to the relay's supervisor. Signals that are meant for the relay's whole group
(Ctrl-C, a service manager's TERM) do not concern it, nor the programs that it runs: they inherit that.
"""

import os
import signal
import sys

from tproxy_relay.errors import RelayError
from tproxy_relay.guard import guard, messages
from tproxy_relay.guard.guard import Guard
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import Channel
from tproxy_relay.system import proc_title


def main() -> int:
    """The process. The relay starts it; by hand it is of no use."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    proc_title.become(proc_title.GUARD)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a relay that is PID 1 ignores it, and exit codes would be lost
    try:
        talk = _standard_input()
    except OSError:
        print("the guard of the ruleset is started by `tproxy-relay run`", file=sys.stderr)
        return 2
    received = messages.receive_order(talk)
    if received is None:
        return 0
    try:
        start = messages.start_of(received[0])
        one = Guard(talk, start)
    except RelayError as error:
        messages.send_event(talk, messages.Failed(str(error), error.exit_code))
        return error.exit_code
    one.send(messages.Installed(one.backend, start.state))
    try:
        one.watch()
    except BaseException:
        one.relay_died()
        raise
    return 0


def _standard_input() -> Channel:
    """The channel, away from descriptor 0, which stays taken when the channel is closed: programs would meet
    something else there. Raises OSError if it is none."""
    talk = channel.adopt(os.dup(0))
    guard.put_nothing_at(0)
    return talk


if __name__ == "__main__":
    sys.exit(main())
