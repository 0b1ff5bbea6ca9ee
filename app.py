"""The dashboard lays out what `planner.whatif` answers. Start it: `moeplan dashboard` or `streamlit run app.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from html import escape
from typing import Any

import streamlit as st

from planner.errors import InputError
from planner.hardware import systems
from planner.whatif import analytic, charts, details, edits, form, front, jobs, lab, outcome, pins, rivals, rows
from planner.whatif.analytic import Answer
from planner.whatif.bottleneck import bottleneck
from planner.whatif.question import MOST_RIVALS, config_problem, opened, rival_names, trace_problem
from planner.whatif.scenario import Scenario, missed, safe_name
from planner.whatif.tornado import keeps_slo, tornado

FIELDS = tuple(field.name for field in fields(Scenario))
WIDGETS = {"select": "selectbox", "slider": "select_slider", "number": "number_input", "text": "text_input"}


def main() -> None:
    """One run of the page."""
    st.set_page_config(page_title="moeplan", layout="wide", initial_sidebar_state="expanded")
    st.html(form.STYLE)
    _restore()
    notes = _side_bar()
    head = st.container()
    view = str(st.segmented_control("View", VIEWS, key="view", required=True, label_visibility="collapsed"))
    if view == "MoE knobs":
        notes |= _grid(form.knob_fields())
        st.button("Reset the knobs", on_click=lambda: _fill(replace(_scenario().without_knobs(), ep=0)))
    scenario = replace(_scenario(), rivals="")  # they are asked about under Compare alone
    found = analytic.answer(scenario)
    if not isinstance(found, Answer):
        for problem in found:
            notes.get(problem.field, head).error(rows.plain(problem.message))
        head.warning("The answer below is to your last valid question: correct the field marked red.")
        found = analytic.answer(st.session_state.good)
    st.session_state.good = found.question.scenario
    mood = "good" if found.is_good else "short" if found.chosen else "bad"
    head.html(f'<div class="answer {mood}" role="status">{escape(f"Estimate: {analytic.headline(found)}")}</div>')
    _footer(found, VIEWS[view](found) or analytic.command(found))
    _remember(view)


def _restore() -> None:
    """The form of the last run; on the first one that of the address."""
    state = st.session_state
    if "in_model" in state:
        state.update({f"in_{name}": state[f"in_{name}"] for name in FIELDS})  # or inputs not drawn would be lost
        if _scenario() != state.opened:
            state.unread, state.missed = [], {}
        return
    state.opened, state.unread = opened(st.query_params.to_dict())
    state.good, state.missed = replace(state.opened, rivals=""), missed(st.query_params)
    state.pinned = pins.unpacked(st.query_params.get("pins", ""))
    state.in_rivals = state.opened.rivals
    _fill(state.good)
    state.view = {name: name for name in VIEWS}.get(st.query_params.get("view", ""), "Plan")


def _fill(scenario: Scenario, view: str | None = None) -> None:
    """Put a scenario into the form; the systems to compare with stay."""
    kept = replace(scenario, rivals=st.session_state.in_rivals)
    st.session_state.update({f"in_{name}": value for name, value in asdict(kept).items()})
    st.session_state.view = view or st.session_state.get("view")


def _scenario() -> Scenario:
    """The form as a scenario; an emptied field counts as its default."""
    given = {name: st.session_state[f"in_{name}"] for name in FIELDS}
    return Scenario(**{name: value for name, value in given.items() if value is not None})


def _remember(view: str) -> None:
    view_and_pins = {"view": "" if view == "Plan" else view, "pins": pins.packed(st.session_state.pinned)}
    wanted = _scenario().query() | {k: v for k, v in view_and_pins.items() if v} | st.session_state.missed
    if st.query_params.to_dict() != wanted:
        st.query_params.from_dict(wanted)


def _side_bar() -> dict[str, Any]:
    """All inputs but the knobs; returns where to say what is wrong with each."""
    with st.sidebar:
        st.subheader("moeplan")
        for problem in st.session_state.unread:
            st.warning(rows.plain(problem))
        notes = _grid(form.main_fields())
        with st.expander("Advanced"):
            notes |= _grid(form.advanced_fields())
            notes["config"] = _upload("config", "config.json of a model, up to 5 MB", "json", config_problem)
            label = "Trace CSV: arrival_s, prompt_tokens, output_tokens"
            notes["trace"] = _upload("trace", label, "csv", trace_problem)
    return notes


def _grid(lines: Sequence[Sequence[form.Field]]) -> dict[str, Any]:
    """Rows of inputs, and the place below each row for its problems."""
    notes: dict[str, Any] = {}
    for line in lines:
        places = st.columns([field.width for field in line], vertical_alignment="bottom")
        for column, field in zip(places, line, strict=True):
            _input(field, column)
        notes |= dict.fromkeys([field.name for field in line], st.container())
    return notes


def _input(field: form.Field, place: Any) -> None:
    key, more = f"in_{field.name}", field.settings(st.session_state[f"in_{field.name}"])
    upload = st.session_state[f"in_{field.upload}_name"] if field.upload else ""
    getattr(place, WIDGETS[field.kind])(field.label, key=key, help=field.help, disabled=bool(upload), **more)
    if upload:
        empty = {f"in_{field.upload}": "", f"in_{field.upload}_name": ""}
        place.button(f"Drop {upload}", on_click=st.session_state.update, args=(empty,), key=f"drop_{field.upload}")


def _upload(field: str, label: str, kind: str, problem: Callable[[str, str], str | None]) -> Any:
    """A file that replaces the model or the workload if it is good; the form stays as it is if not."""
    key = f"file_{field}"
    st.file_uploader(label, type=kind, max_upload_size=20, key=key, on_change=_take, args=(field, key, problem))
    place = st.container()
    fault, kept = st.session_state.get(f"bad_{field}", ("", None))
    if fault and kept == _scenario():
        place.error(rows.plain(f"{fault} Your earlier choice is kept."))
    return place


def _take(field: str, key: str, problem: Callable[[str, str], str | None]) -> None:
    file, fault = st.session_state[key], None
    if file is not None:
        text = file.getvalue().decode("utf-8-sig", errors="replace")
        fault = problem(text, file.name)
        if not fault:
            st.session_state[f"in_{field}"], st.session_state[f"in_{field}_name"] = text, safe_name(file.name)
    st.session_state[f"bad_{field}"] = fault, _scenario()


def _tiles(shown: Sequence[analytic.Tile]) -> None:
    for column, tile in zip(st.columns(len(shown) or 1), shown, strict=False):
        column.metric(tile.label, tile.value, help=tile.help)
        column.caption(rows.plain(tile.note))


def _chart(spec: charts.Spec, alt: str, table: Sequence[Mapping[str, Any]], key: str, **more: Any) -> None:
    """A chart with its text for screen readers and the same numbers as a table."""
    st.vega_lite_chart(spec=spec, width="stretch", theme=None, key=key, alt=alt, **more)
    with st.expander(f"Numbers: {alt}"):
        st.table(rows.as_text(table), hide_index=True)


def _footer(found: Answer, command: str) -> None:
    scenario, pinned = found.question.scenario, st.session_state.pinned
    st.divider()
    left, right = st.columns([5, 1], vertical_alignment="bottom")
    left.caption(f"The same on the command line. {rows.plain(pins.link_note(scenario, pinned))}")
    left.code(command, language="bash", wrap_lines=True)
    right.button(
        "Pin this answer", disabled=pins.are_full(pinned, scenario), key="pin", on_click=lambda: pinned.append(scenario)
    )
    with st.expander("How to start this layout"):
        st.code(details.launch_text(found), language="bash", wrap_lines=True)
    with st.expander("Facts and sources behind this answer"):
        st.table(details.sources(found), hide_index=True)


def _plan(found: Answer) -> None:
    if not found.is_good:
        _remedies(found)
    if found.chosen is None:
        return
    _tiles(analytic.tiles(found))
    if (job := st.session_state.get("run")) and job.scenario == found.question.scenario and (facts := job.facts()):
        st.success(rows.plain(f"Simulated: {outcome.verdict(facts)}"))
    st.markdown(f"**Bottleneck.** {bottleneck(found)}")
    st.caption(analytic.sure_sentence(found))
    for near in analytic.borderline(found):
        st.markdown(analytic.borderline_sentence(near))
        again = ("run", found.question.scenario, analytic.plan_command(found), "Simulation")
        st.button("Simulate the plan", on_click=_start, args=again, key=f"near_{near.num_gpus}")
    alt, least = "Throughput per GPU against interactivity, by layout", front.least_tok_per_s_per_user(found)
    lines = front.envelope(found), front.chosen_curve(found)
    spec = charts.pareto(front.cloud(found), lines, front.at_demand(found), least)
    _chart(spec, alt, front.front(found), "front", on_select=_clicked, selection_mode=charts.PICK)
    st.caption(front.CAPTION)
    names, state = front.names(found), st.session_state
    state.listed = state.get("listed") if state.get("listed") in names else None
    more = {"key": "listed", "on_change": lambda: state.update(picked=state.listed)}
    st.selectbox("Details of a layout", [*names], None, names.get, placeholder="or choose one here", **more)
    if state.get("picked") in names:
        _picked(state.picked, found)
    st.markdown(f"**Memory of one GPU.** {analytic.memory_line(found)}")
    memory = details.memory_rows(found)
    _chart(charts.stacked(memory, "GB per GPU", 1e9), "Memory of one GPU by use", rows.parts(memory), "memory")
    for column, (name, step) in zip(st.columns(2), (("decode", found.decode), ("prefill", found.prefill)), strict=True):
        with column:
            terms = details.step_rows(step)
            st.markdown(f"**A {name} step** takes {rows.total(terms)}")
            _chart(charts.bars(terms, "ms", 1e-3), f"Operations of a {name} step", rows.parts(terms), name)
    with st.expander("What a tenth more or less of each input does"):
        (rate, usd, found_bars), within = tornado(found), keeps_slo(found)
        st.caption(rows.plain(rows.tornado_caption(rate, usd, within)))
        shown, alt = [asdict(bar) for bar in found_bars], "Sensitivity of the load carried"
        _chart(charts.tornado(rate, found_bars, within), alt, shown, "tornado")


def _clicked() -> None:  # from now on the click counts, no longer the list below the chart
    points = st.session_state.front.selection.get(charts.PICK) or [{"id": None}]
    st.session_state.update(picked=points[0]["id"], listed=None)


def _picked(identity: str, found: Answer) -> None:
    asked = analytic.with_layout(found, identity)
    other = analytic.answer(asked)
    if isinstance(other, Answer) and other.chosen is not None:
        with st.container(border=True, key="details"):
            st.markdown(f"**{rows.plain(analytic.headline(other))}**")
            _tiles(analytic.tiles(other))
            st.markdown(bottleneck(other))
            st.button("Use this layout", on_click=_fill, args=(asked,), key="use_layout")


def _remedies(found: Answer) -> None:
    st.markdown(rows.plain(edits.shortfall(found)))
    tried = edits.edits(found)
    st.markdown("**What would do, cheapest first**" if tried else "No single change was found that meets the SLO.")
    for number, edit in enumerate(tried):
        st.button(rows.plain(edit.text), on_click=_fill, args=(edit.scenario,), key=f"remedy_{number}")


def _knobs(found: Answer) -> None:
    scenario = found.question.scenario
    measured = lab.lab(scenario)
    st.caption(rows.plain(measured.note))
    st.table(rows.knobs(measured), hide_index=True)
    loads = lab.heat(scenario)
    st.markdown("**Load of the ranks over the even share**")
    st.caption(rows.heat_caption(loads))
    if not isinstance(loads, str):
        _chart(charts.heat(loads), "Load of every rank before and after balancing", rows.heat(loads), "heat")
    lost, alt = lab.drop_curve(scenario, measured.tokens), "Dropped assignments against the capacity factor"
    if lost:
        st.markdown(f"**{alt}**")
        _chart(charts.drops(lost, scenario.capacity_factor), alt, lost, "drops")


def _simulation(found: Answer) -> str:
    if found.chosen is None:
        st.info("Nothing fits, so there is nothing to simulate: see the remedies under Plan.")
        return ""
    commands = {"Simulate this layout": analytic.command(found), "Simulate the plan": analytic.plan_command(found)}
    return _runner("run", found.question.scenario, commands, _simulated)


def _runner(slot: str, scenario: Scenario, commands: Mapping[str, str], show: Callable[..., None]) -> str:
    """Buttons that run commands beside the page, progress, and what the last one found; the command of that."""
    for column, (label, command) in zip(st.columns(len(commands)), commands.items(), strict=True):
        column.button(label, on_click=_start, args=(slot, scenario, command), help=command, width="stretch")
    if refused := st.session_state.get(f"refused_{slot}"):
        st.error(rows.plain(refused))
    job = st.session_state.get(slot)
    is_current = job is not None and job.answers(scenario, commands.values())
    if job is None:
        st.caption("Runs beside this page: go on with other views meanwhile, or cancel.")
    elif job.is_running:
        _watch(slot)
    elif (facts := job.facts()) is None:
        st.error(rows.plain(f"No result: {job.problem()}"))
    else:
        if not is_current:
            st.warning("The inputs have changed since this run.")
        show(job, facts)
        with st.container(horizontal=True):
            st.download_button("Download the run folder", job.archive(), "moeplan-run.zip", key=f"zip_{slot}")
            for name, data in job.downloads():
                st.download_button(f"Download {name}", data, name, key=f"{slot}_{name}", on_click="ignore")
    return job.command if is_current else next(iter(commands.values()))


def _start(slot: str, scenario: Scenario, command: str, view: str = "") -> None:
    st.session_state.view, st.session_state[f"refused_{slot}"] = view or st.session_state.view, ""
    try:
        st.session_state[slot] = jobs.Job(scenario, command)
    except InputError as error:
        st.session_state[f"refused_{slot}"] = str(error)


@st.fragment(run_every=0.7)
def _watch(slot: str) -> None:
    job = st.session_state[slot]
    if not job.is_running:
        st.rerun()
    label, share = job.progress()
    st.progress(share, text=f"{label}, {job.elapsed_s:.0f} s")
    st.button("Cancel", on_click=job.cancel, key=f"cancel_{slot}")


def _simulated(job: jobs.Job, facts: Mapping[str, Any]) -> None:
    st.markdown(f"**{rows.plain(outcome.verdict(facts))}**")
    _tiles(outcome.tiles(facts))
    st.markdown(rows.plain(outcome.sentences(facts)))
    for columns in outcome.figures(facts, job.scenario.slo):
        for place, figure in zip(st.columns(len(columns)), columns, strict=True):
            with place:
                _chart(figure.spec, figure.alt, figure.table, figure.alt)


def _compare(found: Answer) -> str:
    scenario, state = found.question.scenario, st.session_state
    if "rivals" not in state:
        state.rivals = [*rival_names(state.in_rivals)]
    chosen = st.multiselect("Systems", systems(), key="rivals", max_selections=MOST_RIVALS)
    state.in_rivals = ",".join(chosen) if tuple(chosen) != rival_names("") else ""
    compared = rivals.rivals(scenario, chosen)
    st.caption(rows.SYSTEMS_CAPTION)
    st.table(rows.systems(compared), hide_index=True)
    with st.container(horizontal=True):
        for row in (row for row in compared if row.scenario):
            st.button(f"Look at {row.gpu}", on_click=_fill, args=(row.scenario, "Plan"), key=f"look_{row.name}")
    if len(chosen) < 2:
        return ""
    commands = {"Compare by simulation, with cost and odds": scenario.compare_command(chosen)}
    return _runner("comparison", scenario, commands, _compared)


def _compared(job: jobs.Job, facts: Mapping[str, Any]) -> None:
    st.markdown(f"**{rows.plain(str(facts['headline']))}**")
    st.table(rows.comparison(facts), hide_index=True)


def _pins(found: Answer) -> None:
    pinned = st.session_state.pinned
    if not pinned:
        st.info("Pin an answer with the button at the foot of the page, change an input, and compare here.")
    for number, scenario in enumerate(pinned):
        with st.container(border=True):
            st.markdown(f"**{rows.plain(pins.label(scenario))}**")
            left, right = st.columns(2)
            left.button("Go back to it", on_click=_fill, args=(scenario, "Plan"), key=f"open_{number}")
            right.button("Unpin", on_click=pinned.pop, args=(number,), key=f"unpin_{number}")
            st.table(rows.pinned(analytic.answer(scenario), found), hide_index=True)


VIEWS = {"Plan": _plan, "MoE knobs": _knobs, "Simulation": _simulation, "Compare clusters": _compare, "Pins": _pins}
if __name__ == "__main__":
    main()
