"""What each key of an `adapter_config.json` means for a merge: one table, of every field of `LoraConfig` in PEFT 0.15 to 0.21.

A key that is set and is not in the table is refused. It may change what the adapter applies, and nobody would see that in the
merged weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from anyrank.errors import AdapterError, shortened


class Use(Enum):
    """What a merge does with a key."""

    READ = "its value is used"
    HARMLESS = "it says how the adapter was trained or is run, not what it applies"
    SAME = "it must have one value in all adapters of a merge"
    REFUSED = "such an adapter applies something else than scaling * B @ A"


@dataclass(frozen=True)
class Option:
    """`unset`: the values that mean the option is off; `why`: of a refused one, what it applies."""

    use: Use
    why: str = ""
    unset: tuple[Any, ...] = (None, False, {}, [], "")

    def is_set(self, value: Any) -> bool:
        return not any(type(value) is type(off) and value == off for off in self.unset)


_READ, _HARMLESS, _SAME = Option(Use.READ), Option(Use.HARMLESS), Option(Use.SAME)


def _refused(why: str) -> Option:
    return Option(Use.REFUSED, why)


OPTIONS: Mapping[str, Option] = {
    # the adapter itself
    **dict.fromkeys(("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"), _READ),
    **dict.fromkeys(("target_modules", "modules_to_save", "bias", "task_type", "base_model_name_or_path"), _READ),
    "init_lora_weights": _READ,  # see `check_start`
    # which modules are adapted: the keys of the weights say that, too
    **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"), _HARMLESS),
    # how it was trained
    **dict.fromkeys(("lora_dropout", "inference_mode", "runtime_config", "velora_config", "qalora_group_size"), _HARMLESS),
    # of starts: `init_lora_weights` decides
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), _HARMLESS),
    # where it is from
    **dict.fromkeys(("revision", "auto_mapping", "peft_version", "megatron_core", "ensure_weight_tying"), _HARMLESS),
    # the model that it is for
    "layer_replication": _SAME,
    "alora_invocation_tokens": _SAME,
    # what a merge of factors would lose
    "use_dora": _refused("the magnitude of each column of the weight is trained, too"),
    "use_qalora": _refused("its inputs are averaged in groups"),
    "use_bdlora": _refused("its factors are blocks"),
    "lora_bias": _refused("B has a bias"),
    "target_parameters": _refused("its factors are those of the experts of a layer"),
    "trainable_token_indices": _refused("rows of the embedding are trained beside it"),
    "arrow_config": _refused("it chooses between adapters for each token"),
    "monteclora_config": _refused("its factors are drawn at random"),
    "kasa_config": _refused("it changes the base model, and has singular values between B and A"),
    "megatron_config": _refused("its layers are shares of a model that is divided between devices"),
}

# Starts after which B @ A is 0, or small, on the base model as it is.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica", "true", "false")
# Starts that take B @ A out of the base model, which is another one then.
_CHANGE_BASE = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga")


def check(config: Mapping[str, Any], where: str) -> None:
    """Raise `AdapterError` if the adapter of `config` applies more than `scaling * B @ A`, or may do so."""
    for key, value in config.items():
        option = OPTIONS.get(key, _UNKNOWN)
        if option is _UNKNOWN and option.is_set(value):
            raise AdapterError(
                f"{where}: {shortened(key, 100)!r} is set and is not an option of LoRA in PEFT 0.15 to 0.21, so what it does "
                "is not known; if it does not change what the adapter applies, remove it from the file"
            )
    refused = [key for key, option in OPTIONS.items() if option.use is Use.REFUSED and option.is_set(config.get(key))]
    if refused:
        raise AdapterError(
            f"{where}: {', '.join(refused)} is set, and such an adapter does more than scaling * B @ A "
            f"({OPTIONS[refused[0]].why}); train without it"
        )
    _check_start(config.get("init_lora_weights"), where)


_UNKNOWN = Option(Use.READ)


def _check_start(start: Any, where: str) -> None:
    """PiSSA and its like begin with a part of the base model in B @ A, and take it out of the base model."""
    if isinstance(start, str) and _CHANGE_BASE.fullmatch(start.lower()):
        raise AdapterError(
            f"{where}: init_lora_weights = {start!r} changed the base model when training began, so that this is no adapter "
            "of the base model; convert it: save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START), where "
            "START is the adapter as it was before training"
        )
    known = start.lower() if isinstance(start, str) else start
    if not any(type(known) is type(each) and known == each for each in _STARTS):
        raise AdapterError(
            f"{where}: init_lora_weights = {shortened(repr(start), 100)} is not known to leave the base model as it is; "
            "train with another start"
        )


def differing(configs: Mapping[str, Mapping[str, Any]]) -> tuple[str, str, str] | None:
    """The first key that must have one value in all `configs` (by client) and does not, with two clients that differ."""
    (first, known), *others = configs.items()
    for key in (key for key, option in OPTIONS.items() if option.use is Use.SAME):
        for other, config in others:
            if _value(known, key) != _value(config, key):
                return key, first, other
    return None


def _value(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if not OPTIONS[key].is_set(value):
        return None
    return json.dumps(value)  # tuples are lists in a file
