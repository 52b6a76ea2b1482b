"""Scores of ensembles, cell by cell: `ensemble (member, ...)` and `truth (...)`, numpy or jax arrays."""


def crps(ensemble, truth, fair: bool = False):
    """Continuous ranked probability score, in the unit of the field; lower is better, |x - y| for a single member.

    E|X - y| - E|X - X'| / 2, with X and X' drawn from the members. `fair`: X and X' are different members, which makes
    the score unbiased in the number of members (Ferro 2014, doi:10.1002/qj.2270); NaN with a single one. Otherwise the
    score of the empirical distribution (Gneiting & Raftery 2007, doi:10.1198/016214506000001437, eq. 21).
    """
    members = len(ensemble)
    distance = abs(ensemble - truth).mean(0)
    half = member_distance(ensemble) / 2
    return distance - (half if fair else half * ((members - 1) / members) if members > 1 else 0 * distance)


def member_distance(ensemble):
    """Mean of |x_i - x_j| over pairs of different members; NaN with a single one. By sorting, in M log M."""
    xp = ensemble.__array_namespace__()
    members = len(ensemble)
    if members < 2:
        return ensemble[0] * xp.nan
    # k (M - k) pairs lie around the gap above member k. No dot product with the members: accelerators keep few digits
    # of its factors, and temperatures differ in the last ones.
    below = xp.arange(1, members, dtype=ensemble.dtype).reshape(-1, *(1,) * (ensemble.ndim - 1))
    gaps = xp.diff(xp.sort(ensemble, axis=0), axis=0)
    return (below * (members - below) * gaps).sum(0) * (2 / (members * (members - 1)))


def rank_shares(ensemble, truth):
    """Rank of the truth among the M members, 0 .. M, as `(rank, ...)` shares: 1 at its rank.

    Where it equals members, the ranks between which it could stand share alike. NaN where a member is. The mean over
    many cells is the rank histogram: flat for a reliable ensemble, high at both ends for one of too little spread
    (Hamill 2001, doi:10.1175/1520-0493(2001)129<0550:IORHFV>2.0.CO;2).
    """
    xp = ensemble.__array_namespace__()
    below, equal = (ensemble < truth).sum(0), (ensemble == truth).sum(0)
    rank = xp.arange(len(ensemble) + 1).reshape(-1, *(1,) * truth.ndim)
    shares = ((rank >= below) & (rank <= below + equal)) / (equal + 1).astype(truth.dtype)
    return xp.where(xp.isnan(ensemble).any(0) | xp.isnan(truth), xp.nan, shares)


def variance(ensemble):
    """Unbiased variance over members; NaN with a single one. The root of its mean is the spread."""
    members = len(ensemble)
    if members < 2:
        return ensemble[0] * ensemble.__array_namespace__().nan
    return ((ensemble - ensemble.mean(0)) ** 2).sum(0) / (members - 1)
