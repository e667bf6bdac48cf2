"""The process of a worker, from its first order to its last log line. The supervisor starts it.

What it finds: at descriptor 0 the channel to the supervisor, at 1 the pipe that its log goes to, at 2 the one for
last words, and from 3 on the listening sockets (sd_listen_fds(3)). Signals are the supervisor's: a terminal or a
service manager may send them to all processes, and each worker would stop before the ruleset does. No thread of a
worker is interrupted by one: a connect() that is goes on without its time limit in CPython.
"""

import faulthandler
import logging
import os
import signal
import sys
from dataclasses import replace
from typing import NoReturn

from tproxy_relay.errors import RelayError
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import Channel
from tproxy_relay.ipc.scoreboard import Scoreboard
from tproxy_relay.ipc.slot import Slot
from tproxy_relay.logs.writer import LogWriter
from tproxy_relay.net import listeners
from tproxy_relay.system import proc_title
from tproxy_relay.system.cpu import CpuPlacement
from tproxy_relay.worker import messages, spec
from tproxy_relay.worker.worker import Worker

SWITCH_INTERVAL = 1.0
"""Seconds that a thread waits for the interpreter lock before it insists (sys.setswitchinterval). A pump lets go of
it at each recv and send; but one that insists goes to the back of the queue, so with thousands of threads that all
have something to do the usual 5 ms wake them for nothing, and the accept loop may not get its turn for seconds.
(tests/bench, 9,000 connections: 182 us of processor time for a request, 84 with this; p99 2.3 s, 1.1.)"""

LOG_FLUSH = 1.0
"""Seconds that the log gets at the end."""

CRASHES = {signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL}
"""That faulthandler has a last word about."""

log = logging.getLogger(__name__)


def main() -> int:
    """Run the process. Returns its exit code if it has never become a worker; by hand it is of no use."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Here, once, and all threads inherit it: to make such a set takes longer than to start a thread.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - CRASHES)
    faulthandler.enable()
    proc_title.become(proc_title.WORKER)
    control = channel.adopt(0)
    received = control.receive()
    if received is None:
        return 0  # the supervisor has changed its mind
    message, descriptors = received
    own = spec.of_message(message)
    cpu = CpuPlacement(message["cpu"])
    cpu.stay()  # before any thread is started
    sys.setswitchinterval(SWITCH_INTERVAL)
    writer = LogWriter(replace(own.settings, log_file=None), sys.stdout.fileno())
    try:
        slot = Slot(Scoreboard(*descriptors), message["slot"])
        worker = Worker(
            own,
            listeners.adopt_all(own.settings, os.environ)[0],
            control,
            slot,
            cpu,
            lambda: writer.dropped,
        )
    except RelayError as error:
        control.send(messages.Failed(str(error), error.exit_code).to_message())
        return error.exit_code
    writer.start()
    control.send(messages.Ready().to_message())
    _serve(worker, control, slot, writer)


def _serve(worker: Worker, control: Channel, slot: Slot, writer: LogWriter) -> NoReturn:
    """It ends by _exit, because the interpreter would wait for every pool thread, and one of them may be blocked in a
    send() for as long as its peer likes; the kernel then resets what is still open."""
    code = 0
    try:
        received = control.receive()
        if received is not None and messages.order_of(received[0]) == messages.Serve():
            worker.run()
    except Exception:
        log.critical("the accept loop met a bug", exc_info=True)
        code = 1
    writer.stop(LOG_FLUSH)
    slot.log_dropped(writer.dropped)
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
