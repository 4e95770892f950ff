"""Merge adapters of any ranks without training, and inspect adapters."""

from anyrank.aggregation.aggregates import AggregateResult, aggregate, aggregate_folders
from anyrank.aggregation.merge import infer_scaling

__all__ = ["AggregateResult", "aggregate", "aggregate_folders", "infer_scaling"]
