"""Every example in the documentation runs as it stands: those of the public names, and the README's.

The folders `large` and `small` that they name are tiny models, `output/pair` is the embedded pair; `reward`, `dataset`
and the public names are given.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from datasets import Dataset

import optimal_sampling_trl
import pair as embedded
from helpers.models import make_model
from helpers.paths import ROOT
from optimal_sampling_trl import backends, page, plots

README = (ROOT / "README.md").read_text()
PUBLIC = {name: getattr(optimal_sampling_trl, name) for name in optimal_sampling_trl.__all__}
TOOLS = {
    name: function
    for room in (page, plots)
    for name, function in vars(room).items()
    if name.startswith(("write_page", "plot_"))
}
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
EXAMPLES = {
    **{
        name: [dedent(code) for _, code in BLOCK.findall(inspect.getdoc(each) or "")]
        for name, each in {**PUBLIC, **TOOLS}.items()
    },
    "README": [dedent(code) for _, code in BLOCK.findall(README)],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("large", "small")):
        make_model(folder / name, "llama", seed)
    (folder / "output").mkdir()
    (folder / "output" / "pair").symlink_to(Path(embedded.make_pair().teacher).parent)
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_has_an_example_that_runs(name: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EXAMPLES[name], f"{name} has no example in its docstring"
    monkeypatch.chdir(models)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)  # an engine takes longer to start than these to run
    for code in EXAMPLES[name]:
        given: dict[str, Any] = {
            **PUBLIC,
            **TOOLS,
            "torch": torch,
            "reward": lambda completions, **columns: [float(len(text)) for text in completions],
            "dataset": Dataset.from_dict({"prompt": ["3 + 4 =", "1 + 1 ="] * 8}),
        }
        code = small(code)
        exec(compile(code, f"<example of {name}>", "exec"), given)


SMALL: dict[str, Any] = {"max_steps": 1, "max_completion_length": 4, "report_to": "none", "save_strategy": "no"}
SMALL |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False}


def small(code: str) -> str:
    """The example with its configurations for one step on a CPU, and one where it leaves that to the trainer. As it
    stands where it says itself that it is for a CPU."""
    if "use_cpu=True" in code:
        return code
    if trainer := re.search(r"(\w+)Trainer\(", code):
        assert code.count("trainer.train()") == 1
        if "args=" not in code:
            config = f"{trainer[1]}Config('output/run', per_device_train_batch_size=8)"
            code = code.replace("\n)\n", f"\n    args={config},\n)\n", 1)
    return re.sub(r"((?:GRPO|RLOO|RAFT|Distillation)Config\([^)]*)\)", rf"\1, **{SMALL!r})", code)


def test_the_predecessors_names_are_answered() -> None:
    """The changelog's table of renamed arguments is true."""
    renamed = re.findall(r"^\| `(model_\w+)` \| `(model_\w+)` \|", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(renamed) == 2
    for old, new in renamed:
        with pytest.raises(ValueError, match=f"`{old}=` is the name of an older version. Write `{new}=`"):
            optimal_sampling_trl.OptimalSamplingV1(**{old: "a"})
