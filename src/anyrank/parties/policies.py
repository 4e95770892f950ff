"""What a party's engine process may do: its own authorization and resources, by its role. No NVFlare here.

They are not taken from a kit: `anyrank deploy start` writes them from this file, so that whoever made the kit, or holds the
server, cannot widen them. NVFlare reads them once, when a process starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anyrank.config.federation import OWNER, VIEWER
from anyrank.engines.nvflare.job import SILENCE_S

SERVER, SITE = "server", "site"
RUNNING = (SERVER, SITE)  # roles that have a process
ALLOWED_CLASSES = ("anyrank.",)  # the dot at the end: everything below the package; without it, one class of that name
STATE = "state"  # the folder of a kit in which everything is written that must outlive a process
SERVER_FILE = "local/server.toml"  # which says where runs lie
RUNS = "runs"
ENGINE_ROLES = {OWNER: "project_admin", VIEWER: "member"}
_ASK = "app_command"  # NVFlare's word for a question to a running job: ours reply how the run stands
_NO_RIGHTS = ("byoc", "clone_job", "shell_commands", "server-predeployed-flwr")
_LAUNCHERS = {  # a site's starts the process of a job again, so that its end does not fail the job of all
    SERVER: "nvflare.app_common.job_launcher.server_process_launcher.ServerProcessJobLauncher",
    SITE: "anyrank.engines.nvflare.launcher.Launcher",
}
_MOST_JOBS = 16  # at the same time at one server: each has a process of its own there
_TURNS = {"id": "anyrank_turns", "path": "anyrank.engines.nvflare.turns.Turns", "args": {}}  # a site has one job at a time
_STORAGE = "nvflare.app_common.storages.filesystem_storage.FilesystemStorage"


def authorization(role: str) -> dict[str, Any]:
    """Who may do what at a server or a site. Nobody may bring code, run shell commands or clone jobs; a role that is not named
    has no right at all. A site is not restarted, shut down or reconfigured from outside."""
    owner = {
        **dict.fromkeys(("submit_job", "manage_job", "download_job", "view", _ASK), "any"),
        "operate": "any" if role == SERVER else "none",
        **dict.fromkeys(_NO_RIGHTS, "none"),
    }
    viewer = {
        "view": "any",
        _ASK: "any",
        **dict.fromkeys(("submit_job", "manage_job", "download_job", "operate", *_NO_RIGHTS), "none"),
    }
    return {"format_version": "1.0", "permissions": {ENGINE_ROLES[OWNER]: owner, ENGINE_ROLES[VIEWER]: viewer}}


def resources(role: str, kit: Path) -> dict[str, Any]:
    """The resources of a server or a site whose kit lies at `kit`: classes of this package alone, no log leaves, and all
    storage lies in the kit's own state folder."""
    common = {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": list(ALLOWED_CLASSES),
        "allow_log_streaming": False,
    }
    launcher = {"id": "process_launcher", "path": _LAUNCHERS[role], "args": {}}
    return common | (_of_server(kit.absolute(), launcher) if role == SERVER else _of_site(launcher))


def _of_server(kit: Path, launcher: dict[str, Any]) -> dict[str, Any]:
    snapshots = {"path": _STORAGE, "args": {"root_dir": str(kit / STATE / "snapshots"), "uri_root": "/"}}
    jobs = {"uri_root": str(kit / STATE / "jobs"), "job_store_id": "job_store"}
    return {
        "servers": [
            {
                "admin_storage": f"{STATE}/transfer",
                "max_num_clients": 1_000,
                "heart_beat_timeout": 600,
                "download_job_url": "http://localhost/",  # NVFlare asks for one; nothing is served there
                "admin_timeout": 10.0,
            }
        ],
        "snapshot_persistor": {
            "path": "nvflare.app_common.state_persistors.storage_state_persistor.StorageStatePersistor",
            "args": {"uri_root": "/", "storage": snapshots},
        },
        "components": [
            {
                "id": "job_scheduler",
                "path": "nvflare.app_common.job_schedulers.job_scheduler.DefaultJobScheduler",
                "args": {"max_jobs": _MOST_JOBS, "max_schedule_count": 1_000_000, "max_schedule_interval": 30.0},
            },
            {"id": "job_manager", "path": "nvflare.apis.impl.job_def_manager.SimpleJobDefManager", "args": jobs},
            {"id": "job_store", "path": _STORAGE},
            _TURNS,
            launcher,
        ],
    }


def _of_site(launcher: dict[str, Any]) -> dict[str, Any]:
    manager = {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0, "expiration_period": 300}
    return {
        # A job can only raise the last one: without it, a site waits for 300 s for a reply that was lost with its connection.
        "client": {"retry_timeout": 30, "compression": "Gzip", "communication_timeout": SILENCE_S},
        "components": [
            {
                "id": "resource_manager",
                "path": "nvflare.app_common.resource_managers.gpu_resource_manager.GPUResourceManager",
                "args": manager,
            },
            {
                "id": "resource_consumer",
                "path": "nvflare.app_common.resource_consumers.gpu_resource_consumer.GPUResourceConsumer",
                "args": {},
            },
            launcher,
        ],
    }


def files(role: str, kit: Path) -> dict[str, dict[str, Any]]:
    """The files that `start` writes into a kit, by their path in it: tables for JSON, or for TOML where the name says so."""
    if role not in RUNNING:
        return {}
    both = {"local/authorization.json": authorization(role), "local/resources.json": resources(role, kit)}
    return both | ({SERVER_FILE: {"state": f"{STATE}/{RUNS}"}} if role == SERVER else {})
