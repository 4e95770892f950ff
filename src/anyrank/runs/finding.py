"""Which runs lie in a folder, and whether one came to its end."""

from __future__ import annotations

from pathlib import Path

from anyrank.config.sections import Config
from anyrank.errors import AnyRankError, RunError
from anyrank.runs import seal
from anyrank.runs.folder import RunDir
from anyrank.runs.matching import stored_config
from anyrank.runs.names import COMPARISON, CONFIG, RESULT, SUMMARY, read_object


def is_finished(path: Path) -> bool:
    """Whether the run in the folder came to its end."""
    return (path / SUMMARY).is_file()


def finished(path: Path) -> Config:
    """The configuration of the finished run in the folder. Raises `RunError` if there is none, or if it has not ended."""
    if not (path / CONFIG).is_file():
        what = f"no {CONFIG} in it" if path.is_dir() else "no such folder"
        raise RunError(f"{path}: {what}; expected the folder of a finished run")
    config = stored_config(path)
    if not is_finished(path):
        raise RunError(f"{path}: {unfinished(path)}")
    return config


def unfinished(path: Path) -> str:
    """What is wrong with a folder whose run did not come to its end, and how to continue."""
    if (path / RESULT).is_file():  # of a federation, at one of its sites
        return "is half-written; the owner of the federation sends it again by anyrank deploy resume"
    return f"the run is not finished; finish it by anyrank run {path / CONFIG} --out {path} --resume"


def find_runs(folder: Path) -> list[Path]:
    """The folder if it holds a run, else the runs below it: in a comparison's own order, or sorted, at most two levels down."""
    if (folder / CONFIG).is_file():
        return [folder]
    if (folder / COMPARISON).is_file():
        listed = read_object(folder / COMPARISON).get("runs")
        if not isinstance(listed, list) or not all(isinstance(run, str) for run in listed):
            raise RunError(f"{folder / COMPARISON}: expected a list of runs in it; name the run folders one by one")
        return [folder / run for run in listed if (folder / run / CONFIG).is_file()]
    found = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{CONFIG}"))
    if not found:
        raise RunError(f"{folder}: expected a run folder or a folder of runs ({CONFIG} in it), found none")
    return found


def is_done(path: Path, config: Config) -> bool:
    """Whether the run in the folder came to its end by this configuration and the files that this names, and its own files are
    what it left. What else it is, `RunDir.check` says."""
    if not is_finished(path):
        return False
    try:
        RunDir.check(path, config, resume=True)
        return stored_config(path).run.rounds == config.run.rounds and seal.fits(path)
    except AnyRankError:
        return False
