"""Student folders: round trips, transformers' Auto classes, terms on the card, damage."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stillhouse.core.artifact import Artifact, Licence
from stillhouse.core.errors import DataError
from stillhouse.genomic.student import MaskedDecoder, StudentConfig, build_student
from stillhouse.genomic.student.store import front_matter, load_student, save_student
from stillhouse.genomic.tokenizers import CharacterTokenizer

CONFIGS = {
    "gdn": StudentConfig(width=16, chunk=8),
    "rc": StudentConfig(width=16, gdn_layers=1, rc_equivariant=True),
    "cnn": StudentConfig(kind="cnn", width=16, conv_layers=2, mlp_ratio=1.0),
    "transformer": StudentConfig(kind="transformer", width=16, attention_layers=2),
}
NON_COMMERCIAL = Licence(
    what="teacher weights", name="a teacher", licence="CC-BY-NC-SA-4.0", terms="No sale.", commercial=False
)


def letters(batch: int = 2, length: int = 20) -> Tensor:
    ids = torch.randint(7, 11, (batch, length), generator=torch.Generator().manual_seed(0))
    ids[:, 4:9] = 3
    return ids


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a decoder, that no test may change."""
    torch.manual_seed(0)
    encoder = build_student(CONFIGS["gdn"])
    folder = tmp_path_factory.mktemp("hf") / "student"
    save_student(
        folder, encoder, MaskedDecoder(16), CharacterTokenizer(), card="# Mine", licences=[NON_COMMERCIAL]
    )
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "student"))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("masked", [True, False])
def test_round_trip(tmp_path, name, masked):
    torch.manual_seed(0)
    encoder = build_student(CONFIGS[name]).eval()
    decoder = MaskedDecoder(encoder.width, depth=2, inner=8) if masked else None
    save_student(
        tmp_path / "s", encoder, decoder, CharacterTokenizer(), training={"steps": 3}, metrics={"loss": 1.5}
    )
    loaded = load_student(tmp_path / "s")
    ids = letters()
    assert torch.equal(loaded.encoder(ids), encoder(ids))
    assert loaded.config == CONFIGS[name]
    assert (loaded.training, loaded.artifact.metrics) == ({"steps": 3}, {"loss": 1.5})
    assert loaded.tokenizer.mask_id == 3
    assert not loaded.encoder.training
    assert (loaded.decoder is not None) == masked
    if decoder is not None and loaded.decoder is not None:
        queries = ids == 3
        expected = decoder(encoder(ids), ~queries, queries)
        assert torch.equal(loaded.decoder(loaded.encoder(ids), ~queries, queries), expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("masked", [True, False])
def test_auto_model(tmp_path, name, masked):
    """AutoModel reads the folder without remote code and gives the same features."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    import stillhouse.genomic.huggingface

    torch.manual_seed(0)
    encoder = build_student(CONFIGS[name]).eval()
    decoder = MaskedDecoder(encoder.width) if masked else None
    save_student(tmp_path / "s", encoder, decoder, CharacterTokenizer())
    config = AutoConfig.from_pretrained(tmp_path / "s")
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers) == (
        encoder.width,
        16,
        encoder.depth,
    )
    model, info = AutoModel.from_pretrained(tmp_path / "s", output_loading_info=True)
    assert type(model) is stillhouse.genomic.huggingface.StudentModel
    assert not info["missing_keys"]
    ids = letters()
    assert torch.equal(model(ids).last_hidden_state, encoder(ids))

    batch = AutoTokenizer.from_pretrained(tmp_path / "s")(
        ["acgtn", "ACG"], padding=True, return_tensors="pt", add_special_tokens=False
    )
    features = model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    alone = encoder(torch.tensor([[7, 8, 9]]))
    torch.testing.assert_close(features[1, batch["attention_mask"][1].bool()], alone[0], rtol=0, atol=1e-5)

    model.save_pretrained(tmp_path / "again")
    assert {p.suffix for p in (tmp_path / "again").iterdir()} <= {".json", ".safetensors"}
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "again")(ids)[0], encoder(ids))


def test_auto_masked_model(original):
    from transformers import AutoModelForMaskedLM

    import stillhouse.genomic.huggingface  # noqa: F401, registers

    model, info = AutoModelForMaskedLM.from_pretrained(original, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded = load_student(original)
    ids = letters()
    queries = ids == 3
    expected = loaded.decoder(loaded.encoder(ids), ~queries, queries)
    labels = torch.full_like(ids, -100)
    labels[:, 4:9] = torch.tensor([7, 8, 9, 10, 11])  # N is no nucleotide and is not scored
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.logits[..., 7:11][queries], expected[queries], rtol=0, atol=1e-6)
    assert (output.logits.argmax(-1)[~queries] == ids[~queries]).all(), "visible letters are known"
    assert ((output.logits.argmax(-1)[queries] >= 7) & (output.logits.argmax(-1)[queries] <= 10)).all()
    wanted = torch.nn.functional.cross_entropy(expected[:, 4:8].flatten(0, 1), torch.arange(4).repeat(2))
    torch.testing.assert_close(output.loss, wanted, rtol=0, atol=1e-6)
    output.loss.backward()


def test_labelled_letters_are_hidden_from_the_decoder(original):
    """Letters that stand in `input_ids` but have a label are decoded without their own features."""
    from stillhouse.genomic.huggingface import StudentForMaskedLM

    model = StudentForMaskedLM.from_pretrained(original)
    ids = letters()
    labels = torch.full_like(ids, -100)
    labels[:, 15] = 7
    seen = []
    model.decoder.register_forward_pre_hook(lambda m, args: seen.append(args[1:]))
    model(ids, labels=labels)
    visible, queries = seen[0]
    assert not visible[:, 15].any()
    assert queries[:, 15].all()
    assert queries[:, 4:9].all()


def test_padding_and_tuples(original):
    from stillhouse.genomic.huggingface import StudentForMaskedLM

    model = StudentForMaskedLM.from_pretrained(original)
    ids, mask = letters(1), torch.ones(1, 20, dtype=torch.int64)
    padded = torch.cat([torch.full((1, 6), 4), ids], 1)
    longer = torch.cat([torch.zeros(1, 6, dtype=torch.int64), mask], 1)
    alone = model(ids).logits
    torch.testing.assert_close(model(padded, longer).logits[:, 6:], alone, rtol=0, atol=1e-5)
    logits, hidden = model(ids, return_dict=False, output_hidden_states=True)
    assert torch.equal(logits, alone)
    assert len(hidden) == 3


def test_without_a_decoder_there_is_no_masked_model(tmp_path):
    from transformers import AutoModelForMaskedLM

    import stillhouse.genomic.huggingface  # noqa: F401, registers

    save_student(tmp_path / "s", build_student(CONFIGS["cnn"]), None, CharacterTokenizer())
    with pytest.raises(ValueError, match="no decoder"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "s")


def test_saving_and_loading_do_without_transformers_models(original):
    """Reading a student imports no transformers: commands stay quick."""
    code = (
        "import sys; from stillhouse.genomic.student.store import load_student; "
        f"load_student({str(original)!r}); print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ------------------------------------------------------------------------------------ card


def front(card: str) -> dict[str, str]:
    import yaml

    return yaml.safe_load(card.split("---")[1])


def test_non_commercial_terms_reach_the_card(original):
    card = load_student(original).card
    assert card.startswith("---\n")
    assert front(card)["license"] == "cc-by-nc-sa-4.0"
    assert "Not for commercial use" in card
    assert "No sale." in card
    assert "# Mine" in card
    assert "AutoModelForMaskedLM" in card


@pytest.mark.parametrize(
    "licence, expected",
    [("Apache-2.0", {"license": "apache-2.0"}), ("Ask: me", {"license": "other", "license_name": "Ask: me"})],
)
def test_licence_of_ones_own(licence, expected):
    found = front(front_matter(licence) + "# x")
    assert {k: v for k, v in found.items() if k.startswith("license")} == expected
    assert found["library_name"] == "transformers"


def test_the_readers_of_the_hub_read_the_card(original):
    from huggingface_hub import ModelCard

    data = ModelCard.load(original / "README.md").data
    assert (data.license, data.library_name) == ("cc-by-nc-sa-4.0", "transformers")


def test_saving_refuses_what_does_not_fit(tmp_path):
    encoder = build_student(CONFIGS["cnn"])
    with pytest.raises(ValueError, match="decoder reads 8 channels"):
        save_student(tmp_path / "s", encoder, MaskedDecoder(8), CharacterTokenizer())
    with pytest.raises(ValueError, match="front matter"):
        save_student(tmp_path / "s", encoder, None, CharacterTokenizer(), card="---\nlicense: mit\n---\n")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError):
        save_student(tmp_path / "s", encoder, None, CharacterTokenizer())
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["thesis.txt"]


# ------------------------------------------------------------------------------------ damage

FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
    "README.md",
    "artifact.json",
    "SHA256SUMS",
)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_student(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(DataError):
        load_student(folder)


def test_an_added_file(folder):
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(DataError, match="pytorch_model"):
        load_student(folder)


def test_another_artefact_and_no_artefact(tmp_path):
    Artifact.save(tmp_path / "a", kind="kidney.student", tensors={}, config={}, metrics={}, card="# x")
    with pytest.raises(DataError, match=r"kidney\.student"):
        load_student(tmp_path / "a")
    with pytest.raises(DataError):
        load_student(tmp_path / "nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"student": {"kind": "gdn", "width": 32}},
        {"student": {"kind": "mamba"}},
        {"student": {"layers": 3}},
        {"student": None},
        {"decoder": None},
        {"decoder": {"width": 16, "depth": 2}},
        {"decoder": {"width": 16, "size": 2}},
    ],
)
def test_a_configuration_of_other_weights(original, tmp_path, change):
    """A folder whose checksums are right and whose content is not."""
    loaded = load_student(original).artifact
    extra = {n: loaded.file(n) for n in ("tokenizer.json", "tokenizer_config.json", "training.json")}
    Artifact.save(
        tmp_path / "s",
        kind=loaded.kind,
        tensors=loaded.tensors(),
        config={**loaded.config, **change},
        metrics={},
        card="# x",
        files=extra,
    )
    with pytest.raises(DataError, match=r"config\.json"):
        load_student(tmp_path / "s")


def test_a_run_folder_holds_it(original, tmp_path):
    shutil.copytree(original, tmp_path / "run" / "student")
    assert load_student(tmp_path / "run").config == CONFIGS["gdn"]


def test_config_json_is_plain(original):
    config = json.loads((original / "config.json").read_text())
    assert config["model_type"] == "stillhouse-genomic-student"
    assert config["architectures"] == ["StudentForMaskedLM"]
    assert StudentConfig(**config["student"]) == replace(CONFIGS["gdn"])
