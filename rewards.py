"""Rewards: score every picture with each of its captions, once, before training.

The analytic ones of shapes.py measure pixels and caption and nothing else. Seven are the paper's:
networks of 0.3 to 11 billion parameters, one class each (`--rewards all`).

`python rewards.py DATA` writes DATA/NAME.scores.safetensors beside each shard, whole or not at all:

    a float32 column (P,) a reward, in its own units: a score a pair, or NaN
    metadata: "shard", the digest of the shard that was scored, and in JSON "scorers"
        {reward: version}, "digests" {reward: 16 hex digits of its column} and "failed"
        {reward: {row: why}}, rows of samples

Columns stay while scorer and shard are the same, so the same command again continues a run that was
killed, and a reward asked for later is added. `torchrun rewards.py DATA` shares the shards.
"""
import argparse
import hashlib
import json
import os
import pickle
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import shapes
from data import (BROKEN, MAX_LEFT_OUT, MAX_PIXELS, Data, Shard, UserError, best_device, decode,
                  first_line, printable, read_json, refuse_too_many, run, to_rgb, write_whole)
from shapes import ANALYTIC


# ---- the scores of a shard -----------------------------------------------------------------------

def scores_path(shard: Shard) -> Path:
    """Where the scores of a shard are."""
    return shard.path.with_name(f"{shard.name}.scores.safetensors")


def read_header(shard: Shard, names: Sequence[str] = ()) -> dict:
    """How a shard was scored: "scorers" {name: version}, "digests" {name: hex digits of its column}
    and "failed" {name: {row: why}}. UserError, naming the file: its pictures and captions have no
    scores, or none of one of these rewards, or of other code of an analytic one."""
    path, header, wrong = scores_path(shard), header_of(shard), None
    for name in names:
        version = header["scorers"].get(name)
        if version is None or name in ANALYTIC and version != shapes.version(name):
            wrong = f"has no {name} scores" + " of this version of shapes.py" * bool(version)
    if not header["scorers"]:
        wrong = "has those of other pictures or captions" if path.exists() else "is not there"
    if wrong:
        folder, flag = shlex.quote(str(path.parent)), f" --rewards {','.join(names)}" * bool(names)
        raise UserError(f"{path} {wrong}: run python rewards.py {folder}{flag}")
    return header


def read_scores(shard: Shard, names: Sequence[str]) -> np.ndarray:
    """The scores of a shard's pairs: float32 (P, R), columns as names, NaN where there is none.
    UserError: what `read_header` raises."""
    read_header(shard, names)
    with safe_open(scores_path(shard), "np") as file:
        return np.stack([file.get_tensor(name) for name in names], 1)


def header_of(shard: Shard) -> dict:
    """What `read_header` returns; nothing in it where these pictures and captions have no scores.
    UserError: the file is damaged."""
    path, notes = scores_path(shard), {}
    if path.exists():
        try:
            with safe_open(path, "np") as file:
                notes = file.metadata()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}): remove it and run "
                            "python rewards.py again") from error
    if notes.get("shard") != shard.digest:
        notes = {}
    header = {key: json.loads(notes.get(key, "{}")) for key in ("scorers", "digests", "failed")}
    for name, rows in header["failed"].items():
        header["failed"][name] = {int(row): why for row, why in rows.items()}
    return header


def write_scores(shard: Shard, columns: dict, scorers: dict, failed: dict) -> None:
    """The file of a shard: {name: column (P,)}, {name: version}, {name: {row: why}}."""
    digests = {name: hashlib.sha256(column.tobytes()).hexdigest()[:16]
               for name, column in columns.items()}
    notes = dict(shard=shard.digest, scorers=json.dumps(scorers), digests=json.dumps(digests),
                 failed=json.dumps(failed))
    write_whole(scores_path(shard), lambda path: safetensors.numpy.save_file(columns, path, notes))


# ---- scoring -------------------------------------------------------------------------------------

@dataclass
class Scorer:
    """A reward: what identifies it, its view of a picture (of `cut`; None: the one of training),
    where the files of its network are, and the network, once it was needed."""
    name: str
    version: str
    view: tuple | None = None
    folders: tuple = ()
    device: torch.device = torch.device("cpu")
    network: object = None

    @torch.no_grad()
    def scores(self, pixels: torch.Tensor, place: np.ndarray, prompts: Sequence[str],
               batch: int) -> tuple[np.ndarray, dict]:
        """Scores of pairs: pixels uint8 (n, 3, S, S) in its view, place (b,) which of them each
        prompt has → float32 (b,), and {picture: why} where one is not finite: such a picture's are
        NaN. A network sees a picture once, and captions of like length together (less padding).
        UserError: a damaged file of the network."""
        values, order = np.full(len(prompts), np.nan, np.float32), range(len(prompts))
        if self.folders:
            if self.network is None:
                dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
                self.network = NETWORKS[self.name](self.folders, self.device, dtype)
            order = sorted(order, key=lambda i: len(prompts[i]))
            seen = torch.cat([self.network.see(part.to(self.device))
                              for part in pixels.split(batch)])
        elif self.name == "alignment":
            order = [i for i in order if reads(prompts[i])]
        for first in range(0, len(order), batch):
            part = list(order[first:first + batch])
            texts = [prompts[i] for i in part]
            if self.network:
                values[part] = self.network.judge(seen[place[part]], texts).cpu()
            else:
                values[part] = shapes.score_all((self.name,), pixels[place[part]], texts)[:, 0]
        bad = np.flatnonzero(~np.isfinite(values))
        why = {place[i]: f"{self.name} of {prompts[i][:60]!r} came out as {values[i]}" for i in bad}
        values[np.isin(place, place[bad])] = np.nan
        return values, why


def groups_of(available: dict[str, tuple], memory_gb: float, device: torch.device) -> list[list]:
    """Rewards, with the folders of their files, in lists of Scorers whose networks fit into
    memory_gb: one pass over the pictures for each. UserError: one alone needs more."""
    analytic = [Scorer(name, shapes.version(name)) for name in available if name in ANALYTIC]
    groups, room = [analytic] if analytic else [], 0.0
    networks = [name for name in available if name in NETWORKS]
    for name in sorted(networks, key=lambda name: NETWORKS[name].MEMORY):
        kind, folders = NETWORKS[name], available[name]
        needs = kind.MEMORY * (1 if device.type == "cuda" else 2)                # MEMORY is of bf16
        if needs > memory_gb:
            raise UserError(f"{name} needs {needs:g} GB: pass --memory-gb {needs:g} or more, or "
                            "leave it out of --rewards")
        if needs > room:
            groups.append([])
            room = memory_gb
        room -= needs
        files = zip(folders, (patterns for _, patterns in kind.SOURCES))
        version = f"{kind.__name__} {'+'.join(revision(*pair) for pair in files)}"
        groups[-1].append(Scorer(name, version, kind.VIEW, folders, device))
    return groups


def score_dataset(data: Data, names: Sequence[str], batch: int = 256, retry: bool = False,
                  rank: int = 0, ranks: int = 1, groups: list[list[Scorer]] | None = None,
                  workers: int = 0) -> dict[str, str]:
    """Score the shards of one rank, and print a table of their scores.

    groups: of `groups_of`; None for analytic rewards. Returns the samples that lack a score,
    {"shard/key": why}. UserError: its sources have changed, or cannot be found."""
    groups = groups or groups_of(dict.fromkeys(names, ()), 0, torch.device("cpu"))
    mine = data.shards[rank::ranks]
    parts, failures = {name: [np.zeros(0)] for name in names}, {}
    rows = len(groups) * sum(shard.rows for shard in mine)
    with tqdm(total=rows, desc="scoring", unit="picture", disable=True if rank else None) as bar:
        for group in groups:
            for shard in mine:
                columns, failed = score_shard(shard, data.size, group, batch, retry, workers, bar)
                keys = shard.keys if any(failed[scorer.name] for scorer in group) else []
                for scorer in group:
                    parts[scorer.name].append(columns[scorer.name])
                    for row, why in failed[scorer.name].items():
                        failures[f"{shard.name}/{keys[row]}"] = why
                shard.close()
            for scorer in group:
                scorer.network = None                             # before the next ones are loaded
    print(f"rank {rank} of {ranks}: " * (ranks > 1) + f"{len(mine)} shards")
    print(f"{'reward':14}{'n':>9}{'mean':>10}{'std':>10}{'min':>10}{'max':>10}")
    for name in names:
        x = np.concatenate(parts[name])                                          # float64 (P,)
        x = x[~np.isnan(x)]
        numbers = (x.mean(), x.std(), x.min(), x.max()) if len(x) else ()
        print(f"{name:14}{len(x):9}" + "".join(f"{number:10.4g}" for number in numbers))
    print(f"{len(failures)} failed" + " (try these again with --retry):" * bool(failures))
    for name, why in failures.items():
        print(printable(f"  {name}: {why}"))
    return failures


def score_shard(shard: Shard, size: int, group: list[Scorer], batch: int, retry: bool,
                workers: int, bar: tqdm) -> tuple[dict, dict]:
    """Bring the scores of a shard up to date: {name: column (P,)}, {name: {row: why it failed}}. Of
    the same pictures and captions all columns stay but those of another scorer, failures in them
    too unless `retry`; so do the columns of other rewards, also of names unknown here."""
    header, columns, todo = header_of(shard), {}, {}
    scorers, failed = header["scorers"], header["failed"]
    if scorers:
        columns = safetensors.numpy.load_file(scores_path(shard))
    for scorer in group:
        name = scorer.name
        if scorers.get(name) != scorer.version:
            todo.setdefault(range(shard.rows), []).append(scorer)
            columns[name], failed[name] = np.full(shard.pairs, np.nan, np.float32), {}
            scorers[name] = scorer.version
        elif retry and failed[name]:
            todo.setdefault(tuple(failed[name]), []).append(scorer)
            failed[name] = {}
    bar.update(shard.rows - max(map(len, todo), default=0))
    captions, owners = shard.captions, shard.owners
    fork = "fork" if workers and sys.platform == "linux" else None
    for rows, some in todo.items():                             # rewards that need the same rows
        read = partial(read_views, shard, size, {scorer.view for scorer in some})
        for part in DataLoader(rows, 2 * batch, num_workers=workers, collate_fn=read,
                               multiprocessing_context=fork):
            if isinstance(part, UserError):
                raise part
            broken, whole, cuts = part
            pairs = np.flatnonzero(np.isin(owners, whole))
            place = np.searchsorted(whole, owners[pairs])            # of a pair's picture in cuts
            prompts = [captions[pair] for pair in pairs]
            for scorer in some:
                failed[scorer.name] |= broken
                if whole:
                    columns[scorer.name][pairs], bad = scorer.scores(
                        cuts[scorer.view], place, prompts, batch)
                    failed[scorer.name] |= {whole[i]: why for i, why in bad.items()}
            bar.update(len(broken) + len(whole))
    if todo:
        write_scores(shard, columns, scorers, failed)
    return columns, failed


def read_views(shard: Shard, size: int, wanted: set, rows: list) -> tuple | UserError:
    """Rows of a shard → why some cannot be read {row: why}, the other rows, and these in the views
    that are wanted, {view: uint8 (b, 3, n, n)}: few tensors, as a worker process hands each over
    in a file descriptor. A UserError is returned: raised there it would gain a traceback."""
    broken, seen = {}, {}
    for row in rows:
        try:
            encoded = None if wanted == {None} else shard.image(row)
            own = shard.picture(row, size) if None in wanted or not encoded else None  # (3, S, S)
            image = to_rgb(decode(encoded)) if encoded else Image.fromarray(own.transpose(1, 2, 0))
            seen[row] = {view: cut(image, *view) if view else torch.from_numpy(own.copy())
                         for view in wanted}
        except BROKEN as error:
            broken[row] = f"its picture cannot be read ({first_line(error)})"
        except UserError as error:
            return error
    return broken, list(seen), {view: torch.stack([cuts[view] for cuts in seen.values()])
                                for view in wanted if seen}


def cut(image: Image.Image, kind: str, n: int) -> torch.Tensor:
    """An RGB picture → uint8 (3, n, n), as the networks were trained. crop: the short side becomes
    n (PIL bicubic), then the centre; pad: a centred square on a mean colour, then n x n.

    ValueError: so long and thin that it would take more than 4 * MAX_PIXELS on the way."""
    W, H = image.size
    side = max(W, H)
    on_the_way = n * n * side // min(W, H) if kind == "crop" else side ** 2
    if on_the_way > 4 * MAX_PIXELS:
        raise ValueError(f"{W} x {H} pixels are too long and thin to be cut to {n} x {n}")
    if kind == "crop":
        w, h = (n, int(n * H / W)) if W <= H else (int(n * W / H), n)
        left, top = round((w - n) / 2), round((h - n) / 2)
        image = image.resize((w, h), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + n, top + n))
    else:
        canvas = Image.new("RGB", (side, side), (122, 116, 104))     # CLIP's mean colour, as vqa's
        canvas.paste(image, ((side - W) // 2, (side - H) // 2))
        image = canvas.resize((n, n), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())             # (3, n, n)


# ---- which rewards -------------------------------------------------------------------------------

def check_names(names: Sequence[str], valid: Sequence[str]) -> None:
    """UserError, with the valid names, if one is unknown or is there twice."""
    for name in names:
        if name not in valid:
            raise UserError(f"unknown reward {printable(name)!r}; valid: {', '.join(valid)}")
    if len(set(names)) < len(names):
        raise UserError(f"a reward is named twice: {', '.join(names)}")


def choose_rewards(text: str, data: Data | Sequence[str]) -> tuple[str, ...]:
    """--rewards → names in the order of REWARDS, for DATA or for captions; DATA is judged by its
    first shard. UserError: unknown, or not for these captions."""
    if text == "all":
        return PAPER
    suited = default_rewards(data.shards[0].captions if isinstance(data, Data) else data)
    if text == "analytic":
        return suited
    names = [name.strip() for name in text.split(",")]
    check_names(names, REWARDS)
    if "alignment" in names and "alignment" not in suited:
        raise UserError("alignment reads the captions of shapes.py alone, and this data has "
                        "others: leave it out of --rewards")
    return tuple(name for name in REWARDS if name in names)


def default_rewards(captions: Sequence[str]) -> tuple[str, ...]:
    """The analytic rewards; alignment where it can read all of these captions but 1 %."""
    foreign = sum(not reads(caption) for caption in captions)
    unfit = ("alignment",) if foreign > MAX_LEFT_OUT * len(captions) else ()
    return tuple(name for name in ANALYTIC if name not in unfit)


def reads(caption: str) -> bool:
    """Is a caption of the grammar of shapes.py, which alignment reads?"""
    try:
        shapes.parse(caption)
    except UserError:
        return False
    return True


# ---- the networks --------------------------------------------------------------------------------
# Each sees pictures, uint8 (B, 3, n, n) of its VIEW, once, and judges what it saw with a prompt
# each: float32 (B,). Towers are in bf16 on a GPU; normalisation, heads and products in fp32.
# SOURCES: the repositories of its files. DISK, MEMORY: GB of files, and of weights in bf16. A file
# that is not exactly the network's is a UserError.

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalised(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (B, 3, n, n) → zero mean and unit variance a channel, as all seven expect."""
    mean, std = (torch.tensor(a, device=pixels.device).view(3, 1, 1) for a in (MEAN, STD))
    return ((pixels / 255 - mean) / std).to(dtype)                               # (B, 3, n, n)


def pretrained(folder: Path, kind: type, more: bool = False, dtype=torch.float32) -> nn.Module:
    """A network of transformers from its folder, frozen. UserError, naming the tensor: one is
    missing, of another shape or, without `more`, unknown."""
    try:
        model, found = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True,
                                            ignore_mismatched_sizes=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read ({first_line(error)}): fetch it again") from error
    wrong = sorted([*found["missing_keys"], *(() if more else found["unexpected_keys"]),
                    *(key for key, *_ in found["mismatched_keys"])])
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} tensors are missing, unknown or of another "
                        f"shape, such as {wrong[0]}: fetch it again")
    return model.eval().requires_grad_(False)


def fill(model: nn.Module, path: Path, names: Sequence[tuple] = (), change=None) -> None:
    """Give a network all tensors of a file and no others, and freeze it. UserError: with torch's
    words. change: a function of the dict of tensors. names: (expression, replacement) pairs, which
    make our name of a tensor from the file's; what has none then is not used."""
    try:
        tensors = (safetensors.torch.load_file(path) if path.suffix == ".safetensors" else
                   torch.load(path, map_location="cpu", weights_only=True))
        tensors = tensors.get("state_dict", tensors)
        ours = {}
        for name, x in (change(tensors) if change else tensors).items():
            for expression, replacement in names:
                name = re.sub(expression, replacement, name)
            ours[name] = x
        ours.pop("", None)
        model.load_state_dict(ours, assign=True)
    except (OSError, EOFError, LookupError, AttributeError, RuntimeError, SafetensorError,
            pickle.UnpicklingError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit its network ({said}): fetch it again") from error
    model.eval().requires_grad_(False)


def affine_head(width: int) -> nn.Sequential:
    """The MLP of aesthetic and image_reward: affine, with dropout and without activations."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(),
        nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1))


class PickScore:
    """pick: cos(E_picture, E_prompt) · exp(scale) / 100, which is nearly the cosine: 0.18 to 0.24.

    Kirstain et al. 2023, arXiv 2305.01569, trained on choices of users of a generator. CLIP
    ViT-H/14, 224 px centre crop, the raw prompt, 77 tokens."""
    SOURCES = (("yuvalkirstain/PickScore_v1", ("config.json", "*.safetensors")),
               ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ("*token*", "vocab*", "merges*")))
    VIEW, DISK, MEMORY, LICENCE = ("crop", 224), 3.9, 2.0, "MIT"

    def __init__(self, folders: tuple, device, dtype):
        from transformers import AutoTokenizer, CLIPModel
        model = pretrained(folders[0], CLIPModel)        # in bf16 the scale would be 1 % too low
        self.scale = model.logit_scale.exp().item() / 100
        self.model, self.dtype, self.device = model.to(device, dtype), dtype, device
        self.tokenizer = AutoTokenizer.from_pretrained(folders[-1], local_files_only=True)
        if len(self.tokenizer) != model.config.text_config.vocab_size:  # transformers made one up
            raise UserError(f"{folders[-1]} has no tokenizer of this network: fetch it again")

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        seen = self.model.get_image_features(normalised(pixels, self.dtype)).pooler_output
        return F.normalize(seen.float(), dim=-1)                                 # (B, D)

    def judge(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=77,
                                return_tensors="pt").to(seen.device)             # (B, 77)
        read = self.model.get_text_features(**tokens).pooler_output              # (B, D)
        return self.scale * (seen * F.normalize(read.float(), dim=-1)).sum(-1)   # (B,)


class SciScore(PickScore):
    """sci: as pick, with a CLIP ViT-H/14 tuned on the physics that a prompt implies; not comparable
    with pick. Li et al. 2025, arXiv 2504.13129 (Science-T2I)."""
    SOURCES = (("Jialuo21/SciScore", ("*.json", "*.txt", "*.safetensors")),)
    LICENCE = "see its page"


class OpenAIClip(PickScore):
    """clip_openai: cos(E_picture, E_prompt) of OpenAI's CLIP ViT-L/14, whose exp(scale) is 100: for
    evaluation, held out in the paper. Typically 0.15 to 0.35."""
    SOURCES = (("openai/clip-vit-large-patch14", ("*.json", "*.txt", "model.safetensors")),)
    DISK, MEMORY = 1.7, 0.9


class Aesthetic:
    """aesthetic: how much people liked pictures, 1 to 10, mostly 4 to 7; the prompt is not read.

    Schuhmann 2022 (LAION). OpenAI's CLIP ViT-L/14 with QuickGELU, 224 px centre crop, the projected
    embedding at unit length, then an MLP."""
    HEAD = "sac+logos+ava1-l14-linearMSE.pth"
    SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"      # of HEAD
    SOURCES = (("openai/clip-vit-large-patch14", ("config.json", "model.safetensors")),
               ("christophschuhmann/improved-aesthetic-predictor", (HEAD,)))
    VIEW, DISK, MEMORY, LICENCE = ("crop", 224), 1.7, 0.6, "MIT, Apache 2.0"

    def __init__(self, folders: tuple, device, dtype):
        from transformers import CLIPModel
        self.model, path = pretrained(folders[0], CLIPModel), folders[1] / self.HEAD
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.SHA256:
            raise UserError(f"{path} is not the file of its name: remove it and fetch it again")
        self.head, self.dtype, self.device = affine_head(768), dtype, device
        fill(self.head, path, [(r"^layers\.", "")])
        del self.model.text_model                                    # no prompt is read
        self.model.to(device, dtype)
        self.head.to(device)

    see = PickScore.see                                                          # (B, 768)

    def judge(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.head(seen)[:, 0]                                             # (B,)


class HPSv2:
    """hpsv2: cos(E_picture, E_prompt), 0.2 to 0.3, version 2.1; 2.0 and 2.1 do not compare.

    Wu et al. 2023, arXiv 2306.09341 (Human Preference Score v2). open_clip's ViT-H-14, 224 px
    centre crop (the authors' package letterboxes), 77 tokens."""
    SOURCES = (("xswu/HPSv2", ("HPS_v2.1_compressed.pt",)),)
    VIEW, DISK, MEMORY, LICENCE = ("crop", 224), 2.0, 2.0, "Apache 2.0"
    MODEL = "ViT-H-14"

    def __init__(self, folders: tuple, device, dtype):
        import open_clip
        self.model = open_clip.CLIP(**open_clip.get_model_config(self.MODEL))
        fill(self.model, folders[0] / self.SOURCES[0][1][0])
        self.model.to(device, dtype)
        self.tokenizer, self.dtype = open_clip.get_tokenizer("ViT-H-14"), dtype

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        seen = self.model.encode_image(normalised(pixels, self.dtype))           # (B, D)
        return F.normalize(seen.float(), dim=-1)                                 # (B, D)

    def judge(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        read = self.model.encode_text(self.tokenizer(prompts).to(seen.device))   # (B, D)
        return (seen * F.normalize(read.float(), dim=-1)).sum(-1)                # (B,)


class HPSv20(HPSv2):
    """hpsv2 of version 2.0 (--hpsv2 2.0): the paper evaluates with it."""
    SOURCES = (("xswu/HPSv2", ("HPS_v2_compressed.pt",)),)


class ImageReward:
    """image_reward: which picture of a prompt would people prefer? About -2.3 to 2.

    Xu et al. 2023, arXiv 2304.05977. Picture: 224 px centre crop. Prompt: lower case, its first 33
    word pieces. BERT reads the prompt and in each layer attends to BLIP's ViT-L/16 states; an MLP
    maps its [CLS] state h to (mlp(h) - MEAN) / STD, which standardise its training scores."""
    SOURCES = (("THUDM/ImageReward", ("ImageReward.pt",)),
               ("google-bert/bert-base-uncased", ("tokenizer.json", "tokenizer_config.json")))
    VIEW, DISK, MEMORY, LICENCE = ("crop", 224), 1.8, 0.9, "Apache 2.0"
    # What differs from transformers' BLIP: ViT-L with an epsilon of its own, and med_config.json.
    VISION = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                  intermediate_size=4096, image_size=224, layer_norm_eps=1e-6)
    TEXT = dict(encoder_hidden_size=1024, num_attention_heads=12)
    LENGTH = 35                              # tokens, with [CLS] and [SEP]
    MEAN, STD = 0.16717362830052426, 1.0333394966054072
    # Not used: heads of BLIP's contrastive loss, and the numbers 0 to 511.
    NAMES = ((r"^blip\.((vision|text)_proj\.|.*position_ids).*", ""),
             (r"^blip\.visual_encoder\.", "vision."), (r"^blip\.text_encoder\.", "text."),
             (r"^mlp\.layers\.", "mlp."), ("cls_token", "embeddings.class_embedding"),
             ("pos_embed", "embeddings.position_embedding"),
             (r"patch_embed\.proj", "embeddings.patch_embedding"), (r"blocks\.", "encoder.layers."),
             (r"^vision\.norm", "vision.post_layernorm"), (r"\.norm", ".layer_norm"),
             (r"attn\.proj", "self_attn.projection"), (r"attn\.qkv", "self_attn.qkv"))

    def __init__(self, folders: tuple, device, dtype):
        from transformers import (BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig,
                                  BlipVisionModel)
        self.tokenizer = BertTokenizer.from_pretrained(folders[1], local_files_only=True)
        self.vision = BlipVisionModel(BlipVisionConfig(**self.VISION))
        self.text = BlipTextModel(BlipTextConfig(**self.TEXT), add_pooling_layer=False)
        self.mlp, self.device, self.dtype = affine_head(self.text.config.hidden_size), device, dtype
        fill(nn.ModuleDict({"vision": self.vision, "text": self.text, "mlp": self.mlp}),
             folders[0] / "ImageReward.pt", self.NAMES)
        self.vision.to(device, dtype)
        self.text.to(device, dtype)
        self.mlp.to(device)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vision(normalised(pixels, self.dtype)).last_hidden_state     # (B, 197, D)

    def judge(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True,
                                max_length=self.LENGTH, return_tensors="pt").to(self.device)
        states = self.text(tokens.input_ids, tokens.attention_mask,
                           encoder_hidden_states=seen).last_hidden_state         # (B, L, 768)
        return (self.mlp(states[:, 0].float())[:, 0] - self.MEAN) / self.STD     # (B,)


class JinaCLIP:
    """clip: cos(E_picture, E_prompt) of jina-clip-v2, 1024 numbers each. Typically 0.2 to 0.55.

    Koukounas et al. 2024, arXiv 2412.08802. Picture: 512 px centre crop, EVA02-L/14, its class
    token. Prompt: as it is, XLM-R with rotary positions and the LoRA `retrieval.query`, which the
    reference never switches off, the mean over the tokens. Not for commerce."""
    SOURCES = (("jinaai/jina-clip-v2", ("config.json", "model.safetensors", "tokenizer.json")),)
    VIEW, DISK, MEMORY, LICENCE = ("crop", 512), 1.7, 1.7, "CC BY-NC 4.0"
    IMAGE, TEXT = dict(img_size=512), {}       # what differs from timm's and transformers' own
    TOKENS = 512            # where the reference cuts by default; the model would take 8192
    NAMES = (("^logit_scale$", ""),            # of the training loss; a cosine needs none
             (r"^vision_model\.", "image."), (r"\.([qv])_bias", r".\1_proj.bias"),
             (r"attn\.inner_attn_ln", "attn.norm"), (r"mlp\.ffn_ln", "mlp.norm"),
             (r"mlp\.w1", "mlp.fc1_g"), (r"mlp\.w2", "mlp.fc1_x"), (r"mlp\.w3", "mlp.fc2"),
             (r"^text_model\.transformer\.roberta\.(encoder\.)?", "text."),
             (r"emb_ln", "embeddings.LayerNorm"), (r"mixer\.out_proj", "self_attn.o_proj"),
             ("mixer", "self_attn"), (r"^(text.*)norm1", r"\1post_attention_layernorm"),
             (r"^(text.*)norm2", r"\1post_mlp_layernorm"))

    def __init__(self, folders: tuple, device, dtype):
        import timm
        from tokenizers import Tokenizer
        from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model
        self.device, self.dtype, [folder] = device, dtype, folders
        with torch.device(device):
            self.image = timm.create_model("eva02_large_patch14_clip_224", num_classes=0,
                                           **self.IMAGE)
            self.text = JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**self.TEXT),
                                              add_pooling_layer=False)
        both = nn.ModuleDict({"image": self.image, "text": self.text})
        config = read_json(folder / "config.json")["text_config"]
        fill(both, folder / "model.safetensors", self.NAMES, partial(merged, config))
        for parameter in both.parameters():      # in bf16 the rotary tables would be too coarse
            parameter.data = parameter.to(device, dtype)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(self.TOKENS)      # the file asks for 77, for padding, too
        self.tokenizer.enable_padding(pad_id=1, pad_token="<pad>")

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.image(normalised(pixels, self.dtype)).float(), dim=-1)   # (B, D)

    def judge(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """(B, D) of see, B prompts → the cosine (B,)."""
        lines = self.tokenizer.encode_batch(list(prompts))
        ids = torch.tensor([line.ids for line in lines], device=self.device)     # (B, L)
        mask = torch.tensor([line.attention_mask for line in lines], device=self.device)  # (B, L)
        states = self.text(ids, attention_mask=mask).last_hidden_state.float()   # (B, L, D)
        read = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)     # (B, D)
        return (seen * F.normalize(read, dim=-1)).sum(-1)                        # (B,)


def merged(config: dict, tensors: dict) -> dict:
    """jina's tensors, those of the text tower with the adapter of the default task in them,
    W + scale BA of a Linear, W + scale AB of an Embedding, and q, k and v apart."""
    lora, found = config["hf_model_config_kwargs"], {}
    task = lora["lora_adaptations"].index(config["default_lora_task"])
    scale = lora["lora_alpha"] / lora["lora_rank"]
    for name, x in tensors.items():
        stem, adapted, part = name.partition("parametrizations.weight.")
        if part == "original":
            a, b = (tensors[f"{stem}{adapted}0.lora_{letter}"][task].float() for letter in "AB")
            change = a @ b if ".embeddings." in name else b @ a                  # (n, m)
            found[f"{stem}weight"] = x.float() + scale * change
        elif not adapted:
            found[name] = x
    for name in [name for name in found if ".mixer.Wqkv." in name]:
        for part, x in zip("qkv", found.pop(name).chunk(3)):
            found[name.replace("Wqkv", f"{part}_proj")] = x
    return found


class CLIPFlanT5:
    """vqa: does the picture show what the prompt says? VQAScore, 0 to 1.

    Lin et al. 2024, arXiv 2404.01291, and its package t2v-metrics. Picture: padded to a square, 336
    px; CLIP ViT-L/14's states before its last layer, without [CLS], through two linear maps are 576
    image tokens. Flan-T5 reads SYSTEM, image tokens and QUESTION with the prompt, and answers;
    score = sqrt(P(Yes) P(</s> | Yes)). 11.5 B parameters; -xl has 3.2 B."""
    SOURCES = (("zhiqiulin/clip-flant5-xxl", ("config.json", "*.index.json", "*.bin")),
               ("openai/clip-vit-large-patch14-336", ("config.json", "pytorch_model.bin")),
               ("google/flan-t5-xxl", ("tokenizer.json", "tokenizer_config.json")))
    VIEW, DISK, MEMORY, LICENCE = ("pad", 336), 46.7, 23.2, "Apache 2.0, MIT"
    SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The "
              "assistant gives helpful, detailed, and polite answers to the user's questions. "
              "USER: ")
    QUESTION = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '
    LENGTH = 2048                            # tokens of text, plus one; the end of more is cut off

    def __init__(self, folders: tuple, device, dtype):
        from transformers import CLIPModel, T5ForConditionalGeneration, T5Tokenizer
        assert dtype != torch.float16, "T5 overflows in float16"
        self.tower = pretrained(folders[1], CLIPModel).vision_model.to(device, dtype)
        width = self.tower.config.hidden_size

        class Flan(T5ForConditionalGeneration):
            def __init__(self, config):
                super().__init__(config)
                self.mm_projector = nn.Sequential(nn.Linear(width, config.d_model), nn.GELU(),
                                                  nn.Linear(config.d_model, config.d_model))

        # More: copies of the table of words, and of the tower, which its training froze.
        self.t5 = pretrained(folders[0], Flan, more=True, dtype=dtype).to(device)
        if self.t5.lm_head.weight is self.t5.shared.weight:
            raise UserError(f"{folders[0]} has no lm_head.weight: fetch it again")
        self.t5.lm_head.float()              # in bf16 a logit of 10 has steps of 1/16
        self.tokenizer = T5Tokenizer.from_pretrained(folders[2], local_files_only=True)
        self.answer = self.tokenizer.convert_tokens_to_ids(["▁Yes", "</s>"])
        self.device, self.dtype = device, dtype

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        x = normalised(pixels, self.dtype)                                     # (B, 3, 336, 336)
        states = self.tower(x, output_hidden_states=True).hidden_states[-2]    # (B, 577, D)
        return self.t5.mm_projector(states[:, 1:])                             # (B, 576, d_model)

    def judge(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Image tokens (B, 576, d_model) of see, B prompts → P(Yes), as the score has it (B,)."""
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
    DISK, MEMORY = 13.0, 6.5


def clean(prompt: str) -> str:
    """A caption without code fences, backticks and <tags>, which T5 could take for its own tokens
    (a tag leaves a space, or <<pad>pad> would become <pad>); without any, as it is."""
    rest = re.sub(r"</?[A-Za-z][^<>]*>", " ", re.sub(r"```\w*\s*\n|`", "", prompt))
    return prompt if rest == prompt else " ".join(rest.split())


NETWORKS = {"aesthetic": Aesthetic, "hpsv2": HPSv2, "image_reward": ImageReward, "pick": PickScore,
            "vqa": CLIPFlanT5, "clip": JinaCLIP, "sci": SciScore, "clip_openai": OpenAIClip}
PAPER = tuple(NETWORKS)[:7]
REWARDS = (*NETWORKS, *ANALYTIC)                                  # the order of the columns


def fetch(repository: str, patterns: Sequence[str], models: str | None, why: str,
          disk: float) -> Path:
    """The folder of a repository's files: below `models`, as MODELS/OWNER/NAME, or from the hub, or
    of aesthetic's head, which no hub serves, from its page: the right file, or none.

    UserError says which file of which repository is missing, and how many GB it has."""
    import huggingface_hub                       # here: training needs none of this
    folder, head = Path(models or torch.hub.get_dir(), repository), Aesthetic.HEAD
    needed = f"{why} {', '.join(patterns)} of {repository} ({disk:g} GB)"
    try:
        if not models and head not in patterns:
            folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
        elif not models and not (folder / head).exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(f"https://github.com/{repository}/raw/main/{head}",
                                           str(folder / head), Aesthetic.SHA256, progress=False)
    except (OSError, RuntimeError) as error:     # RuntimeError: it has another hash
        raise UserError(f"{needed}, which cannot be downloaded ({first_line(error)}): pass "
                        "--models") from None
    for pattern in patterns:
        if not any(folder.glob(pattern)):
            raise UserError(f"{needed}, and {folder} has no {pattern}: put it there")
    return folder


def revision(folder: Path, patterns: Sequence[str]) -> str:
    """What tells checkpoints apart: 12 hex digits of names, sizes and ends of the files that a
    network reads."""
    found = hashlib.sha256()
    for file in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        with open(file, "rb") as content:
            found.update(f"{file.name} {file.stat().st_size}".encode() + content.read(2 ** 16))
            content.seek(max(0, file.stat().st_size - 2 ** 16))
            found.update(content.read())
    return found.hexdigest()[:12]


# ---- the command line ----------------------------------------------------------------------------

def main() -> None:
    """Score DATA, one file of scores a shard."""
    parser = argparse.ArgumentParser(description="score every picture with its captions")
    add = parser.add_argument
    add("data", help="DATA, as python data.py import writes it")
    add("--rewards", default="analytic", help="analytic: those that suit the captions (default); "
        f"all: the paper's seven; or some of {','.join(REWARDS)}")
    add("--batch", type=int, help="pictures at once, in each process; default 256, networks 32")
    add("--workers", type=int, default=0, help="processes that read pictures, per rank")
    add("--retry", action="store_true", help="try samples that failed before again")
    add("--models", help="folder with OWNER/NAME/files of the hub; default: from the hub")
    add("--memory-gb", type=float, default=48.0, help="for networks, which go in groups that fit")
    add("--hpsv2", choices=("2.1", "2.0"), default="2.1", help="version of hpsv2")
    add("--vqa", choices=("xxl", "xl"), default="xxl", help="size of vqa's language model")
    add("--keep-going", action="store_true", help="leave out rewards whose files are missing")
    add("--dry-run", action="store_true", help="say what would be loaded, and stop")
    args = parser.parse_args()
    if args.workers < 0 or args.batch is not None and args.batch < 1:
        raise UserError("--batch is at least 1 and --workers at least 0")
    NETWORKS["hpsv2"] = HPSv2 if args.hpsv2 == "2.1" else HPSv20
    NETWORKS["vqa"] = CLIPFlanT5 if args.vqa == "xxl" else CLIPFlanT5XL
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    data = Data(args.data)
    names = choose_rewards(args.rewards, data)
    if args.rewards == "analytic" and "alignment" not in names and rank == 0:
        print("alignment is left out: it reads the captions of shapes.py alone")
    if args.dry_run:
        for kind in (NETWORKS[name] for name in names if name in NETWORKS):
            print(" + ".join(repository for repository, _ in kind.SOURCES), f"{kind.DISK:g} GB, "
                  f"{kind.MEMORY:g} GB in bf16 on a GPU", f"licence {kind.LICENCE}", sep="; ")
        print(f"{', '.join(names)} of {data.rows:,} pictures with {data.pairs:,} captions")
        return
    found = available(names, args.models, args.keep_going)
    groups = groups_of(found, args.memory_gb, best_device())
    batch = args.batch or (256 if set(found) <= set(ANALYTIC) else 32)
    failures = score_dataset(data, tuple(found), batch, args.retry, rank, ranks, groups,
                             args.workers)
    if ranks == 1:                           # torchrun kills all ranks when one of them fails
        refuse_too_many(len(failures), data.rows, args.data, "they and the reasons are listed "
                        "above; then pass --retry")


def available(names: Sequence[str], models: str | None, keep_going: bool) -> dict[str, tuple]:
    """The rewards whose files are there: name → their folders, () for the analytic ones.
    UserError: one's are not, and it may not be left out, or none's are."""
    found = {}
    for name in names:
        sources = NETWORKS[name].SOURCES if name in NETWORKS else ()
        try:
            found[name] = tuple(fetch(*source, models, f"{name} needs", NETWORKS[name].DISK)
                                for source in sources)
        except UserError as error:
            if not keep_going:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
    if not found:
        raise UserError("no reward is left to score: name others with --rewards")
    return found


if __name__ == "__main__":
    run(main)
