"""What a run's folder says: every file a reader of a finished run may rely on, and whether the files agree.

Knows: file names, digests and which file states what. Refuses to know: records, MLflow, pages. A file that is not there
is None, never an empty result: absence is "not evidenced".
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmat import files, wire
from fedmat.data.contract import RecordType, record_type
from fedmat.data.example import inputs
from fedmat.domain import GlobalModel
from fedmat.errors import NotEvidenced, StateError

PLAN, METRICS, ROUNDS, MODEL = "plan.json", "metrics.json", "rounds.jsonl", "model.safetensors"
EVALUATIONS, TIMINGS, ATTESTATIONS, REGISTERED = (
    "evaluations.json", "timings.json", "attestations.json", "registered.json",
)  # fmt: skip
MATCHING, INTERVALS = "matching.json", "intervals.json"


_ARMS = {
    "federated": "federated", "local_mean": "mean of the local-only models", "pooled": "pooled (upper bound)",
    "dummy": "always the mean",
}  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """The files of one run's folder; None where there is none.

    Attributes:
        attestations: by site, what it stated about its data before the first round.
        registered: name, version, aliases and tracking URI, once the model is published.
    """

    folder: Path
    plan: dict[str, Any] | None
    metrics: dict[str, Any] | None
    rounds: list[dict[str, Any]] | None
    evaluations: list[dict[str, Any]] | None
    timings: dict[str, Any] | None
    attestations: dict[str, Any] | None
    registered: dict[str, Any] | None

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        """Reads what is there.

        Raises:
            StateError: there is no such folder, or a file is damaged.
        """
        if not folder.is_dir():
            raise StateError(f"{folder}: no such run folder", fix="name a run's folder below runs/")

        def value(name: str) -> Any:
            return files.read_json(folder / name) if (folder / name).is_file() else None

        attested = value(ATTESTATIONS)
        return cls(
            folder, value(PLAN), value(METRICS), _lines(folder / ROUNDS), value(EVALUATIONS), value(TIMINGS),
            attested["attestations"] if attested else None, value(REGISTERED),
        )  # fmt: skip

    def missing(self) -> tuple[str, ...]:
        """Returns the files of a finished run that are not there."""
        wanted = (PLAN, METRICS, ROUNDS, MODEL, EVALUATIONS, TIMINGS, ATTESTATIONS)
        return tuple(name for name in wanted if not (self.folder / name).is_file())

    def disagreements(self) -> tuple[str, ...]:
        """Returns, in words, every file whose digest is not the one metrics.json was made for."""
        if self.metrics is None:
            return ()
        found: list[tuple[str, str, object]] = []
        if (self.folder / MODEL).is_file():
            found.append((MODEL, files.sha256_file(self.folder / MODEL), self.metrics["model"]["sha256"]))
        if self.plan is not None:
            found.append((PLAN, files.sha256(files.canonical_json(self.plan)), self.metrics["plan_sha256"]))
        if self.attestations is not None and "attestations" in self.metrics["digests"]:
            actual = files.sha256(files.canonical_json(self.attestations))
            found.append((ATTESTATIONS, actual, self.metrics["digests"]["attestations"]))
        return tuple(
            f"{name}: SHA-256 is {actual[:12]}, metrics.json was made for {str(stated)[:12]}"
            for name, actual, stated in found
            if actual != stated
        )

    def finished(self) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]], GlobalModel]:
        """Returns plan, metrics, rounds and model of a run that is complete and agrees with itself.

        Raises:
            NotEvidenced: a file is missing.
            StateError: two files disagree.
        """
        if self.plan is None or self.metrics is None or self.rounds is None or not (self.folder / MODEL).is_file():
            absent = ", ".join(n for n in self.missing() if n in (PLAN, METRICS, ROUNDS, MODEL))
            raise NotEvidenced(f"{self.folder}: not a finished run, there is no {absent}", fix="finish the run first")
        wrong = list(self.disagreements())
        model = wire.load_model(self.folder / MODEL)
        if model.spec.get("plan_sha256") != self.metrics["plan_sha256"]:
            wrong.append(f"{MODEL}: trained under another plan than metrics.json states")
        if wrong:
            raise StateError(f"{self.folder}: {'; '.join(wrong)}", fix="run the evaluation again, or restore the file")
        return self.plan, self.metrics, self.rounds, model


@dataclass(frozen=True)
class FinishedRun:
    """A run that is complete and agrees with itself, and what may be said about its model anywhere."""

    folder: Path
    plan: dict[str, Any]
    metrics: dict[str, Any]
    rounds: list[dict[str, Any]]
    features_sha256: str
    records: RecordType

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """Reads a run's folder; errors as in :meth:`Evidence.finished`."""
        plan, metrics, rounds, model = Evidence.read(folder).finished()
        spec = model.spec
        return cls(folder, plan, metrics, rounds, str(spec["features_sha256"]), record_type(str(spec["record_type"])))

    @property
    def name(self) -> str:
        """Name of the registered model."""
        return str(self.metrics["model"]["name"])

    @property
    def sha256(self) -> str:
        """Digest of the weights file."""
        return str(self.metrics["model"]["sha256"])

    @property
    def target(self) -> str:
        """The contract field the model predicts."""
        return str(self.metrics["task"]["target"])

    @property
    def further(self) -> tuple[str, ...]:
        """The auxiliary targets."""
        return tuple(t["target"] for t in self.plan["auxiliary"])

    @property
    def score(self) -> float | None:
        """The joint model's metric on all sites' test groups."""
        value = self.metrics["global"].get("federated", {}).get(self.metrics["task"]["metric"])
        return None if value is None else float(value)

    @property
    def held_out_sha256(self) -> str:
        """See :func:`held_out_digest`."""
        return held_out_digest(self.metrics, self.plan)

    def tags(self) -> dict[str, str]:
        """Tags of the MLflow run and of the version: what an auditor compares."""
        m = self.metrics
        tags = {
            "fedmat.model_sha256": self.sha256,
            "fedmat.plan_sha256": m["plan_sha256"],
            "fedmat.features_sha256": self.features_sha256,
            "fedmat.test_set_sha256": self.held_out_sha256,
            "fedmat.code_version": m["code_version"],
            "fedmat.consortium": m["consortium"],
            "fedmat.simulated": str(bool(m["simulated"])).lower(),
            "fedmat.sites": json.dumps(sorted(m["sites"])),
            "fedmat.run": self.folder.name,
            "fedmat.metric": m["task"]["metric"],
            "fedmat.metric_unit": m["task"]["metric_unit"],
        }
        if self.score is not None:
            tags["fedmat.score"] = repr(self.score)
        commit, dirty = code_commit()
        if commit:
            tags |= {"fedmat.git_commit": commit, "fedmat.git_dirty": str(dirty).lower()}
        return tags | {f"fedmat.dataset_sha256.{s}": v["dataset_sha256"] for s, v in sorted(m["sites"].items())}

    def description(self) -> str:
        """Markdown that the MLflow pages show for the run, the model and the version."""
        m, task = self.metrics, self.metrics["task"]
        unit = f" {task['metric_unit']}" if task["metric_unit"] and task["metric"] != "auc" else ""
        what = f"`{task['target']}`" + (f" [{task['unit']}]" if task["unit"] else "")
        lines = [f"**{m['title']}**: {what} learned together by {len(m['sites'])} sites; no record left its site."]
        if m["simulated"]:
            lines.append("The consortium is *simulated*: one operator owns all its data.")
        lines += ["", f"| {task['metric'].upper()} on all sites' test groups | value |", "| --- | --- |"]
        for key, label in _ARMS.items():
            value = m["global"].get(key, {}).get(task["metric"])
            lines.append(f"| {label} | {'not evidenced' if value is None else f'{value:.4g}{unit}'} |")
        lines += ["", "| field of a raw record | kind | |", "| --- | --- | --- |"]
        for f in inputs(self.records, self.target):
            kind = f"{f.kind}, {f.unit}" if f.unit else f.kind
            lines.append(f"| `{f.name}`{'' if f.required else ' (optional)'} | {kind} | {f.about} |")
        lines += ["", f"Model SHA-256 `{self.sha256}`, plan `{m['plan_sha256']}`."]
        return "\n".join(lines)


def held_out_digest(metrics: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """Returns the digest that two runs share exactly when they were scored on the same frozen test rows.

    It covers, per site, the dataset's SHA-256 and the number of test rows and groups, and what else decides which rows
    and which numbers are compared: the split settings and the task.
    """
    sites = {s: [v["dataset_sha256"], v["n_test"], v["n_groups"]] for s, v in metrics["sites"].items()}
    task = {k: v for k, v in plan["task"].items() if k != "name"}
    return files.sha256(files.canonical_json({"sites": sites, "splits": plan["splits"], "task": task}))


def code_commit() -> tuple[str, bool]:
    """Returns the commit of the checkout this code runs from and whether its code differs; ("", False) if installed."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "--error-unmatch", here.name):
        return "", False  # an installed copy: a repository around it would not be the code's
    return git("rev-parse", "HEAD") or "", bool(git("status", "--porcelain", "--", "."))


def numbers(metrics: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float, int]]:
    """Yields every finite number worth a curve or a column: (key, value, step)."""
    for r in rounds:
        step = int(r["round"]) + 1
        found: dict[str, Any] = {"lr": r["lr"], "seconds": r["seconds"], "accepted": len(r["accepted"])}
        found |= {f"validation/{k}": v for k, v in r["validation"].items()}
        for key in ("train_loss", "update_norms", "shares", "bytes_down", "bytes_up"):
            found |= {f"{site}/{key}": v for site, v in r[key].items()}
        yield from ((k, float(v), step) for k, v in sorted(found.items()) if _finite(v))
    last = len(rounds)
    for arm, m in sorted(metrics["global"].items()):
        values = m if isinstance(m, dict) else {"": m}
        yield from ((f"global/{arm}{'_' + k if k else ''}", float(v), last) for k, v in values.items() if _finite(v))
    for site, row in sorted(metrics["sites"].items()):
        for arm, m in row["own"].items():
            yield from ((f"{site}/own_{arm}_{k}", float(v), last) for k, v in m.items() if _finite(v))


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested settings as MLflow params: dotted keys, lists as JSON text."""
    out: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            out |= flat(item, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = item if isinstance(item, str) else json.dumps(item, sort_keys=True)
    return {k: v if len(v) <= 6000 else f"sha256:{files.sha256(v.encode())}" for k, v in out.items()}  # MLflow's limit


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns what a file of JSON lines says.

    Raises:
        StateError: there is no such file, or a line is damaged.
    """
    found = _lines(path)
    if found is None:
        raise StateError(f"{path}: no such file", fix="name a run's folder, or its rounds.jsonl")
    return found


def _lines(path: Path) -> list[dict[str, Any]] | None:
    if not path.is_file():
        return None
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        raise StateError(f"{path}: a line is not JSON (half written or edited)", fix="run it again") from None
