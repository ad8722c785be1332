"""Sums under pairwise masks: every site's update looks random, the masks cancel in the sum, lost sites are made up for.

Knows: one exchange of double masking with threshold recovery, as state machines without I/O: :class:`MaskingSite` at a
site, :class:`MaskingServer` at the coordinator. Refuses to know: models, how messages travel, files. A site persists
:meth:`MaskingSite.export` *before* it sends an answer; a site that is started again from older state could mask two
updates with one mask.

Who learns what. The coordinator: the sum, and who was there. A site: nothing but that. The coordinator together with fewer
than ``threshold`` sites: the sum of the other sites' updates. Both the list of keys and the set of sites that are summed
are signed by the sites, so that this holds for a coordinator that lies, as long as no more than ``hostile`` sites help
it. What no one can tell here is whether an update is a good one (docs/light-modes.md).

References:
    K. Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017 (protocol: figure 4;
    threshold against a lying coordinator: theorem 6.5). RFC 7748 (X25519),
    RFC 5869 (HKDF), NIST SP 800-38A and 800-38D (AES-CTR, AES-GCM).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache, partial
from typing import Annotated, Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field, TypeAdapter, ValidationError

from fedmat import files, wire
from fedmat.envelopes import (
    FEWEST_SITES,
    MOST_OVER_MEAN,
    ArrivedSignature,
    Blob,
    Header,
    Masked,
    MaskKeys,
    MaskShares,
    Unmasked,
)
from fedmat.errors import ProtocolError, StateError
from fedmat.keys import Charter, PartyKeys
from fedmat.transport.shamir import SHARE_BYTES, recover_checked, share_value, split
from fedmat.transport.trigram.ring import Pad, Ring, Words, blob, blocks, hashed

SEALED_BYTES = 2 * SHARE_BYTES + 16
MIN_MEMBERS = FEWEST_SITES
MAX_WEIGHT_OVER_MEAN = MOST_OVER_MEAN


# --- what both sides check ----------------------------------------------------------------------------------------


def check_header(header: Header, charter: Charter) -> bytes:
    """Returns the header's 32-byte digest, once the header is one that a sum may be made under.

    Raises:
        ProtocolError: wrong_charter, unknown_member, too_few, bad_header or bad_weights.
    """
    if header.charter_sha256 != charter.sha256:
        raise ProtocolError("wrong_charter", "the header names another charter", fix="give every party the same charter")
    strangers = sorted(set(header.weights) - set(charter.sites))
    if strangers:
        raise ProtocolError("unknown_member", f"{', '.join(strangers)}: in the header, and no site of the charter")
    n = len(header.weights)
    if n < MIN_MEMBERS:
        raise ProtocolError(
            "too_few", f"{n} members: a sum of so few shows too much of each; at least {MIN_MEMBERS} are needed"
        )
    ring = Ring(header.bits)
    if not (1 <= header.length < 2**40 and math.isfinite(header.clip) and header.clip > 0):
        raise ProtocolError("bad_header", "length and clip must be positive and finite")
    if not (0 <= header.round < 2**40 and 0 <= header.exchange < 2**40 and header.hostile >= 0):
        raise ProtocolError("bad_header", "round, exchange and hostile must not be negative")
    try:
        dated = date.fromisoformat(header.today).isoformat() == header.today
    except ValueError:
        dated = False
    if not (dated and 0 < len(header.run) <= 128):  # keys that ended would count on a day that is none
        raise ProtocolError("bad_header", "the header's date or run is none")
    if not 2 <= header.minimum <= n:
        raise ProtocolError("bad_header", f"a minimum of {header.minimum} sites among {n} members")
    weights = header.weights.values()
    if min(weights) < 1 or max(weights) * n > MAX_WEIGHT_OVER_MEAN * sum(weights):
        raise ProtocolError("bad_weights", f"weights must be at least 1, none above {MAX_WEIGHT_OVER_MEAN} times the mean")
    # No element of an update is above the bound, so that no sum leaves the signed half of the ring.
    if sum(weights) * ring.bound >= 1 << (header.bits - 1):
        raise ProtocolError("bad_weights", f"the weights sum to {sum(weights)}: too much for a ring of {header.bits} bits")
    return bytes.fromhex(wire.digest(header))


def check_threshold(header: Header, charter: Charter, threshold: int) -> None:
    """Checks that ``threshold`` keeps apart two groups of sites that a lying coordinator tells different things.

    Two sets of ``threshold`` out of n sites, in both of which the same ``hostile`` sites stand, share an honest site
    only if ``2 threshold > n + hostile``.

    Raises:
        ProtocolError: bad_threshold, lone_site or weaker_than_charter.
    """
    n, f = len(header.weights), header.hostile
    if not n + f < 2 * threshold <= 2 * n:
        raise ProtocolError(
            "bad_threshold",
            f"threshold {threshold} of {n} members, {f} of them hostile: it must be above {(n + f) / 2:g} and at most {n}",
            fix="raise plan.security.threshold, or lower the number of hostile sites",
        )
    if max(threshold, header.minimum) - f < 2:
        raise ProtocolError("lone_site", f"{f} hostile sites could see the update of a single other site in a sum")
    if charter.kem != "x25519":
        raise ProtocolError(
            "weaker_than_charter",
            f"the charter asks for {charter.kem}; masks come from X25519, which a later quantum computer would break",
            fix="security.mode: trigram, or a charter with kem x25519",
        )


def _bound(tag: str, header: bytes, *parts: bytes) -> bytes:
    """Returns bytes that are equal only for the same purpose, header and parts."""
    return hashed(f"fedmat/masking/{tag}/v1", header, *parts)


def _sets(header: bytes, arrived: Sequence[str], dropped: Sequence[str]) -> bytes:
    return _bound("arrived", header, files.canonical_json([list(arrived), list(dropped)]))


def _commitment(header: bytes, site: str, seed: bytes) -> bytes:
    return _bound("commitment", header, site.encode(), seed)


def _keys_text(header: bytes, site: str, cipher: bytes, mask: bytes, commitment: bytes) -> bytes:
    return _bound("keys", header, site.encode(), cipher, mask, commitment)


def _masked_text(header: bytes, site: str, values: bytes) -> bytes:
    return _bound("masked", header, site.encode(), hashlib.sha256(values).digest())


def raw(blob: Any, size: int | None, what: str) -> bytes:
    """Returns a blob's bytes.

    Raises:
        ProtocolError: malformed, where it is not ``size`` bytes in one dimension.
    """
    if not (isinstance(blob, np.ndarray) and blob.dtype == np.uint8 and blob.ndim == 1):
        raise ProtocolError("malformed", f"{what}: expected a row of bytes")
    if size is not None and blob.size != size:
        raise ProtocolError("wrong_length", f"{what}: {blob.size} bytes, expected {size}")
    return blob.tobytes()


def _verified(header: Header, digest: bytes, charter: Charter, message: MaskKeys) -> tuple[bytes, bytes, bytes]:
    who = f"keys of {message.site}"
    cipher, mask, commitment = (raw(b, 32, who) for b in (message.cipher, message.mask, message.commitment))
    if message.site not in header.weights:
        raise ProtocolError("unknown_member", f"{message.site} has no weight in this header")
    text = _keys_text(digest, message.site, cipher, mask, commitment)
    charter.verify(message.site, raw(message.signature, 64, who), text, header.today)
    return cipher, mask, commitment


def _agree(private: bytes, public: bytes, other: str) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # a point of small order: the secret would be known to everyone
        raise ProtocolError("bad_key", f"{other} published a key that gives no secret") from None


def _public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _derive(secret: bytes, info: bytes, size: int = 32) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=size, salt=None, info=info).derive(secret)


# --- masks ------------------------------------------------------------------------------------------------------------


def _pad(words: Words, bits: int, secret: bytes, info: bytes, sign: int) -> None:
    """Adds (``sign`` 1) or subtracts (-1) the pad of a secret in place; one secret and info give one pad and no other."""
    # A secret of two X25519 keys is no uniform string, which is what a pad's seed has to be.
    pad = Pad(Ring(bits), _derive(secret, info), info)
    for part in blocks(len(words)):
        block = words[part]
        (np.add if sign > 0 else np.subtract)(block, pad.take(len(block)), out=block)


def _self_info(header: bytes, site: str) -> bytes:
    return _bound("self-mask", header, site.encode())


def _pair_info(header: bytes, one: str, other: str) -> bytes:
    return _bound("pair-mask", header, *(name.encode() for name in sorted((one, other))))


def _pair_sign(one: str, other: str) -> int:
    """The alphabetically first of two sites adds their common pad, the other subtracts it."""
    return 1 if one < other else -1


# --- a site -------------------------------------------------------------------------------------------------------------

_Hex32 = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


@dataclass(frozen=True)
class SiteState:
    """All a site keeps of its exchanges; holds secrets, hence for the site's own disk alone.

    Attributes:
        history: run -> last exchange begun, last round in which this site gave shares away (-1: none).
        header_sha256: the exchange under way; "" for none.
        cipher, mask, seed, shamir: its secrets, hex.
        roster: site -> cipher key, mask key and commitment, 96 bytes, hex.
        kept: site -> the two shares it gave this one, 66 bytes, hex.
        words_sha256: of the one update that was masked.
        arrived, dropped: the sets it signed.
    """

    site: str
    history: dict[str, tuple[int, int]] = field(default_factory=dict)
    header_sha256: _Hex32 = ""
    cipher: _Hex32 = field(default="", repr=False)
    mask: _Hex32 = field(default="", repr=False)
    seed: _Hex32 = field(default="", repr=False)
    shamir: _Hex32 = field(default="", repr=False)
    roster: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{192}$")]] = field(default_factory=dict)
    kept: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{132}$")]] = field(default_factory=dict, repr=False)
    words_sha256: _Hex32 = ""
    arrived: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """Returns the state as canonical JSON."""
        return files.canonical_json(_adapter().dump_python(self, mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes) -> SiteState:
        """Returns the state in ``data``.

        Raises:
            StateError: damaged.
        """
        try:
            found = json.loads(data)
            if not isinstance(found, dict) or found.keys() != cls.__dataclass_fields__.keys():
                raise ValueError
            state = _adapter().validate_json(data, strict=True)
            secrets = [bool(s) for s in (state.header_sha256, state.cipher, state.mask, state.seed, state.shamir)]
            if any(secrets) != all(secrets):
                raise ValueError
        except (ValueError, ValidationError, RecursionError):
            raise StateError(
                "the state of a masked exchange is damaged", fix="remove it; this site rejoins in the next round"
            ) from None
        return state


@cache
def _adapter() -> TypeAdapter[SiteState]:
    return TypeAdapter(SiteState)


class MaskingSite:
    """One site in masked exchanges.

    Each method answers one message and changes the state; the caller writes :meth:`export` to disk before it sends the
    answer. Asked the same again, a site answers the same; asked something else in the same exchange, it refuses.
    It cannot know the plan: the caller compares header and plan first.
    """

    def __init__(self, site: str, keys: PartyKeys, charter: Charter, threshold: int, state: SiteState | None = None) -> None:
        if keys.name != site or (state is not None and state.site != site):
            raise StateError(f"keys or state of another site than {site}", fix="name the folder of this site")
        self._site, self._keys, self._charter, self._threshold = site, keys, charter, threshold
        self._state = state or SiteState(site)

    @classmethod
    def restore(cls, data: bytes, keys: PartyKeys, charter: Charter, threshold: int) -> MaskingSite:
        """Returns a site as :meth:`export` left it.

        Raises:
            StateError: damaged, or of another site.
        """
        return cls(keys.name, keys, charter, threshold, SiteState.from_bytes(data))

    def export(self) -> bytes:
        """Returns the state, secrets included: for a file that its owner alone may read."""
        return self._state.to_bytes()

    def close(self) -> None:
        """Forgets the secrets of the last exchange; what must not happen twice stays known."""
        self._state = SiteState(self._site, self._state.history)

    def keys_for(self, header: Header) -> MaskKeys:
        """Returns fresh public keys for an exchange.

        Raises:
            ProtocolError: the header is refused (:func:`check_header`, :func:`check_threshold`), not_invited, replay (the
                exchange is over), or second_opening (a sum of this round may be open: train again first).
        """
        digest = self._checked(header)
        if self._state.header_sha256 != digest.hex():
            last, revealed = self._state.history.get(header.run, (-1, -1))
            if header.exchange <= last:
                raise ProtocolError("replay", f"exchange {header.exchange} of this run is over at {self._site}")
            if header.round <= revealed:
                raise ProtocolError(
                    "second_opening",
                    f"{self._site} helped to open a sum of round {header.round}; a second sum would show the difference",
                )
            history = self._state.history | {header.run: (header.exchange, revealed)}
            cipher, mask, seed, shamir = (os.urandom(32).hex() for _ in range(4))
            self._state = SiteState(self._site, history, digest.hex(), cipher, mask, seed, shamir)
        return self._own_keys(digest)

    def shares_for(self, header: Header, all_keys: Sequence[MaskKeys]) -> MaskShares:
        """Returns sealed shares of this site's two secrets, one for every other site in ``all_keys``.

        Raises:
            ProtocolError: out_of_order, unknown_member, bad_signature, expired_key, bad_key, duplicate, own_keys (the list
                holds other keys of this site than it gave), too_few, second_keys.
        """
        digest = self._current(header)
        roster: dict[str, str] = {}
        for message in all_keys:
            parts = _verified(header, digest, self._charter, message)
            if message.site in roster:
                raise ProtocolError("duplicate", f"{message.site} stands twice in the list of keys")
            roster[message.site] = b"".join(parts).hex()
        if roster.get(self._site) != _roster_entry(self._own_keys(digest)):
            raise ProtocolError("own_keys", f"the list of keys does not hold those of {self._site}")
        self._enough(header, len(roster), "published keys")
        if self._state.roster not in ({}, roster):
            raise ProtocolError("second_keys", f"{self._site} was given another list of keys in this exchange")
        mine = self._split(header)
        sealed: dict[str, Blob] = {}
        for other in sorted(set(roster) - {self._site}):
            seed, mask = mine[other]
            sealed[other] = blob(self._seal_to(roster, digest, other).encrypt(bytes(12), seed + mask, digest))
        self._state = replace(self._state, roster=roster)
        return MaskShares(self._site, sealed)

    def mask(self, header: Header, shares_for_me: Mapping[str, Blob], words: Words) -> Masked:
        """Returns this site's words, times its weight, under the pads of all who gave it shares.

        Args:
            shares_for_me: by sender, of the sites that will be in the sum or have to be made up for.
            words: encoded update, shape ``length``, unsigned, each within +- the ring's bound (``Ring.encode``).

        Raises:
            ProtocolError: out_of_order, wrong_ring, wrong_length, out_of_range, unknown_member, bad_seal, bad_share, too_few,
                second_shares, second_update (one mask would lie over two updates).
        """
        digest = self._current(header)
        if not self._state.roster:
            raise ProtocolError("out_of_order", f"{self._site} has given no shares in this exchange")
        own = self._words(header, words)
        kept: dict[str, str] = {}
        for other in sorted(shares_for_me):
            if other == self._site or other not in self._state.roster:
                raise ProtocolError("unknown_member", f"{other} has no keys in this exchange")
            kept[other] = self._open(digest, other, raw(shares_for_me[other], SEALED_BYTES, f"share of {other}")).hex()
        self._enough(header, len(kept) + 1, "gave shares")
        words_sha256 = files.sha256(own.tobytes())
        if self._state.words_sha256 and self._state.kept != kept:
            raise ProtocolError("second_shares", f"{self._site} was given other shares in this exchange")
        if self._state.words_sha256 not in ("", words_sha256):
            raise ProtocolError(
                "second_update", f"{self._site} has masked another update in this exchange: one mask, one update"
            )
        out = np.multiply(own, own.dtype.type(header.weights[self._site]), dtype=own.dtype)
        _pad(out, header.bits, bytes.fromhex(self._state.seed), _self_info(digest, self._site), 1)
        for other in kept:
            secret = _agree(bytes.fromhex(self._state.mask), self._published(other)[1], other)
            _pad(out, header.bits, secret, _pair_info(digest, self._site, other), _pair_sign(self._site, other))
        self._state = replace(self._state, kept=kept, words_sha256=words_sha256)
        values = out.tobytes()
        signature = self._keys.sign(_masked_text(digest, self._site, values))
        return Masked(self._site, blob(values), blob(signature))

    def confirm(self, header: Header, arrived: Sequence[str], dropped: Sequence[str]) -> ArrivedSignature:
        """Returns this site's signature of who arrived and who did not, once per exchange.

        Raises:
            ProtocolError: out_of_order, bad_sets, not_arrived, too_few, second_unmask.
        """
        digest = self._current(header)
        self._sets(header, arrived, dropped)
        self._state = replace(self._state, arrived=tuple(arrived), dropped=tuple(dropped))
        return ArrivedSignature(self._site, blob(self._keys.sign(_sets(digest, arrived, dropped))))

    def unmask(
        self, header: Header, arrived: Sequence[str], dropped: Sequence[str], signatures: Mapping[str, Blob]
    ) -> Unmasked:
        """Returns a share of one secret of each site: of the self mask of those that arrived, else of the mask key.

        Args:
            signatures: by site, of these two sets (:meth:`confirm`).

        Raises:
            ProtocolError: as :meth:`confirm`, and bad_signature, unknown_member, inconsistent (fewer than ``threshold`` sites
                heard of the same sets).
        """
        digest = self._current(header)
        self._sets(header, arrived, dropped)
        text = _sets(digest, arrived, dropped)
        for name, signature in signatures.items():
            if name not in arrived:
                raise ProtocolError("unknown_member", f"{name} signed and did not arrive")
            self._charter.verify(name, raw(signature, 64, f"signature of {name}"), text, header.today)
        if len(signatures) < self._threshold:
            raise ProtocolError(
                "inconsistent", f"{len(signatures)} sites heard of the same arrivals, {self._threshold} are needed"
            )
        history = self._state.history | {header.run: (header.exchange, header.round)}
        self._state = replace(self._state, arrived=tuple(arrived), dropped=tuple(dropped), history=history)
        shares = {self._site: blob(self._split(header)[self._site][0])}
        for other, both in self._state.kept.items():
            pair = bytes.fromhex(both)
            shares[other] = blob(pair[:SHARE_BYTES] if other in arrived else pair[SHARE_BYTES:])
        return Unmasked(self._site, shares)

    def _checked(self, header: Header) -> bytes:
        digest = check_header(header, self._charter)
        check_threshold(header, self._charter, self._threshold)
        if self._site not in header.weights:
            raise ProtocolError("not_invited", f"{self._site} has no weight in this header")
        return digest

    def _current(self, header: Header) -> bytes:
        digest = self._checked(header)
        if self._state.header_sha256 != digest.hex():
            raise ProtocolError("out_of_order", f"{self._site} is not in the exchange of this header")
        return digest

    def _own_keys(self, digest: bytes) -> MaskKeys:
        cipher, mask = _public(bytes.fromhex(self._state.cipher)), _public(bytes.fromhex(self._state.mask))
        commitment = _commitment(digest, self._site, bytes.fromhex(self._state.seed))
        signature = self._keys.sign(_keys_text(digest, self._site, cipher, mask, commitment))
        return MaskKeys(self._site, blob(cipher), blob(mask), blob(commitment), blob(signature))

    def _enough(self, header: Header, found: int, did: str) -> None:
        need = max(self._threshold, header.minimum)
        if found < need:
            raise ProtocolError("too_few", f"{found} sites {did}, {need} are needed")

    def _split(self, header: Header) -> dict[str, tuple[bytes, bytes]]:
        """Returns member -> share of the self mask's seed, share of the mask key; always the same in an exchange."""
        members, entropy = sorted(header.weights), bytes.fromhex(self._state.shamir)
        both = [
            split(bytes.fromhex(secret), self._threshold, len(members), _derive(entropy, purpose))
            for secret, purpose in ((self._state.seed, b"seed"), (self._state.mask, b"mask"))
        ]
        return dict(zip(members, zip(*both, strict=True), strict=True))

    def _published(self, other: str) -> tuple[bytes, bytes]:
        entry = bytes.fromhex(self._state.roster[other])
        return entry[:32], entry[32:64]

    def _seal_to(self, roster: Mapping[str, str], digest: bytes, other: str) -> AESGCM:
        return self._channel(bytes.fromhex(roster[other])[:32], digest, self._site, other, other)

    def _channel(self, public: bytes, digest: bytes, sender: str, receiver: str, other: str) -> AESGCM:
        """Returns the cipher of one direction of one pair in one exchange; it seals one message, hence a constant nonce."""
        secret = _agree(bytes.fromhex(self._state.cipher), public, other)
        return AESGCM(_derive(secret, _bound("channel", digest, sender.encode(), receiver.encode())))

    def _open(self, digest: bytes, other: str, sealed: bytes) -> bytes:
        try:
            pair = self._channel(self._published(other)[0], digest, other, self._site, other).decrypt(bytes(12), sealed, digest)
        except InvalidTag:
            raise ProtocolError("bad_seal", f"the shares {other} sent to {self._site} do not open") from None
        for share in (pair[:SHARE_BYTES], pair[SHARE_BYTES:]):
            share_value(share, f"a share of {other}")
        return pair

    def _words(self, header: Header, words: Words) -> Words:
        ring = Ring(header.bits)
        if not isinstance(words, np.ndarray) or words.dtype != ring.dtype:
            raise ProtocolError("wrong_ring", f"the update is not in a ring of {header.bits} bits")
        if words.shape != (header.length,):
            raise ProtocolError("wrong_length", f"the update has shape {words.shape}, the header says {header.length}")
        bound = ring.dtype.type(ring.bound)
        # +bound moves the allowed range to 0..2*bound, where unsigned numbers compare as they should.
        if np.any(words + bound > 2 * bound):
            raise ProtocolError("out_of_range", "an element of the update is larger than the ring's bound")
        return np.ascontiguousarray(words)

    def _sets(self, header: Header, arrived: Sequence[str], dropped: Sequence[str]) -> None:
        if not self._state.words_sha256:
            raise ProtocolError("out_of_order", f"{self._site} has masked nothing in this exchange")
        apart = not set(arrived) & set(dropped)
        ordered = all(list(names) == sorted(set(names)) for names in (arrived, dropped))
        # A site in both sets would have both its secrets revealed, and with them its update.
        if not (apart and ordered and {*arrived, *dropped} == {*self._state.kept, self._site}):
            raise ProtocolError("bad_sets", "arrived and dropped sites must be sorted, apart, and all who gave shares")
        if self._site not in arrived:
            raise ProtocolError("not_arrived", f"{self._site} is asked for shares although its update did not arrive")
        self._enough(header, len(arrived), "arrived")
        if self._state.arrived and (self._state.arrived, self._state.dropped) != (tuple(arrived), tuple(dropped)):
            raise ProtocolError(
                "second_unmask", f"{self._site} was told of other arrivals in this exchange; both would show single updates"
            )


def _roster_entry(keys: MaskKeys) -> str:
    return (keys.cipher.tobytes() + keys.mask.tobytes() + keys.commitment.tobytes()).hex()


# --- the coordinator --------------------------------------------------------------------------------------------------


class MaskingServer:
    """The coordinator's side of one exchange after another; one that is started again begins the next exchange.

    Attributes:
        refused: site -> reason code and detail of its message that did not count; others go on without it.
    """

    def __init__(self, charter: Charter, threshold: int) -> None:
        self._charter, self._threshold = charter, threshold
        self._reset()

    def _reset(self) -> None:
        self.refused: dict[str, str] = {}
        self._header: Header | None = None
        self._digest = b""
        self._keys: dict[str, tuple[bytes, bytes, bytes]] = {}
        self._routed: tuple[str, ...] = ()
        self._masked: dict[str, Words] = {}
        self._arrived: tuple[str, ...] = ()
        self._dropped: tuple[str, ...] = ()

    def check_keys(self, header: Header, keys: Sequence[MaskKeys]) -> tuple[MaskKeys, ...]:
        """Begins an exchange; returns the good key messages in site order, to be sent to all of these sites.

        Raises:
            ProtocolError: the header is refused, or too_few.
        """
        self._reset()
        self._digest = check_header(header, self._charter)
        check_threshold(header, self._charter, self._threshold)
        self._header = header
        good: dict[str, MaskKeys] = {}
        for message in keys:
            with self._others_failure(message.site):
                parts = _verified(header, self._digest, self._charter, message)
                if message.site in good:
                    raise ProtocolError("duplicate", f"{message.site} sent keys twice")
                good[message.site], self._keys[message.site] = message, parts
        self._enough(len(good), "published keys")
        return tuple(good[site] for site in sorted(good))

    def route(self, shares: Sequence[MaskShares]) -> dict[str, dict[str, Blob]]:
        """Returns recipient -> sender -> sealed shares, among the sites that gave all others a share.

        Raises:
            ProtocolError: out_of_order, too_few.
        """
        self._open_header(bool(self._keys) and not self._routed)
        good: dict[str, MaskShares] = {}
        for message in shares:
            with self._others_failure(message.site):
                if message.site not in self._keys:
                    raise ProtocolError("unknown_member", f"{message.site} published no keys")
                if message.site in good:
                    raise ProtocolError("duplicate", f"{message.site} sent shares twice")
                if set(message.sealed) != set(self._keys) - {message.site}:
                    raise ProtocolError("missing_shares", f"{message.site} must send each other site one share")
                for other, sealed in message.sealed.items():
                    raw(sealed, SEALED_BYTES, f"share of {message.site} for {other}")
                good[message.site] = message
        self._enough(len(good), "gave shares")
        self._routed = tuple(sorted(good))
        return {to: {by: good[by].sealed[to] for by in self._routed if by != to} for to in self._routed}

    def accept(self, masked: Masked) -> None:
        """Takes one site's masked update.

        Raises:
            ProtocolError: out_of_order, late, unknown_member, duplicate, wrong_length, malformed, bad_signature, expired_key.
        """
        header = self._open_header(bool(self._routed))
        site = masked.site
        if self._arrived:
            raise ProtocolError("late", f"the update of {site} came after the set of arrivals was closed")
        if site not in self._routed:
            raise ProtocolError("unknown_member", f"{site} gave no shares in this exchange")
        if site in self._masked:
            raise ProtocolError("duplicate", f"{site} sent a masked update twice")
        ring = Ring(header.bits)
        values = raw(masked.values, header.length * ring.size, f"masked update of {site}")
        signature = raw(masked.signature, 64, f"signature of {site}")
        self._charter.verify(site, signature, _masked_text(self._digest, site, values), header.today)
        self._masked[site] = np.frombuffer(values, dtype=ring.dtype)

    def need(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Closes the set of arrivals; returns (arrived, dropped): what arrived sites sign, then give shares for.

        Raises:
            ProtocolError: out_of_order, too_few.
        """
        self._open_header(bool(self._routed))
        self._enough(len(self._masked), "sent a masked update")
        self._arrived = tuple(s for s in self._routed if s in self._masked)
        self._dropped = tuple(s for s in self._routed if s not in self._masked)
        return self._arrived, self._dropped

    def consistent(self, signatures: Sequence[ArrivedSignature]) -> dict[str, Blob]:
        """Returns site -> signature of the set of arrivals: what a site wants to see before it gives shares away.

        Raises:
            ProtocolError: out_of_order, too_few.
        """
        header = self._open_header(bool(self._arrived))
        good: dict[str, Blob] = {}
        for message in signatures:
            with self._others_failure(message.site):
                if message.site not in self._arrived:
                    raise ProtocolError("unknown_member", f"{message.site} signed and did not arrive")
                text = _sets(self._digest, self._arrived, self._dropped)
                signature = raw(message.signature, 64, f"signature of {message.site}")
                self._charter.verify(message.site, signature, text, header.today)
                good[message.site] = message.signature
        self._enough(len(good), "signed who arrived", self._threshold)
        return good

    def total(self, unmasked: Sequence[Unmasked]) -> Words:
        """Returns the sum of the arrived sites' weighted words, shape ``length``, once enough shares are there.

        Raises:
            ProtocolError: out_of_order, too_few, bad_share (more false shares than can be got past).
        """
        header = self._open_header(bool(self._arrived))
        number = {site: x for x, site in enumerate(sorted(header.weights), start=1)}
        given: dict[str, dict[int, bytes]] = {site: {} for site in self._routed}
        helpers: set[str] = set()
        for message in unmasked:
            with self._others_failure(message.site):
                if message.site not in self._arrived:
                    raise ProtocolError("unknown_member", f"{message.site} sent shares and did not arrive")
                if message.site in helpers:
                    raise ProtocolError("duplicate", f"{message.site} sent shares twice")
                if set(message.shares) != set(self._routed):
                    raise ProtocolError("missing_shares", f"{message.site} must send one share for every site")
                mine = {s: raw(b, SHARE_BYTES, f"share of {message.site}") for s, b in message.shares.items()}
                for share in mine.values():
                    share_value(share, f"a share of {message.site}")
                helpers.add(message.site)
                for site, share in mine.items():
                    given[site][number[message.site]] = share
        self._enough(len(helpers), "gave shares to unmask", self._threshold)
        out = Ring(header.bits).zeros(header.length)
        for words in self._masked.values():
            np.add(out, words, out=out)
        for site in self._arrived:
            seed = recover_checked(given[site], self._threshold, partial(self._is_seed, site), site)
            _pad(out, header.bits, seed, _self_info(self._digest, site), -1)
        for site in self._dropped:
            private = recover_checked(given[site], self._threshold, partial(self._is_mask_key, site), site)
            for other in self._arrived:  # takes away what the arrived site put on for the one that dropped out
                secret = _agree(private, self._keys[other][1], other)
                _pad(out, header.bits, secret, _pair_info(self._digest, site, other), -_pair_sign(other, site))
        return out

    def _is_seed(self, site: str, secret: bytes) -> bool:
        return _commitment(self._digest, site, secret) == self._keys[site][2]

    def _is_mask_key(self, site: str, secret: bytes) -> bool:
        return _public(secret) == self._keys[site][1]

    def _open_header(self, ready: bool) -> Header:
        if self._header is None or not ready:
            raise ProtocolError("out_of_order", "the exchange has not come to this step, or is past it")
        return self._header

    def _enough(self, found: int, did: str, need: int = 0) -> None:
        header = self._open_header(True)
        need = need or max(self._threshold, header.minimum)
        if found < need:
            why = "; ".join(f"{site}: {reason}" for site, reason in sorted(self.refused.items()))
            raise ProtocolError("too_few", f"{found} sites {did}, {need} are needed" + (f" ({why})" if why else ""))

    def _others_failure(self, site: str) -> _Noted:
        return _Noted(self.refused, site)


@dataclass(frozen=True)
class _Noted:
    """Turns one site's broken rule into a note, so that the others go on."""

    notes: dict[str, str]
    site: str

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, ProtocolError):
            self.notes[self.site] = error.what
            return True
        return False
