"""From the figures of single runs to what can be said: medians, and medians of ratios within a round."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from targets import Target

Rounds = Sequence[dict[str, dict[str, float]]]
"""For each round, the figures of each relay. A relay that failed in a round is missing there."""


class Ratio(NamedTuple):
    """Ours to another's, round by round."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.least:.2f}-{self.most:.2f}]"


def middle(rounds: Rounds, peer: str, figure: str) -> float | None:
    """The median of one relay's figure; None if it has none."""
    found = [one[peer][figure] for one in rounds if figure in one.get(peer, {})]
    return median(found) if found else None


def ratio(rounds: Rounds, figure: str, ours: str, theirs: str) -> Ratio | None:
    """None if there is no round in which both have the figure."""
    found = [
        one[ours][figure] / one[theirs][figure]
        for one in rounds
        if figure in one.get(ours, {}) and one.get(theirs, {}).get(figure)
    ]
    return Ratio(median(found), min(found), max(found)) if found else None


def judged(target: Target, rounds: Rounds) -> tuple[float, str] | None:
    """What was reached, and in a word how good that is; None if it was not measured."""
    if target.peer is None:
        reached = middle(rounds, "relay", target.figure)
    else:
        found = ratio(rounds, target.figure, "relay", target.peer)
        reached = found.median if found else None
    if reached is None:
        return None
    if not _reaches(target.least, reached, target.must):
        return reached, "SHORT"
    return reached, "goal" if target.goal is not None and _reaches(target.least, reached, target.goal) else "ok"


def _reaches(least: bool, reached: float, wanted: float) -> bool:
    return reached >= wanted if least else reached <= wanted
