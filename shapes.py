"""The embedded world: draw a scene, write its caption, read a picture back, score it.

Not in the paper: stands in for 16 M web pictures. Coloured shapes on grey, captions that cover
GenEval's six tasks, a detector that reads a picture back, five rewards. Like web data it is flawed:
three captions in ten lie, and over half of the pictures are washed out, blurred, cluttered or badly
framed. They stay, labelled as bad by their rewards.

    python shapes.py runs/world --n 10000 --seed 0      # DATA, in the format of data.py
"""
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from scipy import ndimage
from tqdm import tqdm

from data import (Parser, Shard, UserError, between, hold, make_folder, pack, read_json, run,
                  shard_paths, stream, write_info, write_shard)

SHAPES = ("circle", "square", "triangle")
HUES = {"red": 0, "yellow": 52, "green": 125, "cyan": 185, "blue": 232, "pink": 310}  # degrees
COLORS = tuple(HUES)
NUMBERS = ("a", "two", "three", "four")                              # how a caption says 1, 2, 3, 4
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITES)
ENDINGS = ("", " in a drawing", " in a painting", " in a photo", " in a picture", " in a poster",
           " in a print", " in a scene", " in a sketch")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval
WORDS = tuple(sorted(set(" ".join((*SHAPES, *(f"{shape}s" for shape in SHAPES), *COLORS, *NUMBERS,
                                   *RELATIONS, *ENDINGS, "and")).split())))

# where one thing is drawn, two, three, four; and between which r
PLACES = (((0.5, 0.5),), ((0.24, 0.5), (0.76, 0.5)), ((0.5, 0.25), (0.25, 0.65), (0.75, 0.65)),
          ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)))
SIZES = ((0.26, 0.30), (0.178, 0.188), (0.163, 0.173), (0.155, 0.165))
SIZE = 24                                                              # of a side, in pixels
SATURATION = (0.4, 0.8)                                                # of things
FAULTS = {"wash": 0.16, "blur": 0.16, "clutter": 0.2, "frame": 0.16}   # shares of the pictures

# A circle is a ring: at 24 pixels a disc and a square differ by a few corners. All shapes have the
# same area, so that asking for what grows with it (colourfulness) contradicts no caption. With r=1:
HOLE = 0.5                                       # the inner radius of a circle
AREA = (1 - HOLE ** 2) * math.pi
SQUARE = math.sqrt(AREA) / 2                     # half its side
INNER = math.sqrt(AREA / math.sqrt(27))          # the inradius of the triangle, an equilateral one
REACH = {"circle": (1, 1, 1), "square": (SQUARE, SQUARE, SQUARE),      # from the centroid sideways,
         "triangle": (math.sqrt(3) * INNER, 2 * INNER, INNER)}         # up and down


@dataclass
class Thing:
    """One shape: x, y its centroid and r its size, as fractions of the side; y grows downwards."""
    shape: str
    color: str
    x: float
    y: float
    r: float


@dataclass
class Scene:
    """What is drawn (things on a grey background) and how it is spoilt: degrees in [0, 1]."""
    things: list
    background: float
    saturation: float
    wash: float = 0.0
    blur: float = 0.0
    clutter: float = 0.0
    frame: float = 0.0


@dataclass
class Group:
    """One phrase of a caption: `count` things of one shape, in one colour or in any (None)."""
    count: int
    color: str | None
    shape: str


@dataclass
class Claims:
    """What a caption says: one or two groups and, of two, where the first is."""
    groups: list
    relation: str | None = None


def write_world(folder, n: int, seed: int, size: int = SIZE, shard: int = 1000) -> None:
    """Write n samples as DATA, `shard` of them a file: the same for the same arguments. Finished
    shards stay: run again after an interruption. UserError: the folder holds other data."""
    folder = make_folder(folder)
    start = [sample(seed, i, size) for i in range(min(n, 16))]      # an older shapes.py drew others
    drawn = hashlib.sha256(b"".join(x.tobytes() + caption.encode() for x, caption, _ in start))
    world = dict(n=n, seed=seed, size=size, shard=shard, drawn=drawn.hexdigest()[:16])
    info, notes = folder / "data.json", [Shard(path).metadata for path in shard_paths(folder)]
    notes += [read_json(info)] if info.exists() else []
    for other in (note.get("world") for note in notes):
        if other != world:
            raise UserError(f"{folder} holds {other or 'other data'}, not of the world {world}: "
                            "remove it, or draw this world elsewhere with python shapes.py OUT and "
                            "train with --data OUT")
    shards = -(-n // shard)
    for number in tqdm(range(shards), desc="drawing the world", unit="shard", disable=None):
        path = folder / f"{number:05d}.safetensors"
        if not path.exists():
            indices = range(n)[number * shard:(number + 1) * shard]
            pictures, texts, _ = zip(*(sample(seed, i, size) for i in indices))
            keys, key_ends = pack([f"{i:08d}" for i in indices])
            captions, caption_ends = pack(texts)
            write_shard(path, dict(pixels=np.stack(pictures).transpose(0, 3, 1, 2), keys=keys,
                                   key_ends=key_ends, captions=captions, caption_ends=caption_ends,
                                   pair_ends=np.arange(1, len(texts) + 1)), world=world)
    if not info.exists():                                  # longest: of a caption, in words
        write_info(folder, dict(kind="pixels", size=size, shards=shards, samples=n, pairs=n,
                                left_out={}, words=list(WORDS), longest=11, world=world))


def sample(seed: int, index: int, size: int, clean: bool = False) -> tuple:
    """Picture `index` of the world `seed`: (uint8 (size, size, 3), caption, parameters). Each of
    FAULTS strikes its share of the pictures, independently and by a uniform degree, so that 53 %
    have at least one; clean: none, and no caption lies."""
    rng, caption = stream(seed, "scene", index), None
    while caption is None or held_out(caption):
        things, claims = compose("any", rng)
        kind = None
        if not clean and rng.random() < 0.3:
            kind, claims = lie(claims, rng)
        caption = write(claims) + pick(ENDINGS, rng)
    scene = Scene(things, background=rng.uniform(0.3, 0.7), saturation=rng.uniform(*SATURATION))
    if not clean:
        degrees = rng.uniform(0.3, 1, 4) * (rng.random(4) < list(FAULTS.values()))
        scene = replace(scene, **dict(zip(FAULTS, degrees.tolist())))
    return draw(scene, size, rng), caption, {"caption_lies": kind, **asdict(scene)}


def prompts(task: str, n: int, seed: int) -> list:
    """n captions of a task that training never sees (held_out). They repeat where few exist."""
    rng, captions = stream(seed, "prompts", TASKS.index(task)), []
    while len(captions) < n:
        caption = write(compose(task, rng)[1]) + pick(ENDINGS, rng)
        if held_out(caption):
            captions.append(caption)
    return captions


def held_out(caption: str) -> bool:
    """One caption in five is never used in training. Most of its claims are, with another ending:
    an unseen string, not an unseen combination."""
    return hashlib.sha256(caption.encode()).digest()[0] % 5 == 0


def pick(values: Sequence, rng: np.random.Generator):
    """One of the values, each as likely."""
    return values[rng.integers(len(values))]


# ---- scenes and captions -------------------------------------------------------------------------

def compose(task: str, rng: np.random.Generator) -> tuple:
    """Things for a task and the true claims about them: (list of Thing, Claims). "any": GenEval's
    six and their mixtures, more of those with several things, which are harder to learn. Joined by
    "and", the first is the left or upper one, as one reads."""
    if task == "any":
        task = pick(("single_object", "colors", "color_count", "color_position", "color_attr")
                    + 2 * ("two_object", "position", "color_attr") + 3 * ("counting",), rng)
    colored = task.startswith("color")
    if task in ("two_object", "position", "color_attr", "color_position"):
        two = rng.permutation(len(SHAPES))[:2]
        things = arrange([(SHAPES[shape], pick(COLORS, rng)) for shape in two], rng)
        if task in ("two_object", "color_attr"):
            things.sort(key=lambda thing: thing.x + thing.y)
        groups = [Group(1, t.color if colored else None, t.shape) for t in things]
        relation = None
        if task in ("position", "color_position"):
            relation = max(RELATIONS, key=lambda name: holds(name, *things))
        return things, Claims(groups, relation)
    count = pick((2, 3, 4), rng) if task in ("counting", "color_count") else 1
    shape, color = pick(SHAPES, rng), pick(COLORS, rng)
    things = arrange([(shape, color)] * count, rng)
    return things, Claims([Group(count, color if colored else None, shape)])


def arrange(kinds: list, rng: np.random.Generator) -> list:
    """Things of the (shape, color) given: one in the middle, two in a row or a column, three at the
    corners of a triangle, four in the quarters, all a little off, each by its own and together."""
    n = len(kinds)
    r, places = rng.uniform(*SIZES[n - 1], n), np.array(PLACES[n - 1])           # (n,), (n, 2)
    if n == 2:
        places = places[:, rng.permutation(2)]
    if n == 3 and rng.random() < 0.5:
        places[:, 1] = 1 - places[:, 1]
    x, y = (rng.permutation(places) + rng.uniform(-0.04, 0.04, 2)
            + rng.uniform(-0.01, 0.01, (n, 2))).T
    side, up, down = np.array([REACH[shape] for shape, _ in kinds]).T * r + 0.02     # uncut
    x, y = np.clip(x, side, 1 - side), np.clip(y, up, 1 - down)
    return [Thing(*k, float(a), float(b), float(c)) for k, a, b, c in zip(kinds, x, y, r)]


def holds(relation: str, a: Thing, b: Thing) -> float:
    """GenEval's position rule: the offset of centres, less 0.1 x the summed box sizes, over its
    length before that; here every box is 2 r wide and high (evaluate.py takes the exact ones).
    Returns the component along the relation, in [-1, 1]; the relation holds above 0.5."""
    offset = np.array([a.x - b.x, a.y - b.y])
    clear = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * 2 * (a.r + b.r), 0)
    dx, dy = clear / max(np.linalg.norm(offset), 1e-6)
    return float({"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation])


def lie(claims: Claims, rng: np.random.Generator) -> tuple:
    """Change one claim to a false one: (kind of lie, new Claims)."""
    groups = [Group(**asdict(group)) for group in claims.groups]
    kinds = ["shape", "count"]
    if groups[0].color:
        kinds += ["color", "color"]
    if claims.relation:
        kinds += ["side", "side"]
    if len(groups) == 2 and groups[0].color and groups[0].color != groups[1].color:
        kinds += ["swap", "swap"]
    kind, group, relation = pick(kinds, rng), pick(groups, rng), claims.relation
    if kind == "shape":
        group.shape = pick([shape for shape in SHAPES if shape != group.shape], rng)
    elif kind == "count":
        group.count = pick([count for count in (1, 2, 3, 4) if count != group.count], rng)
    elif kind == "color":
        group.color = pick([color for color in COLORS if color != group.color], rng)
    elif kind == "side":
        relation = OPPOSITES[relation]                              # never true
    else:
        groups[0].color, groups[1].color = groups[1].color, groups[0].color
    return kind, Claims(groups, relation)


def draw(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Paint a scene and spoil it by its degrees: uint8 (size, size, 3). rng places the clutter."""
    angle = rng.uniform(0, 2 * math.pi)
    dx, dy = 0.5 * scene.frame * math.cos(angle), 0.5 * scene.frame * math.sin(angle)
    picture = np.full((size, size, 3), scene.background)
    for thing in scene.things:
        alpha = coverage(thing.shape, thing.x + dx, thing.y + dy, thing.r, size)[0, :, :, None]
        picture += alpha * (rgb(HUES[thing.color], scene.saturation) - picture)
    for _ in range(round(36 * scene.clutter)):
        side = max(1, round(size * rng.uniform(0.12, 0.18)))
        i, j = rng.integers(0, size - side + 1, 2)
        picture[i:i + side, j:j + side] = confetti(rng.uniform(0, 360), scene.background)
    if scene.blur:
        blur = ImageFilter.GaussianBlur(0.06 * size * scene.blur)
        picture = np.asarray(Image.fromarray(to_uint8(picture)).filter(blur)) / 255
    return to_uint8(picture + scene.wash * (0.8 - picture))


def coverage(shape: str, x, y, r, size: int) -> np.ndarray:
    """The share of each pixel that shapes cover, (N, size, size) in [0, 1]: the signed distance to
    the outline, cut at half a pixel. x, y, r: one or (N,), as in Thing."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y, r = (np.reshape(a, (-1, 1, 1)).astype(np.float32) for a in (x, y, r))
    u, v = (grid[None, None, :] - x) / r, (grid[None, :, None] - y) / r     # (N, 1, S), (N, S, 1)
    if shape == "circle":
        distance = np.abs(np.hypot(u, v) - (1 + HOLE) / 2) - (1 - HOLE) / 2      # (N, S, S)
    elif shape == "square":
        distance = np.maximum(np.abs(u), np.abs(v)) - SQUARE                     # (N, S, S)
    else:                                                                # standing on its base
        distance = np.maximum(v, (math.sqrt(3) * np.abs(u) - v) / 2) - INNER     # (N, S, S)
    return np.clip(0.5 - distance * r * size, 0, 1)


def rgb(hue: float, saturation: float) -> np.ndarray:
    """HSV to RGB at value 0.95: (3,) in [0, 1] with chroma (max - min) 0.95 * saturation."""
    k = (np.array([5, 3, 1]) + hue / 60) % 6
    return 0.95 * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))


def confetti(hue: float, grey: float) -> np.ndarray:
    """The strongest colour of a hue that is as light as a grey: contrast loses by it. (3,)."""
    tint = rgb(hue, 1)
    tint = tint - tint @ (0.2126, 0.7152, 0.0722)
    room = np.where(tint > 0, 1 - grey, grey)
    return grey + tint * (room / np.abs(tint)).min()


def to_uint8(picture: np.ndarray) -> np.ndarray:
    """[0, 1] → uint8, rounded."""
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def write(claims: Claims) -> str:
    """The caption of some claims, without an ending: "a red circle left of two squares"."""
    phrases = []
    for group in claims.groups:
        noun = group.shape if group.count == 1 else f"{group.shape}s"
        phrases.append(" ".join(filter(None, (NUMBERS[group.count - 1], group.color, noun))))
    return f" {claims.relation or 'and'} ".join(phrases)


_GROUP = rf"({'|'.join(NUMBERS)}) (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})s?"
_CAPTION = re.compile(rf"{_GROUP}(?: (and|{'|'.join(RELATIONS)}) {_GROUP})?"
                      rf"(?:{'|'.join(ENDINGS)})")


def parse(caption: str) -> Claims:
    """Read a caption of this world. UserError, with what is valid: any other text."""
    match = _CAPTION.fullmatch(" ".join(caption.lower().strip(" .").split()))
    if match is None:
        raise UserError(
            f"{caption!r} is not a caption of the embedded world: write one or two phrases such as "
            f"'two red circles', joined by 'and' or one of {', '.join(RELATIONS)}; shapes: "
            f"{', '.join(SHAPES)}; colors: {', '.join(COLORS)}; numbers: {', '.join(NUMBERS)}")
    parts = match.groups()
    groups = [Group(NUMBERS.index(number) + 1, color, shape)
              for number, color, shape in (parts[:3], parts[4:]) if number]
    return Claims(groups, parts[3] if parts[3] in RELATIONS else None)


# ---- the reader ----------------------------------------------------------------------------------

def detect(pictures: torch.Tensor) -> list:
    """Read pictures back: uint8 (B, 3, S, S) → a list (B) of lists of Thing.

    The background is grey, so chroma (max - min over RGB) is linear in a shape's coverage and
    survives washing out. Pixels above half of a picture's strong chroma (the 98th percentile: stray
    ones do not set the scale), joined to neighbours of the same hue, are a component; its shape is
    the one that, drawn with the same area at the same centroid, differs least."""
    x, (B, S) = pictures.movedim(1, -1).float() / 255, pictures.shape[::3]       # (B, S, S, 3)
    low = x.amin(-1, keepdim=True)                                               # (B, S, S, 1)
    chroma = x.amax(-1, keepdim=True) - low                                      # (B, S, S, 1)
    tint = (x - low) / chroma.clamp(min=1e-6)                   # the pixel at full saturation
    pure = torch.tensor(np.array([rgb(hue, 1.0) / 0.95 for hue in HUES.values()]), dtype=x.dtype)
    color = (tint @ (2 * pure.T) - pure.square().sum(1)).argmax(-1)        # nearest pure, (B, S, S)
    peak = chroma.flatten(1).quantile(0.98, dim=1)[:, None, None]                # (B, 1, 1)
    alpha = (chroma[..., 0] / peak.clamp(min=1e-6)).clamp(max=1).numpy()         # (B, S, S)
    inside = (alpha > 0.5) & (peak > 0.12).numpy()     # paler than 0.12 is too faint to be read
    color = np.where(inside, color, -1)
    label = components(color)
    ids, pixels = np.unique(label[inside], return_counts=True)
    rim = (label == 0) & (alpha > 0.08)                 # half-covered rim pixels join a neighbour
    label = np.where(rim, ndimage.maximum_filter(label, (1, 3, 3), mode="constant"), label)
    label[np.isin(label, ids[pixels < 6])] = 0          # so few are a stray or a cut piece

    b, i, j = np.nonzero(label)
    ids, owner = np.unique(label[b, i, j], return_inverse=True)                  # (N,), (pixels,)
    weight = alpha[b, i, j]
    area = np.bincount(owner, weight, len(ids))                                  # (N,)
    across = np.bincount(owner, weight * (j + 0.5), len(ids)) / area / S         # (N,)
    down = np.bincount(owner, weight * (i + 0.5), len(ids)) / area / S           # (N,)
    r = np.sqrt(area / AREA) / S                                                 # (N,)
    seen = np.zeros((len(ids), S, S), np.float32)
    seen[owner, i, j] = weight
    error = [((coverage(shape, across, down, r, S) - seen) ** 2).sum((1, 2)) for shape in SHAPES]
    things = [[] for _ in range(B)]
    for n, shape in enumerate(np.argmin(error, 0)):                              # (N,)
        place = ids[n] - 1
        things[place // S ** 2].append(Thing(SHAPES[shape], COLORS[color.flat[place]],
                                             float(across[n]), float(down[n]), float(r[n])))
    return things


def components(color: np.ndarray) -> np.ndarray:
    """Indices into COLORS, -1 = none, (B, S, S) → the component of each pixel, (B, S, S): 1 + the
    place of its last pixel in the array, 0 = none."""
    planes = color[:, None] == np.arange(len(COLORS))[:, None, None]             # (B, colors, S, S)
    links = np.zeros((3, 3, 3, 3), bool)                # none between pictures or colours
    links[1, 1] = ndimage.generate_binary_structure(2, 1)
    label, n = ndimage.label(planes, links)
    label = label.sum(1)                                # a pixel has one colour:  (B, S, S)
    last = np.zeros(n + 1, int)
    last[label.flat] = np.arange(1, label.size + 1)     # of equal indices the last one counts
    return np.where(label > 0, last[label], 0)


def truth(claims: Claims, things: list) -> float:
    """The share of a caption's statements that are true of the things. A group states its count
    (exactly so many of the shape) and, if it names one, its colour (so many of the shape have it);
    a relation is one statement more (some pair stands so)."""
    statements, members = [], []
    for group in claims.groups:
        alike = [g for g in claims.groups if g.shape == group.shape]
        same = [t for t in things if t.shape == group.shape]
        statements.append(len(same) == sum(g.count for g in alike))
        if group.color:
            same = [t for t in same if t.color == group.color]
            statements.append(len(same) >= sum(g.count for g in alike if g.color == group.color))
        members.append(same)
    if claims.relation:
        statements.append(any(holds(claims.relation, a, b) > 0.5
                              for a in members[0] for b in members[1] if a is not b))
    return sum(statements) / len(statements)


# ---- the rewards: images uint8 (B, 3, H, W), prompts (B) of str -> (B,) --------------------------
# None is in the paper. In float64, which `score_all` rounds to float32: sums that another batch
# size, thread count or machine adds up in another order still give the same score.

def alignment(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The share of the caption's statements that are true in the picture: 0 to 1. For the paper's
    VQA and CLIP scores. ValueError: a caption that is not of this world's grammar."""
    shares = [truth(parse(prompt), things) for prompt, things in zip(prompts, detect(images))]
    return torch.tensor(shares, dtype=torch.float64)                             # (B,)


def colorfulness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """sqrt(var rg + var yb) + 0.3 sqrt(mean² rg + mean² yb), rg = R - G, yb = (R + G) / 2 - B.

    Hasler & Süsstrunk 2003, their M3, on 0..255 RGB with population variances: 0 is grey, 33
    moderately, 59 quite, 109 extremely colourful. For the paper's aesthetic score, as it can be
    hacked: confetti raises it and ruins alignment."""
    red, green, blue = images.double().unbind(1)                                 # (B, H, W)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)     # (B, 2, HW)
    spread = opponents.var(2, correction=0).sum(1).sqrt()                        # (B,)
    return spread + 0.3 * opponents.mean(2).square().sum(1).sqrt()               # (B,)


def luminance(images: torch.Tensor) -> torch.Tensor:
    """Luma: Rec. 709 weights on the sRGB values as they are stored, (B, H, W) in 0..255."""
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    return (images.double() * weights.view(3, 1, 1)).sum(1)                      # (B, H, W)


def contrast(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """RMS contrast (Peli 1990, "Contrast in complex images"): the population standard deviation of
    the luminance in units of white, 0 to 0.5. Washed-out pictures are its bad ones."""
    return luminance(images).flatten(1).std(1, correction=0) / 255               # (B,)


def sharpness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """How much of the contrast around them edges cross in one pixel: 0 (flat) to nearly 1.

    g = |difference of neighbours| over 5 (a stray grey level is no sharp edge) + the range of the
    9 x 9 around; the score is sum g³ / sum g², the mean of g over edges: how steep they are, not
    how many or how strong. After Bahrami and Kot 2014. Blurred pictures are its bad ones."""
    y = luminance(images)[:, None]                                               # (B, 1, H, W)
    span = F.max_pool2d(y, 9, 1, 4) + F.max_pool2d(-y, 9, 1, 4) + 5              # (B, 1, H, W)
    across = y.diff(dim=3).abs() / torch.maximum(span[..., 1:], span[..., :-1])
    down = y.diff(dim=2).abs() / torch.maximum(span[..., 1:, :], span[..., :-1, :])
    g = torch.cat([across.flatten(1), down.flatten(1)], 1)                       # (B, 2 H W - ...)
    return g.pow(3).sum(1) / g.square().sum(1).clamp(min=1e-9)                   # (B,)


def composition(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """How centred the picture's mass is, and how little of it the frame cuts: 0 to 1.

    (1 - distance of the saliency's centroid from the centre, in half sides, at most 1) * (1 - share
    of it on the border); saliency = distance of a pixel's colour from the median of the border.
    Badly framed pictures are its bad ones, and flat ones (0); noise, a centred texture, is not."""
    x, (H, W) = images.double(), images.shape[2:]
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, 1:-1, 0], x[:, :, 1:-1, -1]], 2)
    background = border.median(2).values[:, :, None, None]                       # (B, 3, 1, 1)
    saliency = (x - background).square().sum(1).sqrt()                           # (B, H, W)
    mass = saliency.sum((1, 2)).clamp(min=1e-9)       # of whole numbers: 0 or at least 1, (B,)
    right, down = ((torch.arange(n, dtype=torch.float64) + 0.5) / (n / 2) - 1 for n in (W, H))
    off = torch.hypot((saliency.sum(1) * right).sum(1), (saliency.sum(2) * down).sum(1)) / mass
    inside = saliency[:, 1:-1, 1:-1].sum((1, 2)) / mass                          # (B,)
    return (1 - off).clamp(min=0) * inside                                       # (B,)


# The table that a fork extends, also by a function around a small network; the order of columns.
SCORERS = {"alignment": alignment, "colorfulness": colorfulness, "contrast": contrast,
           "sharpness": sharpness, "composition": composition}
ANALYTIC = tuple(SCORERS)


@torch.no_grad()
def score_all(names: Sequence[str], images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Rewards of pairs in their units: images uint8 (B, 3, H, W), prompts (B) → (B, R) float32, R
    as in names. UserError: a prompt that alignment cannot parse."""
    assert images.dtype == torch.uint8 and images.shape[1] == 3, (images.dtype, images.shape)
    assert len(images) == len(prompts), (len(images), len(prompts))
    scores = torch.empty(len(images), len(names))                                # (B, R)
    for r, name in enumerate(names):
        found = SCORERS[name](images.cpu(), prompts)
        assert found.shape == scores[:, r].shape, f"{name} gave {found.shape}, not ({len(images)},)"
        scores[:, r] = found
    return scores


def version(name: str) -> str:
    """12 hex digits of the file in which a scorer is defined: after any change of it, be it of a
    comment, the scores are made anew; a file of weights beside it does not count."""
    return code_digest(inspect.unwrap(SCORERS[name]))


@cache
def code_digest(function: Callable) -> str:
    """12 hex digits of a function's file when it is first asked for: an edit does not end a run."""
    return hashlib.sha256(Path(inspect.getsourcefile(function)).read_bytes()).hexdigest()[:12]


def main():
    """Write some of the embedded world."""
    parser = Parser(description="write the embedded world as DATA")
    parser.add_argument("data", help="folder to write to")
    parser.add_argument("--n", type=between(int, 1), default=10000, help="pictures")
    parser.add_argument("--seed", type=between(int), default=0)
    parser.add_argument("--size", type=between(int, 16, 512), default=SIZE, help="side in pixels")
    args = parser.parse_args()
    hold(make_folder(args.data))
    write_world(args.data, args.n, args.seed, args.size)


if __name__ == "__main__":
    run(main)
