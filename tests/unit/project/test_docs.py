"""The documents say what the code does: words that both must know are compared."""

import re
from pathlib import Path

from tproxy_relay.net import endpoint
from tproxy_relay.net.linux import TcpInfo
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay.access_record import ConnectionRecord

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"


def table(page: str, *, after: str) -> list[str]:
    """The first column of the first table after a heading."""
    lines = iter((DOCS / page).read_text().splitlines())
    for line in lines:
        if line == after:
            break
    words: list[str] = []
    for line in lines:
        cell = re.match(r"``([a-z_-]+)`` ", line)
        if cell:
            words.append(cell[1])
        elif words and not line.startswith("="):
            break
    return words


def test_every_outcome_is_documented_in_order() -> None:
    assert table("access-log.rst", after="Outcomes") == [outcome.value for outcome in Outcome]


def test_every_field_of_the_access_line_is_documented() -> None:
    here = endpoint.Endpoint("192.0.2.1", 1)
    there = endpoint.Endpoint("192.0.2.2", 2)
    tcp = TcpInfo(1, 1000, 0)
    record = ConnectionRecord(
        "1",
        "l",
        here,
        here,
        there,
        here,
        "relay",
        Outcome.IDLE,
        "why",
        1,
        1,
        1.0,
        1.0,
        client_tcp=tcp,
        upstream_tcp=tcp,
    )
    assert record.of_self_probe
    assert set(table("access-log.rst", after="The access line")) == set(record.as_fields())


def test_the_page_on_the_design_names_files_of_packages_that_exist() -> None:
    files = set(re.findall(r"``([a-z_]+/[a-z_]+)``", (DOCS / "design.rst").read_text()))
    assert {"intercept/plan", "intercept/nft", "intercept/iptables", "intercept/routing"} <= files
    for name in files:
        assert (ROOT / "tproxy_relay" / f"{name}.py").exists(), name


def test_the_package_of_interception_names_its_files() -> None:
    folder = ROOT / "tproxy_relay" / "intercept"
    named = set(re.findall(r"\b(\w+\.py)\b", (folder / "__init__.py").read_text()))
    assert named == {path.name for path in folder.glob("*.py")} - {"__init__.py"}


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.rst").read_text()
    for page in DOCS.glob("*.rst"):
        assert page.stem == "index" or f"   {page.stem}\n" in index
