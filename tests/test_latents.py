"""data.py encode and a run on what it writes: a small T5 and VAE in the layout of the hub."""
import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run, sentences, succeed
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import sample
import train
from data import T5, VAE, Data, UserError, import_pictures, square

RELEASE = ROOT / "tests" / "release"
ENCODERS = ["--vae", RELEASE / "vae", "--text-encoder", RELEASE / "t5"]
TINY_PAPER = ("--preset paper --patch 2 --blocks 1 --layers 1 --latents 4 --latent-dim 32 "
              "--data-dim 32 --steps 6 --batch 4 --val 2 --bins 4 --warmup 2 --save-every 3 "
              "--sample-every 6 --log-every 3 --workers 0 --rewards contrast,sharpness").split()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twenty pictures of several sizes and modes, each with two captions."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    with open(folder / "metadata.jsonl", "w") as lines:
        for i in range(20):
            image = Image.effect_noise(rng.integers(40, 90, 2).tolist(), 60)
            image = image.convert(("RGB", "L", "RGBA")[i % 3])
            image.save(folder / (name := f"{i:02d}.{('png', 'jpg', 'png')[i % 3]}"))
            texts = [f"a photo of the {('red', 'blue')[i % 2]} circle", f"two <PERSON> square {i}"]
            lines.write(json.dumps({"file_name": name, "text": texts}) + "\n")
    return folder


def encode(source, out, rank=0, ranks=1):
    vae, t5 = VAE(str(RELEASE / "vae")), T5(str(RELEASE / "t5"), length=256)
    import_pictures([source], out, 64, rank, ranks, vae=vae, encoder=t5)


@pytest.fixture(scope="module")
def encoded(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "encoded"
    with contextlib.chdir(RELEASE):
        succeed("data.py", "encode", pictures, out, "--size", 64, "--vae", "vae", "--text-encoder",
                "t5")
    return out


@pytest.fixture(scope="module")
def scored(encoded, tmp_path_factory):
    out = shutil.copytree(encoded, tmp_path_factory.mktemp("scored") / "encoded")
    succeed("rewards.py", out)
    succeed("binning.py", out, "--bins", 4)
    return out


@pytest.fixture(scope="module")
def trained(scored, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    succeed("train.py", *TINY_PAPER, "--data", scored, "--out", out)
    return out


def test_an_encoded_folder_holds_the_encoders_numbers(pictures, encoded):
    found = Data(encoded)
    assert (found.kind, found.size, found.side, found.channels) == ("latents", 64, 8, 4)
    [shard] = found.shards
    files = sorted(pictures.glob("*.[pj]*g"))
    assert shard.keys == [file.name for file in files] and shard.pairs == 40
    assert [shard.image(i) for i in range(20)] == [file.read_bytes() for file in files]
    vae, t5 = VAE(str(RELEASE / "vae")), T5(str(RELEASE / "t5"), length=256)
    squares = np.stack([square(file.read_bytes(), 64) for file in files])
    mean, std = vae.encode(torch.from_numpy(squares))
    for name, wanted in (("mean", mean), ("std", std)):
        assert shard.read(name).dtype == np.float16
        assert np.allclose(shard.read(name), wanted, rtol=1e-3, atol=1e-3)
    for pair, caption in enumerate(shard.captions):
        [states] = t5.states([caption.replace("<PERSON>", "")])
        assert shard.row("text", pair).shape == states.shape
        assert np.allclose(shard.row("text", pair), states, rtol=1e-3, atol=1e-3)
    assert np.array_equal(shard.read("empty"), t5.states([""])[0].half())
    info = found.info                                                  # paths are whole, there
    assert info["vae"] == str(RELEASE / "vae") and info["dtype"] == "torch.float32"
    assert info["text_encoder"] == dict(kind="t5", source=str(RELEASE / "t5"), dim=24, length=256)


def test_states_are_cut_to_their_length_and_padding_does_not_matter():
    t5, other = (T5(str(RELEASE / "t5"), length=5) for _ in range(2))
    text, mask = data.pad(t5.states(["a circle", "a photo of the red circle and two blue square"]))
    assert mask.sum(1).tolist() == [3, 5] and text.shape == (2, 5, 24)           # with </s>
    [alone] = other.states(["a circle"])
    assert torch.allclose(alone, text[:1, :3], atol=1e-6) and not text[0, 3:].any()


def test_encoding_resumes_by_the_shard_ranks_share_them_and_new_pictures_get_new_latents(
        pictures, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 5)
    source, out = shutil.copytree(pictures, tmp_path / "pictures"), tmp_path / "x"
    for rank, names in ((1, "13"), (0, "0123")):
        assert not (out / "data.json").exists()
        encode(source, out, rank, 2)
        assert [p.stem[-1] for p in sorted(out.glob("*.safetensors"))] == [*names]
    whole, [one] = Data(out), Data(encoded).shards
    assert whole.rows == 20 and [key for shard in whole.shards for key in shard.keys] == one.keys
    means = np.concatenate([shard.read("mean") for shard in whole.shards])
    assert np.allclose(means, one.read("mean"), atol=2e-3)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    shutil.copy(source / "00.png", source / "06.png")
    encode(source, out)
    changed = np.concatenate([shard.read("mean") for shard in Data(out).shards])
    assert np.allclose(changed[6], means[0], atol=2e-3) and not np.allclose(means[6], means[0])
    assert [path.stem[-1] for path in times if path.stat().st_mtime_ns != times[path]] == ["1"]


@pytest.mark.parametrize("change, reason", [
    (["--size", "128"], "was made with size 64, not 128"), (["--length", "7"], "text_encoder")])
def test_an_encoded_folder_is_not_continued_otherwise(pictures, encoded, change, reason):
    before = {path: path.stat().st_mtime_ns for path in encoded.glob("[!.]*")}
    code, _, err = run("data.py", "encode", pictures, encoded, "--size", "64", *ENCODERS, *change)
    assert code == 2 and reason in sentences(err)[-1], err
    assert {path: path.stat().st_mtime_ns for path in encoded.glob("[!.]*")} == before


@pytest.mark.parametrize("part, method", [(VAE, "encode"), (T5, "states")])
def test_what_is_not_finite_names_the_sample(part, method, pictures, tmp_path, monkeypatch):
    original = getattr(part, method)

    def spoilt(self, given):
        found = original(self, given)
        if part is VAE:
            found[0][3, 0, 0, 0] = 7e4                        # more than float16 holds
        elif any("square 3" in text for text in given):
            found[-1][0, 0] = float("nan")
        return found

    monkeypatch.setattr(part, method, spoilt)
    with pytest.raises(UserError, match="what 03.png becomes is not finite: name another --vae or"):
        encode(pictures, tmp_path / "x")
    assert not list((tmp_path / "x").iterdir())


def test_a_dry_run_of_encode_needs_no_encoder_and_writes_nothing(pictures, tmp_path):
    code, out, err = run("data.py", "encode", pictures, tmp_path / "x", "--dry-run")
    assert code == 0 and "20 found = 20 usable + 0 left out" in out, err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("part, spoil, reason", [
    ("t5", lambda tensors, name: None, "its tokenizer has"),
    ("t5", lambda tensors, name: tensors.update({name: tensors[name][:-1]}), "cannot be loaded"),
    ("vae", lambda tensors, name: tensors.pop(name), "it has no "),
    ("vae", lambda tensors, name: tensors.update({name: tensors[name][:-1]}), "cannot be loaded")])
def test_an_incomplete_encoder_is_refused(part, spoil, reason, tmp_path):
    folder = Path(shutil.copytree(RELEASE / part, tmp_path / part))
    [weights] = folder.glob("*.safetensors")
    tensors = load_file(weights)
    spoil(tensors, "encoder.final_layer_norm.weight" if part == "t5" else "encoder.conv_in.weight")
    save_file(tensors, weights, {"format": "pt"})
    if reason == "its tokenizer has":
        for path in folder.glob("*token*"):
            path.unlink()
    encoder = T5(str(folder)) if part == "t5" else VAE(str(folder))
    with pytest.raises(UserError, match=f"{folder} cannot be loaded") as error:
        encoder.load()
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_the_paper_preset_trains_on_an_encoded_folder_and_resumes(scored, trained, tmp_path):
    config = json.loads((trained / "config.json").read_text())
    assert config["vae"] == str(RELEASE / "vae") and config["network"]["text_dim"] == 24
    net = sample.load(trained, "cpu")
    drawn = sample.pictures(net, ["a red circle"], {"contrast": 0.3}, steps=2, negative_prompt="")
    assert drawn.shape == (1, 3, 64, 64) and drawn.dtype == torch.uint8
    out = shutil.copytree(trained, tmp_path / "again")
    (out / "state-00000006.pt").unlink()
    (out / "model.safetensors").unlink()
    moved = [shutil.copytree(RELEASE / part, tmp_path / part) for part in ("t5", "vae")]
    succeed("train.py", *TINY_PAPER, "--data", scored, "--out", out, "--text-encoder", moved[0],
            "--vae", moved[1])
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    config = json.loads((out / "config.json").read_text())      # encoders that moved: named anew
    assert [config["text_encoder"]["source"], config["vae"]] == [*map(str, moved)]


def test_a_run_loads_the_text_encoder_once_and_not_for_its_batches(scored, tmp_path, monkeypatch):
    load, loads = T5.load, []
    monkeypatch.setattr(T5, "load", lambda self: loads.append(self) or load(self))
    train.main([*TINY_PAPER, "--data", str(scored), "--out", str(tmp_path / "run"), "--steps", "2",
                "--sample-every", "1", "--text-dropout", "1"])
    assert len(loads) == 1
