"""A worker as the process that the supervisor starts: `python -m tproxy_relay.worker`."""

import signal

import loopback
import pytest
from deadlines import PATIENCE, wait_until
from loopback import RST
from workers import Several

from tproxy_relay.ipc import scoreboard

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def test_orders_come_to_a_worker_process_and_signals_do_not() -> None:
    """A terminal or a service manager may send them to all processes of the relay."""
    with Several(1) as several:
        client, server = several.connect()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            several.workers[0].child.send_signal(number)
        several.connect()
        several.workers[0].leave()
        wait_until(lambda: several.states == [scoreboard.ABSENT], "it leaves")
        client.sendall(b"still")
        assert loopback.read_exactly(server, 5) == b"still"
        several.workers[0].control.close()
        assert several.workers[0].child.wait(PATIENCE) == 0
        assert loopback.read_to_end(client)[1] == RST
