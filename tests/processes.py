"""Processes of their own for what a test cannot do in its own: be one of several ranks, or be killed."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

PATIENCE = 120
"""Seconds, several times what the longest of them takes on a busy machine."""

PRELOAD = ["harmony.training.trainer", "harmony.evaluation.tasks"]
"""Imported once for all of them, so the same for every test."""


class Processes:
    """Ranks of one run, in processes of their own, each the leader of its own process group.

    They are forked from a server that has imported harmony and has run nothing, as autograd does not work in the fork
    of a process that has used it. Their environment and folder are those of the test, but there is no GPU. What they
    run is found by its name, so it stands at the top of a module.
    """

    def __init__(self, run: Callable[..., object], *arguments: Any, ranks: int = 1, output: Path) -> None:
        port = _free_port()
        self._outputs = [output.with_suffix(f".{rank}") for rank in range(ranks)]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the server, which may start here, as well as for the ranks
            self.members = [
                context.Process(target=_forked, args=(run, arguments, _environment(rank, ranks, port), path))
                for rank, path in enumerate(self._outputs)
            ]
            for member in self.members:
                member.start()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Of the first rank."""
        return self.members[0].pid

    def printed(self, rank: int = 0) -> str:
        """What a rank has printed so far."""
        return self._outputs[rank].read_text() if self._outputs[rank].exists() else ""

    def wait_for(self, word: str) -> None:
        """Until the first rank has printed a word."""
        deadline = time.monotonic() + PATIENCE
        while word not in self.printed():
            assert self.members[0].is_alive() and time.monotonic() < deadline, self.printed()
            time.sleep(0.01)

    def finish(self, status: int = 0) -> str:
        """What the first rank printed, once all have left with the given exit status (a negative one for a signal)."""
        deadline = time.monotonic() + PATIENCE
        # A child that lives on would keep `join` waiting.
        while any(member.exitcode is None for member in self.members) and time.monotonic() < deadline:
            time.sleep(0.01)
        found = [member.exitcode for member in self.members]
        self.kill()
        assert found == [status] * len(found), "\n".join(self.printed(rank) for rank in range(len(found)))
        return self.printed()

    def kill(self) -> None:
        """End the ranks that are left, and what they have started."""
        for member in self.members:
            with suppress(ProcessLookupError):
                os.killpg(member.pid, signal.SIGKILL)
            member.kill()


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """This process's own and, if there are several ranks, what torchrun says to each."""
    if ranks == 1:
        return dict(os.environ)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in places.items()}


def _forked(run: Callable[..., object], arguments: Sequence[Any], environment: Mapping[str, str], output: Path) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as it is in a process that was not started by a server
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    run(*arguments)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
