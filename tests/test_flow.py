"""flow.py: closed forms of the path, the loss, guidance and the solvers, on models of one line."""
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from flow import guide, logit_normal, loss, path, sample, step_times

torch.set_num_threads(1)
B, R, L, D = 3, 2, 4, 5                      # samples, rewards, tokens and channels of the text


def noise(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape, seed: int = 0) -> torch.Tensor:
    """Small whole numbers: sums of them with weights such as 1/8 have no rounding."""
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed)).float()


def asked(**changes) -> dict:
    """What sample() is asked for, beside the model and the noise."""
    ones = torch.ones(B, R)
    return dict(s_pos=ones, s_neg=0 * ones, text=noise(B, L, D, seed=1),
                text_mask=torch.ones(B, L, dtype=torch.bool)) | changes


class Recorder:
    """A model that writes down each call; v = velocity(x_t, t, s); its latents count the calls.

    The latents (b, 1, 2) of a row are [calls so far, first reward level of the row], so that a row
    that receives another branch's past is found out. What it knows is the levels asked for.
    """

    def __init__(self, velocity):
        self.velocity, self.calls, self.conditions = velocity, [], 0

    def condition(self, s, text, text_mask):
        self.conditions += 1
        return s, text, text_mask

    def __call__(self, x_t, t, s, text, text_mask, z=None, known=None):
        assert known is None or all(a is b for a, b in zip(known, (s, text, text_mask)))
        self.calls.append(dict(x_t=x_t, t=t, s=s, text=text, text_mask=text_mask, z=z,
                               grad=torch.is_grad_enabled()))
        count = torch.zeros(len(x_t)) if z is None else z[:, 0, 0]
        latents = torch.stack([count + 1, s[:, 0]], 1)[:, None]                     # (b, 1, 2)
        return self.velocity(x_t, t, s), latents, torch.zeros(len(x_t))


def level(x_t, t, s):
    """The velocity is the first reward level, plus the number of the channel."""
    return (s[:, :1] + torch.arange(x_t.shape[1])).view(len(s), -1, 1, 1).expand_as(x_t)


# ---- the path ------------------------------------------------------------------------------------

def test_the_path_begins_at_the_data_and_ends_at_the_noise():
    x_0, eps = noise(B, 2, 3, 3), noise(B, 2, 3, 3, seed=1)
    assert torch.equal(path(x_0, eps, torch.zeros(B)), x_0)
    assert torch.equal(path(x_0, eps, torch.ones(B)), eps)


def test_the_slope_of_the_path_is_the_velocity_at_every_time():
    x_0, eps, t = noise(4, 1, 2, 2), noise(4, 1, 2, 2, seed=1), torch.tensor([0, 0.2, 0.7, 1])
    slope = torch.autograd.functional.jvp(lambda t: path(x_0, eps, t), t, torch.ones(4))[1]
    assert torch.allclose(slope, eps - x_0)


def test_each_sample_has_its_own_time():
    x_0, eps, t = noise(B, 2, 3, 3), noise(B, 2, 3, 3, seed=1), torch.tensor([0.1, 0.5, 0.9])
    alone = [path(x_0[i:i + 1], eps[i:i + 1], t[i:i + 1]) for i in range(B)]
    assert torch.equal(path(x_0, eps, t), torch.cat(alone))


@pytest.mark.parametrize("mean", [0.0, 0.8])
def test_logit_normal_times_have_the_distribution_of_their_name(mean):
    t = logit_normal(noise(100_000), *[mean] if mean else []).double()
    assert t.min() > 0 and t.max() < 1
    normal = torch.log(t / (1 - t)).sort().values - mean               # the logit is N(mean, 1)
    below = (torch.arange(100_000) + 0.5) / 100_000
    assert (torch.special.ndtr(normal) - below).abs().max() < 2 / math.sqrt(100_000)  # K.-S.


# ---- the loss ------------------------------------------------------------------------------------

def test_the_loss_is_what_a_hand_computes():
    x_0 = torch.tensor([[[[1., 3.]]], [[[0., 2.]]]])                                # (2, 1, 1, 2)
    eps = torch.tensor([[[[2., 1.]]], [[[4., 2.]]]])
    t = torch.tensor([0.5, 0.25])
    # x_t = (1.5, 2), (1, 2); velocities eps - x_0 = (1, -2), (4, 0); v = 2 x_t = (3, 4), (2, 4)
    # errors (2, 6), (-2, 4): mse (4 + 36) / 2 = 20, (4 + 16) / 2 = 10; u = log 4, 0
    model = lambda x_t, t, s, text, text_mask, z: (2 * x_t, None, torch.tensor([math.log(4), 0]))
    mse, weighted = loss(model, x_0, eps, t, None, None, None, torch.zeros(2, dtype=torch.bool))
    assert mse.tolist() == [20, 10]
    assert weighted.tolist() == pytest.approx([5 + math.log(4), 10])


@pytest.mark.parametrize("error", [0.01, 1.0, 7.0])
def test_the_weighted_loss_is_least_where_u_is_the_log_of_the_mse(error):
    u = torch.tensor(2 * math.log(error), requires_grad=True)                      # log error²

    def weighted(u):
        model = lambda x_t, *_: (torch.full_like(x_t, error), None, u.expand(1))
        zeros = torch.zeros(1, 1, 2, 2)
        return loss(model, zeros, zeros, torch.zeros(1), None, None, None,
                    torch.zeros(1, dtype=torch.bool))[1]

    least = weighted(u)
    assert least.item() == pytest.approx(1 + 2 * math.log(error), abs=1e-5)
    assert torch.autograd.grad(least, u)[0].item() == pytest.approx(0, abs=1e-5)
    assert all(weighted(u.detach() + step) > least for step in (-1, -0.1, 0.1, 1))


def test_the_exact_velocity_has_no_loss():
    x_0, eps = noise(B, 2, 3, 3), noise(B, 2, 3, 3, seed=1)
    model = lambda *_: (eps - x_0, None, torch.zeros(B))
    none = torch.zeros(B, dtype=torch.bool)
    mse, weighted = loss(model, x_0, eps, torch.rand(B), None, None, None, none)
    assert not mse.any() and not weighted.any()


class OneNumber(torch.nn.Module):
    """v = a x_t + mean(z), z' = a x_t: a model whose gradients fit on a line."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(3.0))
        self.calls = []

    def forward(self, x_t, t, s, text, text_mask, z=None):
        self.calls.append(dict(t=t, s=s, text=text, mask=text_mask, z=z,
                               grad=torch.is_grad_enabled()))
        z_mean = 0 if z is None else z.mean((1, 2)).view(-1, 1, 1, 1)
        return self.a * x_t + z_mean, (self.a * x_t).flatten(2), torch.zeros(len(x_t))


def self_conditioned(condition: list) -> tuple:
    """One loss of OneNumber with these samples self-conditioned: model, x_0, eps, t, mse."""
    model, b = OneNumber(), len(condition)
    x_0, eps, t = noise(b, 1, 2, 2), noise(b, 1, 2, 2, seed=1), torch.linspace(0.1, 0.9, b)
    s, text = torch.rand(b, R), noise(b, L, D)
    mask = torch.arange(L) < torch.arange(1, b + 1)[:, None]
    mse, _ = loss(model, x_0, eps, t, s, text, mask, torch.tensor(condition))
    for call in model.calls:                       # each call sees the samples' own t, s and text
        rows = torch.tensor([(t == value).nonzero().item() for value in call["t"]])
        assert torch.equal(call["s"], s[rows]) and torch.equal(call["text"], text[rows])
        assert torch.equal(call["mask"], mask[rows])
    return model, x_0, eps, t, mse


def test_self_conditioned_samples_receive_their_own_latents_and_the_others_zero():
    model, x_0, eps, t, _ = self_conditioned([True, False, True, True])
    first, second = model.calls
    assert first["t"].tolist() == t[[0, 2, 3]].tolist() and first["z"] is None
    expected = (3 * path(x_0, eps, t)).flatten(2)
    expected[1] = 0
    assert torch.equal(second["z"], expected)


def test_no_gradient_flows_through_the_first_pass():
    model, x_0, eps, t, mse = self_conditioned([True, False, True, True])
    assert [call["grad"] for call in model.calls] == [False, True]
    assert not model.calls[1]["z"].requires_grad
    mse.sum().backward()
    # mse = mean (a x_t + c - v)², c the mean of z, a constant: its slope in a is mean 2 x_t (...)
    x_t, c = path(x_0, eps, t), model.calls[1]["z"].mean((1, 2)).view(-1, 1, 1, 1)
    slope = (2 * x_t * (3 * x_t + c - (eps - x_0))).mean((1, 2, 3)).sum()
    assert model.a.grad.item() == pytest.approx(slope.item(), rel=1e-5)


def test_a_batch_without_self_conditioning_costs_one_call():
    model, *_ = self_conditioned([False, False, False])
    assert len(model.calls) == 1 and model.calls[0]["z"] is None


# ---- guidance ------------------------------------------------------------------------------------

def test_guidance_is_the_formula_of_the_paper():
    v_pos, v_neg = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 0.5])
    assert guide(v_pos, v_neg, 2).tolist() == [2.0, -8.0, 0.5]         # v⁺ + 2 (v⁺ - v⁻)
    assert torch.equal(guide(v_pos, v_neg, 0), v_pos)
    assert torch.equal(guide(v_pos, v_neg, -1), v_neg)


@pytest.mark.parametrize("channels", [3, 4])
def test_guidance_moves_every_channel(channels):
    plain, guided = (sample(Recorder(level), torch.zeros(B, channels, 2, 2), w=w, steps=4,
                            **asked()) for w in (0, 2))
    assert torch.equal(guided - plain, torch.full_like(plain, -2.0))      # w (v⁺ - v⁻) = 2


def test_a_weight_of_zero_is_off_and_runs_no_negative_branch():
    model, eps = Recorder(level), integers(B, 2, 2, 2)
    ask = asked(s_neg=torch.full((B, R), math.nan), text_neg=torch.full((B, L, D), math.nan),
                text_mask_neg=torch.zeros(B, L, dtype=torch.bool))     # whoever reads them is told
    x_0 = sample(model, eps, w=0.0, steps=8, **ask)
    assert [len(call["x_t"]) for call in model.calls] == [B] * 8
    assert all(torch.equal(call["s"], ask["s_pos"]) for call in model.calls)
    assert torch.equal(x_0, eps - 1 - torch.arange(2).view(2, 1, 1))


def test_both_branches_go_through_one_call_each_with_its_own_levels_and_caption():
    model = Recorder(level)
    ask = asked(text_neg=noise(B, L, D, seed=2),
                text_mask_neg=torch.arange(L).expand(B, L) < 1)
    sample(model, noise(B, 2, 2, 2), w=1.5, steps=5, **ask)
    assert len(model.calls) == 5
    for call in model.calls:
        assert torch.equal(call["x_t"][:B], call["x_t"][B:])
        assert torch.equal(call["t"][:B], call["t"][B:])
        assert torch.equal(call["s"], torch.cat([ask["s_pos"], ask["s_neg"]]))
        assert torch.equal(call["text"], torch.cat([ask["text"], ask["text_neg"]]))
        assert torch.equal(call["text_mask"], torch.cat([ask["text_mask"], ask["text_mask_neg"]]))


def test_the_negative_branch_reads_the_same_caption_if_none_is_given():
    model, ask = Recorder(level), asked()
    sample(model, noise(B, 2, 2, 2), w=1.0, steps=1, **ask)
    assert torch.equal(model.calls[0]["text"], torch.cat([ask["text"]] * 2))
    assert torch.equal(model.calls[0]["text_mask"], torch.cat([ask["text_mask"]] * 2))


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.5, 1.0)])
def test_ab2_draws_no_line_through_the_jump_where_guidance_begins_or_ends(interval):
    eps = noise(B, 2, 2, 2)              # on either side the velocity is constant: Euler is exact
    wanted, found = (sample(Recorder(level), eps, w=3.0, steps=8, solver=solver, interval=interval,
                            **asked()) for solver in ("euler", "ab2"))
    assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(wanted, sample(
        Recorder(level), eps, steps=8, **asked()), atol=0.1)


def test_guidance_acts_only_inside_its_interval():
    model, eps = Recorder(level), torch.zeros(B, 1, 2, 2)
    x_0 = sample(model, eps, w=4.0, steps=8, interval=(0.25, 0.75), **asked())
    guided = [len(call["x_t"]) == 2 * B for call in model.calls]
    times = [call["t"][0].item() for call in model.calls]
    assert times == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert guided == [False, False, True, True, True, True, True, False]
    assert torch.equal(x_0, torch.full_like(eps, -(3 * 1 + 5 * 5) / 8))  # v̂ = 1 outside, 5 inside


@pytest.mark.parametrize("w, interval, times", [(0.0, (0.0, 1.0), 1), (2.0, (0.0, 1.0), 1),
                                                (2.0, (0.25, 0.75), 2)])
def test_what_does_not_depend_on_t_is_computed_once(w, interval, times):
    model = Recorder(level)
    sample(model, noise(B, 1, 2, 2), w=w, steps=8, interval=interval, **asked())
    assert model.conditions == times and len(model.calls) == 8        # guided or not: once each


# ---- the latents ---------------------------------------------------------------------------------

def test_latents_are_handed_on_from_step_to_step_for_each_branch_by_itself():
    model = Recorder(level)
    sample(model, noise(B, 1, 2, 2), w=2.0, steps=4, **asked())
    assert model.calls[0]["z"] is None
    for step, call in enumerate(model.calls[1:], 1):
        own = torch.cat([torch.ones(B), torch.zeros(B)])            # s_pos and s_neg of each row
        assert call["z"][:, 0].tolist() == [[step, s] for s in own.tolist()]


def test_latents_are_handed_on_without_guidance_too():
    model = Recorder(level)
    sample(model, noise(B, 1, 2, 2), steps=4, **asked())
    assert [call["z"] if call["z"] is None else call["z"][:, 0, 0].tolist()
            for call in model.calls] == [None, [1] * B, [2] * B, [3] * B]


def test_branches_share_their_past_before_guidance_and_the_positive_one_goes_on_after_it():
    model = Recorder(level)
    sample(model, noise(B, 1, 2, 2), w=2.0, steps=4, interval=(0.3, 0.8), **asked())
    latents = [None if call["z"] is None else call["z"][:, 0].tolist() for call in model.calls]
    pos, neg = [[1, 1]] * B, [[1, 1]] * B                                         # one shared past
    assert latents[:2] == [None, pos + neg]                       # t = 1: no guidance; 0.75: begins
    assert latents[2] == [[2, 1]] * B + [[2, 0]] * B               # 0.5: each its own
    assert latents[3] == [[3, 1]] * B                              # 0.25: the positive one goes on


# ---- the solvers ---------------------------------------------------------------------------------

@pytest.mark.parametrize("solver", ["euler", "ab2"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_euler_and_ab2_reach_the_data_exactly_when_the_velocity_is_constant(solver, steps):
    x_0, eps = integers(B, 2, 3, 3), integers(B, 2, 3, 3, seed=1)
    model = Recorder(lambda x_t, t, s: eps - x_0)
    assert torch.equal(sample(model, eps, solver=solver, steps=steps, **asked()), x_0)
    assert len(model.calls) == steps                                # one evaluation a step


def gaussian(mean: float, sigma: float):
    """The exact velocity E[eps - x_0 | x_t] of data ~ N(mean, sigma²); the ODE takes noise eps to
    (1 - t) mean + k_t eps, k_t² = (1 - t)² sigma² + t²."""
    def velocity(x_t, t, s):
        t = t.double().view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * sigma ** 2 + t ** 2
        return -mean + (t - (1 - t) * sigma ** 2) / variance * (x_t - (1 - t) * mean)
    return velocity


def order(solver: str, shift: float, velocity, solution) -> float:
    """The slope of log error against log step length, over 128 to 512 steps."""
    eps = noise(B, 1, 4, 4).double()
    steps = torch.tensor([128, 256, 512])
    ends = [sample(Recorder(velocity), eps, solver=solver, steps=int(n), shift=shift, **asked())
            for n in steps]
    errors = torch.stack([(end - solution(eps)).abs().max() for end in ends])
    x, y = -steps.double().log(), errors.log()
    return (((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("solver, expected", [("euler", 1), ("ab2", 2)])
@pytest.mark.parametrize("velocity, solution", [
    (gaussian(0.5, 0.6), lambda eps: 0.5 + 0.6 * eps),
    (lambda x_t, t, s: 2 * t.view(-1, 1, 1, 1) * x_t, lambda eps: eps / math.e),   # x' = 2 t x
], ids=["gaussian", "linear"])
def test_euler_is_of_first_order_and_ab2_of_second(solver, expected, shift, velocity, solution):
    assert order(solver, shift, velocity, solution) == pytest.approx(expected, abs=0.2)


def test_the_exact_velocity_of_gaussian_data_turns_noise_into_that_data():
    eps = noise(B, 1, 40, 40)
    x_0 = sample(Recorder(gaussian(-1.0, 0.5)), eps, solver="ab2", steps=100, **asked())
    assert torch.allclose(x_0, -1 + 0.5 * eps, atol=2e-3)


def test_ab2_weighs_the_last_two_velocities_by_three_halves_and_minus_a_half():
    model = Recorder(lambda x_t, t, s: t.view(-1, 1, 1, 1).expand_as(x_t))               # v = t
    x_0 = sample(model, torch.zeros(B, 1, 1, 1), solver="ab2", steps=4, **asked())
    # slopes: 1; 1.5 * 0.75 - 0.5 * 1; 1.5 * 0.5 - 0.5 * 0.75; 1.5 * 0.25 - 0.5 * 0.5
    assert x_0.flatten().tolist() == [-(1 + 0.625 + 0.375 + 0.125) / 4] * B


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_ab2_is_exact_on_a_line_after_its_first_step_however_long_the_steps_are(shift):
    model = Recorder(lambda x_t, t, s: t.view(-1, 1, 1, 1).expand_as(x_t))               # v = t
    x_0 = sample(model, torch.zeros(B, 1, 1, 1), solver="ab2", steps=5, shift=shift, **asked())
    second = model.calls[1]["t"][0].item()             # from 1 to here v is taken to be 1
    expected = -(1 - second) - second ** 2 / 2
    assert x_0.flatten().tolist() == pytest.approx([expected] * B)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_a_shift_multiplies_the_odds_of_noise_against_data_at_every_step(shift):
    times, even = torch.tensor(step_times(10, shift)), torch.linspace(1, 0, 11)
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    odds = lambda t: t[1:] / (1 - t[1:])
    assert torch.allclose(odds(times), shift * odds(even), rtol=1e-4)
    model = Recorder(level)
    sample(model, noise(B, 1, 2, 2), steps=10, shift=shift, **asked())
    assert [call["t"][0].item() for call in model.calls] == times[:-1].tolist()


def test_a_sample_does_not_depend_on_its_neighbours():
    velocity = lambda x_t, t, s: x_t * s[:, :1, None, None] - t.view(-1, 1, 1, 1)
    eps, s_pos = noise(B, 2, 3, 3), torch.rand(B, R)
    together = sample(Recorder(velocity), eps, w=1.0, steps=5, **asked(s_pos=s_pos))
    for i in range(B):
        ask = {name: value[i:i + 1] for name, value in asked(s_pos=s_pos).items()}
        assert torch.equal(sample(Recorder(velocity), eps[i:i + 1], w=1.0, steps=5, **ask),
                           together[i:i + 1])


@pytest.mark.parametrize("solver, steps", [("heun", 10), ("", 10), ("euler", 0), ("ab2", -1)])
def test_an_unknown_solver_or_no_step_is_refused_before_the_model_runs(solver, steps):
    model = Recorder(level)
    with pytest.raises(ValueError, match="use euler or ab2"):
        sample(model, noise(B, 1, 2, 2), solver=solver, steps=steps, **asked())
    assert not model.calls


def test_progress_is_told_of_every_step_and_the_noise_is_left_as_it_was():
    eps, told = noise(B, 1, 2, 2), []
    before = eps.clone()
    sample(Recorder(level), eps, steps=6, progress=lambda: told.append(1), **asked())
    assert len(told) == 6 and torch.equal(eps, before)


def test_sampling_builds_no_graph():
    model = Recorder(level)
    sample(model, noise(B, 1, 2, 2), w=1.0, steps=2, **asked())
    assert [call["grad"] for call in model.calls] == [False, False]
