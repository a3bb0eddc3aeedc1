"""Time and memory of the released network: ours, and the authors' miro-t2i where it is installed.

    python tests/benchmark.py                      # this machine: CPU in fp32, or a GPU in bf16
    pip install --no-deps miro-t2i==0.1.4 && pip install einops      # then it runs beside ours

Random weights, the same in both codes. Each measurement is a process of its own, alternating, so
that neither code lives on the other's memory; ours sets what train.py sets (keep_freed_memory).
A sampling step is both branches of guidance for `--pictures` pictures; a training step is the pass
of self-conditioning, for all samples, then forward and backward. Not collected by pytest.
"""
import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import evaluate
import flow
import reference
import train
from data import best_device
from model import PRESETS, RELEASE_REWARDS, Config, build

PAPER = Config(**PRESETS["paper"], rewards=tuple(RELEASE_REWARDS))
TOKENS = 77


def parts_of(code: str, device) -> list:
    """Our network, or miro-t2i's and its preconditioning, at the released size."""
    if code == "ours":
        train.keep_freed_memory()
        return [build(PAPER).to(device)]
    config = reference.config_of(reference.RELEASED, reference.KEYS)
    return [*reference.parts_of(config).to(device).values()]


def given(B: int, device) -> dict:
    """Inputs of reference.py at the released size, all text tokens real."""
    tensors = reference.inputs(reference.RELEASED, len(PAPER.rewards), B, TOKENS)
    tensors["text_mask"][:] = True
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def clock(step, times: int, device) -> tuple:
    """(seconds of the fastest call after a first one, peak GB while running)."""
    sync = getattr(torch, device.type).synchronize
    step()
    best = float("inf")
    for _ in range(times):
        sync()
        began = time.perf_counter()
        step()
        sync()
        best = min(best, time.perf_counter() - began)
    peak = (torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
    return best, peak


def measure_sampling(code: str, B: int, times: int, device, dtype) -> tuple:
    """One guided step for B pictures: the difference of a run of 1 and of 1 + `times` steps, so
    that what a picture costs once is not counted for either code."""
    i, w, parts = given(B, device), 7.0, [part.eval() for part in parts_of(code, device)]
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    branches = flow.branches(i["s"], 0 * i["s"], i["text"], i["text_mask"], w)

    def run(steps):
        if code == "ours":
            with cast:
                flow.sample(*parts, i["eps"], branches, steps)
        else:
            reference.their_sampler(*parts, i, reference.KEYS, i["text"], steps, w, dtype)

    one, _ = clock(lambda: run(1), 1, device)
    many, peak = clock(lambda: run(1 + times), 1, device)
    return (many - one) / times, peak


def measure_training(code: str, B: int, times: int, device, dtype, compiled: bool) -> tuple:
    """One training step of B samples, all self-conditioned."""
    i, coin = given(B, device), torch.ones(B, dtype=torch.bool, device=device)
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    parts = parts_of(code, device)
    net = torch.compile(parts[0]) if compiled else parts[0]
    parameters = [p for part in parts for p in part.parameters()]

    def step():
        with cast:
            if code == "ours":
                loss = flow.loss(net, i["x_0"], i["eps"], i["t"], i["s"], i["text"],
                                 i["text_mask"], coin)[1]
            else:
                loss = reference.their_loss(net, parts[1], i, reference.KEYS, coin)
        loss.mean().backward()
        for p in parameters:
            p.grad = None
    return clock(step, times, device)


def matrix_peak(device, dtype) -> float:
    """FLOP/s of the fastest square matrix product: what the machine can do."""
    best = 0.0
    for n in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        seconds, _ = clock(lambda: a @ b, 5, device)
        best = max(best, 2 * n ** 3 / seconds)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1, help="of a sampling step")
    parser.add_argument("--batch", type=int, default=4, help="of a training step")
    parser.add_argument("--times", type=int, default=3, help="measured steps; the fastest counts")
    parser.add_argument("--rounds", type=int, default=1, help="of both codes, alternating")
    parser.add_argument("--compile", action="store_true", help="torch.compile in training")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)      # one measurement, as JSON
    args = parser.parse_args()
    device = best_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    if args.one:
        code, what = args.one
        if what == "peak":
            measured = (matrix_peak(device, dtype), 0)
        elif what == "sampling":
            measured = measure_sampling(code, args.pictures, args.times, device, dtype)
        else:
            measured = measure_training(code, args.batch, args.times, device, dtype, args.compile)
        return print(json.dumps(measured))

    def one(code: str, what: str) -> list:
        said = subprocess.check_output([sys.executable, *sys.argv, "--one", code, what], text=True)
        return json.loads(said.splitlines()[-1])

    codes = ["theirs", "ours"] if importlib.util.find_spec("miro") else ["ours"]
    forward, peak = evaluate.forward_cost(PAPER, TOKENS)[1], one("ours", "peak")[0]
    print(f"{device}, {dtype}: {peak / 1e9:,.0f} GFLOP/s in the fastest matrix product; "
          f"{forward / 1e9:.1f} GFLOP a forward pass")
    for what, B, work in (("sampling", args.pictures, 2 * args.pictures * forward),
                          ("training", args.batch, 4 * args.batch * forward)):
        best = {}
        for _ in range(args.rounds):
            for code in codes:
                measured = one(code, what)
                best[code] = list(map(min, best.get(code, measured), measured))
        for code, (seconds, gigabytes) in best.items():
            print(f"{what:9} {code:7} {seconds:9.4f} s a step of {B}, {gigabytes:6.2f} GB, "
                  f"{B / seconds:9.2f} pictures/s, {work / seconds / peak:6.1%} of the peak")
            if "theirs" in best:
                seconds, gigabytes = seconds / best["theirs"][0], gigabytes / best["theirs"][1]
                print(f"{'':17} of theirs: time {seconds:.3f}, memory {gigabytes:.3f}")


if __name__ == "__main__":
    main()
