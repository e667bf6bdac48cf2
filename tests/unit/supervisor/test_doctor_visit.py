"""One look: the process that does it, in the place of which others stand here."""

import sys
import time

import pytest
from deadlines import PATIENCE, wait_until

from tproxy_relay.supervisor import doctor_visit
from tproxy_relay.supervisor.doctor_visit import Visit

READS_ALL = """
import json, sys
order = json.loads(sys.stdin.readline())
print(json.dumps({"length": len(order["text"])}))
print(json.dumps({"done": True}))
"""


def started(monkeypatch: pytest.MonkeyPatch, script: str, length: int = 10) -> Visit:
    """With an order of that length."""
    monkeypatch.setattr(doctor_visit.children, "module_command", lambda _: [sys.executable, "-c", script])
    return Visit(["look"], {"text": "x" * length}, (1, "digest"))


@pytest.mark.parametrize("length", [10, 1_000_000])
def test_it_is_told_all_and_says_all(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    visit = started(monkeypatch, READS_ALL, length)
    assert visit.send() == (length > 65536), "a pipe takes no more at once"
    wait_until(lambda: not visit.send(), "the order is with it", PATIENCE)
    while visit.read():
        continue
    visit.close(at_once=False)
    assert visit.lines == [{"length": length}, {"done": True}] and visit.is_whole


@pytest.mark.parametrize("script", ["", "print('{')", "print('{}')"])
def test_one_that_does_not_come_to_its_end_is_not_whole(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    visit = started(monkeypatch, script)
    visit.send()
    while visit.read():
        continue
    visit.close(at_once=False)
    assert not visit.is_whole


def test_one_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    visit = started(monkeypatch, "import os, time; os.close(1); time.sleep(1000)", 1_000_000)
    assert visit.send(), "it reads nothing"
    while visit.read():
        continue
    began = time.monotonic()
    visit.close(at_once=False)
    assert visit._process.returncode is not None
    assert time.monotonic() < began + doctor_visit.END_TIMEOUT + PATIENCE
