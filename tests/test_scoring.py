"""Scoring a folder with the paper's seven networks: small random ones, by the command of a user."""
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
from safetensors.torch import save_file

import small
from data import Pictures
from rewards import NETWORKS, PAPER, RELEASE_REWARDS, read_scores, read_sidecar

CAPTIONS = ["a red dog", "two cats", "", "a café"]         # the empty one has another in its .json


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    small.write_all(folder)
    return folder


@pytest.fixture(autouse=True)
def shrunk(monkeypatch):
    """Small architectures, in this test alone."""
    for kind, part in (("HPSv2", "ARCHITECTURE"), ("ImageReward", "VISION"),
                       ("ImageReward", "TEXT"), ("JinaCLIP", "TEXT")):
        monkeypatch.setattr(getattr(small.rewards, kind), part,
                            getattr(getattr(small.rewards, kind), part))
    for name in ("hpsv2", "vqa"):
        monkeypatch.setitem(NETWORKS, name, NETWORKS[name])
    small.shrink()


@pytest.fixture
def data(tmp_path) -> Path:
    """Two tars of four pictures of several shapes; the third sample's caption is in its .json."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i, caption in enumerate(CAPTIONS):
                png = io.BytesIO()
                pixels = rng.integers(0, 256, (20 + 30 * i, 90 - 20 * i, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((90, 20 + 60 * i)).save(png, "png")
                note = json.dumps({"synthetic_caption": f"a long text about {i} {shard}"}
                                  | {f"{name}_score": 0.25 * i for name in ("clip", "aesthetic")})
                for name, content in ((f"{shard}{i}.png", png.getvalue()),
                                      (f"{shard}{i}.txt", caption.encode()),
                                      (f"{shard}{i}.json", note.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def command(data, models, *flags) -> tuple:
    return run("tests/small.py", data, "--models", models, "--batch", 2, *flags)


def sidecars(data) -> list:
    return [file.read_bytes() for file in sorted(data.glob("*.scores.jsonl"))]


def test_all_seven_score_a_folder_in_one_command(data, models):
    assert command(data, models, "--rewards", "all")[0] == 0
    rows, raws = read_scores(Pictures(data, 24), PAPER)
    assert rows == list(range(8)) and [len(raw) for raw in raws] == 2 * [2, 2, 1, 2]
    raw = np.concatenate(raws)
    assert (np.ptp(raw, axis=0) > 1e-3).all()                       # none is a constant
    for row in (0, 1):                  # a second caption has scores of its own, but for aesthetic
        apart = np.abs(raws[row][0] - raws[row][1])
        assert (apart > 1e-6).tolist() == [name != "aesthetic" for name in PAPER]
    header, _ = read_sidecar(data / "00000.scores.jsonl")
    assert header["size"] is None and header["rewards"]["vqa"].startswith("CLIPFlanT5 ")
    assert {"transformers", "open_clip_torch", "timm"} <= header["versions"].keys()


def test_a_score_in_the_sidecar_is_that_of_the_pair_alone(data, models, tmp_path):
    command(data, models, "--rewards", "all")
    pictures = Pictures(data, 24)
    _, raws = read_scores(pictures, PAPER)
    pictures.cut(3, (tmp_path / "a.png").write_bytes)
    code, out, _ = run("tests/small.py", "--image", tmp_path / "a.png", "--prompt",
                       pictures.captions[3][0], "--rewards", "all", "--models", models)
    printed = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()[1:]}
    assert code == 0 and printed == pytest.approx(dict(zip(PAPER, raws[3][0])), abs=1e-4)


def test_ranks_workers_and_groups_do_not_change_the_sidecars(data, models, tmp_path, monkeypatch):
    other, third = (Path(shutil.copytree(data, tmp_path / name)) for name in ("b", "c"))
    command(data, models, "--rewards", "all")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        command(other, models, "--rewards", "all", "--workers", 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    for kind in set(NETWORKS.values()):
        monkeypatch.setattr(kind, "MEMORY", 3.0)                    # 6 GB each: three groups of two
    command(third, models, "--rewards", "all", "--memory-gb", 13)
    assert len(sidecars(data)) == 2 and sidecars(data) == sidecars(other) == sidecars(third)


def test_a_reward_asked_for_later_is_added_to_what_is_there(data, models, tmp_path, monkeypatch):
    together = Path(shutil.copytree(data, tmp_path / "b"))
    command(together, models, "--rewards", "pick,clip,sci")
    command(data, models, "--rewards", "pick,sci")
    monkeypatch.setattr(NETWORKS["pick"], "see", None)              # it is not looked at again
    assert command(data, models, "--rewards", "pick,clip,sci")[0] == 0
    assert sidecars(data) == sidecars(together)


def test_a_new_caption_lacks_the_networks_that_are_not_asked_until_they_are(data, models):
    command(data, models, "--rewards", "pick,hpsv2")
    (data / "captions.tsv").write_text("01\tanother text\n")
    command(data, models, "--rewards", "pick")
    lines = read_sidecar(data / "00000.scores.jsonl")[1]
    assert lines["01"]["error"] == "not scored yet by hpsv2" and "error" not in lines["00"]
    command(data, models, "--rewards", "pick,hpsv2")
    rows, raws = read_scores(Pictures(data, 24), ("pick", "hpsv2"))
    assert len(rows) == 8 and len(raws[1]) == 3


def test_analytic_scores_stay_when_a_network_is_asked_for(data, models):
    run("rewards.py", data, "--rewards", "contrast", "--size", 32)
    assert command(data, models, "--rewards", "pick")[0] == 0       # without --size
    header, _ = read_sidecar(data / "00000.scores.jsonl")
    assert list(header["rewards"]) == ["pick", "contrast"] and header["size"] == 32
    assert len(read_scores(Pictures(data, 32), ("contrast", "pick"))[0]) == 8


def test_reading_a_reward_that_a_sample_lacks_names_the_sample_and_the_command(data, models):
    command(data, models, "--rewards", "pick,hpsv2")
    (data / "captions.tsv").write_text("01\tanother text\n")
    command(data, models, "--rewards", "pick")
    assert len(read_scores(Pictures(data, 24), ("pick",))[0]) == 8
    with pytest.raises(ValueError, match="key '01' is not scored by hpsv2; run .* --rewards hpsv2"):
        read_scores(Pictures(data, 24), ("hpsv2",))


def test_a_file_beside_the_weights_does_not_change_the_scorer(data, models, tmp_path, monkeypatch):
    command(data, models, "--rewards", "sci")
    before, other = sidecars(data), shutil.copytree(models, tmp_path / "models")
    (other / "Jialuo21" / "SciScore" / "README.md").write_text("about")
    monkeypatch.setattr(NETWORKS["sci"], "see", None)
    assert command(data, other, "--rewards", "sci")[0] == 0 and sidecars(data) == before


def test_worker_processes_hand_over_one_tensor_a_view(data):
    views = small.rewards.Views(Pictures(data, 24), [("crop", 224), ("square", 24)])
    reasons, rows, cuts = views[[0, 1, 2]]
    assert not reasons and rows == [0, 1, 2]
    assert {view: x.shape for view, x in cuts.items()} == {
        ("crop", 224): (3, 3, 224, 224), ("square", 24): (3, 3, 24, 24)}


@pytest.mark.parametrize("flags, said", [
    (["DATA", "--given"], "--given takes the scores of networks: name them"),
    (["--image", "a.png"], "name DATA, or --image and --prompt"),
    (["--image", "a.png", "--prompt", "x", "--rewards", "contrast"], "--image a.png cannot be"),
])
def test_flags_that_do_not_go_together_are_one_sentence(flags, said, data):
    code, _, err = run("rewards.py", *(data if flag == "DATA" else flag for flag in flags))
    assert code == 2 and said in sentences(err)[-1] and not sidecars(data)


def test_another_checkpoint_is_another_scorer(data, models, tmp_path):
    command(data, models, "--rewards", "sci")
    before, other = sidecars(data), shutil.copytree(models, tmp_path / "models")
    weights = small.rewards.load_file(other / "Jialuo21" / "SciScore" / "model.safetensors")
    weights["visual_projection.weight"] += 0.1
    save_file(weights, other / "Jialuo21" / "SciScore" / "model.safetensors", {"format": "pt"})
    command(data, other, "--rewards", "sci")
    assert all(a != b for a, b in zip(before, sidecars(data)))


def test_scores_that_key_json_has_are_taken(data, models):
    code, _, err = run("tests/small.py", data, "--rewards", "clip", "--given")
    assert code == 2 and "6 of 8 samples failed" in err             # six have two captions
    assert read_sidecar(data / "00000.scores.jsonl")[1]["02"]["scores"] == {"clip": [0.5]}
    assert RELEASE_REWARDS["clip"] == "clip_score"


def test_a_missing_model_is_a_sentence_and_the_others_go_on_if_asked(data, models, tmp_path):
    fewer = shutil.copytree(models, tmp_path / "models")
    (fewer / "xswu" / "HPSv2" / "HPS_v2.1_compressed.pt").unlink()
    code, _, err = command(data, fewer, "--rewards", "pick,hpsv2")
    [said] = sentences(err)
    assert code == 2 and "hpsv2 needs HPS_v2.1_compressed.pt of xswu/HPSv2 (2 GB)" in said
    assert "--keep-going" in said and not sidecars(data)
    assert command(data, fewer, "--rewards", "pick,hpsv2", "--keep-going")[0] == 0
    assert list(read_sidecar(data / "00000.scores.jsonl")[0]["rewards"]) == ["pick"]
    code, _, err = run("tests/small.py", data, "--rewards", "pick", "--models", models,
                       "--memory-gb", "1")
    assert code == 2 and "pick needs 4 GB: pass --memory-gb 4" in err


def test_a_dry_run_says_what_it_would_take_and_loads_nothing(data, monkeypatch):
    monkeypatch.setattr(small.rewards, "find", None)
    code, out, _ = run("tests/small.py", data, "--rewards", "all", "--dry-run")
    assert code == 0 and not sidecars(data)
    assert all(source in out for name in PAPER for source, _ in NETWORKS[name].SOURCES)
    assert "8 pictures with 14 captions" in out and "CC BY-NC 4.0" in out
    flop = sum(8 * NETWORKS[name].GFLOP[0] + 14 * NETWORKS[name].GFLOP[1] for name in PAPER) * 1e9
    assert f"{flop / 300e12 / 3600:.3g} GPU-hours at an assumed 300 TFLOP/s" in out


def test_a_percentile_is_the_place_among_the_fitted_scores(data, models, tmp_path):
    command(data, models, "--rewards", "pick")
    run("binning.py", data, "--bins", 4)
    pictures = Pictures(data, 24)
    rows, raws = read_scores(pictures, ("pick",))
    best = max(rows, key=lambda row: raws[row][0, 0])
    pictures.cut(best, (tmp_path / "a.png").write_bytes)
    for prompt in pictures.captions[best][:1]:
        _, out, _ = run("tests/small.py", "--image", tmp_path / "a.png", "--prompt", prompt,
                        "--rewards", "pick", "--models", models, "--bins", data / "bins.json")
        share = (np.concatenate(raws)[:, 0] < raws[best][0, 0]).mean()
        assert abs(int(out.splitlines()[1].split()[2]) / 100 - share) < 0.15


def test_a_picture_that_cannot_be_read_is_listed_and_the_others_are_scored(data, models, tmp_path):
    with tarfile.open(data / "00001.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    files["11.png"] = files["11.png"][:100]
    with tarfile.open(data / "00001.tar", "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    code, _, err = command(data, models, "--rewards", "pick,aesthetic")
    assert code == 2 and "1 of 8 samples failed" in err
    rows, _ = read_scores(Pictures(data, 24), ("pick", "aesthetic"))
    assert rows == [0, 1, 2, 3, 4, 6, 7]


def test_the_towers_see_bf16_on_a_gpu_and_fp32_elsewhere(models, monkeypatch):
    seen = []
    monkeypatch.setattr(small.rewards.Aesthetic, "__init__",
                        lambda self, *folders: seen.append(folders[-1]))
    for kind in ("cpu", "cuda"):
        group = small.rewards.Group({"aesthetic": "1"}, {"aesthetic": ()}, torch.device(kind))
        group.load()
    assert seen == [torch.float32, torch.bfloat16]
