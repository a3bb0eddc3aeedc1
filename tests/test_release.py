"""The release's layout: what miro-t2i 0.1.4 made of tests/release/ (tests/reference.py --write made
both), our code makes, too; and what does not fit stops with its name."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run, sentences
from PIL import Image
from safetensors.torch import load_file, save_file

import flow
import sample
from model import RELEASE_REWARDS, release_name

FOLDER = ROOT / "tests" / "release"
CPU = torch.device("cpu")
ENCODERS = ["--text-encoder", FOLDER / "t5", "--vae", FOLDER / "vae"]
REWARDS = ("clip", "aesthetic", "image_reward", "pick", "hpsv2", "vqa", "sci")
# As PICTURES of reference.py: prompt, targets, seed, steps, w.
PICTURES = (("a red circle", [], 0, 50, 7.0),
            ("two blue square", ["aesthetic_score=0.625"], 3, 10, 2.0),
            ("a photo of the red circle and the blue square", ["vqa=0"], 5, 7, 0.0))


@pytest.fixture(scope="module")
def expected() -> dict:
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module")
def model() -> sample.Model:
    return sample.load(FOLDER, CPU)


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the release's folder to damage."""
    return Path(shutil.copytree(FOLDER, tmp_path / "there"))


def given(expected: dict, prefix: str = "given") -> dict:
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in expected.items()
            if name.startswith(f"{prefix}.")}


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest entry."""
    return float((a - b).detach().abs().max() / b.abs().max())


# ---- the same numbers ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["first", "next"])
def test_velocity_latents_and_log_variance_are_the_releases(model, expected, name):
    i = given(expected)
    with torch.no_grad():
        v, z, u = model.net(i["x_t"], i["t"], i["s"], i["text"], i["text_mask"],
                            i["z"] if name == "next" else None)
    assert apart(v, expected[f"{name}.v"]) < 1e-5
    assert apart(z, expected[f"{name}.z"]) < 1e-5
    assert apart(u, expected[f"{name}.u"]) < 1e-5


def test_the_loss_and_its_gradients_are_the_releases(expected):
    net, i = sample.load(FOLDER, CPU).net.train(), given(expected)
    weighted = flow.loss(net, i["x_0"], i["eps"], i["t"], i["s"], i["text"], i["text_mask"],
                         expected["loss.coin"])[1]
    assert apart(weighted, expected["loss.weighted"]) < 1e-6
    weighted.mean().backward()
    wanted = {name: float(expected[f"gradient.{release_name(net, name)}"])
              for name, _ in net.named_parameters()}
    # Rounding is shared: it is some 1e-10 of the largest gradient, whatever the machine, and those
    # of q and k norms are small. Keys' biases have no gradient at all: no softmax sees them.
    largest = max(wanted.values())
    for name, p in net.named_parameters():
        noise = largest * (1e-7 if name.endswith("k_norm.bias") else 1e-9)
        assert float(p.grad.norm()) == pytest.approx(wanted[name], rel=3e-5, abs=noise), name


def test_fifty_guided_steps_end_where_the_releases_sampler_ends(model, expected):
    i = given(expected, "sampled")
    text_neg, mask_neg = torch.zeros_like(i["text"]), torch.zeros_like(i["text_mask"])
    text_neg[:, :1], mask_neg[:, :1] = i["empty"], True
    x_0 = flow.sample(model.net, i["eps"], i["s"], torch.zeros_like(i["s"]), i["text"],
                      i["text_mask"], text_neg, mask_neg, w=7.0, steps=50, solver="euler")
    assert apart(x_0, expected["sampled"]) < 1e-4


@pytest.mark.parametrize("number", range(len(PICTURES)))
def test_the_picture_of_a_command_is_the_pipelines(tmp_path, expected, number):
    prompt, targets, seed, steps, w = PICTURES[number]
    asked = ["--targets", *targets] if targets else []
    code, _, err = run("sample.py", "--checkpoint", FOLDER, "--prompt", prompt, *asked, "--seed",
                       seed, "--steps", steps, "--guidance", w, "--negative-prompt", "", *ENCODERS,
                       "--out", tmp_path / "out")
    assert code == 0, err
    picture = np.asarray(Image.open(tmp_path / "out" / "00000.png")).astype(int)
    assert np.abs(picture - expected[f"picture.{number}"].numpy().astype(int)).max() <= 1


def test_what_is_computed_once_changes_no_result(model, expected):
    i = given(expected)
    asked = (i["s"], i["text"], i["text_mask"])
    with torch.no_grad():
        known = model.net.condition(*asked)
        for z in (None, i["z"]):
            once = model.net(i["x_t"], i["t"], *asked, z, known)
            anew = model.net(i["x_t"], i["t"], *asked, z)
            assert all(torch.equal(a, b) for a, b in zip(once, anew))
        other = model.net.condition(1 - i["s"], *asked[1:])              # and it is what is read
        assert not torch.equal(model.net(i["x_t"], i["t"], *asked, None, other)[0],
                               model.net(i["x_t"], i["t"], *asked)[0])


# ---- the one door --------------------------------------------------------------------------------

def test_the_releases_folder_is_read_with_its_settings(model):
    assert model.rewards == REWARDS
    assert model.config["sampler"] == dict(guidance=7.0, steps=50, solver="euler", shift=1.0)
    scale, bias = torch.tensor([7.8518, 5.8465, 6.8716, 5.3140]), torch.tensor([-0.3480, 0.3754,
                                                                                 0.0419, 2.4331])
    assert torch.allclose(torch.tensor(model.config["std"]), scale / 0.5)      # z = x_0 std + mean
    assert torch.allclose(torch.tensor(model.config["mean"]), bias)
    assert torch.equal(model.empty, torch.ones(1, 24))


def test_the_releases_reward_names_are_aliases(model):
    for here, there in RELEASE_REWARDS.items():
        assert (sample.read_targets([f"{there}=0.25"], model.rewards, 1.0, "--targets")
                == sample.read_targets([f"{here}=0.25"], model.rewards, 1.0, "--targets"))


def test_every_tensor_of_the_release_has_one_name_here(model):
    names = [release_name(model.net, name) for name in model.net.state_dict()]
    there = {name for name, tensor in load_file(FOLDER / "model.safetensors").items()
             if tensor.dtype != torch.bool and name.startswith(("network.", "preconditioning."))}
    assert len(names) == len(set(names)) and set(names) == there


def test_a_name_of_the_hub_is_downloaded_with_its_variant(monkeypatch):
    import huggingface_hub
    calls = []

    def hf_hub_download(repository, name, subfolder=None):
        calls.append((repository, name, subfolder))
        return str(FOLDER / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert sample.find("nicolas-dufour/miro-ablations", "miro-only-clip") == FOLDER
    assert {call[::2] for call in calls} == {("nicolas-dufour/miro-ablations", "miro-only-clip")}
    assert {call[1] for call in calls} == {"config.json", "model.safetensors",
                                           "uncond_embedding.npy"}


def test_a_repository_of_ours_has_no_empty_caption(monkeypatch):
    import huggingface_hub
    given = ["config.json", "model.safetensors"]

    def hf_hub_download(repository, name, subfolder=None):
        if name not in given:
            raise huggingface_hub.errors.EntryNotFoundError(f"404: no {name}")
        return str(FOLDER / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert sample.find("me/mine", None) == FOLDER
    given.pop()
    with pytest.raises(FileNotFoundError, match="me/mine: .* does not give it .404: no model"):
        sample.find("me/mine", None)


def test_a_repository_that_the_hub_does_not_give_is_one_sentence(monkeypatch):
    import huggingface_hub

    def hf_hub_download(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing: .* hub does not give it \(no"):
        sample.find("nobody/nothing", None)


@pytest.mark.parametrize("damage", [b"", np.zeros(23, np.float32).tobytes()])
def test_a_damaged_empty_caption_is_one_sentence(copy, damage):
    (copy / "uncond_embedding.npy").write_bytes(damage)
    code, _, err = run("sample.py", "--checkpoint", copy, "--prompt", "a circle")
    assert code == 2 and "uncond_embedding.npy has no states of width 24" in sentences(err)[-1]


@pytest.mark.parametrize("change, reason", [
    (lambda w: w.pop("network.text_registers"), "1 tensors are missing, unknown or of another "
     "shape, such as registers"),
    (lambda w: w.update({"network.more": torch.zeros(2)}), "such as network.more"),
    (lambda w: w.update({"network.cond_mask": torch.zeros(12) > 0}), "such as network.cond_mask"),
    (lambda w: w.update({"network.data_ln.weight": torch.zeros(3)}), "such as patch_norm.weight"),
    (lambda w: w.pop("postprocessing.scale"), "KeyError: 'postprocessing.scale'")])
def test_a_tensor_that_does_not_fit_stops_with_its_name(copy, change, reason):
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors")
    code, _, err = run("sample.py", "--checkpoint", copy, "--prompt", "a circle")
    assert code == 2 and reason in sentences(err)[-1], err


@pytest.mark.parametrize("part, key, value, reason", [
    ("network", "concat_cond_token_to_latents", True, "concat_cond_token_to_latents is True"),
    ("preconditioning", "do_normalization", "none", "do_normalization is none"),
    ("scheduler", "shift", 2.0, "scheduler.shift is 2.0"),
    ("network", "num_blocks", 3, "does not fit")])
def test_an_architecture_that_is_not_this_one_stops(copy, part, key, value, reason):
    config = json.loads((copy / "config.json").read_text())
    config.setdefault(part, {})[key] = value
    (copy / "config.json").write_text(json.dumps(config))
    code, _, err = run("sample.py", "--checkpoint", copy, "--prompt", "a circle")
    assert code == 2 and reason in sentences(err)[-1], err


@pytest.mark.parametrize("flag, name", [("--text-encoder", "the text encoder"),
                                        ("--vae", "the VAE")])
def test_an_encoder_that_is_not_there_is_one_sentence(flag, name, tmp_path):
    swapped = ["--vae", FOLDER / "vae", "--text-encoder", FOLDER / "t5", flag, tmp_path / "nothing"]
    code, _, err = run("sample.py", "--checkpoint", FOLDER, "--prompt", "a circle", *swapped,
                       "--steps", 1, "--out", tmp_path / "x.png")
    assert code == 2 and f"{name} {tmp_path}/nothing cannot be loaded" in sentences(err)[-1], err


def test_a_text_encoder_of_another_width_is_refused(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    weights = load_file(copy / "model.safetensors")
    config["network"]["label_dim"] = 20
    weights["network.map_text_tokens.weight"] = torch.zeros(32, 20)
    (copy / "uncond_embedding.npy").unlink()
    save_file(weights, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(config))
    code, _, err = run("sample.py", "--checkpoint", copy, "--prompt", "a circle", *ENCODERS)
    assert code == 2 and "states of width 24, and this network reads 20" in sentences(err)[-1]


def test_an_exported_folder_is_the_releases_tensor_for_tensor(tmp_path, model):
    code, out, err = run("sample.py", "--checkpoint", FOLDER, *ENCODERS, "--export", tmp_path / "x")
    assert code == 0, err
    there, here = load_file(FOLDER / "model.safetensors"), load_file(
        tmp_path / "x" / "model.safetensors")
    assert there.keys() == here.keys()
    assert all(torch.allclose(here[name].float(), tensor.float(), rtol=1e-6)
               for name, tensor in there.items())
    config = json.loads((FOLDER / "config.json").read_text())
    written = json.loads((tmp_path / "x" / "config.json").read_text())
    paths = {"vae_repo", "text_encoder_repo"}                      # these were named anew
    assert {k: v for k, v in written.items() if k not in paths} == {
        k: v for k, v in config.items() if k not in paths}
    assert (np.load(tmp_path / "x" / "uncond_embedding.npy") == 1).all()
    again = run("sample.py", "--checkpoint", FOLDER, *ENCODERS, "--export", tmp_path / "x")
    assert again[0] == 2 and "is there already" in again[2]
