import plain_metrics as plain
import pytest

from harmony.errors import UserError
from harmony.evaluation import zero_shot
from harmony.evaluation.class_names import load_names, names_for
from harmony.evaluation.settings import EvaluationConfig
from harmony.evaluation.tasks import config_for


class Nameless(plain.Colours):
    """Labels without names."""

    def __init__(self, labels):
        super().__init__(labels, names=None)

    def has_labels(self):
        return True


def config(classes):
    return EvaluationConfig(workers=0, batch_size=3, zero_shot={"classes": str(classes)})


def test_imagenet_has_a_thousand_names_that_differ():
    names = load_names("imagenet")
    assert len(names) == len(set(names)) == 1000
    assert (names[0], names[999]) == ("tench", "toilet paper")
    assert (names[657], names[744], names[836], names[837]) == ("missile", "projectile", "sunglass", "sunglasses")


@pytest.mark.parametrize("form", ["txt", "list", "json"])
def test_names_of_a_file_stand_in_for_those_of_the_data(tmp_path, form):
    file = tmp_path / ("names.txt" if form == "txt" else "names.json")
    quoted = ", ".join(f'"{name}"' for name in plain.NAMES)
    text = {
        "txt": "\n".join(plain.NAMES),
        "list": f"[{quoted}]",
        "json": f'{{"classes": ["1", "2", "3", "4", "5", "6", "7"], "readable_names": [{quoted}]}}',
    }
    file.write_text(text[form])
    # The encoder knows colours alone: with the data's own names it could not read a prompt.
    source = plain.Colours([0, 1, 2, 6], names=list("abcdefg"))
    outcome = zero_shot.run(plain.setup(plain.ColourEncoder(), source, config(file)))
    assert outcome.metrics["top1"] == 1
    nameless = plain.setup(plain.ColourEncoder(), Nameless([0, 1, 2, 6]), config(file))
    assert zero_shot.missing(nameless) is None
    assert zero_shot.run(nameless).metrics["top1"] == 1
    assert f"its classes named by {file}" in zero_shot.card(nameless).split


def test_lists_that_do_not_match_the_labels_are_refused(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("red\ngreen\nblue\n")
    named = plain.setup(plain.ColourEncoder(), plain.Colours([0, 1, 2]), config(file))
    with pytest.raises(UserError, match="has 3 names, but colours: has 7 classes; give one name a class"):
        zero_shot.missing(named)
    nameless = plain.setup(plain.ColourEncoder(), Nameless([0, 5]), config(file))
    with pytest.raises(UserError, match="has the label 5 but only 3 class names"):
        zero_shot.run(nameless)
    file.write_text("red\ngreen\nred\n")
    with pytest.raises(UserError, match="'red' stands for several classes"):
        zero_shot.run(plain.setup(plain.ColourEncoder(), Nameless([0, 1]), config(file)))


def test_names_that_are_neither_a_set_nor_a_file_are_refused():
    with pytest.raises(UserError, match=r"unknown class names 'imagnet'; did you mean 'imagenet'\? \(a file with"):
        names_for(plain.Colours([0]), "imagnet")


def test_data_without_names_says_how_to_give_them():
    setup = plain.setup(plain.ColourEncoder(), Nameless([0]))
    assert "name them with --set classes=FILE (or imagenet)" in (zero_shot.missing(setup) or "")
    assert config_for("zero_shot", {"classes": "imagenet"}).zero_shot.classes == "imagenet"
