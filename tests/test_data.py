"""data.py's border: what a picture becomes, what a sample is, what is left out; resuming."""
import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
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


def test_a_picture_keeps_the_bytes_of_its_centre_square_or_is_resized_without_aliases():
    assert np.array_equal(pixels(encode(noise())), noise())
    wide = np.zeros((SIZE, 3 * SIZE, 3), np.uint8)
    wide[:, :SIZE, 0] = wide[:, -SIZE:, 2] = 255
    wide[:, SIZE:-SIZE] = noise()
    assert np.array_equal(pixels(encode(wide)), noise())
    assert np.array_equal(pixels(encode(wide.transpose(1, 0, 2))), noise().transpose(1, 0, 2))
    board = np.indices((121, 121)).sum(0) % 2 * 255
    read = pixels(encode(np.repeat(board[..., None], 3, 2).astype(np.uint8)))
    assert np.abs(read - 127.5).max() < 4        # single pixels would be 0 or 255


@pytest.mark.parametrize("side, tolerance", [(10, 0), (32, 0), (47, 0), (96, 8), (304, 8)])
def test_decoding_a_jpeg_at_a_fraction_hardly_changes_it(side, tolerance):
    drawn = Image.fromarray(noise(0, 20, 20)).resize((side, side), Image.Resampling.BICUBIC)
    jpeg = encode(drawn, "JPEG", quality=95)
    whole = encode(Image.open(io.BytesIO(jpeg)))                 # decoded at its full size
    assert np.abs(pixels(jpeg).astype(int) - pixels(whole)).max() <= tolerance


def test_exif_turns_a_picture_upright():
    exif = Image.Exif()
    exif[274] = 6
    turned = Image.fromarray(noise()).transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(pixels(encode(turned, exif=exif)), noise())


def test_transparency_is_laid_over_white_and_hidden_colours_do_not_bleed():
    alpha = RNG(1).integers(0, 256, (SIZE, SIZE, 1), dtype=np.uint8)
    expected = noise() * (alpha / 255) + 255 - alpha
    assert np.abs(pixels(encode(np.concatenate([noise(), alpha], -1))) - expected).max() <= 1
    values = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    wide = encode(Image.fromarray(values.astype(np.uint16) * 257), transparency=9 * 257)
    assert np.array_equal(pixels(wide)[..., 0], np.where(values == 9, 255, values))
    picture = np.zeros((80, 80, 4), np.uint8)
    picture[:, 40:] = (255, 0, 0, 255)
    picture[:, :40] = (0, 255, 0, 0)             # green, and not there
    read = pixels(encode(picture)).astype(int)
    assert (read[..., 1] == read[..., 2]).all() and (read[..., 0] >= 250).all()


@pytest.mark.parametrize("mode, kind", [
    ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("RGBA", "TIFF"),
    *(("RGB", kind) for kind in data.FORMATS)])
def test_every_mode_and_format_becomes_rgb(mode, kind):
    white = Image.new("RGB", (12, 12), "white").convert(mode)
    assert (pixels(encode(white, kind)) >= 249).all()


def test_16_bits_are_rounded_to_8_and_pixels_without_an_agreed_white_are_refused():
    values = RNG(2).integers(0, 65536, (SIZE, SIZE)).astype(np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        read = pixels(encode(Image.fromarray(values), kind))
        assert np.array_equal(read[..., 1], np.round(values / 257.0)), kind
    for values in (np.ones((8, 8), np.float32), np.full((8, 8), 70000, np.int32)):
        with pytest.raises(ValueError, match="save it with 8 or 16 bits"):
            pixels(encode(Image.fromarray(values), "TIFF"))


BAD_PICTURES = {
    "half a PNG": encode(noise(0, 64, 64))[:6000], "nothing": b"", "text": b"not a picture\n" * 9,
    "half a JPEG": encode(noise(0, 64, 64), "JPEG")[:1500], "no pixels": b"P6 0 0 255\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "truncated strip": encode(noise(0, 64, 64), "TIFF")[:-99], "81 Mpx": b"P6 9000 9000 255\n",
    "100 Mpx": b"P6 10000 10000 255\n", "4 Gpx": b"P6 65000 65000 255\n"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", data.FORMATS)
def test_damaged_bytes_raise_nothing_that_is_not_expected(kind):
    whole, rng = np.frombuffer(encode(noise(0, 20, 16), kind), np.uint8), RNG(0)
    for size in (1, 2, 20) * 50:
        damaged = whole.copy()
        places = rng.integers(rng.choice((60, len(whole))), size=size)
        damaged[places] = rng.integers(256, size=size)
        with contextlib.suppress(*data.BROKEN):
            pixels(damaged[:rng.integers(2 * len(whole))].tobytes())


def tar(path, files) -> Path:
    """Write (name, bytes or text), or (name, type of a tar's member, link), in order, as a tar."""
    with tarfile.open(path, "w") as file:
        for name, *content in files:
            member, stored = tarfile.TarInfo(name), None
            if len(content) == 2:
                member.type, member.linkname = content
            else:
                stored = content[0] if isinstance(content[0], bytes) else content[0].encode()
                member.size = len(stored)
            file.addfile(member, io.BytesIO(stored or b""))
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
        texts = np.split(shard.captions, shard.ends["pair_ends"][:-1])
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
    "metadata.jsonl": PAIR | {"metadata.jsonl": '{"file_name": "a.png", "text": "a cat, red"}\n\n'
                              '{"file_name": "in/../in/b.png", "text": ["deux œufs"]}'},
    "with caption": PAIR | {"metadata.jsonl": '\ufeff{"file_name": "./a.png", "caption": '
                            '["a cat, red"]}\n{"file_name": "in/b.png", "caption": "deux œufs"}'},
    "metadata.csv": PAIR | {"metadata.csv": "\ufeff" + CSV.replace("text", "caption")}}


@pytest.mark.parametrize("form", [*FORMS, "tar"])
def test_tars_and_folders_of_all_forms_give_pictures_captions_and_where_they_lie(form, tmp_path):
    files = FORMS.get(form, FORMS[".txt"]).items()
    source = (tar if form == "tar" else folder)(tmp_path / "d.tar", files)
    found = [*bring(tmp_path / "out", source).values()]
    assert [texts for texts, _, _ in found] == [["a cat, red"], ["deux œufs"]]
    assert [content for _, _, content in found] == [A, B]
    assert all(np.array_equal(picture, noise(i)) for i, (_, picture, _) in enumerate(found))
    info = Data(tmp_path / "out").info
    assert info | dict(words=["a", "cat", "deux", "red", "œufs"], longest=3, samples=2, pairs=2,
                       left_out={}, kind="pixels", size=SIZE, format=2) == info


def test_keys_end_at_the_first_dot_in_tars_and_at_the_last_in_folders(tmp_path):
    source = tar(tmp_path / "t.tar", [("./x.y/one.v2.PNG", A), ("x.y/one.txt", b"a caption")])
    cats = folder(tmp_path / "cats", dict(sample("cat.0") + sample("cat.1", 1)))
    named = folder(tmp_path / "named", {"a.png": A, "a.jpg": encode(noise(), "JPEG"),
                                        "metadata.csv": "file_name,text\na.png,one\na.jpg,two\n"})
    assert captions(tmp_path / "out", source, cats, named) == {
        "t/x.y/one": ["a caption"], "cats-00000/cat.0": ["a cat.0"], "cats-00000/cat.1":
        ["a cat.1"], "named-00000/a.png": ["one"], "named-00000/a.jpg": ["two"]}


def test_captions_are_the_txt_or_else_caption_and_then_the_lists_of_the_json(tmp_path, capsys):
    source = tar(tmp_path / "t.tar", [
        ("a.json", b'{"captions": ["second ", "", "a a", "..."], "caption": "not this one"}'),
        ("b.json", b'{"synthetic_caption": "made", "caption": "one", "captions": null}'),
        ("b.png", A), *sample("a"), ("c.json", b'[{"box": 1}]'), *sample("c", caption="🐶")])
    assert captions(tmp_path / "out", source) == {
        "t/a": ["a a", "second"], "t/b": ["one", "made"], "t/c": ["\U0001f436"]}
    assert "note: captions without a word: 2, the first is t/a\n" in capsys.readouterr().out


BAD_FILES = {
    "no caption": {"bad.png": A}, "a caption without a word": {"bad.png": A, "bad.txt": "..."},
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
def test_a_broken_sample_is_left_out_named_and_counted(reason, files, kind, tmp_path, lax, capsys):
    names = [(name.replace("bad", "\x1b[2J"), content) for name, content in files.items()]
    source = (folder if kind == "folder" else tar)(tmp_path / "d.tar", names + sample("good", 3))
    shard = "d.tar-00000" if kind == "folder" else "d"
    [(key, (_, picture, _))] = bring(tmp_path / "out", source).items()
    assert key == f"{shard}/good" and np.array_equal(picture, noise(3))
    out = capsys.readouterr().out
    assert rf"left out {shard}/\x1b[2J: {reason}" in out and "\x1b" not in out   # of a terminal
    [(kind, count)] = Data(tmp_path / "out").info["left_out"].items()
    assert count == 1 and kind.startswith(reason.partition(":")[0])
    assert f"2 found = 1 usable + 1 left out (1 {kind})" in out


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
        ("0.png", soft, "d/b.png"), ("0.txt", b"e"), (".hidden/i.png", A), (".hidden/i.txt", b"i"),
        ("f.png", hard, "/etc/hostname"), ("f.txt", b"f"), ("g.png", soft, "g.png"),
        ("g.txt", b"g"), ("h.txt", b"h"), ("h.png", tarfile.FIFOTYPE, "")])
    found = bring(tmp_path / "out", source)
    assert {key: texts[0] for key, (texts, _, _) in found.items()} == {
        "t/d/b": "two", "t/x/a": "one", "t/d/c": "one", "t/0": "e"}
    assert all(np.array_equal(picture, noise(5)) for _, picture, _ in found.values())
    out = capsys.readouterr().out
    assert "t/f: a link to what is no file in the tar: /etc/hostname\n" in out
    assert "t/g: a link" in out and "t/h: no regular file" in out and "7 found = 4 usable" in out


def test_a_tar_without_a_sample_that_can_be_used_is_no_hindrance(tmp_path, lax, monkeypatch):
    tars = [tar(tmp_path / "a.tar", [("bad.png", b"bad"), ("bad.txt", b"a")]),
            tar(tmp_path / "notes.tar", [("readme.txt", b"read me")]),
            tar(tmp_path / "b.tar", sample("b"))]
    for _ in range(2):                                           # and again
        assert [*bring(tmp_path / "out", *tars)] == ["b/b"]
    assert len(Data(tmp_path / "out").shards) == 3
    monkeypatch.undo()
    code, said, _ = run("rewards.py", tmp_path / "out")    # judged by a shard that has any
    assert code == 0 and "alignment is left out" in said


@pytest.mark.parametrize("name", [".pics", "x.scores.tar"])
def test_a_shard_that_would_not_be_seen_is_refused_by_its_name(name, tmp_path):
    source = (tar if name.endswith("tar") else folder)(tmp_path / name, sample("a"))
    with pytest.raises(UserError, match="would become the shard .* rename"):
        bring(tmp_path / "out", source)


def test_a_fault_of_a_caption_is_not_one_of_the_picture_and_an_empty_txt_says_nothing(
        tmp_path, lax, capsys, monkeypatch):
    source = folder(tmp_path / "d", [*sample("a"), ("b.png", B), ("b.txt", " "),
                                     ("b.json", '{"caption": "from the json"}')])
    for first_line in (False, True):
        assert captions(tmp_path / f"out{first_line}", source, one_line=first_line) == {
            "d-00000/a": ["a a"], "d-00000/b": ["from the json"]}
    real = data.read_part
    monkeypatch.setattr(data, "read_part", lambda place: real((("gone", 0, 0), 0, 1) if "a.txt" in
                                                              place[0][0] else place))
    captions(tmp_path / "c", source)
    out = capsys.readouterr().out
    assert "left out d-00000/a: a file that cannot be read: gone (No such" in out


def test_damage_to_a_tar_is_named_with_its_byte(tmp_path):
    whole = tar(tmp_path / "t.tar", sample("a") + sample("b", 1)).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512            # behind it: blocks of zeros
    bad, header = bytearray(whole), bytearray(whole[:512])
    bad[512 * 4 + 150] ^= 1
    header[124:136] = b"\xff" * 10 + b"\xfe\0"                    # a size of -512: back to itself
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    faults = {whole[:cut]: "" for cut in (*range(0, end + 512, 256), end - 1, end + 511)} | {
        whole + b"rubbish": f"byte {len(whole)} ", whole + b"r" * 5000: f"byte {len(whole)} ",
        bytes(bad): "byte 2048 ", gzip.compress(whole): "byte 0 .*unpack",
        bytes(header) + whole[512:]: "byte 0 .a size below 0"}
    for content, byte in faults.items():
        (tmp_path / "t.tar").write_bytes(content)
        with pytest.raises(UserError, match=f"t.tar is packed, damaged, cut short .*, at {byte}"):
            bring(tmp_path / "out", tmp_path / "t.tar")
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("make, key", [
    (lambda at: tar(at / "x.tar", sample("a") + sample("b") + [("a.jpg", b"?")]), "a"),
    (lambda at: tar(at / "x.tar", sample("v1") + [("v1.2.png", b"?")]), "v1"),
    (lambda at: tar(at / "x.tar", sample("a") + sample("a", 1)), "a.png"),
    (lambda at: folder(at / "f", PAIR | {"metadata.csv": CSV + "./a.png,b"}), "a.png")])
def test_a_key_that_is_there_twice_is_an_error(make, key, tmp_path):
    with pytest.raises(UserError, match=f"'(./)?{key}'.*(rename it|a second time; give all)"):
        bring(tmp_path / "out", make(tmp_path))


def test_names_match_in_any_spelling_of_accents_and_in_the_folder_said(tmp_path, lax, capsys):
    nfc, nfd = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    named = folder(tmp_path / "n", {f"{nfd}.png": A, "0.png": B, "metadata.jsonl": "\n".join(
        json.dumps(dict(file_name=name, text="a")) for name in (
            f"{nfc}.png", "img\\0.png", "train/0.png", f"../s/{nfc}.png", f"{tmp_path}/s/{nfc}.png",
            "b\0", "\ud800"))})
    stems = folder(tmp_path / "s", {f"{nfd}.png": A, f"{nfc}.txt": "accent"})
    packed = tar(tmp_path / "t.tar", [(f"{nfd}.png", A), (f"{nfc}.txt", b"accent")])
    assert captions(tmp_path / "out", named, stems, packed) == {
        f"n-00000/{nfc}.png": ["a"], f"s-00000/{nfc}": ["accent"], f"t/{nfc}": ["accent"]}
    out = capsys.readouterr().out
    assert f"no such file: train/0.png in {named}" in out and out.count("no such file: ") == 6
    assert f"no such file: img\\0.png in {named}" in out and f"1, the first is {named}/0.png" in out


def test_only_regular_files_are_opened(tmp_path, lax, capsys):
    source = folder(tmp_path / "f", dict(sample("good")) | {"pipe.txt": "a pipe"})
    folder(tmp_path, {"elsewhere.png": A, "there/there.png": A})
    os.mkfifo(source / "pipe.png")
    (source / "sub").symlink_to(tmp_path / "there")
    for name, target in (("out", "../elsewhere.png"), ("nowhere", "gone.png"),
                         ("zero", "/dev/zero"), ("inside", "good.png")):
        (source / f"{name}.png").symlink_to(target)
        (source / f"{name}.txt").write_text(name)
    assert [*captions(tmp_path / "out", source)] == [
        "f-00000/good", "f-00000/inside", "f-00000/out"]
    out = capsys.readouterr().out
    assert "note: not read, no regular file: 4, " in out and "note: not read, .txt: 3, " in out
    os.mkfifo(tmp_path / "p.tar")
    with pytest.raises(UserError, match="p.tar is no file and no folder: give"):
        bring(tmp_path / "out2", tmp_path / "p.tar")


def test_what_is_not_read_is_counted_and_named_with_the_fix(tmp_path, capsys):
    pictures = folder(tmp_path / "p", dict(sample("a")) | {
        "README.txt": "hello", "b.svg": "<svg/>", "more.tar.gz": "", "x/0.tar": "", "x/1.tar": "",
        "train/metadata.jsonl": "", ".thumbs/a.png": A, "captions.csv": "", "LICENSE": ""})
    tars = folder(tmp_path / "t", {"loose.png": A, "metadata.parquet": "", "._0.tar": "?"})
    tar(tars / "0.tar", sample("b") + [("b.npy", b""), ("._b.png", b"a Mac was here")])
    assert [*captions(tmp_path / "out", pictures, tars)] == ["0/b", "p-00000/a"]
    out = capsys.readouterr().out
    for ending, first in {
            ".txt": "p/README.txt", ".svg": "p/b.svg", ".gz": "p/more.tar.gz", ".tar": "p/x/0.tar",
            ".png": "t/loose.png", ".jsonl": "p/train/metadata.jsonl", ".csv": "p/captions.csv",
            ".parquet": "t/metadata.parquet", ".npy": "t/0.tar/b.npy",
            "others": "p/LICENSE"}.items():
        count = 1 + (ending == ".tar")
        assert f"note: not read, {ending}: {count}, the first is {tmp_path}/{first}\n" in out
    assert out.endswith("2 found = 2 usable + 0 left out (none)\n")


@pytest.mark.parametrize("name, content, said", [
    ("metadata.jsonl", '{"file_name": "a.png", "text": "a"}\n{half', "near record 1: Expecting"),
    ("metadata.jsonl", '{"text": "b"}', "near record 1: no file_name"),
    ("metadata.jsonl", '["b"]', "near record 1: no file_name"),
    ("metadata.csv", "file_name;text\na.png;a", "near record 1: no file_name"),
    ("metadata.csv", "file_name,text\na.png,red, and blue", "a comma that is not in quotes"),
    ("metadata.csv", b"file_name,text\na.png,caf\xe9", "'utf-8' codec")])
def test_a_broken_table_is_an_error_that_names_the_record(name, content, said, tmp_path):
    folder(tmp_path, {"b.png": A, "f/a.png": A, f"f/{name}": content})
    with pytest.raises(UserError, match=f"{name}, .*{said}"):
        bring(tmp_path / "out", tmp_path / "f")


def test_a_long_caption_is_said_and_the_first_line_can_be_taken(tmp_path, capsys):
    source = folder(tmp_path / "f", dict(sample("a")) | {"b.png": B, "b.txt": "\ufeff\na cat\n" + (
        "de.utf8=eine Katze\n" * 40)})
    assert len(bring(tmp_path / "out", source)["f-00000/b"][0][0].splitlines()) == 41
    assert "): 1, the first is f-00000/b\n" in capsys.readouterr().out
    assert captions(tmp_path / "out", source, one_line=True)["f-00000/b"] == ["a cat"]


def test_more_than_one_in_a_hundred_left_out_is_refused_after_all_are_named(tmp_path, capsys):
    files = dict(file for i in range(99) for file in sample(f"k{i}"))
    source = folder(tmp_path / "f", files | {"mute.png": A})
    assert len(bring(tmp_path / "out", source)) == 99            # 1 of 100 is at the limit
    (source / "k7.txt").unlink()
    with pytest.raises(UserError, match="f: 2 of 100 samples cannot be used .*: 2 no caption; "):
        bring(tmp_path / "out", source)
    assert capsys.readouterr().out.endswith("100 found = 98 usable + 2 left out (2 no caption)\n")
    assert not (tmp_path / "out" / "data.json").exists()


def test_a_dry_run_writes_nothing_and_says_the_same(tmp_path, capsys):
    sources = [str(tar(tmp_path / f"{i}.tar", sample(f"k{i}", i))) for i in range(2)]
    assert not import_pictures(sources, tmp_path / "out", 16, dry_run=True)
    dry = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    import_pictures(sources, tmp_path / "out", 16)
    assert capsys.readouterr().out == dry


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
    for sources, size, said in (([source], 9, "out was made with size 8, not 9: ask for the same"),
                                ([one, one], 8, "2 tars or folders would become the shard 'one'")):
        with pytest.raises(UserError, match=said):
            import_pictures(sources, out, size)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 names alone")
def test_names_that_are_not_utf_8_and_a_terminal_that_is_not_are_no_hindrance(tmp_path):
    source = folder(tmp_path / "f", dict(sample("é", caption="deux œufs")))
    for ending, content in ((b".png", A), (b".txt", b"a cat")):
        Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9" + ending)).write_bytes(content)
    done = subprocess.run([sys.executable, ROOT / "data.py", "import", source, tmp_path / "out"],
                          capture_output=True, env=os.environ | dict(LC_ALL="C", PYTHONUTF8="0"))
    assert done.returncode == 0, done.stderr
    assert Data(tmp_path / "out").shards[0].keys == ["caf\\xe9", "é"]


def test_a_gpu_compiles_where_a_c_compiler_and_pythons_header_are(monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(data.shutil, "which", lambda name: name if name == "gcc" else None)
    assert data.compiles(torch.device("cuda")) and not data.compiles(torch.device("cpu"))
    (tmp_path / "Python.h").unlink()
    assert not data.compiles(torch.device("cuda"))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    assert not data.compiles(torch.device("cuda"))
