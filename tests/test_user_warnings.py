"""The line that a warning names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from optimal_sampling_trl.user_warnings import warn_user


def called_through(*modules: str) -> Callable[[], None]:
    """A warning that is reached through a function of each of the modules, the first the outermost."""
    function: Callable[[], None] = partial(warn_user, "Read this.")
    for module in reversed(modules):
        names = {"__name__": module}
        exec(compile("def call(function):\n    function()", f"{module}.py", "exec"), names)
        function = partial(names["call"], function)  # type: ignore[arg-type]
    return function


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        ((), Path(__file__).name),
        (("optimal_sampling_trl.part",), Path(__file__).name),
        (("optimal_sampling_trl.part", "transformers.trainer", "trl.trainer", "vllm"), Path(__file__).name),
        (("theirs", "trl.trainer"), "theirs.py"),
        (("trl_tools.part", "optimal_sampling_trl"), "trl_tools.part.py"),
    ],
)
def test_it_is_the_nearest_that_no_library_holds(modules: tuple[str, ...], named: str) -> None:
    warn = called_through(*modules)
    with pytest.warns(UserWarning, match=r"Read this\.") as caught:
        warn()
    assert [Path(one.filename).name for one in caught] == [named]
