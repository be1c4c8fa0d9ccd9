#!/usr/bin/env python3
"""The estimators of `hamux.sklearn` beside those of scikit-learn, all with their default settings.

Missing values are compared on wine, breast cancer, diabetes, digits, iris, and a table of mixed
units that is generated here: 600 people with age, income, sex, height, weight, blood pressure,
visits and a region in three columns, which depend on each other, not all linearly. Entries are
hidden at random, or as a run of neighbouring columns in each row. Either 80 % of the rows are known
whole and the other rows are filled in, or the incomplete table is filled in by itself. Every
contestant gets columns of mean 0 and standard deviation 1. The error is the root mean square over
hidden entries, over three seeds. `IterativeImputer` gets one seed on breast cancer (30 columns) and
is left out on digits (64), where it takes many minutes. `--quick` takes a minute, and is only to
see that all runs.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from bisect import bisect

import numpy as np
from sklearn import datasets
from sklearn.cluster import KMeans, MeanShift
from sklearn.ensemble import IsolationForest
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from sklearn.model_selection import cross_validate
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor, LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import hamux as hmx
from hamux.sklearn import (
    MemoryClassifier,
    MemoryClusterer,
    MemoryDetector,
    MemoryImputer,
    MemoryRegressor,
)


def mixed_units(n=600, seed=0):
    "People: columns of different units and kinds that depend on each other."
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, 3))
    age = 45 + 15 * z[:, 0]
    sex = rng.integers(0, 2, n)
    region = rng.integers(0, 3, n)
    income = np.exp(10 + 0.5 * z[:, 1] + 0.02 * (age - 45)) * (1 + 0.5 * region)
    height = 165 + 12 * sex + 6 * z[:, 2]
    mass_index = np.exp(np.log(24) + 0.1 * z[:, 0] + 0.1 * rng.standard_normal(n))
    weight = height**2 / 1e4 * mass_index
    pressure = 110 + 0.5 * (age - 45) + 0.3 * (weight - 70) + 8 * rng.standard_normal(n)
    visits = rng.poisson(np.exp(0.3 + 0.02 * (age - 45)))
    return np.column_stack(
        [age, income, sex, height, weight, pressure, visits, *(np.eye(3)[region].T)]
    )


TABLES = {
    "wine": lambda: datasets.load_wine().data,
    "diabetes": lambda: datasets.load_diabetes().data,
    "iris": lambda: datasets.load_iris().data,
    "mixed": mixed_units,
    "cancer": lambda: datasets.load_breast_cancer().data,
    "digits": lambda: datasets.load_digits().data,
}


def hidden_entries(shape, share, kind, rng):
    "Which entries to hide; each row keeps one."
    n, d = shape
    if kind == "random":
        mask = rng.random(shape) < share
    else:
        place = (np.arange(d) - rng.integers(0, d, n)[:, None]) % d
        mask = place < max(1, round(share * d))
    mask[np.arange(n), rng.integers(0, d, n)] &= kind != "random"
    return mask


def holes(table, share, kind, whole, seed):
    "Rows to remember, rows to fill in, the truth of those, and what is hidden."
    rng = np.random.default_rng(seed)
    table = table[rng.permutation(len(table)), :]
    cut = int(0.8 * len(table))
    known, asked = (table[:cut], table[cut:]) if whole else (table, table)
    width = known.std(0)
    known, asked, table = known[:, width > 0], asked[:, width > 0], None
    centre, width = known.mean(0), width[width > 0]
    known, asked = (known - centre) / width, (asked - centre) / width
    mask = hidden_entries(asked.shape, share, kind, rng)
    partial = np.where(mask, np.nan, asked)
    return known if whole else partial, partial, asked, mask


class Trained:
    "A plain memory whose column scales and temperature are trained for completion; one step."
    def fit(self, rows):
        plain = hmx.Memory(rows, scale="std", beta="completion")
        self.memory, _ = hmx.fit_memory(plain, steps=300, hide=0.4)
        return self

    def transform(self, rows): return self.memory.recall(rows, max_steps=0).patterns


IMPUTERS = {
    "memory": lambda d: MemoryImputer(),
    "trained": lambda d: Trained(),
    "k-NN": lambda d: KNNImputer(),
    "iterative": lambda d: IterativeImputer(random_state=0),
    "mean": lambda d: SimpleImputer(),
}


MANY = 16, 50 # columns above which `IterativeImputer` gets one seed, or is left out


def imputation(quick):
    seeds = 1 if quick else 3
    print(f"\nMissing values: root mean square error over hidden entries, {seeds} seed(s)")
    print(f"{'':34s}" + "".join(f"{n:>10s}" for n in IMPUTERS) + f"{'/ k-NN':>9s}   seconds")
    ratios = {n: [] for n in IMPUTERS}
    for name, load in TABLES.items():
        table = load()
        if quick: table = table[np.random.default_rng(0).permutation(len(table))[:150]]
        for whole in (True, False):
            for kind in ("random", "block"):
                for share in (0.1, 0.3, 0.5):
                    rows = [holes(table, share, kind, whole, seed) for seed in range(seeds)]
                    line, took = {}, {}
                    for n, make in IMPUTERS.items():
                        few = rows
                        if n == "iterative": # a regression for each column, again and again
                            few = rows[: (3, 0 if quick else 1, 0)[bisect(MANY, len(table[0]))]]
                        start, errors = time.perf_counter(), []
                        for known, partial, truth, mask in few:
                            guess = make(truth.shape[1]).fit(known).transform(partial)
                            errors.append(np.mean((guess - truth)[mask] ** 2))
                        took[n] = (time.perf_counter() - start) / max(len(few), 1)
                        line[n] = np.sqrt(np.mean(errors)) if few else np.nan
                    for n in line: ratios[n].append(line[n] / line["k-NN"])
                    where = "80 % whole" if whole else "itself"
                    print(
                        f"{name:9s}{where:12s}{kind:7s}{share:5.0%} "
                        + "".join(f"{v:10.3f}" for v in line.values())
                        + f"{line['memory'] / line['k-NN']:9.2f}   "
                        + " ".join(f"{v:.2f}" for v in took.values()),
                        flush=True,
                    )
    for n in ("memory", "trained", "iterative"):
        r = np.array(ratios[n])[np.isfinite(ratios[n])]
        print(f"{n} over k-NN: median {np.median(r):.3f}, largest {r.max():.3f}, of {len(r)} cases")
    both = np.isfinite(ratios["iterative"])
    better = np.array(ratios["memory"])[both] < np.array(ratios["iterative"])[both]
    print(f"memory has less error than iterative in {better.sum()} of {len(better)} cases")


def correlated(n, d=16, seed=0):
    "Rows near a curved sheet of four dimensions, with noise; 10 % unknown."
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, 4))
    truth = np.tanh(z @ rng.standard_normal((4, d))) + 0.2 * rng.standard_normal((n, d))
    truth = ((truth - truth.mean(0)) / truth.std(0)).astype(np.float32)
    mask = hidden_entries(truth.shape, 0.1, "random", rng)
    return truth, mask, np.where(mask, np.nan, truth)


def peak():
    "The largest resident set of this process so far, in MB (Linux)."
    with open("/proc/self/status") as file:
        return int(next(v for v in file if v.startswith("VmHWM")).split()[1]) / 1e3


def one_large(name, n):
    "In a process of its own: seconds, and MB above what was there with the data."
    truth, mask, partial = correlated(n)
    if name == "memory": MemoryImputer().fit(partial[:50]).transform(partial[:50])
    imputer = IMPUTERS[name](16)
    before, start = peak(), time.perf_counter()
    guess = imputer.fit_transform(partial)
    took = time.perf_counter() - start
    error = float(np.sqrt(np.mean((guess - truth)[mask] ** 2)))
    print(json.dumps(dict(seconds=took, mb=peak() - before, error=error)))


def large(quick):
    sizes = {"memory": [2_000, 5_000], "k-NN": [2_000, 5_000]}
    if not quick: sizes = {"memory": [20_000, 100_000], "k-NN": [20_000]}
    print("\nMany rows, 16 columns, 10 % unknown at random, filled in by themselves, float32")
    print("MB is what the process takes at most beyond the data and what is imported")
    seen = {}
    for name, counts in sizes.items():
        for n in counts:
            command = [sys.executable, __file__, "--large", name, str(n)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            out = json.loads(run.stdout.splitlines()[-1])
            seen[name, n] = out
            print(f"{name:9s}{n:8d} rows {out['seconds']:9.1f} s {out['mb']:9.0f} MB"
                  f"   error {out['error']:.3f}", flush=True)
    small, big = sizes["k-NN"][-1], sizes["memory"][-1]
    if small == big: return
    factor = (big / small) ** 2
    scaled = seen["k-NN", small]["seconds"] * factor
    ours = seen["memory", big]
    print(f"k-NN was not run at {big} rows. Its work grows with the square of the rows, so that its"
          f" time there\nwould be {factor:.0f} × that of {small}, {scaled:.0f} s:"
          f" {scaled / ours['seconds']:.1f} × ours. Its memory stays near what it takes at {small},"
          f"\nsince it works in blocks of one gigabyte: ours is"
          f" {ours['mb'] / seen['k-NN', small]['mb']:.2f} × that.")


def labelled(quick):
    "Tables with labels, shuffled."
    loads = {"wine": datasets.load_wine, "cancer": datasets.load_breast_cancer,
             "digits": datasets.load_digits, "iris": datasets.load_iris}
    for name, load in loads.items():
        X, y = load(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(X))[: 300 if quick else None]
        yield name, X[order], y[order]


def classification(quick):
    print("\nLabels: accuracy and log loss, five folds")
    makes = {"memory": MemoryClassifier,
             "k-NN": lambda: make_pipeline(StandardScaler(), KNeighborsClassifier()),
             "logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))}
    for name, X, y in labelled(quick):
        line = [f"{name:9s}"]
        for n, make in makes.items():
            scoring = {"accuracy": "accuracy", "loss": "neg_log_loss"}
            got = cross_validate(make(), X, y, cv=5, scoring=scoring, error_score="raise")
            line.append(f"{n} {got['test_accuracy'].mean():.3f} {-got['test_loss'].mean():.3f}"
                        f" ({got['fit_time'].mean() + got['score_time'].mean():.2f} s)")
        print("   ".join(line), flush=True)
    print("\nTargets: R² of five folds")
    people = mixed_units()
    tables = {"diabetes": datasets.load_diabetes(return_X_y=True),
              "mixed, pressure": (np.delete(people, 5, 1), people[:, 5]),
              "friedman": datasets.make_friedman1(400, noise=1, random_state=0)}
    makes = {"memory": MemoryRegressor, "memory, linear=False": lambda: MemoryRegressor(linear=False),
             "k-NN": lambda: make_pipeline(StandardScaler(), KNeighborsRegressor()),
             "ridge": lambda: make_pipeline(StandardScaler(), RidgeCV())}
    for name, (X, y) in tables.items():
        scores = {n: cross_validate(make(), X, y, cv=5)["test_score"].mean() for n, make in makes.items()}
        print(f"{name:16s}" + "   ".join(f"{n} {v:.3f}" for n, v in scores.items()), flush=True)


def detection(quick):
    print("\nOutliers: digits, one class left out, half of the others to fit; means over classes")
    X, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = X[order], y[order]
    makes = {"memory": MemoryDetector,
             "LOF": lambda: make_pipeline(StandardScaler(), LocalOutlierFactor(novelty=True)),
             "forest": lambda: IsolationForest(random_state=0)}
    scores, alarms = {n: [] for n in makes}, []
    for label in range(3 if quick else 10):
        normal = X[y != label]
        fit, new = normal[: len(normal) // 2], normal[len(normal) // 2 :]
        truth = np.r_[np.zeros(len(new)), np.ones((y == label).sum())]
        for n, make in makes.items():
            detector = make().fit(fit)
            both = np.concatenate([new, X[y == label]])
            scores[n].append(roc_auc_score(truth, -detector.score_samples(both)))
            if n == "memory": alarms.append((detector.predict(new) < 0).mean())
    print("AUROC  " + "   ".join(f"{n} {np.mean(v):.3f} (least {min(v):.3f})" for n, v in scores.items()))
    print(f"false alarms of memory at alpha 0.05: {np.mean(alarms):.3f}")


def clustering(quick):
    print("\nClusters: adjusted Rand index against the labels, and how many clusters")
    for name, X, y in labelled(quick):
        X = StandardScaler().fit_transform(X)[:600]
        k = len(np.unique(y))
        makes = {"memory": MemoryClusterer(), "memory, likelihood": MemoryClusterer(beta="likelihood"),
                 "k-means (told how many)": KMeans(k, n_init=10, random_state=0),
                 "mean shift": MeanShift()}
        line = [f"{name:9s}"]
        for n, make in makes.items():
            start = time.perf_counter()
            labels = make.fit(X).labels_
            line.append(f"{n} {adjusted_rand_score(y[:600], labels):.2f} {labels.max() + 1}"
                        f" ({time.perf_counter() - start:.1f} s)")
        print("   ".join(line), flush=True)


PARTS = dict(imputation=imputation, large=large, classification=classification,
             detection=detection, clustering=clustering)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rows, one seed")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--large", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    if a.large: return one_large(a.large[0], int(a.large[1]))
    for part in a.only: PARTS[part](a.quick)


if __name__ == "__main__": main()
