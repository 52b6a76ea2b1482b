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
    rank = 2 * xp.arange(members, dtype=ensemble.dtype) - (members - 1)
    return xp.tensordot(rank, xp.sort(ensemble, axis=0), 1) * (2 / (members * (members - 1)))


def variance(ensemble):
    """Unbiased variance over members; NaN with a single one. The root of its mean is the spread."""
    members = len(ensemble)
    if members < 2:
        return ensemble[0] * ensemble.__array_namespace__().nan
    return ((ensemble - ensemble.mean(0)) ** 2).sum(0) / (members - 1)
