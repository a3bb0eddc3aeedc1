"""train.py: the optimizers, the coins, one step, and runs that are killed, resumed and shared."""
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, refused, run, succeed, two_ranks
from safetensors.numpy import load_file as load_columns
from safetensors.torch import load_file
from test_format import columns, latents

import binning
import evaluate
import flow
import model
import rewards
import sample
import shapes
import train
from data import (HELD, VAE, Data, Shard, UserError, digest, hold, read_json, stream, write_info,
                  write_json, write_shard, write_whole)

CPU = torch.device("cpu")
EIGHT = ["--steps", 8, "--save-every", 2, "--log-every", 2]          # as the checkpoint was made


# ---- optimizers ----------------------------------------------------------------------------------

@pytest.mark.parametrize("m, n", [(20, 50), (50, 20), (1, 7), (64, 192)])
def test_orthogonalising_brings_singular_values_to_one_and_keeps_the_singular_vectors(m, n):
    x = torch.randn(3, m, n, generator=torch.Generator().manual_seed(0)) * 1e-3
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ train.orthogonalise(x) @ vh.mT                    # (3, k, k): diagonal if kept
    values = inner.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-3


def test_muon_is_momentum_orthogonalised_at_rms_0_2_and_decayed():
    rng = torch.Generator().manual_seed(0)
    start, grads = torch.randn(2, 30, 12, generator=rng), torch.randn(3, 2, 30, 12, generator=rng)
    params = [torch.nn.Parameter(p.clone()) for p in start]          # of one shape: go together
    muon = train.Muon(params, lr=0.1, weight_decay=0.01)
    for step in grads:
        for p, grad in zip(params, step):
            p.grad = grad.clone()
        muon.step()
    for k, p in enumerate(params):
        wanted, momentum = start[k].clone(), torch.zeros(30, 12)
        for grad in grads[:, k]:
            momentum = 0.95 * momentum + 0.05 * grad
            look_ahead = 0.95 * momentum + 0.05 * grad
            update = train.orthogonalise(look_ahead[None])[0] * 0.2 * math.sqrt(30)
            assert 0.12 < update.square().mean().sqrt() < 0.25
            wanted = wanted * (1 - 0.1 * 0.01) - 0.1 * update
        assert torch.allclose(p, wanted, atol=1e-5)


def test_the_rate_warms_up_linearly_and_follows_its_share_of_the_cosine():
    args, _ = train.read_args(["--steps", "100", "--warmup", "10"])
    rates = [train.schedule(step, args) for step in range(101)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert rates[10:] == pytest.approx([(1 + math.cos(math.pi * k / 90)) / 2 for k in range(91)])
    args = replace(args, warmup=0, cosine_rate=0.8)
    assert train.schedule(0, args) == 1
    assert train.schedule(100, args) == pytest.approx((1 + math.cos(0.8 * math.pi)) / 2)


# ---- the batches ---------------------------------------------------------------------------------

def set_up(data, *flags, rank=0, ranks=1) -> SimpleNamespace:
    """What main() has before its network: args, data, bins, config, batches."""
    args, network = train.read_args([*TINY, "--steps", "9", "--data", str(data), "--out",
                                     "not-there", *map(str, flags)])
    data, bins = train.prepare(args, network, 0)
    encoder = train.encoder_for(args, data)
    config = train.describe(args, network, data, bins, encoder)
    batches = train.Batches(args, config, data, bins, encoder, rank, ranks)
    config["data"] = batches.digest()
    return SimpleNamespace(args=args, data=data, bins=bins, encoder=encoder, config=config,
                           batches=batches)


def same(a, b) -> bool:
    """Are two nests of dicts, lists and tensors equal to the last bit? NaN is NaN."""
    if isinstance(a, torch.Tensor):
        return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


N, TEXTS = 120, ("a red circle", "two blue squares")


@pytest.fixture(scope="module")
def two_captions(tmp_path_factory) -> SimpleNamespace:
    """Samples that a pixel names, each with two captions: of contrast 1 and 3 of 0 to 4, and of
    a sharpness that is the sample's own."""
    folder, names = tmp_path_factory.mktemp("two"), ("contrast", "sharpness")
    for number in range(2):
        pixels = np.zeros((N, 3, 4, 4), np.uint8)
        pixels[:, :, 0, 0] = np.arange(N)[:, None] + N * number
        path = folder / f"{number}.safetensors"
        write_shard(path, columns([TEXTS] * N, pixels=pixels))
        raw = np.stack([np.tile([1, 3], N), np.repeat(np.arange(N) % 5, 2)]).astype(np.float32)
        rewards.write_scores(Shard(path), dict(zip(names, raw)), {
            name: shapes.version(name) for name in names}, {name: {} for name in names})
    words = ["a", "blue", "circle", "red", "squares", "two"]
    write_info(folder, dict(kind="pixels", size=4, shards=2, longest=3, words=words))
    edges, one = np.tile(np.arange(4) + 0.5, (2, 1)), np.ones(2)
    bins = binning.Bins(names, edges, 0 * one, 4 * one, one, binning.fingerprint(folder, names))
    write_json(folder / "bins.json", bins.to_config())
    return set_up(folder, "--patch", 2, "--bins", 5, "--reward-dropout", 0, "--text-dropout", 0)


def batch_of(two_captions, **flags) -> list:
    """Each sample ten times, at positions of their own, in the order of the shards."""
    places = [(i // N % 2, i % N) for i in range(20 * N)]
    positions = list(range(10 ** 6, 10 ** 6 + 20 * N))
    return two_captions.batches.batch(places, positions, replace(two_captions.args, **flags))


def test_each_caption_comes_as_often_with_its_own_levels_and_times_are_logit_normal(two_captions):
    x_0, eps, t, s, text, _, _ = batch_of(two_captions, t_mean=1.2)
    of_text = two_captions.encoder.states(TEXTS)
    first, second = ((text == wanted).all((1, 2)) for wanted in of_text)     # (B,) each
    assert torch.equal(first, ~second) and torch.equal(s[:, 0], torch.where(first, 0.25, 0.75))
    assert torch.equal(s[:, 1], torch.arange(20 * N) % N % 5 / 4)
    assert first.float().mean() == pytest.approx(0.5, abs=0.03)
    often = first.view(10, 2 * N).sum(0).float()            # a coin of the position, not of the row
    assert often.var() == pytest.approx(10 / 4, rel=0.3)
    mean, std = two_captions.data.mean_std()
    pixel = (np.arange(20 * N) % (2 * N) - mean[0]) / std[0]
    assert np.allclose(x_0[:, 0, 0, 0], pixel, atol=1e-4)
    normal = torch.special.logit(t.double())
    assert (normal.mean(), normal.std()) == pytest.approx((1.2, 1), abs=0.05)
    assert eps.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_coins_withhold_their_share_of_levels_or_of_captions_and_nothing_else(two_captions, share):
    whole, dropped = batch_of(two_captions), batch_of(two_captions, reward_dropout=share)
    gone = dropped[3].isnan()                                             # a coin for each reward
    for some, wanted in ((gone, share), (gone[:, :1], share), (gone.all(1), share ** 2)):
        assert some.float().mean() == pytest.approx(wanted, abs=0.03)
    assert torch.equal(dropped[3][~gone], whole[3][~gone])
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(whole, dropped)) if i != 3)
    dropped = batch_of(two_captions, text_dropout=share, self_condition=share)
    assert dropped[6].float().mean() == pytest.approx(share, abs=0.03)
    empty = (dropped[4][:, :1] == two_captions.encoder.states([""])[0]).all((1, 2))
    length = dropped[4].shape[1]                                          # the longest caption's
    assert empty.float().mean() == pytest.approx(share, abs=0.03)
    assert torch.equal(dropped[4][~empty], whole[4][~empty][:, :length])
    assert torch.equal(dropped[5].sum(1), torch.where(empty, 1, 3))
    assert all(torch.equal(whole[i], dropped[i]) for i in (0, 1, 2, 3))


def test_latents_are_drawn_from_their_distribution_with_the_states_of_their_captions(tmp_path):
    n, written = 30, latents(30) | dict(empty=np.full((1, 3), -1, np.float16))
    write_shard(tmp_path / "a.safetensors", written)
    info = dict(kind="latents", size=16, shards=1, vae="vae", scaling_factor=1.0, text_encoder=dict(
        kind="t5", source="t5", dim=3, length=8))
    write_info(tmp_path, info)
    flags = ("--preset", "paper", "--rewards", "none", "--patch", 1, "--workers", 0)
    parts = set_up(tmp_path, *flags)
    batch = parts.batches.batch([(0, row) for row in range(n)], list(range(n)),
                                replace(parts.args, text_dropout=0.3))
    mean, std = parts.data.mean_std()                             # of the draws: see test_format.py
    noise = np.stack([stream(0, "latents", i).standard_normal((4, 2, 2)) for i in range(n)])
    x_0 = (written["mean"] + written["std"] * noise - mean[:, None, None]) / std[:, None, None]
    assert np.allclose(batch[0], x_0 * model.PRESETS["paper"]["sigma_data"], atol=1e-4)
    of_pair, chosen = np.split(written["text"], written["text_ends"][:-1]), set()
    for row, (text, mask) in enumerate(zip(batch[4], batch[5])):
        own = [written["empty"], *of_pair[2 * row:2 * row + 2]]
        chosen.add([np.array_equal(text[mask], states) for states in own].index(True))
    assert chosen == {0, 1, 2} and batch[4].dtype == torch.float16 and batch[3].shape == (n, 0)
    assert train.on_device(batch, CPU)[4].dtype == torch.float32
    write_info(tmp_path, info | dict(scaling_factor=VAE.SCALING_FACTOR))
    assert set_up(tmp_path, *flags).config["mean"] == [*VAE.MEAN]            # SDXL's: the release's


def test_no_batch_has_a_sample_without_scores_or_one_that_validates(world, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "score_dataset", lambda *_: {})     # it would find their scores
    data, unscored = (shutil.copytree(world, tmp_path / name) for name in ("data", "unscored"))
    lost, flags, held_out = {(0, 7), (2, 99)}, ("--batch", 10, "--val", 27), set()
    for path in unscored.glob("*.scores.*"):
        path.unlink()
    baseline = set_up(unscored, *flags, "--rewards", "none")
    assert baseline.config["bins"] is None and baseline.config["sampler"]["guidance"] == 0
    lost.add(baseline.batches.held_out[0])                           # one that would validate
    for number, shard in enumerate(Data(data).shards):
        header, scores = rewards.read_header(shard), load_columns(rewards.scores_path(shard))
        rows = {row: "it is broken" for of_shard, row in lost if of_shard == number}
        scores["contrast"] = np.where(np.isin(np.arange(100), [*rows]), np.nan, scores["contrast"])
        header["failed"]["contrast"], header["failed"]["mine"] = rows, {1: "unknown here"}
        scores["mine"], header["scorers"]["mine"] = scores["contrast"], "1"         # a fork's
        rewards.write_scores(shard, scores, header["scorers"], header["failed"])
    for ranks in (1, 5):
        for names in ("none", "sharpness", "contrast"):
            steps = []                                               # of all ranks: places
            for rank in range(ranks):
                batches = set_up(data, *flags, "--rewards", names, rank=rank, ranks=ranks).batches
                held_out.add(tuple(batches.held_out))
                batches.batch = lambda places, *_: places
                steps.append([batches[step] for step in range(60)])
            places = [place for shares in zip(*steps) for share in shares for place in share]
            n = 300 - 27 - len(lost) + 1
            assert not set(places) & (lost | set(batches.held_out))
            assert len(set(places[:n])) == len(set(places[n:2 * n])) == n      # once an epoch
    assert (0, 1) in places and set_up(data, *flags).bins.names == shapes.ANALYTIC
    own = set_up(data, *flags, "--rewards", "contrast").config["bins"]      # its column of edges
    assert own == binning.load(data / "bins.json").select(("contrast",)).to_config()
    assert set_up(data, *flags).config["data"] != baseline.config["data"]   # fewer are trained on
    [held_out] = held_out                                            # the same for all of these
    assert list(held_out) == baseline.batches.held_out[1:]
    assert set(held_out) - set(set_up(data, *flags, "--seed", 1).batches.held_out)


def test_ranks_share_a_batch_and_workers_make_the_same_of_seed_and_position_alone(world):
    whole, spread, other = (list(set_up(world, "--steps", 5, *flags).batches.loader(2)) for flags
                            in ((), ("--workers", 2), ("--seed", 1)))
    assert [len(batch[0]) for batch in whole] == [8, 8, 8] and whole[0][3].isnan().any()
    assert same(whole, spread)
    eps = torch.cat([batch[1] for batch in (*whole, *other)])        # each position has its own
    assert len(eps.flatten(1).unique(dim=0)) == 48
    shares = [list(set_up(world, "--steps", 5, rank=rank, ranks=4).batches.loader(2))
              for rank in range(4)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        for i in (0, 1, 2, 3, 6):                                   # text is as long as its share's
            assert same(batch[i], torch.cat([part[i] for part in parts]))
        assert same(batch[4][batch[5]], torch.cat([part[4][part[5]] for part in parts]))


# ---- one step ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def parts(world) -> SimpleNamespace:
    """What main() has before its loop, and a batch of 8."""
    parts = set_up(world, "--lr", 0.01, "--self-condition", 0.9)
    parts.config["network"]["zero_out"] = False              # what is zero does not tell much
    parts.batch = parts.batches[0]
    return parts


def new_run(parts, **flags) -> tuple:
    args = replace(parts.args, **flags)
    torch.manual_seed(args.seed)
    return train.start(model.build(parts.config["network"]), args, parts.config, 1), args


def flat(net) -> torch.Tensor:
    """All weights, one after the other."""
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach()


def descend(parts, **flags) -> tuple:
    """What a step of plain descent at rate 1 goes, and the norm it reports: its own gradient."""
    state, args = new_run(parts, warmup=0, **flags)
    group = dict(params=[*state.net.parameters()], peak=1.0)
    state.optimizers = [torch.optim.SGD([group], lr=1.0)]
    before = flat(state.net)
    _, norm = train.train_step(state, args, 0, parts.batch, 1, torch.float32)
    return before - flat(state.net), norm


@pytest.mark.parametrize("accumulate", [2, 8])
def test_gradient_accumulation_equals_one_large_batch_and_the_norm_is_clipped(parts, accumulate):
    one, norm = descend(parts, clip=1e9)
    many, _ = descend(parts, clip=1e9, accumulate=accumulate)
    assert (many - one).norm() < 1e-5 * one.norm()                    # sums in another order
    assert norm == pytest.approx(float(one.norm()), rel=1e-3)
    clipped, norm = descend(parts, clip=1e-3, accumulate=accumulate)
    assert norm > 0.1 and clipped.norm() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("cores", [2, 3, 8])
def test_cores_that_share_a_batch_make_the_gradient_of_one_and_the_same_each_time(parts, cores):
    one, norm = descend(parts)
    torch.set_num_threads(cores)
    try:
        found = [descend(parts) for _ in range(3)]
        assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(1)
    assert (found[0][0] - one).norm() < 1e-5 * one.norm()             # sums in another order
    assert all(torch.equal(step, found[0][0]) for step, _ in found)


@pytest.mark.parametrize("optimizer", ["muon", "lamb"])
@pytest.mark.parametrize("zero_out, steps, dtype", [(False, 3, torch.bfloat16),
                                                    (True, 6, torch.float32)])
def test_every_parameter_moves_within_a_few_steps(parts, optimizer, zero_out, steps, dtype):
    config = dict(network=parts.config["network"] | dict(zero_out=zero_out))
    state, args = new_run(SimpleNamespace(args=parts.args, config=config), optimizer=optimizer)
    before = {name: p.detach().clone() for name, p in state.net.named_parameters()}
    batch = [*parts.batch[:-1], torch.ones_like(parts.batch[-1])]        # all self-conditioned
    for step in range(steps):
        train.train_step(state, args, step, batch, 1, dtype)
    assert not [name for name, p in state.net.named_parameters() if torch.equal(p, before[name])]


def test_muon_decays_no_norms_biases_and_learned_tokens(parts):
    state, _ = new_run(parts, optimizer="muon", weight_decay=0.5)
    names = {id(p): name for name, p in state.net.named_parameters()}
    groups = [group for each in state.optimizers for group in each.param_groups]
    decayed = [names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]]
    assert decayed and "previous_out.weight" not in decayed                # a norm, too
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lamb_is_its_formula_and_spares_norms_and_biases(parts, decay):
    """The decay is part of the step, as in the release; learned tokens are decayed, too."""
    state, _ = new_run(parts, optimizer="lamb", lr=0.05, weight_decay=decay)
    named, numbers = dict(state.net.named_parameters()), torch.Generator().manual_seed(0)
    grads = {name: torch.randn(3, *p.shape, generator=numbers) for name, p in named.items()}
    wanted = {name: p.detach().clone() for name, p in named.items()}
    for k in range(3):
        for name, p in named.items():
            p.grad = grads[name][k].clone()
        state.optimizers[0].step()
    for name, w in wanted.items():
        plain = "norm" in name or name.startswith("previous_out") or name.endswith("bias")
        plain &= not name.startswith("log_variance")
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for k, grad in enumerate(grads[name], 1):
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad ** 2
            step = m / (1 - 0.9 ** k) / ((v / (1 - 0.999 ** k)).sqrt() + 1e-8)
            step = step if plain else step + decay * w
            trust = 1 if plain or not w.any() else w.norm() / step.norm()
            w = w - 0.05 * trust * step
        assert torch.allclose(named[name], w, rtol=1e-4, atol=1e-5), name


def test_the_average_moves_once_an_optimizer_step_by_its_formula(parts):
    state, args = new_run(parts, accumulate=4, ema=0.3)
    wanted = flat(state.net)
    for step in range(5):
        train.train_step(state, args, step, parts.batch, 1, torch.float32)
        decay = min(0.3, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * flat(state.net)
        assert torch.allclose(flat(state.average), wanted, atol=1e-6)


def test_the_validation_loss_has_fixed_noise_true_levels_and_no_dropout(parts, monkeypatch):
    state, args = new_run(parts, reward_dropout=0.9, text_dropout=0.9)
    batches, positions, drawn = parts.batches, [], []
    batch = batches.batch
    monkeypatch.setattr(batches, "batch", lambda *of: positions.extend(of[1]) or batch(*of))
    monkeypatch.setattr(train, "on_device", lambda batch, _: drawn.append(batch) or batch)
    losses = [train.validate(state, batches, args, CPU) for _ in range(2)]
    assert losses[0] == losses[1] and math.isfinite(losses[0]) and same(drawn[0], drawn[1])
    assert not drawn[0][3].isnan().any() and drawn[0][6].all()
    assert len(set(positions)) == 8 and min(positions) > 10 ** 15           # training's never
    monkeypatch.setattr(batches, "scores", lambda shard: -type(batches).scores(batches, shard))
    assert train.validate(state, batches, args, CPU) != losses[0]


def test_the_loss_by_quarters_of_t_averages_to_the_loss(tmp_path):
    rng = torch.Generator().manual_seed(0)
    mse, t = torch.rand(999, generator=rng), 0.26 + 0.74 * torch.rand(999, generator=rng)
    t[0] = 1
    train.write_line(tmp_path, 9, [*zip(mse.split(111), t.split(111))], 1.0, 1.0, 0)
    line = json.loads((tmp_path / "log.jsonl").read_text())
    quarters = [mse[(t >= q / 4) & ((t < (q + 1) / 4) | (q == 3))] for q in range(1, 4)]
    by_t = [line[f"loss_t{k}"] for k in range(1, 5)]
    assert by_t[0] is None                                           # no samples, not 0
    assert by_t[1:] == pytest.approx([float(q.mean()) for q in quarters], abs=2e-5)
    assert line["loss"] == pytest.approx(float(mse.mean()))


# ---- runs: killed, damaged, resumed, shared ------------------------------------------------------

def state_of(folder, step=8) -> dict:
    return torch.load(folder / f"state-{step:08d}.pt", weights_only=True)


def logged(folder) -> dict:
    """{step: what was logged}, without speed: of repeated steps the last."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {(line["step"], "val" in line): {key: value for key, value in line.items()
                                            if key != "rate"} for line in lines if "step" in line}


def assert_equal_runs(one, other) -> None:
    """Final state, weights, log and pictures of two runs, to the last bit."""
    assert same(state_of(one), state_of(other)) and logged(one) == logged(other)
    for name in ("model.safetensors", "config.json", "grid-000008.png"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_kill_9_at_any_moment_of_a_checkpoint_loses_nothing(world, checkpoint, child, tmp_path):
    out = tmp_path / "run"
    arguments = [*TINY, "--data", world, "--out", out, *EIGHT]
    # Files of steps 2, 4, 6 and 8: model, config, state; then the grid. A start writes
    # code.json first, a resume the log. Each line starts from what the one before has left.
    for kill, left in ((("save", 1), []),                     # in the middle of the first state
                       (("replace", 4), []),                  # the state is written, has no name
                       (("replace", 7), [2]),                 # the state of step 4
                       (("replace", 6), [2, 4]),              # config.json of step 6
                       (("replace", 7), [4, 6]),              # the last state; its model is there
                       (("fsync", 5), [6, 8]),                # the grid of step 8
                       (("replace", 2), [6, 8])):             # the same, of a run at its end
        process = child("train.py", arguments, tmp_path, kill=kill)
        process.join()
        assert process.exitcode == -9, kill
        assert sorted(int(path.stem[6:]) for path in out.glob("state-*")) == left
        assert all(state_of(out, step)["step"] == step for step in left)     # readable
    for _ in range(2):                                # and stays so when it runs once more
        succeed("train.py", *arguments)
        assert_equal_runs(out, checkpoint)


def test_a_damaged_newest_state_falls_back_to_the_one_before_and_ends_bitwise_equal(
        world, checkpoint, tmp_path, capsys):
    out = shutil.copytree(checkpoint, tmp_path / "run")
    newest = out / "state-00000008.pt"
    content = newest.read_bytes()
    for damaged in (b"", content[:9999], bytes(9999), pickle.dumps([1, 2], 2), content[:-10]):
        newest.write_bytes(damaged)
        assert train.load_checkpoint(out)["step"] == 6
        assert f"{newest} cannot be read" in capsys.readouterr().err
    (out / "model.safetensors").unlink()
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')                                 # a kill cut the last line
    succeed("train.py", *TINY, "--data", world, "--out", out, *EIGHT,
            "--save-every", 5)                                        # it may change
    assert_equal_runs(out, checkpoint)


def test_a_full_disk_is_told_and_leaves_no_state(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9999, limits[1]))
    try:
        with pytest.raises(UserError, match="a.pt cannot be written .*disk"):
            write_whole(tmp_path / "a.pt", partial(train.write_state, dict(x=torch.rand(9999))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.iterdir())


def test_a_run_keeps_two_states_of_plain_types_its_average_and_its_own_source(checkpoint):
    states = sorted(path.name for path in checkpoint.glob("state-*"))
    assert states == ["state-00000006.pt", "state-00000008.pt"]
    config = read_json(checkpoint / "config.json")
    head = json.loads((checkpoint / "log.jsonl").read_text().splitlines()[0])
    for found in (state_of(checkpoint)["config"], head["config"]):    # nothing is lost in the JSON
        assert found | {"step": 8, "weights": config["weights"]} == config
    average = load_file(checkpoint / "model.safetensors")             # no module., no _orig_mod.
    assert same(average, dict(state_of(checkpoint)["average"]))
    assert average.keys() == model.build(config["network"]).state_dict().keys()
    code = {path.name: path.read_text() for path in ROOT.glob("*.py")}
    assert json.loads((checkpoint / "code.json").read_text()) == code
    assert head["code"] == digest(code)
    lines = [json.loads(line) for line in (checkpoint / "log.jsonl").read_text().splitlines()]
    assert len(lines) > 4 and all(isinstance(value, (int, float, type(None)))   # a number a key
                                  for line in lines[1:] for value in line.values())


def test_a_run_is_a_repository_of_the_hub_with_a_model_card(checkpoint, tmp_path):
    from huggingface_hub.utils import filter_repo_objects
    files = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()]
    kept = [*filter_repo_objects(files, ignore_patterns=["state-*", "step-*", ".lock"])]
    assert {"README.md", "config.json", "model.safetensors", "log.jsonl"} <= {*kept} < {*files}
    for name in kept:
        shutil.copy(checkpoint / name, tmp_path)
    assert sample.load(tmp_path).rewards == shapes.ANALYTIC             # it is all that is needed
    card = (checkpoint / "README.md").read_text()
    assert card.startswith("---\npipeline_tag: text-to-image\n") and "\n| `--lr` | 0.002 |" in card
    assert "for 8 steps" in card and "None" not in card and "told alignment, colorfulness" in card
    [command] = re.findall("^python (.*)$", card, re.M)
    script, *words = shlex.split(command.replace("OWNER/NAME", str(tmp_path)))
    succeed(script, *words, "--out", tmp_path / "a.png", "--steps", 1)


@dataclass(frozen=True)
class Forked(model.Config):
    """A network with one more field."""
    twist: float = 1.0


def test_a_run_is_resumed_in_another_precision_and_not_with_other_flags_or_data(
        world, checkpoint, monkeypatch):
    found = read_json(checkpoint / "config.json")
    parts = set_up(world, *EIGHT)
    parts.data.shards[2].digest = "another"                           # any of them
    monkeypatch.setattr(model, "Config", Forked)
    plain, twisted = set_up(world, *EIGHT), set_up(world, *EIGHT, "--twist", 2)
    assert new_run(twisted)[0].net.config.twist == 2
    args = replace(plain.args, out=str(checkpoint))
    assert train.start(new_run(plain)[0].net, args, plain.config, 1).start == 8
    train.same_run(found, plain.config, checkpoint)      # an old run does not know it: its default
    args, text = plain.config["args"], dict(plain.config["text_encoder"], length=3)
    for wanted, said in ((dict(args=args | dict(lr=0.1)), "trained with --lr 0.002, not 0.1"),
                         (dict(args=args | dict(latents=9)), "trained with --latents 8, not 9"),
                         (twisted.config, "trained with --twist 1.0, not 2.0"),
                         (dict(bins=None), "on other pictures, captions or scores .bins"),
                         (dict(data=parts.batches.digest()), "captions or scores .data"),
                         (dict(text_encoder=text), "captions or scores .text_encoder")):
        with pytest.raises(UserError, match=said):
            train.same_run(found, plain.config | wanted, checkpoint)


def test_runs_of_several_seeds_are_of_the_same_data_and_pooled_by_compare(world, tmp_path):
    for rewards_, seed in (("all", 0), ("all", 1), ("none", 0)):
        succeed("train.py", *TINY, "--data", world, "--steps", 1, "--seed", seed,
                "--rewards", rewards_, "--out", tmp_path / f"{rewards_}{seed}")
    groups = evaluate.group_runs([tmp_path / name for name in ("all0", "all1", "none0")])
    assert {label: [*group] for label, group in groups.items()} == {"none": [0], "all": [0, 1]}


def test_two_ranks_equal_one(world, child, tmp_path):
    # Shares of two: some micro-batches have a pass of self-conditioning, the other rank's have not.
    flags = [*TINY, "--data", world, "--steps", 4, "--save-every", 1, "--log-every", 1,
             "--batch", 4, "--seed", 1]
    ranks = [child("train.py", [*flags, "--accumulate", 2, "--out", "two"], tmp_path, environment)
             for environment in two_ranks()]
    one = child("train.py", [*flags, "--out", "one"], tmp_path)
    for process in (*ranks, one):
        process.join()
        assert process.exitcode == 0
    losses = [[line["loss"] for (_, val), line in logged(tmp_path / folder).items() if not val]
              for folder in ("one", "two")]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    start, first, second = (torch.cat([w.flatten() for w in state_of(tmp_path / folder, step)[
        "net"].values()]) for folder, step in (("one", 3), ("one", 4), ("two", 4)))
    # Sums of gradients round in another order: after four steps a thousandth of the last one.
    assert (second - first).norm() < 1e-3 * (first - start).norm()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_it_and_says_how_to_go_on(world, tmp_path, monkeypatch,
                                                              number):
    flags, loss, left = [*TINY, "--data", world, "--steps", 8], flow.loss, [9 + 4]
    monkeypatch.chdir(tmp_path)

    def deadly(*given):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return loss(*given)

    monkeypatch.setattr(flow, "loss", deadly)
    before = signal.signal(number, signal.SIG_DFL)                  # nohup ignores some of them
    for name in ("whole", "stopped"):
        code, _, stderr = run("train.py", *flags, "--out", name)
        assert code == (128 + number if name == "stopped" else 0), stderr
    assert f"stopped by {number.name} after step 4, whose checkpoint is in stopped: the" in stderr
    assert not list(Path("stopped").glob("grid-*"))
    signal.signal(number, before)
    succeed("train.py", *flags, "--out", "stopped")
    assert same(state_of(Path("whole")), state_of(Path("stopped")))


def test_a_folder_has_one_writer_and_many_readers(world, checkpoint, child, tmp_path):
    data, out = (shutil.copytree(folder, tmp_path / folder.name) for folder in (world, checkpoint))
    hold(data, shared=True)
    hold(out)
    try:
        done = subprocess.run([sys.executable, ROOT / "binning.py", data], capture_output=True,
                              text=True)
        for arguments, code in ((["rewards.py", data], 2),
                                (["train.py", *TINY, "--data", data, "--out", out, *EIGHT], 2),
                                (["train.py", *TINY, "--data", data, "--out", "b", *EIGHT], 0)):
            process = child(arguments[0], arguments[1:], tmp_path)
            process.join()
            assert process.exitcode == code, arguments
    finally:
        for file in HELD.values():
            file.close()
        HELD.clear()
    assert done.returncode == 2
    assert f"{data} is in use by process {os.getpid()} on " in done.stderr
    succeed("binning.py", data)                                     # free again


def test_ranks_that_read_other_data_say_so_before_the_first_step(world, child, tmp_path):
    other = tmp_path / "other"
    shapes.write_world(other, 300, seed=1, size=16, shard=100)
    ranks = [child("train.py", [*TINY, "--data", folder, "--out", "run", "--steps", 2, "--rewards",
                                "none"], tmp_path, environment)
             for folder, environment in zip((world, other), two_ranks())]
    for process in ranks:
        process.join(60)
    assert ranks[1].exitcode == 2 and ranks[0].exitcode in (1, 2)
    assert not list((tmp_path / "run").glob("state-*"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_state(world, tmp_path):
    flags = [*TINY, "--data", world, "--out", tmp_path / "run", "--lr", 1e18, "--steps", 8]
    for more, step, state in (((), 8, "none"), (("--log-every", 1), 2, "none"),
                              (("--save-every", 1), 2, tmp_path / "run/state-00000001.pt")):
        said = refused("train.py", *flags, *more)
        assert f"not finite after step {step}; the last good checkpoint is {state}: " in said
    assert train.load_checkpoint(tmp_path / "run")["step"] == 1


def test_one_command_scores_bins_trains_and_evaluates_the_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate_folder = evaluate.evaluate_folder
    monkeypatch.setattr(evaluate, "evaluate_folder", lambda *given: evaluate_folder(*given, n=12))
    shapes.write_world("runs/world", 300, seed=0)
    rewards.score_dataset(Data("runs/world"), ("contrast",))         # it scores what is lacking
    stdout = succeed("train.py", *TINY, "--world", 300, "--steps", 2, "--keep-every", 1)
    written = {str(path.relative_to("runs")) for path in Path("runs").rglob("*")}
    assert {"world/bins.json", "shapes/model.safetensors", "shapes/log.jsonl",
            "shapes/grid-000002.png", "shapes/evaluation.json", "shapes/state-00000002.pt",
            "shapes/step-000001/model.safetensors"} <= written
    config = json.loads(Path("runs/shapes/config.json").read_text())
    assert config["network"]["rewards"] == [*shapes.ANALYTIC]
    assert config["targets"] == sample.WORLD_TARGETS
    assert "alignment by task" in stdout and "python sample.py --checkpoint" in stdout
    card = Path("runs/shapes/README.md")
    assert "asked for `all=0.75 alignment=1`" in card.read_text()
    card.write_text("license: mit")                                   # the user's, from now on
    run("evaluate.py", "shapes", "runs/shapes", "--n", 6, "--targets", "all=0.5")
    succeed("train.py", *TINY, "--world", 300, "--steps", 2, "--keep-every", 1)
    assert card.read_text() == "license: mit"


def test_minutes_become_steps_which_the_run_keeps(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "DRAWN", 0)
    flags = [*TINY, "--data", str(world), "--out", str(tmp_path / "run"), "--log-every", "50"]
    monkeypatch.setattr(train, "BEGAN", began := time.time())
    train.main([*flags, "--minutes", "0.1"])
    took, printed = time.time() - began, capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    steps = config["args"]["steps"]
    assert 3 < took < 12 and config["step"] == steps > 20, (took, steps)
    assert f"pictures/s: {steps} steps in 0.1 minutes, all in --minutes 0.1" in printed
    for more in (["--minutes", "0.1"], ["--steps", str(steps)]):           # it is finished
        train.main([*flags, *more])
        assert json.loads((tmp_path / "run" / "config.json").read_text()) == config
    with pytest.raises(UserError, match="trained with --minutes 0.1, not 30.0: pass --out"):
        train.main([*flags, "--minutes", "30"])
    with pytest.raises(UserError, match="--steps and --minutes say the same: give one"):
        train.main([*flags, "--minutes", "30", "--steps", "3"])
    with pytest.raises(UserError, match="--minutes 0.1 leave no time to train: give more"):
        monkeypatch.setattr(train, "BEGAN", began - 60)
        train.main([*flags, "--minutes", "0.1", "--out", str(tmp_path / "other")])
    HELD.clear()


def test_a_baseline_of_pictures_with_a_flat_channel_trains_and_is_sampled(tmp_path):
    written = columns([("red", "a dot")] * 30)
    (tmp_path / "d").mkdir()
    written["pixels"][:, 2] = 7
    write_shard(tmp_path / "d" / "a.safetensors", written)
    write_info(tmp_path / "d", dict(kind="pixels", size=4, shards=1, words=["a", "dot", "red"],
                                    longest=2))
    succeed("train.py", *TINY, "--data", tmp_path / "d", "--rewards", "none", "--out",
            tmp_path / "run", "--steps", 2)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["mean"][2], config["std"][2]) == (7, 1)
    succeed("sample.py", "--checkpoint", tmp_path / "run", "--prompt", "a red dot", "--out",
            tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()
