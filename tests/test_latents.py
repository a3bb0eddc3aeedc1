"""data.py encode and training on what it writes: a small T5 and VAE in the layout of the hub."""
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run, sentences
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import sample
import train
from data import T5, VAE, Latents, Pictures

RELEASE = ROOT / "tests" / "release"
ENCODERS = ["--vae", RELEASE / "vae", "--text-encoder", RELEASE / "t5"]
TINY_PAPER = ("--preset paper --size 8 --blocks 1 --layers 1 --latents 4 --latent-dim 32 "
              "--data-dim 32 --steps 6 --batch 4 --val 4 --bins 4 --warmup 2 --save-every 3 "
              "--sample-every 6 --log-every 3 --workers 0 --rewards contrast,sharpness").split()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sixteen pictures of several sizes and modes, each with two captions."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    with open(folder / "metadata.jsonl", "w") as lines:
        for i in range(16):
            size = (int(rng.integers(40, 90)), int(rng.integers(40, 90)))
            image = Image.effect_noise(size, 60).convert(("RGB", "L", "RGBA")[i % 3])
            name = f"{i:02d}.{('png', 'jpg', 'png')[i % 3]}"
            more = dict(save_all=True, append_images=[image], format="MPO") if i == 1 else {}
            image.save(folder / name, **more)                     # MPO: a JPEG with a second frame
            texts = [f"a photo of the {('red', 'blue')[i % 2]} circle", f"two <PERSON> square {i}"]
            lines.write(json.dumps({"file_name": name, "text": texts}) + "\n")
    return folder


@pytest.fixture(scope="module")
def encoded(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "encoded"
    code, _, err = run("data.py", "encode", pictures, out, "--sizes", 64, *ENCODERS)
    assert code == 0, err
    assert run("rewards.py", out, "--size", 64)[0] == 0
    assert run("binning.py", out, "--size", 64, "--bins", 4)[0] == 0
    return out


@pytest.fixture(scope="module")
def trained(encoded, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    code, _, err = run("train.py", *TINY_PAPER, "--data", encoded, "--out", out)
    assert code == 0, err
    return out


def test_an_encoded_folder_holds_the_encoders_numbers(pictures, encoded):
    plain, found = Pictures(pictures, 64), Latents(encoded, 8)
    assert found.keys == plain.keys and found.captions == plain.captions
    vae, t5 = VAE(str(RELEASE / "vae")), T5(str(RELEASE / "t5"), length=256)
    mean, std = vae.encode(torch.stack([plain.picture(i) for i in range(16)]))
    for i in range(16):
        assert torch.allclose(found.read(i, "mean64"), mean[i], rtol=1e-3, atol=1e-3)
        assert torch.allclose(found.read(i, "std64"), std[i], rtol=1e-3, atol=1e-3)
        assert torch.equal(found.picture(i), plain.picture(i))                 # pictures stay, too
        for number, caption in enumerate(plain.captions[i]):
            [states] = t5.states([caption.replace("<PERSON>", "")])
            assert torch.allclose(found.read(i, f"text{number}"), states, rtol=1e-3, atol=1e-3)
    assert torch.equal(torch.from_numpy(np.load(encoded / "empty.npy")), t5.states([""])[0])


def test_states_are_cut_to_their_length_and_padding_does_not_matter():
    t5 = T5(str(RELEASE / "t5"), length=5)
    text, mask = t5.encode(["a circle", "a photo of the red circle and two blue square"])
    assert mask.sum(1).tolist() == [3, 5] and text.shape == (2, 5, 24)           # with </s>
    alone = T5(str(RELEASE / "t5"), length=5).encode(["a circle"])[0]
    assert torch.allclose(alone, text[:1, :3], atol=1e-6) and not text[0, 3:].any()


def test_encoding_resumes_by_the_shard_and_ranks_share_them(pictures, encoded, tmp_path,
                                                            monkeypatch):
    monkeypatch.setattr(data, "FOLDER_SHARD", 4)

    def encode(rank, world):
        vae, t5 = VAE(str(RELEASE / "vae")), T5(str(RELEASE / "t5"), length=256)
        data.encode(str(pictures), tmp_path / "x", [64], vae, t5, rank, world)
    encode(1, 2)
    assert sorted(p.name for p in (tmp_path / "x").glob("*.tar")) == ["00001.tar", "00003.tar"]
    with pytest.raises(ValueError, match="x has 2 of 4 shards: run python data.py encode to its"):
        Latents(tmp_path / "x", 8)
    (tmp_path / "x" / ".00002.tar.tmp").write_bytes(b"a kill left this")
    first = (tmp_path / "x" / "00001.tar").stat().st_mtime_ns
    encode(0, 1)
    assert (tmp_path / "x" / "00001.tar").stat().st_mtime_ns == first
    whole, parts = Latents(encoded, 8), Latents(tmp_path / "x", 8)
    assert whole.keys == parts.keys
    for i in range(16):
        assert torch.allclose(whole.read(i, "mean64"), parts.read(i, "mean64"), atol=2e-3)
    assert not list((tmp_path / "x").glob(".*"))


def test_a_batch_has_a_drawn_latent_and_the_states_of_the_caption_whose_rewards_it_has(encoded):
    args = train.read_args([*TINY_PAPER, "--data", str(encoded), "--out", "nowhere"])
    found, _, levels, _, _, encoder = train.prepare_data(args, 0)
    step = next(train.batches(found, 0, 0, 1, 12))
    marked = [np.full((2, 2), [[0.25], [0.75]], np.float32) for _ in levels]
    source = dict(s=marked, rewards=("contrast", "sharpness"), channels=4,
                  mean=torch.zeros(4, 1, 1), std=torch.ones(4, 1, 1))
    x_0, eps, _, s, text, mask, _ = train.make_batch(step, found, encoder, args, source, "cpu")
    assert set(s[:, 0].tolist()) == {0.25, 0.75}                       # both captions come
    for b, row in enumerate(step["row"].tolist()):
        states = found.read(row, f"text{int(s[b, 0] > 0.5)}")
        assert torch.equal(text[b, :len(states)], states) and mask[b].sum() == len(states)
    noise = (x_0 - step["picture"]) / step["std"]
    assert noise.std() == pytest.approx(1, abs=0.05) and not torch.equal(noise, eps)
    again = train.make_batch(step, found, encoder, args, source, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(again, (x_0, eps)))


def test_the_paper_preset_trains_on_an_encoded_folder_and_samples(trained, tmp_path):
    config = json.loads((trained / "config.json").read_text())
    assert config["vae"] == str(RELEASE / "vae") and config["text_encoder"]["kind"] == "t5"
    assert config["encoded"]["dtype"] == "torch.float32" and config["network"]["text_dim"] == 24
    code, _, err = run("sample.py", "--checkpoint", trained, "--prompt", "a red circle", "--steps",
                       2, "--negative-prompt", "", "--out", tmp_path / "out")
    assert code == 0, err
    assert Image.open(tmp_path / "out" / "00000.png").size == (64, 64)


def test_latents_resume_bit_for_bit(encoded, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "again")
    (out / "state-00000006.pt").unlink()
    (out / "model.safetensors").unlink()
    code, _, err = run("train.py", *TINY_PAPER, "--data", encoded, "--out", out)
    assert code == 0, err
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_a_trained_folder_can_be_written_in_the_releases_layout(trained, tmp_path):
    code, _, err = run("sample.py", "--checkpoint", trained, "--export", tmp_path / "x")
    assert code == 0, err
    ours, there = (sample.load(folder, torch.device("cpu")) for folder in (trained, tmp_path / "x"))
    assert all(torch.equal(a, b) for a, b in zip(ours.net.state_dict().values(),
                                                 there.net.state_dict().values()))
    assert there.rewards == ours.rewards
    assert np.allclose(there.config["std"], ours.config["std"])


# ---- bad input -----------------------------------------------------------------------------------

def test_a_pixel_checkpoint_is_not_exported(checkpoint, tmp_path):
    code, _, err = run("sample.py", "--checkpoint", checkpoint, "--export", tmp_path / "x")
    assert code == 2 and "trained on pixels or words" in sentences(err)[-1]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("change, reason", [
    (["--sizes", "128"], "was begun with sizes [64], not [128]"),
    (["--length", "7"], "was begun with length 256, not 7"),
    (["--sizes", "60"], "name multiples of 8")])
def test_an_encoded_folder_is_not_continued_otherwise(pictures, encoded, change, reason):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in encoded.iterdir())
    code, _, err = run("data.py", "encode", pictures, encoded, "--sizes", "64", *ENCODERS, *change)
    assert code == 2 and reason in sentences(err)[-1], err
    assert sorted((p.name, p.stat().st_mtime_ns) for p in encoded.iterdir()) == before


def test_another_encoder_or_dtype_is_refused(pictures, encoded, trained, tmp_path):
    other = shutil.copytree(RELEASE / "t5", tmp_path / "t5")
    code, _, err = run("data.py", "encode", pictures, encoded, "--sizes", 64, "--vae",
                       RELEASE / "vae", "--text-encoder", other)
    assert code == 2 and "was begun with text_encoder" in sentences(err)[-1]
    settings = (encoded / "encoded.json").read_text()
    out = shutil.copytree(trained, tmp_path / "run")
    changed = json.loads(settings) | {"dtype": "torch.bfloat16"}
    try:
        (encoded / "encoded.json").write_text(json.dumps(changed))
        code, _, err = run("train.py", *TINY_PAPER, "--data", encoded, "--out", out)
    finally:
        (encoded / "encoded.json").write_text(settings)
    assert code == 2 and "encoded have changed" in sentences(err)[-1]


def test_a_sample_whose_json_is_broken_is_left_out_and_named(pictures, tmp_path):
    for i in range(120):
        shutil.copy(pictures / "00.png", tmp_path / f"{i:03d}.png")
        (tmp_path / f"{i:03d}.txt").write_text("a circle")
    (tmp_path / "007.json").write_text('{"aesthetic_score": 5.0')
    code, out, err = run("data.py", "encode", tmp_path, tmp_path / ".x", "--sizes", 64, *ENCODERS)
    assert code == 0, err
    assert "left out 00000/007: the key.json of 00000/007 is not a JSON object" in out
    assert "007" not in (found := Latents(tmp_path / ".x", 8)).keys and len(found) == 119


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
    with pytest.raises(ValueError, match=f"{folder} cannot be loaded") as error:
        encoder.load()
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_training_loads_the_text_encoder_once(encoded, tmp_path, monkeypatch):
    load, loads = T5.load, []
    monkeypatch.setattr(T5, "load", lambda self: loads.append(self) or load(self))
    train.main([*TINY_PAPER, "--data", str(encoded), "--out", str(tmp_path / "run"), "--steps", "2",
                "--sample-every", "1"])
    assert len(loads) == 1


def test_another_dataset_is_not_mixed_in(pictures, encoded, tmp_path):
    other = shutil.copytree(pictures, tmp_path / "other")
    lines = (other / "metadata.jsonl").read_text().replace("red", "green")
    (other / "metadata.jsonl").write_text(lines)
    code, _, err = run("data.py", "encode", other, encoded, "--sizes", 64, *ENCODERS)
    assert code == 2 and "was begun with data" in sentences(err)[-1]


def test_encoders_that_moved_are_named_anew_on_resuming(encoded, trained, tmp_path):
    moved = shutil.copytree(RELEASE / "t5", tmp_path / "t5"), shutil.copytree(RELEASE / "vae",
                                                                              tmp_path / "vae")
    out = shutil.copytree(trained, tmp_path / "run")
    (out / "state-00000006.pt").unlink()
    code, _, err = run("train.py", *TINY_PAPER, "--data", encoded, "--out", out, "--text-encoder",
                       moved[0], "--vae", moved[1])
    assert code == 0, err
    config = json.loads((out / "config.json").read_text())
    assert (config["text_encoder"]["source"], config["vae"]) == tuple(map(str, moved))


def test_the_empty_caption_is_the_encoded_one(encoded):
    args = train.read_args([*TINY_PAPER, "--data", str(encoded), "--out", "nowhere",
                            "--text-dropout", "1"])
    found, _, levels, _, _, encoder = train.prepare_data(args, 0)
    step = next(train.batches(found, 0, 0, 1, 4))
    source = train.source_of(dict(network=dict(rewards=["contrast", "sharpness"], channels=4),
                                  mean=[0] * 4, std=[1] * 4), levels)
    _, _, _, _, text, mask, _ = train.make_batch(step, found, encoder, args, source, "cpu")
    L = len(found.empty)
    assert mask.sum(1).tolist() == [L] * 4 and not text[:, L:].any()
    assert all(torch.equal(row[:L], found.empty) for row in text)
    assert encoder.model is None                                  # nothing was loaded for it


@pytest.mark.parametrize("flags, reason", [
    (["--size", "16"], "was encoded at [64] pixels, and a side of 16 needs 128"),
    (["--text-encoder", "/no/where"], "the text encoder /no/where cannot be loaded"),
    (["--vae", "/no/where"], "the VAE /no/where cannot be loaded")])
def test_training_refuses_what_does_not_fit(encoded, tmp_path, flags, reason):
    code, _, err = run("train.py", *TINY_PAPER, "--data", encoded, "--out", tmp_path / "x", *flags)
    assert code == 2 and reason in sentences(err)[-1], err


def test_pictures_that_were_not_encoded_say_how(pictures, tmp_path):
    before = sorted(pictures.iterdir())
    code, _, err = run("train.py", *TINY_PAPER, "--data", pictures, "--out", tmp_path / "x")
    assert code == 2 and "python data.py encode DATA OUT" in sentences(err)[-1]
    assert sorted(pictures.iterdir()) == before                       # nor was anything scored
    code, _, err = run("train.py", *TINY_PAPER, "--out", tmp_path / "x")
    assert code == 2 and "python data.py encode DATA OUT" in sentences(err)[-1]


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_damaged_array_is_named_and_never_unpickled(encoded, tmp_path):
    folder = shutil.copytree(encoded, tmp_path / "x")
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(tmp_path / "burst")], dtype=object), allow_pickle=True)
    with tarfile.open(encoded / "00000.tar") as old, tarfile.open(folder / "00000.tar", "w") as new:
        for member in old:
            content = old.extractfile(member).read()
            if member.name == "03.mean64.npy":
                content = buffer.getvalue()
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    found = Latents(folder, 8)
    with pytest.raises(ValueError, match="mean64 of 00000/03 cannot be read"):
        found.read(3, "mean64")
    assert torch.isfinite(found.read(4, "mean64")).all() and not (tmp_path / "burst").exists()


def test_a_sample_without_one_of_its_arrays_stops_the_start(encoded, tmp_path):
    folder = shutil.copytree(encoded, tmp_path / "x")
    with tarfile.open(encoded / "00000.tar") as old, tarfile.open(folder / "00000.tar", "w") as new:
        for member in old:
            if member.name != "05.text1.npy":
                new.addfile(member, old.extractfile(member))
    with pytest.raises(ValueError, match="00000/05 has no text1; remove the tar and encode again"):
        Latents(folder, 8)
