/* ---- live state */
const HISTORY = 120, SHORTEST = 30;
const history = new Map();
const cards = new Map();

const CHARTS = [
  ["queue", "Waiting", (m) => m.held + sum(m.replicas, "waiting"), (v) => String(Math.round(v))],
  ["kv", "KV cache", (m) => mean(m.replicas, "kv_cache_utilization"), (v) => Math.round(v * 100) + "%"],
  ["tokens", "Tokens/s", (m) => sum(m.replicas, "tokens_per_second"), (v) => v < 10 ? v.toFixed(1) : String(Math.round(v))],
  ["replicas", "Replicas", (m) => m.replicas.filter((r) => r.state === "ready").length, (v) => String(v)],
];
const sum = (rows, key) => rows.reduce((total, row) => total + (row[key] || 0), 0);
const mean = (rows, key) => (rows.length ? sum(rows, key) / rows.length : 0);

const svg = (tag, attributes = {}) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

const chart = (kind, label) => {
  const box = make("div", "chart " + kind), drawing = svg("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none", "aria-hidden": "true" });
  const one = { box, area: svg("polygon"), line: svg("polyline"), value: make("dd"), note: make("small") };
  drawing.append(one.area, one.line);
  box.append(make("dt", "", label), one.value, drawing);
  return one;
};

/* The newest value is at the right; the axis grows with what was seen, up to two minutes. */
const draw = (one, series, top) => {
  const step = 100 / (Math.max(SHORTEST, series.length) - 1);
  const points = series.map((v, i) => [100 - (series.length - 1 - i) * step, 28 - 25 * Math.min(1, v / top)]);
  const line = points.map((point) => point.map((v) => v.toFixed(1)).join(",")).join(" ");
  one.line.setAttribute("points", line);
  one.area.setAttribute("points", `${points[0][0].toFixed(1)},30 ${line} 100,30`);
};

const newCard = (name) => {
  const card = { root: make("section", "card"), scroll: make("div", "scroll"), pill: make("span", "pill"), charts: new Map(), body: make("tbody"), reason: make("p", "reason") };
  const head = make("div", "card-head");
  head.append(make("h3", "", name), card.pill);
  const list = make("dl", "charts");
  for (const [kind, label] of CHARTS) {
    const one = chart(kind, label);
    card.charts.set(kind, one);
    list.append(one.box);
  }
  const table = make("table");
  table.append(make("caption", "visually-hidden", "Replicas of " + name));
  const titles = make("tr");
  for (const title of ["Replica", "Running", "Waiting", "KV"]) {
    const cell = make("th", "", title);
    cell.scope = "col";
    titles.append(cell);
  }
  const thead = make("thead");
  thead.append(titles);
  table.append(thead, card.body);
  card.scroll.append(table);
  card.root.append(head, list, card.scroll, card.reason);
  return card;
};

const condition = (model) => {
  const states = model.replicas.map((replica) => replica.state);
  if (states.includes("ready")) return "ready";
  if (states.includes("starting")) return "starting";
  return model.scale_to_zero ? "cold" : states.length ? "draining" : "starting";
};

const wanted = (model, ready) =>
  model.desired_replicas !== null && model.desired_replicas !== ready ? " of " + model.desired_replicas + " wanted" : "";

const showModel = (model) => {
  let card = cards.get(model.name);
  if (!card) {
    card = newCard(model.name);
    cards.set(model.name, card);
    $("models").append(card.root);
  }
  const past = history.get(model.name) || {};
  history.set(model.name, past);
  card.pill.textContent = condition(model);
  card.pill.className = "pill " + condition(model);
  for (const [kind, , read, format] of CHARTS) {
    const value = read(model);
    const series = (past[kind] = (past[kind] || []).concat(value).slice(-HISTORY));
    const top = kind === "kv" ? 1 : Math.max(1, ...series);
    const one = card.charts.get(kind);
    one.note.textContent = kind === "replicas" ? wanted(model, value) : kind !== "kv" && top > Math.max(1, value) ? " peak " + format(top) : "";
    one.value.replaceChildren(format(value), one.note);
    draw(one, series, top);
  }
  card.scroll.hidden = !model.replicas.length;
  card.body.replaceChildren(...model.replicas.map((replica) => {
    const row = make("tr");
    const name = make("td");
    name.append(replica.id + " ");
    if (replica.state !== "ready") name.append(make("span", "pill " + replica.state, replica.state));
    const kv = make("td");
    const meter = make("meter");
    meter.max = 1; meter.high = 0.9; meter.optimum = 0; meter.value = replica.kv_cache_utilization || 0;
    meter.setAttribute("aria-label", "KV cache use");
    kv.append(meter, Math.round((replica.kv_cache_utilization || 0) * 100) + "%");
    row.append(name, make("td", "", String(Math.round(replica.running))), make("td", "", String(Math.round(replica.waiting))), kv);
    return row;
  }));
  card.reason.replaceChildren(...(model.scaling_reason ? [make("strong", "", "Last scaling decision: "), model.scaling_reason] : []));
  card.reason.hidden = !model.scaling_reason;
};

const showPicker = (state) => {
  const names = state.models.flatMap((model) => [model.name, ...model.aliases, ...model.adapters]);
  const picker = $("model");
  if (names.join() === [...picker.options].map((option) => option.value).join()) return;
  const chosen = picker.value || store(localStorage, "octavo-model");
  picker.replaceChildren(...names.map((name) => { const option = make("option", "", name); option.value = name; return option; }));
  if (names.includes(chosen)) picker.value = chosen;
};
$("model").addEventListener("change", () => store(localStorage, "octavo-model", $("model").value));

async function refresh() {
  try {
    const response = await fetch("api/state", { headers: headers(), cache: "no-store" });
    lock(response.status === 401);
    if (response.status === 401) {
      $("status").textContent = key ? "the key is not valid" : "locked";
      return;
    }
    if (!response.ok) throw new Error(String(response.status));
    const state = await response.json();
    const names = new Set(state.models.map((model) => model.name));
    for (const [name, card] of cards) if (!names.has(name)) { card.root.remove(); cards.delete(name); history.delete(name); }
    showPicker(state);
    state.models.forEach(showModel);
    if (state.usage) await refreshUsage();
    $("nothing").hidden = state.models.length > 0;
    const flying = state.models.reduce((total, model) => total + model.in_flight, 0);
    $("status").textContent = state.draining ? "shutting down" : flying + (flying === 1 ? " request" : " requests") + " in flight · " + state.version;
  } catch {
    $("status").textContent = "the gateway does not answer; trying again";
  }
}
