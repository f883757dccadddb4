"""The fused engine on a GPU: Model Runner V2, every mode of CUDA graphs, the student's own prompt, reloads, sleep."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from helpers.engines import NOISE, runner_of, start
from helpers.models import make_model, make_tokenizer
from helpers.oracle import expected_records, on_the_edge, with_wishes
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.pairing import Ending
from optimal_sampling_trl.rollouts.request import Request, Sampling
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Model Runner V2 needs a GPU"),
]
GRAPHS = {
    "eager": {"enforce_eager": True},
    "piecewise": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "full": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL"}},
    "full_decode": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}},
    "full_and_piecewise": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
}
MIXTURES = (
    Mixture(),
    Mixture.theta_only(),
    Mixture("trust_region", epsilon=0.02),
    Mixture("ess_balance"),
    Mixture.teacher_only(),
    Mixture("entropy", alpha_min=0.2),
    Mixture("fixed", fixed_alpha=0.3),
    Mixture(form="arithmetic"),
    Mixture("trust_region", epsilon=0.02, form="arithmetic"),
    Mixture("fixed", fixed_alpha=0.3, form="arithmetic"),
    Mixture("entropy_gate", entropy_scale=8.0, form="arithmetic"),
    Mixture("top_k_swap", swap_top_k=1),
    Mixture("top_k_swap", swap_top_k=3),
)
SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A teacher with other widths, depths, heads and padding of the vocabulary than its student."""
    root = tmp_path_factory.mktemp("gpu")
    sizes = {"hidden": 512, "layers": 4, "heads": 8, "kv_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024}
    teacher = make_model(root / "teacher", "qwen2", 0, **sizes)
    theta = {"hidden": 256, "layers": 3, "heads": 2, "kv_heads": 1, "tied": True, "max_position_embeddings": 1024}
    return teacher, make_model(root / "theta", "qwen2", 1, **theta)


class Judge:
    """Both models in float32, rounded to the engine's type first."""

    def __init__(self, pair: tuple[str, str], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.teacher, self.theta = (
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").float().cuda().eval()
            for path in pair
        )

    def check(self, rollouts: Sequence[Rollout], what: str = "", records: Sequence[str] = RECORDS) -> None:
        """Every token of every rollout: the mean and the largest error of each record."""
        errors: dict[str, list[torch.Tensor]] = {name: [] for name in records}
        mean, worst = NOISE[self.dtype]
        for rollout in rollouts:
            models = self.teacher, self.theta, Ending((256,), ())
            expected, _ = expected_records(rollout, *models)
            clear = ~on_the_edge(rollout, *models, tolerance=4 * mean)
            for name in records:
                error = (getattr(rollout, name).double() - expected[name].cpu()).abs()
                errors[name].append(error[clear] if name in ("alpha", "log_q") else error)
        table = {name: torch.cat(parts) for name, parts in errors.items()}
        print(
            f"{what} {str(self.dtype)[6:]}, {len(table['alpha'])} tokens:",
            {name: f"mean {error.mean():.1e}, worst {error.max():.1e}" for name, error in table.items()},
        )
        for name, error in table.items():
            assert float(error.mean()) < mean, f"{name}: {what}"
            assert float(error.max()) < worst, f"{name}: {what}"


def counter(backend: Any, name: str) -> int:
    return sum(getattr(metric, "value", 0) for metric in backend.llm.get_metrics() if metric.name == f"vllm:{name}")


def engine(pair: tuple[str, str], dtype: torch.dtype = torch.bfloat16, **arguments: Any) -> Any:
    given = dict(arguments)
    if "compilation_config" in given:
        given["compilation_config"] = {**given["compilation_config"], "cudagraph_capture_sizes": SIZES}
    settings = {
        "dtype": str(dtype)[6:],
        "max_model_len": 512,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 1 << 30,
        "gpu_memory_utilization": 0.1,
    }
    return start(*pair, **settings | given)


def requests(two_prompts: bool, count: int = 24, seed: int = 3, max_tokens: int = 48) -> list[Request]:
    """Prompts of 60 to 140 tokens, two after each other the same; of two prompts either is the shorter one."""
    letters, tokenizer = random.Random(seed), make_tokenizer()
    asked = []
    for index in range(count):
        if index % 2 == 0:
            texts = [
                "".join(letters.choice("abcdefgh ") for _ in range(letters.randint(*r))) for r in ((60, 140), (5, 60))
            ]
            prompt, own = (list(tokenizer(text)["input_ids"]) for text in texts)
            if two_prompts and index % 6 == 4:
                prompt, own = own, prompt
        sampling = Sampling(
            max_tokens=max_tokens, ignore_eos=True, seed=seed + index, temperature=(1.0, 0.7)[index % 3 == 2]
        )
        asked.append(Request(prompt, own if two_prompts else prompt, MIXTURES[index % len(MIXTURES)], sampling))
    return asked


DRAFTS = {"drafts_0": 0, "drafts_3": 3, "drafts_auto": "auto"}
"""Tokens that the student drafts at a time; 0 is an engine without speculation, and `auto` one that chooses."""
LIVE = [(d, g, "drafts_0") for d in ("bfloat16", "float32") for g in GRAPHS]
LIVE += [(d, g, "drafts_3") for d in ("bfloat16", "float32") for g in ("eager", "full", "full_and_piecewise")]
LIVE += [("bfloat16", "full_and_piecewise", "drafts_auto")]


@pytest.fixture(scope="module", params=LIVE, ids="-".join)
def live(request: pytest.FixtureRequest, pair: tuple[str, str]) -> Iterator[tuple[Any, Judge]]:
    name, graphs, drafts = request.param
    dtype = getattr(torch, name)
    backend = engine(pair, dtype, num_speculative_tokens=DRAFTS[drafts], **GRAPHS[graphs])
    yield backend, Judge(pair, dtype)
    backend.close()


@pytest.mark.parametrize("prompts", ["one_prompt", "two_prompts"])
def test_every_token(live: tuple[Any, Judge], prompts: str) -> None:
    """Prefill in chunks beside decoding, hits of the prefix cache, batches of all sizes."""
    backend, judge = live
    runner = runner_of(backend)
    groups = sorted({group.backend.get_name() for group in runner.attn_groups[0]})
    print(type(runner).__module__, groups, "second stream:", runner.model.side_stream is not None)
    for seed in (3, 50):
        rollouts = backend.generate(requests(prompts == "two_prompts", seed=seed))
        judge.check(rollouts, prompts)
    if prompts == "two_prompts":  # that the bound can fail: a student that had read the teacher's prompt
        with pytest.raises(AssertionError, match="the teacher's prompt"):
            judge.check([replace(one, theta_prompt_ids=one.prompt_ids) for one in rollouts], "the teacher's prompt")


def test_short_prompts(live: tuple[Any, Judge]) -> None:
    """Whole prompts in one graph, which was captured with fewer tokens of each request."""
    backend, judge = live
    asked = [
        replace(one, prompt_ids=one.prompt_ids[: 5 + index], theta_prompt_ids=one.prompt_ids[: 5 + index])
        for index, one in enumerate(requests(False, 3))
    ]
    judge.check(backend.generate(asked), "short prompts")


def test_settings_in_one_batch(live: tuple[Any, Judge]) -> None:
    """Truncation and penalties of the mixture, beside requests without."""
    from helpers.oracle import check_rollouts

    backend, judge = live
    has_drafts = runner_of(backend).speculator is not None
    further = ({"top_k": 20}, {"top_p": 0.7}, {"min_p": 0.1}, {"repetition_penalty": 1.4}, {})
    further = tuple({} if has_drafts and "min_p" in one else one for one in further)
    asked = [
        Request(one.prompt_ids, one.theta_prompt_ids, one.mixture, Sampling(max_tokens=8, seed=i, **further[i % 5]))
        for i, one in enumerate(requests(False, 20))
    ]
    asked = with_wishes(asked)
    rollouts = backend.generate(asked)
    if judge.dtype == torch.float32:  # in bfloat16 a token on the edge of a truncation may fall on either side
        check_rollouts(rollouts, asked, judge.teacher, judge.theta, tolerance=NOISE[torch.float32][1])


@pytest.mark.parametrize("prompts", ["one_prompt", "two_prompts"])
def test_the_student_alone(live: tuple[Any, Judge], prompts: str) -> None:
    """In graphs of its own, before and after batches of both models, whose prompts it cached without the teacher."""
    backend, judge = live
    model, steps = runner_of(backend).model, []
    mixed = requests(prompts == "two_prompts")
    both = [replace(one, mixture=Mixture.theta_only()) for one in mixed]
    alone = [replace(one, needs_teacher=False) for one in both]
    # Where a graph is replayed it is not called.
    handle = model.teacher.register_forward_pre_hook(lambda *_: steps.append(1))
    try:
        found = [backend.generate(alone)]
        seen = len(steps)
        judge.check(backend.generate(mixed), f"{prompts}, after the student alone")
        with_it = backend.generate(both)
        found.append(backend.generate(alone))
    finally:
        handle.remove()
    for rollouts in found:
        judge.check(rollouts, f"{prompts}, the student alone", RECORDS[:-1])
        assert all(bool(one.log_teacher.isnan().all()) for one in rollouts)
    judge.check(with_it, f"{prompts}, the student beside the teacher")
    equal = sum(one.completion_ids == other.completion_ids for one, other in zip(found[1], with_it))
    print(f"{equal} of {len(with_it)} completions are those beside the teacher")
    if runner_of(backend).speculator is None:
        assert seen == 0
    assert equal > 0.9 * len(with_it) or judge.dtype == torch.bfloat16  # whose rounding another kernel may change


def test_reload(live: tuple[Any, Judge]) -> None:
    """Right after each of three reloads, also for prompts that were cached; the storages stay."""
    backend, judge = live
    model = runner_of(backend).model
    before = {name: weight.data_ptr() for name, weight in model.theta.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for weight in judge.theta.parameters():
                weight.add_(torch.randn_like(weight) * 0.02)
                weight.copy_(weight.to(judge.dtype))
        backend.load_theta(list(judge.theta.named_parameters()))
        judge.check(backend.generate(requests(False)), "after a reload")
    assert {name: weight.data_ptr() for name, weight in model.theta.named_parameters()} == before


@pytest.fixture(scope="module", params=DRAFTS)
def short_of_memory(request: pytest.FixtureRequest, pair: tuple[str, str]) -> Iterator[Any]:
    further = {"num_gpu_blocks_override": 60, "disable_log_stats": False, **GRAPHS["full_and_piecewise"]}
    backend = engine(pair, num_speculative_tokens=DRAFTS[request.param], **further)
    yield backend
    backend.close()


@pytest.mark.parametrize("prompts", ["one_prompt", "two_prompts"])
def test_preemption(short_of_memory: Any, judge: Judge, prompts: str) -> None:
    before = counter(short_of_memory, "num_preemptions")
    rollouts = short_of_memory.generate(requests(prompts == "two_prompts", 24, max_tokens=150))
    count = counter(short_of_memory, "num_preemptions") - before
    print(f"{count} preemptions")
    assert count > 0
    judge.check(rollouts, f"{prompts}, preempted")


@pytest.fixture(scope="module", params=DRAFTS)
def default(
    request: pytest.FixtureRequest, pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """An engine with vLLM's own choice of graphs, which counts and sleeps; its cache was empty.

    A mode of graphs in place of drafts: the student is its own teacher. All engines that sleep come from here, since
    vLLM allows a process one at a time, and pytest closes it before the next.
    """
    from vllm import envs

    drafts = {"enforce_eager": False, "num_speculative_tokens": DRAFTS.get(request.param)}
    models, further = (("student", pair[1]), GRAPHS[request.param]) if request.param in GRAPHS else (pair, drafts)
    envs.disable_envs_cache()  # vLLM reads its variables once for all, when the first engine of a process starts
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        backend = engine(models, enable_sleep_mode=True, disable_log_stats=False, **further)
        yield backend
        backend.close()


@pytest.fixture(scope="module")
def judge(pair: tuple[str, str]) -> Judge:
    return Judge(pair, torch.bfloat16)


def test_compiled_code_has_a_key_for_each_model(default: Any) -> None:
    """See `model._build`: with one key for both, the student would run the teacher's code."""
    kept = sorted(Path(os.environ["VLLM_CACHE_ROOT"]).glob("torch_compile_cache/torch_aot_compile/*"))
    print("compiled:", [path.name[:12] for path in kept])
    assert len(kept) == 2


def test_a_group_shares_its_prompts(default: Any, judge: Judge) -> None:
    """n samples of one pair of prompts: blocks are shared, and each completion's records stay its own."""
    before = counter(default, "prefix_cache_hits")
    for length in range(20, 60, 7):  # other remainders of the shift
        first = requests(True, 2, seed=length)[0]
        own = first.theta_prompt_ids[: max(length % 16, 3)]
        samplings = [Sampling(max_tokens=40, ignore_eos=True, seed=i) for i in range(8)]
        asked = [Request(first.prompt_ids, own, Mixture(), sampling) for sampling in samplings]
        judge.check(default.generate(asked), f"group, {len(first.prompt_ids)} and {len(own)} tokens")
    hits = counter(default, "prefix_cache_hits") - before
    print(f"{hits} tokens from the cache")
    assert hits > 0


def test_sleep_keeps_the_teacher(default: Any, judge: Judge) -> None:
    before = default.generate(requests(False))
    free = torch.cuda.mem_get_info()[0]
    default.sleep()
    freed = torch.cuda.mem_get_info()[0] - free
    default.wake_up()
    after = default.generate(requests(False))
    print(f"sleep freed {freed / 2**20:.0f} MiB")
    assert freed > 0
    judge.check(after, "after sleep")
    assert [one.completion_ids for one in before] == [one.completion_ids for one in after]


def test_many_reloads_leak_nothing(default: Any, judge: Judge) -> None:
    weights = [(name, weight.to(torch.bfloat16)) for name, weight in judge.theta.named_parameters()]
    used = []
    for count in (20, 200):
        for _ in range(count):
            default.load_theta(weights)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
        print(f"{count} reloads: {used[-1] / 2**20:.1f} MiB")
    assert used[1] <= used[0]
    judge.check(default.generate(requests(False)), "after 220 reloads")


def test_nan_is_named(default: Any, judge: Judge) -> None:
    good = [(name, weight.to(torch.bfloat16)) for name, weight in judge.theta.named_parameters()]
    bad = [(name, weight * float("nan") if "layers.1.mlp.down" in name else weight) for name, weight in good]
    default.load_theta(bad)
    with pytest.raises(ValueError, match="NaN"):
        default.generate(requests(False, 4))
    default.load_theta(good)
    judge.check(default.generate(requests(False)), "after NaN")


def test_no_step_waits_for_the_host(default: Any) -> None:
    assert_no_synchronisation(default, (True, False))


def assert_no_synchronisation(backend: Any, kinds: Sequence[bool]) -> None:
    """torch warns of each synchronisation; none may come from this package while steps run."""
    for two_prompts in kinds:
        backend.generate(with_wishes(requests(two_prompts)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for two_prompts in kinds:
                backend.generate(with_wishes(requests(two_prompts)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = {f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)}
    print("synchronisations at", sorted(place.split("/vllm/")[-1] for place in places))
    assert not [place for place in places if "optimal_sampling_trl" in place]


def test_one_of_two_engines_is_closed(default: Any, pair: tuple[str, str], judge: Judge) -> None:
    """The other goes on (`keep_parallel_groups`), and a third captures graphs after that (`start_new_graph_pool`)."""
    for _ in range(2):
        other = engine(pair, **GRAPHS["full"])
        judge.check(other.generate(requests(False, 4)), "beside another engine")
        other.close()
        judge.check(default.generate(requests(False, 4)), "after another engine was closed")


def test_folded_endings_wait_for_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    """A teacher with an ending of its own, as Qwen3 has beside Qwen3-Base: no copy from the host in a step."""
    teacher = shutil.copytree(pair[0], tmp_path / "teacher")
    GenerationConfig(eos_token_id=[256, 5]).save_pretrained(teacher)
    backend = engine((str(teacher), pair[1]), enforce_eager=True)
    try:
        assert backend.pair.ending == Ending((256,), (5,))
        assert_no_synchronisation(backend, (False,))
    finally:
        backend.close()


def test_a_quantised_teacher(pair: tuple[str, str], judge: Judge) -> None:
    """FP8 for the teacher's weights alone: the student's and both caches stay bfloat16."""
    backend = engine(pair, quantization="fp8", **GRAPHS["full_and_piecewise"])
    try:
        runner = runner_of(backend)
        model = runner.model
        types = {role: {str(p.dtype) for p in getattr(model, role).parameters()} for role in ("teacher", "theta")}
        caches = {str(cache.dtype) for cache in runner.kv_caches}
        print(types, caches)
        assert "torch.float8_e4m3fn" in types["teacher"]
        assert types["theta"] == {"torch.bfloat16"}
        assert caches == {"torch.bfloat16"}
        rollouts = backend.generate(requests(False))
        for rollout in rollouts:
            expected, _ = expected_records(rollout, judge.teacher, judge.theta, Ending((256,), ()))
            error = (rollout.log_theta - expected["log_theta"].cpu()).abs()
            assert float(error.max()) < NOISE[torch.bfloat16][1]
    finally:
        backend.close()


@pytest.mark.parametrize("default", ["eager", "full_and_piecewise"], indirect=True)
def test_the_student_as_its_own_teacher(default: Any, pair: tuple[str, str]) -> None:
    """The weights are in memory once, each model reads its own prompt, a reload reaches both, and both sleep."""
    judge = Judge((pair[1], pair[1]), torch.bfloat16)
    judge.teacher = judge.theta
    model = runner_of(default).model
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in model.theta.parameters())
    judge.check(default.generate(requests(True)), "one model")
    with torch.no_grad():
        for weight in judge.theta.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
            weight.copy_(weight.to(torch.bfloat16))
    default.load_theta([(name, weight.to(torch.bfloat16)) for name, weight in judge.theta.named_parameters()])
    judge.check(default.generate(requests(True, seed=9)), "one model, reloaded")
    default.sleep()
    default.wake_up()
    judge.check(default.generate(requests(True, seed=10)), "one model, after sleep")
