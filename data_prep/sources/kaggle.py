"""ImageNet as Kaggle's object localization challenge packs it."""

import csv
from pathlib import Path

from data_prep.sources.base import Group, Grouped, is_image
from data_prep.sources.folder import images_by_class
from tarflow_dist.errors import UserError

IMAGES = Path("ILSVRC/Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"
MAPPING = "LOC_synset_mapping.txt"


class Kaggle(Grouped):
    """A folder with ILSVRC/Data/CLS-LOC/{train/WNID, val}, LOC_val_solution.csv (ImageId,
    PredictionString, which starts with a wnid) and LOC_synset_mapping.txt (wnid and names a line).
    The test images have no labels and are left out.

    Raises:
        UserError: `path` is no such folder.
    """

    def __init__(self, path: Path):
        train = images_by_class(path / IMAGES / "train")
        names = dict(line.partition(" ")[::2] for line in _text(path / MAPPING).splitlines())
        classes = sorted(names)
        if set(train) != set(classes):
            odd = sorted(set(train) ^ set(classes))[0]
            raise UserError(f"{path / MAPPING} and {path / IMAGES / 'train'} disagree about {odd}")
        groups = [
            Group("train", label, f"train/{wnid}/", *train[wnid])
            for label, wnid in enumerate(classes)
        ]
        solution = _solution(path / SOLUTION)
        if unknown := sorted(set(solution) - set(classes)):
            raise UserError(f"{path / SOLUTION} has a class that train lacks: {unknown[0]}")
        val = path / IMAGES / "val"
        there = {f.stem for f in val.iterdir() if is_image(f.name)} if val.is_dir() else set()
        if unknown := sorted(there - {Path(f).stem for files in solution.values() for f in files}):
            raise UserError(f"{path / SOLUTION} does not label {unknown[0]}, which is in {val}")
        groups += [
            Group("val", label, f"val/{wnid}/", val, sorted(solution[wnid]))
            for label, wnid in enumerate(classes)
            if wnid in solution
        ]
        super().__init__("kaggle", path, classes, groups, [names[wnid] for wnid in classes])

    @staticmethod
    def recognises(path: Path) -> bool:
        return (path / IMAGES).is_dir()


def _solution(file: Path) -> dict[str, list[str]]:
    """The validation images' file names by wnid."""
    found: dict[str, list[str]] = {}
    try:
        for row in csv.DictReader(_text(file).splitlines()):
            wnid = row["PredictionString"].split()[0]  # then boxes, and other boxes' wnids
            found.setdefault(wnid, []).append(f"{row['ImageId']}.JPEG")
    except (KeyError, IndexError, AttributeError, csv.Error) as error:
        raise UserError(f"{file} has no ImageId and PredictionString in each line") from error
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {file}, which is needed beside ILSVRC/: {error}") from error
