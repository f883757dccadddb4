# /// script
# dependencies = ["optimal-sampling-trl[plots]"]
# ///
"""Teach a student to sort ten digits by RAFT on the mixture, beside GRPO, on a CPU, in a few minutes.

    python recipes/demo.py                      # or: make demo, or: optimal-sampling demo

It stands in the package, `optimal_sampling_trl/demo/run.py`.
"""

from optimal_sampling_trl.demo.run import main

if __name__ == "__main__":
    main()
