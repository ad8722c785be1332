"""Laws of the graph network: what a crystal is decides the prediction, not how it was written down or trained beside."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from fedmat import weights as wts
from fedmat.data.structures import to_json
from fedmat.features import graphs
from fedmat.features.graphs import Graphs, crystal_graphs, empty, from_structure, molecular_graphs
from fedmat.models import gnn
from fedmat.models.gnn import GraphNetwork, batch
from fedmat.models.network import extract, load
from fedmat.seeds import stream


def perovskite(a: str = "Sr", b: str = "Ti") -> Structure:
    sites = [[0.01, 0, 0], [0.5, 0.5, 0.52], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Structure(Lattice.from_parameters(3.9, 4.0, 4.2, 90, 91, 90), [a, b, "O", "O", {"O": 0.5, "F": 0.25}], sites)


def crystals() -> Graphs:
    pairs = [("Sr", "Ti"), ("Ti", "Sr"), ("Ba", "Zr"), ("Zr", "Ba"), ("La", "Al"), ("Al", "La")]
    return crystal_graphs([to_json(perovskite(a, b)) for a, b in pairs])


def network(graphs: Graphs, width: int = 0, seed: int = 3, **options: object) -> GraphNetwork:
    """A network whose every weight counts: initial weights leave the output at zero, here nothing is zero."""
    net = GraphNetwork(width, graphs.n_node, graphs.n_edge, **{"hidden": 16, "layers": 2, "head": (8,), **options})  # type: ignore[arg-type]
    start = gnn.initial_weights(net, seed)
    rng = stream(seed, "test")
    load(net, {k: v + 0.3 * rng.normal(size=v.shape).astype(np.float32) for k, v in start.items()})
    return net


def predict(net: GraphNetwork, graphs: Graphs, x: np.ndarray | None = None) -> np.ndarray:
    return gnn.forward(net, np.zeros((len(graphs), 0), dtype=np.float32) if x is None else x, graphs)


@pytest.fixture(params=gnn.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_order_of_atoms_does_not_change_the_prediction(kind: str) -> None:
    s = perovskite()
    net = network(from_structure(s), kind=kind)
    turned = Structure.from_sites([s[i] for i in (3, 1, 4, 0, 2)])
    assert predict(net, from_structure(turned)) == pytest.approx(predict(net, from_structure(s)), abs=1e-5)


@pytest.mark.parametrize("scale", [[2, 1, 1], [2, 2, 2], [[1, 1, 0], [0, 1, 0], [0, 0, 1]], [[1, 1, 0], [1, -1, 0], [0, 0, 1]]])
def test_another_periodic_cell_does_not_change_the_prediction(kind: str, scale: object) -> None:
    s = perovskite()
    net = network(from_structure(s), kind=kind)
    other = s.copy()
    other.make_supercell(scale)
    other.translate_sites(range(len(other)), (0.21, 0.4, 0.1))
    assert predict(net, from_structure(other)) == pytest.approx(predict(net, from_structure(s)), abs=1e-5)


def test_swapping_a_and_b_changes_the_prediction(kind: str) -> None:
    g = crystals()
    out = predict(network(g, kind=kind), g)[:, 0]
    assert np.abs(out[0::2] - out[1::2]).min() > 1e-3


def test_occupancy_changes_the_prediction(kind: str) -> None:
    full, half = perovskite(), perovskite()
    half.replace(0, {"Sr": 0.5})
    a, b = from_structure(full), from_structure(half)
    net = network(a, kind=kind)
    assert abs(predict(net, a) - predict(net, b)).max() > 1e-3


def test_two_spellings_of_a_molecule_have_one_prediction(kind: str) -> None:
    g = molecular_graphs(["C1COC(=O)O1", "O=C1OCCO1", "CCO", "OCC", "COC"])
    out = predict(network(g, kind=kind), g)[:, 0]
    assert out[0] == pytest.approx(out[1], abs=1e-5)
    assert out[2] == pytest.approx(out[3], abs=1e-5)
    assert abs(out[2] - out[4]) > 1e-3


def test_a_row_does_not_depend_on_the_rows_beside_it(kind: str) -> None:
    g = Graphs.concatenate([crystals(), empty(1, crystals().n_node, 0)])
    net = network(g, width=2, kind=kind)
    x = stream(1, "x").normal(size=(7, 2)).astype(np.float32)
    together = predict(net, g, x)
    alone = np.concatenate([predict(net, g.take([i]), x[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(alone, together, atol=1e-5)
    net.train()  # no dropout: training mode sees what evaluation sees
    trained = net(torch.from_numpy(x), batch(g, range(7))).detach().numpy()
    np.testing.assert_allclose(trained, together, atol=1e-5)


def test_rows_come_in_the_order_asked_for_and_may_repeat() -> None:
    g = crystals()
    net = network(g)
    order = [3, 0, 0, 5]
    with torch.no_grad():
        out = net(torch.zeros(4, 0), batch(g, torch.tensor(order))).numpy()
    np.testing.assert_allclose(out, predict(net, g)[order], atol=1e-6)
    direct, taken = batch(g, order), batch(g.take(order), range(4))
    assert all(torch.equal(getattr(direct, f), getattr(taken, f)) for f in direct.__dataclass_fields__)
    assert len(direct) == 4


def test_nothing_is_remembered_between_calls(kind: str) -> None:
    """No running statistics: a federated mean of weights is the whole model."""
    g = crystals()
    net = network(g, kind=kind)
    assert list(net.buffers()) == []
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    before = copy.deepcopy(net.state_dict())
    net.train()
    first = net(torch.zeros(6, 0), batch(g, range(6)))
    second = net(torch.zeros(6, 0), batch(g, range(6)))
    assert torch.equal(first, second)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_an_empty_graph_is_predicted_from_the_rest(kind: str) -> None:
    g = Graphs.concatenate([empty(2, crystals().n_node, 0), crystals().take([0])])
    net = network(g, width=1, kind=kind)
    x = np.array([[0.0], [1.0], [0.0]], dtype=np.float32)
    out = predict(net, g, x)[:, 0]
    assert np.isfinite(out).all()
    assert len(set(out.round(6))) == 3
    pooled = net.pool(batch(g, range(3)))
    assert torch.equal(pooled[0], net.absent)
    only = empty(2, g.n_node, 0)
    np.testing.assert_allclose(predict(net, only, x[:2])[:, 0], out[:2], atol=1e-6)
    net(torch.from_numpy(x), batch(g, range(3))).sum().backward()
    assert net.absent.grad is not None
    assert net.absent.grad.abs().sum() > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_atoms_without_neighbours_and_no_rows_are_valid(kind: str) -> None:
    lone = from_structure(Structure(Lattice.cubic(30.0), ["He"], [[0, 0, 0]]))
    net = network(lone, kind=kind)
    assert np.isfinite(predict(net, lone)).all()
    assert predict(net, lone.take([])).shape == (0, 1)


# --- weights -----------------------------------------------------------------------------------------------------


def test_initial_weights_come_from_the_seed_alone(kind: str) -> None:
    g = crystals()
    net = GraphNetwork(4, g.n_node, 0, hidden=8, layers=2, outputs=2, kind=kind, head=(6,), dropout=0.1)  # type: ignore[arg-type]
    torch.manual_seed(1)
    first = gnn.initial_weights(net, 5)
    torch.manual_seed(2)
    other = GraphNetwork(4, g.n_node, 0, hidden=8, layers=2, outputs=2, kind=kind, head=(6,), dropout=0.1)  # type: ignore[arg-type]
    again = gnn.initial_weights(other, 5)
    assert list(first) == sorted(net.state_dict())
    assert all(v.dtype == np.float32 and v.tobytes() == again[k].tobytes() for k, v in first.items())
    changed = gnn.initial_weights(net, 6)
    drawn = [k for k, v in first.items() if v.ndim == 2 and not k.startswith("last.")]
    assert all((first[k] != changed[k]).mean() > 0.9 for k in drawn)
    assert all((v == (1.0 if "norms" in k and k.endswith("weight") else 0.0)).all() for k, v in first.items() if k not in drawn)
    for k in drawn:  # He et al. 2015
        assert np.abs(first[k]).max() <= np.sqrt(6.0 / first[k].shape[1])


def test_an_untrained_network_predicts_the_mean() -> None:
    g = crystals()
    net = GraphNetwork(0, g.n_node, 0, hidden=8, layers=1, outputs=3)
    load(net, gnn.initial_weights(net, 1))
    assert predict(net, g).tolist() == [[0.0] * 3] * 6


def test_weights_survive_the_round_trip_and_averaging() -> None:
    g = crystals()
    net = network(g)
    kept = extract(net)
    mean = wts.weighted_mean([kept, kept], [0.5, 0.5])
    assert wts.same_shape(mean, kept)
    load(net, mean)
    assert all(kept[k].tobytes() == v.tobytes() for k, v in extract(net).items())
    with pytest.raises(RuntimeError):
        load(net, {k: v for k, v in kept.items() if k != "absent"})


def learn(kind: str, steps: int) -> tuple[GraphNetwork, list[float]]:
    g = crystals()
    target = torch.tensor([[1.0], [-1.0], [0.5], [-0.5], [0.2], [0.8]])
    net = GraphNetwork(0, g.n_node, 0, hidden=16, layers=2, kind=kind, head=(16,))  # type: ignore[arg-type]
    load(net, gnn.initial_weights(net, 11))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = nn_loss(net(torch.zeros(6, 0), batch(g, range(6))), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return net, losses


nn_loss = torch.nn.functional.mse_loss


def test_the_same_training_gives_the_same_bytes(kind: str) -> None:
    first, again = learn(kind, 20)[0], learn(kind, 20)[0]
    assert all(v.tobytes() == extract(again)[k].tobytes() for k, v in extract(first).items())


def test_it_learns_to_tell_a_from_b(kind: str) -> None:
    losses = learn(kind, 120)[1]
    assert losses[-1] < 0.02 * losses[0]


def test_the_convolution_is_torch_geometrics() -> None:
    from torch_geometric.nn import CGConv

    g = crystals()
    b = batch(g, range(6))
    n, hidden, n_edge = len(b.node_features), 8, gnn.GAUSSIANS
    ours = gnn.GatedSum(hidden, n_edge)
    theirs = CGConv(hidden, dim=n_edge, aggr="add")
    # [h_i, h_j, e]: gate and core share our one matrix per part, they keep two of all parts
    both = torch.cat([ours.target.weight, ours.source.weight, ours.edge.weight], dim=1).detach()
    with torch.no_grad():
        for linear, rows in ((theirs.lin_f, slice(0, hidden)), (theirs.lin_s, slice(hidden, None))):
            linear.weight.copy_(both[rows])
            linear.bias.copy_(ours.target.bias[rows])
        h = torch.from_numpy(stream(2, "h").normal(size=(n, hidden)).astype(np.float32))
        edge = gnn.Gaussians()(b.edge_features)
        times = b.edge_weight[:, 0].round().long()  # an edge that stands for m neighbours is m edges
        index = torch.stack([b.source, b.target]).repeat_interleave(times, dim=1)
        expected = theirs(h, index, edge.repeat_interleave(times, dim=0)) - h
        counted = dataclasses.replace(b, edge_weight=times[:, None].float())
        torch.testing.assert_close(ours(h, counted, edge), expected, atol=1e-4, rtol=1e-5)


def test_one_node_for_equal_sites_gives_what_all_sites_give(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s = Structure(
        Lattice.cubic(4.0), ["Sr", "Ti", "O", "O", "O"], [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    )
    s.make_supercell([2, 1, 1])
    small = from_structure(s)
    monkeypatch.setattr(graphs, "_colours", lambda features, *_: np.arange(len(features)))
    whole = from_structure(s)
    assert (len(small.node_features), len(whole.node_features)) == (3, 10)
    net = network(small, kind=kind)
    assert predict(net, whole) == pytest.approx(predict(net, small), abs=1e-5)


def test_impossible_networks_are_refused() -> None:
    for options in ({"kind": "gat"}, {"hidden": 0}, {"outputs": 0}, {"layers": -1}):
        with pytest.raises(ValueError):
            GraphNetwork(1, 4, 0, **options)  # type: ignore[arg-type]
