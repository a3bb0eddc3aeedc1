"""Faults, in numbers: kills, signals, flipped bits, cut files, full disks, dead ranks, two commands
at once, edited JSON, damaged sources, and a long run.

    python tests/faults.py                    # a few of each: what the tests run
    python tests/faults.py --long             # the table of docs/scale.md: an hour on two cores
    python tests/faults.py --long --only flips,soak

Each fault is done to a program at work on toy data. Then the same command runs again, and what it
has written must be that of a run left alone, to the last bit. Prints a line of JSON a kind: of its
tries, how many recovered (equal in the end), refused (one sentence and code 2, files as they were);
and, which is 0 or a fault, lost or silent (different in the end), hung (60 s) and tracebacks.
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import conftest

RELEASE = Path(__file__).parent / "release"
TRAIN = ["train.py", *conftest.TINY, "--data", "DATA", "--steps", "6", "--log-every", "2"]
JOBS = {
    "import": ["data.py", "import", "SOURCE", "NEW", "--size", "16"],
    "encode": ["data.py", "encode", "SOURCE", "NEW", "--size", "16", "--vae", f"{RELEASE}/vae",
               "--text-encoder", f"{RELEASE}/t5"],
    "score": ["rewards.py", "UNSCORED"],
    "bin": ["binning.py", "DATA", "--bins", "4"],
    "train": [*TRAIN, "--out", "NEW", "--save-every", "1"],
    "train, 2 ranks": [*TRAIN, "--out", "NEW", "--save-every", "1", "--wait", "0.4"],
    "sample": ["sample.py", "--checkpoint", "RUN", "--prompts", "prompts.txt", "--n", "3",
               "--batch", "2", "--steps", "2", "--out", "NEW"],
    "evaluate": ["evaluate.py", "shapes", "RUN", "--n", "6", "--steps", "1", "--out", "NEW"],
    "resume": [*TRAIN, "--out", "RUN", "--save-every", "2"],
}
# A file, and the job that reads it.
READ_BY = {"DATA/00000.safetensors": "train", "DATA/00000.scores.safetensors": "train",
           "DATA/data.json": "train", "DATA/bins.json": "train", "RUN/config.json": "sample",
           "RUN/model.safetensors": "sample", "RUN/state-00000006.pt": "resume"}


# ---- running -------------------------------------------------------------------------------------

def body(arguments: list, folder: str, environment: dict, output: str) -> None:
    """A process: a script in a folder, with its output in a file, which it empties first."""
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(folder)
        os.environ |= environment
        code, out, err = conftest.run(*arguments)
        signal.signal(signal.SIGINT, signal.SIG_DFL)          # as `run` leaves it
    except KeyboardInterrupt:                # while Python imports: its own traceback, not a fault
        os._exit(130)
    print(out, file=sys.stdout)
    print(err, file=sys.stderr, flush=True)
    sys.exit(code)


class Job:
    """A started command: a process a rank."""

    def __init__(self, name: str, folder: Path):
        self.outputs = []
        environments = conftest.two_ranks() if name.endswith("ranks") else [{}]
        self.processes = []
        for environment in environments:
            descriptor, output = tempfile.mkstemp(dir=folder.parent)
            os.write(descriptor, b"not begun")
            os.close(descriptor)
            self.outputs.append(Path(output))
            self.processes.append(CONTEXT.Process(target=body, args=(
                JOBS[name], str(folder), environment, output)))
            self.processes[-1].start()
        # Before it has begun, a signal would hit multiprocessing's code.
        for output, process in zip(self.outputs, self.processes):
            while process.is_alive() and output.read_bytes() == b"not begun":
                time.sleep(0.001)

    def kill(self, number: int, ranks: slice = slice(None)) -> None:
        for process in self.processes[ranks]:
            with contextlib.suppress(ProcessLookupError):        # it has just ended
                if process.is_alive():
                    os.kill(process.pid, number)

    def end(self) -> tuple[list, list, bool]:
        """Exit codes, what was said on stderr and stdout by all, and whether it hung."""
        until, hung = time.time() + 60, False
        for process in self.processes:
            process.join(max(0, until - time.time()))
            hung |= process.is_alive()
            process.kill()
            process.join()
        said = [output.read_text(errors="replace") for output in self.outputs]
        for output in self.outputs:
            output.unlink()
        return [process.exitcode for process in self.processes], said, hung


def artefacts(folder: Path) -> dict:
    """What a job leaves, by file, but for what has times in it, locks, and what a kill tore."""
    found = {}
    for path in sorted(folder.rglob("*")):
        passing = path.name in ("log.jsonl", ".lock") or path.suffix == ".tmp"
        if path.is_file() and not passing:
            found[str(path.relative_to(folder))] = path.read_bytes()
            if path.suffix == ".pt":             # equal tensors are saved in more ways than one
                try:
                    state = torch.load(path, weights_only=True)
                    found[str(path.relative_to(folder))] = nested_bytes(state)
                except (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError,
                        pickle.UnpicklingError):
                    continue                     # a damaged one is what its bytes are
    return found


def nested_bytes(value) -> bytes:
    """A nest of dicts and lists of tensors and numbers as bytes."""
    if isinstance(value, dict):
        return b"".join(str(key).encode() + nested_bytes(value[key]) for key in value)
    if isinstance(value, (list, tuple)):
        return b"".join(map(nested_bytes, value))
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else str(value).encode()


class Bench:
    """The inputs, and what each job makes of them when it is left alone."""

    def __init__(self, folder: Path):
        self.folder, self.base, self.seconds, self.wanted = folder, folder / "base", {}, {}
        source = self.base / "SOURCE"
        source.mkdir(parents=True)
        numbers = np.random.default_rng(0)
        for i in range(40):
            pixels = numbers.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(source / f"{i}.png")
            (source / f"{i}.txt").write_text(f"a red circle number {i}")
        (self.base / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
        for arguments in (["shapes.py", "DATA", "--n", "60", "--size", "16"],
                          ["rewards.py", "DATA"], ["binning.py", "DATA", "--bins", "8"],
                          [*TRAIN, "--out", "RUN", "--save-every", "2"]):
            process = CONTEXT.Process(target=body, args=(arguments, str(self.base), {},
                                                         str(folder / "output")))
            process.start()
            process.join()
            assert process.exitcode == 0, (folder / "output").read_text()
        shutil.copytree(self.base / "DATA", self.base / "UNSCORED",
                        ignore=shutil.ignore_patterns("*.scores.*", "bins*"))
        for name in JOBS:
            began, place = time.time(), self.fresh()
            codes, said, _ = Job(name, place).end()
            assert not any(codes), said
            self.seconds[name], self.wanted[name] = time.time() - began, artefacts(place)

    def fresh(self) -> Path:
        """A copy of the inputs."""
        place = self.folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        return Path(shutil.copytree(self.base, place))

    def finish(self, name: str, place: Path, count: Counter) -> None:
        """The same command again: is what it leaves that of a run left alone?"""
        codes, said, hung = Job(name, place).end()
        found, wanted = artefacts(place), self.wanted[name]
        different = {file for file in found | wanted if found.get(file) != wanted.get(file)}
        note(count, said, hung, 0)
        equal = not any(codes) and not different
        count["recovered" if equal else "lost"] += 1
        if not equal:
            complain(name, codes, said, different)


def note(count: Counter, said: list, hung: bool, tries: int = 1) -> None:
    count["tries"] += tries
    count["hung"] += hung
    if hung or any("Traceback" in text for text in said):
        count["tracebacks"] += not hung
        complain(*said)


def complain(*words) -> None:
    print(*(str(word)[-500:] for word in words), file=sys.stderr)


def judge(bench: Bench, name: str, place: Path, before: dict, file: str, count: Counter) -> None:
    """A job that reads a damaged file: it refuses in a sentence, or all is as it should be."""
    codes, said, hung = Job(name, place).end()
    note(count, said, hung)
    after, text = artefacts(place), "".join(said)
    if not any(codes):
        equal = all(after[key] == content for key, content in bench.wanted[name].items()
                    if key != file)
        count["recovered" if equal else "silent"] += 1
        if not equal:
            complain(name, file, "ended in silence")
    elif set(codes) == {2} and Path(file).name.split(".")[0] in text:
        count["refused"] += 1
        count["lost"] += any(after.get(key) != content for key, content in before.items()
                             if not key.startswith("NEW"))
    else:
        count["unclear"] += 1
        complain(name, file, codes, text[-600:])


# ---- the faults ----------------------------------------------------------------------------------

def kills(bench: Bench, tries: int, rng: random.Random, signals=(signal.SIGKILL,)) -> dict:
    """A signal at a random moment of each job in turn, some times in each place."""
    count, names = Counter(), [name for name in JOBS if name != "resume"]
    each = -(-tries // 60)
    for turn in range(-(-tries // each)):
        name, place = names[turn % len(names)], bench.fresh()
        for _ in range(min(each, tries - each * turn)):
            job, number = Job(name, place), rng.choice(signals)
            time.sleep(rng.uniform(0, 1.1 * bench.seconds[name]))
            job.kill(number)
            codes, said, hung = job.end()
            note(count, said, hung)
            stopped = {0, -number, 128 + number} | ({1} if len(codes) > 1 else set())
            if not set(codes) <= stopped:
                count["unclear"] += 1
                complain(name, number, codes, *said)
        bench.finish(name, place, count)
    return count


def end_signals(bench: Bench, tries: int, rng: random.Random) -> dict:
    """Signals that ask a program to end."""
    return kills(bench, tries, rng, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1))


def flips(bench: Bench, tries: int, rng: random.Random) -> dict:
    """One bit of each kind of file."""
    count = Counter()
    for turn in range(tries * len(READ_BY)):
        file, name = list(READ_BY.items())[turn % len(READ_BY)]
        place = bench.fresh()
        content = bytearray((place / file).read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (place / file).write_bytes(content)
        judge(bench, name, place, artefacts(place), file, count)
    return count


def cuts(bench: Bench, tries: int, rng: random.Random) -> dict:
    """Each kind of file, cut at even places."""
    count = Counter()
    for file, name in READ_BY.items():
        for k in range(tries):
            place = bench.fresh()
            os.truncate(place / file, k * (place / file).stat().st_size // tries)
            judge(bench, name, place, artefacts(place), file, count)
    return count


def edits(bench: Bench, tries: int, rng: random.Random) -> dict:
    """A value of a file of JSON, changed by hand or removed."""
    count, files = Counter(), [file for file in READ_BY if file.endswith(".json")]
    for turn in range(tries):
        file, place = files[turn % len(files)], bench.fresh()
        content = inner = json.loads((place / file).read_text())
        while True:
            key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if not isinstance(inner[key], (dict, list)) or not inner[key] or rng.random() < 0.2:
                break
            inner = inner[key]
        if rng.random() < 0.2:
            del inner[key]
        else:
            inner[key] = rng.choice([None, -1, 0, 1e9, float("nan"), True, "x", [], {}, [[1]]])
        (place / file).write_text(json.dumps(content))
        judge(bench, READ_BY[file], place, artefacts(place), file, count)
    return count


def full_disks(bench: Bench, tries: int, rng: random.Random) -> dict:
    """A disk of its own that fills up; then it grows, and the same command goes on."""
    count, names = Counter(), [name for name in JOBS if name != "resume"]
    for turn in range(tries):
        name = names[turn % len(names)]
        size = sum(path.stat().st_size // 4096 + 1 for path in bench.base.rglob("*")) * 4096
        there = artefacts(bench.base)
        need = sum(len(content) for file, content in bench.wanted[name].items()
                   if there.get(file) != content)
        grown, disk = size + rng.randrange(need), bench.fresh()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={grown}", "tmpfs", disk], check=True)
        try:
            place = Path(shutil.copytree(bench.base, disk, dirs_exist_ok=True))
            codes, said, hung = Job(name, place).end()
            note(count, said, hung)
            if 2 in codes:
                count["refused"] += 1
            elif any(codes):
                count["unclear"] += 1
                complain(name, codes, *said)
            count["temporaries left"] += len(list(place.rglob(".*.tmp")))
            subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
            bench.finish(name, place, count)
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
    return count


def dead_ranks(bench: Bench, tries: int, rng: random.Random) -> dict:
    """One of two ranks is killed: the other says so in one sentence, within a minute."""
    count, name = Counter(), "train, 2 ranks"
    for turn in range(tries):
        place = bench.fresh()
        job = Job(name, place)
        time.sleep(rng.uniform(0, 0.8) * bench.seconds[name])
        job.kill(signal.SIGKILL, slice(turn % 2, turn % 2 + 1))
        codes, said, hung = job.end()
        note(count, said, hung)
        if codes[1 - turn % 2]:
            count["sentences"] += sum("another rank" in text for text in said)
            count["deaths"] += 1
        bench.finish(name, place, count)
    return count


def pairs(bench: Bench, tries: int, rng: random.Random) -> dict:
    """The same command twice at once: one goes on, the other goes on or refuses."""
    count, names = Counter(), [name for name in JOBS if name != "train, 2 ranks"]
    for turn in range(tries):
        name = names[turn % len(names)]
        place = bench.fresh()
        jobs = [Job(name, place)]
        time.sleep(rng.uniform(0, bench.seconds[name]))
        jobs.append(Job(name, place))
        for job in jobs:
            codes, said, hung = job.end()
            note(count, said, hung)
            count["refused"] += codes == [2] and "in use" in said[0]
            count["unclear"] += codes not in ([0], [2])
            if codes not in ([0], [2]):
                complain(name, codes, *said)
        bench.finish(name, place, count)
    return count


def fuzz(bench: Bench, tries: int, rng: random.Random) -> dict:
    """Sources with random bytes in them: each import ends in order, and writes nowhere else."""
    count, place = Counter(), bench.fresh()
    original = {path.name: path.read_bytes() for path in (place / "SOURCE").iterdir()}
    records = [dict(file_name=name, text=[f"caption {name}"]) for name in original if "png" in name]
    for turn in range(tries):
        folder = place / "FUZZ"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kind = ("files", "tar", "jsonl", "csv")[turn % 4]
        files = dict(original)
        if kind == "jsonl":
            files["metadata.jsonl"] = "\n".join(map(json.dumps, records)).encode()
        elif kind == "csv":
            files["metadata.csv"] = b"file_name,text\n" + b"".join(
                f'{name},"of, {name}"\n'.encode() for name in original if "png" in name)
        elif kind == "tar":
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as tar:
                for name, content in original.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            files = {"a.tar": packed.getvalue()}
        struck = [name for name in files if "metadata" in name or "tar" in name] or [*files]
        for name in rng.sample(struck, min(len(struck), 3)):
            content = bytearray(files[name])
            for _ in range(rng.randrange(1, 9)):
                at, size = rng.randrange(len(content) + 1), rng.randrange(1, 17)
                content[at:at + rng.choice((0, size))] = rng.randbytes(rng.choice((0, size)))
            files[name] = bytes(content)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        before = {path for path in place.rglob("*") if "FUZZED" not in path.parts}
        JOBS["fuzz"] = ["data.py", "import", "FUZZ", "FUZZED", "--size", "16"]
        shutil.rmtree(place / "FUZZED", ignore_errors=True)
        codes, said, hung = Job("fuzz", place).end()
        note(count, said, hung)
        count["imported" if codes == [0] else "refused" if codes == [2] else "unclear"] += 1
        outside = {path for path in place.rglob("*") if "FUZZED" not in path.parts} - before
        count["outside"] += len(outside)
    count["MB at most"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    return count


def soak(bench: Bench, tries: int, rng: random.Random) -> dict:
    """A run of many steps with a checkpoint every 50: memory, open files, temporaries."""
    JOBS["soak"] = [*TRAIN, "--out", "SOAK", "--save-every", "50", "--sample-every", "500",
                    "--steps", str(tries)]
    place = bench.fresh()
    job, seen = Job("soak", place), []
    pid = job.processes[0].pid
    while job.processes[0].is_alive():
        time.sleep(0.5)
        steps = [int(path.stem[6:]) for path in place.glob("SOAK/state-*.pt")]
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            seen.append((max(steps, default=0), pages * 4096, len(os.listdir(f"/proc/{pid}/fd"))))
        except OSError:
            break
    codes, said, _ = job.end()
    count = Counter(tries=tries, tracebacks=sum("Traceback" in text for text in said))
    early = [one for one in seen if tries / 6 <= one[0] < tries / 3] or seen[:1]
    late = [one for one in seen if one[0] >= tries * 5 / 6] or seen[-1:]
    drift = np.mean([one[1] for one in late]) / np.mean([one[1] for one in early]) - 1
    return count | {"exit": codes[0], "memory drift %": round(100 * drift, 2),
                    "files more": min(one[2] for one in late) - min(one[2] for one in early),
                    "temporaries": len(list(place.rglob(".*.tmp")))}


# A kind: tries in the tests, tries with --long.
KINDS = {kills: (8, 300), end_signals: (8, 60), flips: (1, 200), cuts: (2, 50), edits: (6, 500),
         full_disks: (0, 40), dead_ranks: (1, 20), pairs: (2, 20), fuzz: (8, 7000),
         soak: (0, 6000)}


def main() -> None:
    """Strike."""
    global CONTEXT
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="as often as docs/scale.md has it")
    parser.add_argument("--only", default=",".join(kind.__name__ for kind in KINDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    CONTEXT = multiprocessing.get_context("forkserver")
    CONTEXT.set_forkserver_preload(["train", "pytest", "matplotlib.figure", "torch._dynamo"])
    os.environ["PYTHONPATH"] = str(conftest.ROOT)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for kind, (few, many) in KINDS.items():
            tries = many if args.long else few
            if tries and kind.__name__ in args.only.split(","):
                began = time.time()
                found = dict(kind(bench, tries, random.Random(args.seed)))
                bad += sum(found.get(word, 0) for word in (
                    "lost", "silent", "hung", "tracebacks", "unclear", "outside"))
                print(json.dumps(dict(kind=kind.__name__, **found,
                                      seconds=round(time.time() - began))), flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
