"""Draw the figures of tutorial.md, a function each, in the order of the method.

    python docs/figures.py                      # ten figures, from the world and assets/shapes
    python docs/figures.py --only path control  # some of them
    python docs/figures.py --only --run runs/long --hacked runs/hacked    # the two that need runs
"""
import sys
import textwrap
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import binning
import evaluate
import flow
import sample
import shapes
from data import Parser, pad, run, stream

OUT = ROOT / "docs" / "figures"
NAMES = shapes.ANALYTIC
HUES = dict(zip(NAMES, ("#4269d0", "#e8554d", "#444444", "#2f9e44", "#9657d5")))
PROMPTS = ["a red circle and a blue square", "two green triangles", "a circle left of a triangle",
           "a yellow square", "four pink circles", "a cyan triangle above a red circle"]
rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                 "figure.facecolor": "white", "axes.titlesize": 9,
                 "image.interpolation": "nearest"})


def paint(axis, picture, title: str = "", below: str = "") -> None:
    """A picture (3, S, S), uint8 or 0 to 1, without axes."""
    axis.imshow(picture.movedim(0, -1).numpy())
    axis.set(title=title, xlabel=below, xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def mean_std(model: sample.Model) -> list[torch.Tensor]:
    """Of what the network sees, a channel, in units of 0 to 255: (3, 1, 1) each."""
    return [torch.tensor(model.config[key]).view(-1, 1, 1) for key in ("mean", "std")]


def to_rgb(model: sample.Model, x: torch.Tensor) -> torch.Tensor:
    """What the network sees (..., 3, S, S) → 0 to 1."""
    mean, std = mean_std(model)
    return ((x * std + mean) / 255).clamp(0, 1)


def world(first: int, n: int, clean: bool = False) -> tuple[torch.Tensor, list[str]]:
    """Pictures of the world, uint8 (n, 3, S, S), and their captions."""
    drawn = [shapes.sample(0, i, shapes.SIZE, clean)[:2] for i in range(first, first + n)]
    return (torch.from_numpy(np.stack([picture for picture, _ in drawn])).movedim(-1, 1),
            [caption for _, caption in drawn])


class Batch(NamedTuple):
    """Arguments of flow.loss and of the network."""
    x_0: torch.Tensor
    eps: torch.Tensor
    s: torch.Tensor
    text: torch.Tensor
    text_mask: torch.Tensor


def batch(model: sample.Model, first: int, n: int, clean: bool = False) -> Batch:
    """n pictures that training never saw, as the network wants them."""
    (pictures, captions), (mean, std) = world(first, n, clean), mean_std(model)
    text, mask = pad(model.encoder.states(captions))
    s = model.bins.to_target(shapes.score_all(NAMES, pictures, captions).numpy())
    eps = stream(0, "draws", first).standard_normal((n, *pictures.shape[1:]), np.float32)
    return Batch((pictures - mean) / std, torch.from_numpy(eps), torch.from_numpy(s), text, mask)


RINGS = 20005                    # a clean picture of the world that figures show: two red circles


def data(model: sample.Model) -> Figure:
    """Eight pairs with their scores and levels: shapes.sample, shapes.score_all, Bins.to_target."""
    pictures, captions = world(12, 8)
    scores = shapes.score_all(NAMES, pictures, captions).numpy()                 # (8, R)
    levels = model.bins.to_target(scores)                                        # (8, R)
    figure = Figure(figsize=(12, 4), layout="constrained")
    rows = figure.subplots(2, 8, height_ratios=(3, 2))
    for i, (top, low) in enumerate(rows.T):
        paint(top, pictures[i], textwrap.fill(captions[i], 20))
        low.barh(range(5), levels[i] + 0.02, color=HUES.values(), height=0.7, alpha=0.5)
        for k, score in enumerate(scores[i]):
            low.text(0.03, k, f"{score:.3g}", va="center", fontsize=8)
        low.set(xlim=(0, 1), xticks=(0, 0.5, 1), yticks=range(5),
                yticklabels=NAMES if i == 0 else [])
        low.invert_yaxis()
    rows[1, 0].set_xlabel("bar: level    number: score", loc="left")
    return figure


def bins(model: sample.Model) -> Figure:
    """Scores → quantile edges → levels, of two humps and of ties: binning.fit, Bins.to_target."""
    pictures, captions = world(0, 2000)
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for row, name in zip(figure.subplots(2, 3), ("colorfulness", "alignment")):
        raw = shapes.score_all((name,), pictures, captions).numpy()              # (N, 1)
        learnt = binning.fit(raw, (name,), 5)
        levels, x = learnt.to_target(raw)[:, 0], np.linspace(raw.min(), raw.max(), 400)
        row[0].hist(raw[:, 0], 60, color=HUES[name])
        row[1].plot(x, learnt.to_target(x[:, None])[:, 0], color=HUES[name])
        row[2].bar(*np.unique(levels, return_counts=True), width=0.15, color=HUES[name])
        for axis in row[:2]:
            for edge in learnt.edges[0]:
                axis.axvline(edge, color="black", lw=0.8, ls=":")
        row[0].set(xlabel=f"score: {name}", ylabel="pairs", title="dotted: the edges of five bins")
        row[1].set(xlabel=f"score: {name}", ylabel="level", title="a score's level")
        row[2].set(xlabel="level", ylabel="pairs", title="as many in each, but for ties",
                   xticks=(0, 0.25, 0.5, 0.75, 1))
    return figure


@torch.no_grad()
def path(model: sample.Model) -> Figure:
    """x_t between data and noise, and what the network makes of it: flow.path."""
    x_0, eps, *told = batch(model, RINGS, 1, clean=True)
    times = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
    figure = Figure(figsize=(10.5, 5.2), layout="constrained")
    figure.suptitle(f"c = \"{world(RINGS, 1, clean=True)[1][0]}\"")
    for t, column in zip(times, figure.subplots(3, len(times)).T):
        x_t = flow.path(x_0, eps, torch.tensor([t]))
        v = model.net(x_t, torch.tensor([t]), *told)[0]
        for axis, picture in zip(column, (x_t, v, x_t - t * v)):
            paint(axis, to_rgb(model, picture)[0])
        column[0].set_title(f"t = {t:g}")
    for axis, label in zip(figure.axes[::len(times)], (
            "x_t =\n(1 - t) x_0 + t eps", "v_θ(x_t, t, s, c)", "x_t - t v_θ:\nits guess of x_0")):
        axis.set_ylabel(label)
    return figure


@torch.no_grad()
def loss(model: sample.Model) -> Figure:
    """The error of the velocity over t, told the true levels and others': flow.loss."""
    x_0, eps, s, text, mask = batch(model, 30000, 256)
    times = np.linspace(0.02, 0.98, 17)
    lines = {"told the true levels": s, "told those of another picture": s.roll(1, 0)}
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axis, never = figure.subplots(), torch.zeros(len(s)).bool()
    for label, told in lines.items():
        errors = [flow.loss(model.net, x_0, eps, torch.full((len(s),), float(t)), told, text, mask,
                            never)[0] for t in times]                            # 17 of (256,)
        axis.plot(times, torch.stack(errors).mean(1), label=label)
    t = torch.from_numpy(times).float()
    axis.plot(times, model.net.log_variance(1 - t).exp(), "k:", label="exp u(t): what it expects")
    axis.set(xlabel="t: 0 is data, 1 is noise", ylabel="mean squared error of v", ylim=(0, None))
    axis.legend()
    return figure


def network(model: sample.Model) -> Figure:
    """The network with its sizes, and where the rewards enter: TextRIN.forward, .condition."""
    c = model.net.config
    N, R = (c.size // c.patch) ** 2, len(c.rewards)
    figure = Figure(figsize=(10, 5.2))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 100), ylim=(0, 52))
    axis.axis("off")

    def box(x, y, w, h, text, color):
        axis.add_patch(FancyBboxPatch((x, y), w, h, "round,pad=0.2", fc=color, ec="#555"))
        axis.text(x + w / 2, y + h / 2, text, ha="center", va="center")

    def arrow(start, end, text="", color="#555"):
        axis.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=color, lw=1.6))
        axis.text((start[0] + end[0]) / 2 + 0.8, (start[1] + end[1]) / 2, text, va="center",
                  color=color)

    reward, words, plain, latent, inner = "#ffd8d4", "#d8e4ff", "#eeeeee", "#ddf3dd", "#fafafa"
    box(2, 45, 26, 5.5, f"s: {R} levels\n→ {R} reward tokens", reward)
    box(32, 45, 26, 5.5, f"{c.registers} registers:\nlearned tokens, scratch space", plain)
    box(62, 45, 36, 5.5, f"c: L words, (L, {c.text_dim})\n→ L tokens", words)
    box(18, 35, 64, 5.5, f"{len(model.net.text_layers)} layers of self-attention → condition "
        f"tokens ({R} + {c.registers} + L, {c.latent_dim})", plain)
    for x in (15, 45, 80):
        arrow((x, 44.8), (min(max(x, 22), 78), 41))
    box(30, 7.5, 68, 22, "", inner)
    axis.text(31, 27.3, f"this block {c.blocks} times, each with weights of its own",
              color="#555")
    box(2, 18, 22, 6, f"x_t ({c.channels}, {c.size}, {c.size})\n→ {N} patches", plain)
    arrow((24.4, 20), (33.6, 14.5))
    box(34, 9.5, 18, 6, f"data tokens\n({N}, {c.data_dim})", plain)
    box(62, 18, 30, 6, f"latents ({c.latents}, {c.latent_dim})", latent)
    arrow((77, 34.6), (77, 24.6), color=HUES["colorfulness"])
    axis.text(78, 32, "1 read condition and time", color=HUES["colorfulness"])
    arrow((46, 16), (61.6, 22.5))
    axis.text(47, 20, "2 read", color="#555")
    box(62, 9.5, 30, 4.5, f"3 compute: {c.layers} layers of self-attention", latent)
    arrow((84, 17.6), (84, 14.4))
    arrow((80, 14.4), (80, 17.6))
    arrow((61.6, 18.5), (52.6, 14))
    axis.text(58, 14.8, "4 write", color="#555")
    box(2, 29, 14, 4.5, "time t", plain)
    arrow((16.4, 31.5), (76.4, 31.5))
    box(30, 0.8, 40, 4.5, f"data tokens → v ({c.channels}, {c.size}, {c.size})", plain)
    arrow((43, 9.2), (43, 5.7))
    box(76, 0.8, 22, 4.5, "u(t), of t alone", plain)
    return figure


@torch.no_grad()
def token(model: sample.Model) -> Figure:
    """What one reward token changes: the guess of x_0 with s_j = 1 less that with s_j = 0."""
    x_0, eps, s, *text = batch(model, RINGS, 1, clean=True)
    times = (0.9, 0.8, 0.6, 0.4, 0.2)
    figure = Figure(figsize=(6.4, 7.4), layout="constrained")
    axes = figure.subplots(1 + len(NAMES), len(times))
    for column, t in zip(axes.T, torch.tensor(times)):
        x_t = flow.path(x_0, eps, t[None])
        paint(column[0], to_rgb(model, x_t)[0], f"x_t, t = {t:g}")
        for r, axis in enumerate(column[1:]):
            v = []
            for level in (1.0, 0.0):
                told = torch.full_like(s, 0.5)
                told[:, r] = level
                v.append(model.net(x_t, t[None], told, *text)[0])
            change = (t * (v[1] - v[0]))[0]                                      # (3, S, S)
            paint(axis, 0.5 + 0.5 * change / change.abs().max(),
                  below=f"rms {change.square().mean().sqrt():.2f}")
    for axis, name in zip(axes[1:, 0], NAMES):
        axis.set_ylabel(name, color=HUES[name])
    return figure


@torch.no_grad()
def guidance(model: sample.Model) -> Figure:
    """v⁻, v⁺ and v̂ in the plane of the first two, and what w does: flow.branches."""
    x_0, eps, s, *text = batch(model, RINGS, 1, clean=True)
    t, weights, n = torch.tensor([0.9]), (0, 0.5, 1, 2, 4, 8), 64
    x_t = flow.path(x_0, eps, t)
    v_pos, v_neg = (model.net(x_t, t, torch.full_like(s, level), *text)[0].flatten()
                    for level in (1, 0))
    along = v_neg / v_neg.norm()
    off = v_pos - (v_pos @ along) * along
    plane = torch.stack([along, off / off.norm()])                               # (2, D)
    ends = {"v⁻": v_neg, "v⁺": v_pos} | {f"v̂, w = {w}": v_pos + w * (v_pos - v_neg)
                                         for w in (1, 2)}
    figure = Figure(figsize=(12.5, 2.8), layout="constrained")
    left, *right = figure.subplots(1, 1 + len(weights), width_ratios=(2.2, *6 * [1]))
    for (label, v), color in zip(ends.items(), ("#888888", "#4269d0", "#f29e4c", "#e8554d")):
        x, y = (plane @ v).tolist()
        left.annotate("", (x, y), (0, 0), arrowprops=dict(arrowstyle="-|>", color=color, lw=1.8))
        left.text(x + 1, y, label, color=color, va="center")
    reach = 1.35 * float(max((plane @ v)[0] for v in ends.values()))
    left.set(xlim=(0, reach), ylim=(-4, 1.2 * float((plane @ ends["v̂, w = 2"])[1])), xticks=[],
             yticks=[], aspect="equal", title="the velocities at one x_t, t = 0.9")
    left.spines[:].set_visible(False)
    for axis, w in zip(right, weights):
        x = sample.pictures(model, [PROMPTS[0]] * n, seeds=range(n), guidance=w)
        right_ones = shapes.score_all(("alignment",), x, [PROMPTS[0]] * n).eq(1).float().mean()
        paint(axis, x[3], f"w = {w}", f"{100 * right_ones:.0f} % right")         # one of them
    return figure


@torch.no_grad()
def sampling(model: sample.Model) -> list[Image.Image]:
    """16 steps from noise to pictures; below, the guess of the end at each: flow.sample."""
    frames, seen, w = [], [], 1.0
    # What the network is given, x_t, t, ..., and gives, v, z, u: v⁺ of all pictures, then v⁻.
    hook = model.net.register_forward_hook(lambda _, given, gives: seen.append(
        (given[0], float(given[1][0]), gives[0])))
    last = sample.pictures(model, PROMPTS, seeds=range(len(PROMPTS)), steps=16, guidance=w)
    hook.remove()
    for x, t, v in seen:
        (v_pos, v_neg), x_t = v.chunk(2), x.chunk(2)[0]
        guess = x_t - t * ((1 + w) * v_pos - w * v_neg)
        frames.append(sheet([to_rgb(model, x_t), to_rgb(model, guess)], f"t = {t:.2f}",
                            ("x_t", "guess of\nits end")))
    return [*frames, sheet([last / 255] * 2, "t = 0.00", ("x_t", "picture"))]


def sheet(rows: list, heading: str, labels: tuple) -> Image.Image:
    """A row of pictures of PROMPTS (6, 3, S, S) for each label, below the prompts, as a frame."""
    figure = Figure(figsize=(8, 0.7 + 1.25 * len(rows)), layout="constrained")
    figure.suptitle(heading, x=0.01, ha="left")
    for axes, row, label in zip(figure.subplots(len(rows), len(PROMPTS)), rows, labels):
        for axis, picture in zip(axes, row):
            paint(axis, picture)
        axes[0].set_ylabel(label)
    for axis, prompt in zip(figure.axes, PROMPTS):
        axis.set_title(textwrap.fill(prompt, 17), fontsize=8)
    file = BytesIO()
    figure.savefig(file, dpi=80)
    return Image.open(file).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)


def training(model: sample.Model, folder: str) -> list[Image.Image]:
    """The same noise and captions as training goes on, by the checkpoints that a run kept."""
    frames, asked = [], ("all=0", "all=0.75 alignment=1", "all=1")
    places = sorted(Path(folder).glob("step-*"))
    for place in [*places[:10], *places[11::3]]:                    # more of the start
        then = sample.load(place)
        rows = [sample.pictures(then, PROMPTS, targets.split(), seeds=range(len(PROMPTS))) / 255
                for targets in asked]
        frames.append(sheet(rows, f"step {int(place.name[5:])}",
                            [targets.replace(" ", "\n") for targets in asked]))
    return frames


def control(model: sample.Model) -> Figure:
    """How far each target, from 0 to 1 with the others at 0.5, moves each reward, in std of the
    data: what evaluate.control measures, on 48 prompts."""
    wanted, moves = evaluate.benchmark(48), np.zeros((5, 5))
    for row, name in enumerate(NAMES):
        low, high = (evaluate.measure(model, wanted, range(48), ["all=0.5", f"{name}={level}"])[0]
                     .mean(0)[1:] for level in (0, 1))
        moves[row] = (high - low) / model.bins.std
    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(moves, cmap="RdBu", norm=TwoSlopeNorm(0, -4, 4))
    for (row, column), move in np.ndenumerate(moves.round(1) + 0.0):             # no -0.0
        axis.text(column, row, f"{move:+.1f}", ha="center", va="center",
                  color="white" if abs(move) > 2 else "black")
    axis.set(xticks=range(5), yticks=range(5), xticklabels=NAMES, yticklabels=NAMES,
             xlabel="this reward moves, in std of the data", ylabel="this target goes from 0 to 1")
    axis.tick_params("x", rotation=20)
    axis.spines[:].set_visible(False)
    return figure


def hacked(model: sample.Model, folder: str) -> Figure:
    """A model told colourfulness alone, and one told five rewards, asked for more of it."""
    rows = {"told colorfulness\nalone": (sample.load(folder), []),
            "told all five": (model, ["all=0.75", "alignment=1"])}
    levels, prompt = (0, 0.25, 0.5, 0.75, 1), "a red circle and a blue square"
    figure = Figure(figsize=(8, 4), layout="constrained")
    for axes, (label, (judged, others)) in zip(figure.subplots(2, 5), rows.items()):
        for axis, level in zip(axes, levels):
            asked = [*others, f"colorfulness={level}"]
            x = sample.pictures(judged, [prompt] * 64, asked, seeds=range(64))
            right = shapes.score_all(("alignment",), x, [prompt] * 64).eq(1).float().mean()
            paint(axis, x[3], f"level {level:g}", f"{100 * right:.0f} % of 64 are right")   # one
        axes[0].set_ylabel(label)
    return figure


def best(model: sample.Model) -> Figure:
    """The best of N pictures that ask for the middle, and one that asks for the most of one."""
    n, figure = 64, Figure(figsize=(12, 3), layout="constrained")
    texts = [prompt for prompt in PROMPTS for _ in range(n)]
    middle = sample.pictures(model, texts, ["all=0.5"], seeds=range(len(texts)))
    sizes = [2 ** k for k in range(7)]
    for axis, name in zip(figure.subplots(1, 5), NAMES):
        scores = shapes.score_all((name,), middle, texts).view(len(PROMPTS), n)
        curve = [scores.view(len(PROMPTS), -1, size).amax(2).mean() for size in sizes]
        one = sample.pictures(model, texts, ["all=0.5", f"{name}=1"], seeds=range(len(texts)))
        axis.plot(sizes, curve, "o-", ms=3, color="#999999", label="best of N, all=0.5")
        axis.axhline(shapes.score_all((name,), one, texts).mean(), color=HUES[name],
                     lw=2, label="mean of one, this target 1, the others 0.5")
        axis.set(xscale="log", xlabel="N", title=name, xticks=[1, 4, 16, 64],
                 xticklabels=["1", "4", "16", "64"])
        axis.minorticks_off()
    figure.legend(*figure.axes[2].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


FIGURES = (data, bins, path, loss, network, token, guidance, sampling, control, best)


def main() -> None:
    """Draw the figures asked for into docs/figures."""
    parser = Parser(description="draw the figures of docs/tutorial.md")
    known = [one.__name__ for one in FIGURES]
    parser.add_argument("--only", nargs="*", choices=known, default=known, help="some of them")
    parser.add_argument("--run", help="a run with --keep-every, for the figure of training")
    parser.add_argument("--hacked", help="a run told colorfulness alone, for the figure of it")
    parser.add_argument("--out", default=OUT, type=Path, help="folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = sample.load(sample.SHIPPED)
    jobs = {one.__name__: (one, ()) for one in FIGURES if one.__name__ in args.only}
    jobs |= {one.__name__: (one, (folder,)) for one, folder in ((training, args.run),
                                                                (hacked, args.hacked)) if folder}
    for name, (function, more) in jobs.items():
        drawn = function(model, *more)
        if isinstance(drawn, Figure):
            drawn.savefig(args.out / f"{name}.png", dpi=110)
        else:                                                  # frames; the last one stays longer
            times = [400] * (len(drawn) - 1) + [2500]
            drawn[0].save(args.out / f"{name}.gif", save_all=True, append_images=drawn[1:],
                          duration=times, loop=0)
        print(name, flush=True)


if __name__ == "__main__":
    run(main)
