"""Shared by the benchmarks: their flags, a pair of random models with requests for it, and the stopwatch."""

from __future__ import annotations

import argparse
import os
import platform
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.request import Request, Sampling


class Shape(NamedTuple):
    """The sizes of a model of Qwen2's kind."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @classmethod
    def small(cls, hidden: int, layers: int, vocabulary: int) -> Shape:
        """A model that a CPU can run."""
        return cls(hidden, layers, 4 * hidden, hidden // 64, max(1, hidden // 256), vocabulary)

    @property
    def parameters(self) -> int:
        """Weights that a step of decoding reads: the embedding only where it is the output layer, too."""
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocabulary

    @property
    def cached(self) -> int:
        """Numbers that a token leaves in the KV cache."""
        return 2 * self.layers * self.kv_heads * self.hidden // self.heads


SHAPES = {
    "0.5b": Shape(896, 24, 4864, 14, 2, 151936, tied=True),
    "1.5b": Shape(1536, 28, 8960, 12, 2, 151936, tied=True),
    "3b": Shape(2048, 36, 11008, 16, 2, 151936, tied=True),
    "7b": Shape(3584, 28, 18944, 28, 4, 152064),
}
"""The sizes of Qwen2.5."""

LETTERS = string.ascii_lowercase
"""The texts that the pair's tokenizer reads: transformers loads it as Qwen2's, which takes a word apart."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of all benchmarks."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--teacher", type=int, nargs=2, default=(512, 10), metavar=("HIDDEN", "LAYERS"))
    flags.add_argument("--theta", type=int, nargs=2, default=(256, 8), metavar=("HIDDEN", "LAYERS"))
    flags.add_argument("--vocabulary", type=int, default=4096)
    flags.add_argument("--shapes", nargs=2, choices=SHAPES, metavar=("TEACHER", "STUDENT"), help=", ".join(SHAPES))
    flags.add_argument("--batches", type=int, nargs="+", default=(1, 8, 32, 128))
    flags.add_argument("--prompt", type=int, default=16, help="tokens of each prompt")
    flags.add_argument("--tokens", type=int, default=16, help="tokens to generate")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--method", default="kl_symmetry", help="of the mixture")
    flags.add_argument("--dtype", default="float32")
    return flags


def shapes(args: argparse.Namespace) -> dict[str, Shape]:
    """The teacher's and the student's sizes; with `one_vocabulary` among the flags both have the shorter one."""
    named = getattr(args, "shapes", None)  # the soak has flags of its own
    if named:
        least = min(SHAPES[name].vocabulary for name in named)
        change = {"vocabulary": least} if getattr(args, "one_vocabulary", False) else {}
        return {role: SHAPES[name]._replace(**change) for role, name in zip(("teacher", "theta"), named)}
    return {role: Shape.small(*getattr(args, role), args.vocabulary) for role in ("teacher", "theta")}


def make_random_pair(root: str, args: argparse.Namespace) -> tuple[str, str]:
    """Folders of a teacher and a student with random weights and one tokenizer; made on a GPU where there is one."""
    models = shapes(args)
    names = [*LETTERS, *(f"w{index}" for index in range(len(LETTERS) + 1, models["theta"].vocabulary - 1))]
    words = {"<eos>": 0} | {name: index for index, name in enumerate(names, 1)}
    core = Tokenizer(WordLevel(words, unk_token="<eos>"))
    for seed, (role, shape) in enumerate(models.items()):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            max_position_embeddings=getattr(args, "context", 4096), tie_word_embeddings=shape.tied,
            initializer_range=0.05, eos_token_id=0, bos_token_id=None,
        )  # fmt: skip
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen2ForCausalLM._from_config(config, dtype=getattr(torch, args.dtype))
        model.save_pretrained(f"{root}/{role}")
        PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(f"{root}/{role}")
    del model
    torch.cuda.empty_cache()
    return f"{root}/teacher", f"{root}/theta"


def make_requests(batch: int, args: argparse.Namespace) -> list[Request]:
    """A request for each of `batch` random prompts."""
    vocabulary = shapes(args)["theta"].vocabulary
    ids = torch.randint(1, vocabulary - 1, (batch, args.prompt), generator=torch.Generator().manual_seed(0))
    sampling, mixture = Sampling(args.tokens, ignore_eos=True), Mixture(args.method)
    return [Request(row, row, mixture, sampling) for row in ids.tolist()]


def fastest(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of a few rounds of each, taking turns; the first round warms up."""
    runs: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            synchronize()
            began = time.perf_counter()
            work()
            synchronize()
            if turn:
                runs[name].append(time.perf_counter() - began)
    return {name: min(times) for name, times in runs.items()}


def print_head(*names: str) -> None:
    """Print the first lines of a table of numbers."""
    print("| " + " | ".join(names) + " |\n|" + "---:|" * len(names))


def on_gpu(index: int) -> dict[str, str]:
    """The variables of a process that sees one GPU."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": str(index)}


def synchronize() -> None:
    """Wait for a GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe(args: argparse.Namespace, versions: str) -> str:
    """Return what was measured, and on which machine."""
    models = shapes(args)
    names = args.shapes or [f"{shape.hidden}x{shape.layers}" for shape in models.values()]
    return (
        f"Qwen2 shapes {' and '.join(names)}, vocabulary {models['teacher'].vocabulary}, {args.dtype}; {args.prompt} "
        f"prompt tokens, {args.tokens} new ones; method {args.method}\n"
        f"{versions}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), {processor()}\n"
    )


def processor() -> str:
    """The GPU's name, or the processor's, or its kind where Linux does not say."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
