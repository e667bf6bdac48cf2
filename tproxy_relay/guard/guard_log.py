"""What the log of a relay says of its guard: what lasts once, and what comes again and again once a minute."""

import logging

from tproxy_relay.errors import RelayError
from tproxy_relay.logs.repeats import Complaint, Seldom

MOST_RESTORED = 3
"""Lines in a minute that the same has been put back: what is taken away more often than that is taken away by another
program, again and again."""

log = logging.getLogger(__name__)


class GuardLog:
    """The lines of one relay about one ruleset."""

    def __init__(self) -> None:
        self._seldom = Seldom()
        self._often = Seldom(MOST_RESTORED)
        self._trouble = Complaint()

    def died(self) -> None:
        """The guard has ended, and nobody had told it to."""
        if self._seldom.is_due("died"):
            log.error("the guard of the ruleset has died, starting another one")

    def not_started(self, error: RelayError) -> None:
        """Another one cannot be started; that is tried again."""
        if self._seldom.is_due("not started", str(error)):
            log.error("%s", error)

    def warned(self, words: str) -> None:
        """The guard has something to say."""
        if self._seldom.is_due("warned", words):
            log.warning(words)

    def restored(self, what: str) -> None:
        """This was gone, or otherwise than planned, and was put back."""
        if self._often.is_due(what):
            log.warning("ruleset restored", extra={"what": what})

    def in_trouble(self, why: str) -> None:
        """The rules could not be changed or put back, and the guard goes on trying."""
        if self._trouble.begins(why):
            log.error("the ruleset could not be changed: %s", why)

    def well(self) -> None:
        """There is no trouble, or none any more."""
        if self._trouble.ends():
            log.info("the ruleset is as it should be again")
