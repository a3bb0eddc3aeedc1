"""Sample with reward targets: ask for the levels you want, 0 (worst bin) to 1 (best bin).

    python sample.py --prompt "a red circle and a blue square" --targets all=1 colorfulness=0.3
    python sample.py --prompt "two green triangles" --sweep contrast=0:1:5 --n 4
    python sample.py --prompts prompts.txt --best-of 8 --by alignment --out pictures/

    model = sample.load("runs/shapes")         # in a notebook: a run, or the release's folder or id
    x = sample.pictures(model, ["a red circle"] * 2, targets={"contrast": 0.3}, seeds=[0, 1])
"""
import argparse
import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

import flow
from binning import Bins
from data import (PRECISIONS, T5, VAE, UserError, Words, best_device, encoder_of, first_line, pad,
                  precision, printable, read_json, run, write_whole)
from model import RELEASE_REWARDS, Config, TextRIN, build, release_config, release_name
from rewards import reads
from shapes import ANALYTIC, score_all

SAMPLERS = {"shapes": dict(guidance=0.5, steps=16, solver="ab2", shift=3.0),     # by preset
            "paper": dict(guidance=7.0, steps=50, solver="euler", shift=1.0)}    # the release's
# What the embedded world is asked for, found by trial: its most colourful pictures are confetti.
WORLD_TARGETS = ["all=0.75", "alignment=1"]
SHIPPED = Path(__file__).parent / "assets" / "shapes"      # a checkpoint of the embedded world
# The least that a number of a command, or of the sampler in config.json, may be.
LEAST = dict(guidance=0, steps=1, shift=0.001, seed=0, n=1, best_of=1, batch=1, scale=1)


@dataclass
class Model:
    """A network with all that sampling needs: what is in a checkpoint folder."""
    net: TextRIN
    config: dict                     # config.json in format 1: see train.py
    encoder: Words | T5
    bins: Bins | None                # None: trained without rewards, or the release's
    device: torch.device
    vae: VAE | None = None           # of checkpoints that make latents
    empty: torch.Tensor | None = None   # (L, E): the states of "" that the release saved
    precision: str = "auto"          # of the network's matrix products: see data.precision

    @property
    def rewards(self) -> tuple:
        """The names of the columns of s, in the order of training."""
        return tuple(self.config["network"]["rewards"])


def load(checkpoint, device=None, variant: str | None = None, text_encoder: str | None = None,
         vae: str | None = None) -> Model:
    """A checkpoint of train.py or of the release: a folder, or OWNER/NAME of the hub. device: None
    = the best there is. variant: a subfolder. text_encoder, vae: folders or hub ids, None = those
    that the checkpoint names. UserError: the file, and what is wrong."""
    folder, empty = find(str(checkpoint), variant), None
    file, weights_file = folder / "config.json", folder / "model.safetensors"
    for needed in (file, weights_file):
        if not needed.exists():
            raise UserError(f"{needed} does not exist: train with python train.py, or name another")
    config = read_json(file)
    try:
        weights = load_file(weights_file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights_file} cannot be read: {first_line(error)}") from error
    try:
        if "coherence_keys" in config["network"]:
            config, weights, empty = read_release(folder, config, weights)
        vae = VAE(vae or config["vae"]) if vae or config["vae"] else None
        if text_encoder:
            config["text_encoder"] |= dict(kind="t5", source=text_encoder)
        network, encoder = Config(**config["network"]), encoder_of(config["text_encoder"])
        bins = Bins.from_config(config["bins"]) if config["bins"] else None
        sampler, norms = config["sampler"], np.array([config["mean"], config["std"]], np.float64)
        assert config["format"] == 1, f"format is {config['format']}, not 1"
        for one in fields(Config)[1:]:
            value = getattr(network, one.name)
            assert isinstance(value, (one.type, int)) and 0 <= value < 1e6, f"{one.name} is {value}"
        for key in ("guidance", "steps", "shift"):
            assert LEAST[key] <= sampler[key] < 1e6, f"sampler.{key} is {sampler[key]}"
        assert sampler["solver"] in ("euler", "ab2"), f"sampler.solver is {sampler['solver']}"
        assert norms.shape == (2, network.channels), f"mean and std are {norms.tolist()}"
    except (ValueError, TypeError, LookupError, AssertionError) as error:
        raise UserError(f"{file}: {type(error).__name__}: {first_line(error)}") from error
    try:
        net = build(network)
    except AssertionError as error:               # sizes that do not go together; else it is a bug
        raise UserError(f"{file}: {first_line(error)}") from error
    shapes = {(name, tensor.shape) for name, tensor in net.state_dict().items()}
    wrong = shapes ^ {(name, tensor.shape) for name, tensor in weights.items()}
    if wrong:
        raise UserError(f"{weights_file} does not fit {file}: tensors are missing, unknown or of "
                        f"another shape, such as {min(wrong)[0]}")
    net.load_state_dict(weights)
    encoder.device = device = best_device() if device is None else torch.device(device)
    return Model(net.to(device).eval(), config, encoder, bins, device, vae, empty)


def find(checkpoint: str, variant: str | None) -> Path:
    """A folder stays itself; OWNER/NAME is a repository of the hub. UserError: neither."""
    folder = Path(checkpoint, variant or "")
    if folder.exists() or checkpoint.count("/") != 1 or Path(checkpoint).parent.is_dir():
        return folder
    from huggingface_hub import errors, hf_hub_download
    try:
        hf_hub_download(checkpoint, "model.safetensors", subfolder=variant)
        with suppress(errors.EntryNotFoundError):                             # ours have none
            hf_hub_download(checkpoint, "uncond_embedding.npy", subfolder=variant)
        return Path(hf_hub_download(checkpoint, "config.json", subfolder=variant)).parent
    except (OSError, ValueError, errors.EntryNotFoundError) as error:     # HTTP's are OSErrors
        raise UserError(f"{folder}: there is no such folder, and the hub does not give it "
                        f"({first_line(error)}): name a checkpoint") from error


def read_release(folder: Path, config: dict, weights: dict) -> tuple:
    """The release's config, and tensors without its constants, as train.py writes them; states
    (L, E) of "" or None. Norms are the VAE's: z = x_0 * std + mean. ValueError: another one."""
    shift, said = config.get("scheduler", {}).get("shift", 1), config.get("sampler_defaults", {})
    if shift != 1:
        raise ValueError(f"its scheduler.shift is {shift}, and only 1 is known here")
    network, sampler = asdict(release_config(config)), SAMPLERS["paper"] | dict(
        guidance=said.get("guidance_scale", 7.0), steps=said.get("num_inference_steps", 50))
    scale, bias = (weights[f"postprocessing.{name}"].flatten() for name in ("scale", "bias"))
    text = dict(kind="t5", source=config.get("text_encoder_repo", T5.SOURCE),
                dim=network["text_dim"], length=config.get("max_text_len", 77))
    ours = dict(format=1, network=network, mean=(-bias / scale).tolist(), prompts=[], targets=[],
                std=(1 / scale).tolist(), text_encoder=text, sampler=sampler, bins=None,
                vae=config.get("vae_repo", VAE.SOURCE))
    with torch.device("meta"):
        net = build(network)                                           # for its tensors' names
    names, renamed = {release_name(net, name): name for name in net.state_dict()}, {}
    for name, tensor in weights.items():
        constant = name.startswith(("data_preprocessing.", "postprocessing."))
        if name in names or not (constant or tensor.dtype == torch.bool and tensor.all()):
            renamed[names.get(name, name)] = tensor
    file = folder / "uncond_embedding.npy"
    if not file.exists():
        return ours, renamed, None
    try:
        empty = np.load(file).astype(np.float32).reshape(-1, text["dim"])
        return ours, renamed, torch.from_numpy(empty)
    except (ValueError, EOFError) as error:
        raise UserError(f"{file} has no states of width {text['dim']}: copy it again") from error


def pictures(model: Model, prompts, targets=None, negative=None, seeds=None, guidance=None,
             steps=None, solver=None, shift=None, interval=(0.0, 1.0), negative_prompt=None,
             batch=64, progress=None) -> torch.Tensor:
    """Pictures of prompts (B), from noise of seeds (B), by default 0 to B - 1: uint8 (B, 3, S, S)
    on the CPU, of latents (B, 3, 8 S, 8 S). UserError: no such level, or pictures of NaN.

    targets: {"contrast": 0.3} or ["all=1", "contrast=0.3"], laid over the checkpoint's own, the
    rest 1; or a tensor (B, R), NaN = not asked for. negative: what to move away from, the rest 0.
    guidance, steps, solver, shift: None = the checkpoint's own. interval: times with guidance.
    negative_prompt: None = the same (the paper's equation 5), "" = the release's choice."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = range(len(prompts)) if seeds is None else list(seeds)
    assert len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts"
    c, sampler = model.config["network"], model.config["sampler"]
    w = sampler["guidance"] if guidance is None else guidance
    steps = sampler["steps"] if steps is None else steps
    solver = sampler["solver"] if solver is None else solver
    shift = sampler["shift"] if shift is None else shift
    own = read_targets(model.config["targets"], model.rewards, 1.0, "targets")
    s = []                                                                       # s_pos, s_neg
    for asked, rest, flag in ((targets, own, "targets"), (negative, 0.0, "negative")):
        if not isinstance(asked, torch.Tensor):
            asked = torch.tensor([read_targets(asked, model.rewards, rest, flag)] * len(prompts))
        assert asked.shape == (len(prompts), len(model.rewards)), (flag, asked.shape)
        assert not ((asked < 0) | (asked > 1)).any(), f"{flag}: a level is from 0 to 1, or NaN"
        s.append(asked.float().cpu())                                            # (B, R)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    eps = torch.stack([torch.randn(c["channels"], c["size"], c["size"], generator=generator)
                       for generator in generators])                             # (B, C, S, S)
    texts = texts_neg = model.encoder.states(prompts)                            # B of (L, E)
    if negative_prompt == "" and model.empty is not None:
        texts_neg = [model.empty] * len(prompts)                                 # as the release
    elif negative_prompt is not None:
        texts_neg = model.encoder.states([negative_prompt] * len(prompts))       # B of (L, E)
    model.encoder.free()                                          # the network needs the memory
    device, dtype, x = model.device, precision(model.precision, model.device), []
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for first in range(0, len(prompts), batch):
            part = slice(first, first + batch)
            text, mask = pad([*texts[part], *texts_neg[part]])                   # (2 b, L, E | L)
            given = (eps[part], s[0][part], s[1][part], *text.chunk(2), *mask.chunk(2))
            noise, s_pos, s_neg, text, text_neg, mask, mask_neg = (a.to(device) for a in given)
            branches = flow.branches(s_pos, s_neg, text, mask, w, text_neg, mask_neg)
            x.append(flow.sample(model.net, noise, branches, steps, solver, shift, interval,
                                 progress).cpu())                                # (b, C, S, S)
    mean, std = (torch.tensor(model.config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    x = torch.cat(x) * std + mean                                                # (B, C, S, S)
    if not x.isfinite().all():
        raise UserError("the pictures are not finite: lower --guidance, pass --precision fp32, or "
                        "take an earlier checkpoint")
    if model.vae is not None:
        model.vae.device = device
        return model.vae.decode(x)                                               # (B, 3, 8 S, 8 S)
    return x.round().clamp(0, 255).to(torch.uint8)                               # (B, 3, S, S)


def read_targets(asked, rewards: tuple, rest, flag: str) -> list:
    """["all=1", "contrast=0.3"] or {"contrast": 0.3} → R levels in the order of the columns; where
    nothing is said `rest`, one level or R. UserError: an unknown reward, a level not in [0, 1]."""
    if isinstance(asked, dict):
        asked = [f"{name}={level}" for name, level in asked.items()]
    found = dict(zip(rewards, rest if isinstance(rest, list) else [rest] * len(rewards)))
    aliases = {there: here for here, there in RELEASE_REWARDS.items()}
    for entry in asked or []:                                                # later ones override
        name, _, text = entry.partition("=")
        name = aliases.get(name, name)                                    # the release's names, too
        said = printable(f"{flag} {name}={text}")
        try:
            level = float(text)
        except ValueError:
            level = -1.0
        if not 0 <= level <= 1:                                                          # nor NaN
            raise UserError(f"{said}: a level is a number from 0 (worst) to 1")
        if name != "all" and name not in found:
            known = ", ".join(rewards) or "none, it was trained without rewards"
            raise UserError(f"{said}: no such reward in this checkpoint; it knows all, {known}")
        found.update(dict.fromkeys(rewards if name == "all" else [name], level))
    return list(found.values())


def tile(picture: torch.Tensor, lines: list, scale: int) -> Image.Image:
    """A picture (3, S, S), enlarged without smoothing, over lines of text."""
    side, font = picture.shape[-1] * scale, ImageFont.load_default(11)
    image = Image.new("RGB", (side, side + 13 * len(lines) + 4), "white")
    image.paste(to_image(picture).resize((side, side), Image.NEAREST))
    ImageDraw.Draw(image).text((2, side + 2), "\n".join(lines), "black", font, spacing=1)
    return image


def to_image(picture: torch.Tensor) -> Image.Image:
    """uint8 (3, H, W) → an image of Pillow."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def grid(rows: list, headings: list | None = None, labels: list | None = None) -> Image.Image:
    """Rows of tiles, with a heading over each column and a label over each row, if given."""
    labels = [printable(label)[:200] for label in labels or []]     # a caption may be a whole novel
    width = 4 + max(piece.width for row in rows for piece in row)
    height = 4 + max(piece.height for row in rows for piece in row)
    top, over, font = 18 * bool(headings), 18 * bool(labels), ImageFont.load_default(12)
    wide = max([width * max(map(len, rows)), *(int(font.getlength(text)) + 6 for text in labels)])
    image = Image.new("RGB", (wide, top + len(rows) * (height + over)), "white")
    draw = ImageDraw.Draw(image)
    for j, heading in enumerate(headings or []):
        draw.text((j * width + 2, 2), heading, "black", font)
    for i, label in enumerate(labels):
        draw.text((2, top + i * (height + over) + 2), label, "black", font)
    for i, row in enumerate(rows):
        for j, piece in enumerate(row):
            image.paste(piece, (j * width, top + i * (height + over) + over))
    return image


def progress_grid(model: Model) -> Image.Image:
    """The picture of training: fixed noise, rows prompts, columns all targets from 0 to 1."""
    columns = [0.0, 0.25, 0.5, 0.75, 1.0] if model.rewards else [1.0]
    prompts = model.config["prompts"]
    seeds = [i for i in range(len(prompts)) for _ in columns]                    # (B,)
    s = torch.tensor(columns * len(prompts))[:, None].expand(-1, len(model.rewards))   # (B, R)
    x = pictures(model, [prompts[i] for i in seeds], s, seeds=seeds)             # (B, 3, S, S)
    tiles = [tile(picture, [], max(1, 96 // x.shape[-1])) for picture in x]
    rows = [tiles[i:i + len(columns)] for i in range(0, len(tiles), len(columns))]
    return grid(rows, [f"all={level:g}" for level in columns] if model.rewards else None, prompts)


def write_png(image: Image.Image, path: Path, settings: dict) -> None:
    """Save with the settings as JSON in the PNG's text chunk "miro", whole."""
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("miro", json.dumps(settings))
    write_whole(path, lambda temporary: image.save(temporary, "png", pnginfo=chunk))


# ---- the command line ----------------------------------------------------------------------------

def read_command(argv=None) -> argparse.Namespace:
    """The flags. UserError: one cannot be, or two do not go together."""
    parser = argparse.ArgumentParser(description="sample pictures with reward targets")
    trained, add = Path("runs/shapes/model.safetensors").exists(), parser.add_argument
    add("--checkpoint", default="runs/shapes" if trained else str(SHIPPED), help="folder or hub id")
    add("--variant", help="subfolder of the checkpoint, such as miro-only-clip")
    add("--text-encoder", help="folder or hub id of a T5")
    add("--vae", help="folder or hub id of an AutoencoderKL")
    add("--prompt", help="one prompt")
    add("--prompts", help="file: prompts, or JSON with prompt, targets, negative, seed, one a line")
    add("--targets", nargs="+", default=[], metavar="REWARD=LEVEL", help="default: its own")
    add("--negative", nargs="+", default=[], metavar="REWARD=LEVEL", help="default all=0")
    add("--negative-prompt", help='default: the same caption ("" is the release\'s choice)')
    add("--sweep", type=sweep, default=[], metavar="REWARD=FIRST:LAST:COUNT")
    add("--guidance", type=float, help="w, 0 = off; default, also of the next 3: the checkpoint's")
    add("--steps", type=int)
    add("--solver", choices=("euler", "ab2"))
    add("--shift", type=float, help="above 1: more steps near the noise")
    add("--interval", type=float, nargs=2, default=(0.0, 1.0), help="times t with guidance")
    add("--seed", type=int, default=0, help="of the first picture of a prompt")
    add("--n", type=int, default=1, help="pictures a prompt")
    add("--best-of", type=int, default=1, help="candidates of which the best is kept")
    add("--by", choices=ANALYTIC, help="the reward that chooses among candidates")
    add("--batch", type=int, default=64, help="pictures at once")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 on CUDA")
    add("--scale", type=int, help="enlargement of the tiles")
    add("--out", default="out.png", help="figure NAME.png, or a folder for single pictures")
    args = parser.parse_args(argv)
    for key, least in LEAST.items():
        value = getattr(args, key)
        if value is not None and not least <= value <= 1e15:                             # nor NaN
            raise UserError(f"--{key.replace('_', '-')} {value}: it is from {least} to 1e15")
    if args.by and args.best_of == 1:
        raise UserError(f"--by {args.by} chooses among candidates: pass --best-of, too")
    if not 0 <= args.interval[0] <= args.interval[1] <= 1:
        raise UserError(f"--interval {args.interval[0]:g} {args.interval[1]:g}: it is two times, "
                        "0 <= first <= last <= 1")
    if (args.prompt is None) == (args.prompts is None):
        raise UserError("name one of --prompt TEXT and --prompts FILE")
    out = Path(args.out)
    if out.suffix not in ("", ".png") or out.is_dir() and (out.suffix or any(out.iterdir())):
        raise UserError(f"--out {out}: name a .png, or a folder that is new or empty")
    try:
        (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {first_line(error)}") from error
    return args


def sweep(text: str) -> list:
    """"contrast=0:1:3" → ["contrast=0", "contrast=0.5", "contrast=1"]. ValueError: misspelt."""
    name, first, last, count = text.replace("=", ":").split(":")
    if int(count) < 1:
        raise ValueError(f"{count} levels")
    return [f"{name}={level:.4g}" for level in np.linspace(float(first), float(last), int(count))]


def main(argv=None) -> None:
    """The command line: load, sample, measure, save, and say what it cost."""
    args, began = read_command(argv), time.time()
    model = load(args.checkpoint, None, args.variant, args.text_encoder, args.vae)
    model.precision, sampler = args.precision, model.config["sampler"]
    sampler.update({k: v for k, v in vars(args).items() if k in sampler and v is not None})
    jobs = plan(args, model)
    prompts, seeds, s_pos, s_neg = ([job[key] for job in jobs]
                                    for key in ("prompt", "seed", "s_pos", "s_neg"))
    names = [name for name in model.rewards if name in ANALYTIC
             and (name != "alignment" or all(reads(prompt) for prompt in prompts))]
    if args.best_of > 1 and args.by not in names:
        raise UserError(f"--best-of needs --by one of {', '.join(names) or 'no reward'}")
    with tqdm(total=-(-len(jobs) // args.batch) * sampler["steps"], disable=None) as bar:
        x = pictures(model, prompts, torch.tensor(s_pos), torch.tensor(s_neg), seeds,
                     interval=args.interval, negative_prompt=args.negative_prompt,
                     batch=args.batch, progress=bar.update)                      # (B, 3, S, S)
    raw = score_all(names, x, prompts)                                           # (B, R')
    levels = raw                                       # of no reward: a baseline, the release
    if names:
        levels = model.bins.select(names).to_target(raw)                         # (B, R')
    for job, scores, places in zip(jobs, raw.tolist(), levels.tolist()):
        job |= dict(raw=dict(zip(names, scores)), measured=dict(zip(names, places)))
    if args.best_of > 1:                               # by raw scores: levels tie in the top bin
        groups = raw[:, names.index(args.by)].view(-1, args.best_of)             # candidates a row
        best = groups.argmax(1) + torch.arange(len(groups)) * args.best_of
        jobs, x = [jobs[k] for k in best], x[best]
    save(jobs, x, args, model)
    print(f"{args.checkpoint}, {sampler}, targets {model.config['targets'] + args.targets}: "
          f"{len(prompts)} pictures in {time.time() - began:.1f} s, wrote {args.out}")


def plan(args, model: Model) -> list:
    """A dict(prompt, seed, s_pos, s_neg) a picture, row by row, candidates beside each other."""
    rewards, jobs = model.rewards, []
    own = read_targets([*model.config["targets"], *args.targets], rewards, 1.0, "--targets")
    away = read_targets(args.negative, rewards, 0.0, "--negative")
    for want in read_prompts(args.prompts) if args.prompts else [{"prompt": args.prompt}]:
        where = f"{args.prompts}, {want['prompt']!r}: "
        s_pos = read_targets(want.get("targets"), rewards, own, where + "targets")
        s_neg = read_targets(want.get("negative"), rewards, away, where + "negative")
        columns = [read_targets([level], rewards, s_pos, "--sweep") for level in args.sweep]
        for i, s, k in product(range(args.n), columns or [s_pos], range(args.best_of)):
            seed = want.get("seed", args.seed) + i * args.best_of + k
            jobs.append(dict(prompt=want["prompt"], seed=seed, s_pos=s, s_neg=s_neg))
    return jobs


def read_prompts(path: str) -> list:
    """Lines of text, or of JSON (prompt; targets, negative, seed if wanted) → list of dict."""
    kinds, jobs = {"prompt": str, "targets": dict, "negative": dict, "seed": int}, []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: there is no such file, or it is not text in UTF-8") \
            from error
    for number, line in enumerate(map(str.strip, lines), 1):
        try:
            job = json.loads(line) if line.startswith("{") else {"prompt": line}
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
        wrong = [key for key, value in job.items() if type(value) is not kinds.get(key)]
        if wrong or "prompt" not in job or not 0 <= job.get("seed", 0) < 2 ** 62:
            raise UserError(f"{path}, line {number} needs a text prompt, and may have targets and "
                            f"negative (reward: level) and a seed (0 or more): see {wrong or line}")
        if line:
            jobs.append(job)
    if not jobs:
        raise UserError(f"{path} has no prompt: write one a line")
    return jobs


def save(jobs: list, x: torch.Tensor, args, model: Model) -> None:
    """One figure of tiles (--out NAME.png), or one plain picture a file (--out FOLDER)."""
    out, settings, tiles = Path(args.out), vars(args) | model.config["sampler"], []
    for i, (job, picture) in enumerate(zip(jobs, x)):
        if out.suffix == "":
            write_png(to_image(picture), out / f"{i:05d}.png", settings | {"pictures": [job]})
        asked, lines = dict(zip(model.rewards, job["s_pos"])), [f"seed {job['seed']}"]
        for name, level in job["measured"].items():
            lines.append(f"{name[:5]} {asked[name]:.2f} > {level:.2f}")
        tiles.append(tile(picture, lines, args.scale or max(1, 120 // x.shape[-1])))
    if out.suffix == ".png":
        columns = len(args.sweep) or args.n
        rows = [tiles[i:i + columns] for i in range(0, len(tiles), columns)]
        figure = grid(rows, args.sweep, [job["prompt"] for job in jobs[::columns]])
        write_png(figure, out, settings | {"pictures": jobs})


if __name__ == "__main__":
    run(main)
