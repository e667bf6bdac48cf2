"""What may be asked of the live connections, and how it is written."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxy_relay import session_query
from tproxy_relay.errors import UsageError
from tproxy_relay.session_query import NAMES, Query, parse, written


def test_nothing_is_everything() -> None:
    assert parse({}) == Query()
    assert written(Query()) == {}


def test_everything() -> None:
    given_ = {
        "id": "1f-6b04ef16-3",
        "text": "10.1",
        "client": "10.0.0.0/8",
        "destination": "[2001:db8::1]",
        "port": "443",
        "state": "half-closed",
        "ending": "idle",
        "min-age": "1.5",
        "min-idle": "60",
        "min-rate": "1000",
        "sort": "rate",
        "reverse": "yes",
        "limit": "20",
    }
    query = parse(given_)
    assert query.client == ipaddress.ip_network("10.0.0.0/8")
    assert query.destination == ipaddress.ip_network("2001:db8::1/128")
    assert (query.port, query.min_age, query.reverse, query.limit) == (443, 1.5, True, 20)
    assert set(given_) == set(NAMES)
    assert parse(written(query)) == query


@pytest.mark.parametrize(
    "name, text, what",
    [
        ("colour", "red", "no such filter: 'colour'; there are id, text, client"),
        ("id", "../x", "the id of a connection"),
        ("text", "", "a text of up to 60 characters"),
        ("text", "x" * 61, "a text of up to 60 characters"),
        ("client", "example.org", "an address or a network"),
        ("destination", "10.0.0.0/33", "an address or a network"),
        ("port", "0", "a port"),
        ("port", "65536", "a port"),
        ("state", "closed", "one of connecting, open, half-closed"),
        ("ending", "IDLE!", "an outcome"),
        ("min-age", "-1", "a number of seconds"),
        ("min-idle", "1e9", "a number of seconds"),
        ("min-rate", "fast", "a number of bytes a second"),
        ("sort", "size", "one of age, idle, rate, bytes, client, destination"),
        ("reverse", "1", "one of yes, no"),
        ("limit", "0", "a number from 1"),
    ],
)
def test_what_is_wrong_is_said(name: str, text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what.replace("(", r"\(")):
        parse({name: text})


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), st.text(max_size=20)))
def test_whatever_is_given_it_is_a_query_or_an_error(texts: dict[str, str]) -> None:
    try:
        query = parse(texts)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert parse(written(query)) == query


def test_sorts_begin_with_the_usual_one() -> None:
    assert Query().sort == session_query.SORTS[0]
    assert session_query.TEXTS < set(session_query.SORTS)
