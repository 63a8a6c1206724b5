"""Training of SPO's step-aware preference model: from preferences and a frozen diffusion model to a reward
that ``step_aware:FOLDER`` loads.
"""

from diffalign.runs.reward.job import RewardResult, train_reward
from diffalign.runs.reward.method import StepAwareTraining, Timed

__all__ = ["RewardResult", "StepAwareTraining", "Timed", "train_reward"]
