from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.core.theory import (
    MOBAHI_X,
    MOBAHI_Y,
    GeometricAnchoring,
    LinearAnchoring,
    SelfDistillation,
    Temperature,
    checks,
    combine_anchors,
    iterate,
    kl_divergence,
    rbf_kernel,
    resample,
)
from stillhouse.core.theory.__main__ import main

# --- kernel ridge regression
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.35])
def test_published_table_to_five_digits(alpha: float):
    row = [checks.mobahi_error(step, alpha) for step in (1, 2, 3, 4, 5, 6, None)]
    assert row == pytest.approx(checks.KNOWN_ERRORS[alpha], abs=5.001e-6)


def test_published_y_agrees_with_its_eight_digits():
    printed = [0.38476636, 1.23339677, 1.33232242, 0.69201595, -0.29756146, -0.24189291]
    printed += [-0.79644857, -0.96164802, -0.49672509, -0.34690660, 0.55895127]
    np.testing.assert_allclose(MOBAHI_Y, printed, rtol=0, atol=1e-8)


def test_oracle_alphas():
    assert checks.optimal_alphas(5) == pytest.approx(checks.KNOWN_ALPHAS, abs=5.001e-5)


def _random_model(seed: int, n: int = 7, columns: int | None = None) -> SelfDistillation:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    y = rng.normal(size=n if columns is None else (n, columns))
    return SelfDistillation(rbf_kernel(x, x, 0.7), y, ridge=0.3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-0.5, 1.5), st.sampled_from([None, 3]))
def test_closed_form_recursion_and_iteration_agree(seed: int, alpha: float, columns: int | None):
    model = _random_model(seed, columns=columns)
    rotated = model.eigenvectors.T @ model.targets
    for step, fitted in enumerate(model.iterate(6, alpha), start=1):
        np.testing.assert_allclose(model.fitted(step, alpha), fitted, rtol=0, atol=1e-11)
        shrink = model.shrinkage(step, alpha)
        shrunk = shrink * rotated if columns is None else shrink[:, None] * rotated
        np.testing.assert_allclose(model.eigenvectors @ shrunk, fitted, rtol=0, atol=1e-11)
        # out of sample, asked at the training points, is the fit itself
        np.testing.assert_allclose(model.predict(model.kernel, step, alpha), fitted, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(model.fitted(0, alpha), model.targets)


def test_first_step_does_not_know_alpha():
    model = _random_model(0)
    reference = model.fitted(1, 0.0)
    for alpha in (0.3, 1.0, -2.0):
        np.testing.assert_allclose(model.fitted(1, alpha), reference, rtol=0, atol=1e-13)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_limit_is_amplified_ridge_and_the_end_of_the_iteration(alpha: float):
    model = _random_model(3)
    amplified = SelfDistillation(model.kernel, model.targets, ridge=model.ridge / alpha)
    np.testing.assert_allclose(model.limit(alpha), amplified.fitted(1, 1.0), atol=1e-13)
    np.testing.assert_allclose(model.iterate(400, alpha)[-1], model.limit(alpha), atol=1e-12)
    cross = np.random.default_rng(0).uniform(size=(5, 7))
    np.testing.assert_allclose(
        model.predict(cross, None, alpha), amplified.predict(cross, 1, 1.0), atol=1e-12
    )


def test_without_ground_truth_everything_collapses_to_zero():
    model = _random_model(3)
    assert np.all(model.limit(0.0) == 0)
    assert np.all(model.predict(np.ones((2, 7)), None, 0.0) == 0)
    norms = [np.linalg.norm(fitted) for fitted in model.iterate(40, 0.0)]
    assert all(b < a for a, b in pairwise(norms))


def test_contraction_by_one_minus_alpha_times_the_largest_eigenvalue():
    model, alpha = _random_model(5), 0.4
    rate = (1 - alpha) * model.shrinkage(1, 1.0).max()
    gaps = [np.linalg.norm(fitted - model.limit(alpha)) for fitted in model.iterate(12, alpha)]
    assert all(b <= rate * a * (1 + 1e-9) for a, b in pairwise(gaps))
    direction = model.eigenvectors[:, -1]
    along = SelfDistillation(model.kernel, direction, model.ridge)
    gaps = [np.linalg.norm(fitted - along.limit(alpha)) for fitted in along.iterate(6, alpha)]
    assert gaps[5] / gaps[4] == pytest.approx(rate, rel=1e-6)  # and the bound is attained


def test_optimal_alpha_beats_its_neighbours():
    model = _random_model(8, columns=2)
    rng = np.random.default_rng(1)
    cross, held_out = rng.uniform(size=(9, 7)), rng.normal(size=(9, 2))
    best = model.optimal_alpha(cross, held_out, model.fitted(2, 0.7))

    def error(alpha: float) -> float:
        target = alpha * model.targets + (1 - alpha) * model.fitted(2, 0.7)
        prediction = cross @ np.linalg.solve(model.kernel + 0.3 * np.eye(7), target)
        return float(((prediction - held_out) ** 2).sum())

    assert error(best) < min(error(best + 1e-3), error(best - 1e-3))
    with pytest.raises(ValueError, match="does not depend"):
        model.optimal_alpha(cross, held_out, model.targets)


def test_rbf_kernel_by_hand():
    np.testing.assert_allclose(
        rbf_kernel([0.0, 1.0], [0.0, 2.0], 0.5), np.exp([[0.0, -2.0], [-0.5, -0.5]]), rtol=1e-15
    )
    assert rbf_kernel([[0.0, 3.0]], [[4.0, 0.0]], 0.1)[0, 0] == pytest.approx(math.exp(-2.5))


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: rbf_kernel([0.0], [0.0], 0.0), "gamma"),
        (lambda: rbf_kernel([[0.0, 1.0]], [[0.0]], 1.0), r"\[n, d\]"),
        (lambda: SelfDistillation(np.ones((2, 3)), np.ones(2), 1.0), r"\[n, n\]"),
        (lambda: SelfDistillation(np.eye(2), np.ones(3), 1.0), "targets"),
        (lambda: SelfDistillation(np.eye(2), np.ones(2), 0.0), "ridge"),
        (lambda: SelfDistillation(np.array([[1.0, 0.5], [0.0, 1.0]]), np.ones(2), 1.0), "symmetric"),
        (lambda: SelfDistillation(np.diag([1.0, -1.0]), np.ones(2), 1.0), "semi-definite"),
        (lambda: _random_model(0).limit(1.5), "alpha"),
        (lambda: _random_model(0).fitted(-1, 0.5), "step"),
        (lambda: _random_model(0).iterate(0, 0.5), "step"),
        (lambda: _random_model(0).predict(np.ones((2, 3)), 1, 0.5), "cross"),
    ],
)
def test_ridge_arguments(build, word: str):
    with pytest.raises(ValueError, match=word):
        build()


def test_points_are_the_papers():
    assert np.array_equal(MOBAHI_X, np.arange(11) / 10)


# --- operators
# --------------------------------------------------------------------------------------------------

shares = st.floats(0.02, 0.98)
seeds = st.integers(0, 10**6)


def _pair(seed: int, count: int = 200, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.softmax(spread * torch.randn(2, count, 10, generator=generator, dtype=torch.float64), -1)
    return p, q


@settings(max_examples=40, deadline=None)
@given(seeds, shares, st.floats(0.1, 5.0))
def test_linear_anchoring_contracts_both_directions(seed: int, a: float, spread: float):
    p, q = _pair(seed, spread=spread)
    after = LinearAnchoring(a)(p, q)
    assert torch.all(kl_divergence(q, after) <= (1 - a) * kl_divergence(q, p) + 1e-13)
    assert torch.all(kl_divergence(after, q) <= (1 - a) * kl_divergence(p, q) + 1e-13)


@settings(max_examples=40, deadline=None)
@given(seeds, shares, st.floats(0.1, 5.0))
def test_geometric_anchoring_contracts_the_forward_divergence(seed: int, a: float, spread: float):
    p, q = _pair(seed, spread=spread)
    after = GeometricAnchoring(a)(p, q)
    log_z = (p ** (1 - a) * q**a).sum(-1).log()
    torch.testing.assert_close(
        kl_divergence(q, after), (1 - a) * kl_divergence(q, p) + log_z, rtol=1e-9, atol=1e-12
    )
    assert torch.all(kl_divergence(q, after) <= (1 - a) * kl_divergence(q, p) + 1e-13)
    assert torch.all(kl_divergence(after, q) <= kl_divergence(p, q) + 1e-13)


@pytest.mark.parametrize("a", [0.2, 0.5, 0.8])
def test_geometric_anchoring_fails_the_reverse_bound(a: float):
    p, q = _pair(0, count=2000)
    ratio = kl_divergence(GeometricAnchoring(a)(p, q), q) / kl_divergence(p, q)
    assert ratio.max() > 1 - a + 0.05
    # a pair worked by hand: p = (1/2, 1/2), q = (1 − ε, ε): p′ has odds √((1 − ε)/ε) for a = ½
    eps = 1e-4
    p2, q2 = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([1 - eps, eps], dtype=torch.float64)
    after = GeometricAnchoring(0.5)(p2, q2)
    assert (after[0] / after[1]).item() == pytest.approx(math.sqrt((1 - eps) / eps), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(seeds, shares)
def test_operators_stay_on_the_simplex_fix_the_anchor_and_commute_with_permutations(seed: int, a: float):
    p, q = _pair(seed, count=20)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    for operator in (LinearAnchoring(a), GeometricAnchoring(a)):
        after = operator(p, q)
        assert torch.all(after >= 0)
        torch.testing.assert_close(after.sum(-1), torch.ones(20, dtype=torch.float64))
        torch.testing.assert_close(operator(q, q), q)
        torch.testing.assert_close(operator(p[:, order], q[:, order]), after[:, order])


@pytest.mark.parametrize("a", [0.3, 0.5, 0.7])
def test_asymptotic_rates(a: float):
    p, q = _pair(4, count=5)
    for operator in (LinearAnchoring(a), GeometricAnchoring(a)):
        generations = math.ceil(math.log(1e-5) / math.log(1 - a))
        chain = iterate(operator, p, q, generations)
        assert len(chain) == generations + 1
        for direction in (lambda x: kl_divergence(q, x), lambda x: kl_divergence(x, q)):
            ratio = direction(chain[-1]) / direction(chain[-2])
            assert ratio.tolist() == pytest.approx([(1 - a) ** 2] * 5, rel=0.02)
        torch.testing.assert_close(iterate(operator, p, q, 200)[-1], q)
    closed = (1 - a) ** 10 * p + (1 - (1 - a) ** 10) * q
    torch.testing.assert_close(iterate(LinearAnchoring(a), p, q, 10)[-1], closed)


def test_temperature_has_no_anchor():
    p, q = _pair(1, count=3)
    torch.testing.assert_close(iterate(Temperature(2.0), p, q, 60)[-1], torch.full_like(p, 0.1))
    sharp = iterate(Temperature(0.5), p, q, 12)[-1]
    torch.testing.assert_close(sharp, torch.nn.functional.one_hot(p.argmax(-1), 10).double())
    # two temperatures in a row multiply
    torch.testing.assert_close(Temperature(2.0)(Temperature(3.0)(p, q), q), Temperature(6.0)(p, q))


def test_extreme_shares_are_exact():
    p, q = torch.tensor([0.7, 0.3, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    for kind in (LinearAnchoring, GeometricAnchoring):
        assert torch.equal(kind(0.0)(p, q), p)
        assert torch.equal(kind(1.0)(p, q), q)
    assert GeometricAnchoring(0.5)(p, q).tolist() == [0.0, 1.0, 0.0]


def test_combined_anchors():
    a, b = torch.tensor([0.8, 0.2]), torch.tensor([0.2, 0.8])
    assert combine_anchors([a, b], [3, 1]).tolist() == pytest.approx([0.65, 0.35])
    geometric = combine_anchors([a, b], [3, 1], kind="geometric")
    odds = (0.8 / 0.2) ** 0.75 * (0.2 / 0.8) ** 0.25
    assert (geometric[0] / geometric[1]).item() == pytest.approx(odds)
    assert combine_anchors([a, torch.tensor([1.0, 0.0])], [1, 0], kind="geometric").tolist() == pytest.approx(
        [0.8, 0.2]
    )
    assert combine_anchors([a, b]).tolist() == pytest.approx([0.5, 0.5])


def test_resampling_drifts_without_an_anchor():
    generator = torch.Generator().manual_seed(1)
    q = _pair(2, count=40)[1]
    assert resample(q[0], 50, generator).sum().item() == pytest.approx(1.0)
    ends = {}
    for a in (0.0, 0.5):
        p = q
        for _ in range(50):
            p = LinearAnchoring(a)(resample(p, 200, generator), q)
        ends[a] = kl_divergence(p, q).mean().item()
    single = kl_divergence(resample(q, 200, generator), q).mean().item()
    assert ends[0.0] > 10 * single
    assert ends[0.5] < single


def test_resample_is_unbiased():
    q = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    counts = resample(q.expand(4000, 4), 25, torch.Generator().manual_seed(0))
    assert counts.mean(0).tolist() == pytest.approx(q.tolist(), abs=0.006)
    assert counts.var(0).tolist() == pytest.approx((q * (1 - q) / 25).tolist(), rel=0.15)


def test_kl_at_the_border():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    assert kl_divergence(p, q).item() == pytest.approx(math.log(2))
    assert kl_divergence(q, p).item() == math.inf


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: LinearAnchoring(1.1), "a must"),
        (lambda: GeometricAnchoring(-0.1), "a must"),
        (lambda: Temperature(0.0), "temperature"),
        (lambda: iterate(LinearAnchoring(0.5), torch.ones(2), torch.ones(2) / 2, 1), "start"),
        (lambda: iterate(LinearAnchoring(0.5), torch.ones(2) / 2, torch.tensor([1.5, -0.5]), 1), "anchor"),
        (lambda: iterate(LinearAnchoring(0.5), torch.ones(2) / 2, torch.ones(2) / 2, -1), "generations"),
        (lambda: combine_anchors([]), "weights"),
        (lambda: combine_anchors([torch.ones(1)], [-1.0]), "weights"),
        (lambda: combine_anchors([torch.ones(1)], kind="mean"), "kind"),  # type: ignore[arg-type]
        (lambda: resample(torch.ones(2) / 2, 0), "draws"),
    ],
)
def test_operator_arguments(build, word: str):
    with pytest.raises(ValueError, match=word):
        build()


# --- self-test
# --------------------------------------------------------------------------------------------------


def test_self_test_prints_and_passes(capsys: pytest.CaptureFixture[str]):
    assert main() == 0
    output = capsys.readouterr().out
    assert "FAIL" not in output
    assert "0.149835" in output or "0.149834" in output
    assert output.rstrip().endswith("all as expected")


def test_self_test_fails_when_a_value_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(checks.KNOWN_ERRORS, 0.25, (*checks.KNOWN_ERRORS[0.25][:-1], 0.15251))
    assert main() == 1
    assert "1 failed" in capsys.readouterr().out
