"""What no change of structure may move: pictures of the shipped checkpoint, velocities of the
release's small network, losses of the first steps on fixed batches.

`python tests/test_record.py` writes tests/record.safetensors anew: where numbers move on purpose.
"""
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import sample
import train
from model import PRESETS, Config, TextRIN

FILE = ROOT / "tests" / "record.safetensors"
CPU = torch.device("cpu")
ASKED = [("a red circle and a blue square", "all=1"), ("two green triangles in a photo", "all=0"),
         ("three pink squares", "all=0.75 alignment=1"), ("a yellow triangle", "contrast=0"),
         ("a circle above a triangle in a print", "all=0.5 colorfulness=1"), ("four circles", "")]


def pictures() -> torch.Tensor:
    """Six prompts at six requests, noise 0 to 5, the sampler of that time: (6, 3, 24, 24)."""
    model = sample.load(ROOT / "assets" / "shapes", CPU)
    s = torch.tensor([sample.read_targets(targets.split(), model.rewards, 1.0, "--targets")
                      for _, targets in ASKED])
    return sample.pictures(model, [prompt for prompt, _ in ASKED], s, guidance=0.5, steps=16,
                           solver="ab2", shift=3.0)


def velocities() -> dict[str, torch.Tensor]:
    """Of the network in tests/release, on the inputs that are kept there."""
    folder = ROOT / "tests" / "release"
    given, net = load_file(folder / "expected.safetensors"), sample.load(folder, CPU).net
    x_t, t, s, text, mask, z = (given[f"given.{name}"] for name in
                                ("x_t", "t", "s", "text", "text_mask", "z"))
    with torch.no_grad():
        v, latents, u = net(x_t, t, s, text, mask, z)
    return dict(v=v, z=latents, u=u)


def losses(steps: int = 20) -> torch.Tensor:
    """The mean loss of each step of a recipe like `shapes` at toy size, on batches drawn here."""
    args, _ = train.read_args(["--batch", "8", "--self-condition", "0.5", "--warmup", "2",
                               "--steps", "1150", "--matrix-lr", "0.01"])
    sizes = PRESETS["shapes"] | dict(size=12, latents=8, latent_dim=32, data_dim=32, blocks=1,
                                     text_dim=64)
    torch.manual_seed(0)
    net = TextRIN(Config(**sizes, rewards=("alignment", "contrast")))
    run = train.State(net, TextRIN(net.config), net, train.optimizers_for(net, args), {}, 0)
    numbers, found = torch.Generator().manual_seed(0), []
    for step in range(steps):
        normal = lambda *shape: torch.randn(*shape, generator=numbers)
        mask = torch.arange(5) < 1 + torch.arange(8)[:, None] % 5
        batch = [normal(8, 3, 12, 12), normal(8, 3, 12, 12), torch.sigmoid(normal(8)),
                 torch.sigmoid(normal(8, 2)), normal(8, 5, 64) * mask[..., None], mask,
                 torch.arange(8) % 2 == 0]
        found.append(train.train_step(run, args, step, batch, 1, torch.float32)[0].mean())
    return torch.stack(found)


def test_the_shipped_checkpoint_paints_the_pictures_that_it_always_painted():
    before, now = load_file(FILE)["pictures"].int(), pictures().int()
    assert now.shape == before.shape and (now - before).abs().max() <= 1


def test_the_releases_network_gives_the_velocities_that_it_always_gave():
    before = load_file(FILE)
    for name, now in velocities().items():
        assert torch.allclose(now, before[name], atol=1e-5 * float(before[name].abs().max()))


def test_the_first_steps_on_fixed_batches_have_the_losses_that_they_always_had():
    before, now = load_file(FILE)["losses"], losses()
    assert before[-1] < before[0]
    # torch 2.6 rounds otherwise than 2.14: 5e-4 apart after 20 steps of Muon
    assert now.tolist() == pytest.approx(before.tolist(), rel=2e-3)


if __name__ == "__main__":
    save_file(dict(pictures=pictures(), losses=losses(), **velocities()), FILE)
