"""One miniature of ImageNet, with images of every odd kind, in each of the layouts it comes in."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

NAMES = {  # by wnid; not in the order of the ILSVRC ids
    "n02119789": "kit fox, Vulpes macrotis",
    "n01440764": "tench, Tinca tinca",
    "n04228054": "ski",
    "n03445777": "golf ball",
}
WNIDS = sorted(NAMES)
HIGHER = {"n00001740": "entity", "n02083346": "canine, canid"}
IDS = {wnid: number for number, wnid in enumerate([*NAMES, *HIGHER], 1)}


def _file(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _odd_files() -> list[bytes]:
    """JPEGs of all kinds, and other things that are called .JPEG."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    rgb = noise.resize((45, 35), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    ycck = bytearray(_file(rgb.convert("CMYK"), "JPEG"))
    ycck[ycck.index(b"Adobe") + 11] = 2
    deep = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    return [
        _file(rgb, "JPEG"),
        _file(rgb.convert("L"), "JPEG"),
        _file(rgb.convert("CMYK"), "JPEG"),
        bytes(ycck),
        _file(rgb, "JPEG", exif=turned),
        _file(rgb, "JPEG", progressive=True, quality=30),
        _file(rgb, "PNG"),
        _file(rgb, "BMP"),
        _file(rgb.quantize(16), "PNG", transparency=3),
        _file(rgb.resize((20, 90)).convert("RGBA"), "PNG"),
        _file(deep, "PNG"),
        _file(rgb.quantize(), "GIF"),
    ]


def _miniature() -> tuple[dict[str, dict[str, bytes]], dict[str, tuple[str, bytes]]]:
    odd = _odd_files()
    train = {
        wnid: {f"{wnid}_{10 + 7 * i}.JPEG": odd[(5 * label + i) % 12] for i in range(5 + label)}
        for label, wnid in enumerate(WNIDS)
    }
    val = {
        f"ILSVRC2012_val_{i + 1:08d}.JPEG": (WNIDS[(3 * i + i // 4) % 4], odd[i]) for i in range(12)
    }
    train[WNIDS[1]][f"{WNIDS[1]}_99.JPEG"] = b"this is no image"  # one that is set aside
    return train, val


TRAIN, VAL = _miniature()
"""By wnid and file name: the file; by file name: wnid and file."""


def write_folder(root: Path) -> None:
    for wnid in WNIDS:
        for name, content in TRAIN[wnid].items():
            _put(root / "train" / wnid / name, content)
    for name, (wnid, content) in VAL.items():
        _put(root / "val" / wnid / name, content)


def write_archives(root: Path) -> None:
    root.mkdir(parents=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in reversed(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for name, content in reversed(TRAIN[wnid].items()):
                    _add(tar, name, content)
            _add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for name in sorted(VAL, reverse=True):
            _add(tar, name, VAL[name][1])
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        truth = "".join(f"{IDS[VAL[name][0]]}\n" for name in sorted(VAL))
        _add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"development kit")
        _add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", _meta())
        ground_truth = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
        _add(tar, ground_truth, truth.encode())


def _meta() -> bytes:
    """The challenge's classes and the inner nodes above them, in the order of their ids."""
    kinds = [
        ("ILSVRC2012_ID", "O"),
        *((field, "O") for field in ("WNID", "words", "gloss", "num_children", "children")),
        *((field, "O") for field in ("wordnet_height", "num_train_images")),
    ]
    rows = []
    for wnid, number in IDS.items():
        below = [] if wnid in NAMES else [IDS["n02119789"], IDS["n01440764"]]
        words = (NAMES | HIGHER)[wnid]
        rows.append((number, wnid, words, "gloss", len(below), np.array(below, float), 0, 5))
    file = io.BytesIO()
    savemat(file, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    return file.getvalue()


def write_kaggle(root: Path) -> None:
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    for wnid in WNIDS:
        for name, content in TRAIN[wnid].items():
            _put(images / "train" / wnid / name, content)
    for name, (_, content) in VAL.items():
        _put(images / "val" / name, content)
    _put(images / "test" / "ILSVRC2012_test_00000001.JPEG", b"without a label")
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for name in sorted(VAL, key=lambda name: name[::-1]):
            wnid = VAL[name][0]
            writer.writerow([name.removesuffix(".JPEG"), f"{wnid} 1 2 30 40 {wnid} 5 6 7 8 "])
    lines = (f"{wnid} {NAMES[wnid]}\n" for wnid in WNIDS)
    (root / "LOC_synset_mapping.txt").write_text("".join(lines))


def write_parquet(root: Path) -> None:
    """As in ILSVRC/imagenet-1k, whose paths end with the wnid."""
    train = [
        (name, wnid, content) for wnid in WNIDS for name, content in sorted(TRAIN[wnid].items())
    ]
    train = train[1::2] + train[::2]  # the hub's are shuffled
    half = len(train) // 2
    val = [(name, wnid, content) for name, (wnid, content) in VAL.items()]
    (root / "data").mkdir(parents=True)
    _write_rows(root / "data" / "train-00000-of-00002.parquet", train[:half])
    _write_rows(root / "data" / "train-00001-of-00002.parquet", train[half:])
    _write_rows(root / "data" / "validation-00000-of-00001.parquet", val)
    _write_rows(root / "data" / "test-00000-of-00001.parquet", [("test_1.JPEG", None, b"secret")])


def write_arrow(root: Path) -> None:
    """As save_to_disk writes imagenet-1k."""
    splits = {
        "train": [[(n, w, c) for n, c in TRAIN[w].items()] for w in reversed(WNIDS)],
        "validation": [[(n, w, c) for n, (w, c) in VAL.items()]],
        "test": [[("test_1.JPEG", None, b"secret")]],
    }
    root.mkdir(parents=True)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    for split, files in splits.items():
        names = [f"data-{i:05d}-of-{len(files):05d}.arrow" for i in range(len(files))]
        for name, rows in zip(names, files, strict=True):
            (root / split).mkdir(exist_ok=True)
            table = _table(rows)
            with pa.ipc.new_stream(root / split / name, table.schema) as stream:
                stream.write_table(table, max_chunksize=3)
        state = {"_data_files": [{"filename": name} for name in names], "_split": split}
        (root / split / "state.json").write_text(json.dumps(state))


def _write_rows(file: Path, rows: list[tuple[str, str | None, bytes]]) -> None:
    pq.write_table(_table(rows), file, row_group_size=4)


def _table(rows: list[tuple[str, str | None, bytes]]) -> pa.Table:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": [NAMES[wnid] for wnid in WNIDS], "_type": "ClassLabel"},
    }
    images = [
        {"bytes": content, "path": f"{name.removesuffix('.JPEG')}_{wnid}.JPEG" if wnid else name}
        for name, wnid, content in rows
    ]
    labels = [WNIDS.index(wnid) if wnid else -1 for _, wnid, _ in rows]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata=about)
    return pa.table({"image": pa.array(images, kind), "label": labels}, schema=schema)


def write_wds(root: Path) -> None:
    """As in timm/imagenet-1k-wds: the key and, in the json, the file's name in class folders."""
    root.mkdir(parents=True)
    train = [
        (f"{wnid}/{name}", wnid, content) for wnid in WNIDS for name, content in TRAIN[wnid].items()
    ]
    train = train[1::2] + train[::2]
    val = [(f"{wnid}/{name}", wnid, content) for name, (wnid, content) in VAL.items()]
    half = len(train) // 2
    for file, samples in {
        "imagenet1k-train-0000.tar": train[:half],
        "imagenet1k-train-0001.tar": train[half:],
        "imagenet1k-validation-00.tar": val,
    }.items():
        with tarfile.open(root / file, "w") as tar:
            for name, wnid, content in samples:
                key = Path(name).stem
                label = WNIDS.index(wnid)
                about = {"filename": name, "height": 35, "label": label, "width": 45}
                _add(tar, f"{key}.cls", str(label).encode())
                _add(tar, f"{key}.jpg", content)
                _add(tar, f"{key}.json", json.dumps(about).encode())


def _put(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


WRITERS = {
    "folder": write_folder,
    "archives": write_archives,
    "kaggle": write_kaggle,
    "parquet": write_parquet,
    "wds": write_wds,
    "arrow": write_arrow,
}
LAYOUTS = tuple(WRITERS)
HAVE_NAMES = ("archives", "kaggle", "parquet", "arrow")
"""Layouts that say what people call the classes."""
