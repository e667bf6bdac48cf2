"""The end of a relay as a real process on loopback, whatever it is about when it is told to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from breakable import BROKEN, breakable
from deadlines import PATIENCE
from relays import Relay, is_alive

from tproxy_relay.supervisor import shutdown


def test_stopped_during_a_reload(tmp_path: Path) -> None:
    with Relay(tmp_path, workers=2) as relay:
        client, server = relay.connect()
        relay.reload()
        relay.said("worker started", 3)
        relay.process.terminate()
        client.close()
        server.close()
        assert relay.process.wait() == 0
        assert not any(is_alive(line["pid"]) for line in relay.said("worker started"))


@pytest.mark.slow
def test_a_worker_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    with Relay(tmp_path, workers=2) as relay:
        workers = relay.process.workers
        os.kill(workers[0], signal.SIGSTOP)
        began = time.monotonic()
        relay.process.signal(signal.SIGINT)
        assert relay.process.wait() == 0
        assert time.monotonic() - began < shutdown.END_TIMEOUT + 2
        hows = {line["pid"]: line["how"] for line in relay.said("worker ended", 2)}
        assert hows == {workers[0]: "signal 9", workers[1]: "exit 0"}


def test_stopped_before_it_was_ready(tmp_path: Path) -> None:
    relay, wrapper = Relay(tmp_path), breakable(tmp_path)
    slow = BROKEN.replace("os._exit(3)", "import time; time.sleep(60)")
    (tmp_path / "sitecustomize.py").write_text(slow, encoding="utf-8")
    (tmp_path / "broken").touch()
    command = [*wrapper, sys.executable, "-m", "tproxy_relay", "run", "--config", str(relay.file)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert child.stderr is not None
        started = next(line for line in child.stderr if "worker started" in line)
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE) == 0
        assert "stopped before it was ready" in child.stderr.read()
        assert started
    finally:
        child.kill()
        child.wait()
        assert child.stderr is not None
        child.stderr.close()
        relay.server.close()
