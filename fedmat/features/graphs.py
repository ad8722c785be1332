"""Graphs of crystals and molecules: what a graph network reads instead of one row of numbers per record.

Knows: pymatgen structures, SMILES through RDKit, and one public table of elements. Refuses to know: networks, targets,
and every column that one row of numbers can hold (formula statistics, temperature): those stay in the feature table.

A crystal's node is a site with its equals. Its numbers are the occupancy-weighted mean of its elements' rows in :data:`ELEMENTS`, the
vacant fraction, and the shape of its surroundings (:data:`SHAPE`). Its edges come from the nearest neighbours, counted by
occupancy, **whole shells at a time**: a shell is never cut, so the graph does not depend on the order of the atoms or on
which cell of the crystal is written down. Sites closer than 0.5 angstrom are split positions of one atom and do not see
each other. Sites that no sum over neighbours can ever tell apart (symmetry-equivalent ones, above all) become **one node**,
and equal neighbours one edge with a weight: a network of such sums gives the same output on this quotient graph as on the
cell, however large the cell is, at a fraction of the work (a cubic perovskite has 3 nodes and 6 edges for 68 neighbours).

A molecule's node is a heavy atom, its edges are bonds, both ways. ``*`` (the ends of a repeat unit) is a node without an
element.

:data:`ELEMENTS` columns: symbol, group, period, Pauling electronegativity, covalent, atomic and mean ionic radius
(angstrom), first ionisation energy and electron affinity (eV), molar volume (cubic cm per mol), valence electrons in s, p,
d, f. "-" is not known and enters as 0, the mean over the table.

References:
    Xie2018: T. Xie, J. C. Grossman, "Crystal Graph Convolutional Neural Networks for an Accurate and Interpretable
    Prediction of Material Properties", Phys. Rev. Lett. 120, 145301 (2018), doi:10.1103/PhysRevLett.120.145301.
    Steinhardt1983: P. J. Steinhardt, D. R. Nelson, M. Ronchetti, "Bond-orientational order in liquids and glasses",
    Phys. Rev. B 28, 784 (1983), doi:10.1103/PhysRevB.28.784.
    Xu2019: K. Xu, W. Hu, J. Leskovec, S. Jegelka, "How Powerful are Graph Neural Networks?", ICLR 2019.
    Cordero2008: B. Cordero et al., "Covalent radii revisited", Dalton Trans. 2832 (2008), doi:10.1039/b801115j.
    Shannon1976: R. D. Shannon, Acta Cryst. A32, 751 (1976), doi:10.1107/S0567739476001551 (ionic radii).
    Ong2013: S. P. Ong et al., Comput. Mater. Sci. 68, 314 (2013), doi:10.1016/j.commatsci.2012.10.028 (values of the table).
    Ward2018: L. Ward et al., Comput. Mater. Sci. 152, 60 (2018), doi:10.1016/j.commatsci.2018.05.018 (covalent radii and
    valence electrons as matminer's Magpie table gives them).
    RDKit: G. Landrum et al., "RDKit: open-source cheminformatics", https://www.rdkit.org.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmat.features.molecule import molecule

Float = NDArray[np.float32]
Int = NDArray[np.int64]

VERSION = "1"  # changes whenever any graph may change; part of every cache key
CUTOFF = 8.0  # angstrom
NEIGHBOURS = 12

CONTINUOUS = (
    "electronegativity", "covalent_radius", "atomic_radius", "ionic_radius", "ionization_energy", "electron_affinity",
    "molar_volume",
)  # fmt: skip
MEAN = (1.713, 1.520, 1.501, 0.976, 7.959, 0.514, 17.693)  # of the table's known values
SPREAD = (0.629, 0.441, 0.402, 0.279, 3.314, 0.979, 10.841)  # their standard deviations
SHELLS = (("s", 2), ("p", 6), ("d", 10), ("f", 14))  # valence electrons are given as a share of the full shell
GROUPS, PERIODS = 18, 7
ELEMENT_NAMES = (
    *CONTINUOUS,
    *(f"valence_{shell}" for shell, _ in SHELLS),
    *(f"group_{i + 1}" for i in range(GROUPS)),
    *(f"period_{i + 1}" for i in range(PERIODS)),
)
ORDERS = (1, 2, 3, 4, 6)
SHAPE = ("coordination", *(f"q{order}" for order in ORDERS))
CRYSTAL_NAMES = (*ELEMENT_NAMES, "vacancy", *SHAPE)
ATOM_NAMES = (
    *ELEMENT_NAMES,
    "repeat_unit_end", "charge", "neighbours", "hydrogens", "aromatic", "in_ring", "sp", "sp2", "sp3",
)  # fmt: skip
BOND_NAMES = ("single", "double", "triple", "aromatic", "conjugated", "in_ring")

_SAME = 0.5  # angstrom: closer sites are split positions of one atom
_TIE = 1e-3  # of a distance: neighbours this close to the last one belong to its shell
_GRID = 1e-3  # angstrom: neighbours of one kind at the same distance on this grid are one edge
_FIRST_SHELL = 0.15  # of the nearest distance: how fast a neighbour leaves the first shell (SHAPE only)

ELEMENTS = """
H 1 1 2.20 0.31 0.25 - 13.60 0.75 11.4 1 0 0 0; He 18 1 - 0.28 - - 24.59 -0.52 21.0 2 0 0 0;
Li 1 2 0.98 1.28 1.45 0.90 5.39 0.62 13.0 1 0 0 0; Be 2 2 1.57 0.96 1.05 0.59 9.32 -0.52 4.8 2 0 0 0;
B 13 2 2.04 0.84 0.85 0.41 8.30 0.28 4.4 2 1 0 0; C 14 2 2.55 0.76 0.70 0.30 11.26 1.26 5.3 2 2 0 0;
N 15 2 3.04 0.71 0.65 0.63 14.53 -0.07 13.5 2 3 0 0; O 16 2 3.44 0.66 0.60 1.26 13.62 1.46 17.4 2 4 0 0;
F 17 2 3.98 0.57 0.50 0.70 17.42 3.40 11.2 2 5 0 0; Ne 18 2 - 0.58 - - 21.56 -1.22 13.2 2 6 0 0;
Na 1 3 0.93 1.66 1.80 1.16 5.14 0.55 23.8 1 0 0 0; Mg 2 3 1.31 1.41 1.50 0.86 7.65 -0.42 14.0 2 0 0 0;
Al 13 3 1.61 1.21 1.25 0.68 5.99 0.43 10.0 2 1 0 0; Si 14 3 1.90 1.11 1.10 0.54 8.15 1.39 12.1 2 2 0 0;
P 15 3 2.19 1.07 1.00 0.55 10.49 0.75 17.0 2 3 0 0; S 16 3 2.58 1.05 1.00 0.88 10.36 2.08 15.5 2 4 0 0;
Cl 17 3 3.16 1.02 1.00 0.78 12.97 3.61 17.4 2 5 0 0; Ar 18 3 - 1.06 0.71 - 15.76 -1.02 22.6 2 6 0 0;
K 1 4 0.82 2.03 2.20 1.52 4.34 0.50 45.9 1 0 0 0; Ca 2 4 1.00 1.76 1.80 1.14 6.11 0.02 26.2 2 0 0 0;
Sc 3 4 1.36 1.70 1.60 0.89 6.56 0.18 15.0 2 0 1 0; Ti 4 4 1.54 1.60 1.40 0.85 6.83 0.08 10.6 2 0 2 0;
V 5 4 1.63 1.53 1.35 0.78 6.75 0.53 8.3 2 0 3 0; Cr 6 4 1.66 1.39 1.40 0.94 6.77 0.68 7.2 1 0 5 0;
Mn 7 4 1.55 1.39 1.40 0.88 7.43 -0.52 7.3 2 0 5 0; Fe 8 4 1.83 1.32 1.40 0.85 7.90 0.15 7.1 2 0 6 0;
Co 9 4 1.88 1.26 1.35 0.77 7.88 0.66 6.7 2 0 7 0; Ni 10 4 1.91 1.24 1.35 0.74 7.64 1.16 6.6 2 0 8 0;
Cu 11 4 1.90 1.32 1.35 0.82 7.73 1.24 7.1 1 0 10 0; Zn 12 4 1.65 1.22 1.35 0.88 9.39 -0.62 9.2 2 0 10 0;
Ga 13 4 1.81 1.22 1.30 0.76 6.00 0.30 11.8 2 1 10 0; Ge 14 4 2.01 1.20 1.25 0.77 7.90 1.23 13.6 2 2 10 0;
As 15 4 2.18 1.19 1.15 0.66 9.79 0.80 12.9 2 3 10 0; Se 16 4 2.55 1.20 1.15 1.01 9.75 2.02 16.4 2 4 10 0;
Br 17 4 2.96 1.20 1.15 0.88 11.81 3.36 19.8 2 5 10 0; Kr 18 4 3.00 1.16 - - 14.00 -1.02 28.0 2 6 10 0;
Rb 1 5 0.82 2.20 2.35 1.66 4.18 0.49 55.8 1 0 0 0; Sr 2 5 0.95 1.95 2.00 1.32 5.69 0.05 33.9 2 0 0 0;
Y 3 5 1.22 1.90 1.80 1.04 6.22 0.31 19.9 2 0 1 0; Zr 4 5 1.33 1.75 1.55 0.86 6.63 0.43 14.0 2 0 2 0;
Nb 5 5 1.60 1.64 1.45 0.82 6.76 0.92 10.8 1 0 4 0; Mo 6 5 2.16 1.54 1.45 0.78 7.09 0.75 9.4 1 0 5 0;
Tc 7 5 1.90 1.47 1.35 0.74 7.12 0.55 8.6 2 0 5 0; Ru 8 5 2.20 1.46 1.30 0.66 7.36 1.05 8.2 1 0 7 0;
Rh 9 5 2.28 1.42 1.35 0.74 7.46 1.14 8.3 1 0 8 0; Pd 10 5 2.20 1.39 1.40 0.85 8.34 0.56 8.6 0 0 10 0;
Ag 11 5 1.93 1.45 1.60 1.09 7.58 1.30 10.3 1 0 10 0; Cd 12 5 1.69 1.44 1.55 1.09 8.99 -0.72 13.0 2 0 10 0;
In 13 5 1.78 1.42 1.55 0.94 5.79 0.38 15.8 2 1 10 0; Sn 14 5 1.96 1.39 1.45 0.83 7.34 1.11 16.3 2 2 10 0;
Sb 15 5 2.05 1.39 1.45 0.83 8.61 1.05 18.2 2 3 10 0; Te 16 5 2.10 1.38 1.40 1.29 9.01 1.97 20.5 2 4 10 0;
I 17 5 2.66 1.39 1.40 1.27 10.45 3.06 25.7 2 5 10 0; Xe 18 5 2.60 1.40 - 0.62 12.13 -0.82 35.9 2 6 10 0;
Cs 1 6 0.79 2.44 2.60 1.81 3.89 0.47 70.9 1 0 0 0; Ba 2 6 0.89 2.15 2.15 1.49 5.21 0.14 38.2 2 0 0 0;
La 3 6 1.10 2.07 1.95 1.17 5.58 0.56 22.4 2 0 1 0; Ce 3 6 1.12 2.04 1.85 1.08 5.54 0.60 20.7 2 0 1 1;
Pr 3 6 1.13 2.03 1.85 1.06 5.47 0.11 20.8 2 0 0 3; Nd 3 6 1.14 2.01 1.85 1.28 5.53 0.10 20.6 2 0 0 4;
Pm 3 6 1.13 1.99 1.85 1.11 5.58 0.13 20.2 2 0 0 5; Sm 3 6 1.17 1.98 1.85 1.23 5.64 0.16 20.0 2 0 0 6;
Eu 3 6 1.20 1.98 1.85 1.20 5.67 0.12 29.0 2 0 0 7; Gd 3 6 1.20 1.96 1.80 1.07 6.15 0.21 19.9 2 0 1 7;
Tb 3 6 1.10 1.94 1.75 0.98 5.86 0.13 19.3 2 0 0 9; Dy 3 6 1.22 1.92 1.75 1.13 5.94 0.02 19.0 2 0 0 10;
Ho 3 6 1.23 1.92 1.75 1.04 6.02 0.34 18.7 2 0 0 11; Er 3 6 1.24 1.89 1.75 1.03 6.11 0.31 18.5 2 0 0 12;
Tm 3 6 1.25 1.90 1.75 1.09 6.18 1.03 19.1 2 0 0 13; Yb 3 6 1.10 1.87 1.75 1.08 6.25 -0.02 24.8 2 0 0 14;
Lu 3 6 1.27 1.87 1.75 1.00 5.43 0.24 17.8 2 0 1 14; Hf 4 6 1.30 1.75 1.55 0.85 6.83 0.18 13.4 2 0 2 14;
Ta 5 6 1.50 1.70 1.45 0.82 7.55 0.33 10.8 2 0 3 14; W 6 6 2.36 1.62 1.35 0.77 7.86 0.82 9.5 2 0 4 14;
Re 7 6 1.90 1.51 1.35 0.71 7.83 0.06 8.9 2 0 5 14; Os 8 6 2.20 1.44 1.30 0.67 8.44 1.08 8.4 2 0 6 14;
Ir 9 6 2.20 1.41 1.35 0.77 8.97 1.56 8.5 2 0 7 14; Pt 10 6 2.28 1.36 1.35 0.81 8.96 2.13 9.1 1 0 9 14;
Au 11 6 2.54 1.36 1.35 1.07 9.23 2.31 10.2 1 0 10 14; Hg 12 6 2.00 1.32 1.50 1.25 10.44 -0.52 14.1 2 0 10 14;
Tl 13 6 1.62 1.45 1.90 1.33 6.11 0.32 17.2 2 1 10 14; Pb 14 6 2.33 1.46 1.80 1.12 7.42 0.36 18.3 2 2 10 14;
Bi 15 6 2.02 1.48 1.60 1.03 7.29 0.94 21.3 2 3 10 14; Po 16 6 2.00 1.40 1.90 0.95 8.42 1.41 23.0 2 4 10 14;
At 17 6 2.20 1.50 - 0.76 9.32 2.42 - 2 5 10 14; Rn 18 6 2.20 1.50 - - 10.75 -0.72 50.5 2 6 10 14;
Fr 1 7 0.70 2.60 - 1.94 4.07 0.49 - 1 0 0 0; Ra 2 7 0.90 2.21 2.15 1.62 5.28 0.10 41.1 2 0 0 0;
Ac 3 7 1.10 2.15 1.95 1.26 5.38 0.35 22.6 2 0 1 0; Th 3 7 1.30 2.06 1.80 1.08 6.31 0.61 19.8 2 0 2 0;
Pa 3 7 1.50 2.00 1.80 1.04 5.89 0.55 15.2 2 0 1 2; U 3 7 1.38 1.96 1.75 0.99 6.19 0.31 12.5 2 0 1 3;
Np 3 7 1.36 1.90 1.75 1.00 6.27 0.48 11.6 2 0 1 4; Pu 3 7 1.28 1.87 1.75 0.97 6.03 -0.50 12.3 2 0 0 6;
Am 3 7 1.30 1.80 1.75 1.17 5.97 0.10 17.6 2 0 0 7; Cm 3 7 1.30 1.69 - 1.05 5.99 0.28 18.1 2 0 1 7;
Bk 3 7 1.30 - - 1.04 6.20 -1.72 16.8 2 0 0 9; Cf 3 7 1.30 - - 1.03 6.28 -1.01 16.5 2 0 0 10;
Es 3 7 1.30 - - - 6.37 -0.30 28.5 2 0 0 11; Fm 3 7 1.30 - - - 6.50 0.35 - 2 0 0 12; Md 3 7 1.30 - - - 6.58 0.98 - 2 0 0 13;
No 3 7 1.30 - - - 6.63 -2.33 - 2 0 0 14; Lr 3 7 1.30 - - - 4.96 -0.31 - 2 1 0 14;
"""


class GraphError(ValueError):
    """An input has no graph; the message never repeats the input.

    Attributes:
        row: 0-based position of the first such input.
    """

    def __init__(self, row: int, reason: str) -> None:
        self.row = row
        super().__init__(reason)


@dataclass(frozen=True, eq=False)
class Graphs:
    """Graphs of ``n`` records, one after another; a record without a graph has 0 nodes.

    Attributes:
        nodes: offsets, shape ``n + 1``: graph ``i`` owns nodes ``nodes[i]:nodes[i + 1]``.
        edges: offsets, shape ``n + 1``.
        node_features: shape ``N x f``.
        node_weight: shape ``N``; what a node counts for in its graph's mean (share of the cell's atoms; 1 in a molecule).
        source, target: shape ``E``; node numbers within the edge's own graph. Sorted by target, then source.
        edge_features: shape ``E x g``; bonds of molecules; ``g`` is 0 for crystals, whose edges are distances.
        distance: angstrom, shape ``E``; 0 for molecules.
        edge_weight: shape ``E``; neighbours at the target that this edge stands for, counted by occupancy.
    """

    nodes: Int
    edges: Int
    node_features: Float
    node_weight: Float
    source: NDArray[np.int32]
    target: NDArray[np.int32]
    edge_features: Float
    distance: Float
    edge_weight: Float

    def __post_init__(self) -> None:
        n_nodes, n_edges = int(self.nodes[-1]), int(self.edges[-1])
        per_edge = (self.source, self.target, self.edge_features, self.distance, self.edge_weight)
        if len(self.nodes) != len(self.edges) or self.nodes[0] or self.edges[0]:
            raise ValueError("offsets of nodes and edges must start at 0 and be one more than the graphs")
        if (np.diff(self.nodes) < 0).any() or (np.diff(self.edges) < 0).any():
            raise ValueError("offsets must not decrease")
        if len(self.node_features) != n_nodes or len(self.node_weight) != n_nodes or any(len(a) != n_edges for a in per_edge):
            raise ValueError("nodes and edges must agree with their offsets")
        if n_edges:
            size = np.repeat(np.diff(self.nodes), np.diff(self.edges))
            if min(self.source.min(), self.target.min()) < 0 or (np.maximum(self.source, self.target) >= size).any():
                raise ValueError("an edge ends outside its graph")

    def __len__(self) -> int:
        return len(self.nodes) - 1

    @property
    def n_node(self) -> int:
        """Numbers per node, ``f``."""
        return int(self.node_features.shape[1])

    @property
    def n_edge(self) -> int:
        """Numbers per edge, ``g``; 0 where the edges are distances."""
        return int(self.edge_features.shape[1])

    def take(self, rows: NDArray[Any] | Sequence[int]) -> Graphs:
        """Returns the graphs of ``rows`` in that order; a row may repeat."""
        chosen = np.asarray(rows, dtype=np.int64)
        of_nodes, nodes = gather(self.nodes, chosen)
        of_edges, edges = gather(self.edges, chosen)
        return Graphs(
            nodes,
            edges,
            self.node_features[of_nodes],
            self.node_weight[of_nodes],
            self.source[of_edges],
            self.target[of_edges],
            self.edge_features[of_edges],
            self.distance[of_edges],
            self.edge_weight[of_edges],
        )

    @staticmethod
    def concatenate(parts: Sequence[Graphs]) -> Graphs:
        """Returns all graphs of ``parts`` in order; parts of another kind (other widths) are refused by numpy."""
        if not parts:
            raise ValueError("nothing to concatenate")
        columns = {name: np.concatenate([p.arrays()[name] for p in parts]) for name in _COLUMNS}
        return Graphs(
            _offsets(np.concatenate([np.diff(p.nodes) for p in parts])),
            _offsets(np.concatenate([np.diff(p.edges) for p in parts])),
            **columns,
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Returns the arrays by name, for an npz file."""
        return {name: getattr(self, name) for name in ("nodes", "edges", *_COLUMNS)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Graphs:
        """Returns the graphs that :meth:`arrays` was called on.

        Raises:
            ValueError: an array is absent, of another type, or they do not agree with each other.
        """
        try:
            found = {name: np.asarray(arrays[name]) for name in ("nodes", "edges", *_COLUMNS)}
        except KeyError:
            raise ValueError("an array of the graphs is absent") from None
        for name, value in found.items():
            if value.dtype != _TYPES.get(name, np.float32) or value.ndim != (2 if name.endswith("_features") else 1):
                raise ValueError(f"array '{name}' of the graphs has another type or number of dimensions")
        return cls(**found)


_COLUMNS = ("node_features", "node_weight", "source", "target", "edge_features", "distance", "edge_weight")
_TYPES: Mapping[str, Any] = {"nodes": np.int64, "edges": np.int64, "source": np.int32, "target": np.int32}


def gather(offsets: Int, rows: Int) -> tuple[Int, Int]:
    """Returns the positions of the items of ``rows`` in a ragged array, one row after another, and their new offsets."""
    start = offsets[rows]
    length = offsets[rows + 1] - start
    new = _offsets(length)
    return np.arange(new[-1]) + np.repeat(start - new[:-1], length), new


def _offsets(lengths: NDArray[Any]) -> Int:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


@cache
def element_table() -> dict[str, Float]:
    """Returns symbol -> the numbers called :data:`ELEMENT_NAMES`, standardised where they are continuous."""
    out: dict[str, Float] = {}
    for entry in ELEMENTS.replace("\n", " ").split(";"):
        if not entry.strip():
            continue
        symbol, group, period, *values = entry.split()
        continuous, valence = values[: len(CONTINUOUS)], values[len(CONTINUOUS) :]
        row = [0.0 if v == "-" else (float(v) - m) / s for v, m, s in zip(continuous, MEAN, SPREAD, strict=True)]
        row += [float(v) / full for v, (_, full) in zip(valence, SHELLS, strict=True)]
        row += [float(int(group) == i + 1) for i in range(GROUPS)] + [float(int(period) == i + 1) for i in range(PERIODS)]
        out[symbol] = np.asarray(row, dtype=np.float32)
        out[symbol].setflags(write=False)  # shared by every caller
    out["D"] = out["T"] = out["H"]
    return out


# --- crystals ----------------------------------------------------------------------------------------------------


def crystal_graphs(texts: Sequence[str], cutoff: float = CUTOFF, neighbours: int = NEIGHBOURS) -> Graphs:
    """Returns the graphs of structures, each distinct text computed once.

    Args:
        texts: pymatgen Structure JSON as records hold it; "" becomes an empty graph.
        cutoff: no neighbour is farther, angstrom.
        neighbours: whole shells are added until at least so many neighbours, counted by occupancy, are there.

    Raises:
        GraphError: a text is not pymatgen JSON, or the structure has no atoms, no volume or an element beyond the table.
        ValueError: ``cutoff`` or ``neighbours`` is out of range.
    """
    if not 1.0 <= cutoff <= 20.0 or not 1 <= neighbours <= 64:
        raise ValueError("cutoff must be 1 to 20 angstrom and neighbours 1 to 64")
    return _per_distinct(texts, lambda text: _crystal(text, cutoff, neighbours), len(CRYSTAL_NAMES), 0)


def _crystal(text: str, cutoff: float, neighbours: int) -> Graphs:
    from pymatgen.core import Structure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen's warnings quote the cell
        try:
            structure = Structure.from_dict(json.loads(text))
        except Exception:  # noqa: BLE001  pymatgen raises anything, quoting the cell
            raise ValueError("the structure is not pymatgen Structure JSON") from None
        if not len(structure) or not structure.volume > 0:
            raise ValueError("the structure has no atoms or no volume")
        return from_structure(structure, cutoff, neighbours)


def from_structure(structure: Any, cutoff: float = CUTOFF, neighbours: int = NEIGHBOURS) -> Graphs:
    """Returns the graph of one pymatgen ``Structure``, ordered or not, as :class:`Graphs` of length 1.

    Raises:
        ValueError: it holds something that is not in :data:`ELEMENTS`.
    """
    table = element_table()
    elements = np.zeros((len(structure), len(ELEMENT_NAMES)), dtype=np.float64)
    occupancy = np.zeros(len(structure))
    for i, site in enumerate(structure):
        for species, amount in site.species.items():
            symbol = getattr(species, "symbol", "")
            if symbol not in table:
                raise ValueError("the structure holds something that is no element of the table")
            elements[i] += float(amount) * table[symbol]
            occupancy[i] += float(amount)
    if not (occupancy > 0).all():
        raise ValueError("the structure has an empty site")
    target, source, images, distance = structure.get_neighbor_list(cutoff)
    apart = distance >= _SAME
    target, source, images, distance = target[apart], source[apart], images[apart], distance[apart]
    keep, order = _whole_shells(target, distance, occupancy[source], neighbours)
    kept = order[keep]
    target, source, images, distance = target[kept], source[kept], images[kept], distance[kept]
    vectors = structure.lattice.get_cartesian_coords(structure.frac_coords[source] + images - structure.frac_coords[target])
    shape = _shape(target, distance, vectors, occupancy[source], len(structure))
    # round-off of a sum of occupancies may leave it a hair above 1: that site has no vacancy
    vacancy = np.maximum(0.0, 1.0 - occupancy)
    features = np.column_stack([elements / occupancy[:, None], vacancy, shape])
    bins = np.rint(distance / _GRID).astype(np.int64)
    colour = _colours(features, occupancy, target, source, bins)
    return _quotient(colour, features, occupancy, target, source, distance, bins)


Floats = NDArray[np.float64]


def _whole_shells(target: Int, distance: Floats, occupancy: Floats, neighbours: int) -> tuple[NDArray[np.bool_], Int]:
    """Returns which neighbours stay, in the order by target and distance that comes with it."""
    order = np.lexsort((distance, target)).astype(np.int64)
    owner, far, amount = target[order], distance[order], occupancy[order]
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    group = np.cumsum(np.diff(owner, prepend=-1) != 0) - 1
    total = np.cumsum(amount)
    before = total - amount - (total - amount)[first][group]  # occupancy nearer than this neighbour
    enough = before >= neighbours - 1e-6
    last = np.full(len(first), -np.inf)
    np.maximum.at(last, group[~enough], far[~enough])
    return far <= last[group] * (1.0 + _TIE), order


def _shape(target: Int, distance: Floats, vectors: Floats, occupancy: Floats, n: int) -> Floats:
    """Returns :data:`SHAPE` of every site, shape ``n x 6``: neighbours over 12, and bond-orientational order.

    A neighbour's weight falls off with its distance beyond the nearest one. ``q_l`` is Steinhardt's invariant (eq. 1.3), by
    the addition theorem ``q_l^2 = sum_jk w_j w_k P_l(cos jik) / (sum_j w_j)^2``: what the angles between bonds say, at the
    price of one small matrix per site.
    """
    out = np.zeros((n, len(SHAPE)))
    unit = vectors / distance[:, None]
    bounds = np.searchsorted(target, np.arange(n + 1))
    for i in range(n):
        mine = slice(bounds[i], bounds[i + 1])
        if bounds[i] == bounds[i + 1]:
            continue
        d = distance[mine]
        w = occupancy[mine] * np.exp(-0.5 * ((d / d.min() - 1.0) / _FIRST_SHELL) ** 2)
        total = w.sum()
        u = unit[mine]
        c = u @ u.T
        c2 = c * c
        legendre = (
            c,
            1.5 * c2 - 0.5,
            (2.5 * c2 - 1.5) * c,
            (4.375 * c2 - 3.75) * c2 + 0.375,
            ((14.4375 * c2 - 19.6875) * c2 + 6.5625) * c2 - 0.3125,
        )
        squares = [max(0.0, float(w @ p @ w)) for p in legendre]  # a sum of squares; round-off may show as -1e-17
        out[i] = [total / NEIGHBOURS, *(np.sqrt(squares) / total)]
    return out


def _colours(features: Floats, occupancy: Floats, target: Int, source: Int, bins: Int) -> Int:
    """Returns the class of every site, shape ``n``: equal classes have equal neighbours in equal classes, all the way out.

    Colour refinement, which is exactly what sums over neighbours can tell apart [Xu2019, theorem 3]. Distances count as
    equal within :data:`_GRID` and features within 1e-3.
    """
    first = np.rint(1e3 * np.column_stack([features, occupancy])).astype(np.int64)
    colour = np.unique(first, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    bounds = np.searchsorted(target, np.arange(len(features) + 1))
    while True:
        seen = np.column_stack([target, colour[source], bins])
        seen = seen[np.lexsort((bins, colour[source], target))]
        keys: dict[tuple[int, bytes], int] = {}
        finer = np.array(
            [keys.setdefault((int(c), seen[bounds[i] : bounds[i + 1], 1:].tobytes()), len(keys)) for i, c in enumerate(colour)],
            dtype=np.int64,
        )
        if len(keys) == colour.max() + 1:
            return finer
        colour = finer


def _quotient(
    colour: Int, features: Floats, occupancy: Floats, target: Int, source: Int, distance: Floats, bins: Int
) -> Graphs:
    """Returns the graph with one node per class; features and distances are means over what became one."""
    n = int(colour.max()) + 1
    members = np.bincount(colour, minlength=n)
    amount = np.bincount(colour, weights=occupancy, minlength=n)
    nodes = np.zeros((n, features.shape[1]))
    np.add.at(nodes, colour, features)
    to, of = colour[target], colour[source]
    order = np.lexsort((distance, bins, of, to))
    to, of, bins, distance, weight = to[order], of[order], bins[order], distance[order], occupancy[source[order]]
    first = np.flatnonzero(_starts(to, of, bins))
    if len(first):
        count = np.diff(np.r_[first, len(to)])
        distance, weight = np.add.reduceat(distance, first) / count, np.add.reduceat(weight, first)
    to, of = to[first], of[first]
    return Graphs(
        _offsets(np.array([n])),
        _offsets(np.array([len(to)])),
        (nodes / members[:, None]).astype(np.float32),
        (amount / amount.sum()).astype(np.float32),
        of.astype(np.int32),
        to.astype(np.int32),
        np.zeros((len(to), 0), dtype=np.float32),
        distance.astype(np.float32),
        (weight / members[to]).astype(np.float32),
    )


def _starts(*keys: Int) -> NDArray[np.bool_]:
    """Tells where a run of equal keys starts."""
    out = np.ones(len(keys[0]), dtype=np.bool_)
    if len(out):
        out[1:] = np.any([np.diff(k) != 0 for k in keys], axis=0)
    return out


# --- molecules ---------------------------------------------------------------------------------------------------


def molecular_graphs(smiles: Sequence[str]) -> Graphs:
    """Returns the graphs of molecules or repeat units, each distinct SMILES computed once; "" becomes an empty graph.

    Raises:
        GraphError: RDKit cannot read a SMILES, or an element is beyond the table.
    """
    return _per_distinct(smiles, _molecule, len(ATOM_NAMES), len(BOND_NAMES))


def _molecule(text: str) -> Graphs:
    mol = molecule(text)
    table = element_table()
    atoms = []
    for atom in mol.GetAtoms():
        wildcard = atom.GetAtomicNum() == 0
        if not wildcard and atom.GetSymbol() not in table:
            raise ValueError("the molecule holds an element beyond the table")
        own = np.zeros(len(ELEMENT_NAMES)) if wildcard else table[atom.GetSymbol()]
        hybridization = str(atom.GetHybridization())
        atoms.append(
            [
                *own,
                float(wildcard),
                float(atom.GetFormalCharge()),
                atom.GetDegree() / 4.0,
                atom.GetTotalNumHs() / 4.0,
                float(atom.GetIsAromatic()),
                float(atom.IsInRing()),
                *(float(hybridization == kind) for kind in ("SP", "SP2", "SP3")),
            ]
        )
    source, target, bonds = [], [], []
    for bond in mol.GetBonds():
        a, b = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        kind = str(bond.GetBondType())
        row = [float(kind == k) for k in ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")]
        row += [float(bond.GetIsConjugated()), float(bond.IsInRing())]
        source += [a, b]
        target += [b, a]
        bonds += [row, row]
    order = np.lexsort((source, target)) if bonds else np.zeros(0, dtype=np.int64)
    return Graphs(
        _offsets(np.array([len(atoms)])),
        _offsets(np.array([len(bonds)])),
        np.asarray(atoms, dtype=np.float32),
        np.ones(len(atoms), dtype=np.float32),
        np.asarray(source, dtype=np.int32)[order],
        np.asarray(target, dtype=np.int32)[order],
        np.asarray(bonds, dtype=np.float32).reshape(len(bonds), len(BOND_NAMES))[order],
        np.zeros(len(bonds), dtype=np.float32),
        np.ones(len(bonds), dtype=np.float32),
    )


def empty(n: int, n_node: int, n_edge: int) -> Graphs:
    """Returns ``n`` graphs without nodes."""
    none = np.zeros(0, dtype=np.float32)
    no_end = np.zeros(0, dtype=np.int32)
    offsets = np.zeros(n + 1, dtype=np.int64)
    return Graphs(
        offsets,
        offsets.copy(),
        np.zeros((0, n_node), dtype=np.float32),
        none,
        no_end,
        no_end,
        np.zeros((0, n_edge), dtype=np.float32),
        none,
        none,
    )


def _per_distinct(texts: Sequence[str], one: Callable[[str], Graphs], n_node: int, n_edge: int) -> Graphs:
    seen: dict[str, int] = {}
    parts = [empty(1, n_node, n_edge)]
    codes = np.zeros(len(texts), dtype=np.int64)
    for row, text in enumerate(texts):
        key = text.strip()
        if not key:
            continue  # code 0, the empty graph
        if key not in seen:
            try:
                parts.append(one(key))
            except ValueError as error:
                raise GraphError(row, str(error)) from None
            seen[key] = len(parts) - 1
        codes[row] = seen[key]
    return Graphs.concatenate(parts).take(codes)
