"""The page of rollouts in a real browser, and the figure of a run.

The browser is driven over Chromium's own debugging pipe, so the tests press real keys and read the real DOM; where no
`chromium` is on the path they are skipped and say so.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.browser import ARGUMENTS, CHROMIUM, Browser
from helpers.children import run
from optimal_sampling_trl import page
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.page import write_page
from optimal_sampling_trl.plots import plot_learning
from optimal_sampling_trl.rollouts.rollout import Rollout

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no `chromium` on the path: the page is not seen by a browser"
)
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!--"
CORPUS = ["We add 24 and 48.\nThe answer is 72.", "What is 24 + 48?", "Be brief."]


# ---- what the tests show ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that the emoji and the kanji of a test take several tokens each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def rollout(
    tokenizer: PreTrainedTokenizerFast, text: str, alpha: float | list[float] = 0.5, **changes: Any
) -> Rollout:
    """A rollout of `text`, all of its tokens with the same α or with the α of a list, log θ = -2, log t = -1."""
    ids = tokenizer.encode(text)
    prompt = tokenizer.encode("What is 24 + 48?")
    weights = torch.tensor(alpha) if isinstance(alpha, list) else torch.full((len(ids),), alpha)
    fields: dict[str, Any] = {
        "prompt_ids": prompt,
        "theta_prompt_ids": prompt,
        "completion_ids": ids,
        "alpha": weights,
        "log_q": torch.full((len(ids),), -1.5),
        "log_theta": torch.full((len(ids),), -2.0),
        "log_teacher": torch.full((len(ids),), -1.0),
        "text": text,
        "finish_reason": "stop",
        "mixture": Mixture(),
        "temperature": 1.0,
    }
    return Rollout(**{**fields, **changes})


# ---- the browser --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Chromium may still write while it ends: what is left of its folder is the system's to clean.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(folder)
        yield browser
        browser.close()


def first_texts(browser: Browser) -> list[int]:
    """Numbers of the rollouts on the page, in their order."""
    return [int(title.removeprefix("Rollout ")) for title in browser.texts(".rollout h2")]


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance of `rgb(r, g, b)`."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# ---- the page in the browser --------------------------------------------------------------------------------------
@needs_browser
def test_tokens_are_rendered_with_colours_that_darken_with_alpha(browser, tokenizer, tmp_path):
    """One span per token with its text; darker at every step of α; text and ground at least 4.5 to 1."""
    ids = tokenizer.encode(" 24" * 21)
    alpha = [i / (len(ids) - 1) for i in range(len(ids))]
    browser.open(write_page(tmp_path / "page.html", [rollout(tokenizer, " 24" * 21, alpha)], tokenizer))
    assert "".join(browser.texts(".token")) == " 24" * 21
    style = "(s => [s.backgroundColor, s.color])(getComputedStyle(e))"
    styles = browser.js(f"Array.from(document.querySelectorAll('.token'), e => {style})")
    assert len(styles) == len(ids)
    grounds = [luminance(ground) for ground, _ in styles]
    assert all(low > high for low, high in itertools.pairwise(grounds))
    assert styles[0][0] == "rgb(255, 255, 217)"
    assert styles[-1][0] == "rgb(8, 29, 88)"
    for ground, text in styles:
        dark, light = sorted([luminance(ground), luminance(text)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert browser.texts(".legend span") == ["α = 0 student", "α = 1 teacher"]
    assert browser.problems() == []


@needs_browser
def test_line_breaks_are_marked_and_stay_outside_of_their_token(browser, tokenizer, tmp_path):
    """Otherwise the number of a token that breaks the line would stand on the next one."""
    text = "We\n add\n\n 24\t48\n"
    browser.open(write_page(tmp_path / "page.html", [rollout(tokenizer, text)], tokenizer))
    assert "".join(browser.texts(".token")) == "We↵ add↵↵ 24→\t48↵"
    assert browser.texts(".tokens") == ["We↵\n add↵\n↵\n 24→\t48↵\n"]


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_are_readable_in_light_and_dark(browser, tokenizer, tmp_path, dark):
    browser.open(write_page(tmp_path / "page.html", [rollout(tokenizer, " 24")], tokenizer, [1.0]), dark=dark)
    style = "getComputedStyle(document.querySelector('{}')).{}"
    for selector, ground in [("h1", "body"), (".facts b", ".rollout"), (".facts", ".rollout"), ("label.tiny", ".bar")]:
        pair = [luminance(browser.js(style.format(selector, "color")))]
        pair.append(luminance(browser.js(style.format(ground, "backgroundColor"))))
        assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5, selector
        assert (pair[0] > pair[1]) is dark


@needs_browser
def test_hostile_text_is_shown_and_never_run(browser, tokenizer, tmp_path):
    """In completion, prompt, title and finish reason; the page's own check is that the title is still ours."""
    title = HOSTILE + "__DATA__ &amp;"
    hostile = tokenizer.encode(HOSTILE)
    shown = rollout(tokenizer, HOSTILE, prompt_ids=hostile, theta_prompt_ids=[0], finish_reason=HOSTILE)
    path = write_page(tmp_path / "page.html", [shown], tokenizer, title=title)
    browser.open(path)
    assert "".join(browser.texts(".token")) == HOSTILE
    assert browser.texts("details pre")[0] == HOSTILE
    assert browser.texts("h1") == [title]
    assert browser.js("document.title") == title
    assert browser.js("document.querySelectorAll('img').length") == 0
    assert browser.js("document.scripts.length") == 2  # the data and ours
    assert browser.problems() == []


@needs_browser
def test_policy_stops_a_script_that_got_into_the_page(browser, tokenizer, tmp_path):
    """The second wall: markup spliced into the file does not run, and loads nothing."""
    path = write_page(tmp_path / "page.html", [rollout(tokenizer, " 24")], tokenizer, title="ours")
    path.write_text(path.read_text("utf-8").replace("<h1>", HOSTILE + "--><h1>"), "utf-8")
    browser.open(path)
    assert browser.js("document.title") == "ours"
    assert len(browser.texts(".token")) == len(tokenizer.encode(" 24"))
    requests = {e["params"]["requestId"] for e in browser.problems() if e["method"] == "Network.requestWillBeSent"}
    failures = [event["params"] for event in browser.events if event["method"] == "Network.loadingFailed"]
    assert requests == {failure["requestId"] for failure in failures if failure.get("blockedReason") == "csp"}


@needs_browser
def test_keyboard_walks_the_tokens_and_shows_their_records(browser, tokenizer, tmp_path):
    text = "We add 24 and 48.\nThe answer is 72."
    ids = tokenizer.encode(text)
    shown = rollout(tokenizer, text, 0.25, log_theta=torch.full((len(ids),), -math.inf))
    browser.open(write_page(tmp_path / "page.html", [shown, rollout(tokenizer, " 24")], tokenizer))
    browser.js("document.querySelector('summary').focus()")
    browser.press("Tab")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"):
        browser.press(key)
    tip = browser.js("document.getElementById('tip').innerText")
    assert f"id {ids[2]} · token 3 of {len(ids)}\n" in tip
    assert "α = 0.2500" in tip
    assert json.dumps(tokenizer.decode([ids[2]])) in tip
    rows = browser.texts("#tip tbody tr")
    assert rows == ["θ student−∞0.0000", "t teacher−1.00000.3679", "q mixture−1.50000.2231"]
    browser.press("Escape")
    assert browser.js("document.getElementById('tip').hidden") is True

    where = "[document.activeElement.dataset.i, document.activeElement.parentElement.dataset.rollout].map(Number)"
    browser.press("End")
    assert browser.js(where) == [len(ids) - 1, 0]
    browser.press("ArrowUp")
    line = ids.index(tokenizer.encode("\n")[0])
    assert browser.js(where)[0] <= line  # the line above is the one that the newline ends
    browser.press("Home")
    assert browser.js(where) == [0, 0]
    browser.press("ArrowLeft")
    assert browser.js(where) == [0, 0]
    browser.press("Tab")
    browser.press("Tab")
    assert browser.js(where) == [0, 1]  # one stop per rollout: past the next prompt comes the next rollout


@needs_browser
def test_hover_shows_the_records(browser, tokenizer, tmp_path):
    browser.open(write_page(tmp_path / "page.html", [rollout(tokenizer, " 24 + 48", 0.75)], tokenizer))
    middle = "(b => [b.x + b.width / 2, b.y + b.height / 2])"
    box = browser.js(f"{middle}(document.querySelectorAll('.token')[1].getBoundingClientRect())")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert "token 2 of" in browser.js("document.getElementById('tip').innerText")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=5)
    assert browser.js("document.getElementById('tip').hidden") is True


@needs_browser
def test_filters_sorts_and_pages(browser, tokenizer, tmp_path):
    """120 rollouts, rewards 0 to 119 with one absent, mean α falling, every tenth with a word of its own."""
    texts = [" 24" * (1 + i % 7) + (" answer" if i % 10 == 0 else "") for i in range(120)]
    rollouts = [rollout(tokenizer, text, 1 - i / 120) for i, text in enumerate(texts)]
    rewards = [math.nan if i == 60 else float(i) for i in range(120)]
    browser.open(write_page(tmp_path / "page.html", rollouts, tokenizer, rewards))
    assert first_texts(browser) == list(range(1, 51))
    browser.js("document.getElementById('next').click(); document.getElementById('next').click()")
    assert first_texts(browser) == list(range(101, 121))
    assert browser.js("document.getElementById('next').disabled") is True

    assert browser.fill("reward-min", "55") == "Page 1 of 2 · 64 of 120 rollouts"  # 55 to 119 without the absent one
    assert browser.fill("reward-max", "64") == "Page 1 of 1 · 9 of 120 rollouts"
    assert browser.fill("reward-min", "").startswith("Page 1 of 2 · 64 of")
    browser.fill("reward-max", "")
    assert browser.fill("alpha-min", "0.5").endswith("61 of 120 rollouts")
    assert browser.fill("alpha-max", "0.5").endswith("1 of 120 rollouts")
    browser.fill("alpha-min", "")
    browser.fill("alpha-max", "")
    assert browser.fill("text", "ANSWER").endswith("12 of 120 rollouts")
    assert browser.fill("text", "no such text").endswith("0 of 120 rollouts")
    assert browser.texts(".none")[0].startswith("No rollout passes")
    browser.fill("text", "")

    browser.fill("sort", "reward")
    browser.fill("direction", "-1")
    assert first_texts(browser)[:3] == [120, 119, 118]
    browser.fill("sort", "mean")
    assert first_texts(browser)[:3] == [1, 2, 3]
    browser.fill("direction", "1")
    assert first_texts(browser)[:3] == [120, 119, 118]
    browser.fill("sort", "length")
    lengths = [len(tokenizer.encode(texts[i - 1])) for i in first_texts(browser)]
    assert lengths == sorted(lengths)
    browser.fill("sort", "reward")
    browser.js("document.getElementById('next').click(); document.getElementById('next').click()")
    assert first_texts(browser)[-1] == 61  # the absent reward comes last
    browser.js("document.querySelector('[type=reset]').click()")
    browser.wait("document.getElementById('status').textContent === 'Page 1 of 3 · 120 rollouts'")
    assert browser.problems() == []


@needs_browser
def test_numbers_can_stand_beside_the_colours_and_every_control_has_a_name(browser, tokenizer, tmp_path):
    browser.open(write_page(tmp_path / "page.html", [rollout(tokenizer, " 24", 0.25)], tokenizer))
    after = "getComputedStyle(document.querySelector('.token'), '::after').content"
    assert browser.js(after) == "none"
    browser.js("document.getElementById('numbers').click()")
    assert browser.js(after) == '"0.25"'
    unnamed = "Array.from(document.querySelectorAll('input, select')).filter(e => !e.labels.length).length"
    assert browser.js(unnamed) == 0
    assert browser.js("document.getElementById('reward-filter').hidden") is True  # no rewards, no filter of them


@needs_browser
def test_absent_numbers_empty_completions_and_odd_tokens(browser, tokenizer, tmp_path):
    """NaN is a dash and a pattern, an id without text its number, a character of several tokens whole."""
    emoji = tokenizer.encode("🙂日本")
    ids = [*emoji, len(tokenizer) + 5, tokenizer.eos_token_id]
    records = {name: torch.zeros(len(ids)) for name in page.RECORDS} | {"alpha": torch.full((len(ids),), math.nan)}
    odd = Rollout(**{**vars(rollout(tokenizer, "")), **records, "completion_ids": ids})
    empty = rollout(tokenizer, "", [])
    browser.open(write_page(tmp_path / "page.html", [odd, empty], tokenizer, [None, 1.0]))
    shown = browser.texts(".token")
    assert "".join(shown).replace("‥", "") == f"🙂日本⟨{len(tokenizer) + 5}⟩<|end|>"
    assert len(shown) == len(ids)
    assert browser.js("document.querySelectorAll('.token.unknown').length") == len(ids)
    assert "mean α –" in browser.texts(".facts")[0]
    assert browser.texts(".rollout .tiny") == ["No tokens were generated."]
    assert browser.problems() == []


@needs_browser
def test_long_rollouts_are_built_in_two_goes(browser, tokenizer, tmp_path):
    ids = tokenizer.encode(" 24" * 2000)
    assert len(ids) > 1500
    browser.open(write_page(tmp_path / "page.html", [rollout(tokenizer, " 24" * 2000)], tokenizer))
    assert browser.js("document.querySelectorAll('.token').length") == 1500
    browser.js("document.querySelector('.rollout button').click()")
    assert browser.js("document.querySelectorAll('.token').length") == len(ids)
    assert browser.js("Number(document.activeElement.dataset.i)") == 1500


@needs_browser
def test_steps_draw_alpha_over_training(browser, tokenizer, tmp_path):
    rollouts = [rollout(tokenizer, " 24 + 48", alpha) for alpha in (0.8, 0.6, 0.2)]
    browser.open(write_page(tmp_path / "page.html", rollouts, tokenizer, steps=[0, 0, 10]))
    label = browser.js("document.querySelector('#chart svg').getAttribute('aria-label')")
    assert label == "Mean α: 0.70 at step 0, 0.20 at step 10"
    assert browser.js("document.querySelectorAll('#chart circle').length") == 2
    browser.open(write_page(tmp_path / "page.html", rollouts, tokenizer))
    assert browser.js("document.getElementById('chart').hidden") is True


@needs_browser
def test_ten_thousand_rollouts_load(browser, tokenizer, tmp_path):
    """600 000 tokens: one dump of the DOM in a minute of the processor's work, a filter in five seconds."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(tokenizer), (10_000, 60), generator=generator)
    records = {name: torch.rand(10_000, 60, generator=generator) for name in page.RECORDS}
    template = vars(rollout(tokenizer, " 24"))
    rollouts = [
        Rollout(**{**template, "completion_ids": row.tolist(), **{name: r[i] for name, r in records.items()}})
        for i, row in enumerate(ids)
    ]
    path = write_page(tmp_path / "page.html", rollouts, tokenizer, [float(i) for i in range(10_000)])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [str(CHROMIUM), *ARGUMENTS, f"--user-data-dir={folder}", "--dump-dom", path.as_uri()]
        begin = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(command)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert used.ru_utime + used.ru_stime - begin.ru_utime - begin.ru_stime < 60
    dom = done.stdout
    assert "Page 1 of 200 · 10,000 rollouts" in dom
    assert len(re.findall(r'class="token[^"]*"[^>]*style="background-color: rgb\(', dom)) == 50 * 60

    browser.open(path)
    start = browser.spent()
    assert browser.fill("reward-min", "9990").endswith("10 of 10,000 rollouts")
    assert browser.spent() - start < 5


# ---- the file, without a browser ----------------------------------------------------------------------------------
def test_file_is_self_contained_and_replaced_at_once(tokenizer, tmp_path):
    path = write_page(tmp_path / "new" / "folder" / "page.html", [rollout(tokenizer, HOSTILE)], tokenizer)
    text = path.read_text("utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", text)
    data = text.split('id="data">')[1].split("</script>")[0]
    assert "<" not in data
    assert "".join(json.loads(data)["pieces"][str(i)] for i in tokenizer.encode(HOSTILE)) == HOSTILE
    write_page(path, [rollout(tokenizer, " 24")], tokenizer, title="second")
    assert "<title>second</title>" in path.read_text("utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_failed_write_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = write_page(tmp_path / "page.html", [rollout(tokenizer, " 24")], tokenizer)
    before = path.read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_page(path, [rollout(tokenizer, " 48")], tokenizer)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_have_four_digits(tokenizer, tmp_path):
    ids = tokenizer.encode(" 24 + 48 = 72")
    alpha = torch.tensor([0.123456, -1e-9, math.nan, math.inf] + [0.5] * (len(ids) - 4))
    path = write_page(tmp_path / "page.html", [rollout(tokenizer, " 24 + 48 = 72", alpha.tolist())], tokenizer)
    data = json.loads(path.read_text("utf-8").split('id="data">')[1].split("</script>")[0])
    assert data["rollouts"][0]["alpha"][:4] == [0.1235, 0.0, None, "inf"]


def test_a_first_token_keeps_its_space(tokenizer):
    """SentencePiece drops it in `decode`; the page must not."""
    sentencepiece = SimpleNamespace(decode=lambda ids, **_: "".join([" a"] * len(ids)).removeprefix(" "))
    assert page._piece(sentencepiece, 7) == " a"
    assert page._piece(tokenizer, tokenizer.encode(" 24")[0]) == tokenizer.decode(tokenizer.encode(" 24")[:1])


def test_the_page_holds_the_acceptance_of_each_rollout(tokenizer, tmp_path):
    """Mean of min(1, θ/q): θ/q is exp(-0.5) at each token, or above 1; at temperature 0 there is none."""
    rollouts = [rollout(tokenizer, "We add"), rollout(tokenizer, "We add", temperature=0.0)]
    rollouts.append(rollout(tokenizer, "We add", log_q=torch.full((len(rollouts[0].completion_ids),), -3.0)))
    written = write_page(tmp_path / "page.html", rollouts, tokenizer).read_text()
    data = json.loads(re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', written, re.S)[1])
    assert [row["acceptance"] for row in data["rollouts"]] == [pytest.approx(0.6065), None, 1.0]


def test_errors_say_what_to_do(tokenizer, tmp_path, monkeypatch):
    path, one = tmp_path / "page.html", rollout(tokenizer, " 24")
    with pytest.raises(ValueError, match="no rollouts; a page needs at least one"):
        write_page(path, [], tokenizer)
    with pytest.raises(ValueError, match="rewards has 2 entries for 1 rollouts; pass one per rollout"):
        write_page(path, [one], tokenizer, [1.0, 2.0])
    with pytest.raises(ValueError, match="steps has 0 entries for 1 rollouts"):
        write_page(path, [one], tokenizer, steps=[])
    wrong = SimpleNamespace(**{**vars(one), "log_q": torch.zeros(9)})
    with pytest.raises(ValueError, match=r"rollout 1: log_q has shape \(9,\), its completion \d tokens"):
        write_page(path, [one, wrong], tokenizer)
    monkeypatch.setattr(page, "LARGEST_PAGE", 100)
    with pytest.raises(ValueError, match="a page can hold 100; pass fewer rollouts"):
        write_page(path, [one], tokenizer)
    assert not path.exists()


# ---- the figure ---------------------------------------------------------------------------------------------------
CURVES = {"GRPO": [(0, 0.1), (100, 0.3)], "mixture": [(0, 0.1), (50, math.nan), (100, 0.6)]}


def test_figure_is_a_png_and_leaves_matplotlib_alone(tmp_path):
    code = (
        "import sys, matplotlib\n"
        "from optimal_sampling_trl.plots import plot_learning\n"
        f"plot_learning({str(tmp_path / 'a' / 'learn.png')!r}, {{'GRPO': [(0, .1), (1, .2)]}}, [(0, .5), (1, .4)],"
        " [(0, .2, .9), (1, .1, .8)])\n"
        "assert 'matplotlib.pyplot' not in sys.modules and matplotlib.get_backend() == 'svg'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "MPLBACKEND": "svg"})
    assert (tmp_path / "a" / "learn.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert plot_learning(tmp_path / "one.png", CURVES).stat().st_size > 1000


def test_figure_errors_say_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "learn.png"
    with pytest.raises(ValueError, match="no curves; pass at least one"):
        plot_learning(path, {})
    with pytest.raises(ValueError, match="curve 'GRPO' has no points"):
        plot_learning(path, {"GRPO": []})
    with pytest.raises(ValueError, match="alpha_band: point 0 has 2 numbers, wanted 3"):
        plot_learning(path, CURVES, [(0, 0.5)], [(0, 0.5)])
    with pytest.raises(ValueError, match="pass the mean as well"):
        plot_learning(path, CURVES, alpha_band=[(0, 0.1, 0.2)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'optimal-sampling-trl\[plots\]'"):
        plot_learning(path, CURVES)
    assert not path.exists()
