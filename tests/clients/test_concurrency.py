"""Many clients at once: what one asks does not change what another gets, and who leaves, leaves nothing behind."""
import asyncio
import random

from conftest import REFERENCES, joined


async def stream(client, model, reference, leave_after):
    """The reply's content, or None when the connection was closed after `leave_after` chunks."""
    chunks = []
    messages = [{"role": "user", "content": reference.question}]
    async with await client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True) as events:
        async for chunk in events:
            chunks.append(chunk)
            if len(chunks) == leave_after:
                return None
    return joined(chunks)[0]["content"]


async def at_once(server, model, plan):
    async with server.async_openai() as client:
        return await asyncio.gather(*(stream(client, model, reference, leave_after) for reference, leave_after in plan))


def test_replies_together_are_replies_alone(server, model):
    plan = [(reference, None) for reference in REFERENCES[:16]]
    for (reference, _), content in zip(plan, asyncio.run(at_once(server, model, plan)), strict=True):
        assert content.strip("\n") == reference.content, reference.question
    server.wait_idle()


def test_clients_that_leave_free_what_they_held(server, model):
    rng = random.Random(5)
    for _ in range(3):
        plan = [(reference, rng.choice([None, 1, 2, 5, 20])) for reference in rng.sample(REFERENCES, 16)]
        for (reference, leave_after), content in zip(plan, asyncio.run(at_once(server, model, plan)), strict=True):
            if content is not None:
                assert content.strip("\n") == reference.content, reference.question
            else:
                assert leave_after is not None
        server.wait_idle()


def test_a_client_that_leaves_before_the_first_token(server, model):
    async def leave():
        async with server.async_openai() as client:
            asks = [asyncio.create_task(stream(client, model, reference, None)) for reference in REFERENCES[:8]]
            await asyncio.sleep(0.01)
            for ask in asks:
                ask.cancel()
            await asyncio.gather(*asks, return_exceptions=True)

    asyncio.run(leave())
    server.wait_idle()
    [(reference, _)] = plan = [(REFERENCES[0], None)]
    assert asyncio.run(at_once(server, model, plan))[0].strip("\n") == reference.content
