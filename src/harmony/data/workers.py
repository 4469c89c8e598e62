"""The processes that make batches: how many, and how they start."""

import gc
import os
import resource
import shutil
import signal
import threading
import warnings
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

MOST = 16
"""Workers a rank that `auto` never exceeds."""

AHEAD = 2
"""Batches that each worker has ready or in the making."""

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Where Linux says how much time a container has: microseconds of every so many, or "max"."""


def count_workers(wanted: int | Literal["auto"], batch_bytes: int) -> int:
    """How many workers to start on this rank.

    `auto` is one less than the cores a rank has, at most 16, and no more than the shared memory through which batches
    travel has room for (a container often has 64 MB of it, and a worker that finds it full is killed).

    Args:
        wanted: a number, which is taken as it is, or "auto".
        batch_bytes: size of one batch.
    """
    if wanted != "auto":
        return wanted
    ranks_here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    by_cores = cores() // ranks_here - 1
    by_memory = shared_memory() // ranks_here // (2 * AHEAD * max(1, batch_bytes))
    return max(0, min(by_cores, by_memory, MOST))


def cores() -> int:
    """Cores this process may use: those it is bound to, and no more than its container's share of time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(bound, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return bound


def shared_memory() -> int:
    """Free bytes of the memory that processes exchange tensors through; without bound where there is no such place."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 2**62


def allow_open_files(workers: int) -> None:
    """Raise this process's limit of open files as far as it may go, where the usual 1024 could be too few.

    Each tensor of each batch under way takes one, and a batch has some fifty.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 512 + workers * AHEAD * 64
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def start_worker(number: int) -> None:
    """Set up worker `number`: one thread, quiet about odd files, deaf to the signals that the training process handles.

    Ctrl-C and a scheduler's SIGTERM reach all processes of a group. The training process decides what follows (it may
    want more batches before it saves), so a worker heeds SIGTERM from that process alone.
    """
    torch.set_num_threads(1)
    # A forked worker inherits whether garbage is collected, and collecting what it inherited would copy all of it.
    gc.freeze()
    gc.enable()
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM keeps its usual effect
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_heed_parent, daemon=True).start()


def _heed_parent() -> None:
    """End this process when its parent says so.

    A parent that fails with batches still open terminates its workers and waits for them; one that ignored SIGTERM
    altogether would keep it waiting for ever.
    """
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
