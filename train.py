"""Train MIRO. With no argument: make, score and bin the embedded world, train, show the pictures.

    python train.py                                      # the whole main job, minutes on a laptop
    python train.py --rewards none --out runs/baseline   # the paper's baseline
    torchrun --standalone --nproc-per-node=8 train.py --data DIR --out runs/mine --batch 1024

The same command again resumes: on a CPU bit for bit, on a GPU up to the order of its sums. Every
random number of a sample (noise, time, coins) is drawn from (seed, position in the stream), so
neither ranks nor accumulation change the result.
"""
import argparse
import copy
import ctypes
import json
import math
import os
import pickle
import platform
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

import binning
import evaluate
import flow
import sample
from data import (MAX_UNREADABLE, PRECISIONS, T5, VAE, Latents, Pictures, Words, batches,
                  first_line, precision, split_words)
from model import PRESETS, Compute, Config, Cross, RMSNorm, TextRIN
from rewards import (ANALYTIC, PAPER, REWARDS, check_names, choose_rewards, default_rewards,
                     read_scores, score_all, score_dataset, scored_names, sidecar)
from shapes import TASKS, WORDS, prompts, write_world


def flag(default, words: str):
    """A field of Args, explained in --help."""
    return field(default=default, metadata=dict(help=words))


@dataclass
class Args:
    """Every flag; None takes the preset's value: RECIPES below, PRESETS in model.py."""
    preset: str = flag("shapes", "shapes or paper: the network and its recipe")
    data: str | None = flag(None, "folder of tars or pictures; default: the embedded world")
    out: str | None = flag(None, "folder of the run; default: runs/PRESET")
    rewards: str = flag("all", "all, none, or a,b,c: what the network is told")
    size: int | None = flag(None, "side of the data: pixels, or latents of 8 pixels each")
    patch: int | None = flag(None, "side of a patch; it divides size")
    blocks: int | None = flag(None, "RIN blocks")
    layers: int | None = flag(None, "self-attention layers in a block")
    latents: int | None = flag(None, "number of latents")
    latent_dim: int | None = flag(None, "their width")
    data_dim: int | None = flag(None, "width of the data tokens")
    steps: int | None = flag(None, "optimizer steps")
    batch: int | None = flag(None, "samples a step, over all ranks")
    accumulate: int = flag(1, "micro-batches a step and rank")
    optimizer: str | None = flag(None, "muon, adamw or lamb (the paper's)")
    lr: float | None = flag(None, "peak learning rate (muon: of all but inner matrices)")
    matrix_lr: float | None = flag(None, "muon: of the matrices of the inner layers")
    weight_decay: float | None = flag(None, "of the optimizer")
    warmup: int | None = flag(None, "steps of linear warm-up")
    cosine_rate: float | None = flag(None, "share of the half cosine that is run through")
    clip: float = flag(2.0, "largest norm of the gradient")
    ema: float | None = flag(None, "decay of the averaged weights, per step")
    t_mean: float | None = flag(None, "mean of logit(t): 0 the release's, above 0 nearer to noise")
    self_condition: float | None = flag(None, "share of samples that start from their own latents")
    reward_dropout: float = flag(0.0, "share of reward levels withheld")
    text_dropout: float = flag(0.0, "share of captions replaced by the empty one")
    bins: int | None = flag(None, "reward levels")
    world: int = flag(10000, "pictures of the embedded world")
    val: int = flag(256, "samples kept out for the validation loss")
    seed: int = flag(0, "of weights, order and noise (the embedded world has its own)")
    precision: str = flag("auto", "fp32, bf16 or fp16; auto: bf16 or fp16 on CUDA, else fp32")
    compile: bool = flag(False, "torch.compile")
    recompute: bool = flag(False, "keep matrix products alone for the backward pass: less memory")
    workers: int | None = flag(None, "processes that read pictures, per rank")
    text_encoder: str | None = flag(None, "latents: where the T5 of the encoded DATA is now")
    vae: str | None = flag(None, "latents: where its VAE is now")
    log_every: int = flag(50, "steps between lines of the log")
    save_every: int | None = flag(None, "steps between checkpoints")
    keep_every: int = flag(0, "steps between checkpoints that stay, to be compared; 0: none")
    sample_every: int | None = flag(None, "steps between validation and the grid")
    dry_run: bool = flag(False, "say what would be done, and stop")


RECIPES = {
    # Found by trials on two CPU cores; README.md has the table.
    "shapes": dict(steps=1150, batch=64, optimizer="muon", lr=2e-3, matrix_lr=1e-2, warmup=50,
                   weight_decay=0.0, cosine_rate=1.0, ema=0.995, t_mean=1.2, self_condition=0.0,
                   bins=5, workers=0, save_every=250, sample_every=500),
    # The release's, line by line, but for the last three.
    "paper": dict(steps=500_000, batch=1024, optimizer="lamb", lr=1e-3, matrix_lr=0.0, warmup=5000,
                  weight_decay=0.01, cosine_rate=0.8, ema=0.9999, t_mean=0.0, self_condition=0.9,
                  bins=64, workers=8, save_every=5000, sample_every=10_000),
}
STATE = ("step", "config", "net", "average", "scaler", "optimizers")     # what a state-*.pt holds
# What torch.load raises on damaged files (700 were tried); all of it means "unreadable".
UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, OSError, LookupError, ValueError,
              TypeError)
FREE = ("out", "accumulate", "compile", "recompute", "workers", "log_every", "save_every",
        "keep_every", "sample_every", "text_encoder", "vae", "dry_run")   # may change on resuming


# -------------------------------------------------------------------------------------- optimizers

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024): for the matrices of the inner layers.

    The update has singular values near 1, scaled to rms 0.2, AdamW's usual size (Liu et al. 2025).
    Ours, not torch.optim.Muon: that one orthogonalises one matrix at a time in bf16, which takes
    two thirds of a step on a CPU; here matrices of one shape go together, in fp32. Not in the
    paper.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients that are there."""
        for group in self.param_groups:
            same = {}
            for p in group["params"]:
                same.setdefault(p.shape, []).append(p)
            for params in same.values():
                grads = torch.stack([p.grad for p in params])                    # (K, m, n)
                for p, grad in zip(params, grads):
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    buffer = state["momentum"]
                    buffer.lerp_(grad, 1 - group["momentum"])
                    grad.lerp_(buffer, group["momentum"])                        # Nesterov
                update = orthogonalise(grads) * 0.2 * max(grads.shape[1:]) ** 0.5
                for p, u in zip(params, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=group["lr"])


def orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """The nearest matrices with all singular values near 1: (K, m, n) → (K, m, n).

    Five Newton-Schulz steps with Jordan's coefficients."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / (wide.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        a = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), wide,
                             beta=3.4445)
    return wide if x.shape[1] <= x.shape[2] else wide.mT


def optimizers_for(net: TextRIN, args: Args) -> list:
    """One optimizer, or with muon two.

    muon: Muon with decay for the matrices of the inner layers, AdamW without for the rest. adamw:
    norms, biases and learned tokens are not decayed. lamb (You et al. 2020) is timm's as the
    release runs its own: no decay and no trust ratio for norms and biases, but both for learned
    tokens and all of the log-variance; the decay is part of the step that is scaled.
    """
    named = dict(net.named_parameters())
    inner = ("blocks.", "text_layers.", "previous_mlp.")
    matrices = [p for name, p in named.items() if p.ndim == 2 and name.startswith(inner)]
    weights = [p for name, p in named.items() if name.endswith("weight") and p.ndim == 2]
    plain = lambda chosen: [p for p in named.values() if not any(p is q for q in chosen)]
    if args.optimizer == "muon":
        found = [Muon(matrices, args.matrix_lr, weight_decay=args.weight_decay),
                 torch.optim.AdamW(plain(matrices), args.lr, (0.9, 0.99), weight_decay=0.0)]
    elif args.optimizer == "lamb":
        from timm.optim import Lamb                              # here: timm takes a second to load
        norms = {f"{name}.weight" for name, module in net.named_modules()
                 if isinstance(module, (torch.nn.LayerNorm, RMSNorm))}
        trusted = [p for name, p in named.items() if name.startswith("log_variance")
                   or name not in norms and not name.endswith("bias")]
        groups = [dict(params=trusted, weight_decay=args.weight_decay, always_adapt=True),
                  dict(params=plain(trusted), weight_decay=0.0)]
        found = [Lamb(groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=None)]
    else:
        groups = [dict(params=weights, weight_decay=args.weight_decay),
                  dict(params=plain(weights), weight_decay=0.0)]
        found = [torch.optim.AdamW(groups, lr=args.lr)]
    for group in (group for optimizer in found for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return found


def schedule(step: int, args: Args) -> float:
    """Linear warm-up, then cosine_rate of half a cosine: the factor of the learning rate."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return 0.5 * (1 + math.cos(args.cosine_rate * math.pi * done))


# -------------------------------------------------------------------------------------- one sample

def draws(seed: int, position: int, shape: tuple, rewards: int) -> dict:
    """All random numbers of the sample at a position of the stream: the noise, the time, the coins.

    They depend on nothing else, so two ranks, more workers or a resumed run draw the same.
    """
    rng = np.random.default_rng([seed, 3, position])
    return dict(eps=rng.standard_normal(shape, np.float32), t=rng.standard_normal(),
                caption=rng.random(), text=rng.random(), self_condition=rng.random(),
                rewards=rng.random(rewards))


def choose_caption(captions: list, seed: int, shape: tuple, position: int, row: int) -> int:
    """Which of a row's captions the sample at a position has: each as often."""
    return int(draws(seed, position, shape, 0)["caption"] * len(captions[row]))


def source_of(config: dict, s: list) -> dict:
    """What make_batch needs beside the pictures: levels by row and caption, and the pixel norms."""
    return dict(s=s, rewards=config["network"]["rewards"], channels=config["network"]["channels"],
                mean=torch.tensor(config["mean"]).view(-1, 1, 1),
                std=torch.tensor(config["std"]).view(-1, 1, 1))


def make_batch(step: dict, dataset, encoder, args: Args, source: dict, device):
    """What flow.loss takes, for a step of data.batches: x_0, eps, t, s, text, text_mask, coins."""
    shape = (source["channels"], args.size, args.size)
    R, positions = len(source["rewards"]), step["position"].tolist()
    drawn = [draws(args.seed, p, shape, R) for p in positions]
    stack = lambda key: torch.from_numpy(np.array([d[key] for d in drawn], np.float32))
    dropped = stack("text") < args.text_dropout                                  # (B,)
    captions, levels = [], []
    for row, p, empty in zip(step["row"].tolist(), positions, dropped.tolist()):
        choice = choose_caption(dataset.captions, args.seed, shape, p, row)    # as Latents has it
        captions.append("" if empty else dataset.captions[row][choice])
        levels.append(source["s"][row][choice])                      # rewards move with the text
    s = torch.from_numpy(np.array(levels, np.float32).reshape(len(drawn), R))    # (B, R)
    s = s.where(stack("rewards").view_as(s) >= args.reward_dropout, -1.0)        # -1: not asked
    if "std" in step:              # latents: a draw from what the VAE's encoder says, and T5 states
        noise = [np.random.default_rng([args.seed, 5, p]).standard_normal(shape) for p in positions]
        x_0 = step["picture"] + step["std"] * torch.from_numpy(np.array(noise, np.float32))
        text, text_mask = step["text"], step["text_mask"]                        # (B, L, E), (B, L)
        tokens = min(len(dataset.empty), text.shape[1])
        text[dropped], text_mask[dropped] = 0, False
        text[dropped, :tokens] = dataset.empty[:tokens]
        text_mask[dropped, :tokens] = True
    else:
        x_0 = step["picture"].float()                                            # (B, C, S, S)
        text, text_mask = encoder.encode(captions)                               # (B, L, E), (B, L)
    x_0 = (x_0 - source["mean"]) / source["std"]                                 # (B, C, S, S)
    t = flow.logit_normal(stack("t"), args.t_mean)                               # (B,)
    self_condition = stack("self_condition") < args.self_condition               # (B,)
    eps = stack("eps").view_as(x_0)                                              # (B, C, S, S)
    batch = (x_0, eps, t, s, text, text_mask, self_condition)
    return [tensor.to(device) for tensor in batch]


# ------------------------------------------------------------------------------------- checkpoints

def write_whole(path: Path, write) -> None:
    """write(temporary path), then rename: after a kill the file is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(out: Path, step: int, run: "Run") -> None:
    """state-STEP.pt to resume from (the newest two stay), and the pair that sample.py reads."""
    state = dict(step=step, config=run.config, net=run.net.state_dict(),
                 average=run.average.state_dict(), scaler=run.scaler.state_dict(),
                 optimizers=[optimizer.state_dict() for optimizer in run.optimizers])
    save_pair(out, run, step)
    # Last: a kill before this line repeats the steps and writes all three again.
    write_whole(out / f"state-{step:08d}.pt", lambda path: torch.save(state, path))
    for old in sorted(out.glob("state-*.pt"))[:-2]:
        old.unlink()


def save_due(out: Path, done: int, run: "Run", args: Args) -> None:
    """Write what is due after `done` steps: a pair to compare, a checkpoint to resume from."""
    last = done == args.steps
    if args.keep_every and (done % args.keep_every == 0 or last):
        save_pair(out / f"step-{done:06d}", run, done)
    if done % args.save_every == 0 or last:
        save_checkpoint(out, done, run)


def save_pair(folder: Path, run: "Run", step: int) -> None:
    """What sample.py reads: model.safetensors, the averaged weights, with config.json."""
    config = run.config | dict(step=step)
    folder.mkdir(exist_ok=True)
    weights = {name: w.contiguous().cpu() for name, w in run.average.state_dict().items()}
    write_whole(folder / "model.safetensors", lambda path: save_file(weights, path))
    write_whole(folder / "config.json", lambda path: path.write_text(json.dumps(config)))


def load_checkpoint(out: Path) -> dict | None:
    """The newest state that can be read, None if there is none. Tensors and plain types alone.

    Raises ValueError if there are states and none can be read."""
    states = sorted(out.glob("state-*.pt"), reverse=True)
    for path in states:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            return {key: state[key] for key in STATE}
        except UNREADABLE as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"{path} cannot be read ({reason}): trying the one before", file=sys.stderr)
    if states:
        raise ValueError(f"no checkpoint in {out} can be read: remove the folder or pass --out")
    return None


def newest_state(out: Path) -> str:
    """The newest checkpoint's path, or "none"."""
    return str(max(out.glob("state-*.pt"), default="none"))


def same_run(found: dict, wanted: dict, out: Path) -> None:
    """Resume only what the same command began on the same data: of two configs, ValueError naming
    the first flag that differs."""
    for key, value in wanted["args"].items():
        if found["args"].get(key) != value:
            raise ValueError(f"{out} was trained with --{key.replace('_', '-')} "
                             f"{found['args'].get(key)}, not {value}: pass --out for another "
                             "folder, or the same flags")
    for key in ("train_samples", "val_samples", "text_encoder", "encoded", "bins"):
        pair = [config.get(key) for config in (found, wanted)]
        if key == "text_encoder":                       # its folder may have moved
            pair = [dict(value, source=None) for value in pair]
        if pair[0] != pair[1]:
            raise ValueError(f"{out} was begun on other pictures, captions or scores ({key} have "
                             "changed): pass --out for another folder")
    if not np.allclose(found["mean"], wanted["mean"], 1e-6):
        raise ValueError(f"{out} was begun on other pictures (their mean has changed): pass --out "
                         "for another folder")


# -------------------------------------------------------------------------------------- the set-up

def read_args(argv=None) -> Args:
    """Flags over the preset's recipe and network; ValueError on what cannot be."""
    parser = argparse.ArgumentParser(description="train MIRO; no argument runs the whole main job")
    recipes = {preset: PRESETS[preset] | RECIPES[preset] for preset in RECIPES}
    for one in fields(Args):
        name, words = "--" + one.name.replace("_", "-"), one.metadata["help"]
        presets = ", ".join(f"{preset} {its[one.name]}" for preset, its in recipes.items()
                            if one.name in its)
        kind = {"int | None": int, "float | None": float, "str | None": str}.get(
            str(one.type), one.type)
        if one.type is bool:
            parser.add_argument(name, action="store_true", help=words)
        else:
            if one.default is not None or presets:
                words += f" (default: {presets or one.default})"
            parser.add_argument(name, type=kind, default=one.default, help=words)
    args = Args(**vars(parser.parse_args(argv)))
    if args.preset not in PRESETS:
        raise ValueError(f"--preset {args.preset}: there are {' and '.join(PRESETS)}")
    for key, value in recipes[args.preset].items():
        if getattr(args, key, 0) is None:
            setattr(args, key, value)
    args.out = args.out or f"runs/{args.preset}"
    check_args(args)
    shares = int(os.environ.get("WORLD_SIZE", 1)) * args.accumulate
    if args.batch % shares:
        raise ValueError(f"--batch {args.batch} is for all ranks and micro-batches together: "
                         f"choose a multiple of ranks x --accumulate = {shares}")
    return args


def check_args(args: Args) -> None:
    """ValueError, naming the flag, for what no run could have."""
    limits = dict.fromkeys(
        ("steps", "batch", "accumulate", "val", "world", "log_every", "save_every", "sample_every",
         "size", "patch", "blocks", "layers", "latents", "latent_dim", "data_dim"), (1, 2 ** 31))
    limits |= dict.fromkeys(("reward_dropout", "text_dropout", "self_condition", "ema",
                             "cosine_rate"), (0, 1)) | {"bins": (2, 2 ** 31)}
    limits |= dict.fromkeys(("lr", "matrix_lr", "weight_decay", "clip", "warmup", "workers",
                             "keep_every"), (0, 2 ** 100))
    limits |= dict.fromkeys(("latent_dim", "data_dim"), (8, 2 ** 31))
    limits |= {"t_mean": (-9, 9), "seed": (0, 2 ** 62)}
    for key, (low, high) in limits.items():
        if not low <= getattr(args, key) <= high:                                # not: NaN, too
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)}: it is at least "
                             f"{low} and at most {high:g}")
    if args.size % args.patch:
        raise ValueError(f"--patch {args.patch} does not divide --size {args.size}: for example "
                         f"{', '.join(str(p) for p in range(2, 9) if args.size % p == 0)}")
    if args.optimizer not in ("muon", "adamw", "lamb"):
        raise ValueError(f"--optimizer {args.optimizer}: there are muon, adamw and lamb")
    if args.precision not in PRECISIONS:
        raise ValueError(f"--precision {args.precision}: there are {', '.join(PRECISIONS)}")
    heads = max(PRESETS[args.preset][key] for key in ("heads", "read_heads", "text_heads"))
    for key in ("latent_dim", "data_dim"):
        if getattr(args, key) % heads:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} is shared by {heads} "
                             f"heads: choose a multiple of {heads}")
    if args.rewards not in ("all", "none"):
        check_names([name.strip() for name in args.rewards.split(",")])
    for folder in (Path(args.out), *Path(args.out).parents):
        if folder.is_file():
            raise ValueError(f"--out {args.out}: {folder} is a file, not a folder")


def start_ranks():
    """(device, rank, world): one process alone, or torchrun's, over nccl on CUDA and gloo else."""
    device = sample.best_device()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=2))       # rank 0 may score for a while
    return device, rank, world


def keep_freed_memory() -> None:
    """Tell the C library to keep what tensors free. It hands large buffers back to the system, and
    taking them anew costs a page fault per 4 KiB: up to a quarter of a training step on a CPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):                                        # glibc, not macOS or musl
        libc.mallopt(-3, 2 ** 30) or libc.mallopt(-3, 2 ** 25)    # M_MMAP_THRESHOLD; older's limit
        libc.mallopt(-1, 2 ** 31 - 1)                             # M_TRIM_THRESHOLD
        libc.mallopt(-2, 2 ** 28)                                 # M_TOP_PAD


def recompute(net: TextRIN) -> None:
    """Of each layer keep what matrix products and attention give, for the backward pass: it makes
    norms, gates and sums anew. Half of the memory of activations for a few percent of the time."""
    aten = torch.ops.aten
    kept = [aten.mm.default, aten.addmm.default, aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default]
    for layer in net.modules():
        if isinstance(layer, (Cross, Compute)):
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False,
                context_fn=partial(create_selective_checkpoint_contexts, kept))


def make_missing(args: Args, path: str, embedded: bool, latents: Latents | None) -> None:
    """Draw the world, score and bin the data, whatever of it is not there yet.

    ValueError: more samples than MAX_UNREADABLE cannot be read or scored."""
    if embedded:
        write_world(path, args.world, seed=0, size=args.size)
    pictures = latents or Pictures(path, args.size)
    failed, samples = pictures.unreadable, len(pictures) + pictures.lost
    if args.rewards != "none":
        scored = len(pictures) and sidecar(pictures.shards[0]).exists()
        found = scored_names(pictures) if scored else ()
        wanted = default_rewards(pictures.captions) if embedded or not scored else ()
        names = tuple(name for name in REWARDS if name in found or name in wanted)
        own = [name for name in names if name in ANALYTIC]    # networks are left to rewards.py
        failed = score_dataset(pictures, own) if own else failed
    if len(failed) > MAX_UNREADABLE * samples:
        raise ValueError(f"{path}: {len(failed)} of {samples} samples cannot be used (the limit is "
                         f"{MAX_UNREADABLE:.0%}): see python data.py check {path}")
    if args.rewards != "none" and not (pictures.shards[0].folder / "bins.json").exists():
        binning.bin_dataset(pictures, names, args.bins)


def levels_of(args: Args, pictures: Pictures) -> tuple:
    """(scored rows, for each its levels s (captions, R), Bins of the rewards asked for).

    ValueError: bins.json has other bins, other rewards, or was fitted on other scores."""
    path, file = pictures.path, pictures.shards[0].folder / "bins.json"
    bins = binning.load(file)
    if args.rewards != "all":
        names = choose_rewards(args.rewards, pictures.captions)
    else:                        # of DATA all that has bins; of the world all that rewards.py has
        world = default_rewards(pictures.captions) if args.data is None else ()
        names = bins.names + tuple(name for name in world if name not in bins.names)
    if bins.edges.shape[1] + 1 != args.bins:
        raise ValueError(f"{file} has {bins.edges.shape[1] + 1} bins, --bins asks for "
                         f"{args.bins}: pass the same, or remove the file")
    rows, raw = read_scores(pictures, bins.names)
    if bins.source != binning.fingerprint(np.concatenate(raw), bins.names):
        raise ValueError(f"{file} was fitted on other scores than those in {path}: write it "
                         f"again with python binning.py {path} --size {pictures.size} "
                         f"--bins {args.bins}")
    missing = [name for name in names if name not in bins.names]
    if missing:
        raise ValueError(f"{file} has no bins of {', '.join(missing)}: score them with python "
                         f"rewards.py {path} --size {pictures.size} --rewards "
                         f"{','.join(missing)}, and write it again with python binning.py "
                         f"{path} --size {pictures.size} --bins {args.bins}")
    columns = [bins.names.index(name) for name in names]
    s = bins.to_target(np.concatenate(raw))[:, columns]
    return rows, np.split(s, np.cumsum([len(scores) for scores in raw])[:-1]), bins.select(names)


def prepare_data(args: Args, rank: int):
    """The pictures that are scored, their levels, bins and encoder; rank 0 makes what is missing.

    Returns (train Pictures, val Pictures, s by row of each, Bins of the rewards asked, encoder).
    """
    embedded = args.data is None
    path, latents = args.data or "runs/world", PRESETS[args.preset]["channels"] != 3
    if latents and embedded:
        raise ValueError(f"--preset {args.preset} trains on latents of pictures: make them with "
                         "python data.py encode DATA OUT, and pass --data OUT")
    pictures = Latents(path, args.size) if latents else None     # before anything is written there
    if rank == 0:
        make_missing(args, path, embedded, pictures)
    if dist.is_initialized():
        dist.barrier()
    pictures = pictures or Pictures(path, args.size)
    rows, s, bins = list(range(len(pictures))), None, None
    if args.rewards != "none":
        rows, s, bins = levels_of(args, pictures)
    # 4 is a stream of its own, as 3 in draws; shapes.py has 0 and 1. It orders all samples, so that
    # one without scores is missing with rewards and moves no other: both runs validate on the same.
    order = np.random.default_rng([args.seed, 4]).permutation(len(pictures)).tolist()
    place = {row: i for i, row in enumerate(rows)}
    if len(rows) < args.val + args.batch:
        raise ValueError(f"{path} has {len(rows)} usable samples, fewer than --val {args.val} and "
                         f"one --batch {args.batch}")
    if latents:
        there = pictures.encoded
        encoder = T5(args.text_encoder or there["text_encoder"], there["dim"], there["length"])
    else:
        captions = [text for group in pictures.captions for text in group]
        words = WORDS if embedded else Words.vocabulary_of(captions)     # a small world lacks some
        longest = max(len(split_words(text)) for text in captions)
        encoder = Words(words, PRESETS[args.preset]["text_dim"], longest + 1)    # room for one more
    parts = []
    for chosen in (order[args.val:], order[:args.val]):
        chosen = [row for row in chosen if row in place]
        part = pictures.select(chosen)
        empty = [np.zeros((len(c), 0), np.float32) for c in part.captions]
        if latents:
            shape = (PRESETS[args.preset]["channels"], args.size, args.size)
            part.choose = partial(choose_caption, part.captions, args.seed, shape)
        parts.append((part, [s[place[row]] for row in chosen] if s else empty))
    (train, s_train), (val, s_val) = parts
    return train, val, s_train, s_val, bins, encoder


@dataclass
class Run:
    """A network in training with everything that a checkpoint holds."""
    net: TextRIN
    average: TextRIN                 # the averaged weights (EMA)
    model: torch.nn.Module           # net, compiled and distributed
    optimizers: list
    scaler: torch.amp.GradScaler     # of fp16
    config: dict
    start: int                       # the first step to do


def describe(args: Args, train: Pictures, val: Pictures, s_train: list, bins, encoder) -> dict:
    """config.json: everything that sampling needs, and the flags of the run."""
    rows = np.arange(min(2000, len(train)))
    encoded = train.encoded if isinstance(train, Latents) else None
    if encoded:                          # a latent is drawn: its variance is the sum of two
        first, spread = (torch.stack([train.read(i, f"{kind}{train.size}") for i in rows]).double()
                         for kind in ("mean", "std"))
        variance = first.var((0, 2, 3)) + spread.square().mean((0, 2, 3))        # (C,)
    else:
        first = train[rows, rows]["picture"].double()            # without the unreadable ones
        variance = first.var((0, 2, 3))                                          # (C,)
    mean, std = first.mean((0, 2, 3)), variance.sqrt()                           # (C,)
    if encoded and encoded["scaling_factor"] == VAE.SCALING_FACTOR:      # SDXL's: as the release
        mean, std = torch.tensor(VAE.MEAN), torch.tensor(VAE.STD)
    given = {key: value for key, value in asdict(args).items() if key in PRESETS[args.preset]}
    network = PRESETS[args.preset] | given | dict(rewards=list(bins.names) if bins else [],
                                                  text_dim=encoder.dim)
    spread = {}
    if bins:
        raw = np.concatenate(read_scores(train, bins.names)[1])                  # (N, R)
        spread = dict(zip(bins.names, raw.std(0).tolist()))
    return dict(
        format=1, time="t = 0 is data, t = 1 is noise", network=network,
        mean=mean.tolist(),                  # per channel, of pixels in 0..255 or of VAE latents
        std=(std / network["sigma_data"]).tolist(),
        text_encoder=encoder.config(), vae=encoded and (args.vae or encoded["vae"]),
        encoded=encoded, bins=bins.to_config() if bins else None, score_std=spread,
        prompts=[prompts(task, 1, 0)[0] for task in TASKS] if args.data is None
        else [captions[0] for captions in val.captions[:6]],
        sampler=sample.SAMPLERS[args.preset] | ({} if bins else dict(guidance=0.0)),   # no s⁻
        targets=sample.WORLD_TARGETS if args.data is None and network["rewards"] == [*ANALYTIC]
        else [],                                               # beneath --targets; the rest is at 1
        train_samples=len(train), val_samples=len(val),
        args={key: value for key, value in asdict(args).items() if key not in FREE})


def build(args: Args, config: dict, device: torch.device, world: int, dtype) -> Run:
    """The network, new or as the last checkpoint in --out left it."""
    out = Path(args.out)
    state = load_checkpoint(out)
    if state:
        same_run(state["config"], config, out)
        config = state["config"] | {key: config[key] for key in ("text_encoder", "vae")}
    torch.manual_seed(args.seed)                                        # of the initial weights
    net = TextRIN(Config(**config["network"])).to(device)
    average = copy.deepcopy(net).requires_grad_(False)
    if args.recompute:
        recompute(net)
    optimizers = optimizers_for(net, args)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state:
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        if state["scaler"]:                  # {}: until here in fp32 or bf16, on another machine
            scaler.load_state_dict(state["scaler"])
        for optimizer, found in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(found)
    model = torch.compile(net) if args.compile else net       # net keeps its names: no _orig_mod
    if world > 1:
        model = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
    return Run(net, average, model, optimizers, scaler, config, state["step"] if state else 0)


def train_step(run: Run, args: Args, step: int, batch: list, world: int, dtype) -> tuple:
    """One optimizer step on this rank's share of the batch: (mse (b,), gradient norm).

    Micro-batches add up to the gradient of the whole share, and DDP averages it over the ranks.
    Raises FloatingPointError if the gradient is not finite (fp16: its scaler skips such steps and
    halves its scale, until that has come down to 1).
    """
    share, mses = args.batch // world, []
    size = share // args.accumulate
    for first in range(0, share, size):
        micro = [tensor[first:first + size] for tensor in batch]
        used = len(micro[0])
        if used == 0:                            # unreadable pictures left a micro-batch empty: DDP
            micro = [tensor[:1] for tensor in batch]         # still needs a pass, with no weight
        quiet = run.model.no_sync() if world > 1 and first + size < share else nullcontext()
        with quiet, torch.autocast(micro[0].device.type, dtype, enabled=dtype != torch.float32):
            mse, weighted = flow.loss(run.model, *micro)                         # (b,), (b,)
            run.scaler.scale(weighted[:used].sum() / share).backward()
        mses.append(mse[:used].detach())
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.net.parameters(), args.clip)
    if not torch.isfinite(norm) and run.scaler.get_scale() <= 1:
        raise FloatingPointError
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, args)
        if torch.isfinite(norm):            # fp16: a step that overflowed is skipped as a whole
            run.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    decay = min(args.ema, (1 + step) / (10 + step))           # the average forgets the start sooner
    with torch.no_grad():
        torch._foreach_lerp_(list(run.average.parameters()), list(run.net.parameters()), 1 - decay)
    return torch.cat(mses), float(norm)


@torch.no_grad()
def validate(run: Run, val: Pictures, encoder, args: Args, source: dict, device) -> float:
    """Mean squared error of the averaged weights on the samples kept out: fixed noise and times,
    true scores, no dropout, latents handed on as in sampling."""
    steady = replace(args, text_dropout=0.0, reward_dropout=0.0,
                     self_condition=float(args.self_condition > 0))
    errors = []
    for first in range(0, len(val), 64):
        rows = np.arange(first, min(first + 64, len(val)))
        data = val[rows + 2 ** 62, rows]       # positions far beyond any of training's
        batch = make_batch(data, val, encoder, steady, source, device)
        errors.append(flow.loss(run.average, *batch)[0])                         # (b,)
    return float(torch.cat(errors).mean())


# ----------------------------------------------------------------------------------------- the log

def write_head(out: Path, config: dict, start: int) -> None:
    """The first line of log.jsonl: config, versions and the source that runs; later, a resume."""
    head = dict(resume=start)
    if start == 0:
        sources = {p.name: p.read_text() for p in sorted(Path(__file__).parent.glob("*.py"))}
        head = dict(config=config, source=sources, machine=platform.platform(), versions=dict(
            python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))
        (out / "log.jsonl").unlink(missing_ok=True)
    elif (out / "log.jsonl").exists():                       # a kill may have cut the last line
        whole = "".join(line for line in (out / "log.jsonl").read_text().splitlines(True)
                        if line.endswith("\n"))
        write_whole(out / "log.jsonl", lambda path: path.write_text(whole))
    append(out, head)


def append(out: Path, line: dict) -> None:
    """One more line of log.jsonl."""
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def summary(mse: torch.Tensor, t: torch.Tensor, world: int) -> tuple:
    """The mean loss over all ranks, and by quarters of t, of the samples since the last line."""
    quarter = torch.nn.functional.one_hot((4 * t).long().clamp(max=3), 4).float()    # (n, 4)
    sums = torch.stack([mse @ quarter, quarter.sum(0)])                          # (2, 4)
    if world > 1:
        dist.all_reduce(sums)
    by_t = [round(total / n, 5) if n else None for total, n in sums.T.tolist()]
    return float(sums[0].sum() / sums[1].sum()), by_t


def probe(shown: sample.Model, val: Pictures) -> dict:
    """Mean native score of each reward on 48 pictures that are asked for at all=1: what a reader of
    the curves waits for. Captions of the samples kept out, noise 0 to 47."""
    texts = [captions[0] for captions in val.captions[:48]]
    names = default_rewards(texts)
    s_pos = torch.ones(len(texts), len(shown.rewards))
    seeds = list(range(len(texts)))
    pictures = sample.generate(shown, texts, s_pos, torch.zeros_like(s_pos), seeds)
    return dict(zip(names, score_all(names, pictures, texts).mean(0).tolist()))


def draw_curves(out: Path) -> None:
    """curves.png: the loss, by quarters of t, and the rewards reached at all=1 against steps."""
    from matplotlib.figure import Figure                       # here: sampling never draws curves
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    logged = {line["step"]: line for line in lines if "loss" in line}       # a resume logs twice
    tested = {line["step"]: line for line in lines if "val" in line}
    steps, marks = sorted(logged), sorted(tested)
    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(steps, [logged[k]["loss"] for k in steps], label="training")
    left.plot(marks, [tested[k]["val"] for k in marks], "o-", label="validation (EMA)")
    for quarter in range(4):
        middle.plot(steps, [logged[k]["by_t"][quarter] for k in steps],
                    label=f"t in [{quarter / 4:g}, {quarter / 4 + 0.25:g}]")
    for axis in (left, middle):
        axis.set(xlabel="step", ylabel="mean squared error of v", yscale="log")
        axis.legend()
    for name in tested[marks[-1]]["reached"]:
        values = np.array([tested[k]["reached"][name] for k in marks])
        right.plot(marks, values / max(1e-9, np.abs(values).max()), "o-",
                   label=f"{name} (1 = {np.abs(values).max():.3g})")
    right.set(xlabel="step", ylabel="reached at all=1, of its highest")
    right.legend()
    write_whole(out / "curves.png", lambda path: figure.savefig(path, format="png"))


# ---------------------------------------------------------------------------------------- the loop

def dry_run(args: Args, device, dtype) -> None:
    """Say what a run would be: the recipe, the network's size and cost. Writes nothing."""
    asked = tuple(name.strip() for name in args.rewards.split(","))
    known = PAPER if args.preset == "paper" else ANALYTIC
    names = {"none": (), "all": known}.get(args.rewards, asked)
    given = {key: value for key, value in asdict(args).items() if key in PRESETS[args.preset]}
    config = Config(**PRESETS[args.preset] | given | dict(rewards=names))
    net, forward, _ = evaluate.forward_cost(config, 16)
    count = sum(p.numel() for p in net.parameters())
    per_image = forward * (3 + args.self_condition)            # forward, twice that backward, again
    for key, value in asdict(args).items():
        print(f"{key:16} {value}")
    print(f"{count:,} parameters; {forward / 1e9:.4g} GFLOP a forward pass, {per_image / 1e9:.4g} "
          f"a training image, {per_image * args.batch * args.steps / 1e15:.4g} PFLOP in all "
          f"(2 for each multiply-add, 16 text tokens)\ndevice {device}, {dtype}; "
          "nothing was written")


def finish(out: Path, shown: sample.Model, train: Pictures, embedded: bool) -> None:
    """After the last step: name the samples left out, evaluate on the embedded world, say what is
    there."""
    for name, reason in train.unreadable.items():
        print(f"left out {name}: {reason}")
    if embedded:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))              # the others are done
        torch.set_num_threads(ranks_here * torch.get_num_threads())
        evaluate.evaluate_folder(shown, out)
    print(f"{out} has the checkpoint, log.jsonl, curves.png and grids of pictures; try\n"
          f"python sample.py --checkpoint {out} --prompt \"{shown.config['prompts'][0]}\"")


def model_to_show(run: Run, args: Args, encoder, bins: binning.Bins | None, val: Pictures,
                  device) -> sample.Model:
    """What grids are drawn with: the moving average and, for latents, the VAE, loaded at once and
    not when the first grid is drawn; a T5 then has read what grid and probe show and is freed."""
    shown = sample.Model(run.average, run.config, encoder, bins, device, precision=args.precision)
    if run.config.get("vae"):
        shown.vae = VAE(run.config["vae"])
        shown.vae.load()
        encoder.device = device
        encoder.states([*run.config["prompts"], *(texts[0] for texts in val.captions[:48])])
        encoder.free()
    return shown


def main(argv=None):
    """The command line: the whole run, in the order in which things happen."""
    args = read_args(argv)
    if not args.recompute:
        keep_freed_memory()
    device, rank, world = start_ranks()
    out, dtype = Path(args.out), precision(args.precision, device)
    if args.dry_run:
        return dry_run(args, device, dtype)
    train, val, s_train, s_val, bins, encoder = prepare_data(args, rank)
    config = describe(args, train, val, s_train, bins, encoder)
    run = build(args, config, device, world, dtype)
    shown = model_to_show(run, args, encoder, bins, val, device) if rank == 0 else None
    source, source_val = source_of(run.config, s_train), source_of(run.config, s_val)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_head(out, run.config, run.start)

    mses, times, began, logged = [], [], time.time(), run.start
    bar = tqdm(total=args.steps, initial=run.start, desc="training", unit="step", disable=rank > 0)
    stream = batches(train, args.seed, run.start, args.steps, args.batch, rank, world, args.workers)
    for step, data in enumerate(stream, run.start):
        batch = make_batch(data, train, encoder, args, source, device)
        try:
            mse, norm = train_step(run, args, step, batch, world, dtype)
        except FloatingPointError as error:
            bar.close()
            raise ValueError(f"the loss is not finite at step {step}; the last good checkpoint is "
                             f"{newest_state(out)}: lower --lr or change --precision") from error
        mses, times, done = [*mses, mse], [*times, batch[2]], step + 1
        bar.update()
        if done % args.log_every == 0 or done == args.steps:
            loss, by_t = summary(torch.cat(mses), torch.cat(times), world)
            rate = (done - logged) * args.batch / (time.time() - began)
            mses, times, began, logged = [], [], time.time(), done
            if rank == 0:
                quarters = " ".join("  -  " if value is None else f"{value:.3f}" for value in by_t)
                tqdm.write(f"step {done:6d}  loss {loss:.4f}  by t {quarters}  norm {norm:6.3f}  "
                           f"lr x {schedule(step, args):5.3f}  {rate:6.0f} img/s")
                append(out, dict(step=done, loss=loss, by_t=by_t, norm=norm, rate=rate))
        paused = time.time()
        if rank == 0 and (done % args.sample_every == 0 or done == args.steps):
            val_loss = validate(run, val, encoder, args, source_val, device)
            reached = probe(shown, val)
            tqdm.write(f"step {done:6d}  validation {val_loss:.4f}  at all=1: "
                       + "  ".join(f"{name} {value:.3g}" for name, value in reached.items()))
            append(out, dict(step=done, val=val_loss, reached=reached,
                             minutes=bar.format_dict["elapsed"] / 60))
            grid = sample.progress_grid(shown)
            write_whole(out / f"grid-{done:06d}.png", lambda path: grid.save(path, "png"))
            draw_curves(out)
        if rank == 0:
            save_due(out, done, run, args)
        began += time.time() - paused                          # img/s counts training alone
    bar.close()
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        finish(out, shown, train, embedded=args.data is None)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:            # a user's mistake: one sentence, no traceback
        print(error, file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError as error:
        print(f"the GPU's memory is full ({first_line(error)}): pass a larger --accumulate, or "
              "--recompute", file=sys.stderr)
        sys.exit(2)
