"""RAFT: imitation of the mixture's completions that the reward accepts.

Flags may stand in a YAML file, `--config`. accelerate's start several processes: `--accelerate_config fsdp2`.
"""

from ..training import Job

JOB = Job("raft", "RAFT", __doc__)
run = JOB.run

if __name__ == "__main__":
    JOB.train()
