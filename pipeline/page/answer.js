"use strict";

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
    this.asked.forEach((picture, place) => { picture.tiles = tiles[place] ?? null; });
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
