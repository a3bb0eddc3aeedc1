"""shapes.py: the detector is exact where it must be, captions mean what they say, scores are their
formulas, and a world is there whole or not at all."""
import hashlib
import itertools
import math
import os
import runpy
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import shapes
from data import Data, UserError
from shapes import (ANALYTIC, COLORS, ENDINGS, FAULTS, RELATIONS, SHAPES, TASKS, WORDS, Claims,
                    Group, Scene, Thing, detect, draw, holds, parse, prompts, score_all, truth,
                    write, write_world)

S = 24


def batch(pictures: list) -> torch.Tensor:
    """uint8 (S, S, 3) arrays → (B, 3, S, S)."""
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1)


def read(pictures: list) -> list:
    """What the detector reads, in batches of 64."""
    return [things for part in batch(pictures).split(64) for things in detect(part)]


def kinds(things: list) -> Counter:
    """How many of each (shape, color)."""
    return Counter((thing.shape, thing.color) for thing in things)


def things_of(parameters: dict) -> list:
    """The things drawn, from the parameters of a sample."""
    return [Thing(**thing) for thing in parameters["things"]]


def spoilt(seed: int, i: int, **fault) -> tuple:
    """A clean sample with a fault of this degree: picture, caption, things."""
    _, caption, p = shapes.sample(seed, i, S, clean=True)
    scene = Scene(things_of(p), p["background"], p["saturation"], **fault)
    return draw(scene, S, np.random.default_rng(i)), caption, scene.things


@pytest.fixture(scope="module")
def flawed() -> list:
    """2,000 samples of the world as it is written."""
    return [shapes.sample(5, i, 16) for i in range(2000)]


def test_the_detector_reads_ten_thousand_clean_scenes_back_exactly():
    for first in range(0, 10000, 1000):
        drawn = [shapes.sample(0, i, S, clean=True) for i in range(first, first + 1000)]
        for (_, caption, parameters), seen in zip(drawn, read([d[0] for d in drawn])):
            things = things_of(parameters)
            assert kinds(seen) == kinds(things), caption
            assert truth(parse(caption), seen) == 1, caption
            for thing in things:
                off = min(max(abs(thing.x - s.x), abs(thing.y - s.y)) for s in seen
                          if (s.shape, s.color) == (thing.shape, thing.color))
                assert off <= 0.5 / S, (caption, thing)                    # half a pixel


# Three standard deviations of 600 scenes below what 3,000 gave; a mild fault is below 0.475.
@pytest.mark.parametrize("fault, share", [("wash", 0.99), ("blur", 0.99), ("clutter", 0.57),
                                          ("frame", 0.93)])
def test_the_detector_reads_most_of_mildly_spoilt_scenes(fault, share):
    degrees = np.linspace(0.3, 0.475, 150).tolist()
    samples = [spoilt(10, i, **{fault: degree}) for i, degree in enumerate(degrees)]
    seen = read([picture for picture, _, _ in samples])
    n_right = sum((kinds(s) & kinds(things)).total() for s, (_, _, things) in zip(seen, samples))
    assert n_right > share * sum(len(things) for _, _, things in samples)


def test_a_picture_is_read_alike_alone_and_in_any_batch():
    assert read([np.full((S, S, 3), level, np.uint8) for level in (0, 128, 255)]) == [[], [], []]
    pictures = [shapes.sample(3, i, S)[0] for i in range(40)]
    assert read(pictures) == [read([p])[0] for p in pictures] == read(pictures[::-1])[::-1]


def test_a_shape_covers_its_area_around_its_centroid():
    grid = (np.arange(200) + 0.5) / 200
    for shape in SHAPES:
        [a] = shapes.coverage(shape, 0.4, 0.6, 0.3, 200)
        assert a.mean() == pytest.approx(shapes.AREA * 0.3 ** 2, rel=0.003)
        assert (a.sum(0) @ grid / a.sum(), a.sum(1) @ grid / a.sum()) == pytest.approx(
            (0.4, 0.6), abs=1e-3)


def test_every_claim_is_read_back_whatever_its_ending_its_capitals_and_its_spaces():
    words = set(" ".join(ENDINGS).split())
    single = [Group(*g) for g in itertools.product((1, 2, 3, 4), (None, *COLORS), SHAPES)]
    for groups in [*((g,) for g in single), *itertools.product(single, single)]:
        for relation in (None, *RELATIONS) if len(groups) == 2 else (None,):
            claims = Claims(list(groups), relation)
            caption = write(claims)
            assert parse(caption) == claims, caption
            words.update(caption.split())
            assert len((caption + ENDINGS[-1]).split()) <= 11             # data.json's "longest"
        for ending in ENDINGS:
            assert parse(f"  {(caption + ending).upper().replace(' ', '  ')}. ") == claims, ending
    assert WORDS == tuple(sorted(words))


@pytest.mark.parametrize("caption", [
    "", "a photo of a circle", "circle", "a purple circle", "five circles", "a circle and",
    "a circle and a square and a circle", "a circle beside a square", "a circle, a square",
    "a red blue circle", "a circlea square", "a circle in a photo in a photo", "a circle\x00"])
def test_foreign_text_is_refused_with_a_sentence_that_says_what_is_valid(caption):
    with pytest.raises(UserError) as error:
        parse(caption)
    assert all(word in str(error.value) for word in (repr(caption), *SHAPES, *COLORS, *RELATIONS))


RED = Thing("circle", "red", 0.2, 0.5, 0.1)
TWO = [RED, Thing("square", "blue", 0.8, 0.5, 0.1)]
THREE = [Thing("triangle", "pink", 0.2, 0.2, 0.1), Thing("triangle", "pink", 0.8, 0.2, 0.1),
         Thing("triangle", "cyan", 0.5, 0.8, 0.1)]


@pytest.mark.parametrize("caption, things, share", [
    ("a circle", [RED], 1),
    ("a blue circle", [RED], 1 / 2),                             # the count holds, the colour not
    ("a circle", TWO, 1),                                        # what is not named may be there
    ("a red circle and a blue square", TWO, 1),
    ("a blue circle and a red square", TWO, 1 / 2),              # swapped attributes
    ("a square left of a circle", TWO, 2 / 3),
    ("a blue circle left of a square", TWO, 2 / 4),              # no blue circle stands
    ("two triangles", THREE, 0),                                 # exactly two, not at least two
    ("two pink triangles", THREE, 1 / 2),                        # three triangles, two of them pink
    ("a pink triangle above a cyan triangle", [THREE[0], THREE[2]], 1),
    ("a triangle and a triangle", [THREE[0]], 0),                # one thing is not counted twice
    ("a circle left of a circle", [RED], 0),
    ("a red circle and a red circle", [RED, Thing("circle", "blue", 0.8, 0.5, 0.1)], 1 / 2),
])
def test_truth_is_the_share_of_the_statements_that_hold(caption, things, share):
    assert truth(parse(caption), things) == pytest.approx(share)
    assert truth(parse(caption), things[::-1]) == pytest.approx(share)


# GenEval: the offset of the centres a - b, each component less 0.1 x (size of a + size of b) and
# at least 0, over the length of the offset itself; a relation holds above 0.5. A box is 2 r wide.
@pytest.mark.parametrize("a, b, dx, dy", [
    # offset (0.3, -0.4) of length 0.5, less 0.1 * 0.3 = 0.03: (0.27, -0.37) / 0.5, both hold
    ((0.6, 0.3, 0.1), (0.3, 0.7, 0.05), 0.54, -0.74),
    # the same offset of larger things, less 0.1 * 0.7 = 0.07: (0.23, -0.33) / 0.5, one holds
    ((0.6, 0.3, 0.2), (0.3, 0.7, 0.15), 0.46, -0.66),
    # offset (-0.1, 0), less 0.1 * 0.8 = 0.08: 0.02 / 0.1, too near each other to stand anyhow
    ((0.4, 0.5, 0.2), (0.5, 0.5, 0.2), -0.2, 0),
    ((0.5, 0.5, 0.1), (0.5, 0.5, 0.1), 0, 0),
])
def test_relations_follow_the_rule_of_geneval(a, b, dx, dy):
    a, b = Thing("circle", "red", *a), Thing("square", "blue", *b)
    for relation, part in (("right of", dx), ("left of", -dx), ("below", dy), ("above", -dy)):
        assert holds(relation, a, b) == pytest.approx(part)
        assert (truth(parse(f"a circle {relation} a square"), [a, b]) == 1) == (part > 0.5)


def near(count: int, n: int, share: float) -> bool:
    """Within four standard errors of a binomial count."""
    return abs(count - n * share) < 4 * math.sqrt(n * share * (1 - share))


def test_three_captions_in_ten_lie_and_every_lie_is_false(flawed):
    lies = Counter(parameters["caption_lies"] for _, _, parameters in flawed)
    assert near(len(flawed) - lies[None], len(flawed), 0.3)
    assert set(lies) == {None, "shape", "count", "color", "side", "swap"}
    for _, caption, parameters in flawed:
        true = truth(parse(caption), things_of(parameters)) == 1
        assert true == (parameters["caption_lies"] is None), (caption, parameters)


def test_over_half_of_the_pictures_are_spoilt_and_the_faults_strike_independently(flawed):
    struck = np.array([[p[fault] > 0 for fault in FAULTS] + [p["caption_lies"] is not None]
                       for _, _, p in flawed])
    n = len(struck)
    assert near(struck[:, :4].any(1).sum(), n, 1 - 0.8 * 0.84 ** 3)              # 0.526
    assert all(near(struck[:, i].sum(), n, share)
               for i, share in enumerate((0.16, 0.16, 0.2, 0.16)))
    correlation = np.corrcoef(struck.T) - np.eye(5)
    assert np.abs(correlation).max() < 4 / math.sqrt(n)


def test_prompts_are_never_captions_of_training_which_have_every_word(flawed):
    captions = {caption for _, caption, _ in flawed}
    held_out = {prompt for task in TASKS for prompt in prompts(task, 85, seed=0)}
    assert not captions & held_out and len(captions) > 700 and len(held_out) > 100
    assert set(" ".join(captions).split()) == set(WORDS)


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_says_what_its_task_is_and_depends_on_the_seed_and_not_on_how_many(task):
    first = prompts(task, 60, seed=7)
    assert first[:30] == prompts(task, 30, seed=7) != prompts(task, 30, seed=8)
    for claims in map(parse, first):
        assert len(claims.groups) == 1 + (task in ("two_object", "position", "color_attr"))
        assert (claims.relation is not None) == (task == "position")
        assert all((g.color is not None) == task.startswith("color") for g in claims.groups)
        assert all((g.count > 1) == (task == "counting") for g in claims.groups)


def one(name: str, picture) -> float:
    """A reward of one picture (S, S), grey, or (S, S, 3), which no caption should change."""
    x = torch.as_tensor(np.asarray(picture), dtype=torch.uint8)
    x = x[..., None].expand(-1, -1, 3) if x.ndim == 2 else x
    return score_all((name,), x.permute(2, 0, 1)[None], ["any caption"]).item()


def grey(level: int = 0) -> np.ndarray:
    return np.full((S, S), level, np.uint8)


def edge(*levels: int) -> np.ndarray:
    """A picture of columns: levels in equal shares from left to right."""
    return np.tile(np.repeat(levels, S // len(levels)), (S, 1))


def test_true_captions_of_clean_pictures_have_full_alignment_and_others_do_not():
    drawn = [shapes.sample(0, i, S, clean=True) for i in range(200)]
    pictures, captions = batch([d[0] for d in drawn]), [d[1] for d in drawn]
    assert (score_all(("alignment",), pictures, captions) == 1).all()
    assert score_all(("alignment",), pictures, captions[1:] + captions[:1]).mean() < 0.6


def test_colorfulness_is_zero_on_grey_and_the_formula_on_two_colors():
    assert one("colorfulness", np.arange(S * S).reshape(S, S) % 256) == 0
    halves = np.zeros((S, S, 3), np.uint8)
    halves[:, :S // 2, 0], halves[:, S // 2:, 2] = 255, 255              # red, blue
    # rg: 255 and 0, yb: 127.5 and -255
    wanted = math.hypot(127.5, 191.25) + 0.3 * math.hypot(127.5, -63.75)
    assert one("colorfulness", halves) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("channel, weight", [(0, 0.2126), (1, 0.7152), (2, 0.0722)])
def test_contrast_of_two_halves_is_half_their_difference_in_luminance(channel, weight):
    halves = np.zeros((S, S, 3), np.uint8)
    halves[:, :S // 2, channel] = 200
    assert one("contrast", halves) == pytest.approx(weight * 200 / 255 / 2, rel=1e-6)
    assert one("contrast", grey(77)) == 0 and one("contrast", edge(0, 255)) == 0.5


def test_sharpness_is_one_over_the_width_of_edges_not_how_strong_or_how_many_they_are():
    for width in (1, 2, 4):
        ramp = np.tile(10 + 200 * np.clip((np.arange(S) - 8) / width, 0, 1), (S, 1))
        assert one("sharpness", ramp) == pytest.approx(200 / width / 205, rel=0.01)
    assert one("sharpness", edge(0, 200)) == one("sharpness", edge(*[0, 200] * 12))
    both = np.concatenate([edge(0, 250)[:S // 2], edge(100, 200)[:S // 2]])
    assert one("sharpness", both) == pytest.approx(one("sharpness", edge(0, 250)), rel=0.15)
    stray = grey(128)
    assert one("sharpness", stray) == 0
    stray[5, 5] += 1
    assert one("sharpness", stray) < 0.2


@pytest.mark.parametrize("dx, dy", [(0, 0), (3, 0), (0, -5), (3, 4), (-6, 2)])
def test_composition_falls_with_the_distance_from_the_centre_and_with_what_the_frame_cuts(dx, dy):
    square, cut = grey(60), grey(60)
    square[10 + dy:14 + dy, 10 + dx:14 + dx] = 200
    assert one("composition", square) == pytest.approx(1 - math.hypot(dx, dy) / (S / 2))
    cut[8:16, 8:16] = 200                                   # 64 pixels in the middle
    cut[0, 8:16] = cut[-1, 8:16] = 200                      # and 16 on the border, balanced
    assert one("composition", cut) == pytest.approx(64 / 80)
    assert one("composition", grey(60)) == 0                # no mass to place


def test_a_fault_lowers_its_reward_and_confetti_raises_colourfulness():
    def scores(**fault) -> torch.Tensor:
        pictures, captions, _ = zip(*(spoilt(5, i, **fault) for i in range(300)))
        return score_all(ANALYTIC, batch(pictures), captions)                    # (300, 5)

    clean = scores()
    gain = {fault: dict(zip(ANALYTIC, ((scores(**{fault: 0.7}) - clean).mean(0)
                                       / clean.std(0)).tolist())) for fault in FAULTS}
    assert gain["wash"]["contrast"] < -0.3 and gain["blur"]["sharpness"] < -0.3
    assert gain["frame"]["composition"] < -0.3 and gain["clutter"]["colorfulness"] > 2
    assert all(gain["clutter"][name] < -0.3 for name in ("contrast", "composition"))
    assert (scores(clutter=0.7) - clean)[:, 0].mean() < -0.3        # clean pictures are all 1


def test_a_version_is_that_of_the_file_of_a_scorer_which_a_fork_may_add(tmp_path, monkeypatch):
    code = "def red(images, prompts):\n    return images[:, 0].double().mean((1, 2))\n"
    for text in (code, code + "# more\n"):
        (tmp_path / "a.py").write_text(text)
        monkeypatch.setitem(shapes.SCORERS, "red", runpy.run_path(str(tmp_path / "a.py"))["red"])
        picture = torch.full((1, 3, 4, 4), 8, dtype=torch.uint8)
        assert score_all(("red", "contrast"), picture, [""]).tolist() == [[8, 0]]
        assert shapes.version("red") == hashlib.sha256(text.encode()).hexdigest()[:12]


def files(folder: Path) -> dict:
    """Each shard of a world and its bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_a_world_is_what_was_drawn_the_same_for_a_seed_and_another_for_another(tmp_path):
    for name, n, seed in (("a", 25, 3), ("b", 25, 3), ("c", 25, 1), ("more", 31, 3)):
        write_world(tmp_path / name, n, seed, size=16, shard=10)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b and list(a) == [f"0000{i}.safetensors" for i in range(3)]
    assert all(a[name] != c[name] for name in a)
    data, more = Data(tmp_path / "a"), Data(tmp_path / "more")
    assert (data.rows, data.pairs, data.size, data.kind) == (25, 25, 16, "pixels")
    assert tuple(data.info["words"]) == WORDS and data.info["longest"] == 11
    for i in range(25):
        shard, row = data.shards[i // 10], i % 10
        picture, caption, _ = shapes.sample(3, i, 16)
        assert np.array_equal(shard.picture(row, 16), picture.transpose(2, 0, 1))
        assert (shard.keys[row], shard.captions[row]) == (f"{i:08d}", caption)
        assert np.array_equal(more.shards[i // 10].picture(row, 16), shard.picture(row, 16))
    times = {path: path.stat().st_mtime_ns for path in data.path.iterdir()}
    write_world(data.path, 25, 3, size=16, shard=10)                         # finished files stay
    assert times == {path: path.stat().st_mtime_ns for path in data.path.iterdir()}


def killed(folder: Path, name: str, call: int) -> None:
    """Write a world in a process that ends at its `call`-th os.`name`, as kill -9 would end it."""
    child = os.fork()
    if child == 0:
        tqdm.set_lock(threading.RLock())         # its own: a killed holder would lock all for ever
        calls, function = itertools.count(), getattr(os, name)
        setattr(os, name, lambda *given: os._exit(9) if next(calls) == call else function(*given))
        write_world(folder, 42, 0, size=16, shard=10)
        os._exit(0)                                                            # never reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_world_killed_at_any_moment_ends_as_an_undisturbed_one(tmp_path):
    write_world(tmp_path / "calm", 42, 0, size=16, shard=10)
    calm = files(tmp_path / "calm")
    # five shards, then data.json; a restart has only the missing ones left to write
    for call, name, done in ((0, "fsync", 0), (2, "replace", 2), (0, "fsync", 2), (1, "fsync", 3),
                             (0, "replace", 3), (1, "replace", 4), (1, "replace", 5)):
        killed(tmp_path / "hurt", name, call)
        left = files(tmp_path / "hurt")
        assert len(left) == done and all(calm[name] == content for name, content in left.items())
        with pytest.raises(UserError, match="has no data.json"):
            Data(tmp_path / "hurt")
    write_world(tmp_path / "hurt", 42, 0, size=16, shard=10)
    assert files(tmp_path / "hurt") == calm and Data(tmp_path / "hurt").rows == 42


@pytest.mark.parametrize("n, seed, size, shard", [(21, 0, 16, 10), (20, 1, 16, 10), (20, 0, 18, 10),
                                                  (20, 0, 16, 20)])
def test_the_folder_of_another_world_is_refused_and_left_alone(tmp_path, n, seed, size, shard):
    write_world(tmp_path, 20, 0, size=16, shard=10)
    (tmp_path / "data.json").unlink()                         # as if it had been interrupted
    before = files(tmp_path)
    with pytest.raises(UserError, match="not of the world"):
        write_world(tmp_path, n, seed, size, shard)
    assert files(tmp_path) == before


def test_a_reward_that_gives_one_number_for_a_batch_is_named(monkeypatch):
    for wrong in (lambda images, _: images.float().mean(), lambda images, _: torch.zeros(4, 1)):
        monkeypatch.setitem(shapes.SCORERS, "taste", wrong)
        with pytest.raises(AssertionError, match=r"taste gave .* not \(4,\)"):
            shapes.score_all(("taste",), torch.zeros(4, 3, 24, 24, dtype=torch.uint8), [""] * 4)
