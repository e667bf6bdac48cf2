"""What the samples of the last minutes say."""

from tproxy_relay.admin.history import SECONDS, History, Sample


def test_rates_are_of_the_last_seconds() -> None:
    history = History()
    assert history.rates()["accepted"] == 0.0 and history.last_accepted is None
    for second in range(31):
        history.add(Sample(1000.0 + second, 5 * min(second, 25), 0, 0, 100 * second, 0))
    assert history.rates() == {"accepted": 2.5, "failed": 0.0, "bytes_up": 100.0, "bytes_down": 0.0}
    assert history.last_accepted == 1025.0
    assert history.columns()["at"][0] == 1000.0


def test_old_samples_are_dropped() -> None:
    history = History()
    for second in range(SECONDS + 5):
        history.add(Sample(float(second), 0, 0, 0, 0, 0))
    columns = history.columns()
    assert set(columns) == set(Sample._fields)
    assert columns["at"] == [float(second) for second in range(5, SECONDS + 5)]
