"""What benchmark tables call GPUs, engines and precisions, as profiles, engines and model formats of moeplan."""

from __future__ import annotations

import re

from planner.engine import Engine, engine, engines
from planner.errors import InputError, ModelConfigError, ProfileError, nearest
from planner.hardware import System, system
from planner.hardware.catalogue import systems
from planner.model import ModelConfig, load
from planner.model.precision import override
from planner.units import whole_number

_MAKERS = {"nvidia", "amd", "intel", "google", "aws", "hgx", "gpu"}
_FORMS = ("sxm", "nvl72", "")
"""Forms of one GPU by how often benchmarks mean them: a bare H100 is the SXM part, a bare GB200 the NVL72 one."""
_MEMORY = re.compile(r"[0-9]+gb?")
_ENGINE_SPELLINGS = {"tensorrtllm": "trtllm", "trt": "trtllm", "tensorrt": "trtllm", "sgl": "sglang"}
_FORMATS = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp8": "fp8",
    "int8": "int8",
    "fp4": "nvfp4",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
    "int4": "int4_g128",
}
"""Weight format that a label of a row stands for when the checkpoint has another."""
_FOUR_BIT = ("nvfp4", "mxfp4", "int4", "awq", "gptq")


def system_of(gpu: str) -> System:
    """System of a GPU as benchmarks write it: `H100`, `NVIDIA H100 SXM5 80GB`, `gb200_nvl72`, a profile or its file.

    ProfileError with near names when there is none.
    """
    if gpu.endswith(".toml"):
        return system(gpu)
    known = systems()
    words = {re.sub(r"sxm[0-9]", "sxm", word) for word in re.split(r"[^a-z0-9.]+", gpu.lower())} - _MAKERS - {""}
    stated = {word.removesuffix("gb").removesuffix("g") if _MEMORY.fullmatch(word) else word for word in words}
    for wanted in (stated, {word for word in words if not _MEMORY.fullmatch(word)}):
        found = [name for name in known if wanted and wanted <= set(name.split("-"))]
        if found:
            return system(min(found, key=lambda name: _usual(name, wanted)))
    raise ProfileError(f"GPU {gpu!r} is unknown: {nearest(gpu.lower(), known)}")


def _usual(name: str, wanted: set[str]) -> tuple[bool, int, int, str]:
    """Sorts the systems that a name may mean: exact, then by form, then by fewer and larger further words."""
    words = set(name.split("-"))
    form = next(place for place, form in enumerate(_FORMS) if not form or form in words)
    memory = sum(whole_number(word) or 0 for word in words - wanted)
    return words != wanted, form, -memory, name


def engine_of(name: str) -> Engine:
    """Engine as benchmarks write it: `vLLM`, `TensorRT-LLM`, `trt`; InputError lists the known ones."""
    plain = re.sub(r"[^a-z0-9]+", "", name.lower())
    known = {re.sub(r"[^a-z0-9]+", "", each): each for each in engines()}
    found = known.get(_ENGINE_SPELLINGS.get(plain, plain))
    if found is None:
        raise InputError(f"engine {name!r} is not modelled: {nearest(name, engines())}")
    return engine(found)


def model_of(name: str, precision: str) -> ModelConfig:
    """Model `name` in the precision a row is labelled with; a checkpoint that already has it stays as it is.

    Other labels mean a requantised checkpoint: four bits of a mixture of experts are those of its experts, everything
    else holds for every matrix, and FP8 and FP4 come with an FP8 KV cache: so do NVIDIA's checkpoints, and InferenceX
    served them so (benchmarks/70b_fp8_*.sh: `kv-cache-dtype: fp8`). Checkpoints of four bits are never widened.
    ModelConfigError on an unknown model or precision.
    """
    model, label = load(name), precision.lower()
    if not label:
        return model
    if label not in _FORMATS:
        raise ModelConfigError(f"precision {precision!r} is unknown: {nearest(label, _FORMATS)}")
    fmt = _FORMATS[label]
    stored = model.format_of("expert" if model.moe else "dense_ffn")
    if stored.startswith((label, *_FOUR_BIT)) and (fmt != "nvfp4" or stored in ("nvfp4", "mxfp4")):
        return model
    small = fmt.startswith(_FOUR_BIT)
    parts = {} if small and model.moe else {"attention": fmt, "dense": fmt}
    parts |= {"experts": fmt} if model.moe else {}
    return override(model, kv="fp8" if fmt in ("fp8", "nvfp4") else None, **parts)
