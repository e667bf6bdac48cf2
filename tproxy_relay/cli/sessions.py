"""`tproxy-relay sessions`: the live connections of a running relay, or the end of one of them."""

from collections.abc import Iterator, Mapping
from typing import Any

from tproxy_relay.admin import client
from tproxy_relay.cli import output
from tproxy_relay.cli.arguments import Arguments
from tproxy_relay.cli.humanize import amount, lasted
from tproxy_relay.settings import Settings

COLUMNS = ("id", "client", "asked for", "state", "age", "idle", "to server", "to client", "rate", "rtt", "ends")

Document = Mapping[str, Any]


def run(settings: Settings, arguments: Arguments) -> int:
    """Abort the connection `arguments.abort`, or print those that `arguments.show` chooses. Returns the exit code;
    raises RelayError, NoRelayError if there is no relay."""
    relay = client.find(settings)
    if arguments.abort is not None:
        relay.abort(arguments.abort)
        output.answer(
            {"aborted": arguments.abort}, [f"aborted {arguments.abort}: both its ends see a reset"], arguments.json
        )
        return 0
    found = relay.get("/sessions", dict(arguments.show))
    output.answer(found, session_lines(found), arguments.json)
    return 0


def session_lines(found: Document) -> Iterator[str]:
    """The document of /sessions as a table: a heading, a line for each connection, and how many there are."""
    rows = [COLUMNS, *(tuple(session_row(one)) for one in found["sessions"])]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
    shown = len(found["sessions"])
    more = "" if shown == found["matching"] else f" of {found['matching']:,}"
    yield f"{shown:,}{more} connections"
    if found["silent"]:
        yield f"workers that did not answer: {', '.join(map(str, found['silent']))}"


def session_row(one: Document) -> Iterator[str]:
    """The cells of one connection, in the order of COLUMNS."""
    yield one["id"]
    yield one["client"]
    yield one.get("orig_dst", "-") + (f" > {one['destination']}" if "destination" in one else "")
    yield one["state"]
    yield lasted(one["seconds"])
    yield lasted(one["idle_seconds"])
    yield amount(one["bytes_up"])
    yield amount(one["bytes_down"])
    yield f"{amount(one['rate_up'] + one['rate_down'])}/s"
    yield "/".join(f"{one[key]:.3g}" if key in one else "-" for key in ("client_rtt_ms", "upstream_rtt_ms")) + " ms"
    seconds = one.get("ending_in_seconds")
    yield one.get("ending", "") + ("" if seconds is None else f" in {lasted(seconds)}")
