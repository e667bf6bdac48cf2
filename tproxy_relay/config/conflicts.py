"""Settings and arguments that are each fine and cannot be meant together.

Refused are only pairs of which one makes the other impossible or turns it against itself. The sentence
names both and the way out. A pair of which one merely has no effect is worth a warning.
"""

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tproxy_relay.config.option_types import text_of
from tproxy_relay.config.options import ARGUMENTS
from tproxy_relay.errors import ConfigError, UsageError
from tproxy_relay.settings import Settings

_COMMANDS = {
    "root": ("install", "uninstall"),
    "show": ("sessions", "top"),
    "abort": ("sessions",),
    "json": ("status", "sessions", "rules", "check"),
}
"""Arguments, and which commands take them."""


class Contradiction(NamedTuple):
    """The options that disagree, and the sentence about it."""

    options: tuple[str, ...]
    sentence: str


def refuse(settings: Settings, arguments: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Raise the first contradiction: UsageError if one of the two stood on the command line, ConfigError if not."""
    for options, sentence in _conflicts(settings, arguments):
        where = ", ".join(f"{option}: {origins[option]}" for option in options)
        on_command_line = "command line" in (origins[option] for option in options)
        raise (UsageError if on_command_line else ConfigError)(f"{sentence} ({where})")


def warnings(settings: Settings) -> Iterator[str]:
    """A sentence for each setting that another one leaves without effect."""
    most = settings.max_connections
    if most is not None and settings.max_per_source > most:
        yield f"max-per-source {settings.max_per_source} has no effect: max-connections {most} is reached first"
    if settings.user in ("root", "0") and settings.intercept_outbound:
        yield "user root: no connection of any program of root is intercepted; give the workers an account of their own"


def _conflicts(settings: Settings, arguments: Mapping[str, Any]) -> Iterator[Contradiction]:
    yield from _misplaced_words(arguments)
    yield from _aimless_rules(settings, arguments)
    yield from _interception(settings)
    if _target_is_own_listener(settings):
        yield Contradiction(
            ("target", "ports", "bind"),
            f"target {settings.target} is this relay's own listener (ports {text_of(settings.ports)}, bind "
            f"{text_of(settings.bind)}), so every connection would come back: give target another address or port",
        )
    for network in set(settings.allow) & set(settings.deny):
        yield Contradiction(("allow", "deny"), f"{network} is allowed and denied: drop one of them")
    for address in () if settings.interface else filter(_is_link_local, settings.bind):
        yield Contradiction(
            ("bind", "interface"),
            f"bind {address} is a link-local address, which means something on one interface only: set interface too",
        )


def _misplaced_words(arguments: Mapping[str, Any]) -> Iterator[Contradiction]:
    command, action = arguments["command"], arguments["action"]
    if arguments["keep"] and command != "demo":
        yield Contradiction(
            ("keep", "command"), f"--keep is for 'demo', and the command is {command!r}: drop --keep or say demo"
        )
    if arguments["take_over"] and command != "run":
        yield Contradiction(
            ("take-over", "command"),
            f"--take-over is for 'run', and the command is {command!r}: drop --take-over or say run",
        )
    if command == "rules" and action is None:
        yield Contradiction(("command",), "'rules' needs one more word: show, apply, remove or status")
    if command != "rules" and action is not None:
        yield Contradiction(("action", "command"), f"{action!r} goes with 'rules', and the command is {command!r}")
    for name, commands in _COMMANDS.items():
        if arguments[name] != ARGUMENTS[name] and command not in commands:
            *most, last = map(repr, commands)
            words = f"{', '.join(most)} and {last}" if most else last
            yield Contradiction((name, "command"), f"--{name} is for {words}, and the command is {command!r}")
    if arguments["show"] and arguments["abort"]:
        yield Contradiction(("show", "abort"), "--abort ends one connection, and shows none: drop --show or --abort")


def _aimless_rules(settings: Settings, arguments: Mapping[str, Any]) -> Iterator[Contradiction]:
    command, action = arguments["command"], arguments["action"]
    wanted = settings.intercept_inbound or settings.intercept_outbound
    if command == "rules" and action in ("show", "apply", "status") and not wanted:
        yield Contradiction(
            ("intercept-inbound", "intercept-outbound", "command"),
            f"'rules {action}' needs something to intercept: set intercept-inbound or intercept-outbound",
        )


def _interception(settings: Settings) -> Iterator[Contradiction]:
    inbound, outbound = settings.intercept_inbound, settings.intercept_outbound
    for name, ranges, port in (
        ("inbound", inbound, settings.inbound_port),
        ("outbound", outbound, settings.outbound_port),
    ):
        if ranges and port not in settings.ports:
            yield Contradiction(
                (f"intercept-{name}", f"{name}-port", "ports"),
                f"intercept-{name} goes to the listener {name}-port {port}, which is not in ports "
                f"{text_of(settings.ports)}: add it there, or set {name}-port to one of them",
            )
        own = [own for own in settings.ports if any(one.covers(own) for one in ranges)]
        if own:
            yield Contradiction(
                (f"intercept-{name}", "ports"),
                f"intercept-{name} {text_of(ranges)} has the relay's own port {own[0]} in it: leave it out",
            )
    if outbound and settings.interface not in (None, "lo"):
        yield Contradiction(
            ("intercept-outbound", "interface"),
            f"outbound connections reach the relay on lo, where a listener on {settings.interface} does not hear them: "
            "drop interface or intercept-outbound",
        )
    if inbound and settings.interface == "lo":
        yield Contradiction(
            ("intercept-inbound", "interface"), "nothing arrives from outside on lo: set interface to another one"
        )
    if inbound and settings.mode == "redirect":
        yield from _unheard_redirects(settings.bind)


def _unheard_redirects(bind: tuple[str, ...]) -> Iterator[Contradiction]:
    """REDIRECT of what arrives from outside goes to the address of the interface that it came in by."""
    for version in (4, 6):
        mine = [one for one in map(ipaddress.ip_address, bind) if one.version == version]
        if mine and all(one.is_loopback for one in mine):
            yield Contradiction(
                ("intercept-inbound", "mode", "bind"),
                "nat REDIRECT sends inbound connections to the address of their interface, where a listener on "
                f"{mine[0]} does not hear them: use mode tproxy, or bind another address",
            )


def _is_link_local(address: str) -> bool:
    # The kernel refuses to bind one without an interface (EINVAL). IPv4 has no such rule.
    ip = ipaddress.ip_address(address)
    return ip.version == 6 and ip.is_link_local


def _target_is_own_listener(settings: Settings) -> bool:
    """Sure cases only: what a name means, and which addresses this host has, shows later."""
    target = settings.target
    # What this host sends to itself comes in on lo, where a listener on another interface does not hear it.
    if target is None or target.port not in settings.ports or settings.interface not in (None, "lo"):
        return False
    hosts = ("127.0.0.1", "::1") if target.host.lower() == "localhost" else (target.host,)
    return all(_listens_on(host, settings.bind) for host in hosts)


def _listens_on(host: str, bind: tuple[str, ...]) -> bool:
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
    return host in bind or (loopback and ("::" if ":" in host else "0.0.0.0") in bind)
