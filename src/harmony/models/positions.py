"""Positions of patches: fixed ones, and learned ones resized to other grids."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def sine_cosine_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed two-dimensional positions, (rows * columns, width) float64 (MAE, arXiv 2111.06377, appendix A).

    The first half of the channels codes the column, the second the row; each half holds sines, then cosines, of
    position / 10000^(i / (width / 4)) for i = 0 .. width / 4 - 1 (arXiv 1706.03762, section 3.5).
    """
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def resize_matrix(own: tuple[int, int], grid: tuple[int, int], how: Literal["antialiased", "published"]) -> Tensor:
    """Bicubic interpolation of a grid as the linear map that it is, (rows * columns, own rows * own columns) float64.

    A matrix product has a gradient that is the same every time, which the gradient of an interpolation on a GPU is not.

    Args:
        own: rows and columns of the learned positions.
        grid: rows and columns wanted.
        how: antialiased to the exact grid, as timm does it, or by the published code's scale (n + 0.1) / N without.
    """
    units = torch.eye(own[0] * own[1], dtype=torch.float64).view(1, -1, *own)
    if how == "antialiased":
        resized = F.interpolate(units, size=grid, mode="bicubic", antialias=True)
    else:
        scale = ((grid[0] + 0.1) / own[0], (grid[1] + 0.1) / own[1])
        resized = F.interpolate(units, scale_factor=scale, mode="bicubic")
    return resized[0].flatten(1).T
