"""Flow matching with reward levels: the path, the loss, guidance, the solvers.

Symbols (the whole project uses them):

    x_0 data · eps ~ N(0, I) noise · t (B,) 0 = data, 1 = noise · x_t = (1 - t) x_0 + t eps
    v = eps - x_0 velocity · s (B, R) reward levels in [0, 1], 1 = best bin, -1 = not asked for;
    s_pos, s_neg: the levels wanted and those to move away from
    c the caption: text (B, L, E), text_mask (B, L) True = token · w guidance weight, 0 = off
    z (B, M, D) latents of the network, handed on from step to step · u (B,) learned log-variance

Every function works on any `model(x_t, t, s, text, text_mask, z=None, known=None) -> v, z, u`;
sampling also calls `known = model.condition(s, text, text_mask)`, once: it does not depend on t.
"""
import torch


def path(x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t eps (paper, section 3): (B, C, H, W), (B, C, H, W), (B,) → x_t."""
    t = t.view(-1, 1, 1, 1)                                                      # (B, 1, 1, 1)
    return (1 - t) * x_0 + t * eps                                               # (B, C, H, W)


def logit_normal(normal: torch.Tensor, mean: float = 0.0) -> torch.Tensor:
    """Times from N(0, 1) numbers: most in the middle of the path (mean 0: the released recipe; the
    paper's text has t uniform), or nearer to the noise (mean above 0)."""
    return torch.sigmoid(normal + mean)                                          # (B,)


def loss(model, x_0, eps, t, s, text, text_mask, self_condition):
    """Flow-matching loss of each sample: (mse (B,), weighted (B,)).

    mse      = mean over pixels of (v_θ(x_t, t, s, c) - (eps - x_0))²   (paper, equation 3)
    weighted = mse / exp(u(t)) + u(t), u a learned log-variance (not in the paper: the release,
               after EDM2): hard times stop drowning easy ones. Its least value is 1 + log E[mse].

    self_condition (B,) bool: these samples first run without gradient and hand their latents on,
    as they do at sampling, where each step starts from the latents of the step before.
    """
    x_t = path(x_0, eps, t)                                                      # (B, C, H, W)
    z = None
    if self_condition.any():
        k = self_condition
        with torch.no_grad():                                  # n of the B samples
            latents = model(x_t[k], t[k], s[k], text[k], text_mask[k])[1]        # (n, M, D)
        # Some versions of torch let the weights that autocast cast here serve the pass below, too,
        # where they get no gradient: they were cast without one.
        torch.clear_autocast_cache()
        z = latents.new_zeros(len(x_t), *latents.shape[1:])                      # (B, M, D)
        z[k] = latents
    v, _, u = model(x_t, t, s, text, text_mask, z)                               # v (B, C, H, W)
    mse = (v.float() - (eps - x_0)).square().mean((1, 2, 3))                     # (B,)
    return mse, mse / u.exp() + u                                                # (B,), (B,)


def guide(v_pos: torch.Tensor, v_neg: torch.Tensor, w: float) -> torch.Tensor:
    """Multi-reward guidance on all channels: v̂ = v⁺ + w (v⁺ - v⁻)  (paper, equation 5).

    v⁺ sees s_pos, v⁻ sees s_neg. It tilts the samples towards p(x|c, s_pos) times
    [p(s_pos|x, c) / p(s_neg|x, c)]^w. w = 0 is off. Where others write v⁻ + ω (v⁺ - v⁻),
    their ω is w + 1.
    """
    return v_pos + w * (v_pos - v_neg)


def step_times(steps: int, shift: float = 1.0) -> list:
    """Times of a sampler's steps, 1 to 0: shift t / (1 + (shift - 1) t) of even t (Esser et al.
    2024). Above 1 more steps are near the noise, where the content of small pictures is decided;
    1, even steps, is the release's."""
    t = torch.linspace(1, 0, steps + 1)                                          # (steps + 1,)
    return (shift * t / (1 + (shift - 1) * t)).tolist()


@torch.no_grad()
def sample(model, eps, s_pos, s_neg, text, text_mask, text_neg=None, text_mask_neg=None, w=0.0,
           steps=50, solver="euler", shift=1.0, interval=(0.0, 1.0), progress=None):
    """Integrate dx/dt = v̂ from noise (t = 1) to data (t = 0): eps (B, C, H, W) → x_0.

    s_pos, s_neg (B, R): the levels asked for and the levels to move away from.
    text_neg, text_mask_neg: the caption of the negative branch; None = the same caption, as in the
        paper (the release puts the empty caption there).
    solver: "euler", or "ab2" (Adams-Bashforth of second order: as many evaluations, but each step
        extrapolates the velocity from the last two; not in the paper).
    shift: see step_times.
    interval: guidance acts for interval[0] <= t <= interval[1] (Kynkäänniemi et al. 2024), and
        outside of it, as with w = 0, the negative branch costs nothing.
    progress: called after each step.
    Raises ValueError on an unknown solver or fewer than 1 step.
    """
    if solver not in ("euler", "ab2") or steps < 1:
        raise ValueError(f"solver {solver!r} with {steps} steps: use euler or ab2, 1 step or more")
    if text_neg is None:
        text_neg, text_mask_neg = text, text_mask
    asked, known = {False: (s_pos, text, text_mask)}, {}     # by guided or not: (B, R | L, E | L)
    if w != 0:                                                                  # (2B, R | L, E | L)
        negative = (s_neg, text_neg, text_mask_neg)
        asked[True] = [torch.cat(pair) for pair in zip(asked[False], negative)]
    x_t, z, v_last, last, B, was_guided = eps, None, None, None, len(eps), False
    times = step_times(steps, shift)
    for now, after in zip(times[:-1], times[1:]):
        t = torch.full((B,), now, device=eps.device)                             # (B,)
        guided = w != 0 and interval[0] <= now <= interval[1]
        if guided != was_guided:                  # v̂ jumps here: no line through both sides of it
            v_last, was_guided = None, guided
        if guided not in known:
            known[guided] = model.condition(*asked[guided])
        if guided:
            if z is not None and len(z) == B:         # guidance begins: both branches share a past
                z = torch.cat([z, z])                                            # (2B, M, D)
            v, z, _ = model(torch.cat([x_t, x_t]), torch.cat([t, t]), *asked[True], z,
                            known[True])                                         # (2B, C, H, W)
            v = guide(v[:B].float(), v[B:].float(), w)                           # (B, C, H, W)
        else:
            z = z[:B] if z is not None else None
            v, z, _ = model(x_t, t, *asked[False], z, known[False])              # (B, C, H, W)
            v = v.float()
        slope, step = v, after - now
        if solver == "ab2" and v_last is not None:          # the line through the last two, midway
            slope = v + (v - v_last) * step / last / 2                           # (B, C, H, W)
        x_t, v_last, last = x_t + step * slope, v, step                          # (B, C, H, W)
        if progress is not None:
            progress()
    return x_t
