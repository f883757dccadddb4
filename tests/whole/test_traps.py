"""Each function that steps round a trap in vLLM says in five words what it is, and when it can be deleted."""

from __future__ import annotations

import ast
import re

import pytest

from helpers.paths import ROOT, TESTS

ROOM = ROOT / "optimal_sampling_trl" / "backends" / "vllm"
WORDS = ("Symptom", "Cause", "Safe", "Upstream", "Delete when")
TRAPS = {
    "bind_attention",
    "build_submodel",
    "convolve_by_torch",
    "copy_cache_config",
    "_draw",
    "_run_in_turn",
    "clean_caches",
    "draft_with_theta",
    "forget",
    "forget_dead_groups",
    "answer_for_replicas",
    "generators_of_kept_rows",
    "keep_generators",
    "keep_parallel_groups",
    "keep_rows",
    "load_copies",
    "lost_weights",
    "make_expert_group",
    "prepare_attn",
    "private_blocks",
    "protect_default_group",
    "quiet_reload",
    "read_positions_of_text",
    "read_query_scale",
    "repack_experts",
    "repack_tied_head",
    "rotate_every_head",
    "run_hooks_of_teachers",
    "share_layers",
    "share_seeds",
    "sleep",
    "start_new_graph_pool",
    "tell_counts",
    "unpack_convolutions",
    "use_common_blocks",
    "use_own_window",
    "use_workspace",
}
"""The functions. One that is deleted with its trap leaves this list; a new trap joins it."""


def docstrings() -> dict[str, str]:
    """The docstring of each function of the room that has one of the words."""
    found = {}
    for path in sorted(ROOM.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if any(f"\n{word}:" in text for word in WORDS):
                    found[node.name] = text
    return found


def test_the_traps_are_all_there() -> None:
    assert set(docstrings()) == TRAPS


@pytest.mark.parametrize("name", sorted(TRAPS))
def test_a_trap_says_all_five(name: str) -> None:
    text = docstrings()[name]
    parts = re.split(rf"^({'|'.join(WORDS)}): ", text, flags=re.MULTILINE)[1:]
    assert tuple(parts[::2]) == WORDS, f"{name} says {parts[::2]}, wanted {WORDS}"
    for word, said in zip(parts[::2], parts[1::2], strict=True):
        first = said.split("\n\n")[0].strip()
        assert len(first) > 10, f"{name} says nothing for {word}"
        assert first.endswith("."), f"{name}: {word} is no whole sentence: {first!r}"


def test_what_would_show_that_a_trap_is_gone_exists() -> None:
    """A test, or a file of tests, that is named under "Delete when"."""
    tests = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    for name, text in docstrings().items():
        end = text.split("Delete when:")[1]
        for test in re.findall(r"\btest_\w+(?!\.py)\b", re.sub(r"tests/\S+\.py", "", end)):
            assert f"def {test}(" in tests, f"{name} names {test}, which is no test any more"
        for file in re.findall(r"tests/\S+\.py", end):
            assert (ROOT / file).exists(), f"{name} names {file}, which does not exist"
