"""On-policy distillation with rollouts sampled from the mixture of the student and its teacher.

Flags may stand in a YAML file, `--config`. accelerate's start several processes: `--accelerate_config fsdp2`.
"""

from ..training import Job

JOB = Job("distill", "Distillation", __doc__, rewarded=False)
run = JOB.run

if __name__ == "__main__":
    JOB.train()
