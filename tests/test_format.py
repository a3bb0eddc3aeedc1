"""data.py behind its border: the format of DATA, the order of samples, words, whole files."""
import errno
import functools
import hashlib
import io
import math
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

import data
from data import (Data, Order, Shard, UserError, Words, encoder_of, pack, pad, permutation,
                  split_words, unpack, write_info, write_json, write_shard, write_text, write_whole)

RNG = np.random.default_rng
CAPTIONS = [("a red circle", "un œuf"), ("一只红色的猫",), ("", "🐶", "a")]
INFO = dict(kind="pixels", size=4, shards=2)


def columns(captions=CAPTIONS, seed=0, **more) -> dict:
    """The columns of samples k0, k1, ... with these captions, and pictures of noise."""
    keys, key_ends = pack([f"k{i}" for i in range(len(captions))])
    texts, caption_ends = pack([text for one in captions for text in one])
    return dict(pixels=RNG(seed).integers(0, 256, (len(captions), 3, 4, 4), dtype=np.uint8),
                keys=keys, key_ends=key_ends, captions=texts, caption_ends=caption_ends,
                pair_ends=np.cumsum([len(one) for one in captions])) | more


def latents(n=5, seed=0) -> dict:
    """The columns of n encoded samples of two captions, with states of 1 to 3 tokens."""
    mean, std = RNG(seed).standard_normal((2, n, 4, 2, 2)).astype(np.float16)
    text_ends = np.cumsum(RNG(seed).integers(1, 4, 2 * n))
    found = columns([("a", "b")] * n, mean=mean, std=abs(std), text_ends=text_ends, text=np.arange(
        text_ends[-1] * 3, dtype=np.float16).reshape(-1, 3))
    return {name: column for name, column in found.items() if name != "pixels"}


@pytest.fixture
def folder(tmp_path):
    """DATA of two shards."""
    write_shard(tmp_path / "00000.safetensors", columns())
    write_shard(tmp_path / "00001.safetensors", columns([("b",)], seed=1))
    write_info(tmp_path, INFO)
    return tmp_path


def test_packed_texts_come_back():
    for texts in ([], [""], ["", "a", "", "œuf 猫 🐶\n\0", ""]):
        content, ends = pack(texts)
        assert content.tobytes() == "".join(texts).encode() and unpack(content, ends) == texts


def test_a_shard_gives_back_what_was_written(folder):
    wanted, opened = columns(), Shard(folder / "00000.safetensors")
    for shard in (opened, pickle.loads(pickle.dumps(opened))):
        assert (shard.name, shard.rows, shard.pairs) == ("00000", 3, 6)
        assert shard.keys == ["k0", "k1", "k2"]
        assert shard.captions == [text for one in CAPTIONS for text in one]
        assert [shard.caption(i) for i in range(6)] == shard.captions
        assert shard.ends["pair_ends"].tolist() == [2, 3, 6]
        assert shard.owners.tolist() == [0, 0, 1, 2, 2, 2]
        assert all(np.array_equal(shard.read(name), wanted[name]) for name in wanted)
        assert np.array_equal(shard.read("pixels", 1, 3), wanted["pixels"][1:3])
        assert np.array_equal(shard.picture(2, 4), wanted["pixels"][2]) and shard.image(0) is None
        shard.close()
    contents = set()
    for _ in range(5):
        write_shard(folder / "again.safetensors", wanted, b="1", a="2", c="3")
        contents.add((folder / "again.safetensors").read_bytes())
    assert len(contents) == 1 and Shard(folder / "again.safetensors").metadata["a"] == "2"


def test_the_digest_changes_with_any_caption_key_owner_or_pixel_and_with_nothing_else(tmp_path):
    pixels, keys = columns()["pixels"], columns()["keys"].copy()
    pixels[2, 1, 3, 0] ^= 1
    keys[1] ^= 1
    moved = [CAPTIONS[0], CAPTIONS[1] + ("",), CAPTIONS[2][1:]]             # the bytes are the same
    other = [CAPTIONS[0][:1] + ("un ceuf",), *CAPTIONS[1:]]
    digests = []
    for number, content in enumerate((
            columns(), columns(), columns(pixels=pixels), columns(keys=keys), columns(moved),
            columns(other), latents(), latents() | dict(mean=latents()["mean"] + 1))):
        write_shard(tmp_path / "a.safetensors", content, files=[["x", 1, number]])
        digests.append(Shard(tmp_path / "a.safetensors").digest)
    assert digests[0] == digests[1] and len(set(digests)) == 7


def test_a_picture_is_read_from_its_place_and_refused_once_its_file_has_changed(tmp_path):
    large, source = RNG(2).integers(0, 256, (40, 60, 3), dtype=np.uint8), tmp_path / "x.tar"
    Image.fromarray(large).save(tmp_path / "large.png")
    content = (tmp_path / "large.png").read_bytes()
    source.write_bytes(b"x" * 99 + content + b"y" * 99)
    status = source.stat()
    write_shard(tmp_path / "a.safetensors", columns(place=np.array([[0, 99, len(content)]] * 3)),
                files=[[str(source), status.st_size, status.st_mtime_ns]])
    shard = Shard(tmp_path / "a.safetensors")
    assert shard.image(1) == content
    assert np.array_equal(shard.picture(1, 40), large[:, 10:50].transpose(2, 0, 1))
    assert np.array_equal(shard.picture(1, 4), columns()["pixels"][1])
    os.utime(source, ns=(0, status.st_mtime_ns + 1))
    with pytest.raises(UserError, match="x.tar has changed .* import again"):
        shard.image(1)
    source.unlink()
    with pytest.raises(UserError, match="x.tar has changed"):
        shard.image(1)


BROKEN = {"no data.json": lambda folder: (folder / "data.json").unlink(),
          "changed by hand": lambda folder: write_text(folder / "data.json", "[2]"),
          "json cannot be read": lambda folder: write_text(folder / "data.json", '{"format": 2'),
          "in format 2": lambda folder: write_json(folder / "data.json", INFO),
          "has 1 of 2 shards": lambda folder: (folder / "00001.safetensors").unlink(),
          "no shard of DATA": lambda folder: save_file({}, folder / "other.safetensors"),
          "has 3 of 2 shards": lambda folder: write_shard(folder / "3.safetensors", columns())}


@pytest.mark.parametrize("reason", [*BROKEN, 0, 5, 300, -1])
def test_a_folder_that_is_not_whole_is_the_users_mistake(folder, reason):
    if reason in BROKEN:
        BROKEN[reason](folder)
    else:
        path = folder / "00001.safetensors"
        path.write_bytes(path.read_bytes()[:reason])                       # cut there
        reason = "00001.safetensors cannot be read .* import again"
    with pytest.raises(UserError, match=reason) as error:
        Data(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_data_know_mean_and_deviation_of_all_of_x_0(folder):
    save_file({"contrast": np.zeros(6, np.float32)}, folder / "00000.scores.safetensors")
    (folder / ".00002.safetensors").write_bytes(b"begun")                  # neither is a shard
    assert (Data(folder).rows, Data(folder).pairs, Data(folder).channels) == (4, 7, 3)
    every = np.concatenate([columns()["pixels"], columns([("b",)], seed=1)["pixels"]])
    assert Data(folder).mean_std()[0] == pytest.approx(every.mean((0, 2, 3)))
    assert Data(folder).mean_std()[1] == pytest.approx(every.std((0, 2, 3)))
    write_shard(folder / "00000.safetensors", latents(50))
    write_shard(folder / "00001.safetensors", latents(30, 1))
    write_info(folder, dict(kind="latents", size=16, shards=2))
    mean, std = (np.concatenate([latents(50)[name], latents(30, 1)[name]]).astype(np.float64)
                 for name in ("mean", "std"))
    drawn = mean + std * RNG(0).standard_normal((400, *mean.shape))        # what training draws
    assert (Data(folder).side, Data(folder).channels) == (2, 4)
    assert Data(folder).mean_std()[0] == pytest.approx(mean.mean((0, 2, 3)))
    assert Data(folder).mean_std()[1] == pytest.approx(drawn.std((0, 1, 3, 4)), rel=0.01)


COUNTS = (5, 3, 0, 8, 1, 4, 2)
N = sum(COUNTS)


@pytest.mark.parametrize("window", [1, 2, 3, 64])
def test_an_epoch_has_each_sample_once_and_keeps_to_the_shards_of_a_window(window):
    places = list(zip(*(part.tolist() for part in Order(COUNTS, 5, window).at(np.arange(3 * N)))))
    for epoch in range(3):
        part = places[epoch * N:(epoch + 1) * N]
        assert sorted(part) == [(s, r) for s, count in enumerate(COUNTS) for r in range(count)]
        positions = [[i for i in range(N) if part[i][0] == shard] for shard in range(len(COUNTS))]
        needed = [sum(min(own) <= i <= max(own) for own in positions if own) for i in range(N)]
        assert max(needed) <= window                    # files at a time


def test_a_position_has_its_sample_however_the_stream_is_asked():
    whole, used = np.stack(Order(COUNTS, 0, 2).at(np.arange(4 * N))), Order(COUNTS, 0, 2)
    shuffled = RNG(0).permutation(4 * N)
    assert np.array_equal(np.stack(used.at(shuffled)), whole[:, shuffled])
    for size in (1, 7, 30):
        for first in range(0, 4 * N, size):
            batch = np.arange(first, min(first + size, 4 * N))
            for order in (used, Order(COUNTS, 0, 2)):                      # gone on with, resumed
                assert np.array_equal(np.stack(order.at(batch)), whole[:, batch])


def test_seeds_epochs_and_windows_are_shuffled_independently(monkeypatch):
    orders = [Order((1000,), seed).at(np.arange(2000))[1].reshape(2, -1) for seed in range(3)]
    every = [epoch for order in orders for epoch in order]
    assert max((a == b).sum() for i, a in enumerate(every) for b in every[:i]) < 10
    asked = []
    monkeypatch.setattr(data, "permutation", lambda n, *given: asked.append(given) or np.arange(n))
    Order(COUNTS, 0, 2).at(np.arange(3 * N))
    assert len({tuple(permutation(20, *given)) for given in asked}) == len(asked) > 12
    for name in ("default_rng", "Generator", "permutation"):        # of raw bits alone, which
        monkeypatch.setattr(np.random, name, None)                  # numpy keeps for ever
    assert permutation(10, 3, 1).tolist() == [7, 1, 2, 6, 3, 0, 8, 9, 4, 5]


@pytest.mark.parametrize("text, words", [
    ("Two dogs, don't!", ["two", "dogs", "don't"]), ("'a' ''b c'", ["a", "b", "c"]),
    ("red-and_blue 3.5", ["red", "and", "blue", "3", "5"]), ("...", []), ("", []), ("' '", []),
    ("一只红色的猫 sits", [*"一只红色的猫", "sits"]), ("ネコcat", ["ネ", "コ", "cat"]),
    ("🐶 and 🐱🐱!", ["🐶", "and", "🐱", "🐱"]), ("a❤\ufe0fb", ["a", "❤", "b"]), ("^ `", []),
    ("हिन्दी कि", ["हिन्दी", "कि"]), ("กีบ", ["กี", "บ"]), ("cafe\u0301", ["café"]),
    ("猫's", ["猫", "s"])])
def test_words_are_those_of_many_scripts(text, words):
    assert split_words(text) == tuple(words)


def test_a_text_is_the_vectors_of_its_words_their_neighbours_and_places():
    text, mask = pad(Words(("red", "circle", "a"), 12, 5).states(["A red circle", "", "circle"]))
    assert text.shape == (3, 3, 12) and mask.sum(1).tolist() == [3, 1, 1] and mask[:, 0].all()
    longer, longer_mask = pad(list(text), 4)
    assert longer.shape == (3, 4, 12) and torch.equal(longer[:, :3], text)
    assert longer_mask.shape == (3, 4) and not longer[:, 3].any()
    assert pad(list(longer), 4)[0].shape == (3, 4, 12)
    for row, words in enumerate((("a", "red", "circle"), ("",), ("circle",))):
        vectors = [[(byte - 127.5) / math.sqrt((256 ** 2 - 1) / 12)
                    for byte in hashlib.shake_256(word.encode()).digest(4)] for word in words]
        for place, of_word in enumerate(vectors):
            others = [(i - place, vector) for i, vector in enumerate(vectors) if i != place]
            around = [sum(math.sqrt(1.5) / 2 ** abs(off) * vector[(channel + off) % 4]
                          for off, vector in others) for channel in range(4)]
            of_place = [math.sqrt(2) * wave(angle) for wave in (math.sin, math.cos)
                        for angle in (place, place / 10)]
            assert text[row, place].tolist() == pytest.approx(of_word + around + of_place, abs=1e-6)
    assert not text[~mask].any() and text.dtype == torch.float32


def test_the_words_of_an_older_version_are_refused():
    known = Words(("red",), 12, 3)
    assert encoder_of(known.config(), "a/config.json").config() == known.config()
    for change in (dict(dim=64), dict(kind="letters")):
        with pytest.raises(UserError, match="a/config.json has the text encoder .* another"):
            encoder_of(known.config() | change, "a/config.json")


def fail(error):
    """A function that raises it."""
    def failing(*given):
        raise error
    return failing


@pytest.mark.parametrize("fault", ["write", "fsync", "replace", "bug"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fault):
    def write(temporary):
        temporary.write_bytes(b"half of it")
        if fault in errors:
            raise errors[fault]

    write_text(tmp_path / "a.txt", "old é")
    full = OSError(errno.ENOSPC, "No space left on device")
    errors = {"write": full, "bug": ValueError("No space")}
    if fault not in errors:
        monkeypatch.setattr(os, fault, fail(full))
    with pytest.raises(ValueError if fault == "bug" else UserError, match="No space"):
        write_whole(tmp_path / "a.txt", write)
    assert (tmp_path / "a.txt").read_bytes() == "old é".encode()
    assert os.listdir(tmp_path) == ["a.txt"]
    for path in (tmp_path / "a.txt" / "b", tmp_path / ("b" * 300)):
        with pytest.raises(UserError, match="b cannot be written"):
            write_text(path, "")


def test_the_mode_of_a_file_follows_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        write_shard(tmp_path / "a.safetensors", columns())                # safetensors' own is 0600
        assert os.umask(before) == mask
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


def test_a_mistake_ends_in_its_sentence_and_a_bug_in_its_traceback(capsys, monkeypatch):
    for error, said in ((UserError("a.txt lacks b: add it"), "a.txt lacks b: add it\n"),
                        (torch.cuda.OutOfMemoryError("no GiB\nmore"), "(no GiB): end other pr")):
        with pytest.raises(SystemExit) as end:
            data.run(fail(error))
        stderr = capsys.readouterr().err
        assert end.value.code == 2 and said in stderr and stderr.count("\n") == 1
    for error in (ValueError("broadcast"), OSError("x"), KeyError("x")):
        with pytest.raises(type(error)):
            data.run(fail(error))
    assert data.printable("un œuf 猫 🐶") == "un œuf 猫 🐶"              # no text steers a terminal
    assert data.printable("a\x1b[31m\r\n\u202eb\x9b") == r"a\x1b[31m\r\n\u202eb\x9b"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))    # LC_ALL=C
    data.run(functools.partial(print, "猫", flush=True))
    assert sys.stdout.buffer.getvalue() == b"\\u732b\n"
