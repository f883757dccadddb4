// ---- figures: rewards by half, rewards and α over training -----------------------------------------------------
const W = 340, H = 140, LEFT = 46, RIGHT = 12, TOP = 12, BOTTOM = 34;
const MOST_BARS = 12;

function draw(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, v] of Object.entries(attributes)) element.setAttribute(name, v);
  if (text !== undefined) element.textContent = text;
  return element;
}
function figure(title, label, xLabel) {
  const element = make("figure"), caption = element.appendChild(make("figcaption", "", title));
  const svg = element.appendChild(draw("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label}));
  svg.append(draw("text", {x: (LEFT + W - RIGHT) / 2, y: H - 4, "text-anchor": "middle"}, xLabel));
  return {element, caption, svg};
}
function legend(caption, halves) {
  for (const half of halves) caption.append(make("span", "key " + half, half));
}
function ticks(first, last, most) {     // round numbers within a range
  const rough = (last - first) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const every = power * [1, 2, 5, 10].find(m => m * power >= rough * 0.999999), found = [];
  for (let k = Math.ceil(first / every - 1e-9); k * every <= last + 1e-9 * every; k++) found.push(k * every);
  return found;
}
function yAxis(svg, low, high, y, text) {
  for (const v of ticks(low, high, 3))
    svg.append(draw("line", {class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(v), y2: y(v)}),
      draw("text", {x: LEFT - 6, y: y(v) + 4, "text-anchor": "end"}, text(v)));
}

function bins(values) {                 // {labels, of}: a bin for each value where they are few, else equal widths
  const distinct = [...new Set(values)].sort((a, b) => a - b);
  if (distinct.length <= MOST_BARS) return {labels: distinct.map(short), of: v => distinct.indexOf(v)};
  const low = distinct[0], width = (distinct[distinct.length - 1] - low) / MOST_BARS;
  return {labels: Array.from({length: MOST_BARS}, (_, k) => k % 4 ? "" : short(+(low + k * width).toPrecision(3))),
    of: v => Math.min(MOST_BARS - 1, Math.floor((v - low) / width))};
}
function rewardHistogram(rows) {        // the share of each half's completions that has a reward
  const all = finite(rows, "reward");
  const halves = Object.keys(HALVES).filter(half => finite(rows.filter(r => r.half === half), "reward").length);
  const {labels, of} = bins(all), shares = {}, words = [];
  for (const half of halves) {
    const values = finite(rows.filter(r => r.half === half), "reward");
    shares[half] = labels.map((_, k) => values.filter(v => of(v) === k).length / values.length);
    words.push(`${HALVES[half]} ${plural(values.length, "completion")}, mean ${shown(average(values), 2)}`);
  }
  const {element, caption, svg} = figure("Rewards", "Histogram of rewards. " + words.join(". "), "reward");
  legend(caption, halves);
  const top = Math.max(0.01, ...Object.values(shares).flat());
  const y = share => H - BOTTOM - share / top * (H - TOP - BOTTOM), room = (W - LEFT - RIGHT) / labels.length;
  yAxis(svg, 0, top, y, v => Math.round(v * 100) + " %");
  const width = Math.min(40, room * 0.8 / halves.length);
  labels.forEach((label, k) => {
    const middle = LEFT + (k + 0.5) * room;
    svg.append(draw("text", {x: middle, y: H - BOTTOM + 14, "text-anchor": "middle"}, label));
    halves.forEach((half, n) => svg.append(draw("rect", {class: half, x: middle + (n - halves.length / 2) * width,
      y: y(shares[half][k]), width: width - 1, height: H - BOTTOM - y(shares[half][k])})));
  });
  return element;
}

function overSteps(rows, half, values) {   // [[step, mean of the values of that half's rollouts], ...]
  const found = new Map();
  for (const r of rows) {
    if (r.half !== half || r.step === null) continue;
    if (!found.has(r.step)) found.set(r.step, []);
    found.get(r.step).push(...values(r));
  }
  return [...found].filter(([, v]) => v.length).map(([step, v]) => [step, average(v)]).sort((a, b) => a[0] - b[0]);
}
function lineChart(title, curves, range) { // curves: {half: points}
  const points = Object.values(curves).flat(), steps = points.map(([step]) => step), values = points.map(([, v]) => v);
  const first = Math.min(...steps), last = Math.max(...steps);
  const [low, high] = range(Math.min(...values), Math.max(...values));
  const x = s => last === first ? (LEFT + W - RIGHT) / 2 : LEFT + (s - first) / (last - first) * (W - LEFT - RIGHT);
  const y = v => H - BOTTOM - (v - low) / (high - low) * (H - TOP - BOTTOM);
  const ends = half => `${HALVES[half]}: ${shown(curves[half][0][1], 2)} at step ${curves[half][0][0]}, `
    + `${shown(curves[half].at(-1)[1], 2)} at step ${curves[half].at(-1)[0]}`;
  const {element, caption, svg} =
    figure(title, `${title}. ${Object.keys(curves).map(ends).join(". ")}`, "training step");
  legend(caption, Object.keys(curves));
  yAxis(svg, low, high, y, v => short(+v.toFixed(4)));
  for (const step of ticks(first, last, 4).filter(Number.isInteger))
    svg.append(draw("text", {x: x(step), y: H - BOTTOM + 14, "text-anchor": "middle"}, count(step)));
  const now = svg.appendChild(draw("line", {class: "now", y1: TOP, y2: H - BOTTOM, visibility: "hidden"}));
  element.mark = step => {              // the step that the slider has chosen, null for all
    now.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) for (const end of ["x1", "x2"]) now.setAttribute(end, x(step));
  };
  for (const [half, its] of Object.entries(curves)) {
    svg.append(draw("polyline", {class: half, points: its.map(([s, v]) => `${x(s)},${y(v)}`).join(" ")}));
    if (its.length <= 60) for (const [s, v] of its) svg.append(draw("circle", {class: half, cx: x(s), cy: y(v), r: 3}));
  }
  return element;
}
function known(curves) { return Object.fromEntries(Object.entries(curves).filter(([, points]) => points.length)); }
function stepCharts() {                 // of all rollouts
  const rewards = known({student: overSteps(rollouts, "student", r => finite([r], "reward")),
    mixture: overSteps(rollouts, "mixture", r => finite([r], "reward"))});
  const alpha = known({mixture: overSteps(rollouts, "mixture", r => r.alpha.map(value).filter(Number.isFinite))});
  const found = [];
  if (Object.keys(rewards).length)
    found.push(lineChart("Mean reward by step", rewards,
      (low, high) => [Math.min(0, low), Math.max(high, low + 0.1)]));
  if (Object.keys(alpha).length)        // at least a tenth of α's range, so that noise looks like noise
    found.push(lineChart("Mean α by step", alpha, (low, high) => {
      const start = Math.max(0, Math.min(low - 0.02, (low + high) / 2 - 0.05, 0.9));
      return [start, Math.min(1, Math.max(high + 0.02, start + 0.1))];
    }));
  return found;
}

