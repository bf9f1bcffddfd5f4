"use strict";
// Draws every <div class="ra-paths"> from the JSON in it. All text goes in as text, never as HTML.
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const make = (tag, attributes = {}, text = null, svg = false) => {
    const element = svg ? document.createElementNS(NS, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null && svg) element.textContent = text;
    else if (text !== null) element.append(...apart(text));
    return element;
  };
  // Tokens stand between FSI and PDI, so that text written from right to left does not turn the
  // rest; in HTML each is a <bdi>.
  const isolated = (token) => `\u2068${token}\u2069`;
  const apart = (text) => text.split(/(\u2068[^\u2068\u2069]*\u2069?)/).map((part) => {
    if (!part.startsWith("\u2068")) return part;
    const token = document.createElement("bdi");
    token.textContent = part.replace(/[\u2068\u2069]/g, "");
    return token;
  });
  const shorten = (text, n) => {
    const letters = Array.from(text);
    return letters.length <= n ? text : letters.slice(0, n - 1).join("") + "…";
  };
  const number = (x) => (Math.abs(x) >= 0.001 || x === 0 ? x.toFixed(4) : x.toExponential(2));
  const colour = (beam) => `var(--p${beam % 10})`;

  function start(root) {
    const traces = JSON.parse(root.querySelector("script").textContent);
    const tabs = make("div", { class: "bar", role: "tablist" });
    const panel = make("div", { role: "tabpanel" });
    const buttons = traces.map((trace, i) => {
      const button = make("button", { type: "button", role: "tab" }, trace.title);
      button.addEventListener("click", () => choose(i));
      button.addEventListener("keydown", (event) => {
        const turn = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!turn) return;
        const next = (i + turn + traces.length) % traces.length;
        choose(next);
        buttons[next].focus();
      });
      tabs.append(button);
      return button;
    });
    function choose(i) {
      buttons.forEach((button, j) => {
        button.setAttribute("aria-selected", String(i === j));
        button.tabIndex = i === j ? 0 : -1;
      });
      panel.replaceChildren();
      show(panel, traces[i]);
    }
    if (traces.length > 1) root.append(tabs);
    root.append(panel);
    choose(0);
  }

  function show(panel, trace) {
    const state = { beam: null, picked: null, bySign: trace.signed };
    panel.append(make("p", { class: "about" }, trace.about));
    const bar = make("div", { class: "bar" });
    const filter = make("select", { "aria-label": "Show paths" });
    filter.append(make("option", { value: "" }, "All paths"));
    trace.beams.forEach((_, i) => filter.append(make("option", { value: i }, `Path ${i + 1}`)));
    const button = (label, name, action) => {
      const made = make("button", { type: "button", "aria-label": name }, label);
      made.addEventListener("click", action);
      bar.append(made);
      return made;
    };
    bar.append(filter);
    button("+", "Zoom in", () => zoom(0.8));
    button("−", "Zoom out", () => zoom(1.25));
    button("Fit", "Show everything", () => fit());
    button("Clear", "Clear the selection", () => pick(null));
    if (trace.signed) {
      const paint = button("Colours: more or less", "Change what colours mean", () => {
        state.bySign = !state.bySign;
        paint.textContent = state.bySign ? "Colours: more or less" : "Colours: paths";
        update();
      });
    }
    const split = make("div", { class: "split" });
    const svg = make("svg", { role: "group", "aria-label": "Paths", tabindex: 0 }, null, true);
    const side = make("div", { class: "side" });
    const list = make("ol", { class: "beams", "aria-label": "Paths" });
    const detail = make("div", { class: "detail", "aria-live": "polite" });
    side.append(list);
    split.append(svg, side);
    panel.append(bar, split, legend(trace), detail);

    // ---- places: a column per position, a row per layer (or per path that comes there first) ----
    const columns = [...new Set(trace.nodes.map((node) => node.position))].sort((a, b) => a - b);
    const rows = [...new Set(trace.nodes.map((node) => node.row))].sort((a, b) => a - b);
    const wide = trace.layered ? 74 : 104;
    const tall = trace.layered ? Math.max(44, Math.min(90, 420 / rows.length)) : 78;
    const x = (node) => 60 + wide * columns.indexOf(node.position);
    const y = (node) => 40 + tall * (trace.layered ? rows.length - 1 - rows.indexOf(node.row) : rows.indexOf(node.row));
    const bottom = 40 + tall * (rows.length - 1); // of the lowest row
    const bounds = trace.layered
      ? [-50, 0, wide * columns.length + 110, bottom + 60]
      : [-10, -10, wide * columns.length + 40, bottom + 70];
    const places = new Map(trace.nodes.map((node) => [node.id, node]));
    if (trace.layered) {
      rows.forEach((row, i) => {
        const at = y({ row });
        svg.append(make("line", { class: "guide", x1: 20, x2: bounds[2] - 80, y1: at, y2: at }, null, true));
        if (i < rows.length - 1) svg.append(make("text", { class: "soft", x: -42, y: at - tall / 2 + 4 }, `layer ${row}`, true));
      });
      columns.forEach((position) => {
        const at = x({ position });
        const label = make("text", { x: at, y: bottom + 30, "text-anchor": "middle" }, isolated(shorten(trace.tokens[position], 10)), true);
        label.append(make("title", {}, `${isolated(trace.tokens[position])} (${position})`, true));
        svg.append(label, make("text", { class: "soft", x: at, y: bottom + 46, "text-anchor": "middle" }, String(position), true));
      });
    }
    const crowd = new Map(); // steps between the same two nodes lie side by side
    const links = [];
    trace.beams.forEach((beam, b) => beam.steps.forEach((step, s) => {
      const from = places.get(step.source), to = places.get(step.target);
      const pair = `${step.source} ${step.target}`;
      const rank = crowd.get(pair) || 0;
      crowd.set(pair, rank + 1);
      const shift = (rank % 2 ? 1 : -1) * Math.ceil(rank / 2) * 5;
      const [x1, y1, x2, y2] = [x(from), y(from), x(to), y(to)];
      let d;
      if (trace.layered) {
        const bend = (y1 - y2) * 0.5;
        d = `M${x1 + shift},${y1} C${x1 + shift},${y1 - bend} ${x2 + shift},${y2 + bend} ${x2 + shift},${y2}`;
      } else {
        const middle = (x1 + x2) / 2;
        const span = Math.abs(columns.indexOf(to.position) - columns.indexOf(from.position));
        const lift = span > 1 && y1 === y2 ? -16 - 9 * Math.min(span, 6) : 0;
        d = `M${x1},${y1 + shift} C${middle},${y1 + shift + lift} ${middle},${y2 + shift + lift} ${x2},${y2 + shift}`;
      }
      const kind = `link ${step.kind}${step.value < 0 ? " less" : ""}`;
      const path = make("path", { class: kind, d, "stroke-width": 1 + 4 * Math.sqrt(step.weight), "data-beam": b }, null, true);
      path.append(make("title", {}, step.text, true));
      path.addEventListener("click", (event) => {
        event.stopPropagation();
        pick({ beam: b, step: s });
      });
      svg.append(path);
      links.push({ path, b, s, step });
    }));
    const drawn = trace.nodes.map((node) => {
      const target = node.id === trace.target;
      const name = `${isolated(trace.tokens[node.position])} (${node.position})${trace.layered ? `, ${node.label}` : ""}`;
      const group = make("g", {
        class: `node${target ? " target" : ""}`, tabindex: 0, role: "button", "aria-label": name,
        "data-id": node.id, transform: `translate(${x(node)},${y(node)})`,
      }, null, true);
      if (trace.layered) {
        group.append(make("circle", { r: 8 }, null, true));
      } else {
        group.append(make("rect", { x: -44, y: -19, width: 88, height: 38, rx: 6 }, null, true));
        group.append(make("text", { y: -2, "text-anchor": "middle" }, isolated(shorten(trace.tokens[node.position], 11)), true));
        group.append(make("text", { class: "soft", y: 13, "text-anchor": "middle" }, String(node.position), true));
      }
      group.append(make("title", {}, name, true));
      const press = (event) => {
        event.stopPropagation();
        pick({ node: node.id });
      };
      group.addEventListener("click", press);
      group.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          press(event);
        }
      });
      svg.append(group);
      return { group, node };
    });
    const entries = trace.beams.map((beam, i) => {
      const item = make("li"), press = make("button", { type: "button" });
      press.append(make("span", {}, `Path ${i + 1}: ${beam.text}`), make("small", {}, beam.note));
      press.style.borderLeftColor = colour(i);
      press.addEventListener("click", () => pick(state.picked && state.picked.beam === i && state.picked.step === undefined ? null : { beam: i }));
      item.append(press);
      list.append(item);
      return { item, press };
    });

    // ---- what is highlighted -------------------------------------------------------------------
    const through = (id) => new Set(trace.beams.flatMap((beam, i) => (beam.nodes.includes(id) ? [i] : [])));
    function pick(what) {
      state.picked = what;
      update();
    }
    function update() {
      const picked = state.picked;
      const lit = picked === null ? null : picked.node !== undefined ? through(picked.node) : new Set([picked.beam]);
      const visible = (b) => state.beam === null || state.beam === b;
      links.forEach(({ path, b, s, step }) => {
        const sign = step.value < 0 ? "var(--p-less)" : "var(--p-more)";
        path.style.stroke = state.bySign && step.kind !== "residual" ? sign : colour(b);
        path.classList.toggle("hidden", !visible(b));
        const off = lit !== null && (!lit.has(b) || (picked.step !== undefined && picked.step !== s));
        path.classList.toggle("dim", off);
      });
      drawn.forEach(({ group, node }) => {
        const users = [...through(node.id)];
        group.classList.toggle("hidden", !users.some(visible));
        group.classList.toggle("dim", lit !== null && !users.some((b) => lit.has(b)));
        group.classList.toggle("on", picked !== null && picked.node === node.id);
      });
      entries.forEach(({ item, press }, i) => {
        item.classList.toggle("hidden", !visible(i));
        press.setAttribute("aria-pressed", String(lit !== null && lit.has(i)));
      });
      tell(picked);
    }
    function tell(picked) {
      const lines = [];
      const told = (beam, step) => `Path ${beam + 1}: ${step.text}, weight ${number(step.weight)}${step.shown}`;
      if (picked === null) {
        lines.push("Choose a token, a link or a path.");
      } else if (picked.node !== undefined) {
        const node = places.get(picked.node);
        lines.push(`Token ${isolated(trace.tokens[node.position])}`, `Position ${node.position}`, node.label);
        trace.beams.forEach((beam, b) => beam.steps.forEach((step) => {
          if (step.source === node.id || step.target === node.id) lines.push(told(b, step));
        }));
      } else {
        const beam = trace.beams[picked.beam];
        lines.push(`Path ${picked.beam + 1}, ${beam.note}`);
        beam.steps.forEach((step, s) => {
          if (picked.step === undefined || picked.step === s) lines.push(told(picked.beam, step));
        });
      }
      detail.replaceChildren(...lines.map((line) => make("p", {}, line)));
    }
    filter.addEventListener("change", () => {
      state.beam = filter.value === "" ? null : Number(filter.value);
      pick(null);
    });

    // ---- zoom and pan --------------------------------------------------------------------------
    let view = [...bounds];
    const apply = () => svg.setAttribute("viewBox", view.join(" "));
    function fit() {
      view = [...bounds];
      apply();
    }
    function zoom(factor, cx = view[0] + view[2] / 2, cy = view[1] + view[3] / 2) {
      const width = Math.min(Math.max(view[2] * factor, 60), bounds[2] * 4);
      const real = width / view[2];
      view = [cx - (cx - view[0]) * real, cy - (cy - view[1]) * real, width, view[3] * real];
      apply();
    }
    const place = (event) => {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      return [point.x, point.y];
    };
    svg.addEventListener("wheel", (event) => {
      event.preventDefault();
      zoom(event.deltaY > 0 ? 1.1 : 1 / 1.1, ...place(event));
    }, { passive: false });
    let held = null;
    svg.addEventListener("pointerdown", (event) => {
      if (event.target.closest(".node, .link")) return;
      held = place(event);
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointermove", (event) => {
      if (held === null) return;
      const [px, py] = place(event);
      view[0] += held[0] - px;
      view[1] += held[1] - py;
      apply();
    });
    for (const end of ["pointerup", "pointercancel"]) svg.addEventListener(end, () => { held = null; });
    svg.addEventListener("keydown", (event) => {
      const step = view[2] / 12;
      const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
      if (moves[event.key]) {
        event.preventDefault();
        view[0] += moves[event.key][0];
        view[1] += moves[event.key][1];
        apply();
      } else if (event.key === "+" || event.key === "=") zoom(0.8);
      else if (event.key === "-") zoom(1.25);
      else if (event.key === "0") fit();
      else if (event.key === "Escape") pick(null);
    });
    fit();
    const readable = (svg.clientWidth || 850) / 0.85;
    if (bounds[2] > readable) { // begin where the target is, large enough to read
      const height = Math.min(bounds[3], (svg.clientHeight || 416) / 0.85);
      view = [bounds[0] + bounds[2] - readable, bounds[1], readable, height];
      apply();
    }
    update();
  }

  function legend(trace) {
    const key = make("p", { class: "key" });
    if (trace.signed) {
      for (const [name, text] of [["--p-more", "descent wants more"], ["--p-less", "descent wants less (dashed)"]]) {
        const sample = make("span", { class: "sample" });
        sample.style.borderTopColor = `var(${name})`;
        if (name === "--p-less") sample.style.borderTopStyle = "dashed";
        key.append(sample, document.createTextNode(`${text} `));
      }
    }
    key.append(document.createTextNode("Wider links weigh more. Wheel or + − to zoom, drag or arrow keys to move, Tab to reach tokens, Escape to clear."));
    return key;
  }

  for (const root of document.querySelectorAll(".ra-paths")) start(root);
})();
