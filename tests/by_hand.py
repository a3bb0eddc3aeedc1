"""Pieces of transformers, written out on a checkpoint's own tensors: w {name: tensor}."""
import math

import torch


def linear(w: dict, at: str, x: torch.Tensor) -> torch.Tensor:
    return x @ w[at + ".weight"].T + w.get(at + ".bias", 0)


def norm(w: dict, at: str, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * w[at + ".weight"] + w[at + ".bias"]


def attend(q, k, v, heads: int, bias=0) -> torch.Tensor:
    """(B, L, D) each → (B, L, D)."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1]) + bias
    return torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), v).flatten(2)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def patches(pixels: torch.Tensor, kernel: torch.Tensor, bias=0) -> torch.Tensor:
    """uint8 (B, 3, n, n) → normalised as CLIP wants it, and cut: (B, patches, D)."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).double().view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).double().view(3, 1, 1)
    x, p = ((pixels.double() / 255 - mean) / std).to(kernel.dtype), kernel.shape[-1]
    x = x.unflatten(2, (-1, p)).unflatten(4, (-1, p))                      # (B, 3, H, p, W, p)
    return torch.einsum("bchpwq,dcpq->bhwd", x, kernel).flatten(1, 2) + bias


def clip_layers(w: dict, at: str, x: torch.Tensor, layers: int, heads: int, activation, bias=0):
    """x (B, L, D) through some layers of one of CLIP's towers."""
    for layer in range(layers):
        one = f"{at}.encoder.layers.{layer}."
        y = norm(w, one + "layer_norm1", x)
        y = attend(*(linear(w, f"{one}self_attn.{part}_proj", y) for part in "qkv"), heads, bias)
        x = x + linear(w, one + "self_attn.out_proj", y)
        y = activation(linear(w, one + "mlp.fc1", norm(w, one + "layer_norm2", x)))
        x = x + linear(w, one + "mlp.fc2", y)
    return x


def clip_patches(w: dict, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, n, n) → what CLIP's picture tower gives its first layer (B, 1 + n², D)."""
    x = patches(pixels, w["vision_model.embeddings.patch_embedding.weight"])
    x = torch.cat([w["vision_model.embeddings.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = x + w["vision_model.embeddings.position_embedding.weight"]
    return norm(w, "vision_model.pre_layrnorm", x)
