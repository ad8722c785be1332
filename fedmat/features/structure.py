"""Features of a crystal structure, partial occupancy allowed.

Knows: pymatgen structures. Refuses to know: the formula's own statistics (``composition``) and diffraction.

A record may lack a structure (""); its columns are then NaN and ``structure.present`` is 0. Every average over sites is
weighted by occupancy, so a disordered structure is treated as its mean and no ordering is guessed.

Columns (``<field>.`` prefix):

* ``present``: 1 or 0.
* ``density_g_cm3``, ``volume_per_atom_a3`` (cubic angstrom per atom, occupancies counted), ``atoms_per_cell``.
* ``lattice_ratio_mid``, ``lattice_ratio_long``: middle and longest over shortest lattice vector of the Niggli-reduced
  cell; ``angle_deviation``: mean deviation of its angles from 90 degrees.
* ``space_group`` (number of the averaged structure by spglib, tolerance 0.1 angstrom), ``crystal_system`` (1 triclinic ...
  7 cubic).
* ``packing_fraction``: volume of spheres of the elements' atomic radii over the cell volume.
* ``disordered_fraction``: share of sites that are partly or jointly occupied; ``mean_occupancy``.
* ``li_fraction``, ``li_density_nm3`` (Li per cubic nanometre), ``li_site_occupancy`` (mean Li occupancy of sites that hold
  Li), ``li_li_a`` (mean distance from a Li site to its nearest other Li site, capped at 6 angstrom),
  ``li_anion_a`` and ``li_coordination`` (mean distance from a Li site to its nearest anion site, and occupancy-weighted
  anions within 1.3 times that).
* ``anion_anion_a``: mean nearest-neighbour distance in the anion sublattice, capped at 6 angstrom;
  ``anion_volume_a3``: cell volume per anion.

Columns about Li, or anions, are NaN where there are none.

References:
    Ong2013: S. P. Ong et al., Comput. Mater. Sci. 68, 314 (2013), doi:10.1016/j.commatsci.2012.10.028.
    Togo2024: A. Togo, K. Shinohara, I. Tanaka, "Spglib: a software library for crystal symmetry search",
    Sci. Technol. Adv. Mater. Meth. 4, 2384822 (2024).
    Sendek2017: A. D. Sendek et al., "Holistic computational structure screening of more than 12000 candidates for solid
    lithium-ion conductor materials", Energy Environ. Sci. 10, 306 (2017), doi:10.1039/C6EE02697D (choice of Li descriptors).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedmat.data.contract import RecordType
from fedmat.features.common import Array, check_options, field_of_kind, per_distinct, texts
from fedmat.features.composition import ANIONS
from fedmat.features.table import Featurizer

NAMES = (
    "present", "density_g_cm3", "volume_per_atom_a3", "atoms_per_cell", "lattice_ratio_mid", "lattice_ratio_long",
    "angle_deviation", "space_group", "crystal_system", "packing_fraction", "disordered_fraction", "mean_occupancy",
    "li_fraction", "li_density_nm3", "li_site_occupancy", "li_li_a", "li_anion_a", "li_coordination", "anion_anion_a",
    "anion_volume_a3",
)  # fmt: skip
SYSTEMS = ("triclinic", "monoclinic", "orthorhombic", "tetragonal", "trigonal", "hexagonal", "cubic")
_FAR = 6.0  # angstrom
_SAME = 0.5  # angstrom: closer sites are split positions of one atom


@dataclass(frozen=True)
class StructureFeatures(Featurizer):
    """Descriptors of one structure field.

    Attributes:
        field: the structure field.
    """

    name = "structure"
    version = "1"
    may_miss = True
    citations = (
        "Ong et al., Comput. Mater. Sci. 68, 314 (2013), doi:10.1016/j.commatsci.2012.10.028",
        "Togo et al., Sci. Technol. Adv. Mater. Meth. 4, 2384822 (2024)",
        "Sendek et al., Energy Environ. Sci. 10, 306 (2017), doi:10.1039/C6EE02697D",
    )
    libraries = ("pymatgen-core", "spglib")

    field: str = "structure"

    @classmethod
    def of(cls, options: Mapping[str, Any], rt: RecordType, target: str) -> StructureFeatures:
        """Returns the featurizer for option ``field``.

        Raises:
            ConfigError: an unknown option, or the record type has no structure.
        """
        check_options(cls.name, options, ("field",))
        return cls(field_of_kind(cls.name, options, rt, "structure").name)

    @property
    def names(self) -> tuple[str, ...]:
        """Column names, see the module's description."""
        return tuple(f"{self.field}.{n}" for n in NAMES)

    @property
    def needs(self) -> tuple[str, ...]:
        """The structure field."""
        return (self.field,)

    def transform(self, records: pd.DataFrame) -> Array:
        """Returns features, shape ``n x len(names)``, NaN where a record has no structure.

        Raises:
            FeatureError: a structure is not pymatgen JSON, or has no volume; names field and row.
        """
        cells = [texts(records, self.field, self.name)]
        return per_distinct(records, cells, len(NAMES), _one, f"structure: field '{self.field}'")


def _one(text: str) -> list[float]:
    if not text.strip():
        return [0.0] + [math.nan] * (len(NAMES) - 1)
    from pymatgen.core import Structure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen's warnings quote the cell
        try:
            structure = Structure.from_str(text, fmt="json")
        except Exception:  # noqa: BLE001  pymatgen raises anything, quoting the cell
            raise ValueError("the structure is not pymatgen Structure JSON") from None
        if not len(structure) or not structure.volume > 0:
            raise ValueError("the structure has no atoms or no volume")
        return describe(structure)


def describe(structure: Any) -> list[float]:
    """Returns the values of :data:`NAMES` for a pymatgen ``Structure``, ordered or not."""
    occupancy: list[dict[str, float]] = []
    for site in structure:
        site_amounts: dict[str, float] = {}
        for species, amount in site.species.items():
            symbol = getattr(species, "symbol", str(species))
            site_amounts[symbol] = site_amounts.get(symbol, 0.0) + float(amount)
        occupancy.append(site_amounts)
    totals = np.array([sum(o.values()) for o in occupancy])
    lithium = np.array([o.get("Li", 0.0) for o in occupancy])
    anions = np.array([sum(a for e, a in o.items() if e in ANIONS) for o in occupancy])
    volume = float(structure.volume)
    atoms = float(totals.sum())
    long, angles = _cell(structure)
    number, system = _symmetry(structure)
    mixed = np.array([len(o) > 1 or t < 0.999 for o, t in zip(occupancy, totals, strict=True)])
    n_li, n_anion = float(lithium.sum()), float(anions.sum())
    near = structure.get_neighbor_list(_FAR)  # centres, neighbours, images, distances
    pairs = (near[0], near[1], near[3])
    anion_distance, coordination = _coordination(pairs, lithium, anions)
    return [
        1.0,
        float(structure.density),
        volume / atoms,
        atoms,
        long[1] / long[0],
        long[2] / long[0],
        angles,
        number,
        system,
        _sphere_volume(occupancy) / volume,
        float(mixed.mean()),
        atoms / len(structure),
        n_li / atoms,
        1000.0 * n_li / volume,
        n_li / float((lithium > 0).sum()) if n_li else math.nan,
        _weighted(_nearest(pairs, lithium, lithium), lithium),
        anion_distance,
        coordination,
        _weighted(_nearest(pairs, anions, anions), anions),
        volume / n_anion if n_anion else math.nan,
    ]


Pairs = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _nearest(pairs: Pairs, of: Array, to: Array) -> Array:
    """Distance from every site with ``of > 0`` to the nearest other site with ``to > 0``, at most 6 angstrom."""
    centre, other, distance = pairs
    keep = (of[centre] > 0) & (to[other] > 0) & (distance > _SAME)
    out = np.full(len(of), _FAR)
    np.minimum.at(out, centre[keep], distance[keep])
    return out


def _weighted(values: Array, weight: Array) -> float:
    total = float(weight.sum())
    return float((values * weight).sum() / total) if total else math.nan


def _coordination(pairs: Pairs, lithium: Array, anions: Array) -> tuple[float, float]:
    if not lithium.any() or not anions.any():
        return math.nan, math.nan
    centre, other, distance = pairs
    nearest = _nearest(pairs, lithium, anions)
    keep = (lithium[centre] > 0) & (distance > _SAME) & (distance <= 1.3 * nearest[centre])
    count = np.bincount(centre[keep], weights=anions[other[keep]], minlength=len(lithium))
    return _weighted(nearest, lithium), _weighted(count.astype(np.float64), lithium)


def _cell(structure: Any) -> tuple[list[float], float]:
    """Sorted vector lengths of the reduced cell and the mean deviation of its angles from 90 degrees."""
    try:
        lattice = structure.lattice.get_niggli_reduced_lattice()
    except ValueError:  # no convergence for near-degenerate cells: the given cell then
        lattice = structure.lattice
    return sorted(map(float, lattice.abc)), float(np.mean([abs(a - 90.0) for a in lattice.angles]))


def _symmetry(structure: Any) -> tuple[float, float]:
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spglib announces its next error handling at every call
        try:
            analyzer = SpacegroupAnalyzer(structure, symprec=0.1)
            return float(analyzer.get_space_group_number()), 1.0 + SYSTEMS.index(analyzer.get_crystal_system())
        except Exception:  # noqa: BLE001  spglib finds no symmetry (overlapping split sites): not known, and said so
            return math.nan, math.nan


def _sphere_volume(occupancy: list[dict[str, float]]) -> float:
    """Volume of spheres of atomic radius, cubic angstrom; NaN when an element has no tabulated radius."""
    from pymatgen.core import Element

    total = 0.0
    for site in occupancy:
        for symbol, amount in site.items():
            radius = Element(symbol).atomic_radius
            total += amount * 4.0 / 3.0 * math.pi * float(radius) ** 3 if radius is not None else math.nan
    return total
