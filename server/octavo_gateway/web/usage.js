/* ---- usage of this month: the caller's own; on the admin port everybody's */
const USAGE_EVERY_MS = 15_000;
let usageReadAt = 0;
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const money = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 4 });

const COLUMNS = [
  ["Requests", (row) => compact.format(row.requests)],
  ["Input", (row) => compact.format(row.prompt_tokens)],
  ["Cached", (row) => (row.prompt_tokens ? Math.round((100 * row.cached_tokens) / row.prompt_tokens) : 0) + "%"],
  ["Output", (row) => compact.format(row.output_tokens)],
  ["Cost", (row) => money.format(row.cost)],
];

const showUsage = (usage) => {
  usageReadAt = usage ? Date.now() : 0;
  $("usage").hidden = $("usage-title").hidden = !usage;
  if (!usage) return;
  const title = "Usage since " + usage.since + (usage.tenant ? " · " + usage.tenant : "");
  const table = make("table"), head = make("tr"), thead = make("thead"), body = make("tbody");
  const by = usage.by.filter((name) => name !== "tenant" || usage.rows.some((row) => row.tenant));
  for (const [i, name] of [...by, ...COLUMNS.map(([label]) => label)].entries()) {
    const cell = make("th", i < by.length ? "name" : "", name[0].toUpperCase() + name.slice(1));
    cell.scope = "col";
    head.append(cell);
  }
  thead.append(head);
  for (const row of usage.rows) {
    const line = make("tr");
    for (const name of by) line.append(make("td", "name", row[name] || "–"));
    for (const [, read] of COLUMNS) line.append(make("td", "", read(row)));
    body.append(line);
  }
  table.append(make("caption", "visually-hidden", title), thead, body);
  const scroll = make("div", "scroll");
  scroll.append(table);
  const estimated = usage.rows.reduce((total, row) => total + row.estimated_requests, 0);
  const notes = [usage.rows.length ? "" : "Nothing was used yet.", estimated ? estimated + " requests are estimates." : ""].filter(Boolean);
  $("usage").replaceChildren(...(usage.rows.length ? [scroll] : []), ...notes.map((note) => make("p", "reason", note)));
  $("usage-title").textContent = title;
};

/* Called with every state that says that there is a ledger; reads it now and then. */
async function refreshUsage() {
  if (Date.now() - usageReadAt < USAGE_EVERY_MS) return;
  usageReadAt = Date.now();
  const response = await fetch("api/usage", { headers: headers(), cache: "no-store" });
  if (response.ok) showUsage(await response.json());
}

/* ---- start */
refresh();
setInterval(() => { if (!document.hidden) refresh(); }, 1000);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
