"""Bad inputs through the public surface, each with what its error must say; `test_bad_inputs.py` tries them.

    python tests/helpers/bad_inputs.py

prints the table of docs/robustness.md, how long each takes to be refused, and the memory that stays taken. None of
them loads a model.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # where the helpers are

import psutil
import torch
from datasets import Dataset, DatasetDict

from helpers.models import make_model, make_unfit_models
from optimal_sampling_trl import (
    DistillationConfig,
    GRPOConfig,
    Mixture,
    OptimalSamplingGenerator,
    OptimalSamplingV1,
    Rollout,
    Sampling,
    iterate_rollouts,
    load_rollouts,
    mix,
    sample_to_folder,
)
from optimal_sampling_trl.losses import Correction
from optimal_sampling_trl.page import write_page
from optimal_sampling_trl.rollouts.dataset import from_dataset, to_dataset
from optimal_sampling_trl.trainers.arguments import GeneratorArguments

NAN, INF = float("nan"), float("inf")


class Room:
    """A good pair, broken ones, and what else the inputs point at, in one folder.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        make_unfit_models(root)
        make_model(root / "cut", "qwen2", 1)
        file = root / "cut" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        (root / "garbled").mkdir()
        (root / "garbled" / "config.json").write_text("{ not json")
        (root / "strange").mkdir()
        (root / "strange" / "config.json").write_text('{"model_type": "no_such_model"}')
        (root / "adapter").mkdir()
        (root / "adapter" / "adapter_config.json").write_text("{}")
        (root / "notes").mkdir()
        (root / "notes" / "diary.txt").write_text("dear diary")
        self._sampler: OptimalSamplingV1 | None = None

    @property
    def sampler(self) -> OptimalSamplingV1:
        """The good pair, loaded once."""
        if self._sampler is None:
            self._sampler = self.build()
        return self._sampler

    def build(self, **arguments: Any) -> OptimalSamplingV1:
        pair = {"model_teacher": str(self.root / "teacher"), "model_theta": str(self.root / "theta")}
        return OptimalSamplingV1(**{**pair, "backend": "transformers", "device": "cpu", **arguments})

    def build_on(self, name: str, role: str = "model_theta") -> OptimalSamplingV1:
        return self.build(**{role: str(self.root / name)})

    def generate(self, **arguments: Any) -> Any:
        return self.sampler.generate(**{"prompts": ["a", "b"], "max_tokens": 2, **arguments})

    def write(self, prompts: Any = ("a",), name: str = "run", **arguments: Any) -> Any:
        return sample_to_folder(self.sampler, prompts, self.root / name, use_tqdm=False, **arguments)


def rollout(**fields: Any) -> Rollout:
    record = torch.zeros(2)
    values: dict[str, Any] = {"prompt_ids": [1], "theta_prompt_ids": [1], "completion_ids": [2, 3], "text": "x"}
    values |= dict.fromkeys(("alpha", "log_q", "log_theta", "log_teacher"), record)
    return Rollout(**{**values, "finish_reason": "stop", "mixture": Mixture(), **fields})


def column_missing() -> Any:
    return from_dataset(to_dataset([rollout()]).remove_columns("alpha"))


def on_a_device_that_is_not_there(room: Room) -> Any:
    return room.build(device="cuda:99" if torch.cuda.is_available() else "cuda")


LOGITS = torch.zeros(2, 5)
CASES: dict[str, tuple[Callable[[Room], Any], tuple[str, ...]]] = {
    # name: what is tried, and what the error must say: what, got, wanted, what to do
    "mixture: method": (lambda r: Mixture("kl_sym"), ("mixture method", "'kl_sym'", "Known: ", "Did you mean")),
    "mixture: nan": (
        lambda r: Mixture(alpha_min=NAN),
        ("`alpha_min`", "nan", "wanted a number in [0, 1]", "Pass one"),
    ),
    "mixture: above 1": (lambda r: Mixture(alpha_max=1.01), ("`alpha_max`", "1.01", "wanted a number in", "Pass one")),
    "mixture: order": (lambda r: Mixture(alpha_min=0.9, alpha_max=0.6), ("`alpha_min` is 0.9", "0.6", "wanted", "<=")),
    "mixture: bool": (lambda r: Mixture(alpha_min=True), ("`alpha_min`", "True", "wanted a number", "Pass one")),
    "mixture: ε": (lambda r: Mixture(epsilon=-1), ("`epsilon`", "-1", "wanted a finite number", "Pass one")),
    "mixture: huge": (lambda r: Mixture(epsilon=10**400), ("`epsilon`", "1000", "wanted a finite", "Pass one")),
    "mixture: fixed": (lambda r: Mixture("fixed", 0.5, 1.0, 0.1), ("`fixed_alpha`", "0.1", "[0.5, 1.0]", "Widen")),
    "mixture: key": (lambda r: Mixture.from_dict({"alpha_mx": 1}), ("field of a mixture", "alpha_mx", "Known", "Did")),
    "mix: mixtures": (
        lambda r: mix(LOGITS, LOGITS, [Mixture()]),
        ("mix", "1 mixtures", "wanted one for", "Pass either"),
    ),
    "mix: T = 0": (lambda r: mix(LOGITS, LOGITS, Mixture(), 0.0), ("`temperature`", "0.0", "wanted", "solve at 1")),
    "sampling: tokens": (lambda r: Sampling(max_tokens=0), ("`max_tokens`", "0", "wanted a whole number", "Pass one")),
    "sampling: half": (lambda r: Sampling(max_tokens=1.5), ("`max_tokens`", "1.5", "wanted a whole", "Pass one")),  # type: ignore[arg-type]
    "sampling: top_p": (lambda r: Sampling(top_p=2.0), ("`top_p`", "2.0", "wanted a number in (0, 1]", "Pass one")),
    "sampling: top_k": (lambda r: Sampling(top_k=-7), ("`top_k`", "-7", "wanted a whole number", "-1 keeps all")),
    "sampling: seed": (lambda r: Sampling(seed=2**63), ("`seed`", str(2**63), "wanted a whole number from", "Pass")),
    "sampling: stop": (lambda r: Sampling(stop="x"), ("`stop`", "'x'", "wanted a tuple of texts", "write `stop=(")),  # type: ignore[arg-type]
    "sampling: flag": (lambda r: Sampling(ignore_eos="no"), ("`ignore_eos`", "'no'", "wanted True or False", "Pass")),  # type: ignore[arg-type]
    "correction: name": (
        lambda r: Correction("token_trunc"),
        ("correction", "'token_trunc'", "Known", "Did you mean"),
    ),
    "correction: C": (lambda r: Correction(clip_max=-1.0), ("`clip_max`", "-1.0", "wanted a finite number", "Pass")),
    "correction: c": (lambda r: Correction(clip_min=5.0), ("`clip_min`", "5.0", "wanted a number in [0, 3]", "Pass")),
    "correction: window": (lambda r: Correction(window=1.5), ("`window`", "1.5", "wanted a whole number", "Pass one")),  # type: ignore[arg-type]
    "correction: flag": (
        lambda r: Correction(self_normalise="no"),  # type: ignore[arg-type]
        ("`self_normalise`", "'no'", "wanted True or False", "Pass"),
    ),
    "rollout: length": (lambda r: rollout(alpha=torch.zeros(3)), ("`alpha`", "(3,)", "wanted one entry", "2 tokens")),
    "rollout: list": (lambda r: rollout(log_q=[0.0, 0.0]), ("`log_q`", "is a list", "wanted one entry", "2 tokens")),
    "rollout: T = 0": (
        lambda r: rollout(temperature=0.0).weight_theta,
        ("importance weights", "temperature 0", "not drawn", "Sample at a temperature above 0"),
    ),
    "rollouts: column": (
        lambda r: column_missing(),
        ("rollouts", "lacks alpha", "Wanted the columns", "`to_dataset`"),
    ),
    "generator: mixture": (
        lambda r: OptimalSamplingGenerator("t", mixture="kl"),  # type: ignore[arg-type]
        ("`mixture`", "'kl'", "wanted a `Mixture`", "for example `Mixture()`"),
    ),
    "generator: share": (
        lambda r: OptimalSamplingGenerator("t", theta_fraction=2),
        ("`theta_fraction`", "2", "wanted a number in [0, 1]", "Pass one"),
    ),
    "generator: schedule": (
        lambda r: OptimalSamplingGenerator("t", schedule=0),
        ("`schedule`", "0", "wanted a number in (0, 1]", "or None to keep"),
    ),
    "generator: backend": (
        lambda r: OptimalSamplingGenerator("t", backend="vlm"),
        ("backend", "'vlm'", "Known", "Did you mean 'vllm'?"),
    ),
    "generator: rounding": (
        lambda r: OptimalSamplingGenerator("t", theta_fraction=0.01).theta_count(8, 0.5),
        ("`theta_fraction`", "0.01", "wanted at least one", "Raise the group (`num_generations`"),
    ),
    "flags: teacher": (lambda r: GeneratorArguments().generator(), ("`--teacher`", "missing", "wanted", "folder or")),
    "flags: JSON": (
        lambda r: GeneratorArguments(teacher="t", engine_arguments="[1]").engine(),
        ("`--engine_arguments`", "'[1]'", "wanted a JSON object", "such as"),
    ),
    "config: loss": (
        lambda r: DistillationConfig("x", loss="kl", use_cpu=True, bf16=False),
        ("loss of distillation", "'kl'", "Known", "divergence"),
    ),
    "config: unknown field": (
        lambda r: GRPOConfig("x", corection="none", use_cpu=True, bf16=False),  # type: ignore[call-arg]
        ("argument of GRPOConfig 'corection'", "Did you mean 'correction'?"),
    ),
    "sampler: no teacher": (
        lambda r: r.build(model_teacher=None),
        ("`model_teacher`", "missing", "wanted a folder", "a model id or a loaded model"),
    ),
    "sampler: old name": (lambda r: r.build(model_base="x"), ("`model_base=`", "older version", "Write", "`model_th")),
    "sampler: a number": (lambda r: r.build(model_theta=5), ("student", "5 (int)", "wanted a folder", "Pass one")),
    "sampler: misspelt": (lambda r: r.build(max_num_seq=8), ("argument", "'max_num_seq'", "Known", "Did you mean")),
    "sampler: backend": (lambda r: r.build(backend="vlm"), ("backend", "'vlm'", "Known", "Did you mean 'vllm'?")),
    "sampler: memory": (
        lambda r: r.build(gpu_memory_utilization=0.9),
        ("`gpu_memory_utilization`", "0.9", "wanted", "Drop it"),
    ),
    "sampler: device": (on_a_device_that_is_not_there, ("device", "'cuda", "wanted", "Pass")),
    "checkpoint: nowhere": (
        lambda r: r.build_on("nowhere"),
        ("student", "nowhere'", "does not exist", "Pass a folder"),
    ),
    "checkpoint: empty": (lambda r: r.build_on("empty"), ("student", "empty'", "holds no model", "Pass a folder")),
    "checkpoint: adapter": (
        lambda r: r.build_on("adapter"),
        ("student", "adapter'", "wanted a whole model", "Merge it into another folder"),
    ),
    "checkpoint: cut": (lambda r: r.build_on("cut"), ("student", "cut'", "Wanted a whole", "copy or save it again")),
    "config.json: no JSON": (lambda r: r.build_on("garbled"), ("student", "garbled'", "no model", "Pass a folder")),
    "config.json: unknown": (lambda r: r.build_on("strange"), ("student", "strange'", "no model", "Pass a folder")),
    "tokenizer: other": (lambda r: r.build_on("swapped"), ("tokenizers", "token 64", "'b'", "one family")),
    "tokenizer: none": (lambda r: r.build_on("mute"), ("student's tokenizer", "mute'", "could not", "Save one there")),
    "vocabulary: small": (lambda r: r.build_on("small"), ("student", "200 tokens", "257", "Resize its embeddings")),
    "encoder-decoder": (lambda r: r.build_on("t5"), ("student", "T5For", "wanted a decoder-only", "Pass")),
    "prompts: none": (lambda r: r.generate(prompts=[]), ("`prompts`", "[]", "wanted at least one", "Skip the call")),
    "prompts: empty": (lambda r: r.generate(prompts=["a", ""]), ("Prompt 1", "empty", "wanted at least", "Drop it")),
    "prompts: unwrapped": (lambda r: r.generate(prompts=[1, 2]), ("Prompt 0", "'1' (int)", "wanted a text", "Wrap")),
    "prompts: no id": (lambda r: r.generate(prompts=[[999]]), ("prompt 0", "999", "wanted ids from", "tokenizer of")),
    "prompts: long": (lambda r: r.generate(prompts=["a" * 600]), ("prompt 0", "600", "holds 512", "Shorten")),
    "generate: n": (lambda r: r.generate(n=0), ("`n`", "0", "wanted a whole number", "Pass one")),
    "generate: mixtures": (
        lambda r: r.generate(mixture=[Mixture()]),
        ("`mixture`", "1 of them", "wanted one", "each"),
    ),
    "data: column": (
        lambda r: r.write(Dataset.from_dict({"text": ["a"]})),
        ("`prompts`", "text", "wanted 'prompt'", "rename_column"),
    ),
    "data: splits": (lambda r: r.write(DatasetDict()), ("`prompts`", "splits", "wanted one of them", "data[split]")),
    "data: two seeds": (
        lambda r: r.write(sampling=Sampling(seed=1)),
        ("`sampling.seed`", "1", "wanted none", "Pass `seed=`"),
    ),
    "folder: somebody's": (
        lambda r: r.write(name="notes"),
        ("folder", "'diary.txt'", "no folder of", "Name a folder"),
    ),
    "folder: no run": (lambda r: load_rollouts(r.root / "notes"), ("run.json", "notes'", "wanted a folder", "wrote")),
    "folder: nowhere": (lambda r: [*iterate_rollouts(r.root / "x")], ("run.json", "x'", "wanted a folder", "wrote")),
    "page: none": (lambda r: write_page(r.root / "p", [], None), ("write_page", "no rollouts", "needs", "generate")),  # type: ignore[arg-type]
}


def main() -> None:
    with TemporaryDirectory() as folder:
        room = Room(Path(folder))
        room.generate()  # the pair, and what is imported when first used
        print("| input | error | s |\n|---|---|--:|")
        slowest = 0.0
        for name, (attempt, _) in CASES.items():
            began = time.perf_counter()
            try:
                attempt(room)
                answer = "NOT REFUSED"
            except Exception as error:
                answer = f"{type(error).__name__}: {error}".replace(folder, "").replace("|", "/").replace("\n", " ")
            seconds = time.perf_counter() - began
            slowest = max(slowest, seconds)
            print(f"| {name} | {answer[:160]} | {seconds:.3f} |")
        print(f"\n{len(CASES)} inputs; the slowest was refused after {slowest:.2f} s.")
        memory = [resident()]
        for _ in range(20):
            for attempt, _words in CASES.values():
                with suppress(ValueError, TypeError):
                    attempt(room)
        memory.append(resident())
        print(f"Resident memory after one round {memory[0]:.0f} MiB, after 20 more {memory[1]:.0f} MiB.")


def resident() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


if __name__ == "__main__":
    main()
