"""Train MIRO. With no argument: make, score and bin the embedded world, train, show the pictures.

    python train.py                                      # the whole main job, minutes on a laptop
    python train.py --rewards none --out runs/baseline   # the paper's baseline
    torchrun --standalone --nproc-per-node=8 train.py --data DATA --out runs/mine --batch 1024

The same command again resumes: on as many CPU cores bit for bit, on a GPU up to the order of its
sums. Every random number of a sample (noise, time, coins) is drawn from (seed, position in the
stream), so neither ranks nor workers nor accumulation change the result.
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
import signal
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial
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
from data import (PRECISIONS, T5, VAE, Data, Order, Parser, Shard, UserError, Words, best_device,
                  between, compiles, digest, file_digest, first_line, hold, make_folder, pad,
                  precision, rank_store, refuse_too_many, run, span, stream, write_json,
                  write_text, write_whole)


def flag(default, words: str, low: float = 0, high: float = 2 ** 62, choices=None):
    """A field of Args: its default, its line of --help, and what it can be."""
    return field(default=default, metadata=dict(help=words, low=low, high=high, choices=choices))


@dataclass
class Args:
    """The flags, beside those of the network (model.Config); None takes the preset's recipe."""
    preset: str = flag("shapes", "the network and its recipe", choices=("shapes", "paper"))
    data: str = flag(None, "DATA of data.py; default: the embedded world, in runs/world")
    out: str = flag(None, "folder of the run; default: runs/PRESET")
    rewards: str = flag("all", "all, none, or a,b,c: what the network is told")
    minutes: float = flag(None, "what all of it may take: as many steps as fit", 0.1, 1e6)
    steps: int = flag(None, "optimizer steps, instead of --minutes", 1)
    batch: int = flag(None, "samples a step, over all ranks", 1)
    accumulate: int = flag(1, "micro-batches a step and rank", 1)
    optimizer: str = flag(None, "lamb is the paper's", choices=("muon", "lamb"))
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
    wait: float = flag(10.0, "minutes that ranks wait for one that does not come", 0.01)
    seed: int = flag(0, "of weights, order and noise (the embedded world has its own)")
    precision: str = flag("auto", "auto: bf16 on CUDA, else fp32", choices=PRECISIONS)
    compile: bool = flag(None, "torch.compile of the layers; paper: on CUDA")
    workers: int = flag(None, "processes that make batches, per rank")
    text_encoder: str = flag(None, "latents: where the T5 of the encoded DATA is now")
    vae: str = flag(None, "latents: where its VAE is now")
    log_every: int = flag(50, "steps between lines of the log", 1)
    save_every: int = flag(None, "steps between checkpoints", 1)
    keep_every: int = flag(0, "steps between checkpoints that stay, to be compared; 0: none")
    sample_every: int = flag(None, "steps between validation and the grid", 1)


RECIPES = {
    # Found by trials on two CPU cores: docs/trials.md.
    "shapes": dict(minutes=10.0, batch=64, optimizer="muon", lr=2e-3, matrix_lr=6e-3, warmup=50,
                   weight_decay=0.0, cosine_rate=1.0, ema=0.995, t_mean=1.2, self_condition=0.0,
                   bins=5, workers=0, compile=False, save_every=250, sample_every=500),
    # The release's, line by line, but for the last three.
    "paper": dict(steps=500_000, batch=1024, optimizer="lamb", lr=1e-3, matrix_lr=0.0, warmup=5000,
                  weight_decay=0.01, cosine_rate=0.8, ema=0.9999, t_mean=0.0, self_condition=0.9,
                  bins=64, workers=8, save_every=5000, sample_every=10_000),
}
FREE = ("data", "out", "accumulate", "compile", "workers", "log_every", "save_every",
        "keep_every", "sample_every", "text_encoder", "vae", "wait")   # may change on resuming
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)    # end a run in good order
BEGAN = time.time() - time.process_time()       # of the process: what was imported took its time
DRAWN = 16_000       # samples to train on in the time that grids and evaluation take
DERIVED = ("rewards", "channels", "size", "text_dim")    # of model.Config: the data say these


# ------------------------------------------------------------------------------------------ the run

def main(argv=None):
    """The whole run, in the order in which things happen."""
    args, network = read_args(argv)
    device, rank, ranks = start_ranks(args.wait)
    out, dtype = make_folder(args.out), precision(args.precision, device)
    if rank == 0:
        hold(out)
    keep_freed_memory()
    data, bins = prepare(args, network, rank)
    encoder = encoder_for(args, data)
    config = describe(args, network, data, bins, encoder)
    batches = Batches(args, config, data, bins, encoder, rank, ranks)
    config["prompts"] = config["prompts"] or batches.held_out_captions()[:6]
    config["data"] = batches.digest()
    compare_ranks(config, rank, ranks)
    torch.manual_seed(args.seed)                                        # of the initial weights
    net = model.build(config["network"]).to(device)
    state = start(net, args, config, ranks)
    compare_ranks(dict(step=state.start), rank, ranks)
    fix_steps(state, args, batches, device, rank, ranks, dtype)
    if rank == 0:
        shown = model_to_show(state, args, encoder, bins, batches, device)
        write_head(out, state.config, state.start)
        unseen = not (out / f"grid-{state.start:06d}.png").exists()
        if state.start and unseen and due(state.start, args.sample_every, args):
            show(out, state.start, state, shown, args, batches, device)   # a kill came before it

    losses, began, (stops, listen_no_more) = [], time.time(), listen()
    bar = tqdm(total=args.steps, initial=state.start, desc="training", unit="step",
               disable=True if rank else None)                 # None: where there is no terminal
    for step, batch in enumerate(batches.loader(state.start), state.start):
        batch = on_device(batch, device)
        mse, norm = train_step(state, args, step, batch, ranks, dtype)
        done, stop = step + 1, agreed(stops, ranks)
        bar.update()
        losses.append((mse, batch[2]))
        if stop or any(due(done, every, args) for every in (args.log_every, args.keep_every,
                                                            args.save_every)):
            refuse_lost(state, done, out)
        if due(done, args.log_every, args):
            rate = len(losses) * args.batch / (time.time() - began)
            write_line(out, done, losses, float(norm), rate, rank)
            losses, began = [], time.time()
        paused = time.time()
        if rank == 0 and due(done, args.keep_every, args):
            save_pair(out / f"step-{done:06d}", done, state)
        if rank == 0 and (stop or due(done, args.save_every, args)):
            save_checkpoint(out, done, state)
        if stop:
            leave(stop, done, out, rank, ranks)
        if rank == 0 and due(done, args.sample_every, args):
            show(out, done, state, shown, args, batches, device)
        began += time.time() - paused                          # img/s counts training alone
    bar.close()
    listen_no_more()
    if ranks > 1:
        dist.destroy_process_group()
    if rank == 0:
        finish(out, shown, embedded=args.data is None)


def listen() -> tuple:
    """The signals of STOPS that came, from now on, and a function that ends this, as the first
    signal does: a second one ends the process at once. What is ignored stays so (nohup, &)."""
    came, before = [], {number: signal.getsignal(number) for number in STOPS
                        if signal.getsignal(number) != signal.SIG_IGN}

    def listen_no_more() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame) -> None:
        came.append(number)
        listen_no_more()

    for number in before:
        signal.signal(number, note)
    return came, listen_no_more


def agreed(came: list[int], ranks: int) -> int:
    """A signal that came to any rank, 0: none. All ranks hear of it after the same step."""
    number = torch.tensor(came[0] if came else 0)
    if ranks > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def leave(number: int, done: int, out: Path, rank: int, ranks: int) -> None:
    """End a run that a signal asks to stop, once its checkpoint is there."""
    if ranks > 1:
        dist.barrier()                    # torchrun ends all ranks when one has ended
    if rank == 0:
        print(f"stopped by {signal.Signals(number).name} after step {done}, whose checkpoint is in "
              f"{out}: the same command goes on", file=sys.stderr)
    sys.exit(128 + number)


def fix_steps(state: "State", args: Args, batches: "Batches", device, rank: int, ranks: int,
              dtype) -> None:
    """The number of steps, once for all of a run: --steps, or those that fit into what is left of
    --minutes, by the time of some on a copy. UserError: none do."""
    fixed = state.config["args"]
    args.steps = fixed["steps"] = args.steps or fixed["steps"]
    if args.steps:
        return
    trial = start(copy.deepcopy(state.net), args, state.config, ranks)
    quick = replace(args, steps=2 ** 62)
    times = []
    for step, batch in enumerate(batches.loader(0, 12)):
        mse, _ = train_step(trial, quick, step, on_device(batch, device), ranks, dtype)
        if step in (3, 11):                                       # the first few are slower
            float(mse[0])                                         # a GPU has come here, too
            times.append(time.time())
    rate = 8 * args.batch / (times[1] - times[0])
    left = 60 * args.minutes - (time.time() - BEGAN)
    drawn = DRAWN if args.data is None else DRAWN // 8            # nothing is evaluated then
    steps = torch.tensor(int((0.95 * left * rate - drawn) / args.batch))
    if ranks > 1:
        dist.broadcast(steps, 0)
    if steps < 1:
        raise UserError(f"--minutes {args.minutes:g} leave no time to train: give more, or --steps")
    args.steps = fixed["steps"] = int(steps)
    if rank == 0:
        print(f"this machine makes {rate:.0f} pictures/s: {steps} steps in "
              f"{steps * args.batch / rate / 60:.1f} minutes, all in --minutes {args.minutes:g}")


def due(done: int, every: int, args: Args) -> bool:
    """Is something that is done each so many steps, and at the end, due? 0: never."""
    return every > 0 and (done % every == 0 or done == args.steps)


def train_step(state: "State", args: Args, step: int, batch: list, ranks: int, dtype) -> tuple:
    """One optimizer step on this rank's share of the batch: mse (b,), and the gradient's norm."""
    device = batch[0].device.type

    def loss(micro: list) -> tuple:
        """mse (b,) of a micro-batch, and its part of the share's mean loss."""
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            mse, weighted = flow.loss(state.model, *micro)                       # (b,), (b,)
        return mse.detach(), weighted.sum() / len(batch[0])

    on_cores = ranks == 1 and device == "cpu"
    micros = micro_batches(batch, args.accumulate * (torch.get_num_threads() if on_cores else 1))
    mses = gradient_on_cores(state, micros, loss) if on_cores else gradient(state, micros, loss)
    norm = torch.nn.utils.clip_grad_norm_(state.net.parameters(), args.clip)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    decay = min(args.ema, (1 + step) / (10 + step))           # the average forgets the start sooner
    with torch.no_grad():
        torch._foreach_lerp_(list(state.average.parameters()), list(state.net.parameters()),
                             1 - decay)
    return torch.cat(mses), norm


def gradient(state: "State", micros: list, loss: Callable) -> list:
    """The gradient of all micro-batches, into .grad, and their mse. DDP averages it over the ranks
    after the last."""
    mses, shared = [], isinstance(state.model, DistributedDataParallel)
    for micro in micros:
        with state.model.no_sync() if shared and micro is not micros[-1] else nullcontext():
            mse, part = loss(micro)
            part.backward()
        mses.append(mse)
    return mses


def gradient_on_cores(state: "State", micros: list, loss: Callable) -> list:
    """The same, each micro-batch by one core. Cores that share each small matrix product wait for
    one another after each, and for ever if another program takes one of them."""
    parameters, mses, cores = list(state.net.parameters()), [], torch.get_num_threads()

    def one(micro: list) -> tuple:
        """mse (b,) and gradient of a micro-batch."""
        mse, part = loss(micro)
        return mse, torch.autograd.grad(part, parameters, materialize_grads=True)

    torch.set_num_threads(1)
    for mse, grads in pool(cores).map(one, micros):
        mses.append(mse)
        for p, grad in zip(parameters, grads):                # in the order of the micro-batches
            p.grad = grad if p.grad is None else p.grad + grad
    torch.set_num_threads(cores)
    return mses


@cache
def pool(cores: int) -> ThreadPoolExecutor:
    """As many threads, kept from step to step."""
    return ThreadPoolExecutor(cores)


def micro_batches(batch: list, n: int) -> list:
    """A batch in up to n parts."""
    size = -(-len(batch[0]) // n)
    return list(zip(*(tensor.split(size) for tensor in batch)))


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
        names, counts = binning.scored_names(data.path), [shard.rows for shard in data.shards]
        self.unscored = [unscored(shard, names) for shard in data.shards]    # rows, ascending
        # Those that validate are drawn from all samples, scored or not: a baseline has the same.
        chosen = Order(counts, args.seed + 2 ** 32).at(np.arange(
            min(args.val, max(1, data.rows // 10))))
        self.held_out = [(shard, row) for shard, row in zip(*(a.tolist() for a in chosen))
                         if row not in self.unscored[shard]]
        self.without = list(self.unscored)
        for shard, row in self.held_out:
            self.without[shard] = np.union1d(self.without[shard], [row])
        left = [n - len(rows) for n, rows in zip(counts, self.without)]
        self.order = Order(left, args.seed)
        if not self.held_out or not sum(left):
            raise UserError(f"{data.path} has {sum(left)} samples with all scores to train on, "
                            f"{len(self.held_out)} to validate on: 1 of each is needed")

    def digest(self) -> str:
        """16 hex digits of the samples and of those without scores: a run resumes on the same, and
        runs of several seeds, which keep out others, are of the same data."""
        found = hashlib.sha256(" ".join(shard.digest for shard in self.data.shards).encode())
        for rows in self.unscored:
            found.update(rows.tobytes() + b" ")
        return found.hexdigest()[:16]

    def held_out_captions(self) -> list[str]:
        """The first captions of up to 48 samples that were kept out."""
        samples = [(self.data.shards[number], row) for number, row in self.held_out[:48]]
        return [shard.caption(span(shard.ends["pair_ends"], row)[0]) for shard, row in samples]

    def loader(self, first: int, end: int | None = None) -> torch.utils.data.DataLoader:
        """The steps from `first` on, to `end` or the last."""
        fork = "fork" if self.args.workers and sys.platform == "linux" else None
        return torch.utils.data.DataLoader(
            self, batch_size=None, sampler=range(first, end or self.args.steps),
            num_workers=self.args.workers, multiprocessing_context=fork, worker_init_fn=deafen,
            pin_memory=torch.cuda.is_available(),
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
        text, text_mask = pad(text, 32 if args.compile else 1)                   # (B, L, E), (B, L)
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
        first, last = span(shard.ends["pair_ends"], row)
        pair = first + int(caption * (last - first))                 # each caption as often
        raw = self.scores(number)[pair]                              # rewards move with the text
        withheld = rng.random(len(raw)) < args.reward_dropout
        empty = empty < args.text_dropout
        if self.data.kind == "latents":
            mean, std = (shard.row(name, row).astype(np.float32)     # x_0 is drawn from the VAE's
                         for name in ("mean", "std"))
            noise = stream(args.seed, "latents", position).standard_normal(self.shape)
            x_0 = mean + std * noise.astype(np.float32)
            text = torch.from_numpy(shard.read("empty") if empty else shard.row("text", pair))
        else:
            x_0 = shard.row("pixels", row).astype(np.float32)
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


def deafen(worker: int) -> None:
    """Workers leave signals, which may go to all processes of a job, to the process of the rank."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def unscored(shard: Shard, names: tuple) -> np.ndarray:
    """The rows of a shard that lack one of these scores, ascending: its header says which."""
    failed = rewards.read_header(shard)["failed"] if names else {}
    return np.array(sorted({int(row) for name in names for row in failed.get(name, ())}), np.int64)


def skip(without: np.ndarray, row: int) -> int:
    """The row-th of the rows that are not in `without`, which ascends."""
    return row + np.searchsorted(without - np.arange(len(without)), row, side="right")


def on_device(batch: list, device) -> list:
    """A batch where the network is, but for the coins, which steer the loop (see flow.loss). The
    text of latents is float16 until here. Nothing waits for a GPU."""
    *tensors, coins = batch
    x_0, eps, t, s, text, text_mask = (one.to(device, non_blocking=True) for one in tensors)
    return [x_0, eps, t, s, text.float(), text_mask, coins]


# ---------------------------------------------------------------------------------------- the data

def prepare(args: Args, network: dict, rank: int) -> tuple:
    """DATA, and the Bins of the rewards asked for; rank 0 makes what is missing, the others wait.

    UserError: the data do not fit the preset or the network's flags, or lack a reward."""
    path, preset = args.data or "runs/world", model.PRESETS[args.preset]
    if Path(path).resolve() == Path(args.out).resolve():
        raise UserError(f"--out {args.out} is the folder of the data: name another")
    kind, channels, side = "pixels", 3, shapes.SIZE                          # the embedded world's
    if args.data:
        data = Data(path)
        kind, channels, side = data.kind, data.channels, data.side
    needed = "pixels" if preset["channels"] == 3 else "latents"
    if kind != needed:
        command = {"pixels": "import", "latents": "encode"}[needed]
        raise UserError(f"--preset {args.preset} trains on {needed}, and {path} has {kind}: make "
                        f"--data with python data.py {command}")
    try:
        model.Config((), channels, side, text_dim=preset["text_dim"], **network)
    except AssertionError as error:
        raise UserError(f"flags of the network, for {channels} channels of size {side}: {error}") \
            from error
    if not args.data:
        make_folder(path)
    hold(path, shared=True)
    if rank == 0 and not args.data:
        shapes.write_world(path, args.world, seed=0)
    follow(rank, "world")
    data = Data(path)
    if args.rewards == "none":
        return data, None
    if rank == 0:
        names = binning.scored_names(path) or rewards.default_rewards(data.captions())
        if "world" in data.info:                          # a reward added to the world's is scored
            names = tuple(dict.fromkeys((*names, *shapes.ANALYTIC)))
        own = [name for name in names if name in shapes.ANALYTIC]    # networks: rewards.py's
        failed = rewards.score_dataset(data, own) if own else {}
        refuse_too_many(len(failed), data.rows, path, "python rewards.py lists them")
        binning.fitted(path, args.bins)
    follow(rank, "scores")
    scored = binning.scored_names(path)
    asked = scored if args.rewards == "all" else rewards.names_of(args.rewards)
    for name in asked:
        if name not in scored:
            raise UserError(f"{path} has no scores of {name}: make them with python rewards.py "
                            f"{path} --rewards {name}")
    return data, binning.fitted(path, args.bins).select(asked)


def follow(rank: int, what: str) -> None:
    """Other ranks wait here until rank 0, which may score for hours, has come here, too."""
    if dist.is_initialized():
        store = rank_store(timedelta(days=30))
        if rank == 0:
            store.set(what, "is there")
        store.wait([what])


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
    model: torch.nn.Module           # net, or DDP around it
    optimizers: list
    config: dict
    start: int                       # the first step to do


def start(net: torch.nn.Module, args: Args, config: dict, ranks: int) -> State:
    """A new network, or what the last checkpoint in --out made of it."""
    found, device = load_checkpoint(Path(args.out)), next(net.parameters()).device
    average = copy.deepcopy(net).requires_grad_(False)
    optimizers = optimizers_for(net, args)
    if found:
        same_run(found["config"], config, Path(args.out))
        config = found["config"] | {key: config[key] for key in ("text_encoder", "vae")}
        net.load_state_dict(found["net"])
        average.load_state_dict(found["average"])
        for optimizer, before in zip(optimizers, found["optimizers"]):
            optimizer.load_state_dict(before)
    if args.compile:
        net.compile()
    trained = net
    if ranks > 1:
        # Buffers are constants. Sent at each forward pass, those of the pass of self-conditioning,
        # which some ranks have and some have not, would meet what other ranks send.
        warnings.filterwarnings("ignore", ".*broadcast_buffers")        # has no successor yet
        trained = DistributedDataParallel(trained, [device.index] if device.type == "cuda"
                                          else None, broadcast_buffers=False)
    return State(net, average, trained, optimizers, config, found["step"] if found else 0)


def optimizers_for(net: torch.nn.Module, args: Args) -> list:
    """One optimizer, or with muon two.

    muon: Muon with decay for the matrices of the inner layers, AdamW without for the rest. lamb
    (You et al. 2020) is timm's as the release runs its own: no decay and no trust ratio for norms
    and biases, but both for learned tokens and all of the log-variance; the decay is part of the
    step that is scaled.
    """
    if args.optimizer == "muon":
        inner = net.inner_matrices()
        found = [Muon(inner, args.matrix_lr, weight_decay=args.weight_decay),
                 torch.optim.AdamW(others(net, inner), args.lr, (0.9, 0.99), weight_decay=0.0,
                                   fused=True)]
    else:
        from timm.optim import Lamb                              # here: timm takes a second to load
        plain = net.norms_and_biases()
        groups = [dict(params=others(net, plain), weight_decay=args.weight_decay,
                       always_adapt=True), dict(params=plain, weight_decay=0.0)]
        found = [Lamb(groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=None)]
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


def start_ranks(minutes: float) -> tuple:
    """(device, rank, ranks): one process alone, or torchrun's; what lies on the CPU goes over gloo,
    what lies on CUDA over nccl."""
    device = best_device()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(minutes=minutes))
    return device, rank, ranks


def compare_ranks(config: dict, rank: int, ranks: int) -> None:
    """UserError: this rank has other data, bins, flags or checkpoints than rank 0."""
    if ranks > 1:
        mine = torch.tensor(int(digest(config)[:15], 16))
        first = mine.clone()
        dist.broadcast(first, 0)
        if first != mine:
            raise UserError(f"rank {rank} has other data, bins, flags or checkpoints than rank 0: "
                            "give the same DATA, --out and flags to all")


# ------------------------------------------------------------------------------------- checkpoints

def refuse_lost(state: State, done: int, out: Path) -> None:
    """UserError: the averaged weights, which any gradient of NaN ruins, are not finite."""
    if not all(w.isfinite().all() for w in state.average.parameters()):
        newest = max(out.glob("state-*.pt"), default="none")
        raise UserError(f"the weights are not finite after step {done}; the last good checkpoint "
                        f"is {newest}: lower --lr or change --precision")


def save_checkpoint(out: Path, step: int, state: State) -> None:
    """state-STEP.pt to resume from (the newest two stay), and the pair that sample.py reads."""
    save_pair(out, step, state)
    content = dict(step=step, config=state.config, net=state.net.state_dict(),
                   average=state.average.state_dict(),
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
    weights = {name: w.contiguous().cpu() for name, w in state.average.state_dict().items()}
    file = folder / "model.safetensors"
    write_whole(file, partial(save_file, weights))
    write_json(folder / "config.json", state.config | dict(step=step, weights=file_digest(file)))


def load_checkpoint(out: Path) -> dict | None:
    """The newest state whose checksums hold, None if there is none. Tensors and plain types alone.

    UserError: there are states and none can be read."""
    states = sorted(out.glob("state-*.pt"), reverse=True)
    for path in states:
        try:
            damaged = zipfile.ZipFile(path).testzip()
            if damaged:
                raise zipfile.BadZipFile(f"{damaged} is damaged")
            return torch.load(path, map_location="cpu", weights_only=True)
        # What these raise on damaged files; all of it means "unreadable".
        except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError,
                LookupError, ValueError, struct.error) as error:
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
        if before != value and not (key in ("steps", "minutes") and value is None):
            raise UserError(f"{out} was trained with --{key.replace('_', '-')} {before}, not "
                            f"{value}: pass --out for another folder, or the same flags")
    for key in ("data", "bins", "text_encoder"):
        before, value = found.get(key), wanted[key]
        if key == "text_encoder":                            # its files may have moved
            before, value = dict(before, source=None), dict(value, source=None)
        if before != value:
            raise UserError(f"{out} was begun on other pictures, captions or scores ({key} have "
                            "changed): pass --out for another folder")


# ----------------------------------------------------------------------------------------- the log

def write_head(out: Path, config: dict, first: int) -> None:
    """The first line of log.jsonl: config, versions, and the digest of the source that runs, which
    goes into code.json. Of a resume: its step."""
    log, head = out / "log.jsonl", dict(resume=first)
    if first == 0:
        code = {file.name: file.read_text(encoding="utf-8")
                for file in sorted(Path(__file__).parent.glob("*.py"))}
        head = dict(code=digest(code), machine=platform.platform(), torch=torch.__version__,
                    config=config)
        log.unlink(missing_ok=True)
        write_text(out / "code.json", json.dumps(code, indent=0))
    elif log.exists():                                       # a kill may have cut the last line
        lines = log.read_text(encoding="utf-8").splitlines(True)
        write_text(log, "".join(line for line in lines if line.endswith("\n")))
    append(out, head)


def append(out: Path, line: dict) -> None:
    """One more line of log.jsonl. UserError: it cannot be written."""
    try:
        with open(out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"{out}/log.jsonl cannot be written ({error.strerror}): make room") \
            from error


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
        parts = {f"loss_t{k}": value for k, value in enumerate(by_t, 1)}
        append(out, dict(step=done, loss=loss, **parts, norm=norm, rate=rate))


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
    """Validation, the mean native rewards of up to 48 pictures of captions that were kept out, at
    the run's own targets, and the grid."""
    texts = batches.held_out_captions()
    names = rewards.default_rewards(texts)
    pictures = sample.pictures(shown, texts)
    reached = dict(zip(names, shapes.score_all(names, pictures, texts).mean(0).tolist()))
    loss = validate(state, batches, args, device)
    tqdm.write(f"step {done:6d}  validation {loss:.4f}  at "
               f"{' '.join(state.config['targets']) or 'all=1'}: "
               + "  ".join(f"{name} {value:.3g}" for name, value in reached.items()))
    append(out, dict(step=done, val=loss, **reached))
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


def finish(out: Path, shown: sample.Model, embedded: bool) -> None:
    """After the last step: evaluate on the embedded world, say what is there."""
    found = {}
    if embedded:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))              # the others are done
        torch.set_num_threads(ranks_here * torch.get_num_threads())
        found = evaluate.evaluate_folder(shown, out)
    if not (out / "README.md").exists():                                     # or it is the user's
        write_card(out, shown.config, found)
    print(f"{out} has the checkpoint, log.jsonl and grids of pictures; try\n"
          f"python sample.py --checkpoint {shlex.quote(str(out))} --prompt "
          f"{shlex.quote(shown.config['prompts'][0])}")


def write_card(out: Path, config: dict, found: dict) -> None:
    """README.md, with which the folder is a repository of the hub as it is. found: what
    evaluate_folder returned, or nothing."""
    told, request = ", ".join(config["network"]["rewards"]), " ".join(config["targets"]) or "all=1"
    recipe = "".join(f"| `--{key.replace('_', '-')}` | {value} |\n"
                     for key, value in config["args"].items()
                     if key != "minutes" and value is not None)
    prompt, table = shlex.quote(config["prompts"][0]), ""
    if found:
        table = f"\nUnseen captions, asked for `{request}`:\n\n| measure | mean |\n|---|---|\n" + \
            "".join(f"| {name} | {value:.3f} |\n" for name, value in found[request].items())
    write_text(out / "README.md", f"""---
pipeline_tag: text-to-image
tags: [text-to-image, flow-matching, miro]
---
# {out.resolve().name}

A text-to-image network, trained for {config["args"]["steps"]} steps by the code of
[MIRO](https://arxiv.org/abs/2510.25897) in one sitting. It was told {told or "no reward"}.
Its licence is yours to choose: add it above, as `license: mit`.

```sh
python sample.py --checkpoint OWNER/NAME --prompt {prompt}{f" --targets {request}" * bool(told)}
```
{table}
| flag of train.py | value |
|---|---|
{recipe}""")


# --------------------------------------------------------------------------------------- the flags

def read_args(argv=None) -> tuple[Args, dict]:
    """The flags over the preset's recipe and network: Args, and the fields of model.Config that
    the data do not say. UserError on what cannot be."""
    parser = Parser(description="train MIRO; no argument runs the whole main job")
    presets = {name: model.PRESETS[name] | RECIPES[name] for name in RECIPES}
    sizes = [one for one in fields(model.Config) if one.name not in DERIVED]
    for one in (*fields(Args), *sizes):
        how = dict(one.metadata) or dict(help="of the network: see Config in model.py")
        low, high = how.pop("low", int(one.type is int)), how.pop("high", 1e6)
        values = [f"{name} {preset[one.name]}" for name, preset in presets.items()
                  if one.name in preset]
        if values or one.default is not None:
            how["help"] += f" (default: {', '.join(values) or one.default})"
        if one.type is bool:
            how = dict(help=how["help"], action=argparse.BooleanOptionalAction)
        else:
            how["type"] = str if one.type is str else between(one.type, low, high)
        parser.add_argument("--" + one.name.replace("_", "-"), **how)
    given = {key: value for key, value in vars(parser.parse_args(argv)).items()
             if value is not None}
    if "steps" in given and "minutes" in given:
        raise UserError("--steps and --minutes say the same: give one of them")
    chosen = presets[given.get("preset", "shapes")]
    if "steps" in given or "minutes" in given:
        chosen = chosen | dict(steps=None, minutes=None)
    chosen = chosen | given
    args = Args(**{one.name: chosen[one.name] for one in fields(Args) if one.name in chosen})
    args.out = args.out or f"runs/{args.preset}"
    if args.rewards not in ("all", "none"):
        rewards.names_of(args.rewards)
    if args.compile is None:
        args.compile = compiles(best_device())
    shares = int(os.environ.get("WORLD_SIZE", 1)) * args.accumulate
    if args.batch % shares:
        raise UserError(f"--batch {args.batch} is for all ranks and micro-batches together: "
                        f"choose a multiple of ranks x --accumulate = {shares}")
    return args, {one.name: chosen.get(one.name, one.default) for one in sizes}


if __name__ == "__main__":
    run(main)
