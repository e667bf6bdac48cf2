"""Running nft, iptables and ip: always by argument list, never through a shell, and never for long.

A program that is missing, refuses or hangs becomes a RelayError whose line says which one, what it said, and
what to do.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence

from tproxy_relay.errors import CapabilityMissingError, RelayError, SystemRefusedError
from tproxy_relay.system import children

TIMEOUT = 20.0
"""Seconds for one call. iptables may wait for another program's lock that long (-w)."""

PACKAGES = {"nft": "nftables", "ip": "iproute2"}
"""Debian's package of a program, where it is not iptables."""

_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")

_NOT_PERMITTED = ("permission denied", "operation not permitted", "you must be root")


class ProgramError(SystemRefusedError):
    """A program is missing, or said no."""


def find(name: str) -> str | None:
    """Its path, also in the administrators' folders, which a service's PATH may lack."""
    return shutil.which(name, path=search_path())


def search_path() -> str:
    """PATH with the administrators' folders at its end."""
    known = os.environ.get("PATH", os.defpath).split(":")
    return ":".join([*known, *(folder for folder in _SBIN if folder not in known)])


def require(name: str) -> str:
    """Its path, or ProgramError with the package that has it."""
    path = find(name)
    if path is None:
        raise ProgramError(f"{name} not found: install the package {PACKAGES.get(name, 'iptables')}")
    return path


def run(argv: Sequence[str], stdin: str = "", *, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run it to its end. Raises ProgramError, or CapabilityMissingError if it lacked a right; without `check`
    a program that fails is the caller's matter, and only one that cannot be run raises."""
    command = [require(argv[0]), *argv[1:]]
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=TIMEOUT,
            env=children.program_environment(os.environ, search_path()),
        )
    except subprocess.TimeoutExpired as error:
        raise ProgramError(f"`{' '.join(argv)}` did not end within {TIMEOUT:g} s") from error
    except OSError as error:
        raise ProgramError(f"cannot run {command[0]}: {error.strerror}") from error
    if check and done.returncode:
        raise refusal(argv, done.stderr or done.stdout)
    return done


def refusal(argv: Sequence[str], said: str) -> RelayError:
    """The error for a program that failed, with its own words on one line."""
    words = " ".join(said.split()) or "it said nothing"
    message = f"`{' '.join(argv)}` failed: {words[:400]}"
    if any(hint in words.lower() for hint in _NOT_PERMITTED):
        return CapabilityMissingError(f"the ruleset needs CAP_NET_ADMIN: run this as root ({message})")
    return ProgramError(message)
