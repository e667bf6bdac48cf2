"""The answer of a command, for a script or for people, and for a reader that goes away."""

import subprocess
import sys

import pytest

from tproxy_relay.cli import output

MUCH = 1 << 20
"""Bytes; more than a pipe takes."""


def test_lines_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    output.answer({"a": 1}, ["one", "two"], False)
    output.answer({"a": 1}, ["one", "two"], True)
    assert capsys.readouterr().out == 'one\ntwo\n{"a": 1}\n'


def test_a_reader_that_has_seen_enough() -> None:
    program = f"from tproxy_relay.cli import output; output.answer({{}}, ['x' * {MUCH}], False); print('more')"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout and child.stderr
    assert child.stdout.read(1) == b"x"
    child.stdout.close()
    assert (child.stderr.read(), child.wait(30)) == (b"", 0)
    child.stderr.close()
