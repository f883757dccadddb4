// ---- the data, its numbers and its texts -----------------------------------------------------------------------
const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const rollouts = data.rollouts;
const HALVES = {student: "Student’s own", mixture: "Mixture’s"};

const count = n => n.toLocaleString("en");
const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;
const value = v => typeof v === "string" ? (v === "inf" ? Infinity : -Infinity) : v;   // JSON has no infinities
const average = numbers => numbers.length ? numbers.reduce((a, b) => a + b, 0) / numbers.length : null;
function shown(v, digits) {
  v = value(v);
  if (v === null || Number.isNaN(v)) return "–";
  return Number.isFinite(v) ? v.toFixed(digits).replace("-", "−") : v > 0 ? "∞" : "−∞";
}
const short = v => shown(v, 4).replace(/\.?0+$/, "");
const finite = (rows, name) => rows.map(r => value(r[name])).filter(Number.isFinite);

function piece(rollout, i) {  // text of token i; empty for a later part of a character that spans several tokens
  const joined = rollout.joined && rollout.joined[i];
  return joined === undefined ? data.pieces[rollout.ids[i]] : joined;
}
const isPart = (rollout, i) => rollout.joined !== undefined && rollout.joined[i] === "";
function visible(rollout, i) {
  if (isPart(rollout, i)) return "‥";
  return piece(rollout, i).replace(/\r/g, "␍").replace(/\t/g, "→\t") || "⟨" + rollout.ids[i] + "⟩";
}
function searchable(rollout) {
  rollout.searched ??= (data.prompts[rollout.prompt] + "\n" + data.prompts[rollout.theta_prompt] + "\n"
    + rollout.ids.map((_, i) => piece(rollout, i)).join("")).toLowerCase();
  return rollout.searched;
}

function make(tag, className, text) {   // the only way text enters the page: textContent, never markup
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

