"""Classes by name, from the data to the command line."""

import json
from pathlib import Path

import pytest
from test_tarflow import small_flow

from tarflow_dist import TarFlow
from tarflow_dist.errors import UserError
from tarflow_dist.models.classes import Classes
from tarflow_dist.options import class_numbers

PETS = Classes(["cats", "cats, big", '12" dogs', "7", "random"])
BIRDS = Classes(
    ["n01", "n02", "n03", "n04"],
    ["crane", "tench, Tinca tinca", "crane, tower crane", "bee eater"],
)


@pytest.mark.parametrize(
    ("classes", "text", "numbers"),
    [
        (PETS, "cats", [0]),
        (PETS, '"cats, big"', [1]),
        (PETS, ' cats , "cats, big",4,0', [0, 1, 4, 0]),
        (PETS, '"12"" dogs","7",random', [2, 3, 4]),
        (PETS, "-1,2", [-1, 2]),
        (Classes(["0", "1", "2"]), "2,0", [2, 0]),
        (Classes(), "3,-1", [3, -1]),
        (BIRDS, 'tench,n04,"tench, Tinca tinca",bee eater', [1, 3, 1, 3]),
        (BIRDS, '"crane, tower crane"', [2]),
        (BIRDS, "crane", [0]),
    ],
)
def test_labels_are_ids_or_names(classes: Classes, text: str, numbers: list[int]) -> None:
    assert classes.numbers(text) == numbers


@pytest.mark.parametrize(
    ("classes", "text", "sentence"),
    [
        (PETS, "cats, big", "no class 'big': they are cats, cats, big"),
        (PETS, "7", "7 is the id of one class and the name of another"),
        (PETS, "cats,", "no class ''"),
        (PETS, '"cats', "no class '\"cats'"),
        (Classes(), "cats", "no class id, and the model does not know its names"),
        (Classes(["a", "a"]), "a", "classes 0, 1 are all called 'a'"),
        (Classes(["a", "b"], ["x, y", "x, z"]), "x", "classes 0, 1 are all called 'x'"),
    ],
)
def test_what_names_no_class_is_told(classes: Classes, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        classes.numbers(text)


def test_a_model_keeps_its_names(tmp_path: Path) -> None:
    flow = small_flow(num_classes=4)
    flow.save_pretrained(tmp_path)
    assert TarFlow.from_pretrained(tmp_path).class_names == []
    flow.classes = BIRDS
    flow.save_pretrained(tmp_path)
    loaded = TarFlow.from_pretrained(tmp_path)
    assert loaded.classes == BIRDS
    assert loaded.class_names == list(BIRDS.words)
    assert class_numbers("n03,-1", loaded) == [2, -1]
    with pytest.raises(UserError, match=r"class ids go from 0 to 3$"):
        class_numbers("n03,-1", loaded, least=0)


def test_a_model_of_before_there_were_names_is_loaded(tmp_path: Path) -> None:
    small_flow().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({"names": ["a"]}, {"names": "abc"}, {"names": [1, 2, 3]}, ["a", "b", "c"]):
        changed = {k: v for k, v in content.items() if k != "xxh3_128"} | {"classes": wrong}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="describes no TARFlow"):
            TarFlow.from_pretrained(tmp_path)
    del changed["classes"]
    (tmp_path / "config.json").write_text(json.dumps(changed))
    assert TarFlow.from_pretrained(tmp_path).class_names == []
