"""What travels in an encrypted round: the header everyone binds to, and what sites and roles send each other.

Knows: what each message holds. Refuses to know: how a message is made or checked (``fedmat.transport``), and keys.
Three roles combine the sites' updates without any of them seeing one (docs/threat-model.md): Aggregator, Auditor, Notary.
A role's message names its ``role`` and ends in an Ed25519 ``signature`` over everything before it.

Reference:
    docs/adr/0007: how this differs from the protocol it started from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Blob = NDArray[np.uint8]
RoleName = Literal["aggregator", "auditor", "notary"]
ROLES: tuple[RoleName, ...] = ("aggregator", "auditor", "notary")

# Floors that plans, roles and sites each enforce for themselves; nobody's word about them counts.
FEWEST_SITES = 5  # fewer members read each other from an opened sum, whatever protects it on the way
MOST_OVER_MEAN = 4  # a site's weight, in mean weights of those that count: else "a sum" is one site's update
MOST_WEIGHT = 1 << 15  # of all weights together: what a sum of ring elements has room for


def no_bytes() -> Blob:
    """Returns an empty blob."""
    return np.zeros(0, dtype=np.uint8)


@dataclass(frozen=True)
class Header:
    """What one exchange is about; its digest goes into every pad, seal and signature of the exchange.

    Attributes:
        run: random name of the run, so that nothing can be replayed into another.
        round: training round (0-based). ``exchange`` counts tries: a round that had to stop before anything was opened, and
            a round whose members declared it a canary, go on in the next exchange. Exchanges never repeat in a run.
        model_sha256: the weights the updates start from.
        charter_sha256: the charter with everyone's keys.
        length, bits: number of ring elements of an update (k), and bits of one (32 or 64).
        hostile, minimum: f, and the least number of sites in an opened sum.
        clip: updates are clipped to this Euclidean norm before they are quantised.
        weights: the integer weight of every site that may submit, from what it attested.
        map_sha256: digest of the public map whose scores are opened too; "" for none.
        today: ISO date of the exchange (UTC); keys that ended before it do not count.
    """

    plan_sha256: str
    run: str
    round: int
    exchange: int
    model_sha256: str
    charter_sha256: str
    length: int
    bits: int
    hostile: int
    minimum: int
    clip: float
    weights: dict[str, int]
    map_sha256: str
    today: str


@dataclass(frozen=True)
class Submission:
    """A site's protected update.

    Attributes:
        masked: the update minus two pads, ``length`` ring elements as little-endian bytes; empty on its way to the Notary.
        envelope: fixed layout (``fedmat.transport.trigram.roles``): payload digest, seed commitments, seals, signature.
    """

    site: str
    masked: Blob
    envelope: Blob


@dataclass(frozen=True)
class PublicMap:
    """A linear map of updates that everyone may know: the reference set's gradient or Jacobian.

    Attributes:
        rows, columns: m and t.
        matrix: ``rows x length`` signed 32-bit integers as little-endian bytes; row-major.
        targets: ``rows x columns`` signed 32-bit integers. Column 0: the residuals that the mapped updates are to explain, so
            that its product with a mapped update is the gain that update promises to first order.
        scale: real mapped value of an update = integer * scale * clip / ring bound.
        target_scale: what one unit of ``targets`` is worth.
    """

    rows: int
    columns: int
    matrix: Blob
    targets: Blob
    scale: float
    target_scale: float


# --- what roles are asked, in this order -------------------------------------------------------------------------


@dataclass(frozen=True)
class HeaderRequest:
    """Asks a role whether it will take part in this exchange.

    Attributes:
        canaries: votes of the round's last exchange, where that was a canary: why the round may be tried again.
    """

    plan_sha256: str
    header: Header
    canaries: tuple[AuditVote, ...] = ()


@dataclass(frozen=True)
class HeaderSignature:
    """A role's consent to a header: it opened nothing in this round before."""

    role: RoleName
    signature: Blob


@dataclass(frozen=True)
class DepositRequest:
    """Brings a role the submissions; the Notary gets no masked update."""

    plan_sha256: str
    header: Header
    submissions: tuple[Submission, ...]


@dataclass(frozen=True)
class Deposit:
    """Which submissions a role holds, and why not the others.

    Attributes:
        envelopes: SHA-256 of each accepted site's envelope, 32 bytes each: roles that hold different ones must find out.
        refused: site -> reason code and detail.
        seed: sealed to the next role in ``ROLES`` (the last one's next is the first): their common seed of this exchange.
    """

    role: RoleName
    accepted: tuple[str, ...]
    envelopes: Blob
    refused: dict[str, str]
    seed: Blob
    signature: Blob


@dataclass(frozen=True)
class CommitRequest:
    """Brings a role what all three hold, and the public map where the header names one."""

    plan_sha256: str
    header: Header
    deposits: tuple[Deposit, ...]
    public_map: PublicMap | None = None


@dataclass(frozen=True)
class Commitment:
    """Digest of a role's share, given before any share is shown."""

    role: RoleName
    digest: Blob
    signature: Blob


@dataclass(frozen=True)
class ShareRequest:
    """Brings a role all three commitments."""

    plan_sha256: str
    header: Header
    commitments: tuple[Commitment, ...]


@dataclass(frozen=True)
class Share:
    """A role's share of what is opened about the updates: alone, random numbers.

    Attributes:
        gram: ``n x n`` ring elements, n sites in the order of the alphabet.
        mapped: of a public map: ``n x n`` elements of the mapped updates' Gram matrix, then ``n x columns`` products with its
            targets; empty without a map.
        coin: half of a coin toss of all three, for projections nobody could foresee.
        nonce: opens the commitment.
    """

    role: RoleName
    gram: Blob
    mapped: Blob
    coin: Blob
    nonce: Blob
    signature: Blob


@dataclass(frozen=True)
class OpenRequest:
    """Brings a role all three shares: it works out the Gram matrix and the weights for itself."""

    plan_sha256: str
    header: Header
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class Opening:
    """A role's part of the one sum that is opened in a round; written down at the role before it is sent.

    Attributes:
        sites: whose updates the Gram matrix is of, after malformed ones were left out.
        weights: integer weight of each of them in the sum.
        excluded: site -> why it was left out or has weight 0.
        part: the Aggregator's and the Auditor's addend, ``length`` ring elements; the Notary's is empty.
        checks: digests that let the other roles check a part: 32 bytes each, layout by role (``roles``).
    """

    role: RoleName
    sites: tuple[str, ...]
    weights: tuple[int, ...]
    excluded: dict[str, str]
    part: Blob
    checks: Blob
    signature: Blob


@dataclass(frozen=True)
class ConfirmRequest:
    """Brings a role the other roles' openings; the Notary gets digests in place of parts."""

    plan_sha256: str
    header: Header
    openings: tuple[Opening, ...]


@dataclass(frozen=True)
class Confirmation:
    """A role found the sum right, or says what is wrong with it.

    Attributes:
        sum_sha256: of the opened sum's bytes; "" from the Notary.
        trouble: "" or a reason code and detail.
        rows: 32-byte salted digests of what was opened about each site, for its self-audit.
        signature: of the header, the sum's digest and the weights: what a ledger keeps.
    """

    role: RoleName
    sum_sha256: str
    trouble: str
    rows: Blob
    signature: Blob


@dataclass(frozen=True)
class BlameRequest:
    """Asks for random projections of every update, after the opened sum contradicted the Gram matrix."""

    plan_sha256: str
    header: Header
    confirmations: tuple[Confirmation, ...]


@dataclass(frozen=True)
class Projections:
    """Random projections (at most 256) of the two parts of every selected update that a role holds.

    Every part is held by two roles, so a role that reports it falsely is contradicted and no site is blamed for it.
    """

    role: RoleName
    values: Blob
    signature: Blob


# --- what sites are asked after a round --------------------------------------------------------------------------


@dataclass(frozen=True)
class AuditRequest:
    """Brings a site the opened sum and what the roles opened about its own update, for it to check.

    Attributes:
        sites, weights: as in :class:`Opening`.
        total: the opened sum's bytes, ``length`` ring elements.
        own_square, own_product: of the asked site: its update's squared norm, and its product with the sum; decimal integers.
        reason: why the site's update has weight 0; "" where it has not.
        salt: makes the digest of the site's row in the confirmations, so that the roles vouch for the two numbers.
        confirmations: the roles' signatures of the sum.
    """

    plan_sha256: str
    header: Header
    sites: tuple[str, ...]
    weights: tuple[int, ...]
    total: Blob
    own_square: str
    own_product: str
    reason: str
    salt: Blob
    confirmations: tuple[Confirmation, ...]


@dataclass(frozen=True)
class AuditVote:
    """A site's signed finding: whether what was opened about its update is true.

    Attributes:
        canary: 32-byte seed that made the site's vector, where this exchange was a canary; else empty.
    """

    site: str
    header_sha256: str
    agrees: bool
    detail: str = ""
    canary: Blob = field(default_factory=no_bytes)
    signature: Blob = field(default_factory=no_bytes)


# --- sums only: pairwise masks (Bonawitz et al., CCS 2017) and CKKS ------------------------------------------------


@dataclass(frozen=True)
class MaskKeysRequest:
    """Asks a site for this exchange's public mask key."""

    plan_sha256: str
    header: Header


@dataclass(frozen=True)
class MaskKeys:
    """A site's two public X25519 keys of one exchange, signed with its lasting key.

    Attributes:
        cipher: others seal its shares to this one. mask: pairwise masks come from this one.
        commitment: 32-byte digest of the secret of its self mask, so that a false share of it is noticed.
    """

    site: str
    cipher: Blob
    mask: Blob
    commitment: Blob
    signature: Blob


@dataclass(frozen=True)
class MaskSharesRequest:
    """Brings a site everyone's keys; asks for shares of its two secrets."""

    plan_sha256: str
    header: Header
    keys: tuple[MaskKeys, ...]


@dataclass(frozen=True)
class MaskShares:
    """One sealed share of both secrets for every other site."""

    site: str
    sealed: dict[str, Blob]


@dataclass(frozen=True)
class MaskedSumRequest:
    """Brings a site the shares it keeps for others; asks for its masked update. Travels inside a TrainRequest."""

    plan_sha256: str
    header: Header
    shares: dict[str, Blob]


@dataclass(frozen=True)
class Masked:
    """A site's masked update: ``length`` ring elements."""

    site: str
    values: Blob
    signature: Blob


@dataclass(frozen=True)
class ArrivedRequest:
    """Tells an arrived site whose masked updates arrived and whose did not; asks it to sign that, once per exchange."""

    plan_sha256: str
    header: Header
    arrived: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class ArrivedSignature:
    """A site's word that it heard of these ``arrived`` and ``dropped`` sites, and will hear of no others."""

    site: str
    signature: Blob


@dataclass(frozen=True)
class UnmaskRequest:
    """Asks a site for shares: of the self masks of ``arrived`` sites, and of the mask keys of ``dropped`` ones.

    Attributes:
        signatures: by site, of at least ``threshold`` sites that heard of the same two sets.
    """

    plan_sha256: str
    header: Header
    arrived: tuple[str, ...]
    dropped: tuple[str, ...]
    signatures: dict[str, Blob]


@dataclass(frozen=True)
class Unmasked:
    """Shares a site kept for others: for each, of exactly one of its two secrets."""

    site: str
    shares: dict[str, Blob]


@dataclass(frozen=True)
class Ciphertexts:
    """A site's update under the key holder's CKKS key.

    Attributes:
        parts: ciphertext i encrypts coordinates ``i * slots`` and following.
    """

    site: str
    parts: tuple[Blob, ...]
    signature: Blob


@dataclass(frozen=True)
class KeyHolderRequest:
    """Asks the key holder for the public CKKS context of a run."""

    plan_sha256: str
    run: str


@dataclass(frozen=True)
class KeyHolderContext:
    """The public context: encrypts and adds, decrypts nothing."""

    context: Blob


@dataclass(frozen=True)
class WitnessRequest:
    """Brings a site everyone's ciphertexts, which it cannot read: it adds them up itself and signs the sum it found."""

    plan_sha256: str
    header: Header
    submissions: tuple[Ciphertexts, ...]


@dataclass(frozen=True)
class SumWitness:
    """A site's signature of the digest of the encrypted sum of these sites."""

    site: str
    sites: tuple[str, ...]
    signature: Blob


@dataclass(frozen=True)
class DecryptRequest:
    """Asks the key holder for the one sum of a round.

    Attributes:
        witnesses: of more sites than the header calls hostile; without them the key holder could not tell a sum from one
            site's update.
    """

    plan_sha256: str
    header: Header
    sites: tuple[str, ...]
    parts: tuple[Blob, ...]
    witnesses: tuple[SumWitness, ...]


# --- settlement, once per release -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SealedMoments:
    """A site's noisy second moments of its training and its validation rows, readable by the Auditor alone.

    Attributes:
        sealed: bound to charter, plan, run, site and model; of a length that tells nothing.
    """

    site: str
    sealed: Blob
    signature: Blob


@dataclass(frozen=True)
class SettleRequest:
    """Brings the Auditor the sites' sealed moments and asks for their shares; answered once per model.

    Attributes:
        today: ISO date on which keys have to count.
        rows: labelled training rows each site attested: none may state moments of more.
        parts: in the order of the alphabet.
    """

    plan_sha256: str
    run: str
    model_sha256: str
    charter_sha256: str
    today: str
    rows: dict[str, int]
    parts: tuple[SealedMoments, ...]


@dataclass(frozen=True)
class Settlement:
    """Who contributed how much to a release, as the Auditor found and signed it.

    Attributes:
        excluded: site -> why its moments were left out, reason code and detail.
        shares, errors: shape ``n``, in the order of ``sites``: share of ``held_out_gain`` and its standard error.
        held_out_gain: by how much the mean squared error falls that the last layer of all sites together makes on held-out rows.
        request_sha256: digest of the request.
    """

    role: RoleName
    sites: tuple[str, ...]
    excluded: dict[str, str]
    shares: NDArray[np.float64]
    errors: NDArray[np.float64]
    held_out_gain: float
    request_sha256: str
    signature: Blob


@dataclass(frozen=True)
class Decrypted:
    """The opened sum, ``length`` float64 numbers as bytes."""

    values: Blob
