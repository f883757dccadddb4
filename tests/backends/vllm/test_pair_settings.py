"""What an engine is told about a pair: there and back by way of JSON, and settings of another build."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

from optimal_sampling_trl.backends.vllm.pair_settings import KEY, PairSettings, ServerSettings, settings_of
from optimal_sampling_trl.pairing import Ending

ENGINE = PairSettings(
    theta="theta", ending=Ending((1, 2), (3,)), vocabulary=8, two_prompts=True, one_model=False, has_one_table=True
)
SERVER = ServerSettings(
    **{field.name: getattr(ENGINE, field.name) for field in fields(ENGINE)},
    version="1",
    tokens="2",
    engine_vocabulary=9,
    template=None,
    teacher_tokenizer={"chat_template": None},
    teacher_digest="3",
)


@pytest.mark.parametrize("settings", [ENGINE, replace(ENGINE, role="theta"), SERVER])
def test_settings_come_back_by_way_of_json(settings: PairSettings) -> None:
    told = json.loads(json.dumps(settings.to_dict()))
    assert settings_of(SimpleNamespace(additional_config={"mine": 1, KEY: told})) == settings


@pytest.mark.parametrize("settings", [ENGINE, SERVER])
def test_settings_of_another_build_are_refused(settings: PairSettings) -> None:
    told = settings.to_dict()
    with pytest.raises(ValueError, match="another build of this package, which also tells its mood"):
        type(settings).from_dict({**told, "mood": "good"})
    for name in told:
        with pytest.raises(ValueError, match=f"another build of this package, which does not tell its {name}"):
            type(settings).from_dict({other: value for other, value in told.items() if other != name})
