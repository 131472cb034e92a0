"use strict";

const $ = (id) => document.getElementById(id);
const TASKS = {
  caption: { title: "Describe", prompt: "Describe this image.", limit: 128 },
  ocr: { title: "Read", prompt: "Transcribe all text.", limit: 1024 },
};
const QUESTION_LIMIT = 512;
const BYTES = ["bytes", "kB", "MB"];

let pictures = []; // { file, url, tiles }; tiles once the server has told
let shown = null;
let running = null; // AbortController of the answer under way

// Pictures

function add(files) {
  complain("");
  const images = files.filter((file) => file.type.startsWith("image/"));
  const other = files.find((file) => !file.type.startsWith("image/"));
  if (other) complain(`“${other.name}” is not a picture.`);
  pictures = pictures.concat(images.map((file) => ({ file, url: URL.createObjectURL(file), tiles: null })));
  if (images.length) show(pictures[pictures.length - images.length]);
}

function remove(picture) {
  const place = pictures.indexOf(picture);
  pictures = pictures.filter((each) => each !== picture);
  show(picture === shown ? pictures[Math.min(place, pictures.length - 1)] ?? null : shown);
  ($("strip").querySelector("[aria-current] .pick") ?? $("files")).focus();
}

function show(picture) {
  shown = picture;
  $("stage").hidden = !picture;
  $("drop").hidden = !!picture;
  drawStrip();
  if (!picture) return;
  $("image").hidden = false;
  $("unshown").hidden = true;
  $("image").src = picture.url;
  $("image").alt = picture.file.name;
  $("name").textContent = picture.file.name;
  drawTiles();
}

function drawStrip() {
  $("strip").hidden = !pictures.length;
  const more = element("li", "more");
  const label = element("label", "", "+");
  label.htmlFor = "files";
  label.title = "Add pictures";
  more.append(label);
  $("strip").replaceChildren(...pictures.map(thumbnail), more);
}

function thumbnail(picture, place) {
  const item = element("li");
  if (picture === shown) item.setAttribute("aria-current", "true");
  const pick = button("pick", `Show picture ${place + 1}, ${picture.file.name}`, () => show(picture));
  pick.append(small(picture));
  const drop = button("drop", `Remove picture ${place + 1}, ${picture.file.name}`, () => remove(picture));
  drop.textContent = "×";
  item.append(pick, drop);
  return item;
}

function small(picture) {
  const image = element("img");
  image.src = picture.url;
  image.alt = "";
  return image;
}

/** The cuts that the model's processor made: equal parts of the picture, whatever its shape. */
function drawTiles() {
  const { rows = 0, cols = 0 } = shown.tiles ?? {};
  $("tiles").replaceChildren(...Array.from({ length: rows * cols }, (_, n) => tile(Math.floor(n / cols) + 1, (n % cols) + 1)));
  $("tiles").style.gridTemplate = rows ? `repeat(${rows}, 1fr) / repeat(${cols}, 1fr)` : "";
  $("tiles").hidden = !rows || $("toggle").getAttribute("aria-pressed") === "false";
  $("toggle").hidden = !rows;
  describe();
}

function tile(row, col) {
  const cell = element("span");
  cell.append(element("i", "", `${row}·${col}`));
  return cell;
}

function describe() {
  const image = $("image");
  const { width, height } = shown.tiles ?? { width: image.naturalWidth, height: image.naturalHeight };
  const pixels = width ? `${width} × ${height}` : "";
  $("size").textContent = [pixels, bytes(shown.file.size), shown.tiles && tilesText(shown.tiles)].filter(Boolean).join(" · ");
}

function tilesText({ rows, cols }) {
  return rows ? `${rows} × ${cols} tiles + overview` : "one tile";
}

function bytes(count) {
  const power = Math.min(BYTES.length - 1, Math.floor(Math.log10(Math.max(1, count)) / 3));
  return `${(count / 1000 ** power).toFixed(power === 2 ? 1 : 0)} ${BYTES[power]}`;
}

// Asking

async function ask(title, prompt, limit, needsPicture) {
  if (running) return;
  complain(needsPicture && !pictures.length ? "Add a picture first." : "");
  if (!$("problem").hidden) return $("files").focus();
  const asked = [...pictures];
  const answer = new Answer(title, asked);
  work(new AbortController());
  try {
    const chosen = Number($("limit").value) || limit;
    const body = JSON.stringify(await request(asked, prompt, chosen));
    answer.start();
    const response = await call("v1/chat/completions", $("key").value, { method: "POST", body, signal: running.signal });
    for await (const event of events(response)) answer.take(event);
    answer.finish();
    if ($("question").value.trim() === title) $("question").value = "";
  } catch (error) {
    answer.fail(error);
    if (error.status === 401) wantKey();
  } finally {
    work(null);
  }
}

async function request(asked, prompt, limit) {
  const images = await Promise.all(asked.map(async ({ file }) => ({ type: "image_url", image_url: { url: await dataUrl(file) } })));
  return {
    model: $("model").value || (await connect()),
    messages: [{ role: "user", content: [...images, { type: "text", text: prompt }] }],
    max_tokens: limit,
    stream: true,
    stream_options: { include_usage: true },
  };
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Problem(`“${file.name}” cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(file);
  });
}

/** Switch between asking and answering. Nothing is disabled and focus moves along, so that the keyboard keeps its place. */
function work(controller) {
  running = controller;
  const focused = document.activeElement;
  document.body.classList.toggle("busy", !!controller);
  for (const id of ["caption", "ocr"]) $(id).setAttribute("aria-disabled", !!controller);
  $("send").hidden = !!controller;
  $("stop").hidden = !controller;
  if (focused === $("send")) $("stop").focus();
  if (focused === $("stop")) $("send").focus();
}

/** One card: the question, its answer as it comes, what it cost. */
class Answer {
  constructor(title, asked) {
    this.card = $("card").content.firstElementChild.cloneNode(true);
    this.asked = asked;
    this.text = this.card.querySelector(".text");
    this.usage = null;
    this.reason = null;
    this.card.querySelector("h2").textContent = title;
    this.card.querySelector("header").prepend(...asked.map(small));
    this.card.setAttribute("aria-busy", "true");
    $("answers").prepend(this.card);
    $("hint").hidden = true;
    this.start();
    if (this.card.getBoundingClientRect().top > innerHeight * 0.7) this.card.scrollIntoView({ block: "center" });
  }

  start() {
    this.started = performance.now();
  }

  take({ choices = [], usage, smolvlm }) {
    const [choice] = choices;
    const piece = choice?.delta?.content ?? "";
    if (piece) {
      this.last = performance.now();
      this.first ??= this.last;
      this.text.append(this.text.hasChildNodes() ? piece : piece.trimStart());
    }
    this.reason = smolvlm?.finish_reasons?.[0] ?? choice?.finish_reason ?? this.reason;
    this.usage = usage ?? this.usage;
    if (smolvlm?.tiles) this.cut(smolvlm.tiles);
  }

  cut(tiles) {
    this.asked.forEach((picture, place) => { picture.tiles = tiles[place]; });
    this.tiles = tiles.reduce((sum, { rows, cols }) => sum + rows * cols + 1, 0);
    if (shown) drawTiles();
  }

  finish() {
    this.close();
    if (!this.text.textContent.trim()) this.say("The model ended its answer without a word.");
    if (this.reason === "length") this.say("Cut off at the token limit; Settings can raise it.");
    if (this.reason === "repetition") this.say("Stopped because it went in circles.");
  }

  fail(error) {
    this.close();
    if (error.name === "AbortError") return this.say("Stopped.");
    this.card.classList.add("failed");
    this.say(error instanceof Problem ? error.message : `This page failed: ${error.message}`);
  }

  close() {
    this.card.removeAttribute("aria-busy");
    if (this.first) this.card.querySelector("dl").replaceChildren(...this.costs().map(cost));
    const copy = this.card.querySelector(".copy");
    copy.hidden = !this.text.textContent;
    copy.onclick = () => navigator.clipboard.writeText(this.text.textContent).then(() => { copy.textContent = "Copied"; });
  }

  costs() {
    const { usage, started, first, last } = this;
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    const rate = usage && last - first > 10 ? ((usage.completion_tokens - 1) / (last - first)) * 1000 : 0;
    return [
      [seconds(first - started), "first token"],
      [seconds(performance.now() - started), "in total"],
      rate > 0 && [rate.toFixed(1), "tokens/s"],
      usage && [String(usage.completion_tokens), "tokens out"],
      usage && [String(usage.prompt_tokens), cached ? `tokens in, ${cached} cached` : "tokens in"],
      this.tiles && [String(this.tiles), this.tiles === 1 ? "tile" : "tiles"],
    ].filter(Boolean);
  }

  say(text) {
    const note = this.card.querySelector(".note");
    note.textContent = text;
    note.hidden = false;
  }
}

function cost([value, name]) {
  const pair = element("div");
  pair.append(element("dt", "", name), element("dd", "", value));
  return pair;
}

function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(2)} s`;
}

// The server

async function connect() {
  const before = $("model").value;
  const { data } = await (await call("v1/models", $("key").value)).json();
  if (!data.length) throw new Problem("The server offers no model.");
  $("model").replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === before)));
  tell("ready", $("model").value);
  return $("model").value;
}

function tell(state, text) {
  $("server").dataset.state = state;
  $("server").textContent = text;
  $("server").title = text;
}

function greet() {
  connect().catch((error) => {
    tell("off", error.status === 401 ? "needs an API key" : "no answer");
    complain(error.message);
    if (error.status === 401) wantKey();
  });
}

function wantKey() {
  $("settings").open = true;
  $("key").focus();
}

// Small parts

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function element(tag, name = "", text = "") {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}

function button(name, label, act) {
  const made = element("button", name);
  made.type = "button";
  made.title = label;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", act);
  return made;
}

function listen() {
  $("files").addEventListener("change", () => { add([...$("files").files]); $("files").value = ""; });
  $("image").addEventListener("load", describe);
  $("image").addEventListener("error", () => { $("image").hidden = true; $("unshown").hidden = false; });
  $("toggle").addEventListener("click", () => {
    $("toggle").setAttribute("aria-pressed", $("toggle").getAttribute("aria-pressed") !== "true");
    drawTiles();
  });
  for (const [id, { title, prompt, limit }] of Object.entries(TASKS)) $(id).addEventListener("click", () => ask(title, prompt, limit, true));
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (!question) return $("question").focus();
    ask(question, question, QUESTION_LIMIT, false);
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("ask").requestSubmit();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("key").addEventListener("change", () => { complain(""); greet(); });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    running?.abort();
    $("settings").open = false;
  });
  document.addEventListener("click", (event) => { if (!$("settings").contains(event.target)) $("settings").open = false; });
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) { event.preventDefault(); add(files); }
  });
  document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dragging"); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    add([...event.dataTransfer.files]);
  });
}

listen();
greet();
