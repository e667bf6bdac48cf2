"""How a connection ended, in one word: the vocabulary of the log, the counters and the documents."""

import enum


class Outcome(str, enum.Enum):
    """One word for each connection that was accepted."""

    COMPLETED = "completed"
    """Both sides sent a FIN and all bytes before it were passed on."""
    CLIENT_RESET = "client-reset"
    """The client's side broke off: a reset, or no answer within the keepalive or user timeout."""
    UPSTREAM_RESET = "upstream-reset"
    """The server's side broke off, likewise."""
    CONNECT_REFUSED = "connect-refused"
    CONNECT_TIMEOUT = "connect-timeout"
    CONNECT_UNREACHABLE = "connect-unreachable"
    NO_LOCAL_PORT = "no-local-port"
    """Every local port towards this destination is in use."""
    SELF_CALL = "self-call"
    """The destination was one of our own listeners."""
    NOT_INTERCEPTED = "not-intercepted"
    """Somebody connected to the listener itself, and there is no target for such connections."""
    DENIED = "denied"
    """The destination is not allowed."""
    LOOP = "loop"
    """The client was one of our own upstream sockets: the ruleset intercepts the relay itself."""
    OVER_LIMIT = "over-limit"
    """A cap, or descriptors, memory or threads, ran out."""
    EVICTED = "evicted"
    """It rested when room was needed."""
    IDLE = "idle"
    HALF_CLOSE_TIMEOUT = "half-close-timeout"
    DRAINED = "drained"
    """Still open when the drain timeout ended."""
    ABORTED = "aborted"
    """The relay was told to stop at once."""
    INTERNAL_ERROR = "internal-error"
    """A bug: the log has the traceback."""

    __str__ = str.__str__

    @property
    def ordinary(self) -> bool:
        """True for the ways in which TCP connections end when the relay has nothing to complain of."""
        return self in _ORDINARY


_ORDINARY = frozenset(
    {
        Outcome.COMPLETED,
        Outcome.CLIENT_RESET,
        Outcome.UPSTREAM_RESET,
        Outcome.EVICTED,
        Outcome.IDLE,
        Outcome.HALF_CLOSE_TIMEOUT,
        Outcome.DRAINED,
        Outcome.ABORTED,
    }
)
