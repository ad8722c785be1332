"""A finished run's folder, made by the real code from synthetic truths and predictions: what readers of a run are tested on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedmat import files, pipeline, wire
from fedmat.domain import Attestation, Dropout, Evaluation, GlobalModel, Rejection, RoundReport, Scaler
from fedmat.federation.evaluation import evaluate
from fedmat.models.network import Architecture
from fedmat.seeds import stream

SITES = {
    "argyrodite-ag": "Argyrodite AG",
    "garnet-gmbh": "Garnet GmbH",
    "lisicon-ltd": "LISICON Ltd",
    "nasicon-nv": "NASICON NV",
}
CONDUCTIVITY = {
    "name": "solid-conductivity",
    "record_type": "solid_electrolyte",
    "target": "conductivity_s_cm",
    "unit": "S/cm",
    "transform": "log10",
}
SUPERIONIC = {
    **CONDUCTIVITY,
    "name": "superionic",
    "transform": "identity",
    "kind": "binary",
    "threshold": 1e-4,
    "metric": "auc",
}
FEATURES = [
    "composition",
    {"name": "conditions", "options": {"fields": ["temperature_k"], "transforms": {"temperature_k": "inverse"}}},
]
# typical error (standard deviation) of each arm on the own slice; the last site loses by federation
ERRORS = {
    "local": (0.9, 0.7, 1.1, 0.35),
    "federated": (0.55, 0.5, 0.6, 0.6),
    "finetuned": (0.45, 0.45, 0.55, 0.34),
    "pooled": (0.5, 0.42, 0.5, 0.4),
}


def build(
    home: Path,
    *,
    run_id: str = "r1",
    simulated: bool = True,
    task: Mapping[str, object] = CONDUCTIVITY,
    sites: Mapping[str, str] = SITES,
    title: str = "Solid electrolytes, four companies",
    rounds: int = 12,
    seed: int = 1,
    scale: float = 1.0,
    weights_seed: int = 1,
    features: tuple[tuple[str, ...], str] = (("a", "b"), "f" * 64),
    exclusions: bool = True,
) -> Path:
    """Writes a consortium and a finished run below ``home`` and returns the run's folder.

    Args:
        scale: factor on the federated arm's errors.
        weights_seed: another seed gives another model, and nothing else.
        features: names and digest of the features the model is said to be trained on.
    """
    run = _consortium(home, run_id, simulated, task, sites, title, rounds)
    plan, folder = run.plan(), run.folder
    folder.mkdir(parents=True)
    files.write_json(folder / "plan.json", plan.as_json())
    attestations = {
        s: Attestation(
            s, files.sha256(f"{s}{seed}".encode()), "1.0.0", features[1], features[0], 120 + 40 * i, 20, 40, 60,
            {"missing": 3 + i, "bad_formula": i} if i else {},
        )
        for i, s in enumerate(sorted(sites))
    }  # fmt: skip
    files.write_json(
        folder / "attestations.json",
        {"attestations": wire.plain(attestations), "setup_bytes": dict.fromkeys(sorted(sites), 3_400), "failures": []},
    )
    model = _model(plan, features, weights_seed)
    wire.save_model(model, folder / "model.safetensors")
    digest = wire.weights_digest(model.weights, model.scaler)
    lines = [_round(n, rounds, sorted(sites), digest, plan.sha256, seed, exclusions) for n in range(rounds)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(wire.plain(r), sort_keys=True) + "\n" for r in lines))
    scores = _evaluations(sorted(sites), plan, simulated, seed, scale)
    files.write_json(folder / "evaluations.json", wire.plain(scores))
    files.write_json(folder / "metrics.json", pipeline._metrics(run, scores))
    seconds = {
        "prepare": 4.2,
        "featurize": 8.1,
        "train": 31.0,
        "baselines": 12.0,
        "evaluate": 2.0,
        "round_overhead_mean": 0.021,
    }
    files.write_json(folder / "timings.json", seconds)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Replaces top-level keys of a JSON file."""
    files.write_json(path, files.read_json(path) | changes)


def _consortium(
    home: Path, run_id: str, simulated: bool, task: Mapping[str, object], sites: Mapping[str, str], title: str, rounds: int
) -> pipeline.Run:
    home.mkdir(parents=True, exist_ok=True)
    settings = {
        "name": "electrolytes",
        "title": title,
        "simulated": simulated,
        "task": dict(task),
        "features": FEATURES,
        "model": {"hidden": [8]},
        "plan": {"rounds": rounds, "quorum": 2, "seed": 5},
        "members": [{"site": s, "organisation": o, "file": f"{s}.yaml"} for s, o in sites.items()],
    }
    path = home / f"consortium-{run_id}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return pipeline.Run(path, home, run_id)


def _model(plan: Any, features: tuple[tuple[str, ...], str], seed: int) -> GlobalModel:
    p = len(features[0])
    weights = Architecture.of(plan.model, plan.tasks, plan.settings).initial_weights(p, seed)
    last = "last.weight"
    weights[last] = stream(seed, "last-layer").normal(size=weights[last].shape).astype(np.float32)
    scaler = Scaler(np.zeros(p), np.full(p, 100.0), np.ones(p), np.array([-5.0]), np.array([2.0]))
    spec = plan.model_spec(features[0], features[1])
    spec["interval"] = {"level": 0.9, "half_width": 1.5, "sites": {}}
    return GlobalModel(weights, scaler, spec)


def _round(n: int, rounds: int, sites: list[str], sha256: str, plan_sha256: str, seed: int, exclusions: bool) -> RoundReport:
    late = (Dropout(sites[0], "late", "no answer within 120 s"),) if exclusions and n == 2 else ()
    broken = (Rejection(sites[-1], "non_finite", "holds NaN or infinity"),) if exclusions and n == 4 else ()
    out = {d.site for d in (*late, *broken)}
    accepted = tuple(s for s in sites if s not in out)
    rng = stream(seed, "rounds", n)
    loss = {
        s: float(0.2 + (0.8 + 0.2 * i) * np.exp(-n / 4) + 0.01 * rng.normal()) for i, s in enumerate(sites) if s in accepted
    }
    mae = 0.5 + 1.5 * float(np.exp(-n / 3))
    return RoundReport(
        round=n, rounds=rounds, rule="mean/sgd", lr=1e-3, accepted=accepted,
        shares={s: 1.0 / len(accepted) for s in accepted}, update_norms=dict.fromkeys(accepted, 1.0 / (n + 1)),
        train_loss=loss, dropouts=late, rejections=broken, bytes_down=dict.fromkeys(sites, 70_000),
        bytes_up={s: 68_000 if s in accepted else 0 for s in sites}, model_sha256=sha256, plan_sha256=plan_sha256,
        validation={"n": 80.0, "mae": mae, "rmse": 1.3 * mae}, seconds=2.5, overhead_seconds=0.02,
    )  # fmt: skip


def _evaluations(sites: list[str], plan: Any, simulated: bool, seed: int, scale: float) -> list[Evaluation]:
    out: list[Evaluation] = []
    kind = plan.task.kind
    rows, groups = 40, np.repeat(np.arange(20), 2)
    for i, site in enumerate(sites):
        truth = stream(seed, "truth", site).normal(-5.0 - 0.4 * i, 1.6, rows)

        def score(arm: str, sd: float, site: str = site, truth: Any = truth) -> Evaluation:
            noise = stream(seed, "noise", site, arm).normal(0.0, sd * (scale if arm == "federated" else 1.0), rows)
            t, p = (
                (truth, truth + noise)
                if kind != "binary"
                else ((truth > -4).astype(float), 1 / (1 + np.exp(-2 * (truth + noise + 4))))
            )
            return evaluate(
                site, arm, "test", t, p, groups, kind=kind, rng=stream(seed, "bootstrap", site), floor=1 if simulated else 5
            )

        k = i % 4
        out += [score(f"{arm}:{site}", ERRORS[arm][k]) for arm in ("local", "finetuned")]
        out += [score("federated", ERRORS["federated"][k]), score("dummy", 1.6)]
        if simulated:
            out.append(score("pooled", ERRORS["pooled"][k]))
            others = [s for s in sites if s != site]
            out += [score(f"local:{s}", 1.8) for s in others] + [score(f"finetuned:{s}", 0.9) for s in others]
    return sorted(out, key=lambda e: (e.arm, e.site))
