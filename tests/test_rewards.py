"""rewards.py: closed forms of the rewards, and sidecars that survive kills, retries and editing."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import binning
import rewards
import shapes
from data import Pictures
from rewards import ANALYTIC as REWARDS
from rewards import default_rewards, read_scores, score, score_all, score_dataset

S = 24


def one(name: str, picture) -> float:
    """A reward of one picture (S, S), grey, or (S, S, 3), which no caption should change."""
    x = torch.as_tensor(np.asarray(picture), dtype=torch.uint8)
    x = x[..., None].expand(-1, -1, 3) if x.ndim == 2 else x
    return score(name, x.permute(2, 0, 1)[None], ["any caption"]).item()


def grey(level: int = 0) -> np.ndarray:
    return np.full((S, S), level, np.uint8)


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, S, S), generator=torch.Generator().manual_seed(seed),
                         dtype=torch.uint8)


def clean_world(n: int) -> tuple:
    """n pictures without a fault (n, 3, S, S), and their true captions."""
    drawn = [shapes.sample(0, i, S, clean=True) for i in range(n)]
    return (torch.from_numpy(np.stack([picture for picture, _, _ in drawn])).permute(0, 3, 1, 2),
            [caption for _, caption, _ in drawn])


# ---- the rewards ---------------------------------------------------------------------------------

def test_true_captions_of_clean_pictures_have_full_alignment_and_others_do_not():
    pictures, captions = clean_world(200)
    assert (score("alignment", pictures, captions) == 1).all()
    assert score("alignment", pictures, captions[1:] + captions[:1]).mean() < 0.6
    assert (score("alignment", torch.zeros_like(pictures), captions) == 0).all()


def test_alignment_is_the_share_of_true_statements():
    scene = shapes.Scene([shapes.Thing("circle", "red", 0.5, 0.5, 0.3)], 0.5, 1.0)
    drawn = shapes.draw(scene, S, np.random.default_rng(0))
    picture = torch.from_numpy(drawn).permute(2, 0, 1)[None]
    for caption, share in (("a red circle", 1), ("a blue circle", 1 / 2), ("two circles", 0),
                           ("a blue square", 0), ("a circle and a square", 1 / 2)):
        assert score("alignment", picture, [caption]).item() == pytest.approx(share), caption


def test_colorfulness_is_zero_on_grey_and_the_formula_on_two_colors():
    assert one("colorfulness", np.arange(S * S).reshape(S, S) % 256) == 0
    halves = np.zeros((S, S, 3), np.uint8)
    halves[:, :S // 2, 0], halves[:, S // 2:, 2] = 255, 255              # red, blue
    # rg: 255 and 0, yb: 127.5 and -255
    wanted = math.hypot(127.5, 191.25) + 0.3 * math.hypot(127.5, -63.75)
    assert one("colorfulness", halves) == pytest.approx(wanted, rel=1e-6)
    halves[:, S // 2:] = (255, 0, 0)                                      # red all over: no spread
    assert one("colorfulness", halves) == pytest.approx(0.3 * math.hypot(255, 127.5), rel=1e-6)


def test_colorfulness_and_contrast_do_not_depend_on_where_the_pixels_are():
    pictures = noise(4)
    moved = pictures.flatten(2)[:, :, torch.randperm(S * S)].view_as(pictures)
    for name in ("colorfulness", "contrast"):
        assert torch.allclose(score(name, moved, [""] * 4), score(name, pictures, [""] * 4))


@pytest.mark.parametrize("channel, weight", [(0, 0.2126), (1, 0.7152), (2, 0.0722)])
def test_contrast_of_two_halves_is_half_their_difference_in_luminance(channel, weight):
    halves = np.zeros((S, S, 3), np.uint8)
    halves[:, :S // 2, channel] = 200
    assert one("contrast", halves) == pytest.approx(weight * 200 / 255 / 2, rel=1e-6)
    assert one("contrast", grey(77)) == 0


def test_contrast_ends_at_half_of_white():
    halves = grey()
    halves[::2] = 255
    assert one("contrast", halves) == 0.5


@pytest.mark.parametrize("width", [1, 2, 4])
def test_sharpness_is_one_over_the_width_of_the_edges(width):
    ramp = np.clip((np.arange(S) - 8) / width, 0, 1)
    edge = np.tile(10 + 200 * ramp, (S, 1))
    assert one("sharpness", edge) == pytest.approx(200 / width / 205, rel=0.01)


def test_sharpness_asks_how_steep_an_edge_is_not_how_strong():
    strong = np.tile(np.repeat([0, 250], S // 2), (S, 1))
    weak = np.tile(np.repeat([100, 200], S // 2), (S, 1))
    both = np.concatenate([strong[:S // 2], weak[:S // 2]])
    assert one("sharpness", weak) == pytest.approx(100 / 105)
    assert one("sharpness", both) == pytest.approx(one("sharpness", strong), rel=0.15)
    soft = np.tile(np.clip(50 * (np.arange(S) - 9), 0, 250), (S, 1))           # 5 pixels wide
    assert one("sharpness", soft) < 0.25


def test_sharpness_counts_how_steep_edges_are_not_how_many():
    few = np.tile(np.repeat([0, 200], S // 2), (S, 1))
    many = np.tile([0, 200], (S, S // 2))
    assert one("sharpness", few) == one("sharpness", many) == pytest.approx(200 / 205)


def test_a_flat_picture_and_one_with_a_stray_grey_level_are_not_sharp():
    assert one("sharpness", grey(128)) == 0
    stray = grey(128)
    stray[5, 5] += 1
    assert one("sharpness", stray) < 0.2 < one("sharpness", noise(1)[0].permute(1, 2, 0))


def test_sharpness_does_not_repeat_contrast():
    bars = np.tile(np.repeat([0, 200], 4), (S, S // 8))
    assert one("contrast", bars // 2) == pytest.approx(one("contrast", bars) / 2)
    assert one("sharpness", bars // 2) == pytest.approx(one("sharpness", bars), rel=0.03)


def test_blur_lowers_sharpness_and_washing_out_lowers_contrast():
    pictures, captions = clean_world(100)
    blurred = torch.nn.functional.avg_pool2d(pictures.float(), 3, 1, 1, count_include_pad=False)
    washed = 204 + 0.3 * (pictures.float() - 204)
    for name, spoilt in (("sharpness", blurred), ("contrast", washed)):
        before, after = (score(name, x.round().byte(), captions) for x in (pictures, spoilt))
        clear = before > 0.02               # a grey as bright as its shape has no contrast to lose
        assert clear.float().mean() > 0.8 and (after < before)[clear].all(), name


@pytest.mark.parametrize("dx, dy", [(0, 0), (3, 0), (0, -5), (3, 4), (-6, 2)])
def test_composition_falls_with_the_distance_of_the_mass_from_the_centre(dx, dy):
    square = grey(60)
    square[10 + dy:14 + dy, 10 + dx:14 + dx] = 200
    assert one("composition", square) == pytest.approx(1 - math.hypot(dx, dy) / (S / 2))


def test_composition_takes_off_what_the_frame_cuts():
    cut = grey(60)
    cut[8:16, 8:16] = 200                                   # 64 pixels in the middle
    cut[0, 8:16] = cut[-1, 8:16] = 200                      # and 16 on the border, balanced
    assert one("composition", cut) == pytest.approx(64 / 80)
    assert one("composition", grey(60)) == 0                # no mass to place


def test_the_analytic_rewards_are_the_same_in_a_mirror():
    pictures, prompts = noise(5), [""] * 5
    for name in ("colorfulness", "contrast", "sharpness"):
        for mirrored in (pictures.flip(3), pictures.flip(2), pictures.transpose(2, 3)):
            assert torch.allclose(score(name, mirrored, prompts), score(name, pictures, prompts))
    dots = torch.zeros(1, 3, S, S, dtype=torch.uint8)
    dots[0, :, 3:9, 5:20] = 250
    for mirrored in (dots.flip(3), dots.flip(2), dots.transpose(2, 3)):
        assert one("composition", mirrored[0, 0]) == pytest.approx(one("composition", dots[0, 0]))


def test_confetti_hacks_colorfulness_and_ruins_alignment():
    pictures, captions = clean_world(100)
    draw, hacked = np.random.default_rng(0), pictures.clone()
    for picture in hacked:
        for _ in range(40):
            i, j = draw.integers(0, S - 2, 2)
            color = draw.choice([0, 255], 3)
            picture[:, i:i + 2, j:j + 2] = torch.as_tensor(color, dtype=torch.uint8)[:, None, None]
    before, after = (score("colorfulness", x, captions) for x in (pictures, hacked))
    assert after.mean() > before.mean() + before.std()
    assert score("alignment", hacked, captions).mean() < 0.5


@pytest.mark.parametrize("name", REWARDS)
def test_a_score_does_not_depend_on_its_batch(name):
    pictures, captions = clean_world(9)
    pictures = torch.cat([pictures, noise(3)])
    captions = captions + ["a circle"] * 3
    together = score(name, pictures, captions)
    alone = torch.cat([score(name, pictures[i:i + 1], captions[i:i + 1]) for i in range(12)])
    assert torch.equal(together, alone) and together.dtype == torch.float32


def test_columns_follow_the_names_that_are_asked_for():
    pictures, captions = clean_world(4)
    names = ("sharpness", "alignment")
    table = score_all(names, pictures, captions)
    assert table.dtype == torch.float32 and score_all((), pictures, captions).shape == (4, 0)
    for r, name in enumerate(names):
        assert torch.equal(table[:, r], score(name, pictures, captions))


def test_an_unknown_reward_is_an_error_that_lists_the_valid_ones():
    with pytest.raises(ValueError, match="unknown reward 'beauty'; valid: alignment, color"):
        score_all(("contrast", "beauty"), noise(1), [""])


def test_alignment_is_left_out_where_captions_are_not_of_its_grammar():
    own, other = [("a red circle",)] * 99, [("a dog on a beach",)]
    assert default_rewards(own + other) == REWARDS
    assert default_rewards(own + other * 2) == default_rewards(["a dog"]) == REWARDS[1:]
    with pytest.raises(ValueError, match="captions of shapes.py alone.*'a dog on a beach'"):
        rewards.choose_rewards("contrast,alignment", other)
    assert rewards.choose_rewards("sharpness,contrast", other) == ("contrast", "sharpness")


# ---- sidecars ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """120 pictures in 12 tars."""
    folder = tmp_path_factory.mktemp("world")
    shapes.write_world(folder, 120, seed=0, size=S, shard=10)
    return folder


@pytest.fixture
def data(world, tmp_path) -> Path:
    """A copy of the world without scores, to be scored or spoilt."""
    return Path(shutil.copytree(world, tmp_path / "data"))


@pytest.fixture(scope="module")
def scored_world(world, tmp_path_factory) -> Path:
    """A copy of the world with all its scores."""
    folder = shutil.copytree(world, tmp_path_factory.mktemp("scored") / "data")
    scored(folder)
    return folder


@pytest.fixture
def scored_data(scored_world, tmp_path) -> Path:
    """A copy of the scored world, to be read or spoilt."""
    return Path(shutil.copytree(scored_world, tmp_path / "data"))


def sidecars(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.glob("*.scores.jsonl")}


def scored(folder: Path, names=REWARDS, batch: int = 4, size: int = S, **how) -> dict:
    """Score all of a folder: its sidecars afterwards."""
    score_dataset(Pictures(folder, size), names, batch, **how)
    return sidecars(folder)


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def forked(work) -> int:
    """Start work() in a process of its own (torch is loaded already, which saves two seconds)."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)             # OpenMP's threads are not there after a fork
        tqdm.set_lock(threading.RLock())     # its own: a killed holder would lock all for ever
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
            try:
                work()
                os._exit(0)
            finally:
                os._exit(1)                  # the tests after this one are the parent's
    return child


def test_kill_9_at_any_moment_of_scoring_loses_nothing(data):
    start = time.time()
    assert os.waitpid(forked(lambda: scored(data)), 0)[1] == 0
    seconds, undisturbed = time.time() - start, sidecars(data)
    assert len(undisturbed) == 12
    for path in data.glob("*.scores.jsonl"):
        path.unlink()
    kills, chance = 0, random.Random(0)
    for _ in range(8):
        child = forked(lambda: scored(data))
        time.sleep(seconds * chance.uniform(0.1, 0.4))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        done = sidecars(data)
        assert done == {name: undisturbed[name] for name in done}      # whole or not there
    assert kills >= 2
    assert scored(data) == undisturbed


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_while_a_sidecar_is_written_leaves_the_one_before(data, monkeypatch, moment):
    before = scored(data, names=("contrast",))
    with monkeypatch.context() as patch:
        patch.setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        child = forked(lambda: scored(data))
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert sidecars(data) == before
    both = scored(data)
    assert all(set(json.loads(text.splitlines()[0])["rewards"]) == set(REWARDS)
               for text in both.values())


def test_two_processes_may_score_one_folder(data, scored_world, monkeypatch):
    sync = os.fsync

    def late(file):                                    # the other one does it all in the meantime
        monkeypatch.setattr(os, "fsync", sync)
        assert os.waitpid(forked(lambda: scored(data)), 0)[1] == 0
        sync(file)
    monkeypatch.setattr(os, "fsync", late)
    assert scored(data) == sidecars(scored_world) and not list(data.glob("*.tmp"))


def test_two_ranks_equal_one(data, monkeypatch):
    alone = scored(data)
    for path in data.glob("*.scores.jsonl"):
        path.unlink()

    def rank(number: int) -> None:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "2"}
        run(monkeypatch, rewards, data, "--batch", 4)

    ranks = [forked(lambda: rank(number)) for number in range(2)]
    assert [os.waitpid(child, 0)[1] for child in ranks] == [0, 0]
    assert sidecars(data) == alone


def test_a_shard_belongs_to_one_rank_alone(data):
    assert sorted(scored(data, rank=1, world=5)) == [f"{i:05d}.scores.jsonl" for i in (1, 6, 11)]


@pytest.fixture
def calls(monkeypatch) -> list:
    """Every (reward, number of pictures) that is scored from now on."""
    made, scorer = [], rewards.score
    monkeypatch.setattr(rewards, "score", lambda name, images, prompts:
                        made.append((name, len(images))) or scorer(name, images, prompts))
    return made


def test_a_finished_shard_and_a_finished_reward_are_not_scored_again(data, calls):
    scored(data, names=("contrast", "composition"))
    calls.clear()
    assert scored(data, names=("contrast",)) and not calls
    extended = scored(data)
    assert {name for name, _ in calls} == {"alignment", "colorfulness", "sharpness"}
    for path in data.glob("*.scores.jsonl"):
        path.unlink()
    assert scored(data) == extended                          # as if scored together


def test_another_size_or_version_is_scored_anew(data, calls, monkeypatch):
    first = scored(data, names=("contrast", "sharpness"))
    calls.clear()
    assert scored(data, names=("contrast",), size=16) != first
    assert sum(n for _, n in calls) == 120                   # and sharpness at 24 pixels is gone
    assert {name for name, _ in calls} == {"contrast"}
    assert scored(data, names=("contrast", "sharpness")) == first
    calls.clear()
    monkeypatch.setitem(rewards.SCORERS, "contrast", (rewards.contrast, "2"))
    scored(data, names=("contrast", "sharpness"))
    assert {name for name, _ in calls} == {"contrast"}


def folder_of_pictures(folder: Path, n: int = 12) -> Path:
    """key.png and key.txt of clean scenes."""
    folder.mkdir()
    for i in range(n):
        picture, caption, _ = shapes.sample(0, i, S, clean=True)
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption)
    return folder


def test_a_changed_caption_is_scored_anew_and_the_others_are_not(tmp_path, calls):
    data = folder_of_pictures(tmp_path / "pictures")
    scored(data)
    calls.clear()
    (data / "005.txt").write_text("four pink triangles")
    with pytest.raises(ValueError, match=r"00000.scores.jsonl: the captions of key '005' have"):
        read_scores(Pictures(data, S), REWARDS)
    scored(data)
    assert calls == [(name, 1) for name in REWARDS]
    rows, raws = read_scores(Pictures(data, S), REWARDS)
    assert rows == list(range(12)) and raws[5][0, 0] == 0


def test_a_picture_with_two_captions_has_two_scores(tmp_path):
    data = folder_of_pictures(tmp_path / "pictures", 3)
    caption = (data / "001.txt").read_text()
    (data / "001.json").write_text(json.dumps({"captions": ["four pink triangles"]}))
    scored(data)
    _, raws = read_scores(Pictures(data, S), ("contrast", "alignment"))
    assert [raw.shape for raw in raws] == [(1, 2), (2, 2), (1, 2)]
    assert raws[1][0, 0] == raws[1][1, 0] and raws[1][:, 1].tolist() == [1, 0], caption


def test_a_failed_sample_is_listed_has_no_score_and_can_be_retried(tmp_path, capsys):
    data = folder_of_pictures(tmp_path / "pictures")
    whole = scored(data)
    good = (data / "007.png").read_bytes()
    (data / "00000.scores.jsonl").unlink()
    (data / "007.png").write_bytes(good[:80])
    (data / "009.txt").write_text("a dog on a beach")            # alignment alone cannot read it
    scored(data)
    printed = capsys.readouterr().out
    assert "2 failed" in printed and "00000/007" in printed and "'a dog on a beach'" in printed
    lines = rewards.read_sidecar(data / "00000.scores.jsonl")[1]
    assert all(set(lines[key]) == {"key", "error"} for key in ("007", "009"))
    rows, raws = read_scores(Pictures(data, S), REWARDS)
    assert rows == [i for i in range(12) if i not in (7, 9)] and len(raws) == 10
    (data / "007.png").write_bytes(good)
    (data / "009.txt").write_text(shapes.sample(0, 9, S, clean=True)[1])
    assert "error" in rewards.read_sidecar(data / "00000.scores.jsonl")[1]["007"]
    assert scored(data) != whole and scored(data, retry=True) == whole


def test_a_shard_without_a_whole_sample_has_an_empty_sidecar(data):
    with tarfile.open(data / "00000.tar", "w") as tar:                # a picture without a caption
        tar.addfile(tarfile.TarInfo("lonely.png"))
    score_dataset(Pictures(data, S), ("contrast",))
    rows, _ = read_scores(Pictures(data, S), ("contrast",))
    assert rows == list(range(110))


def test_a_score_that_is_not_finite_is_a_failure_and_never_a_score(tmp_path, monkeypatch):
    data = folder_of_pictures(tmp_path / "pictures")
    spoilt = lambda images, prompts: torch.tensor([math.inf if "circle" in prompt else 1.0
                                                   for prompt in prompts])
    monkeypatch.setitem(rewards.SCORERS, "contrast", (spoilt, "spoilt"))
    failures = score_dataset(Pictures(data, S), ("contrast",))
    circles = [key for key in range(12) if "circle" in (data / f"{key:03d}.txt").read_text()]
    assert failures == {f"00000/{key:03d}": "contrast came out as inf" for key in circles} != {}
    assert read_scores(Pictures(data, S), ("contrast",))[0] == sorted({*range(12)} - {*circles})


def run(monkeypatch, script, *arguments) -> None:
    """main() of a script with these arguments."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


@pytest.mark.parametrize("old, new, said", [
    ('"contrast": [', '"contrast": [NaN, ', "key '00000000' has not one contrast score per"),
    ('"contrast": [0.', '"contrast": [-Infinity, 0.', "not one contrast score per caption"),
    ('"contrast": [0.', '"contrast": ["0.5", 0.', "not one contrast score per caption"),
    ('"scores"', '"score"', "key '00000000' has neither captions and scores nor an error"),
    ('{"key": "00000003"', '{"key": "00000002"', "key '00000002' is there twice"),
    ('{"key": "00000003"', '"key": "00000003"', "line 5, after key '00000002', is no JSON object"),
    ('"contrast": "1"', '"beauty": "1"', "unknown reward 'beauty' in the header; valid: aesth"),
    ('{"format": 1', '{"format": 2', "line 1 is not this shard's header in format 1"),
    ('"shard": "00000"', '"shard": "00001"', "line 1 is not this shard's header"),
])
def test_a_damaged_sidecar_ends_in_one_sentence_that_names_file_and_key(
        scored_data, old, new, said):
    path = scored_data / "00000.scores.jsonl"
    edit(path, old, new)
    pictures = Pictures(scored_data, S)
    for use in (lambda: read_scores(pictures, REWARDS), lambda: score_dataset(pictures, REWARDS)):
        with pytest.raises(ValueError, match="00000.scores.jsonl") as caught:
            use()
        assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"0.5"', "null", "true"])
def test_a_value_that_is_not_a_finite_number_stops_the_binning(scored_data, monkeypatch, value):
    path = scored_data / "00001.scores.jsonl"
    lines = path.read_text().splitlines()
    line = json.loads(lines[4])
    key, score = line["key"], line["scores"]["sharpness"][0]
    path.write_text("\n".join(lines).replace(f"[{score!r}]", f"[{value}]", 1))
    with pytest.raises(ValueError) as caught:
        run(monkeypatch, binning, scored_data)
    assert str(path) in str(caught.value) and f"{key!r} has the sharpness" in str(caught.value)
    assert not (scored_data / "bins.json").exists()


def test_missing_scores_stop_the_binning_with_file_key_and_command(data, monkeypatch):
    for names, remove, said in (((), (), "00000.scores.jsonl does not exist; run python rewards"),
                                (("contrast",), (), "has no sharpness scores of version 3; run"),
                                (REWARDS, ("00000003",), "key '00000003' has no scores; run")):
        if names:
            scored(data, names)
        for key in remove:
            path = data / "00000.scores.jsonl"
            path.write_text("".join(line for line in path.read_text().splitlines(True)
                                    if f'"{key}"' not in line))
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            run(monkeypatch, binning, data, "--rewards", "sharpness,contrast")
    with pytest.raises(ValueError, match="24 pixels, not 32; pass --size 24"):
        run(monkeypatch, binning, data, "--size", 32)
    with pytest.raises(ValueError, match="unknown reward 'beauty'; valid"):
        run(monkeypatch, binning, data, "--rewards", "beauty")


def test_the_binning_command_writes_bins_of_the_scores_and_prints_how_full_they_are(
        scored_data, monkeypatch, capsys):
    run(monkeypatch, binning, scored_data / "{00000..00011}.tar", "--bins", 8)
    bins = binning.load(scored_data / "bins.json")
    raw = np.concatenate(read_scores(Pictures(scored_data, S), REWARDS)[1])
    assert bins.names == REWARDS and bins.source == binning.fingerprint(raw, REWARDS)
    assert bins.counts.shape == (5, 8) and bins.counts.sum(1).tolist() == [120] * 5
    assert bins.counts[1].tolist() == [15] * 8                       # colorfulness has no ties
    assert "120 scores of 120 samples; 0 without" in (out := capsys.readouterr().out)
    assert "\ncolorfulness " in out and (scored_data / "bins.png").stat().st_size > 1000


def test_reading_scores_follows_a_selection_of_rows(scored_data):
    pictures = Pictures(scored_data, S)
    _, raws = read_scores(pictures, ("sharpness", "contrast"))
    some = np.random.default_rng(0).permutation(120)[:50].tolist()
    rows, selected = read_scores(pictures.select(some), ("sharpness", "contrast"))
    assert rows == list(range(50))
    assert all(np.array_equal(a, raws[i]) for a, i in zip(selected, some))
    picture = pictures.picture(some[0])[None]
    again = score_all(("sharpness", "contrast"), picture, [pictures.captions[some[0]][0]])
    assert np.array_equal(again.numpy(), selected[0])                # nothing is lost in the JSON


def test_reading_twenty_thousand_scores_takes_less_than_two_seconds(tmp_path):
    hashed = rewards.hashes(("a circle",))
    shards = [rewards.Shard(f"{i:05d}", tmp_path, 1000 * i, 1000 * i + 1000) for i in range(20)]
    for shard in shards:
        versions = {name: rewards.SCORERS[name][1] for name in REWARDS}
        rewards.write_sidecar(rewards.sidecar(shard), shard.name, versions, S, [
            {"key": f"{row}", "captions": hashed, "scores": {name: [0.1234567] for name in REWARDS}}
            for row in range(shard.start, shard.stop)])
    pictures = Pictures.__new__(Pictures)                            # as if of 20 tars
    pictures.path, pictures.size, pictures.shards = "data", S, shards
    pictures.keys = [f"{row}" for row in range(20000)]
    pictures.captions = [("a circle",)] * 20000
    start = time.process_time()
    rows, _ = read_scores(pictures, REWARDS)
    assert len(rows) == 20000 and time.process_time() - start < 2    # 0.5 s where it was written


def test_more_than_one_percent_of_failures_ends_with_code_2_after_all_is_written(data):
    first = data / "00000.tar"                         # two of the 120 pictures are cut in half
    content = bytearray(first.read_bytes())
    for start in [i for i in range(len(content)) if content.startswith(b"IDAT", i)][:2]:
        content[start:start + 40] = bytes(40)
    first.write_bytes(content)
    done = subprocess.run([sys.executable, ROOT / "rewards.py", data], capture_output=True,
                          text=True)
    assert done.returncode == 2 and len(sidecars(data)) == 12
    assert "2 failed" in done.stdout and "\nalignment           118 " in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"{data}: 2 of 120 samples failed (the limit")
    assert "Traceback" not in done.stderr and "120/120" in done.stderr          # the bar


@pytest.mark.parametrize("arguments, said", [
    (["--rewards", "alignment,beauty"], "unknown reward 'beauty'; valid: aesthetic"),
    (["--rewards", "contrast,contrast"], "named twice"),
    (["--batch", "0"], "--batch is at least 1"),
])
def test_a_wrong_flag_is_one_sentence(data, monkeypatch, arguments, said):
    with pytest.raises(ValueError, match=said):
        run(monkeypatch, rewards, data, *arguments)
    assert not sidecars(data)
