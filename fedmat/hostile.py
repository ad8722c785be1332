"""A consortium in one process with hostile members: the real rounds, the real workers, attacks from the library.

Knows: feature tables of a simulated consortium, which members are hostile and how. Refuses to know: pages and terminals.
The hostile members act as one: whoever attacks sees what every honest member sends in the round (the strongest case the
papers assume), which only works where all sites run in one process.

References: see ``fedmat.attacks`` (attacks) and ``fedmat.aggregation.robust`` (rules).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from fedmat import attacks, keys
from fedmat.config import PlanSettings
from fedmat.domain import GlobalModel, Prepared, RoundReport, TrainRequest
from fedmat.envelopes import ROLES, Header, Submission
from fedmat.errors import SiteRefused
from fedmat.features.table import TEST, FeatureTable, concatenate
from fedmat.federation import role, rounds
from fedmat.federation.coordinator import Coordinator
from fedmat.federation.engine import Handler, InProcessEngine
from fedmat.federation.holding import Identity, Sealing
from fedmat.federation.plan import Plan
from fedmat.federation.site import SiteWorker
from fedmat.models.network import Architecture
from fedmat.seeds import stream
from fedmat.transport.trigram import messages
from fedmat.transport.trigram.ring import Ring, blob
from fedmat.weights import Vector, Weights

NONE, ABSENT = "none", "absent"


@dataclass(frozen=True)
class Result:
    """What a run with hostile members came to.

    Attributes:
        mae: of the final global model on all members' test rows, transformed target's unit.
        hostile_share: mean share of the global step that hostile members got, over the rounds.
        wrongly_excluded: share of (honest member, round) in which it was left out.
        bytes_up, bytes_down: a round's mean, all sites, everything included.
        role_bytes: a round's mean to and from the roles.
    """

    mae: float
    hostile_share: float
    wrongly_excluded: float
    bytes_up: float
    bytes_down: float
    role_bytes: float
    seconds: float
    reports: Sequence[RoundReport] = field(repr=False, default=())
    model: GlobalModel | None = field(repr=False, default=None)


def cut(tables: Mapping[str, FeatureTable], members: int) -> dict[str, FeatureTable]:
    """Returns the sites' rows as ``members`` smaller ones: the largest is halved by groups until there are enough.

    No group is divided; a member keeps its site's kind of materials, so that the members differ as the sites did.

    Raises:
        ValueError: the rows do not give that many members.
    """
    parts = [tables[s] for s in sorted(tables)]
    while len(parts) < members:
        parts.sort(key=lambda t: -int((t.split != TEST).sum()))
        first = parts.pop(0)
        groups = np.unique(first.group)
        if len(groups) < 2:
            raise ValueError(f"the rows do not give {members} members")
        half = np.isin(first.group, groups[::2])
        parts += [first.rows(half), first.rows(~half)]
    order = np.argsort([t.sha256 + str(len(t)) for t in parts], kind="stable")
    return {f"member-{i:02d}": parts[at] for i, at in enumerate(order)}


@dataclass
class _Minds:
    """What the hostile members know of a round: every honest member's numbers."""

    honest: dict[int, dict[str, Vector]] = field(default_factory=dict)


class ObservedWorker(SiteWorker):
    """An honest member whose numbers the hostile ones see."""

    def watch(self, minds: _Minds) -> ObservedWorker:
        """Lets ``minds`` see this member's numbers."""
        self._minds = minds
        return self

    def _numbers(self, request: TrainRequest, held: GlobalModel, delta: Weights) -> Vector:
        numbers = super()._numbers(request, held, delta)
        self._minds.honest.setdefault(request.round, {})[self.site] = numbers
        return numbers


class HostileWorker(SiteWorker):
    """A member that sends what an attack of the library makes."""

    def arm(self, attack: str, minds: _Minds, hostile: int) -> HostileWorker:
        """Chooses the attack; ``hostile`` members make it together."""
        self._attack, self._minds, self._hostile = attack, minds, hostile
        return self

    def _numbers(self, request: TrainRequest, held: GlobalModel, delta: Weights) -> Vector:
        numbers = super()._numbers(request, held, delta)
        if self._attack == ABSENT:
            raise SiteRefused("stays away")
        if attacks.ATTACKS[self._attack].kind != "update":
            return numbers
        seen = self._minds.honest[request.round]
        honest = np.stack([seen[s] for s in sorted(seen)])
        rng = stream(self.plan.settings.seed, "attack", self.site, request.round)
        return attacks.poison(self._attack, numbers, honest, n_hostile=self._hostile, rng=rng)


class WrappingSealing(Sealing):
    """Seals a vector that only looks short because its square wraps around in the ring."""

    def _protected(self, request: TrainRequest, header: Header, found: Prepared, words: Any) -> Any:
        honest = super()._protected(request, header, found, words)
        ring, digest = Ring(header.bits), messages.header_digest(header)
        # A masked update is the update minus two pads: what is added to one is added to the other.
        masked = ring.unpack(honest.masked, header.length, "own update").copy()
        masked[0] -= words[0]
        masked[0:1] += ring.dtype.type(1 << (header.bits // 2))
        sent = messages.Envelope.parse(honest.envelope.tobytes(), self._id.charter.seal_overhead)
        body = blob(masked)
        unsigned = dataclasses.replace(sent, payload=messages.sha256(body))
        signature = self._id.keys.sign(unsigned.signed(digest, self._site))
        return Submission(self._site, body, blob(dataclasses.replace(unsigned, signature=signature).packed()))


def run(
    plan: Plan,
    tables: Mapping[str, FeatureTable],
    folder: Path,
    *,
    attack: str = NONE,
    hostile: Sequence[str] = (),
    setup: Any = None,
) -> Result:
    """Trains with the real coordinator, workers and (where the plan encrypts) roles; scores the final model.

    Args:
        hostile: members that attack; they must come last in the alphabet, so that they see the others first.
        setup: called with the dictionary of handlers before the first round: what a test changes of them.
    """
    if hostile and max(set(tables) - set(hostile)) > min(hostile):
        raise ValueError("hostile members must come last in the alphabet: they act on what the others sent")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plan = dataclasses.replace(plan, roster=tuple(sorted(tables)))
    charter, identities = _identities(plan, folder)
    minds = _Minds()
    handlers: dict[str, Handler] = {}
    for site, table in sorted(tables.items()):
        kind = HostileWorker if site in hostile else ObservedWorker
        rows = _poisoned(attack, table, plan) if site in hostile else table
        manifest: dict[str, object] = {"sha256": table.sha256, "rejected": {}}
        worker = kind(site, plan, rows, manifest, folder / "sites" / site, identity=identities.get(site))
        if isinstance(worker, HostileWorker):
            worker.arm(attack, minds, len(hostile))
            if attack == "modular_wrap" and identities:
                worker._sealing = WrappingSealing(plan, identities[site], worker._state(), site)
        elif isinstance(worker, ObservedWorker):
            worker.watch(minds)
        handlers[site] = worker.handle
    if charter is not None:
        for name in (n for n in rounds.role_names(plan) if n in ROLES):
            home = folder / "roles" / name
            handlers[name] = role.worker(name, plan, keys.load(home / "keys", name), charter, home).handle
    if setup is not None:
        setup(handlers)
    architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
    with InProcessEngine(handlers) as engine:
        lead = Coordinator(
            plan, lambda n: architecture.initial_weights(n, plan.settings.seed), folder, charter=charter, today="2026-01-01"
        )
        reports = []
        for report in lead.run(engine):
            minds.honest.pop(report.round, None)
            reports.append(report)
        model = lead.model()
    return _result(plan, tables, model, reports, hostile)


def _identities(plan: Plan, folder: Path) -> tuple[keys.Charter | None, dict[str, Identity]]:
    if plan.settings.security.mode == "none":
        return None, {}

    def where(name: str) -> Path:
        return folder / ("roles" if name in ROLES else "sites") / name / "keys"

    organisations = {s: f"Company {s}" for s in plan.roster}
    charter = keys.rehearsal(plan.consortium, plan.roster, organisations, where, date(2026, 1, 1))
    secret = stream(plan.settings.seed, "members-secret").bytes(32)
    return charter, {s: Identity(keys.load(where(s), s), charter, secret) for s in plan.roster}


def _poisoned(attack: str, table: FeatureTable, plan: Plan) -> FeatureTable:
    if attack == "label_flip":
        return dataclasses.replace(table, y=attacks.flip_labels(table.y, table.split != TEST))
    return table


def _result(
    plan: Plan, tables: Mapping[str, FeatureTable], model: GlobalModel, reports: Sequence[RoundReport], hostile: Sequence[str]
) -> Result:
    architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
    test = concatenate([tables[s].part(TEST) for s in sorted(tables)])
    guess = architecture.predict(model.weights, model.scaler, test.names, test.x, test.graphs)[:, 0]
    known = np.isfinite(test.y[:, 0])
    honest = [s for s in tables if s not in hostile]
    left_out = [s not in r.shares for r in reports for s in honest if r.shares]
    return Result(
        mae=float(np.abs(guess - test.y[:, 0])[known].mean()),
        hostile_share=float(np.mean([sum(r.shares.get(s, 0.0) for s in hostile) for r in reports])),
        wrongly_excluded=float(np.mean(left_out)) if left_out else 1.0,
        bytes_up=float(np.mean([sum(r.bytes_up.values()) for r in reports])),
        bytes_down=float(np.mean([sum(r.bytes_down.values()) for r in reports])),
        role_bytes=float(np.mean([sum(r.role_bytes.values()) for r in reports])),
        seconds=float(sum(r.seconds for r in reports)),
        reports=tuple(reports),
        model=model,
    )


def vary(plan: Plan, **settings: object) -> Plan:
    """Returns the plan with other settings, checked as if they stood in the consortium file."""
    body = plan.settings.model_dump(mode="json")
    for name, value in settings.items():
        body[name] = {**body[name], **value} if isinstance(value, dict) and isinstance(body.get(name), dict) else value
    return dataclasses.replace(plan, settings=PlanSettings.model_validate(body))
