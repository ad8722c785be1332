"""The courier of an encrypted round: carries messages between sites and roles, and decides nothing.

What it cannot be trusted with: it sees every masked update, the opened inner products and the sum, and it can drop or
delay any message. So it must never learn the Notary's seeds: the two together read every update, and whoever runs the
coordinator may run the Aggregator or the Auditor, but not the Notary. All it could gain by altering, swapping or inventing
messages is that a role refuses them: roles and sites check every signature themselves. Nothing here is random; the same
replies lead to the same requests, so a coordinator that was stopped goes on by playing recorded replies.

Refuses to know: keys, updates, rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from fedmat.domain import Dropout
from fedmat.envelopes import (
    ROLES,
    AuditRequest,
    AuditVote,
    BlameRequest,
    Commitment,
    CommitRequest,
    Confirmation,
    ConfirmRequest,
    Deposit,
    DepositRequest,
    Header,
    HeaderRequest,
    HeaderSignature,
    Opening,
    OpenRequest,
    Projections,
    PublicMap,
    RoleName,
    Share,
    ShareRequest,
    Submission,
    no_bytes,
)
from fedmat.errors import ProtocolError
from fedmat.keys import Charter
from fedmat.transport.trigram import messages, shares
from fedmat.transport.trigram.ring import Ring, blob
from fedmat.transport.trigram.roles import agreed, is_wrapped, joined_projections, open_values

Send = Callable[[Mapping[str, object]], Mapping[str, object]]
R = TypeVar("R")
_STEP: dict[type, str] = {
    HeaderSignature: "header",
    Deposit: "deposit",
    Commitment: "commit",
    Share: "share",
    Opening: "open",
    Confirmation: "confirm",
    Projections: "blame",
}


class ExchangeFailed(ProtocolError):
    """An exchange ended without a sum that all roles confirm.

    Attributes:
        reason: role_failed (nothing was opened by the role that is named), roles_disagree, or wrapped.
        role, step: who did not answer well, and what: header, deposit, commit, share, open, confirm or blame.
        detail: what that role said, or why its answer does not count.
        opened: whether a part of the sum may have been given out, so that the round cannot be tried again.
        guilty: sites whose updates were out of range; nobody where a role must have lied.
    """

    def __init__(
        self,
        reason: str,
        what: str,
        *,
        fix: str = "",
        role: str = "",
        step: str = "",
        detail: str = "",
        opened: bool = False,
        guilty: Sequence[str] = (),
    ) -> None:
        super().__init__(reason, what, fix=fix)
        self.role, self.step, self.detail, self.opened, self.guilty = role, step, detail, opened, tuple(guilty)

    def __reduce__(self) -> tuple[object, ...]:
        about = {k: getattr(self, k) for k in ("fix", "role", "step", "detail", "opened", "guilty")}
        return (_rebuild, (self.reason, self.what.removeprefix(f"{self.reason}: "), about))


def _rebuild(reason: str, what: str, about: dict[str, Any]) -> ExchangeFailed:
    return ExchangeFailed(reason, what, **about)


@dataclass(frozen=True)
class Combined:
    """The result of an exchange that all roles confirmed.

    Attributes:
        sites, weights: whose updates the Gram matrix is of, and what each counted for.
        gram, mapped_gram: exact inner products, ``n x n``; of the public map's images, or None without one.
        scores: ``n x columns`` products of the images with the map's targets, or None.
        excluded: site -> why its update was left out or counted less.
        refused: site -> why its submission is not held by all three roles.
        total: the opened sum, ``length`` ring elements as bytes.
        rows: what every site may check about itself, also those left out as malformed.
    """

    sites: tuple[str, ...]
    weights: tuple[int, ...]
    gram: tuple[tuple[int, ...], ...]
    mapped_gram: tuple[tuple[int, ...], ...] | None
    scores: tuple[tuple[int, ...], ...] | None
    excluded: dict[str, str]
    refused: dict[str, str]
    total: bytes
    rows: tuple[shares.OwnRow, ...]
    confirmations: tuple[Confirmation, ...]


class Exchange:
    """Carries one exchange after another.

    Args:
        charter: to tell whether a reply or a vote is its sender's.
        send: party -> request, at once to all; gives party -> reply, or a Dropout.
    """

    def __init__(self, charter: Charter, send: Send) -> None:
        self._charter, self._send = charter, send

    def announce(self, header: Header, canaries: Sequence[AuditVote] = ()) -> tuple[HeaderSignature, ...]:
        """Returns the three roles' consent to a header; sites send nothing without it.

        Args:
            canaries: all votes of the round's last exchange, where that was a canary.

        Raises:
            ExchangeFailed: role_failed.
        """
        request = HeaderRequest(header.plan_sha256, header, tuple(canaries))
        replies = self._ask(header, dict.fromkeys(ROLES, request), HeaderSignature, messages.header_digest(header))
        return tuple(replies[r] for r in ROLES)

    def combine(self, header: Header, submissions: Mapping[str, Submission], public_map: PublicMap | None = None) -> Combined:
        """Returns the sum that the three roles open of these submissions, and all that they open beside it.

        Raises:
            ExchangeFailed: role_failed (with the role and the step), roles_disagree, wrapped (with the guilty sites).
        """
        plan, ring, digest = header.plan_sha256, Ring(header.bits), messages.header_digest(header)
        refused = {s: "wrong_site: a submission in another site's name" for s, m in submissions.items() if m.site != s}
        sent = tuple(submissions[s] for s in sorted(submissions) if s not in refused)
        light = tuple(replace(s, masked=no_bytes()) for s in sent)
        requests: dict[RoleName, Any] = {r: DepositRequest(plan, header, light if r == "notary" else sent) for r in ROLES}
        deposits = self._ask(header, requests, Deposit, digest)
        envelopes = self._held(deposits, refused, [s.site for s in sent])
        held, binding = tuple(envelopes), messages.held_digest(digest, envelopes, header.map_sha256)
        asked: Any = CommitRequest(plan, header, _in_order(deposits), public_map)
        commitments = self._ask(header, dict.fromkeys(ROLES, asked), Commitment, binding)
        binding = messages.committed_digest(binding, commitments)
        asked = ShareRequest(plan, header, _in_order(commitments))
        given = self._ask(header, dict.fromkeys(ROLES, asked), Share, binding)
        columns = public_map.columns if public_map else 0
        try:
            values, coin = open_values(ring, held, given, columns)
        except ProtocolError as error:
            raise ExchangeFailed("roles_disagree", "the shares do not fit together", step="share", detail=error.what) from None
        asked = OpenRequest(plan, header, _in_order(given))
        openings = self._ask(header, dict.fromkeys(ROLES, asked), Opening, binding)
        first = openings["aggregator"]
        if any((o.sites, o.weights, o.excluded) != (first.sites, first.weights, first.excluded) for o in openings.values()):
            raise ExchangeFailed("roles_disagree", "the roles chose other weights", step="open", opened=True)
        if not set(first.sites) <= set(held) or len(first.sites) != len(first.weights):
            raise ExchangeFailed("roles_disagree", "the roles summed other sites than they hold", step="open", opened=True)
        result = messages.confirmation_binding(digest, first.sites, first.weights)
        asked_last = {r: ConfirmRequest(plan, header, _seen_by(r, openings)) for r in ROLES}
        confirmations = self._ask(header, asked_last, Confirmation, result, opened=True)
        by_site = dict(zip(first.sites, first.weights, strict=True))
        rows = shares.own_rows(values, by_site, first.excluded, coin)
        leaves = b"".join(row.leaf(digest) for row in rows)
        total = self._total(ring, header, openings)
        self._check(header, confirmations, by_site, messages.sha256(total).hex(), leaves, binding)
        kept = values.of(first.sites)
        return Combined(
            sites=first.sites,
            weights=first.weights,
            gram=_frozen(kept.gram),
            mapped_gram=_frozen(kept.mapped_gram) if columns else None,
            scores=_frozen(kept.scores) if columns else None,
            excluded=dict(first.excluded),
            refused=refused,
            total=total.tobytes(),
            rows=rows,
            confirmations=_in_order(confirmations),
        )

    def audit(self, header: Header, combined: Combined) -> dict[str, AuditVote | Dropout]:
        """Asks every site whose inner products were opened whether they are true; a vote that is not its own does not count."""
        digest, total = messages.header_digest(header), blob(combined.total)
        requests = {
            row.site: AuditRequest(
                plan_sha256=header.plan_sha256,
                header=header,
                sites=combined.sites,
                weights=combined.weights,
                total=total,
                own_square=str(row.square),
                own_product=str(row.product),
                reason=row.reason,
                salt=blob(row.salt),
                confirmations=combined.confirmations,
            )
            for row in combined.rows
        }
        replies = self._send(requests)
        votes: dict[str, AuditVote | Dropout] = {}
        for site in sorted(requests):
            reply = replies.get(site, Dropout(site, "unreachable"))
            if not isinstance(reply, AuditVote | Dropout):
                reply = Dropout(site, "refused", "its answer to an audit is no vote")
            if isinstance(reply, AuditVote):
                try:
                    messages.verify_vote(self._charter, reply, header, digest)
                    if reply.site != site:
                        raise ProtocolError("wrong_site", "a vote in another site's name")
                except ProtocolError as error:
                    reply = Dropout(site, "refused", error.what)
            votes[site] = reply
        return votes

    # --- within ---------------------------------------------------------------------------------------------------

    def _ask(
        self, header: Header, requests: Mapping[RoleName, Any], kind: type[R], binding: bytes, opened: bool = False
    ) -> dict[RoleName, R]:
        """Returns the roles' replies; signatures are checked here too, so that the one at fault is named and no other."""
        step = _STEP[kind]
        replies = self._send({str(r): q for r, q in requests.items()})
        answers: dict[RoleName, R] = {}
        for role in requests:
            reply = replies.get(role)
            detail = "no answer of the right kind"
            if isinstance(reply, kind) and getattr(reply, "role", None) == role:
                try:
                    messages.verify(self._charter, reply, role, binding, header.today)
                    answers[role] = reply
                    continue
                except ProtocolError as error:
                    detail = error.what
            elif isinstance(reply, Dropout):
                detail = f"{reply.reason}: {reply.detail}"
            # A role that refused opened nothing; one that is silent may have, and asked the same again it says the same.
            silent = any(not (isinstance(r, Dropout) and r.reason == "refused") for r in replies.values())
            raise ExchangeFailed(
                "role_failed",
                f"the {role} did not answer {step} ({detail})",
                role=role,
                step=step,
                detail=detail,
                opened=opened or (step == "open" and silent),
            )
        return answers

    def _held(self, deposits: Mapping[RoleName, Deposit], refused: dict[str, str], sent: Sequence[str]) -> dict[str, bytes]:
        for role in ROLES:
            for site, why in deposits[role].refused.items():
                refused.setdefault(site, f"{role}: {why}")
        try:
            held = agreed(deposits)
        except ProtocolError as error:
            raise ExchangeFailed(
                "roles_disagree", "the deposits do not fit together", step="deposit", detail=error.what
            ) from None
        for site in sent:
            if site not in held:
                refused.setdefault(site, "roles_disagree: the roles hold different submissions")
        return held

    def _total(self, ring: Ring, header: Header, openings: Mapping[RoleName, Opening]) -> Any:
        try:
            parts = [ring.unpack(openings[r].part, header.length, f"the part of the {r}") for r in ("aggregator", "auditor")]
        except ProtocolError:
            return np.zeros(0, ring.dtype)  # no confirmation will match it
        return parts[0] + parts[1]

    def _check(
        self,
        header: Header,
        confirmations: Mapping[RoleName, Confirmation],
        by_site: Mapping[str, int],
        total: str,
        leaves: bytes,
        binding: bytes,
    ) -> None:
        """Raises unless all roles confirm this sum; where it wrapped, finds out whose update did it."""
        if all(is_wrapped(confirmations[r].trouble) for r in ("aggregator", "auditor")):
            self._blame(header, confirmations, by_site, binding)
        troubles = {r: confirmations[r].trouble for r in ROLES if confirmations[r].trouble}
        if troubles:
            detail = "; ".join(f"{r}: {t}" for r, t in troubles.items())
            raise ExchangeFailed("roles_disagree", f"not confirmed ({detail})", step="confirm", detail=detail, opened=True)
        signed = {confirmations[r].sum_sha256 for r in ("aggregator", "auditor")}
        if signed != {total} or any(c.rows.tobytes() != leaves for c in confirmations.values()):
            raise ExchangeFailed("roles_disagree", "the roles confirmed something else", step="confirm", opened=True)

    def _blame(
        self, header: Header, confirmations: Mapping[RoleName, Confirmation], by_site: Mapping[str, int], binding: bytes
    ) -> None:
        request = BlameRequest(header.plan_sha256, header, _in_order(confirmations))
        given = self._ask(header, dict.fromkeys(ROLES, request), Projections, binding, opened=True)
        ring, selected = Ring(header.bits), [s for s, w in by_site.items() if w]
        try:
            found = joined_projections(ring, header.length, len(selected), given)
        except ProtocolError as error:
            raise ExchangeFailed(
                "roles_disagree", "the roles contradict each other", step="blame", detail=error.what, opened=True
            ) from None
        guilty = shares.guilty(ring, selected, found)
        who = ", ".join(guilty) if guilty else "nobody: a role lied, or the updates are too short to tell"
        raise ExchangeFailed(
            "wrapped", f"the sum contradicts the inner products; out of range: {who}", step="blame", opened=True, guilty=guilty
        )


def _in_order(by_role: Mapping[RoleName, R]) -> tuple[R, ...]:
    return tuple(by_role[r] for r in ROLES)


def _seen_by(role: RoleName, openings: Mapping[RoleName, Opening]) -> tuple[Opening, ...]:
    others = tuple(openings[r] for r in ROLES if r != role)
    # The notary holds no masked updates and needs no sums: a digest is enough for it, and 32 bytes long.
    return tuple(replace(o, part=blob(messages.sha256(o.part))) for o in others) if role == "notary" else others


def _frozen(matrix: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, matrix))
