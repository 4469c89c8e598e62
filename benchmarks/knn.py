"""Time and memory of the nearest-neighbour vote on random features.

    python benchmarks/knn.py --train 1281167 --test 50000 --width 384      as large as ImageNet, a small ViT
    python benchmarks/knn.py --train 100000 --test 5000 --device cpu

Training features are drawn block by block, as they come mapped from disk, so that memory is that of the method alone.
"""

import argparse
import resource
import time

import torch
import torch.nn.functional as F

from harmony.evaluation.knn import judged, nearest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=100_000, help="training images")
    parser.add_argument("--test", type=int, default=5_000, help="images measured on")
    parser.add_argument("--width", type=int, default=384, help="of a feature")
    parser.add_argument("--k", type=int, default=100, help="neighbours")
    parser.add_argument("--block", type=int, default=4096, help="training images compared at a time")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(asked.test, asked.width, generator=generator), dim=1)
    labels = torch.randint(asked.classes, (asked.test,), generator=generator)
    before, drawing = _peak(), 0.0

    def blocks():
        nonlocal drawing
        for start in range(0, asked.train, asked.block):
            begun = time.perf_counter()
            size = min(asked.block, asked.train - start)
            features = F.normalize(torch.randn(size, asked.width, generator=generator), dim=1)
            classes = torch.randint(asked.classes, (size,), generator=generator)
            drawing += time.perf_counter() - begun
            yield features, classes

    begun = time.perf_counter()
    similarity, voters = nearest(queries, blocks(), asked.k, asked.device)
    searching = time.perf_counter() - begun - drawing
    begun = time.perf_counter()
    ranks, _ = judged(similarity, voters, labels, asked.k, asked.classes, 0.07)
    voting = time.perf_counter() - begun
    pairs = asked.train * asked.test
    print(f"{asked.test:,} x {asked.train:,} images of width {asked.width}, k {asked.k}, on {asked.device}")
    print(f"search {searching:.1f} s ({pairs / searching / 1e6:,.0f} million pairs/s), votes {voting:.1f} s")
    print(f"memory {_peak():.0f} MiB at most, {before:.0f} MiB of it before the search")
    if asked.device.startswith("cuda"):
        print(f"GPU memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB at most")
    print(f"top-1 {(ranks == 1).double().mean():.4f}, chance {1 / asked.classes:.4f}")


def _peak() -> float:
    """Largest resident memory so far, in MiB (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
