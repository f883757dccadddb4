"""The page of rollouts as a file; `viewer/test_browser.py` looks at it in a browser."""

from __future__ import annotations

import json
import os
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from helpers.pages import HOSTILE, byte_tokenizer, text_rollout
from optimal_sampling_trl import page
from optimal_sampling_trl.page import render_page, write_page


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def test_file_is_self_contained_and_replaced_at_once(tokenizer, tmp_path):
    path = write_page(tmp_path / "new" / "folder" / "page.html", [text_rollout(HOSTILE)], tokenizer)
    text = path.read_text("utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", text)
    data = text.split('id="data">')[1].split("</script>")[0]
    assert "<" not in data
    assert "".join(json.loads(data)["pieces"][str(i)] for i in tokenizer.encode(HOSTILE)) == HOSTILE
    write_page(path, [text_rollout(" 24")], tokenizer, title="second")
    assert "<title>second</title>" in path.read_text("utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_failed_write_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = write_page(tmp_path / "page.html", [text_rollout(" 24")], tokenizer)
    before = path.read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_page(path, [text_rollout(" 48")], tokenizer)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_rendered_page_is_what_is_written(tokenizer, tmp_path):
    shown, title = [text_rollout(" 24")], "__DATA__ & <b>"
    text = render_page(shown, tokenizer, [1.0], title)
    assert write_page(tmp_path / "page.html", shown, tokenizer, [1.0], title).read_text("utf-8") == text
    assert "<title>__DATA__ &amp; &lt;b&gt;</title>" in text


def test_page_file_names_every_script_of_the_viewer():
    """A script that stands in the folder and in no page would be dead."""
    folder = page.importlib.resources.files("optimal_sampling_trl").joinpath("viewer")
    scripts = {each.name.removesuffix(".js") for each in folder.iterdir() if each.name.endswith(".js")}
    assert set(page.SCRIPTS) == scripts


def test_errors_say_what_to_do(tokenizer, tmp_path, monkeypatch):
    path, one = tmp_path / "page.html", text_rollout(" 24")
    with pytest.raises(ValueError, match="no rollouts; a page needs at least one"):
        write_page(path, [], tokenizer)
    with pytest.raises(ValueError, match="rewards has 2 entries for 1 rollouts; pass one per rollout"):
        write_page(path, [one], tokenizer, [1.0, 2.0])
    with pytest.raises(ValueError, match="steps has 0 entries for 1 rollouts"):
        write_page(path, [one], tokenizer, steps=[])
    with pytest.raises(ValueError, match=r"advantages has 2 entries.*\(None where there is no advantage\)"):
        write_page(path, [one], tokenizer, advantages=[0.5, 0.5])
    wrong = SimpleNamespace(**{**vars(one), "log_q": torch.zeros(9)})
    with pytest.raises(ValueError, match=r"rollout 1: log_q has shape \(9,\), its completion \d tokens"):
        write_page(path, [one, wrong], tokenizer)
    monkeypatch.setattr(page, "LARGEST_PAGE", 100)
    with pytest.raises(ValueError, match="a page can hold 100; pass fewer rollouts"):
        write_page(path, [one], tokenizer)
    assert not path.exists()
