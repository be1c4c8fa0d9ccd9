"""Memories as scikit-learn's estimators: its own checks, and what they are by their mathematics."""

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.cluster import MeanShift
from sklearn.datasets import load_iris, make_blobs
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.pairwise import nan_euclidean_distances
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

import hamux as hmx
import hamux.sklearn as hsk
from hamux.memories.estimators import averages, residual_covariance, row_numbers

ESTIMATORS = [getattr(hsk, name)() for name in hsk.__all__]
rng = np.random.default_rng(0)
ROWS = rng.standard_normal((60, 4)) @ rng.standard_normal((4, 4)) * [1, 10, 0.1, 3] + 5
ASKED = ROWS[:9] + 0.3 * ROWS.std(0) * rng.standard_normal((9, 4))
HOLES = rng.random(ASKED.shape) < 0.4
HOLES[np.arange(9), np.arange(9) % 4] = False
PARTIAL = np.where(HOLES, np.nan, ASKED)
BETA = 2.0


@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_checks(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def shares(asked, rows, beta=BETA, weights=1.0):
    "softmax(log w − β r²/2) in columns of standard deviation 1."
    width = rows.std(0)
    r2 = nan_euclidean_distances(asked / width, rows / width, squared=True)
    p = weights * np.exp(-0.5 * beta * (r2 - r2.min(1, keepdims=True)))
    return p / p.sum(1, keepdims=True)


# --- imputation -----------------------------------------------------------------------------------


def test_imputation_is_kernel_regression():
    answers = hsk.MemoryImputer(beta=BETA, linear=False).fit(ROWS).transform(PARTIAL)
    np.testing.assert_allclose(answers[HOLES], (shares(PARTIAL, ROWS) @ ROWS)[HOLES], rtol=1e-5)
    np.testing.assert_array_equal(answers[~HOLES], ASKED[~HOLES])
    recalled = hmx.recall(ROWS, PARTIAL, beta=BETA, scale="std", max_steps=0).patterns
    np.testing.assert_allclose(answers, recalled, rtol=1e-4)


def test_hot_imputation_with_what_is_missed_is_linear_regression():
    "The weights are all the same: what is left is the conditional mean of a Gaussian"
    answers = hsk.MemoryImputer(beta=1e-9, linear=True).fit(ROWS).transform(PARTIAL)
    width, mean = ROWS.std(0), ROWS.mean(0)
    C, z = np.corrcoef(ROWS.T), (PARTIAL - mean) / width
    for row, answer, hidden in zip(z, answers, HOLES):
        known = ~hidden
        A = C[np.ix_(known, known)] + (0.03 * 1.003 + 0.003) * np.eye(known.sum())
        want = C[np.ix_(hidden, known)] @ np.linalg.solve(A, row[known])
        np.testing.assert_allclose(((answer - mean) / width)[hidden], want, atol=1e-4)


def test_a_row_does_not_answer_itself():
    table = np.where(rng.random(ROWS.shape) < 0.3, np.nan, ROWS)
    table[0, 0] = np.nan
    imputer = hsk.MemoryImputer(beta=1e5, linear=False) # its own weight would leave none
    whole = imputer.fit_transform(table)
    others = clone(imputer).set_params(scale=np.nanstd(table, 0))
    for i in range(12):
        answer = others.fit(np.delete(table, i, 0)).transform(table[[i]])
        np.testing.assert_allclose(whole[[i]], answer, rtol=1e-4)
    twice = clone(imputer).fit(np.repeat(table, 2, 0)) # nor does its copy
    np.testing.assert_allclose(twice.transform(table), whole, rtol=1e-6)


def test_units_do_not_matter():
    units = np.array([1e3, 1e-3, 7.0, 1e6])
    for estimator in (hsk.MemoryImputer(), hsk.MemoryImputer(steps=100)):
        answers = [clone(estimator).fit(ROWS * u).transform(PARTIAL * u) / u for u in (1, units)]
        np.testing.assert_allclose(*answers, rtol=1e-3)


def test_a_lot_of_rows_are_a_sample():
    imputer = hsk.MemoryImputer(max_samples=20).fit(ROWS)
    assert len(imputer.memory_) == 20 and not np.isnan(imputer.transform(PARTIAL)).any()
    assert len(hsk.MemoryImputer(max_samples=None).fit(ROWS).memory_) == 60


def test_covariances_are_of_pairs_and_positive():
    R = rng.standard_normal((40, 3))
    np.testing.assert_allclose(residual_covariance(R, np.ones(40)), R.T @ R / 40, rtol=1e-9)
    R[rng.random(R.shape) < 0.8] = np.nan
    assert np.linalg.eigvalsh(residual_covariance(R, np.ones(40))).min() > 0


# --- labels and targets ---------------------------------------------------------------------------


def test_probabilities_are_sums_of_weights():
    y, w = np.array(list("abc"))[np.arange(60) % 3], rng.integers(1, 4, 60)
    model = hsk.MemoryClassifier(beta=BETA, scale=ROWS.std(0)).fit(ROWS, y, w)
    p = shares(PARTIAL, ROWS, weights=w)
    want = np.stack([p[:, y == label].sum(1) for label in "abc"], 1)
    np.testing.assert_allclose(model.predict_proba(PARTIAL), want, rtol=1e-4, atol=1e-7)
    plain = hsk.MemoryClassifier(beta=BETA).fit(ROWS, y)
    with pytest.warns(UserWarning, match="nothing unknown"):
        recalled = hmx.recall(ROWS, ASKED, y, beta=BETA, scale="std", max_steps=0)
    got = plain.predict_proba(ASKED)
    np.testing.assert_allclose(got, recalled.label_weights, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(plain.predict_proba(np.full((1, 4), np.nan)), 1 / 3)


def test_targets_are_averages():
    y = rng.standard_normal((60, 2))
    model = hsk.MemoryRegressor(beta=BETA, linear=False).fit(ROWS, y)
    np.testing.assert_allclose(model.predict(PARTIAL), shares(PARTIAL, ROWS) @ y, rtol=1e-4)
    one = hsk.MemoryRegressor(beta=BETA, linear=False).fit(ROWS, y[:, 0])
    np.testing.assert_allclose(one.predict(PARTIAL), model.predict(PARTIAL)[:, 0])


def test_hot_targets_with_what_is_missed_are_ridge_regression():
    y = ROWS @ [1.0, -0.2, 3.0, 0.5] + 2
    model = hsk.MemoryRegressor(beta=1e-9, linear=True).fit(ROWS, y)
    z = (ROWS - ROWS.mean(0)) / ROWS.std(0)
    ridge = (0.03 * 1.003 + 0.003) * np.eye(4)
    slope = np.linalg.solve(z.T @ z / 60 + ridge, z.T @ (y - y.mean()) / 60)
    asked = (ASKED - ROWS.mean(0)) / ROWS.std(0)
    np.testing.assert_allclose(model.predict(ASKED), y.mean() + asked @ slope, rtol=1e-4)


def test_the_temperature_is_the_best_of_those_left_out():
    "Of a hundred temperatures none has less error when each row is left out"
    y = np.sin(ROWS[:, 0]) + 0.1 * rng.standard_normal(60)
    width, inner = ROWS.std(0), hsk.MemoryRegressor(linear=False).fit(ROWS, y).memory_.beta
    r2 = nan_euclidean_distances(ROWS / width, squared=True)
    np.fill_diagonal(r2, np.inf)
    def error(beta):
        p = np.exp(-0.5 * beta * (r2 - r2.min(1, keepdims=True)))
        return np.mean((p @ y / p.sum(1) - y) ** 2)

    assert error(inner) <= min(map(error, np.geomspace(0.01, 100, 100))) * 1.001


# --- the two ways to compute ----------------------------------------------------------------------


@pytest.mark.parametrize("holes", [False, True])
def test_numpy_and_the_stream_agree(holes):
    hidden = (rng.random(ROWS.shape) < 0.3) & holes & (np.arange(4) != np.arange(60)[:, None] % 4)
    rows = np.where(hidden, np.nan, ROWS)
    y, w = rng.standard_normal(60), rng.uniform(0.5, 2, 60)
    memory = hmx.Memory(rows, y, scale="std", beta=BETA, weights=w)
    x, own = memory.frame.inside(PARTIAL), np.array([3, -1, 5, 0, -1, -1, 7, 8, 1])
    x[1] = np.nan
    here, there = (averages(memory, x, own=own, most=most) for most in (10**9, 0))
    for a, b in zip(here, there): np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


# --- outliers -------------------------------------------------------------------------------------


def test_false_alarms_keep_their_level():
    "Means over 40 tables of 99 rows and 200 new ones, within three standard errors"
    levels, alarms = (0.02, 0.1, 0.3), []
    for seed in range(40):
        data = np.random.default_rng(seed).standard_t(3, (299, 3))
        p = hsk.MemoryDetector().fit(data[:99]).p_values(data[99:])
        alarms.append([(p <= level).mean() for level in levels])
    mean, error = np.mean(alarms, 0), np.std(alarms, 0) / np.sqrt(len(alarms))
    assert (mean <= levels + 3 * error).all() and (mean >= np.array(levels) / 2).all()


def test_p_values_are_those_of_the_memory():
    detector = hsk.MemoryDetector(beta=BETA, alpha=0.2).fit(ROWS)
    memory = hmx.Memory(ROWS, beta=BETA, scale="std")
    far = np.concatenate([ASKED, ASKED + 100])
    want = memory.recall(far, noisy=True, max_steps=0).p_value
    np.testing.assert_allclose(detector.p_values(far), want)
    np.testing.assert_array_equal(detector.predict(far), np.where(want <= 0.2, -1, 1))
    order = np.lexsort([-memory.energy(far), want])
    assert (np.diff(detector.score_samples(far)[order]) > 0).all()
    np.testing.assert_allclose(
        detector.decision_function(far), detector.score_samples(far) - detector.offset_
    )


def test_rows_that_are_remembered_are_judged_by_the_others():
    table = np.concatenate([ROWS, [ROWS.mean(0) + 50 * ROWS.std(0)]])
    detector = hsk.MemoryDetector().fit(table)
    labels = detector.predict(table)
    assert labels[-1] == -1 and (labels == -1).sum() <= 0.05 * 62
    np.testing.assert_array_equal(hsk.MemoryDetector().fit_predict(table), labels)


# --- clusters -------------------------------------------------------------------------------------

BLOBS, BLOB = make_blobs(150, centers=[[0, 0], [4, 0], [0, 5]], cluster_std=0.5, random_state=0)


def gaussian_mean_shift(X, beta):
    "Mean shift in five lines."
    x = X
    for _ in range(100):
        p = np.exp(-0.5 * beta * ((x[:, None] - X) ** 2).sum(-1))
        x = p @ X / p.sum(1, keepdims=True)
    return x


@pytest.mark.slow
def test_clusters_are_the_ends_of_mean_shift():
    model = hsk.MemoryClusterer(beta=1.0, scale=None).fit(BLOBS)
    ends = gaussian_mean_shift(BLOBS, 1.0)
    np.testing.assert_allclose(model.cluster_centers_[model.labels_], ends, atol=1e-4)
    np.testing.assert_array_equal(model.predict(BLOBS), model.labels_)
    recalled = hmx.Memory(BLOBS, beta=1.0).recall(BLOBS[:8], noisy=True).patterns
    np.testing.assert_allclose(recalled, ends[:8], atol=1e-3)
    assert (np.diff(np.bincount(model.labels_)) <= 0).all() # the largest first


def test_the_temperature_says_how_many():
    count = [hsk.MemoryClusterer(beta=b).fit(BLOBS).labels_.max() + 1 for b in (1e-2, 10, 1e6)]
    assert count == [1, 3, 150]


def test_the_flat_kernel_of_scikit_learn():
    """Its bandwidth is the radius of a ball in which all weigh the same, ours a standard deviation.
    Where each ball at a mode holds one blob whole, both find the blobs; then its mode is the blob's
    mean, and ours the weighted mean, within the blob's own spread of it"""
    ours = hsk.MemoryClusterer(noise=1.6, scale=None).fit(BLOBS)
    theirs = MeanShift(bandwidth=1.6).fit(BLOBS)
    assert adjusted_rand_score(ours.labels_, theirs.labels_) == 1
    for label in range(3):
        mine = BLOBS[ours.labels_ == label]
        flat = theirs.cluster_centers_[theirs.labels_[ours.labels_ == label][0]]
        inside = mine[((mine - flat) ** 2).sum(1) <= 1.6**2]
        np.testing.assert_allclose(flat, inside.mean(0), atol=1e-2)
        assert np.abs(ours.cluster_centers_[label] - flat).max() < 0.5


# --- where people already are ---------------------------------------------------------------------


def test_frames_pipelines_searches_pickles():
    X, y = load_iris(return_X_y=True, as_frame=True)
    X = X.mask(rng.random(X.shape) < 0.2)
    filled = hsk.MemoryImputer().set_output(transform="pandas").fit_transform(X)
    assert list(filled.columns) == list(X.columns) and (filled.index == X.index).all()
    assert not filled.isna().any().any()
    pipeline = make_pipeline(hsk.MemoryImputer(), hsk.MemoryClassifier())
    search = GridSearchCV(pipeline, {"memoryclassifier__beta": [0.1, 10.0, None]}, cv=3)
    assert search.fit(X, y).best_score_ > 0.85
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.predict(X), search.predict(X))


def test_nullable_integers_of_pandas():
    frame = pd.DataFrame({"a": [1, None, 3, 4], "b": [2, 4, 6, None]}, dtype="Int64")
    assert not np.isnan(hsk.MemoryImputer().fit_transform(frame)).any()


def test_the_same_rows_have_the_same_number():
    a, b = np.array([[1, np.nan], [0.0, 2]]), np.array([[-0.0, 2], [1, -np.nan], [3, 3]])
    one, other = row_numbers(a, b)
    assert (one[0], one[1]) == (other[1], other[0]) and other[2] not in one


@pytest.mark.parametrize(
    "estimator, message",
    [
        (hsk.MemoryImputer(beta=1.0, noise=1.0), "beta or noise"),
        (hsk.MemoryImputer(beta=-1.0), "beta must be a positive finite number, got -1.0"),
        (hsk.MemoryImputer(noise=0), "noise must be a positive finite number, got 0"),
        (hsk.MemoryImputer(linear="yes"), "linear must be True, False or 'auto', got 'yes'"),
        (hsk.MemoryImputer(max_samples=0), "max_samples must be a positive int or None, got 0"),
        (hsk.MemoryImputer(scale="max"), "scale must be"),
        (hsk.MemoryDetector(alpha=0), "alpha must be a number between 0 and 1, got 0"),
        (hsk.MemoryClusterer(max_steps=0), "max_steps must be a positive int, got 0"),
    ],
)
def test_settings_that_cannot_be_meant(estimator, message):
    with pytest.raises(ValueError, match=message): estimator.fit(ROWS)


def test_tables_that_cannot_be_meant():
    table = ROWS.copy()
    table[:, 1] = np.nan
    with pytest.raises(ValueError, match="only NaN in 1 of 4 columns"):
        hsk.MemoryImputer().fit(table)
    with pytest.raises(ValueError, match="weight above zero"):
        hsk.MemoryImputer().fit(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="must be 60 finite numbers that are not negative"):
        hsk.MemoryClassifier().fit(ROWS, np.arange(60) % 2, sample_weight=-np.ones(60))


@pytest.mark.slow
def test_without_scikit_learn():
    code = "import sys; sys.modules['sklearn'] = None; import hamux; import hamux.sklearn"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1] == (
        "ImportError: The estimators need scikit-learn: pip install 'hamux[sklearn]'."
    )
