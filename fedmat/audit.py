"""An auditor's questions about a run, answered from its evidence bundle alone: proved, refuted or not evidenced.

Knows: which entries and which checks every answer rests on, and what a signature does not show. Refuses to know: how a check is
made (``fedmat.checks``), records, the network, the clock. It trusts nobody: neither who packed the bundle, nor the operator, nor
a member about another member.

An answer is no better than the worst thing it rests on. What a party states about its own house (its data, its code, what left it)
is its signed word: the answer proves that the word was given, when, and by whom, and its ``limits`` say what the word does not show.

References:
    in-toto, "Attestation Framework"; SLSA v1.0, "Verifying artifacts" (verdicts over signed statements about digests).
    RFC 9162, section 2.1. Regulation (EU) 2024/1689, articles 11, 12 and annex IV (what a record of a model has to tell).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fedmat.bundle import ENVIRONMENT, Bundle, egress_file, run_file
from fedmat.checks import PROVED, REFUTED, UNKNOWN, Check, Ledger, Verdict, Verified, worst
from fedmat.errors import NotEvidenced
from fedmat.evidence import MATCHING, METRICS, PLAN, flat
from fedmat.ledger.fold import CHAMPION, Fold, Placed, RunEntries
from fedmat.ledger.text import stamp
from fedmat.lineage import Graph, Node, counted, site_id

_SHOWN = 3  # places that an answer names; fedmat audit verify names all
BEYOND = "not in a bundle"  # the place of what no bundle can show
WORD = "a site's dataset is its signed word: the entry shows what it stated, not that it trained on it"
OPERATORS_WORD = "the operator's signed word: run fedmat audit replay to see it happen again"


@dataclass(frozen=True)
class Proof:
    """One statement that an answer rests on, and how to look at it without fedmat.

    Attributes:
        entry: index in the ledger.
        type: of the entry.
        signed_by: whose signatures it carries, all of them verified.
        sha256: of the entry's payload.
        how: what to compare with what.
    """

    entry: int
    type: str
    signed_by: tuple[str, ...]
    sha256: str
    how: str

    def as_json(self) -> dict[str, Any]:
        """Returns plain JSON."""
        return {
            "entry": self.entry, "type": self.type, "signed_by": list(self.signed_by), "sha256": self.sha256, "how": self.how,
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """A question with its verdict.

    Attributes:
        name: one word for machines, e.g. ``datasets``.
        said: the answer in one sentence.
        value: the whole of it, plain JSON: a table (list of rows), or fields.
        evidence: what it rests on; a proved answer has some.
        limits: what it does not show.
        place: where it breaks, or what is missing; "" if it is proved.
    """

    name: str
    question: str
    verdict: Verdict
    said: str
    value: Any
    evidence: tuple[Proof, ...] = ()
    limits: str = ""
    place: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns plain JSON."""
        return {
            "name": self.name, "question": self.question, "verdict": self.verdict, "said": self.said, "value": self.value,
            "evidence": [p.as_json() for p in self.evidence], "limits": self.limits, "place": self.place,
        }  # fmt: skip


@dataclass(frozen=True)
class Audit:
    """A bundle that was checked, and what can be asked of it."""

    verified: Verified
    graph: Graph

    @classmethod
    def of(cls, bundle: Bundle, charter_sha256: str | None = None) -> Audit:
        """Checks a bundle and makes it ready for questions.

        Args:
            charter_sha256: digest of the consortium's charter, from somebody other than who gave the bundle. Without it every
                answer is relative to the charter in the bundle, and whose keys those are is not evidenced.
        """
        verified = Verified.of(bundle, charter_sha256)
        return cls(verified, Graph.of(verified.ledger.fold, bundle))

    @property
    def ledger(self) -> Ledger:
        """The ledger as it was verified."""
        return self.verified.ledger

    @property
    def fold(self) -> Fold:
        """What the accepted entries say."""
        return self.verified.ledger.fold

    @property
    def checks(self) -> tuple[Check, ...]:
        """Every check, in the order in which they were made."""
        return tuple(self.verified.checks)

    @property
    def anchored(self) -> Verdict:
        """Whether these are the consortium's keys."""
        return next(c.verdict for c in self.verified.checks if c.topic == "keys")

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of the bundle's run; without one, all that the ledger knows."""
        if self.verified.run is not None:
            return tuple(self.verified.run.plan.entry.sites)
        return tuple(n.label for n in self.graph.of_kind("site"))

    # --- questions ---------------------------------------------------------------------------------------------------

    def why(self, model: str | None = None) -> tuple[Answer, ...]:
        """Answers what a model was made of and how.

        Args:
            model: digest, name, name and version, or run; None: the model of the bundle's run.

        Raises:
            NotEvidenced: the ledger knows no such model, or several.
        """
        run = self._run(model)
        if run is None:
            return (self._nothing("datasets", "Which dataset versions of which sites fed the model?"),)
        return (
            self._datasets(run), self._rounds(run), self._code(run), self._parameters(run), self._environment(run),
            self._contract(run), self._scores(run), self._duplicates(run), self._trained(run),
        )  # fmt: skip

    def who(self, model: str | None = None) -> tuple[Answer, ...]:
        """Answers who contributed what to a model, who was left out and why, and who approved it; errors as :meth:`why`."""
        run = self._run(model)
        if run is None:
            return (self._nothing("contributed", "Who contributed what?"),)
        return self._contributed(run), self._worth(run), self._left_out(run), self._approved(run)

    def what_left(self, site: str) -> tuple[Answer, ...]:
        """Answers what left a site for the bundle's run, and whether that is what arrived.

        Raises:
            NotEvidenced: the ledger knows no such site.
        """
        self._site(site)
        run = self.verified.run
        if run is None:
            return (self._nothing("objects", f"What left {site}, when, and how many bytes?"),)
        return self._objects(run, site), self._arrived(run, site), self._spent(run, site)

    def impact(self, name: str) -> tuple[Answer, ...]:
        """Answers which models descend from a site's data or from one dataset, and what to do if it leaves.

        Args:
            name: a site, or the digest of a dataset (8 digits or more).

        Raises:
            NotEvidenced: the ledger knows neither.
        """
        found = self.graph.find(name, "site", "dataset")
        touched = {n.digest for n in self.graph.descendants(found.id, "model")}
        affected = [r for r in self.fold.runs.values() if r.evaluation and r.evaluation.entry.model_sha256 in touched]
        return self._affected(found, affected), self._retrain(found, affected), self._free(found, affected)

    def history(self) -> tuple[Answer, ...]:
        """Answers whether the history was edited, who vouches for it, and whose keys these are."""
        return self._edited(), self._witnessed(), self._keys()

    def summary(self) -> dict[str, tuple[Answer, ...]]:
        """Returns all answers about the bundle's run by section, and what no bundle can show."""
        sites = self.sites
        return {
            "history": self.history(),
            "why": self.why(),
            "who": self.who(),
            **{f"what left {s}": self.what_left(s) for s in sites if site_id(s) in self.graph},
            **{f"if {s} leaves": self.impact(s) for s in sites if site_id(s) in self.graph},
            BEYOND: self.beyond(),
        }

    def beyond(self) -> tuple[Answer, ...]:
        """Returns the questions that no bundle answers, with who could."""
        asked = (
            ("reproduced", "Can the model be made again, bit for bit?", "nobody tried here",
             "fedmat audit replay makes it again where the sites' data are"),
            ("predictions", "Which predictions were made with it?", "predictions are not in this ledger",
             "whoever serves the model keeps a log of predictions with the model's digest"),
        )  # fmt: skip
        return tuple(Answer(n, q, UNKNOWN, said, None, (), limits, BEYOND) for n, q, said, limits in asked)

    # --- why ---------------------------------------------------------------------------------------------------------

    def _datasets(self, run: RunEntries) -> Answer:
        rows, placed, lacking = [], [run.plan, *run.aggregates.values()], []
        for site in run.plan.entry.sites:
            rounds = [n + 1 for n, p in sorted(run.aggregates.items()) if site in counted(p.entry)]
            signed = run.datasets.get(site)
            if signed is None:
                lacking.append(f"{site} signed for no dataset")
                continue
            e = signed.entry
            placed.append(signed)
            rows.append({
                "site": site, "dataset_sha256": e.dataset_sha256, "version": e.version, "commit": e.git_commit,
                "n_train": e.n_train, "rounds": _spans(rounds), "sources": dict(e.sources), "entry": signed.index,
            })  # fmt: skip
        placed += [run.evaluation] if run.evaluation else []
        lacking += [] if run.evaluation else ["the run has no evaluated model"]
        said = f"{len(rows)} dataset versions of {len(rows)} sites: {', '.join(r['site'] for r in rows)}"
        return self._answer(
            "datasets", "Which dataset versions of which sites fed the model?", said, rows, placed, run,
            ("dataset", "update", "model"), lacking,
            limits=f"{WORD}; a site that trained in no round still is in the joint scaling, and counts",
        )  # fmt: skip

    def _rounds(self, run: RunEntries) -> Answer:
        rows = []
        for number, placed in sorted(run.aggregates.items()):
            e = placed.entry
            rows.append({
                "round": number + 1, "rule": e.rule, "protection": e.protection, "shares": dict(e.shares),
                "model_sha256": e.model_sha256, "entry": placed.index,
            })  # fmt: skip
        planned = run.plan.entry.rounds
        lacking = [] if len(rows) == planned else [f"{len(rows)} of {planned} rounds are in the ledger"]
        placed_all = [run.plan, *run.aggregates.values(), *run.updates.values()]
        rules = ", ".join(sorted({r["rule"] for r in rows}))
        said = f"{len(rows)} rounds from the plan's first weights, joined by {rules or 'nothing'}; no earlier model went in"
        return self._answer(
            "rounds", "Through which rounds, with which weights?", said, rows, placed_all, run, ("round", "update", "model"), lacking,
            limits="updates are not in the bundle: their digests are signed by both sides, the sum itself shows in a replay alone",
        )  # fmt: skip

    def _code(self, run: RunEntries) -> Answer:
        e = run.plan.entry
        value = {"version": e.code_version, "commit": e.git_commit, "dirty": e.git_dirty}
        lacking = []
        if not e.git_commit:
            lacking.append("the code came from no commit: a version's name is all that is stated")
        if e.git_dirty:
            lacking.append("the code differed from its commit, and by what is not stated")
        said = (
            f"fedmat {e.code_version}"
            + (f", commit {e.git_commit[:12]}" if e.git_commit else "")
            + (", changed" if e.git_dirty else "")
        )
        return self._answer(
            "code", "Which code, and was it changed?", said, value, [run.plan], run, (), lacking,
            limits=f"{OPERATORS_WORD}; what the sites ran is not stated",
        )  # fmt: skip

    def _parameters(self, run: RunEntries) -> Answer:
        e = run.plan.entry
        plan = self.verified.values.get(PLAN) if run is self.verified.run else None
        value = {"plan_sha256": e.plan_sha256, "seed": e.seed, "rounds": e.rounds, "settings": flat(plan) if plan else None}
        said = f"plan {e.plan_sha256[:16]}, seed {e.seed}" + (f", {len(value['settings'])} settings" if plan else "")
        return self._answer(
            "parameters", "With which parameters and seeds?", said, value, [run.plan], run, ("plan", "consortium_file"),
            [] if plan else [f"the settings themselves are in {run_file(PLAN)}, which is not here"],
        )  # fmt: skip

    def _environment(self, run: RunEntries) -> Answer:
        value = self.verified.values.get(ENVIRONMENT) if run is self.verified.run else None
        releases = len(value.get("releases", {})) if isinstance(value, dict) else 0
        said = (
            f"Python {value.get('python')} on {value.get('system')} {value.get('machine')}, {releases} packages"
            if isinstance(value, dict)
            else f"environment {run.plan.entry.environment_sha256[:16]}"
        )
        return self._answer(
            "environment", "In which environment?", said, value, [run.plan], run, ("environment",),
            [] if value else [f"it is described in {run_file(ENVIRONMENT)}, which is not here"],
            limits="the operator's, by its word; the sites' are not stated",
        )  # fmt: skip

    def _contract(self, run: RunEntries) -> Answer:
        rows, placed, lacking = [], [run.plan], []
        for site in run.plan.entry.sites:
            report = run.reports.get(site)
            if report is None:
                lacking.append(f"{site} signed for no report")
                continue
            e = report.entry
            placed.append(report)
            rows.append({
                "site": site, "contract": e.contract_version, "accepted": e.accepted, "rejected": dict(e.rejected),
                "validation_sha256": e.validation_sha256, "entry": report.index,
            })  # fmt: skip
        rejected = sum(sum(r["rejected"].values()) for r in rows)
        said = f"{sum(r['accepted'] for r in rows)} rows accepted, {rejected} kept out, at {len(rows)} of {len(run.plan.entry.sites)} sites"
        return self._answer(
            "contract", "Did the data meet the shared contract, and which version?", said, rows, placed, run, ("contract",), lacking,
            limits="each site's own result, by its word: validation.json stays at the site, its digest is signed",
        )  # fmt: skip

    def _scores(self, run: RunEntries) -> Answer:
        placed = run.evaluation
        if placed is None:
            return self._nothing("score", "How good is it?")
        e = placed.entry
        metrics = self.verified.values.get(METRICS) if run is self.verified.run else None
        value = {
            "metric": e.metric, "score": e.score, "held_out_sha256": e.held_out_sha256, "model_sha256": e.model_sha256,
            "arms": {k: v for k, v in metrics["global"].items() if isinstance(v, dict)} if metrics else None,
        }  # fmt: skip
        score = "no score" if e.score is None else f"{e.metric.upper()} {e.score:.4g}"
        return self._answer(
            "score", "How good is it, and does that follow from what the sites counted?", f"{score} on the sites' held-out rows",
            value, [placed, *run.datasets.values()], run, ("metrics", "evaluations", "intervals", "model"), [],
            limits="computed again from the sites' sums, which are theirs; the rows stay at the sites",
        )  # fmt: skip

    def _duplicates(self, run: RunEntries) -> Answer:
        value = self.verified.values.get(MATCHING) if run is self.verified.run else None
        placed = [run.evaluation] if run.evaluation else []
        removed = sum(sum(row.values()) for row in (value or {}).get("removed", {}).values()) if isinstance(value, dict) else 0
        leaks = len((value or {}).get("leaks", ())) if isinstance(value, dict) else 0
        said = (
            f"{removed} rows taken out of training as duplicates or as test rows of another site; {leaks} kinds of leaks left"
        )
        return self._answer(
            "duplicates", "Did sites hold the same records, or test rows of each other?", said if value is not None else "not looked at",
            value, placed, run, ("matching",), [] if value is not None else [f"{run_file(MATCHING)} is not here"],
            limits="found by keyed digests that the sites made of their own records",
        )  # fmt: skip

    def _trained(self, run: RunEntries) -> Answer:
        return Answer(
            "trained", "Did the sites really train on these data?", UNKNOWN, "signatures show what was stated, not what was done",
            None, (), "a site's own auditor can replay it there; nothing that leaves a site shows it", BEYOND,
        )  # fmt: skip

    # --- who ---------------------------------------------------------------------------------------------------------

    def _contributed(self, run: RunEntries) -> Answer:
        rows, lacking = [], []
        closed = run.aggregates
        for site in run.plan.entry.sites:
            shares = [p.entry.shares[site] for p in closed.values() if site in counted(p.entry)]
            signed = sum(1 for _, s in run.updates if s == site)
            rows.append({
                "site": site, "rounds_counted": len(shares), "updates_signed": signed,
                "mean_share": sum(shares) / len(closed) if closed else 0.0,
                "bytes": sum(p.entry.bytes for (_, s), p in run.updates.items() if s == site),
            })  # fmt: skip
        lacking += (
            []
            if len(closed) == run.plan.entry.rounds
            else [f"{len(closed)} of {run.plan.entry.rounds} rounds are in the ledger"]
        )
        each = ", ".join(f"{r['site']} {r['rounds_counted']}" for r in rows)
        return self._answer(
            "contributed", "Who took part in which rounds, with what weight?", f"rounds counted of {len(closed)}: {each}", rows,
            [run.plan, *closed.values(), *run.updates.values()], run, ("round", "update"), lacking,
        )  # fmt: skip

    def _worth(self, run: RunEntries) -> Answer:
        question = "What was each site's contribution worth?"
        if not run.contributions:
            return self._nothing("worth", question, "no contribution to this model is in the ledger", run)
        rows = []
        for placed in run.contributions:
            e = placed.entry
            for site, share in sorted(e.shares.items()):
                rows.append({
                    "site": site, "method": e.method, "share": share, "error": e.errors.get(site), "entry": placed.index,
                })  # fmt: skip
        last = run.contributions[-1].entry
        each = ", ".join(f"{s} {v:.3g}" for s, v in sorted(last.shares.items()))
        return self._answer(
            "worth", question, f"{last.method}: {each}", rows, run.contributions, run, ("contribution",), [],
            limits="a share is worth what its evaluation set is worth; per-round shares (gram) are for monitoring, not for money",
        )  # fmt: skip

    def _left_out(self, run: RunEntries) -> Answer:
        rows = [
            {"site": e.site, "round": "before" if e.round < 0 else e.round + 1, "kind": e.kind, "reason": e.reason,
             "detail": e.detail, "entry": p.index}
            for p in sorted(run.exclusions, key=lambda p: p.index) for e in (p.entry,)
        ]  # fmt: skip
        sites = sorted({r["site"] for r in rows})
        said = f"{len(rows)} times, {', '.join(sites)}" if rows else "nobody: every site of the plan counted in every round"
        return self._answer(
            "left_out", "Who was left out, in which round, and why?", said, rows, [run.plan, *run.aggregates.values(), *run.exclusions],
            run, ("exclusion", "round"), [], limits="the reason is the operator's word",
        )  # fmt: skip

    def _approved(self, run: RunEntries) -> Answer:
        question = "Who approved the model, and is it champion by the charter's rules?"
        registered = run.registration
        rows = [
            {"site": s, "approves": p.entry.approves, "note": p.entry.note, "time": p.entry.time, "entry": p.index}
            for s, p in sorted(run.approvals.items())
        ]  # fmt: skip
        given, champion = run.approved_by(), registered is not None and CHAMPION in registered.entry.aliases
        needed = self._needed(registered.index if registered else self.fold.size)
        if registered is None:
            said = f"{len(given)} approvals, {needed} are needed; the model is not registered"
        else:
            e = registered.entry
            said = f"{e.name} version {e.version} is {'champion' if champion else 'registered, not champion'} with {len(given)} approvals, {needed} are needed"
        value = {"approvals": rows, "needed": needed, "registered": registered is not None, "champion": champion}
        placed = [*run.approvals.values(), *([registered] if registered else []), *([run.evaluation] if run.evaluation else [])]
        limits = "who approved looked at the numbers of the evaluation that is signed with it"
        if needed == 0:
            limits = "the charter asks for no approvals: a rehearsal, or members who agreed to ask for none"
        return self._answer("approved", question, said, value, placed, run, (), [], limits=limits)

    def _needed(self, size: int) -> int:
        terms = next((p.entry.terms for p in reversed(self.ledger.charters) if p.index < size), None)
        return terms.approvals_needed(len(self.fold.sites_at(size))) if terms is not None else 0

    # --- what left ---------------------------------------------------------------------------------------------------

    def _objects(self, run: RunEntries, site: str) -> Answer:
        question = f"What left {site}, when, and how many bytes?"
        book, placed = self.verified.books.get(site), run.egress.get(site)
        if book is None or placed is None:
            lacks = [] if placed is None else [placed]
            return self._answer("objects", question, "not listed", None, lacks, run, (f"egress:{site}",),
                                [f"there is no {egress_file(site)} that {site} signed for"])  # fmt: skip
        kinds: dict[str, dict[str, Any]] = {}
        for line in book:
            row = kinds.setdefault(str(line["kind"]), {"kind": line["kind"], "objects": 0, "bytes": 0, "numbers": 0,
                                                      "first": line["time"], "last": line["time"], "filters": [], "clauses": []})  # fmt: skip
            row["objects"] += 1
            row["bytes"] += line["bytes"]
            row["numbers"] += line["numbers"]
            row["last"] = line["time"]
            row["filters"] = sorted({*row["filters"], *line["filters"]})
            row["clauses"] = sorted({*row["clauses"], *([line["clause"]] if line["clause"] else [])})
        total = sum(n["bytes"] for n in book)
        value = {"objects": len(book), "bytes": total, "kinds": list(kinds.values()), "lines": book}
        what = ", ".join(f"{r['objects']} {r['kind']}" for r in kinds.values())
        return self._answer(
            "objects", question, f"{len(book)} objects, {total} bytes: {what}", value, [placed], run, (f"egress:{site}",), [],
            limits="the site's signed word, complete by its own root; what it hid from its own book only its network can show. "
            "What left after it signed (the signed statements themselves) stands in a later entry",
        )  # fmt: skip

    def _arrived(self, run: RunEntries, site: str) -> Answer:
        question = f"Is what left {site} what arrived, and what counted?"
        book = self.verified.books.get(site)
        if book is None:
            return self._nothing("arrived", question, f"there is no {egress_file(site)} to compare with", run)
        counted_in = {
            (n, p.entry.updates[site]): n for n, p in run.aggregates.items() if site in p.entry.updates
        }  # fmt: skip
        left_out = {(p.entry.round, p.entry.site): p.entry.reason for p in run.exclusions}
        rows, open_ends = [], []
        for line in book:
            if line["kind"] not in ("Update", "Sealed"):
                continue
            number = line["round"]
            if (number, line["sha256"]) in counted_in:
                fate = (
                    "taken"
                    if site in counted(run.aggregates[number].entry)
                    else f"left out: {left_out.get((number, site), 'by the rule')}"
                )
            else:
                fate = (
                    f"not taken: {left_out[number, site]}" if (number, site) in left_out else "not taken, and nobody says why"
                )
                open_ends += [] if (number, site) in left_out else [line]
            arrived = self.verified.rounds.get(number, {}).get("bytes_up", {}).get(site)
            rows.append({
                "round": number + 1, "line": line["n"] + 1, "bytes": line["bytes"], "arrived_in_round": arrived, "sha256": line["sha256"],
                "fate": fate,
            })  # fmt: skip
        said = f"{len(counted_in)} updates counted, each of them is in {site}'s book"
        if open_ends:
            said += f"; {len(open_ends)} more left and did not count: sent again after a crash, or of an earlier attempt at this run"
        placed = [*run.aggregates.values(), *(p for (_, s), p in run.updates.items() if s == site)]
        placed += [run.egress[site]] if site in run.egress else []
        return self._answer(
            "arrived", question, said, rows, placed, run, (f"egress:{site}", "round", *(f"update:{n}/{site}" for n in run.aggregates)), [],
            limits="answers that are no updates are counted by the site alone",
        )  # fmt: skip

    def _spent(self, run: RunEntries, site: str) -> Answer:
        question = f"How much of {site}'s privacy budget is spent, and what let the objects go?"
        book, placed = self.verified.books.get(site), run.egress.get(site)
        if book is None or placed is None:
            return self._nothing("spent", question, f"there is no {egress_file(site)} that {site} signed for", run)
        spent: dict[str, float] = {}  # updates and settlements have budgets of their own, and a book tells what is spent so far
        for line in book:
            if line["epsilon"] is not None:
                spent[line["kind"]] = max(line["epsilon"], spent.get(line["kind"], 0.0))
        value = {
            "epsilon": spent, "filters": sorted({f for n in book for f in n["filters"]}),
            "clauses": sorted({n["clause"] for n in book if n["clause"]}),
            "policies": sorted({n["policy_sha256"] for n in book if n["policy_sha256"]}),
        }  # fmt: skip
        each = ", ".join(f"epsilon {e:g} with {kind}" for kind, e in spent.items())
        said = each or "no budget is kept: nothing was noised"
        said += f"; under {', '.join(value['clauses'])}" if value["clauses"] else "; no policy was asked"
        return self._answer(
            "spent", question, said, value, [placed], run, (f"egress:{site}",), [],
            limits="the site's accountant and policy, by its word; the policy's text stays at the site",
        )  # fmt: skip

    # --- impact ------------------------------------------------------------------------------------------------------

    def _affected(self, found: Node, affected: Sequence[RunEntries]) -> Answer:
        rows, placed = [], [self._placed(found)]
        for run in affected:
            e = run.evaluation.entry if run.evaluation else None
            if e is None or run.evaluation is None:
                continue
            registered = run.registration.entry if run.registration else None
            sites = (
                [found.label]
                if found.kind == "site"
                else [s for s, p in run.datasets.items() if p.entry.dataset_sha256 == found.digest]
            )
            rounds = [n + 1 for n, p in sorted(run.aggregates.items()) if set(sites) & set(counted(p.entry))]
            rows.append({
                "run": run.plan.entry.run, "model_sha256": e.model_sha256,
                "model": f"{registered.name} v{registered.version}" if registered else "", "aliases": list(registered.aliases) if registered else [],
                "rounds": _spans(rounds), "last_round_without": None,
                "action": "withdraw and retrain" if registered else "retrain", "entry": run.evaluation.index,
            })  # fmt: skip
            placed += [run.plan, run.evaluation, *(run.datasets[s] for s in sites if s in run.datasets)]
        lacking = [] if rows else [f"{n}: {why}" for n, run in self.fold.runs.items() for why in self._unstated(run)]
        said = (
            f"{len(rows)} of {len(self.graph.of_kind('model'))} models descend from it; none of their rounds is without it: "
            "the joint scaling before the first round is made of it too"
            if rows
            else "no model descends from it"
        )
        return self._answer(
            "affected", f"Which models descend from {found.label} and must be withdrawn or retrained?", said, rows, placed, None, ("entries", "checkpoints"), lacking,
            limits="every model that this ledger knows; copies and fine-tuned children outside it are not in it",
        )  # fmt: skip

    def _retrain(self, found: Node, affected: Sequence[RunEntries]) -> Answer:
        rows, lacking, placed = [], [], [self._placed(found)]
        owners = {found.label} if found.kind == "site" else {
            s for run in self.fold.runs.values() for s, p in run.datasets.items() if p.entry.dataset_sha256 == found.digest
        }  # fmt: skip
        terms = self.fold.terms if self.fold.charter is not None else None
        for run in affected:
            sites = [s for s in run.plan.entry.sites if s not in owners and s in self.fold.sites]
            gone = [s for s in run.plan.entry.sites if s not in owners and s not in self.fold.sites]
            plan = self.verified.values.get(PLAN) if run is self.verified.run else None
            quorum = int(plan["settings"]["quorum"]) if plan else None
            if quorum is None:
                lacking.append(f"the quorum of {run.plan.entry.run} is in its own bundle's {run_file(PLAN)}")
            least = max(quorum or 0, terms.min_sites if terms else 2)
            rows.append({
                "run": run.plan.entry.run, "from_round": 1, "sites": sites, "left_before": gone, "needed": least,
                "enough": len(sites) >= least if quorum is not None else None,
            })  # fmt: skip
            placed.append(run.plan)
        short = [r["run"] for r in rows if r["enough"] is False]
        said = "nothing to retrain" if not rows else (
            f"{len(rows)} runs from the first round, without {', '.join(sorted(owners)) or found.label}"
            + (f"; too few sites remain for {', '.join(short)}" if short else "; the quorum is met where it is known")
        )  # fmt: skip
        return self._answer(
            "retrain", "What has to be trained again, with whom, and are they enough?", said, rows, placed, None, ("entries", "checkpoints", "plan"),
            lacking, limits="a plan, not a promise: encrypted rules may need more members than the quorum (docs/rules.md)",
        )  # fmt: skip

    def _free(self, found: Node, affected: Sequence[RunEntries]) -> Answer:
        touched = {run.plan.entry.run for run in affected}
        rows, lacking, placed = [], [], [self._placed(found)]
        gone = (
            next((p for p in reversed(self.fold.departures) if p.entry.site == found.label), None)
            if found.kind == "site"
            else None
        )
        for name, run in self.fold.runs.items():
            if name in touched or run.evaluation is None:
                continue
            open_ends = self._unstated(run)
            rows.append({
                "run": name, "model_sha256": run.evaluation.entry.model_sha256, "free": not open_ends, "why_not": open_ends,
                "after_departure": gone is not None and run.plan.index > gone.index, "entry": run.evaluation.index,
            })  # fmt: skip
            lacking += [f"{name}: {why}" for why in open_ends]
            placed += [run.plan, run.evaluation, *run.aggregates.values(), *run.datasets.values(), *run.updates.values()]
        placed += [gone] if gone is not None else []
        free = [r["run"] for r in rows if r["free"]]
        said = f"{len(free)} models: {', '.join(free)}" if free else "no model in this ledger is free of it"
        return self._answer(
            "free", f"Which models are free of {found.label}?", said, rows, placed, None, ("entries", "checkpoints"), lacking,
            limits="by the digests that sites signed for: the same rows under another digest, or at another site, would not show",
        )  # fmt: skip

    def _unstated(self, run: RunEntries) -> list[str]:
        """Returns what keeps the absence of something from a run from being proved: everything that went in must be stated."""
        out = [f"{s} signed for no dataset" for s in run.plan.entry.sites if s not in run.datasets]
        if sorted(run.aggregates) != list(range(run.plan.entry.rounds)):
            out.append("a round is missing")
        for number, placed in sorted(run.aggregates.items()):
            out += [
                f"{s} signed for no update of round {number + 1}" for s in counted(placed.entry) if (number, s) not in run.updates
            ]  # fmt: skip
        return out

    # --- history -----------------------------------------------------------------------------------------------------

    def _edited(self) -> Answer:
        value = {
            "entries": self.ledger.size, "accepted": self.fold.size, "covered": self.ledger.anchored,
            "broken_at": self.ledger.broken,
            "checkpoints": [{"size": c.size, "root": c.root, "cosigned_by": sorted(c.cosigners)} for c in self.ledger.checkpoints],
        }  # fmt: skip
        if self.ledger.broken is not None:
            said = f"yes, or it was never whole: {self.ledger.why}"
        elif self.ledger.checkpoints:
            count = len(self.ledger.checkpoints)
            fit = "a checkpoint that fits" if count == 1 else f"{count} checkpoints that all fit"
            said = f"no: {self.fold.size} entries, and {fit} them"
        else:
            said = "nothing fixes the order and the number of entries here"
        placed = [self.fold.charter] if self.fold.charter else []
        return self._answer(
            "edited", "Was the history edited?", said, value, placed, None, ("entries", "checkpoints"), [],
            limits="before its first cosigned checkpoint nothing but signatures and times fixes the order; a cosigned one excludes a second "
            "history only among the members who cosigned: compare the last one with a member's own",
        )  # fmt: skip

    def _witnessed(self) -> Answer:
        last = max(self.ledger.checkpoints, key=lambda c: c.size, default=None)
        who = {site: _date(seconds) for site, seconds in last.cosigners.items()} if last is not None else {}
        members = self.fold.sites_at(last.size) if last is not None and last.size <= self.fold.size else ()
        value = {"size": last.size if last else 0, "cosigned": who, "members": list(members)}
        said = f"{len(who)} of {len(members)} members cosigned the last checkpoint of {value['size']} entries"
        placed = [self.fold.charter] if self.fold.charter and who else []
        return self._answer(
            "witnessed", "Who vouches that there is one history?", said, value, placed, None, ("checkpoints", "witnesses"),
            [] if who else ["no member cosigned"], limits="members who collude with the operator can vouch for two histories",
        )  # fmt: skip

    def _keys(self) -> Answer:
        first, last = (self.ledger.charters[0], self.ledger.charters[-1]) if self.ledger.charters else (None, None)
        value = {
            "charter_sha256": last.entry.sha256 if last else "", "first_charter_sha256": first.entry.sha256 if first else "",
            "operator": first.entry.operator.organisation if first else "", "members": sorted(self.fold.sites),
        }  # fmt: skip
        check = next(c for c in self.verified.checks if c.topic == "keys")
        placed = [first] if first else []
        return self._answer(
            "keys", "Are these the consortium's keys?", check.what, value, placed, None, ("keys",), [],
            limits="a digest is worth what the telephone call was worth",
        )  # fmt: skip

    # --- how an answer is made ---------------------------------------------------------------------------------------

    def _answer(
        self, name: str, question: str, said: str, value: Any, placed: Iterable[Placed], run: RunEntries | None,
        topics: Sequence[str], lacking: Sequence[str], *, limits: str = "",
    ) -> Answer:  # fmt: skip
        """Returns an answer that is as good as the worst of what it rests on.

        Args:
            placed: entries it rests on.
            run: the run it is about, whose files the topics' checks looked at; None: the whole ledger.
            topics: of checks it rests on.
            lacking: what it would need and has not.
        """
        rests = {p.index: p for p in placed}
        problems: list[tuple[Verdict, str]] = []
        if run is None or run is self.verified.run:
            problems += [(c.verdict, f"{c.place}: {c.what}") for c in self.verified.about(*topics) if c.verdict != PROVED]
        elif topics:
            problems.append((UNKNOWN, f"the files of run {run.plan.entry.run} are in its own bundle"))
        doubts = {self.ledger.doubt(i): self.ledger.verdict(i) for i in sorted(rests, reverse=True)}
        problems += [(verdict, what) for what, verdict in doubts.items() if what]
        problems += [(UNKNOWN, what) for what in lacking]
        if not rests:
            problems.append((UNKNOWN, "no entry of the ledger states it"))
        keys = next((c for c in self.verified.checks if c.topic == "keys"), None)
        if keys is not None and keys.verdict == REFUTED and name != "keys":
            problems.append((REFUTED, f"{keys.place}: {keys.what}"))
        if problems and self._cut(run) and not any(v == REFUTED for v, _ in problems):
            # what is missing may have been cut away: nobody can tell from a broken ledger that it never was there
            problems.append((REFUTED, f"the ledger is broken: {self.ledger.why}"))
        verdict = worst(v for v, _ in problems) if problems else PROVED
        shown = list(dict.fromkeys(what for v, what in problems if v == verdict))
        more = len(shown) - _SHOWN
        place = "; ".join(shown[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        return Answer(
            name, question, verdict, said, value, tuple(self._proof(p) for _, p in sorted(rests.items())),
            self._limits(limits, rests), place,
        )  # fmt: skip

    def _cut(self, run: RunEntries | None) -> bool:
        """Tells whether entries about a run may stand in the part of the ledger that does not count."""
        broken = self.ledger.broken
        return broken is not None and (run is None or run.evaluation is None or broken <= max(p.index for p in run.all()))

    def _limits(self, limits: str, rests: Mapping[int, Placed]) -> str:
        if not self.ledger.charters:
            return limits
        if self.verified.anchored_from >= self.ledger.size:
            anchor = "relative to the bundle's own charter"
        elif rests and min(rests) < self.verified.anchored_from:
            anchor = f"the charter's digest that was given vouches for entries from {self.verified.anchored_from} on"
        else:
            return limits
        return f"{limits}; {anchor}" if limits else anchor

    def _nothing(self, name: str, question: str, why: str = "", run: RunEntries | None = None) -> Answer:
        said = why or f"the ledger has no run {self.verified.bundle.run}"
        proof = (self._proof(run.plan),) if run else ()
        keys = next(c for c in self.verified.checks if c.topic == "keys")
        if keys.verdict == REFUTED:
            return Answer(name, question, REFUTED, said, None, proof, "", f"{keys.place}: {keys.what}")
        if self._cut(run):
            return Answer(name, question, REFUTED, said, None, proof, "", f"the ledger is broken: {self.ledger.why}")
        return Answer(name, question, UNKNOWN, said, None, proof, "", said)

    def _proof(self, placed: Placed) -> Proof:
        signed = self.ledger.signed[placed.index]
        how = f"line {placed.index + 2} of ledger.jsonl holds it and its signatures; " + _HOW.get(
            placed.entry.type, "its fields say it"
        )
        return Proof(placed.index, placed.entry.type, signed.signers, signed.sha256, how)

    def _placed(self, node: Node) -> Placed:
        """Returns the entry that asserts a node."""
        index = node.evidence if node.evidence is not None else 0
        for run in self.fold.runs.values():
            for placed in run.all():
                if placed.index == index:
                    return placed
        return next((p for p in self.ledger.charters if p.index == index), self.ledger.charters[0])

    def _run(self, model: str | None) -> RunEntries | None:
        if model is None:
            return self.verified.run
        digest = self.graph.find(model, "model").digest
        made = [r for r in self.fold.runs.values() if r.evaluation and r.evaluation.entry.model_sha256 == digest]
        return next((r for r in made if r is self.verified.run), made[-1])  # two runs may make the same model

    def _site(self, site: str) -> None:
        if site_id(site) not in self.graph and self.fold.size:
            known = ", ".join(n.label for n in self.graph.of_kind("site"))
            raise NotEvidenced(f"{site}: no site that the ledger knows", fix=f"it knows {known}")


_HOW = {
    "plan": "plan_sha256 is the SHA-256 of run/plan.json in RFC 8785 form",
    "dataset": "attestation_sha256 is the SHA-256 of the site's part of run/attestations.json in RFC 8785 form",
    "update": "sha256 is that of a line in the site's egress ledger",
    "aggregate": "report_sha256 is the SHA-256 of the round's line in run/rounds.jsonl, without its seconds, in RFC 8785 form",
    "evaluation": "its digests are sha256sum of run/model.safetensors, metrics.json, evaluations.json, intervals.json, matching.json",
    "contribution": "evidence_sha256 is sha256sum of run/settlement.json, or of the rounds' report digests",
    "egress": "root is the RFC 9162 tree root over the first lines of egress/SITE.jsonl",
    "charter": "its digest is what members compare by telephone",
    "approval": "it names the digests of the model and of metrics.json",
}


def _date(seconds: int) -> str:
    try:
        return stamp(datetime.fromtimestamp(seconds, UTC))
    except (ValueError, OverflowError, OSError):
        return str(seconds)  # signed, and no time that a calendar has


def _spans(numbers: Sequence[int]) -> str:
    """Returns sorted numbers as ranges: 1-3, 5."""
    out: list[list[int]] = []
    for n in numbers:
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)
