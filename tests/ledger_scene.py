"""A finished run with its ledger and its evidence bundle, made by the real code from a synthetic run (``runs``): for readers of ledgers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import runs

from fedmat import accounts, egress, files, keys, pipeline, wire
from fedmat.domain import Attestation, Evaluation, GlobalModel, Scaler, StatementsRequest, Update
from fedmat.federation import statements
from fedmat.federation.engine import InProcessEngine
from fedmat.federation.statements import Signing
from fedmat.keys import PartyKeys

START = datetime(2026, 3, 2, 8, 0, 0, tzinfo=UTC)


@dataclass
class Clock:
    """A clock that a test moves."""

    at: datetime = START

    def __call__(self) -> datetime:
        self.at += timedelta(seconds=1)
        return self.at


@dataclass
class Scene:
    """A consortium's workspace with one finished run in its ledger.

    Attributes:
        folder: the run's folder.
        sites: their names, in order.
    """

    home: Path
    run: pipeline.Run
    clock: Clock = field(default_factory=Clock)

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def sites(self) -> tuple[str, ...]:
        return self.run.sites

    @property
    def books(self) -> accounts.Books:
        return pipeline.ledger_books(self.run)

    @property
    def bundle(self) -> Path:
        return self.folder / "evidence.zip"

    @property
    def charter_sha256(self) -> str:
        charter = self.books.fold().charter
        assert charter is not None
        return str(charter.entry.sha256)

    @property
    def operator(self) -> PartyKeys:
        return self.books.operator()

    def keys(self, site: str) -> PartyKeys:
        return keys.load(self.run.party_folder(site) / "keys", site)

    def another(self, run_id: str, **how: Any) -> Scene:
        """Adds a second finished run of the same consortium."""
        return build(self.home, run_id=run_id, clock=self.clock, sites=len(self.sites), **how)


def build(
    home: Path,
    *,
    sites: int = 3,
    rounds: int = 2,
    run_id: str = "r1",
    clock: Clock | None = None,
    account: bool = True,
    **how: Any,
) -> Scene:
    """Returns a finished run below ``home``, in the ledger and with its bundle packed.

    Args:
        account: False leaves out the ledger.
        how: see ``runs.build``.
    """
    named = dict(list(runs.SITES.items())[:sites])
    wanted: dict[str, Any] = {"exclusions": False, "sites": named} | how
    folder = runs.build(home, run_id=run_id, rounds=rounds, **wanted)
    run = pipeline.Run(home / f"consortium-{run_id}.yaml", home, run_id)
    scene = Scene(home, run, clock or Clock())
    pipeline.members_charter(run)
    _sites(scene)
    files.write_json(folder / "matching.json", {"removed": {}, "shared": [], "leaks": []})
    files.write_json(folder / "intervals.json", {"level": 0.9, "half_width": 1.5, "sites": {}})
    metrics(scene)
    if account:
        with InProcessEngine({s: _handler(scene, s) for s in run.sites}) as engine:
            pipeline.statements(run, engine=engine)
        pipeline.account(run, scene.clock())
    return scene


def metrics(scene: Scene) -> None:
    """Writes metrics.json as it follows from a run's other files."""
    from fedmat.checks import _evaluation

    evaluations = [_evaluation(x) for x in files.read_json(scene.folder / "evaluations.json")]
    files.write_json(scene.folder / "metrics.json", pipeline._metrics(scene.run, evaluations))


def _sites(scene: Scene) -> None:
    """Gives every site a manifest and a validation result, and lets its answers pass its door."""
    attested = files.read_json(scene.folder / "attestations.json")["attestations"]
    reports = scene.run.reports()
    plan = scene.run.plan()
    for site in scene.run.sites:
        workspace = scene.run.site_folder(site)
        a = attested[site]
        manifest = {
            "sha256": a["dataset_sha256"], "n_records": 180, "rejected": a["rejected"],
            "sources": {"lab": {"file_sha256": files.sha256(site.encode())}},
        }  # fmt: skip
        files.write_json(workspace / "manifest.json", manifest)
        files.write_json(workspace / "validation.json", {"schema": "fedmat/validation/1", "site": site, "ok": True})
        door = egress.Door(site, workspace, plan.sha256, a["dataset_sha256"], plan.settings, scene.clock)
        request = wire.encode(StatementsRequest(plan.sha256, plan.consortium, "any", {}))
        door.note(wire.encode(_attestation(a)), request)
        for report in reports:
            if site not in report["accepted"]:
                continue
            answer = wire.encode(_update(site, report["round"], plan.sha256))
            door.note(answer, answer)
            report["updates"][site] = files.sha256(answer)
            report["bytes_up"][site] = len(answer)
        door.note(wire.encode(Evaluation(site, "federated", "test", np.zeros(5), 20, 0.1, 0.2, 0.4)), request)
    text = "".join(json.dumps(r, sort_keys=True) + "\n" for r in reports)
    (scene.folder / "rounds.jsonl").write_text(text)


def _update(site: str, number: int, plan_sha256: str) -> Update:
    delta = {"w": np.full((4, 3), 0.1 + number + len(site), dtype=np.float32)}
    return Update(site, number, plan_sha256, "0" * 64, delta, {}, 0.1, np.zeros(5))


def _attestation(plain: dict[str, Any]) -> Attestation:
    return Attestation(**{**plain, **{k: tuple(plain[k]) for k in ("feature_names", "labels")}})


def _handler(scene: Scene, site: str) -> Any:
    a = files.read_json(scene.folder / "attestations.json")["attestations"][site]
    workspace = scene.run.site_folder(site)

    def handle(request: bytes) -> bytes:
        asked = wire.decode(request, StatementsRequest)
        manifest = files.read_json(workspace / "manifest.json")
        signing = Signing(scene.keys(site), scene.clock)
        return wire.encode(statements.answer(asked, _attestation(a), manifest, workspace, signing))

    return handle


def model(seed: int) -> GlobalModel:
    """Returns some other model, for tests that swap one."""
    weights = {"w": np.full((2, 2), float(seed), dtype=np.float32)}
    return GlobalModel(weights, Scaler(np.zeros(2), np.ones(2), np.ones(2), np.zeros(1), np.ones(1)), {})
