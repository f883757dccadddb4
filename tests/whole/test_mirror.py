"""The tests mirror the package: a module's test has its name and its folder, or stands here with the reason.

`mixture/solver.py` is tested by `tests/mixture/test_solver.py`; a folder's `__init__.py` that defines something, such
as `backends/__init__.py`, by `tests/backends/test_backends.py`.
"""

from __future__ import annotations

import ast
from pathlib import Path

from helpers.paths import ROOT, TESTS

PACKAGE = ROOT / "optimal_sampling_trl"
ELSEWHERE = {
    "__init__.py": ("whole/test_rooms.py", "loads a name when it is first used"),
    "backends/vllm/__init__.py": ("test_generate.py", "a share of memory is refused on transformers"),
    "backends/transformers/decoding.py": ("backends/transformers/test_backend.py", "the rows of its batches"),
    "backends/transformers/dense.py": ("backends/transformers/test_backend.py", "dense records of its batches"),
    "backends/vllm/blocks.py": ("backends/vllm/worker/test_shift.py", "blocks below the student's stream"),
    "backends/vllm/hooks.py": ("backends/vllm/test_limits.py", "what vLLM sets for an architecture"),
    "backends/vllm/plugin.py": ("whole/test_upstream_vllm.py", "vLLM calls it by name"),
    "backends/vllm/requests.py": ("backends/vllm/test_backend.py", "each live batch goes in and out by it"),
    "backends/vllm/versions.py": ("backends/vllm/test_limits.py", "a version that was never run is refused"),
    "backends/vllm/server/client.py": ("backends/vllm/server/test_server.py", "the trainer's side of the server"),
    "backends/vllm/server/messages.py": ("backends/vllm/server/test_server.py", "every request over HTTP goes by it"),
    "backends/vllm/server/serve.py": ("backends/vllm/server/test_server.py", "the server's command"),
    "backends/vllm/worker/convolutions.py": ("backends/vllm/worker/test_hybrid.py", "the pair of LFM2"),
    "backends/vllm/worker/dense.py": ("backends/vllm/test_backend.py", "dense records of live rows"),
    "backends/vllm/worker/grammar.py": (
        "backends/vllm/worker/test_row_sampler.py",
        "the rows of a step with a grammar",
    ),
    "backends/vllm/worker/incoming.py": ("backends/vllm/worker/test_weights.py", "sets of weights, whole or not"),
    "backends/vllm/worker/submodels.py": ("backends/vllm/test_families.py", "both models of every family in one"),
    "backends/vllm/worker/model.py": ("backends/vllm/test_families.py", "both models of every family in one"),
    "backends/vllm/worker/positions.py": ("backends/vllm/test_families.py", "angles and scales by position"),
    "backends/vllm/worker/records.py": ("backends/vllm/test_backend.py", "records of live rows"),
    "backends/vllm/worker/slot_sampler.py": ("backends/vllm/test_gpu.py", "vLLM's runner on GPUs has slots"),
    "backends/vllm/worker/speculator.py": ("backends/vllm/test_gpu.py", "live engines whose student drafts"),
    "backends/vllm/worker/transfer.py": ("backends/vllm/server/test_server.py", "weights that a trainer sends"),
    **{
        f"cli/commands/{name}.py": ("cli/test_main.py", "each command by its words")
        for name in ("demo", "env", "page", "probe", "serve")
    },
    **{
        f"cli/commands/{name}.py": ("recipes/test_starters.py", "the recipe of its name runs it")
        for name in ("distill", "grpo", "raft", "rloo", "sample")
    },
    "demo/arm.py": ("recipes/test_starters.py", "one run of the demo"),
    "demo/pair.py": ("recipes/test_pair.py", "the pair that the recipes and tests use"),
    "demo/run.py": ("recipes/test_starters.py", "the demo as a whole"),
    "demo/workers.py": ("recipes/test_starters.py", "the demo's runs side by side"),
    "mixture/kernels/average.py": ("mixture/test_kernels.py", "the arithmetic form in those tests"),
    "mixture/kernels/blend.py": ("mixture/test_kernels.py", "the kernels as a whole against the reference"),
    "mixture/kernels/dense.py": ("mixture/test_kernels.py", "the kernels of dense records against the reference"),
    "mixture/kernels/layout.py": ("mixture/test_kernels.py", "the kernels as a whole against the reference"),
    "mixture/kernels/likeliest.py": ("mixture/test_kernels.py", "as a part of dense records"),
    "mixture/kernels/nodes.py": ("mixture/test_kernels.py", "the kernels as a whole against the reference"),
    "mixture/kernels/scalars.py": ("mixture/test_kernels.py", "as a part of dense records"),
    "mixture/kernels/steps.py": ("mixture/test_kernels.py", "the kernels as a whole against the reference"),
    "mixture/kernels/sums.py": ("mixture/test_kernels.py", "the kernels as a whole against the reference"),
    "mixture/kernels/swap.py": ("mixture/test_kernels.py", "the method `top_k_swap` in those tests"),
    "mixture/kernels/launch.py": ("mixture/test_kernels.py", "compiled or interpreted, in a process of its own"),
    "pairing/pair.py": ("pairing/test_pairing.py", "what two models must share"),
    "pairing/prompts.py": ("pairing/test_pairing.py", "the prompts of a pair"),
    "pairing/source.py": ("pairing/test_pairing.py", "a model's files as they are named"),
    "panels.py": ("test_plots.py", "what every figure is made of"),
    "rollouts/card.py": ("test_sampling_run.py", "the card of a finished folder"),
    "rollouts/folder.py": ("test_sampling_run.py", "shards are written by a run"),
    "rollouts/progress.py": ("test_sampling_run.py", "the bar of a run"),
    "rollouts/request.py": ("whole/test_bad_inputs.py", "what a request refuses"),
    "trainers/batch_metrics.py": ("trainers/test_mixture_trainer.py", "what every batch of a trainer logs"),
    "trainers/columns.py": ("trainers/test_records.py", "the columns of every batch, by their names"),
    "trainers/grpo.py": ("trainers/test_policy_gradient.py", "what it shares with RLOO"),
    "trainers/rloo.py": ("trainers/test_policy_gradient.py", "what it shares with GRPO"),
    "trainers/engines/base.py": ("trainers/engines/test_colocated.py", "what the engines of a trainer share"),
    "trainers/engines/live.py": ("trainers/test_records.py", "the student itself samples"),
    "trainers/trl_divergence.py": ("trainers/test_gradients.py", "the divergence with weights against float64"),
    "trainers/engines/seam.py": ("trainers/engines/test_colocated.py", "live and colocated engines in a trainer"),
    "trainers/engines/server.py": ("backends/vllm/server/test_server.py", "trainers with a server"),
}
"""Modules without a test of their name: the file below `tests/` that tests each, and what is tested there."""
OTHERS = {
    "backends/vllm/test_gpu.py": "the fused engine on a GPU; skipped without one",
    "backends/vllm/test_neighbours.py": "engines in one process, and a training job's group",
    "backends/vllm/worker/test_schedule.py": "vLLM's scheduler: prefix cache, chunked prefill, preemption",
    "backends/vllm/server/test_server.py": "the folder as a whole, from outside",
    "mixture/test_kernels.py": "the folder `kernels` as a whole",
    "pairing/test_pairing.py": "the folder as a whole",
    "viewer/test_browser.py": "the page in a real browser: its HTML, CSS and JavaScript",
    "trainers/test_signatures.py": "the arguments of the trainers against TRL's",
    "trainers/test_gradients.py": "every loss and correction against float64",
    "trainers/test_training.py": "whole trainings: the score rises, two processes",
    "trainers/engines/test_colocated.py": "three trainers on the fused engine",
}
"""Tests in a mirrored folder that are named by no module, and what they are about."""


def defines(path: Path) -> set[str]:
    """The names of a module's functions, classes and constants."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names - {"__all__"}


def modules() -> dict[str, str]:
    """Each module of the package that defines something, and the test of its name, both by their path."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if path.stem != "__init__":
            found[str(name)] = str(name.with_name(f"test_{name.name}"))
        elif defines(path):
            found[str(name)] = str(name.with_name(f"test_{path.parent.name}.py"))
    return found


def test_every_module_has_a_test() -> None:
    missing = {
        module: test for module, test in modules().items() if not (TESTS / test).exists() and module not in ELSEWHERE
    }
    assert not missing, f"Write tests/<file>, or say in ELSEWHERE which file tests the module and why: {missing}"


def test_no_entry_is_out_of_date() -> None:
    known = modules()
    gone = sorted(module for module in ELSEWHERE if module not in known)
    assert not gone, f"These entries of ELSEWHERE are of no module that defines something. Delete them: {gone}"
    named = {module: known[module] for module in ELSEWHERE if (TESTS / known[module]).exists()}
    assert not named, f"These modules have a test of their name. Delete their entries of ELSEWHERE: {named}"


def test_the_files_named_are_there() -> None:
    gone = sorted({test for test, _ in ELSEWHERE.values() if not (TESTS / test).exists()})
    assert not gone, f"ELSEWHERE names files that are not in tests/ any more: {gone}"
    wordless = sorted(module for module, (_, reason) in ELSEWHERE.items() if not reason)
    assert not wordless, f"Say in ELSEWHERE what is tested there of {wordless}"


def test_every_test_is_named_by_a_module() -> None:
    mirrored = [
        path for path in TESTS.rglob("test_*.py") if path.relative_to(TESTS).parts[0] not in ("whole", "recipes")
    ]
    tests = {str(path.relative_to(TESTS)) for path in mirrored}
    extra = sorted(tests - set(modules().values()) - set(OTHERS))
    assert not extra, f"Name each by the module it tests, or say in OTHERS what it is about: {extra}"
    gone = sorted(set(OTHERS) - tests)
    assert not gone, f"These entries of OTHERS name no test. Delete them: {gone}"
