"""data.py: what a sample is, what is done about broken ones, and in which order they come."""
import hashlib
import io
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from data import Pictures, Words, batches, read_index, rows_at, square

RNG = np.random.default_rng
SIZE = 8


def encode(image, kind="PNG", **options) -> bytes:
    """An array (H, W, 3) or an image as the bytes of a file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(seed=0, height=SIZE, width=SIZE) -> np.ndarray:
    return RNG(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(encoded: bytes, size=SIZE) -> np.ndarray:
    """What data.py reads: (size, size, 3)."""
    return square(encoded, size)[0].transpose(1, 2, 0)


def tar(path, files) -> str:
    """Write (name, bytes) pairs, in this order, as a tar."""
    with tarfile.open(path, "w") as file:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return str(path)


def sample(key, seed=0, caption=None) -> list:
    return [(f"{key}.png", encode(noise(seed))), (f"{key}.txt", (caption or f"a {key}").encode())]


def world(folder, n, shards=1) -> str:
    """n samples k0000, k0001, ... with different pictures, in tars 0.tar, 1.tar, ..."""
    folder.mkdir(exist_ok=True)
    for s in range(shards):
        own = range(s * n // shards, (s + 1) * n // shards)
        tar(folder / f"{s}.tar", [file for i in own for file in sample(f"k{i:04d}", i)])
    return str(folder)


def same(first, second) -> bool:
    """Are two lists of batches equal in each bit?"""
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second))


# ---- one picture

def test_a_picture_of_the_right_size_keeps_every_byte():
    assert np.array_equal(pixels(encode(noise())), noise())
    assert square(encode(noise()), SIZE)[1] == (SIZE, SIZE)


@pytest.mark.parametrize("turn", [False, True])
def test_the_centre_square_is_kept(turn):
    wide = np.zeros((SIZE, 3 * SIZE, 3), np.uint8)
    wide[:, :SIZE, 0] = wide[:, -SIZE:, 2] = 255
    wide[:, SIZE:-SIZE] = noise()
    tall = wide.transpose(1, 0, 2)
    assert np.array_equal(pixels(encode(tall if turn else wide)),
                          noise().transpose(1, 0, 2) if turn else noise())


def test_resizing_is_antialiased():
    board = np.indices((121, 121)).sum(0) % 2 * 255
    read = pixels(encode(np.repeat(board[..., None], 3, 2).astype(np.uint8)))
    assert np.abs(read - 127.5).max() < 4        # single pixels would be 0 or 255


def test_a_large_picture_becomes_the_means_of_its_blocks():
    ramp = np.linspace(20, 230, 800)
    picture = np.stack([np.add.outer(a * ramp, b * ramp) / (a + b)
                        for a, b in ((1, 0), (0, 1), (1, 1))], -1)
    means = picture.reshape(SIZE, 100, SIZE, 100, 3).mean((1, 3))
    read = pixels(encode(picture.round().astype(np.uint8)))
    assert np.abs(read[1:-1, 1:-1] - means[1:-1, 1:-1]).max() < 3


@pytest.mark.parametrize("side, tolerance", [(10, 0), (32, 0), (47, 0), (96, 8), (304, 8)])
def test_decoding_a_jpeg_at_a_fraction_hardly_changes_it(side, tolerance):
    drawn = Image.fromarray(noise(0, 20, 20)).resize((side, side), Image.Resampling.BICUBIC)
    jpeg = encode(drawn, "JPEG", quality=95)
    whole = encode(Image.open(io.BytesIO(jpeg)))                 # decoded at its full size
    assert np.abs(pixels(jpeg).astype(int) - pixels(whole)).max() <= tolerance


UNTURN = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
          6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_270}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_upright(orientation):
    exif, image = Image.Exif(), Image.fromarray(noise())
    exif[274] = orientation
    stored = image.transpose(UNTURN[orientation]) if orientation > 1 else image
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        assert np.array_equal(pixels(encode(stored, kind, exif=exif, **options)), noise()), kind


def test_transparency_is_laid_over_white():
    alpha = RNG(1).integers(0, 256, (SIZE, SIZE, 1), dtype=np.uint8)
    expected = noise() * (alpha / 255) + 255 - alpha
    assert np.abs(pixels(encode(np.concatenate([noise(), alpha], -1))) - expected).max() <= 1
    grey = np.concatenate([noise()[..., :1], alpha], -1)         # two channels: mode LA
    assert np.abs(pixels(encode(grey)) - expected[..., :1]).max() <= 1


def test_a_transparent_colour_of_any_mode_becomes_white():
    values = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    grey = Image.fromarray(values)
    palette = grey.copy()
    palette.putpalette([c for i in range(256) for c in (i, i, i)])
    wide = Image.fromarray(values.astype(np.uint16) * 257)
    for image, hidden in ((grey, 9), (palette, 9), (grey.convert("RGB"), (9, 9, 9)),
                          (wide, 9 * 257)):
        read = pixels(encode(image, transparency=hidden))
        assert np.array_equal(read[..., 0], np.where(values == 9, 255, values)), image.mode


def test_hidden_colours_do_not_bleed_into_a_resized_picture():
    picture = np.zeros((80, 80, 4), np.uint8)
    picture[:, 40:] = (255, 0, 0, 255)
    picture[:, :40] = (0, 255, 0, 0)             # green, and not there
    read = pixels(encode(picture)).astype(int)
    assert (read[..., 1] == read[..., 2]).all() and (read[..., 0] >= 250).all()


@pytest.mark.parametrize("mode, kind", [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"),
                                        ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("LAB", "TIFF"),
                                        ("L", "JPEG"), ("YCbCr", "TIFF"), ("RGBA", "TIFF")])
def test_every_mode_becomes_rgb(mode, kind):
    if mode == "LAB":
        white = Image.new("LAB", (12, 12), (255, 128, 128))
    else:
        white = Image.new("RGB", (12, 12), "white").convert(mode)
    assert (pixels(encode(white, kind)) >= 253).all()


def test_16_bits_are_rounded_to_8():
    values = RNG(2).integers(0, 65536, (SIZE, SIZE)).astype(np.uint16)
    expected = np.round(values / 257.0)
    header = f"P5 {SIZE} {SIZE} 65535\n".encode()
    for encoded in (encode(Image.fromarray(values)), encode(Image.fromarray(values), "TIFF"),
                    header + values.astype(">u2").tobytes()):
        assert np.array_equal(pixels(encoded), np.repeat(expected[..., None], 3, -1))


def test_pixels_without_an_agreed_white_are_refused():
    for values in (np.ones((8, 8), np.float32), np.full((8, 8), 70000, np.int32)):
        with pytest.raises(ValueError, match="save it with 8 or 16 bits"):
            pixels(encode(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (pixels(encoded) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF",
                                  "JPEG2000"])
def test_every_format_is_read(kind):
    read = pixels(encode(Image.new("RGB", (40, 30), (200, 100, 50)), kind))
    assert np.abs(read.astype(int) - (200, 100, 50)).max() <= 6


def png_of(width, height) -> bytes:
    """A PNG whose header promises width x height pixels, with none in it."""
    def chunk(name, content):
        return (struct.pack(">I", len(content)) + name + content
                + struct.pack(">I", zlib.crc32(name + content)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_PICTURES = {
    "half a PNG": encode(noise(0, 64, 64))[:6000], "nothing": b"", "text": b"not a picture\n" * 9,
    "half a JPEG": encode(noise(0, 64, 64), "JPEG")[:1500], "no pixels": png_of(0, 0),
    "81 Mpx": png_of(9000, 9000), "100 Mpx": png_of(10000, 10000), "4 Gpx": png_of(65000, 65000),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "truncated strip": encode(noise(0, 64, 64), "TIFF")[:-99], "bad EXIF": encode(
        noise(), "WEBP", exif=b"Exif\0\0MM\4*\0\0\0\x08" + bytes(30))}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("what", BAD_PICTURES)
def test_a_broken_picture_is_named_with_its_file_and_key(what, tmp_path):
    path = tar(tmp_path / "a.tar", [("bad.png", BAD_PICTURES[what]), ("bad.txt", b"bad"),
                                    *sample("good", 3)])
    pictures = Pictures(path, SIZE)
    with pytest.raises(ValueError, match="a.tar.*a/bad") as error:
        pictures.picture(0)
    assert "\n" not in str(error.value)
    assert list(pictures.unreadable) == ["a/bad"] and "a.tar" in pictures.unreadable["a/bad"]
    assert np.array_equal(pictures.picture(1).permute(1, 2, 0), noise(3))


def test_postscript_is_not_run_whatever_its_name():
    with pytest.raises(ValueError, match="not a picture of a known format"):
        pixels(BAD_PICTURES["PostScript"])


@pytest.mark.filterwarnings("error")
def test_a_huge_picture_is_refused_also_where_warnings_are_errors():
    for encoded in (png_of(8001, 8000), png_of(10000, 10000), png_of(20000, 20000)):
        with pytest.raises(data.BROKEN, match="pixels"):
            pixels(encoded)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF",
                                  "JPEG2000"])
def test_damaged_bytes_raise_nothing_that_is_not_expected(kind):
    exif, rng = Image.Exif(), random.Random(0)
    exif[274] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    whole, broken = encode(noise(0, 20, 16), kind, **options), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 2, 20))):
            damaged[rng.randrange(rng.choice((60, len(whole))))] = rng.randrange(256)
        try:
            pixels(bytes(damaged[:rng.choice((len(whole), rng.randrange(len(whole))))]))
        except data.BROKEN:
            broken += 1
    assert broken > 20


# ---- which samples there are

def test_the_key_ends_at_the_first_dot_of_the_base_name(tmp_path):
    path = tar(tmp_path / "a.tar", [
        ("./x.y/one.v2.PNG", encode(noise())), ("x.y/one.txt", b"a caption"),
        ("x.y/._one.png", b"a Mac was here"), ("x.y/one.seg.npy", b""), ("x.y/readme.md", b"")])
    index = read_index(path)
    assert index.keys == ["x.y/one"] and index.dotted == 1 and not index.unreadable


def test_captions_are_the_txt_and_then_the_list_in_the_json(tmp_path):
    extra = {"captions": ["second ", "", "third"], "caption": "not this one"}
    path = tar(tmp_path / "a.tar", [("a.json", json.dumps(extra).encode()), *sample("a"),
                                    ("b.json", b'{"captions": ["alone"]}'), ("b.jpg", b"?"),
                                    ("c.json", b"{}"), *sample("c", caption="\ufeffdeux œufs\n")])
    assert read_index(path).captions == [("a a", "second", "third"), ("alone",), ("deux œufs",)]


BAD_SAMPLES = {
    "no caption": [("bad.png", b"?")], "empty caption": [("bad.png", b"?"), ("bad.txt", b" \n")],
    "no picture file": [("bad.txt", b"a caption"), ("bad.heic", b"?")],
    "not UTF-8": [("bad.png", b"?"), ("bad.txt", b"caf\xe9")],
    "not a JSON object": [("bad.png", b"?"), ("bad.json", b'{"captions": ["half')],
    "not a plain string": [("bad.png", b"?"), ("bad.json", b'{"captions": [1]}')],
    "a plain string": [("bad.png", b"?"), ("bad.json", b'{"captions": ["b\\u0000"]}')],
    "JSON object; correct": [("bad.png", b"?"), ("bad.json", b'{"captions": ' + b"[" * 99999)]}


@pytest.mark.parametrize("reason", BAD_SAMPLES)
def test_an_incomplete_sample_is_left_out_and_named_with_the_reason(reason, tmp_path):
    pictures = Pictures(tar(tmp_path / "a.tar", BAD_SAMPLES[reason] + sample("good")), SIZE)
    assert pictures.keys == ["good"] and list(pictures.unreadable) == ["a/bad"]
    assert reason in pictures.unreadable["a/bad"] and "a.tar" in pictures.unreadable["a/bad"]


def test_a_link_in_a_tar_is_no_picture(tmp_path):
    path = tar(tmp_path / "a.tar", sample("good") + [("bad.txt", b"a caption")])
    with tarfile.open(path, "a") as file:
        link = tarfile.TarInfo("bad.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        file.addfile(link)
    assert read_index(path).keys == ["good"] and "a/bad" in read_index(path).unreadable


def test_a_tar_cut_anywhere_is_an_error(tmp_path):
    whole = Path(tar(tmp_path / "whole.tar", sample("a") + sample("b", 1))).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512          # behind it: blocks of zeros
    assert not any(whole[end:]) and len(whole) >= end + 512
    for cut in (*range(0, end + 512, 256), end - 1, end + 511):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut.tar is damaged, cut short or no tar"):
            Pictures(tmp_path / "cut.tar", SIZE)


def test_a_damaged_header_does_not_hide_the_samples_behind_it(tmp_path):
    path = Path(tar(tmp_path / "a.tar", sample("a") + sample("b", 1)))
    content = bytearray(path.read_bytes())
    content[content.index(b"b.png") + 150] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.tar is damaged"):
        Pictures(path, SIZE)


def test_something_else_called_tar_is_an_error(tmp_path):
    (tmp_path / "text.tar").write_text("no tar" * 999)
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(ValueError, match=r"folder.tar is damaged.*\(and 1 more: .*data.py check"):
        Pictures(tmp_path, SIZE)


def folder_of(path, lines, pictures=("a.png", "b.png")) -> Path:
    """A folder of pictures with a metadata.jsonl of these lines (objects or raw text)."""
    path.mkdir(exist_ok=True)
    for number, name in enumerate(pictures):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(encode(noise(number)))
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


GOOD = {"file_name": "a.png", "text": "a"}


@pytest.mark.parametrize("make, key", [
    (lambda at: tar(at / "x.tar", sample("a") + sample("b") + [("a.jpg", b"?")]), "a"),
    (lambda at: tar(at / "x.tar", sample("a") + sample("b") + [("a.txt", b"?")]), "a"),
    (lambda at: tar(at / "x.tar", sample("v1") + [("v1.2.png", b"?")]), "v1"),
    (lambda at: folder_of(at / "f", [GOOD, GOOD]), "a"),
    (lambda at: folder_of(at / "f", [GOOD, {"file_name": "./a.jpg", "text": "b"}]), "a")])
def test_a_second_picture_or_text_of_one_key_is_an_error(make, key, tmp_path):
    with pytest.raises(ValueError, match=f"second (picture|txt) with the key '{key}'.*rename"):
        Pictures(make(tmp_path), SIZE)


@pytest.mark.parametrize("name", ["../secret.png", "link.png", "sub/secret.png", "{}/secret.png",
                                  "{}/f/a.png", "sub/../../secret.png"])
def test_no_path_of_metadata_leaves_the_folder(name, tmp_path):
    (tmp_path / "secret.png").write_bytes(encode(noise()))
    folder = folder_of(tmp_path / "f", [GOOD, {"file_name": name.format(tmp_path), "text": "b"}])
    (folder / "link.png").symlink_to("../secret.png")
    (folder / "sub").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="metadata.jsonl, line 2: .*leaves the dataset folder"):
        Pictures(folder, SIZE)


def test_metadata_may_hold_one_caption_or_several_for_any_file_inside(tmp_path):
    folder = folder_of(tmp_path / "f", [
        {"file_name": "in/../in/b.png", "text": ["one", "two"]}, "", GOOD,
        {"file_name": "gone.png", "text": "c"}, {"file_name": "d.png"},
        {"file_name": "e.png", "text": 5}], ["a.png", "in/b.png", "d.png", "e.png", "extra.png"])
    pictures = Pictures(folder, SIZE)
    assert pictures.keys == ["a", "in/b"] and pictures.captions == [("a",), ("one", "two")]
    assert np.array_equal(pictures.picture(1).permute(1, 2, 0), noise(1))
    reasons = {"d": "no caption", "e": "not a plain string", "gone": "no picture file"}
    assert pictures.unreadable.keys() == {f"00000/{key}" for key in reasons}
    assert all(reason in pictures.unreadable[f"00000/{key}"] for key, reason in reasons.items())


@pytest.mark.parametrize("line", ["{half", "[1]", '{"text": "b"}', '{"file_name": 3}',
                                  '{"file_name": "a\\u0000.png"}', '{"file_name": "\\ud800.png"}'])
def test_a_broken_line_of_metadata_is_an_error_that_names_it(line, tmp_path):
    with pytest.raises(ValueError, match="metadata.jsonl, line 2"):
        Pictures(folder_of(tmp_path / "f", [GOOD, line]), SIZE)


def test_a_picture_folder_is_cut_into_shards_of_a_thousand_keys_in_sorted_order(tmp_path):
    encoded, keys = encode(noise()), [f"{i:04d}" for i in range(1002)]
    for key in reversed(keys):
        (tmp_path / f"{key}.png").write_bytes(encoded)
        (tmp_path / f"{key}.txt").write_text(f"number {key}")
    (tmp_path / "0007.txt").unlink()
    (tmp_path / "bins.png").write_bytes(encoded)         # as binning.py leaves them
    (tmp_path / "bins.json").write_text("{}")
    (tmp_path / "0000info.json").write_text("{}")
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / ".thumbs" / "0000.png").write_bytes(encoded)
    pictures = Pictures(tmp_path, SIZE)
    assert pictures.keys == [key for key in keys if key != "0007"]
    assert [(s.name, s.folder, s.start, s.stop) for s in pictures.shards] == [
        ("00000", tmp_path, 0, 999), ("00001", tmp_path, 999, 1001)]
    assert pictures.name(998) == "00000/0999" and pictures.name(999) == "00001/1000"
    assert list(pictures.unreadable) == ["00000/0007"]   # its caption back, nothing else moves


def test_folder_range_glob_and_tar_are_ways_to_name_the_same_rows(tmp_path):
    folder = world(tmp_path / "d", 6, shards=3)
    everything = Pictures(folder, SIZE)
    assert [everything.name(i) for i in (0, 2, 5)] == ["0/k0000", "1/k0002", "2/k0005"]
    assert [shard.folder for shard in everything.shards] == [tmp_path / "d"] * 3
    for path in (f"{folder}/{{0..2}}.tar", f"{folder}/*.tar"):
        assert Pictures(path, SIZE).keys == everything.keys
    assert Pictures(f"{folder}/{{1..2}}.tar", SIZE).keys == everything.keys[2:]
    assert Pictures(f"{folder}/1.tar", SIZE).keys == everything.keys[2:4]


def test_a_hidden_tar_is_no_shard(tmp_path):
    folder = world(tmp_path / "d", 2)
    (tmp_path / "d" / "._0.tar").write_bytes(b"what a Mac leaves on other disks")
    assert Pictures(folder, SIZE).keys == ["k0000", "k0001"]


def test_a_linked_folder_is_not_followed_and_named(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").write_bytes(encode(noise()))
        (tmp_path / name / f"{name}.txt").write_text("a")
    (tmp_path / "here" / "sub").symlink_to(tmp_path / "there")
    with pytest.raises(ValueError, match="here/sub is a symlink to a folder, which is not followed"):
        Pictures(tmp_path / "here", SIZE)


def test_captions_whose_keys_are_of_no_sample_are_an_error(tmp_path):
    folder = world(tmp_path / "d", 2)
    (tmp_path / "d" / "captions.tsv").write_text("k0001\tanother\ngone\tmore\n")
    assert Pictures(folder, SIZE).captions[1][1:] == ("another",)
    (tmp_path / "d" / "captions.tsv").write_text("k0000.png\tanother\nk0001.png\tmore\n")
    with pytest.raises(ValueError, match="captions.tsv: none of its keys is a sample's; a key is a"):
        Pictures(folder, SIZE)


@pytest.mark.parametrize("path, missing", [("d/{0..3}.tar", "d/2.tar"), ("e", "e"),
                                           ("d/x*.tar", r"d/x\*.tar"), ("d/{00..01}.tar", "d/00")])
def test_what_is_not_there_is_named(path, missing, tmp_path):
    world(tmp_path / "d", 2, shards=2)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/{missing}.* is not there; give"):
        Pictures(tmp_path / path, SIZE)


def test_tars_of_one_name_tars_beside_metadata_and_nothing_are_errors(tmp_path):
    for folder in ("1", "2"):
        world(tmp_path / folder, 1)
    with pytest.raises(ValueError, match="2 tars are called 0.tar"):
        Pictures(f"{tmp_path}/{{1..2}}/0.tar", SIZE)
    with pytest.raises(ValueError, match="holds tars and metadata.jsonl"):
        Pictures(folder_of(tmp_path / "1", [GOOD]), SIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no picture with a caption"):
        Pictures(tmp_path / "empty", SIZE)
    with pytest.raises(ValueError, match=r"no picture with a caption \(x/bad: .*no caption\)"):
        Pictures(tar(tmp_path / "x.tar", [("bad.png", b"?")]), SIZE)


# ---- pictures in memory

def count_reads(monkeypatch) -> list:
    """The calls of data.read_bytes from now on."""
    calls, read = [], data.read_bytes
    monkeypatch.setattr(data, "read_bytes", lambda *place: calls.append(place) or read(*place))
    return calls


def test_each_picture_is_decoded_once_if_all_fit_into_memory(tmp_path, monkeypatch):
    pictures, calls = Pictures(world(tmp_path / "d", 5), SIZE), count_reads(monkeypatch)
    assert len(list(batches(pictures, 0, 0, 7, 5))) == 7 and len(calls) == 5
    pictures.picture(2).zero_()                  # the caller's own copy
    assert np.array_equal(pictures.picture(2).permute(1, 2, 0), noise(2))
    pictures = Pictures(pictures.path, SIZE, memory_gb=5 * 3 * SIZE * SIZE / 1e9 - 1e-9)
    assert len(list(batches(pictures, 0, 0, 7, 5))) == 7 and len(calls) == 5 + 35


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
def test_worker_processes_fill_the_memory_of_all(tmp_path, monkeypatch):
    pictures = Pictures(world(tmp_path / "d", 5), SIZE)
    list(batches(pictures, 0, 0, 2, 5, workers=1))
    calls = count_reads(monkeypatch)
    assert all(np.array_equal(pictures.picture(i).permute(1, 2, 0), noise(i)) for i in range(5))
    assert not calls


def test_nothing_stays_open_and_nothing_is_written(tmp_path):
    folder = world(tmp_path / "d", 4, shards=2)
    before, files = os.listdir("/dev/fd"), sorted(os.listdir(folder))
    list(batches(Pictures(folder, SIZE), 0, 0, 2, 4))
    assert len(os.listdir("/dev/fd")) == len(before) and sorted(os.listdir(folder)) == files


def test_a_selection_keeps_names_captions_and_pictures_in_the_order_asked_for(tmp_path):
    pictures = Pictures(world(tmp_path / "d", 6, shards=3), SIZE)
    some = pictures.select([0, 1, 3, 5])
    assert [(s.name, s.start, s.stop) for s in some.shards] == [("0", 0, 2), ("1", 2, 3),
                                                                ("2", 3, 4)]
    mixed = some.select([3, 0, 2])
    assert [mixed.name(i) for i in range(3)] == ["2/k0005", "0/k0000", "1/k0003"]
    assert mixed.captions == [("a k0005",), ("a k0000",), ("a k0003",)] and len(mixed) == 3
    for i, seed in enumerate((5, 0, 3)):
        assert np.array_equal(mixed.picture(i).permute(1, 2, 0), noise(seed))
    assert len(pictures) == 6 and len(pictures.select([])) == 0


# ---- the order of samples

def test_each_row_comes_once_an_epoch_and_each_epoch_has_its_own_order():
    rows = rows_at(np.arange(300), 100, seed=5).reshape(3, 100)
    assert (np.sort(rows) == np.arange(100)).all()
    assert len({tuple(order) for order in [*rows, *rows_at(np.arange(200), 100, 6).reshape(2, 100),
                                           np.arange(100)]}) == 6
    shuffled = RNG(0).permutation(300)
    assert np.array_equal(rows_at(shuffled, 100, 5), rows.ravel()[shuffled])


def test_the_order_is_that_of_raw_bits_of_a_seeded_generator():
    bits = [np.random.PCG64(np.random.SeedSequence((3, epoch))).random_raw(9) for epoch in (0, 1)]
    assert rows_at(range(18), 9, 3).tolist() == [*np.argsort(bits[0]), *np.argsort(bits[1])]


def test_rows_are_uniform_over_seeds():
    first = [rows_at([0], 4, seed)[0] for seed in range(2000)]
    assert np.abs(np.bincount(first) - 500).max() < 100          # 5 standard deviations


def test_a_batch_holds_the_pictures_of_its_rows(tmp_path):
    pictures = Pictures(world(tmp_path / "d", 7, shards=2), SIZE)
    for step, batch in enumerate(batches(pictures, 1, 0, 5, 3)):
        assert batch["position"].tolist() == [3 * step, 3 * step + 1, 3 * step + 2]
        assert batch["row"].tolist() == rows_at(batch["position"], 7, 1).tolist()
        assert batch["picture"].dtype == torch.uint8 and batch["picture"].is_contiguous()
        for row, picture in zip(batch["row"].tolist(), batch["picture"]):
            assert np.array_equal(picture.permute(1, 2, 0), noise(row))


def test_a_resumed_stream_is_the_rest_of_the_uninterrupted_one(tmp_path):
    pictures = Pictures(world(tmp_path / "d", 7), SIZE)
    whole = list(batches(pictures, 1, 0, 12, 4))
    for first in (0, 5, 11, 12):
        assert same(list(batches(pictures, 1, first, 12, 4)), whole[first:])
    assert same(list(batches(Pictures(pictures.path, SIZE, 0), 1, 0, 12, 4)), whole)


def test_two_ranks_together_read_the_batches_of_one(tmp_path):
    pictures = Pictures(world(tmp_path / "d", 7), SIZE)
    ranks = [list(batches(pictures, 1, 0, 7, 4, rank, world=2)) for rank in (0, 1)]
    joined = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(*ranks)]
    assert same(joined, list(batches(pictures, 1, 0, 7, 4)))
    seen = np.concatenate([batch["row"] for batch in joined])
    assert np.bincount(seen).tolist() == [4] * 7                 # 28 positions, 4 epochs of 7


def test_one_shard_and_two_workers_give_the_same_stream_and_an_end(tmp_path):
    pictures = Pictures(world(tmp_path / "d", 5), SIZE, memory_gb=0)
    alone = list(batches(pictures, 1, 2, 9, 2))
    assert len(alone) == 7 and same(list(batches(pictures, 1, 2, 9, 2, workers=2)), alone)


def test_a_batch_may_be_larger_than_the_dataset(tmp_path):
    pictures = Pictures(world(tmp_path / "d", 3), SIZE)
    batch, = batches(pictures, 1, 4, 5, 9)
    assert np.bincount(batch["row"]).tolist() == [3, 3, 3]


def test_a_batch_that_the_processes_cannot_share_is_an_error(tmp_path):
    pictures = Pictures(world(tmp_path / "d", 3), SIZE)
    with pytest.raises(ValueError, match="a batch of 4 cannot be shared by 3.*multiple of 3"):
        next(batches(pictures, 1, 0, 5, 4, world=3))


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_random_state_alone(workers, tmp_path):
    pictures, state = Pictures(world(tmp_path / "d", 3), SIZE), torch.get_rng_state()
    np_state = np.random.get_state()[1].copy()
    list(batches(pictures, 1, 0, 3, 3, workers=workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], np_state)


# ---- unreadable samples on the way

def spoilt(path, n, broken) -> str:
    """A tar of n samples in which the pictures of the rows `broken` are text."""
    good = encode(noise())
    return tar(path, [file for i in range(n) for file in (
        (f"{i:04d}.png", b"text" if i in broken else good), (f"{i:04d}.txt", b"a"))])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_samples_are_left_out_and_listed(workers, tmp_path):
    pictures = Pictures(spoilt(tmp_path / "a.tar", 120, {7}), SIZE)
    steps = list(batches(pictures, 1, 0, 6, 20, workers=workers))
    rows = np.concatenate([step["row"] for step in steps])
    assert sorted(rows) == [i for i in range(120) if i != 7]
    for step in steps:
        assert len(step["row"]) == len(step["position"]) == len(step["picture"])
        assert rows_at(step["position"], 120, 1).tolist() == step["row"].tolist()
    assert pictures.unreadable == {"a/0007": f"{tmp_path}/a.tar: not a picture of a known format"}


def test_a_batch_of_nothing_readable_is_empty(tmp_path):
    step, = batches(Pictures(spoilt(tmp_path / "a.tar", 2, {0, 1}), SIZE), 1, 0, 1, 2)
    assert step["picture"].shape == (0, 3, SIZE, SIZE) and step["row"].shape == (0,)


def test_more_than_one_percent_unreadable_stops_the_run(tmp_path):
    pictures = Pictures(spoilt(tmp_path / "a.tar", 100, set(range(8))), SIZE)
    with pytest.raises(ValueError, match=r"a.tar: 8 of 100 samples unreadable.*1%.*data.py"):
        list(batches(pictures, 1, 0, 99, 20))


def test_bad_luck_does_not_stop_a_run_with_fewer_than_one_percent(tmp_path):
    pictures = Pictures(spoilt(tmp_path / "a.tar", 400, {5, 6}), SIZE)     # 0.5 %
    lengths = [[len(batch["row"]) for batch in batches(pictures, seed, 0, 12, 100)]
               for seed in range(30)]
    assert min(steps[0] for steps in lengths) == 98              # 2 % of the first hundred
    assert all(sum(steps) == 1200 - 6 for steps in lengths)


def test_more_than_one_percent_without_caption_stops_the_run_before_it_starts(tmp_path):
    def first_batch(n):
        files = [file for i in range(n) for file in sample(f"k{i}")]
        path = tar(tmp_path / "a.tar", [("mute.png", b"?"), *files])
        return next(batches(Pictures(path, SIZE), 0, 0, 1, 2))

    assert len(first_batch(99)["row"]) == 2                      # 1 of 100 is at the limit
    with pytest.raises(ValueError, match="a.tar: 1 of 99 samples lack a picture or a caption"):
        first_batch(98)


# ---- words

VOCABULARY = ("a", "blue", "circle", "red", "square")


def test_true_means_token_and_padding_is_zero():
    text, text_mask = Words(VOCABULARY, 8, 5).encode(["a red circle", "", "a a a a a"])
    assert text.shape == (3, 5, 8) and text.dtype == torch.float32 and text_mask.dtype == torch.bool
    assert text_mask.sum(1).tolist() == [3, 1, 5] and text_mask[:, 0].all()
    assert (text[~text_mask] == 0).all() and (text[text_mask].abs().sum(1) > 0).all()


def test_word_and_position_both_matter():
    text, _ = Words(VOCABULARY).encode(["red circle", "circle red", "red red"])
    assert torch.equal(text[0, 0, :32], text[1, 1, :32])         # the same word elsewhere
    assert torch.equal(text[0, :, 32:], text[1, :, 32:])         # the same places
    assert not torch.equal(text[0], text[1])
    assert not torch.equal(text[2, 0], text[2, 1])


def test_a_word_does_not_depend_on_the_vocabulary():
    few, many = Words(["red"]), Words([*"zyx", "red", *VOCABULARY])
    assert all(torch.equal(a, b) for a, b in zip(few.encode(["red", ""]), many.encode(["red", ""])))


def test_a_word_is_the_hash_of_its_letters():
    digest = np.frombuffer(hashlib.shake_256(b"red").digest(32), np.uint8).astype(float)
    text, _ = Words(VOCABULARY).encode(["red"])
    assert np.allclose(text[0, 0, :32], (digest - 127.5) / np.arange(256).std(), atol=1e-6)


def test_both_halves_have_unit_variance():
    words = [f"w{i}" for i in range(2000)]
    text, _ = Words(words, 64, 16).encode([" ".join(words[i:i + 16]) for i in range(0, 2000, 16)])
    word, place = text[..., :32], text[..., 32:]
    assert abs(word.mean()) < 0.02 and abs(word.var() - 1) < 0.02
    assert torch.allclose(place.square().mean(-1), torch.ones(125, 16), atol=1e-5)
    assert torch.pdist(place[0]).min() > 0.5                     # neighbours are told apart


def test_case_and_punctuation_are_no_part_of_a_word():
    encoder = Words(("don't", "été", "two", "2nd"))
    first, _ = encoder.encode(["Two 2nd, DON'T! (été)"])
    second, _ = encoder.encode(["'two'-2nd_don't été"])
    assert torch.equal(first, second)


def test_vowel_signs_and_accents_are_part_of_a_word_however_they_are_written():
    assert data.split_words("राम की बेटी, राम का बेटा") == ["राम", "की", "बेटी", "राम", "का", "बेटा"]
    assert data.split_words("cafe\u0301") == data.split_words("caf\u00e9") == ["caf\u00e9"]
    assert data.split_words("rock 'n' roll's ''") == ["rock", "n", "roll's"]


def test_an_unknown_word_is_named_with_what_is_valid():
    with pytest.raises(ValueError, match="'purple'; the words are: a, blue, circle, red, square"):
        Words(VOCABULARY).encode(["a red circle", "a purple circle"])
    many = Words([*VOCABULARY, *(f"w{i}" for i in range(60))])
    with pytest.raises(ValueError, match="'sqare'; close words are: square"):
        many.encode(["a sqare"])
    with pytest.raises(ValueError, match="no known word is close"):
        many.encode(["xylophone"])


def test_too_many_words_are_an_error_that_says_how_many_there_may_be():
    with pytest.raises(ValueError, match="has 4 words; shorten it to 3"):
        Words(VOCABULARY, 8, 3).encode(["a a a a"])


def test_the_configuration_goes_through_json_and_back():
    encoder = Words(VOCABULARY, 16, 7)
    other = Words.from_config(json.loads(json.dumps(encoder.config())))
    assert other.config() == encoder.config()
    assert torch.equal(other.encode(["a red"])[0], encoder.encode(["a red"])[0])
    with pytest.raises(ValueError, match="'t5'"):
        Words.from_config({"kind": "t5"})


def test_the_vocabulary_of_captions_encodes_them():
    captions = [("A red circle.", "a Circle"), ("blue, square",)]
    assert Words.vocabulary_of(captions) == VOCABULARY
    assert Words.vocabulary_of(["a red circle", "blue square"]) == VOCABULARY


# ---- python data.py check

def run_check(path, capsys, monkeypatch, size="8") -> tuple[str, str]:
    """Standard output of `data.py check` and the error it ends with ("" if none)."""
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(path), "--size", size])
    try:
        data.main()
    except ValueError as error:
        return capsys.readouterr().out, str(error)
    return capsys.readouterr().out, ""


def test_check_counts_what_is_there(tmp_path, capsys, monkeypatch):
    files = [file for i in range(200) for file in sample(f"k{i}", i)]
    files += [("long.v2.png", encode(noise(0, 30, 20))), ("long.txt", b"one two three four")]
    tar(tmp_path / "0.tar", [*files, ("mute.png", b"?")])
    tar(tmp_path / "1.tar", [*sample("k1"), ("void.png", b"?"), ("void.txt", b" ")])
    scores = [{"format": 1}, {"key": "k1", "captions": data.hashes(("a k1",)), "scores": {}},
              {"key": "k2", "error": "why"},
              {"key": "k3", "captions": data.hashes(("an older k3",)), "scores": {}}]
    (tmp_path / "0.scores.jsonl").write_text("\n".join(map(json.dumps, scores)))
    out, error = run_check(tmp_path, capsys, monkeypatch, size="16")
    assert error == ""
    for line in ("202 in 2 shards, 202 captions", "min 8 x 8, median 8 x 8, max 20 x 30; 201 small",
                 "1 missing, 1 empty", "4 words: one two three four", "0 duplicate; 1 file names",
                 "unscored    201", "unreadable  2\n", "0/mute: ", "1/void: ", "can be trained on"):
        assert line in out, (line, out)


def test_check_lists_every_fault(tmp_path, capsys, monkeypatch):
    tar(tmp_path / "0.tar", [*sample("a"), ("bad.png", b"text"), ("bad.txt", b"bad")])
    tar(tmp_path / "1.tar", sample("a") + sample("a"))
    (tmp_path / "2.tar").write_bytes(b"no tar")
    (tmp_path / "0.scores.jsonl").write_text("{}\n{half")
    out, error = run_check(tmp_path, capsys, monkeypatch)
    faults = error.splitlines()
    assert "2 duplicate" in out and "0/bad: " in out and "can be trained on" not in out
    for fault in ("1.tar: a.png is a second picture", "1.tar: a.txt is a second txt",
                  "2.tar is damaged", "scores.jsonl, line 2 is not",
                  "1 of 3 samples are unreadable"):
        assert sum(fault in line for line in faults) == 1, (fault, faults)
    assert len(faults) == 5


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 names alone")
def test_a_file_name_that_is_not_utf_8_is_listed(tmp_path):
    folder = os.fsencode(tmp_path)
    for i in range(200):
        (tmp_path / f"{i}.png").write_bytes(encode(noise(i)))
        (tmp_path / f"{i}.txt").write_text("a thing")
    for ending in (b".png", b".txt"):
        with open(folder + b"/caf\xe9" + ending, "wb") as file:
            file.write(b"no picture")
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for script in ("data.py", "rewards.py"):
        command = [sys.executable, Path(data.__file__).with_name(script),
                   *["check"] * (script == "data.py"), tmp_path]
        run = subprocess.run(command, capture_output=True, text=True, env=strict)
        assert run.returncode == 0 and "caf\\udce9" in run.stdout, (script, run)


def test_the_command_line_ends_in_one_sentence_and_code_2(tmp_path):
    script = [sys.executable, Path(data.__file__), "check"]
    run = subprocess.run([*script, tmp_path / "gone"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "is not there" in run.stderr
