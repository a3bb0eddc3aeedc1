"""Side by side with the authors' miro-t2i: where "number for number" comes from.

    pip install --no-deps miro-t2i==0.1.4 && pip install einops
    python tests/reference.py            # every comparison, at a small size and at the released one
    python tests/reference.py --write    # tests/release/: what test_release.py holds this code to

miro-t2i is imported here and by gpu.py alone: neither this project nor its tests need it.
Weights are random, the same in both codes; what differs is rounding. Everything is float32 on the
CPU. tests/release/t5 and vae, a small T5 with a tokenizer of ten words and a small VAE, both
random, are not written anew.
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import flow
import sample
import train
from model import RELEASE_REWARDS, release_name

FIXTURE = ROOT / "tests" / "release"
KEYS = tuple(RELEASE_REWARDS.values())
VARIANTS = [KEYS, *([k for k in KEYS if k != key] for key in KEYS), *([key] for key in KEYS)]
SMALL = dict(data_size=8, data_dim=16, num_input_channels=4, num_latents=6, latents_dim=32,
             label_dim=24, num_processing_layers=1, num_blocks=2, patch_size=2, num_cond_tokens=1,
             read_write_heads=4, compute_heads=8, num_text_registers=4)
RELEASED = dict(data_size=32, data_dim=512, num_input_channels=4, num_latents=256, latents_dim=1024,
                label_dim=2048, num_processing_layers=4, num_blocks=4, patch_size=2,
                num_cond_tokens=77, read_write_heads=16, compute_heads=32, num_text_registers=16)
PICTURES = (("a red circle", {}, 0, 50, 7.0),                     # prompt, targets, seed, steps, w
            ("two blue square", {"aesthetic_score": 0.625}, 3, 10, 2.0),
            ("a photo of the red circle and the blue square", {"vqa_score": 0.0}, 5, 7, 0.0))


def parts_of(config: dict) -> torch.nn.ModuleDict:
    """miro-t2i's network and preconditioning, of a config.json."""
    from miro.models.networks.rin import CADRINTextCond
    from miro.models.preconditioning import FlowPrecond
    return torch.nn.ModuleDict(dict(network=CADRINTextCond(**config["network"]),
                                    preconditioning=FlowPrecond(**config["preconditioning"])))


def config_of(size: dict, keys) -> dict:
    """The release's config.json of a network of that size."""
    per_channel = dict(channel_wise_normalisation=True)
    return dict(
        network=size | dict(coherence_keys=list(keys), use_cond_rin_block=True,
                            concat_cond_token_to_latents=False, use_self_conditioning=True),
        preconditioning=dict(num_latents=size["num_latents"], latents_dim=size["latents_dim"],
                             do_normalization="noise_driven", sigma_data=0.5),
        coherence_keys=list(keys), data_preprocessing=per_channel, postprocessing=per_channel,
        data_resolution=size["data_size"], img_resolution=8 * size["data_size"], max_text_len=12,
        vae_repo="vae", text_encoder_repo="t5",
        sampler_defaults=dict(num_inference_steps=50, guidance_scale=7.0))


def theirs(folder: Path) -> tuple:
    """The parts of miro-t2i with the weights of a folder, and its network's configuration."""
    config = json.loads((folder / "config.json").read_text())
    parts = parts_of(config).eval()
    weights = load_file(folder / "model.safetensors")
    parts.load_state_dict({k: x for k, x in weights.items() if k.partition(".")[0] in parts})
    return parts, config["network"]


def write_folder(folder: Path, size: dict, keys, seed: int = 0) -> None:
    """Random weights in the release's layout, made and named by the release's classes."""
    from miro.models.preprocessing import PrecomputedSDLatentPreconditioning
    torch.manual_seed(seed)
    config = config_of(size, keys)
    weights = parts_of(config).state_dict()
    with contextlib.redirect_stdout(io.StringIO()):
        norms = PrecomputedSDLatentPreconditioning(**config["data_preprocessing"])
    for name, tensor in weights.items():      # nothing stays at a start such as 0, 1 or 0.02
        if tensor.is_floating_point() and not name.endswith(("freqs", "phases")):
            std = 0.3 if tensor.ndim < 2 else min(0.3, 1.5 * tensor.shape[-1] ** -0.5)
            tensor.normal_(std=std).add_(float(tensor.ndim == 1 and name.endswith("weight")))
    for name in ("data_preprocessing", "postprocessing"):
        weights |= {f"{name}.{key}": tensor for key, tensor in norms.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()},
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    np.save(folder / "uncond_embedding.npy", np.ones((1, size["label_dim"]), np.float32))


def inputs(network: dict, rewards: int, B: int = 3, L: int = 9, seed: int = 2) -> dict:
    """x_0, eps, t, s, text with padding, its mask, and latents of a step before."""
    g = torch.Generator().manual_seed(seed)
    side, channels = network["data_size"], network["num_input_channels"]
    lengths = torch.linspace(1, L, B).long()
    return dict(x_0=torch.randn(B, channels, side, side, generator=g) * 0.5,
                eps=torch.randn(B, channels, side, side, generator=g),
                t=torch.linspace(0.03, 0.97, B), s=torch.rand(B, rewards, generator=g),
                text=torch.randn(B, L, network["label_dim"], generator=g),
                text_mask=torch.arange(L) < lengths[:, None],
                z=torch.randn(B, network["num_latents"], network["latents_dim"], generator=g))


def batch_of(given: dict, keys, x_t: torch.Tensor, z) -> dict:
    """The same inputs as miro-t2i's dictionary."""
    levels = {f"{key}_coherence": given["s"][:, r] for r, key in enumerate(keys)}
    return dict(y=x_t.clone(), gamma=1 - given["t"], previous_latents=z, **levels,
                text_tokens_embeddings=given["text"], text_tokens_mask=given["text_mask"])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest entry."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def their_outputs(folder: Path) -> dict:
    """What miro-t2i makes: v, z and u of a first step, and of a next one, from earlier latents; x_0
    after 50 guided steps, of padded text against an empty negative; and of what it makes them."""
    parts, config = theirs(folder)
    keys, found = config["coherence_keys"], {}
    given, start = inputs(config, len(keys)), inputs(config, len(keys), B=2)
    given["x_t"] = flow.path(given["x_0"], given["eps"], given["t"])
    for name, z in (("first", None), ("next", given["z"])):
        batch = batch_of(given, keys, given["x_t"], z)
        v, latents, u = parts["preconditioning"](parts["network"], batch, return_logvar=True)
        found |= {f"{name}.v": v, f"{name}.z": latents, f"{name}.u": u.flatten()}
    start["s"][:] = start["s"][:1]
    start["empty"] = torch.randn(1, config["label_dim"], generator=torch.Generator().manual_seed(3))
    text_neg = start["empty"].expand(2, 1, -1)                                   # (B, 1, E)
    found["sampled"] = their_sampler(*parts.values(), start, keys, text_neg, 50, 7.0)
    found |= {f"sampled.{name}": tensor for name, tensor in start.items()}
    return found | {f"given.{name}": tensor for name, tensor in given.items()}


@torch.no_grad()
def compare_outputs(folder: Path) -> dict:
    """The same of our code: {name: difference}."""
    there, net, here = their_outputs(folder), sample.load(folder, "cpu").net, {}
    given, start = ({name.removeprefix(kind): tensor for name, tensor in there.items()
                     if name.startswith(kind)} for kind in ("given.", "sampled."))
    for name, z in (("first", None), ("next", given["z"])):
        outputs = net(given["x_t"], given["t"], given["s"], given["text"], given["text_mask"], z)
        here |= {f"{name}.{part}": x for part, x in zip("vzu", outputs)}
    text_neg, mask_neg = torch.zeros_like(start["text"]), torch.zeros_like(start["text_mask"])
    text_neg[:, :1], mask_neg[:, :1] = start["empty"], True
    branches = flow.branches(start["s"], torch.zeros_like(start["s"]), start["text"],
                             start["text_mask"], 7.0, text_neg, mask_neg)
    here["sampled"] = flow.sample(net, start["eps"], branches, 50)
    return {name: apart(x, there[name]) for name, x in here.items()}


@torch.no_grad()
def their_sampler(network, around, given: dict, keys, text_neg, steps: int, w: float,
                  dtype=torch.float32):
    """x_0 of miro-t2i's sampler, which takes one vector of targets a call: the first sample's."""
    from miro.models.sampler import flow_euler_sampler
    from miro.models.scheduler import LinearScheduler
    names = [f"{key}_coherence" for key in keys]
    mask = torch.ones(text_neg.shape[:2], dtype=torch.bool, device=text_neg.device)
    return flow_euler_sampler(
        lambda b: around(network, b), batch_of(given, keys, given["eps"], None), num_steps=steps,
        cfg_rate=w, scheduler=LinearScheduler(start=1, end=0, clip_min=1e-9),
        conditioning_keys=["text_tokens"], coherence_keys=names, sampling_dtype=dtype,
        uncond_tokens=dict(text_tokens_embeddings=text_neg.clone(), text_tokens_mask=mask),
        coherence_values={name: float(v) for name, v in zip(names, given["s"][0])},
        uncoherence_values=dict.fromkeys(names, 0.0))


def their_loss(network, around, given: dict, keys, coin: torch.Tensor):
    """The release's loss of each sample (B,), with the times, noise and coins that are given."""
    from miro.models.loss import FlowMatchingLoss
    from miro.models.scheduler import LinearScheduler
    scheduler = LinearScheduler(start=1, end=0, clip_min=1e-9)
    loss = FlowMatchingLoss(scheduler, None, do_gradnorm_reweighting=True, self_cond_rate=1.0)
    condition = loss.latent_self_cond                              # of all, the coin chooses
    loss._sample_t = lambda *_: given["t"]
    loss.latent_self_cond = lambda *batch, **_: condition(*batch) * coin.view(-1, 1, 1)
    batch = batch_of(given, keys, given["eps"], torch.zeros_like(given["z"]))
    batch["x_0"] = given["x_0"]
    with mock.patch("torch.randn", lambda *_, **__: given["eps"]):               # its noise, too
        return loss(around, network, None, batch, 0)[0].mean((1, 2, 3))


@contextlib.contextmanager
def doubled():
    """Both codes compute in float64, where they name float32, too: no difference is rounding."""
    to, double = torch.Tensor.to, {torch.float32: torch.float64}
    with mock.patch("torch.Tensor.float", torch.Tensor.double), mock.patch(
            "torch.Tensor.to", lambda x, *a, **k: to(x, *(double.get(v, v) for v in a), **k)):
        yield


def compare_training(folder: Path, dtype: torch.dtype, steps: int = 10) -> dict:
    """The loss and the gradients of one batch, and the weights after some steps of LAMB. Without
    keys' biases: no softmax sees them, so that their gradient is rounding, which LAMB scales up."""
    from miro.utils.optimizers import Lamb
    parts, config = theirs(folder)
    network, around = parts.to(dtype).values()
    net, keys, B = sample.load(folder, "cpu").net.train().to(dtype), config["coherence_keys"], 4
    args, _ = train.read_args(["--preset", "paper"])
    [mine] = train.optimizers_for(net, args)
    norms = {name for name, part in network.named_modules()
             if type(part).__name__ in ("LayerNorm", "RMSNorm")}
    plain, decayed = [], [*around.parameters()]
    for name, p in network.named_parameters():
        chosen = name.endswith("bias") or name.rpartition(".")[0] in norms
        (plain if chosen else decayed).append(p)
    other = Lamb([dict(params=decayed, weight_decay=args.weight_decay, layer_adaptation=True),
                  dict(params=plain, weight_decay=0.0, layer_adaptation=False)],
                 lr=args.lr, decouple=False)
    pairs = [(p, parts.get_parameter(release_name(net, name)))
             for name, p in net.named_parameters() if not name.endswith("k_norm.bias")]
    found = {}
    for step in range(steps):
        given = inputs(config, len(keys), B, seed=10 + step)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
        coin = torch.arange(B) != step % B
        x_0, eps, t, s, text, mask, _ = given.values()
        weighted = flow.loss(net, x_0, eps, t, s, text, mask, coin)[1]           # (B,)
        there = their_loss(network, around, given, keys, coin)                   # (B,)
        for optimizer, loss in ((mine, weighted), (other, there)):
            optimizer.zero_grad()
            loss.mean().backward()
        if step == 0:
            found["loss"] = apart(weighted, there)
            found["gradients, the worst"] = max(apart(p.grad, q.grad) for p, q in pairs)
        mine.step()
        other.step()
    found[f"loss at step {steps}"] = apart(weighted, there)
    found[f"weights after {steps} steps, the worst"] = max(apart(p, q) for p, q in pairs)
    return {f"{name}, {str(dtype).removeprefix('torch.')}": value for name, value in found.items()}


def their_picture(folder: Path, prompt: str, targets: dict, seed: int, steps: int, w: float):
    """uint8 (H, W, 3) of MiroPipeline, which reads its VAE from a constant of its module."""
    import miro.pipeline as release
    release.DEFAULT_VAE = str(FIXTURE / "vae")
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline = release.MiroPipeline.from_pretrained(str(folder),
                                                        text_encoder=str(FIXTURE / "t5"))
    return pipeline(prompt, reward_targets=targets, num_inference_steps=steps, guidance_scale=w,
                    generator=torch.Generator().manual_seed(seed), output_type="numpy")[0]


def compare_pictures(folder: Path) -> dict:
    """The pictures of sample.py, in steps of 255."""
    model = sample.load(folder, "cpu", None, str(FIXTURE / "t5"), str(FIXTURE / "vae"))
    found = {}
    for prompt, targets, seed, steps, w in PICTURES:
        there = their_picture(folder, prompt, targets, seed, steps, w)
        here = sample.pictures(model, [prompt], targets, seeds=[seed], guidance=w, steps=steps,
                               negative_prompt="")[0].permute(1, 2, 0).numpy()
        off = np.abs(there.astype(int) - here.astype(int)).max()
        found[f"picture of {prompt!r}, of 255"] = float(off)
    return found


def write_fixture() -> None:
    """tests/release/: a small model in the release's layout, and what miro-t2i makes of it."""
    write_folder(FIXTURE, SMALL, KEYS)
    expected, [parts, _] = their_outputs(FIXTURE), theirs(FIXTURE)
    coin = torch.tensor([True, False, True])
    loss = their_loss(*parts.values(), inputs(SMALL, len(KEYS)), KEYS, coin)
    loss.mean().backward()
    expected |= {"loss.coin": coin, "loss.weighted": loss.detach()}
    expected |= {f"gradient.{name}": p.grad.norm() for name, p in parts.named_parameters()
                 if p.grad is not None}
    for number, picture in enumerate(PICTURES):
        expected[f"picture.{number}"] = torch.from_numpy(their_picture(FIXTURE, *picture).copy())
    save_file({name: tensor.contiguous() for name, tensor in expected.items()},
              FIXTURE / "expected.safetensors")
    print(f"wrote {FIXTURE}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write tests/release/")
    parser.add_argument("--small", action="store_true", help="leave out the released size")
    args = parser.parse_args()
    if args.write:
        return write_fixture()
    with tempfile.TemporaryDirectory() as parent:
        for number, keys in enumerate(tqdm(VARIANTS, desc="reward sets", leave=False)):
            write_folder(Path(parent, str(number)), SMALL, keys, seed=number)
            found = compare_outputs(Path(parent, str(number)))
            assert max(found.values()) < 1e-5, (keys, found)
        print(f"all {len(VARIANTS)} reward sets of the 16 checkpoints (two have all seven) load "
              "strictly; v, z, u and x_0 after 50 steps differ by less than 1e-5")
        for name, size in (("small", SMALL), ("released", RELEASED))[:1 if args.small else 2]:
            folder = Path(parent, name)
            write_folder(folder, size, KEYS)
            found = compare_outputs(folder)
            if name == "small":
                found |= compare_training(folder, torch.float32)
                with doubled():
                    found |= compare_training(folder, torch.float64)
                found |= compare_pictures(folder)
            print(f"\n{name} size, random weights, the largest difference over the largest entry")
            for key, value in found.items():
                print(f"  {key:60} {value:.1e}")


if __name__ == "__main__":
    main()
