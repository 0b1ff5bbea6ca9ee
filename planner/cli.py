"""Command line: parse, call one planner function, print. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App, CycloptsError

from planner import __version__

if TYPE_CHECKING:
    from planner.model import ModelConfig
    from planner.workload import Workload

EngineName = Literal["vllm", "sglang", "trtllm"]
_DEFAULT_SLO = "ttft_p95=2s,tpot_p95=50ms"
_DEFAULT_WORKLOAD = "chat"
_DEFAULT_RATE = 1.0

app = App(
    name="moeplan",
    version=__version__,
    help="Which hardware, how many GPUs, sharded how, at what latency and cost, for serving MoE language models.",
    help_flags=["--help", "-h"],
)
profiles = App(name="profiles", help="Hardware profiles and measured tables: list, show, schema, import.")
app.command(profiles)


@app.command
def describe(model: str, *, json: bool = False) -> None:
    """Parameters, layers, weight bytes and KV bytes of a model.

    Parameters
    ----------
    model
        Hugging Face id or alias of a bundled model, a config.json, a directory with one, or a model TOML.
    json
        Print the facts as JSON.
    """
    from planner.facts import model_facts
    from planner.model import load
    from planner.text import describe_text

    facts = model_facts(load(model))
    _print(facts, json, describe_text)


@app.command
def fit(
    model: str,
    *,
    gpu: str,
    engine: EngineName = "vllm",
    context: int = 4096,
    num_gpus: int | None = None,
    max_num_seqs: int | None = None,
    max_batched_tokens: int | None = None,
    weights: str | None = None,
    kv: str | None = None,
    json: bool = False,
) -> None:
    """Does it fit, on how few GPUs, with how many concurrent tokens, and which term breaks it.

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    gpu
        System name (`moeplan profiles list`) or a profile TOML.
    engine
        Serving engine whose memory rule applies.
    context
        Tokens of one sequence (prompt plus output).
    num_gpus
        Ask about exactly this many GPUs instead of searching the smallest number.
    max_num_seqs
        Sequences at once per scheduler rank; the engine's default otherwise.
    max_batched_tokens
        Tokens per step per scheduler rank; the engine's default otherwise.
    weights
        Weight formats instead of the checkpoint's: `fp8`, or `experts=nvfp4,attention=bf16,dense=bf16`.
    kv
        KV cache format: bf16, fp8 or fp8_ds_mla.
    json
        Print the facts as JSON.
    """
    from planner import fit as fitting
    from planner.engine import engine as load_engine
    from planner.facts import fit_facts
    from planner.hardware import system as load_system
    from planner.text import fit_text

    _positive(context=context, max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens)
    chosen, profile = _precision(model, weights, kv), load_engine(engine)
    system = load_system(gpu)
    limits = fitting.limits_for(profile, system, max_num_seqs, max_batched_tokens)
    answer = fitting.fit(chosen, system, profile, context_tokens=context, num_gpus=num_gpus, limits=limits)
    _print(fit_facts(chosen, system, profile, answer), json, fit_text)
    if not answer.fits:
        sys.exit(3)


@app.command
def plan(
    model: str,
    *,
    cluster: list[str],
    workload: str = _DEFAULT_WORKLOAD,
    rate: float | None = None,
    concurrency: int | None = None,
    slo: str = _DEFAULT_SLO,
    engine: EngineName = "vllm",
    num_requests: int | None = None,
    weights: str | None = None,
    kv: Literal["auto", "bf16", "fp8", "fp8_ds_mla"] = "auto",
    skew: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Recommend the cheapest layout that serves the workload within the SLO, with reasons.

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    cluster
        Offered GPUs as system:nodes x GPUs, such as h200-sxm:2x8; repeat the option to offer several.
    workload
        Preset (chat, rag, code, summarize, reasoning, batch), `fixed:1024/256`, `uniform:819-1024/819-1024`,
        `lognormal:1024~0.6/256~0.8`, a TOML, or a trace CSV (arrival_s, prompt_tokens, output_tokens).
    rate
        Requests per second (Poisson unless the workload says otherwise).
    concurrency
        Users in a closed loop instead of a rate.
    slo
        Objectives with units, such as ttft_p95=2s,tpot_p95=50ms.
    engine
        Serving engine.
    num_requests
        Requests per simulation; chosen from the load otherwise.
    weights
        Weight formats instead of the checkpoint's: `fp8`, or `experts=nvfp4,attention=bf16,dense=bf16`.
    kv
        KV cache format; auto considers the checkpoint's and FP8.
    skew
        Expert popularity: mixed, single-domain, aux-balanced-8-experts or uniform.
    seed
        Seed of arrivals and lengths.
    out
        Folder for the run: inputs, layouts, requests, manifest, report.html. Must be new or empty.
    json
        Print the facts as JSON.
    """
    from planner.engine import engine as load_engine
    from planner.facts.plan import plan_facts
    from planner.hardware import parse_cluster
    from planner.recommend import recommend
    from planner.runfolder import check_folder, write_run
    from planner.text import plan_text
    from planner.workload import parse_slo

    if out is not None:
        check_folder(out)
    demand = _workload(workload, rate, concurrency, num_requests)
    chosen = _precision(model, weights, None)
    clusters = _distinct([parse_cluster(text) for text in cluster])
    with _progress() as progress:
        answer = recommend(
            chosen,
            clusters,
            demand,
            parse_slo(slo),
            load_engine(engine),
            kv_formats=None if kv == "auto" else (kv,),
            skew=skew,
            seed=seed,
            progress=progress,
        )
    facts = plan_facts(answer, _command())
    if out is not None:
        write_run(out, answer, facts)
    _print(facts, json, plan_text, wall_s=answer.wall_s)
    if not answer.meets_slo:
        sys.exit(3)


@app.command
def simulate(
    model: str,
    *,
    cluster: str,
    layout: str,
    workload: str = _DEFAULT_WORKLOAD,
    rate: float | None = None,
    concurrency: int | None = None,
    slo: str | None = None,
    engine: EngineName = "vllm",
    num_requests: int | None = None,
    max_num_seqs: int | None = None,
    max_batched_tokens: int | None = None,
    backend: Literal["allgather_reducescatter", "deepep"] = "allgather_reducescatter",
    weights: str | None = None,
    kv: str | None = None,
    skew: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Simulate one layout request by request.

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    cluster
        GPUs as system:nodes x GPUs, such as h200-sxm:1x8.
    layout
        Degrees of parallelism, such as tp=8,ep=8 or attention_dp=8,ep=8,replicas=2.
    workload
        As in `plan`.
    rate
        Requests per second.
    concurrency
        Users in a closed loop instead of a rate.
    slo
        Objectives to judge the run by, such as ttft_p95=2s,tpot_p95=50ms.
    engine
        Serving engine.
    num_requests
        Requests to simulate.
    max_num_seqs
        Sequences at once per scheduler rank; the engine's default otherwise.
    max_batched_tokens
        Tokens per step per scheduler rank; the engine's default otherwise.
    backend
        How attention-DP ranks exchange tokens with experts.
    weights
        Weight formats instead of the checkpoint's.
    kv
        KV cache format: bf16, fp8 or fp8_ds_mla.
    skew
        Expert popularity: mixed, single-domain, aux-balanced-8-experts or uniform.
    seed
        Seed of arrivals and lengths.
    out
        Folder for the request and step tables. Must be new or empty.
    json
        Print the facts as JSON.
    """
    from planner.deploy import simulate_layout
    from planner.engine import engine as load_engine
    from planner.facts import simulation_facts
    from planner.hardware import parse_cluster
    from planner.layout import parse_layout
    from planner.runfolder import check_folder, write_simulation
    from planner.text import simulation_text
    from planner.workload import parse_slo

    _positive(max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens)
    if out is not None:
        check_folder(out)
    start = time.perf_counter()
    objectives = parse_slo(slo) if slo else None
    with _progress() as progress:
        run = simulate_layout(
            _precision(model, weights, kv),
            parse_cluster(cluster),
            parse_layout(layout),
            _workload(workload, rate, concurrency, num_requests),
            load_engine(engine),
            objectives,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            backend=backend,
            skew=skew,
            seed=seed,
            progress=lambda share: progress("simulate", share),
        )
    wall_s = time.perf_counter() - start
    facts = simulation_facts(run, _command())
    if out is not None:
        write_simulation(out, run, facts)
    _print(facts, json, simulation_text, wall_s=wall_s)


@profiles.command(name="list")
def list_profiles(*, json: bool = False) -> None:
    """Known systems, and for which of them kernels were measured.

    Parameters
    ----------
    json
        Print a JSON list.
    """
    from planner.facts import profile_rows
    from planner.text import profiles_text

    _print(profile_rows(), json, profiles_text)


@profiles.command
def show(name: str, *, json: bool = False) -> None:
    """Every fact of one system with its source, and what is measured on it.

    Parameters
    ----------
    name
        System name or profile TOML.
    json
        Print the facts as JSON.
    """
    from planner.facts import profile_facts
    from planner.text import profile_text

    _print(profile_facts(name), json, profile_text)


@profiles.command
def schema() -> None:
    """JSON schema of a profile TOML, for editor completion."""
    from planner.hardware import schema as profile_schema

    print(json.dumps(profile_schema(), indent=2))


@profiles.command(name="import")
def import_profiles(tree: Path, *, system: str, name: str, out: Path) -> None:
    """Convert a tree of measured kernel tables (aiconfigurator-core layout) into a compact profile.

    Parameters
    ----------
    tree
        Folder laid out as <system>/<family>/<engine>/<version>/<op>_perf.parquet.
    system
        Folder name inside the tree, such as h200_sxm.
    name
        Name of the profile to write, such as h200-sxm.
    out
        Folder that receives <name>/.
    """
    from planner.measurements.importer import import_tables
    from planner.text import import_text

    print(import_text(import_tables(tree, system, out, name)))


def _precision(model: str, weights: str | None, kv: str | None) -> ModelConfig:
    """`model` with the precisions given on the command line."""
    from planner.model import load
    from planner.model.precision import override, parse_weights

    return override(load(model), **parse_weights(weights), kv=kv)


def _workload(text: str, rate: float | None, concurrency: int | None, num_requests: int | None) -> Workload:
    from planner.workload import load_workload

    if rate is None and concurrency is None and not text.endswith((".csv", ".toml")):
        rate = _DEFAULT_RATE
    return load_workload(text, rate=rate, concurrency=concurrency, num_requests=num_requests)


def _positive(**values: int | None) -> None:
    from planner.errors import InputError

    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: a positive whole number is needed")


def _distinct(clusters: list[Any]) -> list[Any]:
    from planner.errors import InputError

    names = [c.name for c in clusters]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise InputError(f"--cluster {twice} is given twice: offer each cluster once")
    return clusters


def _print(facts: Any, as_json: bool, text: Callable[[Any], str], **extra: float) -> None:
    if as_json:
        shown = facts | extra if isinstance(facts, dict) else facts
        print(json.dumps(shown, indent=2, allow_nan=False))
    else:
        print(text(facts))
        if "wall_s" in extra:
            print(f"\nAnswered in {extra['wall_s']:.1f} s.")


def _command() -> str:
    import shlex

    return "moeplan " + shlex.join(sys.argv[1:])


class _progress:
    """A progress bar on stderr for people, nothing when stderr is not a terminal."""

    def __enter__(self) -> Callable[[str, float], None]:
        if not sys.stderr.isatty():
            return lambda label, share: None
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True)
        self._bar.start()
        self._tasks: dict[str, Any] = {}
        return self._show

    def _show(self, label: str, share: float) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bar.add_task(label, total=1.0)
        self._bar.update(self._tasks[label], completed=share)

    def __exit__(self, *exception: object) -> None:
        if hasattr(self, "_bar"):
            self._bar.stop()


def main() -> None:
    """Entry point of the `moeplan` command: exit code 0 answer, 2 bad input, 3 infeasible."""
    from planner.errors import Infeasible, PlannerError

    try:
        app(exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(str(error), 2)
    except Infeasible as error:
        _fail("\n".join([str(error), *(f"  - {remedy}" for remedy in error.remedies)]), error.exit_code)
    except PlannerError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    print(f"moeplan: {message}", file=sys.stderr)
    sys.exit(code)
