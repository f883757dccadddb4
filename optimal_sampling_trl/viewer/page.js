// ---- filters, order, pages, links ------------------------------------------------------------------------------
const PAGE = 50;             // rollouts on a page; a page of prompts holds whole prompts
const STEPS = [...new Set(rollouts.map(r => r.step).filter(step => step !== null))].sort((a, b) => a - b);
const controls = byId("controls"), bar = document.querySelector(".bar"), figures = document.querySelector(".figures");
let pages = [[]];            // of indices, or of groups of indices
let selected = [];           // indices of the rollouts that pass the filters, sorted
let page = 0;

function bound(id) {                    // a filter's number, or null where it is empty
  const text = byId(id).value.trim();
  return text === "" || Number.isNaN(Number(text)) ? null : Number(text);
}
function within(v, low, high) {         // a rollout without the number passes only where no bound is set
  v = value(v);
  if (low === null && high === null) return true;
  return v !== null && (low === null || v >= low) && (high === null || v <= high);
}
function chosenStep() { return STEPS[Number(byId("step").value) - 1] ?? null; }
function select() {
  const rewardMin = bound("reward-min"), rewardMax = bound("reward-max"), step = chosenStep();
  const alphaMin = bound("alpha-min"), alphaMax = bound("alpha-max");
  const text = byId("text").value.toLowerCase(), half = byId("half").value;
  selected = [];
  rollouts.forEach((r, i) => {
    if (within(r.reward, rewardMin, rewardMax) && within(r.mean, alphaMin, alphaMax) && (!half || r.half === half)
        && (step === null || r.step === step) && (!text || searchable(r).includes(text))) selected.push(i);
  });
  sortSelected();
  pages = byId("view").value === "groups" ? pagesOfGroups() : chunks(selected, PAGE);
  page = 0;
  drawFigures(step);
  render();
}
function sortSelected() {
  const direction = Number(byId("direction").value), name = byId("sort").value;
  const of = {order: i => i, length: i => rollouts[i].ids.length}[name] ?? (i => value(rollouts[i][name]));
  selected.sort((i, j) => {
    const x = of(i), y = of(j);
    if (x === y) return i - j;
    if (x === null || y === null) return x === null ? 1 : -1;    // absent numbers last, in either direction
    return x < y ? -direction : direction;
  });
}
function chunks(all, size) {
  const found = [];
  for (let k = 0; k < all.length; k += size) found.push(all.slice(k, k + size));
  return found.length ? found : [[]];
}
function pagesOfGroups() {              // prompts in order of their first rollout, about PAGE rollouts together
  const groups = new Map(), found = [[]];
  for (const i of selected) {
    if (!groups.has(rollouts[i].group)) groups.set(rollouts[i].group, []);
    groups.get(rollouts[i].group).push(i);
  }
  let filled = 0;
  for (const indices of groups.values()) {
    if (filled && filled + indices.length > PAGE) { found.push([]); filled = 0; }
    found.at(-1).push(indices);
    filled += indices.length;
  }
  return found;
}
function render() {
  const grouped = byId("view").value === "groups";
  page = Math.min(Math.max(page, 0), pages.length - 1);
  hideTip();
  coming.disconnect();
  list.replaceChildren(...pages[page].map(grouped ? group : index => card(index, false)));
  showTokens([...list.querySelectorAll(".rollout")]);
  if (selected.length === 0) list.append(make("p", "none", "No rollout passes these filters. Reset shows all."));
  const all = selected.length < rollouts.length ? ` of ${count(rollouts.length)}` : "";
  byId("status").textContent =
    `Page ${count(page + 1)} of ${count(pages.length)} · ${count(selected.length)}${all} rollouts`;
  byId("previous").disabled = page === 0;
  byId("next").disabled = page === pages.length - 1;
}
function turn(by) {
  page += by;
  render();
  const top = list.getBoundingClientRect().top + scrollY - bar.offsetHeight;
  if (scrollY > top) scrollTo(0, top);
}
function makeRoom() {                   // for the bar: on a large screen it stays, and covers what is scrolled to
  const covered = getComputedStyle(bar).position === "sticky" ? bar.offsetHeight : 0;
  document.documentElement.style.scrollPaddingTop = covered + 10 + "px";
}
function locate() {                     // shows the rollout that the address names
  makeRoom();
  const index = Number(/^#rollout-(\d+)$/.exec(location.hash)?.[1]) - 1;
  if (!rollouts[index]) return;
  if (!selected.includes(index)) { controls.reset(); start(); }
  const place = pages.findIndex(entries => entries.flat().includes(index));
  if (place !== page) { page = place; render(); }
  for (const section of list.querySelectorAll(".columns > section")) {
    const at = section.indices.indexOf(index);
    if (at >= 0 && !byId("rollout-" + (index + 1))) showTokens(section.showUpTo(at + 1));
  }
  const article = byId("rollout-" + (index + 1));
  for (const other of list.querySelectorAll(".linked")) other.classList.remove("linked");
  article.classList.add("linked");
  article.focus({preventScroll: true});
  article.scrollIntoView({block: "start"});
}

// ---- overview --------------------------------------------------------------------------------------------------
const charts = STEPS.length > 1 ? stepCharts() : [];
function drawFigures(step) {
  const rows = selected.map(i => rollouts[i]);
  figures.replaceChildren(...(finite(rows, "reward").length ? [rewardHistogram(rows)] : []), ...charts);
  charts.forEach(chart => chart.mark(step));
  byId("overview").hidden = figures.children.length === 0;
}
function meanOfTokens(name) {            // of the mixture's tokens, from what each rollout has the mean of
  const rows = rollouts.filter(r => r.half === "mixture" && Number.isFinite(value(r[name])) && r[name] !== null);
  const tokens = rows.reduce((n, r) => n + r.ids.length, 0);
  return tokens ? rows.reduce((sum, r) => sum + r[name] * r.ids.length, 0) / tokens : null;
}
function summarise() {
  const halves = Object.keys(HALVES).map(half => [half, rollouts.filter(r => r.half === half)])
    .filter(([, rows]) => rows.length);
  const parts = [plural(rollouts.length, "rollout"), plural(rollouts.reduce((n, r) => n + r.ids.length, 0), "token")];
  if (halves.some(([half]) => half === "mixture"))
    parts.push(`mean α ${shown(meanOfTokens("mean"), 3)}`, `acceptance ${shown(meanOfTokens("acceptance"), 3)}`);
  const rewards = halves.map(([half, rows]) => [half, finite(rows, "reward")]).filter(([, r]) => r.length);
  if (rewards.length)
    parts.push("mean reward " + rewards.map(([half, r]) => `${shown(average(r), 3)} (${half})`).join(", "));
  document.querySelector(".summary").textContent = parts.join(" · ");
}

// ---- start -----------------------------------------------------------------------------------------------------
function offer() {                       // only the controls that this page's data can use
  const has = name => rollouts.some(r => r[name] !== null), both = new Set(rollouts.map(r => r.half)).size > 1;
  byId("reward-filter").hidden = !has("reward");
  byId("half-field").hidden = !both;
  for (const name of ["reward", "advantage"]) if (!has(name)) byId("sort").querySelector(`[value=${name}]`).remove();
  byId("step-field").hidden = STEPS.length < 2;
  byId("step").max = STEPS.length;
  const sides = new Map();
  for (const r of rollouts) sides.set(r.group, (sides.get(r.group) ?? new Set()).add(r.half));
  if ([...sides.values()].some(halves => halves.size > 1))   // what Reset goes back to as well
    byId("view").querySelector("[value=groups]").defaultSelected = true;
}
function showStep() {
  const step = chosenStep();
  byId("step-shown").textContent = step === null ? "all" : count(step);
  byId("step").setAttribute("aria-valuetext", step === null ? "all steps" : `step ${step}`);
}
function setColours() {
  list.classList.toggle("numbers", byId("numbers").checked);
  setScale(byId("colour").value, byId("fit").checked);
  repaint();
}
function start() { setColours(); showStep(); select(); }

const COLOURS = ["colour", "fit", "numbers"];
let pending = 0;                         // typing filters once it pauses
controls.addEventListener("input", event => {
  if (COLOURS.includes(event.target.id)) { hideTip(); return setColours(); }
  showStep();
  clearTimeout(pending);
  pending = setTimeout(select, 150);
});
controls.addEventListener("reset", () => { clearTimeout(pending); pending = setTimeout(start, 0); });
controls.addEventListener("submit", event => { event.preventDefault(); select(); });
darkness.addEventListener("change", setColours);
new ResizeObserver(makeRoom).observe(bar);
addEventListener("hashchange", locate);
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
document.querySelector("h1").textContent = document.title;
byId("overview").open = matchMedia("(min-width: 760px) and (min-height: 700px)").matches;
offer();
summarise();
start();
locate();
