"""Reports of runs, from their folders alone."""

from anyrank.report.build import build, figure, study_figure

__all__ = ["build", "figure", "study_figure"]
