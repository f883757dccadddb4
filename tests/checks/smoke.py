"""Try an installed package, in a Python with its dependencies and nothing else: python tests/checks/smoke.py

Tiny models are built on the spot. Prints where the package was loaded from, and fails with a traceback.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import entry_points, metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the helpers are

from datasets import Dataset
from transformers import AutoTokenizer

import optimal_sampling_trl
from helpers.models import make_model
from optimal_sampling_trl import GRPOConfig, GRPOTrainer, OptimalSamplingGenerator, OptimalSamplingV1
from optimal_sampling_trl.cli.main import main
from optimal_sampling_trl.page import write_page


def check(folder: Path) -> None:
    """Versions agree, the plugin and the command are registered; sampling, a page and a training step work."""
    package = Path(optimal_sampling_trl.__file__).parent
    assert metadata("optimal-sampling-trl")["Version"] == optimal_sampling_trl.__version__
    assert (package / "py.typed").is_file()
    commands = [("console_scripts", name) for name in ("optimal-sampling", "optimal-sampling-serve")]
    for group, name in (("vllm.general_plugins", "optimal_sampling"), *commands):
        found = [each for each in entry_points(group=group) if each.name == name]
        assert found, f"{name} of {group} is not registered"

    main(["env"])
    teacher, student = (make_model(folder / role, "llama", seed) for seed, role in enumerate(("teacher", "student")))
    with OptimalSamplingV1(teacher, student, backend="transformers") as sampler:
        output = sampler.generate(["3 + 4 ="], max_tokens=8, n=2, seed=0)
    assert output.alpha_stats is not None
    assert output.alpha_stats["count"] == sum(output.num_tokens) > 0
    page = write_page(folder / "page.html", output.rollouts, AutoTokenizer.from_pretrained(student))
    assert page.stat().st_size > 10_000

    trainer = GRPOTrainer(
        model=student,
        generator=OptimalSamplingGenerator(teacher=teacher, backend="transformers"),
        reward_funcs=lambda completions, **columns: [float(len(text)) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": ["3 + 4 =", "1 + 1 ="]}),
        args=GRPOConfig(
            str(folder / "run"), max_steps=1, logging_steps=1, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=8, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        ),
    )  # fmt: skip
    trainer.train()
    (alpha,) = (entry["alpha/mean"] for entry in trainer.state.log_history if "alpha/mean" in entry)
    assert 0 < alpha < 1
    print(f"optimal-sampling-trl {optimal_sampling_trl.__version__} works: {package}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        check(Path(scratch))
