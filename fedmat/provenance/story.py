"""The lineage graph told as steps: who did what, with which things, what came out, and which entry of the ledger says so.

Knows: which nodes of the graph are things and which are steps, and the words that may be said of each outside the consortium's
books. Refuses to know: the standards that tell it on (the modules beside this one), whether the ledger is whole (``fedmat.audit``),
records.

Only what is listed here goes out: digests, counts, names of sites, settings. Free text that people put into entries (why a member
was left out, notes, decisions, names of raw files) stays in the ledger, since nobody checked what it says.

A time is when an entry was signed, not when something happened: the operator signs a run's entries at its end. The one time of an
event is that at which a site wrote down that an update leaves.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from fedmat import egress
from fedmat.bundle import Bundle, egress_file
from fedmat.errors import NotEvidenced
from fedmat.ledger import entries
from fedmat.ledger.entries import CharterEntry
from fedmat.lineage import Edge, Graph, Node

Job = Literal["run", "prepare", "featurize", "setup", "train", "round", "evaluate", "contribution", "approve", "register"]
Outcome = Literal["complete", "fail", "open"]
"""``open``: the ledger does not state its end, which is no statement that it failed."""

JOBS: Mapping[Job, str] = {
    "run": "A whole run: from the members' data to a scored model.",
    "prepare": "A site converts and validates its records; rejected rows stay there.",
    "featurize": "A site turns its records into numbers.",
    "setup": "Joint scaling and duplicates, before the first round.",
    "train": "A site trains on its own data in one round and sends an update.",
    "round": "The coordinator combines the updates of one round by the plan's rule.",
    "evaluate": "The finished model is scored on every site's frozen test groups.",
    "contribution": "What each member's data was worth to the model.",
    "approve": "A member says whether the model may become champion.",
    "register": "The model gets a name and a version in the registry.",
}
"""What each kind of step does, in the order in which they come."""

_THINGS = (
    "source", "dataset", "features", "contract_report", "plan", "code", "environment", "update", "weights", "model", "evaluation",
    "contribution", "registration", "approval", "exclusion",
)  # fmt: skip
_TOLD: Mapping[str, tuple[str, ...]] = {
    "dataset": ("version", "commit", "contract_version", "n_train"),
    "features": ("n_train",),
    "contract_report": ("contract_version", "accepted"),
    "plan": ("seed", "rounds", "consortium_file_sha256"),
    "code": ("version", "commit", "dirty"),
    "environment": ("python",),
    "update": ("round", "bytes", "sealed", "signed"),
    "weights": ("round",),
    "model": ("weights_sha256",),
    "evaluation": ("metric", "score", "held_out_sha256", "evaluations_sha256", "intervals_sha256", "matching_sha256"),
    "contribution": ("method",),
    "registration": ("name", "version", "aliases"),
    "approval": ("approves",),
    "exclusion": ("round", "why", "reason"),
}
_PART = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"
_WORD = re.compile(rf"^{_PART}(( \+ (server )?|/){_PART}){{0,2}}$")  # a rule is called "weighted-mean + server momentum"
_SHOWN = 12  # digits of a digest in a name


@dataclass(frozen=True)
class Word:
    """Who says so.

    Attributes:
        entry: index in the ledger.
        by: party that signed it.
        time: when, UTC.
    """

    entry: int
    by: str
    time: str


@dataclass(frozen=True)
class Agent:
    """A site, or the operator.

    Attributes:
        id: the node's in the graph.
    """

    id: str
    name: str
    organisation: str


@dataclass(frozen=True)
class Thing:
    """Something with a digest that steps use and make.

    Attributes:
        id: the node's in the graph.
        kind: as in the graph.
        owner: id of the agent it belongs to; "" where it is nobody's.
        site: the owner's name, where it is a site.
        run: the run it belongs to; "" for what belongs to none or several.
        name: for people; made of names of parties and runs, numbers and digests.
        told: further plain values.
        left: when it left its site, by the site's egress ledger; "" where that is not told.
        rejected: contract report: rows in quarantine by reason.
    """

    id: str
    kind: str
    sha256: str
    name: str
    owner: str
    site: str
    run: str
    word: Word
    told: Mapping[str, Any] = field(default_factory=dict)
    left: str = ""
    rejected: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Something that was done.

    Attributes:
        id: stable, e.g. ``round/<run>/<number>``.
        parent: id of the step it was part of; "" where it was none.
        agent: id of whoever did it.
        used, made: ids of things.
        considered: things that a rule saw and left out.
        about: entry that states the step; of a step that is open, the last that mentions it.
        began: time of the entry that the step came after: a bound, as ``about.time`` is.
        reason: one word, why it failed.
        told: plain values.
        left_out: site -> reason, of this step.
    """

    id: str
    job: Job
    run: str
    name: str
    agent: str
    about: Word
    began: str
    outcome: Outcome = "complete"
    parent: str = ""
    site: str = ""
    used: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    considered: tuple[str, ...] = ()
    reason: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Charter:
    """The consortium's charter, as the ledger has it.

    Attributes:
        published: what the members agreed to show: ledger, metrics, model -> members or public.
    """

    sha256: str
    entry: int
    published: Mapping[str, str]


@dataclass(frozen=True)
class Story:
    """All runs of a ledger, told.

    Attributes:
        run: the run that the bundle is about.
        ledger: distinguishes this ledger from another of a consortium of the same name.
        time: of the last entry.
    """

    consortium: str
    run: str
    ledger: str
    time: str
    charter: Charter
    agents: Mapping[str, Agent]
    things: Mapping[str, Thing]
    steps: tuple[Step, ...]
    derived: tuple[tuple[str, str], ...]
    about: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, graph: Graph, bundle: Bundle) -> Story:
        """Tells a graph.

        Args:
            bundle: whose ledger the graph was made from.

        Raises:
            ProtocolError: what opening the bundle's ledger or its egress ledgers finds.
            NotEvidenced: the ledger has no charter.
        """
        return _Teller(graph, bundle).story()

    @cached_property
    def _steps(self) -> dict[str, Step]:
        return {s.id: s for s in self.steps}

    def step(self, id: str) -> Step:
        """Returns a step by its id."""
        return self._steps[id]

    def uuid(self, id: str) -> str:
        """Returns a UUID (version 5) for a step or thing: the same in every export of this ledger."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"urn:fedmat:{self.ledger}/{self.consortium}/{id}"))


class _Teller:
    def __init__(self, graph: Graph, bundle: Bundle) -> None:
        self.graph, self.bundle = graph, bundle
        self.nodes = {n.id: n for n in graph.nodes}
        self.out: dict[str, list[Edge]] = {}
        for edge in graph.edges:
            self.out.setdefault(edge.source, []).append(edge)
        opened = [entries.open_envelope(data, f"entry {i}")[0] for i, data in enumerate(bundle.ledger().entries)]
        self.times = [e.time for e in opened]
        self.signers = [e.by for e in opened]
        self.charters = [(i, e) for i, e in enumerate(opened) if isinstance(e, CharterEntry)]
        self.left = self._left()
        self.steps: list[Step] = []

    def story(self) -> Story:
        if not self.charters:
            raise NotEvidenced("the ledger has no charter", fix="ask for the bundle again")
        index, charter = self.charters[-1]
        agents = {n.id: _agent(n) for n in (*self.graph.of_kind("operator"), *self.graph.of_kind("site"))}
        things = {n.id: self._thing(n) for n in self.graph.nodes if n.kind in _THINGS}
        for n in self.graph.of_kind("dataset"):
            self._site_steps(n)
        for n in self.graph.of_kind("plan"):
            self._run(n)
        return Story(
            self.bundle.consortium, self.bundle.run, self.charters[0][1].sha256, max(self.times),
            Charter(charter.sha256, index, dict(charter.terms.published)), agents, things, tuple(self.steps),
            self._pairs("derived_from", things), self._pairs("about", {**things, **agents}),
        )  # fmt: skip

    # --- things ----------------------------------------------------------------------------------------------------

    def _thing(self, n: Node) -> Thing:
        told = {k: _plain(n.attributes[k]) for k in _TOLD.get(n.kind, ()) if k in n.attributes}
        owner = next((e.target for e in self.out.get(n.id, ()) if e.relation == "attributed_to"), "")
        site = str(n.attributes.get("site", ""))
        sha256 = n.digest if re.fullmatch(r"[0-9a-f]{64}", n.digest) else ""
        return Thing(
            n.id, n.kind, sha256, _name(n, site), owner, site, n.run, self._word(n),
            {k: v for k, v in told.items() if v not in ("", None)}, self.left.get((site, n.digest), ""),
            {_plain(k): int(v) for k, v in n.attributes.get("rejected", {}).items()},
        )  # fmt: skip

    def _word(self, n: Node) -> Word:
        return self._at(0 if n.evidence is None else n.evidence)

    def _at(self, index: int) -> Word:
        return Word(index, self.signers[index], self.times[index])

    def _left(self) -> dict[tuple[str, str], str]:
        """Returns when objects left: (site, digest) -> time."""
        found: dict[tuple[str, str], str] = {}
        for n in self.graph.of_kind("site"):
            name = egress_file(n.label)
            if (data := self.bundle.data(name)) is not None:
                for line in egress.lines(data, name):
                    found.setdefault((n.label, line["sha256"]), line["time"])
        return found

    def _pairs(self, relation: str, known: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        pairs = ((e.source, e.target) for e in self.graph.edges if e.relation == relation)
        return tuple(sorted({p for p in pairs if p[0] in known and p[1] in known}))

    def _targets(self, id: str, *relations: str) -> tuple[str, ...]:
        return tuple(sorted({e.target for e in self.out.get(id, ()) if e.relation in relations and e.target in self.nodes}))

    def _things_of(self, id: str, *relations: str) -> tuple[str, ...]:
        return tuple(t for t in self._targets(id, *relations) if self.nodes[t].kind in _THINGS)

    # --- steps -----------------------------------------------------------------------------------------------------

    def _site_steps(self, dataset: Node) -> None:
        site = str(dataset.attributes["site"])
        word, version = self._word(dataset), dataset.digest
        reports = [n.id for n in self.graph.of_kind("contract_report") if dataset.id in self._targets(n.id, "used")]
        self.steps.append(Step(
            f"prepare/{site}/{version}", "prepare", "", f"{site} prepares its records", f"site:{site}", word, word.time, site=site,
            used=self._things_of(dataset.id, "derived_from"), made=(dataset.id, *reports),
        ))  # fmt: skip
        features = [n.id for n in self.graph.of_kind("features") if dataset.id in self._targets(n.id, "derived_from")]
        self.steps.append(Step(
            f"featurize/{site}/{version}", "featurize", "", f"{site} computes its features", f"site:{site}", word, word.time,
            site=site, used=(dataset.id,), made=tuple(features),
        ))  # fmt: skip

    def _run(self, plan: Node) -> None:
        run, parent = plan.run, f"run/{plan.run}"
        word, at = self._word(plan), len(self.steps)
        out = self._exclusions(run)
        setup = next(iter(self.graph.of_kind("setup", run)), None)
        features: tuple[str, ...] = ()
        if setup is not None:
            features = tuple(t for t in self._things_of(setup.id, "used") if self.nodes[t].kind == "features")
            last = max((e.evidence or 0 for e in self.out.get(setup.id, ())), default=word.entry)
            self.steps.append(Step(
                f"setup/{run}", "setup", run, f"{run}: before the first round", "operator", self._at(last), word.time, parent=parent,
                used=(plan.id, *features), left_out=out.get(-1, {}),
            ))  # fmt: skip
        self._rounds(run, word, out)
        evaluated = [t for n in self.graph.of_kind("evaluation", run) for t in self._targets(n.id, "used")]
        model = next((self.nodes[t] for t in evaluated if self.nodes[t].kind == "model"), None)
        self._after(run, parent)
        end = self._latest(run, word) if model is None else self._word(self.graph.of_kind("evaluation", run)[0])
        used = (plan.id, *self._things_of(plan.id, "used"), *features)
        code = next((self.nodes[t] for t in self._targets(plan.id, "used") if self.nodes[t].kind == "code"), None)
        told = {k: plan.attributes[k] for k in ("seed", "rounds") if k in plan.attributes}
        if code is not None:
            told |= {"code_version": _plain(code.attributes["version"]), "git_commit": _plain(code.attributes["commit"])}
            told |= {"git_dirty": bool(code.attributes["dirty"])}
        self.steps.insert(at, Step(
            parent, "run", run, f"run {run}", "operator", end, word.time, "open" if model is None else "complete", used=used,
            made=() if model is None else (model.id,), told={k: v for k, v in told.items() if v != ""}, left_out=out.get(-1, {}),
        ))  # fmt: skip

    def _latest(self, run: str, word: Word) -> Word:
        return self._at(max((n.evidence or 0 for n in self.graph.nodes if n.run == run), default=word.entry))

    def _rounds(self, run: str, began: Word, out: Mapping[int, Mapping[str, str]]) -> None:
        closed = {int(n.attributes["round"]): n for n in self.graph.of_kind("round", run)}
        updates: dict[int, list[Node]] = {}
        for n in self.graph.of_kind("update", run):
            updates.setdefault(int(n.attributes["round"]), []).append(n)
        weights: dict[str, str] = {}  # round's node -> what it made
        for n in self.graph.of_kind("weights", run):
            weights |= dict.fromkeys(self._targets(n.id, "generated_by"), n.id)
        for number in sorted({*closed, *updates, *(n for n in out if n >= 0)}):
            node, mine = closed.get(number), updates.get(number, [])
            id = f"round/{run}/{number}"
            about = self._word(node) if node is not None else self._at(max([began.entry, *(n.evidence or 0 for n in mine)]))
            told = {k: _plain(node.attributes[k]) for k in ("rule", "protection") if k in node.attributes} if node else {}
            self.steps.append(Step(
                id, "round", run, f"{run}: round {number + 1}", "operator", about, began.time, "open" if node is None else "complete",
                parent=f"run/{run}", used=self._things_of(node.id, "used") if node else tuple(n.id for n in mine),
                made=(weights[node.id],) if node and node.id in weights else (),
                considered=self._things_of(node.id, "considered") if node else (), told={"round": number, **told},
                left_out=out.get(number, {}),
            ))  # fmt: skip
            for n in mine:
                self._train(n, run, number, id, began)
            sent = {str(n.attributes["site"]) for n in mine}
            for site, reason in sorted(out.get(number, {}).items()):
                if site not in sent:
                    self.steps.append(Step(
                        f"train/{run}/{number}/{site}", "train", run, f"{site} in round {number + 1}", f"site:{site}", about,
                        began.time, "fail", parent=id, site=site, reason=reason, told={"round": number},
                    ))  # fmt: skip
            began = about

    def _train(self, update: Node, run: str, number: int, parent: str, began: Word) -> None:
        site = str(update.attributes["site"])
        self.steps.append(Step(
            f"train/{run}/{number}/{site}", "train", run, f"{site} in round {number + 1}", f"site:{site}", self._word(update),
            began.time, parent=parent, site=site, used=self._things_of(update.id, "used"), made=(update.id,),
            told={"round": number},
        ))  # fmt: skip

    def _after(self, run: str, parent: str) -> None:
        for n in self.graph.of_kind("evaluation", run):
            self._statement("evaluate", n, f"evaluate/{run}", parent, ())
        for n in self.graph.of_kind("contribution", run):
            self._statement("contribution", n, f"contribution/{run}/{n.evidence}", parent, ())
        approvals = self.graph.of_kind("approval", run)
        for n in approvals:
            self._statement("approve", n, f"approve/{run}/{n.attributes['site']}", parent, ())
        for n in self.graph.of_kind("registration", run):
            word = self._word(n)
            given = tuple(a.id for a in approvals if self._word(a).entry < word.entry)
            self._statement("register", n, f"register/{run}/{n.evidence}", parent, given)

    def _statement(self, job: Job, n: Node, id: str, parent: str, more: tuple[str, ...]) -> None:
        word, site = self._word(n), str(n.attributes.get("site", ""))
        used = (*self._things_of(n.id, "used", "about"), *more)
        began = self._at(max((self._word(self.nodes[u]).entry for u in used), default=word.entry))
        self.steps.append(Step(
            id, job, n.run, f"{n.run}: {job}" + (f", {site}" if site else ""), f"site:{site}" if site else "operator", word,
            began.time, parent=parent, site=site, used=used, made=(n.id,),
        ))  # fmt: skip

    def _exclusions(self, run: str) -> dict[int, dict[str, str]]:
        found: dict[int, dict[str, str]] = {}
        for n in self.graph.of_kind("exclusion", run):
            found.setdefault(int(n.attributes["round"]), {})[str(n.attributes["site"])] = str(_plain(n.attributes["reason"]))
        return found


def _agent(n: Node) -> Agent:
    return Agent(n.id, n.label, str(n.attributes.get("organisation", "")))


def _name(n: Node, site: str) -> str:
    digest, number = n.digest[:_SHOWN], int(n.attributes.get("round", -1)) + 1
    names = {
        "source": f"{site}: raw file {digest}",
        "dataset": f"{site}: records {digest}",
        "features": f"{site}: features {digest}",
        "contract_report": f"{site}: contract report {digest}",
        "plan": f"{n.run}: plan",
        "code": f"fedmat {_plain(n.attributes.get('version', ''))}",
        "environment": f"environment {digest}",
        "update": f"{n.run}: update of {site} in round {number}",
        "weights": f"{n.run}: weights after round {number}",
        "model": f"model {digest}",
        "evaluation": f"{n.run}: evaluation",
        "contribution": f"{n.run}: contribution",
        "registration": f"{_plain(n.attributes.get('name', ''))} version {n.attributes.get('version', '')}",
        "approval": f"{n.run}: word of {site}",
        "exclusion": f"{n.run}: {site} left out",
    }
    return names[n.kind]


def _plain(value: Any) -> Any:
    """Returns numbers, and words as they are; what is no single word is not told."""
    if isinstance(value, str):
        return value if not value or _WORD.fullmatch(value) else "stated-in-the-ledger"
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
