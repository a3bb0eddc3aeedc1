"""Draw the figures of tutorial.md, a function each, in the order of the method.

    python docs/figures.py                      # ten figures, from the world and assets/shapes
    python docs/figures.py --only path control  # some of them
    python docs/figures.py --run runs/long --hacked runs/hacked      # the two that need more runs:
        # python train.py --steps 4500 --keep-every 100 --out runs/long
        # python train.py --steps 4500 --rewards colorfulness --out runs/hacked
"""
import sys
import textwrap
from pathlib import Path

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


def to_rgb(model: sample.Model, x: torch.Tensor) -> torch.Tensor:
    """What the network sees (..., 3, S, S) → 0 to 1."""
    mean, std = (torch.tensor(model.config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return ((x * std + mean) / 255).clamp(0, 1)


def world(first: int, n: int, clean: bool = False) -> tuple[torch.Tensor, list[str]]:
    """Pictures of the world, uint8 (n, 3, S, S), and their captions."""
    drawn = [shapes.sample(0, i, shapes.SIZE, clean)[:2] for i in range(first, first + n)]
    return (torch.from_numpy(np.stack([picture for picture, _ in drawn])).movedim(-1, 1),
            [caption for _, caption in drawn])


def batch(model: sample.Model, first: int, n: int, clean: bool = False) -> dict:
    """n pictures that training never saw, as the network wants them: x_0, eps, s, text, mask."""
    pictures, captions = world(first, n, clean)
    mean, std = (torch.tensor(model.config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    text, mask = pad(model.encoder.states(captions))
    s = model.bins.to_target(shapes.score_all(NAMES, pictures, captions).numpy())
    eps = stream(0, "draws", first).standard_normal((n, *pictures.shape[1:]), np.float32)
    return dict(x_0=(pictures - mean) / std, eps=torch.from_numpy(eps), s=torch.from_numpy(s),
                text=text, text_mask=mask)


def data(model: sample.Model) -> Figure:
    """Eight pairs with their scores and levels: shapes.sample, shapes.score_all, Bins.to_target."""
    pictures, captions = world(12, 8)
    scores = shapes.score_all(NAMES, pictures, captions).numpy()                 # (8, R)
    levels = model.bins.to_target(scores)                                        # (8, R)
    figure = Figure(figsize=(12, 4), layout="constrained")
    rows = figure.subplots(2, 8, height_ratios=(3, 2))
    for i, (top, low) in enumerate(rows.T):
        paint(top, pictures[i], textwrap.fill(captions[i], 20))
        low.barh(range(5), levels[i], color=HUES.values(), height=0.7, alpha=0.5)
        for k, score in enumerate(scores[i]):
            low.text(0.03, k, f"{score:.3g}", va="center", fontsize=8)
        low.set(xlim=(0, 1), xticks=(0, 0.5, 1), yticks=range(5),
                yticklabels=NAMES if i == 0 else [])
        low.invert_yaxis()
    rows[1, 0].set_xlabel("bar: level    number: score", loc="left")
    return figure


def bins(model: sample.Model) -> Figure:
    """Scores → quantile edges → levels, of a heavy tail and of ties: binning.fit, Bins.place."""
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
    given, times = batch(model, 20005, 1, clean=True), (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
    x_0, eps, *rest = given.values()
    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    for t, column in zip(times, figure.subplots(3, len(times)).T):
        x_t = flow.path(x_0, eps, torch.tensor([t]))
        v = model.net(x_t, torch.tensor([t]), *rest)[0]
        for axis, picture in zip(column, (x_t, v, x_t - t * v)):
            paint(axis, to_rgb(model, picture)[0])
        column[0].set_title(f"t = {t:g}")
    for axis, label in zip(figure.axes[::len(times)], (
            "x_t = (1 - t) x_0 + t eps", "v_θ(x_t, t, s, c)", "x_t - t v_θ:\nits guess of x_0")):
        axis.set_ylabel(label)
    return figure


@torch.no_grad()
def loss(model: sample.Model) -> Figure:
    """The error of the velocity over t, told the true levels and others': flow.loss."""
    given, times = batch(model, 30000, 256), np.linspace(0.02, 0.98, 17)
    x_0, eps, s, text, mask = given.values()
    lines = {"told the true levels": s, "told those of another picture": s.roll(1, 0)}
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axis, never = figure.subplots(), torch.zeros(len(s)).bool()
    for label, told in lines.items():
        errors = [flow.loss(model.net, x_0, eps, torch.full((len(s),), float(t)), told, text, mask,
                            never)[0] for t in times]                            # 17 of (256,)
        axis.plot(times, torch.stack(errors).mean(1), label=label)
    t = torch.from_numpy(times).float()
    axis.plot(times, model.net.log_variance(1 - t).exp(), "k:", label="exp u(t): what it expects")
    axis.set(xlabel="t: 0 is data, 1 is noise", ylabel="mean squared error of v", yscale="log")
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

    reward, words, plain, latent = "#ffd8d4", "#d8e4ff", "#eeeeee", "#ddf3dd"
    box(2, 44, 26, 6, f"s: {R} levels\n→ {R} reward tokens", reward)
    box(32, 44, 26, 6, f"{c.registers} learned registers", plain)
    box(62, 44, 36, 6, f"c: L words, (L, {c.text_dim})\n→ L tokens", words)
    box(18, 33, 64, 6, f"2 layers of self-attention → condition tokens ({R} + {c.registers} + L, "
        f"{c.latent_dim})", plain)
    for x in (15, 45, 80):
        arrow((x, 44), (min(max(x, 22), 78), 39.4))
    box(2, 20, 22, 7, f"x_t ({c.channels}, {c.size}, {c.size})\n→ {N} patches", plain)
    box(2, 6, 22, 7, f"data tokens\n({N}, {c.data_dim})", plain)
    arrow((13, 20), (13, 13.4))
    box(40, 15, 26, 8, f"latents z ({c.latents}, {c.latent_dim})\n+ embedded time t", latent)
    arrow((53, 33), (53, 23.4), "read the condition", HUES["colorfulness"])
    arrow((24.4, 11), (39.6, 18))
    axis.text(30, 16.6, "read", ha="center", color="#555")
    arrow((40, 15.6), (24.4, 7.6))
    axis.text(34, 10, "write", ha="center", color="#555")
    box(74, 15, 24, 8, f"compute: {c.layers} layers of\nself-attention and MLP", latent)
    arrow((66.4, 20.5), (73.6, 20.5))
    arrow((73.6, 17), (66.4, 17))
    box(40, 2, 58, 6, f"data tokens → v ({c.channels}, {c.size}, {c.size})   and   u(t)", plain)
    arrow((24.4, 6), (39.6, 5))
    axis.text(69, 11.5, f"all of it {c.blocks} times, each with weights of its own", ha="center",
              color="#555")
    return figure


@torch.no_grad()
def token(model: sample.Model) -> Figure:
    """What one reward token changes: the guess of x_0 with s_j = 1 less that with s_j = 0."""
    given, times = batch(model, 20005, 1, clean=True), (0.95, 0.8, 0.6, 0.4, 0.2)
    x_0, eps, s, *text = given.values()
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
    given, t = batch(model, 20005, 1, clean=True), torch.tensor([0.9])
    x_0, eps, s, *text = given.values()
    x_t = flow.path(x_0, eps, t)
    v_pos, v_neg = (model.net(x_t, t, torch.full_like(s, level), *text)[0].flatten()
                    for level in (1, 0))
    along = v_neg / v_neg.norm()
    off = v_pos - (v_pos @ along) * along
    plane = torch.stack([along, off / off.norm()])                               # (2, D)
    ends = {"v⁻": v_neg, "v⁺": v_pos} | {f"v̂, w = {w}": v_pos + w * (v_pos - v_neg)
                                         for w in (1, 2)}
    weights = (0, 0.5, 1, 2, 4, 8)
    figure = Figure(figsize=(12, 3), layout="constrained")
    left, *right = figure.subplots(1, 1 + len(weights), width_ratios=(2.6, *6 * [1]))
    for (label, v), color in zip(ends.items(), ("#888888", "#4269d0", "#f29e4c", "#e8554d")):
        x, y = (plane @ v).tolist()
        left.annotate("", (x, y), (0, 0), arrowprops=dict(arrowstyle="-|>", color=color, lw=1.8))
        left.text(x + 0.5, y, label, color=color, va="center")
    reach = 1.3 * float(max((plane @ v)[0] for v in ends.values()))
    left.set(xlim=(0, reach), ylim=(-2, 1.25 * float((plane @ ends["v̂, w = 2"])[1])), xticks=[],
             yticks=[], xlabel="the velocities of one x_t, to scale")
    for axis, w in zip(right, weights):
        x = sample.pictures(model, [PROMPTS[0]], seeds=[3], guidance=w)
        paint(axis, x[0], f"w = {w}")
    return figure


@torch.no_grad()
def sampling(model: sample.Model) -> list[Image.Image]:
    """16 steps from noise to pictures; below, the guess of the end at each: flow.sample."""
    frames, seen = [], []
    hook = model.net.register_forward_hook(lambda _, given, found: seen.append(
        (given[0], float(given[1][0]), found[0])))
    last = sample.pictures(model, PROMPTS, seeds=range(len(PROMPTS)), steps=16, guidance=1.0)
    hook.remove()
    for x, t, v in seen:
        v_pos, v_neg = v.chunk(2)
        x = x.chunk(2)[0]
        frames.append((to_rgb(model, x), to_rgb(model, x - t * (2 * v_pos - v_neg)), t))
    frames.append((last / 255, last / 255, 0.0))
    return [sheet(rows, f"t = {t:.2f}   above: x_t   below: x_t - t v, the guess of its end")
            for *rows, t in frames]


def sheet(rows: list, heading: str) -> Image.Image:
    """Rows of pictures (3, S, S) in 0 to 1, enlarged, below a line of text."""
    rows = [[((255 * x).round().to(torch.uint8), ()) for x in row] for row in rows]
    return sample.grid(rows, 4, [heading])


def training(model: sample.Model, folder: str) -> list[Image.Image]:
    """The same noise and captions as training goes on, by the checkpoints that a run kept."""
    frames = []
    places = sorted(Path(folder).glob("step-*"))
    for place in [*places[:10], *places[11::3]]:                    # more of the start
        then = sample.load(place)
        rows = [sample.pictures(then, PROMPTS, targets, seeds=range(len(PROMPTS))) / 255
                for targets in (["all=0"], ["all=0.75", "alignment=1"], ["all=1"])]
        frames.append(sheet(rows, f"step {int(place.name[5:])}   rows: all=0, all=0.75 alignment=1,"
                                  " all=1"))
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
    axis.imshow(moves, cmap="RdBu", norm=TwoSlopeNorm(0, -2, 4))
    for (row, column), move in np.ndenumerate(moves):
        axis.text(column, row, f"{move:+.1f}", ha="center", va="center",
                  color="white" if move > 2.5 else "black")
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
            paint(axis, x[3], f"level {level:g}", f"{100 * right:.0f} % of 64 are right")
        axes[0].set_ylabel(label)
    return figure


def best(model: sample.Model) -> Figure:
    """The best of N pictures that ask for the middle, and one that asks for the most of one."""
    n, figure = 64, Figure(figsize=(12, 2.8), layout="constrained")
    texts = [prompt for prompt in PROMPTS for _ in range(n)]
    middle = sample.pictures(model, texts, ["all=0.5"], seeds=range(len(texts)))
    sizes = [2 ** k for k in range(7)]
    for axis, name in zip(figure.subplots(1, 5), NAMES):
        scores = shapes.score_all((name,), middle, texts).view(len(PROMPTS), n)
        curve = [scores.view(len(PROMPTS), -1, size).amax(2).mean() for size in sizes]
        one = sample.pictures(model, texts, ["all=0.5", f"{name}=1"], seeds=range(len(texts)))
        axis.plot(sizes, curve, "o-", ms=3, color="#888888", label="best of N, all=0.5")
        axis.axhline(shapes.score_all((name,), one, texts).mean(), color=HUES[name],
                     label=f"one, all=0.5 {name}=1")
        axis.set(xscale="log", xlabel="N", title=name, xticks=[1, 4, 16, 64],
                 xticklabels=["1", "4", "16", "64"])
        axis.minorticks_off()
    figure.axes[0].legend(fontsize=7)
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
            times = [120] * (len(drawn) - 1) + [2500]
            drawn = [frame.quantize(256, Image.Quantize.FASTOCTREE) for frame in drawn]
            drawn[0].save(args.out / f"{name}.gif", save_all=True, append_images=drawn[1:],
                          duration=times, loop=0)
        print(name, flush=True)


if __name__ == "__main__":
    run(main)
