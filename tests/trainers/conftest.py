"""An untrained pair that speaks the embedded task's tokens, its teacher, and a pair that calls tools."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.speakers import make_speakers
from helpers.training import load, make_untrained_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def teacher(pair: tuple[str, str]) -> Any:
    return load(pair[0])


@pytest.fixture(scope="session")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_speakers(tmp_path_factory.mktemp("speakers"))
