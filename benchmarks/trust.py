"""What protection costs: one encrypted round of three roles beside the same round in the clear, in one run on this machine.

Run ``python benchmarks/trust.py``, or with ``--full`` (the first part of ``make bench-trust``; a minute or two). By its path:
a dependency (Opacus 1.6.0) installs a package of its own that is called ``benchmarks``. Prints one JSON object.

Sites, roles and the courier share one process here, and every message passes through its bytes: what a party computes and what
it spends on encoding and decoding (``_wire``) are counted for it apart, in CPU seconds (``time.process_time``). The plain round
is ``n`` float32 vectors, encoded, decoded and added in float64. Numbers under ``study`` are those of the study that preceded
the program, measured at another time and without encoding; only ratios within one run can be carried to another machine.

All updates are random: sites share a direction, and a fifth of them send three times the opposite of the others' mean.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cache, partial
from typing import Any

import fedmat.telemetry  # noqa: F401  before numpy: threads of its library wait busily, which counts as CPU time

# isort: split
import numpy as np

from fedmat import keys as keyring
from fedmat import wire
from fedmat.aggregation import robust
from fedmat.config import Compression, RuleSpec
from fedmat.contribution import gram_shapley
from fedmat.domain import Sealed, TrainRequest, Update
from fedmat.envelopes import (
    ROLES,
    ArrivedRequest,
    AuditRequest,
    AuditVote,
    Ciphertexts,
    Header,
    MaskedSumRequest,
    MaskKeysRequest,
    MaskSharesRequest,
    SumWitness,
    UnmaskRequest,
    WitnessRequest,
)
from fedmat.seeds import stream
from fedmat.transport import ckks
from fedmat.transport.compression import Compressor
from fedmat.transport.masking import MaskingServer, MaskingSite
from fedmat.transport.trigram import messages, site
from fedmat.transport.trigram.exchange import Combined, Exchange
from fedmat.transport.trigram.ring import Ring, Words, dot
from fedmat.transport.trigram.roles import Role

PLAN, TODAY, CLIP, COURIER = "p" * 64, "2026-11-24", 2.5, "coordinator"
PLAIN_AGAIN = 5  # plain rounds for one encrypted one: they are so short
SITE_STEPS = ("quantise", "protect", "audit")
# n, bits, k -> the study's CPU seconds: a site, Aggregator, Auditor, Notary. None: below what it could measure.
STUDY: dict[tuple[int, int, int], tuple[float | None, ...]] = {
    (10, 32, 5_000): (None, None, None, None),
    (10, 32, 50_000): (0.001, 0.01, 0.02, 0.01),
    (10, 32, 1_000_000): (0.010, 0.22, 0.24, 0.19),
    (10, 64, 1_000_000): (0.015, 0.42, 0.34, 0.40),
    (20, 32, 1_000_000): (0.008, 0.60, 0.88, 0.63),
    (10, 32, 5_000_000): (0.032, 0.84, 1.23, 0.94),
}
STUDY_OVERHEAD_B = 438  # per site and round, X25519


# --- whose seconds, whose bytes ---------------------------------------------------------------------------------------


@dataclass
class Meter:
    """Counts for every party its CPU seconds by step, and the bytes that reach and leave it.

    Attributes:
        cpu, wire: (party, step) -> seconds of its own work; party -> seconds of encoding and decoding.
        memory: also counts, with tracemalloc, what a role allocates; slows what is timed.
    """

    memory: bool = False
    cpu: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    wire: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    into: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    out: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    held: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    peak: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @contextmanager
    def at(self, party: str, step: str = "") -> Iterator[None]:
        """Counts a block for a party: as its own step, or as wire work."""
        started = time.process_time()
        yield
        spent = time.process_time() - started
        if step:
            self.cpu[party, step] += spent
        else:
            self.wire[party] += spent

    def ask(self, party: str, request: Any, answer: Callable[[Any], Any], step: str, data: bytes = b"") -> Any:
        """Returns a party's answer to a request; both pass through their bytes."""
        if not data:
            with self.at(COURIER):
                data = wire.encode(request)
        if self.memory:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
        with self.at(party):
            asked = wire.decode(data, type(request))
        with self.at(party, step):
            answered = answer(asked)
        with self.at(party):
            reply = wire.encode(answered)
        del asked
        if self.memory:
            now, highest = tracemalloc.get_traced_memory()
            self.peak[party] = max(self.peak[party], self.held[party] + highest - before)
            self.held[party] += now - before
        self.into[party] += len(data)
        self.out[party] += len(reply)
        with self.at(COURIER):
            return wire.decode(reply, type(answered))

    def of(self, party: str) -> float:
        """CPU seconds of a party's own work, all steps."""
        return sum(s for (p, _), s in self.cpu.items() if p == party)

    @property
    def everybody(self) -> float:
        """CPU seconds of all parties, wire work included."""
        return sum(self.cpu.values()) + sum(self.wire.values())


# --- a consortium -----------------------------------------------------------------------------------------------------


@cache
def parties(n: int, kem: keyring.Kem) -> tuple[keyring.Charter, dict[str, keyring.PartyKeys]]:
    """A charter of ``n`` sites and three roles, and everybody's keys."""
    names = [f"site{i:02d}" for i in range(n)]
    keys = {name: keyring.PartyKeys.new(name, kem) for name in (*ROLES, *names)}
    entries = [k.public(name if name in ROLES else "site", f"owner of {name}", date(2030, 1, 1)) for name, k in keys.items()]
    return keyring.charter("bench", kem, entries), keys


def header_of(charter: keyring.Charter, n: int, f: int, k: int, bits: int, minimum: int) -> Header:
    """The header of a first exchange, all sites with weight 1."""
    return Header(
        plan_sha256=PLAN, run="bench", round=0, exchange=0, model_sha256="m" * 64, charter_sha256=charter.sha256,
        length=k, bits=bits, hostile=f, minimum=minimum, clip=CLIP, weights={f"site{i:02d}": 1 for i in range(n)},
        map_sha256="", today=TODAY,
    )  # fmt: skip


def updates(n: int, f: int, k: int) -> dict[str, Any]:
    """Float32 updates; the last ``f`` sites send minus three times the mean of the others."""
    rng = stream(1, "trust", str(k))
    common = rng.standard_normal(k)
    honest = [((common + 0.8 * rng.standard_normal(k)) / k**0.5).astype(np.float32) for _ in range(n - f)]
    bad = np.float32(-3) * np.mean(honest, axis=0, dtype=np.float32)
    return {f"site{i:02d}": x for i, x in enumerate([*honest, *[bad] * f])}


# --- one round, both ways ---------------------------------------------------------------------------------------------


def encrypted(n: int, f: int, k: int, bits: int, kem: keyring.Kem, given: Mapping[str, Any], meter: Meter) -> dict[str, Any]:
    """Runs one round of the three roles; returns its bytes and whether it is exact."""
    charter, keys = parties(n, kem)
    rule = RuleSpec(name="multi_krum", hostile=f)
    ring, header = Ring(bits), header_of(charter, n, f, k, bits, messages.least_minimum(f))

    def select(gram: robust.Gram, base: Sequence[int], scores: Sequence[int] | None = None) -> robust.Choice:
        return robust.choose(rule, gram, base, scores)

    roles = {r: Role(r, keys[r], charter, select, PLAN) for r in ROLES}
    words: dict[str, Words] = {}

    def send(requests: Mapping[str, object]) -> dict[str, object]:
        encoded: dict[int, bytes] = {}
        for request in requests.values():  # one request to several is encoded once, as the engines do
            if id(request) not in encoded:
                with meter.at(COURIER):
                    encoded[id(request)] = wire.encode(request)
        replies = {}
        for party, request in requests.items():
            if isinstance(request, AuditRequest):
                act = partial(site.audit, charter=charter, keys=keys[party], words=words[party])
                replies[party] = meter.ask(party, request, act, "audit", encoded[id(request)])
            else:
                replies[party] = meter.ask(party, request, roles[party].handle, "role", encoded[id(request)])  # type: ignore[index]
        return replies

    def carried(act: Callable[[], Any]) -> Any:
        """What the courier itself computes: all of it but what others were counted for meanwhile."""
        before, started = meter.everybody, time.process_time()
        result = act()
        meter.cpu[COURIER, "courier"] += time.process_time() - started - (meter.everybody - before)
        return result

    exchange = Exchange(charter, send)
    consents = carried(lambda: exchange.announce(header))
    submissions: dict[str, Any] = {}
    up, envelope = {}, 0
    for name, x in given.items():
        with meter.at(name, "quantise"):
            words[name] = ring.encode(x, CLIP, stream(1, "rounding", name))
        with meter.at(name, "protect"):
            made = site.submit(header, consents, charter, keys[name], words[name])
        with meter.at(name):
            data = wire.encode(Sealed(name, made))
        with meter.at(COURIER):
            submissions[name] = wire.decode(data, Sealed).content
        up[name], envelope = len(data), made.envelope.nbytes
        del made, data
    combined: Combined = carried(lambda: exchange.combine(header, submissions))
    votes = carried(lambda: exchange.audit(header, combined))
    asked = TrainRequest(PLAN, 0, 0.1, "m" * 64)
    with_consent = TrainRequest(PLAN, 0, 0.1, "m" * 64, header=header, consents=consents)
    last = sorted(given)[-1]
    elements = k * ring.size
    sites = sorted(given)
    audit_in, vote_out = meter.into[last], meter.out[last]
    lifted = [ring.lift(words[s]) for s in combined.sites]
    total = sum(w * v for w, v in zip(combined.weights, lifted, strict=True))
    opened = np.frombuffer(combined.total, ring.dtype)
    honest = sum(w * given[s].astype(np.float64) for w, s in zip(combined.weights, combined.sites, strict=True))
    mean = honest / sum(combined.weights)
    decoded = ring.decode(opened, CLIP, sum(combined.weights))
    return {
        "site_up": {"elements": elements, "envelope": envelope, "framing": up[last] - elements - envelope, "vote": vote_out},
        "site_down": {
            "header_and_consents": len(wire.encode(with_consent)) - len(wire.encode(asked)),
            "audit_request": audit_in,
        },
        "role_in": {r: meter.into[r] for r in ROLES},
        "role_out": {r: meter.out[r] for r in ROLES},
        "from_sites": sum(up.values()) + sum(meter.out[s] for s in sites),
        "all": sum(up.values()) + sum(meter.into.values()) + sum(meter.out.values()),
        "exact_sum": bool((ring.lift(opened) == total).all()),
        "exact_gram": all(
            dot(a, b) == combined.gram[i][j] for i, a in enumerate(lifted) for j, b in enumerate(lifted) if i <= j
        ),
        "hostile_weight": sum(w for s, w in zip(combined.sites, combined.weights, strict=True) if s in sites[-f:]),
        "agreeing_votes": sum(isinstance(v, AuditVote) and v.agrees for v in votes.values()),
        "rounding_error": float(np.linalg.norm(decoded - mean) / np.linalg.norm(mean)),
    }


def plain(k: int, given: Mapping[str, Any], meter: Meter) -> int:
    """Runs the round in the clear; returns the bytes from the sites."""
    total, size = np.zeros(k), 0
    for name, x in given.items():
        with meter.at(name):
            data = wire.encode(Update(name, 0, PLAN, "r" * 64, {"compressed": x}))
        size += len(data)
        with meter.at(COURIER):
            update = wire.decode(data, Update)
        with meter.at(COURIER, "add"):
            np.add(total, update.delta["compressed"], out=total)
    return size


def measure(n: int, f: int, k: int, bits: int = 32, kem: keyring.Kem = "x25519", repeats: int = 1) -> dict[str, Any]:
    """Both rounds ``repeats`` times in turn; CPU seconds are medians over them, and over sites."""
    given = updates(n, f, k)
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        gc.collect()
        meter, again = Meter(), []
        found = encrypted(n, f, k, bits, kem, given, meter)
        for _ in range(PLAIN_AGAIN):
            clear = Meter()
            size = plain(k, given, clear)
            again.append(
                (statistics.median(clear.wire[s] for s in given), clear.of(COURIER), clear.wire[COURIER], clear.everybody)
            )
        in_the_clear = [statistics.median(column) for column in zip(*again, strict=True)]
        names = sorted(given)
        run = {f"site_{step}": statistics.median(meter.cpu[s, step] for s in names) for step in SITE_STEPS}
        run |= {"site_wire": statistics.median(meter.wire[s] for s in names)}
        run |= {r: meter.of(r) for r in ROLES} | {f"{r}_wire": meter.wire[r] for r in ROLES}
        run |= {COURIER: meter.of(COURIER), f"{COURIER}_wire": meter.wire[COURIER], "everybody": meter.everybody}
        run |= dict(zip(("plain_site", "plain_add", f"plain_{COURIER}_wire", "plain_everybody"), in_the_clear, strict=True))
        runs.append(run)
    seconds = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
    study = STUDY.get((n, bits, k)) if kem == "x25519" else None
    ours = (seconds["site_protect"], *(seconds[r] for r in ROLES))
    up = found["site_up"]
    return {
        "n": n, "hostile": f, "k": k, "ring": bits, "kem": kem, "repeats": repeats,
        "cpu_s": {key: round(v, 5) for key, v in seconds.items()},
        "bytes": {key: v for key, v in found.items() if key in ("site_up", "site_down", "role_in", "role_out", "from_sites", "all")}
        | {"plain_from_sites": size, "plain_framing_per_site": size // n - 4 * k},
        "study": None if study is None else {
            "overhead_bytes": STUDY_OVERHEAD_B, "envelope_bytes_here": up["envelope"],
            **{name: {"study_s": s, "here_s": round(v, 4), "ratio": round(v / s, 2) if s else None}
               for name, s, v in zip(("site_protect", *ROLES), study, ours, strict=True)},
        },
        "ratio_to_plain": {
            "bytes_from_a_site": round((up["elements"] + up["envelope"] + up["framing"]) / (size / n), 4),
            "bytes_of_all": round(found["all"] / size, 2),
            "cpu_of_a_site": round(sum(seconds[f"site_{s}"] for s in (*SITE_STEPS, "wire")) / seconds["plain_site"], 1),
            "cpu_of_all": round(seconds["everybody"] / seconds["plain_everybody"], 1),
        },
        "checks": {key: found[key] for key in ("exact_sum", "exact_gram", "hostile_weight", "agreeing_votes", "rounding_error")},
    }  # fmt: skip


def peak_mib() -> int:
    """Peak resident memory of this process; the kernel's other number for it includes the parent before the start."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) >> 10


def memory(n: int, f: int, k: int) -> dict[str, Any]:
    """Seconds, then the process's peak (all parties in it), then every role's own peak; for a process of its own."""
    before = peak_mib()
    row = measure(n, f, k)
    whole = peak_mib()
    given, meter = updates(n, f, k), Meter(memory=True)
    tracemalloc.start()
    encrypted(n, f, k, 32, "x25519", given, meter)
    tracemalloc.stop()
    row["memory_mib"] = {"peak_rss_all_parties": whole, "rss_after_imports": before} | {
        r: {"peak": meter.peak[r] >> 20, "kept_to_the_end": meter.held[r] >> 20} for r in ROLES
    }
    return row


# --- the parts beside the round -----------------------------------------------------------------------------------------


def masked(
    charter: keyring.Charter,
    keys: Mapping[str, Any],
    header: Header,
    threshold: int,
    dropouts: int,
    words: Mapping[str, Words],
    meter: Meter,
) -> Words:
    """Runs one exchange under pairwise masks; the first ``dropouts`` sites give shares and then no update. Returns the sum."""
    server = MaskingServer(charter, threshold)
    sites = {s: MaskingSite(s, keys[s], charter, threshold) for s in sorted(header.weights)}

    def all_of(names: Sequence[str], request: Any, act: Callable[[MaskingSite, Any], Any]) -> list[Any]:
        return [meter.ask(s, request, partial(act, sites[s]), "mask") for s in names]

    def mask(one: MaskingSite, own: Words, asked: MaskedSumRequest) -> Any:
        return one.mask(asked.header, asked.shares, own)

    made = all_of(list(sites), MaskKeysRequest(PLAN, header), lambda m, q: m.keys_for(q.header))
    with meter.at(COURIER, "server"):
        good = server.check_keys(header, made)
    given = all_of(list(sites), MaskSharesRequest(PLAN, header, good), lambda m, q: m.shares_for(q.header, q.keys))
    with meter.at(COURIER, "server"):
        routed = server.route(given)
    stay = list(sites)[dropouts:]
    for s in stay:
        request = MaskedSumRequest(PLAN, header, routed[s])
        message = meter.ask(s, request, partial(mask, sites[s], words[s]), "mask")
        with meter.at(COURIER, "server"):
            server.accept(message)
    with meter.at(COURIER, "server"):
        arrived, dropped = server.need()
    signed = all_of(
        stay, ArrivedRequest(PLAN, header, arrived, dropped), lambda m, q: m.confirm(q.header, q.arrived, q.dropped)
    )
    with meter.at(COURIER, "server"):
        signatures = server.consistent(signed)
    last = UnmaskRequest(PLAN, header, arrived, dropped, signatures)
    shown = all_of(stay, last, lambda m, q: m.unmask(q.header, q.arrived, q.dropped, q.signatures))
    with meter.at(COURIER, "server"):
        return server.total(shown)


def masking(n: int, f: int, k: int, threshold: int, dropouts: int, repeats: int = 3) -> dict[str, Any]:
    """Sums under pairwise masks; CPU seconds are medians, of sites that stay to the end."""
    charter, keys = parties(n, "x25519")
    header, ring = header_of(charter, n, f, k, 32, threshold), Ring(32)
    words = {s: ring.encode(x, CLIP, stream(1, "rounding", s)) for s, x in updates(n, f, k).items()}
    stay, runs = sorted(words)[dropouts:], []
    for _ in range(repeats):
        gc.collect()
        meter = Meter()
        total = masked(charter, keys, header, threshold, dropouts, words, meter)
        site_s, site_wire = (statistics.mean(values) for values in ([meter.of(s) for s in stay], [meter.wire[s] for s in stay]))
        runs.append((site_s, site_wire, meter.of(COURIER), meter.wire[COURIER]))
    seconds = [round(statistics.median(column), 5) for column in zip(*runs, strict=True)]
    return {
        "n": n, "k": k, "threshold": threshold, "dropouts": dropouts,
        "exact_sum": bool((ring.lift(total) == sum(ring.lift(words[s]) for s in stay)).all()),
        "cpu_s": dict(zip(("site", "site_wire", COURIER, f"{COURIER}_wire"), seconds, strict=True)),
        "bytes": {"site_up": meter.out[stay[-1]], "beyond_elements": meter.out[stay[-1]] - 4 * k, "site_down": meter.into[stay[-1]],
                  "up_all": sum(meter.out.values()), "down_all": sum(meter.into.values())},
    }  # fmt: skip


def encrypted_sums(n: int, f: int, k: int, repeats: int = 3) -> dict[str, Any]:
    """One CKKS round: encrypt, check and add, witnesses, one decryption."""
    import scipy.special  # noqa: F401  loaded by the first decryption, which is not what is measured

    charter, keys = parties(n, "x25519")
    header = header_of(charter, n, f, k, 32, n - f)
    names = sorted(header.weights)
    given = updates(n, f, k)
    runs = []
    for _ in range(repeats):
        gc.collect()
        meter = Meter()
        holder = ckks.KeyHolder.new(keys["auditor"], charter, header.run)
        published = holder.public_context()
        context = ckks.open_context(published, charter, header)
        sent: list[Ciphertexts] = []
        for s in names:
            with meter.at(s, "encrypt"):
                sent.append(ckks.submit(header, charter, keys[s], context, given[s].astype(np.float64)))
        with meter.at(COURIER, "add"):
            total = ckks.add(context, [ckks.accept(header, charter, context, m) for m in sent])
        seen: list[SumWitness] = []
        for s in names[: f + 1]:
            with meter.at(s, "witness"):
                seen.append(ckks.witness(header, charter, keys[s], context, sent))
        with meter.at("auditor", "decrypt"):
            opened = holder.decrypt(header, names, total, seen)
        runs.append(
            (
                statistics.mean(meter.cpu[s, "encrypt"] for s in names),
                meter.cpu[COURIER, "add"],
                statistics.mean(meter.cpu[s, "witness"] for s in names[: f + 1]),
                meter.cpu["auditor", "decrypt"],
            )
        )
    wanted = sum(x.astype(np.float64) * min(1.0, CLIP / float(np.linalg.norm(x))) for x in given.values())
    up = len(wire.encode(sent[0]))
    seconds = [round(statistics.median(column), 4) for column in zip(*runs, strict=True)]
    return {
        "n": n, "k": k,
        "cpu_s": dict(zip(("encrypt", "check_and_add", "witness", "decrypt"), seconds, strict=True)),
        "bytes": {"site_up": up, "to_a_witness": len(wire.encode(WitnessRequest(PLAN, header, tuple(sent)))), "context": len(published)},
        "site_up_ratio_to_float32": round(up / (4 * k), 2),
        "largest_error_of_clip_and_weights": float(np.abs(opened - wanted).max() / (CLIP * n)),
    }  # fmt: skip


def rules(sizes: Sequence[tuple[int, int]] = ((10, 2), (20, 4))) -> dict[str, dict[str, float]]:
    """Milliseconds of ``choose`` on exact inner products, by rule and number of sites."""
    ring = Ring(32)
    out: dict[str, dict[str, float]] = defaultdict(dict)
    for n, f in sizes:
        lifted = [ring.lift(ring.encode(x, CLIP, stream(1, "rounding", s))) for s, x in updates(n, f, 5_000).items()]
        gram = [[dot(a, b) for b in lifted] for a in lifted]
        for name in sorted(robust.GRAM_RULES):
            rule = RuleSpec(name=name, hostile=0 if name == "mean" else f)
            robust.choose(rule, gram, [1] * n)
            out[name][f"n={n}"] = middle(partial(robust.choose, rule, gram, [1] * n), 20, 1000.0)
    return dict(out)


def parts() -> dict[str, Any]:
    """Compression at ``d = 2^20`` and exact shares of twenty sites."""
    like = {"w": np.zeros((1024, 1024), dtype=np.float32)}
    spec = Compression(name="hadamard", share=0.05)
    made = Compressor.of(spec, like, 1)
    vector = stream(1, "trust").standard_normal(made.size)
    numbers = made.compress(vector)
    rng = stream(1, "shares")
    images, target = rng.standard_normal((20, 64)), rng.standard_normal(64)
    gram, products, weights = images @ images.T, images @ target, np.ones(20)
    return {
        "hadamard": {
            "d": made.size, "k": made.length,
            "set_up_s": middle(lambda: Compressor.of(spec, like, 1), 3),
            "compress_s": middle(lambda: made.compress(vector), 5),
            "expand_s": middle(lambda: made.expand(numbers), 5),
        },
        "gram_shapley_s": {"n=20": middle(lambda: gram_shapley(gram, products, weights, rows=64), 3)},
    }  # fmt: skip


def middle(act: Callable[[], Any], repeats: int, unit: float = 1.0) -> float:
    """Median CPU seconds of an act, times ``unit``."""
    spent = []
    for _ in range(repeats):
        started = time.process_time()
        act()
        spent.append(time.process_time() - started)
    return round(statistics.median(spent) * unit, 4)


# --- all of it ------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="what protection costs; prints one JSON object")
    parser.add_argument("--full", action="store_true", help="more sizes, memory, masking, CKKS, rules, shares")
    parser.add_argument("--memory", type=int, metavar="K", help="one round of K elements in this process, with its memory")
    chosen = parser.parse_args()
    measure(10, 2, 1_000)  # loads what is loaded on first use
    if chosen.memory:
        out: dict[str, Any] = memory(10, 2, chosen.memory)
    else:
        load = os.getloadavg()[0]
        out = {"rounds": [measure(10, 2, 5_000, repeats=7), measure(10, 2, 50_000, repeats=7)]}
        out["rounds"].append(measure(10, 2, 1_000_000, repeats=5 if chosen.full else 1))
        out["rounds"].append(measure(10, 2, 5_000, kem="mlkem768-x25519", repeats=3))
        if chosen.full:
            out["rounds"].append(measure(10, 2, 1_000_000, bits=64, repeats=3))
            out["rounds"].append(measure(20, 4, 1_000_000, repeats=3))
            command = [sys.executable, __file__, "--memory", "5000000"]
            out["rounds"].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            out["masking"] = [masking(10, 2, k, 7, gone) for k in (50_000, 1_000_000) for gone in (0, 3)]
            out["ckks"] = encrypted_sums(10, 2, 50_000)
            out["rules_ms"] = rules()
            out |= parts()
        out["machine"] = {
            "cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__,
            "load_at_start": round(load, 1), "load_at_end": round(os.getloadavg()[0], 1),
        }  # fmt: skip
    json.dump(out, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
