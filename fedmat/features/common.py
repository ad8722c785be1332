"""What every featurizer needs: naming a row without its value, reading options, working once per distinct input.

Knows: columns of a records table, and how to share much work among this machine's cores. Refuses to know: chemistry.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmat.data.contract import Field, RecordType
from fedmat.errors import ConfigError, FeatureError

Array = NDArray[np.float64]


def row_name(records: pd.DataFrame, position: int) -> str:
    """Returns how a person finds a row: its source and data row where known, else its 1-based place in the batch."""
    if "source_row" in records.columns and "source" in records.columns:
        return f"row {int(records['source_row'].iloc[position])} of source '{records['source'].iloc[position]}'"
    return f"row {position + 1}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns advice naming the nearest of ``known``, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(names) or '(none)'}"


def check_options(featurizer: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuses an option that ``featurizer`` does not have.

    Raises:
        ConfigError: names the option and the nearest valid one.
    """
    for key in options:
        if key not in known:
            raise ConfigError(f"features: {featurizer} has no option '{key}'", fix=nearest(key, known))


def whole_number(featurizer: str, options: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    """Returns an integer option within ``[low, high]``; raises ConfigError otherwise."""
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(
            f"features: option '{key}' of {featurizer} must be a whole number from {low} to {high}",
            fix=f"set {key}: {default}",
        )
    return value


def text_list(featurizer: str, options: Mapping[str, Any], key: str, default: Sequence[str]) -> tuple[str, ...]:
    """Returns a list-of-names option; raises ConfigError when it is something else or repeats a name."""
    value = options.get(key, list(default))
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value) or len(set(value)) != len(value):
        raise ConfigError(f"features: option '{key}' of {featurizer} must be a list of different names", fix=f"{key}: [a, b]")
    return tuple(value)


def field_of_kind(featurizer: str, options: Mapping[str, Any], rt: RecordType, kind: str) -> Field:
    """Returns the field the option ``field`` names, else the record type's first field of ``kind``.

    Raises:
        ConfigError: there is none, or the named one is of another kind.
    """
    if "field" in options:
        chosen = rt.field(str(options["field"]))
        if chosen.kind != kind:
            raise ConfigError(
                f"features: {featurizer} needs a {kind} field, {chosen.name} is a {chosen.kind}", fix="name another field"
            )
        return chosen
    for field in rt.fields:
        if field.kind == kind:
            return field
    raise ConfigError(
        f"features: {featurizer} needs a {kind} field and {rt.name} has none",
        fix="remove the featurizer or use another record type",
    )


def column(records: pd.DataFrame, field: str, featurizer: str) -> pd.Series[Any]:
    """Returns a records column; raises FeatureError naming the field when it is not there."""
    if field not in records.columns:
        raise FeatureError(f"{featurizer}: the records have no field '{field}'", fix=f"supply the field '{field}'")
    return records[field]


def numbers(records: pd.DataFrame, field: str, featurizer: str, *, may_miss: bool = False) -> Array:
    """Returns a number column as float64, shape ``n``.

    Raises:
        FeatureError: a value is no finite number (NaN is permitted where ``may_miss``); names field and first row.
    """
    values: Array = pd.to_numeric(column(records, field, featurizer), errors="coerce").to_numpy(dtype=np.float64)
    absent = column(records, field, featurizer).isna().to_numpy()
    bad = ~np.isfinite(values) & ~(absent & may_miss)
    if bad.any():
        raise FeatureError(
            f"{featurizer}: {int(bad.sum())} record(s) have no finite number in field '{field}', first in "
            f"{row_name(records, int(np.argmax(bad)))}",
            fix="correct or remove those records",
        )
    return values


def texts(records: pd.DataFrame, field: str, featurizer: str) -> pd.Series[str]:
    """Returns a text column with absent values as ""."""
    return column(records, field, featurizer).fillna("").astype(str)


def per_distinct(
    records: pd.DataFrame,
    keys: Sequence[pd.Series[str]],
    width: int,
    compute: Callable[..., Sequence[float] | Array],
    about: str,
) -> Array:
    """Computes one row of features for every distinct combination of ``keys`` and spreads them over all records.

    Args:
        records: the table, for naming rows.
        keys: text columns, each of length ``n``.
        width: number of features ``p``.
        compute: takes one text per key, returns ``p`` numbers; raises ``ValueError`` with a reason that holds no value. A
            module's function or a method of a plain dataclass, else it is computed in this process alone.
        about: featurizer and field, for the message.

    Returns:
        Shape ``n x p``. Neither the order of rows nor the number of processes (:data:`WORKERS`) influences any row's value.

    Raises:
        FeatureError: ``compute`` refused an input; the message names field, row and reason.
    """
    if not len(records):
        return np.empty((0, width), dtype=np.float64)
    joined = pd.MultiIndex.from_arrays([k.to_numpy() for k in keys])
    codes, distinct = pd.factorize(joined)
    rows, refusal = _compute(list(distinct), width, compute)
    if refusal is not None:
        at, reason = refusal
        raise FeatureError(
            f"{about}: {row_name(records, int(np.argmax(codes == at)))}: {reason}",
            fix="correct or remove the record, or choose other features",
        )
    spread: Array = rows[codes]
    return spread


# --- many distinct inputs, several processes -----------------------------------------------------------------------

Compute = Callable[..., Sequence[float] | Array]
Key = tuple[str, ...]
Refusal = tuple[int, str]  # place of the input, reason

WORKERS = "FEDMAT_WORKERS"  # processes to compute features in, this one included; 0 or 1: this one alone
_CHUNK = 32
_MOST = 4  # a process that has loaded deepchem holds half a gigabyte
_WORTH_S = 20.0  # processor seconds; a helper needs 2 (formulation), 6 (composition) or 16 (deepchem) of them to load
_BUSY = 0.9  # a process that gets less than this share of one core has no second one to give away
_START = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from fedmat.features.common import _help; _help()"


def _compute(keys: Sequence[Key], width: int, compute: Compute) -> tuple[Array, Refusal | None]:
    """Returns ``compute`` of every key, shape ``len(keys) x width``, or the first key (in order) that it refused.

    This process works from the first key on and, where much remains, starts helpers that take part as soon as they have loaded
    what ``compute`` needs; those that are not ready in time are let go. Cores that others use are not free, though this process
    may run on them: helpers are started only where this process has a core to itself, and run at the lowest priority. A row depends on its key alone, so who computed it
    changes no bit. Whatever goes wrong in a helper, its keys are computed here: an error is raised as if there were none.
    """
    processes, worth = _processes()
    work = _Work(keys, width, compute)
    helpers: list[_Helper] = []
    wall, processor, done = 0.0, 0.0, 0
    try:
        while True:
            while (part := work.take()) is not None:
                work.keep(part, *_block(keys[slice(*part)], width, compute))
                if part[0] == 0:  # the first key alone pays for imports and says nothing about speed
                    wall, processor = time.perf_counter(), time.process_time()
                else:
                    done += part[1] - part[0]
                if processes > 1 and not helpers:
                    used = time.process_time() - processor
                    alone = used >= _BUSY * (time.perf_counter() - wall)
                    if worth <= 0 or (done and alone and used / done * work.waiting() >= worth):
                        helpers = [_Helper(work) for _ in range(min(processes - 1, len(work.pending)))]
            for helper in helpers:
                helper.finish()
            if not work.pending:  # else a helper died and gave its keys back
                break
    finally:
        for helper in helpers:
            helper.end()
    first = min(work.refused, default=None)
    return work.rows, None if first is None else (first, work.refused[first])


def _processes() -> tuple[int, float]:
    """Returns how many processes may compute, and from how many processor seconds of remaining work on.

    Raises:
        ConfigError: the environment asks for something else than a number of processes.
    """
    asked = os.environ.get(WORKERS, "").strip()
    if asked:
        if not (asked.isascii() and asked.isdecimal()) or int(asked) > 256:
            raise ConfigError(f"{WORKERS} must be a number of processes from 0 to 256", fix=f"unset {WORKERS}, or set it to 1")
        return int(asked), 0.0
    if multiprocessing.parent_process() is not None:  # one process per site: the cores are taken
        return 1, math.inf
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST), _WORTH_S


def _block(keys: Sequence[Key], width: int, compute: Compute) -> tuple[Array, Refusal | None]:
    rows = np.zeros((len(keys), width), dtype=np.float64)
    for i, key in enumerate(keys):
        try:
            rows[i] = compute(*key)
        except ValueError as error:
            return rows, (i, str(error))
    return rows, None


class _Work:
    """Keys in parts that several threads take, in order; what is taken is kept or given back."""

    def __init__(self, keys: Sequence[Key], width: int, compute: Compute) -> None:
        self.keys, self.width, self.compute = keys, width, compute
        self.rows: Array = np.zeros((len(keys), width), dtype=np.float64)
        self.refused: dict[int, str] = {}
        bounds = [0, *range(1, len(keys), _CHUNK), len(keys)]
        self.pending = [(a, b) for a, b in pairwise(bounds) if a < b]
        self._lock = threading.Lock()

    def take(self) -> tuple[int, int] | None:
        with self._lock:
            first = min(self.refused, default=len(self.keys))
            self.pending = [part for part in self.pending if part[0] < first]  # what follows a refusal no longer matters
            return self.pending.pop(0) if self.pending else None

    def keep(self, part: tuple[int, int], rows: Array, refusal: Refusal | None) -> None:
        with self._lock:
            self.rows[slice(*part)] = rows
            if refusal is not None:
                self.refused[part[0] + refusal[0]] = refusal[1]

    def give_back(self, part: tuple[int, int]) -> None:
        with self._lock:
            self.pending = sorted([*self.pending, part])

    def waiting(self) -> int:
        with self._lock:
            return sum(b - a for a, b in self.pending)


class _Helper:
    """Another Python process that computes keys, and the thread that feeds it.

    A plain subprocess over pipes of its own: it runs no line of the caller's main module (a spawned worker would, and a script
    without a guard would then run twice), is no fork of a process with threads, and what libraries print in it, which may hold
    a cell, goes nowhere.
    """

    def __init__(self, work: _Work) -> None:
        self._work, self._ready, self._task = work, False, b""
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._feed, daemon=True)
        with contextlib.suppress(OSError, pickle.PicklingError, AttributeError, TypeError):  # then there is no helper
            self._task = pickle.dumps(sys.path) + pickle.dumps((work.compute, work.width, work.keys[0]))
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {WORKERS: "1"},
            )
            self._thread.start()

    def finish(self) -> None:
        """Waits for what the helper has taken; one that is still loading is let go."""
        if self._process is not None:
            if not self._ready:
                self._process.kill()
            self._thread.join()

    def end(self) -> None:
        """Stops the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._thread.join()
            self._process.communicate()

    def _feed(self) -> None:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return
        part: tuple[int, int] | None = None
        try:
            process.stdin.write(self._task)
            process.stdin.flush()
            self._ready = pickle.load(process.stdout) is True
            while (part := self._work.take()) is not None:
                pickle.dump(list(self._work.keys[slice(*part)]), process.stdin)
                process.stdin.flush()
                self._work.keep(part, *pickle.load(process.stdout))
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):  # it died
            if part is not None:
                self._work.give_back(part)


def _help() -> None:
    """What a helper does: learns its task, computes one key to load every library, says so, answers until there is no more."""
    if hasattr(os, "nice"):
        os.nice(19)  # lessens, and does not end, what a helper that was asked for costs where no core is free
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    compute, width, example = pickle.load(questions)
    _block([example], width, compute)
    answer: object = True
    with contextlib.suppress(EOFError):
        while True:
            pickle.dump(answer, answers)
            answers.flush()
            answer = _block(pickle.load(questions), width, compute)
