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
    box.style.top = svg.offsetTop + 4 + "px";
    box.style.left = (shift > area.width / 2 ? shift - box.offsetWidth - 10 : shift + 10) + "px";
  });
  svg.addEventListener("pointerleave", () => { pointer.remove(); box.remove(); });
}
// One step of the samples at a time.
const bar = document.querySelector(".steps");
if (bar) {
  const buttons = [...bar.querySelectorAll("[data-step]")], play = bar.querySelector(".play");
  const shown = () => [...document.querySelectorAll(".sample:not([hidden]) video")];
  const show = step => {
    for (const figure of document.querySelectorAll(".sample")) {
      figure.hidden = figure.dataset.step !== step;
      if (figure.hidden) figure.querySelector("video").pause();
    }
    for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.step === step);
    if (play.textContent === "Pause") start();
  };
  const start = () => { for (const video of shown()) { video.currentTime = 0; video.play(); } };
  for (const button of buttons) button.onclick = () => show(button.dataset.step);
  play.onclick = () => {
    const playing = play.textContent === "Pause";
    play.textContent = playing ? "Play" : "Pause";
    if (playing) shown().forEach(video => video.pause()); else start();
  };
  bar.hidden = false;
  show(buttons[buttons.length - 1].dataset.step);
}
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = !navigator.clipboard;
  button.onclick = async () => {
    await navigator.clipboard.writeText(button.parentNode.querySelector("pre").textContent);
    button.textContent = "Copied";
  };
}
