"""One graph of what came from what: raw files, dataset versions, features, updates, rounds, models, and who stated each of it.

Knows: which entries of the ledger make which nodes and edges, in every run that the ledger holds. Refuses to know: whether the
ledger is whole (``fedmat.audit``), records, formats of other tools (``fedmat.provenance``).

An edge points from what came later to what it came from. Every node and edge names the entry that asserts it, so that a walk
through the graph is a list of entries to verify. What no entry states is not in the graph: a missing edge is a lack of evidence,
never evidence of a lack. The graph is conservative for whoever wants to be out of a model: whatever a run could have taken from a
site's data counts, the joint scaling, the intervals and the choice of a rule that saw an update and left it out included.

References:
    W3C, "PROV-DM: The PROV Data Model", 2013 (entities, activities, agents, and the names of the edges).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import networkx as nx

from fedmat import files
from fedmat.bundle import ENVIRONMENT, Bundle
from fedmat.errors import NotEvidenced, StateError
from fedmat.evidence import METRICS, PLAN
from fedmat.ledger.entries import OPERATOR
from fedmat.ledger.fold import Fold, Placed, RunEntries

Kind = Literal[
    "site", "operator", "source", "dataset", "features", "contract_report", "plan", "code", "environment", "setup", "update",
    "exclusion", "round", "weights", "model", "evaluation", "registration", "approval", "contribution", "prediction_batch",
]  # fmt: skip
"""``plan`` is a run as it was planned; ``setup`` what it did before its first round; ``prediction_batch`` is reserved."""
Relation = Literal["derived_from", "used", "generated_by", "attributed_to", "considered", "about"]
"""``considered``: a rule saw it and left it out, which may have changed what it took; ``about``: a statement's object."""

_NAMED_BY_DIGEST = ("source", "dataset", "contract_report", "model", "environment")
_SHOWN = 12  # digits of a digest in a label


@dataclass(frozen=True)
class Node:
    """A thing, an activity or a party.

    Attributes:
        id: the same in every graph of the same ledger, e.g. ``dataset:<sha256>``, ``update:<run>/<round>/<site>``.
        digest: SHA-256 in hex (of code: the git commit); "" where there is none.
        label: for people.
        attributes: plain JSON values.
        evidence: index of the ledger's entry that asserts it first; None of the reserved kind.
        signed_by: party that signed that entry.
        run: the run it belongs to; "" for what belongs to none or several.
    """

    id: str
    kind: Kind
    digest: str
    label: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    evidence: int | None = None
    signed_by: str = ""
    run: str = ""


@dataclass(frozen=True)
class Edge:
    """``source`` came from, was made with or belongs to ``target``.

    Attributes:
        evidence: index of the entry that asserts it first.
        signed_by: party that signed that entry.
    """

    source: str
    target: str
    relation: Relation
    evidence: int | None = None
    signed_by: str = ""


class Graph:
    """Nodes and edges over all runs of a ledger."""

    def __init__(self, nodes: Iterable[Node], edges: Iterable[Edge]) -> None:
        self._nodes = {n.id: n for n in nodes}
        self._edges = tuple(edges)
        self._graph: Any = nx.DiGraph()
        self._graph.add_nodes_from(self._nodes)
        self._graph.add_edges_from((e.source, e.target) for e in self._edges)

    @classmethod
    def of(cls, fold: Fold, bundle: Bundle | None = None) -> Graph:
        """Returns the graph of everything that the entries of a ledger state.

        Args:
            bundle: adds what its files say about its run to the nodes' attributes, where a file has the digest that the
                ledger states.
        """
        made = _Maker(fold, bundle)
        made.parties()
        for run in fold.runs.values():
            made.run(run)
        return cls(made.nodes.values(), made.edges.values())

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes, by the entry that asserts them, then by id."""
        return tuple(sorted(self._nodes.values(), key=lambda n: (-1 if n.evidence is None else n.evidence, n.id)))

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All edges, in the order of the entries that assert them."""
        return tuple(
            sorted(self._edges, key=lambda e: (-1 if e.evidence is None else e.evidence, e.source, e.target, e.relation))
        )

    def __contains__(self, id: str) -> bool:
        return id in self._nodes

    def node(self, id: str) -> Node:
        """Returns a node.

        Raises:
            NotEvidenced: no entry of the ledger states it.
        """
        if id not in self._nodes:
            raise NotEvidenced(f"the ledger states nothing about {id}", fix="fedmat audit verify lists what it holds")
        return self._nodes[id]

    def of_kind(self, kind: Kind, run: str | None = None) -> tuple[Node, ...]:
        """Returns all nodes of a kind, of one run or of all."""
        return tuple(n for n in self.nodes if n.kind == kind and run in (None, n.run))

    def find(self, name: str, *kinds: Kind) -> Node:
        """Returns the node that a person means: by id, digest, beginning of a digest (8 digits or more), or label.

        Raises:
            NotEvidenced: there is none, or more than one.
        """
        among = [n for n in self.nodes if not kinds or n.kind in kinds]
        for fits in (
            [n for n in among if name in (n.id, n.digest)],
            [n for n in among if n.label == name or name in n.attributes.get("names", ())],
            [n for n in among if len(name) >= 8 and n.digest.startswith(name)],
        ):
            if len(fits) == 1:
                return fits[0]
            if fits:
                raise NotEvidenced(
                    f"{name}: {len(fits)} things in the ledger are called so", fix=f"use one of {', '.join(n.id for n in fits)}"
                )
        what = " or ".join(kinds) or "thing"
        raise NotEvidenced(
            f"{name}: the ledger knows no {what} of this name or digest",
            fix=f"it knows {', '.join(sorted(n.label for n in among)) or 'none'}",
        )

    def ancestors(self, id: str, *kinds: Kind) -> tuple[Node, ...]:
        """Returns everything a node came from, near and far; of some kinds, or of all.

        Raises:
            NotEvidenced: there is no such node.
        """
        self.node(id)
        return self._sorted(nx.descendants(self._graph, id), kinds)

    def descendants(self, id: str, *kinds: Kind) -> tuple[Node, ...]:
        """Returns everything that came from a node, near and far; of some kinds, or of all.

        Raises:
            NotEvidenced: there is no such node.
        """
        self.node(id)
        return self._sorted(nx.ancestors(self._graph, id), kinds)

    def path(self, later: str, earlier: str) -> tuple[Edge, ...]:
        """Returns a shortest way from a node to one that it came from; empty where there is none."""
        try:
            steps = nx.shortest_path(self._graph, later, earlier)
        except (nx.NetworkXNoPath, nx.NodeNotFound):
            return ()
        known = {(e.source, e.target): e for e in self._edges}
        return tuple(known[pair] for pair in itertools.pairwise(steps))

    def only(self, ids: Iterable[str]) -> Graph:
        """Returns the graph of some nodes and the edges between them."""
        kept = set(ids)
        return Graph((n for n in self.nodes if n.id in kept), (e for e in self.edges if e.source in kept and e.target in kept))

    def layers(self) -> tuple[tuple[str, ...], ...]:
        """Returns the nodes' ids in layers: every edge leads to an earlier layer."""
        return tuple(tuple(sorted(layer)) for layer in nx.topological_generations(self._graph.reverse(copy=True)))

    def as_json(self) -> dict[str, Any]:
        """Returns nodes and edges as plain JSON."""
        return {
            "nodes": [
                {
                    "id": n.id, "kind": n.kind, "digest": n.digest, "label": n.label, "attributes": dict(n.attributes),
                    "evidence": n.evidence, "signed_by": n.signed_by, "run": n.run,
                }
                for n in self.nodes
            ],
            "edges": [
                {
                    "source": e.source, "target": e.target, "relation": e.relation, "evidence": e.evidence,
                    "signed_by": e.signed_by,
                }
                for e in self.edges
            ],
        }  # fmt: skip

    def _sorted(self, ids: Iterable[str], kinds: tuple[Kind, ...]) -> tuple[Node, ...]:
        found = (self._nodes[i] for i in ids)
        wanted = (n for n in found if not kinds or n.kind in kinds)
        return tuple(sorted(wanted, key=lambda n: (-1 if n.evidence is None else n.evidence, n.id)))


# --- ids -------------------------------------------------------------------------------------------------------------


def site_id(name: str) -> str:
    """Returns the id of a member's node."""
    return f"site:{name}"


def dataset_id(sha256: str) -> str:
    """Returns the id of a dataset version's node."""
    return f"dataset:{sha256}"


def model_id(sha256: str) -> str:
    """Returns the id of a model's node."""
    return f"model:{sha256}"


def update_id(run: str, number: int, site: str) -> str:
    """Returns the id of an update's node."""
    return f"update:{run}/{number}/{site}"


def round_id(run: str, number: int) -> str:
    """Returns the id of a round's node."""
    return f"round:{run}/{number}"


def weights_id(run: str, number: int) -> str:
    """Returns the id of the node of the weights after a round."""
    return f"weights:{run}/{number}"


def counted(aggregate: Any) -> tuple[str, ...]:
    """Returns the sites whose update moved the weights in an :class:`~fedmat.ledger.entries.AggregateEntry`."""
    return tuple(sorted(s for s, share in aggregate.shares.items() if share != 0))


# --- from entries to nodes -------------------------------------------------------------------------------------------


class _Maker:
    def __init__(self, fold: Fold, bundle: Bundle | None) -> None:
        self.fold, self.bundle = fold, bundle
        self.nodes: dict[str, Node] = {}
        self.edges: dict[tuple[str, str, str], Edge] = {}

    def add(self, id: str, kind: Kind, digest: str, label: str, placed: Placed, /, **attributes: Any) -> str:
        """Adds a node that an entry asserts; what a later entry says of a known node goes to its list of names alone."""
        known = self.nodes.get(id)
        run = getattr(placed.entry, "run", "")
        if known is None:
            shared = kind in (*_NAMED_BY_DIGEST, "features", "code", "site", "operator")
            self.nodes[id] = Node(id, kind, digest, label, attributes, placed.index, placed.entry.by, "" if shared else run)
        return id

    def edge(self, source: str, relation: Relation, target: str, placed: Placed) -> None:
        if source in self.nodes and target in self.nodes:
            self.edges.setdefault((source, target, relation), Edge(source, target, relation, placed.index, placed.entry.by))

    def parties(self) -> None:
        charter = self.fold.charter
        if charter is None:
            return
        places = {name: kept[0].since for name, kept in self.fold.history.items()}
        for name, index in sorted(places.items(), key=lambda item: item[1]):
            party = self.fold.history[name][-1].party
            if party.kind != "site":
                continue
            gone = next((p.index for p in self.fold.departures if p.entry.site == name), None)
            self.nodes[site_id(name)] = Node(
                site_id(name), "site", "", name, {"organisation": party.organisation, "left_with_entry": gone}, index, OPERATOR
            )
        operator = charter.entry.operator
        self.nodes["operator"] = Node(
            "operator", "operator", "", OPERATOR, {"organisation": operator.organisation}, places.get(OPERATOR, 0), OPERATOR
        )

    def run(self, run: RunEntries) -> None:
        name = run.plan.entry.run
        plan = self._plan(run)
        features = {site: self._data(placed) for site, placed in sorted(run.datasets.items())}
        for placed in run.reports.values():
            self._report(placed)
        setup = self.add(f"setup:{name}", "setup", "", f"{name}: scaling, duplicates", run.plan, run=name)
        self.edge(setup, "used", plan, run.plan)
        for site, id in features.items():
            self.edge(setup, "used", id, run.datasets[site])
        self._rounds(run, features, plan, setup)
        for placed in run.exclusions:
            self._exclusion(placed)
        if run.evaluation is not None:
            self._model(run, features, plan, setup)

    def _plan(self, run: RunEntries) -> str:
        placed, e = run.plan, run.plan.entry
        told = self._told(PLAN, e, lambda value: files.sha256(files.canonical_json(value)) == e.plan_sha256)
        task = {k: told["task"][k] for k in ("name", "target", "unit") if k in told.get("task", {})} if told else {}
        plan = self.add(
            f"plan:{e.run}", "plan", e.plan_sha256, e.run, placed, run=e.run, seed=e.seed, rounds=e.rounds,
            sites=list(e.sites), time=e.time, consortium_file_sha256=e.consortium_file_sha256, **task,
        )  # fmt: skip
        code = f"{e.git_commit or e.code_version}{'+changes' if e.git_dirty else ''}"
        self.add(
            f"code:{code}", "code", e.git_commit, f"fedmat {e.code_version} {code[:_SHOWN]}", placed, version=e.code_version,
            commit=e.git_commit, dirty=e.git_dirty,
        )  # fmt: skip
        env = self._environment(e)
        self.add(
            f"environment:{e.environment_sha256}", "environment", e.environment_sha256, f"Python {env.get('python', '')}".strip(),
            placed, **{k: env[k] for k in ("python", "system", "machine") if k in env},
        )  # fmt: skip
        self.edge(plan, "used", f"code:{code}", placed)
        self.edge(plan, "used", f"environment:{e.environment_sha256}", placed)
        self.edge(plan, "attributed_to", "operator", placed)
        return plan

    def _data(self, placed: Placed) -> str:
        e = placed.entry
        dataset = self.add(
            dataset_id(e.dataset_sha256), "dataset", e.dataset_sha256, f"{e.by} {e.version or e.dataset_sha256[:_SHOWN]}", placed,
            site=e.by, version=e.version, commit=e.git_commit, contract_version=e.contract_version, n_train=e.n_train,
        )  # fmt: skip
        self.edge(dataset, "attributed_to", site_id(e.by), placed)
        for name, sha256 in sorted(e.sources.items()):
            # of the site: two sites that hold the same file do not hand it to each other
            source = self.add(f"source:{sha256}@{e.by}", "source", sha256, f"{e.by}: {name}", placed, site=e.by, name=name)
            self.edge(source, "attributed_to", site_id(e.by), placed)
            self.edge(dataset, "derived_from", source, placed)
        features = self.add(
            f"features:{e.features_sha256}@{e.dataset_sha256}", "features", e.features_sha256,
            f"features of {e.by} {e.version or e.dataset_sha256[:_SHOWN]}", placed, site=e.by, n_train=e.n_train,
        )  # fmt: skip
        self.edge(features, "derived_from", dataset, placed)
        self.edge(features, "attributed_to", site_id(e.by), placed)
        return features

    def _report(self, placed: Placed) -> None:
        e = placed.entry
        report = self.add(
            f"contract_report:{e.validation_sha256}", "contract_report", e.validation_sha256, f"{e.by}: contract {e.contract_version}",
            placed, site=e.by, contract_version=e.contract_version, accepted=e.accepted, rejected=dict(e.rejected),
        )  # fmt: skip
        self.edge(report, "used", dataset_id(e.dataset_sha256), placed)
        self.edge(report, "attributed_to", site_id(e.by), placed)

    def _rounds(self, run: RunEntries, features: Mapping[str, str], plan: str, setup: str) -> None:
        name, before = run.plan.entry.run, setup  # the first weights are drawn from the plan's seed
        numbers = sorted({n for n, _ in run.updates} | set(run.aggregates))
        for number in numbers:
            for (n, site), placed in sorted(run.updates.items()):
                if n == number:
                    self._update(placed, features.get(site), before, plan)
            closed = run.aggregates.get(number)
            if closed is None:
                continue
            e = closed.entry
            id = self.add(
                round_id(name, number), "round", e.report_sha256, f"{name}: round {number + 1}", closed, run=name, round=number,
                rule=e.rule, protection=e.protection, shares=dict(e.shares),
            )  # fmt: skip
            self.edge(id, "used", before, closed)
            self.edge(id, "used", plan, closed)
            self.edge(id, "attributed_to", "operator", closed)
            taken = counted(e)
            for site in sorted({*taken, *e.updates}):
                update = update_id(name, number, site)
                if update not in self.nodes:  # the site did not sign for it: the operator's word alone
                    self._unsigned(closed, site, features.get(site))
                self.edge(id, "used" if site in taken else "considered", update, closed)
            weights = self.add(
                weights_id(name, number), "weights", e.model_sha256, f"{name}: weights after round {number + 1}", closed,
                run=name, round=number,
            )  # fmt: skip
            self.edge(weights, "generated_by", id, closed)
            before = weights

    def _update(self, placed: Placed, features: str | None, before: str, plan: str) -> None:
        e = placed.entry
        id = self.add(
            update_id(e.run, e.round, e.by), "update", e.sha256, f"{e.by}: round {e.round + 1}", placed, site=e.by, run=e.run,
            round=e.round, bytes=e.bytes, sealed=e.kind == "Sealed", signed=True,
        )  # fmt: skip
        self.edge(id, "attributed_to", site_id(e.by), placed)
        if features is not None:
            self.edge(id, "used", features, placed)
        self.edge(id, "used", before, placed)
        self.edge(id, "used", plan, placed)

    def _unsigned(self, closed: Placed, site: str, features: str | None) -> None:
        e = closed.entry
        id = self.add(
            update_id(e.run, e.round, site), "update", e.updates.get(site, ""), f"{site}: round {e.round + 1}", closed, site=site,
            run=e.run, round=e.round, signed=False,
        )  # fmt: skip
        self.edge(id, "attributed_to", site_id(site), closed)
        if features is not None:
            self.edge(id, "used", features, closed)

    def _exclusion(self, placed: Placed) -> None:
        e = placed.entry
        id = self.add(
            f"exclusion:{placed.index}", "exclusion", "", f"{e.site} left out: {e.reason}", placed, site=e.site, run=e.run,
            round=e.round, why=e.kind, reason=e.reason, detail=e.detail,
        )  # fmt: skip
        self.edge(id, "attributed_to", "operator", placed)
        update = update_id(e.run, e.round, e.site)
        self.edge(id, "about", update if update in self.nodes else site_id(e.site), placed)

    def _model(self, run: RunEntries, features: Mapping[str, str], plan: str, setup: str) -> None:
        placed = run.evaluation
        if placed is None:
            return
        e, name = placed.entry, run.plan.entry.run
        told = self._told(METRICS, e, lambda _: self._digest(METRICS) == e.metrics_sha256)
        registered = run.registration
        called = str(told["model"]["name"]) if told and "model" in told else ""
        if registered is not None:
            called = registered.entry.name
        version = f"{called} v{registered.entry.version}" if registered is not None else called
        names = {n for n in (called, version, name) if n}
        model = model_id(e.model_sha256)
        if model in self.nodes:  # two runs can make the same model
            known = self.nodes[model]
            names |= set(known.attributes["names"])
            self.nodes[model] = replace(known, attributes={**known.attributes, "names": sorted(names)})
        label = version or f"model of {name}"
        self.add(model, "model", e.model_sha256, label, placed, run=name, weights_sha256=e.weights_sha256, names=sorted(names))
        last = weights_id(name, max(run.aggregates, default=-1))
        self.edge(model, "derived_from", last, placed)
        self.edge(model, "generated_by", setup, placed)  # scaling and intervals are in the model's file
        self.edge(model, "attributed_to", "operator", placed)
        evaluation = self.add(
            f"evaluation:{name}", "evaluation", e.metrics_sha256, f"{name}: {e.metric}", placed, run=name, metric=e.metric,
            score=e.score, held_out_sha256=e.held_out_sha256, evaluations_sha256=e.evaluations_sha256,
            intervals_sha256=e.intervals_sha256, matching_sha256=e.matching_sha256,
        )  # fmt: skip
        self.edge(evaluation, "used", model, placed)
        self.edge(evaluation, "used", plan, placed)
        self.edge(evaluation, "attributed_to", "operator", placed)
        for id in features.values():
            self.edge(evaluation, "used", id, placed)
        self._about_model(run, model, evaluation)

    def _about_model(self, run: RunEntries, model: str, evaluation: str) -> None:
        name = run.plan.entry.run
        for placed in run.contributions:
            e = placed.entry
            id = self.add(
                f"contribution:{placed.index}", "contribution", e.evidence_sha256, f"{name}: contribution, {e.method}", placed,
                run=name, method=e.method, shares=dict(e.shares), errors=dict(e.errors),
            )  # fmt: skip
            self.edge(id, "about", model, placed)
            self.edge(id, "attributed_to", "operator", placed)
        if (placed_r := run.registration) is not None:
            e = placed_r.entry
            id = self.add(
                f"registration:{placed_r.index}", "registration", e.model_sha256, f"{e.name} v{e.version}", placed_r, run=name,
                name=e.name, version=e.version, aliases=list(e.aliases), decision=e.decision,
            )  # fmt: skip
            self.edge(id, "about", model, placed_r)
            self.edge(id, "used", evaluation, placed_r)
            self.edge(id, "attributed_to", "operator", placed_r)
        for site, placed in sorted(run.approvals.items()):
            e = placed.entry
            word = "approves" if e.approves else "does not approve"
            id = self.add(
                f"approval:{placed.index}", "approval", e.metrics_sha256, f"{site} {word}", placed, site=site, run=name,
                approves=e.approves, note=e.note,
            )  # fmt: skip
            self.edge(id, "about", model, placed)
            self.edge(id, "used", evaluation, placed)
            self.edge(id, "attributed_to", site_id(site), placed)

    # --- what the bundle's files add -------------------------------------------------------------------------------

    def _told(self, name: str, entry: Any, fits: Any) -> dict[str, Any]:
        """Returns what a file of the run says, if it is the one that the ledger means; else nothing."""
        if self.bundle is None or self.bundle.run != entry.run:
            return {}
        try:
            value = self.bundle.json(name)
            return dict(value) if isinstance(value, dict) and fits(value) else {}
        except (StateError, ValueError, KeyError, TypeError):
            return {}  # fedmat.audit names it

    def _environment(self, entry: Any) -> dict[str, Any]:
        return self._told(ENVIRONMENT, entry, lambda _: self._digest(ENVIRONMENT) == entry.environment_sha256)

    def _digest(self, name: str) -> str:
        data = self.bundle.run_data(name) if self.bundle is not None else None
        return "" if data is None else files.sha256(data)
