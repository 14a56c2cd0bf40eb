"use strict";
/* Show the logged values under the pointer. The page is complete without this script. */
for (const figure of document.querySelectorAll("[data-chart]")) {
  const chart = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot");
  const tip = document.createElement("div");
  const rule = document.createElement("div");
  tip.className = "tip";
  rule.className = "rule";
  plot.append(rule, tip);
  const text = (value) => chart.percent ? (100 * value).toPrecision(4) + " %" : String(Number(value.toPrecision(5)));
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const at = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const epoch = chart.x[0] + at * (chart.x[1] - chart.x[0]);
    tip.replaceChildren();
    for (const line of chart.lines) {
      const step = epoch * line.per;
      let low = 0, high = line.steps.length - 1;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (line.steps[middle] < step) low = middle + 1; else high = middle;
      }
      if (low > 0 && step - line.steps[low - 1] < line.steps[low] - step) low -= 1;
      const row = document.createElement("div");
      row.className = "c" + line.colour;
      row.textContent = `${line.name} ${text(line.values[low])} · step ${line.steps[low]}`;
      tip.append(row);
    }
    rule.style.left = 100 * at + "%";
    tip.style.left = at < 0.5 ? `calc(${100 * at}% + 8px)` : "auto";
    tip.style.right = at < 0.5 ? "auto" : `calc(${100 * (1 - at)}% + 8px)`;
    plot.classList.add("pointed");
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => plot.classList.remove("pointed"));
}
