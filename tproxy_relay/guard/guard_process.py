"""The process of a guard, as the relay that starts it sees it."""

import os
import select
import subprocess

from tproxy_relay.errors import RelayError, SystemRefusedError
from tproxy_relay.guard import messages
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import Channel
from tproxy_relay.system import children

END_TIMEOUT = 1.0
"""Seconds for a guard that has nothing more to do to end; it takes a hundredth of one."""


def start(order: messages.Start) -> tuple["subprocess.Popen[bytes]", Channel]:
    """A new guard that has been given its first message, and the channel to it. Raises SystemRefusedError if the system
    has none to give, RelayError if the plan is too long."""
    try:
        talk, theirs = channel.pair()
    except OSError as error:
        raise SystemRefusedError(f"cannot start the guard of the ruleset: {error.strerror}") from error
    try:
        messages.send_order(talk, order)  # it waits there; what is too long starts no process
        guard = subprocess.Popen(
            children.module_command("tproxy_relay.guard"),
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            # Neither Ctrl-C nor the folder it was started in is the guard's.
            start_new_session=True,
            cwd="/",
            env=children.own_environment(),
        )
    except OSError as error:
        talk.close()
        raise SystemRefusedError(f"cannot start the guard of the ruleset: {error.strerror}") from error
    except RelayError:
        talk.close()
        raise
    finally:
        theirs.close()
    return guard, talk


def await_end(pid: int) -> None:
    """Wait for the end of a guard that has nothing more to do, and that is no child of this process."""
    try:
        guard = os.pidfd_open(pid)
    except OSError:
        return  # it has ended
    ended = select.poll()
    ended.register(guard, select.POLLIN)
    ended.poll(END_TIMEOUT * 1000)
    os.close(guard)
