"""Make the pictures of the documents from a short training of the embedded pair: python tests/checks/screenshots.py

Needs `chromium` on the path. Trains for a minute on one CPU core, and writes to docs/images: the page of rollouts in a
wide window, dark, and on a phone, and the two figures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "recipes")]  # where the helpers and the pair are

from helpers.browser import Browser
from optimal_sampling_trl import GRPOConfig, GRPOTrainer, OptimalSamplingGenerator
from optimal_sampling_trl.demo.arm import EMBEDDED, Watch, train
from optimal_sampling_trl.page import write_page
from optimal_sampling_trl.plots import plot_tokens, plot_training
from pair import make_pair, reward

TITLE = "Sorting ten digits: rollouts of a training run"
SHOTS: dict[str, tuple[int, int, bool, str]] = {
    "page.png": (1200, 800, False, ""),
    "page_dark.png": (1200, 800, True, "document.querySelectorAll('.mixture .token')[6].focus()"),
    "page_phone.png": (390, 844, False, ""),
}
"""Width and height in pixels, whether it is dark, and a script that runs before the picture is taken."""


def train_pair(steps: int, folder: Path) -> tuple[Any, Watch]:
    """Train the student of the embedded pair with GRPO and half of each group from the mixture."""
    pair = make_pair()
    generator = OptimalSamplingGenerator(pair.teacher, backend="transformers")
    settings = {"learning_rate": 1e-3, "output_dir": str(folder)}
    unmeasured = EMBEDDED._replace(measure=lambda model, tokenizer: 0.0)
    return train(GRPOTrainer, GRPOConfig, pair, steps, 64, settings, task=unmeasured, generator=generator)


def draw(trainer: Any, watch: Watch, output: Path, folder: Path) -> None:
    """Write the figures, and the page as a browser shows it."""
    plot_training(output / "training.png", trainer.state.log_history)
    plot_tokens(output / "tokens.png", watch.rollouts)
    asked = watch.tokenizer.batch_decode([rollout.prompt_ids for rollout in watch.rollouts])
    rewards = reward(asked, [rollout.text for rollout in watch.rollouts])
    page = write_page(
        folder / "page.html", watch.rollouts, watch.tokenizer, rewards, TITLE, watch.steps, watch.advantages
    )
    browser = Browser(str(folder / "browser"))
    for name, (width, height, dark, script) in SHOTS.items():
        browser.resize(width, height)
        browser.open(page, dark)
        browser.js(script or "0")
        browser.screenshot(output / name)
    browser.close()


def main() -> None:
    """Train, draw, and print the size of each picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (%(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", help="folder (%(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        draw(*train_pair(options.steps, Path(folder) / "trainer"), options.output, Path(folder))
    for picture in sorted(options.output.glob("*.png")):
        print(f"{picture.relative_to(options.output.parent)}: {picture.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
