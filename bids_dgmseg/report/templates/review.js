// Decide on scans by keyboard; names and notes are inserted as text, never as markup.
"use strict";
const data = JSON.parse(document.getElementById("review-data").textContent);
const byId = id => document.getElementById(id);
const [rater, picker, montage, state] = ["rater", "nucleus", "montage", "state"].map(byId);
const columns = ["scan", "model", "nucleus", "decision", "note", "rater", "date", "labels"];
const storeKey = () => `dgmseg-review ${data.results} ${rater.value.trim()}`; // other results, other decisions
let decisions = {}; // "scan nucleus" → decision, note, date and labels of this rater
let others = []; // rows of a file that the page does not show; they are saved unchanged
let isSaved = true, current = 0;
const recall = key => { try { return localStorage.getItem(key); } catch { return null; } };
const remember = (key, value) => { try { localStorage.setItem(key, value); return true; } catch { return false; } };
const keyOf = (scan, nucleus) => `${scan} ${nucleus}`;
const say = text => { state.textContent = text; };
const keep = () => remember(storeKey(), JSON.stringify({ decisions, others, isSaved }));
const changed = () => {
  isSaved = false;
  say(keep() ? "not saved yet; kept in this browser" : "not saved yet; this browser keeps nothing");
};
const rows = () => Object.entries(decisions).map(([key, entry]) => {
  const [scan, nucleus] = key.split(" ");
  return { scan, model: data.model, nucleus, rater: rater.value.trim(), ...entry };
});
const toText = () => {
  const quote = text => text.includes('"') ? `"${text.replaceAll('"', '""')}"` : text;
  const clean = value => quote(String(value ?? "").replace(/\s+/g, " ").trim() || "n/a");
  return [columns, ...[...others, ...rows()].map(row => columns.map(column => clean(row[column])))].map(row => row.join("\t")).join("\n") + "\n";
};
const fromText = text => {
  const cells = line => line.split("\t").map(cell => /^".*"$/.test(cell) ? cell.slice(1, -1).replaceAll('""', '"') : cell);
  const [header, ...lines] = text.replace(/^\uFEFF/, "").split(/\r?\n/).filter(Boolean).map(cells);
  if (!["scan", "nucleus", "decision"].every(column => header?.includes(column))) return null;
  const value = cell => cell === undefined || cell === "n/a" ? "" : cell;
  return lines.map(line => Object.fromEntries(columns.map(column => [column, value(line[header.indexOf(column)])])));
};
const change = (nucleus, update) => {
  if (!rater.value.trim()) { say("enter your name or initials first"); rater.focus(); return false; }
  const { name, labels } = data.scans[current], key = keyOf(name, nucleus);
  decisions[key] = { ...decisions[key], ...update, labels, date: new Date().toISOString().slice(0, 19) };
  if (!decisions[key].decision && !decisions[key].note) delete decisions[key];
  changed();
  return true;
};
const tiles = [];
const draw = number => {
  const scan = data.scans[number], nucleus = picker.value, tile = tiles[number];
  const part = Math.floor(number / data.scansPerMontage);
  const entry = decisions[keyOf(scan.name, nucleus)] || {}, whole = decisions[keyOf(scan.name, "all")] || {};
  tile.dataset.decision = whole.decision === "fail" ? "scan" : entry.decision || "";
  const words = { pass: "pass", fail: "fail", scan: "scan failed" };
  const automatic = byId("show-ratings").checked ? scan.ratings[nucleus] : "";
  tile.querySelector(".tile-state").textContent = [words[tile.dataset.decision], automatic && `(${automatic})`, entry.note || whole.note].filter(Boolean).join(" · ");
  tile.querySelector(".tile-image").hidden = !scan.shown[nucleus];
  tile.querySelector(".tile-none").hidden = scan.shown[nucleus];
  tile.querySelector(".tile-image").style.backgroundImage = `url("figures/review_${nucleus}${part ? `_${part + 1}` : ""}.png")`;
  tile.setAttribute("aria-selected", number === current);
  tile.setAttribute("aria-label", `${scan.name} ${nucleus} ${tile.querySelector(".tile-state").textContent || "no decision"}`);
};
const drawAll = () => {
  data.scans.forEach((_, number) => draw(number));
  const done = data.scans.filter(scan => decisions[keyOf(scan.name, picker.value)]?.decision || decisions[keyOf(scan.name, "all")]?.decision === "fail").length;
  byId("progress").textContent = `${picker.value}: ${done} of ${data.scans.length} scans decided`;
};
const moveTo = number => {
  current = Math.max(0, Math.min(data.scans.length - 1, number));
  drawAll();
  tiles[current].scrollIntoView({ block: "nearest" });
  montage.setAttribute("aria-activedescendant", tiles[current].id);
};
const decide = decision => { if (change(picker.value, { decision })) moveTo(decision ? current + 1 : current); };
const changeNucleus = step => {
  picker.selectedIndex = Math.max(0, Math.min(picker.options.length - 1, picker.selectedIndex + step));
  moveTo(0);
};
const perRow = () => {
  const top = tiles[0].offsetTop;
  const end = tiles.findIndex(tile => tile.offsetTop > top);
  return end < 0 ? tiles.length : end;
};
const keys = {
  ArrowRight: () => moveTo(current + 1), ArrowLeft: () => moveTo(current - 1),
  ArrowDown: () => moveTo(current + perRow()), ArrowUp: () => moveTo(current - perRow()),
  p: () => decide("pass"), f: () => decide("fail"), u: () => decide(""),
  w: () => { const key = keyOf(data.scans[current].name, "all"); if (change("all", { decision: decisions[key]?.decision ? "" : "fail" })) drawAll(); },
  n: () => {
    const scan = data.scans[current].name, entry = decisions[keyOf(scan, picker.value)] || {};
    const note = window.prompt(`Note on ${picker.value} of ${scan}`, entry.note || "");
    if (note !== null && change(picker.value, { note: note.slice(0, 500) })) drawAll();
  },
  "[": () => changeNucleus(-1), "]": () => changeNucleus(1),
  Enter: () => { if (data.scans[current].page) window.open(data.scans[current].page, "_blank", "noopener"); },
};
montage.addEventListener("keydown", event => {
  const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  action();
});
const load = () => { // what this browser keeps of the rater
  ({ decisions, others, isSaved } = JSON.parse(recall(storeKey())) || { decisions: {}, others: [], isSaved: true });
  remember("dgmseg-review rater", rater.value);
  say(isSaved ? "" : "not saved yet; kept in this browser");
  drawAll();
};
data.nuclei.forEach(name => picker.append(new Option(name, name)));
data.scans.forEach((scan, number) => {
  const tile = document.createElement("div"), image = document.createElement("div"), none = document.createElement("div"), name = document.createElement("div"), text = document.createElement("div");
  tile.className = "tile"; image.className = "tile-image"; none.className = "tile-none"; name.className = "tile-name"; text.className = "tile-state";
  tile.id = `tile-${number}`;
  tile.setAttribute("role", "option");
  const place = number % data.scansPerMontage;
  image.style.backgroundPosition = `-${(place % data.columns) * 2 * data.tile}px -${Math.floor(place / data.columns) * data.tile}px`;
  none.textContent = "no voxel";
  name.textContent = scan.problem ? `${scan.name}: out of date or edited (${scan.problem})` : scan.name;
  name.classList.toggle("flag", Boolean(scan.problem));
  tile.append(image, none, name, text);
  tile.addEventListener("click", () => { montage.focus(); moveTo(number); });
  tiles.push(tile);
  montage.append(tile);
});
picker.addEventListener("change", () => moveTo(0));
rater.addEventListener("change", load);
byId("show-ratings").addEventListener("change", drawAll);
byId("pass-others").addEventListener("click", () => {
  const before = current;
  data.scans.forEach((scan, number) => {
    current = number;
    if (scan.shown[picker.value] && !decisions[keyOf(scan.name, picker.value)]?.decision) change(picker.value, { decision: "pass" });
  });
  moveTo(before);
});
byId("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([toText()], { type: "text/tab-separated-values" }));
  link.download = "qc_decisions.tsv";
  link.click();
  URL.revokeObjectURL(link.href);
  isSaved = true;
  keep();
  say("saved as qc_decisions.tsv in the folder of downloads");
});
byId("read").addEventListener("change", async event => {
  const [file] = event.target.files;
  event.target.value = ""; // so that the same file can be read again
  const table = file && fromText(await file.text());
  if (!table) { if (file) say(`${file.name}: no columns scan, nucleus and decision; choose a qc_decisions.tsv`); return; }
  if (!isSaved && !window.confirm("Replace the decisions on this page, which are not saved?")) return;
  rater.value = rater.value.trim() || table.map(row => row.rater).find(Boolean) || "";
  const labels = new Map(data.scans.map(scan => [scan.name, scan.labels])), nuclei = new Set([...data.nuclei, "all"]);
  const isShown = row => row.rater === rater.value.trim() && row.model === data.model && labels.has(row.scan) && nuclei.has(row.nucleus) && ["", labels.get(row.scan)].includes(row.labels);
  others = table.filter(row => !isShown(row));
  decisions = Object.fromEntries(table.filter(isShown).map(({ scan, nucleus, decision, note, date, labels }) => [keyOf(scan, nucleus), { decision, note, date, labels }]));
  isSaved = true;
  keep();
  say(`${table.length - others.length} decision(s) read, ${others.length} of other raters, scans, models or labels kept`);
  drawAll();
});
window.addEventListener("beforeunload", event => { if (!isSaved) event.preventDefault(); });
rater.value = recall("dgmseg-review rater") || "";
load();
moveTo(0);
