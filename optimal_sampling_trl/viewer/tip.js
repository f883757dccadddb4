// ---- the records of a token, and the walk over tokens ----------------------------------------------------------
const list = byId("list"), tip = byId("tip");
const tokenAt = target => target instanceof Element ? target.closest(".token") : null;
function hideTip() { tip.hidden = true; }

function recordTable(rollout, i) {
  const table = make("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  for (const name of ["", "log", "probability"]) head.append(make("th", "", name));
  for (const [name, key] of [["θ student", "log_theta"], ["t teacher", "log_teacher"], ["q mixture", "log_q"]]) {
    const row = body.insertRow(), log = value(rollout[key][i]);
    const probability = log === null ? null : Math.exp(log);
    row.append(make("th", "", name), make("td", "", shown(log, 4)), make("td", "", shown(probability, 4)));
  }
  return table;
}
function likelyTable({theta, teacher}, rollout, i) {   // the tokens that each model would have preferred
  const each = theta.ids.length / rollout.ids.length;
  const table = make("table", "likely"), head = table.createTHead().insertRow(), body = table.createTBody();
  for (const name of ["Student prefers", "Teacher prefers"]) head.append(make("th", "", name));
  for (let k = i * each; k < (i + 1) * each; k++) {
    const row = body.insertRow();
    for (const model of [theta, teacher]) {
      const id = model.ids[k], cell = row.insertCell();
      if (id === null) continue;
      if (id === rollout.ids[i]) cell.className = "taken";
      const text = data.pieces[id] ? JSON.stringify(data.pieces[id]) : "⟨" + id + "⟩";
      cell.append(make("code", "", text), shown(model.probabilities[k], 3));
    }
  }
  return table;
}
function showTip(span) {
  const rollout = rollouts[span.parentElement.dataset.rollout], i = Number(span.dataset.i);
  const {ratio, weight} = QUANTITIES;
  tip.replaceChildren(
    make("code", "", isPart(rollout, i) ? "(continues a character)" : JSON.stringify(piece(rollout, i))),
    make("p", "", `id ${rollout.ids[i]} · token ${count(i + 1)} of ${count(rollout.ids.length)}`),
    make("b", "", `α = ${shown(rollout.alpha[i], 4)} · θ/q = ${weight.text(weight.of(rollout, i))}`
      + ` · log t − log θ = ${ratio.text(ratio.of(rollout, i))}`),
    recordTable(rollout, i));
  if (rollout.likely) tip.append(likelyTable(rollout.likely, rollout, i));
  tip.hidden = false;
  const box = span.getClientRects()[0], margin = 8;
  const left = Math.min(Math.max(margin, box.left), document.documentElement.clientWidth - tip.offsetWidth - margin);
  const below = box.bottom + margin + tip.offsetHeight <= innerHeight;
  tip.style.left = left + scrollX + "px";
  tip.style.top = (below ? box.bottom + margin : box.top - margin - tip.offsetHeight) + scrollY + "px";
}

function nextLine(all, from, by) {      // the nearest token of the line above or below; -1 where there is none
  const x = all[from].offsetLeft;
  let k = from, best = -1, line = null;
  while ((k += by) >= 0 && k < all.length) {
    const top = all[k].offsetTop;
    if (Math.abs(top - all[from].offsetTop) < 4) continue;
    if (line !== null && Math.abs(top - line) >= 4) break;
    line ??= top;
    if (best < 0 || Math.abs(all[k].offsetLeft - x) < Math.abs(all[best].offsetLeft - x)) best = k;
  }
  return best;
}
function walk(event) {
  const span = tokenAt(event.target);
  if (event.key === "Escape") return hideTip();
  if (!span || event.ctrlKey || event.altKey || event.metaKey) return;
  const all = span.parentElement.children, i = Number(span.dataset.i);
  const goal = {ArrowRight: () => i + 1, ArrowLeft: () => i - 1, Home: () => 0, End: () => all.length - 1,
    ArrowDown: () => nextLine(all, i, 1), ArrowUp: () => nextLine(all, i, -1)}[event.key];
  if (!goal) return;
  event.preventDefault();
  all[goal()]?.focus();
}
list.addEventListener("focusin", event => {
  const span = tokenAt(event.target);
  if (!span) return;
  for (const other of span.parentElement.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  span.tabIndex = 0;
  showTip(span);
});
list.addEventListener("focusout", hideTip);
list.addEventListener("mouseover", event => { const span = tokenAt(event.target); if (span) showTip(span); });
list.addEventListener("mouseout", event => {
  if (!tokenAt(event.target)) return;
  const focused = tokenAt(document.activeElement);
  focused ? showTip(focused) : hideTip();
});
document.addEventListener("keydown", walk);

