"""What the ledger costs beyond a plain SQLite table of the same rows, in one run on this machine.

Run ``python -m benchmarks.ledger`` (or ``make bench``), with ``--entries 1000000`` for the size that docs/ledger.md speaks of
(some minutes, 2 GB of disk). Prints one JSON object, on one line with ``--json``.

The plain table has an index and the bytes, the same journal, the same ``synchronous = FULL`` and the same batches; the two
take turns, so that other work on the machine slows both. The ledger also refuses what it has already, hashes, keeps its tree
and its lookup. Entries are envelopes of about 650 bytes; their signatures are noise, since neither appending nor checking the
tree looks at them (Ed25519 is under ``entry``). Only ratios within one run can be carried to another machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import sqlite3
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fedmat.telemetry  # noqa: F401
from fedmat.keys import PartyKeys
from fedmat.ledger import dsse, merkle, notes
from fedmat.ledger.export import export, read_export, structure
from fedmat.ledger.finding import Finding
from fedmat.ledger.log import Log
from fedmat.ledger.notes import Verifier
from fedmat.ledger.text import b64

BATCH, TURN, SINGLE, PROOFS = 500, 20, 300, 2000
KEYS = PartyKeys.new("bench")
KEY_ID = dsse.key_id(KEYS.signing.public_key().public_bytes_raw())


def entries(start: int, count: int) -> list[bytes]:
    """Envelopes in canonical form, each one different."""
    found = []
    for i in range(start, start + count):
        noise = hashlib.sha512(b"%d" % i).digest()
        payload = b'{"digests":"' + noise.hex().encode() * 2 + b'","number":%d}' % i
        text = f'{{"payload":"{b64(payload)}","payloadType":"{dsse.PAYLOAD_TYPE}","signatures":[{{"keyid":"{KEY_ID}","sig":"{b64(noise)}"}}]}}'
        found.append(text.encode())
    return found


class Plain:
    """A table and nothing else."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        for setting in ("journal_mode = WAL", "synchronous = FULL", "cache_size = -32768", "wal_autocheckpoint = 16000"):
            self._db.execute(f"PRAGMA {setting}")
        self._db.execute('CREATE TABLE entry ("index" INTEGER PRIMARY KEY, data BLOB NOT NULL)')
        self.size = 0

    def append(self, datas: Sequence[bytes]) -> None:
        """One durable transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("INSERT INTO entry VALUES (?, ?)", list(enumerate(datas, start=self.size)))
        self._db.execute("COMMIT")
        self.size += len(datas)


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def fill(log: Log, plain: Plain, count: int) -> dict[str, Any]:
    """Batched appends, in turns; rates of everything and of the last tenth."""
    spent: dict[str, list[float]] = {"ledger": [], "plain": []}
    while log.size < count:
        batches = [entries(log.size + BATCH * b, BATCH) for b in range(TURN)]
        for name, append in (("ledger", log.append), ("plain", plain.append)):
            spent[name].append(sum(seconds(partial(append, batch)) for batch in batches))
    each = BATCH * TURN
    tail = max(1, len(spent["plain"]) // 10)
    out: dict[str, Any] = {f"{n}_per_s": round(each * len(s) / sum(s)) for n, s in spent.items()}
    out |= {f"{n}_per_s_best_turn": round(each / min(s)) for n, s in spent.items()}
    out |= {f"{n}_per_s_last_tenth": round(each * tail / sum(s[-tail:])) for n, s in spent.items()}
    out["ledger_over_plain_time"] = round(sum(spent["ledger"]) / sum(spent["plain"]), 2)
    return out


def singles(log: Log, plain: Plain) -> dict[str, Any]:
    """Durable appends of one entry, in turns."""
    times: dict[str, list[float]] = {"ledger": [], "plain": []}
    for data in entries(log.size + 10**9, SINGLE):
        times["ledger"].append(seconds(partial(log.append, [data])))
        times["plain"].append(seconds(partial(plain.append, [data])))
    out: dict[str, Any] = {f"{n}_per_s": round(SINGLE / sum(t)) for n, t in times.items()}
    out["ledger_ms_p50"] = round(statistics.median(times["ledger"]) * 1e3, 2)
    out["ledger_ms_p99"] = round(statistics.quantiles(times["ledger"], n=100)[98] * 1e3, 2)
    out["ledger_over_plain_time"] = round(sum(times["ledger"]) / sum(times["plain"]), 2)
    return out


def proofs(log: Log, plain: Plain) -> dict[str, Any]:
    """Proofs at random places of the whole log, and reading one row of the plain table beside them."""
    size, rng = log.size, random.Random(1)
    root, places = log.root(), [rng.randrange(size) for _ in range(PROOFS)]
    paths: list[tuple[bytes, ...]] = []
    out: dict[str, Any] = {"size": size}
    out["inclusion_us"] = seconds(lambda: paths.extend(log.inclusion(i, size) for i in places)) / PROOFS * 1e6
    row = 'SELECT data FROM entry WHERE "index" = ?'
    out["plain_row_us"] = seconds(lambda: [plain._db.execute(row, (i,)).fetchone() for i in places]) / PROOFS * 1e6
    out["inclusion_bytes_max"] = 32 * max(map(len, paths))
    leaves = [merkle.leaf_hash(next(log.read(i, i + 1))) for i in places[:200]]
    good: list[bool] = []
    checks = list(zip(leaves, places, paths))
    out["verify_inclusion_us"] = (
        seconds(lambda: good.extend(merkle.verify_inclusion(f, i, size, p, root) for f, i, p in checks)) / len(checks) * 1e6
    )
    olds = [i + 1 for i in places[:500]]
    steps: list[tuple[bytes, ...]] = []
    out["consistency_us"] = seconds(lambda: steps.extend(log.consistency(old, size) for old in olds)) / len(olds) * 1e6
    out["consistency_bytes_max"] = 32 * max(map(len, steps))
    roots = [log.root(old) for old in olds]
    pairs = list(zip(olds, steps, roots))
    out["verify_consistency_us"] = (
        seconds(lambda: good.extend(merkle.verify_consistency(o, size, p, r, root) for o, p, r in pairs)) / len(pairs) * 1e6
    )
    out["all_verify"] = all(good) and len(good) == len(checks) + len(pairs)
    return {k: round(v, 1) if isinstance(v, float) else v for k, v in out.items()}


def whole(log: Log, folder: Path) -> dict[str, Any]:
    """Checkpoint, export, reading it again, the check of the file and that of the database."""
    out: dict[str, Any] = {"memory_mb_before": memory()}
    out["sign_checkpoint_ms"] = round(seconds(lambda: log.sign_checkpoint("bench", KEYS)) * 1e3, 2)
    path = folder / "ledger.jsonl"
    findings: list[Finding] = []
    out["check_database_s"] = round(seconds(lambda: findings.extend(log.check())), 1)
    out["memory_mb_check_database"] = memory()
    out["export_s"] = round(seconds(lambda: export(log, path)), 1)
    out["export_mb"] = round(path.stat().st_size / 1e6)
    started = time.perf_counter()
    read = read_export(path)
    out["read_export_s"] = round(time.perf_counter() - started, 1)
    operator = Verifier.of("bench", KEYS)
    out["check_file_s"] = round(seconds(lambda: findings.extend(structure(read, operator, lambda n: (), lambda n: 0))), 1)
    out["memory_mb_check_file"] = memory()
    out["findings"] = len(findings)
    return out


def entry() -> dict[str, Any]:
    """One entry: signing, parsing, verifying; one cosignature."""
    payload, count = b"x" * 300, 500
    envelope = dsse.sign(payload, [KEYS])
    data, public = envelope.encode(), KEYS.signing.public_key().public_bytes_raw()
    body = notes.checkpoint("bench", 1, bytes(32))
    work: dict[str, Callable[[], object]] = {
        "sign_us": lambda: dsse.sign(payload, [KEYS]),
        "parse_us": lambda: dsse.parse(data),
        "verify_us": lambda: dsse.verify(envelope, KEY_ID, public),
        "cosign_us": lambda: notes.cosign(body, "bench", KEYS, 1),
    }
    return {k: round(timeit.timeit(call, number=count) / count * 1e6, 1) for k, call in work.items()}


def memory() -> int:
    """Largest resident size of this process so far, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--entries", type=int, default=50_000)
    parser.add_argument("--json", action="store_true", help="on one line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = Plain(folder / "plain.db")
        with Log.open(folder / "ledger.db", "fedmat/bench") as log:
            out: dict[str, Any] = {"entries": arguments.entries, "entry_bytes": len(entries(0, 1)[0]), "entry": entry()}
            out["batched_500"] = fill(log, plain, arguments.entries)
            out["single"] = singles(log, plain)
            out["proofs"] = proofs(log, plain)
            out["whole"] = whole(log, folder)
    json.dump(out, sys.stdout, indent=None if arguments.json else 2)
    print()


if __name__ == "__main__":
    main()
