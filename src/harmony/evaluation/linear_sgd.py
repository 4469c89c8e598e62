"""The linear probe as papers train it: SGD on random crops and flips, through the frozen encoder.

Heads of all inputs and learning rates are trained side by side on one encoding of each batch, as DINOv2 does (arXiv
2304.07193, B.3). A head learns nothing from another one: their losses are added, and no weight is shared.
Each starts from zero, so that no chance is in it, and sees features that are standardised by training statistics, in
place of the batch norm without weights of MAE's probe (arXiv 2111.06377, A.1).

Shapes: B images of a batch, L last blocks, D width of a token, C classes, S pixels a side.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from harmony.evaluation.batches import read_again
from harmony.evaluation.encoders import hash_of
from harmony.evaluation.fitting import Batches, Group, fit
from harmony.evaluation.linear_data import Inputs, Probed
from harmony.evaluation.logistic import Classifier, statistics
from harmony.evaluation.task import Setup

MOMENTUM = 0.9


class Augmented(Batches[tuple[Tensor, Tensor]]):
    """Batches of random crops (B, 3, S, S) uint8 and their labels (B,).

    Args:
        setup: source, settings.
        train: its labelled examples.
        fitted: (N,) positions among them that are trained on.
    """

    def __init__(self, setup: Setup, train: Probed, fitted: Tensor) -> None:
        config = setup.config.linear
        super().__init__(len(fitted), config)
        assert setup.train is not None
        self._source, self._max_pixels = setup.train, setup.max_pixels
        self._indices, self._labels = train.indices[fitted], train.labels[fitted]
        crop = v2.RandomResizedCrop(
            setup.size, (config.smallest_crop, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        )
        self._augment = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def make(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        places = self._indices[list(positions)].tolist()
        pixels = [self._augment(read_again(self._source, place, self._max_pixels)) for place in places]
        return torch.stack(pixels), self._labels[list(positions)]


class Heads(nn.Module):
    """One linear classifier for each kind of input and learning rate.

    Args:
        inputs: the kinds.
        rates: how many learning rates.
        train: what the standardisation is from.
        classes: C.
    """

    def __init__(self, inputs: Sequence[Inputs], rates: int, train: Probed, classes: int) -> None:
        super().__init__()
        self.inputs, self.rates = list(inputs), rates
        heads: list[nn.Linear] = []
        for place, kind in enumerate(self.inputs):
            mean, scale = statistics(kind.of(train.cls, train.patches))
            self.register_buffer(f"mean_{place}", mean)
            self.register_buffer(f"scale_{place}", scale)
            for _ in range(rates):
                head = nn.Linear(len(mean), classes)
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
                heads.append(head)
        self.heads = nn.ModuleList(heads)

    @property
    def linears(self) -> list[nn.Linear]:
        """The heads, rates innermost."""
        return [head for head in self.heads if isinstance(head, nn.Linear)]

    def forward(self, cls: Tensor, patches: Tensor) -> list[Tensor]:
        """(B, L, D), (B, D) -> (B, C) scores of every head, rates innermost."""
        scores = []
        for place, kind in enumerate(self.inputs):
            mean, scale = self.get_buffer(f"mean_{place}"), self.get_buffer(f"scale_{place}")
            standardised = (kind.of(cls, patches) - mean) / scale
            scores += [head(standardised) for head in self.heads[place * self.rates : (place + 1) * self.rates]]
        return scores

    def classifier(self, place: int) -> Classifier:
        """One head alone."""
        head, kind = self.linears[place], place // self.rates
        statistics = (self.get_buffer(f"mean_{kind}"), self.get_buffer(f"scale_{kind}"))
        return Classifier(head.weight.detach(), head.bias.detach(), *statistics)


def train_heads(setup: Setup, train: Probed, fitted: Tensor, inputs: Sequence[Inputs], classes: int) -> Heads:
    """Train on the positions `fitted` of the training set.

    Raises:
        UserError: the batch cannot be divided among processes.
        Interrupted: a signal stopped it, after saving.
    """
    config, encoder = setup.config.linear, setup.encoder
    assert setup.train is not None
    batches = Augmented(setup, train, fitted)
    chosen = Probed(train.cls[fitted], train.patches[fitted], train.labels[fitted], train.indices[fitted], 0, 0)
    heads = Heads(inputs, len(config.lr_factors), chosen, classes).to(encoder.device)
    most = max(kind.layers for kind in inputs)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, labels = (part.to(encoder.device, non_blocking=True) for part in batch)
        layers = encoder.encode(encoder.normalise(pixels), most).layers
        cls = torch.stack([layer.cls for layer in layers], dim=1).float()
        scores = heads(cls, layers[-1].patches.float().mean(dim=(2, 3)))
        return torch.stack([F.cross_entropy(each.float(), labels) for each in scores]).sum()

    groups = []
    for place, head in enumerate(heads.linears):
        factor = config.lr_factors[place % heads.rates]
        groups += [
            Group([head.get_parameter("weight")], factor),
            Group([head.get_parameter("bias")], factor, decays=False),
        ]
    fit(
        heads,
        loss,
        batches,
        groups,
        f"training {len(heads.heads)} linear heads on {len(fitted):,} images",
        device=encoder.device,
        workers=setup.config.workers,
        work=setup.work,
        about={
            "task": "linear",
            "encoder": encoder.fingerprint(),
            "size": setup.size,
            "data": setup.train.stamp(),
            "labels": hash_of([("indices", chosen.indices), ("labels", chosen.labels)], ""),
        },
        make_optimiser=partial(torch.optim.SGD, momentum=MOMENTUM),
    )
    return heads
