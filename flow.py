"""Flow matching with reward levels: the path, the loss, guidance, the solvers.

Symbols (the whole project uses them):
    x_0 data · eps ~ N(0, I) noise · t (B,) 0 = data, 1 = noise · x_t = (1 - t) x_0 + t eps
    v = eps - x_0 velocity · s (B, R) reward levels in [0, 1], 1 = best bin, NaN = not asked for;
    s_pos, s_neg: the levels wanted and those to move away from
    c the caption: text (B, L, E), text_mask (B, L) True = token · w guidance weight, 0 = off
    z (B, M, D) latents of the network, handed on from step to step · u (B,) learned log-variance

Every function works on any `model(x_t, t, s, text, text_mask, z=None, known=None) -> v, z, u`;
sampling also calls `known = model.condition(s, text, text_mask)`: it does not depend on t. A
network without latents returns an empty z, (B, 0, D). (train.py also wants its config,
inner_matrices() and norms_and_biases().)
"""
import torch


def path(x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t eps (paper, section 3): (B, C, H, W), (B, C, H, W), (B,) → x_t."""
    t = t.view(-1, 1, 1, 1)                                                      # (B, 1, 1, 1)
    return (1 - t) * x_0 + t * eps                                               # (B, C, H, W)


def logit_normal(normal: torch.Tensor, mean: float = 0.0) -> torch.Tensor:
    """Times from N(0, 1): mean 0 the release's (paper's text: uniform), above 0 nearer to noise."""
    return torch.sigmoid(normal + mean)                                          # (B,)


def loss(model, x_0, eps, t, s, text, text_mask, self_condition):
    """Flow-matching loss of each sample, mse (B,) and weighted (B,):

    mse      = mean over pixels of (v_θ(x_t, t, s, c) - (eps - x_0))²   (paper, equation 3)
    weighted = mse / exp(u(t)) + u(t), u a learned log-variance (not in the paper: the release,
               after EDM2): hard times stop drowning easy ones. Its least value is 1 + log E[mse].

    self_condition (B,) bool, on the CPU, where asking it waits for no GPU: these samples start from
    the latents of a first pass without gradient, as each step of sampling does from the last.
    """
    x_t, z = path(x_0, eps, t), None                                             # (B, C, H, W)
    if self_condition.any():
        with torch.no_grad():            # of all samples: the same shapes at each step
            z = model(x_t, t, s, text, text_mask)[1]                             # (B, M, D)
        # What autocast cast here has no gradient, and some versions of torch use it again below.
        torch.clear_autocast_cache()
        coins = self_condition.to(z.device, non_blocking=True)                   # (B,)
        z = z * coins.view(-1, 1, 1)                                             # (B, M, D)
    v, _, u = model(x_t, t, s, text, text_mask, z)                               # v (B, C, H, W)
    mse = (v.float() - (eps - x_0)).square().mean((1, 2, 3))                     # (B,)
    return mse, mse / u.exp() + u                                                # (B,), (B,)


def branches(s_pos, s_neg, text, text_mask, w, text_neg=None, text_mask_neg=None) -> list:
    """Multi-reward guidance v̂ = v⁺ + w (v⁺ - v⁻) (paper, equation 5), as sample() takes it.

    v⁺ sees s_pos, v⁻ sees s_neg (B, R). It tilts the samples towards p(x|c, s_pos) times
    [p(s_pos|x, c) / p(s_neg|x, c)]^w. w = 0 is off: one branch. Where others write
    v⁻ + ω (v⁺ - v⁻), their ω is w + 1. text_neg, text_mask_neg: the caption of v⁻; None = the same,
    as in the paper (the release puts the empty caption there).
    """
    positive = (1 + w, s_pos, text, text_mask)
    if w == 0:
        return [positive]
    if text_neg is None:
        text_neg, text_mask_neg = text, text_mask
    return [positive, (-w, s_neg, text_neg, text_mask_neg)]


def step_times(steps: int, shift: float = 1.0) -> list:
    """Times of a sampler's steps, 1 to 0: shift t / (1 + (shift - 1) t) of even t (Esser et al.
    2024, equation 23). Above 1 more are near the noise, where small pictures are decided."""
    t = torch.linspace(1, 0, steps + 1)                                          # (steps + 1,)
    return (shift * t / (1 + (shift - 1) * t)).tolist()


@torch.no_grad()
def sample(model, eps, branches, steps=50, solver="euler", shift=1.0, progress=None):
    """Integrate dx/dt = v̂ from noise (t = 1) to data (t = 0): eps (B, C, H, W) → x_0.

    branches: K of (weight, s (B, R), text (B, L, E), text_mask (B, L)), one L for all of them;
        v̂ = Σ weight v on all channels. Guidance is two of them: see branches().
    solver: "euler", or "ab2" (Adams-Bashforth of second order: as many evaluations, but each step
        extrapolates the velocity from the last two; not in the paper).
    shift: see step_times. progress: called after each step.
    """
    assert solver in ("euler", "ab2") and steps > 0, (solver, steps)
    weights, *given = zip(*branches)
    given = [torch.cat(parts) for parts in given]                                # (K B, R | L, ...)
    known, K = model.condition(*given), len(branches)
    times, x_t, z, last = step_times(steps, shift), eps, None, None
    for now, after in zip(times[:-1], times[1:]):
        t = torch.full((K * len(eps),), now, device=eps.device)                  # (K B,)
        v, z, _ = model(x_t.repeat(K, 1, 1, 1), t, *given, z, known)             # (K B, C, H, W)
        v = sum(weight * part for weight, part in zip(weights, v.float().chunk(K)))
        slope, step = v, after - now                                             # (B, C, H, W)
        if solver == "ab2" and last is not None:            # the line through the last two, midway
            slope = v + (v - last[0]) * step / last[1] / 2                       # (B, C, H, W)
        x_t, last = x_t + step * slope, (v, step)                                # (B, C, H, W)
        if progress is not None:
            progress()
    return x_t
