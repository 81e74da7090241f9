"""The page at `/`: its policy, its live state, and a chat in a real browser."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from fakes.browser import open_tab
from fakes.gateway_door import HELLO, entry, open_door, until
from fakes.openai_replica import OpenAIReplica
from octavo_gateway.registry import ModelEntry
from octavo_gateway.tenancy import KeyRecord, Tenant, TenantDirectory, hash_key, new_key
from octavo_gateway.usage import Ledger, PriceTable
from octavo_gateway.usage.prices import Price

METRICS = "octavo_requests_waiting 2\noctavo_requests_running 3\noctavo_kv_cache_utilization 0.42\n"
ADMIN_TOKEN = "a-long-admin-token"
ROWS = "[...document.querySelectorAll('#usage tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
SCREENSHOTS = os.environ.get("OCTAVO_SCREENSHOTS")


async def test_the_page_is_self_contained_and_allows_only_itself() -> None:
    async with open_door() as door, door.http.get(door.url + "/") as response:
        text = await response.text()
        policy = response.headers["content-security-policy"]

    assert response.headers["content-type"].startswith("text/html")
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")
    assert re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*\"", text) == []
    assert not re.search(r"<[^>]+ (?:style|on\w+)=", text)  # inline attributes would be refused by the policy
    assert len(text) < 64_000


async def test_the_state_tells_models_replicas_queues_and_scaling() -> None:
    replica = OpenAIReplica("r0", metrics=METRICS)
    cold = ModelEntry(name="cold", scale_to_zero=True, desired_replicas=0, scaling_reason="idle for 900 s")
    async with replica.serve(), open_door(entry(replica), cold) as door:
        await until(lambda: door.server.app.loads["r0"].report is not None)
        async with door.http.get(door.url + "/api/state") as response:
            state = await response.json()

    models = {m["name"]: m for m in state["models"]}
    assert models["m"]["replicas"] == [
        {
            "id": "r0",
            "state": "ready",
            "waiting": 2.0,
            "running": 3.0,
            "kv_cache_utilization": 0.42,
            "tokens_per_second": 0.0,
        }
    ]
    assert models["cold"]["replicas"] == []
    assert models["cold"]["scaling_reason"] == "idle for 900 s"


async def test_tokens_per_second_follow_the_replicas_counter() -> None:
    replica = OpenAIReplica("r0", metrics="octavo_requests_running 1\noctavo_generation_tokens_total 100\n")
    async with replica.serve(), open_door(entry(replica)) as door:
        load = door.server.app.loads["r0"]
        await until(lambda: load.report is not None)
        replica.metrics = "octavo_requests_running 1\noctavo_generation_tokens_total 160\n"
        await until(lambda: load.tokens_per_second > 0)


async def test_a_chat_in_a_real_browser_streams_stops_and_shows_the_replicas() -> None:
    replica = OpenAIReplica("r0", metrics=METRICS, tokens=6, token_delay=0.02)
    async with (
        replica.serve(),
        open_door(entry(replica, scaling_reason="queue 2.0 of 4 per replica")) as door,
        open_tab(door.url + "/") as tab,
    ):
        await tab.until("document.querySelector('#model').value === 'm'")
        await tab.until("document.querySelector('aside td')?.textContent.includes('r0')")
        await tab.until("document.activeElement.id === 'prompt'")
        await tab.type("What is the capital of France?")
        await tab.press_enter()
        await tab.until("document.querySelector('.assistant .meta')?.textContent.includes('6 tokens')")
        answer = await tab.run("document.querySelector('.assistant .text').textContent")
        aside = await tab.run("document.querySelector('aside').innerText")
        await _picture(tab, "light")

        replica.tokens, replica.token_delay = 10_000, 0.05
        await tab.run("document.querySelector('#prompt').value = 'Go on'; document.querySelector('#send').click()")
        await tab.until("document.querySelectorAll('.assistant .text')[1]?.textContent.length > 10")
        await tab.run("document.querySelector('#send').click()")
        await until(lambda: replica.disconnects == 1)
        await tab.until("[...document.querySelectorAll('.meta')].at(-1).textContent === 'stopped'")

    assert answer == "r0-0 r0-1 r0-2 r0-3 r0-4 r0-5 "
    assert "42%" in aside
    assert "queue 2.0 of 4 per replica" in aside
    assert replica.received[-1].json["messages"][:2] == [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": answer},
    ]
    assert tab.problems == []


async def test_an_error_of_the_gateway_is_shown_in_words() -> None:
    replica = OpenAIReplica("r0", tokens=5, die_after=2)
    async with replica.serve(), open_door(entry(replica)) as door, open_tab(door.url + "/") as tab:
        await tab.until("document.querySelector('#model').value === 'm'")
        await tab.run("document.querySelector('.ideas button').click()")
        await tab.until("document.querySelector('.message.error')?.textContent.includes('answer is incomplete')")

    assert tab.problems == []


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (480, False)])
async def test_every_control_has_a_name_and_nothing_overflows_on_a_phone(width: int, dark: bool) -> None:
    replica = OpenAIReplica("r0", metrics=METRICS)
    async with (
        replica.serve(),
        open_door(entry(replica, name="a-model-with-quite-a-long-name-8b-instruct-q4")) as door,
        open_tab(door.url + "/", width=width, dark=dark) as tab,
    ):
        await tab.until("document.querySelector('aside td')?.textContent.includes('r0')")
        nodes = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
        overflow = await tab.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        await _picture(tab, f"{width}-{'dark' if dark else 'light'}")

    roles = {"button", "combobox", "textbox", "slider", "spinbutton", "meter"}
    controls = [n for n in nodes if n.get("role", {}).get("value") in roles and not n.get("ignored")]
    assert len(controls) >= 6
    assert [n for n in controls if not n.get("name", {}).get("value")] == []
    assert overflow <= 0


MARKDOWN = """## A list
- **bold** and `code <b>`
- *soft*

```python
print("<script>")
```
1. one"""


async def test_the_markdown_of_an_answer_becomes_nodes_and_never_html() -> None:
    async with open_door() as door, open_tab(door.url + "/") as tab:
        await tab.run(f"document.querySelector('#log').replaceChildren(...markdown({json.dumps(MARKDOWN)}))")
        html = await tab.run("document.querySelector('#log').innerHTML")

    assert html == (
        "<h3>A list</h3><ul><li><strong>bold</strong> and <code>code &lt;b&gt;</code></li><li><em>soft</em></li></ul>"
        '<pre><code>print("&lt;script&gt;")</code></pre><ol><li>one</li></ol>'
    )


def _tenants(*names: str) -> tuple[dict[str, str], TenantDirectory]:
    keys = {name: new_key() for name in names}
    return keys, TenantDirectory([Tenant(name, (KeyRecord("key", hash_key(key)),)) for name, key in keys.items()])


async def test_a_tenant_sees_its_own_usage_and_an_administrator_everybodys(tmp_path: Path) -> None:
    keys, directory = _tenants("team-a", "team-b")
    prices = PriceTable({"m": Price(input=1000.0, cached_input=0.0, output=2000.0)})
    ledger = Ledger(tmp_path)
    async with (
        OpenAIReplica("r0", metrics=METRICS).serve() as replica,
        open_door(
            entry(replica), directory=directory, ledger=ledger, prices=prices, admin_port=0, admin_token=ADMIN_TOKEN
        ) as door,
    ):
        for name, count in (("team-a", 2), ("team-b", 1)):
            for _ in range(count):
                await door.read(HELLO, headers={"authorization": f"Bearer {keys[name]}"})
        async with door.http.get(door.url + "/api/usage") as response:
            assert response.status == 401
        async with open_tab(door.url + "/") as tab:
            await tab.until("!document.querySelector('#gate').hidden")
            await tab.run("document.querySelector('#gate-key').focus()")
            await tab.type(keys["team-a"])
            await tab.run("document.querySelector('#gate button').click()")
            await tab.until("document.querySelector('#usage tbody')?.rows.length === 1")
            own = await tab.run(ROWS)
            title = await tab.run("document.querySelector('#usage-title').textContent")
            assert await tab.run("document.querySelector('#gate').hidden")
            await _picture(tab, "tenant")
        async with open_tab(f"{door.server.listeners.admin_address}/", width=1280) as tab:
            await tab.until("!document.querySelector('#gate').hidden")
            await tab.run(f"setKey({ADMIN_TOKEN!r})")
            await tab.until("document.querySelector('#usage tbody')?.rows.length === 2")
            await tab.until("document.querySelector('aside td')?.textContent.includes('r0')")
            everybody = await tab.run(ROWS)
            chat = await tab.run("getComputedStyle(document.querySelector('main')).display")
            await _picture(tab, "admin")
    ledger.close()

    assert own == [["m", "2", "14", "0%", "10", "0.034"]]
    assert "team-a" in title
    assert [row[:3] for row in everybody] == [["team-a", "m", "2"], ["team-b", "m", "1"]]
    assert chat == "none"


async def test_without_a_ledger_there_is_no_usage() -> None:
    async with open_door() as door, door.http.get(door.url + "/api/usage") as response:
        assert response.status == 404
        assert "--ledger" in (await response.json())["error"]["message"]


async def test_heartbeats_of_a_cold_model_are_shown_while_it_wakes() -> None:
    cold = ModelEntry(name="m", scale_to_zero=True, desired_replicas=0)
    async with open_door(cold) as door, open_tab(door.url + "/") as tab:
        await tab.until("document.querySelector('#model').value === 'm'")
        await tab.run("document.querySelector('.ideas button').click()")
        await tab.until("document.querySelector('.meta')?.textContent.includes('waiting for a replica to start')")
        async with OpenAIReplica("woken").serve() as replica:
            door.serve(entry(replica))
            await tab.until("document.querySelector('.assistant .text').textContent.includes('woken-4')")

    assert door.server.app.signals("m").held == 0
    assert HELLO["model"] == "m"


async def _picture(tab: object, name: str) -> None:
    """Pictures to look at are kept where OCTAVO_SCREENSHOTS says."""
    if SCREENSHOTS:
        await tab.screenshot(Path(SCREENSHOTS) / f"gateway-{name}.png")  # type: ignore[attr-defined]
