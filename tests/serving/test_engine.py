"""The engine: what a request writes does not depend on who else is there, nor on what was there before."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from labkit import models
from labkit.serving.adapter_cache import size_of
from labkit.serving.batched import AdapterBank, BatchedLinear
from labkit.serving.engine import Engine
from labkit.serving.requests import Draining, Full, GenerationRequest, Source
from tests.conftest import make_small_llama
from tests.serving.engines import Served, asked, finish, prompt_of

NAMES = (None, "support", "sql", "poet", "clerk", "alias")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return Served(tmp_path_factory.mktemp("served"))


def test_adapters_change_what_is_written(served):
    """Without this, the test above would pass on an engine that always answers with the base."""
    texts = {tuple(served.alone(prompt_of(0, 30), name, 9)) for name in NAMES if name != "alias"}
    assert len(texts) == 5


def test_log_probabilities_are_the_models_own(served):
    engine = served.engine()
    stream = engine.submit(asked(1, 20, "support"))
    finish(engine)
    answer = stream.result(0)
    model, _ = models.load("tiny-llama", dtype=torch.float32)
    bank = AdapterBank(model)
    bank.load(served.folders["support"], "support")
    with torch.no_grad(), bank.rows(["support"]):
        logits = model(input_ids=torch.tensor([[*stream.request.prompt, *answer.ids]])).logits
    wanted = logits[0].log_softmax(-1)[range(19, 25), answer.ids]
    torch.testing.assert_close(
        torch.tensor([token.log_prob for token in answer.tokens]), wanted, rtol=1e-4, atol=1e-4
    )


def test_a_prefix_is_used_again_by_the_same_adapter_only(served):
    engine, cached = served.engine(), []
    for name in ("support", "support", None, "sql", "support", None):
        stream = engine.submit(asked(3, 50, name))
        finish(engine)
        assert stream.result(0).ids == served.alone(prompt_of(3, 50), name, 6)
        cached.append(stream.result(0).cached_tokens)
    assert cached == [0, 48, 0, 0, 48, 48]


def test_another_strength_or_a_reload_with_other_weights_computes_its_prefix_anew(served):
    engine = served.engine()
    cached = []
    sources = {"v1": served.folders["support"], "v2": served.folders["poet"]}
    for folder, strength in (("v1", 1.0), ("v1", 0.5), ("v2", 1.0), ("v1", 1.0)):
        served.names["changing"] = Source("changing", sources[folder], folder)
        stream = engine.submit(asked(4, 40, "changing", strength=strength))
        finish(engine)
        cached.append(stream.result(0).cached_tokens)
    assert cached == [0, 0, 0, 32]
    assert stream.result(0).ids == served.alone(prompt_of(4, 40), "support", 6)


def test_an_unknown_adapter_is_an_error_at_once_and_never_the_base(served):
    engine = served.engine()
    with pytest.raises(LookupError):
        engine.submit(asked(0, 5, "nobody"))
    assert engine.is_idle


def test_an_adapter_that_cannot_be_loaded_fails_its_own_request_only(served, tmp_path):
    engine = served.engine()
    served.names["gone"] = Source("gone", tmp_path / "gone", "gone")
    bad, good = engine.submit(asked(0, 5, "gone")), engine.submit(asked(0, 5, "sql"))
    finish(engine)
    assert bad.result(0).finish_reason == "error" and isinstance(bad.result(0).error, FileNotFoundError)
    assert good.result(0).ids == served.alone(prompt_of(0, 5), "sql", 6)


def test_a_row_that_overflows_fails_alone_and_leaves_nothing_in_its_slot(served, tmp_path):
    served.add("huge", tmp_path, scale=1e25)
    engine = served.engine(rows=2, prefix_bytes=0)
    good, bad = engine.submit(asked(1, 5, None, 8)), engine.submit(asked(0, 30, "huge", 8))
    after = engine.submit(asked(2, 3, None, 8))
    finish(engine)
    assert bad.result(0).finish_reason == "error" and "not finite" in str(bad.result(0).error)
    assert good.result(0).ids == served.alone(prompt_of(1, 5), None, 8)
    assert after.result(0).ids == served.alone(prompt_of(2, 3), None, 8)


def test_a_pass_that_fails_ends_its_requests_and_the_engine_goes_on(served, monkeypatch):
    engine = served.engine()
    lost = engine.submit(asked(0, 5))
    with monkeypatch.context() as broken:
        broken.setattr(engine.stepper, "step", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        engine.step()
    assert isinstance(lost.result(0).error, MemoryError)
    kept = engine.submit(asked(0, 5))
    finish(engine)
    assert kept.result(0).ids == served.alone(prompt_of(0, 5), None, 6)


def test_tokens_that_stop_end_a_text_and_are_no_part_of_it(served):
    engine = served.engine()
    lone = served.alone(prompt_of(1, 20), None, 6)
    stop = next(token for i, token in enumerate(lone) if i and token not in lone[:i])
    stream = engine.submit(asked(1, 20, stop_ids={stop}))
    finish(engine)
    assert (stream.result(0).ids, stream.result(0).finish_reason) == (lone[: lone.index(stop)], "stop")


def test_a_reader_may_stop_a_text_where_a_stop_word_shows(served):
    engine = served.engine()
    stream = engine.submit(asked(1, 20, tokens=50), listener=lambda event: stream.stop())
    finish(engine)
    assert stream.result(0).finish_reason == "stop" and len(stream.result(0).ids) == 1


def test_a_listener_that_fails_costs_its_own_request_only(served):
    engine = served.engine()
    bad = engine.submit(asked(1, 20, tokens=50), listener=lambda event: 1 / 0)
    good = engine.submit(asked(1, 20))
    finish(engine)
    assert bad.result(0).finish_reason == "cancelled"
    assert good.result(0).ids == served.alone(prompt_of(1, 20), None, 6)


def test_time_is_up_on_the_engines_clock_waiting_or_writing(served):
    engine = served.engine(rows=1, seconds=10.0)
    written, waiting = engine.submit(asked(0, 5, tokens=50)), engine.submit(asked(1, 5, seconds=3.0))
    engine.step()
    engine.clock.now = 4.0
    engine.step()
    assert waiting.result(0).finish_reason == "timeout" and not waiting.result(0).ids
    engine.clock.now = 10.5
    engine.step()
    assert written.result(0).finish_reason == "timeout" and len(written.result(0).ids) == 3
    assert (written.result(0).queued, written.result(0).finished, engine.is_idle) == (0.0, 10.5, True)


def test_too_much_is_refused_with_what_fits(served):
    engine = served.engine(queue=2, context=40, new_tokens=20)
    for request, said in (
        (asked(0, 30, tokens=11), "a prompt of 30 tokens and 11 new ones do not fit into 40"),
        (asked(0, 5, tokens=21), "at most 20"),
        (GenerationRequest([4096]), "token id 4096: the model has 4096"),
    ):
        with pytest.raises(ValueError, match=said):
            engine.submit(request)
    engine.submit(asked(0, 5))
    engine.submit(asked(0, 5))
    with pytest.raises(Full, match="2 requests wait already"):
        engine.submit(asked(0, 5))
    finish(engine)
    engine.submit(asked(0, 5))


def test_a_tenant_with_many_requests_does_not_hold_up_another(served):
    engine = served.engine(rows=1)
    order = []
    for i in range(6):
        engine.submit(
            asked(0, 5, tenant="many", tokens=2), listener=lambda event, i=i: order.append(("many", i))
        )
    engine.step()
    engine.submit(asked(0, 5, tenant="one", tokens=2), listener=lambda event: order.append(("one", 0)))
    finish(engine)
    assert order.index(("one", 0)) < order.index(("many", 2))


def test_requests_go_on_while_an_adapter_is_being_loaded(served):
    gate, loader = threading.Event(), ThreadPoolExecutor(1)
    loader.submit(gate.wait, 20)
    engine = served.engine(loader=loader)
    slow, quick = engine.submit(asked(0, 5, "sql")), engine.submit(asked(1, 5))
    while not quick.done.is_set():
        engine.step()
    assert not slow.done.is_set()
    gate.set()
    loader.shutdown()
    finish(engine)
    assert slow.result(0).ids == served.alone(prompt_of(0, 5), "sql", 6)


def test_threads_submit_and_read_while_the_engine_runs_and_drains(served):
    engine = served.engine(rows=3)
    runner = threading.Thread(target=engine.run)
    runner.start()
    read = {}

    def ask(number):
        name = NAMES[number % 5]
        read[number] = [token.id for token in engine.submit(asked(number, 9, name))], name

    askers = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(60)
    last = engine.submit(asked(0, 5))
    engine.drain()
    with pytest.raises(Draining):
        engine.submit(asked(0, 5))
    runner.join(60)
    assert not runner.is_alive() and last.result(0).finish_reason == "length"
    assert len(read) == 8
    for number, (ids, name) in read.items():
        assert ids == served.alone(prompt_of(number, 9), name, 6)


def test_an_error_of_the_engine_itself_leaves_nobody_waiting(served, monkeypatch):
    engine = served.engine()
    lost = engine.submit(asked(0, 5))
    with monkeypatch.context() as broken:
        broken.setattr(engine, "admit", lambda: 1 / 0)
        engine.is_draining = True
        engine.run()
    assert isinstance(lost.result(0).error, ZeroDivisionError) and list(lost) == list(lost) == []


def test_layers_are_the_bases_own_again_once_no_adapter_is_in_memory(served):
    sizes = {name: size_of(folder) for name, folder in served.folders.items()}
    engine = served.engine(adapters=max(sizes.values()))
    for name in ("support", "sql"):
        engine.submit(asked(0, 5, name))
        finish(engine)
    wrapped = sum(isinstance(module, BatchedLinear) for module in engine.bank.model.modules())
    assert engine.adapters.counts.evictions == 1 and wrapped == 8


def test_models_that_see_a_window_are_refused():
    model = make_small_llama(vocab_size=300)
    model.config.sliding_window = 8
    with pytest.raises(ValueError, match="does not attend to the whole text"):
        Engine(AdapterBank(model), {})


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(prompt=[]), "prompt is empty"),
        (dict(prompt=[-1]), "a token id=-1"),
        (dict(prompt=[1], max_new_tokens=0), "max_new_tokens=0"),
        (dict(prompt=[1], strength=float("nan")), "strength=nan"),
        (dict(prompt=[1], adapter=7), "adapter=7"),
        (dict(prompt=[1], tenant=None), "tenant=None"),
        (dict(prompt=[1], seconds=0), "seconds=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_requests_out_of_range_are_refused_when_they_are_made(settings, said):
    with pytest.raises(ValueError, match=said):
        GenerationRequest(**settings)
