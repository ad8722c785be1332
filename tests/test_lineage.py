"""One graph from a ledger: everything that went into a model is behind it, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import audit_scene as scene
import pytest
from ledger_scene import Scene

from fedmat import files, lineage
from fedmat.bundle import Bundle
from fedmat.errors import NotEvidenced
from fedmat.lineage import Edge, Graph, Node, dataset_id, model_id, round_id, site_id, update_id, weights_id

SITE = "argyrodite-ag"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Two runs of one consortium: the second on other data of every site."""
    home = tmp_path_factory.mktemp("two")
    first = scene.build(home, rounds=5, exclusions=True)
    return scene.build(home, run_id="r2", clock=first.clock, seed=2, weights_seed=2)


@pytest.fixture(scope="module")
def graph(found: Scene) -> Graph:
    return Graph.of(found.books.fold(), Bundle.open(found.bundle))


def model_of(found: Scene, run: str) -> str:
    return model_id(files.sha256_file(found.home / "runs" / run / "model.safetensors"))


def dataset_of(found: Scene, run: str, site: str = SITE) -> str:
    return dataset_id(files.read_json(found.home / "runs" / run / "attestations.json")["attestations"][site]["dataset_sha256"])


def test_three_boxes_by_hand() -> None:
    a, b, c = (Node(n, "dataset", n * 8, n) for n in "abc")
    graph = Graph([a, b, c], [Edge("b", "a", "derived_from"), Edge("c", "b", "derived_from")])
    assert [n.id for n in graph.ancestors("c")] == ["a", "b"]
    assert [n.id for n in graph.descendants("a")] == ["b", "c"]
    assert [(e.source, e.target) for e in graph.path("c", "a")] == [("c", "b"), ("b", "a")]
    assert graph.path("a", "c") == ()
    assert graph.layers() == (("a",), ("b",), ("c",))


def test_every_site_of_a_run_is_behind_its_model(found: Scene, graph: Graph) -> None:
    for run in ("r1", "r2"):
        behind = {n.id for n in graph.ancestors(model_of(found, run))}
        assert {dataset_of(found, run, s) for s in found.sites} <= behind
        assert {site_id(s) for s in found.sites} <= behind
        assert f"plan:{run}" in behind and "operator" in behind
        assert {n.kind for n in graph.ancestors(model_of(found, run))} >= {
            "source", "dataset", "features", "update", "round", "weights", "setup", "plan", "code", "environment", "site", "operator",
        }  # fmt: skip


def test_no_other_runs_data_are_behind_a_model(found: Scene, graph: Graph) -> None:
    assert dataset_of(found, "r1") not in {n.id for n in graph.ancestors(model_of(found, "r2"))}
    assert [n.id for n in graph.descendants(dataset_of(found, "r1"), "model")] == [model_of(found, "r1")]


def test_ancestors_and_descendants_are_one_relation(graph: Graph) -> None:
    for n in graph.nodes:
        for other in graph.ancestors(n.id):
            assert n.id in {x.id for x in graph.descendants(other.id)}


def test_rounds_stand_on_each_other_in_order(graph: Graph) -> None:
    ids = {n.id for n in graph.ancestors(round_id("r1", 4))}
    assert {round_id("r1", n) for n in range(4)} <= ids and {weights_id("r1", n) for n in range(4)} <= ids
    assert round_id("r1", 4) not in {n.id for n in graph.ancestors(round_id("r1", 3))}
    assert "setup:r1" in {n.id for n in graph.ancestors(round_id("r1", 0))}


def test_a_site_that_was_left_out_sent_nothing_to_that_round_but_is_in_the_model(found: Scene, graph: Graph) -> None:
    """Late in round 3 by the report: no update of it is there, and the joint scaling still is made of its data."""
    assert update_id("r1", 2, SITE) not in graph
    told = [n for n in graph.of_kind("exclusion", "r1") if n.attributes["site"] == SITE]
    assert [(n.attributes["round"], n.attributes["reason"]) for n in told] == [(2, "late")]
    assert any(e.source == "setup:r1" and e.relation == "used" for e in graph.edges)


def test_every_edge_leads_to_something_known_and_names_its_entry(found: Scene, graph: Graph) -> None:
    size = found.books.fold().size
    assert all(e.source in graph and e.target in graph and e.evidence is not None and e.evidence < size for e in graph.edges)
    assert all(n.evidence is not None and n.signed_by for n in graph.nodes)
    by = {e.evidence: e.signed_by for e in graph.edges}
    fold = found.books.fold()
    for run in fold.runs.values():
        for placed in run.all():
            assert by.get(placed.index, placed.entry.by) == placed.entry.by


def test_the_graph_has_no_circle_and_is_the_same_every_time(found: Scene, graph: Graph) -> None:
    assert sum(len(layer) for layer in graph.layers()) == len(graph.nodes)
    again = Graph.of(found.books.fold(), Bundle.open(found.bundle))
    assert again.as_json() == graph.as_json()
    assert {n.id for n in Graph.of(found.books.fold()).nodes} == {n.id for n in graph.nodes}


def test_a_files_word_is_taken_only_if_the_ledger_knows_its_digest(found: Scene) -> None:
    bundle = Bundle.open(found.bundle)
    told = Graph.of(found.books.fold(), bundle).node("plan:r2").attributes
    assert told["target"] == "conductivity_s_cm"
    forged = scene.changed(
        bundle, "run/plan.json", scene.edited(lambda v: v | {"task": {"name": "x", "target": "y", "unit": ""}})
    )
    assert "target" not in Graph.of(found.books.fold(), forged).node("plan:r2").attributes


def test_things_are_found_by_what_people_call_them(found: Scene, graph: Graph) -> None:
    model = model_of(found, "r2")
    digest = model.partition(":")[2]
    assert {graph.find(n, "model").id for n in (model, digest, digest[:8], "r2", "fedmat-solid-conductivity")} == {model}
    assert graph.find(SITE, "site", "dataset").id == site_id(SITE)
    twice = Graph([Node(f"model:{i}", "model", str(i) * 64, "same name") for i in (1, 2)], [])
    with pytest.raises(NotEvidenced, match="2 things"):
        twice.find("same name", "model")
    with pytest.raises(NotEvidenced, match="no model"):
        graph.find(digest[:7], "model")
    with pytest.raises(NotEvidenced):
        graph.ancestors("model:unknown")


def test_a_run_whose_rounds_are_cut_away_has_no_path_that_nobody_stated(found: Scene) -> None:
    """The ledger up to the first aggregate: no model yet, and what is there is there."""
    from fedmat.ledger.fold import Fold

    with found.books.open() as log:
        data = list(log.read())
    fold = Fold.of(data)
    cut = min(p.index for p in fold.runs["r1"].aggregates.values())
    early = Graph.of(Fold.of(data[:cut]))
    assert early.of_kind("model") == () and early.of_kind("round") == ()
    assert len(early.of_kind("update")) == 3 and len(early.of_kind("dataset")) == 3


def test_a_left_out_update_that_a_rule_saw_counts_as_looked_at(found: Scene) -> None:
    """Its digest is in the round's entry and it has no share: considered, so whoever wants to be out of the model still is in."""
    fold = found.books.fold()
    run = fold.runs["r2"]
    placed = run.aggregates[1]
    shares = {s: (0.0 if s == SITE else 0.5) for s in placed.entry.shares}
    run.aggregates[1] = type(placed)(placed.index, placed.entry.model_copy(update={"shares": shares}))
    graph = Graph.of(fold)
    assert lineage.counted(run.aggregates[1].entry) == ("garnet-gmbh", "lisicon-ltd")
    relation = {e.relation for e in graph.edges if (e.source, e.target) == (round_id("r2", 1), update_id("r2", 1, SITE))}
    assert relation == {"considered"}


def test_two_sites_that_hold_the_same_raw_file_are_not_each_others_source(found: Scene) -> None:
    fold = found.books.fold()
    run = fold.runs["r2"]
    for site, placed in run.datasets.items():
        run.datasets[site] = type(placed)(placed.index, placed.entry.model_copy(update={"sources": {"lab": "a" * 64}}))
    graph = Graph.of(fold)
    mine = {n.attributes["site"] for n in graph.descendants(site_id(SITE), "dataset", "source", "features")}
    assert mine == {SITE}
    assert {n.digest for n in graph.of_kind("source") if n.digest == "a" * 64} == {"a" * 64}


def test_the_home_of_no_data_is_in_the_graph(found: Scene, graph: Graph, tmp_path: Path) -> None:
    assert str(found.home) not in str(graph.as_json())
