"""Random schedules of requests that join, leave, are cancelled and change adapters, on one engine that is never cleaned up.

Whatever else there is, each request writes what transformers' `generate` writes for it alone.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkit.serving.adapter_cache import size_of
from labkit.serving.sampling import Sampling
from tests.campaign.harness import rounds
from tests.serving.engines import Served, asked, finish

NAMES = (None, "support", "sql", "poet", "clerk", "alias")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return Served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def crowded(served):
    """An engine with few rows, small steps, and room for two of its four adapters."""
    sizes = sorted(map(size_of, served.folders.values()))
    return served.engine(adapters=sum(sizes[-2:]), rows=4, prompt_tokens=20, prefix_bytes=2**20)


REQUESTS = st.builds(
    dict,
    seed=st.integers(0, 2),
    length=st.integers(1, 50),
    adapter=st.sampled_from(NAMES),
    tokens=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    tenant=st.sampled_from("xyz"),
)
EVENTS = st.one_of(
    REQUESTS,
    REQUESTS,
    st.tuples(st.just("steps"), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("swap"), st.sampled_from(["sql", "poet", "clerk"])),
)


@settings(
    max_examples=rounds(20, 200),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(schedule=st.lists(EVENTS, min_size=4, max_size=16))
def test_requests_that_join_leave_and_are_cancelled_write_what_each_writes_alone(served, crowded, schedule):
    served.names["alias"], made = served.names["sql"], []
    for event in schedule:
        match event:
            case ("steps", count):
                for _ in range(count):
                    crowded.step()
            case ("cancel", number) if number < len(made):
                made[number][0].cancel()
            case ("swap", name):
                served.names["alias"] = served.names[name]
            case dict():
                sampling = Sampling(event["temperature"], seed=len(made))
                request = asked(
                    event["seed"],
                    event["length"],
                    event["adapter"],
                    event["tokens"],
                    sampling=sampling,
                    tenant=event["tenant"],
                )
                name = None if request.adapter is None else served.resolve(request.adapter).label
                made.append((crowded.submit(request), name))
    finish(crowded)
    for stream, name in made:
        request, answer = stream.request, stream.result(0)
        assert answer.error is None and [token.id for token in stream] == answer.ids
        if request.sampling.temperature:
            lone = served.drawn_alone(request, name)
        else:
            lone = served.alone(request.prompt, name, request.max_new_tokens)
        if answer.finish_reason == "cancelled":
            assert answer.ids == lone[: len(answer.ids)]
        else:
            assert answer.ids == lone and answer.finish_reason == "length"
    assert not +crowded.adapters.uses, "an adapter is held by nobody"
