"""The table of options: each is described here, once.

The parser, --help, the manual, etc/tproxy-relay.conf and the completions are all made from it. The defaults are
those of ``Settings``, and for what is no setting, but said to one command, those of ``ARGUMENTS``. An option is called
``connect-timeout`` everywhere: ``--connect-timeout`` on the command line, ``connect-timeout`` in the file,
TPROXY_RELAY_CONNECT_TIMEOUT in the environment.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

from tproxy_relay import settings
from tproxy_relay.config import option_addresses, option_types
from tproxy_relay.settings import MAX_ROUTE_PRIORITY, Settings

DEFAULT_FILE = "/etc/tproxy-relay.conf"
PREFIX = "TPROXY_RELAY_"
# These two are usual names that other programs beside this one read too.
ALIASES = {"log-level": "LOG_LEVEL", "log-format": "LOG_FORMAT"}

ARGUMENTS: Mapping[str, object] = {
    "command": "run",
    "action": None,
    "take_over": False,
    "keep": False,
    "root": "/",
    "show": (),
    "abort": None,
    "json": False,
}
"""Fields of cli/arguments.py, with their defaults."""


@dataclass(frozen=True)
class Option:
    """One option, in the operator's words. ``kind`` is None where it takes no value."""

    name: str
    kind: option_types.OptionType | None
    metavar: str
    meaning: str
    unset: str = ""
    """What happens without a value, where the default is none."""
    many: bool = False
    in_file: bool = True
    in_environment: bool = True

    @property
    def field(self) -> str:
        """Its name in Settings or ARGUMENTS, if it has one there."""
        return self.name.replace("-", "_")

    @property
    def is_setting(self) -> bool:
        """True if it is a field of Settings."""
        return hasattr(Settings, self.field)

    @property
    def is_argument(self) -> bool:
        """True if it is one of ARGUMENTS."""
        return self.field in ARGUMENTS

    @property
    def has_value(self) -> bool:
        """False for what only changes this one run of the program: --help, --config."""
        return self.is_setting or self.is_argument

    @property
    def variable(self) -> str:
        """The environment variable that bears its own name; `variables` has those that are read."""
        return PREFIX + self.field.upper()

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables it is read from, the stronger one first."""
        if not self.in_environment:
            return ()
        alias = ALIASES.get(self.name)
        return (self.variable, alias) if alias else (self.variable,)

    def write(self, value: object) -> str:
        """The value as it stands in a file."""
        return self.kind.write(value) if self.kind else option_types.text_of(value)

    @property
    def words(self) -> tuple[str, ...]:
        """What can be written out, where it is one of a few words."""
        return self.kind.words if self.kind else ()

    @property
    def explained(self) -> dict[str, str]:
        """What the meaning says of each of the words: 'open: they go direct. closed: they are refused.'"""
        parts = re.split(rf"(?:^|(?<=\. ))({'|'.join(self.words)}): ", self.meaning) if self.words else []
        return {word: text.strip() for word, text in zip(parts[1::2], parts[2::2])}

    @property
    def default(self) -> str:
        """The default as it stands in a file; '' where there is none."""
        if not self.has_value:
            return ""
        return self.write(ARGUMENTS[self.field] if self.is_argument else getattr(Settings, self.field))


def _flag(name: str, meaning: str) -> Option:
    return Option(name, None, "", meaning, in_file=False, in_environment=False)


COMMAND = Option(
    "command",
    option_types.words("run", "status", "sessions", "top", "check", "rules", "install", "uninstall", "demo"),
    "COMMAND",
    "run: relay until told to stop. status: ask a running relay how it does. sessions: ask it for its live "
    "connections, or to abort one. top: both on a full screen, as they change. check: say what this host lacks, with "
    "the command that mends it. rules: the interception ruleset. install: put the files of the service into /etc, "
    "where no package has done it. uninstall: take those away that nobody has changed. demo: build a throw-away "
    "network of a client, the relay and a server in namespaces, run the real relay in it, show what each side sees, "
    "and clean up.",
    in_file=False,
    in_environment=False,
)

ACTION = Option(
    "action",
    option_types.words("show", "apply", "remove", "status"),
    "ACTION",
    "The word after rules. show: print what apply would do. apply: install the ruleset. remove: take it out. status: "
    "compare it with what the kernel has.",
    unset="for the other commands",
    in_file=False,
    in_environment=False,
)
POSITIONAL = (COMMAND, ACTION)

GROUPS: dict[str, tuple[Option, ...]] = {
    "Listening": (
        Option("ports", option_types.PORTS, "LIST", "Listening ports, all alike.", many=True),
        Option(
            "bind",
            option_addresses.ADDRESSES,
            "LIST",
            "Listening addresses. With nothing but loopback addresses here, nobody on the network can "
            "connect to the relay itself.",
            many=True,
        ),
        Option(
            "interface",
            option_addresses.INTERFACE,
            "NAME",
            "Listen on this network interface only, and intercept only what arrives there. It may come after "
            "the relay, and go and come back.",
            unset="all interfaces",
        ),
        Option(
            "mode",
            option_types.words(*get_args(settings.Mode)),
            "MODE",
            "How connections get here. tproxy: by TPROXY rules, which rewrite nothing. redirect: by nat "
            "REDIRECT rules; the kernel is asked where each connection was going.",
        ),
    ),
    "Interception": (
        Option(
            "intercept-inbound",
            option_types.PORT_RANGES,
            "LIST",
            "Destination ports of connections that arrive from outside: through this host, or for a server on "
            "it. With this or intercept-outbound set, run installs the ruleset itself, and it goes when the relay "
            "goes.",
            unset="none are intercepted",
            many=True,
        ),
        Option(
            "intercept-outbound",
            option_types.PORT_RANGES,
            "LIST",
            "Destination ports of connections that programs on this host make.",
            unset="none are intercepted",
            many=True,
        ),
        Option("inbound-port", option_types.PORT, "PORT", "The listener that inbound connections go to; one of ports."),
        Option(
            "outbound-port", option_types.PORT, "PORT", "The listener that outbound connections go to; one of ports."
        ),
        Option(
            "backend",
            option_types.words(*get_args(settings.BackendName)),
            "PROGRAM",
            "What installs the rules. auto: nft where it works, else iptables.",
        ),
        Option(
            "on-failure",
            option_types.words(*get_args(settings.OnFailure)),
            "WHAT",
            "What new connections meet when the relay has died. open: they go direct. closed: they are refused until "
            "the relay is back or the ruleset is removed.",
        ),
        Option(
            "mark-mask",
            option_types.MASK,
            "MASK",
            "The three bits of the firewall mark that belong to the relay. The highest of them marks the "
            "relay's own sockets; the bits outside the mask belong to others and are left alone.",
        ),
        Option(
            "route-table",
            option_types.ROUTE_TABLE,
            "NUMBER",
            "The routing table that the ruleset uses. It must be empty.",
        ),
        Option(
            "route-priority",
            option_types.whole(1, MAX_ROUTE_PRIORITY),
            "NUMBER",
            "The priority of the first rule of routing that the ruleset adds; the next two numbers are used too.",
        ),
    ),
    "Processes": (
        Option(
            "workers",
            option_types.workers(),
            "NUMBER",
            "Worker processes, which do the relaying. auto: as many as there are processors, or as the processor time "
            "that the cgroup may use is worth.",
        ),
        Option(
            "cpu-affinity",
            option_types.words(*get_args(settings.CpuAffinity)),
            "WHEN",
            "If each worker stays on one processor, but for threads that carry a stream. auto: if there is a worker "
            "for each. on: always; taskset or CPUAffinity of the unit says which. off: never.",
        ),
        Option(
            "user",
            option_types.ACCOUNT,
            "ACCOUNT",
            "The account that the workers run as: without any capability, unless preserve-source needs one. The "
            "ruleset exempts the connections of this account, so nothing else should run as it.",
            unset="that of the supervisor; as root, the workers keep CAP_NET_RAW and nothing else",
        ),
        Option(
            "stall-timeout",
            option_types.seconds("never"),
            "SECONDS",
            "Kill and replace a worker whose accept loop has shown no sign of life for this long.",
        ),
        Option(
            "self-probe",
            option_types.seconds("never"),
            "SECONDS",
            "Try a connection through the relay this often, and when something is suspicious, between two network "
            "namespaces that live for a moment; status says what has come of it. Its records have self_probe.",
        ),
    ),
    "Connecting upstream": (
        Option(
            "preserve-source",
            option_types.words(*get_args(settings.PreserveSource)),
            "WHAT",
            "What the server sees as its client. no: the relay. address: the client's own address. full: "
            "the client's own address and port. The last two need CAP_NET_RAW, and a way back for the "
            "packets of the server that leads through this host.",
        ),
        Option(
            "target",
            option_addresses.TARGET,
            "HOST:PORT",
            "Where to send connections that were not intercepted. A name is looked up once, at start and reload.",
            unset="they are refused",
        ),
        Option(
            "allow",
            option_addresses.NETWORKS,
            "LIST",
            "Destinations that connections may have although another rule denies them. The longest prefix wins. Denied "
            "from the beginning are loopback, link-local (where clouds have their metadata), multicast and reserved "
            "addresses, also inside of IPv6 addresses, and this host's own, but for servers on it that "
            "intercept-inbound names.",
            unset="those that nothing denies",
            many=True,
        ),
        Option(
            "deny",
            option_addresses.NETWORKS,
            "LIST",
            "Destinations that connections may not have: they are reset, and recorded as denied. With 0.0.0.0/0,::/0 "
            "only those of allow are left.",
            unset="the special ones only",
            many=True,
        ),
    ),
    "Two paths": (
        Option(
            "client-congestion",
            option_types.CONGESTION,
            "NAME",
            "The congestion control of what is sent to clients.",
            unset="what the kernel uses",
        ),
        Option(
            "upstream-congestion",
            option_types.CONGESTION,
            "NAME",
            "The congestion control of what is sent to servers.",
            unset="what the kernel uses",
        ),
        Option(
            "client-pacing",
            option_types.whole(0, option_types.MAX_PACING, "; 0: no limit"),
            "BYTES",
            "Bytes a second that each connection may send to its client; they are sent at even intervals.",
        ),
        Option(
            "upstream-pacing",
            option_types.whole(0, option_types.MAX_PACING, "; 0: no limit"),
            "BYTES",
            "Bytes a second that each connection may send to its server; they are sent at even intervals.",
        ),
        Option(
            "socket-buffer",
            option_types.buffer(),
            "BYTES",
            "What the kernel keeps for each connection, in each of its two sockets and either direction: memory of "
            "many connections is bounded, and so is the speed of one over a long distance. 0: as much as "
            "net.ipv4.tcp_rmem and tcp_wmem allow, when it is needed.",
        ),
    ),
    "Limits": (
        Option(
            "max-connections",
            option_types.connections(),
            "NUMBER",
            "Connections at the same time, of all workers together. Past it nothing is accepted, and new ones wait "
            "in the kernel's backlog, or what when-full says. auto: as many as the limit on open files and the "
            "memory allow.",
        ),
        Option(
            "max-per-source",
            option_types.whole(0, option_types.MAX_CONNECTIONS, "; 0: no limit"),
            "NUMBER",
            "Connections at the same time from one client address. Further ones are refused.",
        ),
        Option(
            "max-rate-per-source",
            option_types.whole(0, option_types.MAX_CONNECTIONS, "; 0: no limit"),
            "NUMBER",
            "New connections within a second from one client address. Further ones are refused.",
        ),
        Option(
            "when-full",
            option_types.words(*get_args(settings.WhenFull)),
            "WHAT",
            "What becomes of a new connection when there is no room for it. wait: it stays in the kernel's backlog "
            "until there is. refuse: it is reset. evict: the connection that has rested longest, for a second at "
            "least, is reset to make room.",
        ),
        Option("connect-timeout", option_types.seconds(None), "SECONDS", "How long to try to connect upstream."),
        Option(
            "idle-timeout",
            option_types.seconds("never"),
            "SECONDS",
            "Reset a connection on which no byte has moved in either direction for this long.",
        ),
        Option(
            "half-close-timeout",
            option_types.seconds("never"),
            "SECONDS",
            "The same for a connection of which one side has already finished sending; it may be the "
            "shorter of the two.",
        ),
        Option(
            "drain-timeout",
            option_types.seconds("do not wait"),
            "SECONDS",
            "How long open connections may go on after the relay was told to stop. Then they are reset.",
        ),
        Option(
            "keepalive",
            option_types.whole(0, option_types.MAX_KEEPALIVE, "; 0: off"),
            "SECONDS",
            "Ask a peer that has been silent for so many seconds whether it is still there (TCP keepalive, towards "
            "both sides). It is given up when no answer has come for twelve times as long: 60 lives through an "
            "outage of ten minutes.",
        ),
        Option(
            "user-timeout",
            option_types.seconds("the kernel decides"),
            "SECONDS",
            "Give up on a peer that for this long has acknowledged nothing of what was sent to it, or has "
            "had no room for more: one that merely stops reading counts too (TCP_USER_TIMEOUT, towards both sides).",
        ),
    ),
    "Log": (
        Option(
            "log-level",
            option_types.words(*get_args(settings.LogLevel)),
            "LEVEL",
            "The least important messages that are still written.",
        ),
        Option(
            "log-format",
            option_types.words(*get_args(settings.LogFormat)),
            "FORMAT",
            "How a line is written. console: for people. json: as one JSON object.",
        ),
        Option("log-file", option_types.PATH, "FILE", "Write the log to this file.", unset="standard error"),
    ),
    "Looking in": (
        Option(
            "admin",
            option_addresses.ADMIN,
            "WHERE",
            "Where else the relay can be asked how it does, beside its own socket, which status, sessions and top find "
            "by themselves and only root and the account of the relay may use. A port of a loopback address: for "
            "everybody on this host, to look and not to change anything. The path of a unix socket: for whoever its "
            "group lets in.",
            unset="nowhere else",
        ),
    ),
    "This program": (
        Option(
            "config",
            option_types.PATH,
            "FILE",
            f"Read this file instead of {DEFAULT_FILE}. /dev/null: read none.",
            in_file=False,
        ),
        _flag("print-config", "Print every setting and where it came from, as a config file, and exit."),
        _flag(
            "take-over",
            "With run: take the listening sockets and the ruleset over from the relay that runs here with one of these "
            "ports. It finishes its connections and ends; no client notices. If none runs: start as usual.",
        ),
        Option(
            "root",
            option_types.FOLDER,
            "DIR",
            "With install and uninstall: the files are those below this folder.",
            in_file=False,
            in_environment=False,
        ),
        _flag("keep", "With demo: leave the network up until Ctrl-C."),
        Option(
            "show",
            option_types.SHOW,
            "LIST",
            "With sessions and top: only those connections for which all of this holds, and in which order.",
            unset="all of them, oldest first",
            many=True,
            in_file=False,
            in_environment=False,
        ),
        Option(
            "abort",
            option_types.SESSION,
            "ID",
            "With sessions: reset the connection with this id, at both ends.",
            unset="none",
            in_file=False,
            in_environment=False,
        ),
        _flag("json", "With status, sessions, check and rules: answer in JSON."),
        _flag("version", "Print the version and exit."),
        _flag("help", "Print this help and exit. Also -h."),
    ),
}

OPTIONS: dict[str, Option] = {
    option.name: option for option in (*POSITIONAL, *(option for group in GROUPS.values() for option in group))
}


def did_you_mean(name: str, candidates: Iterable[Option], spell: Callable[[Option], str]) -> str:
    """' (did you mean ...?)' with the candidate of the nearest name, spelled as it is there; or ''."""
    by_name = {option.name: option for option in candidates}
    near = difflib.get_close_matches(name[:64].lower(), by_name, n=1)
    return f" (did you mean {spell(by_name[near[0]])!r}?)" if near else ""
