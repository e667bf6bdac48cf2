"""The vocabulary of endings is a promise to whoever reads the log and the counters."""

import json

from tproxy_relay.outcome import Outcome

WORDS = (
    "completed client-reset upstream-reset connect-refused connect-timeout connect-unreachable no-local-port self-call "
    "not-intercepted denied loop over-limit evicted idle half-close-timeout drained aborted internal-error"
).split()


def test_the_words_and_their_order() -> None:
    assert list(map(str, Outcome)) == WORDS


def test_an_outcome_is_its_word_wherever_it_is_written() -> None:
    assert f"{Outcome.IDLE} {Outcome.IDLE!s}" == "idle idle"
    assert json.dumps({Outcome.DENIED: Outcome.LOOP}) == '{"denied": "loop"}'
    assert Outcome("drained") is Outcome.DRAINED


def test_what_the_relay_complains_of() -> None:
    assert {str(outcome) for outcome in Outcome if outcome.ordinary} == {
        "completed", "client-reset", "upstream-reset", "evicted", "idle", "half-close-timeout", "drained", "aborted",
    }  # fmt: skip
