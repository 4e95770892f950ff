"""Open a task's model for training, after every check that needs it: one function for this process and for a worker."""

from __future__ import annotations

from anyrank.config.sections import HANDED_IN, Config
from anyrank.tasks import people
from anyrank.tasks.base import Task
from anyrank.training import private_examples, probe
from anyrank.training.lora import LoraModel


def open_model(task: Task, config: Config, largest_rank: int, train: frozenset[str]) -> tuple[LoraModel, str]:
    """The model, and how clients may be stacked in it (`auto`, `always`, `never`). Raises `ModelError`.

    `train`: the factors that the run's method trains.
    """
    model = LoraModel(task, config.train.gradient_checkpointing)
    stacking = config.run.stacking
    if config.sites and stacking == "auto":
        stacking = "never"  # named sites train as each would on its own machine
    try:
        model.check_rank(largest_rank)
        if config.model.task == HANDED_IN or config.model.file:
            private = config.privacy.level != "none"
            probe.check(model, private)
            stacking = (
                "never" if stacking == "auto" and (private or not probe.stacks(model, config.train.batch_size)) else stacking
            )
        if config.privacy.level == "person":
            model.people = people.of(task, config.data)
        if config.privacy.draws_units:
            private_examples.check(model, private_examples.trained_by(train))
    except BaseException:
        model.close()
        raise
    return model, stacking
