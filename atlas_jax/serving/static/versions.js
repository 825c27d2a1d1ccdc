// The versions of the corpus: which one is asked, a list of them, two of them side by side.

import * as api from "./api.js";
import { make } from "./view.js";

const $ = (id) => document.getElementById(id);
const FEW = 6; // rows that are shown at first

let listed = []; // newest first
let told = null; // what the server said last
let page = null; // what the rest of the page does: compare(left, right), changed(), failed(error)
let shown = FEW;

// The version that is asked; "" = that of now.
export function chosen() {
  return $("version").value;
}

export function choose(asOf) {
  const select = $("version");
  if (![...select.options].some((one) => one.value === asOf))
    select.append(make("option", { value: asOf }, `as of ${asOf}`)); // from a link
  select.value = asOf;
}

// Words about the version of a result, for its title; none where there is only one version.
export function words(result) {
  if (listed.length < 2 || !result.index) return [];
  const number = result.index.passages_version;
  if (!result.asOf) return [`Now, version ${number}`];
  const one = listed.find((found) => found.version === number);
  return [`As of version ${number}${one && one.time ? `, ${when(one)}` : ""}`];
}

function when(one) {
  if (!one.time) return "as it was built";
  return new Date(one.time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

function changes(one) {
  const found = ["added", "replaced", "deleted"].filter((what) => one[what]);
  return found.map((what) => [what, `${one[what].toLocaleString("en")} ${what}`]);
}

function options() {
  const now = chosen();
  const number = told ? ` (version ${told.serving})` : "";
  $("version").replaceChildren(
    make("option", { value: "" }, `now${number}`),
    ...listed.filter((one) => one.version !== told.serving).map((one) => make("option", { value: String(one.version) },
      `version ${one.version} · ${when(one)}`)));
  choose(now);
}

function row(one, current) {
  const mine = current && current.index && current.index.passages_version === one.version;
  const isNewest = one.version === told.serving;
  const what = changes(one);
  const asked = current && !current.pending && told.earlier && !isNewest;
  return make("li", { class: mine ? "version shown" : "version", "data-version": one.version },
    make("span", { class: "number" }, make("span", { class: "hidden" }, "Version "),
      String(one.version)),
    make("span", { class: "when" }, when(one)),
    make("span", { class: "what" },
      ...what.map(([kind, text]) => make("span", { class: kind }, text)),
      make("span", { class: "total" }, `${one.passages.toLocaleString("en")} passages`)),
    asked ? make("button", { type: "button", class: "quiet small do", "data-do": "compare",
      "aria-label": `Ask as of version ${one.version}, beside the answer of now`,
      onclick: () => page.compare("", String(one.version)) }, "Compare with now")
      : make("span", { class: "do dim" }, isNewest ? "now" : ""));
}

// Draws the list for the result that is shown.
export function draw(current) {
  const section = $("versions");
  section.hidden = listed.length < 2;
  if (section.hidden) return;
  $("versions-note").textContent = !told.earlier
    ? "This server answers from one of them alone."
    : current ? "Ask the same question as of an earlier one, and see both answers."
      : "A question can be asked as of each of them.";
  const focus = document.activeElement?.closest?.(".version")?.dataset.version;
  $("versions-list").replaceChildren(...listed.slice(0, shown).map((one) => row(one, current)));
  if (focus) $("versions-list").querySelector(`[data-version="${focus}"] button`)?.focus();
  const last = listed[listed.length - 1].version;
  $("versions-more").hidden = shown >= listed.length && last <= told.oldest;
}

async function more() {
  if (shown >= listed.length) {
    try {
      const reply = await api.get(`v1/versions?before=${listed[listed.length - 1].version}`);
      listed = [...listed, ...reply.versions];
      options();
    } catch (error) {
      page.failed(error);
    }
  }
  shown = listed.length;
}

async function load() {
  told = await api.get("v1/versions");
  listed = told.versions;
  options();
  $("version-setting").hidden = listed.length < 2 || !told.earlier;
}

// An answer came: if it is of a version that is not listed, the list is old.
export async function seen(index) {
  if (!index || !told || index.passages_version <= told.serving) return;
  try {
    await load();
    page.drawn();
  } catch {
    // the list stays as it is
  }
}

export async function begin(given) {
  page = given;
  options();
  $("version").addEventListener("change", page.changed);
  $("versions-more").addEventListener("click", async () => { await more(); page.drawn(); });
  try {
    await load();
  } catch {
    // a closed book has none
  }
}
