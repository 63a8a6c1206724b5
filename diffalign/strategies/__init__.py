"""What composes with every method: a strategy wraps a method and is a method again.

To add one, write ``strategies/<name>.py`` with a frozen dataclass that has ``wrap(method) -> method``, and a
``CARD``; nothing else needs to know. In a configuration:

    strategies:
      - {type: sdpo, mu: 0.9}
      - {type: sft, weight: 0.1}

The first of the list is the innermost. Most of them act on the gradient alone, by wrapping the policy
(``strategies._common.Scaled``); held-out diagnostics measure the method without its strategies.
"""

from diffalign.strategies.registry import STRATEGIES, StrategyCard, build, wrap

__all__ = ["STRATEGIES", "StrategyCard", "build", "wrap"]
