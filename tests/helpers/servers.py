"""A real server process for tests, on 127.0.0.1 and a free port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import requests

from helpers.children import StuckError, end, start, wait_until
from helpers.paths import PROCESSES, python_path
from optimal_sampling_trl import Mixture

FLAGS = ("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "64")

MIXED = [
    {},
    {"mixture": Mixture.theta_only(), "temperature": 0.7},
    {"mixture": Mixture.teacher_only(), "top_k": 20},
    {"mixture": Mixture("trust_region", epsilon=0.1), "temperature": 1.3, "top_p": 0.8},
    {"mixture": Mixture("fixed", fixed_alpha=0.3), "repetition_penalty": 1.2},
    {"mixture": Mixture("entropy"), "min_p": 0.02, "ignore_eos": False},
    {"mixture": Mixture("entropy_gate", entropy_scale=8.0, form="arithmetic")},
    {"mixture": Mixture("ess_balance", alpha_min=0.2, alpha_max=0.6), "max_tokens": 1},
    {"mixture": Mixture("top_k_swap", swap_top_k=2), "top_p": 0.9},
]
"""Settings of requests that one batch may hold."""


class Server:
    """Runs until `stop`.

    Args:
        teacher: the teacher's folder.
        theta: the student's folder.
        log: a file for what it prints.
        flags: further ones of `optimal-sampling-serve`.
        program: what serves; by default one whose weights come from a file.
        environment: further variables of its process.
    """

    def __init__(
        self,
        teacher: str,
        theta: str,
        log: Path,
        *flags: str,
        program: Sequence[str] = (str(PROCESSES / "serve_from_files.py"),),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log, self.environment = log, dict(environment or {})
        self.command = [
            sys.executable,
            *program,
            "--teacher",
            teacher,
            "--theta",
            theta,
            "--port",
            str(self.port),
            *FLAGS,
            *flags,
        ]
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers, as long as it shows a sign of life."""
        environment = {"PYTHONPATH": python_path(), "VLLM_LOGGING_LEVEL": "ERROR"} | self.environment
        with self.log.open("a") as output:
            self.process = start(self.command, output, output, environment=environment)
        reason = "it ended by itself"
        try:
            wait_until(lambda: self.process.poll() is not None or self.is_up(), self.process.pid, self.log)
            if self.process.poll() is None:
                return
        except StuckError as error:
            reason = str(error)
            end(self.process, signal.SIGABRT)  # each of its processes says where it stands
        self.stop()
        raise RuntimeError(f"The server did not start, {reason}:\n{self.log.read_text()[-6000:]}")

    def is_up(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def signal(self, number: int) -> None:
        """Send a signal to each of its processes."""
        os.killpg(self.process.pid, number)

    def kill_engine(self) -> None:
        """End the process that holds the models, as the kernel does where memory runs out; that of HTTP stays."""
        (engine,) = (child for child in psutil.Process(self.process.pid).children() if "EngineCo" in child.name())
        engine.kill()

    def stop(self) -> None:
        """End it with all that it started: the session is its own."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        end(self.process)
