"""model.py: sizes of the released network, closed forms and invariances. That it computes what the
release computes, layer for layer, is in test_release.py; what that costs, in test_flops.py."""
import math

import numpy as np
import pytest
import torch

from model import PRESETS, Config, Fourier, TextRIN, build, from_patches, sincos, to_patches

SEVEN = ("aesthetic", "hpsv2", "image_reward", "pick", "vqa", "clip", "sci")
TINY = dict(channels=3, size=8, patch=2, data_dim=32, latents=5, latent_dim=48, blocks=2, layers=1,
            read_heads=2, heads=4, text_dim=10, text_heads=3, registers=2, sigma_data=0.7)
B, L = 3, 6                                                                 # samples, text tokens


def noise(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(rewards: int = 3, **changes) -> TextRIN:
    """A tiny network as training starts with it."""
    torch.manual_seed(0)
    return build(Config(rewards=SEVEN[:rewards], **TINY | changes))


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


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_paper_preset_has_the_releases_parameters_of_them_two_things_for_each_reward():
    with torch.device("meta"):                                  # shapes without numbers: no memory
        model, none = (build(dict(PRESETS["paper"], rewards=names)) for names in (SEVEN, ()))
    assert count(model.log_variance) == 129                       # it belongs to the loss
    assert count(model) - 129 == 360_411_664
    assert all(p.requires_grad for p in model.parameters())
    D = PRESETS["paper"]["latent_dim"]
    embedder = (D // 4 * D + D) + (D * D + D)
    assert count(model) - count(none) == 7 * (embedder + D)       # and a position


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


def test_fourier_features_have_random_frequencies_in_turns_and_phases_of_a_circle():
    torch.manual_seed(0)
    fourier = Fourier(10_000)
    assert (fourier.frequencies / (2 * math.pi)).std().item() == pytest.approx(1, abs=0.03)
    assert 0 <= fourier.phases.min() and fourier.phases.max() <= 2 * math.pi
    assert fourier.phases.mean().item() == pytest.approx(math.pi, abs=0.1)
    assert fourier(torch.rand(20)).square().mean().item() == pytest.approx(1, abs=0.05)


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


def test_the_network_sees_unit_variance_at_every_time_and_stays_finite_at_both_ends():
    model = fresh()
    for t in (0.0, 0.3, 1.0):
        x_0, eps = 0.7 * noise(400, 3, 8, 8), noise(400, 3, 8, 8, seed=1)
        x_t = (1 - t) * x_0 + t * eps
        s, text, mask = torch.rand(400, 3), noise(400, 1, 10), torch.ones(400, 1, dtype=torch.bool)
        with torch.no_grad():
            call = (x_t, torch.full((400,), t), s, text, mask)
            patches, = seen_by(model.patch_in, lambda: model(*call))
            assert all(a.isfinite().all() for a in model(*call))
        assert patches.std().item() == pytest.approx(1, abs=0.02)


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


def test_every_token_of_the_text_changes_the_velocity_of_its_sample():
    model, call = alive(), inputs()
    v = model(**call)[0]
    for token in range(L):
        text = call["text"].clone()
        text[:, token] += 1
        moved = (model(**call | dict(text=text))[0] - v).abs().amax((1, 2, 3)) > 1e-3
        assert torch.equal(moved, call["text_mask"][:, token])


@pytest.mark.parametrize("reward", range(5))
def test_changing_one_target_changes_the_velocity(reward):
    model, call = alive(5), inputs(5)
    s = call["s"].clone()
    s[1, reward] = (s[1, reward] + 0.5) % 1
    moved = (model(**call | dict(s=s))[0] - model(**call)[0]).abs().amax((1, 2, 3)) > 1e-3
    assert moved.tolist() == [False, True, False]                # of the sample it belongs to


def test_the_lowest_level_is_not_the_same_as_not_asking():
    model, call = alive(), inputs()
    lowest, absent = (model(**call | dict(s=torch.full((B, 3), s)))[0] for s in (0.0, math.nan))
    assert ((lowest - absent).abs().amax((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("reward", range(3))
def test_a_reward_that_is_not_asked_for_loses_its_level_and_keeps_its_position(reward):
    model, call = alive(), inputs()
    s = call["s"].clone()
    s[:2, reward] = math.nan
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


def gradients(model: TextRIN, call: dict) -> dict:
    """Gradients of a random weighting of all that the loss reads, v and u."""
    v, _, u = model(**call)
    ((v * noise(*v.shape, seed=7)).sum() + u.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("rewards", [0, 1, 5])
def test_every_parameter_receives_a_gradient(rewards):
    call = inputs(rewards) | dict(z=noise(B, 5, 48, seed=3))
    call["s"][0] = math.nan                                      # not asked for: no NaN comes of it
    for name, gradient in gradients(alive(rewards), call).items():
        # a bias of all keys shifts all logits of a query alike, and a softmax does not see it
        blind = name.endswith("k_norm.bias")
        assert (gradient.abs().max() < 1e-4) == blind, (name, gradient.abs().max())


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


def test_an_optimizer_is_told_inner_matrices_and_norms_and_biases_by_the_network():
    model = fresh()
    names = {p: name for name, p in model.named_parameters()}
    inner, plain = ([names[p] for p in chosen]
                    for chosen in (model.inner_matrices(), model.norms_and_biases()))
    assert inner == [name for name in names.values() if name.endswith("weight") and "norm" not in
                     name and name.startswith(("blocks.", "text_layers.", "previous_mlp."))]
    assert sorted(plain) == sorted(
        name for name in names.values() if not name.startswith("log_variance")
        and (name.endswith("bias") or "norm" in name or name.startswith("previous_out")))


def test_bf16_autocast_changes_little_and_stays_finite():
    model, call = alive(), inputs() | dict(z=noise(B, 5, 48, seed=3))
    v, z, u = model(**call)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**call)
        patches, = seen_by(model.patch_norm, lambda: model(**call))
    assert patches.dtype == torch.float32                       # where sums of squares would suffer
    for a, b in zip((v, z, u), half):
        assert b.isfinite().all() and (a - b.float()).std() < 0.05 * a.std()
    loud = model(**call | dict(x_t=1e4 * call["x_t"]))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(**call | dict(x_t=1e4 * call["x_t"]))[0] - loud).std() < 0.05 * loud.std()


def test_compiling_covers_every_layer_in_place_and_the_names_of_tensors_stay():
    net, used = alive(), []
    names, before = list(net.state_dict()), net(**inputs())
    net.compile(backend=lambda graph, _: used.append(graph) or graph.forward)
    assert same(net(**inputs()), before)
    assert len(used) >= 2 and list(net.state_dict()) == names
    assert all(layer._compiled_call_impl for layer in (*net.text_layers, *net.blocks))
