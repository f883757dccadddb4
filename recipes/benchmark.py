"""What the two benchmarks share: their flags, a pair of random models with requests for it, and the stopwatch."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.request import Request, Sampling


def parse(description: str | None) -> argparse.Namespace:
    """The flags of both."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=int, nargs=2, default=(512, 10), metavar=("HIDDEN", "LAYERS"))
    parser.add_argument("--theta", type=int, nargs=2, default=(256, 8), metavar=("HIDDEN", "LAYERS"))
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 32, 128))
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="kl_symmetry", help="of the mixture")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


def make_random_pair(root: str, args: argparse.Namespace) -> tuple[str, str]:
    """Folders of a teacher and a student with random weights and one tokenizer."""
    words = {"<eos>": 0} | {f"w{index}": index for index in range(1, args.vocabulary - 1)}
    core = Tokenizer(WordLevel(words, unk_token="<eos>"))
    for seed, (name, (hidden, layers)) in enumerate({"teacher": args.teacher, "theta": args.theta}.items()):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=args.vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), max_position_embeddings=512,
            initializer_range=0.05, eos_token_id=0, bos_token_id=None,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(f"{root}/{name}")
        PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(f"{root}/{name}")
    return f"{root}/teacher", f"{root}/theta"


def make_requests(batch: int, args: argparse.Namespace) -> list[Request]:
    """A request for each of `batch` random prompts."""
    ids = torch.randint(1, args.vocabulary - 1, (batch, args.prompt), generator=torch.Generator().manual_seed(0))
    sampling, mixture = Sampling(args.tokens, ignore_eos=True), Mixture(args.method)
    return [Request(row, row, mixture, sampling) for row in ids.tolist()]


def fastest(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of a few rounds of each, taking turns; the first round warms up."""
    runs: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn:
                runs[name].append(time.perf_counter() - began)
    return {name: min(times) for name, times in runs.items()}


def describe(args: argparse.Namespace, versions: str) -> str:
    """What was measured, and where."""
    return (
        f"Qwen2 shapes {args.teacher[0]}x{args.teacher[1]} and {args.theta[0]}x{args.theta[1]}, vocabulary "
        f"{args.vocabulary}, {args.dtype}; {args.prompt} prompt tokens, {args.tokens} new ones; method {args.method}\n"
        f"{versions}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), {processor()}\n"
    )


def processor() -> str:
    """The processor's name, or its kind where Linux does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
