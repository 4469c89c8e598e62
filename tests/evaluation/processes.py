"""Ranks in forked processes, for what runs under torchrun."""

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch

from harmony.training import distributed


def in_processes(count: int, work: Callable[[int], object]) -> None:
    """Run `work(rank)` in forked processes, as torchrun would start them; all must end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(rank):
        torch.cuda.is_available = lambda: False  # one process a GPU, and a test's machine may have one
        if count > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with distributed.session() as place:
            assert place.ranks == count
            work(rank)

    members = [multiprocessing.get_context("fork").Process(target=start, args=(rank,)) for rank in range(count)]
    for member in members:
        member.start()
    for member in members:
        member.join(60)
    assert [member.exitcode for member in members] == [0] * count
