"""Pictures with captions, from tars or folders, as resumable batches; text encoders, and a VAE.

DATA is a folder of tars as img2dataset and webdataset write them (key.png or .jpg ..., key.txt,
key.json), one tar, a brace range d/{00000..00019}.tar, a glob 'd/*.tar', or a folder of pictures
with metadata.jsonl ({"file_name": ..., "text": a caption or a list}) or with same-stem .txt files.
The key ends at the FIRST dot of the base name. Captions: the .txt, the list "captions" and the
"synthetic_caption" of key.json, and the text of the key's line in the folder's captions.tsv, where
they are. Nothing is ever written into DATA by this file.

A broken sample (no caption, half a PNG) is left out and listed by name; a broken structure (a tar
cut short, two pictures with one key, a path that leaves the folder) is a ValueError.

`python data.py check DATA` reads everything once and lists what is wrong.
`python data.py encode DATA OUT` makes VAE latents and T5 states, for `train.py --preset paper`:
tars of the pictures, their captions and key.mean256.npy, key.std256.npy (C, S, S), key.text0.npy
(L, E) and one more text per caption, in float16, with encoded.json: how they were made.
"""
import argparse
import copy
import difflib
import glob
import hashlib
import io
import json
import mmap
import os
import pickle
import re
import struct
import sys
import tarfile
import unicodedata
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from tqdm import tqdm

MAX_PIXELS = 64_000_000      # a larger picture is refused before it is decoded
MAX_UNREADABLE = 0.01        # share of unreadable samples beyond which a run stops
FOLDER_SHARD = 1000          # samples in a virtual shard of a picture folder
ENDINGS = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif", "jp2")
# Named formats only: Pillow would hand an EPS called .png to Ghostscript, which runs programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# What Pillow raises on damaged files (180,000 were tried); all of it means "unreadable".
BROKEN = (OSError, ValueError, SyntaxError, TypeError, RuntimeError, LookupError, ArithmeticError,
          struct.error, Image.DecompressionBombError, Image.DecompressionBombWarning)
NOT_TEXT = re.compile("[\0\ud800-\udfff]")      # NUL, halves of surrogate pairs: cannot be written
ARRAY = re.compile(r"(mean|std)\d+|text\d+")    # of an encoded sample, in key.<this>.npy


# ---- one picture: encoded bytes -> (3, size, size) -----------------------------------------------

def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode → 8-bit RGB: transparency over white, 16 bits rounded to 8. ValueError: floats."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = 65535
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("more than 16 bits a pixel; save it with 8 or 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(data: bytes, side: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """An encoded picture → its first frame, upright by EXIF, and its own (width, height).

    A JPEG may be decoded at 1/2, 1/4 or 1/8 where that keeps `side` pixels. Raises one of BROKEN
    where it cannot be read, or has more than MAX_PIXELS.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("not a picture of a known format") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, and the limit is {MAX_PIXELS:,}")
    if side:
        image.draft(None, (side, side))
    ImageOps.exif_transpose(image, in_place=True)     # reads the pixels, too
    return image, (width, height)


def square(data: bytes, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """An encoded picture → uint8 (3, size, size), and its own (width, height) in pixels.

    Centre square, then antialiased bicubic; a picture that is already size x size keeps its pixels.
    Raises what `decode` raises.
    """
    image, own = decode(data, 3 * size)
    side = min(image.size)
    if image.size != (side, side):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    image = to_rgb(image)                             # before resizing: hidden colours do not bleed
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(image).transpose(2, 0, 1), own                   # (3, size, size)


def read_bytes(file: str, offset: int, length: int) -> bytes:
    """`length` bytes (-1 = all) at `offset` of a file; opened anew, so safe to fork."""
    with open(file, "rb") as handle:
        handle.seek(offset)
        return handle.read(length)


# ---- which samples there are: names, headers and captions, no picture ----------------------------

@dataclass(frozen=True)
class Shard:
    """Rows [start, stop) of a dataset; its scores are in `folder / f"{name}.scores.jsonl"`."""
    name: str
    folder: Path
    start: int
    stop: int


@dataclass
class Index:
    """The rows of a dataset (each a picture with captions), and what is wrong with the rest."""
    shards: list[Shard] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    places: array = field(default_factory=lambda: array("q"))    # a row: file, offset, length
    notes: array = field(default_factory=lambda: array("q"))     # the same of a .json with scores
    arrays: dict[str, array] = field(default_factory=dict)       # kind -> the same of an array
    unreadable: dict[str, str] = field(default_factory=dict)     # "shard/key" -> reason
    faults: list[str] = field(default_factory=list)              # broken structure, in sentences
    duplicates: int = 0
    dotted: int = 0                                              # pictures named like a.b.png

    def add_file(self, samples: dict, name: str, place: tuple, read: Callable) -> None:
        """Put one file into its sample: {"picture": its place} or {"txt" or "json": its bytes}."""
        key, kind = split_name(name)
        parts = samples.setdefault(key, {}) if kind else {}
        if kind in parts:
            self.add_duplicate(f"{self.files[place[0]]}: {name} is a second {kind}", key)
        elif kind:
            parts[kind] = read(place) if kind in ("txt", "json") else place
            if kind == "json":
                parts["note"] = place
            self.dotted += kind == "picture" and os.path.basename(name).count(".") > 1

    def add_duplicate(self, what: str, key: str) -> None:
        """Note that a key is there twice."""
        self.duplicates += 1
        self.faults.append(f"{what} with the key {key!r}, which ends at the first dot of the name "
                           "and must be unique; rename or remove one")

    def add_shard(self, name: str, folder: Path, samples: dict, source: str) -> None:
        """Append the whole samples of one shard as rows; list the others as unreadable."""
        start = len(self.keys)
        for key, parts in samples.items():
            try:
                captions = captions_of(parts)
            except ValueError as error:
                self.unreadable[f"{name}/{key}"] = f"{printable(source)}: {error}"
                continue
            for kind in filter(ARRAY.fullmatch, parts):
                column = self.arrays.setdefault(kind, array("q"))
                column.extend((-1, 0, 0) * (len(self.keys) - len(column) // 3))    # rows without
                column.extend(parts[kind])
            self.keys.append(key)
            self.captions.append(captions)
            self.places.extend(parts["picture"])
            self.notes.extend(parts["note"] if b'_score"' in parts.get("json", b"") else (-1, 0, 0))
        self.shards.append(Shard(name, folder, start, len(self.keys)))


def printable(name: str) -> str:
    """The name of a file, with bytes that are not UTF-8 as \\udcXX, as text can be written."""
    return name.encode("utf-8", "backslashreplace").decode()


def split_name(name: str) -> tuple[str, str]:
    """Path of a file → its key and "picture", "txt", "json", or "mean256" and such of
    key.mean256.npy, or, for all other files, ""."""
    name = printable(name).removeprefix("./")
    folder, slash, base = name.rpartition("/")
    stem, *endings = base.split(".")
    ending = endings[-1].lower() if stem and endings else ""      # .hidden files have no stem
    kind = "picture" if ending in ENDINGS else ending if ending in ("txt", "json") else ""
    if ending == "npy" and len(endings) == 2 and ARRAY.fullmatch(endings[0]):
        kind = endings[0]
    return folder + slash + stem, kind


def parse_object(text: bytes, where: str) -> dict:
    """JSON → dict. Raises ValueError that begins with `where` for anything but one object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):              # RecursionError: thousands of brackets
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object; correct or remove it")
    return value


def captions_of(parts: dict) -> tuple[str, ...]:
    """The captions of one sample. Raises ValueError with the reason why it cannot be used."""
    if "picture" not in parts:
        raise ValueError(f"no picture file ({', '.join(ENDINGS)})")
    texts = list(parts.get("text", ()))               # of metadata.jsonl
    if "txt" in parts:
        try:
            texts.append(parts["txt"].decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise ValueError("the .txt is not UTF-8") from None
    if b'"captions"' in parts.get("json", b""):       # most .json files have none: not parsed
        extra = parse_object(parts["json"], "the .json").get("captions", [])
        texts += extra if isinstance(extra, list) else [extra]
    if b'"synthetic_caption"' in parts.get("json", b""):
        texts.append(parse_object(parts["json"], "the .json").get("synthetic_caption"))
    if not texts:
        raise ValueError("no caption")
    if not all(isinstance(text, str) and not NOT_TEXT.search(text) for text in texts):
        raise ValueError("a caption is not a plain string")
    captions = tuple(text.strip() for text in texts if text.strip())
    if not captions:
        raise ValueError("empty caption")
    return captions


def without_notes(samples: dict) -> dict:
    """Leave out the keys with a .json alone (dataset_info.json): no sample, and no lost one."""
    return {key: parts for key, parts in samples.items() if parts.keys() != {"json", "note"}}


def scan_tar(index: Index, path: str) -> None:
    """Add one tar: its headers and texts are read once, its pictures stay where they are."""
    number, samples = len(index.files), {}
    index.files.append(path)

    def read(place: tuple) -> bytes:
        """The bytes at (file, offset, length)."""
        file.seek(place[1])
        return file.read(place[2])

    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []                      # or tarfile keeps every header in memory
                if member.isreg():
                    place = (number, member.offset_data, member.size)
                    index.add_file(samples, member.name, place, read)
            file.seek(tar.offset)                     # tarfile stops in silence at any bad header
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError) as error:
        index.faults.append(f"{path} is damaged, cut short or no tar ({error}); fetch it again")
    else:
        index.add_shard(Path(path).stem, Path(path).parent, without_notes(samples), path)


def scan_pictures(index: Index, folder: str) -> dict:
    """The samples of a folder without metadata.jsonl: pictures with .txt and .json of one key."""
    samples = {}
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        index.faults += [f"{path} is a symlink to a folder, which is not followed; put the folder "
                         "itself there" for path in (os.path.join(parent, s) for s in subfolders)
                         if os.path.islink(path)]
        for name in sorted(names):
            path = os.path.join(parent, name)
            index.files.append(path)
            index.add_file(samples, os.path.relpath(path, folder), (len(index.files) - 1, 0, -1),
                           lambda place: Path(index.files[place[0]]).read_bytes())
    if "txt" not in samples.get("bins", ()):
        samples.pop("bins", None)                     # bins.png, which binning.py draws here
    return without_notes(samples)


def leaves(folder: str, name: str) -> bool:
    """Does a path lead out of the folder: absolute, by "..", or through a symlink?"""
    root = os.path.realpath(folder)
    inside = os.path.commonpath([root, os.path.realpath(os.path.join(root, name))]) == root
    return os.path.isabs(name) or not inside


def scan_metadata(index: Index, folder: str, metadata: str) -> dict:
    """The samples of metadata.jsonl; pictures of the folder that it does not name are none."""
    samples = {}
    for number, line in enumerate(Path(metadata).read_bytes().splitlines(), 1):
        where = f"{metadata}, line {number}"
        if not line.strip():
            continue
        try:
            record = parse_object(line, where)
        except ValueError as error:
            index.faults.append(str(error))
            continue
        name, text = record.get("file_name"), record.get("text")
        if not isinstance(name, str) or NOT_TEXT.search(name):
            index.faults.append(f"{where} has no file_name; name a picture of the folder")
        elif leaves(folder, name):
            index.faults.append(f"{where}: {name!r} leaves the dataset folder; put the file in and "
                                "name it relative to the folder")
        elif (key := split_name(os.path.normpath(name))[0]) in samples:
            index.add_duplicate(f"{where}: {name!r} is a second picture", key)
        else:
            samples[key] = {"text": text if isinstance(text, list) else [text] * (text is not None)}
            if os.path.isfile(os.path.join(folder, name)):
                samples[key]["picture"] = (len(index.files), 0, -1)
                index.files.append(os.path.join(folder, name))
            index.dotted += os.path.basename(name).count(".") > 1
    return samples


def find_tars(path: str) -> list[str]:
    """The tars that DATA stands for; none for a folder of pictures. FileNotFoundError: no DATA."""
    if os.path.isdir(path):
        return sorted(str(tar) for tar in Path(path).glob("*.tar") if tar.name[0] != ".")
    if os.path.exists(path):
        return [path]
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        first, last = match.groups()
        return [tar for number in range(int(first), int(last) + 1)
                for tar in find_tars(f"{path[:match.start()]}{number:0{len(first)}d}"
                                     f"{path[match.end():]}")]
    tars = sorted(glob.glob(path))
    if not tars:
        raise FileNotFoundError(f"{path} is not there; give a folder of tars or of pictures, a "
                                "tar, a range d/{00000..00019}.tar or a quoted glob 'd/*.tar'")
    return tars


def add_captions(index: Index, file: str, whole: bool) -> None:
    """Second captions from captions.tsv, a line of key, tab and text each: the last of a sample.
    whole: the index has all samples, not a rank's part, so that some line must have a key of it."""
    rows, counts = {key: row for row, key in enumerate(index.keys)}, Counter(index.keys)
    used = 0
    for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
        try:
            key, tab, text = line.decode().partition("\t")
        except UnicodeDecodeError:
            key, tab, text = "", "", ""
        if not tab or not text.strip() or NOT_TEXT.search(text):
            index.faults.append(f"{file}, line {number} is not a key, a tab and a caption in UTF-8")
        elif counts[key] > 1:
            index.faults.append(f"{file}, line {number}: {counts[key]} samples have key {key!r}")
        elif key in rows:
            index.captions[rows[key]] += (text.strip(),)
            used += 1
    if whole and not used:
        index.faults.append(f"{file}: none of its keys is a sample's; a key is a file's name up "
                            "to its first dot")


def read_index(path: str, part: tuple = (0, 1)) -> Index:
    """Find the samples of DATA, or of every n-th tar, and its faults, without opening a picture."""
    index, tars = Index(), find_tars(path)[part[0]::part[1]]
    for tar in tqdm(tars, "headers", unit="tar", delay=2, leave=False, disable=None):
        scan_tar(index, tar)
    metadata = os.path.join(path, "metadata.jsonl")
    if tars and os.path.exists(metadata):
        index.faults.append(f"{path} holds tars and metadata.jsonl; move one of them away")
    if not tars and os.path.isdir(path):
        if os.path.exists(metadata):
            source, samples = metadata, scan_metadata(index, path, metadata)
        else:
            source, samples = path, scan_pictures(index, path)
        keys = sorted(samples)
        for start in range(0, len(keys), FOLDER_SHARD):
            piece = {key: samples[key] for key in keys[start:start + FOLDER_SHARD]}
            index.add_shard(f"{start // FOLDER_SHARD:05d}", Path(path), piece, source)
    if os.path.isfile(os.path.join(path, "captions.tsv")):
        add_captions(index, os.path.join(path, "captions.tsv"), part[1] == 1)
    for name, count in Counter(shard.name for shard in index.shards).items():
        if count > 1:
            index.faults.append(f"{path}: {count} tars are called {name}.tar; rename them")
    if not index.keys and not index.faults:
        first = "".join(f" ({name}: {reason})" for name, reason in [*index.unreadable.items()][:1])
        index.faults.append(f"{path} has no picture with a caption{first}; give key.png and "
                            "key.txt in tars or in a folder, or a folder with metadata.jsonl")
    return index


# ---- the dataset ---------------------------------------------------------------------------------

class Pictures(torch.utils.data.Dataset):
    """The samples of DATA as squares of `size` pixels, in a fixed order of rows.

    shards: list of Shard; keys: (N,) list of str; captions: (N,) list of tuples of str;
    unreadable: "shard/key" -> reason, filled as samples fail. If all pictures fit into
    memory_gb (10^9 bytes), each is decoded once and then kept. part: (k, n), every n-th tar from
    the k-th on. Raises ValueError or FileNotFoundError, in one sentence, for a DATA that cannot be
    used.
    """

    def __init__(self, path: str, size: int, memory_gb: float = 2.0, part: tuple = (0, 1)):
        index = read_index(str(path), part)
        if index.faults:
            more = f" (and {len(index.faults) - 1} more: see python data.py check {path})"
            raise ValueError(index.faults[0] + more * (len(index.faults) > 1))
        self.path, self.size, self.part = str(path), size, part
        self.shards, self.keys, self.captions = index.shards, index.keys, index.captions
        self.files, self.unreadable = index.files, index.unreadable
        self.lost = len(index.unreadable)                          # samples that are no rows
        self.places = np.array(index.places, np.int64).reshape(-1, 3)
        self.notes = np.array(index.notes, np.int64).reshape(-1, 3)
        self.arrays = {kind: np.array(column, np.int64).reshape(-1, 3)
                       for kind, column in index.arrays.items()}
        self.rows = np.arange(len(self.keys))                      # into places, cache and cached
        self.cache, total = None, 3 * size * size * len(self.keys)
        if total <= memory_gb * 1e9:
            # Anonymous shared memory: forked workers fill it for all (spawned ones get a copy of
            # their own), it takes no space before it is filled, and it does not count against a
            # container's small /dev/shm.
            self.cache = np.frombuffer(mmap.mmap(-1, total), np.uint8).reshape(-1, 3, size, size)
            self.cached = np.frombuffer(mmap.mmap(-1, len(self.keys)), np.bool_)

    def __len__(self) -> int:
        return len(self.keys)

    def shard_of(self, i: int) -> Shard:
        """The shard of row i."""
        return self.shards[bisect_right(self.shards, i, key=lambda shard: shard.start) - 1]

    def name(self, i: int) -> str:
        """"shard/key" of row i."""
        return f"{self.shard_of(i).name}/{self.keys[i]}"

    def cut(self, i: int, function: Callable):
        """function(the encoded picture of row i). Raises ValueError, naming file and key: one of
        BROKEN was raised."""
        number, offset, length = self.places[self.rows[i]].tolist()
        file = self.files[number]
        try:
            return function(read_bytes(file, offset, length))
        except BROKEN as error:
            self.unreadable[self.name(i)] = f"{printable(file)}: {error}"
            raise ValueError(f"{printable(file)}: the picture of {self.name(i)} cannot be read "
                             f"({error}); replace it") from None

    def note(self, i: int) -> dict:
        """The key.json of row i. ValueError: it has none, or it is no JSON object."""
        number, offset, length = self.notes[self.rows[i]].tolist()
        if number < 0:
            raise ValueError(f"{self.name(i)} has no key.json with scores")
        content = read_bytes(self.files[number], offset, length)
        return parse_object(content, f"the key.json of {self.name(i)}")

    def picture(self, i: int) -> torch.Tensor:
        """Row i as uint8 (3, size, size). Raises ValueError, naming file and key: unreadable."""
        row = self.rows[i]
        if self.cache is not None and self.cached[row]:
            return torch.from_numpy(self.cache[row].copy())
        pixels, _ = self.cut(i, lambda data: square(data, self.size))
        if self.cache is not None:
            self.cache[row] = pixels
            self.cached[row] = True                                # only now is it there
        return torch.from_numpy(pixels.copy())

    def __getitem__(self, places: tuple[np.ndarray, np.ndarray]) -> dict:
        """Positions and rows, int64 (b,) each → a batch, as `batches` yields it, and `broken`."""
        whole, pixels, broken = [], [], {}
        for j, i in enumerate(places[1].tolist()):
            try:
                pixels.append(self.picture(i))
            except ValueError:
                broken[self.name(i)] = self.unreadable[self.name(i)]
            else:
                whole.append(j)
        nothing = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        position, row = (torch.from_numpy(place[whole]) for place in places)
        return {"position": position, "row": row, "broken": broken,
                "picture": torch.stack(pixels) if pixels else nothing}

    def select(self, rows: Sequence[int]) -> "Pictures":
        """The same dataset with only these rows, in this order. Pictures in memory are shared."""
        other, rows = copy.copy(self), list(rows)
        other.rows = self.rows[np.array(rows, np.int64)]
        other.keys = [self.keys[i] for i in rows]
        other.captions = [self.captions[i] for i in rows]
        other.shards = []                       # a shard that comes back later is another piece
        for shard, piece in groupby(range(len(rows)), key=lambda i: self.shard_of(rows[i])):
            piece = list(piece)
            other.shards.append(replace(shard, start=piece[0], stop=piece[-1] + 1))
        return other


# ---- the order of samples ------------------------------------------------------------------------

@lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A random order of n rows: int64 (n,). Of raw bits, which numpy promises never to change."""
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(n)
    return np.argsort(bits, kind="stable")


def rows_at(positions, n: int, seed: int) -> np.ndarray:
    """Positions in the endless stream → rows, int64. Epoch e = position // n has an own order."""
    positions = np.asarray(positions, np.int64)
    epochs, rows = positions // n, np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        inside = epochs == epoch
        rows[inside] = permutation(n, seed, epoch)[positions[inside] % n]
    return rows


def batches(pictures: Pictures, seed: int, first_step: int, last_step: int, batch: int,
            rank: int = 0, world: int = 1, workers: int = 0) -> Iterator[dict]:
    """Steps [first_step, last_step): dicts of position (b,) and row (b,) int64, and picture uint8
    (b, 3, size, size).

    `batch` is global: step k covers the positions [k*batch, (k+1)*batch) of `rows_at`, and rank r
    its r-th contiguous slice. So a step is the same after a resume, with any number of workers,
    and each sample comes once per epoch. Unreadable samples are left out (b is smaller, perhaps
    0) and recorded in pictures.unreadable; more than 1 % of what this rank has read (beyond bad
    luck: three standard deviations, from 100 samples on) is a ValueError.
    """
    if batch % world:
        raise ValueError(f"a batch of {batch} cannot be shared by {world} processes; choose a "
                         f"multiple of {world}")
    advice = f"(the limit is {MAX_UNREADABLE:.0%}); see python data.py check {pictures.path}"
    samples, share = len(pictures.places) + pictures.lost, batch // world
    if pictures.lost > MAX_UNREADABLE * samples:
        raise ValueError(f"{pictures.path}: {pictures.lost} of {samples} samples lack a picture or "
                         f"a caption {advice}")
    positions = (np.arange(share) + step * batch + rank * share
                 for step in range(first_step, last_step))
    loader = torch.utils.data.DataLoader(
        pictures, batch_size=None, num_workers=workers,
        sampler=((position, rows_at(position, len(pictures), seed)) for position in positions),
        generator=torch.Generator(),                # its own: the caller's stream is left alone
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None)
    read = failed = 0
    for step in loader:
        broken = step.pop("broken")
        pictures.unreadable.update(broken)          # a worker process filled only its own copy
        read, failed = read + share, failed + len(broken)
        # Three standard deviations on top, or bad luck would stop a run with a share below 1 %.
        if read >= 100 and failed > MAX_UNREADABLE * read + 3 * (MAX_UNREADABLE * read) ** 0.5:
            raise ValueError(f"{pictures.path}: {failed} of {read} samples unreadable {advice}")
        yield step


# ---- words as vectors ----------------------------------------------------------------------------

def split_words(text: str) -> list[str]:
    """"Two dogs, don't!" → ["two", "dogs", "don't"]. A word has letters, digits and, in many
    scripts, marks: the vowel signs of Hindi, say, without which different words are the same."""
    text = unicodedata.normalize("NFC", text.lower())
    kept = (c if c.isalnum() or c == "'" or unicodedata.category(c)[0] == "M" else " "
            for c in text)
    return [word for part in "".join(kept).split() if (word := part.strip("'"))]


class Words:
    """A frozen text encoder without weights: fixed random vectors of words and their positions.

    The first half of the channels is the word: uniform, unit variance, made from a hash of the word
    alone, so that it is the same in every vocabulary and with every library version. The second
    half is the sin-cos vector of the position, unit variance too. Not in the paper (FLAN-T5 XL).
    """

    def __init__(self, vocabulary: Sequence[str], dim: int = 64, length: int = 16):
        assert dim % 4 == 0, dim
        assert all(split_words(word) == [word] for word in vocabulary), vocabulary
        self.vocabulary, self.dim, self.length = tuple(vocabulary), dim, length
        self.index = {word: i for i, word in enumerate(self.vocabulary, 1)}
        # Row 0 is "", the one token of the empty prompt.
        digests = b"".join(hashlib.shake_256(word.encode()).digest(dim // 2)
                           for word in ("", *self.vocabulary))
        values = torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, dim // 2)
        self.words = (values - 127.5) / ((256 ** 2 - 1) / 12) ** 0.5              # (V+1, dim/2)
        frequency = 100.0 ** (-torch.arange(dim // 4) / (dim // 4))   # captions are short: not 10^4
        angle = torch.arange(length)[:, None] * frequency                         # (length, dim/4)
        self.positions = 2 ** 0.5 * torch.cat([angle.sin(), angle.cos()], dim=1)  # (length, dim/2)

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text (B, length, dim) float32; text_mask (B, length) bool, True = token. Padding is 0.

        Raises ValueError for an unknown word, with what is valid, and for too many words.
        """
        tokens, lengths = [], []
        for prompt in prompts:
            words = split_words(prompt)
            for word in words:
                if word not in self.index:
                    raise ValueError(f"{prompt!r} has the unknown word {word!r}; {self.hint(word)}")
            if len(words) > self.length:
                raise ValueError(f"{prompt!r} has {len(words)} words; shorten it to {self.length}")
            tokens.append([self.index[word] for word in words] + [0] * (self.length - len(words)))
            lengths.append(max(1, len(words)))
        token = torch.tensor(tokens, dtype=torch.long).view(-1, self.length)        # (B, length)
        text_mask = torch.arange(self.length) < torch.tensor(lengths).view(-1, 1)   # (B, length)
        positions = self.positions.expand(len(prompts), -1, -1)            # (B, length, dim/2)
        text = torch.cat([self.words[token], positions], dim=-1)           # (B, length, dim)
        return text * text_mask[..., None], text_mask

    def hint(self, word: str) -> str:
        """What could be written instead of an unknown word."""
        if len(self.vocabulary) <= 60:
            return "the words are: " + ", ".join(self.vocabulary)
        close = difflib.get_close_matches(word, self.vocabulary, n=5)
        return "close words are: " + ", ".join(close) if close else "no known word is close to it"

    def free(self) -> None:
        """Nothing: there are no weights (T5 has some)."""

    def config(self) -> dict:
        """What goes into config.json."""
        return {"kind": "words", "vocabulary": list(self.vocabulary), "dim": self.dim,
                "length": self.length}

    @staticmethod
    def from_config(config: dict) -> "Words":
        """The inverse of `config`. ValueError: the configuration of another encoder."""
        if config.get("kind") != "words":
            raise ValueError(f"a text encoder of kind {config.get('kind')!r}; this one is 'words'")
        return Words(config["vocabulary"], config["dim"], config["length"])

    @staticmethod
    def vocabulary_of(captions: Iterable[str | tuple[str, ...]]) -> tuple[str, ...]:
        """Every word of some captions, or tuples of captions (Pictures.captions), sorted."""
        texts = (" ".join((entry,) if isinstance(entry, str) else entry) for entry in captions)
        return tuple(sorted({word for text in texts for word in split_words(text)}))


# ---- the release's encoders ----------------------------------------------------------------------

class T5:
    """Text as the paper reads it: the last states of a T5EncoderModel (FLAN-T5-XL), frozen.

    source: a hub id or a folder of transformers. It is loaded at the first prompt, in bf16 on a GPU
    and in fp32 else; `free` gives its memory back. Prompts once encoded are remembered.
    """
    SOURCE = "google/flan-t5-xl"

    def __init__(self, source: str, dim: int | None = None, length: int = 77):
        self.source, self.dim, self.length = source, dim, length
        self.model, self.known, self.device = None, {}, torch.device("cpu")

    def load(self) -> None:
        """Read tokenizer and weights. ValueError: they are not there, or of another width."""
        from transformers import AutoTokenizer, T5EncoderModel
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.source)
            self.model, found = T5EncoderModel.from_pretrained(self.source, dtype=dtype,
                                                               output_loading_info=True)
            if found["missing_keys"]:
                raise ValueError(f"it has no {sorted(found['missing_keys'])[0]}")
            words, room = len(self.tokenizer), self.model.config.vocab_size
            if not room - 128 <= words <= room:     # without its files transformers makes one up
                raise ValueError(f"its tokenizer has {words} tokens and its table {room} rows")
        except (OSError, ValueError, RuntimeError, TypeError, pickle.UnpicklingError,
                SafetensorError) as error:
            raise ValueError(f"the text encoder {self.source} cannot be loaded: name a folder or "
                             f"hub id with --text-encoder ({first_line(error)})") from error
        width = self.model.config.d_model
        if self.dim not in (None, width):
            raise ValueError(f"the text encoder {self.source} has states of width {width}, and "
                             f"this network reads {self.dim}: name another with --text-encoder")
        self.dim = width
        self.model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def states(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """The states (L, dim) of each prompt, float32 on the CPU, L its tokens, at most `length`:
        longer prompts are cut, and <PERSON>, a name taken out, is left out, as in the release."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        for first in range(0, len(new), 32):
            if self.model is None:
                self.load()
            part = new[first:first + 32]
            plain = [prompt.replace("<PERSON>", "") for prompt in part]
            tokens = self.tokenizer(plain, padding=True, truncation=True, max_length=self.length,
                                    return_tensors="pt").to(self.device)
            states = self.model(**tokens).last_hidden_state.float().cpu()        # (b, L, dim)
            lengths = tokens["attention_mask"].sum(1).tolist()
            self.known |= {p: states[i, :n].clone() for i, (p, n) in enumerate(zip(part, lengths))}
        return [self.known[prompt] for prompt in prompts]

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text (B, L, dim) float32, text_mask (B, L) bool, L the longest prompt's. Padding is 0."""
        return pad(self.states(prompts))

    def free(self) -> None:
        """Give the memory back; the next new prompt loads again."""
        self.model = None

    def config(self) -> dict:
        """What goes into config.json."""
        return {"kind": "t5", "source": self.source, "dim": self.dim, "length": self.length}


class VAE:
    """Pictures to latents and back: a diffusers AutoencoderKL (SDXL's), fp32, loaded when used."""
    SOURCE = "stabilityai/sdxl-vae"
    SCALING_FACTOR = 0.13025                   # of SDXL's, in its config.json: how it is recognised
    MEAN, STD = (-0.3480, 0.3754, 0.0419, 2.4331), (7.8518, 5.8465, 6.8716, 5.3140)  # the release's

    def __init__(self, source: str):
        self.source, self.model, self.device = source, None, torch.device("cpu")

    def load(self) -> None:
        """Read the weights. ValueError: they are not there."""
        from diffusers import AutoencoderKL
        try:
            # Without low_cpu_mem_usage it does not ask for a further package, accelerate.
            self.model, found = AutoencoderKL.from_pretrained(
                self.source, output_loading_info=True, low_cpu_mem_usage=False)
            if found["missing_keys"]:                          # diffusers leaves them to chance
                raise ValueError(f"it has no {sorted(found['missing_keys'])[0]}")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"the VAE {self.source} cannot be loaded: name a folder or hub id "
                             f"with --vae ({first_line(error)})") from error
        self.model.to(self.device).eval().requires_grad_(False)

    def move(self, device: torch.device) -> None:
        """Compute there."""
        self.device = device
        if self.model is not None:
            self.model.to(device)

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (B, 3, 8 S, 8 S) → mean and std of the latents, (B, C, S, S) each."""
        if self.model is None:
            self.load()
        found = self.model.encode(pictures.to(self.device).float() / 127.5 - 1).latent_dist
        return found.mean.cpu(), found.std.cpu()

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, S, S) in the VAE's own units → uint8 pictures (B, 3, 8 S, 8 S), CPU."""
        if self.model is None:
            self.load()
        x = torch.cat([self.model.decode(part.to(self.device)).sample.cpu() for part in z.split(8)])
        return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def pad(states: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """States (L_i, E) → text (B, L, E), padded with 0, and text_mask (B, L) bool."""
    text = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)             # (B, L, E)
    lengths = torch.tensor([len(s) for s in states])                             # (B,)
    return text, torch.arange(text.shape[1]) < lengths[:, None]


def encoder_of(config: dict) -> Words | T5:
    """The inverse of `config` of either encoder. ValueError: another kind."""
    if config["kind"] == "t5":
        return T5(config["source"], config["dim"], config["length"])
    return Words.from_config(config)


# ---- encoded pictures: latents and text states ---------------------------------------------------

class Latents(Pictures):
    """The samples of a folder that `encode` wrote, for a network of latents of `side`.

    As a dataset of Pictures it has their size, 8 x side, so that scores and bins are found; its
    batches have latents. `choose(position, row)` names the caption whose states are read.
    Raises ValueError: not such a folder, or not encoded at this size.
    """

    def __init__(self, path: str, side: int):
        self.encoded = read_encoded(Path(path))
        super().__init__(path, 8 * side, memory_gb=0)
        self.choose = first_caption
        if len(self.shards) < self.encoded["shards"]:
            raise ValueError(f"{path} has {len(self.shards)} of {self.encoded['shards']} shards: "
                             "run python data.py encode to its end")
        if self.size not in self.encoded["sizes"]:
            raise ValueError(f"{path} was encoded at {self.encoded['sizes']} pixels, and a side of "
                             f"{side} needs {self.size}: encode it with --sizes {self.size}")
        try:
            values = np.load(Path(path) / "empty.npy", allow_pickle=False).astype(np.float32)
            self.empty = torch.from_numpy(values.reshape(-1, self.encoded["dim"]))       # (L, E)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path}/empty.npy, the states of the empty caption, cannot be read "
                             f"({error}): encode into a new folder") from error
        captions = np.array([len(texts) for texts in self.captions])                 # (N,)
        due = {f"mean{self.size}": 0, f"std{self.size}": 0}      # kind -> due with more captions
        due |= {f"text{number}": number for number in range(captions.max())}
        for kind, number in due.items():
            there = np.full((len(self), 3), -1)
            there[:len(self.arrays.get(kind, ()))] = self.arrays.get(kind, -1)
            self.arrays[kind] = there
            missing = np.flatnonzero((there[:, 0] < 0) & (captions > number))
            if len(missing):
                file = self.files[self.places[missing[0]][0]]
                raise ValueError(f"{file}: {self.name(missing[0])} has no {kind}; remove the tar "
                                 "and encode again")

    def read(self, i: int, kind: str) -> torch.Tensor:
        """One array of row i, float32. ValueError, naming file and key: it cannot be read."""
        row = int(self.rows[i])
        number, offset, length = self.arrays[kind][row].tolist()
        content = read_bytes(self.files[number], offset, length)
        try:
            values = np.load(io.BytesIO(content), allow_pickle=False)
            if values.dtype != np.float16 or values.ndim != (2 if kind.startswith("text") else 3):
                raise ValueError(f"{values.dtype} {values.shape}")
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{self.files[number]}: {kind} of {self.name(i)} cannot be read "
                             f"({error}); remove the tar and encode again") from error
        return torch.from_numpy(values.astype(np.float32))

    def __getitem__(self, places: tuple[np.ndarray, np.ndarray]) -> dict:
        """As Pictures, with latents: "picture" their means and "std" (b, C, S, S), "text"
        (b, L, E), "text_mask" (b, L)."""
        position, row = (torch.from_numpy(np.array(place)) for place in places)
        pairs = list(zip(position.tolist(), row.tolist()))
        text, mask = pad([self.read(i, f"text{self.choose(p, i)}") for p, i in pairs])
        return {"position": position, "row": row, "broken": {}, "text": text, "text_mask": mask,
                "picture": torch.stack([self.read(i, f"mean{self.size}") for _, i in pairs]),
                "std": torch.stack([self.read(i, f"std{self.size}") for _, i in pairs])}


def first_caption(position: int, row: int) -> int:
    """The choice of Latents unless another is set."""
    return 0


def read_encoded(folder: Path) -> dict:
    """encoded.json: which encoders made the arrays, and how. ValueError: it is not there."""
    file = folder / "encoded.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no encoded.json: latents are made with python data.py "
                         f"encode DATA OUT, and read from OUT")
    found = parse_object(file.read_bytes(), str(file))
    missing = [key for key in ("sizes", "vae", "scaling_factor", "text_encoder", "dim", "length",
                               "dtype", "data", "shards") if key not in found]
    if missing:
        raise ValueError(f"{file} has no {', '.join(missing)}; encode into a new folder")
    return found


def encode_shard(pictures: Pictures, shard: Shard, path: Path, sizes: list, vae: "VAE",
                 encoder: "T5", bar: tqdm) -> None:
    """One tar of the samples of a shard with their arrays; it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")          # after a kill the next run's own
    with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, content: bytes) -> None:
            """One file of the tar."""
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        def add_array(name: str, values: torch.Tensor) -> None:
            """The same as a float16 .npy."""
            buffer = io.BytesIO()
            np.save(buffer, values.half().numpy())
            add(name, buffer.getvalue())

        for first in range(shard.start, shard.stop, 16):
            whole = []                                        # (row, its bytes, squares by size)
            for row in range(first, min(first + 16, shard.stop)):
                try:
                    note = pictures.note(row) if pictures.notes[pictures.rows[row], 0] >= 0 else {}
                    whole.append((row, note, *pictures.cut(row, lambda content: (
                        content, [square(content, size)[0] for size in sizes]))))
                except ValueError as error:
                    pictures.unreadable.setdefault(pictures.name(row), str(error))
                    continue
            bar.update(min(first + 16, shard.stop) - first)
            if not whole:
                continue
            encoder.states([text for row, *_ in whole for text in pictures.captions[row]])
            latents = [vae.encode(torch.from_numpy(np.stack([squares[k] for *_, squares in whole])))
                       for k in range(len(sizes))]
            for j, (row, note, content, _) in enumerate(whole):
                key, captions = pictures.keys[row], pictures.captions[row]
                ending = Image.open(io.BytesIO(content), formats=FORMATS).format.lower()
                ending = dict(jpeg="jpg", mpo="jpg", jpeg2000="jp2").get(ending, ending)
                add(f"{key}.{ending}", content)
                add(f"{key}.txt", captions[0].encode())
                given = {name: value for name, value in note.items() if name.endswith("_score")}
                add(f"{key}.json", json.dumps({"captions": captions[1:]} | given).encode())
                for size, (mean, std) in zip(sizes, latents):
                    add_array(f"{key}.mean{size}.npy", mean[j])
                    add_array(f"{key}.std{size}.npy", std[j])
                for number, states in enumerate(encoder.states(captions)):
                    add_array(f"{key}.text{number}.npy", states)
            encoder.known.clear()
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def encode(data: str, out: Path, sizes: list, vae: "VAE", encoder: "T5", rank: int = 0,
           world: int = 1) -> None:
    """The shards of one rank, those that are there left out. ValueError: OUT was begun otherwise,
    or more samples than MAX_UNREADABLE cannot be read."""
    if not sizes or any(size < 8 or size % 8 for size in sizes):
        raise ValueError(f"--sizes {sizes}: the VAE halves a picture three times, name multiples "
                         "of 8")
    pictures = Pictures(data, max(sizes), memory_gb=0)
    vae.load()
    empty = encoder.states([""])[0]                                              # (L, E)
    content = hashlib.sha256(json.dumps([pictures.keys, pictures.captions]).encode()).hexdigest()
    settings = dict(format=1, sizes=sizes, vae=vae.source, text_encoder=encoder.source,
                    scaling_factor=vae.model.config.scaling_factor, dim=encoder.dim,
                    length=encoder.length, dtype=str(encoder.model.dtype), data=content[:16],
                    shards=len(pictures.shards))
    if out.is_file() or out.resolve() == Path(data).resolve():
        raise ValueError(f"OUT {out}: name a folder of its own")
    out.mkdir(parents=True, exist_ok=True)
    if (out / "encoded.json").exists():
        found = read_encoded(out)
        for key, value in settings.items():
            if found.get(key) != value:
                raise ValueError(f"{out} was begun with {key} {found.get(key)}, not {value}: "
                                 "encode with the same, or into another folder")
    elif any(out.glob("*.tar")):
        raise ValueError(f"{out} holds tars that this command did not write: name another folder")
    else:
        for name, write in (("empty.npy", lambda path: np.save(path, empty.numpy())),
                            ("encoded.json", lambda path: path.write_text(json.dumps(settings)))):
            temporary = out / f".{os.getpid()}.{name}"
            write(temporary)
            os.replace(temporary, out / name)
    mine = pictures.shards[rank::world]
    todo = [shard for shard in mine if not (out / f"{shard.name}.tar").exists()]
    with tqdm(total=sum(shard.stop - shard.start for shard in todo), desc="encoding",
              unit="picture", disable=rank > 0) as bar:
        for shard in todo:
            encode_shard(pictures, shard, out / f"{shard.name}.tar", sizes, vae, encoder, bar)
    failed = pictures.unreadable
    for name, reason in failed.items():
        print(f"left out {name}: {reason}")
    print(f"{len(todo)} shards written to {out}, {len(failed)} samples left out")
    samples = sum(shard.stop - shard.start for shard in mine) + pictures.lost
    if len(failed) > MAX_UNREADABLE * samples:
        raise ValueError(f"{data}: {len(failed)} of {samples} samples cannot be read (the limit is "
                         f"{MAX_UNREADABLE:.0%}); see python data.py check {data}")


PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def best_device() -> torch.device:
    """CUDA, else MPS, else CPU; under torchrun each rank's own GPU, or on a Mac the CPU: gloo has
    no MPS."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return torch.device("mps" if torch.backends.mps.is_available() and alone else "cpu")


def precision(name: str, device: torch.device) -> torch.dtype:
    """One of PRECISIONS → what a network's matrix products are made in. "auto" is fp32 but on CUDA:
    there bf16, or fp16 on chips that only emulate it (on most CPUs bf16 is slower than fp32)."""
    if name == "auto" and device.type == "cuda":
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if real else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)


# ---- python data.py check DATA -------------------------------------------------------------------

def read_all(index: Index, names: list[str], size: int) -> list[tuple[int, int]]:
    """Decode every picture: (width, height) of the readable ones; the others become unreadable."""
    sizes = []
    for row, name in enumerate(tqdm(names, "pictures", leave=False, disable=None)):
        number, offset, length = index.places[3 * row:3 * row + 3]
        file = index.files[number]
        try:
            sizes.append(square(read_bytes(file, offset, length), size)[1])
        except BROKEN as error:
            index.unreadable[name] = f"{printable(file)}: {error}"
    return sizes


def hashes(captions: tuple[str, ...]) -> list[str]:
    """16 hex digits a caption, by which a sidecar of scores knows that a caption was changed."""
    return [hashlib.sha256(caption.encode()).hexdigest()[:16] for caption in captions]


def find_scored(index: Index) -> set[str]:
    """Names of the samples whose captions, as they are now, have scores in their shard's sidecar.
    A damaged sidecar is a fault."""
    scored = set()
    for shard in index.shards:
        rows = range(shard.start, shard.stop)
        now = {index.keys[row]: hashes(index.captions[row]) for row in rows}
        sidecar = shard.folder / f"{shard.name}.scores.jsonl"
        lines = sidecar.read_bytes().splitlines() if sidecar.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                record = parse_object(line, f"{sidecar}, line {number}")
            except ValueError as error:
                index.faults.append(str(error))
                continue
            key = str(record.get("key"))              # none in the header, no scores if it failed
            if "scores" in record and key in now and record.get("captions") == now[key]:
                scored.add(f"{shard.name}/{key}")
    return scored


def check(path: str, size: int) -> list[str]:
    """Print what DATA holds. Returns the faults, in sentences, that keep it from training."""
    index = read_index(path)
    names = [f"{shard.name}/{key}" for shard in index.shards
             for key in index.keys[shard.start:shard.stop]]
    lost = list(index.unreadable.values())
    sizes = sorted(read_all(index, names, size), key=lambda side: side[0] * side[1])
    scored = find_scored(index)
    captions = [caption for several in index.captions for caption in several]
    print(f"samples     {len(names)} in {len(index.shards)} shards, {len(captions)} captions")
    if sizes:
        shape = ["%d x %d" % sizes[i] for i in (0, len(sizes) // 2, -1)]
        small = sum(min(side) < size for side in sizes)
        print(f"sizes       min {shape[0]}, median {shape[1]}, max {shape[2]}; "
              f"{small} smaller than {size} px")
    print(f"captions    {sum(reason.endswith('no caption') for reason in lost)} missing, "
          f"{sum(reason.endswith('empty caption') for reason in lost)} empty")
    for caption in sorted(captions, key=lambda caption: -len(split_words(caption)))[:3]:
        print(f"  {len(split_words(caption))} words: {caption}")
    print(f"keys        {index.duplicates} duplicate; {index.dotted} file names with several dots "
          "(a key ends at the first)")
    unscored = [name for name in names if name not in scored]
    advice = f" (python rewards.py {path} --size {size})" if unscored else ""
    print(f"unscored    {len(unscored)}{advice}")
    print(f"unreadable  {len(index.unreadable)}")
    for name, reason in index.unreadable.items():
        print(f"  {name}: {reason}")
    total = len(names) + len(lost)
    if len(index.unreadable) > MAX_UNREADABLE * total:
        index.faults.append(f"{path}: {len(index.unreadable)} of {total} samples are unreadable, "
                            f"the limit is {MAX_UNREADABLE:.0%}; repair or remove them")
    return index.faults


def main() -> None:
    """The command line: check a dataset, or encode it."""
    parser = argparse.ArgumentParser(description="Look at a dataset, or encode it, before training")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("check", help="read everything once and list what is wrong")
    command.add_argument("data", help="folder of tars, tar, brace range, glob or picture folder")
    command.add_argument("--size", type=int, default=24, help="side in pixels to train at")
    command = commands.add_parser("encode", help="write VAE latents and T5 states beside the "
                                  "pictures, into new tars")
    command.add_argument("data", help="folder of tars, tar, brace range, glob or picture folder")
    command.add_argument("out", help="folder to write to")
    command.add_argument("--sizes", type=int, nargs="+", default=[256], help="sides in pixels")
    command.add_argument("--vae", default=VAE.SOURCE, help="folder or hub id of an AutoencoderKL")
    command.add_argument("--text-encoder", default=T5.SOURCE, help="folder or hub id of a T5")
    command.add_argument("--length", type=int, default=256, help="tokens, then texts are cut")
    args = parser.parse_args()
    if args.command == "encode":
        encoder, vae = T5(args.text_encoder, length=args.length), VAE(args.vae)
        encoder.device = vae.device = best_device()
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        return encode(args.data, Path(args.out), args.sizes, vae, encoder, rank, world)
    if args.size < 1:
        raise ValueError(f"--size {args.size}: it is at least 1")
    faults = check(args.data, args.size)
    if faults:
        raise ValueError("\n".join(faults))
    print(f"{args.data} can be trained on")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:            # a user's mistake: one sentence, no traceback
        print(error, file=sys.stderr)
        sys.exit(2)
