"""The round loop: decides whom to ask, what to accept and what the next global weights are.

Knows: plans, messages, rules and its own checkpoint. Refuses to know: records and features (an import rule enforces
it), and how messages are delivered. The run is a generator of RoundReports; everything else reads those.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedmat import files, wire
from fedmat import weights as wts
from fedmat.aggregation.linear import LinearRule
from fedmat.assurance import duplicates, uncertainty
from fedmat.domain import (
    RANK_GRID,
    Array,
    Attestation,
    AttestRequest,
    CalibrateRequest,
    Calibration,
    Checkpoint,
    Delivery,
    Dropout,
    GlobalModel,
    MatchRequest,
    Offer,
    Ranks,
    RanksRequest,
    Rejection,
    Removed,
    RemoveRequest,
    RoundReport,
    Scaler,
    Sealed,
    Statistics,
    StatisticsRequest,
    Update,
)
from fedmat.errors import SiteRefused, StateError, WireError
from fedmat.federation import rounds
from fedmat.federation.engine import Engine
from fedmat.federation.plan import Plan
from fedmat.federation.rounds import Asking, Outcome, Replay
from fedmat.federation.scaling import federated_scaler, with_scores
from fedmat.keys import Charter
from fedmat.models.laws import temperature_columns
from fedmat.weights import Weights

CHECKPOINT, ROUNDS, SETUP, INTERVALS, MATCHING = (
    "checkpoint.safetensors", "rounds.jsonl", "attestations.json", "intervals.json", "matching.json",
)  # fmt: skip
EXCHANGES, NONCE = "exchanges", "run.json"  # of encrypted rounds: answers of the round under way, the run's random name
_AVERAGE, _CLIP = "average", "clip"  # in the checkpoint's server state: running sum of weights, norm limit of updates


class Coordinator:
    """Runs a plan over an engine, saving its state after every round.

    Args:
        initial: makes the first global weights from the number of active features; the same for everyone.
        folder: where the checkpoint and the reports live.
        charter: everyone's keys, for a plan that encrypts its rounds.
        today: ISO date (UTC), which tells whether keys still count.
    """

    def __init__(
        self,
        plan: Plan,
        initial: Callable[[int], Weights],
        folder: Path,
        *,
        charter: Charter | None = None,
        today: str = "",
    ) -> None:
        self.plan = plan
        self.folder = folder
        self._charter, self._today = charter, today
        self._initial = initial
        self._rule = LinearRule(plan.settings.server)
        self.attestations: dict[str, Attestation] = {}
        self._failures: list[Dropout | Rejection] = []

    def run(self, engine: Engine) -> Iterator[RoundReport]:
        """Yields one report per round, going on from the last checkpoint when there is one.

        Raises:
            RoundFailed: fewer than the quorum answered well; the state before the round is kept.
            SiteRefused: sites disagree about features.
            StateError: the checkpoint belongs to another plan or to other data.
        """
        setup_bytes = self._attest(engine, self._match(engine))
        state = self._restore() or self._start(engine, setup_bytes)
        encrypted = self.plan.settings.security.mode != "none"
        replay = Replay(engine, self.folder / EXCHANGES) if encrypted else None
        combining = rounds.combining(
            self.plan,
            self.attestations,
            self._charter,
            self.folder / EXCHANGES,
            self._nonce() if encrypted else "",
            self._today,
        )
        while state.next_round < self.plan.settings.rounds:
            try:
                report, state = self._round(combining, Asking(replay or engine, self.plan, state, tuple(self.attestations)))
            except rounds.ExchangesSpent as error:
                state = dataclasses.replace(state, exchange=error.next_exchange)
                files.write_atomic(self.folder / CHECKPOINT, wire.encode(state))
                if replay:
                    replay.forget()
                raise
            except rounds.QuorumMissed:
                if replay:
                    replay.forget(failures=True)
                raise
            self._save(report, state)
            if replay:
                replay.forget()
            yield report
        if not (self.folder / INTERVALS).exists():
            self._calibrate(engine, state)

    def model(self) -> GlobalModel:
        """Returns the finished global model.

        Raises:
            StateError: rounds are missing.
        """
        state = self._restore()
        if state is None or state.next_round < self.plan.settings.rounds:
            done = 0 if state is None else state.next_round
            raise StateError(f"{self.folder}: {done} of {self.plan.settings.rounds} rounds are done", fix="run it again")
        return GlobalModel(self._final(state), state.scaler, self._spec() | {"interval": self.intervals()})

    def intervals(self) -> dict[str, object]:
        """Returns the level and half-widths (transformed target's unit) of prediction intervals: overall and by site.

        A half-width is None where the sites' errors are too few for the level.
        """
        found: dict[str, object] = files.read_json(self.folder / INTERVALS)
        return found

    # --- before the first round ----------------------------------------------------------------------------------

    def _match(self, engine: Engine) -> tuple[str, ...]:
        """Has training rows left out that repeat another site's or anyone's test rows; returns the sites that did so.

        A site that does not say what it holds, or does not confirm what it left out, takes no part: its rows could be in
        the test. A run that goes on does not ask again; the sites remember.
        """
        plan, path = self.plan, self.folder / MATCHING
        if not plan.settings.deduplicate:
            files.write_json(path, {"removed": {}, "shared": [], "leaks": []})
            return plan.roster
        if path.exists() and (self.folder / CHECKPOINT).exists():
            return tuple(files.read_json(path)["removed"])
        deadline = plan.settings.deadline_s
        offers: dict[str, Offer] = {}
        for d in engine.broadcast(MatchRequest(plan.sha256), plan.roster, deadline):
            if not isinstance(d.answer, Offer):
                self._failures.append(_failure(d, "gave no list of keys"))
                continue
            try:
                duplicates.check(d.site, d.answer)
            except WireError as error:  # law 4: a bad answer costs its site, not the run
                self._failures.append(Rejection(d.site, "malformed", error.what))
                continue
            offers[d.site] = d.answer
        found = duplicates.find(offers)
        requests = {s: RemoveRequest(plan.sha256, r) for s, r in found.removals.items()}
        removed: dict[str, dict[str, int]] = {}
        for d in engine.scatter(requests, deadline):
            if isinstance(d.answer, Removed) and d.answer.site == d.site:
                removed[d.site] = d.answer.counts
            else:
                self._failures.append(_failure(d, "did not confirm what it left out"))
        document = {
            "removed": {s: removed[s] for s in sorted(removed)},
            "shared": [{"sites": list(pair), "measurements": n} for pair, n in sorted(found.shared.items()) if n],
            "leaks": [{"training": a, "test": b, "materials": n} for (a, b), n in sorted(found.leaks.items()) if n],
        }
        files.write_json(path, document)
        return tuple(sorted(removed))

    def _attest(self, engine: Engine, sites: Sequence[str]) -> dict[str, int]:
        request = AttestRequest(self.plan.sha256)
        deliveries = engine.broadcast(request, sites, self.plan.settings.deadline_s)
        good = {d.site: d.answer for d in deliveries if isinstance(d.answer, Attestation) and d.answer.site == d.site}
        self._failures += [_failure(d, "attested for another site") for d in deliveries if d.site not in good]
        self._need_quorum("attestation", good, deliveries, self._failures)
        digests = {a.features_sha256 for a in good.values()}
        if len(digests) > 1:
            raise SiteRefused(
                f"sites compute different features: {', '.join(f'{s} {a.features_sha256[:8]}' for s, a in sorted(good.items()))}",
                fix="install the same fedmat version at every site and use the same consortium.yaml",
            )
        wrong = sorted(s for s, a in good.items() if len(a.labels) != len(self.plan.tasks))
        if wrong:
            raise SiteRefused(
                f"{', '.join(wrong)}: attests labels of another number of tasks than the plan's {len(self.plan.tasks)}",
                fix="use the same consortium.yaml at every site",
            )
        self.attestations = {s: good[s] for s in sorted(good)}
        return {d.site: d.bytes_down + d.bytes_up for d in deliveries}

    def _start(self, engine: Engine, setup_bytes: Mapping[str, int]) -> Checkpoint:
        request = StatisticsRequest(self.plan.sha256)
        deliveries = engine.broadcast(request, tuple(self.attestations), self.plan.settings.deadline_s)
        width = len(next(iter(self.attestations.values())).feature_names)
        good: dict[str, Statistics] = {}
        for d in deliveries:
            a = d.answer
            if isinstance(a, Statistics) and a.site == d.site and _sound(a, width, self.attestations[d.site]):
                good[d.site] = a
        self._failures += [_failure(d, "sums that do not fit what it attested") for d in deliveries if d.site not in good]
        self._need_quorum("statistics", good, deliveries)
        lawful = any(t.law != "none" for t in self.plan.tasks)
        drop = temperature_columns(next(iter(self.attestations.values())).feature_names) if lawful else None
        scaler = federated_scaler([good[s] for s in sorted(good)], binary=self.plan.task.kind == "binary", drop=drop)
        if self.plan.settings.scaling == "quantile":
            scaler, deliveries = self._normal_scores(engine, scaler, deliveries)
        weights = self._initial(int(scaler.active.sum()))
        control = wts.zeros_like(weights) if self.plan.settings.algorithm == "scaffold" else {}
        state = Checkpoint(self.plan.sha256, self._attested(), 0, weights, control, scaler, {})
        total = {d.site: d.bytes_down + d.bytes_up + setup_bytes.get(d.site, 0) for d in deliveries}
        setup = {
            "attestations": wire.plain(self.attestations),
            "setup_bytes": total,
            "failures": [{"kind": type(f).__name__.lower(), **wire.plain(f)} for f in self._failures],
        }
        files.write_json(self.folder / SETUP, setup)
        files.write_atomic(self.folder / CHECKPOINT, wire.encode(state))
        return state

    def _normal_scores(self, engine: Engine, scaler: Scaler, before: Sequence[Delivery]) -> tuple[Scaler, Sequence[Delivery]]:
        """Adds the normal scores of all sites' features; returns the deliveries with the bytes of both exchanges."""
        deliveries = engine.broadcast(
            RanksRequest(self.plan.sha256, scaler), tuple(self.attestations), self.plan.settings.deadline_s
        )
        shape = (len(scaler.mean), len(RANK_GRID))
        good = {
            d.site: d.answer.counts
            for d in deliveries
            if isinstance(d.answer, Ranks) and d.answer.site == d.site and d.answer.counts.shape == shape
            and bool((d.answer.counts >= 0).all()) and bool((d.answer.counts.sum(axis=1) <= self.attestations[d.site].n_train).all())
        }  # fmt: skip
        self._failures += [_failure(d, "counts that do not fit what it attested") for d in deliveries if d.site not in good]
        self._need_quorum("feature counts", good, deliveries)
        sizes = {d.site: (d.bytes_down, d.bytes_up) for d in before}
        both = [
            dataclasses.replace(d, bytes_down=d.bytes_down + sizes[d.site][0], bytes_up=d.bytes_up + sizes[d.site][1])
            for d in deliveries
        ]
        return with_scores(scaler, [good[s] for s in sorted(good)]), both

    # --- one round -----------------------------------------------------------------------------------------------

    def _round(self, combining: rounds.Combining, asking: Asking) -> tuple[RoundReport, Checkpoint]:
        started = time.perf_counter()
        plan, number, state = self.plan, asking.number, asking.state
        found = combining.combine(asking)
        server = {k: v for k, v in state.server.items() if k not in (_AVERAGE, _CLIP)}
        weights, control = state.weights, state.control
        if found.mean is not None:
            if found.step is not None:  # as the sites make it: another order of the same products ends in other bits
                step = asking.compressor.expand(found.step.vector())
            else:
                step, server = self._rule.finish(found.mean, server)
            weights = rounds.advance(weights, step)
            if control:  # SCAFFOLD, Algorithm 1 line 17: plain mean, scaled by the share of sites taking part
                sites = sorted(found.updates)
                mean = self._rule.total(
                    [wts.flatten(found.updates[s].control_delta) for s in sites], [1 / len(sites)] * len(sites)
                )
                control = wts.unflatten(wts.flatten(control) + len(sites) / len(plan.roster) * mean, control)
        if number >= plan.settings.rounds - plan.settings.average_last:
            server = server | {_AVERAGE: wts.flatten(weights) + state.server.get(_AVERAGE, 0.0)}
        if found.clip:
            server = server | {_CLIP: np.array([found.clip])}
        answered = set(found.updates) | set(found.sealed)
        took = {
            s for s, finding in found.audits.items() if found.step and finding != rounds.SILENT
        }  # the step came with the audit
        following = dataclasses.replace(
            state,
            next_round=number + 1,
            weights=weights,
            control=control,
            server=server,
            holds=state.holds | dict.fromkeys(sorted(answered), number) | dict.fromkeys(sorted(took), number + 1),
            steps=(*state.steps, found.step)[-rounds.KEPT_STEPS :] if found.step else (),
            exchange=found.next_exchange,
        )
        return self._report(found, following, asking, time.perf_counter() - started), following

    def _report(self, found: Outcome, following: Checkpoint, asking: Asking, seconds: float) -> RoundReport:
        plan = self.plan
        answers: dict[str, Update | Sealed] = {**found.updates, **found.sealed}
        return RoundReport(
            round=asking.number,
            rounds=plan.settings.rounds,
            rule=self._rule.name if plan.settings.rule.name == "mean" else f"{plan.settings.rule.name} + {self._rule.name}",
            lr=plan.lr(asking.number),
            accepted=tuple(sorted(found.shares)),
            shares=found.shares,
            update_norms={s: wts.norm(u.delta) for s, u in sorted(found.updates.items())},
            train_loss={s: a.train_loss for s, a in sorted(answers.items())},
            dropouts=found.dropouts,
            rejections=found.rejections,
            bytes_down={d.site: d.bytes_down for d in found.deliveries},
            bytes_up={d.site: d.bytes_up for d in found.deliveries},
            model_sha256=wire.weights_digest(self._final(following), following.scaler),
            plan_sha256=plan.sha256,
            validation=_validation({s: a.validation for s, a in sorted(answers.items())}),
            seconds=seconds,
            overhead_seconds=seconds - _waited(found.deliveries, asking.engine),
            excluded=found.excluded,
            protection=plan.settings.security.mode,
            exchange=found.exchange,
            audits=found.audits,
            evidence=found.evidence,
            contribution=found.contribution,
            role_bytes=found.parties,
            updates={d.site: d.sha256 for d in found.deliveries if d.site in answers},
        )

    def _need_quorum(
        self,
        what: str,
        good: Mapping[str, object],
        deliveries: Sequence[Delivery],
        failures: Sequence[Dropout | Rejection] = (),
    ) -> None:
        answers = [d.answer for d in deliveries if isinstance(d.answer, Dropout | Rejection)]
        rounds.need_quorum(self.plan, what, good, [*answers, *failures])

    def _nonce(self) -> str:
        """Returns the run's random name: signatures and pads of one run count in no other."""
        path = self.folder / NONCE
        if not path.exists():
            files.write_json(path, {"run": os.urandom(16).hex()})
        return str(files.read_json(path)["run"])

    # --- state ---------------------------------------------------------------------------------------------------

    def _attested(self) -> str:
        return files.sha256(files.canonical_json(wire.plain(self.attestations)))

    def _final(self, state: Checkpoint) -> Weights:
        """Returns the model's weights if no further round came: the last ones, or the mean of those to be averaged."""
        s = self.plan.settings
        averaged = state.next_round - (s.rounds - s.average_last)
        if not s.average_last or averaged < 1:
            return state.weights
        return wts.unflatten(state.server[_AVERAGE] / averaged, state.weights)

    def _calibrate(self, engine: Engine, state: Checkpoint) -> None:
        """Asks how far off the finished model is on rows no member saw, and fixes the half-widths of its intervals."""
        plan, level = self.plan, self.plan.settings.interval_level
        found: dict[str, object] = {"level": level, "half_width": None, "sites": {}}
        if plan.task.kind != "binary":
            request = CalibrateRequest(plan.sha256, self._final(state), state.scaler)
            deliveries = engine.broadcast(request, tuple(self.attestations), plan.settings.deadline_s)
            sketches = {}
            for d in deliveries:
                a = d.answer
                most = self.attestations[d.site].n_train + self.attestations[d.site].n_validation
                if isinstance(a, Calibration) and a.site == d.site and uncertainty.sound(a.sketch, most):
                    sketches[d.site] = a.sketch
            unit = float(state.scaler.y_scale[0])
            widths = {s: q * unit for s, q in uncertainty.mondrian(sketches, level).items()} if sketches else {}
            overall = uncertainty.quantile(uncertainty.merge(list(sketches.values())), level) * unit
            found |= {
                "half_width": _finite(overall),
                "sites": {s: _finite(w) for s, w in widths.items()},
                "units": {s: float(sketches[s].sum()) for s in sorted(sketches)},
            }
        files.write_json(self.folder / INTERVALS, found)

    def _spec(self) -> dict[str, object]:
        first = next(iter(self.attestations.values()))
        return self.plan.model_spec(first.feature_names, first.features_sha256)

    def _restore(self) -> Checkpoint | None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            (self.folder / ROUNDS).unlink(missing_ok=True)
            return None
        try:
            state = wire.decode(path.read_bytes(), Checkpoint)
        except WireError as error:
            raise StateError(f"{path}: damaged ({error.what})", fix="restore it, or start afresh with --fresh") from None
        if state.plan_sha256 != self.plan.sha256:
            raise StateError(f"{path}: belongs to another plan", fix="start afresh with --fresh, or name another --run-id")
        self._recall(state)
        self._drop_reports_from(state.next_round)
        return state

    def _recall(self, state: Checkpoint) -> None:
        """Takes up what the sites attested when the run began; a site that now attests other data stops the run."""
        path = self.folder / SETUP
        stored = {
            site: Attestation(**{**entry, **{k: tuple(entry[k]) for k in ("feature_names", "labels")}})
            for site, entry in files.read_json(path)["attestations"].items()
        }
        now, self.attestations = self.attestations, stored
        if self._attested() != state.attestations_sha256:
            raise StateError(f"{path}: was changed since the run began", fix="restore it, or start afresh with --fresh")
        changed = [site for site, attestation in now.items() if site in stored and attestation != stored[site]]
        if changed:
            raise StateError(
                f"{self.folder}: {', '.join(changed)} attests other data than when this run began",
                fix="start afresh with --fresh to train on the new data",
            )

    def _save(self, report: RoundReport, state: Checkpoint) -> None:
        """Report first, checkpoint second: after a crash in between, the report of the repeated round is dropped."""
        line = json.dumps(wire.plain(report), sort_keys=True, allow_nan=False)
        with (self.folder / ROUNDS).open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        files.write_atomic(self.folder / CHECKPOINT, wire.encode(state))

    def _drop_reports_from(self, number: int) -> None:
        path = self.folder / ROUNDS
        if not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        if len(lines) > number:
            files.write_atomic(path, b"".join(lines[:number]))


def _failure(delivery: Delivery, otherwise: str) -> Dropout | Rejection:
    if isinstance(delivery.answer, Dropout | Rejection):
        return delivery.answer
    return Rejection(delivery.site, "malformed", otherwise)


def _waited(deliveries: Sequence[Delivery], engine: Engine) -> float:
    """Returns the seconds a round waited for its sites."""
    waits = [d.seconds for d in deliveries]
    return max(waits, default=0.0) if engine.side_by_side else sum(waits)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _sound(s: Statistics, width: int, attested: Attestation) -> bool:
    rows = attested.n_train
    shapes = s.count.shape == s.total.shape == s.total_squares.shape == (width,) and s.target.shape == (len(attested.labels), 3)
    return bool(
        shapes
        and all(np.isfinite(a).all() for a in (s.count, s.total, s.total_squares, s.target))
        and tuple(s.target[:, 0]) == attested.labels  # no site may count for more labels than it attested
        and max(attested.labels) <= rows
        and (s.count <= rows).all()
        and (s.count >= 0).all()
    )


def _validation(sums: Mapping[str, Array]) -> dict[str, float]:
    good = [s for s in sums.values() if s.shape == (5,) and np.isfinite(s).all() and s[0] > 0]
    if not good:
        return {}
    n, absolute, square = (float(sum(s[i] for s in good)) for i in range(3))
    return {"n": n, "mae": absolute / n, "rmse": float(np.sqrt(square / n))}
