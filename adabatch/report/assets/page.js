"use strict";
(() => {
  const data = JSON.parse(document.getElementById("numbers").textContent);
  const runs = data.runs;
  const many = runs.length > 1;
  const hidden = new Set();
  const AXES = data.axes;
  const REASONS = data.reason_colors;
  const MOST_COLUMNS = 5;
  let axis = "examples";

  // --- small helpers ---

  const color = (index) => `var(--run${index % 7})`;
  const SVG = "http://www.w3.org/2000/svg";

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child != null));
    return made;
  }

  function shape(tag, attributes, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text != null) made.textContent = text;
    return made;
  }

  function short(value, like = value) {
    if (value == null || !isFinite(value)) return "–";
    const size = Math.abs(like);
    if (value === 0) return "0";
    for (const [unit, least, name] of [[1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e3, 1e4, "k"]])
      if (size >= least) return `${parseFloat((value / unit).toPrecision(4))} ${name}`;
    if (size < 1e-3) return value.toExponential(1).replace(".0e", "e");
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(parseFloat(value.toPrecision(4)));
  }

  const whole = (value) => (value == null ? "–" : Math.round(value).toLocaleString("en"));
  const precise = (value) => (value == null ? "–" : Math.abs(value) >= 1000 ? whole(value) : String(parseFloat(value.toPrecision(4))));
  const percent = (value) => (value == null ? "–" : `${(100 * value).toFixed(value < 0.1 && value > 0 ? 1 : 0)} %`);
  const duration = (value) =>
    value == null ? "–" : value < 120 ? `${value.toFixed(1)} s` : value < 7200 ? `${(value / 60).toFixed(1)} min` : `${(value / 3600).toFixed(1)} h`;

  // --- scales ---

  function ticks(low, high, count) {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
    return found;
  }

  function logTicks(low, high, base, count) {
    const first = Math.floor(Math.log(low) / Math.log(base)), last = Math.ceil(Math.log(high) / Math.log(base));
    const every = Math.max(1, Math.ceil((last - first) / count));
    const subs = base === 10 && last - first <= 2 ? [1, 2, 5] : [1];
    const found = [];
    for (let power = first; power <= last; power += every)
      for (const sub of subs) {
        const value = sub * base ** power;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    return found.length > 1 ? found : [low, high];
  }

  // --- a chart: lines, steps, bands and dots over one axis ---

  function chart(spec) {
    const box = element("section", { class: `chart${spec.wide ? " wide" : ""}`, "data-chart": spec.id });
    box.append(element("h3", {}, spec.title), element("p", { class: "note" }, spec.note || ""));
    const key = element("div", { class: "key" });
    for (const [label, style, square] of spec.key || [])
      key.append(element("span", {}, element("i", { class: square ? "square" : "swatch", style }), label));
    const plot = element("div", { style: "position:relative" });
    box.append(key, plot);
    box.draw = () => draw(plot, spec);
    return box;
  }

  function shown(spec) {
    return spec.series().filter((series) => series.run == null || !hidden.has(series.run));
  }

  function draw(plot, spec) {
    plot.textContent = "";
    const series = shown(spec);
    const width = Math.max(260, plot.clientWidth || 640);
    const strips = spec.strips ? runs.map((run, index) => index).filter((index) => !hidden.has(index)) : [];
    const left = 54, right = 10, top = 8, height = spec.height || 240, foot = 34 + strips.length * 13;
    const svg = shape("svg", { viewBox: `0 0 ${width} ${height + foot}`, height: height + foot, role: "img", "aria-label": spec.title });
    const xs = series.flatMap((each) => each.x).filter((value) => value != null);
    const ends = runs.filter((_, index) => !hidden.has(index)).map((run) => run.end[axis] || 0);
    const x1 = Math.max(...ends, ...(xs.length ? [xs.reduce((a, b) => Math.max(a, b), 0)] : []), 1e-12);
    const toX = (value) => left + (value / x1) * (width - left - right);
    const usable = (value) => value != null && isFinite(value) && (!spec.log || value > 0);
    // Bands and single estimates have no bound, and would squeeze what is looked at; they are cut off at the edge.
    const steers = series.filter((each) => !each.loose).flatMap((each) => each.y).filter(usable);
    const ranged = steers.sort((a, b) => a - b);
    if (!ranged.length) {
      svg.append(shape("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, spec.empty || "not measured"));
      plot.append(svg);
      return;
    }
    let low = ranged[Math.floor((spec.trim || 0) * (ranged.length - 1))];
    let high = ranged[Math.ceil((1 - (spec.trim || 0)) * (ranged.length - 1))];
    if (spec.log) {
      const margin = Math.max((high / low) ** 0.08, 1.25);
      low /= margin;
      high *= spec.headroom || margin;
    } else {
      if (spec.start != null) low = Math.min(spec.start, low);
      const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
      high += margin;
      low -= low === 0 || (spec.start != null && low === spec.start) ? 0 : margin;
    }
    const inner = height - top;
    const scaled = spec.log ? (value) => Math.log(value / low) / Math.log(high / low) : (value) => (value - low) / (high - low);
    // What lies far outside is cut off by the clip path; SVG need not be given huge numbers.
    const toY = (value) => top + inner * (1 - Math.min(4, Math.max(-4, scaled(value))));
    const yTicks = spec.log ? logTicks(low, high, spec.log, 6) : ticks(low, high, 5);
    for (const value of yTicks) {
      const y = toY(value);
      svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }));
      svg.append(shape("text", { x: left - 7, y: y + 4, "text-anchor": "end" }, spec.percent ? `${Math.round(100 * value)} %` : short(value)));
    }
    svg.append(shape("line", { class: "axis", x1: left, x2: width - right, y1: height, y2: height }));
    const baseline = height + strips.length * 13;
    for (const value of ticks(0, x1, Math.max(2, Math.floor(width / 110)))) {
      svg.append(shape("line", { class: "axis", x1: toX(value), x2: toX(value), y1: baseline, y2: baseline + 4 }));
      svg.append(shape("text", { x: toX(value), y: baseline + 17, "text-anchor": value > x1 * 0.97 ? "end" : "middle" }, short(value, x1)));
    }
    svg.append(shape("text", { x: width - right, y: baseline + 31, "text-anchor": "end" }, AXES[axis]));
    const clip = `clip-${spec.id}`;
    const inside = shape("clipPath", { id: clip });
    inside.append(shape("rect", { x: left - 1, y: top - 1, width: width - left - right + 2, height: inner + 2 }));
    const curves = shape("g", { "clip-path": `url(#${clip})` });
    for (const each of series) curves.append(...marks(each, { toX, toY, usable, top, height, end: x1 }));
    svg.append(inside, curves);
    strips.forEach((index, row) => stripe(svg, runs[index], index, { toX, y: height + 4 + row * 13, left }));
    const cursor = shape("line", { class: "cursor", y1: top, y2: height, visibility: "hidden" });
    svg.append(cursor);
    plot.append(svg);
    hover(plot, svg, cursor, { series, spec, toX, x1, left, right, width });
  }

  function marks(each, { toX, toY, usable, top, height, end }) {
    const style = { fill: "none", stroke: each.color, "stroke-width": each.thick || 1.6, "stroke-linejoin": "round", opacity: each.opacity || 1 };
    if (each.dash) style["stroke-dasharray"] = each.dash;
    if (each.kind === "dots") {
      let path = "";
      each.x.forEach((x, i) => {
        if (x != null && usable(each.y[i]) && toY(each.y[i]) > top && toY(each.y[i]) < height) path += `M${toX(x).toFixed(1)} ${toY(each.y[i]).toFixed(1)}h0`;
      });
      return path ? [shape("path", { ...style, d: path, "stroke-linecap": "round", "stroke-width": each.thick || 3 })] : [];
    }
    if (each.kind === "band") {
      const pieces = [];
      let up = [], down = [];
      const close = () => {
        if (up.length > 1) pieces.push(`M${up.join("L")}L${down.reverse().join("L")}Z`);
        up = [];
        down = [];
      };
      each.x.forEach((x, i) => {
        const a = each.y[i], b = each.upper[i];
        if (x == null || a == null || b == null) return;
        const px = toX(x).toFixed(1);
        down.push(`${px} ${(a > 0 ? toY(a) : height).toFixed(1)}`);
        up.push(`${px} ${(b < 0 ? top : b > 0 ? toY(b) : height).toFixed(1)}`);
      });
      close();
      return pieces.map((d) => shape("path", { d, fill: each.color, opacity: each.opacity || 0.16, stroke: "none" }));
    }
    let path = "", pen = false;
    each.x.forEach((x, i) => {
      if (x == null || !usable(each.y[i])) {
        pen = pen && each.bridge;
        return;
      }
      const px = toX(x).toFixed(1), py = toY(each.y[i]).toFixed(1);
      path += pen ? (each.kind === "step" ? `H${px}V${py}` : `L${px} ${py}`) : `M${px} ${py}`;
      pen = true;
    });
    if (each.kind === "step" && path) path += `H${toX(each.until ?? end).toFixed(1)}`;
    return path ? [shape("path", { ...style, d: path })] : [];
  }

  function stripe(svg, run, index, { toX, y, left }) {
    const x = run.x[axis];
    if (!x) return;
    if (many) svg.append(shape("rect", { x: left - 12, y, width: 6, height: 9, rx: 1, fill: color(index) }));
    let from = 0;
    for (let i = 1; i <= x.length; i++) {
      const kind = data.reason_kinds[run.reason[from]] || "not asked";
      if (i < x.length && (data.reason_kinds[run.reason[i]] || "not asked") === kind) continue;
      const a = toX(x[from]), b = toX(i < x.length ? x[i] : run.end[axis]);
      svg.append(shape("rect", { x: a.toFixed(1), y, width: Math.max(0.6, b - a).toFixed(1), height: 9, fill: `var(${REASONS[kind]})` }));
      from = i;
    }
  }

  function nearest(x, value) {
    let low = 0, high = x.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (x[middle] <= value) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  function hover(plot, svg, cursor, { series, spec, toX, x1, left, right, width }) {
    let tip = null;
    const leave = () => {
      cursor.setAttribute("visibility", "hidden");
      tip?.remove();
      tip = null;
    };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const px = ((event.clientX - box.left) / box.width) * width;
      if (px < left || px > width - right) return leave();
      const value = ((px - left) / (width - left - right)) * x1;
      cursor.setAttribute("visibility", "visible");
      cursor.setAttribute("x1", toX(value));
      cursor.setAttribute("x2", toX(value));
      if (!tip) plot.append((tip = element("div", { class: "tip" })));
      tip.textContent = "";
      tip.append(element("div", { class: "soft" }, `${short(value)} ${AXES[axis]}`));
      for (const each of series) {
        if (!each.label || !each.x.length) continue;
        const at = nearest(each.x, value);
        const text = each.tell ? each.tell(at) : short(each.y[at]);
        tip.append(element("div", {}, element("i", { class: "swatch", style: `background:${each.color};margin-right:6px;vertical-align:middle` }), `${each.label} ${text}`));
      }
      const over = (px / width) * plot.clientWidth;
      tip.style.top = "6px";
      tip.style.left = over > plot.clientWidth / 2 ? "" : `${over + 12}px`;
      tip.style.right = over > plot.clientWidth / 2 ? `${plot.clientWidth - over + 12}px` : "";
    });
  }

  // --- the charts of the page ---

  const each = (make) => () => runs.flatMap((run, index) => (run.x[axis] ? make(run, index, run.x[axis], many ? `${run.name}: ` : "") : []));
  const has = (test) => runs.some(test);
  const metricOf = (run, name) => run.metrics.find((metric) => metric.name === name);
  const evaluations = (run, index, name, label) => {
    const metric = metricOf(run, name);
    if (!metric || !metric.x[axis]) return [];
    const drawn = { run: index, x: metric.x[axis], y: metric.y, color: color(index) };
    return [{ ...drawn, kind: "line", bridge: true, dash: "5 4", thick: 1.2, label }, { ...drawn, kind: "dots", thick: 6 }];
  };
  const INK = "var(--soft)";
  const swatch = (style) => `background:${style}`;
  const of = () => (many ? INK : color(0));

  // What each chart draws; its title, its note and its scale come with the numbers.
  function charts() {
    const limits = has((run) => run.limits.some((limit) => limit != null));
    const band = `background:${of()};opacity:.2;height:9px`;
    const dashed = (style) => `background:repeating-linear-gradient(90deg,${style} 0 4px,transparent 4px 7px);height:2px`;
    const kinds = Object.entries(REASONS).filter(([kind]) => has((run) => run.reason.some((word) => (data.reason_kinds[word] || "not asked") === kind)));
    const line = (index, x, y, label) => ({ run: index, kind: "line", bridge: true, x, y, color: color(index), label });
    const specs = {
      batch: {
        wide: true, height: 280, strips: true,
        key: [["taken", swatch(of())], ["wanted", `background:${of()};opacity:.45`], ["its bounds", band], ...(limits ? [["limits", dashed(INK)]] : []), ...kinds.map(([kind, name]) => [kind, `background:var(${name})`, true])],
        series: (run, index, x, name) => [
          { run: index, kind: "band", loose: true, x, y: run.low, upper: run.high, color: color(index), opacity: many ? 0.08 : 0.15 },
          { ...line(index, x, run.wanted, `${name}wanted`), loose: true, opacity: 0.45, thick: 1.2 },
          ...run.limits.filter((limit) => limit != null).map((limit) => ({ run: index, kind: "line", x: [0, run.end[axis]], y: [limit, limit], color: INK, dash: "4 3", thick: 1 })),
          { run: index, kind: "step", x, y: run.batch, until: run.end[axis], color: color(index), thick: 2, label: `${name}taken`, tell: (at) => `${whole(run.batch[at])} · ${run.reason[at]}` },
        ],
      },
      loss: {
        series: (run, index, x, name) => [
          { run: index, kind: "dots", loose: true, x, y: run.loss, color: color(index), opacity: 0.25, thick: 2 },
          line(index, x, run.smooth_loss, `${name}loss`),
          ...evaluations(run, index, "loss", `${name}evaluation`),
        ],
      },
      noise: {
        key: [["average", swatch(of())], ...(has((run) => run.noise_low) ? [["its band", band]] : []), ["single steps", `background:${of()};opacity:.3;width:4px`], ["batch taken", dashed(of())]],
        series: (run, index, x, name) => [
          ...(run.noise_low ? [{ run: index, kind: "band", loose: true, x, y: run.noise_low, upper: run.noise_high, color: color(index) }] : []),
          { run: index, kind: "dots", loose: true, x, y: run.measured, color: color(index), opacity: 0.22, thick: 2 },
          { run: index, kind: "step", loose: true, x, y: run.batch, until: run.end[axis], color: color(index), dash: "4 3", thick: 1, opacity: 0.8, label: `${name}batch` },
          { ...line(index, x, run.noise_scale, `${name}noise scale`), bridge: false },
        ],
      },
      efficiency: { series: (run, index, x, name) => [{ ...line(index, x, run.efficiency, `${name}efficiency`), bridge: false, tell: (at) => percent(run.efficiency[at]) }] },
      lr: { series: (run, index, x, name) => run.applied_lr.map((group, number) => ({ ...line(index, x, group, `${name}${run.applied_lr.length > 1 ? `group ${number} ` : ""}LR`), opacity: number ? 0.5 : 1 })) },
      shape: { series: (run, index, x, name) => [line(index, x, run.shape, `${name}shape`)] },
      factor: { series: (run, index, x, name) => [{ ...line(index, x, run.factor, `${name}factor`), kind: "step", until: run.end[axis] }] },
      tau: { series: (run, index, x, name) => (run.tau ? [line(index, x, run.tau, `${name}tau`)] : []) },
      betas: { series: (run, index, x, name) => (run.betas || []).map((beta, number) => ({ ...line(index, x, beta, `${name}beta${number + 1}`), kind: "step", until: run.end[axis], opacity: number ? 0.55 : 1 })) },
      freedom: { series: (run, index, x, name) => (run.freedom ? [line(index, x, run.freedom, `${name}freedom`)] : []) },
    };
    return Object.entries(data.charts).map(([id, said]) => {
      const spec = specs[id] || { series: (run, index, x, name) => evaluations(run, index, said.metric, `${name}${said.metric}`) };
      return chart({ ...spec, ...said, id, series: each(spec.series) });
    });
  }

  // --- the heat map of the layers ---

  const HEAT = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

  function heatColor(share) {
    const place = Math.min(0.9999, Math.max(0, share)) * (HEAT.length - 1), at = Math.floor(place);
    return `rgb(${HEAT[at].map((c, i) => Math.round(c + (HEAT[at + 1][i] - c) * (place - at))).join(",")})`;
  }

  function heatMap(run) {
    const heat = run.heat, rows = heat.names.length;
    const box = element("section", { class: "chart wide", "data-chart": "layers" });
    box.append(element("h3", {}, run.heat_chart.title), element("p", { class: "note" }, run.heat_chart.note));
    const plot = element("div", { style: "position:relative" });
    const all = heat.values.flat().filter((value) => value > 0).sort((a, b) => a - b);
    const low = all[Math.floor(all.length * 0.02)] || 1, high = Math.max(low * 1.01, all[Math.floor(all.length * 0.98)] || low);
    box.append(element("div", { class: "key" }, short(low), element("i", { style: `display:inline-block;width:120px;height:9px;align-self:center;border-radius:2px;background:linear-gradient(90deg,${[0, 0.25, 0.5, 0.75, 1].map(heatColor).join(",")})` }), short(high), " examples"), plot);
    box.draw = () => {
      plot.textContent = "";
      const width = Math.max(260, plot.clientWidth || 640), left = Math.min(210, width * 0.36), cell = rows > 40 ? 11 : 17, height = rows * cell;
      const svg = shape("svg", { viewBox: `0 0 ${width} ${height + 34}`, height: height + 34, role: "img", "aria-label": "noise scale by layer" });
      const edges = heat.x[axis] || heat.x.examples, x1 = Math.max(...runs.filter((_, index) => !hidden.has(index)).map((each) => each.end[axis] || 0), edges[edges.length - 1]);
      const toX = (value) => left + (value / x1) * (width - left - 10);
      const letters = Math.floor((left - 44) / 6.4);
      heat.names.forEach((name, row) => {
        const cut = name.length > letters ? `…${name.slice(1 - letters)}` : name;
        if (cell > 11 || row % 2 === 0) {
          const text = shape("text", { x: left - 40, y: (row + 0.5) * cell + 4, "text-anchor": "end" }, cut);
          text.append(shape("title", {}, name));
          svg.append(text, shape("text", { x: left - 6, y: (row + 0.5) * cell + 4, "text-anchor": "end" }, percent(heat.shares[row])));
        }
        heat.values[row].forEach((value, column) => {
          if (value == null) return;
          const fill = value < 0 ? "var(--place)" : heatColor(Math.log(Math.max(value, low) / low) / Math.log(high / low));
          const a = toX(edges[column]), b = toX(edges[column + 1]);
          const rect = shape("rect", { x: a.toFixed(1), y: row * cell, width: Math.max(0.5, b - a + 0.3).toFixed(1), height: cell - 1, fill });
          rect.append(shape("title", {}, `${name}: ${value < 0 ? "no signal" : short(value)}`));
          svg.append(rect);
        });
      });
      for (const value of ticks(0, x1, Math.max(2, Math.floor(width / 160)))) svg.append(shape("text", { x: toX(value), y: height + 16, "text-anchor": value > x1 * 0.97 ? "end" : "middle" }, short(value, x1)));
      svg.append(shape("text", { x: width - 10, y: height + 30, "text-anchor": "end" }, AXES[axis]));
      plot.append(svg);
    };
    return box;
  }

  // --- words and tables ---

  function table(header, rows, options = {}) {
    const text = new Set(options.text || []);
    const head = element("tr", {}, ...header.map((name, i) => element("th", { class: text.has(i) ? "text" : null }, name)));
    const body = rows.map((row, number) => element("tr", { class: options.own === number ? "own" : null }, ...row.map((value, i) => element("td", { class: text.has(i) ? "text" : null }, value instanceof Node ? value : String(value)))));
    return element("div", { class: "scroll" }, element("table", { id: options.id }, element("thead", {}, head), element("tbody", {}, ...body)));
  }

  const named = (run, index) => element("span", { class: "run" }, element("i", { class: "swatch", style: swatch(color(index)) }), run.name);

  function totals() {
    const metrics = [...new Set(runs.flatMap((run) => Object.keys(run.evaluations)))];
    // What `adabatch compare` measured at the end is its last evaluation.
    const extra = [...new Set(runs.flatMap((run) => Object.keys(run.results)))].filter((name) => !metrics.includes(name.replace(/^test /, "")));
    const timed = runs.some((run) => run.summary.seconds != null);
    const header = ["run", "steps", "examples", "mean batch", "smallest", "largest", "changes", "efficiency", "adaptive limit", "best loss", "last loss", ...metrics.flatMap((name) => [`best ${name}, evaluated`, `last ${name}, evaluated`]), ...extra, "steps measured", "accumulated", ...(timed ? ["time"] : [])];
    const rows = runs.map((run, index) => {
      const s = run.summary;
      return [named(run, index), whole(s.num_steps), whole(s.num_examples), precise(s.mean_batch), whole(s.smallest_batch), whole(s.largest_batch), whole(s.num_changes), percent(s.efficiency), s.adaptive_limit == null ? "-" : `${s.adaptive_limit.toFixed(2)} x`, precise(s.best_loss), precise(s.last_loss), ...metrics.flatMap((name) => [precise(run.evaluations[name]?.best), precise(run.evaluations[name]?.last)]), ...extra.map((name) => precise(run.results[name])), percent(s.probed), percent(s.accumulated), ...(timed ? [duration(s.seconds)] : [])];
    });
    const wide = table(header, rows, { id: "totals" });
    if (runs.length > MOST_COLUMNS) return wide;
    // In a narrow window a few runs stand beside each other, so that no number lies outside of it.
    wide.classList.add("in-wide");
    const turned = table(["run", ...runs.map(named)], header.slice(1).map((name, i) => [name, ...rows.map((row) => row[i + 1])]), { id: "totals-narrow" });
    turned.classList.add("in-narrow");
    return [wide, turned];
  }

  function flagCards() {
    const cards = runs.flatMap((run) => run.flags.map((flag) => element("div", { class: `flag level-${flag.level}`, "data-kind": flag.kind }, many ? element("span", { class: "of" }, run.name) : null, flag.text)));
    return cards.length ? element("div", { class: "flags" }, ...cards) : element("p", { class: "soft" }, "Nothing stands out.");
  }

  function changeLists() {
    return runs.map((run, index) => element("details", { open: !many && run.changes.length <= 12 },
      element("summary", {}, `${many ? `${run.name}: ` : ""}${run.summary.num_changes} change${run.summary.num_changes === 1 ? "" : "s"} of the batch size`),
      element("p", { class: "note" }, `Next plans: ${Object.entries(run.reasons).map(([word, share]) => `${word || "no reason given"} ${percent(share)}`).join(", ")}.`),
      run.changes.length ? table(["examples", "batch", "why"], run.changes.map((change) => [whole(change.examples), `${whole(change.before)} → ${whole(change.after)}`, change.text]), { text: [2] }) : null,
      run.changes_left_out ? element("p", { class: "note" }, `The list is cut; the report's --json has all ${run.summary.num_changes}.`) : null));
  }

  function outcomeTables() {
    return runs.filter((run) => run.what_if.length).flatMap((run) => {
      const priced = run.what_if.some((row) => row.cost != null);
      const own = run.what_if[0];
      const rows = run.what_if.map((row) => [row.name, precise(row.mean_batch), whole(row.steps_at_equal_examples), whole(row.steps), whole(row.examples), percent(row.efficiency), ...(priced ? [`${whole(row.cost)} (${(row.cost / own.cost).toFixed(2)} x)`] : [])]);
      return [many ? element("h3", { style: "margin-top:14px" }, run.name) : null, table(["choice", "mean batch", "steps at equal examples", "steps to the same progress", "examples to the same progress", "efficiency", ...(priced ? ["cost in examples"] : [])], rows, { own: 0 })].filter(Boolean);
    });
  }

  function tryOut() {
    const candidates = runs.filter((run) => run.segments);
    if (!candidates.length) return null;
    const which = element("select", { id: "try-run", "aria-label": "run" }, ...candidates.map((run, index) => element("option", { value: index }, run.name)));
    const kind = element("select", { id: "try-kind" }, element("option", { value: "eta" }, "norm test, eta"), element("option", { value: "multiple" }, "multiple of noise scale"), element("option", { value: "step_price" }, "price of a step"), element("option", { value: "constant" }, "constant batch"));
    const value = element("input", { id: "try-value", type: "number", step: "any", min: "0", value: "0.7" });
    const price = element("input", { id: "try-price", type: "number", step: "any", min: "0", placeholder: "none" });
    const answer = element("p", { id: "try-answer", "aria-live": "polite" });
    const usual = { eta: 0.7, multiple: 1, step_price: 256, constant: 256 };
    const update = () => { answer.textContent = sentence(candidates[+which.value], kind.value, parseFloat(value.value), parseFloat(price.value) || 0); };
    kind.addEventListener("change", () => { value.value = usual[kind.value]; update(); });
    for (const field of [which, value, price]) field.addEventListener("input", update);
    const fields = [many ? element("label", {}, "run", which) : null, element("label", {}, "another choice", kind), element("label", {}, "its number", value), element("label", {}, "a step costs, in examples", price)];
    update();
    return [element("div", { class: "try" }, ...fields.filter(Boolean)), answer];
  }

  function sentence(run, kind, value, price) {
    const wrong = !(value > 0) || (kind === "eta" && value >= 1) || (kind === "constant" && value < 1);
    if (wrong) return kind === "eta" ? "eta lies between 0 and 1." : kind === "constant" ? "A batch has at least 1 example." : "The number must be positive.";
    const { examples, steps, progress, noise_scale } = run.segments;
    const [low, high] = run.limits;
    const asks = { eta: (b) => (b * (1 - value * value)) / (value * value), multiple: (b) => value * b, step_price: (b) => Math.sqrt(b * value), constant: () => value }[kind];
    let newSteps = 0, newExamples = 0, equal = 0, moved = 0, ranSteps = 0, ranExamples = 0;
    progress.forEach((p, i) => {
      const scale = noise_scale[i];
      let batch = asks(scale);
      if (kind !== "constant") batch = Math.min(Math.max(batch, low ?? 1, 1), high ?? Infinity);
      newSteps += p / batch + p / scale;
      newExamples += p * (1 + batch / scale);
      equal += examples[i] / batch;
      moved += p;
      ranSteps += steps[i];
      ranExamples += examples[i];
    });
    const times = (now, then) => `${(now / then).toFixed(2)} x`;
    const cost = price > 0 ? ` At ${short(price)} examples per step it costs ${times(newExamples + price * newSteps, ranExamples + price * ranSteps)} of what the run did.` : "";
    return `The same progress takes ${whole(newSteps)} steps (${times(newSteps, ranSteps)}) and ${whole(newExamples)} examples (${times(newExamples, ranExamples)}), in batches of ${precise(newExamples / newSteps)} on average; an example is worth ${percent(moved / newExamples)}. As many examples as the run took would make ${whole(equal)} steps.${cost}`;
  }

  function configTable() {
    const rows = Object.entries(data.differences);
    if (!rows.length) return null;
    const shown = (value) => (value == null ? "–" : typeof value === "string" ? value : JSON.stringify(value));
    return table(["setting", ...runs.map((run) => run.name)], rows.map(([name, values]) => [name, ...values.map(shown)]), { id: "differences" });
  }

  // --- the page ---

  const drawn = [...charts(), ...runs.filter((run) => run.heat).map(heatMap)];
  const redraw = () => drawn.forEach((box) => box.draw());

  function bar() {
    const list = element("div", { class: "runs" }, ...runs.map((run, index) => {
      const label = named(run, index);
      if (!many) return label;
      const box = element("input", { type: "checkbox", checked: true, "aria-label": `show ${run.name}`, onchange: (event) => { event.target.checked ? hidden.delete(index) : hidden.add(index); redraw(); } });
      return element("label", { class: "run" }, box, ...label.childNodes);
    }));
    const offered = Object.keys(AXES).filter((name) => runs.some((run) => run.x[name]));
    const x = element("fieldset", { id: "axis" }, element("legend", {}, "over"), ...offered.map((name) => element("label", {}, element("input", { type: "radio", name: "axis", value: name, checked: name === axis, onchange: () => { axis = name; redraw(); } }), name)));
    const themes = ["auto", "light", "dark"];
    const theme = element("button", { id: "theme", type: "button", onclick: () => {
      const next = themes[(themes.indexOf(document.documentElement.dataset.theme || "auto") + 1) % 3];
      if (next === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = next;
      theme.textContent = `colours: ${next}`;
    } }, "colours: auto");
    return element("div", { class: "bar" }, list, x, theme);
  }

  const section = (title, ...content) => (content.flat().filter(Boolean).length ? [element("h2", {}, title), ...content.flat().filter(Boolean)] : []);
  document.getElementById("page").append(
    element("h1", {}, many ? `${runs.length} runs` : runs[0].name),
    bar(),
    ...section("What to know", flagCards()),
    ...section("Totals", totals()),
    ...section("Curves", element("div", { class: "charts" }, ...drawn)),
    ...section("Decisions", changeLists()),
    ...section("What if", tryOut(), outcomeTables(), runs.some((run) => run.segments) ? element("details", {}, element("summary", {}, "What this assumes"), element("ul", {}, ...data.assumptions.map((text) => element("li", {}, text)))) : element("p", { class: "soft" }, "The noise was not measured, so nothing can be told of other batches.")),
    ...section("Settings that differ", configTable()),
  );
  redraw();
  let waiting = 0;
  addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(redraw); });
  // Paper is white, whatever the screen is.
  let chosen;
  addEventListener("beforeprint", () => { chosen = document.documentElement.dataset.theme; document.documentElement.dataset.theme = "light"; redraw(); });
  addEventListener("afterprint", () => { if (chosen) document.documentElement.dataset.theme = chosen; else delete document.documentElement.dataset.theme; redraw(); });
})();
