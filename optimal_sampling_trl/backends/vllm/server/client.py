"""A trainer's side of a server of the fused engine: HTTP, time limits, and which weights it has. Imports no TRL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import requests as http
import torch
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from ....pairing import STUDENT, checkpoint_digest, is_student
from ....rollouts.request import Request
from ....rollouts.rollout import Rollout, check_solved, has_nan
from ....user_warnings import warn_user
from ..limits import ONE_PROMPT
from ..requests import check_request
from .messages import pair_of, settings_in, to_arguments, to_rollouts

CONCURRENT = 64
"""Requests that are sent at a time: as many connections as TRL's client keeps."""
MOST_STOPS = 4
"""Stop texts that the protocol of vLLM's server lets a request have."""


class FusedServer:
    """A server of the fused engine, through TRL's client.

    Args:
        client: TRL's `VLLMClient`, connected.
        teacher: the teacher that the server must have.
        tokenizer: the trainer's.
        timeout: seconds to wait for an answer.

    Raises:
        RuntimeError: where the server is another than the trainer needs, saying what to start.
    """

    def __init__(self, client: Any, teacher: str, tokenizer: Any, timeout: float = 240.0) -> None:
        self.client, self.teacher, self.timeout = client, teacher, timeout
        for scheme in ("http://", "https://"):
            client.session.mount(scheme, TimeoutAdapter(timeout, client.session.adapters[scheme].max_retries))
        with self._explain_errors("does not fit the trainer"):
            with _trl_errors():
                info = client.get_server_info()
            self.pair = pair_of(info, tokenizer)
            self.max_logprobs = info["model_config"]["max_logprobs"]
            self.dtype: torch.dtype = getattr(torch, str(info["model_config"]["dtype"]).removeprefix("torch."))
            if self.pair.one_model != is_student(teacher):
                found = STUDENT if self.pair.one_model else self.pair.teacher
                raise ValueError(f"its teacher is {found!r}, and the generator's {teacher!r}.")
            if not self.pair.one_model:
                _check_teacher(self.pair.teacher, settings_in(info).teacher_digest, teacher)
        self.pushed: list[dict[str, Any]] | None = None

    def check_two_prompts(self) -> None:
        """Refuse a server whose models read one prompt.

        Raises:
            RuntimeError: where a model's layers have what `limits.ONE_PROMPT` names.
        """
        with self._explain_errors("does not fit the trainer"):
            if not self.pair.two_prompts:
                raise ValueError(
                    f"teacher and student are to read different prompts, which takes models without {ONE_PROMPT}."
                )

    def check_ending(self, stop: Sequence[int]) -> None:
        """Refuse a server that ends completions at other tokens than the trainer.

        Args:
            stop: the trainer's: `pairing.stop_tokens` of its model and its tokenizer.

        Raises:
            RuntimeError: naming both.
        """
        wanted = sorted(id for id in stop if id < self.pair.vocabulary)
        found = sorted(self.pair.ending.stop)
        with self._explain_errors("does not fit the trainer"):
            if found != wanted:
                raise ValueError(
                    f"its student {self.pair.theta!r} ends completions at the tokens {found}, and the trainer at "
                    f"{wanted} (`eos_token` of its tokenizer, `generation_config.eos_token_id` of its model). Save "
                    "both into the student's folder and start the server anew."
                )

    def check_shapes(self, shapes: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Refuse weights that are no whole set of the server's student: in the middle of sending it would be too late.

        Raises:
            RuntimeError: naming the weights.
        """
        with self._explain_errors("does not fit the trainer"):
            for answer in self._call_workers("refuse_theta_shapes", json.dumps(shapes)):
                if answer["reason"]:
                    raise ValueError(answer["reason"])

    @contextmanager
    def push(self) -> Iterator[None]:
        """Check the server before and after the block, inside which the weights are sent.

        Raises:
            RuntimeError: where they did not arrive in each of the server's processes, or another trainer's did.
        """
        with self._explain_errors("did not take the student's weights"):
            before = self._call_workers("theta_state")
            if self.pushed is not None:
                self._check_weights(before, self.pushed)
            if any(state["stale"] for state in before):
                self._call_workers("abandon_weight_update")
            with _trl_errors():
                yield
            if not self._drop_prefix_cache():
                raise ValueError("it kept what it had cached under the old ones: somebody else samples from it.")
            self.pushed = [state | {"updates": state["updates"] + 1, "stale": None} for state in before]
            self._check_weights(self._call_workers("theta_state"), self.pushed)

    def sample(self, requests: Sequence[Request]) -> list[Rollout]:
        """Sample one rollout for each request, in their order. Equal requests in a row share one HTTP request.

        Raises:
            ValueError: on a request that cannot be served, before any is; and where a model returned NaN.
            RuntimeError: where the server is gone, or the weights are not those that were pushed last.
        """
        for index, request in enumerate(requests):
            check_request(request, self.pair, index, self.max_logprobs)
            if len(request.sampling.stop) > MOST_STOPS:
                raise ValueError(
                    f"Request {index} has {len(request.sampling.stop)} stop texts; wanted at most {MOST_STOPS}, as "
                    "many as vLLM's server takes. Drop some, or sample without a server."
                )
        groups = [list(group) for _, group in groupby(requests)]
        seeds = torch.randint(2**31, (len(groups),)).tolist()
        with self._explain_errors("did not sample"):
            self._check_weights(self._call_workers("theta_state"), self.pushed)
            with ThreadPoolExecutor(max_workers=max(1, min(CONCURRENT, len(groups)))) as pool:
                answers = list(pool.map(self._sample_group, groups, seeds))
            self._check_weights(self._call_workers("theta_state"), self.pushed)
        rollouts = [rollout for answer in answers for rollout in answer]
        # What `VLLMBackend.clean_caches` does in process; not while somebody else's requests read the caches.
        if any(map(has_nan, rollouts)) and self._drop_prefix_cache():
            self._call_workers("zero_caches")
        check_solved(rollouts)
        return rollouts

    def _sample_group(self, group: list[Request], seed: int) -> list[Rollout]:
        choices = complete(self.client, to_arguments(group[0], self.pair.ending, len(group), seed))
        return to_rollouts(choices, group[0], self.pair)

    def _drop_prefix_cache(self) -> bool:
        """Drop the blocks that the server has cached, and tell whether it did; TRL's own call ignores the answer."""
        return bool(_post(self.client, "reset_prefix_cache").get("success", True))

    def _call_workers(self, method: str, *arguments: str) -> list[dict[str, Any]]:
        """Return the answer of each of the server's processes."""
        return _post(self.client, "collective_rpc", json={"method": method, "args": arguments})["results"]

    @staticmethod
    def _check_weights(states: list[dict[str, Any]], wanted: list[dict[str, Any]] | None) -> None:
        """Refuse weights other than the pushed ones."""
        if wanted is None:
            raise ValueError("no weights were sent to it yet.")
        for state, want in zip(states, wanted, strict=True):
            if state["instance"] != want["instance"]:
                raise ValueError("it was restarted, so that its student has the weights on disk again.")
            if state["stale"]:
                raise ValueError(f"its student cannot be sampled from: {state['stale']}.")
            if state["updates"] != want["updates"]:
                raise ValueError(
                    f"its student has weights {state['updates']}, and this trainer sent {want['updates']}: "
                    "another trainer uses the same server."
                )

    @contextmanager
    def _explain_errors(self, what: str) -> Iterator[None]:
        """Turn an error inside the block into one that names the server and says what to start.

        Those are the refusals in this package, and what fails on the way to the server, in it, and in sending weights.
        Any other is a fault of the program, and stays what it is.
        """
        try:
            yield
        except (http.RequestException, RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"The server at {self.client.base_url} {what}: {self._cause(error)}\nStart one with "
                f"`optimal-sampling-serve --teacher {self.teacher} --theta <the student>`, and the trainer anew, from "
                "its last checkpoint."
            ) from error

    def _cause(self, error: Exception) -> str:
        """Say what happened, and tell an engine that died from a server that is gone or refuses."""
        if isinstance(error, http.Timeout):
            return _timeout_text(self.timeout)
        if isinstance(error, ValueError):
            return str(error)
        try:
            is_dead = http.get(f"{self.client.base_url}/health", timeout=min(self.timeout, 10.0)).status_code == 503
        except http.Timeout:
            return f"{error} It does not answer any more."
        except http.RequestException:
            is_dead = False
        if is_dead or "EngineCore" in str(error) or "EngineDead" in str(error):
            return f"its engine died, as it does when memory runs out: see what the server printed last. ({error})"
        return str(error)


def complete(client: Any, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Send the request that TRL's client sends for `arguments`, and return the choices of the answer as they came.

    TRL's `generate` drops the reason why each completion ended, and sorts a dictionary for each token. That takes 10
    µs a token, and 40 s for a batch of 512 completions of 8 192 tokens.
    """
    further = dict(arguments)
    prompt, nested = further.pop("prompts"), further.pop("generation_kwargs")
    flags = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    body = {"model": client.model, "prompt": prompt, **flags, **further, **nested}
    return _post(client, "v1/completions", json=body)["choices"]


def _post(client: Any, path: str, **keywords: Any) -> dict[str, Any]:
    """Post to a server by TRL's client, which has no public method for paths that it does not use itself."""
    with _trl_errors():
        return client._post(f"{client.base_url}/{path}", **keywords)


@contextmanager
def _trl_errors() -> Iterator[None]:
    """Turn a bare `Exception` inside the block into a `RuntimeError`.

    TRL's client raises one where an answer has another status than 200. To catch it further out would be to catch the
    faults of any code as well.
    """
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise RuntimeError(str(error)) from error


class TimeoutAdapter(HTTPAdapter):
    """Waits a given time for an answer, where TRL's session waits for ever.

    An answer that does not come is not asked for again: the server may still be at work on it. One with status 500 is
    handed on, for the words in it.
    """

    def __init__(self, timeout: float, retries: Retry) -> None:
        once = retries.new(read=False, status_forcelist=[502, 503], raise_on_status=False)
        super().__init__(pool_maxsize=CONCURRENT, max_retries=once)
        self.timeout = timeout

    def send(self, request: Any, stream: bool = False, timeout: Any = None, *further: Any, **keywords: Any) -> Any:
        return super().send(request, stream, self.timeout if timeout is None else timeout, *further, **keywords)


def refuse_silence(url: str, timeout: float) -> None:
    """Refuse a server that takes a connection and then says nothing, on which TRL's client would wait for ever.

    Raises:
        RuntimeError: naming the server. One that takes no connection is waited for by TRL.
    """
    with suppress(http.ConnectionError):
        try:
            http.get(f"{url}/health", timeout=timeout)
        except http.ReadTimeout as error:
            raise RuntimeError(f"The server at {url} hangs: {_timeout_text(timeout)}") from error


def _timeout_text(timeout: float) -> str:
    return (
        f"it did not answer within {timeout:g} s. It hangs, or a completion takes longer: then raise "
        "`vllm_server_timeout`."
    )


def _check_teacher(found: str, digest: str | None, wanted: str) -> None:
    """Refuse a server whose teacher is another than the generator's, by its name and by its weights.

    Args:
        found: the server's: a folder there, or a model id.
        digest: `checkpoint_digest` of it; None of a model id.
        wanted: the generator's: a folder here or there, or a model id.

    Raises:
        ValueError: where they differ.
    """
    if _basename(found) != _basename(wanted):
        raise ValueError(f"its teacher is {found!r}, and the generator's {wanted!r}.")
    here = checkpoint_digest(Path(wanted))
    if None not in (digest, here):
        if digest != here:
            raise ValueError(f"its teacher {found!r} has other weights than the generator's, {wanted!r}.")
    elif found != wanted:
        if not any(Path(name).is_absolute() for name in (found, wanted)) and digest is here:
            raise ValueError(f"its teacher is {found!r}, and the generator's {wanted!r}.")
        warn_user(
            f"The server's teacher is {found!r}, and the generator's {wanted!r}: whether their weights are the same "
            "cannot be told from here. Name a folder that both see, or the same model id.",
        )


def _basename(name: str) -> str:
    """Return a model's name without where it lies, which differs from machine to machine."""
    return name.rstrip("/").split("/")[-1]
