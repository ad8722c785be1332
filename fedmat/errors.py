"""The error tree: one root, children named by what the caller can do about it.

Knows: exit codes and the rule that every message says what happened, what was expected and what to do.
Refuses to know: record values. A message may name a file, row, field or site, never a cell.
"""

from __future__ import annotations


class FedmatError(Exception):
    """Root of every error fedmat raises on purpose.

    Attributes:
        exit_code: Process exit status the command line uses for this family (see ``docs/errors.md``).
    """

    exit_code = 1

    def __init__(self, what: str, *, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what}\n  fix: {fix}" if fix else what)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.fix))


def _rebuild(kind: type[FedmatError], what: str, fix: str) -> FedmatError:
    return kind(what, fix=fix)


class ConfigError(FedmatError):
    """A consortium, site or params file is wrong: edit the file."""

    exit_code = 2


class PlanRefused(ConfigError):
    """Two settings of a plan exclude each other, or a bound of a rule is violated: change one of them."""


class PolicyRefused(FedmatError):
    """A party's own policy does not permit what was asked: its policy file says which clause, and the party alone changes it.

    Attributes:
        clause: where in the policy file, e.g. ``plans.rules``.
    """

    exit_code = 9

    def __init__(self, clause: str, what: str, *, fix: str = "") -> None:
        self.clause = clause
        super().__init__(f"{clause}: {what}", fix=fix)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_policy, (self.clause, self.what, self.fix))


def _rebuild_policy(clause: str, what: str, fix: str) -> PolicyRefused:
    return PolicyRefused(clause, what.removeprefix(f"{clause}: "), fix=fix)


class DataError(FedmatError):
    """A site's data or mapping is wrong: mend the data or the mapping."""

    exit_code = 3


class SiteRefused(DataError):
    """A site may not take part in this run (too many rejected rows, too few records, no test group)."""


class FeatureError(DataError):
    """Features cannot be computed from valid records."""


class RoundFailed(FedmatError):
    """A round could not close: fewer than the quorum of sites answered well."""

    exit_code = 4


class StateError(FedmatError):
    """Saved state is damaged, foreign or half written: restore or remove the named path."""

    exit_code = 5


class WireError(FedmatError):
    """Bytes from another party are not a valid message."""

    exit_code = 6


class ProtocolError(WireError):
    """A party broke the rules of an encrypted round, or would have to: nothing is opened.

    Attributes:
        reason: one word for machines, e.g. ``bad_signature``, ``replay``, ``second_opening`` (docs/errors.md).
    """

    def __init__(self, reason: str, what: str, *, fix: str = "") -> None:
        self.reason = reason
        super().__init__(f"{reason}: {what}", fix=fix)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_protocol, (type(self), self.reason, self.what, self.fix))


def _rebuild_protocol(kind: type[ProtocolError], reason: str, what: str, fix: str) -> ProtocolError:
    return kind(reason, what.removeprefix(f"{reason}: "), fix=fix)


class ServiceError(FedmatError):
    """Prefect, MLflow, DVC or the network did not do its part: see the named service."""

    exit_code = 7


class NotEvidenced(FedmatError):
    """Something was asked for which there is no evidence; absence never counts as a pass."""

    exit_code = 8
