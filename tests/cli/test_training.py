"""The commands that train: rewards and the way back into a run, as flags say them."""

from __future__ import annotations

from pathlib import Path

import pytest
from trl import TrlParser

from optimal_sampling_trl import GRPOConfig
from optimal_sampling_trl.cli.training import Job, RewardArguments, checkpoint


def test_resuming_as_a_flag_says_it(tmp_path: Path) -> None:
    (arguments,) = TrlParser((GRPOConfig,)).parse_args_and_config(["--resume_from_checkpoint", "True", "--use_cpu"])
    assert arguments.resume_from_checkpoint == "True"  # TRL's parser; `train` would look for a folder of this name
    third = tmp_path / "checkpoint-3"
    for given, words in (("True", "is 'True', and no checkpoint is there"), (str(third), rf"{tmp_path}' has none\.")):
        with pytest.raises(ValueError, match=words):
            checkpoint(given, str(tmp_path))
    third.mkdir()
    (third / "trainer_state.json").write_text("{}")
    assert checkpoint(arguments.resume_from_checkpoint, str(tmp_path)) is True
    assert checkpoint(str(third), str(tmp_path)) == str(third)
    assert checkpoint(None, str(tmp_path)) is None
    with pytest.raises(ValueError, match=rf"is 'last', and no checkpoint .* has {third}\. Name one"):
        checkpoint("last", str(tmp_path))


def test_a_reward_without_a_module_is_named() -> None:
    with pytest.raises(ValueError, match=r"`--reward_funcs` has 'reward'; wanted .* such as my_module\.reward"):
        RewardArguments(reward_funcs=["reward"]).rewards()
    with pytest.raises(ValueError, match=r"`--reward_funcs` is missing"):
        RewardArguments().rewards()
    home = "optimal_sampling_trl.demo.pair"
    for path, wanted in (
        (f"{home}.rewrd", rf"Unknown function of {home} 'rewrd'\. .*Did you mean 'reward'"),
        (
            f"{home}.PRIME",
            rf"Unknown function of {home} 'PRIME'\. Known: reward\. Wanted a function of",
        ),  # helpers are none
        ("trl.rewards.x", "'x'. Known: (?!.*get_).*think_format_reward"),  # what makes rewards is none
        ("textwrap.x", r"Unknown function of textwrap 'x'\. Wanted a function of `completions` and `\*\*kwargs`"),
        ("nowhere.right", "has 'nowhere.right', and there is no module 'nowhere'. Install it, or start"),
        ("optimal_sampling_trl.no_such_module.reward", "and there is no module 'optimal_sampling_trl.no_such_module'"),
    ):
        with pytest.raises(ValueError, match=wanted):
            RewardArguments(reward_funcs=[path]).rewards()
    (found,) = RewardArguments(reward_funcs=[f"{home}.reward"]).rewards()
    assert found(["21="], ["12"]) == [1.0]


@pytest.mark.parametrize("method", ["GRPO", "RLOO", "RAFT", "Distillation"])
def test_a_missing_teacher_is_one_line(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before data and models are looked for."""
    job = Job("train", method, "", rewarded=method != "Distillation")
    with pytest.raises(SystemExit) as error:
        job.train(["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--report_to", "none"])
    assert error.value.code == 2
    assert "optimal-sampling train: `--teacher` is missing; wanted a folder or a model id." in capsys.readouterr().err
