"""Masked language models of Hugging Face as teachers, on tiny random models saved by the test."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse.core.errors import DataError
from stillhouse.genomic.teacher import HuggingFaceTeacher, Teacher, evaluate_teacher, licence_terms
from stillhouse.genomic.tokenizers import CharacterTokenizer, KmerTokenizer

CARD = "---\nlicense: cc-by-nc-sa-4.0\ntags:\n- DNA\n---\n# A model\n"
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 50, "position_embedding_type": "rotary", "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "token_dropout": False, "emb_layer_norm_before": False,
    "layer_norm_eps": 1e-12, "vocab_size": 4107, "pad_token_id": 1, "mask_token_id": 2,
}  # fmt: skip


def ntv2_tokenizer(folder: Path) -> None:
    kmers = ["".join(w) for w in product("ATCG", repeat=6)]
    lines = ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>", *kmers, *"ATCGN"]
    (folder / "vocab.txt").write_text("\n".join(lines))
    settings = {"tokenizer_class": "EsmTokenizer", "eos_token": None, "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def windows_of(*texts: str) -> np.ndarray:
    return np.frombuffer("".join(texts).encode(), np.uint8).reshape(len(texts), -1)


WINDOWS = windows_of("ACGTTGCAACGTTAGACCATGACTTACGGA", "ACGTTGCANCGTTAGACCATGACTTACGGA")


@pytest.fixture(scope="module")
def esm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import EsmConfig, EsmForMaskedLM

    folder = tmp_path_factory.mktemp("esm")
    torch.manual_seed(0)
    model = EsmForMaskedLM(EsmConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    ntv2_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def esm(esm_folder: Path) -> HuggingFaceTeacher:
    return HuggingFaceTeacher.from_pretrained(esm_folder)


@pytest.mark.oracle
def test_features_are_the_hidden_states_of_transformers(esm_folder, esm):
    from transformers import EsmForMaskedLM, EsmTokenizer

    model = EsmForMaskedLM.from_pretrained(esm_folder).eval()
    tokenizer = EsmTokenizer(str(esm_folder / "vocab.txt"), eos_token=None)
    texts = [row.tobytes().decode() for row in WINDOWS]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    tokens = esm.tokenizer.encode(WINDOWS)
    assert torch.equal(inputs["input_ids"][:, 1:], tokens.ids)
    assert isinstance(esm, Teacher)
    assert (esm.width, esm.depth, esm.max_tokens) == (16, 3, 47)
    found = esm.features(tokens, layers=(0, 1, 2, 3))
    for layer, values in enumerate(found):
        expected = output.hidden_states[layer][:, 1:]
        torch.testing.assert_close(values[tokens.valid], expected[tokens.valid], rtol=1e-4, atol=1e-5)
    assert torch.equal(esm.features(tokens)[0], found[3])


@pytest.mark.oracle
def test_the_last_layer_is_after_the_last_norm_unless_asked_otherwise(esm_folder, esm):
    """What the JAX release calls the LM head's first layer norm is emb_layer_norm_after here."""
    tokens = esm.tokenizer.encode(WINDOWS[:1])
    block = HuggingFaceTeacher.from_pretrained(esm_folder, final="block")
    before, after = block.features(tokens)[0], esm.features(tokens)[0]
    norm = esm.network.esm.encoder.emb_layer_norm_after
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(norm(before), after, rtol=1e-4, atol=1e-5)
    logits = esm.network.lm_head(after)
    with torch.no_grad():
        whole = esm.network(torch.cat([torch.tensor([[3]]), tokens.ids], 1)).logits[:, 1:]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)


def test_padding_and_hidden_tokens(esm):
    tokens = esm.tokenizer.encode(WINDOWS)
    both = esm.features(tokens)[0]
    alone = esm.features(esm.tokenizer.encode(WINDOWS[:1]))[0]
    torch.testing.assert_close(both[0, :5], alone[0], rtol=1e-4, atol=1e-5)
    hide = torch.zeros_like(tokens.valid)
    hide[:, 2] = True
    other = tokens.ids.clone()
    other[0, 2] = 99
    changed = type(tokens)(other, tokens.groups, tokens.lengths, tokens.sizes)
    assert torch.equal(esm.features(tokens, visible=~hide)[0], esm.features(changed, visible=~hide)[0])
    assert torch.equal(
        esm.nucleotide_log_probs(tokens, visible=~hide), esm.nucleotide_log_probs(changed, visible=~hide)
    )
    assert not torch.allclose(esm.features(tokens)[0], esm.features(changed)[0])


def test_log_probs_are_the_marginals_of_the_logits(esm):
    tokens = esm.tokenizer.encode(WINDOWS[:1])
    with torch.no_grad():
        logits = esm.network(torch.cat([torch.tensor([[3]]), tokens.ids], 1)).logits[0, 2]  # [CLS] first
    probs = logits[6:4102].softmax(0).view([4] * 6)
    log_probs = esm.nucleotide_log_probs(tokens)
    assert log_probs.shape == (1, 30, 4)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(1, 30))
    a, t, c, g = probs.sum((0, 1, 3, 4, 5))
    torch.testing.assert_close(log_probs[0, 8].exp(), torch.stack([a, c, g, t]), rtol=1e-4, atol=1e-6)
    assert evaluate_teacher(esm, WINDOWS)["characters"] > 0


def test_context_and_emptiness(esm):
    esm.features(esm.tokenizer.encode(np.full((1, 47 * 6), ord("A"), np.uint8)))
    with pytest.raises(ValueError, match="48 tokens and this teacher reads 47"):
        esm.features(esm.tokenizer.encode(np.full((1, 48 * 6), ord("A"), np.uint8)))
    empty = esm.tokenizer.encode(np.zeros((2, 0), np.uint8))
    assert esm.features(empty)[0].shape == (2, 0, 16)
    assert esm.nucleotide_log_probs(empty).shape == (2, 0, 4)


def test_fresh_weights(esm):
    state = torch.random.get_rng_state()
    fresh, same, other = (esm.untrained(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    tokens = esm.tokenizer.encode(WINDOWS)
    assert torch.equal(fresh.features(tokens)[0], same.features(tokens)[0])
    assert not torch.allclose(fresh.features(tokens)[0], other.features(tokens)[0])
    assert fresh.parameters == esm.parameters
    assert fresh.licence is None


# ------------------------------------------------------------------------------------------------------ NTv2


def ntv2_weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights under the names of the released checkpoints, buffers that are no longer used included."""

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    d, hidden = SIZES["hidden_size"], SIZES["intermediate_size"]
    weights = {
        "esm.embeddings.word_embeddings.weight": draw(4107, d),
        "esm.embeddings.position_embeddings.weight": draw(50, d),
        "esm.encoder.emb_layer_norm_after.weight": 1 + draw(d),
        "esm.encoder.emb_layer_norm_after.bias": draw(d),
        "esm.contact_head.regression.weight": draw(1, 12),
        "esm.contact_head.regression.bias": draw(1),
        "lm_head.dense.weight": draw(d, d),
        "lm_head.dense.bias": draw(d),
        "lm_head.layer_norm.weight": 1 + draw(d),
        "lm_head.layer_norm.bias": draw(d),
        "lm_head.decoder.weight": draw(4107, d),
        "lm_head.bias": draw(4107),
    }
    for i in range(SIZES["num_hidden_layers"]):
        p = f"esm.encoder.layer.{i}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            weights[f"{p}attention.{name}.weight"] = draw(d, d)
            weights[f"{p}attention.{name}.bias"] = draw(d)
        weights[f"{p}attention.self.rotary_embeddings.inv_freq"] = 10000.0 ** (-torch.arange(0, 4, 2) / 4)
        for name in ("attention.LayerNorm", "LayerNorm"):
            weights[f"{p}{name}.weight"], weights[f"{p}{name}.bias"] = 1 + draw(d), draw(d)
        weights[f"{p}intermediate.dense.weight"] = draw(2 * hidden, d)
        weights[f"{p}output.dense.weight"] = draw(d, hidden)
    return weights


def ntv2_by_hand(w: dict[str, torch.Tensor], ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features after the last norm and logits of one window, from the published description."""
    w = {name: value.double() for name, value in w.items()}
    heads, size = 4, 4

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", torch.tensor(0.0))

    x = w["esm.embeddings.word_embeddings.weight"][ids]
    angle = torch.arange(len(ids), dtype=torch.float64)[:, None] * torch.tensor(
        [1.0, 0.01], dtype=torch.float64
    )
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(part):
        z = torch.complex(part[:, :2], part[:, 2:]) * turn
        return torch.cat([z.real, z.imag], -1)

    for i in range(3):
        p = f"esm.encoder.layer.{i}."
        y = norm(x, p + "attention.LayerNorm")
        q, k, v = (linear(y, f"{p}attention.self.{name}") for name in ("query", "key", "value"))
        parts = []
        for h in range(heads):
            s = slice(h * size, (h + 1) * size)
            parts.append((rotate(q[:, s] / size**0.5) @ rotate(k[:, s]).T).softmax(-1) @ v[:, s])
        x = x + linear(torch.cat(parts, -1), p + "attention.output.dense")
        gate, value = linear(norm(x, p + "LayerNorm"), p + "intermediate.dense").chunk(2, -1)
        x = x + linear(gate * torch.sigmoid(gate) * value, p + "output.dense")
    features = norm(x, "esm.encoder.emb_layer_norm_after")
    y = linear(features, "lm_head.dense")
    y = norm(y * 0.5 * (1 + torch.erf(y / 2**0.5)), "lm_head.layer_norm")
    return features, y @ w["lm_head.decoder.weight"].T + w["lm_head.bias"]


def ntv2_folder(folder: Path, *, card: bool) -> dict[str, torch.Tensor]:
    weights = ntv2_weights(torch.Generator().manual_seed(5))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code = {"AutoConfig": "esm_config.EsmConfig", "AutoModelForMaskedLM": "modeling_esm.EsmForMaskedLM"}
    config = {
        **SIZES,
        "add_bias_fnn": False, "architectures": ["EsmForMaskedLM"], "auto_map": code, "esmfold_config": None,
        "is_folding_model": False, "tie_word_embeddings": False, "torch_dtype": "float32",
        "transformers_version": "4.32.0.dev0", "use_cache": False, "vocab_list": None, "model_type": "esm",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    ntv2_tokenizer(folder)
    if card:
        (folder / "README.md").write_text(CARD)
    return weights


def test_ntv2_is_loaded_without_its_code(tmp_path):
    weights = ntv2_folder(tmp_path, card=False)
    teacher = HuggingFaceTeacher.from_pretrained(tmp_path)
    tokens = teacher.tokenizer.encode(WINDOWS)
    found = teacher.features(tokens)[0]
    with torch.no_grad():
        padded = torch.cat([torch.full((2, 1), 3), tokens.ids], 1)
        mask = torch.cat([torch.ones(2, 1), tokens.valid], 1).long()
        logits = teacher.network(padded, attention_mask=mask).logits[:, 1:]
    for row in range(2):
        count = int(tokens.lengths[row])
        features, expected = ntv2_by_hand(weights, [3, *tokens.ids[row, :count].tolist()])
        torch.testing.assert_close(found[row, :count].double(), features[1:], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(logits[row, :count].double(), expected[1:], rtol=1e-3, atol=1e-4)
    assert teacher.licence == "CC-BY-NC-SA-4.0"  # known without a card
    fresh = teacher.untrained(0)
    assert fresh.parameters == teacher.parameters
    assert not torch.allclose(fresh.features(tokens)[0], found)


def test_the_licence_is_read_and_carried(tmp_path, esm_folder, esm):
    assert esm.licence is None
    ntv2_folder(tmp_path, card=True)
    assert HuggingFaceTeacher.from_pretrained(tmp_path).licence == "CC-BY-NC-SA-4.0"
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: 'apache-2.0'  # ours\n---\n")
    assert HuggingFaceTeacher.from_pretrained(tmp_path).licence == "Apache-2.0"
    assert HuggingFaceTeacher.from_pretrained(esm_folder, licence="MIT").licence == "MIT"
    terms = licence_terms("CC-BY-NC-SA-4.0", "nt")
    assert terms.commercial is False
    assert "same licence" in terms.terms
    assert licence_terms(None, "x").licence == "unknown"
    assert licence_terms("MIT", "x").commercial is None


def test_models_that_do_not_fit_say_why(tmp_path, esm_folder):
    with pytest.raises(DataError, match="no such folder"):
        HuggingFaceTeacher.from_pretrained(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"config.json: cannot be read"):
        HuggingFaceTeacher.from_pretrained(tmp_path)
    weights = ntv2_folder(tmp_path, card=False)
    lacking = {k: v for k, v in weights.items() if k != "esm.encoder.layer.1.output.dense.weight"}
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 weights, such as esm.encoder.layer.1.output.dense.weight"):
        HuggingFaceTeacher.from_pretrained(tmp_path)
    save_file(
        {**weights, "extra.weight": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(DataError, match=r"no place in the model, such as extra.weight"):
        HuggingFaceTeacher.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(DataError, match="cannot be loaded"):
        HuggingFaceTeacher.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DataError, match="cannot be loaded"):
        HuggingFaceTeacher.from_pretrained(tmp_path)
    config = json.loads((esm_folder / "config.json").read_text())
    for name in ("model.safetensors", "vocab.txt"):
        (tmp_path / name).write_bytes((esm_folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mask_token_id": 4}))
    with pytest.raises(DataError, match="the mask token 4 and the vocabulary 2"):
        HuggingFaceTeacher.from_pretrained(tmp_path)
    gated = {"add_bias_fnn": False, **config}  # says NTv2, holds plain ESM
    (tmp_path / "config.json").write_text(json.dumps(gated))
    with pytest.raises(DataError, match=r"cannot be loaded|another shape|no place"):
        HuggingFaceTeacher.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="final is"):
        HuggingFaceTeacher.from_pretrained(esm_folder, final="middle")
    model = HuggingFaceTeacher.from_pretrained(esm_folder).network
    larger = {**KmerTokenizer().vocabulary, "<more>": 4107}
    with pytest.raises(ValueError, match="not of one model"):
        HuggingFaceTeacher(model, KmerTokenizer(vocabulary=larger), name="x")


def test_a_masked_language_model_over_characters(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, pad_token_id=4,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path)
    CharacterTokenizer().save_pretrained(tmp_path)
    teacher = HuggingFaceTeacher.from_pretrained(tmp_path)
    assert (teacher.tokenizer.k, teacher.tokenizer.cls_id, teacher.max_tokens) == (1, None, 40)
    tokens = teacher.tokenizer.encode(WINDOWS)
    assert tokens.ids.shape == WINDOWS.shape
    first, last = teacher.features(tokens, layers=(1, -1))
    assert first.shape == last.shape == (2, 30, 8)
    log_probs = teacher.nucleotide_log_probs(tokens)
    with torch.no_grad():
        logits = teacher.network(tokens.ids).logits[..., 7:11]
    torch.testing.assert_close(log_probs[0], logits[0].log_softmax(-1), rtol=1e-4, atol=1e-5)
    assert (log_probs[1, 8].exp() == 0.25).all()  # N
    with pytest.raises(DataError, match='final is "block"'):
        HuggingFaceTeacher.from_pretrained(tmp_path, final="block")


def test_saved_weights_are_the_ones_that_answer(esm_folder, esm):
    stored = load_file(esm_folder / "model.safetensors")["esm.embeddings.word_embeddings.weight"]
    tokens = esm.tokenizer.encode(WINDOWS[:1])
    assert torch.equal(esm.features(tokens, layers=(0,))[0][0], stored[tokens.ids[0]])


CODE = """
from pathlib import Path
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

Path({marker!r}).write_text("was run")

class OwnConfig(PreTrainedConfig):
    model_type = "own"
    def __init__(self, vocab_size=4107, hidden_size=8, num_hidden_layers=1, **rest):
        super().__init__(**rest)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = num_hidden_layers

class OwnForMaskedLM(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()
    def forward(self, input_ids, output_hidden_states=False):
        x = self.words(input_ids)
        return MaskedLMOutput(logits=self.head(x.tanh()), hidden_states=(x, x.tanh()))
"""


def test_code_of_a_model_runs_only_where_it_is_asked_for(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tmp_path / "model", tmp_path / "marker"
    folder.mkdir()
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForMaskedLM": "own.OwnForMaskedLM"}
    config = {
        "model_type": "own",
        "auto_map": code,
        "vocab_size": 4107,
        "hidden_size": 8,
        "num_hidden_layers": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {"words.weight": torch.randn(4107, 8), "head.weight": torch.randn(4107, 8)}
    weights["head.bias"] = torch.randn(4107)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ntv2_tokenizer(folder)
    with pytest.raises(DataError, match="comes with its own code, which was not run"):
        HuggingFaceTeacher.from_pretrained(folder)
    assert not marker.exists()
    teacher = HuggingFaceTeacher.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()
    tokens = teacher.tokenizer.encode(WINDOWS)
    first, last = teacher.features(tokens, layers=(0, -1))
    assert torch.equal(first, weights["words.weight"][tokens.ids])
    assert torch.equal(last, first.tanh())
    assert teacher.nucleotide_log_probs(tokens).shape == (2, 30, 4)


def test_a_name_that_cannot_be_downloaded(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*_args, **_options):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DataError, match=r"InstaDeepAI/nt: no such folder, and .* \(no network\)"):
        HuggingFaceTeacher.from_pretrained("InstaDeepAI/nt")
