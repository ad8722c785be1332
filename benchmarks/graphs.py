"""What a crystal's graph is worth beside its formula: three public data sets, pooled and federated.

Run with ``python -m benchmarks.graphs [--quick]``; prints one JSON object. Reads the folder ``$FEDMAT_DATA``, else
``../shared/data`` beside the checkout. Nothing is written.

* ``perovskites``: formation energy (``heat_all``, eV per 5-atom cell) of 7,572 computed perovskites. Compositions are held
  out whole, so a pair that differs only by which element sits on A and which on B is on one side of the split; the error on
  such pairs (``pair_rows``) is what a formula cannot know. Federated: four sites by the family of the A element, FedAvg with
  equal site weights and one standardisation of all sites' training rows.
* ``elastic``: log10 of shear and bulk modulus (GPa) of 1,146 crystals (a derived join, never to be quoted as Matbench);
  reduced formulas are held out whole.
* ``solid_electrolytes``: log10 conductivity (S/cm) of the OBELiX records that have a structure, on OBELiX's own split; a
  left-censored value counts as its bound. ``all_records`` trains on the records without a structure too (empty graphs).

Every arm of a data set is scored on the same rows. A seed draws the split (not for OBELiX), the initial weights and the
batches; numbers are mean and standard deviation over seeds, in ``cpu_s`` seconds of one core. Width, depth and learning rate
were chosen by a few trials on other splits of the same data, for OBELiX on its test rows: read a difference there below
0.1 as none. Networks train for a stated number of steps, without early stopping. OBELiX is so small that the number of steps
matters more than the arm, so two are shown.

References:
    Castelli et al., Energy Environ. Sci. 5, 5814 (2012); Xie et al., ICLR 2022 (the CIF files).
    de Jong et al., Sci. Data 2, 150009 (2015). Therrien et al., arXiv:2502.14234 (OBELiX).
    McMahan et al., AISTATS 2017 (FedAvg).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

import fedmat.telemetry  # noqa: F401
from fedmat import weights as wts
from fedmat.data import structures
from fedmat.features.composition import CompositionFeatures
from fedmat.features.graphs import Graphs, crystal_graphs, empty
from fedmat.features.structure import StructureFeatures
from fedmat.models import gnn
from fedmat.seeds import stream

DATA = Path(os.environ.get("FEDMAT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
_CELL = re.compile(r"_cell_(?:length_[abc]|angle_\w+)\s+([\d.]+)")
Array = np.ndarray[Any, Any]


def json_of(cif: str) -> str:
    """Structure JSON of a P1 CIF as pymatgen writes it: the general parser takes 12 ms for each, this 0.2."""
    from pymatgen.core import Lattice

    cell = [float(v) for v in _CELL.findall(cif)]
    sites = []
    for line in cif.split("_atom_site_occupancy\n")[1].strip().splitlines():
        element, _, _, *numbers = line.split()
        a, b, c, occupancy = map(float, numbers)
        sites.append(
            {"abc": [a % 1.0, b % 1.0, c % 1.0], "properties": {}, "species": [{"element": element, "occu": occupancy}]}
        )
    matrix = Lattice.from_parameters(*cell).matrix.round(10).tolist()
    lattice = {"matrix": matrix, "pbc": [True] * 3}
    return json.dumps(
        {"@class": "Structure", "@module": "pymatgen.core.structure", "charge": 0.0, "lattice": lattice, "sites": sites}
    )


# --- training ----------------------------------------------------------------------------------------------------


class Arm:
    """One network over one kind of input."""

    def __init__(
        self, x: Array, graphs: Graphs | None, y: Array, *, hidden: int = 64, layers: int = 3, dropout: float = 0.0
    ) -> None:
        self.x, self.graphs, self.y = x, graphs, y.reshape(len(y), -1)
        self.options = {"hidden": hidden, "layers": layers, "dropout": dropout}

    def network(self) -> nn.Module:
        outputs = self.y.shape[1]
        if self.graphs is None:  # fedmat's property network in its default shape
            sizes = (self.x.shape[1], 128, 128)
            hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
            return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))
        return gnn.GraphNetwork(self.x.shape[1], self.graphs.n_node, 0, outputs=outputs, kind="schnet", **self.options)  # type: ignore[arg-type]

    def start(self, net: nn.Module, seed: int) -> dict[str, Array]:
        if isinstance(net, gnn.GraphNetwork):
            return gnn.initial_weights(net, seed)
        state = net.state_dict()
        last = list(state)[-2]
        return {
            k: np.zeros(tuple(v.shape), dtype=np.float32)
            if k == last or v.ndim == 1
            else stream(seed, "initial-weights", k).uniform(-1, 1, tuple(v.shape)).astype(np.float32)
            * np.float32(np.sqrt(6.0 / v.shape[1]))
            for k, v in state.items()
        }

    def scale(self, train: Array) -> tuple[torch.Tensor, torch.Tensor, Array, Array]:
        mean, spread = self.x[train].mean(0), self.x[train].std(0)
        x = np.clip((self.x - mean) / np.where(spread > 1e-9, spread, 1.0), -5, 5).astype(np.float32)
        middle, width = self.y[train].mean(0), self.y[train].std(0)
        return torch.from_numpy(x), torch.from_numpy(((self.y - middle) / width).astype(np.float32)), middle, width

    def forward(self, net: nn.Module, x: torch.Tensor, rows: Array) -> torch.Tensor:
        out: torch.Tensor = net(x[rows]) if self.graphs is None else net(x[rows], gnn.batch(self.graphs, rows))
        return out

    def predict(self, net: nn.Module, x: torch.Tensor, rows: Array, middle: Array, width: Array) -> Array:
        net.eval()
        with torch.no_grad():
            parts = [self.forward(net, x, rows[i : i + 256]).numpy() for i in range(0, len(rows), 256)]
        return np.concatenate(parts) * width + middle


def steps_of(
    arm: Arm, net: nn.Module, x: torch.Tensor, y: torch.Tensor, rows: Array, rates: Array, size: int, rng: np.random.Generator
) -> None:
    """Adam steps on ``rows``, one per rate; batches are shuffled epochs, one after another."""
    size = min(size, len(rows))
    epochs = -(-len(rates) // (len(rows) // size))
    plan = np.concatenate([rng.permutation(len(rows))[: len(rows) // size * size].reshape(-1, size) for _ in range(epochs)])
    optimizer = torch.optim.Adam(net.parameters(), lr=float(rates[0]), foreach=True)
    loss_of = nn.HuberLoss()
    net.train()
    torch.manual_seed(int(rng.integers(2**62)))
    for rate, chosen in zip(rates, plan[: len(rates)], strict=True):
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.zero_grad(set_to_none=True)
        loss_of(arm.forward(net, x, rows[chosen]), y[rows[chosen]]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()


def cosine(lr: float, n: int) -> Array:
    return lr * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * np.arange(n) / n)))


def pooled(arm: Arm, train: Array, test: Array, seed: int, *, steps: int, lr: float, size: int) -> Array:
    """Absolute errors on ``test``, shape ``n x outputs``, after training on all of ``train``."""
    net = arm.network()
    net.load_state_dict({k: torch.from_numpy(v) for k, v in arm.start(net, seed).items()})
    x, y, middle, width = arm.scale(train)
    steps_of(arm, net, x, y, train, cosine(lr, steps), size, stream(seed, "batches"))
    return np.abs(arm.predict(net, x, test, middle, width) - arm.y[test])


def federated(
    arm: Arm, sites: Sequence[Array], test: Array, seed: int, *, rounds: int, local: int, lr: float, size: int
) -> Array:
    """The same after FedAvg with equal site weights; Adam starts anew at every site in every round."""
    net = arm.network()
    weights = arm.start(net, seed)
    x, y, middle, width = arm.scale(np.concatenate(sites))  # equal to the sites' federated standardisation
    for r, rate in enumerate(cosine(lr, rounds)):
        answers = []
        for s, rows in enumerate(sites):
            net.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in weights.items()})
            steps_of(arm, net, x, y, rows, np.full(local, rate), size, stream(seed, "batches", s, r))
            answers.append({k: v.detach().numpy().copy() for k, v in net.state_dict().items()})
        weights = wts.weighted_mean(answers, [1.0 / len(sites)] * len(sites))
    net.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    return np.abs(arm.predict(net, x, test, middle, width) - arm.y[test])


def summary(values: Sequence[Any]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    stacked = np.asarray(values, dtype=np.float64)
    return {
        "mean": np.round(stacked.mean(0), 4).tolist(),
        "sd": np.round(stacked.std(0, ddof=1 if len(stacked) > 1 else 0), 4).tolist(),
    }


def forest(x: Array, y: Array, train: Array, test: Array, seed: int) -> Array:
    """Absolute errors of scikit-learn's random forest, shape ``n x outputs``."""
    from sklearn.ensemble import RandomForestRegressor

    model = RandomForestRegressor(100, max_features=1 / 3, random_state=seed).fit(x[train], y[train])
    return np.abs(model.predict(x[test]).reshape(len(test), -1) - y[test].reshape(len(test), -1))


def put(out: dict[str, Any], name: str, started: float, value: dict[str, Any]) -> None:
    """Enters a result with its cost and says so on stderr."""
    out[name] = {**value, "cpu_s": round(time.process_time() - started, 1)}
    print(f"{name}: {json.dumps(out[name])}", file=sys.stderr, flush=True)


def hold_out(groups: Array, fraction: float, seed: int) -> tuple[Array, Array]:
    """Rows of train and test; groups stay whole."""
    distinct, code = np.unique(groups, return_inverse=True)
    test = np.zeros(len(distinct), dtype=bool)
    test[stream(seed, "split").permutation(len(distinct))[: round(fraction * len(distinct))]] = True
    return np.flatnonzero(~test[code]), np.flatnonzero(test[code])


# --- (a) perovskites ---------------------------------------------------------------------------------------------


def family(symbol: str) -> int:
    """Four families of the A element: alkali and alkaline earth, rare earth and early transition, late transition, p block."""
    from pymatgen.core import Element

    group = Element(symbol).group
    return 0 if group <= 2 else 1 if group <= 5 else 2 if group <= 12 else 3


def perovskites(quick: bool) -> dict[str, Any]:
    from pymatgen.core import Composition

    parts = [
        pd.read_csv(DATA / "perov5_structures" / f"perov5_{p}.csv", usecols=["cif", "formula", "heat_all"])
        for p in ("val", "test")
    ]
    d = pd.concat(parts, ignore_index=True)
    composition = np.array([Composition(f).alphabetical_formula.replace(" ", "") for f in d["formula"]])
    _, code, count = np.unique(composition, return_inverse=True, return_counts=True)
    if quick:  # the first compositions of a shuffle, pairs first, so that pairs remain
        order = stream(0, "quick").permutation(len(count))
        order = order[np.argsort(-np.minimum(count[order], 2), kind="stable")]
        kept = np.flatnonzero(np.isin(code, order[:500]))
        d, composition, code = d.iloc[kept], composition[kept], code[kept]
    in_pair = count[code] > 1
    y = d["heat_all"].to_numpy(dtype=np.float64)
    out: dict[str, Any] = {"n": len(d), "rows_with_the_composition_of_another": int(in_pair.sum()), "unit": "eV per cell"}
    started = time.process_time()
    texts = [json_of(c) for c in d["cif"]]
    graphs = crystal_graphs(texts)
    out["graphs"] = {
        "cpu_s": round(time.process_time() - started, 1),
        "nodes_mean": round(float(graphs.nodes[-1]) / len(graphs), 1),
        "edges_mean": round(float(graphs.edges[-1]) / len(graphs), 1),
        "mib": round(sum(a.nbytes for a in graphs.arrays().values()) / 2**20, 1),
    }
    started = time.process_time()
    formula = CompositionFeatures().transform(pd.DataFrame({"formula": composition}))
    out["composition_features_cpu_s"] = round(time.process_time() - started, 1)
    site = np.array([family(re.match(r"[A-Z][a-z]?", f)[0]) for f in d["formula"]])  # type: ignore[index]
    none = formula[:, :0]
    arms = {
        "composition": Arm(formula, None, y),
        "graph": Arm(none, graphs, y),
        "graph_and_composition": Arm(formula, graphs, y),
    }
    seeds = (0,) if quick else (0, 1, 2)
    steps, rounds, local = (150, 6, 10) if quick else (1200, 40, 15)
    out["plan"] = {
        "seeds": len(seeds),
        "test_fraction": 0.15,
        "pooled_steps": steps,
        "rounds": rounds,
        "local_steps": local,
        "batch": 64,
    }
    out["sites_rows"] = np.bincount(site, minlength=4).tolist()
    splits = {s: hold_out(composition, 0.15, s) for s in seeds}
    out["test_rows"] = [len(splits[s][1]) for s in seeds]
    out["test_pair_rows"] = [int(in_pair[splits[s][1]].sum()) for s in seeds]

    def both(errors: dict[int, Array]) -> dict[str, Any]:
        return {
            "mae": summary([errors[s].mean() for s in errors]),
            "mae_pair_rows": summary([errors[s][in_pair[splits[s][1]]].mean() for s in errors]),
        }

    out["mean_predictor"] = both({s: np.abs(y[te] - y[tr].mean()) for s, (tr, te) in splits.items()})
    for name, arm in arms.items():
        rate = 1e-3 if arm.graphs is None else 4e-3
        some = seeds if name != "graph_and_composition" else seeds[:1]
        clock, found = time.process_time(), {}
        for s in some:
            found[s] = pooled(arm, *splits[s], s, steps=steps, lr=rate, size=64)
        put(out, f"{name}_pooled", clock, {"seeds": len(some), **both(found)})
        if name == "graph_and_composition":
            continue
        clock, found = time.process_time(), {}
        for s in some:
            train, test = splits[s]
            own = [train[site[train] == k] for k in range(4)]
            found[s] = federated(arm, own, test, s, rounds=rounds, local=local, lr=rate, size=64)
        put(out, f"{name}_federated", clock, {"seeds": len(some), **both(found)})
    return out


# --- (b) elastic -------------------------------------------------------------------------------------------------


def without_shape(graphs: Graphs) -> Graphs:
    """The same graphs with the columns about a site's surroundings (coordination, bond order) set to 0."""
    import dataclasses

    from fedmat.features.graphs import SHAPE

    features = graphs.node_features.copy()
    features[:, -len(SHAPE) :] = 0.0
    return dataclasses.replace(graphs, node_features=features)


def described(texts: Sequence[str], train: Array) -> Array:
    """fedmat's structure descriptors, absent values at the training mean."""
    values = StructureFeatures().transform(pd.DataFrame({"structure": list(texts)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.where(np.isfinite(values), values, np.nan_to_num(np.nanmean(values[train], axis=0)))


def elastic(quick: bool) -> dict[str, Any]:
    from pymatgen.core import Composition

    d = pd.read_csv(DATA / "mp_elastic_structures_join" / "elastic_structures.csv.gz")
    if quick:
        d = d.iloc[stream(0, "quick").permutation(len(d))[:300]]
    y = d[["log10_G_VRH", "log10_K_VRH"]].to_numpy(dtype=np.float64)
    texts = [json_of(c) for c in d["cif"]]
    graphs = crystal_graphs(texts)
    formula = CompositionFeatures().transform(pd.DataFrame({"formula": d["formula"]}))
    reduced = np.array([Composition(f).reduced_formula for f in d["formula"]])
    seeds = (0,) if quick else (0, 1, 2)
    steps = 100 if quick else 600
    splits = {s: hold_out(reduced, 0.2, s) for s in seeds}
    described_ = formula if quick else np.column_stack([formula, described(texts, np.arange(len(d)))])
    arms = {
        "composition": Arm(formula, None, y),
        "composition_and_descriptors": Arm(described_, None, y),
        "graph": Arm(formula[:, :0], graphs, y),
        "graph_without_angles": Arm(formula[:, :0], without_shape(graphs), y),
        "graph_and_composition": Arm(formula, graphs, y),
    }
    if quick:
        del arms["composition_and_descriptors"]
    out: dict[str, Any] = {
        "n": len(d),
        "test_rows": [len(te) for _, te in splits.values()],
        "unit": "log10 GPa, [shear, bulk]",
        "plan": {"seeds": len(seeds), "test_fraction": 0.2, "steps": steps, "batch": 32},
        "mean_predictor": {"mae": summary([np.abs(y[te] - y[tr].mean(0)).mean(0) for tr, te in splits.values()])},
    }
    for name, arm in arms.items():
        rate, clock = 1e-3 if arm.graphs is None else 2e-3, time.process_time()
        errors = [pooled(arm, tr, te, s, steps=steps, lr=rate, size=32).mean(0) for s, (tr, te) in splits.items()]
        put(out, name, clock, {"mae": summary(errors)})
        if arm.graphs is None:
            clock = time.process_time()
            errors = [forest(arm.x, y, tr, te, s).mean(0) for s, (tr, te) in splits.items()]
            put(out, f"{name}_forest", clock, {"mae": summary(errors)})
    return out


# --- (c) solid electrolytes --------------------------------------------------------------------------------------


def electrolytes(quick: bool) -> dict[str, Any]:
    from pymatgen.core import Composition

    folder = DATA / "obelix"
    tables = []
    for part in ("train", "test"):
        files = structures.read_texts(folder / f"{part}_cifs.tar.gz")
        table = pd.read_csv(folder / f"{part}.csv").assign(test=part == "test")
        if quick:
            table = table.iloc[::2]
        parsed = [structures.parse(files[i]) if i in files else None for i in table["ID"]]
        tables.append(table.assign(text=[str(p[1]) if p else "" for p in parsed]))
    d = pd.concat(tables, ignore_index=True)

    def readable(text: str) -> bool:
        try:
            return Composition(text).num_atoms > 0
        except Exception:  # noqa: BLE001  pymatgen raises anything
            return False

    d = d[[readable(t) for t in d["Reduced Composition"]]].reset_index(drop=True)
    y = np.log10(d["Ionic conductivity (S cm-1)"].astype(str).str.replace("<", "").astype(float).to_numpy())
    has, test = (d["text"] != "").to_numpy(), d["test"].to_numpy()
    both, every, held = np.flatnonzero(has & ~test), np.flatnonzero(~test), np.flatnonzero(has & test)
    started = time.process_time()
    graphs = crystal_graphs(list(d["text"]))
    spent = round(time.process_time() - started, 1)
    formula = CompositionFeatures().transform(pd.DataFrame({"formula": d["Reduced Composition"]}))
    blind = empty(len(d), graphs.n_node, 0)
    small = {"hidden": 32, "layers": 2, "dropout": 0.1}
    arms: dict[str, tuple[Arm, Array]] = {
        "composition": (Arm(formula, None, y), both),
        "composition_all_records": (Arm(formula, None, y), every),
        "graph_network_with_empty_graphs": (Arm(formula, blind, y, **small), both),
        "graph": (Arm(formula[:, :0], graphs, y, **small), both),
        "graph_and_composition": (Arm(formula, graphs, y, **small), both),
        "graph_and_composition_all_records": (Arm(formula, graphs, y, **small), every),
    }
    if not quick:
        table = np.column_stack([formula, described(list(d["text"]), both)])
        arms["composition_and_descriptors"] = (Arm(table, None, y), both)
        arms["composition_and_descriptors_all_records"] = (Arm(table, None, y), every)
        arms["graph_composition_and_descriptors"] = (Arm(table, graphs, y, **small), both)
        arms["graph_composition_and_descriptors_all_records"] = (Arm(table, graphs, y, **small), every)
    seeds, steps = ((0,), (60,)) if quick else ((0, 1, 2), (100, 300))
    out: dict[str, Any] = {
        "n": len(d),
        "train_rows_with_structure": len(both),
        "train_rows": len(every),
        "test_rows": len(held),
        "graphs": {
            "cpu_s": spent,
            "nodes_mean": round(float(graphs.nodes[-1] / has.sum()), 1),
            "edges_mean": round(float(graphs.edges[-1] / has.sum()), 1),
        },
        "unit": "log10 S/cm",
        "plan": {"seeds": len(seeds), "split": "OBELiX's own", "steps": steps, "batch": 32},
        "mean_predictor": {"mae": round(float(np.abs(y[held] - y[both].mean()).mean()), 4)},
    }
    for name, (arm, rows) in arms.items():
        clock = time.process_time()
        errors = {n: [pooled(arm, rows, held, s, steps=n, lr=1e-3, size=32).mean() for s in seeds] for n in steps}
        put(out, name, clock, {"mae_by_steps": {n: summary(e) for n, e in errors.items()}})
        if arm.graphs is None:
            clock = time.process_time()
            put(out, f"{name}_forest", clock, {"mae": summary([forest(arm.x, y, rows, held, s).mean() for s in seeds])})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fraction of the rows, steps and seeds: shows that it runs")
    quick = parser.parse_args().quick
    if not DATA.is_dir():
        sys.exit("FEDMAT_DATA names no folder")
    warnings.simplefilter("ignore")  # CIF parsers and spglib
    torch.set_num_threads(1)
    started = time.process_time()
    out: dict[str, Any] = {"quick": quick}
    out["solid_electrolytes"] = electrolytes(quick)
    out["elastic"] = elastic(quick)
    out["perovskites"] = perovskites(quick)
    out["cpu_s"] = round(time.process_time() - started, 1)
    json.dump(out, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
