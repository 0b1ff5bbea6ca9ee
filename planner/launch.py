"""Commands that start the recommended layout: `vllm serve`, `sglang.launch_server`, `trtllm-serve`.

A starting point, never run by this program. Flags were read on 2026-11-22 in the wheels of vLLM 0.33.0
(engine/arg_utils.py, config/parallel.py, entrypoints/cli/serve.py) and SGLang 0.5.23 (srt/arg_groups), and in
TensorRT-LLM's commands/serve.py with the LLM API reference of 1.3.0rc27. What an engine has no flag for is said in the
note instead.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from planner.deployment import Deployment
from planner.errors import PlannerError
from planner.model import load

Role = Literal["", "prefill", "decode"]
_READ_IN = {"vllm": "vLLM 0.33.0", "sglang": "SGLang 0.5.23", "trtllm": "TensorRT-LLM 1.3"}
_VENDORS = {"vllm": ("NVIDIA", "AMD"), "sglang": ("NVIDIA", "AMD"), "trtllm": ("NVIDIA",)}
"""Whose builds take these flags; others have builds and flags of their own, which were not read."""
_PORT, _RENDEZVOUS = 8000, 25000
_YAML = "moeplan-trtllm.yml"


@dataclass(frozen=True, slots=True)
class Command:
    """A command that takes `num_gpus` GPUs, those of one node unless it starts all nodes itself."""

    text: str
    num_gpus: int


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one pool: `commands` start one replica, node by node; run them `replicas` times.

    `commands` is empty where the engine has none, and `note` says why.
    """

    engine: str
    role: Role
    commands: tuple[Command, ...]
    replicas: int
    note: str

    @property
    def num_gpus(self) -> int:
        """GPUs of all commands of all replicas."""
        return sum(command.num_gpus for command in self.commands) * self.replicas


@dataclass(slots=True)
class _Draft:
    """Flags in order, keys of TensorRT-LLM's YAML, and parts of the deployment that neither can say."""

    flags: list[str] = field(default_factory=list)
    yaml: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)

    def add(self, *flags: object) -> None:
        self.flags += [str(flag) for flag in flags]


def launch(deployment: Deployment, role: Role = "") -> Launch:
    """Commands for `deployment`; `role` for one of two pools."""
    engine = deployment.engine
    name = engine.name if engine.name in _WRITERS else engine.kernels
    title = f"{engine.name} {engine.version}"
    layout = deployment.layout
    if name not in _WRITERS:
        note = f"No command: {engine.name} has no flags for a layout of this kind that were checked."
        return Launch(title, role, (), layout.replicas, note)
    draft, per_node = _Draft(), gpus_per_node(deployment)
    texts = _WRITERS[name](deployment, role, draft, layout.replica_gpus // per_node)
    _common_gaps(deployment, draft)
    commands = tuple(Command(text, layout.replica_gpus // len(texts)) for text in texts)
    return Launch(title, role, commands, layout.replicas, _note(deployment, name, draft, per_node))


def gpus_per_node(deployment: Deployment) -> int:
    """GPUs of each node that one replica takes: as many as engines can split evenly over nodes.

    Engines give every node the same number of GPUs, and groups of attention-TP and pipeline stages either lie inside
    a node or fill whole nodes.
    """
    layout, most = deployment.layout, deployment.cluster.gpus_per_node
    groups = (layout.tp, layout.stage_gpus, layout.tp * layout.pp)
    return max(
        size
        for size in range(1, min(most, layout.replica_gpus) + 1)
        if layout.replica_gpus % size == 0 and all(size % group == 0 or group % size == 0 for group in groups)
    )


def _note(deployment: Deployment, name: str, draft: _Draft, per_node: int) -> str:
    layout, node = deployment.layout, deployment.cluster.system.gpus_per_node
    said = [f"Unverified starting point; flags as in {_READ_IN[name]}."]
    if layout.replicas > 1:
        said.append(f"Start {layout.replicas} replicas behind a load balancer.")
    if layout.replicas > 1 and layout.replica_gpus <= node // 2:
        share = node // layout.replica_gpus
        said.append(f"Up to {share} replicas share a node: give each its own GPUs and port.")
    if layout.replica_gpus > per_node:
        said.append(f"A replica takes {per_node} GPUs on each of {layout.replica_gpus // per_node} nodes.")
        said.append(
            f"Slurm starts them all, and {_YAML} must be on every node."
            if name == "trtllm"
            else "HEAD_IP is the address of its first node."
        )
    vendor = deployment.cluster.system.gpu.vendor
    if vendor not in _VENDORS[name]:
        said.append(f"{deployment.engine.name} for {vendor} may take other flags; they were not checked.")
    if draft.lacking:
        said.append(f"Without a flag here: {'; '.join(draft.lacking)}.")
    return " ".join(said)


def _common_gaps(deployment: Deployment, draft: _Draft) -> None:
    """Parts of a deployment that serving engines cannot be told at all."""
    experts, offload = deployment.experts, deployment.offload
    if offload is not None:
        draft.lacking.append(f"experts outside HBM ({offload.residency.policy})")
    if experts.limit is not None:
        draft.lacking.append("a capacity limit of the experts")
    if experts.top_k is not None:
        draft.lacking.append(f"{experts.top_k} experts per token")
    model = deployment.model
    try:
        checkpoint = load(model.name)
    except PlannerError:
        draft.lacking.append(f"where the checkpoint of {model.name} lies: put its path")
        return
    if checkpoint.formats != model.formats:
        stored = dict(checkpoint.formats)
        other = sorted({f"{part} in {fmt}" for part, fmt in model.formats if stored.get(part) != fmt})
        draft.lacking.append(f"weights of other precision ({', '.join(other)}): name a checkpoint that has them")


def _vllm(deployment: Deployment, role: Role, draft: _Draft, nodes: int) -> list[str]:
    """GPUs = tensor x pipeline x data parallel size; experts go over all GPUs of a stage or are cut by width."""
    layout, limits, engine = deployment.layout, deployment.limits, deployment.engine
    draft.add("vllm", "serve", shlex.quote(deployment.model.name), "--tensor-parallel-size", layout.tp)
    if layout.pp > 1:
        draft.add("--pipeline-parallel-size", layout.pp)
    if layout.attention_dp > 1:
        draft.add("--data-parallel-size", layout.attention_dp)
    if layout.ep > 1:
        draft.add("--enable-expert-parallel")
    if layout.ep not in (1, layout.stage_gpus):
        draft.lacking.append(f"experts over {layout.ep} of {layout.stage_gpus} GPUs")
    if layout.ep > 1 and layout.attention_dp > 1:
        deep = "deepep_high_throughput" if role == "prefill" else "deepep_low_latency"
        draft.add("--all2all-backend", deep if deployment.backend == "deepep" else deployment.backend)
    draft.add("--max-num-seqs", limits.max_num_seqs, "--max-num-batched-tokens", limits.max_batched_tokens)
    draft.add("--gpu-memory-utilization", f"{engine.kv_fraction:g}")
    if deployment.model.kv_format.startswith("fp8"):
        draft.add("--kv-cache-dtype", deployment.model.kv_format)
    if not engine.prefix_caching:
        draft.add("--no-enable-prefix-caching")
    _vllm_experts(deployment, draft)
    _vllm_tactics(deployment, draft)
    if role:
        sides = {"kv_connector": "NixlConnector", "kv_role": "kv_producer" if role == "prefill" else "kv_consumer"}
        draft.add("--kv-transfer-config", shlex.quote(json.dumps(sides)))
        draft.lacking.append("the proxy that sends a request to a prefill, then to a decode server")
    draft.add("--port", _PORT)
    if nodes == 1:
        return [" ".join(draft.flags)]
    spread = f"--nnodes {nodes} --master-addr $HEAD_IP --master-port {_RENDEZVOUS}"
    ranks = [f"--node-rank {rank}" + (" --headless" if rank else "") for rank in range(nodes)]
    return [f"{' '.join(draft.flags)} {spread} {rank}" for rank in ranks]


def _vllm_experts(deployment: Deployment, draft: _Draft) -> None:
    placement, copies = deployment.experts.placement_name, deployment.layout.redundant_experts
    if placement == "round-robin" and not copies:
        draft.add("--expert-placement-strategy", "round_robin")
        return
    if placement == "eplb" or copies:
        draft.add("--enable-eplb")
    if copies:
        draft.add("--eplb-config", shlex.quote(json.dumps({"num_redundant_experts": copies})))
    if placement not in ("contiguous", "eplb"):
        draft.lacking.append(f"the {placement} placement")


def _vllm_tactics(deployment: Deployment, draft: _Draft) -> None:
    drafts, overlap = deployment.tactics.speculation, deployment.tactics.overlap
    if drafts is not None:
        method = {"mtp": "mtp", "draft": "draft_model", "ngram": "ngram"}[drafts.method]
        said: dict[str, object] = {"method": method, "num_speculative_tokens": drafts.num_drafts}
        if drafts.method == "draft" and drafts.draft is not None:
            said["model"] = drafts.draft.name
        draft.add("--speculative-config", shlex.quote(json.dumps(said)))
    if overlap is not None and overlap.is_two_batch:
        draft.add("--enable-dbo")
    elif overlap is not None:
        draft.lacking.append(str(overlap))


def _sglang(deployment: Deployment, role: Role, draft: _Draft, nodes: int) -> list[str]:
    """GPUs = tp_size x pp_size: attention-DP groups and expert parallelism lie inside the TP group."""
    layout, limits, engine = deployment.layout, deployment.limits, deployment.engine
    draft.add("python", "-m", "sglang.launch_server", "--model-path", shlex.quote(deployment.model.name))
    draft.add("--tp-size", layout.stage_gpus)
    for flag, degree in (("--pp-size", layout.pp), ("--attn-dp-size", layout.attention_dp), ("--ep-size", layout.ep)):
        if degree > 1:
            draft.add(flag, degree)
    if deployment.backend == "deepep":
        draft.add("--moe-a2a-backend", "deepep")
    # Both are of all attention-DP groups together; the engine divides them (parallel_hook.py,
    # kv_cache_configurator.py).
    draft.add("--max-running-requests", limits.max_num_seqs * layout.attention_dp)
    draft.add("--chunked-prefill-size", limits.max_batched_tokens * layout.attention_dp)
    if engine.static_fraction is not None:
        draft.add("--mem-fraction-static", f"{engine.static_fraction:g}")
    if deployment.model.kv_format == "fp8":
        draft.add("--kv-cache-dtype", "fp8_e4m3")
    elif deployment.model.kv_format != "bf16":
        draft.lacking.append(f"a {deployment.model.kv_format} KV cache")
    if not engine.prefix_caching:
        draft.add("--disable-radix-cache")
    _sglang_experts(deployment, draft)
    _sglang_tactics(deployment, draft)
    if role:
        draft.add("--disaggregation-mode", role)
        router = "python -m sglang_router.launch_router --pd-disaggregation --prefill URL 8998 --decode URL"
        draft.lacking.append(f"the router in front of both pools: {router}")
    draft.add("--host", "0.0.0.0", "--port", _PORT)
    if nodes == 1:
        return [" ".join(draft.flags)]
    spread = f"--nnodes {nodes} --dist-init-addr $HEAD_IP:{_RENDEZVOUS}"
    return [f"{' '.join(draft.flags)} {spread} --node-rank {rank}" for rank in range(nodes)]


def _sglang_experts(deployment: Deployment, draft: _Draft) -> None:
    placement, copies = deployment.experts.placement_name, deployment.layout.redundant_experts
    if copies:
        draft.add("--ep-num-redundant-experts", copies)
    if placement == "eplb":
        draft.add("--enable-eplb")
    elif placement != "contiguous":
        draft.lacking.append(f"the {placement} placement (a file goes to --init-expert-location)")


def _sglang_tactics(deployment: Deployment, draft: _Draft) -> None:
    drafts, overlap = deployment.tactics.speculation, deployment.tactics.overlap
    if drafts is not None:
        draft.add("--speculative-algorithm", {"mtp": "NEXTN", "draft": "STANDALONE", "ngram": "NGRAM"}[drafts.method])
        if drafts.method == "draft" and drafts.draft is not None:
            draft.add("--speculative-draft-model-path", shlex.quote(drafts.draft.name))
        if drafts.method != "ngram":
            draft.add("--speculative-num-steps", drafts.num_drafts, "--speculative-eagle-topk", 1)
        # The window counts the token that is not drafted.
        draft.add("--speculative-num-draft-tokens", drafts.query_tokens)
    if overlap is not None:
        draft.add("--enable-two-batch-overlap" if overlap.is_two_batch else "--enable-single-batch-overlap")


def _trtllm(deployment: Deployment, role: Role, draft: _Draft, nodes: int) -> list[str]:
    """GPUs = tp_size x pp_size; attention data parallelism is all of the TP group or nothing."""
    layout, limits, engine = deployment.layout, deployment.limits, deployment.engine
    draft.add("trtllm-serve", shlex.quote(deployment.model.name), "--backend", "pytorch")
    draft.add("--tp_size", layout.stage_gpus, "--pp_size", layout.pp, "--ep_size", layout.ep)
    draft.add("--max_batch_size", limits.max_num_seqs, "--max_num_tokens", limits.max_batched_tokens)
    draft.add("--kv_cache_free_gpu_memory_fraction", f"{engine.kv_fraction:g}")
    draft.add("--host", "0.0.0.0", "--port", _PORT)
    if layout.attention_dp > 1:
        draft.yaml.append("enable_attention_dp: true")
    if layout.attention_dp > 1 and layout.tp > 1:
        draft.lacking.append(
            f"attention-TP {layout.tp} inside attention-DP (the command has {layout.stage_gpus} ranks)"
        )
    if deployment.backend == "deepep":
        draft.lacking.append("DeepEP (TensorRT-LLM chooses the exchange itself)")
    cache = ["enable_block_reuse: false"] if not engine.prefix_caching else []
    if deployment.model.kv_format == "fp8":
        cache.append("dtype: fp8")
    elif deployment.model.kv_format != "bf16":
        draft.lacking.append(f"a {deployment.model.kv_format} KV cache")
    if cache:
        draft.yaml.append(f"kv_cache_config: {{{', '.join(cache)}}}")
    _trtllm_experts(deployment, draft)
    _trtllm_tactics(deployment, draft)
    if role:
        draft.yaml.append("cache_transceiver_config: {backend: DEFAULT}")
        draft.lacking.append("the orchestrator: trtllm-serve disaggregated -c FILE with the addresses of both pools")
    if draft.yaml:
        draft.add("--config", _YAML)
    text = " ".join(draft.flags)
    if nodes > 1:
        per_node = layout.replica_gpus // nodes
        ranks = f"srun --nodes {nodes} --ntasks {layout.replica_gpus} --ntasks-per-node {per_node} --mpi pmix"
        text = f"{ranks} trtllm-llmapi-launch {text}"
    if draft.yaml:
        text = f"printf '%s\\n' {' '.join(map(shlex.quote, draft.yaml))} > {_YAML}\n{text}"
    return [text]


def _trtllm_experts(deployment: Deployment, draft: _Draft) -> None:
    placement, copies = deployment.experts.placement_name, deployment.layout.redundant_experts
    moe = deployment.model.moe
    if moe is not None and (copies or placement == "eplb"):
        slots = moe.num_experts + copies
        draft.yaml.append(f"moe_config: {{load_balancer: {{num_slots: {slots}, layer_updates_per_iter: 1}}}}")
    if placement not in ("contiguous", "eplb"):
        draft.lacking.append(f"the {placement} placement")


def _trtllm_tactics(deployment: Deployment, draft: _Draft) -> None:
    drafts, overlap = deployment.tactics.speculation, deployment.tactics.overlap
    if drafts is not None:
        kind = {"mtp": "MTP", "draft": "Draft_Target", "ngram": "NGram"}[drafts.method]
        said = [f"decoding_type: {kind}", f"max_draft_len: {drafts.num_drafts}"]
        if drafts.method == "draft" and drafts.draft is not None:
            said.append(f"speculative_model: {json.dumps(drafts.draft.name)}")
        draft.yaml.append(f"speculative_config: {{{', '.join(said)}}}")
    if overlap is not None:
        draft.lacking.append(str(overlap))


_Writer = Callable[[Deployment, Role, _Draft, int], list[str]]
_WRITERS: dict[str, _Writer] = {"vllm": _vllm, "sglang": _sglang, "trtllm": _trtllm}
