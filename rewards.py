"""Rewards: score every picture with each of its captions, once, before training.

The analytic ones of shapes.py measure pixels and caption and nothing else. Seven are the paper's:
networks of 0.3 to 11 billion parameters, one class each (`--rewards all`).

`python rewards.py DATA` writes DATA/NAME.scores.safetensors beside each shard, whole or not at all:

    a float32 column (P,) a reward, in its own units: a score a pair, or NaN
    metadata: "shard", the digest of the shard that was scored, "scorers" {reward: version},
        "digests" {reward: 16 hex digits of its column}, "failed" {reward: {row: why}}

The same command again scores what lacks a score, or has that of another scorer, and nothing else.
`torchrun rewards.py DATA` shares the shards.
"""
import csv
import hashlib
import json
import os
import pickle
import re
import shlex
import sys
from collections.abc import Callable, Sequence
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
from data import (BROKEN, MAX_LEFT_OUT, MAX_PIXELS, Data, Parser, Shard, UserError, array_digest,
                  best_device, between, compiles, decode, first_line, hold, pinned, printable,
                  read_json, refuse_too_many, run, seal, to_rgb, unseal, write_whole)
from shapes import ANALYTIC


# ---- how pairs are scored ------------------------------------------------------------------------

def score_dataset(data: Data, names: Sequence[str], batch: int = 32, workers: int = 0,
                  rank: int = 0, ranks: int = 1, models: str | None = None,
                  pins: dict = {}) -> dict[str, str]:
    """Score the shards of one rank, print a table, return {"shard/key": why} of what has no score.
    UserError: a source has changed since it was imported, or a file of a network is missing."""
    scorers = [scorer_of(name, models, pins) for name in names]
    mine, parts, failures = data.shards[rank::ranks], [np.zeros((len(names), 0))], {}
    with tqdm(total=len(names) * sum(shard.rows for shard in mine), desc="scoring",
              unit="score", disable=True if rank else None) as bar:
        for shard in mine:
            columns, failed = score_shard(shard, data.size, scorers, batch, workers, bar)
            parts.append(np.stack([columns[name] for name in names]))            # (R, P)
            for name in names:
                for row, why in failed[name].items():
                    failures[f"{shard.name}/{shard.keys[int(row)]}"] = why
            shard.close()
    print(f"rank {rank} of {ranks}: " * (ranks > 1) + f"{len(mine)} shards")
    print(f"{'reward':14}{'n':>9}{'mean':>10}{'std':>10}{'min':>10}{'max':>10}")
    for name, x in zip(names, np.concatenate(parts, 1)):                         # float64 (P,)
        x = x[~np.isnan(x)]
        numbers = (x.mean(), x.std(), x.min(), x.max()) if len(x) else ()
        print(f"{name:14}{len(x):9}" + "".join(f"{number:10.4g}" for number in numbers))
    print(f"{len(failures)} failed")
    for name, why in failures.items():
        print(printable(f"  {name}: {why}"))
    return failures


def score(names: Sequence[str], pictures: torch.Tensor, captions: Sequence[str],
          models: str | None = None) -> np.ndarray:
    """For notebooks: pictures uint8 (B, 3, S, S), such as sample.pictures makes, and a caption each
    → scores float32 (B, R) in the rewards' own units, NaN where one failed. Each call loads the
    networks anew. UserError: an unknown name, or a file of a network is missing."""
    assert len(pictures) == len(captions), f"{len(pictures)} pictures, {len(captions)} captions"
    names_of(",".join(names))
    columns, place = [], np.arange(len(captions))
    for name in names:
        scorer, views = scorer_of(name, models, {}), pictures
        if scorer.view:
            images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
            views = torch.stack([cut(image, *scorer.view) for image in images])
        columns.append(scorer.scores(views, place, captions, 32)[0])
    return np.stack(columns, 1)


def write_table(data: Data, names: Sequence[str], path: Path) -> None:
    """A row a pair: shard, key, caption and scores, as CSV; NAME.parquet, where pandas can write
    it."""
    def write(temporary: Path) -> None:
        """All rows, shard by shard."""
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["shard", "key", "caption", *names])
            for shard in data.shards:
                keys, captions, owners = shard.keys, shard.captions, shard.owners
                for pair, row in enumerate(read_scores(shard, names).tolist()):
                    table.writerow([shard.name, keys[owners[pair]], captions[pair], *row])
        if path.suffix == ".parquet":
            import pandas
            words = dict.fromkeys(("shard", "key", "caption"), str)      # "0001", "None" stay so
            pandas.read_csv(temporary, dtype=words, keep_default_na=False, na_values=dict.fromkeys(
                names, ["nan"])).to_parquet(temporary)

    try:
        write_whole(path, write)
    except ImportError as error:
        raise UserError(f"--table {path}: {error}; name a .csv, or pip install pandas pyarrow") \
            from error


def score_shard(shard: Shard, size: int, scorers: Sequence["Scorer"], batch: int, workers: int,
                bar: tqdm) -> tuple[dict, dict]:
    """Score the rows of a shard that lack a score, or have that of another scorer; all other
    columns stay, also of names unknown here. {name: column (P,)}, {name: {row: why it failed}}."""
    header, columns, todo = header_of(shard), {}, {}
    versions, failed = dict(header["scorers"]), dict(header["failed"])
    if versions:
        columns = columns_of(shard, [*versions], header["digests"])
    captions, owners = shard.captions, shard.owners
    for scorer in scorers:
        if versions.get(scorer.name) != scorer.version:
            versions[scorer.name] = scorer.version
            columns[scorer.name] = np.full(shard.pairs, np.nan, np.float32)
        failed[scorer.name] = {}
        rows = np.unique(owners[np.isnan(columns[scorer.name])])
        if len(rows):
            todo.setdefault(tuple(rows.tolist()), []).append(scorer)
    lacking = sum(len(rows) * len(some) for rows, some in todo.items())
    bar.update(shard.rows * len(scorers) - lacking)
    fork = "fork" if workers and sys.platform == "linux" else None
    for rows, some in todo.items():                             # rewards that lack the same rows
        read = partial(read_views, shard, size, {scorer.view for scorer in some})
        for part in DataLoader(rows, 2 * batch, num_workers=workers, collate_fn=read,
                               multiprocessing_context=fork):
            if isinstance(part, UserError):
                raise part
            broken, whole, views = part
            pairs = np.flatnonzero(np.isin(owners, whole))
            place = np.searchsorted(whole, owners[pairs])           # of a pair's picture in views
            prompts = [captions[pair] for pair in pairs]
            for scorer in some:
                failed[scorer.name] |= broken
                if whole:
                    values, bad = scorer.scores(views[scorer.view], place, prompts, batch)
                    columns[scorer.name][pairs] = values
                    failed[scorer.name] |= {str(whole[i]): why for i, why in bad.items()}
            bar.update((len(broken) + len(whole)) * len(some))
    if (versions, failed) != (header["scorers"], header["failed"]):
        write_scores(shard, columns, versions, failed)
    return columns, failed


def read_views(shard: Shard, size: int, wanted: set, rows: list) -> tuple | UserError:
    """Rows of a shard → why some cannot be read {row: why}, the other rows, and these in the views
    that are wanted, {view: uint8 (b, 3, n, n)}: few tensors, as a worker process hands each over
    in a file descriptor. A UserError is returned: raised there it would gain a traceback."""
    broken, seen = {}, {}
    for row in rows:
        try:
            encoded = shard.image(row) if any(wanted) else None      # None: it never was in a file
            own = None if encoded and None not in wanted else shard.picture(row, size)  # (3, S, S)
            image = to_rgb(decode(encoded)) if encoded else Image.fromarray(own.transpose(1, 2, 0))
            seen[row] = {view: cut(image, *view) if view else torch.from_numpy(own.copy())
                         for view in wanted}
        except BROKEN as error:
            broken[str(row)] = f"its picture cannot be read ({first_line(error)})"
        except UserError as error:
            return error
    return broken, list(seen), {view: torch.stack([views[view] for views in seen.values()])
                                for view in wanted if seen}


def cut(image: Image.Image, kind: str, n: int) -> torch.Tensor:
    """An RGB picture → uint8 (3, n, n), as the networks were trained. crop: the short side becomes
    n (PIL bicubic), then the centre; pad: first a centred square on CLIP's mean colour.

    ValueError: so long and thin that it would take more than 4 * MAX_PIXELS on the way."""
    from torchvision.transforms import InterpolationMode, functional     # here: a slow import
    W, H = image.size
    side = max(W, H)
    on_the_way = n * n * side // min(W, H) if kind == "crop" else side ** 2
    if on_the_way > 4 * MAX_PIXELS:
        raise ValueError(f"{W} x {H} pixels are too long and thin to be cut to {n} x {n}")
    if kind == "pad":
        left, top = (side - W) // 2, (side - H) // 2
        image = functional.pad(image, [left, top, side - W - left, side - H - top], (122, 116, 104))
    image = functional.resize(image, n, InterpolationMode.BICUBIC)
    return functional.pil_to_tensor(functional.center_crop(image, n))                # (3, n, n)


@dataclass
class Scorer:
    """A reward: what tells its scores from those of other code or weights, its view of a picture
    (of `cut`; None: the one of training), how to load its network, and that, once it was needed."""
    name: str
    version: str
    view: tuple | None = None
    load: Callable | None = None
    network: object = None

    @torch.no_grad()
    def scores(self, pixels: torch.Tensor, place: np.ndarray, prompts: Sequence[str],
               batch: int) -> tuple[np.ndarray, dict]:
        """Scores of pairs: pixels uint8 (n, 3, S, S) in its view, place (b,) which of them each
        prompt has → float32 (b,), and {picture: why} where one is not finite: such a picture's are
        NaN. A network sees a picture once, and captions of like length together (less padding).
        UserError: a damaged file of the network."""
        values = np.full(len(prompts), np.nan, np.float32)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        if self.load:
            self.network = self.network or self.load()
            seen = torch.cat([self.network.see(part.to(self.network.device))
                              for part in pixels.split(batch)])
        elif self.name == "alignment":
            order = [i for i in order if reads(prompts[i])]
        for first in range(0, len(order), batch):
            part = order[first:first + batch]
            texts = [prompts[i] for i in part]
            if self.load:
                values[part] = self.network.judge(seen[place[part]], texts).cpu()
            else:
                values[part] = shapes.score_all((self.name,), pixels[place[part]], texts)[:, 0]
        bad = np.flatnonzero(~np.isfinite(values))
        why = {place[i]: f"{self.name} of {prompts[i][:60]!r} came out as {values[i]}" for i in bad}
        values[np.isin(place, place[bad])] = np.nan
        return values, why


# ---- the scores of a shard, in a file beside it --------------------------------------------------

def scores_path(shard: Shard) -> Path:
    """Where the scores of a shard are."""
    return shard.path.with_name(f"{shard.name}.scores.safetensors")


def header_of(shard: Shard) -> dict:
    """How a shard was scored: "scorers" {name: version}, "digests" {name: hex digits of its column}
    and "failed" {name: {row: why}}; {} each where its pictures and captions have no scores.
    UserError: the file is damaged."""
    path, notes = scores_path(shard), {}
    if path.exists():
        try:
            with safe_open(path, "np") as file:
                notes = unseal(json.loads(file.metadata()["miro"]))
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            raise damaged(path, error) from error
    if notes.get("shard") != shard.digest:
        notes = {}
    return {key: notes.get(key, {}) for key in ("scorers", "digests", "failed")}


def damaged(path: Path, why) -> UserError:
    """The sentence for a file of scores that is not as it was written."""
    return UserError(f"{path} cannot be read ({first_line(why)}): remove it and run python "
                     "rewards.py again")


def read_header(shard: Shard, names: Sequence[str] = ()) -> dict:
    """What `header_of` returns. UserError, naming the file: its pictures and captions have no
    scores, or none of one of these rewards, or of other code of an analytic one."""
    path, header = scores_path(shard), header_of(shard)
    versions = header["scorers"]
    lacking = [name for name in names if name not in versions
               or name in ANALYTIC and versions[name] != shapes.version(name)]
    if lacking or not versions:
        folder, flag = shlex.quote(str(path.parent)), f" --rewards {','.join(names)}" * bool(names)
        raise UserError(f"{path} lacks scores of these pictures and captions by this code "
                        f"({', '.join(lacking) or 'all'}): run python rewards.py {folder}{flag}")
    return header


def read_scores(shard: Shard, names: Sequence[str]) -> np.ndarray:
    """The scores of a shard's pairs: float32 (P, R), columns as names, NaN where there is none.
    UserError: what `read_header` raises, or a column is damaged."""
    digests = read_header(shard, names)["digests"]
    columns = columns_of(shard, names, digests)
    return np.stack([columns[name] for name in names], 1)


def columns_of(shard: Shard, names: Sequence[str], digests: dict) -> dict[str, np.ndarray]:
    """{name: column (P,)} of a file of scores. UserError: one is damaged."""
    columns = {}
    with safe_open(scores_path(shard), "np") as file:
        for name in names:
            columns[name] = file.get_tensor(name) if name in file.keys() else np.empty(0)
            if array_digest(columns[name]) != digests[name]:
                raise damaged(scores_path(shard), ValueError(f"{name} is damaged"))
    return columns


def write_scores(shard: Shard, columns: dict, scorers: dict, failed: dict) -> None:
    """The file of a shard: {name: column (P,)}, {name: version}, {name: {row: why}}."""
    notes = dict(shard=shard.digest, scorers=scorers, failed=failed,
                 digests={name: array_digest(column) for name, column in columns.items()})
    write_whole(scores_path(shard), lambda path: safetensors.numpy.save_file(
        columns, path, {"miro": seal(notes)}))      # one key: safetensors shuffles several


# ---- which rewards -------------------------------------------------------------------------------

def names_of(text: str) -> tuple[str, ...]:
    """"clip, contrast" → names in the order of REWARDS. UserError: one is unknown, or is there
    twice."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in REWARDS:
            raise UserError(f"unknown reward {printable(name)!r}; valid: {', '.join(REWARDS)}")
    if len(set(names)) < len(names):
        raise UserError(f"a reward is named twice: {', '.join(names)}")
    return tuple(name for name in REWARDS if name in names)


def default_rewards(captions: Sequence[str]) -> tuple[str, ...]:
    """The analytic rewards; alignment where it can read all of these captions but 1 %."""
    foreign = sum(not reads(caption) for caption in captions)
    suited = foreign <= MAX_LEFT_OUT * len(captions)
    return tuple(name for name in ANALYTIC if suited or name != "alignment")


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
# SOURCES: the repositories of its files (docs/data.md has sizes and licences). A file that is not
# exactly the network's is a UserError.

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalised(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (B, 3, n, n) → zero mean and unit variance a channel, as all of them expect."""
    mean, std = (torch.tensor(a, device=pixels.device).view(3, 1, 1) for a in (MEAN, STD))
    x = ((pixels / 255 - mean) / std).to(dtype)                                  # (B, 3, n, n)
    if x.is_cuda:
        torch._dynamo.maybe_mark_dynamic(x, 0)       # compiled once, for all B
    return x


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
    Kirstain et al. 2023, arXiv 2305.01569, trained on choices of a generator's users. CLIP
    ViT-H/14, 224 px centre crop, the raw prompt, 77 tokens."""
    SOURCES = (("yuvalkirstain/PickScore_v1", ("config.json", "*.safetensors")),
               ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ("*token*", "vocab*", "merges*")))
    VIEW = ("crop", 224)

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


class OpenAIClip(PickScore):
    """clip_openai: cos(E_picture, E_prompt) of OpenAI's CLIP ViT-L/14, whose exp(scale) is 100: for
    evaluation, held out in the paper. Typically 0.15 to 0.35."""
    SOURCES = (("openai/clip-vit-large-patch14", ("*.json", "*.txt", "model.safetensors")),)


class Aesthetic(PickScore):
    """aesthetic: how much people liked pictures, 1 to 10, mostly 4 to 7; the prompt is not read.
    Schuhmann 2022 (LAION). OpenAI's CLIP ViT-L/14 with QuickGELU, 224 px centre crop, the projected
    embedding at unit length, then an MLP."""
    HEAD = "sac+logos+ava1-l14-linearMSE.pth"
    SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"      # of HEAD
    SOURCES = (("openai/clip-vit-large-patch14", ("config.json", "model.safetensors")),
               ("christophschuhmann/improved-aesthetic-predictor", (HEAD,)))

    def __init__(self, folders: tuple, device, dtype):
        from transformers import CLIPModel
        self.model, self.head = pretrained(folders[0], CLIPModel), affine_head(768)
        self.dtype, self.device = dtype, device
        if hashlib.sha256((folders[1] / self.HEAD).read_bytes()).hexdigest() != self.SHA256:
            raise UserError(f"{folders[1] / self.HEAD} is not the file of its name: fetch it again")
        fill(self.head, folders[1] / self.HEAD, [(r"^layers\.", "")])
        del self.model.text_model                                    # no prompt is read
        self.model.to(device, dtype)
        self.head.to(device)

    def judge(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.head(seen)[:, 0]                                             # (B,)


class HPSv2:
    """hpsv2: cos(E_picture, E_prompt), 0.2 to 0.3, version 2.1; 2.0 and 2.1 do not compare.
    Wu et al. 2023, arXiv 2306.09341 (Human Preference Score v2). open_clip's ViT-H-14, 224 px
    centre crop (the authors' package letterboxes), 77 tokens."""
    SOURCES = (("xswu/HPSv2", ("HPS_v2.1_compressed.pt",)),)
    VIEW, MODEL = ("crop", 224), "ViT-H-14"

    def __init__(self, folders: tuple, device, dtype):
        import open_clip
        self.model = open_clip.CLIP(**open_clip.get_model_config(self.MODEL))
        fill(self.model, folders[0] / self.SOURCES[0][1][0])
        self.model.to(device, dtype)
        self.tokenizer = open_clip.get_tokenizer("ViT-H-14")
        self.dtype, self.device = dtype, device

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        seen = self.model.encode_image(normalised(pixels, self.dtype))           # (B, D)
        return F.normalize(seen.float(), dim=-1)                                 # (B, D)

    def judge(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        read = self.model.encode_text(self.tokenizer(prompts).to(seen.device))   # (B, D)
        return (seen * F.normalize(read.float(), dim=-1)).sum(-1)                # (B,)


class HPSv20(HPSv2):
    """hpsv2_0: hpsv2 of version 2.0, with which the paper evaluates."""
    SOURCES = (("xswu/HPSv2", ("HPS_v2_compressed.pt",)),)


class ImageReward:
    """image_reward: which picture of a prompt would people prefer? About -2.3 to 2.
    Xu et al. 2023, arXiv 2304.05977. Picture: 224 px centre crop. Prompt: lower case, its first 33
    word pieces. BERT reads the prompt and in each layer attends to BLIP's ViT-L/16 states; an MLP
    maps its [CLS] state h to (mlp(h) - MEAN) / STD, which standardise its training scores."""
    SOURCES = (("THUDM/ImageReward", ("ImageReward.pt",)),
               ("google-bert/bert-base-uncased", ("tokenizer.json", "tokenizer_config.json")))
    VIEW = ("crop", 224)
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
        if compiles(device):                         # transformers' own attention is not fused
            self.vision.compile()
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
    VIEW = ("crop", 512)
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
        config = read_json(folder / "config.json", sealed=False)["text_config"]
        fill(both, folder / "model.safetensors", self.NAMES, partial(merged, config))
        for parameter in both.parameters():      # in bf16 the rotary tables would be too coarse
            parameter.data = parameter.to(device, dtype)
        if compiles(device):         # twice as fast: 2730 wide layers are slow, if not padded to 8
            self.image.compile()
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
    VIEW = ("pad", 336)
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
        self.t5.lm_head.register_forward_pre_hook(lambda _, states: states[0].float())
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
        after, image = after.to(self.device), torch.ones_like(seen[..., 0], dtype=torch.long)
        x = torch.cat([embed(before.input_ids), seen, embed(after.input_ids)], 1)
        mask = torch.cat([before.attention_mask, image, after.attention_mask], 1)
        room = self.LENGTH - 1 + seen.shape[1]
        answers = torch.tensor([self.answer] * B, device=self.device)          # (B, 2)
        logits = self.t5(inputs_embeds=x[:, :room], attention_mask=mask[:, :room], labels=answers,
                         use_cache=False).logits                               # (B, 2, more)
        # T5 has 28 more rows than its tokenizer has tokens: t2v-metrics cuts them off too
        logits = logits[..., :len(self.tokenizer)]                             # (B, 2, vocabulary)
        yes = logits.log_softmax(-1)[:, [0, 1], self.answer]                   # (B, 2)
        return yes.mean(1).exp()                                               # (B,)


class CLIPFlanT5XL(CLIPFlanT5):
    """vqa_xl: vqa with a language model of 3 instead of 11 billion parameters."""
    SOURCES = (("zhiqiulin/clip-flant5-xl", CLIPFlanT5.SOURCES[0][1]), *CLIPFlanT5.SOURCES[1:])


def clean(prompt: str) -> str:
    """A caption without code fences, backticks and <tags>, which T5 could take for its own tokens
    (a tag leaves a space, or <<pad>pad> would become <pad>); without any, as it is."""
    rest = re.sub(r"</?[A-Za-z][^<>]*>", " ", re.sub(r"```\w*\s*\n|`", "", prompt))
    return prompt if rest == prompt else " ".join(rest.split())


NETWORKS = {"aesthetic": Aesthetic, "hpsv2": HPSv2, "image_reward": ImageReward, "pick": PickScore,
            "vqa": CLIPFlanT5, "clip": JinaCLIP, "sci": SciScore,
            "clip_openai": OpenAIClip, "hpsv2_0": HPSv20, "vqa_xl": CLIPFlanT5XL}
PAPER = tuple(NETWORKS)[:7]
REWARDS = (*NETWORKS, *ANALYTIC)                                  # the order of the columns


def scorer_of(name: str, models: str | None, pins: dict) -> Scorer:
    """A reward, its network not loaded yet. UserError: a file of it is missing."""
    if name in ANALYTIC:
        return Scorer(name, shapes.version(name))
    kind, device = NETWORKS[name], best_device()
    folders = [fetch(*source, models, f"{name} needs", pins) for source in kind.SOURCES]
    digests = [revision(folder, patterns) for folder, (_, patterns) in zip(folders, kind.SOURCES)]
    for folder in folders:                       # of the hub: its name is the commit
        digests += [f"@{folder.name[:12]}"] if folder.parent.name == "snapshots" else []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    load = partial(kind, folders, device, dtype)
    return Scorer(name, f"{kind.__name__} {'+'.join(digests)}", kind.VIEW, load)


def fetch(repository: str, patterns: Sequence[str], models: str | None, why: str,
          pins: dict = {}) -> Path:
    """The folder of a repository's files: below `models`, as MODELS/OWNER/NAME, or from the hub
    (pins: {repository: commit}, else the newest), or of aesthetic's head, which no hub serves, from
    its page: the right file, or none. UserError: a file is missing."""
    import huggingface_hub                       # here: training needs none of this
    folder, head = Path(models or torch.hub.get_dir(), repository), Aesthetic.HEAD
    needed = f"{why} {', '.join(patterns)} of {repository}"
    try:
        if not models and head not in patterns:
            folder = Path(huggingface_hub.snapshot_download(
                repository, revision=pins.get(repository), allow_patterns=patterns))
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
    parser = Parser(description="score every picture with its captions")
    add = parser.add_argument
    add("data", help="DATA, as python data.py import writes it")
    add("--rewards", default="analytic", help="analytic: those that suit the captions (default); "
        f"all: the paper's seven; or some of {','.join(REWARDS)}")
    add("--batch", type=between(int, 1), default=128 if torch.cuda.is_available() else 32,
        help="pictures at once, in each process (default: %(default)s)")
    add("--workers", type=between(int), default=0, help="processes that read pictures, per rank")
    add("--models", help="folder with OWNER/NAME/files of the hub; default: from the hub")
    add("--pin", nargs="+", default=[], metavar="OWNER/NAME@COMMIT", help="what the hub gives")
    add("--table", metavar="FILE.csv", help="also write a row a pair of --rewards' scores; or "
        "FILE.parquet")
    args = parser.parse_args()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.table and ranks > 1:
        raise UserError("--table: run the same command once more without torchrun")
    if args.table and Path(args.table).is_dir():
        raise UserError(f"--table {args.table} is a folder: name a file")
    data = Data(args.data)
    hold(args.data, rank=rank, ranks=ranks)
    suited = default_rewards(data.captions())
    names = {"all": PAPER, "analytic": suited}.get(args.rewards) or names_of(args.rewards)
    if "alignment" not in suited and "alignment" in names:
        raise UserError("alignment reads the captions of shapes.py alone, and this data has "
                        "others: leave it out of --rewards")
    if args.rewards == "analytic" and "alignment" not in names and rank == 0:
        print("alignment is left out: it reads the captions of shapes.py alone")
    pins, known = dict(map(pinned, args.pin)), {source[0] for kind in NETWORKS.values()
                                                for source in kind.SOURCES}
    if args.pin and args.models or None in pins.values() or not known.issuperset(pins):
        raise UserError(f"--pin {' '.join(args.pin)}: it is OWNER/NAME@COMMIT of {', '.join(known)}"
                        ", without --models")
    failures = score_dataset(data, names, args.batch, args.workers, rank, ranks, args.models,
                             pins)
    if ranks == 1:                           # torchrun kills all ranks when one of them fails
        refuse_too_many(len(failures), data.rows, args.data, "the reasons are listed above; the "
                        "same command tries them again")
    if args.table:
        write_table(data, names, Path(args.table))


if __name__ == "__main__":
    run(main)
