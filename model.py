r"""TextRIN: a recurrent interface network that reads text and reward levels.

                 s (B, R) reward levels    text (B, L, E)
                        \                   /
     t ── embed ──┐   2 self-attention layers over [rewards | registers | text]
                  └──────────────┬──┘
                            condition tokens
                                 │ read                      × blocks
     latents z ─────────────▶ ( z ) ◀── read ── ( x ) data tokens, one per patch
                              layers of            ▲
                              self-attention       │
                                 └───── write ─────┘

All the work happens in a few latents; the many data tokens are only read from and written to. The
architecture is the release's (paper, section 3 and its appendix): one class for every size. The
network is fed gamma = 1 - t, so 1 is data there.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class Config:
    """The size of a TextRIN. rewards fixes the order of the columns of s, everywhere."""
    rewards: tuple
    channels: int                       # of the data: 3 pixels, 4 VAE latents
    size: int                           # side of the data
    patch: int                          # side of a data token
    data_dim: int
    latents: int                        # how many
    latent_dim: int
    blocks: int
    layers: int                         # self-attention layers in a block
    read_heads: int                     # of reading and writing
    heads: int                          # of self-attention in the latents
    text_dim: int                       # of the frozen encoder
    text_heads: int
    registers: int                      # learned tokens beside the text
    sigma_data: float                   # standard deviation of the data
    latent_std: float = 0.02            # of the learned latents at the start
    sincos: bool = False                # patch positions start as sin-cos instead of noise of 0.02
    zero_out: bool = False              # every residual branch, and v, start at zero
    patch_bias: float = 0.0             # patch_in's bias starts as noise of this std


PRESETS = {
    # The embedded world in ten minutes on a laptop.
    "shapes": dict(channels=3, size=24, patch=3, data_dim=96, latents=24, latent_dim=96, blocks=2,
                   layers=2, read_heads=4, heads=4, text_dim=64, text_heads=4, registers=4,
                   sigma_data=1.0, latent_std=1.0, sincos=True, zero_out=True, patch_bias=1.5),
    # The released network: SDXL-VAE latents of 256 px pictures, FLAN-T5-XL text.
    "paper": dict(channels=4, size=32, patch=2, data_dim=512, latents=256, latent_dim=1024,
                  blocks=4, layers=4, read_heads=16, heads=32, text_dim=2048, text_heads=16,
                  registers=16, sigma_data=0.5),
}


class RMSNorm(nn.Module):
    """x / rms(x) · weight, in fp32 whatever the autocast: (..., D) → (..., D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, 1e-6)


class Fourier(nn.Module):
    """√2 cos(2π (f x) + φ) with random, saved f ~ N(0, 1) and φ: (B,) → (B, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(dim))
        self.register_buffer("phases", 2 * math.pi * torch.rand(dim))

    def forward(self, x):
        return math.sqrt(2) * torch.cos(torch.outer(x.float(), self.frequencies) + self.phases)


class Level(nn.Module):
    """A number in [0, 1], a time or a reward level, becomes a token: (B,) → (B, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fourier = Fourier(dim // 4)
        self.up = nn.Linear(dim // 4, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        h = self.fourier(x)                                                      # (B, D / 4)
        # every level enters the MLP at the same scale, whatever its cosines happen to sum to
        h = (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True)             # (B, D / 4)
        return self.out(F.silu(self.up(h)))                                      # (B, D)


class SwiGLU(nn.Module):
    """a · silu(b), hidden size 8/3 D rounded up to a multiple of 256: (..., D) → (..., D)."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = -(-int(4 * dim * 2 / 3) // 256) * 256
        self.up = nn.Linear(dim, 2 * hidden)
        self.out = nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.up(x).chunk(2, -1)                                           # (..., hidden) x 2
        return self.out(a * F.silu(b))                                           # (..., D)


class MLP(nn.Module):
    """Linear, GELU, Linear, hidden size 4 D: (..., D) → (..., D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim)
        self.out = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.out(F.gelu(self.up(x)))                                      # (..., D)


class Attention(nn.Module):
    """Multi-head attention of x (B, N, D) over a source (B, M, E), or itself (source_dim None).

    Queries and keys are normalised per head (qk_norm), so that logits cannot grow without bound.
    What a source offers, `keys_values`, does not depend on x and can be kept.
    """

    def __init__(self, dim: int, source_dim: int | None, heads: int, qk_norm=True, bias=False):
        super().__init__()
        width = min(dim, source_dim or dim)
        assert width % heads == 0, f"{heads} heads do not divide a width of {width}"
        self.heads = heads
        if source_dim is None:
            self.qkv = nn.Linear(dim, 3 * width, bias=bias)
        else:
            self.q = nn.Linear(dim, width, bias=bias)
            self.kv = nn.Linear(source_dim, 2 * width, bias=bias)
        self.out = nn.Linear(width, dim)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def split(self, x):
        """(B, N, H d) → (B, H, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, source):
        """What there is to read in a source (B, M, E): keys and values, (B, H, M, d) each."""
        k, v = self.kv(source).chunk(2, -1)                                      # (B, M, width) x 2
        return self.k_norm(self.split(k)), self.split(v)

    def forward(self, x, keys_values=None, mask=None):
        """x (B, N, D) reads keys_values (B, H, M, d), or itself, where mask (B, M) is True."""
        if keys_values is None:
            q, k, v = (self.split(a) for a in self.qkv(x).chunk(3, -1))          # (B, H, N, d) x 3
            k = self.k_norm(k)                                                   # (B, H, N, d)
        else:
            q, (k, v) = self.split(self.q(x)), keys_values                       # (B, H, N | M, d)
        if mask is not None:
            mask = mask[:, None, None, :]                                        # (B, 1, 1, M)
        h = F.scaled_dot_product_attention(self.q_norm(q), k, v, attn_mask=mask)     # (B, H, N, d)
        return self.out(h.transpose(1, 2).flatten(2))                            # (B, N, D)


class Cross(nn.Module):
    """Tokens x read from a source, then think: x + attention, x + SwiGLU. (B, N, D) → same."""

    def __init__(self, dim: int, source_dim: int, heads: int):
        super().__init__()
        self.norm_1, self.attention = RMSNorm(dim), Attention(dim, source_dim, heads)
        self.norm_2, self.mlp = RMSNorm(dim), SwiGLU(dim)

    def offer(self, source):
        """What x can read of a source (B, M, E): keys and values, (B, H, M, d) each."""
        return self.attention.keys_values(source)

    def forward(self, x, keys_values, mask=None):
        x = x + self.attention(self.norm_1(x), keys_values, mask)                # (B, N, D)
        return x + self.mlp(self.norm_2(x))                                      # (B, N, D)


class Compute(nn.Module):
    """Self-attention of the latents, then SwiGLU. (B, M, D) → (B, M, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm_1, self.attention = RMSNorm(dim), Attention(dim, None, heads)
        self.norm_2, self.mlp = RMSNorm(dim), SwiGLU(dim)

    def forward(self, z):
        z = z + self.attention(self.norm_1(z))                                   # (B, M, D)
        return z + self.mlp(self.norm_2(z))                                      # (B, M, D)


class TextLayer(nn.Module):
    """Self-attention of the condition tokens: LayerNorm, GELU, layer scale. (B, K, D) → same."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, None, heads, qk_norm=False, bias=True)
        self.norm_2, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim)
        self.scale_1 = nn.Parameter(torch.full((dim,), 0.1))
        self.scale_2 = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x, mask):
        x = x + self.scale_1 * self.attention(self.norm_1(x), mask=mask)         # (B, K, D)
        return x + self.scale_2 * self.mlp(self.norm_2(x))                       # (B, K, D)


class Block(nn.Module):
    """One RIN block: the latents read the condition and the data, compute, and write back."""

    def __init__(self, c: Config):
        super().__init__()
        self.read_condition = Cross(c.latent_dim, c.latent_dim, c.read_heads)
        self.read = Cross(c.latent_dim, c.data_dim, c.read_heads)
        self.compute = nn.ModuleList(Compute(c.latent_dim, c.heads) for _ in range(c.layers))
        self.write = Cross(c.data_dim, c.latent_dim, c.read_heads)

    def forward(self, x, z, time, known, mask):
        """x (B, N, d), z (B, M, D), time (B, 1, D), known as in `condition` → x, z."""
        now = self.read_condition.offer(time)                                    # (B, H, 1, d) x 2
        known = [torch.cat(pair, 2) for pair in zip(now, known)]             # (B, H, 1 + K, d) x 2
        z = self.read_condition(z, known, mask)                                  # (B, M, D)
        z = self.read(z, self.read.offer(x))                                     # (B, M, D)
        for layer in self.compute:
            z = layer(z)                                                         # (B, M, D)
        return self.write(x, self.write.offer(z)), z                             # (B, N, d), z


class TextRIN(nn.Module):
    """v_θ(x_t, t, s, c): the velocity that MIRO learns.

    forward takes x_t (B, C, S, S), t (B,), s (B, R), text (B, L, text_dim), text_mask (B, L) bool,
    and z (B, M, D), the latents of the step before, or None at the first. It returns v like x_t,
    the new latents z, and the log-variance u (B,) of the loss at t. `known` is
    condition(s, text, text_mask), where that was computed before: no result changes.
    """

    def __init__(self, config: Config):
        super().__init__()
        c, D = config, config.latent_dim
        assert c.size % c.patch == 0, f"patch {c.patch} does not divide the side {c.size}"
        self.config = c
        pixels, N, R = c.channels * c.patch ** 2, (c.size // c.patch) ** 2, len(c.rewards)
        self.patch_in, self.patch_norm = nn.Linear(pixels, c.data_dim), RMSNorm(c.data_dim)
        self.positions = nn.Parameter(torch.empty(N, c.data_dim))
        self.latents = nn.Parameter(torch.empty(c.latents, D))
        self.time = Level(D)

        self.levels = nn.ModuleList(Level(D) for _ in c.rewards)
        self.reward_positions = nn.Parameter(torch.empty(R, D)) if R else None
        self.registers = nn.Parameter(torch.empty(c.registers, D))
        self.text_in = nn.Linear(c.text_dim, D)
        self.text_layers = nn.ModuleList(TextLayer(D, c.text_heads) for _ in range(2))

        self.previous_norm, self.previous_mlp = nn.LayerNorm(D, eps=1e-6), MLP(D)
        self.previous_out = nn.LayerNorm(D, eps=1e-6)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.blocks))
        self.out_norm, self.patch_out = RMSNorm(c.data_dim), nn.Linear(c.data_dim, pixels)
        self.log_variance = nn.Sequential(Fourier(128), nn.Linear(128, 1))
        self.initialise()

    def initialise(self):
        """The release's start: Xavier for every linear layer but the log-variance's, noise of 0.02
        for learned tokens, zero for the last norm of self-conditioning (it starts as no change).
        The `shapes` preset changes what its fields latent_std, sincos, zero_out and patch_bias say.
        The last: predicting the noise needs each patch's magnitude, which patch_norm divides away;
        added to a large constant it survives as the direction of the sum."""
        c = self.config
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("log_variance"):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter, std in ((self.positions, 0.02), (self.reward_positions, 0.02),
                               (self.registers, 0.02), (self.latents, c.latent_std)):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        if c.sincos:
            self.positions.data.copy_(sincos(c.size // c.patch, c.data_dim))
        if c.patch_bias:
            nn.init.normal_(self.patch_in.bias, std=c.patch_bias)
        nn.init.zeros_(self.previous_out.weight)
        nn.init.zeros_(self.previous_out.bias)
        if c.zero_out:
            ends = [m.out for m in self.modules() if isinstance(m, (Attention, SwiGLU, MLP))]
            for linear in (*ends, self.patch_out):
                nn.init.zeros_(linear.weight)

    def condition(self, s, text, text_mask):
        """All that the blocks read of s and c. It does not depend on t, so sampling keeps it.

        s (B, R) in [0, 1], or -1 for a reward that is not asked for; text (B, L, text_dim),
        text_mask (B, L) → for each block its keys and values (B, H, K, d), and the mask
        (B, 1 + K), with K = R + registers + L and one place for the time.
        """
        B = len(text)
        rewards = [level(s[:, r]) for r, level in enumerate(self.levels)]        # R of (B, D)
        asked = (s >= 0)[..., None]                                              # (B, R, 1)
        tokens = self.text_in(text)                                              # (B, L, D)
        if rewards:
            rewards = torch.stack(rewards, 1) * asked + self.reward_positions    # (B, R, D)
        else:                                                       # the baseline without rewards
            rewards = tokens[:, :0]                                              # (B, 0, D)
        registers = self.registers.expand(B, -1, -1)                             # (B, registers, D)
        tokens = torch.cat([rewards.type_as(tokens), registers.type_as(tokens), tokens], 1)
        mask = F.pad(text_mask, (tokens.shape[1] - text_mask.shape[1], 0), value=True)   # (B, K)
        for layer in self.text_layers:
            tokens = layer(tokens, mask)                                         # (B, K, D)
        known = [block.read_condition.offer(tokens) for block in self.blocks]    # (B, H, K, d) x 2
        return known, F.pad(mask, (1, 0), value=True)                            # (B, 1 + K)

    def forward(self, x_t, t, s, text, text_mask, z=None, known=None):
        """See the class: → v (B, C, S, S), z (B, M, D), u (B,)."""
        c, gamma = self.config, 1 - t                                            # (B,)
        g = gamma.view(-1, 1, 1, 1)                                              # (B, 1, 1, 1)
        x = x_t / torch.sqrt((g * c.sigma_data) ** 2 + (1 - g) ** 2)             # (B, C, S, S)
        x = to_patches(x, c.patch)                                               # (B, N, p² C)
        x = self.patch_norm(self.patch_in(x)) + self.positions                   # (B, N, d)

        time = self.time(gamma)[:, None]                                         # (B, 1, D)
        known, mask = known or self.condition(s, text, text_mask)                # mask (B, 1 + K)

        # Trained without latents (self_condition 0), previous_out.weight has a gradient of zero and
        # stays zero: the latents that sampling hands on then change nothing.
        if z is None:
            z = x.new_zeros(len(x), c.latents, c.latent_dim)                     # (B, M, D)
        previous = self.previous_out(z + self.previous_mlp(self.previous_norm(z)))   # (B, M, D)
        z = self.latents + time + previous                                       # (B, M, D)
        for block, keys_values in zip(self.blocks, known):
            x, z = block(x, z, time, keys_values, mask)                          # (B, N, d), z

        x = self.patch_out(self.out_norm(x))                                     # (B, N, p² C)
        v = from_patches(x, c.patch) * math.sqrt(1 + c.sigma_data ** 2)          # (B, C, S, S)
        return v, z, self.log_variance(gamma).flatten()                          # u (B,)


def to_patches(x: torch.Tensor, p: int) -> torch.Tensor:
    """Cut into patches, row by row, channels last: (B, C, S, S) → (B, (S / p)², p² C)."""
    x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))                          # (B, C, n, p, n, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)                  # (B, n², p² C)


def from_patches(x: torch.Tensor, p: int) -> torch.Tensor:
    """The inverse of to_patches."""
    n = math.isqrt(x.shape[1])
    x = x.unflatten(2, (p, p, -1)).unflatten(1, (n, n))                        # (B, n, n, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                  # (B, C, S, S)


def sincos(side: int, dim: int) -> torch.Tensor:
    """Sine and cosine of row and column at geometric wavelengths: (side², dim), unit variance."""
    frequencies = torch.pi / 2 * side ** -(torch.arange(dim // 4) / (dim // 4 - 1))   # (dim / 4,)
    angles = torch.outer(torch.arange(side) + 0.5, frequencies)                  # (side, dim / 4)
    waves = math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], 1)            # (side, dim / 2)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)                          # (side², dim)


# --------------------------------------------------------- the release's layout of the same network

RELEASE_REWARDS = {"clip": "clip_score", "aesthetic": "aesthetic_score", "vqa": "vqa_score",
                   "image_reward": "image_reward_score", "pick": "pick_a_score_score",
                   "hpsv2": "hpsv2_score", "sci": "sciscore_score"}               # here: there
RELEASE_CONFIG = {"channels": "num_input_channels", "size": "data_size", "patch": "patch_size",
                  "data_dim": "data_dim", "latents": "num_latents", "latent_dim": "latents_dim",
                  "blocks": "num_blocks", "layers": "num_processing_layers",
                  "read_heads": "read_write_heads", "heads": "compute_heads",
                  "text_dim": "label_dim", "registers": "num_text_registers"}     # here: there
RELEASE_DEFAULTS = {"read_write_heads": 16, "compute_heads": 16, "num_text_registers": 16,
                    "use_cond_rin_block": False, "concat_cond_token_to_latents": True,
                    "use_self_conditioning": False}             # there, where config.json is silent
RELEASE_FIXED = {"use_cond_rin_block": True, "concat_cond_token_to_latents": False,
                 "use_self_conditioning": True, "latent_mlp_multiplier": 4,
                 "data_mlp_multiplier": 4, "do_normalization": "noise_driven",
                 "logvar_channels": 128, "logvar_mlp_layers": 0}
RELEASE_NAMES = {                       # class: {attribute here: name there}
    TextRIN: {"patch_in": "patch_extractor", "patch_norm": "data_ln", "time": "time_embedder",
              "positions": "data_pos_embedding", "levels": "coherence_embedder",
              "reward_positions": "coherence_positional_embedding", "registers": "text_registers",
              "text_in": "map_text_tokens", "text_layers": "transformers_blocks",
              "previous_norm": "ln_previous_1", "previous_mlp": "linear_previous",
              "previous_out": "ln_previous_2", "blocks": "rin_blocks",
              "out_norm": "map_tokens_to_patches.0", "patch_out": "map_tokens_to_patches.1",
              "log_variance": "logvar_proj"},
    Block: {"read_condition": "retrieve_cond", "read": "retriever_ca", "compute": "processer_sa",
            "write": "writer_ca"},
    Cross: {"norm_1": "initial_to_ln", "attention": "ca", "norm_2": "middle_ln", "mlp": "ffn"},
    Compute: {"norm_1": "initial_ln", "attention": "sa", "norm_2": "middle_ln", "mlp": "ffn"},
    TextLayer: {"norm_1": "initial_ln", "attention": "sa", "norm_2": "middle_ln", "mlp": "ffn",
                "scale_1": "layer_scale_1", "scale_2": "layer_scale_2"},
    SwiGLU: {"up": "linear_packed", "out": "linear_out"},
    MLP: {"up": "linear_1", "out": "linear_2"},
    Level: {"fourier": "encode_time", "up": "map_time_input", "out": "map_time_output"},
    Fourier: {"frequencies": "freqs"},
}


def release_name(net: TextRIN, name: str) -> str:
    """A tensor's name here → its name in the release's model.safetensors."""
    parts, module = [], net
    for part in name.split("."):
        if module is net.levels:
            reward = net.config.rewards[int(part)]
            parts.append(f"{RELEASE_REWARDS.get(reward, reward)}_coherence")
        else:
            parts.append(RELEASE_NAMES.get(type(module), {}).get(part, part))
        module = getattr(module, part, None)
    return ("preconditioning." if parts[0] == "logvar_proj" else "network.") + ".".join(parts)


def release_config(config: dict) -> Config:
    """The release's config.json → Config. ValueError: an architecture that this file is not."""
    there, around = config["network"], config.get("preconditioning", {})
    for key, value in RELEASE_FIXED.items():
        found = (RELEASE_DEFAULTS | there | around).get(key, value)
        if found != value and (key, found) != ("do_normalization", True):        # the same there
            raise ValueError(f"{key} is {found}, and this network has {value} alone")
    aliases = {name: here for here, name in RELEASE_REWARDS.items()}
    return Config(rewards=tuple(aliases.get(key, key) for key in there["coherence_keys"]),
                  text_heads=16, sigma_data=around.get("sigma_data", 0.5),
                  **{here: (RELEASE_DEFAULTS | there)[name]
                     for here, name in RELEASE_CONFIG.items()})


def release_config_of(c: Config) -> dict:
    """The inverse: the network, preconditioning and coherence_keys of the release's config.json.
    ValueError: text_heads is not 16, the only number there."""
    if c.text_heads != 16:
        raise ValueError(f"the release's layout has 16 text heads, and this network {c.text_heads}")
    keys = [RELEASE_REWARDS.get(name, name) for name in c.rewards]
    network = {name: getattr(c, here) for here, name in RELEASE_CONFIG.items()}
    network |= dict(coherence_keys=keys, num_cond_tokens=1, use_cond_rin_block=True,
                    concat_cond_token_to_latents=False, use_self_conditioning=True)
    preconditioning = dict(num_latents=c.latents, latents_dim=c.latent_dim,
                           do_normalization="noise_driven", sigma_data=c.sigma_data)
    return dict(network=network, preconditioning=preconditioning, coherence_keys=keys)
