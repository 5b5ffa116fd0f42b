"""The adapter file: the condition of a converted model alone, and which base it belongs to."""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cln_tutorial.conditional_norm.conversion import conditional_parameters
from cln_tutorial.conditional_norm.modules import ConditionalNorm, stored_epsilon

METADATA = "cln_tutorial.adapter"


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save what conversion has added, the ``cond_proj`` parameters alone, as a safetensors file.

    They have their names in the model, and shape ``(2 * dim, cond_dim)`` for a layer norm; a hidden
    layer that norms share stands there once. The metadata tell shape, dtype and SHA-256 of every
    other parameter: the base, which :func:`load_adapter` wants to see again. What you trained in
    the base is not in the file; buffers are neither saved nor compared. An earlier file is replaced
    as a whole or, if anything fails, not at all.

    Args:
        model: a converted model itself, not a wrapper that renames parameters (of DDP,
            ``ddp.module``).
        path: where the file shall stand.

    Raises:
        ValueError: if ``model`` has no conditional norm.
        OSError: if the file cannot be written.
    """
    new = conditional_parameters(model)
    # Cloned, because safetensors refuses tensors of one storage.
    tensors = {name: p.detach().cpu().contiguous().clone() for name, p in new.items()}
    base = {
        name: [str(p.dtype).removeprefix("torch."), _digest(p, p.dtype)]
        for name, p in model.named_parameters()
        if name not in new
    }
    about = json.dumps({"layout": _layout(model), "base": base})
    _write_atomically(Path(path), save(tensors, {METADATA: about}))


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a file of :func:`save_adapter` into a converted model, in place, and return ``model``.

    Everything is checked before anything changes. The base must have the values that it had when
    the file was saved or, in a wider dtype, values that round to them. Device, sharing and
    ``requires_grad`` stay. In the dtype of the file the parameters come back bit for bit.

    Args:
        model: the same base, converted with the same ``cond_dim`` and ``hidden_dim``.
        path: the file.

    Raises:
        ValueError: if this is no adapter file, ``model`` is not converted, or names, shapes,
            activations or values of the base differ. The message names both sides.
        TypeError: if the dtype of ``model`` cannot hold the numbers of the file.
        FileNotFoundError: if there is no file.

    Example:
        >>> import copy, tempfile
        >>> from cln_tutorial.conditional_norm import convert_layer_norms
        >>> base = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> trained = convert_layer_norms(copy.deepcopy(base), cond_dim=3)
        >>> weight = nn.init.normal_(trained[1].cond_proj.weight)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(trained, f"{folder}/adapter.safetensors")
        ...     fresh = convert_layer_norms(base, cond_dim=3)
        ...     fresh = load_adapter(fresh, f"{folder}/adapter.safetensors")
        >>> fresh[1].cond_proj.weight.equal(weight)
        True
    """
    tensors, layout, base = _read(path)
    try:
        new = conditional_parameters(model)
    except ValueError as error:
        sizes = " or ".join(sorted({size for size in layout.values() if isinstance(size, str)}))
        raise ValueError(f"{error} In {path} a norm has {sizes}.") from None
    _require_same(f"{path} does not fit `model`", layout, _layout(model))
    for name, parameter in new.items():
        stored, dtype = tensors[name].dtype, parameter.dtype
        if torch.promote_types(stored, dtype) != dtype:
            raise TypeError(
                f"{path} holds {stored}, which {dtype} of `model` would round. Load it into the "
                f"model in {stored}, then write `model.to({dtype})`."
            )
    # In the dtype that the base had, so that the adapter of a bfloat16 copy fits its original too.
    dtypes = {name: getattr(torch, dtype) for name, (dtype, _) in base.items()}
    _require_same(
        f"{path} belongs to other values of the base (load those first; to go on all the same, "
        f"write `model.load_state_dict(safetensors.torch.load_file(path), strict=False)`)",
        {name: digest for name, (_, digest) in base.items()},
        {name: _digest(model.get_parameter(name), dtype) for name, dtype in dtypes.items()},
    )
    with torch.no_grad():
        for name, parameter in new.items():
            parameter.copy_(tensors[name])
    return model


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or cut off: {error}.") from error
    if METADATA not in metadata:
        raise ValueError(f"{path} was not written by `save_adapter`: no {METADATA!r} in it.")
    about = json.loads(metadata[METADATA])
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return tensors, about["layout"] | shapes, about["base"]


def _require_same(unfit: str, file: dict[str, Any], model: dict[str, Any]) -> None:
    changed = {name for name in file.keys() & model.keys() if file[name] != model[name]}
    # A few of each kind, so that two spellings of one name are both to be seen.
    kinds = file.keys() - model.keys(), model.keys() - file.keys(), changed
    lines = [
        f"\n  {name}: {file.get(name, 'nothing')} in the file, {model.get(name, 'nothing')} here"
        for kind in kinds
        for name in sorted(kind)[:3]
    ]
    if lines:
        total = len(file.keys() | model.keys())
        raise ValueError(f"{unfit}; {sum(map(len, kinds))} of {total} differ:{''.join(lines)}")


def _layout(model: nn.Module) -> dict[str, list[int] | str]:
    layout = {name: list(p.shape) for name, p in model.named_parameters()}
    for name, norm in model.named_modules():
        if isinstance(norm, ConditionalNorm):
            linear, *rest = [*norm.cond_proj.children()] or [norm.cond_proj]
            # No parameter tells of these: another activation or norm would pass unseen.
            hidden = f", hidden_dim={linear.out_features}, {rest[0]}" if rest else ""
            kind = f"{type(norm).__name__}, eps={stored_epsilon(norm)}"
            layout[name] = f"cond_dim={linear.in_features}{hidden}, {kind}"
    return layout


def _digest(value: Tensor, dtype: torch.dtype) -> str:
    # Half a second for BERT-base; digits enough to tell mistakes, not attacks, apart.
    raw = value.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy()).hexdigest()[:16]


def _write_atomically(path: Path, content: bytes) -> None:
    # By our own name: the files of `tempfile` are for nobody else to read.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
