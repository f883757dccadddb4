"""TRL's trainers with rollouts from the mixture. The demo and the commands are built on them."""

from .arguments import GeneratorArguments, SamplerArguments
from .config import DistillationConfig, GRPOConfig, RAFTConfig, RLOOConfig
from .distillation import DistillationTrainer
from .generator import OptimalSamplingGenerator
from .grpo import GRPOTrainer
from .raft import RAFTTrainer
from .rloo import RLOOTrainer

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "GeneratorArguments",
    "OptimalSamplingGenerator",
    "RAFTConfig",
    "RAFTTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "SamplerArguments",
]
