"""Turns between tenants, by what each has had."""

import random

from labkit.serving.scheduling import TENANTS, FairQueue


def ready(item):
    return True


def test_tenants_that_always_wait_get_the_same_work_however_much_they_ask():
    line, draw, work = FairQueue(), random.Random(0), {"a": 0, "b": 0, "c": 0}
    for tenant, asks in (("a", 900), ("b", 200), ("c", 200)):
        for _ in range(asks):
            size = draw.randint(1, 100) * (3 if tenant == "b" else 1)
            line.put(tenant, (tenant, size))
    for _ in range(300):
        tenant, size = line.take(ready)
        line.charge(tenant, read=size, written=size)
        work[tenant] += 3 * size
    assert max(work.values()) - min(work.values()) <= 3 * 300, "more than the largest request apart"


def test_a_tenant_that_was_away_cannot_save_up():
    line = FairQueue()
    line.put("steady", 0)
    line.charge("steady", read=1000)
    line.put("back", 1)
    assert line.served["back"] == 1000
    line.put("steady", 2)
    line.charge("back", read=1)
    assert [line.take(ready) for _ in range(3)] == [0, 2, 1]


def test_what_is_not_ready_lets_others_by_and_keeps_its_place():
    line = FairQueue()
    for item in range(4):
        line.put("one", item)
    assert line.take(lambda item: item > 1) == 2
    assert [line.take(ready) for _ in range(4)] == [0, 1, 3, None]
    assert len(line) == 0 and not line.waiting


def test_counters_of_tenants_that_ask_for_nothing_do_not_pile_up():
    line = FairQueue()
    for tenant in range(5 * TENANTS):
        line.put(str(tenant), tenant)
        line.charge(str(line.take(ready)), read=1)
    assert len(line.served) <= TENANTS + 2
