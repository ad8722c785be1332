"""What training has cost: events become an epsilon, a target epsilon becomes noise, and a ledger holds a site to its budget.

Knows: noise, sampling rates and numbers of steps. Refuses to know: records, gradients, weights.

The guarantee counted here is (epsilon, delta)-differential privacy under adding or removing one record, for steps that each
add Gaussian noise to a sum over Poisson-sampled records of bounded norm. The number of record is the privacy loss
distribution (PLD) of dp-accounting; Opacus' PRV accountant is the cross-check, and a test holds the two together.

References:
    Abadi et al., "Deep Learning with Differential Privacy", CCS 2016 (the mechanism that is counted).
    Koskela, Jaelkoe, Honkela, "Computing Tight Differential Privacy Guarantees Using FFT", AISTATS 2020 (PLD).
    Doroshenko et al., "Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions", PoPETs 2022.
    Gopi, Lee, Wutschitz, "Numerical Composition of Differential Privacy", NeurIPS 2021 (PRV).
"""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmat import files
from fedmat.errors import PlanRefused, StateError

_INTERVAL = 1e-3  # of the discretised loss; rounded up, so a coarser one costs epsilon (about 3e-4 here) and never hides any
_FINEST = 1000  # noise multipliers are found in thousandths
_MOST_NOISE = 10**7  # thousandths; no budget worth the name asks for more
_FIRST = "0" * 64


class BudgetExhausted(PlanRefused):
    """The next steps would pass a site's privacy budget: they are not taken."""


@dataclass(frozen=True)
class Event:
    """Some equal steps of training.

    Attributes:
        noise_multiplier: standard deviation of the noise, in units of one record's largest norm; above 0.
        sampling_rate: chance of a record to take part in a step, above 0 and at most 1.
        steps: number of steps, at least 1.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError("noise_multiplier must be a finite number above 0: without noise there is no epsilon")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError("sampling_rate must lie above 0 and be at most 1")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError("steps must be a whole number, at least 1")


def epsilon(events: Sequence[Event], delta: float) -> float:
    """Returns the epsilon of all ``events`` together: the number of record.

    Args:
        events: in any order; the result does not depend on it.
        delta: between 0 and 1.

    Raises:
        ValueError: ``delta`` is out of range.
    """
    _check_delta(delta)
    return _epsilon(_joined(events), delta) if events else 0.0


def epsilon_prv(events: Sequence[Event], delta: float) -> float:
    """Returns the same by another method (Gopi et al., 2021): an upper bound with an error of at most 0.01."""
    import numpy as np
    from opacus.accountants import PRVAccountant  # type: ignore[import-untyped, unused-ignore]

    _check_delta(delta)
    if not events:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps) for noise, rate, steps in _joined(events)]
    with np.errstate(divide="ignore"), warnings.catch_warnings():  # the library takes log(0) on a branch it then discards
        warnings.filterwarnings(
            "ignore", "Optimal order", UserWarning
        )  # of a first guess at the range; the result has its bound
        return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=256)
def noise_for(target: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Returns the least noise multiplier, in thousandths, with which ``steps`` steps cost at most ``target``.

    Args:
        target: the epsilon that may be spent.

    Raises:
        PlanRefused: no noise within reason keeps the target.
        ValueError: an argument is out of range.
    """
    if not (math.isfinite(target) and target > 0):
        raise ValueError("the target epsilon must be a finite number above 0")

    def keeps(thousandths: int) -> bool:
        return epsilon([Event(thousandths / _FINEST, sampling_rate, steps)], delta) <= target

    enough = _FINEST  # the bracket grows from 1: very small noise is slow to account for, and rarely the answer
    while not keeps(enough):
        enough *= 2
        if enough > _MOST_NOISE:
            raise PlanRefused(
                f"no noise multiplier up to {_MOST_NOISE // _FINEST} keeps epsilon {target:g} over {steps} steps",
                fix="raise privacy.epsilon or privacy.delta, or take fewer steps",
            )
    while enough > 1 and keeps(enough // 2):
        enough //= 2
    too_little = enough // 2
    while enough - too_little > 1:
        middle = (enough + too_little) // 2
        enough, too_little = (middle, too_little) if keeps(middle) else (enough, middle)
    return enough / _FINEST


def _joined(events: Sequence[Event]) -> tuple[tuple[float, float, int], ...]:
    """Returns equal steps added up: composition does not depend on the order, and one power is faster than many products."""
    steps: Counter[tuple[float, float]] = Counter()
    for e in events:
        steps[e.noise_multiplier, e.sampling_rate] += e.steps
    return tuple((noise, rate, n) for (noise, rate), n in sorted(steps.items()))


@functools.lru_cache(maxsize=1024)
def _epsilon(joined: tuple[tuple[float, float, int], ...], delta: float) -> float:
    import dp_accounting  # type: ignore[import-untyped, unused-ignore]
    from dp_accounting.pld import PLDAccountant  # type: ignore[import-untyped, unused-ignore]

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, _INTERVAL)
    for noise, rate, steps in joined:
        # this kind of event is counted; the library's randomised response is not, so nothing else may be composed here
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError("delta must lie between 0 and 1")


# --- the ledger --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spend:
    """One entry of a ledger.

    Attributes:
        number: of the line, from 1; line 0 states the budget.
        total: epsilon of everything spent up to and including this entry.
        reply_sha256: of the reply these steps led to, once it is known; else empty.
    """

    number: int
    run: str
    round: int
    event: Event
    total: float
    note: str
    reply_sha256: str = ""


class BudgetLedger:
    """What one site has spent of its budget: a file of JSON lines that only grows.

    A spend is on disk before the steps it pays for are taken. A crash in between leaves steps that were paid for and never
    taken; the other order would leave steps that nobody counted.

    The same round asked again is charged again. It draws fresh noise, so two replies would be two releases, and a site that
    crashed cannot know whether its first reply had left. The one exception is a reply that is already made: bytes whose
    digest the ledger holds (:meth:`made`) may be sent again for nothing, because an observer who has them learns nothing new
    (``spend(..., resent=...)``).

    Every line holds the digest of the line before it, and a second file, ``<name>.head``, holds the length and the digest
    of the last line. Together they show edits, missing lines and a file that is gone. They do not show that *both* files
    were put back to an earlier state: keep :attr:`head` where others see it, e.g. in the site's replies.

    Several processes may use one ledger; each reads the file anew under a lock.

    Args:
        path: of an existing ledger; see :meth:`create`.

    Raises:
        StateError: there is no ledger, or it is damaged or shortened. A new one is never put in its place by itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read()

    @classmethod
    def create(cls, path: Path, *, site: str, epsilon: float, delta: float) -> BudgetLedger:
        """Starts the ledger of a site's records; whoever calls this knows that nothing was spent before.

        Raises:
            StateError: there is a ledger, or what is left of one.
            ValueError: the budget is out of range.
        """
        _check_delta(delta)
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise ValueError("the budget must be a finite epsilon above 0")
        if path.exists() or _head_of(path).exists():
            raise StateError(
                f"{path}: a privacy ledger was started here before", fix="open it; a spent budget does not come back"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        body = {
            "kind": "budget",
            "site": site,
            "epsilon": epsilon,
            "delta": delta,
            "unit": "record",
            "neighbours": "add-remove",
        }
        line, sha256 = _line(0, _FIRST, body)
        try:
            with path.open("xb") as handle:  # two processes that start at once: one of them is refused
                handle.write(line)
                handle.flush()
                os.fsync(handle.fileno())
        except FileExistsError:
            raise StateError(f"{path}: another process has just started this ledger", fix="open it") from None
        _write_head(path, 1, sha256)
        folder = os.open(path.parent, os.O_RDONLY)  # a file's name is on disk only when its folder is
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return cls(path)

    @property
    def budget(self) -> tuple[float, float]:
        """The epsilon and delta that may be spent."""
        first = self._read()[0]
        return float(first["epsilon"]), float(first["delta"])

    @property
    def head(self) -> tuple[int, str]:
        """Number of lines and digest of the last one; tells nothing about records, and pins the ledger where others keep it."""
        lines = self._read()
        return len(lines), str(lines[-1]["sha256"])

    def entries(self) -> tuple[Spend, ...]:
        """Returns everything spent so far, in order."""
        return _spends(self._read())

    def spent(self) -> float:
        """Returns the epsilon spent so far, at the budget's delta."""
        return epsilon([s.event for s in self.entries()], self.budget[1])

    def remaining(self) -> float:
        """Returns the budget's epsilon less what is spent.

        Epsilons do not simply add up: an event that costs more than this on its own may still fit. :meth:`spend` knows.
        """
        return max(0.0, self.budget[0] - self.spent())

    def spend(self, event: Event, *, run: str, round: int, note: str = "", resent: bytes | None = None) -> Spend:
        """Charges ``event`` and returns when that is on disk; only then may its steps be taken.

        Args:
            note: for people; never a value from a record.
            resent: the stored reply, where it is sent again instead of training; nothing is charged then, and the entry of
                the first time is returned.

        Raises:
            BudgetExhausted: the total would pass the budget; nothing is written, and nothing may be trained.
            StateError: the ledger is damaged or shortened, could not be written, or does not know the reply that is resent.
        """
        with self._locked() as handle:
            lines = self._read()
            before = _spends(lines)
            if resent is not None:
                digest = files.sha256(resent)
                for entry in before:
                    if (entry.run, entry.round, entry.event, entry.reply_sha256) == (run, round, event, digest):
                        return entry
                raise StateError(
                    f"{self.path}: the reply to be sent again is not one that was paid for in round {round}",
                    fix="do not send it; train the round anew and pay for it",
                )
            most, delta = float(lines[0]["epsilon"]), float(lines[0]["delta"])
            total = epsilon([*(s.event for s in before), event], delta)
            if total > most:
                raise BudgetExhausted(
                    f"round {round} would bring epsilon to {total:.2f}, the budget is {most:g} at delta {delta:g}; nothing was trained",
                    fix="end the run here; a larger privacy.epsilon is a new promise to those whose records these are",
                )
            paid = Spend(len(lines), run, round, event, total, note)
            body = {
                "kind": "spend",
                "run": run,
                "round": round,
                "noise_multiplier": event.noise_multiplier,
                "sampling_rate": event.sampling_rate,
                "steps": event.steps,
                "total": total,
                "note": note,
            }
            self._append(handle, lines, body)
        return paid

    def made(self, paid: Spend, reply: bytes) -> None:
        """Notes the reply that the steps of ``paid`` led to, so that the same bytes may be sent again.

        Args:
            reply: the noisy update itself, before it is masked or sealed: those bytes differ each time it is sent.

        Raises:
            StateError: the ledger is damaged, or holds no such entry, or another reply to it.
        """
        digest = files.sha256(reply)
        with self._locked() as handle:
            lines = self._read()
            known = {s.number: s for s in _spends(lines)}.get(paid.number)
            if known is None or (known.run, known.round, known.event) != (paid.run, paid.round, paid.event):
                raise StateError(f"{self.path}: no entry {paid.number} for round {paid.round}", fix="spend before training")
            if known.reply_sha256 == digest:
                return
            if known.reply_sha256:
                raise StateError(
                    f"{self.path}: entry {paid.number} already has another reply", fix="every training needs a spend of its own"
                )
            self._append(handle, lines, {"kind": "reply", "spend": paid.number, "reply_sha256": digest})

    # --- the file ------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[int]:
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except OSError:
            raise StateError(f"{self.path}: the privacy ledger cannot be opened", fix=_RESTORE) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)

    def _append(self, handle: int, lines: Sequence[dict[str, Any]], body: dict[str, Any]) -> None:
        line, sha256 = _line(len(lines), str(lines[-1]["sha256"]), body)
        size = os.fstat(handle).st_size
        try:
            written = os.write(handle, line)
            if written != len(line):
                raise OSError("short write")
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, size)  # the spend is not confirmed, so its steps are not taken: the line may go
            raise StateError(
                f"{self.path}: the privacy ledger could not be written", fix="free the disk and ask again"
            ) from None
        _write_head(self.path, len(lines) + 1, sha256)  # after the line: a crash in between leaves the ledger ahead, not behind

    def _read(self) -> list[dict[str, Any]]:
        try:
            data = self.path.read_bytes()
        except OSError:
            raise StateError(f"{self.path}: there is no privacy ledger", fix=_RESTORE) from None
        lines: list[dict[str, Any]] = []
        previous = _FIRST
        if not data.endswith(b"\n"):
            raise _damaged(self.path, data.count(b"\n"))
        for number, text in enumerate(data.removesuffix(b"\n").split(b"\n")):
            try:
                found = json.loads(text)
                body = {k: v for k, v in found.items() if k not in ("number", "previous", "sha256")}
                same = _line(number, previous, body)[0] == text + b"\n"
            except (ValueError, AttributeError, TypeError):
                raise _damaged(self.path, number) from None
            if not same:
                raise _damaged(self.path, number)
            lines.append(found)
            previous = str(found["sha256"])
        if lines[0].get("kind") != "budget":
            raise _damaged(self.path, 0)
        head = files.read_json(_head_of(self.path))
        try:
            n, sha256 = int(head["entries"]), str(head["sha256"])
        except (KeyError, TypeError, ValueError):
            raise StateError(f"{_head_of(self.path)}: damaged", fix=_RESTORE) from None
        if not 1 <= n <= len(lines) or lines[n - 1]["sha256"] != sha256:
            raise StateError(f"{self.path}: the privacy ledger has lost lines that were written", fix=_RESTORE)
        return lines


_RESTORE = "restore both files from a backup that is not older than the last reply; without one the budget counts as spent"


def _damaged(path: Path, number: int) -> StateError:
    return StateError(f"{path}: line {number + 1} of the privacy ledger is damaged or half written", fix=_RESTORE)


def _head_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def _write_head(path: Path, entries: int, sha256: str) -> None:
    files.write_json(_head_of(path), {"entries": entries, "sha256": sha256})


def _line(number: int, previous: str, body: dict[str, Any]) -> tuple[bytes, str]:
    """Returns a line of the file and its digest, which covers the line before it."""
    whole = {**body, "number": number, "previous": previous}
    sha256 = files.sha256(files.canonical_json(whole))
    return files.canonical_json({**whole, "sha256": sha256}) + b"\n", sha256


def _spends(lines: Sequence[dict[str, Any]]) -> tuple[Spend, ...]:
    replies = {int(v["spend"]): str(v["reply_sha256"]) for v in lines if v["kind"] == "reply"}
    return tuple(
        Spend(
            int(v["number"]),
            str(v["run"]),
            int(v["round"]),
            Event(float(v["noise_multiplier"]), float(v["sampling_rate"]), int(v["steps"])),
            float(v["total"]),
            str(v["note"]),
            replies.get(int(v["number"]), ""),
        )
        for v in lines
        if v["kind"] == "spend"
    )
