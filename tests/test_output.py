"""The output of the front door: its text in a terminal, and its page in a notebook and in a file."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.models import make_tokenizer
from helpers.rollouts import rollout
from optimal_sampling_trl import OptimalSamplingOutput, output

TOKENIZER = make_tokenizer()


def made(count: int = 2) -> OptimalSamplingOutput:
    return OptimalSamplingOutput.of([rollout(text="<b>3 + 4</b>" * 30) for _ in range(count)], TOKENIZER)


def test_its_text_is_short() -> None:
    """However many tokens there are: α is a record for each of them."""
    text = repr(made(500))
    numbers = "500 rollouts, 1500 tokens, α 0.500 (0.000 to 1.000)"
    assert text.startswith(f"OptimalSamplingOutput({numbers}, first '<b>3 + 4</b>")
    assert len(text) < 180
    empty = OptimalSamplingOutput([], [], [], None, [])
    assert repr(empty) == "OptimalSamplingOutput(0 rollouts, 0 tokens)"
    assert empty._repr_html_() is None


def test_a_file_is_the_page(tmp_path: Path) -> None:
    path = made().to_html(tmp_path / "made" / "page.html", rewards=[1, 0], title="Two")
    page = path.read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["rollouts"]) == 2
    assert "<title>Two</title>" in page
    with pytest.raises(ValueError, match="has no `tokenizer`; wanted the pair's"):
        replace(made(), tokenizer=None).to_html(tmp_path / "none.html")


def test_a_notebook_shows_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a frame, of which no quote ends the attribute, and of few rollouts, since the notebook's file keeps it."""
    frame = made()._repr_html_()
    assert frame is not None
    source = frame.removeprefix('<iframe srcdoc="').split('" sandbox="allow-scripts"')[0]
    assert '"' not in source
    assert html.unescape(source) == made().to_html(tmp_path / "page.html").read_text()
    monkeypatch.setattr(output, "MOST_IN_A_CELL", 3)
    assert "The first 3 of 5 rollouts" in str(made(5)._repr_html_())
