"""model.py: sizes of the released network, formulas written a second time, and invariances."""
import copy
import functools
import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import (MLP, PRESETS, Attention, Config, Fourier, Level, RMSNorm, SwiGLU, TextRIN,
                   from_patches, sincos, to_patches)

torch.set_num_threads(1)
SEVEN = ("aesthetic", "hpsv2", "image_reward", "pick", "vqa", "clip", "sci")
TINY = dict(channels=3, size=8, patch=2, data_dim=32, latents=5, latent_dim=48, blocks=2, layers=1,
            read_heads=2, heads=4, text_dim=10, text_heads=3, registers=2, sigma_data=0.7)
B, L = 3, 6                                                                 # samples, text tokens


def noise(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(rewards: int = 3, **changes) -> TextRIN:
    """A tiny network as training starts with it."""
    torch.manual_seed(0)
    return TextRIN(Config(rewards=SEVEN[:rewards], **TINY | changes))


def alive(rewards: int = 3, **changes) -> TextRIN:
    """A tiny network after some training, as it were: no parameter is zero or one any more."""
    model = fresh(rewards, **changes)
    for i, parameter in enumerate(model.parameters()):
        parameter.data += 0.2 * noise(*parameter.shape, seed=i + 1)
    return model


def inputs(rewards: int = 3) -> dict:
    """Arguments of forward; the captions have 2, 4 and 6 tokens."""
    return dict(x_t=noise(B, 3, 8, 8), t=torch.tensor([0.1, 0.5, 0.9]),
                s=torch.rand(B, rewards, generator=torch.Generator().manual_seed(1)),
                text=noise(B, L, 10, seed=2), text_mask=torch.arange(L) < torch.tensor(
                    [[2], [4], [6]]))


def same(a: tuple, b: tuple) -> bool:
    """Equal to 1e-5 of the largest entry."""
    return all((x - y).abs().max() <= 1e-5 * y.abs().max() for x, y in zip(a, b))


def seen_by(module: torch.nn.Module, run) -> tuple:
    """The arguments that a module receives while run() runs."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    run()
    handle.remove()
    return seen[0]


# ---- the released sizes --------------------------------------------------------------------------

@functools.cache
def paper(rewards: tuple = SEVEN) -> TextRIN:
    with torch.device("meta"):                                  # shapes without numbers: no memory
        return TextRIN(Config(rewards=rewards, **PRESETS["paper"]))


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_paper_preset_has_the_parameters_of_the_released_network():
    model = paper()
    assert count(model.log_variance) == 129                       # it belongs to the loss
    assert count(model) - 129 == 360_411_664
    assert all(p.requires_grad for p in model.parameters())


def test_each_reward_adds_an_embedder_and_a_position_and_nothing_else():
    D = PRESETS["paper"]["latent_dim"]
    embedder = (D // 4 * D + D) + (D * D + D)
    for n in (0, 6):
        assert count(paper()) - count(paper(SEVEN[:n])) == (7 - n) * (embedder + D)


def test_one_forward_of_the_paper_preset_costs_what_the_release_does():
    model = paper()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        model(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, 7),
              torch.empty(1, 77, 2048), torch.empty(1, 77, dtype=torch.bool))
    flops = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    products = flops.pop("aten.bmm")
    assert sum(flops.values()) == pytest.approx(167.6e9, rel=0.002)      # the linear layers
    # attention: 4 N M width each, which the release's figure of 167.6 leaves out. Per block: the
    # condition (time, 7 rewards, 16 registers, 77 tokens), reading, writing, 4 layers of latents
    block = 256 * 101 * 1024 + 2 * 256 * 256 * 512 + 4 * 256 * 256 * 1024
    assert products == 4 * (4 * block + 2 * 100 * 100 * 1024)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_network_whose_parts_fit(preset):
    with torch.device("meta"):
        c = Config(rewards=SEVEN[:5], **PRESETS[preset])
        x_t = torch.empty(2, c.channels, c.size, c.size)
        v, z, u = TextRIN(c)(x_t, torch.empty(2), torch.empty(2, 5), torch.empty(2, 9, c.text_dim),
                             torch.empty(2, 9, dtype=torch.bool))
    assert (v.shape, z.shape, u.shape) == (x_t.shape, (2, c.latents, c.latent_dim), (2,))


# ---- the parts, written a second time ------------------------------------------------------------

@pytest.mark.parametrize("p, channels, side", [(1, 3, 4), (2, 4, 8), (3, 3, 24)])
def test_patches_run_row_by_row_with_the_channel_last_and_come_back(p, channels, side):
    x = noise(2, channels, side, side)
    patches, n = to_patches(x, p), side // p
    expected = np.empty((2, n * n, p * p * channels), np.float32)
    for i, j, row, column, c in np.ndindex(n, n, p, p, channels):
        expected[:, i * n + j, (row * p + column) * channels + c] = x[:, c, i * p + row,
                                                                      j * p + column]
    assert np.array_equal(patches.numpy(), expected)
    assert torch.equal(from_patches(patches, p), x)


def test_rms_norm_is_its_formula():
    norm, x = RMSNorm(16), 3 * noise(2, 5, 16)
    norm.weight.data = noise(16, seed=1)
    scale = torch.einsum("bnd,bnd->bn", x, x).div(16).add(1e-6).sqrt()
    assert torch.allclose(norm(x), torch.einsum("bnd,bn,d->bnd", x, 1 / scale, norm.weight))


def test_swiglu_is_its_formula_with_a_hidden_size_of_the_next_multiple_of_256():
    for dim, hidden in ((48, 256), (96, 256), (97, 512), (512, 1536), (1024, 2816)):
        with torch.device("meta"):
            assert SwiGLU(dim).out.in_features == hidden
    mlp, x = SwiGLU(48), noise(2, 5, 48)
    up, bias = mlp.up.weight.unflatten(0, (2, -1)), mlp.up.bias.unflatten(0, (2, -1))
    a, b = torch.einsum("ghd,bnd->gbnh", up, x) + bias[:, None, None]
    h = a * b / (1 + torch.exp(-b))
    assert torch.allclose(mlp(x), torch.einsum("dh,bnh->bnd", mlp.out.weight, h) + mlp.out.bias,
                          atol=1e-6)


def test_the_mlp_of_text_is_its_formula():
    mlp, x = MLP(16), noise(2, 5, 16)
    h = torch.einsum("hd,bnd->bnh", mlp.up.weight, x) + mlp.up.bias
    h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
    assert torch.allclose(mlp(x), torch.einsum("dh,bnh->bnd", mlp.out.weight, h) + mlp.out.bias,
                          atol=1e-6)


def test_a_level_is_its_formula():
    level, x = Level(64), torch.rand(7)
    f, phase = level.fourier.frequencies.double(), level.fourier.phases.double()
    h = math.sqrt(2) * torch.cos(torch.einsum("b,f->bf", x.double(), f) + phase)       # (7, 16)
    h = (h - h.mean(1, keepdim=True)) / h.var(1, keepdim=True).sqrt()
    h = torch.einsum("df,bf->bd", level.up.weight.double(), h) + level.up.bias.double()
    h = h / (1 + torch.exp(-h))
    expected = torch.einsum("ed,bd->be", level.out.weight.double(), h) + level.out.bias.double()
    assert torch.allclose(level(x).double(), expected, atol=1e-5)


def test_fourier_features_have_random_frequencies_in_turns_and_phases_of_a_circle():
    torch.manual_seed(0)
    fourier = Fourier(10_000)
    assert (fourier.frequencies / (2 * math.pi)).std().item() == pytest.approx(1, abs=0.03)
    assert 0 <= fourier.phases.min() and fourier.phases.max() <= 2 * math.pi
    assert fourier.phases.mean().item() == pytest.approx(math.pi, abs=0.1)
    assert fourier(torch.rand(20)).square().mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dim, source_dim, heads, width", [
    (32, 48, 2, 32), (48, 32, 4, 32), (48, 48, 3, 48), (24, None, 4, 24)])
@pytest.mark.parametrize("qk_norm, bias", [(True, False), (False, True)])
def test_attention_is_its_formula_at_the_narrower_of_both_widths(dim, source_dim, heads, width,
                                                                 qk_norm, bias):
    torch.manual_seed(0)
    attention = Attention(dim, source_dim, heads, qk_norm, bias)
    for i, parameter in enumerate(attention.parameters()):
        parameter.data += 0.3 * noise(*parameter.shape, seed=i)
    x, source = noise(2, 5, dim), None if source_dim is None else noise(2, 7, source_dim, seed=1)
    tokens = x if source is None else source
    mask = torch.arange(tokens.shape[1]) < torch.tensor([[3], [5]])

    of = lambda name: ([*attention.qkv.get_parameter(name).chunk(3)] if source is None else
                       [attention.q.get_parameter(name),
                        *attention.kv.get_parameter(name).chunk(2)])
    shifts = of("bias") if bias else [torch.zeros(width)] * 3
    q, k, v = (torch.einsum("hde,bne->bhnd", w.view(heads, width // heads, -1), a)
               + c.view(1, heads, 1, -1)
               for w, c, a in zip(of("weight"), shifts, (x, tokens, tokens)))
    if qk_norm:
        standard = lambda a, n: ((a - a.mean(-1, keepdim=True)) / (
            a.var(-1, keepdim=True, correction=0) + 1e-6).sqrt() * n.weight + n.bias)
        q, k = standard(q, attention.q_norm), standard(k, attention.k_norm)
    weight = torch.einsum("bhnd,bhmd->bhnm", q, k).div(math.sqrt(width // heads)).exp()
    weight = weight * mask[:, None, None]
    weight = weight / weight.sum(-1, keepdim=True)
    out = attention.out.weight.view(dim, heads, -1)
    expected = torch.einsum("bhnm,bhmd,ehd->bne", weight, v, out) + attention.out.bias
    read = None if source is None else attention.keys_values(source)
    assert torch.allclose(attention(x, read, mask), expected, atol=1e-5)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(AssertionError, match="5 heads"):
        Attention(48, 32, 5)
    with pytest.raises(AssertionError, match="patch 3"):
        fresh(patch=3)


@pytest.mark.parametrize("side, dim", [(4, 32), (8, 96), (16, 512)])
def test_sincos_positions_have_unit_variance_and_are_all_distinct(side, dim):
    positions = sincos(side, dim)
    assert positions.shape == (side * side, dim)
    assert torch.allclose(positions.square().mean(1), torch.ones(side * side))   # sin² + cos² = 1
    apart = torch.cdist(positions, positions) + 100 * torch.eye(side * side)
    assert apart.min() > 1
    grid = positions.view(side, side, dim)
    assert (grid[..., :dim // 2] == grid[:, :1, :dim // 2]).all()            # half says the row
    assert (grid[..., dim // 2:] == grid[:1, :, dim // 2:]).all()            # half says the column


# ---- what the network is told --------------------------------------------------------------------

def test_the_network_sees_unit_variance_at_every_time():
    model = fresh()
    for t in (0.0, 0.3, 0.7, 1.0):
        x_0, eps = 0.7 * noise(400, 3, 8, 8), noise(400, 3, 8, 8, seed=1)
        x_t = (1 - t) * x_0 + t * eps
        s, text, mask = torch.rand(400, 3), noise(400, 1, 10), torch.ones(400, 1, dtype=torch.bool)
        with torch.no_grad():
            patches, = seen_by(model.patch_in, lambda: model(x_t, torch.full((400,), t), s, text,
                                                             mask))
        assert patches.std().item() == pytest.approx(1, abs=0.02)


def test_an_output_of_unit_variance_is_a_velocity_of_the_variance_of_noise_less_data():
    model = fresh()
    torch.nn.init.zeros_(model.patch_out.weight)
    torch.nn.init.ones_(model.patch_out.bias)
    v = model(**inputs())[0]
    assert torch.allclose(v, torch.full_like(v, math.sqrt(1 + 0.7 ** 2)))


def test_the_network_is_fed_gamma_and_time_is_the_first_condition_token_and_in_every_latent():
    model, call = alive(), inputs()
    time = model.time(1 - call["t"])
    _, z, seen, (keys, values), mask = seen_by(model.blocks[0], lambda: model(**call))
    assert torch.allclose(seen[:, 0], time, atol=1e-6) and mask[:, 0].all()
    assert mask.shape[1] == keys.shape[2] + 1 == values.shape[2] + 1      # the block puts it first
    previous = model.previous_out(model.previous_mlp(model.previous_norm(torch.zeros(B, 5, 48))))
    assert torch.allclose(z - model.latents - previous, time[:, None].expand(-1, 5, -1), atol=1e-5)


def test_the_time_and_the_condition_are_all_that_the_loss_weight_and_the_tokens_depend_on():
    model, call = alive(), inputs()
    other = inputs() | dict(x_t=noise(B, 3, 8, 8, seed=9), s=1 - call["s"])
    assert torch.equal(model(**call)[2], model(**other)[2])                # u is a function of t
    later = model(**call | dict(t=call["t"] / 2))[2]
    assert (later != model(**call)[2]).all()


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_both_ends_of_the_path_are_finite(t):
    assert all(a.isfinite().all() for a in alive()(**inputs() | dict(t=torch.full((B,), t))))


def test_padding_tokens_do_not_change_the_output():
    model, call = alive(), inputs()
    out = model(**call)
    other = call["text"].where(call["text_mask"][..., None], 1e3 * noise(B, L, 10, seed=5))
    assert same(out, model(**call | dict(text=other)))
    longer = torch.cat([call["text"], noise(B, 4, 10, seed=6)], 1)
    mask = torch.cat([call["text_mask"], torch.zeros(B, 4, dtype=torch.bool)], 1)
    assert same(out, model(**call | dict(text=longer, text_mask=mask)))
    for i in range(B):                                # nor does leaving the padding away altogether
        n = call["text_mask"][i].sum()
        alone = {name: a[i:i + 1] for name, a in call.items()}
        alone |= dict(text=alone["text"][:, :n], text_mask=alone["text_mask"][:, :n])
        assert same([a[i:i + 1] for a in out], model(**alone))


def test_every_token_of_the_text_changes_the_velocity():
    model, call = alive(), inputs()
    v = model(**call)[0]
    for token in range(L):
        text = call["text"].clone()
        text[:, token] += 1
        moved = (model(**call | dict(text=text))[0] - v).abs().amax((1, 2, 3)) > 1e-3
        assert torch.equal(moved, call["text_mask"][:, token])


def test_a_sample_does_not_depend_on_its_neighbours():
    model, call = alive(), inputs() | dict(z=noise(B, 5, 48, seed=3))
    out = model(**call)
    for i in range(B):
        assert same([a[i:i + 1] for a in out], model(**{k: a[i:i + 1] for k, a in call.items()}))


def test_patches_are_told_apart_by_their_positions_alone():
    model, call = alive(), inputs()
    shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    v, z, _ = model(**call)
    model.positions.data = model.positions.data[shuffle]
    x_t = from_patches(to_patches(call["x_t"], 2)[:, shuffle], 2)
    v_shuffled, z_shuffled, _ = model(**call | dict(x_t=x_t))
    assert same([to_patches(v, 2)[:, shuffle], z], [to_patches(v_shuffled, 2), z_shuffled])


# ---- the rewards ---------------------------------------------------------------------------------

@pytest.mark.parametrize("reward", range(5))
def test_changing_one_target_changes_the_velocity(reward):
    model, call = alive(5), inputs(5)
    s = call["s"].clone()
    s[1, reward] = (s[1, reward] + 0.5) % 1
    moved = (model(**call | dict(s=s))[0] - model(**call)[0]).abs().amax((1, 2, 3)) > 1e-3
    assert moved.tolist() == [False, True, False]                # of the sample it belongs to


def test_the_lowest_level_is_not_the_same_as_not_asking():
    model, call = alive(), inputs()
    lowest, absent = (model(**call | dict(s=torch.full((B, 3), s)))[0] for s in (0.0, -1.0))
    assert ((lowest - absent).abs().amax((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("reward", range(3))
def test_a_reward_that_is_not_asked_for_loses_its_level_and_keeps_its_position(reward):
    model, call = alive(), inputs()
    s = call["s"].clone()
    s[:2, reward] = -1
    tokens, _ = seen_by(model.text_layers[0], lambda: model(**call | dict(s=s)))
    level = model.levels[reward](call["s"][:, reward])
    level[:2] = 0
    assert torch.allclose(tokens[:, reward], level + model.reward_positions[reward], atol=1e-6)

    v = model(**call | dict(s=s))[0]
    model.levels[reward].out.bias.data += 1                      # the embedder has no say any more
    changed = (model(**call | dict(s=s))[0] - v).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [False, False, True]
    model.levels[reward].out.bias.data -= 1
    model.reward_positions.data[reward] += 1                     # the position has
    changed = (model(**call | dict(s=s))[0] - v).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [True, True, True]


def test_rewards_may_be_stored_in_any_order():
    model, call, order = alive(5), inputs(5), [3, 0, 4, 1, 2]
    out = model(**call)
    model.levels = torch.nn.ModuleList(model.levels[i] for i in order)
    model.reward_positions.data = model.reward_positions.data[order]
    assert same(out, model(**call | dict(s=call["s"][:, order])))


# ---- training ------------------------------------------------------------------------------------

def gradients(model: TextRIN, call: dict) -> dict:
    """Gradients of a random weighting of all that the loss reads, v and u."""
    v, _, u = model(**call)
    ((v * noise(*v.shape, seed=7)).sum() + u.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("rewards", [0, 1, 5])
def test_every_parameter_receives_a_gradient(rewards):
    call = inputs(rewards) | dict(z=noise(B, 5, 48, seed=3))
    for name, gradient in gradients(alive(rewards), call).items():
        # a bias of all keys shifts all logits of a query alike, and a softmax does not see it
        blind = name.endswith("k_norm.bias")
        assert (gradient.abs().max() < 1e-4) == blind, (name, gradient.abs().max())


def test_the_gradient_is_the_slope_along_every_path_through_the_network():
    model, call = alive(), inputs() | dict(z=noise(B, 5, 48, seed=3))
    slopes = gradients(model, call)
    for part in ("patch_in", "time", "levels", "text_layers", "previous_mlp", "blocks.0",
                 "blocks.1"):
        ahead = {name: p + 1e-3 * slopes[name] / slopes[name].norm() if name.startswith(part) else p
                 for name, p in model.named_parameters()}
        behind = {name: 2 * p - ahead[name] for name, p in model.named_parameters()}
        with torch.no_grad():
            up, down = ((torch.func.functional_call(model, parameters, kwargs=call)[0].double()
                         * noise(B, 3, 8, 8, seed=7)).sum() for parameters in (ahead, behind))
        expected = sum(g.norm() for name, g in slopes.items() if name.startswith(part))
        assert ((up - down) / 2e-3).item() == pytest.approx(expected.item(), rel=0.01), part


@pytest.mark.parametrize("zero_out", [False, True])
@pytest.mark.parametrize("rewards", [0, 1, 5])
def test_no_parameter_is_left_out_of_the_first_step(rewards, zero_out):
    first = gradients(fresh(rewards, zero_out=zero_out), inputs(rewards))
    missing = [name for name, gradient in first.items() if gradient is None]
    assert not missing                          # data-parallel training would wait for it forever


def test_latents_of_the_step_before_change_the_result_once_training_has_opened_their_way():
    call, z = inputs(), noise(B, 5, 48, seed=3)
    model = fresh()
    assert torch.equal(model(**call)[0], model(**call, z=z)[0])               # starts as no change
    model = alive()
    assert ((model(**call)[0] - model(**call, z=z)[0]).abs().amax((1, 2, 3)) > 1e-3).all()
    assert same(model(**call), model(**call, z=torch.zeros_like(z)))          # None is zero


def test_the_start_is_the_one_described():
    model = fresh(latent_std=1.0, sincos=True)
    assert torch.equal(model.positions, sincos(4, 32))
    wide = fresh(latents=400, registers=400, size=32).state_dict()
    for name in ("latents", "registers", "positions", "reward_positions"):
        assert wide[name].abs().max() <= 0.04, name                          # cut off at two std
        assert wide[name].std().item() == pytest.approx(0.02 * 0.88, rel=0.1), name
    assert model.latents.std().item() == pytest.approx(0.88, rel=0.15)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith("log_variance"):
            limit = math.sqrt(6 / (module.in_features + module.out_features))
            assert 0.9 * limit < module.weight.abs().max() <= limit, name                  # Xavier
            assert module.bias is None or not module.bias.any(), name
    assert not model.previous_out.weight.any() and not model.previous_out.bias.any()


def test_a_patch_bias_lets_the_scale_of_a_patch_through_the_norm():
    x = noise(1, 6, fresh().patch_in.in_features)
    for bias, kept in ((0.0, False), (1.5, True)):
        model = fresh(patch_bias=bias)
        half, whole = (model.patch_norm(model.patch_in(k * x)) for k in (0.5, 1.0))
        assert ((half - whole).abs().max() > 0.1) == kept
        assert model.patch_in.bias.std().item() == pytest.approx(bias, rel=0.5)


def test_a_zero_start_is_a_velocity_of_zero_and_tokens_that_pass_every_layer_unchanged():
    model, call = fresh(zero_out=True), inputs()
    x, z, *condition = seen_by(model.blocks[0], lambda: model(**call))
    v, z_end, _ = model(**call)
    assert not v.any() and torch.equal(z, z_end)
    assert torch.equal(model.blocks[0](x, z, *condition)[0], x)
    tokens, mask = seen_by(model.text_layers[0], lambda: model(**call))
    assert all(torch.equal(layer(tokens, mask), tokens) for layer in model.text_layers)


def test_after_a_zero_start_every_parameter_is_reached_within_a_few_steps():
    model, call = fresh(zero_out=True), inputs() | dict(z=noise(B, 5, 48, seed=3))
    model.previous_out.weight.data += 1
    target, optimizer = noise(B, 3, 8, 8, seed=4), torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(6):                                  # one step opens what lies behind another
        optimizer.zero_grad()
        (model(**call)[0] - target).square().mean().backward()
        optimizer.step()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {"log_variance.1.weight", "log_variance.1.bias"}           # v does not read it


def test_a_network_loaded_from_its_state_is_the_same_function():
    model, file = alive(), io.BytesIO()
    torch.save(model.state_dict(), file)
    torch.manual_seed(1)
    other = TextRIN(model.config)                            # with other random frequencies
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(model(**inputs()), other(**inputs())))


def test_forward_has_no_coin_of_its_own():
    model, call = alive(), inputs()
    model.train()
    trained = model(**call)
    assert all(torch.equal(a, b) for a, b in zip(trained, model(**call)))
    assert all(torch.equal(a, b) for a, b in zip(trained, copy.deepcopy(model).eval()(**call)))


# ---- half precision ------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_works_in_fp32_whatever_the_autocast(dtype):
    norm = RMSNorm(256)
    x = (1000 * noise(4, 256)).to(dtype)                      # squares of 1,000 overflow fp16
    expected = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    with torch.autocast("cpu", dtype):
        y = norm(x)
    assert y.dtype == torch.float32 and torch.allclose(y.double(), expected, rtol=1e-6)


def test_bf16_autocast_changes_little_and_stays_finite():
    model, call = alive(), inputs() | dict(z=noise(B, 5, 48, seed=3))
    v, z, u = model(**call)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**call)
    for a, b in zip((v, z, u), half):
        assert b.isfinite().all() and (a - b.float()).std() < 0.05 * a.std()
    loud = model(**call | dict(x_t=1e4 * call["x_t"]))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(**call | dict(x_t=1e4 * call["x_t"]))[0] - loud).std() < 0.05 * loud.std()
