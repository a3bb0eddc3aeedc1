"""Every script, given something wrong: one sentence that names it, exit code 2, nothing lost.

Sources of pictures are wrong in more ways: see test_data.py."""
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, run, sentences


class Bomb:
    """Runs a program when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def snapshot(folder: Path) -> dict:
    """Every file below a folder and its content."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.fixture
def place(world, checkpoint, tmp_path, monkeypatch) -> Path:
    """A folder to work in, with copies of the world, in `world`, and of the checkpoint, in `run`,
    and a folder of pictures, `d`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world, "world")
    shutil.copytree(checkpoint, "run")
    write("mine", "a file")
    write("d/0.png", "a picture")
    write("d/0.txt", "a red circle")
    for name in ("empty", "empty.png"):
        Path(name).mkdir()
    return tmp_path


# ---- spoiling

def write(name: str, content: str | bytes) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str, size: int) -> None:
    """Keep the first bytes of a file."""
    os.truncate(name, size)


def remove(name: str) -> None:
    Path(name).unlink()


def bomb(name: str) -> None:
    Path(name).write_bytes(pickle.dumps(Bomb(), 2))


def bomb_states() -> None:
    for path in Path("run").glob("state-*.pt"):
        torch.save({"step": 8, "net": Bomb()}, path)


TRAIN = f"train.py {' '.join(TINY)} --steps 2 --out out"
WORLD = f"{TRAIN} --data world"
RESUME = f"train.py {' '.join(TINY)} --steps 8 --data world --out run"
SAMPLE = "sample.py --checkpoint run --out out.png --steps 2"
CIRCLE = f"{SAMPLE} --prompt circle"
JOBS = f"{SAMPLE} --prompts jobs.jsonl"

CASES = [
    ("data.py import nowhere out", "nowhere is no file and no folder: give tars"),
    ("data.py import d d", "DATA, the last argument, is d, which holds files that"),
    ("data.py import d run", "run/model.safetensors cannot be read (it is no shard of DATA, or d"),
    ("data.py import d world --size 16", "DATA, the last argument, is world, which holds"),
    ("data.py import d out --size 0", "--size: 0 is not from 1"),
    ("data.py encode d out --size 12", "--size 12: of encode it is a multiple"),
    ("data.py import d mine/out", "mine/out cannot be written to (Not a directory)"),
    ("data.py import empty out", "empty has no picture with a caption"),
    ("data.py encode d out --size 16 --vae /no", "the VAE /no cannot be loaded: name a folder"),
    *((f"shapes.py new --{flag} {value}", f"--{flag}: {value} is not from") for flag, value in (
        ("n", 0), ("size", 15), ("size", 513), ("seed", -1))),
    ("shapes.py mine --n 9", "mine cannot be written to (File exists)"),
    ("rewards.py d", "d has no data.json: make DATA of pictures with python data.py import"),
    ("rewards.py world --rewards contrast,beauty", "unknown reward 'beauty'; valid: aesthetic"),
    ("rewards.py world --rewards contrast,contrast", "a reward is named twice"),
    ("binning.py world --bins 1", "--bins: 1 is not from 2"),
    ("binning.py nowhere", "nowhere has no data.json"),
    (f"{TRAIN} --data nowhere", "nowhere has no data.json"),
    (f"{TRAIN} --rewards contrast,beauty", "unknown reward 'beauty'; valid: aesthetic"),
    (f"{WORLD} --rewards contrast,contrast", "a reward is named twice"),
    (f"{WORLD} --rewards pick", "world has no scores of pick: make them with python rewards.py"),
    (f"{WORLD} --out mine/run", "mine/run cannot be written to (Not a directory)"),
    (f"{WORLD} --patch 5", "flags of the network, for 3 channels of size 16: size 16 is no mu"),
    (f"{WORLD} --preset paper --latent-dim 64 --data-dim 64", "trains on latents, and world has"),
    (f"{TRAIN} --batch 9 --accumulate 2", "--batch 9 is for all ranks and micro-batches together"),
    (f"{TRAIN} --latent-dim 33", "latent_dim 33 is no multiple of heads 4"),
    (f"{TRAIN} --preset large", "--preset: invalid choice: 'large'"),
    (f"{TRAIN} --optimizer sgd", "--optimizer: invalid choice: 'sgd'"),
    *((f"{TRAIN} --{flag} {value}", f"--{flag}: {value} is not from") for flag, value in (
        ("patch", 0), ("steps", 0), ("blocks", 0), ("val", 0), ("bins", 1), ("seed", -1),
        ("lr", "nan"), ("ema", 1.5), ("reward-dropout", 2.0), ("workers", -1), ("save-every", 0),
        ("seed", 99999999999999999999), ("t-mean", 20.0), ("latent-dim", 0))),
    (f"{TRAIN} --precision int8", "--precision: invalid choice: 'int8'"),
    (f"{TRAIN} --latent-dim 4", "latent_dim 4 is no multiple of 4 from 8 on"),
    (f"{RESUME} --lr 0.5", "run was trained with --lr 0.002, not 0.5"),
    (f"{RESUME} --latents 4", "run was trained with --latents 8, not 4"),
    ("sample.py --checkpoint nowhere --prompt a", "nowhere/config.json cannot be read (["),
    ("sample.py --checkpoint d --prompt a", "d/config.json cannot be read (["),
    (f"{CIRCLE} --targets all=1 beauty=1", "--targets beauty=1: no such reward in this checkpoint"),
    (f"{CIRCLE} --negative contrast=high", "negative contrast=high: a level is"),
    (f"{CIRCLE} --negative-prompt ugly", "'ugly' has the unknown word 'ugly'"),
    (f"{SAMPLE} --prompt dog", "'dog' has the unknown word 'dog'; known words, the closest first:"),
    (f"{SAMPLE} --prompt {'-'.join(['circle'] * 30)}", "has 30 words; shorten it to"),
    (f"{CIRCLE} --sweep beauty=0:1:3", "--sweep beauty=0: no such reward in this checkpoint"),
    (f"{CIRCLE} --best-of 2", "--best-of needs --by one of "),
    (f"{CIRCLE} --out mine/out.png", "mine cannot be written to (File exists)"),
    (f"{CIRCLE} --out empty.png", "--out empty.png"),
    (f"{CIRCLE} --out d", "--out d has other files, or pictures of other"),
    (f"{CIRCLE} --out o.jpg", "--out o.jpg: name a .png, or a folder"),
    (f"{CIRCLE} --best-of 2 --out o", "--best-of and --by make a figure: --out o.png"),
    (f"{SAMPLE} --prompt dog --out o", "'dog' has the unknown word 'dog'"),
    (f"{SAMPLE} --prompts nowhere.txt", "--prompts nowhere.txt, line 1: [Errno 2] No such file"),
    *((f"{CIRCLE} --{flag} {value}", f"--{flag}: {value} is not from") for flag, value in (
        ("steps", 0), ("n", 0), ("best-of", 0), ("batch", 0), ("seed", -1),
        ("guidance", -1.0), ("guidance", "nan"), ("seed", 99999999999999999999))),
    ("evaluate.py shapes run --n 0", "--n: 0 is not from 6"),
    ("evaluate.py shapes d", "d/config.json cannot be read"),
]

SPOILT = [                            # a file is spoilt first
    ((cut, "world/00000.safetensors", 90_000), WORLD, "world/00000.safetensors cannot be read"),
    ((cut, "world/bins.json", 500), WORLD, "world/bins.json"),
    ((bomb_states,), RESUME, "no checkpoint in run can be read"),
    ((remove, "run/model.safetensors"), CIRCLE, "run/model.safetensors cannot be read"),
    ((cut, "run/model.safetensors", 100_000), CIRCLE, "run/model.safetensors cannot be read"),
    ((bomb, "run/model.safetensors"), CIRCLE, "run/model.safetensors cannot be read"),
    ((cut, "run/config.json", 500), CIRCLE, "run/config.json cannot be read"),
    ((write, "jobs.jsonl", "\n  \n"), JOBS, "jobs.jsonl has no prompt: write one a line"),
    ((write, "jobs.jsonl", b"\xff\xfea\0"), JOBS, "in UTF-8"),
    ((write, "jobs.jsonl", 'a\n{"prompt": "a cr'), JOBS, "jobs.jsonl, line 2: Unterminated"),
    ((write, "jobs.jsonl", '{"seed": 1}'), JOBS, 'line 1: it has no "prompt" that is text'),
]


def ends_well(place: Path, command: str, said: str) -> None:
    """One sentence with `said`, code 2, and every file as it was."""
    before = snapshot(place)
    code, _, stderr = run(*command.split())
    # A state that cannot be read is named as it is passed over; the end is the last line.
    found = [line for line in sentences(stderr) if "trying the one before" not in line]
    assert code == 2 and len(found) == 1, (code, stderr)
    assert said in found[0] and "Traceback" not in stderr, stderr
    assert snapshot(place) == before, sorted(map(str, snapshot(place).keys() ^ before.keys()))


@pytest.mark.parametrize("command, said", CASES)
def test_what_cannot_be_ends_in_one_sentence_with_code_2_and_changes_nothing(place, command, said):
    ends_well(place, command, said)


@pytest.mark.parametrize("spoil, command, said", SPOILT)
def test_a_spoilt_file_is_named_in_one_sentence_and_nothing_else_is_lost(place, spoil, command,
                                                                        said):
    function, *arguments = spoil
    function(*arguments)
    ends_well(place, command, said)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("command, flag", [
    ("train.py --steps many", "--steps"), ("train.py --stepz 3", "--stepz"),
    ("sample.py --steps 2", "--prompt --prompts --page is required"),
    ("sample.py --solver heun", "--solver"), ("sample.py --sweep contrast=0:1", "--sweep"),
    ("evaluate.py faces run", "shapes"),
    ("rewards.py --batch few", "--batch"), ("data.py chekc d", "chekc"),
    ("data.py import d", "DATA")])
def test_what_argparse_refuses_ends_with_code_2_and_names_it(tmp_path, monkeypatch, command, flag):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run(*command.split())
    assert code == 2 and flag in stderr.splitlines()[-1] and not any(tmp_path.iterdir())


def test_a_process_of_its_own_ends_with_code_2_and_one_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--rewards", "beauty"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("unknown reward 'beauty'; valid: ")
    assert not any(tmp_path.iterdir())


def test_ctrl_c_that_falls_into_a_destructor_still_ends_a_program_in_one_sentence():
    program = """
import signal, time
import data

class Bar:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def main():
    Bar()
    time.sleep(10)

data.run(main)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                                     signal.SIG_DFL))   # nohup
    assert (done.returncode, done.stderr) == (130, "stopped: the same command goes on\n")
