"""Laws of graphs: what a crystal or molecule is must not depend on how it was written down."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Element, Lattice, Structure

from fedmat.data.structures import to_json
from fedmat.features import graphs
from fedmat.features.graphs import GraphError, Graphs, crystal_graphs, from_structure, molecular_graphs

SECRET = "CANARY9041"


def perovskite(a: str = "Sr", b: str = "Ti", edge: float = 3.9) -> Structure:
    sites = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Structure(Lattice.cubic(edge), [a, b, "O", "O", "O"], sites)


def disordered() -> Structure:
    return Structure(
        Lattice.cubic(5.0), [{"Li": 0.5}, {"Ti": 0.25, "Zr": 0.75}, "O"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0, 0]]
    )


def sample() -> Graphs:
    texts = [to_json(perovskite()), "", to_json(disordered()), to_json(perovskite("Ba")), to_json(perovskite())]
    return crystal_graphs(texts)


def same(a: Graphs, b: Graphs) -> bool:
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a.arrays().values(), b.arrays().values()))


def rows(g: Graphs) -> np.ndarray:
    """Every node as a row (its numbers, then what reaches it by element and distance), in an order of its own."""
    per_node = np.zeros((len(g.node_features), 2))
    np.add.at(per_node, g.target, np.column_stack([g.edge_weight, g.edge_weight * g.distance]))
    table = np.column_stack([g.node_features, g.node_weight, per_node]).round(3)
    return table[np.lexsort(table.T)]


def test_a_cubic_perovskite_has_the_edges_one_can_count() -> None:
    g = from_structure(perovskite())
    assert g.node_weight.tolist() == [np.float32(0.2), np.float32(0.2), np.float32(0.6)]  # Sr, Ti, three equal O
    found = list(zip(g.target.tolist(), g.source.tolist(), g.edge_weight.tolist(), g.distance.round(3).tolist()))
    diagonal, half = round(3.9 / np.sqrt(2), 3), 1.95
    assert found == [
        (0, 2, 12.0, pytest.approx(diagonal, abs=1e-3)),
        (1, 0, 8.0, pytest.approx(3.9 * np.sqrt(3) / 2, abs=1e-3)),
        (1, 2, 6.0, pytest.approx(half)),
        (2, 0, 4.0, pytest.approx(diagonal, abs=1e-3)),
        (2, 1, 2.0, pytest.approx(half)),
        (2, 2, 8.0, pytest.approx(diagonal, abs=1e-3)),
    ]


@pytest.mark.parametrize(("lattice", "basis", "expected"), [("fcc", 4, 12), ("bcc", 2, 14)])
def test_a_shell_is_never_cut(lattice: str, basis: int, expected: int) -> None:
    points = {"fcc": [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], "bcc": [[0, 0, 0], [0.5, 0.5, 0.5]]}[lattice]
    g = from_structure(Structure(Lattice.cubic(3.6), ["Fe"] * basis, points))
    assert np.bincount(g.target, weights=g.edge_weight).tolist() == [expected]  # one node: all atoms are equal


def test_the_order_of_atoms_does_not_matter() -> None:
    s = disordered()
    swapped = Structure.from_sites([s[2], s[0], s[1]])
    np.testing.assert_allclose(rows(from_structure(s)), rows(from_structure(swapped)), atol=2e-3)


@pytest.mark.parametrize("scale", [[2, 1, 1], [[1, 1, 0], [0, 1, 0], [0, 0, 1]], [[0, 2, 0], [1, 0, 0], [0, 0, 1]]])
def test_another_cell_of_the_same_crystal_has_the_same_nodes(scale: list[object]) -> None:
    s = disordered()
    other = s.copy()
    other.make_supercell(scale)
    np.testing.assert_allclose(rows(from_structure(s)), rows(from_structure(other)), atol=2e-3)


def test_equal_sites_are_one_node_and_different_ones_are_not() -> None:
    """The quotient keeps what a sum over neighbours can tell apart: one displaced atom makes its surroundings special."""
    s = perovskite()
    s.make_supercell([2, 1, 1])
    assert len(from_structure(s).node_features) == 3
    s.translate_sites([0], (0.02, 0, 0))
    apart = from_structure(s)
    assert len(apart.node_features) > 3
    assert apart.node_weight.sum() == pytest.approx(1.0, abs=1e-6)


def test_rotation_and_translation_do_not_matter() -> None:
    from pymatgen.core.operations import SymmOp

    s = perovskite()
    s.perturb(0.05)
    turned = s.copy()
    turned.apply_operation(SymmOp.from_axis_angle_and_translation((1, 2, 3), 37.0))
    turned.translate_sites(range(5), (0.13, 0.4, 0.77), frac_coords=True)
    np.testing.assert_allclose(rows(from_structure(s)), rows(from_structure(turned)), atol=2e-3)


def test_swapping_two_elements_changes_the_graph() -> None:
    assert not np.allclose(rows(from_structure(perovskite("Sr", "Ti"))), rows(from_structure(perovskite("Ti", "Sr"))))


def test_bond_order_has_steinhardts_values() -> None:
    simple = from_structure(Structure(Lattice.cubic(3.35), ["Po"], [[0, 0, 0]]), neighbours=6)
    at = len(graphs.CRYSTAL_NAMES) - len(graphs.SHAPE)
    shape = dict(zip(graphs.SHAPE, simple.node_features[0, at:], strict=True))
    assert shape["coordination"] == pytest.approx(0.5)  # six neighbours
    assert shape["q4"] == pytest.approx(0.76376, abs=1e-4)  # Steinhardt et al. 1983: simple cubic
    assert shape["q6"] == pytest.approx(0.35355, abs=1e-4)
    assert max(shape["q1"], shape["q2"], shape["q3"]) < 1e-6
    fcc = Structure(Lattice.cubic(3.6), ["Cu"] * 4, [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    shape = dict(zip(graphs.SHAPE, from_structure(fcc).node_features[0, at:], strict=True))
    assert (shape["q4"], shape["q6"]) == pytest.approx((0.19094, 0.57452), abs=1e-4)


def test_partial_occupancy_is_a_mean_and_a_vacancy() -> None:
    g = from_structure(disordered())
    table = graphs.element_table()
    width = len(graphs.ELEMENT_NAMES)
    np.testing.assert_allclose(g.node_features[0, :width], table["Li"], atol=1e-6)
    np.testing.assert_allclose(g.node_features[1, :width], 0.25 * table["Ti"] + 0.75 * table["Zr"], atol=1e-6)
    assert g.node_features[:, width].tolist() == [0.5, 0.0, 0.0]
    assert g.node_weight.tolist() == pytest.approx([0.2, 0.4, 0.4])
    li_to_o = (g.source == 0) & (g.target == 2) & (g.distance < 2.6)
    assert g.edge_weight[li_to_o].tolist() == [1.0]  # two half-occupied neighbours


def test_split_positions_of_one_atom_are_not_neighbours() -> None:
    s = Structure(Lattice.cubic(4.0), [{"Li": 0.5}, {"Li": 0.5}, "Cl"], [[0, 0, 0], [0.1, 0, 0], [0.5, 0.5, 0.5]])
    g = from_structure(s)
    assert g.distance.min() > 0.5


def test_oxidation_states_and_isotopes_do_not_matter() -> None:
    s = perovskite()
    charged = s.copy()
    charged.add_oxidation_state_by_element({"Sr": 2, "Ti": 4, "O": -2})
    assert same(from_structure(s), from_structure(charged))
    cell = Lattice.cubic(4.0)
    assert same(from_structure(Structure(cell, ["H"], [[0, 0, 0]])), from_structure(Structure(cell, ["D"], [[0, 0, 0]])))


def test_an_atom_alone_has_no_edges() -> None:
    g = from_structure(Structure(Lattice.cubic(30.0), ["He"], [[0, 0, 0]]))
    assert (len(g.node_features), len(g.source)) == (1, 0)
    assert np.isfinite(g.node_features).all()


def test_a_record_without_a_structure_is_an_empty_graph() -> None:
    g = sample()
    assert len(g) == 5
    assert np.diff(g.nodes).tolist() == [3, 0, 3, 3, 3]
    nothing = crystal_graphs([])
    assert len(nothing) == 0
    assert nothing.n_node == g.n_node
    assert same(crystal_graphs(["", " "]), graphs.empty(2, g.n_node, 0))


def test_same_input_same_bytes() -> None:
    assert same(sample(), sample())
    assert same(sample().take([0]), sample().take([4]))


@pytest.mark.parametrize(
    "bad",
    [
        SECRET,
        f'{{"{SECRET}": 1}}',
        "[1, 2]",
        to_json(perovskite()).replace('"Sr"', f'"{SECRET}"'),
        to_json(perovskite()).replace('"Sr"', '"X"'),
        json.dumps({"@class": "Structure", "lattice": {"matrix": [[1, 0, 0], [0, 1, 0], [0, 0, 0]]}, "sites": []}),
    ],
)
def test_what_is_no_structure_is_refused_by_row_and_without_its_text(bad: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(GraphError) as refused:
            crystal_graphs([to_json(perovskite()), "", bad])
    assert refused.value.row == 2
    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None


def test_settings_out_of_range_are_refused() -> None:
    for cutoff, neighbours in [(0.0, 12), (float("nan"), 12), (8.0, 0)]:
        with pytest.raises(ValueError, match="cutoff"):
            crystal_graphs([""], cutoff, neighbours)


# --- the ragged container ----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(first=st.lists(st.integers(0, 4), max_size=8), second=st.lists(st.integers(0, 4), max_size=8))
def test_taking_and_concatenating_commute(first: list[int], second: list[int]) -> None:
    g = sample_once()
    assert same(Graphs.concatenate([g.take(first), g.take(second)]), g.take(first + second))
    if first:
        assert same(g.take(first).take([len(first) - 1]), g.take([first[-1]]))


_SAMPLE: list[Graphs] = []


def sample_once() -> Graphs:
    if not _SAMPLE:
        _SAMPLE.append(sample())
    return _SAMPLE[0]


def test_graphs_survive_a_file() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **sample().arrays())
    buffer.seek(0)
    with np.load(buffer, allow_pickle=False) as stored:
        assert same(Graphs.from_arrays(stored), sample())


def test_damaged_arrays_are_refused() -> None:
    good = sample().arrays()
    damage = {
        "edges": good["edges"] + 1,
        "nodes": good["nodes"][:-1],
        "source": good["source"] + 3,
        "target": -good["target"],
        "distance": good["distance"][1:],
        "node_features": good["node_features"].astype(np.float64),
        "edge_weight": good["edge_weight"][:, None],
    }
    for name, value in damage.items():
        with pytest.raises(ValueError):
            Graphs.from_arrays({**good, name: value})
    with pytest.raises(ValueError, match="absent"):
        Graphs.from_arrays({k: v for k, v in good.items() if k != "edges"})
    with pytest.raises(ValueError, match="nothing"):
        Graphs.concatenate([])


# --- the table of elements ---------------------------------------------------------------------------------------


def test_the_constants_are_those_of_the_table() -> None:
    values = [
        [np.nan if v == "-" else float(v) for v in e.split()[3 : 3 + len(graphs.CONTINUOUS)]]
        for e in graphs.ELEMENTS.replace("\n", " ").split(";")
        if e.strip()
    ]
    np.testing.assert_allclose(np.nanmean(values, axis=0), graphs.MEAN, atol=6e-4)
    np.testing.assert_allclose(np.nanstd(values, axis=0), graphs.SPREAD, atol=6e-4)


def test_the_table_agrees_with_pymatgen_and_tells_elements_apart() -> None:
    table = graphs.element_table()
    symbols = [Element.from_Z(z).symbol for z in range(1, 104)]
    assert set(table) == {*symbols, "D", "T"}
    assert len({table[s].tobytes() for s in symbols}) == 103
    for symbol in symbols:
        e, row = Element(symbol), dict(zip(graphs.ELEMENT_NAMES, table[symbol], strict=True))
        assert row[f"group_{e.group}"] == 1.0
        assert row[f"period_{e.row if e.row < 8 else e.row - 2}"] == 1.0
        i = graphs.CONTINUOUS.index("ionization_energy")
        value = row["ionization_energy"] * graphs.SPREAD[i] + graphs.MEAN[i]
        assert value == pytest.approx(e.ionization_energy, abs=0.006)
        assert np.isfinite(table[symbol]).all()
    with pytest.raises(ValueError, match="read-only"):
        table["H"][0] = 1.0


# --- molecules ---------------------------------------------------------------------------------------------------


def test_a_molecule_has_its_bonds_both_ways() -> None:
    g = molecular_graphs(["CC=O", "", "*CC*", "[Li+]", "F[P-](F)(F)(F)(F)F.[Li+]"])
    assert np.diff(g.nodes).tolist() == [3, 0, 4, 1, 8]
    assert np.diff(g.edges).tolist() == [4, 0, 6, 0, 12]
    one = g.take([0])
    assert list(zip(one.source.tolist(), one.target.tolist())) == [(1, 0), (0, 1), (2, 1), (1, 2)]
    assert one.edge_features[:, graphs.BOND_NAMES.index("double")].tolist() == [0, 0, 1, 1]
    ends = g.take([2]).node_features[:, graphs.ATOM_NAMES.index("repeat_unit_end")]
    assert ends.tolist() == [1, 0, 0, 1]
    assert g.take([3]).node_features[0, graphs.ATOM_NAMES.index("charge")] == 1.0
    assert (g.node_weight == 1).all()
    assert (g.edge_weight == 1).all()


def test_an_unreadable_smiles_is_refused_by_row_and_without_its_text() -> None:
    for bad in ("C1CC", f"C{SECRET}"):
        with pytest.raises(GraphError) as refused:
            molecular_graphs(["C", bad])
        assert refused.value.row == 1
        assert bad not in str(refused.value)
