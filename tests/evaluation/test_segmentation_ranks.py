"""Two processes measure what one does."""

import pytest
import torch
from processes import Processes
from segmentation_parts import PatchColours, config, squares

from harmony.errors import UserError
from harmony.evaluation import segmentation
from harmony.evaluation.task import Setup
from harmony.training import distributed


def both(folder):
    """Zero-shot, and a trained head: metrics, the report's examples, and the weights of this rank."""
    encoder, data, train = PatchColours(), squares(7), squares(8, seed=1)
    data.examples[3] = data.examples[3].__class__("maskless", data.examples[3].image)
    untrained = segmentation.run(Setup(encoder, data, None, config(head="zero_shot")))
    setup = Setup(encoder, data, train, config(steps=6), folder)
    segmenter, groups = segmentation.build(setup)
    segmentation.train(segmenter, groups, range(8), setup)
    return untrained.metrics, untrained.details, segmenter.state_dict()


def rank_of_two(folder):
    with distributed.session() as place:
        assert place.ranks == 2
        torch.save(both(folder / "work"), folder / f"{place.rank}.pt")
        try:
            setup = Setup(PatchColours(), squares(2), squares(1), config())
            segmentation.train(*segmentation.build(setup), range(1), setup)
        except UserError as error:
            (folder / f"{place.rank}.txt").write_text(str(error))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    Processes(rank_of_two, folder, ranks=2, output=folder / "printed").finish()
    return folder, [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


def test_pixels_are_counted_over_all_ranks(found, tmp_path):
    alone = both(tmp_path)
    for metrics, details, _ in found[1]:
        assert metrics == alone[0]
        assert details == alone[1]
    assert alone[0]["bad_examples"] == 1


def test_all_ranks_end_with_the_same_weights_and_one_writes_them(found):
    folder, ((_, _, first), (_, _, second)) = found
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert int(first["norm.num_batches_tracked"]) == 6
    # The checkpoint goes when the results are written.
    assert {path.name for path in (folder / "work").iterdir()} == {"fit.pt", "model.safetensors"}


def test_fewer_images_than_ranks_are_refused(found):
    for number in range(2):
        assert "training examples: 1, but a step needs at least 2" in (found[0] / f"{number}.txt").read_text()
