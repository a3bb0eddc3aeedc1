"""Side by side with the authors' miro-t2i: where "number for number" comes from.

    pip install --no-deps miro-t2i==0.1.4 && pip install einops
    python tests/reference.py            # every comparison, at a small size and at the released one
    python tests/reference.py --write    # tests/release/: what test_release.py holds this code to

miro-t2i is imported here and nowhere else: neither this project nor its tests need it. Weights are
random, the same in both codes; what differs is rounding. Everything is float32 on the CPU.
"""
import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import flow
import sample
import train
from model import RELEASE_REWARDS, TextRIN, release_name

FIXTURE = ROOT / "tests" / "release"
KEYS = tuple(map(RELEASE_REWARDS.get, ("clip", "aesthetic", "image_reward", "pick", "hpsv2", "vqa",
                                       "sci")))                         # in the release's order
VARIANTS = [KEYS, *([k for k in KEYS if k != key] for key in KEYS), *([key] for key in KEYS)]
SMALL = dict(data_size=8, data_dim=16, num_input_channels=4, num_latents=6, latents_dim=32,
             label_dim=24, num_processing_layers=1, num_blocks=2, patch_size=2, num_cond_tokens=1,
             read_write_heads=4, compute_heads=8, num_text_registers=4)
RELEASED = dict(data_size=32, data_dim=512, num_input_channels=4, num_latents=256, latents_dim=1024,
                label_dim=2048, num_processing_layers=4, num_blocks=4, patch_size=2,
                num_cond_tokens=77, read_write_heads=16, compute_heads=32, num_text_registers=16)
WORDS = "a photo of the red blue circle square and two".split()


def theirs(folder: Path) -> tuple:
    """The network and the preconditioning of miro-t2i, with the weights of a folder."""
    from miro.models.networks.rin import CADRINTextCond
    from miro.models.preconditioning import FlowPrecond
    config, weights = json.loads((folder / "config.json").read_text()), load_file(
        folder / "model.safetensors")
    parts = []
    for kind, name in ((CADRINTextCond, "network"), (FlowPrecond, "preconditioning")):
        part = kind(**config[name])
        part.load_state_dict({key.removeprefix(f"{name}."): value for key, value in weights.items()
                              if key.startswith(f"{name}.")})
        parts.append(part)
    return tuple(parts)


def write_folder(folder: Path, network: dict, keys, seed: int = 0) -> None:
    """Random weights in the release's layout, made and named by the release's classes."""
    from miro.models.networks.rin import CADRINTextCond
    from miro.models.preconditioning import FlowPrecond
    from miro.models.preprocessing import PrecomputedSDLatentPreconditioning
    torch.manual_seed(seed)
    network = network | dict(coherence_keys=list(keys), use_cond_rin_block=True,
                             concat_cond_token_to_latents=False, use_self_conditioning=True)
    around = dict(num_latents=network["num_latents"], latents_dim=network["latents_dim"],
                  do_normalization="noise_driven", sigma_data=0.5)
    with contextlib.redirect_stdout(io.StringIO()):
        norms = PrecomputedSDLatentPreconditioning(channel_wise_normalisation=True)
    parts = dict(network=CADRINTextCond(**network), preconditioning=FlowPrecond(**around),
                 data_preprocessing=norms, postprocessing=norms)
    weights = {f"{name}.{key}": tensor for name, part in parts.items()
               for key, tensor in part.state_dict().items()}
    for name, tensor in weights.items():      # nothing stays at a start such as 0, 1 or 0.02
        if tensor.is_floating_point() and name.startswith(("network", "precond")):
            std = 0.3 if tensor.ndim < 2 else min(0.3, 1.5 * tensor.shape[-1] ** -0.5)
            if not name.endswith(("freqs", "phases")):
                norm = tensor.ndim == 1 and name.endswith("weight")
                tensor.normal_(std=std).add_(float(norm))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()},
              folder / "model.safetensors")
    config = dict(network=network, preconditioning=around, coherence_keys=list(keys),
                  data_preprocessing=dict(channel_wise_normalisation=True),
                  postprocessing=dict(channel_wise_normalisation=True),
                  data_resolution=network["data_size"], img_resolution=8 * network["data_size"],
                  max_text_len=12, vae_repo="vae", text_encoder_repo="t5",
                  sampler_defaults=dict(num_inference_steps=50, guidance_scale=7.0))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_encoders(folder: Path, dim: int) -> None:
    """A small T5 encoder with a tokenizer of words and a small VAE, in the layout of the hub."""
    from diffusers import AutoencoderKL
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    torch.manual_seed(1)
    config = T5Config(vocab_size=16, d_model=dim, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
                      feed_forward_proj="gated-gelu")
    T5EncoderModel(config).save_pretrained(folder / "t5")
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>",
                                                             special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder / "t5")
    AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
                  up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4,
                  layers_per_block=1).save_pretrained(folder / "vae")


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
    network, around = theirs(folder)
    config = json.loads((folder / "config.json").read_text())
    keys, ours = config["coherence_keys"], sample.load(folder, torch.device("cpu")).net
    given, found = inputs(config["network"], len(keys)), {}
    x_t = flow.path(given["x_0"], given["eps"], given["t"])
    for name, z in (("", None), (" from latents", given["z"])):
        v, latents, u = ours(x_t, given["t"], given["s"], given["text"], given["text_mask"], z)
        v_there, z_there, u_there = around.eval()(network.eval(), batch_of(given, keys, x_t, z),
                                                  return_logvar=True)
        found |= {f"v{name}": apart(v, v_there), f"z{name}": apart(latents, z_there)}
    return found | {"u": apart(u, u_there.flatten())}


@torch.no_grad()
def theirs_sampled(folder: Path, steps: int, w: float, B: int = 2) -> tuple:
    """(noise, x_0 of miro-t2i's sampler, what both were given): padded text, empty negative."""
    from miro.models.sampler import flow_euler_sampler
    from miro.models.scheduler import LinearScheduler
    network, around = theirs(folder)
    config = json.loads((folder / "config.json").read_text())
    keys, given = config["coherence_keys"], inputs(config["network"], len(config["coherence_keys"]),
                                                   B)
    given["s"][:] = given["s"][:1]                           # one vector of targets a call, there
    given["empty"] = torch.randn(1, given["text"].shape[2],
                                 generator=torch.Generator().manual_seed(3))      # (1, E)
    names = [f"{key}_coherence" for key in keys]
    batch = batch_of(given, keys, given["eps"], None)
    uncond = dict(text_tokens_embeddings=given["empty"].expand(B, 1, -1).clone(),
                  text_tokens_mask=torch.ones(B, 1, dtype=torch.bool))
    x_0 = flow_euler_sampler(
        lambda b: around.eval()(network.eval(), b), batch, num_steps=steps, cfg_rate=w,
        scheduler=LinearScheduler(start=1, end=0, clip_min=1e-9), conditioning_keys=["text_tokens"],
        uncond_tokens=uncond, coherence_keys=names,
        coherence_values={name: float(v) for name, v in zip(names, given["s"][0])},
        uncoherence_values=dict.fromkeys(names, 0.0), sampling_dtype=torch.float32)
    return x_0, given


@torch.no_grad()
def ours_sampled(net: TextRIN, given: dict, steps: int, w: float) -> torch.Tensor:
    """The same by flow.sample."""
    text_neg = torch.zeros_like(given["text"])
    text_neg[:, :1] = given["empty"]
    mask_neg = torch.zeros_like(given["text_mask"])
    mask_neg[:, :1] = True
    return flow.sample(net, given["eps"], given["s"], torch.zeros_like(given["s"]), given["text"],
                       given["text_mask"], text_neg, mask_neg, w=w, steps=steps, solver="euler")


def compare_sampler(folder: Path, steps: int = 50, w: float = 7.0) -> dict:
    """x_0 after guided Euler steps with self-conditioning."""
    x_0, given = theirs_sampled(folder, steps, w)
    net = sample.load(folder, torch.device("cpu")).net
    return {f"x_0 after {steps} steps at w {w:g}": apart(ours_sampled(net, given, steps, w), x_0)}


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
    randn, torch.randn = torch.randn, lambda *_, **__: given["eps"]              # its noise, too
    try:
        return loss(around, network, None, batch, 0)[0].mean((1, 2, 3))
    finally:
        torch.randn = randn


@contextlib.contextmanager
def doubled():
    """Both codes compute in float64, where they name float32, too: what is left of a difference is
    then no rounding."""
    to, single = torch.Tensor.to, torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    torch.Tensor.to = lambda x, *a, **k: to(x, *[torch.float64 if v is torch.float32 else v
                                                 for v in a], **k)
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float = to, single


def compare_training(folder: Path, dtype: torch.dtype, steps: int = 10) -> dict:
    """The loss and the gradients of one batch, and the weights after some steps of LAMB.

    The keys' biases are left out: a softmax does not see what is added to all of its logits, so
    their gradient is zero but for rounding, which LAMB scales up."""
    from miro.utils.optimizers import Lamb
    network, around = (part.to(dtype) for part in theirs(folder))
    net = sample.load(folder, torch.device("cpu")).net.train().to(dtype)
    config, B = json.loads((folder / "config.json").read_text()), 4
    keys = config["coherence_keys"]
    args = train.read_args(["--preset", "paper"])
    [mine] = train.optimizers_for(net, args)
    norms = {name for name, part in network.named_modules()
             if type(part).__name__ in ("LayerNorm", "RMSNorm")}
    plain = {name for name, _ in network.named_parameters()
             if name.endswith("bias") or name.rpartition(".")[0] in norms}
    named = dict(network.named_parameters())
    groups = [dict(params=[*(named[name] for name in named if name not in plain),
                           *around.parameters()],
                   weight_decay=args.weight_decay, layer_adaptation=True),
              dict(params=[named[name] for name in named if name in plain], weight_decay=0.0,
                   layer_adaptation=False)]
    other = Lamb(groups, lr=args.lr, decouple=False)
    parts = (dict(network.named_parameters(prefix="network"))
             | dict(around.named_parameters(prefix="preconditioning")))
    pairs = [(p, parts[release_name(net, name)]) for name, p in net.named_parameters()
             if not name.endswith("k_norm.bias")]
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
    release.DEFAULT_VAE = str(folder / "vae")
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline = release.MiroPipeline.from_pretrained(str(folder),
                                                        text_encoder=str(folder / "t5"))
    return pipeline(prompt, reward_targets=targets, num_inference_steps=steps, guidance_scale=w,
                    generator=torch.Generator().manual_seed(seed), output_type="numpy")[0]


def our_picture(folder: Path, prompt: str, targets: dict, seed: int, steps: int, w: float):
    """The same by sample.py, as a user calls it."""
    from PIL import Image
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        levels = [f"{key}={level}" for key, level in targets.items()]
        asked = ["--targets", *levels] if levels else []
        sample.main(["--checkpoint", str(folder), "--prompt", prompt, *asked, "--seed", str(seed),
                     "--steps", str(steps), "--guidance", str(w), "--negative-prompt", "",
                     "--text-encoder", str(folder / "t5"), "--vae", str(folder / "vae"),
                     "--out", out])
        return np.asarray(Image.open(Path(out) / "00000.png"))


PICTURES = (("a red circle", {}, 0, 50, 7.0),
            ("two blue square", {"aesthetic_score": 0.625}, 3, 10, 2.0),
            ("a photo of the red circle and the blue square", {"vqa_score": 0.0}, 5, 7, 0.0))


def write_fixture() -> None:
    """tests/release/: a small model in the release's layout, and what miro-t2i makes of it."""
    shutil.rmtree(FIXTURE, ignore_errors=True)
    write_folder(FIXTURE, SMALL, KEYS)
    write_encoders(FIXTURE, SMALL["label_dim"])
    np.save(FIXTURE / "uncond_embedding.npy", np.ones((1, SMALL["label_dim"]), np.float32))
    network, around = theirs(FIXTURE)
    given = inputs(SMALL, len(KEYS))
    x_t = flow.path(given["x_0"], given["eps"], given["t"])
    expected = {f"given.{name}": tensor for name, tensor in given.items()} | {"given.x_t": x_t}
    with torch.no_grad():
        for name, z in (("first", None), ("next", given["z"])):
            v, latents, u = around.eval()(network.eval(), batch_of(given, KEYS, x_t, z),
                                          return_logvar=True)
            expected |= {f"{name}.v": v, f"{name}.z": latents, f"{name}.u": u.flatten()}
    coin = torch.tensor([True, False, True])
    loss = their_loss(network, around, given, KEYS, coin)
    loss.mean().backward()
    expected |= {"loss.coin": coin, "loss.weighted": loss.detach()}
    for part, name in ((network, "network"), (around, "preconditioning")):
        expected |= {f"gradient.{name}.{key}": p.grad.norm() for key, p in part.named_parameters()
                     if p.grad is not None}
    x_0, sampled = theirs_sampled(FIXTURE, 50, 7.0)
    expected |= {f"sampled.{name}": tensor for name, tensor in sampled.items()} | {"sampled": x_0}
    for number, picture in enumerate(PICTURES):
        expected[f"picture.{number}"] = torch.from_numpy(their_picture(FIXTURE, *picture).copy())
    save_file({name: tensor.contiguous() for name, tensor in expected.items()},
              FIXTURE / "expected.safetensors")
    size = sum(file.stat().st_size for file in FIXTURE.rglob("*") if file.is_file())
    print(f"wrote {FIXTURE}, {size / 1e6:.2f} MB")


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
            write_encoders(folder, size["label_dim"])
            np.save(folder / "uncond_embedding.npy", np.ones((1, size["label_dim"]), np.float32))
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
