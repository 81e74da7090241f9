/* ---- chat */
let conversation = [];
let running = null;

const addMessage = (role, text) => {
  $("empty").hidden = true;
  const node = make("div", "message " + role);
  node.append(make("span", "visually-hidden", role === "user" ? "You: " : "Model: "));
  const body = make("div", "text", text);
  node.append(body);
  $("log").append(node);
  $("log").scrollTop = $("log").scrollHeight;
  return { node, body };
};

const requestBody = () => {
  const messages = $("system").value.trim() ? [{ role: "system", content: $("system").value.trim() }] : [];
  const body = {
    model: $("model").value,
    messages: messages.concat(conversation),
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value),
    top_p: Number($("top-p").value),
    max_tokens: Number($("max-tokens").value) || 512,
  };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  return body;
};

/* Yields the payload of each event and notes of comment lines (the gateway's heartbeats). */
async function* events(stream) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = stream.getReader(); ;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const parts = rest.split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      for (const line of part.split(/\r?\n/)) {
        if (line.startsWith("data: ")) yield { data: line.slice(6) };
        else if (line.startsWith(":")) yield { note: line.slice(1).trim() };
      }
    }
  }
}

const failure = async (response) => {
  try { return (await response.json()).error.message; } catch { return "The gateway answered " + response.status + "."; }
};

async function answer() {
  const { node, body } = addMessage("assistant", "");
  const meta = make("span", "meta");
  node.append(meta);
  const began = performance.now();
  let first = 0, text = "", usage = null, finish = null, drawing = 0;
  const draw = () => {
    drawing = 0;
    const log = $("log"), follows = log.scrollHeight - log.scrollTop - log.clientHeight < 120;
    body.replaceChildren(...markdown(text));
    if (follows) log.scrollTop = log.scrollHeight;
  };
  running = new AbortController();
  setBusy(true);
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...headers() },
      body: JSON.stringify(requestBody()),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response.body)) {
      if (event.note) { meta.textContent = event.note; continue; }
      if (event.data === "[DONE]") break;
      const chunk = JSON.parse(event.data);
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage || usage;
      const choice = chunk.choices && chunk.choices[0];
      if (!choice) continue;
      finish = choice.finish_reason || finish;
      const piece = (choice.delta && choice.delta.content) || "";
      if (piece && !first) { first = performance.now(); meta.textContent = ""; }
      text += piece;
      if (piece && !drawing) drawing = requestAnimationFrame(draw);
    }
    draw();
    meta.textContent = summary(began, first, usage, finish);
    $("announce").textContent = "Answer finished: " + text;
  } catch (error) {
    if (error.name === "AbortError") {
      draw();
      meta.textContent = "stopped";
    } else {
      cancelAnimationFrame(drawing);
      node.classList.add("error");
      body.textContent = text + (text ? "\n\n" : "") + error.message;
      $("announce").textContent = "Error: " + error.message;
    }
  }
  if (text) conversation.push({ role: "assistant", content: text });
  else conversation.pop();
  running = null;
  setBusy(false);
}

const summary = (began, first, usage, finish) => {
  const parts = [];
  if (first) parts.push("first token " + Math.round(first - began) + " ms");
  if (usage) {
    const seconds = (performance.now() - first) / 1000;
    parts.push(usage.completion_tokens + " tokens");
    if (usage.completion_tokens > 1 && seconds > 0) parts.push(((usage.completion_tokens - 1) / seconds).toFixed(1) + " tokens/s");
    const cached = usage.prompt_tokens_details && usage.prompt_tokens_details.cached_tokens;
    if (cached) parts.push(cached + " of " + usage.prompt_tokens + " prompt tokens cached");
  }
  if (finish === "length") parts.push("cut at the token limit");
  return parts.join(" · ");
};

const setBusy = (busy) => {
  $("send").textContent = busy ? "Stop" : "Send";
  $("send").classList.toggle("stop", busy);
};

const send = (text) => {
  if (!text || running || !$("model").value) return;
  conversation.push({ role: "user", content: text });
  addMessage("user", text);
  $("prompt").value = "";
  resize();
  answer();
};

const resize = () => {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = Math.min(box.scrollHeight + 2, 190) + "px";
};

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort(); else send($("prompt").value.trim());
});
$("prompt").addEventListener("input", resize);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) send($("prompt").value.trim());
  }
});
for (const idea of document.querySelectorAll(".ideas button")) idea.addEventListener("click", () => send(idea.textContent));
$("clear").addEventListener("click", () => {
  if (running) running.abort();
  conversation = [];
  for (const node of document.querySelectorAll(".message")) node.remove();
  $("empty").hidden = false;
  $("prompt").focus();
});
