"""How many tokens to draft: by the batch, by the drafts that are kept, and by the sizes of both models."""

from __future__ import annotations

import random

import pytest
from transformers import Qwen2Config

from optimal_sampling_trl.backends.vllm.draft_counts import PRIOR, DraftCounts, Size, size_of, speed

TEACHER, THETA = Size(28, 7.6e9, 2), Size(28, 1.5e9, 2)
COUNTS = (0, 1, 3)


def chosen(batch: int, share: float, theta: Size = THETA) -> int:
    """The number of drafts where a share of very many drafts was kept."""
    return DraftCounts(COUNTS, TEACHER, theta, share * 1e9, 1e9).choose(batch)


def test_fewer_drafts_where_more_sequences_or_fewer_are_kept() -> None:
    for share in (0.3, 0.6, 0.8, 0.95):
        found = [chosen(batch, share) for batch in (1, 8, 32, 64, 128, 256, 1024)]
        assert found == sorted(found, reverse=True)
    for batch in (1, 32, 128):
        found = [chosen(batch, share) for share in (0.05, 0.3, 0.6, 0.8, 0.95)]
        assert found == sorted(found)
    assert chosen(1, 0.9) == 3
    assert chosen(1, 0.05) == chosen(1024, 0.9) == 0


def test_a_student_as_large_as_its_teacher_drafts_in_vain() -> None:
    assert chosen(1, 0.5, theta=TEACHER) == 0


def test_the_number_is_the_fastest_or_none() -> None:
    source = random.Random(0)
    for _ in range(200):
        batch, share = source.randint(1, 512), source.random() * 0.98
        speeds = {count: speed(count, batch, share, TEACHER, THETA) for count in COUNTS}
        count = chosen(batch, share)
        assert speeds[count] >= speeds[0]
        assert count == 0 or speeds[count] == max(speeds.values())


def test_the_share_is_that_of_the_drafts_that_are_kept() -> None:
    """Drafts behind one that is not kept were not tried."""
    source, counts = random.Random(0), DraftCounts(COUNTS, TEACHER, THETA)
    assert counts.share == pytest.approx(PRIOR)
    for share in (0.3, 0.9):
        for _ in range(600):
            drafted = counts.choose(8)
            for _ in range(8):
                kept = next((index for index in range(drafted) if source.random() > share), drafted)
                if drafted:
                    counts.see(drafted, kept)
        assert counts.share == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9])
def test_it_is_hardly_ever_slower_than_without(batch: int, share: float) -> None:
    """By the time that is reckoned: what is tried in vain at first, and from time to time, costs less than 3 %."""
    source, counts, tokens, seconds = random.Random(0), DraftCounts(COUNTS, TEACHER, THETA), 0, 0.0
    for _ in range(400):
        drafted = counts.choose(batch)
        kept = [next((i for i in range(drafted) if source.random() > share), drafted) for _ in range(batch)]
        seconds += sum(0.5**index for index in range(drafted + 1)) / speed(drafted, batch, 0.5, TEACHER, THETA)
        tokens += batch + sum(kept)
        for each in kept if drafted else ():
            counts.see(drafted, each)
    assert tokens / seconds / batch > 0.97 * speed(0, batch, share, TEACHER, THETA)


def test_what_was_seen_is_forgotten() -> None:
    counts = DraftCounts(COUNTS, TEACHER, THETA)
    counts.see(3, 0)
    counts.choose(256)
    counts.forget()
    assert counts == DraftCounts(COUNTS, TEACHER, THETA)


def test_drafts_are_tried_again() -> None:
    """Where none are kept there are none, but for a try from time to time: other mixtures may be asked for since."""
    counts, tries = DraftCounts(COUNTS, TEACHER, THETA), 0
    for _ in range(2000):
        if drafted := counts.choose(64):
            tries += 1
            for _ in range(64):
                counts.see(drafted, 0)
    assert 1 < tries < 40


def test_sizes_are_read_from_a_configuration() -> None:
    config = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1000,
    )  # fmt: skip
    attention = 64 * 16 * (4 + 2 + 2 + 4)
    assert size_of(config, 2) == Size(3, 3 * (attention + 3 * 64 * 128) + 64 * 1000, 2)
