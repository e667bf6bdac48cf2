"""The real relay in a lab, as a process: its log, its records, its ends."""

import signal
import socket
from pathlib import Path

import pytest

from tproxy_relay.lab import Lab, LabError


def runs(pid: int) -> bool:
    """Whether there is such a process. A zombie only waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_life(lab: Lab) -> None:
    with lab.relay_process("--intercept-inbound", "8000", "--workers", "1") as relay, lab.server.listen(
        8000
    ) as listener:
        assert relay.returncode is None and len(relay.workers) == 1 and relay.worker != relay.pid
        with lab.client.connect(lab.server.ipv4, 8000) as client:
            accepted, _ = listener.accept()
            client.shutdown(socket.SHUT_WR)
            accepted.close()
            record = relay.record_of(client)
        assert record["orig_dst"] == f"{lab.server.ipv4}:8000" and record in relay.records()
        assert relay.wait_for_line(lambda line: line.get("message") == "connection open") in relay.lines()
        relay.stop()
        assert relay.returncode == 0 and list(relay.follow()) == relay.lines()
    assert relay in lab.relays


def test_one_that_cannot_start_says_why(lab: Lab) -> None:
    with pytest.raises(LabError, match="exited with 2 before it was ready: .*no-such-option"):
        with lab.relay_process("--no-such-option"):
            pass


def test_kill_ends_all_of_it(lab: Lab) -> None:
    with lab.relay_process("--workers", "2") as relay:
        pids = [relay.pid, *relay.workers]
        relay.kill()
        relay.kill()
        assert relay.returncode == -signal.SIGKILL
        with pytest.raises(LabError, match="the relay ended"):
            relay.wait_for_line(lambda line: False)
    assert len(pids) == 3 and not any(map(runs, pids))


def test_what_does_not_come_is_an_error(lab: Lab) -> None:
    with lab.relay_process() as relay:
        with pytest.raises(LabError, match="not within 0.1 s"):
            relay.wait_for_record(lambda record: True, 0.1)
        with pytest.raises(LabError, match="exited with 0, not 1"):
            relay.stop(1)
