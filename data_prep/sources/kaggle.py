"""ImageNet as Kaggle's object localization challenge packs it."""

import csv
from pathlib import Path

from data_prep.sources.base import Group, Source
from data_prep.sources.names import check_distinct
from data_prep.sources.storage import damage_named, read_file
from data_prep.sources.walk import class_folders, images_in
from tarflow_dist.errors import UserError
from tarflow_dist.files import inside

IMAGES = Path("ILSVRC/Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"
MAPPING = "LOC_synset_mapping.txt"


class Kaggle(Source):
    """A folder with ILSVRC/Data/CLS-LOC/{train/WNID, val}, LOC_val_solution.csv (ImageId,
    PredictionString, which starts with a wnid) and LOC_synset_mapping.txt (wnid and names a line).
    The test images have no labels and are left out.

    Raises:
        UserError: `path` is no such folder.
    """

    def __init__(self, path: Path):
        val = path / IMAGES / "val"
        found = class_folders(path / IMAGES / "train")
        in_val = images_in(val, deep=False)
        train, there = found.classes, set(in_val.names)
        names = dict(line.partition(" ")[::2] for line in _text(path / MAPPING).splitlines())
        classes = sorted(names)
        if set(train) != set(classes):
            odd = sorted(set(train) ^ set(classes))[0]
            raise UserError(f"{path / MAPPING} and {path / IMAGES / 'train'} disagree about {odd}")
        groups = [
            train[wnid].group("train", label, f"train/{wnid}/")
            for label, wnid in enumerate(classes)
        ]
        solution = _solution(path / SOLUTION)
        if unknown := sorted(set(solution) - set(classes)):
            raise UserError(f"{path / SOLUTION} has a class that train lacks: {unknown[0]}")
        labelled = [name for names_of_class in solution.values() for name in names_of_class]
        check_distinct(labelled, f"{path / SOLUTION} labels two images")
        if unknown := sorted(there - set(labelled)):
            raise UserError(f"{path / SOLUTION} does not label {unknown[0]}, which is in {val}")
        absent = frozenset(labelled) - there
        groups += [
            Group("val", label, f"val/{wnid}/", val, sorted(solution[wnid]), absent=absent)
            for label, wnid in enumerate(classes)
            if wnid in solution
        ]
        passed_over = found.passed_over + in_val.passed_over
        class_names = [names[wnid] for wnid in classes]
        super().__init__("kaggle", path, classes, groups, class_names, passed_over=passed_over)

    @staticmethod
    def recognises(path: Path) -> bool:
        return (path / IMAGES).is_dir()


def _solution(file: Path) -> dict[str, list[str]]:
    """The validation images' file names by wnid."""
    found: dict[str, list[str]] = {}
    with damage_named(f"{file} has no ImageId and PredictionString in each line"):
        for row in csv.DictReader(_text(file).splitlines()):
            wnid = row["PredictionString"].split()[0]  # then boxes, and other boxes' wnids
            name = inside(Path(), f"{row['ImageId']}.JPEG")
            found.setdefault(wnid, []).append(str(name))
    return found


def _text(file: Path) -> str:
    with damage_named(f"can't read {file}, which is needed beside ILSVRC/"):
        return read_file(file).decode()
