// Move between the visible points of a plot with the arrow keys; Enter follows the link of the focused one.
for (const plot of document.querySelectorAll(".scroll.plot")) {
  plot.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const points = [...plot.querySelectorAll(".points a")].filter(point => point.getClientRects().length);
    if (!step || !points.length) return;
    event.preventDefault();
    const place = points.indexOf(document.activeElement);
    points[place < 0 ? 0 : (place + step + points.length) % points.length].focus();
  });
}
