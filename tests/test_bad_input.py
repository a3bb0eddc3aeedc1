"""Every script, given something wrong: one sentence that names it, exit code 2, nothing written.

A broken sample is no such mistake: it is left out and listed (the last tests of this file)."""
import inspect
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run, sentences
from PIL import Image
from safetensors.torch import load_file, save_file

import rewards
import shapes


class Bomb:
    """Runs a program when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def snapshot(folder: Path) -> dict:
    """Every file below a folder and its content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Place:
    """A folder to work in, with copies of the world and of the checkpoint to spoil."""

    def __init__(self, folder: Path, world: Path, checkpoint: Path):
        self.folder, self._world, self._checkpoint = folder, world, checkpoint

    @property
    def world(self) -> Path:
        if not (self.folder / "world").exists():
            shutil.copytree(self._world, self.folder / "world")
        return self.folder / "world"

    @property
    def checkpoint(self) -> Path:
        if not (self.folder / "run").exists():
            shutil.copytree(self._checkpoint, self.folder / "run")
        return self.folder / "run"

    def write(self, name: str, content) -> Path:
        """A file of bytes, of text or of lines of JSON."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(line) + "\n" for line in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def edit(self, path: Path, change) -> None:
        """Replace a JSON file by what change(dict) makes of it."""
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


@pytest.fixture
def place(world, checkpoint, tmp_path, monkeypatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, world, checkpoint)


def png(side: int = 16, seed: int = 0) -> bytes:
    """A picture of noise."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def huge() -> bytes:
    """The header of a PNG of 100,000 x 100,000 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = lambda kind, content: (struct.pack(">I", len(content)) + kind + content
                                   + struct.pack(">I", zlib.crc32(kind + content)))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def tar(path: Path, files: dict) -> None:
    """Write name: bytes as a tar, in this order."""
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(name.split("#")[0])              # "a.png#2": a.png once more
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def files_of(path: Path) -> dict:
    with tarfile.open(path) as file:
        return {member.name: file.extractfile(member).read() for member in file}


# ---- one way to go wrong each: make it, and return (script, arguments, what is said) -------------

def train(place, *flags, data=True) -> tuple:
    return ("train.py", *TINY, "--steps", "2", "--out", "out",
            *(("--data", "world") if data and place.world else ()), *flags)


def resume(place, *flags) -> tuple:
    """The command of the checkpoint once more. It names its data, which nothing changes."""
    return ("train.py", *TINY, "--steps", "8", "--data", place._world, "--out", place.checkpoint,
            *flags)


def sample(place, *flags, prompt=("--prompt", "a red circle")) -> tuple:
    return ("sample.py", "--checkpoint", place.checkpoint, "--out", "out.png", "--steps", "2",
            *prompt, *flags)


def prompts(place, content) -> tuple:
    return sample(place, prompt=("--prompts", place.write("jobs.jsonl", content).name))


def truncated_tar(place):
    path = place.world / "00000.tar"
    path.write_bytes(path.read_bytes()[:300_000])
    return train(place), "00000.tar is damaged, cut short or no tar"


def truncated_tar_for_rewards(place):
    path = place.world / "00000.tar"
    path.write_bytes(path.read_bytes()[:-20_480])       # more than the zeros at a tar's end
    return ("rewards.py", "world", "--size", 16), "00000.tar is damaged, cut short or no tar"


def text_called_tar(place):
    place.write("d/0.tar", "no tar")
    return ("data.py", "check", "d"), "d/0.tar is damaged, cut short or no tar"


def duplicate_key(place):
    (place.folder / "d").mkdir()
    tar(place.folder / "d/0.tar", {"a.png": png(), "a.txt": b"a triangle", "a.x.png": png()})
    return ("rewards.py", "d"), "a.x.png is a second picture with the key 'a'"


def same_name_twice(place):
    (place.folder / "d").mkdir()
    tar(place.folder / "d/0.tar", {"a.png": png(), "a.txt": b"a triangle", "a.png#2": png()})
    return ("data.py", "check", "d"), "a.png is a second picture with the key 'a'"


def path_escape(place):
    place.write("secret.png", png())
    place.write("d/metadata.jsonl", [{"file_name": "../secret.png", "text": "a triangle"}])
    return ("rewards.py", "d"), "metadata.jsonl, line 1: '../secret.png' leaves the dataset folder"


def absolute_path(place):
    name = str(place.write("secret.png", png()))
    place.write("d/metadata.jsonl", [{"file_name": name, "text": "a triangle"}])
    return train(place, "--data", "d"), "metadata.jsonl, line 1"


def broken_metadata(place):
    place.write("d/metadata.jsonl", '{"file_name": "a.png", "te')
    return ("data.py", "check", "d"), "d/metadata.jsonl, line 1 is not a JSON object"


def metadata_beside_tars(place):
    place.write(f"{place.world.name}/metadata.jsonl", [])
    return train(place), "world holds tars and metadata.jsonl"


def no_captions(place):
    for i in range(40):
        place.write(f"d/{i}.png", png(seed=i))
        place.write(f"d/{i}.txt", "a red circle" if i % 2 else "")
    return (train(place, "--data", "d", "--rewards", "none"),
            "d: 20 of 40 samples cannot be used (the limit is 1%): see python data.py check d")


def empty_captions_alone(place):
    place.write("d/a.png", png())
    place.write("d/a.txt", "  ")
    return ("rewards.py", "d"), "d has no picture with a caption (00000/a: d: empty caption)"


def half_of_all_pictures(place):
    for i in range(40):
        place.write(f"d/{i}.png", png(seed=i)[:None if i % 2 else 100])
        place.write(f"d/{i}.txt", "a red circle")
    return ("data.py", "check", "d"), "d: 20 of 40 samples are unreadable, the limit is 1%"


def missing_data(place):
    return train(place, "--data", "nowhere"), "nowhere is not there; give a folder of tars"


def missing_shard(place):
    return ("rewards.py", f"{place.world.name}/{{00000..00001}}.tar"), "00001.tar is not there"


def empty_folder(place):
    (place.folder / "d").mkdir()
    return train(place, "--data", "d"), "d has no picture with a caption"


def unknown_reward_in_rewards(place):
    return (("rewards.py", place.world, "--rewards", "contrast,beauty"),
            "unknown reward 'beauty'; valid: aesthetic, hpsv2")


def unknown_reward_in_train(place):
    return (train(place, "--rewards", "contrast,beauty", data=False),
            "unknown reward 'beauty'; valid: aesthetic")              # before a world is made


def unknown_reward_in_dry_run(place):
    return train(place, "--dry-run", "--rewards", "beauty"), "unknown reward 'beauty'"


def unknown_reward_in_binning(place):
    return (("binning.py", place.world, "--size", 16, "--rewards", "beauty"),
            "unknown reward 'beauty'; valid")


def unknown_reward_in_sample(place):
    return (sample(place, "--targets", "all=1", "beauty=1"),
            "--targets beauty=1: no such reward in this checkpoint; it knows all, alignment")


def reward_named_twice(place):
    return train(place, "--rewards", "contrast,contrast"), "a reward is named twice"


def alignment_of_foreign_captions(place):
    place.write("d/a.png", png())
    place.write("d/a.txt", "a photograph of my dog")
    return (("rewards.py", "d", "--rewards", "alignment"),
            "others, such as 'a photograph of my dog'; leave alignment out of --rewards")


def spoil_sidecar(place, old: str, new: str) -> None:
    path = place.world / "00000.scores.jsonl"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def nan_score(place):
    spoil_sidecar(place, '"contrast": [0.', '"contrast": [NaN, 0.')
    return train(place), "00000.scores.jsonl: key '00000000' has not one contrast score per"


def nan_score_in_binning(place):
    path = place.world / "00000.scores.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[3])
    record["scores"]["sharpness"] = [float("nan")]
    path.write_text("\n".join([*lines[:3], json.dumps(record), *lines[4:]]))
    return (("binning.py", "world", "--size", 16),
            "00000.scores.jsonl: key '00000002' has the sharpness score nan, which is not a finite")


def sidecar_of_another_format(place):
    spoil_sidecar(place, '"format": 1', '"format": 9')
    return ("rewards.py", "world", "--size", 16), "00000.scores.jsonl: line 1 is not this shard's"


def half_a_sidecar(place):
    path = place.world / "00000.scores.jsonl"
    path.write_bytes(path.read_bytes()[:20_000])
    return train(place), "00000.scores.jsonl: line"


def no_scores(place):
    (place.world / "00000.scores.jsonl").unlink()
    return ("binning.py", "world"), "00000.scores.jsonl does not exist; run python rewards.py world"


def scores_of_another_size(place):
    return ("binning.py", place.world, "--size", 24), "scores of pictures of 16 pixels, not 24"


def binning_at_size_0(place):
    return ("binning.py", place.world, "--size", 0), "--size 0: it is at least 3"


def checking_at_size_0(place):
    return ("data.py", "check", place.world, "--size", 0), "--size 0: it is at least 1"


def an_encoding_below_a_file(place):
    place.write("mine", "my notes")
    small = ROOT / "tests" / "release"
    return ("data.py", "encode", place.world, "mine/out", "--sizes", 64, "--vae", small / "vae",
            "--text-encoder", small / "t5"), "Not a directory: 'mine/out'"


def one_bin(place):
    return ("binning.py", place.world, "--size", 16, "--bins", 1), "1 bins of 300 scores: two bins"


def bins_of_another_dataset(place):
    place.edit(place.world / "bins.json", lambda bins: bins.update(source="0123456789abcdef"))
    return train(place), ("bins.json was fitted on other scores than those in world: write it "
                          "again with python binning.py world --size 16")


def edges_that_descend(place):
    place.edit(place.world / "bins.json", lambda bins: bins["edges"][1].reverse())
    return train(place), "low, edges and high of 'colorfulness' must be finite and ascend"


def edge_that_is_nan(place):
    place.edit(place.world / "bins.json", lambda bins: bins["low"].__setitem__(0, float("nan")))
    return train(place), "bins.json: low, edges and high of 'alignment' must be finite"


def bins_of_too_few_rewards(place):
    run("binning.py", place.world, "--size", 16, "--bins", 8, "--rewards", "contrast")
    return (train(place, "--rewards", "alignment,contrast"), "bins.json has no bins of alignment")


def bins_of_too_few_rewards_for_the_embedded_world(place):
    shutil.copytree(place._world, "runs/world")
    run("binning.py", "runs/world", "--size", 16, "--bins", 8, "--rewards", "contrast")
    return (train(place, "--world", "300", data=False),
            "runs/world/bins.json has no bins of alignment, colorfulness, sharpness, composition")


def training_at_another_size_than_was_scored(place):
    return (train(place, "--size", "12"), "world/00000.scores.jsonl has the scores of pictures of "
            "16 pixels, not 12; pass --size 16 or run python rewards.py world --size 12")


def half_of_bins(place):
    path = place.world / "bins.json"
    path.write_text(path.read_text()[:500])
    return train(place), "world/bins.json: "


def other_number_of_bins(place):
    return train(place, "--bins", "16"), "bins.json has 8 bins, --bins asks for 16"


def other_world(place):
    shapes.write_world("runs/world", 20, seed=0, size=16)
    return train(place, "--world", "30", data=False), "runs/world/world.json describes another"


def world_of_an_older_generator(place):
    shapes.write_world("runs/world", 20, seed=0, size=16)
    file = place.folder / "runs/world/world.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"drawn": "0" * 16}))
    return train(place, "--world", "20", data=False), "runs/world/world.json describes another"


def world_over_foreign_tars(place):
    place.write("d/0.tar", b"mine")
    return ("shapes.py", "d", "--n", 5), "d holds tars that shapes.py did not write"


def world_of_nothing(place):
    return ("shapes.py", "d", "--n", 0), "--n must be at least 1"


def too_few_samples(place):
    return train(place, "--val", "295"), "world has 300 usable samples, fewer than --val 295"


def paper_without_data(place):
    return (train(place, "--preset", "paper", "--latent-dim", "64", "--data-dim", "64", data=False),
            "--preset paper trains on latents of pictures: make them with python data.py encode")


def paper_on_pictures(place):
    return (train(place, "--preset", "paper", "--latent-dim", "64", "--data-dim", "64"),
            "world has no encoded.json: latents are made with python data.py encode DATA OUT")


def out_is_a_file(place):
    place.write("mine", "text")
    return train(place, "--out", "mine"), "--out mine: mine is a file, not a folder"


def out_below_a_file(place):
    place.write("mine", "text")
    return train(place, "--out", "mine/run"), "--out mine/run: mine is a file, not a folder"


def bomb_as_state(place):
    for path in place.checkpoint.glob("state-*.pt"):
        path.write_bytes(pickle.dumps(Bomb(), 2))
    return resume(place), f"no checkpoint in {place.checkpoint} can be read"


def saved_bomb_as_state(place):
    for path in place.checkpoint.glob("state-*.pt"):
        torch.save({"step": 8, "net": Bomb()}, path)
    return resume(place), f"no checkpoint in {place.checkpoint} can be read"


def truncated_states(place):
    for path in place.checkpoint.glob("state-*.pt"):
        path.write_bytes(path.read_bytes()[:100_000])
    return resume(place), f"no checkpoint in {place.checkpoint} can be read: remove the folder"


def other_rate(place):
    return resume(place, "--lr", "0.5"), "was trained with --lr 0.002, not 0.5"


def other_size(place):
    return resume(place, "--latents", "4"), "was trained with --latents 8, not 4"


def missing_checkpoint(place):
    return ("sample.py", "--checkpoint", "nowhere", "--prompt", "a triangle"), \
        "nowhere/config.json does not exist: train with python train.py"


def other_words_than_the_embedded_world(place, *arguments):
    place.edit(place.checkpoint / "config.json", lambda config: config["text_encoder"].update(
        vocabulary=[word.replace("circle", "heart")
                    for word in config["text_encoder"]["vocabulary"]]))
    return (("evaluate.py", *arguments),
            "run was not trained on captions of the embedded world, which are asked for here: use "
            "python evaluate.py rewards run --prompts FILE")


def shapes_of_other_words(place):
    return other_words_than_the_embedded_world(place, "shapes", "run", "--n", 12)


def control_of_other_words(place):
    return other_words_than_the_embedded_world(place, "control", "run")


def rewards_of_other_words(place):
    return other_words_than_the_embedded_world(place, "rewards", "run")


def config_without_a_sampler_setting(place):
    place.edit(place.checkpoint / "config.json", lambda config: config["sampler"].pop("shift"))
    return sample(place), "run/config.json is not the configuration of a checkpoint (ValueError: " \
        "it has no shift)"


def config_of_two_channels(place):
    place.edit(place.checkpoint / "config.json", lambda config: config["mean"].pop())
    return sample(place), "mean and std have one number a channel"


def network_of_nan(place):
    file = place.checkpoint / "model.safetensors"
    weights = load_file(file)
    weights["patch_out.bias"][0] = float("nan")
    save_file(weights, file)
    return sample(place), "the network's pictures are not finite numbers: lower --guidance"


def choice_without_candidates(place):
    return sample(place, "--by", "contrast"), "--by contrast chooses among candidates: pass --best"


def pictures_of_an_earlier_command(place):
    place.write("d/00001.png", png())
    return sample(place, "--out", "d"), "--out d has pictures of an earlier command that would"


def settings_that_are_a_list(place):
    place.write("d/settings.json", "[]")
    return ("evaluate.py", "rewards", place.checkpoint, "--out", "d"), \
        "d/settings.json is damaged: remove it"


def table_of_prompts_in_latin_1(place):
    place.write("p.tsv", "Prompt\tCategory\na caf\u00e9\tArts\n".encode("latin-1"))
    return (("evaluate.py", "rewards", place.checkpoint, "--out", "d", "--prompts", "p.tsv"),
            "--prompts p.tsv is not text in UTF-8")


def missing_weights(place):
    (place.checkpoint / "model.safetensors").unlink()
    return sample(place), "run/model.safetensors does not exist"


def broken_config(place):
    path = place.checkpoint / "config.json"
    path.write_text(path.read_text()[:-5])
    return sample(place), "run/config.json is not the configuration of a checkpoint"


def config_without_sampler(place):
    place.edit(place.checkpoint / "config.json", lambda config: config.pop("sampler"))
    return sample(place), "config.json is not the configuration of a checkpoint"


def config_of_another_encoder(place):
    place.edit(place.checkpoint / "config.json",
               lambda config: config["text_encoder"].update(kind="bert"))
    return sample(place), "a text encoder of kind 'bert'"


def config_of_no_network(place):
    place.edit(place.checkpoint / "config.json", lambda config: config["network"].update(patch=7))
    return sample(place), "patch 7 does not divide the side 16"


def weights_of_another_size(place):
    place.edit(place.checkpoint / "config.json",
               lambda config: config["network"].update(latent_dim=64))
    return sample(place), "model.safetensors does not fit"


def tensor_too_few(place):
    weights = load_file(place.checkpoint / "model.safetensors")
    del weights["latents"]
    save_file(weights, place.checkpoint / "model.safetensors")
    return ("evaluate.py", "shapes", "run"), "missing, unknown or of another shape, such as latents"


def bomb_as_weights(place):
    (place.checkpoint / "model.safetensors").write_bytes(pickle.dumps(Bomb(), 2))
    return sample(place), "run/model.safetensors cannot be read"


def half_the_weights(place):
    path = place.checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    return sample(place), "run/model.safetensors cannot be read"


def empty_weights(place):
    (place.checkpoint / "model.safetensors").write_bytes(b"")
    return ("evaluate.py", "shapes", "run"), "run/model.safetensors cannot be read"


def evaluation_of_nothing(place):
    return ("evaluate.py", "shapes", place.checkpoint, "--n", 0), "--n must be at least 6"


def target_of_1_5(place):
    return sample(place, "--targets", "contrast=1.5"), "--targets contrast=1.5: a level is a number"


def target_high(place):
    return sample(place, "--negative", "contrast=high"), "--negative contrast=high: a level is"


def unknown_word(place):
    return (sample(place, prompt=("--prompt", "a red dog")),
            "'a red dog' has the unknown word 'dog'; the words are: a, above, an")


def unknown_word_in_the_negative(place):
    return sample(place, "--negative-prompt", "ugly"), "'ugly' has the unknown word 'ugly'"


def prompt_too_long(place):
    return sample(place, prompt=("--prompt", "a red circle " * 9)), "has 27 words; shorten it to"


def no_prompt(place):
    return sample(place, prompt=()), "name one of --prompt TEXT and --prompts FILE"


def sweep_malformed(place):
    return sample(place, "--sweep", "contrast=0:1"), "--sweep contrast=0:1: write reward=first:last"


def sweep_of_nothing(place):
    return sample(place, "--sweep", "contrast=0:1:0"), "--sweep contrast=0:1:0: write reward"


def sweep_without_name(place):
    return sample(place, "--sweep", "=0:1:3"), "--sweep =0:1:3: write reward=first:last:count"


def sweep_of_an_unknown_reward(place):
    return sample(place, "--sweep", "beauty=0:1:3"), "--sweep beauty=0.0: no such reward"


def sweep_out_of_range(place):
    return sample(place, "--sweep", "contrast=0:2:3"), "--sweep contrast=2.0: a level is a number"


def best_of_by_nothing(place):
    return sample(place, "--best-of", "2"), "--best-of needs --by one of alignment, colorfulness"


def best_of_by_unknown(place):
    return sample(place, "--best-of", "2", "--by", "beauty"), "--best-of needs --by one of"


def png_below_a_file(place):
    place.write("mine", "text")
    return sample(place, "--out", "mine/out.png"), "--out mine/out.png: mine is a file, not a"


def png_that_is_a_folder(place):
    (place.folder / "d.png").mkdir()
    return sample(place, "--out", "d.png"), "--out d.png is a folder"


def prompts_missing(place):
    return sample(place, prompt=("--prompts", "nowhere.txt")), "nowhere.txt: there is no such file"


def prompts_are_a_folder(place):
    return sample(place, prompt=("--prompts", str(place.world))), "world: there is no such file"


def prompts_empty(place):
    return prompts(place, "\n  \n"), "jobs.jsonl has no prompt: write one a line"


def prompts_not_utf_8(place):
    return prompts(place, b"\xff\xfea\0"), "jobs.jsonl is not text in UTF-8"


def prompts_half_json(place):
    return prompts(place, 'a triangle\n{"prompt": "a cr'), "jobs.jsonl, line 2 is not JSON"


def prompts_unknown_key(place):
    return prompts(place, [{"prompt": "a triangle", "tragets": {}}]), "jobs.jsonl, line 1 needs"


def prompts_without_prompt(place):
    return prompts(place, [{"seed": 1}]), "jobs.jsonl, line 1 needs a text prompt"


def prompts_negative_seed(place):
    return prompts(place, [{"prompt": "a triangle", "seed": -1}]), "jobs.jsonl, line 1 needs"


def prompts_seed_of_text(place):
    return prompts(place, [{"prompt": "a triangle", "seed": "7"}]), "a seed (0 or more): see seed"


def prompts_targets_of_text(place):
    return prompts(place, [{"prompt": "a triangle", "targets": "all=1"}]), "see targets"


def prompts_target_too_high(place):
    return (prompts(place, [{"prompt": "a triangle", "targets": {"contrast": 2}}]),
            "jobs.jsonl, 'a triangle': targets contrast=2: a level is a number from 0")


def prompts_unknown_reward(place):
    return (prompts(place, [{"prompt": "a triangle", "negative": {"beauty": 0}}]),
            "jobs.jsonl, 'a triangle': negative beauty=0: no such reward")


WAYS = [way for way in [*vars().values()]                # every function above that takes a place
        if inspect.isfunction(way) and [*inspect.signature(way).parameters] == ["place"]]


def ends_well(place, arguments, said: str) -> None:
    """One sentence with `said`, code 2, and every file as it was."""
    before = snapshot(place.folder)
    code, _, stderr = run(*arguments)
    # A state that cannot be read is named as it is passed over; the end is the last line.
    found = [line for line in sentences(stderr) if "trying the one before" not in line]
    assert code == 2 and len(found) == 1, stderr
    assert said in found[0] and "Traceback" not in stderr
    after = snapshot(place.folder)
    assert after.keys() == before.keys(), sorted(map(str, after.keys() ^ before.keys()))
    assert after == before


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_bad_input_ends_in_one_sentence_with_code_2_and_changes_nothing(place, way):
    arguments, said = way(place)
    ends_well(place, arguments, said)
    assert not (place.folder / "exploded").exists()


@pytest.mark.parametrize("flags, said", [
    ("--patch 5", "--patch 5 does not divide --size 16"), ("--patch 0", "--patch 0"),
    ("--size 0", "--size 0"), ("--steps 0", "--steps 0"), ("--blocks 0", "--blocks 0"),
    ("--val 0", "--val 0"), ("--bins 1", "--bins 1"), ("--seed -1", "--seed -1"),
    ("--latent-dim 33", "--latent-dim 33 is shared by 4 heads: choose a multiple of 4"),
    ("--data-dim 30", "--data-dim 30 is shared by 4 heads"), ("--lr nan", "--lr nan"),
    ("--lr -1", "--lr -1.0"), ("--ema 1.5", "--ema 1.5: it is at least 0 and at most 1"),
    ("--reward-dropout 2", "--reward-dropout 2.0"), ("--workers -1", "--workers -1"),
    ("--warmup -1", "--warmup -1"), ("--save-every 0", "--save-every 0"),
    ("--batch 9 --accumulate 2", "--batch 9 is for all ranks and micro-batches together"),
    ("--optimizer sgd", "--optimizer sgd: there are muon, adamw and lamb"),
    ("--preset large", "--preset large: there are shapes and paper"),
    ("--precision int8", "--precision int8: there are auto, fp32, bf16, fp16"),
    ("--seed 99999999999999999999", "--seed 99999999999999999999: it is at least 0 and at most"),
    ("--t-mean 20", "--t-mean 20.0: it is at least -9 and at most 9"),
    ("--latent-dim 4", "--latent-dim 4: it is at least 8"), ("--data-dim 4", "--data-dim 4"),
])
def test_a_flag_of_train_that_cannot_be_is_named_before_anything_is_written(place, flags, said):
    ends_well(place, train(place, *flags.split(), data=False), said)


@pytest.mark.parametrize("flags, said", [
    ("--steps 0", "--steps 0: it is at least 1"), ("--n 0", "--n 0: it is at least 1"),
    ("--best-of 0", "--best-of 0"), ("--batch 0", "--batch 0"), ("--scale 0", "--scale 0"),
    ("--seed -1", "--seed -1: it is 0 or more"), ("--guidance -1", "--guidance -1.0"),
    ("--guidance nan", "--guidance nan"), ("--seed 99999999999999999999", "--seed 9999999999999"),
])
def test_a_flag_of_sample_that_cannot_be_is_named(place, flags, said):
    ends_well(place, sample(place, *flags.split()), said)


@pytest.mark.parametrize("arguments, flag", [
    (("train.py", "--steps", "many"), "--steps"), (("train.py", "--stepz", "3"), "--stepz"),
    (("sample.py", "--solver", "heun"), "--solver"), (("evaluate.py", "faces", "run"), "shapes"),
    (("rewards.py", "--hpsv2", "3"), "--hpsv2"), (("data.py", "chekc", "d"), "chekc"),
])
def test_what_argparse_refuses_ends_with_code_2_and_names_it(place, arguments, flag):
    code, _, stderr = run(*arguments)
    assert code == 2 and flag in stderr.splitlines()[-1] and not any(place.folder.iterdir())


def test_a_process_of_its_own_ends_with_code_2_and_one_line(place):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--rewards", "beauty"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("unknown reward 'beauty'; valid: ")
    assert not any(place.folder.iterdir())


# ---- broken samples: left out and listed by name -------------------------------------------------

FAULTS = {                                          # what becomes of the files of key 00000007
    "half a PNG": dict(png=lambda content: content[:len(content) // 2]),
    "text called .png": dict(png=lambda content: b"no picture at all"),
    "an empty file": dict(png=lambda content: b""),
    "a huge picture": dict(png=lambda content: huge()),
    "an empty caption": dict(txt=lambda content: b" \n"),
    "no caption": dict(txt=lambda content: None),
    "a caption in UTF-16": dict(txt=lambda content: b"\xff\xfea\0"),
    "no picture": dict(png=lambda content: None),
}
REASONS = dict(zip(FAULTS, ("", "not a picture of a known format", "",
                            "Image size (10000000000 pixels)", "empty caption", "no caption",
                            "the .txt is not UTF-8", "no picture file")))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_sample_is_listed_by_name_and_stops_nothing(place, fault):
    path = place.world / "00000.tar"
    changed = {name: FAULTS[fault].get(name[-3:], bytes)(content)
               if name.startswith("00000007.") and name[-3:] in FAULTS[fault] else content
               for name, content in files_of(path).items()}
    tar(path, {name: content for name, content in changed.items() if content is not None})
    for name in ("00000.scores.jsonl", "bins.json", "bins.png"):
        (place.world / name).unlink()
    code, stdout, stderr = run("data.py", "check", "world", "--size", 16)
    assert code == 0 and f"  00000/00000007: world/00000.tar: {REASONS[fault]}" in stdout, stderr
    code, stdout, stderr = run("rewards.py", "world", "--size", 16)
    assert code == 0 and "1 failed" in stdout and "  00000/00000007: " in stdout, stderr
    assert REASONS[fault] in stdout
    _, lines = rewards.read_sidecar(place.world / "00000.scores.jsonl")
    assert "scores" not in lines.get("00000007", {}) and len(lines) in (299, 300)
    assert sum("scores" in line for line in lines.values()) == 299
    if fault in ("a huge picture", "no caption"):
        code, stdout, stderr = run("binning.py", "world", "--size", 16, "--bins", 8)
        assert code == 0 and "299 scores of 299 samples" in stdout, stderr
        code, _, stderr = run(*train(place))
        assert code == 0, stderr
        config = json.loads((place.folder / "out" / "config.json").read_text())
        assert config["train_samples"] + config["val_samples"] == 299


def test_more_than_one_percent_of_broken_pictures_ends_scoring_after_all_is_written(place):
    path = place.world / "00000.tar"
    tar(path, {name: content[:90] if name[-6:] in ("07.png", "11.png") else content
               for name, content in files_of(path).items()})
    (place.world / "00000.scores.jsonl").unlink()
    code, _, stderr = run("rewards.py", "world", "--size", 16)
    assert code == 2 and len(found := sentences(stderr)) == 1, stderr
    assert "world: 6 of 300 samples failed (the limit is 1%); repair or remove them" in found[0]
    _, lines = rewards.read_sidecar(place.world / "00000.scores.jsonl")
    assert sum("scores" in line for line in lines.values()) == 294
    code, _, stderr = run(*train(place))
    assert code == 2 and len(found := sentences(stderr)) == 1, stderr
    assert "world: 6 of 300 samples cannot be used (the limit is 1%)" in found[0]
    assert not (place.folder / "out").exists()
