"""Values with 95 % intervals, and Wilson's interval of a proportion (Wilson 1927)."""

import math
from dataclasses import dataclass

Z95 = 1.959963984540054  # the normal quantile of 0.975


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> list[float]:
        """[low, high], as report.json has it."""
        return [self.low, self.high]


def wilson(successes: int | float, trials: int, z: float = Z95) -> Estimate:
    """Return a proportion with Wilson's score interval; half successes (ties) are allowed."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"{successes} successes of {trials} trials: need 0 <= successes <= trials and trials >= 1"
        )
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))
