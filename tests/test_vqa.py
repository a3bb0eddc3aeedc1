"""ImageReward and VQAScore: small random models in true files, and formulas by hand."""
import json
import math
import os
import sys
from copy import deepcopy
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")      # before torch: its tensors are small

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig,
                          BlipVisionModel, CLIPVisionConfig, CLIPVisionModel, T5Config,
                          T5ForConditionalGeneration, T5Tokenizer)

sys.path.insert(0, str(Path(__file__).parents[1]))
from rewards import MEAN, STD, CLIPFlanT5, CLIPFlanT5XL, ImageReward, clean

PROMPTS = ["", "a red dog", "A RED DOG!", "a dog " * 40, "café Zürich", "犬と猫 🐕",
           "a <PERSON> runs", "`red` dog", 'a sign with "stop" on it', "```text\na dog\n```",
           "<b>a</b> dog <image>", "3 < 4 and 5 > 2", "tab\tand\nline", "</s><pad> dog",
           "[SEP] [PAD] dog", "x" * 50]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"<>/`"


class SmallReward(ImageReward):
    VISION = ImageReward.VISION | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                       intermediate_size=48)
    TEXT = ImageReward.TEXT | dict(vocab_size=200, hidden_size=24, encoder_hidden_size=32,
                                   num_hidden_layers=2, num_attention_heads=3,
                                   intermediate_size=40)


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
    shapes = {"cls_token": (1, 1, V), "pos_embed": (1, 197, V), "patch_embed.proj.weight":
              (V, 3, 16, 16), "patch_embed.proj.bias": (V,), "norm.weight": (V,), "norm.bias": (V,)}
    for i in range(D):
        for name, (out, into) in {"attn.qkv": (3 * V, V), "attn.proj": (V, V),
                                  "mlp.fc1": (hidden, V), "mlp.fc2": (V, hidden)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": (out, into), f"blocks.{i}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (V,), f"blocks.{i}.{name}.bias": (V,)}
    shapes = {f"blip.visual_encoder.{key}": shape for key, shape in shapes.items()}
    at = "blip.text_encoder.embeddings."
    shapes |= {at + "word_embeddings.weight": (words, T),
               at + "position_embeddings.weight": (512, T), at + "LayerNorm.weight": (T,),
               at + "LayerNorm.bias": (T,),
               at + "position_ids": (1, 512)}
    for i in range(D):
        at = f"blip.text_encoder.encoder.layer.{i}."
        for kind, width in (("attention", T), ("crossattention", V)):
            for name, into in (("self.query", T), ("self.key", width), ("self.value", width),
                               ("output.dense", T)):
                shapes |= {f"{at}{kind}.{name}.weight": (T, into), f"{at}{kind}.{name}.bias": (T,)}
            shapes |= {f"{at}{kind}.output.LayerNorm.weight": (T,),
                       f"{at}{kind}.output.LayerNorm.bias": (T,)}
        shapes |= {at + "intermediate.dense.weight": (text, T), at + "intermediate.dense.bias":
                   (text,), at + "output.dense.weight": (T, text), at + "output.dense.bias": (T,),
                   at + "output.LayerNorm.weight": (T,), at + "output.LayerNorm.bias": (T,)}
    for i, (into, out) in {0: (T, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16),
                           7: (16, 1)}.items():
        shapes |= {f"mlp.layers.{i}.weight": (out, into), f"mlp.layers.{i}.bias": (out,)}
    return shapes | {"blip.vision_proj.weight": (256, V), "blip.vision_proj.bias": (256,),
                     "blip.text_proj.weight": (256, T), "blip.text_proj.bias": (256,)}


def write_bert(folder: Path) -> None:
    """A tokenizer of a few words and all letters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "red", "sign", "cafe", *LETTERS,
             *(f"##{letter}" for letter in LETTERS)]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    write_bert(folder)
    return folder


def write_reward(folder: Path) -> None:
    """ImageReward.pt, small."""
    torch.save(random(reward_shapes(32, 2, 48, 24, 40, 200)), folder / "ImageReward.pt")


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("THUDM")
    write_reward(folder)
    return folder


CLIP = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            image_size=336, patch_size=28)                             # 144 image tokens
T5 = dict(d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2,
          relative_attention_num_buckets=8, relative_attention_max_distance=20, pad_token_id=0,
          eos_token_id=1, decoder_start_token_id=0, is_encoder_decoder=True,
          feed_forward_proj="gated-gelu", tie_word_embeddings=False, model_type="clip_t5",
          mm_vision_tower="openai/clip-vit-large-patch14-336", mm_vision_select_layer=-2)


def tower_shapes(D: int, hidden: int, layers: int, patch: int, tokens: int) -> dict:
    """The picture's half of CLIP: keys below vision_model."""
    shapes = {"embeddings.class_embedding": (D,), "embeddings.patch_embedding.weight":
              (D, 3, patch, patch), "embeddings.position_embedding.weight": (tokens, D)}
    names = ["pre_layrnorm", "post_layernorm"]
    for i in range(layers):
        at = f"encoder.layers.{i}."
        for name, (out, into) in {**{f"self_attn.{p}_proj": (D, D) for p in ("q", "k", "v", "out")},
                                  "mlp.fc1": (hidden, D), "mlp.fc2": (D, hidden)}.items():
            shapes |= {f"{at}{name}.weight": (out, into), f"{at}{name}.bias": (out,)}
        names += [at + "layer_norm1", at + "layer_norm2"]
    return shapes | {f"{name}.{part}": (D,) for name in names for part in ("weight", "bias")}


def t5_shapes(vocabulary: int) -> dict:
    D, hidden, heads, inner = T5["d_model"], T5["d_ff"], T5["num_heads"], 32
    shapes = {"shared.weight": (vocabulary, D), "lm_head.weight": (vocabulary, D)}
    for half, kinds in (("encoder", ["SelfAttention"]),
                        ("decoder", ["SelfAttention", "EncDecAttention"])):
        for i in range(2):
            at = f"{half}.block.{i}.layer."
            for j, kind in enumerate(kinds):
                shapes |= {f"{at}{j}.{kind}.{p}.weight": (D, inner) if p == "o" else (inner, D)
                           for p in "qkvo"} | {f"{at}{j}.layer_norm.weight": (D,)}
            j = len(kinds)
            shapes |= {f"{at}{j}.DenseReluDense.wi_0.weight": (hidden, D),
                       f"{at}{j}.DenseReluDense.wi_1.weight": (hidden, D),
                       f"{at}{j}.DenseReluDense.wo.weight": (D, hidden),
                       f"{at}{j}.layer_norm.weight": (D,)}
        shapes[f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (8, heads)
        shapes[f"{half}.final_layer_norm.weight"] = (D,)
    return shapes | {"mm_projector.0.weight": (D, CLIP["hidden_size"]), "mm_projector.0.bias": (D,),
                     "mm_projector.2.weight": (D, D), "mm_projector.2.bias": (D,)}


def write_shards(folder: Path, tensors: dict, ending: str) -> None:
    """Two shards and their index."""
    stem, keys, files = ("model" if ending == "safetensors" else "pytorch_model"), list(tensors), {}
    for i in (0, 1):
        part, name = keys[i::2], f"{stem}-0000{i + 1}-of-00002.{ending}"
        files |= {key: name for key in part}
        (save_file if ending == "safetensors" else torch.save)({key: tensors[key] for key in part},
                                                               folder / name)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": files}))


def t5_tensors(folder: Path) -> dict:
    """A network that often says Yes, so that its scores vary."""
    tokenizer = T5Tokenizer.from_pretrained(folder)
    tensors = random(t5_shapes(len(tokenizer) + 28), 0.3)
    tensors["lm_head.weight"] *= 0.1
    tensors["lm_head.weight"][tokenizer("Yes").input_ids] *= -80
    return tensors


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
    write_shards(folder, tensors | copies, "bin")


@pytest.fixture(scope="module")
def flan(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flan")
    write_flan(folder)
    return folder


def write_tower(folder: Path) -> None:
    """A CLIP model in one .bin, with the caption's half, as OpenAI's is."""
    CLIPVisionConfig(**CLIP).save_pretrained(folder)
    tensors = {f"vision_model.{key}": x for key, x in
               random(tower_shapes(32, 48, 3, 28, 145), 0.2).items()}
    torch.save(tensors | {"vision_model.embeddings.position_ids": torch.arange(145)[None],
                          "logit_scale": torch.tensor(4.6), "text_projection.weight": torch.ones(2),
                          "visual_projection.weight": torch.ones(2),
                          "text_model.final_layer_norm.bias": torch.ones(2)},
               folder / "pytorch_model.bin")


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("openai")
    write_tower(folder)
    return folder


@pytest.fixture(scope="module")
def reward(reward_file, bert) -> ImageReward:
    return SmallReward(reward_file, bert, "cpu", torch.float32)


@pytest.fixture(scope="module")
def vqa(flan, tower) -> CLIPFlanT5:
    return CLIPFlanT5(flan, tower, flan, "cpu", torch.float32)


# ---- the formulas, written a second time ---------------------------------------------------------

def linear(w: dict, at: str, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bni,oi->bno", x, w[at + ".weight"]) + w[at + ".bias"]


def norm(w: dict, at: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * w[at + ".weight"] + w[at + ".bias"]


def attend(q, k, v, heads: int, bias=0) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1]) + bias
    return torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), v).flatten(2)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def patches(pixels: torch.Tensor, kernel: torch.Tensor, bias=0) -> torch.Tensor:
    x = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    p = kernel.shape[-1]
    x = x.unflatten(2, (-1, p)).unflatten(4, (-1, p))                      # (B, 3, H, p, W, p)
    return torch.einsum("bchpwq,dcpq->bhwd", x, kernel).flatten(1, 2) + bias


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
    w = {key.removeprefix("vision_model."): x for key, x in w.items()}
    x = patches(pixels, w["embeddings.patch_embedding.weight"])
    x = torch.cat([w["embeddings.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(w, "pre_layrnorm", x + w["embeddings.position_embedding.weight"], 1e-5)
    for i in range(layers - 1):                                  # without the last layer
        at = f"encoder.layers.{i}."
        y = norm(w, at + "layer_norm1", x, 1e-5)
        y = attend(*(linear(w, f"{at}self_attn.{name}_proj", y) for name in "qkv"), heads)
        x = x + linear(w, at + "self_attn.out_proj", y)
        y = linear(w, at + "mlp.fc1", norm(w, at + "layer_norm2", x, 1e-5))
        x = x + linear(w, at + "mlp.fc2", y * torch.sigmoid(1.702 * y))
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

def test_image_reward_is_the_formula(reward, reward_file):
    pixels = pictures(16, 224)
    scores = reward.judge(reward.see(pixels), PROMPTS)
    w = torch.load(reward_file / "ImageReward.pt")
    wanted = reward_by_hand(w, reward.tokenizer, pixels, PROMPTS)
    assert scores.dtype == torch.float32 and scores.shape == (16,)
    assert scores.std() > 0.05, scores                # or agreement would say nothing
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)


def test_vqa_is_the_formula(vqa, flan, tower):
    pixels, tensors = pictures(16, 336), t5_tensors(flan)
    seen = vqa.see(pixels)
    wanted = image_tokens_by_hand(torch.load(tower / "pytorch_model.bin"), tensors, pixels)
    assert seen.shape == (16, 144, 32) and wanted.std() > 0.5
    torch.testing.assert_close(seen, wanted, atol=2e-5, rtol=1e-5)
    exact = deepcopy(vqa)         # float32 rounds by more than this, how differs by machine
    exact.t5.double()
    exact.t5.lm_head.float()
    scores = exact.judge(seen.double(), PROMPTS)
    wanted = vqa_by_hand(tensors, vqa.tokenizer, seen, CLEAN)
    assert scores.dtype == torch.float32 and scores.std() > 0.05, scores
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)


def test_captions_lose_fences_backticks_and_tags():
    assert [clean(prompt) for prompt in PROMPTS] == CLEAN
    assert clean("<<pad>pad> dog") == "< pad> dog"
    assert clean("<`pad> ```python\nx```") == "x"


def test_image_reward_reads_the_first_33_word_pieces(reward):
    seen = reward.see(pictures(2, 224))
    a, b, c = ["dog " * n + end for n, end in ((33, ""), (33, "red"), (32, "red"))]
    assert torch.equal(reward.judge(seen, [a, a]), reward.judge(seen, [b, b]))
    assert (reward.judge(seen, [a, a]) != reward.judge(seen, [c, c])).all()


def test_text_beyond_t5s_limit_is_cut_off(vqa, monkeypatch):
    assert vqa.LENGTH == 2048
    monkeypatch.setattr(vqa, "LENGTH", 300)
    seen = vqa.see(pictures(1, 336))[:, :1]
    a, b, c = (vqa.judge(seen, ["dog " * 300 + end]) for end in ("", "red", "red dog"))
    assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("name", ["reward", "vqa"])
def test_batch_and_padding_do_not_matter(name, request):
    model = request.getfixturevalue(name)
    pixels = pictures(4, model.VIEW[1])
    prompts = ["dog", "a red dog on a very long sign of many words", "", "a"]
    together = model.judge(model.see(pixels), prompts)
    alone = torch.cat([model.judge(model.see(pixels[i:i + 1]), prompts[i:i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=0)
    order = [2, 0, 3, 1]
    mixed = model.judge(model.see(pixels[order]), [prompts[i] for i in order])
    torch.testing.assert_close(mixed, together[order], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["reward", "vqa"])
def test_prompt_and_picture_both_change_the_score(name, request):
    model = request.getfixturevalue(name)
    seen = model.see(pictures(2, model.VIEW[1]))
    scores = [model.judge(seen, [prompt] * 2) for prompt in ("a dog", "red")]
    assert (scores[0] - scores[1]).abs().min() > 1e-4
    assert all((score[0] - score[1]).abs() > 1e-4 for score in scores)


def test_towers_run_in_bfloat16_and_heads_in_float32(reward, vqa, reward_file, bert, flan, tower):
    for full, half in ((reward, SmallReward(reward_file, bert, "cpu", torch.bfloat16)),
                       (vqa, CLIPFlanT5(flan, tower, flan, "cpu", torch.bfloat16))):
        pixels = pictures(4, full.VIEW[1])
        seen = half.see(pixels)
        scores = half.judge(seen, PROMPTS[:4])
        assert seen.dtype == torch.bfloat16 and scores.dtype == torch.float32
        wanted = full.judge(full.see(pixels), PROMPTS[:4])
        assert (scores - wanted).abs().max() < 0.2 * max(1, wanted.abs().max())
        head = half.mlp[0] if half.VIEW[0] == "crop" else half.t5.lm_head
        assert head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="float16"):
        CLIPFlanT5(flan, tower, flan, "cpu", torch.float16)


# ---- files ---------------------------------------------------------------------------------------

def spoil(tensors: dict, key: str, fault: str) -> dict:
    if fault == "missing":
        return {name: x for name, x in tensors.items() if name != key}
    if fault == "unexpected":
        return tensors | {f"{key}.more": torch.ones(1)}
    return tensors | {key: torch.ones(7)}


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
@pytest.mark.parametrize("key", ["blip.visual_encoder.blocks.1.attn.qkv.bias", "mlp.layers.7.bias",
                                 "blip.text_encoder.encoder.layer.0.crossattention.self.key.bias"])
def test_a_wrong_tensor_of_image_reward_is_named(reward_file, bert, tmp_path, key, fault):
    torch.save(spoil(torch.load(reward_file / "ImageReward.pt"), key, fault),
               tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=f"ImageReward.pt: tensor {key}.* {fault}"):
        SmallReward(tmp_path, bert, "cpu", torch.float32)


def copy(flan: Path, to: Path, tensors: dict, ending: str = "bin", **config) -> Path:
    for path in flan.glob("*.json"):
        if "index" not in path.name:
            (to / path.name).write_text(path.read_text())
    (to / "config.json").write_text(json.dumps(json.loads((flan / "config.json").read_text())
                                               | config))
    write_shards(to, tensors, ending)
    return to


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
@pytest.mark.parametrize("key", ["shared.weight", "lm_head.weight", "mm_projector.2.bias",
                                 "decoder.block.1.layer.1.EncDecAttention.o.weight"])
def test_a_wrong_shard_is_named_with_its_tensor(flan, tower, tmp_path, key, fault):
    copy(flan, tmp_path, spoil(t5_tensors(flan), key, fault))
    with pytest.raises(ValueError, match=f"index.json: tensor {key}.* {fault}"):
        CLIPFlanT5(tmp_path, tower, flan, "cpu", torch.float32)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_a_wrong_tower_is_named_with_its_tensor(flan, tower, tmp_path, fault):
    key = "vision_model.encoder.layers.2.mlp.fc1.weight"
    (tmp_path / "config.json").write_text((tower / "config.json").read_text())
    torch.save(spoil(torch.load(tower / "pytorch_model.bin"), key, fault),
               tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"pytorch_model.bin: tensor {key}.* {fault}"):
        CLIPFlanT5(flan, tmp_path, flan, "cpu", torch.float32)


def test_safetensors_shards_score_the_same(vqa, flan, tower, tmp_path):
    other = CLIPFlanT5(copy(flan, tmp_path, t5_tensors(flan), "safetensors"), tower, flan, "cpu",
                       torch.float32)
    pixels = pictures(2, 336)
    assert torch.equal(other.judge(other.see(pixels), ["a", "dog"]),
                       vqa.judge(vqa.see(pixels), ["a", "dog"]))


def test_an_index_does_not_lead_out_of_its_folder(flan, tower, tmp_path):
    folder = copy(flan, tmp_path, t5_tensors(flan))
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-00001", "../pytorch_model-00001"))
    with pytest.raises(ValueError, match="names files of other folders"):
        CLIPFlanT5(folder, tower, flan, "cpu", torch.float32)


def test_the_tower_in_the_checkpoint_comes_first(flan, tower, tmp_path):
    changed = {key: x * 1.1 for key, x in torch.load(tower / "pytorch_model.bin").items()
               if key.startswith("vision_model.") and "position_ids" not in key}
    copy(flan, tmp_path, t5_tensors(flan) | {f"vision_tower.vision_tower.{key}": x
                                             for key, x in changed.items()})
    model = CLIPFlanT5(tmp_path, tower, flan, "cpu", torch.float32)
    wanted = image_tokens_by_hand(changed, t5_tensors(flan), pictures(1, 336))
    torch.testing.assert_close(model.see(pictures(1, 336)), wanted, atol=1e-4, rtol=1e-4)


def test_what_is_no_flan_t5_is_refused(flan, tower, tmp_path):
    tensors = t5_tensors(flan)
    table = {"encoder.embed_tokens.weight": tensors["shared.weight"] + 1}
    with pytest.raises(ValueError, match="encoder.embed_tokens.weight"):
        CLIPFlanT5(copy(flan, tmp_path, tensors | table), tower, flan, "cpu", torch.float32)
    copy(flan, tmp_path, tensors, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        CLIPFlanT5(tmp_path, tower, flan, "cpu", torch.float32)


# ---- what small models do not show ---------------------------------------------------------------

def test_image_reward_has_the_configuration_of_its_checkpoint(reward):
    assert ImageReward.VISION == {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096, "image_size": 224, "patch_size": 16, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6}
    assert ImageReward.TEXT == {
        "vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024,
        "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "is_decoder": True}
    assert ImageReward.LENGTH == 35 and ImageReward.VIEW == ("crop", 224)
    norms = [m.eps for m in reward.vision.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 5 and set(norms) == {1e-6}
    norms = [m.eps for m in reward.text.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 7 and set(norms) == {1e-12}
    assert not any(m.training for m in (reward.vision, reward.text, reward.mlp))


def test_vqa_has_the_configuration_of_its_checkpoint(vqa):
    assert CLIPFlanT5.LAYER == -2 and CLIPFlanT5.VIEW == ("pad", 336)
    assert vqa.tower.config.hidden_act == "quick_gelu" and vqa.tower.config.layer_norm_eps == 1e-5
    assert vqa.t5.config.dense_act_fn == "gelu_new" and vqa.t5.config.is_gated_act
    assert not vqa.t5.config.scale_decoder_outputs
    assert not torch.equal(vqa.t5.lm_head.weight, vqa.t5.shared.weight)
    assert vqa.answer == vqa.tokenizer("Yes").input_ids and len(vqa.answer) == 2
    assert not any(m.training for m in (vqa.t5, vqa.tower, vqa.projector))


def test_no_token_comes_before_cls(reward):
    ids = reward.tokenizer(["dog"]).input_ids[0]
    assert ids == reward.tokenizer.convert_tokens_to_ids(["[CLS]", "dog", "[SEP]"])


# ---- the cost that --dry-run prints --------------------------------------------------------------

def gflop(run) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def test_the_cost_of_image_reward_is_that_of_its_network_at_full_size():
    with torch.device("meta"):
        vision = BlipVisionModel(BlipVisionConfig(**ImageReward.VISION))
        text = BlipTextModel(BlipTextConfig(**ImageReward.TEXT), add_pooling_layer=False)
        pixels, seen = torch.empty(1, 3, 224, 224), torch.empty(1, 197, 1024)
        ids = torch.ones(1, ImageReward.LENGTH, dtype=torch.long)
        found = (gflop(lambda: vision(pixels)),
                 gflop(lambda: text(ids, encoder_hidden_states=seen)))
    assert found == pytest.approx(ImageReward.GFLOP, rel=0.05)


@pytest.mark.parametrize("kind, d, inner, heads", [(CLIPFlanT5, 4096, 10240, 64),
                                                   (CLIPFlanT5XL, 2048, 5120, 32)])
def test_the_cost_of_vqa_is_that_of_its_network_at_full_size(kind, d, inner, heads):
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
            num_attention_heads=16, image_size=336, patch_size=14))
        t5 = T5ForConditionalGeneration(T5Config(
            d_model=d, d_ff=inner, num_heads=heads, d_kv=64, num_layers=24, vocab_size=32128,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0))
        projector = torch.nn.Sequential(torch.nn.Linear(1024, d), torch.nn.Linear(d, d))
        pixels, patches = torch.empty(1, 3, 336, 336), torch.empty(1, 576, 1024)
        x = torch.empty(1, 38 + 576 + 97, d)               # a caption of 77 tokens in its question
        start = torch.ones(1, 2, dtype=torch.long)
        look = gflop(lambda: tower(pixels)) + gflop(lambda: projector(patches))
        judge = gflop(lambda: t5.lm_head(t5.decoder(
            start, encoder_hidden_states=t5.encoder(inputs_embeds=x)[0], use_cache=False)[0]))
    assert (look, judge) == pytest.approx(kind.GFLOP, rel=0.05)
