"""What several test files share: a small scored world, a checkpoint trained on it, and three ways
to run a script: in this process, in a process of its own, and in one that is killed on the way."""
import os

os.environ["OMP_NUM_THREADS"] = "1"    # before torch: bitwise oracles need one number of threads
os.environ["CUDA_VISIBLE_DEVICES"] = ""            # oracles are bitwise: one kind of device

import contextlib
import functools
import io
import multiprocessing
import re
import runpy
import signal
import socket
import sys
import threading
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.backends.mps.is_available = functools.cache(lambda: False)        # nor an Apple GPU

TINY = ("--patch 4 --latents 8 --latent-dim 32 --data-dim 32 --blocks 1 --layers 1 "
        "--batch 8 --val 8 --bins 8 --warmup 2 --optimizer muon --lr 2e-3 --matrix-lr 1e-2 "
        "--self-condition 0.5 --text-dropout 0.1 --reward-dropout 0.1").split()


def run(script: str, *arguments) -> tuple:
    """`python script arguments`, its last lines included, in this process: (code, out, err)."""
    out, err, code, before = io.StringIO(), io.StringIO(), 0, sys.argv
    interrupted = signal.getsignal(signal.SIGINT)
    sys.argv = [script, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv, sys.unraisablehook = before, sys.__unraisablehook__
        signal.signal(signal.SIGINT, interrupted)
    return code, out.getvalue(), err.getvalue()


def succeed(script: str, *arguments) -> str:
    """What a script printed that ended with code 0."""
    code, out, err = run(script, *arguments)
    assert code == 0, err
    return out


def refused(script: str, *arguments) -> str:
    """The one sentence in which a script ended with code 2."""
    code, _, err = run(script, *arguments)
    assert code == 2 and len(sentences(err)) == 1, err
    return sentences(err)[0]


def two_ranks() -> list[dict]:
    """The environments of two ranks, as torchrun makes them, with a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                 MASTER_PORT=port) for rank in range(2)]


def sentences(stderr: str) -> list:
    """The lines of stderr, without progress bars."""
    without = re.sub(r"[^\r\n]*\d+%\|[^\r\n]*?\[[^\]\r\n]*\]", "\n", stderr)
    return [line.strip() for line in re.split(r"[\r\n]", without) if line.strip()]


def _child(script: str, arguments: list, folder: str, environment: dict, kill: tuple | None):
    """Body of a process: run a script in a folder, and perhaps end as kill -9 would."""
    tqdm.set_lock(threading.RLock())             # its own: a killed holder would lock all for ever
    os.chdir(folder)
    os.environ |= environment
    if kill:
        module, name, left = (torch if kill[0] == "save" else os), kill[0], [kill[1]]
        function = getattr(module, name)

        def deadly(*given):
            left[0] -= 1
            if left[0] == 0 and name == "save":                  # in the middle of a file
                function(*given)
                os.truncate(given[1], os.path.getsize(given[1]) // 2)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given)

        setattr(module, name, deadly)
    code, out, err = run(script, *arguments)
    print(out, err)
    sys.exit(code)


@pytest.fixture(scope="session")
def child():
    """child(script, arguments, folder, environment={}, kill=None): a started process.

    kill=("replace", 3): it is killed when it calls os.replace for the third time. The processes
    fork from one that has imported torch and never ran it: seconds less than `python script`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "matplotlib.figure", "torch._dynamo", "pytest"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        forkserver.ensure_running()

    def start(script, arguments, folder, environment={}, kill=None):
        process = context.Process(target=_child, args=(
            script, [str(argument) for argument in arguments], str(folder), environment, kill))
        process.start()
        return process

    return start


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """300 pictures of the embedded world in 3 shards, scored and binned. Copy it to change it."""
    import binning
    import rewards
    import shapes
    from data import Data
    folder = tmp_path_factory.mktemp("world")
    shapes.write_world(folder, 300, seed=0, size=16, shard=100)
    rewards.score_dataset(Data(folder), shapes.ANALYTIC)
    binning.bin_dataset(folder, 8)
    return folder


@pytest.fixture(scope="session")
def checkpoint(world, tmp_path_factory) -> Path:
    """A network after 8 steps, saved at each second one. Copy it to change it."""
    out = tmp_path_factory.mktemp("checkpoint") / "run"
    succeed("train.py", *TINY, "--data", world, "--out", out, "--steps", 8, "--save-every", 2,
            "--log-every", 2)
    return out
