"""Time and memory of the released network: ours, and the authors' miro-t2i where it is installed.

    python tests/benchmark.py                      # this machine: CPU in fp32, or a GPU in bf16
    pip install --no-deps miro-t2i==0.1.4 && pip install einops      # then it runs beside ours

Random weights, the same in both codes. Each measurement is a process of its own, alternating, so
that neither code lives on the other's memory; ours sets what train.py sets (keep_freed_memory),
and "lean" is ours with --recompute, which leaves that to the C library.
A sampling step is both branches of guidance for `--pictures` pictures; a training step is the pass
of self-conditioning, for all samples, then forward and backward, and with --whole also clipping,
LAMB and EMA. Not collected by pytest.
"""
import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
import evaluate
import flow
import reference
import sample
import train
from model import PRESETS, Config, TextRIN

REWARDS = ("clip", "aesthetic", "image_reward", "pick", "hpsv2", "vqa", "sci")
TOKENS = 77


def network(device) -> TextRIN:
    """The released network with weights of a fixed seed."""
    torch.manual_seed(0)
    return TextRIN(Config(**PRESETS["paper"] | dict(rewards=REWARDS))).to(device)


def their_network(device) -> tuple:
    """miro-t2i's classes at the released size: network and preconditioning."""
    from miro.models.networks.rin import CADRINTextCond
    from miro.models.preconditioning import FlowPrecond
    torch.manual_seed(0)
    fixed = dict(use_cond_rin_block=True, concat_cond_token_to_latents=False,
                 use_self_conditioning=True, coherence_keys=list(reference.KEYS))
    return (CADRINTextCond(**reference.RELEASED, **fixed).to(device),
            FlowPrecond(num_latents=256, latents_dim=1024).to(device))


def given(B: int, device) -> dict:
    """Inputs of reference.py at the released size, all text tokens real."""
    tensors = reference.inputs(reference.RELEASED, len(REWARDS), B, TOKENS)
    tensors["text_mask"][:] = True
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def clock(step, times: int, device) -> tuple:
    """(seconds of the fastest call after a first one, peak GB while running)."""
    sync = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type,
                                                                              lambda: None)
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
    i, w = given(B, device), 7.0
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if code == "ours":
        train.keep_freed_memory()
        net = network(device).eval()

        def run(steps):
            with cast:
                flow.sample(net, i["eps"], i["s"], torch.zeros_like(i["s"]), i["text"],
                            i["text_mask"], w=w, steps=steps, solver="euler")
    else:
        from miro.models.sampler import flow_euler_sampler
        from miro.models.scheduler import LinearScheduler
        net, around = (part.eval() for part in their_network(device))
        names = [f"{key}_coherence" for key in reference.KEYS]

        @torch.no_grad()
        def run(steps):
            uncond = dict(text_tokens_embeddings=i["text"].clone(),
                          text_tokens_mask=i["text_mask"].clone())
            flow_euler_sampler(
                lambda b: around(net, b), reference.batch_of(i, reference.KEYS, i["eps"], None),
                num_steps=steps, cfg_rate=w, conditioning_keys=["text_tokens"],
                uncond_tokens=uncond, coherence_keys=names,
                scheduler=LinearScheduler(start=1, end=0, clip_min=1e-9),
                coherence_values=dict.fromkeys(names, 1.0),
                uncoherence_values=dict.fromkeys(names, 0.0), sampling_dtype=dtype)
    one, _ = clock(lambda: run(1), 1, device)
    many, peak = clock(lambda: run(1 + times), 1, device)
    return (many - one) / times, peak


def measure_training(code: str, B: int, times: int, device, dtype, args) -> tuple:
    """One training step of B samples, all self-conditioned."""
    recipe = train.read_args(["--preset", "paper", "--batch", str(B)])
    i, coin = given(B, device), torch.ones(B, dtype=torch.bool, device=device)
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if code != "theirs":
        net = network(device)
        if code == "lean":
            train.recompute(net)
        else:
            train.keep_freed_memory()
        model, parameters = torch.compile(net) if args.compile else net, list(net.parameters())

        def loss():
            return flow.loss(model, i["x_0"], i["eps"], i["t"], i["s"], i["text"], i["text_mask"],
                             coin)[1].mean()
        if args.whole:
            [optimizer] = train.optimizers_for(net, recipe)
    else:
        from miro.utils.optimizers import Lamb
        net, around = their_network(device)
        model = torch.compile(net) if args.compile else net
        parameters = [*net.parameters(), *around.parameters()]

        def loss():
            return reference.their_loss(model, around, i, reference.KEYS, coin).mean()
        if args.whole:
            optimizer = Lamb([dict(params=parameters, weight_decay=0.01, layer_adaptation=True)],
                             lr=1e-3, decouple=False)
    average = copy.deepcopy(net).requires_grad_(False) if args.whole else None

    def step():
        with cast:
            value = loss()
        value.backward()
        if args.whole:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1e-4)
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


def forward_flops() -> float:
    """Floating-point operations of one forward pass of one picture, 77 tokens (of ours in sampling
    4 % less is computed: text and reward tokens once a picture, not counted off here)."""
    return evaluate.forward_cost(Config(**PRESETS["paper"] | dict(rewards=REWARDS)), TOKENS)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1, help="of a sampling step")
    parser.add_argument("--batch", type=int, default=4, help="of a training step")
    parser.add_argument("--times", type=int, default=3, help="measured steps; the fastest counts")
    parser.add_argument("--rounds", type=int, default=1, help="of both codes, alternating")
    parser.add_argument("--compile", action="store_true", help="torch.compile in training")
    parser.add_argument("--whole", action="store_true", help="training with LAMB and EMA")
    parser.add_argument("--only", choices=("sampling", "training"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)      # one measurement, as JSON
    args = parser.parse_args()
    device = sample.best_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_float32_matmul_precision("highest")
    if args.one:
        code, what = args.one
        if what == "peak":
            found = (matrix_peak(device, dtype), 0)
        elif what == "sampling":
            found = measure_sampling(code, args.pictures, args.times, device, dtype)
        else:
            found = measure_training(code, args.batch, args.times, device, dtype, args)
        return print("found", json.dumps(found))

    def one(code: str, what: str) -> list:
        call = [sys.executable, __file__, "--one", code, what, "--pictures", str(args.pictures),
                "--batch", str(args.batch), "--times", str(args.times)]
        done = subprocess.run(call + ["--compile"] * args.compile + ["--whole"] * args.whole,
                              capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return json.loads(done.stdout.splitlines()[-1].removeprefix("found "))

    codes = dict(sampling=["ours"], training=["ours", "lean"])
    try:
        import miro.models.loss  # noqa: F401
        codes = {what: ["theirs", *ours] for what, ours in codes.items()}
    except ImportError:
        print("miro-t2i is not installed: ours alone")
    forward, peak = forward_flops(), one("ours", "peak")[0]
    print(f"{device}, {dtype}: {peak / 1e9:,.0f} GFLOP/s in the fastest matrix product; "
          f"{forward / 1e9:.1f} GFLOP a forward pass")
    for what, B, work in (("sampling", args.pictures, 2 * args.pictures * forward),
                          ("training", args.batch, 4 * args.batch * forward)):
        if args.only in (None, what):
            best = {}
            for _ in range(args.rounds):
                for code in codes[what]:
                    found = one(code, what)
                    best[code] = list(map(min, best.get(code, found), found))
            for code, (seconds, gigabytes) in best.items():
                print(f"{what:9} {code:7} {seconds:9.4f} s a step of {B}, {gigabytes:6.2f} GB, "
                      f"{B / seconds:9.2f} pictures/s, {work / seconds / peak:6.1%} of the peak")
            for code in codes[what][1:] if "theirs" in best else ():
                time_ratio, memory = (best[code][k] / best["theirs"][k] for k in (0, 1))
                print(f"{what:9} {code} / theirs: time {time_ratio:.3f}, memory {memory:.3f}")


if __name__ == "__main__":
    main()
