"""What a phase means for whoever would begin something."""

import pytest

from tproxy_relay.supervisor.state import Phase, RelayState


@pytest.mark.parametrize(
    "phase, busy, ending",
    [
        (Phase.STARTING, "it is reloading", False),
        (Phase.RUNNING, None, False),
        (Phase.ROLLING_OUT, "it is reloading", False),
        (Phase.DRAINING, "it is stopping", True),
        (Phase.HANDED_OVER, "it is stopping", True),
    ],
)
def test_what_can_begin(phase: Phase, busy: str | None, ending: bool) -> None:
    state = RelayState({})
    state.phase = phase
    assert (state.busy, state.ending) == (busy, ending)


def test_the_words_of_the_status() -> None:
    assert [phase.value for phase in Phase] == ["starting", "running", "reloading", "draining", "handed over"]


def test_there_are_no_settings_before_the_first_generation() -> None:
    with pytest.raises(RuntimeError):
        print(RelayState({}).generation)
