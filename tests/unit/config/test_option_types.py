"""Each type of value: what it takes, what it becomes, and what it refuses in which words."""

import pytest
from rows import Seen
from written import reason

from tproxy_relay.config import option_types
from tproxy_relay.settings import HostPort, PortRange

TIMEOUT = option_types.seconds("never")


@pytest.mark.parametrize(
    "text, ports",
    [
        ("1", (1,)),
        ("15002,15006", (15002, 15006)),
        (" 15002 ,\t15006 ", (15002, 15006)),
        ("65535", (65535,)),
    ],
)
def test_ports(text: str, ports: tuple[int, ...]) -> None:
    assert option_types.PORTS.parse(text) == ports


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ",",
        "15002,",
        ",15002",
        "1,,2",
        "0",
        "65536",
        "99999",
        "100000",
        "x",
        "-1",
        "+5",
        "1_000",
        "00080",
        "0x50",
        "1.0",
        "1e3",
        "٣",
        "１５００２",
        "5\n",
        "5\u00a0",
        "5\0",
        "15002,15002",
        "1 2",
        "[1]",
        "9" * 5000,
    ],
)
@pytest.mark.row("B7", "ports that are none: ranges, signs, foreign digits", "refused")
def test_what_is_no_list_of_ports(text: str, seen: Seen) -> None:
    assert "\n" not in reason(option_types.PORTS, text)
    seen("refused")


def test_a_bad_port_is_named_with_its_list() -> None:
    assert reason(option_types.PORTS, "1,x") == "'x' is not a TCP port (1-65535) in '1,x'"
    assert reason(option_types.PORTS, "x") == "'x' is not a TCP port (1-65535)"
    assert reason(option_types.PORTS, "15002,15006,15002") == "15002 is there twice in '15002,15006,15002'"


@pytest.mark.row("B7", "65,535 ports", "refused")
def test_the_number_of_ports_has_a_limit(seen: Seen) -> None:
    assert option_types.PORTS.parse(",".join(map(str, range(1, 65))))
    assert reason(option_types.PORTS, ",".join(map(str, range(1, 66)))) == "65 items are too many: at most 64"
    assert reason(option_types.PORTS, ",".join(map(str, range(1, 65536)))) == "65535 items are too many: at most 64"
    seen("refused")


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(reason(option_types.PORTS, "x" * 100_000)) < 200


@pytest.mark.parametrize(
    "text, seconds", [("0", 0.0), ("10", 10.0), ("0.5", 0.5), ("0.001", 0.001), ("2147483", 2147483.0)]
)
def test_seconds(text: str, seconds: float) -> None:
    assert TIMEOUT.parse(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "-1",
        "+1",
        "1e3",
        "inf",
        "nan",
        "infinity",
        ".5",
        "5.",
        "1_0",
        "010",
        "10s",
        " 1",
        "1\n",
        "٣",
        "1,5",
        "0x1",
    ],
)
def test_what_is_no_number_of_seconds(text: str) -> None:
    assert reason(TIMEOUT, text).endswith("is not a number of seconds")


def test_seconds_that_the_kernel_could_not_count() -> None:
    assert "too short" in reason(TIMEOUT, "0.0004")
    assert "too long" in reason(TIMEOUT, "2147483.1")
    assert "too long" in reason(TIMEOUT, "9" * 5000)


def test_zero_is_refused_where_it_means_nothing() -> None:
    assert "too short" in reason(option_types.seconds(None), "0")
    assert "too short" in reason(option_types.seconds(None), "0.0")


@pytest.mark.parametrize("text", ["", "6", "-1", "+1", "01", "1_0", "1.0", "٣", "9" * 5000, "x"])
def test_what_is_no_whole_number_in_range(text: str) -> None:
    assert reason(option_types.whole(0, 5), text).endswith("is not a whole number from 0 to 5")


def test_whole_numbers_include_both_ends() -> None:
    assert [option_types.whole(0, 5).parse(text) for text in ("0", "5")] == [0, 5]


def test_connections_may_be_left_to_the_relay() -> None:
    kind = option_types.connections()
    assert kind.parse("auto") is None
    assert kind.write(None) == "auto"
    assert kind.parse("1") == 1
    assert reason(kind, "0")


@pytest.mark.parametrize(
    "text, mask",
    [
        ("0x07000000", 0x07000000),
        ("0X7", 7),
        ("7", 7),
        ("117440512", 0x07000000),
        ("0x80000101", 0x80000101),
    ],
)
def test_mask(text: str, mask: int) -> None:
    assert option_types.MASK.parse(text) == mask
    assert option_types.MASK.parse(option_types.MASK.write(mask)) == mask


@pytest.mark.parametrize(
    "text",
    ["", "0", "1", "3", "0xf", "0x700000000", "30064771072", "x", "-7", "0b111", "07", "7.0", "٧", "0x"],
)
def test_what_is_no_mask(text: str) -> None:
    assert reason(option_types.MASK, text)


@pytest.mark.parametrize(
    "text, ranges",
    [
        ("80", ((80, 80),)),
        ("1-65535", ((1, 65535),)),
        ("80-80", ((80, 80),)),
        ("8000-8100,11000,22", ((22, 22), (8000, 8100), (11000, 11000))),
        (" 8000 - 8100 ,\t443 ", ((443, 443), (8000, 8100))),
        ("80,81", ((80, 80), (81, 81))),
    ],
)
def test_port_ranges(text: str, ranges: tuple[tuple[int, int], ...]) -> None:
    parsed = option_types.PORT_RANGES.parse(text)
    assert parsed == tuple(PortRange(*one) for one in ranges)
    assert option_types.PORT_RANGES.parse(option_types.PORT_RANGES.write(parsed)) == parsed


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "no value given"),
        ("80,", "empty"),
        ("0", "'0' is not a TCP port"),
        ("65536", "'65536' is not a TCP port"),
        ("80-", "'' is not a TCP port"),
        ("-80", "'' is not a TCP port"),
        ("9,1-2-3", "'2-3' is not a TCP port (1-65535) in '9,1-2-3'"),
        ("80-65536", "'65536' is not a TCP port (1-65535)"),
        ("http", "'http' is not a TCP port"),
        ("٨٠", "is not a TCP port"),
        ("80; accept", "is not a TCP port"),
        ("80 }\n", "is not a TCP port"),
        ("8100-8000", "8100-8000 runs backwards in '8100-8000': write 8000-8100"),
        ("80,80", "80 and 80 overlap in '80,80'"),
        ("443,8000-8100,8100-8200", "8000-8100 and 8100-8200 overlap"),
        ("1-65535,22", "1-65535 and 22 overlap"),
        (",".join(map(str, range(1, 2 * option_types.MAX_ITEMS + 2, 2))), "64"),
    ],
)
def test_what_are_no_port_ranges(text: str, why: str) -> None:
    assert why in reason(option_types.PORT_RANGES, text)


def test_one_port() -> None:
    assert option_types.PORT.parse("15006") == 15006
    for text in ("", "0", "65536", "1,2", "1-2", " 1", "+1"):
        assert reason(option_types.PORT, text)


@pytest.mark.parametrize("text", ["0", "1000", "4294967294", "relay", "_apt", "a.b-c_d", "A", "a" * 32])
def test_account(text: str) -> None:
    assert option_types.ACCOUNT.parse(text) == text


@pytest.mark.parametrize(
    "text", ["", "01", "-1", "a b", "a" * 33, "a;b", "a\n", "é", "1a", "12345678901", "$(id)", "a$"]
)
def test_what_is_no_account(text: str) -> None:
    assert reason(option_types.ACCOUNT, text)


def test_route_table() -> None:
    for number in (1, 252, 256, 7006, 4294967295):
        assert option_types.ROUTE_TABLE.parse(str(number)) == number
    for text in ("0", "253", "254", "255", "4294967296", "main", "0x10", "-1", ""):
        assert reason(option_types.ROUTE_TABLE, text)


@pytest.mark.parametrize("text", ["", "--", "a\nb", "a\0b", "a\x1b[2J", "\udcff", "a\u2028b"])
def test_what_is_no_name_of_a_file(text: str) -> None:
    assert reason(option_types.PATH, text)


def test_words_may_be_in_capitals() -> None:
    kind = option_types.words("debug", "info")
    assert kind.parse("INFO") == "info"
    assert reason(kind, "warn") == "'warn' is not one of debug, info"


@pytest.mark.parametrize(
    "value, text",
    [
        (None, ""),
        (10.0, "10"),
        (0.001, "0.001"),
        (2147483.0, "2147483"),
        ((1, 2), "1,2"),
        ((PortRange(1, 1), PortRange(8000, 8100)), "1,8000-8100"),
        ((), ""),
        (HostPort("::1", 80), "[::1]:80"),
        (HostPort("a", 80), "a:80"),
        (False, "no"),
        ("x", "x"),
        (7, "7"),
    ],
)
def test_a_value_as_the_user_writes_it(value: object, text: str) -> None:
    assert option_types.text_of(value) == text
