"""`moeplan experts variants`: precision, pruning, adapters and dense equivalents side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planner.choices import ExpertChoices
from planner.cli.terminal import show

if TYPE_CHECKING:
    from planner.model import ModelConfig
    from planner.routing import Law
    from planner.variants import Variant

_BATCHES = (1, 16, 64, 256)
_SOME = 8
"""An adapter on some experts covers this part of them by default: one in eight."""


def show_variants(
    model: str,
    *,
    gpu: str,
    num_gpus: int | None = None,
    batch: list[int] | None = None,
    context: int = 4096,
    keep: int | None = None,
    hot: str | None = None,
    lora_rank: int | None = None,
    lora_adapters: int = 1,
    lora_targets: list[str] | None = None,
    dense: float | None = None,
    engine: str = "vllm",
    weights: str | None = None,
    kv: str | None = None,
    skew: str | None = None,
    json: bool = False,
) -> None:
    """What if: experts in two precisions, fewer experts, LoRA adapters, or a dense model instead.

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    gpu
        System name (`moeplan profiles list`) or a profile TOML.
    num_gpus
        GPUs that every variant gets; the fewest that hold the model otherwise.
    batch
        Running sequences over all GPUs; repeat the option for several (1, 16, 64, 256).
    context
        Tokens of one sequence.
    keep
        Keep this many routed experts per layer, the most popular ones.
    hot
        Hot experts as share or number with two formats, such as 0.25:fp8/int4_g128.
    lora_rank
        Rank of LoRA adapters; adds a row for every target.
    lora_adapters
        Adapters kept on the GPUs, used evenly.
    lora_targets
        What adapters adapt, such as attention+shared, experts, or router+experts:8.
    dense
        Also compare with a dense model of this many billion parameters.
    engine
        Serving engine whose memory rule applies.
    weights
        Weight formats instead of the checkpoint's: `fp8`, or `experts=nvfp4,attention=bf16,dense=bf16`.
    kv
        KV cache format: bf16, fp8 or fp8_ds_mla.
    skew
        Expert popularity: mixed, single-domain, uniform, lognormal:0.5, zipf:1 and others, or a routing record.
    json
        Print the facts as JSON.
    """
    from planner import options
    from planner.engine import engine as load_engine
    from planner.facts.variants import variants_facts
    from planner.fit import limits_for
    from planner.hardware import system as load_system

    batches = sorted(set(batch or _BATCHES))
    options.check_positive(context=context, num_gpus=num_gpus, batch=batches[0], lora_adapters=lora_adapters)
    chosen, profile, system = options.precision(model, weights, kv), load_engine(engine), load_system(gpu)
    limits = limits_for(profile, system)
    experts = options.experts(chosen, ExpertChoices(skew=skew))
    variants = _variants(chosen, batches, experts.skew, keep, hot, lora_rank, lora_adapters, lora_targets, dense)
    cluster = _cluster(chosen, system, profile, limits, num_gpus, context)
    show(variants_facts(variants, cluster, profile, limits, batches, context, experts), json, variants_text)


def _variants(
    model: ModelConfig,
    batches: list[int],
    skew: Law | None,
    keep: int | None,
    hot: str | None,
    rank: int | None,
    adapters: int,
    targets: list[str] | None,
    dense: float | None,
) -> list[Variant]:
    """The model as it is, then the asked variants, then its dense relatives."""
    from planner import variants as whatif

    found = [whatif.Variant("as it is", model)]
    picks = whatif.ranked_picks(model.moe, skew) if model.moe else None
    if hot is not None:
        mix = whatif.parse_mix(hot, model)
        found.append(whatif.mixed(model, mix, whatif.ranked_picks(whatif.moe_of(model), skew), batches))
    if keep is not None:
        found.append(whatif.pruned(model, keep, whatif.ranked_picks(whatif.moe_of(model), skew), batches))
    if rank is not None:
        for text in targets or _default_targets(model):
            adapter = whatif.parse_targets(text, rank, model)
            found.append(whatif.with_adapters(model, adapter, adapters, picks, text))
    return found + _dense_relatives(model, dense)


def _default_targets(model: ModelConfig) -> list[str]:
    always = ["attention+shared+dense"]
    return always + ([] if model.moe is None else ["experts", f"router+experts:{max(1, model.num_experts // _SOME)}"])


def _dense_relatives(model: ModelConfig, billions: float | None) -> list[Variant]:
    from planner import variants as whatif
    from planner.errors import InputError

    if model.moe is None and billions is None:
        return []
    size = whatif.equivalent_params(model)
    relatives = [
        whatif.Variant("dense, same active", whatif.dense_of_active(model), "computes what one token computes here"),
        whatif.Variant(
            f"dense {size / 1e9:.3g}B",
            whatif.dense_of_size(model, size),
            "sqrt(total x active): a rule of thumb for equal quality, not a law",
        ),
    ]
    if billions is not None:
        if not 0 < billions < 1e5:
            raise InputError(f"--dense {billions:g}: billions of parameters, such as 70")
        asked = whatif.dense_of_size(model, billions * 1e9)
        relatives.append(whatif.Variant(f"dense {billions:g}B, as asked", asked))
    return relatives


def _cluster(model: ModelConfig, system: Any, engine: Any, limits: Any, num_gpus: int | None, context: int) -> Any:
    from planner.errors import DoesNotFit
    from planner.fit import fit
    from planner.hardware import Cluster

    answer = fit(model, system, engine, context_tokens=context, num_gpus=num_gpus, limits=limits)
    if num_gpus is None and not answer.fits:
        raise DoesNotFit(f"{model.name} fits no number of {system.name} GPUs", ["a lower precision (--weights)"])
    size, node = answer.num_gpus, system.gpus_per_node
    return Cluster(system, max(1, size // node), min(size, node))


def variants_text(facts: dict[str, Any]) -> str:
    """Text of `experts variants`: one table, then what the numbers do not say."""
    from planner.tables import table
    from planner.units import format_usd, significant

    rows = facts["variants"]
    batches = [point["batch"] for point in rows[0]["decode"]]
    body = []
    for row in rows:
        fitting = [p for p in row["decode"] if p["fits"]]
        last = fitting[-1] if fitting else None
        usd = last and last["usd_per_mtok_decode"]
        body.append(
            (
                row["variant"],
                significant(row["weight_bytes"] / 1e9),
                str(row["num_gpus_min"] or "-"),
                f"{row['kv_tokens'] / 1e3:,.0f}k",
                *[significant(p["step_s"] * 1e3) if p["fits"] else "-" for p in row["decode"]],
                str(last["batch"]) if last else "-",
                significant(last["tok_per_s_per_gpu"]) if last else "-",
                format_usd(usd) if usd else "-",
            )
        )
    header = ["variant", "weights GB", "min GPUs", "KV tokens", *[f"ms at {b}" for b in batches]]
    lines = [
        f"{facts['model']} on {facts['num_gpus']} GPUs of {facts['cluster']}, {facts['context_tokens']:,} tokens each: "
        "decode step by running sequences, best layout of each",
        "",
        table([*header, "at batch", "tok/s/GPU", "$/Mtok"], body),
        "",
        *[f"  {row['variant']}: {row['note']}{_adapter_room(row['details'])}" for row in rows if row["note"]],
        "",
        f"Prices are output tokens of pure decoding at {_rent(facts)}; prompts come on top. - : no room for the KV "
        "cache, or more sequences than the engine runs.",
    ]
    return "\n".join(lines)


def _adapter_room(details: dict[str, Any]) -> str:
    if "adapters_that_fit" not in details:
        return ""
    return f"; {details['adapters_that_fit']:,} fit beside a batch of {details['adapters_beside_batch']}"


def _rent(facts: dict[str, Any]) -> str:
    usd = facts["usd_per_gpu_hour"]
    return "an unknown rent" if usd is None else f"${usd:.2f} per GPU-hour ({facts['price_as_of']})"
