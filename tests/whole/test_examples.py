"""Every example in the documentation runs as it stands: those of the public names, of README.md and of the pages.

The folders `large` and `small` that they name are tiny models, which stand for published ones as well; `output/pair`
is the embedded pair; `reward` and `dataset` are given. An example of a public name is given those names, too; one of a
page imports what it uses. Of a difference the new side runs.
"""

from __future__ import annotations

import ast
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
from helpers.speakers import speaking_tokenizer
from optimal_sampling_trl import backends, page, plots

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PUBLIC = {name: getattr(optimal_sampling_trl, name) for name in optimal_sampling_trl.__all__}
TOOLS = {
    name: function
    for room in (page, plots)
    for name, function in vars(room).items()
    if name.startswith(("write_page", "plot_"))
}
BLOCK = re.compile(r"^( *)```(python|diff)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PUBLISHED: dict[Any, str] = {"Qwen/Qwen2.5-0.5B-Instruct": "small", "Qwen/Qwen2.5-3B-Instruct": "large"}
"""The published models that the README's first example names, and what stands for them here."""


def examples(text: str) -> list[str]:
    """The blocks of Python in a text; of a block that shows a difference, the lines that are there afterwards."""
    found = []
    for _, language, code in BLOCK.findall(text):
        if language == "diff":
            code = (
                "\n".join(line[1:] for line in code.splitlines() if not line.startswith("-")) + "\ntrainer.train()\n"
            )
        found.append(dedent(code))
    return found


OF_NAMES = {name: examples(inspect.getdoc(each) or "") for name, each in {**PUBLIC, **TOOLS}.items()}
OF_PAGES = {str(page.relative_to(ROOT)): examples(page.read_text()) for page in PAGES}
EXAMPLES = {**OF_NAMES, **{name: codes for name, codes in OF_PAGES.items() if codes}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("large", "small")):
        make_model(folder / name, "llama", seed)
        speaking_tokenizer().save_pretrained(folder / name)  # some call tools
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
            **(PUBLIC | TOOLS | {"torch": torch} if name in OF_NAMES else {}),
            **CONFIGS,
            "reward": lambda completions, **columns: [float(len(text)) for text in completions],
            "dataset": Dataset.from_dict({"prompt": ["3 + 4 =", "1 + 1 ="] * 32}),
        }
        exec(compile(small(code), f"<example of {name}>", "exec"), given)


SMALL: dict[str, Any] = {"max_steps": 1, "max_completion_length": 4, "report_to": "none", "save_strategy": "no"}
SMALL |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False}
CONFIGS = {f"Small{name}": value for name, value in PUBLIC.items() if name.endswith("Config")}
"""Names of the configurations that are put into an example, apart from those that it imports."""
LARGEST = {"max_tokens": 8, "n": 4}
"""Upper bounds of what an example samples."""


class Small(ast.NodeTransformer):
    """Turns an example into one step on a CPU: its configurations, those that it leaves to the trainer, its models."""

    def visit_Call(self, call: ast.Call) -> ast.Call:
        self.generic_visit(call)
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        given = {keyword.arg for keyword in call.keywords}
        for keyword in call.keywords:
            if keyword.arg in LARGEST and isinstance(keyword.value, ast.Constant):
                keyword.value = ast.Constant(min(keyword.value.value, LARGEST[keyword.arg]))
        if name.endswith("Trainer") and "args" not in given:
            kind = f"Small{name.removesuffix('Trainer')}Config"
            config = f"{kind}('output/run', per_device_train_batch_size=8, **{SMALL!r})"
            call.keywords.append(ast.keyword("args", ast.parse(config, mode="eval").body))
        if name.endswith("Config") and name != "LoraConfig":
            call.keywords = [keyword for keyword in call.keywords if keyword.arg not in SMALL]
            call.keywords += ast.parse(f"f(**{SMALL!r})", mode="eval").body.keywords  # type: ignore[attr-defined]
        return call

    def visit_Constant(self, constant: ast.Constant) -> ast.Constant:
        return ast.Constant(PUBLISHED.get(constant.value, constant.value))


def small(code: str) -> str:
    """The example for one step of tiny models; as it stands where it says itself that it is for a CPU."""
    if "use_cpu=True" in code:
        return code
    assert code.count("Trainer(") == code.count("trainer.train()")
    return ast.unparse(Small().visit(ast.parse(code)))


def test_the_predecessors_names_are_answered() -> None:
    """The changelog's table of renamed arguments is true."""
    renamed = re.findall(r"^\| `(model_\w+)` \| `(model_\w+)` \|", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(renamed) == 2
    for old, new in renamed:
        with pytest.raises(ValueError, match=f"`{old}=` is the name of an older version. Write `{new}=`"):
            optimal_sampling_trl.OptimalSamplingV1(**{old: "a"})
