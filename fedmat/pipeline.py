"""The steps of a run as plain functions: flows, DVC stages and the command line call these and hold no science.

Knows: the order of steps and the folders they share. Refuses to know: Prefect, DVC, the terminal, the clock's date.
A ``Run`` is a reference (paths and names); passing it around passes no record and no tensor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmat import files, wire
from fedmat._version import __version__
from fedmat.config import ConsortiumConfig, Member, SiteConfig, Task, load_consortium, load_site
from fedmat.domain import Baseline, Evaluation, GlobalModel, RoundReport
from fedmat.envelopes import ROLES
from fedmat.errors import ConfigError, DataError, NotEvidenced, SiteRefused, StateError
from fedmat.federation.plan import Plan

if TYPE_CHECKING:
    from fedmat.accounts import Books
    from fedmat.baselines import Arm
    from fedmat.data.records import Snapshot
    from fedmat.data.versions import Version
    from fedmat.egress import Door
    from fedmat.features.table import FeatureTable
    from fedmat.federation.engine import Engine, Handler
    from fedmat.federation.holding import Identity
    from fedmat.federation.site import MatchingKeys
    from fedmat.federation.statements import Signing
    from fedmat.keys import Charter, PartyKeys
    from fedmat.ledger.fold import Fold
    from fedmat.registry import Registered

SECRET = Path("secrets/matching.key")  # in the workspace: the members' secret, which no coordinator may see
REFERENCE = "reference"  # the party with the rows that contributions are measured on
KEYS = "keys"  # in the workspace of a site or of a role: its private keys
REFUSED = "refused.json"  # in a site's folder: why its data take no part in this run
MODEL, PLAN, METRICS, EVALUATIONS, TIMINGS = (
    "model.safetensors", "plan.json", "metrics.json", "evaluations.json", "timings.json",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Where a run's files are.

    Attributes:
        consortium_file: the consortium.yaml.
        home: workspace of the consortium; holds ``sites/`` and ``runs/``.
        run_id: name of the run's folder; None means: named by plan and data, so that the same plan on the same data
            is the same run and goes on where it stopped.
        site_file: on a site's own machine, its site.yaml; None: as the consortium file says.
        charter_file: on a party's own machine, the charter it agreed to; None: as the consortium file says.
    """

    consortium_file: Path
    home: Path
    run_id: str | None = None
    rounds: int | None = None
    site_file: Path | None = None
    charter_file: Path | None = None

    def config(self) -> ConsortiumConfig:
        """Returns the consortium file's settings, with this run's number of rounds if it has its own."""
        config = load_consortium(self.consortium_file)
        if self.rounds is None:
            return config
        plan = config.plan.model_copy(update={"rounds": self.rounds})
        return config.model_copy(update={"plan": plan})

    def plan(self) -> Plan:
        """Returns the checked plan."""
        return Plan.of(self.config())

    @property
    def sites(self) -> tuple[str, ...]:
        """Site names in roster order."""
        return self.config().roster

    def site_folder(self, site: str) -> Path:
        """The site's own workspace."""
        return self.home / "sites" / site

    def site_config(self, site: str) -> tuple[SiteConfig, Path]:
        """Returns a member's site file and its path.

        Raises:
            ConfigError: no such member, or the file says another site or record type.
        """
        config = self.config()
        member = next((m for m in config.members if m.site == site), None)
        if site == REFERENCE and config.reference is not None:
            member = Member(site=site, organisation=site, file=config.reference)
        if member is None:
            raise ConfigError(
                f"{self.consortium_file}: there is no member '{site}'", fix=f"use one of {', '.join(config.roster)}"
            )
        path = self.site_file or (self.consortium_file.parent / member.file).resolve()
        settings = load_site(path)
        if settings.site != site:
            raise ConfigError(f"{path}: says site '{settings.site}', consortium.yaml calls it '{site}'", fix="make them agree")
        if settings.record_type != config.task.record_type:
            raise ConfigError(
                f"{path}: site {site} has {settings.record_type} records, the task needs {config.task.record_type}",
                fix="correct record_type, or join another consortium",
            )
        return settings, path

    def party_folder(self, party: str) -> Path:
        """The workspace of a site or of a role."""
        return self.home / "roles" / party if party in ROLES else self.site_folder(party)

    @property
    def folder(self) -> Path:
        """The run's folder.

        Raises:
            StateError: the run is named by its data and a site is not prepared yet.
        """
        return self.home / "runs" / (self.run_id or self._name())

    def _name(self) -> str:
        there = [s for s in self.sites if not (self.site_folder(s) / REFUSED).exists()]
        data = {s: files.read_json(self.site_folder(s) / "manifest.json")["sha256"] for s in there}
        return name_of(self.plan(), data)

    def reports(self) -> list[dict[str, Any]]:
        """Returns the round reports so far, as plain JSON."""
        path = self.folder / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Accounted:
    """What the ledger holds of a run.

    Attributes:
        run: the run's name in the ledger.
        written: entries that were new.
        size: of the ledger.
        bundle: the evidence bundle.
    """

    run: str
    written: int
    size: int
    bundle: Path


@dataclass(frozen=True)
class FeatureRef:
    """Reference to a site's features."""

    site: str
    sha256: str
    n_rows: int
    n_features: int


def name_of(plan: Plan, data: Mapping[str, str]) -> str:
    """Returns the name of the run of a plan on data: site -> digest of its accepted records."""
    return files.sha256(files.canonical_json({"plan": plan.sha256, "data": dict(data)}))[:12]


def open_run(consortium_file: Path, *, home: Path | None = None, run_id: str | None = None, rounds: int | None = None) -> Run:
    """Returns the run of a consortium file after checking the file, its members and its plan.

    Args:
        home: workspace; by default ``$FEDMAT_HOME``, else ``.fedmat``, plus the consortium's name.
        rounds: replaces the plan's number of rounds.

    Raises:
        ConfigError, PlanRefused: a file or the plan is wrong.
    """
    path = Path(consortium_file).resolve()
    config = load_consortium(path)
    base = home or Path(os.environ.get("FEDMAT_HOME", ".fedmat")) / config.name
    run = Run(path, base.resolve(), run_id, rounds)
    if run.plan().settings.contribution.method != "none" and config.reference is None:
        raise ConfigError(
            f"{path}: plan.contribution.method {config.plan.contribution.method} needs rows to measure on",
            fix="name a site file of public or agreed rows under reference:, or set method: none",
        )
    for site in run.sites:
        run.site_config(site)
    return run


def finished(consortium_file: Path, home: Path, folder: Path) -> Run:
    """Returns a run as it was made, with its own number of rounds.

    Args:
        folder: the run's folder, below ``home``.

    Raises:
        ConfigError, PlanRefused: as :func:`open_run`.
        StateError: the folder holds no plan.
    """
    rounds = int(files.read_json(folder / PLAN)["settings"]["rounds"])
    return open_run(consortium_file, home=home, run_id=folder.name, rounds=rounds)


# --- at each site ------------------------------------------------------------------------------------------------


def prepare_site(run: Run, site: str) -> Snapshot:
    """Ingests, converts and checks one site's data; writes its accepted records, manifest and quarantine."""
    from fedmat.data import records

    config = run.config()
    settings, path = run.site_config(site)
    folder = run.site_folder(site)
    refused = folder / REFUSED
    try:
        with _timed(folder / "prepare-seconds.json"):
            targets = [t.target for t in config.tasks]
            snapshot = records.prepare(settings, path.parent, folder, target=targets, admission=config.admission)
    except DataError as error:  # an earlier good version stays, and takes no part while the newer data are refused
        files.write_json(refused, {"what": error.what, "fix": error.fix})
        raise
    refused.unlink(missing_ok=True)
    return snapshot


def version_site(run: Run, site: str, now: datetime) -> Version:
    """Records the site's accepted data as a version of the site's own git and DVC repository."""
    from fedmat.data import versions

    return versions.publish(run.site_folder(site), site=site, message=f"{run.config().name}: accepted records", now=now)


def featurize_site(run: Run, site: str) -> FeatureRef:
    """Computes (or finds cached) features of one site."""
    with _timed(run.site_folder(site) / "featurize-seconds.json"):
        table = site_table(run, site)
    return FeatureRef(site, table.sha256, len(table), len(table.names))


def build_handler(run: Run, site: str) -> Handler:
    """Returns the function that answers requests for one site; importable, so that a site's own process can build it."""
    from fedmat.federation.site import SiteWorker

    folder = run.site_folder(site)
    if (folder / REFUSED).exists():
        raise SiteRefused(f"site {site}: its data were refused when they were prepared", fix="see fedmat site check")
    manifest = files.read_json(folder / "manifest.json")
    keys, identity = matching_keys(run, site), site_identity(run, site)
    return SiteWorker(site, run.plan(), site_table(run, site), manifest, folder, keys, identity, _signing(run, site)).handle


def door(run: Run, site: str) -> Door:
    """Returns where the answers of a site pass, and are written down, on their way out."""
    from fedmat.egress import Door

    plan, folder = run.plan(), run.site_folder(site)
    manifest = folder / "manifest.json"
    dataset = str(files.read_json(manifest)["sha256"]) if manifest.exists() else ""
    return Door(site, folder, plan.sha256, dataset, plan.settings)


def build_noting(run: Run, site: str) -> Handler:
    """Returns a site's handler behind its door: what it answers leaves at once, written down first."""
    return door(run, site).around(build_handler(run, site))


def _signing(run: Run, site: str) -> Signing | None:
    from fedmat import keys
    from fedmat.federation.statements import Signing

    folder = run.party_folder(site) / KEYS
    return Signing(keys.load(folder, site)) if (folder / keys.SIGNING).exists() else None


def build_role(run: Run, role: str) -> Handler:
    """Returns the function that answers requests for one role; importable, so that its own process can build it."""
    from fedmat import keys
    from fedmat.federation import role as roles

    if role == REFERENCE:
        from fedmat.federation.reference import ReferenceWorker

        if not (run.site_folder(role) / "manifest.json").exists():
            prepare_site(run, role)
        return ReferenceWorker(run.plan(), site_table(run, role)).handle
    charter = read_charter(run)
    if charter is None:
        raise StateError(f"{role}: the plan encrypts nothing", fix="set plan.security.mode")
    folder = run.party_folder(role)
    return roles.worker(role, run.plan(), keys.load(folder / KEYS, role), charter, folder).handle


def read_charter(run: Run) -> Charter | None:
    """Returns everyone's public keys; None where the plan encrypts nothing.

    A simulated consortium that names no charter gets one for a rehearsal: one operator then holds all parties' keys.

    Raises:
        ConfigError: the consortium is real and names no charter, or the charter is wrong or another consortium's.
    """
    return None if run.config().plan.security.mode == "none" else members_charter(run)


def members_charter(run: Run) -> Charter | None:
    """Returns everyone's public keys, also where nothing is encrypted; None where a real consortium has agreed on none.

    Raises:
        ConfigError: as :func:`read_charter`.
    """
    from fedmat import keys

    config = run.config()
    if run.charter_file is not None or config.charter is not None:
        path = run.charter_file or run.consortium_file.parent / str(config.charter)
        found = keys.read_charter(path)
        if found.consortium != config.name or found.sites != config.roster:
            raise ConfigError(
                f"{path}: is not the charter of these members of {config.name}", fix="fedmat keys charter makes it"
            )
        return found
    if not config.simulated:
        if config.plan.security.mode == "none":
            return None
        raise ConfigError(
            f"{run.consortium_file}: security.mode {config.plan.security.mode} needs a charter with everyone's public keys",
            fix="make one with fedmat keys charter and name it under charter:",
        )
    organisations = {m.site: m.organisation for m in config.members}
    today = datetime.now(UTC).date()  # counts on the first day only, when the keys are made
    return keys.rehearsal(config.name, run.sites, organisations, lambda name: run.party_folder(name) / KEYS, today)


def site_identity(run: Run, site: str) -> Identity | None:
    """Returns a site's private keys, the charter and the members' secret; None where the plan encrypts nothing."""
    from fedmat import keys
    from fedmat.federation.holding import Identity

    charter = read_charter(run)
    if charter is None:
        return None
    secret = b""
    if run.plan().settings.security.canary_rate:
        secret = _members_secret(run)
    return Identity(keys.load(run.party_folder(site) / KEYS, site), charter, secret)


@contextmanager
def open_engine(run: Run) -> Iterator[Engine]:
    """Gives the in-process engine, with one process per site where the plan says so."""
    from fedmat.federation.engine import InProcessEngine, ProcessEngine
    from fedmat.federation.rounds import role_names

    members_charter(run)  # makes the rehearsal's keys, before any party looks for them
    roles = role_names(run.plan())
    engine: Engine
    if run.plan().settings.isolation == "process":
        factories = {s: (build_noting, (run, s)) for s in run.sites} | {r: (build_role, (run, r)) for r in roles}
        engine = ProcessEngine(factories)
    else:
        handlers = {s: _handler_or_refusal(run, s) for s in run.sites} | {r: build_role(run, r) for r in roles}
        engine = InProcessEngine(handlers)
    with engine:
        yield engine


def _engine(run: Run, engine: Engine | None) -> AbstractContextManager[Engine]:
    return open_engine(run) if engine is None else nullcontext(engine)


# --- for the consortium ------------------------------------------------------------------------------------------


def train(run: Run, *, resume: bool = True, engine: Engine | None = None) -> Iterator[RoundReport]:
    """Runs the rounds that are still to do, yielding a report after each; writes the global model at the end.

    Args:
        resume: False throws away this run's earlier rounds.
        engine: brings requests to the sites, also for the steps below; None opens the in-process engine.
    """
    from fedmat.federation.coordinator import CHECKPOINT, EXCHANGES, INTERVALS, MATCHING, NONCE, ROUNDS, SETUP, Coordinator
    from fedmat.models.network import Architecture

    plan = run.plan()
    folder = run.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        for name in (CHECKPOINT, ROUNDS, SETUP, INTERVALS, MATCHING, MODEL, METRICS, EVALUATIONS, TIMINGS, NONCE):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / EXCHANGES, ignore_errors=True)
    files.write_json(folder / PLAN, plan.as_json())
    files.write_atomic(run.home / "runs" / "latest", folder.name.encode())
    started = time.perf_counter()
    with _engine(run, engine) as delivery:
        architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
        coordinator = Coordinator(
            plan,
            lambda n: architecture.initial_weights(n, plan.settings.seed),
            folder,
            charter=read_charter(run),
            today=datetime.now(UTC).date().isoformat(),  # whether keys still count; nothing of it is in the model
        )
        ran = False
        for report in coordinator.run(delivery):
            ran = True
            yield report
    wire.save_model(coordinator.model(), folder / MODEL)
    if ran:
        overhead = [r["overhead_seconds"] for r in run.reports()]
        _note(folder, train=time.perf_counter() - started, round_overhead_mean=sum(overhead) / len(overhead))


def baselines(run: Run, progress: Callable[[str], None] | None = None, *, engine: Engine | None = None) -> None:
    """Trains what the global model is compared with: local-only, fine-tuned and, if the data are all here, pooled models.

    Models that were trained for this very global model, and whose files are whole, are not trained again.
    """
    from fedmat import baselines as arms

    plan, folder = run.plan(), run.folder
    model = wire.load_model(folder / MODEL)
    digest = files.sha256_file(folder / MODEL)
    made = folder / "arms" / "made-for.json"
    if _whole(made, digest):
        return
    say = progress or (lambda _: None)
    written: dict[str, str] = {}

    def keep(name: str, data: bytes) -> None:
        files.write_atomic(made.with_name(name), data)
        written[name] = files.sha256(data)

    with _timed_note(folder, "baselines"):
        with _engine(run, engine) as delivery:
            say("local-only, fine-tuned and personal models")
            for pair in arms.own_models(delivery, plan, model, _asked(folder)).values():
                for baseline in pair:
                    keep(f"{baseline.arm}-{baseline.site}.safetensors", wire.encode(baseline))
        if plan.simulated and _data_here(run):
            say("pooled model")
            arm = arms.pooled(plan, {s: kept_table(run, s) for s in _asked(folder)})
            keep("pooled.safetensors", wire.encode(GlobalModel(arm.weights, arm.scaler, {"arm": "pooled"})))
    files.write_json(made, {"model_sha256": digest, "files": written})


def evaluate(run: Run, *, engine: Engine | None = None) -> dict[str, Any]:
    """Scores every arm at every site that may see it, and writes evaluations.json and metrics.json."""
    from fedmat import baselines as arms

    plan, folder = run.plan(), run.folder
    model = wire.load_model(folder / MODEL)
    sites = _asked(folder)
    own, pooled = _trained_arms(folder, plan.simulated and _data_here(run))
    to_score = [arms.Arm("federated", model.weights, model.scaler), arms.dummy(model), *pooled]
    evaluations: list[Evaluation] = []
    for baseline in own:
        if baseline.weights and baseline.scaler is not None:
            to_score.append(arms.Arm(f"{baseline.arm}:{baseline.site}", baseline.weights, baseline.scaler))
        else:
            evaluations.append(baseline.evaluation)
    interval: dict[str, Any] = wire.plain(model.spec["interval"])
    radius = {s: r if r is not None else math.inf for s, r in interval["sites"].items()}
    further: list[Evaluation] = []
    with _timed_note(folder, "evaluate"), _engine(run, engine) as delivery:
        for arm in to_score:
            evaluations += arms.score(delivery, plan, arm, sites, radius=radius if arm.name == "federated" else None)
        for task in plan.tasks[1:]:
            for arm in to_score[: 2 + len(pooled)]:
                further += arms.score(delivery, plan, arm, sites, target=task.target)
    further += [e for baseline in own for e in baseline.auxiliary]
    evaluations.sort(key=lambda e: (e.arm, e.site))
    kept = [dataclasses.replace(e, draws=np.zeros(0)) for e in (*evaluations, *further)]
    files.write_json(folder / EVALUATIONS, wire.plain(kept))
    result = _metrics(run, evaluations, further, {b.site: b.mixture for b in own if b.arm == "personal"})
    files.write_json(folder / METRICS, result)
    return result


def report(run: Run) -> Path:
    """Writes the run's HTML report and returns its path."""
    from fedmat import report as page

    _collect_site_timings(run)
    return page.write(run.folder)


def settle(run: Run, *, engine: Engine | None = None) -> dict[str, Any]:
    """Settles who contributed how much to the run's model and writes settlement.json; done before, nothing is asked again.

    Raises:
        PlanRefused: the plan has no Auditor, or too few sites.
        StateError: the run is not finished, or of another plan.
    """
    from fedmat.federation import settlement
    from fedmat.federation.coordinator import NONCE, SETUP

    plan, folder = run.plan(), run.folder
    settlement.refuse(plan)
    charter = read_charter(run)
    if charter is None or files.read_json(folder / PLAN) != plan.as_json():
        raise StateError(f"{folder}: was run by another plan", fix="settle with the consortium file as it was then")
    model, nonce = wire.load_model(folder / MODEL), str(files.read_json(folder / NONCE)["run"])
    rows = {site: int(a["labels"][0]) for site, a in files.read_json(folder / SETUP)["attestations"].items()}
    with _engine(run, engine) as delivery:
        today = datetime.now(UTC).date().isoformat()  # whether keys still count
        return settlement.settle(delivery, plan, charter, model, rows, nonce, today, folder)


def statements(run: Run, *, engine: Engine | None = None) -> dict[str, Any]:
    """Asks the sites for their signed entries about the finished run and returns what is in ``statements.json``."""
    from fedmat import accounts

    with _engine(run, engine) as delivery:
        return accounts.ask(run.folder, run.plan(), _ledger_name(run), delivery)


def account(
    run: Run, now: datetime, *, ask: bool = False, witnesses: Mapping[str, tuple[PartyKeys, Path]] | None = None
) -> Accounted:
    """Writes the finished run into the operator's ledger, signs a checkpoint and packs the evidence bundle.

    Done again, it writes what came since. The ledger of a rehearsal is begun here, and its members' witnesses cosign here.

    Args:
        ask: have the sites of this machine sign what they did first.
        witnesses: members that cosign here: site -> keys and folder of its witness; by default those of a rehearsal.

    Raises:
        NotEvidenced: the run is not finished, or a real consortium has not begun its ledger.
        StateError: the ledger says something else about this run.
        ProtocolError: an entry breaks a rule of the ledger.
    """
    from fedmat import accounts

    name = str(statements(run)["run"]) if ask else _ledger_name(run)
    books, config = ledger_books(run), run.config()
    own = _own_keys(run)
    if own:
        charter = members_charter(run)
        if charter is not None:
            accounts.begin(books, config, charter, {s: k for s, (k, _) in own.items()}, now)
    written = accounts.enter(books, name, run.folder, run.consortium_file, now)
    note = accounts.seal(books, now, witnesses or own)
    path = accounts.pack(books, name, run.folder)
    return Accounted(name, written, int(note.splitlines()[1]), path)


def ledger_books(run: Run) -> Books:
    """Returns the operator's ledger of this run's consortium."""
    from fedmat.accounts import Books

    return Books(run.home, run.config().name)


def _ledger_name(run: Run) -> str:
    from fedmat import accounts

    return accounts.name_of(ledger_books(run).fold(), run.folder)


def _own_keys(run: Run) -> dict[str, tuple[PartyKeys, Path]]:
    """Returns the keys of the sites of a rehearsal, with the folders of their witnesses; of a real consortium none are here."""
    from fedmat import accounts, keys

    elsewhere = (run.home / "project.json").exists()  # an operator's project: its members are other organisations
    if elsewhere or not run.config().simulated or run.config().charter is not None or run.charter_file is not None:
        return {}
    members_charter(run)
    return {s: (keys.load(run.party_folder(s) / KEYS, s), run.party_folder(s) / accounts.WITNESS) for s in run.sites}


def publish(run: Run, tracking_uri: str | None = None, now: datetime | None = None) -> Registered:
    """Registers the run's model in MLflow; promotes it when it beats the present champion on the same test set.

    Where the consortium has a ledger, it is promoted only with the approvals that the charter asks for, and the registration
    becomes an entry.
    """
    from fedmat import accounts, registry

    books = ledger_books(run)
    fold = books.fold()
    may = _approved(run, fold) if fold.size else ("" if run.config().simulated else "a ledger with the members' approvals")
    found = registry.register(run.folder, tracking_uri=tracking_uri or registry.registry_uri(Path.cwd()), hindrance=may)
    name = accounts.name_of(fold, run.folder)
    if name in fold.runs and fold.runs[name].evaluation is not None:
        when = now or datetime.now(UTC)
        accounts.register(books, name, found.name, found.version, found.sha256, found.aliases, found.reason, when)
        accounts.seal(books, when, _own_keys(run))
        accounts.pack(books, name, run.folder)
    return found


def _approved(run: Run, fold: Fold) -> str:
    """Returns what keeps a run's model from being champion; "" if the charter's approvals are there."""
    from fedmat import accounts

    entries = fold.runs.get(accounts.name_of(fold, run.folder))
    needed = fold.terms.approvals_needed(len(fold.sites))
    given = [s for s in entries.approved_by() if s in fold.sites] if entries else []
    if len(given) >= needed:
        return ""
    return f"approvals: {len(given)} of the {needed} that the charter asks for"


# --- inside --------------------------------------------------------------------------------------------------------


def _handler_or_refusal(run: Run, site: str) -> Handler:
    """A site that cannot take part answers every request with its reason; the coordinator decides what that means."""
    try:
        return build_noting(run, site)
    except (DataError, StateError) as error:
        trouble = error

    def refuse(_: bytes) -> bytes:
        raise trouble

    return refuse


def matching_keys(run: Run, site: str) -> MatchingKeys | None:
    """Returns the keys of a site's records under the members' secret; None where the plan does not look for duplicates.

    Raises:
        StateError: on a site's own machine, the secret is not there.
    """
    from fedmat.data import matching
    from fedmat.data.contract import record_type
    from fedmat.data.records import load_records
    from fedmat.federation.site import MatchingKeys

    plan = run.plan()
    if not plan.settings.deduplicate:
        return None
    secret = _members_secret(run)
    scope = f"{plan.consortium}/{plan.sha256}"
    rt = record_type(plan.task.record_type)
    targets = [t.target for t in plan.tasks]
    keys = matching.keys(load_records(run.site_folder(site)), rt, targets, secret, scope)
    return MatchingKeys(matching.fingerprint(secret, scope), keys)


def _members_secret(run: Run) -> bytes:
    """Returns the members' secret: where all sites share a workspace, the first one makes it; elsewhere one site hands it to the others."""
    from fedmat.data import matching

    path = run.home / SECRET
    if run.site_file is not None and not path.exists():  # one made here would match nobody's
        raise StateError(
            f"{path}: the members' secret is not here",
            fix="fedmat site secret --home FOLDER --take FILE, with the file of another site; or without --take at the first one",
        )
    return matching.load_or_create_secret(path)


def kept_table(run: Run, site: str) -> FeatureTable:
    """Returns the rows a site works with in this run: its features without what was found at another site."""
    from fedmat.federation.site import kept_rows, state_folder

    return kept_rows(state_folder(run.site_folder(site), run.plan()), site_table(run, site), matching_keys(run, site))


def site_table(run: Run, site: str) -> FeatureTable:
    """Returns one site's features, from the site's cache where it has them."""
    from fedmat.data.contract import record_type
    from fedmat.features import dataset, registry

    config = run.config()
    rt = record_type(config.task.record_type)
    features = [registry.build(config.features, rt, t.target) for t in config.tasks]  # no target may be an input
    return dataset.featurize(run.site_folder(site), features[0], config.tasks, config.splits, rt, config.model.graph)


def _asked(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(files.read_json(folder / "attestations.json")["attestations"]))


def _data_here(run: Run) -> bool:
    """Whether all sites' data lie in this workspace: in a simulated consortium, and not where sites are other machines."""
    return all((run.site_folder(s) / "manifest.json").exists() for s in _asked(run.folder))


def _whole(made: Path, model_sha256: str) -> bool:
    """Tells whether all models listed in ``made`` belong to this global model and are as they were written."""
    if not made.exists():
        return False
    known = files.read_json(made)
    paths = {made.with_name(name): sha256 for name, sha256 in known["files"].items()}
    return known["model_sha256"] == model_sha256 and all(p.exists() and files.sha256_file(p) == d for p, d in paths.items())


def _trained_arms(folder: Path, with_pooled: bool) -> tuple[list[Baseline], list[Arm]]:
    from fedmat.baselines import OWN, Arm

    own: list[Baseline] = []
    for site in _asked(folder):
        for arm in OWN:
            path = folder / "arms" / f"{arm}-{site}.safetensors"
            if not path.exists():
                raise NotEvidenced(f"{path}: the {arm} model of {site} was not trained", fix="run the baselines step first")
            own.append(wire.decode(path.read_bytes(), Baseline))
    pooled: list[Arm] = []
    if with_pooled:
        path = folder / "arms" / "pooled.safetensors"
        if not path.exists():
            raise NotEvidenced(f"{path}: the pooled model was not trained", fix="run the baselines step first")
        model = wire.load_model(path)
        pooled.append(Arm("pooled", model.weights, model.scaler))
    return own, pooled


def _metrics(
    run: Run,
    evaluations: Sequence[Evaluation],
    further: Sequence[Evaluation] = (),
    mixtures: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    from fedmat.federation.evaluation import scores

    config, folder, plan = run.config(), run.folder, run.plan()
    kind, task = config.task.kind, config.task
    sites = _asked(folder)
    found = scores(evaluations, kind, task.metric, sites)
    attestations = files.read_json(folder / "attestations.json")["attestations"]
    organisations = {m.site: m.organisation for m in config.members}
    site_rows: dict[str, Any] = {}
    for site in sites:
        a = attestations[site]
        site_rows[site] = {
            "organisation": organisations[site],
            **{k: a[k] for k in ("n_train", "n_validation", "n_test", "n_groups", "rejected", "dataset_sha256")},
            **found[site],
            "mixture": dict((mixtures or {}).get(site, {})),
        }
    rows = run.reports()
    traffic = {s: {"down": sum(r["bytes_down"].get(s, 0) for r in rows), "up": sum(r["bytes_up"].get(s, 0) for r in rows)}
               for s in sites}  # fmt: skip
    up = sum(t["up"] for t in traffic.values())
    model_sha256 = files.sha256_file(folder / MODEL)
    return {
        "schema": "fedmat/metrics/1",
        "consortium": config.name,
        "title": config.title,
        "simulated": config.simulated,
        "task": {
            **{k: getattr(task, k) for k in ("name", "target", "unit", "transform", "kind", "metric")},
            "metric_unit": _metric_unit(task),
        },
        "auxiliary": {t.target: _auxiliary(t, further) for t in config.auxiliary},
        "model": {"name": f"fedmat-{task.name}", "version": None, "sha256": model_sha256},
        "global": found[""],
        "sites": site_rows,
        "bytes": {
            "sites": traffic,
            "total_down": sum(t["down"] for t in traffic.values()),
            "total_up": up,
            "per_round_up": up / len(rows) if rows else 0,
        },
        "rounds": {"count": plan.settings.rounds, "completed": len(rows)},
        "protection": _protection(rows, sites),
        "matching": files.read_json(folder / "matching.json") if (folder / "matching.json").exists() else None,
        "exclusions": [
            {"round": -1, **{k: f[k] for k in ("site", "kind", "reason", "detail")}}
            for f in files.read_json(folder / "attestations.json")["failures"]
        ]
        + [
            {"round": r["round"], "site": x["site"], "kind": kind_, "reason": x["reason"], "detail": x["detail"]}
            for r in rows
            for kind_, found in (("dropout", r["dropouts"]), ("rejection", r["rejections"]))
            for x in found
        ],
        "plan_sha256": plan.sha256,
        "code_version": __version__,
        "digests": {
            "model": model_sha256,
            "plan": plan.sha256,
            "attestations": files.sha256(files.canonical_json(attestations)),
        },
    }


def _protection(rows: Sequence[Mapping[str, Any]], sites: Sequence[str]) -> dict[str, Any]:
    """Returns how rounds were protected, and per site how often it counted, was left out by the rule, and what it found."""
    found: dict[str, Any] = {}
    for site in sites:
        audits = [r["audits"][site] for r in rows if site in r["audits"]]
        reasons = [r["excluded"][site] for r in rows if site in r["excluded"]]
        found[site] = {
            "counted": sum(site in r["shares"] for r in rows),
            "left_out": sum(site in r["excluded"] and site not in r["shares"] for r in rows),
            "last_reason": reasons[-1] if reasons else "",
            "agreed": sum(a == "agrees" for a in audits),
            "disagreed": [a for a in audits if a.startswith("disagrees")],
            "contribution": sum(r["contribution"].get(site, 0.0) for r in rows),
        }
    given_up = sum(not r["shares"] for r in rows)
    role_bytes = sum(sum(r["role_bytes"].values()) for r in rows)
    first = rows[-1] if rows else {"protection": "none", "rule": ""}
    return {"mode": first["protection"], "rule": first["rule"], "sites": found, "given_up": given_up, "role_bytes": role_bytes}


def _metric_unit(task: Task) -> str:
    return f"log10({task.unit})" if task.transform == "log10" else task.unit


def _auxiliary(task: Task, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Returns an auxiliary task's results: the global arms on all sites' rows, and each site's own models on its own."""
    from fedmat.federation.evaluation import known, metrics

    found = [e for e in evaluations if e.target == task.target]
    everywhere = {arm: metrics([e for e in found if e.arm == arm], task.kind) for arm in ("federated", "pooled", "dummy")}
    own: dict[str, Any] = {}
    for e in found:
        if ":" in e.arm and (value := metrics([e], task.kind)) is not None:
            own.setdefault(e.site, {})[e.arm.split(":")[0]] = value
    return {"name": task.name, "metric_unit": _metric_unit(task), "global": known(everywhere), "sites": own}


@contextmanager
def _timed(path: Path) -> Iterator[None]:
    started = time.perf_counter()
    yield
    files.write_json(path, time.perf_counter() - started)


@contextmanager
def _timed_note(folder: Path, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    _note(folder, **{name: time.perf_counter() - started})


def _note(folder: Path, **seconds: float) -> None:
    path = folder / TIMINGS
    known = files.read_json(path) if path.exists() else {}
    files.write_json(path, known | seconds)


def _collect_site_timings(run: Run) -> None:
    for step in ("prepare", "featurize"):
        found = [run.site_folder(s) / f"{step}-seconds.json" for s in run.sites]
        if all(p.exists() for p in found):
            _note(run.folder, **{step: sum(files.read_json(p) for p in found)})


def as_plain(value: Any) -> dict[str, Any]:
    """Returns a small result dataclass as plain JSON (paths as text)."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(value).items()}
