// The page: one question with its settings, the answer to it, and perhaps one kept beside it.

import * as api from "./api.js";
import * as versions from "./versions.js";
import { make, pane, showWritten } from "./view.js";

const $ = (id) => document.getElementById(id);
const form = $("ask"), question = $("question"), slider = $("k");
const K_MOST = 20;

let model = null;
let settings = fresh("");
let current = null; // the result shown
let before = null; // the one before it, of the same question
let kept = null; // the one to compare with
let editing = null; // id of the passage whose text is being edited
let running = null; // AbortController of the question on its way
let results = 0;

function fresh(text) {
  return { question: text, exclude: [], replace: {}, titles: {} };
}

function mode() {
  return form.elements.mode.value;
}

// ---- permanent links: everything after the #, so that no log holds it

function link() {
  const fields = new URLSearchParams({ q: settings.question, k: slider.value });
  if (mode() === "search") fields.set("mode", "search");
  if (!$("explain").checked) fields.set("explain", "0");
  if (versions.chosen()) fields.set("v", versions.chosen());
  if (isSameButVersion(kept)) fields.set("beside", kept.asOf);
  for (const id of settings.exclude) fields.append("x", id);
  for (const [id, text] of Object.entries(settings.replace)) fields.append("e", `${id}\n${text}`);
  return `${location.pathname}#${fields}`;
}

// Whether a result is of the question as it is asked now, perhaps of another version.
function isSameButVersion(result) {
  if (!result) return false;
  const asked = ({ question, exclude, replace }) => JSON.stringify([question, exclude, replace]);
  return result.mode === mode() && result.k === slider.value
    && asked(result.settings) === asked(settings) && result.asOf !== versions.chosen();
}

// Sets everything as the link says. Gives the version to ask as of first, to show it beside; null
// if there is none, undefined if the link holds no question.
function readLink() {
  const fields = new URLSearchParams(location.hash.slice(1));
  const text = fields.get("q");
  if (!text) return undefined;
  settings = fresh(text);
  settings.exclude = fields.getAll("x");
  for (const pair of fields.getAll("e")) {
    const at = pair.indexOf("\n");
    if (at > 0) settings.replace[pair.slice(0, at)] = pair.slice(at + 1);
  }
  question.value = text;
  const k = Number(fields.get("k"));
  if (Number.isInteger(k) && k >= 1) setK(k);
  form.elements.mode.value = fields.get("mode") === "search" ? "search" : "answer";
  $("explain").checked = fields.get("explain") !== "0" && model.explain;
  versions.choose(fields.get("v") || "");
  return fields.get("beside");
}

function followLink() {
  const beside = readLink();
  if (beside === undefined) return false;
  kept = null;
  if (beside === null) run();
  else compare(beside, versions.chosen());
  return true;
}

// ---- asking

async function run() {
  if (!settings.question.trim()) return false;
  if (running) running.abort();
  const mine = new AbortController();
  running = mine;
  history.replaceState(null, "", link());
  const same = current && current.settings.question === settings.question;
  before = same && !current.pending ? current : same ? before : null;
  editing = null;
  const result = {
    key: (results += 1), mode: mode(), pending: true, passages: null, answer: "", k: slider.value,
    settings: structuredClone(settings), asOf: versions.chosen(),
  };
  current = result;
  const body = {
    questions: settings.question, k: Number(slider.value),
    exclude: settings.exclude, replace: settings.replace, as_of: result.asOf,
  };
  told(null);
  say(`${mode() === "search" ? "Searching" : "Asking"}: ${settings.question}`);
  render();
  try {
    if (result.mode === "search") {
      const reply = await api.retrieve(body, mine.signal);
      Object.assign(result, reply.results[0], { index: reply.index, answer: "" });
    } else {
      await api.answer({ ...body, explain: $("explain").checked }, (name, data) => {
        if (name === "error") throw new api.Problem(data.detail, data.status);
        if (name === "passages") result.passages = data.passages;
        if (name === "tokens") {
          result.written = data.text;
          if (current === result && showWritten(data.text)) return; // nothing else has changed
        }
        if (name === "answer") {
          const { answer, log_probability, passages, timings } = data.answer;
          Object.assign(result, { answer, passages, timings, index: data.served_by,
            logProbability: log_probability, pending: false });
        }
        if (current === result) render();
      }, mine.signal);
    }
    result.pending = false;
    const count = `${result.passages.length} passages`;
    say(result.mode === "search" ? `${count} found`
      : `Answer: ${result.answer || "none"}. Read from ${count}.`);
  } catch (error) {
    if (error.name === "AbortError") return false;
    if (current === result) {
      current = before;
      before = null;
      if (current) { // what failed is undone
        settings = structuredClone(current.settings);
        versions.choose(current.asOf);
      }
    }
    const done = await failed(error);
    render();
    return done;
  }
  render();
  versions.seen(result.index);
  return true;
}

// Asks as of two versions and shows both answers side by side.
async function compare(left, right) {
  versions.choose(left);
  const known = current && !current.pending && current.asOf === left
    && isSameButVersion({ ...current, asOf: null });
  if (!known && !(await run())) return;
  kept = current;
  versions.choose(right);
  again();
  $("panes").scrollIntoView(); // the list of versions is below long passages
}

async function failed(error) {
  if (error.status === 401 && (await keyGiven())) return run();
  told(error.message);
  return false;
}

function keyGiven() {
  const dialog = $("key-dialog");
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const key = $("key").value.trim();
      $("key").value = "";
      if (key) api.keepKey(key);
      resolve(Boolean(key));
    }, { once: true });
  });
}

function told(message) {
  $("problem").replaceChildren(
    ...(message ? [make("p", { class: "problem" }, make("strong", {}, "That did not work. "), message)] : []));
}

function say(text) {
  $("status").textContent = text;
}

// ---- what the buttons of a passage do

function titled(passage) {
  return [passage.title, passage.section].filter(Boolean).join(" · ") || passage.id;
}

const actions = {
  get editing() { return editing; },
  get maxText() { return model.max_text; },
  get canExclude() { return settings.exclude.length < model.max_excluded; },
  get canReplace() { return model.max_replaced > 0; },
  exclude(passage) {
    settings.exclude.push(passage.id);
    settings.titles[passage.id] = titled(passage);
    delete settings.replace[passage.id];
    again();
  },
  include(id) {
    settings.exclude = settings.exclude.filter((one) => one !== id);
    again();
  },
  edit(id) {
    const last = editing;
    editing = id;
    render();
    const list = [...document.querySelectorAll(".pane:last-child .passage")];
    const item = list.find((one) => one.dataset.id === (id || last));
    item?.querySelector(id ? "textarea" : "[data-do=edit]")?.focus();
  },
  save(passage, text) {
    if (!text.trim()) return told("The text is empty; cross the passage out instead.");
    const others = Object.keys(settings.replace).filter((id) => id !== passage.id);
    if (others.length >= model.max_replaced)
      return told(`Up to ${model.max_replaced} passages can be edited at once; restore one first.`);
    settings.replace[passage.id] = text;
    return again();
  },
  restore(id) {
    delete settings.replace[id];
    again();
  },
};

// Asks once more; the focus goes to the answer, since the button that had it is gone.
function again() {
  run();
  focusAnswer();
}

function focusAnswer() {
  const pane = document.querySelector(".pane:last-child");
  pane?.setAttribute("tabindex", "-1");
  pane?.focus({ preventScroll: true });
}

// ---- drawing

function button(words, onclick, id) {
  return make("button", { type: "button", class: "quiet small", onclick, id }, words);
}

function render() {
  const active = document.activeElement;
  const focus = active?.closest?.(".pane") ? active.dataset.do : null;
  const onAnswer = active?.matches?.(".pane");
  const panes = [];
  if (kept) {
    panes.push(pane(kept, null, { title: described(kept, "Kept"), showTitle: true,
      folded: matchMedia("(max-width: 52rem)").matches, // so that the two answers are seen together
      buttons: [button("Close", () => { keep(null); }, "close-kept")] }));
  }
  if (current) {
    const buttons = current.pending ? [] : [
      button("Keep to compare", () => { keep(current); say("Kept on the left. Ask again to compare."); }, "keep"),
      button("Copy link", copyLink, "copy"),
    ];
    if (settings.exclude.length || Object.keys(settings.replace).length)
      buttons.push(button("Undo all changes", () => { settings = fresh(settings.question); again(); }, "undo"));
    panes.push(pane(current, current.pending ? null : actions, { buttons, before,
      against: kept, title: described(current, kept ? "Now" : "Answer"), showTitle: Boolean(kept) }));
  }
  $("panes").replaceChildren(...panes);
  $("panes").classList.toggle("two", panes.length === 2);
  $("welcome").hidden = Boolean(current) || !model;
  versions.draw(current);
  if (onAnswer) focusAnswer();
  if (focus) document.querySelector(`.pane:last-child [data-do=${focus}]`)?.focus();
}

function keep(result) {
  kept = result;
  history.replaceState(null, "", link());
  render();
}

function described(result, word) {
  const alike = !result.asOf && (!kept || !current || kept.asOf === current.asOf);
  const which = alike ? [] : versions.words(result);
  const parts = [...(which.length ? which : [word]), `${result.k} passages`];
  if (result.settings.exclude.length) parts.push(`${result.settings.exclude.length} crossed out`);
  const edits = Object.keys(result.settings.replace).length;
  if (edits) parts.push(`${edits} edited`);
  return parts.join(" · ");
}

async function copyLink() {
  const url = new URL(link(), location.href).href;
  try {
    await navigator.clipboard.writeText(url);
    say("The link is copied.");
    $("copy").textContent = "Copied";
  } catch {
    told(`Copying is not allowed here; the link stands in the address bar.`);
  }
}

function setK(k) {
  slider.value = String(k);
  $("k-value").textContent = slider.value;
}

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = dark ? "Light" : "Dark";
  $("theme").setAttribute("aria-pressed", String(dark));
}

// ---- beginning

function listen() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = question.value.trim();
    if (!text) return;
    if (text !== settings.question) settings = fresh(text);
    run();
  });
  slider.addEventListener("input", () => { $("k-value").textContent = slider.value; });
  for (const control of [slider, $("explain"), ...form.elements.mode])
    control.addEventListener("change", () => { if (current) run(); });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("textarea, input[type=text], input[type=password]");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      question.focus();
      question.select();
    }
  });
  addEventListener("hashchange", followLink);
}

function show(examples) {
  const ask = (text, search) => {
    if (search) form.elements.mode.value = "search";
    question.value = text;
    form.requestSubmit();
  };
  $("examples").replaceChildren(...examples.questions.map((text) =>
    make("li", {}, make("button", { type: "button", class: "chip", dir: "auto",
      onclick: () => ask(text, false) }, text))));
  $("welcome-title").hidden = !examples.questions.length;
  $("corpus").replaceChildren(...examples.passages.map((one) =>
    make("li", {}, make("button", { type: "button", class: "sample",
      "aria-label": `Search for ${titled(one)}`, onclick: () => ask(titled(one), true) },
      make("strong", { dir: "auto" }, titled(one)), make("span", { dir: "auto" }, one.text)))));
  $("corpus-title").hidden = !examples.passages.length;
}

function describe() {
  const millions = Object.values(model.parameters).reduce((sum, n) => sum + n, 0) / 1e6;
  const words = [model.id, `${millions.toFixed(1)} M parameters`];
  if (model.index) words.push(`${model.index.passages.toLocaleString("en")} passages`);
  $("model").textContent = words.join(" · ");
  const most = Math.min(K_MOST, model.compiled_ks.at(-1));
  slider.max = String(most);
  setK(Math.min(5, most));
  $("explain").checked = model.explain;
  $("explain-setting").hidden = !model.explain;
  question.maxLength = model.max_characters;
}

async function begin() {
  const dark = localStorage.getItem("atlas-jax-theme");
  theme(dark === null ? matchMedia("(prefers-color-scheme: dark)").matches : dark === "1");
  $("theme").addEventListener("click", () => {
    const next = document.documentElement.dataset.theme !== "dark";
    localStorage.setItem("atlas-jax-theme", next ? "1" : "0");
    theme(next);
  });
  for (;;) {
    try {
      model = (await api.get("v1/models")).data[0];
      break;
    } catch (error) {
      if (error.status === 401) await keyGiven();
      else {
        $("model").textContent = error.status === 503 ? error.message : "waiting for the server";
        await new Promise((resolve) => { setTimeout(resolve, 1000); });
      }
    }
  }
  describe();
  listen();
  document.documentElement.dataset.ready = "1";
  await versions.begin({ compare, changed: () => { if (current) run(); }, drawn: render, failed });
  if (!followLink()) {
    render();
    question.focus();
  }
  show(await api.get("v1/examples"));
}

begin();
