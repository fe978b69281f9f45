"use strict";
// Curves: one chart a panel, one colour a run, one line style a curve of the panel.

const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const LINES = [
  { dash: "solid", symbol: "circle" },
  { dash: "dash", symbol: "square-open" },
  { dash: "dot", symbol: "diamond" },
  { dash: "dashdot", symbol: "triangle-up-open" },
  { dash: "longdash", symbol: "x" },
];

/** A new element; its text is never taken for HTML. */
function element(tag, className, ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

/** Text from outside the program, kept from reordering what is around it. */
function foreign(tag, className, text) {
  const made = element(tag, className, text);
  made.dir = "auto";
  return made;
}

function number(value, signed = false) {
  if (value === null) return "-";
  const digits = Math.abs(value) >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
  return (signed && value > 0 ? "+" : "") + digits;
}

function themed(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Far from one another for any number of runs: hues by the golden angle. */
function runColour(run) {
  return `hsl(${Math.round(210 + 137.5 * run) % 360}, 70%, ${dark.matches ? 66 : 40}%)`;
}

/** Plotly reads some HTML in its texts; this leaves none. */
function plain(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

const charts = {
  hidden: new Set(),
  axis: "epoch",
  marked: null,
  figures: [],

  traces(panel) {
    const tags = Object.entries(panel.series);
    const several = tags.length > 1;
    const lines = data.runs.flatMap((run, i) =>
      tags.map(([tag, label], j) => {
        const points = (run.points[tag] ?? []).filter((p) => charts.axis === "epoch" || p[1] !== null);
        return {
          x: points.map((p) => (charts.axis === "epoch" ? p[0] : p[1])),
          y: points.map((p) => p[2]),
          customdata: points.map((p) => [i, p[0]]),
          text: points.map(([epoch, step, value]) => {
            const at = step === null ? `epoch ${epoch}` : `epoch ${epoch}, step ${step}`;
            return `${plain(run.name)}<br>${plain(label)} <b>${number(value)}</b><br>${at}`;
          }),
          hovertemplate: "%{text}<extra></extra>",
          mode: "lines+markers",
          line: { color: runColour(i), width: 1.8, dash: LINES[j % LINES.length].dash },
          marker: { color: runColour(i), size: 6, symbol: LINES[j % LINES.length].symbol },
          legendgroup: tag,
          showlegend: false,
          visible: !charts.hidden.has(i),
        };
      }),
    );
    const keys = tags.map(([tag, label], j) => ({
      x: [null],
      y: [null],
      name: plain(label),
      mode: "lines+markers",
      line: { color: themed("--muted"), width: 1.8, dash: LINES[j % LINES.length].dash },
      marker: { color: themed("--muted"), size: 6, symbol: LINES[j % LINES.length].symbol },
      legendgroup: tag,
      showlegend: several,
    }));
    return [...lines, ...keys];
  },

  layout() {
    const axis = {
      gridcolor: themed("--line"),
      zerolinecolor: themed("--line"),
      linecolor: themed("--line"),
      tickfont: { color: themed("--muted") },
      automargin: true,
    };
    return {
      height: 230,
      margin: { l: 8, r: 12, t: 8, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: themed("--text") },
      hovermode: "closest",
      hoverlabel: { bgcolor: themed("--card"), bordercolor: themed("--muted"), font: { color: themed("--text") }, align: "left" },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
      xaxis: { ...axis, title: { text: charts.axis === "epoch" ? "epoch" : "optimizer step", font: { size: 11 } } },
      yaxis: { ...axis, rangemode: "normal" },
      shapes: charts.mark(),
    };
  },

  /** The vertical line at the epoch that is shown. */
  mark() {
    if (!charts.marked) return [];
    const [run, epoch] = charts.marked;
    let x = epoch;
    if (charts.axis === "step") {
      const points = Object.values(data.runs[run].points).flat();
      x = points.find((p) => p[0] === epoch && p[1] !== null)?.[1];
      if (x === undefined) return [];
    }
    const line = { color: runColour(run), width: 1, dash: "dot" };
    return [{ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line, layer: "below" }];
  },

  draw() {
    charts.figures.forEach(({ panel, area }) =>
      Plotly.react(area, charts.traces(panel), charts.layout(), { displayModeBar: false, responsive: true }),
    );
    document.querySelectorAll("#runs .swatch").forEach((swatch, i) => swatch.style.setProperty("background", runColour(i)));
  },

  select(run, epoch) {
    charts.marked = [run, epoch];
    charts.figures.forEach(({ area }) => Plotly.relayout(area, { shapes: charts.mark() }));
  },

  start(onPoint) {
    charts.figures = data.panels.map((panel) => {
      const area = element("div", "chart");
      area.setAttribute("role", "img");
      area.setAttribute("aria-label", `${panel.title}: ${Object.values(panel.series).join(", ")}`);
      const about = element("figcaption", "", element("h3", "", panel.title), element("p", "muted", panel.meaning));
      document.getElementById("charts").append(element("figure", "card", about, area));
      return { panel, area };
    });
    document.getElementById("runs").append(
      ...data.runs.map((run, i) => {
        const box = element("input");
        box.type = "checkbox";
        box.checked = true;
        box.addEventListener("change", () => {
          box.checked ? charts.hidden.delete(i) : charts.hidden.add(i);
          charts.draw();
        });
        return element("label", "", box, element("span", "swatch"), foreign("span", "", run.name));
      }),
    );
    document.getElementById("axis").addEventListener("change", (event) => {
      charts.axis = event.target.value;
      charts.draw();
    });
    dark.addEventListener("change", charts.draw);
    charts.draw();
    charts.figures.forEach(({ area }) =>
      area.on("plotly_click", ({ points }) => points[0].customdata && onPoint(...points[0].customdata)),
    );
  },
};
