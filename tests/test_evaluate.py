"""evaluate.py on the embedded world: the benchmark, control, comparison of runs."""
import errno
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, refused, run, succeed

import evaluate
import sample
import shapes
from data import read_json, stream, write_json
from evaluate import MEASURES
from shapes import ANALYTIC, TASKS, score_all

fails = partial(refused, "evaluate.py")


@pytest.fixture(scope="module")
def model(checkpoint) -> sample.Model:
    return sample.load(checkpoint, "cpu")


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint to write into."""
    return Path(shutil.copytree(checkpoint, tmp_path / "run"))


def levels(model, n, value=1.0) -> torch.Tensor:
    return torch.full((n, len(model.rewards)), value)


def texts_of(n: int, seed: int = 0) -> list[str]:
    return [want["prompt"] for want in evaluate.benchmark(n, seed)]


def cells(output: str) -> dict[str, list[str]]:
    """Rows of the first table: the name → the cells."""
    return {line.split()[0]: line.split()[1:] for line in reversed(output.splitlines())
            if line.split()}


# ---- the benchmark -------------------------------------------------------------------------------

def test_the_benchmark_has_unseen_prompts_of_the_six_tasks_in_turn():
    wanted = evaluate.benchmark(600)
    assert [want["tag"] for want in wanted] == list(TASKS) * 100
    assert all(shapes.held_out(want["prompt"]) for want in wanted)


def verdict(picture: torch.Tensor, caption: str) -> dict:
    return evaluate.verdicts(picture[None], [evaluate.metadata_of("any", caption)])[0]


def drawing(things, rng, size=24) -> torch.Tensor:
    scene = shapes.Scene(list(things), rng.uniform(0.3, 0.7), rng.uniform(*shapes.SATURATION))
    return torch.from_numpy(shapes.draw(scene, size, rng)).permute(2, 0, 1)


def test_a_thing_that_was_not_asked_for_is_wrong_and_boxes_are_where_things_are():
    picture = drawing([shapes.Thing("circle", "red", 0.25, 0.5, 0.18),
                       shapes.Thing("square", "blue", 0.75, 0.5, 0.18)], np.random.default_rng(0))
    line = verdict(picture, "a circle")
    assert not line["correct"] and line["reason"] == "expected square<1, found 1"
    left, top, right, bottom, score = json.loads(line["details"])["circle"][0]
    assert [left, top, right, bottom] == pytest.approx(
        [24 * part for part in (0.07, 0.32, 0.43, 0.68)], abs=0.5) and score == 1


@pytest.mark.parametrize("size", [24, 32])
def test_the_detector_gives_the_verdict_of_what_was_drawn_on_truths_and_on_lies(size):
    for number in range(120):
        rng = stream(0, "detector", number)
        things, claims = shapes.compose(TASKS[number % 6], rng)
        picture = drawing(things, rng, size)
        kind, lied = shapes.lie(claims, rng)
        assert verdict(picture, shapes.write(claims))["correct"], number
        assert not verdict(picture, shapes.write(lied))["correct"], (number, kind)


def test_the_evaluation_is_the_mean_score_of_what_sample_py_makes(model, tmp_path, capsys):
    """With another seed, which is other prompts and other noise."""
    found, texts = evaluate.evaluate_folder(model, tmp_path, 12, seed=1), texts_of(12, 1)
    printed, noise = cells(capsys.readouterr().out), range(12, 24)
    assert not set(texts) <= set(texts_of(12))
    asked = levels(model, 12, 0.75)
    asked[:, 0] = 1
    own = "all=0.75 alignment=1"                                # the checkpoint's
    for request, s in ((own, asked), ("all=1", levels(model, 12, 1.0)),
                       ("all=0", levels(model, 12, 0.0))):
        shown = sample.pictures(model, texts, s, seeds=noise)
        scores = score_all(ANALYTIC, shown, texts)
        means = (found | found["first"])[request]
        assert [means[name] for name in ANALYTIC] == pytest.approx(
            scores.mean(0).tolist(), rel=1e-4), request
        if request == own:
            by_task = scores[:, ANALYTIC.index("alignment")].view(2, 6).mean(0)
            assert list(found["tasks"].values()) == pytest.approx(by_task.tolist())
            lines = evaluate.verdicts(shown, evaluate.benchmark(12, 1))
            right = np.array([line["correct"] for line in lines]).reshape(2, 6).mean(0)
            assert list(found["accuracy"].values()) == pytest.approx([*right, right.mean()])
            assert [json.loads(line) for line in (tmp_path / "results.jsonl").open()] == lines
    alone = levels(model, 12)
    alone[:, 2] = 0
    contrast = score_all(["contrast"], sample.pictures(model, texts, alone, seeds=noise), texts)
    found = found["first"]
    assert found["contrast=0"]["contrast"] == pytest.approx(float(contrast.mean()), rel=1e-4)
    gain = (found["all=1"]["contrast"] - found["contrast=0"]["contrast"]) / model.bins.std[2]
    assert printed["contrast"][-1] == f"{gain:.3f}"


def test_other_targets_are_judged_alone_and_out_leaves_the_checkpoint_as_it_is(
        folder, model, tmp_path, monkeypatch):
    temporary = tempfile.TemporaryFile

    def read_only(dir):                                             # a disk, for root too
        if dir == str(folder):
            raise OSError(errno.EROFS, "Read-only file system")
        return temporary(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    before, out = sorted(folder.rglob("*")), tmp_path / "o" / "p"
    assert f"{folder} cannot be written to (Read-only file system): name" in fails("shapes", folder)
    assert "name one" in fails("shapes", folder, folder, "--out", out)
    code, stdout, stderr = run("evaluate.py", "shapes", folder, "--n", 6, "--guidance", 2,
                               "--targets", "all=0.5", "alignment=1", "--out", out)
    s = levels(model, 6, 0.5)
    s[:, 0] = 1
    shown = sample.pictures(model, texts_of(6), s, seeds=range(6), guidance=2.0)
    contrast = score_all(["contrast"], shown, texts_of(6))
    assert code == 0 and cells(stdout)["contrast"] == [
        f"{float(contrast.mean()):.3f}", f"{float(contrast.std()) / 6 ** 0.5:.3f}"], stderr
    assert sorted(folder.rglob("*")) == before
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "results.jsonl"}


def test_the_shipped_checkpoint_shows_what_is_asked_for():
    """docs/results.md's row, on a tenth of its prompts: 0.984 and 96.3 %."""
    shipped = sample.load(sample.SHIPPED, "cpu")
    shipped.config["sampler"]["guidance"] = 1.0
    values, _ = evaluate.measure(
        shipped,
        evaluate.benchmark(60), range(60), ["all=0.75", "alignment=1"])
    accuracy, alignment = values.mean(0)[:2]
    assert alignment > 0.93 and accuracy > 0.88


# ---- control -------------------------------------------------------------------------------------

def test_control_sweeps_one_target_beside_the_others_and_tells_moves_order_and_cross_talk(
        model, folder, monkeypatch):
    """The first target moves its own alone, not evenly; the second moves the first, too."""
    def values(model, memory, n, each, targets):
        others, (reward, _, level) = targets[0], targets[1].partition("=")
        found, level = np.zeros((n, len(MEASURES))), float(level)
        if reward == "alignment":
            found[:, 1] = {0: 0, 0.5: 5, 1: 4}[level]
        if reward == "colorfulness":
            found[:, 1:3] = [2 * level, 8 * level]
        return found * [1, *model.bins.std] * {"all=1": 1, "all=0.5": 0.5}[others]

    monkeypatch.setattr(evaluate, "measured", values)
    text = evaluate.control(model, folder, 6, 3)
    first, second = map(cells, (text[:text.index("others=0.5")], text[text.index("others=0.5"):]))
    assert first["alignment"] == ["4.00", "0.00", "0.00", "0.00", "0.00", "0.500", "0.00"]
    assert first["colorfulness"] == ["2.00", "8.00", "0.00", "0.00", "0.00", "1.000", "0.06"]
    assert first["contrast"][-2:] == ["nan", "0.00"]
    assert second["colorfulness"] == ["1.00", "4.00", "0.00", "0.00", "0.00", "1.000", "0.06"]
    assert (folder / "control-1.png").exists() and (folder / "control-0.5.png").exists()


def constant(images, prompts):
    return torch.full((len(images),), 7.0)


def test_measurements_are_kept_one_by_one_and_made_anew_when_something_changed(
        folder, monkeypatch):
    model, calls, measure = sample.load(folder, "cpu"), [], evaluate.measure
    monkeypatch.setattr(evaluate, "measure", lambda *given: calls.append(given) or measure(*given))
    before = evaluate.control(model, folder, 6, 2)
    assert len(calls) == 16              # of 20: "all=1 contrast=1" is "all=1", whatever the reward
    kept = sorted((folder / "measured").iterdir())
    for file in kept[7:]:                                                       # it was stopped
        file.unlink()
    assert evaluate.control(model, folder, 6, 2) == before and len(calls) == 25
    old = evaluate.measured(model, folder, 6).mean()
    model.config["mean"] = [60.0] * 3
    norms = evaluate.measured(model, folder, 6).mean()
    with torch.no_grad():
        model.net.patch_out.weight.mul_(-1)
    weights = evaluate.measured(model, folder, 6).mean()
    assert old != norms != weights
    monkeypatch.setitem(shapes.SCORERS, "contrast", constant)                   # another scorer
    assert (evaluate.measured(model, folder, 6)[:, 3] == 7).all()


# ---- compare -------------------------------------------------------------------------------------

def reached(base: list, *told: list) -> list[str]:
    """The cells of race: the ends, times, and where each seed of "all" reaches what "none" has."""
    none, found = (np.array(curves, float)[..., None].repeat(len(MEASURES), 2)
                   for curves in ([base] * len(told), told))
    x = [50 * (k + 1) for k in range(len(base))]
    return cells(evaluate.race(dict(none=none, all=found), x, "t"))["contrast"]


def test_a_score_is_reached_when_it_is_not_lost_again():
    base = [0, 0, 0, 3]
    assert reached(base, [1, 2, 3, 4]) == ["0.000", "3.000", "1.000", "4.000", "1.3", "150"]
    assert reached(base, [5, 2, 3, 4])[-2:] == ["1.3", "150"]                  # lost after 50
    assert reached(base, [3, 3, 3, 3])[-3:] == ["≥", "4.0", "50"]              # or before
    assert reached(base, [5, 5, 5, 2])[-2:] == ["0.0", "inf"]
    assert reached(base, [1, 2, 3, 4], [0, 3, 3, 3])[-5:] == ["1.7", "±", "0.3", "150", "100"]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> dict[str, Path]:
    """A baseline, a run of one reward and one of all, with checkpoints kept at steps 1 and 2."""
    place = tmp_path_factory.mktemp("runs")
    for name in ("none", "contrast", "all"):
        succeed("train.py", *TINY, "--data", world, "--rewards", name, "--steps", 2, "--keep-every",
                1, "--out", place / name)
    return {path.name: path for path in place.iterdir()}


SMALL = ("--n", 6, "--curve", 6, "--best", 2, "--candidates", 2)


def changed(place: Path, to: Path, **args) -> Path:
    """A copy of a run whose config.json says other flags."""
    shutil.copytree(place, to)
    config = read_json(to / "config.json")
    config["args"] |= args
    write_json(to / "config.json", config)
    return to


def test_runs_are_compared_in_three_figures_and_three_tables(runs, tmp_path, monkeypatch):
    """Targets and guidance are of runs told all; others keep their own."""
    command = ("evaluate.py", "compare", *runs.values(), "--out", tmp_path, *SMALL,
               "--guidance", 2, "--targets", "all=0.5", "alignment=1")
    stdout = succeed(*command)
    assert {path.name for path in tmp_path.iterdir()} == {
        "compare.txt", "compare.png", "convergence.png", "best_of_n.png", "measured"}
    final, speed, best = stdout.split("\n\n")
    assert set(cells(final)) == {"told", *runs} and final.splitlines()[2].startswith("none")
    wanted, two = evaluate.benchmark(6), [evaluate.benchmark(2)[k // 2] for k in range(4)]
    curves, pairs = [], []
    for name, w, asked in (("none", 0, ()), ("all", 2, ["all=0.5", "alignment=1"])):
        model = sample.load(runs[name], "cpu")
        model.config["sampler"]["guidance"] = w
        values, _ = evaluate.measure(model, wanted, range(6), asked)
        assert cells(final)[name] == ["1", *(f"{value:.3f}" for value in values.mean(0))]
        for step in (1, 2):
            kept = sample.load(runs[name] / f"step-00000{step}", "cpu")
            kept.config["sampler"]["guidance"] = w
            values, _ = evaluate.measure(kept, wanted, range(6), asked)
            curves.append(f"{values[:, 3].mean():.3f}")
        values, _ = evaluate.measure(model, two, range(4), asked)
        pairs += [f"{values[:, 3].mean():.3f}", f"{values[:, 3].reshape(2, 2).max(1).mean():.3f}"]
    assert cells(speed)["contrast"][:4] == curves and cells(best)["contrast"][:4] == pairs
    monkeypatch.setattr(sample, "pictures", None)                            # all is remembered
    assert run(*command)[1] == stdout


def test_a_run_told_all_but_one_is_asked_for_what_it_knows(world, tmp_path):
    told = "contrast,composition,sharpness,colorfulness"
    succeed("train.py", *TINY, "--data", world, "--rewards", told, "--steps", 1, "--out",
            tmp_path / "run")
    stdout = succeed("evaluate.py", "compare", tmp_path / "run", "--out", tmp_path, "--n", 6,
                     "--targets", "all=0.5", "alignment=1", "contrast=0")
    model = sample.load(tmp_path / "run", "cpu")
    values, _ = evaluate.measure(model, evaluate.benchmark(6), range(6), ["all=0.5", "contrast=0"])
    line = stdout.splitlines()[2].removeprefix("all but alignment").split()
    assert line == ["1", *(f"{value:.3f}" for value in values.mean(0))]


def groups(*places) -> dict[str, list[str]]:
    return {label: [one.name for one in group.values()]
            for label, group in evaluate.group_runs(places).items()}


def test_runs_are_grouped_by_the_flags_that_differ_and_seeds_are_pooled(runs, tmp_path):
    far = changed(runs["all"], tmp_path / "far", seed=1)
    slow = changed(runs["all"], tmp_path / "slow", lr=0.5)
    fork = changed(runs["all"], tmp_path / "fork", rotary=True)
    assert groups(runs["all"], far, runs["none"]) == {"none": ["none"], "all": ["all", "far"]}
    assert groups(runs["contrast"]) == {"contrast alone": ["contrast"]}
    assert groups(runs["all"], slow) == {"all lr=0.002": ["all"], "all lr=0.5": ["slow"]}
    assert set(groups(runs["none"], fork)) == {"none rotary=None", "all rotary=True"}
    assert groups(far, runs["all"], far)["all"] == ["all", "far"]                # by seed, and once
    twin = changed(runs["all"], tmp_path / "twin")                             # no flag differs
    assert groups(runs["all"], twin) == {str(runs["all"]): ["all"], str(twin): ["twin"]}


def test_runs_without_a_pair_or_common_steps_have_the_final_table_alone(runs, tmp_path):
    bare = shutil.copytree(runs["all"], tmp_path / "bare", ignore=shutil.ignore_patterns("step-*"))
    other = changed(runs["all"], tmp_path / "other", seed=1)
    for folder in (bare, other):
        out = tmp_path / f"out-{folder.name}"
        code, stdout, stderr = run("evaluate.py", "compare", folder, runs["none"], "--out", out,
                                   "--n", 6, "--curve", 6, "--candidates", 0)
        assert code == 0 and "speed-up" not in stdout and "best of" not in stdout, stderr
        assert {path.name for path in out.iterdir()} == {"compare.txt", "compare.png",
                                                              "measured"}


def test_runs_that_cannot_be_compared_or_swept_are_refused(runs, tmp_path):
    unfinished = changed(runs["all"], tmp_path / "unfinished", steps=9)
    said = fails("compare", runs["none"], unfinished, "--out", tmp_path / "out", *SMALL)
    assert f"{unfinished} has come to step 2 of 9: let it finish" in said
    assert "no such reward" in fails("compare", *runs.values(), "--out", tmp_path / "out",
                                     "--targets", "beauty=1")
    assert "was trained with no reward: control sweeps" in fails("control", runs["none"], "--n", 6)
