// A colour for each module, the same everywhere on the page. The set can be told apart by people who see fewer colours
// (Okabe and Ito); each comes with the ink that is read best on it, at a contrast of 4.5 or more.

const SET = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8a6fd1", "#7a8f2a", "#b0b7bf"];
const UNKNOWN = "#9aa1a9";
const seats = new Map();

export function name(module) {
  return module === null || module === undefined ? "no module" : module;
}

// Names in the order in which they get their colours; a name keeps its own for as long as the page is open.
export function seat(modules) {
  for (const module of modules) if (module !== null && !seats.has(module)) seats.set(module, seats.size);
}

export function colour(module) {
  return seats.has(module) ? SET[seats.get(module) % SET.length] : UNKNOWN;
}

export function seated() {
  return [...seats.keys()];
}

const parts = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

function light(hex) {
  const [r, g, b] = parts(hex).map((part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

export function contrast(one, other) {
  const [less, more] = [light(one), light(other)].sort((a, b) => a - b);
  return (more + 0.05) / (less + 0.05);
}

export function ink(fill) {
  return contrast(fill, "#000000") >= contrast(fill, "#ffffff") ? "#000000" : "#ffffff";
}

// The colour as a line on this page: moved towards black, or white in the dark, until it is seen at a contrast of 3.
export function line(hex) {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const [page, goal] = isDark ? ["#191d23", 255] : ["#ffffff", 0];
  let found = hex;
  for (let share = 0.1; contrast(found, page) < 3 && share <= 1; share += 0.1) {
    found = `#${parts(hex).map((part) => Math.round(part + (goal - part) * share).toString(16).padStart(2, "0")).join("")}`;
  }
  return found;
}
