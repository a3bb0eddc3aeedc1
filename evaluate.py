"""Evaluate a checkpoint on the embedded world, with its exact oracles.

    python evaluate.py shapes runs/shapes            # 512 unseen prompts of GenEval's six tasks
    python evaluate.py flops runs/shapes paper       # what a picture costs; folders or presets

Three questions of the paper, on captions that training never saw (shapes.held_out; their claims it
did see, with other endings):
1. quality: how much of the caption is true in the picture when every reward is asked for at 1?
2. honesty: how much of it at 0? (bad pictures were learned as bad)
3. control: does raising one target from 0 to 1, the others left at 1, raise that measure?
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sample
from model import PRESETS, Config, TextRIN
from rewards import ANALYTIC, PAPER, default_rewards, score_all
from shapes import TASKS, prompts


def levels(model: sample.Model, n: int, request: str) -> torch.Tensor:
    """"all=0" or "contrast=0" (the others at 1) → (n, R), as sample.py reads targets."""
    row = sample.read_targets([request], model.rewards, 1.0, "request")
    return torch.tensor([row] * n).view(n, len(row))


def evaluate_shapes(model: sample.Model, n: int = 512, alone: int = 128, seed: int = 0) -> dict:
    """Native scores of pictures of unseen prompts, the six tasks in turn, image i from noise i.

    n prompts at all=1 and at all=0, the first `alone` of them with each single target at 0; at the
    checkpoint's own guidance, steps and solver, away from all=0. Returns {request: {reward: mean,
    "n": count}}, "all=1, first" for the same prompts as the single targets, and under "tasks" the
    mean alignment of each task at all=1.
    """
    alone = min(alone, n)
    texts = [prompts(task, -(-n // len(TASKS)), seed) for task in TASKS]
    texts = [text for six in zip(*texts) for text in six][:n]
    names = default_rewards([(text,) for text in texts])
    requests = {"all=1": n}
    if model.rewards:
        requests |= {"all=0": n} | {f"{name}=0": alone for name in model.rewards}
    found, batch, steps = {}, 64, model.config["sampler"]["steps"]
    rounds = sum(-(-count // batch) for count in requests.values())
    with tqdm(total=rounds * steps, desc="evaluating", unit="step", leave=False) as bar:
        for request, count in requests.items():
            s_pos = levels(model, count, request)
            w = 0.0 if request == "all=0" else None       # there s⁺ = s⁻: guidance does nothing
            pictures = sample.generate(model, texts[:count], s_pos, torch.zeros_like(s_pos),
                                       list(range(count)), w, batch=batch, progress=bar.update)
            scores = score_all(names, pictures, texts[:count])                   # (count, R)
            found[request] = dict(zip(names, scores.mean(0).tolist()))
            found[request]["n"] = count
            if request == "all=1":
                found["all=1, first"] = dict(zip(names, scores[:alone].mean(0).tolist()))
                truths = scores[:, names.index("alignment")]
                found["tasks"] = {task: float(truths[k::len(TASKS)].mean())
                                  for k, task in enumerate(TASKS)}
    return found


def report(model: sample.Model, found: dict) -> str:
    """The three answers as a table: means in native units, the last column in std of the data; the
    columns alone=0 and alone=1 are of the first prompts."""
    lines = [f"{'reward':14}{'all=0':>9}{'all=1':>9}{'alone=0':>9}{'alone=1':>9}{'gain/std':>10}"]
    for name, top in found["all=1, first"].items():
        low, bottom = (found.get(request, {}).get(name, float("nan"))
                       for request in ("all=0", f"{name}=0"))
        std = model.config["score_std"].get(name) or float("nan")        # 0: a constant
        lines.append(f"{name:14}{low:9.3f}{found['all=1'][name]:9.3f}{bottom:9.3f}{top:9.3f}"
                     f"{(top - bottom) / std:10.2f}")
    tasks = ", ".join(f"{task} {value:.2f}" for task, value in found["tasks"].items())
    return "\n".join([*lines, f"alignment by task at all=1: {tasks}"])


def control_figure(model: sample.Model, prompt: str, seed: int = 0, columns: int = 6):
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
    return sample.grid(rows, [f"target {v:.1f}" for v in values], list(names))


def evaluate_folder(model: sample.Model, folder: Path, n: int) -> dict:
    """Evaluate, print the table, and write evaluation.json and control.png into the folder."""
    found = evaluate_shapes(model, n)
    print(report(model, found))
    if model.rewards:
        figure = control_figure(model, prompts("colors", 1, 0)[0])
        sample.write_png(figure, folder / "control.png", found)
    temporary = folder / ".evaluation.json.tmp"              # the file is whole or not there
    temporary.write_text(json.dumps(found, indent=1))
    temporary.replace(folder / "evaluation.json")
    return found


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
    """What a picture of a checkpoint, or of a preset with all its rewards, costs."""
    if name in PRESETS and not Path(name).exists():
        rewards = PAPER if name == "paper" else ANALYTIC
        c = Config(**PRESETS[name] | dict(rewards=rewards))
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


def main(argv=None):
    """The command line: judge checkpoints one after the other."""
    parser = argparse.ArgumentParser(description="evaluate checkpoints of the embedded world")
    parser.add_argument("what", choices=("shapes", "flops"), help="the benchmark, or the cost")
    parser.add_argument("checkpoints", nargs="+", help="folders that train.py wrote")
    parser.add_argument("--n", type=int, default=512, help="prompts")
    parser.add_argument("--tokens", type=int, default=77, help="of text, for flops")
    args = parser.parse_args(argv)
    if args.what == "flops":
        if args.tokens < 1:
            raise ValueError("--tokens must be at least 1")
        return print("\n\n".join(cost_report(name, args.tokens) for name in args.checkpoints))
    if args.n < len(TASKS):
        raise ValueError(f"--n must be at least {len(TASKS)}, one prompt a task")
    for folder in args.checkpoints:
        print(folder)
        evaluate_folder(sample.load(folder, sample.best_device()), Path(folder), args.n)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:  # a user's mistake: one sentence, no traceback
        print(error, file=sys.stderr)
        sys.exit(2)
