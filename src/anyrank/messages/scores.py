"""Scores as a frame: results on held-out examples, example by example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anyrank.errors import FrameError, shortened
from anyrank.messages.body import Parts, check_type, expect, fields
from anyrank.messages.frame import Frame, Header
from anyrank.messages.records import Scores

KIND = "scores"
_ARRAYS = ("correct", "losses", "labels", "predictions", "scores", "targets")


def scores_frame(scores: Scores, run: str = "", round: int = 0, client: str = "") -> Frame:
    """A model's results on held-out examples, example by example. Figures may be NaN: they travel as an array."""
    arrays = {key: np.asarray(value) for key in _ARRAYS if (value := getattr(scores, key)) is not None}
    numbers: list[float] = []
    figures = {name: _placed(value, numbers) for name, value in scores.figures.items()}
    sites = {name: {metric: _placed(value, numbers) for metric, value in own.items()} for name, own in scores.sites.items()}
    arrays["figures"] = np.array(numbers, np.float64)
    body = {"names": list(scores.names), "figures": figures, "sites": sites}
    return Frame(Header(KIND, run, round, client, body), arrays)


def scores_of(frame: Frame) -> Scores:
    expect(frame, KIND)
    names, figures, sites = fields("scores", dict(frame.header.body), names=list, figures=dict, sites=dict)
    for name in names:
        check_type("scores, names", name, str)
    for name, own in sites.items():
        check_type(f"scores, site {shortened(name, 100)}", own, dict)
    parts = Parts(frame)
    arrays = {key: parts.array(key) if key in parts else None for key in _ARRAYS}
    numbers = parts.array("figures")
    parts.finish()
    losses, labels, correct = arrays["losses"], arrays["labels"], arrays["correct"]
    if losses is None or labels is None or losses.dtype != np.float64 or losses.ndim != 1 or numbers.ndim != 1:
        raise FrameError("scores: expected losses [n] of float64 and labels, got others")
    if correct is not None and correct.dtype != bool:
        raise FrameError(f"scores, correct: expected bool, got {correct.dtype}")
    for key, array in arrays.items():
        if array is not None and array.shape[:1] != losses.shape:
            raise FrameError(f"scores, {key}: expected {len(losses)} examples, got shape {list(array.shape)}")
    values = {name: _taken(f"scores, figure {name}", place, numbers) for name, place in figures.items()}
    by_site = {
        name: {
            metric: place if place is None else _taken(f"scores, figure {metric}", place, numbers)
            for metric, place in own.items()
        }
        for name, own in sites.items()
    }
    return Scores(**arrays, names=tuple(names), figures=values, sites=by_site)


def _placed(value: float | Mapping[str, float] | None, numbers: list[float]) -> int | dict[str, int] | None:
    """Put one figure, or one per label, into `numbers`; its place there. `None`, that there is none, stays `None`."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {label: _placed(each, numbers) for label, each in value.items()}
    numbers.append(float(value))
    return len(numbers) - 1


def _taken(where: str, place: Any, numbers: np.ndarray) -> float | dict[str, float]:
    if isinstance(place, dict):
        return {label: _number(where, each, numbers) for label, each in place.items()}
    return _number(where, place, numbers)


def _number(where: str, place: Any, numbers: np.ndarray) -> float:
    if type(place) is not int or not 0 <= place < len(numbers):
        raise FrameError(f"{where}: expected a place among {len(numbers)} numbers, got {shortened(repr(place), 100)}")
    return float(numbers[place])
