"""Fixed positions of patches, for towers and decoders."""

import torch
from torch import Tensor


def sine_cosine_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed two-dimensional positions, (rows * columns, width) float64 (MAE, arXiv 2111.06377, section 3).

    The first half of the channels codes the column, the second the row; each half holds sines, then cosines, of
    position / 10000^(i / (width / 4)) for i = 0 .. width / 4 - 1 (arXiv 1706.03762, section 3.5).
    """
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
