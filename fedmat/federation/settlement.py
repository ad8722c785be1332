"""Settlement once per release: whose rows the last layer of the released model owes how much, told by the Auditor alone.

Knows: the public feature map, noisy second moments at the Auditor, shares everywhere else. Refuses to know: records, features
and moments without noise; what a site computes of its rows is in ``fedmat.federation.site``.

1. The coordinator sends every site the released model. The site turns its rows into features (the model's last hidden layer,
   projected to ``dims`` numbers by a public random matrix), takes second moments of its training and of its validation
   rows, adds Gaussian noise, seals both to the Auditor and signs.
2. The Auditor opens the seals, retrains the last layer for every coalition (``contribution.head_shapley``) and signs the shares.
   It gives shares, never moments, once per model. Sites of one organisation, as the charter has it, are one player: their moments are
   added, which gives what one site with all their rows would get, and the share is divided by rows.

What a hostile site can do. Its *training* moments: within the bounds and the number of rows it attested it can state any,
also such as look like everyone's validation rows; nothing proves that moments come from records. Its *validation* moments: it
sets a part of the examination, and can set one that its own training moments pass best. The sum over sites is therefore taken
with equal weight per site, each site's moments divided by its own number of rows: a site has one part in n of the
examination however many rows it states, and n/2 hostile sites are needed for half of it. A reference set that no member
made would be better: a plan's reference rows (``fedmat.federation.reference``) are not used here.

What is private. (epsilon, delta)-differential privacy of what the Auditor sees, per record and given the model: the feature
map is the released model, which was itself trained on the rows; what *that* tells is ``plan.privacy``'s matter. Training and
validation rows are different rows, so one budget covers both. Numbers of rows are public.

References:
    ``fedmat.contribution`` for the game and the noise. Johnson, Lindenstrauss, "Extensions of Lipschitz mappings into a
    Hilbert space", 1984 (random projections).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np

from fedmat import contribution, files, wire
from fedmat.contribution import Bounds, Matrix, Moments
from fedmat.domain import Dropout, GlobalModel, MomentsRequest, Rejection
from fedmat.envelopes import RoleName, SealedMoments, Settlement, SettleRequest
from fedmat.errors import PlanRefused, ProtocolError, RoundFailed, StateError, WireError
from fedmat.federation.engine import Engine
from fedmat.federation.plan import MIN_SITES, Plan
from fedmat.federation.rounds import Replay
from fedmat.keys import Charter, PartyKeys
from fedmat.privacy.mechanisms import Noise
from fedmat.seeds import stream
from fedmat.transport.masking import raw
from fedmat.transport.trigram.ring import blob
from fedmat.weights import Vector

AUDITOR: RoleName = "auditor"
FILE = "settlement.json"
CREDITS = 1000  # shown beside the shares; what the ledger mints follows the charter's terms
BOUNDS = Bounds(phi=math.sqrt(2.0), y=3.0)  # a projected row of norm 1 and the constant; three standard deviations
ROWS_SHARE = 0.3  # of a site's rows; chosen by measurement: docs/shapley-benchmark.md
LEAST_ROWS = 5  # validation rows below which a site's part of the examination is left out
_EXCHANGE, _ASKED = "settlement", "asked.json"  # in the run's folder: what was asked and answered so far
_SIGMAS = 8.0  # noise passes so many standard deviations never: what lies beyond is no moment of rows within the bounds
_REDRAWS = 16
_PERMUTATIONS = 200  # orders of arrival, where there are too many sites for all coalitions


def refuse(plan: Plan) -> None:
    """Refuses to settle where no Auditor is apart from the coordinator, or where members would read each other.

    Raises:
        PlanRefused.
    """
    mode, n = plan.settings.security.mode, len(plan.roster)
    if mode not in ("trigram", "ckks"):
        raise PlanRefused(
            f"settlement under plan.security.mode {mode}: there is no Auditor to open moments that the coordinator must not see",
            fix="use security.mode: trigram or ckks",
        )
    if n < MIN_SITES:
        raise PlanRefused(
            f"settlement of {n} sites: shares of so few tell of each site's rows", fix=f"have {MIN_SITES} or more"
        )


# --- at a site -----------------------------------------------------------------------------------------------------


def features(plan: Plan, model_sha256: str, hidden: Matrix) -> Matrix:
    """Returns the public features of rows, ``n x (dims + 1)``, from the last hidden layer ``n x h``.

    The projection is fixed by the plan's seed and the model; its rows have a norm of about the layer's root mean square, are clipped
    to 1, and end in the constant 1.
    """
    dims, h = plan.settings.contribution.settle_dims, hidden.shape[1]
    matrix = stream(plan.settings.seed, "settlement", model_sha256).normal(size=(h, dims)) / math.sqrt(h * dims)
    rows = hidden @ matrix
    norms = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    return np.column_stack([rows / np.maximum(norms, 1.0), np.ones(len(rows))])


def protected(plan: Plan, phi: Matrix, y: Vector, noise: Noise | None = None) -> Moments:
    """Returns the noisy moments of rows' features and standardised targets; targets are clipped to ``BOUNDS.y``."""
    spec = plan.settings.contribution
    clipped = contribution.moments(phi, y, BOUNDS)
    return contribution.noisy(clipped, BOUNDS, spec.settle_epsilon, spec.settle_delta, noise=noise)


def seal(request: MomentsRequest, keys: PartyKeys, charter: Charter, train: Moments, held_out: Moments) -> SealedMoments:
    """Returns noisy moments so that only the Auditor reads them, bound to plan, run, site and model, and signed.

    Raises:
        ProtocolError: unknown_member or expired_key: the Auditor has no key that counts.
    """
    context = _context(charter, keys.name, request.plan_sha256, request.run, request.model_sha256)
    sealed = charter.seal(AUDITOR, _bytes(train) + _bytes(held_out), context, request.today)
    return SealedMoments(keys.name, blob(sealed), blob(keys.sign(_sealed_text(context, sealed))))


def once(path: Path, request: bytes, reply: Callable[[], bytes], whose: str) -> bytes:
    """Returns the reply to the one request that ``path`` stands for; it is written down before it is returned.

    The same request gets the same reply: a second one would be a second release, of which the noise could be averaged out.

    Raises:
        ProtocolError: second_settlement: another request was answered before.
    """
    digest = files.sha256(request).encode()
    if path.exists():
        kept = path.read_bytes()
        if kept[: len(digest)] != digest:
            raise ProtocolError(
                "second_settlement", f"{whose} answered another request for a settlement before",
                fix="each settlement costs privacy anew: whoever means to pay again removes the record of the first in its own folder",
            )  # fmt: skip
        return kept[len(digest) :]
    made = reply()
    files.write_atomic(path, digest + made, private=True)
    return made


# --- at the Auditor ------------------------------------------------------------------------------------------------


class Settling:
    """The Auditor's part.

    Args:
        folder: the Auditor's workspace; keeps what was answered, never moments.
    """

    def __init__(self, plan: Plan, keys: PartyKeys, charter: Charter, folder: Path) -> None:
        self._plan, self._keys, self._charter = plan, keys, charter
        self._folder = folder / "settled" / plan.sha256[:16]

    def handle(self, data: bytes, request: SettleRequest, runs: Callable[[str], bool]) -> bytes:
        """Returns the encoded shares; one request per model is answered.

        Args:
            data: the request as it came.
            runs: tells whether the Auditor took part in a run.

        Raises:
            PlanRefused: the plan permits no settlement.
            ProtocolError: bad_request, foreign_plan, wrong_charter, unknown_run, bad_sets, bad_moments, second_settlement, or too_few
                where fewer than five sites' moments are good. A site is left out, with the reason (expired_key, bad_signature,
                bad_seal, bad_moments, malformed, wrong_length) in the reply: one hostile site must not stop everyone's settlement.
        """
        if self._keys.name != AUDITOR:
            raise ProtocolError("bad_request", f"the {self._keys.name} settles nothing", fix="ask the auditor")
        if request.plan_sha256 != self._plan.sha256:
            raise ProtocolError("foreign_plan", "the request belongs to another plan than the Auditor's")
        if request.charter_sha256 != self._charter.sha256:
            raise ProtocolError("wrong_charter", "the request names another charter than the Auditor's")
        refuse(self._plan)
        if not runs(request.run):
            raise ProtocolError("unknown_run", "the Auditor took no part in this run", fix="settle a run's own model")
        path = self._folder / f"{files.sha256(request.model_sha256.encode())[:32]}.settled"
        return once(path, data, lambda: wire.encode(self._settle(data, request)), "the Auditor")

    def _settle(self, data: bytes, request: SettleRequest) -> Settlement:
        sites = tuple(part.site for part in request.parts)
        if list(sites) != sorted(set(sites)) or set(sites) - set(self._charter.sites):
            raise ProtocolError("bad_sets", "moments must be of sites of the charter, once each, in the order of the alphabet")
        opened: dict[str, tuple[Moments, Moments]] = {}
        excluded: dict[str, str] = {}
        for part in request.parts:
            try:
                opened[part.site] = self._open(request, part)
            except ProtocolError as error:
                excluded[part.site] = error.what
        if len(opened) < MIN_SITES:
            raise ProtocolError(
                "too_few",
                f"good moments of {len(opened)} sites, at least {MIN_SITES} are settled together ({_listed(excluded)})",
            )
        owners = players(self._charter, tuple(opened))
        if len(owners) < MIN_SITES:
            raise ProtocolError(
                "too_few",
                f"{len(opened)} sites with good moments belong to {len(owners)} organisations, at least {MIN_SITES} are settled together",
            )
        train, held_out = zip(*opened.values(), strict=True)
        groups = [[list(opened).index(s) for s in owner] for owner in owners]
        rows = [request.rows[s] for s in opened]
        shares, errors, gain = settle_moments(self._plan, train, held_out, request.model_sha256, groups, rows)
        message = Settlement(AUDITOR, tuple(opened), excluded, shares, errors, gain, files.sha256(data), blob(b""))
        return dataclasses.replace(message, signature=blob(self._keys.sign(_settled_text(self._plan, request.run, message))))

    def _open(self, request: SettleRequest, part: SealedMoments) -> tuple[Moments, Moments]:
        context = _context(self._charter, part.site, request.plan_sha256, request.run, request.model_sha256)
        sealed = raw(part.sealed, None, f"moments of {part.site}")
        signature = raw(part.signature, 64, f"signature of {part.site}")
        self._charter.verify(part.site, signature, _sealed_text(context, sealed), request.today)
        data, p = self._keys.unseal(sealed, context), self._plan.settings.contribution.settle_dims + 1
        half = 8 * (p * p + p + 2)
        if len(data) != 2 * half:
            raise ProtocolError("bad_moments", f"the moments of {part.site} are not those of {p} features")
        train, held_out = (_moments(data[i : i + half], p, part.site) for i in (0, half))
        for found, most in ((train, request.rows.get(part.site, 0)), (held_out, None)):
            _plausible(self._plan, found, most, part.site)
        return train, held_out


def players(charter: Charter, sites: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Returns the sites that the charter gives one organisation, together, in the order of each one's first site.

    They are one player of a settlement: an organisation gains nothing by taking part under several names.
    """
    organisation = {p.name: p.organisation for p in charter.parties}
    found: dict[str, list[str]] = {}
    for site in sites:
        found.setdefault(organisation[site], []).append(site)
    return tuple(tuple(group) for group in found.values())


def settle_moments(
    plan: Plan,
    parts: Sequence[Moments],
    held_out: Sequence[Moments],
    model_sha256: str,
    owners: Sequence[Sequence[int]] | None = None,
    rows: Sequence[int] | None = None,
) -> tuple[Vector, Vector, float]:
    """Returns shares, their standard errors (both shape ``n``) and the gain of all together, which the shares sum to.

    An error says what the sites' noise alone does to a share, found by adding more of it (half as much, so that all coalitions keep
    a solution); for more than ``contribution.MOST_RETRAINED`` players also what sampled orders of arrival do.

    Args:
        owners: groups of sites that are one player, with one part of the examination and a share divided by rows; each site its
            own player without.
        rows: training rows that the sites attested; those of ``parts`` without.

    Raises:
        ProtocolError: bad_moments: no player has enough held-out rows, or the groups are not groups of these sites.
        PlanRefused: the ridge is too small for the noise.
    """
    groups = contribution.grouped(owners or [[i] for i in range(len(parts))], len(parts))
    stated = rows or [m.n for m in parts]
    ridge = penalty(plan, len(parts), [sum(stated[i] for i in group) for group in groups])

    def merged(given: Sequence[Moments]) -> list[Moments]:
        return [contribution.together([given[i] for i in group]) for group in groups]

    def shares(train: Sequence[Moments], tested: Sequence[Moments]) -> tuple[Vector, Vector]:
        exam = _examination(merged(tested))
        if len(groups) <= contribution.MOST_RETRAINED:
            return contribution.head_shapley(merged(train), exam, ridge), np.zeros(len(groups))
        rng = stream(plan.settings.seed, "settlement-orders", model_sha256)
        found = contribution.head_shapley_sampled(merged(train), exam, ridge, rng=rng, permutations=_PERMUTATIONS)
        return found.values, found.errors

    values, sampling = shares(parts, held_out)
    # made from noisy moments only, so it tells nothing that they do not; public numbers, so that it can be done again
    rng = stream(plan.settings.seed, "settlement-errors", model_sha256)
    again = [
        shares([_more(plan, m, rng) for m in parts], [_more(plan, m, rng) for m in held_out])[0] for _ in range(_REDRAWS)
    ]  # fmt: skip
    noise = 2.0 * np.std(again, axis=0, ddof=1)
    errors, counts = np.sqrt(np.square(noise) + np.square(sampling)), [m.n for m in parts]
    return contribution.dealt(values, counts, groups), contribution.dealt(errors, counts, groups), math.fsum(values)


def penalty(plan: Plan, sites: int, rows: Sequence[int]) -> float:
    """Returns the ridge of a settlement: ``contribution.ridge`` times what covers the noise of all sites and a share of a player's rows.

    The second part keeps the layer of few players from extrapolating to everyone else's materials. It follows the median, so that
    nobody moves it far by what it states.

    Args:
        sites: how many there are: each adds noise of its own, whoever owns it.
        rows: training rows of every player.
    """
    spec = plan.settings.contribution
    cover = BOUNDS.phi**2 * (1.0 + 2.0 * _sigma(plan) * math.sqrt((spec.settle_dims + 1) * sites))
    return spec.ridge * (cover + ROWS_SHARE * median(rows))


def _examination(held_out: Sequence[Moments]) -> Moments:
    """Returns the sum of sites' mean moments, the number of sites in place of a number of rows."""
    counted = [m for m in held_out if m.n >= LEAST_ROWS]
    if not counted:
        raise ProtocolError("bad_moments", f"no site has {LEAST_ROWS} held-out rows", fix="have validation rows at the sites")
    return Moments(
        len(counted), np.sum([m.features / m.n for m in counted], axis=0), np.sum([m.products / m.n for m in counted], axis=0),
        math.fsum(m.square / m.n for m in counted),
    )  # fmt: skip


def _sigma(plan: Plan) -> float:
    """Standard deviation of the noise of a diagonal moment, in squared bounds (``contribution.noisy``)."""
    spec = plan.settings.contribution
    return 2.0 * math.sqrt(2.0) * contribution.noise_scale(spec.settle_epsilon, spec.settle_delta)


def _more(plan: Plan, m: Moments, rng: np.random.Generator) -> Moments:
    p = len(m.products)
    drawn = rng.normal(size=(p + 1, p + 1))
    units = np.append(np.full(p, BOUNDS.phi), BOUNDS.y)
    added = 0.25 * _sigma(plan) * (drawn + drawn.T) * np.outer(units, units)
    return Moments(m.n, m.features + added[:p, :p], m.products + added[:p, p], m.square + float(added[p, p]))


def _plausible(plan: Plan, m: Moments, most: int | None, site: str) -> None:
    """Refuses moments that no rows within the bounds can have, noise and all; ``most``: training rows the site attested."""
    p, noise = len(m.products), _SIGMAS * _sigma(plan)
    trace = float(np.trace(m.features))
    ok = (
        (most is None or m.n <= most)
        and abs(float(m.features[-1, -1]) - m.n) <= noise * BOUNDS.phi**2
        and -noise * math.sqrt(p) <= trace / BOUNDS.phi**2 <= m.n + noise * math.sqrt(p)
        and -noise <= m.square / BOUNDS.y**2 <= m.n + noise
        and float(np.linalg.norm(m.products)) <= BOUNDS.phi * BOUNDS.y * (m.n + noise * math.sqrt(p))
    )
    if not ok:
        raise ProtocolError(
            "bad_moments", f"the moments of {site} are not those of rows within the public bounds and of the number it attested"
        )


# --- at the coordinator --------------------------------------------------------------------------------------------


def settle(
    engine: Engine,
    plan: Plan,
    charter: Charter,
    model: GlobalModel,
    rows: Mapping[str, int],
    run: str,
    today: str,
    folder: Path,
) -> dict[str, Any]:
    """Settles a run's released model and returns what is in ``settlement.json``; done before, nothing is asked again.

    A call after a crash goes on with the answers that were given, on the date of the first call.

    Args:
        rows: labelled training rows that every site of the run attested.
        run: random name of the run.
        today: ISO date, for keys.
        folder: the run's folder.

    Raises:
        PlanRefused: the plan permits no settlement.
        RoundFailed: fewer than five sites gave moments, or the Auditor refused; the message says why.
        ProtocolError: bad_settlement or bad_signature: the Auditor's answer is not to this request, or not signed by it.
    """
    refuse(plan)
    model_sha256 = wire.weights_digest(model.weights, model.scaler)
    path, kept = folder / FILE, folder / _EXCHANGE
    if path.exists():
        known: dict[str, Any] = files.read_json(path)
        if known["model_sha256"] == model_sha256 and known["run"] == run:
            return known
    if len(rows) < MIN_SITES:
        raise StateError(f"{folder}: {len(rows)} sites took part, at least {MIN_SITES} are settled together")
    kept.mkdir(parents=True, exist_ok=True)
    replay, deadline = Replay(engine, kept), plan.settings.deadline_s
    asked = MomentsRequest(
        plan.sha256, run, model_sha256, model.weights, model.scaler, _first_day(kept, model_sha256, run, today)
    )
    found = {d.site: d.answer for d in replay.broadcast(asked, sorted(rows), deadline)}
    parts = {site: a for site, a in found.items() if isinstance(a, SealedMoments) and a.site == site}
    missing = {site: _why(answer) for site, answer in found.items() if site not in parts}
    if len(parts) < MIN_SITES:
        replay.forget(failures=True)
        raise RoundFailed(
            f"settlement: {len(parts)} sites gave moments, at least {MIN_SITES} are needed ({_listed(missing)})",
            fix="see what kept the others; the same command goes on",
        )
    request = SettleRequest(
        plan.sha256,
        run,
        model_sha256,
        charter.sha256,
        asked.today,
        {s: rows[s] for s in parts},
        tuple(parts[s] for s in sorted(parts)),
    )
    (delivery,) = replay.broadcast(cast(Any, request), (AUDITOR,), deadline)
    answer = delivery.answer
    if not isinstance(answer, Settlement):
        if isinstance(answer, Dropout) and answer.reason == "refused":
            replay.forget(failures=True)  # it keeps no answer: sites that stayed away may be asked again
        raise RoundFailed(
            f"settlement: the auditor does not settle: {_why(answer)}", fix="see what it says; the same command goes on"
        )
    if sorted((*answer.sites, *answer.excluded)) != sorted(parts) or answer.request_sha256 != wire.digest(request):
        raise ProtocolError("bad_settlement", "the Auditor's answer is not to what it was asked")
    if (
        not answer.shares.shape == answer.errors.shape == (len(answer.sites),)
        or not np.isfinite([*answer.shares, *answer.errors]).all()
    ):
        raise ProtocolError("bad_settlement", "the Auditor's shares are not one finite number per site")
    result = _told(plan, answer, run, model_sha256, charter, missing, rows)
    verify(result, plan, charter, asked.today)
    files.write_json(path, result)
    replay.forget()
    return result


def verify(told: Mapping[str, Any], plan: Plan, charter: Charter, today: str) -> None:
    """Checks the Auditor's signature of a ``settlement.json``: its sites, shares, errors and gain, for this plan and run.

    Raises:
        ProtocolError: bad_settlement, unknown_member, expired_key or bad_signature.
    """
    try:
        sites = tuple(sorted(told["sites"]))
        shares, errors = (np.array([float(told["sites"][s][k]) for s in sites]) for k in ("share", "error"))
        stated = told["auditor"]
        message = Settlement(
            AUDITOR,
            sites,
            dict(told["excluded"]),
            shares,
            errors,
            float(told["held_out_gain"]),
            stated["request_sha256"],
            blob(b""),
        )
        signature = bytes.fromhex(stated["signature"])
        run = str(told["run"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ProtocolError("bad_settlement", "a settlement lacks a field, or has a wrong one") from None
    if [list(g) for g in told.get("one_player", [])] != _shared(charter, sites):
        raise ProtocolError("bad_settlement", "other sites are taken as one player than have one organisation in the charter")
    charter.verify(AUDITOR, signature, _settled_text(plan, run, message), today)


def _shared(charter: Charter, sites: Sequence[str]) -> list[list[str]]:
    """Returns the players of more than one site, for ``settlement.json``."""
    return [list(group) for group in players(charter, sites) if len(group) > 1]


def _told(
    plan: Plan,
    answer: Settlement,
    run: str,
    model_sha256: str,
    charter: Charter,
    missing: Mapping[str, str],
    rows: Mapping[str, int],
) -> dict[str, Any]:
    spec, shares = plan.settings.contribution, [float(v) for v in answer.shares]
    owners = _shared(charter, answer.sites)
    errors = [float(e) for e in answer.errors]
    given = contribution.credited(shares, errors, CREDITS, [[answer.sites.index(s) for s in g] for g in owners])
    return {
        "schema": "fedmat/settlement/1",
        "plan_sha256": plan.sha256,
        "model_sha256": model_sha256,
        "run": run,
        "sites": {s: {"share": v, "error": float(e), "credits": c}
                  for s, v, e, c in zip(answer.sites, shares, answer.errors, given, strict=True)},
        "excluded": answer.excluded,
        "missing": dict(missing),
        **({"one_player": owners} if owners else {}),
        "held_out_gain": float(answer.held_out_gain),
        "epsilon": spec.settle_epsilon,
        "delta": spec.settle_delta,
        "dims": spec.settle_dims,
        "ridge": penalty(plan, len(shares), [sum(rows[s] for s in group) for group in players(charter, answer.sites)]),
        "auditor": {
            "request_sha256": answer.request_sha256,
            "charter_sha256": charter.sha256,
            "signature": answer.signature.tobytes().hex(),
        },
    }  # fmt: skip


def _first_day(kept: Path, model_sha256: str, run: str, today: str) -> str:
    """Returns the date of the first try: on another date it would be another request, which sites refuse."""
    path, about = kept / _ASKED, {"model_sha256": model_sha256, "run": run}
    if path.exists() and (known := files.read_json(path)) == about | {"today": known.get("today")}:
        return str(known["today"])
    files.write_json(path, about | {"today": today})
    return today


def _why(answer: object) -> str:
    return f"{answer.reason}: {answer.detail}" if isinstance(answer, Dropout | Rejection) else "the answer is another party's"


def _listed(missing: Mapping[str, str]) -> str:
    return "; ".join(f"{site}: {why}" for site, why in sorted(missing.items())) or "all answered"


# --- bytes ---------------------------------------------------------------------------------------------------------


def _context(charter: Charter, site: str, plan_sha256: str, run: str, model_sha256: str) -> bytes:
    return b"fedmat/settlement/moments/v1|" + files.canonical_json([charter.sha256, plan_sha256, run, site, model_sha256])


def _sealed_text(context: bytes, sealed: bytes) -> bytes:
    return b"fedmat/settlement/sealed/v1|" + files.sha256(sealed).encode() + b"|" + context


def _settled_text(plan: Plan, run: str, message: Settlement) -> bytes:
    """What the Auditor signs; ``request_sha256`` fixes model, charter, rows and every site's sealed moments."""
    body = wire.encode(dataclasses.replace(message, signature=blob(b"")))
    return b"fedmat/settlement/shares/v1|" + files.canonical_json([plan.sha256, run]) + files.sha256(body).encode()


def _bytes(m: Moments) -> bytes:
    """Fixed length, whatever the numbers are."""
    return np.concatenate([[m.n], m.features.reshape(-1), m.products, [m.square]]).astype("<f8").tobytes()


def _moments(data: bytes, p: int, site: str) -> Moments:
    numbers = np.frombuffer(data, dtype="<f8").astype(np.float64)
    n = float(numbers[0])
    if not (0 <= n < 2**53 and n.is_integer()):
        raise ProtocolError("bad_moments", f"the moments of {site} name no number of rows")
    try:
        return Moments(int(n), numbers[1 : 1 + p * p].reshape(p, p), numbers[1 + p * p : -1], float(numbers[-1]))
    except WireError as error:
        raise ProtocolError("bad_moments", f"those of {site}: {error.what}") from None
