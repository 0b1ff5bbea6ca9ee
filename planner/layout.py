"""How a model is cut over GPUs, and the rules a cut must obey (handbook: vLLM, SGLang and TensorRT-LLM layouts)."""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import LayoutError
from planner.model.config import Attention, ModelConfig
from planner.units import whole_number


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """Degrees of parallelism of one replica, and how many replicas.

    Attention runs on `tp` GPUs per data-parallel rank and on `attention_dp` such ranks; experts are spread
    over the same GPUs of a pipeline stage as `ep` x `moe_tp`. GPUs per replica = tp x attention_dp x pp.
    `redundant_experts` are copies of routed experts per layer, over all ranks of the group.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    attention_dp: int = 1
    moe_tp: int = 1
    replicas: int = 1
    redundant_experts: int = 0

    @property
    def stage_gpus(self) -> int:
        """GPUs of one pipeline stage of one replica."""
        return self.tp * self.attention_dp

    @property
    def replica_gpus(self) -> int:
        """GPUs of one replica."""
        return self.tp * self.attention_dp * self.pp

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas."""
        return self.replica_gpus * self.replicas

    @property
    def family(self) -> str:
        """TP; TEP: TP attention + EP; DEP: data-parallel attention + EP; DTP: data-parallel attention + TP experts."""
        if self.attention_dp > 1:
            return "DEP" if self.ep > 1 else "DTP"
        return "TEP" if self.ep > 1 else "TP"

    def __str__(self) -> str:
        parts = [f"tp{self.tp}"]
        parts += [f"dp{self.attention_dp}"] if self.attention_dp > 1 else []
        parts += [f"ep{self.ep}"] if self.ep > 1 else []
        parts += [f"+{self.redundant_experts} copies"] if self.redundant_experts else []
        parts += [f"moetp{self.moe_tp}"] if self.ep > 1 and self.moe_tp > 1 else []
        parts += [f"pp{self.pp}"] if self.pp > 1 else []
        return " ".join(parts) + (f" x{self.replicas}" if self.replicas > 1 else "")


def parse_layout(text: str) -> Layout:
    """Layout from `tp=8,ep=8,replicas=2`; `moe_tp` follows from the others when it is not given.

    Raises LayoutError on an unknown key, a non-positive or non-integer value, or products that differ.
    """
    keys = ("tp", "pp", "ep", "attention_dp", "moe_tp", "replicas", "redundant_experts")
    values: dict[str, int] = {}
    for item in text.split(","):
        key, _, number = item.strip().partition("=")
        key = {"dp": "attention_dp", "redundant": "redundant_experts"}.get(key, key)
        value = whole_number(number)
        if key not in keys or not value:
            raise LayoutError(f"layout {text!r}: {item!r} is not one of {', '.join(keys)} = positive integer")
        if key in values:
            raise LayoutError(f"layout {text!r}: {key} is given twice")
        values[key] = value
    stage = values.get("tp", 1) * values.get("attention_dp", 1)
    ep = values.get("ep", 1)
    if "moe_tp" not in values:
        values["moe_tp"] = max(1, stage // ep)
    if ep * values["moe_tp"] != stage:
        raise LayoutError(
            f"layout {text!r}: ep x moe_tp = {ep} x {values['moe_tp']} must equal tp x attention_dp = "
            f"{values.get('tp', 1)} x {values.get('attention_dp', 1)} = {stage}"
        )
    return Layout(**values)


def check_layout(model: ModelConfig, layout: Layout) -> None:
    """Raise LayoutError, naming the product that fails, if `layout` cannot cut `model`."""
    problem = layout_problem(model, layout)
    if problem:
        raise LayoutError(problem)


def layout_problem(model: ModelConfig, layout: Layout) -> str | None:
    """The first rule `layout` breaks for `model`, as a sentence with a remedy; None when it is valid."""
    if layout.ep * layout.moe_tp != layout.stage_gpus:
        return (
            f"ep x moe_tp = {layout.ep} x {layout.moe_tp} must equal tp x attention_dp = "
            f"{layout.tp} x {layout.attention_dp}"
        )
    if layout.pp > model.num_layers:
        return f"pp={layout.pp} exceeds the {model.num_layers} layers. Use pp <= {model.num_layers}."
    return _expert_problem(model, layout) or _head_problem(model, layout)


def _expert_problem(model: ModelConfig, layout: Layout) -> str | None:
    moe = model.moe
    if moe is None:
        if layout.ep > 1 or layout.redundant_experts:
            return f"ep={layout.ep} needs experts, and {model.name} is dense. Use ep=1 without redundant experts."
        return None
    copies = layout.redundant_experts
    if (moe.num_experts + copies) % layout.ep and not copies:
        return (
            f"ep={layout.ep} does not divide {moe.num_experts} experts. "
            f"Use {_near_divisors(moe.num_experts, layout.ep)}, "
            f"or redundant_experts={-moe.num_experts % layout.ep}."
        )
    if (moe.num_experts + copies) % layout.ep:
        above = copies + -(moe.num_experts + copies) % layout.ep
        below = [above - layout.ep] if above > layout.ep else []
        return (
            f"redundant_experts={copies}: {moe.num_experts} + {copies} experts do not divide over ep={layout.ep}. "
            f"Use {' or '.join(map(str, [*below, above]))}."
        )
    if copies > moe.num_experts * (layout.ep - 1):
        return (
            f"redundant_experts={copies} exceeds one copy per rank. Use {moe.num_experts * (layout.ep - 1)} or fewer."
        )
    if moe.expert_width % layout.moe_tp:
        return (
            f"moe_tp={layout.moe_tp} does not divide the expert width {moe.expert_width}. "
            f"Use {_near_divisors(moe.expert_width, layout.moe_tp)}."
        )
    return None


def _head_problem(model: ModelConfig, layout: Layout) -> str | None:
    for layer, _ in model.layer_kinds:
        for mixer in layer.mixers:
            heads = mixer.num_heads if isinstance(mixer, Attention) else mixer.num_v_heads
            if heads and heads % layout.tp:
                return (
                    f"tp={layout.tp} does not divide {heads} attention heads. Use {_near_divisors(heads, layout.tp)}."
                )
            if isinstance(mixer, Attention) and mixer.num_kv_heads > 1:
                large, small = max(mixer.num_kv_heads, layout.tp), min(mixer.num_kv_heads, layout.tp)
                if large % small:
                    return (
                        f"tp={layout.tp} neither divides nor is a multiple of {mixer.num_kv_heads} KV heads. "
                        f"Use {_near_divisors(mixer.num_kv_heads, layout.tp)}."
                    )
    return None


def _near_divisors(whole: int, wanted: int) -> str:
    divisors = [d for d in range(1, whole + 1) if whole % d == 0] if whole <= 1_000_000 else [1]
    below = [d for d in divisors if d <= wanted]
    above = [d for d in divisors if d > wanted]
    return " or ".join(str(d) for d in below[-1:] + above[:1])
