"""R-hat, effective sample size and autocorrelation: ArviZ's numbers, closed forms, odd chains.

Statistical tests have one fixed seed, and tolerances of 5 standard errors.
"""

import math

import numpy as np
import pytest
import torch
from scipy import special

from cln_tutorial.energy_models import diagnostics
from cln_tutorial.energy_models.diagnostics import (
    autocorrelation,
    effective_sample_size,
    integrated_autocorr_time,
    rhat,
)

inf, nan = math.inf, math.nan
ALL = [
    lambda x: rhat(x, "rank"),
    lambda x: rhat(x, "split"),
    lambda x: effective_sample_size(x, "rank"),
    lambda x: effective_sample_size(x, "split"),
    integrated_autocorr_time,
    autocorrelation,
]
NAMES = ["rhat rank", "rhat split", "ess rank", "ess split", "time", "autocorrelation"]
each = pytest.mark.parametrize("statistic", ALL, ids=NAMES)


def autoregression(rho, n_steps, n_chains, *event, seed=6612):
    """Stationary chains of N(0, 1) whose correlation at lag k is rho**k."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n_steps, n_chains, *event, generator=rng, dtype=torch.float64)
    for t in range(1, n_steps):
        x[t] = rho * x[t - 1] + math.sqrt(1 - rho**2) * x[t]
    return x


# --- against ArviZ --------------------------------------------------------------------------------


def uniform(n, seed):
    """Numbers that are the same with every version of every library."""
    state, numbers = seed, []
    for _ in range(n):
        state = (1664525 * state + 1013904223) % 2**32
        numbers.append((state + 0.5) / 2**32)
    return np.array(numbers)


def made(n, m, rho, seed):
    z = special.ndtri(uniform(n * m, seed)).reshape(n, m)
    x = z.copy()
    for t in range(1, n):
        x[t] = rho * x[t - 1] + math.sqrt(1 - rho * rho) * z[t]
    return x


CHAINS = {
    "independent": lambda: made(500, 4, 0.0, 1),
    "slow": lambda: made(250, 4, 0.9, 2),
    "alternating": lambda: made(200, 2, -0.5, 3),
    "odd length, one elsewhere": lambda: made(101, 3, 0.5, 4) + np.array([0.0, 0.0, 1.0]),
    "one wider": lambda: made(120, 4, 0.3, 5) * np.array([1.0, 1.0, 1.0, 3.0]),
    "ties": lambda: np.round(made(150, 3, 0.6, 6)),
    "heavy tails": lambda: np.tan(math.pi * (uniform(400, 7).reshape(100, 4) - 0.5)),
    "two values": lambda: np.sign(made(80, 2, 0.4, 8)),
    "seven steps": lambda: made(7, 2, 0.0, 9),
    "drifting": lambda: made(90, 4, 0.2, 10) + np.linspace(0, 2, 90)[:, None],
    "never decays": lambda: np.linspace(0, 1, 40)[:, None] + 0.01 * made(40, 2, 0.0, 11),
}
# ArviZ 0.23.4: rhat(method="rank"), rhat("split"), ess("bulk"), ess("mean").
ARVIZ = {
    "independent": [1.000377972604171, 1.0003845179663091, 1832.8454783638838, 1832.6235369510555],
    "slow": [1.079526354270164, 1.0768221870506296, 41.048889062483916, 43.724775379177586],
    "alternating": [0.9981761832410991, 0.9958906850223759, 1040.823996531185, 1040.823996531185],
    "odd length, one elsewhere": [
        1.1203158253751349,
        1.1186690567679538,
        23.13999449542811,
        23.645680132005346,
    ],
    "one wider": [1.1843229884102553, 1.0031769545576135, 284.88866357756814, 292.63232686479057],
    "ties": [1.0220777577582436, 1.02208154812154, 140.532569275292, 137.62099107005076],
    "heavy tails": [0.9969103188608688, 0.999374471535589, 387.6143148594364, 423.7594987938996],
    "two values": [0.9952267030562386, 0.9952267030562386, 86.30593482968321, 86.30593482968321],
    "seven steps": [1.0476572067505057, 1.0286821099020982, 12.9501749525715, 12.9501749525715],
    "drifting": [1.1135254372948475, 1.1186563389276352, 24.465465690798826, 23.09924279377425],
    "never decays": [1.8080386716409838, 2.185566190359162, 3.5158220293304954, 3.1175129846755256],
}


@pytest.mark.parametrize("name", CHAINS)
def test_rhat_and_effective_sample_size_are_those_of_arviz(name):
    chains = torch.from_numpy(CHAINS[name]())
    found = [statistic(chains).item() for statistic in ALL[:4]]
    assert found == pytest.approx(ARVIZ[name], rel=1e-9)


# --- closed forms ---------------------------------------------------------------------------------

RHOS = [0.0, 0.5, 0.9, -0.5]


@pytest.mark.parametrize("rho", RHOS)
def test_time_and_sample_size_of_an_autoregression_are_the_closed_form(rho):
    tau, n, m, copies = (1 + rho) / (1 - rho), 5000, 4, 32
    x = autoregression(rho, n, m, copies)
    for found in (
        integrated_autocorr_time(x),
        n * m / effective_sample_size(x),
        n * m / effective_sample_size(x, "split"),
    ):
        error = found.std() / math.sqrt(copies)
        # Bias: noise that happens to be positive is added (some of sqrt(2 / N) = 0.01), and a
        # mean that is not known moves each of the lags by tau over the length of half a chain.
        assert abs(found.mean() - tau) < 5 * error + 0.01 + 10 * tau / (n / 2)
        assert found.std() < 0.25 * tau


@pytest.mark.parametrize("rho", RHOS)
def test_autocorrelation_of_an_autoregression_is_a_power(rho):
    n, m = 2000, 200
    found = autocorrelation(autoregression(rho, n, m), max_lag=20)
    k = torch.arange(21, dtype=torch.float64)
    # Bartlett's variance of an estimated correlation of an autoregression.
    even = rho**2
    variance = (1 + even) * (1 - even**k) / (1 - even) - 2 * k * even**k
    assert found[0] == 1
    assert ((found - rho**k).abs() <= 5 * (variance / ((n - k) * m)).sqrt() + 1e-12).all()


@pytest.mark.parametrize("shape", [(5, 1), (37, 3), (64, 2)])
def test_autocorrelation_is_the_sum_of_products(shape):
    x = autoregression(0.7, *shape) + 3
    n, centred = shape[0], x - x.mean()
    # The mean of all chains; each lag over the number of its products.
    sums = [(centred[: n - k] * centred[k:]).mean() for k in range(n)]
    expected = torch.stack(sums) / sums[0]
    torch.testing.assert_close(autocorrelation(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(autocorrelation(x, max_lag=3), expected[:4], rtol=0, atol=1e-12)


def test_many_short_chains_are_as_good_as_a_long_one():
    # 4000 chains of 20 steps, tau = 19: their own means would hide most of it.
    found = autocorrelation(autoregression(0.9, 20, 4000), max_lag=5)
    expected = 0.9 ** torch.arange(6, dtype=torch.float64)
    # Correlation across a chain makes at least one independent number of each chain.
    assert (found - expected).abs().max() < 5 / math.sqrt(4000)


# --- what R-hat and the sample size see -----------------------------------------------------------


def test_rhat_is_1_on_independent_draws():
    x = autoregression(0.0, 2000, 4, 50)
    for method in ("rank", "split"):
        # W and B / n are known to about 1 / N each: 0.01 is 10 of its standard errors.
        assert (rhat(x, method) - 1).abs().max() < 0.01


def test_rhat_and_sample_size_see_four_chains_stuck_in_two_modes():
    x = 0.3 * autoregression(0.0, 500, 4) + torch.tensor([2.0, -2.0, 2.0, -2.0])
    for method in ("rank", "split"):
        assert rhat(x, method) > 1.5
        assert effective_sample_size(x, method) < 10
    assert integrated_autocorr_time(x) > 400
    assert rhat(x[:, ::2]) < 1.01


def test_only_the_ranked_rhat_sees_a_chain_of_another_width():
    x = autoregression(0.0, 1000, 4) * torch.tensor([1.0, 1.0, 1.0, 3.0])
    assert rhat(x, "split") < 1.01
    assert rhat(x, "rank") > 1.1


def test_a_drift_shows_even_in_one_chain():
    x = autoregression(0.0, 1000, 1) + torch.linspace(0, 3, 1000)[:, None]
    assert rhat(x) > 1.2
    assert rhat(autoregression(0.0, 1000, 1)) < 1.01


def test_ranks_do_not_care_for_the_scale():
    x = autoregression(0.8, 300, 3)
    expected = effective_sample_size(x)
    # exp keeps the order of all values, but makes their mean that of the largest few.
    torch.testing.assert_close(effective_sample_size((20 * x).exp()), expected, rtol=1e-12, atol=0)
    changed = effective_sample_size((20 * x).exp(), "split")
    assert abs(changed / effective_sample_size(x, "split") - 1) > 0.5


def test_chains_that_stand_still_at_different_places_disagree_without_end():
    x = torch.tensor([0.1, 0.7, 1.3, 5.7]).expand(100, 4)
    for method in ("rank", "split"):
        assert rhat(x, method) == inf
        assert effective_sample_size(x, method) < 10
    assert rhat(torch.tensor([0.1, 0.7]).expand(100, 2)) == inf  # their tails are all equal


def test_alternating_chains_are_worth_more_than_their_length_but_not_without_end():
    x = torch.tensor([1.0, -1.0]).repeat(500)[:, None].expand(1000, 2)
    assert effective_sample_size(x).item() == pytest.approx(2000 * math.log10(2000), rel=1e-6)


# --- input that has no answer ---------------------------------------------------------------------


@each
def test_a_coordinate_that_never_changes_is_nan_with_a_warning(statistic):
    x = autoregression(0.5, 50, 3, 4)
    x[..., 1] = 0.1
    expected = statistic(x[..., [0, 2, 3]])
    with pytest.warns(UserWarning, match="NaN for 1 constant coordinates and 0 with .* of 4"):
        found = statistic(x)
    assert found[..., 1].isnan().all()
    torch.testing.assert_close(found[..., [0, 2, 3]], expected, rtol=1e-12, atol=1e-12)


@each
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_coordinate_that_is_not_finite_is_nan_with_a_warning(statistic, bad):
    x = autoregression(0.5, 50, 3, 4)
    x[20, 1, 2] = bad
    with pytest.warns(UserWarning, match="NaN for 0 constant coordinates and 1 with .* of 4"):
        found = statistic(x)
    assert found[..., 2].isnan().all()
    assert found[..., [0, 1, 3]].isfinite().all()


# --- shapes, dtypes, blocks -----------------------------------------------------------------------


@each
def test_every_coordinate_is_judged_by_itself(statistic):
    x = torch.stack([autoregression(r, 41, 3, 2) * (1 + r) + r for r in (0, 0.3, 0.9)], -1)
    found = statistic(x)
    assert found.shape[-2:] == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = statistic(x[..., i, j])
            torch.testing.assert_close(found[..., i, j], alone, rtol=1e-10, atol=1e-10)


@each
def test_blocks_do_not_change_the_numbers(statistic, monkeypatch):
    x = autoregression(0.5, 41, 3, 7)
    expected = statistic(x)
    monkeypatch.setattr(diagnostics, "BLOCK", 300)  # two coordinates, one chain of a transform
    torch.testing.assert_close(statistic(x), expected, rtol=1e-10, atol=1e-10)


@each
def test_float32_is_added_up_in_float64(statistic):
    x = (autoregression(0.5, 400, 3, 2) + 1000).float()
    found, expected = statistic(x), statistic(x.double())
    assert found.dtype == torch.float32
    assert found.equal(expected.float())


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_give_float32(statistic, dtype):
    x = autoregression(0.5, 400, 3).to(dtype)
    found = statistic(x)
    assert found.dtype == torch.float32
    assert found.equal(statistic(x.float()))


@each
def test_strides_gradients_and_the_input_are_left_alone(statistic):
    x = autoregression(0.5, 60, 3, 2)
    strided = x.permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    before = strided.detach().clone()
    found = statistic(strided)
    torch.testing.assert_close(found, statistic(x), rtol=1e-10, atol=1e-10)
    assert not found.requires_grad
    assert strided.equal(before)
    with torch.inference_mode():
        torch.testing.assert_close(statistic(x), found, rtol=1e-10, atol=1e-10)


@each
@pytest.mark.parametrize("shape", [(4,), (3, 2), (10, 0), (10, 2, 0)])
def test_bad_shapes_are_refused(statistic, shape, unchecked):
    with pytest.raises(ValueError, match=r"`chains` must be \(n_steps, n_chains, \*event\)"):
        statistic(torch.ones(shape))


@each
def test_whole_numbers_are_refused(statistic, unchecked):
    with pytest.raises(TypeError, match="`chains` must be a tensor of floating numbers"):
        statistic(torch.ones(9, 2, dtype=torch.long))


def test_unknown_methods_and_lags_are_refused(unchecked):
    x = autoregression(0.0, 10, 2)
    for function in (rhat, effective_sample_size):
        with pytest.raises(ValueError, match="`method` must be 'rank' or 'split'; got 'bulk'"):
            function(x, "bulk")
    with pytest.raises(ValueError, match="`max_lag` must be below the number of steps, 10; got 10"):
        autocorrelation(x, max_lag=10)
    with pytest.raises(ValueError, match="`max_lag` must be at least 0"):
        autocorrelation(x, max_lag=-1)
    with pytest.raises(TypeError, match="`max_lag`"):
        autocorrelation(x, max_lag=2.0)
