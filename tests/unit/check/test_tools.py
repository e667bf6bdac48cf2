"""The programs that the ruleset is made with: those of this host, and some that are shell scripts."""

from collections.abc import Callable

import pytest
from doctor import case, levels

from tproxy_relay.check import tools
from tproxy_relay.system import privileges

NET_ADMIN, NET_RAW = (1 << privileges.NUMBERS[name] for name in ("net_admin", "net_raw"))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("nftables v1.0.6 (Lester Gooch #5)", (1, 0, 6)),
        ("nftables v0.9.0 (Fearless Fosdick)", (0, 9, 0)),
        ("nftables v1.1 (x)", (1, 1, 0)),
        ("", None),
    ],
)
def test_versions(text: str, expected: tuple[int, ...] | None) -> None:
    assert tools.version(text) == expected


def test_old_nft_is_older() -> None:
    assert (tools.version("v0.9.6") or ()) < tools.OLDEST_NFT <= (tools.version("v0.9.8") or ())


@pytest.mark.parametrize(
    "said, expected",
    [("nftables v1.0.6", "ok"), ("nftables v0.9.8", "warning"), ("nftables v0.9.0", "problem"), ("", "problem")],
)
def test_nft_by_its_version(only: Callable[..., None], said: str, expected: str) -> None:
    only(nft=f"echo '{said}'")
    assert levels([*tools.probe_nft(case())]) == [("nft", expected)]


def test_without_nft_iptables_may_do(only: Callable[..., None]) -> None:
    only()
    (found,) = tools.probe_nft(case())
    assert found.level == "problem" and found.remedy.endswith("nftables")
    only(iptables_restore="exit 0")
    assert levels([*tools.probe_nft(case())]) == [("nft", "warning")]
    assert levels([*tools.probe_nft(case(backend="nft"))]) == [("nft", "problem")]
    assert not [*tools.probe_nft(case(backend="iptables"))]


def test_iptables_has_programs_for_each_family(only: Callable[..., None]) -> None:
    only(iptables_restore="exit 0", iptables_save="exit 0", iptables="echo iptables v1.8.9")
    assert not [*tools.probe_iptables(case())], "nft is wanted"
    (found,) = tools.probe_iptables(case(backend="iptables", bind=("0.0.0.0",)))
    assert str(found) == "ok: iptables v1.8.9"
    (found,) = tools.probe_iptables(case(backend="iptables-legacy", bind=("0.0.0.0",)))
    assert found.what == "no program iptables-legacy-restore, iptables-legacy-save"


@pytest.mark.parametrize(
    "script, expected",
    [
        (None, ("setpriv", "problem")),
        ("echo --reuid", ("setpriv", "problem")),
        ("echo --pdeathsig", ("setpriv", "ok")),
    ],
)
def test_setpriv_is_that_of_util_linux(only: Callable[..., None], script: str | None, expected: object) -> None:
    only(**({} if script is None else {"setpriv": script}))
    assert levels([*tools.probe_setpriv(case())]) == [expected]


def test_an_account_that_is_not_in_this_user_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "may_become", lambda _: True)
    monkeypatch.setattr(privileges, "not_mapped", lambda _: "account number 4 is not mapped")
    (found,) = tools.probe_setpriv(case(user="4"))
    assert (found.name, found.level) == ("user", "problem") and "account number 4 is not mapped" in found.what
    assert "--user" not in found.remedy and found.remedy.startswith("tproxy-relay check ")


def test_ip_answers_in_json(only: Callable[..., None]) -> None:
    only()
    assert levels([*tools.probe_ip(case())]) == [("ip", "problem")]
    only(ip="echo usage")
    assert "no answer" in next(iter(tools.probe_ip(case()))).what
    only(ip='[ "$1" = -V ] && echo "ip utility" || echo \'[{"priority":0}]\'')
    assert str(next(iter(tools.probe_ip(case())))) == "ok: ip utility"
    assert not [*tools.probe_ip(case(mode="redirect"))], "no routing of its own"


@pytest.mark.parametrize(
    "bits, settings, missing",
    [
        (0, {}, "CAP_NET_ADMIN and CAP_NET_RAW"),
        (NET_ADMIN, {}, ""),
        (NET_ADMIN, {"preserve_source": "address"}, "CAP_NET_RAW"),
        (0, {"intercept_inbound": ()}, "CAP_NET_RAW"),
        (NET_ADMIN | NET_RAW, {"preserve_source": "full"}, ""),
    ],
)
def test_rights_that_are_missing_are_named(bits: int, settings: dict[str, object], missing: str) -> None:
    one = case(**settings)
    one.host.held = privileges.Held(bits, bits)
    (found,) = tools.probe_capabilities(one)
    assert found.what == f"{missing} missing" if missing else found.level == "ok"
