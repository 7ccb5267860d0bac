"""Models that go to a hub and come from it; the hub is tests/hub_server.py."""

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub_server import TOKEN, Hub
from huggingface_hub import constants, file_download
from PIL import Image
from test_tarflow import small_flow

from tarflow_dist import TarFlow, push, sample
from tarflow_dist.errors import UserError
from tarflow_dist.evaluation.metrics import FIGURES
from tarflow_dist.files import sha256
from tarflow_dist.models import hub
from tarflow_dist.models.classes import Classes

NAME = "someone/small"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    started = Hub()
    threading.Thread(target=started.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", started.url)
    template = started.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    yield started
    started.shutdown()
    started.server_close()


def model(folder: Path) -> TarFlow:
    flow = small_flow()
    flow.classes = Classes(["ant", "bee", "cow"])
    flow.provenance = {"images": 12_800, "weights": "ema"}
    flow.save_pretrained(folder)
    return flow


def same(one: TarFlow, other: TarFlow) -> bool:
    others = other.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in one.state_dict().items())


def test_what_is_pushed_comes_back_in_each_revision(
    server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = model(tmp_path / "model")
    push.main([str(tmp_path / "model"), NAME])
    assert f"{server.url}/{NAME}" in capsys.readouterr().out
    first, files = server.repos[NAME].commits[0]
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    with torch.no_grad():
        flow.blocks[0].pos_embed.add_(1)
    assert flow.push_to_hub(NAME) == f"{server.url}/{NAME}"
    server.repos[NAME].tags["v1"] = first
    assert same(TarFlow.from_pretrained(NAME), flow)
    for revision in (first, "v1"):
        loaded = TarFlow.from_pretrained(f"{NAME}@{revision}")
        assert same(loaded, TarFlow.from_pretrained(tmp_path / "model"))
        assert not same(loaded, flow)
        assert loaded.class_names == ["ant", "bee", "cow"]
    sample.main([f"{NAME}@v1", "--labels", "bee", "--out", str(tmp_path / "a.png")])
    sample.main([str(tmp_path / "model"), "--labels", "bee", "--out", str(tmp_path / "b.png")])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_only_what_can_run_no_code_is_fetched_and_that_once(server: Hub, tmp_path: Path) -> None:
    model(tmp_path / "model").push_to_hub(NAME)
    server.repos[NAME].commits[0][1].update({"pytorch_model.bin": b"", "train.py": b""})
    server.log.clear()
    found = hub.find(NAME)
    assert found.name == f"{NAME}@{server.repos[NAME].commits[0][0]}"
    assert {file.name for file in found.folder.iterdir()} == {"config.json", "model.safetensors"}
    asked = [line.rpartition("/")[2] for line in server.log if "/resolve/" in line]
    assert set(asked) == {"config.json", "model.safetensors"}
    server.log.clear()
    hub.find(found.name)
    assert not any("/resolve/" in line for line in server.log)  # a commit never changes
    server.shutdown()
    server.server_close()
    assert hub.find(NAME) == found  # the last known, where there is no network


def test_a_folder_comes_before_a_name(server: Hub, tmp_path: Path) -> None:
    model(tmp_path / "model").push_to_hub(NAME)
    here = small_flow(num_classes=0)
    here.save_pretrained(tmp_path / NAME)
    assert TarFlow.from_pretrained(NAME).config == here.config
    assert hub.find(NAME).name == NAME


def test_what_is_no_model_is_told_before_its_weights_are_fetched(server: Hub) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.create_repo("other/net", private=False)
    weights = CommitOperationAdd("model.safetensors", b"other weights")
    api.create_commit("other/net", [weights], commit_message="a")
    with pytest.raises(UserError, match=r"other--net.* holds no model \(config.json is missing"):
        hub.find("other/net")
    config = CommitOperationAdd("config.json", b'{"model_type": "bert"}')
    api.create_commit("other/net", [config], commit_message="b")
    with pytest.raises(UserError, match="is not a TARFlow's: it has no entry 'model'"):
        hub.find("other/net")
    assert not any("/large/" in line for line in server.log if line.startswith("GET"))


def test_what_the_hub_refuses_is_a_sentence(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(tmp_path / "model").push_to_hub(NAME, private=True)
    monkeypatch.delenv("HF_TOKEN")
    for name in (NAME, "no/model"):
        with pytest.raises(UserError, match=rf"^there is no folder {name}, .*hf auth login"):
            TarFlow.from_pretrained(name)
    with pytest.raises(UserError, match=r"^someone/other can't be written: .*hf auth login"):
        push.push(tmp_path / "model", "someone/other")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="has it, but not in this revision"):
        TarFlow.from_pretrained(f"{NAME}@v7")
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"can't be reached, and the cache .* lacks it"):
        TarFlow.from_pretrained("no/model")
    with pytest.raises(UserError, match=r"^someone/other can't be written: \S+ can't be reached$"):
        push.push(tmp_path / "model", "someone/other")


@pytest.mark.parametrize("name", ["small", "/a/b", "a/b/c", "a/b@", "../model"])
def test_what_is_neither_a_folder_nor_a_name(name: str) -> None:
    with pytest.raises(UserError, match=r"no folder .*, nor is that a name at the hub, .*USER"):
        TarFlow.from_pretrained(name)


def test_without_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'tarflow_dist\[hub\]'"):
        TarFlow.from_pretrained(NAME)
    model(tmp_path)
    with pytest.raises(UserError, match=r"pip install 'tarflow_dist\[hub\]'"):
        push.push(tmp_path, NAME)


def samples_of(folder: Path, weights_sha256: str) -> Path:
    """As sample_fid writes them."""
    folder.mkdir()
    result = dict.fromkeys(FIGURES) | {"frechet_distance": 3.25, "features": "inception-v3-2048"}
    result |= {"num_samples": 50_000, "labels": "random", "guidance": 1.5, "annealed": True}
    result |= {"seed": 0, "samples_sha256": "ab" * 32, "redrawn_samples": 7}
    result |= {"reference_images": 1000}
    result |= {"rule": "gaussian", "guide": "both", "guide_blocks": None, "attn_temp": 1.0}
    result |= {"denoise": True, "reference": "shards/pets", "reference_split": "train"}
    result |= {"warnings": ["few samples"], "weights_sha256": weights_sha256}
    (folder / "result.json").write_text(json.dumps(result))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "grid.png")
    return folder


def test_the_card_says_what_is_known(server: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model(folder)
    samples = samples_of(tmp_path / "samples", sha256(folder / "model.safetensors"))
    push.main([str(folder), NAME, "--license", "mit", "--samples", str(samples)])
    files = server.repos[NAME].commits[0][1]
    assert {"grid.png", "result.json"} < files.keys()
    _, metadata, text = files["README.md"].decode().split("---\n", 2)
    said = yaml.safe_load(metadata)
    assert said["license"] == "mit"
    assert said["library_name"] == "tarflow_dist"
    (result,) = said["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "fid", "value": 3.25}
    for part in ("![samples](grid.png)", "3.25", "12,800", "ant, bee, cow", "few samples", "mit"):
        assert part in text
    assert "sample([0], guidance=1.5, annealed=True, rule='gaussian')" in text
    exec(text.split("```python\n")[1].split("```")[0], {})  # its snippet runs
    # what its owner wrote there stays, until it is asked for anew
    files["README.md"] = b"---\n---\nmine"
    push.push(folder, NAME)
    assert server.repos[NAME].commits[-1][1]["README.md"] == b"---\n---\nmine"
    push.push(folder, NAME, new_card=True)
    plain = server.repos[NAME].commits[-1][1]["README.md"].decode()
    assert "stated none" in plain
    assert "Not measured" in plain
    assert "license" not in yaml.safe_load(plain.split("---\n")[1])


def test_what_does_not_belong_together_is_not_pushed(server: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model(folder)
    samples = samples_of(tmp_path / "samples", "of another model")
    with pytest.raises(UserError, match="are not of the model"):
        push.push(folder, NAME, samples=samples)
    (samples / "result.json").write_text('{"best": "guidance-1", "points": {}}')
    with pytest.raises(UserError, match="is a sweep: name a folder in it, guidance-1"):
        push.push(folder, NAME, samples=samples)
    for name in ("small", "a/b@v1"):
        with pytest.raises(UserError, match="looks like USER/NAME"):
            push.push(folder, name)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="is damaged"):
        push.push(folder, NAME)
    assert server.log == []
