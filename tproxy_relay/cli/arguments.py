"""What is said to one command and is no setting of a relay."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arguments:
    """Of the command line, all of them. The meaning of each, and its default, is in config/options.py."""

    command: str
    action: str | None
    """Of `rules`: show, apply, remove or status."""
    take_over: bool
    """`run` only: from the relay that is there already."""
    keep: bool
    """`demo` only: leave the network up until Ctrl-C."""
    root: str
    """`install` and `uninstall` only."""
    show: tuple[tuple[str, str], ...]
    """`sessions` and `top` only: fields of a session_query.Query, and what was written for each."""
    abort: str | None
    """`sessions` only: the id of a connection."""
    json: bool
    """`status`, `sessions`, `check` and `rules` only: answer in JSON."""
