"""The story in the words of W3C PROV: entities, activities, agents, and who derived what from what.

Knows: PROV-DM, and PROV-JSON and PROV-N through the ``prov`` library. Refuses to know: the ledger, whether what is told is true: PROV
has no word for a signature, so each record names the entry that states it.

Activities have no times: the ledger knows when something was stated, and a rehearsal states a run at its end; taken for times of
events these would break the order that PROV-CONSTRAINTS asks for. The one time of an event is the generation of an update, when
its site wrote down that it leaves.

References:
    W3C, "PROV-DM: The PROV Data Model", 2013. W3C, "Constraints of the PROV Data Model", 2013. W3C, "PROV-N", 2013.
    W3C Member Submission, "The PROV-JSON Serialization", 2013.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fedmat import files
from fedmat.provenance.story import Step, Story, Thing

if TYPE_CHECKING:
    from prov.model import ProvDocument

PREFIX, TERMS_PREFIX = "run", "fedmat"
TERMS = "urn:fedmat:terms/"
_PLANS = ("plan",)
_NOT_DERIVED_FROM = ("plan", "code", "environment", "approval")
"""Used, but no material: what was made would be about the same data without them."""


def namespace(story: Story) -> str:
    """Returns the namespace of a ledger's things; a URN, since nobody here owns a name in the web."""
    return f"urn:fedmat:{story.consortium}/"


def local(id: str) -> str:
    """Returns a graph's or step's id as the local part of a qualified name (a colon would have to be escaped in PROV-N)."""
    return id.replace(":", "/", 1)


def document(story: Story) -> ProvDocument:
    """Returns a story as a PROV document."""
    from prov.model import ProvDocument

    doc = ProvDocument()
    doc.add_namespace(PREFIX, namespace(story))
    doc.add_namespace(TERMS_PREFIX, TERMS)
    name = {id: f"{PREFIX}:{local(id)}" for id in (*story.agents, *story.things, *(s.id for s in story.steps))}
    for a in story.agents.values():
        doc.agent(name[a.id], {
            "prov:type": doc.valid_qualified_name("prov:Organization"), "prov:label": a.name,
            **({f"{TERMS_PREFIX}:organisation": a.organisation} if a.organisation else {}),
        })  # fmt: skip
    for t in story.things.values():
        doc.entity(name[t.id], _thing(doc, t))
        if t.owner in name:
            doc.wasAttributedTo(name[t.id], name[t.owner])
    for s in story.steps:
        doc.activity(name[s.id], None, None, _step(doc, s))
    stated = frozenset(story.derived)
    for s in story.steps:
        _relations(doc, story, s, name, stated)
    for later, earlier in story.derived:
        doc.wasDerivedFrom(name[later], name[earlier])
    for statement, target in story.about:
        doc.wasInfluencedBy(name[statement], name[target], None, {"prov:type": _term(doc, "about")})
    return doc


def as_json(doc: ProvDocument) -> bytes:
    """Returns a document as PROV-JSON: the same document gives the same bytes."""
    text: str = doc.serialize(format="json") or ""
    return files.json_bytes(json.loads(text))


def as_provn(doc: ProvDocument) -> bytes:
    """Returns a document as PROV-N, for people."""
    text: str = doc.get_provn()
    return (text + "\n").encode()


def _term(doc: Any, name: str) -> Any:
    return doc.valid_qualified_name(f"{TERMS_PREFIX}:{name}")


def _thing(doc: Any, t: Thing) -> list[tuple[str, Any]]:
    told = [*t.told.items(), *((f"rejected_{k}", v) for k, v in t.rejected.items()), ("sha256", t.sha256)]
    return [
        ("prov:type", _term(doc, t.kind)),
        *([("prov:type", doc.valid_qualified_name("prov:Plan"))] if t.kind in _PLANS else []),
        ("prov:label", t.name),
        *_word(t.word.entry, t.word.by, t.word.time).items(),
        *(
            (f"{TERMS_PREFIX}:{k}", v)
            for k, value in told
            if value != ""
            for v in (value if isinstance(value, list) else [value])
        ),
    ]


def _step(doc: Any, s: Step) -> dict[str, Any]:
    return {
        "prov:type": _term(doc, s.job),
        "prov:label": s.name,
        f"{TERMS_PREFIX}:outcome": s.outcome,
        **_word(s.about.entry, s.about.by, s.about.time),
        **({f"{TERMS_PREFIX}:reason": s.reason} if s.reason else {}),
        **{f"{TERMS_PREFIX}:{k}": v for k, v in s.told.items()},
    }


def _word(entry: int, by: str, time: str) -> dict[str, Any]:
    return {f"{TERMS_PREFIX}:entry": entry, f"{TERMS_PREFIX}:signed_by": by, f"{TERMS_PREFIX}:stated": time}


def _relations(doc: Any, story: Story, s: Step, name: dict[str, str], stated: frozenset[tuple[str, str]]) -> None:
    me = name[s.id]
    plan = next((name[u] for u in s.used if story.things[u].kind in _PLANS), None)
    if s.agent in name:
        doc.wasAssociatedWith(me, name[s.agent], plan)
    if s.parent:
        doc.wasInformedBy(name[s.parent], me)  # the whole had what its part came to
    for id in s.used:
        role = {"prov:role": _term(doc, "counted")} if s.job == "round" and story.things[id].kind == "update" else None
        doc.used(me, name[id], None, None, role)
    for id in s.considered:
        doc.used(me, name[id], None, None, {"prov:role": _term(doc, "considered")})
    for id in s.made:
        left = story.things[id].left
        doc.wasGeneratedBy(name[id], me, datetime.fromisoformat(left) if left else None)
        for source in s.used:
            known = (id, source) in stated
            if s.job != "register" and not known and story.things[source].kind not in _NOT_DERIVED_FROM:
                doc.wasDerivedFrom(name[id], name[source], me)
