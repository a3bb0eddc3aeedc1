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
architecture is the release's (paper, section 3 and its appendix). It is fed gamma = 1 - t.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn import LayerNorm, RMSNorm


@dataclass(frozen=True)
class Config:
    """The size of a TextRIN. rewards fixes the order of the columns of s, everywhere.
    AssertionError, naming the fields: sizes that cannot be, or do not go together."""
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

    def __post_init__(self):
        for one in fields(self)[1:]:
            value, least = getattr(self, one.name), int(one.type is int)
            assert isinstance(value, (one.type, int)) and least <= value < 1e6, \
                f"{one.name} is {value}, not of type {one.type.__name__} and {least} or more"
        for key, part in (("size", "patch"), ("latent_dim", "heads"), ("latent_dim", "text_heads"),
                          ("latent_dim", "read_heads"), ("data_dim", "read_heads")):
            n, share = getattr(self, key), getattr(self, part)
            assert n % share == 0, f"{key} {n} is no multiple of {part} {share}"
        assert self.sigma_data > 0, f"sigma_data is {self.sigma_data}"
        for key in ("latent_dim", "data_dim"):
            width = getattr(self, key)
            assert width >= 8 and width % 4 == 0, f"{key} {width} is no multiple of 4 from 8 on"


PRESETS = {
    # The embedded world in ten minutes on a laptop.
    "shapes": dict(channels=3, size=24, patch=3, data_dim=96, latents=24, latent_dim=96, blocks=2,
                   layers=2, read_heads=4, heads=4, text_dim=96, text_heads=4, registers=4,
                   sigma_data=1.0, latent_std=1.0, sincos=True, zero_out=True, patch_bias=1.5),
    # The released network: SDXL-VAE latents of 256 px pictures, FLAN-T5-XL text.
    "paper": dict(channels=4, size=32, patch=2, data_dim=512, latents=256, latent_dim=1024,
                  blocks=4, layers=4, read_heads=16, heads=32, text_dim=2048, text_heads=16,
                  registers=16, sigma_data=0.5)}


def build(config: Config | dict) -> "TextRIN":
    """The network of a Config, or of its fields as config.json has them: the one constructor."""
    return TextRIN(config if isinstance(config, Config) else Config(**config))


class TextRIN(nn.Module):
    """v_θ(x_t, t, s, c): the velocity that MIRO learns."""
    def __init__(self, config: Config):
        super().__init__()
        c, D = config, config.latent_dim
        self.config = c
        pixels, N, R = c.channels * c.patch ** 2, (c.size // c.patch) ** 2, len(c.rewards)
        self.patch_in = nn.Linear(pixels, c.data_dim)
        self.patch_norm = RMSNorm(c.data_dim, eps=1e-6)
        self.positions = nn.Parameter(torch.empty(N, c.data_dim))
        self.latents = nn.Parameter(torch.empty(c.latents, D))
        self.time = Level(D)
        self.levels = nn.ModuleList(Level(D) for _ in c.rewards)
        self.reward_positions = nn.Parameter(torch.empty(R, D)) if R else None
        self.registers = nn.Parameter(torch.empty(c.registers, D))
        self.text_in = nn.Linear(c.text_dim, D)
        self.text_layers = nn.ModuleList(TextLayer(D, c.text_heads) for _ in range(2))
        self.previous_norm = LayerNorm(D, eps=1e-6)
        self.previous_mlp = MLP(D)
        self.previous_out = LayerNorm(D, eps=1e-6)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.blocks))
        self.out_norm = RMSNorm(c.data_dim, eps=1e-6)
        self.patch_out = nn.Linear(c.data_dim, pixels)
        self.log_variance = nn.Sequential(Fourier(128), nn.Linear(128, 1))
        self.initialise()

    def forward(self, x_t, t, s, text, text_mask, z=None, known=None):
        """v (B, C, S, S), the new latents z (B, M, D), the log-variance u (B,) of the loss at t.
        x_t (B, C, S, S), t (B,), s (B, R), text (B, L, text_dim), text_mask (B, L) bool, z: latents
        of the step before, or None; known: condition(s, text, text_mask), where that is there."""
        c, gamma = self.config, 1 - t                                            # (B,)
        g = gamma.view(-1, 1, 1, 1)                                              # (B, 1, 1, 1)
        x = x_t / torch.sqrt((g * c.sigma_data) ** 2 + (1 - g) ** 2)             # (B, C, S, S)
        x = to_patches(x, c.patch)                                               # (B, N, p² C)
        x = self.patch_in(x).float()          # fp32 whatever the autocast: so are all sums below
        x = self.patch_norm(x) + self.positions                                  # (B, N, d)
        time = self.time(gamma)[:, None]                                         # (B, 1, D)
        keys_values, mask = known or self.condition(s, text, text_mask)          # mask (B, 1 + K)
        if z is None:             # trained without any, previous_out.weight stays at its start of 0
            z = x.new_zeros(1, 1, c.latent_dim)                                  # (1, 1, D): all
        previous = self.previous_out(z + self.previous_mlp(self.previous_norm(z)))   # (B, M, D)
        z = self.latents + time + previous                                       # (B, M, D)
        for block, to_read in zip(self.blocks, keys_values):
            x, z = block(x, z, time, to_read, mask)                              # (B, N, d), z
        x = self.patch_out(self.out_norm(x))                                     # (B, N, p² C)
        v = from_patches(x, c.patch) * math.sqrt(1 + c.sigma_data ** 2)          # (B, C, S, S)
        return v, z, self.log_variance(gamma).flatten()                          # u (B,)

    def condition(self, s, text, text_mask):
        """All that the blocks read of s and c; sampling keeps it, as it does not depend on t.
        s (B, R) in [0, 1], NaN where a reward is not asked for → for each block keys and values
        (B, H, K, d), and the mask (B, 1 + K): K = R + registers + L, and one place for the time."""
        tokens = self.text_in(text)                                              # (B, L, D)
        rewards = tokens[:, :0]                                # the baseline's: (B, 0, D)
        if len(self.levels) > 0:
            asked, s = ~s.isnan()[..., None], s.nan_to_num(0)                    # (B, R, 1), (B, R)
            rewards = [level(s[:, r]) for r, level in enumerate(self.levels)]    # R of (B, D)
            rewards = torch.stack(rewards, 1) * asked + self.reward_positions    # (B, R, D)
        registers = self.registers.expand(len(text), -1, -1)                     # (B, registers, D)
        tokens = torch.cat([rewards.type_as(tokens), registers.type_as(tokens), tokens], 1)
        mask = F.pad(text_mask, (tokens.shape[1] - text_mask.shape[1], 0), value=True)   # (B, K)
        for layer in self.text_layers:
            tokens = layer(tokens, mask)                                         # (B, K, D)
        keys_values = [block.read_condition.attention.keys_values(tokens) for block in self.blocks]
        return keys_values, F.pad(mask, (1, 0), value=True)                      # (B, 1 + K)

    def compile(self, *args, **kwargs):
        """Each layer by itself: one is compiled for all of its kind, in a third of the time of the
        whole, which is 4 % faster after that."""
        for layer in (*self.text_layers, *self.blocks):
            layer.compile(*args, **kwargs)

    def inner_matrices(self) -> list:
        """The matrices of the layers between embeddings and heads: those that Muon trains."""
        inner = (self.text_layers, self.previous_mlp, self.blocks)
        return [p for part in inner for p in part.parameters() if p.ndim == 2]

    def norms_and_biases(self) -> list:
        """What the release's LAMB neither decays nor adapts; none of log_variance is among it."""
        modules = [m for name, m in self.named_modules() if not name.startswith("log_variance")]
        return [p for m in modules for name, p in m.named_parameters(recurse=False)
                if name == "bias" or isinstance(m, (LayerNorm, RMSNorm))]

    def initialise(self):
        """The release's start: Xavier for every linear layer but the log-variance's, noise of 0.02
        for learned tokens, zero for the last norm of self-conditioning (it starts as no change). A
        patch_bias: the noise to predict has each patch's magnitude, which patch_norm divides away;
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
        if c.zero_out:
            ends = [m.out for m in self.modules() if isinstance(m, (Attention, SwiGLU, MLP))]
            for linear in (*ends, self.patch_out):
                nn.init.zeros_(linear.weight)


class Block(nn.Module):
    """One RIN block: the latents read the condition and the data, compute, and write back."""
    def __init__(self, c: Config):
        super().__init__()
        self.read_condition = Cross(c.latent_dim, c.latent_dim, c.read_heads)
        self.read = Cross(c.latent_dim, c.data_dim, c.read_heads)
        self.compute = nn.ModuleList(Cross(c.latent_dim, None, c.heads) for _ in range(c.layers))
        self.write = Cross(c.data_dim, c.latent_dim, c.read_heads)

    def forward(self, x, z, time, known, mask):
        """x (B, N, d), z (B, M, D), time (B, 1, D), known: keys, values (B, H, K, d) → x, z."""
        now = self.read_condition.attention.keys_values(time)                    # (B, H, 1, d) x 2
        known = [torch.cat(pair, 2) for pair in zip(now, known)]             # (B, H, 1 + K, d) x 2
        z = self.read_condition(z, known, mask)                                  # (B, M, D)
        z = self.read(z, self.read.attention.keys_values(x))                     # (B, M, D)
        for layer in self.compute:
            z = layer(z)                                                         # (B, M, D)
        return self.write(x, self.write.attention.keys_values(z)), z             # (B, N, d), z


class Cross(nn.Module):
    """Tokens read from a source, or itself (None), then think: x + attention, x + SwiGLU."""
    def __init__(self, dim: int, source_dim: int | None, heads: int):
        super().__init__()
        self.norm_1 = RMSNorm(dim, eps=1e-6)
        self.attention = Attention(dim, source_dim, heads)
        self.norm_2 = RMSNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim)

    def forward(self, x, keys_values=None, mask=None):
        x = x + self.attention(self.norm_1(x), keys_values, mask)                # (B, N, D)
        return x + self.mlp(self.norm_2(x))                                      # (B, N, D)


class TextLayer(nn.Module):
    """Self-attention of the condition tokens: LayerNorm, GELU, layer scale. (B, K, D) → same."""
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm_1 = LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, None, heads, qk_norm=False, bias=True)
        self.norm_2 = LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)
        self.scale_1 = nn.Parameter(torch.full((dim,), 0.1))
        self.scale_2 = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x, mask):
        x = x + self.scale_1 * self.attention(self.norm_1(x), mask=mask)         # (B, K, D)
        return x + self.scale_2 * self.mlp(self.norm_2(x))                       # (B, K, D)


class Attention(nn.Module):
    """Multi-head attention of x (B, N, D) over a source (B, M, E), or itself (source_dim None).
    Queries and keys are normalised per head (qk_norm), so that logits cannot grow without bound."""
    def __init__(self, dim: int, source_dim: int | None, heads: int, qk_norm=True, bias=False):
        super().__init__()
        width = min(dim, source_dim or dim)
        self.heads = heads
        if source_dim is None:
            self.qkv = nn.Linear(dim, 3 * width, bias=bias)
        else:
            self.q = nn.Linear(dim, width, bias=bias)
            self.kv = nn.Linear(source_dim, 2 * width, bias=bias)
        self.out = nn.Linear(width, dim)
        self.q_norm = LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

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


class Fourier(nn.Module):
    """√2 cos(2π (f x) + φ) with random, saved f ~ N(0, 1) and φ: (B,) → (B, D)."""
    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(dim))
        self.register_buffer("phases", 2 * math.pi * torch.rand(dim))

    def forward(self, x):
        angles = torch.outer(x.float(), self.frequencies) + self.phases          # (B, D)
        return math.sqrt(2) * angles.cos()                                       # (B, D)


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

RELEASE_REWARDS = {"clip": "clip_score", "aesthetic": "aesthetic_score",
                   "image_reward": "image_reward_score", "pick": "pick_a_score_score",
                   "hpsv2": "hpsv2_score", "vqa": "vqa_score", "sci": "sciscore_score"}
RELEASE_NAMES = {                                              # class: {name here: name there}
    TextRIN: {"patch_in": "patch_extractor", "patch_norm": "data_ln", "time": "time_embedder",
              "positions": "data_pos_embedding", "levels": "coherence_embedder",
              "reward_positions": "coherence_positional_embedding", "registers": "text_registers",
              "text_in": "map_text_tokens", "text_layers": "transformers_blocks",
              "previous_norm": "ln_previous_1", "previous_mlp": "linear_previous",
              "previous_out": "ln_previous_2", "out_norm": "map_tokens_to_patches.0",
              "patch_out": "map_tokens_to_patches.1", "blocks": "rin_blocks",
              "log_variance": "logvar_proj"},
    Block: {"read_condition": "retrieve_cond", "read": "retriever_ca", "compute": "processer_sa",
            "write": "writer_ca"},
    Cross: {"norm_1": "initial_to_ln", "attention": "ca", "norm_2": "middle_ln", "mlp": "ffn"},
    TextLayer: {"norm_1": "initial_ln", "attention": "sa", "norm_2": "middle_ln", "mlp": "ffn",
                "scale_1": "layer_scale_1", "scale_2": "layer_scale_2"},
    SwiGLU: {"up": "linear_packed", "out": "linear_out"},
    MLP: {"up": "linear_1", "out": "linear_2"},
    Level: {"fourier": "encode_time", "up": "map_time_input", "out": "map_time_output"},
    Fourier: {"frequencies": "freqs"}}


def release_name(net: TextRIN, name: str) -> str:
    """A tensor's name here → its name in the release's model.safetensors."""
    parts, module, compute = [], net, [layer for block in net.blocks for layer in block.compute]
    for part in name.split("."):
        alike = TextLayer if module in compute else type(module)     # named as the text's layers
        parts.append(RELEASE_NAMES.get(alike, {}).get(part, part))
        module = getattr(module, part, None)
    if parts[0] == "coherence_embedder":
        reward = net.config.rewards[int(parts[1])]
        parts[1] = RELEASE_REWARDS.get(reward, reward) + "_coherence"
    return ("preconditioning." if parts[0] == "logvar_proj" else "network.") + ".".join(parts)


def release_config(config: dict) -> Config:
    """The release's config.json → Config. ValueError: its network is not ours, where the shapes of
    its tensors do not tell."""
    there, around = config["network"], config.get("preconditioning", {})
    if around.get("do_normalization", True) not in ("noise_driven", True):
        raise ValueError(f"do_normalization is {around['do_normalization']}, not noise_driven")
    names = {name: here for here, name in RELEASE_REWARDS.items()}
    return Config(
        rewards=tuple(names.get(key, key) for key in there["coherence_keys"]),
        channels=there["num_input_channels"], size=there["data_size"], patch=there["patch_size"],
        data_dim=there["data_dim"], latents=there["num_latents"], latent_dim=there["latents_dim"],
        blocks=there["num_blocks"], layers=there["num_processing_layers"],
        read_heads=there.get("read_write_heads", 16), heads=there.get("compute_heads", 16),
        text_dim=there["label_dim"], text_heads=16, registers=there.get("num_text_registers", 16),
        sigma_data=around.get("sigma_data", 0.5))
