"""The page's charts with their captions, and the small tables next to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from anyrank.report import figures, words
from anyrank.report.figures import Series
from anyrank.report.groups import Group, metric_names, tells_accuracy
from anyrank.report.runs import Run
from anyrank.report.style import cut, heat_gradient, partition_colors


def learning(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Accuracy, where there is one, and loss over the rounds, with a ring at each idle round."""
    spread, shown = _spread_note(groups) + _ring_note(groups), []
    if tells_accuracy(groups):
        accuracy = [_ringed(group, "accuracy") for group in groups]
        alt = "Accuracy over the rounds, one line per method"
        told = f"Higher is better: accuracy of {_scored(groups)} on held-out examples after each round{spread}"
        shown.append(_chart(figures.lines(accuracy, "Accuracy, %", "round", alt, percent=True), told + _zoom_note(accuracy)))
    loss = [_ringed(group, "loss") for group in groups]
    alt = "Loss over the rounds, one line per method"
    told = f"Lower is better: loss of {_scored(groups)} on {'the same' if shown else 'held-out'} examples{spread}"
    return [*shown, _chart(figures.lines(loss, "Loss", "round", alt), told + _zoom_note(loss))]


def _scored(groups: Sequence[Group]) -> str:
    """The model that scores are of."""
    by_clients = {group.by_clients for group in groups}
    if by_clients == {True}:
        return "the models that clients have, each"
    return "the global model" if by_clients == {False} else "the global model, or of the models that clients have,"


def _ringed(group: Group, name: str) -> Series:
    return replace(group.series(name, f"start_{name}"), rings=np.array(group.idle, dtype=float))


def _ring_note(groups: Sequence[Group]) -> str:
    idle = [group for group in groups if group.idle]
    seeds = " with any of the seeds" if any(len(group.runs) > 1 for group in idle) else ""
    return f" Rings: rounds that were idle{seeds}." if idle else ""


def metrics(groups: Sequence[Group]) -> dict[str, Any] | None:
    """A chart over the rounds for each metric of one number, and a table for each that has one for each label."""
    shown = []
    for name in metric_names(groups):
        lines = [line for group in groups if len((line := group.series(name, "start_metrics")).x)]
        if lines:
            svg = figures.lines(lines, cut(name, 40), "round", f"{name} over the rounds, one line per method")
            shown.append(_chart(svg, f"{name} on held-out examples after each round{_spread_note(groups)}" + _zoom_note(lines)))
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.by_label)
    tables = [_label_table(groups, name) for name in names]
    return {"charts": shown, "tables": tables} if shown or tables else None


_MOST_LABELS = 24  # rows of a table by label; the rest is said to be higher


def _label_table(groups: Sequence[Group], name: str) -> dict[str, Any]:
    """One row per label, the lowest mean over the methods first; with a single method also a bar, relative to the largest."""
    having = [group for group in groups if any(name in run.by_label for run in group.runs)]
    labels = dict.fromkeys(label for group in having for run in group.runs for label in run.by_label.get(name, ()))
    stats = {label: [group.label_stat(name, label) for group in having] for label in labels}
    means = {label: float(np.mean([stat.mean for stat in row if stat])) for label, row in stats.items()}
    order = sorted(labels, key=lambda label: means[label])
    largest = max(max(means.values()), 1e-12)
    rows = [
        {
            "label": label,
            "cells": [stat.text(3) if stat else "–" for stat in stats[label]],
            "bar": round(100 * max(means[label], 0.0) / largest) if len(having) == 1 else None,
        }
        for label in order[:_MOST_LABELS]
    ]
    heads = [(group.label, group.style) for group in having]
    return {"name": name, "labels": heads, "rows": rows, "more": max(len(order) - _MOST_LABELS, 0)}


def collapse(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Energy beyond the minimum rank, and effective rank, over the rounds, for the labels that have them."""
    charts = []
    series = [line for group in groups if group.mixed and len((line := group.series("collapse")).x)]
    if series:
        log = figures.wants_log(series)
        alt = "Share of the update's energy beyond the minimum rank over the rounds, one line per method"
        told = "A falling line is rank collapse: what only the larger ranks hold is being lost."
        told += " The axis is logarithmic: a straight falling line is a decay by the same factor each round." if log else ""
        svg = figures.lines(series, "Energy beyond the minimum rank, %", "round", alt, percent=True, log=log, from_zero=True)
        charts.append(
            _chart(
                svg,
                told + _spread_note(groups, " "),
            )
        )
    series = [line for group in groups if len((line := group.series("effective_rank")).x)]
    if series:
        svg = figures.lines(
            series,
            "Effective rank",
            "round",
            "Effective rank of the global update over the rounds, one line per method",
            from_zero=True,
        )
        told = "Higher means that the global update uses more directions (the exponential of its energy's entropy)."
        charts.append(_chart(svg, told + _spread_note(groups, " ")))
    return charts


def spectra(groups: Sequence[Group]) -> dict[str, Any] | None:
    """One heatmap per label, of its first seed; all on one colour scale."""
    shown = [(group, run) for group in groups if (run := group.runs[0]).spectrum.size and np.nansum(run.spectrum) > 0]
    if not shown:
        return None
    floor = _floor([run.spectrum for _, run in shown])
    minis = []
    for group, run in shown:
        alt = f"Singular values of {group.label} over the rounds, by rank partition"
        minis.append(
            {
                "label": group.label,
                "style": group.style,
                "svg": figures.heatmap(run.spectrum, run.rounds, group.levels, floor, alt),
            }
        )
    return {
        "minis": minis,
        "gradient": heat_gradient(),
        "floor": f"{10**floor:.2g}",
        "middle": f"{10 ** (floor / 2):.2g}",
    }


def _floor(spectra: Sequence[np.ndarray]) -> float:
    """The dark end of the colour scale, a power of ten from -4 to -1: low enough for all but the smallest 2 % of the ratios."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.concatenate([np.log10(spectrum / spectrum[:, :1]).ravel() for spectrum in spectra])
    ratios = ratios[np.isfinite(ratios)]
    return float(np.clip(math.floor(np.quantile(ratios, 0.02)), -4, -1)) if len(ratios) else -4.0


def partitions(groups: Sequence[Group]) -> dict[str, Any] | None:
    """One stacked chart per label: the mean share of the energy in each rank partition, with a legend for each set of ranks."""
    minis, legends = [], {}
    for group in groups:
        tables = [table for run in group.runs if (table := energy_by_round(run, group.levels))]
        shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        if not shared or not group.mixed:
            continue
        energy = np.mean([[table[number] for number in shared] for table in tables], axis=0).T
        parts = figures.bands(group.levels, max(run.spectrum.shape[1] for run in group.runs))[: len(energy)]
        names = tuple(f"{low + 1}–{high}" if high > low + 1 else f"{high}" for low, high in parts)
        legends.setdefault(names, []).append(group.label)
        alt = f"Shares of the energy of {group.label} by rank partition over the rounds"
        minis.append({"label": group.label, "style": group.style, "svg": figures.stack(energy, np.array(shared), alt)})
    keys = [
        {
            "of": words.joined(labels) if len(legends) > 1 else "",
            "parts": list(zip(names, partition_colors(len(names)), strict=True)),
        }
        for names, labels in legends.items()
    ]
    return {"minis": minis, "legends": keys} if minis else None


def energy_by_round(run: Run, levels: Sequence[int]) -> dict[int, list[float]]:
    """`{round: [partitions]}`: the share of the energy between two neighbouring ranks."""
    energy = run.spectrum**2
    total = energy.sum(axis=1)
    parts = figures.bands(levels, energy.shape[1])
    return {
        int(number): [float(row[low:high].sum() / whole) for low, high in parts]
        for number, row, whole in zip(run.rounds, energy, total, strict=True)
        if whole > 0
    }


def layers(groups: Sequence[Group]) -> dict[str, Any] | None:
    """Energy beyond the minimum rank in the last round, layer by layer, of each label's first seed, in %."""
    shown = [group for group in groups if group.mixed and group.levels and group.runs[0].layers]
    names = list(dict.fromkeys(name for group in shown for name in group.runs[0].layers))
    if not names or len(names) == 1:
        return None
    rows = [(name, [_beyond(group.runs[0].layers.get(name), group.levels[0]) for group in shown]) for name in names]
    return {"labels": [(group.label, group.style) for group in shown], "rows": rows}


def _beyond(values: np.ndarray | None, rank: int) -> str:
    if values is None or not (total := float((values**2).sum())):
        return "–"
    return words.places(100 * float((values[rank:] ** 2).sum()) / total, 2)


def traffic(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Megabytes up and down, and accuracy against uploaded megabytes."""
    rows = [
        (g.label, g.style, up.mean / 1e6, g.stat("download_bytes").mean / 1e6)
        for g in groups
        if (up := g.stat("upload_bytes")) and g.stat("download_bytes")
    ]
    if not rows:
        return []
    charts = [
        _chart(
            figures.bars(rows, "Megabytes over the whole run", "Megabytes up and down in the whole run, two bars per method"),
            "Solid: uploaded by all clients. Pale: downloaded by all clients. Shorter means less traffic.",
        )
    ]
    series = [line for group in groups if len((line := against_upload(group)).x)]
    if series and tells_accuracy(groups):
        alt = "Accuracy against megabytes uploaded so far, one line per method"
        svg = figures.lines(series, "Accuracy, %", "megabytes uploaded so far, all clients", alt, percent=True)
        charts.append(
            _chart(
                svg,
                f"Further left and higher is better: the accuracy after this many uploaded megabytes.{_zoom_note(series)}",
            )
        )
    return charts


def against_upload(group: Group) -> Series:
    """Accuracy (or else loss) over the megabytes that all clients have uploaded so far."""
    line = group.series("accuracy" if tells_accuracy([group]) else "loss")
    sums = []
    for run in group.runs:
        if len(run.rounds):
            total = np.cumsum(np.nan_to_num(run.columns["upload_bytes"])) / 1e6
            sums.append(np.interp(line.x, run.rounds, total))
    return replace(line, x=np.mean(sums, axis=0)) if sums and len(line.x) else line


def privacy(groups: Sequence[Group]) -> dict[str, Any] | None:
    """The ε spent; `None` if no run was private."""
    private = [(group, stat) for group in groups if (stat := group.stat("epsilon"))]
    if not private:
        return None
    series = [line for group, _ in private if len((line := group.series("epsilon")).x)]
    svg = figures.lines(series, "ε spent", "round", "Privacy spent over the rounds, one line per method") if series else None
    return {
        "rows": [(group.label, group.style, stat.text(3)) for group, stat in private],
        "chart": _chart(svg, "Lower is more private: ε spent from the first round up to this one.") if svg else None,
        "without": words.joined(group.label for group in groups if not group.stat("epsilon")),
    }


def _chart(svg: Any, caption: str) -> dict[str, Any]:
    return {"svg": svg, "caption": caption}


def _zoom_note(series: Sequence[Series]) -> str:
    return " The axis does not show the steep start." if figures.zoomed(series) else ""


def _spread_note(groups: Sequence[Group], lead: str = ". ") -> str:
    return (
        f"{lead}Shaded: ± one standard deviation over seeds."
        if any(len(group.runs) > 1 for group in groups)
        else "." * (lead == ". ")
    )
