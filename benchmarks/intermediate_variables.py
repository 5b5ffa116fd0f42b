"""Seeing every leaf of a model, beside hooks written by hand and the library that has them.

A case is a model and a way to look: the outputs of all its leaf modules, copied or not; of half of
its layers; its attention. *Hooks* are what one writes by hand: `register_forward_hook` on each
leaf, a dictionary, and `remove` at the end. Of `1 pass` opening and closing are a part; in the mode
`10 passes` they are shared by ten passes, each of which replaces what was kept before.

    make bench NAME=intermediate_variables

The library is measured where it imports, and named as missing where not. An environment with it:

    python -m venv peers
    peers/bin/pip install . transformers torchextractor
    peers/bin/python -m benchmarks.intermediate_variables

The gate compares the output of the model and all that was kept with a run in float64, seen by one
global hook. Taps that nobody looks through are called and do nothing, so their cost cannot be zero;
"not measurable" has a bound here: the model without them is measured twice, and `the same again`
shows how far a program differs from itself. `nn.Identity` in the same places is what any module
would cost.

Rows of the mode "correctness" are tiny models of which it is known what hooks must see.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from benchmarks import harness
from cln_tutorial.intermediate_variables import (
    Tap,
    attention_weights,
    capture,
    feature_extractor,
)

COPIED, SAME, HALF = "every leaf, copied", "every leaf, not copied", "the first half of the layers"
TAPS, ATTENTION = "inactive taps", "attention of each layer"
IN_PLACE = "what a layer returned before ReLU(inplace=True)"
TWICE = "both values of a layer that is called twice"
CNN, MLP, BERT = "CNN", "MLP", "BERT"
ONE, TEN, CORRECTNESS = "1 pass", "10 passes", "correctness"
CAPTURE, UNCLONED = "capture", "capture, clone=False"
CLONING, BARE = "hooks that clone", "bare hooks"
PEER, PEER_CLONING = "torchextractor", "torchextractor that clones"
WITHOUT, AGAIN, TAPPED, IDENTITY = "without taps", "the same again", "with taps", "with nn.Identity"
EXTRACTOR, OURS = "feature_extractor", "attention_weights"
EAGER, FUSED = "eager model, output_attentions", "sdpa model, output_attentions"
PEERS = (CLONING, BARE, PEER, PEER_CLONING, EAGER, FUSED)

SHAPES = {CNN: (64, 1, 28, 28), MLP: (256, 784), BERT: (4, 64)}
TINY = {CNN: (2, 1, 28, 28), MLP: (2, 784), BERT: (2, 5)}
LAYERS, WIDTH, HEADS, WORDS = 6, 384, 12, 1000
LIMITS = {"output": 1e-5, "kept": 1e-5, "weights": 1e-6}  # float32, over some layers; one softmax

Inputs = dict[str, Tensor] | Tensor
Way = Callable[[nn.Module, Inputs, int], tuple[Tensor, dict[str, Tensor]]]


def cases(device: str) -> list[harness.Case]:
    return _cases(SHAPES)


def quick(device: str) -> list[harness.Case]:
    return _cases(TINY)


def _cases(shapes: dict[str, tuple[int, ...]]) -> list[harness.Case]:
    there = [name for name in shapes if name != BERT or "transformers" not in missing("cpu")]
    # Of the large model, opening and closing are a small part.
    modes = {CNN: (ONE, TEN), MLP: (ONE, TEN), BERT: (ONE,)}
    listed = [
        (op, model, mode, hooked, baseline)
        for op, baseline in ((COPIED, CLONING), (SAME, BARE))
        for model in there
        for mode in modes[model]
    ]
    listed += [(TAPS, model, ONE, tapped, WITHOUT) for model in there if model != BERT]
    if BERT in there:
        listed.append((HALF, BERT, ONE, halved, CLONING))
        listed.append((ATTENTION, BERT, ONE, attended, EAGER))
    found = [
        harness.Case(f"{model}: {op}", shapes[model], "float32", mode, contenders, LIMITS, baseline)
        for op, model, mode, contenders, baseline in listed
    ]
    about = {"dtype": "float32", "mode": CORRECTNESS, "limits": LIMITS, "baseline": CAPTURE}
    found += [harness.Case(op, (4, 8), contenders=known, **about) for op in (IN_PLACE, TWICE)]
    return found


@functools.cache
def missing(device: str) -> dict[str, str]:
    """What cannot be measured here, with the reason."""
    found = {}
    for name in ("torchextractor", "transformers"):
        try:
            importlib.import_module(name)
        except Exception as error:  # it may be there, and not fit the versions of the rest
            lines = str(error).splitlines() or [""]
            found[name] = f"{type(error).__name__}: {lines[0]}"
    return found


# --- the goals ------------------------------------------------------------------------------------


def goals(device: str) -> list[harness.Goal]:
    """What is promised; the record says whether it is kept, in its worst row."""
    wishes = [
        (COPIED, CAPTURE, CLONING, 1.05),
        (SAME, UNCLONED, BARE, 1.05),
        (TAPS, TAPPED, WITHOUT, 1.01),
    ]
    return [
        harness.Goal(f"{op}: time {name}, over {baseline}", wanted, _most(op, name), "at most")
        for op, name, baseline, wanted in wishes
    ]


def _most(op: str, name: str) -> Callable[[list[harness.Row]], float | None]:
    """Longest time over the baseline's, over all models, modes and both allocators."""

    def reached(rows: list[harness.Row]) -> float | None:
        found = []
        for row in rows:
            if row["op"].endswith(op) and name in row["contenders"]:
                times = row["contenders"][name]
                clock = "cuda" if "cuda" in times else "cpu"
                found.append(1 / times[clock]["ratio"]["median"])
        return round(max(found), 4) if found else None

    return reached


# --- the models -----------------------------------------------------------------------------------


def _made(case: harness.Case, device: str, attention: str = "sdpa") -> tuple[nn.Module, Inputs]:
    """The model of a case with random weights, and its input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6575)
        name = case.op.partition(":")[0]
        if name == BERT:
            words = torch.randint(WORDS, case.shape).to(device)
            return _bert(attention).eval().to(device), {"input_ids": words}
        model = (_cnn() if name == CNN else _mlp()).eval().to(device)
        return model, torch.randn(case.shape).to(device)


def _cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def _bert(attention: str) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        attn_implementation=attention,
    )
    return BertModel(config, add_pooling_layer=False)


def _result(model: nn.Module, inputs: Inputs) -> Tensor:
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found if isinstance(found, Tensor) else found[0]


def _leaves(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if not [*module.children()]]


# --- ways to look at some modules -----------------------------------------------------------------


def _by_hand(
    clone: bool, names: list[str], model: nn.Module, inputs: Inputs, passes: int
) -> tuple[Tensor, dict[str, Tensor]]:
    kept: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            kept[name] = output.detach().clone() if clone else output

        return keep

    wanted = set(names)
    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if name in wanted
    ]
    for _ in range(passes):
        output = _result(model, inputs)
    for handle in handles:
        handle.remove()
    return output, kept


def _captured(
    clone: bool, names: list[str] | None, model: nn.Module, inputs: Inputs, passes: int
) -> tuple[Tensor, dict[str, Tensor]]:
    with capture(model, names, clone=clone) as kept:
        for number in range(passes):
            if number:
                kept.clear()
            output = _result(model, inputs)
    return output, kept


def _extracted(
    clone: bool, names: list[str], model: nn.Module, inputs: Inputs, passes: int
) -> tuple[Tensor, dict[str, Tensor]]:
    def keep(
        module: nn.Module, args: Any, output: Tensor, name: str, kept: dict[str, Tensor]
    ) -> None:
        kept[name] = output.detach().clone()

    own = {"capture_fn": keep} if clone else {}
    peer = importlib.import_module("torchextractor").Extractor(model, set(names), **own)
    for _ in range(passes):
        output, kept = peer(**inputs) if isinstance(inputs, dict) else peer(inputs)
    return (output if isinstance(output, Tensor) else output[0]), kept


def _ways(clone: bool, names: list[str], leaves: bool = True) -> dict[str, Way]:
    """Hooks, ours and the peer's, all for the same modules."""
    found = {
        CLONING if clone else BARE: partial(_by_hand, clone, names),
        CAPTURE if clone else UNCLONED: partial(_captured, clone, None if leaves else names),
    }
    if PEER not in missing("cpu"):
        found[PEER_CLONING if clone else PEER] = partial(_extracted, clone, names)
    return found


def _truth(model: nn.Module, inputs: Inputs, names: list[str]) -> dict[str, Tensor]:
    """Of a run in float64, seen by one hook for all modules."""
    model, kept = deepcopy(model).double(), {}
    inputs = inputs if isinstance(inputs, dict) else inputs.double()
    known = {module: name for name, module in model.named_modules()}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if known.get(module) in names:
            kept[known[module]] = output.clone()

    with register_module_forward_hook(keep), torch.no_grad():
        output = _result(model, inputs)
    return {"output": output, "kept": _flat(kept)}


def _flat(kept: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([kept[name].flatten() for name in sorted(kept)])


def _contender(
    way: Way, model: nn.Module, inputs: Inputs, passes: int, expected: dict[str, Tensor]
) -> harness.Contender:
    def checked() -> list[Tensor]:
        output, kept = way(model, inputs, passes)
        return [output, _flat(kept)]

    run = torch.no_grad()(partial(way, model, inputs, passes))
    return harness.Contender(run, expected, checked=torch.no_grad()(checked))


def hooked(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """Every leaf of a model."""
    model, inputs = _made(case, device)
    names, passes = _leaves(model), 1 if case.mode == ONE else 10
    expected = _truth(model, inputs, names)
    ways = _ways(case.op.endswith(COPIED), names)
    return {name: _contender(way, model, inputs, passes, expected) for name, way in ways.items()}


def halved(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """Layers in the first half, after which the rest need not run."""
    model, inputs = _made(case, device)
    names = [f"encoder.layer.{number}" for number in range(LAYERS // 2)]
    expected = _truth(model, inputs, names)
    found = {
        name: _contender(way, model, inputs, 1, expected)
        for name, way in _ways(True, names, leaves=False).items()
    }
    extractor = feature_extractor(model, names)

    def checked() -> list[Tensor]:
        return [_flat(extractor(**inputs))]

    found[EXTRACTOR] = harness.Contender(
        torch.no_grad()(partial(extractor, **inputs)),
        {"kept": expected["kept"]},
        checked=torch.no_grad()(checked),
    )
    return found


def tapped(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """A tap behind each layer, and nobody who looks."""
    model, inputs = _made(case, device)
    expected = {"output": _truth(model, inputs, [""])["output"]}
    models = {
        WITHOUT: model,
        AGAIN: model,
        TAPPED: nn.Sequential(*(each for layer in model for each in (layer, Tap()))),
        IDENTITY: nn.Sequential(*(each for layer in model for each in (layer, nn.Identity()))),
    }
    return {
        name: harness.Contender(torch.no_grad()(lambda each=each: [each(inputs)]), expected)
        for name, each in models.items()
    }


def attended(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """The attention of each layer and head, which the model that is timed never forms."""
    fused, inputs = _made(case, device)
    eager, _ = _made(case, device, "eager")
    with torch.no_grad():
        weights = deepcopy(eager).double()(**inputs, output_attentions=True).attentions
    expected = {"weights": torch.stack(weights)}

    def asked(model: nn.Module) -> list[Tensor]:
        return [torch.stack(model(**inputs, output_attentions=True).attentions)]

    ways = {
        EAGER: lambda: asked(eager),
        FUSED: lambda: asked(fused),
        OURS: lambda: [torch.stack([*attention_weights(fused, **inputs).values()])],
    }
    return {name: harness.Contender(torch.no_grad()(way), expected) for name, way in ways.items()}


# --- what is known --------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def known(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """A layer that doubles its input and subtracts 1, so that what it returns is known."""
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.copy_(2 * torch.eye(8))
        layer.bias.fill_(-1)
    x = torch.arange(32.0, device=device).reshape(case.shape) / 32
    first = 2 * x.double() - 1
    if case.op == TWICE:
        model, name, values = Twice(layer), "layer", [first, 2 * first - 1]
    else:
        model, name, values = nn.Sequential(layer, nn.ReLU(inplace=True)), "0", [first]
    expected = {"kept": torch.stack(values)}
    model = model.to(device)

    def contender(way: Way) -> harness.Contender:
        def run() -> list[Tensor]:
            _, kept = way(model, x, 1)
            return [torch.stack(kept[name] if isinstance(kept[name], list) else [kept[name]])]

        return harness.Contender(torch.no_grad()(run), expected)

    ways = _ways(True, [name], leaves=False) | _ways(False, [name], leaves=False)
    del ways[UNCLONED]  # which is asked to keep what the next operation changes
    return {name: contender(way) for name, way in ways.items()}


BENCHMARK = harness.Benchmark(
    "intermediate_variables",
    cases,
    quick,
    missing,
    ("transformers", "torchextractor"),
    goals,
    peers=PEERS,
    pace=harness.Pace(rounds=31, shortest=0.02),
)

if __name__ == "__main__":
    harness.main(BENCHMARK)
