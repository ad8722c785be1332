"""An audit of a bundle: what is whole is proved, every kind of tampering is refuted at its place, what is missing is never a pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import audit_scene as scene
import ledger_scene
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_scene import Scene, model

from fedmat import files, keys, wire
from fedmat.audit import BEYOND, Answer, Audit
from fedmat.bundle import LEDGER, MANIFEST, Bundle, egress_file, run_file
from fedmat.checks import PROVED, REFUTED, UNKNOWN, Check, close, strict_json, verify, worst
from fedmat.domain import GlobalModel
from fedmat.errors import FedmatError, NotEvidenced
from fedmat.keys import PartyKeys
from fedmat.ledger import entries as ledger_entries
from fedmat.ledger import merkle, notes
from fedmat.ledger.text import stamp

SITE, OTHER = "argyrodite-ag", "garnet-gmbh"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A finished run in its ledger; never changed."""
    return scene.build(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def bundle(whole: Scene) -> Bundle:
    """Its evidence bundle."""
    return Bundle.open(whole.bundle)


@pytest.fixture(scope="module")
def anchor(whole: Scene) -> str:
    """The digest that members told by telephone."""
    return whole.charter_sha256


def problems(found: tuple[Check, ...], verdict: str = REFUTED) -> list[Check]:
    return [c for c in found if c.verdict == verdict]


def named(answers: tuple[Answer, ...], name: str) -> Answer:
    return next(a for a in answers if a.name == name)


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_nothing_is_never_a_pass() -> None:
    assert worst([]) == UNKNOWN
    assert worst([PROVED, UNKNOWN]) == UNKNOWN
    assert worst([PROVED, UNKNOWN, REFUTED]) == REFUTED
    assert worst([PROVED, PROVED]) == PROVED


def test_a_whole_bundle_is_proved(bundle: Bundle, anchor: str) -> None:
    found = verify(bundle, anchor)
    assert [c for c in found if c.verdict != PROVED] == []
    assert {c.topic.partition(":")[0] for c in found} >= {
        "packing", "entries", "checkpoints", "keys", "plan", "environment", "dataset", "contract", "round", "update", "exclusion",
        "model", "metrics", "evaluations", "intervals", "matching", "egress",
    }  # fmt: skip


def test_every_answer_of_a_whole_bundle_has_its_evidence(bundle: Bundle, anchor: str) -> None:
    audit = Audit.of(bundle, anchor)
    for answers in audit.summary().values():
        for a in answers:
            assert (a.verdict == PROVED) == (a.place == ""), a
            if a.verdict == PROVED:
                assert a.evidence and a.limits + a.said
                assert all(p.signed_by and len(p.sha256) == 64 and p.how for p in a.evidence)
    doubtful = {a.name for answers in audit.summary().values() for a in answers if a.verdict != PROVED}
    assert doubtful <= {"trained", "reproduced", "predictions", "worth", "code"}  # code: this checkout may be changed


def test_without_the_charters_digest_everything_is_relative_and_says_so(bundle: Bundle, anchor: str) -> None:
    audit = Audit.of(bundle)
    mine = named(audit.history(), "keys")
    assert mine.verdict == UNKNOWN and anchor in mine.said and "telephone" in mine.said
    others = [a for a in audit.why() if a.name in ("datasets", "rounds", "parameters", "score")]
    assert all(a.verdict == PROVED and "the bundle's own charter" in a.limits for a in others)


def test_another_consortiums_digest_refutes_every_answer(bundle: Bundle) -> None:
    audit = Audit.of(bundle, "0" * 64)
    assert audit.anchored == REFUTED
    assert all(a.verdict == REFUTED for s in audit.summary().values() for a in s if a.place != BEYOND and a.evidence)


# --- tampering, by somebody who packs again but has no key -----------------------------------------------------------


def record_version(told: dict) -> dict:  # type: ignore[type-arg]
    told["attestations"][SITE]["dataset_sha256"] = "f" * 64
    return told


def metric(told: dict) -> dict:  # type: ignore[type-arg]
    told["global"]["federated"]["mae"] *= 0.5
    return told


def evaluation(told: list) -> list:  # type: ignore[type-arg]
    told[0]["sums"][1] *= 0.5
    return told


def share(found: list[bytes]) -> list[bytes]:
    report = json.loads(found[1])
    sites = sorted(report["shares"])
    report["shares"] = {s: 0.9 if s == sites[0] else 0.1 / (len(sites) - 1) for s in sites}
    return [found[0], json.dumps(report, sort_keys=True).encode() + b"\n", *found[2:]]


def tensor(data: bytes) -> bytes:
    found = wire.decode(data, GlobalModel)
    name = sorted(found.weights)[0]
    weights = {**found.weights, name: found.weights[name] + np.float32(1e-3)}
    return wire.encode(GlobalModel(weights, found.scaler, found.spec))


def egress_bytes(found: list[bytes]) -> list[bytes]:
    line = json.loads(found[1])
    return [found[0], files.canonical_json({**line, "bytes": line["bytes"] - 1}) + b"\n", *found[2:]]


FILES: dict[str, tuple[str, Callable[[bytes], bytes | None], str, str]] = {
    "record version": (run_file("attestations.json"), scene.edited(record_version), f"dataset:{SITE}", SITE),
    "metric": (run_file("metrics.json"), scene.edited(metric), "metrics", "run/metrics.json"),
    "evaluation": (run_file("evaluations.json"), scene.edited(evaluation), "evaluations", "run/evaluations.json"),
    "intervals": (run_file("intervals.json"), scene.edited(lambda v: v | {"half_width": 0.1}), "intervals", "run/intervals.json"),
    "matching": (run_file("matching.json"), scene.edited(lambda v: v | {"leaks": ["x"]}), "matching", "run/matching.json"),
    "plan": (run_file("plan.json"), scene.edited(lambda v: v | {"simulated": False}), "plan", "run/plan.json"),
    "environment": (run_file("environment.json"), scene.edited(lambda v: v | {"python": "2.7"}), "environment", "run/environment.json"),
    "consortium file": (run_file("consortium.yaml"), lambda d: d + b"#", "consortium_file", "run/consortium.yaml"),
    "weight of an update": (run_file("rounds.jsonl"), scene.lines(share), "round:1", "run/rounds.jsonl line 2"),
    "order of rounds": (run_file("rounds.jsonl"), scene.lines(lambda f: f[::-1]), "round:0", "run/rounds.jsonl line 1"),
    "a round left out": (run_file("rounds.jsonl"), scene.lines(lambda f: f[:-1]), "round", "run/rounds.jsonl"),
    "weight of the model": (run_file("model.safetensors"), tensor, "model", "run/model.safetensors"),
    "swapped model": (run_file("model.safetensors"), lambda _: wire.encode(model(3)), "model", "run/model.safetensors"),
    "egress line": (egress_file(SITE), scene.lines(egress_bytes), f"egress:{SITE}", f"egress/{SITE}.jsonl"),
    "egress line left out": (egress_file(SITE), scene.lines(lambda f: f[:-1]), f"egress:{SITE}", f"egress/{SITE}.jsonl"),
    "egress of another site": (egress_file(SITE), lambda _: b"", f"egress:{SITE}", f"egress/{SITE}.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_was_tampered_with_is_refuted_at_its_place(kind: str, bundle: Bundle, anchor: str) -> None:
    name, change, topic, place = FILES[kind]
    found = verify(scene.changed(bundle, name, change), anchor)
    assert any(c.topic == topic and place in c.place for c in problems(found)), problems(found)
    assert {c.topic.partition(":")[0] for c in problems(found)} <= {topic.partition(":")[0], "round", "exclusion"}


def forged(bundle: Bundle, kind: str, /, **fields: object) -> Callable[[list[bytes]], list[bytes]]:
    at = scene.index_of(bundle, kind)
    return lambda found: [*found[:at], scene.with_payload(found[at], **fields), *found[at + 1 :]]


def entry_kinds(bundle: Bundle) -> dict[str, tuple[Callable[[list[bytes]], list[bytes]], str, str]]:
    """Kind of tampering with entries -> change, place, reason."""
    update, aggregate = scene.index_of(bundle, "update"), scene.index_of(bundle, "aggregate")
    dataset, score = scene.index_of(bundle, "dataset"), scene.index_of(bundle, "evaluation")
    size = len(scene.entry_lines(bundle))
    return {
        "record version": (forged(bundle, "dataset", dataset_sha256="e" * 64), f"entry {dataset}", "bad_signature"),
        "update": (forged(bundle, "update", sha256="e" * 64), f"entry {update}", "bad_signature"),
        "weight": (forged(bundle, "aggregate", shares={SITE: 1}), f"entry {aggregate}", "bad_signature"),
        "metric": (forged(bundle, "evaluation", score=0.01), f"entry {score}", "bad_signature"),
        "order": (
            lambda f: [*f[:update], f[update + 1], f[update], *f[update + 2 :]], f"checkpoint of {size} entries", "forked_log",
        ),
        "deletion": (lambda f: [*f[:update], *f[update + 1 :]], f"checkpoint of {size} entries", "truncated_log"),
        "truncation": (lambda f: f[:-1], f"checkpoint of {size} entries", "truncated_log"),
        "replay": (lambda f: [*f, f[update]], f"entry {size}", "replayed_entry"),
        "no charter": (lambda f: f[1:], "entry 0", "truncated_log"),
        "unknown type": (forged(bundle, "egress", type="gossip"), f"entry {scene.index_of(bundle, 'egress')}", "unknown_entry"),
        "another consortium": (forged(bundle, "plan", consortium="others"), f"entry {scene.index_of(bundle, 'plan')}", "foreign_bundle"),
    }  # fmt: skip


KINDS = (
    "record version", "update", "weight", "metric", "order", "deletion", "truncation", "replay", "no charter", "unknown type",
    "another consortium",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_that_was_tampered_with_is_refuted_at_its_place(kind: str, bundle: Bundle, anchor: str) -> None:
    change, place, reason = entry_kinds(bundle)[kind]
    changed = scene.changed(bundle, LEDGER, scene.entries(change))
    found = problems(verify(changed, anchor))
    assert any((c.place, c.reason) == (place, reason) for c in found), found
    audit = Audit.of(changed, anchor)
    assert named(audit.history(), "edited").verdict == REFUTED
    why = named(audit.why(), "datasets")
    if kind == "replay":  # put in after all that the checkpoint fixes
        assert why.verdict == PROVED
    else:
        assert why.verdict == REFUTED and why.place


def test_what_stands_before_the_broken_part_is_not_called_refuted(tmp_path: Path) -> None:
    """Two runs in one ledger: a forged entry of the second leaves what a checkpoint fixed of the first as it was."""
    first = scene.build(tmp_path)
    before = first.charter_sha256
    second = scene.build(tmp_path, run_id="r2", clock=first.clock, weights_seed=2)
    both = Bundle.open(first.bundle)
    late = Bundle.open(second.bundle)
    joined = scene.opened({**both.contents, LEDGER: late.contents[LEDGER]}, both)
    change = scene.entries(lambda f: [*f[:-1], scene.with_payload(f[-1], score=0.0)])
    audit = Audit.of(scene.changed(joined, LEDGER, change), before)
    assert named(audit.history(), "edited").verdict == REFUTED
    assert named(audit.why(), "datasets").verdict == PROVED
    assert named(audit.impact(SITE), "free").verdict == REFUTED  # what else was made of it stands in the broken part


def signed(whole: Scene, body: str, keys_of: PartyKeys) -> str:
    origin = f"fedmat/{whole.books.consortium}"
    return notes.sign(body, origin, keys_of)


def with_checkpoints(bundle: Bundle, change: Callable[[list[str]], list[str]]) -> Bundle:
    size = len(scene.entry_lines(bundle))

    def apply(data: bytes) -> bytes:
        found = data.splitlines()
        told = [json.loads(line)["checkpoint"] for line in found[size + 1 :]]
        new = [files.canonical_json({"checkpoint": note}) for note in change(told)]
        return b"".join(line + b"\n" for line in (*found[: size + 1], *new))

    return scene.changed(bundle, LEDGER, apply)


def test_a_checkpoint_of_another_history_shows_a_fork(whole: Scene, bundle: Bundle, anchor: str) -> None:
    """The operator signed two histories; even without cosignatures that is evidence against it."""
    size = len(scene.entry_lines(bundle))
    body = notes.checkpoint(f"fedmat/{whole.books.consortium}", size - 1, b"\x07" * 32)
    forked = with_checkpoints(bundle, lambda told: [signed(whole, body, whole.operator), *told])
    found = problems(verify(forked, anchor))
    assert [(c.place, c.reason) for c in found] == [(f"checkpoint of {size - 1} entries", "forked_log")]
    assert named(Audit.of(forked, anchor).why(), "score").verdict == REFUTED


def test_a_checkpoint_by_somebody_else_refutes_itself_alone(whole: Scene, bundle: Bundle, anchor: str) -> None:
    stranger = PartyKeys.new("operator")
    size = len(scene.entry_lines(bundle))
    body = notes.checkpoint(f"fedmat/{whole.books.consortium}", size - 1, b"\x07" * 32)
    audit = Audit.of(with_checkpoints(bundle, lambda told: [signed(whole, body, stranger), *told]), anchor)
    assert named(audit.history(), "edited").verdict == REFUTED
    assert named(audit.why(), "datasets").verdict == PROVED  # a later checkpoint that holds covers every entry


def test_a_stale_checkpoint_covers_nothing_after_it(whole: Scene, bundle: Bundle, anchor: str) -> None:
    lines = scene.entry_lines(bundle)
    size = scene.index_of(bundle, "evaluation")
    body = notes.checkpoint(f"fedmat/{whole.books.consortium}", size, merkle.root_of(merkle.leaf_hash(d) for d in lines[:size]))
    note = signed(whole, body, whole.operator)
    for site in whole.sites:
        note += notes.cosign(body, f"{whole.books.consortium}/{site}", whole.keys(site), 1_772_438_400)
    audit = Audit.of(with_checkpoints(bundle, lambda _: [note]), anchor)
    stale = [c for c in audit.checks if c.reason == "stale_checkpoint"]
    assert stale and stale[0].verdict == UNKNOWN and stale[0].place == f"entry {size}"
    assert named(audit.why(), "parameters").verdict == PROVED
    assert named(audit.why(), "score").verdict == UNKNOWN
    assert named(audit.history(), "edited").verdict == UNKNOWN


def test_without_a_checkpoint_nothing_is_proved(bundle: Bundle, anchor: str) -> None:
    audit = Audit.of(with_checkpoints(bundle, lambda _: []), anchor)
    assert all(a.verdict == UNKNOWN for a in (*audit.why(), *audit.who()))


def test_too_few_cosignatures_leave_the_history_open(bundle: Bundle, anchor: str) -> None:
    def alone(told: list[str]) -> list[str]:
        return [note[: note.index("\n", note.index("\n\n") + 2) + 1] for note in told]  # the operator's line alone

    audit = Audit.of(with_checkpoints(bundle, alone), anchor)
    assert next(c.reason for c in audit.checks if c.topic == "checkpoints" and c.verdict == UNKNOWN) == "no_quorum"
    assert not problems(audit.checks)
    assert named(audit.why(), "datasets").verdict == UNKNOWN
    assert named(audit.history(), "witnessed").verdict == UNKNOWN


def test_a_back_dated_key_is_refuted(whole: Scene, bundle: Bundle, anchor: str) -> None:
    """A new key signs an entry before the rotation that brings it: it was nobody's key then."""
    new = PartyKeys.new(SITE)
    at = scene.index_of(bundle, "dataset", by=SITE)

    def apply(found: list[bytes]) -> list[bytes]:
        entry, _ = ledger_entries.open_envelope(found[at])
        return [*found[:at], ledger_entries.seal(entry, [new]), *found[at + 1 :]]

    found = problems(verify(scene.changed(bundle, LEDGER, scene.entries(apply)), anchor))
    assert any((c.place, c.reason) == (f"entry {at}", "bad_signature") for c in found)


def test_the_old_key_counts_no_more_after_its_rotation(tmp_path: Path) -> None:
    found = scene.build(tmp_path)
    bundle = Bundle.open(found.bundle)
    old = found.keys(SITE)
    new = PartyKeys.new(SITE, old.kem)
    folder = found.run.party_folder(SITE) / "keys"
    now = found.clock()
    rotation = keys.rotate(old, keys.entry_of(folder), new, keys.entry_of(folder).not_after, now.date())
    lines = scene.entry_lines(bundle)
    about = {"consortium": found.books.consortium, "time": now.strftime("%Y-%m-%dT%H:%M:%SZ")}
    turned = ledger_entries.seal(ledger_entries.RotationEntry(**about, by=SITE, rotation=rotation), [old])
    first, _ = ledger_entries.open_envelope(lines[scene.index_of(bundle, "egress", by=SITE)])
    again = ledger_entries.seal(first.model_copy(update={"time": about["time"], "objects": 99}), [old])
    checks = problems(verify(scene.changed(bundle, LEDGER, scene.entries(lambda f: [*f, turned, again]))))
    assert any((c.place, c.reason) == (f"entry {len(lines) + 1}", "key_not_in_force") for c in checks), checks


# --- what is missing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        run_file(n)
        for n in (
            "plan.json", "attestations.json", "rounds.jsonl", "model.safetensors", "evaluations.json", "metrics.json", "intervals.json",
            "matching.json", "environment.json", "consortium.yaml",
        )
    ]
    + [egress_file(SITE), LEDGER],
)  # fmt: skip
def test_a_missing_file_is_not_evidenced_and_asked_for(name: str, bundle: Bundle, anchor: str) -> None:
    changed = scene.changed(bundle, name, lambda _: None)
    found = verify(changed, anchor)
    assert problems(found) == []
    lacking = [c for c in found if c.verdict == UNKNOWN and name in c.place]
    assert lacking and all(c.reason == "evidence_missing" for c in lacking)
    if name != LEDGER:
        assert any("entr" in c.what for c in lacking), "an entry says that it exists"
    unpacked = Bundle(changed.path, changed.consortium, changed.run, {k: v for k, v in bundle.contents.items() if k != name})
    assert any(c.topic == "packing" and c.place == name and c.verdict == UNKNOWN for c in verify(unpacked, anchor))


@pytest.mark.parametrize(
    ("name", "answer"),
    [("plan.json", "parameters"), ("environment.json", "environment"), ("metrics.json", "score"), ("rounds.jsonl", "rounds")],
)
def test_what_rests_on_a_missing_file_is_not_evidenced(name: str, answer: str, bundle: Bundle, anchor: str) -> None:
    audit = Audit.of(scene.changed(bundle, run_file(name), lambda _: None), anchor)
    assert named(audit.why(), answer).verdict == UNKNOWN
    assert name in named(audit.why(), answer).place
    assert named(audit.why(), "contract").verdict == PROVED


def test_a_bundle_about_a_run_that_the_ledger_does_not_know(bundle: Bundle, anchor: str) -> None:
    audit = Audit.of(Bundle(bundle.path, bundle.consortium, "r9", bundle.contents), anchor)
    for a in (*audit.why(), *audit.who(), *audit.what_left(SITE)):
        assert a.verdict == UNKNOWN and "r9" in a.said


def test_a_bundle_that_says_it_is_of_another_consortium_is_refuted(bundle: Bundle, anchor: str) -> None:
    found = problems(verify(Bundle(bundle.path, "others", bundle.run, bundle.contents), anchor))
    assert "foreign_bundle" in {c.reason for c in found}


def test_the_ledger_of_another_consortium_does_not_fit_the_files(tmp_path: Path, bundle: Bundle, anchor: str) -> None:
    """Same names, other keys: everything is signed, and not by these members."""
    other = Bundle.open(scene.build(tmp_path).bundle)
    audit = Audit.of(scene.opened({**bundle.contents, LEDGER: other.contents[LEDGER]}, bundle), anchor)
    assert audit.anchored == REFUTED


# --- answers ---------------------------------------------------------------------------------------------------------


def test_why_names_every_dataset_with_who_signed_for_it(whole: Scene, bundle: Bundle, anchor: str) -> None:
    found = named(Audit.of(bundle, anchor).why(), "datasets")
    attested = files.read_json(whole.folder / "attestations.json")["attestations"]
    assert {r["site"]: r["dataset_sha256"] for r in found.value} == {s: a["dataset_sha256"] for s, a in attested.items()}
    assert {r["rounds"] for r in found.value} == {"1-2"}
    by = {p.entry: p.signed_by for p in found.evidence}
    assert all(by[r["entry"]] == (r["site"],) for r in found.value)
    assert "signed word" in found.limits


def test_a_model_can_be_asked_for_by_digest_name_and_run(bundle: Bundle, anchor: str) -> None:
    audit = Audit.of(bundle, anchor)
    digest = files.sha256(bundle.contents[run_file("model.safetensors")])
    for name in (digest, digest[:12], "r1", f"model:{digest}"):
        assert audit.why(name) == audit.why()
    with pytest.raises(NotEvidenced, match="no model"):
        audit.why("nobody")


def test_what_left_lists_every_object_and_reconciles_it(bundle: Bundle, anchor: str) -> None:
    answers = Audit.of(bundle, anchor).what_left(SITE)
    objects = named(answers, "objects")
    book = [json.loads(line) for line in bundle.contents[egress_file(SITE)].splitlines()]
    assert objects.value["lines"] == book
    assert objects.value["bytes"] == sum(n["bytes"] for n in book)
    assert [r["fate"] for r in named(answers, "arrived").value] == ["taken", "taken"]
    with pytest.raises(NotEvidenced, match="no site"):
        Audit.of(bundle, anchor).what_left("nobody")


def counted_otherwise(found: Scene, folder: Path, site: str = SITE, **fields: object) -> None:
    """Makes the coordinator's last report say something else of a site, before it enters the ledger."""
    path = folder / "rounds.jsonl"
    reports = [json.loads(line) for line in path.read_text().splitlines()]
    for key, value in fields.items():
        reports[-1][key] = {**reports[-1][key], site: value}
    path.write_text("".join(json.dumps(r, sort_keys=True) + "\n" for r in reports))


def test_bytes_that_arrived_and_did_not_leave_are_refuted(tmp_path: Path) -> None:
    """All of it is signed: the operator's report says more than the site's book."""
    found = ledger_scene.build(tmp_path, account=False)
    counted_otherwise(found, found.folder, bytes_up=10_000)
    scene.metrics(found)
    scene.account(found)
    audit = Audit.of(Bundle.open(found.bundle), found.charter_sha256)
    arrived = named(audit.what_left(SITE), "arrived")
    assert arrived.verdict == REFUTED and "line 2" in arrived.place
    assert named(audit.what_left(OTHER), "arrived").verdict == PROVED


def test_an_update_that_the_site_did_not_send_is_not_evidenced_by_it(tmp_path: Path) -> None:
    """The site does not sign for what its book does not hold, and the operator's word alone proves nothing."""
    found = ledger_scene.build(tmp_path, account=False)
    counted_otherwise(found, found.folder, updates="a" * 64)
    scene.metrics(found)
    scene.account(found)
    audit = Audit.of(Bundle.open(found.bundle), found.charter_sha256)
    assert named(audit.why(), "datasets").verdict == UNKNOWN
    assert SITE in named(audit.why(), "datasets").place
    assert named(audit.what_left(SITE), "objects").verdict == UNKNOWN


def test_who_was_left_out_is_named_with_round_and_reason(tmp_path: Path) -> None:
    found = scene.build(tmp_path, rounds=5, exclusions=True)
    answer = named(Audit.of(Bundle.open(found.bundle), found.charter_sha256).who(), "left_out")
    assert answer.verdict == PROVED
    assert [(r["site"], r["round"], r["reason"]) for r in answer.value] == [
        (SITE, 3, "late"), (found.sites[-1], 5, "non_finite"),
    ]  # fmt: skip


@pytest.mark.parametrize("told", [True, False], ids=["with a reason", "without one"])
def test_a_site_that_never_took_part_is_accounted_for(told: bool, tmp_path: Path) -> None:
    found = ledger_scene.build(tmp_path, account=False)
    gone = found.sites[-1]
    path, attested = found.folder / "rounds.jsonl", files.read_json(found.folder / "attestations.json")
    reports = [json.loads(line) for line in path.read_text().splitlines()]
    for r in reports:
        r["accepted"].remove(gone)
        r |= {"shares": dict.fromkeys(r["accepted"], 0.5), "updates": {s: r["updates"][s] for s in r["accepted"]}}
    path.write_text("".join(json.dumps(r, sort_keys=True) + "\n" for r in reports))
    del attested["attestations"][gone]
    why = {"kind": "dropout", "site": gone, "reason": "late", "detail": ""}
    files.write_json(found.folder / "attestations.json", attested | {"failures": [why] if told else []})
    scene.metrics(found)
    scene.account(found)
    audit = Audit.of(Bundle.open(found.bundle), found.charter_sha256)
    answer = named(audit.who(), "left_out")
    assert answer.verdict == (PROVED if told else UNKNOWN)
    assert [(r["site"], r["round"]) for r in answer.value] == ([(gone, "before")] if told else [])
    assert gone in answer.said + answer.place
    assert not problems(audit.checks)


def test_impact_names_the_models_and_who_is_left_to_train(bundle: Bundle, anchor: str) -> None:
    audit = Audit.of(bundle, anchor)
    dataset = named(audit.why(), "datasets").value[0]["dataset_sha256"]
    for asked in (SITE, dataset, dataset[:10]):
        affected, retrain, free = audit.impact(asked)
        assert [r["rounds"] for r in affected.value] == ["1-2"]
        assert retrain.value[0]["sites"] == ["garnet-gmbh", "lisicon-ltd"]
        assert retrain.value[0]["enough"] is True
        assert free.value == []
    with pytest.raises(NotEvidenced):
        audit.impact("nobody")


def test_a_model_of_other_data_is_proved_free_of_a_dataset(tmp_path: Path) -> None:
    first = scene.build(tmp_path)
    second = scene.build(tmp_path, run_id="r2", clock=first.clock, weights_seed=2, seed=2)
    audit = Audit.of(Bundle.open(second.bundle), first.charter_sha256)
    old = audit.fold.runs["r1"].datasets[SITE].entry.dataset_sha256
    affected, retrain, free = audit.impact(old)
    assert [r["run"] for r in affected.value] == ["r1"]
    assert [(r["run"], r["free"]) for r in free.value] == [("r2", True)]
    assert affected.verdict == free.verdict == PROVED
    assert retrain.verdict == UNKNOWN, "the quorum of r1 is in its own bundle"


def test_a_share_of_the_rounds_gain_is_summed_again(tmp_path: Path) -> None:
    found = ledger_scene.build(tmp_path, account=False)
    for site in found.sites:
        counted_otherwise(found, found.folder, site=site, contribution=0.25)
    scene.metrics(found)
    scene.account(found)
    bundle = Bundle.open(found.bundle)
    worth = named(Audit.of(bundle, found.charter_sha256).who(), "worth")
    assert worth.verdict == PROVED
    assert {(r["site"], r["method"], r["share"]) for r in worth.value} == {(s, "gram", 0.25) for s in found.sites}
    without = Audit.of(scene.changed(bundle, run_file("rounds.jsonl"), lambda _: None), found.charter_sha256)
    assert named(without.who(), "worth").verdict == UNKNOWN


def test_a_settlement_that_no_auditor_signed_is_refuted(tmp_path: Path) -> None:
    """The operator wrote the file and its entry; the shares agree with each other, and nobody else vouches for them."""
    found = ledger_scene.build(tmp_path, account=False)
    scene.metrics(found)
    told = {
        "schema": "fedmat/settlement/1", "plan_sha256": found.run.plan().sha256, "run": "n" * 32, "excluded": {}, "held_out_gain": 0.3,
        "model_sha256": found.run.reports()[-1]["model_sha256"],
        "sites": {s: {"share": 0.1, "error": 0.01, "credits": 333} for s in found.sites},
        "auditor": {"request_sha256": "0" * 64, "charter_sha256": "0" * 64, "signature": "00" * 64},
    }  # fmt: skip
    files.write_json(found.folder / "settlement.json", told)
    scene.account(found)
    bundle = Bundle.open(found.bundle)
    audit = Audit.of(bundle, found.charter_sha256)
    assert named(audit.who(), "worth").verdict == REFUTED
    assert {c.reason for c in problems(audit.checks)} <= {"unknown_member", "bad_settlement", "bad_signature"}
    edited = scene.changed(bundle, run_file("settlement.json"), scene.edited(lambda v: v | {"held_out_gain": 0.4}))
    assert "wrong_digest" in {c.reason for c in problems(verify(edited, found.charter_sha256))}


def test_an_approval_is_named_with_who_gave_it(tmp_path: Path) -> None:
    found = scene.build(tmp_path)
    entry = found.books.fold().runs["r1"].evaluation
    assert entry is not None
    about = {"consortium": found.books.consortium, "run": "r1", "model_sha256": entry.entry.model_sha256}
    said = ledger_entries.ApprovalEntry(
        **about,
        by=SITE,
        time=stamp(found.clock()),
        metrics_sha256=entry.entry.metrics_sha256,
        approves=True,
        note="looked at it",
    )
    with found.books.open() as log:
        log.append([ledger_entries.seal(said, [found.keys(SITE)])])
    audit = Audit.of(Bundle.open(scene.packed(found)), found.charter_sha256)
    answer = named(audit.who(), "approved")
    assert answer.verdict == PROVED
    assert [(r["site"], r["approves"], r["note"]) for r in answer.value["approvals"]] == [(SITE, True, "looked at it")]
    assert answer.value["champion"] is False and answer.value["registered"] is False


def test_after_a_departure_a_model_without_the_site_is_proved_free(tmp_path: Path) -> None:
    first = scene.build(tmp_path)
    data = first.books.fold().runs["r1"].datasets[SITE].entry.dataset_sha256
    gone = ledger_entries.DepartureEntry(
        consortium=first.books.consortium, by=SITE, time=stamp(first.clock()), site=SITE, reason="sold", datasets=(data,)
    )
    with first.books.open() as log:
        log.append([ledger_entries.seal(gone, [first.operator, first.keys(SITE)])])
        assert SITE not in first.books.fold().sites
    audit = Audit.of(Bundle.open(scene.packed(first)), first.charter_sha256)
    affected, retrain, free = audit.impact(SITE)
    assert [r["run"] for r in affected.value] == ["r1"] and affected.verdict == PROVED
    assert retrain.value[0]["sites"] == ["garnet-gmbh", "lisicon-ltd"]
    assert free.value == []
    assert named(audit.history(), "witnessed").verdict == PROVED


# --- the laws of a bundle --------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_byte_leaves_everything_proved(data: st.DataObject, bundle: Bundle, anchor: str) -> None:
    name = data.draw(st.sampled_from(sorted(bundle.contents)))
    content = bytearray(bundle.contents[name])
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    changed = {**bundle.contents, name: bytes(content)}
    if name == MANIFEST:  # the list is read before anything is checked
        try:
            told = json.loads(bytes(content))
            assert told["schema"] == json.loads(bundle.contents[MANIFEST])["schema"]
            found = Bundle(bundle.path, str(told["consortium"]), str(told["run"]), changed)
        except (ValueError, KeyError, TypeError, AssertionError):
            return  # Bundle.open refuses it
    else:
        found = Bundle(bundle.path, bundle.consortium, bundle.run, changed)
    assert worst(c.verdict for c in verify(found, anchor)) != PROVED


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_bundle_packed_again_with_one_byte_changed_is_found_too(data: st.DataObject, bundle: Bundle, anchor: str) -> None:
    """Of what an entry fixes; a list that the forger made again vouches for nothing."""
    name = data.draw(st.sampled_from([
        LEDGER, egress_file(SITE), *map(run_file, ("metrics.json", "evaluations.json", "model.safetensors", "consortium.yaml")),
    ]))  # fmt: skip
    content = bytearray(bundle.contents[name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    found = scene.opened({**bundle.contents, name: bytes(content)}, bundle)
    assert worst(c.verdict for c in verify(found, anchor)) != PROVED


def test_the_file_as_it_is_packed_and_a_folder_of_it_give_the_same_answers(whole: Scene, tmp_path: Path, anchor: str) -> None:
    shutil.unpack_archive(whole.bundle, tmp_path / "b", "zip")
    a, b = (Audit.of(Bundle.open(p), anchor) for p in (whole.bundle, tmp_path / "b"))
    assert a.summary() == b.summary()
    (tmp_path / "b" / "audit.html").write_text("made by the auditor")
    stray = [c for c in Audit.of(Bundle.open(tmp_path / "b"), anchor).checks if c.verdict != PROVED]
    assert [(c.place, c.verdict) for c in stray] == [("audit.html", UNKNOWN)]


@pytest.mark.parametrize("text", [b'{"a": 1, "a": 2}', b'{"a": NaN}', b"{", b"[1, Infinity]"])
def test_a_file_that_two_readers_read_differently_is_no_json(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        strict_json(text)


def test_numbers_agree_up_to_the_order_of_a_sum_and_no_further() -> None:
    assert close({"a": [0.1 + 0.2]}, {"a": [0.3]})
    assert not close({"a": 0.3}, {"a": 0.3001})
    assert not close(True, 1) and not close(None, 0) and not close({"a": 1}, {})


def test_nonsense_that_the_operator_signed_is_refuted_not_a_crash(tmp_path: Path) -> None:
    """Digests fit, contents are of another form: the checks say so."""
    found = ledger_scene.build(tmp_path, account=False)
    scene.metrics(found)
    (found.folder / "evaluations.json").write_text('[{"arm": 3}, "x", null]')
    (found.folder / "matching.json").write_text('"nothing"')
    scene.account(found)
    audit = Audit.of(Bundle.open(found.bundle), found.charter_sha256)
    assert {c.reason for c in problems(audit.checks)} >= {"malformed"}
    assert audit.summary()
    assert not isinstance(audit, FedmatError)
