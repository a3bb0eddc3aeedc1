"""ImageReward and VQAScore: small random models in true files, and formulas by hand."""
import json
import operator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (BertTokenizer, CLIPConfig, CLIPModel, T5Config,
                          T5ForConditionalGeneration, T5Tokenizer)

from by_hand import attend, clip_layers, clip_patches, gelu, linear, norm, patches, quick_gelu
from data import UserError
from rewards import CLIPFlanT5, ImageReward, clean

PROMPTS = ["", "a red dog", "A RED DOG!", "a dog " * 40, "café Zürich", "犬と猫 🐕",
           "a <PERSON> runs", "`red` dog", 'a sign with "stop" on it', "```text\na dog\n```",
           "<b>a</b> dog <image>", "3 < 4 and 5 > 2", "tab\tand\nline", "</s><pad> dog",
           "[SEP] [PAD] dog", "x" * 50]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"<>/`"


class SmallReward(ImageReward):
    VISION = ImageReward.VISION | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                       intermediate_size=48)
    TEXT = dict(vocab_size=200, hidden_size=24, encoder_hidden_size=32, num_hidden_layers=2,
                num_attention_heads=3, intermediate_size=40)


def pictures(n: int, side: int) -> torch.Tensor:
    """Random blocks, coarse and fine, so that pictures differ in more than noise."""
    g = torch.Generator().manual_seed(1)
    rows = [torch.rand(1, 3, 2 + i % 5, 2 + i % 3, generator=g) for i in range(n)]
    return torch.cat([F.interpolate(x, (side, side)).mul(255).byte() for x in rows])


def random(shapes: dict, std: float = 0.1) -> dict:
    """A checkpoint {key: tensor}: scales of layer norms are near 1."""
    g = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=g) * std
            + (("norm" in key.lower() or "layrnorm" in key) and key.endswith("weight"))
            for key, shape in shapes.items()}


# ---- files as on the hub -------------------------------------------------------------------------

def reward_shapes(V: int, D: int, hidden: int, T: int, text: int, words: int) -> dict:
    """ImageReward.pt: every key of it."""
    shapes = {"blip.visual_encoder.cls_token": (1, 1, V), "blip.visual_encoder.pos_embed":
              (1, 197, V), "blip.text_encoder.embeddings.word_embeddings.weight": (words, T),
              "blip.text_encoder.embeddings.position_embeddings.weight": (512, T),
              "blip.text_encoder.embeddings.position_ids": (1, 512)}

    def add(at: str, names: dict) -> None:
        for name, shape in names.items():
            shapes[f"{at}{name}.weight"], shapes[f"{at}{name}.bias"] = shape, shape[:1]

    add("blip.visual_encoder.", {"patch_embed.proj": (V, 3, 16, 16), "norm": (V,)})
    add("blip.text_encoder.embeddings.", {"LayerNorm": (T,)})
    for i in range(D):
        add(f"blip.visual_encoder.blocks.{i}.", {
            "attn.qkv": (3 * V, V), "attn.proj": (V, V), "mlp.fc1": (hidden, V),
            "mlp.fc2": (V, hidden), "norm1": (V,), "norm2": (V,)})
        at = f"blip.text_encoder.encoder.layer.{i}."
        for kind, width in (("attention", T), ("crossattention", V)):
            add(f"{at}{kind}.", {"self.query": (T, T), "self.key": (T, width), "self.value":
                                 (T, width), "output.dense": (T, T), "output.LayerNorm": (T,)})
        add(at, {"intermediate.dense": (text, T), "output.dense": (T, text),
                 "output.LayerNorm": (T,)})
    add("mlp.layers.", {"0": (1024, T), "2": (128, 1024), "4": (64, 128), "6": (16, 64),
                        "7": (1, 16)})
    add("blip.", {"vision_proj": (256, V), "text_proj": (256, T)})
    return shapes


def write_reward(folder: Path) -> None:
    """ImageReward.pt, small."""
    torch.save(random(reward_shapes(32, 2, 48, 24, 40, 200)), folder / "ImageReward.pt")


def write_bert(folder: Path) -> None:
    """A tokenizer of a few words and all letters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "red", "sign", "cafe", *LETTERS,
             *(f"##{letter}" for letter in LETTERS)]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)


CLIP = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            image_size=336, patch_size=28)                             # 144 image tokens
T5 = dict(d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2,
          relative_attention_num_buckets=8, relative_attention_max_distance=20, pad_token_id=0,
          eos_token_id=1, decoder_start_token_id=0, is_encoder_decoder=True,
          feed_forward_proj="gated-gelu", tie_word_embeddings=False, model_type="clip_t5",
          mm_vision_tower="openai/clip-vit-large-patch14-336", mm_vision_select_layer=-2)


def shapes_of(model: torch.nn.Module) -> dict:
    """The tensors of a network of transformers, whose names the hub's files have, too."""
    return {key: x.shape for key, x in model.state_dict().items() if "embed_tokens" not in key}


def t5_tensors(folder: Path) -> dict:
    """A network that often says Yes, so that its scores vary."""
    tokenizer, D = T5Tokenizer.from_pretrained(folder), T5["d_model"]
    config = T5Config.from_dict(T5 | {"vocab_size": len(tokenizer) + 28})
    tensors = random(shapes_of(T5ForConditionalGeneration(config)) | {
        "mm_projector.0.weight": (D, CLIP["hidden_size"]), "mm_projector.0.bias": (D,),
        "mm_projector.2.weight": (D, D), "mm_projector.2.bias": (D,)}, 0.3)
    tensors["lm_head.weight"] *= 0.1
    tensors["lm_head.weight"][tokenizer("Yes").input_ids] *= -80
    return tensors


def write_shards(folder: Path, tensors: dict) -> None:
    """Two shards and their index."""
    keys, files = list(tensors), {}
    for i in (0, 1):
        part, name = keys[i::2], f"pytorch_model-0000{i + 1}-of-00002.bin"
        files |= {key: name for key in part}
        torch.save({key: tensors[key] for key in part}, folder / name)
    index = {"metadata": {}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_flan(folder: Path) -> None:
    """clip-flant5: two .bin shards, with the copies of the word table that torch.save keeps."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁Yes", "▁show", "▁dog", "▁ASSISTANT:",
              *LETTERS, *"ADPTYSINTU"]
    pieces = list(dict.fromkeys(pieces)) + [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    T5Tokenizer(vocab=[(piece, -float(i % 7)) for i, piece in enumerate(pieces)]
                ).save_pretrained(folder)
    tensors = t5_tensors(folder)
    config = T5 | {"vocab_size": len(tensors["lm_head.weight"])}
    (folder / "config.json").write_text(json.dumps(config))
    copies = {f"{at}embed_tokens.weight": tensors["shared.weight"]
              for at in ("", "encoder.", "decoder.")}
    write_shards(folder, tensors | copies)


def write_tower(folder: Path) -> None:
    """A CLIP model in one .bin, with the caption's half, as OpenAI's is."""
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                vocab_size=20)
    config = CLIPConfig(text_config=text, vision_config=CLIP, projection_dim=8)
    config.save_pretrained(folder)
    shapes = shapes_of(CLIPModel(config))
    tensors = random({key: shapes[key] for key in sorted(shapes, reverse=True)}, 0.15)
    torch.save(tensors | {"vision_model.embeddings.position_ids": torch.arange(145)[None]},
               folder / "pytorch_model.bin")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("reward", "flan", "tower")}
    write_reward(folders["reward"])
    write_bert(folders["reward"])
    write_flan(folders["flan"])
    write_tower(folders["tower"])
    return folders


def load_reward(files: dict[str, Path], dtype=torch.float32) -> ImageReward:
    return SmallReward((files["reward"], files["reward"]), "cpu", dtype)


def load_vqa(files: dict[str, Path], dtype=torch.float32) -> CLIPFlanT5:
    return CLIPFlanT5((files["flan"], files["tower"], files["flan"]), "cpu", dtype)


# ---- the formulas, written a second time ---------------------------------------------------------

def reward_by_hand(w: dict, tokenizer, pixels, prompts, heads=(4, 3), layers=2) -> torch.Tensor:
    v = {key.removeprefix("blip.visual_encoder."): x for key, x in w.items()}
    x = patches(pixels, v["patch_embed.proj.weight"], v["patch_embed.proj.bias"])
    x = torch.cat([v["cls_token"].expand(len(x), -1, -1), x], 1) + v["pos_embed"]
    for i in range(layers):
        at = f"blocks.{i}."
        q, k, u = linear(v, at + "attn.qkv", norm(v, at + "norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(v, at + "attn.proj", attend(q, k, u, heads[0]))
        y = gelu(linear(v, at + "mlp.fc1", norm(v, at + "norm2", x, 1e-6)))
        x = x + linear(v, at + "mlp.fc2", y)
    seen = norm(v, "norm", x, 1e-6)
    t = {key.removeprefix("blip.text_encoder."): x for key, x in w.items()}
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=35,
                       return_tensors="pt")
    bias = (1 - tokens.attention_mask)[:, None, None] * -10000.0
    h = t["embeddings.word_embeddings.weight"][tokens.input_ids]
    h = norm(t, "embeddings.LayerNorm", h + t["embeddings.position_embeddings.weight"][:35], 1e-12)
    for i in range(layers):
        at = f"encoder.layer.{i}."
        for kind, other, mask in (("attention", None, bias), ("crossattention", seen, 0)):
            source = h if other is None else other
            y = attend(linear(t, f"{at}{kind}.self.query", h),
                       linear(t, f"{at}{kind}.self.key", source),
                       linear(t, f"{at}{kind}.self.value", source), heads[1], mask)
            h = norm(t, f"{at}{kind}.output.LayerNorm",
                     h + linear(t, f"{at}{kind}.output.dense", y), 1e-12)
        y = gelu(linear(t, at + "intermediate.dense", h))
        h = norm(t, at + "output.LayerNorm", h + linear(t, at + "output.dense", y), 1e-12)
    y = h[:, :1]
    for i in (0, 2, 4, 6, 7):
        y = linear(w, f"mlp.layers.{i}", y)
    return (y[:, 0, 0] - 0.16717362830052426) / 1.0333394966054072


def image_tokens_by_hand(w: dict, p: dict, pixels, heads=4, layers=3) -> torch.Tensor:
    """In float64, as below."""
    w, p = ({name: x.double() for name, x in tensors.items()} for tensors in (w, p))
    x = clip_layers(w, "vision_model", clip_patches(w, pixels), layers - 1, heads, quick_gelu)
    return linear(p, "mm_projector.2", gelu(linear(p, "mm_projector.0", x[:, 1:])))


def vqa_by_hand(tensors: dict, tokenizer, seen, prompts) -> torch.Tensor:
    """One pair at a time, without padding; labels and cross-entropy as t2v-metrics has them. In
    float64: how float32 rounds differs from machine to machine."""
    config = T5 | {"vocab_size": len(tensors["lm_head.weight"])}
    t5 = T5ForConditionalGeneration(T5Config.from_dict(config)).eval()
    t5.load_state_dict({name: tensors["shared.weight" if "embed_tokens" in name else name]
                        for name in t5.state_dict()}, assign=True)
    t5.double()
    scores, labels = [], tokenizer("Yes", return_tensors="pt").input_ids
    for tokens, prompt in zip(seen, prompts):
        text = ("A chat between a curious user and an artificial intelligence assistant. The "
                "assistant gives helpful, detailed, and polite answers to the user's questions. "
                f'USER: <image>\nDoes this figure show "{prompt}"? Please answer yes or no. '
                "ASSISTANT: ")
        a, b = (tensors["shared.weight"][tokenizer(piece).input_ids]
                for piece in text.split("<image>"))
        logits = t5(inputs_embeds=torch.cat([a, tokens, b])[None].double(), labels=labels).logits[0]
        scores.append(torch.exp(-F.cross_entropy(logits[:, :len(tokenizer)], labels[0])))
    return torch.stack(scores).detach().float()


CLEAN = ["", "a red dog", "A RED DOG!", "a dog " * 40, "café Zürich", "犬と猫 🐕",
         "a runs", "red dog", 'a sign with "stop" on it', "a dog", "a dog", "3 < 4 and 5 > 2",
         "tab\tand\nline", "dog", "[SEP] [PAD] dog", "x" * 50]       # of PROMPTS


# ---- scores --------------------------------------------------------------------------------------

def test_image_reward_is_the_formula(files):
    reward, pixels = load_reward(files), pictures(16, 224)
    scores = reward.judge(reward.see(pixels), PROMPTS)
    w = torch.load(files["reward"] / "ImageReward.pt")
    wanted = reward_by_hand(w, reward.tokenizer, pixels, PROMPTS)
    assert scores.dtype == torch.float32 and scores.shape == (16,)
    assert scores.std() > 0.05, scores                # or agreement would say nothing
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)


def test_vqa_is_the_formula(files):
    vqa, pixels, tensors = load_vqa(files), pictures(16, 336), t5_tensors(files["flan"])
    exact = deepcopy(vqa)         # float32 rounds by more than this, how differs by machine
    exact.dtype = torch.float64
    exact.tower.double()
    exact.t5.double()
    exact.t5.lm_head.float()
    seen = exact.see(pixels)
    wanted = image_tokens_by_hand(torch.load(files["tower"] / "pytorch_model.bin"), tensors,
                                  pixels)
    assert seen.shape == (16, 144, 32) and wanted.std() > 0.5
    torch.testing.assert_close(seen, wanted, atol=2e-5, rtol=1e-5)
    scores = exact.judge(seen, PROMPTS)
    wanted = vqa_by_hand(tensors, vqa.tokenizer, seen, CLEAN)
    assert scores.dtype == torch.float32 and scores.std() > 0.05, scores
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)
    assert (vqa.judge(vqa.see(pixels), PROMPTS) - scores).abs().max() < 1e-3


def test_captions_lose_fences_backticks_and_tags():
    assert [clean(prompt) for prompt in PROMPTS] == CLEAN
    assert clean("<<pad>pad> dog") == "< pad> dog"
    assert clean("<`pad> ```python\nx```") == "x"


def test_text_beyond_t5s_limit_is_cut_off(files, monkeypatch):
    vqa = load_vqa(files)
    assert vqa.LENGTH == 2048
    monkeypatch.setattr(vqa, "LENGTH", 300)
    seen = vqa.see(pictures(1, 336))[:, :1]
    a, b, c = (vqa.judge(seen, ["dog " * 300 + end]) for end in ("", "red", "red dog"))
    assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("load, head", [(load_reward, "mlp.0"), (load_vqa, "t5.lm_head")])
def test_towers_run_in_bfloat16_and_heads_in_float32(files, load, head):
    full, half = load(files), load(files, torch.bfloat16)
    pixels = pictures(4, full.VIEW[1])
    seen = half.see(pixels)
    scores = half.judge(seen, PROMPTS[:4])
    assert seen.dtype == torch.bfloat16 and scores.dtype == torch.float32
    wanted = full.judge(full.see(pixels), PROMPTS[:4])
    assert (scores - wanted).abs().max() < 0.2 * max(1, wanted.abs().max())
    assert operator.attrgetter(head)(half).weight.dtype == torch.float32


@pytest.mark.parametrize("key", ["shared.weight", "lm_head.weight", "mm_projector.2.bias",
                                 "decoder.block.1.layer.1.EncDecAttention.o.weight"])
def test_a_missing_tensor_of_flan_t5_is_refused(files, tmp_path, key):
    (tmp_path / "config.json").write_text((files["flan"] / "config.json").read_text())
    tensors = t5_tensors(files["flan"])
    tensors.pop(key)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"{tmp_path}.*: fetch it again"):
        load_vqa(files | {"flan": tmp_path})


def test_what_small_models_do_not_show_is_that_of_the_checkpoints(files):
    reward, vqa = load_reward(files), load_vqa(files)
    for tower, count, eps in ((reward.vision, 5, 1e-6), (reward.text, 7, 1e-12),
                              (vqa.tower, 8, 1e-5)):
        norms = [m.eps for m in tower.modules() if isinstance(m, torch.nn.LayerNorm)]
        assert len(norms) == count and set(norms) == {eps}
    assert ImageReward.VIEW == ("crop", 224) and CLIPFlanT5.VIEW == ("pad", 336)
    assert vqa.tower.config.hidden_act == "quick_gelu"
