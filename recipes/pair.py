# /// script
# dependencies = ["optimal-sampling-trl"]
# ///
"""Make the embedded pair: a teacher that sorts ten digits, and a small student that is right once in fifty tries.

    python recipes/pair.py [--folder F]

It is what `optimal-sampling demo` trains on, and stands in the package, `optimal_sampling_trl/demo/pair.py`.
"""

from optimal_sampling_trl.demo.pair import *  # noqa: F403
from optimal_sampling_trl.demo.pair import main

if __name__ == "__main__":
    main()
