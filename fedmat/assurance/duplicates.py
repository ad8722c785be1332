"""What several sites hold in common, and which of it each leaves out of training: set operations on opaque keys.

Knows: keys, 64-bit numbers that compare equal for equal things (``fedmat.data.matching`` makes them at the sites), and which are
of test rows. Refuses to know: the secret behind the keys, records, and how the lists travel.

Two rules, applied in this order:

1. *Leak.* A training row of any site whose material is that of a test row of any site, its own included, is left out
   everywhere: the consortium's test would measure memory. With ``sources=True`` the same holds for the publication; use it
   where splits are drawn by publication, for elsewhere one paper stands on both sides by design.
2. *Duplicate.* A measurement that several sites train on is kept by one of them, the site with the fewest training rows (it
   needs it most, and every party can check the choice), by name among equals. Left in, it would count as often as it was copied.

Validation rows choose models and count as training rows here. A coordinator that lies can only make a site train on less:
:func:`apply` counts what went, for which reason, and the site may refuse to go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmat.domain import Digests, Offer, Removal
from fedmat.errors import SiteRefused, WireError

MATERIAL, MEASUREMENT, SOURCE = "material", "measurement", "source"
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Found:
    """The coordinator's side of it, for the report.

    Attributes:
        removals: by site, in order of names.
        shared: (site, site) in order of names -> measurements both train on, before anything is left out.
        leaks: (training site, test site) -> materials of the first one's training that the second one tests on.
    """

    removals: dict[str, Removal]
    shared: dict[tuple[str, str], int]
    leaks: dict[tuple[str, str], int]


def offer(site: str, fingerprint: str, keys: Mapping[str, Digests], test: Mask) -> Offer:
    """Returns what a site shows of its rows.

    Args:
        keys: kind -> keys of shape ``n`` (``fedmat.data.matching.keys``); 0 is no key.
        test: which rows are test rows, shape ``n``; the others are for training or validation.
    """
    return Offer(
        site,
        fingerprint,
        int((~test).sum()),
        int(test.sum()),
        {kind: _distinct(keys[kind][~test]) for kind in (MATERIAL, MEASUREMENT, SOURCE)},
        {kind: _distinct(keys[kind][test]) for kind in (MATERIAL, SOURCE)},
    )


def find(offers: Mapping[str, Offer], *, sources: bool = False) -> Found:
    """Returns what each site leaves out, by the two rules of the module; the order of sites changes nothing.

    Args:
        offers: by site.
        sources: whether a training row of a publication that is tested on is a leak, too.

    Raises:
        SiteRefused: sites hold different secrets: nothing would match, which is not the same as no duplicates.
        WireError: an offer is another site's, or its keys are not sorted different 64-bit numbers, no more than its rows.
    """
    names = sorted(offers)
    for name in names:
        check(name, offers[name])
    marks = {offers[name].fingerprint for name in names}
    if len(marks) > 1:
        raise SiteRefused(
            f"sites hold different matching secrets: {', '.join(f'{n} {offers[n].fingerprint[:6]}' for n in names)}",
            fix="give all sites one member's secret: fedmat site secret --take FILE, by a road the operator does not see",
        )
    tested = {kind: _distinct(np.concatenate([_NONE, *(offers[n].test[kind] for n in names)])) for kind in (MATERIAL, SOURCE)}
    taken = _NONE
    repeated: dict[str, Digests] = {}
    for name in sorted(names, key=lambda n: (offers[n].n_train, n)):
        own = offers[name].train[MEASUREMENT]
        repeated[name] = np.intersect1d(own, taken, assume_unique=True)
        taken = np.union1d(taken, own)
    removals = {
        name: Removal(
            name,
            np.intersect1d(offers[name].train[MATERIAL], tested[MATERIAL], assume_unique=True),
            np.intersect1d(offers[name].train[SOURCE], tested[SOURCE], assume_unique=True) if sources else _NONE,
            repeated[name],
        )
        for name in names
    }
    shared = {
        (a, b): len(np.intersect1d(offers[a].train[MEASUREMENT], offers[b].train[MEASUREMENT], assume_unique=True))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    leaks = {
        (a, b): len(np.intersect1d(offers[a].train[MATERIAL], offers[b].test[MATERIAL], assume_unique=True))
        for a in names
        for b in names
    }
    return Found(removals, shared, leaks)


def apply(removal: Removal, keys: Mapping[str, Digests], test: Mask) -> tuple[Mask, dict[str, int]]:
    """Returns which rows a site keeps, shape ``n``, and how many it leaves out for each reason.

    Test rows are always kept. A row with several reasons counts under the first: ``leak_material``, ``leak_source``,
    ``duplicate``.
    """
    keep: Mask = np.ones(len(test), dtype=np.bool_)
    counts: dict[str, int] = {}
    for reason, kind, listed in (
        ("leak_material", MATERIAL, removal.material),
        ("leak_source", SOURCE, removal.source),
        ("duplicate", MEASUREMENT, removal.measurement),
    ):
        goes = keep & ~test & np.isin(keys[kind], listed) & (keys[kind] != 0)
        counts[reason] = int(goes.sum())
        keep &= ~goes
    return keep, counts


_NONE: Digests = np.zeros(0, dtype=np.uint64)


def _distinct(digests: Digests) -> Digests:
    return np.unique(digests[digests != 0])


def check(name: str, given: Offer) -> None:
    """Raises WireError when an offer is not what site ``name`` may send; see :func:`find`."""
    if given.site != name:
        raise WireError(f"site {name} offered the keys of another site")
    sides = ((given.train, (MATERIAL, MEASUREMENT, SOURCE), given.n_train), (given.test, (MATERIAL, SOURCE), given.n_test))
    for side, kinds, rows in sides:
        for kind in kinds:
            digests = side.get(kind)
            if digests is None or digests.ndim != 1 or digests.dtype != np.uint64:
                raise WireError(f"site {name}: its {kind} keys are no list of 64-bit numbers", fix="compare fedmat versions")
            if len(digests) and (digests[0] == 0 or not (digests[1:] > digests[:-1]).all()):
                raise WireError(f"site {name}: its {kind} keys are not sorted and different", fix="compare fedmat versions")
            if len(digests) > rows:
                raise WireError(f"site {name}: more {kind} keys than rows behind them")
