"""Sample with reward targets: ask for the levels you want, 0 (worst bin) to 1 (best bin).

    python sample.py --prompt "a red circle and a blue square" --targets all=1 colorfulness=0.3
    python sample.py --prompt "two green triangles" --sweep contrast=0:1:5 --n 4
    python sample.py --prompts prompts.txt --best-of 8 --by alignment --out pictures/

The noise of picture i of a prompt comes from --seed + i alone (best of N: --seed + i N + candidate)
and is drawn on the CPU: batch and device change no more than rounding.
"""
import argparse
import json
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import binning
import flow
from data import (PRECISIONS, T5, VAE, Words, best_device, encoder_of, first_line, pad,
                  precision)
from model import (RELEASE_REWARDS, Config, TextRIN, release_config, release_config_of,
                   release_name)
from rewards import ANALYTIC, default_rewards, score_all


SAMPLERS = {                                            # config.json carries its preset's
    "shapes": dict(guidance=0.5, steps=16, solver="ab2", shift=3.0),
    "paper": dict(guidance=7.0, steps=50, solver="euler", shift=1.0),            # the release's
}

# What the embedded world's checkpoints are asked for where nothing else is said, found by trial:
# its most colourful pictures are confetti. Others are asked for all=1, as in the paper.
WORLD_TARGETS = ["all=0.75", "alignment=1"]
SHIPPED = Path(__file__).parent / "assets" / "shapes"      # a checkpoint of the embedded world


@dataclass
class Model:
    """A network with all that sampling needs: what is in a checkpoint folder."""
    net: TextRIN
    config: dict
    encoder: Words | T5
    bins: binning.Bins | None        # None: trained without rewards, or the release's
    device: torch.device
    vae: VAE | None = None           # of checkpoints that make latents
    empty: torch.Tensor | None = None   # (L, D): the states of "" that the release saved
    precision: str = "auto"          # of the network's matrix products: see data.precision

    @property
    def rewards(self) -> tuple:
        """The names of the columns of s, in the order of training."""
        return tuple(self.config["network"]["rewards"])


def find(checkpoint: str, variant: str | None) -> Path:
    """A folder stays itself; OWNER/NAME is a repository of the hub. FileNotFoundError: neither."""
    folder = Path(checkpoint, variant or "")
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", checkpoint) or \
            checkpoint.startswith("runs/"):
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    try:
        for name in ("model.safetensors", "config.json", "uncond_embedding.npy"):
            try:
                path = hf_hub_download(checkpoint, name, subfolder=variant)
            except EntryNotFoundError:
                if name != "uncond_embedding.npy":          # ours have none
                    raise
    except (OSError, ValueError, EntryNotFoundError) as error:       # HTTP errors are OSErrors there
        raise FileNotFoundError(f"{folder}: there is no such folder, and the hub does not give it "
                                f"({first_line(error)}): name a checkpoint") from error
    return Path(path).parent


def read_release(folder: Path, config: dict, weights: dict) -> tuple:
    """A folder in the release's layout → (config as train.py writes it, weights by our names, the
    states (L, E) of the empty caption or None). ValueError names what does not fit.

    Pixel norms are those of the VAE's latents there: z = x_0 * std + mean."""
    shift = config.get("scheduler", {}).get("shift", 1)
    if shift != 1:
        raise ValueError(f"its scheduler.shift is {shift}, and only 1 is known here")
    network = release_config(config)
    with torch.device("meta"):
        names = {release_name(net, name): name for net in [TextRIN(network)]
                 for name in net.state_dict()}
    scale, bias = (weights.pop(f"postprocessing.{name}").flatten() for name in ("scale", "bias"))
    for name in [name for name in weights if name not in names]:
        constant = name.startswith(("data_preprocessing.", "postprocessing."))     # scale, bias
        if constant or weights[name].dtype == torch.bool and weights[name].all():  # masks of ones
            del weights[name]
    empty, file = None, folder / "uncond_embedding.npy"
    if file.exists():
        try:
            values = np.load(file, allow_pickle=False).astype(np.float32)
            empty = torch.from_numpy(values.reshape(-1, network.text_dim))       # (L, E)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file} has no states of width {network.text_dim}: copy it again") \
                from error
    there = config.get("sampler_defaults", {})
    sampler = SAMPLERS["paper"] | {here: there[name] for here, name in (
        ("guidance", "guidance_scale"), ("steps", "num_inference_steps")) if name in there}
    text = dict(kind="t5", source=config.get("text_encoder_repo", T5.SOURCE),
                dim=network.text_dim, length=config.get("max_text_len", 77))
    config = dict(format=1, network=asdict(network), mean=(-bias / scale).tolist(),
                  std=(1 / scale).tolist(), text_encoder=text, bins=None, score_std={}, prompts=[],
                  vae=config.get("vae_repo", VAE.SOURCE), sampler=sampler)
    return config, {names.get(name, name): tensor for name, tensor in weights.items()}, empty


def write_release(model: Model, folder: Path) -> None:
    """The inverse of read_release: a folder that MiroPipeline of miro-t2i loads, too.

    ValueError: the model makes no VAE latents from T5 states, or the folder is there."""
    if model.vae is None or not isinstance(model.encoder, T5):
        raise ValueError("--export writes networks of VAE latents and T5 states, and this one was "
                         "trained on pixels or words")
    if folder.exists() or not model.rewards:
        raise ValueError(f"--export {folder} is there already: name a new folder" if model.rewards
                         else "--export: the release's layout has at least one reward, this none")
    net, c = model.net, model.net.config
    weights = {release_name(net, name): tensor.contiguous().cpu()
               for name, tensor in net.state_dict().items()}
    for name, width in (("cond_mask", 1), ("registers_coherence_mask", 0)):
        weights[f"network.{name}"] = torch.ones(width + len(c.rewards) + c.registers) > 0
    layers = {name.split(".attention.")[0] for name in net.state_dict() if ".attention." in name}
    for layer in layers:
        name = release_name(net, layer + ".attention").rpartition(".")[0]
        weights[f"{name}.attention_mask_dummy"] = torch.ones(1, 1) > 0
    mean, std = (torch.tensor(model.config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    for name in ("data_preprocessing", "postprocessing"):
        weights |= {f"{name}.scale": 1 / std, f"{name}.bias": -mean / std}
    sampler, per_channel = model.config["sampler"], {"channel_wise_normalisation": True}
    there = release_config_of(c) | dict(
        data_preprocessing=per_channel, postprocessing=per_channel, data_resolution=c.size,
        img_resolution=8 * c.size, max_text_len=model.encoder.length, vae_repo=model.vae.source,
        text_encoder_repo=model.encoder.source, sampler_defaults=dict(
            num_inference_steps=sampler["steps"], guidance_scale=sampler["guidance"]))
    empty = model.empty if model.empty is not None else model.encoder.states([""])[0]     # (L, E)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(weights, temporary / "model.safetensors")
    np.save(temporary / "uncond_embedding.npy", empty.numpy())
    (temporary / "config.json").write_text(json.dumps(there, indent=1))
    temporary.rename(folder)


def load(folder, device: torch.device) -> Model:
    """Read config.json and model.safetensors, ours or the release's, strictly.

    ValueError names the file and the fault, or the tensor."""
    folder, empty = Path(folder), None
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    for file in (config_file, weights_file):
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist: train with python train.py, or name a "
                                    "folder that has a checkpoint")
    try:
        weights = load_file(weights_file)
    except SafetensorError as error:
        raise ValueError(f"{weights_file} cannot be read ({error}): copy or train it again") \
            from error
    try:
        config = json.loads(config_file.read_text())
        if "coherence_keys" in config.get("network", {}):
            config, weights, empty = read_release(folder, config, weights)
        if config["format"] != 1:
            raise ValueError(f"its format is {config['format']}, not 1")
        missing = {"mean", "std", "sampler", "prompts", "score_std"} - set(config)
        missing |= SAMPLERS["paper"].keys() - config.get("sampler", {}).keys()
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        if {len(config["mean"]), len(config["std"])} != {config["network"]["channels"]}:
            raise ValueError("mean and std have one number a channel")
        net = TextRIN(Config(**config["network"]))
        encoder = encoder_of(config["text_encoder"])
        bins = binning.Bins.from_config(config["bins"]) if config["bins"] else None
    # A hand-edited configuration fails in whatever part of the network it describes wrongly.
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError,
            RuntimeError) as error:
        raise ValueError(f"{config_file} is not the configuration of a checkpoint "
                         f"({type(error).__name__}: {error}): copy or train it again") from error
    expected = net.state_dict()
    wrong = [name for name in expected.keys() | weights.keys()
             if name not in weights or name not in expected
             or weights[name].shape != expected[name].shape]
    if wrong:
        raise ValueError(f"{weights_file} does not fit {config_file}: {len(wrong)} tensors are "
                         f"missing, unknown or of another shape, such as {sorted(wrong)[0]}")
    net.load_state_dict(weights)
    vae = VAE(config["vae"]) if config.get("vae") else None
    return Model(net.to(device).eval(), config, encoder, bins, device, vae, empty)


def set_sources(model: Model, checkpoint: str, text_encoder: str | None, vae: str | None) -> None:
    """--text-encoder and --vae: where the encoders are, if not where the checkpoint says.

    ValueError: it was trained without."""
    for flag, source, part in (("--text-encoder", text_encoder, model.encoder),
                               ("--vae", vae, model.vae)):
        if source:
            if not isinstance(part, (T5, VAE)):
                raise ValueError(f"{flag}: {checkpoint} was trained without one")
            part.source = source


def noise(seeds: list, shape: tuple) -> torch.Tensor:
    """N(0, 1) for each seed from a generator of its own, on the CPU: (B, *shape)."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds])


def generate(model: Model, prompts: list, s_pos: torch.Tensor, s_neg: torch.Tensor, seeds: list,
             guidance=None, steps=None, solver=None, interval=(0.0, 1.0), negative_prompt=None,
             batch=64, progress=None, shift=None) -> torch.Tensor:
    """Pictures of prompts (B), at levels s_pos, s_neg (B, R), from noise of seeds (B).

    guidance, steps, solver, shift: None takes the checkpoint's own. negative_prompt: the caption
    of the negative branch, None = the same caption (the paper's equation 5), "" = the release's
    choice. Returns uint8 (B, 3, S, S) on the CPU, of latents (B, 3, 8 S, 8 S). ValueError: the
    network gives numbers that are not finite, which would be black pictures.
    """
    c, defaults = model.config["network"], model.config["sampler"]
    eps = noise(seeds, (c["channels"], c["size"], c["size"]))                    # (B, C, S, S)
    if isinstance(model.encoder, T5):                     # which reads all at once, and remembers
        model.encoder.device = model.device
        saved = negative_prompt is None or negative_prompt == "" and model.empty is not None
        model.encoder.states(prompts if saved else [*prompts, negative_prompt])
    asked = dict(guidance=guidance, steps=steps, solver=solver, shift=shift)
    chosen = defaults | {key: value for key, value in asked.items() if value is not None}
    w = chosen.pop("guidance")
    dtype = precision(model.precision, model.device)
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        x = []
        for part in (slice(i, i + batch) for i in range(0, len(prompts), batch)):
            positive, negative = captions(model, prompts[part], negative_prompt)
            tensors = (eps[part], s_pos[part], s_neg[part], *positive, *negative)
            x.append(flow.sample(model.net, *(a.to(model.device) for a in tensors), w=w,
                                 interval=interval, progress=progress, **chosen).cpu())
    mean, std = (torch.tensor(model.config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    x = torch.cat(x) * std + mean                                                # (B, C, S, S)
    if not x.isfinite().all():
        raise ValueError("the network's pictures are not finite numbers: lower --guidance, pass "
                         "--precision fp32, or take an earlier checkpoint")
    if model.vae is not None:
        model.vae.move(model.device)
        return model.vae.decode(x)                                               # (B, 3, 8 S, 8 S)
    return x.round().clamp(0, 255).to(torch.uint8)


def captions(model: Model, prompts: list, negative_prompt: str | None) -> tuple:
    """Text (B, L, E) and mask (B, L) of both branches, padded to one length; the encoder's memory
    is free again afterwards."""
    model.encoder.device = model.device
    positive = model.encoder.encode(prompts)                                     # (B, L, E), (B, L)
    negative = positive
    if negative_prompt == "" and model.empty is not None:        # the states that the release saved
        negative = pad([model.empty] * len(prompts))                             # (B, L', E)
    elif negative_prompt is not None:
        negative = model.encoder.encode([negative_prompt] * len(prompts))        # (B, L', E)
    model.encoder.free()
    longest = max(positive[0].shape[1], negative[0].shape[1])
    return tuple((F.pad(text, (0, 0, 0, longest - text.shape[1])),
                  F.pad(mask, (0, longest - mask.shape[1]))) for text, mask in (positive, negative))


def flops(model: Model) -> tuple:
    """Floating-point operations (2 for each multiply-add) of one picture and branch: what is
    computed once, and one forward pass beside it."""
    c, length = model.config["network"], model.encoder.length
    with torch.device("meta"):
        net = TextRIN(model.net.config)
        asked = (torch.ones(1, len(model.rewards)), torch.zeros(1, length, c["text_dim"]),
                 torch.ones(1, length, dtype=torch.bool))
        x_t, t = torch.empty(1, c["channels"], c["size"], c["size"]), torch.ones(1)
    with torch.no_grad(), FlopCounterMode(display=False) as once:
        known = net.condition(*asked)
    with torch.no_grad(), FlopCounterMode(display=False) as each:
        net(x_t, t, *asked, None, known)
    return once.get_total_flops(), each.get_total_flops()


# ----------------------------------------------------------------------------------------- targets

def read_targets(entries, rewards: tuple, default: float, flag: str) -> list:
    """["all=1", "contrast=0.3"] or {"contrast": 0.3} → R levels in the order of the columns.

    ValueError, with what is valid: an unknown reward, or a level outside [0, 1]."""
    levels, aliases = dict.fromkeys(rewards, default), {v: k for k, v in RELEASE_REWARDS.items()}
    pairs = (entries.items() if isinstance(entries, dict)
             else [entry.partition("=")[::2] for entry in entries])          # later ones override
    for name, text in pairs:
        name = aliases.get(name, name)                                    # the release's names, too
        try:
            value = float(text)
        except (TypeError, ValueError):
            value = float("nan")
        if not 0 <= value <= 1:
            raise ValueError(f"{flag} {name}={text}: a level is a number from 0 (worst) to 1")
        if name != "all" and name not in levels:
            known = ", ".join(rewards) or "none, it was trained without rewards"
            raise ValueError(f"{flag} {name}={text}: no such reward in this checkpoint; it knows "
                             f"all, {known}")
        levels.update({name: value} if name != "all" else dict.fromkeys(rewards, value))
    return list(levels.values())


def read_prompts(path: str) -> list:
    """Lines of text, or of JSON (prompt; targets, negative, seed if wanted) → list of dict."""
    kinds, jobs = {"prompt": str, "targets": dict, "negative": dict, "seed": int}, []
    if not Path(path).exists() or Path(path).is_dir():
        raise FileNotFoundError(f"--prompts {path}: there is no such file")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path} is not text in UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        job = {"prompt": line.strip()}
        if line.lstrip().startswith("{"):
            try:
                job = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        wrong = [key for key, value in job.items() if type(value) is not kinds.get(key)]
        if wrong or "prompt" not in job or not 0 <= job.get("seed", 0) < 2 ** 62:
            raise ValueError(f"{path}, line {number} needs a text prompt, and may have targets and "
                             f"negative (reward: level) and a seed (0 or more): see "
                             f"{', '.join(wrong) or line}")
        jobs.append(job)
    if not jobs:
        raise ValueError(f"{path} has no prompt: write one a line")
    return jobs


def read_sweep(text: str) -> tuple:
    """"contrast=0:1:5" → ("contrast", [0.0, 0.25, 0.5, 0.75, 1.0])."""
    name, _, values = text.partition("=")
    try:
        first, last, count = values.split(":")
        levels = [round(v, 4) for v in np.linspace(float(first), float(last), int(count)).tolist()]
    except ValueError:
        levels = []
    if not name or not levels:
        raise ValueError(f"--sweep {text}: write reward=first:last:count, such as contrast=0:1:5")
    return name, levels


# ---------------------------------------------------------------------------------------- pictures

def measurable(model: Model, prompts: list) -> tuple:
    """The rewards that can be measured on pictures of all these prompts."""
    suited = [default_rewards([prompt]) for prompt in set(prompts)]
    return tuple(name for name in (ANALYTIC if model.bins is None else model.rewards)
                 if all(name in names for names in suited))


def measure(model: Model, pictures: torch.Tensor, prompts: list) -> tuple:
    """Measure generated pictures anew: two lists of {reward: value}, levels and raw scores (twice
    raw without bins)."""
    names = measurable(model, prompts)
    raw = score_all(names, pictures, prompts).numpy()                            # (B, R')
    levels = raw if model.bins is None else model.bins.select(names).to_target(raw)
    return tuple([dict(zip(names, map(float, row))) for row in a] for a in (levels, raw))


def tile(picture: torch.Tensor, lines: list, scale: int) -> Image.Image:
    """A picture (3, S, S), enlarged without smoothing, over lines of text."""
    S, row = picture.shape[-1] * scale, 13
    image = Image.new("RGB", (S, S + row * len(lines) + 4), "white")
    large = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((S, S), Image.NEAREST)
    image.paste(large)
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((2, S + 2 + row * i), line, "black", ImageFont.load_default(11))
    return image


def grid(rows: list, headings: list | None = None, labels: list | None = None) -> Image.Image:
    """Rows of tiles, with a heading over each column and a label over each row, if given."""
    width = max(t.width for row in rows for t in row)
    height = max(t.height for row in rows for t in row)
    gap, top, over = 4, 18 if headings else 0, 18 if labels else 0
    columns = max(len(row) for row in rows)
    font = ImageFont.load_default(12)
    wide = max([columns * (width + gap), *(int(font.getlength(text)) + 6 for text in labels or [])])
    image = Image.new("RGB", (wide, top + len(rows) * (height + gap + over)), "white")
    draw = ImageDraw.Draw(image)
    for j, heading in enumerate(headings or []):
        draw.text((j * (width + gap) + 2, 2), heading, "black", font)
    for i, row in enumerate(rows):
        y = top + i * (height + gap + over)
        if labels:
            draw.text((2, y + 2), labels[i], "black", font)
        for j, t in enumerate(row):
            image.paste(t, (j * (width + gap), y + over))
    return image


def progress_grid(model: Model) -> Image.Image:
    """The picture of training: fixed noise, rows prompts, columns all targets from 0 to 1."""
    prompts, R = model.config["prompts"], len(model.rewards)
    levels = [0.0, 0.25, 0.5, 0.75, 1.0] if R else [1.0]
    many = [prompt for prompt in prompts for _ in levels]
    s = torch.tensor([[level] * R for _ in prompts for level in levels]).view(len(many), R)
    seeds = [i for i in range(len(prompts)) for _ in levels]
    pictures = generate(model, many, s, torch.zeros_like(s), seeds)
    scale = max(1, 96 // pictures.shape[-1])
    rows = [[tile(pictures[i * len(levels) + j], [], scale) for j in range(len(levels))]
            for i in range(len(prompts))]
    return grid(rows, [f"all={level:g}" for level in levels] if R else None, prompts)


# --------------------------------------------------------------------------------- the command line

def plan(args, model: Model) -> list:
    """The pictures to make: a list of dict(prompt, s_pos, s_neg, seed, row, heading)."""
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("name one of --prompt TEXT and --prompts FILE")
    jobs = [{"prompt": args.prompt}] if args.prompts is None else read_prompts(args.prompts)
    name, values = read_sweep(args.sweep) if args.sweep else (None, [None])
    if name:
        read_targets([f"{name}={v}" for v in values], model.rewards, 1.0, "--sweep")
    names = measurable(model, [job["prompt"] for job in jobs])
    if args.best_of > 1 and args.by not in names:
        raise ValueError(f"--best-of needs --by one of {', '.join(names)}, not {args.by}" if names
                         else "--best-of: only analytic rewards are measured here, and this "
                              "checkpoint knows none of them")
    made = []
    for number, job in enumerate(jobs):
        s_pos = [*model.config.get("targets", []), *args.targets,            # later ones override
                 *(f"{k}={v}" for k, v in job.get("targets", {}).items())]
        s_neg = args.negative + [f"{k}={v}" for k, v in job.get("negative", {}).items()]
        first = job.get("seed", args.seed)
        where = "--" if args.prompts is None else f"{args.prompts}, {job['prompt']!r}: "
        for i in range(args.n):
            for value in values:
                wanted = s_pos + ([f"{name}={value}"] if name else [])
                for candidate in range(args.best_of):
                    made.append(dict(
                        prompt=job["prompt"], row=(number, i) if name else number,
                        seed=first + i * args.best_of + candidate,
                        heading=f"{name}={value:g}" if name else None,
                        s_pos=read_targets(wanted, model.rewards, 1.0, where + "targets"),
                        s_neg=read_targets(s_neg, model.rewards, 0.0, where + "negative")))
    return made


def best(made: list, count: int, by: str | None) -> list:
    """Of each `count` candidates in a row the one with the highest measured `by`."""
    if count == 1:
        return made
    return [max(made[i:i + count], key=lambda job: job["raw"][by])     # levels tie in the top bin
            for i in range(0, len(made), count)]


def save(made: list, pictures: dict, args, model: Model, settings: dict) -> None:
    """One figure of tiles (--out NAME.png), or one plain picture a file (--out FOLDER)."""
    out = Path(args.out)
    if out.suffix.lower() == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = {}
        for job in made:
            asked = dict(zip(model.rewards, job["s_pos"]))
            lines = [f"{name[:5]} {asked[name]:.2f} > {value:.2f}" if name in asked
                     else f"{name[:8]} {value:.2f}" for name, value in job["measured"].items()]
            rows.setdefault(job["row"], []).append(
                tile(pictures[id(job)], [f"seed {job['seed']}", *lines], args.scale))
        labels = [next(job["prompt"] for job in made if job["row"] == row) for row in rows]
        headings = [job["heading"] for job in made[:max(map(len, rows.values()))]]
        figure = grid(list(rows.values()), headings if args.sweep else None, labels)
        write_png(figure, out, settings | {"pictures": made})
        shown = ": each tile has the level asked for > the level measured" * (
            model.bins is not None and bool(made[0]["measured"]))
        print(f"wrote {out}{shown}")
        return
    out.mkdir(parents=True, exist_ok=True)
    for i, job in enumerate(made):
        image = Image.fromarray(pictures[id(job)].permute(1, 2, 0).numpy())
        write_png(image, out / f"{i:05d}.png", settings | {"pictures": [job]})
    print(f"wrote {len(made)} pictures to {out}/")


def write_png(image: Image.Image, path: Path, settings: dict) -> None:
    """Save with the settings as JSON in the PNG's text chunk "miro", whole or not at all."""
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("miro", json.dumps(settings))
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, "png", pnginfo=chunk)
    temporary.replace(path)


def read_command(argv=None):
    """The flags, checked. ValueError: one is out of its range, or --out cannot be written to."""
    parser = argparse.ArgumentParser(description="sample pictures with reward targets")
    add = parser.add_argument
    add("--checkpoint", help="folder of train.py or of the release, or a hub repository such as "
        "nicolas-dufour/miro; default: runs/shapes, or before it is trained the one in assets/")
    add("--variant", help="subfolder of the checkpoint, such as miro-only-clip")
    add("--text-encoder", help="folder or hub id of a T5; default: the checkpoint's")
    add("--vae", help="folder or hub id of an AutoencoderKL; default: the checkpoint's")
    add("--export", metavar="FOLDER", help="write the checkpoint in the release's layout, and stop")
    add("--prompt", help="one prompt")
    add("--prompts", help="file: prompts, or JSON with prompt, targets, negative, seed, one a line")
    add("--targets", nargs="+", default=[], metavar="REWARD=LEVEL",
        help="laid over the checkpoint's own; the rest is asked for at 1")
    add("--negative", nargs="+", default=[], metavar="REWARD=LEVEL", help="default all=0")
    add("--negative-prompt", help="caption of the negative branch; default: the same caption "
        '("" is the release\'s choice)')
    add("--sweep", metavar="REWARD=FIRST:LAST:COUNT", help="one column a level")
    add("--guidance", type=float, help="w, 0 = off; default: the checkpoint's")
    add("--interval", type=float, nargs=2, default=(0.0, 1.0), help="times t with guidance")
    add("--steps", type=int, help="default: the checkpoint's")
    add("--solver", choices=("euler", "ab2"), help="default: the checkpoint's")
    add("--shift", type=float, help="above 1: more steps near the noise; default: the checkpoint's")
    add("--seed", type=int, default=0)
    add("--n", type=int, default=1, help="pictures a prompt")
    add("--best-of", type=int, default=1, help="candidates of which the best is kept")
    add("--by", help="the analytic reward that chooses among candidates")
    add("--batch", type=int, default=64, help="pictures at once; changes no more than rounding")
    add("--precision", choices=PRECISIONS, default="auto",
        help="of the network; auto: bf16 (older chips: fp16) on CUDA, else fp32")
    add("--scale", type=int, help="enlargement of the tiles")
    add("--out", default="out.png", help="figure NAME.png, or a folder for single pictures")
    args = parser.parse_args(argv)
    for key in ("n", "best_of", "batch", "steps", "scale"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)}: it is at least 1")
    for key in ("seed", "guidance", "shift"):
        if getattr(args, key) is not None and not 0 <= getattr(args, key) < 2 ** 62:  # nor NaN
            raise ValueError(f"--{key} {getattr(args, key)}: it is 0 or more")
    if args.by and args.best_of == 1:
        raise ValueError(f"--by {args.by} chooses among candidates: pass --best-of, too")
    if args.shift == 0:
        raise ValueError("--shift 0: it is above 0, and 1 takes even steps")
    if not 0 <= args.interval[0] <= args.interval[1] <= 1:
        raise ValueError(f"--interval {args.interval[0]:g} {args.interval[1]:g}: it is two times, "
                         "0 <= first <= last <= 1")
    if args.checkpoint is None:
        trained = Path("runs/shapes/model.safetensors").exists()
        args.checkpoint = "runs/shapes" if trained else str(SHIPPED)
    out = Path(args.out)
    for folder in (out, *out.parents) if out.suffix.lower() != ".png" else out.parents:
        if folder.is_file():
            raise ValueError(f"--out {out}: {folder} is a file, not a folder")
    if out.suffix.lower() == ".png" and out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file, or a folder without .png")
    return args


def main(argv=None):
    """The command line: load, sample, measure, save, and say what it cost."""
    args = read_command(argv)
    began = time.time()
    model = load(find(args.checkpoint, args.variant), best_device())
    set_sources(model, args.checkpoint, args.text_encoder, args.vae)
    if args.export:
        write_release(model, Path(args.export))
        return print(f"wrote {args.export} in the release's layout")
    model.precision = args.precision
    made, out = plan(args, model), Path(args.out)
    if out.suffix.lower() != ".png" and (older := [
            path for path in out.glob("[0-9]*.png") if path.stem.isdigit()
            and int(path.stem) >= len(made) // args.best_of]):
        raise ValueError(f"--out {out} has pictures of an earlier command that would stay among "
                         f"the new ones, such as {older[0].name}: name another folder")
    tensor = lambda key: torch.tensor([job[key] for job in made]).view(
        len(made), len(model.rewards))
    defaults = model.config["sampler"]
    w = defaults["guidance"] if args.guidance is None else args.guidance
    steps, solver = args.steps or defaults["steps"], args.solver or defaults["solver"]
    shift = args.shift or defaults["shift"]
    rounds = -(-len(made) // args.batch)
    with tqdm(total=rounds * steps, desc="sampling", unit="step", leave=False) as bar:
        pictures = generate(model, [job["prompt"] for job in made], tensor("s_pos"),
                            tensor("s_neg"), [job["seed"] for job in made], w, steps, solver,
                            tuple(args.interval), args.negative_prompt, args.batch, bar.update,
                            shift)
    args.scale = args.scale or max(1, 120 // pictures.shape[-1])
    levels, raws = measure(model, pictures, [job["prompt"] for job in made])
    for job, measured, raw in zip(made, levels, raws):
        job |= dict(measured=measured, raw=raw)
    # The jobs go into the PNG as JSON, so that the pictures stay outside of them.
    by_job = {id(job): picture for job, picture in zip(made, pictures)}
    guided = [w != 0 and args.interval[0] <= t <= args.interval[1]
              for t in flow.step_times(steps, shift)[:-1]]
    passes, reads = sum(map(int, guided)) + steps, 2 * any(guided) + (not all(guided))
    names = ", ".join(f"{name}={level:g}" for name, level in zip(model.rewards, made[0]["s_pos"]))
    if args.checkpoint == str(SHIPPED):
        print(f"nothing is trained yet: this is the checkpoint in {SHIPPED}")
    print(f"targets {names or 'none'}{' ...' if len(made) > 1 else ''}")
    once, each = flops(model)
    print(f"{len(made)} pictures, {steps} {solver} steps, guidance {w:g}: {passes} network "
          f"evaluations and {(passes * each + reads * once) / 1e12:.4g} TFLOP a picture, "
          f"{time.time() - began:.1f} s")
    settings = {**vars(args), "guidance": w, "steps": steps, "solver": solver, "shift": shift}
    save(best(made, args.best_of, args.by), by_job, args, model, settings)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:            # a user's mistake: one sentence, no traceback
        print(error, file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError as error:
        print(f"the GPU's memory is full ({first_line(error)}): pass a smaller --batch",
              file=sys.stderr)
        sys.exit(2)
