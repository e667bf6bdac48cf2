"""A throw-away network namespace in which rules can be tried, and from which connections can be made."""

import os
from collections.abc import Sequence

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import programs
from tproxy_relay.net.namespace import NetworkNamespace, NoNamespaceError

_NOBODY = 65534
"""The account and the group of that name: they own nothing."""


class Namespace(NetworkNamespace):
    """To be used in a `with`. RelayError if this host does not allow it."""

    def __init__(self, *, user: bool) -> None:
        """`user`: with a user namespace round it, for those who lack CAP_SYS_ADMIN."""
        self._maps = user and os.geteuid() == 0
        self._user = ["-U", "--preserve-credentials"] if user else []
        if self._maps:
            self._user = ["-U", "-S", "0", "-G", "0"]
        lead = ["-U", *([] if self._maps else ["-r"])] if user else []
        super().__init__([programs.require("unshare"), *lead, "-n", "--"])

    def __enter__(self) -> "Namespace":
        try:
            self.await_ready()
        except NoNamespaceError as error:
            raise RelayError(f"no network namespace to be had ({str(error) or 'unshare failed'})") from error
        try:
            self._map_root()
        except OSError as error:
            self.close()
            raise RelayError(f"no user namespace to be had ({error.strerror})") from error
        return self

    def _map_root(self) -> None:
        """Its root is nobody here: to be root in both takes CAP_SETFCAP (user_namespaces(7)), which no relay has."""
        if self._maps:
            for file, text in (("uid_map", f"0 {_NOBODY} 1"), ("setgroups", "deny"), ("gid_map", f"0 {_NOBODY} 1")):
                with open(f"/proc/{self.pid}/{file}", "w", encoding="ascii") as mapping:
                    mapping.write(text)

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, argv: Sequence[str], stdin: str = "", *, check: bool = True) -> str:
        """Run a program in it; what it prints. Raises RelayError if it fails, unless `check` is off."""
        return programs.run(["nsenter", "-t", str(self.pid), *self._user, "-n", "--", *argv], stdin, check=check).stdout

    def ip(self, *lines: str) -> None:
        """Run these lines of `ip -batch` in it. Raises RelayError if one of them fails."""
        self.run(["ip", "-batch", "-"], "\n".join([*lines, ""]))
