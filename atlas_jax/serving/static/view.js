// Builds the page's parts. Text is only ever set as text, never as markup.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined)
      element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

// Finds the answer in a text; if it is nowhere, its longer words. Gives the pattern, and whether it
// is of the whole answer.
function pattern(answer, text) {
  const clean = (answer || "").trim();
  if (!clean) return [null, false];
  const whole = escaped(clean).replace(/\s+/g, "\\s+");
  for (const source of [`(?<![\\p{L}\\p{N}])${whole}(?![\\p{L}\\p{N}])`, whole]) {
    const found = new RegExp(source, "giu");
    if (found.test(text)) return [new RegExp(source, "giu"), true];
  }
  const words = clean.split(/[^\p{L}\p{N}]+/u).filter((word) => word.length > 3);
  if (!words.length) return [null, false];
  const either = words.map(escaped).join("|");
  return [new RegExp(`(?<![\\p{L}\\p{N}])(?:${either})(?![\\p{L}\\p{N}])`, "giu"), false];
}

function marked(text, answer) {
  const [found, whole] = pattern(answer, text);
  const parts = [];
  let at = 0;
  for (const match of found ? text.matchAll(found) : []) {
    parts.push(text.slice(at, match.index), make("mark", { class: whole ? null : "part" }, match[0]));
    at = match.index + match[0].length;
  }
  return [...parts, text.slice(at)];
}

const BARS = {
  score: { word: "score", digits: 3, help: "Inner product of question and passage" },
  attention: { word: "attention", digits: 3, help: "What the reader drew from the passage" },
  left_out: {
    word: "effect",
    digits: 2,
    help: "What the answer's log-probability loses when the passage is left out",
  },
};

// One bar for each figure, scaled to the largest of its pane; an effect may go either way.
function bars(passage, largest) {
  const rows = Object.entries(BARS).filter(([name]) => passage[name] !== undefined);
  return make(
    "dl",
    { class: "bars" },
    ...rows.map(([name, { word, digits, help }]) => {
      const value = passage[name];
      const share = largest[name] > 0 ? Math.abs(value) / largest[name] : 0;
      const signed = name === "left_out";
      const kind = signed ? (value < 0 ? "bar both against" : "bar both for") : `bar ${name}`;
      const fill = make("span", { class: "fill" });
      fill.style.setProperty("--share", share.toFixed(4));
      const shown = value.toFixed(digits).replace(/^-(0\.0+)$/, "$1");
      const sign = signed && Number(shown) > 0 ? "+" : "";
      return make(
        "div",
        { title: help },
        make("dt", {}, word),
        make("dd", {}, make("span", { class: kind, "aria-hidden": "true" }, fill),
          make("span", { class: "figure" }, `${sign}${shown}`)),
      );
    }),
  );
}

// A long text scrolls, and can then be reached with the keyboard.
const LONG = (text) => (text.length > 900
  ? { class: "text long", tabindex: "0", role: "group", "aria-label": "Text of the passage" }
  : { class: "text" });

function heading(passage) {
  return [passage.title, passage.section].filter(Boolean).join(" · ") || passage.id;
}

function editor(passage, actions, id) {
  const rows = Math.max(3, Math.min(14, Math.ceil(passage.text.length / 60)));
  const area = make("textarea", { id, rows, dir: "auto", maxlength: actions.maxText });
  area.value = passage.text;
  area.setSelectionRange(0, 0);
  const cancel = () => actions.edit(null);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) actions.save(passage, area.value);
  });
  return make(
    "div",
    { class: "editor" },
    make("label", { for: id, class: "hidden" }, `Text of ${heading(passage)}`),
    area,
    make("div", { class: "actions" },
      make("button", { type: "button", class: "strong small",
        onclick: () => actions.save(passage, area.value) }, "Save and ask again"),
      make("button", { type: "button", class: "quiet small", onclick: cancel }, "Cancel"),
    ),
  );
}

function moved(rank, before) {
  if (before === undefined) return null;
  if (before === 0) return make("span", { class: "moved new" }, "new");
  if (before === rank) return null;
  const up = before > rank;
  return make("span", { class: "moved" }, `${up ? "▲" : "▼"} ${Math.abs(before - rank)}`,
    make("span", { class: "hidden" }, up ? " places up" : " places down"));
}

function card(passage, rank, result, largest, actions, ranks) {
  const edited = passage.id in result.settings.replace;
  const id = `edit-${result.key}-${rank}`;
  const editing = actions && actions.editing === passage.id;
  const before = ranks ? ranks.get(passage.id) || 0 : undefined;
  const name = heading(passage);
  return make(
    "li",
    { class: edited ? "passage edited" : "passage", "data-id": passage.id },
    make("div", { class: "passage-head" },
      make("span", { class: "rank", "aria-hidden": "true" }, String(rank)),
      make("h3", { dir: "auto" }, name),
      edited ? make("span", { class: "tag" }, "edited") : null,
      moved(rank, before),
    ),
    editing ? editor(passage, actions, id)
      : make("p", { ...LONG(passage.text), dir: "auto" }, ...marked(passage.text, result.answer)),
    bars(passage, largest),
    actions && !editing ? make("div", { class: "actions" },
      actions.canExclude ? make("button", { type: "button", class: "quiet small", "data-do": "cross",
        "aria-label": `Cross out ${name}`, onclick: () => actions.exclude(passage) }, "Cross out") : null,
      actions.canReplace ? make("button", { type: "button", class: "quiet small", "data-do": "edit",
        "aria-label": `Edit ${name}`, onclick: () => actions.edit(passage.id) }, "Edit text") : null,
      edited ? make("button", { type: "button", class: "quiet small",
        "aria-label": `Restore the text of ${name}`, onclick: () => actions.restore(passage.id) },
        "Restore text") : null,
    ) : null,
  );
}

function likelihood(result) {
  if (result.logProbability === null || result.logProbability === undefined) return null;
  const share = Math.min(1, Math.exp(result.logProbability));
  const percent = share >= 0.995 ? "> 99" : (100 * share).toFixed(share < 0.1 ? 1 : 0);
  const fill = make("span", { class: "fill" });
  fill.style.setProperty("--share", share.toFixed(4));
  return make("p", { class: "likelihood", title: "Probability that the model gives this answer" },
    make("span", { class: "bar sure", "aria-hidden": "true" }, fill),
    make("span", {}, `${percent} % likely`));
}

// Shows more of an answer that is being written; says whether its place was there.
export function showWritten(text) {
  const place = document.querySelector(".pane:last-child .answer.writing");
  if (place) place.textContent = text;
  return Boolean(place);
}

// The answer, what is written of it, or what is being done.
function words(result) {
  if (!result.pending)
    return make("p", { class: result.answer ? "answer" : "answer none", dir: "auto" },
      result.answer || "(no answer)");
  if (result.written) return make("p", { class: "answer writing", dir: "auto" }, result.written);
  return make("p", { class: "answer waiting" },
    result.passages ? `Reading ${result.passages.length} passages …` : "Searching …");
}

function answerCard(result, before) {
  if (result.mode === "search") return null;
  // An answer as of another version is no change of this one.
  const changed = before && !before.pending && !result.pending && before.asOf === result.asOf
    && before.answer !== result.answer;
  return make("div", { class: "answer-card" },
    make("p", { class: "eyebrow", dir: "auto" }, result.settings.question),
    words(result),
    result.pending ? null : likelihood(result),
    changed ? make("p", { class: "was" }, "was ",
      make("s", { dir: "auto" }, before.answer || "(no answer)")) : null);
}

function changes(result, actions) {
  const { exclude, titles } = result.settings;
  if (!exclude.length) return null;
  return make("div", { class: "crossed" },
    make("h3", {}, "Crossed out"),
    make("ul", {}, ...exclude.map((id) => make("li", {},
      make("s", { dir: "auto" }, titles[id] || id),
      actions ? make("button", { type: "button", class: "quiet small",
        "aria-label": `Restore ${titles[id] || id}`, onclick: () => actions.include(id) },
        "Restore") : null))));
}

function note(result) {
  const { timings, index } = result;
  if (!timings) return null;
  const total = timings.waited + timings.found + timings.read;
  const words = [`${total.toFixed(0)} ms`];
  if (index) words.push(`${index.passages.toLocaleString("en")} passages searched`);
  if (result.asOf) words.push(`as of version ${index.passages_version}`);
  return make("p", { class: "dim note" }, words.join(" · "));
}

// One pane: the answer, its passages, and what can be done with them.
//   result: what to show.   actions: what the buttons do; null in a pane that is only compared.
//   options.folded: whether its passages are folded away.   options.title, options.before (the answer before this one), options.against (to compare).
export function pane(result, actions, options) {
  const passages = result.passages || [];
  const largest = {};
  for (const name of Object.keys(BARS))
    largest[name] = Math.max(0, ...passages.map((one) => Math.abs(one[name] || 0)));
  const ranks = options.against && options.against.passages
    ? new Map(options.against.passages.map((one, at) => [one.id, at + 1])) : null;
  const list = result.passages
    ? make("ol", { class: "passages" },
      ...passages.map((one, at) => card(one, at + 1, result, largest, actions, ranks)))
    : make("div", { class: "ghosts", "aria-hidden": "true" },
      ...Array.from({ length: 3 }, () => make("div", { class: "ghost" })));
  const foot = make("div", { class: "pane-foot" }, note(result), ...(options.buttons || []));
  return make("section", { class: "pane", "aria-label": options.title, "aria-busy": String(result.pending) },
    options.showTitle ? make("h2", { class: "pane-title" }, options.title) : null,
    answerCard(result, options.before), foot, changes(result, actions),
    options.folded ? make("details", { class: "folded" },
      make("summary", {}, `Its ${passages.length} passages`), list) : list);
}
