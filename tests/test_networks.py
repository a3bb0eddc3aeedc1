"""The rewards that are CLIPs: small random models in the files' true layout, scored twice.

The second time by a transformer written out here, on weights that no library has touched."""
import functools
import gzip
import hashlib
import io
import json
import re
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from transformers import CLIPTokenizerFast

import rewards as scorer
from by_hand import clip_layers, clip_patches, gelu, linear, norm, quick_gelu

CLIPS = {"pick": scorer.PickScore, "sci": scorer.SciScore, "clip_openai": scorer.OpenAIClip,
         "aesthetic": scorer.Aesthetic, "hpsv2": scorer.HPSv2}
# name: owner, seed, activation, width of the embedding, exp(its logit scale)
SMALL = {"pick": ("yuvalkirstain/PickScore_v1", 1, gelu, 24, 99.5),
         "sci": ("Jialuo21/SciScore", 2, gelu, 24, 97.0),
         "clip_openai": ("openai/clip-vit-large-patch14", 3, quick_gelu, 768, 100.0),
         "aesthetic": ("openai/clip-vit-large-patch14", 3, quick_gelu, 768, 100.0),
         "hpsv2": ("xswu/HPSv2", 4, gelu, 24, 100.0)}
D, HEADS, LAYERS, MLP, PATCH, SIDE, VOCABULARY, TOKENS = 32, 4, 2, 128, 32, 224, 49408, 77
open_clip.factory._MODEL_CONFIGS["small"] = dict(
    embed_dim=24, vision_cfg=dict(image_size=SIDE, patch_size=PATCH, layers=LAYERS, width=D,
                                  head_width=D // HEADS),
    text_cfg=dict(context_length=TOKENS, vocab_size=VOCABULARY, width=D, heads=HEADS,
                  layers=LAYERS))


# ---- small random models -------------------------------------------------------------------------

@functools.cache
def weights(seed: int, embed: int) -> dict:
    """One random CLIP under the names of the hub; every value is exact in float16."""
    g, found = torch.Generator().manual_seed(seed), {}

    def add(name: str, *shape: int, std: float = 0.15, mean: float = 0.0) -> None:
        found[name] = (mean + std * torch.randn(*shape, generator=g)).half().float()

    add("vision_model.embeddings.class_embedding", D)
    add("vision_model.embeddings.patch_embedding.weight", D, 3, PATCH, PATCH, std=0.03)
    add("vision_model.embeddings.position_embedding.weight", (SIDE // PATCH) ** 2 + 1, D)
    add("text_model.embeddings.token_embedding.weight", VOCABULARY, D, std=0.2)
    add("text_model.embeddings.position_embedding.weight", TOKENS, D)
    add("visual_projection.weight", embed, D)
    add("text_projection.weight", embed, D)
    layers = [f"{side}_model.encoder.layers.{i}." for side in ("vision", "text")
              for i in range(LAYERS)]
    for at in ["vision_model.pre_layrnorm", "vision_model.post_layernorm",
               "text_model.final_layer_norm", *(f"{layer}layer_norm{i}" for layer in layers
                                                for i in (1, 2))]:
        add(f"{at}.weight", D, std=0.2, mean=1.0)
        add(f"{at}.bias", D, std=0.1)
    shapes = {f"self_attn.{x}_proj": (D, D) for x in ("q", "k", "v", "out")}
    for layer in layers:
        for name, shape in (shapes | {"mlp.fc1": (MLP, D), "mlp.fc2": (D, MLP)}).items():
            add(f"{layer}{name}.weight", *shape)
            add(f"{layer}{name}.bias", shape[0])
    return found


def hub_names(w: dict, scale: float) -> dict:
    """A checkpoint of the hub, position_ids included."""
    return w | {"logit_scale": torch.tensor(scale).log(),
                "text_model.embeddings.position_ids": torch.arange(TOKENS)[None],
                "vision_model.embeddings.position_ids": torch.arange(50)[None]}


def open_names(w: dict, scale: float) -> dict:
    """The same as open_clip calls them."""
    names = {"vision_model.": "visual.", "text_model.": "", "embeddings.class_embedding":
             "class_embedding", "embeddings.patch_embedding": "conv1", "pre_layrnorm": "ln_pre",
             "embeddings.position_embedding.weight": "positional_embedding",
             "embeddings.token_embedding": "token_embedding", "post_layernorm": "ln_post",
             "final_layer_norm": "ln_final", "visual_projection.weight": "visual.proj",
             "text_projection.weight": "text_projection", "encoder.layers": "transformer.resblocks",
             "self_attn.out_proj": "attn.out_proj", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj", "self_attn.q_proj.": "attn.in_proj_"}
    found = {"logit_scale": torch.tensor(scale).log()}
    for name, x in w.items():
        if "q_proj" in name:
            x = torch.cat([w[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        if "k_proj" not in name and "v_proj" not in name:
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            found[name] = x.T.contiguous() if name in ("visual.proj", "text_projection") else x
    return found


@functools.cache
def head_names() -> dict:
    """The five layers of aesthetic's head."""
    g = torch.Generator().manual_seed(5)
    found = {}
    for i, (a, b) in zip((0, 2, 4, 6, 7), ((768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))):
        found[f"layers.{i}.weight"] = torch.randn(b, a, generator=g) * (1.5 / a) ** 0.5
        found[f"layers.{i}.bias"] = torch.randn(b, generator=g) * 0.1
    return found


def head_file() -> bytes:
    """The same as a file, always the same bytes."""
    buffer = io.BytesIO()
    torch.save(head_names(), buffer)
    return buffer.getvalue()


def configuration(activation: str, embed: int) -> dict:
    """config.json of a CLIPModel as the hub has it: an eos_token_id of 2, which nothing is."""
    tower = dict(hidden_size=D, hidden_act=activation, intermediate_size=MLP, layer_norm_eps=1e-5,
                 num_hidden_layers=LAYERS, num_attention_heads=HEADS, projection_dim=embed)
    return dict(
        architectures=["CLIPModel"], model_type="clip", projection_dim=embed,
        text_config=tower | dict(
            model_type="clip_text_model", vocab_size=VOCABULARY, max_position_embeddings=TOKENS,
            bos_token_id=0, eos_token_id=2, pad_token_id=1),
        vision_config=tower | dict(model_type="clip_vision_model", image_size=SIDE,
                                   patch_size=PATCH))


def write_tokenizer(folder: Path) -> None:
    """OpenAI's byte-pair vocabulary, which open_clip carries, in the files of the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs, tokens = vocabulary()
    start, end = tokens[-2:]
    numbers = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, pairs), ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        bos_token=start, eos_token=end, unk_token=end, pad_token=end,
        tokenizer_class="CLIPTokenizer", model_max_length=TOKENS)))
    tokenizer = CLIPTokenizerFast(vocab=numbers, merges=pairs)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def write_models(folder: Path) -> None:
    """FOLDER/OWNER/NAME/files of the five: random weights, true names, some 30 MB."""
    write_tokenizer(folder / scorer.PickScore.SOURCES[1][0])
    for name in ("pick", "sci", "clip_openai"):
        owner, seed, activation, embed, scale = SMALL[name]
        target = folder / owner
        write_tokenizer(target)                         # of pick, it is not read
        (target / "config.json").write_text(json.dumps(configuration(activation.__name__, embed)))
        save_file(hub_names(weights(seed, embed), scale), target / "model.safetensors",
                  metadata={"format": "pt"})
    owner, seed, _, embed, scale = SMALL["hpsv2"]
    (folder / owner).mkdir(parents=True)
    state = {key: value.half() for key, value in open_names(weights(seed, embed), scale).items()}
    for kind in (scorer.HPSv2, scorer.HPSv20):
        torch.save({"epoch": 1, "state_dict": state}, folder / owner / kind.SOURCES[0][1][0])
    head = folder / scorer.Aesthetic.SOURCES[1][0]
    head.mkdir(parents=True)
    (head / scorer.Aesthetic.HEAD).write_bytes(head_file())


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(scorer.HPSv2, "MODEL", "small")
    monkeypatch.setattr(scorer.Aesthetic, "SHA256", hashlib.sha256(head_file()).hexdigest())


@functools.cache
def load(name: str, models: Path, dtype=torch.float32):
    return CLIPS[name]([models / owner for owner, _ in CLIPS[name].SOURCES], "cpu", dtype)


# ---- the same, written out -----------------------------------------------------------------------

def see(w, pixels, activation):
    """uint8 (B, 3, 224, 224) → unit vectors (B, E)."""
    x = clip_layers(w, "vision_model", clip_patches(w, pixels), LAYERS, HEADS, activation)[:, 0]
    e = linear(w, "visual_projection", norm(w, "vision_model.post_layernorm", x))
    return e / e.square().sum(-1, keepdim=True).sqrt()


def read(w, prompts, activation):
    """Prompts → unit vectors (B, E), each prompt on its own and without padding."""
    found, at = [], "text_model.embeddings."
    for ids in open_clip.get_tokenizer("ViT-H-14")(prompts):
        ids = ids[:ids.argmax() + 1]                    # the end is the largest; then zeros
        x = w[at + "token_embedding.weight"][ids] + w[at + "position_embedding.weight"][:len(ids)]
        after = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
        x = clip_layers(w, "text_model", x[None], LAYERS, HEADS, activation, after)[0, -1]
        found.append(linear(w, "text_projection", norm(w, "text_model.final_layer_norm", x)))
    e = torch.stack(found)
    return e / e.square().sum(-1, keepdim=True).sqrt()


def vocabulary() -> tuple:
    """OpenAI's pairs in the order of their joining, and all tokens, as open_clip carries them."""
    merges = gzip.open(default_bpe()).read().decode().split("\n")[1:49152 - 256 - 2 + 1]
    pairs, letters = [tuple(merge.split()) for merge in merges], list(bytes_to_unicode().values())
    return pairs, [*letters, *(a + "</w>" for a in letters), *map("".join, pairs),
                   "<|startoftext|>", "<|endoftext|>"]


def score_again(name: str, pixels, prompts) -> torch.Tensor:
    _, seed, activation, embed, scale = SMALL[name]
    w = weights(seed, embed)
    seen = see(w, pixels, activation)
    if name == "aesthetic":
        head = head_names()
        for i in (0, 2, 4, 6, 7):
            seen = seen @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
        return seen[:, 0]
    cosine = (seen * read(w, prompts, activation)).sum(-1)
    return cosine * scale / 100 if name in ("pick", "sci") else cosine


# ---- scores of sixteen pictures and prompts ------------------------------------------------------

PROMPTS = ["", "a cat", "A RED Bus", "two dogs on a beach, 35 mm photograph", "word " * 200,
           "naïve café in München", "東京の夜景", "🦊 and 🐻", "<b>bold</b> <image>",
           'a "quoted" sign', "it's the dog's bone", "1234567890", "  many   spaces\n and\tlines ",
           "a_b-c/d\\e", "an astronaut riding a horse", "?!... (((masterpiece)))"]


def field(width: int, height: int, seed: int) -> Image.Image:
    """A smooth random picture of strong colours."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


SIZES = [(224, 224), (640, 512), (512, 640), (225, 224), (333, 517), (97, 61), (61, 97), (224, 301),
         (400, 90), (90, 400), (447, 449), (1, 1), (31, 224), (300, 300), (223, 225), (800, 601)]
PICTURES = [field(width, height, i) for i, (width, height) in enumerate(SIZES)]


def pixels_of(image: Image.Image, n: int) -> torch.Tensor:
    """uint8 (3, n, n) by torchvision."""
    image = CenterCrop(n)(Resize(n, InterpolationMode.BICUBIC)(image))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("name", CLIPS)
def test_a_score_equals_the_transformer_written_out_and_stays_close_in_bfloat16(name, models):
    exact, half = load(name, models), load(name, models, torch.bfloat16)
    pixels = torch.stack([pixels_of(image, 224) for image in PICTURES])
    with torch.no_grad():
        found, rounded = (one.judge(one.see(pixels), PROMPTS) for one in (exact, half))
    expected = score_again(name, pixels, PROMPTS)
    assert found.shape == (16,) and found.dtype == rounded.dtype == torch.float32
    assert expected.std() > 0.01                        # or equality would say little
    assert (found - expected).abs().max() < 1e-5
    assert (rounded - expected).abs().max() < 0.15 * expected.std()
    if name in ("pick", "sci"):                         # 1 % too low if the logarithm were rounded
        assert half.scale == pytest.approx(SMALL[name][4] / 100, rel=1e-6)


# ---- files that are not what they should be, and views -------------------------------------------

@pytest.mark.parametrize("fault", ["missing", "unknown", "misshapen", "half"])
@pytest.mark.parametrize("name, file, key", [
    ("pick", "model.safetensors", "vision_model.post_layernorm.bias"),
    ("aesthetic", "model.safetensors", "vision_model.post_layernorm.bias"),
    ("hpsv2", "HPS_v2.1_compressed.pt", "visual.ln_post.bias")])
def test_a_checkpoint_with_another_tensor_or_half_of_it_is_refused(name, file, key, fault, models,
                                                                   tmp_path):
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    file = tmp_path / SMALL[name][0] / file
    tensors = torch.load(file)["state_dict"] if name == "hpsv2" else load_file(file)
    key = "visual.extra.weight" if fault == "unknown" else key
    tensors[key] = torch.zeros(D + 1)
    if fault == "missing":
        del tensors[key]
    (torch.save if name == "hpsv2" else save_file)(tensors, file)
    if fault == "half":
        file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    with pytest.raises(scorer.UserError) as error:
        load(name, tmp_path)
    [sentence] = str(error.value).splitlines()
    assert ("fetch it again" if fault == "half" else key) in sentence
    assert SMALL[name][0] in sentence


@pytest.mark.parametrize("content", [b"<html>", head_file()[:100_000]])
def test_no_other_file_than_the_head_stays_under_its_name(content, monkeypatch, tmp_path):
    repository, patterns = scorer.Aesthetic.SOURCES[1]
    page, file = tmp_path / "page", tmp_path / "hub" / repository / scorer.Aesthetic.HEAD
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda _: urllib.request.urlopen(page.as_uri()))
    page.write_bytes(content)
    with pytest.raises(scorer.UserError, match="aesthetic needs sac.*invalid hash.*--models"):
        scorer.fetch(repository, patterns, None, "aesthetic needs")
    assert not any(file.parent.iterdir())
    for served in (head_file(), b"not asked again"):
        page.write_bytes(served)
        assert scorer.fetch(repository, patterns, None, "aesthetic needs") == file.parent
        assert file.read_bytes() == head_file()


def test_a_head_that_is_given_must_be_the_right_one(models, tmp_path):
    (tmp_path / scorer.Aesthetic.HEAD).write_bytes(head_file()[:100_000])
    with pytest.raises(scorer.UserError, match=f"{re.escape(scorer.Aesthetic.HEAD)} is not"):
        scorer.Aesthetic((models / SMALL["aesthetic"][0], tmp_path), "cpu", torch.float32)


def test_a_folder_without_its_tokenizer_is_refused(models, tmp_path):
    tokenizer = shutil.copytree(models / scorer.PickScore.SOURCES[1][0], tmp_path / "tokenizer")
    for file in ("vocab.json", "merges.txt", "tokenizer.json"):
        (tokenizer / file).unlink()
    with pytest.raises(scorer.UserError, match="has no tokenizer of this network"):
        scorer.PickScore((models / SMALL["pick"][0], tokenizer), "cpu", torch.float32)


def test_a_crop_is_torchvisions_and_normalised_open_clips_to_the_last_bit():
    transform = open_clip.image_transform(224, is_train=False)
    for image in PICTURES:
        for n in (224, 512):
            assert torch.equal(scorer.cut(image, "crop", n), pixels_of(image, n))
        pixels = scorer.cut(image, "crop", 224)[None]
        assert torch.equal(scorer.normalised(pixels, torch.float32)[0], transform(image))


def test_a_pad_is_the_picture_in_the_middle_of_a_square_of_the_mean_colour():
    colour = [int(255 * mean) for mean in scorer.MEAN]
    for image in PICTURES:
        pixels = np.array(image)                                                 # (H, W, 3)
        (width, height), side = image.size, max(image.size)
        canvas = np.full((side, side, 3), colour, np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        canvas[top:top + height, left:left + width] = pixels
        expected = pixels_of(Image.fromarray(canvas), 336)
        assert torch.equal(scorer.cut(image, "pad", 336), expected)


@pytest.mark.parametrize("view", [("crop", 512), ("pad", 336)])
def test_a_thread_of_pixels_is_refused_before_it_takes_gigabytes(view):
    with pytest.raises(ValueError, match="40000 x 1"):
        scorer.cut(Image.new("RGB", (40_000, 1)), *view)
