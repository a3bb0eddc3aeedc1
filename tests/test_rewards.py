"""rewards.py: scores that survive kills, failures and editing, by the analytic rewards alone."""
import csv
import json
import math
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from conftest import refused, run, sentences, succeed
from PIL import Image
from safetensors import safe_open

import binning
import rewards
import shapes
from data import Data, UserError, import_pictures
from rewards import read_header, read_scores, score_dataset, scores_path, write_scores
from shapes import ANALYTIC, score_all

S = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """120 pictures in 12 shards, without scores."""
    folder = tmp_path_factory.mktemp("world")
    shapes.write_world(folder, 120, seed=0, size=S, shard=10)
    return folder


@pytest.fixture
def data(world, tmp_path) -> Path:
    """A copy of the world, to be scored or spoilt."""
    return Path(shutil.copytree(world, tmp_path / "it's data"))


@pytest.fixture
def pictures(tmp_path) -> Path:
    """12 PNGs with captions, of which the fifth has two."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        picture, caption, _ = shapes.sample(0, i, S, clean=True)
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption)
    (folder / "004.json").write_text('{"captions": ["four pink triangles"]}')
    return folder


def imported(pictures: Path) -> Path:
    """DATA of a folder as it is now."""
    import_pictures([str(pictures)], pictures.with_name("data"), S)
    return pictures.with_name("data")


def scores(folder: Path) -> dict:
    """All that the files of scores say: {name: (metadata, {reward: bytes})}."""
    found = {}
    for path in sorted(folder.glob("*.scores.safetensors")):
        with safe_open(path, "np") as file:
            notes = json.loads(file.metadata()["miro"])
            found[path.name] = notes, {name: file.get_tensor(name).tobytes()
                                       for name in file.keys()}
    return found


def scored(folder: Path, names=ANALYTIC, batch: int = 4, **how) -> dict:
    score_dataset(Data(folder), names, batch, **how)
    return scores(folder)


@pytest.fixture
def calls(monkeypatch) -> list:
    """Every (reward, number of pairs) that is scored from now on."""
    made = []

    def counted(names, images, prompts):
        made.append((*names, len(prompts)))
        return score_all(names, images, prompts)

    monkeypatch.setattr(shapes, "score_all", counted)
    return made


def spoilt(images, prompts):
    """A scorer that is infinite on the beach."""
    return torch.tensor([math.inf if "beach" in prompt else 1.0 for prompt in prompts])


# ---- the format ----------------------------------------------------------------------------------

def test_a_row_of_scores_is_a_pair_and_a_column_has_a_version_and_a_digest(pictures, capsys):
    folder = imported(pictures)
    scored(folder, ("contrast", "alignment"))
    printed = capsys.readouterr().out.splitlines()[-3:-1]
    [shard] = Data(folder).shards
    raw, header = read_scores(shard, ("contrast", "alignment")), read_header(shard)
    assert raw.shape == (13, 2) and raw.dtype == np.float32
    assert raw[4, 0] == raw[5, 0] and raw[4:6, 1].tolist() == [1, 0]      # two captions of a row
    images = np.stack([shard.picture(row, S) for row in shard.owners])
    wanted = score_all(("contrast", "alignment"), torch.from_numpy(images), shard.captions)
    assert np.array_equal(raw, wanted.numpy())
    assert header["scorers"] == {name: shapes.version(name) for name in ("contrast", "alignment")}
    assert all(len(digest) == 16 for digest in header["digests"].values())
    for name, line, x in zip(("contrast", "alignment"), printed, raw.astype(np.float64).T):
        cells = line.split()
        assert cells[:2] == [name, "13"] and [float(cell) for cell in cells[2:]] == pytest.approx(
            [x.mean(), x.std(), x.min(), x.max()], rel=1e-3)


def test_a_failed_score_is_nan_and_named_and_never_a_number(pictures, monkeypatch, capsys):
    (pictures / "007.txt").write_text("a dog on a beach")         # alignment alone cannot read it
    (pictures / "004.json").write_text('{"captions": ["a cat"]}')    # nor one of its two captions
    folder = imported(pictures)
    monkeypatch.setitem(shapes.SCORERS, "contrast", spoilt)
    failures = score_dataset(Data(folder), ANALYTIC)
    [shard] = Data(folder).shards
    raw = read_scores(shard, ("alignment", "contrast", "sharpness"))
    assert np.flatnonzero(np.isnan(raw[:, 0])).tolist() == [4, 5, 8]      # pairs of rows 4 and 7
    assert np.flatnonzero(np.isnan(raw[:, 1])).tolist() == [8] and np.isfinite(raw[:, 2]).all()
    assert failures.keys() == {"pictures-00000/004", "pictures-00000/007"}
    assert read_header(shard)["failed"]["contrast"] == {
        "7": "contrast of 'a dog on a beach' came out as inf"}
    assert "pictures-00000/004: alignment of 'a cat' came out as nan" in capsys.readouterr().out


def test_rows_that_failed_are_tried_again_by_every_run_and_no_others(pictures, monkeypatch, calls):
    for name in ("007", "008"):                            # which alignment alone cannot read
        (pictures / f"{name}.txt").write_text("a dog on a beach")
    monkeypatch.setattr(shapes, "version", lambda name: "1")
    folder = imported(pictures)
    whole = scored(folder)
    [path] = folder.glob("*.scores.*")
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setitem(shapes.SCORERS, "contrast",
                      lambda *pairs: shapes.contrast(*pairs) * spoilt(*pairs))
        spoilt_once = scored(folder)
        written = path.stat().st_mtime_ns
        calls.clear()
        assert scored(folder) == spoilt_once != whole and calls == [("contrast", 2)]
        assert path.stat().st_mtime_ns == written            # as nothing came of it
    calls.clear()
    assert scored(folder) == whole and calls == [("contrast", 2)]
    calls.clear()
    assert scored(folder) == whole and not calls


# ---- what stays and what is made anew ------------------------------------------------------------

def test_a_finished_column_is_not_scored_again_and_another_is_added(data, calls):
    scored(data, ("contrast", "composition"))
    calls.clear()
    assert scored(data, ("contrast",)) and not calls
    extended = scored(data)
    assert {name for name, _ in calls} == {"alignment", "colorfulness", "sharpness"}
    for path in data.glob("*.scores.*"):
        path.unlink()
    assert scored(data) == extended                          # as if scored together


def test_a_scorer_of_another_version_scores_anew_and_its_old_scores_are_refused(
        data, calls, monkeypatch):
    scored(data, ("contrast", "sharpness"))
    version = shapes.version
    monkeypatch.setattr(shapes, "version", lambda name: version(name) + "+" * (name == "contrast"))
    shard = Data(data).shards[0]
    with pytest.raises(UserError, match=r"lacks scores .* by this code \(contrast\): run"):
        read_scores(shard, ("sharpness", "contrast"))
    calls.clear()
    scored(data, ("contrast", "sharpness"))
    assert {name for name, _ in calls} == {"contrast"}


@pytest.mark.parametrize("change", ["caption", "picture"])
def test_scores_of_other_pictures_or_captions_are_refused_and_made_anew(pictures, change, calls):
    folder = imported(pictures)
    scored(folder)
    if change == "caption":
        (pictures / "005.txt").write_text("four pink triangles")
    else:
        Image.new("RGB", (S, S), "red").save(pictures / "005.png")
    [shard] = Data(imported(pictures)).shards
    for read in (read_scores, read_header):
        with pytest.raises(UserError, match="lacks scores of these pictures and captions .* run .* "
                                            "--rewards contrast,alignment"):
            read(shard, ("contrast", "alignment"))
    calls.clear()
    scored(folder, ("contrast", "alignment"))
    assert sum(n for _, n in calls) == 2 * 13
    assert {*read_header(shard)["scorers"]} == {"alignment", "contrast"}
    assert read_scores(shard, ("alignment",))[6, 0] == 0


def test_a_column_of_a_name_unknown_here_is_kept_and_ignored(data):
    beauty, first = np.arange(10, dtype=np.float32), scores_path(Data(data).shards[0])
    scored(data, ("contrast",))
    columns = safetensors.numpy.load_file(first) | {"beauty": beauty}
    write_scores(Data(data).shards[0], columns, {"contrast": "old", "beauty": "a fork"}, {})
    scored(data)
    assert np.array_equal(safetensors.numpy.load_file(first)["beauty"], beauty)
    header = read_header(Data(data).shards[0])
    assert {*header["scorers"]} == {*ANALYTIC, "beauty"} and "beauty" in header["digests"]
    assert binning.fitted(data, 4).names == ANALYTIC


def test_what_is_missing_is_named_with_the_command_that_makes_it(data):
    shard = Data(data).shards[0]
    with pytest.raises(UserError, match=r"00000.scores.safetensors lacks .*\(all\): run python"):
        read_header(shard)
    scored(data, ("contrast",))
    with pytest.raises(UserError, match=r"lacks .*\(sharpness\): run") as caught:
        read_header(shard, ("contrast", "sharpness"))
    command = str(caught.value).split("run python ")[1]
    assert shlex.split(command) == ["rewards.py", str(data), "--rewards", "contrast,sharpness"]
    scores_path(shard).write_bytes(b"\x08")
    for use in (lambda: read_scores(shard, ("contrast",)), lambda: scored(data)):
        with pytest.raises(UserError, match="00000.scores.safetensors cannot be read"):
            use()


# ---- kills, ranks, processes ---------------------------------------------------------------------

@pytest.mark.parametrize("moment, count", [("fsync", 1), ("replace", 1), ("replace", 6)])
def test_kill_9_while_scores_are_written_loses_at_most_a_shard(data, child, moment, count):
    before = scored(data, ("contrast",))
    process = child("rewards.py", [data], data.parent, kill=(moment, count))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    after, whole = scores(data), scored(data)
    done, left = sorted(whole)[:count - 1], sorted(whole)[count - 1:]
    assert all(after[name] == whole[name] for name in done)
    assert all(after[name] == before[name] for name in left)
    assert all({*notes["scorers"]} == {*ANALYTIC} for notes, _ in whole.values())


def test_ranks_and_workers_make_the_same_scores(data, monkeypatch):
    alone = scored(data)
    for path in data.glob("*.scores.*"):
        path.unlink()
    scored(data, rank=1, ranks=5)
    assert sorted(scores(data)) == [f"{i:05d}.scores.safetensors" for i in (1, 6, 11)]
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run("rewards.py", data, "--batch", 4, "--workers", rank)[0] == 0
    assert scores(data) == alone


# ---- which rewards, and the command --------------------------------------------------------------

def test_alignment_is_left_out_where_captions_are_not_of_its_grammar(pictures):
    own, other = ["a red circle"] * 99, ["a dog on a beach"]
    assert rewards.default_rewards(own + other) == ANALYTIC
    assert rewards.default_rewards(own + other * 2) == ANALYTIC[1:]
    assert rewards.names_of("sharpness, contrast") == ("contrast", "sharpness")
    for path in pictures.glob("*.txt"):
        path.write_text("a dog on a beach")
    code, out, _ = run("rewards.py", imported(pictures))
    assert code == 0 and "alignment is left out" in out and "alignment   " not in out
    said = refused("rewards.py", imported(pictures), "--rewards", "contrast,alignment")
    assert "alignment reads the captions of shapes.py alone" in said


def test_more_than_one_percent_of_failures_ends_with_code_2_after_all_is_written(
        data, monkeypatch):
    bad = Data(data).shards[1].captions[:2]
    count = sum(caption in bad for shard in Data(data).shards for caption in shard.captions)
    monkeypatch.setitem(shapes.SCORERS, "contrast", lambda images, prompts: torch.tensor(
        [math.nan if prompt in bad else 1.0 for prompt in prompts]))
    code, out, err = run("rewards.py", data, "--rewards", "contrast")
    assert code == 2 and len(scores(data)) == 12
    [said] = sentences(err)
    assert f"{count} failed" in out and f"{count} of 120 samples cannot be used" in said


def test_a_forks_own_bug_keeps_its_traceback(data, monkeypatch):
    monkeypatch.setitem(shapes.SCORERS, "contrast", lambda images, prompts: np.ones(3) + np.ones(4))
    with pytest.raises(ValueError, match="could not be broadcast"):
        scored(data, ("contrast",))


def test_a_table_has_a_row_a_pair(data, tmp_path, monkeypatch):
    succeed("rewards.py", data, "--table", tmp_path / "t" / "scores.csv")
    with open(tmp_path / "t" / "scores.csv", newline="") as file:
        head, *rows = csv.reader(file)
    shards, names = Data(data).shards, head[3:]
    assert head[:3] == ["shard", "key", "caption"] and tuple(names) == ANALYTIC
    wanted = [row for shard in shards for row in read_scores(shard, names).tolist()]
    assert [[float(value) for value in row[3:]] for row in rows] == wanted
    assert [row[2] for row in rows] == [text for shard in shards for text in shard.captions]
    assert rows[0][:2] == [shards[0].name, shards[0].keys[0]]
    assert "is a folder: name a file" in refused("rewards.py", data, "--table", tmp_path)
    succeed("rewards.py", data, "--table", tmp_path / "no")                # any other name is CSV
    monkeypatch.setitem(sys.modules, "pandas", None)
    said = refused("rewards.py", data, "--table", tmp_path / "a.parquet")
    assert "name a .csv, or pip install pandas" in said
    assert not (tmp_path / "a.parquet").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused("rewards.py", data, "--table", tmp_path / "b.csv")
    assert "--table: run the same command once more" in said


def test_a_notebook_scores_any_pictures(data):
    run("rewards.py", data)
    shard = Data(data).shards[0]
    names, pictures = ["contrast", "alignment"], torch.from_numpy(shard.read("pixels"))
    found = rewards.score(names, pictures, [shard.caption(k) for k in range(shard.rows)])
    assert np.array_equal(found, read_scores(shard, names)) and found.shape == (shard.rows, 2)
    with pytest.raises(UserError, match="unknown reward 'beauty'"):
        rewards.score(["beauty"], pictures[:1], ["a red circle"])
    with pytest.raises(AssertionError, match="2 pictures, 1 captions"):
        rewards.score(["contrast"], pictures[:2], ["a red circle"])
