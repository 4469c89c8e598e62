"""Time and memory of the nearest-neighbour vote on random features.

    python benchmarks/knn.py --train 1281167 --test 50000 --width 384      as large as ImageNet, a small ViT
    python benchmarks/knn.py --train 100000 --test 5000 --device cpu

Training features are drawn block by block, as they come mapped from disk, so that memory is that of the method alone.
On a CPU seconds are of the processor, over all threads: what a busy machine leaves comparable. What a whole ImageNet
takes is extrapolated from the pairs compared.
"""

import argparse
import resource
import time

import torch
import torch.nn.functional as F

from harmony.evaluation.knn import judged, nearest

IMAGENET = 1_281_167, 50_000
"""Training images, and images measured on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=100_000, help="training images")
    parser.add_argument("--test", type=int, default=5_000, help="images measured on")
    parser.add_argument("--width", type=int, default=384, help="of a feature")
    parser.add_argument("--k", type=int, default=100, help="neighbours")
    parser.add_argument("--block", type=int, default=4096, help="training images compared at a time")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    now = time.process_time if asked.device == "cpu" else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(asked.test, asked.width, generator=generator), dim=1)
    labels = torch.randint(asked.classes, (asked.test,), generator=generator)
    before, drawing = _peak(), 0.0

    def blocks():
        nonlocal drawing
        for start in range(0, asked.train, asked.block):
            begun = now()
            size = min(asked.block, asked.train - start)
            features = F.normalize(torch.randn(size, asked.width, generator=generator), dim=1)
            classes = torch.randint(asked.classes, (size,), generator=generator)
            drawing += now() - begun
            yield features, classes

    begun = now()
    similarity, voters = nearest(queries, blocks(), asked.k, asked.device)
    searching = now() - begun - drawing
    begun = now()
    ranks, _ = judged(similarity, voters, labels, asked.k, asked.classes, 0.07)
    voting = now() - begun
    pairs = asked.train * asked.test
    print(f"{asked.test:,} x {asked.train:,} images of width {asked.width}, k {asked.k}, on {asked.device}")
    print(f"search {searching:.1f} s ({pairs / searching / 1e6:,.0f} million pairs/s), votes {voting:.1f} s")
    whole = (IMAGENET[0] * IMAGENET[1] / pairs * searching + IMAGENET[1] / asked.test * voting) / 60
    print(f"{IMAGENET[1]:,} x {IMAGENET[0]:,} images, extrapolated: {whole:.0f} min")
    print(f"memory {_peak():.0f} MiB at most, {before:.0f} MiB of it before the search")
    if asked.device.startswith("cuda"):
        print(f"GPU memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB at most")
    print(f"top-1 {(ranks == 1).double().mean():.4f}, chance {1 / asked.classes:.4f}")


def _peak() -> float:
    """Largest resident memory so far, in MiB (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
