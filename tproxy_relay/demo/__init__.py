"""`tproxy-relay demo`: the real relay at work in a throw-away network, shown to a newcomer in seconds.

story.py says what is shown; here are the stage and the ways off it. Whatever happens, nothing of the network
remains: it goes with this process (see lab).
"""

import contextlib
import os
import shlex
import signal
from collections.abc import Iterator
from types import FrameType

from tproxy_relay.demo import screen, story
from tproxy_relay.lab import Lab, RelayProcess

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Stopped(BaseException):
    """A signal came. Like KeyboardInterrupt, nothing may take it for an error and go on."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(*, keep: bool) -> int:
    """Show it; `keep` leaves the network up until a signal comes.

    Returns 0 if all was as promised, or else a RelayError; 128 and its number if a signal ended it.
    """
    with _signals_raise():
        try:
            _show(keep=keep)
        except _Stopped as stop:
            with contextlib.suppress(screen.Unread):
                screen.say("\nStopped. Everything was removed.")
            return 128 + stop.number
        except screen.Unread:
            return 1
    return 0


def _show(*, keep: bool) -> None:
    screen.say("tproxy-relay demo: a network of three hosts, made of namespaces of this machine.")
    with contextlib.ExitStack() as opened:
        lab = opened.enter_context(Lab())
        relay = story.Story(lab, opened).show()
        if keep:
            _play(lab, relay)
        pids = [relay.pid, *(host.pid for host in lab.hosts)]
    story.promise("processes left behind", [pid for pid in pids if os.path.exists(f"/proc/{pid}")], [])
    screen.say("\nAll this was measured just now, and everything was removed: the hosts, their")
    screen.say("links and rules, and the relay.")
    screen.say("To play with such a network: tproxy-relay demo --keep. To use it: README.md")


def _play(lab: Lab, relay: RelayProcess) -> None:
    """Leave it to the user until a signal comes."""
    screen.title("It is all yours until Ctrl-C. In another terminal, as the same user:")
    for host in lab.hosts:
        screen.say(f"   {shlex.join(host.command(['sh']))}    # the {host.name}")
    screen.say("\nOn the client, for example:")
    screen.say(f"   curl http://{lab.server.ipv4}:{story.WEB}/      # through the relay")
    screen.say(f"   curl http://{lab.server.ipv4}:{story.WEB_DIRECT}/      # directly")
    screen.say(f"   curl -g 'http://[{lab.server.ipv6}]:{story.WEB}/'")
    screen.say("\nConnections through the relay, as they end:")
    screen.access_head()
    for line in relay.follow(len(relay.lines())):
        if line.get("message") == "connection closed":
            screen.access_line(line)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """The first signal stops the demo, further ones do not disturb the removal."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in _STOPPING:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    # Under nohup a hangup stays ignored; an interrupt does not, even if a shell started us in the background.
    hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    taken = [each for each in _STOPPING if each is not signal.SIGHUP or not hangup_ignored]
    before = {each: signal.signal(each, stop) for each in taken}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
