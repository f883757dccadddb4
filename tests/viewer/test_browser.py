"""The page of rollouts in a real browser.

The browser is driven over Chromium's own debugging pipe, so the tests press real keys and read the real DOM; where no
`chromium` is on the path they are skipped and say so.
"""

from __future__ import annotations

import json
import math
import re
import resource
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from helpers.browser import ARGUMENTS, CHROMIUM, Browser
from helpers.children import run
from helpers.pages import HOSTILE, byte_tokenizer, contrast, text_rollout
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.page import write_page
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no `chromium` on the path: the page is not seen by a browser"
)
ENDS = {
    ("ratio", False): ("rgb(179, 88, 6)", "rgb(33, 102, 172)"),
    ("ratio", True): ("rgb(253, 184, 99)", "rgb(146, 197, 222)"),
    ("alpha", False): ("rgb(255, 255, 217)", "rgb(8, 29, 88)"),
    ("alpha", True): ("rgb(27, 36, 48)", "rgb(255, 255, 217)"),
    ("weight", False): ("rgb(179, 88, 6)", "rgb(33, 102, 172)"),
    ("weight", True): ("rgb(253, 184, 99)", "rgb(146, 197, 222)"),
}
"""First and last colour of each scale, on a light page and on a dark one."""
LEGENDS = {
    "ratio": ["student −5.0", "+5.0 teacher, nats"],
    "alpha": ["α = 0", "1"],
    "weight": ["θ/q = 10.0", "0.10"],
}
WORDS = {
    **dict.fromkeys(["h1", ".summary", "#overview > summary", "footer"], "body"),
    **dict.fromkeys([".field > label", "fieldset legend", ".check", "#status", ".legend span"], ".bar"),
    **dict.fromkeys([".facts", ".facts b", "h2 a", "article summary span"], ".rollout"),
    **dict.fromkeys(["figcaption", "figcaption .key", ".figures svg text"], "figure"),
    **dict.fromkeys(["#tip p", "#tip th", "#tip td"], "#tip"),
    **{control: control for control in ("select", "[type=search]", "[type=reset]")},
}
"""Words, and the element whose ground they stand on."""
SIGNS = {
    **{control: ("borderTopColor", ".bar") for control in ("select", "[type=search]", "[type=reset]")},
    **{f"svg rect.{half}": ("fill", "figure") for half in ("student", "mixture")},
    ".linked": ("borderTopColor", ".rollout"),
}
"""What has to be seen, the property of its colour, and the element whose ground it stands on."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


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


def labels(browser: Browser) -> list[str]:
    """What the figures say to a reader who does not see them."""
    return browser.js("Array.from(document.querySelectorAll('.figures svg'), e => e.getAttribute('aria-label'))")


def halves(prompts: int, of_each: int) -> tuple[list[Rollout], list[float]]:
    """Completions of the student and of the mixture by turns, and their rewards: 1 for every fourth."""
    count = 2 * prompts * of_each
    encoded = [byte_tokenizer().encode(f"What is {prompt} + 48?") for prompt in range(prompts)]
    own = {"alpha": 0.0, "mixture": Mixture.theta_only()}
    rollouts = [
        text_rollout(
            f" 24 + {i}",
            **{"prompt_ids": encoded[i // (2 * of_each)], "theta_prompt_ids": encoded[i // (2 * of_each)]},
            **(own if i % 2 == 0 else {}),
        )
        for i in range(count)
    ]
    return rollouts, [float(i % 4 == 3) for i in range(count)]


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["ratio", "alpha", "weight"])
def test_colours_follow_a_record_and_their_text_is_readable(browser, tokenizer, tmp_path, name, dark):
    """One span per token with its text, a colour for each step of the record; text and ground at least 4.5 to 1."""
    ids = tokenizer.encode(" 24" * 21)
    place = torch.linspace(0, 1, len(ids))
    records = {"log_teacher": 10 * place - 7, "log_theta": torch.full((len(ids),), -2.0)}
    records["log_q"] = records["log_theta"] + 4.6 * (place - 0.5)
    shown = text_rollout(" 24" * 21, place.tolist(), **records)
    browser.open(write_page(tmp_path / "page.html", [shown], tokenizer), dark=dark)
    assert "".join(browser.texts(".token")) == " 24" * 21
    browser.set("colour", name)
    browser.click("fit")  # off: the fixed scale, whose ends these records reach
    style = "(s => [s.backgroundColor, s.color])(getComputedStyle(e))"
    styles = browser.js(f"Array.from(document.querySelectorAll('.token'), e => {style})")
    assert len({ground for ground, _ in styles}) == len(ids)
    assert all(contrast(ground, text) >= 4.5 for ground, text in styles)
    first, last = ENDS[name, dark]
    assert (styles[0][0], styles[-1][0]) == (first, last)
    assert browser.texts(".legend span") == LEGENDS[name]
    assert browser.problems() == []


@needs_browser
def test_a_fitted_scale_has_the_range_of_nearly_all_tokens_of_the_mixture(browser, tokenizer, tmp_path):
    """α from 0.3 to 0.4 and the student's 0: the lowest and the highest of the mixture get the ramp's ends."""
    ids = tokenizer.encode(" 24" * 21)
    alpha = torch.linspace(0.3, 0.4, len(ids)).tolist()
    own = text_rollout(" 24" * 21, 0.0, mixture=Mixture.theta_only())
    browser.open(write_page(tmp_path / "page.html", [text_rollout(" 24" * 21, alpha), own], tokenizer))
    browser.set("colour", "alpha")
    ground = "Array.from(document.querySelectorAll('{} .token'), e => getComputedStyle(e).backgroundColor)"
    mixed = browser.js(ground.format("#rollout-1"))
    assert (mixed[0], mixed[-1]) == ENDS["alpha", False]
    assert set(browser.js(ground.format("#rollout-2"))) == {mixed[0]}
    assert browser.texts(".legend span") == ["α = 0.3", "0.4"]
    assert "mean α 0.350" in browser.texts(".summary")[0]  # of the mixture's tokens alone


@needs_browser
def test_equal_values_have_one_colour_under_a_fitted_scale(browser, tokenizer, tmp_path):
    browser.open(write_page(tmp_path / "page.html", [text_rollout(" 24 + 48", 0.5)], tokenizer))
    for name in ("alpha", "ratio", "weight"):
        browser.set("colour", name)
        grounds = browser.js("Array.from(document.querySelectorAll('.token'), e => e.style.backgroundColor)")
        assert len(set(grounds)) == 1, name
    browser.set("colour", "alpha")
    assert browser.texts(".legend span") == ["α = 0.49", "0.51"]


@needs_browser
def test_line_breaks_are_marked_and_stay_outside_of_their_token(browser, tokenizer, tmp_path):
    """Otherwise the number of a token that breaks the line would stand on the next one."""
    text = "We\n add\n\n 24\t48\n"
    browser.open(write_page(tmp_path / "page.html", [text_rollout(text)], tokenizer))
    assert "".join(browser.texts(".token")) == "We↵ add↵↵ 24→\t48↵"
    assert browser.texts(".tokens") == ["We↵\n add↵\n↵\n 24→\t48↵\n"]


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast_is_that_of_wcag_aa(browser, tokenizer, tmp_path, dark):
    """4.5 to 1 for words, 3 to 1 for what has to be seen: borders of controls, bars, the mark of a link."""
    halves = [text_rollout(" 24"), text_rollout(" 48", 0.0, mixture=Mixture.theta_only())]
    shown = write_page(tmp_path / "page.html", halves, tokenizer, [1.0, 0.0], steps=[1, 2], advantages=[1.0, 0.0])
    browser.open(shown, dark=dark, fragment="rollout-1")
    browser.js("document.getElementById('filters').open = document.getElementById('overview').open = true")
    browser.js("document.querySelector('.token').focus()")
    style = "getComputedStyle(document.querySelector({!r})).{}"

    def ratio(selector: str, colour: str, ground: str) -> float:
        pair = browser.js(style.format(selector, colour)), browser.js(style.format(ground, "backgroundColor"))
        return contrast(*pair)

    for selector, ground in WORDS.items():
        assert ratio(selector, "color" if "svg" not in selector else "fill", ground) >= 4.5, selector
    for selector, (colour, ground) in SIGNS.items():
        assert ratio(selector, colour, ground) >= 3, selector
    words, page = (browser.js(style.format(*pair)) for pair in [("h1", "color"), ("body", "backgroundColor")])
    assert (sum(map(int, re.findall(r"\d+", words))) > sum(map(int, re.findall(r"\d+", page)))) is dark


@needs_browser
def test_hostile_text_is_shown_and_never_run(browser, tokenizer, tmp_path):
    """In completion, prompt, title and finish reason; the page's own check is that the title is still ours."""
    title = HOSTILE + "__DATA__ &amp;"
    hostile = tokenizer.encode(HOSTILE)
    shown = text_rollout(HOSTILE, prompt_ids=hostile, theta_prompt_ids=[0], finish_reason=HOSTILE)
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
    path = write_page(tmp_path / "page.html", [text_rollout(" 24")], tokenizer, title="ours")
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
    shown = text_rollout(text, 0.25, log_theta=torch.full((len(ids),), -math.inf))
    browser.open(write_page(tmp_path / "page.html", [shown, text_rollout(" 24")], tokenizer))
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
    browser.open(write_page(tmp_path / "page.html", [text_rollout(" 24 + 48", 0.75)], tokenizer))
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
    rollouts = [text_rollout(text, 1 - i / 120) for i, text in enumerate(texts)]
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
    browser.open(write_page(tmp_path / "page.html", [text_rollout(" 24", 0.25)], tokenizer))
    after = "getComputedStyle(document.querySelector('.token'), '::after').content"
    assert browser.js(after) == "none"
    browser.click("numbers")
    shown = {}
    for name in ("ratio", "alpha", "weight"):
        browser.set("colour", name)
        shown[name] = browser.js(after)
    assert shown == {"ratio": '"1.00"', "alpha": '"0.25"', "weight": '"0.61"'}  # the last is exp(-2 + 1.5)
    unnamed = "Array.from(document.querySelectorAll('input, select')).filter(e => !e.labels.length).length"
    assert browser.js(unnamed) == 0
    images = "Array.from(document.querySelectorAll('[role=img]'), e => e.getAttribute('aria-label'))"
    assert browser.js(images)[-1] == "Colour scale of θ/q, from θ/q = 1.6 to 0.61"
    assert browser.js("document.getElementById('reward-filter').hidden") is True  # no rewards, no filter of them


@needs_browser
def test_absent_numbers_empty_completions_and_odd_tokens(browser, tokenizer, tmp_path):
    """NaN is a dash and a pattern, an id without text its number, a character of several tokens whole."""
    emoji = tokenizer.encode("🙂日本")
    ids = [*emoji, len(tokenizer) + 5, tokenizer.eos_token_id]
    records = {name: torch.zeros(len(ids)) for name in RECORDS} | {"alpha": torch.full((len(ids),), math.nan)}
    odd = Rollout(**{**vars(text_rollout("")), **records, "completion_ids": ids})
    empty = text_rollout("", [])
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
    browser.open(write_page(tmp_path / "page.html", [text_rollout(" 24" * 2000)], tokenizer))
    assert browser.js("document.querySelectorAll('.token').length") == 1500
    browser.js("document.querySelector('.rollout button').click()")
    assert browser.js("document.querySelectorAll('.token').length") == len(ids)
    assert browser.js("Number(document.activeElement.dataset.i)") == 1500


@needs_browser
def test_steps_draw_alpha_over_training(browser, tokenizer, tmp_path):
    rollouts = [text_rollout(" 24 + 48", alpha) for alpha in (0.8, 0.6, 0.2)]
    browser.open(write_page(tmp_path / "page.html", rollouts, tokenizer, steps=[0, 0, 10]))
    assert labels(browser) == ["Mean α by step. Mixture’s: 0.70 at step 0, 0.20 at step 10"]
    assert browser.js("document.querySelectorAll('.figures circle').length") == 2
    browser.open(write_page(tmp_path / "page.html", [rollouts[0]], tokenizer))
    assert browser.js("document.getElementById('overview').hidden") is True


@needs_browser
def test_halves_of_a_prompt_stand_side_by_side(browser, tokenizer, tmp_path):
    """Two prompts with two completions of each half; their rewards, advantages and means stand with them."""
    rollouts, rewards = halves(prompts=2, of_each=2)
    browser.open(
        write_page(tmp_path / "page.html", rollouts, tokenizer, rewards, advantages=[1.5 * r for r in rewards])
    )
    assert browser.texts(".group > .facts h2") == ["Prompt 1", "Prompt 2"]
    headings = ["Student’s own · 2 · mean reward 0.00", "Mixture’s · 2 · mean reward 0.50"]
    assert browser.texts(".group h3") == headings * 2
    assert browser.texts(".group:first-child .mixture h2") == ["Rollout 2", "Rollout 4"]
    assert browser.texts("#rollout-4 .facts b") == ["1", "1.50", "0.500", str(len(rollouts[3].completion_ids))]
    boxes = "Array.from(document.querySelectorAll('.group:first-child section'), e => e.getBoundingClientRect().{})"
    (top, same), (left, right) = (browser.js(boxes.format(side)) for side in ("top", "left"))
    assert top == same
    assert left < right
    assert browser.fill("view", "list").startswith("Page 1 of 1 · 8 rollouts")
    assert first_texts(browser) == list(range(1, 9))
    assert browser.fill("half", "student").startswith("Page 1 of 1 · 4 of 8 rollouts")
    assert browser.problems() == []


@needs_browser
def test_pages_of_prompts_hold_whole_prompts_and_a_long_half_is_shown_in_parts(browser, tokenizer, tmp_path):
    rollouts, rewards = halves(prompts=3, of_each=20)
    browser.open(write_page(tmp_path / "page.html", rollouts, tokenizer, rewards))
    assert browser.js("document.getElementById('status').textContent") == "Page 1 of 3 · 120 rollouts"
    assert len(browser.texts(".mixture .rollout")) == 8
    assert browser.texts(".mixture button") == ["Show 12 more of 12"]
    browser.js("document.querySelector('.mixture button').click()")
    assert len(browser.texts(".mixture .rollout")) == 20
    assert browser.js("document.activeElement.id") == "rollout-18"  # the ninth of the mixture's
    assert browser.js("document.querySelector('.mixture button').hidden") is True


@needs_browser
def test_a_link_leads_to_its_rollout(browser, tokenizer, tmp_path):
    """On another page, behind the button of a long half, and past a filter that hides it."""
    rollouts, rewards = halves(prompts=3, of_each=20)
    path = write_page(tmp_path / "page.html", rollouts, tokenizer, rewards)
    browser.open(path, fragment="rollout-119")
    assert browser.texts(".linked h2") == ["Rollout 119"]
    top = browser.js("document.querySelector('.linked').getBoundingClientRect().top")
    assert browser.js("document.querySelector('.bar').offsetHeight") <= top < 900
    assert browser.js("document.activeElement.id") == "rollout-119"
    assert browser.js("document.getElementById('status').textContent") == "Page 3 of 3 · 120 rollouts"
    assert browser.js("document.querySelector('#rollout-120 h2 a').hash") == "#rollout-120"
    browser.js("document.querySelector('#rollout-120 h2 a').click()")
    browser.wait("document.querySelector('.linked').id === 'rollout-120'")
    browser.fill("reward-min", "1")
    browser.js("location.hash = 'rollout-1'")
    browser.wait("document.querySelector('.linked')?.id === 'rollout-1'")
    assert browser.js("document.getElementById('reward-min').value") == ""
    browser.open(path, fragment="rollout-0")  # there is none
    assert browser.js("document.querySelectorAll('.linked').length") == 0
    assert browser.problems() == []


@needs_browser
def test_slider_walks_the_training_steps(browser, tokenizer, tmp_path):
    """All steps at its left end; the figures follow it."""
    rollouts, rewards = halves(prompts=2, of_each=2)
    path = write_page(tmp_path / "page.html", rollouts, tokenizer, rewards, steps=[10] * 4 + [25] * 4)
    browser.open(path)
    step = "(e => [e.max, e.getAttribute('aria-valuetext')])(document.getElementById('step'))"
    assert browser.js(step) == ["2", "all steps"]
    rewarded = "Histogram of rewards. Student’s own {0} completions, mean 0.00. Mixture’s {0} completions, mean 0.50"
    assert labels(browser) == [
        rewarded.format(4),
        "Mean reward by step. Student’s own: 0.00 at step 10, 0.00 at step 25. "
        "Mixture’s: 0.50 at step 10, 0.50 at step 25",
        "Mean α by step. Mixture’s: 0.50 at step 10, 0.50 at step 25",
    ]
    assert browser.fill("step", "2") == "Page 1 of 1 · 4 of 8 rollouts"
    assert browser.js(step)[1] == "step 25"
    assert browser.texts("output") == ["25"]
    assert labels(browser)[0] == rewarded.format(2)
    assert browser.js("document.querySelector('.now').getAttribute('visibility')") == "visible"


@needs_browser
def test_histogram_has_a_bar_for_each_reward_or_equal_widths(browser, tokenizer, tmp_path):
    bars = "Array.from(document.querySelectorAll('.figures rect'), e => Number(e.getAttribute('height')))"
    few = [text_rollout(" 24") for _ in range(4)]
    browser.open(write_page(tmp_path / "page.html", few, tokenizer, [0.0, 0.5, 0.5, math.inf]))
    low, high = browser.js(bars)
    assert high == pytest.approx(2 * low)
    many = [text_rollout(" 24") for _ in range(24)]
    browser.open(write_page(tmp_path / "page.html", many, tokenizer, [i / 10 for i in range(24)]))
    assert browser.js(bars) == [pytest.approx(browser.js(bars)[0])] * 12


@needs_browser
def test_preferred_tokens_of_both_models_are_shown(browser, tokenizer, tmp_path):
    """Under the records, likeliest first; the token that was drawn is marked."""
    drawn, other, third = (tokenizer.encode(text)[0] for text in (" 24", "We", "?"))
    one = text_rollout(tokenizer.decode([drawn]))
    dense = SimpleNamespace(
        ids=torch.tensor([[drawn, other, other, third]]),
        log_theta=torch.tensor([[0.1, 0.6, 0.6, 0.3]]).log(),
        log_teacher=torch.tensor([[0.9, 0.02, 0.02, 0.0]]).log(),
    )
    with_dense: Any = SimpleNamespace(**vars(one), dense=dense)
    browser.open(write_page(tmp_path / "page.html", [with_dense], tokenizer))
    browser.js("document.querySelector('.token').focus()")
    quoted = {token: json.dumps(tokenizer.decode([token])) for token in (drawn, other, third)}
    assert browser.texts("#tip .likely th") == ["Student prefers", "Teacher prefers"]
    assert browser.texts("#tip .likely tbody tr") == [
        f"{quoted[other]}0.600{quoted[drawn]}0.900",
        f"{quoted[third]}0.300{quoted[other]}0.020",
        f"{quoted[drawn]}0.100",
    ]
    assert browser.texts("#tip .taken code") == [quoted[drawn]] * 2
    assert browser.problems() == []


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(390, 844), (360, 740)])
def test_a_phone_shows_the_first_rollout_on_its_first_screen(browser, tokenizer, tmp_path, width, height):
    """Its whole card, and nothing wider than the screen."""
    rollouts, rewards = halves(prompts=2, of_each=2)
    path = write_page(
        tmp_path / "page.html", rollouts, tokenizer, rewards, "Sorting ten digits: rollouts", steps=[1] * 4 + [2] * 4
    )
    browser.resize(width, height)
    try:
        browser.open(path)
        assert browser.js("document.querySelector('#rollout-1').getBoundingClientRect().bottom") < height
        assert browser.js("document.documentElement.scrollWidth") == width
        browser.js("document.getElementById('overview').open = document.getElementById('filters').open = true")
        assert browser.js("document.documentElement.scrollWidth") == width
        browser.js("document.querySelector('.token').focus()")
        assert browser.js("document.documentElement.scrollWidth") == width
    finally:
        browser.resize()


@needs_browser
def test_tokens_are_built_when_they_come_near(browser, tokenizer, tmp_path):
    """Until then their rollout is its plain text, which the browser's search finds."""
    text = "We add 24 and 48.\n"
    browser.open(write_page(tmp_path / "page.html", [text_rollout(text * 20) for _ in range(40)], tokenizer))
    last = "document.querySelector('#rollout-40 .tokens')"
    assert browser.js(f"{last}.children.length") == 0
    assert browser.js(f"{last}.textContent") == text.replace("\n", "↵\n") * 20
    browser.js(f"{last}.scrollIntoView()")
    browser.wait(f"{last}.children.length > 0")
    assert browser.js(f"{last}.textContent") == text.replace("\n", "↵\n") * 20
    assert browser.js(f"{last}.getAttribute('role')") == "listbox"


@needs_browser
def test_colours_follow_the_theme_while_the_page_is_open(browser, tokenizer, tmp_path):
    browser.open(write_page(tmp_path / "page.html", [text_rollout(" 24", 0.0)], tokenizer))
    browser.set("colour", "alpha")
    browser.click("fit")
    ground = "getComputedStyle(document.querySelector('.token')).backgroundColor"
    assert browser.js(ground) == ENDS["alpha", False][0]
    browser.theme(dark=True)
    browser.wait(f"{ground} === {ENDS['alpha', True][0]!r}")


@needs_browser
def test_ten_thousand_rollouts_load(browser, tokenizer, tmp_path):
    """600 000 tokens: one dump of the DOM in a minute of the processor's work, a filter in five seconds."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(tokenizer), (10_000, 60), generator=generator)
    records = {name: torch.rand(10_000, 60, generator=generator) for name in RECORDS}
    template = vars(text_rollout(" 24"))
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
    assert len(re.findall(r'<article class="rollout"', dom)) == 50
    built = len(re.findall(r'class="token[^"]*"[^>]*style="background-color: rgb\(', dom))
    assert 8 * 60 <= built < 50 * 60  # those near the screen

    browser.open(path)
    start = browser.spent()
    assert browser.fill("reward-min", "9990").endswith("10 of 10,000 rollouts")
    assert browser.spent() - start < 5
