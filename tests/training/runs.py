"""A tiny Harmony run on generated scenes, all five objectives, a second or two long."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from harmony import recipe as recipes
from harmony.recipe import Recipe
from harmony.training.distributed import Place
from harmony.training.trainer import Trainer

TINY = (
    "model.image={name: vit_tiny_patch16_224, patch: 8, width: 16, depth: 2, heads: 2, drop_path: 0.3}",
    "model.text={width: 16, layers: 1, heads: 2, context: 16}",
    "model.embed=16",
    "data={train: 'scenes:train?count=40', val: null, batch_size: 8, workers: 0}",
    "views.global={size: 32}",
    "views.local={count: 2, size: 16}",
    "objectives.dino={freeze_prototypes: 1 epoch, head: {prototypes: 24, hidden: 16, bottleneck: 8}}",
    "objectives.mae.decoder={width: 16, depth: 1, heads: 2}",
    "objectives.text_distillation={freeze_prototypes: 1 epoch, head: {prototypes: 24, hidden: 16, bottleneck: 8}}",
    "optim={lr: 0.03, warmup: 2 steps}",
    "train={steps: 8, log_every: 1 step, checkpoint_every: 3 steps}",
)

HERE = Place(torch.device("cpu"), rank=0, ranks=1)

# What is proven here is proven on the CPU, wherever the tests run.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

MEASURED_BY_THE_CLOCK = ("examples_per_second", "data_wait", "memory_gib")


def tiny(*overrides: str) -> Recipe:
    return recipes.load("quickstart", [*TINY, *overrides])


def tiny_trainer(*overrides: str) -> Trainer:
    return Trainer(tiny(*overrides), HERE)


def log_of(out: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED_BY_THE_CLOCK} for line in lines]


class Processes:
    """Ranks of one run, in processes of their own, each the leader of its own process group.

    They are forked from a server that has imported harmony, and run nothing else.
    """

    def __init__(self, run: Callable[..., object], *arguments: Any, ranks: int = 1, output: Path) -> None:
        port = _free_port()
        self._outputs = [output.with_suffix(f".{rank}") for rank in range(ranks)]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["harmony.training.trainer"])
        self.members = [
            context.Process(target=_forked, args=(run, arguments, rank, ranks, port, path))
            for rank, path in enumerate(self._outputs)
        ]
        for member in self.members:
            member.start()

    @property
    def pid(self) -> int:
        """Of the first rank."""
        return self.members[0].pid

    def printed(self, rank: int = 0) -> str:
        """What a rank has printed so far."""
        return self._outputs[rank].read_text() if self._outputs[rank].exists() else ""

    def wait_for(self, word: str) -> None:
        """Until the first rank has printed a word."""
        while word not in self.printed():
            assert self.members[0].is_alive(), self.printed()
            time.sleep(0.01)

    def finish(self, status: int = 0) -> str:
        """What the first rank printed, once all have left with the given exit status (a negative one for a signal)."""
        deadline = time.monotonic() + 120
        # A child that lives on would keep `join` waiting.
        while any(member.exitcode is None for member in self.members) and time.monotonic() < deadline:
            time.sleep(0.01)
        for member in self.members:
            with suppress(ProcessLookupError):
                os.killpg(member.pid, signal.SIGKILL)
        assert [member.exitcode for member in self.members] == [status] * len(self.members), self.printed()
        return self.printed()


def _forked(run: Callable[..., object], arguments: Sequence[Any], rank: int, ranks: int, port: int, output: Path):
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as it is in a process that was not started by a server
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    if ranks > 1:  # what torchrun says to each process
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run(*arguments)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def weights(tensors: dict[str, torch.Tensor] | Sequence[torch.Tensor]) -> torch.Tensor:
    """All tensors as one flat vector."""
    values = tensors.values() if isinstance(tensors, dict) else tensors
    return torch.cat([value.detach().flatten().double() for value in values])
