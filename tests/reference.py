"""Side by side with the authors' miro-t2i: where "number for number" comes from.

    pip install --no-deps miro-t2i==0.1.4 && pip install einops
    python tests/reference.py            # every comparison, at a small size and at the released one
    python tests/reference.py --write    # tests/release/: what test_release.py holds this code to

miro-t2i is imported here and in benchmark.py alone: neither this project nor its tests need it.
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


def parts_of(config: dict) -> dict:
    """miro-t2i's network and preconditioning, of a config.json."""
    from miro.models.networks.rin import CADRINTextCond
    from miro.models.preconditioning import FlowPrecond
    return dict(network=CADRINTextCond(**config["network"]),
                preconditioning=FlowPrecond(**config["preconditioning"]))


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
    """The network and the preconditioning of miro-t2i, with the weights of a folder; its config."""
    config = json.loads((folder / "config.json").read_text())
    weights, parts = load_file(folder / "model.safetensors"), parts_of(config)
    for name, part in parts.items():
        part.eval().load_state_dict({key.removeprefix(f"{name}."): value for key, value
                                     in weights.items() if key.startswith(f"{name}.")})
    return *parts.values(), config


def write_folder(folder: Path, size: dict, keys, seed: int = 0) -> None:
    """Random weights in the release's layout, made and named by the release's classes."""
    from miro.models.preprocessing import PrecomputedSDLatentPreconditioning
    torch.manual_seed(seed)
    config = config_of(size, keys)
    parts = parts_of(config)
    with contextlib.redirect_stdout(io.StringIO()):
        norms = PrecomputedSDLatentPreconditioning(**config["data_preprocessing"])
    weights = {f"{name}.{key}": tensor for name, part in parts.items()
               for key, tensor in part.state_dict().items()}
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
def compare_network(folder: Path) -> dict:
    """v and z with and without earlier latents, and u: {name: difference}."""
    network, around, config = theirs(folder)
    keys, ours = config["coherence_keys"], sample.load(folder, "cpu").net
    given, found = inputs(config["network"], len(keys)), {}
    x_t = flow.path(given["x_0"], given["eps"], given["t"])
    for name, z in (("", None), (" from latents", given["z"])):
        v, latents, u = ours(x_t, given["t"], given["s"], given["text"], given["text_mask"], z)
        v_there, z_there, u_there = around(network, batch_of(given, keys, x_t, z),
                                           return_logvar=True)
        found |= {f"v{name}": apart(v, v_there), f"z{name}": apart(latents, z_there)}
    return found | {"u": apart(u, u_there.flatten())}


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


def theirs_sampled(folder: Path, steps: int, w: float, B: int = 2) -> tuple:
    """(x_0 of miro-t2i's sampler, what both were given): padded text, an empty negative."""
    network, around, config = theirs(folder)
    keys = config["coherence_keys"]
    given = inputs(config["network"], len(keys), B)
    given["s"][:] = given["s"][:1]
    given["empty"] = torch.randn(1, given["text"].shape[2],
                                 generator=torch.Generator().manual_seed(3))      # (1, E)
    text_neg = given["empty"].expand(B, 1, -1)                                    # (B, 1, E)
    return their_sampler(network, around, given, keys, text_neg, steps, w), given


@torch.no_grad()
def compare_sampler(folder: Path, steps: int = 50, w: float = 7.0) -> dict:
    """x_0 after guided Euler steps with self-conditioning."""
    x_0, given = theirs_sampled(folder, steps, w)
    text_neg, mask_neg = torch.zeros_like(given["text"]), torch.zeros_like(given["text_mask"])
    text_neg[:, :1], mask_neg[:, :1] = given["empty"], True
    branches = flow.branches(given["s"], torch.zeros_like(given["s"]), given["text"],
                             given["text_mask"], w, text_neg, mask_neg)
    ours = flow.sample(sample.load(folder, "cpu").net, given["eps"], branches, steps)
    return {f"x_0 after {steps} steps at w {w:g}": apart(ours, x_0)}


def their_loss(network, around, given: dict, keys, coin: torch.Tensor):
    """The release's loss of each sample (B,), with the times, noise and coins that are given."""
    from miro.models.loss import FlowMatchingLoss
    from miro.models.scheduler import LinearScheduler
    scheduler = LinearScheduler(start=1, end=0, clip_min=1e-9)

    class Fixed(FlowMatchingLoss):
        def _sample_t(self, *_):
            return given["t"]

        def latent_self_cond(self, preconditioning, network, batch, generator=None):
            self.self_cond_rate = 1.0                                # all run, the coin chooses
            return super().latent_self_cond(preconditioning, network, batch) * coin.view(-1, 1, 1)

    loss = Fixed(scheduler, None, do_gradnorm_reweighting=True)
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
    network, around, config = theirs(folder)
    parts = torch.nn.ModuleDict(dict(network=network, preconditioning=around)).to(dtype)
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
        given = inputs(config["network"], len(keys), B, seed=10 + step)
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


def our_picture(folder: Path, prompt: str, targets: dict, seed: int, steps: int, w: float):
    """The same by sample.py."""
    model = sample.load(folder, "cpu", None, str(FIXTURE / "t5"), str(FIXTURE / "vae"))
    return sample.pictures(model, [prompt], targets, seeds=[seed], guidance=w, steps=steps,
                           negative_prompt="")[0].permute(1, 2, 0).numpy()


def write_fixture() -> None:
    """tests/release/: a small model in the release's layout, and what miro-t2i makes of it."""
    write_folder(FIXTURE, SMALL, KEYS)
    network, around, _ = theirs(FIXTURE)
    given = inputs(SMALL, len(KEYS))
    x_t = flow.path(given["x_0"], given["eps"], given["t"])
    expected = {f"given.{name}": tensor for name, tensor in given.items()} | {"given.x_t": x_t}
    with torch.no_grad():
        for name, z in (("first", None), ("next", given["z"])):
            v, latents, u = around(network, batch_of(given, KEYS, x_t, z), return_logvar=True)
            expected |= {f"{name}.v": v, f"{name}.z": latents, f"{name}.u": u.flatten()}
    coin = torch.tensor([True, False, True])
    loss = their_loss(network, around, given, KEYS, coin)
    loss.mean().backward()
    expected |= {"loss.coin": coin, "loss.weighted": loss.detach()}
    parts = torch.nn.ModuleDict(dict(network=network, preconditioning=around))
    expected |= {f"gradient.{name}": p.grad.norm() for name, p in parts.named_parameters()
                 if p.grad is not None}
    expected["sampled"], sampled = theirs_sampled(FIXTURE, 50, 7.0)
    expected |= {f"sampled.{name}": tensor for name, tensor in sampled.items()}
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
            found = compare_network(Path(parent, str(number)))
            assert max(found.values()) < 1e-5, (keys, found)
        print(f"all {len(VARIANTS)} reward sets of the 16 checkpoints (two have all seven) load "
              "strictly; v, z and u differ by less than 1e-5")
        for name, size in (("small", SMALL), ("released", RELEASED))[:1 if args.small else 2]:
            folder = Path(parent, name)
            write_folder(folder, size, KEYS)
            found = compare_network(folder) | compare_sampler(folder, 50)
            if name == "small":
                found |= compare_training(folder, torch.float32)
                with doubled():
                    found |= compare_training(folder, torch.float64)
                for picture in PICTURES:
                    pair = (their_picture(folder, *picture), our_picture(folder, *picture))
                    off = np.abs(pair[0].astype(int) - pair[1].astype(int)).max()
                    found[f"picture of {picture[0]!r}, of 255"] = float(off)
            print(f"\n{name} size, random weights, the largest difference over the largest entry")
            for key, value in found.items():
                print(f"  {key:60} {value:.1e}")


if __name__ == "__main__":
    main()
