"""Numbers a record states directly: temperature, concentration, geometry, and categories as indicator columns.

Knows: contract fields and elementary transforms. Refuses to know: chemistry.

Every field gives its plain value unless ``transforms`` says otherwise; a field in kelvin gives ``1000/T`` by default,
the variable in which thermally activated transport is a straight line (Arrhenius). Transforms, one or a list per field:
``identity``, ``inverse`` (1000/x), ``log`` (log10 x), ``log_abs`` (log10 |x|), ``sqrt``, ``square``.

A category field gives one 0/1 column per category of the contract, or per name in ``categories``; a value outside
the list has its own column ``<field>=other``, so an unknown category shifts a prediction by one bounded step only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedmat.data.contract import RecordType
from fedmat.errors import ConfigError, FeatureError
from fedmat.features.common import Array, check_options, nearest, numbers, row_name, text_list, texts
from fedmat.features.table import Featurizer

TRANSFORMS: Mapping[str, tuple[str, Callable[[Array], Array]]] = {
    "identity": ("{}", lambda x: x),
    "inverse": ("1000/{}", lambda x: 1000.0 / x),
    "log": ("log10({})", np.log10),
    "log_abs": ("log10|{}|", lambda x: np.asarray(np.log10(np.abs(x)))),
    "sqrt": ("sqrt({})", np.sqrt),
    "square": ("{}^2", np.square),
}


@dataclass(frozen=True)
class ConditionFeatures(Featurizer):
    """Transformed number fields, then category indicators.

    Attributes:
        columns: (number field, transform) pairs.
        categories: (category field, category) pairs; the category ``None`` stands for "other".
        optional: fields a record may lack; their columns are NaN then.
    """

    name = "conditions"
    version = "1"

    columns: tuple[tuple[str, str], ...] = ()
    categories: tuple[tuple[str, str | None], ...] = ()
    optional: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any], rt: RecordType, target: str) -> ConditionFeatures:
        """Returns the featurizer for ``fields`` (default: every required number field but the target), ``transforms``
        and ``categories``.

        Raises:
            ConfigError: an unknown field or transform, or nothing to read.
        """
        check_options(cls.name, options, ("fields", "transforms", "categories"))
        default = [f.name for f in rt.fields if f.kind == "number" and f.required and f.name != target]
        fields = [rt.field(f) for f in text_list(cls.name, options, "fields", default)]
        transforms = _mapping(options, "transforms", [f.name for f in fields if f.kind == "number"])
        listed = _mapping(options, "categories", [f.name for f in fields if f.kind == "category"])
        columns: list[tuple[str, str]] = []
        categories: list[tuple[str, str | None]] = []
        for field in fields:
            if field.kind == "number":
                chosen = transforms.get(field.name, ["inverse" if field.unit == "kelvin" else "identity"])
                for transform in chosen:
                    if transform not in TRANSFORMS:
                        raise ConfigError(
                            f"features: conditions knows no transform '{transform}' (field {field.name})",
                            fix=nearest(transform, TRANSFORMS),
                        )
                    columns.append((field.name, transform))
            elif field.kind == "category":
                known = listed.get(field.name, [c for c in field.categories if c])
                if not known:
                    raise ConfigError(
                        f"features: conditions needs the categories of '{field.name}', the contract leaves them open",
                        fix=f"add options.categories: {{{field.name}: [...]}}",
                    )
                categories += [(field.name, c) for c in known] + [(field.name, None)]
            else:
                raise ConfigError(
                    f"features: conditions cannot read {field.name}, a {field.kind}",
                    fix="use composition, molecule, formulation or structure for it",
                )
        if not columns and not categories:
            raise ConfigError(f"features: conditions has nothing to read in {rt.name}", fix="name options.fields")
        optional = tuple(f.name for f in fields if f.kind == "number" and not f.required)
        return cls(tuple(columns), tuple(categories), optional)

    @property
    def may_miss(self) -> bool:  # type: ignore[override]
        """True when a field is optional in the contract."""
        return bool(self.optional)

    @property
    def names(self) -> tuple[str, ...]:
        """``1000/temperature_k``, ``log10(c_rate)``, ``processing=CAST``, ..."""
        plain = (TRANSFORMS[t][0].format(f) for f, t in self.columns)
        return (*plain, *(f"{f}={'other' if c is None else c}" for f, c in self.categories))

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields in the order of the options."""
        return tuple(dict.fromkeys(f for f, _ in (*self.columns, *self.categories)))

    def transform(self, records: pd.DataFrame) -> Array:
        """Returns features, shape ``n x len(names)``.

        Raises:
            FeatureError: a value is absent, not finite, or outside a transform's domain (log or inverse of 0).
        """
        out = np.empty((len(records), len(self.names)), dtype=np.float64)
        for j, (field, transform) in enumerate(self.columns):
            values = numbers(records, field, self.name, may_miss=field in self.optional)
            with np.errstate(all="ignore"):
                out[:, j] = TRANSFORMS[transform][1](values)
            bad = ~np.isfinite(out[:, j]) & np.isfinite(values)
            if bad.any():
                raise FeatureError(
                    f"conditions: '{transform}' of field '{field}' is undefined for {int(bad.sum())} record(s), first in "
                    f"{row_name(records, int(np.argmax(bad)))}",
                    fix="choose another transform for the field",
                )
        for j, (field, category) in enumerate(self.categories, start=len(self.columns)):
            cells = texts(records, field, self.name)
            known = [c for f, c in self.categories if f == field and c is not None]
            out[:, j] = ~cells.isin(known) if category is None else cells == category
        return out


def _mapping(options: Mapping[str, Any], key: str, fields: list[str]) -> dict[str, list[str]]:
    value = options.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"features: option '{key}' of conditions must map fields to names", fix=f"{key}: {{field: name}}")
    out = {}
    for field, names in value.items():
        if field not in fields:
            raise ConfigError(
                f"features: option '{key}' of conditions names '{field}', which is not among its fields",
                fix=nearest(str(field), fields),
            )
        out[field] = [names] if isinstance(names, str) else [str(n) for n in names]
        if len(set(out[field])) != len(out[field]):
            raise ConfigError(f"features: option '{key}' of conditions repeats a name for '{field}'", fix="remove it")
    return out
