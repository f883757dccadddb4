"""TRL's trainers with rollouts from the mixture. TRL is imported here and nowhere else in the package."""

from .config import GRPOConfig
from .generator import OptimalSamplingGenerator
from .grpo import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer", "OptimalSamplingGenerator"]
