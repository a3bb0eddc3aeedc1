"""Rewards: score every picture with its captions, once, before training.

Two kinds. Five are analytic: they measure the pixels and the caption and nothing else, so the same
code scores the data and the pictures that a model generates, without a download. Seven are the
paper's: networks of 0.3 to 11 billion parameters, one class each (`--rewards all`).

`python rewards.py DATA` writes <shard>.scores.jsonl beside each tar (or into the picture folder):
    {"format": 1, "shard": "00000", "rewards": {name: scorer and checkpoint}, "size": 24, ...}
    {"key": "000000000", "captions": [a hash of each], "scores": {name: [a score per caption]}}
    {"key": "000000001", "error": "why there is no score"}
Finished shards and finished rewards are skipped, so the same command again continues a run that
was killed. `torchrun rewards.py DATA` shares the shards among its ranks.
`python rewards.py --image a.png --prompt "..." --rewards all` prints the scores of one pair.
"""
import argparse
import hashlib
import json
import math
import os
import pickle
import re
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import binning
import shapes
from data import (BROKEN, MAX_PIXELS, MAX_UNREADABLE, Pictures, Shard, best_device, decode,
                  find_tars, first_line, hashes, square, to_rgb)
from model import RELEASE_REWARDS

ENDING = ".scores.jsonl"         # of a sidecar: <shard name>.scores.jsonl


# ---- analytic rewards: images uint8 (B, 3, H, W), prompts list (B) of str -> (B,) float64 --------
# In float64, which `score` rounds to float32: sums that another batch size, thread count or machine
# adds up in another order still give the same score.

def alignment(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The share of the caption's statements that are true in the picture: 0 to 1.

    shapes.py reads both. Not in the paper: stands in for its VQA and CLIP scores, whose networks
    were not trained on shapes of 24 pixels. ValueError: a caption that is not of its grammar.
    """
    claims = [shapes.parse(prompt) for prompt in prompts]
    return torch.tensor([shapes.truth(claim, things)
                         for claim, things in zip(claims, shapes.detect(images))]).double()


def colorfulness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """sqrt(var rg + var yb) + 0.3 sqrt(mean² rg + mean² yb), rg = R - G, yb = (R + G) / 2 - B.

    Hasler & Süsstrunk 2003, "Measuring colourfulness in natural images", their M3, on 0..255 RGB
    with population variances: 0 is grey, 33 moderately, 59 quite, 109 extremely colourful.
    Not in the paper: stands in for its aesthetic score, because it can be hacked. Coloured confetti
    raises it and ruins `alignment`.
    """
    red, green, blue = images.double().unbind(1)                                 # (B, H, W)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)     # (B, 2, HW)
    spread = opponents.var(2, correction=0).sum(1).sqrt()                        # (B,)
    return spread + 0.3 * opponents.mean(2).square().sum(1).sqrt()               # (B,)


def luminance(images: torch.Tensor) -> torch.Tensor:
    """Rec. 709 weights on the sRGB values as they are stored, not linearised: (B, H, W) in 0..255.

    (That is luma. It is nearer than light intensity to what a viewer calls equally large steps.)
    """
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    return (images.double() * weights.view(3, 1, 1)).sum(1)


def contrast(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """RMS contrast: the population standard deviation of the luminance in units of white, 0 to 0.5.

    Peli 1990, "Contrast in complex images". Not in the paper: washed-out pictures are its bad ones.
    """
    return luminance(images).flatten(1).std(1, correction=0) / 255


def sharpness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """How much of the contrast around them edges cross in one pixel: 0 (flat) to nearly 1.

    g = |difference of neighbours| over the range (max - min) of the 9 x 9 around; the score is
    sum g³ / sum g², the mean of g over edges: how steep they are counts, not how many they are or
    how strong, so that it repeats neither `contrast` nor the number of things. After maximum local
    variation (Bahrami and Kot 2014). Not in the paper: blurred pictures are its bad ones.
    5 grey levels are added to the range: a flat picture is 0, a stray grey level no sharp edge.
    """
    y = luminance(images)[:, None]                                               # (B, 1, H, W)
    span = F.max_pool2d(y, 9, 1, 4) + F.max_pool2d(-y, 9, 1, 4) + 5              # (B, 1, H, W)
    g = [(y[..., 1:] - y[..., :-1]).abs() / torch.maximum(span[..., 1:], span[..., :-1]),
         (y[..., 1:, :] - y[..., :-1, :]).abs()
         / torch.maximum(span[..., 1:, :], span[..., :-1, :])]
    g = torch.cat([part.flatten(1) for part in g], 1)                            # (B, 2 H W - ...)
    return g.pow(3).sum(1) / g.square().sum(1).clamp(min=1e-9)                   # (B,)


def composition(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """How centred the picture's mass is, and how little of it the frame cuts: 0 to 1.

    Saliency of a pixel = distance of its colour from the background's, which is the median of the
    1-pixel border, channel by channel. Score = (1 - distance of the saliency's centroid from the
    centre, in half sides, at most 1) * (1 - share of the saliency on the border). A flat picture
    has no mass to place: 0. Not in the paper: the rule of the centre, for badly framed pictures;
    no caption is needed. A texture without a subject is centred too, so noise does not score low.
    """
    x, (H, W) = images.double(), images.shape[2:]
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, 1:-1, 0], x[:, :, 1:-1, -1]], 2)
    background = border.median(2).values[:, :, None, None]                       # (B, 3, 1, 1)
    saliency = (x - background).square().sum(1).sqrt()                           # (B, H, W)
    total = saliency.sum((1, 2))                                                 # (B,)
    mass = total.clamp(min=1e-9)            # colours are integers: a total is 0 or at least 1
    right, down = ((torch.arange(n, dtype=torch.float64) + 0.5) / (n / 2) - 1 for n in (W, H))
    off = torch.hypot((saliency.sum(1) * right).sum(1), (saliency.sum(2) * down).sum(1)) / mass
    inside = saliency[:, 1:-1, 1:-1].sum((1, 2)) / mass                          # (B,)
    return (1 - off).clamp(min=0) * inside                                       # 0 where flat


# name: (scorer, version). The order is that of the columns. Raise the version when a scorer's
# results change (alignment: also when shapes.detect does), and old scores are made anew.
SCORERS = {
    "alignment": (alignment, "4"),
    "colorfulness": (colorfulness, "1"),
    "contrast": (contrast, "1"),
    "sharpness": (sharpness, "3"),
    "composition": (composition, "1"),
}
ANALYTIC = tuple(SCORERS)


def score(name: str, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """One reward of pairs: images uint8 (B, 3, H, W), prompts (B) → (B,) float32, in its units.

    Analytic rewards alone. ValueError: another reward, or a prompt that alignment cannot parse.
    """
    check_names((name,), ANALYTIC)
    assert images.dtype == torch.uint8 and images.shape[1] == 3, (images.dtype, images.shape)
    assert len(images) == len(prompts), (len(images), len(prompts))
    return SCORERS[name][0](images.cpu(), prompts).float()


def score_all(names: Sequence[str], images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Several rewards: images uint8 (B, 3, H, W), prompts (B) → (B, R) float32, R as in names."""
    scores = torch.empty(len(images), len(names))
    for r, name in enumerate(names):
        scores[:, r] = score(name, images, prompts)
    return scores


# ---- the seven rewards of the paper: frozen networks of 0.3 to 11 billion parameters -------------
# Each is a class. `see`: uint8 pictures (B, 3, n, n) → what it knows of them, (B, D) of length 1
# where nothing else is said; `judge`: that and prompts (B) → (B,) float32 in its units. Towers
# run in `dtype`; normalisation, dot products and heads in float32. SOURCES: (repository,
# patterns of its files), in the order of __init__'s folders; VIEW: how `views` cuts the picture;
# DISK: GB to download; MEMORY: GB of weights in bf16; GFLOP: of a picture, of a prompt.

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)    # CLIP's


def normalised(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (B, 3, n, n) → zero mean and unit variance a channel, as all seven expect."""
    mean, std = (torch.tensor(a, device=pixels.device).view(3, 1, 1) for a in (MEAN, STD))
    return ((pixels / 255 - mean) / std).to(dtype)                               # (B, 3, n, n)


def pretrained(folder: Path, kind: type, more: bool = False):
    """A model of transformers from its folder, in float32, strictly: ValueError, naming the tensor,
    if one is missing, of another shape or, without `more`, unknown."""
    try:
        model, found = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
            local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded ({first_line(error)}); fetch it again") \
            from error
    wrong = sorted([*found["missing_keys"], *(() if more else found["unexpected_keys"]),
                    *(key for key, *_ in found["mismatched_keys"])])
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} tensors are missing, unknown or of another "
                         f"shape, such as {wrong[0]}; fetch it again")
    return model.eval().requires_grad_(False)


def read_weights(file: Path) -> dict:
    """A checkpoint of safetensors or torch.save, tensors alone. ValueError: it is neither."""
    try:
        found = (load_file(file) if file.suffix == ".safetensors" else
                 torch.load(file, map_location="cpu", weights_only=True))
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({first_line(error)}); fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no named tensors; fetch it again")
    return found


def read_folder(folder: Path, device, dtype) -> tuple[Path, dict[str, torch.Tensor]]:
    """The weights of a hub folder, in one file or in shards: a file to name in errors, tensors."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path, index, files = folder / name, folder / f"{name}.index.json", [name]
        if index.exists():
            path, files = index, sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if any(Path(file).name != file for file in files):
                raise ValueError(f"{index} names files of other folders; fetch it again")
        if path.exists():
            tensors = {}
            for file in files:               # cast one by one: never two whole models in memory
                shard = read_weights(folder / file)
                tensors |= {key: shard.pop(key).to(device, dtype) for key in list(shard)}
            return path, tensors
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin, whole "
                            "or with an index")


def fill(model: nn.Module, tensors: dict, path: Path, theirs: Callable = str) -> None:
    """Give a model, made on meta or not, the tensors of a file, all of them and no others.

    theirs: our name of a tensor → its key in the file. ValueError: one is missing, unexpected or
    of another shape. Done by hand because from_pretrained fills gaps with random numbers.
    """
    state, keys = {}, set()
    for name, empty in model.state_dict().items():
        key = theirs(name)
        if not isinstance(tensors.get(key), torch.Tensor):
            raise ValueError(f"{path}: tensor {key} is missing; fetch the file again")
        if tensors[key].shape != empty.shape:
            raise ValueError(f"{path}: tensor {key} has shape {tuple(tensors[key].shape)}, not "
                             f"{tuple(empty.shape)}; fetch the file again")
        state[name] = tensors[key]
        keys.add(key)
    for key in tensors:
        if key not in keys:
            raise ValueError(f"{path}: tensor {key} is unexpected; fetch the file again")
    model.load_state_dict(state, assign=True)
    for module in model.modules():           # constants that are in no file and still on meta
        if hasattr(module, "position_ids") and module.position_ids.is_meta:
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    model.eval().requires_grad_(False)


class PickScore:
    """pick: cos(E_picture, E_prompt) · exp(scale) / 100, which is nearly the cosine.

    Kirstain et al. 2023, arXiv 2305.01569, trained on choices of users of a generator. CLIP
    ViT-H/14, 224 px centre crop, the raw prompt, 77 tokens. Typically 0.18 to 0.24. Licence MIT.
    """
    SOURCES = (("yuvalkirstain/PickScore_v1", ("config.json", "*.safetensors")),
               ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ("*token*", "vocab*", "merges*")))
    VIEW, DISK, MEMORY, GFLOP, LICENCE = ("crop", 224), 3.9, 2.0, (335, 47), "MIT"

    def __init__(self, folder: Path, tokenizer: Path, device, dtype):
        from transformers import AutoTokenizer, CLIPModel
        model = pretrained(folder, CLIPModel)
        self.scale = model.logit_scale.exp().item() / 100    # in bfloat16 it would be 1 % too low
        self.model, self.dtype, self.device = model.to(device, dtype), dtype, device
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{tokenizer} has no tokenizer ({first_line(error)}); fetch it again")\
                from error
        words = model.config.text_config.vocab_size
        if len(self.tokenizer) != words:        # without its files transformers makes up one of 2
            raise ValueError(f"{tokenizer}: a tokenizer of {len(self.tokenizer)} tokens for a "
                             f"network of {words}; fetch it again")

    def see(self, pixels):
        """uint8 (B, 3, n, n) → (B, D) float32 of length one."""
        seen = self.model.get_image_features(normalised(pixels, self.dtype))
        return F.normalize(seen.pooler_output.float(), dim=-1)                   # (B, D)

    def judge(self, seen, prompts):
        """(B, D) of see, B prompts → (B,) float32."""
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=77,
                                return_tensors="pt").to(seen.device)             # (B, 77)
        read = self.model.get_text_features(**tokens).pooler_output.float()
        return self.scale * (seen * F.normalize(read, dim=-1)).sum(-1)           # (B,)


class SciScore(PickScore):
    """sci: as pick, with a CLIP ViT-H/14 tuned on the physics that a prompt implies.

    Li et al. 2025, arXiv 2504.13129 (Science-T2I). Not comparable with pick.
    """
    SOURCES = (("Jialuo21/SciScore", ("*.json", "*.txt", "*.safetensors")),)
    LICENCE = "see its page"

    def __init__(self, folder: Path, device, dtype):
        super().__init__(folder, folder, device, dtype)


class OpenAIClip(PickScore):
    """clip_openai: cos(E_picture, E_prompt) of OpenAI's CLIP ViT-L/14, 224 px: for evaluation, held
    out in the paper. Typically 0.15 to 0.35. Licence MIT."""
    SOURCES = (("openai/clip-vit-large-patch14", ("*.json", "*.txt", "model.safetensors")),)
    DISK, MEMORY, GFLOP = 1.7, 0.9, (162, 13)

    def __init__(self, folder: Path, device, dtype):
        super().__init__(folder, folder, device, dtype)
        self.scale = 1.0


class Aesthetic:
    """aesthetic: how much people liked pictures, 1 to 10; the prompt is not read.

    Schuhmann 2022 (LAION). OpenAI's CLIP ViT-L/14 with QuickGELU, 224 px centre crop, the projected
    embedding at unit length, then an MLP 768-1024-128-64-16-1 without activations: affine, so it is
    one vector and a bias. Typically 4 to 7; 20 to 30 where the length was forgotten. MIT, Apache.
    """
    HEAD = "sac+logos+ava1-l14-linearMSE.pth"
    SOURCES = (("openai/clip-vit-large-patch14", ("config.json", "model.safetensors")),
               ("christophschuhmann/improved-aesthetic-predictor", (HEAD,)))
    VIEW, DISK, MEMORY, GFLOP, LICENCE = ("crop", 224), 1.7, 0.6, (162, 0), "MIT, Apache 2.0"
    WIDTHS = (768, 1024, 128, 64, 16, 1)

    def __init__(self, folder: Path, head: Path, device, dtype):
        from transformers import CLIPModel
        self.model = pretrained(folder, CLIPModel)
        self.dtype, self.device = dtype, device
        activation = self.model.config.vision_config.hidden_act
        if activation != "quick_gelu":
            raise ValueError(f"{folder / 'config.json'}: OpenAI's CLIP has quick_gelu, not "
                             f"{activation}; fetch it again")
        del self.model.text_model                                    # no prompt is read
        self.model.to(device, dtype)
        self.weight, self.bias = (a.to(device) for a in self.affine(head / self.HEAD))

    def affine(self, file: Path) -> tuple:
        """The five layers as one: w (768,), b () with score = w e + b. ValueError: other layers."""
        layers = nn.ModuleDict({str(i): nn.Linear(*pair) for i, pair in zip(
            (0, 2, 4, 6, 7), zip(self.WIDTHS, self.WIDTHS[1:]))})    # 1, 3 and 5 were dropouts
        fill(layers, read_weights(file), file, "layers.{}".format)
        weight, bias = torch.eye(self.WIDTHS[0]).double(), torch.zeros(self.WIDTHS[0]).double()
        for layer in layers.double().values():
            weight, bias = layer.weight @ weight, layer(bias)
        return weight[0].detach().float(), bias[0].detach().float()

    see = PickScore.see                                                          # (B, 768)

    def judge(self, seen, prompts):
        """(B, 768) of see; prompts are not read → (B,) float32."""
        return seen @ self.weight + self.bias                                    # (B,)


class HPSv2:
    """hpsv2: cos(E_picture, E_prompt), version 2.1.

    Wu et al. 2023, arXiv 2306.09341 (Human Preference Score v2). open_clip's ViT-H-14, 224 px
    centre crop (the authors' package letterboxes), 77 tokens. Typically 0.2 to 0.3; 2.0 and 2.1 do
    not compare. Licence Apache 2.0.
    """
    FILE = "HPS_v2.1_compressed.pt"
    SOURCES = (("xswu/HPSv2", (FILE,)),)
    VIEW, DISK, MEMORY, GFLOP, LICENCE = ("crop", 224), 2.0, 2.0, (335, 47), "Apache 2.0"
    ARCHITECTURE = dict(
        embed_dim=1024,
        vision_cfg=dict(image_size=224, patch_size=14, layers=32, width=1280, head_width=80),
        text_cfg=dict(context_length=77, vocab_size=49408, width=1024, heads=16, layers=24))

    def __init__(self, folder: Path, device, dtype):
        import open_clip
        self.device = device
        self.model = open_clip.CLIP(**self.ARCHITECTURE).eval().requires_grad_(False)
        weights = read_weights(folder / self.FILE)
        if not isinstance(weights.get("state_dict"), dict):
            raise ValueError(f"{folder / self.FILE} has no state_dict; fetch it again")
        fill(self.model, weights["state_dict"], folder / self.FILE)
        self.model.to(device, dtype)
        self.tokenizer, self.dtype = open_clip.get_tokenizer("ViT-H-14"), dtype

    def see(self, pixels):
        """uint8 (B, 3, 224, 224) → (B, D) float32 of length one."""
        seen = self.model.encode_image(normalised(pixels, self.dtype)).float()   # (B, D)
        return F.normalize(seen, dim=-1)

    def judge(self, seen, prompts):
        """(B, D) of see, B prompts → (B,) float32."""
        read = self.model.encode_text(self.tokenizer(prompts).to(seen.device)).float()   # (B, D)
        return (seen * F.normalize(read, dim=-1)).sum(-1)                        # (B,)


class HPSv20(HPSv2):
    """hpsv2 of version 2.0 (--hpsv2 2.0): the paper evaluates with it."""
    FILE = "HPS_v2_compressed.pt"
    SOURCES = (("xswu/HPSv2", (FILE,)),)


class ImageReward:
    """image_reward: which picture of a prompt would people prefer? About -2.3 to 2.

    Picture: 224 x 224, short side resized, centre crop. Prompt: lower case, its first 33 word
    pieces. BERT reads the prompt and in each layer attends to BLIP's ViT-L/16 states; the head maps
    its [CLS] state h to (mlp(h) - MEAN) / STD, constants that standardise its training scores.
    Xu et al. 2023, arXiv 2304.05977. Weights Apache-2.0: 0.45 B parameters, 0.9 GB in bf16.
    """
    SOURCES = (("THUDM/ImageReward", ("ImageReward.pt",)),     # TEXT repeats its med_config.json
               ("google-bert/bert-base-uncased", ("*.txt", "*.json")))
    VIEW, DISK, MEMORY, GFLOP, LICENCE = ("crop", 224), 1.8, 0.9, (123, 15), "Apache 2.0"
    VISION = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                  intermediate_size=4096, image_size=224, patch_size=16, hidden_act="gelu",
                  layer_norm_eps=1e-6)       # BLIP's own; transformers' default is 1e-5
    TEXT = dict(vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, num_hidden_layers=12,
                num_attention_heads=12, intermediate_size=3072, max_position_embeddings=512,
                hidden_act="gelu", layer_norm_eps=1e-12, is_decoder=True)    # cross-attention
    LENGTH = 35                              # tokens, with [CLS] and [SEP]
    MEAN, STD = 0.16717362830052426, 1.0333394966054072
    NAMES = (("vision.", "blip.visual_encoder."), ("embeddings.class_embedding", "cls_token"),
             ("embeddings.position_embedding", "pos_embed"), ("post_layernorm", "norm"),
             ("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers.", "blocks."),
             ("self_attn.projection", "attn.proj"), ("self_attn.", "attn."), ("layer_norm", "norm"))

    def __init__(self, folder: Path, tokenizer: Path, device, dtype):
        """ValueError, naming file and tensor: the checkpoint is not exactly this network's."""
        from transformers import (BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig,
                                  BlipVisionModel)
        path, self.device, self.dtype = folder / "ImageReward.pt", device, dtype
        if not any((tokenizer / file).exists() for file in ("vocab.txt", "tokenizer.json")):
            raise ValueError(f"{tokenizer} has no vocab.txt and no tokenizer.json; fetch it")
        self.tokenizer = BertTokenizer.from_pretrained(tokenizer, local_files_only=True)
        with torch.device("meta"):
            model = nn.ModuleDict({
                "vision": BlipVisionModel(BlipVisionConfig(**self.VISION)),
                "text": BlipTextModel(BlipTextConfig(**self.TEXT), add_pooling_layer=False),
                "mlp": nn.Sequential(   # affine: dropout, and no activation, between the maps
                    nn.Linear(self.TEXT["hidden_size"], 1024), nn.Dropout(), nn.Linear(1024, 128),
                    nn.Dropout(), nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16),
                    nn.Linear(16, 1))})
        tensors = read_weights(path)
        unused = ("blip.vision_proj.", "blip.text_proj.",          # of BLIP's contrastive loss
                  "blip.text_encoder.embeddings.position_ids")     # 0 to 511
        fill(model, {key: x for key, x in tensors.items() if not key.startswith(unused)}, path,
             self.theirs)
        self.vision = model["vision"].to(device, dtype)
        self.text = model["text"].to(device, dtype)
        self.mlp = model["mlp"].to(device, torch.float32)

    def theirs(self, name: str) -> str:
        """Our name of a tensor → its key in ImageReward.pt."""
        if name.startswith("vision."):
            for ours, key in self.NAMES:
                name = name.replace(ours, key)
        return re.sub("^text[.]", "blip.text_encoder.", re.sub("^mlp[.]", "mlp.layers.", name))

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures → the states of [CLS] and 196 patches (B, 197, D)."""
        return self.vision(normalised(pixels, self.dtype)).last_hidden_state     # (B, 197, D)

    def judge(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The states of B pictures, a prompt for each → (B,) float32."""
        assert len(seen) == len(prompts), (len(seen), len(prompts))
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True,
                                max_length=self.LENGTH, return_tensors="pt").to(self.device)
        h = self.text(tokens.input_ids, tokens.attention_mask,
                      encoder_hidden_states=seen).last_hidden_state[:, 0]           # (B, 768)
        return (self.mlp(h.float())[:, 0] - self.MEAN) / self.STD                   # (B,)


# Our module names → names in model.safetensors. q, k and v of the text tower share one Wqkv.
JINA_VISION = {
    "attn.q_proj.bias": "attn.q_bias", "attn.v_proj.bias": "attn.v_bias",
    "attn.norm.": "attn.inner_attn_ln.", "mlp.norm.": "mlp.ffn_ln.",
    "mlp.fc1_g.": "mlp.w1.", "mlp.fc1_x.": "mlp.w2.", "mlp.fc2.": "mlp.w3.",
}
JINA_TEXT = {
    "embeddings.LayerNorm.": "emb_ln.", "layers.": "encoder.layers.",
    "self_attn.q_proj.": "mixer.Wqkv.", "self_attn.k_proj.": "mixer.Wqkv.",
    "self_attn.v_proj.": "mixer.Wqkv.", "self_attn.o_proj.": "mixer.out_proj.",
    "post_attention_layernorm.": "norm1.", "post_mlp_layernorm.": "norm2.",
}


def fill_jina(image: nn.Module, text: nn.Module, path: Path, config: dict, device, dtype) -> None:
    """Fill both towers of jina-clip-v2, strictly; the text's with the adapter of the default task
    merged into its weights. ValueError, naming file and tensor."""
    file, used, lora = read_weights(path), set(), config["hf_model_config_kwargs"]
    tasks, rank = lora["lora_adaptations"], lora["lora_rank"]
    task, scale = tasks.index(config["default_lora_task"]), lora["lora_alpha"] / rank

    def take(name: str, *shape: int) -> torch.Tensor:
        """One tensor of the file, in float32."""
        if name not in file:
            raise ValueError(f"{path}: tensor {name} is missing; fetch it again")
        if file[name].shape != shape:
            raise ValueError(f"{path}: tensor {name} has shape {tuple(file[name].shape)}, not "
                             f"{shape}; fetch it again")
        used.add(name)
        return file[name].float()

    def adapted(name: str, n: int, m: int) -> torch.Tensor:
        """(n, m) weight of a Linear, W + scale BA, or of an Embedding, W + scale AB."""
        stem = name.removesuffix("weight") + "parametrizations.weight."
        left, right = "AB" if ".embeddings." in name else "BA"
        a = take(f"{stem}0.lora_{left}", len(tasks), n, rank)[task]    # (n, rank)
        b = take(f"{stem}0.lora_{right}", len(tasks), rank, m)[task]   # (rank, m)
        return take(stem + "original", n, m) + scale * (a @ b)         # (n, m)

    take("logit_scale")          # the temperature of the training loss; a cosine needs none
    # Parameters alone change type: in bf16 the rotary tables (buffers) would be too coarse.
    for name, parameter in image.named_parameters():
        for ours, theirs in JINA_VISION.items():
            name = name.replace(ours, theirs)
        value = take("vision_model." + name, *parameter.shape)
        parameter.data = value.to(device, dtype)
    for name, parameter in text.named_parameters():
        third = {"q_proj": 0, "k_proj": 1, "v_proj": 2}.get(name.split(".")[-2])
        thirds = 1 if third is None else 3
        for ours, theirs in JINA_TEXT.items():
            name = name.replace(ours, theirs)
        read = adapted if parameter.ndim == 2 else take    # Linear and Embedding have adapters
        value = read("text_model.transformer.roberta." + name,
                     thirds * parameter.shape[0], *parameter.shape[1:])
        parameter.data = value.chunk(thirds)[third or 0].to(device, dtype)
    if extra := sorted(file.keys() - used):
        raise ValueError(f"{path} has {len(extra)} unexpected tensor(s), first {extra[0]}")


class JinaCLIP:
    """clip: cos(E_picture, E_prompt) of jina-clip-v2, 1024 numbers each. Typically 0.2 to 0.55.

    Picture: 512 x 512 centre crop, EVA02-L/14, its class token. Prompt: as it is, XLM-R with rotary
    positions and the LoRA `retrieval.query`, which the reference never switches off, the mean over
    the tokens. Koukounas et al. 2024, arXiv 2412.08802. Licence CC BY-NC 4.0: not for commerce.
    0.86 B parameters, 1.7 GB in bf16, 3.5 GB in fp32 and while loading.
    """
    SOURCES = (("jinaai/jina-clip-v2", ("config.json", "model.safetensors", "tokenizer.json")),)
    VIEW, DISK, MEMORY, GFLOP, LICENCE = ("crop", 512), 1.7, 1.7, (950, 47), "CC BY-NC 4.0"
    # The repository's config.json leaves the text tower's sizes to jinaai/jina-embeddings-v3.
    TEXT = dict(vocab_size=250002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                intermediate_size=4096, layer_norm_eps=1e-5, pad_token_id=1,
                rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    TOKENS = 512            # where the reference cuts by default; the model would take 8192

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        """ValueError on any missing, unexpected or misshapen tensor, with its name in the file."""
        import timm
        from tokenizers import Tokenizer
        from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model
        self.device, self.dtype = device, dtype
        config = json.loads((folder / "config.json").read_text())
        v = config["vision_config"]
        with torch.device(device):
            self.image = timm.create_model(
                "eva02_large_patch14_clip_224", num_classes=0, img_size=v["image_size"],
                embed_dim=v["width"], depth=v["layers"], num_heads=v["width"] // v["head_width"],
                patch_size=v["patch_size"], mlp_ratio=v["mlp_ratio"]).eval()
            self.text = JinaEmbeddingsV3Model(
                JinaEmbeddingsV3Config(**self.TEXT), add_pooling_layer=False).eval()
        fill_jina(self.image, self.text, folder / "model.safetensors", config["text_config"],
                  device, dtype)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The file asks to cut and pad to 77; the reference overrides that as well.
        self.tokenizer.enable_truncation(self.TOKENS)
        self.tokenizer.enable_padding(pad_id=self.TEXT["pad_token_id"], pad_token="<pad>")

    def see(self, pixels):
        """Pictures → (B, D) float32 of length one."""
        return F.normalize(self.image(normalised(pixels, self.dtype)).float(), dim=-1)   # (B, D)

    def judge(self, seen, prompts):
        """(B, D) of `see`, B prompts → (B,) float32 cosine."""
        lines = self.tokenizer.encode_batch(list(prompts))
        ids, mask = (torch.tensor([getattr(line, part) for line in lines], device=self.device)
                     for part in ("ids", "attention_mask"))          # (B, L) each
        x = self.text(ids, attention_mask=mask).last_hidden_state    # (B, L, D)
        x = (x.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, D)
        return (seen * F.normalize(x, dim=-1)).sum(-1)               # (B,)


def clean(prompt: str) -> str:
    """A caption without code fences, backticks and <tags>, which T5 could take for its own tokens.

    A tag leaves a space, or else <<pad>pad> would become <pad>. A caption without any stays as it
    is, spaces included: t2v-metrics, which cleans nothing, gives it the same score.
    """
    rest = re.sub(r"</?[A-Za-z][^<>]*>", " ", re.sub(r"```\w*\s*\n|`", "", prompt))
    return prompt if rest == prompt else " ".join(rest.split())


def load_flan(folder: Path, tower: Path, device, dtype) -> tuple:
    """CLIP-FlanT5's language model, projector and picture tower, strictly. ValueError, naming file
    and tensor: the checkpoint is not exactly this network's."""
    from transformers import (CLIPVisionConfig, CLIPVisionModel, T5Config,
                              T5ForConditionalGeneration)
    config = json.loads((folder / "config.json").read_text())
    if config.get("tie_word_embeddings") is not False:
        raise ValueError(f"{folder / 'config.json'}: tie_word_embeddings is not false, so this "
                         f"is no Flan-T5")
    vision = CLIPVisionConfig.from_pretrained(tower, local_files_only=True)
    with torch.device("meta"):
        picture = CLIPVisionModel(vision)
        model = nn.ModuleDict({
            "t5": T5ForConditionalGeneration(T5Config.from_dict(config)),
            "mm_projector": nn.Sequential(nn.Linear(vision.hidden_size, config["d_model"]),
                                          nn.GELU(),
                                          nn.Linear(config["d_model"], config["d_model"]))})
    path, tensors = read_folder(folder, device, dtype)
    for copy in ("embed_tokens", "encoder.embed_tokens", "decoder.embed_tokens"):
        table = tensors.pop(f"{copy}.weight", None)
        if table is not None and not torch.equal(table, tensors.setdefault("shared.weight",
                                                                           table)):
            raise ValueError(f"{path}: tensor {copy}.weight is not shared.weight")
    # Its training froze the tower. Where the checkpoint has a copy, that is the one it uses.
    own = {key.removeprefix("vision_tower.vision_tower."): tensors.pop(key)
           for key in list(tensors) if key.startswith("vision_tower.vision_tower.")}
    fill(model, tensors, path, lambda name: "shared.weight" if "embed_tokens" in name else
         name.removeprefix("t5."))
    model["t5"].lm_head.float()                  # in bf16 a logit of 10 has steps of 1/16
    path, tensors = (path, own) if own else read_folder(tower, device, dtype)
    unused = ("text_model.", "text_projection.", "visual_projection.", "logit_scale",
              "vision_model.embeddings.position_ids")
    fill(picture, {key: x for key, x in tensors.items() if not key.startswith(unused)},
         path, "vision_model.{}".format)
    return model["t5"], model["mm_projector"], picture.to(device)


class CLIPFlanT5:
    """vqa: does the picture show what the prompt says? VQAScore, 0 to 1.

    Picture: padded to a square with (122, 116, 104), 336 x 336. Prompt: any length. Flan-T5 reads
    SYSTEM, 576 image tokens and QUESTION, and answers; score = sqrt(P(Yes) P(</s> | Yes)), that is
    exp(-mean cross-entropy). Image tokens: states of CLIP ViT-L/14 before its last layer, without
    [CLS], through two linear maps. Lin et al. 2024, arXiv 2404.01291, and its package t2v-metrics.
    Weights Apache-2.0 (CLIP: MIT), 11.5 B parameters, 23 GB in bf16; -xl has 3.2 B, 6.3 GB.
    """
    SOURCES = (("zhiqiulin/clip-flant5-xxl", ("config.json", "*.index.json", "*.bin")),
               ("openai/clip-vit-large-patch14-336", ("config.json", "pytorch_model.bin")),
               ("google/flan-t5-xxl", ("tokenizer.json", "tokenizer_config.json")))
    VIEW, DISK, MEMORY, GFLOP, LICENCE = ("pad", 336), 46.7, 23.2, (406, 7950), "Apache 2.0, MIT"
    SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The "
              "assistant gives helpful, detailed, and polite answers to the user's questions. "
              "USER: ")
    QUESTION = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '
    ANSWER = ["▁Yes", "</s>"]
    LENGTH = 2048                            # tokens of text, plus one; the end of more is cut off
    LAYER = -2                               # of CLIP's hidden states

    def __init__(self, folder: Path, tower: Path, tokenizer: Path, device, dtype):
        """ValueError, naming file and tensor: the checkpoint is not exactly this network's."""
        from transformers import T5Tokenizer
        if dtype == torch.float16:
            raise ValueError("T5 overflows in float16; use bfloat16 or float32")
        self.device, self.dtype = device, dtype
        self.tokenizer = T5Tokenizer.from_pretrained(tokenizer, local_files_only=True)
        self.answer = self.tokenizer.convert_tokens_to_ids(self.ANSWER)
        self.t5, self.projector, self.tower = load_flan(folder, tower, device, dtype)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, 336, 336), padded and resized → image tokens (B, 576, d_model)."""
        x = normalised(pixels, self.dtype)                                     # (B, 3, 336, 336)
        states = self.tower(x, output_hidden_states=True).hidden_states[self.LAYER]  # (B, 577, D)
        return self.projector(states[:, 1:])                                   # (B, 576, d_model)

    def judge(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The image tokens of B pictures, a prompt for each → (B,) float32."""
        assert len(seen) == len(prompts), (len(seen), len(prompts))
        B, embed = len(prompts), self.t5.shared
        # each piece is tokenized on its own, so both end with </s>: T5 was tuned like this
        before = self.tokenizer([self.SYSTEM] * B, return_tensors="pt").to(self.device)
        after = self.tokenizer([self.QUESTION.format(clean(prompt)) for prompt in prompts],
                               padding=True, padding_side="right", return_tensors="pt")
        room = self.LENGTH - before.input_ids.shape[1] - 1
        ids = after.input_ids[:, :room].to(self.device)                        # (B, L')
        x = torch.cat([embed(before.input_ids), seen, embed(ids)], 1)          # (B, L, d_model)
        mask = torch.cat([before.attention_mask, torch.ones_like(seen[..., 0], dtype=torch.long),
                          after.attention_mask[:, :room].to(self.device)], 1)  # (B, L)
        states = self.t5.encoder(inputs_embeds=x, attention_mask=mask)[0]      # (B, L, d_model)
        start = torch.tensor([[self.t5.config.decoder_start_token_id, self.answer[0]]] * B,
                             device=self.device)                               # (B, 2)
        h = self.t5.decoder(start, encoder_hidden_states=states, encoder_attention_mask=mask,
                            use_cache=False)[0]                                # (B, 2, d_model)
        # T5 has 28 more rows than its tokenizer has tokens: t2v-metrics cuts them off too
        logits = self.t5.lm_head(h.float())[..., :len(self.tokenizer)]         # (B, 2, vocabulary)
        yes = logits.log_softmax(-1)[:, [0, 1], self.answer]                   # (B, 2)
        return yes.mean(1).exp()                                               # (B,)


class CLIPFlanT5XL(CLIPFlanT5):
    """vqa with a language model of 3 instead of 11 billion parameters (--vqa xl)."""
    SOURCES = (("zhiqiulin/clip-flant5-xl", CLIPFlanT5.SOURCES[0][1]), *CLIPFlanT5.SOURCES[1:])
    DISK, MEMORY, GFLOP = 13.0, 6.5, (389, 2040)


NETWORKS = {"aesthetic": Aesthetic, "hpsv2": HPSv2, "image_reward": ImageReward, "pick": PickScore,
            "vqa": CLIPFlanT5, "clip": JinaCLIP, "sci": SciScore, "clip_openai": OpenAIClip}
PAPER = tuple(NETWORKS)[:7]


# ---- where their files are -----------------------------------------------------------------------

HEAD_URL = "https://github.com/{}/raw/main/{}"                    # the one file that no hub serves


def find(name: str, models: str | None) -> tuple[Path, ...]:
    """The folders of a network's files. FileNotFoundError: one is missing."""
    return tuple(fetch(repository, patterns, models, f"{name} needs", NETWORKS[name].DISK)
                 for repository, patterns in NETWORKS[name].SOURCES)


def fetch(repository: str, patterns: Sequence[str], models: str | None, why: str,
          disk: float) -> Path:
    """The folder of a repository's files: below `models`, as MODELS/OWNER/NAME, or from the hub.

    FileNotFoundError says which file of which repository is missing, and how many GB it has."""
    import huggingface_hub                       # here: training needs none of this
    folder = Path(models or torch.hub.get_dir(), repository)
    needed = f"{why} {', '.join(patterns)} of {repository} ({disk:g} GB)"
    if not models and repository == Aesthetic.SOURCES[1][0]:
        fetch_head(folder / Aesthetic.HEAD, repository, needed)
    elif not models:
        try:
            folder = Path(huggingface_hub.snapshot_download(repository,
                                                            allow_patterns=list(patterns)))
        except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
            raise FileNotFoundError(f"{needed}, which the hub does not give "
                                    f"({first_line(error)}); pass --models") from None
    missing = [file for file in patterns if "*" not in file and not (folder / file).exists()]
    if missing or not any(any(folder.glob(pattern)) for pattern in patterns):
        raise FileNotFoundError(f"{needed}, and {folder} has no {(missing or patterns)[0]}")
    return folder


def fetch_head(file: Path, repository: str, needed: str) -> None:
    """Download the head of aesthetic from its page, whole or not at all."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(HEAD_URL.format(repository, quote(file.name)), str(file),
                                       progress=False)
    except OSError as error:
        raise FileNotFoundError(f"{needed}, which its page does not give ({first_line(error)}); "
                                "pass --models") from None


def revision(folder: Path, patterns: Sequence[str]) -> str:
    """What tells checkpoints apart: 12 hex digits of names, sizes and ends of the files that a
    network reads."""
    digest = hashlib.sha256()
    for file in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        with open(file, "rb") as content:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + content.read(2 ** 16))
            content.seek(max(0, file.stat().st_size - 2 ** 16))
            digest.update(content.read())
    return digest.hexdigest()[:12]


# ---- which rewards -------------------------------------------------------------------------------

REWARDS = (*NETWORKS, *ANALYTIC)                                  # the order of the columns
GIVEN = "key.json"                                               # the version of scores taken there


def check_names(names: Sequence[str], valid: Sequence[str] = REWARDS) -> None:
    """ValueError, with the valid names, if one is unknown or is there twice."""
    for name in names:
        if name not in valid:
            raise ValueError(f"unknown reward {name!r}; valid: {', '.join(valid)}")
    if len(set(names)) < len(names):
        raise ValueError(f"a reward is named twice: {', '.join(names)}")


def foreign_caption(captions: Iterable[str | tuple[str, ...]]) -> str | None:
    """A caption that alignment cannot read, if more than 1 % are such; else None."""
    texts = [text for entry in captions for text in ((entry,) if isinstance(entry, str) else entry)]
    foreign = 0
    for text in texts:
        try:
            shapes.parse(text)
        except ValueError:
            foreign += 1
            if foreign > MAX_UNREADABLE * len(texts):
                return text
    return None


def default_rewards(captions: Iterable[str | tuple[str, ...]]) -> tuple[str, ...]:
    """The analytic rewards that suit these captions, or tuples of captions (Pictures.captions)."""
    foreign = foreign_caption(captions) is not None
    return tuple(name for name in ANALYTIC if name != "alignment" or not foreign)


def choose_rewards(text: str, captions: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """--rewards → names in the order of REWARDS. ValueError: unknown, or not for this data."""
    if text in ("all", "analytic"):
        return PAPER if text == "all" else default_rewards(captions)
    asked = [name.strip() for name in text.split(",")]
    check_names(asked)
    if "alignment" in asked and (caption := foreign_caption(captions)) is not None:
        raise ValueError(f"alignment reads the captions of shapes.py alone, and this data has "
                         f"others, such as {caption[:60]!r}; leave alignment out of --rewards")
    return tuple(name for name in REWARDS if name in asked)


# ---- the sidecar of a shard ----------------------------------------------------------------------

def sidecar(shard: Shard) -> Path:
    """Where the scores of a shard are."""
    return shard.folder / f"{shard.name}{ENDING}"


def read_sidecar(path: Path) -> tuple[dict, dict[str, dict]]:
    """Its header, and its lines by key. ValueError that names file and key: it is damaged."""
    redo = "remove the file and run python rewards.py again"
    header, lines, key = None, {}, None
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if number == 1:
            header = line
            if not is_header(header) or path.name != f"{header['shard']}{ENDING}":
                raise ValueError(f"{path}: line 1 is not this shard's header in format 1; {redo}")
            for name in header["rewards"]:
                if name not in REWARDS:
                    raise ValueError(f"{path}: unknown reward {name!r} in the header; valid: "
                                     f"{', '.join(REWARDS)}; {redo}")
            continue
        if not isinstance(line, dict) or not isinstance(line.get("key"), str):
            raise ValueError(f"{path}: line {number}, after key {key!r}, is no JSON object with a "
                             f"key; {redo}")
        key = line["key"]
        if key in lines:
            raise ValueError(f"{path}: key {key!r} is there twice; {redo}")
        wrong, names = None, list(header["rewards"])
        if isinstance(line.get("error"), str):               # then some scores, or all, are missing
            names = [name for name in names if name in line.get("scores", ())]
        if "scores" in line or not isinstance(line.get("error"), str):
            wrong = wrong_part(line, names)
        if wrong:
            raise ValueError(f"{path}: key {key!r} has {wrong}; {redo}")
        lines[key] = line
    if header is None:
        raise ValueError(f"{path} is empty; {redo}")
    return header, lines


def is_header(line) -> bool:
    """Is this first line what write_sidecar writes?"""
    return (isinstance(line, dict) and line.get("format") == 1 and "shard" in line
            and isinstance(line.get("rewards"), dict)
            and isinstance(line.get("size", ""), int | None))


def wrong_part(line: dict, names: Sequence[str]) -> str | None:
    """What is wrong with a sample's line, if anything: each reward needs a number per caption."""
    captions, scores = line.get("captions"), line.get("scores")
    if not isinstance(captions, list) or not isinstance(scores, dict):
        return "neither captions and scores nor an error"
    for name in names:
        values = scores.get(name)
        if not isinstance(values, list) or len(values) != len(captions):
            return f"not one {name} score per caption"
        for value in values:
            if type(value) not in (float, int) or not abs(value) < 1e300:           # nor NaN
                return f"the {name} score {value!r}, which is not a finite number"
    return None


def write_sidecar(path: Path, shard: str, rewards: dict, size: int | None, lines: list) -> None:
    """Write the sidecar whole or not at all: after a kill it is the old one or the new one.

    rewards: name → what identifies its scorer; size: of the pictures of analytic rewards."""
    versions = {"torch": str(torch.__version__), "numpy": np.__version__, "pillow": PIL.__version__}
    if not rewards.keys() <= set(ANALYTIC):
        libraries = ("transformers", "open_clip_torch", "timm")
        versions |= {name: metadata.version(name) for name in libraries}
    header = {"format": 1, "shard": shard, "rewards": rewards, "size": size, "versions": versions}
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in (header, *lines))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def scored_names(pictures: Pictures) -> tuple[str, ...]:
    """The rewards that the first shard has scores of. FileNotFoundError: it was never scored;
    ValueError: as pictures of another size."""
    path = sidecar(pictures.shards[0])
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run python rewards.py "
                                    f"{pictures.path} --size {pictures.size}")
    header, _ = read_sidecar(path)
    check_size(path, header, pictures, f"run python rewards.py {pictures.path} --size "
                                       f"{pictures.size}")
    return tuple(name for name in REWARDS if name in header["rewards"])


def check_size(path: Path, header: dict, pictures: Pictures, redo: str) -> None:
    """ValueError: a sidecar's analytic scores are of pictures of another size."""
    if set(header["rewards"]) & set(ANALYTIC) and header["size"] != pictures.size:
        raise ValueError(f"{path} has the scores of pictures of {header['size']} pixels, not "
                         f"{pictures.size}; pass --size {header['size']} or {redo}")


def read_scores(pictures: Pictures, names: Sequence[str]) -> tuple[list[int], list[np.ndarray]]:
    """The scores of a dataset: its scored rows, and for each float64 (captions, R), all finite.

    Columns are as names. Samples whose scoring failed are left out (--retry tries them again).
    FileNotFoundError or ValueError, naming file and key: a shard, a reward or a sample was never
    scored, or was with other captions, another size or another scorer, or a sidecar is damaged.
    """
    check_names(names)
    pieces, raws, scorers = {}, [None] * len(pictures), {}
    for shard in pictures.shards:            # Pictures.select may have cut a shard into many
        pieces.setdefault(sidecar(shard), []).append(shard)
    redo = (f"run python rewards.py {pictures.path} --size {pictures.size} --rewards "
            f"{','.join(names)}")
    for path, shards in pieces.items():
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; {redo}")
        header, lines = read_sidecar(path)
        if set(names) & set(ANALYTIC):
            check_size(path, header, pictures, redo)
        for name in names:
            found = header["rewards"].get(name)
            wanted = SCORERS[name][1] if name in SCORERS else scorers.setdefault(name, found)
            if found is None or found != wanted:
                raise ValueError(f"{path} has no {name} scores of version {wanted or 'any'}; "
                                 f"{redo}")
        for row in (row for shard in shards for row in range(shard.start, shard.stop)):
            key, captions = pictures.keys[row], pictures.captions[row]
            if key not in lines:
                raise ValueError(f"{path}: key {key!r} has no scores; {redo}")
            if "scores" not in lines[key]:
                continue
            if missing := [name for name in names if name not in lines[key]["scores"]]:
                raise ValueError(f"{path}: key {key!r} is not scored by {', '.join(missing)}; "
                                 f"{redo}")
            if lines[key]["captions"] != hashes(captions):
                raise ValueError(f"{path}: the captions of key {key!r} have changed since they "
                                 f"were scored; {redo}")
            columns = [lines[key]["scores"][name] for name in names]
            raws[row] = np.array(columns, np.float64).reshape(len(names), len(captions)).T
    rows = [row for row, raw in enumerate(raws) if raw is not None]
    return rows, [raws[row] for row in rows]


# ---- pictures as the networks see them -----------------------------------------------------------

PAD = (122, 116, 104)                                            # CLIP's mean colour, as vqa has it


def views(data: bytes, wanted: Iterable[tuple]) -> dict:
    """A picture in several cuts: {(kind, n): uint8 (3, n, n)}, as the models were trained.

    crop: the short side becomes n (PIL bicubic), then the centre; pad: a centred square on CLIP's
    mean colour, then n x n. As everywhere here, transparency lies on white, and EXIF turns.
    ValueError: so long and thin that a cut would take more than 4 * MAX_PIXELS on the way.
    """
    image, found = to_rgb(decode(data)[0]), {}
    W, H = image.size
    for kind, n in wanted:
        on_the_way = n * n * max(W, H) // min(W, H) if kind == "crop" else max(W, H) ** 2
        if on_the_way > 4 * MAX_PIXELS:
            raise ValueError(f"{W} x {H} pixels are too long and thin to be cut to {n} x {n}")
        if kind == "crop":
            w, h = (n, int(n * H / W)) if W <= H else (int(n * W / H), n)
            cut = image if (w, h) == image.size else image.resize((w, h), Image.Resampling.BICUBIC)
            left, top = round((w - n) / 2), round((h - n) / 2)
            cut = cut.crop((left, top, left + n, top + n))
        else:
            side = max(W, H)
            cut = image if W == H else Image.new("RGB", (side, side), PAD)
            if W != H:
                cut.paste(image, ((side - W) // 2, (side - H) // 2))
            cut = cut.resize((n, n), Image.Resampling.BICUBIC)
        found[kind, n] = torch.from_numpy(np.asarray(cut).transpose(2, 0, 1).copy())
    return found


class Views(torch.utils.data.Dataset):
    """Lists of rows → their views, for scored_parts.

    The view ("square", size) is the picture that training sees, which the analytic rewards score;
    all others come from one more decoding."""

    def __init__(self, pictures: Pictures, wanted: Iterable[tuple]):
        self.pictures, self.wanted = pictures, set(wanted)

    def of_row(self, row: int) -> dict:
        """The views of one row. ValueError: it cannot be read."""
        own = ("square", self.pictures.size)
        found = {own: self.pictures.picture(row)} if own in self.wanted else {}
        others = sorted(self.wanted - {own})
        return found | (self.pictures.cut(row, lambda data: views(data, others)) if others else {})

    def __getitem__(self, rows: Sequence[int]) -> tuple[dict, list, dict]:
        """Rows → why some have none, the other rows, and {view: uint8 (n, 3, S, S)} of these: few
        large tensors, as each that a worker process hands over takes a file descriptor."""
        reasons, found = {}, {}
        for row in rows:
            try:
                found[row] = self.of_row(row)
            except ValueError as error:
                reasons[row] = str(error)
        return reasons, list(found), {view: torch.stack([cut[view] for cut in found.values()])
                                      for view in self.wanted if found}


# ---- scoring -------------------------------------------------------------------------------------

@dataclass
class Group:
    """Rewards that are in memory together; networks are loaded when the first picture needs them.

    versions: name → what identifies its scorer; folders: name → where its files are."""
    versions: dict[str, str]
    folders: dict[str, tuple] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")
    networks: dict = field(default_factory=dict)

    def load(self) -> None:
        """Load what is not there yet: bf16 on a GPU, fp32 else. ValueError: a damaged file."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        for name, folders in self.folders.items():
            if name in self.networks:
                continue
            try:
                self.networks[name] = NETWORKS[name](*folders, self.device, dtype)
            except (LookupError, TypeError, json.JSONDecodeError) as error:    # of a config.json
                raise ValueError(f"{name}: {folders[0]} has another configuration "
                                 f"({type(error).__name__}: {error}); fetch it again") from error

    def views(self, names: Sequence[str], size: int) -> set:
        """How these rewards want the picture."""
        return {NETWORKS[name].VIEW if name in self.folders else ("square", size) for name in names}


def analytic(names: Sequence[str]) -> Group:
    """The group of rewards without networks."""
    return Group({name: SCORERS[name][1] for name in names})


def groups_of(available: dict[str, tuple], memory_gb: float, device: torch.device) -> list[Group]:
    """Rewards, with the folders of their files, in groups whose networks fit into memory_gb: one
    pass over the pictures for each. ValueError: one alone needs more."""
    found = [analytic([name for name in available if name in SCORERS])]
    room, scale = 0.0, 1 if device.type == "cuda" else 2                        # MEMORY is of bf16
    networks = [name for name in available if name in NETWORKS]
    for name in sorted(networks, key=lambda name: NETWORKS[name].MEMORY):
        needs, folders = scale * NETWORKS[name].MEMORY, available[name]
        if needs > memory_gb:
            raise ValueError(f"{name} needs {needs:g} GB: pass --memory-gb {needs:g} or more, or "
                             "leave it out of --rewards")
        if needs > room:
            found.append(Group({}, device=device))
            room = memory_gb
        of = zip(folders, NETWORKS[name].SOURCES)
        revisions = "+".join(revision(folder, patterns) for folder, (_, patterns) in of)
        found[-1].versions[name] = f"{NETWORKS[name].__name__} {revisions}"
        found[-1].folders[name] = folders
        room -= needs
    return [group for group in found if group.versions]


@torch.no_grad()
def network_scores(network, pixels: torch.Tensor, owners: Sequence[int], prompts: Sequence[str],
                   batch: int) -> list[float]:
    """Scores of pairs: pixels (n, 3, S, S), owners the picture of each prompt. A picture is looked
    at once, however many captions it has; captions of like length go together (less padding)."""
    seen = torch.cat([network.see(part.to(network.device)) for part in pixels.split(batch)])
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    values = [0.0] * len(prompts)
    for first in range(0, len(order), batch):
        part = order[first:first + batch]
        scores = network.judge(seen[[owners[i] for i in part]], [prompts[i] for i in part])
        for i, value in zip(part, scores.tolist()):
            values[i] = value
    return values


def score_images(pictures: Pictures, images: dict, names: Sequence[str], group: Group,
                 batch: int) -> dict:
    """Rewards of some rows, given their views: {row: {name: [a score per caption]}}."""
    rows, scores = list(images), {row: {} for row in images}
    owners = [j for j, row in enumerate(rows) for _ in pictures.captions[row]]
    prompts = [caption for row in rows for caption in pictures.captions[row]]
    for name in names:
        [view] = group.views([name], pictures.size)
        pixels = torch.stack([images[row][view] for row in rows])                # (n, 3, S, S)
        values = (network_scores(group.networks[name], pixels, owners, prompts, batch)
                  if name in group.networks else
                  score(name, pixels[owners], prompts).tolist())
        for owner, value in zip(owners, values):
            if not math.isfinite(value):
                raise ValueError(f"{name} came out as {value}")
            scores[rows[owner]].setdefault(name, []).append(value)
    return scores


def score_rows(pictures: Pictures, images: dict, names: Sequence[str], group: Group,
               batch: int) -> dict:
    """Rewards of some rows, given their views: {row: {name: [a score per caption]}, or the reason
    for having none}."""
    results = {}
    try:
        return score_images(pictures, images, names, group, batch) if images else {}
    except ValueError:                       # one sample stops its batch: find out which it is
        for row, image in images.items():
            try:
                results |= score_images(pictures, {row: image}, names, group, batch)
            except ValueError as error:
                results[row] = str(error)
    return results


def given_rows(pictures: Pictures, rows: Sequence[int], names: Sequence[str]) -> dict:
    """The scores that key.json has under the release's names (a number, or a list: one a caption):
    {row: {name: [a score per caption]}, or what is missing}."""
    results = {}
    for row in rows:
        try:
            note, results[row] = pictures.note(row), {}
            for name in names:
                there = RELEASE_REWARDS.get(name, f"{name}_score")
                values = note.get(there)
                values = values if isinstance(values, list) else [values]
                if len(values) != len(pictures.captions[row]) or not all(
                        type(value) in (int, float) and abs(value) < 1e300 for value in values):
                    raise ValueError(f"its key.json has not one finite {there} per caption")
                results[row][name] = [float(value) for value in values]
        except ValueError as error:
            results[row] = str(error)
    return results


def score_shard(pictures: Pictures, shard: Shard, group: Group, batch: int, retry: bool,
                workers: int, bar: tqdm) -> list[dict]:
    """Bring one sidecar up to date, and return its lines.

    Scores stay if scorer, captions and, for analytic rewards, size are the same; failures stay
    unless `retry`. A sample that lacks one reward has no scores at all for a reader: its vector of
    levels would have a hole. Where other networks than this group's must score it first, its line
    has an error that says so, and the scores that it has.
    """
    path, keys = sidecar(shard), pictures.keys[shard.start:shard.stop]
    header, old = read_sidecar(path) if path.exists() else ({"rewards": {}, "size": None}, {})
    given = GIVEN in group.versions.values()
    current = header["rewards"] | {name: SCORERS[name][1] for name in SCORERS} | group.versions
    own, same = group.versions.keys() & set(ANALYTIC), header["size"] in (None, pictures.size)
    kept = {name: scorer for name, scorer in header["rewards"].items()
            if scorer == current[name] and (name in NETWORKS or same or not own)}
    columns = tuple(name for name in REWARDS if name in group.versions or name in kept)
    lines, todo = {}, {}                     # row -> line; names still to score -> rows
    for row, key in enumerate(keys, shard.start):
        line = old.get(key, {})
        if kept and "error" in line and "scores" not in line and not retry:
            lines[row] = line
            continue
        lines[row] = {"key": key, "captions": hashes(pictures.captions[row]), "scores": {}}
        if line.get("captions") == lines[row]["captions"]:
            lines[row]["scores"] = {name: line["scores"][name] for name in kept
                                    if name in line["scores"]}
        missing = tuple(name for name in columns if name not in lines[row]["scores"]
                        and (name in group.versions or name in ANALYTIC and same and not given))
        if missing:
            todo.setdefault(missing, []).append(row)
    bar.update(len(keys) - sum(len(rows) for rows in todo.values()))
    for missing, rows in todo.items():
        for results in scored_parts(pictures, rows, missing, group, batch, workers):
            for row, result in results.items():
                if isinstance(result, str):
                    lines[row] = {"key": lines[row]["key"], "error": result}
                else:
                    lines[row]["scores"] |= result
            bar.update(len(results))
    for line in lines.values():
        if "scores" in line:
            line["scores"] = {name: line["scores"][name] for name in columns
                              if name in line["scores"]}
            line.pop("error", None)
            if absent := [name for name in columns if name not in line["scores"]]:
                line["error"] = f"not scored yet by {', '.join(absent)}"
    if columns and (todo or list(old) != keys or not path.exists()):   # not there: without samples
        size = pictures.size if own or same else header["size"]
        size = size if set(columns) & set(ANALYTIC) else None
        write_sidecar(path, shard.name, {name: current[name] for name in columns}, size,
                      list(lines.values()))
    return list(lines.values())


def scored_parts(pictures: Pictures, rows: list, names: Sequence[str], group: Group, batch: int,
                 workers: int):
    """Score rows in parts of a few batches, whose pictures `workers` processes read ahead."""
    parts = [rows[first:first + 2 * batch] for first in range(0, len(rows), 2 * batch)]
    if GIVEN in group.versions.values():
        yield from (given_rows(pictures, part, names) for part in parts)
        return
    group.load()
    loader = torch.utils.data.DataLoader(
        Views(pictures, group.views(names, pictures.size)), batch_size=None, sampler=parts,
        num_workers=workers,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None)
    for reasons, whole, cuts in loader:
        images = {row: {view: pixels[j] for view, pixels in cuts.items()}
                  for j, row in enumerate(whole)}
        yield reasons | score_rows(pictures, images, names, group, batch)


def score_dataset(pictures: Pictures, names: Sequence[str], batch: int = 256, retry: bool = False,
                  rank: int = 0, world: int = 1, groups: list[Group] | None = None,
                  workers: int = 0) -> dict[str, str]:
    """Score the shards of one rank, and print the table of their scores.

    groups: None for analytic rewards. Returns {"shard/key": why it has no scores}, with the samples
    that lack a picture or caption.
    """
    mine = pictures.shards if pictures.part[1] > 1 else pictures.shards[rank::world]
    names_here = {shard.name for shard in mine}
    failures = {name: reason for name, reason in pictures.unreadable.items()
                if name.split("/")[0] in names_here}
    groups, values = groups or [analytic(names)], {name: array("d") for name in names}
    total = len(groups) * sum(shard.stop - shard.start for shard in mine)
    with tqdm(total=total, desc="scoring", unit="picture", disable=rank > 0) as bar:
        for group in groups:
            for shard in mine:
                for line in score_shard(pictures, shard, group, batch, retry, workers, bar):
                    sample, scores = f"{shard.name}/{line['key']}", line.get("scores", {})
                    failures.pop(sample, None)
                    if "error" in line:
                        failures[sample] = line["error"]
                    for name in group.versions:
                        values[name].extend(scores.get(name, ()))
            group.networks.clear()                                # before the next ones are loaded
    of = f"rank {rank} of {world}: " if world > 1 else ""
    print(f"{of}{len(mine)} shards\n{'reward':14}{'n':>9}"
          + "".join(f"{column:>10}" for column in ("mean", "std", "min", "max")))
    for name, column in values.items():
        x = np.array(column if column else [math.nan])       # nothing scored: the table says nan
        print(f"{name:14}{len(column):9}{x.mean():10.4g}{x.std():10.4g}{x.min():10.4g}"
              f"{x.max():10.4g}")
    print(f"{len(failures)} failed" + " (try these again with --retry):" * bool(failures))
    for name, reason in failures.items():
        print(f"  {name}: {reason}")
    return failures


# ---- the command ---------------------------------------------------------------------------------

SPEED = 300e12                 # FLOP/s of one GPU, assumed where --dry-run estimates GPU-hours


def cost_table(names: Sequence[str], pictures: int, captions: int) -> str:
    """What scoring would take: models, sizes, licences, GPU-hours."""
    lines, hours, disk = [], 0.0, 0.0
    for name in names:
        if name not in NETWORKS:
            lines.append(f"{name:13}no network, no download")
            continue
        network = NETWORKS[name]
        picture, prompt = network.GFLOP
        took = (pictures * picture + captions * prompt) * 1e9 / SPEED / 3600
        hours, disk = hours + took, disk + network.DISK
        lines.append(f"{name:13}{' + '.join(source for source, _ in network.SOURCES)}\n{'':13}"
                     f"{network.DISK:g} GB to download, {network.MEMORY:g} GB in bf16, "
                     f"{picture:,} GFLOP a picture + {prompt:,} a caption, {took:.3g} GPU-hours; "
                     f"licence {network.LICENCE}")
    return "\n".join([*lines, f"{pictures:,} pictures with {captions:,} captions: {disk:.3g} GB to "
                      f"download, {hours:.3g} GPU-hours at an assumed {SPEED / 1e12:.0f} TFLOP/s"])


def score_pair(image: str, prompt: str, groups: list[Group], bins: str | None, side: int) -> None:
    """Print the scores of one picture with one prompt, their percentiles, and the seconds."""
    try:
        data = Path(image).read_bytes()
        cut = views(data, {NETWORKS[n].VIEW for group in groups for n in group.folders})
        cut["square", side] = torch.from_numpy(square(data, side)[0].copy())
    except BROKEN as error:
        raise ValueError(f"--image {image} cannot be read ({error})") from None
    fitted = binning.load(Path(bins)) if bins else None
    print(f"{'reward':14}{'score':>10}{'percentile':>12}{'seconds':>9}")
    for group in groups:
        group.load()
        for name in group.versions:
            began, [view] = time.time(), group.views([name], side)
            value = (network_scores(group.networks[name], cut[view][None], [0], [prompt], 1)[0]
                     if name in group.networks else
                     score(name, cut[view][None], [prompt]).item())
            place = "-"
            if fitted and name in fitted.names:
                one = fitted.select((name,))
                cuts = [one.low[0], *one.edges[0], one.high[0]]
                place = f"{100 * np.interp(value, cuts, np.linspace(0, 1, len(cuts))):.0f}"
            print(f"{name:14}{value:10.4f}{place:>12}{time.time() - began:9.2f}")
        group.networks.clear()


def read_command(argv=None) -> argparse.Namespace:
    """The flags, checked; NETWORKS takes the versions that they choose. ValueError: one is out of
    its range, or two do not go together."""
    parser = argparse.ArgumentParser(description="score every picture with its captions")
    add = parser.add_argument
    add("data", nargs="?", help="folder of tars, tar, brace range, glob or picture folder")
    add("--rewards", default="analytic", help=f"analytic: those that suit the captions (default); "
        f"all: the paper's seven; or some of {','.join(REWARDS)}")
    add("--size", type=int, default=24, help="side in pixels that analytic rewards see")
    add("--batch", type=int, help="pictures at once, in each process; default 256, networks 32")
    add("--workers", type=int, default=0, help="processes that read pictures, per rank")
    add("--retry", action="store_true", help="try samples that failed before again")
    add("--models", help="folder with OWNER/NAME/files of the hub; default: from the hub")
    add("--memory-gb", type=float, default=48.0, help="for networks, which go in groups that fit")
    add("--hpsv2", choices=("2.1", "2.0"), default="2.1", help="version of hpsv2")
    add("--vqa", choices=("xxl", "xl"), default="xxl", help="size of vqa's language model")
    add("--keep-going", action="store_true", help="leave out rewards whose files are missing")
    add("--given", action="store_true", help="take the scores that key.json has")
    add("--dry-run", action="store_true", help="say what would be loaded and done, and stop")
    add("--image", help="score this picture with --prompt, and stop")
    add("--prompt", help="of --image")
    add("--bins", help="bins.json: the percentile of --image's scores")
    args = parser.parse_args(argv)
    if (args.data is None) == (not args.image) or (args.image is None) != (args.prompt is None):
        raise ValueError("name DATA, or --image and --prompt")
    if args.batch is not None and args.batch < 1 or args.size < 3 or args.workers < 0:
        raise ValueError("--batch is at least 1, --size at least 3 and --workers at least 0")
    NETWORKS["hpsv2"] = HPSv2 if args.hpsv2 == "2.1" else HPSv20
    NETWORKS["vqa"] = CLIPFlanT5 if args.vqa == "xxl" else CLIPFlanT5XL
    return args


def available(names: Sequence[str], models: str | None, keep_going: bool) -> dict[str, tuple]:
    """The rewards whose files are there: name → their folders, () for the analytic ones.
    FileNotFoundError: one's are not, and it may not be left out."""
    found = {}
    for name in names:
        try:
            found[name] = find(name, models) if name in NETWORKS else ()
        except FileNotFoundError as error:
            if not keep_going:
                raise FileNotFoundError(f"{error}; --keep-going leaves it out") from None
            print(f"{name} is left out: {error}", file=sys.stderr)
    if not found:
        raise FileNotFoundError("no reward is left to score")
    return found


def main(argv=None) -> None:
    """The command line: score a folder, one sidecar a shard, or one picture."""
    args = read_command(argv)
    device = best_device()
    if args.image:
        names = choose_rewards(args.rewards, [args.prompt])
        if args.dry_run:
            return print(cost_table(names, 1, 1))
        found = available(names, args.models, args.keep_going)
        return score_pair(args.image, args.prompt, groups_of(found, args.memory_gb, device),
                          args.bins, args.size)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # A rank reads the headers of its own tars alone, unless captions decide what suits all.
    share = args.rewards != "analytic" and len(find_tars(args.data)) >= world
    part = (rank, world) if share else (0, 1)
    pictures = Pictures(args.data, args.size, memory_gb=0, part=part)     # each is looked at once
    samples = len(pictures) + len(pictures.unreadable)
    names = choose_rewards(args.rewards, pictures.captions)
    if args.rewards == "analytic" and "alignment" not in names and rank == 0:
        print("alignment is left out: it reads the captions of shapes.py alone")
    if args.dry_run:
        return print(cost_table(names, len(pictures), sum(map(len, pictures.captions))))
    if args.given and set(names) & set(ANALYTIC):
        raise ValueError("--given takes the scores of networks: name them, such as --rewards all")
    groups = [Group(dict.fromkeys(names, GIVEN))]
    if not args.given:
        found = available(names, args.models, args.keep_going)
        names, groups = tuple(found), groups_of(found, args.memory_gb, device)
    batch = args.batch or (256 if set(names) <= set(ANALYTIC) else 32)
    failures = score_dataset(pictures, names, batch, args.retry, rank, world, groups, args.workers)
    if len(failures) > MAX_UNREADABLE * samples * part[1] / world:
        sentence = (f"{args.data}: {len(failures)} of {samples} samples failed (the limit is "
                    f"{MAX_UNREADABLE:.0%}); repair or remove them, then pass --retry")
        if world == 1:
            raise ValueError(sentence)
        print(sentence, file=sys.stderr)     # torchrun kills all ranks when one fails: let them end


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:            # a user's mistake: one sentence, no traceback
        print(error, file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError as error:
        print(f"the GPU's memory is full ({first_line(error)}): pass a smaller --batch or "
              "--memory-gb", file=sys.stderr)
        sys.exit(2)
