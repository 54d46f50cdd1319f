// Points of plots: name and filter them by the scan that they open; arrow keys move between the visible ones.
const scans = JSON.parse(document.getElementById("scan-marks").textContent);
for (const plot of document.querySelectorAll(".scroll.plot")) {
  const links = [...plot.querySelectorAll("svg a")];
  for (const link of links) {
    const [label, classes] = scans[link.getAttribute("xlink:href")] ?? ["", ""];
    link.classList.add("point", ...classes.split(" ").filter(Boolean));
    link.setAttribute("tabindex", "-1");
    link.setAttribute("aria-label", label);
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = label;
    link.prepend(title);
  }
  plot.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const points = links.filter(point => point.getClientRects().length);
    if (!step || !points.length) return;
    event.preventDefault();
    const place = points.indexOf(document.activeElement);
    points[place < 0 ? 0 : (place + step + points.length) % points.length].focus();
  });
}
