"""What papers report, for orientation: almost always other data and another scale than those of the run beside it."""

from typing import NamedTuple


class Reported(NamedTuple):
    """One number.

    Attributes:
        metric: as in metrics.json.
        value: a fraction.
        model: what was measured, and what it was trained on.
        data: what it was measured on.
        source: where the number stands.
    """

    metric: str
    value: float
    model: str
    data: str
    source: str


_CLIP = "arXiv 2103.00020"
_DINO = "arXiv 2104.14294"
_DINOV2 = "arXiv 2304.07193"
_IBOT = "arXiv 2111.07832"
_MAE = "arXiv 2111.06377"
_SLIP = "arXiv 2112.12750, models of its repository"
_VITDET = "arXiv 2203.16527, models of its repository"

PAPERS: dict[str, tuple[Reported, ...]] = {
    "zero_shot": (
        Reported("top1", 0.683, "CLIP ViT-B/16, 400 M pairs", "ImageNet-1k", f"{_CLIP}, as open_clip measures it"),
        Reported("top1", 0.230, "SLIP ViT-B/16, CC3M", "ImageNet-1k", _SLIP),
        Reported("top1", 0.171, "CLIP ViT-B/16, CC3M", "ImageNet-1k", _SLIP),
    ),
    "retrieval": (
        Reported("text_to_image_recall@1", 0.687, "CLIP ViT-L/14 at 336 px", "Flickr30k, 1,000 images", _CLIP),
        Reported("image_to_text_recall@1", 0.880, "CLIP ViT-L/14 at 336 px", "Flickr30k, 1,000 images", _CLIP),
        Reported("text_to_image_recall@1", 0.378, "CLIP ViT-L/14 at 336 px", "COCO, 5,000 images", _CLIP),
        Reported("image_to_text_recall@1", 0.584, "CLIP ViT-L/14 at 336 px", "COCO, 5,000 images", _CLIP),
    ),
    "knn": (
        Reported("top1", 0.761, "DINO ViT-B/16, ImageNet-1k", "ImageNet-1k", _DINO),
        Reported("top1", 0.745, "DINO ViT-S/16, ImageNet-1k", "ImageNet-1k", _DINO),
        Reported("top1", 0.771, "iBOT ViT-B/16, ImageNet-1k", "ImageNet-1k", _IBOT),
        Reported("top1", 0.835, "DINOv2 ViT-L/14, LVD-142M", "ImageNet-1k", _DINOV2),
    ),
    "linear": (
        Reported("top1", 0.782, "DINO ViT-B/16, ImageNet-1k", "ImageNet-1k", _DINO),
        Reported("top1", 0.770, "DINO ViT-S/16, ImageNet-1k", "ImageNet-1k", _DINO),
        Reported("top1", 0.795, "iBOT ViT-B/16, ImageNet-1k", "ImageNet-1k", _IBOT),
        Reported("top1", 0.680, "MAE ViT-B/16, ImageNet-1k", "ImageNet-1k", _MAE),
        Reported("top1", 0.654, "SLIP ViT-B/16, CC3M", "ImageNet-1k", _SLIP),
        Reported("top1", 0.863, "DINOv2 ViT-L/14, LVD-142M", "ImageNet-1k", _DINOV2),
    ),
    "fine_tune": (
        Reported("top1", 0.836, "MAE ViT-B/16, ImageNet-1k", "ImageNet-1k", _MAE),
        Reported("top1", 0.838, "iBOT ViT-B/16, ImageNet-1k", "ImageNet-1k", _IBOT),
        Reported("top1", 0.814, "SLIP ViT-B/16, CC3M", "ImageNet-1k", _SLIP),
    ),
    "segmentation": (
        Reported("miou", 0.481, "MAE ViT-B/16, UPerNet", "ADE20K", _MAE),
        Reported("miou", 0.500, "iBOT ViT-B/16, UPerNet", "ADE20K", _IBOT),
    ),
    "detection": (
        Reported("box_ap", 0.516, "MAE ViT-B/16, ViTDet with Mask R-CNN", "COCO 2017", _VITDET),
        Reported("mask_ap", 0.459, "MAE ViT-B/16, ViTDet with Mask R-CNN", "COCO 2017", _VITDET),
        Reported("box_ap", 0.540, "MAE ViT-B/16, ViTDet with Cascade Mask R-CNN", "COCO 2017", _VITDET),
        Reported("mask_ap", 0.467, "MAE ViT-B/16, ViTDet with Cascade Mask R-CNN", "COCO 2017", _VITDET),
    ),
}
"""By task, the one to show first at the beginning (of each metric)."""


def first(task: str, metric: str) -> Reported | None:
    """The number to stand beside a result in a table: of the same metric, whatever its k."""
    base = metric if task != "knn" else metric.partition("@")[0]
    return next((one for one in PAPERS.get(task, ()) if one.metric == base), None)
