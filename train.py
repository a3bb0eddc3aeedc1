"""Train MIRO. With no argument: make, score and bin the embedded world, train, show the pictures.

    python train.py                                      # the whole main job, minutes on a laptop
    python train.py --rewards none --out runs/baseline   # the paper's baseline
    torchrun --standalone --nproc-per-node=8 train.py --data DATA --out runs/mine --batch 1024

The same command again resumes: on a CPU bit for bit, on a GPU up to the order of its sums. Every
random number of a sample (noise, time, coins) is drawn from (seed, position in the stream), so
neither ranks nor workers nor accumulation change the result.
"""
import argparse
import copy
import ctypes
import hashlib
import json
import math
import os
import pickle
import platform
import shlex
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
from tqdm import tqdm

import binning
import evaluate
import flow
import model
import rewards
import sample
import shapes
from data import (PRECISIONS, T5, VAE, Data, Order, Shard, UserError, Words, best_device,
                  first_line, pad, precision, refuse_too_many, run, span, stream, write_text,
                  write_whole)


def flag(default, words: str, low: float = 0, high: float = 2 ** 62):
    """A field of Args: its default, its line of --help, and the least and largest it can be."""
    return field(default=default, metadata=dict(help=words, low=low, high=high))


@dataclass
class Args:
    """The flags, beside those of the network (model.Config); None takes the preset's recipe."""
    preset: str = flag("shapes", "shapes or paper: the network and its recipe")
    data: str = flag(None, "DATA of data.py; default: the embedded world, in runs/world")
    out: str = flag(None, "folder of the run; default: runs/PRESET")
    rewards: str = flag("all", "all, none, or a,b,c: what the network is told")
    steps: int = flag(None, "optimizer steps", 1)
    batch: int = flag(None, "samples a step, over all ranks", 1)
    accumulate: int = flag(1, "micro-batches a step and rank", 1)
    optimizer: str = flag(None, "muon, adamw or lamb (the paper's)")
    lr: float = flag(None, "peak learning rate (muon: of all but inner matrices)")
    matrix_lr: float = flag(None, "muon: of the matrices of the inner layers")
    weight_decay: float = flag(None, "of the optimizer")
    warmup: int = flag(None, "steps of linear warm-up")
    cosine_rate: float = flag(None, "share of the half cosine that is run through", 0, 1)
    clip: float = flag(2.0, "largest norm of the gradient")
    ema: float = flag(None, "decay of the averaged weights, per step", 0, 1)
    t_mean: float = flag(None, "mean of logit(t): 0 the release's, above 0 nearer to noise", -9, 9)
    self_condition: float = flag(None, "share of samples that start from their latents", 0, 1)
    reward_dropout: float = flag(0.0, "share of reward levels withheld", 0, 1)
    text_dropout: float = flag(0.0, "share of captions replaced by the empty one", 0, 1)
    bins: int = flag(None, "reward levels", 2, 2 ** 16)
    world: int = flag(10000, "pictures of the embedded world", 1)
    val: int = flag(256, "samples kept out for validation, at most a tenth of all", 1)
    seed: int = flag(0, "of weights, order and noise (the embedded world has its own)")
    precision: str = flag("auto", "fp32 or bf16; auto: bf16 on CUDA, else fp32")
    compile: bool = flag(False, "torch.compile")
    workers: int = flag(None, "processes that make batches, per rank")
    text_encoder: str = flag(None, "latents: where the T5 of the encoded DATA is now")
    vae: str = flag(None, "latents: where its VAE is now")
    log_every: int = flag(50, "steps between lines of the log", 1)
    save_every: int = flag(None, "steps between checkpoints", 1)
    keep_every: int = flag(0, "steps between checkpoints that stay, to be compared; 0: none")
    sample_every: int = flag(None, "steps between validation and the grid", 1)
    dry_run: bool = flag(False, "say what would be done, and stop")


RECIPES = {
    # Found by trials on two CPU cores: docs/trials.md.
    "shapes": dict(steps=1150, batch=64, optimizer="muon", lr=2e-3, matrix_lr=1e-2, warmup=50,
                   weight_decay=0.0, cosine_rate=1.0, ema=0.995, t_mean=1.2, self_condition=0.0,
                   bins=5, workers=0, save_every=250, sample_every=500),
    # The release's, line by line, but for the last three.
    "paper": dict(steps=500_000, batch=1024, optimizer="lamb", lr=1e-3, matrix_lr=0.0, warmup=5000,
                  weight_decay=0.01, cosine_rate=0.8, ema=0.9999, t_mean=0.0, self_condition=0.9,
                  bins=64, workers=8, save_every=5000, sample_every=10_000),
}
FREE = ("data", "out", "accumulate", "compile", "workers", "log_every", "save_every",
        "keep_every", "sample_every", "text_encoder", "vae", "dry_run")   # may change on resuming
DERIVED = ("rewards", "channels", "size", "text_dim")    # of model.Config: the data say these


# ------------------------------------------------------------------------------------------ the run

def main(argv=None):
    """The whole run, in the order in which things happen."""
    args, network = read_args(argv)
    device, rank, ranks = start_ranks()
    out, dtype = Path(args.out), precision(args.precision, device)
    if args.dry_run:
        return dry_run(args, network, device, dtype) if rank == 0 else None
    keep_freed_memory()
    data, bins = prepare(args, rank)
    encoder = encoder_for(args, data)
    config = describe(args, network, data, bins, encoder)
    batches = Batches(args, config, data, bins, encoder, rank, ranks)
    config["prompts"] = config["prompts"] or batches.held_out_captions()[:6]
    config["data"] = batches.digest()
    state = start(args, config, device, ranks, dtype)
    shown = model_to_show(state, args, encoder, bins, batches, device) if rank == 0 else None
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_head(out, state.config, state.start)
        unseen = not (out / f"grid-{state.start:06d}.png").exists()
        if state.start and unseen and due(state.start, args.sample_every, args):
            show(out, state.start, state, shown, args, batches, device)   # a kill came before it

    losses, began = [], time.time()
    bar = tqdm(total=args.steps, initial=state.start, desc="training", unit="step",
               disable=True if rank else None)                 # None: where there is no terminal
    for step, batch in enumerate(batches.loader(state.start), state.start):
        try:
            batch = on_device(batch, device)
            mse, norm = train_step(state, args, step, batch, ranks, dtype)
        except FloatingPointError as error:
            newest = max(out.glob("state-*.pt"), default="none")
            raise UserError(f"the gradient is not finite at step {step}; the last good checkpoint "
                            f"is {newest}: lower --lr or change --precision") from error
        done = step + 1
        bar.update()
        losses.append((mse, batch[2]))
        if due(done, args.log_every, args):
            rate = len(losses) * args.batch / (time.time() - began)
            write_line(out, done, losses, norm, rate, rank)
            losses, began = [], time.time()
        paused = time.time()
        if rank == 0 and due(done, args.keep_every, args):
            save_pair(out / f"step-{done:06d}", done, state)
        if rank == 0 and due(done, args.save_every, args):
            save_checkpoint(out, done, state)
        if rank == 0 and due(done, args.sample_every, args):
            show(out, done, state, shown, args, batches, device)
        began += time.time() - paused                          # img/s counts training alone
    bar.close()
    if ranks > 1:
        dist.destroy_process_group()
    if rank == 0:
        finish(out, shown, embedded=args.data is None)


def due(done: int, every: int, args: Args) -> bool:
    """Is something that is done each so many steps, and at the end, due? 0: never."""
    return every > 0 and (done % every == 0 or done == args.steps)


def train_step(state: "State", args: Args, step: int, batch: list, ranks: int, dtype) -> tuple:
    """One optimizer step on this rank's share of the batch: (mse (b,), gradient norm).

    Micro-batches add up to the gradient of the whole share, and DDP averages it over the ranks.
    Raises FloatingPointError if the gradient is not finite (fp16: its scaler skips such steps and
    halves its scale, until that has come down to 1).
    """
    share, mses = len(batch[0]), []
    size = share // args.accumulate
    for first in range(0, share, size):
        micro = [tensor[first:first + size] for tensor in batch]
        quiet = state.model.no_sync() if ranks > 1 and first + size < share else nullcontext()
        with quiet, torch.autocast(micro[0].device.type, dtype, enabled=dtype != torch.float32):
            mse, weighted = flow.loss(state.model, *micro)                       # (b,), (b,)
            state.scaler.scale(weighted.sum() / share).backward()
        mses.append(mse.detach())
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.net.parameters(), args.clip)
    if not torch.isfinite(norm) and state.scaler.get_scale() <= 1:
        raise FloatingPointError
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, args)
        if torch.isfinite(norm):            # fp16: a step that overflowed is skipped as a whole
            state.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    state.scaler.update()
    decay = min(args.ema, (1 + step) / (10 + step))           # the average forgets the start sooner
    with torch.no_grad():
        torch._foreach_lerp_(list(state.average.parameters()), list(state.net.parameters()),
                             1 - decay)
    return torch.cat(mses), float(norm)


def schedule(step: int, args: Args) -> float:
    """Linear warm-up, then cosine_rate of half a cosine: the factor of the learning rate."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return 0.5 * (1 + math.cos(args.cosine_rate * math.pi * done))


# ------------------------------------------------------------------------------------- the batches

class Batches(torch.utils.data.Dataset):
    """Step → this rank's share of the batch, as flow.loss takes it: x_0, eps, t, s, text,
    text_mask, self_condition. Workers make it whole; the loop only moves it.

    A sample is a function of (seed, position): its row (Order), caption, noise, time and coins.
    Samples that lack a score are in no batch, nor are those kept out, which validate.
    """

    def __init__(self, args: Args, config: dict, data: Data, bins, encoder, rank=0, ranks=1):
        self.args, self.data, self.bins, self.encoder = args, data, bins, encoder
        self.rank, self.share = rank, args.batch // ranks
        self.shape = (config["network"]["channels"], data.side, data.side)
        self.mean, self.std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        self.known = {}                   # shard → scores of its pairs, of those of a window
        names = binning.scored_names(data.path)
        self.unscored = [unscored(shard, names) for shard in data.shards]    # rows, ascending
        self.without = list(self.unscored)                 # and those that validate, from below on
        self.held_out = self.keep_out()
        for number, row in self.held_out:
            self.without[number] = np.union1d(self.without[number], [row])
        self.order = Order([shard.rows - len(rows) for shard, rows in
                            zip(data.shards, self.without)], args.seed)

    def keep_out(self) -> list[tuple[int, int]]:
        """Shard and row of the samples that validate. They are chosen among all samples, scored or
        not: one without scores is left out and moves no other, and a baseline has the same."""
        counts = np.array([shard.rows for shard in self.data.shards])
        ends, rows = np.cumsum(counts), self.data.rows
        number = min(self.args.val, max(1, rows // 10))
        chosen = stream(self.args.seed, "validation").choice(rows, number, replace=False)
        shards = np.searchsorted(ends, chosen, side="right")
        places = zip(shards.tolist(), (chosen - ends[shards] + counts[shards]).tolist())
        kept = [(shard, row) for shard, row in places if row not in self.without[shard]]
        left = rows - sum(map(len, self.without)) - len(kept)
        if not kept or left < 1:
            raise UserError(f"{self.data.path} has {left} samples with all scores to train on and "
                            f"{len(kept)} to validate on: at least 1 of each is needed")
        return kept

    def digest(self) -> str:
        """16 hex digits of the samples and of those without scores: a run resumes on the same, and
        runs of several seeds, which keep out others, are of the same data."""
        found = hashlib.sha256(" ".join(shard.digest for shard in self.data.shards).encode())
        for rows in self.unscored:
            found.update(rows.tobytes() + b" ")
        return found.hexdigest()[:16]

    def held_out_captions(self) -> list[str]:
        """The first captions of up to 48 samples that were kept out."""
        return [self.data.shards[number].caption(span(self.data.shards[number].pair_ends, row)[0])
                for number, row in self.held_out[:48]]

    def loader(self, first: int) -> torch.utils.data.DataLoader:
        """The steps from `first` on."""
        fork = "fork" if self.args.workers and sys.platform == "linux" else None
        return torch.utils.data.DataLoader(
            self, batch_size=None, sampler=range(first, self.args.steps),
            num_workers=self.args.workers, multiprocessing_context=fork,
            generator=torch.Generator())                # its own: the run's stream is left alone

    def __getitem__(self, step: int) -> list:
        positions = step * self.args.batch + self.rank * self.share + np.arange(self.share)
        shards, rows = self.order.at(positions)
        rows = [int(skip(self.without[shard], row)) for shard, row in zip(shards, rows)]
        return self.batch(list(zip(shards.tolist(), rows)), positions.tolist(), self.args)

    def batch(self, places: list, positions: list, args: Args) -> list:
        """The samples at these (shard, row), with all that is drawn at these positions."""
        samples = [self.sample(*place, p, args) for place, p in zip(places, positions)]
        x_0, eps, raw, withheld, text, coins = zip(*samples)
        x_0 = (torch.from_numpy(np.stack(x_0)) - self.mean) / self.std           # (B, C, S, S)
        normal, self_condition = torch.tensor(coins, dtype=torch.float32).T      # (B,) each
        text, text_mask = pad(text)                                              # (B, L, E), (B, L)
        s = self.bins.to_target(np.stack(raw)) if self.bins else np.stack(raw)   # (B, R)
        s[np.stack(withheld)] = np.nan                                           # not asked for
        return [x_0, torch.from_numpy(np.stack(eps)), flow.logit_normal(normal, args.t_mean),
                torch.from_numpy(s), text, text_mask, self_condition < args.self_condition]

    def sample(self, number: int, row: int, position: int, args: Args) -> tuple:
        """One sample: x_0 and eps (C, S, S), scores (R,) and which of them are withheld, text
        (L, E), its normal of t and its coin of self-conditioning.

        Its draws depend on (seed, position) alone: two ranks, more workers, a resumed run draw the
        same.
        """
        shard, rng = self.data.shards[number], stream(args.seed, "draws", position)
        eps, normal = rng.standard_normal(self.shape, np.float32), rng.standard_normal()
        caption, empty, coin = rng.random(3)
        first, last = span(shard.pair_ends, row)
        pair = first + int(caption * (last - first))                 # each caption as often
        raw = self.scores(number)[pair]                              # rewards move with the text
        withheld = rng.random(len(raw)) < args.reward_dropout
        empty = empty < args.text_dropout
        if self.data.kind == "latents":
            mean, std = (shard.read(name, row, row + 1)[0].astype(np.float32)
                         for name in ("mean", "std"))                # x_0 is drawn from the VAE's
            noise = stream(args.seed, "latents", position).standard_normal(self.shape)
            x_0 = mean + std * noise.astype(np.float32)
            text = torch.from_numpy(shard.read("empty") if empty else shard.text(pair))
        else:
            x_0 = shard.read("pixels", row, row + 1)[0].astype(np.float32)
            [text] = self.encoder.states(["" if empty else shard.caption(pair)])
        return x_0, eps, raw, withheld, text, (normal, coin)

    def scores(self, number: int) -> np.ndarray:
        """The scores (P, R) of the pairs of a shard, kept while its window lasts."""
        if number not in self.known:
            if len(self.known) >= self.order.window:              # a window never needs more
                oldest = next(iter(self.known))
                del self.known[oldest]
                self.data.shards[oldest].close()
            shard, names = self.data.shards[number], self.bins.names if self.bins else ()
            self.known[number] = (rewards.read_scores(shard, names) if names else
                                  np.zeros((shard.pairs, 0), np.float32))
        return self.known[number]


def unscored(shard: Shard, names: tuple) -> np.ndarray:
    """The rows of a shard that lack one of these scores, ascending: its header says which."""
    failed = rewards.read_header(shard)["failed"] if names else {}
    return np.array(sorted({int(row) for name in names for row in failed.get(name, ())}), np.int64)


def skip(without: np.ndarray, row: int) -> int:
    """The row-th of the rows that are not in `without`, which ascends."""
    return row + np.searchsorted(without - np.arange(len(without)), row, side="right")


def on_device(batch: list, device) -> list:
    """A batch where the network is; the text of latents is float16 until here."""
    x_0, eps, t, s, text, text_mask, coin = (tensor.to(device) for tensor in batch)
    return [x_0, eps, t, s, text.float(), text_mask, coin]


# ---------------------------------------------------------------------------------------- the data

def prepare(args: Args, rank: int) -> tuple:
    """DATA, and the Bins of the rewards asked for; rank 0 makes what is missing, the others wait.

    UserError: the data do not fit the preset, or lack a reward."""
    path = args.data or "runs/world"
    if rank == 0 and args.data is None:
        shapes.write_world(path, args.world, seed=0)
    if dist.is_initialized():
        dist.barrier()
    data = Data(path)
    needed = "pixels" if model.PRESETS[args.preset]["channels"] == 3 else "latents"
    if data.kind != needed:
        command = {"pixels": "import", "latents": "encode"}[needed]
        raise UserError(f"--preset {args.preset} trains on {needed}, and {path} has {data.kind}: "
                        f"make it with python data.py {command}")
    if args.rewards == "none":
        return data, None
    if rank == 0:
        names = binning.scored_names(path) or rewards.default_rewards(data.shards[0].captions)
        if "world" in data.info:                          # a reward added to the world's is scored
            names = tuple(dict.fromkeys((*names, *shapes.ANALYTIC)))
        own = [name for name in names if name in shapes.ANALYTIC]    # networks: rewards.py's
        failed = rewards.score_dataset(data, own) if own else {}
        refuse_too_many(len(failed), data.rows, path, "python rewards.py lists them")
        binning.fitted(path, binning.scored_names(path), args.bins)
    if dist.is_initialized():
        dist.barrier()
    scored = binning.scored_names(path)
    asked = scored if args.rewards == "all" else rewards.choose_rewards(args.rewards, data)
    for name in asked:
        if name not in scored:
            raise UserError(f"{path} has no scores of {name}: make them with python rewards.py "
                            f"{path} --rewards {name}")
    return data, binning.fitted(path, scored, args.bins).select(asked)


def encoder_for(args: Args, data: Data) -> Words | T5:
    """The text encoder: the words of the data, or the T5 that encoded it."""
    if data.kind == "latents":
        there = data.info["text_encoder"]
        return T5(args.text_encoder or there["source"], there["dim"], there["length"])
    width = model.PRESETS[args.preset]["text_dim"]
    return Words(data.info["words"], width, data.info["longest"] + 1)      # room for one more


def describe(args: Args, network: dict, data: Data, bins, encoder) -> dict:
    """config.json: everything that sampling needs, and the flags of the run."""
    mean, std = data.mean_std()                                                  # (C,) each
    if data.info.get("scaling_factor") == VAE.SCALING_FACTOR:        # SDXL's: as the release
        mean, std = np.array(VAE.MEAN), np.array(VAE.STD)
    std = np.where(std > 0, std, 1.0)                    # a channel that is the same everywhere
    names = list(bins.names) if bins else []
    network = network | dict(rewards=names, channels=data.channels, size=data.side,
                             text_dim=encoder.dim)
    check_patch(network["patch"], data.side)
    world = "world" in data.info
    said = asdict(args) | {key: network[key] for key in network if key not in DERIVED}
    return dict(
        format=1, time="t = 0 is data, t = 1 is noise", network=network,
        mean=mean.tolist(),                  # per channel, of pixels in 0..255 or of VAE latents
        std=(std / network["sigma_data"]).tolist(),
        text_encoder=encoder.config(), vae=args.vae or data.info.get("vae"),
        bins=bins.to_config() if bins else None,
        prompts=[shapes.prompts(task, 1, 0)[0] for task in shapes.TASKS] if world else [],
        sampler=sample.SAMPLERS[args.preset] | ({} if bins else dict(guidance=0.0)),   # no s⁻
        targets=sample.WORLD_TARGETS if world and names == [*shapes.ANALYTIC] else [],
        args={key: value for key, value in said.items() if key not in FREE})


# --------------------------------------------------------------------------- network and optimizers

@dataclass
class State:
    """A network in training with everything that a checkpoint holds."""
    net: torch.nn.Module
    average: torch.nn.Module         # the averaged weights (EMA)
    model: torch.nn.Module           # net, compiled and distributed
    optimizers: list
    scaler: torch.amp.GradScaler     # of fp16
    config: dict
    start: int                       # the first step to do


def start(args: Args, config: dict, device: torch.device, ranks: int, dtype) -> State:
    """The network, new or as the last checkpoint in --out left it."""
    found = load_checkpoint(Path(args.out))
    if found:
        same_run(found["config"], config, Path(args.out))
        config = found["config"] | {key: config[key] for key in ("text_encoder", "vae")}
    torch.manual_seed(args.seed)                                        # of the initial weights
    net = model.build(config["network"]).to(device)
    average = copy.deepcopy(net).requires_grad_(False)
    optimizers = optimizers_for(net, args)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if found:
        net.load_state_dict(found["net"])
        average.load_state_dict(found["average"])
        if found["scaler"]:                  # {}: until here in fp32 or bf16, on another machine
            scaler.load_state_dict(found["scaler"])
        for optimizer, before in zip(optimizers, found["optimizers"]):
            optimizer.load_state_dict(before)
    trained = torch.compile(net) if args.compile else net     # net keeps its names: no _orig_mod
    if ranks > 1:
        # Buffers are constants. Sent at each forward pass, those of the pass of self-conditioning,
        # which some ranks have and some have not, would meet what other ranks send.
        trained = DistributedDataParallel(trained, [device.index] if device.type == "cuda"
                                          else None, broadcast_buffers=False)
    return State(net, average, trained, optimizers, scaler, config, found["step"] if found else 0)


def optimizers_for(net: torch.nn.Module, args: Args) -> list:
    """One optimizer, or with muon two.

    muon: Muon with decay for the matrices of the inner layers, AdamW without for the rest. adamw:
    norms, biases and learned tokens are not decayed. lamb (You et al. 2020) is timm's as the
    release runs its own: no decay and no trust ratio for norms and biases, but both for learned
    tokens and all of the log-variance; the decay is part of the step that is scaled.
    """
    if args.optimizer == "muon":
        inner = net.inner_matrices()
        found = [Muon(inner, args.matrix_lr, weight_decay=args.weight_decay),
                 torch.optim.AdamW(others(net, inner), args.lr, (0.9, 0.99), weight_decay=0.0)]
    elif args.optimizer == "lamb":
        from timm.optim import Lamb                              # here: timm takes a second to load
        plain = net.norms_and_biases()
        groups = [dict(params=others(net, plain), weight_decay=args.weight_decay,
                       always_adapt=True), dict(params=plain, weight_decay=0.0)]
        found = [Lamb(groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=None)]
    else:
        weights = [p for name, p in net.named_parameters() if name.endswith("weight")
                   and p.ndim == 2]
        groups = [dict(params=weights, weight_decay=args.weight_decay),
                  dict(params=others(net, weights), weight_decay=0.0)]
        found = [torch.optim.AdamW(groups, lr=args.lr)]
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


def others(net: torch.nn.Module, chosen: list) -> list:
    """The parameters that are not among those chosen."""
    known = {id(p) for p in chosen}
    return [p for p in net.parameters() if id(p) not in known]


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


def keep_freed_memory() -> None:
    """Tell the C library to keep what tensors free. It hands large buffers back to the system, and
    taking them anew costs a page fault per 4 KiB: up to a quarter of a training step on a CPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):                                        # glibc, not macOS or musl
        libc.mallopt(-3, 2 ** 30) or libc.mallopt(-3, 2 ** 25)    # M_MMAP_THRESHOLD; older's limit
        libc.mallopt(-1, 2 ** 31 - 1)                             # M_TRIM_THRESHOLD
        libc.mallopt(-2, 2 ** 28)                                 # M_TOP_PAD


def start_ranks() -> tuple:
    """(device, rank, ranks): one process alone, or torchrun's, over nccl on CUDA and gloo else."""
    device = best_device()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=2))       # rank 0 may score for a while
    return device, rank, ranks


# ------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(out: Path, step: int, state: State) -> None:
    """state-STEP.pt to resume from (the newest two stay), and the pair that sample.py reads."""
    save_pair(out, step, state)
    content = dict(step=step, config=state.config, net=state.net.state_dict(),
                   average=state.average.state_dict(), scaler=state.scaler.state_dict(),
                   optimizers=[optimizer.state_dict() for optimizer in state.optimizers])
    # Last: a kill before this line repeats the steps and writes all three again.
    write_whole(out / f"state-{step:08d}.pt", partial(write_state, content))
    for old in sorted(out.glob("state-*.pt"))[:-2]:
        old.unlink()


def write_state(content: dict, path: Path) -> None:
    """torch.save, which hides why it could not write. OSError: it could not."""
    try:
        torch.save(content, path)
    except RuntimeError as error:
        raise OSError(f"is the disk full? {first_line(error)}") from error


def save_pair(folder: Path, step: int, state: State) -> None:
    """What sample.py reads: model.safetensors, the averaged weights, with config.json."""
    folder.mkdir(exist_ok=True)
    weights = {name: w.contiguous().cpu() for name, w in state.average.state_dict().items()}
    write_whole(folder / "model.safetensors", partial(save_file, weights))
    write_text(folder / "config.json", json.dumps(state.config | dict(step=step)))


def load_checkpoint(out: Path) -> dict | None:
    """The newest state that can be read, None if there is none. Tensors and plain types alone.

    UserError: there are states and none can be read."""
    states = sorted(out.glob("state-*.pt"), reverse=True)
    for path in states:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            return {key: found[key] for key in ("step", "config", "net", "average", "scaler",
                                                "optimizers")}
        # What torch.load raises on damaged files (700 were tried); all of it means "unreadable".
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, LookupError, ValueError,
                TypeError) as error:
            print(f"{path} cannot be read ({first_line(error)}): trying the one before",
                  file=sys.stderr)
    if states:
        raise UserError(f"no checkpoint in {out} can be read: remove the folder or pass --out")
    return None


def same_run(found: dict, wanted: dict, out: Path) -> None:
    """Resume only what the same flags began on the same data; a flag that an old run does not know
    means its default. UserError, naming the first that differs."""
    defaults = {one.name: one.default for one in (*fields(Args), *fields(model.Config))}
    for key, value in wanted["args"].items():
        before = (found["network"] | found["args"]).get(key, defaults[key])
        if before != value:
            raise UserError(f"{out} was trained with --{key.replace('_', '-')} {before}, not "
                            f"{value}: pass --out for another folder, or the same flags")
    found_text, wanted_text = (dict(config["text_encoder"], source=None)      # it may have moved
                               for config in (found, wanted))
    same = dict(data=found.get("data") == wanted["data"], bins=found["bins"] == wanted["bins"],
                text_encoder=found_text == wanted_text)
    for key, holds in same.items():
        if not holds:
            raise UserError(f"{out} was begun on other pictures, captions or scores ({key} have "
                            "changed): pass --out for another folder")


# ----------------------------------------------------------------------------------------- the log

def write_head(out: Path, config: dict, first: int) -> None:
    """The first line of log.jsonl: config, versions and the source that runs; later, a resume."""
    head = dict(resume=first)
    if first == 0:
        sources = {p.name: p.read_text(encoding="utf-8")
                   for p in sorted(Path(__file__).parent.glob("*.py"))}
        head = dict(config=config, source=sources, machine=platform.platform(), versions=dict(
            python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))
        (out / "log.jsonl").unlink(missing_ok=True)
    elif (out / "log.jsonl").exists():                       # a kill may have cut the last line
        lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines(True)
        write_text(out / "log.jsonl", "".join(line for line in lines if line.endswith("\n")))
    append(out, head)


def append(out: Path, line: dict) -> None:
    """One more line of log.jsonl."""
    with open(out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def write_line(out: Path, done: int, losses: list, norm: float, rate: float, rank: int) -> None:
    """The mean loss over all ranks, and by quarters of t, to the terminal and log.jsonl.
    losses: mse (b,) and t (b,) of each step since the last line."""
    mse, t = (torch.cat(column) for column in zip(*losses))
    quarter = torch.nn.functional.one_hot((4 * t).long().clamp(max=3), 4).float()    # (n, 4)
    sums = torch.stack([mse @ quarter, quarter.sum(0)])                          # (2, 4)
    if dist.is_initialized():
        dist.all_reduce(sums)
    by_t = [round(total / n, 5) if n else None for total, n in sums.T.tolist()]
    loss = float(sums[0].sum() / sums[1].sum())
    if rank == 0:
        quarters = " ".join("  -  " if value is None else f"{value:.3f}" for value in by_t)
        tqdm.write(f"step {done:6d}  loss {loss:.4f}  by t {quarters}  norm {norm:6.3f}  "
                   f"{rate:6.0f} img/s")
        append(out, dict(step=done, loss=loss, by_t=by_t, norm=norm, rate=rate))


def model_to_show(state: State, args: Args, encoder, bins, batches: Batches,
                  device) -> sample.Model:
    """What grids are drawn with: the moving average and, for latents, the VAE, loaded at once and
    not when the first grid is drawn; a T5 then has read what grid and probe show and is freed."""
    shown = sample.Model(state.average, state.config, encoder, bins, device,
                         precision=args.precision)
    if state.config["vae"]:
        shown.vae = VAE(state.config["vae"])
        shown.vae.load()
        encoder.device = device
        encoder.states([*state.config["prompts"], *batches.held_out_captions()])
        encoder.free()
    return shown


def show(out: Path, done: int, state: State, shown: sample.Model, args: Args, batches: Batches,
         device) -> None:
    """Validation, the mean native rewards of up to 48 pictures at all=1 of captions that were kept
    out (what a reader of the curves waits for), the curves and the grid."""
    texts = batches.held_out_captions()
    names = rewards.default_rewards(texts)
    pictures = sample.pictures(shown, texts, ["all=1"] if shown.rewards else [])
    reached = dict(zip(names, shapes.score_all(names, pictures, texts).mean(0).tolist()))
    loss = validate(state, batches, args, device)
    tqdm.write(f"step {done:6d}  validation {loss:.4f}  at all=1: "
               + "  ".join(f"{name} {value:.3g}" for name, value in reached.items()))
    append(out, dict(step=done, val=loss, reached=reached))
    draw_curves(out)
    grid = sample.progress_grid(shown)       # last: where it is, the rest is, too
    write_whole(out / f"grid-{done:06d}.png", partial(grid.save, format="png"))


@torch.no_grad()
def validate(state: State, batches: Batches, args: Args, device) -> float:
    """Mean squared error of the averaged weights on the samples kept out: fixed noise and times,
    true scores, no dropout, latents handed on as in sampling."""
    steady = replace(args, text_dropout=0.0, reward_dropout=0.0,
                     self_condition=float(args.self_condition > 0))
    errors = []
    for first in range(0, len(batches.held_out), 64):
        places = batches.held_out[first:first + 64]
        positions = [2 ** 62 + first + i for i in range(len(places))]   # far beyond training's
        batch = on_device(batches.batch(places, positions, steady), device)
        errors.append(flow.loss(state.average, *batch)[0])                       # (b,)
    return float(torch.cat(errors).mean())


def draw_curves(out: Path) -> None:
    """curves.png: the loss, by quarters of t, and the rewards reached at all=1 against steps."""
    from matplotlib.figure import Figure                       # here: sampling never draws curves
    lines = [json.loads(line) for line in
             (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line for line in lines if "loss" in line}       # a resume logs twice
    tested = {line["step"]: line for line in lines if "val" in line}
    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.semilogy(losses.keys(), [line["loss"] for line in losses.values()], label="training")
    left.semilogy(tested.keys(), [line["val"] for line in tested.values()], "o-",
                  label="validation (EMA)")
    for quarter in range(4):
        middle.semilogy(losses.keys(), [line["by_t"][quarter] for line in losses.values()],
                        label=f"t in [{quarter / 4:g}, {quarter / 4 + 0.25:g}]")
    for name in [*tested.values()][-1]["reached"]:
        values = np.array([line["reached"].get(name, np.nan) for line in tested.values()])
        highest = max(1e-9, np.nanmax(np.abs(values)))
        right.plot(tested.keys(), values / highest, "o-", label=f"{name} (1 = {highest:.3g})")
    for axis, words in ((left, "mean squared error of v"), (middle, "by quarters of t"),
                        (right, "reached at all=1, of its highest")):
        axis.set(xlabel="step", ylabel=words)
        axis.legend()
    write_whole(out / "curves.png", partial(figure.savefig, format="png"))


def finish(out: Path, shown: sample.Model, embedded: bool) -> None:
    """After the last step: evaluate on the embedded world, say what is there."""
    if embedded:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))              # the others are done
        torch.set_num_threads(ranks_here * torch.get_num_threads())
        evaluate.evaluate_folder(shown, out)
    print(f"{out} has the checkpoint, log.jsonl, curves.png and grids of pictures; try\n"
          f"python sample.py --checkpoint {shlex.quote(str(out))} --prompt "
          f"{shlex.quote(shown.config['prompts'][0])}")


# --------------------------------------------------------------------------------------- the flags

def read_args(argv=None) -> tuple[Args, dict]:
    """The flags over the preset's recipe and network: Args, and the fields of model.Config that
    the data do not say. UserError on what cannot be."""
    parser = argparse.ArgumentParser(description="train MIRO; no argument runs the whole main job")
    presets = {name: model.PRESETS[name] | RECIPES[name] for name in RECIPES}
    sizes = [one for one in fields(model.Config) if one.name not in DERIVED]
    for one in (*fields(Args), *sizes):
        words = one.metadata.get("help", "of the network: see Config in model.py")
        values = [f"{name} {its[one.name]}" for name, its in presets.items() if one.name in its]
        if one.metadata.get("low") is not None and one.default is not None:
            values = [str(one.default)]
        how = dict(action=argparse.BooleanOptionalAction) if one.type is bool else dict(
            type=one.type)
        parser.add_argument("--" + one.name.replace("_", "-"), **how,
                            help=f"{words} (default: {', '.join(values)})" if values else words)
    given = {key: value for key, value in vars(parser.parse_args(argv)).items()
             if value is not None}
    preset = given.get("preset", "shapes")
    if preset not in presets:
        raise UserError(f"--preset {preset}: there are {' and '.join(presets)}")
    chosen = presets[preset] | given
    args = Args(**{one.name: chosen[one.name] for one in fields(Args) if one.name in chosen})
    args.out = args.out or f"runs/{preset}"
    network = {one.name: chosen.get(one.name, one.default) for one in sizes}
    check_args(args, network)
    return args, network


def check_args(args: Args, network: dict) -> None:
    """UserError, naming the flag, for what no run could have."""
    limits = [(one.name, getattr(args, one.name), one.metadata["low"], one.metadata["high"])
              for one in fields(Args) if one.type in (int, float)]
    limits += [(key, value, 8 if key.endswith("_dim") else 1, 2 ** 31)
               for key, value in network.items() if type(value) is int]
    limits += [(key, network[key], low, 100) for key, low in (
        ("sigma_data", 0.01), ("latent_std", 0), ("patch_bias", 0))]
    for key, value, low, high in limits:
        if not low <= value <= high:                                             # not: NaN, too
            raise UserError(f"--{key.replace('_', '-')} {value}: it is at least {low} and at most "
                            f"{high:g}")
    for key, choices in (("optimizer", ("muon", "adamw", "lamb")), ("precision", PRECISIONS)):
        if getattr(args, key) not in choices:
            raise UserError(f"--{key} {getattr(args, key)}: there are {', '.join(choices)}")
    for width, heads in (("latent_dim", "heads"), ("latent_dim", "text_heads"),
                         ("latent_dim", "read_heads"), ("data_dim", "read_heads")):
        if network[width] % network[heads]:
            raise UserError(f"--{width.replace('_', '-')} {network[width]} is shared by "
                            f"{network[heads]} heads: choose a multiple of {network[heads]}")
    if network["sincos"] and network["data_dim"] % 4:
        raise UserError(f"--data-dim {network['data_dim']}: choose a multiple of 4, or --no-sincos")
    if args.rewards not in ("all", "none"):
        rewards.check_names([name.strip() for name in args.rewards.split(",")], rewards.REWARDS)
    for folder in (Path(args.out), *Path(args.out).parents):
        if folder.is_file():
            raise UserError(f"--out {args.out}: {folder} is a file, not a folder")
    shares = int(os.environ.get("WORLD_SIZE", 1)) * args.accumulate
    if args.batch % shares:
        raise UserError(f"--batch {args.batch} is for all ranks and micro-batches together: "
                        f"choose a multiple of ranks x --accumulate = {shares}")


def check_patch(patch: int, side: int) -> None:
    """UserError: patches do not tile the data."""
    if side % patch:
        fitting = ", ".join(str(p) for p in range(2, 9) if side % p == 0)
        raise UserError(f"--patch {patch} does not divide the side {side} of the data: for example "
                        f"{fitting}")


def dry_run(args: Args, network: dict, device, dtype) -> None:
    """Say what a run would be: the recipe, the network's size and cost. Writes nothing."""
    names = {"none": (), "all": rewards.PAPER if args.preset == "paper" else shapes.ANALYTIC}.get(
        args.rewards, tuple(args.rewards.split(",")))
    sizes = model.PRESETS[args.preset] | network | dict(rewards=names)
    sizes["size"] = Data(args.data).side if args.data else sizes["size"]
    check_patch(sizes["patch"], sizes["size"])
    config = model.Config(**sizes)
    net, forward, _ = evaluate.forward_cost(config, 16)
    for key, value in (asdict(args) | network).items():
        print(f"{key:16} {value}")
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters; {forward / 1e9:.4g} GFLOP a "
          f"forward pass (2 for each multiply-add, 16 text tokens)\ndevice {device}, {dtype}; "
          "nothing was written")


if __name__ == "__main__":
    run(main)
