// Decide on scans by keyboard; names and notes are inserted as text, never as markup.
"use strict";
const data = JSON.parse(document.getElementById("review-data").textContent);
const byId = id => document.getElementById(id);
const [rater, picker, montage, state] = ["rater", "nucleus", "montage", "state"].map(byId);
const isServed = location.protocol === "http:";
const storeKey = `dgmseg-review ${data.folder} ${data.model}`;
let decisions = {}; // "scan nucleus" → decision, note and date of this rater
let current = 0, saveTimer = 0;
const recall = key => { try { return localStorage.getItem(key); } catch { return null; } };
const remember = (key, value) => { try { localStorage.setItem(key, value); } catch { /* private window */ } };
const keyOf = (scan, nucleus) => `${scan} ${nucleus}`;
const say = text => { state.textContent = text; };
const rows = () => Object.entries(decisions)
  .filter(([, one]) => one.decision || one.note)
  .map(([key, one]) => {
    const [scan, nucleus] = key.split(" ");
    return { scan, model: data.model, nucleus, decision: one.decision || "", note: one.note || "", rater: rater.value.trim(), date: one.date };
  });
const toText = () => {
  const columns = ["scan", "model", "nucleus", "decision", "note", "rater", "date"];
  const quote = text => text.includes('"') ? `"${text.replaceAll('"', '""')}"` : text;
  const clean = value => quote(String(value).replace(/\s+/g, " ").trim() || "n/a");
  return [columns, ...rows().map(row => columns.map(column => clean(row[column])))].map(row => row.join("\t")).join("\n") + "\n";
};
const save = async () => {
  remember(`${storeKey} ${rater.value.trim()}`, JSON.stringify(decisions));
  if (!isServed) { say("kept in this browser; download to use them"); return; }
  try {
    const answer = await fetch("decisions", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ rater: rater.value.trim(), rows: rows() }) });
    say(answer.ok ? "saved in qc_decisions.tsv" : `not saved: ${await answer.text()}`);
  } catch { say("not saved: dgmseg review has ended; download the file"); }
};
const change = (nucleus, update) => {
  if (!rater.value.trim()) { say("enter your name or initials first"); rater.focus(); return false; }
  const key = keyOf(data.scans[current].name, nucleus);
  decisions[key] = { ...decisions[key], ...update, date: new Date().toISOString().slice(0, 19) };
  if (!decisions[key].decision && !decisions[key].note) delete decisions[key];
  clearTimeout(saveTimer);
  saveTimer = setTimeout(save, 300);
  return true;
};
const tiles = [];
const draw = number => {
  const scan = data.scans[number], nucleus = picker.value, tile = tiles[number];
  const part = Math.floor(number / data.scansPerMontage);
  const own = decisions[keyOf(scan.name, nucleus)] || {}, whole = decisions[keyOf(scan.name, "all")] || {};
  tile.dataset.decision = whole.decision === "fail" ? "scan" : own.decision || "";
  const words = { pass: "pass", fail: "fail", scan: "scan failed" };
  const automatic = byId("show-ratings").checked ? scan.ratings[nucleus] : "";
  tile.querySelector(".tile-state").textContent = [words[tile.dataset.decision], automatic && `(${automatic})`, own.note || whole.note].filter(Boolean).join(" · ");
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
    const scan = data.scans[current].name, own = decisions[keyOf(scan, picker.value)] || {};
    const note = window.prompt(`Note on ${picker.value} of ${scan}`, own.note || "");
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
const load = async () => {
  decisions = JSON.parse(recall(`${storeKey} ${rater.value.trim()}`) || "{}");
  if (isServed && rater.value.trim()) {
    try {
      const answer = await fetch(`decisions?rater=${encodeURIComponent(rater.value.trim())}`);
      if (!answer.ok) say(`earlier decisions cannot be read: ${await answer.text()}`);
      else for (const row of await answer.json())
        decisions[keyOf(row.scan, row.nucleus)] = { decision: row.decision, note: row.note, date: row.date };
    } catch { say("dgmseg review has ended"); }
  }
  remember(`${storeKey} name`, rater.value);
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
  name.textContent = scan.name;
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
byId("download").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([toText()], { type: "text/tab-separated-values" }));
  link.download = "qc_decisions.tsv";
  link.click();
  URL.revokeObjectURL(link.href);
});
rater.value = recall(`${storeKey} name`) || "";
load().then(() => moveTo(0));
