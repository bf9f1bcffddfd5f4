"use strict";
// Draws the grid of heads and the maps of one head from the data of this page. Token text is only
// ever read and written as text.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("ra-data").textContent);
  const minus = data.sign === "descent";
  const nameR = minus ? "−R" : "R";
  const state = {
    example: 0, kind: "norms", order: "index", scale: "own", head: null, cell: null, map: "r",
    view: "r",  // the map on the right: R, or k, the loss if a look were blocked
    flowCell: null,
  };

  // ---- colours --------------------------------------------------------------------------------
  // Light: ColorBrewer's RdBu, BrBG and Purples, viridis for norms. Dark: the same hues, 0 being
  // dark. What blocking does has other colours than R, as it is another quantity.
  const SCALES = {
    light: {
      signed: ["#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7",
        "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"],
      loss: ["#543005", "#8c510a", "#bf812d", "#dfc27d", "#f6e8c3", "#f5f5f5",
        "#c7eae5", "#80cdc1", "#35978f", "#01665e", "#003c30"],
      attention: ["#fcfbfd", "#efedf5", "#dadaeb", "#bcbddc", "#9e9ac8", "#807dba", "#6a51a3",
        "#54278f", "#3f007d"],
      nothing: ["#eceef1", "#cfd4da"],
    },
    dark: {
      signed: ["#b9dcff", "#74b4ee", "#4088c4", "#2c5f8d", "#26425c", "#22262c",
        "#5a302c", "#8f4033", "#c75b45", "#ef8a6b", "#ffc9b0"],
      loss: ["#ffdca3", "#e3b068", "#b58544", "#7d5f33", "#483b29", "#22262c",
        "#23433f", "#2b6a61", "#3f968a", "#70c3b5", "#bff0e7"],
      attention: ["#22262c", "#34304a", "#4a4272", "#64589b", "#8074bb", "#9f95d2", "#c0b8e6",
        "#ded9f5", "#f7f5ff"],
      nothing: ["#15181c", "#30363e"],
    },
  };
  const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779",
    "#6ece58", "#b5de2b", "#fde725"];
  const BROKEN = "#e0a800";  // a number that is not one, where there should be one
  const darkQuery = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;
  // In a notebook the page around decides, not the system: frame_inside.js notes it here.
  const isDark = () => (document.documentElement.dataset.theme
    ?? (darkQuery.matches ? "dark" : "light")) === "dark";
  const palette = () => SCALES[isDark() && !printing ? "dark" : "light"];
  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

  function mix(stops, share) {
    const at = Math.min(1, Math.max(0, share)) * (stops.length - 1);
    const i = Math.min(stops.length - 2, Math.floor(at));
    const [low, high] = [channels(stops[i]), channels(stops[i + 1])];
    return low.map((c, k) => Math.round(c + (high[k] - c) * (at - i)));
  }
  const rgb = (c) => `rgb(${c.join(",")})`;
  const inkOn = ([r, g, b]) => (0.3 * r + 0.59 * g + 0.11 * b > 140 ? "#14171b" : "#ffffff");

  // ---- numbers --------------------------------------------------------------------------------
  let halves = null;
  function halfTable() {
    if (halves) return halves;
    halves = new Float32Array(65536);
    for (let i = 0; i < 65536; i++) {
      const exponent = (i >> 10) & 31, fraction = i & 1023, sign = i & 32768 ? -1 : 1;
      halves[i] = sign * (exponent === 0 ? fraction * 2 ** -24
        : exponent === 31 ? (fraction ? NaN : Infinity)
        : (1 + fraction / 1024) * 2 ** (exponent - 15));
    }
    return halves;
  }
  function digits(value, signed = false) {
    if (Number.isNaN(value)) return "not a number";
    const text = Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4 || value === 0
      ? String(Number(value.toPrecision(3))) : value.toExponential(2);
    return (signed && value > 0 ? "+" : "") + text.replace(/-/g, "−");
  }
  const percent = (value) => `${(100 * value).toPrecision(2)} %`;

  // ---- maps -----------------------------------------------------------------------------------
  const tokenOf = (side, i) => chips(side)[i];
  function chips(side) {
    return document.querySelectorAll(
      `.example[data-example="${state.example}"] .prompt[data-side="${side}"] .token:not(.next)`);
  }
  const decoded = new Map();
  function mapsOf(head) {
    const key = `${state.example}.${head}`;
    if (decoded.has(key)) return decoded.get(key);
    const facts = data.examples[state.example].maps[head];
    const block = document.querySelector(`script[data-map="${key}"]`);
    if (!facts || !block) return null;
    const bytes = atob(block.textContent), table = halfTable();
    const [rowSide, firstRow, n] = facts.rows, [columnSide, firstColumn, m] = facts.columns;
    const [a, r, k] = [1, 2, 3].map(() => new Float32Array(n * m).fill(NaN));
    const there = new Uint8Array(n * m);
    const count = facts.causal ? n * (n + 1) / 2 : n * m;
    const { scale } = data.layers.find((l) => String(l.layer) === head.split(".")[0]);
    let exact = 2 * count;  // what blocking does, where A has most of its row
    const at = (i) => table[bytes.charCodeAt(2 * i) | bytes.charCodeAt(2 * i + 1) << 8];
    let next = 0;
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < (facts.causal ? i + 1 : m); j++, next++) {
        const share = at(next), gradient = at(count + next) * facts.limit, place = i * m + j;
        a[place] = share;
        r[place] = minus ? -gradient : gradient;
        k[place] = share <= 0.5 ? -gradient / (scale * (1 - share)) : at(exact++) * facts.blocked;
        there[place] = 1;
      }
    }
    // Tokens are read once: a lookup per cell would be slow in a long prompt.
    const rowChips = chips(rowSide), columnChips = chips(columnSide);
    const found = {
      a, r, k, there, n, m, limit: facts.limit, blocked: facts.blocked, rowSide, firstRow, columnSide, firstColumn,
      rowTokens: Array.from({ length: n }, (_, i) => rowChips[firstRow + i]?.textContent ?? ""),
      columnTokens: Array.from(
        { length: m }, (_, j) => columnChips[firstColumn + j]?.textContent ?? ""),
    };
    if (decoded.size > 24) decoded.clear();
    decoded.set(key, found);
    return found;
  }
  // The largest size of a value of R (`limit`) or of what blocking does (`blocked`).
  function limitOf(which, maps) {
    const name = which === "r" ? "limit" : "blocked";
    const every = Object.values(data.examples[state.example].maps);
    return (state.scale === "shared" && which !== "flow"
      ? Math.max(...every.map((one) => one[name])) : maps[name]) || 1;
  }
  function colourOf(which, value, maps) {
    return which === "a" ? mix(palette().attention, value)
      : mix(palette()[which === "r" ? "signed" : "loss"], 0.5 + value / (2 * limitOf(which, maps)));
  }
  function strongest(maps, count) {
    const values = maps[state.view], order = [];
    for (let i = 0; i < values.length; i++) if (Math.abs(values[i]) > 0) order.push(i);
    order.sort((x, y) => Math.abs(values[y]) - Math.abs(values[x]));
    return order.slice(0, count).map((i) => [Math.floor(i / maps.m), i % maps.m]);
  }
  function rankInRow(maps, i, j) {
    const values = maps[state.view], size = Math.abs(values[i * maps.m + j]);
    let rank = 1, cells = 0;
    for (let c = 0; c < maps.m; c++) {
      cells += maps.there[i * maps.m + c];
      if (Math.abs(values[i * maps.m + c]) > size) rank++;
    }
    return [rank, cells];
  }

  function hatch(context) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 8;
    const pen = tile.getContext("2d");
    [pen.fillStyle, pen.strokeStyle] = palette().nothing;
    pen.fillRect(0, 0, 8, 8);
    pen.beginPath();
    for (const x of [-8, 0, 8]) { pen.moveTo(x, 8); pen.lineTo(x + 8, 0); }
    pen.stroke();
    return context.createPattern(tile, "repeat");
  }
  // Tokens stand in <bdi>, so that text written from right to left does not turn the rest. On a
  // canvas FSI and PDI are put around them.
  const isolated = (text) => {
    const one = document.createElement("bdi");
    one.textContent = text;
    return one;
  };
  const short = (text, most) => {
    const characters = Array.from(text);
    const cut = characters.length <= most ? text : characters.slice(0, most - 1).join("") + "…";
    return `\u2068${cut}\u2069`;
  };

  const frames = {};  // where each map lies in its canvas
  function draw(which, maps, chosen = state.cell) {
    const canvas = $(`ra-${which}`), context = canvas.getContext("2d");
    const width = Math.max(200, Math.floor(canvas.parentElement.clientWidth));
    const narrow = width < 420, most = narrow ? 8 : 13;
    const style = getComputedStyle(document.body);
    const size = narrow ? 10 : 11;
    context.font = `${size}px ${style.getPropertyValue("--mono")}`;
    const widest = (tokens) => Math.min(narrow ? 68 : 104, Math.max(...tokens.map(
      (t) => context.measureText(short(t, most)).width)) + 8);
    const left = widest(maps.rowTokens), below = widest(maps.columnTokens);
    const cell = Math.min((width - left - 2) / maps.m,
      which === "flow" ? 64 : maps.n > 24 ? 18 : maps.n > 14 ? 26 : 36);
    const tall = which === "flow" ? Math.min(22, Math.max(10, 400 / maps.n)) : cell;
    const [w, h] = [cell * maps.m, tall * maps.n];
    const ratio = Math.max(1, window.devicePixelRatio || 1);
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round((h + below + 4) * ratio);
    canvas.style.height = `${h + below + 4}px`;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.font = `${size}px ${style.getPropertyValue("--mono")}`;
    frames[which] = { left, top: 2, cell, tall };
    context.save();
    context.translate(left, 2);
    context.fillStyle = hatch(context);
    context.fillRect(0, 0, w, h);
    const edge = (k) => Math.round(k * cell * ratio) / ratio;
    const edgeDown = (k) => Math.round(k * tall * ratio) / ratio;
    const gap = cell >= 9 ? 1 : 0;
    const values = maps[which];
    for (let i = 0; i < maps.n; i++) {
      const y = edgeDown(i), high = edgeDown(i + 1) - y;
      for (let j = 0; j < maps.m; j++) {
        const k = i * maps.m + j;
        if (!maps.there[k]) continue;
        const x = edge(j), wide = edge(j + 1) - x;
        const value = values[k];
        context.fillStyle = Number.isFinite(value) ? rgb(colourOf(which, value, maps)) : BROKEN;
        context.fillRect(x, y, Math.max(wide - gap, 0.5), Math.max(high - gap, 0.5));
        if (!Number.isFinite(value) && cell >= 9) {
          context.fillStyle = "#000";
          context.textAlign = "center";
          context.textBaseline = "middle";
          context.fillText("×", x + wide / 2, y + high / 2);
        }
      }
    }
    if (chosen) {
      const [i, j] = chosen, ink = printing ? "#000" : style.color;
      context.strokeStyle = ink;
      context.lineWidth = 1;
      const [from, high] = [edgeDown(i), edgeDown(i + 1) - edgeDown(i)];
      context.strokeRect(-0.5, from - 0.5, w + 1, high + 1 - gap);
      context.lineWidth = 2;
      context.strokeRect(edge(j) - 1, from - 1, edge(j + 1) - edge(j) + 2 - gap, high + 2 - gap);
    }
    context.restore();
    const ink = printing ? "#000" : style.color;
    const soft = printing ? "#555" : style.getPropertyValue("--soft").trim();
    const labelled = (k, n, on, pixels) => {
      const step = Math.max(1, Math.ceil((size + 1.5) / pixels));
      return (n - 1 - k) % step === 0 && (on == null || k === on || Math.abs(k - on) >= step)
        || k === on;
    };
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (let i = 0; i < maps.n; i++) {
      if (!labelled(i, maps.n, chosen?.[0], tall)) continue;
      const on = i === chosen?.[0];
      context.fillStyle = on ? ink : soft;
      context.font = `${on ? "bold " : ""}${size}px ${style.getPropertyValue("--mono")}`;
      context.fillText(short(maps.rowTokens[i], most), left - 5, 2 + (i + 0.5) * tall, left - 6);
    }
    for (let j = 0; j < maps.m; j++) {
      if (!labelled(j, maps.m, chosen?.[1], cell)) continue;
      const on = j === chosen?.[1];
      context.fillStyle = on ? ink : soft;
      context.font = `${on ? "bold " : ""}${size}px ${style.getPropertyValue("--mono")}`;
      context.save();
      context.translate(left + (j + 0.5) * cell, h + 7);
      context.rotate(-Math.PI / 2);
      context.fillText(short(maps.columnTokens[j], most), 0, 0, below - 6);
      context.restore();
    }
  }

  function bar(element, stops, low, middle, high) {
    const colours = stops.map((c, i) => `${c} ${100 * i / (stops.length - 1)}%`).join(",");
    const strip = document.createElement("span");
    strip.className = "strip";
    strip.style.background = `linear-gradient(to right, ${colours})`;
    const words = [low, middle, high].map((text) => {
      const one = document.createElement("span");
      one.textContent = text;
      return one;
    });
    element.replaceChildren(strip, ...words);
  }

  // ---- the head chosen ------------------------------------------------------------------------
  const tokenAt = (token, position) => [isolated(token), ` (${position})`];
  function showMaps() {
    const maps = state.head && mapsOf(state.head);
    for (const part of [$("ra-maps"), $("ra-own"), $("ra-scale").parentElement]) {
      part.hidden = !maps;
    }
    if (!maps) return;
    for (const which of ["r", "k"]) {
      $(`ra-part-${which}`).hidden = which !== state.view;
      $(`ra-name-${which}`).setAttribute("aria-pressed", String(which === state.view));
    }
    for (const which of ["a", state.view]) draw(which, maps);
    const limit = limitOf("r", maps);
    bar($("ra-bar-a"), palette().attention, "0", "", "1");
    bar($("ra-bar-r"), palette().signed, `${digits(-limit)} ${minus ? "less" : "more"}`, "0",
      `${minus ? "more" : "less"} ${digits(limit, true)}`);
    lossBar($("ra-bar-k"), limitOf("k", maps));
  }
  function lossBar(element, limit) {
    bar(element, palette().loss, `${digits(-limit)} in the way`, `0 ${data.unit}`,
      `the answer needs it ${digits(limit, true)}`);
  }
  function changeOf(value) {
    if (Number.isNaN(value)) return "the loss is not a number";
    if (value === 0) return "the loss would stay";
    const [way, means] = value > 0
      ? ["rise", "the answer needs this look"] : ["fall", "this look is in the way"];
    return `the loss would ${way} by ${digits(Math.abs(value))} ${data.unit} (${means})`;
  }
  function showCell() {
    const maps = mapsOf(state.head), readout = $("ra-readout");
    if (!maps || !state.cell) { readout.textContent = ""; return; }
    const [i, j] = state.cell, k = i * maps.m + j;
    const words = [];
    if (!maps.there[k]) words.push("cannot attend there");
    else {
      const wants = maps.r[k] === 0 ? "same" : (maps.r[k] > 0) === minus ? "more" : "less";
      const [rank, cells] = rankInRow(maps, i, j), place = `rank ${rank} of ${cells} in its row`;
      const gradient = `${nameR} ${digits(maps.r[k], true)} (descent wants ${wants})`;
      const share = `A ${digits(maps.a[k])}`;
      if (state.view === "r") {
        const blocked = `if blocked: loss ${digits(maps.k[k], true)} ${data.unit}`;
        words.push(`${gradient}, ${share}, ${place}; ${blocked}`);
      } else words.push(`if blocked, ${changeOf(maps.k[k])}, ${place}; ${gradient}, ${share}`);
    }
    readout.replaceChildren("from ", ...tokenAt(maps.rowTokens[i], maps.firstRow + i), " to ",
      ...tokenAt(maps.columnTokens[j], maps.firstColumn + j), `: ${words.join("")}`);
    const names = { a: "Attention", r: nameR, k: "Loss if a look were blocked" };
    for (const [which, name] of Object.entries(names)) {
      $(`ra-${which}`).setAttribute("aria-label",
        `${name} of ${nameOf(state.head)}, ${maps.n} by ${maps.m}`);
    }
    for (const one of document.querySelectorAll("[data-edge]")) {
      const here = `${state.head}.${maps.firstRow + i}.${maps.firstColumn + j}`;
      const shown = one.closest(".edges").dataset.example === String(state.example);
      if (shown && one.dataset.edge === here) one.setAttribute("aria-current", "true");
      else one.removeAttribute("aria-current");
    }
  }
  function shade() {
    for (const chip of document.querySelectorAll(".token[style], .token.query")) {
      chip.removeAttribute("style");
      chip.classList.remove("query");
    }
    const maps = state.head && mapsOf(state.head);
    if (!maps || !state.cell) return;
    const columns = chips(maps.columnSide), row = state.cell[0];
    for (let j = 0; j < maps.m; j++) {
      const k = row * maps.m + j, chip = columns[maps.firstColumn + j];
      if (!chip || !maps.there[k] || !Number.isFinite(maps[state.map][k])) continue;
      const colour = colourOf(state.map, maps[state.map][k], maps);
      chip.style.background = rgb(colour);
      chip.style.color = inkOn(colour);
    }
    const query = chips(maps.rowSide)[maps.firstRow + row];
    if (!query) return;
    query.classList.add("query");
    const box = query.closest(".prompt");
    if (box.scrollHeight > box.clientHeight) {
      const where = query.getBoundingClientRect(), frame = box.getBoundingClientRect();
      if (where.top < frame.top || where.bottom > frame.bottom) {
        box.scrollTop += where.top - frame.top - box.clientHeight / 2;
      }
    }
  }
  function chooseCell(i, j, which) {
    if (state.cell && state.cell[0] === i && state.cell[1] === j && state.map === which) return;
    state.cell = [i, j];
    state.map = which;
    showMaps(); showCell(); shade();
  }
  function nameOf(head) {
    const [layer, index] = head.split(".");
    return `L${layer}H${index}`;
  }
  function fillCells(maps) {
    $("ra-column-r").textContent = nameR;
    $("ra-column-k").textContent = `loss if blocked (${data.unit})`;
    const rows = strongest(maps, 10).map(([i, j]) => {
      const k = i * maps.m + j, row = document.createElement("tr");
      const wants = (maps.r[k] > 0) === minus ? "more" : "less";
      const button = document.createElement("button");
      button.type = "button";
      button.append(...tokenAt(maps.rowTokens[i], maps.firstRow + i), " → ",
        ...tokenAt(maps.columnTokens[j], maps.firstColumn + j));
      const choose = () => chooseCell(i, j, state.view);
      button.addEventListener("click", choose);
      button.addEventListener("focus", choose);
      row.addEventListener("pointerenter", choose);
      const cell = (content, name = "") => {
        const one = document.createElement("td");
        one.className = name;
        one.append(content);
        row.append(one);
      };
      cell(button);
      cell(digits(maps.r[k], true), "number");
      cell(digits(maps.a[k]), "number");
      cell(maps.r[k] === 0 ? "same" : wants, maps.r[k] === 0 ? "" : wants);
      cell(digits(maps.k[k], true),
        `number ${maps.k[k] > 0 ? "needs" : maps.k[k] < 0 ? "hinders" : ""}`);
      return row;
    });
    $("ra-cells").tBodies[0].replaceChildren(...rows);
  }
  function chooseHead(head, { scroll = false } = {}) {
    state.head = head;
    const rank = ranked().indexOf(head) + 1, norm = normOf(norms("norms"), head);
    const total = norms("norms").flat().reduce((sum, v) => sum + (v ?? 0), 0) || 1;
    const maps = mapsOf(head);
    const layer = data.layers.find((l) => String(l.layer) === head.split(".")[0]);
    const where = /^\d+$/.test(layer.name) ? "" : ` (${layer.name}, head ${head.split(".")[1]})`;
    $("ra-title").textContent = `${nameOf(head)}${where}: rank ${rank} of ${ranked().length}`
      + `, ‖R‖ = ${digits(norm)} (${percent(norm / total)} of all heads)`
      + (maps ? "" : "; its maps are not here");
    $("ra-name-a").textContent = "Attention A: what the model does";
    $("ra-name-r").textContent = minus
      ? "−R: where descent moves attention" : "R: the gradient; descent goes the other way";
    state.cell = maps ? strongest(maps, 1)[0] ?? [0, 0] : null;
    state.map = state.view;
    if (maps) {
      $("ra-cut").textContent = maps.firstRow || maps.firstColumn
        ? `The maps show the last ${maps.n} tokens only.` : "";
      fillCells(maps);
    } else $("ra-cells").tBodies[0].replaceChildren();
    showMaps(); showCell(); shade(); markGrid();
    $("ra-before").disabled = rank <= 1;
    $("ra-after").disabled = rank >= ranked().length;
    if (scroll && $("ra-head").getBoundingClientRect().top > innerHeight * 0.8) {
      $("ra-head").scrollIntoView({ block: "nearest" });
    }
  }

  function chooseView(view) {
    state.view = view;
    if (state.map !== "a") state.map = view;
    const maps = state.head && mapsOf(state.head);
    if (maps) fillCells(maps);
    showMaps(); showCell(); shade();
  }
  // One cell of one head, by layer, head, query and key, as the map of what blocking it does.
  function chooseEdge([layer, index, query, key]) {
    state.view = "k";
    const head = `${layer}.${index}`, maps = mapsOf(head);
    chooseHead(head);
    if (!maps) return;
    const [i, j] = [query - maps.firstRow, key - maps.firstColumn];
    if (i >= 0 && i < maps.n && j >= 0 && j < maps.m) chooseCell(i, j, "k");
  }
  function intoSight(element) {
    const box = element.getBoundingClientRect();
    if (box.top < 0 || box.top > innerHeight * 0.8) element.scrollIntoView({ block: "nearest" });
  }

  // ---- layers × tokens ------------------------------------------------------------------------
  let flowMaps = null;
  function readFlow() {
    const facts = data.examples[state.example].flow, part = $("ra-flow-part");
    flowMaps = null;
    if (!part) return;
    part.hidden = !facts;
    if (!facts) return;
    const [columnSide, firstColumn, m] = facts.columns, n = data.layers.length;
    const bytes = atob(facts.values), table = halfTable(), there = new Uint8Array(n * m);
    const flow = Float32Array.from({ length: n * m }, (_, i) => {
      const value = table[bytes.charCodeAt(2 * i) | bytes.charCodeAt(2 * i + 1) << 8];
      there[i] = Number.isNaN(value) ? 0 : 1;
      return value * facts.limit;
    });
    const columnChips = chips(columnSide);
    flowMaps = {
      flow, there, n, m, blocked: facts.limit, firstColumn, query: facts.query[1],
      rowTokens: data.layers.map((l) => l.name),
      columnTokens: Array.from(
        { length: m }, (_, j) => columnChips[firstColumn + j]?.textContent ?? ""),
    };
    const asked = tokenOf(...facts.query)?.textContent ?? "";
    $("ra-flow-title").replaceChildren(
      "Where information enters the token ", ...tokenAt(asked, facts.query[1]));
    let best = 0;
    flow.forEach((v, i) => { if (Math.abs(v) > Math.abs(flow[best]) || !there[best]) best = i; });
    state.flowCell = [Math.floor(best / m), best % m];
  }
  function showFlow() {
    if (!flowMaps) return;
    draw("flow", flowMaps, state.flowCell);
    lossBar($("ra-bar-flow"), flowMaps.blocked);
    const [i, j] = state.flowCell, k = i * flowMaps.m + j;
    const words = flowMaps.there[k] ? `if blocked, ${changeOf(flowMaps.flow[k])}`
      .replace("this look", "what is read there") : "this layer does not look there";
    $("ra-flow-readout").replaceChildren(`layer ${flowMaps.rowTokens[i]}, to `,
      ...tokenAt(flowMaps.columnTokens[j], flowMaps.firstColumn + j), `: ${words}`);
    $("ra-flow").setAttribute("aria-label",
      `Loss if blocked, ${flowMaps.n} layers by ${flowMaps.m} tokens`);
  }
  // The head of a layer that does most of what a cell of the flow sums.
  function chooseOfFlow() {
    const [i, j] = state.flowCell, layer = data.layers[i].layer;
    let best = null, most = 0;
    for (const head of Object.keys(data.examples[state.example].maps)) {
      if (head.split(".")[0] !== String(layer)) continue;
      const maps = mapsOf(head), row = flowMaps.query - maps.firstRow;
      const size = Math.abs(maps.k[row * maps.m + j]);
      if (size > most) [best, most] = [head, size];
    }
    if (!best) return;
    chooseEdge([...best.split("."), flowMaps.query, flowMaps.firstColumn + j]);
    intoSight($("ra-head"));
  }

  // ---- the grid -------------------------------------------------------------------------------
  function norms(kind) {
    if (kind === "mean") return data.norms;
    return data.examples[state.example][kind];
  }
  function normOf(values, head) {
    const [layer, index] = head.split(".").map(Number);
    return values[data.layers.findIndex((l) => l.layer === layer)][index];
  }
  function ranked(kind = "norms") {
    const values = norms(kind), heads = [];
    values.forEach((row, i) => row.forEach((v, j) =>
      heads.push([`${data.layers[i].layer}.${j}`, v ?? -Infinity])));
    return heads.sort((x, y) => y[1] - x[1]).map((one) => one[0]);
  }
  function drawGrid() {
    const values = norms(state.kind), grid = $("ra-grid");
    const order = ranked(state.kind), place = new Map(order.map((head, i) => [head, i + 1]));
    const most = Math.max(...values.flat().map((v) => v ?? 0)) || 1;
    grid.style.setProperty("--heads", data.heads);
    grid.style.setProperty("--rows", values.length);
    grid.style.setProperty("--name", Math.max(3, ...data.layers.map((l) => l.name.length)));
    grid.replaceChildren();
    const top = document.createElement("div");
    top.className = "columns";
    top.setAttribute("aria-hidden", "true");
    const every = Math.ceil(data.heads / (grid.clientWidth < 500 ? 13 : 26));
    for (let j = -1; j < data.heads; j++) {
      const name = document.createElement("span");
      name.textContent = j < 0 || state.order === "norm" || j % every ? "" : String(j);
      top.append(name);
    }
    grid.append(top);
    values.forEach((row, i) => {
      const line = document.createElement("div");
      line.setAttribute("role", "row");
      const name = document.createElement("span");
      name.className = "layer";
      name.setAttribute("role", "rowheader");
      name.textContent = data.layers[i].name;
      line.append(name);
      const heads = row.map((_, j) => `${data.layers[i].layer}.${j}`);
      if (state.order === "norm") heads.sort((x, y) => place.get(x) - place.get(y));
      for (const head of heads) {
        const value = normOf(values, head), rank = place.get(head);
        const cell = document.createElement("button");
        cell.type = "button";
        cell.setAttribute("role", "gridcell");
        cell.dataset.head = head;
        cell.tabIndex = -1;
        const colour = mix(VIRIDIS, (value ?? 0) / most);
        cell.style.background = rgb(colour);
        cell.style.color = inkOn(colour);
        const text = `${nameOf(head)}, norm ${digits(value ?? NaN)}, rank ${rank}`;
        cell.setAttribute("aria-label", text);
        cell.title = text;
        if (rank <= data.top) { cell.textContent = String(rank); cell.classList.add("top"); }
        line.append(cell);
      }
      grid.append(line);
    });
    const what = state.kind === "attention" ? "‖A‖" : "‖R‖";
    bar($("ra-grid-bar"), VIRIDIS, "0", what, digits(most));
    markGrid();
  }
  function markGrid() {
    for (const cell of $("ra-grid").querySelectorAll("[data-head]")) {
      const chosen = cell.dataset.head === state.head;
      cell.setAttribute("aria-selected", String(chosen));
      cell.tabIndex = chosen ? 0 : -1;
    }
  }
  $("ra-grid").addEventListener("click", (event) => {
    const cell = event.target.closest("[data-head]");
    if (cell) chooseHead(cell.dataset.head, { scroll: event.detail > 0 });
  });
  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  $("ra-grid").addEventListener("keydown", (event) => {
    const cell = event.target.closest("[data-head]");
    if (!cell || !(event.key in STEPS)) return;
    event.preventDefault();
    const lines = [...$("ra-grid").children], line = lines.indexOf(cell.parentElement);
    const column = [...cell.parentElement.children].indexOf(cell);
    const [down, right] = STEPS[event.key];
    const to = lines[line + down]?.children[Math.max(1, column + right)];
    if (!to?.dataset.head) return;
    to.focus();
    chooseHead(to.dataset.head);
  });

  // ---- controls -------------------------------------------------------------------------------
  for (const which of ["a", "r", "k"]) {
    const canvas = $(`ra-${which}`);
    const point = (event) => {
      const maps = state.head && mapsOf(state.head), frame = frames[which];
      if (!maps || !frame) return;
      const box = canvas.getBoundingClientRect();
      const i = Math.floor((event.clientY - box.top - frame.top) / frame.cell);
      const j = Math.floor((event.clientX - box.left - frame.left) / frame.cell);
      if (i >= 0 && i < maps.n) chooseCell(i, Math.min(Math.max(j, 0), maps.m - 1), which);
    };
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("keydown", (event) => {
      const maps = state.head && mapsOf(state.head);
      if (!maps || !(event.key in STEPS)) return;
      event.preventDefault();
      const [down, right] = STEPS[event.key], [i, j] = state.cell;
      chooseCell(Math.min(Math.max(i + down, 0), maps.n - 1),
        Math.min(Math.max(j + right, 0), maps.m - 1), which);
    });
  }
  $("ra-prompts").addEventListener("pointerover", (event) => {
    const chip = event.target.closest?.(".token:not(.next)"), maps = state.head && mapsOf(state.head);
    if (!chip || !maps || chip.closest(".prompt").dataset.side !== maps.rowSide) return;
    const i = Array.prototype.indexOf.call(chips(maps.rowSide), chip) - maps.firstRow;
    if (i >= 0 && i < maps.n) chooseCell(i, strongestOf(maps, i), state.map);
  });
  function strongestOf(maps, i) {
    const values = maps[state.view];
    let best = 0;
    for (let j = 0; j < maps.m; j++) {
      if (Math.abs(values[i * maps.m + j]) > Math.abs(values[i * maps.m + best])) best = j;
    }
    return best;
  }
  for (const button of document.querySelectorAll("[data-view]")) {
    button.addEventListener("click", () => chooseView(button.dataset.view));
  }
  $("ra-edges")?.addEventListener("click", (event) => {
    const row = event.target.closest("tr")?.querySelector("[data-edge]");
    if (!row) return;
    chooseEdge(row.dataset.edge.split(".").map(Number));
    intoSight($("ra-head"));
  });
  if ($("ra-flow")) {
    const canvas = $("ra-flow");
    const cellAt = (event) => {
      const box = canvas.getBoundingClientRect(), frame = frames.flow;
      const i = Math.floor((event.clientY - box.top - frame.top) / frame.tall);
      const j = Math.floor((event.clientX - box.left - frame.left) / frame.cell);
      return i >= 0 && i < flowMaps.n && j >= 0 && j < flowMaps.m ? [i, j] : null;
    };
    const go = (cell) => { if (cell) { state.flowCell = cell; showFlow(); } return cell; };
    canvas.addEventListener("pointermove", (event) => go(cellAt(event)));
    canvas.addEventListener("click", (event) => { if (go(cellAt(event))) chooseOfFlow(); });
    canvas.addEventListener("keydown", (event) => {
      if (event.key === "Enter") chooseOfFlow();
      if (!(event.key in STEPS)) return;
      event.preventDefault();
      const [down, right] = STEPS[event.key], [i, j] = state.flowCell;
      go([Math.min(Math.max(i + down, 0), flowMaps.n - 1),
        Math.min(Math.max(j + right, 0), flowMaps.m - 1)]);
    });
  }
  function showExample() {
    for (const block of document.querySelectorAll(".example, .edges")) {
      block.classList.toggle("aside", Number(block.dataset.example) !== state.example);
    }
    drawGrid();
    readFlow();
    chooseHead(ranked()[0]);
    showFlow();
  }
  const follow = (id, name, act) => $(id)?.addEventListener("change", (event) => {
    state[name] = event.target.value;
    act();
  });
  $("ra-example").addEventListener("change", (event) => {
    state.example = Number(event.target.value);
    showExample();
  });
  follow("ra-kind", "kind", drawGrid);
  follow("ra-order", "order", drawGrid);
  follow("ra-scale", "scale", () => { showMaps(); shade(); });
  const step = (by) => () => {
    const order = ranked(), to = order[order.indexOf(state.head) + by];
    if (to) chooseHead(to);
  };
  $("ra-before").addEventListener("click", step(-1));
  $("ra-after").addEventListener("click", step(1));
  const again = () => { showMaps(); showFlow(); shade(); };
  darkQuery.addEventListener("change", again);
  addEventListener("themechange", again);
  addEventListener("beforeprint", () => { printing = true; again(); });
  addEventListener("afterprint", () => { printing = false; again(); });
  let width = 0;
  new ResizeObserver(() => {
    const now = $("explorer").clientWidth;
    if (now !== width) { width = now; showMaps(); showFlow(); }
  }).observe($("explorer"));
  document.documentElement.classList.add("scripted");
  showExample();
})();
