"""Sample with reward targets: ask for the levels you want, 0 (worst bin) to 1 (best bin).

    python sample.py --prompt "a red circle and a blue square" --targets all=1 colorfulness=0.3
    python sample.py --prompt "two green triangles" --sweep contrast=0:1:5 --n 4
    python sample.py --prompts prompts.txt --n 4 --out pictures      # a folder: see write_folder

    model = sample.load("runs/shapes")         # in a notebook: a run, or the release's folder or id
    x = sample.pictures(model, ["a red circle"] * 2, targets={"contrast": 0.3}, seeds=[0, 1])
"""
import argparse
import hashlib
import json
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from itertools import product
from math import ceil
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm

import flow
from binning import Bins
from data import (PRECISIONS, T5, VAE, Parser, UserError, Words, best_device, between, encoder_of,
                  file_digest, first_line, hold, make_folder, pad, pinned, precision, printable,
                  read_json, run, unseal, write_json, write_text, write_whole)
from model import RELEASE_REWARDS, Config, TextRIN, build, release_config, release_name
from rewards import reads
from shapes import ANALYTIC, score_all

SAMPLERS = {"shapes": dict(guidance=1.0, steps=8, solver="ab2", shift=3.0),      # by preset
            "paper": dict(guidance=7.0, steps=50, solver="euler", shift=1.0)}    # the release's
# What the embedded world is asked for, found by trial: its most colourful pictures are confetti.
WORLD_TARGETS = ["all=0.75", "alignment=1"]
SHIPPED = Path(__file__).parent / "assets" / "shapes"      # a checkpoint of the embedded world
RELEASE_FILES = ("config.json", "model.safetensors", "uncond_embedding.npy")


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
    config = read_json(file, sealed=False)
    try:
        weights = load_file(weights_file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights_file} cannot be read: {first_line(error)}") from error
    try:
        if "coherence_keys" in config.get("network", {}):
            config, weights, empty = read_release(folder, config, weights)
        elif unseal(config)["weights"] != file_digest(weights_file):
            raise UserError(f"{weights_file} is damaged, or not that of {file}: copy both again, "
                            "or resume the run that was writing them")
        network = Config(**config["network"])
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {first_line(error)}): "
                        "copy it again") from error
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"{weights_file} has weights that are not finite: take an earlier one")
    config["vae"] = vae or config["vae"]
    vae = VAE(config["vae"]) if config["vae"] else None
    if text_encoder:
        config["text_encoder"] |= dict(kind="t5", source=text_encoder)
    encoder = encoder_of(config["text_encoder"], file)
    bins = Bins.from_config(config["bins"]) if config["bins"] else None
    net = build(network)
    shapes = {(name, tensor.shape) for name, tensor in net.state_dict().items()}
    wrong = shapes ^ {(name, tensor.shape) for name, tensor in weights.items()}
    if wrong:
        raise UserError(f"{weights_file} does not fit {file}: tensors are missing, unknown or of "
                        f"another shape, such as {min(wrong)[0]}")
    net.load_state_dict(weights)
    encoder.device = device = best_device() if device is None else torch.device(device)
    return Model(net.to(device).eval(), config, encoder, bins, device, vae, empty)


def find(checkpoint: str, variant: str | None) -> Path:
    """A folder stays itself; OWNER/NAME[@COMMIT] is a repository of the hub. UserError: neither."""
    folder, (repository, revision) = Path(checkpoint, variant or ""), pinned(checkpoint)
    if folder.exists() or repository.count("/") != 1 or Path(checkpoint).parent.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    files = [Path(variant or "", name).as_posix() for name in RELEASE_FILES]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files),
                    variant or "")
    except (OSError, ValueError) as error:                                # HTTP's are OSErrors
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
             steps=None, solver=None, shift=None, negative_prompt=None, batch=64,
             progress=None) -> torch.Tensor:
    """Pictures of prompts (B), from noise of seeds (B), by default 0 to B - 1: uint8 (B, 3, S, S)
    on the CPU, of latents (B, 3, 8 S, 8 S). UserError: no such level, or pictures of NaN.

    targets: {"contrast": 0.3} or ["all=1", "contrast=0.3"], laid over the checkpoint's own, the
    rest 1; or a tensor (B, R), NaN = not asked for. negative: what to move away from, the rest 0.
    guidance, steps, solver, shift: None = the checkpoint's own. progress: called after each step.
    negative_prompt: None = the same (the paper's equation 5), "" = the release's choice."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = range(len(prompts)) if seeds is None else list(seeds)
    assert len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts"
    given = dict(guidance=guidance, steps=steps, solver=solver, shift=shift)
    sampler = model.config["sampler"] | {k: v for k, v in given.items() if v is not None}
    own = read_targets(model.config["targets"], model.rewards, 1.0, "targets")
    s = []                                                                       # s_pos, s_neg
    for asked, rest, flag in ((targets, own, "targets"), (negative, 0.0, "negative")):
        if not isinstance(asked, torch.Tensor):
            asked = torch.tensor([read_targets(asked, model.rewards, rest, flag)] * len(prompts))
        assert asked.shape == (len(prompts), len(model.rewards)), (flag, asked.shape)
        assert not ((asked < 0) | (asked > 1)).any(), f"{flag}: a level is from 0 to 1, or NaN"
        s.append(asked.float().cpu())                                            # (B, R)
    c = model.net.config
    eps = torch.stack([torch.randn(c.channels, c.size, c.size,
                                   generator=torch.Generator().manual_seed(int(seed)))
                       for seed in seeds])                                       # (B, C, S, S)
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
            branches = flow.branches(s_pos, s_neg, text, mask, sampler["guidance"], text_neg,
                                     mask_neg)
            x.append(flow.sample(model.net, noise, branches, sampler["steps"], sampler["solver"],
                                 sampler["shift"], progress=progress).cpu())     # (b, C, S, S)
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


def grid(rows: list, scale: int, headings=(), labels=()) -> Image.Image:
    """Rows of (picture (3, S, S), lines of text below it), enlarged without smoothing, with a
    heading of some lines over each column and a label over each row, if given."""
    (picture, lines), font = rows[0][0], ImageFont.load_default(11)
    side = picture.shape[-1] * scale
    width, height = side + 4, side + 13 * len(lines) + 8
    labels = [printable(label)[:200] for label in labels]           # a caption may be a whole novel
    top = max([5 + 13 * (1 + heading.count("\n")) for heading in headings], default=0)
    over = 18 * bool(labels)
    wide = max([width * len(rows[0]), *(int(font.getlength(label)) + 6 for label in labels)])
    image = Image.new("RGB", (wide, top + len(rows) * (height + over)), "white")
    draw = ImageDraw.Draw(image)
    for j, heading in enumerate(headings):
        draw.text((j * width + 2, 2), heading, "black", font, spacing=1)
    for i, row in enumerate(rows):
        y = top + i * (height + over)
        if labels:
            draw.text((2, y + 2), labels[i], "black", font)
        for j, (picture, lines) in enumerate(row):
            shown = Image.fromarray(picture.permute(1, 2, 0).numpy())
            image.paste(shown.resize((side, side), Image.NEAREST), (j * width, y + over))
            place = (j * width + 2, y + over + side + 2)
            draw.text(place, "\n".join(lines), "black", font, spacing=1)
    return image


def progress_grid(model: Model) -> Image.Image:
    """The picture of training: fixed noise, rows prompts, columns all targets from 0 to 1; then the
    model's own targets, if it has others."""
    prompts, own = model.config["prompts"], model.config["targets"]
    columns = [[f"all={level:g}"] for level in (0, 0.25, 0.5, 0.75, 1)] if model.rewards else [[]]
    columns += [own] * bool(own)
    s = [read_targets(asked, model.rewards, 1.0, "targets") for asked in columns]
    seeds = [i for i in range(len(prompts)) for _ in columns]                    # (B,)
    x = pictures(model, [prompts[i] for i in seeds], torch.tensor(s * len(prompts)), seeds=seeds)
    rows = [[(picture, ()) for picture in row] for row in x.split(len(columns))]
    headings = ["\n".join(asked) for asked in columns] if model.rewards else ()
    return grid(rows, max(1, 96 // x.shape[-1]), headings, prompts)


def fingerprint(model: Model, *asked) -> str:
    """16 hex digits of all that pictures depend on: the model, and what is asked of it."""
    weights = hashlib.sha256(save(model.net.state_dict())).hexdigest()
    parts = [model.config[key] for key in ("mean", "std", "text_encoder", "vae", "sampler")]
    made_of = [weights, *parts, str(precision(model.precision, model.device)), *asked]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


# ---- the command line ----------------------------------------------------------------------------

def read_command(argv=None) -> argparse.Namespace:
    """The flags. UserError: one cannot be, or two do not go together."""
    parser = Parser(description="sample pictures with reward targets")
    trained, add = Path("runs/shapes/model.safetensors").exists(), parser.add_argument
    add("--checkpoint", default="runs/shapes" if trained else str(SHIPPED),
        help="folder, or hub id[@commit]")
    add("--variant", help="subfolder of the checkpoint, such as miro-only-clip")
    add("--text-encoder", help="folder or hub id of a T5")
    add("--vae", help="folder or hub id of an AutoencoderKL")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--prompt", help="one prompt")
    either("--prompts", help='file: a prompt a line, as text or as JSON with a "prompt"')
    add("--targets", nargs="+", default=[], metavar="REWARD=LEVEL", help="default: its own")
    add("--negative", nargs="+", default=[], metavar="REWARD=LEVEL", help="default all=0")
    add("--negative-prompt", help='default: the same caption ("" is the release\'s choice)')
    add("--sweep", type=sweep, default=[], metavar="REWARD=FIRST:LAST:COUNT")
    add("--guidance", type=between(float), help="w, 0 = off; of this and the next 3 the default "
        "is the checkpoint's own")
    add("--steps", type=between(int, 1))
    add("--solver", choices=("euler", "ab2"))
    add("--shift", type=between(float, 0.001), help="above 1: more steps near the noise")
    add("--seed", type=between(int), default=0, help="of the first picture; then they count on")
    add("--n", type=between(int, 1), default=1, help="pictures a prompt")
    add("--best-of", type=between(int, 1), default=1, help="candidates: the best is kept")
    add("--by", choices=ANALYTIC, help="the reward that chooses among candidates")
    add("--batch", type=between(int, 1), default=64, help="at once; changes only rounding")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 on CUDA")
    add("--out", default="out.png", help="figure NAME.png, or a folder for single pictures")
    add("--page", metavar="FILE.html", help="a page with sliders, of the prompts or 4 of its own")
    add("--page-pictures", type=between(int, 1), default=4000, help="at most that many in it")
    args = parser.parse_args(argv)
    if not (args.prompt or args.prompts or args.page):
        raise UserError("one of --prompt --prompts --page is required: see python sample.py --help")
    if args.page and (args.sweep or args.best_of > 1 or args.by or args.n > 1):
        raise UserError("--page takes no --sweep, --best-of, --by or --n")
    suffix = Path(args.out).suffix
    if suffix not in ("", ".png") or suffix and Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: name a .png, or a folder")
    if not suffix and (args.sweep or args.best_of > 1 or args.by):
        raise UserError(f"--sweep, --best-of and --by make a figure: --out {args.out}.png")
    return args


def sweep(text: str) -> list:
    """"contrast=0:1:3" → ["contrast=0", "contrast=0.5", "contrast=1"]. ValueError: misspelt."""
    name, first, last, count = text.replace("=", ":").split(":")
    if int(count) < 1:
        raise ValueError(f"{count} levels")
    return [f"{name}={level:.4g}" for level in np.linspace(float(first), float(last), int(count))]


def set_sampler(model: Model, args: argparse.Namespace) -> None:
    """Let guidance, steps, solver and shift that are among the flags replace the checkpoint's."""
    sampler = model.config["sampler"]
    sampler.update({k: v for k, v in vars(args).items() if k in sampler and v is not None})


def main(argv=None) -> None:
    """The command line: load, sample, save, and say what it cost."""
    args, began = read_command(argv), time.time()
    model = load(args.checkpoint, None, args.variant, args.text_encoder, args.vae)
    asked = model.config["prompts"][:4] if args.prompt is None else [args.prompt]
    wanted = read_prompts(args.prompts) if args.prompts else [{"prompt": text} for text in asked]
    model.precision = args.precision
    set_sampler(model, args)
    prompts = [want["prompt"] for want in wanted]
    if not prompts:
        raise UserError(f"{args.checkpoint} names no prompts: give --prompt or --prompts")
    jobs = plan(args, model, prompts)
    model.encoder.states([*prompts, args.negative_prompt or ""])    # all at once: a T5 loads once
    if args.page:
        return write_page(args, model, prompts)
    if Path(args.out).suffix:
        write_figure(args, model, jobs)
    else:
        write_folder(args, model, jobs, wanted)
    print(f"{args.checkpoint}, {model.config['sampler']}, targets "
          f"{model.config['targets'] + args.targets}: {len(jobs)} pictures in "
          f"{time.time() - began:.1f} s, wrote {args.out}")


def read_prompts(path: str) -> list[dict]:
    """A file with a prompt a line, as text or as JSON → {"prompt": text, what else the JSON has}.
    UserError: it cannot be read, a line has no prompt, or none has one."""
    wanted, number = [], 1
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        for number, line in enumerate(map(str.strip, lines), 1):
            want = json.loads(line) if line.startswith("{") else {"prompt": line}
            if not isinstance(want.get("prompt"), str):
                raise ValueError('it has no "prompt" that is text')
            if line:
                wanted.append(want)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--prompts {path}, line {number}: {first_line(error)}; write a prompt a "
                        'line, as text or as JSON with a "prompt", in UTF-8') from error
    if not wanted:
        raise UserError(f"--prompts {path} has no prompt: write one a line")
    return wanted


def plan(args, model: Model, prompts: list[str]) -> list[dict]:
    """A dict(prompt, seed, s_pos) a picture, row by row, candidates beside each other.
    Picture i of prompt k has seed --seed + k n + i, where n = --n; with --best-of N its candidates
    have the N seeds from --seed + (k n + i) N on. The levels of a sweep share one."""
    asked, jobs, N = [*model.config["targets"], *args.targets], [], args.best_of
    s = read_targets(asked, model.rewards, 1.0, "--targets")
    columns = [read_targets([level], model.rewards, s, "--sweep") for level in args.sweep] or [s]
    for k, i, s_pos, j in product(range(len(prompts)), range(args.n), columns, range(N)):
        seed = args.seed + (k * args.n + i) * N + j
        jobs.append(dict(prompt=prompts[k], seed=seed, s_pos=s_pos))
    return jobs


def painted(args, model: Model, jobs: list[dict]) -> Iterator[torch.Tensor]:
    """The pictures of jobs, uint8 (3, S, S) each, batch by batch."""
    starts = range(0, len(jobs), args.batch)
    with tqdm(total=len(starts) * model.config["sampler"]["steps"], disable=None) as bar:
        for first in starts:
            part = jobs[first:first + args.batch]
            prompts, seeds, s_pos = ([job[key] for job in part]
                                     for key in ("prompt", "seed", "s_pos"))
            yield from pictures(model, prompts, torch.tensor(s_pos), args.negative, seeds,
                                negative_prompt=args.negative_prompt, batch=args.batch,
                                progress=bar.update)


def write_figure(args, model: Model, jobs: list[dict]) -> None:
    """One figure: a row a prompt, or with --sweep a noise; below each picture its seed, and the
    levels asked for > measured; the settings as JSON in the PNG's text chunk "miro".
    UserError: --best-of without a reward that can be measured."""
    prompts, columns, N = [job["prompt"] for job in jobs], len(args.sweep) or args.n, args.best_of
    names = measurable(model, prompts)
    if (N > 1 and args.by not in names) or (N == 1 and args.by):
        raise UserError(f"--best-of needs --by one of {', '.join(names) or 'no reward'}, and --by "
                        "needs --best-of")
    make_folder(Path(args.out).parent)
    x = torch.stack([*painted(args, model, jobs)])                               # (B, 3, S, S)
    raw = score_all(names, x, prompts)                                           # (B, R')
    levels = model.bins.select(names).to_target(raw) if names else raw           # (B, R')
    tiles = []
    for job, picture, scores, places in zip(jobs, x, raw.tolist(), levels.tolist()):
        asked, lines = dict(zip(model.rewards, job["s_pos"])), [f"seed {job['seed']}"]
        for name, level in zip(names, places):
            lines.append(f"{name[:5]} {asked[name]:.2f} > {level:.2f}")
        job |= dict(raw=dict(zip(names, scores)), measured=dict(zip(names, places)))
        tiles.append((picture, lines))
    if N > 1:                                          # by raw scores: levels tie in the top bin
        best = raw[:, names.index(args.by)].view(-1, N).argmax(1).tolist()       # of each N
        kept = [N * k + number for k, number in enumerate(best)]
        jobs, tiles = [jobs[k] for k in kept], [tiles[k] for k in kept]
    rows = [tiles[first:first + columns] for first in range(0, len(tiles), columns)]
    figure = grid(rows, max(1, 120 // x.shape[-1]), args.sweep,
                  [job["prompt"] for job in jobs[::columns]])
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("miro", json.dumps(vars(args) | model.config["sampler"] | {"pictures": jobs}))
    write_whole(Path(args.out), partial(figure.save, format="png", pnginfo=chunk))


def write_folder(args, model: Model, jobs: list[dict], wanted: list[dict]) -> None:
    """Single pictures, as GenEval has them: of prompt k NNNNN/metadata.jsonl, its line as JSON, and
    of picture i NNNNN/samples/NNNN.png; also metadata.jsonl (file_name, text), with which data.py
    imports the folder, and settings.json. Pictures that are there are kept.
    UserError, before anything is made: there are other files, or pictures of other settings."""
    out, paths = Path(args.out), []
    file, s_neg = out / "settings.json", read_targets(args.negative, model.rewards, 0.0, "negative")
    settings = dict(made_of=fingerprint(model, wanted), n=args.n, seed=args.seed, s_neg=s_neg,
                    s_pos=jobs[0]["s_pos"], negative_prompt=args.negative_prompt,
                    **model.config["sampler"])
    if any(out.glob("[!.]*")) and not (file.exists() and read_json(file) == settings):
        raise UserError(f"--out {out} has other files, or pictures of other settings: name a new "
                        "folder")
    hold(make_folder(out))
    for torn in out.glob("*/samples/.*.tmp"):                        # of a kill
        torn.unlink()
    write_json(file, settings)
    for k, want in enumerate(wanted):
        folder = make_folder(out / f"{k:05d}" / "samples")
        write_text(folder.with_name("metadata.jsonl"), json.dumps(want))
        paths += [folder / f"{i:04d}.png" for i in range(args.n)]
    lines = [{"file_name": path.relative_to(out).as_posix(), "text": job["prompt"]}
             for path, job in zip(paths, jobs)]
    write_text(out / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    missing = [k for k, path in enumerate(paths) if not path.exists()]
    for k, picture in zip(missing, painted(args, model, [jobs[k] for k in missing])):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        write_whole(paths[k], partial(image.save, format="png"))


def write_page(args, model: Model, prompts: list[str]) -> None:
    """One HTML file without a server, docs/page.html with pictures in it: a slider a reward, over
    all combinations of 5 or 3 levels if that are at most --page-pictures, else of 3 levels those
    that move at most two rewards; two noises; guidance off and the checkpoint's own.
    UserError: these are more, too, or the page cannot be written."""
    R, rewards, path = len(model.rewards), model.rewards, Path(args.page)
    seeds = [args.seed, args.seed + 1]
    guidances = sorted({0.0, model.config["sampler"]["guidance"]})
    own = read_targets([*model.config["targets"], *args.targets], rewards, 1.0, "--targets")
    settings = list(product(prompts, seeds, guidances))
    most = min(args.page_pictures // len(settings), (4096 // (model.net.config.size * 8)) ** 2
               if model.vae else 10_000)                     # of one sheet: larger ones are refused
    K = next((K for K in (5, 3) if K ** R <= most), 3)
    levels, base = np.linspace(0, 1, K).tolist(), [ceil(x * (K - 1) - 0.5) for x in own]
    points = [point for point in product(range(K), repeat=R)
              if K ** R <= most or sum(map(int.__ne__, point, base)) <= 2]
    total, columns = len(settings) * len(points), ceil(len(points) ** 0.5)
    if len(points) > most:
        raise UserError(f"--page-pictures {args.page_pictures}: {len(prompts)} prompts and {R} "
                        f"rewards take {total}: allow for more, or name fewer prompts")
    make_folder(path.parent)
    if path.is_dir():
        raise UserError(f"--page {path} is a folder: name a file")
    s = torch.tensor(levels)[torch.tensor(points, dtype=torch.long)]             # (P, R)
    names, sheets, measured = measurable(model, prompts), [], []
    with tqdm(total=total, unit="picture", disable=None) as bar:
        for prompt, seed, w in settings:
            texts, file = [prompt] * len(points), BytesIO()
            x = pictures(model, texts, s, args.negative, [seed] * len(points), w,
                         negative_prompt=args.negative_prompt, batch=args.batch)     # (P, 3, S, S)
            raw, side = score_all(names, x, texts), x.shape[-1]
            places = model.bins.select(names).to_target(raw) if names else raw       # (P, R')
            measured.append(np.asarray(100 * places).round().astype(int).tolist())
            x = torch.nn.functional.pad(x, (0, 0) * 3 + (0, columns ** 2 - len(x)))
            x = x.unflatten(0, (columns, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3)
            image = Image.fromarray(x.flatten(0, 1).numpy())                     # columns S squared
            image.save(file, "webp", lossless=side < 64, quality=80)
            sheets.append("data:image/webp;base64," + b64encode(file.getvalue()).decode())
            if len(sheets) == 1:
                print(f"{total} pictures, about {len(settings) * len(sheets[0]) / 1e6:.2g} MB")
            bar.update(len(points))
    about = (f"Checkpoint {Path(args.checkpoint).name}, {model.config['sampler']['steps']} steps a "
             "picture. The page begins at the levels nearest to those it recommends."
             + " At most two sliders leave that place at once." * (len(points) < K ** R))
    content = dict(rewards=rewards, levels=levels, base=base, points=points, prompts=prompts,
                   seeds=seeds, weights=guidances, names=names, measured=measured, side=side,
                   columns=columns, sheets=sheets, about=about)
    template = (Path(__file__).parent / "docs" / "page.html").read_text(encoding="utf-8")
    filled = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    write_text(path, template.replace("const DATA = null;", f"const DATA = {filled};"))
    print(f"wrote {path}")


def measurable(model: Model, prompts: list[str]) -> list[str]:
    """The rewards of a model that can be measured again in pictures of these prompts."""
    return [name for name in ANALYTIC if name in model.rewards
            and (name != "alignment" or all(map(reads, prompts)))]

if __name__ == "__main__":
    run(main)
