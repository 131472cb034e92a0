"use strict";

const TASKS = {
  caption: { title: "Describe", prompt: "Describe this image.", limit: 128 },
  ocr: { title: "Read", prompt: "Transcribe all text.", limit: 1024 },
};
const QUESTION_LIMIT = 512;

let running = null; // AbortController of the answer under way

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

function takePictures() {
  $("files").addEventListener("change", () => { add([...$("files").files]); $("files").value = ""; });
  $("image").addEventListener("load", describe);
  $("image").addEventListener("error", () => { $("image").hidden = true; $("unshown").hidden = false; });
  $("toggle").addEventListener("click", () => {
    $("toggle").setAttribute("aria-pressed", $("toggle").getAttribute("aria-pressed") !== "true");
    drawTiles();
  });
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

function takeQuestions() {
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
  document.addEventListener("click", (event) => { if (!$("settings").contains(event.target)) $("settings").open = false; });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    running?.abort();
    $("settings").open = false;
  });
}

takePictures();
takeQuestions();
greet();
