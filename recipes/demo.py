# /// script
# dependencies = ["optimal-sampling-trl[plots]"]
# ///
"""The main job on the embedded pair, on a CPU, in a few minutes: a student that sorts ten digits learns to.

    python recipes/demo.py                      # or: make demo, or: optimal-sampling demo

It stands in the package, `optimal_sampling_trl/demo/run.py`.
"""

from optimal_sampling_trl.demo.run import main

if __name__ == "__main__":
    main()
