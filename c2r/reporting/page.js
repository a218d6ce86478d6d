"use strict";
// Values under the pointer.
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const { x: [low, high], box: [left, right, top, bottom], lines } = JSON.parse(svg.dataset.chart);
  const steps = [...new Set(lines.flatMap(line => line.points.map(point => point[0])))].sort((a, b) => a - b);
  const values = lines.map(line => new Map(line.points));
  const pointer = document.createElementNS("http://www.w3.org/2000/svg", "line");
  pointer.setAttribute("class", "pointer");
  pointer.setAttribute("y1", top);
  pointer.setAttribute("y2", bottom);
  const box = document.createElement("div");
  box.className = "values";
  const text = value => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  svg.addEventListener("pointermove", event => {
    const area = svg.getBoundingClientRect();
    const place = (event.clientX - area.left) / area.width * svg.viewBox.baseVal.width;
    const wanted = low + (place - left) / (right - left) * (high - low);
    const step = steps.reduce((best, one) => Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best);
    const x = left + (step - low) / (high - low) * (right - left);
    pointer.setAttribute("x1", x);
    pointer.setAttribute("x2", x);
    box.replaceChildren(Object.assign(document.createElement("b"), { textContent: "step " + step.toLocaleString("en") }));
    lines.forEach((line, i) => {
      if (!values[i].has(step)) return;
      const row = document.createElement("div");
      row.className = "key";
      row.style.setProperty("--c", line.color);
      row.textContent = line.label + "  " + text(values[i].get(step));
      box.append(row);
    });
    if (!pointer.isConnected) { svg.append(pointer); svg.parentNode.append(box); }
    const shift = x / svg.viewBox.baseVal.width * area.width;
    box.style.top = area.top - svg.parentNode.getBoundingClientRect().top + 4 + "px";
    box.style.left = (shift > area.width / 2 ? shift - box.offsetWidth - 10 : shift + 10) + "px";
  });
  svg.addEventListener("pointerleave", () => { pointer.remove(); box.remove(); });
}
// One step of the samples at a time; what is seen plays, and a click stops it.
const bar = document.querySelector(".steps");
if (bar) {
  const buttons = [...bar.querySelectorAll("[data-step]")], button = bar.querySelector(".play");
  const videos = [...document.querySelectorAll(".sample video")], seen = new Set();
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const update = () => {
    button.textContent = playing ? "Pause" : "Play";
    for (const video of videos) {
      if (playing && seen.has(video)) video.play().catch(() => {}); else video.pause();
    }
  };
  const watcher = new IntersectionObserver(entries => {
    for (const entry of entries) seen[entry.isIntersecting ? "add" : "delete"](entry.target);
    update();
  });
  for (const video of videos) {
    video.controls = false;
    video.onclick = () => { playing = !playing; update(); };
    watcher.observe(video);
  }
  const show = step => {
    for (const figure of document.querySelectorAll(".sample")) figure.hidden = figure.dataset.step !== step;
    for (const one of buttons) one.setAttribute("aria-pressed", one.dataset.step === step);
    for (const video of videos) video.currentTime = 0;
  };
  for (const one of buttons) one.onclick = () => show(one.dataset.step);
  button.onclick = () => { playing = !playing; update(); };
  bar.hidden = false;
  show(buttons[buttons.length - 1].dataset.step);
  update();
}
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = !navigator.clipboard;
  button.onclick = async () => {
    await navigator.clipboard.writeText(button.parentNode.querySelector("pre").textContent);
    button.textContent = "Copied";
  };
}
