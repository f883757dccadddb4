"""The fused engine behind vLLM's own HTTP server: `optimal-sampling-serve --teacher T --theta S [vLLM's flags]`.

Everything that `vllm serve` takes is taken, and means the same. What the fused model needs is set here, and what it
cannot do is refused before the server starts. It listens on 127.0.0.1 unless `--host` says otherwise: whoever reaches
it may sample, and, through the development endpoints that TRL sends weights by, replace the student, drop caches,
put the server to sleep and read its settings.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..launch import engine_settings, platform_settings
from ..limits import check_arguments, check_pair, check_platform, check_sizes
from ..pair_settings import settings_of
from ..plugin import TRANSFER, require
from ..requests import check_params
from ..rows import keep_rows
from ..speculation import NUM_SPECULATIVE_TOKENS, check_drafted_params
from ..versions import prepare_server, serve_flags
from ..wire import wants_record
from .messages import describe

PROGRAM = "optimal-sampling-serve"
ONE_SERVER = {"headless": False, "grpc": False, "api_server_count": None}
"""Flags of `vllm serve` that start something else than one HTTP server, and their defaults."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of vLLM's server for a pair.

    Raises:
        ImportError: where vLLM is missing, unsuited, or did not load this package's plugin.
        ValueError: on a pair or an argument that the engine refuses (limits.py).
    """
    models = argparse.ArgumentParser(PROGRAM, description=__doc__, allow_abbrev=False)
    of_teacher = "folder or model id of the teacher, or 'student': the student itself, its weights once"
    models.add_argument("--teacher", required=True, help=of_teacher)
    models.add_argument("--theta", required=True, help="folder or model id of the student")
    of_drafts = "tokens that the student drafts at a time (docs/speculative.md), or 'auto'"
    models.add_argument("--num-speculative-tokens", type=_count, default=0, help=of_drafts)
    named, rest = models.parse_known_args(argv)
    require()
    from vllm.config import WeightTransferConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags = serve_flags()
    parser = flags.make_arg_parser(FlexibleArgumentParser(PROGRAM))
    args = parser.parse_args(rest)
    given = _given(parser, args) | {NUM_SPECULATIVE_TOKENS: named.num_speculative_tokens}
    check_arguments(given)
    check_sizes(given)
    check_platform({})  # several devices are fine: weights come to each of the server's processes
    pair = check_pair(named.teacher, named.theta, given)
    for name, value in engine_settings(pair, given, describe(pair)).items():
        setattr(args, name, value)
    args.model, args.weight_transfer_config = pair.teacher, WeightTransferConfig(backend=TRANSFER)
    args.host = args.host or "127.0.0.1"
    flags.validate_parsed_serve_args(args)
    return args


def _count(text: str) -> int | str:
    """Read a number; what is none is left to the check of the setting, which says what it wants."""
    return int(text) if text.lstrip("-").isdecimal() else text


def _given(parser: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return the engine arguments among the flags that are not at their default."""
    from vllm import EngineArgs

    if args.model_tag is not None:
        raise ValueError(f"A model was passed, {args.model_tag!r}; wanted `--teacher` and `--theta` alone. Drop it.")
    for name, default in ONE_SERVER.items():
        if getattr(args, name, default) not in (default, 1):
            raise ValueError(f"`--{name.replace('_', '-')}` is not supported: this command starts one HTTP server.")
    names = [field.name for field in fields(EngineArgs) if hasattr(args, field.name)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) != parser.get_default(name)}
    if "weight_transfer_config" in given:
        raise ValueError("`--weight-transfer-config` cannot be set: this command names the one of the student.")
    return given


async def serve(args: argparse.Namespace) -> None:
    """Run the server until it is told to stop."""
    from vllm.entrypoints.openai.api_server import build_and_serve, build_async_engine_client, setup_server

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt  # until uvicorn has handlers of its own

    signal.signal(signal.SIGTERM, stop)
    address, sock = setup_server(args, reuse_port=False)
    try:
        async with build_async_engine_client(args) as engine:
            answer_for_replicas(engine)
            await engine.collective_rpc("install_mixture_sampler")
            refuse_early(engine)
            keep_rows(engine)
            stopped = await build_and_serve(engine, address, sock, args)
        await stopped
    finally:
        sock.close()


def answer_for_replicas(engine: Any) -> None:
    """Let the engine of a data-parallel server answer for all of its replicas.

    Symptom: a trainer is told of one replica's weights and caches, and does not see that another missed a reload.
    Cause: vLLM asks all replicas, and hands on the first one's answer alone.
    Safe: the answers of all are handed on, and the caches count as dropped where each replica dropped them.
    Upstream: none found; `DPLBAsyncMPClient.call_utility_async` says so in a comment.
    Delete when: vLLM's `collective_rpc` returns the answers of all replicas.
    """
    core = engine.engine_core

    async def ask(method: str, *arguments: Any) -> list[Any]:
        engines = core.core_engines
        return await asyncio.gather(*(core._call_utility_async(method, *arguments, engine=one) for one in engines))

    async def collective_rpc(
        method: str, timeout: float | None = None, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        answers = await ask("collective_rpc", method, timeout, args, kwargs)
        return [one for answer in answers for one in answer]

    async def reset_prefix_cache(reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        return all(await ask("reset_prefix_cache", reset_running_requests, reset_connector))

    if len(getattr(core, "core_engines", ())) > 1:
        engine.collective_rpc, engine.reset_prefix_cache = collective_rpc, reset_prefix_cache


def refuse_early(engine: Any) -> None:
    """Check each request before it reaches the engine, whatever endpoint it came by.

    A bad request in the engine would stop the step, and with it the server. Here vLLM answers it with status 400.
    """
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

    settings = settings_of(engine.vllm_config)
    drafts = engine.vllm_config.speculative_config is not None
    generate = engine.generate

    def checked(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        check_params(sampling_params, ids or (), settings)
        if drafts:
            check_drafted_params(sampling_params)
        end_at(sampling_params, settings.ending.stop)
        if wants_record(sampling_params):
            # A trainer's, which reads ids: no object and no text a token.
            sampling_params.flat_logprobs = True
            sampling_params.detokenize = bool(sampling_params.stop)
        return generate(prompt, sampling_params, *args, **kwargs)

    def no_beams(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("`use_beam_search` is set; vLLM would search without the request's mixture. Drop it.")

    engine.generate = checked
    mixin: Any = BeamSearchOnlineMixin
    mixin.beam_search = no_beams


def end_at(params: Any, stop: Sequence[int]) -> None:
    """Let a request end at the student's tokens, too, unless it ignores endings: vLLM knows only the teacher's.

    Args:
        params: vLLM's parameters of the request.
        stop: the student's end tokens.
    """
    if not params.ignore_eos:
        params.stop_token_ids = list(dict.fromkeys([*(params.stop_token_ids or ()), *stop]))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command `optimal-sampling-serve`; a refusal is one line and exit status 2."""
    try:
        args = parse(argv)
    except (ImportError, ValueError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    import uvloop

    prepare_server()
    # TRL sends weights and reads the server's settings by vLLM's development endpoints.
    os.environ.update({"VLLM_SERVER_DEV_MODE": "1", **platform_settings()})
    uvloop.run(serve(args))


if __name__ == "__main__":
    main()
