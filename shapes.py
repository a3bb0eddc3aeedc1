"""The embedded world: draw a scene, write its caption, read a picture back.

MIRO needs pictures, captions and rewards. This file makes them small enough for a laptop and exact
enough to be judged: coloured shapes on grey, captions that cover GenEval's six tasks, and a
detector that reads a picture back. Like web data the world is flawed on purpose: three captions in
ten lie, and over half of the pictures are washed out, blurred, cluttered or badly framed. That is
the point of the method: bad pictures stay in the data, labelled as bad by their rewards. One of
these can be hacked: most of the most colourful pictures are full of confetti.

    python shapes.py runs/world --n 10000 --seed 0      # tars of key.png, key.txt, key.json

Not in the paper, which trains on 16 M web pictures: this world stands in without a download.
"""
import argparse
import hashlib
import io
import json
import math
import os
import re
import sys
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from tqdm import tqdm

SHAPES = ("circle", "square", "triangle")
HUES = {"red": 0, "yellow": 52, "green": 125, "cyan": 185, "blue": 232, "pink": 310}  # degrees
COLORS = tuple(HUES)
NUMBERS = ("a", "two", "three", "four")                              # how a caption says 1, 2, 3, 4
PLURALS = ("circles", "squares", "triangles")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITES)
ENDINGS = ("", *(f" in a {kind}" for kind in ("drawing", "painting", "photo", "picture", "poster",
                                              "print", "scene", "sketch")))
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval
WORDS = tuple(sorted({word for phrase in (*SHAPES, *PLURALS, *COLORS, *NUMBERS, *RELATIONS,
                                          *ENDINGS, "and") for word in phrase.split()}))


# ------------------------------------------------------------------------------------- the outline

@dataclass
class Thing:
    """One shape: x, y its centroid and r its size, as fractions of the side; y grows downwards."""
    shape: str
    color: str
    x: float
    y: float
    r: float


# A circle is a ring: at 24 pixels a disc and a square differ by a few corners. The shapes have the
# same area: what grows with area (colourfulness, say) is as likely with one as with another then,
# and asking for it does not contradict a caption. In units of r²:
HOLE = 0.5                                       # the inner radius of a circle
AREA = (1 - HOLE ** 2) * math.pi
SQUARE = math.sqrt(AREA) / 2                     # half its side
INNER = math.sqrt(AREA / math.sqrt(27))          # the inradius of the triangle, an equilateral one
REACH = {"circle": (1, 1, 1), "square": (SQUARE, SQUARE, SQUARE),      # from the centroid sideways,
         "triangle": (math.sqrt(3) * INNER, 2 * INNER, INNER)}         # up and down


def coverage(kind: np.ndarray, x: np.ndarray, y: np.ndarray, r: np.ndarray, size: int):
    """The share of each pixel that a shape covers: drawing and reading use this one definition.

    kind: (N,) index into SHAPES; x, y, r: (N,) as in Thing; size: side in pixels.
    Returns (N, size, size) in [0, 1]: the signed distance to the outline, cut at half a pixel.
    """
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y, r = (np.asarray(a, np.float32)[:, None, None] for a in (x, y, r))
    u = (grid[None, None, :] - x) / r                                             # (N, 1, S)
    v = (grid[None, :, None] - y) / r                                             # (N, S, 1)
    au, av = np.abs(u), np.abs(v)
    distance = np.empty((len(r), size, size), np.float32)
    for shape, name in enumerate(SHAPES):
        n = np.asarray(kind) == shape
        if name == "circle":
            distance[n] = np.abs(np.hypot(u[n], v[n]) - (1 + HOLE) / 2) - (1 - HOLE) / 2
        elif name == "square":
            distance[n] = np.maximum(au[n], av[n]) - SQUARE
        else:                                                                # standing on its base
            distance[n] = np.maximum(v[n], (math.sqrt(3) * au[n] - v[n]) / 2) - INNER
    return np.clip(0.5 - distance * r * size, 0, 1)


def rgb(hue: float, saturation: float) -> np.ndarray:
    """HSV to RGB at value 0.95: (3,) in [0, 1] with chroma (max - min) 0.95 * saturation."""
    k = (np.array([5, 3, 1]) + hue / 60) % 6
    return 0.95 * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))


def confetti(hue: float, grey: float) -> np.ndarray:
    """The strongest colour of a hue that is as light as a grey: (3,) in [0, 1].

    Luminance (Rec. 709) hardly sees it: colourfulness gains by it, contrast loses."""
    tint = rgb(hue, 1)
    tint = tint - tint @ (0.2126, 0.7152, 0.0722)
    room = np.where(tint > 0, 1 - grey, grey)
    return grey + tint * (room / np.abs(tint)).min()


# -------------------------------------------------------------------------------------- the scenes

# the smallest and largest r where one thing is drawn, two, three, four
SIZES = ((0.26, 0.30), (0.178, 0.188), (0.163, 0.173), (0.155, 0.165))

SATURATION = (0.4, 0.8)                                                # of things
FAULTS = {"wash": 0.16, "blur": 0.16, "clutter": 0.2, "frame": 0.16}   # shares of the pictures


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


def arrange(kinds: list, rng: np.random.Generator) -> list:
    """Things of the (shape, color) given: one in the middle, two in a row or a column, three at the
    corners of a triangle, four in the quarters. All are a little off, each by its own and together;
    the more they are, the smaller, so that a picture holds about as much of them."""
    n = len(kinds)
    low, high = SIZES[n - 1]
    r = rng.uniform(low, high, n)
    if n == 1:
        places = np.array([(0.5, 0.5)])
    elif n == 2:
        places = np.array([(0.24, 0.5), (0.76, 0.5)])[:, rng.permutation(2)]     # a row, a column
    elif n == 3:
        places = np.array([(0.5, 0.25), (0.25, 0.65), (0.75, 0.65)])
        if rng.random() < 0.5:
            places[:, 1] = 1 - places[:, 1]
    else:
        places = np.array([(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)])
    x, y = (rng.permutation(places) + rng.uniform(-0.04, 0.04, 2)
            + rng.uniform(-0.01, 0.01, (n, 2))).T
    side, up, down = np.array([REACH[shape] for shape, _ in kinds]).T * r + 0.02     # uncut
    x, y = np.clip(x, side, 1 - side), np.clip(y, up, 1 - down)
    return [Thing(*k, float(a), float(b), float(c)) for k, a, b, c in zip(kinds, x, y, r)]


def draw(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Paint a scene and spoil it by its degrees: uint8 (size, size, 3). rng places the clutter."""
    angle = rng.uniform(0, 2 * math.pi)
    dx, dy = 0.5 * scene.frame * math.cos(angle), 0.5 * scene.frame * math.sin(angle)
    picture = np.full((size, size, 3), scene.background)
    shapes = coverage(np.array([SHAPES.index(t.shape) for t in scene.things]),
                      np.array([t.x + dx for t in scene.things]),
                      np.array([t.y + dy for t in scene.things]),
                      np.array([t.r for t in scene.things]), size)
    for thing, alpha in zip(scene.things, shapes[..., None]):
        picture += alpha * (rgb(HUES[thing.color], scene.saturation) - picture)
    for _ in range(round(36 * scene.clutter)):
        side = max(1, round(size * rng.uniform(0.12, 0.18)))
        i, j = rng.integers(0, size - side + 1, 2)
        picture[i:i + side, j:j + side] = confetti(rng.uniform(0, 360), scene.background)
    if scene.blur:
        blur = ImageFilter.GaussianBlur(0.06 * size * scene.blur)
        picture = np.asarray(Image.fromarray(to_uint8(picture)).filter(blur)) / 255
    return to_uint8(picture + scene.wash * (0.8 - picture))


def to_uint8(picture: np.ndarray) -> np.ndarray:
    """[0, 1] → uint8, rounded."""
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


# ------------------------------------------------------------------------------------ the captions

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


def write(claims: Claims) -> str:
    """The caption of some claims, without an ending: "a red circle left of two squares"."""
    phrases = []
    for group in claims.groups:
        kind = SHAPES.index(group.shape)
        noun = SHAPES[kind] if group.count == 1 else PLURALS[kind]
        phrases.append(" ".join(filter(None, (NUMBERS[group.count - 1], group.color, noun))))
    return f" {claims.relation or 'and'} ".join(phrases)


_GROUP = rf"({'|'.join(NUMBERS)}) (?:({'|'.join(COLORS)}) )?({'|'.join(PLURALS + SHAPES)})"
_CAPTION = re.compile(rf"{_GROUP}(?: (and|{'|'.join(RELATIONS)}) {_GROUP})?"
                      rf"(?:{'|'.join(ENDINGS)})")


def parse(caption: str) -> Claims:
    """Read a caption of this world. Raises ValueError, with what is valid, on any other text."""
    match = _CAPTION.fullmatch(" ".join(caption.lower().strip(" .").split()))
    if match is None:
        raise ValueError(
            f"{caption!r} is not a caption of the embedded world: write one or two phrases such as "
            f"'two red circles', joined by 'and' or one of {', '.join(RELATIONS)}; shapes: "
            f"{', '.join(SHAPES)}; colors: {', '.join(COLORS)}; numbers: {', '.join(NUMBERS)}")
    parts = match.groups()
    groups = []
    for number, color, noun in (parts[:3], parts[4:]):
        if number:
            shape = SHAPES[PLURALS.index(noun)] if noun in PLURALS else noun
            groups.append(Group(NUMBERS.index(number) + 1, color, shape))
    return Claims(groups, parts[3] if parts[3] in RELATIONS else None)


def held_out(caption: str) -> bool:
    """One caption in five, its ending included, is never used in training.

    Most of its claims are, with another ending: an unseen string, not an unseen combination."""
    return hashlib.sha256(caption.encode()).digest()[0] % 5 == 0


def holds(relation: str, a: Thing, b: Thing) -> float:
    """GenEval's position rule: the offset of centres, less 0.1 x the summed box sizes, over its
    length before that; here every box is 2 r wide and high (evaluate.py takes the exact ones).

    Returns the component along the relation, in [-1, 1]; the relation holds above 0.5.
    """
    offset = np.array([a.x - b.x, a.y - b.y])
    clear = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * 2 * (a.r + b.r), 0)
    dx, dy = clear / max(np.linalg.norm(offset), 1e-6)
    return float({"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation])


def compose(task: str, rng: np.random.Generator) -> tuple:
    """Things for a task and the true claims about them: (list of Thing, Claims).

    The names are GenEval's six, or "any": the six and their mixtures (colour with count, colour
    with position), which web captions have too. Several things are harder to learn than one, so
    "any" has more of them. Joined by "and", the first is the left or the upper one, as one reads.
    """
    pick = lambda values: values[rng.integers(len(values))]
    if task == "any":
        task = pick(("single_object", "colors", "color_count", "color_position", "color_attr")
                    + 2 * ("two_object", "position", "color_attr") + 3 * ("counting",))
    colored = task.startswith("color")
    if task in ("two_object", "position", "color_attr", "color_position"):
        first, second = rng.permutation(len(SHAPES))[:2]
        kinds = [(SHAPES[first], pick(COLORS)), (SHAPES[second], pick(COLORS))]
        things = arrange(kinds, rng)
        if task in ("two_object", "color_attr"):
            things.sort(key=lambda thing: thing.x + thing.y)
        groups = [Group(1, t.color if colored else None, t.shape) for t in things]
        relation = None
        if task in ("position", "color_position"):
            relation = max(RELATIONS, key=lambda name: holds(name, *things))
        return things, Claims(groups, relation)
    count = pick((2, 3, 4)) if task in ("counting", "color_count") else 1
    shape, color = pick(SHAPES), pick(COLORS)
    things = arrange([(shape, color)] * count, rng)
    return things, Claims([Group(count, color if colored else None, shape)])


def lie(claims: Claims, rng: np.random.Generator) -> tuple:
    """Change one claim to a false one: (kind of lie, new Claims)."""
    groups = [Group(**asdict(group)) for group in claims.groups]
    other = lambda values, value: [v for v in values if v != value][rng.integers(len(values) - 1)]
    kinds = ["shape", "count"]
    if groups[0].color:
        kinds += ["color", "color"]
    if claims.relation:
        kinds += ["side", "side"]
    if len(groups) == 2 and groups[0].color and groups[0].color != groups[1].color:
        kinds += ["swap", "swap"]
    kind, relation = kinds[rng.integers(len(kinds))], claims.relation
    group = groups[rng.integers(len(groups))]
    if kind == "shape":
        group.shape = other(SHAPES, group.shape)
    elif kind == "count":
        group.count = other((1, 2, 3, 4), group.count)
    elif kind == "color":
        group.color = other(COLORS, group.color)
    elif kind == "side":
        relation = OPPOSITES[relation]                              # never true
    else:
        groups[0].color, groups[1].color = groups[1].color, groups[0].color
    return kind, Claims(groups, relation)


def prompts(task: str, n: int, seed: int) -> list:
    """n captions of a task that training never sees (held_out). They repeat where few exist."""
    rng, found = np.random.default_rng([seed, 1, TASKS.index(task)]), []
    while len(found) < n:
        caption = write(compose(task, rng)[1]) + ENDINGS[rng.integers(len(ENDINGS))]
        if held_out(caption):
            found.append(caption)
    return found


# -------------------------------------------------------------------------------------- the reader

def detect(pictures: torch.Tensor) -> list:
    """Read pictures back: uint8 (B, 3, S, S) → a list (B) of lists of Thing.

    The background is grey, so chroma (max - min over RGB) is linear in a shape's coverage and
    survives washing out. Pixels above half of the picture's strong chroma (its 98th percentile:
    stray pixels do not set the scale), joined to their neighbours of the same hue, make a
    component; its shape is the one of SHAPES that, drawn with the same area at the same centroid,
    differs least. Exact on clean pictures (see the tests).
    """
    x = pictures.movedim(1, -1).float() / 255                                    # (B, S, S, 3)
    low = x.amin(-1, keepdim=True)
    chroma = (x.amax(-1, keepdim=True) - low)                                    # (B, S, S, 1)
    pure = torch.tensor(np.array([rgb(hue, 1.0) / 0.95 for hue in HUES.values()]), dtype=x.dtype)
    tint = (x - low) / chroma.clamp(min=1e-6)                   # the pixel at full saturation
    color = (tint @ (2 * pure.T) - pure.square().sum(1)).argmax(-1)        # nearest pure, (B, S, S)
    chroma = chroma[..., 0]                                                      # (B, S, S)
    peak = chroma.flatten(1).quantile(0.98, dim=1)[:, None, None]                # (B, 1, 1)
    alpha = (chroma / peak.clamp(min=1e-6)).clamp(max=1)
    inside = (alpha > 0.5) & (peak > 0.12)             # paler than 0.12 is too faint to be read

    # connected components: every pixel takes the largest index among its linked neighbours, and
    # theirs, until nothing changes
    B, S = chroma.shape[:2]
    color = torch.where(inside, color, -1)
    across = (inside[:, :, 1:] & (color[:, :, 1:] == color[:, :, :-1])).int()    # (B, S, S - 1)
    down = (inside[:, 1:] & (color[:, 1:] == color[:, :-1])).int()               # (B, S - 1, S)
    label = inside * torch.arange(1, S * S + 1, dtype=torch.int32).view(1, S, S)
    before = None
    while before is None or not torch.equal(before, label):
        before = label.clone()
        for links, to, source in ((across, label[:, :, 1:], label[:, :, :-1]),
                                  (down, label[:, 1:], label[:, :-1]),
                                  (across, label[:, :, :-1], label[:, :, 1:]),
                                  (down, label[:, :-1], label[:, 1:])):
            torch.maximum(to, source * links, out=to)
    rim = (label == 0) & (alpha > 0.08)                 # half-covered rim pixels join a neighbour
    near = F.max_pool2d(label[:, None].float(), 3, 1, 1)[:, 0].int()
    label = torch.where(rim, near, label)
    return _components(label.numpy(), color.numpy(), alpha.numpy(), inside.numpy())


def _components(label: np.ndarray, color: np.ndarray, alpha: np.ndarray, inside: np.ndarray):
    """Labelled pixels (B, S, S) → a list (B) of lists of Thing, by analysis by synthesis."""
    B, S = label.shape[:2]
    b, i, j = np.nonzero(label)
    ids, owner = np.unique(b * (S * S + 1) + label[b, i, j], return_inverse=True)
    weight = alpha[b, i, j]
    area = np.bincount(owner, weight, len(ids))
    core = np.bincount(owner, inside[b, i, j], len(ids))
    keep = np.flatnonzero(core >= 6)                     # fewer pixels are a stray or a cut piece
    x = (np.bincount(owner, weight * (j + 0.5), len(ids)) / area / S)[keep]
    y = (np.bincount(owner, weight * (i + 0.5), len(ids)) / area / S)[keep]
    r = np.sqrt(area[keep] / AREA) / S                                           # (N,)
    new = np.full(len(ids), -1)
    new[keep] = np.arange(len(keep))
    seen = np.zeros((len(keep), S, S), np.float32)
    mine = new[owner] >= 0
    seen[new[owner][mine], i[mine], j[mine]] = weight[mine]
    error = np.stack([((coverage(np.full(len(keep), k), x, y, r, S) - seen) ** 2).sum((1, 2))
                      for k in range(len(SHAPES))], 1)                           # (N, shapes)
    kind = error.argmin(1)
    votes = np.zeros((len(keep), len(COLORS)))
    core_pixels = mine & inside[b, i, j]
    np.add.at(votes, (new[owner][core_pixels], color[b, i, j][core_pixels]), 1)
    things = [[] for _ in range(B)]
    for n, component in enumerate(ids[keep]):
        things[component // (S * S + 1)].append(
            Thing(SHAPES[kind[n]], COLORS[votes[n].argmax()], float(x[n]), float(y[n]),
                  float(r[n])))
    return things


def truth(claims: Claims, things: list) -> float:
    """The share of a caption's statements that are true of the things read: in [0, 1].

    Each group states its count (exactly so many of the shape) and, if it names one, its colour (so
    many of the shape have it); a relation is one statement more (some pair stands so).
    """
    statements = []
    members = []
    for group in claims.groups:
        asked = sum(g.count for g in claims.groups if g.shape == group.shape)
        same = [t for t in things if t.shape == group.shape]
        statements.append(len(same) == asked)
        if group.color:
            alike = sum(g.count for g in claims.groups
                        if (g.shape, g.color) == (group.shape, group.color))
            same = [t for t in same if t.color == group.color]
            statements.append(len(same) >= alike)
        members.append(same)
    if claims.relation:
        statements.append(any(holds(claims.relation, a, b) > 0.5
                              for a in members[0] for b in members[1] if a is not b))
    return sum(statements) / len(statements)


# -------------------------------------------------------------------------------------- the dataset

def sample(seed: int, index: int, size: int, clean: bool = False) -> tuple:
    """Picture `index` of the world `seed`: (uint8 (size, size, 3), caption, parameters).

    clean=True: no lie and nothing spoilt. Each of the four FAULTS strikes its share of the
    pictures, independently and by a uniform degree, so that 53 % have at least one.
    """
    rng = np.random.default_rng([seed, 0, index])
    while True:
        things, claims = compose("any", rng)
        kind = None
        if not clean and rng.random() < 0.3:
            kind, claims = lie(claims, rng)
        caption = write(claims) + ENDINGS[rng.integers(len(ENDINGS))]
        if not held_out(caption):
            break
    scene = Scene(things, background=rng.uniform(0.3, 0.7), saturation=rng.uniform(*SATURATION))
    if not clean:
        degrees = rng.uniform(0.3, 1, 4) * (rng.random(4) < list(FAULTS.values()))
        for fault, degree in zip(FAULTS, degrees.tolist()):
            setattr(scene, fault, degree)
    return draw(scene, size, rng), caption, {"caption_lies": kind, **asdict(scene)}


def write_world(out, n: int, seed: int, size: int = 24, shard: int = 1000) -> None:
    """Write n samples as tars of `shard` pictures: the same bytes for the same arguments.

    Each tar appears whole or not at all, and finished ones are kept: run again after an
    interruption. Raises ValueError if the folder holds another world.
    """
    if n < 1 or not 16 <= size <= 512 or seed < 0:
        raise ValueError("--n must be at least 1, --size between 16 and 512, --seed at least 0")
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{out} is a file or lies in one: name another folder") from error
    drawn = hashlib.sha256()                                # an older shapes.py drew other pictures
    for picture, caption, _ in (sample(seed, i, size) for i in range(min(n, 16))):
        drawn.update(picture.tobytes() + caption.encode())
    world = {"n": n, "seed": seed, "size": size, "shard": shard,
             "drawn": drawn.hexdigest()[:16]}
    if not (out / "world.json").exists():
        if any(out.glob("*.tar")):
            raise ValueError(f"{out} holds tars that shapes.py did not write: name another folder")
        replace(out / "world.json", json.dumps(world).encode())
    try:
        found = json.loads((out / "world.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{out}/world.json is damaged ({error}): remove the folder") from error
    if found != world:
        raise ValueError(f"{out}/world.json describes another world {found}, not {world}: "
                         f"remove {out}, or draw this one elsewhere (python shapes.py OUT --n {n} "
                         f"--size {size}) and train with --data OUT")
    for first in tqdm(range(0, n, shard), desc="drawing the world", unit="shard"):
        path = out / f"{first // shard:05d}.tar"
        if not path.exists():
            replace(path, tar_of(range(first, min(first + shard, n)), seed, size))


def tar_of(indices: range, seed: int, size: int) -> bytes:
    """The bytes of one img2dataset tar: key.png, key.txt and key.json of each index."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices:
            picture, caption, parameters = sample(seed, index, size)
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "png")
            for ending, content in (("png", png.getvalue()), ("txt", caption.encode()),
                                    ("json", json.dumps(parameters).encode())):
                info = tarfile.TarInfo(f"{index:08d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def replace(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def main():
    """The command line: write some of the embedded world as tar shards."""
    parser = argparse.ArgumentParser(description="write the embedded world as tar shards")
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--n", type=int, default=10000, help="pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=24, help="side in pixels")
    args = parser.parse_args()
    write_world(args.out, args.n, args.seed, args.size)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:            # a user's mistake: one sentence, no traceback
        print(error, file=sys.stderr)
        sys.exit(2)
