"""Scoring DATA with the paper's seven networks: small random ones, by the command of a user."""
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run, sentences
from PIL import Image
from safetensors.torch import load_file, save_file

import rewards
import small
from data import Data, decode, import_pictures, to_rgb
from rewards import NETWORKS, PAPER, read_header, read_scores
from test_rewards import scores

CAPTIONS = ["a red dog", "two cats", "three hats", "a café"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    small.write_all(folder)
    return folder


@pytest.fixture(autouse=True)
def shrunk(monkeypatch):
    """Small architectures, in this test alone."""
    for kind, part in ((rewards.HPSv2, "MODEL"), (rewards.ImageReward, "VISION"),
                       (rewards.ImageReward, "TEXT"), (rewards.JinaCLIP, "IMAGE"),
                       (rewards.JinaCLIP, "TEXT"), (rewards.Aesthetic, "SHA256")):
        monkeypatch.setattr(kind, part, getattr(kind, part))
    small.shrink()


@pytest.fixture
def data(tmp_path) -> Path:
    """Two shards of four pictures of several shapes, of which all but the third have two captions;
    the last one of the second shard is a thread that no network can see."""
    source, rng = tmp_path / "source", np.random.default_rng(0)
    source.mkdir()
    for shard in range(2):
        with tarfile.open(source / f"{shard:05d}.tar", "w") as tar:
            for i, caption in enumerate(CAPTIONS):
                png = io.BytesIO()
                pixels = rng.integers(0, 256, (20 + 30 * i, 90 - 20 * i, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((90, 20 + 60 * i)).save(png, "png")
                note = json.dumps({"captions": [f"a text about {i} {shard}"] * (i != 2)})
                for name, content in ((f"{shard}{i}.png", png.getvalue()),
                                      (f"{shard}{i}.txt", caption.encode()),
                                      (f"{shard}{i}.json", note.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    import_pictures([str(source)], tmp_path / "data", 24)
    return tmp_path / "data"


def command(data, models, *flags) -> tuple:
    return run("tests/small.py", data, "--models", models, "--batch", 2, *flags)


def raw(data, names) -> np.ndarray:
    return np.concatenate([read_scores(shard, names) for shard in Data(data).shards])


def test_all_seven_score_data_in_one_command(data, models):
    code, out, err = command(data, models, "--rewards", "all")
    assert code == 0 and "0 failed" in out, err
    found = raw(data, PAPER)
    assert found.shape == (14, 7) and (np.ptp(found, axis=0) > 1e-3).all()   # none is a constant
    for pair in (0, 2):                 # a second caption has scores of its own, but for aesthetic
        apart = np.abs(found[pair] - found[pair + 1])
        assert (apart > 1e-6).tolist() == [name != "aesthetic" for name in PAPER]
    scorers = read_header(Data(data).shards[0])["scorers"]
    assert {*scorers} == {*PAPER} and scorers["vqa"].startswith("CLIPFlanT5 ")


def test_a_score_in_data_is_that_of_the_pair_alone_as_it_is_in_the_source(data, models):
    command(data, models, "--rewards", "all")
    shard = Data(data).shards[0]
    for scorer in (rewards.scorer_of(name, models, {}) for name in PAPER):
        pixels = rewards.cut(to_rgb(decode(shard.image(3))), *scorer.view)
        [score], _ = scorer.scores(pixels[None], np.zeros(1, int), [shard.captions[6]], 1)
        assert score == pytest.approx(read_scores(shard, (scorer.name,))[6, 0], abs=1e-5)


def test_the_embedded_world_is_seen_as_its_pixels(world, models, tmp_path):
    data = Path(shutil.copytree(world, tmp_path / "world"))
    assert command(data, models, "--rewards", "pick,contrast")[0] == 0
    shard = Data(data).shards[0]
    pick = NETWORKS["pick"]([models / source for source, _ in NETWORKS["pick"].SOURCES], "cpu",
                            torch.float32)
    pixels = rewards.cut(Image.fromarray(shard.picture(5, 16).transpose(1, 2, 0)), "crop", 224)
    with torch.no_grad():
        score = pick.judge(pick.see(pixels[None]), [shard.captions[5]]).item()
    assert score == pytest.approx(read_scores(shard, ("pick",))[5, 0], abs=1e-5)
    noted = rewards.score(["pick"], torch.from_numpy(shard.picture(5, 16).copy())[None],
                          [shard.captions[5]], models)                  # as in a notebook
    assert noted == pytest.approx(score, abs=1e-5)


def test_ranks_workers_and_fewer_at_once_do_not_change_the_scores(data, models, tmp_path,
                                                                  monkeypatch):
    other, third = (Path(shutil.copytree(data, tmp_path / name)) for name in ("b", "c"))
    command(data, models, "--rewards", "all")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        command(other, models, "--rewards", "all", "--workers", 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    for first in range(0, 7, 3):
        command(third, models, "--rewards", ",".join(PAPER[first:first + 3]))
    assert len(scores(data)) == 2 and scores(data) == scores(other) == scores(third)


def test_a_reward_asked_for_later_is_added_to_what_is_there(data, models, tmp_path, monkeypatch):
    together = Path(shutil.copytree(data, tmp_path / "b"))
    command(together, models, "--rewards", "pick,clip,contrast")
    command(data, models, "--rewards", "pick,contrast")
    monkeypatch.setattr(NETWORKS["pick"], "see", None)              # it is not looked at again
    assert command(data, models, "--rewards", "pick,clip")[0] == 0
    assert scores(data) == scores(together)


@pytest.mark.parametrize("file, same", [("README.md", True), ("model.safetensors", False)])
def test_another_checkpoint_is_another_scorer_and_a_file_beside_it_is_not(
        data, models, tmp_path, file, same):
    command(data, models, "--rewards", "sci")
    before, other = scores(data), shutil.copytree(models, tmp_path / "models")
    path = other / "Jialuo21" / "SciScore" / file
    if same:
        path.write_text("about")
    else:
        weights = load_file(path)
        weights["visual_projection.weight"] += 0.1
        save_file(weights, path, {"format": "pt"})
    command(data, other, "--rewards", "sci")
    assert (scores(data) == before) == same


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_seen_is_listed_and_the_others_are_scored(
        data, models, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(rewards, "MAX_PIXELS", 250_000)
    code, out, err = command(data, models, "--rewards", "pick,clip", "--workers", workers)
    assert code == 2 and "2 of 8 samples cannot be used" in sentences(err)[-1]
    assert "00001/10: its picture cannot be read (90 x 20 pixels are too long and thin" in out
    shard = Data(data).shards[1]
    assert {name: list(rows) for name, rows in read_header(shard)["failed"].items()} == {
        "pick": ["0"], "clip": ["0"]}
    assert np.isnan(read_scores(shard, ("clip",))[:, 0]).tolist() == [True] * 2 + [False] * 5
    monkeypatch.setattr(rewards, "MAX_PIXELS", 1_000_000)
    assert command(data, models, "--rewards", "pick,clip")[0] == 0
    assert np.isfinite(read_scores(shard, ("pick", "clip"))).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_has_changed_ends_in_one_sentence(data, models, workers):
    tar = data.parent / "source" / "00001.tar"
    tar.write_bytes(tar.read_bytes() + bytes(512))
    code, _, err = command(data, models, "--rewards", "pick", "--workers", workers)
    assert code == 2 and sentences(err)[-1] == (
        f"{tar} has changed since {data / '00001.safetensors'} was made from it: import again")
    assert list(scores(data)) == ["00000.scores.safetensors"]       # the finished shard stays


def test_a_missing_file_of_a_network_is_named_with_its_reward_and_repository(data, models,
                                                                             tmp_path):
    fewer = shutil.copytree(models, tmp_path / "models")
    (fewer / "xswu" / "HPSv2" / "HPS_v2.1_compressed.pt").unlink()
    code, _, err = command(data, fewer, "--rewards", "pick,hpsv2")
    [said] = sentences(err)
    assert code == 2 and "hpsv2 needs HPS_v2.1_compressed.pt of xswu/HPSv2, and " in said
    assert not scores(data)


def test_the_page_lists_the_files_of_every_network():
    page = (Path(rewards.__file__).parent / "docs" / "data.md").read_text(encoding="utf-8")
    for name, kind in NETWORKS.items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        assert all(f"`{source}`" in row for source, _ in kind.SOURCES)


def test_worker_processes_hand_over_one_tensor_a_view(data):
    broken, rows, cuts = rewards.read_views(Data(data).shards[0], 24, {("crop", 224), None},
                                            [0, 1, 2])
    assert not broken and rows == [0, 1, 2]
    assert {view: x.shape for view, x in cuts.items()} == {
        ("crop", 224): (3, 3, 224, 224), None: (3, 3, 24, 24)}


def test_the_towers_see_bf16_on_a_gpu_and_fp32_elsewhere(models, monkeypatch):
    seen = []
    monkeypatch.setattr(rewards.Aesthetic, "__init__",
                        lambda self, folders, device, dtype: seen.append(dtype) or 1 / 0)
    for kind in ("cpu", "cuda"):
        monkeypatch.setattr(rewards, "best_device", lambda: torch.device(kind))
        with pytest.raises(ZeroDivisionError):
            rewards.scorer_of("aesthetic", models, {}).load()
    assert seen == [torch.float32, torch.bfloat16]
