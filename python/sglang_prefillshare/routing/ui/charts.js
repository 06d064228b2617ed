// Lines over the last minutes, drawn by uPlot. What they say is in the table, and in short in their labels.

import { line as seen, name } from "./colours.js";

const DASHES = [[], [6, 4], [2, 3], [10, 4, 2, 4]];

export class Chart {
  constructor(box, key, { unit, title }) {
    this.box = box;
    this.key = key;
    this.unit = unit;
    this.title = title;
    this.plot = undefined;
    new ResizeObserver(() => this.plot && this.plot.setSize(this.size())).observe(box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.again());
  }

  // `lines`: a name, a colour and its values each; null is a gap.
  show(times, lines) {
    this.last = [times, lines];
    const made = lines.map((line) => line.name).join("\n");
    if (made !== this.made) this.again();
    else this.plot.setData([times, ...lines.map((line) => line.values)]);
    this.made = made;
    const latest = lines.map((line) => `${name(line.name)} ${say(line.values, this.unit)}`);
    this.box.setAttribute("aria-label", `${this.title}. ${latest.join(", ")}.`);
  }

  size() {
    return { width: Math.max(this.box.clientWidth, 120), height: this.box.clientHeight };
  }

  again() {
    if (!this.last) return;
    if (this.plot) this.plot.destroy();
    const [times, lines] = this.last;
    this.key.replaceChildren(...lines.map(sample));
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--soft").trim();
    const grid = style.getPropertyValue("--line").trim();
    const card = style.getPropertyValue("--card").trim();
    const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font: "12px system-ui, sans-serif" };
    this.plot = new uPlot(
      {
        ...this.size(),
        padding: [10, 30, 0, 0],
        legend: { show: false },
        cursor: { show: false },
        scales: { y: { range: (_plot, _low, high) => [0, this.unit === "%" ? 100 : Math.max(high * 1.15, 1)] } },
        axes: [
          { ...axis, space: 46, incrs: [60, 120, 300, 600], values: (_plot, splits) => splits.map(clock) },
          { ...axis, size: 48 },
        ],
        series: [
          {},
          ...lines.map((line, place) => ({
            label: name(line.name),
            stroke: seen(line.colour),
            width: 2,
            dash: DASHES[place % DASHES.length],
            spanGaps: true,
            points: { show: true, size: 6, fill: card },
          })),
        ],
      },
      [times, ...lines.map((line) => line.values)],
      this.box,
    );
  }
}

// A line's name, beside a piece of the line.
function sample(line, place) {
  const item = document.createElement("li");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
  for (const [key, value] of Object.entries({ width: 30, height: 8 })) svg.setAttribute(key, value);
  const drawn = { x1: 0, x2: 30, y1: 4, y2: 4, stroke: seen(line.colour), "stroke-width": 2, "stroke-dasharray": DASHES[place % DASHES.length].join(" ") };
  for (const [key, value] of Object.entries(drawn)) stroke.setAttribute(key, value);
  svg.append(stroke);
  const words = document.createElement("span");
  words.textContent = name(line.name);
  item.append(svg, words);
  return item;
}

function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });
}

function say(values, unit) {
  const known = values.filter((value) => value !== null);
  return known.length ? `${Math.round(known[known.length - 1])} ${unit}` : "not measured";
}
