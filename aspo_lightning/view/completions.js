// The completions of one epoch of one run: a table, and each whole in a dialog.

const get = (id) => document.getElementById(id);
const state = { run: 0, epoch: null, key: "reward", descending: false, query: "" };
const parsed = new Map();
const NOTHING = { total: 0, standout: null, completions: [] };

function epochData() {
  const id = `epoch-${state.run}-${state.epoch}`;
  if (state.epoch === null) return NOTHING;
  if (!parsed.has(id)) parsed.set(id, JSON.parse(get(id).textContent));
  return parsed.get(id);
}

function byKey(a, b) {
  const [x, y] = [a[state.key], b[state.key]];
  if (x === null || y === null) return (x === null) - (y === null); // those without one come last
  return (state.descending ? y - x : x - y) || a.line - b.line;
}

function badges(completion) {
  const flags = { solved: "good", truncated: "bad", failed: "bad" };
  const texts = { failed: "reward failed" };
  return Object.entries(flags)
    .filter(([flag]) => completion[flag])
    .map(([flag, kind]) => element("span", `badge ${kind}`, texts[flag] ?? flag));
}

function opener(completion, className) {
  const button = foreign("button", className, completion.completion.slice(0, 300) || "(empty)");
  button.type = "button";
  button.addEventListener("click", (event) => {
    event.stopPropagation();
    open(completion);
  });
  return button;
}

function about(completion) {
  return foreign("div", "about muted", completion.question.slice(0, 300));
}

function row(completion) {
  const marks = element("div", "marks", ...badges(completion), ...(completion.tokens ? [element("span", "badge", "tokens")] : []));
  const made = element("tr", "", element("td", "", about(completion), opener(completion, "text"), marks));
  for (const key of ["reward", "length", "advantage"]) {
    made.append(element("td", "number", number(completion[key], key === "advantage")));
  }
  made.dataset.line = completion.line;
  made.addEventListener("click", () => open(completion));
  return made;
}

function fill() {
  const { completions } = epochData();
  const query = state.query.toLowerCase();
  const found = completions.filter((c) => [c.question, c.completion, c.prompt_id].some((t) => t.toLowerCase().includes(query)));
  get("rows").replaceChildren(...found.sort(byKey).map(row));
  get("count").textContent = query ? `${found.length} of ${completions.length} match` : "";
  document.querySelectorAll("th[data-key]").forEach((head) => {
    const sorted = head.dataset.key === state.key;
    head.setAttribute("aria-sort", sorted ? (state.descending ? "descending" : "ascending") : "none");
  });
}

function glance() {
  const { standout, completions } = epochData();
  const worst = [...completions].sort((a, b) => a.reward - b.reward || a.line - b.line).slice(0, 3);
  const last = worst.at(-1);
  const more = completions.filter((c) => last && c.reward === last.reward).length - worst.filter((c) => c.reward === last.reward).length;
  get("worst").replaceChildren(
    ...worst.map((c) => element("li", "", element("b", "", number(c.reward)), " ", about(c), opener(c, "text"), ...badges(c))),
    ...(more > 0 ? [element("li", "muted", `and ${more} more with ${number(last.reward)}, in the table`)] : []),
  );
  const elsewhere = ofTheRun();
  if (!standout) {
    const trained = completions.some((c) => c.advantage);
    const why = completions.some((c) => c.tokens)
      ? "ASPO and GRPO weigh all kept tokens of this epoch alike."
      : trained
        ? "No tokens are kept of this epoch."
        : "Nothing was trained on in this epoch: the completions of each prompt all had the same reward.";
    return get("standout").replaceChildren(element("p", "muted", why), ...elsewhere);
  }
  const completion = completions[standout.completion];
  const { tokens } = completion;
  const at = standout.token - tokens.first;
  const button = element("button", "", "Show it in its completion");
  button.type = "button";
  button.addEventListener("click", () => open(completion, at));
  get("standout").replaceChildren(
    element(
      "p",
      "",
      `Of the tokens of ${completions.filter((c) => c.tokens).length} completions, those of the epoch's last micro-batch, the weights of ASPO and GRPO are furthest apart on `,
      foreign("code", "name", glyphs(tokens.text[at])),
      ":",
    ),
    element("p", "readout", ...numbers(tokens, at), element("span", "", "advantage ", element("b", "", number(completion.advantage, true)))),
    excerpt(tokens, at),
    button,
    ...elsewhere,
  );
}

/** Where in the run the weights are furthest apart, if that is in another epoch. */
function ofTheRun() {
  const { standout: epoch } = data.runs[state.run];
  if (epoch === null || epoch === state.epoch) return [];
  const button = element("button", "elsewhere", `Show epoch ${epoch}`);
  button.type = "button";
  button.addEventListener("click", () => select(state.run, epoch));
  return [element("p", "muted", `In the whole run they are furthest apart in epoch ${epoch}.`), button];
}

function show() {
  const run = data.runs[state.run];
  const page = epochData();
  get("run").value = state.run;
  get("epoch").replaceChildren(...run.epochs.map((epoch) => new Option(epoch, epoch)));
  get("epoch").value = state.epoch;
  get("epoch").disabled = state.epoch === null;
  get("glance").hidden = get("completions").hidden = state.epoch === null;
  get("of").replaceChildren(foreign("span", "muted", `of ${run.name}, epoch ${state.epoch}`));
  const left = page.total - page.completions.length;
  get("left-out").textContent = left
    ? `${page.completions.length} of ${page.total} completions are on this page: some with tokens, the worst, the best and the longest. ${page.file} in the run's folder has all.`
    : "";
  if (state.epoch !== null) charts.select(state.run, state.epoch);
  glance();
  fill();
}

/** Shows the epoch of a run, or the nearest one that was kept. */
function select(run, epoch) {
  const { epochs } = data.runs[run];
  const distance = (kept) => Math.abs(kept - epoch);
  const nearest = epochs.length ? epochs.reduce((best, kept) => (distance(kept) <= distance(best) ? kept : best)) : null;
  Object.assign(state, { run, epoch: nearest });
  get("shown").textContent =
    nearest === null
      ? "No completions of this run were kept."
      : nearest !== epoch && epoch !== Infinity
        ? `Of epoch ${epoch} nothing was kept; this is epoch ${nearest}.`
        : "";
  show();
}

function block(title, text, missing, file) {
  const made = element("section", "", element("h3", "", title), foreign("pre", "", text));
  if (missing) {
    made.append(element("p", "cut", `${missing.toLocaleString("en")} more characters are in ${file} in the run's folder.`));
  }
  return made;
}

function facts(pairs) {
  const list = element("dl");
  pairs.forEach(([name, value]) => list.append(element("div", "", foreign("dt", "", name), element("dd", "", value))));
  return list;
}

/** Opens a whole completion, its tokens at one of them. */
function open(completion, at = 0) {
  const { file } = epochData();
  const parts = Object.entries(completion.rewards).map(([name, value]) => [name, number(value)]);
  const run = data.runs[state.run].name;
  get("detail-title").replaceChildren(
    "Completion ",
    String(completion.sample),
    " of ",
    foreign("span", "", completion.prompt_id),
    foreign("small", "muted", `${run}, epoch ${state.epoch}, line ${completion.line} of ${file}`),
  );
  get("detail-body").replaceChildren(
    element("p", "marks", ...badges(completion)),
    facts([
      ["reward", number(completion.reward)],
      ["advantage", completion.advantage === null ? "not trained on" : number(completion.advantage, true)],
      ["length", `${completion.length} tokens`],
      ["turns", String(completion.turns)],
      ["repetition", number(completion.repetition_rate)],
      ["mean ratio", number(completion.ratio)],
      ["share clipped", number(completion.clipped)],
    ]),
    element("section", "", element("h3", "", "Rewards by part"), facts(parts)),
    block("Question", completion.question, completion.missing.question, file),
    block("Completion", completion.completion, completion.missing.completion, file),
  );
  if (completion.tokens) {
    const view = tokenView(completion.tokens, completion.advantage, at);
    get("detail-body").append(element("section", "", element("h3", "", "Tokens by weight"), view));
  }
  get("detail").showModal();
  get("detail").scrollTop = 0;
  if (at) get("detail").querySelector(".tokens .chosen").scrollIntoView({ block: "center" });
}

get("notes").append(...data.runs.flatMap((run) => run.notes.map((note) => foreign("li", "muted", `${run.name}: ${note}`))));
get("run").append(...data.runs.map((run, i) => new Option(run.name, i)));
get("run").addEventListener("change", (event) => select(Number(event.target.value), state.epoch ?? Infinity));
get("epoch").addEventListener("change", (event) => select(state.run, Number(event.target.value)));
get("search").addEventListener("input", (event) => {
  state.query = event.target.value;
  fill();
});
document.querySelectorAll("th[data-key] button").forEach((button) =>
  button.addEventListener("click", () => {
    const { key } = button.parentElement.dataset;
    state.descending = key === state.key && !state.descending;
    state.key = key;
    fill();
  }),
);
get("close").addEventListener("click", () => get("detail").close());
get("detail").addEventListener("click", (event) => event.target === get("detail") && get("detail").close());
charts.start((run, epoch) => {
  select(run, epoch);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  get("completions").scrollIntoView({ behavior: still ? "auto" : "smooth" });
});
select(0, Infinity);
