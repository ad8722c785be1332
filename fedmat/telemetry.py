"""Switches off every dependency's telemetry, and their start-up noise, before any of them is imported.

Knows: environment variables and logger names of the tools fedmat builds on. Refuses to know: the tools themselves.
Members' project names, paths and usage are nobody's business; none of these tools phones home from a fedmat process.
"""

from __future__ import annotations

import logging
import os

SWITCHES = {
    "DO_NOT_TRACK": "true",  # Prefect reads 1/true/yes, MLflow only 'true'
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "PYBAMM_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",  # one thread per site: same bytes on every machine (DESIGN law 5)
}
TELEMETRY = (
    "DO_NOT_TRACK",
    "PREFECT_SERVER_ANALYTICS_ENABLED",
    "MLFLOW_DISABLE_TELEMETRY",
    "DVC_NO_ANALYTICS",
    "GX_ANALYTICS_ENABLED",
    "PYBAMM_DISABLE_TELEMETRY",
)


def switch_off() -> None:
    """Sets every switch; telemetry switches override what the environment says, the others only fill gaps."""
    for name, value in SWITCHES.items():
        if name in TELEMETRY:
            os.environ[name] = value
        else:
            os.environ.setdefault(name, value)
    for noisy in ("deepchem", "httpx", "great_expectations", "alembic", "mlflow.store", "absl"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


switch_off()
