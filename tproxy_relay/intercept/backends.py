"""Which backend: by name, the one that works here, or those that have something of ours."""

from collections.abc import Callable

from tproxy_relay.errors import CapabilityMissingError, RelayError
from tproxy_relay.intercept import nft, programs
from tproxy_relay.intercept.backend import Backend
from tproxy_relay.intercept.backend_iptables import Iptables
from tproxy_relay.intercept.backend_nft import Nft
from tproxy_relay.intercept.plan import Family, Plan
from tproxy_relay.intercept.programs import ProgramError


def choose(name: str, plan: Plan, *, hold: bool = False, warn: Callable[[str], None] = lambda line: None) -> Backend:
    """The backend of that name; for `auto` nft if the kernel takes the plan from it, else iptables.
    Raises ProgramError if there is none, CapabilityMissingError without the right to ask."""
    if name != "auto":
        return of_name(name, hold=hold)
    try:
        programs.run(["nft", "-c", "-f", "-"], nft.script(plan, "active"))
        return Nft(hold)
    except CapabilityMissingError:
        raise
    except RelayError as error:
        if programs.find("iptables-restore") is None:
            raise ProgramError(f"neither nft nor iptables works here: {error}") from error
        warn(f"using iptables, because nft does not work here: {error}")
        return of_name("iptables")


def can_do(name: str, plan: Plan, family: Family) -> bool:
    """False if the backend that is chosen for that name has no rules for the family here. True where it cannot be
    told."""
    try:
        return choose(name, plan).can_do(family)
    except RelayError:
        return True


def of_name(name: str, *, hold: bool = False) -> Backend:
    """The backend that is called so, `auto` excepted."""
    return Nft(hold) if name == "nft" else Iptables(_variant(name.removeprefix("iptables")))


def preferred() -> Backend:
    """What `auto` would try first, without asking the kernel: for showing."""
    return of_name("iptables") if programs.find("nft") is None and programs.find("iptables-restore") else Nft()


def present() -> list[Backend]:
    """Every backend in which there is something of ours. One that cannot say is passed over; in a user namespace the
    legacy iptables cannot. CapabilityMissingError if nft, or without it none, can for want of a right."""
    found: list[Backend] = []
    refused: list[CapabilityMissingError] = []
    answered = False
    for backend in (Nft(), *map(Iptables, _variants())):
        try:
            if backend.counts():
                found.append(backend)
            answered = True
        except CapabilityMissingError as error:
            if isinstance(backend, Nft):
                raise
            refused.append(error)
        except RelayError:
            continue
    if refused and not answered:
        raise refused[0]
    return found


def _variant(given: str) -> str:
    """Which of the two `iptables` itself is, if it has that one's name beside its own."""
    if given or programs.find("iptables") is None:
        return given
    said = programs.run(["iptables", "-V"], check=False).stdout
    named = "-nft" if "nf_tables" in said else "-legacy"
    return named if programs.find(f"iptables{named}-save") else ""


def _variants() -> list[str]:
    """Names of the iptables that this host has; the plain one only where the others have no names of their own."""
    named = [variant for variant in ("-nft", "-legacy") if programs.find(f"iptables{variant}-save")]
    return named or ([""] if programs.find("iptables-save") else [])
