"""Check speculative sampling on a GPU: tokens of the mixture whatever the student drafts. A table says what was seen.

    python tests/checks/check_speculation.py                       # all steps, some minutes on one GPU
    python tests/checks/check_speculation.py --only law greedy     # some of them

| step | what is tried |
|---|---|
| `law` | chi-square over sequences of the demo's pair, each mixture and truncation by each k; 0 is a control |
| `kept` | drafts that are kept: at α = 0 nearly all, elsewhere the mean of min(1, θ/q) of the records |
| `greedy` | at temperature 0 the tokens of an engine without speculation |
| `ends` | a stop inside of the drafts, and the edge of `max_model_len`; each completion's records |
| `joins` | requests that join a running batch by one last token, all of their prompt being cached |
| `aborts` | requests are aborted between two steps, and the next ones are the mixture's |
| `changes` | each step drafts another number of tokens, none among them |
| `records` | the same tokens without drafts and with them: how far their records are from each other and the oracle |
| `trainers` | GRPO and RAFT on an untrained pair, three steps: records of every batch against the model that trains |

A sequence has k + 2 tokens unless `--tokens` says how many, as the first comes with the prompt: k drafts and the token
behind them come after it. Each k has seeds of its own, and so has each `--seed`.
Sequences that are expected less than five times count as one. The law is computed by transformers in float32, and the
engines compute in float32, too. A z of the statistic is noise up to 3 or so; with the draft's noise used again for
what replaces it, it was 13 over as many sequences.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "recipes")]  # helpers, and pairs

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from checks.check_server import Report
from helpers.engines import ON_A_GPU, TOLERANCE, Oracle, counter, start
from helpers.oracle import check_rollout, truncate
from helpers.training import Watch, load, make_trainer, make_untrained_pair
from optimal_sampling_trl.backends.vllm.draft_counts import DraftCounts
from optimal_sampling_trl.backends.vllm.speculation import AUTO, AUTO_COUNTS
from optimal_sampling_trl.demo import pair as demo
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.mixture.reference import reference
from optimal_sampling_trl.rollouts.request import Request, Sampling
from optimal_sampling_trl.rollouts.rollout import RECORDS

MIXTURES = {
    "kl_symmetry": Mixture(),
    "trust_region": Mixture("trust_region", epsilon=0.05),
    "theta": Mixture.theta_only(),
    "teacher": Mixture.teacher_only(),
    "fixed arithmetic": Mixture("fixed", fixed_alpha=0.3, form="arithmetic"),
    "top_k_swap": Mixture("top_k_swap", swap_top_k=3),
}
DEVICE = "cuda" if ON_A_GPU else "cpu"
CASES = [
    ("kl_symmetry", {}),
    ("trust_region", {}),
    ("theta", {}),
    ("teacher", {}),
    ("fixed arithmetic", {}),
    ("top_k_swap", {}),
    ("top_k_swap", {"top_k": 4, "temperature": 0.7}),
    ("kl_symmetry", {"temperature": 0.7}),
    ("kl_symmetry", {"top_k": 3}),
    ("trust_region", {"top_p": 0.8, "temperature": 1.3}),
]
OFTEN = 5
"""How often a sequence is expected at least that has a cell of its own."""
Z = 4.0
"""A statistic further out than this fails: of a hundred tests without error, one in three hundred does."""


class Law:
    """The mixture's distribution of sequences after a prompt, by both models in transformers."""

    def __init__(self, teacher: str, theta: str) -> None:
        self.models = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
            .to(DEVICE)
            .eval()
            for path in (theta, teacher)
        ]

    @torch.no_grad()
    def log_q(self, prefixes: list[list[int]], mixture: Mixture, sampling: Sampling) -> Tensor:
        """log q (N, V) of the token behind each prefix; all are as long."""
        ids = torch.tensor(prefixes, device=DEVICE)
        theta, teacher = (model(input_ids=ids).logits[:, -1].cpu().double() for model in self.models)
        T = sampling.temperature
        log_q = reference(theta, teacher, mixture, T)[1]
        if sampling.keeps_all:
            return log_q
        return torch.stack([truncate(row * T, set(), sampling) for row in log_q])

    def sequences(
        self, prompt: list[int], mixture: Mixture, sampling: Sampling, length: int, least: float
    ) -> dict[tuple[int, ...], float]:
        """Probabilities of the sequences of so many tokens, of all that have at least so much."""
        found: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(length):
            prefixes = [[*prompt, *tail] for tail in found]
            parts = [self.log_q(prefixes[i : i + 4096], mixture, sampling) for i in range(0, len(prefixes), 4096)]
            rows = zip(found.items(), torch.cat(parts).exp().tolist(), strict=True)
            longer = {(*tail, id): before * q for (tail, before), row in rows for id, q in enumerate(row)}
            found = {tail: probability for tail, probability in longer.items() if probability >= least}
        return found


def chi_square(seen: Counter[tuple[int, ...]], probabilities: dict[tuple[int, ...], float]) -> tuple[float, int]:
    """z of Pearson's statistic, and its degrees of freedom; all sequences without a probability count as one."""
    count = seen.total()
    cells = [(seen[tail], probability * count) for tail, probability in probabilities.items()]
    rest = tuple(count - sum(column) for column in zip(*cells, strict=True))
    cells += [rest] if rest[1] >= OFTEN else []
    freedom = len(cells) - 1
    statistic = sum((got - expected) ** 2 / expected for got, expected in cells)
    return (statistic - freedom) / (2 * max(freedom, 1)) ** 0.5, freedom


@contextmanager
def engine(pair: Any, k: int | str, **further: Any) -> Iterator[Any]:
    """An engine on the demo's pair in float32, with the student drafting k tokens."""
    settings = {
        "num_speculative_tokens": k,
        "max_model_len": 64,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 4096,
        "kv_cache_memory_bytes": 1 << 28,
        "enforce_eager": False,
        "disable_log_stats": False,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [8, 64, 256, 512, 1024],
        },
    }
    backend = start(pair.teacher, pair.student, **settings | further)
    try:
        yield backend
    finally:
        backend.close()


def sample(
    backend: Any, prompt: list[int], mixture: Mixture, sampling: dict[str, Any], length: int, count: int
) -> Counter[tuple[int, ...]]:
    """How often each sequence of so many tokens came."""
    from vllm import TokensPrompt

    from optimal_sampling_trl.backends.vllm.requests import to_sampling_params

    asked = Request(prompt, prompt, mixture, Sampling(max_tokens=length, ignore_eos=True, **sampling))
    params = to_sampling_params(asked, backend.pair.ending)
    params.logprobs, params.extra_args = None, mixture.to_dict()
    outputs = backend.llm.generate([TokensPrompt(prompt_token_ids=prompt)] * count, params, use_tqdm=False)
    return Counter(tuple(one.outputs[0].token_ids) for one in outputs)


def accepted(backend: Any, work: Any) -> tuple[float, Any]:
    """The share of drafts that were kept while some work was done, and what that returned."""
    names = ("spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens")
    before = [counter(backend, name) for name in names]
    result = work()
    kept, drafted = (counter(backend, name) - count for name, count in zip(names, before))
    return kept / max(drafted, 1), result


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    tokenizer = demo.make_tokenizer()
    return [list(tokenizer(text)["input_ids"]) for text in demo.prompts("test", count, seed)]


def requests(count: int, mixture: Mixture, **sampling: Any) -> list[Request]:
    settings = {"max_tokens": 20, "ignore_eos": True} | sampling
    return [Request(ids, ids, mixture, Sampling(seed=index, **settings)) for index, ids in enumerate(prompts(count))]


class Check:
    """The steps, on the demo's pair."""

    def __init__(self, pair: Any, args: argparse.Namespace) -> None:
        self.pair, self.count, self.ks, self.cases = pair, args.sequences, args.k, args.cases
        self.tokens, self.seed = args.tokens, args.seed
        self.oracle = Oracle(pair.teacher, pair.student, eos=demo.VOCABULARY.index(demo.EOS))

    def law(self) -> str:
        law, prompt, worst = Law(self.pair.teacher, self.pair.student), prompts(1)[0], 0.0
        for k in self.ks:
            length = self.tokens or k + 2
            with engine(self.pair, k, seed=10 * self.seed + k) as backend:
                for index in self.cases:
                    name, sampling = CASES[index]
                    mixture = MIXTURES[name]
                    wanted = law.sequences(prompt, mixture, Sampling(**sampling), length, OFTEN / self.count)
                    z, freedom = chi_square(sample(backend, prompt, mixture, sampling, length, self.count), wanted)
                    worst = max(worst, abs(z))
                    found = f"z={z:+.2f} of {freedom} degrees, {length} tokens, {self.count} sequences"
                    print(f"k={k} {name} {sampling or ''}: {found}", flush=True)
        assert worst < Z, f"a statistic is {worst:.1f} standard deviations off"
        return f"largest |z| {worst:.2f}, {self.count} sequences each, k = {self.ks}"

    def kept(self) -> str:
        lines = []
        for k in self.ks[-1:]:
            with engine(self.pair, k) as backend:
                for name, mixture in MIXTURES.items():
                    asked = requests(128, mixture)
                    share, rollouts = accepted(backend, lambda asked=asked: backend.generate(asked))
                    worst = self.oracle.check(rollouts, asked, tolerance=TOLERANCE)
                    pairs = [(one.log_theta - one.log_q).exp().clamp(max=1) for one in rollouts]
                    estimate = float(torch.cat(pairs).mean())
                    per_cycle = (1 - estimate ** (k + 1)) / (1 - estimate) if estimate < 1 else k + 1
                    expected = (per_cycle - 1) / k
                    lines.append(f"{name} {share:.3f} (records: {expected:.3f})")
                    print(lines[-1], worst, flush=True)
                    assert share > 0.98 or name != "theta"
                    assert abs(share - expected) < 0.05
        return ", ".join(lines)

    def greedy(self) -> str:
        found = []
        for k in (0, self.ks[-1]):
            with engine(self.pair, k) as backend:
                found.append(
                    [one.completion_ids for one in backend.generate(requests(200, Mixture(), temperature=0.0))]
                )
        same = sum(one == other for one, other in zip(*found, strict=True))
        assert same >= 199, f"{same} of 200 equal"
        return f"{same} of 200 equal"

    def ends(self) -> str:
        with engine(self.pair, self.ks[-1]) as backend:
            asked = requests(256, Mixture.teacher_only(), ignore_eos=False, max_tokens=40)
            rollouts = backend.generate(asked)
            eos = demo.VOCABULARY.index(demo.EOS)
            stopped = [one for one in rollouts if one.completion_ids[-1] == eos]
            assert len(stopped) > 200
            assert all(eos not in one.completion_ids[:-1] for one in rollouts)
            self.oracle.check(rollouts, asked, tolerance=TOLERANCE)
            for limit in range(50, 54):  # the last tokens before the edge, and 64 - 11 of them at most
                asked = requests(64, Mixture(), max_tokens=limit)
                rollouts = backend.generate(asked)
                assert {len(one.completion_ids) for one in rollouts} == {limit}
                self.oracle.check(rollouts, asked, tolerance=TOLERANCE)
        return f"{len(stopped)} of 256 stopped by their end"

    def joins(self) -> str:
        """A prompt of 32 tokens and one more: two whole blocks are cached, and one token is left to read."""
        prompt = (prompts(1)[0] * 4)[:33]
        law, length = Law(self.pair.teacher, self.pair.student), self.ks[-1] + 2
        wanted = law.sequences(prompt, Mixture(), Sampling(), length, OFTEN / self.count)
        with engine(self.pair, self.ks[-1], max_num_seqs=64, block_size=16) as backend:
            sample(backend, prompt, Mixture(), {}, length, 8)
            z, freedom = chi_square(sample(backend, prompt, Mixture(), {}, length, self.count), wanted)
        assert abs(z) < Z, f"{z:.1f} standard deviations off"
        return f"z {z:+.2f} of {freedom} degrees"

    def aborts(self) -> str:
        from vllm import TokensPrompt

        from optimal_sampling_trl.backends.vllm.requests import to_sampling_params

        asked = requests(64, Mixture())
        with engine(self.pair, self.ks[-1]) as backend:
            llm = backend.llm.llm_engine
            for turn in range(3):
                for index, one in enumerate(asked):
                    params = to_sampling_params(one, backend.pair.ending)
                    llm.add_request(f"{turn}-{index}", TokensPrompt(prompt_token_ids=one.prompt_ids), params)
                for _ in range(3 + turn):
                    llm.step()
                llm.abort_request(list(llm.output_processor.request_states), internal=True)
                while llm.has_unfinished_requests():
                    llm.step()
                self.oracle.check(backend.generate(asked), asked, tolerance=TOLERANCE)
        return "three times"

    def changes(self) -> str:
        """Every number of drafts after every other, in a batch that requests join and leave."""
        law, prompt, source = Law(self.pair.teacher, self.pair.student), prompts(1)[0], random.Random(0)
        length, chosen = max(AUTO_COUNTS) + 2, []
        wanted = law.sequences(prompt, Mixture(), Sampling(), length, OFTEN / self.count)

        def choose(self: DraftCounts, batch: int) -> int:
            chosen.append(source.choice(self.counts))
            return chosen[-1]

        with patch.object(DraftCounts, "choose", choose), engine(self.pair, AUTO) as backend:
            asked = requests(400, Mixture())
            self.oracle.check(backend.generate(asked), asked, tolerance=TOLERANCE)
            z, freedom = chi_square(sample(backend, prompt, Mixture(), {}, length, self.count), wanted)
        seen = {count: chosen.count(count) for count in sorted(set(chosen))}
        assert abs(z) < Z, f"{z:.1f} standard deviations off; steps {seen}"
        return f"z {z:+.2f} of {freedom} degrees; steps {seen}"

    def records(self) -> str:
        """At temperature 0 the tokens are the same, so that each record has its twin.

        `log q at α` is held against the mixture at the α that was recorded, and not at the oracle's: what is left is
        the models' and the mixture's rounding, without the solver's.
        """
        asked = [
            request
            for mixture in (Mixture(), Mixture("trust_region", epsilon=0.05), Mixture.teacher_only())
            for request in requests(64, mixture, temperature=0.0)
        ]
        found = []
        for k in (0, self.ks[-1]):
            with engine(self.pair, k) as backend:
                found.append(backend.generate(asked))
        same = [(one, other) for one, other in zip(*found) if one.completion_ids == other.completion_ids]
        apart = {name: max(largest(getattr(a, name), getattr(b, name)) for a, b in same) for name in RECORDS}
        lines = [f"{len(same)} of {len(asked)} equal, apart {show(apart)}"]
        for k, rollouts in zip((0, self.ks[-1]), found):
            lines.append(f"k={k} {show(self.errors(rollouts))}")
        print("\n".join(lines), flush=True)
        return "; ".join(lines)

    def errors(self, rollouts: list[Any]) -> dict[str, float]:
        """The largest errors of the records, and of log q at the α of the record."""
        worst: dict[str, float] = {}
        for one in rollouts:
            theta, teacher = self.oracle.logits(one.prompt_ids, one.completion_ids)
            alpha, log_q = reference(theta, teacher, one.mixture, 1.0)
            weight = one.alpha.double()[:, None]
            at = ((1 - weight) * theta.log_softmax(1) + weight * teacher.log_softmax(1)).log_softmax(1)
            drawn = torch.tensor(one.completion_ids)[:, None]
            expected = {
                "alpha": (one.alpha, alpha),
                "log_q": (one.log_q, log_q.gather(1, drawn)[:, 0]),
                "log q at α": (one.log_q, at.gather(1, drawn)[:, 0]),
                "log_theta": (one.log_theta, theta.log_softmax(1).gather(1, drawn)[:, 0]),
                "log_teacher": (one.log_teacher, teacher.log_softmax(1).gather(1, drawn)[:, 0]),
            }
            for name, (got, wanted) in expected.items():
                worst[name] = max(worst.get(name, 0.0), largest(got, wanted))
        return worst

    def trainers(self) -> str:
        """Three steps of each, half of GRPO's rows the student's own; the engine drafts and is reloaded."""
        found = []
        for kind in ("grpo", "raft"):
            with tempfile.TemporaryDirectory() as folder:
                found.append(f"{kind} {show(train(kind, Path(folder), self.ks[-1]))}")
                print(found[-1], flush=True)
        return "; ".join(found)


def train(kind: str, folder: Path, k: int) -> dict[str, float]:
    """The largest errors of the records of each batch, by the weights that sampled it."""
    pair = make_untrained_pair(folder)
    arguments = {"num_speculative_tokens": k, "dtype": "float32", "kv_cache_memory_bytes": 64 << 20}
    trainer = make_trainer(
        kind, pair, folder / "run", mixin=Watch, vllm_gpu_memory_utilization=0.1, use_cpu=not ON_A_GPU,
        generator={"theta_fraction": 0.5, "backend": "vllm", "engine_arguments": arguments | {"enforce_eager": True}},
    )  # fmt: skip
    trainer.train()
    teacher, theta, worst = load(pair[0]), load(pair[1]), dict.fromkeys(RECORDS, 0.0)
    assert len(trainer.generations) == 3
    for weights, (_, _, rollouts) in zip(trainer.weights, trainer.generations, strict=True):
        theta.load_state_dict({name: weight.cpu() for name, weight in weights.items()}, strict=False)
        for one in rollouts:
            errors = check_rollout(one, teacher, theta, tolerance=TOLERANCE)
            worst = {name: max(worst[name], errors[name]) for name in RECORDS}
    apart = [log.get("engine/log_theta_difference", 0.0) for log in trainer.state.log_history]
    trainer.vllm_generation.close()
    return worst | {"engine/log_theta_difference": max(apart)}


def largest(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).abs().max())


def show(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def main() -> None:
    steps = ("law", "kept", "greedy", "ends", "joins", "aborts", "changes", "records", "trainers")
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", nargs="+", choices=steps, default=steps)
    flags.add_argument("--sequences", type=int, default=100_000)
    flags.add_argument("--k", type=int, nargs="+", default=[1, 2, 3, 4])
    every = range(len(CASES))
    flags.add_argument("--cases", type=int, nargs="+", choices=every, default=[*every], help="of `law`, by number")
    flags.add_argument("--tokens", type=int, help="of a sequence of `law`; k + 2 if it is not given")
    flags.add_argument("--seed", type=int, default=0, help="of `law`'s engines")
    flags.add_argument("--pair", type=Path, default=demo.DEFAULT, help="folder of the demo's pair, made if missing")
    args = flags.parse_args()
    check = Check(demo.make_pair(args.pair), args)
    report = Report(budget=3600)
    for name in args.only:
        report.step(name, getattr(check, name))
    print(report.table())


if __name__ == "__main__":
    main()
