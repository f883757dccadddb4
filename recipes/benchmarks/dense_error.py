# /// script
# dependencies = ["optimal-sampling-trl"]
# ///
"""Measure what k costs a dense loss: the divergence over few tokens of each model, against the whole vocabulary's.

    python recipes/benchmarks/dense_error.py --teacher output/smollm2 --student output/smollm2 --drop-layers 4

The student samples completions at temperature 1, and both models read them. Of each k the table has the mean mass
beyond the tokens, and for each divergence its share of the whole one, in the mean over tokens, and the error of its
gradient by the logits of the student, |∇D(k) − ∇D| / |∇D| over all tokens together. Without folders the embedded pair
is read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pair as embedded
from optimal_sampling_trl.divergences import DIVERGENCES, divergence, first_occurrences, union_divergence

QUESTIONS = [
    *("Why is the sky blue?", "Write a haiku about rain.", "What is the capital of France?", "How do I boil an egg?"),
    *("Explain photosynthesis to a child.", "Name three prime numbers.", "What is a black hole?", "Tell me a joke."),
]


def parse() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--teacher", help="folder; without it the embedded pair's")
    flags.add_argument("--student", help="folder; without it the embedded pair's")
    flags.add_argument("--drop-layers", type=int, default=0, help="layers that are cut from the student's middle")
    flags.add_argument("--tokens", type=int, default=64, help="most tokens of a completion")
    flags.add_argument("--rounds", type=int, default=2, help="completions of each prompt")
    flags.add_argument("--top-k", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    return flags.parse_args()


def load(folder: str, drop: int = 0) -> Any:
    """A model in float32, without some layers of its middle."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = model.model.layers
    begin = (len(layers) - drop) // 2
    model.model.layers = nn.ModuleList([layer for at, layer in enumerate(layers) if not begin <= at < begin + drop])
    for at, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = at
    model.config.num_hidden_layers = len(model.model.layers)
    return model


def prompts_of(tokenizer: Any, is_embedded: bool) -> list[Tensor]:
    """Token ids (1, P) of questions, as chats where the tokenizer has a template."""
    if is_embedded:
        texts = embedded.dataset("test", 16, seed=0)["prompt"]
        return [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids for text in texts]


@torch.no_grad()
def read_logits(teacher: Any, student: Any, prompts: list[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """Both models' logits (N, V) at the tokens that the student sampled."""
    of_student, of_teacher = [], []
    for ids in prompts:
        whole = student.generate(ids, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
        for model, kept in ((student, of_student), (teacher, of_teacher)):
            kept.append(model(input_ids=whole).logits[0, ids.shape[1] - 1 : -1])
    return torch.cat(of_student), torch.cat(of_teacher)


def measure(student: Tensor, log_teacher: Tensor, beta: float, k: int) -> tuple[float, Tensor, float]:
    """The mean divergence over both models' k likeliest tokens, its gradient, and the student's mean tail."""
    log_theta = student.log_softmax(-1)
    ids = torch.cat([log_theta.topk(k).indices, log_teacher.topk(k).indices], dim=-1)
    of_theta = log_theta.gather(1, ids)
    value = union_divergence(of_theta, log_teacher.gather(1, ids), ids, beta)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    tail = 1 - (of_theta.detach().exp() * first_occurrences(ids)).sum(-1)
    return value.mean().item(), gradient, tail.mean().item()


def main() -> None:
    args = parse()
    is_embedded = args.teacher is None or args.student is None
    names = embedded.make_pair() if is_embedded else (args.teacher, args.student)
    torch.manual_seed(0)
    teacher, student = load(names[0]), load(names[1], args.drop_layers)
    prompts = prompts_of(AutoTokenizer.from_pretrained(names[1]), is_embedded) * args.rounds
    of_student, of_teacher = read_logits(teacher, student, prompts, args.tokens)
    logits, log_teacher = of_student.requires_grad_(), of_teacher.log_softmax(-1)
    print(f"{len(logits)} tokens, a vocabulary of {logits.shape[1]}, torch {torch.__version__}\n")
    whole = {}
    for name, beta in DIVERGENCES.items():
        value = divergence(logits.log_softmax(-1), log_teacher, beta)
        whole[name] = value.mean().item(), torch.autograd.grad(value.sum(), logits)[0]
    print("| k | mass of θ beyond | " + " | ".join(f"{name}: share | error of ∇" for name in whole) + " |")
    print("|--:|--:|" + "--:|--:|" * len(whole))
    for k in sorted({min(k, logits.shape[1]) for k in args.top_k}):
        cells, tail = [], 0.0
        for name, (exact, wanted) in whole.items():
            value, gradient, tail = measure(logits, log_teacher, DIVERGENCES[name], k)
            cells.append(f"{value / exact:.3f} | {float((gradient - wanted).norm() / wanted.norm()):.3f}")
        print(f"| {k} | {tail:.4f} | " + " | ".join(cells) + " |", flush=True)
    print("\nwhole: " + ", ".join(f"{name} {value:.4f}" for name, (value, _) in whole.items()) + " nats a token")


if __name__ == "__main__":
    main()
