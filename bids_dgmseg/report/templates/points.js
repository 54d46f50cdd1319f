// Points of plots: name them by the scan that they open; arrow keys move between them.
const scans = JSON.parse(document.getElementById("scan-marks").textContent);
for (const plot of document.querySelectorAll(".scroll.plot")) {
  const links = [...plot.querySelectorAll("svg a")];
  for (const link of links) {
    const label = scans[link.getAttribute("xlink:href")] ?? "";
    link.classList.add("point");
    link.setAttribute("tabindex", "-1");
    link.setAttribute("aria-label", label);
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = label;
    link.prepend(title);
  }
  plot.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !links.length) return;
    event.preventDefault();
    const place = links.indexOf(document.activeElement);
    links[place < 0 ? 0 : (place + step + links.length) % links.length].focus();
  });
}
