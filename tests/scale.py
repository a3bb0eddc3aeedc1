"""Does training start, and feed itself, at the paper's scale? Prints one line of JSON.

    python tests/scale.py                          # starts at 1 and 2 million rows, and an epoch
    python tests/scale.py --rows 20000 --shards 4  # the same, small: tests/test_scale.py runs it
    python tests/scale.py --arrays                 # a worker and the main process, on arrays of
                                                   # the paper's sizes
    python tests/scale.py --bins 16000000          # binning.py on so many rows of seven rewards
"""
import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")      # before torch: as a worker has it
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

import binning
import data
import rewards
import train

RANKS = 4


def memory() -> dict[str, float]:
    """MB of this process: all that it holds now, its peak, and what is not a file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {name: int(found[key].split()[0]) / 1024
            for name, key in (("now", "VmRSS"), ("peak", "VmHWM"), ("own", "RssAnon"))}


def write_rows(folder: Path, rows: int, shards: int, side: int = 1, width: int = 8,
               tokens: tuple = (1, 1)) -> None:
    """DATA of latents with captions, scored and binned: random arrays of these sizes."""
    rng, folder = np.random.default_rng(0), Path(folder)
    folder.mkdir(parents=True)
    edges = np.linspace(0, rows, shards + 1).astype(int)
    for number, n in enumerate(np.diff(edges).tolist()):
        lengths = rng.integers(tokens[0], tokens[1] + 1, n)
        keys, key_ends = data.pack([f"{number:05d}{row:06d}" for row in range(n)])
        captions, caption_ends = data.pack([f"caption {row}" for row in range(n)])
        columns = dict(
            mean=rng.standard_normal((n, 4, side, side), np.float32).astype(np.float16),
            std=np.full((n, 4, side, side), 0.1, np.float16),
            text=rng.standard_normal((lengths.sum(), width), np.float32).astype(np.float16),
            text_ends=np.cumsum(lengths), empty=np.ones((1, width), np.float16),
            keys=keys, key_ends=key_ends, captions=captions, caption_ends=caption_ends,
            pair_ends=np.arange(1, n + 1), place=np.zeros((n, 3), np.int64))
        data.write_shard(folder / f"{number:05d}.safetensors", columns)
        write_scores(folder / f"{number:05d}.safetensors",
                     rng.standard_normal((7, n), np.float32))
    data.write_info(folder, dict(
        kind="latents", size=8 * side, shards=shards, samples=rows, pairs=rows, left_out={},
        vae="none", scaling_factor=1.0, dtype="torch.float32",
        text_encoder=dict(kind="t5", source="none", dim=width, length=77)))
    binning.bin_dataset(folder, 64)


def write_scores(path: Path, columns: np.ndarray) -> None:
    """Random scores (7, P) of a shard."""
    scorers = dict.fromkeys(rewards.PAPER, "random")
    rewards.write_scores(data.Shard(path), dict(zip(rewards.PAPER, columns)), scorers, {})


def open_batches(folder: Path, rank: int, ranks: int, *flags: str) -> train.Batches:
    """What train.py's main does until its loop."""
    args, network = train.read_args(["--preset", "paper", "--data", str(folder), "--patch", "1",
                                     *flags])
    found, bins = train.prepare(args, network, rank)
    encoder = train.encoder_for(args, found)
    config = train.describe(args, network, found, bins, encoder)
    return train.Batches(args, config, found, bins, encoder, rank, ranks)


def start(folder: Path, rank: int) -> dict:
    """Seconds and MB from the imports to the first batch of one rank."""
    before, began = memory(), time.time()
    open_batches(folder, rank, RANKS, "--batch", "1024")[0]
    return dict(seconds=round(time.time() - began, 2),
                mb=round(memory()["peak"] - before["now"], 1))


def epoch(folder: Path, rows: int) -> dict:
    """MB of its own that a worker has in the course of an epoch, and its samples a second."""
    batches, found, began = open_batches(folder, 0, 1, "--batch", "1000"), [], time.time()
    steps = rows // 1000
    for step in range(steps):
        batches[step]
        if step % max(1, steps // 10) == 0:
            found.append(round(memory()["own"], 1))
    return dict(mb=found, samples_per_second=round(steps * 1000 / (time.time() - began)))


def paths(folder: Path, workers: int = 1, steps: int = 60) -> dict:
    """A worker's samples a second, and the main process's own ms for a step of 64 that a worker
    has made: from the arrays in `folder`."""
    batches = open_batches(folder, 0, 1, "--batch", "64", "--steps", str(steps), "--workers",
                           str(workers))
    for step in range(5):
        batches[step]
    began = time.time()
    for step in range(5, 25):
        batches[step]
    rate = 20 * 64 / (time.time() - began)
    train.keep_freed_memory()                          # as train.py's main does
    spent, started = [], time.process_time()
    for batch in batches.loader(0):            # text becomes float32 on the device: not counted
        batch = [tensor.to("cpu") for tensor in batch]
        spent.append(time.process_time() - started)
        time.sleep(0.1)                                # the network's step: the worker gets ahead
        started = time.process_time()
    return dict(samples_per_second=round(rate), main_ms=round(1000 * np.mean(spent[11:]), 2))


def child(*words) -> dict:
    """This script in a process of its own: its JSON."""
    return json.loads(subprocess.run([sys.executable, __file__, *map(str, words)], check=True,
                                     capture_output=True, text=True).stdout.splitlines()[-1])


def starts(folder: Path) -> dict:
    """The slowest and the largest of the starts of all ranks, at once; the quickest of three."""
    command, tries = [sys.executable, __file__, "--start", str(folder), "--rank"], []
    for _ in range(3):
        ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True)
                 for rank in range(RANKS)]
        found = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
        tries.append({key: max(one[key] for one in found) for key in found[0]})
    return min(tries, key=lambda one: one["seconds"])


def main() -> None:
    """One of the questions above; without a flag, the starts and the epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000)
    add("--shards", type=int, default=100)
    add("--arrays", action="store_true", help="a worker on arrays of the paper's sizes")
    add("--bins", type=int, help="rows of seven rewards to bin")
    add("--start", help="(a rank's own process) DATA")
    add("--rank", type=int, default=0)
    add("--epoch", help="(a process of its own) DATA")
    add("--paths", help="(a process of its own) DATA")
    args = parser.parse_args()
    if args.start:
        return print(json.dumps(start(Path(args.start), args.rank)))
    if args.paths:
        return print(json.dumps(paths(Path(args.paths))))
    if args.epoch:
        return print(json.dumps(epoch(Path(args.epoch), args.rows)))
    with tempfile.TemporaryDirectory() as place:
        place, found = Path(place), dict(rows=args.rows, shards=args.shards)
        if args.bins:
            copies = args.bins // 10_000
            write_rows(place / "rows", 10_000, 1)
            for number in range(1, copies):
                for ending in ("safetensors", "scores.safetensors"):
                    os.link(place / "rows" / f"00000.{ending}",
                            place / "rows" / f"{number:05d}.{ending}")
            info = data.read_json(place / "rows" / "data.json")
            del info["format"]
            data.write_info(place / "rows", info | dict(shards=copies))
            began = time.time()
            binning.bin_dataset(place / "rows", 64)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
            found = dict(rows=args.bins, seconds=round(time.time() - began, 1),
                         peak_gb=round(peak, 2))
        elif args.arrays:
            write_rows(place / "new", 2000, 4, 32, 2048, (8, 60))
            found = child("--paths", place / "new")
        else:
            for name, times in (("one", 1), ("two", 2)):
                write_rows(place / name, times * args.rows, times * args.shards)
                found[f"start x {times}"] = starts(place / name)
            shutil.rmtree(place / "two")
            found["epoch"] = child("--epoch", place / "one", "--rows", args.rows)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
