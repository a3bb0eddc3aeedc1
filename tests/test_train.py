"""train.py: the optimizers, the coins, one step, and runs that are killed, resumed and shared."""
import copy
import json
import math
import os
import pickle
import random
import shutil
import socket
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run, sentences
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import binning
import evaluate
import flow
import sample
import train
from data import Pictures, Words
from model import PRESETS, Config, RMSNorm, TextRIN
from rewards import ANALYTIC, score_dataset

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


def lamb_by_hand(p: list, grads: list, lr: float, decay: float, trusted: bool) -> list:
    """LAMB on plain floats, after the paper; the decay is part of the step, as in the release."""
    m, v = [0.0] * len(p), [0.0] * len(p)
    for k, grad in enumerate(grads, 1):
        m = [0.9 * a + 0.1 * g for a, g in zip(m, grad)]
        v = [0.999 * a + 0.001 * g * g for a, g in zip(v, grad)]
        step = [a / (1 - 0.9 ** k) / (math.sqrt(b / (1 - 0.999 ** k)) + 1e-8) + decay * c
                for a, b, c in zip(m, v, p)]
        size, length = math.hypot(*p), math.hypot(*step)
        trust = size / length if trusted and size and length else 1
        p = [a - lr * trust * b for a, b in zip(p, step)]
    return p


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lamb_is_its_formula_and_leaves_out_norms_and_biases(decay):
    small = dict(size=4, patch=2, data_dim=8, latents=2, latent_dim=8, blocks=1, layers=1,
                 text_dim=8)
    net = TextRIN(Config(**PRESETS["shapes"] | small | dict(rewards=("clip", "vqa"))))
    args = train.read_args(["--optimizer", "lamb", "--lr", "0.05", "--weight-decay", str(decay)])
    [lamb], rng = train.optimizers_for(net, args), torch.Generator().manual_seed(0)
    named = dict(net.named_parameters())
    starts = {name: p.detach().clone() for name, p in named.items()}
    grads = {name: torch.randn(3, p.numel(), generator=rng) for name, p in named.items()}
    for k in range(3):
        for name, p in named.items():
            p.grad = grads[name][k].view_as(p).clone()
        lamb.step()
    for name, p in named.items():
        plain = "norm" in name or name.startswith("previous_out") or name.endswith("bias")
        plain &= not name.startswith("log_variance")
        wanted = lamb_by_hand(starts[name].flatten().tolist(), grads[name].tolist(), 0.05,
                              0 if plain else decay, not plain)
        assert torch.allclose(p.flatten(), torch.tensor(wanted), rtol=1e-4, atol=1e-5), name


def test_the_rate_warms_up_linearly_and_follows_the_cosine():
    args = train.read_args(["--steps", "100", "--warmup", "10"])
    rates = [train.schedule(step, args) for step in range(101)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert rates[10:] == pytest.approx([(1 + math.cos(math.pi * k / 90)) / 2 for k in range(91)])


def test_a_cosine_rate_of_0_8_ends_before_the_cosine_does():
    args = train.read_args(["--steps", "100", "--warmup", "0", "--cosine-rate", "0.8"])
    assert train.schedule(0, args) == 1
    assert train.schedule(50, args) == pytest.approx((1 + math.cos(0.4 * math.pi)) / 2)
    assert train.schedule(100, args) == pytest.approx((1 + math.cos(0.8 * math.pi)) / 2)


# ---- the coins of a sample -----------------------------------------------------------------------

def flat(drawn: dict) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in drawn.values()])


def test_the_random_numbers_of_a_sample_depend_on_seed_and_position_alone():
    first = flat(train.draws(1, 5, (3, 4, 4), 5))
    np.random.seed(7)
    torch.manual_seed(7)
    train.draws(1, 4, (3, 4, 4), 5)
    assert np.array_equal(flat(train.draws(1, 5, (3, 4, 4), 5)), first)
    assert not np.isin(flat(train.draws(2, 5, (3, 4, 4), 5)), first).any()
    assert not np.isin(flat(train.draws(1, 6, (3, 4, 4), 5)), first).any()
    fewer = train.draws(1, 5, (3, 4, 4), 2)                  # an ablation sees the same noise
    assert all(np.array_equal(fewer[key], value) or key == "rewards"
               for key, value in train.draws(1, 5, (3, 4, 4), 5).items())


ENCODER = Words(("a", "red", "circle", "two", "blue", "squares"), 8, 4)
TEXTS = ("a red circle", "two blue squares")
N = 4000


@pytest.fixture(scope="module")
def two_captions() -> tuple:
    """4,000 samples, each with two captions of levels 0.25 and 0.75: a step and its source."""
    step = dict(position=torch.arange(N) + 10 ** 6, row=torch.arange(N) % 7,
                picture=torch.zeros(N, 3, 2, 2, dtype=torch.uint8))
    source = dict(s=[np.array([[0.25, 0.5], [0.75, 0.5]])] * 7, rewards=["x", "y"], channels=3,
                  mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))
    return step, SimpleNamespace(captions=[TEXTS] * 7), source


def batch_of(two_captions, **flags) -> list:
    step, dataset, source = two_captions
    args = replace(train.read_args(["--size", "2", "--patch", "1"]), **flags)
    return train.make_batch(step, dataset, ENCODER, args, source, CPU)


def test_levels_move_with_the_caption_that_is_chosen(two_captions):
    _, _, _, s, text, _, _ = batch_of(two_captions)
    first, second = ENCODER.encode(list(TEXTS))[0]
    says_first = (text == first).all((1, 2))
    assert torch.equal(~says_first, (text == second).all((1, 2)))
    assert torch.equal(s[:, 0], torch.where(says_first, 0.25, 0.75)) and (s[:, 1] == 0.5).all()
    assert says_first.float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_reward_dropout_withholds_its_share_of_levels_and_nothing_else(two_captions, share):
    whole, dropped = batch_of(two_captions), batch_of(two_captions, reward_dropout=share)
    gone = dropped[3] == -1
    assert gone.float().mean((0)).tolist() == pytest.approx([share, share], abs=0.03)
    assert torch.equal(dropped[3], torch.where(gone, -1.0, whole[3]))
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(whole, dropped)) if i != 3)
    both = (gone[:, 0] & gone[:, 1]).float().mean()                       # a coin for each reward
    assert both == pytest.approx(share ** 2, abs=0.03)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_text_dropout_leaves_the_empty_caption_and_keeps_the_levels(two_captions, share):
    whole, dropped = batch_of(two_captions), batch_of(two_captions, text_dropout=share)
    empty = (dropped[4] == ENCODER.encode([""])[0]).all((1, 2))
    assert empty.float().mean() == pytest.approx(share, abs=0.03)
    assert torch.equal(dropped[4][~empty], whole[4][~empty])
    assert torch.equal(dropped[5].sum(1), torch.where(empty, 1, 3))
    assert all(torch.equal(whole[i], dropped[i]) for i in (0, 1, 2, 3, 6))


@pytest.mark.parametrize("mean", [0.0, 1.2])
def test_self_conditioning_strikes_its_share_and_times_are_logit_normal(two_captions, mean):
    _, eps, t, _, _, _, chosen = batch_of(two_captions, self_condition=0.3, t_mean=mean)
    assert chosen.float().mean() == pytest.approx(0.3, abs=0.03)
    normal = torch.special.logit(t.double())
    assert (normal.mean(), normal.std()) == pytest.approx((mean, 1), abs=0.05)
    assert eps.std() == pytest.approx(1, abs=0.02) and 0 < t.min() and t.max() < 1


# ---- one step ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def parts(world) -> SimpleNamespace:
    """What main() has before its loop: data, config, and a batch of 8."""
    args = train.read_args([*TINY, "--data", str(world), "--out", "not-there", "--lr", "0.01",
                            "--self-condition", "0.9"])
    found, val, s, s_val, bins, encoder = train.prepare_data(args, 0)
    config = train.describe(args, found, val, s, bins, encoder)
    config["network"]["zero_out"] = False                    # what is zero does not tell much
    source = dict(s=s, rewards=bins.names, channels=3,
                  mean=torch.tensor(config["mean"]).view(-1, 1, 1),
                  std=torch.tensor(config["std"]).view(-1, 1, 1))
    step = next(train.batches(found, 0, 0, 1, 8))
    batch = train.make_batch(step, found, encoder, args, source, CPU)
    return SimpleNamespace(args=args, train=found, val=val, s=s, s_val=s_val, config=config,
                           encoder=encoder, source=source, batch=batch, step=step)


def new_run(parts, **flags) -> tuple:
    args = replace(parts.args, **flags)
    return train.build(args, parts.config, CPU, 1, torch.float32), args


def weights(net) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def descend(parts, batch, **flags) -> torch.Tensor:
    """The unclipped gradient that a step applies, as the way of plain descent at rate 1."""
    run_, args = new_run(parts, clip=1e9, warmup=0, **flags)
    run_.optimizers = [torch.optim.SGD(run_.net.parameters(), lr=1.0)]
    run_.optimizers[0].param_groups[0]["peak"] = 1.0
    before = weights(run_.net)
    mse, norm = train.train_step(run_, args, 0, batch, 1, torch.float32)
    way = before - weights(run_.net)
    assert len(mse) == len(batch[0]) and norm == pytest.approx(float(way.norm()), rel=1e-3)
    return way


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_gradient_accumulation_equals_one_large_batch(parts, accumulate):
    one = descend(parts, parts.batch)
    many = descend(parts, parts.batch, accumulate=accumulate)
    assert (many - one).norm() < 1e-5 * one.norm()                    # sums in another order


@pytest.mark.parametrize("left", [7, 5, 1])
def test_unreadable_pictures_take_nothing_but_their_own_share_from_a_step(parts, left):
    batch = [tensor[:left] for tensor in parts.batch]
    alone = sum(descend(parts, [tensor[i:i + 1] for tensor in batch]) for i in range(left))
    for accumulate in (1, 4, 8):                                      # some micro-batches are empty
        way = descend(parts, batch, accumulate=accumulate)
        assert (way - alone).norm() < 1e-5 * alone.norm()


@pytest.mark.filterwarnings("ignore:std")                  # of no value at all
def test_a_batch_without_a_readable_picture_moves_nothing(parts):
    nothing = {key: value[:0] for key, value in parts.step.items()}
    batch = train.make_batch(nothing, parts.train, parts.encoder, parts.args, parts.source, CPU)
    assert [len(tensor) for tensor in batch] == [0] * 7
    assert not descend(parts, batch).any() and not descend(parts, batch, accumulate=4).any()


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "lamb"])
@pytest.mark.parametrize("zero_out, steps", [(False, 3), (True, 6)])
def test_every_parameter_moves_within_a_few_steps(parts, optimizer, zero_out, steps):
    network = parts.config["network"] | dict(zero_out=zero_out)
    run_, args = new_run(SimpleNamespace(args=parts.args, config=dict(network=network)),
                         optimizer=optimizer)
    before = {name: p.detach().clone() for name, p in run_.net.named_parameters()}
    for step in range(steps):
        train.train_step(run_, args, step, parts.batch, 1, torch.float32)
    still = [name for name, p in run_.net.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_norms_and_biases_are_not_decayed_and_learned_tokens_by_lamb_alone(parts):
    for optimizer in ("muon", "adamw", "lamb"):
        run_, args = new_run(parts, optimizer=optimizer, weight_decay=0.5)
        names = {id(p): name for name, p in run_.net.named_parameters()}
        groups = [group for o in run_.optimizers for group in o.param_groups]
        assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(
            names.values())                                           # each has one optimizer
        decayed = {names[id(p)] for group in groups if group["weight_decay"]
                   for p in group["params"]}
        spared = {name for name in names.values() if "norm" in name or name.endswith("bias")}
        spared.add("previous_out.weight")                              # a norm, too
        if optimizer == "lamb":                        # the release decays all of the log-variance
            assert decayed == set(names.values()) - spared | {"log_variance.1.bias"}
        else:
            assert decayed and all(name.endswith("weight") for name in decayed - spared)
            assert not decayed & spared


def test_the_average_moves_once_an_optimizer_step_by_its_formula(parts):
    run_, args = new_run(parts, accumulate=4, ema=0.3)
    wanted = weights(run_.net)
    for step in range(5):
        train.train_step(run_, args, step, parts.batch, 1, torch.float32)
        decay = min(0.3, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * weights(run_.net)
        assert torch.allclose(weights(run_.average), wanted, atol=1e-6)
    assert not torch.allclose(weights(run_.net), wanted, atol=1e-3)


def test_the_gradient_norm_is_clipped(parts):
    run_, args = new_run(parts, clip=1e-3, warmup=0)
    run_.optimizers = [torch.optim.SGD(run_.net.parameters(), lr=1.0)]
    run_.optimizers[0].param_groups[0]["peak"] = 1.0
    before = weights(run_.net)
    _, norm = train.train_step(run_, args, 0, parts.batch, 1, torch.float32)
    assert norm > 0.1 and (before - weights(run_.net)).norm() == pytest.approx(1e-3, rel=1e-2)


def test_recompute_gives_the_same_gradients_without_a_further_matrix_product(parts):
    found = {}
    for again in (False, True):
        run_, args = new_run(parts, recompute=again)
        norms = [m for m in run_.net.modules() if isinstance(m, RMSNorm)]
        calls = [norm.register_forward_hook(lambda *_: norms.append(None)) for norm in norms]
        with FlopCounterMode(display=False) as counter:
            flow.loss(run_.model, *parts.batch)[1].mean().backward()
        found[again] = ([p.grad for p in run_.net.parameters()], counter.get_total_flops(),
                        norms.count(None) / len(calls))
    (plain, flops, once), (same, flops_again, more) = found.values()
    assert all(torch.equal(a, b) for a, b in zip(plain, same)) and flops == flops_again
    assert more > 1.3 * once                  # all norms but the first and the last, a second time


def test_bf16_gives_nearly_the_same_loss(parts):
    run_, args = new_run(parts)
    half, _ = train.train_step(run_, args, 0, parts.batch, 1, torch.bfloat16)
    run_, args = new_run(parts)
    full, _ = train.train_step(run_, args, 0, parts.batch, 1, torch.float32)
    assert torch.allclose(half, full, rtol=0.03) and not torch.equal(half, full)


def test_self_conditioning_in_bf16_leaves_no_weight_without_a_gradient(parts):
    batch = [*parts.batch[:-1], torch.ones_like(parts.batch[-1])]
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        run_, args = new_run(parts, warmup=0)
        before = {name: p.detach().clone() for name, p in run_.net.named_parameters()}
        for step in range(2):
            train.train_step(run_, args, step, batch, 1, dtype)
        moved.append({name for name, p in run_.net.named_parameters()
                      if not torch.equal(p, before[name])})
    assert moved[0] == moved[1] and len(moved[0]) > 100


def test_fp16_skips_a_step_that_overflows_and_stops_when_all_do(parts):
    run_, args = new_run(parts)
    run_.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train.train_step(run_, args, 0, parts.batch, 1, torch.float32)
    before = weights(run_.net)
    run_.net.patch_in.weight.register_hook(lambda grad: grad * math.inf)     # of AdamW, not of Muon
    for step in (1, 2):                                               # its scale: 4, 2, 1
        train.train_step(run_, args, step, parts.batch, 1, torch.float32)
    assert torch.equal(weights(run_.net), before)
    with pytest.raises(FloatingPointError):
        train.train_step(run_, args, 3, parts.batch, 1, torch.float32)


def test_the_validation_loss_has_fixed_noise_true_levels_and_no_dropout(parts, monkeypatch):
    run_, args = new_run(parts, reward_dropout=0.9, text_dropout=0.9)
    source, positions, draws = parts.source | dict(s=parts.s_val), [], train.draws
    monkeypatch.setattr(train, "draws", lambda seed, position, *rest:
                        positions.append(position) or draws(seed, position, *rest))
    losses = []
    for seed in range(2):
        torch.manual_seed(seed)
        losses.append(train.validate(run_, parts.val, parts.encoder, args, source, CPU))
    without = replace(args, reward_dropout=0.0, text_dropout=0.0)
    losses.append(train.validate(run_, parts.val, parts.encoder, without, source, CPU))
    assert len(set(losses)) == 1 and math.isfinite(losses[0])
    other = source | dict(s=[1 - s for s in parts.s_val])
    assert train.validate(run_, parts.val, parts.encoder, args, other, CPU) != losses[0]
    assert len(set(positions)) == len(parts.val) and min(positions) > 10 ** 15   # training's never


def test_training_and_validation_share_no_picture(parts):
    names = [{part.name(i) for i in range(len(part))} for part in (parts.train, parts.val)]
    assert [len(found) for found in names] == [292, 8] and not names[0] & names[1]


def unpacked_with_two_cut(world, tmp_path):
    """The world as a folder of files, where two pictures of 300 end after 100 bytes."""
    folder = tmp_path / "pictures"
    with tarfile.open(world / "00000.tar") as tar:
        tar.extractall(folder, filter="data")
    for key in ("00000007", "00000123"):
        path = folder / f"{key}.png"
        path.write_bytes(path.read_bytes()[:100])
    return folder


def test_a_sample_without_scores_moves_no_other_in_or_out_of_validation(world, tmp_path):
    folder = unpacked_with_two_cut(world, tmp_path)
    miro, baseline = (train.prepare_data(train.read_args(
        [*TINY, "--data", str(folder), "--val", "40", "--rewards", names]), 0)
        for names in ("all", "none"))
    for here, there, s in zip(miro[:2], baseline[:2], miro[2:4]):             # training, validation
        names = [there.name(i) for i in range(len(there))]
        assert [here.name(i) for i in range(len(here))] == [
            name for name in names if name not in ("00000/00000007", "00000/00000123")]
        assert len(s) == len(here) and all(len(levels) == len(texts)
                                           for levels, texts in zip(s, here.captions))
    assert len(miro[0]) + len(miro[1]) == 298 and len(baseline[1]) == 40


def test_the_encoder_holds_the_longest_caption_as_it_counts_words(tmp_path):
    for i in range(12):
        sample.Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a red-and-blue-and-green-and-pink circle")
    args = train.read_args([*TINY, "--val", "2", "--data", str(tmp_path), "--rewards", "none"])
    _, val, _, _, _, encoder = train.prepare_data(args, 0)
    assert encoder.encode(list(val.captions[0]))[1].sum() == 9


def test_pixels_become_zero_mean_and_unit_deviation(parts):
    pictures = torch.stack([parts.train.picture(i) for i in range(len(parts.train))]).float()
    x = (pictures - parts.source["mean"]) / parts.source["std"]
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_the_loss_by_quarters_of_t_averages_to_the_loss():
    rng = torch.Generator().manual_seed(0)
    mse, t = torch.rand(999, generator=rng), torch.rand(999, generator=rng) ** 2
    t[0], t[1] = 0, 1
    loss, by_t = train.summary(mse, t, 1)
    quarters = [(t >= q / 4) & ((t < (q + 1) / 4) | (q == 3)) for q in range(4)]
    assert loss == pytest.approx(float(mse.mean()), rel=1e-5)
    assert by_t == pytest.approx([float(mse[chosen].mean()) for chosen in quarters], abs=1e-5)
    assert sum(value * float(chosen.float().mean()) for value, chosen in zip(by_t, quarters)) \
        == pytest.approx(loss, abs=1e-4)
    assert train.summary(mse[:2], torch.tensor([0.1, 0.9]), 1)[1][1:3] == [None, None]   # not 0


# ---- runs: resumed, killed, damaged --------------------------------------------------------------

def same(a, b) -> bool:
    """Are two nests of dicts, lists and tensors equal to the last bit?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(folder, step=8) -> dict:
    return torch.load(folder / f"state-{step:08d}.pt", weights_only=True)


def logged(folder) -> dict:
    """{step: what was logged}, without speed: of repeated steps the last."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {(line["step"], "val" in line):
            {key: value for key, value in line.items() if key not in ("rate", "minutes")}
            for line in lines if "step" in line}


def assert_equal_runs(one, other) -> None:
    """Final state, weights, log and pictures of two runs, to the last bit."""
    assert same(state(one), state(other))
    assert same(load_file(one / "model.safetensors"), load_file(other / "model.safetensors"))
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert logged(one) == logged(other)
    assert (one / "grid-000008.png").read_bytes() == (other / "grid-000008.png").read_bytes()


def assert_whole(folder) -> None:
    """Is everything that has its final name readable?"""
    for path in folder.glob("state-*.pt"):
        torch.load(path, weights_only=True)
    if (folder / "model.safetensors").exists():
        load_file(folder / "model.safetensors")
    for path in folder.glob("*.png"):
        sample.Image.open(path).load()


def test_kill_9_at_any_moment_of_a_checkpoint_loses_nothing(world, checkpoint, child, tmp_path):
    arguments = [*TINY, "--data", world, "--out", tmp_path / "run", *EIGHT]
    # Files of steps 2, 4 and 6: model, config, state. Of step 8: grid and curves before them. Each
    # line starts from what the one before has left.
    for kill, left in ((("save", 1), []),                     # in the middle of the first state
                       (("replace", 3), []),                  # the state is written, has no name
                       (("replace", 6), [2]),                 # the state of step 4
                       (("replace", 5), [2, 4]),              # config.json of step 6
                       (("fsync", 5), [4, 6]),                # curves.png of step 8
                       (("replace", 5), [4, 6])):             # the last state; its model is there
        process = child("train.py", arguments, tmp_path, kill=kill)
        process.join()
        assert process.exitcode == -9, kill
        assert_whole(tmp_path / "run")
        assert sorted(int(path.stem[6:]) for path in (tmp_path / "run").glob("state-*")) == left
    process = child("train.py", arguments, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert_equal_runs(tmp_path / "run", checkpoint)
    assert len(list((tmp_path / "run").glob("state-*.pt"))) == 2


def test_kill_9_at_random_moments_loses_nothing(world, checkpoint, child, tmp_path):
    arguments = [*TINY, "--data", world, "--out", tmp_path / "run", *EIGHT]
    for seed in range(3):
        process = child("train.py", arguments, tmp_path)
        start = time.monotonic()
        while not (tmp_path / "run").exists() and time.monotonic() < start + 60:
            time.sleep(0.01)                                          # until the loop begins
        time.sleep(random.Random(seed).uniform(0, 0.6))
        process.kill()
        process.join()
        assert_whole(tmp_path / "run")
    process = child("train.py", arguments, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert_equal_runs(tmp_path / "run", checkpoint)


def test_a_finished_run_stays_as_it_is_when_its_command_runs_again(world, checkpoint, tmp_path):
    out = shutil.copytree(checkpoint, tmp_path / "run")
    code, _, stderr = run("train.py", *TINY, "--data", world, "--out", out, *EIGHT)
    assert code == 0, stderr
    assert_equal_runs(out, checkpoint)


DAMAGES = {"half": lambda content: content[:len(content) // 2], "nothing": lambda content: b"",
           "zeros": lambda content: bytes(len(content)), "text": lambda content: b"hello world",
           "its end": lambda content: content[:-10], "a list": lambda _: pickle.dumps([1, 2], 2)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_state_falls_back_to_the_one_before_and_says_so(
        checkpoint, tmp_path, damage, capsys):
    out = shutil.copytree(checkpoint, tmp_path / "run")
    newest = out / "state-00000008.pt"
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    assert train.load_checkpoint(out)["step"] == 6
    assert f"{newest} cannot be read" in (said := capsys.readouterr().err)
    assert "trying the one before" in said and said.count("\n") == 1


def test_a_run_from_the_state_before_ends_bitwise_equal(world, checkpoint, tmp_path):
    out = shutil.copytree(checkpoint, tmp_path / "run")
    newest = out / "state-00000008.pt"
    newest.write_bytes(newest.read_bytes()[:100_000])
    (out / "model.safetensors").unlink()
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')                                 # a kill cut the last line
    code, _, stderr = run("train.py", *TINY, "--data", world, "--out", out, *EIGHT)
    assert code == 0 and "state-00000008.pt cannot be read" in stderr
    assert_equal_runs(out, checkpoint)


def test_the_newest_two_states_are_kept_as_tensors_and_plain_types(checkpoint):
    assert sorted(path.name for path in checkpoint.glob("state-*")) == [
        "state-00000006.pt", "state-00000008.pt"]
    assert state(checkpoint)["step"] == 8                             # weights_only=True read it
    config = json.loads((checkpoint / "config.json").read_text())
    assert state(checkpoint)["config"] | {"step": 8} == config        # nothing is lost in the JSON
    assert config["time"] == "t = 0 is data, t = 1 is noise"
    average = load_file(checkpoint / "model.safetensors")
    assert same(average, dict(state(checkpoint)["average"]))
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in average)


def test_a_run_that_began_in_fp32_goes_on_where_precision_is_fp16(world, checkpoint, tmp_path,
                                                                   monkeypatch):
    out = shutil.copytree(checkpoint, tmp_path / "run")
    (out / "state-00000008.pt").unlink()
    monkeypatch.setattr(train, "precision", lambda *_: torch.float16)     # auto, on an older GPU
    train.main([*TINY, "--data", str(world), "--out", str(out), *map(str, EIGHT)])
    assert state(out)["step"] == 8 and state(out)["scaler"]["scale"] > 0


@pytest.mark.parametrize("flag, value", [("lr", 0.1), ("seed", 1), ("optimizer", "lamb"),
                                         ("rewards", "contrast"), ("text_dropout", 0.5)])
def test_other_flags_do_not_resume_a_run_and_are_named(checkpoint, flag, value):
    found = json.loads((checkpoint / "config.json").read_text())
    wanted = copy.deepcopy(found)
    wanted["args"][flag] = value
    train.same_run(found, copy.deepcopy(found), checkpoint)
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} .*, not {value}"):
        train.same_run(found, wanted, checkpoint)


@pytest.mark.parametrize("part", ["bins", "train_samples", "text_encoder"])
def test_a_run_is_not_resumed_on_other_data(checkpoint, part):
    found = json.loads((checkpoint / "config.json").read_text())
    with pytest.raises(ValueError, match=f"other pictures, captions or scores .{part}"):
        other = found["text_encoder"] | dict(length=3) if part == "text_encoder" else 3
        train.same_run(found, found | {part: other}, checkpoint)


def test_how_often_to_save_may_change_when_a_run_is_resumed(world, checkpoint, tmp_path):
    out = shutil.copytree(checkpoint, tmp_path / "run")
    (out / "state-00000008.pt").unlink()
    code, _, stderr = run("train.py", *TINY, "--data", world, "--out", out, *EIGHT,
                          "--save-every", 5)
    assert code == 0, stderr
    assert_equal_runs(out, checkpoint)


def test_two_ranks_equal_one(world, child, tmp_path):
    flags = [*TINY, "--data", world, "--steps", 4, "--save-every", 1, "--log-every", 1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [child("train.py", [*flags, "--accumulate", 2, "--out", "two"], tmp_path, dict(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port))) for rank in range(2)]
    one = child("train.py", [*flags, "--out", "one"], tmp_path)
    for process in (*ranks, one):
        process.join()
        assert process.exitcode == 0
    losses = [[line["loss"] for (_, val), line in logged(tmp_path / folder).items() if not val]
              for folder in ("one", "two")]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    start, first, second = (torch.cat([w.flatten() for w in state(tmp_path / folder, step)[
        "net"].values()]) for folder, step in (("one", 3), ("one", 4), ("two", 4)))
    # The sums of gradients round in another order, and the optimizers divide by their size: the
    # difference after four steps is a thousandth of the last of these steps.
    assert (second - first).norm() < 1e-3 * (first - start).norm()


# ---- the log and the command ---------------------------------------------------------------------

def test_the_log_begins_with_config_source_and_versions(checkpoint):
    head = json.loads((checkpoint / "log.jsonl").read_text().splitlines()[0])
    assert head["source"]["train.py"] == (ROOT / "train.py").read_text()
    assert set(head["source"]) == {path.name for path in ROOT.glob("*.py")}
    assert head["config"] | {"step": 8} == json.loads((checkpoint / "config.json").read_text())
    assert head["versions"]["torch"] == torch.__version__ and "python" in head["versions"]


def test_every_logged_loss_is_the_mean_of_its_steps(world, checkpoint, tmp_path):
    run("train.py", *TINY, "--data", world, "--out", tmp_path / "run", "--steps", 8,
        "--save-every", 8, "--log-every", 1, "--sample-every", 8)
    each, pairs = logged(tmp_path / "run"), logged(checkpoint)
    for step in (2, 4, 6, 8):
        mean = (each[step - 1, False]["loss"] + each[step, False]["loss"]) / 2
        assert pairs[step, False]["loss"] == pytest.approx(mean, rel=1e-5)
    assert each[8, True] == pairs[8, True]                            # nor does logging change it


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step_and_the_last_good_state(
        world, tmp_path):
    flags = [*TINY, "--data", world, "--out", tmp_path / "run", "--lr", 1e30, "--steps", 8]
    code, _, stderr = run("train.py", *flags)
    assert code == 2 and len(said := sentences(stderr)) == 1, stderr
    assert "the loss is not finite at step 1; the last good checkpoint is none" in said[0]
    code, _, stderr = run("train.py", *flags, "--save-every", 1)
    assert code == 2 and len(said := sentences(stderr)) == 1, stderr
    named = tmp_path / "run" / "state-00000001.pt"
    assert f"step 1; the last good checkpoint is {named}: lower --lr" in said[0]
    assert train.load_checkpoint(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize("rewards", ["none", "contrast"])
def test_a_network_without_rewards_or_with_one_trains_and_samples(world, tmp_path, rewards):
    out = tmp_path / "run"
    code, _, stderr = run("train.py", *TINY, "--data", world, "--out", out, "--steps", 2,
                          "--rewards", rewards)
    assert code == 0, stderr
    config = json.loads((out / "config.json").read_text())
    names = [] if rewards == "none" else [rewards]
    assert config["network"]["rewards"] == names
    assert (config["bins"]["names"] if names else config["bins"]) == (names or None)
    if names:                                                         # its own column of edges
        column = binning.load(world / "bins.json").select(names)
        assert config["bins"] == column.to_config()
    code, stdout, stderr = run("sample.py", "--checkpoint", out, "--prompt", "a red circle",
                               "--steps", 2, "--out", tmp_path / "out.png")
    assert code == 0 and (tmp_path / "out.png").exists(), stderr
    assert f"targets {'contrast=1' if names else 'none'}\n" in stdout


def test_dry_run_states_the_cost_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, stdout, _ = run("train.py", "--dry-run")
    assert code == 0 and not any(tmp_path.iterdir())
    assert "nothing was written" in stdout and "PFLOP in all" in stdout
    code, stdout, _ = run("train.py", "--preset", "paper", "--dry-run", "--rewards", "none")
    assert code == 0 and not any(tmp_path.iterdir())
    assert "optimizer        lamb" in stdout and "steps            500000" in stdout


def test_unreadable_pictures_do_not_stop_a_run_and_are_listed(world, tmp_path):
    folder = unpacked_with_two_cut(world, tmp_path)
    code, stdout, stderr = run("train.py", *TINY, "--data", folder, "--rewards", "none", "--batch",
                               32, "--accumulate", 2, "--steps", 10, "--out", tmp_path / "run")
    assert code == 0, stderr
    assert "left out 00000/00000007: " in stdout and "left out 00000/00000123: " in stdout
    assert not any(folder.glob("*scores*"))


def test_a_reward_that_the_scored_world_lacks_is_scored_and_told(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world, "runs/world")
    for name in ("00000.scores.jsonl", "bins.json"):
        Path("runs/world", name).unlink()
    score_dataset(Pictures("runs/world", 16), ("contrast",))
    monkeypatch.setattr(evaluate, "evaluate_folder", lambda *given: None)
    code, _, stderr = run("train.py", *TINY, "--world", 300, "--steps", 2)
    assert code == 0, stderr
    config = json.loads(Path("runs/shapes/config.json").read_text())
    assert config["network"]["rewards"] == [*ANALYTIC]
    assert config["targets"] == sample.WORLD_TARGETS


def test_one_command_makes_scores_and_bins_the_world_and_trains_and_evaluates(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = evaluate.evaluate_folder
    monkeypatch.setattr(evaluate, "evaluate_folder", lambda *given: whole(*given, n=12))
    code, stdout, stderr = run("train.py", *TINY, "--world", 300, "--steps", 2)
    assert code == 0, stderr
    written = {str(path) for path in map(os.path.relpath, tmp_path.glob("runs/*/*"))}
    assert {f"runs/world/{name}" for name in ("00000.tar", "00000.scores.jsonl", "bins.json")} \
        | {f"runs/shapes/{name}" for name in (
            "config.json", "model.safetensors", "log.jsonl", "curves.png", "grid-000002.png",
            "evaluation.json", "control.png", "state-00000002.pt")} <= written
    assert not [name for name in written if name.endswith(".tmp")]
    assert "alignment by task at all=1" in stdout and "python sample.py --checkpoint" in stdout
    config = json.loads((tmp_path / "runs" / "shapes" / "config.json").read_text())
    assert config["targets"] == sample.WORLD_TARGETS                      # of other data: all=1
