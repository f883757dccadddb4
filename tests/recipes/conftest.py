"""The embedded pair, made once and shared with the recipes' processes through its cache."""

from __future__ import annotations

import pytest

import pair as embedded


@pytest.fixture(scope="module")
def made() -> embedded.PairFolders:
    return embedded.make_pair()
