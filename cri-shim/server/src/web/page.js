// Draws /node.json, every two seconds. Everything that comes from the node is put into the
// page as text; sizes go through the CSS object model, which the content policy allows.
"use strict";

const INTERVAL = 2000;
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const byId = (id) => document.getElementById(id);

function make(tag, classes, ...children) {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Containers that own something, each with a letter and a colour that stay the same while it lives. */
const places = new Map();
function ownersOf(node) {
  const owners = node.containers.filter(
    (c) => c.exclusive || c.hugepages.length > 0 || c.devices.length > 0 || c.cpus.length > 0);
  for (const id of [...places.keys()]) if (!owners.some((c) => c.id === id)) places.delete(id);
  for (const owner of owners) {
    if (places.has(owner.id)) continue;
    let place = 0;
    while ([...places.values()].includes(place)) place += 1;
    places.set(owner.id, place);
  }
  return owners;
}
const colour = (id) => `o${places.get(id) % 8}`;
const letter = (id) => LETTERS[places.get(id) % LETTERS.length];
const title = (c) => `${c.namespace}/${c.pod}/${c.name}`;

const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

function ranges(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b);
  const parts = [];
  for (let i = 0; i < sorted.length; i += 1) {
    let last = i;
    while (last + 1 < sorted.length && sorted[last + 1] === sorted[last] + 1) last += 1;
    parts.push(i === last ? `${sorted[i]}` : `${sorted[i]}-${sorted[last]}`);
    i = last;
  }
  return parts.join(",");
}

function drawOwners(owners) {
  const items = owners.map((owner) => {
    const parts = [];
    if (owner.cpus.length) parts.push(`CPUs ${ranges(owner.cpus)}${owner.exclusive ? " exclusive" : ""}`);
    for (const grant of owner.hugepages) parts.push(`${grant.pages} × ${grant.size} on node ${grant.node}`);
    if (owner.devices.length) parts.push(owner.devices.join(", "));
    return make("li", "", make("span", `key ${colour(owner.id)}`, letter(owner.id)),
      make("span", "", `${title(owner)}: ${parts.join("; ")}`));
  });
  byId("owners").replaceChildren(...(items.length ? items : [make("li", "none", "nobody owns anything")]));
}

function drawCpu(cpu, node, owners) {
  const owner = owners.find((c) => c.exclusive && c.cpus.includes(cpu.id));
  const irqs = node.irqs.filter((irq) => irq.cpus.includes(cpu.id)).length;
  const reserved = node.reserved.includes(cpu.id);
  const classes = ["cpu"];
  if (owner) classes.push(colour(owner.id));
  if (reserved) classes.push("reserved");
  if (!cpu.online) classes.push("offline");
  const box = make("div", classes.join(" "), make("b", "", String(cpu.id)),
    make("small", "", owner ? letter(owner.id) : reserved ? "system" : cpu.online ? "shared" : "off"));
  const words = [`CPU ${cpu.id}`, owner ? `exclusive to ${title(owner)}` : "shared"];
  if (reserved) words.push("reserved");
  if (cpu.isolated) words.push("isolated at boot");
  words.push(`${irqs} interrupts`);
  box.title = words.join(", ");
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", box.title);
  box.dataset.cpu = cpu.id;
  if (owner) box.dataset.owner = owner.id;
  return box;
}

function drawPool(pool, id, owners) {
  const bar = make("div", "bar");
  const part = (pages, classes, what) => {
    if (pages <= 0 || pool.total === 0) return;
    const segment = make("span", classes);
    segment.style.flexGrow = String(pages);
    segment.title = what;
    bar.append(segment);
  };
  let granted = 0;
  for (const owner of owners) {
    for (const grant of owner.hugepages.filter((g) => g.node === id && g.size === pool.size)) {
      granted += grant.pages;
      part(grant.pages, colour(owner.id), `${grant.pages} pages of ${title(owner)}`);
    }
  }
  const used = Math.max(0, pool.total - pool.free - granted);
  part(used, "used", `${used} pages in use by others`);
  part(pool.total - granted - used, "", "left");
  const text = `${pool.size}: ${pool.total} pages, ${pool.free} free, ${granted} granted`;
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", text);
  return make("div", "pool", make("p", "", text), bar);
}

function drawMachine(node, owners) {
  const { topology } = node;
  const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
  const cards = topology.nodes.map((numa) => {
    const cpus = topology.cpus.filter((cpu) => cpu.node === numa.id);
    const cores = new Map();
    for (const cpu of cpus) {
      const key = `${cpu.socket}/${cpu.core}`;
      cores.set(key, [...(cores.get(key) ?? []), cpu]);
    }
    const boxes = [...cores.values()].map(
      (threads) => make("div", "core", ...threads.map((cpu) => drawCpu(cpu, node, owners))));
    const sockets = [...new Set(cpus.map((cpu) => cpu.socket))].filter((s) => s !== null);
    const here = new Set(cpus.map((cpu) => cpu.id));
    const irqs = node.irqs.filter((irq) => irq.cpus.some((cpu) => here.has(cpu)));
    const functions = node.functions.filter((f) => f.function.numa === numa.id).length;
    const card = make("article", "node",
      make("h3", "", `Node ${numa.id}${sockets.length ? ` · socket ${sockets.join(", ")}` : ""} · ` +
        `${gib(numa.memory.total)}, ${gib(numa.memory.free)} free`),
      make("div", "cores", ...boxes),
      ...numa.hugepages.filter((pool) => pool.total > 0).map((pool) => drawPool(pool, numa.id, owners)),
      make("p", "irqs", `${count(irqs.length, "interrupt")} served here, ${count(functions, "PCI function")}`));
    card.dataset.node = numa.id;
    return card;
  });
  byId("machine").replaceChildren(...cards);
}

function drawDevices(node, owners) {
  const rows = node.functions.map(({ function: f, owner: id }) => {
    const owner = owners.find((c) => c.id === id);
    const cell = (value) => make("td", "", value === null || value === undefined ? "–" : String(value));
    const last = make("td", "", owner ? make("span", `key ${colour(owner.id)}`, letter(owner.id)) : "");
    if (owner) last.append(` ${title(owner)}`);
    const row = make("tr", "", cell(f.address), cell(f.id), cell(f.numa), cell(f.group), cell(f.driver),
      cell(f.interfaces.join(", ") || null), last);
    row.dataset.address = f.address;
    return row;
  });
  byId("devices").replaceChildren(...rows);
}

/** What one looks for first: verdicts, who has how much of the machine, what Pinion itself takes. */
function drawTally(node) {
  const { cpus } = node.topology;
  const own = new Set(node.containers.filter((c) => c.exclusive).flatMap((c) => c.cpus));
  const verdicts = node.containers.map((c) => (c.receipt?.error ? "violated" : c.receipt?.verdict));
  const tile = (classes, value, what) => make("li", classes, make("b", "", value), make("span", "", what));
  const items = ["aligned", "degraded", "violated"].map((verdict) => {
    const number = verdicts.filter((found) => found === verdict).length;
    return tile(number ? verdict : "unasked", String(number), verdict);
  });
  items.push(tile("", `${own.size} / ${cpus.length}`, "CPUs exclusive"));
  const infra = node.infrastructure;
  if (infra) {
    items.push(tile(infra.astray ? "broken" : "", infra.cpus,
      `CPUs of Pinion itself: ${count(infra.threads, "thread")}, ${(infra.memoryBytes / 2 ** 20).toFixed(0)} MiB`));
  }
  byId("tally").replaceChildren(...items);
}

function drawTerm(term) {
  const asked = term.asked !== null;
  const state = term.in_force ? "in force" : "not in force";
  const classes = asked ? (term.in_force ? "term kept" : "term broken") : "term unasked";
  const head = `${asked ? (term.in_force ? "✓" : "✗") : "·"} ${term.name}: ${asked ? `${state}, ${term.asked}` : "not asked"}`;
  const list = make("dl", "");
  if (term.reason) list.append(make("dt", "", "because"), make("dd", "", term.reason));
  for (const [key, value] of Object.entries(term.evidence)) {
    list.append(make("dt", "", key), make("dd", "", value === "" ? "(empty)" : value));
  }
  return [make("p", classes, head), list];
}

function drawReceipts(node) {
  const open = new Set([...document.querySelectorAll("#receipts details[open]")].map((d) => d.dataset.id));
  const all = node.containers.map((container) => {
    const receipt = container.receipt ?? { verdict: "unasked", terms: [] };
    const verdict = receipt.error ? "violated" : receipt.verdict;
    const details = make("details", "",
      make("summary", "", make("span", "name", title(container)),
        make("span", `verdict ${verdict}`, receipt.error ?? verdict),
        ...(receipt.terms ?? []).filter((t) => t.asked !== null).map((t) =>
          make("span", `chip ${t.in_force ? "kept" : "broken"}`, `${t.in_force ? "✓" : "✗"} ${t.name}`))),
      ...(receipt.terms ?? []).flatMap(drawTerm));
    details.dataset.id = container.id;
    details.dataset.verdict = verdict;
    details.open = open.has(container.id) || (location.hash === "#open" && verdict !== "unasked");
    return details;
  });
  byId("receipts").replaceChildren(...(all.length ? all : [make("p", "none", "no container runs")]));
}

function drawDrift(profile) {
  const items = profile.drift.map((d) => make("li", "broken",
    `${d.what}: ${d.wanted} declared, ${d.found} found${d.repairFailed ? ` (${d.repairFailed})` : ""}`));
  const calm = profile.present ? "the node is as declared" : `nothing is declared (${profile.path})`;
  byId("drift").replaceChildren(...(items.length ? items : [make("li", "none", calm)]));
}

async function refresh() {
  const state = byId("state");
  try {
    const answer = await fetch("node.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(await answer.text());
    const node = await answer.json();
    const owners = ownersOf(node);
    byId("host").textContent = `${node.version} on ${node.hostname}`;
    drawTally(node);
    drawOwners(owners);
    drawMachine(node, owners);
    drawDevices(node, owners);
    drawReceipts(node);
    drawDrift(node.profile);
    state.textContent = `as of ${new Date().toLocaleTimeString()}`;
    state.className = "";
  } catch (error) {
    state.textContent = `the node does not answer: ${error.message}`;
    state.className = "lost";
  }
  setTimeout(refresh, INTERVAL);
}

refresh();
