"""flow.py: closed forms of the path, the loss, guidance and the solvers, on models of one line."""
import math

import pytest
import torch

from flow import branches, logit_normal, loss, path, sample, step_times

B, R, L, E = 3, 2, 4, 5                      # samples, rewards, tokens and channels of the text


def noise(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def asked(w: float = 0.0, **changes) -> list:
    """The branches of a sampling run: levels 1 wanted, levels 0 to move away from."""
    ones = torch.ones(B, R)
    return branches(**dict(s_pos=ones, s_neg=0 * ones, text=noise(B, L, E, seed=1), w=w,
                           text_mask=torch.ones(B, L, dtype=torch.bool)) | changes)


class Recorder:
    """A model that writes down each call; v = velocity(x_t, t, s). Its latents (b, 1, 2) are [calls
    so far, first level of the row]: a row that receives another branch's past is found out."""

    def __init__(self, velocity):
        self.velocity, self.calls, self.conditions = velocity, [], 0

    def condition(self, s, text, text_mask):
        self.conditions += 1
        return s, text, text_mask

    def __call__(self, x_t, t, s, text, text_mask, z=None, known=None):
        assert all(a is b for a, b in zip(known, (s, text, text_mask)))
        self.calls.append(dict(x_t=x_t, t=t, s=s, text=text, text_mask=text_mask, z=z,
                               grad=torch.is_grad_enabled()))
        count = torch.zeros(len(x_t)) if z is None else z[:, 0, 0]
        latents = torch.stack([count + 1, s[:, 0]], 1)[:, None]                     # (b, 1, 2)
        return self.velocity(x_t, t, s), latents, torch.zeros(len(x_t))


def level(x_t, t, s):
    """The velocity is the first reward level, plus the number of the channel."""
    return (s[:, :1] + torch.arange(x_t.shape[1])).view(len(s), -1, 1, 1).expand_as(x_t)


def test_the_path_goes_from_data_to_noise_at_the_velocity_each_sample_at_its_own_time():
    x_0, eps, t = noise(4, 1, 2, 2), noise(4, 1, 2, 2, seed=1), torch.tensor([0, 0.2, 0.7, 1])
    x_t, slope = torch.autograd.functional.jvp(lambda t: path(x_0, eps, t), t, torch.ones(4))
    assert torch.equal(x_t[0], x_0[0]) and torch.equal(x_t[3], eps[3])
    assert torch.allclose(slope, eps - x_0)
    alone = [path(x_0[i:i + 1], eps[i:i + 1], t[i:i + 1]) for i in range(4)]
    assert torch.equal(x_t, torch.cat(alone))


@pytest.mark.parametrize("mean", [0.0, 0.8])
def test_logit_normal_times_have_the_distribution_of_their_name(mean):
    t = logit_normal(noise(100_000), *[mean] if mean else []).double()
    assert t.min() > 0 and t.max() < 1
    normal = torch.log(t / (1 - t)).sort().values - mean               # the logit is N(mean, 1)
    below = (torch.arange(100_000) + 0.5) / 100_000
    assert (torch.special.ndtr(normal) - below).abs().max() < 2 / math.sqrt(100_000)  # K.-S.


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
    s, text = torch.rand(b, R), noise(b, L, E)
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
    assert torch.equal(first["t"], t) and first["z"] is None         # all: a GPU keeps its shapes
    expected = (3 * path(x_0, eps, t)).flatten(2)
    expected[1] = 0
    assert torch.equal(second["z"], expected)
    [once] = self_conditioned([False, False, False])[0].calls                  # none: one call
    assert once["z"] is None


def test_no_gradient_flows_through_the_first_pass():
    model, x_0, eps, t, mse = self_conditioned([True, False, True, True])
    assert [call["grad"] for call in model.calls] == [False, True]
    assert not model.calls[1]["z"].requires_grad
    mse.sum().backward()
    # mse = mean (a x_t + c - v)², c the mean of z, a constant: its slope in a is mean 2 x_t (...)
    x_t, c = path(x_0, eps, t), model.calls[1]["z"].mean((1, 2)).view(-1, 1, 1, 1)
    slope = (2 * x_t * (3 * x_t + c - (eps - x_0))).mean((1, 2, 3)).sum()
    assert model.a.grad.item() == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("w", [0.0, 2.0, 7.0])
def test_guidance_is_the_formula_of_the_paper_on_every_channel(w, channels):
    two = asked(w, s_pos=torch.full((B, R), 0.75), s_neg=torch.full((B, R), 0.5))
    x_0 = sample(Recorder(level), torch.zeros(B, channels, 2, 2), two, steps=1)
    expected = 0.75 + w * (0.75 - 0.5) + torch.arange(channels)                # v⁺ + w (v⁺ - v⁻)
    assert torch.equal(x_0, -expected.view(-1, 1, 1).expand_as(x_0))
    assert len(two) == (1 if w == 0 else 2)                                    # 0 is off: no v⁻
    assert all(torch.equal(a, b) for a, b in zip(two[0][2:], two[-1][2:]))     # of one caption


def test_three_branches_are_the_sum_of_their_velocities_by_weight_in_one_call():
    model, [(_, _, text, mask)] = Recorder(level), asked()
    three = [(weight, torch.full((B, R), s), text + s, mask)
             for weight, s in ((2.0, 0.5), (-1.5, 0.25), (0.5, 1.0))]
    x_0 = sample(model, torch.zeros(B, 1, 2, 2), three, steps=4)
    assert torch.equal(x_0, torch.full_like(x_0, -(2 * 0.5 - 1.5 * 0.25 + 0.5 * 1)))
    for call in model.calls:
        assert torch.equal(call["text"], torch.cat([text + 0.5, text + 0.25, text + 1]))
        assert torch.equal(call["x_t"], call["x_t"][:B].repeat(3, 1, 1, 1))


@pytest.mark.parametrize("w, levels", [(0.0, [1] * B), (2.0, [1] * B + [0] * B)])
def test_latents_are_handed_on_from_step_to_step_for_each_branch_by_itself(w, levels):
    model = Recorder(level)
    sample(model, noise(B, 1, 2, 2), asked(w), steps=4)
    assert model.calls[0]["z"] is None and model.conditions == 1       # it does not depend on t
    for step, call in enumerate(model.calls[1:], 1):
        assert call["z"][:, 0].tolist() == [[step, s] for s in levels]


@pytest.mark.parametrize("solver", ["euler", "ab2"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_euler_and_ab2_reach_the_data_exactly_when_the_velocity_is_constant(solver, steps):
    x_0, eps = noise(B, 2, 3, 3).round(), noise(B, 2, 3, 3, seed=1).round()    # no rounding error
    model, told = Recorder(lambda x_t, t, s: eps - x_0), []
    reached = sample(model, eps, asked(), steps, solver, progress=lambda: told.append(1))
    assert torch.equal(reached, x_0)
    assert len(model.calls) == len(told) == steps                   # one evaluation a step


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("solver, expected", [("euler", 1), ("ab2", 2)])
def test_euler_is_of_first_order_and_ab2_of_second(solver, expected, shift):
    model = Recorder(lambda x_t, t, s: 2 * t.view(-1, 1, 1, 1) * x_t)     # x' = 2 t x: eps / e at 0
    eps, steps = noise(B, 1, 4, 4).double(), torch.tensor([128, 256, 512])
    ends = [sample(model, eps, asked(), int(n), solver, shift) for n in steps]
    errors = torch.stack([(end - eps / math.e).abs().max() for end in ends])
    x, y = -steps.double().log(), errors.log()             # log error against log step length
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert slope.item() == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_ab2_is_exact_on_a_line_after_its_first_step_however_long_the_steps_are(shift):
    model = Recorder(lambda x_t, t, s: t.view(-1, 1, 1, 1).expand_as(x_t))
    x_0 = sample(model, torch.zeros(B, 1, 1, 1), asked(), 5, "ab2", shift)
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
    sample(model, noise(B, 1, 2, 2), asked(), steps=10, shift=shift)
    assert [call["t"][0].item() for call in model.calls] == times[:-1].tolist()


@pytest.mark.parametrize("solver, steps", [("heun", 10), ("", 10), ("euler", 0), ("ab2", -1)])
def test_an_unknown_solver_or_no_step_is_refused_before_the_model_runs(solver, steps):
    with pytest.raises(AssertionError, match=f"{solver}.*{steps}"):
        sample(None, noise(B, 1, 2, 2), asked(), steps, solver)
