"""The loss of token-pair scores: the definition, dense and separable, however large a score is."""

import itertools
import math

import mpmath as mp
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from cln_tutorial.triple_extraction import global_pointer
from cln_tutorial.triple_extraction.global_pointer import (
    efficient_global_pointer_loss,
    global_pointer_loss,
)

NOTHING = torch.zeros(0, 4, dtype=torch.int64)
# Two on one line, one of them twice; one in another line of its matrix; one alone.
POSITIVES = torch.tensor(
    [[0, 1, 0, 2], [0, 1, 0, 2], [0, 1, 0, 3], [0, 1, 2, 3], [1, 2, 1, 1], [1, 0, 2, 2]]
)
MASK = torch.tensor([[True] * 5, [True, True, True, False, False]])
# Sums of a few hundred terms: float32 has 1.2e-7 and these differ by ten roundings at most.
LIMITS = {torch.float32: 2e-6, torch.float64: 1e-12}


def normal(*shape, seed=8888, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def factors(b=2, r=3, length=5, d=4, dtype=torch.float64):
    shapes = [(b, length, d), (b, length, d), (b, r, length), (b, r, length)]
    return [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def built(q, k, a, b):
    """All scores of the efficient form."""
    return (q @ k.mT / math.sqrt(q.shape[-1]))[:, None] + a[..., None] + b[:, :, None]


def defined(scores, positives, mask, tril):
    """The definition, cell by cell, to 30 digits."""
    held = {tuple(each) for each in positives.tolist()}
    sentences, relations, length, _ = scores.shape
    total = mp.mpf(0)
    with mp.workdps(30):
        for b, r in itertools.product(range(sentences), range(relations)):
            negative = positive = mp.mpf(1)
            for i, j in itertools.product(range(length), repeat=2):
                if not (mask[b, i] and mask[b, j]) or (tril and j < i):
                    continue
                s = mp.mpf(scores[b, r, i, j].item())
                if (b, r, i, j) in held:
                    positive += mp.exp(-s)
                else:
                    negative += mp.exp(s)
            total += mp.log(negative) + mp.log(positive)
        return total / sentences


def sparse_public(scores, positives, epsilon):
    """bert4keras: the positives are subtracted from the log-sum of all cells."""
    zeros = torch.zeros_like(scores[:, :1])
    true = scores.gather(1, positives)
    everything = torch.cat([scores, zeros], 1).logsumexp(1)
    share = (1 - (true.logsumexp(1) - everything).exp()).clamp(epsilon, 1)
    return torch.cat([-true, zeros], 1).logsumexp(1) + everything + share.log()


def columns_only(scores, positives, mask):
    """The mask as a PyTorch port has it: padded columns, and no rows."""
    scores = scores.masked_fill(~mask[:, None, None], -1e12)
    return global_pointer_loss(scores, positives)


def value_and_gradients(f, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = f(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def both_losses():
    """Each loss as a function of its floating inputs, and such inputs."""
    return [(global_pointer_loss, [normal(2, 3, 5, 5)]), (efficient_global_pointer_loss, factors())]


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("tril", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_both_losses_are_the_definition(tril, scale):
    inputs = [x * scale**0.5 for x in factors()]
    scores = built(*inputs)
    want = float(defined(scores, POSITIVES, MASK, tril))
    for loss in (
        global_pointer_loss(scores, POSITIVES, MASK, tril=tril),
        efficient_global_pointer_loss(*inputs, POSITIVES, MASK, tril=tril),
    ):
        assert loss.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tril", [False, True])
def test_separable_sums_give_the_loss_and_the_gradients_of_dense_scores(tril, dtype):
    inputs = factors(3, 24, 17, 8, dtype)
    generator = torch.Generator().manual_seed(1)
    columns = [torch.randint(n, (40,), generator=generator) for n in (3, 24, 10, 7)]
    columns[3] = columns[3] + columns[2]  # the end is not before the start
    positives = torch.stack(columns, 1)
    mask = torch.arange(17) < torch.tensor([[17], [12], [16]])
    want = value_and_gradients(
        lambda *x: global_pointer_loss(built(*x), positives, mask, tril=tril),
        *(x.double() for x in inputs),
    )
    got = value_and_gradients(
        lambda *x: efficient_global_pointer_loss(*x, positives, mask, tril=tril), *inputs
    )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() <= LIMITS[dtype] * b.abs().max()


def test_the_mean_is_over_sentences_of_the_sum_over_relations():
    for loss, inputs in both_losses():
        total = loss(*inputs, POSITIVES, MASK, reduction="sum")
        assert loss(*inputs, POSITIVES, MASK).item() == pytest.approx(total.item() / 2, rel=1e-14)
        rows = [
            loss(*(x[i : i + 1] for x in inputs), of_one(POSITIVES, i), MASK[i : i + 1])
            for i in range(2)
        ]
        assert total.item() == pytest.approx(sum(rows).item(), rel=1e-14)


def of_one(positives, sentence):
    rows = positives[positives[:, 0] == sentence].clone()
    rows[:, 0] = 0
    return rows


def test_a_positive_written_twice_counts_once():
    for loss, inputs in both_losses():
        once = value_and_gradients(lambda *x, f=loss: f(*x, POSITIVES.unique(dim=0)), *inputs)
        many = value_and_gradients(lambda *x, f=loss: f(*x, POSITIVES.repeat(3, 1)), *inputs)
        for a, b in zip(many, once, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_line_and_a_matrix_full_of_positives_are_summed_without_them():
    # One line of three, and all nine cells: of the negatives log(1 + 0) is left.
    for cells in (3, 9):
        index = torch.arange(cells)
        zeros = torch.zeros_like(index)
        positives = torch.stack([zeros, zeros, index // 3, index % 3], 1)
        q, a = torch.zeros(1, 3, 2), torch.full((1, 1, 3), 20.0)
        want = 40.0 + math.log(6) if cells == 3 else 0.0
        found = value_and_gradients(
            lambda *x, p=positives: efficient_global_pointer_loss(*x, p), q, q, a, a
        )
        dense = global_pointer_loss(built(q, q, a, a), positives)
        for loss in (found[0], dense):
            assert loss.item() == pytest.approx(want, rel=1e-6, abs=1e-15)
        assert all(gradient.isfinite().all() for gradient in found[1:])


def test_a_small_loss_keeps_its_digits():
    # log(1 + 25 exp(-30)) in float32, where 1 + 25 exp(-30) is 1.
    want = math.log1p(25 * math.exp(-30))
    q, a = torch.zeros(1, 5, 2), torch.full((1, 1, 5), -15.0)
    for loss in (
        global_pointer_loss(torch.full((1, 1, 5, 5), -30.0), NOTHING),
        efficient_global_pointer_loss(q, q, a, a, NOTHING),
        global_pointer_loss(
            torch.full((1, 1, 1, 1), -math.log(25) + 30), torch.tensor([[0, 0, 0, 0]])
        ),
    ):
        assert loss.item() == pytest.approx(want, rel=4e-6)  # the exponent has 30 times the eps


# --- erratum 3: positives that are subtracted ----------------------------------------------------

CONFIDENT = [(10, -4.5e-5), (15, -3.1e-7), (25, -1.4e-11)]


@pytest.mark.parametrize(("c", "slope"), CONFIDENT)
def test_one_confident_positive_leaves_the_loss_of_its_negatives_exact(c, slope):
    # 999 negatives at -8; the other cells of 32 x 32 are far away.
    scores = torch.full((1, 1, 1024), -1e4)
    scores[..., :1000], scores[..., 0] = -8.0, c
    positives = torch.tensor([[0, 0, 0, 0]])
    loss, gradient = value_and_gradients(
        lambda s: global_pointer_loss(s, positives), scores.view(1, 1, 32, 32)
    )
    assert loss.item() == pytest.approx(0.289, abs=5e-4)  # three digits are printed
    assert loss.item() == pytest.approx(
        math.log1p(999 * math.exp(-8)) + math.log1p(math.exp(-c)), rel=2e-6
    )
    flat = gradient.flatten()
    assert flat[0].item() == pytest.approx(slope, rel=2e-2)
    assert flat[1:1000].numpy() == pytest.approx(2.5e-4, rel=2e-2)


def test_the_public_sparse_form_breaks_where_a_positive_is_confident():
    for epsilon, c, loss, slope in (
        (1e-7, 10, None, 0.0),
        (1e-7, 15, -1.118, 1.0),
        (1e-7, 25, 8.88, None),
        (1e-10, 12, None, 0.0),
        (1e-10, 15, -8.03, None),
    ):
        scores = torch.full((1, 1000), -8.0)
        scores[0, 0] = c
        value, gradient = value_and_gradients(
            lambda s, e=epsilon: sparse_public(s, torch.tensor([[0]]), e).sum(), scores
        )
        if loss is not None:
            assert value.item() == pytest.approx(loss, abs=6e-3)  # the digits that are printed
        if slope is not None:
            assert gradient[0, 0].item() == pytest.approx(slope, abs=1e-5)
        if c == 15:  # instead of 2.5e-4
            assert gradient[0, 1].item() == pytest.approx(1e-10, rel=0.1)


@pytest.mark.parametrize("c", [10.0, 15.0, 25.0])
def test_the_separable_form_does_not_subtract_either(c):
    inputs = [torch.zeros(1, 6, 2), torch.zeros(1, 6, 2), *torch.full((2, 1, 1, 6), -4.0)]
    inputs[2][..., 1], inputs[3][..., 2] = c / 2, c / 2
    positives = torch.tensor([[0, 0, 1, 2]])
    got = value_and_gradients(lambda *x: efficient_global_pointer_loss(*x, positives), *inputs)
    want = value_and_gradients(
        lambda *x: global_pointer_loss(built(*x), positives), *(x.double() for x in inputs)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-9)


# --- large scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", [90.0, 120.0, 1200.0])
def test_where_the_product_underflows_the_line_is_summed_by_the_definition(c, dtype):
    # The two cells that count are (5, 5) and (0, 0); the largest factors meet below the diagonal.
    q, a, b = torch.zeros(1, 6, 2, dtype=dtype), *torch.zeros(2, 1, 1, 6, dtype=dtype)
    a[..., 5], b[..., 0] = c, c
    loss, _, _, of_a, of_b = value_and_gradients(
        lambda *x: efficient_global_pointer_loss(*x, NOTHING, tril=True), q, q, a, b
    )
    assert loss.item() == pytest.approx(c + math.log(2), rel=LIMITS[dtype])  # 120.693
    half = torch.tensor([0.5, 0, 0, 0, 0, 0.5], dtype=dtype)
    torch.testing.assert_close(of_a[0, 0], half, rtol=LIMITS[dtype] * c, atol=1e-30)
    torch.testing.assert_close(of_b[0, 0], half, rtol=LIMITS[dtype] * c, atol=1e-30)


def test_many_such_lines_are_taken_in_blocks(monkeypatch):
    q, k, a, b = factors(2, 3, 6, 4)
    q, b = q * 500, b * 900
    positives = torch.tensor([[0, 1, 2, 3], [1, 2, 0, 0]])
    want = value_and_gradients(
        lambda *x: global_pointer_loss(built(*x), positives, tril=True), q, k, a, b
    )
    summed = []
    blocks = global_pointer._blocks
    monkeypatch.setattr(global_pointer, "_CELLS_PER_BLOCK", 20)
    monkeypatch.setattr(
        global_pointer,
        "_blocks",
        lambda lines, length: summed.append(len(lines)) or blocks(lines, length),
    )
    got = value_and_gradients(
        lambda *x: efficient_global_pointer_loss(*x, positives, tril=True), q, k, a, b
    )
    assert min(summed) > 3  # more than one block, forward and backward
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_autocast_are_finite_and_close(dtype):
    for loss, inputs in both_losses():
        wide = [x.float() for x in inputs]
        want = value_and_gradients(lambda *x, f=loss: f(*x, POSITIVES, MASK), *wide)
        half = [x.to(dtype) for x in inputs]
        got = value_and_gradients(lambda *x, f=loss: f(*x, POSITIVES, MASK), *half)
        assert got[0].dtype == torch.float32
        assert got[0].item() == pytest.approx(want[0].item(), rel=1e-2)  # bfloat16 has 8 bits
        assert all(x.dtype == dtype for x in got[1:])
        assert all(x.isfinite().all() for x in got)
        leaves = [x.clone().requires_grad_() for x in wide]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = loss(*leaves, POSITIVES, MASK)
        found = [cast, *torch.autograd.grad(cast, leaves)]
        assert all(a.equal(b) for a, b in zip(found, want, strict=True))
    large = torch.full((1, 2, 4, 4), 6e4, dtype=dtype)
    assert global_pointer_loss(large, NOTHING).item() == pytest.approx(
        2 * (large[0, 0, 0, 0].item() + math.log(16)), rel=1e-6
    )


# --- erratum 4: padding ---------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [1, 20])
def test_padding_changes_neither_loss_nor_gradients_rows_included(pad):
    inputs = factors()
    want = value_and_gradients(
        lambda *x: efficient_global_pointer_loss(*x, POSITIVES, MASK), *inputs
    )
    tails = [(0, 0, 0, pad), (0, 0, 0, pad), (0, pad), (0, pad)]
    longer = [torch.nn.functional.pad(x, t, value=3.0) for x, t in zip(inputs, tails, strict=True)]
    mask = torch.nn.functional.pad(MASK, (0, pad))
    got = value_and_gradients(
        lambda *x: efficient_global_pointer_loss(*x, POSITIVES, mask), *longer
    )
    dense = global_pointer_loss(built(*longer), POSITIVES, mask)
    assert dense.item() == pytest.approx(want[0].item(), rel=1e-12)
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-12)
    for x, y, axis in zip(got[1:], want[1:], (1, 1, 2, 2), strict=True):
        torch.testing.assert_close(x.narrow(axis, 0, 5), y, rtol=1e-12, atol=1e-14)
        assert not x.narrow(axis, 5, pad).any()
    short = columns_only(built(*inputs), POSITIVES, MASK).item()
    assert abs(columns_only(built(*longer), POSITIVES, mask).item() - short) > 0.1


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_what_stands_at_a_masked_token_is_never_used(what):
    hole = ~MASK
    masks = [hole[..., None], hole[..., None], hole[:, None], hole[:, None]]
    scores_hole = (hole[:, :, None] | hole[:, None])[:, None]
    for (loss, inputs), holes in zip(both_losses(), ([scores_hole], masks), strict=True):
        want = value_and_gradients(lambda *x, f=loss: f(*x, POSITIVES, MASK), *inputs)
        bad = [x.masked_fill(m, what) for x, m in zip(inputs, holes, strict=True)]
        got = value_and_gradients(lambda *x, f=loss: f(*x, POSITIVES, MASK), *bad)
        for a, b in zip(got, want, strict=True):
            assert a.equal(b)


def test_a_positive_at_a_masked_token_does_not_count():
    outside = torch.tensor([[1, 0, 2, 4], [1, 1, 3, 3]])
    for loss, inputs in both_losses():
        want = value_and_gradients(lambda *x, f=loss: f(*x, POSITIVES, MASK), *inputs)
        more = torch.cat([POSITIVES, outside])
        got = value_and_gradients(lambda *x, f=loss, p=more: f(*x, p, MASK), *inputs)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_batch_of_padding_costs_nothing():
    for loss, inputs in both_losses():
        for positives in (NOTHING, POSITIVES):
            found = value_and_gradients(
                lambda *x, f=loss, p=positives: f(*x, p, torch.zeros_like(MASK)), *inputs
            )
            assert not any(x.any() for x in found)


# --- cost and transforms --------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.numel() * each.element_size())
        return out


def test_no_tensor_of_all_scores_is_built():
    inputs = factors(2, 50, 40, 8, torch.float32)
    positives = torch.randint(2, (30, 4), generator=torch.Generator().manual_seed(0))
    with Largest() as efficient:
        value_and_gradients(lambda *x: efficient_global_pointer_loss(*x, positives), *inputs)
    with Largest() as dense:
        value_and_gradients(lambda *x: global_pointer_loss(built(*x), positives), *inputs)
    assert dense.bytes == 4 * 2 * 50 * 40 * 40
    assert 10 * efficient.bytes <= dense.bytes


@pytest.mark.parametrize("tril", [False, True])
def test_first_and_second_derivatives_agree_with_differences(tril):
    positives = torch.tensor([[0, 1, 0, 2], [0, 1, 0, 2], [0, 1, 0, 1], [1, 0, 1, 1]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    for loss, inputs in (
        (global_pointer_loss, [normal(2, 2, 3, 3)]),
        (efficient_global_pointer_loss, factors(2, 2, 3, 2)),
    ):
        inputs = [x.requires_grad_() for x in inputs]

        def f(*x, loss=loss):
            return loss(*x, positives, mask, tril=tril)

        assert gradcheck(f, inputs)
        assert gradgradcheck(f, inputs)


def test_functional_transforms_give_what_autograd_gives():
    for loss, inputs in both_losses():
        many = [torch.stack([x, x.flip(0), -x]) for x in inputs]

        def f(*x, loss=loss):
            return loss(*x, POSITIVES, MASK)

        each = [value_and_gradients(f, *x) for x in zip(*many, strict=True)]
        want = [torch.stack(column) for column in zip(*each, strict=True)]
        torch.testing.assert_close(torch.vmap(f)(*many), want[0], rtol=1e-12, atol=0)
        numbers = tuple(range(len(many)))
        gradients = torch.vmap(torch.func.grad(f, argnums=numbers))(*many)
        for a, b in zip(gradients, want[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


COMPILED = """
import torch
from cln_tutorial.triple_extraction.global_pointer import (
    efficient_global_pointer_loss, global_pointer_loss,
)
from cln_tutorial.triple_extraction.losses import power_bce_loss, power_sigmoid_logit

def sparse(z, mask, positives):
    return power_bce_loss(z, positives=positives, power=4, mask=mask)

def dense(z, mask, y):
    return power_bce_loss(z, y, power=2, mask=mask) + power_sigmoid_logit(z, 2.5).sum()

def pairs(s, q, k, a, b, positives, mask):
    other = efficient_global_pointer_loss(q, k, a, b, positives, mask)
    return other + global_pointer_loss(s, positives, mask, tril=True)

def compiled(f):
    return torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)

fast = {f: compiled(f) for f in (sparse, dense, pairs)}
for length in (5, 7, 9):
    torch.manual_seed(length)
    z, mask = torch.randn(2, length, 3, 2), torch.rand(2, length)
    mask[0, 0] = 0
    ones = torch.tensor([[0, 1, 2, 1], [1, 3, 0, 0], [1, 3, 0, 0]])
    spans = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 2], [1, 2, 0, 3], [1, 2, 0, 3]])
    scores, (q, k) = torch.randn(2, 3, length, length), torch.randn(2, 2, length, 4)
    a, b = torch.randn(2, 2, 3, length)
    for f, inputs, rest in (
        (sparse, [z], [mask, ones]),
        (dense, [z], [mask > 0.3, torch.rand(2, length, 3, 2)]),
        (pairs, [scores, q, k, a, b], [spans, mask > 0.1]),
    ):
        found = []
        for g in (f, fast[f]):
            leaves = [x.clone().requires_grad_() for x in inputs]
            loss = g(*leaves, *rest)
            found.append((loss, *torch.autograd.grad(loss, leaves)))
        for x, y in zip(*found):
            torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_all_losses_compile_into_one_graph_each_for_sentences_of_any_length(child_output):
    assert child_output(COMPILED).split() == ["3"]


# --- bad input ------------------------------------------------------------------------------------

SCORES = torch.zeros(2, 3, 5, 5)
Q, A = torch.zeros(2, 5, 4), torch.zeros(2, 3, 5)
DENSE = {"scores": SCORES, "positives": POSITIVES}
SEPARABLE = {"q": Q, "k": Q, "bias_start": A, "bias_end": A, "positives": POSITIVES}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"positives": POSITIVES.int()}, TypeError, r"`positives` must be an int64.*int32"),
        ({"positives": POSITIVES[:, :3]}, ValueError, r"`positives` must have shape \(p, 4\)"),
        ({"positives": POSITIVES + 2}, ValueError, r"`positives\[0\]` is \[2, 3, 2, 4\], out of"),
        ({"positives": POSITIVES - 1}, ValueError, r"`positives\[0\]` is \[-1, 0, -1, 1\], out"),
        (
            {"positives": torch.tensor([[0, 0, 1, 1], [0, 0, 2, 1]]), "tril": True},
            ValueError,
            r"`positives\[1\]` is \[0, 0, 2, 1\]: with `tril`",
        ),
        ({"mask": MASK.float()}, TypeError, r"`mask` must be bool; got torch.float32"),
        ({"mask": MASK[:, :4]}, ValueError, r"`mask` must have shape \(2, 5\); got \(2, 4\)"),
        ({"reduction": "none"}, ValueError, r"`reduction` must be 'mean' or 'sum'; got 'none'"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        global_pointer_loss(**(DENSE | arguments))
    with pytest.raises(error, match=message):
        efficient_global_pointer_loss(**(SEPARABLE | arguments))


@pytest.mark.usefixtures("unchecked")
def test_bad_scores_are_named():
    for bad in (SCORES[0], SCORES[..., :4]):
        with pytest.raises(ValueError, match=r"`scores` must have shape \(b, r, l, l\)"):
            global_pointer_loss(bad, POSITIVES)
    with pytest.raises(TypeError, match="`scores` must be"):
        global_pointer_loss(SCORES.long(), POSITIVES)
    for bad in ({"q": Q[:1]}, {"k": Q[..., :2]}, {"bias_end": A[:, :2]}, {"bias_start": Q[0]}):
        with pytest.raises(ValueError, match=r"`q` and `k` must have shape \(b, l, d\)"):
            efficient_global_pointer_loss(**(SEPARABLE | bad))
    with pytest.raises(TypeError, match="`bias_end` must be"):
        efficient_global_pointer_loss(**(SEPARABLE | {"bias_end": A.long()}))
