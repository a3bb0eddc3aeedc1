"""evaluate.py geneval and rewards: from prompts to a summary, with small random networks in the
files' true layout."""
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import run, sentences
from PIL import Image
from safetensors.torch import load_file, save_file
from test_release import ENCODERS
from test_release import FOLDER as RELEASE
from test_scoring import models, shrunk  # noqa: F401 (fixtures: seven small reward models)

import evaluate
import sample
from evaluate import Colors, Detector, Found
from shapes import TASKS

CPU = torch.device("cpu")


def write_detector(folder: Path) -> None:
    """A Mask2Former of COCO's 80 classes, in the layout of the hub."""
    from transformers import (Mask2FormerConfig, Mask2FormerForUniversalSegmentation,
                              Mask2FormerImageProcessor, SwinConfig)
    torch.manual_seed(0)
    backbone = SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1],
                          num_heads=[1, 1, 2, 2], window_size=4,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=16, num_queries=12, id2label={k: name for k, name in enumerate(
            evaluate.OBJECTS)})
    net = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "class_predictor" in name:
                p.mul_(30)                                             # sure of something
    net.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 384, "width": 384},
                              size_divisor=32).save_pretrained(folder)


def write_clip(folder: Path) -> None:
    """An open_clip folder: open_clip_config.json and open_clip_model.safetensors."""
    architecture = dict(embed_dim=16, vision_cfg=dict(image_size=32, layers=1, width=16,
                                                      patch_size=8, head_width=8),
                        text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2,
                                      layers=1))
    torch.manual_seed(1)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": architecture, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.3] * 3}}))
    save_file(open_clip.CLIP(**architecture, quick_gelu=True).state_dict(),
              folder / "open_clip_model.safetensors")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pictures of 40 pixels are not looked at in 800."""
    monkeypatch.setattr(Detector, "SIZE", {"shortest_edge": 48, "longest_edge": 96})


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judges")
    write_detector(folder / Detector.SOURCE)
    write_clip(folder / Colors.SOURCE)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three prompts, two pictures each, in GenEval's layout."""
    rng, prompts = np.random.default_rng(0), evaluate.geneval_prompts()
    evaluate.write_prompts(tmp_path / "out", [prompts[k] for k in (0, 200, 300)], 2)
    for number in range(3):
        for i in range(2):
            size = (40, 64 - 8 * number, 3)
            Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(
                tmp_path / "out" / f"{number:05d}" / "samples" / f"{i:04d}.png")
    return tmp_path / "out"


# ---- the prompts ---------------------------------------------------------------------------------

def test_the_553_prompts_are_genevals_number_by_number():
    found = evaluate.geneval_prompts()
    counts = {task: sum(want["tag"] == task for want in found) for task in TASKS}
    assert counts == dict(single_object=80, two_object=99, counting=80, colors=94, position=100,
                          color_attr=100) and len(found) == 553
    # from published results and code that quotes lines of evaluation_metadata.jsonl
    published = {0: "a photo of a bench", 1: "a photo of a cow", 2: "a photo of a bicycle",
                 80: "a photo of a bench and a sports ball", 457:
                 "a photo of a pink oven and a green motorcycle", 530:
                 "a photo of a purple suitcase and an orange pizza"}
    assert {number: found[number]["prompt"] for number in published} == published
    prompts = {want["prompt"] for want in found}
    assert prompts >= {f"a photo of {text}" for text in (
        "four benchs", "two wine glasses", "four buses", "two toothbrushs", "a brown skis",
        "a tv remote left of an umbrella", "a computer mouse left of a bench",
        "a hair drier below an elephant", "a brown giraffe and a white stop sign",
        "a black tv remote", "a purple computer keyboard and a blue scissors",
        "a dog right of a tie", "a fork and a knife", "three computer keyboards")}


def test_the_metadata_are_genevals():
    found = {want["prompt"].removeprefix("a photo of "): want
             for want in evaluate.geneval_prompts()}
    assert found["a brown giraffe and a white stop sign"] == {
        "tag": "color_attr", "prompt": "a photo of a brown giraffe and a white stop sign",
        "include": [{"class": "giraffe", "count": 1, "color": "brown"},
                    {"class": "stop sign", "count": 1, "color": "white"}]}
    assert found["four benchs"]["include"] == [{"class": "bench", "count": 4}]
    assert found["four benchs"]["exclude"] == [{"class": "bench", "count": 5}]
    assert found["a dog right of a tie"]["include"] == [
        {"class": "tie", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]


# ---- the networks --------------------------------------------------------------------------------

def test_a_detection_is_a_query_and_a_class_with_the_mean_probability_of_its_mask(judges):
    """The same, written a second time: query by query, in the pixels of the picture."""
    detector = Detector(judges / Detector.SOURCE, CPU)
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    found = detector(image)
    seen = detector.processor(images=image, return_tensors="pt")
    assert seen["pixel_values"].shape[-2:] == (64, 64)           # 48 x 60, rounded up by 32
    with torch.no_grad():
        out = detector.net(**seen)
    chances = out.class_queries_logits[0].softmax(-1)                            # (Q, 81)
    pairs = sorted(((float(chances[q, k]), q, k) for q in range(12) for k in range(80)))[-12:]
    expected = []
    for chance, q, k in pairs:
        mask = torch.nn.functional.interpolate(out.masks_queries_logits[:, q:q + 1], (64, 64),
                                               mode="bilinear")
        mask = torch.nn.functional.interpolate(mask, (40, 50), mode="bilinear")[0, 0]
        inside = mask > 0
        if inside.any():
            y, x = torch.nonzero(inside, as_tuple=True)
            expected.append((evaluate.OBJECTS[k], chance * float(mask[inside].sigmoid().mean()),
                             (x.min(), y.min(), x.max() + 1, y.max() + 1), int(inside.sum())))
    assert len(expected) >= 6
    given = sorted(found, key=lambda pair: pair[1].score)
    for (name, thing), (k, score, box, count) in zip(given, sorted(expected, key=lambda e: e[1])):
        assert name == k and thing.score == pytest.approx(score, rel=1e-4)
        assert thing.box == box and thing.mask.shape == (40, 50) and thing.mask.sum() == count


def test_scores_are_those_of_transformers_where_no_pixel_is_resized(judges):
    """transformers takes masks at 384 x 384: so does this for a picture of that size."""
    from transformers import Mask2FormerImageProcessor
    detector = Detector(judges / Detector.SOURCE, CPU)
    detector.processor = Mask2FormerImageProcessor(do_resize=False)
    image = Image.effect_noise((384, 384), 80).convert("RGB")
    with torch.no_grad():
        out = detector.net(**detector.processor(images=image, return_tensors="pt"))
    theirs = detector.processor.post_process_instance_segmentation(
        out, threshold=0.0, return_binary_maps=True, target_sizes=[(384, 384)])[0]
    found = [(name, thing) for name, thing in detector(image)]
    ours = sorted((name, round(thing.score, 4)) for name, thing in found)
    assert len(ours) >= 6 and ours == sorted(
        (evaluate.OBJECTS[part["label_id"]], round(part["score"], 4))
        for part in theirs["segments_info"])


def test_the_colour_is_the_nearest_mean_of_three_prompts(judges):
    """Zero-shot by hand, on the box alone, grey outside of the mask."""
    colors = Colors(judges / Colors.SOURCE, CPU)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
    mask = np.zeros((40, 50), bool)
    mask[10:30, 5:20] = rng.random((20, 15)) < 0.7
    thing = Found((5, 10, 20, 30), mask=mask)
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
    assert colors(image, [thing, thing], "dog") == [evaluate.PAINTS[int(np.argmax(scores))]] * 2


# ---- the commands --------------------------------------------------------------------------------

def test_geneval_is_generated_and_judged_from_end_to_end(judges, tmp_path, monkeypatch):
    """Two prompts a task with the released layout's small network; then the summary."""
    prompts = evaluate.geneval_prompts()
    few = [want for task in TASKS for want in [w for w in prompts if w["tag"] == task][:1]]
    monkeypatch.setattr(evaluate, "geneval_prompts", lambda: few)
    out = tmp_path / "out"
    command = ("generate", RELEASE, out, "--samples", 2, "--steps", 2, *ENCODERS)
    evaluate.main(["geneval", *map(str, command), "--batch", "3"])
    files = sorted(out.glob("*/samples/*.png"))
    assert len(files) == 12 and Image.open(files[0]).size == (64, 64)
    before = [file.read_bytes() for file in files]
    files[3].unlink()                                              # a run that was interrupted ...
    evaluate.main(["geneval", *map(str, command), "--batch", "5"])  # ... in other batches
    apart = [np.abs(np.asarray(Image.open(file)).astype(int) - np.asarray(Image.open(
        io.BytesIO(data)))).max() for file, data in zip(files, before)]
    assert max(apart) <= 1
    evaluate.main(["geneval", "score", str(out), "--models", str(judges)])
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["filename"] for line in lines] == [str(file.relative_to(out)) for file in files]
    assert {line["tag"] for line in lines} == set(TASKS)


def test_a_folder_of_other_pictures_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "geneval_prompts", lambda: [dict(tag="colors", prompt="a dog",
                                                                   include=[])])
    command = ["geneval", "generate", str(RELEASE), str(tmp_path / "out"), "--samples", "1",
               "--steps", "1", *map(str, ENCODERS)]
    evaluate.main(command)
    with pytest.raises(ValueError, match="has pictures of other guidance .7.0, now 2.0."):
        evaluate.main([*command, "--guidance", "2"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metadata.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="mine has other files: name a new folder"):
        evaluate.main([*command[:3], str(tmp_path / "mine"), *command[4:]])
    assert (tmp_path / "mine" / "metadata.jsonl").read_text() == "{}"
    with pytest.raises(ValueError, match="is a file or lies in one"):
        evaluate.main([*command[:3], str(tmp_path / "mine" / "metadata.jsonl"), *command[4:]])


@pytest.fixture
def judged(monkeypatch):
    """The pictures that the detector looks at."""
    seen, look = [], Detector.__call__
    monkeypatch.setattr(Detector, "__call__", lambda self, image: seen.append(image) or look(
        self, image))
    return seen


def test_judging_goes_on_after_the_last_whole_line(judges, pictures, judged, capsys):
    command = ["geneval", "score", str(pictures), "--models", str(judges)]
    evaluate.main(command)
    file = pictures / "results.jsonl"
    whole = file.read_text()
    lines = whole.splitlines(True)
    file.write_text("".join(lines[:4]) + lines[4][:30])                          # a kill
    evaluate.main(command)
    assert file.read_text() == whole and len(judged) == 6 + 2
    right = sum(json.loads(line)["correct"] for line in lines)
    out = capsys.readouterr().out
    assert f"6 images of 3 prompts; correct: {right / 6:.2%} of the images" in out
    assert "PARTIAL: 3 of 553 prompts, 2 to 2 pictures each" in out


def test_what_is_gone_is_no_longer_among_the_results(judges, pictures, judged):
    command = ["geneval", "score", str(pictures), "--models", str(judges)]
    evaluate.main(command)
    (pictures / "00001" / "samples" / "0001.png").unlink()
    evaluate.main(command)
    names = [json.loads(line)["filename"]
             for line in (pictures / "results.jsonl").read_text().splitlines()]
    assert len(names) == 5 and "00001/samples/0001.png" not in names and len(judged) == 6


def test_other_pictures_and_other_judges_are_judged_anew(judges, pictures, judged, tmp_path):
    command = ["geneval", "score", str(pictures), "--models"]
    evaluate.main([*command, str(judges)])
    first, second = sorted(pictures.glob("*/samples/*.png"))[:2]
    shutil.copy2(first, second)                                     # with the time of the other
    evaluate.main([*command, str(judges)])
    assert len(judged) == 6 + 1
    others = shutil.copytree(judges, tmp_path / "others")
    weights = others / Detector.SOURCE / "model.safetensors"
    save_file({name: tensor * 0.9 for name, tensor in load_file(weights).items()}, weights,
              {"format": "pt"})
    evaluate.main([*command, str(others)])
    assert len(judged) == 6 + 1 + 6


def test_counting_asks_for_surer_detections(judges, pictures, monkeypatch):
    """The same picture, judged under another tag: thresholds 0.3 and 0.9."""
    scores = (0.2, 0.5, 0.8, 0.95)
    monkeypatch.setattr(Detector, "__call__", lambda self, image: [
        ("dog", Found((0, 0, 9, 9), score, mask=np.ones((40, 64), bool))) for score in scores])
    for tag, least in (("single_object", 0.3), ("counting", 0.9)):
        wanted = dict(tag=tag, prompt="a photo of a dog", include=[{"class": "dog", "count": 1}])
        (pictures / "00000" / "metadata.jsonl").write_text(json.dumps(wanted))
        evaluate.main(["geneval", "score", str(pictures), "--models", str(judges)])
        lines = [json.loads(line) for line in (pictures / "results.jsonl").read_text().splitlines()]
        assert len(lines) == 6                        # judged anew: its metadata are others now
        line = next(line for line in lines if line["filename"] == "00000/samples/0000.png")
        seen = [box[4] for box in json.loads(line["details"])["dog"]]
        assert seen == [score for score in reversed(scores) if score > least] and line["correct"]


def test_mean_rewards_of_a_folder_are_means_over_prompts(models, pictures, shrunk):  # noqa: F811
    code, out, err = run("evaluate.py", "rewards", pictures, "--models", models, "--rewards",
                         "aesthetic,pick,clip_openai")
    assert code == 0, err
    [sidecar] = pictures.glob("*.scores.jsonl")
    lines = [json.loads(line) for line in sidecar.read_text().splitlines()[1:]]
    values = np.array([line["scores"]["pick"][0] for line in lines]).reshape(3, 2).mean(1)
    row = next(line for line in out.splitlines()[-4:] if line.startswith("pick"))
    assert row.split() == ["pick", f"{values.mean():.4f}",
                           f"{values.std(ddof=1) / 3 ** 0.5:.4f}"]
    assert "6 pictures of 3 prompts" in out


def test_means_over_a_part_of_the_pictures_or_of_older_ones_are_refused(pictures):
    command = ("evaluate.py", "rewards", pictures, "--rewards", "contrast")
    first = pictures / "00001" / "samples" / "0000.png"
    kept = first.read_bytes()
    first.write_bytes(kept[:50])
    code, _, err = run(*command)
    assert code == 2 and "1 of 6 pictures have no scores (the limit is 1%)" in sentences(err)[-1]
    first.write_bytes(kept)                                       # repaired, so it is scored again
    code, out, err = run(*command)
    assert code == 0 and "6 pictures of 3 prompts" in out, err
    [sidecar] = pictures.glob("*.scores.jsonl")
    os.utime(first, (sidecar.stat().st_mtime + 9,) * 2)
    code, _, err = run(*command)
    assert code == 2 and f"{first} is younger than its scores in {sidecar}" in sentences(err)[-1]


def test_analytic_rewards_see_pictures_of_one_size(pictures):
    command = ("evaluate.py", "rewards", pictures, "--rewards", "contrast")
    odd = pictures / "00002" / "samples" / "0001.png"
    Image.open(odd).resize((24, 24)).save(odd)
    code, _, err = run(*command)
    assert code == 2 and "short sides of 24 to 40 pixels" in sentences(err)[-1]
    code, out, err = run(*command, "--size", 32)
    assert code == 0 and "6 pictures of 3 prompts" in out, err
    [sidecar] = pictures.glob("*.scores.jsonl")
    before = sidecar.read_bytes()
    code, _, err = run(*command, "--size", 40)                    # training may need those of 32
    assert code == 2 and f"{sidecar} has scores of pictures of 32 pixels" in sentences(err)[-1]
    assert sidecar.read_bytes() == before


@pytest.mark.parametrize("flag", ["--guidance 9", "--steps 3", "--seed 5", "--samples 7",
                                  "--text-encoder no", "--vae no"])
def test_flags_of_a_sampler_are_refused_for_pictures_that_are_there(pictures, flag):
    said = fails("rewards", pictures, "--rewards", "contrast", *flag.split())
    assert "is no checkpoint" in said and "are for making pictures" in said


def test_all_seven_rewards_of_a_checkpoint_in_one_command(  # noqa: F811
        models, checkpoint, tmp_path, shrunk):
    folder, parti = shutil.copytree(checkpoint, tmp_path / "run"), tmp_path / "parti.tsv"
    parti.write_text("\ufeffPrompt\tCategory\tChallenge\tNote\na red circle\tArts\tBasic\t\n"
                     "two blue squares\tAnimals\tBasic\t\n")
    code, out, err = run("evaluate.py", "rewards", folder, "--rewards", "all", "--models", models,
                         "--prompts", parti, "--samples", 2, "--steps", 2)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[-7:]] == [
        "aesthetic", "hpsv2", "image_reward", "pick", "vqa", "clip", "sci"]
    assert "4 pictures of 2 prompts" in out
    wanted = json.loads((folder / "pictures" / "00001" / "metadata.jsonl").read_text())
    assert wanted == {"tag": "Animals", "prompt": "two blue squares"}
    code, out, err = run("evaluate.py", "rewards", folder / "pictures", "--rewards", "contrast")
    assert code == 0 and out.splitlines()[-1].startswith("contrast"), err


# ---- mistakes ------------------------------------------------------------------------------------

def fails(*arguments) -> str:
    code, _, stderr = run("evaluate.py", *arguments)
    assert code == 2 and len(sentences(stderr)) == 1, stderr
    return sentences(stderr)[0]


def test_missing_judges_are_named_with_their_size(pictures, tmp_path):
    said = fails("geneval", "score", pictures, "--models", tmp_path / "nowhere")
    assert f"geneval score needs *config.json, *.safetensors of {Detector.SOURCE}" in said
    assert not (pictures / "results.jsonl").exists()


def test_a_detector_without_a_tensor_stops_with_its_name(judges, pictures, tmp_path):
    place = Path(shutil.copytree(judges, tmp_path / "judges")) / Detector.SOURCE
    weights = load_file(place / "model.safetensors")
    del weights["class_predictor.weight"]
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    said = fails("geneval", "score", pictures, "--models", tmp_path / "judges")
    assert "1 tensors are missing" in said and "class_predictor.weight" in said


def test_a_clip_that_cannot_be_read_is_one_sentence(judges, pictures, tmp_path):
    place = Path(shutil.copytree(judges, tmp_path / "judges")) / Colors.SOURCE
    (place / "open_clip_model.safetensors").write_bytes(b"no tensors")
    said = fails("geneval", "score", pictures, "--models", tmp_path / "judges")
    assert f"{place} cannot be loaded by open_clip" in said


def test_damaged_metadata_and_pictures_are_named(judges, pictures):
    (pictures / "00002" / "samples" / "0001.png").write_bytes(b"no picture")
    said = fails("geneval", "score", pictures, "--models", judges)
    assert "00002/samples/0001.png cannot be read" in said
    assert len((pictures / "results.jsonl").read_text().splitlines()) == 5       # and none is lost
    (pictures / "00001" / "metadata.jsonl").write_text('{"prompt": "a dog"}')
    assert "00001/metadata.jsonl is not one line" in fails("geneval", "score", pictures)
    (pictures / "00001" / "metadata.jsonl").write_text("{")
    assert "00001/metadata.jsonl is not one line" in fails("geneval", "score", pictures)


def test_a_folder_that_lacks_pictures_is_called_partial(judges, pictures):
    for path in (pictures / "00001" / "samples").iterdir():
        path.unlink()
    _, out, _ = run("evaluate.py", "geneval", "score", pictures, "--models", judges)
    assert "PARTIAL: 3 of 553 prompts, 0 to 2 pictures each" in out
    assert "4 images of 2 prompts" in out


def test_a_reward_that_is_not_there_is_named_before_a_picture_is_made(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "run")
    assert "unknown reward" in fails("rewards", folder, "--rewards", "beauty")
    assert "no config.json" in fails("rewards", folder, "--rewards", "pick", "--models", tmp_path)
    assert not (folder / "pictures").exists()
    assert "is no checkpoint" in fails("rewards", tmp_path, "--targets", "all=1")
    assert "--out: name a folder" in fails("rewards", "owner/name")


def test_a_folder_without_pictures_says_how_to_make_them(tmp_path):
    assert "evaluate.py geneval generate CKPT" in fails("geneval", "score", tmp_path)
    assert "has no picture with a caption" in fails("rewards", tmp_path)


def test_a_network_of_words_cannot_read_genevals_prompts(checkpoint, tmp_path):
    said = fails("geneval", "generate", checkpoint, tmp_path / "out")
    assert "unknown word" in said
