"""What the report says about losses, signs and metrics, each in a sentence."""

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
    "dino": "Every crop predicts what the teacher sees in another crop of the same image.",
    "ibot": "At each hidden patch the student predicts what the teacher sees there.",
    "mae": "Squared error of the pixels that the decoder predicts for removed patches.",
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
        "pairs found", "Share of the images that pick their own caption out of the batch.", share=True
    ),
    "accuracy": Words("words named", "Share of the hidden words whose likeliest guess is right.", share=True),
}

OTHER_SIGN = Words("", "Logged by the objective itself.")

TASKS = {
    "zero_shot": "Zero-shot classification",
    "retrieval": "Retrieval",
}

HEADLINES = {
    "zero_shot": ("top1", "top5", "mean_per_class"),
    "retrieval": (
        "text_to_image_recall@1",
        "image_to_text_recall@1",
        "text_to_image_recall@5",
        "image_to_text_recall@5",
    ),
}
"""The metrics shown as cards, the most important first."""

_METRICS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_per_class": "mean over classes",
}


def metric(name: str) -> str:
    """A metric's name for people: text_to_image_recall@1 -> text to image, recall@1."""
    if name in _METRICS:
        return _METRICS[name]
    words = name.replace("text_to_image_", "text to image, ").replace("image_to_text_", "image to text, ")
    return words.replace("_", " ")
