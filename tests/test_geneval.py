"""evaluate.py geneval: GenEval's rules on detections made by hand, its prompts, its
judges with small random networks in the files' true layout, and sample.py's pictures judged."""
import json
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT, refused, succeed
from PIL import Image
from safetensors.torch import save_file

import evaluate
from evaluate import Colors, Detector, Found, judge, keep, relations
from shapes import TASKS

RELEASE = ROOT / "tests" / "release"
ENCODERS = ("--text-encoder", RELEASE / "t5", "--vae", RELEASE / "vae")
fails = partial(refused, "evaluate.py", "geneval")
LINES = (ROOT / "assets" / "geneval.jsonl").read_text(encoding="utf-8").splitlines()


# ---- the rules -----------------------------------------------------------------------------------

def at(x, y, side=10, **more) -> Found:
    """A square box around a place."""
    return Found((x - side / 2, y - side / 2, x + side / 2, y + side / 2), **more)


def verdict(wanted: dict, colors="", **objects) -> tuple:
    """judge, with "red blue" as the colours of every group."""
    return judge(wanted, objects, lambda group, name: colors.split()[:len(group)])


def one(name="dog", count=1, **more) -> dict:
    return {"class": name, "count": count, **more}


def test_enough_objects_are_correct_and_more_of_them_still_are_up_to_what_is_excluded():
    wanted = {"include": [one(), one("cat", 2)]}
    assert verdict(wanted, dog=[at(0, 0)] * 3, cat=[at(5, 5)] * 2) == (True, "")
    assert verdict(wanted, cat=[at(5, 5)] * 2) == (False, "expected dog>=1, found 0")
    wanted = {"include": [one(count=2)], "exclude": [one(count=3)]}
    assert verdict(wanted, dog=[at(0, 0)] * 2)[0]
    assert verdict(wanted, dog=[at(0, 0)] * 3) == (False, "expected dog<3, found 3")


def test_the_first_objects_alone_have_their_colours_looked_at():
    wanted = {"include": [one(count=1, color="red")]}
    assert verdict(wanted, "red blue", dog=[at(0, 0)] * 2)[0]
    assert not verdict(wanted, "blue red", dog=[at(0, 0)] * 2)[0]      # the second is not the first
    both = {"include": [one(count=2, color="red")]}
    assert not verdict(both, "red blue", dog=[at(0, 0)] * 2)[0]
    assert verdict(both, "red red", dog=[at(0, 0)] * 2)[0]


def test_a_position_is_seen_from_the_group_of_its_number():
    wanted = {"include": [one("cat", color="red"), one("dog", position=["left of", 0])]}
    assert verdict(wanted, "red", cat=[at(50, 0)], dog=[at(0, 0)]) == (True, "")
    right, reason = verdict(wanted, "red", cat=[at(0, 0)], dog=[at(50, 0)])
    assert not right and "expected dog left of target" in reason
    right, reason = verdict(wanted, dog=[at(0, 0)])
    assert not right and "no target for dog to be left of" in reason


@pytest.mark.parametrize("x, y, expected", [
    (50, 0, {"right of"}), (-50, 0, {"left of"}), (0, 50, {"below"}), (0, -50, {"above"}),
    (50, 50, {"right of", "below"}), (1.9, 0, set()), (0, 0, set()),
    # 4 of the 10 pixels are within a tenth of the summed sizes: 0.6 of the length is left, 0.4 not
    (5, 0, {"right of"}), (4, 0, set()), (3.9, 0, set())])
def test_a_side_holds_above_half_of_the_offset_less_a_tenth_of_the_sizes(x, y, expected):
    assert relations(at(x, y), at(0, 0)) == expected


def test_weak_and_surplus_detections_are_not_seen():
    found = [("dog", at(0, 0, score=score)) for score in (0.31, 0.3, 0.95, 0.9, 0.5)]
    assert [thing.score for thing in keep(found, "colors")["dog"]] == [0.95, 0.9, 0.5, 0.31]
    assert [thing.score for thing in keep(found, "counting")["dog"]] == [0.95]
    many = [("dog", at(0, 0, score=0.5 + k / 100)) for k in range(20)]
    assert keep(many, "colors")["dog"] == [thing for _, thing in many[:3:-1]]


def test_the_overall_score_is_the_mean_of_the_tasks_and_equal_metadata_are_one_prompt():
    lines = [dict(tag=tag, correct=correct, metadata=metadata) for tag, correct, metadata in (
        ("counting", True, "a"), ("counting", True, "b"), ("counting", False, "b"),
        ("colors", False, "c"))]
    text, shares = evaluate.summary(lines, "title")
    assert shares == pytest.approx({"counting": 2 / 3, "colors": 0.0, "overall": 1 / 3})
    table = text.splitlines()
    assert table[1] == "4 images of 3 prompts; correct: 50.00% of the images, 66.67% of the prompts"
    assert table[-1] == "overall score (mean of the tasks): 0.33333"


# ---- the prompts ---------------------------------------------------------------------------------

def test_the_553_prompts_are_genevals_number_by_number():
    found = [json.loads(line) for line in LINES]
    counts = {task: sum(want["tag"] == task for want in found) for task in TASKS}
    assert counts == dict(single_object=80, two_object=99, counting=80, colors=94, position=100,
                          color_attr=100) and len(found) == 553
    # from published results and code that quotes lines of evaluation_metadata.jsonl
    published = {0: "a photo of a bench", 1: "a photo of a cow", 2: "a photo of a bicycle",
                 80: "a photo of a bench and a sports ball",
                 530: "a photo of a purple suitcase and an orange pizza"}
    assert {number: found[number]["prompt"] for number in published} == published
    assert dict(tag="counting", prompt="a photo of four benchs", include=[one("bench", 4)],
                exclude=[one("bench", 5)]) in found
    include = [one("tie"), one("dog", position=["right of", 0])]
    assert include in [want["include"] for want in found]
    assert {part["class"] for want in found for part in want["include"]} == set(evaluate.OBJECTS)


# ---- the judges ----------------------------------------------------------------------------------

def write_detector(folder: Path) -> None:
    """A Mask2Former of COCO's 80 classes, in the layout of the hub."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    torch.manual_seed(0)
    backbone = SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1],
                          num_heads=[1, 1, 2, 2], window_size=4,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=16, num_queries=12, id2label=dict(enumerate(evaluate.OBJECTS)))
    net = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "class_predictor" in name:
                p.mul_(30)                                             # sure of something
    net.save_pretrained(folder)


def write_clip(folder: Path) -> None:
    """An open_clip folder: open_clip_config.json and open_clip_model.safetensors."""
    vision = dict(image_size=32, layers=1, width=16, patch_size=8, head_width=8)
    text = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)
    architecture = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    torch.manual_seed(1)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": architecture, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.3] * 3}}))
    save_file(open_clip.CLIP(**architecture, quick_gelu=True).state_dict(),
              folder / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judges")
    write_detector(folder / Detector.SOURCE)
    write_clip(folder / Colors.SOURCE)
    with pytest.MonkeyPatch.context() as patch:       # pictures of 40 pixels are not seen in 800
        patch.setattr(Detector, "SIZE", {"shortest_edge": 48, "longest_edge": 96})
        yield folder


def test_a_detection_is_a_query_and_a_class_with_the_mean_probability_of_its_mask(judges):
    """The same, written a second time: query by query, in the pixels of the picture."""
    detector = Detector(judges, torch.device("cpu"))
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    given = sorted(detector(image), key=lambda pair: pair[1].score)
    seen = detector.processor(images=image, return_tensors="pt")
    assert seen["pixel_values"].shape[-2:] == (64, 64)           # 48 x 60, rounded up by 32
    with torch.no_grad():
        out = detector.net(**seen)
    chances = out.class_queries_logits[0].softmax(-1)                            # (Q, 81)
    pairs = sorted((float(chances[q, k]), q, k) for q in range(12) for k in range(80))[-12:]
    expected = []
    for chance, q, k in pairs:
        mask = torch.nn.functional.interpolate(out.masks_queries_logits[:, q:q + 1], (64, 64),
                                               mode="bilinear")
        mask = torch.nn.functional.interpolate(mask, (40, 50), mode="bilinear")[0, 0]
        inside = mask > 0
        if inside.any():
            y, x = torch.nonzero(inside, as_tuple=True)
            expected.append((chance * float(mask[inside].sigmoid().mean()), evaluate.OBJECTS[k],
                             (x.min(), y.min(), x.max() + 1, y.max() + 1), int(inside.sum())))
    assert len(given) == len(expected) >= 6
    for (name, thing), (score, k, box, count) in zip(given, sorted(expected, key=lambda e: e[0])):
        assert name == k and thing.score == pytest.approx(score, rel=1e-4)
        assert thing.box == box and thing.mask.shape == (40, 50) and thing.mask.sum() == count


def test_the_colour_is_the_nearest_mean_of_three_prompts(judges):
    """Zero-shot by hand, on the box alone, grey outside of the mask."""
    colors = Colors(judges, torch.device("cpu"))
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
    mask = np.zeros((40, 50), bool)
    mask[10:30, 5:20] = rng.random((20, 15)) < 0.7
    pixels = np.asarray(image).copy()
    pixels[~mask] = 0x99
    with torch.no_grad():
        seen = colors.net.encode_image(
            colors.transform(Image.fromarray(pixels[10:30, 5:20]))[None])[0]
        scores = []
        for paint in evaluate.PAINTS:
            texts = [f"a photo of a {paint} dog", f"a photo of a {paint}-colored dog",
                     f"a photo of a {paint} object"]
            read = torch.stack([colors.net.encode_text(colors.tokenizer([t]))[0] for t in texts])
            mean = (read / read.norm(dim=1, keepdim=True)).mean(0)
            scores.append(float(seen @ mean / mean.norm()))
    thing = Found((5, 10, 20, 30), mask=mask)
    assert colors(image, [thing, thing], "dog") == [evaluate.PAINTS[int(np.argmax(scores))]] * 2


# ---- the commands --------------------------------------------------------------------------------

def test_geneval_is_generated_and_judged_from_end_to_end(judges, tmp_path, capsys):
    """A prompt of each task with the released layout's small network; then the summary."""
    few = [next(line for line in LINES if json.loads(line)["tag"] == task) for task in TASKS]
    (tmp_path / "few.jsonl").write_text("\n".join(few))
    out = tmp_path / "out"
    succeed("sample.py", "--checkpoint", RELEASE, "--prompts", tmp_path / "few.jsonl", "--n", 2,
            "--steps", 2, "--out", out, *ENCODERS)
    files = sorted(out.glob("*/samples/*.png"))
    assert len(files) == 12 and Image.open(files[0]).size == (64, 64)
    assert [file.read_text() for file in sorted(out.glob("*/metadata.jsonl"))] == few
    evaluate.main(["geneval", str(out), "--models", str(judges)])
    lines = [json.loads(line) for line in (out / "results.jsonl").open()]
    assert [line["filename"] for line in lines] == [str(file.relative_to(out)) for file in files]
    right = sum(line["correct"] for line in lines) / 12
    assert f"12 images of 6 prompts; correct: {right:.2%} of the images" in capsys.readouterr().out
    least = {line["tag"]: min([1.0, *(box[4] for group in json.loads(line["details"]).values()
                                      for box in group)]) for line in lines}
    assert least.pop("counting") > 0.9 > min(least.values()) > 0.3  # counting asks for surer ones


def test_missing_judges_damaged_pictures_and_metadata_are_named(judges, tmp_path):
    place = tmp_path / "00000"
    metadata, picture = place / "metadata.jsonl", place / "samples" / "0000.png"
    assert "sample.py --prompts assets/geneval.jsonl --n 4" in fails(tmp_path)
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"no picture")
    metadata.write_text(LINES[0])
    said = fails(tmp_path, "--models", tmp_path / "nowhere")
    assert f"geneval needs config.json, *.safetensors of {Detector.SOURCE}" in said
    said = fails(tmp_path, "--models", judges)
    assert f"{picture} cannot be read" in said
    Image.new("RGB", (40, 40)).save(picture)
    metadata.write_text('{"prompt": "a dog"}')
    assert f"{metadata} has no tag: GenEval is of" in fails(tmp_path, "--models", judges)
    metadata.write_text("{")
    assert f"{metadata} cannot be read" in fails(tmp_path, "--models", judges)
    assert not (tmp_path / "results.jsonl").exists()
