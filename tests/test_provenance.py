"""One lineage, three standards: each export says what the graph says, is valid by its own standard's means, and gives nothing away."""

from __future__ import annotations

import dataclasses
import enum
import json
import platform
import re
import shutil
import socket
import types
import typing
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attr
import leaks
import ledger_scene
import networkx as nx
import pytest
from jsonschema import Draft202012Validator, FormatChecker
from openlineage.client import event_v2, facet_v2
from prov.model import ProvDocument
from rocrate.rocrate import ROCrate

from fedmat import accounts, files, provenance
from fedmat.bundle import LEDGER, Bundle
from fedmat.errors import ConfigError, NotEvidenced, ProtocolError, StateError
from fedmat.ledger import entries
from fedmat.ledger.entries import ApprovalEntry
from fedmat.ledger.fold import Fold
from fedmat.ledger.text import stamp
from fedmat.lineage import Edge, Graph
from fedmat.provenance import crate, events, w3c
from fedmat.provenance.story import Story

SECRET = "Li7P3S11 at 0.0173 S/cm in /srv/plant-seven/melts.csv on host kiln-controller-4"
RUN, MODEL_NAME = "r1", "fedmat-solid-conductivity"
OURS = json.loads((Path(__file__).parent.parent / "docs/schemas/openlineage-facets.json").read_bytes())
OUR_FACETS = {"fedmat_evidence": "EvidenceFacet", "fedmat_contract": "ContractFacet", "fedmat_step": "StepFacet"}
THEIR_FACETS: dict[str, type] = {
    "version": facet_v2.dataset_version_dataset.DatasetVersionDatasetFacet,
    "documentation": facet_v2.documentation_job.DocumentationJobFacet,
    "jobType": facet_v2.job_type_job.JobTypeJobFacet,
    "parent": facet_v2.parent_run.ParentRunFacet,
    "processing_engine": facet_v2.processing_engine_run.ProcessingEngineRunFacet,
    "errorMessage": facet_v2.error_message_run.ErrorMessageRunFacet,
    "outputStatistics": facet_v2.output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet,
}
FOREIGN_NAMES = {
    "openlineage.io", "w3id.org", "www.w3.org", "schema.org", "spdx.org", "bioschemas.org", "www.python.org", "openprovenance.org",
}  # fmt: skip


@dataclass
class Exported:
    bundle: Bundle
    fold: Fold
    graph: Graph
    home: Path
    out: Path

    @property
    def story(self) -> Story:
        return Story.of(self.graph, self.bundle)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / provenance.EVENTS).read_text().splitlines()]

    @property
    def crate(self) -> Path:
        return self.out / provenance.CRATE

    @property
    def entities(self) -> dict[str, dict[str, Any]]:
        return {e["@id"]: e for e in json.loads((self.crate / crate.METADATA).read_bytes())["@graph"]}

    @property
    def model(self) -> str:
        return self.graph.of_kind("model")[0].id


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A run of three sites with a site that was late and one that was rejected, approved, registered and exported."""
    home = tmp_path_factory.mktemp("provenance") / "home-of-the-operator"
    scene = ledger_scene.build(home, sites=3, rounds=5, exclusions=True)
    for site in scene.sites:  # what no export may pick up
        (scene.run.site_folder(site) / "records.csv").write_text(SECRET)
    fold = scene.books.fold()
    evaluation = fold.runs[RUN].evaluation
    assert evaluation is not None
    about = {"consortium": fold.consortium, "run": RUN, "model_sha256": evaluation.entry.model_sha256}
    with scene.books.open() as log:
        for site in scene.sites[:2]:
            said = ApprovalEntry(
                **about,
                by=site,
                time=stamp(scene.clock()),
                metrics_sha256=evaluation.entry.metrics_sha256,
                approves=True,
                note=SECRET,
            )
            log.append([entries.seal(said, [scene.keys(site)])])
    accounts.register(
        scene.books,
        RUN,
        MODEL_NAME,
        7,
        evaluation.entry.model_sha256,
        ("challenger",),
        f"better than v6; {SECRET}",
        scene.clock(),
    )
    bundle = Bundle.open(accounts.pack(scene.books, RUN, scene.folder))
    fold = Fold.of(bundle.ledger().entries)
    graph = Graph.of(fold, bundle)
    out = tmp_path_factory.mktemp("out")
    assert set(provenance.write(graph, bundle, out)) == set(provenance.FORMATS)
    return Exported(bundle, fold, graph, home, out)


def with_nodes(graph: Graph, change: Any) -> Graph:
    return Graph((change(n) for n in graph.nodes), graph.edges)


# --- OpenLineage -----------------------------------------------------------------------------------------------------


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON schema of one of the client's generated classes, which are made from the specification's own schema."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema_of(a) for a in args if a is not type(None)]}  # the client leaves out what is None
    if origin is list:
        return {"type": "array", "items": schema_of(args[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(args[1])}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [e.value for e in kind]}
    if attr.has(kind):
        attr.resolve_types(kind)
        fields = {a.name: schema_of(a.type) for a in attr.fields(kind)}
        for name, form in {"runId": "uuid", "eventTime": "date-time"}.items():
            if name in fields:
                fields[name] |= {"format": form}
        needed = [
            a.name for a in attr.fields(kind) if a.default is attr.NOTHING or a.name in ("producer", "schemaURL", "_producer")
        ]
        is_base = kind in (facet_v2.RunFacet, facet_v2.JobFacet, facet_v2.DatasetFacet, facet_v2.InputDatasetFacet,
                           facet_v2.OutputDatasetFacet)  # fmt: skip
        return {"type": "object", "properties": fields, "required": needed, "additionalProperties": is_base}
    return {str: {"type": "string"}, int: {"type": "integer"}, bool: {"type": "boolean"}, float: {"type": "number"}}.get(
        kind, {}
    )


def facets_of(event: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from event["run"]["facets"].items()
    yield from event["job"]["facets"].items()
    for dataset in (*event["inputs"], *event["outputs"]):
        yield from dataset["facets"].items()
        yield from dataset.get("inputFacets", {}).items()
        yield from dataset.get("outputFacets", {}).items()


def wrong(event: dict[str, Any]) -> list[str]:
    """What is not as the client's classes, or our published schema, have it."""
    check = FormatChecker()
    found = [e.message for e in Draft202012Validator(schema_of(event_v2.RunEvent), format_checker=check).iter_errors(event)]
    for key, facet in facets_of(event):
        schema = {**OURS, "$ref": f"#/$defs/{OUR_FACETS[key]}"} if key in OUR_FACETS else schema_of(THEIR_FACETS[key])
        found += [f"{key}: {e.message}" for e in Draft202012Validator(schema, format_checker=check).iter_errors(facet)]
        if key in THEIR_FACETS and facet["_schemaURL"] != THEIR_FACETS[key]._get_schema():  # type: ignore[attr-defined]
            found.append(f"{key}: another version of the facet")
    return found


def test_every_event_is_one_by_the_clients_classes_and_every_facet_by_its_schema(exported: Exported) -> None:
    assert len(exported.events) > 60
    for event in exported.events:
        assert wrong(event) == []
        assert event["schemaURL"] == event_v2.RunEvent._get_schema()
        event_v2.Run(event["run"]["runId"])  # the client's own checks
        assert urllib.parse.urlparse(event["producer"]).scheme == "urn"


@pytest.mark.parametrize("damage", [
    lambda e: e.update(eventType="DONE"),
    lambda e: e.pop("producer"),
    lambda e: e["run"].update(runId="7"),
    lambda e: e["run"]["facets"]["fedmat_step"].update(host="kiln"),
    lambda e: e["run"]["facets"]["fedmat_step"].pop("entry"),
    lambda e: e["inputs"][0]["facets"]["fedmat_evidence"].update(sha256="ab"),
    lambda e: e["job"]["facets"]["jobType"].pop("integration"),
])  # fmt: skip
def test_a_wrong_event_would_be_noticed(exported: Exported, damage: Any) -> None:
    event = next(e for e in exported.events if e["job"]["name"] == "round" and e["eventType"] == "COMPLETE")
    assert wrong(event) == []
    damage(event)
    assert wrong(event) != []


def test_our_facets_are_published_as_a_schema_and_name_no_domain() -> None:
    Draft202012Validator.check_schema(OURS)
    assert OURS["$id"] == events.SCHEMA
    assert not re.search(r"https?://(?!json-schema\.org)", json.dumps(OURS))


def test_every_run_begins_once_ends_at_most_once_and_not_before_it_began(exported: Exported) -> None:
    seen: dict[str, list[str]] = {}
    times: dict[str, str] = {}
    for event in exported.events:
        run = event["run"]["runId"]
        seen.setdefault(run, []).append(event["eventType"])
        assert event["eventTime"] >= times.get(run, "")
        times[run] = event["eventTime"]
    assert set(map(tuple, seen.values())) == {("START", "COMPLETE"), ("START", "FAIL")}
    assert [e["eventTime"] for e in exported.events] == sorted(e["eventTime"] for e in exported.events)


def test_a_round_is_part_of_the_run_and_a_sites_training_part_of_the_round(exported: Exported) -> None:
    ids = {e["run"]["runId"]: (e["job"]["name"], e["run"]["facets"]) for e in exported.events}
    trained = 0
    for job, facets in ids.values():
        if job == "round":
            assert ids[facets["parent"]["run"]["runId"]][0] == "run"
        if job.startswith("train."):
            trained += 1
            above = ids[facets["parent"]["run"]["runId"]]
            assert above[0] == "round" and above[1]["fedmat_step"]["round"] == facets["fedmat_step"]["round"]
            assert facets["parent"]["root"]["job"]["name"] == "run"
    assert trained == 3 * 5


def test_a_site_that_was_late_and_one_that_was_rejected_failed_with_the_reason(exported: Exported) -> None:
    failed = {
        (e["job"]["name"], e["run"]["facets"]["fedmat_step"]["round"]): e["run"]["facets"]["errorMessage"]["message"]
        for e in exported.events
        if e["eventType"] == "FAIL"
    }
    assert failed == {("train.argyrodite-ag", 2): "late", ("train.lisicon-ltd", 4): "non_finite"}


def test_a_run_whose_end_no_entry_states_does_not_end(exported: Exported) -> None:
    evaluated = exported.fold.runs[RUN].evaluation
    assert evaluated is not None
    unfinished = Graph.of(Fold.of(exported.bundle.ledger().entries[: evaluated.index]), exported.bundle)
    about_run = [e["eventType"] for e in provenance.openlineage(unfinished, exported.bundle) if e["job"]["name"] == "run"]
    assert about_run == ["START"]
    last = max(exported.fold.runs[RUN].aggregates.values(), key=lambda p: p.index)
    open_round = Graph.of(Fold.of(exported.bundle.ledger().entries[: last.index]), exported.bundle)
    rounds = [e["eventType"] for e in provenance.openlineage(open_round, exported.bundle) if e["job"]["name"] == "round"]
    assert sorted(rounds) == ["COMPLETE"] * 4 + ["START"] * 5


def test_walking_the_events_back_from_the_model_finds_the_data_that_the_graph_finds(exported: Exported) -> None:
    def key(dataset: dict[str, Any]) -> tuple[str, str, str]:
        return dataset["namespace"], dataset["name"], dataset["facets"].get("version", {}).get("datasetVersion", "")

    back = nx.DiGraph()
    for event in exported.events:
        for output in event["outputs"]:
            back.add_edges_from((key(output), key(i)) for i in event["inputs"])
    (model,) = (n for n in back if n[1] == "model")
    found = {n[2] for n in nx.descendants(back, model) if n[1] == "records"}
    assert found == {n.digest for n in exported.graph.ancestors(exported.model, "dataset")} and len(found) == 3


def test_each_dataset_names_the_entry_that_states_it_and_who_signed(exported: Exported) -> None:
    opened = [entries.open_envelope(d)[0] for d in exported.bundle.ledger().entries]
    for event in exported.events:
        for dataset in (*event["inputs"], *event["outputs"]):
            told = dataset["facets"]["fedmat_evidence"]
            assert (opened[told["entry"]].by, opened[told["entry"]].time) == (told["signedBy"], told["stated"])
    updates = [e["outputs"][0] for e in exported.events if e["job"]["name"].startswith("train.") and e["outputs"]]
    assert all(u["facets"]["fedmat_evidence"]["leftSite"] < u["facets"]["fedmat_evidence"]["stated"] for u in updates)
    assert all(u["outputFacets"]["outputStatistics"]["size"] > 0 for u in updates)


def test_nothing_is_sent_whatever_the_environment_says(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setenv("OPENLINEAGE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "http")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    provenance.write(exported.graph, exported.bundle, tmp_path)


# --- PROV ------------------------------------------------------------------------------------------------------------


def test_prov_json_and_prov_n_say_the_same_and_can_be_read_again(exported: Exported) -> None:
    document = provenance.prov_document(exported.graph, exported.bundle)
    again = ProvDocument.deserialize(content=(exported.out / provenance.PROV_JSON).read_text(), format="json")
    text = ProvDocument.deserialize(content=(exported.out / provenance.PROV_N).read_text(), format="provn")
    assert again == document == text
    assert len(document.unified().get_records()) == len(document.get_records())  # nothing is stated twice, nothing contradicts


def test_prov_is_valid(exported: Exported) -> None:
    """PROV-CONSTRAINTS: types that exclude each other, one generation, no derivation in a circle; and nothing undeclared."""
    told = json.loads((exported.out / provenance.PROV_JSON).read_bytes())
    kinds = [set(told[k]) for k in ("entity", "activity", "agent")]
    assert not kinds[0] & kinds[1] and not kinds[1] & kinds[2] and not kinds[0] & kinds[2]
    known = set().union(*kinds)
    derived, generated = nx.DiGraph(), set()
    for name, records in told.items():
        if name in ("prefix", "entity", "activity", "agent"):
            continue
        for record in records.values():
            ends = {k: v for k, v in record.items() if k.startswith("prov:") and isinstance(v, str) and v.startswith("run:")}
            assert len(ends) >= 2 and set(ends.values()) <= known, (name, record)
            if name == "wasDerivedFrom":
                derived.add_edge(record["prov:generatedEntity"], record["prov:usedEntity"])
            if name == "wasGeneratedBy":
                assert record["prov:entity"] not in generated
                generated.add(record["prov:entity"])
    assert nx.is_directed_acyclic_graph(derived)


def test_what_the_model_was_derived_from_is_what_the_graph_says(exported: Exported) -> None:
    told = json.loads((exported.out / provenance.PROV_JSON).read_bytes())
    derived = nx.DiGraph((r["prov:generatedEntity"], r["prov:usedEntity"]) for r in told["wasDerivedFrom"].values())
    found = {n for n in nx.descendants(derived, f"run:{w3c.local(exported.model)}") if n.startswith("run:dataset/")}
    assert found == {f"run:{w3c.local(n.id)}" for n in exported.graph.ancestors(exported.model, "dataset")}
    for name in found:
        (owner,) = (r["prov:agent"] for r in told["wasAttributedTo"].values() if r["prov:entity"] == name)
        assert owner.startswith("run:site/")


def test_an_update_that_the_rule_left_out_is_told_apart_and_nothing_derives_from_it(exported: Exported) -> None:
    left_out = f"update:{RUN}/0/garnet-gmbh"

    def change(e: Edge) -> Edge:
        return dataclasses.replace(e, relation="considered") if (e.source, e.target) == (f"round:{RUN}/0", left_out) else e

    graph = Graph(exported.graph.nodes, map(change, exported.graph.edges))
    told = json.loads(w3c.as_json(provenance.prov_document(graph, exported.bundle)))
    uses = [r for r in told["used"].values() if r["prov:entity"] == f"run:{w3c.local(left_out)}"]
    assert [u["prov:role"]["$"] for u in uses] == ["fedmat:considered"]
    assert all(r["prov:usedEntity"] != f"run:{w3c.local(left_out)}" for r in told["wasDerivedFrom"].values())
    inputs = [i for e in provenance.openlineage(graph, exported.bundle) if e["job"]["name"] == "round" for i in e["inputs"]]
    counted = {i["facets"]["fedmat_evidence"].get("counted") for i in inputs if "garnet-gmbh" in i["namespace"]}
    assert counted == {True, False}


# --- RO-Crate --------------------------------------------------------------------------------------------------------


def ids(value: Any) -> list[str]:
    return [v["@id"] for v in (value if isinstance(value, list) else [value]) if isinstance(v, dict)]


def kinds_of(entity: dict[str, Any]) -> set[str]:
    return set(entity["@type"]) if isinstance(entity["@type"], list) else {entity["@type"]}


def test_the_crate_can_be_read_again_and_every_file_has_the_digest_that_is_stated(exported: Exported) -> None:
    read = ROCrate(exported.crate)
    here = {p.relative_to(exported.crate).as_posix() for p in exported.crate.rglob("*") if p.is_file()} - {crate.METADATA}
    assert {e.id for e in read.data_entities} == here
    for entity in read.data_entities:
        assert files.sha256_file(exported.crate / entity.id) == entity["sha256"]
        if entity.id in exported.bundle.contents:
            assert (exported.crate / entity.id).read_bytes() == exported.bundle.contents[entity.id]


def test_the_crate_is_what_the_profile_demands(exported: Exported) -> None:
    """The MUSTs of RO-Crate 1.1 and of the process, workflow and provenance run crates 0.5; `make check-crate` asks the validator."""
    told = exported.entities
    root, descriptor = told["./"], told[crate.METADATA]
    assert ids(descriptor["about"]) == ["./"] and "https://w3id.org/ro/crate/1.1" in ids(descriptor["conformsTo"])
    assert {"name", "description", "license", "datePublished"} <= set(root)
    profiles = {f"https://w3id.org/ro/wfrun/{p}/0.5" for p in ("process", "workflow", "provenance")}
    assert profiles <= set(ids(root["conformsTo"])) and all(kinds_of(told[p]) == {"CreativeWork"} for p in profiles)
    workflow = told[ids(root["mainEntity"])[0]]
    assert kinds_of(workflow) == {"File", "SoftwareSourceCode", "ComputationalWorkflow", "HowTo"}
    assert kinds_of(told[ids(workflow["programmingLanguage"])[0]]) == {"ComputerLanguage"}
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for entity in told.values():
        for kind in kinds_of(entity):
            by_kind.setdefault(kind, []).append(entity)
    actions = by_kind["CreateAction"]
    assert len([a for a in actions if ids(a["instrument"]) == [workflow["@id"]]]) == 1
    for action in actions:
        assert kinds_of(told[ids(action["instrument"])[0]]) & {"SoftwareApplication", "ComputationalWorkflow"}
        assert kinds_of(told[ids(action["agent"])[0]]) == {"Organization"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", action["endTime"])
    assert set(ids(root["mentions"])) == {a["@id"] for a in actions}
    tools = set(ids(workflow["hasPart"]))
    assert tools and all(any(ids(a["instrument"]) == [t] for a in actions) for t in tools)
    for step in by_kind["HowToStep"]:
        assert step["@id"] in ids(workflow["step"]) and set(ids(step["workExample"])) <= tools
    for control in by_kind["ControlAction"]:
        assert kinds_of(told[ids(control["instrument"])[0]]) == {"HowToStep"}
        assert kinds_of(told[ids(control["object"])[0]]) == {"CreateAction"}
    (engine,) = by_kind["OrganizeAction"]
    assert kinds_of(told[ids(engine["instrument"])[0]]) == {"SoftwareApplication"}
    assert len(ids(engine["object"])) == len(by_kind["ControlAction"]) == len(actions) - 1
    files_in_parts = set(ids(root["hasPart"]))
    assert {f["@id"] for f in by_kind["File"]} == files_in_parts


def test_every_reference_in_the_crate_leads_somewhere_in_it(exported: Exported) -> None:
    outside = ("https://w3id.org/ro/crate/", "https://w3id.org/workflowhub/", "https://bioschemas.org/")
    for entity in exported.entities.values():
        for key, value in entity.items():
            assert not (isinstance(value, list) and len(value) == 1), (entity["@id"], key)
            for id in ids(value):
                assert id in exported.entities or id.startswith(outside), (entity["@id"], key, id)


def test_data_and_updates_are_described_with_their_digest_and_not_contained(exported: Exported) -> None:
    told = exported.entities
    for node in (*exported.graph.of_kind("dataset"), *exported.graph.of_kind("update"), *exported.graph.of_kind("source")):
        entity = told[f"#{urllib.parse.quote(node.id)}"]
        assert entity["sha256"] == node.digest and kinds_of(entity) == {"CreativeWork"}
        assert ids(entity["creator"]) == [f"#{urllib.parse.quote('site:' + node.attributes['site'])}"]
    update = told["#" + urllib.parse.quote(f"update:{RUN}/0/garnet-gmbh")]
    assert any("features" in id for id in ids(update["isBasedOn"]))
    names = {e.get("name") for e in told.values()}
    assert f"{MODEL_NAME} version 7" in names and f"{RUN}: word of argyrodite-ag" in names


def test_a_crate_for_the_public_holds_what_the_charter_publishes(exported: Exported, tmp_path: Path) -> None:
    provenance.write(exported.graph, exported.bundle, tmp_path, ("ro-crate",), audience="public")
    told = {e["@id"]: e for e in json.loads((tmp_path / provenance.CRATE / crate.METADATA).read_bytes())["@graph"]}
    here = {p.name for p in (tmp_path / provenance.CRATE).rglob("*") if p.is_file()}
    assert here == {crate.METADATA, crate.README, "federate.py", "dvc.yaml"}  # this charter publishes nothing
    withheld = told["#run/model.safetensors"]
    assert withheld["sha256"] == exported.graph.of_kind("model")[0].digest and "File" not in kinds_of(withheld)
    published = dataclasses.replace(exported.story.charter, published={"metrics": "public"})
    story = dataclasses.replace(exported.story, charter=published)
    assert {n for n in exported.bundle.contents if crate.shared(n, story, "public")} == {
        "run/metrics.json",
        "run/intervals.json",
    }
    assert not crate.shared("run/consortium.yaml", story, "members")  # it has paths in it


def test_a_folder_that_is_no_crate_is_not_written_over(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StateError, match="no crate"):
        provenance.ro_crate(exported.graph, exported.bundle, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


# --- all three -------------------------------------------------------------------------------------------------------


def test_the_same_ledger_gives_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    provenance.write(exported.graph, exported.bundle, tmp_path)
    provenance.write(exported.graph, exported.bundle, tmp_path)  # over what is there

    def everything(folder: Path) -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert everything(tmp_path) == everything(exported.out)


def test_no_export_has_a_word_of_people_a_path_a_host_or_a_record_in_it(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = "kiln-controller-5"
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    monkeypatch.setattr(platform, "node", lambda: host)

    def planted(node: Any) -> Any:
        told = dict(node.attributes)
        for key in ("name", "reason", "detail", "version", "contract_version") if node.kind != "registration" else ():
            if key in told and node.kind != "code":
                told[key] = SECRET
        label = SECRET if node.kind in ("source", "dataset", "exclusion", "model") else node.label
        return dataclasses.replace(node, attributes=told, label=label)

    contents = {**exported.bundle.contents, "run/records.csv": SECRET.encode(), "notes.txt": SECRET.encode()}
    bundle = dataclasses.replace(exported.bundle, contents=contents)
    provenance.write(with_nodes(exported.graph, planted), bundle, tmp_path)
    everything = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not [p for p in everything if p.name in ("records.csv", "notes.txt")]
    secrets = [
        w.encode() for w in (*SECRET.split(), str(exported.home), exported.home.name, str(tmp_path), socket.gethostname())
    ]
    secrets = [s for s in secrets if len(s) > 4]
    for path in everything:
        if path.name == LEDGER:
            continue  # signed as it is; members wrote into it what all members may read
        text = leaks.unwrapped(iter([path]))
        assert [s for s in secrets if s in text] == [], path.name
    ledger = leaks.unwrapped(iter([tmp_path / provenance.CRATE / LEDGER]))
    assert b"kiln-controller-4" in ledger  # the search finds what is there


def test_no_name_in_the_web_is_used_that_belongs_to_somebody_else_than_a_standard(exported: Exported) -> None:
    paths = [exported.out / n for n in (provenance.EVENTS, provenance.PROV_JSON, provenance.PROV_N)]
    for path in (*paths, exported.crate / crate.METADATA):
        assert {
            urllib.parse.urlparse(u).hostname for u in re.findall(r"https?://[^\s\"'<>]+", path.read_text())
        } <= FOREIGN_NAMES


def test_a_run_whose_data_were_used_before_has_a_story_of_its_own(tmp_path: Path) -> None:
    scene = ledger_scene.build(tmp_path / "home", sites=3, rounds=1)
    second = scene.another("r2", rounds=1)
    bundle = Bundle.open(second.bundle)
    graph = Graph.of(Fold.of(bundle.ledger().entries), bundle)
    written = provenance.write(graph, bundle, tmp_path / "out")
    told = {e["@id"]: e for e in json.loads((written["ro-crate"] / crate.METADATA).read_bytes())["@graph"]}
    assert len([i for i in told if i.startswith("#prepare/")]) == 3 and "#round/r2/0" in told and "#round/r1/0" not in told
    jobs = [json.loads(line)["job"]["name"] for line in written["openlineage"].read_text().splitlines()]
    assert jobs.count("round") == 4 and jobs.count("prepare.garnet-gmbh") == 2
    ProvDocument.deserialize(content=written["prov"].read_text(), format="json")


def test_what_cannot_be_exported_is_refused_by_name(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="croissant"):
        provenance.write(exported.graph, exported.bundle, tmp_path, ("croissant",))
    without = dataclasses.replace(exported.bundle, contents={k: v for k, v in exported.bundle.contents.items() if k != LEDGER})
    with pytest.raises(ProtocolError, match="evidence_missing"):
        provenance.openlineage(exported.graph, without)
    other = dataclasses.replace(exported.bundle, run="r9")
    with pytest.raises(NotEvidenced, match="r9"):
        provenance.ro_crate(exported.graph, other, tmp_path / "crate")
    assert not (tmp_path / "crate").exists()
    shutil.rmtree(tmp_path)
