"""A throw-away network namespace in which rules can be tried, and from which connections can be made."""

from collections.abc import Sequence

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import programs
from tproxy_relay.net.namespace import NetworkNamespace, NoNamespaceError


class Namespace(NetworkNamespace):
    """To be used in a `with`. RelayError if this host does not allow it."""

    def __init__(self, *, user: bool) -> None:
        """`user`: with a user namespace round it, for those who are not root."""
        self._user = ["-U", "--preserve-credentials"] if user else []
        super().__init__([programs.require("unshare"), *(["-U", "-r"] if user else []), "-n", "--"])

    def __enter__(self) -> "Namespace":
        try:
            self.await_ready()
        except NoNamespaceError as error:
            raise RelayError(f"no network namespace to be had ({str(error) or 'unshare failed'})") from error
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, argv: Sequence[str], stdin: str = "") -> str:
        """Run a program in it; what it prints. Raises RelayError if it fails."""
        return programs.run(["nsenter", "-t", str(self.pid), *self._user, "-n", "--", *argv], stdin).stdout

    def ip(self, *lines: str) -> None:
        """Run these lines of `ip -batch` in it. Raises RelayError if one of them fails."""
        self.run(["ip", "-batch", "-"], "\n".join([*lines, ""]))
