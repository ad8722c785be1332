"""Sums under homomorphic encryption: sites encrypt, the coordinator adds what it cannot read, a key holder decrypts one sum.

Knows: CKKS contexts, ciphertexts and the one party that holds the secret key. Refuses to know: models, messages' ways, files.
The key holder is the charter's auditor, an organisation that is neither a member nor the coordinator. A key that all
members share, as other frameworks hand it out, is refused: the coordinator and any one member could then read everybody.

What holds only among parties that follow the protocol. A site's ciphertext carries no proof that it encrypts anything, so a
site together with the coordinator can send ones made to learn about the key from opened sums. Against the coordinator
alone, more sites than the header calls hostile add up the ciphertexts themselves and sign the sum (:func:`witness`).

Why the key holder adds noise. A CKKS decryption contains the encryption's error, and error plus ciphertext is a linear
equation in the secret key (IND-CPA-D): a coordinator that saw exact decryptions could solve for the key after a few of
them. TenSEAL offers nothing against that, and one opening per round alone does not help, since a round has many
ciphertexts. So the error (measured: below ``ERROR`` of the largest norm) is drowned in Gaussian noise of ``FLOOD`` before
anything leaves :meth:`KeyHolder.decrypt`.

References:
    J. H. Cheon et al., "Homomorphic Encryption for Arithmetic of Approximate Numbers", ASIACRYPT 2017. B. Li and D. Micciancio,
    "On the Security of Homomorphic Encryption on Approximate Numbers", EUROCRYPT 2021. B. Li et al., "Securing Approximate
    Homomorphic Encryption Using Differential Privacy", CRYPTO 2022. TenSEAL 0.3.18 (Microsoft SEAL).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from fedmat import files
from fedmat.envelopes import Ciphertexts, Header, SumWitness
from fedmat.errors import ProtocolError, StateError
from fedmat.keys import Charter, PartyKeys
from fedmat.transport.masking import check_header, raw
from fedmat.transport.trigram.ring import blob
from fedmat.weights import Vector

KEY_HOLDER = "auditor"
DEGREES = (8192, 16384)  # with 120 bits of modulus both are above 128 bits of security
MODULUS_BITS = (60, 60)  # one for data; the last takes part in keys only and in no ciphertext
SCALE_BITS = 57  # numbers are at most 1 in norm, so that 2^57 times their coefficients stays far below 2^59
ERROR = 2.0**-43  # more than encryption and addition change a number by (sd, of the largest norm); measured 2^-45, ten sites
FLOOD = 2.0**-16  # sd of the noise on an opened number; of the largest norm. 27 bits above the error
_GRID = 2.0**-20  # opened numbers are whole multiples of this, so that floating point leaks nothing either
_MARGIN = 2.0**-10  # an opened sum may be this much longer than its sites' updates can be together
_CONTEXT_LIMIT = 4 << 20


# --- the public context -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """The key holder's public context of one run: encrypts and adds.

    Attributes:
        slots: numbers in a ciphertext.
        tenseal: the library's context.
    """

    slots: int
    tenseal: Any = field(repr=False)


def open_context(data: bytes, charter: Charter, header: Header) -> Context:
    """Returns the context in ``data``, as a site and the coordinator use it.

    Raises:
        ProtocolError: wrong_charter, key_holder_is_member, bad_signature (not the key holder's, or of another run),
            shared_secret_key, bad_context.
    """
    check_header(header, charter)
    _check_key_holder(charter)
    if not 64 < len(data) <= _CONTEXT_LIMIT:
        raise ProtocolError("bad_context", f"a context of {len(data)} bytes")
    signature, body = data[:64], data[64:]
    # Before anything is parsed: a coordinator that sent a context of its own making could read all that is encrypted.
    charter.verify(KEY_HOLDER, signature, _context_text(header.run, body), header.today)
    return _loaded(body)


def _loaded(body: bytes) -> Context:
    import tenseal

    try:
        context = tenseal.context_from(body, n_threads=1)
        parameters = context.seal_context().data.key_context_data()
        degree = int(parameters.parms().poly_modulus_degree())
        bits, scale = int(parameters.total_coeff_modulus_bit_count()), float(context.global_scale)
    except _FOREIGN as error:
        raise ProtocolError("bad_context", f"the CKKS context does not load ({type(error).__name__})") from None
    if context.has_secret_key():
        raise ProtocolError(
            "shared_secret_key",
            "the CKKS context holds its secret key: the coordinator and any one member could read every update",
            fix=f"only the key holder ({KEY_HOLDER}) keeps the secret key; publish KeyHolder.public_context()",
        )
    if degree not in DEGREES or bits != sum(MODULUS_BITS) or scale != 2.0**SCALE_BITS or not context.has_public_key():
        raise ProtocolError("bad_context", "the CKKS context has other parameters than fedmat uses")
    return Context(degree // 2, context)


def _context_text(run: str, body: bytes) -> bytes:
    return b"fedmat/ckks/context/v1|" + run.encode() + b"|" + hashlib.sha256(body).digest()


def _check_key_holder(charter: Charter) -> None:
    holder = next((p for p in charter.parties if p.name == KEY_HOLDER), None)
    if holder is None:
        raise ProtocolError("unknown_member", f"the charter names no {KEY_HOLDER} to hold the CKKS key")
    if holder.organisation in {p.organisation for p in charter.parties if p.kind == "site"}:
        raise ProtocolError(
            "key_holder_is_member",
            f"{holder.organisation} holds the CKKS key and is a member: with the coordinator it could read the others",
            fix="let an organisation without records hold the key",
        )


# --- encrypting and adding ------------------------------------------------------------------------------------------------

# What TenSEAL raises on bytes and numbers it does not like; nothing narrower is documented.
_FOREIGN = (ValueError, RuntimeError, TypeError, IndexError, MemoryError, OverflowError)


def encrypt(context: Context, vector: Vector, weight: float) -> tuple[bytes, ...]:
    """Returns ciphertexts of ``weight * vector``, ``slots`` numbers each, the last filled up with zeros.

    Args:
        vector: shape ``length``; in units of the clip, so at most 1 in norm.
        weight: the site's share of all weights, above 0 and at most 1.

    Raises:
        ProtocolError: non_finite, out_of_range.
    """
    import tenseal

    x = np.asarray(vector, dtype=np.float64)
    if x.ndim != 1 or not x.size or not np.isfinite(x).all():
        raise ProtocolError("non_finite", "an update must be a row of finite numbers")
    if not 0 < weight <= 1 or float(np.linalg.norm(x)) > 1 + 1e-9:
        raise ProtocolError("out_of_range", "an update must be clipped, and its weight a share of 1")
    padded = np.zeros(_count(x.size, context) * context.slots)
    padded[: x.size] = weight * x
    rows = padded.reshape(-1, context.slots)
    return tuple(bytes(tenseal.ckks_vector(context.tenseal, row.tolist()).serialize()) for row in rows)


def add(context: Context, parts: Sequence[Sequence[bytes]]) -> tuple[bytes, ...]:
    """Returns the ciphertexts of the sum; sites in the order given, so that everyone who adds gets the same bytes.

    Raises:
        ProtocolError: malformed, wrong_length, too_few.
    """
    if not parts:
        raise ProtocolError("too_few", "no ciphertexts to add")
    if len({len(p) for p in parts}) != 1:
        raise ProtocolError("wrong_length", "sites sent different numbers of ciphertexts")
    out = []
    for column in zip(*parts, strict=True):
        total = _parsed(context, column[0])
        for data in column[1:]:
            total = total + _parsed(context, data)
        out.append(bytes(total.serialize()))
    return tuple(out)


def submit(header: Header, charter: Charter, keys: PartyKeys, context: Context, vector: Vector) -> Ciphertexts:
    """Returns a site's signed message: its update, clipped to ``header.clip``, times its weight, encrypted.

    Args:
        vector: shape ``length``.

    Raises:
        ProtocolError: the header is refused, not_invited, wrong_length, non_finite.
    """
    digest = check_header(header, charter)
    if keys.name not in header.weights:
        raise ProtocolError("not_invited", f"{keys.name} has no weight in this header")
    x = np.asarray(vector, dtype=np.float64)
    if x.shape != (header.length,):
        raise ProtocolError("wrong_length", f"the update has shape {x.shape}, the header says {header.length}")
    with np.errstate(over="ignore"):
        length = float(np.linalg.norm(x))
    if not math.isfinite(length):
        raise ProtocolError("non_finite", "the update's norm is no finite number")
    parts = encrypt(context, x / max(header.clip, length), header.weights[keys.name] / _all(header))
    signature = keys.sign(_submitted_text(digest, keys.name, parts))
    return Ciphertexts(keys.name, tuple(blob(p) for p in parts), blob(signature))


def accept(header: Header, charter: Charter, context: Context, message: Ciphertexts) -> tuple[bytes, ...]:
    """Returns a site's ciphertexts once they are its own, of this exchange, whole and of the right kind.

    Raises:
        ProtocolError: unknown_member, wrong_length, bad_signature, expired_key, malformed.
    """
    digest = check_header(header, charter)
    site = message.site
    if site not in header.weights:
        raise ProtocolError("unknown_member", f"{site} has no weight in this header")
    if len(message.parts) != _count(header.length, context):
        raise ProtocolError("wrong_length", f"{site} sent {len(message.parts)} ciphertexts")
    parts = tuple(raw(p, None, f"a ciphertext of {site}") for p in message.parts)
    charter.verify(site, raw(message.signature, 64, site), _submitted_text(digest, site, parts), header.today)
    for part in parts:
        _parsed(context, part)
    return parts


def witness(
    header: Header, charter: Charter, keys: PartyKeys, context: Context, submissions: Sequence[Ciphertexts]
) -> SumWitness:
    """Returns a site's signature of the encrypted sum, which it has added up itself from all sites' signed ciphertexts.

    Raises:
        ProtocolError: as :func:`accept`, and duplicate, not_arrived (its own are not among them), too_few.
    """
    digest = check_header(header, charter)
    found = {m.site: accept(header, charter, context, m) for m in submissions}
    if len(found) != len(submissions):
        raise ProtocolError("duplicate", "a site stands twice among the ciphertexts")
    if keys.name not in found:
        raise ProtocolError("not_arrived", f"the ciphertexts of {keys.name} are not among those it is to add")
    sites = tuple(sorted(found))
    _enough(header, len(sites))
    total = add(context, [found[s] for s in sites])
    return SumWitness(keys.name, sites, blob(keys.sign(_sum_text(digest, sites, total))))


def _parsed(context: Context, data: bytes) -> Any:
    import tenseal

    if len(data) > context.slots * 2 * 2 * 8 + 4096:  # two polynomials of 2 * slots coefficients; they do not compress
        raise ProtocolError("wrong_length", "a ciphertext is longer than any can be")
    try:
        vector = tenseal.ckks_vector_from(context.tenseal, data)
        (cipher,) = vector.ciphertext()
        good = (
            vector.size() == context.slots
            and cipher.size() == 2
            and cipher.scale == 2.0**SCALE_BITS
            and cipher.coeff_modulus_size() == 1
            and cipher.is_ntt_form()
            and not cipher.is_transparent()  # a transparent one hides nothing: its plaintext stands in it
        )
    except _FOREIGN as error:
        raise ProtocolError("malformed", f"a ciphertext does not load ({type(error).__name__})") from None
    if not good:
        raise ProtocolError("malformed", "a ciphertext has another shape, scale or level than fedmat's")
    return vector


def _all(header: Header) -> int:
    return sum(header.weights.values())


def _count(length: int, context: Context) -> int:
    return -(-length // context.slots)


def _enough(header: Header, found: int) -> None:
    need = max(header.minimum, header.hostile + 2)
    if found < need:
        raise ProtocolError("too_few", f"{found} sites in the sum, {need} are needed")


def _parts_digest(parts: Sequence[bytes]) -> bytes:
    return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).digest()


def _submitted_text(digest: bytes, site: str, parts: Sequence[bytes]) -> bytes:
    return b"fedmat/ckks/submitted/v1|" + digest + _parts_digest(parts) + site.encode()


def _sum_text(digest: bytes, sites: Sequence[str], parts: Sequence[bytes]) -> bytes:
    return b"fedmat/ckks/sum/v1|" + digest + _parts_digest(parts) + files.canonical_json(list(sites))


# --- the key holder -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HolderState:
    """All a key holder keeps of one run; holds the secret key.

    Attributes:
        secret: TenSEAL's context with its secret key, hex.
        opened: rounds of which a sum was decrypted -> digest of the exchange's header.
    """

    run: str
    secret: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$")] = field(repr=False)
    opened: dict[int, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Returns the state as canonical JSON."""
        return files.canonical_json(
            {"run": self.run, "secret": self.secret, "opened": {str(k): v for k, v in self.opened.items()}}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> HolderState:
        """Returns the state in ``data``.

        Raises:
            StateError: damaged.
        """
        try:
            found = json.loads(data)
            if not isinstance(found, dict) or found.keys() != {"run", "secret", "opened"}:
                raise ValueError
            return _adapter().validate_json(data, strict=True)
        except (ValueError, ValidationError, RecursionError):
            raise StateError("the key holder's state is damaged", fix="restore it; a lost key ends the run") from None


@cache
def _adapter() -> TypeAdapter[HolderState]:
    return TypeAdapter(HolderState)


class KeyHolder:
    """Holds the secret key of one run and decrypts one sum per round, for a coordinator it does not trust.

    The caller writes :meth:`export` to disk before it sends what :meth:`decrypt` returned: a key holder that forgot what
    it opened would open a second sum, and the difference of two sums is a site's update.
    """

    def __init__(self, keys: PartyKeys, charter: Charter, state: HolderState) -> None:
        import tenseal

        _check_key_holder(charter)
        if keys.name != KEY_HOLDER:
            raise ProtocolError("not_key_holder", f"{keys.name} may not hold the CKKS key; the charter's {KEY_HOLDER} does")
        self._keys, self._charter, self._state = keys, charter, state
        try:
            self._private = tenseal.context_from(bytes.fromhex(state.secret), n_threads=1)
            whole = self._private.has_secret_key()
            body = self._private.serialize(
                save_public_key=True, save_secret_key=False, save_galois_keys=False, save_relin_keys=False
            )
        except _FOREIGN:
            whole = False
        if not whole:
            raise StateError("the key holder's state holds no secret key", fix="restore it; a lost key ends the run")
        self._body = bytes(body)
        self._context = _loaded(self._body)

    @classmethod
    def new(cls, keys: PartyKeys, charter: Charter, run: str, *, poly_modulus_degree: int = 8192) -> KeyHolder:
        """Returns a key holder with a fresh key for one run.

        Raises:
            ProtocolError: bad_context (a degree that is not safe), key_holder_is_member, not_key_holder.
        """
        import tenseal

        if poly_modulus_degree not in DEGREES:
            raise ProtocolError("bad_context", f"degree {poly_modulus_degree}: one of {DEGREES} is needed")
        fresh = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree, coeff_mod_bit_sizes=list(MODULUS_BITS), n_threads=1
        )
        fresh.global_scale = 2.0**SCALE_BITS
        secret = fresh.serialize(save_public_key=True, save_secret_key=True, save_galois_keys=False, save_relin_keys=False)
        return cls(keys, charter, HolderState(run, bytes(secret).hex()))

    @classmethod
    def restore(cls, data: bytes, keys: PartyKeys, charter: Charter) -> KeyHolder:
        """Returns a key holder as :meth:`export` left it.

        Raises:
            StateError: damaged.
        """
        return cls(keys, charter, HolderState.from_bytes(data))

    def export(self) -> bytes:
        """Returns the state, the secret key included: for a file that its owner alone may read."""
        return self._state.to_bytes()

    def public_context(self) -> bytes:
        """Returns the signed context that sites and the coordinator open with :func:`open_context`; no secret is in it."""
        return self._keys.sign(_context_text(self._state.run, self._body)) + self._body

    def decrypt(
        self, header: Header, sites: Sequence[str], parts: Sequence[bytes], witnesses: Sequence[SumWitness]
    ) -> NDArray[np.float64]:
        """Returns the weighted sum of the sites' updates, shape ``length``, with noise of ``FLOOD * clip * all weights``.

        Args:
            sites: whose ciphertexts were added, sorted.
            parts: the sum's ciphertexts.
            witnesses: of more sites than ``header.hostile``, all of them in the sum.

        Raises:
            ProtocolError: wrong_charter, wrong_run, unknown_member, bad_sets, too_few, wrong_length, no_witness, bad_signature,
                second_opening, malformed, out_of_range. After the last two the round counts as opened: a refusal that depends
                on a decrypted number says something about the key, so nobody gets two.
        """
        digest = check_header(header, self._charter)
        if header.run != self._state.run:
            raise ProtocolError("wrong_run", "this key belongs to another run")
        if list(sites) != sorted(set(sites)):
            raise ProtocolError("bad_sets", "the sites of a sum must be sorted and different")
        strangers = sorted(set(sites) - set(header.weights))
        if strangers:
            raise ProtocolError("unknown_member", f"{', '.join(strangers)}: no weight in this header")
        _enough(header, len(sites))
        if len(parts) != _count(header.length, self._context):
            raise ProtocolError("wrong_length", f"{len(parts)} ciphertexts for {header.length} numbers")
        self._check_witnesses(header, digest, sites, parts, witnesses)
        if header.round in self._state.opened:
            raise ProtocolError(
                "second_opening", f"a sum of round {header.round} was opened: a second one shows the difference"
            )
        self._state = replace(self._state, opened=self._state.opened | {header.round: digest.hex()})
        private = Context(self._context.slots, self._private)
        opened = np.concatenate([np.asarray(_parsed(private, p).decrypt(), dtype=np.float64) for p in parts])
        share = sum(header.weights[s] for s in sites) / _all(header)
        length = float(np.linalg.norm(opened))
        if not math.isfinite(length) or length > share + _MARGIN:
            raise ProtocolError("out_of_range", "the sum is longer than its sites' clipped updates can be: one was not clipped")
        # Rounded after the noise: rounded before it, a number near the middle of two steps would show its error.
        noisy = np.rint((opened[: header.length] + FLOOD * _normal(header.length)) / _GRID)
        return np.asarray(noisy * (_GRID * header.clip * _all(header)), dtype=np.float64)

    def _check_witnesses(
        self, header: Header, digest: bytes, sites: Sequence[str], parts: Sequence[bytes], witnesses: Sequence[SumWitness]
    ) -> None:
        text = _sum_text(digest, sites, parts)
        good = set()
        for message in witnesses:
            if message.site not in sites or tuple(message.sites) != tuple(sites):
                raise ProtocolError("no_witness", f"{message.site} is not in this sum, or added up another")
            signature = raw(message.signature, 64, f"signature of {message.site}")
            self._charter.verify(message.site, signature, text, header.today)
            good.add(message.site)
        if len(good) <= header.hostile:
            raise ProtocolError(
                "no_witness",
                f"{len(good)} sites added up this sum, {header.hostile + 1} are needed: it could be one site's update",
            )


def _normal(n: int) -> Vector:
    """Returns standard normal numbers, shape ``n``, from the operating system's entropy."""
    from scipy.special import ndtri

    uniform = (np.frombuffer(os.urandom(8 * n), dtype=np.uint64) >> np.uint64(11)).astype(np.float64)
    return np.asarray(ndtri((uniform + 0.5) / 2.0**53), dtype=np.float64)
