"""Memories as scikit-learn's estimators: its own checks, and what they are by their mathematics."""

import warnings

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

import hamux.sklearn as hsk

ESTIMATORS = [getattr(hsk, name)() for name in hsk.__all__]


@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_checks(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)
