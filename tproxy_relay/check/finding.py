"""What a probe has found, and how to write the command that mends it.

A remedy is one line that a shell takes as it is printed. Where somebody else's things are in the way, it does not
take them away: it is `tproxy-relay check` with other settings, which go into the config file once they are fine.
"""

import shlex
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tproxy_relay.config.options import OPTIONS
from tproxy_relay.intercept import programs
from tproxy_relay.settings import Settings

OK, WARNING, PROBLEM = "ok", "warning", "problem"

_INSTALLERS = {
    "apt-get": "apt-get install -y",
    "dnf": "dnf install -y",
    "zypper": "zypper install -y",
    "apk": "apk add",
    "pacman": "pacman -S --noconfirm",
}


@dataclass(frozen=True)
class Finding:
    """One line of the answer: what was found, why it matters, and the command that mends it."""

    name: str
    """What was looked at, in one word."""
    level: str
    what: str
    why: str = ""
    """Why it matters; '' where all is well."""
    remedy: str = ""
    """The command that mends it."""

    def as_json(self) -> dict[str, str]:
        """Its fields by name, for the answer in JSON."""
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.level}: {self.what}"
        text += f": {self.why}" if self.why else ""
        text += f". Mend: {self.remedy}" if self.remedy else ""
        # Names and comments that others chose are no orders to a terminal.
        return "".join(letter if letter.isprintable() else "?" for letter in text)


def ok(name: str, what: str) -> Finding:
    """A finding that all is well with what was looked at."""
    return Finding(name, OK, what)


def warning(name: str, what: str, why: str, remedy: str = "") -> Finding:
    """A finding of what works today, and will bite some day, or of what could not be looked at."""
    return Finding(name, WARNING, what, why, remedy)


def problem(name: str, what: str, why: str, remedy: str) -> Finding:
    """A finding of what breaks connections, or keeps the relay from starting."""
    return Finding(name, PROBLEM, what, why, remedy)


def command(settings: Settings, words: str = "check", **changes: Any) -> str:
    """`tproxy-relay WORDS` with these settings, changed so; what has its default is left out."""
    wanted = replace(settings, **changes)
    argv = ["tproxy-relay", *words.split()]
    for option in OPTIONS.values():
        if not option.is_setting or option.kind is None:
            continue
        value = getattr(wanted, option.field)
        if value is not None and (value != _default(option.field) or option.field in changes):
            argv += [f"--{option.name}", option.write(value)]
    return shlex.join(argv)


def set_sysctl(name: str, value: object) -> str:
    """The command that sets it. Names with slashes are for interfaces with a dot in their name (sysctl(8))."""
    return shlex.join(["sysctl", "-w", f"{name}={value}"])


def set_link(name: str, words: str) -> str:
    """The command that changes an interface, whatever its name is: the kernel takes all but spaces, colons and slashes
    (dev_valid_name() in net/core/dev.c)."""
    return shlex.join(["ip", "link", "set", "dev", name, *words.split()])


def install(package: str) -> str:
    """The command that installs a package, in the words of this host."""
    for program, words in _INSTALLERS.items():
        if programs.find(program):
            return f"{words} {package}"
    return f"apt-get install -y {package}"


def _default(field: str) -> Any:
    return next(one.default for one in fields(Settings) if one.name == field)
