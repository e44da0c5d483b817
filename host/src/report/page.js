"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const state = { x: "step", smoothing: 0, log: false, hidden: new Set() };
  const charts = [];
  const SVG = "http://www.w3.org/2000/svg";
  const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
  const MARGIN = { left: 58, right: 12, top: 10, bottom: 34 };

  const colorOf = (run) => `hsl(${Math.round((212 + run * 137.508) % 360)} 68% var(--lightness))`;
  const dashOf = (run) => DASHES[Math.floor(run / 8) % DASHES.length];

  function node(name, attributes = {}, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function html(name, className, text) {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function swatch(run) {
    const svg = node("svg", { class: "swatch", viewBox: "0 0 27 11", "aria-hidden": "true" });
    svg.append(node("line", { x1: 0, x2: 27, y1: 6, y2: 6, style: `stroke:${colorOf(run)}`, "stroke-dasharray": dashOf(run) }));
    return svg;
  }

  // Numbers for people: about five digits.
  function show(value) {
    if (!Number.isFinite(value)) return String(value);
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(3);
    return String(Number(value.toPrecision(6)));
  }

  const UNITS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  function showTick(value, step) {
    const size = Math.abs(value);
    if (size !== 0 && size < 1e-3) return value.toExponential(Math.abs(step / value) < 0.1 ? 1 : 0);
    for (const [unit, name] of UNITS) {
      if (size >= unit * (unit === 1e3 ? 10 : 1)) return Number((value / unit).toPrecision(5)) + name;
    }
    return String(Number(value.toPrecision(6)));
  }

  function linearTicks(low, high, count) {
    const rough = (high - low) / Math.max(count, 1);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough) ?? power * 10;
    const ticks = [];
    for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) ticks.push(n * step);
    return { ticks, step };
  }

  function logTicks(low, high, count) {
    if (high < 10 * low) return linearTicks(low, high, count);
    const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    const factors = last - first <= 2 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.ceil((last - first) / Math.max(count, 1)));
    const ticks = [];
    for (let power = first; power <= last; power += every) {
      for (const factor of factors) {
        const tick = factor * 10 ** power;
        if (tick >= low && tick <= high) ticks.push(tick);
      }
    }
    return { ticks, step: 0 };
  }

  // Time or tokens at a step, between two places where they are known.
  function along(knots, values, step) {
    const steps = knots.s;
    let [low, high] = [0, steps.length - 1];
    if (high < 0) return NaN;
    if (step >= steps[high]) return values[high];
    if (step <= steps[0]) return values[0];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    const share = (step - steps[low]) / (steps[high] - steps[low] || 1);
    return values[low] + share * (values[high] - values[low]);
  }

  const AXES = {
    step: { title: "step", of: (knots, step) => step },
    tokens: { title: "tokens", of: (knots, step) => (knots.k ? along(knots, knots.k, step) : NaN) },
    time: { title: "time since the first row", of: (knots, step) => along(knots, knots.t, step) },
  };

  function timeUnit(seconds) {
    if (seconds > 2 * 86400) return [86400, "days"];
    if (seconds > 2 * 3600) return [3600, "hours"];
    if (seconds > 2 * 60) return [60, "minutes"];
    return [1, "seconds"];
  }

  // Exponential mean over the drawn points, without the pull towards its beginning.
  function smooth(values, weight) {
    let [mean, sum] = [0, 0];
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      sum = weight * sum + (1 - weight);
      return mean / sum;
    });
  }

  class Chart {
    constructor(metric) {
      this.metric = metric;
      this.zoom = null;
      this.wide = false;
      this.cursor = null;
      this.figure = html("figure");
      const caption = html("figcaption");
      caption.append(html("span", "name", metric.name));
      const enlarge = html("button", "", "larger");
      enlarge.type = "button";
      enlarge.addEventListener("click", () => {
        this.wide = !this.wide;
        this.figure.classList.toggle("wide", this.wide);
        enlarge.textContent = this.wide ? "smaller" : "larger";
        this.draw();
      });
      caption.append(enlarge);
      this.plot = html("div", "plot");
      this.svg = node("svg", { role: "img", tabindex: "0" });
      this.plot.append(this.svg);
      this.tip = html("div", "tip");
      this.tip.hidden = true;
      this.tip.setAttribute("role", "status");
      this.figure.append(caption, this.plot, this.tip);
      this.svg.addEventListener("pointermove", (event) => this.move(event));
      this.svg.addEventListener("pointerdown", (event) => this.press(event));
      this.svg.addEventListener("pointerup", (event) => this.release(event));
      this.svg.addEventListener("pointerleave", () => { this.cursor = null; this.point(); });
      this.svg.addEventListener("dblclick", () => { this.zoom = null; this.draw(); });
      this.svg.addEventListener("keydown", (event) => this.key(event));
      this.svg.addEventListener("blur", () => { this.cursor = null; this.point(); });
    }

    get visible() { return this.figure.isConnected && this.figure.offsetParent !== null && this.near; }

    // Positions and values of the runs that are shown.
    lines() {
      const axis = AXES[state.x];
      return this.metric.curves.filter((curve) => !state.hidden.has(curve.r)).map((curve) => {
        const knots = data.runs[curve.r].knots;
        const usable = (value) => value !== null && !(state.log && value <= 0);
        const raw = curve.v.map((value) => (usable(value) ? value : null));
        const values = state.smoothing > 0 ? smooth(raw, state.smoothing) : raw;
        const bounds = curve.l && { lows: curve.l.map((v) => (usable(v) ? v : null)), highs: curve.h };
        return { run: curve.r, xs: curve.s.map((step) => axis.of(knots, step)), raw, values, bounds };
      }).filter((line) => line.xs.some(Number.isFinite));
    }

    draw() {
      this.dirty = true;
      if (!this.visible) return;
      this.dirty = false;
      const [width, height] = [this.plot.clientWidth || 400, this.plot.clientHeight || 240];
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.svg.replaceChildren();
      const lines = this.lines();
      this.drawn = null;
      const all = lines.flatMap((line) => line.xs.filter(Number.isFinite));
      let [x0, x1] = this.zoom ?? [reduce(all, Math.min), reduce(all, Math.max)];
      const inside = (x) => x >= x0 && x <= x1;
      const heights = (line) => [line.values, ...(line.bounds && lines.length === 1 ? [line.bounds.lows, line.bounds.highs] : [])];
      const ys = lines.flatMap((line) => heights(line).flatMap((values) => values.filter((value, i) => value !== null && inside(line.xs[i]))));
      this.describe(lines);
      if (ys.length === 0) {
        this.svg.append(node("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to draw"));
        return;
      }
      let [y0, y1] = [reduce(ys, Math.min), reduce(ys, Math.max)];
      if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
      const logarithmic = state.log && y0 > 0;
      if (logarithmic) {
        if (y0 === y1) [y0, y1] = [y0 / 1.1, y1 * 1.1];
      } else {
        const space = y0 === y1 ? Math.abs(y0) * 0.1 || 1 : (y1 - y0) * 0.05;
        [y0, y1] = [y0 - space, y1 + space];
      }
      const [w, h] = [width - MARGIN.left - MARGIN.right, height - MARGIN.top - MARGIN.bottom];
      const toX = (x) => MARGIN.left + ((x - x0) / (x1 - x0)) * w;
      const scale = logarithmic ? Math.log : (y) => y;
      const toY = (y) => MARGIN.top + (1 - (scale(y) - scale(y0)) / (scale(y1) - scale(y0))) * h;

      const [unit, unitName] = state.x === "time" ? timeUnit(x1) : [1, ""];
      const horizontal = linearTicks(x0 / unit, x1 / unit, Math.max(2, w / 70));
      for (const tick of horizontal.ticks) {
        const x = toX(tick * unit);
        this.svg.append(node("line", { class: "rule", x1: x, x2: x, y1: MARGIN.top, y2: MARGIN.top + h }));
        this.svg.append(node("text", { x, y: MARGIN.top + h + 14, "text-anchor": "middle" }, showTick(tick, horizontal.step)));
      }
      const vertical = (logarithmic ? logTicks : linearTicks)(y0, y1, Math.max(2, h / 32));
      for (const tick of vertical.ticks) {
        const y = toY(tick);
        this.svg.append(node("line", { class: "rule", x1: MARGIN.left, x2: MARGIN.left + w, y1: y, y2: y }));
        this.svg.append(node("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, showTick(tick, vertical.step)));
      }
      const title = AXES[state.x].title + (unitName ? `, ${unitName}` : "");
      this.svg.append(node("text", { x: MARGIN.left + w, y: height - 4, "text-anchor": "end" }, title));

      const clip = `clip${charts.indexOf(this)}`;
      const clipPath = node("clipPath", { id: clip });
      clipPath.append(node("rect", { x: MARGIN.left, y: MARGIN.top - 3, width: w, height: h + 6 }));
      const group = node("g", { "clip-path": `url(#${clip})` });
      this.svg.append(clipPath, group);
      for (const line of lines.filter((line) => line.bounds)) this.range(group, line, toX, toY);
      for (const line of lines) {
        const style = `stroke:${colorOf(line.run)}`;
        const dash = dashOf(line.run);
        if (state.smoothing > 0) this.path(group, line.xs, line.raw, toX, toY, { class: "curve raw", style });
        this.path(group, line.xs, line.values, toX, toY, { class: "curve", style, "stroke-dasharray": dash, "data-run": line.run });
      }
      this.band = node("rect", { class: "band", y: MARGIN.top, height: h, visibility: "hidden" });
      this.mark = node("line", { class: "cursor", y1: MARGIN.top, y2: MARGIN.top + h, visibility: "hidden" });
      this.dots = node("g");
      this.svg.append(this.band, this.mark, this.dots);
      this.drawn = { lines, x0, x1, w, toX, toY, unit, unitName };
      this.point();
    }

    // A line with gaps; a point that has no neighbor is a dot.
    path(group, xs, values, toX, toY, attributes) {
      let [text, length] = ["", 0];
      const lone = [];
      const close = (i) => { if (length === 1) lone.push(i); length = 0; };
      values.forEach((value, i) => {
        if (value === null || !Number.isFinite(xs[i])) return close(i - 1);
        text += `${length === 0 ? "M" : "L"}${toX(xs[i]).toFixed(1)} ${toY(value).toFixed(1)}`;
        length += 1;
      });
      close(values.length - 1);
      group.append(node("path", { ...attributes, d: text }));
      for (const i of lone) {
        group.append(node("circle", { cx: toX(xs[i]), cy: toY(values[i]), r: 2.5, style: attributes.style.replace("stroke", "fill") }));
      }
    }

    // Between the lowest and the highest values of each part of a long curve.
    range(group, line, toX, toY) {
      const { lows, highs } = line.bounds;
      const place = (i, values) => `${toX(line.xs[i]).toFixed(1)} ${toY(values[i]).toFixed(1)}`;
      let part = [];
      const close = () => {
        if (part.length > 1) {
          const back = [...part].reverse();
          const d = `M${part.map((i) => place(i, highs)).join("L")}L${back.map((i) => place(i, lows)).join("L")}Z`;
          group.append(node("path", { class: "range", d, style: `fill:${colorOf(line.run)}` }));
        }
        part = [];
      };
      line.xs.forEach((x, i) => { if (lows[i] === null || !Number.isFinite(x)) close(); else part.push(i); });
      close();
    }

    describe(lines) {
      const ends = lines.slice(0, 5).map((line) => {
        const last = line.values.findLast((value) => value !== null);
        return `${data.runs[line.run].name} ends at ${last === undefined ? "no number" : show(last)}`;
      });
      const more = lines.length > 5 ? `, and ${lines.length - 5} more runs` : "";
      this.svg.setAttribute("aria-label", `${this.metric.name}: ${ends.join(", ")}${more}`);
    }

    at(event) {
      const box = this.svg.getBoundingClientRect();
      const { x0, x1, w } = this.drawn;
      const share = (event.clientX - box.left - MARGIN.left) / w;
      return x0 + Math.min(1, Math.max(0, share)) * (x1 - x0);
    }

    move(event) {
      if (!this.drawn) return;
      this.cursor = this.at(event);
      this.point();
    }

    press(event) {
      if (!this.drawn || event.button !== 0) return;
      this.pressed = this.at(event);
      this.svg.setPointerCapture(event.pointerId);
    }

    release(event) {
      if (!this.drawn || this.pressed === undefined) return;
      const ends = [this.pressed, this.at(event)].sort((a, b) => a - b);
      this.pressed = undefined;
      const isDrag = this.drawn.toX(ends[1]) - this.drawn.toX(ends[0]) > 6;
      if (isDrag) this.zoom = ends;
      if (isDrag) this.draw(); else this.point();
    }

    key(event) {
      if (!this.drawn) return;
      const { x0, x1 } = this.drawn;
      const middle = this.cursor ?? (x0 + x1) / 2;
      const span = x1 - x0;
      const zoomed = (factor) => { this.zoom = [middle - (middle - x0) * factor, middle + (x1 - middle) * factor]; this.draw(); };
      const actions = {
        ArrowLeft: () => { this.cursor = Math.max(x0, middle - span / 50); this.point(); },
        ArrowRight: () => { this.cursor = Math.min(x1, middle + span / 50); this.point(); },
        "+": () => zoomed(0.5),
        "-": () => zoomed(2),
        Escape: () => { this.zoom = null; this.cursor = null; this.draw(); },
      };
      if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
    }

    // The values of all runs at the cursor.
    point() {
      if (!this.drawn) return;
      const { lines, x0, x1, toX, toY, unit, unitName, w } = this.drawn;
      this.dots.replaceChildren();
      const isShown = this.cursor !== null;
      this.tip.hidden = !isShown;
      this.mark.setAttribute("visibility", isShown ? "visible" : "hidden");
      const isDragging = isShown && this.pressed !== undefined;
      this.band.setAttribute("visibility", isDragging ? "visible" : "hidden");
      if (!isShown) return;
      const x = toX(this.cursor);
      this.mark.setAttribute("x1", x);
      this.mark.setAttribute("x2", x);
      if (isDragging) {
        const from = toX(this.pressed);
        this.band.setAttribute("x", Math.min(x, from));
        this.band.setAttribute("width", Math.abs(x - from));
      }
      // A run that ended before has no value here.
      const isHere = ({ line, i }) => i >= 0 && Math.abs(line.xs[i] - this.cursor) <= (x1 - x0) / (line.xs.length > 50 ? 50 : 2);
      const found = lines.map((line) => ({ line, i: nearest(line, this.cursor) })).filter(isHere);
      found.sort((a, b) => b.line.values[b.i] - a.line.values[a.i]);
      const rows = found.map(({ line, i }) => {
        this.dots.append(node("circle", { cx: toX(line.xs[i]), cy: toY(line.values[i]), r: 3.5, style: `fill:${colorOf(line.run)}` }));
        const row = html("div");
        const bounds = line.bounds ? ` (${show(line.bounds.lows[i])} … ${show(line.bounds.highs[i])})` : "";
        row.append(swatch(line.run), `${show(line.values[i])}${bounds}  ${data.runs[line.run].name}`);
        return row;
      });
      const position = state.x === "time" ? `${show(this.cursor / unit)} ${unitName}` : `${AXES[state.x].title} ${show(Math.round(this.cursor))}`;
      this.tip.replaceChildren(html("div", "quiet", position), ...rows.slice(0, 20));
      const box = this.plot.offsetLeft;
      if (x > MARGIN.left + w / 2) {
        this.tip.style.left = "auto";
        this.tip.style.right = `${this.figure.clientWidth - box - x + 12}px`;
      } else {
        this.tip.style.right = "auto";
        this.tip.style.left = `${box + x + 12}px`;
      }
      this.tip.style.top = `${this.plot.offsetTop + 14}px`;
    }
  }

  function reduce(values, pick) {
    let result = values[0] ?? 0;
    for (const value of values) result = pick(result, value);
    return result;
  }

  function nearest(line, x) {
    let [best, distance] = [-1, Infinity];
    line.xs.forEach((other, i) => {
      const away = Math.abs(other - x);
      if (line.values[i] !== null && away < distance) [best, distance] = [i, away];
    });
    return best;
  }

  const redraw = () => charts.forEach((chart) => chart.draw());
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const chart = charts[Number(entry.target.dataset.chart)];
      chart.near = entry.isIntersecting;
      if (chart.near && chart.dirty) chart.draw();
    }
  }, { rootMargin: "400px" });
  const resizer = new ResizeObserver((entries) => {
    for (const entry of entries) charts[Number(entry.target.dataset.chart)].draw();
  });

  function build() {
    const groups = new Map();
    for (const metric of data.metrics) {
      const group = metric.name.includes("/") ? metric.name.split("/")[0] : "other";
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(metric);
    }
    const place = document.getElementById("groups");
    const first = ["validation", "train"];
    const rank = (name) => (first.includes(name) ? first.indexOf(name) : first.length);
    const names = [...groups.keys()].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
    for (const name of names) {
      const details = html("details");
      details.open = first.includes(name) || groups.get(name).length <= 12;
      const summary = html("summary");
      summary.append(html("h3", "", name), html("span", "quiet count"));
      const grid = html("div", "grid");
      for (const metric of groups.get(name)) {
        const chart = new Chart(metric);
        chart.figure.dataset.chart = chart.plot.dataset.chart = charts.length;
        chart.dirty = true;
        charts.push(chart);
        grid.append(chart.figure);
        watcher.observe(chart.figure);
        resizer.observe(chart.plot);
      }
      details.append(summary, grid);
      place.append(details);
    }
    search("");
  }

  function search(query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    for (const chart of charts) {
      const name = chart.metric.name.toLowerCase();
      const isFound = words.every((word) => name.includes(word));
      chart.figure.hidden = !isFound;
      n += isFound;
    }
    for (const details of document.querySelectorAll("#groups > details")) {
      const shown = details.querySelectorAll("figure:not([hidden])").length;
      details.hidden = shown === 0;
      if (words.length > 0 && shown > 0 && shown <= 60) details.open = true;
      details.querySelector(".count").textContent = ` ${shown}`;
    }
    document.getElementById("found").textContent = `${n} of ${charts.length} metrics`;
  }

  function tools() {
    const by = (id) => document.getElementById(id);
    by("search").addEventListener("input", (event) => search(event.target.value));
    by("x").addEventListener("change", (event) => {
      state.x = event.target.value;
      charts.forEach((chart) => { chart.zoom = null; });
      redraw();
    });
    if (!data.runs.some((run) => run.knots.k)) by("x").querySelector("[value=tokens]").disabled = true;
    by("log").addEventListener("change", (event) => { state.log = event.target.checked; redraw(); });
    by("smoothing").addEventListener("input", (event) => {
      state.smoothing = Number(event.target.value);
      by("smoothed").textContent = state.smoothing.toFixed(2);
      redraw();
    });
    const legend = by("legend");
    const boxes = data.runs.map((run, index) => {
      const label = html("label");
      const box = html("input");
      box.type = "checkbox";
      box.checked = true;
      box.addEventListener("change", () => {
        if (box.checked) state.hidden.delete(index); else state.hidden.add(index);
        redraw();
      });
      label.append(box, " ", swatch(index), run.name);
      legend.append(label);
      return box;
    });
    if (boxes.length > 1) {
      for (const [text, value] of [["all", true], ["none", false]]) {
        const button = html("button", "", text);
        button.type = "button";
        button.addEventListener("click", () => {
          boxes.forEach((box, index) => {
            box.checked = value;
            if (value) state.hidden.delete(index); else state.hidden.add(index);
          });
          redraw();
        });
        legend.append(button);
      }
    }
    // The browser may keep what was chosen before a reload.
    for (const id of ["search", "x", "log", "smoothing"]) by(id).dispatchEvent(new Event(id === "search" || id === "smoothing" ? "input" : "change"));
  }

  for (const time of document.querySelectorAll("time[data-seconds]")) {
    time.textContent = new Date(Number(time.dataset.seconds) * 1000).toLocaleString();
  }
  for (const place of document.querySelectorAll("[data-run]")) place.prepend(swatch(Number(place.dataset.run)));
  build();
  tools();
})();
