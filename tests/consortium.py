"""A consortium in memory, with knobs: the simulator that tests use where a mock would be used elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import numpy as np

from fedmat import files
from fedmat import keys as keyring
from fedmat.config import ConsortiumConfig
from fedmat.domain import GlobalModel, RoundReport
from fedmat.envelopes import ROLES
from fedmat.features.table import TEST, TRAIN, VALIDATION, FeatureTable
from fedmat.federation import role as roles
from fedmat.federation import rounds
from fedmat.federation.coordinator import Coordinator
from fedmat.federation.engine import Handler, InProcessEngine
from fedmat.federation.holding import Identity
from fedmat.federation.plan import Plan
from fedmat.federation.reference import ReferenceWorker
from fedmat.federation.site import MatchingKeys, SiteWorker
from fedmat.models.network import Architecture
from fedmat.seeds import stream

SITES = ("ash", "birch", "cedar", "dogwood")
SEVEN = (*SITES, "elm", "fir", "gorse")
TODAY = "2026-01-01"


def charter(settings: ConsortiumConfig, folder: Path) -> keyring.Charter | None:
    """The consortium's charter, where its plan encrypts; keys are made on first use and kept."""
    if settings.plan.security.mode == "none":
        return None
    organisations = {m.site: m.organisation for m in settings.members}
    return keyring.rehearsal(
        settings.name, settings.roster, organisations, lambda n: key_folder(folder, n), date.fromisoformat(TODAY)
    )


def key_folder(folder: Path, party: str) -> Path:
    """Where a party's private keys lie."""
    return folder / ("roles" if party in ROLES else "sites") / party / "keys"


def role(name: str, settings: ConsortiumConfig, folder: Path) -> Handler:
    """A role's handler, as it starts (again) from its folder; the reference party holds rows of no site."""
    if name == rounds.REFERENCE:
        return ReferenceWorker(Plan.of(settings), table("reference", seed=4)).handle
    found = charter(settings, folder)
    assert found is not None
    own = keyring.load(key_folder(folder, name), name)
    return roles.worker(name, Plan.of(settings), own, found, folder / "roles" / name).handle


def config(
    sites: tuple[str, ...] = SITES,
    *,
    simulated: bool = True,
    task: dict[str, object] | None = None,
    auxiliary: tuple[dict[str, object], ...] = (),
    **plan: object,
) -> ConsortiumConfig:
    """A small consortium file; ``plan`` overrides keys of its plan section."""
    settings = {
        "rounds": 4,
        "quorum": 2,
        "local": {"steps": 6, "batch_size": 16, "lr": 3e-3},
        "personalization": {"finetune_steps": 8},
        "seed": 5,
        "deduplicate": False,
        **plan,
    }
    return ConsortiumConfig.model_validate(
        {
            "name": "grove",
            "title": "A grove",
            "simulated": simulated,
            "task": task
            or {"name": "hardness", "record_type": "alloy", "target": "hardness_hv", "unit": "", "transform": "identity"},
            "auxiliary": list(auxiliary),
            "features": ["composition"],
            "model": {"hidden": [8]},
            "plan": settings,
            "members": [{"site": s, "organisation": s.title(), "file": f"{s}.yaml"} for s in sites],
        }
    )


def table(site: str, rows: int = 60, seed: int = 3, *, binary: bool = False) -> FeatureTable:
    """One site's features: a shared nonlinear truth on inputs whose region differs by site; one constant column."""
    rng = stream(seed, "table", site)
    x = rng.normal(loc=rng.normal(size=3), size=(rows, 3))
    y = x[:, 0] + np.sin(x[:, 1]) + 0.1 * rng.normal(size=rows) + 2.0
    x = np.column_stack([x, np.full(rows, 7.0)])
    group = np.arange(rows) // 3
    split = np.where(group % 5 == 0, TEST, np.where(group % 5 == 1, VALIDATION, TRAIN)).astype(np.int8)
    y = ((y > 2.0).astype(float) if binary else y)[:, None]
    bound = np.zeros(y.shape, dtype=np.int8)
    return FeatureTable(("a", "b", "c", "same"), x, y, group, split, bound, group, sha256="t" * 64, features_sha256="f" * 64)


def worker(
    site: str,
    settings: ConsortiumConfig,
    folder: Path,
    data: FeatureTable | None = None,
    keys: MatchingKeys | None = None,
) -> SiteWorker:
    """A site's real worker over a synthetic table."""
    data = data or table(site, binary=settings.task.kind == "binary")
    manifest = {"sha256": files.sha256(data.x.tobytes()), "rejected": {"missing": 1}}
    found, identity = charter(settings, folder), None
    if found is not None:
        identity = Identity(keyring.load(key_folder(folder, site), site), found, b"members-secret")
    return SiteWorker(site, Plan.of(settings), data, manifest, folder / "sites" / site, keys, identity)


def handlers(
    settings: ConsortiumConfig,
    folder: Path,
    bad: Mapping[str, Callable[[Handler], Handler]] | None = None,
    data: Mapping[str, FeatureTable] | None = None,
    keys: Mapping[str, MatchingKeys] | None = None,
) -> dict[str, Handler]:
    """Every site's handler over its ``data``; ``bad`` wraps some of them to misbehave."""
    out = {}
    for site in settings.roster:
        handle = worker(site, settings, folder, (data or {}).get(site), (keys or {}).get(site)).handle
        out[site] = (bad or {}).get(site, lambda h: h)(handle)
    for name in rounds.role_names(Plan.of(settings)):
        out[name] = (bad or {}).get(name, lambda h: h)(role(name, settings, folder))
    return out


def coordinator(settings: ConsortiumConfig, folder: Path) -> Coordinator:
    """The real coordinator of a consortium in memory."""
    plan = Plan.of(settings)
    (folder / "run").mkdir(parents=True, exist_ok=True)
    architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
    return Coordinator(
        plan,
        lambda n: architecture.initial_weights(n, plan.settings.seed),
        folder / "run",
        charter=charter(settings, folder),
        today=TODAY,
    )


def run(
    settings: ConsortiumConfig,
    folder: Path,
    bad: Mapping[str, Callable[[Handler], Handler]] | None = None,
    *,
    data: Mapping[str, FeatureTable] | None = None,
    keys: Mapping[str, MatchingKeys] | None = None,
    stop: int | None = None,
) -> tuple[list[RoundReport], GlobalModel | None]:
    """Runs to the end, or for ``stop`` rounds and no further; returns the reports and the global model."""
    lead = coordinator(settings, folder)
    running = lead.run(InProcessEngine(handlers(settings, folder, bad, data, keys)))
    if stop is not None:
        reports = [next(running) for _ in range(stop)]
        running.close()
        return reports, None
    reports = list(running)
    return reports, lead.model()


def setup(folder: Path) -> dict[str, object]:
    """What the coordinator noted of attestations and failures before the first round."""
    found: dict[str, object] = files.read_json(folder / "run" / "attestations.json")
    return found
