"""Children that nobody waits for; in a process of its own, whose other children it may take."""

import children

START = """
import os, sys
from tproxy_relay.system import reaper

def child(ends=True):
    pid = os.fork()
    if not pid:
        if not ends:
            sys.stdin.read()
        os._exit(3)
    if ends:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid

def is_there(pid):
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None or "runs"
    except ChildProcessError:
        return False
"""


def said(code: str) -> str:
    with children.running_python(START + code) as child:
        assert child.stdout is not None
        return child.stdout.readline().strip()


def test_without_children_there_is_nothing_to_do() -> None:
    assert said("print(reaper.reap_orphans(set()), flush=True)") == "None"


def test_all_that_have_ended_are_waited_for_and_the_others_run_on() -> None:
    code = "one, two, three = child(), child(ends=False), child()\n"
    code += "reaper.reap_orphans(set())\nprint(is_there(one), is_there(two), is_there(three), flush=True)"
    assert said(code) == "False runs False"


def test_an_own_child_is_left_to_whoever_started_it() -> None:
    code = "one = child()\nreaper.reap_orphans({one})\n"
    code += "print(is_there(one), os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]), flush=True)"
    assert said(code) == "True 3"


def test_those_behind_an_own_one_are_reaped_after_it() -> None:
    code = "own, orphan = child(), child()\nreaper.reap_orphans({own})\nos.waitpid(own, 0)\n"
    code += "reaper.reap_orphans({own})\nprint(is_there(orphan), flush=True)"
    assert said(code) == "False"
