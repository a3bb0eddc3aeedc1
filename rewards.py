"""Rewards: score every picture with its captions, once, before training.

The five rewards here are analytic. They measure the pixels and the caption and nothing else, so
the same code scores the data and the pictures that a model generates. None is in the paper, whose
seven rewards are networks of 0.3 to 11 billion parameters: these need no download.

`python rewards.py DATA` writes <shard>.scores.jsonl beside each tar (or into the picture folder):
    {"format": 1, "shard": "00000", "rewards": {name: version of its scorer}, "size": 24, ...}
    {"key": "000000000", "captions": [a hash of each], "scores": {name: [a score per caption]}}
    {"key": "000000001", "error": "why there is no score"}
Finished shards and finished rewards are skipped, so the same command again continues a run that
was killed. `torchrun rewards.py DATA` shares the shards among its ranks.
"""
import argparse
import hashlib
import json
import math
import os
import sys
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from tqdm import tqdm

import shapes
from data import MAX_UNREADABLE, Pictures, Shard

ENDING = ".scores.jsonl"         # of a sidecar: <shard name>.scores.jsonl


# ---- the rewards: images uint8 (B, 3, H, W), prompts list (B) of str -> (B,) float64 -------------
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
    sum g³ / sum g², the mean of g over edges: how steep they are counts, not how many they are nor
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
    "alignment": (alignment, "3"),
    "colorfulness": (colorfulness, "1"),
    "contrast": (contrast, "1"),
    "sharpness": (sharpness, "3"),
    "composition": (composition, "1"),
}
REWARDS = tuple(SCORERS)


def score(name: str, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """One reward of pairs: images uint8 (B, 3, H, W), prompts (B) → (B,) float32, in its own units.

    ValueError: an unknown reward; for alignment, a prompt that shapes.py cannot parse.
    """
    check_names((name,))
    assert images.dtype == torch.uint8 and images.shape[1] == 3, (images.dtype, images.shape)
    assert len(images) == len(prompts), (len(images), len(prompts))
    return SCORERS[name][0](images.cpu(), prompts).float()


def score_all(names: Sequence[str], images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Several rewards: images uint8 (B, 3, H, W), prompts (B) → (B, R) float32, R as in names."""
    scores = torch.empty(len(images), len(names))
    for r, name in enumerate(names):
        scores[:, r] = score(name, images, prompts)
    return scores


# ---- which rewards -------------------------------------------------------------------------------

def check_names(names: Sequence[str]) -> None:
    """ValueError, with the valid names, if one is unknown or is there twice."""
    for name in names:
        if name not in REWARDS:
            raise ValueError(f"unknown reward {name!r}; valid: {', '.join(REWARDS)}")
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
    """The rewards that suit these captions, or tuples of captions (Pictures.captions)."""
    foreign = foreign_caption(captions) is not None
    return tuple(name for name in REWARDS if name != "alignment" or not foreign)


def choose_rewards(text: str, captions: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """--rewards → names in the order of REWARDS. ValueError: unknown, or not for this data."""
    if text == "all":
        return default_rewards(captions)
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


def hashes(captions: tuple[str, ...]) -> list[str]:
    """16 hex digits a caption, by which a sidecar knows that a caption was changed."""
    return [hashlib.sha256(caption.encode()).hexdigest()[:16] for caption in captions]


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
        wrong = None if isinstance(line.get("error"), str) else wrong_part(line, header["rewards"])
        if wrong:
            raise ValueError(f"{path}: key {key!r} has {wrong}; {redo}")
        lines[key] = line
    if header is None:
        raise ValueError(f"{path} is empty; {redo}")
    return header, lines


def is_header(line) -> bool:
    """Is this first line what write_sidecar writes?"""
    return (isinstance(line, dict) and line.get("format") == 1 and "shard" in line
            and isinstance(line.get("rewards"), dict) and isinstance(line.get("size"), int))


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
            if type(value) not in (float, int) or not math.isfinite(value):
                return f"the {name} score {value!r}, which is not a finite number"
    return None


def write_sidecar(path: Path, shard: str, names: Sequence[str], size: int, lines: list) -> None:
    """Write the sidecar whole or not at all: after a kill it is the old one or the new one."""
    header = {"format": 1, "shard": shard, "rewards": {name: SCORERS[name][1] for name in names},
              "size": size, "versions": {"torch": str(torch.__version__),
                                         "numpy": np.__version__, "pillow": PIL.__version__}}
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w") as file:
        file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in (header, *lines))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def scored_names(pictures: Pictures) -> tuple[str, ...]:
    """The rewards that the first shard has scores of. FileNotFoundError: it was never scored."""
    path = sidecar(pictures.shards[0])
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run python rewards.py "
                                    f"{pictures.path} --size {pictures.size}")
    return tuple(name for name in REWARDS if name in read_sidecar(path)[0]["rewards"])


def read_scores(pictures: Pictures, names: Sequence[str]) -> tuple[list[int], list[np.ndarray]]:
    """The scores of a dataset: its scored rows, and for each float64 (captions, R), all finite.

    Columns are as names. Samples whose scoring failed are left out (--retry tries them again).
    FileNotFoundError or ValueError, naming file and key: a shard, a reward or a sample was never
    scored, or was with other captions, another size or another scorer, or a sidecar is damaged.
    """
    check_names(names)
    pieces, raws = {}, [None] * len(pictures)
    for shard in pictures.shards:            # Pictures.select may have cut a shard into many
        pieces.setdefault(sidecar(shard), []).append(shard)
    redo = f"run python rewards.py {pictures.path} --size {pictures.size}"
    for path, shards in pieces.items():
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; {redo}")
        header, lines = read_sidecar(path)
        if header["size"] != pictures.size:
            raise ValueError(f"{path} has the scores of pictures of {header['size']} pixels, not "
                             f"{pictures.size}; pass --size {header['size']} or {redo}")
        for name in names:
            if header["rewards"].get(name) != SCORERS[name][1]:
                raise ValueError(f"{path} has no {name} scores of version {SCORERS[name][1]}; "
                                 f"{redo} --rewards {name}")
        for row in (row for shard in shards for row in range(shard.start, shard.stop)):
            key, captions = pictures.keys[row], pictures.captions[row]
            if key not in lines:
                raise ValueError(f"{path}: key {key!r} has no scores; {redo}")
            if "error" in lines[key]:
                continue
            if lines[key]["captions"] != hashes(captions):
                raise ValueError(f"{path}: the captions of key {key!r} have changed since they "
                                 f"were scored; {redo}")
            columns = [lines[key]["scores"][name] for name in names]
            raws[row] = np.array(columns, np.float64).reshape(len(names), len(captions)).T
    rows = [row for row, raw in enumerate(raws) if raw is not None]
    return rows, [raws[row] for row in rows]


# ---- scoring -------------------------------------------------------------------------------------

def score_images(pictures: Pictures, images: dict[int, torch.Tensor], names: Sequence[str]) -> dict:
    """Rewards of some rows, given their pictures: {row: {name: [a score per caption]}}."""
    pairs = [(row, caption) for row in images for caption in pictures.captions[row]]
    raw = score_all(names, torch.stack([images[row] for row, _ in pairs]),
                    [caption for _, caption in pairs])                           # (pairs, R)
    scores = {row: {name: [] for name in names} for row in images}
    for (row, _), values in zip(pairs, raw.tolist()):
        for name, value in zip(names, values):
            if not math.isfinite(value):
                raise ValueError(f"{name} came out as {value}")
            scores[row][name].append(value)
    return scores


def score_rows(pictures: Pictures, rows: Sequence[int], names: Sequence[str]) -> dict:
    """Rewards of some rows: {row: {name: [a score per caption]}, or the reason for having none}."""
    images, results = {}, {}
    for row in rows:
        try:
            images[row] = pictures.picture(row)
        except ValueError as error:
            results[row] = str(error)
    try:
        return results | (score_images(pictures, images, names) if images else {})
    except ValueError:                       # one sample stops its batch: find out which it is
        for row, image in images.items():
            try:
                results |= score_images(pictures, {row: image}, names)
            except ValueError as error:
                results[row] = str(error)
    return results


def score_shard(pictures: Pictures, shard: Shard, names: Sequence[str], batch: int, retry: bool,
                bar: tqdm) -> list[dict]:
    """Bring one sidecar up to date, and return its lines.

    Scores stay if scorer version, size and captions are the same; failures stay unless `retry`. A
    sample that fails one reward has no scores at all: its vector of levels would have a hole.
    """
    path, keys = sidecar(shard), pictures.keys[shard.start:shard.stop]
    header, old = read_sidecar(path) if path.exists() else ({"rewards": {}, "size": None}, {})
    kept = [name for name, version in header["rewards"].items()
            if version == SCORERS[name][1] and header["size"] == pictures.size]
    columns = tuple(name for name in REWARDS if name in names or name in kept)
    added = tuple(name for name in columns if name not in kept)
    lines, todo = {}, {}                     # row -> line; names still to score -> rows
    for row, key in enumerate(keys, shard.start):
        line = old.get(key, {})
        lines[row] = {"key": key, "captions": hashes(pictures.captions[row]), "scores": {}}
        if kept and "error" in line and not retry:
            lines[row] = line
            continue
        missing = columns
        if kept and line.get("captions") == lines[row]["captions"]:
            lines[row]["scores"], missing = line["scores"], added
        if missing:
            todo.setdefault(missing, []).append(row)
    bar.update(len(keys) - sum(len(rows) for rows in todo.values()))
    for missing, rows in todo.items():
        for first in range(0, len(rows), batch):
            results = score_rows(pictures, rows[first:first + batch], missing)
            for row, result in results.items():
                if isinstance(result, str):
                    lines[row] = {"key": lines[row]["key"], "error": result}
                else:
                    scores = lines[row]["scores"] | result
                    lines[row]["scores"] = {name: scores[name] for name in columns}
            bar.update(len(results))
    if todo or list(old) != keys or not path.exists():      # not there: a shard without samples
        write_sidecar(path, shard.name, columns, pictures.size, list(lines.values()))
    return list(lines.values())


def score_dataset(pictures: Pictures, names: Sequence[str], batch: int = 256, retry: bool = False,
                  rank: int = 0, world: int = 1) -> dict[str, str]:
    """Score the shards of one rank, and print the table of their scores.

    Returns {"shard/key": why it has no scores}, with the samples that lack a picture or caption.
    """
    mine = pictures.shards[rank::world]
    names_here = {shard.name for shard in mine}
    failures = {name: reason for name, reason in pictures.unreadable.items()
                if name.split("/")[0] in names_here}
    values = {name: array("d") for name in names}
    with tqdm(total=sum(shard.stop - shard.start for shard in mine), desc="scoring", unit="picture",
              disable=rank > 0) as bar:
        for shard in mine:
            for line in score_shard(pictures, shard, names, batch, retry, bar):
                if "error" in line:
                    failures[f"{shard.name}/{line['key']}"] = line["error"]
                else:
                    for name in names:
                        values[name].extend(line["scores"][name])
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


def main() -> None:
    """The command line: score a folder, one sidecar a shard."""
    parser = argparse.ArgumentParser(description="score every picture with its captions")
    parser.add_argument("data", help="folder of tars, tar, brace range, glob or picture folder")
    parser.add_argument("--rewards", default="all",
                        help=f"all that suit the captions (default), or some of "
                             f"{','.join(REWARDS)}")
    parser.add_argument("--size", type=int, default=24, help="side in pixels to score at")
    parser.add_argument("--batch", type=int, default=256, help="pictures at once, in each process")
    parser.add_argument("--retry", action="store_true", help="try samples that failed before again")
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch < 1 or args.size < 3:
        raise ValueError("--batch must be at least 1 and --size at least 3")
    pictures = Pictures(args.data, args.size, memory_gb=0)            # each is looked at once
    samples = len(pictures) + len(pictures.unreadable)
    names = choose_rewards(args.rewards, pictures.captions)
    if args.rewards == "all" and "alignment" not in names and rank == 0:
        print("alignment is left out: it reads the captions of shapes.py alone")
    failures = score_dataset(pictures, names, args.batch, args.retry, rank, world)
    if len(failures) > MAX_UNREADABLE * samples / world:
        sentence = (f"{args.data}: {len(failures)} of {samples} samples failed (the limit is "
                    f"{MAX_UNREADABLE:.0%}); repair or remove them, then pass --retry")
        if world == 1:
            raise ValueError(sentence)
        print(sentence, file=sys.stderr)     # torchrun kills all ranks when one fails: let them end


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:  # a user's mistake: one sentence, no traceback
        print(error, file=sys.stderr)
        sys.exit(2)
