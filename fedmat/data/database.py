"""A site's database as rows of cells, through SQLAlchemy.

Knows: URLs with credentials from the environment, tables and SELECT statements. Refuses to know: what a column means, and
how to write: SQLite files are opened read-only and only a SELECT is sent.

References:
    Credentials in the environment: A. Wiggins, "The Twelve-Factor App", III. Config.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmat.config import resolve_path
from fedmat.data import cells
from fedmat.errors import ConfigError, DataError


def read_database(path: str, options: Mapping[str, Any], base: Path) -> tuple[list[str], list[list[Any]]]:
    """Returns (column names, rows) of ``options.table`` or ``options.query``.

    Args:
        path: a URL with ``${NAME}`` for secrets, or an SQLite file relative to ``base``.

    Raises:
        ConfigError: URL, driver, environment variable, table or options are wrong.
        DataError: the database is not there or did not answer.
    """
    import sqlalchemy

    table, query = options.get("table"), options.get("query")
    if (table is None) == (query is None):
        raise ConfigError("an sql source needs options.table or options.query, and not both", fix="keep one of the two")
    if query is not None and not re.match(r"\s*(select|with)\b", str(query), re.IGNORECASE):
        raise ConfigError("options.query is not a SELECT: a site's database is only read", fix="write a SELECT")
    try:
        engine = sqlalchemy.create_engine(_database_url(path, base))
    except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError, ImportError):
        raise ConfigError(
            "the sql path is no URL SQLAlchemy knows, or its driver is not installed",
            fix="write dialect+driver://host/database and pip install the driver",
        ) from None
    try:
        with engine.connect() as connection:
            statement, ordered = (sqlalchemy.text(str(query)), True) if query else _table_statement(connection, options)
            result = connection.execute(statement)
            names, rows = list(result.keys()), [list(r) for r in result]
    except sqlalchemy.exc.SQLAlchemyError as error:  # its text may hold values, or the password
        raise DataError(
            f"the database did not answer the query ({type(error).__name__})",
            fix="check the URL, the rights of the account and the table or query",
        ) from None
    finally:
        engine.dispose()
    if not ordered:
        rows.sort(key=lambda row: [cells.text_of(c) for c in row])
    return names, rows


def _database_url(text: str, base: Path) -> Any:
    """Returns the URL with ``${NAME}`` filled from the environment; SQLite opens an existing file, read-only."""
    from sqlalchemy.engine import URL, make_url

    if "://" not in text:
        return _sqlite_url(resolve_path(text, base))
    if re.search(r"://[^/@]*:(?!\$\{)[^/@]+@", text):
        raise ConfigError("the sql path holds a password", fix="write ${NAME} instead and set that environment variable")
    missing = [n for n in re.findall(r"\$\{(\w+)\}", text) if n != "FEDMAT_DATA" and n not in os.environ]
    if missing:
        raise ConfigError(f"the sql path uses ${{{missing[0]}}}, which is not set", fix=f"export {missing[0]} before the run")
    held: dict[str, str] = {}

    def hold(match: re.Match[str]) -> str:  # a password may hold '@' or '/': fill it in after parsing
        held[key] = str(resolve_path("${FEDMAT_DATA}", base)) if match[1] == "FEDMAT_DATA" else os.environ[match[1]]
        return key

    for index, name in enumerate(dict.fromkeys(re.findall(r"\$\{(\w+)\}", text))):
        key = f"held{index}held"
        text = re.sub(rf"\$\{{({name})\}}", hold, text)
    url: URL = make_url(text)

    def fill(part: str | None) -> str | None:
        for name, value in held.items():
            part = part.replace(name, value) if part is not None else None
        return part

    url = url.set(username=fill(url.username), password=fill(url.password), host=fill(url.host), database=fill(url.database))
    if url.get_backend_name() == "sqlite" and url.database and not url.database.startswith("file:"):
        return _sqlite_url((base / url.database).resolve())
    return url


def _sqlite_url(path: Path) -> Any:
    from sqlalchemy.engine import URL

    if not path.is_file():
        raise DataError(f"{path}: no such database file", fix="correct the path in site.yaml")
    return URL.create("sqlite", database=f"file:{path}", query={"mode": "ro", "uri": "true"})


def _table_statement(connection: Any, options: Mapping[str, Any]) -> tuple[Any, bool]:
    """Returns (SELECT of the whole table, whether it has a primary key to order by)."""
    import sqlalchemy

    name, schema = str(options["table"]), options.get("schema")
    inspector = sqlalchemy.inspect(connection)
    names = [*inspector.get_table_names(schema=schema), *inspector.get_view_names(schema=schema)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"it has {len(names)} other tables"
        raise ConfigError(f"the database has no table '{name}'; {hint}", fix="correct options.table")
    columns: list[Any] = [sqlalchemy.column(c["name"]) for c in inspector.get_columns(name, schema=schema)]
    keys = inspector.get_pk_constraint(name, schema=schema).get("constrained_columns") or []
    statement = sqlalchemy.select(*columns).select_from(sqlalchemy.table(name, *columns, schema=schema))
    return statement.order_by(*[sqlalchemy.column(k) for k in keys]), bool(keys)
