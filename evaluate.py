"""Evaluate: the paper's questions, a command each, in the order of this file.

    python evaluate.py shapes runs/shapes          # is the caption true in the picture? six tasks
    python evaluate.py control runs/shapes         # does each target move its own reward?
    python evaluate.py compare runs/compare/*      # which flag helps, how soon; best of N
    python evaluate.py rewards CKPT --rewards all  # mean scores of pictures, also the paper's seven
    python evaluate.py geneval generate CKPT DIR   # the real GenEval: 553 prompts, 4 pictures each,
    python evaluate.py geneval score DIR           # judged by Mask2Former and CLIP
    python evaluate.py flops runs/shapes paper     # what a picture costs; folders or presets

The first three measure the embedded world with exact oracles, on captions that training never saw
(shapes.held_out; their claims it did see, with other endings). `shapes` judges as GenEval does, and
is not GenEval: its things are shapes. `control`, `compare`, `rewards` and `generate` go on where
they were stopped.
"""
import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import rewards
import sample
import shapes
from data import (BROKEN, Data, UserError, best_device, decode, first_line, import_pictures,
                  precision, read_json, refuse_too_many, run, to_rgb, write_text, write_whole)
from model import PRESETS, Config, TextRIN, build
from shapes import ANALYTIC, TASKS

MEASURES = ("accuracy", *ANALYTIC)       # what is measured of a picture of the embedded world: M


# ---- one way to make pictures and measure them, one to remember it -------------------------------

def measure(model: sample.Model, wanted: Sequence[dict], seeds: Sequence[int],
            targets: Sequence[str] = (), guidance=None, steps=None) -> tuple[np.ndarray, list]:
    """Pictures of prompts, noise by seed → MEASURES (B, M), rewards in their own units, and B
    verdicts. What `targets` does not name is asked for at 1; None: the checkpoint's own."""
    texts = [want["prompt"] for want in wanted]
    total = -(-len(texts) // 64) * (steps or model.config["sampler"]["steps"])
    with tqdm(total=total, desc=" ".join(targets) or "all=1", leave=False, disable=None) as bar:
        pictures = sample.pictures(model, texts, ["all=1", *targets], seeds=seeds, steps=steps,
                                   guidance=guidance, progress=bar.update)
    lines = verdicts(pictures, wanted)
    scores = shapes.score_all(ANALYTIC, pictures, texts).double()                # (B, R)
    return np.column_stack([[line["correct"] for line in lines], scores]), lines


def measured(model: sample.Model, memory: Path, n: int, each: int = 1,
             targets: Sequence[str] = (), guidance=None) -> np.ndarray:
    """MEASURES (n each, M) of `each` pictures of each of n prompts, noise from seed 0 on: measured
    once, and kept in MEMORY/measured under all that they depend on."""
    wanted = [want for want in benchmark(n) for _ in range(each)]
    settings = settings_of(model, targets, guidance, prompts=wanted,
                           scorers={name: shapes.version(name) for name in ANALYTIC})
    file = memory / "measured" / f"{digest(settings)}.json"
    if not file.exists():
        values, _ = measure(model, wanted, range(len(wanted)), targets, guidance)
        file.parent.mkdir(exist_ok=True)
        write_text(file, json.dumps({"values": values.tolist()}))
    return np.array(read_json(file)["values"])


def settings_of(model: sample.Model, targets: Sequence[str], guidance, steps=None, **more) -> dict:
    """All that pictures depend on but their prompts and seeds: the weights, the pixel norms, the
    levels asked for, the sampler."""
    weights = hashlib.sha256()
    for tensor in model.net.state_dict().values():
        weights.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    levels = sample.read_targets(["all=1", *targets], model.rewards, 1.0, "--targets")
    asked = dict(guidance=guidance, steps=steps)
    sampler = model.config["sampler"] | {k: v for k, v in asked.items() if v is not None}
    return dict(weights=weights.hexdigest()[:16], targets=levels, **sampler, **more,
                pixels=[model.config["mean"], model.config["std"]],
                precision=str(precision(model.precision, model.device)))


def named(values: np.ndarray) -> dict[str, float]:
    """Values (M) → {measure: its own}."""
    return dict(zip(MEASURES, values.tolist()))


def digest(value) -> str:
    """16 hex digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, each column as wide as it has to be."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
                     for row in rows)


def mean_error(values: Sequence[float], digits: int = 3) -> str:
    """"mean ± standard error" of a few seeds; of one, the mean."""
    values = np.array(values, float)
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{error}"


def draw(groups: dict[str, np.ndarray], titles: Sequence[str], x: Sequence[float], xlabel: str,
         path: Path, base: int | None = None) -> None:
    """Curves (seeds, len(x), panels) of groups: the mean of the seeds and its standard error.
    base: of a logarithmic x, and a dotted line where the first group ends; None: neither."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3.2 * len(titles), 3.5), layout="constrained")
    for k, axis in enumerate(figure.subplots(1, len(titles), squeeze=False)[0]):
        for label, curves in groups.items():
            y = curves[..., k]                                                   # (seeds, N)
            error = y.std(0, ddof=1) / len(y) ** 0.5 if len(y) > 1 else 0 * y[0]
            axis.errorbar(x, y.mean(0), error, label=f"{label}, seeds: {len(y)}")
        if base:
            axis.axhline(next(iter(groups.values()))[:, -1, k].mean(), color="grey", linestyle=":")
            axis.set_xscale("log", base=base)
        axis.set(title=titles[k], xlabel=xlabel)
        axis.legend()
    write_whole(path, partial(figure.savefig, format="png"))


# ---- shapes: is the caption true in the picture? -------------------------------------------------

def evaluate_folder(model: sample.Model, folder: Path, n: int = 600, seed: int = 0,
                    targets: Sequence[str] = (), guidance=None, steps=None) -> dict:
    """Judge pictures of n unseen prompts, image i from noise seed n + i; print tables; write
    evaluation.json and results.jsonl (the verdicts) into the folder.

    At the usual targets, all=1, the first 120 are also made at all=0 and with each single target at
    0: gain/std says by how many std of the data a reward's own target moves it. Returns {request:
    the mean of each of MEASURES, "first": that of the first 120 at all=1, "error": of a mean,
    "tasks": the mean alignment by task, "accuracy": the share of correct pictures by task}."""
    wanted, seeds = benchmark(n, seed), range(seed * n, (seed + 1) * n)
    request, swept = " ".join(targets) or "all=1", model.rewards and not targets
    values, lines = measure(model, wanted, seeds, targets, guidance, steps)      # (n, M)
    found = {request: named(values.mean(0)), "first": named(values[:120].mean(0))}
    for name in ("all", *model.rewards) if swept else ():
        w = 0.0 if name == "all" else guidance                   # s_pos = s_neg: it does nothing
        low, _ = measure(model, wanted[:120], seeds[:120], [f"{name}=0"], w, steps)
        found[f"{name}=0"] = named(low.mean(0))
    text, accuracy = summary(lines, "GenEval's tasks and rules on shapes (this is not GenEval)")
    by_task = [values[k::len(TASKS), MEASURES.index("alignment")] for k in range(len(TASKS))]
    found |= dict(settings=settings_of(model, targets, guidance, steps, n=n, seed=seed),
                  error=named(values.std(0, ddof=1) / n ** 0.5), accuracy=accuracy,
                  tasks={task: float(truths.mean()) for task, truths in zip(TASKS, by_task)})
    std = dict(zip(model.bins.names, model.bins.std)) if swept else {}
    rows = [["reward", request, "error"]]
    rows[0] += ["all=0", "alone=0", "alone=1", "gain/std"] if swept else []
    for name in ANALYTIC:
        cells = [found[request][name], found["error"][name]]
        if swept:
            low, top = found.get(f"{name}=0", {}).get(name, np.nan), found["first"][name]
            cells += [found["all=0"][name], low, top, (top - low) / std.get(name, np.nan)]
        rows.append([name, *(f"{cell:.3f}" for cell in cells)])
    truths = ", ".join(f"{task} {value:.2f}" for task, value in found["tasks"].items())
    print(f"{table(rows)}\nalignment by task: {truths}\n{text}")
    write_lines(folder / "results.jsonl", lines)
    write_text(folder / "evaluation.json", json.dumps(found, indent=1))
    return found


def benchmark(n: int, seed: int = 0) -> list[dict]:
    """n prompts that training never saw, the six tasks in turn, and what must be in a picture."""
    texts = [shapes.prompts(task, -(-n // len(TASKS)), seed) for task in TASKS]
    return [metadata_of(task, text) for six in zip(*texts) for task, text in zip(TASKS, six)][:n]


def metadata_of(task: str, caption: str) -> dict:
    """What must be in a picture of a caption, as GenEval writes it down, and that nothing else is:
    GenEval excludes more than was asked for in counting alone, but captions of this world name all
    that is there, and a picture full of confetti has one of everything."""
    claims, include, asked = shapes.parse(caption), [], dict.fromkeys(shapes.SHAPES, 0)
    for group in claims.groups:
        color = {"color": group.color} if group.color else {}
        include.append({"class": group.shape, "count": group.count} | color)
        asked[group.shape] += group.count
    if claims.relation:                          # GenEval names what the other is seen from first
        include = [include[1], include[0] | {"position": [claims.relation, 0]}]
    exclude = [{"class": name, "count": count + 1} for name, count in asked.items()]
    return dict(tag=task, include=include, exclude=exclude, prompt=caption)


def verdicts(pictures: torch.Tensor, wanted: Sequence[dict]) -> list[dict]:
    """Pictures uint8 (B, 3, S, S), what must be in them → lines of results.jsonl."""
    lines, size = [], pictures.shape[-1]
    for number, (things, want) in enumerate(zip(shapes.detect(pictures), wanted)):
        found = []
        for thing in things:
            side, up, down = (thing.r * reach for reach in shapes.REACH[thing.shape])
            box = (thing.x - side, thing.y - up, thing.x + side, thing.y + down)
            found.append((thing.shape, Found([size * part for part in box], color=thing.color)))
        lines.append(verdict(f"{number:05d}", want, keep(found, "shapes"),
                             lambda group, name: [thing.color for thing in group]))
    return lines


# ---- control: does each target move its own reward? ----------------------------------------------

def control(model: sample.Model, folder: Path, n: int, columns: int) -> str:
    """Sweep each target over [0, 1], the others at 1 and at 0.5: n prompts, one noise each. Draws
    control-1.png and control-0.5.png, a panel a reward → tables: how far each target (row) moves
    each reward (column) from its 0 to its 1, in std of the data; Spearman's rank correlation of the
    levels with its own; cross-talk: the mean size of the others' moves over its own.

    UserError: it has no target, or one of a reward that is not analytic."""
    from scipy.stats import spearmanr                       # here: these tables alone need it
    names = model.rewards
    if not names or set(names) - set(ANALYTIC):
        raise UserError(f"{folder} was trained with {', '.join(names) or 'no reward'}: control "
                        f"sweeps and measures {', '.join(ANALYTIC)}")
    levels, tables = np.linspace(0, 1, columns).round(4), []
    for others in ("1", "0.5"):
        sweeps = np.zeros((len(names), columns, len(names)))                     # (R, levels, R)
        places = [*np.ndindex(len(names), columns)]
        for k, column in tqdm(places, desc=f"others={others}", disable=None):
            targets = [f"all={others}", f"{names[k]}={levels[column]:g}"]
            scores = named(measured(model, folder, n, 1, targets).mean(0))
            sweeps[k, column] = [scores[name] for name in names] / model.bins.std
        rows = [[f"others={others}", *names, "Spearman", "cross-talk"]]
        for own, (name, sweep) in enumerate(zip(names, sweeps)):
            moves, curve = sweep[-1] - sweep[0], sweep[:, own]                   # (R,), (levels,)
            order = spearmanr(levels, curve).statistic if np.ptp(curve) else np.nan
            rest = np.abs(np.delete(moves, own)).sum() / max(len(names) - 1, 1)
            talk = rest / max(abs(moves[own]), 1e-9)
            rows.append([name, *(f"{move:.2f}" for move in moves), f"{order:.3f}", f"{talk:.2f}"])
        tables.append(table(rows))
        moved = {name: (sweep - sweep[0])[None] for name, sweep in zip(names, sweeps)}
        draw(moved, names, levels, "target", folder / f"control-{others}.png")
    return "\n".join(tables)


# ---- compare: which flag helps, and how soon; best of N ------------------------------------------

def compare(folders: Sequence[str], out: Path, args) -> str:
    """Measure runs (once: OUT/measured) → tables: each number the mean over seeds ± its standard
    error. --targets and --guidance are of runs told all rewards.

    Where groups "none" and "all" have the same seeds, these two have a figure and a table of best
    of N and, if all kept checkpoints at the same steps, of their curves. UserError: a run is not
    finished; no such target."""
    sample.read_targets(args.targets, ANALYTIC, 1.0, "--targets")        # before hours are spent
    groups, rows = group_runs(folders), [["told", "seeds", *MEASURES]]
    for label, values in gather(groups, out, args, args.n).items():
        rows.append([label, str(len(values)), *map(mean_error, values.mean((1, 2)).T)])
    tables = [f"told all: asked for {' '.join(args.targets) or 'all=1'}, guidance {args.guidance} "
              f"(None: the checkpoint's)\n{table(rows)}"]
    rivals = {label: groups.get(label, {}) for label in ("none", "all")}
    paired = len(rivals["none"]) > 0 and rivals["none"].keys() == rivals["all"].keys()
    kept = [[int(place.name[5:]) for place in sorted(folder.glob("step-*"))]
            for group in rivals.values() for folder in group.values()]
    if paired and args.curve and kept[0] and all(steps == kept[0] for steps in kept):
        found = gather(rivals, out, args, args.curve, kept=True)
        curves = {label: values.mean(2) for label, values in found.items()}      # (seeds, steps, M)
        draw(curves, MEASURES, kept[0], "steps", out / "convergence.png", 10)
        tables.append(race(curves, kept[0], "speed-up"))
    if paired and args.candidates:
        sizes, curves = [2 ** k for k in range(args.candidates.bit_length())], {}
        for label, values in gather(rivals, out, args, args.best, sizes[-1]).items():
            split = [values.reshape(len(values), -1, size, len(MEASURES)) for size in sizes]
            best = [part.max(2).mean(1) for part in split]                       # (seeds, M) each
            curves[label] = np.stack(best, 1)                                    # (seeds, sizes, M)
        draw(curves, MEASURES, sizes, "best of N", out / "best_of_n.png", 2)
        tables.append(race(curves, sizes, "best of N"))
    write_text(out / "compare.txt", "\n\n".join(tables) + "\n")
    return "\n\n".join(tables)


def group_runs(folders: Sequence[str]) -> dict[str, dict[int, Path]]:
    """{label: {seed: run}}, "none" first: runs of a group differ in the seed alone. A label has the
    rewards that they were told, and each flag that differs between runs; where these do not tell
    two runs apart, it is the folder. UserError: a run is not finished."""
    runs, groups = {}, {"none": {}}
    for folder in map(Path, folders):
        config = read_json(folder / "config.json")
        flags, names = config["args"], config["network"]["rewards"]
        if config.get("step", flags["steps"]) != flags["steps"]:
            raise UserError(f"{folder} has come to step {config['step']} of {flags['steps']}: let "
                            "it finish (its python train.py command again)")
        told = "all" if names == [*ANALYTIC] else "+".join(names) or "none"
        runs[folder] = flags | dict(rewards=told, data=config.get("data"))       # a digest
    names = dict.fromkeys(name for flags in runs.values() for name in flags)
    differ = [name for name in names if name not in ("rewards", "seed")
              and len({str(flags.get(name)) for flags in runs.values()}) > 1]
    for folder, flags in runs.items():
        others = [f"{name.replace('_', '-')}={flags.get(name)}" for name in differ]
        groups.setdefault(" ".join([flags["rewards"], *others]), {})[flags["seed"]] = folder
    if sum(map(len, groups.values())) < len(runs):
        return {str(folder): {flags["seed"]: folder} for folder, flags in runs.items()}
    return {label: dict(sorted(group.items())) for label, group in groups.items() if group}


def gather(groups: dict[str, dict[int, Path]], out: Path, args, n: int, each: int = 1,
           kept: bool = False) -> dict[str, np.ndarray]:
    """{label: MEASURES (seeds, checkpoints, n each, M)} of runs, or of the checkpoints they kept:
    `each` pictures of each of n prompts."""
    found = {label: [] for label in groups}
    for label, group in groups.items():
        for folder in tqdm(group.values(), desc=label, unit="run", leave=False, disable=None):
            places = sorted(folder.glob("step-*")) if kept else [folder]
            models = [sample.load(place) for place in places]
            asked = (args.targets, args.guidance) if models[0].rewards == ANALYTIC else ()
            found[label].append([measured(model, out, n, each, *asked) for model in models])
    return {label: np.array(values) for label, values in found.items()}


def race(curves: dict[str, np.ndarray], x: Sequence[int], title: str) -> str:
    """Curves (seeds, N, M) of "none" and "all" → their ends, and, seed by seed, from which x on
    "all" has at least what "none" has at the last x. times: the last x over that one (0: never),
    with ≥ where a seed's is the first x, which is the least that can be said. For good: after some
    50 steps pictures are full of shapes, and one of them is what was asked."""
    base, told = curves["none"], curves["all"]
    rows = [[title, *(f"{name} at {end}" for name in curves for end in (x[0], x[-1])),
             "times", "reached for good at (seed by seed)"]]
    for k, name in enumerate(MEASURES):
        ends = (base[:, 0, k], base[:, -1, k], told[:, 0, k], told[:, -1, k])    # (seeds,) each
        lost = [np.flatnonzero(curve < goal) for curve, goal in zip(told[..., k], ends[1])]
        reached = [[*x, np.inf][max(places, default=-1) + 1] for places in lost]
        times = mean_error([x[-1] / place for place in reached], 1)
        rows.append([name, *map(mean_error, ends), f"≥ {times}" if x[0] in reached else times,
                     " ".join(f"{place:g}" for place in reached)])
    return table(rows)


# ---- rewards: the mean scores of a checkpoint or of pictures -------------------------------------

def mean_rewards(args) -> str:
    """Pictures of a checkpoint for --prompts → the table of each reward's mean and, over prompts,
    its standard error. The pictures are imported and scored into a folder beside theirs.
    UserError: the checkpoint, or a reward, is not there; a line has more than a prompt."""
    wanted = sample.read_prompts(args.prompts) if args.prompts else benchmark(600)
    if any(want.keys() & {"targets", "negative", "seed"} for want in wanted):
        raise UserError(f"--prompts {args.prompts}: here a line has a prompt alone: pass "
                        "--targets and --seed, for all")
    names = rewards.default_rewards([want["prompt"] for want in wanted])
    if args.rewards != "analytic":
        names = rewards.PAPER if args.rewards == "all" else rewards.names_of(args.rewards)
    for name in names:                                               # before a picture is made
        rewards.scorer_of(name, args.models)
    own = Path(args.source, "pictures") if Path(args.source).exists() else "runs/pictures"
    out = generate(args, wanted, args.out or own)
    place = out.resolve().with_name(f"{out.resolve().name}-data")
    size = Image.open(out / "00000" / "samples" / "0000.png").height
    import_pictures([out], place, size)
    data, by_prompt = Data(place), {}
    failed = rewards.score_dataset(data, names, args.batch, models=args.models)
    refuse_too_many(len(failed), data.rows, str(out), "remove it, to make them again")
    for shard in data.shards:
        for caption, scores in zip(shard.captions, rewards.read_scores(shard, names)):     # (R,)
            if not np.isnan(scores).any():
                by_prompt.setdefault(caption, []).append(scores)
    of_prompts = np.array([np.mean(scores, 0) for scores in by_prompt.values()])     # (prompts, R)
    rows = [[name, mean_error(column, 4)] for name, column in zip(names, of_prompts.T)]
    return (f"{data.rows - len(failed)} pictures of {len(by_prompt)} prompts; analytic rewards see "
            f"{size} pixels\n{table([['reward', 'mean'], *rows])}")


# ---- geneval: pictures in its layout, and their judging ------------------------------------------
# GenEval: Ghosh et al. 2023, arXiv 2310.11513. The layout: NNNNN/metadata.jsonl (what is wanted),
# NNNNN/samples/0000.png, results.jsonl (a verdict a line).

def generate(args, wanted: Sequence[dict], out: str | Path) -> Path:
    """Pictures of prompts, --samples each, in the layout; those that are there are kept.

    Picture i of prompt k of K comes from noise (seed K + k) samples + i: --batch and interruptions
    change no more than rounding. UserError, and nothing is written: `out` has other files."""
    model = sample.load(args.source, None, args.variant, args.text_encoder, args.vae)
    texts, out = [want["prompt"] for want in wanted], writable(out)
    settings = settings_of(model, args.targets, args.guidance, args.steps, prompts=digest(wanted),
                           samples=args.samples, seed=args.seed, vae=args.vae,
                           text_encoder=args.text_encoder, negative_prompt=args.negative_prompt)
    file, lines, jobs = out / "settings.json", [], []
    if any(out.iterdir()) and (not file.exists() or read_json(file) != settings):
        raise UserError(f"{out} has other files, or pictures of other settings: name a new folder")
    model.encoder.states(texts)                         # all, at once: a T5 is not loaded twice
    write_text(file, json.dumps(settings))
    for k, want in enumerate(wanted):
        (out / f"{k:05d}" / "samples").mkdir(parents=True, exist_ok=True)
        write_text(out / f"{k:05d}" / "metadata.jsonl", json.dumps(want))
        for i in range(args.samples):
            name = f"{k:05d}/samples/{i:04d}.png"
            lines.append({"file_name": name, "text": want["prompt"]})
            jobs += [] if (out / name).exists() else [(k, i, out / name)]
    write_lines(out / "metadata.jsonl", lines)                       # with which data.py reads all
    for first in tqdm(range(0, len(jobs), args.batch), desc="generating", disable=None):
        part = jobs[first:first + args.batch]
        seeds = [(args.seed * len(wanted) + k) * args.samples + i for k, i, _ in part]
        pictures = sample.pictures(
            model, [texts[k] for k, _, _ in part], ["all=1", *args.targets], seeds=seeds,
            guidance=args.guidance, steps=args.steps, negative_prompt=args.negative_prompt,
            batch=args.batch)
        for (_, _, path), picture in zip(part, pictures):
            sample.write_png(sample.to_image(picture), path, settings)
    return out


def write_lines(file: Path, lines: Iterable[dict]) -> None:
    """A file with one JSON object a line, whole."""
    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))


def geneval_score(folder: Path, models: str | None) -> str:
    """Judge the pictures of a layout: results.jsonl gets a line for each → the summary.

    UserError: there is none; it, or its metadata, is broken; a network's files are missing."""
    pictures, lines = sorted(folder.glob("[0-9]*/samples/[0-9]*.png")), []
    if not pictures:
        raise UserError(f"{folder} has no NNNNN/samples/0000.png beside NNNNN/metadata.jsonl: make "
                        f"pictures with python evaluate.py geneval generate CKPT {folder}")
    detector, colors = Detector(models, best_device()), Colors(models, best_device())
    for path in tqdm(pictures, desc="judging", unit="picture", disable=None):
        wanted = read_json(path.parents[1] / "metadata.jsonl")
        try:
            image, tag = to_rgb(decode(path.read_bytes())), wanted["tag"]
        except BROKEN as error:
            raise UserError(f"{path}, or metadata.jsonl above it, cannot be read "
                            f"({first_line(error)}): make it again") from error
        lines.append(verdict(str(path.relative_to(folder)), wanted, keep(detector(image), tag),
                             partial(colors, image)))
    write_lines(folder / "results.jsonl", lines)
    partial_run = "" if len(lines) == 553 * 4 else "; PARTIAL: it is 553 prompts, 4 pictures each"
    return summary(lines, f"GenEval by {Detector.SOURCE}{partial_run}")[0]


# ---- GenEval's rules, for detections of any kind -------------------------------------------------

@dataclass
class Found:
    """An object that a detector found. box: left, top, right, bottom, in pixels."""
    box: Sequence[float]
    score: float = 1.0
    color: str | None = None               # where the detector tells it
    mask: np.ndarray | None = None         # (H, W) bool


def verdict(file: str, wanted: dict, objects: dict, colors_of: Callable) -> dict:
    """A line of results.jsonl, with GenEval's keys."""
    correct, reason = judge(wanted, objects, colors_of)
    boxes = {name: [[*map(float, thing.box), thing.score] for thing in group]
             for name, group in objects.items()}
    return dict(filename=file, tag=wanted["tag"], prompt=wanted["prompt"], correct=correct,
                reason=reason, metadata=json.dumps(wanted), details=json.dumps(boxes))


def judge(wanted: dict, objects: dict, colors_of: Callable) -> tuple[bool, str]:
    """The verdict on a picture: (correct, what is wrong, a line each).

    wanted: "include": all must be there, the first `count` of a class with its colour and position
    (a side of the group of that number); "exclude": none may reach its count. objects: of `keep`.
    colors_of(objects, class): their colours."""
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
        reasons += [wrong] if wrong else []
    for no in wanted.get("exclude", ()):
        count = len(objects.get(no["class"], ()))
        if count >= no["count"]:
            reasons.append(f"expected {no['class']}<{no['count']}, found {count}")
    return not reasons, "\n".join(reasons)


def keep(found: Iterable[tuple[str, Found]], tag: str) -> dict[str, list[Found]]:
    """{class: its objects, the surest first}: scores above 0.3 (counting: 0.9), 16 of a class."""
    least, objects = 0.9 if tag == "counting" else 0.3, {}
    for name, thing in sorted(found, key=lambda pair: -pair[1].score):
        if thing.score > least and len(objects.get(name, ())) < 16:
            objects.setdefault(name, []).append(thing)
    return objects


def relations(a: Found, b: Found) -> set[str]:
    """Where a lies, seen from b: the offset of their centres, less a tenth of the summed sizes,
    over its length before that; a side holds above 0.5."""
    corners_a, corners_b = np.reshape(a.box, (2, 2)), np.reshape(b.box, (2, 2))
    offset = corners_a.mean(0) - corners_b.mean(0)                               # (2,): x, y
    sizes = (corners_a[1] - corners_a[0]) + (corners_b[1] - corners_b[0])
    clear = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sizes, 0)
    if (np.abs(clear) < 1e-3).all():
        return set()
    x, y = clear / np.linalg.norm(offset)
    sides = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, part in sides.items() if part > 0.5}


def summary(lines: Sequence[dict], title: str) -> tuple[str, dict[str, float]]:
    """What GenEval's own script prints (as there, prompts of the same metadata count once), and the
    share of correct pictures by task, in GenEval's order, and "overall", the mean of the tasks."""
    prompts, shares = {line["metadata"] for line in lines}, {}
    solved = {line["metadata"] for line in lines if line["correct"]}
    share = np.mean([line["correct"] for line in lines])
    rows = [f"{title}\n{len(lines)} images of {len(prompts)} prompts; correct: {share:.2%} of "
            f"the images, {len(solved) / len(prompts):.2%} of the prompts"]
    for task in TASKS:
        correct = [line["correct"] for line in lines if line["tag"] == task]
        if correct:
            shares[task] = float(np.mean(correct))
            rows.append(f"{task:14} = {shares[task]:7.2%} ({sum(correct)} / {len(correct)})")
    shares["overall"] = float(np.mean(list(shares.values())))
    rows.append(f"overall score (mean of the tasks): {shares['overall']:.5f}")
    return "\n".join(rows), shares


# ---- GenEval's judges ----------------------------------------------------------------------------

PAINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
OBJECTS = tuple((                    # COCO's classes in its order, with GenEval's names for three
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,"
    "banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush").split(","))


class Detector:
    """Mask2Former with a Swin-S on COCO's instances (Cheng et al. 2022, arXiv 2112.01527).

    GenEval runs mmdet's training of it; this is its authors', in transformers: the same network,
    other weights. UserError: its files are missing, or a tensor is misshapen."""
    SOURCE = "facebook/mask2former-swin-small-coco-instance"
    SIZE = {"shortest_edge": 800, "longest_edge": 1333}                      # GenEval's

    def __init__(self, models: str | None, device: torch.device):
        from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
        folder = rewards.fetch(self.SOURCE, ("config.json", "*.safetensors"), models,
                               "geneval score needs")
        self.net = rewards.pretrained(folder, Mask2FormerForUniversalSegmentation, True).to(device)
        self.processor, self.device = Mask2FormerImageProcessor(size=self.SIZE), device

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
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                found.append((OBJECTS[k], Found(box, value, mask=mask)))
        return found


class Colors:
    """open_clip's ViT-L-14 of OpenAI as a judge of colour, zero-shot over PAINTS. Of an object it
    sees the box; what the mask leaves out is grey."""
    SOURCE = "timm/vit_large_patch14_clip_224.openai"       # open_clip's ("ViT-L-14", "openai")

    def __init__(self, models: str | None, device: torch.device):
        import open_clip
        folder = rewards.fetch(self.SOURCE, ("open_clip_config.json", "*.safetensors"), models,
                               "geneval score needs")
        self.device, name = device, f"local-dir:{folder}"
        self.net, _, self.transform = open_clip.create_model_and_transforms(
            name, force_quick_gelu=True, require_pretrained=True, device=device)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.net.eval()

    @torch.no_grad()
    def __call__(self, image: Image.Image, group: list[Found], name: str) -> list[str]:
        """The colours of some objects of one class in a picture."""
        grey = Image.new("RGB", image.size, "#999")
        cut = [Image.composite(image, grey, Image.fromarray(thing.mask)).crop(thing.box)
               for thing in group]
        pixels = torch.stack([self.transform(part) for part in cut]).to(self.device)
        seen = F.normalize(self.net.encode_image(pixels), dim=-1)                # (n, D)
        return [PAINTS[k] for k in (seen @ self.classifier(name).T).argmax(1).tolist()]

    @cache
    def classifier(self, name: str) -> torch.Tensor:
        """A class of objects → (10, D): of each colour the mean of its three prompts."""
        texts = [text for c in PAINTS for text in (
            f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}",
            f"a photo of a {c} object")]
        read = self.net.encode_text(self.tokenizer(texts).to(self.device))       # (30, D)
        mean = F.normalize(read, dim=-1).view(len(PAINTS), 3, -1).mean(1)        # (10, D)
        return F.normalize(mean, dim=-1)


# ---- flops: what a picture costs -----------------------------------------------------------------

def forward_cost(config: Config, tokens: int) -> tuple[TextRIN, int, int]:
    """(the network without numbers, floating-point operations of one forward pass of one picture
    and branch with that many text tokens, those of them that are not attention's products).

    An operation is a multiplication or an addition; the paper counts the pair as one."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = build(config)
        net(torch.empty(1, config.channels, config.size, config.size), torch.ones(1),
            torch.ones(1, len(config.rewards)), torch.empty(1, tokens, config.text_dim),
            torch.ones(1, tokens, dtype=torch.bool))
    counts = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    everything = sum(counts.values())
    products = sum(n for name, n in counts.items() if "bmm" in name or "attention" in name)
    return net, everything, everything - products


def cost_report(name: str, tokens: int) -> str:
    """What a picture of a checkpoint, or of a preset with all its rewards, costs as the paper
    counts: text and rewards are read at every step (sample.py reads them once)."""
    if name in PRESETS and not Path(name).exists():
        names = rewards.PAPER if name == "paper" else ANALYTIC
        config, sampler = Config(**PRESETS[name] | dict(rewards=names)), sample.SAMPLERS[name]
    else:
        model = sample.load(name, "cpu")
        config, sampler = model.net.config, model.config["sampler"]
    net, everything, linear = forward_cost(config, tokens)
    parameters = sum(p.numel() for part, p in net.named_parameters()
                     if not part.startswith("log_variance"))             # which belongs to the loss
    rows, steps = [["G (10^9) operations", "FLOP", "MAC", "MAC, linear layers"]], sampler["steps"]
    for label, times in (("one forward pass", 1), (f"a picture, {steps} steps, one branch", steps),
                         ("the same, guided", 2 * steps)):
        counts = (everything, everything / 2, linear / 2)
        rows.append([label, *(f"{times * count / 1e9:,.2f}" for count in counts)])
    return (f"{name}: {parameters:,} parameters, {len(config.rewards)} rewards, {tokens} text "
            f"tokens\n{table(rows)}")


# ---- the command line ----------------------------------------------------------------------------

def number(flag: str, low: float, default: float | None, words: str, kind: type = int) -> dict:
    """A flag's arguments for argparse. UserError, when it is read: it is out of its range."""
    def value(text: str) -> float:
        read = kind(text)
        if not low <= read < 2 ** 31:                                            # not: NaN, too
            raise UserError(f"{flag} {text}: it must be at least {low}, and below 2^31")
        return read
    return dict(type=value, default=default, help=words)


FLAGS = {
    "checkpoints": dict(nargs="+", help="folders that train.py wrote (flops: or presets)"),
    "source": dict(help="checkpoint: folder or hub id (score: DIR)"),
    "out": dict(help="DIR to write to"),
    "--out": dict(help="folder of the results; default: the checkpoint's, or in runs"),
    "--n": number("--n", len(TASKS), 600, "prompts"),
    "--levels": number("--levels", 2, 9, "of each target, from 0 to 1"),
    "--curve": number("--curve", 0, 120, "prompts of each point of the curves; 0: none"),
    "--best": number("--best", 1, 24, "prompts of best of N"),
    "--candidates": dict(type=int, default=128, choices=[0, *(2 ** k for k in range(13))],
                         help="the largest N; 0: none"),
    "--targets": dict(nargs="+", default=[], metavar="REWARD=LEVEL", help="default all=1"),
    "--guidance": number("--guidance", 0, None, "w, 0 = off; default: the checkpoint's", float),
    "--steps": number("--steps", 1, None, "default: the checkpoint's"),
    "--seed": number("--seed", 0, 0, "of the noise (shapes: and of the prompts)"),
    "--negative-prompt": dict(help="caption of the negative branch; default: the same caption"),
    "--samples": number("--samples", 1, 1, "pictures a prompt"),
    "--batch": number("--batch", 1, 32, "pictures at once; changes no more than rounding"),
    "--variant": dict(help="subfolder of the checkpoint, such as miro-only-clip"),
    "--text-encoder": dict(help="folder or hub id of a T5; default: the checkpoint's"),
    "--vae": dict(help="folder or hub id of an AutoencoderKL; default: the checkpoint's"),
    "--rewards": dict(default="analytic", help="analytic, all (the paper's seven), or a,b,c"),
    "--prompts": dict(help="file: a prompt a line; default: the embedded world's"),
    "--models": dict(help="folder with OWNER/NAME/files of the hub; default: from the hub"),
    "--tokens": number("--tokens", 1, 77, "of text"),
}
GENERATION = ("--targets --guidance --steps --seed --negative-prompt --samples --batch --variant "
              "--text-encoder --vae")
COMMANDS = {                                                        # flags, defaults of its own
    "shapes": ("checkpoints --n --targets --guidance --steps --seed --out", {}),
    "control": ("checkpoints --n --levels --out", dict(n=48)),
    "compare": ("checkpoints --n --targets --guidance --curve --best --candidates --out", {}),
    "rewards": (f"source --rewards --prompts --out --models {GENERATION}", {}),
    "generate": (f"source out {GENERATION}", dict(samples=4)),
    "score": ("source --models", {}),
    "flops": ("checkpoints --tokens", {}),
}


def read_command(argv=None) -> argparse.Namespace:
    """The command and its flags. UserError: one is out of its range."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    parts = commands.add_parser("geneval").add_subparsers(dest="command", required=True)
    for name, (flags, defaults) in COMMANDS.items():
        command = (parts if name in ("generate", "score") else commands).add_parser(name)
        for flag in flags.split():
            command.add_argument(flag, **FLAGS[flag])
        command.set_defaults(**defaults)
    return parser.parse_args(argv)


def writable(folder: str | Path) -> Path:
    """A folder, made if it is not there. UserError: nothing can be written into it."""
    with suppress(OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
    if not Path(folder).is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to: name another folder (--out)")
    return Path(folder)


def main(argv=None) -> None:
    """One question at a time, checkpoint by checkpoint."""
    args = read_command(argv)
    if args.command in ("shapes", "control"):
        if args.out and len(args.checkpoints) > 1:
            raise UserError("--out takes the results of one checkpoint: name one")
        for folder in args.checkpoints:
            print(folder)
            model, out = sample.load(folder), writable(args.out or folder)
            if args.command == "shapes":
                evaluate_folder(model, out, args.n, args.seed, args.targets, args.guidance,
                                args.steps)
            else:
                print(control(model, out, args.n, args.levels))
    elif args.command == "compare":
        print(compare(args.checkpoints, writable(args.out or "runs"), args))
    elif args.command == "rewards":
        print(mean_rewards(args))
    elif args.command == "generate":
        file = Path(__file__).parent / "assets" / "geneval.jsonl"
        generate(args, [json.loads(line) for line in open(file, encoding="utf-8")], args.out)
        print(f"{args.out} has {args.samples} pictures of each prompt; judge them with\n"
              f"python evaluate.py geneval score {args.out}")
    elif args.command == "score":
        print(geneval_score(Path(args.source), args.models))
    else:
        print("\n\n".join(cost_report(name, args.tokens) for name in args.checkpoints))


if __name__ == "__main__":
    run(main)
