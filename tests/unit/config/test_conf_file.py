"""Reading the file: a bad one gives one line that says where, and none makes the relay wait."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import Seen

from tproxy_relay.config import conf_file
from tproxy_relay.errors import ConfigError

PATH = "/etc/x.conf"


def texts(text: str) -> dict[str, str]:
    return {name: given.text for name, given in conf_file.parse(text, PATH).items()}


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        conf_file.parse(text, PATH)
    return str(refused.value)


def refusal(path: Path) -> str:
    """Why the file cannot be read; found out without waiting for anything."""
    started = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        conf_file.read(str(path))
    assert time.monotonic() - started < 1
    return str(refused.value)


# --- the file as a whole


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("ports = 1\n# größer\n", encoding="utf-8")
    assert conf_file.read(str(tmp_path / "a")) == "ports = 1\n# größer\n"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfports = 1\r\n")
    assert texts(conf_file.read(str(tmp_path / "a"))) == {"ports": "1"}


def test_dev_null_is_an_empty_file() -> None:
    assert conf_file.read("/dev/null") == ""


def test_a_missing_file_is_for_the_caller_to_judge(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        conf_file.read(str(tmp_path / "a"))


def test_a_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"cannot read {tmp_path}: Is a directory"


def test_a_fifo_that_nobody_writes_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo") == f"cannot read {tmp_path}/fifo: not a regular file"


def test_a_device() -> None:
    assert refusal(Path("/dev/zero")) == "cannot read /dev/zero: not a regular file"


def test_a_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        assert refusal(tmp_path / "socket").startswith(f"cannot read {tmp_path}/socket: ")


def test_a_file_whose_content_cannot_be_read() -> None:
    assert refusal(Path("/proc/self/mem")) == "cannot read /proc/self/mem: Input/output error"


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root reads everything, so step down for a moment."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)


def test_a_file_that_we_may_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").touch(mode=0)
    with as_nobody():
        assert refusal(tmp_path / "a") == f"cannot read {tmp_path}/a: Permission denied"


def test_a_huge_file(tmp_path: Path) -> None:
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(100_000_000)
    assert refusal(tmp_path / "huge") == f"cannot read {tmp_path}/huge: larger than 1048576 bytes"


def test_a_file_of_the_greatest_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"#" * conf_file.MAX_BYTES)
    assert texts(conf_file.read(str(tmp_path / "a"))) == {}


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ports = 1\n# gr\xfc\xdfe\n")
    assert refusal(tmp_path / "a") == f"{tmp_path}/a:2: not UTF-8 text"


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "a" * 5000])
def test_a_path_that_no_file_can_have(path: str) -> None:
    with pytest.raises(ConfigError):
        conf_file.read(path)


def test_a_newline_in_the_path_does_not_make_two_lines(tmp_path: Path) -> None:
    (tmp_path / "a\nb").mkdir()
    assert "\n" not in refusal(tmp_path / "a\nb")


# --- its lines


def test_lines() -> None:
    text = "\n# comment\n  ; comment\n\tports=1,2\r\nbind = ::1 # why\ntarget =a:1 ;why\ninterface = eth0#1x\n"
    with pytest.raises(ConfigError, match="eth0#1x"):
        texts(text)
    assert texts(text.replace("#1x", "")) == {
        "ports": "1,2",
        "bind": "::1",
        "target": "a:1",
        "interface": "eth0",
    }


def test_each_value_knows_its_line() -> None:
    found = conf_file.parse("ports = 1\n\nbind = ::", PATH)
    assert [given.where for given in found.values()] == ["/etc/x.conf:1", "/etc/x.conf:3"]


@pytest.mark.parametrize(
    "written, value",
    [
        ("/a#b", "/a#b"),
        ("a=b", "a=b"),
        ("a b", "a b"),
        ("it's", "it's"),
        ('"a # b"', "a # b"),
        ("'a ; b' # why", "a ; b"),
        ('" a "', " a "),
        ('"a ""b"" c"', 'a "b" c'),
        ("'it''s'", "it's"),
        ("[a]", "[a]"),
    ],
)
def test_quotes_and_comments(written: str, value: str) -> None:
    assert texts(f"log-file = {written}") == {"log-file": value}


@pytest.mark.parametrize(
    "written, value",
    [
        ("ports = [15002, 15006]", "15002,15006"),
        ("bind = ['0.0.0.0', \"::\"]", "0.0.0.0,::"),
        ("bind = [::1]", "::1"),
    ],
)
def test_a_list_may_stand_in_brackets(written: str, value: str) -> None:
    assert list(texts(written).values()) == [value]


@pytest.mark.parametrize(
    "text, message",
    [
        ("\nprots = 1", "/etc/x.conf:2: unknown setting 'prots' (did you mean 'ports'?)"),
        ("port = 1", "/etc/x.conf:1: unknown setting 'port' (did you mean 'ports'?)"),
        ("--ports = 1", "/etc/x.conf:1: unknown setting '--ports' (did you mean 'ports'?)"),
        ("Ports = 1", "/etc/x.conf:1: unknown setting 'Ports' (did you mean 'ports'?)"),
        (
            "connect_timeout = 1",
            "/etc/x.conf:1: unknown setting 'connect_timeout' (did you mean 'connect-timeout'?)",
        ),
        ("no-spoof = no", "/etc/x.conf:1: unknown setting 'no-spoof'"),
        ("= 1", "/etc/x.conf:1: unknown setting ''"),
        ("ports = 1\nports = 2", "/etc/x.conf:2: 'ports' is already set on line 1"),
        ("ports = 1,x", "/etc/x.conf:1: ports: 'x' is not a TCP port (1-65535) in '1,x'"),
        ("ports = [1, x]", "/etc/x.conf:1: ports: 'x' is not a TCP port (1-65535) in '1,x'"),
        ("ports = []", "/etc/x.conf:1: ports: no value given; leave the line out for the default"),
        ("ports =", "/etc/x.conf:1: ports: no value given; leave the line out for the default"),
        ("ports = # none", "/etc/x.conf:1: ports: no value given; leave the line out for the default"),
        ("interface = ''", "/etc/x.conf:1: interface: no value given; leave the line out for the default"),
        ("ports", "/etc/x.conf:1: expected 'name = value', found 'ports'"),
        ("ports 15002", "/etc/x.conf:1: expected 'name = value', found 'ports 15002'"),
        ("ports: 15002", "/etc/x.conf:1: expected 'name = value', found 'ports: 15002'"),
        ("---", "/etc/x.conf:1: expected 'name = value', found '---'"),
        ("[relay]", "/etc/x.conf:1: there are no sections here: remove the line '[relay]'"),
        ("config = /other", "/etc/x.conf:1: 'config' is for the command line, not for the file"),
        ("print-config = yes", "/etc/x.conf:1: 'print-config' is for the command line, not for the file"),
        ("keep = yes", "/etc/x.conf:1: 'keep' is for the command line, not for the file"),
        ("version = 1", "/etc/x.conf:1: 'version' is for the command line, not for the file"),
        ("help = 1", "/etc/x.conf:1: 'help' is for the command line, not for the file"),
        ("command = demo", "/etc/x.conf:1: 'command' is for the command line, not for the file"),
        ("po\0rts = 1", "/etc/x.conf:1: a NUL byte, so this is not a text file"),
        ("ports = 1\n\0", "/etc/x.conf:2: a NUL byte, so this is not a text file"),
        (
            "mode = 'tproxy",
            '/etc/x.conf:1: mode: the quotes do not close, or something follows them, in "\'tproxy"',
        ),
        (
            "mode = 'tproxy' x",
            "/etc/x.conf:1: mode: the quotes do not close, or something follows them, in \"'tproxy' x\"",
        ),
    ],
)
@pytest.mark.row("B3", "duplicates, abbreviations, negations, config =", "refused with the line")
def test_what_a_file_must_not_say(text: str, message: str, seen: Seen) -> None:
    assert complaint(text) == message
    seen("refused")


def test_one_line_that_fills_the_file() -> None:
    for line in (
        "x" * 1_000_000,
        "ports = " + "1," * 500_000,
        "log-file = " + '"' * 1_000_000,
        "[" * 1_000_000,
    ):
        assert len(complaint(line)) < 300


# As a list, for in one alphabet these few would drown among all of Unicode.
NASTY = st.sampled_from([" ", '"', "'", "#", ";", "=", "[", "]", ","])
PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=3)


@given(st.lists(NASTY | PRINTABLE, min_size=1).map("".join).filter(lambda name: name not in ("", "--")))
def test_any_value_can_be_written_down_and_read_back(name: str) -> None:
    assert texts(f"log-file = {conf_file.quoted(name)}  # default") == {"log-file": name}


@given(
    st.lists(
        st.text() | st.sampled_from(["ports", " = ", "\n", "1", '"', "'", "#", "[", "]", ",", "bind", "\0", "log-file"])
    )
)
def test_any_text_is_understood_or_refused_in_one_line(pieces: list[str]) -> None:
    try:
        conf_file.parse("".join(pieces), PATH)
    except ConfigError as refused:
        assert str(refused).startswith("/etc/x.conf:") and str(refused).isprintable()
