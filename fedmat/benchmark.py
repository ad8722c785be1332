"""The benchmark: every consortium, every way of training, several seeds, on the same frozen rows.

Knows: which consortium files belong to the suite, how a plan is varied into an arm, how seeds and sites are compared.
Refuses to know: terminals and pages. One arm of one seed is one file, named by everything it depends on: an interrupted
benchmark goes on, and a changed plan or record is measured again.

Everything here needs all sites' data in one place; only consortia declared simulated take part.

References:
    Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 7, 2006.
    Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 16 (paired resampling of groups).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedmat import files
from fedmat.config import Personalization, ServerOptimizer
from fedmat.domain import Array, Evaluation, GlobalModel, OwnArm
from fedmat.errors import ConfigError, PlanRefused
from fedmat.federation.plan import Plan

SEEDS = (17, 18, 19, 20, 21)
SCHEMA = "fedmat/bench/1"
DEFAULT = "default"
DEMO = "demo"


@dataclass(frozen=True)
class Case:
    """One consortium of the suite."""

    name: str
    file: str
    about: str


SUITE: tuple[Case, ...] = (
    Case("C1", "solid-electrolytes/consortium.yaml", "solid electrolytes, log10 of the conductivity in S/cm"),
    Case("C2-YS", "alloys/consortium-yield-strength.yaml", "alloys, yield strength in MPa"),
    Case("C2-HV", "alloys/consortium-hardness.yaml", "alloys, Vickers hardness"),
    Case("C4a", "liquid-electrolytes/consortium.yaml", "liquid electrolytes, log10 of the conductivity in S/cm"),
    Case("C4b", "polymer-electrolytes/consortium.yaml", "polymer electrolytes, log10 of the conductivity in S/cm"),
    Case("C6", "cell-ageing/consortium.yaml", "lithium-ion cells, log10 of the cycle life"),
    Case(DEMO, "cells/consortium.yaml", "simulated cells, energy per area in Wh/m^2 (data that the project ships)"),
)


@dataclass(frozen=True)
class Method:
    """A way of training: how it changes the consortium's plan, and which of the sites' own models it makes.

    Attributes:
        vary: the consortium's plan -> this arm's plan; None where the plan has nothing of the kind.
        own: models each site makes from the global one.
        abroad: whether the sites' local models are scored on the other sites' rows too.
    """

    name: str
    about: str
    vary: Callable[[Plan], Plan | None]
    own: tuple[OwnArm, ...] = ()
    abroad: bool = False


def _plain(plan: Plan) -> Plan:
    """FedAvg as in the paper: one network, equal weights, the last round's weights."""
    s = plan.settings.model_copy(
        update={
            "algorithm": "fedavg", "ensemble": 1, "average_last": 0, "server": ServerOptimizer(),
            "personalization": Personalization(), "local": plan.settings.local.model_copy(update={"mu": 0.0}),
        }
    )  # fmt: skip
    return replace(plan, settings=s)


def _with(plan: Plan, **settings: object) -> Plan:
    return replace(plan, settings=plan.settings.model_copy(update=settings))


def _scaffold(plan: Plan) -> Plan:
    base = _plain(plan).settings
    # plain SGD needs a larger step than Adam: 0.05 for standardised targets
    local = base.local.model_copy(update={"optimizer": "sgd", "weight_decay": 0.0, "lr": 0.05})
    return _with(_plain(plan), algorithm="scaffold", site_weights="equal", local=local)


def _private(plan: Plan, **settings: object) -> Plan | None:
    if plan.model.graph is not None:
        return None
    return _with(_plain(plan), personalization=Personalization.model_validate(settings))


def _single_task(plan: Plan) -> Plan | None:
    return replace(plan, tasks=plan.tasks[:1]) if len(plan.tasks) > 1 else None


def _lawful(plan: Plan, law: str) -> Plan | None:
    """The default with a law of temperature built in, where the target is a conductivity and has none."""
    if plan.task.target != "conductivity_s_cm" or plan.task.law != "none":
        return None
    return replace(plan, tasks=(plan.task.model_copy(update={"law": law}), *plan.tasks[1:]))


def _lawless(plan: Plan) -> Plan | None:
    if plan.task.law == "none":
        return None
    return replace(plan, tasks=tuple(t.model_copy(update={"law": "none"}) for t in plan.tasks))


METHODS: tuple[Method, ...] = (
    Method(DEFAULT, "the consortium file as it is", lambda p: p, ("local", "finetuned", "personal"), abroad=True),
    Method("fedavg", "FedAvg, one network", _plain, ("local", "finetuned"), abroad=True),
    Method(
        "fedprox",
        "FedProx, mu 0.1",
        lambda p: _with(_plain(p), algorithm="fedprox", local=p.settings.local.model_copy(update={"mu": 0.1})),
    ),
    Method("fedavgm", "FedAvg with server momentum 0.5", lambda p: _with(_plain(p), server=ServerOptimizer(name="momentum", momentum=0.5))),
    Method(
        "fedadam",
        "server Adam",
        lambda p: _with(_plain(p), server=ServerOptimizer(name="adam", lr=0.01, momentum=0.9, beta2=0.99, epsilon=1e-3)),
    ),
    Method("scaffold", "SCAFFOLD", _scaffold),
    Method("rows", "FedAvg weighted by rows", lambda p: _with(_plain(p), site_weights="rows", max_weight_share=1.0)),
    Method("fedper", "FedPer: private heads", lambda p: _private(p, private=["head"]), ("finetuned",)),
    Method("fedrep", "FedRep: private heads, trained first", lambda p: _private(p, private=["head"], head_steps=max(1, p.settings.local.steps // 4)), ("finetuned",)),
    Method("fedbn", "a site's own input scale and shift", lambda p: _private(p, private=["norm"]), ("finetuned",)),
    Method("ditto", "Ditto, proximal 0.1", lambda p: _with(_plain(p), personalization=Personalization(ditto=0.1)), ("ditto",)),
    Method("single-task", "the default without auxiliary tasks", _single_task, ("local", "personal")),
    Method("arrhenius", "the default with Arrhenius' law as the last layer", partial(_lawful, law="arrhenius")),
    Method("vtf", "the default with the Vogel-Tammann-Fulcher law as the last layer", partial(_lawful, law="vtf")),
    Method("no-law", "the default without its law of temperature", _lawless, ("personal",)),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """All arms of one consortium and seed; a reference that a worker process can be given."""

    case: Case
    file: Path
    home: Path
    out: Path
    seed: int
    arms: tuple[str, ...]
    rounds: int | None = None


@dataclass
class Table:
    """Scores of one arm: by model name, by site."""

    scores: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def add(self, name: str, e: Evaluation) -> None:
        """Adds one model's score at one site."""
        if e.sums[0] <= 0:
            return
        row: dict[str, Any] = {"n": int(e.sums[0]), "groups": e.n_groups, "mae": float(e.sums[1] / e.sums[0])}
        row["rmse"] = math.sqrt(float(e.sums[2] / e.sums[0]))
        if len(e.draws):
            row["draws"] = [float(f"{v:.5g}") for v in e.draws]
        if len(e.coverage):
            row["covered"] = float(e.coverage[0] / e.sums[0])
            row["covered_low"], row["covered_high"] = float(e.coverage[1]), float(e.coverage[2])
            row["half_width"] = float(e.coverage[3]) if math.isfinite(e.coverage[3]) else None
        self.scores.setdefault(name, {})[e.site] = row


# --- running -------------------------------------------------------------------------------------------------------


def examples() -> Path:
    """Returns the folder of the example consortia."""
    from fedmat import places

    return places.example().parents[1]


def jobs(cases: Sequence[str], seeds: Sequence[int], arms: Sequence[str], out: Path, *, rounds: int | None = None) -> list[Job]:
    """Returns the work of a benchmark; prepares every site's records and features first, once for all seeds.

    Raises:
        ConfigError: an unknown case or arm, or data that are not there.
        PlanRefused: a consortium is not declared simulated.
    """
    from fedmat.features.common import nearest

    known = {c.name: c for c in SUITE}
    for name in cases:
        if name not in known:
            raise ConfigError(f"bench: there is no consortium '{name}'", fix=nearest(name, known))
    every = (*BASELINES, *(m.name for m in METHODS))
    for name in arms:
        if name not in every:
            raise ConfigError(f"bench: there is no arm '{name}'", fix=nearest(name, every))
    found = []
    for name in cases:
        file = examples() / known[name].file
        for seed in seeds:
            found.append(Job(known[name], file, out / "data" / name, out / name, seed, tuple(arms or every), rounds))
    return found


def prepare(job: Job) -> None:
    """Reads, checks and featurizes every site's data; what is there already is kept."""
    from fedmat import pipeline

    run = pipeline.open_run(job.file, home=job.home)
    if not run.config().simulated:
        raise PlanRefused(
            f"bench: {job.file} is not declared simulated", fix="only a consortium of public data can be benchmarked"
        )
    for site in run.sites:
        if not (run.site_folder(site) / "manifest.json").exists():
            pipeline.prepare_site(run, site)
        pipeline.featurize_site(run, site)


def run_job(job: Job) -> list[str]:
    """Measures all arms of a job; returns the names of those that were not there yet."""
    import fedmat.telemetry  # noqa: F401
    from fedmat import pipeline

    run = pipeline.open_run(job.file, home=job.home, rounds=job.rounds)
    plan = _with(run.plan(), seed=job.seed, deduplicate=False)  # done here once, for all arms alike
    tables = deduplicated(run)
    done = []
    for name, measure in _arms(job, plan, tables):
        path = job.out / f"{job.seed}" / f"{name}.json"
        key = files.sha256(files.canonical_json([SCHEMA, name, measure.key, {s: t.sha256 for s, t in sorted(tables.items())}]))
        if path.exists() and files.read_json(path).get("key") == key:
            continue
        started = time.perf_counter()
        result = measure()
        result |= {"key": key, "case": job.case.name, "seed": job.seed, "arm": name, "seconds": time.perf_counter() - started}
        files.write_json(path, result)
        done.append(name)
    return done


def deduplicated(run: Any) -> dict[str, Any]:
    """Returns every site's features without the training rows that another site, or anyone's test, holds as well."""
    from fedmat import pipeline
    from fedmat.assurance import duplicates
    from fedmat.features.table import TEST

    tables = {s: pipeline.site_table(run, s) for s in run.sites}
    keys = {s: found for s in run.sites if (found := pipeline.matching_keys(run, s)) is not None}
    offers = {s: duplicates.offer(s, k.fingerprint, k.keys, tables[s].split == TEST) for s, k in keys.items()}
    for site, removal in duplicates.find(offers).removals.items():
        keep, _ = duplicates.apply(removal, keys[site].keys, tables[site].split == TEST)
        tables[site] = tables[site].rows(keep)
    return tables


def run_all(work: Sequence[Job], workers: int, told: Callable[[str], None]) -> None:
    """Prepares the data, then measures all jobs, ``workers`` at a time, each with one thread."""
    seen: set[str] = set()
    for job in work:
        if job.case.name not in seen:
            seen.add(job.case.name)
            told(f"{job.case.name}: records and features")
            prepare(job)
    if workers <= 1:
        for i, job in enumerate(work, 1):
            done = run_job(job)
            told(f"{i}/{len(work)} {job.case.name} seed {job.seed}: {len(done)} arms measured")
        return
    import multiprocessing

    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(run_job, job): job for job in work}
        for i, future in enumerate(as_completed(waiting), 1):
            job = waiting[future]
            told(f"{i}/{len(work)} {job.case.name} seed {job.seed}: {len(future.result())} arms measured")


@dataclass(frozen=True)
class _Measure:
    """One arm, ready to be measured; ``key`` is everything but the data that its numbers depend on."""

    key: dict[str, Any]
    run: Callable[[], dict[str, Any]]

    def __call__(self) -> dict[str, Any]:
        return self.run()


def _arms(job: Job, plan: Plan, tables: Mapping[str, Any]) -> Iterator[tuple[str, _Measure]]:
    for name, baseline in BASELINES.items():
        if name in job.arms:
            yield name, _Measure({"plan": plan.as_json(), "version": 1}, partial(baseline, plan, tables))
    for method in METHODS:
        varied = method.vary(plan) if method.name in job.arms else None
        if varied is not None:
            key = {"plan": varied.as_json(), "own": list(method.own), "version": 1}
            yield method.name, _Measure(key, partial(_federated, method, varied, _columns(tables, varied), job))


def _columns(tables: Mapping[str, Any], plan: Plan) -> Mapping[str, Any]:
    """Returns the tables with the plan's tasks only; rows that state none of them go."""
    n = len(plan.tasks)
    first = next(iter(tables.values()))
    if first.y.shape[1] == n:
        return tables
    cut = {s: replace(t, y=t.y[:, :n], bound=t.bound[:, :n]) for s, t in tables.items()}
    known = {s: t.rows(np.isfinite(t.y).any(axis=1)) for s, t in cut.items()}
    return {s: t for s, t in known.items() if (t.split == 0).sum() >= plan.admission.min_train_records}


def _federated(method: Method, plan: Plan, tables: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """Runs the rounds through the real coordinator, engine and workers, then scores what came of it."""
    from fedmat import baselines
    from fedmat.federation.coordinator import Coordinator
    from fedmat.federation.engine import InProcessEngine
    from fedmat.federation.site import SiteWorker
    from fedmat.models.network import Architecture

    plan = replace(_with(plan, quorum=min(plan.settings.quorum, len(tables))), roster=tuple(sorted(tables)))
    folder = job.out / f"{job.seed}" / f"work-{method.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        workers = {
            s: SiteWorker(s, plan, t, {"sha256": t.sha256, "rejected": {}}, folder / s).handle for s, t in tables.items()
        }
        architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
        with InProcessEngine(workers) as engine:
            lead = Coordinator(plan, lambda n: architecture.initial_weights(n, plan.settings.seed), folder)
            reports = list(lead.run(engine))
            model = lead.model()
            radius = {s: r for s, r in dict(lead.intervals()["sites"]).items() if r is not None}  # type: ignore[call-overload]
            table, mixture = Table(), {}
            sites = sorted(tables)
            for e in baselines.score(engine, plan, baselines.Arm("global", model.weights, model.scaler), sites, radius=radius):
                table.add("global", e)
            others: dict[str, Table] = {t.target: Table() for t in plan.tasks[1:]}
            for target, scores in others.items():
                arm = baselines.Arm("global", model.weights, model.scaler)
                for e in baselines.score(engine, plan, arm, sites, target=target):
                    scores.add("global", e)
            own = baselines.own_models(engine, plan, model, sites, method.own) if method.own else {}
            for site, models in own.items():
                for b in models:
                    table.add(b.arm, b.evaluation)
                    for e in b.auxiliary:
                        others[e.target].add(b.arm, e)
                    if b.arm == "personal":
                        mixture[site] = b.mixture
                    if b.arm == "local" and method.abroad and b.scaler is not None:
                        for e in baselines.score(engine, plan, baselines.Arm("local", b.weights, b.scaler), sites):
                            table.add(f"local:{site}", e)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "scores": table.scores,
        "auxiliary": {t: v.scores for t, v in others.items()},
        "mixture": mixture,
        "adherence": _adherence(plan, model, tables),
        "validation": [r.validation.get("mae") for r in reports],
        "bytes_per_round": sum(reports[-1].bytes_up.values()) + sum(reports[-1].bytes_down.values()),
        "train_seconds": sum(r.seconds for r in reports),
        "sites": {s: {"train": int((t.split == 0).sum()), "test": int((t.split == 2).sum())} for s, t in tables.items()},
    }


def _adherence(plan: Plan, model: GlobalModel, tables: Mapping[str, Any]) -> dict[str, float]:
    """Returns the share of predictions that obey each law of conductivity, over a grid of temperatures around the test rows.

    The grid reaches 10 K below the coldest test record (not below what the law is defined for) and 100 K above the warmest;
    a prediction may depart from the law by 0.01 decades.
    """
    from fedmat.features.table import TEST
    from fedmat.models.laws import READOUTS, law_adherence, temperature_k
    from fedmat.models.network import Architecture

    if plan.task.target != "conductivity_s_cm" or plan.model.graph is not None:
        return {}
    architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
    first = next(iter(tables.values()))
    x = np.concatenate([t.part(TEST).x for t in tables.values()])
    kelvin = temperature_k(first.names, x)
    out = {}
    for law in ("arrhenius", "vtf"):
        low = max(float(kelvin.min()) - 10.0, READOUTS[law].above_k + 1.0)
        found = law_adherence(
            lambda raw: architecture.predict(model.weights, model.scaler, first.names, raw)[:, 0],
            x[:: max(1, len(x) // 200)], first.names, law, low_k=low, high_k=float(kelvin.max()) + 100.0, tolerance=0.01,
        )  # fmt: skip
        out[law] = found.share
    return out


def _score_all(name: str, plan: Plan, tables: Mapping[str, Any], predict: Callable[[Any], Array]) -> dict[str, Any]:
    from fedmat.features.table import TEST
    from fedmat.federation.evaluation import evaluate
    from fedmat.seeds import stream

    table, others = Table(), {t.target: Table() for t in plan.tasks[1:]}
    for site, whole in sorted(tables.items()):
        test = whole.part(TEST)
        if not len(test):
            continue
        guess = predict(test)
        for at, task in enumerate(plan.tasks[: guess.shape[1]]):
            known = np.isfinite(test.y[:, at])
            e = evaluate(
                site, name, "test", test.y[known, at], guess[known, at], test.group[known], kind=task.kind,
                rng=stream(plan.splits.seed, "bootstrap", site, "test", at), floor=1, target=task.target, pairs=True,
            )  # fmt: skip
            (others[task.target] if at else table).add("global", e)
    return {"scores": table.scores, "auxiliary": {t: v.scores for t, v in others.items()}}


def _dummy(plan: Plan, tables: Mapping[str, Any]) -> dict[str, Any]:
    y = np.concatenate([t.part(0).y for t in tables.values()])
    mean = np.nanmean(y, axis=0)
    return _score_all("dummy", plan, tables, lambda test: np.tile(mean, (len(test), 1)))


def _forest(plan: Plan, tables: Mapping[str, Any]) -> dict[str, Any]:
    """A random forest on all sites' rows together, as the study's floor."""
    from sklearn.ensemble import RandomForestRegressor

    from fedmat.features.table import concatenate

    learning = concatenate([tables[s].part(0, 1) for s in sorted(tables)])
    known = np.isfinite(learning.y[:, 0])
    forest = RandomForestRegressor(200, max_features=1 / 3, random_state=plan.settings.seed, n_jobs=1)
    middle = np.nan_to_num(np.nanmedian(learning.x, axis=0))

    def filled(x: Array) -> Array:
        return np.where(np.isfinite(x), x, middle)

    forest.fit(filled(learning.x[known]), learning.y[known, 0])
    return _score_all("forest", plan, tables, lambda test: forest.predict(filled(test.x))[:, None])


def _pooled(plan: Plan, tables: Mapping[str, Any]) -> dict[str, Any]:
    from fedmat import baselines
    from fedmat.models.network import Architecture

    arm, held_out = baselines.pooled_with_error(plan, tables)
    architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
    found = _score_all(
        "pooled", plan, tables,
        lambda test: architecture.predict(arm.weights, arm.scaler, test.names, test.x, test.graphs),
    )  # fmt: skip
    return found | {"held_out_mae": held_out}


BASELINES: Mapping[str, Callable[[Plan, Mapping[str, Any]], dict[str, Any]]] = {
    "dummy": _dummy,
    "forest": _forest,
    "pooled": _pooled,
}


def workers_there() -> int:
    """Returns the cores this process may use."""
    return len(os.sched_getaffinity(0))


def load(out: Path) -> dict[str, dict[int, dict[str, dict[str, Any]]]]:
    """Returns what has been measured: case -> seed -> arm -> result."""
    found: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
    for case in SUITE:
        for path in sorted((out / case.name).glob("*/*.json")):
            result = json.loads(path.read_text())
            found.setdefault(case.name, {}).setdefault(int(path.parent.name), {})[path.stem] = result
    return found
