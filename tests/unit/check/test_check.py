"""The doctor as a whole: all probes, and what is printed."""

import errno
import functools
import json
from collections.abc import Iterator

import pytest
from doctor import PORT

from tproxy_relay import check
from tproxy_relay.check.context import Case, Probe
from tproxy_relay.check.finding import Finding, ok, problem
from tproxy_relay.errors import CapabilityMissingError
from tproxy_relay.settings import Settings

SETTINGS = Settings(intercept_inbound=(PORT,))


def probe_well(case: Case) -> list[Finding]:
    return [ok("well", f"port {case.listener_ports[0]}")]


def probe_a_secret(case: Case) -> list[Finding]:
    raise CapabilityMissingError(f"run it as root to know of {case.listener_ports}")


def probe_ill(_: Case) -> list[Finding]:
    return [problem("ill", "it is broken", "it does not work", "mend it")]


def test_what_is_printed_and_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "PROBES", (probe_well, probe_a_secret))
    assert check.run(SETTINGS, as_json=False) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok: port 15006",
        "warning: a-secret could not be tried (run it as root to know of [15006]): what is wrong there stays unknown",
    ]
    monkeypatch.setattr(check, "PROBES", (probe_well, probe_ill))
    assert check.run(SETTINGS, as_json=False) == 1
    assert capsys.readouterr().out.splitlines()[1] == "problem: it is broken: it does not work. Mend: mend it"


@pytest.mark.parametrize("probe", check.PROBES, ids=lambda probe: probe.__name__)
@pytest.mark.parametrize(
    "refusal", [OSError(errno.EADDRINUSE, "Address already in use"), ValueError("no JSON"), KeyError("x")]
)
def test_what_the_host_refuses_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], probe: Probe, refusal: Exception
) -> None:
    """Whichever probe it meets, and all others are made."""

    @functools.wraps(probe)
    def refused(_: Case) -> Iterator[Finding]:
        yield ok("first", "this was seen before")
        raise refusal

    monkeypatch.setattr(check, "PROBES", (refused, probe_well))
    assert check.run(SETTINGS, as_json=False) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("ok: this was seen") and third == "ok: port 15006"
    name = probe.__name__.removeprefix("probe_").replace("_", "-")
    assert second.startswith(f"warning: {name} could not be tried ({refusal})")


def test_in_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "PROBES", (probe_a_secret, probe_ill))
    assert check.run(SETTINGS, as_json=True) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["ok"] and [one["name"] for one in answer["findings"]] == ["a-secret", "ill"]


def test_that_nothing_is_to_be_intercepted_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "PROBES", ())
    (only,) = check.examine(Settings())
    assert only.level == "ok" and "nothing is to be intercepted" in only.what
    assert not [*check.examine(SETTINGS)]


@pytest.mark.usefixtures("network")
def test_a_network_without_anything_in_it_has_no_problem_with_interception() -> None:
    found = [*check.examine(SETTINGS)]
    assert {"ports", "ruleset", "lo", "route-table", "marks", "filter"} & {
        one.name for one in found if one.level == "problem"
    } == set()
    assert {"kernel", "leftovers", "nft", "ip"} <= {one.name for one in found if one.level == "ok"}
