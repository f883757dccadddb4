"""Make the embedded pair: a teacher that sorts ten digits, and a small student that is right once in fifty tries.

The prompt is `3141592653=`, the completion `1123345569` and EOS: 11 tokens. Both models are tiny Llamas with one
tokenizer of 40 entries, one per character; `data/` has prompts. The pair is made once, in a minute or two on two CPU
cores, and then cached; a folder of your own gets a copy.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .workers import side_by_side

DEFAULT = Path(os.environ.get("OPTIMAL_SAMPLING_CACHE", Path.home() / ".cache" / "optimal-sampling-trl")) / "pair"
COMPLETION_LENGTH = 11  # ten digits and EOS
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
VOCABULARY = [PAD, EOS, UNK, *"0123456789=:. \nabcdefghiklmnoprstuvwy"]  # 40, as many as the models' logits
ENDS = "{{ {'system': '\\n', 'assistant': eos_token}.get(m['role'], '') }}"  # a lone user turn is the bare prompt
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}" + ENDS + "{% endfor %}"
DATA = {"train": 8192, "test": 256}  # prompts in data/<split>.jsonl beside the models, as `--dataset_name` reads them
PRIME = 17  # a prompt whose number is a multiple of this is held out: every digit counts, 1 in 17 is a test prompt


class PairFolders(NamedTuple):
    """Folders of the two checkpoints, as `from_pretrained` takes them."""

    teacher: str
    student: str


class Recipe(NamedTuple):
    """The build of one model, its steps of training, and the range in which its exact match must end."""

    hidden: int  # in heads of size 32, which vLLM's attention on CPU needs
    layers: int
    tied: bool
    init_std: float
    steps: int
    learning_rate: float
    warmup: int
    wanted: tuple[float, float]  # least and most exact match on held-out prompts, sampled at temperature 1


# The student stops where most groups of its own samples hold no success; a few more steps and GRPO needs no help.
RECIPES = {
    "teacher": Recipe(96, 2, False, 0.02, steps=700, learning_rate=2e-3, warmup=50, wanted=(0.98, 1.0)),
    "student": Recipe(64, 2, True, 0.04, steps=100, learning_rate=1.5e-3, warmup=20, wanted=(0.01, 0.05)),
}
BATCH = 128
FINGERPRINT = hashlib.sha256(repr((RECIPES, BATCH, VOCABULARY, CHAT_TEMPLATE, PRIME, DATA)).encode()).hexdigest()


def prompts(split: str, count: int, seed: int) -> list[str]:
    """Return `count` prompts like `3141592653=`; no prompt of "test" is one of "train"."""
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'test'")
    source = random.Random(f"{split} {seed}")
    numbers = iter(lambda: source.randrange(10**10), None)
    chosen = (number for number in numbers if (number % PRIME == 0) == (split == "test"))
    return [f"{number:010d}=" for number in itertools.islice(chosen, count)]


def answer(prompt: str) -> str:
    """Return the right completion, without EOS: `3141592653=` gives `1123345569`."""
    return "".join(sorted(prompt.removesuffix("=")))


def reward(prompts: Sequence[str], completions: Sequence[str], **kwargs: Any) -> list[float]:
    """Return TRL's reward: 1.0 for exactly the right text, else 0.0 (plain text prompts, not conversations)."""
    return [float(completion == answer(prompt)) for prompt, completion in zip(prompts, completions, strict=True)]


def exact_match(prompts: Sequence[str], completions: Sequence[str]) -> float:
    """Return the share of completions that are exactly right."""
    return sum(reward(prompts, completions)) / len(prompts)


def dataset(split: str, count: int, seed: int) -> Dataset:
    """Return the prompts as TRL's trainers take them: one column, "prompt"."""
    return Dataset.from_dict({"prompt": prompts(split, count, seed)})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per character. It has no BOS, so that every engine reads the same prompt."""
    core = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(VOCABULARY)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    names = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK, "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", model_max_length=128, **names)


def build(recipe: Recipe) -> LlamaForCausalLM:
    """Build an untrained model, with the same weights on every call."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=recipe.hidden, intermediate_size=2 * recipe.hidden, head_dim=32,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.hidden // 32, max_position_embeddings=128,
        tie_word_embeddings=recipe.tied, initializer_range=recipe.init_std, bos_token_id=None,
        eos_token_id=VOCABULARY.index(EOS), pad_token_id=VOCABULARY.index(PAD),
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, name: str, line: int = 0
) -> None:
    """Train by cross-entropy on the completions; the rate rises over `warmup` steps and falls to 0 at the last one.

    Args:
        model: is trained in place.
        tokenizer: the pair's.
        recipe: the steps and the learning rate.
        name: what the bar is called.
        line: of the terminal, for the bar.
    """
    texts = prompts("train", recipe.steps * BATCH, seed=0)
    ids = tokenizer([text + answer(text) + EOS for text in texts], return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for step, batch in enumerate(bar := tqdm(ids.split(BATCH), desc=name, unit="step", position=line)):
        share = min(1.0, (step + 1) / recipe.warmup) * (1 - step / recipe.steps)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * share
        logits = model(batch[:, :-1], logits_to_keep=COMPLETION_LENGTH).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, -COMPLETION_LENGTH:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def measure(model: Any, tokenizer: PreTrainedTokenizerFast, count: int = 2048) -> float:
    """Return the exact match on held-out prompts, sampled at temperature 1 (standard error 0.003 at 0.02)."""
    texts = prompts("test", count, seed=0)
    inputs = tokenizer(texts, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(0)
    ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=COMPLETION_LENGTH)[:, len(texts[0]) :]
    return exact_match(texts, tokenizer.batch_decode(ids, skip_special_tokens=True))


def write_models(folder: Path) -> None:
    """Save prompts; train, measure and save both models side by side, the note last."""
    (folder / "data").mkdir(parents=True)
    for split, count in DATA.items():
        lines = [json.dumps({"prompt": text}) for text in prompts(split, count, seed=1)]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    jobs = [(folder, name, recipe, line) for line, (name, recipe) in enumerate(RECIPES.items())]
    measured = dict(zip(RECIPES, side_by_side(write_model, jobs), strict=True))
    (folder / "pair.json").write_text(json.dumps({"recipe": FINGERPRINT, "models": measured}, indent=2))


def write_model(folder: Path, name: str, recipe: Recipe, line: int) -> dict[str, float]:
    """Train, measure and save one model.

    Returns:
        its parameters, its exact match, and the seconds of its training.

    Raises:
        RuntimeError: where its exact match is not what is wanted.
    """
    tokenizer, start = make_tokenizer(), time.perf_counter()
    model, (least, most) = build(recipe), recipe.wanted
    train(model, tokenizer, recipe, name, line)
    seconds, match = time.perf_counter() - start, measure(model.eval(), tokenizer)
    if not least <= match <= most:
        got = f"after {recipe.steps} steps the {name} is right on {match:.2%} of held-out prompts"
        raise RuntimeError(f"{got}; wanted {least:.0%} to {most:.0%}. Change its `steps` in RECIPES and try again")
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return {"parameters": model.num_parameters(), "exact match": match, "seconds": seconds}


def read_stamp(folder: Path) -> dict[str, Any]:
    """Return the note of a finished pair, or nothing. The folder appears in one rename, so a note means complete."""
    return json.loads((folder / "pair.json").read_text()) if (folder / "pair.json").is_file() else {}


def make_pair(folder: Path = DEFAULT) -> PairFolders:
    """Train both models into `folder`, or return at once when they are there, made by the same recipe.

    Another folder than the cache's gets a copy of the pair that `optimal-sampling demo` has left there.
    """
    folder = Path(folder).absolute()
    pair, stamp = PairFolders(str(folder / "teacher"), str(folder / "student")), read_stamp(folder)
    if stamp.get("recipe") == FINGERPRINT:
        return pair
    if folder.exists() and not stamp:
        raise FileExistsError(f"{folder} exists and holds no finished pair; remove it, or name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pair-")))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # more are no faster here, and the order of sums depends on them
        if read_stamp(DEFAULT).get("recipe") == FINGERPRINT:
            shutil.copytree(DEFAULT, scratch / "new")
        else:
            write_models(scratch / "new")
        if read_stamp(folder).get("recipe") != FINGERPRINT:  # equal where another process was faster
            if folder.exists():
                folder.rename(scratch / "old")
            (scratch / "new").rename(folder)
    return pair


def main(argv: Sequence[str] | None = None) -> None:
    """Make the pair, or read it, and print what it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DEFAULT, help="where the checkpoints go (%(default)s)")
    make_pair(folder := parser.parse_args(argv).folder)
    print(f"{folder}\n         parameters exact match trained in")
    for name, row in read_stamp(folder)["models"].items():
        print(f"{name:8} {row['parameters']:10,} {row['exact match']:11.2%} {row['seconds']:8.1f} s")


if __name__ == "__main__":
    main()
