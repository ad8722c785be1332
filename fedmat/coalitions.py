"""What a member's records were worth: every coalition trained anew, and beside it the estimates that a run can afford.

Knows: feature tables of a simulated consortium, which member is honest and how one is not, the frozen test rows that every
coalition's model is judged by. Refuses to know: pages and terminals. One coalition of one seed is one file, named by all it
depends on: an interrupted measurement goes on, and coalitions that two cases have in common are trained once.

The worth of a coalition is the fall of the error on the frozen rows against one fixed prediction, the mean of the honest
members' training targets, which is what nobody predicts. It is the definition that estimates are held against, not something a
consortium could do: retraining opens every coalition's model, and two that differ by one member give its update away.

Everything here needs all members' data in one place; only consortia declared simulated take part.

References:
    ``fedmat.contribution`` for shares and their estimates. Wang et al., "A Principled Approach to Data Valuation for Federated
    Learning", Federated Learning, Springer 2020; Liu et al., "GTG-Shapley", ACM TIST 2022 (the same comparison for per-round
    estimates). Fraboni, Vidal, Lorenzi, "Free-rider attacks on model aggregation in federated learning", AISTATS 2021.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedmat import contribution, files, keys, wire
from fedmat import weights as wts
from fedmat.contribution import Moments
from fedmat.domain import Array, GlobalModel, TrainRequest
from fedmat.envelopes import ROLES
from fedmat.errors import NotEvidenced, PlanRefused
from fedmat.features.table import TEST, TRAIN, VALIDATION, FeatureTable, concatenate
from fedmat.federation import role, rounds, settlement
from fedmat.federation.coordinator import Coordinator
from fedmat.federation.engine import Engine, Handler, InProcessEngine
from fedmat.federation.holding import Identity
from fedmat.federation.plan import MIN_SITES, Plan
from fedmat.federation.reference import ReferenceWorker
from fedmat.federation.site import SiteWorker
from fedmat.hostile import vary
from fedmat.models.hidden import last_hidden
from fedmat.models.network import Architecture
from fedmat.privacy.mechanisms import Noise
from fedmat.seeds import derive, stream
from fedmat.weights import Vector, Weights

SCHEMA = "fedmat/coalitions/1"
TODAY = "2026-01-01"
Conduct = Literal["honest", "zero", "again"]
Metric = Literal["mae", "mse"]
MADE_UP, TWIN = "rider", "twin"  # names of members that some cases add
FREE: dict[str, Conduct] = {"rider-noise": "honest", "rider-zero": "zero", "rider-again": "again"}
DRAWS = 10  # settlements of one model, each with fresh noise


@dataclass(frozen=True)
class Member:
    """A site and how it takes part.

    Attributes:
        rows: training and validation rows; test rows are not looked at.
        conduct: "zero" sends the model back as it came, "again" the step the model took last; neither trains.
    """

    rows: FeatureTable
    conduct: Conduct = "honest"


@dataclass(frozen=True)
class Case:
    """One consortium whose members' worth is asked for.

    Attributes:
        plan: one network in the clear; roster, seed and quorum are those of each coalition.
        members: by site.
        test: frozen test rows of the honest sites as they were, by site; never changed by what a member does.
        reference: rows that rounds are measured on; the frozen test rows, or others of no training.
        nobody: what a coalition of nobody predicts, the transformed target's unit.
    """

    name: str
    plan: Plan
    members: Mapping[str, Member]
    test: Mapping[str, FeatureTable]
    reference: FeatureTable
    nobody: float

    @property
    def sites(self) -> tuple[str, ...]:
        """Members in the order of the alphabet: site ``i`` is bit ``i`` of a coalition."""
        return tuple(sorted(self.members))


@dataclass(frozen=True)
class Released:
    """The model of all members together, trained in encrypted rounds that look at contributions.

    Attributes:
        rounds: one mapping of site to share per round, as the round's report has it.
        seconds: CPU seconds of everything; of that, ``looking`` at the reference party.
    """

    model: GlobalModel
    rounds: Sequence[Mapping[str, float]]
    seconds: float
    looking: float


# --- cases ---------------------------------------------------------------------------------------------------------


def shortened(plan: Plan, count: int, average: int) -> Plan:
    """Returns the plan with one network, ``count`` rounds of which the last ``average`` are averaged, and no search for copies."""
    return vary(plan, ensemble=1, rounds=count, average_last=average, deduplicate=False)


def base(name: str, plan: Plan, tables: Mapping[str, FeatureTable]) -> Case:
    """Returns the case where every site is what it says; of several tasks the first alone, and the rows that state it."""
    if len(plan.tasks) > 1:
        plan = replace(plan, tasks=plan.tasks[:1])
        cut = {s: replace(t, y=t.y[:, :1], bound=t.bound[:, :1]) for s, t in tables.items()}
        tables = {s: t.rows(np.isfinite(t.y[:, 0])) for s, t in cut.items()}
    honest = {s: Member(t) for s, t in tables.items()}
    learning = np.concatenate([t.part(TRAIN).y[:, 0] for _, t in sorted(tables.items())])
    test = {s: t.part(TEST) for s, t in tables.items()}
    reference = concatenate([t for _, t in sorted(test.items())])
    return Case(name, plan, honest, test, reference, float(np.nanmean(learning)))


def by_validation_rows(case: Case) -> Case:
    """Returns the case with the members' validation rows as reference rows, where there is no set that everyone agreed on."""
    return replace(case, reference=concatenate([case.members[s].rows.part(VALIDATION) for s in case.sites]))


def shuffled(case: Case, site: str) -> Case:
    """Returns the case where a site's labels, training and validation, are dealt out anew among its rows."""
    rows = case.members[site].rows
    y = rows.y.copy()
    for split in (TRAIN, VALIDATION):
        at = np.flatnonzero(rows.split == split)
        y[at] = stream(1, "shuffled", site, split).permutation(y[at])
    return _with(case, "shuffled", {**case.members, site: Member(replace(rows, y=y, sha256=f"shuffled {rows.sha256}"))})


def ridden(case: Case, name: str, rows: int) -> Case:
    """Returns the case with one site more that has no data: it makes ``rows`` up.

    Every column of features and the target are drawn from the honest sites' training rows, each by itself: sums and ranges are
    right, and nothing belongs together. A member that only copies numbers it knows can do no better without records.
    """
    everyone = concatenate([case.members[s].rows.part(TRAIN) for s in case.sites])
    rng = stream(1, "made up", rows)
    x = np.column_stack([rng.choice(column, rows) for column in everyone.x.T])
    known = np.flatnonzero(np.isfinite(everyone.y[:, 0]))
    y = everyone.y[rng.choice(known, rows)]
    split = np.where(np.arange(rows) % 7 == 0, VALIDATION, TRAIN).astype(np.int8)
    first = case.members[case.sites[0]].rows
    made = replace(
        everyone, x=x, y=y, split=split, bound=np.zeros(y.shape, np.int8), group=np.arange(rows), component=np.arange(rows),
        sha256=f"made up {rows}", features_sha256=first.features_sha256,
    )  # fmt: skip
    return _with(case, name, {**case.members, MADE_UP: Member(made, FREE[name])})


def twinned(case: Case, site: str) -> Case:
    """Returns the case with one site more that holds the same records as ``site``."""
    rows = case.members[site].rows.part(TRAIN, VALIDATION)
    return _with(case, "twin", {**case.members, TWIN: Member(replace(rows, sha256=f"twin {rows.sha256}"))})


def divided(case: Case, site: str) -> Case:
    """Returns the case where a site takes part as two, each with every other of its materials; no material is divided."""
    rows = case.members[site].rows
    names = np.unique(rows.component)
    half = np.isin(rows.component, names[::2])
    parts = {
        f"{site}-{n}": Member(replace(rows.rows(keep), sha256=f"{n} {rows.sha256}")) for n, keep in (("a", half), ("b", ~half))
    }
    return _with(case, "divided", {s: m for s, m in case.members.items() if s != site} | parts)


def _with(case: Case, name: str, members: Mapping[str, Member]) -> Case:
    return replace(case, name=f"{case.name}/{name}", members=members)


# --- federations ---------------------------------------------------------------------------------------------------


class Rider(SiteWorker):
    """A member that does not train."""

    def ride(self, conduct: Conduct) -> Rider:
        """Chooses what it sends instead of an update."""
        self._conduct, self._before = conduct, wts.flatten({})
        return self

    def _train(self, request: TrainRequest, held: GlobalModel) -> tuple[Weights, Weights, float, Array]:
        now = wts.flatten(held.weights)
        last = now - self._before if self._conduct == "again" and len(self._before) else np.zeros_like(now)
        self._before = now
        return wts.unflatten(last, held.weights), {}, float("nan"), np.zeros(0)


def retrain(case: Case, coalition: int, seed: int, out: Path) -> dict[str, Any]:
    """Trains a coalition's own federation in the clear and scores it, from its file where that was done before.

    Returns:
        ``errors``: test site -> rows, sum of absolute errors, sum of squared errors, transformed target's unit; ``seconds`` of CPU.
    """
    sites = [s for i, s in enumerate(case.sites) if coalition >> i & 1]
    plan = _seated(case.plan, sites, seed)
    key = files.sha256(files.canonical_json([SCHEMA, plan.as_json(), _told(case, sites)]))
    path = out / "federations" / f"{key[:32]}.json"
    if path.exists():
        found: dict[str, Any] = files.read_json(path)
        return found
    started = time.process_time()
    folder = _workspace(out)
    try:
        with InProcessEngine(_workers(plan, case, folder)) as engine:
            model = _lead(plan, engine, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.process_time() - started
    result = {"case": case.name, "seed": seed, "members": sites, "errors": judged(case, plan, model), "seconds": seconds}
    files.write_json(path, result)
    return result


def release(case: Case, seed: int, out: Path) -> Released:
    """Trains all members in encrypted rounds that look at contributions: what estimates are taken from.

    Raises:
        PlanRefused: fewer than five members.
    """
    if len(case.sites) < MIN_SITES:
        raise PlanRefused(f"{case.name}: {len(case.sites)} members encrypt nothing", fix=f"have {MIN_SITES}")
    plan = encrypted(case, seed)
    key = files.sha256(
        files.canonical_json([SCHEMA, "release", plan.as_json(), _told(case, case.sites), _digest(case.reference)])
    )
    kept = out / "releases" / key[:32]
    if not (kept / "rounds.json").exists():
        folder = _workspace(out)
        looking = [0.0]
        try:
            charter = keys.rehearsal(
                plan.consortium, plan.roster, {s: f"Company {s}" for s in plan.roster},
                lambda n: folder / ("roles" if n in ROLES else "sites") / n / "keys", date.fromisoformat(TODAY),
            )  # fmt: skip
            secret = stream(seed, "members-secret").bytes(32)
            identities = {s: Identity(keys.load(folder / "sites" / s / "keys", s), charter, secret) for s in plan.roster}
            handlers = _workers(plan, case, folder, identities)
            for name in ROLES:
                home = folder / "roles" / name
                handlers[name] = role.worker(name, plan, keys.load(home / "keys", name), charter, home).handle
            handlers[rounds.REFERENCE] = _timed(ReferenceWorker(plan, case.reference).handle, looking)
            started = time.process_time()
            shares: list[Mapping[str, float]] = []
            with InProcessEngine(handlers) as engine:
                model = _lead(plan, engine, folder, charter, shares)
            seconds = time.process_time() - started
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        files.write_atomic(kept / "model.safetensors", wire.encode(model))
        files.write_json(kept / "rounds.json", {"rounds": shares, "seconds": seconds, "looking": looking[0]})
    told = files.read_json(kept / "rounds.json")
    model = wire.decode((kept / "model.safetensors").read_bytes(), GlobalModel)
    return Released(model, told["rounds"], told["seconds"], told["looking"])


def encrypted(case: Case, seed: int, **spec: float) -> Plan:
    """Returns the plan of all members, in encrypted rounds that look at contributions; ``spec``: keys of ``contribution``."""
    body = {"security": {"mode": "trigram", "ring_bits": 64}, "contribution": {"method": "gram", **spec}}
    return vary(_seated(case.plan, case.sites, seed), **body)


def _seated(plan: Plan, sites: Sequence[str], seed: int) -> Plan:
    """Returns the plan for these sites, all of whom have to answer; a few must be able to give away all weight."""
    most = max(plan.settings.max_weight_share, 1.0 / len(sites))
    settings = plan.settings.model_copy(update={"quorum": len(sites), "max_weight_share": most, "seed": seed})
    return replace(plan, roster=tuple(sites), settings=settings)


def _workspace(out: Path) -> Path:
    """Returns an empty folder of this process's own: two that measure the same do not meet."""
    (out / "work").mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=out / "work"))


def _workers(plan: Plan, case: Case, folder: Path, identities: Mapping[str, Identity] | None = None) -> dict[str, Handler]:
    found: dict[str, Handler] = {}
    for site in plan.roster:
        member = case.members[site]
        kind = SiteWorker if member.conduct == "honest" else Rider
        manifest: dict[str, object] = {"sha256": member.rows.sha256, "rejected": {}}
        worker = kind(site, plan, member.rows, manifest, folder / "sites" / site, identity=(identities or {}).get(site))
        if isinstance(worker, Rider):
            worker.ride(member.conduct)
        found[site] = worker.handle
    return found


def _lead(
    plan: Plan, engine: Engine, folder: Path, charter: keys.Charter | None = None, shares: list[Mapping[str, float]] | None = None
) -> GlobalModel:  # fmt: skip
    architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
    run = folder / "run"
    run.mkdir(parents=True, exist_ok=True)
    lead = Coordinator(plan, lambda n: architecture.initial_weights(n, plan.settings.seed), run, charter=charter, today=TODAY)
    for report in lead.run(engine):
        if shares is not None:
            shares.append(dict(report.contribution))
    return lead.model()


def _timed(handle: Handler, spent: list[float]) -> Handler:
    def answer(data: bytes) -> bytes:
        started = time.process_time()
        reply = handle(data)
        spent[0] += time.process_time() - started
        return reply

    return answer


def _told(case: Case, sites: Sequence[str]) -> list[Any]:
    """What the result depends on beside the plan."""
    members = [[s, case.members[s].conduct, case.members[s].rows.sha256, len(case.members[s].rows)] for s in sites]
    return [members, [[s, t.sha256, len(t)] for s, t in sorted(case.test.items())]]


def _digest(table: FeatureTable) -> str:
    return files.sha256(np.ascontiguousarray(table.x).tobytes() + np.ascontiguousarray(table.y).tobytes())


def judged(case: Case, plan: Plan, model: GlobalModel) -> dict[str, list[float]]:
    """Returns, by test site, rows and sums of absolute and squared errors of a model on the frozen rows."""
    architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
    out = {}
    for site, test in sorted(case.test.items()):
        known = np.isfinite(test.y[:, 0])
        if known.any():
            guess = architecture.predict(model.weights, model.scaler, test.names, test.x, test.graphs)[:, 0]
            out[site] = _sums((guess - test.y[:, 0])[known])
    return out


def _sums(error: Vector) -> list[float]:
    return [float(len(error)), float(np.abs(error).sum()), float(np.square(error).sum())]


# --- truth ---------------------------------------------------------------------------------------------------------


def worth(
    case: Case, seed: int, out: Path, metric: Metric, told: Callable[[int], None] = lambda _: None
) -> tuple[Vector, float]:
    """Returns the worth of every coalition, shape ``2**n``, transformed target's unit (squared for mse), and CPU seconds spent.

    Pooled over all test rows: a row counts the same whichever site tests it.
    """
    nobody = {s: _sums((case.nobody - t.y[:, 0])[np.isfinite(t.y[:, 0])]) for s, t in case.test.items() if len(t)}
    start, out_, spent = _mean(nobody, metric), np.zeros(1 << len(case.sites)), 0.0
    for coalition in range(1, len(out_)):
        found = retrain(case, coalition, seed, out)
        out_[coalition] = start - _mean(found["errors"], metric)
        spent += found["seconds"]
        told(coalition)
    return out_, spent


def _mean(errors: Mapping[str, Sequence[float]], metric: Metric) -> float:
    at = {"mae": 1, "mse": 2}[metric]
    return math.fsum(e[at] for e in errors.values()) / math.fsum(e[0] for e in errors.values())


def left_out(worths: Vector) -> Vector:
    """Returns what all together lose without each site, shape ``n``: leave one out, from the same coalitions."""
    n = len(worths).bit_length() - 1
    everyone = len(worths) - 1
    return np.array([worths[everyone] - worths[everyone ^ 1 << i] for i in range(n)])


# --- estimates -----------------------------------------------------------------------------------------------------


def moments_of(plan: Plan, model: GlobalModel, rows: FeatureTable) -> tuple[Array, Vector]:
    """Returns features ``n x (dims + 1)`` and standardised targets of rows, as a site makes them for a settlement."""
    part = rows.rows(np.isfinite(rows.y[:, 0]) & (rows.bound[:, 0] == 0))
    architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
    inputs = architecture.inputs(model.scaler, part.names, part.x, part.graphs)
    hidden = last_hidden(architecture, model.weights, inputs)
    target = model.scaler.target(part.y)[:, 0].astype(np.float64)
    return settlement.features(plan, wire.weights_digest(model.weights, model.scaler), hidden), target


def settled(
    case: Case,
    seed: int,
    model: GlobalModel,
    *,
    epsilon: float | None,
    draw: int = 0,
    owners: Sequence[Sequence[str]] = (),
    frozen: bool = False,
    bare: bool = False,
) -> tuple[Vector, Vector]:
    """Returns a settlement's shares and their stated errors, both shape ``n``, by the code that the Auditor runs.

    Args:
        epsilon: of the plan; None: no noise, and a ridge as for ``epsilon`` of 10 000.
        draw: which noise.
        owners: groups of sites that are one player, every site in one; without, each is its own.
        frozen: examined by the frozen rows, without noise, and not by the members' validation rows; no errors are stated then.
        bare: with the ridge that covers the noise alone.
    """
    plan = encrypted(case, seed, settle_epsilon=epsilon or 1e4)
    source = Noise(insecure_seed=derive(seed, "settlement-noise", draw))

    def told(rows: FeatureTable, *, noisy: bool) -> Moments:
        found = moments_of(plan, model, rows)
        return settlement.protected(plan, *found, source) if noisy else contribution.moments(*found, settlement.BOUNDS)

    parts = [told(case.members[s].rows.part(TRAIN), noisy=epsilon is not None) for s in case.sites]
    counts = [0 if bare else m.n for m in parts]
    if frozen:
        exam = told(concatenate([t for _, t in sorted(case.test.items())]), noisy=False)
        return contribution.head_shapley(parts, exam, settlement.penalty(plan, len(parts), counts)), np.full(len(parts), np.nan)
    held_out = [told(case.members[s].rows.part(VALIDATION), noisy=epsilon is not None) for s in case.sites]
    groups = [[case.sites.index(s) for s in group] for group in owners] or None
    digest = wire.weights_digest(model.weights, model.scaler)
    return settlement.settle_moments(plan, parts, held_out, digest, groups, counts)[:2]


def per_round(case: Case, released: Released) -> Vector:
    """Returns the sum over rounds of what each round's report says, shape ``n``."""
    return np.array([math.fsum(r.get(s, 0.0) for r in released.rounds) for s in case.sites])


def rows(case: Case) -> Vector:
    """Returns numbers of training rows, shape ``n``: the naive yardstick."""
    return np.array([float((case.members[s].rows.split == TRAIN).sum()) for s in case.sites])


# --- comparison ----------------------------------------------------------------------------------------------------

LOOK, LOOK_VALIDATION, LEFT_OUT, ROWS, AGAIN = (
    "rounds, frozen rows", "rounds, validation rows", "leave one out, retrained", "rows", "retrained with another seed",
)  # fmt: skip
SETTLED: dict[str, dict[str, Any]] = {
    "settlement, no noise": {"epsilon": None},
    "settlement, epsilon 8": {"epsilon": 8.0},
    "settlement, epsilon 1": {"epsilon": 1.0},
    "settlement, no noise, bare ridge": {"epsilon": None, "bare": True},
    "settlement, epsilon 8, bare ridge": {"epsilon": 8.0, "bare": True},
    "settlement, no noise, frozen rows": {"epsilon": None, "frozen": True},
    "settlement, epsilon 8, frozen rows": {"epsilon": 8.0, "frozen": True},
    "settlement, epsilon 1, frozen rows": {"epsilon": 1.0, "frozen": True},
}


def estimates(case: Case, seed: int, out: Path, *, validation: bool) -> dict[str, dict[str, Any]]:
    """Returns every estimate of a case and seed: ``shares`` (one list per draw of noise), CPU ``seconds`` of one, and where a settlement
    states errors the share of draws in which it gives credits at all, ``given``.

    Args:
        validation: also looks at rounds by the members' validation rows, which trains once more.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, at in ((LOOK, case), *(((LOOK_VALIDATION, by_validation_rows(case)),) if validation else ())):
        released = release(at, seed, out)
        found[name] = {"shares": [per_round(case, released).tolist()], "seconds": released.looking}
    model = release(case, seed, out).model
    for name, how in SETTLED.items():
        draws = DRAWS if how["epsilon"] else 1
        started = time.process_time()
        drawn = [settled(case, seed, model, draw=draw, **how) for draw in range(draws)]
        found[name] = {"shares": [v.tolist() for v, _ in drawn], "seconds": (time.process_time() - started) / draws}
        if not how.get("frozen"):
            given = [contribution.credited(v.tolist(), e.tolist(), settlement.CREDITS)[0] is not None for v, e in drawn]
            found[name]["given"] = float(np.mean(given))
    found[ROWS] = {"shares": [rows(case).tolist()], "seconds": 0.0}
    return found


def summary(case: Case, seeds: Sequence[int], out: Path, *, validation: bool = False) -> dict[str, Any]:
    """Returns truth, estimates and how they agree, each over seeds: what the tables in the documentation are made of."""
    n = len(case.sites)
    worths = {m: [worth(case, s, out, m) for s in seeds] for m in ("mae", "mse")}
    truth = {m: [contribution.shapley(w) for w, _ in found] for m, found in worths.items()}
    by_seed = [estimates(case, s, out, validation=validation) for s in seeds]
    for at, found in enumerate(by_seed):
        found[LEFT_OUT] = {"shares": [left_out(worths["mse"][at][0]).tolist()], "seconds": 0.0}
        if len(seeds) > 1:
            found[AGAIN] = {"shares": [truth["mse"][(at + 1) % len(seeds)].tolist()], "seconds": 0.0}
    told: dict[str, Any] = {}
    for name in by_seed[0]:
        scores: dict[str, Any] = {}
        for metric in ("mae", "mse"):
            each = [
                _means([agreement(np.array(s), truth[metric][at]) for s in found[name]["shares"]])
                for at, found in enumerate(by_seed)
            ]
            scores[metric] = {k: spread([e[k] for e in each]) for k in each[0]}
        scaled = [_scaled(np.array(s)) for found in by_seed for s in found[name]["shares"]]
        ranks = [np.argsort(np.argsort(-np.array(s))) + 1 for found in by_seed for s in found[name]["shares"]]
        told[name] = {
            **scores, "seconds": spread([found[name]["seconds"] for found in by_seed]),
            "shares": {s: spread([float(v[i]) for v in scaled]) for i, s in enumerate(case.sites)},
            "ranks": {s: float(np.mean([r[i] for r in ranks])) for i, s in enumerate(case.sites)},
            **({"given": spread([found[name]["given"] for found in by_seed])} if "given" in by_seed[0][name] else {}),
        }  # fmt: skip
    return {
        "case": case.name, "seeds": list(seeds), "sites": {s: int(v) for s, v in zip(case.sites, rows(case), strict=True)},
        "plan": {k: case.plan.settings.model_dump(mode="json")[k] for k in ("rounds", "ensemble", "average_last", "site_weights")},
        "coalitions": (1 << n) - 1, "retraining_seconds": spread([s for _, s in worths["mae"]]),
        "gain": {m: spread([float(w[-1]) for w, _ in found]) for m, found in worths.items()},
        "truth": {m: {s: spread([float(t[i]) for t in found]) for i, s in enumerate(case.sites)} for m, found in truth.items()},
        "truth_shares": {m: {s: spread([float(_scaled(t)[i]) for t in found]) for i, s in enumerate(case.sites)} for m, found in truth.items()},
        "truth_ranks": {m: {s: float(np.mean([(np.argsort(np.argsort(-t)) + 1)[i] for t in found])) for i, s in enumerate(case.sites)} for m, found in truth.items()},
        "estimates": told,
    }  # fmt: skip


def agreement(estimate: Vector, truth: Vector) -> dict[str, float]:
    """Returns how far an estimate's shares are from the true ones.

    ``spearman`` and ``pearson``, not a number where one of the two is flat; ``l1``: distance of shares, each divided by the sum of their
    absolute values, 0 to 2; ``mean_error``: that over ``n``; ``credits``: of 1000, how many go to another site than is due, not a
    number where one of the two gives none.
    """
    from scipy import stats

    l1 = float(np.abs(_scaled(estimate) - _scaled(truth)).sum())
    try:
        given, due = (contribution.credits([float(s) for s in v], settlement.CREDITS) for v in (estimate, truth))
        wrong = 0.5 * sum(abs(a - b) for a, b in zip(given, due, strict=True))
    except NotEvidenced:
        wrong = float("nan")
    flat = bool(np.ptp(estimate) == 0 or np.ptp(truth) == 0)
    return {
        "spearman": float("nan") if flat else float(stats.spearmanr(estimate, truth)[0]),
        "pearson": float("nan") if flat else float(np.corrcoef(estimate, truth)[0, 1]),
        "l1": l1, "mean_error": l1 / len(truth), "credits": wrong,
    }  # fmt: skip


def _scaled(shares: Vector) -> Vector:
    total = float(np.abs(shares).sum())
    return shares / total if total else shares


def _means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {k: spread([s[k] for s in scores])["mean"] for k in scores[0]}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns mean, lowest and highest of the numbers that are numbers; an interval of three seeds is their range."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return dict.fromkeys(("mean", "low", "high"), float("nan"))
    return {"mean": math.fsum(known) / len(known), "low": min(known), "high": max(known)}


def rows_left(keys: Mapping[str, Any], tested: Mapping[str, Any], site: str) -> dict[str, dict[str, int]]:
    """Returns what a search for duplicates leaves of ``site`` and of a copy of its training rows, by the copy's name.

    Of two sites with as many rows the first in the alphabet keeps a measurement: who measured it nobody can tell from keys.

    Args:
        keys: by site, its matching keys (``fedmat.federation.site.MatchingKeys``).
        tested: by site, which rows are test rows.
    """
    from fedmat.assurance import duplicates

    out = {}
    for name in (f"a-{TWIN}", f"z-{TWIN}"):
        learning = ~tested[site]
        copy = {kind: k[learning] for kind, k in keys[site].keys.items()}
        offers = {s: duplicates.offer(s, k.fingerprint, k.keys, tested[s]) for s, k in keys.items() if s != site}
        own = {kind: k[learning] for kind, k in keys[site].keys.items()}
        nothing = np.zeros(int(learning.sum()), dtype=np.bool_)
        for who, k in ((site, own), (name, copy)):
            offers[who] = duplicates.offer(who, keys[site].fingerprint, k, nothing)
        removals = duplicates.find(offers).removals
        out[name] = {who: int(duplicates.apply(removals[who], k, nothing)[0].sum()) for who, k in ((site, own), (name, copy))}
    return out
