"""Energy distance, MMD, permutation test, precision and recall: closed forms, peers, brute force.

Statistical tests have one fixed seed, and tolerances of 5 standard errors where none is named.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import spatial, stats
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neighbors import NearestNeighbors

from cln_tutorial.energy_models import two_sample
from cln_tutorial.energy_models.two_sample import (
    energy_distance,
    knn_precision_recall,
    mmd,
    permutation_test,
)

both = pytest.mark.parametrize("unbiased", [True, False])
# By products a point is up to sqrt(1e-16) = 1e-8 away from itself, which counts with bias only.
TOLERANCE = {True: 1e-12, False: 1e-8}


def seeded(seed=6612):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=6612, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def by_pairs(kernel, x, y, unbiased):
    """The definition, by means over matrices of all pairs."""
    k_xx, k_yy, k_xy = kernel(x, x), kernel(y, y), kernel(x, y)
    if unbiased:
        n, m = len(x), len(y)
        k_xx = (k_xx - np.diag(np.diag(k_xx))) * n / (n - 1)
        k_yy = (k_yy - np.diag(np.diag(k_yy))) * m / (m - 1)
    return k_xx.mean() + k_yy.mean() - 2 * k_xy.mean()


def induced(x, y):
    """The kernel that the distance induces, with the origin as its centre."""
    return (x.norm(dim=1)[:, None] + y.norm(dim=1) - torch.cdist(x, y)) / 2


# --- energy distance and MMD ----------------------------------------------------------------------


@both
def test_energy_distance_is_its_definition(unbiased):
    x, y = normal(31, 5), normal(57, 5, seed=1) + 0.3
    expected = by_pairs(lambda a, b: -spatial.distance.cdist(a, b), x, y, unbiased)
    found = energy_distance(x, y, unbiased=unbiased).item()
    assert found == pytest.approx(expected, abs=TOLERANCE[unbiased])
    # The same event in another shape.
    x, y = x[:, :4].reshape(31, 2, 2), y[:, :4].reshape(57, 2, 2)
    flat = energy_distance(x.flatten(1), y.flatten(1), unbiased=unbiased)
    assert energy_distance(x, y, unbiased=unbiased).equal(flat)


def test_in_one_dimension_it_is_that_of_scipy_squared():
    x, y = normal(40, 1), normal(25, 1, seed=1).exp()
    expected = stats.energy_distance(x.flatten(), y.flatten()) ** 2
    assert energy_distance(x, y, unbiased=False).item() == pytest.approx(expected, abs=1e-8)


@both
def test_energy_distance_is_twice_the_mmd_of_the_kernel_that_the_distance_induces(unbiased):
    x, y = normal(31, 5) + 2, normal(57, 5, seed=1) + 2.3
    expected = energy_distance(x, y, unbiased=unbiased).item()
    for kernel in (induced, "distance"):
        found = 2 * mmd(x, y, kernel, unbiased=unbiased).item()
        assert found == pytest.approx(expected, abs=TOLERANCE[unbiased])


@both
@pytest.mark.parametrize("bandwidth", [0.5, 2])
def test_mmd_of_gaussian_kernels_is_that_of_scikit_learn(unbiased, bandwidth):
    x, y = normal(31, 5), normal(57, 5, seed=1) + 0.3
    gamma = 1 / (2 * bandwidth**2)
    expected = by_pairs(lambda a, b: rbf_kernel(a, b, gamma=gamma), x, y, unbiased)
    found = mmd(x, y, bandwidth=bandwidth, unbiased=unbiased)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_the_bandwidth_is_the_median_distance_of_both_sets_together():
    x, y = normal(31, 5), normal(52, 5, seed=1) + 3  # 3403 pairs, so the median is one of them
    median = float(np.median(spatial.distance.pdist(torch.cat([x, y]))))
    assert mmd(x, y).item() == pytest.approx(mmd(x, y, bandwidth=median).item(), abs=1e-14)
    # Of many points a thousand are asked, of both sets alike: the median of N(0, 2 I_5) norms.
    x, y = normal(3000, 5), normal(2500, 5, seed=1)
    expected = mmd(x, y, bandwidth=math.sqrt(2 * stats.chi2(5).median()))
    assert mmd(x, y).item() == pytest.approx(expected.item(), rel=0.1)


def replicate(statistic, shift, n=12, m=20, repeats=400, d=2):
    rng = seeded()
    values = []
    for _ in range(repeats):
        x = torch.randn(n, d, generator=rng, dtype=torch.float64)
        y = torch.randn(m, d, generator=rng, dtype=torch.float64)
        y[:, 0] += shift
        values.append(statistic(x, y))
    values = torch.stack(values)
    return values, (values.std() / math.sqrt(repeats)).item()


def energy_of_normals(shift):
    """Energy distance between N(0, 1) and N(shift, 1)."""
    apart = 2 / math.sqrt(math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    return 2 * apart - 4 / math.sqrt(math.pi)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_without_bias_the_mean_is_the_energy_distance_of_the_laws(shift):
    values, error = replicate(energy_distance, shift, d=1)
    assert abs(values.mean() - energy_of_normals(shift)) < 5 * error
    if shift == 0:  # half of them, or a few more: the law is skewed
        assert 0.3 < (values < 0).double().mean() < 0.8


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_with_bias_the_mean_is_larger_by_the_pairs_of_a_point_with_itself(shift):
    values, error = replicate(lambda x, y: energy_distance(x, y, unbiased=False), shift, d=1)
    bias = 2 / math.sqrt(math.pi) * (1 / 12 + 1 / 20)
    assert abs(values.mean() - energy_of_normals(shift) - bias) < 5 * error
    assert (values >= 0).all()


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_without_bias_the_mean_is_the_mmd_of_the_laws(shift):
    b, d = 0.8, 2
    values, error = replicate(lambda x, y: mmd(x, y, bandwidth=b), shift, d=d)
    # E exp(-|z|^2 / 2b^2) of a difference z ~ N(shift, 2 I).
    width = (b**2 / (b**2 + 2)) ** (d / 2)
    expected = 2 * width * (1 - math.exp(-(shift**2) / (2 * (b**2 + 2))))
    assert abs(values.mean() - expected) < 5 * error
    assert (values < 0).any()


@pytest.mark.parametrize("d", [1, 7])
def test_the_same_points_in_another_order_are_at_distance_0(d):
    x = normal(200, d)
    shuffled = x[torch.randperm(200, generator=seeded())]
    # Copies are at a distance of sqrt(1e-16) = 1e-8 by products, 200 of 40,000 pairs.
    assert abs(energy_distance(x, shuffled, unbiased=False)) < 1e-9
    assert abs(mmd(x, shuffled, unbiased=False)) < 1e-9
    assert energy_distance(x, shuffled) < 0


@both
def test_points_far_from_the_origin_are_as_good_as_near_ones(unbiased):
    x, y = (normal(60, 3, seed=seed).mul(2**10).round() / 2**10 for seed in (0, 1))
    far = 2.0**30  # the shift is exact, but its square swallows everything
    for statistic in (energy_distance, mmd):
        expected = statistic(x, y, unbiased=unbiased).item()
        found = statistic(x + far, y + far, unbiased=unbiased).item()
        assert found == pytest.approx(expected, abs=1e-7)


@both
@pytest.mark.parametrize("pairs", [1, 64, 500])
def test_blocks_do_not_change_the_numbers(unbiased, pairs, monkeypatch):
    x, y = normal(31, 5), normal(57, 5, seed=1) + 0.3
    expected = [f(x, y, unbiased=unbiased).item() for f in (energy_distance, mmd)]
    near = knn_precision_recall(x, y)
    monkeypatch.setattr(two_sample, "PAIRS", pairs)
    found = [f(x, y, unbiased=unbiased).item() for f in (energy_distance, mmd)]
    assert found == pytest.approx(expected, abs=TOLERANCE[unbiased])
    assert knn_precision_recall(x, y) == near


def test_twenty_thousand_points_are_never_paired_at_once():
    seen = []

    def kernel(x, y):
        seen.append(len(x) * len(y))
        return x.new_zeros(1, 1).expand(len(x), len(y))

    x = torch.zeros(20_000, 1)
    assert mmd(x, x, kernel) == 0
    assert max(seen) <= 2**22  # 32 MiB, for 3 GB of one matrix
    assert sum(seen) >= 2 * 20_000**2  # all pairs across, half of those within


def test_one_point_is_enough_with_bias_only(unchecked):
    x, y = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert energy_distance(x, y, unbiased=False) == 10
    with pytest.raises(ValueError, match="`x` must have at least 2 points; got 1"):
        energy_distance(x, y)


# --- permutation test -----------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["energy", "mmd"])
@pytest.mark.parametrize("sizes", [(15, 15), (8, 25)])
def test_p_values_are_uniform_if_the_laws_are_equal(statistic, sizes):
    rng, p = seeded(), []
    for _ in range(200):
        x, y = (torch.randn(n, 2, generator=rng) for n in sizes)
        p.append(permutation_test(x, y, statistic, 199, generator=rng).p_value.item())
    # The grid of 1/200 is far below the 0.1 that 200 values can tell; 1 seed of 1000 fails this.
    assert stats.kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("copies", [False, True])
def test_the_p_value_is_that_of_all_ways_to_deal_the_points_out(copies):
    x = torch.tensor([[0.0], [1.0], [1.0 if copies else 1.5]], dtype=torch.float64)
    y = torch.tensor([[1.0 if copies else 2.5], [3.0], [3.0 if copies else 4.5]]).double()
    points, observed = torch.cat([x, y]), energy_distance(x, y)
    values = []
    for chosen in itertools.combinations(range(6), 3):
        rest = [i for i in range(6) if i not in chosen]
        values.append(energy_distance(points[list(chosen)], points[rest]).item())
    exact = np.mean(np.array(values) >= observed.item() - 1e-9)
    test = permutation_test(x, y, n_permutations=4000, generator=seeded())
    assert abs(test.p_value - exact) < 5 * math.sqrt(exact * (1 - exact) / 4000) + 1 / 4001


@pytest.mark.parametrize("statistic", ["energy", "mmd", energy_distance])
def test_rounding_does_not_decide_ties(statistic):
    # Sets of the same size that change places give the same statistic, 1 time in 35.
    for seed in range(5):
        x, y = normal(4, 3, seed=seed), normal(4, 3, seed=seed + 100) + 5
        observed, p_value, null = permutation_test(x, y, statistic, 500, generator=seeded())
        expected = (1 + int((null >= observed - 1e-9).sum())) / 501
        assert p_value.item() == pytest.approx(expected, abs=1e-12)


def test_the_smallest_p_value_counts_the_points_as_they_came():
    x = normal(30, 3)
    test = permutation_test(x, x + 5, n_permutations=99, generator=seeded())
    assert test.p_value.item() == pytest.approx(0.01, abs=1e-12)
    assert (test.null < test.statistic).all()


@pytest.mark.parametrize("kind", ["energy", "mmd"])
def test_the_products_give_what_the_function_gives_on_each_permutation(kind):
    x, y = normal(20, 3), normal(33, 3, seed=1) + 0.2
    points = torch.cat([x, y])
    median = float(np.median(spatial.distance.pdist(points)))  # 1378 pairs: the mean of two
    median = float(torch.pdist(points).median()) if kind == "mmd" else median
    function = {"energy": energy_distance, "mmd": lambda a, b: mmd(a, b, bandwidth=median)}[kind]
    fast = permutation_test(x, y, kind, 300, generator=seeded())
    slow = permutation_test(x, y, function, 300, generator=seeded())
    torch.testing.assert_close(fast.null, slow.null, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast.statistic, function(x, y), rtol=0, atol=1e-12)
    assert fast.p_value == slow.p_value
    assert fast.null.shape == (300,)


def test_a_function_sees_the_points_in_their_shape_and_every_point_once():
    x, y = torch.arange(12.0).reshape(3, 2, 2), torch.arange(12.0, 20.0).reshape(2, 2, 2)
    seen = []

    def statistic(a, b):
        seen.append(sorted(torch.cat([a, b])[:, 0, 0].tolist()))
        assert (a.shape, b.shape) == ((3, 2, 2), (2, 2, 2))
        return float(a.mean())

    test = permutation_test(x.requires_grad_(), y, statistic, 20, generator=seeded())
    assert seen == [[0, 4, 8, 12, 16]] * 21
    assert test.statistic.item() == 5.5


def test_the_generator_alone_decides():
    x, y = normal(20, 3), normal(20, 3, seed=1)
    before = torch.get_rng_state()
    first = permutation_test(x, y, generator=seeded(1)).null
    assert torch.get_rng_state().equal(before)
    assert permutation_test(x, y, generator=seeded(1)).null.equal(first)
    assert not permutation_test(x, y, generator=seeded(2)).null.equal(first)
    torch.manual_seed(0)
    drawn = permutation_test(x, y).null
    torch.manual_seed(0)
    assert permutation_test(x, y).null.equal(drawn)


# --- precision and recall -------------------------------------------------------------------------


def by_neighbours(real, fake, k):
    def share(points, centres):
        # scikit-learn leaves a point out of its own neighbours.
        radii = NearestNeighbors(n_neighbors=k).fit(centres).kneighbors()[0][:, -1]
        return (spatial.distance.cdist(points, centres) <= radii).any(1).mean()

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_those_of_scikit_learns_neighbours(k):
    real, fake = normal(120, 3), 1.5 * normal(80, 3, seed=1) + 0.5
    assert knn_precision_recall(real, fake, k) == pytest.approx(by_neighbours(real, fake, k))


@settings(deadline=None, max_examples=60)
@given(
    real=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=12),
    fake=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=12),
    k=st.integers(1, 3),
)
def test_on_a_lattice_the_border_counts_and_copies_are_neighbours(real, fake, k):
    def share(points, centres):
        inside = 0
        for point in points:
            for i, centre in enumerate(centres):
                # Squared distances are whole numbers, so nothing is rounded.
                others = [spatial_square(centre, c) for j, c in enumerate(centres) if j != i]
                if spatial_square(point, centre) <= sorted(others)[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    found = knn_precision_recall(torch.tensor(real).double(), torch.tensor(fake).double(), k)
    assert found.precision.item() == pytest.approx(share(fake, real))
    assert found.recall.item() == pytest.approx(share(real, fake))


def spatial_square(a, b):
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2


def test_copies_are_found_and_strangers_are_not():
    x = normal(50, 8, dtype=torch.float32) + 100
    assert knn_precision_recall(x, x.flip(0)) == (1, 1)
    assert knn_precision_recall(x, x + 100) == (0, 0)


def test_among_copies_only_another_copy_is_inside():
    copies = normal(1, 8).add(100).expand(40, 8)  # radius 0
    steps = torch.arange(50, dtype=torch.float64)[:, None] / 2**20
    precision, recall = knn_precision_recall(copies, copies[:1] + steps)
    # By products 1e-6 at a distance of 300 from the origin is nothing.
    assert precision.item() == pytest.approx(1 / 50)
    assert recall == 1


def test_a_lost_mode_costs_recall_and_a_wrong_point_costs_precision():
    modes = torch.tensor([[-50.0, 0.0], [50.0, 0.0]], dtype=torch.float64)
    real = torch.cat([modes[i] + normal(100, 2, seed=i) for i in range(2)])
    half = modes[0] + normal(200, 2, seed=2)
    precision, recall = knn_precision_recall(real, half)
    assert precision > 0.9
    assert 0.45 < recall <= 0.5
    wrong = torch.cat([real[::2], torch.tensor([0.0, 1000.0]) + normal(100, 2, seed=3)])
    precision, recall = knn_precision_recall(real, wrong)
    assert precision == 0.5
    assert recall > 0.9


# --- input and output -----------------------------------------------------------------------------

FUNCTIONS = {
    "energy_distance": energy_distance,
    "mmd": mmd,
    "permutation_test": lambda x, y: permutation_test(x, y, n_permutations=9),
    "knn_precision_recall": knn_precision_recall,
}
each = pytest.mark.parametrize("name", FUNCTIONS)


def first(result):
    return result[0] if isinstance(result, tuple) else result


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_points_and_float32_for_half_types(name, dtype):
    torch.manual_seed(0)
    x, y = normal(40, 6).to(dtype), (normal(30, 6, seed=1) + 1).to(dtype)
    found = FUNCTIONS[name](x, y)
    results = found if isinstance(found, tuple) else (found,)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {r.dtype for r in results} == {wide}
    # All is computed in float64, whatever comes in.
    assert first(found).equal(first(FUNCTIONS[name](x.double(), y.double())).to(wide))


@each
def test_strides_gradients_and_the_input_are_left_alone(name):
    x, y = normal(6, 40).T.requires_grad_(), normal(30, 6, seed=1)
    before = x.detach().clone()
    found = first(FUNCTIONS[name](x, y))
    assert not found.requires_grad
    assert x.requires_grad
    assert x.equal(before)
    with torch.inference_mode():
        again = first(FUNCTIONS[name](x.detach().contiguous(), y))
    torch.testing.assert_close(again, found, rtol=1e-9, atol=1e-12)


@each
def test_points_that_do_not_fit_are_refused(name, unchecked):
    function, x = FUNCTIONS[name], torch.randn(9, 2, generator=seeded())
    names = ("real", "fake") if name == "knn_precision_recall" else ("x", "y")
    with pytest.raises(ValueError, match=f"`{names[0]}` and `{names[1]}` must agree in event"):
        function(x, torch.ones(9, 1))
    with pytest.raises(ValueError, match=r"must agree .* torch.float32 .* torch.float64"):
        function(x, x.double())
    with pytest.raises(TypeError, match=f"`{names[1]}` must be a tensor of floating numbers"):
        function(x, torch.ones(9, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=rf"`{names[0]}` must be points \(n, \*event\)"):
        function(torch.ones(9), x)
    with pytest.raises(ValueError, match=f"`{names[0]}` must have at least"):
        function(x[:0], x)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"`{names[1]}` holds numbers that are not finite"):
            function(x, torch.where(x == x[3], bad, x))


def test_options_that_do_not_fit_are_refused(unchecked):
    x = normal(9, 2)
    with pytest.raises(ValueError, match="`kernel` must be 'rbf', 'distance' or a function"):
        mmd(x, x, "linear")
    with pytest.raises(ValueError, match="`bandwidth` is that of the kernel 'rbf' alone"):
        mmd(x, x, "distance", bandwidth=1.0)
    with pytest.raises(ValueError, match="`bandwidth` must be finite and above 0"):
        mmd(x, x, bandwidth=0.0)
    with pytest.raises(ValueError, match="half of the points are copies"):
        mmd(x[:1].expand(9, 2), x[:1].expand(9, 2))
    with pytest.raises(ValueError, match="`statistic` must be 'energy', 'mmd' or a function"):
        permutation_test(x, x, "mean")
    with pytest.raises(ValueError, match="`n_permutations` must be at least 1"):
        permutation_test(x, x, n_permutations=0)
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        knn_precision_recall(x, x, 0)
    with pytest.raises(
        ValueError, match="must be below the number of points; got 9 for 9 of `real`"
    ):
        knn_precision_recall(x, torch.cat([x, x]), 9)
    with pytest.raises(
        ValueError, match="must be below the number of points; got 9 for 9 of `fake`"
    ):
        knn_precision_recall(torch.cat([x, x]), x, 9)
