"""Training of SPO's step-aware preference model: from preferences and a frozen diffusion model to a reward
that ``step_aware:FOLDER`` loads.
"""

from diffalign.reward_training.job import RewardResult, train_reward
from diffalign.reward_training.method import StepAwareTraining, Timed

__all__ = ["RewardResult", "StepAwareTraining", "Timed", "train_reward"]
