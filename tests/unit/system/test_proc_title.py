"""A process that has a name."""

import children
import pytest

from tproxy_relay.system import proc_title

NAMED = """
import sys, threading
from tproxy_relay.system import proc_title as process_name
process_name.become(sys.argv[1])
print(open("/proc/self/comm").read(), end="")
threading.Thread(target=lambda: print(open("/proc/thread-self/comm").read(), end="")).start()
"""


@pytest.mark.parametrize("name", [proc_title.SUPERVISOR, proc_title.WORKER, proc_title.GUARD])
def test_it_is_called_so_and_so_are_its_threads(name: str) -> None:
    ran = children.run_python(NAMED, name)
    assert ran.stdout == f"{name}\n" * 2, "the kernel cuts what is too long"


def test_where_it_cannot_be_written_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_more: object) -> None:
        raise PermissionError

    monkeypatch.setattr("builtins.open", refuse)
    proc_title.become("no-one")
    monkeypatch.undo()
    with open("/proc/self/comm", encoding="ascii") as comm:
        assert comm.read() != "no-one\n"
