"""Evaluate: the paper's questions, a command each, in the order of this file.

    python evaluate.py shapes runs/shapes       # is the caption true in the picture? six tasks
    python evaluate.py control runs/shapes      # does each target move its own reward?
    python evaluate.py compare runs/compare/*   # which flag helps, how soon; best of N
    python evaluate.py geneval DIR              # the real GenEval, of pictures of sample.py
    python evaluate.py flops runs/shapes paper  # what a picture costs; folders or presets

The first three measure the embedded world with exact oracles, on captions that training never saw
(shapes.held_out; their claims it did see, with other endings). `shapes` judges as GenEval does, and
is not GenEval: its things are shapes. `control` and `compare` go on where they were stopped.
"""
import argparse
import json
from collections.abc import Callable, Iterable, Sequence
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
from data import (BROKEN, Parser, UserError, best_device, between, decode, first_line, make_folder,
                  read_json, run, to_rgb, write_json, write_text, write_whole)
from model import PRESETS, Config, TextRIN, build
from shapes import ANALYTIC, TASKS

MEASURES = ("accuracy", *ANALYTIC)       # what is measured of a picture of the embedded world: M


# ---- what the commands share ---------------------------------------------------------------------

def measure(model: sample.Model, wanted: Sequence[dict], seeds: Sequence[int],
            targets: Sequence[str] = ()) -> tuple[np.ndarray, list]:
    """Pictures of prompts, noise by seed → MEASURES (B, M), rewards in their own units, and B
    verdicts. What `targets` does not name is asked for at 1; the sampler is the model's."""
    texts = [want["prompt"] for want in wanted]
    total = -(-len(texts) // 64) * model.config["sampler"]["steps"]
    with tqdm(total=total, desc=" ".join(targets) or "all=1", leave=False, disable=None) as bar:
        pictures = sample.pictures(model, texts, ["all=1", *targets], seeds=seeds,
                                   progress=bar.update)                          # (B, 3, S, S)
    lines = verdicts(pictures, wanted)
    scores = shapes.score_all(ANALYTIC, pictures, texts).double()                # (B, R)
    return np.column_stack([[line["correct"] for line in lines], scores]), lines


def measured(model: sample.Model, memory: Path, n: int, each: int = 1,
             targets: Sequence[str] = ()) -> np.ndarray:
    """MEASURES (n each, M) of `each` pictures of each of n prompts, noise from seed 0 on: measured
    once, and kept in MEMORY/measured under all that they depend on."""
    wanted = [want for want in benchmark(n) for _ in range(each)]
    levels = sample.read_targets(["all=1", *targets], model.rewards, 1.0, "--targets")
    scorers = [shapes.version(name) for name in ANALYTIC]
    name = sample.fingerprint(model, levels, wanted, scorers)
    file = make_folder(memory / "measured") / f"{name}.json"
    if not file.exists():
        values, _ = measure(model, wanted, range(len(wanted)), targets)
        write_json(file, {"values": values.tolist()})
    return np.array(read_json(file)["values"])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, each column as wide as it has to be."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
                     for row in rows)


def pooled(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values (seeds, ...) → their mean over seeds and its standard error, 0 where there is one."""
    ddof = int(len(values) > 1)
    return values.mean(0), values.std(0, ddof=ddof) / len(values) ** 0.5


def mean_error(values: Sequence[float], digits: int = 3) -> str:
    """"mean ± standard error" of a few seeds; of one, the mean."""
    mean, error = pooled(np.array(values, float))
    return f"{mean:.{digits}f}" + f" ± {error:.{digits}f}" * (len(values) > 1)


def draw_dots(groups: dict[str, np.ndarray], titles: Sequence[str], path: Path) -> None:
    """Values (seeds, panels) of groups, a dot each: the mean of the seeds, with its error."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(2.2 * len(titles), 1 + 0.3 * len(groups)), layout="constrained")
    for k, axis in enumerate(figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]):
        for label, values in groups.items():
            mean, error = pooled(values[:, k])
            axis.errorbar(mean, label, xerr=error, fmt="o", color="C0")
        axis.set_title(titles[k])
        axis.grid(alpha=0.3)
    axis.invert_yaxis()                                       # of all panels: the first one on top
    write_whole(path, partial(figure.savefig, format="png"))


def draw(groups: dict[str, np.ndarray], titles: Sequence[str], x: Sequence[float], xlabel: str,
         path: Path, base: int | None = None, goal: bool = False) -> None:
    """Curves (seeds, len(x), panels) of groups, three panels a row: the mean of the seeds and its
    standard error. base: of a logarithmic x. goal: dotted, where the first group ends."""
    from matplotlib.figure import Figure
    rows, columns = -(-len(titles) // 3), min(3, len(titles))
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows + 0.4), layout="constrained")
    for k, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if k >= len(titles):
            axis.remove()
            continue
        for label, curves in groups.items():
            seeds = f", {len(curves)} seeds" * (len(curves) > 1)
            axis.errorbar(x, *pooled(curves[..., k]), label=label + seeds)
        if goal:
            axis.axhline(next(iter(groups.values()))[:, -1, k].mean(), color="grey", linestyle=":")
        if base:
            axis.set_xscale("log", base=base)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title=titles[k], xlabel=xlabel)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center",
                  ncols=len(groups))
    write_whole(path, partial(figure.savefig, format="png"))


# ---- shapes: is the caption true in the picture? -------------------------------------------------

def evaluate_folder(model: sample.Model, folder: Path, n: int = 600, seed: int = 0,
                    targets: Sequence[str] = ()) -> dict:
    """Judge pictures of n unseen prompts, image i from noise seed * n + i; print tables; write
    evaluation.json and results.jsonl (the verdicts) into the folder.

    They are asked for at the checkpoint's own targets. Without others beside these, the first 120
    are also made at all=1, at all=0 and with each single target at 0, the rest at 1: gain/std says
    by how many std of the data a reward's own target moves it. Returns {request: the mean of each
    of MEASURES, "error": of a mean, "first": {request: that of the first 120}, "tasks": the mean
    alignment by task, "accuracy": the share of correct pictures by task}."""
    wanted, seeds = benchmark(n, seed), range(seed * n, (seed + 1) * n)
    own = [*model.config["targets"], *targets]
    request = " ".join(own) or "all=1"
    values, lines = measure(model, wanted, seeds, own)                           # (n, M)
    columns = {request: values.mean(0), "error": values.std(0, ddof=1) / n ** 0.5}   # (M,) each
    means, first = dict(columns), {}
    if model.bins and not targets:                       # the release's has none
        for asked in ("all=1", "all=0", *(f"{name}=0" for name in model.rewards)):
            first[asked] = measure(model, wanted[:120], seeds[:120], [asked])[0].mean(0)     # (M,)
        unknown, std = np.full(len(MEASURES), np.nan), dict(zip(model.bins.names, model.bins.std))
        alone = np.array([first.get(f"{name}=0", unknown)[k] for k, name in enumerate(MEASURES)])
        gain = (first["all=1"] - alone) / [std.get(name, np.nan) for name in MEASURES]
        columns |= {f"{min(n, 120)}: all=1": first["all=1"], "all=0": first["all=0"],
                    "alone=0": alone, "gain/std": gain}
    rows = [["", *columns]]
    for k, name in enumerate(MEASURES):
        rows.append([name, *(f"{column[k]:.3f}" for column in columns.values())])
    by_task = values[:, MEASURES.index("alignment")]                             # (n,)
    tasks = {task: float(by_task[k::len(TASKS)].mean()) for k, task in enumerate(TASKS)}
    text, accuracy = summary(lines, "GenEval's tasks and rules on shapes (this is not GenEval)")
    found, first = ({what: dict(zip(MEASURES, mean.tolist())) for what, mean in some.items()}
                    for some in (means, first))
    found |= dict(first=first, tasks=tasks, accuracy=accuracy, settings=dict(
        made_of=sample.fingerprint(model), n=n, seed=seed, **model.config["sampler"]))
    print(table(rows), "alignment by task: "
          + ", ".join(f"{task} {value:.2f}" for task, value in tasks.items()), text, sep="\n")
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
        lines.append(verdict(f"{number:05d}", want, found,
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
    measures = [MEASURES.index(name) for name in names]
    for others in ("1", "0.5"):
        sweeps = np.zeros((len(names), columns, len(names)))                     # (R, levels, R)
        places = [*np.ndindex(len(names), columns)]
        for k, column in tqdm(places, desc=f"others={others}", disable=None):
            targets = [f"all={others}", f"{names[k]}={levels[column]:g}"]
            means = measured(model, folder, n, 1, targets).mean(0)               # (M,)
            sweeps[k, column] = means[measures] / model.bins.std
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
    error; the first is drawn, too. --targets and --guidance are of runs told several rewards.

    Where groups "none" and "all" have the same seeds, these two have a figure and a table of best
    of N and, if all kept checkpoints at the same steps, of their curves. UserError: a run is not
    finished; no such target."""
    sample.read_targets(args.targets, ANALYTIC, 1.0, "--targets")        # before hours are spent
    groups, rows = group_runs(folders), [["told", "seeds", *MEASURES]]
    final = {label: values.mean((1, 2)) for label, values in              # (seeds, M) each
             gather(groups, out, args, args.n).items()}
    for label, values in final.items():
        rows.append([label, str(len(values)), *map(mean_error, values.T)])
    draw_dots(final, MEASURES, out / "compare.png")
    tables = [f"told several: asked for {' '.join(args.targets) or 'all=1'}, guidance "
              f"{'its own' if args.guidance is None else args.guidance}\n{table(rows)}"]
    rivals = {label: groups[label] for label in ("none", "all") if label in groups}
    paired = len(rivals) == 2 and rivals["none"].keys() == rivals["all"].keys()
    kept = {tuple(int(place.name[5:]) for place in sorted(folder.glob("step-*")))
            for group in rivals.values() for folder in group.values()}
    if paired and args.curve and len(kept) == 1 and () not in kept:
        [steps], found = kept, gather(rivals, out, args, args.curve, kept=True)
        curves = {label: values.mean(2) for label, values in found.items()}      # (seeds, steps, M)
        tables.append(race(curves, steps, "speed-up"))
        draw(curves, MEASURES, steps, "steps", out / "convergence.png", goal=True)
    if paired and args.candidates:
        sizes, curves = [2 ** k for k in range(args.candidates.bit_length())], {}
        for label, values in gather(rivals, out, args, args.best, sizes[-1]).items():
            split = [values.reshape(len(values), -1, size, len(MEASURES)) for size in sizes]
            best = [part.max(2).mean(1) for part in split]                       # (seeds, M) each
            curves[label] = np.stack(best, 1)                                    # (seeds, sizes, M)
        tables.append(race(curves, sizes, "best of N"))
        draw(curves, MEASURES, sizes, "best of N", out / "best_of_n.png", 2, goal=True)
    write_text(out / "compare.txt", "\n\n".join(tables) + "\n")
    return "\n\n".join(tables)


def group_runs(folders: Sequence[str]) -> dict[str, dict[int, Path]]:
    """{label: {seed: run}}, "none" first: runs of a group differ in the seed alone. A label has the
    rewards that they were told (or the one they were not), and each flag that differs between runs;
    where these do not tell two runs apart, it is the folder. UserError: a run is not finished."""
    runs, groups = {}, {"none": {}}
    for folder in map(Path, folders):
        config = read_json(folder / "config.json")
        flags, names = config["args"], config["network"]["rewards"]
        if config.get("step", flags["steps"]) != flags["steps"]:
            raise UserError(f"{folder} has come to step {config['step']} of {flags['steps']}: let "
                            "it finish (its python train.py command again)")
        without = [name for name in ANALYTIC if name not in names]
        told = "+".join(names) + " alone" * (len(names) == 1) or "none"
        if len(names) + len(without) == len(ANALYTIC) and len(without) < 2:
            told = " but ".join(["all", *without])
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
            values = []
            for place in sorted(folder.glob("step-*")) if kept else [folder]:
                model, targets = sample.load(place), ()
                if len(model.rewards) > 1:
                    sample.set_sampler(model, args)
                    targets = [said for said in args.targets
                               if said.partition("=")[0] in ("all", *model.rewards)]
                values.append(measured(model, out, n, each, targets))            # (n each, M)
            found[label].append(values)
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


# ---- geneval: pictures in its layout, judged -----------------------------------------------------
# GenEval: Ghosh et al. 2023, arXiv 2310.11513. The layout is that of sample.write_folder.

def geneval(folder: Path, models: str | None) -> str:
    """Judge the pictures of a layout: results.jsonl gets a line for each → the summary.

    UserError: there is none; it, or its metadata, is broken; a network's files are missing."""
    pictures, lines = sorted(folder.glob("[0-9]*/samples/[0-9]*.png")), []
    if not pictures:
        raise UserError(f"{folder} has no NNNNN/samples/0000.png: make pictures with python "
                        f"sample.py --prompts assets/geneval.jsonl --n 4 --out {folder}")
    detector, colors = Detector(models, best_device()), Colors(models, best_device())
    for path in tqdm(pictures, desc="judging", unit="picture", disable=None):
        file = path.parents[1] / "metadata.jsonl"
        wanted = read_json(file, sealed=False)
        if not {"tag", "prompt"} <= wanted.keys():
            raise UserError(f"{file} has no tag: GenEval is of prompts of assets/geneval.jsonl")
        try:
            image = to_rgb(decode(path.read_bytes()))
        except BROKEN as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}): make it anew") from error
        lines.append(verdict(str(path.relative_to(folder)), wanted, detector(image),
                             partial(colors, image)))
    write_lines(folder / "results.jsonl", lines)
    partial_run = "" if len(lines) == 553 * 4 else "; PARTIAL: it is 553 prompts, 4 pictures each"
    return summary(lines, f"GenEval by {Detector.SOURCE}{partial_run}")[0]


def write_lines(file: Path, lines: Iterable[dict]) -> None:
    """A file with one JSON object a line, whole."""
    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))


# ---- GenEval's rules, for detections of any kind -------------------------------------------------

@dataclass
class Found:
    """An object that a detector found. box: left, top, right, bottom, in pixels."""
    box: Sequence[float]
    score: float = 1.0
    color: str | None = None               # where the detector tells it
    mask: np.ndarray | None = None         # (H, W) bool


def verdict(file: str, wanted: dict, found: Iterable[tuple], colors_of: Callable) -> dict:
    """A line of results.jsonl, with GenEval's keys, of the (class, object) found in a picture."""
    objects = keep(found, wanted["tag"])
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
                               "geneval needs")
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
                               "geneval needs")
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
        return [PAINTS[k] for k in (seen @ self.classifier(name)).argmax(1).tolist()]

    @cache
    def classifier(self, name: str) -> torch.Tensor:
        """A class of objects → (D, 10): of each colour the mean of its three prompts."""
        from open_clip import build_zero_shot_classifier
        texts = (f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}",
                 "a photo of a {} object")
        return build_zero_shot_classifier(self.net, self.tokenizer, PAINTS, texts,
                                          device=self.device)


# ---- flops: what a picture costs -----------------------------------------------------------------

def forward_cost(config: Config, tokens: int) -> tuple[TextRIN, int, int]:
    """(the network without numbers, floating-point operations of one forward pass of one picture
    and branch with that many text tokens, as each step but the first is, those of them that are not
    attention's products).

    An operation is a multiplication or an addition; the paper counts the pair as one."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = build(config)
        net(torch.empty(1, config.channels, config.size, config.size), torch.ones(1),
            torch.ones(1, len(config.rewards)), torch.empty(1, tokens, config.text_dim),
            torch.ones(1, tokens, dtype=torch.bool),
            torch.empty(1, config.latents, config.latent_dim))
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

def read_command(argv=None) -> argparse.Namespace:
    """The command and its flags. UserError: one is out of its range."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_shapes, of_control, of_compare, of_geneval, of_flops = (
        commands.add_parser(name).add_argument
        for name in ("shapes", "control", "compare", "geneval", "flops"))
    for add, n in ((of_shapes, 600), (of_control, 48), (of_compare, 600)):
        add("checkpoints", nargs="+", help="folders that train.py wrote")
        add("--n", type=between(int, len(TASKS)), default=n, help="prompts")
        add("--out", help="folder of the results; default: the checkpoint's, or in runs")
    for add in (of_shapes, of_compare):
        add("--targets", nargs="+", default=[], metavar="REWARD=LEVEL", help="over the "
            "checkpoint's own; of compare: over all=1")
        add("--guidance", type=between(float), help="w, 0 = off; default: the checkpoint's")
    of_shapes("--steps", type=between(int, 1), help="default: the checkpoint's")
    of_shapes("--seed", type=between(int), default=0, help="of the prompts and of the noise")
    of_control("--levels", type=between(int, 2), default=9, help="of each target, from 0 to 1")
    of_compare("--curve", type=between(int), default=120, help="prompts of a point; 0: no curves")
    of_compare("--best", type=between(int, 1), default=24, help="prompts of best of N")
    of_compare("--candidates", type=int, default=128, help="the largest N; 0: none",
               choices=[0, *(2 ** k for k in range(13))])
    of_geneval("folder", help="DIR of python sample.py --prompts assets/geneval.jsonl --out DIR")
    of_geneval("--models", help="folder with OWNER/NAME/files of the hub; default: from the hub")
    of_flops("checkpoints", nargs="+", help="folders, or presets")
    of_flops("--tokens", type=between(int, 1), default=77, help="of text")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """One question at a time, checkpoint by checkpoint."""
    args = read_command(argv)
    if args.command == "compare":
        print(compare(args.checkpoints, make_folder(args.out or "runs"), args))
    elif args.command == "geneval":
        print(geneval(Path(args.folder), args.models))
    elif args.command == "flops":
        print("\n\n".join(cost_report(name, args.tokens) for name in args.checkpoints))
    elif args.out and len(args.checkpoints) > 1:
        raise UserError("--out takes the results of one checkpoint: name one")
    else:
        for folder in args.checkpoints:
            print(folder)
            model, out = sample.load(folder), make_folder(args.out or folder)
            if args.command == "control":
                print(control(model, out, args.n, args.levels))
            else:
                sample.set_sampler(model, args)
                evaluate_folder(model, out, args.n, args.seed, args.targets)


if __name__ == "__main__":
    run(main)
