"""Print the ends of short runs of many seeds, their mean and deviation: the bands of tests/helpers/learning.py.

PYTHONPATH=.:recipes:recipes/studies:tests python tests/checks/learning_bands.py --seeds 8     # CPU, 8 minutes
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch

import pair as embedded
from helpers.learning import DEMO, STACK, end_of_demo, end_of_stack


def main() -> None:
    """Run, and print a line a band."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="runs of each kind (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = embedded.make_pair()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in (*DEMO, *STACK)}
        for folder in folders.values():
            folder.mkdir()
        ends = {arm: [end_of_demo(made, folders[arm], arm, seed) for seed in range(options.seeds)] for arm in DEMO}
        ends |= {arm: end_of_stack(made, folders[arm], arm, options.seeds) for arm in STACK}
    for name, values in ends.items():
        print(f'"{name}": Band({mean(values):.4f}, {stdev(values):.4f})  # {[round(one, 3) for one in values]}')


if __name__ == "__main__":
    main()
