"""RLOO with half of each group sampled from the mixture of the student and a teacher.

Flags may stand in a YAML file, `--config`. accelerate's start several processes: `--accelerate_config fsdp2`.
"""

from ..training import Job

JOB = Job("rloo", "RLOO", __doc__)
run = JOB.run

if __name__ == "__main__":
    JOB.train()
