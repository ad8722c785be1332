"""The graph network: crystals and molecules as graphs, beside the row of numbers every record has.

Knows: how a seed becomes weights, and how graphs and weights become predictions. Refuses to know: data and training.

Made for averaging between sites: LayerNorm instead of BatchNorm, so there are no running statistics (a buffer averaged
over sites that saw other chemistries would be nobody's statistics) and a row's prediction never depends on the rows beside
it. A record without a graph pools to zeros plus a learned flag and is predicted from its other numbers.

The convolutions, with ``h_i`` of a node, ``e`` of an edge and ``w`` the neighbours it stands for, are

* ``cgcnn`` [Xie2018, eq. 5]: ``sum_j w_ij sigmoid(W_f [h_i, h_j, e_ij] + b_f) * softplus(W_s [h_i, h_j, e_ij] + b_s)``.
  A linear map of a concatenation is the sum of three linear maps; the two over nodes are computed once per node and not
  once per edge. Apart from the weights this is torch_geometric's ``CGConv``, and a test holds it to that.
* ``schnet`` [Schuett2018, eq. 2]: a small network of ``h_i`` and ``sum_j w_ij (W h_j) * filter(e_ij) / 12``: no gate, so
  the work per edge is about half.

A layer is ``h_i + silu(LayerNorm(convolution))``. Distances are expanded in Gaussians. The graph's vector is the mean over
its nodes, weighted by their share of atoms: intensive, the same for every cell of a crystal.

References:
    Xie2018: T. Xie, J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018), doi:10.1103/PhysRevLett.120.145301.
    Schuett2018: K. T. Schuett et al., "SchNet - a deep learning architecture for molecules and materials", J. Chem. Phys.
    148, 241722 (2018), doi:10.1063/1.5019779.
    Fey2019: M. Fey, J. E. Lenssen, "Fast Graph Representation Learning with PyTorch Geometric", ICLR workshop 2019.
    Ba2016: J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", arXiv:1607.06450 (2016).
    He2015: K. He et al., "Delving Deep into Rectifiers", ICCV 2015 (initialisation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmat.features.graphs import ATOM_NAMES, BOND_NAMES, CRYSTAL_NAMES, Graphs, gather
from fedmat.models.network import DEVICE, Architecture, Inputs, Readouts
from fedmat.seeds import derive, stream
from fedmat.weights import Weights

Kind = Literal["cgcnn", "schnet"]
KINDS: tuple[Kind, ...] = ("cgcnn", "schnet")

GAUSSIANS = 32
NEAREST, FARTHEST = 0.8, 6.0  # angstrom: centres of the first and the last Gaussian
_BATCH = 256  # graphs predicted at a time
DEGREE = 12.0  # schnet's message sum is divided by it: a constant, so that coordination still counts

torch.set_num_threads(1)  # law 5: sums inside one matrix product must not depend on the number of cores


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """Some graphs as one disconnected graph.

    Attributes:
        node_features: shape ``N x f``.
        node_weight: shape ``N x 1``.
        graph: the graph of every node, shape ``N``.
        source, target: node numbers within the batch, shape ``E``.
        edge_features: shape ``E x g``; distances of shape ``E x 1`` for crystals.
        edge_weight: shape ``E x 1``.
        present: 1 where a graph has nodes, else 0; shape ``B x 1``.
    """

    node_features: Tensor
    node_weight: Tensor
    graph: Tensor
    source: Tensor
    target: Tensor
    edge_features: Tensor
    edge_weight: Tensor
    present: Tensor

    def __len__(self) -> int:
        return len(self.present)


def batch(graphs: Graphs, rows: NDArray[Any] | Tensor | Sequence[int], device: torch.device = DEVICE) -> GraphBatch:
    """Returns the graphs of ``rows`` (shape ``B``, repeats allowed) as one batch."""
    chosen = np.asarray(rows, dtype=np.int64)
    of_nodes, nodes = gather(graphs.nodes, chosen)
    of_edges, edges = gather(graphs.edges, chosen)
    shift = np.repeat(nodes[:-1], np.diff(edges))
    edge = graphs.edge_features if graphs.n_edge else graphs.distance[:, None]
    sizes = np.diff(nodes)
    columns = (
        torch.from_numpy(graphs.node_features[of_nodes]),
        torch.from_numpy(graphs.node_weight[of_nodes])[:, None],
        torch.from_numpy(np.repeat(np.arange(len(chosen)), sizes)),
        torch.from_numpy(graphs.source[of_edges] + shift),
        torch.from_numpy(graphs.target[of_edges] + shift),
        torch.from_numpy(edge[of_edges]),
        torch.from_numpy(graphs.edge_weight[of_edges])[:, None],
        torch.from_numpy((sizes > 0).astype(np.float32))[:, None],
    )
    return GraphBatch(*(column.to(device) for column in columns))


def _sum_at(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Adds rows of ``values`` (``E x h``) at ``index``, in order: ``n x h``. On one CPU thread the order is fixed."""
    return values.new_zeros((n, values.shape[1])).index_add_(0, index, values)


class Gaussians(nn.Module):
    """Distances ``E x 1`` in angstrom -> ``E x GAUSSIANS``; no parameters and no buffers."""

    def forward(self, distance: Tensor) -> Tensor:
        """Returns ``exp(-(d - centre)^2 / (2 spacing^2))``."""
        spacing = (FARTHEST - NEAREST) / (GAUSSIANS - 1)
        centres = NEAREST + spacing * torch.arange(GAUSSIANS, dtype=torch.float32, device=distance.device)
        return torch.exp(-0.5 * ((distance - centres) / spacing) ** 2)


class GatedSum(nn.Module):
    """CGCNN's convolution [Xie2018, eq. 5] without its residual."""

    def __init__(self, hidden: int, n_edge: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.target = nn.Linear(hidden, 2 * hidden)
        self.source = nn.Linear(hidden, 2 * hidden, bias=False)
        self.edge = nn.Linear(n_edge, 2 * hidden, bias=False)

    def forward(self, h: Tensor, graph: GraphBatch, edge: Tensor) -> Tensor:
        """Returns ``N x hidden`` for nodes ``N x hidden`` and edges ``E x n_edge``."""
        # index_select, not h[index]: its backward is index_add, several times faster and of fixed order
        both = self.target(h).index_select(0, graph.target) + self.source(h).index_select(0, graph.source) + self.edge(edge)
        gate, core = both.split(self.hidden, dim=1)
        message = torch.sigmoid(gate) * nn.functional.softplus(core) * graph.edge_weight
        return _sum_at(message, graph.target, len(h))


class FilteredSum(nn.Module):
    """SchNet's convolution [Schuett2018, eq. 2]."""

    def __init__(self, hidden: int, n_edge: int) -> None:
        super().__init__()
        self.source = nn.Linear(hidden, hidden, bias=False)
        self.filter = nn.Sequential(nn.Linear(n_edge, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.out = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, h: Tensor, graph: GraphBatch, edge: Tensor) -> Tensor:
        """Returns ``N x hidden`` for nodes ``N x hidden`` and edges ``E x n_edge``."""
        message = self.source(h).index_select(0, graph.source) * self.filter(edge) * graph.edge_weight
        total: Tensor = self.out(torch.cat([h, _sum_at(message, graph.target, len(h)) / DEGREE], dim=1))
        return total


class GraphNetwork(nn.Module):
    """Graphs and a row of numbers per record -> outputs.

    Args:
        width: standardised numbers per record, ``p``; may be 0.
        n_node: numbers per node, :attr:`Graphs.n_node`.
        n_edge: numbers per edge, :attr:`Graphs.n_edge`; 0 means the edges are distances.
        hidden: numbers a node carries.
        layers: convolutions; a node then knows what is so many bonds away.
        outputs: numbers predicted per record.
        kind: the convolution.
        head: hidden layers after pooling.
        dropout: share of the head's numbers left out in training.
    """

    def __init__(
        self,
        width: int,
        n_node: int,
        n_edge: int,
        *,
        hidden: int = 64,
        layers: int = 3,
        outputs: int = 1,
        kind: Kind = "cgcnn",
        head: tuple[int, ...] = (128,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}")
        if min(hidden, outputs, n_node) < 1 or min(width, n_edge, layers) < 0:
            raise ValueError("hidden, outputs and n_node must be positive, width, n_edge and layers not negative")
        made: type[GatedSum] | type[FilteredSum] = GatedSum if kind == "cgcnn" else FilteredSum
        self.distances = n_edge == 0
        self.expand = Gaussians()
        self.embed = nn.Linear(n_node, hidden)
        self.convolutions = nn.ModuleList(made(hidden, GAUSSIANS if self.distances else n_edge) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))
        self.absent = nn.Parameter(torch.zeros(hidden))
        modules: list[nn.Module] = []
        size = hidden + width
        for wide in head:
            modules += [nn.Linear(size, wide), nn.SiLU()]
            if dropout:
                modules.append(nn.Dropout(dropout))
            size = wide
        self.head = nn.Sequential(*modules)
        self.last = nn.Linear(size, outputs)

    def forward(self, x: Tensor, graphs: GraphBatch) -> Tensor:
        """Returns ``B x outputs`` for numbers ``B x width`` and a batch of ``B`` graphs."""
        output: Tensor = self.last(self.head(torch.cat([self.pool(graphs), x], dim=1)))
        return output

    def pool(self, graphs: GraphBatch) -> Tensor:
        """Returns what the network knows of every graph, ``B x hidden``."""
        h = self.embed(graphs.node_features)
        if len(h):
            edge = self.expand(graphs.edge_features) if self.distances else graphs.edge_features
            for convolution, norm in zip(self.convolutions, self.norms, strict=True):
                h = h + nn.functional.silu(norm(convolution(h, graphs, edge)))
        total = _sum_at(h * graphs.node_weight, graphs.graph, len(graphs))
        weight = _sum_at(graphs.node_weight, graphs.graph, len(graphs))
        # an empty graph: 0 / 1 plus the flag
        return total / (weight + (1.0 - graphs.present)) + (1.0 - graphs.present) * self.absent


def initial_weights(net: GraphNetwork, seed: int) -> Weights:
    """Returns weights drawn from the plan's stream, one stream per parameter, independent of torch's own state.

    He-uniform for matrices, 1 for LayerNorm, 0 for every bias, the flag and the output layer: before training, the
    prediction is the mean of the target.
    """
    out: Weights = {}
    norms = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.LayerNorm)}
    for name, value in sorted(net.state_dict().items()):
        shape = tuple(value.shape)
        if name in norms:
            out[name] = np.ones(shape, dtype=np.float32)
        elif len(shape) < 2 or name.startswith("last."):
            out[name] = np.zeros(shape, dtype=np.float32)
        else:
            bound = np.sqrt(6.0 / max(shape[1], 1))
            out[name] = stream(seed, "initial-weights", name).uniform(-bound, bound, shape).astype(np.float32)
    return out


def forward(net: GraphNetwork, x: NDArray[np.float32], graphs: Graphs, size: int = 256) -> NDArray[np.float64]:
    """Returns raw output ``n x outputs`` for standardised features ``n x width`` and ``n`` graphs, ``size`` rows at a time."""
    net.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(graphs), size):
            rows = np.arange(start, min(start + size, len(graphs)))
            parts.append(net(torch.from_numpy(np.ascontiguousarray(x[rows])), batch(graphs, rows)).numpy())
    joined: NDArray[np.float32] = np.concatenate(parts) if parts else np.zeros((0, net.last.out_features), dtype=np.float32)
    return joined.astype(np.float64)


class GraphEnsemble(nn.Module):
    """Graph networks side by side, one per member of an architecture; see :meth:`Architecture.network`."""

    def __init__(self, architecture: Architecture, width: int) -> None:
        super().__init__()
        spec, graph = architecture.spec, architecture.spec.graph
        if graph is None:
            raise ValueError("the architecture reads no graphs")
        n_node, n_edge = (len(CRYSTAL_NAMES), 0) if graph.of == "crystal" else (len(ATOM_NAMES), len(BOND_NAMES))
        self._networks = [
            GraphNetwork(
                width, n_node, n_edge, hidden=graph.width, layers=graph.layers, outputs=sum(architecture.n_outputs),
                kind=graph.convolution, head=spec.hidden, dropout=spec.dropout,
            )
            for _ in range(architecture.members)
        ]  # fmt: skip
        for m, net in enumerate(self._networks):
            self.add_module(str(m), net)
        self.readouts = Readouts(architecture)

    def forward(self, inputs: Inputs, rows: Tensor | None) -> Tensor:
        """Returns ``m x b x n_tasks`` for rows ``m x b``; None takes all rows, a part at a time."""
        if inputs.graphs is None:
            raise ValueError("a graph network needs graphs")
        raw, kelvin = [], []
        for m, net in enumerate(self._networks):
            chosen = torch.arange(len(inputs)) if rows is None else rows[m]
            parts = chosen.split(_BATCH) if rows is None else (chosen,)
            raw.append(torch.cat([net(inputs.x[part], batch(inputs.graphs, part.cpu())) for part in parts]))
            kelvin.append(inputs.kelvin[chosen] if len(inputs.kelvin) else inputs.kelvin)
        out: Tensor = self.readouts(torch.stack(raw), torch.stack(kelvin), inputs.y_scale)
        return out

    def initial_weights(self, seed: int) -> Weights:
        """Returns every member's weights, each drawn from streams of its own."""
        return {
            f"{m}.{name}": value
            for m, net in enumerate(self._networks)
            for name, value in initial_weights(net, derive(seed, "member", m)).items()
        }
