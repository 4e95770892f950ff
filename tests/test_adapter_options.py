"""What PEFT's options mean to a merge, held against the installed PEFT and through its own forward pass."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from anyrank import Adapter, ClientUpdate, aggregate, methods
from anyrank.adapter.options import OPTIONS, Use
from anyrank.aggregation.aggregates import aggregate_folders
from anyrank.errors import AdapterError, AnyRankError

QV = ["q_proj", "v_proj"]


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()


def trained(seed: int, base: LlamaForCausalLM | None = None, **options: Any) -> PeftModel:
    """PEFT's model after training: each trained number has moved."""
    model = get_peft_model(base or llama(), LoraConfig(**{"target_modules": QV} | options))
    draw = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def saved(folder: Path, seed: int, **options: Any) -> dict[str, Tensor]:
    """An adapter in `folder`; the weights that PEFT makes of it, in float64."""
    model = trained(seed, **options)
    model.save_pretrained(folder)
    return weights(model)


def weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: tensor.detach().double() for name, tensor in model.merge_and_unload().state_dict().items()}


def loaded(merge: Path, folder: str = "global", tied: bool = False) -> dict[str, Tensor]:
    """The weights that a user has who follows the documentation: the base update first, then the adapter."""
    base = llama(tied)
    if (merge / "base-update").exists():
        base = PeftModel.from_pretrained(base, merge / "base-update").merge_and_unload()
    return weights(PeftModel.from_pretrained(base, merge / folder))


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of the change of all weights, as a share of the wanted change."""
    start = {name: tensor.double() for name, tensor in llama().state_dict().items()}
    missed = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return (missed / sum(float((wanted[name] - start[name]).square().sum()) for name in wanted)) ** 0.5


def mean(*clients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: sum(client[name] for client in clients) / len(clients) for name in clients[0]}


# --- the table ---------------------------------------------------------------------------------------------------------


def test_every_field_of_the_installed_peft_is_in_the_table() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= OPTIONS.keys(), "a newer PEFT has options that nobody has looked at"


def test_each_variant_of_lora_that_peft_names_is_refused() -> None:
    """PEFT marks options that make another forward pass. VeLoRA changes the backward pass, aLoRA where the update applies."""
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    refused = {name for name, option in OPTIONS.items() if option.use is Use.REFUSED}
    assert variants - refused == {"velora_config", "alora_invocation_tokens"} & variants
    assert {"use_dora", "lora_bias", "trainable_token_indices", "target_parameters"} <= refused


def test_an_option_at_its_default_in_peft_is_no_obstacle(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1, r=2)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert {name for name, option in OPTIONS.items() if option.use is Use.REFUSED} & config.keys(), "PEFT writes them out"
    assert Adapter.load(tmp_path / "a").ranks


SET: dict[str, Any] = {
    "use_dora": True, "use_qalora": True, "use_bdlora": {"nblocks": 2}, "lora_bias": True, "target_parameters": ["mlp.w"],
    "trainable_token_indices": [1], "arrow_config": {"top_k": 2}, "monteclora_config": {"x": 1}, "kasa_config": {"x": 1},
    "megatron_config": {"x": 1},
}  # fmt: skip


def test_each_refused_option_has_a_value_below() -> None:
    assert SET.keys() == {name for name, option in OPTIONS.items() if option.use is Use.REFUSED}


def edited(folder: Path, seed: int = 1, **values: Any) -> Path:
    saved(folder, seed, r=2)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize("key", SET)
def test_a_refused_option_is_named_with_what_it_does(key: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=rf"{key} is set, and such an adapter does more than scaling \* B @ A \(.+\)"):
        Adapter.load(edited(tmp_path / "a", **{key: SET[key]}))


UNKNOWN = (True, 1, 0.5, "on", ["a"], {"a": 1})


@pytest.mark.parametrize("value", UNKNOWN, ids=str)
def test_an_unknown_option_that_is_set_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="'use_somethingnew' is set and is not an option of LoRA"):
        Adapter.load(edited(tmp_path / "a", use_somethingnew=value))


@pytest.mark.parametrize("value", [None, False, [], {}, ""], ids=str)
def test_an_unknown_option_that_is_off_changes_nothing(value: Any, tmp_path: Path) -> None:
    assert Adapter.load(edited(tmp_path / "a", use_somethingnew=value)).ranks


# --- starts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "lora_ga"])
def test_a_start_that_changes_the_base_model_is_refused_and_its_converted_folder_merges(start: str, tmp_path: Path) -> None:
    folders, wanted = [], []
    for seed, rank in ((1, 2), (2, 4)):
        model = get_peft_model(llama(), LoraConfig(r=rank, target_modules=QV, init_lora_weights=start))
        model.peft_config["default"].init_lora_weights = True  # of the copy at the start, as PEFT's example writes it
        model.save_pretrained(tmp_path / f"start-{seed}")
        model.peft_config["default"].init_lora_weights = start
        draw = torch.Generator().manual_seed(seed)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
        model.save_pretrained(tmp_path / f"raw-{seed}")
        with pytest.raises(AdapterError, match=rf"init_lora_weights = '{start}' changed the base model.*convert it"):
            Adapter.load(tmp_path / f"raw-{seed}")
        if start == "lora_ga":
            return  # PEFT converts it, but estimates gradients first, which needs data
        folders.append(tmp_path / f"client-{seed}")
        model.save_pretrained(folders[-1], path_initial_model_for_weight_conversion=str(tmp_path / f"start-{seed}"))
        wanted.append(weights(model))
    aggregate_folders(folders, "flora", tmp_path / "merge")
    assert distance(loaded(tmp_path / "merge"), mean(*wanted)) < 1e-5


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_a_start_that_leaves_the_base_model_as_it_is_merges(start: Any, tmp_path: Path) -> None:
    wanted = [saved(tmp_path / str(seed), seed, r=2 * seed, init_lora_weights=start) for seed in (1, 2)]
    aggregate_folders([tmp_path / "1", tmp_path / "2"], "flora", tmp_path / "merge")
    assert distance(loaded(tmp_path / "merge"), mean(*wanted)) < 1e-6


@pytest.mark.parametrize("start", ["PISSA", "corda", "loftq", "newest", 3, ["pissa"]], ids=str)
def test_a_start_that_is_not_known_is_refused(start: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="init_lora_weights = "):
        Adapter.load(edited(tmp_path / "a", init_lora_weights=start))


@pytest.mark.parametrize(
    ("key", "one", "other"), [("layer_replication", [[0, 2]], None), ("alora_invocation_tokens", [1], [2])]
)
def test_an_option_of_the_model_is_the_same_in_all(key: str, one: Any, other: Any, tmp_path: Path) -> None:
    first, second = edited(tmp_path / "a", 1, **{key: one}), edited(tmp_path / "b", 2, **{key: other})
    with pytest.raises(AdapterError, match=f"{key}: .*a has another value than .*b"):
        aggregate([first, second], "flora")
    same = edited(tmp_path / "c", 3, **{key: one})
    assert aggregate([first, same], "flora").adapter.config[key] == one


# --- embeddings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join)
@pytest.mark.parametrize("method", ["flora", "fedex", "flexlora"])
def test_embeddings_that_are_adapted_keep_their_update(method: str, targets: list[str], tied: bool, tmp_path: Path) -> None:
    """PEFT saves their base matrix, and puts it in place of the base model's when it loads: then a merged update is gone."""
    clients = []
    for seed in (1, 2):
        model = trained(seed, llama(tied), r=3, target_modules=targets)
        model.save_pretrained(tmp_path / str(seed))
        assert any(name.endswith("base_layer.weight") for name in _keys(tmp_path / str(seed))), "PEFT saved the matrix"
        clients.append(weights(model))
    aggregate_folders([tmp_path / "1", tmp_path / "2"], method, tmp_path / "merge", rank=6 if method == "flexlora" else 0)
    found, wanted = loaded(tmp_path / "merge", tied=tied), mean(*clients)
    start = {name: tensor.double() for name, tensor in llama(tied).state_dict().items()}
    changed = sum(float((wanted[name] - start[name]).square().sum()) for name in wanted)
    assert sum(float((found[name] - wanted[name]).square().sum()) for name in wanted) < 1e-10 * changed


def _keys(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return list(file.keys())


def test_base_matrices_that_differ_are_named(tmp_path: Path) -> None:
    """Each client enlarged its vocabulary, with random rows of its own: their updates are of different base models."""
    for seed in (1, 2):
        base = llama()
        torch.manual_seed(seed)
        base.resize_token_embeddings(44, mean_resizing=False)
        trained(seed, base, r=2, target_modules=["embed_tokens"]).save_pretrained(tmp_path / str(seed))
    with pytest.raises(AdapterError, match="different base weights below the layer that they adapt"):
        aggregate_folders([tmp_path / "1", tmp_path / "2"], "flora", tmp_path / "merge")
    assert not (tmp_path / "merge").exists()


def test_in_memory_and_on_disk_are_the_same_with_base_matrices(tmp_path: Path) -> None:
    for seed in (1, 2):
        saved(tmp_path / str(seed), seed, r=2 * seed, target_modules=["embed_tokens", "q_proj"])
    for method in ("flora", "raflora"):
        aggregate_folders([tmp_path / "1", tmp_path / "2"], method, tmp_path / method)
        result = aggregate([tmp_path / "1", tmp_path / "2"], method)
        result.adapter.save(tmp_path / f"{method}-memory" / "global")
        if result.base_update:
            result.base_update.save(tmp_path / f"{method}-memory" / "base-update")
        one, other = loaded(tmp_path / method), loaded(tmp_path / f"{method}-memory")
        assert all(torch.equal(one[name], other[name]) for name in one)


# --- absent layers, ranks of the result, distances ----------------------------------------------------------------------


def test_a_layer_that_a_client_lacks_is_its_silence(tmp_path: Path) -> None:
    """q and v of both clients; o of the second alone, whose update of it is the mean of those who have it."""
    one = saved(tmp_path / "a", 1, r=2)
    two = saved(tmp_path / "b", 2, r=4, target_modules=[*QV, "o_proj"])
    with pytest.raises(AdapterError, match=r"o_proj: .*b has it, .*a does not.*--absent silent"):
        aggregate_folders([tmp_path / "a", tmp_path / "b"], "flora", tmp_path / "merge")
    wanted = {name: two[name] if "o_proj" in name else (one[name] + two[name]) / 2 for name in one}
    for method, rank in (("flora", 0), ("flexlora", 6)):
        aggregate_folders([tmp_path / "a", tmp_path / "b"], method, tmp_path / method, absent="silent", rank=rank)
        assert distance(loaded(tmp_path / method), wanted) < 1e-6


@pytest.mark.parametrize("method", [name for name in methods.REGISTRY if not methods.REGISTRY[name].reference])
def test_silence_of_one_is_a_merge_without_it(method: str, tmp_path: Path) -> None:
    """In the layers that it lacks; whether it is there changes nothing else."""
    kind = methods.REGISTRY[method]
    if not kind.by_layer or kind.private or kind.train != frozenset("AB"):
        pytest.skip("this method does not merge folders of any A")
    for seed, targets in ((1, QV), (2, [*QV, "o_proj"]), (3, [*QV, "o_proj"])):
        saved(tmp_path / str(seed), seed, r=3, target_modules=targets)
    together = aggregate([tmp_path / "1", tmp_path / "2", tmp_path / "3"], method, absent="silent").adapter
    without = aggregate([tmp_path / "2", tmp_path / "3"], method).adapter
    for name in (name for name in together.layers if "o_proj" in name):
        assert torch.allclose(together.layers[name].delta(), without.layers[name].delta(), atol=1e-6)


def test_a_result_of_the_sum_of_ranks_is_the_mean_itself(tmp_path: Path) -> None:
    wanted = mean(*(saved(tmp_path / str(seed), seed, r=2 * seed) for seed in (1, 2)))
    folders = [tmp_path / "1", tmp_path / "2"]
    for rank in range(4, 7):
        done = aggregate_folders(folders, "flexlora", tmp_path / f"{rank}", ranks=[2], rank=rank)
        missed = distance(loaded(tmp_path / f"{rank}"), wanted)
        assert done["missed"]["global"] == pytest.approx(missed, rel=1e-4, abs=2e-7)
        assert done["missed"]["rank-2"] == pytest.approx(distance(loaded(tmp_path / f"{rank}", "rank-2"), wanted), rel=1e-4)
    assert missed < 1e-6
    for rank in (3, 7, -1, True, 10**9):
        with pytest.raises(AdapterError, match="rank: expected a rank from 4, the clients' largest, to 6, the sum"):
            aggregate_folders(folders, "flexlora", tmp_path / "none", rank=rank)


# --- what a client gets back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rbla", "raflora", "flexlora", "zeropad"])
def test_a_share_like_a_clients_adapter_fits_its_model_and_applies_the_same(method: str) -> None:
    """Ranks and alphas by layer, an alpha of its own: PEFT's model applies what the share says."""
    theirs = [
        {"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 16, "use_rslora": True},
        {"r": 3, "rank_pattern": {"layers.1.self_attn.q_proj": 1, "v_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    ]  # fmt: skip
    models = [trained(seed, **options) for seed, options in enumerate(theirs)]
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    adapters = [Adapter.from_state_dict(get_peft_model_state_dict(m), m.peft_config["default"]) for m in models]
    merged = aggregate([ClientUpdate(each, 1, f"c{place}") for place, each in enumerate(adapters)], method)
    start = {name: tensor.double() for name, tensor in llama().state_dict().items()}
    for model, adapter in zip(models, adapters, strict=True):
        share = merged.share(like=adapter)
        assert share.ranks == adapter.ranks
        set_peft_model_state_dict(model, share.state_dict())
        found = weights(model)
        for name, layer in share.layers.items():
            applied = found[f"{name}.weight"] - start[f"{name}.weight"]
            cut = merged.share(layer.rank).layers[name].delta().double()
            assert torch.allclose(applied, cut, atol=1e-6), name


def test_a_share_like_what_does_not_fit_is_refused() -> None:
    adapter = Adapter.from_state_dict({"q.lora_A.weight": torch.ones(1, 3), "q.lora_B.weight": torch.ones(2, 1)}, _PLAIN)
    merged = aggregate([ClientUpdate(adapter, 1, "a")], "raflora")
    other = Adapter.from_state_dict({"v.lora_A.weight": torch.ones(1, 3), "v.lora_B.weight": torch.ones(2, 1)}, _PLAIN)
    longer = Adapter.from_state_dict({"q.lora_A.weight": torch.ones(1, 4), "q.lora_B.weight": torch.ones(2, 1)}, _PLAIN)
    for like, says in (
        (other, "layer v: .*got no such layer"),
        (longer, r"layer q: expected linear .*\[2, 4\], got .*\[2, 3\]"),
    ):
        with pytest.raises(AdapterError, match=says):
            merged.share(like=like)
    with pytest.raises(AdapterError, match="like: expected an Adapter, got a str"):
        merged.share(like="folder")
    for wrong in ({}, {"rank": 1, "like": adapter}):
        with pytest.raises(AdapterError, match="expected a rank, or like=ADAPTER"):
            merged.share(**wrong)


_PLAIN = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}

# --- the matrix ----------------------------------------------------------------------------------------------------------

# Options that change which numbers are in a folder, and what PEFT makes of them.
READ: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 7}},
    "all linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
    "excluded": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.0\..*o_proj"},
    "one layer": {"target_modules": QV, "layers_to_transform": [1]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dropout": {"lora_dropout": 0.5},
}
EXACT = ("flora", "flexlora")  # of the sum of ranks: the mean of the products itself


@pytest.mark.parametrize(("options", "method"), itertools.product(READ, EXACT))
def test_options_times_methods_at_unequal_ranks(options: str, method: str, tmp_path: Path) -> None:
    wanted = [saved(tmp_path / str(place), place, r=rank, lora_alpha=5, **READ[options]) for place, rank in enumerate((2, 5))]
    folders = [tmp_path / "0", tmp_path / "1"]
    try:
        done = aggregate_folders(folders, method, tmp_path / "merge", rank=0 if method == "flora" else 7)
    except AnyRankError:
        shutil.rmtree(tmp_path / "merge", ignore_errors=True)
        raise
    assert distance(loaded(tmp_path / "merge"), mean(*wanted)) < 2e-6
    assert done["missed"]["global"] < 2e-6
