"""data.py's border: what a picture becomes, what a sample is, what is left out; resuming."""
import gzip
import io
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import data
from data import Data, UserError, import_pictures, square

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
    """What data.py makes of it: (size, size, 3)."""
    return square(encoded, size).transpose(1, 2, 0)


# ---- one picture

def test_a_picture_of_the_right_size_keeps_every_byte_and_of_another_the_centre_square():
    assert np.array_equal(pixels(encode(noise())), noise())
    wide = np.zeros((SIZE, 3 * SIZE, 3), np.uint8)
    wide[:, :SIZE, 0] = wide[:, -SIZE:, 2] = 255
    wide[:, SIZE:-SIZE] = noise()
    assert np.array_equal(pixels(encode(wide)), noise())
    assert np.array_equal(pixels(encode(wide.transpose(1, 0, 2))), noise().transpose(1, 0, 2))


def test_resizing_is_antialiased_and_large_pictures_become_means_of_blocks():
    board = np.indices((121, 121)).sum(0) % 2 * 255
    read = pixels(encode(np.repeat(board[..., None], 3, 2).astype(np.uint8)))
    assert np.abs(read - 127.5).max() < 4        # single pixels would be 0 or 255
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


@pytest.mark.parametrize("orientation", UNTURN)
def test_exif_turns_a_picture_upright(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(noise()).transpose(UNTURN[orientation])
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        assert np.array_equal(pixels(encode(stored, kind, exif=exif, **options)), noise()), kind


def test_transparency_is_laid_over_white_and_hidden_colours_do_not_bleed():
    alpha = RNG(1).integers(0, 256, (SIZE, SIZE, 1), dtype=np.uint8)
    expected = noise() * (alpha / 255) + 255 - alpha
    assert np.abs(pixels(encode(np.concatenate([noise(), alpha], -1))) - expected).max() <= 1
    grey = np.concatenate([noise()[..., :1], alpha], -1)         # two channels: mode LA
    assert np.abs(pixels(encode(grey)) - expected[..., :1]).max() <= 1
    picture = np.zeros((80, 80, 4), np.uint8)
    picture[:, 40:] = (255, 0, 0, 255)
    picture[:, :40] = (0, 255, 0, 0)             # green, and not there
    read = pixels(encode(picture)).astype(int)
    assert (read[..., 1] == read[..., 2]).all() and (read[..., 0] >= 250).all()


def test_a_transparent_colour_of_any_mode_becomes_white():
    values = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    grey, wide = Image.fromarray(values), Image.fromarray(values.astype(np.uint16) * 257)
    for image, hidden in ((grey, 9), (grey.convert("RGB"), (9, 9, 9)), (wide, 9 * 257)):
        read = pixels(encode(image, transparency=hidden))
        assert np.array_equal(read[..., 0], np.where(values == 9, 255, values)), image.mode


@pytest.mark.parametrize("mode, kind", [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"),
                                        ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("LAB", "TIFF"),
                                        ("L", "JPEG"), ("RGBA", "TIFF"), ("RGB", "BMP"),
                                        ("RGB", "PPM"), ("RGB", "AVIF"), ("RGB", "JPEG2000")])
def test_every_mode_and_format_becomes_rgb(mode, kind):
    white = Image.new(mode, (12, 12), (255, 128, 128)) if mode == "LAB" else Image.new(
        "RGB", (12, 12), "white").convert(mode)
    assert (pixels(encode(white, kind)) >= 249).all()


def test_16_bits_are_rounded_to_8_and_pixels_without_an_agreed_white_are_refused():
    values = RNG(2).integers(0, 65536, (SIZE, SIZE)).astype(np.uint16)
    header = f"P5 {SIZE} {SIZE} 65535\n".encode()
    for encoded in (encode(Image.fromarray(values)), encode(Image.fromarray(values), "TIFF"),
                    header + values.astype(">u2").tobytes()):
        assert np.array_equal(pixels(encoded)[..., 1], np.round(values / 257.0))
    for values in (np.ones((8, 8), np.float32), np.full((8, 8), 70000, np.int32)):
        with pytest.raises(ValueError, match="save it with 8 or 16 bits"):
            pixels(encode(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (pixels(encoded) == (255, 0, 0)).all()


def png_of(width, height) -> bytes:
    """A PNG whose header promises width x height pixels, with none in it."""
    def chunk(name, content):
        return (struct.pack(">I", len(content)) + name + content
                + struct.pack(">I", zlib.crc32(name + content)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
BAD_PICTURES = {
    "half a PNG": encode(noise(0, 64, 64))[:6000], "nothing": b"", "text": b"not a picture\n" * 9,
    "half a JPEG": encode(noise(0, 64, 64), "JPEG")[:1500], "no pixels": png_of(0, 0),
    "PostScript": POSTSCRIPT, "truncated strip": encode(noise(0, 64, 64), "TIFF")[:-99],
    "81 Mpx": png_of(9000, 9000), "100 Mpx": png_of(10000, 10000), "4 Gpx": png_of(65000, 65000)}


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

def tar(path, files, **options) -> Path:
    """Write (name, bytes), or (name, type of a tar's member, link), in this order, as a tar."""
    with tarfile.open(path, "w", **options) as file:
        for name, *content in files:
            member = tarfile.TarInfo(name)
            if len(content) == 2:
                member.type, member.linkname = content
            else:
                member.size = len(content[0])
            file.addfile(member, io.BytesIO(content[0]) if member.isreg() else None)
    return path


def folder(path, files) -> Path:
    """Write {name: bytes or text} below a folder."""
    for name, content in dict(files).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def sample(key, seed=0, caption=None) -> list:
    return [(f"{key}.png", encode(noise(seed))), (f"{key}.txt", (caption or f"a {key}").encode())]


def bring(out, *sources, **flags) -> dict:
    """Import, and what is then there: "shard/key" -> (captions, pixels (8, 8, 3), bytes)."""
    import_pictures([str(source) for source in sources], out, SIZE, **flags)
    found = {}
    for shard in Data(out).shards:
        texts = np.split(shard.captions, shard.pair_ends[:-1])
        for row, key in enumerate(shard.keys):
            picture = shard.read("pixels", row, row + 1)[0].transpose(1, 2, 0)
            found[f"{shard.name}/{key}"] = (texts[row].tolist(), picture, shard.image(row))
    return found


def captions(out, *sources, **flags) -> dict:
    return {key: texts for key, (texts, _, _) in bring(out, *sources, **flags).items()}


@pytest.fixture
def lax(monkeypatch):
    """Any share of samples may be left out."""
    monkeypatch.setattr(data, "MAX_LEFT_OUT", 1)


A, B = encode(noise(0)), encode(noise(1))
PAIR = {"a.png": A, "in/b.png": B}
CSV = 'file_name,text\r\na.png,"a cat, red"\r\nin/b.png,deux œufs\r\n'
FORMS = {                            # how the field writes the same two samples
    ".txt": PAIR | {"a.txt": "\ufeffa cat, red\n", "in/b.txt": "deux œufs"},
    "caption in .json": PAIR | {"a.json": '{"caption": "a cat, red"}',
                                "in/b.json": '{"captions": ["deux œufs"], "caption": null}'},
    "metadata.jsonl": PAIR | {"metadata.jsonl": '{"file_name": "a.png", "text": "a cat, red"}\n\n'
                              '{"file_name": "in/../in/b.png", "text": ["deux œufs"]}'},
    "with caption": PAIR | {"metadata.jsonl": '\ufeff{"file_name": "./a.png", "caption": '
                            '["a cat, red"]}\n{"file_name": "in/b.png", "caption": "deux œufs"}'},
    "metadata.csv": PAIR | {"metadata.csv": CSV},
    "with BOM": PAIR | {"metadata.csv": "\ufeff" + CSV.replace("text", "caption")}}


@pytest.mark.parametrize("form", [*FORMS, "tar"])
def test_tars_and_folders_of_all_forms_give_pictures_captions_and_where_they_lie(form, tmp_path):
    source = (tar(tmp_path / "d.tar", [*FORMS[".txt"].items()][:2] + [
        (name, text.encode()) for name, text in [*FORMS[".txt"].items()][2:]])
        if form == "tar" else folder(tmp_path / "d", FORMS[form]))
    found = [*bring(tmp_path / "out", source).values()]
    assert [texts for texts, _, _ in found] == [["a cat, red"], ["deux œufs"]]
    assert [content for _, _, content in found] == [A, B]
    assert all(np.array_equal(picture, noise(i)) for i, (_, picture, _) in enumerate(found))
    info = Data(tmp_path / "out").info
    assert info | dict(words=["a", "cat", "deux", "red", "œufs"], longest=3, samples=2, pairs=2,
                       left_out={}, kind="pixels", size=SIZE, format=2) == info


def test_keys_end_at_the_first_dot_in_tars_and_at_the_last_in_folders(tmp_path):
    source = tar(tmp_path / "t.tar", [("./x.y/one.v2.PNG", A), ("x.y/one.txt", b"a caption"),
                                      ("x.y/._one.png", b"a Mac was here"), ("x.y/one.npy", b"")])
    cats = folder(tmp_path / "cats", dict(sample("cat.0") + sample("cat.1", 1)))
    named = folder(tmp_path / "named", {"a.png": A, "a.jpg": encode(noise(), "JPEG"),
                                        "metadata.csv": "file_name,text\na.png,one\na.jpg,two\n"})
    assert captions(tmp_path / "out", source, cats, named) == {
        "t/x.y/one": ["a caption"], "cats-00000/cat.0": ["a cat.0"], "cats-00000/cat.1":
        ["a cat.1"], "named-00000/a.png": ["one"], "named-00000/a.jpg": ["two"]}


def test_captions_are_the_txt_or_else_caption_and_then_the_lists_of_the_json(tmp_path, capsys):
    source = tar(tmp_path / "t.tar", [
        ("a.json", b'{"captions": ["second ", "", "a a", "..."], "caption": "not this one"}'),
        *sample("a"), ("b.json", b'{"synthetic_caption": "made", "caption": "one"}'), ("b.png", A),
        ("c.json", b'[{"box": 1}]'), *sample("c", caption="\U0001f436")])
    assert captions(tmp_path / "out", source) == {
        "t/a": ["a a", "second"], "t/b": ["one", "made"], "t/c": ["\U0001f436"]}
    assert "note: captions without a word, beside others that stay: 1\n" in capsys.readouterr().out


BAD_FILES = {
    "no caption": {"bad.png": A}, "a caption without a word": {"bad.png": A, "bad.txt": "..."},
    "a caption without": {"bad.png": A, "bad.txt": " \n"},
    "a broken .txt or .json: 'utf-8' codec": {"bad.png": A, "bad.txt": b"caf\xe9"},
    "a broken .txt or .json: Unterminated": {"bad.png": A, "bad.json": '{"captions": ["half'},
    "a broken .txt or .json: maximum": {"bad.png": A, "bad.json": '{"captions": ' + "[" * 9 ** 5},
    "a caption that is not plain text": {"bad.png": A, "bad.json": '{"captions": [1]}'},
    "a caption that is not": {"bad.png": A, "bad.json": '{"caption": "b\\u0000"}'}}
BAD_SAMPLES = [*BAD_FILES.items(), *(
    ("an unreadable picture: " + ("over 64,000,000 pixels; save it" if "px" in what else ""),
     {"bad.png": content, "bad.txt": "a"}) for what, content in BAD_PICTURES.items())]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["tar", "folder"])
@pytest.mark.parametrize("reason, files", BAD_SAMPLES, ids=[*BAD_FILES, *BAD_PICTURES])
def test_a_broken_sample_is_left_out_and_named_and_the_count_adds_up(reason, files, kind, tmp_path,
                                                                   lax, capsys):
    files = {name: content if isinstance(content, bytes) else content.encode()
             for name, content in (*files.items(), *sample("good", 3))}
    source = (folder if kind == "folder" else tar)(tmp_path / "d.tar", files.items())
    shard = "d.tar-00000" if kind == "folder" else "d"
    [(key, (_, picture, _))] = bring(tmp_path / "out", source).items()
    assert key == f"{shard}/good" and np.array_equal(picture, noise(3))
    out = capsys.readouterr().out
    assert f"left out {shard}/bad: {reason}" in out
    [(kind, count)] = Data(tmp_path / "out").info["left_out"].items()
    assert count == 1 and kind.startswith(reason.partition(":")[0])
    assert f"2 found = 1 usable + 1 left out (1 {kind})" in out


# ---- tars

def test_zeros_do_not_end_a_tar_before_its_end_and_tars_end_to_end_are_both_read(tmp_path):
    blocks = [tar(tmp_path / "t.tar", sample(key, i)).read_bytes() for i, key in enumerate("abc")]
    parts = [block.rstrip(b"\0") for block in blocks]
    parts = [part + bytes(-len(part) % 512) for part in parts]
    for content in (parts[0] + bytes(512) + parts[1] + parts[2] + bytes(1024), b"".join(blocks),
                    bytes(512) + blocks[0] + parts[1] + bytes(512 * 9) + blocks[2] + bytes(100)):
        (tmp_path / "t.tar").write_bytes(content)
        found = bring(tmp_path / "out", tmp_path / "t.tar")
        assert {key[-1]: noise(i).tobytes() for i, key in enumerate("abc")} == {
            key[-1]: picture.tobytes() for key, (_, picture, _) in found.items()}


def test_links_in_a_tar_are_the_bytes_they_lead_to(tmp_path, lax, capsys):
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    source = tar(tmp_path / "t.tar", [
        ("d/b.png", soft, "../x/a.png"), ("d/b.txt", soft, "b2.txt"), *sample("./x/a", 5, "one"),
        ("d/b2.txt", b"two"), ("d/c.png", hard, "x/a.png"), ("d/c.txt", hard, "./x/a.txt"),
        ("e.png", soft, "d/b.png"), ("e.txt", b"e"), ("f.png", hard, "/etc/hostname"),
        ("f.txt", b"f"), ("g.png", soft, "g.png"), ("g.txt", b"g"), ("h.txt", b"h"),
        ("h.png", tarfile.FIFOTYPE, ""), ("i", tarfile.DIRTYPE, "")])
    found = bring(tmp_path / "out", source)
    assert {key: texts[0] for key, (texts, _, _) in found.items()} == {
        "t/d/b": "two", "t/x/a": "one", "t/d/c": "one", "t/e": "e"}
    assert all(np.array_equal(picture, noise(5)) for _, picture, _ in found.values())
    out = capsys.readouterr().out
    assert "t/f: a link to what is no file in the tar: /etc/hostname; put the file itself" in out
    assert "t/g: a link" in out and "t/h: no regular file" in out and "7 found = 4 usable" in out


def test_damage_to_a_tar_is_named_with_its_byte(tmp_path):
    whole = tar(tmp_path / "t.tar", sample("a") + sample("b", 1)).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512            # behind it: blocks of zeros
    bad, header = bytearray(whole), bytearray(whole[:512])
    bad[512 * 4 + 150] ^= 255
    header[124:136] = b"\xff" * 10 + b"\xfe\0"                    # a size of -512: back to itself
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    faults = {whole[:cut]: "" for cut in (*range(0, end + 512, 256), end - 1, end + 511)} | {
        whole + b"rubbish": f"byte {len(whole)} ", whole + b"r" * 5000: f"byte {len(whole)} ",
        bytes(bad): "byte 2048 ", b"no tar" * 999: "byte 0 ", gzip.compress(whole): "byte 0 .*unpa",
        bytes(header) + whole[512:]: "byte 0 .a size below 0"}
    for content, byte in faults.items():
        (tmp_path / "t.tar").write_bytes(content)
        with pytest.raises(UserError, match=f"t.tar is packed, damaged, cut short .*, at {byte}"):
            bring(tmp_path / "out", tmp_path / "t.tar")
    assert not any((tmp_path / "out").iterdir())


def test_no_flipped_bit_of_a_tars_headers_changes_what_is_read(tmp_path):
    source = tar(tmp_path / "t.tar", sample("a") + sample("b", 1))
    whole, rng, refused = source.read_bytes(), RNG(0), 0
    for _ in range(200):
        content = bytearray(whole)
        content[rng.integers(4) * 1024 + rng.integers(512)] ^= 1 << rng.integers(8)
        source.write_bytes(content)
        try:
            assert [(name, *place) for name, (_, *place) in data.tar_entries((str(source),))] == [
                ("a.png", 512, len(A)), ("a.txt", 1536, 3), ("b.png", 2560, len(B)),
                ("b.txt", 3584, 3)]
        except UserError:
            refused += 1
    assert refused > 190


@pytest.mark.parametrize("make, key", [
    (lambda at: tar(at / "x.tar", sample("a") + sample("b") + [("a.jpg", b"?")]), "a"),
    (lambda at: tar(at / "x.tar", sample("a") + sample("b") + [("a.txt", b"?")]), "a"),
    (lambda at: tar(at / "x.tar", sample("v1") + [("v1.2.png", b"?")]), "v1"),
    (lambda at: folder(at / "f", dict(sample("a"), **{"a.jpg": b"?"})), "a"),
    (lambda at: folder(at / "f", PAIR | {"metadata.csv": CSV + "./a.png,b"}), "a.png")])
def test_a_key_that_is_there_twice_is_an_error(make, key, tmp_path):
    with pytest.raises(UserError, match=f"'(./)?{key}'.*(rename it|a second time; give all)"):
        bring(tmp_path / "out", make(tmp_path))


# ---- folders

def test_names_are_matched_in_any_spelling_of_accents_and_looked_for_where_it_is_said(tmp_path, lax,
                                                                                    capsys):
    nfc, nfd = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    named = folder(tmp_path / "n", {f"{nfd}.png": A, "0.png": B, "metadata.jsonl": "\n".join(
        json.dumps(dict(file_name=name, text="a")) for name in (
            f"{nfc}.png", "img\\0.png", "train/0.png"))})
    stems = folder(tmp_path / "s", {f"{nfd}.png": A, f"{nfc}.txt": "accent"})
    packed = tar(tmp_path / "t.tar", [(f"{nfd}.png", A), (f"{nfc}.txt", b"accent")])
    assert captions(tmp_path / "out", named, stems, packed) == {
        f"n-00000/{nfc}.png": ["a"], f"s-00000/{nfc}": ["accent"], f"t/{nfc}": ["accent"]}
    out = capsys.readouterr().out
    assert f"train/0.png: no such file: train/0.png in {named}, where / divides folders" in out
    assert f"no such file: img\\0.png in {named}" in out and f"the first is {named}/0.png" in out


def test_only_regular_files_are_opened(tmp_path, lax, capsys):
    source = folder(tmp_path / "f", dict(sample("good")))
    folder(tmp_path, {"elsewhere.png": A, "there/there.png": A})
    os.mkfifo(source / "pipe.png")
    for name, target in (("out", "../elsewhere.png"), ("nowhere", "gone.png"),
                         ("zero", "/dev/zero"), ("inside", "good.png"), ("pipe2", "pipe.png")):
        (source / f"{name}.png").symlink_to(target)
    for name in ("pipe", "pipe2", "out", "nowhere", "zero", "inside"):
        (source / f"{name}.txt").write_text(name)
    (source / "sub").symlink_to(tmp_path / "there")
    assert [*captions(tmp_path / "out", source)] == [
        "f-00000/good", "f-00000/inside", "f-00000/out"]
    out = capsys.readouterr().out
    assert "note: not read, no regular file: 5\n" in out and "note: not read, .txt: 4\n" in out
    os.mkfifo(tmp_path / "p.tar")
    with pytest.raises(UserError, match="p.tar cannot be read .no regular file"):
        bring(tmp_path / "out2", tmp_path / "p.tar")


def test_what_is_not_read_is_counted_and_named_with_the_fix(tmp_path, capsys):
    pictures = folder(tmp_path / "p", dict(sample("a")) | {
        "README.txt": "hello", "b.svg": "<svg/>", "more.tar.gz": "", "x/0.tar": "", "x/1.tar": "",
        "train/metadata.jsonl": "", ".thumbs/a.png": A, "captions.csv": "", "LICENSE": ""})
    tars = folder(tmp_path / "t", {"loose.png": A, "metadata.parquet": "", "._0.tar": "?"})
    tar(tars / "0.tar", sample("b") + [("b.npy", b""), ("._b.png", b"a Mac was here")])
    assert [*captions(tmp_path / "out", pictures, tars)] == ["0/b", "p-00000/a"]
    out = capsys.readouterr().out
    for ending, count, first in ((".txt", 1, "p/README.txt"), (".svg", 1, "p/b.svg"), (
            ".gz", 1, "p/more.tar.gz"), (".tar", 2, "p/x/0.tar"), (".png", 1, "t/loose.png"), (
            ".jsonl", 1, "p/train/metadata.jsonl"), (".csv", 1, "p/captions.csv"), (
            ".parquet", 1, "t/metadata.parquet"), (".npy", 1, "t/0.tar/b.npy"), (
            "others", 1, "p/LICENSE")):
        assert f"note: not read, {ending}: the first is {tmp_path}/{first}\n" in out
        assert f"note: not read, {ending}: {count}\n" in out
    assert f"note: {data.READ}\n2 found = 2 usable + 0 left out\n" in out
    line = '{"file_name": "0/samples/0.png", "text": "a"}'
    layout = folder(tmp_path / "l", {"0/samples/0.png": A, "0/metadata.jsonl": "{}",
                                     "metadata.jsonl": line})
    assert len(captions(tmp_path / "out2", layout)) == 1         # a table of its own: no other is
    assert "not read" not in capsys.readouterr().out
    with pytest.raises(UserError, match="p/train has no picture with a caption: a SOURCE gives"):
        bring(tmp_path / "out3", pictures / "train")


@pytest.mark.parametrize("name, content, said", [
    ("metadata.jsonl", '{"file_name": "a.png", "text": "a"}\n{half', "near record 1: Expecting"),
    ("metadata.jsonl", b"\n\n\xff", "near record 0: 'utf-8' codec"),
    ("metadata.jsonl", "[1]", "near record 1: no JSON object"),
    ("metadata.jsonl", '{"text": "b"}', "near record 1: its file_name None is no .* it has text;"),
    ("metadata.jsonl", '{"file_name": "a\\u0000.png"}', "file_name 'a.*png' is no file"),
    ("metadata.csv", "file_name;text\na.png;a", "file_name None .*; it has file_name;text"),
    ("metadata.csv", "file_name,text\na.png,red, and blue", "a comma that is not in quotes"),
    ("metadata.csv", b"file_name,text\na.png,caf\xe9", "'utf-8' codec"),
    *(("metadata.csv", f"file_name,text\na.png,a\n{path},b",
       f"near record 2: its file_name '{path}' is no file in the folder")
      for path in ("../b.png", "/b.png", "in/../../b.png"))])
def test_a_broken_table_is_an_error_that_names_the_record(name, content, said, tmp_path):
    folder(tmp_path, {"b.png": A, "f/a.png": A, f"f/{name}": content})
    with pytest.raises(UserError, match=f"{name}, .*{said}"):
        bring(tmp_path / "out", tmp_path / "f")


# ---- what is said

def test_a_long_caption_is_said_and_the_first_line_can_be_taken(tmp_path, capsys):
    source = folder(tmp_path / "f", dict(sample("a")) | {"b.png": B, "b.txt": "\ufeff\na cat\n" + (
        "de.utf8=eine Katze\n" * 40)})
    assert len(bring(tmp_path / "out", source)["f-00000/b"][0][0].splitlines()) == 41
    assert "): the first is f-00000/b, 162 words in 41 lines\n" in capsys.readouterr().out
    assert captions(tmp_path / "out", source, one_line=True)["f-00000/b"] == ["a cat"]
    assert "first-line" not in capsys.readouterr().out


def test_more_than_one_in_a_hundred_left_out_is_refused_after_all_are_named(tmp_path, capsys):
    files = dict(file for i in range(99) for file in sample(f"k{i}"))
    source = folder(tmp_path / "f", files | {"mute.png": A})
    assert len(bring(tmp_path / "out", source)) == 99            # 1 of 100 is at the limit
    (source / "k7.txt").unlink()
    with pytest.raises(UserError, match="f: 2 of 100 samples cannot be used .*: 2 no caption; "):
        bring(tmp_path / "out", source)
    out = capsys.readouterr().out
    assert "f-00000/k7: no caption" in out and out.endswith(
        "100 found = 98 usable + 2 left out (2 no caption)\n")
    assert not (tmp_path / "out" / "data.json").exists()


def test_a_dry_run_writes_nothing_and_says_the_same(tmp_path, capsys):
    sources = [str(tar(tmp_path / f"{i}.tar", sample(f"k{i}", i))) for i in range(2)]
    assert not import_pictures(sources, tmp_path / "out", 16, dry_run=True)
    dry = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    import_pictures(sources, tmp_path / "out", 16)
    assert capsys.readouterr().out == dry
    assert "note: pictures smaller than --size, which are enlarged: 2\n" in dry
    Path(sources[1]).write_bytes(b"no tar")
    with pytest.raises(UserError, match="1.tar is packed, damaged"):
        import_pictures(sources, tmp_path / "out", 16, dry_run=True)


def test_escapes_in_foreign_names_do_not_reach_the_terminal(tmp_path, lax, capsys):
    bring(tmp_path / "out", tar(tmp_path / "t.tar", sample("good") + sample("\x1b[2J\n")[1:] + [
        ("\x1b[2J\n.png", b"no picture")]))
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"left out t/\x1b[2J\n: an unreadable picture" in out


# ---- shards

def stamps(out) -> dict:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*")}


def test_shards_stay_are_made_anew_and_go_with_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 2)
    source = folder(tmp_path / "f", dict(file for i in range(4) for file in sample(f"k{i}", i)))
    one, out = tar(tmp_path / "one.tar", sample("a", 7)), tmp_path / "out"
    assert [*bring(out, source, one)] == [
        "f-00000/k0", "f-00000/k1", "f-00001/k2", "f-00001/k3", "one/a"]
    before = stamps(out)
    (out / ".one.safetensors.99.tmp").write_bytes(b"a kill left this")
    (out / "one.scores.safetensors").write_bytes(b"")
    bring(out, source, one)
    assert stamps(out).items() - before.items() == {
        (name, stamps(out)[name]) for name in ("data.json", "one.scores.safetensors")}
    (source / "k3.txt").write_text("other")
    (source / "k2.png").write_bytes(B)
    found = bring(out, source)
    assert found["f-00001/k3"][0] == ["other"] and np.array_equal(found["f-00001/k2"][1], noise(1))
    assert {*stamps(out)} == {"f-00000.safetensors", "f-00001.safetensors", "data.json"}
    assert stamps(out)["f-00000.safetensors"] == before["f-00000.safetensors"]
    info = (out / "data.json").read_text()
    with pytest.raises(UserError, match="out was made with size 8, not 9: ask for the same"):
        import_pictures([source], out, 9)
    assert (out / "data.json").read_text() == info


def test_data_is_a_folder_of_its_own_and_shards_have_different_names(tmp_path):
    source = folder(tmp_path / "f", dict(sample("a")))
    folder(tmp_path / "more", {"letter.txt": ""})
    other = folder(tmp_path / "mine", {"model.safetensors": "weights", "file": ""})
    for out, said in ((source / "d", "lies in SOURCE"), (other, "model.safetensors cannot be read"),
                      (tmp_path / "more", "more .the last argument. holds files that this command"),
                      (other / "file" / "d", "/d .the last argument. cannot be written .Not a dir"),
                      (other / "file", "file .the last argument. cannot be written .File exists")):
        with pytest.raises(UserError, match=said):
            bring(out, source)
    (tmp_path / "two").mkdir()
    tars = [tar(tmp_path / name, sample("a")) for name in ("0.tar", "two/0.tar")]
    with pytest.raises(UserError, match="two/0.tar and another would both become the shard 0"):
        bring(tmp_path / "out", *tars)
    assert {path.name for path in other.iterdir()} == {"model.safetensors", "file"}


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 names alone")
def test_names_that_are_not_utf_8_and_a_terminal_that_is_not_are_no_hindrance(tmp_path):
    source = folder(tmp_path / "f", dict(sample("é", caption="deux œufs")))
    for ending, content in ((b".png", A), (b".txt", b"a cat")):
        Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9" + ending)).write_bytes(content)
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, ROOT / "data.py", "import", source, tmp_path / "out",
                           "--size", "8"], capture_output=True, env=plain)
    assert done.returncode == 0, done.stderr
    assert Data(tmp_path / "out").shards[0].keys == ["caf\\xe9", "é"]
