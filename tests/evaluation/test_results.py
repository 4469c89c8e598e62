import json
import os

import pytest

from harmony.errors import UserError
from harmony.evaluation.results import read_details, read_metrics, write_details, write_json, write_metrics


def test_tasks_are_kept_side_by_side(tmp_path):
    write_metrics(tmp_path / "out", "zero_shot", {"top1": 0.25})
    write_metrics(tmp_path / "out", "retrieval", {"text_to_image_recall@1": 0.5})
    write_metrics(tmp_path / "out", "zero_shot", {"top1": 0.75})
    expected = {"zero_shot": {"top1": 0.75}, "retrieval": {"text_to_image_recall@1": 0.5}}
    assert read_metrics(tmp_path / "out") == expected
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == expected


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_metrics(tmp_path, "zero_shot", {"top1": 0.25})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_metrics(tmp_path, "zero_shot", {"top1": float("nan")})
    with pytest.raises(TypeError):
        write_json(tmp_path / "metrics.json", {"task": object()})
    assert read_metrics(tmp_path) == {"zero_shot": {"top1": 0.25}}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_a_full_disk_is_told_in_one_sentence_and_leaves_the_old_file(tmp_path):
    write_metrics(tmp_path, "zero_shot", {"top1": 0.25})
    (tmp_path / f".metrics.json.{os.getpid()}").symlink_to("/dev/full")  # where it is written before it is renamed
    with pytest.raises(UserError, match=f"no room on the disk at {tmp_path}/metrics.json; free some and run again"):
        write_metrics(tmp_path, "zero_shot", {"top1": 0.75})
    assert read_metrics(tmp_path) == {"zero_shot": {"top1": 0.25}}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("content", ['{"zero_shot": {"top1": 0.2', "[1, 2]", '{"zero_shot": 3}'])
def test_damaged_metrics_are_not_overwritten(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.json"):
        write_metrics(tmp_path, "zero_shot", {"top1": 0.25})
    assert (tmp_path / "metrics.json").read_text() == content


def test_details_come_back_and_may_be_missing_or_damaged(tmp_path):
    assert read_details(tmp_path, "retrieval") is None
    write_details(tmp_path, "retrieval", {"data": "scenes:val"})
    assert read_details(tmp_path, "retrieval") == {"data": "scenes:val"}
    (tmp_path / "evaluation" / "retrieval.json").write_text("{")
    assert read_details(tmp_path, "retrieval") is None
