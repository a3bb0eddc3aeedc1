"""Every check that needs a GPU: one command of at most eight minutes on an H100.

    python tests/gpu.py --out gpu.json                   # all; at toy size where there is no CUDA
    python tests/gpu.py --only machine speed             # those that begin with these words
    python tests/gpu.py --one speed sampling ours        # one, at full size, also on a CPU
    pip install --no-deps miro-t2i==0.1.4 && pip install einops      # then it is measured, too

A check is a process of its own and prints lines of JSON, one with "error" if it fails or hangs.
Data and weights are random. tflops: the arithmetic of a step over its time; of_peak: its share of
the fastest matrix product's; gb: the most memory at once.
"""
import argparse
import hashlib
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import data
import evaluate
import flow
import model
import reference
import rewards
import scale
import shapes
import small
import train

DEVICE = data.best_device()
DTYPE = data.precision("auto", DEVICE)
CAST = torch.autocast(DEVICE.type, DTYPE, enabled=DTYPE != torch.float32)
CUDA = DEVICE.type == "cuda"
SMALL = ("--latents 8 --latent-dim 64 --data-dim 32 --blocks 1 --layers 1 --batch 16 --val 8 "
         "--warmup 2 --workers 2").split()
ROWS = (200, 2, 8, 32, (2, 6))             # of scale.write_rows: small latents


def now() -> float:
    """The time, once the device has done all that it was given."""
    getattr(torch, DEVICE.type).synchronize()
    return time.perf_counter()


def clock(step, times: int) -> float:
    """Seconds of the fastest call after two first ones."""
    spent = []
    for _ in range(2 + times):
        began = now()
        step()
        spent.append(now() - began)
    return min(spent[2:])


def machine(toy: bool):
    """What this runs on, and the TFLOP/s of the fastest square matrix product."""
    best = 0.0
    for n in (512, 1024) if toy else (4096, 8192, 16384) if CUDA else (1024, 2048, 4096):
        a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
        best = max(best, 2e-12 * n ** 3 / clock(lambda: a @ b, 10))
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], text=True,
                            capture_output=True).stdout.strip()
    yield dict(device=torch.cuda.get_device_name() if CUDA else "CPU", dtype=str(DTYPE), toy=toy,
               torch=torch.__version__, commit=commit, tflops=best)


def speed(toy: bool, what: str, code: str):
    """At some batch sizes, a step of training, with the pass of self-conditioning for all and
    without the optimizer, or of guided Euler sampling: runs of more steps less those of one, as
    neither code is to pay for what a picture costs once; its images/s are those of 50 steps.
    code: theirs, ours, or ours compiled as train.py does."""
    w, more, times = 7.0, 20 if CUDA else 3, 8 if CUDA else 3
    size, tokens = (reference.SMALL, 9) if toy else (reference.RELEASED, 77)
    there = reference.config_of(size, reference.KEYS)
    config = model.release_config(there)
    if code != "theirs":
        train.keep_freed_memory()                            # as train.py's main does
    with torch.device("cpu" if code == "theirs" else DEVICE):       # theirs was made for no other
        parts = reference.parts_of(there).values() if code == "theirs" else [model.build(config)]
    net, *around = [part.to(DEVICE).train(what == "training") for part in parts]
    if code == "compiled":
        net.compile(backend="eager" if toy else "inductor")
    batches = (1, 16) if what == "sampling" else (128,) if code == "compiled" else (64, 128)
    for B in (2,) if toy else batches:
        i = reference.inputs(size, len(reference.KEYS), B, tokens)
        i["text_mask"][:] = True                             # no padding
        i, coin = {name: tensor.to(DEVICE) for name, tensor in i.items()}, torch.ones(B).bool()
        x_0, eps, t, s, text, text_mask, _ = i.values()

        def training():
            with CAST:
                loss = (reference.their_loss(net, *around, i, reference.KEYS, coin.to(DEVICE))
                        if around else flow.loss(net, x_0, eps, t, s, text, text_mask, coin)[1])
            loss.mean().backward()
            for part in (net, *around):
                part.zero_grad()

        def sampling(steps: int):
            if around:
                reference.their_sampler(net, *around, i, reference.KEYS, text, steps, w, DTYPE)
            else:
                with CAST:
                    flow.sample(net, eps, flow.branches(s, 0 * s, text, text_mask, w), steps)

        if what == "training":
            seconds, passes, images = clock(training, times), 4, B
        else:
            seconds = clock(lambda: sampling(1 + more), 2) - clock(lambda: sampling(1), 2)
            seconds, passes, images = seconds / more, 2, B / 50
        work = passes * B * evaluate.forward_cost(config, tokens)[1]
        yield dict(batch=B, step=seconds, tflops=1e-12 * work / seconds,
                   images_per_second=images / seconds)


def opened(rows: str, *flags) -> tuple:
    """What train.py's main has before its loop: args, batches and the state of its network."""
    args, network = train.read_args([*flags, "--data", rows, "--out", "run"])
    found, bins = train.prepare(args, network, 0)
    encoder = train.encoder_for(args, found)
    config = train.describe(args, network, found, bins, encoder)
    torch.manual_seed(args.seed)
    net = model.build(config["network"]).to(DEVICE)
    batches = train.Batches(args, config, found, bins, encoder)
    return args, batches, train.start(net, args, config, 1)


def precision(toy: bool):
    """The mean loss of the last 50 of 200 steps in bf16 and fp32: pictures, and small latents."""
    steps, same = 12 if toy else 200, ["--no-compile"]
    for preset in ("shapes", "paper"):
        if preset == "shapes":
            shapes.write_world("shapes", 10 * steps, seed=0)
        else:
            scale.write_rows("paper", *ROWS)
        same += SMALL if toy or preset == "paper" else []
        found = {}
        for name in ("bf16", "fp32"):
            args, batches, state = opened(preset, "--preset", preset, "--steps", str(steps), *same)
            losses = [train.train_step(state, args, step, train.on_device(batches[step], DEVICE), 1,
                                       data.precision(name, DEVICE))[0] for step in range(steps)]
            found[name] = float(torch.cat(losses[-steps // 4:]).mean())
        yield dict(preset=preset) | found | dict(ratio=found["bf16"] / found["fp32"])


def ranks(toy: bool):
    """How far DDP's gradient of two micro-batches, by a group of one rank, is from the plain one:
    over NCCL, on a CPU over gloo."""
    scale.write_rows("rows", *ROWS)
    args, batches, plain = opened("rows", "--preset", "paper", *SMALL, "--accumulate", "2",
                                  "--clip", "1e9", "--no-compile")
    kind, gradients = "cpu:gloo,cuda:nccl" if CUDA else "gloo", []
    dist.init_process_group(kind, init_method=f"file://{Path.cwd()}/store", rank=0, world_size=1)
    shared = train.start(plain.net, args, plain.config, 2)              # as of two ranks: with DDP
    for state, n in ((plain, 1), (shared, 2)):
        state.optimizers = []                                # the gradient stays
        train.train_step(state, args, 0, train.on_device(batches[0], DEVICE), n, torch.float32)
        gradients.append(torch.cat([p.grad.flatten() for p in plain.net.parameters()]))
        plain.net.zero_grad()
    apart = reference.apart(*gradients)
    assert train.agreed([15], 2) == 15 and apart < 1e-4, f"the gradients are {apart:.1e} apart"
    dist.destroy_process_group()
    yield dict(backend=kind, model=type(shared.model).__name__, apart=apart)


def resume(toy: bool):
    """How far weights of three and three more steps are from those of six; anew: six once more.
    Without keys' biases, whose gradient is rounding."""
    shapes.write_world("rows", 200, seed=0)
    flags = ["--data", "rows", "--steps", "6", "--save-every", "3", "--self-condition", "0.5",
             *(SMALL if toy else []), "--no-compile", "--out"]
    train.main([*flags, "six"])
    shutil.copytree("six", "resumed")
    Path("resumed/state-00000006.pt").unlink()
    train.main([*flags, "resumed"])
    train.main([*flags, "anew"])
    assert '{"resume": 3}' in Path("resumed/log.jsonl").read_text()
    six, *others = (train.load_checkpoint(Path(name))["net"] for name in ("six", "resumed", "anew"))
    apart = [max(reference.apart(net[name], w) for name, w in six.items()
                 if w.any() and not name.endswith("k_norm.bias")) for net in others]
    yield dict(zip(("resumed", "anew"), apart))


def loop(toy: bool):
    """Images/s of whole steps, as train.py does them, on arrays of the paper's sizes, by the
    loader's batches and by one that is there; from both the share of the time that the device
    waits."""
    steps, first = (12, 6) if toy else (28, 14)              # before, workers are ahead
    scale.write_rows("rows", *(ROWS if toy else (2000, 4, 32, 2048, (8, 60))))
    args, batches, state = opened(
        "rows", "--preset", "paper", "--batch", "128", "--workers", "8", "--steps", str(steps),
        *(SMALL if toy else []))

    def rate(feed) -> float:
        for step, batch in enumerate(feed):
            if step == first:
                began = now()
            train.train_step(state, args, step, train.on_device(batch, DEVICE), 1, DTYPE)
        return (steps - first) * args.batch / (now() - began)

    there, fed = rate([train.on_device(batches[0], DEVICE)] * steps), rate(batches.loader(0))
    yield dict(images_per_second=fed, one_batch=there, waits=max(0.0, 1 - fed / there),
               compiled=args.compile)


def full_clip(folder: Path, kind: type, **_) -> torch.nn.Module:
    """In the place of rewards.pretrained: OpenAI's ViT-L/14 or the others' ViT-H/14, random."""
    from transformers import CLIPConfig
    width, activation, *towers = (
        (768, "quick_gelu", (768, 12, 12), (1024, 24, 16)) if folder.parent.name == "openai" else
        (1024, "gelu", (1024, 24, 16), (1280, 32, 16)))
    text, vision = (dict(hidden_size=D, intermediate_size=4 * D, num_hidden_layers=layers,
                         num_attention_heads=heads, projection_dim=width, hidden_act=activation)
                    for D, layers, heads in towers)
    vision |= dict(patch_size=14)
    return kind(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)).eval()


@torch.no_grad()
def networks(toy: bool):
    """Pairs/s of the rewards' networks but vqa, of 11 B parameters: random weights, pictures as
    they see them, captions of 60 words, in the tokens of the tests' small tokenizers."""
    import test_networks
    small.write_all(Path("models"))
    if toy:
        small.shrink()
    else:
        rewards.pretrained, rewards.fill = full_clip, lambda net, *_: net.eval()
        rewards.Aesthetic.SHA256 = hashlib.sha256(test_networks.head_file()).hexdigest()
    for name in [name for name in rewards.PAPER if name != "vqa"]:
        kind, B = rewards.NETWORKS[name], 2 if toy else 128 if CUDA else 32
        with torch.device(DEVICE):
            net = kind([Path("models", source) for source, _ in kind.SOURCES], DEVICE, DTYPE)
        pixels = torch.randint(0, 256, (B, 3, kind.VIEW[1], kind.VIEW[1])).byte().to(DEVICE)
        torch.backends.mha.set_fastpath_enabled(False)       # whose kernels are not counted
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            assert net.judge(net.see(pixels), [60 * "a "] * B).isfinite().all()
        torch.backends.mha.set_fastpath_enabled(True)
        step = clock(lambda: net.judge(net.see(pixels), [60 * "a "] * B), 5)
        yield dict(reward=name, step=step, tflops=1e-12 * counter.get_total_flops() / step,
                   batch=B, pairs_per_second=B / step)


CHECKS = {one.__name__: one for one in (machine, speed, precision, ranks, resume, loop, networks)}


def plan() -> list[str]:
    """All checks, as --one takes them."""
    codes = ("theirs", "ours") if importlib.util.find_spec("miro") else ("ours",)
    return ["machine", *(f"speed training {code}" for code in (*codes, "compiled")),
            *(f"speed sampling {code}" for code in codes), "loop", "networks", "precision", "ranks",
            "resume"]


def lines_of(check: str, toy: bool, seconds: float) -> list[dict]:
    """What a check finds in a process of its own, and the last line of why it fails."""
    command, began = [sys.executable, __file__, *["--toy"] * toy, "--one"], time.time()
    try:
        done, error = subprocess.run([*command, *check.split()], capture_output=True, text=True,
                                     timeout=seconds), {}
        out = done.stdout
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr, flush=True)
            error = dict(error=[f"code {done.returncode}", *done.stderr.strip().splitlines()][-1])
    except subprocess.TimeoutExpired as late:
        out = (late.stdout or b"").decode()
        error = dict(error=f"not done in the {seconds:.0f} s that were left for it")
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    found += [error] if error else []
    found[-1]["seconds"] = time.time() - began
    return [dict(check=check) | line for line in found]


def main():
    """All checks, one after the other, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="file of JSON, with all lines")
    parser.add_argument("--toy", action="store_true", help="at toy size")
    parser.add_argument("--only", nargs="+", default=[""], help="checks that begin with these")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args, lines, peak, end = parser.parse_args(), [], None, time.time() + 8 * 60
    if args.one:
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            torch.manual_seed(0)
            for found in CHECKS[args.one[0]](args.toy, *args.one[1:]):
                memory = (torch.cuda.max_memory_allocated() if CUDA else
                          1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
                print(json.dumps(found | dict(gb=memory / 1e9)), flush=True)
                if CUDA:
                    torch.cuda.reset_peak_memory_stats()
        return
    toy = args.toy or not CUDA
    for check in [check for check in plan() if check.startswith(tuple(args.only))]:
        for line in lines_of(check, toy, max(0, min(200, end - time.time()))):
            peak = line.get("tflops") if check == "machine" else peak
            if peak and "tflops" in line:
                line["of_peak"] = line["tflops"] / peak
            lines.append({k: float(f"{x:.4g}") if type(x) is float else x for k, x in line.items()})
            print(json.dumps(lines[-1]), flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
