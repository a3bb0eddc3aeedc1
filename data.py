"""Data: one border where foreign pictures come in, one format behind it, one order; encoders.

    python data.py import SOURCE... DATA --size 32       # tars or folders of pictures with captions
    python data.py encode SOURCE... DATA --size 256      # the same through a VAE and T5

Foreign input is met here alone: every other program reads DATA, a folder of shards, and trusts it.
A sample is a picture with one caption or more, a pair a picture with one of its captions.
DATA/NAME.safetensors has, for n samples and P pairs,

    pixels (n, 3, S, S) uint8, or of encoded data float16: mean, std (n, 4, S/8, S/8), the states
        text (all tokens, E) with text_ends (P,), and empty (L, E), those of the empty caption
    keys, key_ends (n,), captions, caption_ends (P,): UTF-8 bytes end to end, and where each ends
    pair_ends (n,): where the pairs of a sample end
    pixels_sums (n,), or mean_sums, std_sums, text_sums (P,): by which a flipped bit is noticed
    place (n, 3): its file in SOURCE, offset and length, for networks that see it large

DATA/data.json says what it is made of. Scores and bins come beside it (rewards.py, binning.py).
"""
import _thread
import argparse
import contextlib
import csv
import difflib
import errno
import fcntl
import hashlib
import io
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import struct
import sys
import sysconfig
import tarfile
import tempfile
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

MAX_LEFT_OUT = 0.01          # share of samples left out, or unscored, beyond which a run stops
MAX_PIXELS = 64_000_000      # a larger picture is refused before it is decoded
# Named formats only: Pillow would hand an EPS called .png to Ghostscript, which runs programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# What Pillow raises on damaged files (180,000 were tried); all of it means "unreadable".
BROKEN = (OSError, ValueError, SyntaxError, TypeError, RuntimeError, LookupError, ArithmeticError,
          struct.error, Image.DecompressionBombError, Image.DecompressionBombWarning)
PRECISIONS = ("auto", "fp32", "bf16")
# Random numbers of data come from (seed, stream, numbers): no two streams meet.
STREAMS = {"scene": 0, "prompts": 1, "draws": 3, "latents": 5, "detector": 6, "order": 7}


# ---- what every program shares -------------------------------------------------------------------

class UserError(Exception):
    """A user's mistake: one sentence that names the file, key or flag, and the fix."""


def run(main: Callable) -> None:
    """A program: a user's mistake ends in its sentence and exit code 2, a bug in its traceback. Of
    the ranks of a run the first that ends says why, and the others, who lose it, are quiet."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")     # captions that a terminal cannot show
    sys.unraisablehook = interrupt_again
    try:
        main()
    except UserError as error:
        end(str(error), 2)
    except KeyboardInterrupt:
        end("stopped: the same command goes on", 130)
    except torch.cuda.OutOfMemoryError as error:
        end(f"the GPU's memory is full ({first_line(error)}): end other programs on it, or pass a "
            "smaller --batch (train.py: a larger --accumulate; rewards.py: fewer --rewards)", 2)
    except Exception as error:
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
        if alone or not lost:
            first_to_say()                                    # the others are quiet: this is a bug
            raise
        end(f"another rank has ended or never came ({first_line(error)}): run the command again", 1)
    finally:
        for file in HELD.values():
            file.close()
        HELD.clear()
        signal.signal(signal.SIGINT, signal.SIG_DFL)          # Ctrl-C while Python clears up


def interrupt_again(lost) -> None:
    """Ctrl-C that falls into a destructor, where Python would drop it, comes once more."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        threading.Timer(0.01, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(lost)


def end(why: str, code: int) -> None:
    """Say why a program ends, if no other rank has done so, and end it."""
    if first_to_say():
        print(why, file=sys.stderr)
    sys.exit(code)


def first_to_say() -> bool:
    """Is this the first rank of a run to end? True also if there is one alone, or none answers."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    try:
        return rank_store(timedelta(seconds=5)).add("ended", 1) == 1
    except (dist.DistError, KeyError):                        # KeyError: no MASTER_ADDR
        return True


def rank_store(timeout: timedelta) -> dist.Store:
    """What the ranks of a run share, also before and after they are a process group."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                          is_master=False, timeout=timeout)
    return dist.PrefixStore(f"miro-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


HELD = {}                     # the file of each folder's lock, open until the program ends


def hold(folder: str | Path, shared: bool = False, rank: int = 0, ranks: int = 1) -> None:
    """Keep others from writing a folder until the program ends; shared: they may hold it like this,
    too. Of several ranks each holds its byte of the lock. UserError: another process holds it."""
    path = Path(folder).resolve() / ".lock"
    try:
        file = HELD[path] = open(path, "ab+", buffering=0)
    except OSError:
        return                                     # it is not ours to write, or there is no room
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB, *((1, rank) if ranks > 1 else ()))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):         # else: a disk without locks
            file.seek(0)
            raise UserError(f"{folder} is in use by {file.read().decode()}: wait for it, or name "
                            "another folder") from error
    with contextlib.suppress(OSError):                          # a full disk: it stays nameless
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
    if not shared and ranks == 1:
        for torn in path.parent.glob(".*.tmp"):                 # of processes that were killed
            torn.unlink(missing_ok=True)


class Parser(argparse.ArgumentParser):
    """Flags whose mistakes end in one sentence, too."""

    def error(self, message: str) -> None:
        raise UserError(f"{message.removeprefix('argument ')}: see python {self.prog} --help")


def between(kind: type, low: float = 0, high: float = 2 ** 62) -> Callable:
    """The type of a flag that is a number from low to high."""
    def value(text: str) -> float:
        found = kind(text)
        if not low <= found <= high:                                             # not: NaN, too
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high:g}")
        return found
    value.__name__ = kind.__name__                           # argparse says it: "invalid int value"
    return value


def make_folder(folder: str | Path) -> Path:
    """A folder, made if it is not there. UserError: nothing can be written into it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): name another "
                        "folder") from error
    return Path(folder)


def write_whole(path: Path, write: Callable) -> None:
    """write(temporary path), then rename: after a kill the file is the old one or the new one.
    UserError: it cannot be written there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    umask = os.umask(0)
    os.umask(umask)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.chmod(temporary, 0o666 & ~umask)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({first_line(error)}): make room, or name "
                        "another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """A text file, whole."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    """A file of JSON, whole, that `read_json` knows again."""
    write_text(path, seal(content))


def read_json(path: Path, sealed: bool = True) -> dict:
    """A file with one JSON object; sealed: as `write_json` wrote it. UserError: it is not there, is
    something else, damaged, or was changed by hand."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return unseal(found) if sealed else dict(found)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): write it again, or name "
                        "another") from error


def seal(content: dict) -> str:
    """JSON with 16 hex digits of its content, as `unseal` checks it."""
    content = json.loads(json.dumps(content))
    return json.dumps(content | {"seal": digest(content)})


def unseal(found: dict) -> dict:
    """The content that was sealed. ValueError: it is not what it was."""
    if not isinstance(found, dict) or found.pop("seal", None) != digest(found):
        raise ValueError("it is damaged, or was changed by hand")
    return found


def digest(content) -> str:
    """16 hex digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """16 hex digits of a file's bytes."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()[:16]


def refuse_too_many(left_out: int, total: int, where: str, advice: str) -> None:
    """UserError if more than MAX_LEFT_OUT of the samples are left out."""
    if left_out > MAX_LEFT_OUT * total:
        raise UserError(f"{where}: {left_out} of {total} samples cannot be used (the limit is "
                        f"{MAX_LEFT_OUT:.0%}): {advice}")


def printable(text: str) -> str:
    """Foreign text for a terminal: without control characters and escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def stream(seed: int, name: str, *numbers: int) -> np.random.Generator:
    """The random numbers of one purpose and, say, one position: of nothing else."""
    return np.random.default_rng([seed, STREAMS[name], *numbers])


def best_device() -> torch.device:
    """CUDA, else MPS, else CPU; under torchrun a rank's own GPU, or the CPU: gloo has no MPS."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return torch.device("mps" if torch.backends.mps.is_available() and alone else "cpu")


def compiles(device: torch.device | str) -> bool:
    """Does torch.compile pay? On CUDA, where there are the C compiler and header that it needs."""
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return (torch.device(device).type == "cuda" and header.exists()
            and any(map(shutil.which, ("cc", "gcc", "clang"))))


def precision(name: str, device: torch.device) -> torch.dtype:
    """One of PRECISIONS → what a network's matrix products are made in. "auto" is bf16 on a GPU
    that has it, else fp32 (on most CPUs bf16 is slower)."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


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


def decode(data: bytes, side: int | None = None) -> Image.Image:
    """An encoded picture → its first frame, upright by EXIF; a JPEG may be decoded at 1/2, 1/4 or
    1/8 where that keeps `side` pixels. One of BROKEN: it cannot be read, or is over MAX_PIXELS."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
    except UnidentifiedImageError:
        raise ValueError("not in a known format; save it as PNG or JPEG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"over {MAX_PIXELS:,} pixels; save it smaller") from None
    if side:
        image.draft(None, (side, side))
    ImageOps.exif_transpose(image, in_place=True)     # reads the pixels, too
    return image


def square(data: bytes, size: int) -> np.ndarray:
    """An encoded picture → uint8 (3, size, size): its centre square, then antialiased bicubic; a
    picture that is already size x size keeps its pixels. Raises what `decode` raises."""
    image = decode(data, 3 * size)
    side = min(image.size)
    if image.size != (side, side):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    image = to_rgb(image)                             # before resizing: hidden colours do not bleed
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(image).transpose(2, 0, 1)                                  # (3, size, size)


# ---- the border: SOURCE -> pieces -> samples that can be read -> columns -> a shard --------------
# A piece is what a shard is made of: the file of a tar, or up to PIECE samples of a folder, {key:
# parts}. A part, "picture", "txt" or "json", is its place, (file, offset, length) with a file as
# `file_of` has it, or says why it cannot be read; a "record" is the line of a table.

PIECE = 1000
MAX_WORDS = 100              # of a caption, beyond which there is a note
KINDS = {"txt": "txt", "json": "json"} | dict.fromkeys(
    "png jpg jpeg webp gif bmp tif tiff ppm pgm avif jp2".split(), "picture")
TABLES = ("metadata.jsonl", "metadata.csv")
CAPTIONS = ("text", "caption", "captions", "synthetic_caption")     # in a .json, or a table's line
NOT_TEXT = re.compile("[\0\ud800-\udfff]")      # NUL, halves of surrogate pairs: cannot be written


def import_pictures(sources: Sequence, out: Path, size: int, rank: int = 0, ranks: int = 1,
                    one_line: bool = False, vae: "VAE | None" = None, encoder: "T5 | None" = None,
                    dry_run: bool = False) -> bool:
    """SOURCES → DATA of squares of `size` pixels, or with vae and encoder of their latents.
    one_line: the first line of a .txt is its caption. dry_run: only say what is there.

    Ranks share the pieces, shards made of the same stay, and the last rank to finish removes those
    of other files, writes data.json and returns True. UserError: a source is damaged, DATA is
    something else, or too much is left out."""
    out, report, marks = Path(out), Report(), {}
    pieces = find_pieces(sources, report)
    if dry_run or not pieces:
        for name, piece in pieces.items():
            for _ in read_samples(name, piece, size, one_line, report):
                pass
        report.show(sources)
        return False
    info = dict(kind="pixels", size=size)
    if vae is not None:
        vae.load()
        encoder.load()
        info = dict(kind="latents", size=size, vae=vae.source, dtype=str(encoder.model.dtype),
                    scaling_factor=vae.model.config.scaling_factor, text_encoder=encoder.config())
    before = open_data(out, info)
    for name, piece in pieces.items():       # 16 hex digits that change when any of its files does
        made_of = json.dumps([info, piece, one_line])
        marks[name] = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    todo = [name for name in [*pieces][rank::ranks] if before.get(name) != marks[name]]
    if rank > 0 and not todo:
        return False
    if before != marks:
        (out / "data.json").unlink(missing_ok=True)              # from now on the data is not whole
    for name in tqdm(todo, "pieces", disable=rank > 0 or None):
        own = Report()
        samples = read_samples(name, pieces[name], size, one_line, own)
        columns, files = columns_of(samples, size, vae, encoder)
        write_shard(out / f"{name}.safetensors", columns, source=marks[name], files=files,
                    left_out=own.left_out, notes=own.notes)
    whole = marks.items() <= open_data(out, info).items()
    if whole:
        finish(out, sources, info, {*marks}, report)
    return whole


class Report:
    """What is said in the end: how many samples are usable and, by reason, left out; and notes, by
    kind [how many, the first]."""

    def __init__(self):
        self.usable, self.left_out, self.notes = 0, Counter(), {}

    def note(self, kind: str, name: str, count: int = 1) -> None:
        """Count it."""
        self.notes.setdefault(kind, [0, utf8(name)])[0] += count

    def not_read(self, path: str) -> None:
        """Count a file that is not read, by its ending."""
        ending = os.path.splitext(path)[1].lower()
        self.note(f"not read, {ending if ending[1:].isalpha() else 'others'}", path)

    def show(self, sources: Sequence) -> None:
        """Print all. UserError: too much is left out."""
        for kind, (count, first) in self.notes.items():
            print(printable(f"note: {kind}: {count}, the first is {first}"))
        left_out, where = sum(self.left_out.values()), ", ".join(map(str, sources))
        found = self.usable + left_out
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        print(f"{found} found = {self.usable} usable + {left_out} left out ({reasons or 'none'})")
        if self.usable == 0:
            raise UserError(f"{where} has no picture with a caption that can be used "
                            f"({reasons or 'none was found'}): make it as docs/data.md says")
        refuse_too_many(left_out, found, where, f"{reasons}; --dry-run names all")


# -- which samples there are: names and tables, no picture is opened

def find_pieces(sources: Sequence, report: Report) -> dict[str, dict | tuple]:
    """Name of a shard → its piece. UserError: a source is not there, or two have one name."""
    found = []
    for source in map(str, sources):
        if os.path.isfile(source):
            found.append((Path(source).stem, file_of(source)))
            continue
        if not os.path.isdir(source):
            raise UserError(f"{source} is no file and no folder: give tars or folders of pictures")
        files, samples = list_folder(source, report), {}
        tars = [name for name in files if "/" not in name and name.lower().endswith(".tar")]
        tables = [name for name in TABLES if name in files]
        if tars:
            found += [(Path(name).stem, files.pop(name)[0]) for name in tars]
        elif tables:
            samples = read_table(source, tables[0], files)
        else:
            samples = samples_of(files, source, first_dot=False)
        for name in files:
            report.not_read(f"{source}/{name}")
        keys, folder = sorted(samples), Path(source).resolve().name
        for first in range(0, len(keys), PIECE):
            part = {key: samples[key] for key in keys[first:first + PIECE]}
            found.append((f"{folder}-{first // PIECE:05d}", part))
    for name, count in Counter(name for name, _ in found).items():
        if count > 1 or name[0] == "." or name.endswith(".scores"):
            raise UserError(f"{count} tars or folders would become the shard {name!r}, and a shard "
                            "has a name of its own, neither hidden nor ending in .scores: rename")
    return dict(found)


def list_folder(folder: str, report: Report) -> dict[str, tuple]:
    """Name → place of all regular files below a folder, but hidden ones: a pipe would hang, a
    device would never end."""
    places, closed = {}, partial(report.note, "not read, a folder without right to it")
    for parent, folders, names in os.walk(folder, onerror=lambda error: closed(error.filename)):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in [name for name in names + folders if name[0] != "."]:
            path = os.path.join(parent, name)
            if os.path.isfile(path):
                file = file_of(path)
                places[os.path.relpath(path, folder)] = (file, 0, file[1])
            elif not os.path.isdir(path) or os.path.islink(path):
                report.note("not read, no regular file", path)
    return dict(sorted(places.items()))


def file_of(path: str) -> tuple[str, int, int]:
    """Whole path, size and time of change of a file, by which it is known again."""
    now = os.stat(path)
    return os.path.abspath(path), now.st_size, now.st_mtime_ns


def read_table(folder: str, table: str, files: dict) -> dict:
    """metadata.jsonl or .csv: takes the files of samples out of {name: place} → key, the whole
    name, → parts. UserError: a line is broken, or names a picture that was named before."""
    del files[table]
    number, samples, by_name = 0, {}, {utf8(name): name for name in files}
    try:
        with open(f"{folder}/{table}", encoding="utf-8-sig", newline="") as file:
            lines = (json.loads(line) for line in file if line.strip())
            for number, record in enumerate(csv.DictReader(file) if "csv" in table else lines, 1):
                name = record.get("file_name") if isinstance(record, dict) else None
                if not isinstance(name, str) or None in record:
                    raise ValueError("no file_name, or a comma that is not in quotes")
                key = unicodedata.normalize("NFC", os.path.normpath(name))
                if key in samples:
                    raise ValueError(f"{key!r} a second time; give all captions in one line")
                missing = f"no such file: {name} in {folder}, where / divides folders"
                samples[key] = {"picture": files.pop(by_name.get(key), missing), "record": record}
    except (csv.Error, ValueError, RecursionError) as error:
        raise UserError(printable(f"{folder}/{table}, near record {number}: {first_line(error)}; "
                                  "correct it, in UTF-8")) from error
    return samples


def utf8(name: str) -> str:
    """A file's name as text: in one spelling of accents (NFC), bytes that are no text as \\xXX."""
    content = name.encode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFC", content.decode("utf-8", "backslashreplace"))


def samples_of(files: dict, where: str, first_dot: bool) -> dict:
    """Takes the files of samples out of {name: place} → key → parts. A key ends at the first dot of
    a name, or at the last. UserError: two pictures, or two texts, with one key."""
    samples = {}                                                 # key → kind → name
    for name in files:
        parent, slash, base = utf8(name).rpartition("/")
        stem, ending = os.path.splitext(base)
        key = parent + slash + (stem.partition(".")[0] if first_dot else stem)
        kind = KINDS.get(ending[1:].lower())
        if kind is None:
            continue
        if kind in samples.setdefault(key, {}):
            raise UserError(printable(f"{where}: {utf8(name)} is a second {kind} with the key "
                                      f"{key!r} (in a tar, all before the first dot): rename it"))
        samples[key][kind] = name
    return {key: {kind: files.pop(name) for kind, name in names.items()}
            for key, names in samples.items() if "picture" in names}


# -- the samples of a piece

def read_samples(shard: str, piece: dict | tuple, size: int, one_line: bool,
                 report: Report) -> Iterator[tuple]:
    """The samples that can be used: key, captions, place, pixels uint8 (3, size, size). The others
    are named and counted."""
    if not isinstance(piece, dict):                              # the file of a tar
        where, files = piece[0], tar_files(piece)
        piece = samples_of(files, where, first_dot=True)
        for name in files:
            report.not_read(f"{where}/{name}")
    quiet = os.environ.get("RANK", "0") != "0" or None
    for key, parts in tqdm(piece.items(), shard, leave=False, disable=quiet):
        name = f"{shard}/{key}"
        try:
            captions = captions_of(name, parts, one_line, report)
            content = read_part(parts["picture"])
            try:
                pixels = square(content, size)
            except BROKEN as error:
                raise UserError(f"an unreadable picture: {first_line(error)}") from error
        except UserError as error:
            print(printable(f"left out {name}: {error}"))
            report.left_out[str(error).partition(":")[0]] += 1
            continue
        report.usable += 1
        yield key, captions, parts["picture"], pixels


def tar_files(file: tuple) -> dict[str, tuple | str]:
    """Name → place, or why it cannot be read, of a tar's members; a link has its target's.
    UserError: the tar is damaged, or two members have one name."""
    places, links = {}, {}
    for member in tar_members(file[0]):
        name = os.path.normpath(member.name)
        if member.isdir() or any(part[:1] == "." for part in name.split("/")):
            continue
        if name in places or name in links:
            raise UserError(printable(f"{file[0]}: a second {name!r}: rename it"))
        if member.issym() or member.islnk():
            base = os.path.dirname(name) if member.issym() else ""
            links[name] = os.path.normpath(os.path.join(base, member.linkname))
        elif member.isreg() and not member.issparse():
            places[name] = (file, member.offset_data, member.size)
        else:
            places[name] = "no regular file, or with holes: write the tar without --sparse"
    for name, target in links.items():
        for _ in range(40):                                      # a link to a link, and so on
            target = links.get(target, target)
        places[name] = places.get(target, f"a link to what is no file in the tar: {utf8(target)}")
    return places


def tar_members(path: str) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar, or of several end to end: tarfile alone takes a block of zeros, or a
    bad header, for the end in silence. UserError: it is damaged, and at which byte."""
    start = 0
    try:
        with open(path, "rb") as file:
            tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")
            while True:
                while (member := tar.next()) is not None:
                    if tar.offset <= start:                      # it would be read for ever
                        raise tarfile.ReadError("a size below 0")
                    tar.members, start = [], tar.offset          # or it keeps every header
                    yield member
                file.seek(tar.offset)
                if file.read(512) != bytes(512):
                    raise tarfile.ReadError("neither a header nor an end")
                while (block := file.read(512)) == bytes(512):
                    continue
                if not block.strip(b"\0"):
                    return
                tar.offset = start = file.tell() - len(block)    # there is more: go on
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{printable(path)} is packed, damaged, cut short or no tar, at byte "
                        f"{start} ({first_line(error)}): unpack it, or fetch it again") from error


def captions_of(name: str, parts: dict, one_line: bool, report: Report) -> list[str]:
    """The captions of a sample, each once: its .txt, or else text or caption; then the others of
    CAPTIONS. UserError: there is none."""
    texts, record, captions = [], parts.get("record"), []
    try:
        if "txt" in parts:
            text = read_part(parts["txt"]).decode("utf-8-sig").strip()
            lines = text.splitlines()
            texts = lines[:1] if one_line or not lines else [text]
        if "json" in parts:
            record = json.loads(read_part(parts["json"]))
    except (ValueError, RecursionError) as error:      # RecursionError: thousands of brackets
        raise UserError(f"a broken .txt or .json: {first_line(error)}; save it in UTF-8") from None
    for key in CAPTIONS:
        value = record.get(key) if isinstance(record, dict) else None
        if value is not None and not (texts and key in ("text", "caption")):
            texts += value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str) or NOT_TEXT.search(text):
            raise UserError("a caption that is not plain text")
        words, lines = len(split_words(text)), len(text.strip().splitlines())
        if words == 0:
            report.note("captions without a word", name)
        elif text.strip() not in captions:
            captions.append(text.strip())
            if lines > 1 or words > MAX_WORDS:
                report.note(f"captions of several lines or over {MAX_WORDS} words, which slow "
                            "training (shorten them, or pass --first-line)", name)
    if not captions:
        raise UserError("a caption without a word" if texts else "no caption: no .txt with its "
                        "key, no text or caption in a .json or table")
    return captions


def read_part(place: tuple | str) -> bytes:
    """The bytes at a place. UserError: why there are none."""
    if isinstance(place, str):
        raise UserError(place)
    (path, _, _), offset, length = place
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError as error:
        raise UserError(f"a file that cannot be read: {path} ({error.strerror})") from error


# -- shards of them

def open_data(out: Path, info: dict) -> dict[str, str]:
    """Make the folder DATA; name of a shard → mark of what it was made of. UserError: the folder
    cannot be made, or holds something else."""
    make_folder(out)
    before = read_json(out / "data.json") if (out / "data.json").is_file() else info
    for key in info:
        if before.get(key) != info[key]:
            raise UserError(f"{out} was made with {key} {before.get(key)}, not {info[key]}: ask "
                            "for the same, or name another folder")
    marks = {path.stem: Shard(path).metadata.get("source") for path in shard_paths(out)}
    if None in marks.values() or not marks and any(out.glob("[!.]*")):
        raise UserError(f"DATA, the last argument, is {out}, which holds files that this command "
                        "did not make: name a folder of its own")
    return marks


def columns_of(samples: Iterator, size: int, vae: "VAE | None",
               encoder: "T5 | None") -> tuple[dict, list]:
    """Samples → a shard's columns, and the files that `place` counts. UserError: not finite."""
    rows, pictures, states, places, files = [], [], [], [], {}
    while batch := list(islice(samples, 16)):
        rows += [sample[:3] for sample in batch]
        found = [pixels for *_, pixels in batch]                                 # (3, s, s) each
        if vae is not None:
            latents = torch.stack(vae.encode(torch.from_numpy(np.stack(found))), 1)
            found = latents.half().numpy()                                       # (b, 2, C, S, S)
            encoder.states([text for _, texts, *_ in batch for text in texts])   # all at once
            for (key, texts, *_), latent in zip(batch, found):
                of_texts = [state.half().numpy() for state in encoder.states(texts)]    # (L, E)
                if not all(np.isfinite(array).all() for array in (latent, *of_texts)):
                    raise UserError(printable(f"what {key} becomes is not finite: name another "
                                              "--vae or --text-encoder, or remove the sample"))
                states += of_texts
            encoder.known.clear()
        pictures += list(found)
    for _, _, (file, offset, length) in rows:
        places.append((files.setdefault(file, len(files)), offset, length))
    keys, key_ends = pack([key for key, _, _ in rows])
    captions, caption_ends = pack([text for _, texts, _ in rows for text in texts])
    columns = dict(place=np.array(places, np.int64).reshape(-1, 3), keys=keys, key_ends=key_ends,
                   captions=captions, caption_ends=caption_ends,
                   pair_ends=ends_of([texts for _, texts, _ in rows]))
    if vae is None:
        pixels = np.array(pictures, np.uint8).reshape(-1, 3, size, size)
        return columns | {"pixels": pixels}, [*files]
    shape = vae.model.config.latent_channels, size // 8, size // 8
    x = np.array(pictures, np.float16).reshape(-1, 2, *shape)
    empty = encoder.states([""])[0].half().numpy()                               # (L, E)
    return columns | dict(mean=x[:, 0], std=x[:, 1], text=np.concatenate([empty[:0], *states]),
                          text_ends=ends_of(states), empty=empty), [*files]


def finish(out: Path, sources: Sequence, info: dict, names: set[str], report: Report) -> None:
    """All shards are there: remove those of other files, say what there is, write data.json."""
    for path in [*out.glob(".*.safetensors.*.tmp"), *shard_paths(out)]:      # .tmp: of a kill
        if path.stem not in names:
            path.unlink(missing_ok=True)
            path.with_name(f"{path.stem}.scores.safetensors").unlink(missing_ok=True)
    pairs, longest, words = 0, 0, set()
    for shard in map(Shard, shard_paths(out)):
        said, pairs = shard.metadata, pairs + shard.pairs
        report.usable += shard.rows
        report.left_out.update(said["left_out"])
        for kind, (count, first) in said["notes"].items():
            report.note(kind, first, count)
        for caption in shard.captions if info["kind"] == "pixels" else ():
            split = split_words(caption)
            longest = max(longest, len(split))
            words.update(split)
    report.show(sources)
    if info["kind"] == "pixels":
        info = info | dict(words=sorted(words), longest=longest)
    write_info(out, info | dict(shards=len(names), samples=report.usable, pairs=pairs,
                                left_out=report.left_out))


# ---- the format ----------------------------------------------------------------------------------

def ends_of(pieces: Sequence) -> np.ndarray:
    """Where each piece ends, where they lie end to end: int64 (n,)."""
    return np.cumsum([len(piece) for piece in pieces], dtype=np.int64)


def span(ends: np.ndarray, i: int) -> tuple[int, int]:
    """[first, last) of the i-th piece."""
    return int(ends[i - 1]) if i else 0, int(ends[i])


BIG = {"pixels", "mean", "std", "text"}       # columns that are read, and verified, row by row


def pack(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Texts → their UTF-8 bytes end to end, uint8, and where each ends, int64 (n,)."""
    encoded = [text.encode() for text in texts]
    return np.frombuffer(b"".join(encoded), np.uint8), ends_of(encoded)


def unpack(content: np.ndarray, ends: np.ndarray) -> list[str]:
    """The inverse of pack."""
    return [content[slice(*span(ends, i))].tobytes().decode() for i in range(len(ends))]


def write_shard(path: Path, columns: dict[str, np.ndarray], **metadata) -> None:
    """One file of DATA, whole or not at all; equal shards are equal bytes. Added: a column of sums
    for each of BIG; and to the metadata rows, pairs, a digest of keys, captions and pictures, each
    channel's sum and sum of squares, and "digests" of all columns that are not BIG."""
    columns = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    pictures, content = columns["pixels" if "pixels" in columns else "mean"], hashlib.sha256()
    for name in ("keys", "key_ends", "captions", "caption_ends", "pair_ends"):
        content.update(columns[name].tobytes())
    content.update(pictures.tobytes())
    squares = sum(np.einsum("nchw,nchw->c", x, x, dtype=np.float64)              # (C,)
                  for x in (pictures, columns.get("std")) if x is not None)    # std: x_0 is drawn
    for name in BIG.intersection(columns):
        parts = columns[name]
        if name == "text":
            parts = [parts[slice(*span(columns["text_ends"], i))]
                     for i in range(len(columns["text_ends"]))]
        columns[f"{name}_sums"] = np.array([word_sum(part) for part in parts], np.uint64)
    metadata |= dict(rows=len(pictures), pairs=len(columns["caption_ends"]),
                     sums=pictures.sum((0, 2, 3), dtype=np.float64).tolist(),
                     squares=squares.tolist(), digest=content.hexdigest()[:16],
                     digests={name: array_digest(columns[name]) for name in columns
                              if name not in BIG})
    header = {"miro": seal(metadata)}            # one key: safetensors shuffles several
    write_whole(path, lambda temporary: save_file(columns, temporary, header))


def word_sum(x: np.ndarray) -> int:
    """The sum of an array's bytes, eight at a time, modulo 2^64: no flipped bit keeps it, and it
    costs a tenth of what a checksum does."""
    content = np.frombuffer(x.tobytes() + bytes(-x.nbytes % 8), np.uint64)
    return int(content.sum(dtype=np.uint64))


def array_digest(x: np.ndarray) -> str:
    """16 hex digits of an array's bytes."""
    return hashlib.sha256(x.tobytes()).hexdigest()[:16]


def write_info(folder: Path, info: dict) -> None:
    """DATA/data.json, written last: where it is, the data is whole."""
    write_json(folder / "data.json", dict(format=2, **info))


def shard_paths(folder: Path) -> list[Path]:
    """The shards of DATA, by name."""
    return sorted(path for path in Path(folder).glob("[!.]*.safetensors")
                  if not path.name.endswith(".scores.safetensors"))


class Shard:
    """One file of DATA; columns are read when asked for. UserError: it is damaged, or no shard."""

    def __init__(self, path: Path):
        self.path, self.name = Path(path), Path(path).stem
        notes = self.metadata
        self.rows, self.pairs, self.digest = notes["rows"], notes["pairs"], notes["digest"]

    def close(self) -> None:
        """Give back the file and all that is kept of it; it comes again when it is asked for."""
        for name in ("file", "files", "ends"):
            self.__dict__.pop(name, None)

    def __getstate__(self) -> dict:               # a started worker process opens the file anew
        self.close()
        return self.__dict__

    @cached_property
    def file(self):
        """The mapped file."""
        try:
            return safe_open(self.path, "np")
        except (OSError, SafetensorError) as error:
            raise self.damaged(error) from error

    def damaged(self, why: BaseException | str) -> UserError:
        """The sentence for a file that is not as it was written."""
        return UserError(f"{self.path} cannot be read ({first_line(why)}): import again, or name "
                         "another folder")

    @property
    def metadata(self) -> dict:
        """What `write_shard` was told, and added."""
        try:
            return unseal(json.loads(self.file.metadata()["miro"]))
        except (TypeError, LookupError, ValueError) as error:
            raise self.damaged("it is no shard of DATA, or damaged") from error

    def read(self, column: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows [first, last) of a column; all of it without them."""
        try:
            if last is None:
                return self.file.get_tensor(column)[first:]
            return self.file.get_slice(column)[first:last]
        except SafetensorError as error:
            raise self.damaged(error) from error

    def row(self, column: str, row: int) -> np.ndarray:
        """A row of one of BIG; of text the states of one pair's caption: float16 (L, E)."""
        first, last = span(self.ends["text_ends"], row) if column == "text" else (row, row + 1)
        values = self.read(column, first, last)
        if word_sum(values) != self.ends[f"{column}_sums"][row]:
            raise self.damaged(f"{column} {row} is damaged")
        return values if column == "text" else values[0]

    @cached_property
    def ends(self) -> dict[str, np.ndarray]:
        """Where each piece of the columns that lie end to end ends, int64; and the sums of rows.
        When they are read all columns that are not BIG are verified."""
        kept = {}
        for name, digest_then in self.metadata["digests"].items():
            column = self.read(name)
            if array_digest(column) != digest_then:
                raise self.damaged(f"{name} is damaged")
            if name.endswith(("_ends", "_sums")):
                kept[name] = column
        return kept

    @property
    def owners(self) -> np.ndarray:
        """The sample of each pair: int64 (P,)."""
        return np.repeat(np.arange(self.rows), np.diff(self.ends["pair_ends"], prepend=0))

    @property
    def keys(self) -> list[str]:
        """The samples' names."""
        return unpack(self.read("keys"), self.ends["key_ends"])

    @property
    def captions(self) -> list[str]:
        """The caption of each pair."""
        return unpack(self.read("captions"), self.ends["caption_ends"])

    def caption(self, pair: int) -> str:
        """The caption of one pair."""
        return self.read("captions", *span(self.ends["caption_ends"], pair)).tobytes().decode()

    @cached_property
    def files(self) -> list[list]:
        """The files that `place` counts, as `file_of` has them; none of shapes.py's pictures."""
        return self.metadata.get("files", [])

    def image(self, row: int) -> bytes | None:
        """The encoded picture of a sample from SOURCE; None: it never was in a file.
        UserError: the file is gone, or another one since it was imported."""
        if not self.files:
            return None
        number, offset, length = self.read("place", row, row + 1)[0].tolist()
        file = self.files[number]
        if not os.path.isfile(file[0]) or list(file_of(file[0])) != file:
            raise UserError(f"{file[0]} has changed since {self.path} was made from it: import "
                            "again")
        return read_part((file, offset, length))

    def picture(self, row: int, size: int) -> np.ndarray:
        """A sample as uint8 (3, size, size): its pixels, or the picture in SOURCE cut to it."""
        if "pixels" in self.file.keys():
            pixels = self.row("pixels", row)
            if pixels.shape[1] == size:
                return pixels
        return square(self.image(row), size)


class Data:
    """DATA: what data.json says, and its shards by name. Reading it costs a header a shard.
    UserError: there is no data.json, or not all shards are there."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "data.json").is_file():
            raise UserError(f"{path} has no data.json: make DATA of pictures with python data.py "
                            f"import SOURCE {path} --size 32, or run it to its end")
        self.info = read_json(self.path / "data.json")
        if self.info.get("format") != 2:
            raise UserError(f"{path}/data.json is not that of a dataset in format 2: import again")
        self.kind, self.size = self.info["kind"], self.info["size"]
        self.side = self.size if self.kind == "pixels" else self.size // 8
        self.shards = [Shard(path) for path in shard_paths(self.path)]
        if len(self.shards) != self.info["shards"]:
            raise UserError(f"{path} has {len(self.shards)} of {self.info['shards']} shards: run "
                            "the command that made it again")
        self.rows = sum(shard.rows for shard in self.shards)
        self.pairs = sum(shard.pairs for shard in self.shards)
        self.channels = len(self.shards[0].metadata["sums"])          # of x_0

    def captions(self) -> list[str]:
        """Some of them: those of the first shard that has any."""
        return next(shard for shard in self.shards if shard.pairs).captions

    def mean_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of all of x_0, a channel: float64 (C,) each."""
        sums, squares = (np.sum([shard.metadata[key] for shard in self.shards], 0)
                         for key in ("sums", "squares"))
        mean = sums / (self.rows * self.side ** 2)                               # (C,)
        return mean, np.sqrt(squares / (self.rows * self.side ** 2) - mean ** 2)


# ---- the order of samples ------------------------------------------------------------------------

def permutation(n: int, seed: int, *numbers: int) -> np.ndarray:
    """A random order of n rows: int64 (n,). Of raw bits, which numpy promises never to change."""
    source = np.random.SeedSequence((seed, STREAMS["order"], *numbers))
    return np.argsort(np.random.PCG64(source).random_raw(n), kind="stable")


class Order:
    """Which sample stands at a position of the endless stream: a function of (seed, position).

    An epoch shuffles the shards, takes them in windows, and shuffles the rows of each window: every
    sample comes once, and only a window's files are needed at a time. counts: rows of each shard.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int = 64):
        self.counts, self.seed, self.window = np.array(counts, np.int64), seed, window
        self.known = {}                              # what the last epoch and windows were made of

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions int64 (b,) → the shard and its row at each, int64 (b,)."""
        found = np.empty((2, len(positions)), np.int64)
        epochs, inside = np.divmod(positions, self.counts.sum())
        for i, (epoch, place) in enumerate(zip(epochs.tolist(), inside.tolist())):
            _, ends = self.remember(self.windows, epoch)
            number = int(np.searchsorted(ends, place, side="right"))
            rows = self.remember(self.rows_of, epoch, number)
            found[:, i] = rows[:, place - span(ends, number)[0]]
        return found[0], found[1]

    def remember(self, function: Callable, *numbers: int):
        """function(*numbers), kept: a batch needs two epochs and two windows at most."""
        value = self.known.pop(numbers) if numbers in self.known else function(*numbers)
        self.known[numbers] = value                       # one number: an epoch, two: a window
        if len(self.known) > 4:
            del self.known[next(iter(self.known))]        # that was asked for the longest ago
        return value

    def windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch, shuffled, and where its windows end: int64 each."""
        shards = permutation(len(self.counts), self.seed, epoch)
        firsts = np.arange(0, len(shards), self.window)
        return shards, np.cumsum(np.add.reduceat(self.counts[shards], firsts))

    def rows_of(self, epoch: int, number: int) -> np.ndarray:
        """The rows of one window, shuffled: shard and row, int32 (2, n)."""
        shards, _ = self.remember(self.windows, epoch)
        shards = shards[number * self.window:(number + 1) * self.window]
        counts = self.counts[shards]
        rows = np.concatenate([np.arange(count) for count in counts])
        order = permutation(len(rows), self.seed, epoch, 1 + number)         # 0 is the shards' own
        return np.stack([np.repeat(shards, counts), rows]).astype(np.int32)[:, order]


# ---- words as vectors ----------------------------------------------------------------------------

# Scripts that are written without spaces: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff"
                       "\uf900-\ufaff\U00020000-\U0003ffff]")


@lru_cache(maxsize=2 ** 16)              # training reads the same captions again and again
def split_words(text: str) -> tuple[str, ...]:
    """"Two dogs, don't!" → ("two", "dogs", "don't"): letters, digits and marks, such as the vowel
    signs of Hindi. Emoji and the characters of scripts without spaces are words of their own."""
    pieces, alone = [], False
    for c in unicodedata.normalize("NFC", text.lower()).replace("\ufe0f", ""):
        kind = unicodedata.category(c)
        if kind[0] == "M":
            pieces.append(c)                           # belongs to the character before
            continue
        was_alone = alone
        alone = bool(SPACELESS.match(c)) or kind in ("So", "Sk") and not c.isascii()
        if alone or was_alone:
            pieces.append(" ")
        pieces.append(c if alone or c.isalnum() or c == "'" else " ")
    return tuple(word for part in "".join(pieces).split() if (word := part.strip("'")))


class Words:
    """A frozen text encoder without weights, not in the paper (FLAN-T5 XL). A third of the channels
    each: of a word a random vector; those of the five words on either side, turned by their
    distance and halved with each step (T5's states know their neighbours, too); the sin-cos vector
    of its position.

    Each has unit variance. A word's is uniform, from its hash: the same in every vocabulary."""

    def __init__(self, vocabulary: Sequence[str], dim: int = 96, length: int = 16):
        assert dim % 12 == 0, dim
        third = dim // 3
        self.vocabulary, self.dim, self.length = tuple(vocabulary), dim, length
        self.index = {word: i for i, word in enumerate(("", *vocabulary))}   # "": an empty prompt's
        digests = b"".join(hashlib.shake_256(word.encode()).digest(third) for word in self.index)
        values = torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, third)
        self.words = (values - 127.5) / ((256 ** 2 - 1) / 12) ** 0.5              # (V+1, dim/3)
        off = torch.tensor((-5, -4, -3, -2, -1, 1, 2, 3, 4, 5))
        place = torch.arange(length)[:, None]                                     # (length, 1)
        self.near = place + 5 + off                           # (length, 10): in words padded with 5
        self.turned = (torch.arange(third) + off[:, None]) % third                # (10, dim/3)
        self.share = 1.5 ** 0.5 * 0.5 ** off.abs()[:, None]                       # (10, 1)
        frequency = 100.0 ** (-torch.arange(dim // 6) / (dim // 6))   # captions are short: not 10^4
        angle = place * frequency                                                 # (length, dim/6)
        self.positions = 2 ** 0.5 * torch.cat([angle.sin(), angle.cos()], dim=1)  # (length, dim/3)

    def states(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """The vectors (L, dim) of each prompt's L words, float32; "" has one of its own.
        UserError: an unknown word, with what is valid, or too many words."""
        found = []
        for prompt in prompts:
            words = split_words(prompt)
            for word in words:
                if word not in self.index:
                    close = difflib.get_close_matches(word, self.vocabulary, n=60, cutoff=0)
                    raise UserError(f"{printable(prompt)!r} has the unknown word {word!r}; known "
                                    f"words, the closest first: {', '.join(close)}")
            if len(words) > self.length:
                raise UserError(f"{printable(prompt)!r} has {len(words)} words; shorten it to "
                                f"{self.length}")
            token = torch.tensor([self.index[word] for word in words or [""]])     # (L,)
            own, n = self.words[token], len(token)                                 # (L, dim/3)
            around = torch.nn.functional.pad(own, (0, 0, 5, 5))[self.near[:n]]     # (L, 10, dim/3)
            around = around.gather(2, self.turned.expand(n, -1, -1)) * self.share
            found.append(torch.cat([own, around.sum(1), self.positions[:n]], 1))
        return found

    def free(self) -> None:
        """Nothing: there are no weights (T5 has some)."""

    def config(self) -> dict:
        """What goes into config.json."""
        return {"kind": "words", "vocabulary": list(self.vocabulary), "dim": self.dim,
                "length": self.length}


# ---- the release's encoders ----------------------------------------------------------------------

@contextlib.contextmanager
def loading(what: str, source: str, flag: str) -> Iterator[None]:
    """UserError if a network cannot be loaded in the block."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, TypeError, pickle.UnpicklingError,
            SafetensorError) as error:
        raise UserError(f"the {what} {source} cannot be loaded: name a folder or hub id with "
                        f"{flag} ({first_line(error)})") from error


def pinned(source: str) -> tuple[str, str | None]:
    """A folder, or OWNER/NAME of the hub → itself, None; OWNER/NAME@COMMIT → OWNER/NAME, COMMIT:
    nobody can change what that is."""
    name, _, revision = source.partition("@")
    return (source, None) if os.path.exists(source) else (name, revision or None)


def frozen(network: type, source: str, **options) -> torch.nn.Module:
    """A network of a library. ValueError: a weight is missing, and would be left to chance."""
    name, revision = pinned(source)
    model, found = network.from_pretrained(name, revision=revision, output_loading_info=True,
                                           **options)
    if found["missing_keys"]:
        raise ValueError(f"it has no {min(found['missing_keys'])}")
    return model.eval().requires_grad_(False)


class T5:
    """Text as the paper reads it: the last states of a T5EncoderModel (FLAN-T5-XL), frozen.

    source: a hub id or a folder of transformers, loaded at the first prompt, in bf16 on a GPU and
    in fp32 else; `free` gives its memory back. Prompts once encoded are remembered."""
    SOURCE = "google/flan-t5-xl"

    def __init__(self, source: str, dim: int | None = None, length: int = 77):
        self.source, self.dim, self.length = source, dim, length
        self.model, self.known, self.device = None, {}, torch.device("cpu")

    def load(self) -> None:
        """Read tokenizer and weights. UserError: they are not there, or of another width."""
        from transformers import AutoTokenizer, T5EncoderModel
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        with loading("text encoder", self.source, "--text-encoder"):
            name, revision = pinned(self.source)
            self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
            model = frozen(T5EncoderModel, self.source, dtype=dtype)
            words, room, width = len(self.tokenizer), model.config.vocab_size, model.config.d_model
            if not room - 128 <= words <= room:     # without its files transformers makes one up
                raise ValueError(f"its tokenizer has {words} tokens and its table {room} rows")
            if self.dim not in (None, width):
                raise ValueError(f"states of width {width}, and this network reads {self.dim}")
        self.dim, self.model = width, model.to(self.device)

    @torch.no_grad()
    def states(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """The states (L, dim) of each prompt, float32 on the CPU, L its tokens, at most `length`:
        longer prompts are cut, and <PERSON>, a name taken out, is left out, as in the release."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        if new and self.model is None:
            self.load()
        for first in range(0, len(new), 32):
            part = [prompt.replace("<PERSON>", "") for prompt in new[first:first + 32]]
            tokens = self.tokenizer(part, padding=True, truncation=True, max_length=self.length,
                                    return_tensors="pt").to(self.device)
            states = self.model(**tokens).last_hidden_state.float().cpu()        # (b, L, dim)
            lengths = tokens["attention_mask"].sum(1).tolist()
            for prompt, state, length in zip(new[first:first + 32], states, lengths):
                self.known[prompt] = state[:length].clone()
        return [self.known[prompt] for prompt in prompts]

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
        """Read the weights, the first time. UserError: they are not there."""
        from diffusers import AutoencoderKL
        if self.model is None:
            with loading("VAE", self.source, "--vae"):       # low_cpu_mem_usage needs accelerate
                self.model = frozen(AutoencoderKL, self.source, low_cpu_mem_usage=False)
        self.model.to(self.device)

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (B, 3, 8 S, 8 S) → mean and std of the latents, (B, C, S, S) each."""
        self.load()
        found = self.model.encode(pictures.to(self.device).float() / 127.5 - 1).latent_dist
        return found.mean.cpu(), found.std.cpu()

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, S, S) in the VAE's own units → uint8 pictures (B, 3, 8 S, 8 S), CPU."""
        self.load()
        x = torch.cat([self.model.decode(part.to(self.device)).sample.cpu() for part in z.split(8)])
        return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def pad(states: Sequence[torch.Tensor], multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """States (L_i, E) → text (B, L, E), padded with 0, and text_mask (B, L) bool. L is the longest,
    rounded up to a multiple: a compiled network is compiled again for each L."""
    text = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True)       # (B, L, E)
    text = torch.nn.functional.pad(text, (0, 0, 0, -text.shape[1] % multiple))
    lengths = torch.tensor([len(s) for s in states])                             # (B,)
    return text, torch.arange(text.shape[1]) < lengths[:, None]


def encoder_of(config: dict, file: Path) -> Words | T5:
    """The encoder of a `config()` of either kind, as file has it. UserError: of another version."""
    if config["kind"] == "t5":
        return T5(config["source"], config["dim"], config["length"])
    if config["kind"] != "words" or config["dim"] % 12:
        raise UserError(f"{file} has the text encoder {config['kind']!r} with {config['dim']} "
                        "channels, of another version: use the code of the run's commit, or train "
                        "again")
    return Words(config["vocabulary"], config["dim"], config["length"])


# ---- the command line ----------------------------------------------------------------------------

def main() -> None:
    """The command line: bring pictures in."""
    parser = Parser(description="Bring pictures and captions into DATA")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what, size in (("import", "pictures as they are, cut to squares", 32),
                             ("encode", "their VAE latents and the T5 states of captions", 256)):
        add = commands.add_parser(name, help=what).add_argument
        add("sources", nargs="+", metavar="SOURCE", help="tar, folder of tars, or of pictures")
        add("data", metavar="DATA", help="folder to write")
        add("--size", type=between(int, 1), default=size, help="side in pixels")
        add("--first-line", action="store_true", help="a caption is the first line of its .txt")
        add("--dry-run", action="store_true", help="write nothing, and say what is there")
    add("--vae", default=VAE.SOURCE, help="folder, or hub id[@commit], of an AutoencoderKL")
    add("--text-encoder", default=T5.SOURCE, help="folder, or hub id[@commit], of a T5")
    add("--length", type=between(int, 1), default=256, help="tokens, then texts are cut")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="PIL")    # of broken notes in pictures; pixels count
    if args.command == "encode" and args.size % 8:
        raise UserError(f"--size {args.size}: of encode it is a multiple of 8")
    vae = encoder = None
    if args.command == "encode" and not args.dry_run:
        vae_source, text_source = (os.path.abspath(source) if os.path.isdir(source) else source
                                   for source in (args.vae, args.text_encoder))  # else: hub ids
        vae, encoder = VAE(vae_source), T5(text_source, length=args.length)
        vae.device = encoder.device = best_device()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not args.dry_run:
        hold(make_folder(args.data), rank=rank, ranks=ranks)
    if import_pictures(args.sources, args.data, args.size, rank, ranks, args.first_line, vae,
                       encoder, args.dry_run):
        print(f"next: python rewards.py {shlex.quote(args.data)}")


if __name__ == "__main__":
    run(main)
