"""What the report says about losses, signs and metrics, each in a sentence."""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Words(NamedTuple):
    """A title, a sentence, and whether the values are shares."""

    title: str
    says: str
    share: bool = False


LOSSES = {
    "clip": "Each image picks its caption out of the batch, and each caption its image; at first near the log of the "
    "batch size.",
    "siglip": "Each image-caption pair of the batch is judged by itself: does it belong together?",
    "simclr": "Every crop picks the other crop of its image out of all crops of the batch.",
    "vicreg": "Embeddings of two crops of an image differ little, vary from image to image, and have variables that "
    "do not follow each other.",
    "swav": "Every crop predicts the cluster that another crop of its image was given, clusters being used alike.",
    "mocov3": "Each crop's query picks the key that the teacher makes of the other crop out of the batch's keys.",
    "densecl": "A crop, and each of its patches, picks the teacher's key of the other crop out of many earlier ones.",
    "supcon": "Every crop picks the crops of its class out of all crops of the batch.",
    "dino": "Every crop predicts what the teacher sees in another crop of the same image.",
    "ibot": "At each hidden patch the student predicts what the teacher sees there.",
    "koleo": "Class tokens keep away from their nearest neighbours; it falls as the features of a batch spread.",
    "mae": "Squared error of the pixels that the decoder predicts for removed patches.",
    "masked_distillation": "At each removed patch a decoder predicts what the teacher sees there.",
    "mlm": "Hidden words are named from the words around them; an even guess over the vocabulary costs 10.8.",
    "text_distillation": "At each hidden word the student predicts what the teacher makes of the whole caption there.",
}

SIGNS = {
    "target_entropy": Words(
        "target entropy",
        "How undecided the teacher's targets are, in nats. Zero is always certain, an even guess says nothing; "
        "both ends are collapses.",
    ),
    "prototype_use": Words(
        "prototypes in use",
        "How evenly the prototypes are used over a batch; near zero, all images fall onto a few.",
        share=True,
    ),
    "teacher_student_kl": Words(
        "teacher-student divergence",
        "What the student has yet to learn from the teacher, in nats; a steady zero means nothing is left to learn.",
    ),
    "rank": Words(
        "effective feature rank",
        "In how many directions the features of a batch spread; at 1 everything looks alike.",
    ),
    "std": Words(
        "feature spread",
        "Standard deviation of unit-length features times the root of their width: 1 is even, 0 a collapse.",
    ),
    "batch_accuracy": Words(
        "pairs found",
        "Share of the images that pick their own caption, or their own other crop, out of the batch.",
        share=True,
    ),
    "positive_cosine": Words(
        "likeness of what belongs together", "Mean cosine of projections that should be alike; 1 is the same."
    ),
    "negative_cosine": Words(
        "likeness of what does not",
        "Mean cosine of projections of different images; near 1 all look alike, a collapse.",
    ),
    "invariance": Words("invariance", "Mean squared distance between the embeddings of two crops of an image."),
    "variance": Words("missing variance", "How far the standard deviations of the embedding stay below 1; 2 at most."),
    "covariance": Words("covariance", "Squared covariances between different variables of the embedding."),
    "spread": Words(
        "embedding spread", "Standard deviation over a batch of the embedding's variables; 0 is a collapse."
    ),
    "patch_accuracy": Words(
        "patches found", "Share of the patches that pick their partner in the other crop out of the queue.", share=True
    ),
    "matched": Words("patches with a partner", "Share of the patches that have one in the other crop.", share=True),
    "nearest": Words(
        "distance to the nearest",
        "Mean distance of unit-length class tokens to their nearest neighbour; zero is a collapse.",
    ),
    "accuracy": Words("words named", "Share of the hidden words whose likeliest guess is right.", share=True),
}

OTHER_SIGN = Words("", "Logged by the objective itself.")

TASKS = {
    "zero_shot": "Zero-shot classification",
    "retrieval": "Retrieval",
    "knn": "Nearest neighbours",
    "linear": "Linear probe",
    "fine_tune": "Fine-tuning",
    "segmentation": "Semantic segmentation",
    "detection": "Detection",
}

SAYS = {
    "zero_shot": "Each image goes to the class whose name, put into prompts and read by the text tower, is most "
    "similar to it. Nothing is trained.",
    "retrieval": "Each caption with the five images most similar to it; its own image is outlined. Where that is not "
    "among the five, it stands behind the dots.",
    "knn": "Each image takes the class that the most similar training images vote for. Nothing is trained, so this is "
    "what the features themselves hold.",
    "linear": "One linear layer learns the classes from frozen features.",
    "fine_tune": "The whole encoder is trained on the classes, from the weights that pre-training left.",
    "segmentation": "Every pixel gets a class.",
    "detection": "Boxes, and masks where the data have them, are drawn around things and named.",
}

HEADLINES = {
    "zero_shot": ("top1", "top5", "mean_per_class"),
    "retrieval": (
        "text_to_image_recall@1",
        "image_to_text_recall@1",
        "text_to_image_recall@5",
        "image_to_text_recall@5",
    ),
    "knn": ("top1@20", "top1@10", "top1@100", "top1@200", "top1@5", "top1@1", "top1"),
    "linear": ("top1", "top5", "mean_per_class"),
    "fine_tune": ("top1", "top5", "mean_per_class"),
    "segmentation": ("miou", "mean_accuracy", "pixel_accuracy"),
    "detection": ("box_ap", "mask_ap", "box_ap50", "mask_ap50"),
}
"""The metrics shown as cards, the most important first."""

BOTH = ("retrieval", "detection")
"""Tasks with two metrics of equal rank, which both stand in the table of all tasks."""

COUNTS = ("examples", "images", "captions", "unlabelled", "bad_examples", "classes")
"""Metrics that are numbers of things, whatever their values."""

CARD = {
    "resolution": "resolution",
    "split": "split",
    "selection": "selection",
    "optimiser": "optimiser",
    "schedule": "schedule",
    "differs": "differs from the papers",
}

_METRICS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_per_class": "mean over classes",
    "miou": "mean IoU",
    "mean_accuracy": "mean class accuracy",
    "pixel_accuracy": "pixel accuracy",
}

_AP = re.compile(r"(box|mask)_a([pr])_?(50|75|small|medium|large|s|m|l|\d+)?")
_SIZES = {"s": "small things", "m": "medium things", "l": "large things"}


def metric(name: str) -> str:
    """A metric's name for people: text_to_image_recall@1 -> text to image, recall@1; box_ap50 -> box AP50."""
    if name in _METRICS:
        return _METRICS[name]
    if found := _AP.fullmatch(name):
        kind, letter, rest = found[1], found[2].upper(), found[3] or ""
        return f"{kind} A{letter}{rest}" if rest[:1].isdigit() or not rest else f"{kind} A{letter}, {_SIZES[rest[0]]}"
    base, at, k = name.partition("@")
    if at and base in _METRICS:
        return f"{_METRICS[base]}, k = {k}"
    words = name.replace("text_to_image_", "text to image, ").replace("image_to_text_", "image to text, ")
    return words.replace("_", " ")


def headlines(task: str, numbers: Mapping[str, float]) -> list[str]:
    """Those of a task's headline metrics that it has, the most important first; all it has for an unknown task."""
    named = [name for name in HEADLINES.get(task, ()) if name in numbers]
    return named or [name for name in numbers if not name.startswith("chance_") and name not in COUNTS]


def chance_of(name: str, numbers: Mapping[str, float]) -> float | None:
    """The chance level of a metric: its own, or for a metric at some k the one that holds for every k."""
    return numbers.get(f"chance_{name}", numbers.get(f"chance_{name.partition('@')[0]}"))
