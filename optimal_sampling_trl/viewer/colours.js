// ---- colours of tokens -----------------------------------------------------------------------------------------
// ColorBrewer's ramps, safe for every form of colour blindness: YlGnBu from little to much; orange to blue, of PuOr
// and RdBu, from the student to the teacher. On a dark page their middle or low end is dark, so that it recedes.
const RAMPS = {
  light: {
    sequential: ["#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58"],
    diverging: ["#b35806", "#e08214", "#fdb863", "#fee0b6", "#f7f7f7", "#d1e5f0", "#92c5de", "#4393c3", "#2166ac"],
  },
  dark: {
    sequential: ["#1b2430", "#15375c", "#225ea8", "#1d91c0", "#41b6c4", "#7fcdbb", "#c7e9b4", "#edf8b1", "#ffffd9"],
    diverging: ["#fdb863", "#e08214", "#b35806", "#6b3a10", "#25292f", "#173d63", "#2166ac", "#4393c3", "#92c5de"],
  },
};
const difference = (a, b) => (rollout, i) => {   // of two log-probabilities; NaN where one is absent or both are −∞
  const x = value(rollout[a][i]), y = value(rollout[b][i]);
  return x === null || y === null ? NaN : x - y;
};
const QUANTITIES = {
  ratio: {of: difference("log_teacher", "log_theta"), halves: ["student", "mixture"], ramp: "diverging", fixed: 5,
    text: v => shown(v, 2),
    ends: (low, high) => [`student ${shown(low, 1)}`, `+${shown(high, 1)} teacher, nats`]},
  alpha: {of: (rollout, i) => value(rollout.alpha[i]) ?? NaN, halves: ["mixture"], ramp: "sequential", fixed: [0, 1],
    text: v => shown(v, 2),
    ends: (low, high) => [`α = ${short(+low.toFixed(2))}`, short(+high.toFixed(2))]},
  // log q − log θ, so that blue is what the teacher raised, as above.
  weight: {of: difference("log_q", "log_theta"), halves: ["mixture"], ramp: "diverging", fixed: Math.log(10),
    text: v => shown(Math.exp(-v), 2),
    ends: (low, high) => [`θ/q = ${shown(Math.exp(-low), 1)}`, shown(Math.exp(-high), 2)]},
};
const MOST_VALUES = 200000;    // tokens that a fitted scale looks at
const LEAST_RANGE = 0.02, LEAST_END = 0.1;   // of a fitted scale, so that noise looks like noise
const darkness = matchMedia("(prefers-color-scheme: dark)");
let scale;                     // {name, quantity, low, high, colours}

const rgb = hex => [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16));
function luminance(channels) { // WCAG 2 relative luminance
  const [r, g, b] = channels.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function coloursOf(ramp) {     // 101 steps of a ramp
  const stops = RAMPS[darkness.matches ? "dark" : "light"][ramp].map(rgb);
  return Array.from({length: 101}, (_, percent) => {
    const x = percent / 100 * (stops.length - 1), low = Math.min(Math.floor(x), stops.length - 2);
    const mixed = stops[low].map((c, k) => Math.round(c + (stops[low + 1][k] - c) * (x - low)));
    // Black or white, whichever contrasts more: at least 4.5 to 1 on every colour.
    return {ground: `rgb(${mixed.join(", ")})`, text: luminance(mixed) > 0.179 ? "#000" : "#fff"};
  });
}
function fitted(quantity) {    // the range of 96 % of the tokens; of 90 %, symmetric, where the ramp has a middle
  const rows = rollouts.filter(r => quantity.halves.includes(r.half));   // the student's own have α = 0 and θ/q = 1
  const stride = Math.ceil(rows.reduce((n, r) => n + r.ids.length, 0) / MOST_VALUES) || 1, values = [];
  let next = 0;
  for (const rollout of rows) {
    for (; next < rollout.ids.length; next += stride) {
      const v = quantity.of(rollout, next);
      if (Number.isFinite(v)) values.push(quantity.ramp === "diverging" ? Math.abs(v) : v);
    }
    next -= rollout.ids.length;
  }
  if (values.length === 0) return null;
  values.sort((a, b) => a - b);
  const at = share => values[Math.round(share * (values.length - 1))];
  if (quantity.ramp === "diverging") return Math.max(at(0.9), LEAST_END);
  const [low, high] = [at(0.02), at(0.98)], room = Math.max(0, LEAST_RANGE - (high - low)) / 2;
  return [Math.max(0, low - room), Math.min(1, high + room)];
}
function setScale(name, fit) {
  const quantity = QUANTITIES[name];
  if (fit && quantity.fitted === undefined) quantity.fitted = fitted(quantity);
  const range = (fit && quantity.fitted) || quantity.fixed;
  const [low, high] = Array.isArray(range) ? range : [-range, range];
  scale = {name, quantity, low, high, colours: coloursOf(quantity.ramp)};
  [byId("low").textContent, byId("high").textContent] = quantity.ends(low, high);
  byId("ramp").style.backgroundImage = `linear-gradient(to right, ${scale.colours.map(c => c.ground).join(", ")})`;
  byId("ramp").setAttribute("aria-label",
    `Colour scale of ${byId("colour").selectedOptions[0].textContent}, `
    + `from ${byId("low").textContent} to ${byId("high").textContent}`);
}
function paint(element, rollout, i) {
  const v = scale.quantity.of(rollout, i), unknown = Number.isNaN(v);
  element.classList.toggle("unknown", unknown);
  element.dataset.value = unknown ? "–" : scale.quantity.text(v);
  const place = Math.min(1, Math.max(0, (v - scale.low) / (scale.high - scale.low)));
  const colour = unknown ? {ground: "", text: ""} : scale.colours[Math.round(place * 100)];
  element.style.backgroundColor = colour.ground;
  element.style.color = colour.text;
}
function repaint() {           // after another choice of colours; the tokens stay
  for (const span of document.querySelectorAll(".token"))
    paint(span, rollouts[span.parentElement.dataset.rollout], Number(span.dataset.i));
}

