"""Two processes measure what one does."""

import multiprocessing
import os
import socket

import pytest
import torch
from segmentation_parts import PatchColours, config, squares

from harmony import ranks
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


def rank_of_two(number, port, folder):
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with distributed.session():
        assert ranks.count() == 2
        torch.save(both(folder / "work"), folder / f"{number}.pt")
        try:
            setup = Setup(PatchColours(), squares(2), squares(1), config())
            segmentation.train(*segmentation.build(setup), range(1), setup)
        except UserError as error:
            (folder / f"{number}.txt").write_text(str(error))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    members = [fork.Process(target=rank_of_two, args=(number, port, folder)) for number in range(2)]
    for member in members:
        member.start()
    for member in members:
        member.join(60)
        member.kill()
    assert [member.exitcode for member in members] == [0, 0]
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
