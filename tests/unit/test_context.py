"""Which ids of a client are taken."""

import asyncio

import pytest

from cxr import context

TRACE, PARENT = 16 * "ab", 8 * "cd"


@pytest.mark.parametrize("own", ["a", "7f1c.b_2-X", 128 * "x"])
def test_a_sane_id_is_kept(own: str) -> None:
    assert context.enter(own, "").request_id == own


@pytest.mark.parametrize("own", ["", 129 * "x", "a b", "a\nb", "Jos\u00e9", '"', "\u0663", "a\n"])
def test_any_other_is_replaced_by_a_fresh_one(own: str) -> None:
    fresh = [context.enter(own, "").request_id for _ in range(2)]
    assert own not in fresh
    assert fresh[0] != fresh[1]


@pytest.mark.parametrize(
    "traceparent",
    [
        f"00-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-00",
        f"01-{TRACE}-{PARENT}-01",
        f"01-{TRACE}-{PARENT}-01-more",
    ],
)
def test_a_valid_traceparent_names_the_trace(traceparent: str) -> None:
    assert context.enter("", traceparent).trace_id == TRACE


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        TRACE,
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01-more",
        f"01-{TRACE}-{PARENT}-01more",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{32 * '0'}-{PARENT}-01",
        f"00-{TRACE}-{16 * '0'}-01",
        f"00-{TRACE}-{PARENT}-01\n",
    ],
)
def test_any_other_names_none(traceparent: str) -> None:
    assert context.enter("", traceparent).trace_id == ""


def test_each_task_has_its_own() -> None:
    async def work(own: str) -> str:
        context.enter(own, "")
        await asyncio.sleep(0)
        request = context.current()
        assert request is not None
        return request.request_id

    async def both() -> list[str]:
        return await asyncio.gather(work("first"), work("second"))

    assert asyncio.run(both()) == ["first", "second"]
