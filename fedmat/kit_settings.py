"""The settings under which NVIDIA FLARE is safe to run, as its startup kits name them: server, operator, party.

Knows: FLARE's files and keys; where a value differs from what FLARE 2.9 writes by itself, the reason stands beside it. Refuses to know:
who is a member, keys, certificates (``fedmat.provision``), and FLARE's code (``fedmat.federation.flare``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmat import files

if TYPE_CHECKING:
    from fedmat.provision import Project

OPERATOR, OPERATOR_ROLE = "operator@fedmat.local", "project_admin"
ROOT, REVOKED = "rootCA.pem", "revoked.json"
STARTUP, LOCAL = "flare/startup", "flare/local"


def fed_client(consortium: str, host: str, port: int, party: str) -> dict[str, Any]:
    """Returns how a party finds its server, and knows it."""
    return {
        "format_version": 2,
        "require_signed_jobs": True,
        "servers": [
            {
                "name": consortium,
                "service": {"target": f"{host}:{port}", "scheme": "grpc"},
                "identity": host,
            }
        ],
        "client": {
            "ssl_private_key": "client.key",
            "ssl_cert": "client.crt",
            "ssl_root_cert": ROOT,
            "fqsn": party,
            "is_leaf": True,
            "connection_security": "mtls",
        },
    }


def fed_server(project: Project) -> dict[str, Any]:
    """Returns where the server listens, and with which certificate."""
    return {
        "format_version": 2,
        "require_signed_jobs": True,
        "servers": [
            {
                "name": project.consortium,
                "service": {"target": f"{project.host}:{project.port}", "scheme": "grpc"},
                "admin_server": project.host,
                "admin_port": project.port,
                "ssl_private_key": "server.key",
                "ssl_cert": "server.crt",
                "ssl_root_cert": ROOT,
                "connection_security": "mtls",
            }
        ],
    }


def fed_admin(project: Project) -> dict[str, Any]:
    """Returns how the operator's commands reach the server."""
    return {
        "format_version": 1,
        "admin": {
            "project_name": project.consortium,
            "username": OPERATOR,
            "server_identity": project.host,
            "scheme": "grpc",
            "host": project.host,
            "port": project.port,
            "connection_security": "mtls",
            "uid_source": "user_input",
            "with_file_transfer": True,
            "upload_dir": "transfer",
            "download_dir": "transfer",
            "client_key": "client.key",
            "client_cert": "client.crt",
            "ca_cert": ROOT,
        },
    }


_ALLOWED = [
    "fedmat."
]  # a job may name classes of the installed fedmat and no others; FLARE's list permits about eighty of its own


def server_resources(project: Project) -> dict[str, Any]:
    """Returns what the server runs beside jobs."""
    storage = "nvflare.app_common.storages.filesystem_storage.FilesystemStorage"
    store = project.server / "store"  # by default below the system's temporary folder, shared by all servers of the machine
    return {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": _ALLOWED,
        "servers": [
            {
                "admin_storage": "transfer",
                "max_num_clients": 100,
                "heart_beat_timeout": 15,  # 600 by default: a site that died would hold a round for ten minutes
                "admin_timeout": 10.0,
            }
        ],
        "snapshot_persistor": {
            "path": "nvflare.app_common.state_persistors.storage_state_persistor.StorageStatePersistor",
            "args": {
                "uri_root": "/",
                "storage": {"path": storage, "args": {"root_dir": str(store / "snapshots"), "uri_root": "/"}},
            },
        },
        "components": [
            {
                "id": "job_scheduler",
                "path": "nvflare.app_common.job_schedulers.job_scheduler.DefaultJobScheduler",
                "args": {"max_jobs": 1},  # 4 by default: two runs of a consortium never overlap
            },
            {
                "id": "job_manager",
                "path": "nvflare.apis.impl.job_def_manager.SimpleJobDefManager",
                "args": {"uri_root": str(store / "jobs"), "job_store_id": "job_store"},
            },
            {"id": "job_store", "path": storage},
            {
                "id": "process_launcher",
                "path": "nvflare.app_common.job_launcher.server_process_launcher.ServerProcessJobLauncher",
                "args": {},
            },
            # No log_receiver: sites' logs stay at the sites.
            {
                "id": "doorkeeper",  # FLARE knows no revocation: this refuses a revoked certificate when a party registers
                "path": "fedmat.federation.flare.Doorkeeper",
                "args": {"revoked": str(project.folder / REVOKED)},
            },
        ],
    }


def client_resources() -> dict[str, Any]:
    """Returns what a party's client runs beside jobs."""
    return {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": _ALLOWED,
        "allow_log_streaming": False,  # true by default, with a component that sends error logs to the server
        "app_validator": {"path": "fedmat.federation.flare.SettingsOnly", "args": {}},  # no code, whoever submits the job
        "client": {"retry_timeout": 30, "compression": "Gzip"},
        "components": [
            {
                "id": "resource_manager",
                "path": "nvflare.app_common.resource_managers.gpu_resource_manager.GPUResourceManager",
                "args": {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0, "expiration_period": 300},
            },
            {
                "id": "resource_consumer",
                "path": "nvflare.app_common.resource_consumers.gpu_resource_consumer.GPUResourceConsumer",
                "args": {},
            },
            {
                "id": "process_launcher",
                "path": "nvflare.app_common.job_launcher.client_process_launcher.ClientProcessJobLauncher",
                "args": {},
            },
            {"id": "lockdown", "path": "fedmat.federation.flare.Lockdown", "args": {}},  # no commands on a party's files
        ],
    }


# By default the project's admin may do anything, at every site: read files of its workspace, send code, set its log's level.
AUTHORIZATION: dict[str, Any] = {
    "format_version": "1.0",
    "permissions": {
        OPERATOR_ROLE: {
            "submit_job": "any",
            "manage_job": "any",
            "download_job": "any",
            "view": "any",
            "operate": "any",
            "clone_job": "none",
            "shell_commands": "none",
            "byoc": "none",  # a job that brings its own code
            "server-predeployed-flwr": "none",
            "configure_job_log": "none",  # a debug log may quote what training sees
            "configure_site_log": "none",
        },
    },
}

ADMIN_RESOURCES: dict[str, Any] = {
    "format_version": 1,
    "admin": {
        "idle_timeout": 900.0,
        "login_timeout": 10.0,
        "with_debug": False,
        "authenticate_msg_timeout": 2.0,
        "prompt": "> ",
    },
}

_QUIET = ("alembic", "asyncio", "great_expectations", "grpc", "httpcore", "httpx", "matplotlib", "mlflow", "prefect", "urllib3")

# One log instead of four copies of it, and only fedmat's and FLARE's own lines in it.
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "baseFormatter": {
            "()": "nvflare.fuel.utils.log_utils.BaseFormatter",
            "fmt": "%(asctime)s - %(name)s - %(levelname)s - %(fl_ctx)s - %(message)s",
        },
    },
    "handlers": {
        "logFileHandler": {
            "class": "logging.handlers.RotatingFileHandler",
            "level": "INFO",
            "formatter": "baseFormatter",
            "filename": "log.txt",
            "mode": "a",
            "maxBytes": 20 << 20,
            "backupCount": 10,
        },
    },
    "loggers": {
        "root": {"level": "INFO", "handlers": ["logFileHandler"]},
        **{name: {"level": "WARNING"} for name in _QUIET},
    },
}


def privacy_scope(result_filters: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Returns the one scope every job runs in, with the filters its results go through."""
    return {"scopes": [{"name": "fedmat", "task_result_filters": list(result_filters)}], "default_scope": "fedmat"}


def party_settings(consortium: str, host: str, port: int, party: str) -> dict[str, bytes]:
    """The settings of a party that do not depend on where it keeps them."""
    made = {
        f"{STARTUP}/fed_client.json": fed_client(consortium, host, port, party),
        f"{LOCAL}/resources.json": client_resources(),
        f"{LOCAL}/authorization.json": AUTHORIZATION,
        f"{LOCAL}/log_config.json": LOGGING,
    }
    return {name: files.json_bytes(value) for name, value in made.items()}


def party_privacy(kind: str, home: Path) -> bytes:
    """What every job at a party goes through, whatever the job says: a site's outbound filter, which applies its policy."""
    own = {"path": "fedmat.federation.flare.OutboundFilter", "args": {"home": str(home)}}
    return files.json_bytes(privacy_scope((own,) if kind == "site" else ()))
