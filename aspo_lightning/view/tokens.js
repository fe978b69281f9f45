// Tokens coloured by their weight: each stands once a line, ASPO's above GRPO's, so that one sees where they differ.

/** How far from 1 the colours of these tokens reach, as a factor: from 1.01 to 3. */
function reach(tokens) {
  const weights = Object.values(tokens.weights).flatMap((of) => of.weight.filter((w) => w > 0));
  const largest = weights.reduce((most, w) => Math.max(most, Math.abs(Math.log(w))), Math.log(1.01));
  return Math.min(3, Math.exp(largest));
}

function glyphs(text) {
  return text === "" ? "∅" : text.replace(/\n/g, "⏎");
}

/** One objective's line of a token. */
function lineOf(text, of, i, limit) {
  const line = foreign("span", "weight", glyphs(text));
  const weight = of.weight[i];
  if (weight === 0) {
    line.classList.add(of.clipped.includes(i) ? "masked" : "zero");
  } else if (weight !== null) {
    line.classList.add(weight < 1 ? "less" : "more");
    line.style.setProperty("--share", Math.min(1, Math.abs(Math.log(weight)) / Math.log(limit)));
  }
  if (of.dual_clipped.includes(i)) line.classList.add("limited");
  return line;
}

/** A token's numbers, in words. */
function numbers(tokens, i) {
  const weights = Object.entries(tokens.weights).map(([name, of]) => {
    const how = of.dual_clipped.includes(i)
      ? " (dual-clipped)"
      : of.clipped.includes(i)
        ? of.weight[i] === 0
          ? " (masked)"
          : " (clipped)"
        : "";
    return element("span", "", `${name} `, element("b", "", number(of.weight[i])), how);
  });
  return [
    element("span", "", `token ${tokens.first + i + 1} of ${tokens.total} `, foreign("code", "", glyphs(tokens.text[i]))),
    element("span", "", "ratio ", element("b", "", number(tokens.ratio[i]))),
    element("span", "", "entropy ", element("b", "", number(tokens.entropy[i])), " nats"),
    ...weights,
  ];
}

/** The cells of tokens from..to. */
function cells(tokens, from, to, limit) {
  const made = [];
  for (let i = from; i < to; i++) {
    const lines = Object.values(tokens.weights).map((of) => lineOf(tokens.text[i], of, i, limit));
    const cell = element("span", "cell", ...lines);
    cell.dataset.token = i;
    made.push(cell);
    if (tokens.text[i].includes("\n")) made.push(element("br"));
  }
  return made;
}

function names(tokens) {
  return element("span", "cell names", ...Object.keys(tokens.weights).map((name) => element("span", "", name)));
}

function scale(limit) {
  const bar = element("span", "bar");
  const low = number(1 / limit);
  return element(
    "p",
    "scale muted",
    element("span", "", "weight ", `≤ ${low} `, bar, ` ≥ ${number(limit)} (middle: 1)`),
    element("span", "", element("span", "weight masked", "masked"), " no gradient"),
    element("span", "", element("span", "weight more limited", "limited"), " by dual clipping"),
  );
}

/** A few tokens around one, which is marked. */
function excerpt(tokens, at) {
  const box = element("div", "tokens short", names(tokens));
  box.append(...cells(tokens, Math.max(0, at - 6), Math.min(tokens.text.length, at + 7), reach(tokens)));
  box.querySelector(`[data-token="${at}"]`).classList.add("chosen");
  return box;
}

/** All tokens of a completion that the page has, with their numbers on hover, click and arrow keys. */
function tokenView(tokens, advantage, chosen) {
  const limit = reach(tokens);
  const box = element("div", "tokens", names(tokens), ...cells(tokens, 0, tokens.text.length, limit));
  const readout = element("p", "readout");
  readout.setAttribute("role", "status");
  box.tabIndex = 0;
  box.setAttribute("role", "application");
  box.setAttribute("aria-label", "Tokens by weight. Left and right arrow keys go from token to token.");
  let current = chosen;
  const show = (i) => {
    box.querySelector(".chosen")?.classList.remove("chosen");
    current = i;
    box.querySelector(`[data-token="${i}"]`).classList.add("chosen");
    readout.replaceChildren(...numbers(tokens, i));
  };
  const pointed = (event) => {
    const cell = event.target.closest("[data-token]");
    if (cell) show(Number(cell.dataset.token));
  };
  box.addEventListener("mouseover", pointed);
  box.addEventListener("click", pointed);
  box.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    show(Math.min(tokens.text.length - 1, Math.max(0, current + by)));
    box.querySelector(".chosen").scrollIntoView({ block: "nearest" });
  });
  show(current);
  const flip =
    advantage > 0
      ? "A > 0: this should become more likely. GRPO weighs a token by its ratio r, ASPO by 1/r: it pushes those that lag behind (r < 1) more, and those already reinforced (r > 1) less."
      : "A < 0: this should become less likely. Both weigh a token by its ratio r; ASPO by 3 at most.";
  const window =
    tokens.text.length < tokens.total
      ? ` Shown are tokens ${tokens.first + 1} to ${tokens.first + tokens.text.length} of ${tokens.total}.`
      : "";
  return element("div", "", element("p", "muted", flip + window), scale(limit), readout, box);
}
