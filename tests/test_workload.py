import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import WorkloadError
from planner.workload import PRESETS, Arrivals, Lengths, Objective, Workload, load_workload, parse_slo

LENGTHS = [
    Lengths.fixed(1024),
    Lengths.uniform(819, 1024),
    Lengths.lognormal(1024, 0.8),
    Lengths.lognormal(100, 1.5, minimum=10, maximum=300),
    Lengths.empirical([1, 5, 5, 900]),
    Lengths.replay([7, 8, 9, 10]),
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: x.kind)
def test_lengths_sample_within_bounds_and_at_their_mean(lengths):
    sample = lengths.sample(np.random.default_rng(1), 40_000)
    assert sample.dtype == np.int64
    assert sample.min() >= lengths.minimum >= 1
    assert sample.max() <= lengths.maximum
    standard_error = sample.std() / math.sqrt(len(sample))
    assert abs(sample.mean() - lengths.mean) <= 4 * standard_error + 0.05


def test_lognormal_tail_is_cut_at_the_999th_permille():
    lengths = Lengths.lognormal(1024, 0.8)
    sample = lengths.sample(np.random.default_rng(0), 200_000)
    assert 0.0005 < np.mean(sample >= lengths.maximum) < 0.0015
    assert 0.98 * 1024 < lengths.mean < 1024
    assert np.std(np.log(sample)) == pytest.approx(0.8, rel=0.02)


def test_replay_keeps_prompt_and_answer_of_a_row_together():
    workload = Workload("t", Lengths.replay([1, 2, 3]), Lengths.replay([10, 20, 30]), Arrivals.poisson(1), 7)
    requests = workload.requests(5)
    assert (requests.output_tokens == 10 * requests.prompt_tokens).all()


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.5])
def test_gamma_gaps_have_the_asked_rate_and_cv(cv):
    times = Arrivals.gamma(4.0, cv).times(np.random.default_rng(2), 100_000)
    gaps = np.diff(times, prepend=0.0)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_gamma_with_cv_1_is_poisson():
    rng = np.random.default_rng
    np.testing.assert_array_equal(Arrivals.gamma(2, 1).times(rng(3), 100), Arrivals.poisson(2).times(rng(3), 100))


def test_rate_stretches_time_and_leaves_lengths():
    workload = load_workload("chat", rate=2, num_requests=500)
    slow, fast = workload.requests(9), workload.with_rate(4).requests(9)
    np.testing.assert_allclose(slow.arrival_s, 2 * fast.arrival_s)
    np.testing.assert_array_equal(slow.prompt_tokens, fast.prompt_tokens)
    closed = workload.with_concurrency(8).requests(9)
    np.testing.assert_array_equal(slow.output_tokens, closed.output_tokens)
    assert not closed.arrival_s.any()


def test_same_seed_same_requests_other_seed_others():
    workload = load_workload("chat", rate=2, num_requests=100)
    one, same, other = workload.requests(1), workload.requests(1), workload.requests(2)
    assert one.arrival_s.tobytes() == same.arrival_s.tobytes()
    assert one.prompt_tokens.tobytes() == same.prompt_tokens.tobytes()
    assert one.prompt_tokens.tobytes() != other.prompt_tokens.tobytes()


def test_trace_repeats_with_its_mean_gap_and_stretches():
    arrivals = Arrivals.trace([10.0, 11.0, 14.0])
    assert arrivals.rate_per_s == pytest.approx(0.5)
    np.testing.assert_allclose(arrivals.times(np.random.default_rng(0), 7), [0, 1, 4, 6, 7, 10, 12])
    faster = arrivals.with_rate(5.0)
    np.testing.assert_allclose(faster.times(np.random.default_rng(0), 3), [0, 0.1, 0.4])


def test_burst_trace_has_no_rate():
    burst = Arrivals.trace([3.0, 3.0])
    assert burst.rate_per_s == math.inf
    assert not burst.times(np.random.default_rng(0), 5).any()
    with pytest.raises(WorkloadError, match="all requests of the trace arrive at once"):
        burst.with_rate(2.0)


def test_presets_state_their_sources():
    assert set(PRESETS) == {"chat", "rag", "code", "summarize", "reasoning", "batch", "agents", "multi-turn"}
    for name, preset in PRESETS.items():
        assert "ssumption" in preset.source or "InferenceX" in preset.source
        workload = load_workload(name)
        assert workload.num_requests >= 2000
        assert workload.max_output_tokens >= workload.mean_output_tokens >= 1


def test_shapes():
    fixed = load_workload("fixed:1024/256", rate=3, num_requests=10)
    assert (fixed.mean_prompt_tokens, fixed.max_output_tokens, fixed.num_requests) == (1024, 256, 10)
    assert fixed.arrivals == Arrivals.poisson(3)
    uniform = load_workload("uniform:819-1024/6553-8192", concurrency=64)
    assert (uniform.prompt.minimum, uniform.output.maximum) == (819, 8192)
    assert uniform.arrivals == Arrivals.closed(64)
    assert load_workload("fixed:8/8", concurrency=1000).num_requests == 12_000
    lognormal = load_workload("lognormal:1024~0.6/256~0.8")
    assert (lognormal.prompt.sigma, lognormal.output.sigma) == (0.6, 0.8)
    assert str(fixed) == "fixed:1024/256: 1,024 tokens in, 256 out, 3 requests/s (poisson), 10 requests"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chta", "did you mean .*chat"),
        ("fixd:10/10", "did you mean fixed"),
        ("fixed:10", "expected prompt/output"),
        ("fixed:0/10", "0 tokens"),
        ("fixed:a/10", "numbers expected"),
        ("uniform:20-10/1-2", "range is empty"),
        ("uniform:20/1-2", "numbers expected"),
        ("lognormal:10~-1/10~1", "sigma -1 must lie"),
        ("lognormal:nan~1/10~1", "mean nan"),
        ("nowhere.csv", "No such file"),
        ("nowhere.toml", "No such file"),
    ],
)
def test_unreadable_workloads_say_what_and_how(text, message):
    with pytest.raises(WorkloadError, match=message):
        load_workload(text)


@pytest.mark.parametrize("rate", [-1.0, 0.0, math.nan, math.inf])
def test_rates_must_be_positive(rate):
    with pytest.raises(WorkloadError, match="a rate is a positive number"):
        load_workload("chat", rate=rate)


def test_rate_and_concurrency_exclude_each_other_and_counts_are_positive():
    with pytest.raises(WorkloadError, match="exclude each other"):
        load_workload("chat", rate=1, concurrency=2)
    with pytest.raises(WorkloadError, match="at least 1 user"):
        load_workload("chat", concurrency=0)
    with pytest.raises(WorkloadError, match="0 requests"):
        load_workload("chat", num_requests=0)
    with pytest.raises(WorkloadError, match="seed -1"):
        load_workload("chat").requests(-1)
    with pytest.raises(WorkloadError, match="cv 0 must"):
        Arrivals.gamma(1, 0)


def write(tmp_path, text, name="trace.csv"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_trace_csv_round_trip(tmp_path):
    text = "output_tokens, arrival_s,prompt_tokens,user\n5,100.5,70,a\n6,100.5,80,b\n7,103,90,c\n"
    workload = load_workload(write(tmp_path, text))
    requests = workload.requests(0)
    np.testing.assert_array_equal(requests.arrival_s, [0, 0, 2.5])
    np.testing.assert_array_equal(requests.prompt_tokens, [70, 80, 90])
    np.testing.assert_array_equal(requests.output_tokens, [5, 6, 7])
    assert (workload.name, workload.num_requests) == ("trace", 3)
    assert load_workload(write(tmp_path, text), rate=8.0).arrivals.rate_per_s == 8.0


HEADER = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "0,10,5\n1,nan,5\n", "line 3: prompt_tokens 'nan' is not a whole number"),
        (HEADER + "0,10,0\n", "line 2: output_tokens '0'"),
        (HEADER + "0,10,2.5\n", "line 2: output_tokens '2.5'"),
        (HEADER + "nan,10,2\n", "line 2: arrival_s 'nan'"),
        (HEADER + "-1,10,2\n", "line 2: arrival_s '-1'"),
        (HEADER + "5,10,2\n4,10,2\n", "line 3: arrival_s 4 is earlier than 5 before it; sort"),
        (HEADER + "0,10\n", "line 2: output_tokens ''"),
        (HEADER, "no rows"),
        ("", "the file is empty"),
        ("arrival,prompt_tokens,output_tokens\n0,1,1\n", "missing column arrival_s .*did you mean arrival"),
        (HEADER + "x,0,0\n" * 4, "12 faults"),
    ],
)
def test_bad_traces_name_the_row_the_value_and_the_remedy(tmp_path, text, message):
    with pytest.raises(WorkloadError, match=message):
        load_workload(write(tmp_path, text))


TOML = """
num_requests = 300
[prompt]
kind = "lognormal"
mean = 500
sigma = 0.5
maximum = 2000
[output]
kind = "empirical"
csv = "lengths.csv"
column = "tokens"
[arrivals]
kind = "gamma"
rate_per_s = 3.0
cv = 2.0
"""


def test_workload_toml(tmp_path):
    write(tmp_path, "tokens\n10\n20\n", "lengths.csv")
    workload = load_workload(write(tmp_path, TOML, "bot.toml"))
    assert workload.name == "bot"
    assert workload.num_requests == 300
    assert workload.prompt == Lengths.lognormal(500, 0.5, maximum=2000)
    assert workload.output == Lengths.empirical([10, 20])
    assert workload.arrivals == Arrivals.gamma(3.0, 2.0)
    assert load_workload(str(tmp_path / "bot.toml"), rate=9).arrivals == Arrivals.gamma(9.0, 2.0)
    assert load_workload(str(tmp_path / "bot.toml"), concurrency=9).arrivals == Arrivals.closed(9)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("sigma = 0.5", "sigm = 0.5", "did you mean sigma"),
        ('kind = "lognormal"', 'kind = "lognrmal"', "prompt"),
        ("rate_per_s = 3.0", "rate_per_s = -3.0", "rate -3"),
        ("mean = 500", 'mean = "many"', r"prompt.lognormal.mean: .*\(is 'many'\)"),
        ('column = "tokens"', 'column = "token"', "did you mean tokens"),
        ("mean = 500", "mean = 500 = 3", "not valid TOML"),
        ('kind = "gamma"', 'kind = "closed"', "concurrency: Field required"),
    ],
)
def test_bad_workload_toml_names_the_key(tmp_path, before, after, message):
    write(tmp_path, "tokens\n10\n", "lengths.csv")
    with pytest.raises(WorkloadError, match=message):
        load_workload(write(tmp_path, TOML.replace(before, after), "w.toml"))


def test_toml_reports_all_faults_at_once(tmp_path):
    text = TOML.replace("sigma = 0.5", "sigma = 0.5\ncolour = 1").replace("num_requests", "num_request")
    with pytest.raises(WorkloadError) as caught:
        load_workload(write(tmp_path, text, "w.toml"))
    assert "colour" in str(caught.value)
    assert "num_request:" in str(caught.value)


def test_slo():
    slo = parse_slo("ttft_p95=2s, tpot_p95=50ms,e2e_mean=1.5e7us,ttft_p50=.5s")
    assert slo.objectives[1] == Objective("tpot", "p95", 0.05)
    assert slo.limits_s() == {"ttft": 0.5, "tpot": 0.05, "e2e": 15.0}
    assert str(slo.objectives[0]) == "ttft_p95 <= 2.00 s"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft_p95=2", "no unit. Write 2ms or 2s"),
        ("ttft_p95=2min", "unknown unit 'min'"),
        ("ttft_p95=-2s", "positive"),
        ("ttft_p95=0s", "positive"),
        ("ttft_p95=nans", "not a time"),
        ("ttft_p95", "no limit"),
        ("ttft=2s", "no statistic. Write ttft_p95"),
        ("ttft_p42=2s", "unknown statistic 'p42'"),
        ("tptt_p95=2s", "did you mean"),
        ("ttft_p95=2s,ttft_p95=3s", "given twice"),
        (" ,", "is empty"),
    ],
)
def test_bad_slo(text, message):
    with pytest.raises(WorkloadError, match=message):
        parse_slo(text)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    limit=st.floats(1e-6, 1e6),
    unit=st.sampled_from([("s", 1.0), ("ms", 1e-3), ("us", 1e-6)]),
    name=st.sampled_from(["ttft_p95", "tpot_mean", "e2e_p99"]),
)
def test_slo_round_trip(limit, unit, name):
    (objective,) = parse_slo(f"{name}={limit!r}{unit[0]}").objectives
    assert objective.name == name
    assert objective.limit_s == pytest.approx(limit * unit[1])
