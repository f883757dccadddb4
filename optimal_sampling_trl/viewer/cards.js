// ---- one rollout, and the rollouts of one prompt ---------------------------------------------------------------
const FIRST_TOKENS = 1500;   // tokens of a rollout that are built at once; a button builds the rest
const FIRST_CARDS = 8;       // rollouts of a half of a prompt that are shown at once, and built before they come near
const MORE_CARDS = 50;       // rollouts that its button adds

function token(rollout, i) {
  // Its last line breaks follow the span, so that the token's ground and number stay on its own line.
  const [, text, breaks] = /^([^]*?)(\n*)$/.exec(visible(rollout, i));
  const span = make("span", "token", text.replace(/\n/g, "↵\n") + "↵".repeat(breaks.length));
  span.setAttribute("role", "option");
  span.tabIndex = i === 0 ? 0 : -1;     // one stop per rollout for Tab, arrows within
  span.dataset.i = i;
  paint(span, rollout, i);
  return [span, breaks];
}
function colour(tokens) {               // turns the plain text of a rollout into its tokens
  const index = tokens.dataset.rollout, rollout = rollouts[index];
  coming.unobserve(tokens);
  tokens.setAttribute("role", "listbox");
  tokens.setAttribute("aria-label", "Tokens of rollout " + (Number(index) + 1));
  tokens.replaceChildren();
  rollout.ids.slice(0, FIRST_TOKENS).forEach((_, i) => tokens.append(...token(rollout, i)));
  if (rollout.ids.length <= FIRST_TOKENS) return;
  const rest = make("button", "", `Show the remaining ${count(rollout.ids.length - FIRST_TOKENS)} tokens`);
  rest.type = "button";
  rest.addEventListener("click", () => {
    for (let i = FIRST_TOKENS; i < rollout.ids.length; i++) tokens.append(...token(rollout, i));
    rest.remove();
    tokens.children[FIRST_TOKENS].focus();
  });
  tokens.after(rest);
}
// Tokens are built when their rollout is within a screen of being seen; until then it is plain text of the same size.
const coming = new IntersectionObserver(
  entries => entries.filter(entry => entry.isIntersecting).forEach(entry => colour(entry.target)),
  {rootMargin: "100% 0%"});

function fact(parent, label, text) {
  const span = make("span", "", label + " ");
  span.append(make("b", "", text));
  parent.append(span);
}
function mixtureText(m) {
  if (m.method === "top_k_swap") return `top_k_swap, K = ${m.swap_top_k}`;
  const form = m.form === "arithmetic" ? "arithmetic " : "";
  if (m.method === "fixed") return `${form}fixed, α = ${m.fixed_alpha}`;
  const range = `${form}${m.method}, α in [${m.alpha_min}, ${m.alpha_max}]`;
  return m.method === "trust_region" ? `${range}, ε = ${m.epsilon}` : range;
}
function prompts(rollout) {
  const same = rollout.prompt === rollout.theta_prompt;
  const texts = [data.prompts[rollout.prompt], data.prompts[rollout.theta_prompt]];
  const details = make("details"), summary = details.appendChild(make("summary", "", same ? "Prompt" : "Prompts"));
  summary.append(make("span", "", texts[0].slice(0, 300).replace(/\s+/g, " ")));
  if (same) details.append(make("pre", "", texts[0]));
  else ["Teacher’s prompt", "Student’s prompt"].forEach((name, k) =>
    details.append(make("div", "tiny", name), make("pre", "", texts[k])));
  const settings = details.appendChild(make("div", "facts"));
  fact(settings, "temperature", String(rollout.temperature));
  fact(settings, "mixture", mixtureText(data.mixtures[rollout.mixture]));
  return details;
}
function heading(index) {
  const h = make("h2"), link = h.appendChild(make("a", "", "Rollout " + (index + 1)));
  link.href = "#rollout-" + (index + 1);
  return h;
}
function card(index, inGroup) {
  const rollout = rollouts[index], article = make("article", "rollout");
  article.id = "rollout-" + (index + 1);
  article.tabIndex = -1;                // so that a link to it moves the focus
  const facts = article.appendChild(make("div", "facts"));
  facts.append(heading(index));
  if (rollout.reward !== null) fact(facts, "reward", short(rollout.reward));
  if (rollout.advantage !== null) fact(facts, "advantage", shown(rollout.advantage, 2));
  if (!inGroup) fact(facts, "by the", rollout.half);
  if (rollout.half === "mixture") {
    fact(facts, "mean α", shown(rollout.mean, 3));
    if (!inGroup) fact(facts, "acceptance", shown(rollout.acceptance, 3));
  }
  fact(facts, "tokens", count(rollout.ids.length));
  if (rollout.step !== null && !inGroup) fact(facts, "step", count(rollout.step));
  if (rollout.finish !== "stop") fact(facts, "finish", String(rollout.finish));
  if (!inGroup) article.append(prompts(rollout));
  if (rollout.ids.length === 0) {
    article.append(make("p", "tiny", "No tokens were generated."));
    return article;
  }
  const plain = rollout.ids.slice(0, FIRST_TOKENS).map((_, i) => visible(rollout, i).replace(/\n/g, "↵\n")).join("");
  const tokens = article.appendChild(make("div", "tokens", plain));
  tokens.dataset.rollout = index;
  return article;
}
function showTokens(articles) {         // the first at once, the others when they come near
  articles.forEach((article, k) => {
    const tokens = article.querySelector(".tokens");
    if (tokens) k < FIRST_CARDS ? colour(tokens) : coming.observe(tokens);
  });
}

function column(half, indices) {        // one half of a prompt's completions
  const section = make("section", half), rewards = finite(indices.map(i => rollouts[i]), "reward");
  const mean = rewards.length ? ` · mean reward ${shown(average(rewards), 2)}` : "";
  section.append(make("h3", "", `${HALVES[half]} · ${count(indices.length)}${mean}`));
  let built = 0;
  const more = make("button");
  more.type = "button";
  section.showUpTo = end => {           // also for a link to one of them
    const articles = indices.slice(built, end).map(index => card(index, true));
    built = Math.max(built, Math.min(end, indices.length));
    section.append(...articles, more);
    more.hidden = built === indices.length;
    const left = indices.length - built;
    more.textContent = `Show ${count(Math.min(MORE_CARDS, left))} more of ${count(left)}`;
    return articles;
  };
  more.addEventListener("click", () => {
    const articles = section.showUpTo(built + MORE_CARDS);
    showTokens(articles);
    articles[0].focus();
  });
  section.indices = indices;
  section.showUpTo(FIRST_CARDS);
  return section;
}
function group(indices) {               // the completions of one prompt at one step, each half in a column
  const rollout = rollouts[indices[0]], article = make("article", "group");
  const facts = article.appendChild(make("div", "facts"));
  facts.append(make("h2", "", `Prompt ${rollout.group + 1}`));
  if (rollout.step !== null) fact(facts, "step", count(rollout.step));
  fact(facts, "completions", count(indices.length));
  article.append(prompts(indices.map(i => rollouts[i]).find(r => r.half === "mixture") ?? rollout));
  const columns = article.appendChild(make("div", "columns"));
  for (const half of Object.keys(HALVES)) {
    const its = indices.filter(i => rollouts[i].half === half);
    if (its.length) columns.append(column(half, its));
  }
  return article;
}

