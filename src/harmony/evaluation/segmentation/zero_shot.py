"""Dense zero-shot segmentation: each patch is compared with the names of the classes (MaskCLIP, arXiv 2112.01071).

Shapes: B images, C classes, E width of the space shared with texts, h x w patches.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from harmony.errors import UserError
from harmony.evaluation.encoder import Encoder
from harmony.evaluation.segmentation.heads import Segmenter, patch_width
from harmony.evaluation.templates import load_templates, prompts


class ZeroShotSegmenter(Segmenter):
    """The cosine of each patch, put into the space shared with texts, and each class's name.

    Args:
        encoder: frozen.
        classes: (C, E) of unit length.
    """

    def __init__(self, encoder: Encoder, classes: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.classes = classes.to(encoder.device)

    @classmethod
    def of(cls, encoder: Encoder, names: Sequence[str], templates: str, size: int) -> "ZeroShotSegmenter":
        """With the names read by the text tower in every template, averaged (CLIP, arXiv 2103.00020, 3.1.4).

        Raises:
            UserError: two classes have one name, the templates are unknown, or patches cannot be compared with texts.
        """
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"the name {twice[0]!r} stands for several classes; head=zero_shot needs different names")
        patch_width(encoder, size, 1)
        sentences = [list(prompts(name, load_templates(templates))) for name in names]
        with torch.no_grad():
            read = [F.normalize(encoder.texts(one).float(), dim=-1).mean(dim=0) for one in sentences]
        return cls(encoder, F.normalize(torch.stack(read), dim=-1))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.encoder.shared(self.encoder.encode(pixels, 1).layers[-1].patches)
        return torch.einsum("behw,ce->bchw", F.normalize(patches.float(), dim=1), self.classes)
