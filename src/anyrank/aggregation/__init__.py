"""Merging adapters of any ranks without training, and looking into them."""

from anyrank.aggregation.aggregates import AggregateResult, aggregate, aggregate_folders
from anyrank.aggregation.merge import infer_scaling

__all__ = ["AggregateResult", "aggregate", "aggregate_folders", "infer_scaling"]
