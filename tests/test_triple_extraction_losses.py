"""The loss of a power of a sigmoid: exact at every logit, whatever is masked, at any order."""

import math

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from cln_tutorial.triple_extraction import losses
from cln_tutorial.triple_extraction.losses import power_bce_loss, power_sigmoid_logit

EXTREMES = [-1e4, -88.0, -20.0, -4.1, 0.0, 8.0, 20.0, 88.0, 1e4]
POWERS = [0.5, 1, 1.5, 2, 3, 4, 7]
# A handful of roundings: 2e-6 is 17 of them in float32; 1e-12 leaves 4500 in float64, of which the
# exponent of a power that is not whole needs a few hundred.
LIMITS = {torch.float32: 2e-6, torch.float64: 1e-12}


def seeded(seed=7161):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=7161, dtype=torch.float64, scale=3.0):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype) * scale


def exact(z, n):
    """Loss of a one and of a zero, their derivatives, and the logit, to 60 digits."""
    with mp.workdps(60):
        z, n = mp.mpf(z), mp.mpf(n)
        log_p = -n * mp.log1p(mp.exp(-z))
        p, q = mp.exp(log_p), 1 / (1 + mp.exp(z))
        rest = -mp.expm1(log_p) or n * mp.exp(-z)
        zero = -mp.log(rest) if p > mp.mpf("1e-50") else p
        return -log_p, zero, -n * q, n * p * q / rest, log_p - mp.log(rest)


def clipped(z, y, n, clip=1e-7):
    """Keras' cross-entropy of article 7161: the probability is clipped."""
    return F.binary_cross_entropy((torch.sigmoid(z) ** n).clamp(clip, 1 - clip), y)


def value_and_gradient(f, x):
    x = x.detach().clone().requires_grad_()
    value = f(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


# --- every element --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", POWERS)
def test_loss_and_gradient_of_each_element_are_exact_at_every_logit(n, dtype):
    middle = (torch.rand(40, generator=seeded(), dtype=torch.float64) * 30 - 15).tolist()
    z = torch.tensor(EXTREMES + middle, dtype=dtype)
    wanted = [exact(each, n) for each in z.tolist()]
    everywhere = torch.arange(len(z))[:, None]
    for y, (value, slope) in {1: (0, 2), 0: (1, 3)}.items():
        for given in (
            {"targets": torch.full_like(z, y)},
            {"positives": everywhere if y else everywhere[:0]},
        ):
            found = value_and_gradient(
                lambda x, given=given: power_bce_loss(x, **given, power=n, reduction="none"), z
            )
            for numbers, column in zip(found, (value, slope), strict=True):
                for got, want in zip(numbers.tolist(), wanted, strict=True):
                    # Below the smallest normal number there are no digits to compare.
                    size = max(abs(want[column]), torch.finfo(dtype).tiny)
                    assert abs(got - want[column]) <= LIMITS[dtype] * size


@pytest.mark.parametrize("n", POWERS)
def test_the_logit_of_a_power_and_its_slope_are_exact(n):
    z = torch.tensor(EXTREMES, dtype=torch.float64)
    values, slopes = value_and_gradient(lambda x: power_sigmoid_logit(x, n), z)
    for each, got, slope in zip(EXTREMES, values.tolist(), slopes.tolist(), strict=True):
        _one, _, of_one, of_zero, logit = exact(each, n)
        assert abs(got - logit) <= 1e-12 * max(1, abs(logit))
        assert abs(slope - (of_zero - of_one)) <= 1e-12 * n


def test_closed_forms_of_the_power_trick():
    zero = torch.zeros((), dtype=torch.float64)
    for n in (1, 2, 4):
        at_zero = power_sigmoid_logit(zero, n).item()
        assert at_zero == pytest.approx(-math.log(2**n - 1), abs=1e-12)  # 0, -1.0986, -2.70805
        slopes = [
            value_and_gradient(lambda z, y=y, n=n: power_bce_loss(z, y, power=n), zero)[1].item()
            for y in (zero + 1, zero)
        ]
        assert -slopes[0] / slopes[1] == pytest.approx(2**n - 1, abs=1e-12)  # 1, 3, 15
        for z in (-60.0, 60.0):
            line = n * z if z < 0 else z - math.log(n)
            found = power_sigmoid_logit(zero + z, n).item()
            assert found == pytest.approx(line, abs=1e-12)
    for n, half in ((2, 0.8814), (4, 1.6649)):  # p is a half there
        z = -math.log(2 ** (1 / n) - 1)
        assert z == pytest.approx(half, abs=5e-5)
        assert power_sigmoid_logit(zero + z, n).item() == pytest.approx(0, abs=1e-12)


def test_power_one_is_pytorchs_loss_between_zero_and_one_too():
    z, y = normal(4, 5), torch.rand(4, 5, generator=seeded(1), dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        want = value_and_gradient(
            lambda x, r=reduction: F.binary_cross_entropy_with_logits(x, y, reduction=r), z
        )
        got = value_and_gradient(lambda x, r=reduction: power_bce_loss(x, y, reduction=r), z)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_loss_is_the_cross_entropy_of_the_logit_of_the_power():
    z, y = normal(50), torch.rand(50, generator=seeded(1), dtype=torch.float64)
    for n in POWERS:
        want = F.binary_cross_entropy_with_logits(power_sigmoid_logit(z, n), y)
        torch.testing.assert_close(power_bce_loss(z, y, power=n), want, rtol=1e-12, atol=0)


def test_no_power_is_too_small_or_too_large():
    z = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
    for n in (1e-4, 300.0):
        loss = power_bce_loss(z, torch.zeros_like(z), power=n, reduction="none")
        want = [float(exact(each, n)[1]) for each in z.tolist()]
        assert loss.tolist() == pytest.approx(want, rel=1e-12)


# --- erratum 1: a clip leaves positives without gradient -----------------------------------------


@pytest.mark.parametrize(("n", "edge"), [(2, -8.06), (4, -4.01)])
def test_a_clipped_positive_has_no_gradient_and_ours_has_all_of_it(n, edge):
    one = torch.ones(1)
    for z in (edge - 0.01, -20.0):
        z = torch.tensor([z])
        assert value_and_gradient(lambda x: clipped(x, one, n), z)[1].item() == 0.0
        ours = value_and_gradient(lambda x: power_bce_loss(x, one, power=n), z)[1].item()
        assert ours == pytest.approx(-n / (1 + math.exp(z.item())), rel=2e-6)
    alive = value_and_gradient(lambda x: clipped(x, one, n), torch.tensor([edge + 0.01]))[1]
    assert alive.item() < -n / 2


def test_pytorchs_own_loss_of_a_probability_dies_later():
    # Its backward pass divides by max(p (1 - p), 1e-12).
    for n, z, dead in ((4, -7.0, -2.75), (4, -9.0, -9e-4), (2, -15.0, -0.19)):
        found = value_and_gradient(
            lambda x, n=n: F.binary_cross_entropy(torch.sigmoid(x) ** n, torch.ones(1)),
            torch.tensor([z]),
        )[1].item()
        assert found == pytest.approx(dead, rel=0.05)  # two digits are printed
        ours = value_and_gradient(
            lambda x, n=n: power_bce_loss(x, torch.ones(1), power=n), torch.tensor([z])
        )[1].item()
        assert ours == pytest.approx(-n, rel=2e-3)  # 1 - sigmoid is at least 0.999


# --- erratum 2: half types ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_and_stay_finite(dtype):
    z = torch.tensor([-1e4, -20.0, -4.5, 0.0, 6.5, 8.5, 20.0, 1e4], dtype=dtype)
    for y in (torch.zeros(8), torch.ones(8)):
        loss, gradient = value_and_gradient(lambda x, y=y: power_bce_loss(x, y, power=4), z)
        want = power_bce_loss(z.float(), y, power=4)
        assert loss.dtype == torch.float32
        assert gradient.dtype == dtype
        assert loss.equal(want)
        assert gradient.isfinite().all()
    logit = power_sigmoid_logit(z, 4)
    assert logit.dtype == dtype
    assert logit.isfinite().all()


def test_a_power_taken_in_half_precision_is_zero_or_one_where_the_loss_is_not():
    assert (torch.tensor(-4.35).half().sigmoid() ** 4).item() == 0.0
    assert (1 - torch.tensor(8.4).half().sigmoid() ** 4).item() == 0.0
    assert (1 - torch.tensor(6.3).bfloat16().sigmoid() ** 4).item() == 0.0
    for z, y, dtype in (
        (-4.35, 1.0, torch.float16),
        (8.4, 0.0, torch.float16),
        (6.3, 0.0, torch.bfloat16),
    ):
        z = torch.tensor(z, dtype=dtype)
        ours = power_bce_loss(z, torch.tensor(y), power=4).item()
        assert ours == pytest.approx(float(exact(z.item(), 4)[0 if y else 1]), rel=2e-6)


def test_autocast_changes_nothing():
    z, positives = normal(3, 4, 5, dtype=torch.float32), torch.tensor([[0, 1, 2], [2, 3, 4]])
    want = power_bce_loss(z, positives=positives, power=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert power_bce_loss(z, positives=positives, power=4).equal(want)
        half = power_bce_loss(z.bfloat16(), positives=positives, power=4)
    assert half.item() == pytest.approx(want.item(), rel=1e-2)  # bfloat16 has 8 bits


def test_a_confident_label_leaves_no_nan_at_any_order():
    # The branch that is not taken must not be infinite: 0 times infinity is NaN.
    z = torch.tensor([40.0, -40.0, 200.0, -200.0], requires_grad=True)
    for n in (0.5, 1, 1.5, 2, 4):
        for y in (torch.zeros(4), torch.ones(4)):
            loss = power_bce_loss(z, y, power=n)
            (first,) = torch.autograd.grad(loss, z, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), z)
            assert first.isfinite().all()
            assert second.isfinite().all()
        logit = power_sigmoid_logit(z, n)
        assert torch.autograd.grad(logit.sum(), z)[0].isfinite().all()


# --- positives by index ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 2.5])
def test_indices_of_the_ones_give_what_dense_labels_give_and_twice_counts_once(n):
    z = normal(3, 4, 5, 2)
    positives = torch.tensor([[0, 1, 2, 0], [2, 3, 4, 1], [0, 1, 2, 0], [1, 0, 0, 0]])
    y = torch.zeros(z.shape)
    y[positives.unbind(-1)] = 1
    weights = torch.rand(3, 4, generator=seeded(2), dtype=torch.float64)
    for labels in (y, y.bool(), y.long()):
        want = value_and_gradient(
            lambda x, y=labels: power_bce_loss(x, y, power=n, mask=weights), z
        )
        got = value_and_gradient(
            lambda x: power_bce_loss(x, positives=positives, power=n, mask=weights), z
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_no_positives_are_only_zeros():
    z = normal(2, 3)
    none = torch.zeros(0, 2, dtype=torch.int64)
    want = power_bce_loss(z, torch.zeros(2, 3), power=4)
    assert power_bce_loss(z, positives=none, power=4).equal(want)


def test_no_gradient_reaches_the_labels():
    y = torch.rand(4, generator=seeded(), dtype=torch.float64).requires_grad_()
    power_bce_loss(normal(4).requires_grad_(), y, power=2).backward()
    assert y.grad is None


def test_blocks_of_any_size_give_the_same_and_the_input_stays(monkeypatch):
    z, y = normal(3, 4, 5), torch.rand(3, 4, 5, generator=seeded(1), dtype=torch.float64)
    before = z.clone(), y.clone()
    want = value_and_gradient(lambda x: power_bce_loss(x, y, power=4), z)
    monkeypatch.setattr(losses, "CELLS_PER_PASS", 7)
    for x in (z, z.mT.contiguous().mT):
        got = value_and_gradient(lambda x: power_bce_loss(x, y, power=4), x)
        assert got[0].equal(want[0])
        assert got[1].equal(want[1])
    assert z.equal(before[0])
    assert y.equal(before[1])


# --- masks and means ------------------------------------------------------------------------------


def test_the_mean_is_over_the_weights_and_the_trailing_dimensions_are_summed():
    z, y = normal(2, 3, 4), (normal(2, 3, 4, seed=1) > 0).double()
    elements = power_bce_loss(z, y, power=2, reduction="none")
    weights = torch.tensor([[1.0, 0.5, 0.0], [2.0, 0.0, 0.25]], dtype=torch.float64)
    weighted = elements * weights[..., None]
    for reduction, want in {
        "none": weighted,
        "sum": weighted.sum(),
        "mean": weighted.sum() / 3.75,
    }.items():
        found = power_bce_loss(z, y, power=2, mask=weights, reduction=reduction)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    sentences = torch.tensor([False, True])
    found = power_bce_loss(z, y, power=2, mask=sentences)
    torch.testing.assert_close(found, elements[1].sum(), rtol=1e-12, atol=0)
    cells = y.bool()
    found = power_bce_loss(z, y, power=2, mask=cells)
    torch.testing.assert_close(found, elements[cells].mean(), rtol=1e-12, atol=0)
    found = power_bce_loss(z, y, power=2)
    torch.testing.assert_close(found, elements.mean(), rtol=1e-12, atol=0)


def test_padding_changes_neither_loss_nor_gradient():
    z, y = normal(2, 3, 4), (normal(2, 3, 4, seed=1) > 0).double()
    real = torch.ones(2, 3, dtype=torch.bool)
    want = value_and_gradient(lambda x: power_bce_loss(x, y, power=4, mask=real), z)
    for pad in (1, 50):
        longer = F.pad(z, (0, 0, 0, pad), value=5.0)
        labels, mask = F.pad(y, (0, 0, 0, pad)), F.pad(real, (0, pad))
        value, gradient = value_and_gradient(
            lambda x, y=labels, m=mask: power_bce_loss(x, y, power=4, mask=m), longer
        )
        torch.testing.assert_close(value, want[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient[:, :3], want[1], rtol=1e-12, atol=0)
        assert not gradient[:, 3:].any()


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_stands_at_a_masked_position_is_never_used(what, reduction):
    z, mask = normal(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    positives = torch.tensor([[0, 0, 1], [0, 2, 3], [1, 0, 2]])

    def f(x):
        return power_bce_loss(x, positives=positives, power=2, mask=mask, reduction=reduction)

    want = value_and_gradient(f, z)
    bad = z.masked_fill(~mask[..., None], what)
    got = value_and_gradient(f, bad)
    assert got[0].equal(want[0])
    assert got[1].equal(want[1])
    assert not got[1][~mask].any()
    bad.requires_grad_()
    (first,) = torch.autograd.grad(f(bad).sum(), bad, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), bad)[0].isfinite().all()
    assert torch.func.grad(lambda x: f(x).sum())(bad.detach()).isfinite().all()


def test_nan_at_a_position_that_counts_is_not_hidden():
    z = normal(3)
    z[1] = math.nan
    assert power_bce_loss(z, torch.zeros(3), power=4).isnan()


def test_a_batch_without_anything_that_counts_costs_nothing():
    z = normal(2, 3, 4)
    positives = torch.tensor([[0, 0, 1]])
    for mask in (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2)):
        for reduction in ("mean", "sum"):
            value, gradient = value_and_gradient(
                lambda x, m=mask, r=reduction: power_bce_loss(
                    x, positives=positives, mask=m, reduction=r
                ),
                z,
            )
            assert value.item() == 0.0
            assert not gradient.any()
    empty = torch.zeros(0, 3, 4, 2, requires_grad=True)
    loss = power_bce_loss(
        empty, positives=torch.zeros(0, 4, dtype=torch.int64), mask=torch.zeros(0, 3)
    )
    loss.backward()
    assert loss.item() == 0.0


# --- transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0.5, 1, 2, 3, 4, 2.5])
def test_first_and_second_derivatives_agree_with_differences(n):
    z = normal(2, 3, 2).requires_grad_()
    y = torch.rand(2, 3, 2, generator=seeded(1), dtype=torch.float64)
    positives = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 2, 0]])
    weights = torch.rand(2, 3, generator=seeded(2), dtype=torch.float64)
    for f in (
        lambda x: power_bce_loss(x, positives=positives, power=n, mask=weights),
        lambda x: power_bce_loss(x.mT.contiguous().mT, y, power=n).square(),
        lambda x: power_sigmoid_logit(x, n),
    ):
        assert gradcheck(f, z)
        assert gradgradcheck(f, z)


def test_functional_transforms_give_what_autograd_gives():
    z = normal(3, 2, 4, 2)
    positives = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 2, 0]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])

    def f(x):
        return power_bce_loss(x, positives=positives, power=4, mask=mask)

    each = [value_and_gradient(f, x) for x in z]
    want = [torch.stack(column) for column in zip(*each, strict=True)]
    torch.testing.assert_close(torch.vmap(f)(z), want[0], rtol=1e-12, atol=0)
    gradients = torch.vmap(torch.func.grad(f))(z)
    torch.testing.assert_close(gradients, want[1], rtol=1e-12, atol=1e-15)


# --- bad input ------------------------------------------------------------------------------------

Z = torch.zeros(2, 3)
INDEX = torch.tensor([[0, 0], [1, 3]])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": Z.long(), "targets": Z}, TypeError, r"`logits` must be.*floating.*int64"),
        ({"targets": None}, ValueError, r"either `targets` or `positives`"),
        ({"positives": INDEX[:1]}, ValueError, r"either `targets` or `positives`"),
        ({"targets": Z[:1]}, ValueError, r"`targets` must have the shape.*\(2, 3\).*\(1, 3\)"),
        ({"targets": Z + 2}, ValueError, r"`targets` must lie in \[0, 1\]; got 2.0 to 2.0"),
        ({"targets": Z + math.nan}, ValueError, r"`targets` must lie in \[0, 1\]"),
        ({"power": 0}, ValueError, r"`power` must be a finite number above 0; got 0"),
        ({"power": math.nan}, ValueError, r"`power` must be a finite number above 0; got nan"),
        ({"reduction": "max"}, ValueError, r"`reduction` must be one of.*'max'"),
        ({"mask": torch.ones(3)}, ValueError, r"`mask` must have the shape of leading.*\(3,\)"),
        ({"mask": torch.tensor(1.0)}, ValueError, r"`mask` must have the shape of leading.*\(\)"),
        ({"mask": torch.ones(2).long()}, TypeError, r"`mask` must be bool, or floating.*int64"),
        ({"mask": torch.tensor([1.0, -1.0])}, ValueError, r"`mask` must hold weights of at least"),
        ({"mask": torch.tensor([1.0, math.nan])}, ValueError, r"`mask` must hold weights"),
        (
            {"targets": None, "positives": INDEX},
            ValueError,
            r"`positives\[1\]` is \[1, 3\], out of range for shape \(2, 3\)",
        ),
        ({"targets": None, "positives": -INDEX[1:]}, ValueError, r"`positives\[0\]` is \[-1, -3\]"),
        ({"targets": None, "positives": INDEX.int()}, TypeError, r"`positives` must be.*int32"),
        (
            {"targets": None, "positives": INDEX[:, :1]},
            ValueError,
            r"`positives` must have shape \(p, 2\).*\(2, 1\)",
        ),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        power_bce_loss(**({"logits": Z, "targets": Z} | arguments))


@pytest.mark.usefixtures("unchecked")
def test_bad_input_of_the_logit_is_named():
    with pytest.raises(TypeError, match="`z` must be"):
        power_sigmoid_logit(torch.zeros(2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="`power` must be"):
        power_sigmoid_logit(torch.zeros(2), -1)
