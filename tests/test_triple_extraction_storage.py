"""A saved extractor is there as a whole or not at all, comes back the same, and is no pickle."""

import json
import pickle
import sys

import pytest
import tokenizers
import torch
import transformers
from torch import nn

from cln_tutorial.triple_extraction import storage
from cln_tutorial.triple_extraction.characters import CharTokenizer
from cln_tutorial.triple_extraction.encoders import SmallEncoder
from cln_tutorial.triple_extraction.model import TripleExtractor

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
MARKS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1}


def bert(**options):
    return transformers.BertModel(transformers.BertConfig(**SIZES), **options)


def modern_bert():
    return transformers.ModernBertModel(
        transformers.ModernBertConfig(**SIZES, **MARKS, eos_token_id=2)
    )


ENCODERS = {
    "dgcnn": lambda: SmallEncoder(60, 16, num_layers=2),
    "transformer": lambda: SmallEncoder(60, 16, "transformer", 1, 20, 0.3),
    "bert": bert,
    "bert without pooler": lambda: bert(add_pooling_layer=False),
    "modernbert": modern_bert,
}


def made(kind="dgcnn", seed=0, **options):
    torch.manual_seed(seed)
    model = TripleExtractor(ENCODERS[kind](), ["born in", "works for"], **options)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def logits(model):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    out = model(ids, subject_spans=torch.tensor([[0, 1]]), subject_batch=torch.tensor([1]))
    return torch.cat([out.subject_logits.flatten(), out.object_logits.flatten()])


def word_tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, "Kafka": 2, "was": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]"
    )


def names(folder):
    return sorted(path.name.split("-")[0] for path in folder.iterdir())


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_loaded_model_is_the_saved_one_bit_for_bit(kind, tmp_path):
    model = made(kind)
    model.train().save_pretrained(tmp_path / "new" / "folder")
    assert model.training
    loaded = TripleExtractor.from_pretrained(tmp_path / "new" / "folder")
    assert not any(module.training for module in loaded.modules())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor)
    assert logits(loaded).equal(logits(model.eval()))
    assert loaded.relations == ("born in", "works for")


def test_every_setting_comes_back(tmp_path):
    settings = {
        "conditioning": "add",
        "subject_pooling": "mean",
        "norm_tap": "output",
        "subject_power": 1.5,
        "object_power": 3.0,
        "max_length": 12,
        "stride": 3,
        "threshold": (0.25, 0.75),
    }
    model = made(dropout=0.125, **settings)
    model.save_pretrained(tmp_path)
    loaded = TripleExtractor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.dropout.p == 0.125
    assert loaded.encoder.config == model.encoder.config
    assert logits(loaded).equal(logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_comes_back(dtype, tmp_path):
    model = made("bert").to(dtype)
    model.save_pretrained(tmp_path)
    loaded = TripleExtractor.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert logits(loaded).equal(logits(model))


def test_a_tokenizer_of_characters_comes_back(tmp_path):
    model = made(tokenizer=CharTokenizer("卡夫"))
    model.save_pretrained(tmp_path)
    loaded = TripleExtractor.from_pretrained(tmp_path)
    assert loaded.tokenizer(["卡夫卡!"]) == model.tokenizer(["卡夫卡!"])
    other = CharTokenizer("x")
    assert TripleExtractor.from_pretrained(tmp_path, tokenizer=other).tokenizer is other


def test_a_tokenizer_of_hugging_face_comes_back(tmp_path):
    model = made("bert", tokenizer=word_tokenizer())
    model.save_pretrained(tmp_path)
    loaded = TripleExtractor.from_pretrained(tmp_path)
    assert loaded.tokenizer.is_fast
    assert loaded.tokenizer(["Kafka was"])["input_ids"] == [[2, 3]]


def test_a_loaded_model_predicts_the_same(tmp_path):
    # Untrained, with thresholds of nearly zero: whatever it finds.
    model = made(tokenizer=CharTokenizer.fit(["卡夫卡生于布拉格"]), threshold=(1e-3, 1e-3))
    model.save_pretrained(tmp_path)
    found = model.predict(["卡夫卡生于布拉格"])
    assert found[0]
    assert TripleExtractor.from_pretrained(tmp_path).predict(["卡夫卡生于布拉格"]) == found


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("no pickle")

    for module, name in [
        (pickle, "loads"),
        (pickle, "load"),
        (pickle, "dumps"),
        (torch, "load"),
        (torch, "save"),
    ]:
        monkeypatch.setattr(module, name, refuse)
    model = made("bert", tokenizer=word_tokenizer())
    model.save_pretrained(tmp_path)
    TripleExtractor.from_pretrained(tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_a_later_model_replaces_the_earlier_one_and_nothing_else(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    made(tokenizer=CharTokenizer("ab")).save_pretrained(tmp_path)
    later = made(seed=1, tokenizer=CharTokenizer("cd"))
    later.save_pretrained(tmp_path)
    assert names(tmp_path) == ["README.md", "tokenizer", "triple_extractor.json", "weights"]
    loaded = TripleExtractor.from_pretrained(tmp_path)
    assert logits(loaded).equal(logits(later))
    assert loaded.tokenizer.characters == "cd"


class Broken(CharTokenizer):
    def save_pretrained(self, directory):
        super().save_pretrained(directory)
        raise OSError("disk full")


@pytest.mark.parametrize("step", ["weights", "tokenizer", "triple_extractor"])
def test_a_save_that_fails_leaves_the_earlier_model_whole(step, tmp_path, monkeypatch):
    earlier = made(tokenizer=CharTokenizer("ab"))
    earlier.save_pretrained(tmp_path / "old")
    write = storage.write_atomically

    def write_some(path, content):
        if path.name.startswith(step):
            raise OSError("disk full")
        write(path, content)

    monkeypatch.setattr(storage, "write_atomically", write_some)
    tokenizer = (Broken if step == "tokenizer" else CharTokenizer)("cd")
    later = made(seed=1, tokenizer=tokenizer)
    for name, left in (("old", ["tokenizer", "triple_extractor.json", "weights"]), ("new", [])):
        with pytest.raises(OSError, match="disk full"):
            later.save_pretrained(tmp_path / name)
        assert names(tmp_path / name) == left
    loaded = TripleExtractor.from_pretrained(tmp_path / "old")
    assert logits(loaded).equal(logits(earlier))
    assert loaded.tokenizer.characters == "ab"


class Somebodys(nn.Module):
    def __init__(self, size=16):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(60, size), nn.LayerNorm(size)

    def forward(self, input_ids, attention_mask=None):
        x = self.norm(self.embedding(input_ids))
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x)


def test_an_encoder_of_an_unknown_class_must_be_given(tmp_path):
    model = TripleExtractor(Somebodys(), ["of"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has a Somebodys as encoder.*encoder=\.\.\."):
        TripleExtractor.from_pretrained(tmp_path)
    encoder = Somebodys().requires_grad_(False)
    loaded = TripleExtractor.from_pretrained(tmp_path, encoder=encoder)
    assert loaded.encoder is encoder
    assert logits(loaded).equal(logits(model))
    assert not encoder.embedding.weight.requires_grad
    with pytest.raises(
        ValueError, match=r"does not fit; \d+ tensors differ:\n  encoder.embed"
    ) as e:
        TripleExtractor.from_pretrained(tmp_path, encoder=Somebodys(8))
    assert "encoder.embedding.weight: [60, 16] in the file, [60, 8] here" in str(e.value)


def test_a_class_that_automodel_would_not_make_must_be_given(tmp_path):
    config = transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    model = TripleExtractor(transformers.T5EncoderModel(config), ["of"]).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a T5EncoderModel as encoder"):
        TripleExtractor.from_pretrained(tmp_path)
    encoder = transformers.T5EncoderModel(config)
    loaded = TripleExtractor.from_pretrained(tmp_path, encoder=encoder)
    assert logits(loaded).equal(logits(model))


def change(folder, **entries):
    path = folder / "triple_extractor.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def spoil(folder, how):
    path = folder / "triple_extractor.json"
    weights = folder / json.loads(path.read_text())["weights"]
    if how == "no folder":
        path.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no json":
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "another format":
        change(folder, format="something")
    elif how == "another version":
        change(folder, version=2)
    elif how == "outside":
        change(folder, weights="../weights.safetensors")
    elif how == "more relations":
        change(folder, relations=["a", "b", "c"])


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("no folder", FileNotFoundError, "no triple_extractor.json in it"),
        ("no weights", FileNotFoundError, "names 'weights-.*', which is missing"),
        ("cut off", ValueError, "weights-.* is cut off or changed"),
        ("no json", ValueError, "triple_extractor.json is no JSON"),
        ("another format", ValueError, "was not written by `save_pretrained`"),
        ("another version", ValueError, "has version 2; this package reads 1"),
        ("outside", ValueError, "which is outside its folder"),
        ("more relations", ValueError, r"object_head.bias: \[4\] in the file, \[6\] here"),
    ],
)
def test_files_that_are_not_whole_are_named(how, error, message, tmp_path):
    made().save_pretrained(tmp_path)
    spoil(tmp_path, how)
    with pytest.raises(error, match=message):
        TripleExtractor.from_pretrained(tmp_path)


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    model = made(tokenizer=str.split)
    with pytest.raises(TypeError, match=r"must have `save_pretrained`.*from_pretrained"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    made("bert").save_pretrained(tmp_path / "bert")
    made(tokenizer=CharTokenizer("ab")).save_pretrained(tmp_path / "small")
    monkeypatch.setitem(sys.modules, "transformers", None)
    TripleExtractor.from_pretrained(tmp_path / "small")
    with pytest.raises(ImportError, match=r"its encoder is a BertModel.*\[huggingface\]"):
        TripleExtractor.from_pretrained(tmp_path / "bert")


def test_parameters_that_are_one_stay_one(tmp_path):
    model = made()
    model.encoder.layers[1].conv.weight = model.encoder.layers[0].conv.weight
    model.save_pretrained(tmp_path)
    assert logits(TripleExtractor.from_pretrained(tmp_path)).equal(logits(model))
