"""From the figures of single runs to what can be said: medians, and medians of ratios within a round."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from targets import Target

Rounds = Sequence[dict[str, dict[str, float]]]
"""For each round, the figures of each relay. A relay that failed in a round is missing there."""

OURS = "relay"


class Spread(NamedTuple):
    """Of one thing, round by round."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        alone = self.least == self.most
        return f"{self.median:.2f}" if alone else f"{self.median:.2f} ({self.least:.2f}-{self.most:.2f})"


class Judgement(NamedTuple):
    """Of a target."""

    reached: float
    met: bool
    words: str


def spread(found: Sequence[float]) -> Spread | None:
    """None of nothing."""
    return Spread(median(found), min(found), max(found)) if found else None


def of_peer(rounds: Rounds, peer: str, figure: str) -> Spread | None:
    """One relay's figure; None if it has none."""
    return spread([one[peer][figure] for one in rounds if figure in one.get(peer, {})])


def ratio(rounds: Rounds, figure: str, theirs: str) -> Spread | None:
    """Ours to another's; None if there is no round in which both have the figure."""
    pairs = [(one.get(OURS, {}).get(figure), one.get(theirs, {}).get(figure)) for one in rounds]
    return spread([ours / other for ours, other in pairs if ours is not None and other])


def measured(target: Target, rounds: Rounds) -> Spread | None:
    """What the target speaks of."""
    if target.peer is None:
        return of_peer(rounds, OURS, target.figure)
    return ratio(rounds, target.figure, target.peer)


def judged(target: Target, rounds: Rounds) -> Judgement | None:
    """What was reached, and how good that is; None if it was not measured."""
    found = measured(target, rounds)
    if found is None:
        return None
    reached = found.median
    plain = of_peer(rounds, OURS, target.figure)
    enough = target.enough is not None and plain is not None and target.reaches(plain.median, target.enough)
    if target.must is not None and not enough and not target.reaches(reached, target.must):
        return Judgement(reached, False, f"short by {_missing(reached, target.must)}")
    if target.goal is None or target.reaches(reached, target.goal):
        return Judgement(reached, True, "ok" if target.goal is None else "ok, and the goal")
    return Judgement(reached, True, f"ok; {_missing(reached, target.goal)} to the goal")


def _missing(reached: float, wanted: float) -> str:
    return f"{abs(reached / wanted - 1):.0%}" if wanted else f"{reached:g}"
