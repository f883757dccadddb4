"""An untrained pair that speaks the embedded task's tokens, and its teacher."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.training import load, make_untrained_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def teacher(pair: tuple[str, str]) -> Any:
    return load(pair[0])
