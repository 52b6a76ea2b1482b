"""Empirical orthogonal functions of data that do not fit in memory, and the linear propagator of their amplitudes."""

from collections.abc import Iterable

import numpy as np

from physml.errors import DataError


def streaming_eofs(blocks: Iterable[np.ndarray], modes: int, rank: int) -> np.ndarray:
    """Leading right singular vectors `(modes, cells)` of the rows `(time, cells)` of all blocks, in one pass.

    Sequential Karhunen-Loeve (Levy & Lindenbaum 2000, doi:10.1109/83.855432): a sketch of `rank` weighted directions is
    merged with each block. Exact when cells <= rank; signs are fixed (the largest entry of a pattern is positive).
    Returns fewer modes when the data do not have as many directions. Raises DataError without any variance.
    """
    sketch = None
    for block in blocks:
        for start in range(0, len(block), rank):  # bounds the size of the decomposition, not its accuracy
            rows = np.asarray(block[start : start + rank], np.float64)
            sketch = _compress(rows if sketch is None else np.concatenate([sketch, rows]), rank)
    if sketch is None or not np.any(sketch):
        raise DataError(
            "The anomalies vanish everywhere: there are no patterns to find. Is the field constant in time?"
        )
    _, values, patterns = np.linalg.svd(sketch, full_matrices=False)
    kept = min(modes, int((values > 1e-6 * values[0]).sum()))
    patterns = patterns[:kept]
    largest = np.take_along_axis(patterns, np.abs(patterns).argmax(1)[:, None], 1)
    return patterns * np.sign(largest)


def _compress(rows: np.ndarray, rank: int) -> np.ndarray:
    """At most `rank` rows with the same leading right singular vectors and values."""
    if len(rows) <= min(rank, rows.shape[1]):
        return rows
    # The smaller Gram matrix suffices: an order of magnitude quicker than an SVD of the rows.
    if rows.shape[1] <= len(rows):
        values, vectors = np.linalg.eigh(rows.T @ rows)
        return (np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)[::-1][:rank]
    values, vectors = np.linalg.eigh(rows @ rows.T)
    return (vectors.T @ rows)[::-1][:rank]


def linear_propagator(runs: list[np.ndarray], lags: int, ridge: float) -> np.ndarray:
    """Least-squares map of `[x(t), x(t-1), ...]` to `[x(t+1), x(t), ...]`, as a matrix that multiplies from the right.

    `runs` are series `(time, modes)` without gaps; `ridge` is relative to the mean variance of a predictor.
    Eigenvalues outside the unit circle are moved onto it, so that a long rollout cannot blow up. Raises DataError when
    the pairs are fewer than twice the predictors.
    """
    modes = runs[0].shape[1] if runs else 0
    size, pairs = lags * modes, sum(max(len(run) - lags, 0) for run in runs)
    if pairs < 2 * size:
        raise DataError(
            f"{pairs} pairs of consecutive frames are too few to fit a linear model of {size} predictors "
            f"({modes} modes x {lags} lags). Give at least {2 * size}, or lower `modes` or `lags`."
        )
    square, cross = np.zeros((size, size)), np.zeros((size, modes))
    for run in runs:
        count = len(run) - lags
        if count > 0:
            past = np.concatenate([run[lags - 1 - lag : lags - 1 - lag + count] for lag in range(lags)], axis=1)
            square += past.T @ past
            cross += past.T @ run[lags:]
    regression = np.linalg.solve(square + ridge * np.trace(square) / size * np.eye(size), cross)
    operator = np.zeros((size, size))
    operator[:, :modes] = regression
    operator[: size - modes, modes:] = np.eye(size - modes)
    return _stable(operator)


def _stable(operator: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eig(operator)
    size = np.abs(values)
    if size.max() <= 1:
        return operator
    return ((vectors * (values / np.maximum(size, 1))) @ np.linalg.inv(vectors)).real  # conjugate pairs cancel
