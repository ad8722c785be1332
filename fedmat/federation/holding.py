"""What a site holds between the messages of its rounds: the model of the day, and the updates it has sealed.

Knows: one site's state folder, its keys, the charter. Refuses to know: records and features. Whatever is sent is on disk
before it is sent, so that a site asked again after a crash gives the same bytes and never masks one update twice over.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedmat import files, wire
from fedmat.domain import Answered, GlobalModel, Prepared, Sealed, Step, TrainRequest
from fedmat.envelopes import (
    ArrivedRequest,
    AuditRequest,
    AuditVote,
    Blob,
    Header,
    MaskKeysRequest,
    MaskSharesRequest,
    SumWitness,
    WitnessRequest,
)
from fedmat.errors import ProtocolError
from fedmat.federation import rounds
from fedmat.federation.plan import Plan
from fedmat.keys import Charter, PartyKeys
from fedmat.seeds import stream
from fedmat.transport import ckks
from fedmat.transport.masking import MaskingSite
from fedmat.transport.trigram import site as trigram
from fedmat.transport.trigram.ring import Ring
from fedmat.weights import Vector, Weights

MODEL = "held.safetensors"
_KEPT = 4  # rounds and exchanges whose sealed updates a site keeps, for audits and repeated questions


@dataclass(frozen=True)
class Identity:
    """A party's private keys, the charter, and the members' secret that decides on canary rounds (empty: none)."""

    keys: PartyKeys
    charter: Charter
    secret: bytes = field(default=b"", repr=False)


class Held:
    """The global model as this site holds it: sent whole, or made from the plan's seed, then kept up to date by steps.

    Args:
        initial: makes the first weights from the number of active features, as the coordinator does.
    """

    def __init__(self, plan: Plan, state: Path, initial: Callable[[int], Weights]) -> None:
        self._plan, self._path, self._initial = plan, state / MODEL, initial
        self._model: GlobalModel | None = None

    @property
    def like(self) -> Weights:
        """The weights of the model held; for their names and shapes."""
        return self._model.weights if self._model else {}

    def take(self, request: TrainRequest) -> GlobalModel | None:
        """Returns the model that a request starts from; None where it cannot be made from what this site holds."""
        model = self._model or self._read()
        if request.scaler is not None:
            weights = request.weights or self._initial(int(request.scaler.active.sum()))
            model = GlobalModel(weights, request.scaler, {})
        for step in request.steps:
            if model is not None:
                model = self._stepped(model, step)
        if model is None or wire.weights_digest(model.weights, model.scaler) != request.model_sha256:
            return None
        self._keep(model)
        return model

    def step(self, number: int, model_sha256: str, step: Step) -> None:
        """Takes the step that round ``number`` ended in, from the model ``model_sha256``; does nothing from another."""
        model = self._model or self._read()
        if model is not None and wire.weights_digest(model.weights, model.scaler) == model_sha256:
            self._keep(self._stepped(model, step))

    def _stepped(self, model: GlobalModel, step: Step) -> GlobalModel:
        digest = wire.weights_digest(model.weights, model.scaler)
        squeeze = rounds.compressor(self._plan, model.weights, step.round, digest)
        return GlobalModel(rounds.advance(model.weights, squeeze.expand(step.vector())), model.scaler, {})

    def _keep(self, model: GlobalModel) -> None:
        if model is not self._model:
            self._model = model
            if rounds.travels(self._plan):  # else every request brings the model
                files.write_atomic(self._path, wire.encode(model))

    def _read(self) -> GlobalModel | None:
        return wire.decode(self._path.read_bytes(), GlobalModel) if self._path.exists() else None


class Sealing:
    """Seals a site's updates for encrypted rounds, and checks afterwards what was opened of them."""

    def __init__(self, plan: Plan, identity: Identity, state: Path, site: str) -> None:
        self._plan, self._id, self._folder, self._site = plan, identity, state / "sealed", site
        self._ring = Ring(plan.settings.security.ring_bits)

    def stored(self, request: TrainRequest) -> Sealed | None:
        """Returns what was answered to this exchange before.

        Raises:
            ProtocolError: replay: the exchange had another header then.
        """
        header = _header(request)
        found = self._answered(header)
        if found is None:
            return None
        if found.header_sha256 != wire.digest(header):
            raise ProtocolError("replay", f"site {self._site} answered another header of exchange {header.exchange}")
        return found.sealed

    def prepared(self, request: TrainRequest | AuditRequest) -> Prepared | None:
        """Returns the round's update if it was made before: a round is trained once, however often it is sealed."""
        header = _header(request)
        path = self._path("prepared", header, header.round)
        return wire.decode(path.read_bytes(), Prepared) if path.exists() else None

    def seal(self, request: TrainRequest, found: Prepared) -> Sealed:
        """Returns the sealed update; it is on disk before it is returned."""
        header = _header(request)
        self._check(header)
        if header.length != len(found.numbers):
            raise ProtocolError(
                "wrong_length", f"the header speaks of {header.length} numbers, the plan of {len(found.numbers)}"
            )
        files.write_atomic(self._path("prepared", header, header.round), wire.encode(found))
        canary = self._canary(header)
        words = trigram.canary_words(canary, header) if canary else self.words(header, found.numbers)
        content = self._protected(request, header, found, words)
        sealed = Sealed(self._site, content, found.train_loss, found.validation)
        kept = Answered(wire.digest(header), sealed, _blob(words.tobytes()), _blob(canary))
        files.write_atomic(self._path("answered", header, header.exchange), wire.encode(kept))
        self._forget(header)
        return sealed

    def words(self, header: Header, numbers: Vector) -> Any:
        """Returns the update as ring elements: clipped, scaled and rounded by chance, never longer than the ring permits."""
        return self._ring.encode(numbers, header.clip, self._rounding(header.round))

    def _protected(self, request: TrainRequest, header: Header, found: Prepared, words: Any) -> Any:
        """Returns the update in the form that may leave: a submission to the roles, masked words or ciphertexts."""
        mode = self._plan.settings.security.mode
        if mode == "trigram":
            return trigram.submit(header, request.consents, self._id.charter, self._id.keys, words)
        if mode == "masking":
            masks = request.masks
            if masks is None:
                raise ProtocolError("no_masks", "a request of a masked round brings no shares")
            return self._masking(lambda m: m.mask(header, masks.shares, words))
        return ckks.submit(header, self._id.charter, self._id.keys, self._context(header, request.context), found.numbers)

    def _check(self, header: Header) -> None:
        """Refuses a header that asks for less protection than this site's own copy of the plan.

        Raises:
            ProtocolError: wrong_plan.
        """
        s = self._plan.settings
        mine = (self._plan.sha256, s.rule.hostile, s.security.ring_bits, rounds.minimum(self._plan))
        if (header.plan_sha256, header.hostile, header.bits, header.minimum) != mine or not set(header.weights) <= set(
            self._plan.roster
        ):
            raise ProtocolError("wrong_plan", f"site {self._site}: the header is not one of the plan this site agreed to")

    def masks(self, request: Any) -> Any:
        """Returns the answer to one of the messages around a masked round; what it depends on is on disk before that."""
        r = request
        self._check(r.header)
        if isinstance(r, MaskKeysRequest):
            return self._masking(lambda m: m.keys_for(r.header))
        if isinstance(r, MaskSharesRequest):
            return self._masking(lambda m: m.shares_for(r.header, r.keys))
        if isinstance(r, ArrivedRequest):
            return self._masking(lambda m: m.confirm(r.header, r.arrived, r.dropped))
        return self._masking(lambda m: m.unmask(r.header, r.arrived, r.dropped, r.signatures))

    def _masking(self, step: Callable[[MaskingSite], Any]) -> Any:
        path, threshold = self._folder / "masking.state", rounds.masking_threshold(self._plan)
        if path.exists():
            site = MaskingSite.restore(path.read_bytes(), self._id.keys, self._id.charter, threshold)
        else:
            site = MaskingSite(self._site, self._id.keys, self._id.charter, threshold)
        answer = step(site)
        files.write_atomic(path, site.export(), private=True)
        return answer

    def audit(self, request: AuditRequest) -> AuditVote:
        """Returns the site's signed finding about what was opened of its update.

        Raises:
            ProtocolError: replay: this site submitted nothing under that header.
        """
        found = self._answered(request.header)
        if found is None or found.header_sha256 != wire.digest(request.header):
            raise ProtocolError("replay", f"site {self._site} submitted nothing under this header")
        words = np.frombuffer(found.words.tobytes(), dtype=self._ring.dtype)
        return trigram.audit(request, self._id.charter, self._id.keys, words, found.canary.tobytes())

    def sent(self, request: AuditRequest) -> Vector:
        """Returns the numbers that were truly sent: clipped and rounded, shape ``k``."""
        found = self._answered(request.header)
        words = np.frombuffer(found.words.tobytes(), dtype=self._ring.dtype) if found else np.zeros(0, self._ring.dtype)
        return self._ring.decode(words, request.header.clip, 1)

    def witness(self, request: WitnessRequest) -> SumWitness:
        """Returns the site's signature of an encrypted sum that it has added up itself."""
        context = self._context(request.header, _blob(b""))
        return ckks.witness(request.header, self._id.charter, self._id.keys, context, request.submissions)

    def knows_context(self, request: TrainRequest) -> bool:
        """Tells whether this site has the run's public CKKS context, or is being sent it."""
        return len(request.context) > 0 or self._context_path(_header(request)).exists()

    def _context(self, header: Header, sent: Blob) -> ckks.Context:
        path = self._context_path(header)
        if len(sent):
            files.write_atomic(path, sent.tobytes())
        return ckks.open_context(path.read_bytes(), self._id.charter, header)

    def _context_path(self, header: Header) -> Path:
        return self._folder / header.run[:16] / "context.ckks"

    def _canary(self, header: Header) -> bytes:
        rate = self._plan.settings.security.canary_rate
        if rate == 0 or not self._id.secret or not trigram.canary_due(self._id.secret, header, rate):
            return b""
        return os.urandom(32)

    def _rounding(self, number: int) -> np.random.Generator:
        """The draw of stochastic rounding protects nothing, so it may follow from the plan: same plan and data, same bytes."""
        return stream(self._plan.settings.seed, "rounding", self._site, number)

    def _answered(self, header: Header) -> Answered | None:
        path = self._path("answered", header, header.exchange)
        return wire.decode(path.read_bytes(), Answered) if path.exists() else None

    def _path(self, kind: str, header: Header, number: int) -> Path:
        return self._folder / header.run[:16] / f"{kind}-{number:06d}.safetensors"

    def _forget(self, header: Header) -> None:
        """Removes what belongs to exchanges and rounds that nobody will ask about again."""
        for kind, number in (("answered", header.exchange), ("prepared", header.round)):
            for path in self._path(kind, header, 0).parent.glob(f"{kind}-*.safetensors"):
                if int(path.stem.rpartition("-")[2]) < number - _KEPT:
                    path.unlink()


def _header(request: TrainRequest | AuditRequest) -> Header:
    if request.header is None:
        raise ProtocolError("no_header", "a request of an encrypted round names no header")
    return request.header


def _blob(data: bytes) -> Blob:
    return np.frombuffer(data, dtype=np.uint8)
