"""Evaluate: the paper's questions, a command each.

    python evaluate.py shapes runs/shapes          # is the caption true in the picture? six tasks
    python evaluate.py control runs/shapes         # does each target move its own reward?
    python evaluate.py compare runs/compare/*      # convergence; one reward or all; best of N
    python evaluate.py rewards CKPT_OR_PICTURES    # mean scores, also of the paper's seven
    python evaluate.py geneval generate CKPT DIR   # the real GenEval: 553 prompts, 4 pictures each,
    python evaluate.py geneval score DIR           # judged by Mask2Former and CLIP
    python evaluate.py flops runs/shapes paper     # what a picture costs; folders or presets

`shapes`, `control` and `compare` measure the embedded world with exact oracles, on captions that
training never saw (shapes.held_out; their claims it did see, with other endings). `shapes` judges
as GenEval does (Ghosh et al. 2023, arXiv 2310.11513), and is not GenEval: its things are shapes.
All but `shapes` go on where they were stopped: `geneval` picture by picture, `rewards` too, but
1,000 pictures at a time once it scores; `control` and `compare` by what the run's measured.json
keeps.
"""
import argparse
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import rewards
import sample
import shapes
from data import (BROKEN, FORMATS, MAX_UNREADABLE, T5, Pictures, decode, first_line, precision,
                  split_words, to_rgb)
from model import PRESETS, Config, TextRIN
from rewards import ANALYTIC, PAPER, score_all
from shapes import TASKS


# ---- GenEval's rules -----------------------------------------------------------------------------

@dataclass
class Found:
    """An object that a detector found. box: left, top, right, bottom, in pixels."""
    box: tuple
    score: float = 1.0
    color: str | None = None               # where the detector tells it
    mask: np.ndarray | None = None         # (H, W) bool


def relations(a: Found, b: Found) -> set[str]:
    """Where a lies, seen from b: the offset of their centres, less a tenth of the summed sizes,
    over its length before that; a side holds above 0.5."""
    (center_a, size_a), (center_b, size_b) = (
        (box.mean(0), box[1] - box[0]) for box in (np.reshape(x.box, (2, 2)) for x in (a, b)))
    offset = center_a - center_b
    clear = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * (size_a + size_b), 0)
    if (np.abs(clear) < 1e-3).all():
        return set()
    x, y = clear / np.linalg.norm(offset)
    sides = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, part in sides.items() if part > 0.5}


def keep(found: Iterable[tuple[str, Found]], tag: str) -> dict[str, list[Found]]:
    """{class: its objects, the surest first}: scores above 0.3 (counting: 0.9), 16 of a class."""
    least, objects = 0.9 if tag == "counting" else 0.3, {}
    for name, thing in sorted(found, key=lambda pair: -pair[1].score):
        if thing.score > least and len(objects.get(name, ())) < 16:
            objects.setdefault(name, []).append(thing)
    return objects


def judge(wanted: dict, objects: dict[str, list[Found]],
          colors_of: Callable[[list[Found], str], list[str]]) -> tuple[bool, str]:
    """GenEval's verdict on a picture: (correct, what is wrong, a line each).

    wanted: "include": all must be there, the first `count` of a class with its colour and position
    (a side of the group of that number); "exclude": none may reach its count. objects: of `keep`.
    colors_of: objects, class → their colours."""
    reasons, groups = [], []
    for want in wanted.get("include", ()):
        name, count, wrong = want["class"], want["count"], None
        group = objects.get(name, [])[:count]
        if len(group) < count:
            wrong = f"expected {name}>={count}, found {len(group)}"
        elif "color" in want:
            colors = colors_of(group, name)
            if colors.count(want["color"]) < count:
                wrong = f"expected {want['color']} {name}>={count}, found {' and '.join(colors)}"
        if wrong is None and "position" in want:
            side, number = want["position"]
            target = groups[number]
            if target is None:
                wrong = f"no target for {name} to be {side}"
            elif any(side not in relations(a, b) for a in group for b in target):
                wrong = f"expected {name} {side} target, found it elsewhere"
        groups.append(None if wrong else group)
        reasons += [wrong] * (wrong is not None)
    for no in wanted.get("exclude", ()):
        count = len(objects.get(no["class"], ()))
        if count >= no["count"]:
            reasons.append(f"expected {no['class']}<{no['count']}, found {count}")
    return not reasons, "\n".join(reasons)


def result(file: str, wanted: dict, objects: dict, colors_of: Callable) -> dict:
    """A line of results.jsonl, with GenEval's keys."""
    correct, reason = judge(wanted, objects, colors_of)
    boxes = {name: [[*map(float, thing.box), thing.score] for thing in group]
             for name, group in objects.items()}
    return dict(filename=file, tag=wanted["tag"], prompt=wanted["prompt"], correct=correct,
                reason=reason, metadata=json.dumps(wanted), details=json.dumps(boxes))


def accuracies(results: Sequence[dict]) -> dict[str, float]:
    """The share of correct pictures by task, and "overall", the mean of the tasks."""
    by_task = {}
    for line in results:
        by_task.setdefault(line["tag"], []).append(line["correct"])
    found = {task: float(np.mean(by_task[task])) for task in sorted(by_task, key=place_of)}
    return found | {"overall": float(np.mean(list(found.values())))}


def place_of(task: str) -> int:
    """The place of a task in GenEval's order; others come last."""
    return TASKS.index(task) if task in TASKS else len(TASKS)


def summary(results: Sequence[dict], title: str) -> str:
    """GenEval's summary."""
    by_prompt = {}
    for line in results:
        by_prompt.setdefault(line["metadata"], []).append(line["correct"])
    found = accuracies(results)
    lines = [f"{title}\n{len(results)} images of {len(by_prompt)} prompts; correct: "
             f"{np.mean([line['correct'] for line in results]):.2%} of the images, "
             f"{np.mean([any(all_) for all_ in by_prompt.values()]):.2%} of the prompts"]
    for task in list(found)[:-1]:
        mine = [line["correct"] for line in results if line["tag"] == task]
        lines.append(f"{task:14} = {found[task]:7.2%} ({sum(mine)} / {len(mine)})")
    return "\n".join([*lines, f"overall score (mean of the tasks): {found['overall']:.5f}"])


# ---- GenEval's layout: NNNNN/metadata.jsonl, NNNNN/samples/0000.png, results.jsonl ---------------

def write_file(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes.replace(path, text.encode())


def read_json(file: Path) -> dict | list:
    """A file of this script. ValueError: it is damaged."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): remove it") from error


def write_prompts(out: Path, wanted: Sequence[dict], samples: int) -> None:
    """NNNNN/metadata.jsonl for each prompt, and metadata.jsonl, with which data.py reads all."""
    for number, want in enumerate(wanted):
        write_file(out / f"{number:05d}" / "metadata.jsonl", json.dumps(want))
        (out / f"{number:05d}" / "samples").mkdir(exist_ok=True)
    lines = [json.dumps({"file_name": f"{number:05d}/samples/{i:04d}.png", "text": want["prompt"]})
             for number, want in enumerate(wanted) for i in range(samples)]
    write_file(out / "metadata.jsonl", "\n".join(lines) + "\n")


def read_layout(folder: Path) -> list[tuple[dict, list[Path]]]:
    """Every prompt of a layout and its pictures, in order. ValueError names what is missing."""
    found = []
    for place in sorted(path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()):
        try:
            wanted = json.loads((place / "metadata.jsonl").read_text())
            whole = all(isinstance(wanted[key], str) for key in ("tag", "prompt"))
            for kind in ("include", "exclude"):
                for number, part in enumerate(wanted.get(kind, ())):
                    whole &= isinstance(part["class"], str) and type(part["count"]) is int
                    if "position" in part:
                        side, target = part["position"]
                        whole &= side in shapes.RELATIONS and target in range(number)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{place}/metadata.jsonl is not one line of GenEval's metadata "
                             f"({type(error).__name__}: {error}): copy it again") from error
        if not whole:
            raise ValueError(f"{place}/metadata.jsonl is not GenEval's metadata: copy it again")
        found.append((wanted, sorted((place / "samples").glob("[0-9]*.png"))))
    if not any(pictures for _, pictures in found):
        raise ValueError(f"{folder} has no NNNNN/samples/0000.png: make pictures with python "
                         f"evaluate.py geneval generate CKPT {folder}")
    return found


def sampler_of(model: sample.Model, guidance: float | None, steps: int | None) -> dict:
    """The weights and what generates with them; None takes the checkpoint's own."""
    asked = {key: value for key, value in (("guidance", guidance), ("steps", steps))
             if value is not None}
    dtype = precision(model.precision, model.device)
    if dtype != torch.float32:
        asked["precision"] = str(dtype)
    pixels = digest([model.config["mean"], model.config["std"]])
    return dict(weights=digest_of(model), pixels=pixels, **model.config["sampler"] | asked)


def levels(model: sample.Model, n: int, *targets: str) -> torch.Tensor:
    """"all=0" or "contrast=0" → (n, R); the others are at 1, whatever the checkpoint's own are."""
    row = sample.read_targets(targets, model.rewards, 1.0, "--targets")
    return torch.tensor([row] * n).view(n, len(row))


def digest(value) -> str:
    """16 hex digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def digest_of(model: sample.Model) -> str:
    """16 hex digits of the weights."""
    found = hashlib.sha256()
    for tensor in model.net.state_dict().values():
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def generate_folder(model: sample.Model, wanted: Sequence[dict], out: Path, args) -> None:
    """Pictures of prompts, --samples each, in GenEval's layout; those that are there are kept.

    Picture i of prompt k of K comes from noise (seed K + k) samples + i: --batch and interruptions
    change no more than rounding. ValueError: `out` has other files, or pictures of other prompts,
    weights or flags; nothing is written then."""
    s, file = levels(model, 1, *args.targets), out / "settings.json"             # (1, R)
    settings = sampler_of(model, args.guidance, args.steps) | dict(
        targets=args.targets, negative_prompt=args.negative_prompt, samples=args.samples,
        seed=args.seed, text_encoder=model.encoder.config().get("source"),
        vae=model.vae and model.vae.source, prompts=digest(wanted))
    if out.exists() and not out.is_dir() or any(part.is_file() for part in out.parents):
        raise ValueError(f"{out} is a file or lies in one: name another folder")
    if file.exists():
        there = read_json(file)
        if not isinstance(there, dict):
            raise ValueError(f"{file} is damaged: remove it")
        for key in settings:
            if there.get(key, "nothing") != settings[key]:
                raise ValueError(f"{out} has pictures of other {key} ({there.get(key)}, now "
                                 f"{settings[key]}): name another folder, or remove it")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} has other files: name a new folder")
    read = model.encoder.states if isinstance(model.encoder, T5) else model.encoder.encode
    model.encoder.device = model.device                 # all, at once: a T5 is not loaded twice
    read([want["prompt"] for want in wanted] + [args.negative_prompt or ""])
    write_file(file, json.dumps(settings))
    write_prompts(out, wanted, args.samples)
    jobs = [(number, i) for number in range(len(wanted)) for i in range(args.samples)
            if not (out / f"{number:05d}" / "samples" / f"{i:04d}.png").exists()]
    for first in tqdm(range(0, len(jobs), args.batch), desc="generating", unit="batch"):
        part = jobs[first:first + args.batch]
        s_pos = s.expand(len(part), -1)                                          # (B, R)
        seeds = [(args.seed * len(wanted) + number) * args.samples + i for number, i in part]
        pictures = sample.generate(
            model, [wanted[number]["prompt"] for number, _ in part], s_pos,
            torch.zeros_like(s_pos), seeds, args.guidance, args.steps,
            negative_prompt=args.negative_prompt, batch=args.batch)
        for (number, i), picture in zip(part, pictures):
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            sample.write_png(image, out / f"{number:05d}" / "samples" / f"{i:04d}.png", settings)


# ---- shapes: the embedded world, judged by GenEval's rules and an exact detector -----------------

def metadata_of(task: str, caption: str) -> dict:
    """What must be in a picture of a caption, as GenEval writes it down, and that nothing else is:
    GenEval excludes more than was asked for in counting alone, but captions of this world name all
    that is there, and a picture full of confetti has one of everything."""
    claims = shapes.parse(caption)
    include = [{"class": group.shape, "count": group.count}
               | ({"color": group.color} if group.color else {}) for group in claims.groups]
    if claims.relation:                          # GenEval names what the other is seen from first
        include = [include[1], include[0] | {"position": [claims.relation, 0]}]
    asked = {name: sum(group.count for group in claims.groups if group.shape == name)
             for name in shapes.SHAPES}
    exclude = [{"class": name, "count": count + 1} for name, count in asked.items()]
    return dict(tag=task, include=include, exclude=exclude, prompt=caption)


def benchmark(n: int, seed: int = 0) -> list[dict]:
    """n prompts that training never saw, the six tasks in turn, and what must be in a picture."""
    texts = [shapes.prompts(task, -(-n // len(TASKS)), seed) for task in TASKS]
    return [metadata_of(task, text) for six in zip(*texts) for task, text in zip(TASKS, six)][:n]


def check_words(model: sample.Model, source: str | Path, wanted: Sequence[dict]) -> None:
    """ValueError: the model was trained on other words than those of the embedded world."""
    known = getattr(model.encoder, "index", None)                    # a T5 reads every word
    if known and any(word not in known for want in wanted for word in split_words(want["prompt"])):
        raise ValueError(f"{source} was not trained on captions of the embedded world, which are "
                         f"asked for here: use python evaluate.py rewards {source} --prompts FILE, "
                         "with words of its own captions")


def objects_of(things: Sequence[shapes.Thing], size: int) -> dict[str, list[Found]]:
    """Things of the embedded world as GenEval's rules take them: boxes in pixels."""
    found = []
    for thing in things:
        side, up, down = (thing.r * reach for reach in shapes.REACH[thing.shape])
        box = (thing.x - side, thing.y - up, thing.x + side, thing.y + down)
        found.append((thing.shape, Found(tuple(size * part for part in box), color=thing.color)))
    return keep(found, "shapes")


def colors_read(group: Sequence[Found], name: str) -> list[str]:
    """The colours of some objects, as shapes.detect read them."""
    return [thing.color for thing in group]


def verdicts(pictures: torch.Tensor, wanted: Sequence[dict]) -> list[dict]:
    """Pictures uint8 (B, 3, S, S), what must be in them → lines of results.jsonl."""
    seen, size = shapes.detect(pictures), pictures.shape[-1]
    return [result(f"{number:05d}/samples/0000.png", want, objects_of(things, size), colors_read)
            for number, (things, want) in enumerate(zip(seen, wanted))]


def detector_accuracy(n: int, size: int, seed: int = 0) -> dict[str, float]:
    """How often the detector's verdict on a clean drawing is that on the things drawn: n drawings
    with a true caption and with one that lies."""
    found = {"true": [], "lies": []}
    for number in range(n):
        task, rng = TASKS[number % len(TASKS)], np.random.default_rng([seed, 6, number])
        things, claims = shapes.compose(task, rng)
        scene = shapes.Scene(things, rng.uniform(0.3, 0.7), rng.uniform(*shapes.SATURATION))
        picture = torch.from_numpy(shapes.draw(scene, size, rng)).permute(2, 0, 1)
        seen = shapes.detect(picture[None])[0]
        for kind, said in (("true", claims), ("lies", shapes.lie(claims, rng)[1])):
            want = metadata_of(task, shapes.write(said))
            verdict, truth = (judge(want, objects_of(these, size), colors_read)[0]
                              for these in (seen, things))
            found[kind].append(verdict == truth)
    return {kind: float(np.mean(same)) for kind, same in found.items()}


def measure(model: sample.Model, wanted: Sequence[dict], seeds: Sequence[int],
            targets: Sequence[str] = ("all=1",), guidance: float | None = None,
            steps: int | None = None, progress: Callable | None = None) -> tuple:
    """Pictures of prompts at some targets, noise by seed → (uint8 (B, 3, S, S), scores (B, R) of
    ANALYTIC in native units, verdicts (B)). None: the checkpoint's own guidance and steps."""
    texts = [want["prompt"] for want in wanted]
    s_pos = levels(model, len(texts), *targets)                                  # (B, R)
    pictures = sample.generate(model, texts, s_pos, torch.zeros_like(s_pos), list(seeds), guidance,
                               steps, progress=progress)
    return pictures, score_all(ANALYTIC, pictures, texts), verdicts(pictures, wanted)


def remembered(folder: Path, settings: dict, make: Callable[[], dict]) -> dict:
    """What a run's measured.json has of these settings; else make it, and keep it there."""
    file = folder / "measured.json"

    def read() -> list[tuple[dict, dict]]:
        try:
            return [(entry["settings"], entry["found"]) for entry in read_json(file)] \
                if file.exists() else []
        except (TypeError, LookupError) as error:
            raise ValueError(f"{file} is damaged ({first_line(error)}): remove it") from error

    for known, found in read():
        if known == settings:
            return found
    found = make()
    entries = [*read(), (settings, found)]             # another command may have added some since
    write_file(file, json.dumps([dict(settings=s, found=f) for s, f in entries], indent=1))
    return found


def settings_of(model: sample.Model, targets: Sequence[str], guidance: float | None,
                **more) -> dict:
    """All that the scores of some pictures depend on, as measured.json keeps it."""
    return sampler_of(model, guidance, None) | more | dict(
        s=levels(model, 1, *targets)[0].tolist(),
        scorers={name: version for name, (_, version) in rewards.SCORERS.items()})


def mean_scores(model: sample.Model, folder: Path, n: int, targets: Sequence[str] = ("all=1",),
                guidance: float | None = None) -> dict[str, float]:
    """The accuracy and the mean scores of n prompts at some targets, measured once per folder."""
    wanted = benchmark(n)

    def make() -> dict[str, float]:
        _, scores, lines = measure(model, wanted, range(n), targets, guidance)
        return {"accuracy": accuracies(lines)["overall"]} | dict(
            zip(ANALYTIC, scores.mean(0).tolist()))
    return remembered(folder, settings_of(model, targets, guidance, prompts=digest(wanted)), make)


def evaluate_shapes(model: sample.Model, n: int = 600, alone: int = 120, seed: int = 0,
                    guidance: float | None = None, steps: int | None = None) -> tuple:
    """Scores of pictures of unseen prompts, image i from noise i: (means, verdicts, pictures).

    n prompts at all=1 and the first `alone` of them at all=0 and with each single target at 0. A
    seed has prompts and noise of its own.
    means: {request: {reward: mean in native units, "n": count}}, with "all=1, first" for the same
    prompts as the others; "tasks", the mean alignment by task, and "accuracy", the share of correct
    pictures, both at all=1. verdicts and pictures: of all=1.
    """
    wanted, requests = benchmark(n, seed), {"all=1": n}
    if model.rewards:
        requests |= {f"{name}=0": min(alone, n) for name in ("all", *model.rewards)}
    found, rounds = {}, sum(-(-count // 64) for count in requests.values())
    total = rounds * (steps or model.config["sampler"]["steps"])
    with tqdm(total=total, desc="evaluating", unit="step", leave=False) as bar:
        for request, count in requests.items():
            w = 0.0 if request == "all=0" else guidance       # there s⁺ = s⁻: it does nothing
            pictures, scores, lines = measure(model, wanted[:count],
                                              range(seed * n, seed * n + count), [request], w,
                                              steps, bar.update)
            found[request] = dict(zip(ANALYTIC, scores.mean(0).tolist())) | {"n": count}
            if request == "all=1":
                found["all=1, first"] = dict(zip(ANALYTIC, scores[:alone].mean(0).tolist()))
                truths = scores[:, ANALYTIC.index("alignment")]
                found["tasks"] = {task: float(truths[k::len(TASKS)].mean())
                                  for k, task in enumerate(TASKS)}
                found["accuracy"], best = accuracies(lines), (lines, pictures)
    return found, *best


def report(model: sample.Model, found: dict) -> str:
    """Three answers as a table: means in native units, the last column in std of the data; all
    columns but all=1 are of the first prompts."""
    lines = [f"{'reward':14}{'all=0':>9}{'all=1':>9}{'alone=0':>9}{'alone=1':>9}{'gain/std':>10}"]
    for name, top in found["all=1, first"].items():
        low, bottom = (found.get(request, {}).get(name, float("nan"))
                       for request in ("all=0", f"{name}=0"))
        std = model.config["score_std"].get(name) or float("nan")        # 0: a constant
        lines.append(f"{name:14}{low:9.3f}{found['all=1'][name]:9.3f}{bottom:9.3f}{top:9.3f}"
                     f"{(top - bottom) / std:10.2f}")
    for key, words in (("tasks", "alignment by task at all=1"),
                       ("accuracy", "correct pictures by task")):
        lines.append(f"{words}: "
                     + ", ".join(f"{task} {value:.2f}" for task, value in found[key].items()))
    return "\n".join(lines)


def control_figure(model: sample.Model, prompt: str, seed: int = 0, columns: int = 5):
    """One prompt and one noise: a row a reward, its target from 0 to 1 (the others at 1); the first
    row moves all."""
    values = torch.linspace(0, 1, columns).tolist()
    names = ("all", *model.rewards)
    s_pos = torch.cat([levels(model, 1, f"{name}={v}") for name in names for v in values])
    count = len(s_pos)
    pictures = sample.generate(model, [prompt] * count, s_pos, torch.zeros_like(s_pos),
                               [seed] * count)
    scale = max(1, 96 // pictures.shape[-1])
    tiles = [sample.tile(picture, [], scale) for picture in pictures]
    rows = [tiles[i * columns:(i + 1) * columns] for i in range(len(names))]
    return sample.grid(rows, [f"target {v:g}" for v in values], list(names))


def evaluate_folder(model: sample.Model, folder: Path, n: int = 600, seed: int = 0,
                    guidance: float | None = None, steps: int | None = None) -> dict:
    """Evaluate, print the table, and write evaluation.json, control.png and the pictures with their
    verdicts into the folder."""
    found, lines, pictures = evaluate_shapes(model, n, 120, seed, guidance, steps)
    settings = sampler_of(model, guidance, steps) | dict(n=n, seed=seed)
    print(report(model, found))
    if model.rewards:
        figure = control_figure(model, shapes.prompts("colors", 1, 0)[0])
        sample.write_png(figure, folder / "control.png", found)
    write_benchmark(folder, settings | dict(targets=["all=1"]), lines, pictures)
    found = dict(settings=settings, **found)
    write_file(folder / "evaluation.json", json.dumps(found, indent=1))
    return found


def write_benchmark(folder: Path, settings: dict, lines: Sequence[dict],
                    pictures: torch.Tensor) -> None:
    """shapes-benchmark/ in GenEval's layout: the pictures (B, 3, S, S), their verdicts, and how
    they were made. What was there of older weights or other targets is replaced at once."""
    out = folder / ".shapes-benchmark.tmp"
    shutil.rmtree(out, ignore_errors=True)
    write_prompts(out, [json.loads(line["metadata"]) for line in lines], 1)
    for line, picture in zip(lines, pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out / line["filename"])
    write_file(out / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_file(out / "settings.json", json.dumps(settings))
    shutil.rmtree(folder / "shapes-benchmark", ignore_errors=True)
    out.rename(folder / "shapes-benchmark")


def judge_shapes(model: sample.Model, folder: Path, args) -> None:
    """The command: the table at the usual targets, or the means at others, and the benchmark."""
    if args.targets:
        seeds = range(args.seed * args.n, (args.seed + 1) * args.n)
        pictures, scores, lines = measure(model, benchmark(args.n, args.seed), seeds,
                                          args.targets, args.guidance, args.steps)
        settings = sampler_of(model, args.guidance, args.steps) | dict(
            n=args.n, seed=args.seed, targets=args.targets)
        write_benchmark(folder, settings, lines, pictures)
        for name, column in zip(ANALYTIC, scores.T):
            print(f"{name:14}{column.mean():9.3f} ± {column.std() / args.n ** 0.5:.3f}")
    else:
        evaluate_folder(model, folder, args.n, args.seed, args.guidance, args.steps)
    side = model.net.config.size * (8 if model.vae else 1)
    right = detector_accuracy(args.n, side, args.seed)
    print(summary(read_results(folder / "shapes-benchmark" / "results.jsonl"),
                  "GenEval's tasks and rules on the embedded world (this is not GenEval)"))
    print(f"the detector judges {right['true']:.1%} of {args.n} clean drawings as what was drawn, "
          f"and {right['lies']:.1%} with a caption that lies")


# ---- geneval: 553 prompts, Mask2Former, CLIP -----------------------------------------------------

# COCO's classes in its order, with GenEval's names for three of them
OBJECTS = tuple((
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,"
    "banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush").split(","))
PAINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


def geneval_prompts() -> list[dict]:
    """GenEval's 553 prompts with their metadata, number by number: its names and templates, drawn
    in its order by numpy's generator from its seed, 43; repeats are left out."""
    rng, n, found = np.random.default_rng(43), len(OBJECTS), []
    an = lambda name: f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    many = lambda name: name + ("es" if name.endswith("s") else "s")
    two = lambda last: rng.choice(last, size=2, replace=False)

    def add(tag, prompt, *include, **more):
        found.append(dict(tag=tag, include=list(include), **more, prompt=f"a photo of {prompt}"))

    for name in (OBJECTS[k] for k in rng.choice(n, size=n, replace=False)):
        add("single_object", an(name), {"class": name, "count": 1})
    for _ in range(100):
        a, b = (OBJECTS[k] for k in two(n))
        add("two_object", f"{an(a)} and {an(b)}", *({"class": c, "count": 1} for c in (a, b)))
    for _ in range(100):
        name, count = OBJECTS[rng.choice(n)], int(rng.integers(2, 4, endpoint=True))
        add("counting", f"{('two', 'three', 'four')[count - 2]} {many(name)}",
            {"class": name, "count": count}, exclude=[{"class": name, "count": count + 1}])
    for _ in range(100):                                              # no coloured persons, class 0
        name, paint = OBJECTS[rng.choice(n - 1) + 1], PAINTS[rng.choice(len(PAINTS))]
        add("colors", f"{an(paint)} {name}", {"class": name, "count": 1, "color": paint})
    for _ in range(100):
        (a, b), side = (OBJECTS[k] for k in two(n)), shapes.RELATIONS[rng.choice(4)]
        add("position", f"{an(a)} {side} {an(b)}", {"class": b, "count": 1},
            {"class": a, "count": 1, "position": [side, 0]})
    for _ in range(100):
        names, paints = [OBJECTS[k + 1] for k in two(n - 1)], [PAINTS[k] for k in two(len(PAINTS))]
        add("color_attr", " and ".join(f"{an(c)} {name}" for c, name in zip(paints, names)),
            *({"class": name, "count": 1, "color": c} for c, name in zip(paints, names)))
    return [json.loads(line) for line in dict.fromkeys(map(json.dumps, found))]


class Detector:
    """Mask2Former with a Swin-S on COCO's instances (Cheng et al. 2022, arXiv 2112.01527).

    GenEval runs mmdet's training of it; this is its authors', in transformers: the same network,
    other weights. ValueError: a tensor is missing or misshapen, or the classes are not COCO's."""
    SOURCE = "facebook/mask2former-swin-small-coco-instance"
    SIZE = {"shortest_edge": 800, "longest_edge": 1333}      # GenEval's, whatever the file says

    def __init__(self, folder: Path, device: torch.device):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation
        self.net = rewards.pretrained(folder, Mask2FormerForUniversalSegmentation, True).to(device)
        self.device, labels = device, self.net.config.id2label
        if len(labels) != len(OBJECTS) or (labels[0], labels[79]) != (OBJECTS[0], OBJECTS[79]):
            raise ValueError(f"{folder} knows {len(labels)} classes from {labels[0]!r} on, not "
                             f"COCO's {len(OBJECTS)}: fetch {self.SOURCE}")
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True,
                                                                size=self.SIZE)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} has no preprocessor_config.json that can be read "
                             f"({first_line(error)}): fetch it again") from error

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> list[tuple[str, Found]]:
        """A picture → (class, object), as mmdet reads the network: of all pairs of query and
        class the surest, as many as queries (100), scored by the class's probability times the mean
        probability of the mask, which is where that is above 1/2 in the picture's own pixels."""
        seen = self.processor(images=image, return_tensors="pt").to(self.device)
        out = self.net(pixel_values=seen["pixel_values"], pixel_mask=seen["pixel_mask"])
        classes = out.class_queries_logits[0].float().softmax(-1)[:, :-1]        # (Q, 80)
        score, place = classes.flatten().topk(len(classes))                      # (Q,)
        label, query = place % classes.shape[1], place // classes.shape[1]       # (Q,)
        masks = F.interpolate(out.masks_queries_logits.float(), seen["pixel_values"].shape[-2:],
                              mode="bilinear")
        masks = F.interpolate(masks, image.size[::-1], mode="bilinear")[0][query]     # (Q, H, W)
        inside = masks > 0
        sure = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)   # (Q,)
        found = []
        for value, k, mask in zip((score * sure).tolist(), label.tolist(), inside.cpu().numpy()):
            if mask.any():
                (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]]
                                                for axis in (1, 0))
                box = (left, top, right + 1, bottom + 1)
                found.append((OBJECTS[k], Found(box, value, mask=mask)))
        return found


class Colors:
    """open_clip's ViT-L-14 of OpenAI as a judge of colour, zero-shot over PAINTS. Of an object it
    sees the box; what the mask leaves out is grey."""
    SOURCE = "timm/vit_large_patch14_clip_224.openai"       # open_clip's ("ViT-L-14", "openai")

    def __init__(self, folder: Path, device: torch.device):
        import open_clip
        self.device, self.known, name = device, {}, f"local-dir:{folder}"
        try:
            self.net, _, self.transform = open_clip.create_model_and_transforms(
                name, force_quick_gelu=True, require_pretrained=True, device=device)
            self.tokenizer = open_clip.get_tokenizer(name)
        except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:
            raise ValueError(f"{folder} cannot be loaded by open_clip ({first_line(error)}): fetch "
                             "it again") from error
        self.net.eval()

    def classifier(self, name: str) -> torch.Tensor:
        """A class of objects → (10, D): of each colour the mean of its three prompts."""
        if name not in self.known:
            texts = [text for c in PAINTS for text in (
                f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}",
                f"a photo of a {c} object")]
            read = self.net.encode_text(self.tokenizer(texts).to(self.device))   # (30, D)
            mean = F.normalize(read, dim=-1).view(len(PAINTS), 3, -1).mean(1)    # (10, D)
            self.known[name] = F.normalize(mean, dim=-1)
        return self.known[name]

    @torch.no_grad()
    def __call__(self, image: Image.Image, group: list[Found], name: str) -> list[str]:
        """The colours of some objects of one class in a picture."""
        grey = Image.new("RGB", image.size, "#999")
        cut = [Image.composite(image, grey, Image.fromarray(thing.mask)).crop(thing.box)
               for thing in group]
        pixels = torch.stack([self.transform(part) for part in cut]).to(self.device)
        seen = F.normalize(self.net.encode_image(pixels), dim=-1)                # (n, D)
        return [PAINTS[k] for k in (seen @ self.classifier(name).T).argmax(1).tolist()]


def read_results(file: Path) -> list[dict]:
    """The whole lines of results.jsonl; a kill may have cut the last one."""
    lines = file.read_text().splitlines(True) if file.exists() else []
    try:
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        assert all({"filename", "metadata", "correct"} <= set(line) for line in found)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{file} is damaged ({first_line(error)}): remove it") from error
    return found


def score_geneval(folder: Path, models: str | None, device: torch.device) -> None:
    """Judge the pictures of a layout that its results.jsonl does not have as they are, by these
    networks; print the summary. FileNotFoundError: a network's files are missing."""
    prompts, file = read_layout(folder), folder / "results.jsonl"
    names = [str(path.relative_to(folder)) for _, pictures in prompts for path in pictures]
    known = {line["filename"]: line for line in read_results(file)}
    done = {name: known[name] for name in names if name in known}          # others are gone
    patterns = ("*config.json", "*.safetensors")
    folders = [rewards.fetch(kind.SOURCE, patterns, models, "geneval score needs", disk)
               for kind, disk in ((Detector, 0.3), (Colors, 1.7))]
    judges, todo = "+".join(rewards.revision(place, patterns) for place in folders), []
    for wanted, pictures in prompts:
        for path in pictures:
            name = str(path.relative_to(folder))
            of = dict(picture=hashlib.sha256(path.read_bytes()).hexdigest()[:16], judges=judges)
            line = done.get(name, {})
            if line.get("metadata") != json.dumps(wanted) or of.items() - line.items():
                todo.append((wanted, path, of))
                done.pop(name, None)
    if todo:
        detector, colors = Detector(folders[0], device), Colors(folders[1], device)
    if todo or done.keys() != known.keys():
        write_file(file, "".join(json.dumps(line) + "\n" for line in done.values()))
    for wanted, path, of in tqdm(todo, desc="judging", unit="picture"):
        try:
            image = to_rgb(decode(path.read_bytes())[0])
        except BROKEN as error:
            raise ValueError(f"{path} cannot be read ({error}): make it again") from error
        objects = keep(detector(image), wanted["tag"])
        line = of | result(str(path.relative_to(folder)), wanted, objects,
                           lambda group, name: colors(image, group, name))
        done[line["filename"]] = line
        with open(file, "a") as out:
            out.write(json.dumps(line) + "\n")
    counts, all_ = [len(pictures) for _, pictures in prompts], len(geneval_prompts())
    partial = len(counts) < all_ or min(counts) < max(counts)
    print(summary([done[name] for name in names], f"GenEval with the detector {Detector.SOURCE}"
                  + f"; PARTIAL: {len(counts)} of {all_} prompts, {min(counts)} to {max(counts)} "
                    "pictures each" * partial))


# ---- rewards: the mean scores of a checkpoint or of pictures -------------------------------------

def read_wanted(path: str) -> list[dict]:
    """The prompts of a file: a line each as sample.py reads them, or PartiPrompts' table
    (Prompt, tab, Category, ...)."""
    jobs = sample.read_prompts(path)
    if jobs[0]["prompt"].startswith("Prompt\t"):
        rows = [job["prompt"].split("\t") for job in jobs[1:]]
        if not rows:
            raise ValueError(f"--prompts {path} has a heading and no prompt")
        return [dict(tag=(row + ["prompts"])[1], prompt=row[0]) for row in rows]
    if more := {key for job in jobs for key in job} - {"prompt"}:
        raise ValueError(f"--prompts {path}: here a line has a prompt alone, not {min(more)}: pass "
                         "--targets, for all")
    return [dict(tag="prompts", prompt=job["prompt"]) for job in jobs]


def refuse_older_scores(pictures: Pictures) -> None:
    """ValueError: a picture is younger than its scores, so they may be another picture's."""
    for shard in pictures.shards:
        file = rewards.sidecar(shard)
        scored = rewards.read_sidecar(file)[1] if file.exists() else {}
        for row in range(shard.start, shard.stop):
            path = Path(pictures.files[pictures.places[pictures.rows[row], 0]])
            if "scores" in scored.get(pictures.keys[row], ()) \
                    and path.stat().st_mtime > file.stat().st_mtime:
                raise ValueError(f"{path} is younger than its scores in {file}: remove that file "
                                 "to score anew, or touch it to keep them")


def side_of(folder: Path, names: Sequence[str]) -> int:
    """The short side in pixels of a folder's pictures, which analytic rewards see whole.

    ValueError: such rewards are asked for, and the sides differ."""
    pictures, sides = Pictures(str(folder), 1, memory_gb=0), set()
    for row in range(len(pictures)):
        try:
            sides.add(pictures.cut(row, lambda data: min(
                Image.open(io.BytesIO(data), formats=FORMATS).size)))
        except ValueError:
            continue                                             # counted when it is scored
    if len(sides) > 1 and set(names) & set(ANALYTIC):
        raise ValueError(f"{folder} has pictures with short sides of {min(sides)} to {max(sides)} "
                         "pixels, on which analytic rewards depend: pass --size, for all")
    return min(sides, default=1)


def refuse_other_sizes(pictures: Pictures) -> None:
    """ValueError: there are analytic scores of another size, which training may need."""
    for file in map(rewards.sidecar, pictures.shards):
        size = rewards.read_sidecar(file)[0]["size"] if file.exists() else None
        if size not in (None, pictures.size):
            raise ValueError(f"{file} has scores of pictures of {size} pixels, which those of "
                             f"{pictures.size} would replace: pass --size {size}, or copy the "
                             "pictures to another folder")


def mean_rewards(folder: Path, args, device: torch.device) -> None:
    """Score a folder of pictures with prompts (data.py reads it); print each reward's mean, and its
    standard error over prompts. Scores of each picture: its sidecar, as rewards.py writes it."""
    names = rewards.choose_rewards(args.rewards, Pictures(str(folder), 1, memory_gb=0).captions)
    pictures = Pictures(str(folder), args.size or side_of(folder, names), memory_gb=0)
    if set(names) & set(ANALYTIC):
        refuse_other_sizes(pictures)
    refuse_older_scores(pictures)
    found = rewards.available(names, args.models, args.keep_going)
    groups = rewards.groups_of(found, args.memory_gb, device)
    failed = rewards.score_dataset(pictures, tuple(found), args.batch, True, groups=groups)
    samples = len(pictures) + pictures.lost
    if len(failed) > MAX_UNREADABLE * samples:
        raise ValueError(f"{folder}: {len(failed)} of {samples} pictures have no scores (the limit "
                         f"is {MAX_UNREADABLE:.0%}): make them again, or remove their lines")
    rows, raws = rewards.read_scores(pictures, tuple(found))
    scores = np.stack([raw.mean(0) for raw in raws])                             # (N, R)
    _, prompt = np.unique([pictures.captions[row][0] for row in rows], return_inverse=True)
    means = np.stack([np.bincount(prompt, column) for column in scores.T], 1) \
        / np.bincount(prompt)[:, None]                                           # (P, R)
    print(f"{len(scores)} pictures of {len(means)} prompts\n{'reward':14}{'mean':>10}{'error':>10}")
    for name, column in zip(found, means.T):
        error = column.std(ddof=1) / len(column) ** 0.5 if len(column) > 1 else float("nan")
        print(f"{name:14}{column.mean():10.4f}{error:10.4f}")


# ---- control: does each target move its own reward? ----------------------------------------------

def control(model: sample.Model, folder: Path, n: int, columns: int) -> dict:
    """The sweep of each target over [0, 1], the others at 1 and at 0.5: n prompts, one noise each.

    Returns {"levels", "rewards", others: (R, levels, R) means in native units}.
    """
    values = np.linspace(0, 1, columns).round(4).tolist()
    found = {"levels": values, "rewards": model.rewards}
    total = 2 * len(model.rewards) * columns
    with tqdm(total=total, desc="sweeping", unit="level", leave=False) as bar:
        for others in (1.0, 0.5):
            found[f"others={others:g}"] = matrix = []
            for name in model.rewards:
                matrix.append([])
                for value in values:
                    targets = [f"all={others:g}", f"{name}={value:g}"]
                    there = mean_scores(model, folder, n, targets)
                    matrix[-1].append([there[measured] for measured in model.rewards])
                    bar.update()
    return found


def control_report(model: sample.Model, found: dict) -> str:
    """For each target (row) how far it moves each reward (column) from 0 to 1, in std of the data;
    Spearman's rank correlation of the levels with its own; cross-talk: the mean size of the others'
    moves over its own."""
    from scipy.stats import spearmanr                       # here: the tables alone need it
    names = found["rewards"]
    std = np.array([model.config["score_std"][name] or np.nan for name in names])
    lines = []
    for others in ("others=1", "others=0.5"):
        sweeps = np.array(found[others])                                         # (R, levels, R)
        moves = (sweeps[:, -1] - sweeps[:, 0]) / std                             # (R, R)
        lines.append(f"{others:14}" + "".join(f"{name[:9]:>10}" for name in names)
                     + f"{'Spearman':>10}{'cross-talk':>12}")
        for own, (name, row, sweep) in enumerate(zip(names, moves, sweeps)):
            curve, rest = sweep[:, own], np.abs(np.delete(row, own))
            order = spearmanr(found["levels"], curve).statistic if np.ptp(curve) else np.nan
            talk = np.nanmean(rest) / max(abs(row[own]), 1e-9) if len(rest) else np.nan
            lines.append(f"{name:14}" + "".join(f"{move:10.2f}" for move in row)
                         + f"{order:10.3f}{talk:12.2f}")
    return "\n".join(lines)


def draw_control(model: sample.Model, found: dict, path: Path) -> None:
    """A panel a target: what it moves, in std of the data; the others at 1, and at 0.5 below."""
    from matplotlib.figure import Figure
    names = found["rewards"]
    figure = Figure(figsize=(3 * len(names), 6), layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, sharey=True, squeeze=False)
    for row, others in zip(axes, ("others=1", "others=0.5")):
        for axis, name, sweep in zip(row, names, np.array(found[others])):
            for j, measured in enumerate(names):
                std = model.config["score_std"][measured] or float("nan")
                axis.plot(found["levels"], (sweep[:, j] - sweep[0, j]) / std, label=measured,
                          linewidth=3 if measured == name else 1)
            axis.set(title=f"target {name}, {others}", xlabel="target")
    axes[0, 0].set(ylabel="moved by, std of the data")
    axes[0, -1].legend(fontsize=8)
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    """Write a figure, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


# ---- compare: convergence, one reward or all, best of N ------------------------------------------

def kept(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints that a run kept: (step, folder), in order."""
    return sorted((int(place.name[5:]), place) for place in folder.glob("step-*")
                  if place.name[5:].isdigit())


def curve_of(folder: Path, n: int, device: torch.device, targets: Sequence[str] = ("all=1",),
             guidance: float | None = None) -> dict:
    """The mean scores of the checkpoints that a run kept: {"steps", "accuracy", each reward: a
    list}."""
    found = {"steps": [step for step, _ in kept(folder)]}
    for _, place in tqdm(kept(folder), desc=f"{folder.name}: curve", unit="step", leave=False):
        model = sample.load(place, device)
        for name, value in mean_scores(model, folder, n, targets, guidance).items():
            found.setdefault(name, []).append(value)
    return found


def best_of(model: sample.Model, folder: Path, n: int, candidates: int,
            targets: Sequence[str] = ("all=1",), guidance: float | None = None) -> dict:
    """n prompts, `candidates` pictures each: {"sizes": N = 1, 2, 4, ..., each reward: the mean best
    of N}, each N averaged over all groups that the candidates can be split into."""
    sizes, rows = [2 ** k for k in range(candidates.bit_length())], []

    def make(number: int, want: dict) -> dict:
        seeds = range(number * candidates, (number + 1) * candidates)
        scores = measure(model, [want] * candidates, seeds, targets, guidance)[1].numpy()
        curves = [scores.reshape(-1, k, len(ANALYTIC)).max(1).mean(0) for k in sizes]
        return dict(zip(ANALYTIC, np.transpose(curves).tolist()))

    settings = settings_of(model, targets, guidance, candidates=candidates)
    for number, want in enumerate(tqdm(benchmark(n), desc=f"{folder.name}: best", leave=False)):
        rows.append(remembered(folder, settings | dict(number=number, prompts=digest(want)),
                               lambda: make(number, want)))
    return {"sizes": sizes} | {name: np.mean([row[name] for row in rows], 0).tolist()
                               for name in ANALYTIC}


def kind_of(config: dict) -> str:
    """What a run was told: "none", one reward, "all", or some of them."""
    names = config["network"]["rewards"]
    return "all" if tuple(names) == ANALYTIC else "+".join(names) or "none"


def first_to_reach(steps: list, values: list, goal: float) -> float:
    """The first kept step from which on the score is the goal or better; infinite if none is.

    For good: after some 50 steps pictures are full of shapes, and one of them is what was asked."""
    below = [k for k, value in enumerate(values) if value < goal]
    reached = steps[below[-1] + 1:] if below else steps
    return reached[0] if reached else float("inf")


def mean_error(values: Sequence[float], digits: int = 3) -> str:
    """"mean ± standard error" of a few seeds; of one, the mean."""
    values = np.array(values, float)
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{error}"


def runs_of(folders: Sequence[str], device: torch.device) -> dict[str, dict[int, dict]]:
    """Runs by what they were told and by seed: {kind: {seed: {"folder", "model"}}}, "none" first.

    ValueError: runs differ in more than rewards and seed, kept checkpoints at other steps, or
    "none" (the baseline) and "all" have no common seed.
    """
    found, first, steps, means = {}, None, None, {}
    for folder in map(Path, folders):
        model = sample.load(folder, device)
        flags = dict(model.config.get("args", {}))
        kind, seed = kind_of(model.config), flags.pop("seed", 0)
        flags.pop("rewards", None)
        first = flags if first is None else first
        if (done := model.config.get("step", flags.get("steps"))) != flags.get("steps"):
            raise ValueError(f"{folder} has come to step {done} of {flags['steps']}: let it finish "
                             "(its python train.py command again)")
        if other := [key for key in first | flags if flags.get(key) != first.get(key)]:
            raise ValueError(f"{folder} was trained with --{other[0].replace('_', '-')} "
                             f"{flags.get(other[0])}, {folders[0]} with {first.get(other[0])}"
                             ": runs to compare differ in rewards and seed alone")
        place, mean = means.setdefault(seed, (folder, model.config["mean"]))
        if not np.allclose(model.config["mean"], mean, 1e-6):      # the seed draws what is kept out
            raise ValueError(f"{folder} was trained on other pictures than {place} (their mean "
                             "differs): runs to compare share their data")
        if seed in found.setdefault(kind, {}):
            raise ValueError(f"{folder} is a second run of rewards {kind} and seed {seed}: name "
                             "one")
        mine = [step for step, _ in kept(folder)]
        if mine and mine != (steps := steps or mine):
            raise ValueError(f"{folder} kept checkpoints at other steps ({mine}) than those before "
                             f"it ({steps}): let it finish, or train with the same --keep-every")
        found[kind][seed] = dict(folder=folder, model=model)
    if not set(found.get("none", ())) & set(found.get("all", ())):
        there = ", ".join(f"{kind} {sorted(seeds)}" for kind, seeds in found.items())
        raise ValueError("compare needs a run with --rewards none and one with all, of one seed: "
                         f"these are {there}")
    order = [kind for kind in ("none", *ANALYTIC, "all") if kind in found]
    return {kind: found[kind] for kind in dict.fromkeys((*order, *found))}


def compare(folders: Sequence[str], out: Path, args, device: torch.device) -> str:
    """Measure runs (each keeps what was measured), draw three figures, and return the tables: each
    number the mean over seeds ± its standard error. --targets and --guidance are of "all". Curves
    and best of N are of "none" and "all" alone.
    """
    runs, wanted = runs_of(folders, device), benchmark(max(args.n, args.curve, args.best))
    for run in (run for seeds in runs.values() for run in seeds.values()):
        check_words(run["model"], run["folder"], wanted)
    for run in runs["all"].values():
        levels(run["model"], 1, *args.targets)            # a wrong one stops before hours are spent
    for kind, seeds in runs.items():
        asked = (args.targets, args.guidance) if kind == "all" else ()
        for run in seeds.values():
            run["final"] = mean_scores(run["model"], run["folder"], args.n, *asked)
            if kind in ("none", "all"):
                if args.curve and kept(run["folder"]):
                    run["curve"] = curve_of(run["folder"], args.curve, device, *asked)
                if args.candidates:
                    run["best"] = best_of(run["model"], run["folder"], args.best, args.candidates,
                                          *asked)
    draw_rewards(runs, out / "rewards.png")
    asked = " ".join(args.targets) + ("" if args.guidance is None else f", w {args.guidance:g}")
    tables = [f"told all: asked for {asked}; told one reward: for all=1, at its checkpoint's w; "
              f"told nothing: no guidance\n{final_table(runs)}"]
    pairs = [(runs["none"][seed], runs["all"][seed]) for seed in sorted(runs["all"])
             if seed in runs["none"]]
    if all("curve" in run for pair in pairs for run in pair):
        draw_convergence(runs, out / "convergence.png")
        tables.append(speed_table(pairs))
    if args.candidates:
        draw_best(runs, out / "best_of_n.png")
        tables.append(best_table(pairs))
    return "\n\n".join(tables)


def final_table(runs: dict) -> str:
    """The benchmark at the end: a row a run, told nothing, one reward, all; columns its scores."""
    names = ("accuracy", *ANALYTIC)
    lines = [f"{'told':14}{'seeds':>6}" + "".join(f"{name:>17}" for name in names)]
    for kind, seeds in runs.items():
        cells = [mean_error([run["final"][name] for run in seeds.values()]) for name in names]
        lines.append(f"{kind:14}{len(seeds):6}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def speed_table(pairs: Sequence[tuple]) -> str:
    """The baseline's steps over those from which on "all" has at least the baseline's final score;
    if not all seeds do, how many. Where a seed's is the first kept step it is the least mean."""
    lines = [f"{'speed-up':14}{'times':>17}   reached for good at step (seed by seed)"]
    for name in ("accuracy", *ANALYTIC):
        steps = [first_to_reach(run["curve"]["steps"], run["curve"][name], base["curve"][name][-1])
                 for base, run in pairs]
        first, last = (pairs[0][0]["curve"]["steps"][k] for k in (0, -1))
        times = [last / step for step in steps]
        cell = f"≥ {np.mean(times):.1f}" if first in steps else mean_error(times, 1)
        if not all(times):
            cell = f"{np.count_nonzero(times)} of {len(times)}"
        lines.append(f"{name:14}{cell:>17}   " + " ".join(f"{step:g}" for step in steps))
    return "\n".join(lines)


def best_table(pairs: Sequence[tuple]) -> str:
    """One picture of "all" beside the baseline's best of N, by each reward; and the smallest N
    whose best, of "all", is at least the baseline's best of all its candidates."""
    sizes = pairs[0][0]["best"]["sizes"]
    lines = [f"{'best of N':14}{'baseline, 1':>17}{f'baseline, {sizes[-1]}':>17}{'all, 1':>17}"
             f"{f'all, {sizes[-1]}':>17}   N of all that reaches it (seed by seed)"]
    for name in ANALYTIC:
        curves = [[run["best"][name] for run in pair] for pair in pairs]
        cells = [mean_error([curve[k][at] for curve in curves])
                 for k, at in ((0, 0), (0, -1), (1, 0), (1, -1))]
        needed = [first_to_reach(sizes, all_, base[-1]) for base, all_ in curves]
        lines.append(f"{name:14}" + "".join(f"{cell:>17}" for cell in cells)
                     + "   " + " ".join(f"{n:g}" for n in needed))
    return "\n".join(lines)


def draw_band(axis, x: Sequence, curves: Sequence[Sequence], label: str) -> None:
    """The mean of some seeds' curves and, around it, a standard error."""
    y = np.array(curves)
    line = axis.plot(x, y.mean(0), label=label)[0]
    if len(y) > 1:
        error = y.std(0, ddof=1) / len(y) ** 0.5
        axis.fill_between(x, y.mean(0) - error, y.mean(0) + error, alpha=0.2,
                          color=line.get_color())


def draw_convergence(runs: dict, path: Path) -> None:
    """Accuracy and rewards against steps, of "none" and "all"."""
    from matplotlib.figure import Figure
    names = ("accuracy", *ANALYTIC)
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    for axis, name in zip(figure.subplots(2, 3).flat, names):
        for kind, seeds in runs.items():
            curves = [run["curve"] for run in seeds.values() if "curve" in run]
            if curves:
                draw_band(axis, curves[0]["steps"], [curve[name] for curve in curves], kind)
        base = [run["curve"][name][-1] for run in runs["none"].values() if "curve" in run]
        axis.axhline(np.mean(base), color="grey", linestyle=":")
        axis.set(title=name, xlabel="steps", xscale="log")
        axis.legend()
    save_figure(figure, path)


def draw_rewards(runs: dict, path: Path) -> None:
    """All rewards of all runs, as distances from the baseline in std of the data, and accuracy."""
    from matplotlib.figure import Figure
    names = ("accuracy", *ANALYTIC)
    model = next(iter(runs["all"].values()))["model"]            # the others know their own alone
    std = model.config["score_std"] | {"accuracy": 1.0}
    by_seed = lambda kind, name: np.array([run["final"][name] for run in runs[kind].values()])
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    axis, width = figure.subplots(), 0.8 / len(runs)
    for k, kind in enumerate(runs):
        values = [(by_seed(kind, name) - by_seed("none", name).mean()) / (std[name] or np.nan)
                  for name in names]
        error = [v.std(ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0 for v in values]
        x = np.arange(len(names)) + (k - (len(runs) - 1) / 2) * width
        axis.bar(x, [v.mean() for v in values], width, yerr=error,
                 label=f"told {'nothing' if kind == 'none' else kind}, seeds: {len(values[0])}")
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="above the baseline, std of the data (accuracy: share)")
    axis.legend(ncols=2)
    save_figure(figure, path)


def draw_best(runs: dict, path: Path) -> None:
    """The best of N pictures by each reward against N, of "none" and of "all"."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(15, 3.5), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(ANALYTIC)), ANALYTIC):
        for kind in ("none", "all"):
            curves = [run["best"] for run in runs[kind].values()]
            draw_band(axis, curves[0]["sizes"], [curve[name] for curve in curves], kind)
        axis.set(title=name, xlabel="best of N")
        axis.set_xscale("log", base=2)
        axis.legend()
    save_figure(figure, path)


# ---- flops: what a picture costs -----------------------------------------------------------------

def forward_cost(c: Config, tokens: int) -> tuple[TextRIN, int, int]:
    """(the network without numbers, floating-point operations of one forward pass of one picture
    and branch with that many text tokens, those of them that are not attention's products).

    An operation is a multiplication or an addition; the paper counts the pair as one."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = TextRIN(c)
        net(torch.empty(1, c.channels, c.size, c.size), torch.ones(1),
            torch.ones(1, len(c.rewards)), torch.empty(1, tokens, c.text_dim),
            torch.ones(1, tokens, dtype=torch.bool))
    counts = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    everything = sum(counts.values())
    products = sum(n for name, n in counts.items() if "bmm" in name or "attention" in name)
    return net, everything, everything - products


def cost_report(name: str, tokens: int) -> str:
    """What a picture of a checkpoint, or of a preset with all its rewards, costs as the paper
    counts: text and rewards are read at every step (sample.py reads them once)."""
    if name in PRESETS and not Path(name).exists():
        c = Config(**PRESETS[name] | dict(rewards=PAPER if name == "paper" else ANALYTIC))
        steps = sample.SAMPLERS[name]["steps"]
    else:
        model = sample.load(name, torch.device("cpu"))
        c, steps = model.net.config, model.config["sampler"]["steps"]
    net, everything, linear = forward_cost(c, tokens)
    parameters = sum(p.numel() for name, p in net.named_parameters()
                     if not name.startswith("log_variance"))             # which belongs to the loss
    rows = [("one forward pass", 1), (f"a picture, {steps} steps, one branch", steps),
            ("the same, guided", 2 * steps)]
    lines = [f"{name}: {parameters:,} parameters, {len(c.rewards)} rewards, {tokens} text tokens",
             f"{'G (10^9) operations':36}{'FLOP':>12}{'MAC':>12}{'MAC, linear layers':>21}"]
    for label, times in rows:
        flop, mac, alone = (times * n / 1e9 for n in (everything, everything / 2, linear / 2))
        lines.append(f"{label:36}{flop:12,.2f}{mac:12,.2f}{alone:21,.2f}")
    return "\n".join(lines)


# ---- the command line ----------------------------------------------------------------------------

def read_command(argv=None) -> argparse.Namespace:
    """The command and its flags, checked. ValueError: one is out of its range."""
    parser = argparse.ArgumentParser(description="evaluate checkpoints")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, words, *positional):
        found = commands.add_parser(name, help=words, description=words)
        for place, meaning, number in positional:
            found.add_argument(place, help=meaning, **number)
        return found.add_argument

    many, one = dict(nargs="+"), {}
    add = command("shapes", "GenEval's six tasks on the embedded world",
                  ("checkpoints", "folders that train.py wrote", many))
    add("--n", type=int, default=600, help="prompts")
    add("--targets", nargs="+", default=[], metavar="REWARD=LEVEL", help="default all=1")
    add("--guidance", type=float, help="w; default: the checkpoint's")
    add("--steps", type=int, help="default: the checkpoint's")
    add("--seed", type=int, default=0, help="of the prompts")
    add = command("control", "does each target move its own reward?",
                  ("checkpoints", "folders that train.py wrote", many))
    add("--n", type=int, default=48, help="prompts")
    add("--levels", type=int, default=9, help="of each target, from 0 to 1")
    add = command("compare", "convergence, one reward or all, best of N",
                  ("runs", "folders that train.py wrote, with --keep-every for curves", many))
    add("--out", default="runs", help="folder of the figures")
    add("--targets", nargs="+", default=["all=1"], metavar="REWARD=LEVEL",
        help="of runs told all; default all=1")
    add("--guidance", type=float, help="w, of runs told all; default: the checkpoint's")
    add("--n", type=int, default=600, help="prompts of the benchmark")
    add("--curve", type=int, default=120, help="prompts of each point of the curves; 0: none")
    add("--best", type=int, default=24, help="prompts of best of N")
    add("--candidates", type=int, default=128, help="the largest N, a power of 2; 0: none")
    add = command("rewards", "mean scores of pictures",
                  ("source", "checkpoint, or folder of pictures with metadata.jsonl", one))
    add("--rewards", default="analytic", help="analytic, all (the paper's seven), or a,b,c")
    add("--prompts", help="file: prompts, or PartiPrompts' table; default: the embedded world's")
    add("--out", help="folder of a checkpoint's pictures; default: CKPT/pictures")
    add("--size", type=int, help="side that analytic rewards see; default: the pictures' own")
    add("--models", help="folder with OWNER/NAME/files of the hub; default: from the hub")
    add("--memory-gb", type=float, default=48.0, help="for networks, which go in groups that fit")
    add("--keep-going", action="store_true", help="leave out rewards whose files are missing")
    generation_flags(add, samples=1)
    geneval_commands(commands.add_parser("geneval", help="the real GenEval"))
    add = command("flops", "what a picture costs",
                  ("checkpoints", "folders, shapes or paper", many))
    add("--tokens", type=int, default=77, help="of text")
    args = parser.parse_args(argv)
    curves = len(TASKS) if getattr(args, "curve", 0) else 0
    least = dict(n=len(TASKS), curve=curves, best=1, candidates=0, levels=2, tokens=1, samples=1,
                 batch=1, steps=1, seed=0, guidance=0, size=3)
    for key, low in least.items():
        value = getattr(args, key, None)
        if value is not None and not low <= value < 2 ** 31:                     # not: NaN, too
            tasks = ", one prompt a task" * (low == len(TASKS))
            raise ValueError(f"--{key} must be at least {low}{tasks} (and below 2^31)")
    if args.command == "compare" and args.candidates & (args.candidates - 1):
        raise ValueError(f"--candidates {args.candidates} must be a power of 2, or 0")
    return args


def geneval_commands(parser: argparse.ArgumentParser) -> None:
    """generate and score, with their flags."""
    commands = parser.add_subparsers(dest="part", required=True)
    add = commands.add_parser("generate", help="pictures of the 553 prompts").add_argument
    add("source", help="checkpoint: folder or hub id")
    add("out", help="folder to write to")
    generation_flags(add, samples=4)
    add = commands.add_parser("score", help="judge them").add_argument
    add("source", help="folder of NNNNN/samples/0000.png and NNNNN/metadata.jsonl")
    add("--models", help="folder with OWNER/NAME/files of the hub; default: from the hub")


def generation_flags(add: Callable, samples: int) -> None:
    """The flags of commands that generate a folder of pictures."""
    add("--variant", help="subfolder of the checkpoint, such as miro-only-clip")
    add("--text-encoder", help="folder or hub id of a T5; default: the checkpoint's")
    add("--vae", help="folder or hub id of an AutoencoderKL; default: the checkpoint's")
    add("--targets", nargs="+", default=[], metavar="REWARD=LEVEL", help="default all=1")
    add("--negative-prompt", help="caption of the negative branch; default: the same caption")
    add("--guidance", type=float, help="w, 0 = off; default: the checkpoint's")
    add("--steps", type=int, help="default: the checkpoint's")
    add("--samples", type=int, default=samples, help="pictures a prompt")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=32, help="pictures at once; changes no more than rounding")


def control_command(model: sample.Model, folder: Path, args) -> None:
    """Sweep the targets of a checkpoint, or take what was swept; print and draw it.

    ValueError: it has no target, or one of a reward that is no pixels' and caption's."""
    if not model.rewards or set(model.rewards) - set(ANALYTIC):
        raise ValueError(f"{folder} was trained with {', '.join(model.rewards) or 'no reward'}: "
                         f"control sweeps and measures {', '.join(ANALYTIC)}")
    found = control(model, folder, args.n, args.levels)
    print(control_report(model, found))
    draw_control(model, found, folder / "control-sweep.png")


def generate_command(args, device: torch.device) -> Path:
    """geneval generate, and rewards of a checkpoint: make its pictures, and say where."""
    if args.out is None and not Path(args.source).exists():
        raise ValueError(f"--out: name a folder for the pictures of {args.source}")
    model = sample.load(sample.find(args.source, args.variant), device)
    sample.set_sources(model, args.source, args.text_encoder, args.vae)
    if args.command == "geneval":
        wanted = geneval_prompts()
    else:
        wanted = read_wanted(args.prompts) if args.prompts else benchmark(600)
        if not args.prompts:
            check_words(model, args.source, wanted)
        names = rewards.choose_rewards(args.rewards, [(want["prompt"],) for want in wanted])
        args.rewards = ",".join(rewards.available(names, args.models, args.keep_going))
    folder = Path(args.out or Path(args.source) / "pictures")
    generate_folder(model, wanted, folder, args)
    return folder


def main(argv=None) -> None:
    """The command line: one question at a time, checkpoint by checkpoint."""
    args, device = read_command(argv), sample.best_device()
    if args.command == "flops":
        print("\n\n".join(cost_report(name, args.tokens) for name in args.checkpoints))
    elif args.command == "compare":
        out = Path(args.out)
        if any(part.is_file() for part in (out, *out.parents)):
            raise ValueError(f"--out {out} is a file or lies in one: name a folder")
        out.mkdir(parents=True, exist_ok=True)
        tables = compare(args.runs, out, args, device)
        write_file(out / "compare.txt", tables + "\n")
        print(tables)
    elif args.command in ("shapes", "control"):
        for folder in map(Path, args.checkpoints):
            print(folder)
            model = sample.load(folder, device)
            check_words(model, folder, benchmark(args.n))
            command = judge_shapes if args.command == "shapes" else control_command
            command(model, folder, args)
    elif args.command == "rewards":
        folder = Path(args.source)
        if not folder.exists() or (folder / (args.variant or "") / "model.safetensors").exists():
            folder = generate_command(args, device)
        elif args.prompts or args.targets or args.out or args.seed or args.samples != 1 or any(
                value is not None for value in (args.negative_prompt, args.guidance, args.steps,
                                                args.variant, args.text_encoder, args.vae)):
            raise ValueError(f"{folder} is no checkpoint (it has no model.safetensors): --prompts, "
                             "--targets, --out and all that changes a sampler are for making "
                             "pictures")
        mean_rewards(folder, args, device)
    elif args.part == "generate":
        folder = generate_command(args, device)
        print(f"{folder} has {args.samples} pictures of each prompt; judge them with\n"
              f"python evaluate.py geneval score {folder}")
    else:
        score_geneval(Path(args.source), args.models, device)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:            # a user's mistake: one sentence, no traceback
        print(error, file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError as error:
        print(f"the GPU's memory is full ({first_line(error)}): where the command has them, pass a "
              "smaller --batch or --memory-gb", file=sys.stderr)
        sys.exit(2)
