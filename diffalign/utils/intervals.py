"""Values with 95 % confidence intervals; Wilson's interval of a proportion (Wilson 1927)."""

import math
from dataclasses import dataclass

Z95 = 1.959963984540054  # the 0.975 quantile of the standard normal distribution


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval [low, high]."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> list[float]:
        """The interval as a list [low, high], for report.json."""
        return [self.low, self.high]


def wilson(successes: int | float, trials: int, z: float = Z95) -> Estimate:
    """Return a proportion with Wilson's score interval; half successes (ties) are allowed.

    Raises:
        ValueError: no trials, or ``successes`` outside [0, trials].
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"{successes} successes of {trials} trials: need 0 <= successes <= trials and trials >= 1"
        )
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))
