"""Each kind of value: what it takes, what it becomes, and what it refuses in which words."""

import pytest
from rows import Seen

from tproxy_relay.config import option_types
from tproxy_relay.config.option_types import BadValue
from tproxy_relay.settings import HostPort, Network, PortRange

TIMEOUT = option_types.seconds("never")


def reason(kind: option_types.Kind, text: str) -> str:
    """Why the text is refused."""
    with pytest.raises(BadValue) as refused:
        kind.parse(text)
    return str(refused.value)


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
    "text, addresses",
    [
        ("0.0.0.0,::", ("0.0.0.0", "::")),
        ("127.0.0.1", ("127.0.0.1",)),
        ("2001:DB8:0::1 , 10.0.0.1", ("2001:db8::1", "10.0.0.1")),
        ("fe80::1", ("fe80::1",)),
    ],
)
def test_addresses_become_canonical(text: str, addresses: tuple[str, ...]) -> None:
    assert option_types.ADDRESSES.parse(text) == addresses


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "1.2.3",
        "127.1",
        "1.2.3.04",
        "256.0.0.1",
        "[::1]",
        "::1%lo",
        "fe80::1%eth0",
        "fe80::1%",
        "1.2.3.4/8",
        "::ffff:10.0.0.1",
        "224.0.0.1",
        "ff02::1",
        "255.255.255.255",
        "10.0.0.1,",
        "10.0.0.1,10.0.0.1",
        "::1,0:0::1",
        "١.2.3.4",
    ],
)
def test_what_is_no_list_of_addresses(text: str) -> None:
    assert reason(option_types.ADDRESSES, text)


@pytest.mark.parametrize("text", ["0.0.0.0,127.0.0.1", "::1,::", "0.0.0.0,::,10.0.0.1"])
def test_an_address_that_a_wildcard_already_holds_is_refused(text: str) -> None:
    assert "is already part of" in reason(option_types.ADDRESSES, text)


def test_an_ipv4_address_in_ipv6_clothes_is_sent_back_with_the_right_spelling() -> None:
    assert reason(option_types.ADDRESSES, "::ffff:10.0.0.1").endswith("write 10.0.0.1")


@pytest.mark.parametrize("text", ["eth0", "wg-home_1.2", "eth0:1", "a" * 15, "..."])
def test_interface(text: str) -> None:
    assert option_types.INTERFACE.parse(text) == text


@pytest.mark.parametrize(
    "text", ["", ".", "..", "a" * 16, "eth 0", "eth0\n", "eth/0", 'eth0"; flush ruleset; #', "eté0", "a\0"]
)
def test_what_is_no_interface(text: str) -> None:
    assert reason(option_types.INTERFACE, text)


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
    "text, host, port",
    [
        ("192.0.2.1:443", "192.0.2.1", 443),
        ("[2001:DB8::0:1]:443", "2001:db8::1", 443),
        ("db-1.example.net:5432", "db-1.example.net", 5432),
        ("db.:1", "db.", 1),
        ("localhost:1", "localhost", 1),
        ("1st.example:1", "1st.example", 1),
    ],
)
def test_target(text: str, host: str, port: int) -> None:
    assert option_types.TARGET.parse(text) == HostPort(host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        ":80",
        "host:",
        "host:0",
        "host:65536",
        "host:http",
        "host: 80",
        " host:80",
        "2001:db8::1:443",
        "[::1]",
        "[host]:1",
        "[fe80::1%eth0]:1",
        "[fe80::1]:1",
        "[10.0.0.1:1",
        "1.2.3:80",
        "127.1:80",
        "0x7f.1:80",
        "999.1.1.1:80",
        "0.0.0.0:80",
        "[::]:80",
        "224.0.0.1:80",
        "[::ffff:10.0.0.1]:80",
        "-a:80",
        "a-:80",
        "a..b:80",
        ".:80",
        "a" * 64 + ":80",
        "a." * 127 + "a:80",
        "é:80",
        "a b:80",
        "a/b:80",
        "user@host:80",
        "host:80\n",
    ],
)
def test_what_is_no_target(text: str) -> None:
    assert reason(option_types.TARGET, text)


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


@pytest.mark.parametrize(
    "text, networks",
    [
        ("", ()),
        ("10.0.0.0/8", (Network("10.0.0.0/8"),)),
        ("10.1.2.3", (Network("10.1.2.3/32"),)),
        ("10.1.2.3:443", (Network("10.1.2.3/32", PortRange(443, 443)),)),
        ("10.0.0.0/8:1-65535", (Network("10.0.0.0/8", PortRange(1, 65535)),)),
        ("0.0.0.0/0,::/0", (Network("0.0.0.0/0"), Network("::/0"))),
        ("2001:db8::1", (Network("2001:db8::1/128"),)),
        ("2001:DB8::/32 , [::1]:80", (Network("2001:db8::/32"), Network("::1/128", PortRange(80, 80)))),
        ("[2001:db8::/32]:8000-8100", (Network("2001:db8::/32", PortRange(8000, 8100)),)),
        ("[2001:db8::/32]", (Network("2001:db8::/32"),)),
        ("64:ff9b::10.0.0.1", (Network("64:ff9b::a00:1/128"),)),
        ("::/90", (Network("::/90"),)),
    ],
)
def test_networks(text: str, networks: tuple[Network, ...]) -> None:
    parsed = option_types.NETWORKS.parse(text)
    assert parsed == networks
    assert option_types.NETWORKS.parse(option_types.NETWORKS.write(parsed)) == parsed


@pytest.mark.parametrize(
    "text, why",
    [
        (",", "empty"),
        ("10.0.0.0/8,", "empty"),
        ("10.0.0.0/8,10.0.0.0/8", "10.0.0.0/8 is there twice"),
        ("10.0.0.1/8", "an address has bits behind its prefix; write 10.0.0.0/8"),
        ("2001:db8::1/32", "write 2001:db8::/32"),
        ("10.0.0.0/33", "not an IPv4 or IPv6 network"),
        ("2001:db8::/129", "not an IPv4 or IPv6 network"),
        ("10.0.0.0/255.0.0.0", "not a network"),
        ("10.0.0.0/08", "not a network"),
        ("10.0.0.0/", "not a network"),
        ("/8", "not a network"),
        ("10.0.0", "not an IPv4 or IPv6 network"),
        ("010.0.0.0/8", "not an IPv4 or IPv6 network"),
        ("example.org", "not a network"),
        ("localhost", "not a network"),
        ("fe80::1%eth0", "not a network"),
        ("::ffff:10.0.0.0/104", "an IPv4 network in disguise: write 10.0.0.0/8"),
        ("::ffff:10.0.0.1", "an IPv4 network in disguise: write 10.0.0.1/32"),
        ("10.0.0.0/8:", "'' is not a TCP port (1-65535) in '10.0.0.0/8:'"),
        ("10.0.0.0/8:0", "'0' is not a TCP port"),
        ("10.0.0.0/8:http", "'http' is not a TCP port"),
        ("10.0.0.0/8:90-80", "90-80 runs backwards: write 80-90 in '10.0.0.0/8:90-80'"),
        ("[2001:db8::/32]80", "not a network"),
        ("[10.0.0.0/8", "not a network"),
        ("[]:80", "not a network"),
        ("１0.0.0.0/8", "not a network"),
        ("10.0.0.0/８", "not a network"),
        ("10.0.0.0/8\n", "not a network"),
        ("10.0.0.0/8; accept", "not a network"),
        (",".join(f"10.0.0.{number}" for number in range(option_types.MAX_ITEMS + 1)), "65 items are too many"),
    ],
)
def test_what_are_no_networks(text: str, why: str) -> None:
    assert why in reason(option_types.NETWORKS, text)


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
