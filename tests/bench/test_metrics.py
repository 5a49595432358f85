"""Figures from timelines, with what was computed by hand."""

import pytest

from jaxserve.bench.metrics import distribution, percentile, summarize
from jaxserve.bench.one_batch import figures
from jaxserve.bench.timeline import Timeline


def timeline(sent: float, *events: tuple[float, int], asked: int = 5, **fields) -> Timeline:
    made = Timeline(asked, due=sent - 0.25, sent=sent, **fields)
    for time, count in events:
        made.record(time, count)
    return made


SLOW = timeline(10.0, (10.1, 1), (10.2, 2), (10.8, 5), prompt_tokens=7, cached_tokens=2)
QUICK = timeline(10.2, (10.4, 2), (10.8, 4), prompt_tokens=3)
REFUSED = timeline(9.0, error="503: full")
BROKEN = timeline(9.0, (9.5, 1), error="lost", prompt_tokens=99)


def test_timeline_of_single_tokens_and_of_several_in_an_event():
    assert SLOW.latency == pytest.approx(0.8)
    assert SLOW.time_to_first_token == pytest.approx(0.1)
    assert SLOW.time_per_output_token == pytest.approx(0.7 / 4)
    assert SLOW.inter_token_latencies == pytest.approx([0.1, 0.2, 0.2, 0.2])
    assert QUICK.inter_token_latencies == pytest.approx([0.2, 0.2])


def test_all_tokens_in_one_event_have_no_time_between():
    whole = timeline(1.0, (2.0, 64))
    assert whole.time_per_output_token is None
    assert whole.inter_token_latencies == []


def test_events_without_news_are_none_and_those_of_one_time_are_one():
    made = timeline(0.0, (1.0, 0), (1.0, 1), (1.0, 2), (2.0, 2), (3.0, 3))
    assert made.events == [(1.0, 2), (3.0, 3)]


def test_summary_by_hand():
    metrics = summarize([SLOW, QUICK, REFUSED, BROKEN, REFUSED], is_streamed=True)
    assert metrics["num_requests"] == 5
    assert metrics["num_succeeded"] == 2
    assert metrics["num_failed"] == 3
    assert metrics["num_shorter_than_asked"] == 1, "QUICK has 4 of 5"
    assert metrics["errors"] == [
        {"message": "503: full", "count": 2},
        {"message": "lost", "count": 1},
    ]
    assert (metrics["input_tokens"], metrics["cached_tokens"]) == (10, 2)
    assert metrics["output_tokens"] == 9
    assert metrics["duration_s"] == pytest.approx(0.8)
    assert metrics["requests_per_s"] == pytest.approx(2 / 0.8)
    assert metrics["input_tokens_per_s"] == pytest.approx(10 / 0.8)
    assert metrics["output_tokens_per_s"] == pytest.approx(9 / 0.8)
    assert metrics["total_tokens_per_s"] == pytest.approx(19 / 0.8)
    assert metrics["mean_concurrency"] == pytest.approx((0.8 + 0.6) / 0.8)
    expected = {
        "latency_ms": {"mean": 700, "p50": 700, "p90": 780, "p99": 798},
        "ttft_ms": {"mean": 150, "p50": 150, "p90": 190, "p99": 199},
        "tpot_ms": {"mean": 187.5, "p50": 187.5, "p90": 197.5, "p99": 199.75},
        # one of 100 and five of 200: rank 2.5, 4.5 and 4.95 of 0 to 5
        "itl_ms": {"mean": 1100 / 6, "p50": 200, "p90": 200, "p99": 200},
        "send_delay_ms": {"mean": 250, "p50": 250, "p90": 250, "p99": 250},
    }
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(values), name


def test_answers_in_one_piece_tell_nothing_of_the_time_between():
    metrics = summarize([timeline(0.0, (2.0, 5))], is_streamed=False)
    assert metrics["latency_ms"]["mean"] == pytest.approx(2000)
    assert not {"ttft_ms", "tpot_ms", "itl_ms"} & set(metrics)


def test_no_success_is_no_division_by_zero():
    for timelines in ([], [REFUSED], [timeline(1.0)]):
        metrics = summarize(timelines, is_streamed=True)
        assert metrics["num_succeeded"] == metrics["output_tokens"] == 0
        assert metrics["output_tokens_per_s"] is None
        assert metrics["ttft_ms"] is None
    assert metrics["errors"] == [{"message": "no token came", "count": 1}]


def test_percentiles_lie_between_values():
    values = [10.0, 20.0, 30.0, 40.0, 50.0]
    shares = (0, 25, 50, 90, 99, 100)
    assert [percentile(values, share) for share in shares] == [10, 20, 30, 46, 49.6, 50]
    assert percentile([7.0], 99) == 7.0
    assert distribution([]) is None


def test_one_batch_by_hand():
    """Two requests; the second has its first token at 1.5 s, when the first has had two already,
    and the first is complete at 2.1 s: three steps of 0.2 s have both of them."""
    first = timeline(1.0, (1.2, 1), (1.5, 2), (1.7, 3), (1.9, 4), (2.1, 5), prompt_tokens=30)
    second = timeline(1.0, (1.5, 1), (1.7, 2), (1.9, 3), (2.1, 4), (2.2, 5), prompt_tokens=30)
    got = figures([first, second])
    assert got.pop("decode_step_ms") == pytest.approx(
        {"mean": 200, "p50": 200, "p90": 200, "p99": 200}
    )
    assert got == pytest.approx(
        {
            "prefill_ms": 500,
            "input_tokens_per_s": 60 / 0.5,
            "output_tokens": 10,
            "latency_ms": 1200,
            "decode_steps": 3,
            "decode_ms_per_step": 200,
            "decode_ms_per_token": 100,
            "decode_tokens_per_s": 10,
        }
    )


def test_one_batch_whose_requests_never_decode_together():
    """The first ended before the second began: nothing can be said of a step of both."""
    got = figures([timeline(0.0, (0.1, 1), (0.2, 2)), timeline(0.0, (0.5, 1), (0.6, 2))])
    assert got["prefill_ms"] == pytest.approx(500)
    assert not [name for name in got if name.startswith("decode")]
