"""The machine a benchmark runs on: what it is, and the most arithmetic it does."""

import ctypes
import gc
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_DENSE = {
    # part of the device's name: TFLOP/s of dense bf16 or fp16 products, and of fp32 ones outside the tensor cores, from
    # the vendor's data sheets. The first match counts.
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200": (989, 67),
    "GH200": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
}


def described(device: torch.device) -> dict[str, Any]:
    """What a reader must know to compare a number: processor, threads, versions, and how busy the machine was."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def vendors_peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s that the vendor states for dense products in a precision; None where this is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, (half, single) in _DENSE.items():
        if part in name:
            return 1e12 * (single if precision == "fp32" else half)
    return None


def matmul_rate(device: torch.device, precision: str, size: int | None = None, repeats: int = 7) -> float:
    """FLOP/s of a product of two square matrices, the median over some."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=_DTYPES[precision]) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        a @ b
        finish(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / statistics.median(seconds[1:])


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_gib() -> float:
    """What the process holds at this moment, in GiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


class Growth:
    """How much more memory is taken within a block than when it begins, at the fullest moment.

    Attributes:
        gib: known behind the block; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0.0
        self.gib: float | None = None

    def __enter__(self) -> "Growth":
        gc.collect()
        if self._device.type == "cuda":
            finish(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device) / 2**30
        else:
            _give_back()
            self._before = resident_gib() if _forget_highest() else float("nan")
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            finish(self._device)
            self.gib = torch.cuda.max_memory_allocated(self._device) / 2**30 - self._before
        elif self._before == self._before:
            self.gib = max(0.0, _highest_gib() - self._before)


def _give_back() -> None:
    """Have the heap return what it holds and nobody uses, or the next block would take it without growing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forget_highest() -> bool:
    """Have Linux forget the largest that the process was; whether it could."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _highest_gib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**20


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
