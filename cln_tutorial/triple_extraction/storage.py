"""A trained extractor in a folder: safetensors and JSON, there as a whole or not at all."""

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from cln_tutorial._files import write_atomically
from cln_tutorial.triple_extraction.characters import CharTokenizer
from cln_tutorial.triple_extraction.encoders import SmallEncoder

NAME = "triple_extractor.json"
FORMAT = "cln_tutorial.triple_extraction"
VERSION = 1
SETTINGS = (
    "conditioning",
    "subject_pooling",
    "norm_tap",
    "subject_power",
    "object_power",
    "max_length",
    "stride",
    "threshold",
)


def save_extractor(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write weights, settings and tokenizer of a model.

    The weights and the tokenizer stand under new names, which the JSON file tells. It is replaced
    last, in one step: until then the folder holds the earlier model, from then on the new one.
    """
    folder = Path(folder)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "relations": model.relations,
        "settings": {n: getattr(model, n) for n in SETTINGS} | {"dropout": model.dropout.p},
        "encoder": _encoder_entry(model.encoder),
        "tokenizer": _tokenizer_entry(model.tokenizer),
    }
    # Cloned, because safetensors refuses tensors of one storage.
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    weights = save(tensors)

    folder.mkdir(parents=True, exist_ok=True)
    earlier = _files(folder)
    save_number = secrets.token_hex(4)
    about["weights"] = f"weights-{save_number}.safetensors"
    if about["tokenizer"]:
        about["tokenizer"]["folder"] = f"tokenizer-{save_number}"
    content = json.dumps(about, ensure_ascii=False, indent=2).encode()
    try:
        write_atomically(folder / about["weights"], weights)
        if about["tokenizer"]:
            model.tokenizer.save_pretrained(str(folder / about["tokenizer"]["folder"]))
        write_atomically(folder / NAME, content)
    except BaseException:
        _remove(folder, _names(about))
        raise
    _remove(folder, earlier)


def load_extractor(
    cls: type[nn.Module],
    folder: str | os.PathLike[str],
    encoder: nn.Module | None,
    tokenizer: Any,
) -> nn.Module:
    """Return the model of a folder, in evaluation mode."""
    folder = Path(folder)
    about = _read(folder / NAME)
    try:
        tensors = load((folder / about["weights"]).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{folder / about['weights']} is cut off or changed: {error}.") from error
    if encoder is None:
        encoder = _built_encoder(about["encoder"], folder)
        if getattr(encoder, "pooler", None) is not None and not any(
            name.startswith("encoder.pooler.") for name in tensors
        ):
            encoder.pooler = None
    if tokenizer is None and about["tokenizer"]:
        tokenizer = _loaded_tokenizer(about["tokenizer"], folder)
    settings = about["settings"] | {"threshold": tuple(about["settings"]["threshold"])}
    model = cls(encoder, about["relations"], tokenizer=tokenizer, **settings)
    own = model.state_dict()
    _require_same_shapes(
        folder,
        {name: list(tensor.shape) for name, tensor in tensors.items()},
        {name: list(tensor.shape) for name, tensor in own.items()},
    )
    for name, parameter in model.named_parameters():
        # In the dtype of the file, so that nothing is rounded and nothing grows.
        parameter.data = parameter.data.to(tensors[name].dtype)
    model.load_state_dict(tensors)
    return model.eval()


def _encoder_entry(encoder: nn.Module) -> dict[str, Any]:
    name, config = type(encoder).__name__, getattr(encoder, "config", None)
    if type(encoder) is SmallEncoder:
        return {"class": name, "config": config}
    if hasattr(config, "to_dict"):
        return {"class": name, "config": json.loads(config.to_json_string(use_diff=False))}
    return {"class": name, "config": None}


def _built_encoder(entry: dict[str, Any], folder: Path) -> nn.Module:
    name, config = entry["class"], entry["config"]
    if name == SmallEncoder.__name__:
        return SmallEncoder(**config)
    encoder = None
    if config is not None and "model_type" in config:
        transformers = _transformers(f"its encoder is a {name}")
        try:
            config = transformers.AutoConfig.for_model(**config)
            encoder = transformers.AutoModel.from_config(config)
        except ValueError:  # a model type of somebody's own
            encoder = None
    if type(encoder).__name__ != name:
        raise ValueError(
            f"{folder} has a {name} as encoder, which cannot be built from its file; make one with "
            f"any weights, and write `from_pretrained(folder, encoder=...)`."
        )
    return encoder


def _tokenizer_entry(tokenizer: Any) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    if not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(
            f"`tokenizer` must have `save_pretrained` to be saved; got {type(tokenizer).__name__}. "
            f"Set `model.tokenizer = None`, and give it to `from_pretrained` again."
        )
    return {"class": type(tokenizer).__name__}


def _loaded_tokenizer(entry: dict[str, Any], folder: Path) -> Any:
    if entry["class"] == CharTokenizer.__name__:
        return CharTokenizer.from_pretrained(folder / entry["folder"])
    transformers = _transformers(f"its tokenizer is a {entry['class']}")
    return transformers.AutoTokenizer.from_pretrained(folder / entry["folder"])


def _transformers(why: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"This model needs transformers, {why}: pip install 'cln-tutorial[huggingface]'."
        ) from error
    return transformers


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no triple extractor: no {NAME} in it.")
    try:
        about = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by `save_pretrained` of a triple extractor.")
    if about.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {about.get('version')!r}; this package reads {VERSION}."
        )
    for name in _names(about):
        if Path(name).name != name:
            raise ValueError(f"{path} names {name!r}, which is outside its folder.")
        if not (path.parent / name).exists():
            raise FileNotFoundError(f"{path} names {name!r}, which is missing.")
    return about


def _names(about: dict[str, Any]) -> list[str]:
    tokenizer = about["tokenizer"] or {}
    return [about["weights"], *([tokenizer["folder"]] if "folder" in tokenizer else [])]


def _files(folder: Path) -> list[str]:
    """Names of the files of an earlier model in a folder."""
    try:
        return _names(_read(folder / NAME))
    except (FileNotFoundError, ValueError):
        return []


def _remove(folder: Path, names: list[str]) -> None:
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _require_same_shapes(
    folder: Path, file: dict[str, list[int]], model: dict[str, list[int]]
) -> None:
    differ = sorted(n for n in file.keys() | model.keys() if file.get(n) != model.get(n))
    if differ:
        lines = "".join(
            f"\n  {n}: {file.get(n, 'nothing')} in the file, {model.get(n, 'nothing')} here"
            for n in differ[:5]
        )
        raise ValueError(f"{folder} does not fit; {len(differ)} tensors differ:{lines}")
